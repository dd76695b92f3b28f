//! The canonical JSON of a model: every consumed key, in the table's names, so that loading it gives the same model.

use serde_json::{Map, Value, json};

use super::model::{Activation, ModelConfig, StepRule, TitansCore, WeightScale};

impl ModelConfig {
    /// The model as a configuration document; [`super::from_text`] of its text gives an equal model.
    pub fn to_json(&self) -> Value {
        let pattern: Vec<&str> = self.layers.iter().map(|kind| kind.word()).collect();
        json!({
            "token_ids": [self.eos, self.pad],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers.len(),
            "num_heads": self.n_heads,
            "head_dim": self.head_dim,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "rms_norm_before_every_linear": self.rms_norm_before_every_linear,
            "vocab_size": self.vocab_size,
            "model_seed": self.model_seed,
            "quantization": self.quantization_json(),
            "backbone": { "layer_pattern": pattern.join(" "), "moe": self.moe_json() },
            "gated_deltanet": {
                "chunk_size": self.gated_delta.chunk_size,
                "allow_neg_eigval": self.gated_delta.allow_neg_eigval,
                "conv_size": self.gated_delta.conv_size,
            },
            "efla": { "enabled": self.efla },
            "xlstm": { "gate_soft_cap": self.mlstm.gate_soft_cap, "chunk_size": self.mlstm.chunk_size },
            "titans": self.titans_json(),
            "looping": self.looping_json(),
            "tsp_knot": {
                "enabled": self.knot.enabled,
                "energy_terms": {
                    "autoregressive": [self.knot.autoregressive],
                    "memory_coherence": [self.knot.memory_coherence],
                    "binding_fidelity": [self.knot.binding_fidelity],
                },
                "relaxation_phase2_max_iters": self.knot.max_iters,
                "relaxation_phase2_flip_fraction": self.knot.flip_fraction,
                "early_exit_delta_e": self.knot.exit_delta,
            },
            "semantic_memory": { "vector_bits": self.knot.vector_bits },
            "generation": {
                "temperature": self.generation.temperature,
                "top_p": self.generation.top_p,
                "repetition_penalty": self.generation.repetition_penalty,
                "max_new_tokens": self.generation.max_new_tokens,
            },
        })
    }

    fn quantization_json(&self) -> Value {
        let q = &self.quantization;
        let mut out = json!({
            "weight_scale": match q.weight_scale {
                WeightScale::Group => "absmean_per_group",
                WeightScale::Row => "absmean_per_row",
                WeightScale::Tensor => "absmean_per_tensor",
            },
            "group_size": q.group_size,
            "threshold_ratio": q.threshold_ratio,
            "activation_method": match q.activation {
                Activation::Block => "absmax_per_block",
                Activation::Token => "absmax_per_token",
                Activation::Float => "none",
            },
            "activation_block_size": q.activation_block_size,
        });
        if let Some(d) = &q.dynamic {
            out["dynamic"] = json!({
                "mode": if d.strict { "strict_bitnet" } else { "chimera" },
                "ema": d.ema,
                "alpha_min": d.alpha_min,
                "alpha_target": d.alpha_target,
                "warmup_steps": d.warmup,
                "target_bits": d.target_bits,
                "control_steps": d.control_steps,
            });
        }
        out
    }

    fn moe_json(&self) -> Value {
        let Some(moe) = &self.moe else {
            return json!({ "enabled": false });
        };
        json!({
            "enabled": true,
            "layers": moe.layers,
            "n_routed_experts": moe.n_routed,
            "n_shared_experts": moe.n_shared,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.width,
            "route_scale": moe.route_scale,
            "bias_update_rate": moe.bias_update_rate,
        })
    }

    fn titans_json(&self) -> Value {
        let t = &self.titans;
        json!({
            "core": match t.core {
                TitansCore::SlidingWindow => "swa",
                TitansCore::PersistentOnly => "persistent_only",
            },
            "memory_expansion": t.memory_expansion,
            "inner_chunk": t.inner_chunk,
            "persistent_memory_slots": t.persistent_slots,
            "local_window_size": t.window,
            "rope_theta": t.rope_theta,
            "step_rule": match t.step_rule {
                StepRule::Normalised => "normalised",
                StepRule::Plain => "plain",
            },
            "step_max": t.step_max,
        })
    }

    fn looping_json(&self) -> Value {
        let mut out = Map::new();
        out.insert("enabled".into(), self.looping.is_some().into());
        if let Some(l) = &self.looping {
            let rows = [
                ("prelude", json!(l.prelude)),
                ("loop", json!(l.body)),
                ("coda", json!(l.coda)),
                ("loop_range", json!(l.range)),
                ("loop_default", json!(l.default)),
                ("depth_selection", json!(if l.stochastic { "stochastic_per_sequence" } else { "fixed" })),
                ("adaptive_exit_threshold", json!(l.exit_threshold)),
                ("backward_truncation", json!(if l.backward_half { "half" } else { "none" })),
                ("zoh_input", json!(if l.zoh_exact { "exact" } else { "euler" })),
                ("C", json!(l.c)),
            ];
            out.extend(rows.into_iter().map(|(key, value)| (key.to_owned(), value)));
        }
        Value::Object(out)
    }
}
