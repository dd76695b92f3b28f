//! Sizes of a model, computed from shapes: parameter list, counts by part, state memory, claims against them.
//!
//! [`parameters`] is the one list of names and shapes; weights, initialisation and the counts here agree with it.

use std::fmt;

use chimera_ir::plan::{QUANTISER, QUANTISER_TARGET, QUANTISER_THRESHOLD};

use super::keys::size_of;
use super::load::Loaded;
use super::model::{MixerKind, ModelConfig, TitansCore};

/// How a parameter is stored and trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamKind {
    /// Ternary matrix with a float32 latent; the only kind with weight decay.
    Ternary,
    /// float32 matrix.
    Matrix,
    /// The embedding, which is also the head.
    Embedding,
    /// Any other trained float32 tensor.
    Vector,
    /// float32 state that is not trained by gradients.
    Buffer,
}

/// One parameter. A matrix has dims `[out, in]` and means `y = x W^T`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name in weight files.
    pub name: String,
    /// Sizes, outermost first.
    pub dims: Vec<usize>,
    /// Storage and training.
    pub kind: ParamKind,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> u64 {
        self.dims.iter().map(|d| *d as u64).product()
    }

    /// Whether there are no elements; never so in a validated model.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

struct List(Vec<Parameter>);

impl List {
    fn add(&mut self, kind: ParamKind, name: String, dims: &[usize]) {
        self.0.push(Parameter { name, dims: dims.to_vec(), kind });
    }

    fn gated_delta(&mut self, m: &ModelConfig, p: &str) {
        let (d, inner, h) = (m.hidden_size, m.inner_width(), m.n_heads);
        for n in ["q", "k", "v", "g"] {
            self.add(ParamKind::Ternary, format!("{p}.{n}_proj.weight"), &[inner, d]);
        }
        self.add(ParamKind::Ternary, format!("{p}.o_proj.weight"), &[d, inner]);
        self.add(ParamKind::Matrix, format!("{p}.a_proj.weight"), &[h, d]);
        self.add(ParamKind::Matrix, format!("{p}.b_proj.weight"), &[h, d]);
        self.add(ParamKind::Vector, format!("{p}.A_log"), &[h]);
        self.add(ParamKind::Vector, format!("{p}.dt_bias"), &[h]);
        self.add(ParamKind::Vector, format!("{p}.o_norm.weight"), &[m.head_dim]);
        for n in ["q", "k", "v"] {
            self.add(ParamKind::Vector, format!("{p}.{n}_conv.weight"), &[inner, m.gated_delta.conv_size]);
        }
    }

    /// What mLSTM and Titans have in common: projections and gates with bias.
    fn gated_attention(&mut self, m: &ModelConfig, p: &str, gates: &[&str]) {
        let (d, inner, h) = (m.hidden_size, m.inner_width(), m.n_heads);
        for n in ["q", "k", "v"] {
            self.add(ParamKind::Ternary, format!("{p}.{n}_proj.weight"), &[inner, d]);
        }
        self.add(ParamKind::Ternary, format!("{p}.o_proj.weight"), &[d, inner]);
        self.add(ParamKind::Vector, format!("{p}.o_norm.weight"), &[inner]);
        for gate in gates {
            self.add(ParamKind::Matrix, format!("{p}.{gate}.weight"), &[h, d]);
            self.add(ParamKind::Vector, format!("{p}.{gate}.bias"), &[h]);
        }
    }

    fn mixer(&mut self, m: &ModelConfig, kind: MixerKind, p: &str) {
        let (d, inner, h, k) = (m.hidden_size, m.inner_width(), m.n_heads, m.head_dim);
        match kind {
            MixerKind::GatedDelta => self.gated_delta(m, p),
            MixerKind::SpanKnot => {
                self.gated_delta(m, &format!("{p}.gdn"));
                self.add(ParamKind::Ternary, format!("{p}.knot_proj.weight"), &[d, d]);
                self.add(ParamKind::Vector, format!("{p}.knot_gate"), &[1]);
            }
            MixerKind::Mlstm => {
                self.gated_attention(m, p, &["igate", "fgate"]);
                self.add(ParamKind::Ternary, format!("{p}.ogate.weight"), &[inner, d]);
            }
            MixerKind::Titans => {
                let hidden = k * m.titans.memory_expansion;
                self.gated_attention(m, p, &["alpha_proj", "eta_proj", "theta_proj"]);
                self.add(ParamKind::Vector, format!("{p}.persistent_memory"), &[m.titans.persistent_slots, d]);
                self.add(ParamKind::Matrix, format!("{p}.mem_k.weight"), &[inner, d]);
                self.add(ParamKind::Matrix, format!("{p}.mem_v.weight"), &[inner, d]);
                self.add(ParamKind::Vector, format!("{p}.memory_w1"), &[h, hidden, k]);
                self.add(ParamKind::Vector, format!("{p}.memory_w2"), &[h, k, hidden]);
            }
        }
    }

    fn swiglu(&mut self, d: usize, width: usize, p: &str) {
        self.add(ParamKind::Ternary, format!("{p}.gate_proj.weight"), &[width, d]);
        self.add(ParamKind::Ternary, format!("{p}.up_proj.weight"), &[width, d]);
        self.add(ParamKind::Ternary, format!("{p}.down_proj.weight"), &[d, width]);
    }
}

/// The name of the stack that a parameter of an expert belongs to, with `*` for the expert, and the expert:
/// `layers.1.mlp.experts.3.up_proj.weight` is number 3 of `layers.1.mlp.experts.*.up_proj.weight`. `None` for other names.
pub fn expert_stack(name: &str) -> Option<(String, usize)> {
    let (head, tail) = name.split_once(".experts.")?;
    let (expert, part) = tail.split_once('.')?;
    Some((format!("{head}.experts.*.{part}"), expert.parse().ok()?))
}

/// All parameters in canonical order.
pub fn parameters(model: &ModelConfig) -> Vec<Parameter> {
    let (m, d) = (model, model.hidden_size);
    let mut list = List(Vec::new());
    list.add(ParamKind::Embedding, "embed.weight".into(), &[m.vocab_size, d]);
    for (i, kind) in m.layers.iter().enumerate() {
        let p = format!("layers.{i}");
        list.add(ParamKind::Vector, format!("{p}.attn_norm.weight"), &[d]);
        list.mixer(m, *kind, &format!("{p}.attn"));
        list.add(ParamKind::Vector, format!("{p}.mlp_norm.weight"), &[d]);
        match m.moe.as_ref().filter(|_| m.is_moe(i)) {
            None => list.swiglu(d, m.intermediate_size, &format!("{p}.mlp")),
            Some(moe) => {
                list.add(ParamKind::Matrix, format!("{p}.mlp.gate.weight"), &[moe.n_routed, d]);
                list.add(ParamKind::Buffer, format!("{p}.mlp.gate.e_score_correction_bias"), &[moe.n_routed]);
                for x in 0..moe.n_routed {
                    list.swiglu(d, moe.width, &format!("{p}.mlp.experts.{x}"));
                }
                if moe.n_shared > 0 {
                    list.swiglu(d, moe.width * moe.n_shared, &format!("{p}.mlp.shared_experts"));
                }
            }
        }
    }
    list.add(ParamKind::Vector, "norm.weight".into(), &[d]);
    if let Some(looping) = &m.looping {
        for name in ["norm.weight", "A_log", "dt", "B"] {
            list.add(ParamKind::Vector, format!("loop.{name}"), &[d]);
        }
        if looping.c {
            list.add(ParamKind::Matrix, "loop.C.weight".into(), &[d, d]);
        }
    }
    if m.quantization.dynamic.is_some() {
        let ternary: Vec<String> =
            list.0.iter().filter(|p| p.kind == ParamKind::Ternary).map(|p| format!("{QUANTISER}{}", p.name)).collect();
        let all = ternary.into_iter().chain([QUANTISER_THRESHOLD, QUANTISER_TARGET].map(str::to_owned));
        all.for_each(|name| list.add(ParamKind::Buffer, name, &[1]));
    }
    list.0
}

/// Parameters of one part of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Name of the part.
    pub name: &'static str,
    /// Layers that have it; 1 for parts outside layers.
    pub layers: usize,
    /// All parameters of the part.
    pub parameters: u64,
    /// Those stored as ternary.
    pub ternary: u64,
}

/// Counts of one layer's mixer: all, and ternary.
fn mixer_count(m: &ModelConfig, kind: MixerKind) -> (u64, u64) {
    let [d, inner, h, k] = [m.hidden_size, m.inner_width(), m.n_heads, m.head_dim].map(|v| v as u64);
    let conv = m.gated_delta.conv_size as u64;
    let matrix = inner * d;
    let delta = (5 * matrix + 2 * h * d + 2 * h + k + 3 * inner * conv, 5 * matrix);
    match kind {
        MixerKind::GatedDelta => delta,
        MixerKind::SpanKnot => (delta.0 + d * d + 1, delta.1 + d * d),
        MixerKind::Mlstm => (5 * matrix + inner + 2 * (h * d + h), 5 * matrix),
        MixerKind::Titans => {
            let memory = 2 * inner * k * m.titans.memory_expansion as u64;
            let slots = m.titans.persistent_slots as u64 * d;
            (4 * matrix + inner + 3 * (h * d + h) + slots + 2 * matrix + memory, 4 * matrix)
        }
    }
}

/// Counts by part; parts that the model lacks are left out.
pub fn parts(model: &ModelConfig) -> Vec<Part> {
    let (m, d) = (model, model.hidden_size as u64);
    let embedding = m.vocab_size as u64 * d;
    let mut out = vec![Part { name: "embedding (tied head)", layers: 1, parameters: embedding, ternary: 0 }];
    for (kind, name) in MixerKind::ALL.into_iter().zip(["gated DeltaNet", "mLSTM", "Titans", "span knot"]) {
        let ((all, ternary), n) = (mixer_count(m, kind), m.count(kind));
        out.push(Part { name, layers: n, parameters: n as u64 * all, ternary: n as u64 * ternary });
    }
    let n_moe = m.moe.as_ref().map_or(0, |moe| moe.layers.len());
    let n_dense = m.layers.len() - n_moe;
    let dense = n_dense as u64 * 3 * d * m.intermediate_size as u64;
    out.push(Part { name: "dense feed-forward", layers: n_dense, parameters: dense, ternary: dense });
    if let Some(moe) = &m.moe {
        let expert = n_moe as u64 * 3 * d * moe.width as u64;
        let (routed, shared) = (expert * moe.n_routed as u64, expert * moe.n_shared as u64);
        let router = n_moe as u64 * moe.n_routed as u64 * (d + 1);
        out.push(Part { name: "routed experts", layers: n_moe, parameters: routed, ternary: routed });
        out.push(Part { name: "shared experts", layers: n_moe, parameters: shared, ternary: shared });
        out.push(Part { name: "routers", layers: n_moe, parameters: router, ternary: 0 });
    }
    let norms = (2 * m.layers.len() as u64 + 1) * d;
    out.push(Part { name: "norms", layers: m.layers.len(), parameters: norms, ternary: 0 });
    if let Some(looping) = &m.looping {
        let parameters = 4 * d + if looping.c { d * d } else { 0 };
        out.push(Part { name: "loop", layers: 1, parameters, ternary: 0 });
    }
    out.retain(|part| part.parameters > 0);
    out
}

/// Number of all parameters, the tied embedding once.
pub fn parameter_count(model: &ModelConfig) -> u64 {
    parts(model).iter().map(|part| part.parameters).sum()
}

/// Parameters that one token passes when the loop runs `loops` times: mixers, dense layers, chosen and shared experts;
/// without embedding, head and norms.
pub fn active_parameters(model: &ModelConfig, loops: usize) -> u64 {
    let layer = |i: usize| {
        let feed_forward = match model.moe.as_ref().filter(|_| model.is_moe(i)) {
            None => model.intermediate_size,
            Some(moe) => moe.width * (moe.top_k + moe.n_shared),
        };
        let times = if model.is_looped(i) { loops as u64 } else { 1 };
        times * (mixer_count(model, model.layers[i]).0 + 3 * (model.hidden_size * feed_forward) as u64)
    };
    (0..model.layers.len()).map(layer).sum()
}

/// Memory of the recurrent state of one stream, for the layers of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateRow {
    /// Kind of layer.
    pub kind: MixerKind,
    /// Number of such layers.
    pub layers: usize,
    /// Time states: one a layer and loop iteration.
    pub states: usize,
    /// Bytes of one state.
    pub bytes_each: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// State memory of one stream with float32 states and 16-bit sketch counters, when the loop runs `loops` times.
pub fn state_memory(model: &ModelConfig, loops: usize) -> Vec<StateRow> {
    let row = |kind: MixerKind| {
        let [inner, h, k] = [model.inner_width(), model.n_heads, model.head_dim].map(|v| v as u64);
        let delta = 4 * (inner * k + 3 * (model.gated_delta.conv_size as u64 - 1) * inner);
        let bytes_each = match kind {
            MixerKind::GatedDelta => delta,
            MixerKind::SpanKnot => delta + 2 * model.knot.vector_bits as u64,
            MixerKind::Mlstm => 4 * (inner * k + inner + h),
            MixerKind::Titans => {
                let window = match model.titans.core {
                    TitansCore::SlidingWindow => 2 * model.titans.window as u64 * inner,
                    TitansCore::PersistentOnly => 0,
                };
                4 * (6 * inner * k * model.titans.memory_expansion as u64 + window)
            }
        };
        let of_kind = |i: &usize| model.layers[*i] == kind;
        let states = (0..model.layers.len()).filter(of_kind).map(|i| if model.is_looped(i) { loops } else { 1 }).sum();
        StateRow { kind, layers: model.count(kind), states, bytes_each, bytes: states as u64 * bytes_each }
    };
    MixerKind::ALL.into_iter().map(row).filter(|row| row.layers > 0).collect()
}

/// Unit of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Number of parameters.
    Parameters,
    /// Millions of bytes.
    Megabytes,
}

/// A size that the file declares beside the one that its shapes give.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    /// Key of the declaration.
    pub path: String,
    /// Declared value.
    pub declared: f64,
    /// Computed value.
    pub computed: f64,
    /// Unit of both.
    pub unit: Unit,
    /// What was computed.
    pub meaning: &'static str,
    /// Whether the declaration is a budget, which need not be used up.
    pub budget: bool,
}

impl Claim {
    /// Whether the two differ by at most five percent, or the budget suffices.
    pub fn agrees(&self) -> bool {
        let excess = self.computed - self.declared;
        excess <= 0.05 * self.computed && (self.budget || -excess <= 0.05 * self.computed)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: f64| match self.unit {
            Unit::Parameters => grouped(value as u64),
            Unit::Megabytes => format!("{value:.1} MB"),
        };
        let (declared, computed) = (show(self.declared), show(self.computed));
        write!(f, "{} declares {declared}, the shapes give {computed} ({})", self.path, self.meaning)
    }
}

/// A count with a comma before every three digits.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let comma = |at: usize| if at > 0 && (digits.len() - at).is_multiple_of(3) { "," } else { "" };
    digits.char_indices().map(|(at, digit)| format!("{}{digit}", comma(at))).collect()
}

/// The declared sizes of a loaded file that can be computed, in the file's order.
pub fn claims(loaded: &Loaded) -> Vec<Claim> {
    use Unit::{Megabytes, Parameters};
    let model = &loaded.model;
    let parts = parts(model);
    let sum = |names: &[&str]| -> f64 {
        parts.iter().filter(|p| names.contains(&p.name)).map(|p| p.parameters).sum::<u64>() as f64
    };
    let total = parameter_count(model) as f64;
    let ternary: u64 = parts.iter().map(|p| p.ternary).sum();
    let experts = sum(&["routed experts", "shared experts"]);
    let active = |loops| active_parameters(model, loops) as f64;
    let passed = model.moe.as_ref().map_or(0, |moe| {
        moe.layers.len() as u64 * 3 * (model.hidden_size * moe.width * (moe.top_k + moe.n_shared)) as u64
    }) as f64;
    let loops = model.looping.as_ref().map_or(1, |l| l.default);
    let state = state_memory(model, loops).iter().map(|row| row.bytes).sum::<u64>() as f64 / 1e6;
    let bytes_each = 2.0 / 8.0 + 2.0 / model.quantization.group_size as f64;
    let weights = (bytes_each * ternary as f64 + 4.0 * (total - ternary as f64)) / 1e6;
    let known = |path: &str| {
        Some(match path {
            "backbone.moe.total_params" | "params.moe_total" => (experts, Parameters, "all experts"),
            "backbone.moe.active_params_per_tok" => (passed, Parameters, "chosen and shared experts"),
            "params.base" => (total - experts, Parameters, "all but experts"),
            "params.physical" => (total, Parameters, "all parameters"),
            "params.effective_2loops" => (active(2), Parameters, "passed by a token in two iterations"),
            "params.effective_6loops" => (active(6), Parameters, "passed by a token in six iterations"),
            "params.active_per_token" => (active(1), Parameters, "passed by a token in one iteration"),
            "params.weight_mb" => {
                (weights, Megabytes, "ternary at 2 bits and a 16-bit scale a group, the rest as float32")
            }
            "braid_state.per_stream_mb" | "deployment.per_stream_mb" => {
                (state, Megabytes, "recurrent state of a stream at the default loop count")
            }
            _ => return None,
        })
    };
    let claim = |(path, value): (&str, &serde_json::Value)| {
        let (computed, unit, meaning) = known(path)?;
        let budget = path.ends_with("per_stream_mb");
        Some(Claim { path: path.to_owned(), declared: size_of(value)?, computed, unit, meaning, budget })
    };
    loaded.declared.iter().filter_map(|d| claim((&d.path, &d.value))).collect()
}
