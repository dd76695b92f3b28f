//! The list of passes, in the order they run.
//!
//! Every pass takes a graph to a graph with the same meaning; after each one the graph verifies. Every pass can be the last.

mod canonicalise;
mod combine;
mod cse;
pub mod dual;
mod fold;
pub mod grad;
pub mod head;
pub mod hoist;
pub mod recompute;

use chimera_ir::{Graph, ops::InferError};

use crate::rebuild::sweep;

/// A limit on the number of rewrites, for bisecting a wrong one.
#[derive(Clone, Copy, Debug)]
pub struct Budget(pub u64);

impl Budget {
    /// Take one rewrite; false when none is left.
    pub fn take(&mut self) -> bool {
        let some = self.0 > 0;
        self.0 = self.0.saturating_sub(1);
        some
    }
}

/// A pass over one graph.
pub type Rewrite = fn(&Graph, &mut Budget) -> Result<Graph, InferError>;

/// A named pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The name for `--stop-after` and dumps.
    pub name: &'static str,
    /// One sentence.
    pub what: &'static str,
    /// The code.
    pub run: Rewrite,
}

fn dead(g: &Graph, _: &mut Budget) -> Result<Graph, InferError> {
    Ok(sweep(g))
}

/// Passes that run before a transformation, and again behind it.
pub const SIMPLIFY: [Pass; 4] = [
    Pass { name: "canonicalise", what: "one spelling for equal expressions", run: canonicalise::run },
    Pass { name: "fold", what: "small constant expressions become constants", run: fold::run },
    Pass { name: "cse", what: "equal nodes become one", run: cse::run },
    Pass { name: "dead", what: "nodes that nothing needs disappear", run: dead },
];

/// Passes that form composite operations.
pub const COMBINE: [Pass; 2] = [
    Pass {
        name: "norm-quantise",
        what: "a norm and the quantisation of its result become one",
        run: combine::norm_quantise,
    },
    Pass { name: "gate-up", what: "two ternary products that meet in a gate become one", run: combine::gate_up },
];

/// The names of all stages in order, for `--stop-after`.
pub const STAGES: [&str; 13] = [
    "build",
    SIMPLIFY[0].name,
    SIMPLIFY[1].name,
    SIMPLIFY[2].name,
    SIMPLIFY[3].name,
    "transform",
    "simplify",
    COMBINE[0].name,
    COMBINE[1].name,
    "hoist",
    "recompute",
    "fuse",
    "plan",
];
