//! One step of AdamW whose memory is two bytes a weight: codes with a scale for every block of columns (semantics 12.1).

use super::{Accuracy, Axis, Flops, InferError, OpDef, long::long};
use crate::{
    DType, Data, Tensor, Type,
    loops::{Acc, Buf, Expr, Ty, f32c, int, math},
    lower::Lower,
};

/// Columns that share the scales of a block; the last block of a row may be shorter.
pub const STATE_BLOCK: usize = 128;

/// `(w, m i8, ms, v u8, vs, g, rates f32 [5]) -> (w, m, ms, v, vs)`, updated in place: the step of [`super::Descend`] by AdamW with `w`
/// and `g` `[s.., n]`, codes of that shape and scales `[s.., ceil(n / 128)]`.
///
/// Codes are not linear, so that a block may hold numbers of different magnitudes: a code `c` of the mean of gradients stands for
/// `ms c |c|`, one of the mean of squares for `(vs c^2)^2`. The greatest magnitude of a block is 127, or 255; others are rounded to
/// the nearest code, but a mean of squares above zero never to zero. The step is made of the means before they are rounded.
#[derive(Clone, Debug, PartialEq)]
pub struct DescendBytes {
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of squares.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Weight decay, as a share of the learning rate.
    pub decay: f32,
}

/// The greatest codes.
const TOP: [f32; 2] = [127.0, 255.0];
/// Blocks whose magnitudes are all below have codes 0.
const LEAST: f32 = 1e-30;

/// `1 - beta`, rounded once.
fn rest(beta: f32) -> f32 {
    (1.0 - f64::from(beta)) as f32
}

impl DescendBytes {
    /// The types of the memory of a weight: codes and scales of the mean of gradients, then of squares.
    pub fn memory(w: &Type) -> [(&'static str, Type); 4] {
        let mut scales = w.clone();
        if let Some(last) = scales.dims.last_mut() {
            *last = last.div_ceil(STATE_BLOCK);
        }
        [("m8", w.with(DType::I8)), ("ms", scales.clone()), ("v8", w.with(DType::U8)), ("vs", scales)]
    }

    fn means(&self, m: f32, v: f32, g: f32) -> [f32; 2] {
        [self.beta1 * m + rest(self.beta1) * g, self.beta2 * v + rest(self.beta2) * (g * g)]
    }

    /// Both new means of element `at` of the block, from the old codes and scales.
    fn new_means(&self, cx: &mut Lower<'_>, at: &Expr, scale: &Expr, old: &[Expr; 2]) -> [Expr; 2] {
        let [m8, v8, g] = [1, 3, 5].map(|k| cx.buf(k));
        let g = cx.bind(Expr::load(g, at) * scale);
        let c = cx.bind(Expr::load(m8, at).cast(Ty::F32));
        let m = &old[0] * (&c * c.clone().abs());
        let c = cx.bind(Expr::load(v8, at).cast(Ty::F32));
        let root = cx.bind(&old[1] * (&c * &c));
        let v = &root * &root;
        let m = cx.bind(f32c(self.beta1) * m + f32c(rest(self.beta1)) * &g);
        [m, cx.bind(f32c(self.beta2) * v + f32c(rest(self.beta2)) * (&g * &g))]
    }

    fn block(&self, cx: &mut Lower<'_>, base: &Expr, at_scale: &Expr, len: usize, rates: &[Expr]) {
        let [scale, lr, c1, c2, share] = rates else { unreachable!("there are five rates") };
        let [w, m8, ms, v8, vs] = [0, 1, 2, 3, 4].map(|k| cx.buf(k));
        let old = [ms, vs].map(|b| cx.b.bind(Expr::load(b, at_scale)));
        let top = |cx: &mut Lower<'_>, k: usize| {
            let all = long(cx, len, &|cx, j| {
                let at = cx.bind(base + j);
                let [m, v] = self.new_means(cx, &at, scale, &old);
                Acc::Max(if k == 0 { m.abs() } else { v })
            });
            cx.bind(if k == 0 { all } else { all.sqrt() })
        };
        let tops = [top(cx, 0), top(cx, 1)];
        let inverse = |cx: &mut Lower<'_>, k: usize| {
            let unit = cx.bind(&tops[k] / f32c(TOP[k] * TOP[k]));
            let inverse = f32c(LEAST).lt(tops[k].clone()).select(f32c(1.0) / &unit, f32c(0.0));
            [unit, cx.bind(inverse)]
        };
        let [[m_unit, m_inverse], [v_unit, v_inverse]] = [0, 1].map(|k| inverse(cx, k));
        cx.lanes(0, len, 1, |cx, j| {
            let at = cx.bind(base + j);
            let [m, v] = self.new_means(cx, &at, scale, &old);
            let root = cx.bind(v.clone().sqrt());
            let kept = match self.decay {
                0.0 => Expr::load(w, &at),
                decay => Expr::load(w, &at) * cx.b.bind(f32c(1.0) - lr * (f32c(decay) * share)),
            };
            let step = lr * (&m * c1) / ((&v * c2).sqrt() + f32c(self.eps));
            store(cx, w, &at, kept - step);
            let code = cx.bind((m.clone().abs() * &m_inverse).sqrt().min(f32c(TOP[0])));
            let code = m.lt(f32c(0.0)).select(f32c(0.0) - &code, code);
            store(cx, m8, &at, low_byte(code));
            let share = cx.bind(&root * &v_inverse);
            let code = share.clone().sqrt().min(f32c(TOP[1])).max(f32c(1.0));
            store(cx, v8, &at, low_byte(f32c(0.0).lt(share).select(code, f32c(0.0))));
        });
        store(cx, ms, at_scale, m_unit);
        store(cx, vs, at_scale, v_unit);
    }
}

/// A word whose low byte is `x` rounded to an integer, ties to even; a store keeps the low byte.
fn low_byte(x: Expr) -> Expr {
    (x + f32c(math::ROUND)).to_bits()
}

fn store(cx: &mut Lower<'_>, to: Buf, at: &Expr, value: Expr) {
    cx.b.store(to, at, value);
}

impl OpDef for DescendBytes {
    const NAME: &'static str = "descend_bytes";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if let [w, m, ms, v, vs, g, rates] = ins
            && w.dtype == DType::F32
            && !w.dims.is_empty()
            && [m, ms, v, vs].into_iter().eq(DescendBytes::memory(w).iter().map(|t| &t.1))
            && g == w
            && *rates == Type::f32(&[5])
        {
            return Ok(ins[..5].to_vec());
        }
        Err(InferError::new(
            Self::NAME,
            "takes a weight, codes and scales of both means, a gradient of the weight's type and five rates",
        ))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [w, m8, ms, v8, vs, g, rates] = ins else { unreachable!("accepted by infer") };
        let (Data::I8(m8), Data::U8(v8)) = (&m8.data, &v8.data) else { unreachable!("accepted by infer") };
        let [scale, lr, c1, c2, share] = rates.as_f32()[..] else { unreachable!("accepted by infer") };
        let (n, mut w) = (w.ty.cols(), w.as_f32().to_vec());
        let (mut m_codes, mut v_codes) = (m8.clone(), v8.clone());
        let mut scales = [ms.as_f32().to_vec(), vs.as_f32().to_vec()];
        let g = g.as_f32();
        let blocks = n.div_ceil(STATE_BLOCK);
        for b in 0..scales[0].len() {
            let first = b / blocks * n + b % blocks * STATE_BLOCK;
            let range = first..(first + STATE_BLOCK).min((b / blocks + 1) * n);
            let old = [scales[0][b], scales[1][b]];
            let mean = |i: usize| {
                let (c, d) = (f32::from(m8[i]), f32::from(v8[i]));
                let root = old[1] * (d * d);
                self.means(old[0] * (c * c.abs()), root * root, g[i] * scale)
            };
            let most = |k: usize| range.clone().map(|i| mean(i)[k].abs()).fold(0.0, f32::max);
            let tops = [most(0), most(1).sqrt()];
            let inverse = [0, 1].map(|k| {
                scales[k][b] = tops[k] / (TOP[k] * TOP[k]);
                if tops[k] > LEAST { 1.0 / scales[k][b] } else { 0.0 }
            });
            for i in range.clone() {
                let [m, v] = mean(i);
                w[i] = w[i] * (1.0 - lr * (self.decay * share)) - lr * (m * c1) / ((v * c2).sqrt() + self.eps);
                let code = (m.abs() * inverse[0]).sqrt().min(TOP[0]).round_ties_even();
                m_codes[i] = if m < 0.0 { -code } else { code } as i8;
                let share = v.sqrt() * inverse[1];
                let code = share.sqrt().clamp(1.0, TOP[1]).round_ties_even();
                v_codes[i] = if share > 0.0 { code as u8 } else { 0 };
            }
        }
        let [ms, vs] = scales;
        let data = [Data::F32(w), Data::I8(m_codes), Data::F32(ms), Data::U8(v_codes), Data::F32(vs)];
        data.into_iter().zip(ins).map(|(data, t)| Tensor { ty: t.ty.clone(), data }).collect()
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(48 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(0).rows(), cx.ty(0).cols());
        let (blocks, full) = (n.div_ceil(STATE_BLOCK), n / STATE_BLOCK);
        let rates = cx.buf(6);
        let row = cx.grid(rows);
        let (base, scales) = (cx.bind(&row * n), cx.bind(row * blocks));
        let rates: Vec<Expr> = (0..5).map(|i| cx.b.bind(Expr::load(rates, int(i)))).collect();
        if full > 0 {
            cx.each(0, full, |cx, b| {
                let (base, at) = (cx.b.bind(&base + &b * STATE_BLOCK), cx.b.bind(&scales + b));
                self.block(cx, &base, &at, STATE_BLOCK, &rates);
            });
        }
        if blocks > full {
            let (base, at) = (cx.bind(&base + full * STATE_BLOCK), cx.bind(&scales + full));
            self.block(cx, &base, &at, n - full * STATE_BLOCK, &rates);
        }
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        (0..5).map(|i| (i, i)).collect()
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; ins.len()]
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |dims: &[usize], decay| {
            let w = Type::f32(dims);
            let memory = DescendBytes::memory(&w).map(|t| t.1);
            let ins = [vec![w.clone()], memory.to_vec(), vec![w, Type::f32(&[5])]].concat();
            (DescendBytes { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay }, ins)
        };
        vec![of(&[3, 256], 0.1), of(&[5, 145], 0.0), of(&[2, 2, 17], 0.1), of(&[37], 0.0)]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let mut draw = |scale: f32| (0..ty.numel()).map(|_| random() * scale).collect::<Vec<f32>>();
        let data = match k {
            1 => Data::I8(draw(127.0).iter().map(|x| x.clamp(-127.0, 127.0) as i8).collect()),
            3 => Data::U8(draw(255.0).iter().map(|x| x.abs().min(255.0) as u8).collect()),
            2 | 4 => Data::F32(draw(1e-4).iter().map(|x| x.abs()).collect()),
            // One block without a gradient.
            5 => Data::F32(draw(1.0).iter().enumerate().map(|(i, x)| if i < 20 { 0.0 } else { *x }).collect()),
            6 => Data::F32(vec![0.7, 0.01, 2.5, 1.5, 0.5]),
            _ => Data::F32(draw(1.0)),
        };
        Tensor { ty: ty.clone(), data }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = |k: usize, ty: Type| {
            let mut ins = ins.clone();
            ins[k] = ty;
            (op.clone(), ins)
        };
        vec![with(1, Type::f32(&[3, 256])), with(2, Type::f32(&[3, 1])), with(6, Type::f32(&[3])), (op.clone(), vec![])]
    }
}
