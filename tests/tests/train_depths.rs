//! Training with a loop depth drawn for every sequence: each sequence is probed as in a batch that runs at its depth throughout.

use chimera_codegen::host;
use chimera_compiler::{EntryKind, EntrySpec, Mode, Options, PerSequence, Scheme, Shared, UpdateRule, compile};
use chimera_frontends::config::ModelConfig;
use chimera_frontends::layers::Depth;
use chimera_runtime::call::{self, Tensors};
use chimera_runtime::exec::{ExecOptions, Executable};
use chimera_runtime::files::HostTensor;
use chimera_runtime::rng::poisson_depth;
use chimera_runtime::text::Batch;
use chimera_runtime::train::weights::WeightFile;
use chimera_runtime::train::{Depths, TrainError, Trainer};
use chimera_tests::golden::{Golden, path};

const SEED: u64 = 5;
const DEPTHS: Depths = Depths { mean: 2.0, least: 1, most: 3 };

/// The golden model, which has experts inside its loop.
fn model(stochastic: bool) -> ModelConfig {
    let mut cfg = Golden::open("model_absmax_per_block").model();
    let looping = cfg.looping.as_mut().expect("the golden model is looped");
    assert_eq!(looping.default, 2);
    (looping.range, looping.stochastic) = ([1, 3], stochastic);
    assert!(cfg.moe.as_ref().is_some_and(|m| m.layers.iter().any(|&l| cfg.is_looped(l))), "experts in the loop");
    cfg
}

fn trainer(cfg: &ModelConfig, scheme: &Scheme, batch: &Batch, depth: Option<Depth>) -> Trainer {
    let spec = |kind, depth| EntrySpec { kind, rows: batch.batch, tokens: batch.seq, depth };
    let entries = vec![
        spec(EntryKind::DualLoss(scheme.clone()), depth),
        spec(EntryKind::Update(scheme.clone(), UpdateRule::default()), None),
        spec(EntryKind::Loss, None),
    ];
    let options = Options { target: host().to_string(), entries, ..Options::default() };
    let plan = compile(cfg, &options).expect("the model compiles");
    let options = ExecOptions { threads: 2, ..ExecOptions::default() };
    let mut exec = Executable::new(plan, &options).expect("the plan is executable");
    let weights = WeightFile::open(&path("model_params")).expect("the weights are there");
    weights.assign(&mut exec, false).expect("the weights fit");
    Trainer::new(exec, SEED).expect("a plan for training")
}

fn batch() -> Batch {
    let golden = Golden::open("model_absmax_per_block");
    let ints = |name: &str| -> Vec<i32> { golden.tensor(name).to_i64().iter().map(|&x| x as i32).collect() };
    let [batch, seq] = golden.tensor("in.tokens").ty.dims[..] else { panic!("tokens are a matrix") };
    Batch {
        batch,
        seq,
        tokens: ints("in.tokens"),
        labels: ints("in.labels"),
        seg: ints("in.seg"),
        reference: vec![],
        padding: 0,
    }
}

/// The first step in which all depths occur.
fn mixed_step(rows: usize) -> (u64, Vec<u32>) {
    let drawn = |step: u64| (0..rows as u32).map(|r| poisson_depth(2.0, 1, 3, step as u32, r, SEED)).collect();
    let all = |d: &Vec<u32>| (1..=3).all(|n| d.contains(&n));
    (0..).map(|step| (step, drawn(step))).find(|(_, d)| all(d)).expect("some step draws all depths")
}

#[test]
fn every_sequence_is_probed_at_the_depth_drawn_for_it() {
    let batch = batch();
    let (step, drawn) = mixed_step(batch.batch);
    let scheme = Scheme::PerSequence(PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 });
    let mut mixed = trainer(&model(true), &scheme, &batch, None).with_depths(Some(DEPTHS));
    let probed = mixed.step(&batch, step, 0.01).expect("a step");
    for n in 1..=3u32 {
        let mut fixed = trainer(&model(false), &scheme, &batch, Some(Depth::Fixed(n as usize)));
        let alone = fixed.step(&batch, step, 0.01).expect("a step");
        for row in (0..batch.batch).filter(|&r| drawn[r] == n) {
            assert_eq!(probed.plus[row].to_bits(), alone.plus[row].to_bits(), "+ of row {row} at depth {n}");
            assert_eq!(probed.minus[row].to_bits(), alone.minus[row].to_bits(), "- of row {row} at depth {n}");
        }
        let other = (0..batch.batch).find(|&r| drawn[r] != n).expect("all depths occur");
        assert_ne!(probed.plus[other].to_bits(), alone.plus[other].to_bits(), "depth shows in the loss");
    }
}

/// The losses of all probes, one for each of their rows.
fn losses(trainer: &mut Trainer, batch: &Batch, step: u64, depths: Option<&[u32]>) -> Vec<f32> {
    let ints = |dims: &[usize], x: &[i32]| HostTensor::from_i32(dims, x).expect("the shape fits");
    let matrix = |x: &[i32]| ints(&[batch.batch, batch.seq], x);
    let mut inputs = Tensors::from([
        ("tokens".to_owned(), matrix(&batch.tokens)),
        ("seg".to_owned(), matrix(&batch.seg)),
        ("labels".to_owned(), matrix(&batch.labels)),
        ("seed".to_owned(), ints(&[2], &[SEED as i32, 0])),
        ("step".to_owned(), ints(&[1], &[step as i32])),
    ]);
    let depths: Option<Vec<i32>> = depths.map(|d| d.iter().map(|&n| n as i32).collect());
    inputs.extend(depths.map(|d| ("depth".to_owned(), ints(&[batch.batch], &d))));
    call::run(trainer.exec_mut(), "dual_loss", &inputs).expect("the call succeeds")["losses"].to_f32()
}

#[test]
fn shared_directions_see_the_same_depths() {
    let batch = batch();
    let (step, drawn) = mixed_step(batch.batch);
    for mode in [Mode::Requantise, Mode::Additive] {
        let scheme = Scheme::Shared(Shared { mode, directions: 2, ..Shared::default() });
        let found = losses(&mut trainer(&model(true), &scheme, &batch, None), &batch, step, Some(&drawn));
        assert_eq!(found.len(), 4 * batch.batch);
        for n in 1..=3u32 {
            let mut fixed = trainer(&model(false), &scheme, &batch, Some(Depth::Fixed(n as usize)));
            let want = losses(&mut fixed, &batch, step, None);
            for i in (0..want.len()).filter(|i| drawn[i % batch.batch] == n) {
                assert_eq!(found[i].to_bits(), want[i].to_bits(), "loss {i} at depth {n}");
            }
        }
    }
}

#[test]
fn measuring_runs_at_the_default_depth_and_drawing_needs_a_rule() {
    let batch = batch();
    let scheme = Scheme::PerSequence(PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 });
    let mut mixed = trainer(&model(true), &scheme, &batch, None);
    let takes_depth = |entry: &str| {
        let ports = &mixed.exec().plan().entry(entry).expect("it was compiled").inputs;
        ports.iter().any(|p| p.0 == "depth")
    };
    assert!(takes_depth("dual_loss") && !takes_depth("loss"));
    let error = mixed.step(&batch, 0, 0.01).expect_err("nothing says how to draw");
    assert!(matches!(&error, TrainError::Plan(why) if why.contains("looping.depth_selection")), "{error}");
}
