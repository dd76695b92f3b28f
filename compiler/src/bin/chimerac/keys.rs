//! `chimerac keys` and `chimerac schema`: the key table for people and for editors.
//!
//! Both print the table that loading uses; there is no second list.

use chimera_frontends::config::{self, Disposition, Row, TABLE};
use clap::builder::FalseyValueParser;
use serde::Serialize;
use std::fmt::Write;

use crate::options::Failure;
use crate::output::{print, print_json};

const EXAMPLES: &str = "Examples:
  chimerac keys
  chimerac keys titans
  chimerac keys --json | jq '.[] | select(.disposition == \"not implemented\") | .path'";

/// Arguments of `keys`.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct KeysArgs {
    /// Only keys that contain this text
    #[arg(value_name = "TEXT")]
    text: Option<String>,
    /// Print JSON
    #[arg(long, env = "CHIMERA_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// Arguments of `schema`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  chimerac schema > chimera.schema.json")]
pub(crate) struct SchemaArgs {
    /// Accepted for uniformity: a schema is JSON
    #[arg(long, env = "CHIMERA_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

#[derive(Serialize)]
struct Key {
    path: &'static str,
    takes: String,
    default: Option<serde_json::Value>,
    disposition: &'static str,
    text: &'static str,
}

impl Key {
    fn new(row: &Row) -> Key {
        Key {
            path: row.path,
            takes: row.kind.expected(),
            default: serde_json::from_str(row.default).ok(),
            disposition: match row.disposition {
                Disposition::Consumed => "consumed",
                Disposition::Declared => "checked",
                Disposition::Note => "remark",
                Disposition::NotYet => "not implemented",
            },
            text: row.text,
        }
    }
}

/// Print the schema.
pub(crate) fn schema(_: &SchemaArgs) -> Result<(), Failure> {
    print_json(&config::schema())
}

/// Print the table.
pub(crate) fn run(args: &KeysArgs) -> Result<(), Failure> {
    let wanted = |row: &&Row| args.text.as_ref().is_none_or(|text| row.path.contains(text.as_str()));
    let keys: Vec<Key> = TABLE.iter().filter(wanted).map(Key::new).collect();
    if keys.is_empty() {
        let text = args.text.as_deref().unwrap_or_default();
        return Err(Failure::new(format!("no key contains {text:?}; `chimerac keys` lists them all")));
    }
    if args.json {
        return print_json(&keys);
    }
    let mut out = String::new();
    for key in &keys {
        let default = key.default.as_ref().map_or(String::new(), |d| format!(", default {d}"));
        let _ = write!(out, "{}\n    {}: {}\n    takes {}{default}\n", key.path, key.disposition, key.text, key.takes);
    }
    print(&out)
}
