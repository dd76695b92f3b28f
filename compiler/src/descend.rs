//! The update of weights from gradients, as a graph (semantics 12.1, 12.2).
//!
//! The entry point `backward` leaves gradients in states, from which `update` takes them: a step is one pass over each weight and its
//! memory, and what a step needs of the host are three numbers.

use chimera_ir::{
    DType, Data, Graph, Op, Tensor, Type, Value,
    ops::{
        AddTotal, Balance, Binary, BinaryFn, Descend, DescendBytes, DescentRates, DescentRule, InferError, RowSquares,
    },
    plan::{QUANTISER, WeightKind},
};

use crate::{
    passes::grad::GRAD,
    update::{Target, load_name},
};

/// How gradients become a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Descent {
    /// The rule.
    pub rule: DescentRule,
    /// Decay of ternary matrices, as a share of the learning rate.
    pub weight_decay: f32,
    /// Most that the norm of the whole gradient may be; 0 leaves it as it is.
    pub clip: f32,
    /// How the memory of matrices is kept.
    pub state: StateForm,
    /// Rate of the expert balance, from `load.*` inputs; 0 leaves selection biases alone.
    pub balance: f32,
}

impl Descent {
    /// The numbers of [`chimera_ir::plan::AGREEMENT`], where the rule has them.
    pub fn agreement(&self) -> Option<String> {
        let DescentRule::Agreement { beta1, beta2, eps, lambda, bounds, gate, .. } = self.rule else { return None };
        let all = [lambda, bounds[0], bounds[1], eps, beta1, beta2].into_iter().chain(gate.into_iter().flatten());
        Some(all.map(|x| x.to_string()).collect::<Vec<_>>().join(" "))
    }
}

/// How the memory of a rule is kept. Vectors always have floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateForm {
    /// As 32-bit floats.
    Full,
    /// In a byte each, with scales for blocks ([`DescendBytes`]); AdamW only.
    Bytes,
}

/// The sum of all squares of the gradient, an output of `backward`: `f64 [1]`.
pub const SQUARES: &str = "squares";

/// The input of a `backward` that accumulates: what the gradient of this part counts, `f32 [1]`.
pub const SHARE: &str = "share";

/// The gradients of a differentiated loss go to states of their names instead of outputs, added to what is there with `accumulate`, and
/// the squares of the states are summed up.
///
/// # Errors
/// When an operation refuses its operands.
pub fn keep(old: &Graph, accumulate: bool) -> Result<Graph, InferError> {
    let mut g = old.clone();
    g.at("gradient");
    let (grads, outputs) = g.outputs.drain(..).partition(|(name, _)| name.starts_with(GRAD));
    g.outputs = outputs;
    let grads: Vec<(String, Value)> = grads;
    let mut total = g.constant(Tensor { ty: Type::new(DType::F64, &[1]), data: Data::F64(vec![0.0]) });
    for (name, mut v) in grads {
        let before = g.state(name.clone(), g.ty(v).clone());
        if accumulate {
            v = g.op(Binary { f: BinaryFn::Add }, &[v, before])?;
        }
        let rows = g.op(RowSquares {}, &[v])?;
        total = g.op(AddTotal {}, &[total, rows])?;
        g.writes.push((name, v));
    }
    g.outputs.push((SQUARES.to_owned(), total));
    Ok(g)
}

/// The update graph. Inputs: `c` (`f32 [2]`, the norm of the gradient and the share of the weight decay that counts), `step` (`i32 [1]`, from 0), `lr` (`f32 [1]`), and with balance
/// `load.<layer>` for each router.
///
/// # Errors
/// When an operation refuses its operands.
pub fn graph(descent: &Descent, targets: &[Target]) -> Result<Graph, InferError> {
    let mut g = Graph::default();
    g.at("update");
    let c = g.input("c", Type::f32(&[2]));
    let step = g.input("step", Type::i32(&[1]));
    let lr = g.input("lr", Type::f32(&[1]));
    let rule = descent.rule;
    let rates = g.op(DescentRates { clip: descent.clip, betas: rule.betas() }, &[c, step, lr])?;
    for t in targets {
        g.at(t.name.rsplit_once('.').map_or("update", |(site, _)| site));
        let ty = Type::f32(&t.dims);
        match t.kind {
            WeightKind::Optimizer | WeightKind::Packed => {}
            WeightKind::Buffer if descent.balance > 0.0 && !t.name.starts_with(QUANTISER) => {
                let load = g.input(load_name(&t.name), Type::i32(&t.dims));
                let bias = g.param(&t.name, ty);
                let next = g.op(Balance { rate: descent.balance }, &[bias, load])?;
                g.writes.push((t.name.clone(), next));
            }
            WeightKind::Buffer => {}
            WeightKind::Ternary | WeightKind::Matrix | WeightKind::Embedding | WeightKind::Vector => {
                let decay = if t.kind == WeightKind::Ternary { descent.weight_decay } else { 0.0 };
                let (op, memory) = operation(descent, t.kind, decay, &ty)?;
                let memory = memory.into_iter().map(|(m, ty)| (format!("optim.{m}.{}", t.name), ty));
                let all: Vec<(String, Type)> = std::iter::once((t.name.clone(), ty.clone())).chain(memory).collect();
                let mut ins: Vec<_> = all.iter().map(|(name, ty)| g.param(name, ty.clone())).collect();
                ins.push(g.state(format!("{GRAD}{}", t.name), ty));
                ins.push(rates);
                let next = g.ops(op, &ins)?;
                g.writes.extend(all.into_iter().map(|a| a.0).zip(next));
            }
        }
    }
    g.verify()?;
    Ok(g)
}

/// Names and types of the memory of a weight.
type Memory = Vec<(&'static str, Type)>;

/// The operation that takes the step of a weight, and names and types of the memory it takes.
fn operation(descent: &Descent, kind: WeightKind, decay: f32, ty: &Type) -> Result<(Op, Memory), InferError> {
    let rule = descent.rule;
    match (descent.state, rule) {
        (StateForm::Bytes, DescentRule::AdamW { beta1, beta2, eps }) if kind != WeightKind::Vector => {
            Ok((DescendBytes { beta1, beta2, eps, decay }.into(), DescendBytes::memory(ty).into()))
        }
        (StateForm::Full, _) | (StateForm::Bytes, DescentRule::AdamW { .. }) => {
            let memory = rule.memory().iter().copied().zip(rule.memory_types(ty)).collect();
            Ok((Descend { rule, decay }.into(), memory))
        }
        (StateForm::Bytes, _) => Err(InferError::new(
            "update",
            "memory of bytes is that of AdamW, found another rule; choose memory of floats",
        )),
    }
}
