//! The gradients of the loss of a tied head, with the logits made again piece by piece.
//!
//! Every element is one chain of fused multiply-adds in ascending order, so neither the grid nor the tiles show in the result.

use super::{
    Accuracy, Axis, Flops, InferError, OpDef,
    cross_entropy::IGNORE,
    label_logit::check_head,
    pack_panels::PANEL,
    row_tiles::panel_product,
    weight_grad::{outer_tile, pieces},
};
use crate::{
    DType, Tensor, Type,
    loops::{Buf, Expr, Ty, f32c, i32c, math},
    lower::Lower,
};

/// `(h [R, T, n], panels [ceil(V / 16), n, 16], labels i32 [R, T], lse [R, T], g [R, T], back [ceil(n / 16), V, 16])` → `dh [R, T, n]`,
/// where `lse = log sum_v exp(z_v)` of the logits `z = W h`, `g` is the gradient of a token's loss and `back` holds panels of `W^T`:
/// `dh = W^T dz`, `dz_v = (exp(z_v - lse) - [v = label]) g`, and 0 where the label is -100. Semantics section 1.3.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropyInput {
    /// The number of tokens.
    pub vocab: usize,
}

/// `(h, panels, labels, lse, g)` as for [`CrossEntropyInput`] → `dW [V, n]`: the sum over tokens of `dz_v h`.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropyWeight {
    /// The number of tokens.
    pub vocab: usize,
}

/// Tokens whose logits are in scratch at once.
const ROWS: usize = 24;
/// Logits of a token in scratch at once.
const WIDTH: usize = 96;
/// Rows of a register tile.
const TILE: usize = 6;

const H: usize = 0;
const PANELS: usize = 1;
const LABELS: usize = 2;
const LSE: usize = 3;
const G: usize = 4;
const BACK: usize = 5;

fn check(op: &'static str, vocab: usize, ins: &[Type], n: usize) -> Result<(), InferError> {
    super::check::count(op, ins, n..=n)?;
    check_head(op, vocab, ins)?;
    let want = ins[LABELS].with(DType::F32);
    match ins[LSE..=G].iter().find(|t| **t != want) {
        Some(t) => Err(InferError::new(op, format!("wants {want} for every token, found {t}"))),
        None => Ok(()),
    }
}

/// `dz` of every token, in f64.
fn reference(vocab: usize, ins: &[&Tensor]) -> Vec<Vec<f64>> {
    let (h, panels, labels) = (ins[H], ins[PANELS].as_f32(), ins[LABELS].to_i64());
    let n = h.ty.cols();
    let token = |row: usize| {
        let x = &h.as_f32()[row * n..][..n];
        let (lse, g) = (f64::from(ins[LSE].as_f32()[row]), f64::from(ins[G].as_f32()[row]));
        let dz = |v: usize| {
            let w = &panels[v / PANEL * n * PANEL..];
            let z = (0..n).fold(0.0f32, |z, j| x[j].mul_add(w[j * PANEL + v % PANEL], z));
            let hit = if labels[row] == v as i64 { 1.0 } else { 0.0 };
            ((f64::from(z) - lse).exp() - hit) * g
        };
        let ignored = labels[row] == i64::from(IGNORE);
        (0..vocab).map(|v| if ignored { 0.0 } else { dz(v) }).collect()
    };
    (0..labels.len()).map(token).collect()
}

/// Append `dz[r][0 .. width]` of `rows` tokens from `row0` on for the logits from `v0` on, `width` a multiple of the panel; `dz` is
/// `[row][WIDTH]`.
fn logits(cx: &mut Lower<'_>, vocab: usize, dz: Buf, row0: &Expr, rows: usize, v0: &Expr, width: usize) {
    let n = cx.ty(H).cols();
    let [h, panels, labels, lse, g] = [H, PANELS, LABELS, LSE, G].map(|k| cx.buf(k));
    cx.each_step(0, width, PANEL, |cx, q| {
        let p0 = cx.b.bind((v0 + &q) / PANEL * (n * PANEL));
        pieces(cx, rows, TILE, &|cx, r, tile| {
            let x0 = cx.b.bind((row0 + r) * n);
            let to = cx.b.bind(r * WIDTH + &q);
            panel_product(cx, (h, &x0), (panels, &p0), [tile, 1, n, PANEL], &|cx, i, _, lane, z| {
                cx.b.store(dz, &to + lane + i * WIDTH, z);
            });
        });
    });
    cx.each(0, rows, |cx, r| {
        let row = cx.b.bind(row0 + &r);
        let label = cx.b.bind(Expr::load(labels, &row));
        let real = label.clone().ne(i32c(IGNORE));
        let g = cx.b.bind(real.select(Expr::load(g, &row), f32c(0.0)));
        let lse = cx.b.bind(Expr::load(lse, row));
        let label = cx.b.bind(label.cast(Ty::I64) - v0);
        let inside = cx.b.bind(Expr::from(vocab) - v0);
        let base = cx.b.bind(r * WIDTH);
        cx.lanes(0, width, 2, |cx, l| {
            let at = cx.b.bind(&base + &l);
            let p = math::exp(&mut cx.b, Expr::load(dz, &at) - &lse);
            let hit = l.clone().eq(label.clone()).select(f32c(1.0), f32c(0.0));
            let e = (p - hit) * &g;
            cx.b.store(dz, at, l.lt(inside.clone()).select(e, f32c(0.0)));
        });
    });
}

/// Call `run(cx, first, rows)` for blocks of tokens, one for each instance.
fn token_grid(cx: &mut Lower<'_>, rows: usize, run: &dyn Fn(&mut Lower<'_>, &Expr, usize)) {
    let (full, rest) = (rows / ROWS, rows % ROWS);
    let at = cx.b.grid(rows.div_ceil(ROWS));
    let row0 = cx.b.bind(&at * ROWS);
    match (full, rest) {
        (_, 0) => run(cx, &row0, ROWS),
        (0, rest) => run(cx, &row0, rest),
        (full, rest) => cx.if_else(at.lt(Expr::from(full)), |cx| run(cx, &row0, ROWS), |cx| run(cx, &row0, rest)),
    }
}

impl OpDef for CrossEntropyInput {
    const NAME: &'static str = "cross_entropy_input";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check(Self::NAME, self.vocab, ins, 6)?;
        let want = Type::f32(&[ins[H].cols().div_ceil(PANEL), self.vocab, PANEL]);
        if ins[BACK] != want {
            return Err(InferError::new(Self::NAME, format!("wants transposed panels {want}, found {}", ins[BACK])));
        }
        Ok(vec![ins[H].clone()])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (n, back) = (ins[H].ty.cols(), ins[BACK].as_f32());
        let w = |v: usize, j: usize| f64::from(back[(j / PANEL * self.vocab + v) * PANEL + j % PANEL]);
        let dh = |dz: &Vec<f64>, j: usize| dz.iter().enumerate().map(|(v, dz)| dz * w(v, j)).sum::<f64>() as f32;
        let all = reference(self.vocab, ins);
        let out = all.iter().flat_map(|dz| (0..n).map(move |j| dh(dz, j))).collect();
        vec![Tensor::f32(&ins[H].ty.dims, out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[H].rows() * self.vocab * (4 * ins[H].cols() + 14))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(H).rows(), cx.ty(H).cols());
        let (back, q_n) = (cx.buf(BACK), n.div_ceil(PANEL));
        let dz = cx.b.scratch("dz", DType::F32, ROWS * WIDTH);
        let sum = cx.b.scratch("sum", DType::F32, ROWS * q_n * PANEL);
        token_grid(cx, rows, &|cx, row0, rows| {
            cx.lanes(0, rows * q_n * PANEL, 4, |cx, i| cx.b.store(sum, i, f32c(0.0)));
            let piece = |cx: &mut Lower<'_>, v0: &Expr, width: usize| {
                logits(cx, self.vocab, dz, row0, rows, v0, width.next_multiple_of(PANEL));
                cx.each(0, q_n, |cx, q| {
                    let p0 = cx.b.bind((&q * self.vocab + v0) * PANEL);
                    pieces(cx, rows, TILE, &|cx, r, tile| {
                        let to = cx.b.bind((r * q_n + &q) * PANEL);
                        let x0 = cx.b.bind(r * WIDTH);
                        cx.lanes(0, PANEL, 4, |cx, lane| {
                            let at: Vec<Expr> = (0..tile).map(|i| cx.b.bind(&to + &lane + i * q_n * PANEL)).collect();
                            let accs: Vec<_> = at.iter().map(|at| cx.b.local(Expr::load(sum, at))).collect();
                            cx.each(0, width, |cx, v| {
                                let w = cx.b.bind(Expr::load(back, &p0 + &v * PANEL + &lane));
                                for (i, &acc) in accs.iter().enumerate() {
                                    cx.b.set(acc, Expr::load(dz, &x0 + &v + i * WIDTH).fma(&w, acc));
                                }
                            });
                            at.iter().zip(accs).for_each(|(at, acc)| cx.b.store(sum, at, acc));
                        });
                    });
                });
            };
            pieces(cx, self.vocab, WIDTH, &piece);
            cx.each(0, rows, |cx, r| {
                let (from, to) = (cx.b.bind(&r * (q_n * PANEL)), cx.b.bind((row0 + r) * n));
                cx.lanes(0, n, 2, |cx, j| cx.put(0, &to + &j, Expr::load(sum, &from + j)));
            });
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows, Axis::Shared, Axis::Rows, Axis::Rows, Axis::Rows, Axis::Shared]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 2e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let back = |op: &CrossEntropyWeight, ins: &[Type]| Type::f32(&[ins[H].cols().div_ceil(PANEL), op.vocab, PANEL]);
        let all = CrossEntropyWeight::samples().into_iter();
        all.map(|(op, ins)| (CrossEntropyInput { vocab: op.vocab }, [&ins[..], &[back(&op, &ins)]].concat())).collect()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        CrossEntropyWeight { vocab: self.vocab }.sample_input(k, ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, mut ins) = Self::samples().remove(0);
        let short = ins[..5].to_vec();
        ins[BACK].dims[1] += 1;
        vec![(op.clone(), ins), (op, short)]
    }
}

impl OpDef for CrossEntropyWeight {
    const NAME: &'static str = "cross_entropy_weight";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check(Self::NAME, self.vocab, ins, 5)?;
        Ok(vec![Type::f32(&[self.vocab, ins[H].cols()])])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let n = ins[H].ty.cols();
        let mut out = vec![0.0f64; self.vocab * n];
        for (dz, h) in reference(self.vocab, ins).iter().zip(ins[H].as_f32().chunks(n)) {
            for (dz, w) in dz.iter().zip(out.chunks_mut(n)) {
                w.iter_mut().zip(h).for_each(|(w, h)| *w += dz * f64::from(*h));
            }
        }
        vec![Tensor::f32(&[self.vocab, n], out.into_iter().map(|x| x as f32).collect())]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(ins[H].rows() * self.vocab * (4 * ins[H].cols() + 14))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(H).rows(), cx.ty(H).cols());
        let h = cx.buf(H);
        let dz = cx.b.scratch("dz", DType::F32, ROWS * WIDTH);
        let sum = cx.b.scratch("sum", DType::F32, WIDTH * n);
        let (full, rest) = (self.vocab / WIDTH, self.vocab % WIDTH);
        let at = cx.b.grid(self.vocab.div_ceil(WIDTH));
        let v0 = cx.b.bind(&at * WIDTH);
        let part = |cx: &mut Lower<'_>, width: usize| {
            cx.lanes(0, width * n, 4, |cx, i| cx.b.store(sum, i, f32c(0.0)));
            pieces(cx, rows, ROWS, &|cx, row0, rows| {
                logits(cx, self.vocab, dz, row0, rows, &v0, width.next_multiple_of(PANEL));
                let (zero, count) = (Expr::from(0), Expr::from(rows));
                pieces(cx, n, PANEL, &|cx, j, lanes| {
                    let x0 = cx.b.bind(row0 * n + j);
                    pieces(cx, width, TILE, &|cx, v, tile| {
                        let at = cx.b.bind(v * n + j);
                        let start = |_: &mut Lower<'_>, i: usize, lane: &Expr| Expr::load(sum, &at + lane + i * n);
                        outer_tile(
                            cx,
                            (dz, v, WIDTH),
                            (h, &x0, n),
                            [&zero, &count],
                            [tile, lanes],
                            &start,
                            &|cx, i, lane, w| cx.b.store(sum, &at + lane + i * n, w),
                        );
                    });
                });
            });
            let to = cx.b.bind(&v0 * n);
            cx.lanes(0, width * n, 4, |cx, i| cx.put(0, &to + &i, Expr::load(sum, i)));
        };
        match (full, rest) {
            (_, 0) => part(cx, WIDTH),
            (0, rest) => part(cx, rest),
            (full, rest) => cx.if_else(at.lt(Expr::from(full)), |cx| part(cx, WIDTH), |cx| part(cx, rest)),
        }
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 2e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |r, t, n: usize, vocab: usize| {
            let (ty, panels) = (Type::f32(&[r, t]), Type::f32(&[vocab.div_ceil(PANEL), n, PANEL]));
            (CrossEntropyWeight { vocab }, vec![Type::f32(&[r, t, n]), panels, Type::i32(&[r, t]), ty.clone(), ty])
        };
        vec![of(2, 3, 9, 11), of(1, 1, 32, 16), of(5, 11, 21, 301), of(3, 8, 7, 192)]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            // About what the logits of a sample sum to.
            LSE => super::heads::sample_between(ty, 3.0, 5.0, random),
            k => super::CrossEntropy { vocab: self.vocab }.sample_input(k, ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, mut ins) = Self::samples().remove(0);
        let mut wide = ins.clone();
        wide[PANELS].dims[0] += 1;
        ins[G] = Type::f32(&[3, 2]);
        vec![(op.clone(), ins), (op, wide)]
    }
}
