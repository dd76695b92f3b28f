//! The ways of running a graph: by reference semantics, or compiled and executed on one emitter.
//!
//! A suite takes an [`Engine`] and does not know which one it is. A new emitter appears in [`Engine::all`] by itself.

use std::collections::HashMap;

use chimera_codegen::{Allowed, emitters};
use chimera_compiler::{EntryKind, Options, compile_graphs};
use chimera_ir::plan::{Plan, WeightKind};
use chimera_ir::{DType, Data, Graph, Tensor, Type};
use chimera_runtime::exec::{EntryId, ExecOptions, Executable};

use crate::reference::{Memory, evaluate};

/// One way of running a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Node by node through `Op::eval`.
    Reference,
    /// Compiled, and executed by this emitter and the interpreter behind it.
    Emitter(&'static str),
}

impl Engine {
    /// The reference and every emitter.
    pub fn all() -> Vec<Engine> {
        let emitters = emitters().iter().map(|e| Engine::Emitter(e.name()));
        [Engine::Reference].into_iter().chain(emitters).collect()
    }

    /// Run `g` once; `memory` is read and written. Returns the outputs by name.
    ///
    /// # Panics
    /// When the graph cannot be compiled or executed.
    pub fn run(self, g: &Graph, inputs: &HashMap<String, Tensor>, memory: &mut Memory) -> HashMap<String, Tensor> {
        match self {
            Engine::Reference => evaluate(g, inputs, memory),
            Engine::Emitter(name) => execute(g, name, inputs, memory),
        }
    }
}

/// Options of the executor for one emitter; the interpreter serves what it refuses.
pub fn exec_options(emitter: &str, threads: usize) -> ExecOptions {
    let names = if emitter == "interp" { emitter.to_owned() } else { format!("{emitter},interp") };
    ExecOptions {
        threads,
        emitters: Allowed::parse(&names).expect("emitters know their names"),
        ..ExecOptions::default()
    }
}

fn execute(g: &Graph, emitter: &str, inputs: &HashMap<String, Tensor>, memory: &mut Memory) -> HashMap<String, Tensor> {
    let kinds = memory.weights.keys().map(|n| (n.clone(), WeightKind::Matrix)).collect();
    let graphs = vec![(EntryKind::Logits, 1, g.clone())];
    let plan = compile_graphs(Plan::default(), graphs, &kinds, &Options::default()).expect("the graph compiles");
    let mut exe = Executable::new(plan, &exec_options(emitter, 2)).expect("the plan is executable");
    let id = exe.entry("logits").expect("the entry point was compiled");
    for decl in exe.plan().weights.clone() {
        let w = &memory.weights[&decl.name];
        exe.set_weight(&decl.name, &w.ty.dims, w.as_f32()).expect("the weight fits");
    }
    for ((name, copy), t) in &memory.states {
        exe.set_state(name, *copy, &bytes(t)).expect("the state fits");
    }
    for (name, _) in exe.plan().entries.iter().find(|e| e.name == "logits").expect("it is there").inputs.clone() {
        match &inputs[&name].data {
            Data::F32(v) => exe.set_input(id, &name, v),
            Data::I32(v) => exe.set_input(id, &name, v),
            other => panic!("input {name} is {}", other.dtype().name()),
        }
        .expect("the input fits");
    }
    exe.run(id).expect("the entry point runs");
    for s in exe.plan().states.clone() {
        for copy in 0..s.copies as usize {
            let t = from_bytes(&s.ty, exe.state(&s.name, copy).expect("the state is there"));
            memory.states.insert((s.name.clone(), copy), t);
        }
    }
    let names: Vec<String> = g.outputs.iter().map(|(n, _)| n.clone()).collect();
    names.into_iter().map(|n| (n.clone(), output(&exe, id, &n))).collect()
}

/// An output as a tensor.
///
/// # Panics
/// When there is no such output, or it is neither `f32` nor `i32`.
pub fn output(exe: &Executable, id: EntryId, name: &str) -> Tensor {
    let ty = exe.output_type(id, name).expect("the output is there");
    match ty.dtype {
        DType::F32 => Tensor::f32(&ty.dims, exe.output::<f32>(id, name).expect("it is current").to_vec()),
        DType::I32 => Tensor::i32(&ty.dims, exe.output::<i32>(id, name).expect("it is current").to_vec()),
        other => panic!("output {name} is {}", other.name()),
    }
}

fn bytes(t: &Tensor) -> Vec<u8> {
    match &t.data {
        Data::F32(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        Data::I32(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        Data::I16(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        other => panic!("no state is {}", other.dtype().name()),
    }
}

fn from_bytes(ty: &Type, bytes: &[u8]) -> Tensor {
    let data = match ty.dtype {
        DType::F32 => Data::F32(bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect()),
        DType::I32 => Data::I32(bytes.as_chunks().0.iter().map(|b| i32::from_ne_bytes(*b)).collect()),
        DType::I16 => Data::I16(bytes.as_chunks().0.iter().map(|b| i16::from_ne_bytes(*b)).collect()),
        other => panic!("no state is {}", other.name()),
    };
    Tensor { ty: ty.clone(), data }
}
