//! A plan on one page, and the fusion decisions in it.
//!
//! Bytes of persistent memory are counted once, however many buffers name them.

use std::collections::BTreeMap;
use std::fmt;

use chimera_ir::plan::{Place, Plan, Step, WeightKind};
use serde::Serialize;

use super::table::{Table, bytes, count, percent};
use crate::{passes::hoist::DERIVED, tuning::THREADS};

/// One kind of memory of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct Component {
    /// `weights`, `optimizer`, `derived`, `constants`, `inputs`, `states` or `arena`.
    pub name: &'static str,
    /// Number of tensors; for the arena of buffers that take turns in it.
    pub tensors: usize,
    /// Bytes.
    pub bytes: u64,
}

/// States of one name in all layers.
#[derive(Clone, Debug, Serialize)]
pub struct StateRow {
    /// The last part of their names.
    pub name: String,
    /// Layers that have it.
    pub layers: usize,
    /// Copies of all layers together: loop iterations count.
    pub copies: u64,
    /// Bytes of all copies for all rows.
    pub bytes: u64,
}

/// A plan on one page.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// Target the plan was made for.
    pub target: String,
    /// Entry points with the shape they were compiled for.
    pub options: Vec<(String, String)>,
    /// Number of kernels.
    pub kernels: usize,
    /// Number of steps of all entry points together.
    pub steps: usize,
    /// Memory by kind.
    pub memory: Vec<Component>,
    /// All memory.
    pub total_bytes: u64,
    /// What running the plan takes at most, on [`THREADS`] threads: that memory as it is laid out, inputs that are kept, scratch
    /// memory and tables. The process around it is left out.
    pub predicted_peak: u64,
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// The least any arena could need.
    pub arena_bound: u64,
    /// States by name.
    pub states: Vec<StateRow>,
    /// Batch rows that the states are for; 0 without states.
    pub stream_rows: usize,
    /// Steps, kernels run, and arena of every entry point.
    pub entries: Vec<EntryRow>,
}

/// One line about an entry point.
#[derive(Clone, Debug, Serialize)]
pub struct EntryRow {
    /// Name.
    pub name: String,
    /// Number of steps.
    pub steps: usize,
    /// Those that run a kernel.
    pub runs: usize,
    /// Float operations.
    pub flops: u64,
    /// Ternary multiply-accumulates.
    pub ternary: u64,
    /// Bytes of arena.
    pub arena: u64,
    /// The least any arena could need.
    pub arena_bound: u64,
    /// Operations saved by sharing, and operations of separate evaluations; zero where nothing could be shared.
    pub shared: (u64, u64),
}

/// The page about a plan.
pub fn summary(plan: &Plan) -> PlanReport {
    let memory = components(plan);
    let mut states: BTreeMap<&str, StateRow> = BTreeMap::new();
    for s in &plan.states {
        let name = s.name.rsplit('.').next().unwrap_or_default();
        let row = StateRow { name: name.to_owned(), layers: 0, copies: 0, bytes: 0 };
        let row = states.entry(name).or_insert(row);
        row.layers += 1;
        row.copies += u64::from(s.copies);
        row.bytes += s.ty.bytes() as u64 * u64::from(s.copies);
    }
    let rows = plan.states.iter().find(|s| s.name == "pos").and_then(|s| s.ty.dims.first());
    let entries: Vec<EntryRow> = plan
        .entries
        .iter()
        .map(|e| EntryRow {
            name: e.name.clone(),
            steps: e.steps.len(),
            runs: e.steps.iter().filter(|s| matches!(s, Step::Run { .. })).count(),
            flops: e.groups.iter().map(|g| g.flops).fold(0, u64::saturating_add),
            ternary: e.groups.iter().map(|g| g.ternary).fold(0, u64::saturating_add),
            arena: e.arena,
            arena_bound: e.arena_bound,
            shared: e.shared,
        })
        .collect();
    PlanReport {
        target: plan.target.clone(),
        options: plan.options.clone(),
        kernels: plan.kernels.len(),
        steps: entries.iter().map(|e| e.steps).sum(),
        predicted_peak: plan.memory(THREADS).total(),
        total_bytes: memory.iter().map(|c| c.bytes).sum(),
        memory,
        arena_bytes: plan.arena(),
        arena_bound: entries.iter().map(|e| e.arena_bound).max().unwrap_or(0),
        states: states.into_values().collect(),
        stream_rows: rows.copied().unwrap_or(0),
        entries,
    }
}

fn components(plan: &Plan) -> Vec<Component> {
    let weights = |optimizer: bool| {
        let of = plan.weights.iter().filter(move |w| (w.kind == WeightKind::Optimizer) == optimizer);
        (of.clone().count(), of.map(|w| w.ty.bytes() as u64).sum::<u64>())
    };
    // Persistent bytes by offset: several buffers may name the same ones.
    let mut persistent: BTreeMap<u64, (usize, u64)> = BTreeMap::new();
    for (i, b) in plan.buffers.iter().enumerate() {
        if let Place::Persistent(at) = b.place {
            let kind = match () {
                () if plan.constants.iter().any(|(id, _)| id.0 as usize == i) => 1,
                () if b.name.starts_with(DERIVED) => 0,
                () => 2,
            };
            let known = persistent.entry(at).or_insert((kind, 0));
            known.1 = known.1.max(b.ty.bytes() as u64);
        }
    }
    let lasting = |kind: usize| {
        let of = persistent.values().filter(move |p| p.0 == kind);
        (of.clone().count(), of.map(|p| p.1).sum::<u64>())
    };
    let turns = plan.buffers.iter().filter(|b| matches!(b.place, Place::Arena(_))).count();
    let rows = [
        ("weights", weights(false)),
        ("optimizer", weights(true)),
        ("derived", lasting(0)),
        ("constants", lasting(1)),
        ("inputs", lasting(2)),
        ("states", (plan.states.len(), plan.state_bytes())),
        ("arena", (turns, plan.arena())),
    ];
    rows.into_iter().map(|(name, (tensors, bytes))| Component { name, tensors, bytes }).collect()
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "plan for {}: {} kernels, {} steps", self.target, self.kernels, self.steps)?;
        for (name, value) in &self.options {
            writeln!(f, "  {name}: {value}")?;
        }
        let head =
            ["entry", "steps", "kernels run", "flops", "ternary MACs", "arena", "lower bound", "arena/bound", "shared"];
        let mut table = Table::new(&head);
        for e in &self.entries {
            let ratio = percent(e.arena, e.arena_bound);
            let shared = percent(e.shared.0, e.shared.1);
            let work = [e.steps.to_string(), e.runs.to_string(), count(e.flops), count(e.ternary)];
            let memory = [bytes(e.arena), bytes(e.arena_bound), ratio, shared];
            table.row([e.name.clone()].into_iter().chain(work).chain(memory));
        }
        write!(f, "\nentry points\n{table}")?;
        let mut table = Table::new(&["memory", "tensors", "bytes"]);
        for c in &self.memory {
            table.row([c.name.to_owned(), c.tensors.to_string(), bytes(c.bytes)]);
        }
        table.row(["total".to_owned(), String::new(), bytes(self.total_bytes)]);
        write!(f, "\nmemory of the plan\n{table}")?;
        writeln!(
            f,
            "predicted peak on {THREADS} threads: {} ({} bytes)",
            bytes(self.predicted_peak),
            self.predicted_peak
        )?;
        if !self.states.is_empty() {
            let rows = self.stream_rows.max(1) as u64;
            let mut table = Table::new(&["state", "layers", "copies", "bytes", "of one stream"]);
            for s in &self.states {
                let numbers = [s.layers.to_string(), s.copies.to_string(), bytes(s.bytes), bytes(s.bytes / rows)];
                table.row([s.name.clone()].into_iter().chain(numbers));
            }
            let all: u64 = self.states.iter().map(|s| s.bytes).sum();
            let numbers = [String::new(), String::new(), bytes(all), bytes(all / rows)];
            table.row(["total".to_owned()].into_iter().chain(numbers));
            write!(f, "\nstates, batch rows: {rows}\n{table}")?;
        }
        Ok(())
    }
}

/// Producer and consumer, and what became of them.
#[derive(Clone, Debug, Serialize)]
pub struct DecisionRow {
    /// Entry point.
    pub entry: String,
    /// Producer and consumer.
    pub edge: String,
    /// `fused`, or why not.
    pub verdict: String,
    /// Number of such edges.
    pub count: u32,
}

/// All fusion decisions of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct DecisionReport {
    /// Edges that were fused.
    pub fused: u64,
    /// Candidates that were not.
    pub kept: u64,
    /// One row for every entry point, edge and verdict.
    pub decisions: Vec<DecisionRow>,
}

/// The fusion decisions of a plan.
pub fn decisions(plan: &Plan) -> DecisionReport {
    let total = |fused: bool| {
        let of = plan.decisions.iter().filter(|d| (d.verdict == FUSED) == fused);
        of.map(|d| u64::from(d.count)).sum()
    };
    let row = |d: &chimera_ir::plan::Decision| DecisionRow {
        entry: d.entry.clone(),
        edge: d.edge.clone(),
        verdict: d.verdict.clone(),
        count: d.count,
    };
    DecisionReport { fused: total(true), kept: total(false), decisions: plan.decisions.iter().map(row).collect() }
}

const FUSED: &str = "fused";

impl fmt::Display for DecisionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "fusion: {} edges fused, {} candidates left apart", self.fused, self.kept)?;
        for fused in [false, true] {
            let mut table = Table::new(&["entry", "producer -> consumer", "edges", "reason"]);
            let rows: Vec<&DecisionRow> = self.decisions.iter().filter(|d| (d.verdict == FUSED) == fused).collect();
            if rows.is_empty() {
                continue;
            }
            for d in rows {
                table.row([d.entry.clone(), d.edge.clone(), d.count.to_string(), d.verdict.clone()]);
            }
            write!(f, "\n{}\n{table}", if fused { "fused" } else { "left apart" })?;
        }
        Ok(())
    }
}
