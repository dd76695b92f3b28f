//! How speed is measured: short bursts of every case in turn, the median of the best third of the bursts of each.
//!
//! Machines drift; cases that are compared are interleaved, so drift reaches all of them alike. On a shared machine most bursts of two
//! threads are disturbed, and a median of all would tell how often; peaks and cases are treated alike.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use chimera_codegen::Target;
use chimera_runtime::exec::ExecOptions;

use crate::row::Row;

/// Work against time.
#[allow(missing_debug_implementations, reason = "holds callbacks")]
pub struct Case {
    /// Identifier of the row.
    pub id: String,
    /// Unit of the row: of `work` by second.
    pub unit: &'static str,
    /// Work of one run.
    pub work: f64,
    /// What the run costs at best: rows with peaks, and how much of their work one run takes.
    pub floor: Vec<(&'static str, f64)>,
    /// The row it is compared with.
    pub peer: Option<String>,
    /// Runs before every burst, untimed.
    pub start: Box<dyn FnMut() -> Result<()>>,
    /// One run.
    pub run: Box<dyn FnMut() -> Result<()>>,
}

/// On what to measure, and by which clock.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Threads that execute.
    pub threads: usize,
    /// The machine to generate code for.
    pub target: Target,
    /// Processor time of the one thread in place of elapsed time.
    pub processor_time: bool,
}

impl Setup {
    /// How plans are executed on a number of threads.
    pub fn options(&self, threads: usize) -> ExecOptions {
        ExecOptions { threads, target: self.target, ..ExecOptions::default() }
    }

    /// A number of threads that is not the measured one.
    pub fn other(&self) -> usize {
        if self.threads == 1 { 2 } else { 1 }
    }

    /// The time now, from some point on.
    pub fn now(&self) -> Duration {
        if !self.processor_time {
            static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
            return START.elapsed();
        }
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    }
}

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Bursts of each case.
    pub rounds: usize,
    /// Least time of a burst; it has at least one run.
    pub burst: Duration,
}

/// The middle of some numbers; the lower one of two.
pub fn median(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(f64::total_cmp);
    xs.get(xs.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// The middle of the largest third of some numbers.
fn typical(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(|a, b| b.total_cmp(a));
    xs.truncate(xs.len().div_ceil(3));
    median(xs)
}

/// Work by second of one burst.
fn burst(case: &mut Case, least: Duration, setup: &Setup) -> Result<f64> {
    (case.start)()?;
    let (start, mut runs) = (setup.now(), 0u32);
    loop {
        (case.run)()?;
        runs += 1;
        let elapsed = setup.now() - start;
        if elapsed >= least {
            return Ok(case.work * f64::from(runs) / elapsed.as_secs_f64());
        }
    }
}

/// Measure all cases, which have run before, interleaved; `progress` hears what is done.
///
/// # Errors
/// When a case fails, or names a row that is not among the cases.
pub fn measure(cases: &mut [Case], effort: Effort, setup: &Setup, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    let mut samples = vec![vec![]; cases.len()];
    for round in 1..=effort.rounds {
        for (case, samples) in cases.iter_mut().zip(&mut samples) {
            progress(&format!("round {round} of {}: {}", effort.rounds, case.id));
            samples.push(burst(case, effort.burst, setup).with_context(|| case.id.clone())?);
        }
    }
    let values: Vec<f64> = samples.into_iter().map(typical).collect();
    let by_id: HashMap<&str, f64> = cases.iter().map(|c| c.id.as_str()).zip(values.iter().copied()).collect();
    ensure!(by_id.len() == cases.len(), "two cases have the same identifier");
    let find = |id: &str| by_id.get(id).copied().with_context(|| format!("no row is called {id}"));
    cases
        .iter()
        .zip(&values)
        .map(|(case, &value)| {
            let mut row = Row::plain(&case.id, value, case.unit, setup.threads);
            if !case.floor.is_empty() {
                let seconds: f64 = case.floor.iter().map(|(id, work)| Ok(work / find(id)?)).sum::<Result<f64>>()?;
                let peak = case.work / seconds;
                (row.peak, row.share) = (Some(peak), Some(value / peak));
            }
            if let Some(id) = &case.peer {
                let peer = find(id)?;
                (row.peer, row.ratio) = (Some(peer), Some(value / peer));
            }
            Ok(row)
        })
        .collect()
}
