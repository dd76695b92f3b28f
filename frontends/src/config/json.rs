//! JSON text as a tree in which every value knows the bytes it came from.
//!
//! Size, nesting and character rules are checked before anything is allocated or recursed into; what passes is
//! strict JSON (RFC 8259) without duplicate keys.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use jsonc_parser::ast;
use jsonc_parser::common::Ranged;
use jsonc_parser::errors::ParseErrorKind;
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};

use super::error::{Code, ConfigError, Place, shown};

/// Largest configuration text that is read, in bytes. The tree of a text takes about a hundred times its size at worst.
pub const MAX_BYTES: usize = 1 << 20;
/// Deepest nesting of objects and lists.
pub const MAX_DEPTH: usize = 64;
/// Most keys of one object.
const MAX_MEMBERS: usize = 4096;

/// Bytes `start..end` of one source text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) source: usize,
    pub(super) start: usize,
    pub(super) end: usize,
}

/// A number with its exact integer value where it has one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number {
    pub(super) value: f64,
    pub(super) int: Option<i128>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    Object(Vec<Member>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) span: Span,
    pub(super) value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Member {
    pub(super) key: String,
    pub(super) key_span: Span,
    pub(super) node: Node,
}

/// The texts that a configuration is put together from: defaults, file, preset, overrides.
#[derive(Debug, Default)]
pub(super) struct Sources(Vec<(String, String)>);

impl Sources {
    pub(super) fn add(&mut self, name: impl Into<String>, text: impl Into<String>) -> usize {
        self.0.push((name.into(), text.into()));
        self.0.len() - 1
    }

    pub(super) fn text(&self, span: Span) -> &str {
        self.0[span.source].1.get(span.start..span.end).unwrap_or("")
    }

    pub(super) fn error(&self, code: Code, span: Span, message: impl Into<String>) -> ConfigError {
        let (name, text) = &self.0[span.source];
        ConfigError::new(code, name, Some(Place::locate(text, span.start, span.end)), message)
    }

    /// Parses the text of `source` from byte `offset` to its end.
    pub(super) fn parse(&self, source: usize, offset: usize) -> Result<Node, ConfigError> {
        Parser { sources: self, source, offset }.parse()
    }
}

/// Reads a configuration file. Its size and kind are checked through metadata before it is opened.
pub(super) fn read_file(path: &Path) -> Result<String, ConfigError> {
    let name = path.display().to_string();
    let fail = |code, message: String| ConfigError::new(code, &name, None, message);
    let metadata = path.metadata().map_err(|e| fail(Code::Read, format!("cannot read the file: {e}")))?;
    if !metadata.is_file() {
        return Err(fail(Code::Read, "not a regular file".into()).expected("a JSON file"));
    }
    let too_large = |size: u64| {
        fail(Code::Limit, format!("the file has {size} bytes")).expected(format!("at most {MAX_BYTES} bytes"))
    };
    if metadata.len() > MAX_BYTES as u64 {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes));
    read.map_err(|e| fail(Code::Read, format!("cannot read the file: {e}")))?;
    if bytes.len() > MAX_BYTES {
        return Err(too_large(bytes.len() as u64));
    }
    decode(&name, bytes)
}

/// Bytes to text; a UTF-8 byte order mark is dropped.
pub(super) fn decode(name: &str, mut bytes: Vec<u8>) -> Result<String, ConfigError> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let bytes = e.as_bytes();
        let place = Place::locate(&String::from_utf8_lossy(bytes), at, at + 1);
        ConfigError::new(Code::Syntax, name, Some(place), format!("byte 0x{:02x} is not UTF-8", bytes[at]))
            .help("save the file as UTF-8")
    })
}

struct Parser<'a> {
    sources: &'a Sources,
    source: usize,
    offset: usize,
}

impl<'a> Parser<'a> {
    fn parse(&self) -> Result<Node, ConfigError> {
        let text: &'a str = &self.sources.0[self.source].1[self.offset..];
        if text.len() > MAX_BYTES {
            let found = format!("the text has {} bytes", text.len());
            return Err(self.error(Code::Limit, 0, 0, found).expected(format!("at most {MAX_BYTES} bytes")));
        }
        self.scan(text)?;
        let strict = ParseOptions {
            allow_comments: false,
            allow_loose_object_property_names: false,
            allow_trailing_commas: false,
            allow_missing_commas: false,
            allow_single_quoted_strings: false,
            allow_hexadecimal_numbers: false,
            allow_unary_plus_numbers: false,
            allow_bare_decimal_point_numbers: false,
            allow_non_finite_numbers: false,
            allow_extended_string_escapes: false,
        };
        match parse_to_ast(text, &CollectOptions::default(), &strict) {
            Ok(result) => match result.value {
                Some(value) => self.convert(value),
                None => Err(self.error(Code::Syntax, 0, 0, "the text is empty").expected("a JSON object")),
            },
            Err(e) => Err(self.syntax_error(text, &e)),
        }
    }

    fn error(&self, code: Code, start: usize, end: usize, message: impl Into<String>) -> ConfigError {
        self.sources.error(code, self.span(start, end), message)
    }

    fn span(&self, start: usize, end: usize) -> Span {
        Span { source: self.source, start: self.offset + start, end: self.offset + end }
    }

    fn syntax_error(&self, text: &str, e: &jsonc_parser::errors::ParseError) -> ConfigError {
        use ParseErrorKind::{UnterminatedArray, UnterminatedObject};
        let range = e.range();
        let last = text.trim_end().len();
        let mut message = e.kind().to_string();
        message[..1].make_ascii_lowercase();
        match e.kind() {
            UnterminatedObject | UnterminatedArray => {
                let what = if matches!(e.kind(), UnterminatedObject) { "an object" } else { "a list" };
                let opened = Place::locate(text, range.start, range.start);
                self.error(Code::Syntax, last, last, format!("the text ends inside {what}"))
                    .help(format!("it opens at {}:{}; is the file truncated?", opened.line, opened.column))
            }
            _ if range.end >= last => {
                self.error(Code::Syntax, range.start, range.end, message).help("the text ends here; is it truncated?")
            }
            _ => self.error(Code::Syntax, range.start, range.end, message).expected("strict JSON"),
        }
    }

    /// Bounds the nesting and refuses characters that JSON forbids where they stand.
    fn scan(&self, text: &str) -> Result<(), ConfigError> {
        let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
        for (at, c) in text.char_indices() {
            let stray = if in_string { c < ' ' } else { c > '~' || (c < ' ' && !matches!(c, '\t' | '\n' | '\r')) };
            if stray {
                let message = format!("unexpected character U+{:04X}", u32::from(c));
                let error = self.error(Code::Syntax, at, at + c.len_utf8(), message);
                return Err(if in_string { error.help("is a quotation mark missing?") } else { error });
            }
            match c {
                _ if escaped => escaped = false,
                '\\' if in_string => escaped = true,
                '"' => in_string = !in_string,
                '{' | '[' if !in_string => depth += 1,
                '}' | ']' if !in_string => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > MAX_DEPTH {
                let message = format!("nested more than {MAX_DEPTH} levels deep");
                return Err(self.error(Code::Limit, at, at + 1, message));
            }
        }
        Ok(())
    }

    fn convert(&self, value: ast::Value<'_>) -> Result<Node, ConfigError> {
        let range = value.range();
        let span = self.span(range.start, range.end);
        let value = match value {
            ast::Value::NullKeyword(_) => Value::Null,
            ast::Value::BooleanLit(b) => Value::Bool(b.value),
            ast::Value::StringLit(s) => Value::Text(s.value.into_owned()),
            ast::Value::NumberLit(n) => Value::Number(self.number(n.value, span)?),
            ast::Value::Array(a) => {
                Value::List(a.elements.into_iter().map(|e| self.convert(e)).collect::<Result<_, _>>()?)
            }
            ast::Value::Object(o) => Value::Object(self.members(o)?),
        };
        Ok(Node { span, value })
    }

    fn number(&self, text: &str, span: Span) -> Result<Number, ConfigError> {
        let value = text.parse::<f64>().ok().filter(|v| v.is_finite());
        let Some(value) = value else {
            let message = format!("the number {} is too large", shown(text));
            return Err(self.sources.error(Code::Range, span, message).expected("a 64-bit floating-point number"));
        };
        let whole = value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0;
        Ok(Number { value, int: text.parse().ok().or(whole.then_some(value as i128)) })
    }

    fn members(&self, object: ast::Object<'_>) -> Result<Vec<Member>, ConfigError> {
        let mut seen = HashSet::new();
        if object.properties.len() > MAX_MEMBERS {
            let message = format!("an object has {} keys", object.properties.len());
            let error = self.error(Code::Limit, object.range.start, object.range.start + 1, message);
            return Err(error.expected(format!("at most {MAX_MEMBERS} keys")));
        }
        let mut members = Vec::with_capacity(object.properties.len());
        for property in object.properties {
            let range = property.name.range();
            let key_span = self.span(range.start, range.end);
            let key = property.name.into_string();
            if !seen.insert(key.clone()) {
                let message = format!("the key `{}` occurs twice in one object", shown(&key));
                return Err(self.sources.error(Code::Duplicate, key_span, message).at_key(&key).help("remove one"));
            }
            members.push(Member { key, key_span, node: self.convert(property.value)? });
        }
        Ok(members)
    }
}

impl Node {
    /// The value at a dotted path of object keys.
    pub(super) fn get(&self, path: &str) -> Option<&Node> {
        path.split('.').try_fold(self, |node, key| match &node.value {
            Value::Object(members) => members.iter().find(|m| m.key == key).map(|m| &m.node),
            _ => None,
        })
    }

    /// Lays `patch` over this value: objects merge by key, `null` removes a key, all else replaces.
    pub(super) fn merge(&mut self, patch: Node) {
        match (&mut self.value, patch) {
            (Value::Object(members), Node { value: Value::Object(changes), .. }) => {
                for change in changes {
                    let at = members.iter().position(|m| m.key == change.key);
                    match (at, &change.node.value) {
                        (Some(at), Value::Null) => drop(members.remove(at)),
                        (None, Value::Null) => {}
                        (Some(at), Value::Object(_)) => members[at].node.merge(change.node),
                        (Some(at), _) => members[at] = change,
                        (None, Value::Object(_)) => {
                            let mut node = Node { span: change.node.span, value: Value::Object(Vec::new()) };
                            node.merge(change.node);
                            members.push(Member { key: change.key, key_span: change.key_span, node });
                        }
                        (None, _) => members.push(change),
                    }
                }
            }
            (_, patch) => *self = patch,
        }
    }

    /// The value without places.
    pub(super) fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(b) => (*b).into(),
            Value::Number(n) => match n.int.and_then(|i| i64::try_from(i).ok()) {
                Some(i) => i.into(),
                None => n.int.and_then(|i| u64::try_from(i).ok()).map_or_else(|| n.value.into(), Into::into),
            },
            Value::Text(s) => s.as_str().into(),
            Value::List(list) => list.iter().map(Node::to_json).collect(),
            Value::Object(members) => members.iter().map(|m| (m.key.clone(), m.node.to_json())).collect(),
        }
    }

    /// What the value is, for messages.
    pub(super) fn describe(&self) -> String {
        match &self.value {
            Value::Null => "null".into(),
            Value::Bool(b) => b.to_string(),
            Value::Number(n) => n.int.map_or_else(|| n.value.to_string(), |i| i.to_string()),
            Value::Text(s) => format!("the text \"{}\"", shown(s)),
            Value::List(list) => format!("a list of {}", list.len()),
            Value::Object(_) => "an object".into(),
        }
    }
}
