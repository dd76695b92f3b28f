//! S-expressions: the carrier of every text and binary form of this project.
//!
//! Both forms give back an equal tree, floats by their bits; both readers bound depth and size, are linear and never panic.
//!
//! Text: symbols, `"strings"`, integers, `0.5f` for binary32 and `0.5d` for binary64, lists in parentheses, comments from `;` to the
//! end of the line. A symbol that would read as something else is written between bars, `|like this|`. Floats that are not finite
//! are bits: `#f7fc00000`, `#d7ff0000000000000`.

mod binary;
mod text;

use std::fmt;
use std::sync::Arc;

/// The deepest nesting of lists that is read.
pub const MAX_DEPTH: usize = 256;
/// The longest text or byte form that is read.
pub const MAX_BYTES: usize = 1 << 28;

/// A symbolic expression. Floats are bit patterns, so that equality is identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sexpr {
    /// A name.
    Sym(Arc<str>),
    /// A quoted string.
    Str(Arc<str>),
    /// An integer.
    Int(i64),
    /// The bits of a binary32.
    F32(u32),
    /// The bits of a binary64.
    F64(u64),
    /// A sequence.
    List(Vec<Sexpr>),
}

/// Why a form was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SexprError {
    /// In text.
    Text {
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What was found and what was expected.
        why: String,
    },
    /// In bytes.
    Bytes {
        /// Distance from the first byte.
        offset: usize,
        /// What was found and what was expected.
        why: String,
    },
}

impl fmt::Display for SexprError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SexprError::Text { line, column, why } => {
                write!(f, "line {line}, column {column}: {why}")
            }
            SexprError::Bytes { offset, why } => write!(f, "byte {offset}: {why}"),
        }
    }
}

impl std::error::Error for SexprError {}

impl Sexpr {
    /// A name.
    pub fn sym(s: &str) -> Sexpr {
        Sexpr::Sym(s.into())
    }

    /// A quoted string.
    pub fn str(s: &str) -> Sexpr {
        Sexpr::Str(s.into())
    }

    /// A list that starts with a name.
    pub fn form(head: &str, rest: impl IntoIterator<Item = Sexpr>) -> Sexpr {
        Sexpr::List(std::iter::once(Sexpr::sym(head)).chain(rest).collect())
    }

    /// The name, when this is one.
    pub fn as_sym(&self) -> Option<&str> {
        match self {
            Sexpr::Sym(s) => Some(s),
            _ => None,
        }
    }

    /// The quoted string, when this is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Sexpr::Str(s) => Some(s),
            _ => None,
        }
    }

    /// The integer, when this is one.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Sexpr::Int(i) => Some(*i),
            _ => None,
        }
    }

    /// The elements, when this is a list.
    pub fn as_list(&self) -> Option<&[Sexpr]> {
        match self {
            Sexpr::List(v) => Some(v),
            _ => None,
        }
    }

    /// Name and remaining elements of a list that starts with a name.
    pub fn as_form(&self) -> Option<(&str, &[Sexpr])> {
        let (head, rest) = self.as_list()?.split_first()?;
        Some((head.as_sym()?, rest))
    }

    /// The canonical text, lines of about 120 columns, with a final line end.
    pub fn to_text(&self) -> String {
        text::print(self)
    }

    /// The beginning of the text on one line, for messages.
    pub fn excerpt(&self) -> String {
        text::excerpt(self)
    }

    /// The tree of a text.
    ///
    /// # Errors
    /// [`SexprError::Text`] when the text is not exactly one expression within the limits.
    pub fn parse(text: &str) -> Result<Sexpr, SexprError> {
        text::parse(text)
    }

    /// The byte form: a table of the distinct strings in order of first use, then the nodes in preorder.
    pub fn to_bytes(&self) -> Vec<u8> {
        binary::encode(self)
    }

    /// The tree of a byte form. Every tree has one byte form: others are refused.
    ///
    /// # Errors
    /// [`SexprError::Bytes`] when the bytes are not exactly one canonical tree within the limits.
    pub fn from_bytes(bytes: &[u8]) -> Result<Sexpr, SexprError> {
        binary::decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A deterministic generator of 64-bit numbers.
    fn next(state: &mut u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *state ^ (*state >> 29)
    }

    fn random(state: &mut u64, depth: usize) -> Sexpr {
        const WORDS: [&str; 14] =
            ["a", "load", "", "-", "-5", "+", "#f", "two words", "bar|", "\"q\\", "ünï\u{1}\n", "1x", "%", ";"];
        let r = next(state);
        let word = WORDS[(r >> 8) as usize % WORDS.len()];
        match r % 8 {
            0 => Sexpr::sym(word),
            1 => Sexpr::str(word),
            2 => Sexpr::Int((next(state) as i64) >> (r >> 8 & 63)),
            3 => Sexpr::F32(next(state) as u32),
            4 => Sexpr::F64(next(state)),
            _ if depth == 0 => Sexpr::List(vec![]),
            _ => Sexpr::List((0..(r >> 16) % 9).map(|_| random(state, depth - 1)).collect()),
        }
    }

    fn check(s: &Sexpr) {
        let text = s.to_text();
        assert_eq!(Sexpr::parse(&text).as_ref(), Ok(s), "{text}");
        let bytes = s.to_bytes();
        assert_eq!(Sexpr::from_bytes(&bytes).as_ref(), Ok(s), "{bytes:?}");
    }

    #[test]
    fn both_forms_round_trip() {
        let floats = [0.0, -0.0, 1e-45, 0.1, 1e30, f32::MAX, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        check(&Sexpr::List(floats.iter().map(|x| Sexpr::F32(x.to_bits())).collect()));
        check(&Sexpr::List(floats.iter().map(|x| Sexpr::F64(f64::from(*x).to_bits())).collect()));
        check(&Sexpr::List([0, -1, i64::MIN, i64::MAX, 30, 31].map(Sexpr::Int).to_vec()));
        check(&Sexpr::List((0..200).map(|i| Sexpr::sym(&format!("v{i}"))).collect()));
        let mut state = 1;
        for _ in 0..2000 {
            check(&random(&mut state, 6));
        }
    }

    #[test]
    fn text_is_laid_out_by_the_tree_alone() {
        let sum = |n: i64| Sexpr::form("+", (0..n).map(|i| Sexpr::form("v", [Sexpr::Int(i)])));
        let body = Sexpr::form("for", [Sexpr::sym("i"), sum(2), Sexpr::Int(9), Sexpr::sym("seq"), sum(30)]);
        let text = body.to_text();
        assert!(text.starts_with("(for i (+ (v 0) (v 1)) 9 seq\n  (+\n    (v 0)\n"), "{text}");
        assert!(text.lines().all(|l| l.len() <= 120));
        let bare = text.replace("\n", " ; a comment\n");
        assert_eq!(Sexpr::parse(&bare), Ok(body));
        let numbers = Sexpr::List((0..1000).map(Sexpr::Int).collect());
        assert!(numbers.to_text().lines().all(|l| l.len() > 100 || l.ends_with("))") || l.ends_with(')')));
        assert_eq!(Sexpr::sym(&"x".repeat(500)).excerpt().len(), 63);
    }

    #[test]
    fn errors_point_at_the_place() {
        let rows = [
            ("", 1, 1, "the end of the text"),
            ("(a\n (b c)", 1, 1, "not closed"),
            ("(a)\n)", 2, 1, "after the end"),
            (")", 1, 1, "without ("),
            ("(é 12x)", 1, 2, "between bars"),
            ("(a 12x)", 1, 4, "expected an integer"),
            ("(a 1e99f)", 1, 4, "0.5f"),
            ("(a\n  \"b)", 2, 3, "without end"),
            ("(a \"b\\q\")", 1, 6, "an escape"),
            ("#f12", 1, 1, "8 hex digits"),
            ("9223372036854775808", 1, 1, "64 bits"),
        ];
        for (text, line, column, part) in rows {
            match Sexpr::parse(text) {
                Err(SexprError::Text { line: l, column: c, why }) => {
                    assert_eq!((l, c), (line, column), "{text:?}: {why}");
                    assert!(why.contains(part), "{text:?}: {why}");
                }
                other => panic!("{text:?}: {other:?}"),
            }
        }
        let deep = |n: usize| "(".repeat(n) + &")".repeat(n);
        assert!(Sexpr::parse(&deep(MAX_DEPTH)).is_ok());
        assert!(Sexpr::parse(&deep(MAX_DEPTH + 1)).is_err());
        assert!(Sexpr::parse(&"(".repeat(1 << 20)).is_err());
    }

    #[test]
    fn bytes_that_are_not_canonical_are_refused() {
        let nested = |n: usize| [vec![0], vec![5 | 1 << 3; n], vec![5]].concat();
        assert!(Sexpr::from_bytes(&nested(MAX_DEPTH - 1)).is_ok());
        let rows: [(&[u8], &str); 14] = [
            (&[], "the end"),
            (&[0], "the end"),
            (&[0x80, 0, 5], "superfluous"),
            (&[0, 5, 5], "after the end"),
            (&[0, 6], "not defined"),
            (&[0, 3 | 8, 0, 0, 0, 0], "not defined"),
            (&[1, 1, b'a', 5], "nothing uses"),
            (&[0, 0], "order of first use"),
            (&[2, 1, b'a', 1, b'b', 5 | 2 << 3, 8, 0], "order of first use"),
            (&[2, 1, b'a', 1, b'a', 5 | 2 << 3, 0, 8], "occurred before"),
            (&[1, 1, 0xff, 0], "UTF-8"),
            (&[0, 5 | 31 << 3, 0xff, 0xff, 0xff, 0xff, 0x0f], "a count of"),
            (&[0, 2 | 31 << 3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2], "above 64 bits"),
            (&[0xff, 0xff, 0xff, 0x7f], "a count of"),
        ];
        for (bytes, part) in rows {
            let why = Sexpr::from_bytes(bytes).expect_err("refused").to_string();
            assert!(why.contains(part), "{bytes:?}: {why}");
        }
        assert!(Sexpr::from_bytes(&nested(MAX_DEPTH)).expect_err("refused").to_string().contains("nesting"));
    }

    #[test]
    fn damaged_input_gives_errors_or_trees_that_round_trip() {
        let mut state = 7;
        for _ in 0..300 {
            let s = random(&mut state, 5);
            let (bytes, text) = (s.to_bytes(), s.to_text().into_bytes());
            for _ in 0..40 {
                let mut damage = |bytes: &[u8]| {
                    let mut bytes = bytes.to_vec();
                    let r = next(&mut state);
                    let at = (r >> 16) as usize % bytes.len();
                    match r % 4 {
                        0 => bytes.truncate(at),
                        1 => bytes[at] ^= 1 << (r >> 8 & 7),
                        2 => bytes.insert(at, (r >> 8) as u8),
                        _ => drop(bytes.remove(at)),
                    }
                    bytes
                };
                let damaged = damage(&bytes);
                if let Ok(t) = Sexpr::from_bytes(&damaged) {
                    assert_eq!(t.to_bytes(), damaged);
                }
                if let Ok(t) = Sexpr::parse(&String::from_utf8_lossy(&damage(&text))) {
                    check(&t);
                }
            }
        }
    }
}
