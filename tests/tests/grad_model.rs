//! Gradients of the whole model against the executable specification: by reference semantics, and compiled on every emitter.
//!
//! Golden files sample every gradient and give its length. With int8 activations an activation on the other side of a rounding tie
//! moves later layers, so that file bounds the median distance. What a knot reads back is as discontinuous: one last bit of the embedding
//! turns a bit of a sketch, which moves the gradients of its gate and its projection by percents and no others.

use std::collections::HashMap;

use chimera_codegen::emitters;
use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::config::{Activation, ParamKind, parameters};
use chimera_frontends::layers::Depth;
use chimera_ir::Tensor;
use chimera_runtime::call::{self, Tensors};
use chimera_runtime::exec::Executable;
use chimera_runtime::files::HostTensor;
use chimera_tests::engine::exec_options;
use chimera_tests::golden::{Golden, assert_near};

/// Relative distances of all gradients, by name.
fn distances(golden: &Golden, grads: &HashMap<String, Tensor>) -> Vec<(String, f64)> {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let mut all = vec![];
    for (name, want) in golden.with_prefix("grad.norm.") {
        let got = &grads[&name];
        let step = (got.ty.numel() / 128).max(1);
        let samples = golden.tensor(&format!("grad.sample.{name}"));
        let sampled: Vec<f32> = got.as_f32().iter().copied().step_by(step).collect();
        assert_eq!(sampled.len(), samples.ty.numel(), "{name}");
        let apart = norm(&mut sampled.iter().zip(samples.as_f32()).map(|(a, b)| f64::from(a - b)));
        let size = norm(&mut samples.as_f32().iter().map(|&x| x.into()));
        let length = norm(&mut got.as_f32().iter().map(|&x| x.into()));
        let want = f64::from(want.as_f32()[0]);
        assert!(apart.is_finite() && length.is_finite(), "{name} is finite");
        let relative = |gap: f64, size: f64| if size > 0.0 { gap / size } else { gap };
        all.push((name, relative(apart, size).max(relative((length - want).abs(), want))));
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}

/// The outputs of the gradient of a file on an emitter and threads, with another loop depth than the configuration's if it is given.
fn run(
    golden: &Golden,
    (emitter, threads): (&str, usize),
    depth: Option<Depth>,
    more: Option<(&str, Tensor)>,
) -> Tensors {
    let weights = Golden::open("model_params").with_prefix("");
    let [rows, tokens] = golden.tensor("in.tokens").ty.dims[..] else { panic!("tokens are a matrix") };
    let spec = EntrySpec { kind: EntryKind::Grad, rows, tokens, depth };
    let options = Options { entries: vec![spec], ..Options::default() };
    let plan = compile(&golden.model(), &options).expect("the gradient compiles");
    let mut exe = Executable::new(plan, &exec_options(emitter, threads)).expect("the plan is executable");
    for w in exe.plan().weights.clone() {
        let t = &weights[&w.name];
        exe.set_weight(&w.name, &t.ty.dims, t.as_f32()).expect("the weight fits");
    }
    let int = |t: &Tensor| -> Vec<i32> { t.to_i64().into_iter().map(|x| x as i32).collect() };
    let host = |t: &Tensor| HostTensor::from_i32(&t.ty.dims, &int(t)).expect("the shape fits");
    let mut inputs: Tensors = golden.with_prefix("in.").iter().map(|(n, t)| (n.clone(), host(t))).collect();
    inputs.extend(more.map(|(n, t)| (n.to_owned(), host(&t))));
    call::run(&mut exe, "grad", &inputs).expect("the call succeeds")
}

fn check(file: &str, emitter: &str) {
    let golden = Golden::open(file);
    let (cfg, out) = (golden.model(), run(&golden, (emitter, 2), None, None));
    let gap = (out["loss"].to_f32()[0] - golden.tensor("out.loss").as_f32()[0]).abs();
    assert!(gap <= golden.tolerance("loss"), "{file}, {emitter}: the loss is {gap} off");

    let trained: Vec<_> = parameters(&cfg).into_iter().filter(|p| p.kind != ParamKind::Buffer).collect();
    let mut grads = HashMap::new();
    for p in &trained {
        let t = &out[&format!("grad.{}", p.name)];
        assert_eq!(t.shape(), p.dims, "{}", p.name);
        grads.insert(p.name.clone(), Tensor::f32(t.shape(), t.to_f32()));
    }
    assert_eq!(out.keys().filter(|n| n.starts_with("grad.")).count(), trained.len(), "no other gradients");
    let all = distances(&golden, &grads);
    assert_eq!(all.len(), trained.len(), "the file has all gradients");
    if cfg.quantization.activation == Activation::Float {
        let knot = f64::from(golden.tolerance("grad_rtol_knot_gate"));
        let rest = f64::from(golden.tolerance("grad_rtol"));
        let read_back = |name: &str| name.contains(".knot_gate") || name.contains(".knot_proj");
        let bound = |name: &str| if read_back(name) { knot } else { rest };
        let bad: Vec<_> = all.iter().filter(|(n, d)| *d > bound(n)).collect();
        assert!(bad.is_empty(), "{file}, {emitter}: {} of {}: {bad:?}", bad.len(), all.len());
    } else {
        let median = all[all.len() / 2].1;
        assert!(median <= f64::from(golden.tolerance("grad_median_rtol")), "{file}, {emitter}: {median}");
    }
}

#[test]
fn float_activations() {
    emitters().iter().for_each(|e| check("model_none", e.name()));
}

#[test]
fn int8_activations() {
    emitters().iter().for_each(|e| check("model_absmax_per_block", e.name()));
}

/// Rows of their own depth that all have the same are rows of one depth.
#[test]
fn rows_of_their_own_depth() {
    let golden = Golden::open("model_none");
    let emitter = emitters()[0].name();
    for depth in [1, 2, 3] {
        let fixed = run(&golden, (emitter, 2), Some(Depth::Fixed(depth)), None);
        let given = ("depth", Tensor::i32(&[3], vec![depth as i32; 3]));
        let own = run(&golden, (emitter, 2), Some(Depth::PerRow { max: 3, adaptive: false }), Some(given));
        for (name, want) in fixed.iter().filter(|(n, _)| n.starts_with("grad.")) {
            let [got, want] = [&own[name], want].map(|t| Tensor::f32(t.shape(), t.to_f32()));
            assert_near(&format!("depth {depth}: {name}"), &got, &want, 1e-3);
        }
    }
}

#[test]
fn emitters_and_threads_do_not_show() {
    let golden = Golden::open("model_absmax_per_block");
    let bits = |way| -> std::collections::BTreeMap<String, Vec<u32>> {
        let out = run(&golden, way, None, None);
        out.iter().map(|(n, t)| (n.clone(), t.to_f32().iter().map(|x| x.to_bits()).collect())).collect()
    };
    let want = bits((emitters()[0].name(), 1));
    for e in emitters() {
        let got = bits((e.name(), 2));
        let differ: Vec<&String> = want.iter().filter(|(n, bits)| got[*n] != **bits).map(|(n, _)| n).collect();
        assert!(differ.is_empty() && got.len() == want.len(), "{}: {differ:?}", e.name());
    }
}
