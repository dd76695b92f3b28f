//! From a checked document to a [`ModelConfig`]: reads the consumed keys and applies the rules between keys.
//!
//! Types and bounds of single keys were checked against the table before; here a missing key is a defect of the table.

use super::error::{Code, ConfigError, nearest, shown};
use super::json::{Node, Number, Sources, Span, Value};
use super::model::{
    Activation, Dynamic, GatedDeltaConfig, GenerationConfig, KnotConfig, LoopConfig, MixerKind, MlstmConfig,
    ModelConfig, MoeConfig, Quantization, StepRule, TitansConfig, TitansCore, WeightScale,
};
use super::presets::O200K_VOCABULARY;

/// Most tensors of a model; keeps the parameter list small.
const MAX_TENSORS: usize = 1 << 20;
/// Most parameters of a model; keeps byte counts far from overflow.
const MAX_PARAMETERS: u64 = 1 << 44;

/// The document laid over the defaults.
pub(super) struct Reader<'a> {
    pub(super) sources: &'a Sources,
    pub(super) root: &'a Node,
    /// Source number of the defaults.
    pub(super) defaults: usize,
}

impl Reader<'_> {
    fn find(&self, path: &str) -> Option<&Node> {
        self.root.get(path)
    }

    fn node(&self, path: &str) -> &Node {
        self.find(path).unwrap_or_else(|| panic!("the key table gives `{path}` a default"))
    }

    fn is_default(&self, path: &str) -> bool {
        self.find(path).is_none_or(|node| node.span.source == self.defaults)
    }

    fn number(&self, path: &str) -> Number {
        let mut node = self.node(path);
        if let Value::List(list) = &node.value {
            node = list.first().unwrap_or_else(|| panic!("the key table gives `{path}` an element"));
        }
        match node.value {
            Value::Number(n) => n,
            _ => panic!("the key table makes `{path}` a number"),
        }
    }

    fn num(&self, path: &str) -> f64 {
        self.number(path).value
    }

    fn int(&self, path: &str) -> usize {
        let int = self.number(path).int.and_then(|i| usize::try_from(i).ok());
        int.unwrap_or_else(|| panic!("the key table makes `{path}` a count"))
    }

    fn seed(&self) -> u64 {
        let int = self.number("model_seed").int.and_then(|i| u64::try_from(i).ok());
        int.expect("the key table makes `model_seed` a 64-bit count")
    }

    fn flag(&self, path: &str) -> bool {
        match self.node(path).value {
            Value::Bool(b) => b,
            _ => panic!("the key table makes `{path}` a boolean"),
        }
    }

    fn word(&self, path: &str) -> &str {
        match &self.node(path).value {
            Value::Text(s) => s,
            _ => panic!("the key table makes `{path}` a text"),
        }
    }

    fn ints(&self, path: &str) -> Vec<usize> {
        let Value::List(list) = &self.node(path).value else { panic!("the key table makes `{path}` a list") };
        let int = |node: &Node| match node.value {
            Value::Number(Number { int: Some(i), .. }) => usize::try_from(i).ok(),
            _ => None,
        };
        list.iter().map(|n| int(n).unwrap_or_else(|| panic!("the key table makes `{path}` counts"))).collect()
    }

    fn pair(&self, path: &str) -> [usize; 2] {
        self.ints(path).try_into().unwrap_or_else(|_| panic!("the key table makes `{path}` a pair"))
    }

    fn conflict(&self, path: &str, message: impl Into<String>) -> ConfigError {
        self.sources.error(Code::Dimensions, self.node(path).span, message).at_key(path)
    }

    fn unsupported(&self, path: &str, what: String) -> ConfigError {
        let message = format!("{what} are not implemented");
        self.sources.error(Code::Unsupported, self.node(path).span, message).at_key(path)
    }

    /// The model, or the first rule that the document breaks.
    pub(super) fn model(&self) -> Result<ModelConfig, ConfigError> {
        let layers = self.layers()?;
        let vocab_size = self.int("vocab_size");
        let [eos, pad] = self.token_ids(vocab_size)?;
        let model = ModelConfig {
            hidden_size: self.int("hidden_size"),
            intermediate_size: self.int("intermediate_size"),
            n_heads: self.int("num_heads"),
            head_dim: self.head_dim()?,
            vocab_size,
            rms_norm_eps: self.num("rms_norm_eps"),
            rms_norm_before_every_linear: self.flag("rms_norm_before_every_linear"),
            initializer_range: self.num("initializer_range"),
            model_seed: self.seed(),
            quantization: self.quantization()?,
            moe: self.moe(layers.len())?,
            gated_delta: GatedDeltaConfig {
                chunk_size: self.int("gated_deltanet.chunk_size"),
                allow_neg_eigval: self.flag("gated_deltanet.allow_neg_eigval"),
                conv_size: self.int("gated_deltanet.conv_size"),
            },
            mlstm: MlstmConfig {
                gate_soft_cap: self.num("xlstm.gate_soft_cap"),
                chunk_size: self.int("xlstm.chunk_size"),
            },
            titans: self.titans(),
            knot: self.knot(),
            looping: self.looping(layers.len())?,
            efla: self.flag("efla.enabled"),
            generation: self.generation(),
            eos,
            pad,
            layers,
        };
        self.check_sketch(&model)?;
        self.check_size(&model)?;
        Ok(model)
    }

    fn layers(&self) -> Result<Vec<MixerKind>, ConfigError> {
        const PATTERN: &str = "backbone.layer_pattern";
        let node = self.node(PATTERN);
        let text = self.word(PATTERN);
        let mut pattern = Vec::new();
        for word in text.split_whitespace() {
            let Some(kind) = MixerKind::from_word(word) else {
                let error = self.sources.error(
                    Code::Word,
                    self.word_span(node, text, word),
                    format!("`{}` is not a mixer", shown(word)),
                );
                let known = MixerKind::ALL.map(MixerKind::word);
                let error = error.at_key(PATTERN).expected(format!("words of {}", known.join(", ")));
                return Err(match nearest(word, known.into_iter()) {
                    Some(word) => error.help(format!("did you mean `{word}`?")),
                    None => error,
                });
            };
            pattern.push(kind);
        }
        if pattern.is_empty() {
            return Err(self.conflict(PATTERN, "the layer pattern is empty").expected("words such as \"GD XM GD TM\""));
        }
        let n = self.int("num_hidden_layers");
        let layers: Vec<MixerKind> = pattern.iter().copied().cycle().take(n).collect();
        self.check_layer_claims(pattern.len(), &layers)?;
        Ok(layers)
    }

    /// Place of `word` inside the text value `node`, as far as the text is written without escapes.
    fn word_span(&self, node: &Node, text: &str, word: &str) -> Span {
        let quoted = usize::from(self.sources.text(node.span).starts_with('"'));
        if node.span.end - node.span.start != text.len() + 2 * quoted {
            return node.span;
        }
        let at = node.span.start + quoted + (word.as_ptr() as usize - text.as_ptr() as usize);
        Span { start: at, end: at + word.len(), ..node.span }
    }

    fn check_layer_claims(&self, pattern: usize, layers: &[MixerKind]) -> Result<(), ConfigError> {
        const REPEAT: &str = "backbone.layer_pattern_repeat";
        if self.find(REPEAT).is_some() {
            let claimed = self.num(REPEAT) * pattern as f64;
            if (claimed - layers.len() as f64).abs() > 1e-6 {
                let message = format!(
                    "{pattern} mixers repeated {} times give {claimed} layers, not {}",
                    self.num(REPEAT),
                    layers.len()
                );
                return Err(self.conflict(REPEAT, message).help("correct it, or leave it out"));
            }
        }
        if self.find("backbone.layer_counts").is_none() {
            return Ok(());
        }
        for kind in MixerKind::ALL {
            let path = format!("backbone.layer_counts.{}", kind.word());
            let claimed = if self.find(&path).is_some() { self.int(&path) } else { 0 };
            let found = layers.iter().filter(|k| **k == kind).count();
            if claimed != found {
                let place = if self.find(&path).is_some() { path.as_str() } else { "backbone.layer_counts" };
                let message = format!("{claimed} {} layers are declared, the pattern gives {found}", kind.word());
                return Err(self.conflict(place, message).help("correct the pattern, or leave layer_counts out"));
            }
        }
        Ok(())
    }

    fn head_dim(&self) -> Result<usize, ConfigError> {
        let head_dim = self.int("head_dim");
        if !head_dim.is_multiple_of(2) {
            return Err(self.conflict("head_dim", format!("head_dim is {head_dim}")).expected("an even number"));
        }
        let width = head_dim * self.int("num_heads");
        if width > 1 << 18 {
            let message = format!("{} heads of {head_dim} are {width} wide", self.int("num_heads"));
            return Err(self.conflict("num_heads", message).expected(format!("at most {} together", 1 << 18)));
        }
        let same = format!("head_dim is {head_dim}");
        const STATE: &str = "gated_deltanet.state_size";
        if self.find(STATE).is_some() && self.int(STATE) != head_dim {
            let message = format!("state_size is {}, {same}", self.int(STATE));
            return Err(self.conflict(STATE, message).help("make them equal, or leave state_size out"));
        }
        const MEMORY: &str = "xlstm.memory_size_per_head";
        if self.find(MEMORY).is_some() && self.pair(MEMORY) != [head_dim, head_dim] {
            let message = format!("memory_size_per_head is {:?}, {same}", self.pair(MEMORY));
            return Err(self.conflict(MEMORY, message).expected(format!("[{head_dim}, {head_dim}]")));
        }
        Ok(head_dim)
    }

    fn token_ids(&self, vocab_size: usize) -> Result<[usize; 2], ConfigError> {
        if self.is_default("token_ids") && vocab_size != O200K_VOCABULARY {
            return Ok([vocab_size - 1; 2]);
        }
        let ids = self.pair("token_ids");
        match ids.iter().find(|id| **id >= vocab_size) {
            None => Ok(ids),
            Some(id) => Err(self
                .conflict("token_ids", format!("token {id} is outside the vocabulary of {vocab_size}"))
                .help("leave token_ids out (`--set token_ids=null`) to end texts with the last token")),
        }
    }

    fn quantization(&self) -> Result<Quantization, ConfigError> {
        let weight_scale = match self.word("quantization.weight_scale") {
            "absmean_per_row" => WeightScale::Row,
            "absmean_per_tensor" => WeightScale::Tensor,
            _ => WeightScale::Group,
        };
        let activation = match self.word("quantization.activation_method") {
            "absmax_per_token" => Activation::Token,
            "none" => Activation::Float,
            _ => Activation::Block,
        };
        let group_size = self.int("quantization.group_size");
        let block = self.int("quantization.activation_block_size");
        if activation == Activation::Block && ![64, 128].contains(&block) {
            return Err(self
                .unsupported("quantization.activation_block_size", format!("blocks of {block} inputs"))
                .expected("64 or 128; one scale for a whole row is quantization.activation_method absmax_per_token"));
        }
        if (weight_scale, activation) == (WeightScale::Group, Activation::Token) && !group_size.is_multiple_of(64) {
            return Err(self
                .unsupported("quantization.group_size", format!("weight groups of {group_size} with int8 activations"))
                .expected("a multiple of 64"));
        }
        if (weight_scale, activation) == (WeightScale::Group, Activation::Block) && !group_size.is_multiple_of(block) {
            let at = if self.is_default("quantization.group_size") { "activation_block_size" } else { "group_size" };
            let message = format!("a weight group of {group_size} is not a whole number of blocks of {block}");
            return Err(self
                .conflict(&format!("quantization.{at}"), message)
                .expected("group_size a multiple of activation_block_size"));
        }
        let strict = self.word("quantization.dynamic.mode") == "strict_bitnet";
        let dynamic = (self.word("quantization.dynamic.mode") != "off").then(|| Dynamic {
            strict,
            ema: self.num("quantization.dynamic.ema"),
            alpha_min: self.num("quantization.dynamic.alpha_min"),
            alpha_target: self.num("quantization.dynamic.alpha_target"),
            warmup: self.int("quantization.dynamic.warmup_steps") as u64,
            target_bits: self.num("quantization.dynamic.target_bits"),
            control_steps: self.int("quantization.dynamic.control_steps") as u64,
        });
        if dynamic.is_some() && weight_scale != WeightScale::Tensor {
            return Err(self
                .conflict(
                    "quantization.dynamic.mode",
                    "the scale of a dynamic quantiser belongs to a whole weight".to_owned(),
                )
                .expected("quantization.weight_scale absmean_per_tensor"));
        }
        Ok(Quantization {
            weight_scale,
            dynamic,
            group_size,
            threshold_ratio: self.num("quantization.threshold_ratio"),
            activation,
            activation_block_size: block,
        })
    }

    fn moe(&self, n_layers: usize) -> Result<Option<MoeConfig>, ConfigError> {
        if !self.flag("backbone.moe.enabled") {
            return Ok(None);
        }
        const LAYERS: &str = "backbone.moe.layers";
        let mut layers = self.ints(LAYERS);
        if self.is_default(LAYERS) {
            layers = (0..n_layers).filter(|i| i % 4 == 3).collect();
        }
        layers.sort_unstable();
        if let Some(outside) = layers.last().filter(|i| **i >= n_layers) {
            let message = format!("layer {outside} does not exist");
            return Err(self.conflict(LAYERS, message).expected(format!("layers from 0 to {}", n_layers - 1)));
        }
        if let Some(twice) = layers.windows(2).find(|w| w[0] == w[1]) {
            return Err(self.conflict(LAYERS, format!("layer {} occurs twice", twice[0])));
        }
        let (n_routed, top_k) =
            (self.int("backbone.moe.n_routed_experts"), self.int("backbone.moe.num_experts_per_tok"));
        if top_k > n_routed {
            let message = format!("{top_k} experts are chosen out of {n_routed}");
            return Err(self
                .conflict("backbone.moe.num_experts_per_tok", message)
                .expected(format!("1 to {n_routed}")));
        }
        let moe = MoeConfig {
            layers,
            n_routed,
            n_shared: self.int("backbone.moe.n_shared_experts"),
            top_k,
            width: self.int("backbone.moe.moe_intermediate_size"),
            route_scale: self.num("backbone.moe.route_scale"),
            bias_update_rate: self.num("backbone.moe.bias_update_rate"),
        };
        Ok(if moe.layers.is_empty() { None } else { Some(moe) })
    }

    fn titans(&self) -> TitansConfig {
        TitansConfig {
            core: match self.word("titans.core") {
                "persistent_only" => TitansCore::PersistentOnly,
                _ => TitansCore::SlidingWindow,
            },
            memory_expansion: self.int("titans.memory_expansion"),
            inner_chunk: self.int("titans.inner_chunk"),
            persistent_slots: self.int("titans.persistent_memory_slots"),
            window: self.int("titans.local_window_size"),
            rope_theta: self.num("titans.rope_theta"),
            step_rule: match self.word("titans.step_rule") {
                "plain" => StepRule::Plain,
                _ => StepRule::Normalised,
            },
            step_max: self.num("titans.step_max"),
        }
    }

    fn knot(&self) -> KnotConfig {
        KnotConfig {
            enabled: self.flag("tsp_knot.enabled"),
            autoregressive: self.num("tsp_knot.energy_terms.autoregressive"),
            memory_coherence: self.num("tsp_knot.energy_terms.memory_coherence"),
            binding_fidelity: self.num("tsp_knot.energy_terms.binding_fidelity"),
            max_iters: self.int("tsp_knot.relaxation_phase2_max_iters"),
            flip_fraction: self.num("tsp_knot.relaxation_phase2_flip_fraction"),
            exit_delta: self.num("tsp_knot.early_exit_delta_e"),
            vector_bits: self.int("semantic_memory.vector_bits"),
        }
    }

    fn generation(&self) -> GenerationConfig {
        let sampled = self.flag("generation.do_sample");
        GenerationConfig {
            temperature: if sampled { self.num("generation.temperature") } else { 0.0 },
            top_p: self.num("generation.top_p"),
            repetition_penalty: self.num("generation.repetition_penalty"),
            max_new_tokens: self.int("generation.max_new_tokens"),
        }
    }

    fn looping(&self, n_layers: usize) -> Result<Option<LoopConfig>, ConfigError> {
        if !self.flag("looping.enabled") {
            return Ok(None);
        }
        let parts = ["looping.prelude", "looping.loop", "looping.coda"];
        let [prelude, body, coda] = if parts.iter().all(|p| self.is_default(p)) {
            if n_layers < 3 {
                let message = format!("{n_layers} layers cannot be looped");
                return Err(self.conflict("num_hidden_layers", message).help("set looping.enabled to false"));
            }
            let ends = n_layers.div_ceil(7).min((n_layers - 1) / 2);
            [[0, ends - 1], [ends, n_layers - ends - 1], [n_layers - ends, n_layers - 1]]
        } else {
            parts.map(|p| self.pair(p))
        };
        let explicit =
            |path| parts.into_iter().find(|p| !self.is_default(p)).filter(|_| self.is_default(path)).unwrap_or(path);
        let mut next = 0;
        for (path, [first, last]) in parts.into_iter().zip([prelude, body, coda]) {
            if first != next || last < first || last >= n_layers {
                let message = format!("{path} from {first} to {last} does not continue at layer {next}");
                return Err(self.conflict(explicit(path), message).expected(format!(
                    "prelude, loop and coda that follow one another and cover the layers 0 to {}",
                    n_layers - 1
                )));
            }
            next = last + 1;
        }
        if next != n_layers {
            let message = format!("the coda ends at layer {}, the last layer is {}", next - 1, n_layers - 1);
            return Err(self.conflict(explicit("looping.coda"), message));
        }
        let (range, default) = (self.pair("looping.loop_range"), self.int("looping.loop_default"));
        if !(range[0]..=range[1]).contains(&default) {
            let message = format!("{default} iterations are outside {} to {}", range[0], range[1]);
            let explicit = ["looping.loop_default", "looping.loop_range"].into_iter().find(|p| !self.is_default(p));
            return Err(self
                .conflict(explicit.unwrap_or("looping.loop_default"), message)
                .expected("loop_range[0] <= loop_default <= loop_range[1]"));
        }
        Ok(Some(LoopConfig {
            prelude,
            body,
            coda,
            range,
            default,
            stochastic: self.word("looping.depth_selection") == "stochastic_per_sequence",
            exit_threshold: self.num("looping.adaptive_exit_threshold"),
            zoh_exact: self.word("looping.zoh_input") == "exact",
            c: self.flag("looping.C"),
            backward_half: self.word("looping.backward_truncation") == "half",
        }))
    }

    fn check_sketch(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        let (bits, width) = (model.knot.vector_bits, model.sketch_width());
        if model.count(MixerKind::SpanKnot) == 0 || (bits.is_multiple_of(width) && (bits / width).is_power_of_two()) {
            return Ok(());
        }
        let path = "semantic_memory.vector_bits";
        let at = if self.is_default(path) { "hidden_size" } else { path };
        let message = format!("a sketch of {bits} bits does not fit a hidden size of {}", model.hidden_size);
        Err(self.conflict(at, message).expected(format!("vector_bits a power of two times {width}")))
    }

    fn check_size(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        let experts = model.moe.as_ref().map_or(0, |moe| moe.layers.len() * (3 * moe.n_routed + 5));
        let tensors = model.layers.len() * 32 + experts;
        if tensors > MAX_TENSORS {
            let message = format!("the model has about {tensors} tensors");
            return Err(self.conflict("backbone.moe.n_routed_experts", message).expected("at most 1048576"));
        }
        let parameters = super::sizes::parameter_count(model);
        if parameters > MAX_PARAMETERS {
            let message = format!("the model has {parameters} parameters");
            return Err(self.conflict("hidden_size", message).expected(format!("at most {MAX_PARAMETERS}")));
        }
        Ok(())
    }
}
