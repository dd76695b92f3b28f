//! Text on its way in and out: vocabularies, data files, packed batches, sampling and the embedded corpus.
//!
//! Nothing here knows of graphs or plans. Everything is a function of its inputs: the same files, seed and position
//! give the same tokens, whatever the batch size or the number of threads.

pub mod corpus;
pub mod data;
pub mod measure;
mod o200k;
mod order;
pub mod pack;
pub mod sampler;
mod stream_decoder;
pub mod vocab;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use data::{Source, Split, TokenSource, prepare, read_files, split, tokenise};
pub use measure::{LossTally, unigram_bits_per_byte};
pub use pack::{Batch, Batches, IGNORE, TokenStream};
pub use sampler::{SampleError, Sampler, Sampling};
pub use stream_decoder::StreamDecoder;
pub use vocab::{Vocab, VocabSpec};

/// What can go wrong between a file on disk and a batch of tokens.
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
    /// A data path that is a directory or a device.
    NotAFile {
        /// The path given.
        path: PathBuf,
        /// True for a directory, false for a device, pipe or socket.
        directory: bool,
    },
    /// A data file without a single byte.
    EmptyFile(PathBuf),
    /// No data file was named.
    NoFiles,
    /// Bytes that are not UTF-8, under a vocabulary that encodes text.
    NotUtf8 {
        /// Name of the source.
        source: String,
        /// Line of the first bad byte, from 1.
        line: usize,
        /// Offset of the first bad byte, from 0.
        offset: usize,
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
    /// Fewer tokens than one row needs.
    TooShort {
        /// Tokens in the stream, end-of-document tokens included.
        tokens: usize,
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
            Self::NotAFile { path, directory: true } => {
                write!(f, "{}: is a directory, expected a text file; name the files in it", path.display())
            }
            Self::NotAFile { path, directory: false } => {
                write!(f, "{}: is not a regular file, expected a text file", path.display())
            }
            Self::EmptyFile(path) => {
                write!(f, "{}: the file is empty, expected text", path.display())
            }
            Self::NoFiles => write!(f, "no data file given, expected at least one"),
            Self::NotUtf8 { source, line, offset, vocab } => write!(
                f,
                "{source}: line {line} (byte offset {offset}) is not UTF-8, which vocabulary {vocab} needs; \
                 convert the file or use the vocabulary bytes"
            ),
            Self::BadVocab { origin, line, what } => write!(f, "{origin}: line {line}: {what}"),
            Self::TooShort { tokens, seq } => write!(
                f,
                "the data has {tokens} tokens, expected at least {} for one row of {seq}; give more data or a \
                 shorter sequence length",
                seq.saturating_add(1)
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
