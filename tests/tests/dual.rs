//! Stacked probes against separate forward passes, bit for bit, and one thread against two.

use std::collections::HashSet;

use chimera_compiler::{EntryKind, EntrySpec, Family, Mode, Options, PerSequence, Scheme, Shared, compile};
use chimera_frontends::config::{ModelConfig, Overrides, ParamKind, Scale, parameters, preset};
use chimera_frontends::models::chimera;
use chimera_ir::ops::Distribution;
use chimera_runtime::{
    exec::{ExecOptions, Executable},
    rng,
    train::init,
};

const SEED: u64 = 0x0123_4567_89ab_cdef;
const STEP: u32 = 7;
const ROWS: usize = 3;
const TOKENS: usize = 21;

fn model(scale: Scale, sets: &[&str]) -> ModelConfig {
    let sets = sets.iter().map(|s| (*s).to_owned()).collect();
    preset(scale, &Overrides { sets, ..Overrides::default() }).expect("a preset loads").model
}

fn executable(
    cfg: &ModelConfig,
    kind: EntryKind,
    rows: usize,
    trainable: &HashSet<String>,
    threads: usize,
) -> Executable {
    let entry = EntrySpec { kind, rows, tokens: TOKENS, depth: None };
    let options = Options { entries: vec![entry], trainable: Some(trainable.clone()), ..Options::default() };
    let plan = compile(cfg, &options).expect("the model compiles");
    let mut exec = Executable::new(plan, &ExecOptions { threads, ..ExecOptions::default() }).expect("the plan runs");
    init::initialise(&mut exec, 5).expect("weights are initialised");
    exec
}

/// Tokens with a document boundary inside, and labels with unused positions.
fn batch(cfg: &ModelConfig) -> [Vec<i32>; 3] {
    let n = ROWS * TOKENS;
    let at = |i: usize, k: usize| ((i * 37 + k * 11) % cfg.vocab_size) as i32;
    let tokens = (0..n).map(|i| at(i, 1)).collect();
    let labels = (0..n).map(|i| if i % 7 == 3 { -100 } else { at(i, 2) }).collect();
    let seg = (0..n).map(|i| i32::from(i % TOKENS >= 9 && i / TOKENS != 1)).collect();
    [tokens, labels, seg]
}

fn set_batch(exec: &mut Executable, entry: &str, batch: [&[i32]; 3]) {
    for (name, values) in ["tokens", "labels", "seg"].into_iter().zip(batch) {
        exec.set_input(entry, name, values).expect("the input fits");
    }
}

fn dual_losses(exec: &mut Executable, batch: &[Vec<i32>; 3]) -> Vec<f32> {
    set_batch(exec, "dual_loss", [&batch[0], &batch[1], &batch[2]]);
    exec.set_input("dual_loss", "seed", &[SEED as i32, (SEED >> 32) as i32]).expect("two words");
    exec.set_input("dual_loss", "step", &[STEP as i32]).expect("one word");
    exec.run("dual_loss").expect("the probes run");
    exec.output::<f32>("dual_loss", "losses").expect("losses").to_vec()
}

fn names(cfg: &ModelConfig, wanted: impl Fn(&str, ParamKind) -> bool) -> HashSet<String> {
    parameters(cfg).into_iter().filter(|p| wanted(&p.name, p.kind)).map(|p| p.name).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Losses of the given rows by the plain loss graph, with some weights replaced.
fn separate(exec: &mut Executable, perturbed: &[(String, Vec<usize>, Vec<f32>)], batch: [&[i32]; 3]) -> Vec<f32> {
    let before: Vec<Vec<f32>> =
        perturbed.iter().map(|(n, ..)| exec.weight_f32(n).expect("a weight").into_owned()).collect();
    for (name, dims, values) in perturbed {
        exec.set_weight(name, dims, values).expect("the weight fits");
    }
    set_batch(exec, "loss", batch);
    exec.run("loss").expect("the loss runs");
    let losses = exec.output::<f32>("loss", "losses").expect("losses").to_vec();
    for ((name, dims, _), values) in perturbed.iter().zip(before) {
        exec.set_weight(name, dims, &values).expect("the weight fits");
    }
    losses
}

/// `w + (sign eps) z` for every named weight that the model has and the loss reads.
fn moved(
    cfg: &ModelConfig,
    exec: &Executable,
    trainable: &HashSet<String>,
    draw: impl Fn(&mut [f32], &str),
    step: f32,
) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let read: HashSet<&str> = exec.plan().weights.iter().map(|w| w.name.as_str()).collect();
    parameters(cfg)
        .into_iter()
        .filter(|p| trainable.contains(&p.name) && read.contains(p.name.as_str()))
        .map(|p| {
            let mut w = exec.weight_f32(&p.name).expect("a weight").into_owned();
            let mut z = vec![0.0; w.len()];
            draw(&mut z, &p.name);
            w.iter_mut().zip(z).for_each(|(w, z)| *w += step * z);
            (p.name, p.dims, w)
        })
        .collect()
}

#[test]
fn shared_directions_equal_separate_forward_passes() {
    let eps = 1e-3;
    for (scale, sets) in
        [(Scale::Pico, &[][..]), (Scale::Test, &["quantization.activation_method=none"][..]), (Scale::Test, &[][..])]
    {
        let cfg = model(scale, sets);
        let last = format!("layers.{}.", cfg.layers.len() - 1);
        let float = |kind| matches!(kind, ParamKind::Vector | ParamKind::Matrix | ParamKind::Embedding);
        // All float weights, and those of the last layer alone, where the rest of the model is computed once.
        let sets = [names(&cfg, |_, k| float(k)), names(&cfg, |n, k| float(k) && n.starts_with(&last))];
        for (i, trainable) in sets.iter().enumerate() {
            let scheme = Scheme::Shared(Shared { directions: 2, eps, ..Shared::default() });
            let mut dual = executable(&cfg, EntryKind::DualLoss(scheme), ROWS, trainable, 1);
            let shared = dual.plan().entry("dual_loss").expect("the entry").shared;
            assert!(i == 0 || shared.0 * 3 > shared.1, "the work below the last layer is shared: {shared:?}");
            let data = batch(&cfg);
            let got = dual_losses(&mut dual, &data);
            assert_eq!(got.len(), 4 * ROWS);
            let mut plain = executable(&cfg, EntryKind::Loss, ROWS, trainable, 1);
            for probe in 0..4 {
                let sign = if probe < 2 { 1.0 } else { -1.0 };
                let draw = |z: &mut [f32], name: &str| rng::fill_rademacher(z, name, STEP, (probe % 2) as u32, SEED);
                let weights = moved(&cfg, &plain, trainable, draw, sign * eps);
                let want = separate(&mut plain, &weights, [&data[0], &data[1], &data[2]]);
                let got = &got[probe * ROWS..][..ROWS];
                assert_eq!(bits(got), bits(&want), "{scale} set {i} probe {probe}: {got:?} is not {want:?}");
            }
        }
    }
}

#[test]
fn directions_of_single_sequences_equal_separate_forward_passes() {
    let cfg = model(Scale::Pico, &[]);
    let trainable = names(&cfg, |_, kind| kind == ParamKind::Vector);
    let sigma_vec = 0.01;
    let scheme = Scheme::PerSequence(PerSequence { rank: 1, kappa: 0.1, sigma_vec, group: 1 });
    let mut dual = executable(&cfg, EntryKind::DualLoss(scheme), ROWS, &trainable, 1);
    let data = batch(&cfg);
    let got = dual_losses(&mut dual, &data);
    let mut plain = executable(&cfg, EntryKind::Loss, 1, &trainable, 1);
    assert_eq!(got.len(), 2 * ROWS);
    for (row, got) in got.into_iter().enumerate() {
        let (member, sign) = (row % ROWS, if row < ROWS { 1.0 } else { -1.0 });
        let draw = |z: &mut [f32], name: &str| rng::fill_gaussian(z, name, STEP, member as u32, SEED);
        let weights = moved(&cfg, &plain, &trainable, draw, sign * sigma_vec);
        let part = |x: &Vec<i32>| x[member * TOKENS..][..TOKENS].to_vec();
        let [a, b, c] = [part(&data[0]), part(&data[1]), part(&data[2])];
        let want = separate(&mut plain, &weights, [&a, &b, &c]);
        assert_eq!(got.to_bits(), want[0].to_bits(), "row {row}: {got} is not {}", want[0]);
    }
}

#[test]
fn one_thread_and_two_give_the_same_bits_for_every_scheme() {
    let family = Family::Dense(Distribution::Gaussian);
    let mezo = |mode| Scheme::Shared(Shared { mode, family, eps_rel: Some(0.1), ..Shared::default() });
    for scheme in [
        Scheme::PerSequence(PerSequence { rank: 2, kappa: 0.1, sigma_vec: 0.01, group: 1 }),
        mezo(Mode::Requantise),
        mezo(Mode::Additive),
    ] {
        let cfg = model(Scale::Test, &[]);
        let all = names(&cfg, |_, kind| kind != ParamKind::Buffer);
        let losses = |threads| {
            let mut exec = executable(&cfg, EntryKind::DualLoss(scheme.clone()), ROWS, &all, threads);
            dual_losses(&mut exec, &batch(&cfg))
        };
        let one = losses(1);
        assert!(one.iter().all(|l| l.is_finite()), "{scheme:?}: {one:?}");
        assert_ne!(one[0], one[ROWS], "the two signs differ");
        assert_eq!(bits(&one), bits(&losses(2)), "{scheme:?}");
    }
}

/// The layer of a weight; the embedding is in front of all, the final norm behind.
fn layer_of(cfg: &ModelConfig, name: &str) -> usize {
    let looped = cfg.looping.as_ref().map_or(0, |l| l.body[0]);
    match name.strip_prefix("layers.").and_then(|rest| rest.split('.').next()) {
        Some(layer) => layer.parse().expect("a number"),
        None if name.starts_with("loop.") => looped,
        None if name == "norm.weight" => cfg.layers.len(),
        None => 0,
    }
}

#[test]
fn a_cut_model_gives_the_losses_of_the_whole() {
    let cfg = model(Scale::Test, &[]);
    let layers = cfg.layers.len();
    let scheme = Scheme::PerSequence(PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 });
    let dual = EntryKind::DualLoss(scheme);
    let data = batch(&cfg);
    let (mut cuts, mut refused) = (0, 0);
    for cut in 0..=layers {
        let trainable = names(&cfg, |name, kind| kind != ParamKind::Buffer && layer_of(&cfg, name) >= cut);
        let spec = |kind, rows| EntrySpec { kind, rows, tokens: TOKENS, depth: None };
        let entries = vec![spec(dual.clone(), ROWS), spec(EntryKind::Prefix, 1)];
        let trained = Some(trainable.clone());
        let made = compile(&cfg, &Options { entries, trainable: trained, cut: Some(cut), ..Options::default() });
        if cut == 0 || chimera::cut(&cfg, cut) != cut {
            let error = made.expect_err("inside the loop, or in front of all").to_string();
            assert!(error.contains(&format!("cut in front of layer {}", chimera::cut(&cfg, cut).max(1))), "{error}");
            refused += 1;
            continue;
        }
        let mut exec = Executable::new(made.expect("a plan"), &ExecOptions::default()).expect("the plan runs");
        init::initialise(&mut exec, 5).expect("weights are initialised");
        let mut before: Vec<f32> = vec![];
        for row in 0..ROWS {
            for (name, values) in [("tokens", &data[0]), ("seg", &data[2])] {
                exec.set_input("prefix", name, &values[row * TOKENS..][..TOKENS]).expect("the input fits");
            }
            if exec.plan().entry("prefix").is_some_and(|e| e.inputs.iter().any(|i| i.0 == "depth")) {
                exec.set_input("prefix", "depth", &[2]).expect("a depth");
            }
            exec.run("prefix").expect("the prefix runs");
            before.extend(exec.output::<f32>("prefix", "prefix").expect("an output"));
        }
        exec.set_input("dual_loss", "prefix", &before).expect("the input fits");
        let depths = |exec: &mut Executable| {
            if exec.plan().entry("dual_loss").is_some_and(|e| e.inputs.iter().any(|i| i.0 == "depth")) {
                exec.set_input("dual_loss", "depth", &[2; ROWS]).expect("depths");
            }
        };
        depths(&mut exec);
        let mut whole = executable(&cfg, dual.clone(), ROWS, &trainable, 2);
        depths(&mut whole);
        assert_eq!(bits(&dual_losses(&mut exec, &data)), bits(&dual_losses(&mut whole, &data)), "cut {cut}");
        cuts += 1;
    }
    assert!(cuts > 2 && refused > 1, "{cuts} cuts, {refused} refused");
    let entries = vec![EntrySpec { kind: EntryKind::Prefix, rows: 1, tokens: TOKENS, depth: None }];
    assert!(compile(&cfg, &Options { entries, ..Options::default() }).is_err(), "a prefix of nothing");
}
