//! Why each kernel is lowered the way it is: the candidates with their times, the chosen one, and who declined to make code for it.
//!
//! Times are of the operation alone, without what is fused to it.

use std::fmt;

use chimera_codegen::emitters;
use chimera_ir::{Op, loops::Kernel, plan::Plan};
use serde::Serialize;

use super::table::Table;
use crate::tuning::{Reason, Tuning, predict};

/// One way of lowering a kernel.
#[derive(Clone, Debug, Serialize)]
pub struct CandidateRow {
    /// Its parameters.
    pub variant: String,
    /// Predicted microseconds.
    pub predicted_us: f64,
    /// Measured microseconds, if the table has them.
    pub measured_us: Option<f64>,
    /// Whether the plan has it.
    pub chosen: bool,
}

/// The choice for one kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// Index in the plan.
    pub index: usize,
    /// Name.
    pub name: String,
    /// What it computes, if it says so.
    pub contract: Option<String>,
    /// The chosen variant; empty when there is one way only.
    pub variant: String,
    /// Why.
    pub reason: &'static str,
    /// All ways, by measured and then predicted time; empty when there is one only.
    pub candidates: Vec<CandidateRow>,
    /// The emitter that serves it; none when all refuse.
    pub emitter: Option<&'static str>,
    /// More specific emitters, and why they do not.
    pub refusals: Vec<(&'static str, String)>,
}

/// The choices for all kernels of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct WhyReport {
    /// The target.
    pub target: String,
    /// Threads that times are for.
    pub threads: usize,
    /// Where measured times come from: processor and date.
    pub table: Option<String>,
    /// One for each kernel, in the order of the plan.
    pub kernels: Vec<Choice>,
}

/// Why the kernels of a plan are what they are, in the eyes of `tuning`.
pub fn why(plan: &Plan, tuning: &Tuning) -> WhyReport {
    let table = tuning.table.as_ref().map(|t| format!("{}, {} threads, {}", t.processor, t.threads, t.date));
    WhyReport {
        target: tuning.target.to_string(),
        threads: tuning.threads,
        table,
        kernels: plan.kernels.iter().enumerate().map(|(i, k)| choice(i, k, tuning)).collect(),
    }
}

fn choice(index: usize, k: &Kernel, tuning: &Tuning) -> Choice {
    let variant = k.variant.to_string();
    let known = k.contract.as_ref().and_then(Op::of_contract);
    let contract = k.contract.as_ref().map(ToString::to_string);
    let entry = tuning.table.as_ref().zip(contract.as_deref()).and_then(|(t, c)| t.entry(c));
    let (mut candidates, mut reason) = (vec![], Reason::Only.text());
    if let Some((op, ins)) = known {
        let all = op.variants(&ins);
        let row = |v: &chimera_ir::loops::Variant| CandidateRow {
            variant: v.to_string(),
            predicted_us: predict(&op.work(&ins, v), &tuning.target, tuning.threads) * 1e6,
            measured_us: entry
                .and_then(|e| e.candidates.iter().find(|c| c.variant == v.to_string()))
                .map(|c| c.measured),
            chosen: *v == k.variant,
        };
        if all.len() > 1 {
            candidates = all.iter().map(row).collect();
            let key = |c: &CandidateRow| (c.measured_us.unwrap_or(f64::MAX), c.predicted_us);
            candidates.sort_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal));
            let (now, why) = tuning.choose(&op, &ins);
            reason =
                if now == k.variant { why.text() } else { "chosen when the plan was made, by another table or model" };
        }
    }
    let (mut emitter, mut refusals) = (None, vec![]);
    for e in emitters() {
        match e.accepts(k, &tuning.target) {
            Ok(()) => {
                emitter = Some(e.name());
                break;
            }
            Err(why) => refusals.push((e.name(), why.to_string())),
        }
    }
    Choice { index, name: k.name.clone(), contract, variant, reason, candidates, emitter, refusals }
}

/// The number of candidates that the short form shows.
const SHOWN: usize = 5;

impl fmt::Display for WhyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let several = self.kernels.iter().filter(|k| !k.candidates.is_empty()).count();
        let from = self.table.as_deref().unwrap_or("the cost model");
        writeln!(f, "{} kernels for {}, {several} with variants; times from {from}", self.kernels.len(), self.target)?;
        for k in &self.kernels {
            let emitter = k.emitter.unwrap_or("no emitter");
            if !k.candidates.is_empty() {
                writeln!(f, "\nkernel {} {} by {emitter}", k.index, k.name)?;
                if let Some(c) = &k.contract {
                    writeln!(f, "  {c}")?;
                }
                writeln!(f, "  chosen {}: {}", k.variant, k.reason)?;
                let shown = if f.alternate() { k.candidates.len() } else { SHOWN };
                let mut table = Table::new(&["measured us", "predicted us", "", "variant"]);
                let rows = k.candidates.iter().enumerate().filter(|(i, c)| *i < shown || c.chosen);
                for (_, c) in rows {
                    let measured = c.measured_us.map_or("-".to_owned(), |x| format!("{x:.1}"));
                    let mark = if c.chosen { "chosen" } else { "" };
                    table.row([measured, format!("{:.1}", c.predicted_us), mark.to_owned(), c.variant.clone()]);
                }
                write!(f, "{table}")?;
                if k.candidates.len() > shown {
                    writeln!(f, "  of {} candidates; all with --verbose", k.candidates.len())?;
                }
            } else if !k.refusals.is_empty() {
                writeln!(f, "\nkernel {} {} by {emitter}: {}", k.index, k.name, k.reason)?;
            }
            k.refusals.iter().try_for_each(|(name, why)| writeln!(f, "  {name} refused: {why}"))?;
        }
        Ok(())
    }
}
