//! Activations to signed bytes with a scale for every block.

use super::{Flops, InferError, OpDef, VjpCx, check, long::long};
use crate::{
    DType, Data, Tensor, Type, Value,
    loops::{Acc, Buf, Expr, f32c, i32c, int, math},
    lower::Lower,
};

/// Columns of codes are padded to a multiple of this.
pub const CODE_PAD: usize = 64;

/// `x [.., n]` → `(codes i8 [.., np], scales [.., ceil(n / block)])` with `np` the next multiple of 64, padding 0.
///
/// `scale = max(max |x|, 1e-5) / 127`, `code = round_half_even(x / scale)`; both quotients are `f32` divisions. Blocks have 64 or
/// 128 columns; `block` 0 is one scale for the whole row. Semantics section 3.2. A code lies in -127..=127 because no finite
/// `x / scale` reaches 127.5.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantise {
    /// Columns of a block, 64 or 128; 0 for the whole row.
    pub block: usize,
}

impl Quantise {
    /// The types of codes and scales.
    pub(super) fn results(op: &'static str, block: usize, x: &Type) -> Result<[Type; 2], InferError> {
        check::is(op, "x", x, DType::F32, 1..=4)?;
        if ![0, 64, 128].contains(&block) {
            return Err(InferError::new(op, format!("a block has 64, 128 or (0) all columns, found {block}")));
        }
        let (mut codes, mut scales) = (x.with(DType::I8), x.clone());
        let (last, n) = (x.dims.len() - 1, x.cols());
        codes.dims[last] = n.next_multiple_of(CODE_PAD);
        scales.dims[last] = if block == 0 { 1 } else { n.div_ceil(block) };
        Ok([codes, scales])
    }

    /// Append the quantisation of one row of `n` columns: `read(col)` gives the elements.
    pub(super) fn row(&self, cx: &mut Lower<'_>, row: &Expr, n: usize, to: Codes, read: Read<'_>) {
        let block = if self.block == 0 { n } else { self.block };
        let full = n / block;
        let nc = n.div_ceil(block);
        if full > 0 {
            cx.each(0, full, |cx, c| {
                let lo = cx.b.bind(&c * block);
                quantise_block(cx, row, &c, &lo, block, n, nc, to, read);
            });
        }
        if nc > full {
            quantise_block(cx, row, &int(full), &int(full * block), n - full * block, n, nc, to, read);
        }
        let np = n.next_multiple_of(CODE_PAD);
        if let (Some(codes), true) = (to.codes, np > n) {
            cx.lanes(n, np, 1, |cx, j| cx.b.store(codes, row * np + j, i32c(0)));
        }
    }
}

/// Where codes and scales go, if they are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Codes {
    pub(super) codes: Option<Buf>,
    pub(super) scales: Option<Buf>,
}

/// An element of the row by column.
pub(super) type Read<'f> = &'f dyn Fn(&mut Lower<'_>, &Expr) -> Expr;

#[allow(clippy::too_many_arguments, reason = "one call site per shape of block")]
fn quantise_block(
    cx: &mut Lower<'_>,
    row: &Expr,
    c: &Expr,
    lo: &Expr,
    len: usize,
    n: usize,
    nc: usize,
    to: Codes,
    read: Read<'_>,
) {
    let peak = long(cx, len, &|cx, j| Acc::Max(read(cx, &(lo + j)).abs()));
    let scale = cx.b.bind(peak.max(f32c(1e-5)) / f32c(127.0));
    if let Some(scales) = to.scales {
        cx.b.store(scales, row * nc + c, &scale);
    }
    if let Some(codes) = to.codes {
        let base = cx.b.bind(row * n.next_multiple_of(CODE_PAD) + lo);
        cx.lanes(0, len, 2, |cx, j| {
            let x = read(cx, &(lo + &j));
            // The low byte of the bits of the rounded sum is the code, and a store keeps the low byte.
            cx.b.store(codes, &base + j, (x / &scale + f32c(math::ROUND)).to_bits());
        });
    }
}

impl OpDef for Quantise {
    const NAME: &'static str = "quantise";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        check::count(Self::NAME, ins, 1..=1)?;
        Quantise::results(Self::NAME, self.block, &ins[0]).map(Vec::from)
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let x = ins[0];
        let n = x.ty.cols();
        let block = if self.block == 0 { n } else { self.block };
        let [codes_ty, scales_ty] = Quantise::results(Self::NAME, self.block, &x.ty).expect("accepted by infer");
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for row in x.as_f32().chunks(n) {
            for block in row.chunks(block) {
                let peak = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let scale = peak.max(1e-5) / 127.0;
                codes.extend(block.iter().map(|x| (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8));
                scales.push(scale);
            }
            codes.resize(codes.len() + n.next_multiple_of(CODE_PAD) - n, 0);
        }
        vec![Tensor { ty: codes_ty, data: Data::I8(codes) }, Tensor { ty: scales_ty, data: Data::F32(scales) }]
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        // Straight through: the gradient of codes is that of what they stand for, with padding.
        let n = cx.graph.ty(cx.ins[0]).cols();
        Ok(vec![if cx.grads[0].is_some() { Some(cx.columns(n)?) } else { None }])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(4 * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (rows, n) = (cx.ty(0).rows(), cx.ty(0).cols());
        let row = cx.b.grid(rows);
        let to = Codes { codes: cx.out(0), scales: cx.out(1) };
        self.row(cx, &row, n, to, &|cx, col| cx.load(0, &row, col));
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Quantise { block: 64 }, vec![Type::f32(&[2, 3, 128])]),
            (Quantise { block: 64 }, vec![Type::f32(&[5, 145])]),
            (Quantise { block: 128 }, vec![Type::f32(&[3, 300])]),
            (Quantise { block: 0 }, vec![Type::f32(&[3, 70])]),
            (Quantise { block: 64 }, vec![Type::f32(&[3, 1])]),
        ]
    }

    fn sample_input(&self, _: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        // One row is tiny, so that the least scale applies; one element is exactly the largest code.
        let mut x: Vec<f32> = (0..ty.numel()).map(|_| random() * 3.0).collect();
        x[..ty.cols()].iter_mut().for_each(|x| *x *= 1e-7);
        x[ty.numel() - 1] = -3.0;
        Tensor::f32(&ty.dims, x)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        vec![
            (Quantise { block: 32 }, vec![Type::f32(&[3, 64])]),
            (Quantise { block: 64 }, vec![Type::i32(&[3, 64])]),
            (Quantise { block: 64 }, vec![]),
        ]
    }
}
