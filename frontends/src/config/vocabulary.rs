//! The vocabulary that a command line names, and how many ids it has.
//!
//! A model needs no more than that number; text is encoded elsewhere, so of a saved vocabulary only the head is read.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::presets::{BYTE_VOCABULARY, O200K_VOCABULARY};

/// A restricted vocabulary has the 256 bytes and the end of text, and no more than the text of o200k and that end.
const RESTRICTED: std::ops::RangeInclusive<usize> = 257..=199_999;
/// A vocabulary of byte pairs has the 256 bytes and the end of a document, and at most so many ids.
const BYTE_PAIRS: std::ops::RangeInclusive<usize> = 257..=262_144;
/// The head of a saved vocabulary is shorter than this.
const MAX_HEAD: u64 = 256;

/// What `--vocab` says, before any data is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vocabulary {
    /// `bytes`.
    Bytes,
    /// `o200k`.
    O200k,
    /// `o200k:restricted`: the ids of o200k that occur in the data; with `=N`, so many.
    Restricted(Option<usize>),
    /// `N`: so many ids of whatever meaning.
    Size(usize),
    /// A saved vocabulary.
    File(PathBuf),
}

impl FromStr for Vocabulary {
    type Err = String;

    fn from_str(text: &str) -> Result<Vocabulary, String> {
        if let Some(n) = text.strip_prefix("o200k:restricted=") {
            let n = n.parse().ok().filter(|n| RESTRICTED.contains(n));
            let (least, most) = (RESTRICTED.start(), RESTRICTED.end());
            let n = n.ok_or_else(|| format!("{text:?}: expected a number of ids from {least} to {most}"))?;
            return Ok(Vocabulary::Restricted(Some(n)));
        }
        Ok(match text {
            "bytes" => Vocabulary::Bytes,
            "o200k" => Vocabulary::O200k,
            "o200k:restricted" => Vocabulary::Restricted(None),
            other => match other.parse() {
                Ok(n) => Vocabulary::Size(n),
                Err(_) if Path::new(other).is_file() => Vocabulary::File(other.into()),
                Err(_) => {
                    return Err(format!(
                        "{other:?} is neither a vocabulary (bytes, o200k, o200k:restricted, o200k:restricted=N), a number of ids, nor an existing file"
                    ));
                }
            },
        })
    }
}

/// Why a vocabulary has no known number of ids.
#[derive(Debug)]
pub enum VocabularyError {
    /// `o200k:restricted` alone: the data decide, and there are none here.
    DataDecide,
    /// A file that cannot be read.
    Read(PathBuf, io::Error),
    /// A file that is no saved vocabulary.
    Damaged {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What was found and what was expected.
        what: String,
    },
}

impl fmt::Display for VocabularyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VocabularyError::DataDecide => f.write_str(
                "--vocab o200k:restricted has as many ids as the data need, and no data are read here; give the number, o200k:restricted=N, \
                 or the file that `chimera-run vocab` saves and whose number it prints",
            ),
            VocabularyError::Read(path, e) => write!(f, "{}: cannot read the vocabulary: {e}", path.display()),
            VocabularyError::Damaged { path, line, what } => write!(f, "{}: line {line}: {what}", path.display()),
        }
    }
}

impl std::error::Error for VocabularyError {}

impl Vocabulary {
    /// The number of ids.
    ///
    /// # Errors
    /// When the data decide, or a file cannot be read or is no saved vocabulary.
    pub fn size(&self) -> Result<usize, VocabularyError> {
        match self {
            Vocabulary::Bytes => Ok(BYTE_VOCABULARY),
            Vocabulary::O200k => Ok(O200K_VOCABULARY),
            Vocabulary::Restricted(Some(n)) | Vocabulary::Size(n) => Ok(*n),
            Vocabulary::Restricted(None) => Err(VocabularyError::DataDecide),
            Vocabulary::File(path) => {
                let mut head = vec![];
                let read = File::open(path).and_then(|f| f.take(MAX_HEAD).read_to_end(&mut head));
                read.map_err(|e| VocabularyError::Read(path.clone(), e))?;
                size_of_head(&String::from_utf8_lossy(&head)).map_err(|(line, what)| VocabularyError::Damaged {
                    path: path.clone(),
                    line,
                    what,
                })
            }
        }
    }
}

/// The number of ids by the head of a saved vocabulary, or the line that is wrong and why.
fn size_of_head(head: &str) -> Result<usize, (usize, String)> {
    let mut lines = head.lines().zip(1..);
    let mut field = |key: &str| {
        let (text, line) = lines.next().unwrap_or(("", 1));
        let value = text.strip_prefix(key).and_then(|rest| rest.strip_prefix(' '));
        let shown: String = text.chars().take(40).collect();
        value.map(|v| (v, line)).ok_or_else(|| (line, format!("found {shown:?}, expected \"{key} ...\"")))
    };
    let shown = |text: &str| text.chars().take(40).collect::<String>();
    match field("chimera-vocab")? {
        ("1", _) => {}
        (format, line) => return Err((line, format!("found format {:?}, expected 1", shown(format)))),
    }
    match field("kind")? {
        ("bytes", _) => Ok(BYTE_VOCABULARY),
        ("o200k", _) => Ok(O200K_VOCABULARY),
        (kind @ ("o200k:restricted" | "bpe"), _) => {
            let (text, line) = field("tokens")?;
            let range = if kind == "bpe" { BYTE_PAIRS } else { RESTRICTED };
            let n = text.parse().ok().filter(|n| range.contains(n));
            n.ok_or_else(|| {
                let (least, most) = (range.start(), range.end());
                (line, format!("found {:?} tokens, expected {least} to {most}", shown(text)))
            })
        }
        (kind, line) => {
            Err((line, format!("found kind {:?}, expected bytes, o200k, o200k:restricted or bpe", shown(kind))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Result<usize, String> {
        text.parse::<Vocabulary>()?.size().map_err(|e| e.to_string())
    }

    #[test]
    fn words_have_their_sizes() {
        assert_eq!(size("bytes"), Ok(257));
        assert_eq!(size("o200k"), Ok(200_073));
        assert_eq!(size("o200k:restricted=4711"), Ok(4711));
        assert_eq!(size("300"), Ok(300));
        let error = size("o200k:restricted").expect_err("the data decide");
        assert!(error.contains("o200k:restricted=N") && error.contains("chimera-run vocab"), "{error}");
        for bad in
            ["byte", "", "o200k:restricted=", "o200k:restricted=256", "o200k:restricted=200000", "-1", "absent.txt"]
        {
            assert!(bad.parse::<Vocabulary>().is_err(), "{bad:?}");
        }
        assert!("byte".parse::<Vocabulary>().expect_err("no word").contains("bytes, o200k, o200k:restricted"));
    }

    #[test]
    fn files_say_their_size_in_the_head() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().to_str().expect("UTF-8");
        let says = |text: &[u8]| {
            std::fs::write(path, text).expect("written");
            size(path)
        };
        assert_eq!(says(b"chimera-vocab 1\nkind bytes\n"), Ok(257));
        assert_eq!(says(b"chimera-vocab 1\nkind o200k\n"), Ok(200_073));
        let long =
            format!("chimera-vocab 1\nkind o200k:restricted\ntokens 301\ncrc32c 00000000\n{}", "1-2\n".repeat(999));
        assert_eq!(says(long.as_bytes()), Ok(301));
        assert_eq!(says(b"chimera-vocab 1\nkind bpe\ntokens 4096\ncrc32c 00000000\n1 2\n"), Ok(4096));
        for (text, line, word) in [
            (&b"chimera-vocab 1\nkind bpe\ntokens 262145\n"[..], 3, "257 to 262144"),
            (b"", 1, "chimera-vocab"),
            (b"\xff\xfe", 1, "chimera-vocab"),
            (b"chimera-vocab 2\n", 1, "format"),
            (b"chimera-vocab 1\nkind words\n", 2, "kind"),
            (b"chimera-vocab 1\nkind o200k:restricted\ntokens many\n", 3, "257"),
            (b"chimera-vocab 1\nkind o200k:restricted\ntokens 99999999999999999999\n", 3, "199999"),
        ] {
            let error = says(text).expect_err("damaged");
            assert!(error.contains(&format!("line {line}: ")) && error.contains(word), "{error}");
        }
    }
}
