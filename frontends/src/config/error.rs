//! What is said to a user whose configuration is wrong: the place, what was found, what was expected, the cure.
//!
//! Text of the user's is shown with control characters replaced and cut to a bounded width.

use std::fmt;

/// Kinds of configuration errors; the number is stable and printed as `C0103`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The file cannot be read, or is not a regular file.
    Read = 101,
    /// The text is not JSON, or not UTF-8.
    Syntax = 102,
    /// A key that no row of the table knows.
    UnknownKey = 103,
    /// A value of another JSON type than the key takes.
    Type = 104,
    /// A number or a list length outside its bounds.
    Range = 105,
    /// A word that is not among those the key takes.
    Word = 106,
    /// A valid value whose meaning is not implemented.
    Unsupported = 107,
    /// Values that contradict one another.
    Dimensions = 108,
    /// The same key twice in one object.
    Duplicate = 109,
    /// Text that is too large or nested too deeply.
    Limit = 110,
    /// A malformed command-line override.
    Override = 111,
}

/// A place in a text, with what is needed to draw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The source line, or a window of it around the place.
    pub text: String,
    /// Characters of `text` before the caret.
    pub indent: usize,
    /// Width of the underlined part in characters, at least 1.
    pub width: usize,
}

/// Everything that is known about one error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Kind of error.
    pub code: Code,
    /// File name, or the override the text came from.
    pub file: String,
    /// Place inside the text; absent when no text was read.
    pub place: Option<Place>,
    /// Dotted path of the key; empty where no key is concerned.
    pub key_path: String,
    /// What is wrong, a lowercase sentence without a full stop.
    pub message: String,
    /// What would have been right; may be empty.
    pub expected: String,
    /// The cure; may be empty.
    pub help: String,
}

/// A configuration that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Box<Report>);

const WINDOW: usize = 100;

impl Place {
    /// Finds byte range `start..end` in `text`; both may lie outside or inside a character.
    pub(super) fn locate(text: &str, start: usize, end: usize) -> Place {
        let start = text.floor_char_boundary(start);
        let end = text.floor_char_boundary(end.max(start));
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let before = text[line_start..start].chars().count();
        let width = text[start..end.min(line_end)].chars().count().max(1);
        let skipped = before.saturating_sub(WINDOW / 2);
        let shown: String = text[line_start..line_end].chars().skip(skipped).take(WINDOW).map(printable).collect();
        Place {
            line: text[..start].matches('\n').count() + 1,
            column: before + 1,
            text: shown.trim_end().to_owned(),
            indent: before - skipped,
            width: width.min(WINDOW / 2),
        }
    }
}

fn printable(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

/// The user's text as it may appear in a message: at most 60 characters, no control characters.
pub(super) fn shown(text: &str) -> String {
    cut(text, 60)
}

fn cut(text: &str, width: usize) -> String {
    let mut out: String = text.chars().take(width).map(printable).collect();
    if text.chars().nth(width).is_some() {
        out.push('…');
    }
    out
}

/// The candidate that `word` was most likely meant to be, if any is near.
pub(super) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > 64 {
        return None;
    }
    let limit = (word.chars().count() / 3).max(1);
    candidates
        .map(|c| (strsim::damerau_levenshtein(&word.to_lowercase(), &c.to_lowercase()), c))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, c)| c)
}

impl ConfigError {
    pub(super) fn new(code: Code, file: &str, place: Option<Place>, message: impl Into<String>) -> ConfigError {
        ConfigError(Box::new(Report {
            code,
            file: cut(file, 4096),
            place,
            key_path: String::new(),
            message: message.into(),
            expected: String::new(),
            help: String::new(),
        }))
    }

    pub(super) fn at_key(mut self, path: &str) -> ConfigError {
        self.0.key_path = cut(path, 200);
        self
    }

    pub(super) fn expected(mut self, expected: impl Into<String>) -> ConfigError {
        self.0.expected = expected.into();
        self
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> ConfigError {
        self.0.help = help.into();
        self
    }
}

impl std::ops::Deref for ConfigError {
    type Target = Report;

    fn deref(&self) -> &Report {
        &self.0
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "C{:04}", *self as u16)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code, self.message)?;
        let margin = self.place.as_ref().map_or(1, |p| p.line.to_string().len());
        match &self.place {
            None => write!(f, "\n{:margin$}--> {}", "", self.file)?,
            Some(p) => {
                write!(f, "\n{:margin$}--> {}:{}:{}", "", self.file, p.line, p.column)?;
                write!(f, "\n{:margin$} |\n{} | {}", "", p.line, p.text)?;
                write!(f, "\n{:margin$} | {:indent$}{}", "", "", "^".repeat(p.width), indent = p.indent)?;
            }
        }
        for (label, text) in [("key", &self.key_path), ("expected", &self.expected), ("help", &self.help)] {
            if !text.is_empty() {
                write!(f, "\n{:margin$} = {label}: {text}", "")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
