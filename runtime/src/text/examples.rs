//! Conversations and preferences of data files as ids of which some count.
//!
//! Every example is a document of its own. The same files and vocabulary give the same examples, whatever the number of threads.

use rayon::prelude::*;

use super::TextError;
use super::chat::{self, Part};
use super::data::hash;
use super::input::{DataSpec, InputFile, Piece, Pieces, Reading, list};
use super::pack::{Batch, IGNORE};
use super::vocab::Vocab;

/// Marks an id that counts as a label.
const COUNTS: u32 = 1 << 31;
/// Records that are encoded at a time.
const GROUP: usize = 1 << 12;
/// The field that is read as lines of JSON where none is named.
const MESSAGES: &str = "messages";

/// Sequences of ids, each with its end of document, of which some count as labels.
#[derive(Clone, Debug, Default)]
pub(super) struct Sequences {
    ids: Vec<u32>,
    ends: Vec<usize>,
}

impl Sequences {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Ids of all sequences.
    pub(super) fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn get(&self, index: usize) -> &[u32] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.ids[start..self.ends[index]]
    }

    pub(super) fn push(&mut self, ids: &[u32]) {
        self.ids.extend_from_slice(ids);
        self.ends.push(self.ids.len());
    }

    /// Goes on with a checksum of ids, of what counts and of where sequences end.
    pub(super) fn checksum(&self, sum: u32) -> u32 {
        let sum = self.ids.iter().fold(sum, |sum, id| crc32c::crc32c_append(sum, &id.to_le_bytes()));
        self.ends.iter().fold(sum, |sum, end| crc32c::crc32c_append(sum, &(*end as u64).to_le_bytes()))
    }
}

/// Positions that a sequence has in rows of `seq` tokens: each is the input for the id behind it.
pub(super) fn positions(ids: &[u32], seq: usize) -> usize {
    ids.len().saturating_sub(1).min(seq)
}

/// Labels that count in the first `positions` positions of a sequence.
pub(super) fn counted(ids: &[u32], positions: usize) -> usize {
    ids.iter().skip(1).take(positions).filter(|&&id| id & COUNTS != 0).count()
}

/// Adds the first `positions` positions of a sequence as a document with the number `seg`.
pub(super) fn push_row(ids: &[u32], positions: usize, seg: i32, out: &mut Batch) {
    for pair in ids.windows(2).take(positions) {
        out.tokens.push((pair[0] & !COUNTS) as i32);
        out.labels.push(if pair[1] & COUNTS == 0 { IGNORE } else { (pair[1] & !COUNTS) as i32 });
        out.seg.push(seg);
    }
}

/// Ends of document up to `to` positions, as a document of their own with ignored labels.
pub(super) fn push_padding(to: usize, seg: i32, end_of_document: u32, out: &mut Batch) {
    out.tokens.resize(to, end_of_document as i32);
    out.labels.resize(to, IGNORE);
    out.seg.resize(to, seg);
}

/// One of these for each source: how often it is drawn from, `N` sequences of each example, and hashes of the examples.
pub(super) struct Source<const N: usize> {
    pub weight: f64,
    pub sequences: [Sequences; N],
    pub hashes: Vec<u64>,
}

/// The texts of a record.
type Parse<const N: usize> = fn(&[u8], Option<&str>) -> Result<[Vec<Part>; N], String>;

/// The conversations of data files.
///
/// # Errors
/// The first file and line that cannot be read.
pub(super) fn conversations(
    vocab: &Vocab,
    data: &[DataSpec],
    field: Option<&str>,
) -> Result<Vec<Source<1>>, TextError> {
    read(vocab, data, field, |line, field| chat::conversation(line, field).map(|parts| [parts]))
}

/// The preferences of data files: the chosen sequence, and the rejected one.
///
/// # Errors
/// The first file and line that cannot be read.
pub(super) fn preferences(vocab: &Vocab, data: &[DataSpec]) -> Result<Vec<Source<2>>, TextError> {
    read(vocab, data, None, |line, _| chat::preference(line).map(|p| [p.chosen, p.rejected]))
}

fn read<const N: usize>(
    vocab: &Vocab,
    data: &[DataSpec],
    field: Option<&str>,
    parse: Parse<N>,
) -> Result<Vec<Source<N>>, TextError> {
    if data.is_empty() {
        return Err(TextError::NoFiles);
    }
    // A field makes every file one of lines of JSON.
    let reading = Reading { field: Some(field.unwrap_or(MESSAGES).to_owned()), binary: false };
    let mut out = vec![];
    for spec in data {
        let sequences = std::array::from_fn(|_| Sequences::default());
        let mut source = Source { weight: spec.weight, sequences, hashes: vec![] };
        for file in list(&spec.path)? {
            let mut pieces = Pieces::open(&file, &reading, true)?;
            let mut group = Vec::with_capacity(GROUP);
            loop {
                let piece = pieces.next()?;
                let ended = piece.is_none();
                group.extend(piece);
                if group.len() == GROUP || ended {
                    encode(vocab, &file, &mut group, field, parse, &mut source)?;
                }
                if ended {
                    break;
                }
            }
            pieces.finish()?;
        }
        if source.hashes.is_empty() {
            return Err(TextError::NoDocuments(spec.path.clone()));
        }
        out.push(source);
    }
    Ok(out)
}

fn encode<const N: usize>(
    vocab: &Vocab,
    file: &InputFile,
    group: &mut Vec<Piece>,
    field: Option<&str>,
    parse: Parse<N>,
    to: &mut Source<N>,
) -> Result<(), TextError> {
    let one = |piece: &Piece| {
        let name = || file.path.display().to_string();
        let texts = parse(&piece.bytes, field);
        let texts = texts.map_err(|what| TextError::BadRecord { source: name(), line: piece.line, what })?;
        let sum = texts.iter().flatten().fold((0, 0), |(sum, bytes), part: &Part| {
            (crc32c::crc32c_append(sum, part.text.as_bytes()), bytes + part.text.len() as u64)
        });
        Ok((hash(sum.0, sum.1), texts.map(|parts| ids(vocab, &parts))))
    };
    let encoded: Vec<Result<_, TextError>> = group.par_iter().map(one).collect();
    group.clear();
    for example in encoded {
        let (hash, ids) = example?;
        to.hashes.push(hash);
        to.sequences.iter_mut().zip(&ids).for_each(|(sequences, ids)| sequences.push(ids));
    }
    Ok(())
}

/// Parts as ids, and an end of document that counts where the last part does.
fn ids(vocab: &Vocab, parts: &[Part]) -> Vec<u32> {
    let mark = |counts: bool| if counts { COUNTS } else { 0 };
    let mut out = vec![];
    for part in parts {
        out.extend(vocab.encode(&part.text).into_iter().map(|id| id | mark(part.counts)));
    }
    out.push(vocab.end_of_document() | mark(parts.last().is_some_and(|p| p.counts)));
    out
}
