//! Layers: functions that append graph. A layer is not an operation; model names stop here.
//!
//! All layers share one [`Net`], which knows the configuration, the batch and the form of the recurrences. Parameter names are
//! those of the weight files.

mod ffn;
mod linear;
mod looping;
mod mixers;

use chimera_ir::{
    Graph, Op, Tensor, Type, Value,
    ops::{Binary, BinaryFn, InferError, Unary, UnaryFn},
};

use std::collections::HashSet;

use crate::config::ModelConfig;

pub use linear::Activated;

/// The result of every layer function.
pub type Built<T = Value> = Result<T, InferError>;

/// How recurrent mixers run; both forms compute the same function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Token by token, for decoding.
    Recurrent,
    /// Parallel inside chunks.
    Chunked,
}

/// How often the looped layers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Depth {
    /// The same number for all rows, known at compile time.
    Fixed(usize),
    /// An input `depth` (`i32 [R]`) of at most `max`; with `adaptive`, rows stop when the state settles.
    PerRow {
        /// Upper bound.
        max: usize,
        /// Whether rows may stop early.
        adaptive: bool,
    },
}

impl Depth {
    /// The number of iterations that states are kept for.
    pub fn max(self) -> usize {
        match self {
            Depth::Fixed(n) | Depth::PerRow { max: n, .. } => n,
        }
    }
}

/// What a graph is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Batch rows.
    pub rows: usize,
    /// Tokens of a row.
    pub tokens: usize,
    /// Form of the recurrences.
    pub form: Form,
    /// Whether states are read and written; otherwise every row starts fresh.
    pub carry: bool,
    /// Loop depth.
    pub depth: Depth,
}

/// Values every layer of one token stream may need.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Index of each token inside its document, `i32 [R, T]`.
    pub pos: Value,
    /// Embeddings `[R, T, d]`.
    pub emb: Value,
    /// Rotation tables `[R, T, K/2]`, for models with window attention.
    pub rope: Option<(Value, Value)>,
}

/// A graph under construction with what layers need to know.
#[derive(Debug)]
pub struct Net<'a> {
    /// The model.
    pub cfg: &'a ModelConfig,
    /// The graph.
    pub g: Graph,
    /// What it is built for.
    pub shape: Shape,
    /// Ternary weights that come as codes and scales instead of latents; experts of a layer also together, with `*` for the expert.
    pub packed: Option<&'a HashSet<String>>,
    /// Side results by name (`load.layers.3.mlp`, `surprise.layers.3`, `knot.layers.7`), outside of loops.
    pub side: Vec<(String, Value)>,
    /// Inside a loop: what the body was given and returns besides the hidden state.
    looped: Option<Vec<(String, Value)>>,
}

impl<'a> Net<'a> {
    /// An empty graph.
    pub fn new(cfg: &'a ModelConfig, shape: Shape) -> Net<'a> {
        Net { cfg, g: Graph::default(), shape, packed: None, side: vec![], looped: None }
    }

    /// Append an operation with one result.
    pub fn op(&mut self, op: impl Into<Op>, ins: &[Value]) -> Built {
        self.g.op(op, ins)
    }

    /// A `f32` parameter.
    pub fn param(&mut self, name: &str, dims: &[usize]) -> Value {
        self.g.param(name, Type::f32(dims))
    }

    /// `[R, T, cols]`.
    pub fn activation(&self, cols: usize) -> Type {
        Type::f32(&[self.shape.rows, self.shape.tokens, cols])
    }

    fn binary(&mut self, f: BinaryFn, a: Value, b: Value) -> Built {
        self.op(Binary { f }, &[a, b])
    }

    fn add(&mut self, a: Value, b: Value) -> Built {
        self.binary(BinaryFn::Add, a, b)
    }

    fn mul(&mut self, a: Value, b: Value) -> Built {
        self.binary(BinaryFn::Mul, a, b)
    }

    fn unary(&mut self, f: UnaryFn, x: Value) -> Built {
        self.op(Unary { f }, &[x])
    }

    /// `x mul + add`.
    fn affine(&mut self, x: Value, mul: f32, add: f32) -> Built {
        self.unary(UnaryFn::Affine { mul, add }, x)
    }

    fn eps(&self) -> f32 {
        self.cfg.rms_norm_eps as f32
    }

    /// The carried state operands of a recurrent operation, none when rows start fresh. Names are `site.name`.
    fn states(&mut self, site: &str, specs: &[(&str, Type)]) -> Vec<Value> {
        if !self.shape.carry {
            return vec![];
        }
        specs.iter().map(|(n, ty)| self.g.state(format!("{site}.{n}"), ty.clone())).collect()
    }

    /// Append a recurrent operation: `specs` are its states, which follow its operands and its first `n_results` results.
    fn recurrent(
        &mut self,
        op: impl Into<Op>,
        ins: &[Value],
        site: &str,
        specs: &[(&str, Type)],
        n_results: usize,
    ) -> Built<Vec<Value>> {
        let states = self.states(site, specs);
        let operands: Vec<Value> = ins.iter().chain(&states).copied().collect();
        let mut outs = self.g.ops(op, &operands)?;
        for (v, (name, _)) in outs.split_off(n_results).into_iter().zip(specs) {
            self.g.writes.push((format!("{site}.{name}"), v));
        }
        Ok(outs)
    }

    /// Keep a side result. Inside a loop the value of the last iteration counts.
    fn keep(&mut self, name: String, v: Value) {
        match &mut self.looped {
            Some(kept) => kept.push((name, v)),
            None => self.side.push((name, v)),
        }
    }

    /// The two words of a random seed as a literal.
    fn seed(&mut self, seed: u64) -> Value {
        self.g.constant(Tensor::i32(&[2], vec![seed as i32, (seed >> 32) as i32]))
    }

    fn word(&mut self, x: i32) -> Value {
        self.g.constant(Tensor::i32(&[1], vec![x]))
    }
}
