//! Input made to break the reader: huge, deep, truncated, mutated. Nothing may panic or take long.

use std::fs;

use super::super::{Code, MAX_BYTES, Overrides, Scale, from_text, json, load};
use super::{example_text, from};

/// xorshift64*: test input only.
struct Bits(u64);

impl Bits {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

#[test]
fn files_are_bounded_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let sparse = folder.path().join("sparse.json");
    fs::File::create(&sparse).unwrap().set_len(1 << 30).unwrap();
    let error = load(&sparse, &Overrides::default()).unwrap_err();
    assert_eq!(error.code, Code::Limit);
    assert!(error.to_string().contains("1073741824 bytes"));
    let exact = folder.path().join("exact.json");
    fs::write(&exact, format!("{{{}}}", " ".repeat(MAX_BYTES - 2))).unwrap();
    load(&exact, &Overrides::default()).unwrap();
    let latin = folder.path().join("latin.json");
    fs::write(&latin, b"{\n \"_v\": \"caf\xe9\"}").unwrap();
    let error = load(&latin, &Overrides::default()).unwrap_err();
    let place = error.place.clone().unwrap();
    assert_eq!((error.code, place.line, place.column), (Code::Syntax, 2, 12), "{error}");
    fs::write(&latin, b"\xff\xfe{\0}\0").unwrap();
    assert!(load(&latin, &Overrides::default()).unwrap_err().to_string().contains("UTF-8"));
    fs::write(&latin, b"\xef\xbb\xbf{}").unwrap();
    load(&latin, &Overrides::default()).unwrap();
}

#[test]
fn depth_and_width_are_bounded() {
    for open in ["[", "{\"_note\":"] {
        for depth in [65, 1000, 100_000] {
            assert_eq!(from(&open.repeat(depth)).unwrap_err().code, Code::Limit);
        }
    }
    let brackets = format!("{{\"_note\": \"{}\"}}", "[".repeat(1000));
    from(&brackets).expect("brackets in text do not nest");
    let deep = format!("{{\"zo\": {}{}}}", "[".repeat(63), "]".repeat(63));
    from(&deep).expect("the deepest nesting that is allowed");
    let wide: String = (0..5000).map(|i| format!("\"k{i}\": {{}},")).collect();
    let error = from(&format!("{{\"zo\": {{{wide}\"k\": 1}}}}")).unwrap_err();
    assert_eq!(error.code, Code::Limit);
    assert_eq!(from(&" ".repeat(MAX_BYTES + 1)).unwrap_err().code, Code::Limit);
    let ones = format!("{{\"zo\": [{}1]}}", "1,".repeat(MAX_BYTES / 2 - 16));
    from(&ones).unwrap();
}

#[test]
fn every_truncation_is_an_error() {
    let text = example_text("nano.json");
    for end in (0..text.trim_end().len()).filter(|end| text.is_char_boundary(*end)) {
        let error = from(&text[..end]).expect_err("a truncated document");
        assert_eq!(error.code, Code::Syntax, "{error}");
        assert!(error.place.is_some());
    }
    let text = example_text("chimera-5.3.json");
    for end in (0..text.trim_end().len()).step_by(97).filter(|end| text.is_char_boundary(*end)) {
        assert_eq!(from(&text[..end]).expect_err("a truncated document").code, Code::Syntax);
    }
}

#[test]
fn mutations_never_panic() {
    let mut bits = Bits(0x9e37_79b9_7f4a_7c15);
    let seeds = [
        example_text("nano.json").into_bytes(),
        include_bytes!("../testdata/golden_header.json").to_vec(),
        example_text("chimera-5.3.json").into_bytes(),
    ];
    const PIECES: [&[u8]; 16] = [
        b"\"",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"-1",
        b"1e308",
        b"99999999999999999999",
        b"null",
        b"\xc3",
        b"\\ud800",
        b"0",
        "\u{2028}".as_bytes(),
    ];
    for round in 0..3000 {
        let mut bytes = seeds[if round % 20 == 0 { 2 } else { round % 2 }].clone();
        for _ in 0..=bits.below(4) {
            let (at, piece) = (bits.below(bytes.len()), PIECES[bits.below(PIECES.len())]);
            match bits.below(4) {
                0 => bytes[at] = bits.below(256) as u8,
                1 => drop(bytes.splice(at..at, piece.iter().copied())),
                2 => drop(bytes.drain(at..(at + 1 + bits.below(40)).min(bytes.len()))),
                _ => drop(bytes.splice(at..at + 1, piece.iter().copied())),
            }
            bytes.push(b' ');
        }
        let Ok(text) = json::decode("m", bytes) else { continue };
        let scale = Scale::ALL.get(bits.below(2 * Scale::ALL.len())).copied();
        let overrides = Overrides { scale, ..Overrides::default() };
        match from_text("m", &text, &overrides) {
            Ok(loaded) => drop(from(&loaded.model.to_json().to_string()).expect("canonical text loads")),
            Err(error) => assert!(error.to_string().starts_with("error[C01")),
        }
    }
}

#[test]
fn what_is_json_is_decided_as_another_reader_does() {
    let mut bits = Bits(7);
    const TOKENS: [&str; 27] = [
        "{", "}", "[", "]", ",", ":", "\"a\"", "\"b\"", "\"\\n\"", "\"\\x\"", "1", "-1", "01", "-", "1.", ".5", "1.5",
        "1e5", "1e", "true", "false", "null", " ", "\n", "nul", "\"", "\u{b}",
    ];
    let mut accepted = 0;
    for _ in 0..200_000 {
        let n = 1 + bits.below(8);
        let text: String = (0..n).map(|_| TOKENS[bits.below(TOKENS.len())]).collect();
        let mut sources = json::Sources::default();
        let source = sources.add("t", text.clone());
        let ours = sources.parse(source, 0);
        let theirs = serde_json::from_str::<serde_json::Value>(&text);
        if ours.as_ref().is_err_and(|e| e.code == Code::Duplicate) {
            continue;
        }
        assert_eq!(ours.is_ok(), theirs.is_ok(), "{text:?}: {ours:?}");
        if let (Ok(ours), Ok(theirs)) = (ours, theirs) {
            accepted += 1;
            if !text.contains('e') && !text.contains('.') {
                assert_eq!(ours.to_json(), theirs, "{text:?}");
            }
        }
    }
    assert!(accepted > 1000, "{accepted}");
}
