//! Measuring the variants of the kernels of a plan.
//!
//! Short bursts of all variants in turn, so that drift of the machine reaches all alike; what has fallen far behind is left out of
//! later rounds, and the time of a variant is the median of the best third of its bursts.

use std::collections::HashSet;
use std::fmt;
use std::time::{Duration, Instant};

use chimera_codegen::{Allowed, Target, Trial, TrialError};
use chimera_ir::{
    Data, Op, Type,
    loops::Kernel,
    lower::{Argument, Cluster},
    ops::{Axis, InferError},
    plan::Plan,
};

use super::{Candidate, Entry, Table, Tuning, predict};

/// The least time of a burst.
const BURST: Duration = Duration::from_micros(1000);
/// Rounds of bursts at most.
const ROUNDS: usize = 16;
/// Bursts after which a variant may be given up: one alone may have been disturbed.
const SURE: usize = 3;
/// Variants slower than the best by this factor take no part in later rounds.
const BEHIND: f64 = 1.25;
/// Weights come from memory when all copies of them together have so many bytes.
const COLD: usize = 64 << 20;
/// Copies of weights at most.
const COPIES: usize = 64;

/// An operation with more than one variant.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What is computed.
    pub contract: String,
    /// The operation.
    pub op: Op,
    /// Its operand types.
    pub ins: Vec<Type>,
}

/// How far tuning has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Operations that are done, and all of them.
    pub done: usize,
    /// All operations.
    pub all: usize,
    /// The one in work, or that was done last.
    pub contract: &'a str,
    /// Bursts so far.
    pub bursts: u64,
    /// Time spent.
    pub elapsed: Duration,
}

/// Why an operation cannot be measured.
#[derive(Debug)]
pub enum TuneError {
    /// The operation refuses its operands.
    Infer(InferError),
    /// A kernel cannot be tried.
    Trial(String, TrialError),
}

impl fmt::Display for TuneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TuneError::Infer(e) => e.fmt(f),
            TuneError::Trial(contract, e) => write!(f, "{contract}: {e}"),
        }
    }
}

impl std::error::Error for TuneError {}

/// The distinct operations of a plan that have more than one variant, in the order of its kernels.
pub fn subjects(plan: &Plan) -> Vec<Subject> {
    let mut seen = HashSet::new();
    let contracts = plan.kernels.iter().filter_map(|k| k.contract.as_ref());
    let subject = |c: &chimera_ir::loops::Contract| {
        let (op, ins) = Op::of_contract(c)?;
        (op.variants(&ins).len() > 1).then(|| Subject { contract: c.to_string(), op, ins })
    };
    contracts.filter(|c| seen.insert(c.to_string())).filter_map(subject).collect()
}

/// Measure all variants of the subjects for `target`, on `threads` workers, within about `seconds`. `go_on` sees every round and ends
/// the work by `false`; the table then has what was measured completely.
///
/// # Errors
/// When a kernel cannot be compiled or run here.
pub fn tune(
    subjects: &[Subject],
    target: &Target,
    threads: usize,
    seconds: f64,
    go_on: &mut dyn FnMut(Progress<'_>) -> bool,
) -> Result<Table, TuneError> {
    let start = Instant::now();
    let mut table = Table::new(&target.to_string(), threads);
    let mut bursts = 0;
    for (done, subject) in subjects.iter().enumerate() {
        let left = (seconds - start.elapsed().as_secs_f64()).max(0.0);
        let until = Instant::now() + Duration::from_secs_f64(left / (subjects.len() - done) as f64);
        let mut see = |done, n| {
            bursts += n;
            let progress =
                Progress { done, all: subjects.len(), contract: &subject.contract, bursts, elapsed: start.elapsed() };
            go_on(progress)
        };
        let Some(entry) = measure(subject, target, threads, until, &mut |n| see(done, n))? else { break };
        table.add(entry);
        if !see(done + 1, 0) {
            break;
        }
    }
    Ok(table)
}

/// The kernels of all variants.
fn kernels(subject: &Subject) -> Result<(Cluster, Vec<Kernel>), TuneError> {
    let cluster = Cluster::single(subject.op.clone(), &subject.ins).map_err(TuneError::Infer)?;
    let lower = |v| cluster.with_variant(v).lower();
    let kernels = subject.op.variants(&subject.ins).iter().map(lower).collect();
    Ok((cluster, kernels))
}

/// A fixed sequence of numbers in (-1, 1).
fn sequence() -> impl FnMut() -> f32 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        2.0 * ((state >> 40) as f32 / (1u64 << 24) as f32) - 1.0
    }
}

/// The variants of one operation; `None` when `go_on` ends the work.
fn measure(
    subject: &Subject,
    target: &Target,
    threads: usize,
    until: Instant,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<Option<Entry>, TuneError> {
    let (cluster, kernels) = kernels(subject)?;
    let mut random = sequence();
    let contents: Vec<Data> = (cluster.arguments().iter())
        .map(|a| match *a {
            Argument::Input(k) => subject.op.typical_input(k, &subject.ins, &mut random).data,
            Argument::Output(o) => {
                let ty = &cluster.nodes[cluster.anchor].outs[cluster.outputs[o].1];
                Data::zeros(ty.dtype, ty.numel())
            }
        })
        .collect();
    let axes = subject.op.axes(&subject.ins);
    let weights: Vec<usize> = (0..axes.len()).filter(|&k| matches!(axes[k], Axis::Weight { .. })).collect();
    let bytes: usize = weights.iter().map(|&k| subject.ins[k].bytes()).sum();
    let copies = COLD.div_ceil(bytes.max(1)).clamp(1, COPIES);
    let mut trial = Trial::new(&kernels, target, &Allowed::all(), &contents, (&weights, copies), threads)
        .map_err(|e| TuneError::Trial(subject.contract.clone(), e))?;
    let mut times: Vec<Vec<f64>> = vec![vec![]; kernels.len()];
    let mut repeats = vec![1; kernels.len()];
    for round in 0..ROUNDS {
        let best = times.iter().map(|t| typical(t)).fold(f64::INFINITY, f64::min);
        for (which, times) in times.iter_mut().enumerate() {
            if times.len() >= SURE && typical(times) > best * BEHIND {
                continue;
            }
            let n = repeats[which];
            let each = trial.time(which, threads, n).as_secs_f64() / n as f64;
            if round == 0 {
                // The first burst warms up and says how many runs make one.
                repeats[which] = ((BURST.as_secs_f64() / each.max(1e-9)).ceil() as usize).clamp(1, 10_000);
            } else {
                times.push(each);
            }
            if !go_on(1) {
                return Ok(None);
            }
        }
        if round > SURE && Instant::now() >= until {
            break;
        }
    }
    Ok(Some(entry(subject, target, threads, &times)))
}

/// The median of the best third; infinite when there is nothing yet.
fn typical(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().div_ceil(3).saturating_sub(1) / 2).copied().unwrap_or(f64::INFINITY)
}

fn entry(subject: &Subject, target: &Target, threads: usize, times: &[Vec<f64>]) -> Entry {
    let (op, ins) = (&subject.op, &subject.ins);
    let all = op.variants(ins);
    let measured: Vec<f64> = times.iter().map(|t| typical(t) * 1e6).collect();
    let candidate = |(i, v): (usize, &chimera_ir::loops::Variant)| Candidate {
        variant: v.to_string(),
        measured: measured[i],
        predicted: predict(&op.work(ins, v), target, threads) * 1e6,
    };
    let candidates: Vec<Candidate> = all.iter().enumerate().map(candidate).collect();
    let best = (0..all.len()).min_by(|&a, &b| measured[a].total_cmp(&measured[b])).unwrap_or(0);
    let model = Tuning { table: None, target: *target, threads }.least(op, ins, &all);
    Entry {
        contract: subject.contract.clone(),
        chosen: candidates[best].variant.clone(),
        model: candidates[model].variant.clone(),
        regret: measured[model] / measured[best] - 1.0,
        candidates,
    }
}
