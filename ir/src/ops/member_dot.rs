//! The inner half of a low-rank perturbation: activations times the right factor of their member.
//!
//! Member `b` owns the batch rows `b` and `b + M`, which see the direction with opposite signs.

use super::{Accuracy, Axis, Flops, InferError, OpDef};
use crate::{
    DType, Tensor, Type,
    loops::{Acc, Expr, Ty, i32c},
    lower::Lower,
};

/// `(x [R, T, n], B [M, n, r]) -> u [R, T, r]`: `u[row] = x[row] B[member]`, `member = batch row mod M`.
///
/// With `gathered = (k, T)`: `(x [N, n], B [E, M, n, r], order i32 [N], index i32 [N / k, ..]) -> u [N, r]` with a factor for each expert;
/// row `i` comes from slot `order[i]`, its batch row is `order[i] / k / T` and its expert `index[order[i]]`. Both are clamped.
/// Section 13.4 of the semantics.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberDot {
    /// The rank `r`.
    pub rank: usize,
    /// The number of members `M`.
    pub members: usize,
    /// Slots of a token and tokens of a batch row, when the rows of `x` are in dispatch order.
    pub gathered: Option<(usize, usize)>,
}

/// Tokens that share one staged right factor.
const TOKENS: usize = 32;

/// The batch row of every row of an operand, as the reference semantics need it; `order` when gathered.
pub(super) fn batch_rows(x: &Type, gathered: Option<(usize, usize)>, order: Option<&Tensor>) -> Vec<usize> {
    match (gathered, order) {
        (Some((k, tokens)), Some(order)) => {
            let slots = order.to_i64();
            slots.iter().map(|&o| o.clamp(0, slots.len() as i64 - 1) as usize / k / tokens).collect()
        }
        _ => (0..x.rows()).map(|row| row / x.dims[1]).collect(),
    }
}

/// Whether `x` and the operands behind the others fit: `[R, T, C]` alone, or `[N, C]` with `order i32 [N]` and `index`.
pub(super) fn rows_fit(x: &Type, gathered: Option<(usize, usize)>, order: &[Type]) -> bool {
    match (gathered, order) {
        (None, []) => x.dims.len() == 3,
        (Some((k, tokens)), [order, index]) => {
            let slots = index.dtype == DType::I32 && index.numel() == x.dims[0];
            let whole = k * tokens > 0 && x.dims[0].is_multiple_of(k * tokens);
            slots && whole && x.dims.len() == 2 && *order == Type::i32(&x.dims[..1])
        }
        _ => false,
    }
}

/// Whether a factor has the shape `one`, with experts in front when gathered.
pub(super) fn factor_fits(factor: &Type, one: &[usize], gathered: Option<(usize, usize)>) -> bool {
    let dims = if gathered.is_some() { factor.dims.get(1..).unwrap_or(&[]) } else { &factor.dims[..] };
    factor.dtype == DType::F32 && dims == one
}

/// The expert of row `row` from `[order, index]`, 0 when rows are not gathered.
pub(super) fn expert_of(row: usize, experts: usize, routing: Option<&[&Tensor]>) -> usize {
    let Some([order, index]) = routing else { return 0 };
    let index = index.to_i64();
    let slot = order.to_i64()[row].clamp(0, index.len() as i64 - 1);
    index[slot as usize].clamp(0, experts as i64 - 1) as usize
}

/// The expert of row `row`; operand `order` is followed by the index.
pub(super) fn expert(cx: &mut Lower<'_>, row: &Expr, order: usize, experts: usize) -> Expr {
    let last = cx.ty(0).dims[0] as i32 - 1;
    let slot = Expr::load(cx.buf(order), row).min(i32c(last)).max(i32c(0)).cast(Ty::I64);
    let e = Expr::load(cx.buf(order + 1), slot).min(i32c(experts as i32 - 1)).max(i32c(0));
    cx.bind(e.cast(Ty::I64))
}

/// The batch rows that `x` comes from.
pub(super) fn n_batch_rows(x: &Type, gathered: Option<(usize, usize)>) -> usize {
    gathered.map_or(x.dims[0], |(k, tokens)| x.dims[0] / (k * tokens))
}

/// The batch row of row `row`; `order` is the index of that operand.
pub(super) fn batch_row(cx: &Lower<'_>, row: &Expr, gathered: Option<(usize, usize)>, order: usize) -> Expr {
    match gathered {
        Some((k, tokens)) => {
            let last = cx.ty(0).dims[0] as i32 - 1;
            Expr::load(cx.buf(order), row).min(i32c(last)).max(i32c(0)).cast(Ty::I64) / (k * tokens)
        }
        None => row / cx.ty(0).dims[1],
    }
}

impl OpDef for MemberDot {
    const NAME: &'static str = "member_dot";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        if let [x, b, order @ ..] = ins
            && x.dtype == DType::F32
            && self.members * self.rank > 0
            && factor_fits(b, &[self.members, x.cols(), self.rank], self.gathered)
            && rows_fit(x, self.gathered, order)
            && n_batch_rows(x, self.gathered).is_multiple_of(self.members)
        {
            let lead = &x.dims[..x.dims.len() - 1];
            return Ok(vec![Type::f32(&[lead, &[self.rank]].concat())]);
        }
        let why = format!(
            "takes x [R, T, n] and B [{}, n, {}], or x [N, n], B for each expert, order i32 [N] and index; the members divide the batch rows",
            self.members, self.rank
        );
        Err(InferError::new(Self::NAME, why))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let (x, b) = (ins[0], ins[1].as_f32());
        let (n, r) = (x.ty.cols(), self.rank);
        let mut out = vec![];
        for (row, batch) in batch_rows(&x.ty, self.gathered, ins.get(2).copied()).into_iter().enumerate() {
            let e = expert_of(row, ins[1].ty.dims[0], ins.get(2..4));
            let b = &b[(e * self.members + batch % self.members) * n * r..][..n * r];
            let x = &x.as_f32()[row * n..][..n];
            out.extend((0..r).map(|q| (0..n).map(|j| f64::from(x[j]) * f64::from(b[j * r + q])).sum::<f64>() as f32));
        }
        let lead = &x.ty.dims[..x.ty.dims.len() - 1];
        vec![Tensor::f32(&[lead, &[r]].concat(), out)]
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops::float(2 * ins[0].numel() * self.rank)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (x, r, b) = (cx.ty(0).clone(), self.rank, cx.buf(1));
        let n = x.cols();
        if r == 1 || self.gathered.is_some() {
            let row = cx.grid(x.rows());
            let member = batch_row(cx, &row, self.gathered, 2) % self.members;
            let member = match self.gathered {
                Some(_) => expert(cx, &row, 2, cx.ty(1).dims[0]) * self.members + member,
                None => member,
            };
            let base = cx.bind(member * (n * r));
            self.dot(cx, &row, |j, q| Expr::load(b, &base + j * r + q));
            return;
        }
        let tokens = x.dims[1];
        let tiles = tokens.div_ceil(TOKENS);
        let id = cx.grid(x.dims[0] * tiles);
        let batch = cx.bind(&id / tiles);
        let staged = cx.scratch("right", DType::F32, n * r);
        let base = cx.bind(&batch % self.members * (n * r));
        cx.each(0, n, |cx, j| {
            for q in 0..r {
                cx.store(staged, &j + q * n, Expr::load(b, &base + &j * r + q));
            }
        });
        let first = cx.bind(&id % tiles * TOKENS);
        let last = cx.bind((&first + TOKENS).min(Expr::from(tokens)));
        cx.each(first, last, |cx, t| {
            let row = cx.bind(&batch * tokens + t);
            self.dot(cx, &row, |j, q| Expr::load(staged, j + q * n));
        });
    }

    fn pulls(&self) -> &'static [usize] {
        &[0]
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        [Axis::Rows, Axis::Shared, Axis::Rows, Axis::Rows][..ins.len()].to_vec()
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 1e-5, atol: 2e-6 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |rank, members, dims: &[usize]| {
            let b = Type::f32(&[members, dims[2], rank]);
            (MemberDot { rank, members, gathered: None }, vec![Type::f32(dims), b])
        };
        let gathered = |rank, members, k, tokens, rows: usize, n| {
            let many = rows * tokens * k;
            let b = Type::f32(&[3, members, n, rank]);
            let ins = vec![Type::f32(&[many, n]), b, Type::i32(&[many]), Type::i32(&[rows, tokens, k])];
            (MemberDot { rank, members, gathered: Some((k, tokens)) }, ins)
        };
        vec![
            of(1, 2, &[4, 3, 9]),
            of(3, 1, &[2, 35, 17]),
            of(2, 3, &[6, 1, 8]),
            gathered(1, 2, 2, 3, 4, 11),
            gathered(2, 1, 1, 2, 2, 5),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        if k == 2 {
            return Tensor::i32(&ty.dims, super::gather_rows::permutation(ty.numel(), random));
        }
        if k == 3 {
            return Tensor::i32(&ty.dims, (0..ty.numel()).map(|_| (random() * 3.9).abs() as i32).collect());
        }
        super::random_tensor(ty, random)
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let op = |gathered| MemberDot { rank: 2, members: 3, gathered };
        let f = |d: &[usize]| Type::f32(d);
        vec![
            (op(None), vec![f(&[6, 2, 5]), f(&[3, 5, 1])]),
            (op(None), vec![f(&[4, 2, 5]), f(&[3, 5, 2])]),
            (op(None), vec![f(&[12, 5]), f(&[3, 5, 2])]),
            (op(Some((2, 1))), vec![f(&[12, 5]), f(&[3, 5, 2])]),
            (op(Some((2, 1))), vec![f(&[12, 5]), f(&[2, 3, 5, 2]), Type::i32(&[11]), Type::i32(&[12])]),
        ]
    }
}

impl MemberDot {
    fn dot(&self, cx: &mut Lower<'_>, row: &Expr, right: impl Fn(&Expr, usize) -> Expr) {
        let sums = cx.reduce(0, cx.ty(0).cols(), |cx, j| {
            let x = cx.load(0, row, &j);
            let x = cx.bind(x);
            (0..self.rank).map(|q| Acc::Dot(x.clone(), right(&j, q))).collect()
        });
        for (q, sum) in sums.into_iter().enumerate() {
            cx.put(0, row * self.rank + q, sum);
        }
    }
}
