//! Text on its way in and out: vocabularies, data files, packed batches, sampling and the embedded corpus.
//!
//! Nothing here knows of graphs or plans. Everything is a function of its inputs: the same files, seed and position
//! give the same tokens, whatever the batch size or the number of threads.

mod answers;
mod batches;
mod bpe;
mod bpe_train;
mod cache;
pub mod chat;
pub mod corpus;
pub mod data;
mod error;
mod examples;
mod feed;
pub mod input;
pub mod jsonl;
pub mod measure;
mod o200k;
mod order;
pub mod pack;
mod pairs;
mod pieces;
pub mod sampler;
mod segments;
mod stream_decoder;
mod tokens;
pub mod vocab;
pub mod zstd;

pub use answers::{Answers, Taken, answers};
pub use batches::Batches;
pub use bpe_train::train_vocab;
pub use cache::{Cache, Cached};
pub use data::{Split, TokenSource, prepare, split, tokenise};
pub use error::TextError;
pub use feed::{Feed, HeldOut};
pub use input::{DataSpec, Reading};
pub use measure::{LossTally, unigram_bits_per_byte};
pub use pack::{Batch, IGNORE, TokenStream};
pub use pairs::{Pairs, pairs};
pub use sampler::{SampleError, Sampler, Sampling};
pub use segments::{LongText, Segments, Stage};
pub use stream_decoder::StreamDecoder;
pub use tokens::{Document, Tokens};
pub use vocab::{Vocab, VocabSpec};
