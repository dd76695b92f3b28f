//! Estimators of a descent direction from losses alone: what a direction is, how probes reach weights, what the losses make of it.
//!
//! One file for each row of [`Scheme`]. The graph of the probes and that of the update draw the same numbers, by names and shapes alone,
//! and so agree on every direction.

mod family;
pub(crate) mod mask;
mod per_sequence;
mod shared;

pub use family::Family;
pub use mask::{FISHER, Mask, Score};
pub use per_sequence::PerSequence;
pub use shared::{Mode, Shared};

use chimera_ir::{
    DType, Graph, Op, Tensor, Value,
    ops::{self, Binary, BinaryFn, Distribution, InferError, MeanAbs, Random, Unary, UnaryFn},
    plan::{Comparison, WeightKind},
};

use crate::optimisers::Optimiser;

pub(crate) type Built<T = Value> = Result<T, InferError>;

/// How weights are probed (semantics 13).
#[derive(Clone, Debug, PartialEq)]
pub enum Scheme {
    /// Every sequence has a direction of its own.
    PerSequence(PerSequence),
    /// All sequences share each direction.
    Shared(Shared),
}

impl Scheme {
    /// The row behind the name.
    pub(crate) fn estimator(&self) -> &dyn Estimator {
        match self {
            Scheme::PerSequence(row) => row,
            Scheme::Shared(row) => row,
        }
    }

    /// The number of directions for a batch of `rows` sequences.
    pub fn members(&self, rows: usize) -> usize {
        self.estimator().members(rows)
    }

    /// Rows of the stacked batch of `rows` sequences.
    pub fn stacked_rows(&self, rows: usize) -> usize {
        self.estimator().copies(rows) * rows
    }

    /// Which entries of weights have a direction.
    pub fn mask(&self) -> Mask {
        self.estimator().mask()
    }

    /// What the losses of its probes are compared with.
    pub fn comparison(&self) -> Comparison {
        self.estimator().comparison()
    }
}

/// Where probes meet a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Operations read the weight itself, with one group for each probe.
    Weight,
    /// The codes of a ternary latent have a group for each probe; its scales are those of the latent.
    Codes,
    /// The scales of a ternary weight have a group for each probe; its codes are those of the latent.
    Scales,
    /// What probes add stands behind the products of the weight.
    Product,
}

/// A weight of the graph.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: WeightKind,
    /// The stored tensor.
    pub v: Value,
    /// How a ternary latent is quantised, where that is known.
    pub scales: Option<Scales>,
}

/// How a ternary latent is quantised.
#[derive(Clone, Debug)]
pub(crate) struct Scales {
    /// Its scales.
    pub alpha: Value,
    /// Columns that share one.
    pub group: usize,
    /// Share of the scale above which a weight is not zero.
    pub ratio: f32,
}

/// An operation whose weights are probed behind it, all values with probes stacked.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// Its float operand, or its tokens.
    pub x: Value,
    /// Its result.
    pub y: Value,
    /// Its weights; several where rows are sorted by expert.
    pub weights: Vec<Weight>,
    /// What else it takes.
    pub kind: SiteKind,
}

/// Operations that [`Site`] stands for.
#[derive(Clone, Debug)]
pub(crate) enum SiteKind {
    /// `y = x W^T`.
    Product,
    /// The same with rows sorted by expert.
    Grouped {
        /// Where sections of the rows begin.
        offsets: Value,
        /// Flat slots by position.
        order: Value,
        /// The experts of every token.
        index: Value,
        /// Slots of a token and tokens of a batch row.
        slots: (usize, usize),
    },
    /// `y = W[x]`.
    Embed,
    /// Cross-entropy of `x W^T`.
    Loss {
        /// Size of the vocabulary.
        vocab: usize,
        /// The weight in panels.
        panels: Value,
        /// Labels.
        labels: Value,
    },
}

/// The next value of a weight from its estimate.
pub(crate) type StepOf<'a> = dyn Fn(&mut Cx<'_>, &Weight, Value) -> Built + 'a;

/// What one estimator is.
pub(crate) trait Estimator {
    /// The number of directions for a batch of `rows` sequences.
    fn members(&self, rows: usize) -> usize;

    /// What the losses of its probes are compared with.
    fn comparison(&self) -> Comparison;

    /// Copies of a batch of `rows` sequences among the stacked rows.
    fn copies(&self, rows: usize) -> usize;

    /// Groups of a weight that has all probes.
    fn groups(&self, rows: usize) -> usize;

    /// Where probes meet weights of a kind.
    fn reach(&self, kind: WeightKind) -> Reach;

    /// Which entries of weights have a direction.
    fn mask(&self) -> Mask {
        Mask::Dense
    }

    /// A weight, or a latent whose codes are probed, with a group for each probe in front.
    fn perturbed(&self, cx: &mut Cx<'_>, w: &Weight) -> Built;

    /// What the scales of a ternary weight are multiplied by, with a group for each probe in front.
    fn factors(&self, cx: &mut Cx<'_>, w: &Weight) -> Built {
        let _ = cx;
        Err(InferError::new("probe", format!("the scales of {} are not probed", w.name)))
    }

    /// The result of an operation with what probes add to it.
    fn corrected(&self, cx: &mut Cx<'_>, site: &Site) -> Built;

    /// The estimate for a weight from one scalar for each direction, `c [M]`.
    fn estimate(&self, cx: &mut Cx<'_>, w: &Weight, c: Value) -> Built;

    /// The estimate in the units of the gradient with respect to the weight, up to one factor for all weights.
    fn gradient(&self, cx: &mut Cx<'_>, w: &Weight, c: Value) -> Built {
        self.estimate(cx, w, c)
    }

    /// The next value of a weight, given what makes a step of an estimate.
    fn moved(&self, cx: &mut Cx<'_>, w: &Weight, c: Value, step: &StepOf<'_>) -> Built {
        let g = self.estimate(cx, w, c)?;
        step(cx, w, g)
    }

    /// What makes steps of its estimates unless another one is chosen.
    fn optimiser(&self) -> Optimiser;
}

/// A graph to append to, and the words that its directions depend on.
pub(crate) struct Cx<'a> {
    /// The graph.
    pub g: &'a mut Graph,
    /// Seed, step and first direction, see [`Random`].
    pub random: [Value; 3],
    /// Directions.
    pub members: usize,
}

impl Cx<'_> {
    /// Append an operation.
    pub(crate) fn op(&mut self, op: impl Into<Op>, ins: &[Value]) -> Built {
        self.g.op(op, ins)
    }

    /// `x mul + add`.
    pub(crate) fn affine(&mut self, x: Value, mul: f32, add: f32) -> Built {
        self.op(Unary { f: UnaryFn::Affine { mul, add } }, &[x])
    }

    /// A function of two operands.
    pub(crate) fn binary(&mut self, f: BinaryFn, a: Value, b: Value) -> Built {
        self.op(Binary { f }, &[a, b])
    }

    /// One number.
    pub(crate) fn number(&mut self, x: f32) -> Value {
        self.g.constant(Tensor::f32(&[1], vec![x]))
    }

    /// `max(mean |w|, floor)`.
    pub(crate) fn magnitude(&mut self, w: Value, floor: f32) -> Built {
        self.op(MeanAbs { floor }, &[w])
    }

    /// The shape of a value.
    pub(crate) fn dims(&self, v: Value) -> Vec<usize> {
        self.g.ty(v).dims.clone()
    }

    /// Rows and columns of a matrix.
    pub(crate) fn matrix(&self, w: &Weight) -> Built<[usize; 2]> {
        match self.g.ty(w.v).dims[..] {
            [m, n] => Ok([m, n]),
            _ => Err(InferError::new("probe", format!("{} is not a matrix", w.name))),
        }
    }

    /// `sqrt(max(x, 0))`.
    pub(crate) fn root(&mut self, x: Value) -> Built {
        self.op(Unary { f: UnaryFn::Sqrt }, &[x])
    }

    /// Random numbers of a stream for every direction, `[M, shape...]`.
    pub(crate) fn draw(&mut self, stream: &str, shape: &[usize], dist: Distribution) -> Built {
        self.random(stream, shape, dist, self.members)
    }

    /// Random numbers of a stream, `[shape...]`.
    pub(crate) fn draw_once(&mut self, stream: &str, shape: &[usize], dist: Distribution) -> Built {
        self.random(stream, shape, dist, 0)
    }

    fn random(&mut self, stream: &str, shape: &[usize], dist: Distribution, members: usize) -> Built {
        let stream = self.g.constant(ops::stream(stream));
        let [seed, step, first] = self.random;
        self.op(Random { dist, shape: shape.to_vec(), members, dtype: DType::F32 }, &[seed, step, first, stream])
    }
}
