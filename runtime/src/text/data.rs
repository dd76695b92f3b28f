//! Data files to tokenised documents, and the part of them that is held out.
//!
//! A source is what one argument names: a file or a folder. The same files and vocabulary give the same tokens, with or without a cache,
//! whatever the number of threads.

use std::io::{self, Write};
use std::path::PathBuf;
use std::str::Utf8Error;
use std::sync::Arc;

use rayon::prelude::*;

use super::cache::{Cache, Cached};
use super::input::{DataSpec, InputFile, Piece, Pieces, Reading, list};
use super::jsonl::record_text;
use super::order::mix;
use super::pack::{DocumentPart, TokenStream};
use super::tokens::{Origin, TokenWriter, Tokens};
use super::vocab::{Vocab, VocabSpec};
use super::{TextError, cache};

/// Bytes, and pieces, that are encoded at a time.
const GROUP_BYTES: usize = 8 << 20;
const GROUP_PIECES: usize = 1 << 14;

/// Hears how many of how many bytes are done; ascending.
pub type ProgressFn<'a> = &'a mut dyn FnMut(u64, u64);

/// The documents of one source as ids.
#[derive(Clone, Debug)]
pub struct TokenSource {
    /// Path or another name for messages.
    pub name: String,
    /// See [`DataSpec`].
    pub weight: f64,
    /// Ids, without end-of-document tokens.
    pub tokens: Tokens,
    /// The cache file, and whether it was there before.
    pub cached: Option<(PathBuf, Cached)>,
}

impl TokenSource {
    /// A source of documents in memory.
    ///
    /// # Errors
    /// When there is no room for the tokens.
    pub fn of_documents(name: &str, vocab: &Vocab, documents: &[&str]) -> Result<TokenSource, TextError> {
        let bytes = encode_documents(vocab, documents);
        let bytes = bytes.map_err(|error| TextError::Io { path: name.into(), doing: "keep the tokens", error })?;
        Ok(TokenSource { name: name.into(), weight: 1.0, tokens: Tokens::from_bytes(bytes)?, cached: None })
    }
}

/// Documents in memory in the layout of cache files, see [`Tokens::from_bytes`].
///
/// # Errors
/// When there is no room.
pub fn encode_documents(vocab: &Vocab, documents: &[&str]) -> io::Result<Vec<u8>> {
    let mut out = TokenWriter::new(vec![], vocab)?;
    for text in documents {
        out.push(&vocab.encode(text))?;
        out.end(hash(crc32c::crc32c(text.as_bytes()), text.len() as u64));
    }
    out.finish(&Origin::new(vocab))
}

/// A hash of a document by the checksum and number of its bytes.
pub(super) fn hash(sum: u32, bytes: u64) -> u64 {
    mix(u64::from(sum) ^ bytes << 32)
}

/// Encodes data with a known vocabulary.
///
/// # Errors
/// The first file and line that cannot be read, or a cache that cannot be written.
pub fn tokenise(
    vocab: &Vocab,
    data: &[DataSpec],
    reading: &Reading,
    cache: &Cache,
    progress: ProgressFn<'_>,
) -> Result<Vec<TokenSource>, TextError> {
    let Some(ids) = vocab.restriction() else { return sources(vocab, data, reading, cache, progress) };
    // Tokens of o200k serve every restriction that has all of them, and else say what is to be spelled.
    let full = sources(&Vocab::o200k(), data, reading, cache, progress)?;
    let complete = used(&full).zip(0..).all(|(used, id)| !used || ids.binary_search(&id).is_ok());
    if complete { Ok(renamed(full, ids)) } else { full.into_iter().map(|s| narrowed(s, vocab)).collect() }
}

/// Resolves `--vocab` against the data and encodes the data with it.
///
/// # Errors
/// As [`tokenise`], or a saved vocabulary that cannot be read.
pub fn prepare(
    spec: &VocabSpec,
    data: &[DataSpec],
    reading: &Reading,
    cache: &Cache,
    progress: ProgressFn<'_>,
) -> Result<(Vocab, Vec<TokenSource>), TextError> {
    let vocab = match spec {
        VocabSpec::Bytes => Vocab::bytes(),
        VocabSpec::O200k => Vocab::o200k(),
        VocabSpec::File(path) => Vocab::load(path)?,
        VocabSpec::Restricted => {
            let full = sources(&Vocab::o200k(), data, reading, cache, progress)?;
            let vocab = Vocab::restricted(used(&full).zip(0..).filter_map(|(used, id)| used.then_some(id)));
            let ids = vocab.restriction().cloned().unwrap_or_default();
            return Ok((vocab, renamed(full, &ids)));
        }
    };
    let tokens = tokenise(&vocab, data, reading, cache, progress)?;
    Ok((vocab, tokens))
}

/// Which ids occur in any of the sources.
fn used(sources: &[TokenSource]) -> impl Iterator<Item = bool> {
    let mut all = vec![];
    for source in sources {
        let used = source.tokens.used();
        all.resize(used.len().max(all.len()), false);
        all.iter_mut().zip(used).for_each(|(a, b)| *a |= b);
    }
    all.into_iter()
}

/// Tokens of o200k as tokens of a restricted vocabulary that has all of them.
fn renamed(full: Vec<TokenSource>, ids: &[u32]) -> Vec<TokenSource> {
    let mut names = vec![0; Vocab::o200k().size()];
    for (&id, dense) in ids.iter().zip(0..) {
        names[id as usize] = dense;
    }
    let names: Arc<[u32]> = names.into();
    let renamed = |s: TokenSource| TokenSource { tokens: s.tokens.renamed(&names), ..s };
    full.into_iter().map(renamed).collect()
}

/// Tokens of o200k as tokens of a restricted vocabulary, in memory; those that it lacks are spelled in bytes.
fn narrowed(full: TokenSource, vocab: &Vocab) -> Result<TokenSource, TextError> {
    let io = |error| TextError::Io { path: full.name.clone().into(), doing: "keep the tokens", error };
    let mut out = TokenWriter::new(vec![], vocab).map_err(io)?;
    for index in 0..full.tokens.documents() {
        let document = full.tokens.document(index);
        let ids: Vec<u32> = full.tokens.ids(document.ids).collect();
        out.push(&vocab.narrow(&ids)).map_err(io)?;
        out.end(document.hash);
    }
    let tokens = Tokens::from_bytes(out.finish(&Origin::new(vocab)).map_err(io)?)?;
    Ok(TokenSource { tokens, ..full })
}

fn sources(
    vocab: &Vocab,
    data: &[DataSpec],
    reading: &Reading,
    cache: &Cache,
    progress: ProgressFn<'_>,
) -> Result<Vec<TokenSource>, TextError> {
    if data.is_empty() {
        return Err(TextError::NoFiles);
    }
    let lists = data.iter().map(|d| list(&d.path)).collect::<Result<Vec<_>, _>>()?;
    let total: u64 = lists.iter().flatten().map(|f| f.size).sum();
    let mut done = 0;
    progress(0, total);
    let mut out = vec![];
    for (spec, files) in data.iter().zip(lists) {
        let size: u64 = files.iter().map(|f| f.size).sum();
        let (tokens, cached) =
            cache::tokens_of(vocab, spec, files, reading, cache, &mut |here| progress(done + here, total))?;
        done += size;
        progress(done, total);
        out.push(TokenSource { name: spec.path.display().to_string(), weight: spec.weight, tokens, cached });
    }
    Ok(out)
}

/// Reads, encodes and writes all documents of the files of a source. `progress` gets bytes on disk.
pub(super) fn encode_files(
    vocab: &Vocab,
    spec: &DataSpec,
    files: Vec<InputFile>,
    reading: &Reading,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<(), TextError> {
    let io = |error| TextError::Io { path: spec.path.clone(), doing: "keep the tokens of the data", error };
    let mut work = Encoder {
        vocab,
        reading,
        out: TokenWriter::new(out, vocab).map_err(io)?,
        group: vec![],
        group_bytes: 0,
        sum: 0,
        bytes: 0,
    };
    let (mut done, mut sums) = (0, vec![]);
    for file in &files {
        let mut pieces = Pieces::open(file, reading, vocab.is_text())?;
        while let Some(piece) = pieces.next()? {
            if work.add(file, pieces.is_records(), piece)? {
                progress(done + pieces.bytes_read());
            }
        }
        sums.push(pieces.finish()?);
        done += file.size;
    }
    work.flush()?;
    if work.out.documents() == 0 {
        return Err(TextError::NoDocuments(spec.path.clone()));
    }
    let Encoder { out, .. } = work;
    let (field, binary) = (reading.field.clone(), reading.binary);
    out.finish(&Origin { field, binary, files, sums, ..Origin::new(vocab) }).map_err(io)?;
    Ok(())
}

/// Encodes pieces in groups, on all cores.
struct Encoder<'a, 'w> {
    vocab: &'a Vocab,
    reading: &'a Reading,
    out: TokenWriter<&'w mut dyn Write>,
    group: Vec<(&'a InputFile, bool, Piece)>,
    group_bytes: usize,
    /// Checksum and number of bytes of the current document.
    sum: u32,
    bytes: u64,
}

struct Encoded {
    ids: Vec<u32>,
    sum: u32,
    bytes: usize,
}

impl<'a> Encoder<'a, '_> {
    /// Takes a piece; whether a group was encoded.
    fn add(&mut self, file: &'a InputFile, record: bool, piece: Piece) -> Result<bool, TextError> {
        self.group_bytes += piece.bytes.len();
        self.group.push((file, record, piece));
        let full = self.group_bytes >= GROUP_BYTES || self.group.len() >= GROUP_PIECES;
        if full {
            self.flush()?;
        }
        Ok(full)
    }

    fn flush(&mut self) -> Result<(), TextError> {
        let (vocab, reading) = (self.vocab, self.reading);
        let encoded: Vec<_> = self
            .group
            .par_iter()
            .map(|(file, record, piece)| text_of(vocab, reading, file, *record, piece))
            .map(|text| text.map(|(sum, bytes, ids)| Encoded { ids, sum, bytes }))
            .collect();
        for ((file, _, piece), encoded) in self.group.drain(..).zip(encoded) {
            let Encoded { ids, sum, bytes } = encoded?;
            let io = |error| TextError::Io { path: file.path.clone(), doing: "keep the tokens of the data", error };
            self.out.push(&ids).map_err(io)?;
            self.sum = crc32c::crc32c_combine(self.sum, sum, bytes);
            self.bytes += bytes as u64;
            if piece.last {
                if self.bytes > 0 {
                    self.out.end(hash(self.sum, self.bytes));
                }
                (self.sum, self.bytes) = (0, 0);
            }
        }
        self.group_bytes = 0;
        Ok(())
    }
}

/// Checksum, number of bytes, and ids of a piece.
fn text_of(
    vocab: &Vocab,
    reading: &Reading,
    file: &InputFile,
    record: bool,
    piece: &Piece,
) -> Result<(u32, usize, Vec<u32>), TextError> {
    let source = || file.path.display().to_string();
    if record {
        let text = record_text(&piece.bytes, reading.field.as_deref());
        let text = text.map_err(|what| TextError::BadRecord { source: source(), line: piece.line, what })?;
        return Ok((crc32c::crc32c(text.as_bytes()), text.len(), vocab.encode(&text)));
    }
    refuse_zeros(piece, reading, &source())?;
    let ids = vocab.encode_bytes(&piece.bytes).map_err(|e| not_utf8(piece, e, &source(), vocab.name()))?;
    Ok((crc32c::crc32c(&piece.bytes), piece.bytes.len(), ids))
}

/// The text of a piece, for a vocabulary that encodes text.
pub(super) fn text_in<'a>(
    piece: &'a Piece,
    reading: &Reading,
    source: &str,
    vocab: &'static str,
) -> Result<&'a str, TextError> {
    refuse_zeros(piece, reading, source)?;
    std::str::from_utf8(&piece.bytes).map_err(|e| not_utf8(piece, e, source, vocab))
}

fn not_utf8(piece: &Piece, error: Utf8Error, source: &str, vocab: &'static str) -> TextError {
    let (line, offset) = place(piece, error.valid_up_to());
    TextError::NotUtf8 { source: source.into(), line, offset, vocab }
}

fn refuse_zeros(piece: &Piece, reading: &Reading, source: &str) -> Result<(), TextError> {
    let zero = if reading.binary { None } else { piece.bytes.iter().position(|&b| b == 0) };
    zero.map_or(Ok(()), |at| {
        let (line, offset) = place(piece, at);
        Err(TextError::Binary { source: source.into(), line, offset })
    })
}

/// Line and offset in the file of a byte of a piece.
fn place(piece: &Piece, at: usize) -> (u64, u64) {
    let lines = piece.bytes[..at].iter().filter(|&&b| b == b'\n').count();
    (piece.line + lines as u64, piece.offset + at as u64)
}

/// Training and held-out documents.
#[derive(Clone, Debug)]
pub struct Split {
    /// What is trained on, and how often: sources of one weight are one stream.
    pub train: Vec<(f64, TokenStream)>,
    /// What is only measured.
    pub validation: TokenStream,
}

/// Holds out a share of every source, `0 <= fraction < 1`. Of a source with several documents, those whose hash falls into the share: which
/// ones depends on their text alone, so that more data, another order or a copy of a document move none from one side to the other. At
/// least one is held out and at least one stays. Of a source that is one document, its end.
///
/// # Errors
/// A fraction outside the range.
pub fn split(sources: &[TokenSource], fraction: f64, end_of_document: u32) -> Result<Split, TextError> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(TextError::BadFraction(fraction));
    }
    let mut train: Vec<(f64, Vec<DocumentPart>)> = vec![];
    let mut validation = vec![];
    for source in sources {
        let place = train.iter().position(|(weight, _)| *weight == source.weight).unwrap_or_else(|| {
            train.push((source.weight, vec![]));
            train.len() - 1
        });
        let (tokens, kept) = (&source.tokens, &mut train[place].1);
        let part = |ids| DocumentPart { tokens: tokens.clone(), ids };
        if tokens.documents() == 1 {
            let n = tokens.len();
            let cut = n - ((n as f64 * fraction).ceil() as usize).min(n.saturating_sub(1));
            kept.push(part(0..cut));
            validation.extend((cut < n).then(|| part(cut..n)));
            continue;
        }
        let hashes: Vec<u64> = (0..tokens.documents()).map(|i| tokens.document(i).hash).collect();
        let held = held_out(&hashes, fraction);
        for (index, held) in held.into_iter().enumerate() {
            let part = part(tokens.document(index).ids);
            if held { validation.push(part) } else { kept.push(part) }
        }
    }
    let stream = |parts| TokenStream::of(parts, end_of_document);
    Ok(Split {
        train: train.into_iter().map(|(w, parts)| (w, stream(parts))).collect(),
        validation: stream(validation),
    })
}

/// Which of several documents are held out, by the hashes of their text.
pub(super) fn held_out(hashes: &[u64], fraction: f64) -> Vec<bool> {
    let share = |hash: u64| hash as f64 / 2f64.powi(64);
    let mut held: Vec<bool> = hashes.iter().map(|&h| share(h) < fraction).collect();
    if fraction > 0.0 && !held.contains(&true) {
        let least = hashes.iter().min().copied();
        held.iter_mut().zip(hashes).for_each(|(held, h)| *held = Some(*h) == least);
    }
    if !held.contains(&false) {
        let most = hashes.iter().max().copied();
        held.iter_mut().zip(hashes).for_each(|(held, h)| *held = Some(*h) != most);
    }
    held
}

#[cfg(test)]
#[path = "data_tests.rs"]
mod tests;
