//! A limit of memory, and the choice of what gradients make again so that a plan keeps to it.
//!
//! Every figure is that of a plan that was put together, never an estimate: what is chosen fits when it runs.

use std::{cmp::Reverse, fmt};

use chimera_ir::{
    Graph, Value,
    graph::{Kind, Node},
};

use crate::{
    CompileError,
    assemble::Assembler,
    fuse::{Decisions, fuse},
    passes::{
        Budget,
        recompute::{Grain, Part, Parts},
    },
    pipeline::Prepared,
};

/// The memory that a plan may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes of them that are taken by what is no part of the plan: the program, vocabulary and data.
    pub outside: u64,
    /// Threads that the plan will run on; each has scratch memory.
    pub threads: usize,
}

/// What gradients make again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// The parts that are made again.
    pub again: Vec<Part>,
    /// The number of parts there are.
    pub parts: usize,
    /// Operations that are done twice, and operations of the whole entry point.
    pub flops: (u64, u64),
}

impl fmt::Display for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, {} of them outside of the plan, {} threads", self.bytes, self.outside, self.threads)
    }
}

/// So many times a chosen part is kept after all, to see whether the rest suffices.
const TRIALS: usize = 8;

/// One grain of a graph under trial.
struct Trial<'a, 'f> {
    parts: Parts<'a>,
    total: &'f mut dyn FnMut(&Graph) -> u64,
    limit: u64,
}

impl Trial<'_, '_> {
    fn fits(&mut self, chosen: &[bool]) -> bool {
        (self.total)(&self.parts.again(chosen)) <= self.limit
    }

    fn flops(&self, chosen: &[bool]) -> u64 {
        self.parts.list.iter().zip(chosen).filter(|(_, c)| **c).map(|(p, _)| p.flops).sum()
    }

    /// The first so many parts of an order.
    fn first(&self, order: &[usize], n: usize) -> Vec<bool> {
        let mut chosen = vec![false; self.parts.list.len()];
        order[..n].iter().for_each(|&p| chosen[p] = true);
        chosen
    }

    /// A choice that fits where that of all parts does.
    fn search(&mut self) -> Vec<bool> {
        let list = &self.parts.list;
        let mut order: Vec<usize> = (0..list.len()).collect();
        // Most bytes for an operation first.
        let gain = |p: usize| list[p].bytes as f64 / (list[p].flops as f64).max(1.0);
        order.sort_by(|&a, &b| gain(b).total_cmp(&gain(a)).then(a.cmp(&b)));
        let (mut too_few, mut enough) = (0, order.len());
        while enough - too_few > 1 {
            let middle = too_few.midpoint(enough);
            let chosen = self.first(&order, middle);
            *(if self.fits(&chosen) { &mut enough } else { &mut too_few }) = middle;
        }
        let mut chosen = self.first(&order, enough);
        // The last parts of the forward pass are the first of the gradient: making them again saves least.
        let mut kept: Vec<usize> = (0..chosen.len()).filter(|&p| chosen[p]).collect();
        kept.sort_by_key(|&p| Reverse(p));
        for p in kept.into_iter().take(TRIALS) {
            chosen[p] = false;
            chosen[p] = !self.fits(&chosen);
        }
        chosen
    }
}

/// Lets every entry point with gradients make again what it must for the whole plan to keep to `budget`; returned are their choices.
///
/// # Errors
/// [`CompileError::Budget`] when the plan needs more whatever is chosen.
pub(crate) fn fit(
    entries: &mut [Prepared],
    empty: &Assembler<'_>,
    rewrites: Budget,
    budget: MemoryBudget,
) -> Result<Vec<(&'static str, Policy)>, CompileError> {
    let limit = budget.bytes.saturating_sub(budget.outside);
    let refuse = |least: u64| CompileError::Budget { budget: budget.bytes, least: least + budget.outside };
    let add = |plan: &mut Assembler<'_>, name: &str, g: &Graph| {
        let items = fuse(g, &mut { rewrites }, &mut Decisions::new());
        plan.entry(name, g, &items, Decisions::new(), (0, 0));
    };
    let total = |plan: Assembler<'_>| plan.finish().memory(budget.threads).total();
    let mut base = empty.clone();
    entries.iter().filter(|e| !e.differentiated).for_each(|e| add(&mut base, e.name, &e.g));
    let mut policies = vec![];
    for entry in entries.iter_mut().filter(|e| e.differentiated) {
        let mut with = |g: &Graph| {
            let mut plan = base.clone();
            add(&mut plan, entry.name, g);
            total(plan)
        };
        let (g, policy) = choose(&entry.g, limit, &mut with).map_err(refuse)?;
        add(&mut base, entry.name, &g);
        entry.g = g;
        policies.push((entry.name, policy));
    }
    match total(base) {
        all if all > limit => Err(refuse(all)),
        _ => Ok(policies),
    }
}

/// The graph with as little made again as keeps `total` of it within `limit`, and what that is.
///
/// # Errors
/// When nothing does: the least that would.
fn choose(g: &Graph, limit: u64, total: &mut dyn FnMut(&Graph) -> u64) -> Result<(Graph, Policy), u64> {
    let mut least = total(g);
    if least <= limit {
        return Ok((g.clone(), Policy { parts: Parts::of(g, Grain::Half).list.len(), ..Policy::default() }));
    }
    let mut best: Option<(u64, Graph, Policy)> = None;
    for grain in Grain::ALL {
        let parts = Parts::of(g, grain);
        let all = total(&parts.again(&vec![true; parts.list.len()]));
        least = least.min(all);
        if all > limit {
            continue;
        }
        let mut trial = Trial { parts, total: &mut *total, limit };
        let chosen = trial.search();
        let flops = trial.flops(&chosen);
        if best.as_ref().is_none_or(|b| flops < b.0) {
            let list = &trial.parts.list;
            let again = list.iter().zip(&chosen).filter(|(_, c)| **c).map(|(p, _)| p.clone()).collect();
            let policy = Policy { again, parts: list.len(), flops: (flops, operations(g)) };
            best = Some((flops, trial.parts.again(&chosen), policy));
        }
    }
    best.map(|(_, g, policy)| (g, policy)).ok_or(least)
}

/// Operations of a graph without loops; a ternary multiply-accumulate counts two.
fn operations(g: &Graph) -> u64 {
    let types = |vs: &[Value]| vs.iter().map(|&v| g.ty(v).clone()).collect::<Vec<_>>();
    let count = |n: &Node| {
        let Kind::Op(op) = &n.kind else { return 0 };
        let flops = op.flops(&types(&n.ins), &types(&n.outs));
        flops.float + 2 * flops.ternary
    };
    g.nodes().iter().map(count).sum()
}

/// A number of bytes as people write it: `4G`, `1.5G`, `800M`, `1048576`; units are powers of 1024.
///
/// # Errors
/// What was expected.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (number, unit) = match text.trim_end_matches(['B', 'b']).trim_end_matches('i') {
        t if t.ends_with(['K', 'k']) => (&t[..t.len() - 1], 1u64 << 10),
        t if t.ends_with(['M', 'm']) => (&t[..t.len() - 1], 1 << 20),
        t if t.ends_with(['G', 'g']) => (&t[..t.len() - 1], 1 << 30),
        t => (t, 1),
    };
    match number.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 && x * (unit as f64) < 1e18 => Ok((x * unit as f64) as u64),
        _ => Err("expected a number of bytes such as 4G, 800M or 1048576".into()),
    }
}

impl Policy {
    /// The share of the operations that are done twice, and what they are: `12 of 52 parts, 8.1 % of the operations twice: ..`.
    pub fn text(&self) -> String {
        if self.again.is_empty() {
            return format!("nothing of {} parts", self.parts);
        }
        let names: Vec<&str> = self.again.iter().map(|p| p.name.as_str()).collect();
        let share = 100.0 * self.flops.0 as f64 / (self.flops.1 as f64).max(1.0);
        format!("{} of {} parts, {share:.1} % of the operations twice: {}", names.len(), self.parts, names.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn bytes_have_units() {
        let good = [("4G", 4 << 30), ("1.5GiB", 3 << 29), ("800M", 800 << 20), ("2kb", 2048), ("77", 77)];
        good.iter().for_each(|(text, bytes)| assert_eq!(parse_bytes(text), Ok(*bytes), "{text}"));
        ["", "G", "-1G", "0", "x", "1T", "inf", "1e30G"].iter().for_each(|t| assert!(parse_bytes(t).is_err(), "{t}"));
    }
}
