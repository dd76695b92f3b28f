//! The typed model that a configuration describes.
//!
//! A value that [`super::load`] returned satisfies every rule of the key table and all rules between keys, and its
//! sizes are bounded so that no product of them overflows 64 bits.

/// Token mixer of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MixerKind {
    /// Gated DeltaNet, `GD`.
    GatedDelta,
    /// Matrix LSTM, `XM`.
    Mlstm,
    /// Titans memory as context, `TM`.
    Titans,
    /// Span Knot on top of a gated DeltaNet, `SK`.
    SpanKnot,
}

/// What shares one weight scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightScale {
    /// Every `group_size` consecutive inputs of a row; the last group may be short.
    Group,
    /// Every row.
    Row,
    /// The whole matrix.
    Tensor,
}

/// How activations enter a ternary product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// int8 with one scale per `activation_block_size` inputs; the last block may be short.
    Block,
    /// int8 with one scale per token.
    Token,
    /// Unquantised float32.
    Float,
}

/// A ternary quantiser with a state: a scale for each weight that follows its mean magnitude, and a threshold.
#[derive(Clone, Debug, PartialEq)]
pub struct Dynamic {
    /// Whether weights are rounded to the nearest code; the threshold is then half of the scale.
    pub strict: bool,
    /// Decay of the running mean of magnitudes.
    pub ema: f64,
    /// First threshold, as a share of the scale.
    pub alpha_min: f64,
    /// Threshold behind the warm-up.
    pub alpha_target: f64,
    /// Training steps of the warm-up.
    pub warmup: u64,
    /// Bits of a weight that a controller of the threshold aims at; 0 without one.
    pub target_bits: f64,
    /// Training steps between its corrections.
    pub control_steps: u64,
}

/// Quantisation of the ternary layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantization {
    /// What shares one weight scale.
    pub weight_scale: WeightScale,
    /// Inputs of one group.
    pub group_size: usize,
    /// A weight is zero when its magnitude is at most this times its scale.
    pub threshold_ratio: f64,
    /// A threshold and scales that change in training; none where both follow from the weights.
    pub dynamic: Option<Dynamic>,
    /// How activations enter.
    pub activation: Activation,
    /// Inputs of one activation block.
    pub activation_block_size: usize,
}

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Layers with experts, ascending.
    pub layers: Vec<usize>,
    /// Experts to choose from.
    pub n_routed: usize,
    /// Shared experts; they form one expert of `n_shared * width`.
    pub n_shared: usize,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// Width of one expert.
    pub width: usize,
    /// Factor on the weights of the chosen experts.
    pub route_scale: f64,
    /// Step of the selection bias after an update.
    pub bias_update_rate: f64,
}

/// Gated DeltaNet.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedDeltaConfig {
    /// Tokens of one parallel chunk; changes speed and rounding only.
    pub chunk_size: usize,
    /// Doubles the write gate.
    pub allow_neg_eigval: bool,
    /// Taps of the short convolutions.
    pub conv_size: usize,
}

/// Matrix LSTM.
#[derive(Clone, Debug, PartialEq)]
pub struct MlstmConfig {
    /// Bound `c` of the gates: `c * tanh(x / c)`.
    pub gate_soft_cap: f64,
    /// Tokens of one parallel chunk; changes speed and rounding only.
    pub chunk_size: usize,
}

/// What the softmax of a Titans layer runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TitansCore {
    /// Persistent slots, a sliding window and the memory's answer.
    SlidingWindow,
    /// Persistent slots and the memory's answer.
    PersistentOnly,
}

/// Step size of the Titans memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepRule {
    /// `step_max * sigmoid * (1 - momentum) / inner_chunk`, each gradient divided by its normaliser.
    Normalised,
    /// `0.1 * sigmoid`.
    Plain,
}

/// Titans memory.
#[derive(Clone, Debug, PartialEq)]
pub struct TitansConfig {
    /// What the softmax runs over.
    pub core: TitansCore,
    /// Hidden width of the memory in head sizes.
    pub memory_expansion: usize,
    /// Tokens between anchors of the memory; part of the mathematics.
    pub inner_chunk: usize,
    /// Trained slots.
    pub persistent_slots: usize,
    /// Tokens of the sliding window, the current one included.
    pub window: usize,
    /// Base of the rotation angles.
    pub rope_theta: f64,
    /// Step size rule.
    pub step_rule: StepRule,
    /// Largest normalised step.
    pub step_max: f64,
}

/// Span Knot.
#[derive(Clone, Debug, PartialEq)]
pub struct KnotConfig {
    /// Whether the second phase runs.
    pub enabled: bool,
    /// Weight of the hidden state's own sketch; positive.
    pub autoregressive: f64,
    /// Weight of the running sketch.
    pub memory_coherence: f64,
    /// Weight of the bound token.
    pub binding_fidelity: f64,
    /// Most relaxation steps.
    pub max_iters: usize,
    /// Share of the bits that one step may flip; the limit is `floor(flip_fraction * vector_bits)`.
    pub flip_fraction: f64,
    /// Energy gain that ends the relaxation.
    pub exit_delta: f64,
    /// Bits of a sketch: a power of two times [`ModelConfig::sketch_width`] when the model has Span Knot layers.
    pub vector_bits: usize,
}

/// Looping of the middle layers. The three ranges are inclusive, adjacent, and cover all layers.
#[derive(Clone, Debug, PartialEq)]
pub struct LoopConfig {
    /// First and last layer before the loop.
    pub prelude: [usize; 2],
    /// First and last looped layer.
    pub body: [usize; 2],
    /// First and last layer after the loop.
    pub coda: [usize; 2],
    /// Least and most iterations.
    pub range: [usize; 2],
    /// Iterations where nothing else is asked for; inside `range`.
    pub default: usize,
    /// Whether training draws the iterations of every sequence, Poisson of mean `default` clamped to `range`, instead of `default`.
    pub stochastic: bool,
    /// Mean relative change of the state that ends the loop of a row, where adaptive depth is asked for.
    pub exit_threshold: f64,
    /// Exact zero-order hold on the input instead of the Euler form.
    pub zoh_exact: bool,
    /// Whether a trained matrix follows the loop.
    pub c: bool,
    /// Whether gradients flow through the last `ceil(n / 2)` iterations only.
    pub backward_half: bool,
}

/// Sampling defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Softness; 0 takes the best token.
    pub temperature: f64,
    /// Probability mass that is sampled from.
    pub top_p: f64,
    /// Divides (or multiplies, when negative) the scores of tokens already seen.
    pub repetition_penalty: f64,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
}

/// A complete, validated model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the dense feed-forward layers.
    pub intermediate_size: usize,
    /// Mixer of every layer.
    pub layers: Vec<MixerKind>,
    /// Heads of every mixer; `n_heads * head_dim` need not equal `hidden_size`.
    pub n_heads: usize,
    /// Key and value size of a head; even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Whether ternary layers whose input has no norm get a gain-free one.
    pub rms_norm_before_every_linear: bool,
    /// Standard deviation of initial matrices.
    pub initializer_range: f64,
    /// Seed of the fixed sketch transform and roles.
    pub model_seed: u64,
    /// Quantisation of the ternary layers.
    pub quantization: Quantization,
    /// Experts; none where every layer is dense.
    pub moe: Option<MoeConfig>,
    /// Gated DeltaNet, also inside Span Knots.
    pub gated_delta: GatedDeltaConfig,
    /// Matrix LSTM.
    pub mlstm: MlstmConfig,
    /// Titans memory.
    pub titans: TitansConfig,
    /// Span Knot.
    pub knot: KnotConfig,
    /// Looping; none where every layer runs once.
    pub looping: Option<LoopConfig>,
    /// Error-free write gate in the Span Knot layers.
    pub efla: bool,
    /// Sampling defaults.
    pub generation: GenerationConfig,
    /// Token that ends a document.
    pub eos: usize,
    /// Token that fills unused positions.
    pub pad: usize,
}

impl MixerKind {
    /// All kinds.
    pub const ALL: [MixerKind; 4] = [MixerKind::GatedDelta, MixerKind::Mlstm, MixerKind::Titans, MixerKind::SpanKnot];

    /// The word of a layer pattern.
    pub fn word(self) -> &'static str {
        match self {
            MixerKind::GatedDelta => "GD",
            MixerKind::Mlstm => "XM",
            MixerKind::Titans => "TM",
            MixerKind::SpanKnot => "SK",
        }
    }

    /// The kind of a layer pattern's word.
    pub fn from_word(word: &str) -> Option<MixerKind> {
        MixerKind::ALL.into_iter().find(|kind| kind.word() == word)
    }
}

impl ModelConfig {
    /// `n_heads * head_dim`, the width inside the mixers.
    pub fn inner_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Whether `layer` has experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe.as_ref().is_some_and(|moe| moe.layers.binary_search(&layer).is_ok())
    }

    /// Whether `layer` is inside the loop.
    pub fn is_looped(&self, layer: usize) -> bool {
        self.looping.as_ref().is_some_and(|l| (l.body[0]..=l.body[1]).contains(&layer))
    }

    /// Number of layers of one kind.
    pub fn count(&self, kind: MixerKind) -> usize {
        self.layers.iter().filter(|k| **k == kind).count()
    }

    /// Length of one sketch transform: the least power of two that holds the hidden size.
    pub fn sketch_width(&self) -> usize {
        self.hidden_size.next_power_of_two()
    }
}
