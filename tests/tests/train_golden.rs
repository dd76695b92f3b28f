//! Training against the executable specification: initial weights, and ten steps of each estimator.
//!
//! The first step is tight. Later ones follow discontinuities (ternary codes, expert choices) and are compared as loosely as the golden
//! files say.

use std::collections::HashMap;

use chimera_codegen::host;
use chimera_compiler::{
    Descent, EntryKind, EntrySpec, Family, Mask, Mode, Options, PerSequence, Scheme, Score, Shared, StateForm,
    UpdateRule, compile,
};
use chimera_frontends::config::{ParamKind, parameters};
use chimera_ir::ops::{Descend, DescentRates, DescentRule, Distribution, GroupScale, Idle, OpDef, ScaleMode};
use chimera_ir::plan::{WeightDecl, WeightKind};
use chimera_ir::{DType, Data, Tensor, Type};
use chimera_runtime::exec::{ExecOptions, Executable};
use chimera_runtime::text::Batch;
use chimera_runtime::train::{Decay, Probed, Schedule, Trainer, init};
use chimera_tests::golden::Golden;

/// One golden run.
struct Case {
    golden: Golden,
    before: HashMap<String, Tensor>,
    trainer: Trainer,
    batch: Batch,
    lr: f64,
    /// Whether latents carry the scales that the golden file has apart.
    scaled: bool,
}

/// A weight's name, what was found, what is expected, and what was there before.
type Sample = (String, Vec<f32>, Vec<f32>, Vec<f32>);

impl Case {
    fn open(name: &str, kinds: Vec<EntryKind>, lr: f64, seed: u64) -> Case {
        let golden = Golden::open(name);
        let before = Golden::open("model_params").with_prefix("");
        let ints = |name: &str| -> Vec<i32> { golden.tensor(name).to_i64().iter().map(|&x| x as i32).collect() };
        let [batch, seq] = golden.tensor("in.tokens").ty.dims[..] else { panic!("tokens are a matrix") };
        let batch = Batch {
            batch,
            seq,
            tokens: ints("in.tokens"),
            labels: ints("in.labels"),
            seg: ints("in.seg"),
            reference: vec![],
            padding: 0,
        };
        let spec = |kind| EntrySpec { kind, rows: batch.batch, tokens: batch.seq, depth: None };
        let entries = kinds.into_iter().chain([EntryKind::Loss]).map(spec).collect();
        let options = Options { target: host().to_string(), entries, ..Options::default() };
        let plan = compile(&golden.model(), &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        let options = ExecOptions { threads: 2, ..ExecOptions::default() };
        let mut exec = Executable::new(plan, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (name, tensor) in &before {
            exec.set_weight(name, &tensor.ty.dims, tensor.as_f32()).unwrap_or_else(|e| panic!("{e}"));
        }
        let trainer = Trainer::new(exec, seed).unwrap_or_else(|e| panic!("{name}: {e}"));
        Case { golden, before, trainer, batch, lr, scaled: false }
    }

    /// A run that probes.
    fn probing(name: &str, scheme: &Scheme, rule: UpdateRule, lr: f64, seed: u64) -> Case {
        let mut kinds = vec![EntryKind::DualLoss(scheme.clone()), EntryKind::Update(scheme.clone(), rule)];
        kinds.extend(scheme.mask().refresh().map(|_| EntryKind::Mask(scheme.clone())));
        let scaled = matches!(scheme, Scheme::Shared(Shared { mode: Mode::Scales, .. }));
        Case { scaled, ..Case::open(name, kinds, lr, seed) }
    }

    fn step(&mut self, step: u64) -> Probed {
        self.trainer.step(&self.batch, step, self.lr).expect("a step")
    }

    /// The samples that the golden file has of the weights as they are: `(name, found, expected, before)`.
    fn samples(&self, prefix: &str, count: usize) -> Vec<Sample> {
        let wanted = self.golden.with_prefix(&format!("{prefix}.sample."));
        let take =
            |values: &[f32]| -> Vec<f32> { values.iter().copied().step_by((values.len() / count).max(1)).collect() };
        let row = |(name, want): (String, Tensor)| {
            let found = take(&self.trainer.exec().weight_f32(&name).expect("a weight"));
            let before = take(self.before[&name].as_f32());
            (name, found, want.as_f32().to_vec(), before)
        };
        let weights = &self.trainer.exec().plan().weights;
        let apart = |name: &str| self.scaled && weights.iter().any(|w| w.name == name && w.kind == WeightKind::Ternary);
        wanted.into_iter().filter(|(name, _)| !apart(name)).map(row).collect()
    }

    /// Compares the first step: values, and the steps they took.
    fn check_first_samples(&self) {
        let tolerance = self.golden.tolerance("first_median_rtol");
        let mut errors = vec![];
        let mut step_errors = vec![];
        for (name, found, want, before) in self.samples("first", 32) {
            assert_eq!(found.len(), want.len(), "{name}");
            errors.extend(found.iter().zip(&want).map(|(a, b)| (a - b).abs() / b.abs().max(1e-3)));
            let norm = |f: &dyn Fn(usize) -> f32| (0..want.len()).map(|i| f(i) * f(i)).sum::<f32>().sqrt();
            let taken = norm(&|i| want[i] - before[i]);
            if taken > 0.0 {
                step_errors.push(norm(&|i| found[i] - want[i]) / taken);
            } else {
                assert_eq!(found, want, "{name} does not move");
            }
        }
        assert!(errors.len() > 500 && step_errors.len() > 30, "the golden file has samples");
        let (error, step_error) = (median(errors), median(step_errors));
        assert!(error <= tolerance, "median error of values {error}, allowed {tolerance}");
        assert!(step_error <= 0.02, "median error of steps {step_error}");
    }

    fn check_last_samples(&self) {
        let tolerance = self.golden.tolerance("final_median_rtol");
        let error = |(a, b): (&f32, &f32)| (a - b).abs() / b.abs().max(1e-3);
        let errors = self
            .samples("final", 128)
            .iter()
            .flat_map(|s| s.1.iter().zip(&s.2).map(error).collect::<Vec<_>>())
            .collect();
        let error = median(errors);
        assert!(error <= tolerance, "median error of values {error}, allowed {tolerance}");
    }
}

fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    values[values.len() / 2]
}

fn close(what: &str, found: f64, want: f32, tolerance: f32) {
    assert!(
        (found - f64::from(want)).abs() <= f64::from(tolerance),
        "{what}: found {found}, expected {want} within {tolerance}"
    );
}

fn per_sequence(rank: usize) {
    let scheme = Scheme::PerSequence(PerSequence { rank, kappa: 0.1, sigma_vec: 0.01, group: 1 });
    let mut case = Case::probing(&format!("train_per_sequence_rank{rank}"), &scheme, UpdateRule::default(), 0.01, 77);
    let [first, later] = ["losses_first_step", "losses_all_steps"].map(|t| case.golden.tolerance(t));
    let c_tolerance = case.golden.tolerance("c_normalised_first_step");
    let [plus, minus, c] = ["out.plus", "out.minus", "out.c_normalised"].map(|n| case.golden.tensor(n));
    let rows = case.batch.batch;
    for step in 0..plus.ty.dims[0] {
        let probed = case.step(step as u64);
        let tolerance = if step == 0 { first } else { later };
        for row in 0..rows {
            let at = step * rows + row;
            close(&format!("step {step}: + of row {row}"), probed.plus[row], plus.as_f32()[at], tolerance);
            close(&format!("step {step}: - of row {row}"), probed.minus[row], minus.as_f32()[at], tolerance);
            if step == 0 {
                close(&format!("c of row {row}"), f64::from(probed.c[row]), c.as_f32()[at], c_tolerance);
            }
        }
        if step == 0 {
            case.check_first_samples();
        }
    }
    case.check_last_samples();
}

#[test]
fn per_sequence_rank_1() {
    per_sequence(1);
}

#[test]
fn per_sequence_rank_2() {
    per_sequence(2);
}

/// Ten steps of shared directions; returns the case for further checks.
fn mezo(name: &str, shared: Shared) -> Case {
    let directions = shared.directions;
    let rule = UpdateRule { weight_decay: 0.1, ..UpdateRule::default() };
    let mut case = Case::probing(name, &Scheme::Shared(shared), rule, 1e-5, 1234);
    let [first, later] = ["losses_first_step", "losses_all_steps"].map(|t| case.golden.tolerance(t));
    let losses = case.golden.tensor("out.losses");
    assert_eq!(losses.ty.dims[1..], [directions, 2]);
    for step in 0..losses.ty.dims[0] {
        let probed = case.step(step as u64);
        let tolerance = if step == 0 { first } else { later };
        for k in 0..directions {
            let at = 2 * (step * directions + k);
            close(&format!("step {step}: + of direction {k}"), probed.plus[k], losses.as_f32()[at], tolerance);
            close(&format!("step {step}: - of direction {k}"), probed.minus[k], losses.as_f32()[at + 1], tolerance);
        }
        if step == 0 {
            case.check_first_samples();
        }
    }
    case.check_last_samples();
    case
}

#[test]
fn mezo_with_requantised_latents() {
    mezo("train_mezo_A", Shared::default());
}

#[test]
fn mezo_with_additive_noise() {
    mezo("train_mezo_C", Shared { mode: Mode::Additive, ..Shared::default() });
}

#[test]
fn mezo_at_the_boundary_of_codes() {
    mezo("train_mezo_A_boundary_rel", Shared { mask: Mask::Boundary, eps_rel: Some(0.2), ..Shared::default() });
}

#[test]
fn mezo_with_two_gaussian_directions_of_small_weights() {
    let shared = Shared {
        mode: Mode::Additive,
        directions: 2,
        family: Family::Dense(Distribution::Gaussian),
        mask: Mask::Kept { by: Score::Small, share: 0.2, refresh: 5 },
        eps_rel: Some(0.05),
        ..Shared::default()
    };
    let case = mezo("train_mezo_C_gaussian_K2", shared);
    let exec = case.trainer.exec();
    let names: Vec<String> = exec.plan().weights.iter().map(|w| w.name.clone()).collect();
    let masks = names.iter().filter(|n| n.starts_with("optim.mask."));
    let mut ones: Vec<i64> = masks.map(|n| exec.weight_f32(n).expect("a mask").iter().sum::<f32>() as i64).collect();
    let mut want = case.golden.tensor("exact.mask_count").to_i64();
    ones.sort_unstable();
    want.sort_unstable();
    assert_eq!(ones, want);
}

#[test]
fn mezo_of_scales() {
    let case = mezo("train_mezo_B", Shared { mode: Mode::Scales, ..Shared::default() });
    let mode = ScaleMode::PerGroup(case.golden.model().quantization.group_size);
    let scales = |w: &[f32], dims: &[usize]| GroupScale { mode }.eval(&[&Tensor::f32(dims, w.to_vec())]).remove(0);
    let wanted = case.golden.with_prefix("final_alpha.sample.");
    assert!(wanted.len() > 20);
    let mut moved = 0;
    for (name, want) in wanted {
        let dims = &case.before[&name].ty.dims;
        let (now, then) = (case.trainer.exec().weight_f32(&name).expect("a weight"), case.before[&name].as_f32());
        let (alpha, before) = (scales(&now, dims), scales(then, dims));
        let (alpha, before) = (alpha.as_f32(), before.as_f32());
        let every = (alpha.len() / 128).max(1);
        for (i, want) in want.as_f32().iter().enumerate() {
            let (found, before) = (alpha[i * every], before[i * every]);
            assert!((found - want).abs() <= 2e-6 * want, "{name}, scale {i}: {found} is not {want}");
            moved += usize::from(before != *want);
        }
        let codes = |w: &[f32], alpha: &[f32]| -> Vec<i8> {
            let nb = alpha.len() / dims[0];
            let group = case.golden.model().quantization.group_size;
            let limit = |i: usize| 0.5 * alpha[i / dims[1] * nb + (i % dims[1] / group).min(nb - 1)];
            w.iter().enumerate().map(|(i, x)| if x.abs() > limit(i) { x.signum() as i8 } else { 0 }).collect()
        };
        assert!(codes(&now, alpha) == codes(then, scales(then, dims).as_f32()), "{name}: codes stay");
    }
    assert!(moved > 1000, "{moved} scales move");
}

#[test]
fn adamw() {
    let rule = DescentRule::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
    let name = "train_adamw";
    let balance = Golden::open(name).model().moe.map_or(0.0, |moe| moe.bias_update_rate as f32);
    let descent = Descent { rule, weight_decay: 0.1, clip: 1.0, state: StateForm::Full, balance };
    let schedule = Schedule { peak: 1e-3, warmup: 3, decay: Decay::Cosine, floor: 0.1 };
    let mut case =
        Case::open(name, vec![EntryKind::Backward { accumulate: false }, EntryKind::Descend(descent)], 0.0, 0);
    let [first, later] = ["losses_first_step", "losses_all_steps"].map(|t| case.golden.tolerance(t));
    let [losses, norms] = ["out.loss", "out.grad_norm"].map(|n| case.golden.tensor(n));
    for (step, (&loss, &norm)) in losses.as_f32().iter().zip(norms.as_f32()).enumerate() {
        case.lr = schedule.at_step(step as u64, 10);
        let found = case.step(step as u64);
        close(&format!("step {step}: loss"), found.loss, loss, if step == 0 { first } else { later });
        assert!(
            (found.c[0] / norm - 1.0).abs() <= if step == 0 { 1e-4 } else { later },
            "{step}: {:?}, {norm}",
            found.c
        );
        if step == 0 {
            case.check_first_samples();
        }
    }
    assert_eq!(losses.ty.dims, [10]);
    case.check_last_samples();
}

/// The options of the agreement runs, by what the golden configuration says.
fn agreement(options: &serde_json::Value) -> Descend {
    let idle = match options["zero_policy"].as_str() {
        Some("freeze") => Idle::Freeze,
        Some("decay") => Idle::Decay,
        Some("inertia") => Idle::Inertia,
        _ => Idle::Standard,
    };
    let rule = DescentRule::Agreement {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        rho: 0.95,
        lambda: 0.1,
        bounds: [0.5, 2.0],
        idle,
        fade: 0.95,
        gate: (options["gate"] == "noise_ratio").then_some([2.0, 4.0]),
        bytes: options["psi_int8"] == true,
    };
    Descend { rule, decay: options["wd"].as_f64().unwrap_or(0.0) as f32 }
}

#[test]
fn agreement_of_gradients() {
    let golden = Golden::open("agreement_optimizer");
    let tolerance = golden.tolerance("atol");
    let [p, g] = ["in.p", "in.g"].map(|n| golden.tensor(n));
    let n = p.ty.numel();
    let config: serde_json::Value = serde_json::from_str(golden.header("config")).expect("JSON");
    let options = config["options"].as_array().expect("a list of options");
    let mut seen = 0;
    for (i, options) in options.iter().enumerate() {
        let op = agreement(options);
        let fresh = op.rule.memory_types(&p.ty);
        let mut memory: Vec<Tensor> = [p.clone()].into_iter().chain(fresh.iter().map(Tensor::zeros)).collect();
        for (step, g) in g.as_f32().chunks(n).enumerate() {
            let scalars =
                [Tensor::f32(&[2], vec![1.0; 2]), Tensor::i32(&[1], vec![step as i32]), Tensor::f32(&[1], vec![1e-2])];
            let rates = DescentRates { clip: 0.0, betas: op.rule.betas() };
            let rates = rates.eval(&scalars.each_ref()).remove(0);
            let g = Tensor::f32(&[n], g.to_vec());
            let ins: Vec<&Tensor> = memory.iter().chain([&g, &rates]).collect();
            memory = op.eval(&ins);
        }
        for (name, found) in [("p", &memory[0]), ("psi", &memory[3])] {
            let want = golden.tensor(&format!("out.{i}.{name}"));
            // A byte may be the next one where a last bit decides, and then moves a weight by lr lambda / 127 in each of 12 steps.
            let (found, tolerance) = match (&found.data, op.rule.memory_types(&p.ty)[2].dtype) {
                (Data::I8(codes), _) => (codes.iter().map(|&c| f32::from(c)).collect(), 1.0),
                (_, DType::I8) => (found.as_f32().to_vec(), 1e-4),
                _ => (found.as_f32().to_vec(), tolerance),
            };
            for (a, &b) in found.iter().zip(want.as_f32()) {
                close(&format!("{options}: {name}"), f64::from(*a), b, tolerance);
            }
        }
        seen += 1;
    }
    assert_eq!(seen, 7, "option sets of the golden file");
}

#[test]
fn initial_weights() {
    let golden = Golden::open("init_params");
    let model = golden.model();
    let kind = |kind| match kind {
        ParamKind::Ternary => WeightKind::Ternary,
        ParamKind::Matrix => WeightKind::Matrix,
        ParamKind::Embedding => WeightKind::Embedding,
        ParamKind::Vector => WeightKind::Vector,
        ParamKind::Buffer => WeightKind::Buffer,
    };
    let (samples, norms) = (golden.with_prefix("init.sample."), golden.with_prefix("init.norm."));
    let parameters = parameters(&model);
    assert_eq!((samples.len(), norms.len()), (parameters.len(), parameters.len()));
    for p in parameters {
        let weight = WeightDecl { name: p.name.clone(), kind: kind(p.kind), ty: Type::f32(&p.dims) };
        let found = init::initial(&weight, model.initializer_range, 0);
        let normal = p.name.ends_with("memory_w1")
            || p.name.ends_with("persistent_memory")
            || !matches!(weight.kind, WeightKind::Vector);
        let taken = found.iter().step_by((found.len() / 64).max(1));
        let want = samples[&p.name].as_f32();
        assert_eq!(taken.len(), want.len(), "{}", p.name);
        for (i, (a, b)) in taken.zip(want).enumerate() {
            let same = if normal { a.to_bits() == b.to_bits() } else { (a - b).abs() <= 1e-6 * b.abs().max(1.0) };
            assert!(same, "{}, sample {i}: {a} is not {b}", p.name);
        }
        let norm = found.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        close(&format!("norm of {}", p.name), norm, norms[&p.name].as_f32()[0], 1e-6 * norm.max(1.0) as f32);
    }
}
