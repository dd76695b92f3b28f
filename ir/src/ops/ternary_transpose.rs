//! Packed ternary weights as float panels of their transpose, which straight-through input gradients read.

use super::{
    Axis, Flops, InferError, OpDef, check,
    pack_panels::PANEL,
    pack_ternary::{BLOCK_ROWS, scale_width},
};
use crate::{
    DType, Tensor, Type,
    loops::{Expr, Ty, f32c, i32c, int},
    lower::Lower,
};

/// `(packed u8 [G?, ceil(m / 32), np / 4, 32], alpha f32 [G?, ceil(m / 32), nb, 32])` → panels `[G?, ceil(n / 16), m, 16]`: panel `q`, row
/// `o`, lane `l` holds `alpha q[o, 16 q + l]`, zero beyond column `n`. Codes are laid out as by [`super::PackTernary`], scales as by
/// [`super::BlockScales`].
#[derive(Clone, Debug, PartialEq)]
pub struct TernaryTranspose {
    /// Rows of the weight.
    pub m: usize,
    /// Columns of the weight.
    pub n: usize,
    /// Columns that share a scale.
    pub group: usize,
}

/// The extents: groups of codes, groups of scales, scales of a row.
fn extents(op: &TernaryTranspose, ins: &[Type]) -> Result<[usize; 3], InferError> {
    let name = TernaryTranspose::NAME;
    check::count(name, ins, 2..=2)?;
    let (packed, alpha) = (&ins[0], &ins[1]);
    check::is(name, "packed weights", packed, DType::U8, 3..=4)?;
    check::is(name, "alpha", alpha, DType::F32, 3..=4)?;
    let leading = |ty: &Type| if ty.dims.len() == 4 { ty.dims[0] } else { 1 };
    let (groups, scales, nb) = (leading(packed), leading(alpha), alpha.dims[alpha.dims.len() - 2]);
    let blocks = op.m.div_ceil(BLOCK_ROWS);
    let dims = [blocks, op.n.next_multiple_of(64) / 4, 32];
    let columns = nb == 1 || (op.group > 0 && nb == op.n.div_ceil(op.group));
    let fits = packed.dims.ends_with(&dims) && alpha.dims.ends_with(&[blocks, nb, BLOCK_ROWS]);
    if op.m > 0 && op.n > 0 && fits && columns && (scales == groups || scales == 1) {
        return Ok([groups, scales, nb]);
    }
    Err(InferError::new(
        name,
        format!("{} rows of {} columns in groups of {} do not fit {packed} and {alpha}", op.m, op.n, op.group),
    ))
}

impl OpDef for TernaryTranspose {
    const NAME: &'static str = "ternary_transpose";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        extents(self, ins)?;
        let mut dims = ins[0].dims[..ins[0].dims.len() - 3].to_vec();
        dims.extend([self.n.div_ceil(PANEL), self.m, PANEL]);
        Ok(vec![Type::f32(&dims)])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
        let [_, scales, nb] = extents(self, &types).expect("accepted before");
        let m = self.m;
        let ty = self.infer(&types).expect("accepted before").remove(0);
        let (codes, alpha) = (ins[0].to_i64(), ins[1].as_f32());
        let (kbs, blocks, width) =
            (self.n.next_multiple_of(64) / 4, m.div_ceil(32), scale_width(self.group, self.n, nb));
        let at = |i: usize| {
            let (l, o, q) = (i % PANEL, i / PANEL % m, i / PANEL / m);
            let (g, col) = (q / self.n.div_ceil(PANEL), q % self.n.div_ceil(PANEL) * PANEL + l);
            if col >= self.n {
                return 0.0;
            }
            let byte = codes[((g * blocks + o / 32) * kbs + col / 4) * 32 + o % 8 * 4 + col % 4];
            let code = (byte >> (2 * (o % 32 / 8))) & 3;
            alpha[((g % scales * blocks + o / 32) * nb + col / width) * 32 + o % 32] * (code - 1) as f32
        };
        let data = (0..ty.numel()).map(at).collect();
        vec![Tensor::f32(&ty.dims, data)]
    }

    fn flops(&self, _: &[Type], outs: &[Type]) -> Flops {
        Flops::float(outs[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let [groups, scales, nb] = extents(self, &cx.in_types()).expect("accepted before");
        let m = self.m;
        let (kbs, blocks, q_n) = (self.n.next_multiple_of(64) / 4, m.div_ceil(32), self.n.div_ceil(PANEL));
        let width = scale_width(self.group, self.n, nb);
        let (codes, alpha) = (cx.buf(0), cx.buf(1));
        let at = cx.b.grid(groups * q_n);
        let (g, q) = (cx.b.bind(&at / q_n), cx.b.bind(&at % q_n));
        let to = cx.b.bind(at * (m * PANEL));
        let first = cx.b.bind(&g % scales * blocks);
        cx.each(0, m, |cx, o| {
            let byte = cx.b.bind(((&g * blocks + &o / 32) * kbs + &q * (PANEL / 4)) * 32 + &o % 8 * 4);
            let shift = cx.b.bind((&o % 32 / 8).cast(Ty::I32) * i32c(2));
            let scale = cx.b.bind((&first + &o / 32) * (nb * BLOCK_ROWS) + &o % 32);
            for k in 0..PANEL / 4 {
                cx.lanes(0, 4, 1, |cx, l| {
                    let word = Expr::load(codes, &byte + &l + k * 32);
                    let code = Expr::bin(crate::loops::Bin::Shr, word, shift.clone()) & i32c(3);
                    let col = cx.b.bind(&q * PANEL + &l + k * 4);
                    let inside = cx.b.bind(col.clone().lt(int(self.n)));
                    let scale = Expr::load(alpha, &scale + col.min(int(self.n - 1)) / width * BLOCK_ROWS);
                    let w = scale * (code - i32c(1)).cast(Ty::F32);
                    cx.put(0, &to + &o * PANEL + l + k * 4, inside.select(w, f32c(0.0)));
                });
            }
        });
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        vec![Axis::Weight { rank: 3 }; 2]
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |lead: &[usize], m: usize, n: usize, group: usize, scales: &[usize]| {
            let packed = [lead, &[m.div_ceil(32), n.next_multiple_of(64) / 4, 32]].concat();
            let nb = if group == 0 { 1 } else { n.div_ceil(group) };
            let alpha = [scales, &[m.div_ceil(32), nb, 32]].concat();
            (TernaryTranspose { m, n, group }, vec![Type::new(DType::U8, &packed), Type::f32(&alpha)])
        };
        vec![of(&[], 40, 72, 0, &[]), of(&[], 5, 200, 128, &[]), of(&[2], 33, 130, 64, &[2]), of(&[2], 8, 16, 0, &[])]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k > 0 {
            return super::random_tensor(ty, random);
        }
        // Four codes of 0 to 2 in each byte.
        let mut code = || ((random() + 1.0) * 1.499) as u8;
        let byte = |_| code() | code() << 2 | code() << 4 | code() << 6;
        Tensor { ty: ty.clone(), data: crate::Data::U8((0..ty.numel()).map(byte).collect()) }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (packed, alpha) = (Type::new(DType::U8, &[2, 32, 32]), Type::f32(&[2, 1, 32]));
        let of = |n| TernaryTranspose { m: 40, n, group: 0 };
        vec![
            (of(129), vec![packed.clone(), alpha.clone()]),
            (of(72), vec![packed.clone(), Type::f32(&[3, 1, 32])]),
            (of(0), vec![packed.clone(), alpha.clone()]),
            (of(72), vec![packed.clone(), Type::f32(&[2, 2, 32])]),
            (TernaryTranspose { m: 65, n: 72, group: 0 }, vec![packed, alpha]),
        ]
    }
}
