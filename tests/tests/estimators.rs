//! Estimators and optimisers against plain arithmetic on the numbers that a step was given, and probes against separate forward passes.

use std::collections::HashMap;

use chimera_compiler::{
    EntryKind, EntrySpec, Family, Mask, Mode, Optimiser, Options, PerSequence, Scheme, Score, Shared, UpdateRule,
    compile,
};
use chimera_frontends::config::{ModelConfig, Overrides, ParamKind, Scale, expert_stack, parameters, preset};
use chimera_ir::{
    Data, Tensor,
    ops::{BlockScales, Distribution, GroupScale, OpDef, PackTernary, ScaleMode},
    plan::{CODES, SCALES, WeightKind},
};
use chimera_runtime::{
    exec::{ExecOptions, Executable},
    rng::{self, Stream},
    text::Batch,
    train::{Probed, Trainer, init},
};

const SEED: u64 = 21;
const ROWS: usize = 2;
const TOKENS: usize = 12;
const LR: f64 = 3e-3;
const UNIT: f32 = 1.0 / 4096.0;
/// A vector, a ternary matrix and the embedding.
const NAMES: [&str; 3] = ["norm.weight", "layers.0.mlp.up_proj.weight", "embed.weight"];

fn model(scale: Scale, sets: &[&str]) -> ModelConfig {
    let sets = sets.iter().map(|s| (*s).to_owned()).collect();
    preset(scale, &Overrides { sets, ..Overrides::default() }).expect("a preset loads").model
}

fn executable(cfg: &ModelConfig, entries: Vec<EntryKind>, packed: bool) -> Executable {
    let spec = |kind| EntrySpec { kind, rows: ROWS, tokens: TOKENS, depth: None };
    let entries = entries.into_iter().map(spec).collect();
    let ternary = parameters(cfg).into_iter().filter(|p| packed && p.kind == ParamKind::Ternary);
    let packed = ternary.map(|p| expert_stack(&p.name).map_or(p.name, |(stack, _)| stack)).collect();
    let plan = compile(cfg, &Options { entries, packed, ..Options::default() }).unwrap_or_else(|e| panic!("{e}"));
    Executable::new(plan, &ExecOptions { threads: 2, ..ExecOptions::default() }).expect("the plan runs")
}

fn trainer(cfg: &ModelConfig, shared: &Shared, rule: &UpdateRule) -> Trainer {
    let scheme = Scheme::Shared(shared.clone());
    let mut entries =
        vec![EntryKind::DualLoss(scheme.clone()), EntryKind::Update(scheme.clone(), rule.clone()), EntryKind::Loss];
    entries.extend(scheme.mask().refresh().map(|_| EntryKind::Mask(scheme)));
    let mut exec = executable(cfg, entries, false);
    init::initialise(&mut exec, 5).expect("weights are initialised");
    Trainer::new(exec, SEED).expect("a plan for training")
}

fn batch(cfg: &ModelConfig) -> Batch {
    let n = ROWS * TOKENS;
    let at = |k: usize| (0..n).map(|i| ((i * 37 + k * 11) % cfg.vocab_size) as i32).collect();
    Batch { batch: ROWS, seq: TOKENS, tokens: at(1), labels: at(2), seg: vec![0; n], reference: vec![], padding: 0 }
}

fn weights(trainer: &Trainer) -> HashMap<&'static str, Vec<f32>> {
    NAMES.map(|n| (n, trainer.exec().weight_f32(n).expect("a weight").into_owned())).into()
}

fn gaussian(name: &str, n: usize, step: u64, k: usize) -> Vec<f64> {
    let mut out = vec![0.0; n];
    rng::fill_gaussian(&mut out, name, step as u32, k as u32, SEED);
    out.into_iter().map(f64::from).collect()
}

/// Columns made orthonormal, `[m, r]`.
fn orthonormal(a: &[f64], m: usize, r: usize) -> Vec<f64> {
    let mut q = a.to_vec();
    for j in 0..r {
        for k in 0..j {
            let along: f64 = (0..m).map(|i| q[i * r + j] * q[i * r + k]).sum();
            (0..m).for_each(|i| q[i * r + j] -= along * q[i * r + k]);
        }
        let norm = (0..m).map(|i| q[i * r + j] * q[i * r + j]).sum::<f64>().sqrt();
        (0..m).for_each(|i| q[i * r + j] /= norm);
    }
    q
}

/// Direction `k` of a weight in a step.
fn direction(family: Family, name: &str, dims: &[usize], step: u64, k: usize) -> Vec<f64> {
    let n = dims.iter().product();
    let (&[rows, cols], true) = (dims, !matches!(family, Family::Dense(_))) else {
        if family == Family::Dense(Distribution::Rademacher) {
            let mut out = vec![0.0; n];
            rng::fill_rademacher(&mut out, name, step as u32, k as u32, SEED);
            return out.into_iter().map(f64::from).collect();
        }
        return gaussian(name, n, step, k);
    };
    let draw = |part: &str, n, step| gaussian(&format!("{name}{part}"), n, step, k);
    let (u, v, r, scale) = match family {
        Family::Dense(_) => unreachable!("handled above"),
        Family::Lozo { rank, period } => {
            let v = draw("#V", cols * rank, step - step % period as u64);
            (draw("#U", rows * rank, step), v, rank, (rank as f64).sqrt())
        }
        Family::SubZero { rank, period } => {
            let old = step - step % period as u64;
            let u = orthonormal(&draw("#U", rows * rank, old), rows, rank);
            let v = orthonormal(&draw("#V", cols * rank, old), cols, rank);
            let z = draw("#Z", rank * rank, step);
            let at = |i: usize| (0..rank).map(|b| u[i / rank * rank + b] * z[i % rank * rank + b]).sum();
            ((0..rows * rank).map(at).collect(), v, rank, rank as f64 / ((rows * cols) as f64).sqrt())
        }
        Family::TeZo { rank } => {
            let (u, tau) = (draw("#U", rows * rank, 0), draw("#tau", rank, step));
            let u = u.iter().enumerate().map(|(i, x)| x * tau[i % rank]).collect();
            (u, draw("#V", cols * rank, 0), rank, (rank as f64).sqrt())
        }
    };
    let entry = |i: usize| (0..r).map(|q| u[i / cols * r + q] * v[i % cols * r + q]).sum::<f64>() / scale;
    (0..n).map(entry).collect()
}

/// Steps of a trainer, each with the weights before it.
fn steps(trainer: &mut Trainer, cfg: &ModelConfig, n: u64) -> Vec<(HashMap<&'static str, Vec<f32>>, Probed)> {
    let batch = batch(cfg);
    (0..n).map(|step| (weights(trainer), trainer.step(&batch, step, LR).expect("a step"))).collect()
}

fn estimate(shared: &Shared, name: &str, dims: &[usize], step: u64, probed: &Probed) -> Vec<f64> {
    let width = f64::from(shared.eps) * if shared.one_sided { 1.0 } else { 2.0 };
    let mut g = vec![0.0; dims.iter().product()];
    for (k, c) in probed.c.iter().enumerate() {
        let z = direction(shared.family, name, dims, step, k);
        g.iter_mut().zip(z).for_each(|(g, z)| *g += f64::from(*c) / width * z / probed.c.len() as f64);
    }
    g
}

/// Compares what a step did to a weight with what it should have done.
fn same_step(what: &str, before: &[f32], found: &[f32], want: &[f64]) {
    let largest = want.iter().zip(before).map(|(w, b)| (w - f64::from(*b)).abs()).fold(0.0, f64::max);
    assert!(largest > 1e-6, "{what}: it moves");
    for (i, (found, want)) in found.iter().zip(want).enumerate() {
        let error = (f64::from(*found) - want).abs();
        let allowed = 2e-4 * largest + 2.5e-7 * want.abs().max(0.1);
        assert!(error <= allowed, "{what}, element {i}: {found} is not {want}");
    }
}

fn small() -> ModelConfig {
    model(Scale::Pico, &["quantization.activation_method=none", "num_hidden_layers=2"])
}

fn dims_of(cfg: &ModelConfig, name: &str) -> Vec<usize> {
    parameters(cfg).into_iter().find(|p| p.name == name).expect("the model has it").dims
}

#[test]
fn families_and_sides_move_weights_along_their_directions() {
    let cfg = small();
    let families = [
        Family::Dense(Distribution::Rademacher),
        Family::Dense(Distribution::Gaussian),
        Family::Lozo { rank: 2, period: 2 },
        Family::SubZero { rank: 3, period: 2 },
        Family::TeZo { rank: 2 },
    ];
    for (i, family) in families.into_iter().enumerate() {
        let (one_sided, scaled) = (i % 2 == 1, i % 3 == 1);
        let shared = Shared { family, one_sided, scaled, directions: 2, eps: 1e-2, ..Shared::default() };
        let mut trainer = trainer(&cfg, &shared, &UpdateRule::default());
        let mut done = steps(&mut trainer, &cfg, 4);
        done.push((weights(&trainer), done[0].1.clone()));
        for (step, pair) in done.windows(2).enumerate() {
            for name in NAMES {
                let (before, after, dims) = (&pair[0].0[name], &pair[1].0[name], dims_of(&cfg, name));
                let g = estimate(&shared, name, &dims, step as u64, &pair[0].1);
                let want: Vec<f64> = before.iter().zip(g).map(|(w, g)| f64::from(*w) - LR * g).collect();
                same_step(&format!("{family:?}, step {step}, {name}"), before, after, &want);
            }
        }
    }
}

#[test]
fn optimisers_follow_their_formulas() {
    let cfg = small();
    for optimiser in [Optimiser::Momentum, Optimiser::Adam, Optimiser::Normalised] {
        let shared = Shared { eps: 1e-2, ..Shared::default() };
        let rule = UpdateRule { optimiser: Some(optimiser), momentum: 0.8, second: 0.9, ..UpdateRule::default() };
        let mut trainer = trainer(&cfg, &shared, &rule);
        let mut done = steps(&mut trainer, &cfg, 4);
        done.push((weights(&trainer), done[0].1.clone()));
        for name in NAMES {
            let dims = dims_of(&cfg, name);
            let n = dims.iter().product();
            let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
            for (step, pair) in done.windows(2).enumerate() {
                let (before, after) = (&pair[0].0[name], &pair[1].0[name]);
                let g = estimate(&shared, name, &dims, step as u64, &pair[0].1);
                let rms = (g.iter().map(|g| g * g).sum::<f64>() / n as f64).sqrt();
                let mean = before.iter().map(|w| f64::from(w.abs())).sum::<f64>() / n as f64;
                let size = if dims.len() == 1 { 0.02 } else { mean.max(1e-3) };
                let t = step as i32 + 1;
                let next = |i: usize| {
                    let step = match optimiser {
                        Optimiser::Momentum => {
                            m[i] = 0.8 * m[i] + g[i];
                            m[i]
                        }
                        Optimiser::Normalised => {
                            m[i] = 0.8 * m[i] + 0.2 * g[i] / rms;
                            size * m[i] / (0.2f64 / 1.8).sqrt()
                        }
                        _ => {
                            (m[i], v[i]) = (0.8 * m[i] + 0.2 * g[i], 0.9 * v[i] + 0.1 * g[i] * g[i]);
                            m[i] / (1.0 - 0.8f64.powi(t)) / ((v[i] / (1.0 - 0.9f64.powi(t))).sqrt() + 1e-8)
                        }
                    };
                    f64::from(before[i]) - LR * step
                };
                let want: Vec<f64> = (0..n).map(next).collect();
                same_step(&format!("{optimiser:?}, step {step}, {name}"), before, after, &want);
            }
        }
    }
}

/// Three estimates fade in a sum that has no memory but scalars.
#[test]
fn momentum_is_drawn_again_from_scalars() {
    let cfg = small();
    let shared = Shared { eps: 1e-2, directions: 2, ..Shared::default() };
    let rule = UpdateRule { optimiser: Some(Optimiser::Replay), momentum: 0.8, history: 2, ..UpdateRule::default() };
    let mut trainer = trainer(&cfg, &shared, &rule);
    let memory = trainer.exec().plan().weights.iter().filter(|w| w.kind == WeightKind::Optimizer);
    assert_eq!(memory.map(|w| w.ty.numel()).sum::<usize>(), 2 * 2);
    let mut done = steps(&mut trainer, &cfg, 5);
    done.push((weights(&trainer), done[0].1.clone()));
    for name in NAMES {
        let dims = dims_of(&cfg, name);
        let all: Vec<Vec<f64>> =
            (0..5).map(|step| estimate(&shared, name, &dims, step as u64, &done[step].1)).collect();
        for (step, pair) in done.windows(2).enumerate() {
            let faded = |i: usize| (0..=step.min(2)).map(|j| 0.8f64.powi(j as i32) * all[step - j][i]).sum::<f64>();
            let (before, after) = (&pair[0].0[name], &pair[1].0[name]);
            let want: Vec<f64> = before.iter().enumerate().map(|(i, w)| f64::from(*w) - LR * faded(i)).collect();
            same_step(&format!("step {step}, {name}"), before, after, &want);
        }
    }
}

#[test]
fn integer_latents_stay_on_their_grid_and_are_rounded_by_chance() {
    let cfg = small();
    let shared = Shared { mode: Mode::Integer { unit: UNIT }, eps: 3e-4, ..Shared::default() };
    let mut trainer = trainer(&cfg, &shared, &UpdateRule::default());
    let mut done = steps(&mut trainer, &cfg, 4);
    done.push((weights(&trainer), done[0].1.clone()));
    let name = NAMES[1];
    let dims = dims_of(&cfg, name);
    let n: usize = dims.iter().product();
    let mut moved = 0;
    for (step, pair) in done.windows(2).enumerate() {
        let (before, after) = (&pair[0].0[name], &pair[1].0[name]);
        let g = estimate(&shared, name, &dims, step as u64, &pair[0].1);
        let mut chance = vec![0.0; n];
        Stream::new(&format!("{name}#step"), step as u32, 0, SEED).fill_uniform(0, &mut chance);
        let mut others = 0;
        for i in 0..n {
            let exact = (f64::from(before[i]) - LR * g[i]) / f64::from(UNIT);
            let want = (exact + f64::from(chance[i])).floor().clamp(-127.0, 127.0) as f32 * UNIT;
            assert!(
                (after[i] / UNIT).fract() == 0.0 && (after[i] / UNIT).abs() <= 127.0,
                "{} is off the grid",
                after[i]
            );
            others += usize::from(after[i] != want);
            moved += usize::from(step > 0 && after[i] != before[i]);
        }
        assert!(others <= n / 1000, "step {step}: {others} of {n} latents are rounded otherwise");
    }
    assert!(moved > 0 && moved < 3 * n, "{moved} latents move");
}

#[test]
fn thin_products_equal_dense_ones() {
    let cfg = model(Scale::Test, &["quantization.activation_method=none", "tsp_knot.enabled=false"]);
    let batch = batch(&cfg);
    for family in
        [Family::Lozo { rank: 2, period: 3 }, Family::SubZero { rank: 2, period: 3 }, Family::TeZo { rank: 1 }]
    {
        let thin = Shared { mode: Mode::Additive, family, directions: 2, eps_rel: Some(0.1), ..Shared::default() };
        let all = Mask::Kept { by: Score::Large, share: 1.0, refresh: 1 };
        let dense = Shared { mask: all, ..thin.clone() };
        let [thin, dense] = [thin, dense].map(|shared| {
            let probed = trainer(&cfg, &shared, &UpdateRule::default()).probe(&batch, 7).expect("losses");
            [probed.plus, probed.minus].concat()
        });
        assert!(thin[0] != thin[1] && thin[0] != thin[2], "probes differ: {thin:?}");
        for (a, b) in thin.iter().zip(&dense) {
            assert!((a - b).abs() <= 2e-5, "{family:?}: {thin:?} is not {dense:?}");
        }
    }
}

#[test]
fn probed_scales_equal_packed_weights_with_other_scales() {
    let cfg = model(Scale::Test, &[]);
    let (batch, eps, step) = (batch(&cfg), 1e-2, 7);
    // Scales alone: the other weights of the packed plan stay as they are.
    let trainable = parameters(&cfg).into_iter().filter(|p| p.kind == ParamKind::Ternary).map(|p| p.name).collect();
    for one_sided in [false, true] {
        let shared = Shared { mode: Mode::Scales, directions: 2, one_sided, eps, ..Shared::default() };
        let scheme = Scheme::Shared(shared);
        let kinds =
            [EntryKind::DualLoss(scheme.clone()), EntryKind::Update(scheme, UpdateRule::default()), EntryKind::Loss];
        let spec = |kind| EntrySpec { kind, rows: ROWS, tokens: TOKENS, depth: None };
        let options = Options {
            entries: kinds.map(spec).into(),
            trainable: Some(Clone::clone(&trainable)),
            ..Options::default()
        };
        let plan = compile(&cfg, &options).unwrap_or_else(|e| panic!("{e}"));
        let mut exec = Executable::new(plan, &ExecOptions { threads: 2, ..ExecOptions::default() }).expect("it runs");
        init::initialise(&mut exec, 5).expect("weights are initialised");
        let latents: HashMap<String, Vec<f32>> = parameters(&cfg)
            .into_iter()
            .filter_map(|p| Some((p.name.clone(), exec.weight_f32(&p.name).ok()?.into_owned())))
            .collect();
        let probed = Trainer::new(exec, SEED).expect("a plan").probe(&batch, step).expect("losses");
        for (k, signed) in [(0, eps), (1, eps), (1, -eps)] {
            if one_sided && signed < 0.0 {
                continue;
            }
            let mut plain = executable(&cfg, vec![EntryKind::Loss], true);
            for w in plain.plan().weights.clone() {
                if let Some(values) = latents.get(&w.name) {
                    plain.set_weight(&w.name, &w.ty.dims, values).expect("it fits");
                }
            }
            set_packed(&cfg, &mut plain, &latents, k, signed, step);
            for (name, values) in [("tokens", &batch.tokens), ("labels", &batch.labels), ("seg", &batch.seg)] {
                plain.set_input("loss", name, values).expect("it fits");
            }
            plain.run("loss").expect("it runs");
            let losses = plain.output::<f32>("loss", "losses").expect("losses");
            let want = losses.iter().map(|&x| f64::from(x) * TOKENS as f64).sum::<f64>() / (ROWS * TOKENS) as f64;
            let found = if signed > 0.0 { probed.plus[k] } else { probed.minus[k] };
            assert_eq!(found, want, "direction {k}, {signed}, one-sided {one_sided}");
        }
    }
}

/// Codes of the latents, and their scales multiplied by `1 + signed z`.
fn set_packed(
    cfg: &ModelConfig,
    exec: &mut Executable,
    latents: &HashMap<String, Vec<f32>>,
    k: usize,
    signed: f32,
    step: u64,
) {
    let q = &cfg.quantization;
    let mut stacks: HashMap<String, Vec<(usize, Tensor, Tensor)>> = HashMap::new();
    for p in parameters(cfg).into_iter().filter(|p| p.kind == ParamKind::Ternary && latents.contains_key(&p.name)) {
        let w = Tensor::f32(&p.dims, latents[&p.name].clone());
        let mut alpha = GroupScale { mode: ScaleMode::PerGroup(q.group_size) }.eval(&[&w]).remove(0);
        let pack = PackTernary { group: q.group_size, ratio: q.threshold_ratio as f32 };
        let codes = pack.eval(&[&w, &alpha]).remove(0);
        let mut z = vec![0.0; alpha.ty.numel()];
        rng::fill_rademacher(&mut z, &format!("{}#alpha", p.name), step as u32, k as u32, SEED);
        let scaled = alpha.as_f32().iter().zip(z).map(|(a, z)| a * (1.0 + signed * z)).collect();
        alpha.data = Data::F32(scaled);
        let (name, at) = expert_stack(&p.name).unwrap_or((p.name, 0));
        let alpha = BlockScales {}.eval(&[&alpha]).remove(0);
        stacks.entry(name).or_default().push((at, codes, alpha));
    }
    for (name, mut parts) in stacks {
        parts.sort_by_key(|part| part.0);
        let lead = if name.contains('*') { vec![parts.len()] } else { vec![] };
        let dims = |t: &Tensor| [&lead[..], &t.ty.dims].concat();
        let bytes = |t: &Tensor| match &t.data {
            Data::U8(bytes) => bytes.clone(),
            _ => panic!("codes are bytes"),
        };
        let codes: Vec<u8> = parts.iter().flat_map(|p| bytes(&p.1)).collect();
        let alpha: Vec<f32> = parts.iter().flat_map(|p| p.2.as_f32().to_vec()).collect();
        exec.set_weight(&format!("{name}{CODES}"), &dims(&parts[0].1), &codes).expect("codes fit");
        exec.set_weight(&format!("{name}{SCALES}"), &dims(&parts[0].2), &alpha).expect("scales fit");
    }
}

#[test]
fn sequences_of_a_group_share_a_direction() {
    let cfg = model(Scale::Test, &[]);
    let trainable = parameters(&cfg).into_iter().map(|p| p.name).collect::<std::collections::HashSet<_>>();
    let losses = |tokens: &[i32], group: usize| {
        let rows = tokens.len() / TOKENS;
        let scheme = Scheme::PerSequence(PerSequence { rank: 2, group, ..PerSequence::default() });
        let spec = |kind| EntrySpec { kind, rows, tokens: TOKENS, depth: None };
        let entries = vec![spec(EntryKind::DualLoss(scheme))];
        let plan = compile(&cfg, &Options { entries, trainable: Some(trainable.clone()), ..Options::default() });
        let options = ExecOptions { threads: 2, ..ExecOptions::default() };
        let mut exec = Executable::new(plan.expect("it compiles"), &options).expect("it runs");
        init::initialise(&mut exec, 5).expect("weights are initialised");
        let labels: Vec<i32> = tokens.iter().map(|t| (t * 7 + 3) % cfg.vocab_size as i32).collect();
        for (name, values) in [("tokens", tokens), ("labels", &labels), ("seg", &vec![0; tokens.len()])] {
            exec.set_input("dual_loss", name, values).expect("it fits");
        }
        exec.set_input("dual_loss", "seed", &[SEED as i32, 0]).expect("two words");
        exec.set_input("dual_loss", "step", &[3]).expect("one word");
        exec.run("dual_loss").expect("it runs");
        let losses = exec.output::<f32>("dual_loss", "losses").expect("losses");
        losses.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
    };
    let row = |r: usize| (0..TOKENS).map(move |i| ((i * 37 + r * 101) % 97) as i32);
    let of = |rows: &[usize]| rows.iter().flat_map(|&r| row(r)).collect::<Vec<i32>>();
    let grouped = losses(&of(&[0, 1, 2, 3]), 2);
    // The first and the second sequence of each group by themselves.
    for (member, rows) in [[0, 2], [1, 3]].into_iter().enumerate() {
        let alone = losses(&of(&rows), 1);
        let same = [member, 2 + member, 4 + member, 6 + member].map(|i| grouped[i]);
        assert_eq!(same[..], alone[..], "sequence {member} of the groups");
    }
    assert!(grouped[0] != grouped[4], "signs differ");
}
