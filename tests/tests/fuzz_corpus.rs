//! The corpora of the fuzz targets and deterministic damage to them, through the same functions as the fuzzer.
//!
//! A finding names its file and the number of the damage; the same numbers give the same bytes everywhere.

#[allow(unreachable_pub, reason = "the library of the fuzz package, which is not part of the workspace")]
#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Most bytes of one input, and of all.
const MAX_INPUT: u64 = 24 << 10;
const MAX_CORPUS: u64 = 500_000;

/// xorshift64*: test input only.
struct Bits(u64);

impl Bits {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|f| (f.clone(), std::fs::read(f).unwrap())).collect()
}

/// Numbers that readers get wrong.
const WORDS: [u64; 12] =
    [0, 1, 2, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, i64::MAX as u64, 1 << 63, u64::MAX];
const TEXTS: [&str; 16] = [
    "0",
    "-1",
    "1e400",
    "-0",
    "0.5",
    "NaN",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "1e-320",
];

/// One damage.
fn damage(bytes: &mut Vec<u8>, other: &[u8], random: &mut Bits) {
    let at = random.below(bytes.len());
    match random.below(9) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
        1 if !bytes.is_empty() => bytes[at] = random.below(256) as u8,
        2 => bytes.truncate(at),
        3 if !bytes.is_empty() => drop(bytes.drain(at..(at + 1 + random.below(16)).min(bytes.len()))),
        4 if !bytes.is_empty() => {
            let part = bytes[at..(at + 1 + random.below(64)).min(bytes.len())].to_vec();
            let to = random.below(bytes.len());
            bytes.splice(to..to, part);
        }
        5 => {
            let (word, width) = (WORDS[random.below(WORDS.len())].to_le_bytes(), 1 << random.below(4));
            for (to, from) in bytes.iter_mut().skip(at).zip(&word[..width]) {
                *to = *from;
            }
        }
        6 => {
            let from = random.below(other.len());
            bytes.truncate(at);
            bytes.extend(&other[from..]);
        }
        // A whole number or word of a text becomes another one.
        7 => {
            let part = |b: &u8| b.is_ascii_alphanumeric() || b"+-._".contains(b);
            let lo = bytes[..at].iter().rposition(|b| !part(b)).map_or(0, |i| i + 1);
            let hi = bytes[at..].iter().position(|b| !part(b)).map_or(bytes.len(), |i| at + i);
            bytes.splice(lo..hi.max(lo), TEXTS[random.below(TEXTS.len())].bytes());
        }
        _ => {
            let byte = random.below(256) as u8;
            bytes.splice(at..at, vec![byte; 1 + random.below(8)]);
        }
    }
}

fn replay(name: &str) {
    let (_, target) = targets::TARGETS.iter().find(|t| t.0 == name).expect("a target of that name");
    let corpus = corpus(name);
    assert!(corpus.len() >= 3, "{name} has a corpus");
    let try_one = |what: &str, file: &Path, bytes: &[u8]| {
        let result = catch_unwind(AssertUnwindSafe(|| target(bytes)));
        assert!(result.is_ok(), "{what} of {}", file.display());
    };
    for (index, (file, bytes)) in corpus.iter().enumerate() {
        try_one("the content", file, bytes);
        let mut random = Bits(0x9e37_79b9_7f4a_7c15 ^ (index as u64 + 1));
        for number in 0..(400_000 / (bytes.len() + 1)).clamp(32, 400) {
            let other = &corpus[random.below(corpus.len())].1;
            let mut damaged = bytes.clone();
            for _ in 0..1 + random.below(3) {
                damage(&mut damaged, other, &mut random);
            }
            try_one(&format!("damage {number}"), file, &damaged);
        }
    }
}

#[test]
fn config() {
    replay("config");
}

#[test]
fn plan() {
    replay("plan");
}

#[test]
fn b158() {
    replay("b158");
}

#[test]
fn safetensors() {
    replay("safetensors");
}

#[test]
fn npy() {
    replay("npy");
}

#[test]
fn vocab() {
    replay("vocab");
}

#[test]
fn journal() {
    replay("journal");
}

#[test]
fn tokens() {
    replay("tokens");
}

#[test]
fn jsonl() {
    replay("jsonl");
}

#[test]
fn preferences() {
    replay("preferences");
}

#[test]
fn zstd() {
    replay("zstd");
}

#[test]
fn corpora_are_small_and_every_target_is_replayed() {
    let mut total = 0;
    for (name, _) in targets::TARGETS {
        for (file, bytes) in corpus(name) {
            assert!(bytes.len() as u64 <= MAX_INPUT, "{} has {} bytes", file.display(), bytes.len());
            total += bytes.len() as u64;
        }
        let this = include_str!("fuzz_corpus.rs");
        assert!(this.contains(&format!("replay(\"{name}\")")), "{name} is replayed");
    }
    assert!(total <= MAX_CORPUS, "the corpora have {total} bytes");
}
