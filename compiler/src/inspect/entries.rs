//! The entry points of a plan: what goes in and out, what runs, what is shared.
//!
//! Loops count once for each of their steps, whatever the number of iterations.

use std::fmt;

use chimera_ir::plan::{BufferId, Plan, Step};
use serde::Serialize;

use super::table::{bytes, count, percent};

/// An input or output.
#[derive(Clone, Debug, Serialize)]
pub struct Port {
    /// Name.
    pub name: String,
    /// Element type and shape.
    pub ty: String,
}

/// Work that several evaluations of one loss have in common.
#[derive(Clone, Debug, Serialize)]
pub struct Shared {
    /// Operations saved because their result is the same for all probes; a ternary multiply-accumulate counts two.
    pub saved: u64,
    /// Operations of as many separate forward passes.
    pub separate: u64,
    /// `saved / separate`.
    pub share: f64,
}

/// One entry point.
#[derive(Clone, Debug, Serialize)]
pub struct EntryReport {
    /// Name.
    pub name: String,
    /// What the caller fills in.
    pub inputs: Vec<Port>,
    /// What the caller may read.
    pub outputs: Vec<Port>,
    /// Number of steps.
    pub steps: usize,
    /// Steps that run a kernel.
    pub runs: usize,
    /// Those of them that are split over threads.
    pub split: usize,
    /// Steps that copy.
    pub copies: usize,
    /// The most iterations of every loop.
    pub loops: Vec<u32>,
    /// Bytes of arena.
    pub arena: u64,
    /// The least any arena could need.
    pub arena_bound: u64,
    /// For a forward pass with several probes.
    pub shared: Option<Shared>,
}

/// Every entry point of a plan.
pub fn entries(plan: &Plan) -> Vec<EntryReport> {
    let ports = |list: &[(String, BufferId)]| -> Vec<Port> {
        list.iter().map(|(name, id)| Port { name: name.clone(), ty: plan.buffer(*id).ty.to_string() }).collect()
    };
    let report = |e: &chimera_ir::plan::Entry| {
        let number = |f: fn(&Step) -> bool| e.steps.iter().filter(|s| f(s)).count();
        let loops = e.steps.iter().filter_map(|s| match s {
            Step::LoopBegin { max, .. } => Some(*max),
            _ => None,
        });
        let (saved, separate) = e.shared;
        EntryReport {
            name: e.name.clone(),
            inputs: ports(&e.inputs),
            outputs: ports(&e.outputs),
            steps: e.steps.len(),
            runs: number(|s| matches!(s, Step::Run { .. })),
            split: number(|s| matches!(s, Step::Run { split: true, .. })),
            copies: number(|s| matches!(s, Step::Copy { .. })),
            loops: loops.collect(),
            arena: e.arena,
            arena_bound: e.arena_bound,
            shared: (separate > 0).then(|| Shared { saved, separate, share: saved as f64 / separate as f64 }),
        }
    };
    plan.entries.iter().map(report).collect()
}

/// Inputs and outputs shown unless all are asked for.
const PORTS: usize = 12;

impl fmt::Display for EntryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "entry {}", self.name)?;
        for (what, ports) in [("input", &self.inputs), ("output", &self.outputs)] {
            let shown = if f.alternate() { ports.len() } else { ports.len().min(PORTS) };
            for p in &ports[..shown] {
                writeln!(f, "  {what:6} {}: {}", p.name, p.ty)?;
            }
            if shown < ports.len() {
                writeln!(f, "  {what:6} and {} more", ports.len() - shown)?;
            }
        }
        write!(
            f,
            "  {} steps: {} kernels ({} split over threads), {} copies",
            self.steps, self.runs, self.split, self.copies
        )?;
        match self.loops[..] {
            [] => writeln!(f)?,
            ref loops => writeln!(f, ", loops of at most {loops:?} iterations")?,
        }
        let ratio = percent(self.arena, self.arena_bound);
        writeln!(f, "  arena {}, lower bound {} ({ratio} of it)", bytes(self.arena), bytes(self.arena_bound))?;
        if let Some(s) = &self.shared {
            let (share, saved, separate) = (percent(s.saved, s.separate), count(s.saved), count(s.separate));
            writeln!(
                f,
                "  shared work {share}: {saved} of {separate} operations of separate forward passes are not repeated"
            )?;
        }
        Ok(())
    }
}
