//! The loss of a tied head, without the logits of a batch in memory.

use super::{
    Accuracy, Axis, Binary, BinaryFn, CrossEntropyInput, CrossEntropyWeight, Flops, InferError, LabelLogit, OpDef,
    TransposePanels, VjpCx, check,
    linear::check_panels,
    pack_panels::PANEL,
    row_tiles::{TILE, panel_product, row_tiles},
};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Acc, Buf, Expr, Ty, f32c, i32c, int, math},
    lower::Lower,
};

/// The label of a position without loss.
pub const IGNORE: i32 = -100;

/// `(h [R, T, n], panels [ceil(V / 16), n, 16] or [G, ..], labels i32 [R, T], with a probe u [R, T, r] and A [M, V, r])` →
/// `nll [R, T]`: `log sum_v exp(z_v) - z_label` in nats, 0 where the label is -100.
///
/// `z = W h`, and with a probe `z_v += sum_i u_i A[member, v, i]`, equally many consecutive rows to each sign and member. Semantics
/// section 1.3. Panels are laid out as by [`super::PackPanels`]. Other labels outside `0..V` have the logit 0; the runtime refuses them before they get here.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropy {
    /// The number of tokens.
    pub vocab: usize,
}

/// Most rows of one instance; the panels stream from memory once for all of them.
const ROWS: usize = 66;
/// Panels whose logits are in scratch at once.
const PANELS: usize = 8;
/// Logits of a row in scratch at once.
const WIDTH: usize = PANELS * PANEL;
/// Stands for minus infinity without its NaNs.
const NEG: f32 = -1e30;

/// Memory of one instance; all row indices count from its first row.
struct Block {
    /// Logits `[row][WIDTH]`.
    z: Buf,
    /// Running maximum `[row][PANEL]`.
    peak: Buf,
    /// Running sum of `exp(z - peak)` `[row][PANEL]`.
    sum: Buf,
    /// The logit of the label `[row]`.
    hit: Buf,
}

impl Block {
    /// Take in the `width` logits of row `r`.
    fn absorb(&self, cx: &mut Lower<'_>, r: &Expr, width: &Expr) {
        let state = cx.b.bind(r * PANEL);
        let z = cx.b.bind(r * WIDTH);
        cx.lanes(0, PANEL, 2, |cx, l| {
            let at = cx.b.bind(&state + &l);
            let before = cx.b.bind(Expr::load(self.peak, &at));
            let peak = cx.b.local(&before);
            let logit = |q: &Expr| Expr::load(self.z, &z + q + &l);
            cx.each_step(0, width, PANEL, |cx, q| cx.b.set(peak, logit(&q).max(peak)));
            let keep = math::exp(&mut cx.b, before - Expr::from(peak));
            let sum = cx.b.local(Expr::load(self.sum, &at) * keep);
            cx.each_step(0, width, PANEL, |cx, q| {
                let e = math::exp(&mut cx.b, logit(&q) - Expr::from(peak));
                cx.b.set(sum, e + sum);
            });
            cx.b.store(self.peak, &at, peak);
            cx.b.store(self.sum, at, sum);
        });
    }

    /// `log sum exp` of row `r`.
    fn total(&self, cx: &mut Lower<'_>, r: &Expr) -> Expr {
        let state = cx.b.bind(r * PANEL);
        let peak = cx.reduce(0, PANEL, |_, l| vec![Acc::Max(Expr::load(self.peak, &state + l))]).remove(0);
        let sum = cx.sum(0, PANEL, |cx, l| {
            let e = math::exp(&mut cx.b, Expr::load(self.peak, &state + &l) - &peak);
            Expr::load(self.sum, &state + l) * e
        });
        let log = math::ln(&mut cx.b, sum);
        cx.b.bind(peak + log)
    }
}

impl CrossEntropy {
    /// Add the probe's rank-`r` logits of row `row` (row `at` of the instance) for `width` tokens from `v0` on.
    fn probe(&self, cx: &mut Lower<'_>, z: Buf, row: &Expr, at: &Expr, v0: &Expr, width: &Expr) {
        let (t, a) = (cx.ty(2).cols(), cx.ty(4).clone());
        let (u, table, rank) = (cx.buf(3), cx.buf(4), a.cols());
        let per = rows_of_member(cx.ty(0), a.dims[0]);
        let member = cx.b.bind(row / (t * per) % a.dims[0] * self.vocab);
        let (from, to) = (cx.b.bind(row * rank), cx.b.bind(at * WIDTH));
        cx.lanes(0, width, 2, |cx, l| {
            let v = cx.b.bind((v0 + &l).min(int(self.vocab - 1)) + &member);
            let mut e = Expr::load(z, &to + &l);
            for i in 0..rank {
                e = cx.b.bind(Expr::load(u, &from + i).fma(Expr::load(table, &v * rank + i), e));
            }
            cx.b.store(z, &to + l, e);
        });
    }
}

/// Consecutive rows that share a member, when the first half of all rows has a plus and the second a minus sign.
fn rows_of_member(h: &Type, members: usize) -> usize {
    (h.dims[0] / (2 * members)).max(1)
}

impl OpDef for CrossEntropy {
    const NAME: &'static str = "cross_entropy";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let fail = |why: String| Err(InferError::new(Self::NAME, why));
        check::count(Self::NAME, ins, 3..=5)?;
        let [h, panels, labels] = [&ins[0], &ins[1], &ins[2]];
        check::is(Self::NAME, "h", h, DType::F32, 3..=3)?;
        check_panels(Self::NAME, self.vocab, panels, h)?;
        check::groups(Self::NAME, "panels", panels, 3, h)?;
        check::is(Self::NAME, "labels", labels, DType::I32, 2..=2)?;
        if labels.dims != h.dims[..2] {
            return fail(format!("{h} wants labels for every token, found {labels}"));
        }
        match &ins[3..] {
            [] => {}
            [u, a] => {
                check::is(Self::NAME, "u", u, DType::F32, 3..=3)?;
                check::is(Self::NAME, "A", a, DType::F32, 3..=3)?;
                let fits = u.dims[..2] == h.dims[..2] && a.dims[1..] == [self.vocab, u.cols()];
                if !fits || !h.dims[0].is_multiple_of(a.dims[0]) {
                    return fail(format!("the probe {u}, {a} does not fit {h} and {} tokens", self.vocab));
                }
            }
            _ => return fail("a probe has two operands".into()),
        }
        Ok(vec![labels.with(DType::F32)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (h, panels, labels) = (ins[0], ins[1], ins[2].to_i64());
        let (rows, n, t) = (labels.len(), h.ty.cols(), ins[2].ty.cols());
        let size = self.vocab.div_ceil(PANEL) * n * PANEL;
        let groups = panels.ty.numel() / size;
        let logit = |row: usize, v: usize| {
            let w = &panels.as_f32()[row / (rows / groups) * size + v / PANEL * n * PANEL..];
            let x = &h.as_f32()[row * n..][..n];
            let z = (0..n).fold(0.0f32, |z, j| x[j].mul_add(w[j * PANEL + v % PANEL], z));
            let Some((u, a)) = ins.get(3).zip(ins.get(4)) else { return z };
            let per = rows_of_member(&h.ty, a.ty.dims[0]);
            let (rank, member) = (u.ty.cols(), row / (t * per) % a.ty.dims[0]);
            let a = &a.as_f32()[(member * self.vocab + v) * rank..];
            (0..rank).fold(z, |z, i| u.as_f32()[row * rank + i].mul_add(a[i], z))
        };
        let nll = |row: usize| {
            if labels[row] == i64::from(IGNORE) {
                return 0.0;
            }
            let z: Vec<f64> = (0..self.vocab).map(|v| logit(row, v).into()).collect();
            let peak = z.iter().fold(f64::NEG_INFINITY, |m, z| m.max(*z));
            let sum: f64 = z.iter().map(|z| (z - peak).exp()).sum();
            let hit = usize::try_from(labels[row]).ok().and_then(|v| z.get(v)).unwrap_or(&0.0);
            (peak + sum.ln() - hit) as f32
        };
        vec![Tensor::f32(&ins[2].ty.dims, (0..rows).map(nll).collect())]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let [h, panels, labels] = cx.ins[..] else {
            return Err(InferError::new(Self::NAME, "a probe replaces the gradient and has none"));
        };
        let (vocab, g) = (self.vocab, cx.grad());
        // What was subtracted from the logarithm of the sum.
        let hit = cx.op(LabelLogit { vocab }, &[h, panels, labels])?;
        let lse = cx.op(Binary { f: BinaryFn::Add }, &[cx.outs[0], hit])?;
        let dh = if cx.wants(0) {
            let back = cx.op(TransposePanels { m: vocab }, &[panels])?;
            Some(cx.op(CrossEntropyInput { vocab }, &[h, panels, labels, lse, g, back])?)
        } else {
            None
        };
        let dw =
            if cx.wants(1) { Some(cx.op(CrossEntropyWeight { vocab }, &[h, panels, labels, lse, g])?) } else { None };
        Ok(vec![dh, dw, None])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let per_logit = 2 * ins[0].cols() + 12 + ins.get(3).map_or(0, |u| 2 * u.cols());
        Flops::float(ins[0].rows() * self.vocab * per_logit)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(0).rows(), cx.ty(0).cols());
        let all = self.vocab.div_ceil(PANEL);
        let groups = cx.ty(1).numel() / (all * n * PANEL);
        let per = rows / groups;
        // An even number of instances, so that two threads are done at the same time.
        let height = per.div_ceil(per.div_ceil(ROWS).next_multiple_of(2)).next_multiple_of(TILE);
        let tiles = per.div_ceil(height);
        let (h, panels, labels) = (cx.buf(0), cx.buf(1), cx.buf(2));
        let block = Block {
            z: cx.b.scratch("z", DType::F32, height * WIDTH),
            peak: cx.b.scratch("peak", DType::F32, height * PANEL),
            sum: cx.b.scratch("sum", DType::F32, height * PANEL),
            hit: cx.b.scratch("hit", DType::F32, height),
        };
        let at = cx.b.grid(groups * tiles);
        let g = cx.b.bind(&at / tiles);
        let inner = cx.b.bind(at % tiles * height);
        let lo = cx.b.bind(&g * per + &inner);
        let hi = cx.b.bind(&g * per + (inner + height).min(int(per)));
        let count = cx.b.bind(&hi - &lo);
        cx.lanes(0, &count * PANEL, 1, |cx, i| {
            cx.b.store(block.peak, &i, f32c(NEG));
            cx.b.store(block.sum, i, f32c(0.0));
        });
        cx.lanes(0, count, 1, |cx, i| cx.b.store(block.hit, i, f32c(0.0)));
        cx.each_step(0, all, PANELS, |cx, first| {
            let last = cx.b.bind((&first + PANELS).min(int(all)));
            cx.each(&first, &last, |cx, p| {
                let p0 = cx.b.bind((&g * all + &p) * (n * PANEL));
                let to = cx.b.bind((p - &first) * PANEL);
                let known = (tiles == 1).then_some(per);
                row_tiles(cx, [&lo, &hi], known, TILE, &|cx, row, rows| {
                    let x0 = cx.b.bind(row * n);
                    let to = cx.b.bind((row - &lo) * WIDTH + &to);
                    panel_product(cx, (h, &x0), (panels, &p0), [rows, 1, n, PANEL], &|cx, r, _, lane, z| {
                        cx.b.store(block.z, &to + lane + r * WIDTH, z);
                    });
                });
            });
            let v0 = cx.b.bind(&first * PANEL);
            let width = cx.b.bind((last - first) * PANEL);
            // Tokens of this chunk; the padding of the last panel is not among them.
            let real = cx.b.bind((int(self.vocab) - &v0).min(width.clone()));
            cx.each(&lo, &hi, |cx, row| {
                let r = cx.b.bind(&row - &lo);
                if cx.n_ins() == 5 {
                    self.probe(cx, block.z, &row, &r, &v0, &real);
                }
                if !self.vocab.is_multiple_of(PANEL) {
                    cx.lanes(&real, &width, 1, |cx, l| cx.b.store(block.z, &r * WIDTH + l, f32c(NEG)));
                }
                block.absorb(cx, &r, &width);
                let label = cx.b.bind(Expr::load(labels, &row).cast(Ty::I64) - &v0);
                let here = int(0).le(label.clone()) & label.clone().lt(real.clone());
                cx.when(here, |cx| cx.b.store(block.hit, &r, Expr::load(block.z, &r * WIDTH + label)));
            });
        });
        cx.each(&lo, &hi, |cx, row| {
            let r = cx.b.bind(&row - &lo);
            let loss = block.total(cx, &r) - Expr::load(block.hit, &r);
            let ignored = Expr::load(labels, &row).eq(i32c(IGNORE));
            cx.put(0, &row, ignored.select(f32c(0.0), loss));
        });
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        [Axis::Rows, Axis::Weight { rank: 3 }, Axis::Rows, Axis::Rows, Axis::Shared][..ins.len()].to_vec()
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |rows: [usize; 2], n: usize, vocab: usize, lead: &[usize], probe: &[usize]| {
            let mut ins = vec![Type::f32(&[rows[0], rows[1], n])];
            ins.push(Type::f32(&[lead, &[vocab.div_ceil(PANEL), n, PANEL]].concat()));
            ins.push(Type::i32(&rows));
            if let [m, r] = *probe {
                ins.extend([Type::f32(&[rows[0], rows[1], r]), Type::f32(&[m, vocab, r])]);
            }
            (CrossEntropy { vocab }, ins)
        };
        vec![
            of([2, 3], 9, 11, &[], &[]),
            of([1, 1], 8, 16, &[], &[]),
            of([5, 15], 12, 301, &[], &[]),
            of([4, 10], 7, 130, &[2], &[]),
            of([4, 3], 7, 150, &[], &[2, 1]),
            of([4, 3], 7, 140, &[2], &[2, 3]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k != 2 {
            return super::random_tensor(ty, random);
        }
        let v = self.vocab as f32;
        let label = |i: usize, x: f32| if i % 4 == 1 { IGNORE } else { ((x.abs() * v) as i32).min(v as i32 - 1) };
        Tensor::i32(&ty.dims, (0..ty.numel()).map(|i| label(i, random())).collect())
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (h, panels, labels) = (Type::f32(&[2, 3, 5]), Type::f32(&[2, 5, 16]), Type::i32(&[2, 3]));
        let of = |vocab| CrossEntropy { vocab };
        vec![
            (of(20), vec![h.clone(), panels.clone(), Type::i32(&[2, 4])]),
            (of(40), vec![h.clone(), panels.clone(), labels.clone()]),
            (of(20), vec![h.clone(), panels.clone(), labels.clone(), Type::f32(&[2, 3, 1])]),
            (of(20), vec![h.clone(), panels.clone(), labels.clone(), Type::f32(&[2, 3, 1]), Type::f32(&[2, 20, 2])]),
            (of(20), vec![h, panels, Type::f32(&[2, 3])]),
        ]
    }
}
