//! Named scales, vocabulary sizes and command-line overrides as patches over a document.
//!
//! A patch is a JSON document with a name of its own; `null` in it removes a key, so that the default holds again.

use std::fmt;
use std::str::FromStr;

use super::error::nearest;

/// Vocabulary of bytes: 256 bytes and the end of a document.
pub const BYTE_VOCABULARY: usize = 257;
/// Vocabulary of the o200k tokenizer with its special tokens.
pub const O200K_VOCABULARY: usize = 200_073;

/// A named scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scale {
    /// The oracle's test model: 8 layers of 128, 512 tokens.
    Test,
    /// 4 layers of 64, bytes, no experts, no loop.
    Pico,
    /// 8 layers of 128.
    Nano,
    /// 28 layers of 256.
    Tiny,
    /// 28 layers of 512.
    Small,
    /// 28 layers of 1024.
    Medium,
    /// The document's own numbers.
    Full,
}

/// Keys that describe a file's own scale; another scale sets them aside.
const SET_ASIDE: &str = r#"{
  "token_ids": null,
  "backbone": { "layer_pattern_repeat": null, "layer_counts": null,
    "moe": { "layers": null, "total_params": null, "active_params_per_tok": null } },
  "gated_deltanet": { "state_size": null },
  "xlstm": { "memory_size_per_head": null },
  "looping": { "prelude": null, "loop": null, "coda": null },
  "memory_budget_mb": null,
  "params": null
}"#;

const TEST: &str = r#"{
  "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8, "num_heads": 2, "head_dim": 32, "vocab_size": 512,
  "backbone": { "moe": { "n_routed_experts": 4, "moe_intermediate_size": 64 } },
  "titans": { "persistent_memory_slots": 4, "local_window_size": 12 },
  "semantic_memory": { "vector_bits": 1024 }
}"#;

const PICO: &str = r#"{
  "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_heads": 2, "head_dim": 32, "vocab_size": 257,
  "backbone": { "layer_pattern": "GD XM GD TM", "moe": { "enabled": false } },
  "titans": { "persistent_memory_slots": 16, "local_window_size": 256 },
  "semantic_memory": { "vector_bits": 8192 },
  "looping": { "enabled": false }
}"#;

const NANO: &str = r#"{
  "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_heads": 4, "head_dim": 32, "vocab_size": 8192,
  "backbone": { "moe": { "n_routed_experts": 4, "moe_intermediate_size": 128 } },
  "titans": { "persistent_memory_slots": 16, "local_window_size": 256 },
  "semantic_memory": { "vector_bits": 8192 }
}"#;

const TINY: &str = r#"{
  "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 28, "num_heads": 4, "head_dim": 64, "vocab_size": 8192,
  "backbone": { "moe": { "n_routed_experts": 4, "moe_intermediate_size": 256 } },
  "titans": { "persistent_memory_slots": 16, "local_window_size": 256 },
  "semantic_memory": { "vector_bits": 8192 }
}"#;

const SMALL: &str = r#"{
  "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 28, "num_heads": 8, "head_dim": 64, "vocab_size": 8192,
  "backbone": { "moe": { "n_routed_experts": 8, "moe_intermediate_size": 384 } },
  "titans": { "persistent_memory_slots": 16, "local_window_size": 256 },
  "semantic_memory": { "vector_bits": 8192 }
}"#;

const MEDIUM: &str = r#"{
  "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 28, "num_heads": 16, "head_dim": 64, "vocab_size": 8192,
  "backbone": { "moe": { "n_routed_experts": 16, "moe_intermediate_size": 768 } },
  "titans": { "persistent_memory_slots": 16, "local_window_size": 256 },
  "semantic_memory": { "vector_bits": 8192 }
}"#;

impl Scale {
    /// All scales, smallest first.
    pub const ALL: [Scale; 7] =
        [Scale::Test, Scale::Pico, Scale::Nano, Scale::Tiny, Scale::Small, Scale::Medium, Scale::Full];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scale::Test => "test",
            Scale::Pico => "pico",
            Scale::Nano => "nano",
            Scale::Tiny => "tiny",
            Scale::Small => "small",
            Scale::Medium => "medium",
            Scale::Full => "full",
        }
    }

    /// Patches in the order they are laid over a document.
    pub(super) fn patches(self) -> Vec<&'static str> {
        match self {
            Scale::Test => vec![SET_ASIDE, TEST],
            Scale::Pico => vec![SET_ASIDE, PICO],
            Scale::Nano => vec![SET_ASIDE, NANO],
            Scale::Tiny => vec![SET_ASIDE, TINY],
            Scale::Small => vec![SET_ASIDE, SMALL],
            Scale::Medium => vec![SET_ASIDE, MEDIUM],
            Scale::Full => Vec::new(),
        }
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Scale {
    type Err = String;

    fn from_str(text: &str) -> Result<Scale, String> {
        if let Some(scale) = Scale::ALL.into_iter().find(|scale| scale.name() == text) {
            return Ok(scale);
        }
        let names = Scale::ALL.map(Scale::name);
        let hint = nearest(text, names.into_iter()).map_or(String::new(), |name| format!("; did you mean {name}?"));
        Err(format!("unknown scale, expected one of {}{hint}", names.join(", ")))
    }
}
