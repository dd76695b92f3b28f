//! The one table of configuration keys: path, values, disposition, default, purpose.
//!
//! A key is here or it is an error. Columns: see [`Row`]. The defaults of the consumed keys are those of the full model.

use super::keys::Kind::{self, Any, Bool, Choice, Either, Equals, Flag, Int, List, Num, Size, Text, Tuple, Words};
use super::keys::{Disposition, Row};

macro_rules! keys {
    ($($path:literal, $kind:expr, $disposition:ident, $default:literal, $text:literal;)*) => {
        &[$(Row { path: $path, kind: $kind, disposition: Disposition::$disposition, default: $default, text: $text },)*]
    };
}

const COUNT: Kind = Int(0, 1 << 53);
const POSITIVE: Kind = Num(1e-9, 1e9);
const SHARE: Kind = Num(0.0, 1.0);
const TEXTS: Kind = List(&Text, 0, 1024);
const NUMBERS: Kind = List(&Num(-1e9, 1e9), 0, 1024);
const LAYER: Kind = Int(0, 1023);
const RANGE: Kind = List(&LAYER, 2, 2);
const STAGE: Kind = Tuple(&[Int(1, 1 << 30), Either(&Words(&["main"]), &COUNT), Num(0.0, 1e3)], 2);
const MEGABYTES: Kind = Num(0.0, 1e9);

/// All rows, in the order of a full configuration file.
pub static TABLE: &[Row] = keys! {
    "**.§", Any, Note, "", "papers behind a section";
    "**.§_hyper", Any, Note, "", "papers behind a section";
    "**.§_paradigm", Any, Note, "", "papers behind a section";
    "**._note", Text, Note, "", "remark";
    "$schema", Text, Note, "", "schema for editors";
    "_name_or_path", Text, Note, "", "name of the model";
    "_v", Text, Note, "", "version of the file";
    "architectures", TEXTS, Note, "", "class name elsewhere";
    "auto_map.*", Text, Note, "", "class name elsewhere";
    "model_type", Text, Note, "", "family name elsewhere";
    "transformers_version", Text, Note, "", "version of another library";
    "torch_dtype", Text, Note, "", "type elsewhere; latents and activations are float32 here";
    "use_cache", Bool, Note, "", "setting of another library; decoding is always by state";
    "max_position_embeddings", COUNT, Note, "", "no layer has a position limit";
    "zo.**", Any, Note, "", "options of a recorded training run";

    "token_ids", List(&Int(0, (1 << 22) - 1), 2, 2), Consumed, "[199999, 200058]", "ids of end of text and padding; with another vocabulary size than 200073 the default is its last id";
    "hidden_size", Int(1, 65_536), Consumed, "2560", "width of the residual stream";
    "intermediate_size", Int(1, 1 << 20), Consumed, "6912", "width of the dense feed-forward layers";
    "num_hidden_layers", Int(1, 1024), Consumed, "28", "number of layers";
    "num_heads", Int(1, 4096), Consumed, "40", "heads of every mixer";
    "head_dim", Int(2, 1024), Consumed, "64", "key and value size of a head; even";
    "hidden_act", Choice(&["swiglu"], &["gelu", "relu", "silu", "geglu", "relu2"]), Declared, "\"swiglu\"", "feed-forward activation";
    "initializer_range", Num(0.0, 10.0), Consumed, "0.006", "standard deviation of initial matrices";
    "rms_norm_eps", Num(1e-30, 1.0), Consumed, "1e-6", "added to the mean square in every norm";
    "rms_norm_before_every_linear", Bool, Consumed, "true", "gain-free norm before ternary layers whose input has none";
    "vocab_size", Int(1, 1 << 22), Consumed, "200073", "rows of the embedding";
    "tie_word_embeddings", Flag(true), Declared, "true", "the head is the embedding";
    "model_seed", Int(0, u64::MAX), Consumed, "0", "seed of the fixed sketch transform and roles";

    "quantization.method", Choice(&["bitnet"], &[]), Declared, "", "ternary weights, int8 activations";
    "quantization.linear_class", Choice(&["ternary_bitplane"], &[]), Declared, "", "storage of ternary weights";
    "quantization.weight_bits", Equals("1.58"), Declared, "", "information in a ternary weight";
    "quantization.weight_values", Equals("[-1,0,1]"), Declared, "", "values of a ternary weight";
    "quantization.weight_scale", Words(&["absmean_per_group", "absmean_per_row", "absmean_per_tensor"]), Consumed, "\"absmean_per_group\"", "what shares one weight scale";
    "quantization.group_size", Int(1, 1 << 20), Consumed, "128", "inputs that share one weight scale";
    "quantization.threshold_ratio", Num(0.0, 100.0), Consumed, "0.5", "a weight below this times its scale is 0";
    "quantization.dynamic.mode", Words(&["off", "chimera", "strict_bitnet"]), Consumed, "\"off\"", "ternary threshold and scales that change in training";
    "quantization.dynamic.ema", SHARE, Consumed, "0.95", "decay of the running mean of magnitudes";
    "quantization.dynamic.alpha_min", Num(0.0, 1.5), Consumed, "0.0", "first threshold as a share of the scale";
    "quantization.dynamic.alpha_target", Num(0.0, 1.5), Consumed, "0.7", "threshold behind the warm-up";
    "quantization.dynamic.warmup_steps", Int(0, 1 << 32), Consumed, "100", "training steps of the warm-up";
    "quantization.dynamic.target_bits", Num(0.0, 1.585), Consumed, "0.0", "bits of a weight that the threshold is corrected for; 0 leaves it";
    "quantization.dynamic.control_steps", Int(1, 1 << 32), Consumed, "1", "training steps between corrections";
    "quantization.activation_bits", Equals("8"), Declared, "", "width of activation codes";
    "quantization.activation_method", Words(&["absmax_per_block", "absmax_per_token", "none"]), Consumed, "\"absmax_per_block\"", "what shares one activation scale";
    "quantization.activation_block_size", Int(1, 65_536), Consumed, "64", "inputs that share one activation scale";
    "quantization.accumulator_dtype", Choice(&["int32"], &[]), Declared, "", "type of exact partial sums";
    "quantization.norm_dtype", Choice(&["float32"], &["bfloat16", "float16"]), Declared, "", "type of norms";
    "quantization.runtime_kernel", Text, Note, "", "kernel of another engine; kernels are generated here";
    "quantization.sherry_mode.enabled", Flag(false), Declared, "false", "1.25-bit weights with a fixed sparsity";
    "quantization.sherry_mode.bits", Num(0.0, 32.0), NotYet, "", "1.25-bit weights";
    "quantization.hgf_correction.enabled", Flag(false), Declared, "false", "low-rank correction of ternary layers";

    "backbone.type", Choice(&["hybrid_recurrent_no_attention"], &[]), Declared, "", "kind of backbone";
    "backbone.layer_pattern", Text, Consumed, "\"GD XM GD TM GD XM GD SK\"", "mixers, repeated and cut to num_hidden_layers";
    "backbone.layer_pattern_repeat", Num(0.0, 1024.0), Declared, "", "repetitions of the pattern";
    "backbone.layer_aliases.GD", Words(&["gated_deltanet"]), Declared, "", "long name of a mixer";
    "backbone.layer_aliases.XM", Words(&["xlstm_m"]), Declared, "", "long name of a mixer";
    "backbone.layer_aliases.TM", Words(&["titans_mac"]), Declared, "", "long name of a mixer";
    "backbone.layer_aliases.SK", Words(&["tsp_span_knot"]), Declared, "", "long name of a mixer";
    "backbone.layer_counts.GD", Int(0, 1024), Declared, "", "number of gated DeltaNet layers";
    "backbone.layer_counts.XM", Int(0, 1024), Declared, "", "number of mLSTM layers";
    "backbone.layer_counts.TM", Int(0, 1024), Declared, "", "number of Titans layers";
    "backbone.layer_counts.SK", Int(0, 1024), Declared, "", "number of Span Knot layers";
    "backbone.kv_cache", Choice(&["none"], &[]), Declared, "", "no cache grows with the text";
    "backbone.moe.enabled", Bool, Consumed, "true", "mixture of experts in some layers";
    "backbone.moe.layers", List(&LAYER, 0, 1024), Consumed, "[3, 7, 11, 15, 19, 23, 27]", "layers with experts; by default every fourth";
    "backbone.moe.n_routed_experts", Int(1, 1024), Consumed, "16", "experts to choose from";
    "backbone.moe.n_shared_experts", Int(0, 64), Consumed, "1", "experts that every token passes, as one wide expert";
    "backbone.moe.num_experts_per_tok", Int(1, 1024), Consumed, "2", "experts chosen for a token";
    "backbone.moe.moe_intermediate_size", Int(1, 1 << 18), Consumed, "1728", "width of one expert";
    "backbone.moe.routing", Choice(&["noaux_bias"], &["softmax", "aux_loss"]), Declared, "", "sigmoid affinity, bias-only balancing";
    "backbone.moe.route_scale", Num(0.0, 1e6), Consumed, "1.0", "factor on expert weights";
    "backbone.moe.bias_update_rate", Num(0.0, 1.0), Consumed, "0.001", "step of the selection bias";
    "backbone.moe.total_params", Size, Declared, "", "parameters of all experts";
    "backbone.moe.active_params_per_tok", Size, Declared, "", "expert parameters that a token passes";

    "gated_deltanet.formulation", Text, Note, "", "formula in words";
    "gated_deltanet.alpha_gate", Choice(&["data_dependent_scalar"], &[]), Declared, "", "decay gate";
    "gated_deltanet.beta_gate", Choice(&["data_dependent_scalar"], &[]), Declared, "", "write gate";
    "gated_deltanet.state_size", Int(1, 1024), Declared, "", "must equal head_dim";
    "gated_deltanet.chunkwise_parallel", Bool, Note, "", "execution choice; both forms exist";
    "gated_deltanet.chunk_size", Int(1, 65_536), Consumed, "64", "tokens of one parallel chunk; an execution choice";
    "gated_deltanet.key_norm", Choice(&["l2"], &[]), Declared, "", "norm of queries and keys";
    "gated_deltanet.allow_neg_eigval", Bool, Consumed, "false", "doubles the write gate";
    "gated_deltanet.conv_size", Int(1, 64), Consumed, "4", "taps of the short convolutions";
    "efla.enabled", Bool, Consumed, "false", "error-free write gate";
    "efla.target_layers", Choice(&["SK"], &["GD", "GD SK"]), Declared, "\"SK\"", "layers with the error-free gate";
    "xlstm.variant", Choice(&["mLSTM"], &["sLSTM"]), Declared, "", "matrix memory";
    "xlstm.exponential_gating", Flag(true), Declared, "", "exponential input gate";
    "xlstm.memory_size_per_head", List(&Int(1, 1024), 2, 2), Declared, "", "must be head_dim twice";
    "xlstm.covariance_update", Flag(true), Declared, "", "outer-product write";
    "xlstm.normalizer_state", Choice(&["max_stabilized"], &[]), Declared, "", "stabilised normaliser";
    "xlstm.gate_soft_cap", Num(1e-3, 1e6), Consumed, "15.0", "soft bound of gate pre-activations";
    "xlstm.chunk_size", Int(1, 65_536), Consumed, "64", "tokens of one parallel chunk; an execution choice";

    "titans.memory_type", Choice(&["MAC"], &["MAG", "MAL"]), Declared, "", "memory as context";
    "titans.memory_depth", Equals("2"), Declared, "", "layers of the memory network";
    "titans.surprise_metric", Choice(&["gradient_with_momentum"], &[]), Declared, "", "what writes the memory";
    "titans.surprise_formula", Text, Note, "", "formula in words";
    "titans.forgetting_formula", Text, Note, "", "formula in words";
    "titans.persistent_memory_slots", Int(1, 65_536), Consumed, "64", "trained slots that every token attends to";
    "titans.local_window_size", Int(1, 1 << 20), Consumed, "1024", "tokens of the sliding window";
    "titans.core", Choice(&["swa", "persistent_only"], &["legacy_v51"]), Consumed, "\"swa\"", "what the softmax runs over";
    "titans.step_rule", Words(&["normalised", "plain"]), Consumed, "\"normalised\"", "step size of the memory";
    "titans.step_max", Num(0.0, 100.0), Consumed, "0.5", "largest normalised step";
    "titans.inner_chunk", Int(1, 4096), Consumed, "16", "tokens between anchors of the memory; changes results";
    "titans.memory_expansion", Int(1, 64), Consumed, "1", "hidden width of the memory in head sizes";
    "titans.rope_theta", Num(1.0, 1e12), Consumed, "10000.0", "base of the rotation angles";

    "looping.enabled", Bool, Consumed, "true", "repeats the middle layers";
    "looping.method", Choice(&["parcae_zoh_stable"], &[]), Declared, "", "kind of loop";
    "looping.prelude", RANGE, Consumed, "[0, 3]", "first and last layer before the loop; by default a seventh of the layers";
    "looping.loop", RANGE, Consumed, "[4, 23]", "first and last looped layer";
    "looping.coda", RANGE, Consumed, "[24, 27]", "first and last layer after the loop; as long as the prelude";
    "looping.loop_range", List(&Int(1, 64), 2, 2), Consumed, "[1, 6]", "least and most iterations";
    "looping.loop_default", Int(1, 64), Consumed, "2", "iterations where nothing else is asked for";
    "looping.stability_A", Choice(&["diag_negative_exp"], &[]), Declared, "", "form of the decay";
    "looping.spectral_radius_bound", Num(1.0, 1.0), Declared, "", "holds by construction";
    "looping.depth_selection", Words(&["fixed", "stochastic_per_sequence"]), Consumed, "\"fixed\"", "iterations in training: loop_default, or drawn for every sequence";
    "looping.adaptive_exit_threshold", Num(0.0, 1e6), Consumed, "0.01", "relative change that ends the loop";
    "looping.backward_truncation", Words(&["half", "none"]), Consumed, "\"half\"", "iterations that gradients flow through";
    "looping.zoh_input", Words(&["euler", "exact"]), Consumed, "\"euler\"", "discretisation of the input";
    "looping.C", Bool, Consumed, "false", "a trained matrix after the loop";

    "span_inference.enabled", Bool, NotYet, "", "span inference";
    "span_inference.bank_entries", COUNT, NotYet, "", "span inference";
    "span_inference.bank_avg_tokens", POSITIVE, NotYet, "", "span inference";
    "span_inference.bank_max_tokens", COUNT, NotYet, "", "span inference";
    "span_inference.bank_memory_mb", MEGABYTES, NotYet, "", "span inference";
    "span_inference.candidate_sources", List(&COUNT, 0, 64), NotYet, "", "span inference";
    "span_inference.candidate_source_keys", TEXTS, NotYet, "", "span inference";
    "span_inference.candidates_fast", COUNT, NotYet, "", "span inference";
    "span_inference.candidates_reason", COUNT, NotYet, "", "span inference";
    "span_inference.tree_verify.enabled", Bool, NotYet, "", "tree verification";
    "span_inference.tree_verify.method", Text, NotYet, "", "tree verification";
    "span_inference.tree_verify.tree_width", COUNT, NotYet, "", "tree verification";
    "span_inference.tree_verify.tree_depth", COUNT, NotYet, "", "tree verification";
    "span_inference.tree_verify.hardware_aware", Bool, NotYet, "", "tree verification";
    "span_inference.certificate_fields", TEXTS, NotYet, "", "span certificates";
    "span_inference.certificate_verify_max_us", COUNT, NotYet, "", "span certificates";
    "span_inference.adaptive_mask_cache", Bool, NotYet, "", "span inference";
    "span_inference.render_queue_target", COUNT, NotYet, "", "span inference";
    "span_inference.render_queue_max", COUNT, NotYet, "", "span inference";
    "span_inference.fallback_below_acceptance", SHARE, NotYet, "", "span inference";
    "span_inference.scoring_keys", TEXTS, NotYet, "", "span inference";
    "span_inference.scoring_weights_fast", NUMBERS, NotYet, "", "span inference";

    "tsp_knot.enabled", Bool, Consumed, "true", "sketch, relaxation and read-back of Span Knot layers";
    "tsp_knot.energy_terms.autoregressive", Tuple(&[POSITIVE, Words(&["embedding_inner_product"])], 1), Consumed, "[1.0]", "weight of the hidden state's own sketch";
    "tsp_knot.energy_terms.memory_coherence", Tuple(&[Num(0.0, 1e3), Words(&["hamming_to_semantic_sketch"])], 1), Consumed, "[0.3]", "weight of the running sketch";
    "tsp_knot.energy_terms.binding_fidelity", Tuple(&[Num(0.0, 1e3), Words(&["xor_unbind_popcount"])], 1), Consumed, "[0.2]", "weight of the bound token";
    "tsp_knot.energy_terms.grammar", Tuple(&[Num(0.0, 1e3), Words(&["fst_transition_cost"])], 1), NotYet, "", "grammar in the reported energy, a constant for the relaxation";
    "tsp_knot.energy_terms.debt", Tuple(&[Num(0.0, 1e3), Words(&["obligation_delta"])], 1), NotYet, "", "debt in the reported energy, a constant for the relaxation";
    "tsp_knot.relaxation_phase1", Choice(&["gated_deltanet_update"], &[]), Declared, "", "first phase of a Span Knot";
    "tsp_knot.relaxation_phase2_max_iters", Int(0, 64), Consumed, "3", "most relaxation steps";
    "tsp_knot.relaxation_phase2_flip_fraction", SHARE, Consumed, "0.02", "share of bits that one step may flip";
    "tsp_knot.early_exit_delta_e", Num(0.0, 1e6), Consumed, "0.0001", "energy gain that ends the relaxation";

    "grammar.enabled", Bool, NotYet, "", "grammar masks";
    "grammar.modes", TEXTS, NotYet, "", "grammar masks";
    "grammar.representation", Text, NotYet, "", "grammar masks";
    "grammar.storage_mb", MEGABYTES, NotYet, "", "grammar masks";
    "grammar.hard_constraints", TEXTS, NotYet, "", "grammar masks";
    "grammar.soft_constraints", TEXTS, NotYet, "", "grammar masks";
    "grammar.adaptive_mask_cache", Bool, NotYet, "", "grammar masks";
    "grammar.jit_compilation", Bool, NotYet, "", "grammar masks";

    "semantic_memory.vector_bits", Int(1, 1 << 20), Consumed, "8192", "bits of a sketch";
    "semantic_memory.vector_storage", Text, Note, "", "layout in words";
    "semantic_memory.capacity", COUNT, NotYet, "", "semantic memory";
    "semantic_memory.relations", COUNT, NotYet, "", "semantic memory";
    "semantic_memory.memory_mb", MEGABYTES, NotYet, "", "semantic memory";
    "semantic_memory.ops", TEXTS, NotYet, "", "semantic memory";
    "semantic_memory.lsh_tables", COUNT, NotYet, "", "semantic memory";
    "semantic_memory.lsh_bits_per_table", COUNT, NotYet, "", "semantic memory";
    "semantic_memory.hot_cache_entries", COUNT, NotYet, "", "semantic memory";
    "semantic_memory.read_at_every_knot", Bool, NotYet, "", "semantic memory";
    "semantic_memory.write_policy", Text, NotYet, "", "semantic memory";
    "semantic_memory.forgetting_policy", Text, NotYet, "", "semantic memory";
    "semantic_memory.pool_size_fixed", Bool, NotYet, "", "semantic memory";

    "entropy_valve.enabled", Bool, NotYet, "", "entropy valve";
    "entropy_valve.metrics", TEXTS, NotYet, "", "entropy valve";
    "entropy_valve.threshold_bits", Num(0.0, 64.0), NotYet, "", "entropy valve";
    "entropy_valve.type", Text, NotYet, "", "entropy valve";
    "entropy_valve.loop_depth_router.method", Text, NotYet, "", "loop depth router";
    "entropy_valve.loop_depth_router.accuracy_target", SHARE, NotYet, "", "loop depth router";
    "entropy_valve.levels.*.loops", Int(1, 64), NotYet, "", "entropy valve";
    "entropy_valve.levels.*.min_span", COUNT, NotYet, "", "entropy valve";
    "entropy_valve.levels.*.audit", SHARE, NotYet, "", "entropy valve";

    "debt_ledger.enabled", Bool, NotYet, "", "debt ledger";
    "debt_ledger.obligations", TEXTS, NotYet, "", "debt ledger";
    "debt_ledger.max_outstanding", COUNT, NotYet, "", "debt ledger";
    "debt_ledger.pressure_weight", Num(0.0, 1e3), NotYet, "", "debt ledger";

    "self_evolution.num_mechanisms", COUNT, NotYet, "", "self-evolution";
    "self_evolution.tier1.ttt.enabled", Bool, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.target_layers", List(&LAYER, 0, 1024), NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.target_param", Text, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.inner_lr", Num(0.0, 1e3), NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.inner_optimizer", Text, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.momentum", SHARE, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.objective", Text, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.chunk_size", COUNT, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.update_scope", Text, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.reset_decay", SHARE, NotYet, "", "test-time training";
    "self_evolution.tier1.ttt.persistence", Text, NotYet, "", "test-time training";
    "self_evolution.tier1.memory_growth.enabled", Bool, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.surprise_threshold", Text, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.contrastive_validation", Bool, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.user_explicit_store", Bool, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.max_per_session", COUNT, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.pool_fixed", Bool, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.forgetting", Text, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.persistent", Bool, NotYet, "", "memory growth";
    "self_evolution.tier1.memory_growth.pruning", Text, NotYet, "", "memory growth";
    "self_evolution.tier2.meta_guidelines.enabled", Bool, NotYet, "", "guidelines";
    "self_evolution.tier2.meta_guidelines.max", COUNT, NotYet, "", "guidelines";
    "self_evolution.tier2.meta_guidelines.format", Text, NotYet, "", "guidelines";
    "self_evolution.tier2.meta_guidelines.trigger", Text, NotYet, "", "guidelines";
    "self_evolution.tier2.episodic_cases.enabled", Bool, NotYet, "", "episodic cases";
    "self_evolution.tier2.episodic_cases.retrieval", Text, NotYet, "", "episodic cases";
    "self_evolution.tier2.episodic_cases.max_cases", COUNT, NotYet, "", "episodic cases";
    "self_evolution.tier2.episodic_cases.case_bytes", COUNT, NotYet, "", "episodic cases";
    "self_evolution.tier2.episodic_cases.weight_update", Text, NotYet, "", "episodic cases";
    "self_evolution.tier2.self_feedback.enabled", Bool, NotYet, "", "self-feedback";
    "self_evolution.tier2.self_feedback.confidence_threshold", SHARE, NotYet, "", "self-feedback";
    "self_evolution.tier2.self_feedback.max_refinement_rounds", COUNT, NotYet, "", "self-feedback";
    "self_evolution.tier3.span_bank_expansion.enabled", Bool, NotYet, "", "span bank expansion";
    "self_evolution.tier3.span_bank_expansion.min_span_len", COUNT, NotYet, "", "span bank expansion";
    "self_evolution.tier3.span_bank_expansion.max_new_per_session", COUNT, NotYet, "", "span bank expansion";
    "self_evolution.tier3.span_bank_expansion.acceptance", Text, NotYet, "", "span bank expansion";
    "self_evolution.tier3.span_bank_expansion.persistent", Bool, NotYet, "", "span bank expansion";
    "self_evolution.tier3.span_bank_expansion.compression", Text, NotYet, "", "span bank expansion";
    "self_evolution.tier3.loop_depth_learning.enabled", Bool, NotYet, "", "loop depth learning";
    "self_evolution.tier3.loop_depth_learning.classifier", Text, NotYet, "", "loop depth learning";
    "self_evolution.tier3.loop_depth_learning.classifier_params", Size, NotYet, "", "loop depth learning";
    "self_evolution.tier3.loop_depth_learning.signal", Text, NotYet, "", "loop depth learning";
    "self_evolution.tier3.loop_depth_learning.persistent", Bool, NotYet, "", "loop depth learning";
    "self_evolution.safety.max_growth_mb.*", MEGABYTES, NotYet, "", "self-evolution";
    "self_evolution.safety.rollback_on_degradation", Bool, NotYet, "", "self-evolution";
    "self_evolution.safety.monitor", Text, NotYet, "", "self-evolution";
    "self_evolution.safety.freeze_threshold", SHARE, NotYet, "", "self-evolution";
    "self_evolution.safety.user_reset", Bool, NotYet, "", "self-evolution";
    "self_evolution.safety.state_file", Text, NotYet, "", "self-evolution";

    "braid_state.continuous_hidden", Tuple(&[COUNT, Text], 1), NotYet, "", "braid state";
    "braid_state.fast_hidden", Tuple(&[COUNT, Text], 1), NotYet, "", "braid state";
    "braid_state.semantic_sketch", Tuple(&[COUNT, Text], 1), NotYet, "", "braid state";
    "braid_state.entity_table.slots", COUNT, NotYet, "", "entity table";
    "braid_state.entity_table.slot_bits", COUNT, NotYet, "", "entity table";
    "braid_state.entity_table.binding", Text, NotYet, "", "entity table";
    "braid_state.grammar_stack.slots", COUNT, NotYet, "", "grammar stack";
    "braid_state.grammar_stack.width_bits", COUNT, NotYet, "", "grammar stack";
    "braid_state.debt_ledger_slots", COUNT, NotYet, "", "debt ledger";
    "braid_state.per_stream_mb", MEGABYTES, Declared, "", "memory of one stream";
    "braid_state.kv_growth_per_token", Equals("0"), Declared, "", "holds by construction";

    "modes.*.tps", POSITIVE, NotYet, "", "generation modes";
    "modes.*.neural_hz", POSITIVE, NotYet, "", "generation modes";
    "modes.*.span_avg", POSITIVE, NotYet, "", "generation modes";
    "modes.*.loops", Int(1, 64), NotYet, "", "generation modes";
    "modes.*.audit", SHARE, NotYet, "", "generation modes";

    "generation.temperature", Num(0.0, 1e3), Consumed, "0.7", "softness of sampling; 0 takes the best token";
    "generation.top_p", Num(1e-6, 1.0), Consumed, "0.92", "probability mass that is sampled from";
    "generation.repetition_penalty", Num(1e-3, 1e3), Consumed, "1.08", "divides the scores of tokens already seen";
    "generation.max_new_tokens", Int(1, 1 << 40), Consumed, "4096", "length of an answer";
    "generation.do_sample", Bool, Consumed, "true", "false means temperature 0";
    "generation.stream", Bool, Note, "", "output always streams";

    "training.phases.[].name", Words(&["pretrain", "ctx_extend", "sft", "dpo"]), Consumed, "", "what `train --phase` calls it";
    "training.phases.[].tokens", Size, Consumed, "", "tokens to train on, where no steps or seconds are given";
    "training.phases.[].data", Either(&Text, &TEXTS), Consumed, "", "what the data are called; their files are given by --data";
    "training.phases.[].seq_len", Int(1, 1 << 20), Consumed, "", "tokens of a row";
    "training.phases.[].batch_tokens", Size, Consumed, "", "tokens of a batch";
    "training.phases.[].optimizer", Words(&["AdamW", "SGD", "Chimera21", "MeZO", "perseq-lowrank"]), Consumed, "", "estimator of the descent direction";
    "training.phases.[].lr", Num(0.0, 1e3), Consumed, "", "greatest learning rate";
    "training.phases.[].schedule", Words(&["cosine_warmup", "constant", "two_stage"]), Consumed, "", "learning rate behind the warm-up";
    "training.phases.[].warmup_steps", COUNT, Consumed, "", "steps of linear warm-up";
    "training.phases.[].weight_decay", SHARE, Consumed, "", "decay of ternary matrices as a share of the learning rate";
    "training.phases.[].grad_clip", Num(0.0, 1e9), Consumed, "", "most that the norm of the gradient may be";
    "training.phases.[].ternary", Choice(&["native_qat_ste"], &[]), Declared, "", "ternary weights are trained as latents, straight through";
    "training.phases.[].stages", List(&STAGE, 0, 64), Consumed, "", "tokens of a sequence, steps or \"main\" for those of another phase, and learning rate";
    "training.phases.[].epochs", POSITIVE, Consumed, "", "passes over the data, where no steps or seconds are given";
    "training.phases.[].beta", POSITIVE, Consumed, "", "how strongly a preference counts";
    "training.distillation_init.enabled", Bool, NotYet, "", "distillation";
    "training.distillation_init.method", Text, NotYet, "", "distillation";
    "training.distillation_init.teacher", Text, NotYet, "", "distillation";
    "training.distillation_init.tokens", Size, NotYet, "", "distillation";

    "hyper_training.paradigms.*.status", Text, Note, "", "state of another implementation";
    "hyper_training.paradigms.*.description", Text, NotYet, "", "training paradigm";
    "hyper_training.paradigms.*.speedup", Text, Note, "", "claim about another implementation";
    "hyper_training.paradigms.*.default_stages", List(&NUMBERS, 0, 64), NotYet, "", "training paradigm";
    "hyper_training.paradigms.*.targets", TEXTS, NotYet, "", "training paradigm";
    "hyper_training.paradigms.*.default_sparsity", SHARE, NotYet, "", "training paradigm";
    "hyper_training.paradigms.*.mask_refresh_interval", Text, NotYet, "", "training paradigm";
    "hyper_training.paradigms.*.requires", Text, Note, "", "requirement of another implementation";
    "hyper_training.combined_estimate.**", Any, Note, "", "claim about another implementation";

    "byte_level.enabled", Flag(false), Declared, "false", "byte patches with an own encoder and decoder";
    "byte_level.encoder_params", Size, NotYet, "", "byte patches";
    "byte_level.encoder_depth", COUNT, NotYet, "", "byte patches";
    "byte_level.patching", Text, NotYet, "", "byte patches";
    "byte_level.decoder_params", Size, NotYet, "", "byte patches";

    "memory_budget_mb._keys", TEXTS, Declared, "", "names of the memory budget";
    "memory_budget_mb._vals", List(&MEGABYTES, 0, 1024), Declared, "", "values of the memory budget";
    "memory_budget_mb.total", MEGABYTES, Declared, "", "memory budget";
    "memory_budget_mb.headroom_8gb", MEGABYTES, Declared, "", "memory budget";
    "memory_budget_mb.growth_ceiling", MEGABYTES, Declared, "", "memory budget";
    "memory_budget_mb.max_with_growth", MEGABYTES, Declared, "", "memory budget";

    "deployment.batch_size", COUNT, NotYet, "", "deployment";
    "deployment.max_streams", COUNT, NotYet, "", "deployment";
    "deployment.per_stream_mb", MEGABYTES, Declared, "", "memory of one stream";
    "deployment.shared", TEXTS, NotYet, "", "deployment";
    "deployment.mmap", TEXTS, NotYet, "", "deployment";
    "deployment.cold_start_s", Num(0.0, 1e6), NotYet, "", "deployment";
    "deployment.watchdog_tick_ms", COUNT, NotYet, "", "watchdog";
    "deployment.watchdog_max_overruns", COUNT, NotYet, "", "watchdog";
    "deployment.deterministic", Flag(true), Declared, "", "holds by construction";
    "deployment.seed_controls_all", Flag(true), Declared, "", "holds by construction";
    "deployment.platforms", TEXTS, Note, "", "machines in words";

    "diagnostics.telemetry", Bool, NotYet, "", "telemetry";
    "diagnostics.report_interval_tokens", COUNT, NotYet, "", "telemetry";
    "diagnostics.metrics", TEXTS, NotYet, "", "telemetry";
    "diagnostics.thresholds.*", SHARE, NotYet, "", "telemetry";

    "context_tiers.[].name", Text, NotYet, "", "context tiers";
    "context_tiers.[].tokens", COUNT, NotYet, "", "context tiers";
    "context_tiers.[].entries", COUNT, NotYet, "", "context tiers";
    "context_tiers.[].mb", MEGABYTES, NotYet, "", "context tiers";

    "multimodal.enabled", Bool, NotYet, "", "images and audio";
    "multimodal.modalities", TEXTS, NotYet, "", "images and audio";
    "multimodal.vision.type", Text, NotYet, "", "images";
    "multimodal.vision.depth", COUNT, NotYet, "", "images";
    "multimodal.vision.hidden", COUNT, NotYet, "", "images";
    "multimodal.vision.patch", COUNT, NotYet, "", "images";
    "multimodal.vision.out", COUNT, NotYet, "", "images";
    "multimodal.vision.quant", Text, NotYet, "", "images";
    "multimodal.audio.type", Text, NotYet, "", "audio";
    "multimodal.audio.depth", COUNT, NotYet, "", "audio";
    "multimodal.audio.hidden", COUNT, NotYet, "", "audio";
    "multimodal.audio.out", COUNT, NotYet, "", "audio";
    "multimodal.audio.quant", Text, NotYet, "", "audio";

    "safety.format_guards", TEXTS, NotYet, "", "format guards";
    "safety.memory_limit_enforced", Bool, NotYet, "", "memory limit of a stream";
    "safety.crash_only_allocator", Bool, NotYet, "", "safety";
    "safety.user_facts_override_weak_memory", Bool, NotYet, "", "safety";
    "safety.state_uncertainty_when_unsure", Bool, NotYet, "", "safety";

    "files.weights", Text, NotYet, "", "file names in the configuration";
    "files.moe", Text, NotYet, "", "file names in the configuration";
    "files.spans", Text, NotYet, "", "file names in the configuration";
    "files.grammar", Text, NotYet, "", "file names in the configuration";
    "files.memory_seed", Text, NotYet, "", "file names in the configuration";
    "files.tokenizer", Text, NotYet, "", "file names in the configuration";
    "files.evolution", Text, NotYet, "", "file names in the configuration";

    "params.base", Size, Declared, "", "parameters without experts";
    "params.moe_total", Size, Declared, "", "parameters of all experts";
    "params.physical", Size, Declared, "", "all parameters";
    "params.effective_2loops", Size, Declared, "", "parameters that a token passes in two iterations";
    "params.effective_6loops", Size, Declared, "", "parameters that a token passes in six iterations";
    "params.active_per_token", Size, Declared, "", "parameters that a token passes in one iteration";
    "params.weight_mb", MEGABYTES, Declared, "", "size of packed weights";
    "params.total_mb", MEGABYTES, Declared, "", "memory in use";

    "P3_ternary_compute.**", Any, Note, "", "report about another implementation";
};
