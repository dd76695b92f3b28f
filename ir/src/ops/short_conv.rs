//! Depthwise causal convolution of a few taps inside one document.

use super::{
    Axis, Flops, InferError, OpDef, ShortConvGrad, VjpCx,
    heads::{expect, expect_weight, operands, sample_positions, with_operand},
};
use crate::{
    DType, Tensor, Type, Value,
    loops::{Buf, Expr, f32c, i32c},
    lower::Lower,
};

/// `y[r,t,c] = sum over j < n of u[r, t - lag, c] kernel[c, j]`, `lag = n - 1 - j`, over the tokens of the same document.
///
/// `(u [R,T,D], kernel [D,n] or [G,D,n], pos [R,T], last [R,n-1,D] if carried) -> (y [R,T,D], last if carried)`. `last` holds the
/// inputs before the first token, zeros when it is not carried. The sum is a chain of fused multiply-adds, earliest token first.
/// Source: component semantics 5.
#[derive(Clone, Debug, PartialEq)]
pub struct ShortConv {
    /// n, at least 2.
    pub taps: usize,
    /// Whether the state is an operand, updated in place.
    pub carry: bool,
}

/// Columns of one grid instance.
const WIDTH: usize = 64;

impl OpDef for ShortConv {
    const NAME: &'static str = "short_conv";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        operands(Self::NAME, ins, 3 + usize::from(self.carry))?;
        let fail = |why: String| Err(InferError::new(Self::NAME, why));
        let [r, t, d] = ins[0].dims[..] else { return fail(format!("u is {}, expected f32[rows, tokens, d]", ins[0])) };
        if self.taps < 2 {
            return fail(format!("has {} taps, expected at least 2", self.taps));
        }
        expect(Self::NAME, "u", &ins[0], &Type::f32(&[r, t, d]))?;
        expect_weight(Self::NAME, "the kernel", &ins[1], &Type::f32(&[d, self.taps]), r)?;
        expect(Self::NAME, "pos", &ins[2], &Type::i32(&[r, t]))?;
        let mut outs = vec![ins[0].clone()];
        if self.carry {
            expect(Self::NAME, "the state", &ins[3], &Type::f32(&[r, self.taps - 1, d]))?;
            outs.push(ins[3].clone());
        }
        Ok(outs)
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[0].ty.dims[..] else { unreachable!("checked by infer") };
        let (u, kernel, pos, n) = (ins[0].as_f32(), ins[1].as_f32(), ins[2].to_i64(), self.taps);
        let ratio = rows / (kernel.len() / (d * n));
        let mut out = vec![0.0; u.len()];
        let mut last = vec![0.0; rows * (n - 1) * d];
        for r in 0..rows {
            // Inputs by token; the first n - 1 come from the state.
            let input = |i: usize, c: usize| match i.checked_sub(n - 1) {
                Some(t) => u[(r * tokens + t) * d + c],
                None if self.carry => ins[3].as_f32()[(r * (n - 1) + i) * d + c],
                None => 0.0,
            };
            for t in 0..tokens {
                for c in 0..d {
                    let mut y = 0.0f32;
                    for j in 0..n {
                        let seen = pos[r * tokens + t] >= (n - 1 - j) as i64;
                        let x = if seen { input(t + j, c) } else { 0.0 };
                        y = x.mul_add(kernel[(r / ratio * d + c) * n + j], y);
                    }
                    out[(r * tokens + t) * d + c] = y;
                }
            }
            for i in 0..(n - 1) * d {
                last[r * (n - 1) * d + i] = input(tokens + i / d, i % d);
            }
        }
        let mut results = vec![Tensor::f32(&ins[0].ty.dims, out)];
        if self.carry {
            results.push(Tensor::f32(&ins[3].ty.dims, last));
        }
        results
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let Some(dy) = cx.grads[0] else { return Ok(vec![None; cx.ins.len()]) };
        let ins: Vec<Value> = cx.ins[..3].iter().copied().chain([dy]).chain(cx.ins.get(3).copied()).collect();
        let outs = cx.graph.ops(ShortConvGrad { taps: self.taps, carry: self.carry }, &ins)?;
        // Inputs of earlier calls are constants.
        Ok([Some(outs[0]), Some(outs[1]), None].into_iter().chain(cx.ins.get(3).map(|_| None)).collect())
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(2 * self.taps * outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [rows, tokens, d] = cx.ty(0).dims[..] else { unreachable!("checked by infer") };
        let (n, blocks) = (self.taps, d.div_ceil(WIDTH));
        let ratio = rows / (cx.ty(1).numel() / (d * n));
        let at = cx.grid(rows * blocks);
        let r = cx.bind(&at / blocks);
        let c0 = cx.bind(at % blocks * WIDTH);
        let width = cx.bind((Expr::from(d) - &c0).min(Expr::from(WIDTH)));
        let kernel = cx.buf(1);
        let taps = cx.scratch("taps", DType::F32, n * WIDTH);
        let k0 = cx.bind((&r / ratio * d + &c0) * n);
        for j in 0..n {
            cx.lanes(0, width.clone(), 1, |cx, c| cx.store(taps, &c + j * WIDTH, Expr::load(kernel, &k0 + c * n + j)));
        }
        let f = Frame { n, d, row0: cx.bind(&r * tokens), r, c0, width, taps, carry: self.carry };
        for t in 0..tokens.min(n - 1) {
            f.token(cx, &Expr::from(t), t);
        }
        cx.each(tokens.min(n - 1), tokens, |cx, t| f.token(cx, &t, n - 1));
        if self.carry {
            f.keep(cx, tokens);
        }
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..1
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        if self.carry { vec![(3, 1)] } else { vec![] }
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        let mut axes = vec![Axis::Rows; ins.len()];
        axes[1] = Axis::Weight { rank: 2 };
        axes
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |taps, carry, (r, t, d): (usize, usize, usize), g: Option<usize>| {
            let kernel = g.into_iter().chain([d, taps]).collect::<Vec<_>>();
            let mut ins = vec![Type::f32(&[r, t, d]), Type::f32(&kernel), Type::i32(&[r, t])];
            if carry {
                ins.push(Type::f32(&[r, taps - 1, d]));
            }
            (ShortConv { taps, carry }, ins)
        };
        vec![
            of(4, true, (3, 11, 70), None),
            of(4, true, (4, 1, 9), Some(2)),
            of(4, true, (2, 2, 5), None),
            of(3, false, (2, 9, 8), Some(2)),
            of(2, false, (2, 1, 130), None),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == 2 { sample_positions(ty) } else { super::random_tensor(ty, random) }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = with_operand;
        vec![
            with(0, Type::f32(&[11, 70])),
            with(1, Type::f32(&[70, 3])),
            with(1, Type::f32(&[2, 70, 4])),
            with(2, Type::i32(&[11])),
            with(3, Type::f32(&[3, 4, 70])),
            (ShortConv { taps: 1, carry: false }, ins[..3].to_vec()),
            (ShortConv { carry: false, ..op.clone() }, ins.clone()),
        ]
    }
}

/// A block of columns of one row.
struct Frame {
    n: usize,
    d: usize,
    r: Expr,
    row0: Expr,
    c0: Expr,
    width: Expr,
    /// The kernel, `[n, WIDTH]`.
    taps: Buf,
    carry: bool,
}

impl Frame {
    /// Token `t`, which has at least `before` tokens in front of it in this call.
    fn token(&self, cx: &mut Lower<'_>, t: &Expr, before: usize) {
        let (n, d) = (self.n, self.d);
        let (u, pos) = (cx.buf(0), cx.buf(2));
        let row = cx.bind(&self.row0 + t);
        let pos = cx.bind(Expr::load(pos, &row));
        // For every tap the input in front of the block's first column, and whether it belongs to the document.
        let mut inputs = vec![];
        for (j, lag) in (0..n).map(|j| (j, n - 1 - j)) {
            let (buf, at) = match (lag <= before, self.carry) {
                (true, _) => (u, (&row - lag) * d + &self.c0),
                (false, true) => (cx.buf(3), (&self.r * (n - 1) + (before + j)) * d + &self.c0),
                (false, false) => continue,
            };
            let seen = (lag > 0).then(|| cx.bind(i32c(lag as i32).le(&pos)));
            inputs.push((j, buf, cx.bind(at), seen));
        }
        cx.lanes(0, self.width.clone(), 2, |cx, c| {
            let mut y = f32c(0.0);
            for (j, buf, at, seen) in inputs {
                let x = Expr::load(buf, at + &c);
                let x = seen.map_or_else(|| x.clone(), |s| s.select(x.clone(), f32c(0.0)));
                y = cx.bind(x.fma(Expr::load(self.taps, &c + j * WIDTH), y));
            }
            cx.push(&row, &(&self.c0 + c), &[(0, y)]);
        });
    }

    /// The last inputs, after `tokens` tokens.
    fn keep(&self, cx: &mut Lower<'_>, tokens: usize) {
        let (n, d) = (self.n, self.d);
        let (u, last) = (cx.buf(0), cx.buf(3));
        for i in 0..n - 1 {
            let to = cx.bind((&self.r * (n - 1) + i) * d + &self.c0);
            let (buf, from) = match (tokens + i).checked_sub(n - 1) {
                Some(t) => (u, cx.bind((&self.row0 + t) * d + &self.c0)),
                None => (last, cx.bind((&self.r * (n - 1) + (tokens + i)) * d + &self.c0)),
            };
            cx.lanes(0, self.width.clone(), 2, |cx, c| cx.store(last, &to + &c, Expr::load(buf, &from + c)));
        }
    }
}
