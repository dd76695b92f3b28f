//! The phases of training that a document describes, `training.phases`.
//!
//! Phases shape runs and not the model, so they are no part of its canonical form. Types and bounds of single keys were checked against
//! the table before.

use super::error::{Code, ConfigError};
use super::json::{Node, Sources, Value};
use super::keys::size_of;

/// What a phase trains on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PhaseKind {
    /// Text, every token.
    Pretrain,
    /// Long text in segments, with states carried from one to the next (semantics 12.4).
    ContextExtension,
    /// Conversations, the answers.
    Sft,
    /// Pairs of answers, one of which is preferred (semantics 12.3).
    Dpo,
}

impl PhaseKind {
    /// All, with their names in documents.
    pub const ALL: [(PhaseKind, &'static str); 4] = [
        (PhaseKind::Pretrain, "pretrain"),
        (PhaseKind::ContextExtension, "ctx_extend"),
        (PhaseKind::Sft, "sft"),
        (PhaseKind::Dpo, "dpo"),
    ];

    /// The name in documents.
    pub fn word(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// Steps on sequences of one length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// Tokens of a sequence.
    pub tokens: usize,
    /// Steps.
    pub steps: u64,
    /// Learning rate; that of the phase when absent.
    pub lr: Option<f64>,
}

/// One phase; what the document does not say is absent.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// Which.
    pub kind: PhaseKind,
    /// Tokens to train on in all.
    pub tokens: Option<f64>,
    /// What the data are called.
    pub data: Vec<String>,
    /// Tokens of a row.
    pub seq_len: Option<usize>,
    /// Tokens of a batch.
    pub batch_tokens: Option<f64>,
    /// The word for the optimiser.
    pub optimizer: Option<String>,
    /// Greatest learning rate.
    pub lr: Option<f64>,
    /// The word for the schedule.
    pub schedule: Option<String>,
    /// Steps of the warm-up.
    pub warmup_steps: Option<usize>,
    /// Decay of ternary matrices, as a share of the learning rate.
    pub weight_decay: Option<f64>,
    /// Most that the norm of the gradient may be.
    pub grad_clip: Option<f64>,
    /// Lengths of sequences and how many steps have them; stages of another phase, which say `"main"`, left out.
    pub stages: Vec<Stage>,
    /// Passes over the data.
    pub epochs: Option<f64>,
    /// How strongly a preference counts.
    pub beta: Option<f64>,
}

/// The phases of a document that matches the table.
///
/// # Errors
/// A phase without a name, or described twice.
pub(super) fn read(sources: &Sources, root: &Node) -> Result<Vec<Phase>, ConfigError> {
    let Some(Node { value: Value::List(list), .. }) = root.get("training.phases") else { return Ok(vec![]) };
    let mut out: Vec<Phase> = vec![];
    for (i, node) in list.iter().enumerate() {
        let key = format!("training.phases.{i}.name");
        let names = PhaseKind::ALL.map(|p| p.1).join(", ");
        let Some(name) = node.get("name").and_then(text) else {
            let error = sources.error(Code::Type, node.span, "a phase of training has no name");
            return Err(error.at_key(&key).expected(format!("one of {names}")));
        };
        let kind = PhaseKind::ALL.iter().find(|p| p.1 == name).map_or(PhaseKind::Pretrain, |p| p.0);
        if out.iter().any(|p| p.kind == kind) {
            let error = sources.error(Code::Word, node.span, format!("the phase {name} is described twice"));
            return Err(error.at_key(&key).help("leave one of them out"));
        }
        out.push(phase(kind, node));
    }
    Ok(out)
}

fn phase(kind: PhaseKind, node: &Node) -> Phase {
    let number = |key: &str| node.get(key).and_then(|n| n.to_json().as_f64());
    let count = |key: &str| node.get(key).and_then(|n| usize::try_from(n.to_json().as_u64()?).ok());
    let size = |key: &str| node.get(key).and_then(|n| size_of(&n.to_json()));
    let word = |key: &str| node.get(key).and_then(text);
    let data = match node.get("data").map(|n| &n.value) {
        Some(Value::Text(name)) => vec![name.clone()],
        Some(Value::List(names)) => names.iter().filter_map(text).collect(),
        _ => vec![],
    };
    let stages = match node.get("stages").map(|n| &n.value) {
        Some(Value::List(list)) => list.iter().filter_map(stage).collect(),
        _ => vec![],
    };
    Phase {
        kind,
        tokens: size("tokens"),
        data,
        seq_len: count("seq_len"),
        batch_tokens: size("batch_tokens"),
        optimizer: word("optimizer"),
        lr: number("lr"),
        schedule: word("schedule"),
        warmup_steps: count("warmup_steps"),
        weight_decay: number("weight_decay"),
        grad_clip: number("grad_clip"),
        stages,
        epochs: number("epochs"),
        beta: number("beta"),
    }
}

fn text(node: &Node) -> Option<String> {
    match &node.value {
        Value::Text(text) => Some(text.clone()),
        _ => None,
    }
}

/// `[tokens, steps, learning rate]`; nothing for `[tokens, "main"]`.
fn stage(node: &Node) -> Option<Stage> {
    let Value::List(parts) = &node.value else { return None };
    let number = |i: usize| parts.get(i).map(Node::to_json);
    let (tokens, steps) = (number(0)?.as_u64()?, number(1)?.as_u64()?);
    Some(Stage { tokens: usize::try_from(tokens).ok()?, steps, lr: number(2).and_then(|lr| lr.as_f64()) })
}
