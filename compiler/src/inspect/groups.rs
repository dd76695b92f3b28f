//! Work and memory traffic by part of the model.
//!
//! A looped layer counts once for each iteration that the plan allows.

use std::fmt;

use chimera_ir::plan::Plan;
use serde::Serialize;

use super::table::{Table, bytes, count, percent};

/// One part of the model in one entry point.
#[derive(Clone, Debug, Serialize)]
pub struct GroupRow {
    /// Name, such as `layers.3`.
    pub name: String,
    /// Float operations.
    pub flops: u64,
    /// Ternary multiply-accumulates.
    pub ternary: u64,
    /// Bytes that kernels read and write.
    pub bytes: u64,
}

/// The table of one entry point.
#[derive(Clone, Debug, Serialize)]
pub struct EntryGroups {
    /// Name of the entry point.
    pub entry: String,
    /// Its parts, in the order they first run.
    pub groups: Vec<GroupRow>,
}

impl GroupRow {
    /// Operations, a multiply-accumulate counting two.
    fn operations(&self) -> u64 {
        self.flops.saturating_add(self.ternary.saturating_mul(2))
    }
}

/// The tables of all entry points.
pub fn groups(plan: &Plan) -> Vec<EntryGroups> {
    let row = |g: &chimera_ir::plan::Group| GroupRow {
        name: g.name.clone(),
        flops: g.flops,
        ternary: g.ternary,
        bytes: g.bytes,
    };
    let table =
        |e: &chimera_ir::plan::Entry| EntryGroups { entry: e.name.clone(), groups: e.groups.iter().map(row).collect() };
    plan.entries.iter().map(table).collect()
}

impl fmt::Display for EntryGroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |what: fn(&GroupRow) -> u64| self.groups.iter().map(what).fold(0, u64::saturating_add);
        let all = GroupRow {
            name: "total".to_owned(),
            flops: sum(|g| g.flops),
            ternary: sum(|g| g.ternary),
            bytes: sum(|g| g.bytes),
        };
        let mut table = Table::new(&["group", "flops", "ternary MACs", "bytes", "share of work", "operations/byte"]);
        for g in self.groups.iter().chain([&all]) {
            let intensity = g.operations() as f64 / g.bytes.max(1) as f64;
            let numbers = [count(g.flops), count(g.ternary), bytes(g.bytes)];
            let shares = [percent(g.operations(), all.operations()), format!("{intensity:.1}")];
            table.row([g.name.clone()].into_iter().chain(numbers).chain(shares));
        }
        write!(f, "entry {}\n{table}", self.entry)
    }
}
