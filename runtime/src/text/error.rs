//! What can go wrong between a file on disk and a batch of tokens.
//!
//! Every message names the file, the line where there is one, what was found, and what helps.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// An error of this module.
#[derive(Debug)]
pub enum TextError {
    /// The operating system refused; `doing` is a verb such as "read".
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What was attempted.
        doing: &'static str,
        /// The system's answer.
        error: io::Error,
    },
    /// A data path that is a device, pipe or socket.
    NotAFile(PathBuf),
    /// A data file without a single byte.
    EmptyFile(PathBuf),
    /// A file or folder in which no document has text.
    NoDocuments(PathBuf),
    /// No data file was named.
    NoFiles,
    /// A file that became another one while it was read.
    Changed(PathBuf),
    /// A zero byte in a file of text.
    Binary {
        /// Name of the file.
        source: String,
        /// Line of the zero byte, from 1.
        line: u64,
        /// Offset of the zero byte, from 0.
        offset: u64,
    },
    /// A line beyond [`super::input::MAX_LINE`] bytes.
    LongLine {
        /// Name of the file.
        source: String,
        /// Its number, from 1.
        line: u64,
    },
    /// A record that cannot be read as one.
    BadRecord {
        /// Name of the file.
        source: String,
        /// Its line, from 1.
        line: u64,
        /// What was found and what was expected.
        what: String,
    },
    /// Compressed data that cannot be unpacked.
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// Bytes that are not UTF-8, under a vocabulary that encodes text.
    NotUtf8 {
        /// Name of the source.
        source: String,
        /// Line of the first bad byte, from 1.
        line: u64,
        /// Offset of the first bad byte, from 0.
        offset: u64,
        /// Name of the vocabulary.
        vocab: &'static str,
    },
    /// A saved vocabulary that does not hold together.
    BadVocab {
        /// File or other origin of the text.
        origin: String,
        /// Line, from 1.
        line: usize,
        /// What was found and what was expected.
        what: String,
    },
    /// A vocabulary that cannot be trained as asked.
    BadSize {
        /// Ids asked for.
        size: usize,
        /// What was expected.
        what: String,
    },
    /// A token cache that does not hold together.
    BadCache {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        what: String,
    },
    /// Fewer tokens than one row needs.
    TooShort {
        /// Tokens in the stream, end-of-document tokens included.
        tokens: usize,
        /// Row length asked for.
        seq: usize,
    },
    /// No example with an answer within a row.
    NoAnswers {
        /// Examples without one.
        skipped: usize,
        /// Row length asked for.
        seq: usize,
    },
    /// A validation fraction outside `[0, 1)`.
    BadFraction(f64),
}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, doing, error } => {
                write!(f, "{}: cannot {doing}: {error}", path.display())
            }
            Self::NotAFile(path) => {
                write!(f, "{}: is not a regular file, expected a text file or a folder", path.display())
            }
            Self::EmptyFile(path) => {
                write!(f, "{}: the file is empty, expected text", path.display())
            }
            Self::NoDocuments(path) => {
                write!(f, "{}: no document with text was found in it, expected at least one", path.display())
            }
            Self::NoFiles => write!(f, "no data file given, expected at least one"),
            Self::Changed(path) => {
                write!(f, "{}: the file changed while it was read; try again when nobody writes it", path.display())
            }
            Self::Binary { source, line, offset } => write!(
                f,
                "{source}: line {line} (byte offset {offset}) has a zero byte, so this is a binary file and no text; leave it out, \
                 or give --binary and the vocabulary bytes to train on raw bytes"
            ),
            Self::LongLine { source, line } => write!(
                f,
                "{source}: line {line} has more than {} MB, which is the longest line that is read; break it into several, or use the \
                 vocabulary bytes for text",
                super::input::MAX_LINE >> 20
            ),
            Self::BadRecord { source, line, what } => write!(f, "{source}: line {line}: {what}"),
            Self::Damaged { path, what } => write!(f, "{}: the compressed data are damaged: {what}", path.display()),
            Self::NotUtf8 { source, line, offset, vocab } => write!(
                f,
                "{source}: line {line} (byte offset {offset}) is not UTF-8, which vocabulary {vocab} needs; \
                 convert the file or use the vocabulary bytes"
            ),
            Self::BadVocab { origin, line, what } => write!(f, "{origin}: line {line}: {what}"),
            Self::BadSize { size, what } => write!(f, "a vocabulary of {size} ids cannot be trained: {what}"),
            Self::BadCache { path, what } => {
                write!(f, "{}: the token cache is damaged: {what}; delete the file", path.display())
            }
            Self::TooShort { tokens, seq } => write!(
                f,
                "the data has {tokens} tokens, expected at least {} for one row of {seq}; give more data or a \
                 shorter sequence length",
                seq.saturating_add(1)
            ),
            Self::NoAnswers { skipped, seq } => write!(
                f,
                "no example is left to train on: {skipped} of them have no answer within a row of {seq} tokens; give longer rows"
            ),
            Self::BadFraction(x) => {
                write!(f, "validation fraction is {x}, expected a number from 0 to below 1")
            }
        }
    }
}

impl std::error::Error for TextError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}
