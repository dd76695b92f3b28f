//! Choosing among the variants of a kernel: by measurement where there is one, else by the cost model.
//!
//! A choice is a function of contract, target, threads and table: the same table gives the same plan.

mod cost;
mod measure;
mod table;

pub use cost::{predict, share_of_peak};
pub use measure::{Progress, Subject, TuneError, subjects, tune};
pub use table::{Candidate, Entry, Table, TableError};

use chimera_codegen::Target;
use chimera_ir::{Op, Type, loops::Variant};

/// Threads that plans are made for where nobody says.
pub const THREADS: usize = 2;

/// What decides.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// What was measured on this machine, if anything.
    pub table: Option<Table>,
    /// The machine that the cost model is asked about.
    pub target: Target,
    /// Threads that share the grid of a kernel.
    pub threads: usize,
}

/// Why a variant was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is no other.
    Only,
    /// The fastest in the table.
    Measured,
    /// The table does not have the operation with these sizes: the least predicted time.
    Predicted,
}

impl Reason {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Reason::Only => "the only way",
            Reason::Measured => "the fastest that was measured",
            Reason::Predicted => "the least predicted time",
        }
    }
}

impl Tuning {
    /// The variant of an operation, and why.
    pub fn choose(&self, op: &Op, ins: &[Type]) -> (Variant, Reason) {
        let mut all = op.variants(ins);
        if all.len() == 1 {
            return (all.swap_remove(0), Reason::Only);
        }
        let contract = op.contract(ins).map(|c| c.to_string());
        let entry = self.table.as_ref().zip(contract).and_then(|(t, c)| t.entry(&c));
        // What was legal when the table was made may not be now.
        if let Some(at) = entry.and_then(|e| all.iter().position(|v| v.to_string() == e.chosen)) {
            return (all.swap_remove(at), Reason::Measured);
        }
        (all.swap_remove(self.least(op, ins, &all)), Reason::Predicted)
    }

    /// The index of the variant with the least predicted time.
    pub fn least(&self, op: &Op, ins: &[Type], all: &[Variant]) -> usize {
        let times: Vec<f64> = all.iter().map(|v| predict(&op.work(ins, v), &self.target, self.threads)).collect();
        (0..all.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or(0)
    }
}
