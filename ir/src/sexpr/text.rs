//! The text form of S-expressions.
//!
//! Printing is a function of the tree alone; whatever is printed parses to an equal tree.

use std::fmt::Write;

use super::{MAX_BYTES, MAX_DEPTH, Sexpr, SexprError};

/// Lines are broken to stay within this many bytes where atoms allow.
const WIDTH: usize = 120;
/// The length of an excerpt.
const EXCERPT: usize = 60;
/// Forms whose first elements stay on the first line although they are lists.
const HEADERS: [(&str, usize); 3] = [("for", 5), ("reduce", 4), ("if", 2)];

struct Printer {
    out: String,
    /// Where the current line begins.
    line: usize,
}

/// The canonical text.
pub(super) fn print(s: &Sexpr) -> String {
    let mut p = Printer { out: String::new(), line: 0 };
    p.node(s, 0);
    p.out.push('\n');
    p.out
}

/// The beginning of the text on one line.
pub(super) fn excerpt(s: &Sexpr) -> String {
    let mut p = Printer { out: String::new(), line: 0 };
    if !p.flat(s, EXCERPT) {
        let cut = (0..=EXCERPT).rev().find(|&i| p.out.is_char_boundary(i)).unwrap_or(0);
        p.out.truncate(cut);
        p.out.push_str("...");
    }
    p.out
}

impl Printer {
    fn node(&mut self, s: &Sexpr, indent: usize) {
        let Sexpr::List(items) = s else {
            self.atom(s);
            return;
        };
        let start = self.out.len();
        if self.flat(s, self.line + WIDTH) {
            return;
        }
        self.out.truncate(start);
        self.out.push('(');
        let head = s.as_form().and_then(|(head, _)| HEADERS.iter().find(|h| h.0 == head));
        let header = head.map_or(1, |h| h.1);
        let mut after_atom = false;
        for (i, item) in items.iter().enumerate() {
            let is_atom = !matches!(item, Sexpr::List(_));
            if i == 0 {
                self.node(item, indent + 2);
            } else if !((i < header || is_atom && after_atom) && self.beside(item)) {
                self.out.push('\n');
                self.line = self.out.len();
                self.out.extend(std::iter::repeat_n(' ', indent + 2));
                self.node(item, indent + 2);
            }
            after_atom = is_atom;
        }
        self.out.push(')');
    }

    /// Append a space and the element to this line, if it has room.
    fn beside(&mut self, s: &Sexpr) -> bool {
        let start = self.out.len();
        self.out.push(' ');
        let fits = self.flat(s, self.line + WIDTH);
        if !fits {
            self.out.truncate(start);
        }
        fits
    }

    /// Append on one line; false, with something appended, when that would exceed `limit` bytes in all.
    fn flat(&mut self, s: &Sexpr, limit: usize) -> bool {
        match s {
            Sexpr::Sym(t) | Sexpr::Str(t) if self.out.len() + t.len() > limit => {
                let cut = (0..=EXCERPT.min(t.len())).rev().find(|&i| t.is_char_boundary(i)).unwrap_or(0);
                self.out.push_str(&t[..cut]);
                return false;
            }
            Sexpr::List(items) => {
                self.out.push('(');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        self.out.push(' ');
                    }
                    if !self.flat(item, limit) {
                        return false;
                    }
                }
                self.out.push(')');
            }
            atom => self.atom(atom),
        }
        self.out.len() <= limit
    }

    fn atom(&mut self, s: &Sexpr) {
        let written = match s {
            Sexpr::Sym(s) if is_plain(s) => self.out.write_str(s),
            Sexpr::Sym(s) => self.quoted(s, '|'),
            Sexpr::Str(s) => self.quoted(s, '"'),
            Sexpr::Int(x) => write!(self.out, "{x}"),
            Sexpr::F32(bits) => match f32::from_bits(*bits) {
                x if x.is_finite() => write!(self.out, "{x:?}f"),
                _ => write!(self.out, "#f{bits:08x}"),
            },
            Sexpr::F64(bits) => match f64::from_bits(*bits) {
                x if x.is_finite() => write!(self.out, "{x:?}d"),
                _ => write!(self.out, "#d{bits:016x}"),
            },
            Sexpr::List(_) => unreachable!("a list is not an atom"),
        };
        written.expect("writing to a string succeeds");
    }

    fn quoted(&mut self, s: &str, mark: char) -> std::fmt::Result {
        self.out.push(mark);
        for c in s.chars() {
            match c {
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                c if c == mark => self.out.extend(['\\', c]),
                c if c.is_control() => write!(self.out, "\\u{{{:x}}}", c as u32)?,
                c => self.out.push(c),
            }
        }
        self.out.push(mark);
        Ok(())
    }
}

/// Whether a byte may stand in a symbol, a number or bits.
fn in_word(c: u8) -> bool {
    c.is_ascii_graphic() && !matches!(c, b'(' | b')' | b'"' | b'|' | b';')
}

fn is_number(word: &str) -> bool {
    word.strip_prefix('-').unwrap_or(word).starts_with(|c: char| c.is_ascii_digit())
}

/// Whether a symbol reads back without bars.
fn is_plain(s: &str) -> bool {
    !s.is_empty() && s.bytes().all(in_word) && !s.starts_with('#') && !is_number(s)
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

/// The tree of a text.
pub(super) fn parse(text: &str) -> Result<Sexpr, SexprError> {
    let mut p = Parser { text, at: 0 };
    if text.len() > MAX_BYTES {
        return p.wrong(0, format!("{} bytes, expected at most {MAX_BYTES}", text.len()));
    }
    let tree = p.tree()?;
    p.blank();
    if p.at < text.len() {
        return p.wrong(p.at, "text after the end of the expression");
    }
    Ok(tree)
}

impl Parser<'_> {
    fn wrong<T>(&self, at: usize, why: impl Into<String>) -> Result<T, SexprError> {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
        Err(SexprError::Text { line, column, why: why.into() })
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Skip white space and comments.
    fn blank(&mut self) {
        while let Some(c) = self.peek() {
            match c {
                b' ' | b'\t' | b'\r' | b'\n' => self.at += 1,
                b';' => self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at),
                _ => break,
            }
        }
    }

    fn tree(&mut self) -> Result<Sexpr, SexprError> {
        // The lists that are open, each with where it began.
        let mut open: Vec<(usize, Vec<Sexpr>)> = vec![];
        loop {
            self.blank();
            let start = self.at;
            let node = match self.peek() {
                None => {
                    let Some((at, _)) = open.last() else {
                        return self.wrong(start, "the end of the text, expected an expression");
                    };
                    return self.wrong(*at, "a list that is not closed, expected )");
                }
                Some(b'(') if open.len() >= MAX_DEPTH => {
                    return self.wrong(start, format!("nesting above {MAX_DEPTH}"));
                }
                Some(b'(') => {
                    self.at += 1;
                    open.push((start, vec![]));
                    continue;
                }
                Some(b')') => {
                    self.at += 1;
                    match open.pop() {
                        Some((_, items)) => Sexpr::List(items),
                        None => return self.wrong(start, ") without (, expected an expression"),
                    }
                }
                Some(b'"') => Sexpr::Str(self.quoted('"')?.into()),
                Some(b'|') => Sexpr::Sym(self.quoted('|')?.into()),
                Some(c) if in_word(c) => self.word()?,
                Some(_) => {
                    return self.wrong(start, "a character that stands only in strings or between bars");
                }
            };
            match open.last_mut() {
                Some((_, items)) => items.push(node),
                None => return Ok(node),
            }
        }
    }

    fn word(&mut self) -> Result<Sexpr, SexprError> {
        let start = self.at;
        let rest = &self.text[start..];
        let word = &rest[..rest.bytes().position(|c| !in_word(c)).unwrap_or(rest.len())];
        self.at += word.len();
        let number = if let Some(digits) = word.strip_prefix("#f").filter(|d| is_bits(d, 8)) {
            u32::from_str_radix(digits, 16).ok().map(Sexpr::F32)
        } else if let Some(digits) = word.strip_prefix("#d").filter(|d| is_bits(d, 16)) {
            u64::from_str_radix(digits, 16).ok().map(Sexpr::F64)
        } else if !is_number(word) && !word.starts_with('#') {
            Some(Sexpr::sym(word))
        } else if let Some(digits) = word.strip_suffix('f') {
            digits.parse().ok().filter(|x: &f32| x.is_finite()).map(|x| Sexpr::F32(x.to_bits()))
        } else if let Some(digits) = word.strip_suffix('d') {
            digits.parse().ok().filter(|x: &f64| x.is_finite()).map(|x| Sexpr::F64(x.to_bits()))
        } else {
            word.parse().ok().map(Sexpr::Int)
        };
        match number {
            Some(s) => Ok(s),
            None => {
                let found = Sexpr::str(word).excerpt();
                self.wrong(start, format!("{found}, expected an integer of 64 bits, 0.5f, 0.5d or #f and 8 hex digits"))
            }
        }
    }

    fn quoted(&mut self, mark: char) -> Result<String, SexprError> {
        let start = self.at;
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text[self.at..];
            let Some(n) = rest.find([mark, '\\']) else {
                return self.wrong(start, format!("text without end, expected {mark}"));
            };
            out.push_str(&rest[..n]);
            self.at += n + 1;
            if rest[n..].starts_with(mark) {
                return Ok(out);
            }
            let escape = self.at - 1;
            let rest = &self.text[self.at..];
            let (c, length) = match rest.chars().next() {
                Some('\\') => (Some('\\'), 1),
                Some('n') => (Some('\n'), 1),
                Some(c) if c == mark => (Some(c), 1),
                Some('u') => {
                    let digits = rest[1..].strip_prefix('{').and_then(|r| Some(&r[..r.find('}').filter(|&n| n <= 6)?]));
                    let code = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
                    (code.and_then(char::from_u32), 3 + digits.map_or(0, str::len))
                }
                _ => (None, 0),
            };
            let Some(c) = c else {
                return self.wrong(escape, format!("an escape, expected \\\\, \\n, \\{mark} or \\u{{hex}}"));
            };
            out.push(c);
            self.at += length;
        }
    }
}

fn is_bits(digits: &str, n: usize) -> bool {
    digits.len() == n && digits.bytes().all(|c| c.is_ascii_hexdigit())
}
