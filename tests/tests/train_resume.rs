//! Training runs: the same bits with any number of threads and however often the run is interrupted, and clear errors.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use chimera_codegen::host;
use chimera_compiler::{
    Descent, EntryKind, EntrySpec, Family, Mask, Mode, Optimiser, Options, PerSequence, Scheme, Score, Shared,
    StateForm, UpdateRule, compile,
};
use chimera_frontends::config::{self, Overrides, Scale};
use chimera_ir::ops::{DescentRule, Distribution, Idle};
use chimera_ir::plan::Plan;
use chimera_runtime::exec::{ExecOptions, Executable};
use chimera_runtime::text::{Batches, TokenStream, Vocab};
use chimera_runtime::train::checkpoint::{self, Meta};
use chimera_runtime::train::journal::{Header, Journal};
use chimera_runtime::train::metrics::Log;
use chimera_runtime::train::paradigms::Stages;
use chimera_runtime::train::standing::Standing;
use chimera_runtime::train::{
    Budget, Decay, Event, Inspection, Measure, Outcome, Progress, Run, RunOptions, Schedule, TrainError, Trainer, init,
};

const ROWS: usize = 2;
const TOKENS: usize = 8;
const STEPS: u64 = 5;
const SEED: u64 = 11;

/// What a run estimates by, and how it steps.
fn probing(scheme: &Scheme, rule: UpdateRule) -> Vec<EntryKind> {
    let mut kinds = vec![EntryKind::DualLoss(scheme.clone()), EntryKind::Update(scheme.clone(), rule)];
    kinds.extend(scheme.mask().refresh().map(|_| EntryKind::Mask(scheme.clone())));
    kinds
}

/// The same of probes of each sequence.
fn per_sequence() -> Vec<EntryKind> {
    let scheme = PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 };
    probing(&Scheme::PerSequence(scheme), UpdateRule::default())
}

fn descending(rule: DescentRule) -> Vec<EntryKind> {
    let descent = Descent { rule, weight_decay: 0.1, clip: 1.0, state: StateForm::Full, balance: 0.0 };
    vec![EntryKind::Backward { accumulate: false }, EntryKind::Descend(descent)]
}

fn plan(kinds: Vec<EntryKind>) -> Plan {
    let sets = [
        "hidden_size=32",
        "intermediate_size=32",
        "num_hidden_layers=2",
        "head_dim=16",
        "backbone.layer_pattern=\"GD XM\"",
    ];
    let sets = sets.map(str::to_owned).to_vec();
    let model = config::preset(Scale::Pico, &Overrides { sets, ..Overrides::default() })
        .unwrap_or_else(|e| panic!("{e}"))
        .model;
    let spec = |kind| EntrySpec { kind, rows: ROWS, tokens: TOKENS, depth: None };
    let entries = kinds.into_iter().chain([EntryKind::Loss]).map(spec).collect();
    let options = Options { target: host().to_string(), entries, ..Options::default() };
    compile(&model, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn trainer(plan: &Plan, threads: usize) -> Trainer {
    let options = ExecOptions { threads, ..ExecOptions::default() };
    let mut exec = Executable::new(plan.clone(), &options).unwrap_or_else(|e| panic!("{e}"));
    init::initialise(&mut exec, SEED).unwrap_or_else(|e| panic!("{e}"));
    Trainer::new(exec, SEED).unwrap_or_else(|e| panic!("{e}"))
}

fn streams(vocab: &Vocab) -> (Batches, TokenStream) {
    let text = |salt: usize| (0..300).map(|i| if i * salt % 7 < 3 { "ab" } else { "c " }).collect::<String>();
    let stream = |salt| TokenStream::new(&[vocab.encode(&text(salt))], vocab.end_of_document());
    (Batches::new(stream(3), TOKENS, SEED).expect("rows"), stream(5))
}

fn options(folder: &Path) -> RunOptions {
    RunOptions {
        budget: Budget { steps: Some(STEPS), seconds: None },
        schedule: Schedule { peak: 0.02, warmup: 2, decay: Decay::Cosine, floor: 0.1 },
        stages: Stages::default(),
        measure: Measure::Every(2),
        validation_rows: 3,
        save_every: 2,
        keep: 1,
        explosion: 0.0,
        inspection: Inspection::default(),
        writing: None,
        folder: Some(folder.to_path_buf()),
    }
}

fn meta(plan: &Plan, progress: Progress) -> Meta {
    let vocab = Vocab::bytes().to_text();
    Meta { config: plan.config.clone(), vocab, options: "{}".into(), data: "text".into(), progress }
}

/// Trains until the end or `stop_at` steps, and logs the losses.
fn train(trainer: &mut Trainer, folder: &Path, from: Option<&Standing>, stop_at: u64) -> (Outcome, Progress) {
    let progress = from.map_or(Progress::default(), Standing::progress);
    let vocab = Vocab::bytes();
    let (batches, validation) = streams(&vocab);
    let meta = meta(trainer.exec().plan(), progress);
    let journal = match from {
        Some(standing) => standing.continue_in(folder),
        None => Journal::create(folder, &Header::new(0, &meta.config, &meta.data)),
    };
    let journal = Some(journal.expect("a journal"));
    let mut log = Log::open(folder, progress.step).expect("a log");
    let step = Cell::new(progress.step);
    let mut run = Run { trainer, batches: &batches, validation: &validation, vocab: &vocab, progress, meta, journal };
    let outcome = run.train(&options(folder), &|| step.get() >= stop_at, &mut |event| match event {
        Event::Step(m) => {
            step.set(m.step);
            log.add(m)
        }
        _ => Ok(()),
    });
    (outcome.unwrap_or_else(|e| panic!("{e}")), run.progress)
}

/// Weights and optimizer memory as bits, by name.
fn bits(trainer: &Trainer) -> Vec<(String, Vec<u32>)> {
    let exec = trainer.exec();
    let weights = exec.plan().weights.iter();
    weights
        .map(|w| (w.name.clone(), exec.weight::<f32>(&w.name).expect("f32").iter().map(|x| x.to_bits()).collect()))
        .collect()
}

/// What depends on the run and not on the clock, line by line.
fn losses(folder: &Path) -> Vec<(u64, u64, Option<u64>, u64)> {
    let text = fs::read_to_string(folder.join(Log::NAME)).expect("a log");
    let line = |line: &str| {
        let v: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let bits = |key: &str| v[key].as_f64().map(f64::to_bits);
        (v["step"].as_u64().expect("a step"), bits("loss").expect("a loss"), bits("val"), bits("lr").expect("a rate"))
    };
    text.lines().map(line).collect()
}

#[test]
fn interruptions_and_threads_change_nothing() {
    let kept = |by| Mask::Kept { by, share: 0.3, refresh: 2 };
    let (integer, gaussian) = (Mode::Integer { unit: 1.0 / 1024.0 }, Family::Dense(Distribution::Gaussian));
    let lozo = Family::Lozo { rank: 2, period: 2 };
    let subzero = Family::SubZero { rank: 2, period: 2 };
    let tezo = Family::TeZo { rank: 3 };
    let base = || Shared { eps: 1e-2, ..Shared::default() };
    let shared = [
        Shared { mode: Mode::Additive, directions: 2, family: gaussian, eps_rel: Some(0.1), ..base() },
        Shared { mask: Mask::Boundary, eps_rel: Some(0.2), family: gaussian, ..base() },
        Shared { mode: Mode::Scales, directions: 2, ..base() },
        Shared { mode: integer, directions: 2, ..base() },
        Shared { mode: Mode::Additive, mask: kept(Score::Small), ..base() },
        Shared { mask: kept(Score::Large), ..base() },
        Shared { mask: kept(Score::Random), ..base() },
        Shared { mode: Mode::Additive, one_sided: true, scaled: true, directions: 3, ..base() },
        Shared { mode: Mode::Additive, scaled: true, directions: 2, family: lozo, eps_rel: Some(0.1), ..base() },
        Shared { family: subzero, ..base() },
        Shared { mode: Mode::Additive, family: subzero, ..base() },
        Shared { mode: Mode::Additive, family: tezo, mask: kept(Score::Small), ..base() },
    ];
    let per_sequence = Scheme::PerSequence(PerSequence { rank: 2, ..PerSequence::default() });
    let optimisers = [None, Some(Optimiser::Momentum), Some(Optimiser::Adam), Some(Optimiser::Normalised)];
    let schemes = shared.map(Scheme::Shared).into_iter().chain([per_sequence]);
    let (beta1, beta2, eps) = (0.9, 0.95, 1e-8);
    let agreement = DescentRule::Agreement {
        beta1,
        beta2,
        eps,
        rho: 0.95,
        lambda: 0.1,
        bounds: [0.5, 2.0],
        idle: Idle::Inertia,
        fade: 0.95,
        gate: Some([2.0, 4.0]),
        bytes: false,
    };
    let gradients = [DescentRule::AdamW { beta1, beta2, eps }, DescentRule::Momentum { mu: 0.9 }, agreement];
    let probed = schemes.zip(optimisers.into_iter().cycle()).map(|(scheme, optimiser)| {
        probing(&scheme, UpdateRule { optimiser, weight_decay: 0.1, ..UpdateRule::default() })
    });
    for kinds in probed.chain(gradients.map(descending)) {
        let what = format!("{kinds:?}");
        let plan = plan(kinds);
        let folder = tempfile::tempdir().expect("a folder");
        let [whole, parted] = ["whole", "parted"].map(|n| folder.path().join(n));
        let start = bits(&trainer(&plan, 1));
        let mut first = trainer(&plan, 1);
        let (outcome, progress) = train(&mut first, &whole, None, u64::MAX);
        assert_eq!(
            (outcome, progress.step, progress.position),
            (Outcome::Finished, STEPS, STEPS * (ROWS * TOKENS) as u64)
        );
        assert_ne!(bits(&first), start, "{what} moves weights");

        let mut second = trainer(&plan, 2);
        let (outcome, progress) = train(&mut second, &parted, None, 3);
        assert_eq!((outcome, progress.step), (Outcome::Stopped, 3));
        drop(second);
        // Lines behind the checkpoint, as a killed process leaves them.
        let log = parted.join(Log::NAME);
        let lines = fs::read_to_string(&log).expect("a log") + "{\"step\": 4, \"loss\": 1.0}\n{\"st";
        fs::write(&log, lines).expect("written");
        // By the last checkpoint and by that of the beginning and the journal.
        let standing = Standing::newest(&parted).expect("sound").expect("a run");
        assert_eq!(standing.meta, meta(&plan, progress));
        let third = |step: u64| {
            for later in checkpoint::steps(&parted).expect("listed").into_iter().filter(|&s| s > step) {
                fs::remove_file(checkpoint::path_of(&parted, later)).expect("removed");
            }
            let standing = Standing::newest(&parted).expect("sound").expect("a run");
            assert_eq!((standing.meta.progress.step, standing.progress()), (step, progress));
            let mut third = trainer(&plan, 2);
            let (batches, _) = streams(&Vocab::bytes());
            if third.needs_data() && step == 0 {
                let error = standing.restore(&mut third, None).expect_err("no data").to_string();
                assert!(error.contains("step 1 ") && error.contains("only the data of the run"), "{error}");
            }
            standing.restore(&mut third, Some(&batches)).expect("restored");
            (third, standing)
        };
        let (restored, _) = third(3);
        let (mut third, standing) = third(0);
        assert!(bits(&restored) == bits(&third), "a checkpoint has the bits of the journal");
        let (outcome, _) = train(&mut third, &parted, Some(&standing), u64::MAX);
        assert_eq!(outcome, Outcome::Finished);
        assert!(
            bits(&third) == bits(&first),
            "{what}: a resumed run on two threads has the bits of a whole run on one"
        );
        assert_eq!(losses(&parted), losses(&whole));
        assert_eq!(losses(&whole).iter().map(|l| l.2.is_some()).collect::<Vec<_>>(), [false, true, false, true, true]);
        assert_eq!(checkpoint::steps(&whole).expect("listed"), [0, STEPS], "checkpoints between are removed");
    }
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_keeps_the_weights() {
    let plan = plan(per_sequence());
    let mut trainer = trainer(&plan, 1);
    let name = "norm.weight";
    let mut values = trainer.exec().weight::<f32>(name).expect("a weight").to_vec();
    values[3] = f32::NAN;
    trainer.exec_mut().set_weight(name, &[values.len()], &values).expect("set");
    let before = bits(&trainer);
    let vocab = Vocab::bytes();
    let (batches, _) = streams(&vocab);
    let (batch, _) = batches.next(0, ROWS, TOKENS);
    let error = trainer.step(&batch, 7, 0.1).expect_err("the loss is not a number");
    assert!(matches!(error, TrainError::Diverged { step: 7, .. }), "{error}");
    assert!(error.to_string().contains("in step 7") && error.to_string().contains("--lr"), "{error}");
    assert!(bits(&trainer) == before);
}

#[test]
fn other_data_do_not_continue_a_run_along_gradients() {
    let plan = plan(descending(DescentRule::Momentum { mu: 0.9 }));
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("run");
    train(&mut trainer(&plan, 1), &folder, None, 1);
    fs::remove_file(checkpoint::path_of(&folder, 1)).expect("removed");
    let standing = Standing::newest(&folder).expect("sound").expect("a run");
    let stream = TokenStream::new(&[vec![7; 300]], Vocab::bytes().end_of_document());
    let other = Batches::new(stream, TOKENS, SEED).expect("rows");
    let error = standing.restore(&mut trainer(&plan, 1), Some(&other)).expect_err("another loss");
    assert!(error.to_string().contains("step 1 has the loss"), "{error}");
}

#[test]
fn plans_without_training_are_refused() {
    let mut plan = plan(per_sequence());
    let update = plan.entries.iter_mut().find(|e| e.name == "update").expect("an update");
    "other".clone_into(&mut update.name);
    let exec = Executable::new(plan, &ExecOptions { threads: 1, ..ExecOptions::default() }).expect("executable");
    let error = Trainer::new(exec, 0).expect_err("no update");
    assert!(error.to_string().contains("no entry point `update`"), "{error}");
}
