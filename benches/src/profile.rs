//! Where the time of an entry point goes, kernel by kernel, beside what the peaks of the same run allow.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chimera_frontends::config::Scale;
use chimera_runtime::exec::{KernelTime, Work};

use crate::measure::{Effort, Setup, measure};
use crate::model::{self, Single};
use crate::peaks::{self, DRAM, FMA, TERNARY};

/// Time that is profiled.
const QUICK: Duration = Duration::from_millis(500);
const FULL: Duration = Duration::from_secs(5);
/// Kernels of the table.
const LINES: usize = 30;

/// The peaks of this run, by identifier.
type Peaks = [(&'static str, f64); 3];

/// The peak that leaves work the most time, and that time in seconds.
fn bound(work: Work, peaks: &Peaks) -> (&'static str, f64) {
    let amounts = [work.ternary, work.flops, work.bytes];
    let floors = peaks.iter().zip(amounts).map(|(&(id, peak), amount)| (id, amount * 1e-9 / peak));
    floors.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((FMA, 0.0))
}

/// A line of the table; `bounded` is the peak that binds and the time that it leaves.
fn line(out: &mut String, kernel: &str, runs: f64, times: [Duration; 2], work: Work, bounded: (&str, f64)) {
    let [time, total] = times;
    let seconds = time.as_secs_f64();
    let rate = |amount: f64| if amount > 0.0 { format!("{:.2}", amount / seconds * 1e-9) } else { "-".to_owned() };
    let [macs, flops, bytes] = [work.ternary, work.flops, work.bytes].map(rate);
    let (peak, floor) = bounded;
    let (share, reached) = (100.0 * seconds / total.as_secs_f64(), 100.0 * floor / seconds);
    let _ = writeln!(
        out,
        "{share:5.1}% {:9.3} {runs:7.0} {macs:>8} {flops:>8} {bytes:>7} {reached:6.1}% of {peak:12}  {kernel}",
        1e3 * seconds
    );
}

/// The profile of an entry point of a model at that scale, as text: peaks first.
///
/// # Errors
/// When it cannot be compiled or run, or gives a wrong answer.
pub fn run(scale: Scale, single: Single, setup: &Setup, quick: bool, progress: &mut dyn FnMut(&str)) -> Result<String> {
    progress("peaks");
    let effort = Effort { rounds: 5, burst: peaks::BURST };
    let rows = measure(&mut peaks::cases(setup)?, effort, setup, progress)?;
    let find = |id: &'static str| {
        let row = rows.iter().find(|r| r.id == id).with_context(|| format!("no row is called {id}"))?;
        anyhow::Ok((id, row.value))
    };
    let peaks = [find(TERNARY)?, find(FMA)?, find(DRAM)?];
    let mut exe = model::alone(scale, single, setup, progress)?;
    exe.run(single.name())?;
    progress("profile");
    // Totals only, no spans.
    exe.start_trace(0);
    let (start, mut runs) = (Instant::now(), 0);
    while runs == 0 || start.elapsed() < if quick { QUICK } else { FULL } {
        exe.run(single.name())?;
        runs += 1;
    }
    let trace = exe.end_trace().context("a trace was started")?;
    let table = trace.roofline(exe.plan());
    let mut out = String::new();
    for row in &rows {
        let _ = writeln!(out, "{:12} {:8.2} {}", row.id, row.value, row.unit);
    }
    let n = f64::from(runs);
    let total = table.time().div_f64(n);
    let floors = |kernels: &[KernelTime]| kernels.iter().map(|k| bound(k.work, &peaks).1).sum::<f64>() / n;
    let _ = writeln!(out, "{}.{scale}, {} threads, mean of {runs} runs", single.name(), setup.threads);
    let _ = writeln!(out, " share   time ms    runs   GMAC/s  GFLOP/s    GB/s reached of peak          kernel");
    for k in table.kernels.iter().take(LINES) {
        let work = k.work * (1.0 / n);
        line(&mut out, &k.kernel, k.runs as f64 / n, [k.time.div_f64(n), total], work, bound(work, &peaks));
    }
    let mut rest = |name: &str, kernels: &[KernelTime]| {
        let time = kernels.iter().map(|k| k.time).sum::<Duration>().div_f64(n);
        let runs = kernels.iter().map(|k| k.runs as f64).sum::<f64>() / n;
        line(&mut out, name, runs, [time, total], sum(kernels, n), ("each", floors(kernels)));
    };
    if let Some(others) = table.kernels.get(LINES..).filter(|r| !r.is_empty()) {
        rest(&format!("{} others", others.len()), others);
    }
    rest("all", &table.kernels);
    Ok(out)
}

/// The work of one run.
fn sum(kernels: &[KernelTime], runs: f64) -> Work {
    kernels.iter().fold(Work::default(), |sum, k| sum + k.work) * (1.0 / runs)
}
