//! Loading: defaults, file, scale, vocabulary and `--set` overrides laid over one another, checked, and typed.
//!
//! Later layers win; every layer is checked against the same table, and errors name the layer they come from.

use std::collections::HashSet;
use std::path::Path;

use super::error::{Code, ConfigError, shown};
use super::json::{Member, Node, Sources, Span, Value, read_file};
use super::keys::{Disposition, Entry, check, check_path};
use super::model::ModelConfig;
use super::phases::{self, Phase};
use super::presets::Scale;
use super::read::Reader;
use super::sizes::claims;
use super::table::TABLE;

/// What a command line changes in a document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Named scale laid over the document.
    pub scale: Option<Scale>,
    /// `key.path=value` with a value of JSON, else of text; `null` removes the key. They are applied last, in order.
    pub sets: Vec<String>,
    /// Vocabulary size; texts then end with its last token unless `token_ids` is set.
    pub vocab_size: Option<usize>,
}

/// A key of a feature that is not implemented.
#[derive(Clone, Debug, PartialEq)]
pub struct NotYet {
    /// Dotted key path; list elements by number.
    pub path: String,
    /// The value.
    pub value: serde_json::Value,
    /// What is missing.
    pub reason: String,
    /// Whether the document itself turns the feature off.
    pub off: bool,
}

/// A key that makes a claim.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// Dotted key path.
    pub path: String,
    /// The value.
    pub value: serde_json::Value,
    /// What the claim is about.
    pub meaning: &'static str,
}

/// A model with what its document says besides.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The model.
    pub model: ModelConfig,
    /// The phases of training, in document order.
    pub phases: Vec<Phase>,
    /// Keys of features that are not implemented, in document order.
    pub not_yet: Vec<NotYet>,
    /// Claims, in document order.
    pub declared: Vec<Declared>,
    /// Sentences for the user about things that are allowed and doubtful.
    pub warnings: Vec<String>,
}

/// Loads a configuration file.
pub fn load(path: impl AsRef<Path>, overrides: &Overrides) -> Result<Loaded, ConfigError> {
    let path = path.as_ref();
    from_text(&path.display().to_string(), &read_file(path)?, overrides)
}

/// Loads a configuration from text; `name` stands for the file in errors.
pub fn from_text(name: &str, text: &str, overrides: &Overrides) -> Result<Loaded, ConfigError> {
    Layers::new(name, text)?.load(overrides)
}

/// A scale without a file: the defaults with the scale laid over them. `overrides.scale` is not used.
pub fn preset(scale: Scale, overrides: &Overrides) -> Result<Loaded, ConfigError> {
    from_text("(no file)", "{}", &Overrides { scale: Some(scale), ..overrides.clone() })
}

/// The defaults of the key table as a document.
pub(super) fn defaults_text() -> String {
    let mut root = serde_json::Map::new();
    for row in TABLE.iter().filter(|row| !row.default.is_empty()) {
        let value = serde_json::from_str(row.default).expect("the key table holds valid JSON");
        let mut keys: Vec<&str> = row.path.split('.').collect();
        let last = keys.pop().unwrap_or_default();
        let parent = keys.into_iter().fold(&mut root, |object, key| {
            let child = object.entry(key).or_insert_with(|| serde_json::Map::new().into());
            child.as_object_mut().expect("a key of the table is either a value or an object")
        });
        parent.insert(last.into(), value);
    }
    serde_json::to_string_pretty(&root).expect("a JSON value has a text")
}

struct Layers {
    sources: Sources,
    document: Node,
    warnings: Vec<String>,
}

impl Layers {
    fn new(name: &str, text: &str) -> Result<Layers, ConfigError> {
        let mut sources = Sources::default();
        let source = sources.add(name, text.strip_prefix('\u{feff}').unwrap_or(text));
        let document = sources.parse(source, 0)?;
        check(&sources, &document)?;
        Ok(Layers { sources, document, warnings: Vec::new() })
    }

    fn load(mut self, overrides: &Overrides) -> Result<Loaded, ConfigError> {
        if let Some(scale) = overrides.scale {
            self.apply_scale(scale)?;
        }
        if let Some(size) = overrides.vocab_size {
            self.patch("--vocab", &format!("{{ \"vocab_size\": {size}, \"token_ids\": null }}"))?;
        }
        for set in &overrides.sets {
            self.apply_set(set)?;
        }
        let entries = check(&self.sources, &self.document)?;
        let defaults = self.sources.add("(defaults)", defaults_text());
        let mut root = self.sources.parse(defaults, 0)?;
        root.merge(self.document);
        let model = Reader { sources: &self.sources, root: &root, defaults }.model()?;
        let phases = phases::read(&self.sources, &root)?;
        Ok(finish(model, phases, entries, self.warnings))
    }

    fn patch(&mut self, name: &str, text: &str) -> Result<(), ConfigError> {
        let source = self.sources.add(name, text);
        let patch = self.sources.parse(source, 0)?;
        self.document.merge(patch);
        Ok(())
    }

    fn apply_scale(&mut self, scale: Scale) -> Result<(), ConfigError> {
        let before = check(&self.sources, &self.document)?;
        for text in scale.patches() {
            self.patch(&format!("--scale {scale}"), text)?;
        }
        let after: HashSet<String> = check(&self.sources, &self.document)?.into_iter().map(|e| e.path).collect();
        let gone: Vec<&str> = before.iter().map(|e| e.path.as_str()).filter(|path| !after.contains(*path)).collect();
        if !gone.is_empty() {
            self.warnings.push(format!(
                "set aside, because they describe the file's own scale and not {scale}: {}",
                gone.join(", ")
            ));
        }
        Ok(())
    }

    fn apply_set(&mut self, set: &str) -> Result<(), ConfigError> {
        let source = self.sources.add("--set", set);
        let whole = Span { source, start: 0, end: set.len() };
        let Some((path, text)) = set.split_once('=').filter(|(path, _)| !path.trim().is_empty()) else {
            let message = format!("`{}` is not an override", shown(set));
            return Err(self.sources.error(Code::Override, whole, message).expected("key.path=value"));
        };
        let span = Span { end: path.len(), ..whole };
        check_path(&self.sources, span, path)?;
        let value = self.sources.parse(source, path.len() + 1).unwrap_or_else(|_| Node {
            span: Span { start: path.len() + 1, ..whole },
            value: Value::Text(text.to_owned()),
        });
        let keys: Vec<&str> = path.split('.').collect();
        place(&mut self.document, &keys, span, value).map_err(|message| {
            self.sources.error(Code::Override, span, message).at_key(path).expected("key.path=value")
        })
    }
}

/// Puts `value` at the path of `keys` below `node`; numbers reach into lists, `null` removes a key.
fn place(node: &mut Node, keys: &[&str], span: Span, value: Node) -> Result<(), String> {
    let Some((key, rest)) = keys.split_first() else {
        node.merge(value);
        return Ok(());
    };
    if let Value::List(list) = &mut node.value {
        let length = list.len();
        let element = key.parse().ok().and_then(|i: usize| list.get_mut(i));
        let missing = || format!("there is no element {} in a list of {length}", shown(key));
        return place(element.ok_or_else(missing)?, rest, span, value);
    }
    let Value::Object(members) = &mut node.value else {
        return Err(format!("`{}` lies inside a plain value", shown(key)));
    };
    match members.iter().position(|m| m.key == *key) {
        Some(at) if rest.is_empty() && value.value == Value::Null => drop(members.remove(at)),
        Some(at) => return place(&mut members[at].node, rest, span, value),
        None => {
            let wrap = |value: Node, key: &&str| {
                let member = Member { key: (*key).to_owned(), key_span: span, node: value };
                Node { span, value: Value::Object(vec![member]) }
            };
            node.merge(keys.iter().rev().fold(value, wrap));
        }
    }
    Ok(())
}

fn finish(model: ModelConfig, phases: Vec<Phase>, entries: Vec<Entry>, warnings: Vec<String>) -> Loaded {
    let mut loaded = Loaded { model, phases, not_yet: Vec::new(), declared: Vec::new(), warnings };
    for Entry { path, row, value, off } in entries {
        match row.disposition {
            Disposition::NotYet => {
                let state = if off { " (it is off)" } else { "" };
                let reason = format!("{}: not implemented{state}", row.text);
                loaded.not_yet.push(NotYet { path, value, reason, off });
            }
            Disposition::Declared => loaded.declared.push(Declared { path, value, meaning: row.text }),
            Disposition::Consumed | Disposition::Note => {}
        }
    }
    let doubtful = claims(&loaded).into_iter().filter(|claim| !claim.agrees());
    loaded.warnings.extend(doubtful.map(|claim| claim.to_string()));
    loaded
}
