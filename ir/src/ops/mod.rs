//! Operations. One file each; the list at the bottom of this module is the only other place.

use std::{error, fmt};

use crate::{
    DType, Graph, Tensor, Type, Value,
    loops::{Contract, Expr, Variant},
    lower::Lower,
};

mod add_total;
mod balance;
mod binary;
mod block_scales;
mod boundary_mask;
mod check;
mod combine;
mod combine_grad;
mod cross_entropy;
mod cross_entropy_grad;
mod dequantise;
mod descend;
mod descend_bytes;
mod descent_rates;
mod dispatch;
mod earlier_step;
mod efla_beta;
mod efla_grad;
mod embed;
mod embed_grad;
mod embed_rank;
mod gated_delta;
mod gated_delta_grad;
mod gather_rows;
mod group_scale;
mod heads;
mod label_logit;
mod linear;
mod long;
mod loop_exit;
mod loop_mask;
mod loss_mean;
mod loss_mean_grad;
mod low_rank_grad;
mod mean_abs;
mod member_dot;
mod mlstm;
mod mlstm_grad;
mod norm;
mod norm_grad;
mod norm_quantise;
mod orthonormal;
mod pack_panels;
mod pack_ternary;
mod period_start;
mod positions;
mod preference;
mod preference_grad;
mod probe;
mod quantise;
mod random;
mod rank_update;
mod reshape;
mod rms_scalar;
mod rope;
mod rope_table;
mod route;
mod route_grad;
mod row_rms;
mod row_squares;
mod row_tiles;
mod scale_groups;
mod scatter_rows;
mod select;
mod short_conv;
mod short_conv_grad;
mod span_knot;
mod stack;
mod stochastic_round;
mod stop_rows;
mod sum_to;
mod take_columns;
mod ternary_dense;
mod ternary_product;
mod ternary_transpose;
mod tile_rows;
mod titans_grad;
mod titans_memory;
mod top_mask;
mod transpose_panels;
mod unary;
mod unstack;
mod weight_grad;
mod weighted_sum;
mod window_attention;
mod window_grad;
mod work;

pub use self::{
    add_total::AddTotal,
    balance::Balance,
    binary::{Binary, BinaryFn},
    block_scales::{BlockScales, blocked_type},
    boundary_mask::BoundaryMask,
    combine::Combine,
    combine_grad::CombineGrad,
    cross_entropy::{CrossEntropy, IGNORE},
    cross_entropy_grad::{CrossEntropyInput, CrossEntropyWeight},
    dequantise::Dequantise,
    descend::{Descend, DescentRule, Idle},
    descend_bytes::{DescendBytes, STATE_BLOCK},
    descent_rates::DescentRates,
    dispatch::Dispatch,
    earlier_step::EarlierStep,
    efla_beta::EflaBeta,
    efla_grad::EflaGrad,
    embed::Embed,
    embed_grad::EmbedGrad,
    embed_rank::EmbedRank,
    gated_delta::GatedDelta,
    gated_delta_grad::GatedDeltaGrad,
    gather_rows::GatherRows,
    group_scale::{GroupScale, ScaleMode},
    label_logit::LabelLogit,
    linear::Linear,
    loop_exit::LoopExit,
    loop_mask::LoopMask,
    loss_mean::LossMean,
    loss_mean_grad::LossMeanGrad,
    low_rank_grad::LowRankGrad,
    mean_abs::MeanAbs,
    member_dot::MemberDot,
    mlstm::Mlstm,
    mlstm_grad::MlstmGrad,
    norm::{Norm, NormKind},
    norm_grad::NormGrad,
    norm_quantise::NormQuantise,
    orthonormal::Orthonormal,
    pack_panels::{PANEL, PackPanels, panels_type},
    pack_ternary::{BLOCK_ROWS, PackTernary, packed_type},
    period_start::PeriodStart,
    positions::Positions,
    preference::Preference,
    preference_grad::PreferenceGrad,
    probe::Probe,
    quantise::{CODE_PAD, Quantise},
    random::{Distribution, Random, box_muller, philox, stream, stream_id},
    rank_update::RankUpdate,
    reshape::Reshape,
    rms_scalar::RmsScalar,
    rope::Rope,
    rope_table::{RopeScaling, RopeTable},
    route::Route,
    route_grad::RouteGrad,
    row_rms::RowRms,
    row_squares::RowSquares,
    scale_groups::ScaleGroups,
    scatter_rows::ScatterRows,
    select::Select,
    short_conv::ShortConv,
    short_conv_grad::ShortConvGrad,
    span_knot::{Relaxed, SpanKnot},
    stack::Stack,
    stochastic_round::StochasticRound,
    stop_rows::StopRows,
    sum_to::SumTo,
    take_columns::TakeColumns,
    ternary_dense::TernaryDense,
    ternary_product::TernaryProduct,
    ternary_transpose::TernaryTranspose,
    tile_rows::TileRows,
    titans_grad::TitansGrad,
    titans_memory::TitansMemory,
    top_mask::TopMask,
    transpose_panels::TransposePanels,
    unary::{Unary, UnaryFn},
    unstack::Unstack,
    weight_grad::WeightGrad,
    weighted_sum::WeightedSum,
    window_attention::WindowAttention,
    window_grad::WindowGrad,
    work::{Pass, Work},
};

/// Everything the project knows about one operation.
///
/// The tests visit every operation through [`Op::samples`], so an operation that compiles is also shape-checked, evaluated, lowered
/// and run on every emitter.
pub trait OpDef: Clone + fmt::Debug + PartialEq + Into<Op> {
    /// The name used in text, plans and diagnostics.
    const NAME: &'static str;

    /// The result types, or why there are none.
    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError>;

    /// The reference semantics: obvious loops, no cleverness. Operand types were accepted by `infer`.
    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor>;

    /// Append the vector-Jacobian product: one gradient per operand, `None` where it is zero or not wanted.
    ///
    /// A value that stands for floats in a packed form (panels, ternary codes, activation codes) has the `f32` gradient of what it
    /// stands for, in the layout of that: `[m, n]` for a weight, with the padding of columns where codes have one. Scales have none.
    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        let _ = cx;
        Err(InferError::new(Self::NAME, "not differentiable yet"))
    }

    /// Arithmetic of one execution; traffic is counted by [`Op::cost`].
    fn flops(&self, ins: &[Type], outs: &[Type]) -> Flops;

    /// What the kernel computes as a contract: equal contracts stand for equal semantics on equal operand types.
    fn contract(&self, ins: &[Type]) -> Option<Contract> {
        let _ = ins;
        None
    }

    /// The operation and operand types that a contract of this operation stands for; `None` when it is not one.
    fn of_contract(contract: &Contract) -> Option<(Self, Vec<Type>)> {
        let _ = contract;
        None
    }

    /// The legal ways of lowering, each once, at least one: what [`Lower::variant`] may be. All give the same bits. The first one is
    /// a sound choice where nobody knows better.
    fn variants(&self, ins: &[Type]) -> Vec<Variant> {
        let _ = ins;
        vec![Variant::default()]
    }

    /// What a variant has to do, for those who choose: one of [`OpDef::variants`].
    fn work(&self, ins: &[Type], variant: &Variant) -> Work {
        let (_, outs) = (variant, self.infer(ins).unwrap_or_default());
        Work::plain(self.flops(ins, &outs), ins.iter().chain(&outs).map(Type::bytes).sum())
    }

    /// Append the body of the kernel: the same semantics as [`OpDef::eval`].
    fn lower(&self, cx: &mut Lower<'_>);

    /// Element `(row, col)` of the one result of a pointwise operation, by [`Lower::load`]; `None` for all others.
    fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
        let _ = (cx, row, col);
        None
    }

    /// Whether the one result can be had element by element, so that the operation can be fused into its neighbours.
    fn is_pointwise(&self) -> bool {
        false
    }

    /// The operands of a pointwise operation that `element` reads at its own `(row, col)` and nowhere else, and that have the shape of
    /// the result; a kernel that computes one of them can carry on with this operation.
    fn aligned(&self) -> &'static [usize] {
        &[]
    }

    /// The operands that `lower` reads only through [`Lower::load`], once or twice an element, so that a pointwise producer may be
    /// evaluated in place.
    fn pulls(&self) -> &'static [usize] {
        &[]
    }

    /// The results that `lower` hands out through [`Lower::push`], always together, so that a pointwise consumer may continue.
    fn pushes(&self) -> std::ops::Range<usize> {
        if self.is_pointwise() { 0..1 } else { 0..0 }
    }

    /// Pairs (operand, result) that share one buffer: the kernel updates the operand in place.
    fn updates(&self) -> Vec<(usize, usize)> {
        vec![]
    }

    /// What the leading dimension of each operand counts, which is what a transformation that stacks batch rows needs to know.
    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Rows; ins.len()]
    }

    /// How exactly the kernel has to agree with `eval`.
    fn accuracy(&self) -> Accuracy {
        Accuracy::Bits
    }

    /// Instances and operand types that together exercise every branch above.
    fn samples() -> Vec<(Self, Vec<Type>)>;

    /// Operands for sample `index` where random values would not do (indices, packed codes, positive numbers): called for each operand.
    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let _ = k;
        random_tensor(ty, random)
    }

    /// Operand `k` of `ins` for a measurement: as a sample, but typical in what decides how much work there is.
    fn typical_input(&self, k: usize, ins: &[Type], random: &mut dyn FnMut() -> f32) -> Tensor {
        self.sample_input(k, &ins[k], random)
    }

    /// Instances and operand types that [`OpDef::infer`] must refuse.
    fn rejects() -> Vec<(Self, Vec<Type>)>;
}

/// What the leading dimension of an operand means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Batch rows: row `r` of a result depends on row `r` only.
    Rows,
    /// A weight, the same for all rows. A weight of `rank` dimensions may get one more in front: `G` groups, and then batch row `r` of
    /// `R` uses group `r / (R / G)`.
    Weight {
        /// The number of dimensions without groups.
        rank: usize,
    },
    /// Neither: tables and control values that are the same for all rows and never grouped.
    Shared,
}

/// How exactly a kernel agrees with the reference semantics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Accuracy {
    /// Bit for bit.
    Bits,
    /// `|got - want| <= atol + rtol * |want|` for floats, bit for bit for integers.
    Close {
        /// Relative part.
        rtol: f32,
        /// Absolute part.
        atol: f32,
    },
    /// As `Close`, but integers may differ by one in at most one element of a thousand (a rounding tie behind a float).
    Rounding {
        /// Relative part.
        rtol: f32,
        /// Absolute part.
        atol: f32,
    },
}

/// A tensor of small random elements: floats in (-1, 1), integers -3..=3, bytes 0..=2.
pub fn random_tensor(ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
    use crate::Data;
    let n = ty.numel();
    let mut draw = |scale: f32| -> Vec<f32> { (0..n).map(|_| random() * scale).collect() };
    let data = match ty.dtype {
        DType::F32 => Data::F32(draw(1.0)),
        DType::F64 => Data::F64(draw(1.0).into_iter().map(f64::from).collect()),
        DType::BF16 => Data::BF16(draw(1.0).into_iter().map(|x| (x.to_bits() >> 16) as u16).collect()),
        DType::I8 => Data::I8(draw(3.5).into_iter().map(|x| x as i8).collect()),
        DType::U8 => Data::U8(draw(2.9).into_iter().map(|x| x.abs() as u8).collect()),
        DType::I16 => Data::I16(draw(3.5).into_iter().map(|x| x as i16).collect()),
        DType::I32 => Data::I32(draw(3.5).into_iter().map(|x| x as i32).collect()),
    };
    Tensor { ty: ty.clone(), data }
}

/// What [`OpDef::vjp`] may look at and append to.
#[derive(Debug)]
pub struct VjpCx<'a> {
    /// The graph being differentiated.
    pub graph: &'a mut Graph,
    /// The operands of the operation.
    pub ins: &'a [Value],
    /// Its results.
    pub outs: &'a [Value],
    /// The gradients of the loss with respect to `outs`, `None` where zero.
    pub grads: &'a [Option<Value>],
    /// Which operands anything that wants a gradient depends on.
    pub wanted: &'a [bool],
}

impl VjpCx<'_> {
    /// Append an operation.
    pub fn op(&mut self, op: impl Into<Op>, ins: &[Value]) -> Result<Value, InferError> {
        self.graph.op(op, ins)
    }

    /// Whether the gradient of operand `k` is of use.
    pub fn wants(&self, k: usize) -> bool {
        self.wanted[k]
    }

    /// The gradient of the first result without the columns from `n` on.
    pub fn columns(&mut self, n: usize) -> Result<Value, InferError> {
        let g = self.grad();
        if self.graph.ty(g).cols() == n { Ok(g) } else { self.op(TakeColumns { n }, &[g]) }
    }

    /// `parts [R, ..]` summed over its batch rows, of the shape of `like`.
    pub fn over_rows(&mut self, parts: Value, like: Value) -> Result<Value, InferError> {
        let (rows, dims) = (self.graph.ty(parts).dims[0], self.graph.ty(like).dims.clone());
        let n = self.graph.ty(like).numel();
        let flat = self.op(Reshape { dims: vec![rows, n] }, &[parts])?;
        let sum = self.op(SumTo { dims: vec![n] }, &[flat])?;
        self.op(Reshape { dims }, &[sum])
    }

    /// The gradient of the first result.
    pub fn grad(&self) -> Value {
        self.grads[0].expect("an operation is differentiated only when its result has a gradient")
    }
}

/// Arithmetic by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flops {
    /// Float operations; a fused multiply-add counts two, an elementary function ten.
    pub float: u64,
    /// Ternary multiply-accumulates.
    pub ternary: u64,
}

impl Flops {
    /// Float operations only.
    pub fn float(n: usize) -> Flops {
        Flops { float: n as u64, ternary: 0 }
    }
}

/// What one execution costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Arithmetic.
    pub flops: Flops,
    /// Bytes read and written, each operand and result counted once.
    pub bytes: u64,
}

/// An operation was applied to types it is not defined for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InferError {
    /// The operation.
    pub op: &'static str,
    /// What is wrong, as a sentence without a full stop.
    pub why: String,
}

impl InferError {
    /// An error of `op`.
    pub fn new(op: &'static str, why: impl Into<String>) -> InferError {
        InferError { op, why: why.into() }
    }
}

impl fmt::Display for InferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.op, self.why)
    }
}

impl error::Error for InferError {}

macro_rules! ops {
    ($($Op:ident),* $(,)?) => {
        /// Any operation.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op { $(#[doc = stringify!($Op)] $Op($Op)),* }

        $(impl From<$Op> for Op { fn from(op: $Op) -> Op { Op::$Op(op) } })*

        impl Op {
            /// See [`OpDef::NAME`].
            pub fn name(&self) -> &'static str {
                match self { $(Op::$Op(_) => $Op::NAME),* }
            }

            /// See [`OpDef::infer`].
            pub fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
                match self { $(Op::$Op(op) => op.infer(ins)),* }
            }

            /// See [`OpDef::eval`].
            pub fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
                match self { $(Op::$Op(op) => op.eval(ins)),* }
            }

            /// See [`OpDef::vjp`].
            pub fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
                match self { $(Op::$Op(op) => op.vjp(cx)),* }
            }

            /// See [`OpDef::flops`].
            pub fn flops(&self, ins: &[Type], outs: &[Type]) -> Flops {
                match self { $(Op::$Op(op) => op.flops(ins, outs)),* }
            }

            /// See [`OpDef::contract`].
            pub fn contract(&self, ins: &[Type]) -> Option<Contract> {
                match self { $(Op::$Op(op) => op.contract(ins)),* }
            }

            /// See [`OpDef::of_contract`].
            pub fn of_contract(contract: &Contract) -> Option<(Op, Vec<Type>)> {
                $(if contract.name == $Op::NAME {
                    return $Op::of_contract(contract).map(|(op, ins)| (op.into(), ins));
                })*
                None
            }

            /// See [`OpDef::variants`].
            pub fn variants(&self, ins: &[Type]) -> Vec<Variant> {
                match self { $(Op::$Op(op) => op.variants(ins)),* }
            }

            /// See [`OpDef::work`].
            pub fn work(&self, ins: &[Type], variant: &Variant) -> Work {
                match self { $(Op::$Op(op) => op.work(ins, variant)),* }
            }

            /// See [`OpDef::lower`].
            pub fn lower(&self, cx: &mut Lower<'_>) {
                match self { $(Op::$Op(op) => op.lower(cx)),* }
            }

            /// See [`OpDef::element`].
            pub fn element(&self, cx: &mut Lower<'_>, row: &Expr, col: &Expr) -> Option<Expr> {
                match self { $(Op::$Op(op) => op.element(cx, row, col)),* }
            }

            /// See [`OpDef::is_pointwise`].
            pub fn is_pointwise(&self) -> bool {
                match self { $(Op::$Op(op) => op.is_pointwise()),* }
            }

            /// See [`OpDef::aligned`].
            pub fn aligned(&self) -> &'static [usize] {
                match self { $(Op::$Op(op) => op.aligned()),* }
            }

            /// See [`OpDef::pulls`].
            pub fn pulls(&self) -> &'static [usize] {
                match self { $(Op::$Op(op) => op.pulls()),* }
            }

            /// See [`OpDef::pushes`].
            pub fn pushes(&self) -> std::ops::Range<usize> {
                match self { $(Op::$Op(op) => op.pushes()),* }
            }

            /// See [`OpDef::updates`].
            pub fn updates(&self) -> Vec<(usize, usize)> {
                match self { $(Op::$Op(op) => op.updates()),* }
            }

            /// See [`OpDef::axes`].
            pub fn axes(&self, ins: &[Type]) -> Vec<Axis> {
                match self { $(Op::$Op(op) => op.axes(ins)),* }
            }

            /// See [`OpDef::accuracy`].
            pub fn accuracy(&self) -> Accuracy {
                match self { $(Op::$Op(op) => op.accuracy()),* }
            }

            /// See [`OpDef::sample_input`].
            pub fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
                match self { $(Op::$Op(op) => op.sample_input(k, ty, random)),* }
            }

            /// See [`OpDef::typical_input`].
            pub fn typical_input(&self, k: usize, ins: &[Type], random: &mut dyn FnMut() -> f32) -> Tensor {
                match self { $(Op::$Op(op) => op.typical_input(k, ins, random)),* }
            }

            /// Every sample of every operation.
            pub fn samples() -> Vec<(Op, Vec<Type>)> {
                let mut all = Vec::new();
                $(all.extend($Op::samples().into_iter().map(|(op, ins)| (Op::from(op), ins)));)*
                all
            }

            /// Every ill-typed application of every operation.
            pub fn rejects() -> Vec<(Op, Vec<Type>)> {
                let mut all = Vec::new();
                $(all.extend($Op::rejects().into_iter().map(|(op, ins)| (Op::from(op), ins)));)*
                all
            }
        }
    };
}

impl Op {
    /// Arithmetic and traffic.
    pub fn cost(&self, ins: &[Type], outs: &[Type]) -> Cost {
        let bytes = ins.iter().chain(outs).map(|t| t.bytes() as u64).sum();
        Cost { flops: self.flops(ins, outs), bytes }
    }

    /// The operation with its attributes, for people.
    pub fn text(&self) -> String {
        let debug = format!("{self:?}");
        // `Variant(Struct { .. })` becomes `name { .. }`.
        let attrs = debug.find('{').map_or("", |at| &debug[at..debug.len() - 1]);
        if attrs.is_empty() { self.name().to_owned() } else { format!("{} {attrs}", self.name()) }
    }
}

ops! { AddTotal, Balance, Binary, BlockScales, BoundaryMask, Combine, CombineGrad, CrossEntropy, CrossEntropyInput, CrossEntropyWeight, Dequantise, Descend, DescendBytes, DescentRates, Dispatch, EarlierStep, EflaBeta, EflaGrad, Embed, EmbedGrad, EmbedRank, GatedDelta, GatedDeltaGrad, GatherRows, GroupScale, LabelLogit, Linear, LoopExit, LoopMask, LossMean, LossMeanGrad, LowRankGrad, MeanAbs, MemberDot, Mlstm, MlstmGrad, Norm, NormGrad, NormQuantise, Orthonormal, PackPanels, PackTernary, PeriodStart, Positions, Preference, PreferenceGrad, Probe, Quantise, Random, RankUpdate, Reshape, RmsScalar, Rope, RopeTable, Route, RouteGrad, RowRms, RowSquares, ScaleGroups, ScatterRows, Select, ShortConv, ShortConvGrad, SpanKnot, Stack, StochasticRound, StopRows, SumTo, TakeColumns, TernaryDense, TernaryProduct, TernaryTranspose, TileRows, TitansGrad, TitansMemory, TopMask, TransposePanels, Unary, Unstack, WeightGrad, WeightedSum, WindowAttention, WindowGrad }
