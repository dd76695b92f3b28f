//! The memory that a run will take, said at its start, and what it took, said at its end.
//!
//! Invariant: the part of the plan is what the executor allocates, to the byte; the rest is what the process held when the plan was
//! made, and a constant for what comes behind.

use crate::options::{Failure, RunOptions};
use crate::watch::Reporter;
use chimera_compiler::{CompileError, MemoryBudget, Options, compile};
use chimera_frontends::config::{ModelConfig, parameters};
use chimera_ir::plan::Plan;
use chimera_runtime::train::metrics::{forget_peak, peak_bytes, resident_bytes};
use serde_json::json;

/// Bytes of what comes behind the compiler: machine code, stacks of threads, pages of the program that run then. Besides there is a
/// buffer in which weights are made or read, as large as the largest.
const REST: u64 = 10 << 20;

/// A budget is compiled for so many times at most.
const ATTEMPTS: usize = 3;

/// A plan for `options` whose whole process keeps to `budget`, if there is one.
///
/// # Errors
/// When it cannot be compiled, or not for so little memory.
pub fn compile_within(
    config: &ModelConfig,
    options: Options,
    budget: Option<u64>,
    threads: usize,
) -> Result<Plan, CompileError> {
    let Some(bytes) = budget else { return compile(config, &options) };
    let largest = parameters(config).iter().map(|p| 4 * p.dims.iter().product::<usize>()).max().unwrap_or(0);
    let within = || {
        let budget = Some(MemoryBudget { bytes, outside: outside(largest), threads });
        compile(config, &Options { budget, ..options.clone() })
    };
    // Compiling leaves memory that the allocator keeps; the next time it is there already, and counts.
    for _ in 1..ATTEMPTS {
        match within() {
            Ok(plan) if plan.memory(threads).total().saturating_add(outside(largest)) <= bytes => return Ok(plan),
            Ok(_) | Err(CompileError::Budget { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    within()
}

/// Bytes around a plan whose largest weight has so many.
fn outside(largest: usize) -> u64 {
    resident_bytes().unwrap_or(0) + REST + largest as u64
}

/// Peak of resident memory, ahead of time.
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    /// Bytes of the plan: arena, weights with the optimizer's memory, gradients, scratch memory of all threads.
    pub plan: u64,
    /// Bytes that the process holds already: program, vocabulary, data, and the plan as data; and some for what it will need to run.
    pub outside: u64,
}

impl Prediction {
    /// That of a plan that is about to be executed; from here on the process has a peak of its own, where the system lets it.
    pub fn of(plan: &Plan, run: &RunOptions) -> Prediction {
        forget_peak();
        let largest = plan.weights.iter().map(|w| w.ty.bytes()).max().unwrap_or(0);
        Prediction { plan: plan.memory(run.threads()).total(), outside: outside(largest) }
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.plan.saturating_add(self.outside)
    }

    /// Notes what the peak was, where the system tells it.
    ///
    /// # Errors
    /// A record that cannot be written.
    pub fn compare(&self, step: u64, reporter: &mut Reporter) -> Result<(), Failure> {
        let Some(measured) = peak_bytes() else { return Ok(()) };
        let predicted = self.total();
        let line = format!(
            "memory: {} MB at most, predicted {} MB ({} MB of it the plan)",
            measured >> 20,
            predicted >> 20,
            self.plan >> 20
        );
        let numbers =
            json!({ "measured": measured, "predicted": predicted, "plan": self.plan, "outside": self.outside });
        Ok(reporter.note("memory", step, &line, numbers)?)
    }
}
