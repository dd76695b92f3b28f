//! A folder with a small model and data, in which tests run the commands of this project.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A model with experts and a loop whose depth is drawn: everything that a step depends on.
pub(crate) const LOOPED: &str = r#"{
  "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_heads": 2, "head_dim": 16, "vocab_size": 257,
  "backbone": { "layer_pattern": "GD XM", "moe": { "enabled": true, "layers": [1, 2], "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16 } },
  "looping": { "enabled": true, "prelude": [0, 0], "loop": [1, 2], "coda": [3, 3], "loop_range": [1, 4], "loop_default": 2,
    "depth_selection": "stochastic_per_sequence" }
}"#;

/// The folder; it vanishes when dropped.
pub(crate) struct Place(pub(crate) tempfile::TempDir);

impl Place {
    /// A folder with `model.json` and `data.txt`.
    pub(crate) fn with_model(model: &str) -> Place {
        let place = Place(tempfile::tempdir().expect("a folder"));
        fs::write(place.path("model.json"), model).expect("written");
        fs::write(place.path("data.txt"), "the cat sat on the mat, the dog on the log. ".repeat(60)).expect("written");
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `chimera-run` with these words, in the folder.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
        command.current_dir(self.0.path()).args(words);
        command
    }
}
