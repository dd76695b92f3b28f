//! The sizes of a model, what its file claims about them, and what of the file is not implemented.
//!
//! Every number here follows from shapes, without a plan.

use std::fmt;

use chimera_frontends::config::{Claim, Loaded, Unit, claims, parameter_count, parts, state_memory};
use serde::Serialize;
use serde_json::Value;

use super::table::{Table, bytes, count};

/// Parameters of one part of a model.
#[derive(Clone, Debug, Serialize)]
pub struct PartRow {
    /// Name of the part.
    pub name: &'static str,
    /// Layers that have it.
    pub layers: usize,
    /// All its parameters.
    pub parameters: u64,
    /// Those that are ternary.
    pub ternary: u64,
}

/// State of one stream in the layers of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct StreamRow {
    /// The word of the layer pattern.
    pub kind: &'static str,
    /// Number of such layers.
    pub layers: usize,
    /// Number of states: one a layer and loop iteration.
    pub states: usize,
    /// Bytes of one state.
    pub bytes_each: u64,
    /// Bytes of all.
    pub bytes: u64,
}

/// A size that the file declares beside the computed one.
#[derive(Clone, Debug, Serialize)]
pub struct ClaimRow {
    /// Key of the declaration.
    pub path: String,
    /// What the file says.
    pub declared: f64,
    /// What the shapes give.
    pub computed: f64,
    /// `parameters` or `megabytes`.
    pub unit: &'static str,
    /// What was computed.
    pub meaning: &'static str,
    /// Whether the two agree within five percent, or the budget suffices.
    pub agrees: bool,
}

/// A key that nothing follows from yet.
#[derive(Clone, Debug, Serialize)]
pub struct NotYetRow {
    /// Key path.
    pub path: String,
    /// The value in the file.
    pub value: Value,
    /// What is missing.
    pub reason: String,
    /// Whether the file itself turns the feature off.
    pub off: bool,
}

/// What is known about a model without compiling it.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// File or scale the model comes from.
    pub name: String,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Loop iterations that sizes are for.
    pub loops: usize,
    /// All parameters.
    pub parameters: u64,
    /// Parameters by part.
    pub parts: Vec<PartRow>,
    /// State of one stream by kind of layer.
    pub stream: Vec<StreamRow>,
    /// Bytes of the state of one stream.
    pub stream_bytes: u64,
    /// Declared against computed sizes.
    pub claims: Vec<ClaimRow>,
    /// Keys of features that are not implemented.
    pub not_yet: Vec<NotYetRow>,
    /// Sentences about what is allowed and doubtful.
    pub warnings: Vec<String>,
}

/// The report for a loaded configuration; `loops` iterations of the looped layers.
pub fn model(name: &str, loaded: &Loaded, loops: usize) -> ModelReport {
    let m = &loaded.model;
    let part = |p: chimera_frontends::config::Part| PartRow {
        name: p.name,
        layers: p.layers,
        parameters: p.parameters,
        ternary: p.ternary,
    };
    let stream: Vec<StreamRow> = state_memory(m, loops)
        .into_iter()
        .map(|r| StreamRow {
            kind: r.kind.word(),
            layers: r.layers,
            states: r.states,
            bytes_each: r.bytes_each,
            bytes: r.bytes,
        })
        .collect();
    let not_yet = loaded.not_yet.iter().map(|n| NotYetRow {
        path: n.path.clone(),
        value: n.value.clone(),
        reason: n.reason.clone(),
        off: n.off,
    });
    ModelReport {
        name: name.to_owned(),
        layers: m.layers.len(),
        hidden_size: m.hidden_size,
        vocab_size: m.vocab_size,
        loops,
        parameters: parameter_count(m),
        parts: parts(m).into_iter().map(part).collect(),
        stream_bytes: stream.iter().map(|r| r.bytes).sum(),
        stream,
        claims: claims(loaded).iter().map(claim_row).collect(),
        not_yet: not_yet.collect(),
        warnings: loaded.warnings.clone(),
    }
}

fn claim_row(claim: &Claim) -> ClaimRow {
    ClaimRow {
        path: claim.path.clone(),
        declared: claim.declared,
        computed: claim.computed,
        unit: match claim.unit {
            Unit::Parameters => "parameters",
            Unit::Megabytes => "megabytes",
        },
        meaning: claim.meaning,
        agrees: claim.agrees(),
    }
}

impl ClaimRow {
    fn show(&self, value: f64) -> String {
        match self.unit {
            "megabytes" => format!("{value:.1} MB"),
            _ => count(value as u64),
        }
    }
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "model {}: {} layers of width {}, vocabulary {}, {} parameters",
            self.name,
            self.layers,
            self.hidden_size,
            self.vocab_size,
            count(self.parameters)
        )?;
        let mut table = Table::new(&["part", "layers", "parameters", "ternary"]);
        for p in &self.parts {
            table.row([p.name.to_owned(), p.layers.to_string(), count(p.parameters), count(p.ternary)]);
        }
        write!(f, "\nparameters\n{table}")?;
        let mut table = Table::new(&["layers", "number", "states", "each", "bytes"]);
        for r in &self.stream {
            let numbers = [r.layers.to_string(), r.states.to_string(), bytes(r.bytes_each), bytes(r.bytes)];
            table.row([r.kind.to_owned()].into_iter().chain(numbers));
        }
        let loops = if self.loops == 1 { String::new() } else { format!(", {} loop iterations", self.loops) };
        write!(f, "\nstate of one stream{loops}: {}\n{table}", bytes(self.stream_bytes))?;
        if !self.claims.is_empty() {
            let mut table = Table::new(&["declared size", "says", "shapes give", "verdict", "what was computed"]);
            for c in &self.claims {
                let verdict = if c.agrees { "agrees" } else { "differs" };
                let numbers = [c.show(c.declared), c.show(c.computed)];
                table
                    .row([c.path.clone()].into_iter().chain(numbers).chain([verdict.to_owned(), c.meaning.to_owned()]));
            }
            write!(f, "\ndeclared and computed sizes\n{table}")?;
        }
        if !self.not_yet.is_empty() {
            let on = self.not_yet.iter().filter(|n| !n.off).count();
            let mut table = Table::new(&["key", "reason", "value"]);
            for n in &self.not_yet {
                table.row([n.path.clone(), n.reason.clone(), short(&n.value)]);
            }
            let off = self.not_yet.len() - on;
            write!(f, "\nnot implemented: {on} keys, and {off} that the file turns off\n{table}")?;
        }
        Ok(())
    }
}

/// A value on one line of bounded width, without control characters.
fn short(value: &Value) -> String {
    const WIDTH: usize = 48;
    let text = value.to_string();
    let mut out: String = text.chars().take(WIDTH).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(WIDTH).is_some() {
        out.push('…');
    }
    out
}
