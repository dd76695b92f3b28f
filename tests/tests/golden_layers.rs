//! Single layers against the executable specification: with incoming states and document resets, on every engine.
//!
//! Each file is checked in the chunked and in the recurrent form; both must meet the tolerance that the file states. So must the
//! gradients of `sum(y dy)`, where the file has them.

use std::collections::HashMap;

use chimera_frontends::config::{MixerKind, ModelConfig};
use chimera_frontends::layers::{Depth, Form, Net, Shape, Stream};
use chimera_ir::graph::Kind;
use chimera_ir::ops::{RopeScaling, RopeTable};
use chimera_ir::{DType, Data, Graph, Tensor, Type, Value};
use chimera_tests::engine::Engine;
use chimera_tests::golden::{Golden, assert_close};
use chimera_tests::reference::Memory;

fn shape(x: &Tensor, form: Form) -> Shape {
    Shape { rows: x.ty.dims[0], tokens: x.ty.dims[1], form, carry: true, depth: Depth::Fixed(1) }
}

/// The mixer of layer `layer` as a graph with inputs `x`, `emb` and `pos`, and outputs `y` and `stats`.
fn mixer(cfg: &ModelConfig, layer: usize, shape: Shape) -> Graph {
    let mut net = Net::new(cfg, shape);
    let (ids, wide) = (Type::i32(&[shape.rows, shape.tokens]), net.activation(cfg.hidden_size));
    let x = net.g.input("x", wide.clone());
    let emb = net.g.input("emb", wide);
    let pos = net.g.input("pos", ids);
    let rope = net.titans_in(layer..=layer).then(|| {
        let op = RopeTable { dim: cfg.head_dim, theta: cfg.titans.rope_theta as f32, scaling: RopeScaling::None };
        let tables = net.g.ops(op, &[pos]).expect("positions make tables");
        (tables[0], tables[1])
    });
    let x = net.activate(x).expect("the input is a float activation");
    let y = net.mixer(cfg.layers[layer], &format!("layers.{layer}.attn"), x, Stream { pos, emb, rope });
    net.g.outputs.push(("y".to_owned(), y.expect("the layer builds")));
    let stats = net.side.pop().map(|(_, v)| ("stats".to_owned(), v));
    net.g.outputs.extend(stats);
    net.g.verify().expect("the graph is sound");
    net.g
}

/// A state of the specification as the plan holds it: see `chimera_runtime::call::states`.
fn inward(cfg: &ModelConfig, name: &str, t: &Tensor) -> Vec<(String, Tensor)> {
    let mut one = t.clone();
    if name == "c" {
        one = Tensor { ty: t.ty.with(DType::I16), data: Data::I16(t.to_i64().into_iter().map(|x| x as i16).collect()) };
    }
    if name != "k" && name != "v" {
        return vec![(name.to_owned(), one)];
    }
    let [rows, heads, n, k] = t.ty.dims[..] else { panic!("a window is [rows, heads, tokens, k]") };
    let (window, from) = (cfg.titans.window, t.as_f32());
    let mut ring = vec![0.0; rows * window * heads * k];
    for (i, x) in from.iter().enumerate() {
        let (at, token, head, row) = (i % k, i / k % n, i / k / n % heads, i / k / n / heads);
        ring[((row * window + token) * heads + head) * k + at] = *x;
    }
    let count = Tensor::i32(&[rows, heads], vec![n as i32; rows * heads]);
    vec![(name.to_owned(), Tensor::f32(&[rows, window, heads * k], ring)), ("count".to_owned(), count)]
}

/// The latest `window - 1` tokens of a ring in order, `[rows, heads, n, k]`. Every row has seen that many.
fn unrolled(ring: &Tensor, count: &Tensor) -> Tensor {
    let ([rows, window, width], [_, heads]) = (&ring.ty.dims[..], &count.ty.dims[..]) else { panic!("see the types") };
    let (k, n) = (width / heads, window - 1);
    let mut out = Vec::with_capacity(rows * n * width);
    for (i, seen) in count.to_i64().into_iter().enumerate() {
        let (row, head, seen) = (i / heads, i % heads, seen as usize);
        assert!(seen >= n, "row {row} has seen {seen} tokens");
        for number in seen - n..seen {
            let at = ((row * window + number % window) * heads + head) * k;
            out.extend_from_slice(&ring.as_f32()[at..at + k]);
        }
    }
    Tensor::f32(&[*rows, *heads, n, k], out)
}

/// The mean over heads of `[rows, tokens, heads]`.
fn mean_over_heads(t: &Tensor) -> Tensor {
    let heads = t.ty.cols();
    let means = t.as_f32().chunks_exact(heads).map(|h| h.iter().sum::<f32>() / heads as f32).collect();
    Tensor::f32(&t.ty.dims[..2], means)
}

fn as_floats(t: &Tensor) -> Tensor {
    match &t.data {
        Data::F32(_) => t.clone(),
        _ => Tensor::f32(&t.ty.dims, t.to_i64().into_iter().map(|x| x as f32).collect()),
    }
}

fn check_mixer(file: &str, layer: usize, kind: MixerKind) {
    let golden = Golden::open(file);
    let cfg = golden.model();
    assert_eq!(cfg.layers[layer], kind);
    let (rtol, atol) = (golden.tolerance("rtol"), golden.tolerance("atol"));
    let x = golden.tensor("in.x");
    let emb = if golden.has("in.emb") { golden.tensor("in.emb") } else { Tensor::zeros(&x.ty) };
    let inputs = HashMap::from([("x".into(), x.clone()), ("emb".into(), emb), ("pos".into(), golden.tensor("in.pos"))]);
    for form in [Form::Chunked, Form::Recurrent] {
        let g = mixer(&cfg, layer, shape(&x, form));
        for engine in Engine::all() {
            let at = |what: &str| format!("{file}, {form:?}, {engine:?}: {what}");
            let mut memory = Memory { weights: golden.with_prefix("param."), ..Memory::default() };
            for (name, t) in golden.with_prefix("in.state.") {
                let states = inward(&cfg, &name, &t).into_iter();
                memory.states.extend(states.map(|(n, t)| ((format!("layers.{layer}.{n}"), 0), t)));
            }
            let out = engine.run(&g, &inputs, &mut memory);
            assert_close(&at("y"), &out["y"], &golden.tensor("out.y"), rtol, atol);
            if golden.has("out.stats") {
                let want = golden.tensor("out.stats");
                let mean = kind == MixerKind::Titans;
                let got = if mean { mean_over_heads(&out["stats"]) } else { out["stats"].clone() };
                assert_close(&at("stats"), &got, &want, rtol, atol);
            }
            for (name, want) in golden.with_prefix("state.") {
                let state = |name: &str| &memory.states[&(format!("layers.{layer}.{name}"), 0)];
                let got = match name.as_str() {
                    "k" | "v" => unrolled(state(&name), state("count")),
                    _ => as_floats(state(&name)),
                };
                let exact = name == "c";
                let (rtol, atol) = if exact { (0.0, 0.0) } else { (rtol, atol) };
                assert_close(&at(&name), &got, &as_floats(&want), rtol, atol);
            }
        }
    }
}

#[test]
fn gated_deltanet() {
    check_mixer("layer_gated_deltanet", 0, MixerKind::GatedDelta);
}

#[test]
fn mlstm() {
    check_mixer("layer_mlstm", 1, MixerKind::Mlstm);
}

#[test]
fn titans_with_a_window() {
    check_mixer("layer_titans_swa", 3, MixerKind::Titans);
}

#[test]
fn titans_without_a_window() {
    check_mixer("layer_titans_persistent_only", 3, MixerKind::Titans);
}

#[test]
fn span_knot() {
    check_mixer("layer_span_knot", 7, MixerKind::SpanKnot);
}

/// The graph of the gradients of `sum(y dy)` with respect to `x` and every weight, `y` being the first output of `g`.
fn gradients(mut g: Graph) -> Graph {
    let y = g.outputs[0].1;
    let ends: Vec<(String, Value)> = g
        .nodes()
        .iter()
        .filter_map(|n| match &n.kind {
            Kind::Param(name) => Some((name.clone(), n.outs[0])),
            Kind::Input(name) if name == "x" => Some((name.clone(), n.outs[0])),
            _ => None,
        })
        .collect();
    let dy = g.input("dy", g.ty(y).clone());
    let wanted: Vec<Value> = ends.iter().map(|e| e.1).collect();
    let grads = g.grad(y, dy, &wanted).expect("the layer is differentiable");
    let found = |(name, v): &(String, Value)| Some((name.clone(), grads[v.0 as usize]?));
    g.outputs = ends.iter().filter_map(found).collect();
    g.verify().expect("the gradient is sound");
    g
}

/// Compare the gradients of a layer with those of its file, on every engine.
fn check_gradients(file: &str, golden: &Golden, g: Graph, inputs: &HashMap<String, Tensor>, memory: &Memory) {
    let (g, mut inputs) = (gradients(g), inputs.clone());
    inputs.insert("dy".to_owned(), golden.tensor("in.dy"));
    let wanted = golden.with_prefix("grad.");
    assert!(wanted.len() > 3, "{file} has gradients");
    for engine in Engine::all() {
        let out = engine.run(&g, &inputs, &mut memory.clone());
        for (name, want) in wanted.iter().filter(|(name, _)| !name.starts_with("state.")) {
            // A sum over tokens is as exact as its largest part.
            let most = want.as_f32().iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let (rtol, atol) = (golden.tolerance("rtol"), golden.tolerance("atol"));
            assert_close(
                &format!("{file}, {engine:?}: d {name}"),
                &out[name],
                want,
                10.0 * rtol,
                10.0 * rtol * most + atol,
            );
        }
    }
}

fn check_mixer_gradients(file: &str, layer: usize) {
    let golden = Golden::open(file);
    let cfg = golden.model();
    let x = golden.tensor("in.x");
    let emb = if golden.has("in.emb") { golden.tensor("in.emb") } else { Tensor::zeros(&x.ty) };
    let inputs = HashMap::from([("x".into(), x.clone()), ("emb".into(), emb), ("pos".into(), golden.tensor("in.pos"))]);
    let mut memory = Memory { weights: golden.with_prefix("param."), ..Memory::default() };
    for (name, t) in golden.with_prefix("in.state.") {
        let states = inward(&cfg, &name, &t).into_iter();
        memory.states.extend(states.map(|(n, t)| ((format!("layers.{layer}.{n}"), 0), t)));
    }
    check_gradients(file, &golden, mixer(&cfg, layer, shape(&x, Form::Chunked)), &inputs, &memory);
}

#[test]
fn gradients_of_gated_deltanet() {
    check_mixer_gradients("layer_gated_deltanet", 0);
}

#[test]
fn gradients_of_mlstm() {
    check_mixer_gradients("layer_mlstm", 1);
}

#[test]
fn gradients_of_titans() {
    check_mixer_gradients("layer_titans_swa", 3);
}

#[test]
fn gradients_of_span_knot() {
    check_mixer_gradients("layer_span_knot", 7);
}

/// A feed-forward layer: `build` makes `y` of the activated input.
fn check_ffn(file: &str, build: impl Fn(&mut Net<'_>, chimera_frontends::layers::Activated) -> chimera_ir::Value) {
    let golden = Golden::open(file);
    let cfg = golden.model();
    let x = golden.tensor("in.x");
    let mut net = Net::new(&cfg, shape(&x, Form::Chunked));
    let input = net.g.input("x", x.ty.clone());
    let input = net.activate(input).expect("the input is a float activation");
    let y = build(&mut net, input);
    net.g.outputs.push(("y".to_owned(), y));
    let given = HashMap::from([("x".to_owned(), x.clone())]);
    let memory = Memory { weights: golden.with_prefix("param."), ..Memory::default() };
    check_gradients(file, &golden, net.g.clone(), &given, &memory);
    let loads = std::mem::take(&mut net.side);
    net.g.outputs.extend(loads);
    for engine in Engine::all() {
        let mut memory = Memory { weights: golden.with_prefix("param."), ..Memory::default() };
        let out = engine.run(&net.g, &HashMap::from([("x".to_owned(), x.clone())]), &mut memory);
        let what = format!("{file}, {engine:?}");
        assert_close(&what, &out["y"], &golden.tensor("out.y"), golden.tolerance("rtol"), golden.tolerance("atol"));
        if golden.has("exact.load") {
            assert_eq!(out["load.layers.3.mlp"], golden.tensor("exact.load"), "{what}");
        }
    }
}

#[test]
fn swiglu() {
    check_ffn("swiglu", |net, x| net.swiglu("layers.0.mlp", x, net.cfg.intermediate_size).expect("the layer builds"));
}

#[test]
fn mixture_of_experts() {
    check_ffn("moe", |net, x| net.moe("layers.3.mlp", x).expect("the layer builds"));
}
