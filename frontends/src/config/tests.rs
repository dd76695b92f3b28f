//! Tests of the configuration frontend on the real files, the presets, and bad input.

mod bad_input;
mod good_input;
mod hostile;

use std::path::PathBuf;

use super::{ConfigError, Loaded, Overrides, from_text};

fn example(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/configs").join(name)
}

fn example_text(name: &str) -> String {
    std::fs::read_to_string(example(name)).expect("an example of this repository")
}

fn from(text: &str) -> Result<Loaded, ConfigError> {
    from_text("test.json", text, &Overrides::default())
}

fn with_sets(text: &str, sets: &[&str]) -> Result<Loaded, ConfigError> {
    let sets = sets.iter().map(|s| (*s).to_owned()).collect();
    from_text("test.json", text, &Overrides { sets, ..Overrides::default() })
}
