//! What a row of the key table says, and the walk that matches a document against the table.
//!
//! The walk visits every value of the document; each leaf is claimed by exactly one row or the document is refused.

use std::sync::OnceLock;

use super::error::{Code, ConfigError, nearest, shown};
use super::json::{Node, Sources, Span, Value};
use super::table::TABLE;

/// What values a key takes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// true or false.
    Bool,
    /// A boolean of which only this value is implemented.
    Flag(bool),
    /// An integer, bounds inclusive.
    Int(u64, u64),
    /// A finite number, bounds inclusive.
    Num(f64, f64),
    /// Any text.
    Text,
    /// One of these words.
    Words(&'static [&'static str]),
    /// One of the first words; the others are known and not implemented.
    Choice(&'static [&'static str], &'static [&'static str]),
    /// A count as a number or as text with a suffix: `"2.3B"`, `"350M"`, `"4K"`, `"2T"`.
    Size,
    /// A list of one kind with at least and at most so many elements.
    List(&'static Kind, usize, usize),
    /// A list with these elements, of which the first so many are required.
    Tuple(&'static [Kind], usize),
    /// Either of two kinds.
    Either(&'static Kind, &'static Kind),
    /// Exactly this JSON value.
    Equals(&'static str),
    /// Anything.
    Any,
}

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// It shapes the model or the run.
    Consumed,
    /// A claim that is checked, or printed beside what was computed.
    Declared,
    /// Provenance and remarks; nothing follows from it.
    Note,
    /// It belongs to a feature that is not implemented; it is listed.
    NotYet,
}

/// One row of the key table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Dotted path: `*` is any key of an object, `[]` any element of a list, a leading `**` any object,
    /// a trailing `**` everything below.
    pub path: &'static str,
    /// Type and bounds.
    pub kind: Kind,
    /// What becomes of it.
    pub disposition: Disposition,
    /// Value that a missing key takes, as JSON; empty when a missing key means nothing.
    pub default: &'static str,
    /// What it is for; for [`Disposition::NotYet`] the feature that it belongs to.
    pub text: &'static str,
}

/// One value of a document with the row that claims it.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) path: String,
    pub(super) row: &'static Row,
    pub(super) value: serde_json::Value,
    /// Whether an enclosing object says `"enabled": false`.
    pub(super) off: bool,
}

#[derive(Default)]
pub(super) struct Branch {
    pub(super) named: Vec<(&'static str, Branch)>,
    pub(super) any_key: Option<Box<Branch>>,
    pub(super) element: Option<Box<Branch>>,
    pub(super) row: Option<&'static Row>,
    /// Claims everything below.
    pub(super) below: Option<&'static Row>,
}

/// The table as a tree of path segments, and the rows that hold in any object.
pub(super) struct Index {
    pub(super) root: Branch,
    pub(super) anywhere: Vec<(&'static str, &'static Row)>,
}

pub(super) fn index() -> &'static Index {
    static INDEX: OnceLock<Index> = OnceLock::new();
    INDEX.get_or_init(|| {
        let mut index = Index { root: Branch::default(), anywhere: Vec::new() };
        for row in TABLE {
            match row.path.strip_prefix("**.") {
                Some(key) => index.anywhere.push((key, row)),
                None => index.root.insert(row.path, row),
            }
        }
        index
    })
}

impl Branch {
    fn insert(&mut self, path: &'static str, row: &'static Row) {
        let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
        if first == "**" {
            self.below = Some(row);
            return;
        }
        let branch = match first {
            "*" => self.any_key.get_or_insert_default(),
            "[]" => self.element.get_or_insert_default(),
            _ => match self.named.iter().position(|(name, _)| *name == first) {
                Some(at) => &mut self.named[at].1,
                None => {
                    self.named.push((first, Branch::default()));
                    &mut self.named.last_mut().expect("a branch was just pushed").1
                }
            },
        };
        match rest {
            Some(rest) => branch.insert(rest, row),
            None => branch.row = Some(row),
        }
    }

    fn child(&self, key: &str) -> Option<&Branch> {
        self.named.iter().find(|(name, _)| *name == key).map(|(_, b)| b).or(self.any_key.as_deref())
    }
}

/// Matches a document against the table. Returns one entry a leaf in document order, or the first error.
pub(super) fn check(sources: &Sources, root: &Node) -> Result<Vec<Entry>, ConfigError> {
    if !matches!(root.value, Value::Object(_)) {
        let message = format!("a configuration is an object, found {}", root.describe());
        return Err(sources.error(Code::Type, root.span, message).expected("{ \"hidden_size\": …, … }"));
    }
    let mut walk = Walk { sources, entries: Vec::new() };
    walk.visit(root, &index().root, "", false)?;
    Ok(walk.entries)
}

/// Whether the table knows `path`, whose value is about to be set from text at `span`.
pub(super) fn check_path(sources: &Sources, span: Span, path: &str) -> Result<(), ConfigError> {
    let mut branch = &index().root;
    let mut at = 0;
    for key in path.split('.') {
        if branch.below.is_some() || index().anywhere.iter().any(|(name, _)| *name == key) {
            return Ok(());
        }
        let number = key.parse::<usize>().is_ok();
        if number && branch.row.is_some_and(|row| matches!(row.kind, Kind::List(..) | Kind::Tuple(..))) {
            return Ok(());
        }
        let element = branch.element.as_deref().filter(|_| number);
        let Some(next) = element.or_else(|| branch.child(key)) else {
            let span = Span { start: span.start + at, end: span.start + at + key.len(), ..span };
            return Err(unknown_key(sources, span, branch, key, path));
        };
        branch = next;
        at += key.len() + 1;
    }
    Ok(())
}

fn unknown_key(sources: &Sources, span: Span, branch: &Branch, key: &str, path: &str) -> ConfigError {
    let error = sources.error(Code::UnknownKey, span, format!("unknown key `{}`", shown(key))).at_key(path);
    if branch.row.is_some() {
        return error.help("the key before it takes a plain value, not an object");
    }
    if let Some(name) = nearest(key, branch.named.iter().map(|(name, _)| *name)) {
        return error.help(format!("did you mean `{name}`?"));
    }
    let last = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
    if let Some(row) = TABLE.iter().find(|row| last(row.path) == key) {
        return error.help(format!("`{}` is a key: is it in the wrong place?", row.path));
    }
    match nearest(key, TABLE.iter().map(|row| last(row.path))) {
        Some(name) => {
            let row = TABLE.iter().find(|row| last(row.path) == name).map_or(name, |row| row.path);
            error.help(format!("the nearest known key is `{row}`"))
        }
        None => error.help("remove it, or keep remarks under a key `_note`"),
    }
}

struct Walk<'a> {
    sources: &'a Sources,
    entries: Vec<Entry>,
}

impl Walk<'_> {
    fn visit(&mut self, node: &Node, branch: &Branch, path: &str, off: bool) -> Result<(), ConfigError> {
        if let Some(row) = branch.row.or(branch.below) {
            row.kind.check(self.sources, node, path)?;
            self.entries.push(Entry { path: path.to_owned(), row, value: node.to_json(), off });
            return Ok(());
        }
        match (&node.value, &branch.element) {
            (Value::List(list), Some(element)) => {
                for (i, node) in list.iter().enumerate() {
                    self.visit(node, element, &format!("{path}.{i}"), off)?;
                }
                Ok(())
            }
            (_, Some(_)) => Err(wrong_type(self.sources, node, path, "a list")),
            (Value::Object(members), None) => {
                let says_off = |m: &super::json::Member| m.key == "enabled" && m.node.value == Value::Bool(false);
                let off = off || members.iter().any(says_off);
                for member in members {
                    let path = if path.is_empty() { member.key.clone() } else { format!("{path}.{}", member.key) };
                    if let Some((_, row)) = index().anywhere.iter().find(|(name, _)| *name == member.key) {
                        let value = member.node.to_json();
                        self.entries.push(Entry { path, row, value, off });
                        continue;
                    }
                    let Some(next) = branch.child(&member.key) else {
                        return Err(unknown_key(self.sources, member.key_span, branch, &member.key, &path));
                    };
                    self.visit(&member.node, next, &path, off)?;
                }
                Ok(())
            }
            _ => Err(wrong_type(self.sources, node, path, "an object")),
        }
    }
}

fn wrong_type(sources: &Sources, node: &Node, path: &str, expected: &str) -> ConfigError {
    let message = format!("`{}` is {}", shown(path), node.describe());
    sources.error(Code::Type, node.span, message).at_key(path).expected(expected)
}

impl Kind {
    /// What the key takes, in words.
    pub fn expected(&self) -> String {
        let words = |words: &[&str]| words.iter().map(|w| format!("\"{w}\"")).collect::<Vec<_>>().join(", ");
        match self {
            Kind::Bool => "true or false".into(),
            Kind::Flag(only) => format!("{only}"),
            Kind::Int(low, high) => format!("an integer from {low} to {high}"),
            Kind::Num(low, high) => format!("a number from {low} to {high}"),
            Kind::Text => "a text".into(),
            Kind::Words([word]) | Kind::Choice([word], _) => format!("\"{word}\""),
            Kind::Words(list) | Kind::Choice(list, _) => format!("one of {}", words(list)),
            Kind::Size => "a count such as 350000000 or \"350M\" (suffixes K, M, B, T)".into(),
            Kind::List(kind, low, high) if low == high => {
                format!("a list of {low}, each {}", kind.expected())
            }
            Kind::List(kind, low, high) => {
                format!("a list of {low} to {high}, each {}", kind.expected())
            }
            Kind::Tuple(kinds, _) => {
                format!("a list of {}", kinds.iter().map(Kind::expected).collect::<Vec<_>>().join(", then "))
            }
            Kind::Either(a, b) => format!("{} or {}", a.expected(), b.expected()),
            Kind::Equals(json) => (*json).into(),
            Kind::Any => "any value".into(),
        }
    }

    fn check(&self, sources: &Sources, node: &Node, path: &str) -> Result<(), ConfigError> {
        let fail = |code: Code, message: String| {
            Err(sources.error(code, node.span, message).at_key(path).expected(self.expected()))
        };
        let is = || format!("`{}` is {}", shown(path), node.describe());
        match (self, &node.value) {
            (Kind::Any, _) | (Kind::Bool, Value::Bool(_)) | (Kind::Text, Value::Text(_)) => Ok(()),
            (Kind::Flag(only), Value::Bool(b)) if b == only => Ok(()),
            (Kind::Flag(_), Value::Bool(_)) => fail(Code::Unsupported, format!("{}, which is not implemented", is())),
            (Kind::Int(low, high), Value::Number(n)) => match n.int {
                Some(i) if (i128::from(*low)..=i128::from(*high)).contains(&i) => Ok(()),
                Some(_) => fail(Code::Range, is()),
                None => fail(Code::Type, is()),
            },
            (Kind::Num(low, high), Value::Number(n)) if (*low..=*high).contains(&n.value) => Ok(()),
            (Kind::Num(..), Value::Number(_)) => fail(Code::Range, is()),
            (Kind::Words(words) | Kind::Choice(words, _), Value::Text(s)) if words.contains(&s.as_str()) => Ok(()),
            (Kind::Choice(_, later), Value::Text(s)) if later.contains(&s.as_str()) => {
                fail(Code::Unsupported, format!("{}, which is not implemented", is()))
            }
            (Kind::Words(words) | Kind::Choice(words, _), Value::Text(s)) => {
                fail(Code::Word, is()).map_err(|e| match nearest(s, words.iter().copied()) {
                    Some(word) => e.help(format!("did you mean \"{word}\"?")),
                    None => e,
                })
            }
            (Kind::Size, _) => match size_of(&node.to_json()) {
                Some(_) => Ok(()),
                None => fail(Code::Type, is()),
            },
            (Kind::List(kind, low, high), Value::List(list)) => {
                if !(*low..=*high).contains(&list.len()) {
                    return fail(Code::Range, is());
                }
                list.iter().enumerate().try_for_each(|(i, n)| kind.check(sources, n, &format!("{path}.{i}")))
            }
            (Kind::Tuple(kinds, required), Value::List(list)) => {
                if !(*required..=kinds.len()).contains(&list.len()) {
                    return fail(Code::Range, is());
                }
                let mut pairs = kinds.iter().zip(list).enumerate();
                pairs.try_for_each(|(i, (kind, n))| kind.check(sources, n, &format!("{path}.{i}")))
            }
            (Kind::Either(a, b), _) => match a.check(sources, node, path) {
                Ok(()) => Ok(()),
                Err(_) => b.check(sources, node, path).map_err(|e| e.expected(self.expected())),
            },
            (Kind::Equals(json), _) => {
                let only: serde_json::Value = serde_json::from_str(json).expect("the key table holds valid JSON");
                let same = match (only.as_f64(), node.to_json().as_f64()) {
                    (Some(a), Some(b)) => a == b,
                    _ => only == node.to_json(),
                };
                if same { Ok(()) } else { fail(Code::Unsupported, format!("{}, which is not implemented", is())) }
            }
            _ => fail(Code::Type, is()),
        }
    }
}

/// The count that a [`Kind::Size`] value stands for.
pub(super) fn size_of(value: &serde_json::Value) -> Option<f64> {
    let Some(text) = value.as_str() else {
        return value.as_f64().filter(|v| *v >= 0.0);
    };
    let (digits, unit) = match text.char_indices().last()? {
        (at, 'K') => (&text[..at], 1e3),
        (at, 'M') => (&text[..at], 1e6),
        (at, 'B') => (&text[..at], 1e9),
        (at, 'T') => (&text[..at], 1e12),
        _ => (text, 1.0),
    };
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    digits.parse::<f64>().ok().filter(|_| plain).map(|v| v * unit)
}
