//! The whole model against the executable specification: by reference semantics, and compiled on every emitter.
//!
//! The file with float activations is tight. With int8 activations a float difference in front of a rounding moves later layers, so that
//! file states wider tolerances, and for hidden states and carried states, of which it says nothing, the same number bounds the
//! distance of whole tensors. Single layers are compared tightly elsewhere.

use std::collections::HashMap;

use chimera_codegen::emitters;
use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::config::{Activation, ModelConfig};
use chimera_frontends::layers::{Depth, Form, Shape};
use chimera_frontends::models::chimera::{self, Head};
use chimera_ir::{Data, Tensor};
use chimera_runtime::call::{self, Tensors};
use chimera_runtime::exec::Executable;
use chimera_runtime::files::HostTensor;
use chimera_tests::engine::exec_options;
use chimera_tests::golden::{Golden, assert_close, assert_near};
use chimera_tests::reference::{Memory, evaluate};

const FILES: [&str; 2] = ["model_none", "model_absmax_per_block"];

/// A golden file with the weights it belongs to.
struct Case {
    name: &'static str,
    golden: Golden,
    cfg: ModelConfig,
    weights: HashMap<String, Tensor>,
}

impl Case {
    fn open(name: &'static str) -> Case {
        let golden = Golden::open(name);
        let weights = Golden::open("model_params").with_prefix("");
        Case { name, cfg: golden.model(), golden, weights }
    }

    fn shape(&self) -> [usize; 2] {
        let dims = self.golden.tensor("in.tokens").ty.dims;
        [dims[0], dims[1]]
    }

    fn close(&self, what: &str, got: &Tensor, want: &str, tolerance: &str) {
        let (want, tol) = (self.golden.tensor(want), self.golden.tolerance(tolerance));
        // Losses are scalars on one side and vectors of one on the other.
        let got = Tensor { ty: want.ty.clone(), data: got.data.clone() };
        assert_close(&format!("{}: {what}", self.name), &got, &want, tol, tol);
    }

    /// A tensor that the tolerance table does not name.
    fn near(&self, what: &str, got: &Tensor, want: &str) {
        match self.cfg.quantization.activation {
            Activation::Float => self.close(what, got, want, "logits"),
            _ => {
                let tolerance = self.golden.tolerance("logits");
                assert_near(&format!("{}: {what}", self.name), got, &self.golden.tensor(want), tolerance);
            }
        }
    }

    /// Tokens per expert. Behind int8 activations a token may choose another expert; routing of given scores is compared elsewhere.
    fn load(&self, what: &str, got: &Tensor, want: &str) {
        let (got, want) = (got.to_i64(), self.golden.tensor(want).to_i64());
        let moved = if self.cfg.quantization.activation == Activation::Float { 0 } else { 2 };
        assert_eq!(got.iter().sum::<i64>(), want.iter().sum::<i64>(), "{}: {what}", self.name);
        let near = got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= moved);
        assert!(near, "{}: {what}: found {got:?}, expected {want:?}", self.name);
    }

    /// By reference semantics: the outputs.
    fn reference(
        &self,
        head: Head,
        form: Form,
        carry: bool,
        depth: Depth,
        extra: &[(&str, Tensor)],
    ) -> HashMap<String, Tensor> {
        let [rows, tokens] = self.shape();
        let shape = Shape { rows, tokens, form, carry, depth };
        let g = chimera::graph(&self.cfg, shape, head).expect("the model builds");
        let mut memory = Memory { weights: self.weights.clone(), ..Memory::default() };
        let mut inputs = self.golden.with_prefix("in.");
        inputs.extend(extra.iter().map(|(n, t)| ((*n).to_owned(), t.clone())));
        evaluate(&g, &inputs, &mut memory)
    }

    fn executable(&self, emitter: &str, entries: &[(EntryKind, usize, Option<Depth>)]) -> Executable {
        let rows = self.shape()[0];
        let spec = |(kind, tokens, depth): &(EntryKind, usize, _)| EntrySpec {
            kind: kind.clone(),
            rows,
            tokens: *tokens,
            depth: *depth,
        };
        let options = Options { entries: entries.iter().map(spec).collect(), ..Options::default() };
        let plan = compile(&self.cfg, &options).expect("the model compiles");
        let mut exe = Executable::new(plan, &exec_options(emitter, 2)).expect("the plan is executable");
        for w in exe.plan().weights.clone() {
            let t = &self.weights[&w.name];
            exe.set_weight(&w.name, &t.ty.dims, t.as_f32()).expect("the weight fits");
        }
        exe
    }

    /// The inputs of the file, the first `tokens` columns of them.
    fn inputs(&self, tokens: usize) -> Tensors {
        let cut = |t: &Tensor| {
            let all = t.ty.dims[1];
            let kept: Vec<i32> = t.to_i64().chunks(all).flat_map(|row| &row[..tokens]).map(|&x| x as i32).collect();
            HostTensor::from_i32(&[t.ty.dims[0], tokens], &kept).expect("the shape fits")
        };
        self.golden.with_prefix("in.").iter().map(|(n, t)| (n.clone(), cut(t))).collect()
    }
}

fn tensor(t: &HostTensor) -> Tensor {
    match t.to_i64() {
        Ok(ints) => Tensor::i32(t.shape(), ints.into_iter().map(|x| x as i32).collect()),
        Err(_) => Tensor::f32(t.shape(), t.to_f32()),
    }
}

fn default_depth(cfg: &ModelConfig) -> Depth {
    Depth::Fixed(cfg.looping.as_ref().map_or(1, |l| l.default))
}

#[test]
fn reference_logits_and_losses() {
    for name in FILES {
        let case = Case::open(name);
        let depth = default_depth(&case.cfg);
        for form in [Form::Chunked, Form::Recurrent] {
            let out = case.reference(Head::Logits, form, true, depth, &[]);
            case.near(&format!("{form:?} hidden"), &out["hidden"], "out.hidden");
            case.close(&format!("{form:?} logits"), &out["logits"], "out.logits", "logits");
        }
        let out = case.reference(Head::Loss, Form::Chunked, false, depth, &[]);
        case.close("loss", &out["loss"], "out.loss", "loss");
        case.close("losses", &out["losses"], "out.loss_per_row", "loss");
        for layer in [3, 7] {
            let load = format!("load.layers.{layer}.mlp");
            case.load(&load, &out[&load], &format!("exact.{load}"));
        }
        for loops in [1, 3] {
            let out = case.reference(Head::Loss, Form::Chunked, false, Depth::Fixed(loops), &[]);
            case.close(&format!("{loops} loops"), &out["loss"], &format!("out.loss_loops_{loops}"), "loss");
        }
    }
}

#[test]
fn reference_rows_of_their_own_depth() {
    for name in FILES {
        let case = Case::open(name);
        let depth = |d: [i32; 3]| ("depth", Tensor::i32(&[3], d.to_vec()));
        let own = Depth::PerRow { max: 3, adaptive: false };
        let out = case.reference(Head::Loss, Form::Chunked, false, own, &[depth([1, 3, 2])]);
        case.close("mixed depth", &out["loss"], "out.loss_mixed_depth_1_3_2", "loss");
        assert_eq!(out["loops"].to_i64(), [1, 3, 2]);
        let adaptive = Depth::PerRow { max: 6, adaptive: true };
        let out = case.reference(Head::Hidden, Form::Chunked, false, adaptive, &[depth([6; 3])]);
        assert_eq!(out["loops"], case.golden.tensor("exact.adaptive_loops"), "{name}");
    }
}

/// Logits, losses, states and single-token decoding of one file on one emitter.
fn check_compiled(name: &'static str, emitter: &str) {
    let case = Case::open(name);
    let [_, tokens] = case.shape();
    let at = |what: &str| format!("{emitter}, {what}");
    let entries = [(EntryKind::Logits, tokens, None), (EntryKind::Loss, tokens, None), (EntryKind::Decode, 1, None)];
    let mut exe = case.executable(emitter, &entries);
    let inputs = case.inputs(tokens);

    let out = call::run(&mut exe, "logits", &inputs).expect("the call succeeds");
    case.near(&at("hidden"), &tensor(&out["hidden"]), "out.hidden");
    case.close(&at("logits"), &tensor(&out["logits"]), "out.logits", "logits");
    for (state, want) in case.golden.with_prefix("state.") {
        let (full, got) = (format!("state.{state}"), tensor(&out[&format!("state.{state}")]));
        match &want.data {
            Data::F32(_) => case.near(&at(&full), &got, &full),
            _ => assert_eq!(got, want, "{name}: {}", at(&full)),
        }
    }
    let out = call::run(&mut exe, "loss", &inputs).expect("the call succeeds");
    case.close(&at("loss"), &tensor(&out["loss"]), "out.loss", "loss");
    assert!(out["loss"].shape().is_empty(), "the loss is a scalar");
    case.close(&at("losses"), &tensor(&out["losses"]), "out.loss_per_row", "loss");
    for layer in [3, 7] {
        let load = format!("load.layers.{layer}.mlp");
        case.load(&at(&load), &tensor(&out[&load]), &format!("exact.{load}"));
    }
    let out = call::run(&mut exe, "decode", &case.inputs(8)).expect("the call succeeds");
    case.close(&at("decode"), &tensor(&out["logits"]), "out.decode_logits_8", "logits");
}

/// Losses with other depths than the configuration's, and adaptive depth, of one file on one emitter.
fn check_depths(name: &'static str, emitter: &str) {
    let case = Case::open(name);
    let [rows, tokens] = case.shape();
    let run = |kind: EntryKind, depth, per_row: Option<[i32; 3]>| {
        let entry = kind.name();
        let mut exe = case.executable(emitter, &[(kind, tokens, Some(depth))]);
        let mut inputs = case.inputs(tokens);
        let depths = per_row.map(|d| ("depth".to_owned(), HostTensor::from_i32(&[rows], &d).expect("three rows")));
        inputs.extend(depths);
        call::run(&mut exe, entry, &inputs).expect("the call succeeds")
    };
    for loops in [1, 3] {
        let out = run(EntryKind::Loss, Depth::Fixed(loops), None);
        let what = format!("{emitter}, {loops} loops");
        case.close(&what, &tensor(&out["loss"]), &format!("out.loss_loops_{loops}"), "loss");
    }
    let out = run(EntryKind::Loss, Depth::PerRow { max: 3, adaptive: false }, Some([1, 3, 2]));
    case.close(&format!("{emitter}, mixed depth"), &tensor(&out["loss"]), "out.loss_mixed_depth_1_3_2", "loss");
    let out = run(EntryKind::Logits, Depth::PerRow { max: 6, adaptive: true }, Some([6; 3]));
    assert_eq!(tensor(&out["loops"]), case.golden.tensor("exact.adaptive_loops"), "{name}, {emitter}");
}

#[test]
fn compiled_logits_losses_states_and_decoding() {
    for name in FILES {
        emitters().iter().for_each(|e| check_compiled(name, e.name()));
    }
}

#[test]
fn compiled_depths() {
    for name in FILES {
        emitters().iter().for_each(|e| check_depths(name, e.name()));
    }
}
