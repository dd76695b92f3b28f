//! A dense stack of the shape of a ternary model of 2.2 billion parameters, one stream: 28 layers of attention and SwiGLU.
//!
//! Built as graphs and compiled like any model. Weights are random codes with scales; embedding and head are left out, so that the
//! figures are those of the ternary products and what stands between them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Result, ensure};
use chimera_codegen::Allowed;
use chimera_compiler::{EntryKind, Options, compile_graphs};
use chimera_ir::ops::{
    Binary, BinaryFn, InferError, Norm, NormKind, Quantise, TernaryProduct, Unary, UnaryFn, WindowAttention,
    blocked_type, packed_type,
};
use chimera_ir::plan::{CODES, Plan, SCALES, WeightKind};
use chimera_ir::{Data, Graph, Op, Type, Value};
use chimera_runtime::exec::{ExecOptions, Executable};

use crate::kernels::product;
use crate::measure::{Case, Setup};
use crate::peaks::{DRAM, TERNARY};
use crate::subject::sequence;

const WIDTH: usize = 2560;
const INNER: usize = 6912;
const LAYERS: usize = 28;
const HEADS: usize = 20;
/// Tokens of a prompt, and those that attention sees.
const PROMPT: usize = 512;
/// Tokens of the prompt of the checked stack of one layer.
const SHORT: usize = 3;
/// Columns that share a weight scale, and an activation scale.
const GROUP: usize = 128;
const BLOCK: usize = 64;
const EPS: f32 = 1e-6;

/// The products of a layer: name, rows and columns of the weight.
const PRODUCTS: [(&str, usize, usize); 7] = [
    ("attn.q", WIDTH, WIDTH),
    ("attn.k", WIDTH, WIDTH),
    ("attn.v", WIDTH, WIDTH),
    ("attn.o", WIDTH, WIDTH),
    ("mlp.gate", INNER, WIDTH),
    ("mlp.up", INNER, WIDTH),
    ("mlp.down", WIDTH, INNER),
];

/// Every weight of a stack: name without suffix, rows, columns.
fn weights(layers: usize) -> impl Iterator<Item = (String, usize, usize)> {
    (0..layers).flat_map(|l| PRODUCTS.map(|(name, m, n)| (format!("layers.{l}.{name}"), m, n)))
}

fn types(m: usize, n: usize) -> [Type; 2] {
    [packed_type(&Type::f32(&[m, n])), blocked_type(&Type::f32(&[m, n / GROUP]))]
}

/// Bytes of weights that one token reads.
fn weight_bytes(layers: usize) -> usize {
    weights(layers).map(|(_, m, n)| types(m, n).iter().map(Type::bytes).sum::<usize>()).sum()
}

struct Builder {
    g: Graph,
    tokens: usize,
}

impl Builder {
    fn op(&mut self, op: impl Into<Op>, ins: &[Value]) -> Result<Value, InferError> {
        self.g.op(op, ins)
    }

    fn add(&mut self, a: Value, b: Value) -> Result<Value, InferError> {
        self.op(Binary { f: BinaryFn::Add }, &[a, b])
    }

    /// Codes and scales of the normalised rows.
    fn quantised(&mut self, x: Value) -> Result<Vec<Value>, InferError> {
        let width = self.g.ty(x).cols();
        let x = self.op(Norm { kind: NormKind::Rms, width, eps: EPS }, &[x])?;
        self.g.ops(Quantise { block: BLOCK }, &[x])
    }

    fn product(&mut self, layer: usize, which: usize, x: &[Value]) -> Result<Value, InferError> {
        let (name, m, n) = PRODUCTS[which];
        let [codes, scales] = types(m, n);
        let codes = self.g.param(&format!("layers.{layer}.{name}{CODES}"), codes);
        let scales = self.g.param(&format!("layers.{layer}.{name}{SCALES}"), scales);
        let op = TernaryProduct { m, group: GROUP, block: BLOCK, n_weights: 1, grouped_rows: false };
        self.op(op, &[x[0], x[1], codes, scales])
    }

    fn attention(&mut self, layer: usize, x: Value, pos: Value) -> Result<Value, InferError> {
        self.g.at(format!("layers.{layer}.attn"));
        let h = self.quantised(x)?;
        let [q, k, v] = [self.product(layer, 0, &h)?, self.product(layer, 1, &h)?, self.product(layer, 2, &h)?];
        let slot = |b: &mut Self, name: &str| b.g.param(&format!("layers.{layer}.attn.{name}"), Type::f32(&[1, WIDTH]));
        let [pk, pv] = [slot(self, "pk"), slot(self, "pv")];
        let cache = Type::f32(&[1, PROMPT, WIDTH]);
        let states = [("keys", cache.clone()), ("values", cache), ("count", Type::i32(&[1, HEADS]))];
        let names = states.each_ref().map(|(name, _)| format!("layers.{layer}.attn.{name}"));
        let mut ins = vec![q, q, k, v, pk, pv, k, v, pos];
        for (name, (_, ty)) in names.iter().zip(states) {
            ins.push(self.g.state(name.clone(), ty));
        }
        let outs = self.g.ops(WindowAttention { heads: HEADS, window: PROMPT, carry: true }, &ins)?;
        self.g.writes.extend(names.into_iter().zip(outs[1..].iter().copied()));
        let h = self.quantised(outs[0])?;
        let y = self.product(layer, 3, &h)?;
        self.add(x, y)
    }

    fn swiglu(&mut self, layer: usize, x: Value) -> Result<Value, InferError> {
        self.g.at(format!("layers.{layer}.mlp"));
        let h = self.quantised(x)?;
        let (gate, up) = (self.product(layer, 4, &h)?, self.product(layer, 5, &h)?);
        let gate = self.op(Unary { f: UnaryFn::Silu }, &[gate])?;
        let h = self.op(Binary { f: BinaryFn::Mul }, &[gate, up])?;
        let h = self.quantised(h)?;
        let y = self.product(layer, 6, &h)?;
        self.add(x, y)
    }

    fn stack(mut self, layers: usize) -> Result<Graph, InferError> {
        let mut x = self.g.input("x", Type::f32(&[1, self.tokens, WIDTH]));
        let pos = self.g.input("pos", Type::i32(&[1, self.tokens]));
        for layer in 0..layers {
            x = self.attention(layer, x, pos)?;
            x = self.swiglu(layer, x)?;
        }
        self.g.outputs.push(("hidden".into(), x));
        Ok(self.g)
    }
}

/// A plan with the entry points `prefill` of so many tokens, if any, and `decode`.
fn plan(layers: usize, prompt: usize, setup: &Setup) -> Result<Plan> {
    let graph = |tokens| Builder { g: Graph::default(), tokens }.stack(layers);
    let mut graphs = vec![(EntryKind::Decode, 1, graph(1)?)];
    if prompt > 0 {
        graphs.push((EntryKind::Prefill, 1, graph(prompt)?));
    }
    let packed = |name: String| [CODES, SCALES].map(|suffix| (format!("{name}{suffix}"), WeightKind::Packed));
    let mut kinds: HashMap<String, WeightKind> = weights(layers).flat_map(|(name, ..)| packed(name)).collect();
    let slots = (0..layers).flat_map(|l| ["pk", "pv"].map(|name| format!("layers.{l}.attn.{name}")));
    kinds.extend(slots.map(|name| (name, WeightKind::Matrix)));
    let options = Options { target: setup.target.to_string(), ..Options::default() };
    let plan = Plan { target: options.target.clone(), ..Plan::default() };
    Ok(compile_graphs(plan, graphs, &kinds, &options)?)
}

/// An executable with weights and inputs: every matrix is another rotation of the same random codes.
fn executable(plan: &Plan, options: &ExecOptions) -> Result<Executable> {
    let mut exe = Executable::new(plan.clone(), options)?;
    let mut random = sequence(7);
    let (op, operands) = product([1, INNER, WIDTH]);
    let op = Op::from(op);
    let Data::U8(mut codes) = op.sample_input(2, &operands[2], &mut random).data else {
        anyhow::bail!("packed codes are bytes");
    };
    for w in plan.weights.clone() {
        let n = w.ty.numel();
        if w.name.ends_with(CODES) {
            codes.rotate_left(32);
            exe.set_weight(&w.name, &w.ty.dims, &codes[..n])?;
        } else {
            let scale = if w.name.ends_with(SCALES) { 0.02 } else { 1.0 };
            let values: Vec<f32> = (0..n).map(|_| scale * (1.0 + 0.5 * random())).collect();
            exe.set_weight(&w.name, &w.ty.dims, &values)?;
        }
    }
    for entry in plan.entries.iter().filter(|e| !e.inputs.is_empty()) {
        for (name, buffer) in &entry.inputs {
            let n = plan.buffer(*buffer).ty.numel();
            match name.as_str() {
                "pos" if n == 1 => exe.set_input(&*entry.name, name, &[PROMPT as i32])?,
                "pos" => exe.set_input(&*entry.name, name, &(0..n as i32).collect::<Vec<_>>())?,
                _ => exe.set_input(&*entry.name, name, &(0..n).map(|_| random()).collect::<Vec<f32>>())?,
            }
        }
    }
    Ok(exe)
}

/// The bits of the results of a prompt and two tokens behind it.
fn answers(exe: &mut Executable) -> Result<Vec<u32>> {
    exe.reset_states();
    let mut out = vec![];
    for entry in ["prefill", "decode", "decode"] {
        if exe.plan().entry(entry).is_none() {
            continue;
        }
        exe.run(entry)?;
        let hidden = exe.output::<f32>(entry, "hidden")?;
        ensure!(hidden.iter().all(|x| x.is_finite()), "{entry} gives numbers that are not finite");
        out.extend(hidden.iter().map(|x| x.to_bits()));
    }
    Ok(out)
}

/// A plan on the measured threads, with answers as on another number of threads.
fn checked(plan: &Plan, setup: &Setup) -> Result<Executable> {
    let want = answers(&mut executable(plan, &setup.options(setup.other()))?)?;
    let mut exe = executable(plan, &setup.options(setup.threads))?;
    let served = exe.module().kernels.iter().all(|k| k.emitter != "interp");
    ensure!(served, "no emitter of machine code serves the kernels");
    ensure!(answers(&mut exe)? == want, "answers differ between {} and {} threads", setup.threads, setup.other());
    Ok(exe)
}

/// A case that runs an entry point from fresh states.
fn case(id: &str, unit: &'static str, work: f64, peak: &'static str, entry: &'static str, exe: Executable) -> Case {
    let exe = Rc::new(RefCell::new(exe));
    let first = exe.clone();
    Case {
        id: id.to_owned(),
        unit,
        work,
        floor: vec![(peak, work)],
        peer: None,
        start: Box::new(move || {
            first.borrow_mut().reset_states();
            Ok(())
        }),
        run: Box::new(move || Ok(exe.borrow_mut().run(entry)?)),
    }
}

/// The cases `decode.3b` and `prefill.3b`, with checked answers: one layer against the interpreter, all of them with another number of
/// threads. A prompt runs through a quarter of the layers if it should be `quick`.
///
/// # Errors
/// When an answer is wrong, or there is no memory.
pub fn cases(setup: &Setup, quick: bool, progress: &mut dyn FnMut(&str)) -> Result<Vec<Case>> {
    progress("check 3b: one layer against the interpreter");
    let short = plan(1, SHORT, setup)?;
    let interpreted = ExecOptions { emitters: Allowed::parse("interp")?, ..setup.options(setup.threads.max(2)) };
    let want = answers(&mut executable(&short, &interpreted)?)?;
    ensure!(answers(&mut executable(&short, &setup.options(setup.threads))?)? == want, "the interpreter differs");

    progress("check decode.3b");
    let decode = checked(&plan(LAYERS, 0, setup)?, setup)?;
    progress("check prefill.3b");
    let layers = if quick { LAYERS / 4 } else { LAYERS };
    let prefill = checked(&plan(layers, PROMPT, setup)?, setup)?;
    let macs: usize = weights(layers).map(|(_, m, n)| m * n * PROMPT).sum();
    Ok(vec![
        case("decode.3b", "GB/s", weight_bytes(LAYERS) as f64 * 1e-9, DRAM, "decode", decode),
        case("prefill.3b", "GMAC/s", macs as f64 * 1e-9, TERNARY, "prefill", prefill),
    ])
}
