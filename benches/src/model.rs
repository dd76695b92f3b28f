//! Entry points of the plans of whole models, and what it takes to get there.
//!
//! Before it is timed, every entry point has given the same bits with one thread and with several. Vocabularies are restricted to 8192.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use chimera_codegen::Allowed;
use chimera_compiler::{Descent, EntryKind, EntrySpec, Options, PerSequence, Scheme, StateForm, UpdateRule, compile};
use chimera_frontends::config::{Overrides, Scale, preset};
use chimera_ir::DType;
use chimera_ir::ops::DescentRule;
use chimera_ir::plan::{Plan, WeightKind};
use chimera_runtime::exec::{ExecOptions, Executable, Work};
use chimera_runtime::text::Batch;
use chimera_runtime::train::{Trainer, init};
use clap::ValueEnum;

use crate::machine;
use crate::measure::{Case, Effort, Setup, measure, median};
use crate::peaks::{self, FMA, TERNARY};
use crate::row::Row;
use crate::stack;

/// A model and the shapes of its entry points.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// The model.
    pub scale: Scale,
    /// Sequences of a batch.
    pub rows: usize,
    /// Tokens of a sequence, and of a chunk of a prompt.
    pub tokens: usize,
    /// Whether all entry points are measured, or the dual forward alone.
    pub whole: bool,
}

const WORKLOADS: [Workload; 3] = [
    Workload { scale: Scale::Nano, rows: 8, tokens: 128, whole: true },
    Workload { scale: Scale::Tiny, rows: 2, tokens: 128, whole: true },
    Workload { scale: Scale::Small, rows: 1, tokens: 128, whole: false },
];

/// Tokens of the vocabulary.
pub const VOCAB: usize = 8192;
/// The entry point with all probes.
const DUAL: &str = "dual_loss";

/// Seed of weights and probes.
pub const SEED: u64 = 1;
/// Small, so that the weights stay those of a model that has just begun.
const LR: f64 = 1e-6;
/// Tokens that are decoded when answers are compared.
const DECODED: usize = 3;
const MIB: f64 = (1u64 << 20) as f64;

fn scheme() -> Scheme {
    Scheme::PerSequence(PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 })
}

/// Milliseconds of each of some runs.
fn milliseconds<T>(times: usize, mut f: impl FnMut() -> Result<T>) -> Result<(T, f64)> {
    let mut all = vec![];
    loop {
        let start = Instant::now();
        let result = f()?;
        all.push(start.elapsed().as_secs_f64() * 1e3);
        if all.len() >= times {
            return Ok((result, median(all)));
        }
    }
}

/// What is measured alone, entry by entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Single {
    /// Losses under all probes of a step
    DualLoss,
    /// Cross-entropy of each row
    Loss,
    /// Cross-entropy and its gradient with respect to every weight
    Grad,
    /// The same in training, where the gradient stays for the update
    Backward,
}

impl Single {
    fn kind(self) -> EntryKind {
        match self {
            Single::DualLoss => EntryKind::DualLoss(scheme()),
            Single::Loss => EntryKind::Loss,
            Single::Grad => EntryKind::Grad,
            Single::Backward => EntryKind::Backward { accumulate: false },
        }
    }

    /// The name of the entry point.
    pub fn name(self) -> &'static str {
        self.kind().name()
    }
}

/// A plan of one entry point, or of all, and the rows that its making gave.
fn plan_of(w: &Workload, single: Option<Single>, setup: &Setup, times: usize, rows: &mut Vec<Row>) -> Result<Plan> {
    let model = preset(w.scale, &Overrides { vocab_size: Some(VOCAB), ..Overrides::default() })?.model;
    let balance = model.moe.as_ref().map_or(0.0, |moe| moe.bias_update_rate as f32);
    let rule = UpdateRule { balance, ..UpdateRule::default() };
    let spec = |kind, rows, tokens| EntrySpec { kind, rows, tokens, depth: None };
    let mut entries = vec![spec(single.unwrap_or(Single::DualLoss).kind(), w.rows, w.tokens)];
    if w.whole && single.is_none() {
        entries.extend([
            spec(EntryKind::Loss, w.rows, w.tokens),
            spec(EntryKind::Update(scheme(), rule), w.rows, w.tokens),
            spec(EntryKind::Prefill, 1, w.tokens),
            spec(EntryKind::Decode, 1, 1),
        ]);
    }
    let options = Options { target: setup.target.to_string(), entries, ..Options::default() };
    let (plan, ms) = milliseconds(times, || Ok(compile(&model, &options)?))?;
    rows.push(Row::plain(format!("compile.{}", w.scale), ms, "ms", 1));
    let emit = || Ok(chimera_codegen::compile(&plan.kernels, &setup.target, &Allowed::all())?);
    let (module, ms) = milliseconds(times, emit)?;
    // Emission uses all cores, whatever the number of threads that execute.
    rows.push(Row::plain(
        format!("jit.{}", w.scale),
        ms,
        "ms",
        std::thread::available_parallelism().map_or(1, usize::from),
    ));
    let interpreted = module.kernels.iter().zip(&plan.kernels).find(|(k, _)| k.emitter == "interp");
    ensure!(interpreted.is_none(), "no emitter of machine code serves {:?}", interpreted.map(|(_, k)| &k.name));
    Ok(plan)
}

/// Tokens without structure, in one document a row.
pub fn batch(w: &Workload) -> Batch {
    let (rows, seq) = (w.rows, w.tokens);
    let token = |i: usize| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % VOCAB;
    let all = |shift: usize| (0..rows * seq).map(|i| token(i + shift) as i32).collect();
    Batch { batch: rows, seq, tokens: all(0), labels: all(1), seg: vec![0; rows * seq], reference: vec![], padding: 0 }
}

/// An executable with initial weights and inputs.
pub fn executable(plan: &Plan, batch: &Batch, options: &ExecOptions) -> Result<Executable> {
    let mut exe = Executable::new(plan.clone(), options)?;
    init::initialise(&mut exe, SEED)?;
    for entry in plan.entries.iter().filter(|e| e.name != "update") {
        for (name, buffer) in &entry.inputs {
            let n = plan.buffer(*buffer).ty.numel();
            let values = match name.as_str() {
                "tokens" => &batch.tokens[..n],
                "seg" => &batch.seg[..n],
                "labels" => &batch.labels[..n],
                "seed" => &[SEED as i32, 0],
                "step" => &[0],
                // Iterations of each row.
                _ => &vec![2; n][..],
            };
            exe.set_input(&*entry.name, name, values)?;
        }
    }
    Ok(exe)
}

/// The bits of all outputs of an entry point, appended.
fn outputs(exe: &Executable, entry: &str, out: &mut Vec<u32>) -> Result<()> {
    let ports = exe.plan().entry(entry).map_or(&[][..], |e| &e.outputs);
    for (name, _) in ports {
        let finite = |all: bool| {
            ensure!(all, "output {name} of {entry} is not finite");
            Ok(())
        };
        match exe.output_type(entry, name)?.dtype {
            DType::F32 => {
                let values = exe.output::<f32>(entry, name)?;
                finite(values.iter().all(|x| x.is_finite()))?;
                out.extend(values.iter().map(|x| x.to_bits()));
            }
            DType::F64 => {
                let values = exe.output::<f64>(entry, name)?;
                finite(values.iter().all(|x| x.is_finite()))?;
                out.extend(values.iter().flat_map(|x| [x.to_bits() as u32, (x.to_bits() >> 32) as u32]));
            }
            _ => out.extend(exe.output::<i32>(entry, name)?.iter().map(|&x| x as u32)),
        }
    }
    Ok(())
}

/// The answers of all forward entry points, as bits.
fn answers(exe: &mut Executable) -> Result<Vec<u32>> {
    let mut out = vec![];
    exe.reset_states();
    for (entry, times) in [(DUAL, 1), ("loss", 1), ("grad", 1), ("backward", 1), ("prefill", 1), ("decode", DECODED)] {
        for _ in 0..if exe.plan().entry(entry).is_some() { times } else { 0 } {
            exe.run(entry)?;
            outputs(exe, entry, &mut out)?;
        }
    }
    Ok(out)
}

/// The losses of one step and the weights behind it, as bits.
pub fn step_answers(trainer: &mut Trainer, batch: &Batch) -> Result<Vec<u32>> {
    let probed = trainer.step(batch, 0, LR)?;
    let mut out: Vec<u32> = probed.plus.iter().chain(&probed.minus).map(|&x| (x as f32).to_bits()).collect();
    for weight in &trainer.exec().plan().weights {
        out.extend(trainer.exec().weight_f32(&weight.name)?.iter().map(|x| x.to_bits()));
    }
    Ok(out)
}

/// A model at that scale with one entry point, checked.
///
/// # Errors
/// When it cannot be compiled or run, or gives a wrong answer.
pub fn alone(scale: Scale, single: Single, setup: &Setup, progress: &mut dyn FnMut(&str)) -> Result<Executable> {
    let known = WORKLOADS.iter().find(|w| w.scale == scale).copied();
    let w = known.unwrap_or(Workload { scale, rows: 1, tokens: 128, whole: false });
    progress(&format!("compile {scale}"));
    let plan = plan_of(&w, Some(single), setup, 1, &mut vec![])?;
    let input = batch(&w);
    progress(&format!("check {scale}"));
    let want = answers(&mut executable(&plan, &input, &setup.options(setup.other()))?)?;
    let mut exe = executable(&plan, &input, &setup.options(setup.threads))?;
    ensure!(answers(&mut exe)? == want, "answers differ between {} and {} threads", setup.threads, setup.other());
    Ok(exe)
}

/// Ternary multiply-accumulates and float operations of one run of an entry point: of the steps that were executed, as often as they
/// were.
pub fn work(exe: &mut Executable, entry: &str) -> Result<[f64; 2]> {
    exe.prepare()?;
    exe.start_trace(0);
    exe.run(entry)?;
    let trace = exe.end_trace().context("a trace was started")?;
    let all = trace.roofline(exe.plan()).kernels.iter().fold(Work::default(), |sum, k| sum + k.work);
    Ok([all.ternary, all.flops])
}

/// What runs entry points: a trainer where the plan can train.
pub enum Session {
    /// Forward passes only.
    Forward(Box<Executable>),
    /// Whole steps.
    Training(Box<Trainer>),
}

impl Session {
    fn exec(&mut self) -> &mut Executable {
        match self {
            Session::Forward(exe) => exe,
            Session::Training(trainer) => trainer.exec_mut(),
        }
    }
}

pub type Shared = Rc<RefCell<Session>>;

/// A case that runs one entry point, from fresh states and current packed weights.
fn case(session: &Shared, entry: &'static str, id: String, unit: &'static str, amount: f64) -> Result<Case> {
    let [ternary, flops] = work(session.borrow_mut().exec(), entry)?;
    let floor = vec![(TERNARY, ternary * 1e-9), (FMA, flops * 1e-9)];
    let (first, second) = (session.clone(), session.clone());
    let start = move || {
        let mut session = first.borrow_mut();
        session.exec().reset_states();
        Ok(session.exec().prepare()?)
    };
    let run = move || Ok(second.borrow_mut().exec().run(entry)?);
    Ok(Case { id, unit, work: amount, floor, peer: None, start: Box::new(start), run: Box::new(run) })
}

/// Multiply-accumulates of one run by work of one run, from the costs of its floor; two float operations count one.
fn macs(case: &Case) -> f64 {
    let cost = |id: &str| case.floor.iter().filter(|f| f.0 == id).map(|f| f.1).sum::<f64>();
    (cost(TERNARY) + cost(FMA) / 2.0) / case.work
}

/// The cases of one model; `rows` receives what is measured once.
fn cases(
    w: &Workload,
    setup: &Setup,
    times: usize,
    rows: &mut Vec<Row>,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Case>> {
    let (name, threads, other) = (w.scale.name(), setup.threads, setup.other());
    progress(&format!("compile {name}"));
    let plan = plan_of(w, None, setup, times, rows)?;
    let input = batch(w);
    let before = machine::resident();
    let mut exe = executable(&plan, &input, &setup.options(threads))?;
    progress(&format!("check {name}"));
    let got = answers(&mut exe)?;
    if let (Some(before), Some(after)) = (before, machine::resident()) {
        rows.push(Row::plain(format!("rss.{name}"), after.saturating_sub(before) as f64 / MIB, "MiB", threads));
    }
    rows.push(Row::plain(format!("memory.{name}"), exe.bytes() as f64 / MIB, "MiB", threads));
    rows.push(Row::plain(format!("arena.{name}"), plan.arena() as f64 / MIB, "MiB", threads));
    let bound = plan.entries.iter().map(|e| e.arena_bound).max().unwrap_or(0);
    rows.push(Row::plain(format!("arena_bound.{name}"), bound as f64 / MIB, "MiB", threads));
    let weights = plan.weights.iter().filter(|x| x.kind != WeightKind::Optimizer);
    let parameters: usize = weights.map(|x| x.ty.numel()).sum();
    rows.push(Row::plain(format!("parameters.{name}"), parameters as f64 * 1e-6, "million", threads));
    let mut again = executable(&plan, &input, &setup.options(other))?;
    let differ = || format!("answers differ between {threads} and {other} threads");
    ensure!(got == answers(&mut again)?, differ());
    let session = match w.whole {
        false => Session::Forward(Box::new(exe)),
        true => {
            let mut trainer = Trainer::new(exe, SEED)?;
            let got = step_answers(&mut trainer, &input)?;
            ensure!(got == step_answers(&mut Trainer::new(again, SEED)?, &input)?, differ());
            Session::Training(Box::new(trainer))
        }
    };
    let session: Shared = Rc::new(RefCell::new(session));
    let tokens = (w.rows * w.tokens) as f64;
    let mut cases = vec![case(&session, DUAL, format!("dual_forward.{name}"), "data token/s", tokens)?];
    if !w.whole {
        return Ok(cases);
    }
    cases.extend([
        case(&session, "loss", format!("loss.{name}"), "token/s", tokens)?,
        case(&session, "update", format!("update.{name}"), "step/s", 1.0)?,
        case(&session, "prefill", format!("prefill.{name}"), "token/s", w.tokens as f64)?,
        case(&session, "decode", format!("decode.{name}"), "token/s", 1.0)?,
    ]);
    cases.push(whole_step(session, input.clone(), format!("step.{name}")));
    progress(&format!("compile {name} for AdamW"));
    let plan = descent_plan(w, setup)?;
    let make = |threads| -> Result<Trainer> {
        let trainer = Trainer::new(executable(&plan, &input, &setup.options(threads))?, SEED)?;
        Ok(trainer)
    };
    let (mut trainer, mut again) = (make(threads)?, make(other)?);
    ensure!(step_answers(&mut trainer, &input)? == step_answers(&mut again, &input)?, differ());
    rows.push(Row::plain(format!("memory.adamw.{name}"), trainer.exec().bytes() as f64 / MIB, "MiB", threads));
    let session: Shared = Rc::new(RefCell::new(Session::Training(Box::new(trainer))));
    cases.push(whole_step(session, input, format!("train.adamw.{name}")));
    Ok(cases)
}

/// A case that takes whole steps.
pub fn whole_step(session: Shared, input: Batch, id: String) -> Case {
    let (mut step, work) = (0, (input.batch * input.seq) as f64);
    let run = move || {
        step += 1;
        match &mut *session.borrow_mut() {
            Session::Training(trainer) => Ok(trainer.step(&input, step, LR).map(drop)?),
            Session::Forward(_) => unreachable!("a whole workload trains"),
        }
    };
    let (start, run) = (Box::new(|| Ok(())), Box::new(run));
    Case { id, unit: "data token/s", work, floor: vec![], peer: None, start, run }
}

/// A plan that trains along gradients, with float activations.
fn descent_plan(w: &Workload, setup: &Setup) -> Result<Plan> {
    let sets = vec![format!("quantization.activation_method={:?}", "none")];
    let model = preset(w.scale, &Overrides { vocab_size: Some(VOCAB), sets, ..Overrides::default() })?.model;
    let balance = model.moe.as_ref().map_or(0.0, |moe| moe.bias_update_rate as f32);
    let rule = DescentRule::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
    let descent = Descent { rule, weight_decay: 0.1, clip: 1.0, state: StateForm::Full, balance };
    let kinds = [EntryKind::Backward { accumulate: false }, EntryKind::Descend(descent), EntryKind::Loss];
    let spec = |kind| EntrySpec { kind, rows: w.rows, tokens: w.tokens, depth: None };
    let entries = kinds.map(spec).to_vec();
    Ok(compile(&model, &Options { target: setup.target.to_string(), entries, ..Options::default() })?)
}

/// Rows that follow from the measured ones: tokens that pass through the model, and multiply-accumulates.
fn derived(cases: &[Case], rows: &[Row]) -> Vec<Row> {
    let passes = scheme().stacked_rows(1) as f64;
    let mut out = vec![];
    for (case, row) in cases.iter().zip(rows) {
        let Some((kind, name)) = case.id.split_once('.') else { continue };
        out.push(row.clone());
        if kind == "dual_forward" {
            let value = row.value * passes;
            let peer = rows.iter().find(|r| r.id == format!("loss.{name}")).map(|r| r.value);
            let ratio = peer.map(|p| value / p);
            out.push(Row {
                peer,
                ratio,
                ..Row::plain(format!("{}.forward", case.id), value, "forward token/s", row.threads)
            });
        }
        if !case.floor.is_empty() && case.unit.ends_with("token/s") {
            let by_token = macs(case);
            let peak = row.peak.map(|p| p * by_token);
            out.push(Row {
                peak,
                share: row.share,
                ..Row::plain(format!("{}.gmac", case.id), row.value * by_token, "GMAC/s", row.threads)
            });
        }
    }
    out
}

/// Measure peaks and models.
///
/// # Errors
/// When a model cannot be compiled or run, or gives a wrong answer.
pub fn run(setup: &Setup, quick: bool, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    let mut once = vec![];
    progress("peaks");
    let mut all = peaks::cases(setup)?;
    let times = if quick { 1 } else { 5 };
    for w in &WORKLOADS {
        all.extend(cases(w, setup, times, &mut once, progress).with_context(|| w.scale.to_string())?);
    }
    all.extend(stack::cases(setup, quick, progress).context("3b")?);
    let effort = match quick {
        true => Effort { rounds: 4, burst: Duration::from_millis(50) },
        false => Effort { rounds: 9, burst: Duration::from_millis(500) },
    };
    let rows = measure(&mut all, effort, setup, progress)?;
    let mut out = derived(&all, &rows);
    out.extend(once);
    Ok(out)
}
