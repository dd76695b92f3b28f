//! The arena over time: which buffers live at which step, and where.
//!
//! The live bytes of a step never exceed the arena, and their largest sum is its lower bound.

use std::cmp::Reverse;
use std::fmt;

use chimera_ir::plan::{Entry, Place, Plan};
use serde::Serialize;

use super::table::{Table, bytes, percent};

/// One arena buffer.
#[derive(Clone, Debug, Serialize)]
pub struct Living {
    /// What it holds.
    pub name: String,
    /// Element type and shape.
    pub ty: String,
    /// Offset in the arena.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// First step that touches it.
    pub first: u32,
    /// Last step that touches it; the number of steps for results.
    pub last: u32,
}

/// The arena during one entry point.
#[derive(Clone, Debug, Serialize)]
pub struct EntryMemory {
    /// Name of the entry point.
    pub entry: String,
    /// Bytes of arena.
    pub arena: u64,
    /// The least any arena could need.
    pub arena_bound: u64,
    /// Live bytes at each step, and after the last one.
    pub live: Vec<u64>,
    /// Buffers by size, largest first.
    pub buffers: Vec<Living>,
}

/// The arena during all entry points.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct MemoryReport {
    /// One for each entry point.
    pub entries: Vec<EntryMemory>,
}

/// The memory map over time.
pub fn memory(plan: &Plan) -> MemoryReport {
    MemoryReport { entries: plan.entries.iter().map(|e| entry(plan, e)).collect() }
}

fn entry(plan: &Plan, e: &Entry) -> EntryMemory {
    let mut change = vec![0i128; e.steps.len() + 2];
    let mut buffers = vec![];
    for l in &e.lifetimes {
        let b = plan.buffer(l.buffer);
        let Place::Arena(offset) = b.place else { continue };
        let n = b.ty.bytes() as u64;
        let last = (l.last as usize).min(e.steps.len());
        change[(l.first as usize).min(last)] += i128::from(n);
        change[last + 1] -= i128::from(n);
        let (name, ty) = (b.name.clone(), b.ty.to_string());
        buffers.push(Living { name, ty, offset, bytes: n, first: l.first, last: l.last });
    }
    buffers.sort_by_key(|b| (Reverse(b.bytes), b.first, b.offset));
    let mut live = vec![];
    let mut sum = 0i128;
    for c in &change[..=e.steps.len()] {
        sum += c;
        live.push(u64::try_from(sum).unwrap_or(0));
    }
    EntryMemory { entry: e.name.clone(), arena: e.arena, arena_bound: e.arena_bound, live, buffers }
}

/// Columns and rows of a chart.
const WIDTH: usize = 72;
const HEIGHT: usize = 10;
/// Buffers shown unless all are asked for.
const LARGEST: usize = 12;

impl EntryMemory {
    /// The most live bytes among the steps of each column.
    fn columns(&self) -> Vec<u64> {
        let n = self.live.len().min(WIDTH);
        let part = |i: usize| &self.live[i * self.live.len() / n..((i + 1) * self.live.len() / n)];
        (0..n).map(|i| part(i).iter().copied().max().unwrap_or(0)).collect()
    }
}

impl fmt::Display for EntryMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = percent(self.arena, self.arena_bound);
        let bound = bytes(self.arena_bound);
        writeln!(f, "entry {}: arena {}, lower bound {bound} ({ratio} of it)", self.entry, bytes(self.arena))?;
        let most = self.live.iter().copied().max().unwrap_or(0);
        if most == 0 {
            return writeln!(f, "  no buffer lives in the arena");
        }
        let columns = self.columns();
        for level in (0..HEIGHT as u64).rev() {
            let label = if level + 1 == HEIGHT as u64 { bytes(most) } else { String::new() };
            // A column reaches a level when it fills more than the levels below.
            let mark = |c: &u64| {
                if u128::from(*c) * HEIGHT as u128 > u128::from(most) * u128::from(level) { '#' } else { ' ' }
            };
            let bar: String = columns.iter().map(mark).collect();
            writeln!(f, "  {label:>9} |{}", bar.trim_end())?;
        }
        writeln!(f, "  {:>9} +{}", 0, "-".repeat(columns.len()))?;
        writeln!(f, "  {:>9}  steps 0 to {}", "", self.live.len() - 1)?;
        let shown = if f.alternate() { self.buffers.len() } else { LARGEST.min(self.buffers.len()) };
        let mut table = Table::new(&["offset", "bytes", "first", "last", "type", "buffer"]);
        for b in &self.buffers[..shown] {
            let numbers = [b.offset.to_string(), bytes(b.bytes), b.first.to_string(), b.last.to_string()];
            table.row(numbers.into_iter().chain([b.ty.clone(), b.name.clone()]));
        }
        write!(f, "{table}")?;
        match self.buffers.len() - shown {
            0 => Ok(()),
            more => writeln!(f, "  and {more} smaller buffers"),
        }
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, e) in self.entries.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            e.fmt(f)?;
        }
        Ok(())
    }
}
