//! A record of what ran when, on which thread, and what each kernel took.
//!
//! Memory is there before the first call: calls are recorded whole until the next one might not fit, totals go on to the end.

use super::program::{Action, Flat};
use super::work::{Work, work};
use super::{EntryId, Executable};
use chimera_ir::plan::{Plan, Step};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One step, or one worker's part of it.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// Index into the calls.
    call: u32,
    step: u32,
    iteration: u32,
    /// Share of the step's grid.
    part: f32,
    /// Since the start of the trace.
    begin: Duration,
    end: Duration,
}

/// One run of an entry point.
#[derive(Clone, Copy, Debug)]
struct Call {
    entry: usize,
    begin: Duration,
    end: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Total {
    runs: u64,
    time: Duration,
}

/// A trace of an executable, see [`Executable::start_trace`].
#[derive(Debug)]
pub struct Trace {
    start: Instant,
    /// Most spans of a thread.
    limit: usize,
    /// Steps that a call of each entry point takes at most.
    most: Vec<usize>,
    /// One for each thread; only that thread writes.
    threads: Vec<Mutex<Vec<Span>>>,
    calls: Vec<Call>,
    /// Of each step of each entry point, over all calls.
    totals: Vec<Vec<Total>>,
    /// Whether the open call is recorded.
    recording: bool,
    left_out: u64,
}

fn lock(spans: &Mutex<Vec<Span>>) -> MutexGuard<'_, Vec<Span>> {
    spans.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Steps that a walk takes at most.
fn most_steps(flat: &Flat) -> usize {
    let (mut total, mut times) = (0usize, 1);
    for op in &flat.ops {
        if let Action::Begin { max, .. } = op {
            total += 1;
            times = *max;
            continue;
        }
        total = total.saturating_add(times);
        if let Action::End { .. } = op {
            times = 1;
        }
    }
    total
}

impl Executable {
    /// From now on, time every step of every call, and record the spans of the first calls: at most `steps` steps.
    pub fn start_trace(&mut self, steps: usize) {
        let spans = |_| Mutex::new(Vec::with_capacity(steps));
        let most: Vec<usize> = self.entries.iter().map(most_steps).collect();
        let fewest = most.iter().copied().min().unwrap_or(1).max(1);
        self.trace = Some(Box::new(Trace {
            start: Instant::now(),
            limit: steps,
            most,
            threads: (0..self.threads()).map(spans).collect(),
            calls: Vec::with_capacity(steps / fewest),
            totals: self.entries.iter().map(|e| vec![Total::default(); e.ops.len()]).collect(),
            recording: false,
            left_out: 0,
        }));
    }

    /// End the trace and give it away; none if none was started.
    pub fn end_trace(&mut self) -> Option<Trace> {
        self.trace.take().map(|t| *t)
    }
}

impl Trace {
    /// The time since the start.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// A call begins.
    pub(super) fn begin(&mut self, entry: EntryId) {
        let used = lock(&self.threads[0]).len();
        // A call is recorded whole or not at all, and none behind one that was not.
        self.recording = self.left_out == 0
            && used.saturating_add(self.most[entry.0]) <= self.limit
            && self.calls.len() < self.calls.capacity();
        match self.recording {
            true => self.calls.push(Call { entry: entry.0, begin: self.now(), end: Duration::ZERO }),
            false => self.left_out += 1,
        }
    }

    /// The call has ended.
    pub(super) fn end(&mut self) {
        let now = self.now();
        if let Some(call) = self.calls.last_mut().filter(|_| self.recording) {
            call.end = now;
        }
    }

    /// A worker has done its part of a step, which began at `begin`.
    pub(super) fn span(&self, worker: usize, step: usize, iteration: usize, part: f32, begin: Duration) {
        if !self.recording {
            return;
        }
        let call = self.calls.len() as u32 - 1;
        let (step, iteration) = (step as u32, iteration as u32);
        let mut spans = lock(&self.threads[worker]);
        if spans.len() < self.limit {
            spans.push(Span { call, step, iteration, part, begin, end: self.now() });
        }
    }

    /// A step is done on all threads.
    pub(super) fn step(&mut self, entry: EntryId, step: usize, begin: Duration) {
        let now = self.now();
        let total = &mut self.totals[entry.0][step];
        total.runs += 1;
        total.time += now - begin;
    }

    /// Calls that were recorded, and calls behind them that were not.
    pub fn calls(&self) -> (usize, u64) {
        (self.calls.len(), self.left_out)
    }

    /// Write the spans in the format of Chrome's trace viewer and Perfetto: a call of an entry point spans its steps on thread 0, a step
    /// is on every thread that had a part of it. Times are in microseconds; work is that of the part.
    ///
    /// # Errors
    /// When `out` fails.
    pub fn write(&self, plan: &Plan, out: &mut dyn Write) -> io::Result<()> {
        let works: Vec<Work> = plan.kernels.iter().map(work).collect();
        let (recorded, left_out) = self.calls();
        let about = json!({"calls": recorded, "calls_left_out": left_out, "threads": self.threads.len()});
        write!(out, "{{\"displayTimeUnit\":\"ns\",\"otherData\":{about},\"traceEvents\":[")?;
        let meta = |name: &str, thread: usize, value: String| {
            let args = json!({"name": value});
            json!({"name": name, "ph": "M", "pid": 1, "tid": thread, "args": args})
        };
        write!(out, "\n{}", meta("process_name", 0, "chimera".into()))?;
        for thread in 0..self.threads.len() {
            write!(out, ",\n{}", meta("thread_name", thread, format!("worker {thread}")))?;
        }
        for call in &self.calls {
            let args = json!({});
            write!(out, ",\n{}", event(&plan.entries[call.entry].name, "call", 0, call.begin, call.end, args))?;
        }
        for (thread, spans) in self.threads.iter().enumerate() {
            for span in &*lock(spans) {
                let entry = &plan.entries[self.calls[span.call as usize].entry];
                let step = &entry.steps[span.step as usize];
                let mut args = json!({"entry": entry.name, "step": span.step, "iteration": span.iteration});
                if let Step::Run { kernel, group, .. } = step {
                    let part = works[kernel.0 as usize] * f64::from(span.part);
                    args["group"] = entry.groups.get(*group as usize).map_or("", |g| &g.name).into();
                    args["flops"] = (part.flops.round() as u64).into();
                    args["ternary_macs"] = (part.ternary.round() as u64).into();
                    args["bytes"] = (part.bytes.round() as u64).into();
                }
                write!(out, ",\n{}", event(name(plan, step), "step", thread, span.begin, span.end, args))?;
            }
        }
        writeln!(out, "\n]}}")
    }

    /// What every kernel took over all calls, by descending time.
    pub fn roofline(&self, plan: &Plan) -> Roofline {
        let mut kernels: BTreeMap<(usize, &str), KernelTime> = BTreeMap::new();
        for (e, (entry, totals)) in plan.entries.iter().zip(&self.totals).enumerate() {
            for (step, total) in entry.steps.iter().zip(totals).filter(|(_, t)| t.runs > 0) {
                let name = name(plan, step);
                let cost = match step {
                    Step::Run { kernel, .. } => work(&plan.kernels[kernel.0 as usize]),
                    Step::Copy { from, .. } => {
                        Work { bytes: 2.0 * plan.buffer(*from).ty.bytes() as f64, ..Work::default() }
                    }
                    Step::LoopBegin { .. } | Step::LoopEnd { .. } => Work::default(),
                };
                let row = kernels.entry((e, name)).or_insert_with(|| KernelTime {
                    entry: entry.name.clone(),
                    kernel: name.to_owned(),
                    runs: 0,
                    time: Duration::ZERO,
                    work: Work::default(),
                });
                row.runs += total.runs;
                row.time += total.time;
                row.work = row.work + cost * total.runs as f64;
            }
        }
        let mut kernels: Vec<KernelTime> = kernels.into_values().collect();
        kernels.sort_by_key(|k| std::cmp::Reverse(k.time));
        Roofline { kernels }
    }
}

/// What people call a step.
fn name<'a>(plan: &'a Plan, step: &Step) -> &'a str {
    match step {
        Step::Run { kernel, .. } => &plan.kernels[kernel.0 as usize].name,
        Step::Copy { .. } => "copy",
        Step::LoopBegin { .. } => "loop begin",
        Step::LoopEnd { .. } => "loop end",
    }
}

fn event(name: &str, kind: &str, thread: usize, begin: Duration, end: Duration, args: Value) -> Value {
    let us = |t: Duration| t.as_nanos() as f64 / 1e3;
    let dur = us(end.saturating_sub(begin));
    json!({"name": name, "cat": kind, "ph": "X", "ts": us(begin), "dur": dur, "pid": 1, "tid": thread, "args": args})
}

/// All runs of one kernel in one entry point.
#[derive(Clone, Debug)]
pub struct KernelTime {
    /// Entry point.
    pub entry: String,
    /// Name of the kernel; copies and loops of the plan have names too.
    pub kernel: String,
    /// Runs.
    pub runs: u64,
    /// Wall time of all runs together.
    pub time: Duration,
    /// Work of all runs together.
    pub work: Work,
}

/// Kernels by time. As text: a table with the rates at which each one works.
#[derive(Clone, Debug)]
pub struct Roofline {
    /// By descending time.
    pub kernels: Vec<KernelTime>,
}

/// Lines of the table; what is left is summed up in one more.
const LINES: usize = 40;

impl Roofline {
    /// The time of all kernels.
    pub fn time(&self) -> Duration {
        self.kernels.iter().map(|k| k.time).sum()
    }
}

impl fmt::Display for Roofline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.time().as_secs_f64();
        writeln!(f, " share     time ms     runs  GMAC/s GFLOP/s    GB/s  entry      kernel")?;
        let mut line = |runs: u64, time: Duration, work: Work, entry: &str, kernel: &str| {
            let seconds = time.as_secs_f64();
            let rate = |amount: f64| match amount > 0.0 && seconds > 0.0 {
                true => format!("{:.2}", amount / seconds * 1e-9),
                false => "-".to_owned(),
            };
            let share = if total > 0.0 { 100.0 * seconds / total } else { 0.0 };
            let (macs, flops, bytes) = (rate(work.ternary), rate(work.flops), rate(work.bytes));
            let ms = 1e3 * seconds;
            writeln!(f, "{share:5.1}%  {ms:10.3} {runs:8} {macs:>7} {flops:>7} {bytes:>7}  {entry:10} {kernel}")
        };
        for k in self.kernels.iter().take(LINES) {
            line(k.runs, k.time, k.work, &k.entry, &k.kernel)?;
        }
        let rest = self.kernels.get(LINES..).unwrap_or_default();
        if !rest.is_empty() {
            let sum = |all: &[KernelTime]| all.iter().fold(Work::default(), |sum, k| sum + k.work);
            let (runs, time) = (rest.iter().map(|k| k.runs).sum(), rest.iter().map(|k| k.time).sum());
            line(runs, time, sum(rest), "", &format!("{} others", rest.len()))?;
        }
        Ok(())
    }
}
