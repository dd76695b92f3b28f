//! Documents packed into rows.
//!
//! Row `r` of length T holds stream positions `r*T .. r*T+T`; labels are shifted once, here; what a closing end of
//! document would have to predict belongs to another document and is ignored.

use std::ops::Range;

use super::tokens::{Origin, TokenWriter, Tokens};
use super::vocab::Vocab;

/// The label of a position that does not count.
pub const IGNORE: i32 = -100;

/// A document, or a part of one that is treated as a document.
#[derive(Clone, Debug)]
pub(super) struct DocumentPart {
    /// Where its ids are.
    pub tokens: Tokens,
    /// Which of them.
    pub ids: Range<usize>,
}

/// Documents joined into one stream: document, end, document, end, ... The ids stay where they are.
#[derive(Clone, Debug)]
pub struct TokenStream {
    documents: Vec<DocumentPart>,
    /// Stream position of each document's closing end-of-document token, ascending.
    ends: Vec<usize>,
    end_of_document: u32,
}

/// `[batch, seq]` row-major inputs of a loss entry point.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Number of rows.
    pub batch: usize,
    /// Length of a row.
    pub seq: usize,
    /// Token ids.
    pub tokens: Vec<i32>,
    /// Next token ids, or [`IGNORE`].
    pub labels: Vec<i32>,
    /// Document numbers; a change resets the recurrent states.
    pub seg: Vec<i32>,
    /// Log-probability of the labels of each row under the reference, where each even row is preferred to the row behind it; else empty.
    pub reference: Vec<f32>,
    /// Positions that only fill rows up.
    pub padding: usize,
}

impl TokenStream {
    /// Joins documents of ids below 2^18 in memory, empty ones included.
    pub fn new(documents: &[Vec<u32>], end_of_document: u32) -> Self {
        let vocab = Vocab::o200k();
        let image = || {
            let mut out = TokenWriter::new(vec![], &vocab)?;
            for ids in documents {
                out.push(ids)?;
                out.end(0);
            }
            out.finish(&Origin { vocab_size: 1 << 18, ..Origin::new(&vocab) })
        };
        let image = image().expect("writing to memory succeeds");
        let tokens = Tokens::from_bytes(image).expect("what was written can be read");
        let part = |i| DocumentPart { tokens: tokens.clone(), ids: tokens.document(i).ids };
        Self::of((0..documents.len()).map(part).collect(), end_of_document)
    }

    /// Joins parts of documents.
    pub(super) fn of(documents: Vec<DocumentPart>, end_of_document: u32) -> Self {
        let ends = documents.iter().scan(0, |next, document| {
            let end = *next + document.ids.len();
            *next = end + 1;
            Some(end)
        });
        Self { ends: ends.collect(), documents, end_of_document }
    }

    /// All tokens, end-of-document tokens included.
    pub fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        self.documents.iter().flat_map(|d| d.tokens.ids(d.ids.clone()).chain([self.end_of_document]))
    }

    /// Number of tokens, end-of-document tokens included.
    pub fn len(&self) -> usize {
        self.ends.last().map_or(0, |end| end + 1)
    }

    /// Whether there is no document.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.ends.len()
    }

    /// Complete rows of length `seq >= 1`; an incomplete last row is dropped.
    pub fn rows(&self, seq: usize) -> usize {
        self.labelled() / seq
    }

    /// Rows of length `seq >= 1` that measure everything: an incomplete last row counts.
    pub fn measured_rows(&self, seq: usize) -> usize {
        self.labelled().div_ceil(seq)
    }

    /// Rows `rows` in stream order, in a batch of exactly `batch` rows. Positions behind the end of the stream, and rows
    /// missing to a full batch, hold end-of-document tokens of a document of their own with ignored labels.
    pub fn measure(&self, rows: Range<usize>, batch: usize, seq: usize) -> Batch {
        assert!(rows.len() <= batch, "the rows fit into the batch");
        let mut out = Batch::empty(batch, seq);
        for row in rows {
            self.push_row(row, seq, &mut out);
        }
        let missing = batch * seq - out.tokens.len();
        self.push_padding(missing, &mut out);
        out
    }

    /// The number of the document at a position.
    pub(super) fn document_at(&self, position: usize) -> usize {
        self.ends.partition_point(|&end| end < position)
    }

    /// How many rows of `seq` tokens each document and those before it fill, where no row has tokens of two documents. The last row of
    /// a document is filled up.
    pub(super) fn rows_of_documents(&self, seq: usize) -> Vec<usize> {
        let rows = self.documents.iter().scan(0, |sum, document| {
            *sum += document.ids.len().div_ceil(seq);
            Some(*sum)
        });
        rows.collect()
    }

    /// Positions `within` of a row of `seq` tokens, one of those that [`TokenStream::rows_of_documents`] counted in `ends`. What fills the
    /// row up is a document of its own.
    pub(super) fn push_own_row(&self, row: usize, ends: &[usize], seq: usize, within: Range<usize>, out: &mut Batch) {
        let index = ends.partition_point(|&end| end <= row);
        let first = index.checked_sub(1).map_or(0, |before| ends[before]);
        let (Some(document), Some(&end)) = (self.documents.get(index), self.ends.get(index)) else {
            return self.push_padding(within.len(), out);
        };
        let length = document.ids.len();
        let begin = ((row - first) * seq + within.start).min(length);
        let stop = ((row - first) * seq + within.end).min(length);
        self.push_range(end - length + begin..end - length + stop, Some(0), out);
        self.push_padding(within.len() - (stop - begin), out);
    }

    /// Positions that have a next token.
    pub(super) fn labelled(&self) -> usize {
        self.len().saturating_sub(1)
    }

    fn push_row(&self, row: usize, seq: usize, out: &mut Batch) {
        let start = (row * seq).min(self.labelled());
        let stop = (start + seq).min(self.labelled());
        self.push_range(start..stop, None, out);
        self.push_padding(seq - (stop - start), out);
    }

    /// Positions that have labels. Documents are numbered as in the stream, or from `first` on.
    pub(super) fn push_range(&self, positions: Range<usize>, first: Option<i32>, out: &mut Batch) {
        let mut at = positions.start;
        let from = self.document_at(at);
        for (index, document) in self.documents.iter().enumerate().skip(from) {
            if at >= positions.end {
                break;
            }
            let end = self.ends[index];
            let start = end - document.ids.len();
            let stop = positions.end.min(end + 1);
            // Positions at..stop hold ids, and the end of the document where stop is behind it.
            let ids = document.ids.start + at - start..(document.ids.start + stop - start).min(document.ids.end);
            let closing = (stop > end).then_some(self.end_of_document as i32);
            out.tokens.extend(document.tokens.ids(ids.clone()).map(|id| id as i32).chain(closing));
            let next = (ids.start + 1).min(document.ids.end)..(ids.end + 1).min(document.ids.end);
            let last = (ids.end == document.ids.end && !ids.is_empty()).then_some(self.end_of_document as i32);
            out.labels.extend(document.tokens.ids(next).map(|id| id as i32).chain(last).chain(closing.map(|_| IGNORE)));
            let number = first.map_or(index as i32, |first| first.wrapping_add((index - from) as i32));
            out.seg.resize(out.tokens.len(), number);
            at = stop;
        }
    }

    pub(super) fn push_padding(&self, positions: usize, out: &mut Batch) {
        let to = out.tokens.len() + positions;
        out.padding += positions;
        out.tokens.resize(to, self.end_of_document as i32);
        out.labels.resize(to, IGNORE);
        out.seg.resize(to, self.ends.len() as i32);
    }
}

impl Batch {
    pub(super) fn empty(batch: usize, seq: usize) -> Self {
        let room = || Vec::with_capacity(batch * seq);
        Self { batch, seq, tokens: room(), labels: room(), seg: room(), reference: vec![], padding: 0 }
    }

    /// What the loss of each row counts in a mean: the number of its labels; of rows that are compared, 1 where it has any.
    pub fn weights(&self) -> Vec<f64> {
        let counted = |row: &[i32]| row.iter().filter(|&&label| label != IGNORE).count() as f64;
        let counts = self.labels.chunks(self.seq.max(1)).map(counted);
        if self.reference.is_empty() { counts.collect() } else { counts.map(|n| n.min(1.0)).collect() }
    }

    /// Positions whose label counts.
    pub fn counted(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> TokenStream {
        let documents: Vec<Vec<u32>> = (0..9u32).map(|d| (d * 10..d * 10 + d).collect()).collect();
        TokenStream::new(&documents, 999)
    }

    /// The obvious packing: every array for the whole stream, then cut into rows.
    fn naive(documents: &[Vec<u32>], seq: usize, end: u32) -> [Vec<i32>; 3] {
        let (mut tokens, mut seg, mut closing) = (vec![], vec![], vec![]);
        for (i, document) in documents.iter().enumerate() {
            for &id in document {
                tokens.push(id as i32);
                closing.push(false);
                seg.push(i as i32);
            }
            tokens.push(end as i32);
            closing.push(true);
            seg.push(i as i32);
        }
        let mut labels: Vec<i32> = (1..tokens.len()).map(|t| if closing[t - 1] { IGNORE } else { tokens[t] }).collect();
        let n = labels.len() / seq * seq;
        [&mut tokens, &mut labels, &mut seg].iter_mut().for_each(|z| z.truncate(n));
        [tokens, labels, seg]
    }

    #[test]
    fn packing_matches_the_golden_file() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/schedules.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
        let config: serde_json::Value =
            serde_json::from_str(header["__metadata__"]["config"].as_str().unwrap()).unwrap();
        let documents: Vec<Vec<u32>> = serde_json::from_value(config["docs"].clone()).unwrap();
        let expected = |name: &str| -> Vec<i32> {
            let offsets = &header[name]["data_offsets"];
            let at = |i: usize| 8 + header_len + offsets[i].as_u64().unwrap() as usize;
            bytes[at(0)..at(1)].chunks_exact(8).map(|w| i64::from_le_bytes(w.try_into().unwrap()) as i32).collect()
        };
        let stream = TokenStream::new(&documents, 2);
        assert_eq!(stream.rows(6), 2);
        let packed = stream.measure(0..2, 2, 6);
        assert_eq!(packed.tokens, expected("exact.pack_tokens"));
        assert_eq!(packed.labels, expected("exact.pack_labels"));
        assert_eq!(packed.seg, expected("exact.pack_seg"));
    }

    #[test]
    fn packing_matches_the_naive_one_at_every_length() {
        let documents: Vec<Vec<u32>> = vec![vec![], vec![1], vec![2; 17], vec![], vec![], (3..9).collect()];
        let stream = TokenStream::new(&documents, 77);
        for seq in 1..40 {
            let [tokens, labels, seg] = naive(&documents, seq, 77);
            let rows = stream.rows(seq);
            let packed = stream.measure(0..rows, rows, seq);
            assert_eq!((packed.tokens, packed.labels, packed.seg), (tokens, labels, seg), "seq {seq}");
        }
        assert_eq!((TokenStream::new(&[], 7).rows(4), TokenStream::new(&[], 7).measured_rows(4)), (0, 0));
    }

    #[test]
    fn rows_of_one_document_have_its_tokens_in_order() {
        let stream = stream();
        for seq in [1, 3, 4, 9] {
            let ends = stream.rows_of_documents(seq);
            let rows = *ends.last().expect("documents");
            let (mut tokens, mut labels) = (vec![], vec![]);
            for row in 0..rows {
                let mut out = Batch::empty(1, seq);
                let cut = seq / 2;
                stream.push_own_row(row, &ends, seq, 0..cut, &mut out);
                stream.push_own_row(row, &ends, seq, cut..seq, &mut out);
                assert_eq!([out.tokens.len(), out.labels.len(), out.seg.len()], [seq; 3]);
                assert_eq!(out.counted(), seq - out.padding, "every token has a label");
                let own = out.seg.iter().take(seq - out.padding);
                assert!(own.clone().all(|&s| s == 0) && out.seg.iter().skip(seq - out.padding).all(|&s| s != 0));
                tokens.extend(out.tokens.iter().take(seq - out.padding).copied());
                labels.extend(out.labels.iter().take(seq - out.padding).copied());
            }
            let expected: Vec<i32> = (0..9).flat_map(|d| d * 10..d * 10 + d).collect();
            assert_eq!(tokens, expected, "length {seq}");
            let next = |d: i32| (d * 10 + 1..d * 10 + d).chain((d > 0).then_some(999));
            assert_eq!(labels, (0..9).flat_map(next).collect::<Vec<_>>());
        }
    }

    #[test]
    fn measuring_covers_every_label_once() {
        let stream = stream();
        let whole = naive(&(0..9u32).map(|d| (d * 10..d * 10 + d).collect()).collect::<Vec<_>>(), 1, 999);
        let all: Vec<i32> = whole[1].iter().copied().filter(|&l| l != IGNORE).collect();
        for (seq, batch) in [(4, 3), (7, 2), (100, 1), (1, 5)] {
            let rows = stream.measured_rows(seq);
            let mut seen: Vec<i32> = Vec::new();
            for first in (0..rows).step_by(batch) {
                let part = stream.measure(first..(first + batch).min(rows), batch, seq);
                assert_eq!((part.tokens.len(), part.seg.len()), (batch * seq, batch * seq));
                seen.extend(part.labels.iter().filter(|&&l| l != IGNORE));
            }
            assert_eq!(seen, all, "seq {seq}");
        }
    }
}
