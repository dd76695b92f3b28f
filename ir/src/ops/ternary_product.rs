//! Products of quantised activations with packed ternary weights: the bit contract of the integer path.

mod chains;
mod lower;
mod tiling;

use self::tiling::Tiling;
use super::{
    Axis, Dequantise, Flops, InferError, Linear, OpDef, TernaryTranspose, VjpCx, WeightGrad, Work, check,
    pack_ternary::BLOCK_ROWS,
    row_tiles::{group_of_rows, sample_offsets, sections},
};
use crate::{
    DType, Data, Tensor, Type, Value,
    loops::{Contract, Variant},
    lower::Lower,
};

/// `(codes i8 [.., np], scales [.., nc], then n_weights pairs (packed [G?, ceil(m / 32), np / 4, 32], alpha [G?, ceil(m / 32), nb, 32]),
/// with grouped rows offsets i32 [S + 1])` → `n_weights` results `[.., m]`.
///
/// Blocks have `block` columns (0: the whole row has one scale), weight groups have `group` columns. The sum `p` over a block (over
/// a group when the row has one scale) of codes times weights is an exact integer; then `s = fma(a, p, s)` over the blocks of a
/// group and `y = fma(alpha, s, y)` over the groups, ascending, both from +0. Semantics section 3.2, erratum 4. One column of
/// `alpha` stands for one group as long as the row.
///
/// Batch row `r` of `R` uses weight group `r / (R / G)`; with grouped rows the rows `offsets[s] .. offsets[s + 1]` of section
/// `s` of `S` use group `s / (S / G)`. `G` is the larger number of groups, that of the codes or that of the scales; the other one
/// divides it and follows the same rule.
/// Packed weights are laid out as by [`super::PackTernary`], scales as by [`super::BlockScales`].
#[derive(Clone, Debug, PartialEq)]
pub struct TernaryProduct {
    /// Columns of each result.
    pub m: usize,
    /// Columns of the operand that share a weight scale; a multiple of `block`.
    pub group: usize,
    /// Columns of the operand that share an activation scale, 64 or 128; 0 for the whole row.
    pub block: usize,
    /// The number of weights, each with a result of its own.
    pub n_weights: usize,
    /// Whether the last operand says which rows use which group of the weights.
    pub grouped_rows: bool,
}

/// The extents of one product, derived from the operand types.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Rows of the codes, all leading dimensions together.
    rows: usize,
    /// Columns of the codes.
    np: usize,
    /// Scales in a row.
    nc: usize,
    /// Scales of a weight row.
    nb: usize,
    /// Groups of weights.
    groups: usize,
    /// Groups of their codes.
    leads: usize,
    /// Columns of one integer sum.
    piece: usize,
    /// Integer sums of a weight group.
    span: usize,
}

impl Shape {
    /// Integer sums of a row.
    fn pieces(&self) -> usize {
        self.np.div_ceil(self.piece)
    }

    /// Four-byte words of piece `c`; only the last one may be short.
    fn words(&self, c: usize) -> usize {
        (self.np - c * self.piece).min(self.piece) / 4
    }

    /// The pieces of weight group `b`.
    fn of_group(&self, b: usize) -> std::ops::Range<usize> {
        b * self.span..((b + 1) * self.span).min(self.pieces())
    }
}

impl TernaryProduct {
    /// Index of weight `w`'s codes among the operands; its scales follow.
    fn packed(w: usize) -> usize {
        2 + 2 * w
    }

    fn shape(&self, ins: &[Type]) -> Result<Shape, InferError> {
        let fail = |why: String| Err(InferError::new(Self::NAME, why));
        let want = 2 + 2 * self.n_weights + usize::from(self.grouped_rows);
        check::count(Self::NAME, ins, want..=want)?;
        let [codes, scales] = [&ins[0], &ins[1]];
        check::is(Self::NAME, "codes", codes, DType::I8, 1..=4)?;
        check::is(Self::NAME, "scales", scales, DType::F32, 1..=4)?;
        if ![0, 64, 128].contains(&self.block) || self.m == 0 || self.n_weights == 0 {
            return fail("wants blocks of 64, 128 or (0) all columns, and at least one result".into());
        }
        let (rows, np) = (codes.rows(), codes.cols());
        let nc = if self.block == 0 { 1 } else { np.div_ceil(self.block) };
        if !np.is_multiple_of(64) || scales.rows() != rows || scales.cols() != nc {
            return fail(format!("codes {codes} want a multiple of 64 columns and {nc} scales a row, found {scales}"));
        }
        let leading = |ty: &Type| if ty.dims.len() == 4 { ty.dims[0] } else { 1 };
        let nb = ins[3].dims.iter().rev().nth(1).copied().unwrap_or(0);
        let (blocks, lead) = (self.m.div_ceil(BLOCK_ROWS), leading(&ins[2]));
        let alphas = |w: usize| leading(&ins[Self::packed(w) + 1]);
        let total = (0..self.n_weights).map(alphas).fold(lead, usize::max);
        for w in 0..self.n_weights {
            let (packed, alpha) = (&ins[Self::packed(w)], &ins[Self::packed(w) + 1]);
            let dims = [blocks, np / 4, 32];
            check::is(Self::NAME, "a packed weight", packed, DType::U8, 3..=4)?;
            check::is(Self::NAME, "alpha", alpha, DType::F32, 3..=4)?;
            if !packed.dims.ends_with(&dims) || leading(packed) != lead {
                return fail(format!("weight {w} wants u8{dims:?} in {lead} groups, found {packed}"));
            }
            let divides = |n: usize| n > 0 && total.is_multiple_of(n);
            if !alpha.dims.ends_with(&[blocks, nb, BLOCK_ROWS]) || !divides(alphas(w)) || !divides(lead) {
                return fail(format!(
                    "weight {w} wants scales f32[{blocks}, {nb}, 32] in groups that divide {total} or are its multiple, found {alpha}"
                ));
            }
        }
        if self.grouped_rows {
            sections(Self::NAME, total, &ins[want - 1])?;
        } else {
            check::groups(Self::NAME, "a packed weight", &ins[2], 3, codes)?;
            (0..self.n_weights).try_for_each(|w| {
                check::groups(Self::NAME, "the scales of a weight", &ins[Self::packed(w) + 1], 3, codes).map(drop)
            })?;
        }
        let (piece, span) = match (nb, self.block) {
            (1, 0) => (np, 1),
            (1, block) => (block, nc),
            (_, 0) => (self.group, 1),
            (_, block) => (block, self.group / block),
        };
        let fits = nb == 1
            || (self.group > 0 && self.group.is_multiple_of(self.block.max(64)) && nb == np.div_ceil(self.group));
        if !fits {
            return fail(format!("{nb} scales a row do not fit groups of {} of {np} columns", self.group));
        }
        Ok(Shape { rows, np, nc, nb, groups: total, leads: lead, piece, span })
    }
}

impl OpDef for TernaryProduct {
    const NAME: &'static str = "ternary_product";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        self.shape(ins)?;
        let mut out = ins[0].with(DType::F32);
        *out.dims.last_mut().expect("codes have a dimension") = self.m;
        Ok(vec![out; self.n_weights])
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
        let (s, outs) = (self.shape(&types).expect("accepted before"), self.infer(&types).expect("accepted before"));
        let codes = ins[0].to_i64();
        let offsets = self.grouped_rows.then(|| ins[ins.len() - 1].to_i64());
        let group = group_of_rows(s.rows, s.groups, offsets.as_deref());
        let result = |w: usize| {
            let (packed, alpha) = (ins[Self::packed(w)], ins[Self::packed(w) + 1]);
            let Data::U8(bytes) = &packed.data else { panic!("infer wants bytes") };
            let blocks = self.m.div_ceil(BLOCK_ROWS);
            let alphas = alpha.ty.rows() / (blocks * s.nb);
            let weight = |g: usize, o: usize, k: usize| {
                let lead = g / (s.groups / s.leads);
                let block = (lead * blocks + o / BLOCK_ROWS) * (s.np / 4) + k / 4;
                let byte = bytes[block * 32 + o % 8 * 4 + k % 4];
                i64::from(byte >> (o % BLOCK_ROWS / 8 * 2) & 3) - 1
            };
            let element = |row: usize, o: usize| {
                let (x, g) = (&codes[row * s.np..][..s.np], group[row]);
                (0..s.nb).fold(0.0f32, |y, b| {
                    let sum = s.of_group(b).fold(0.0f32, |sum, c| {
                        let lo = c * s.piece;
                        let p: i64 = (lo..lo + 4 * s.words(c)).map(|k| weight(g, o, k) * x[k]).sum();
                        let a = ins[1].as_f32()[row * s.nc + if self.block == 0 { 0 } else { c }];
                        a.mul_add(p as f32, sum)
                    });
                    let block = (g / (s.groups / alphas) * blocks + o / BLOCK_ROWS) * s.nb + b;
                    alpha.as_f32()[block * BLOCK_ROWS + o % BLOCK_ROWS].mul_add(sum, y)
                })
            };
            let out = (0..s.rows * self.m).map(|i| element(i / self.m, i % self.m)).collect();
            Tensor::f32(&outs[w].dims, out)
        };
        (0..self.n_weights).map(result).collect()
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        if self.n_weights != 1 {
            return Err(InferError::new(Self::NAME, "a product with several weights is not differentiable yet"));
        }
        let [codes, scales, packed, alpha] = [0, 1, 2, 3].map(|k| cx.ins[k]);
        let (dy, offsets) = (cx.grad(), cx.ins.get(4).copied());
        let (n, ty) = (cx.graph.ty(codes).cols(), cx.graph.ty(packed).clone());
        let dx = if cx.wants(0) {
            let back = cx.op(TernaryTranspose { m: self.m, n, group: self.group }, &[packed, alpha])?;
            let ins: Vec<Value> = [dy, back].into_iter().chain(offsets).collect();
            Some(cx.op(Linear { m: n, grouped_rows: self.grouped_rows }, &ins)?)
        } else {
            None
        };
        let dw = if cx.wants(2) {
            let x = cx.op(Dequantise { block: self.block, n }, &[codes, scales])?;
            let ins: Vec<Value> = [dy, x].into_iter().chain(offsets).collect();
            let groups = (ty.dims.len() == 4).then(|| ty.dims[0]);
            Some(cx.op(WeightGrad { groups, grouped_rows: self.grouped_rows }, &ins)?)
        } else {
            None
        };
        Ok([dx, None, dw, None].into_iter().chain(offsets.map(|_| None)).collect())
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        Flops { float: 0, ternary: (ins[0].numel() * self.m * self.n_weights) as u64 }
    }

    fn contract(&self, ins: &[Type]) -> Option<Contract> {
        let s = self.shape(ins).ok()?;
        let params = [
            ("m", self.m),
            ("np", s.np),
            ("rows", s.rows),
            ("group", self.group),
            ("block", self.block),
            ("n_weights", self.n_weights),
            ("groups", s.leads),
            ("scales", s.nb),
            ("sections", if self.grouped_rows { ins.last()?.numel() - 1 } else { 0 }),
        ];
        let mut contract = Contract::new(Self::NAME, &params);
        // The groups of each weight's scales.
        let alphas = (0..self.n_weights)
            .map(|w| ins[Self::packed(w) + 1].numel() / (self.m.div_ceil(BLOCK_ROWS) * s.nb * BLOCK_ROWS));
        contract.params.extend(alphas.enumerate().map(|(w, groups)| (format!("alphas{w}"), groups as i64)));
        Some(contract)
    }

    fn of_contract(c: &Contract) -> Option<(Self, Vec<Type>)> {
        let [m, np, rows, groups, nb] = ["m", "np", "rows", "groups", "scales"].map(|name| c.size(name));
        let (m, np, rows, groups, nb) = (m?, np?, rows?, groups?, nb?);
        let sections = c.size("sections")?;
        let op = TernaryProduct {
            m,
            group: c.size("group")?,
            block: c.size("block")?,
            n_weights: c.size("n_weights")?,
            grouped_rows: sections > 0,
        };
        let nc = if op.block == 0 { 1 } else { np.div_ceil(op.block) };
        let mut ins = vec![Type::new(DType::I8, &[rows, np]), Type::f32(&[rows, nc])];
        for w in 0..op.n_weights {
            let alphas = c.size(&format!("alphas{w}"))?;
            ins.push(Type::new(DType::U8, &[groups, m.div_ceil(BLOCK_ROWS), np / 4, 32]));
            ins.push(Type::f32(&[alphas, m.div_ceil(BLOCK_ROWS), nb, BLOCK_ROWS]));
        }
        ins.extend(op.grouped_rows.then(|| Type::i32(&[sections + 1])));
        // Sizes of any origin: they make a product only if they are sizes and the operation takes them.
        let elements = |ty: &Type| ty.dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d).filter(|n| *n > 0));
        if !ins.iter().all(|ty| elements(ty).is_some_and(|n| n <= MOST_ELEMENTS)) {
            return None;
        }
        op.shape(&ins).ok()?;
        Some((op, ins))
    }

    fn variants(&self, ins: &[Type]) -> Vec<Variant> {
        match self.shape(ins) {
            Ok(s) => Tiling::all(self, &s).iter().map(Tiling::variant).collect(),
            Err(_) => vec![Variant::default()],
        }
    }

    fn work(&self, ins: &[Type], variant: &Variant) -> Work {
        self.shape(ins).map_or_else(|_| Work::default(), |s| Tiling::of(variant).work(self, &s))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        lower::lower(self, cx);
    }

    fn pushes(&self) -> std::ops::Range<usize> {
        0..self.n_weights
    }

    fn axes(&self, _: &[Type]) -> Vec<Axis> {
        let mut axes = vec![Axis::Rows; 2];
        for _ in 0..self.n_weights {
            let more = usize::from(self.grouped_rows);
            axes.extend([Axis::Weight { rank: 3 + more }, Axis::Weight { rank: 3 + more }]);
        }
        axes.extend(self.grouped_rows.then_some(Axis::Shared));
        axes
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        samples()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let n = ty.numel();
        let data = match ty.dtype {
            DType::I8 => Data::I8((0..n).map(|_| (random() * 127.4) as i8).collect()),
            // Four codes of 0, 1 or 2.
            DType::U8 => {
                let mut code = || ((random().abs() * 2.99) as u8).min(2);
                Data::U8((0..n).map(|_| (0..4).map(|g| code() << (2 * g)).sum()).collect())
            }
            DType::I32 => Data::I32(sample_offsets(n, GROUPED_ROWS)),
            _ if k == 1 => Data::F32((0..n).map(|_| 0.01 + random().abs()).collect()),
            _ => Data::F32((0..n).map(|_| 0.1 + random().abs()).collect()),
        };
        Tensor { ty: ty.clone(), data }
    }

    fn typical_input(&self, k: usize, ins: &[Type], random: &mut dyn FnMut() -> f32) -> Tensor {
        if !self.grouped_rows || k + 1 < ins.len() {
            return self.sample_input(k, &ins[k], random);
        }
        // Sections of equal length.
        let (n, rows) = (ins[k].numel(), ins[0].rows());
        Tensor::i32(&[n], (0..n).map(|s| (s * rows / (n - 1)) as i32).collect())
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = samples().remove(0);
        let swap = |k: usize, ty: Type| {
            let mut ins = ins.clone();
            ins[k] = ty;
            (op.clone(), ins)
        };
        vec![
            swap(0, Type::new(DType::I8, &[2, 3, 100])),
            swap(0, Type::f32(&[2, 3, 320])),
            swap(1, Type::f32(&[2, 3, 4])),
            swap(2, Type::new(DType::U8, &[1, 80, 32])),
            swap(2, Type::new(DType::U8, &[3, 2, 80, 32])),
            swap(3, Type::f32(&[37, 3])),
            swap(3, Type::f32(&[2, 2, 32])),
            (TernaryProduct { block: 32, ..op.clone() }, ins.clone()),
            (TernaryProduct { group: 96, ..op.clone() }, ins.clone()),
            (TernaryProduct { grouped_rows: true, ..op.clone() }, ins.clone()),
            (op, ins[..3].to_vec()),
        ]
    }
}

/// Operands with more elements are not made from contracts.
const MOST_ELEMENTS: usize = 1 << 36;

/// Rows of the samples with grouped rows.
const GROUPED_ROWS: usize = 29;

fn samples() -> Vec<(TernaryProduct, Vec<Type>)> {
    let of = |rows: &[usize], n: usize, op: TernaryProduct, lead: &[usize], nb: usize, alphas: &[usize]| {
        let with = |tail: &[usize], head: &[usize]| [head, tail].concat();
        let np = n.next_multiple_of(64);
        let nc = if op.block == 0 { 1 } else { n.div_ceil(op.block) };
        let mut ins = vec![Type::new(DType::I8, &with(&[np], rows)), Type::f32(&with(&[nc], rows))];
        for _ in 0..op.n_weights {
            ins.push(Type::new(DType::U8, &with(&[op.m.div_ceil(BLOCK_ROWS), np / 4, 32], lead)));
            ins.push(Type::f32(&with(&[op.m.div_ceil(BLOCK_ROWS), nb, BLOCK_ROWS], alphas)));
        }
        // Two sections for each group of an even number of groups.
        let sections = |groups: usize| groups * (2 - groups % 2) + 1;
        ins.extend(op.grouped_rows.then(|| Type::i32(&[sections(lead[0])])));
        (op, ins)
    };
    let op = |m, block, n_weights| TernaryProduct { m, group: 128, block, n_weights, grouped_rows: false };
    let grouped = |m, n_weights| TernaryProduct { m, group: 128, block: 64, n_weights, grouped_rows: true };
    vec![
        // Few rows, several groups and a short last one.
        of(&[2, 3], 300, op(37, 64, 1), &[], 3, &[]),
        of(&[1, 1], 128, op(70, 64, 3), &[], 1, &[]),
        of(&[2, 1], 256, op(8, 128, 1), &[], 2, &[]),
        of(&[5], 190, op(33, 128, 1), &[], 2, &[]),
        // One scale a row, with and without weight groups.
        of(&[3], 300, op(40, 0, 2), &[], 3, &[]),
        of(&[2, 2], 70, op(40, 0, 1), &[], 1, &[]),
        // Many rows, one weight scale a row of the weight, groups of batch rows.
        of(&[2, 26], 192, op(45, 64, 1), &[], 2, &[]),
        of(&[2, 17], 320, op(64, 64, 2), &[2], 1, &[2]),
        of(&[4, 1], 128, op(32, 64, 1), &[2], 1, &[]),
        // More groups of scales than of codes.
        of(&[4, 3], 192, op(37, 64, 2), &[], 2, &[2]),
        of(&[GROUPED_ROWS], 128, grouped(20, 1), &[2], 1, &[4]),
        // Panels that hold a part of the columns, with and without weight groups, the last one short.
        of(&[13], 1140, op(40, 64, 1), &[], 9, &[]),
        of(&[2, 13], 600, op(33, 64, 2), &[2], 1, &[]),
        of(&[GROUPED_ROWS], 640, grouped(40, 1), &[2], 5, &[1]),
        of(&[GROUPED_ROWS], 128, grouped(40, 2), &[2], 1, &[2]),
        of(&[GROUPED_ROWS], 64, grouped(20, 1), &[4], 1, &[2]),
        of(&[GROUPED_ROWS], 192, grouped(33, 1), &[5], 2, &[5]),
    ]
}
