//! Documents packed into rows, and the order in which training sees the rows.
//!
//! Row `r` of length T holds stream positions `r*T .. r*T+T`; labels are shifted once, here; what a closing end of
//! document would have to predict belongs to another document and is ignored.

use std::ops::Range;

use super::TextError;
use super::order::permute;

/// The label of a position that does not count.
pub const IGNORE: i32 = -100;

/// Documents joined into one stream: document, end, document, end, ...
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenStream {
    tokens: Vec<u32>,
    /// Stream position of each document's closing end-of-document token, ascending.
    ends: Vec<usize>,
    end_of_document: u32,
}

/// `[batch, seq]` row-major inputs of a loss entry point.
#[derive(Clone, Debug, PartialEq, Eq)]
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
}

impl TokenStream {
    /// Joins documents, empty ones included.
    pub fn new(documents: &[Vec<u32>], end_of_document: u32) -> Self {
        let total = documents.iter().map(|d| d.len() + 1).sum();
        let (mut tokens, mut ends) = (Vec::with_capacity(total), Vec::with_capacity(documents.len()));
        for document in documents {
            tokens.extend_from_slice(document);
            ends.push(tokens.len());
            tokens.push(end_of_document);
        }
        Self { tokens, ends, end_of_document }
    }

    /// All tokens, end-of-document tokens included.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
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

    /// Positions that have a next token.
    fn labelled(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }

    fn push_row(&self, row: usize, seq: usize, out: &mut Batch) {
        let start = (row * seq).min(self.labelled());
        let stop = (start + seq).min(self.labelled());
        let mut document = self.ends.partition_point(|&end| end < start);
        for t in start..stop {
            let closing = self.ends[document] == t;
            out.tokens.push(self.tokens[t] as i32);
            out.labels.push(if closing { IGNORE } else { self.tokens[t + 1] as i32 });
            out.seg.push(document as i32);
            document += usize::from(closing);
        }
        self.push_padding(seq - (stop - start), out);
    }

    fn push_padding(&self, positions: usize, out: &mut Batch) {
        let to = out.tokens.len() + positions;
        out.tokens.resize(to, self.end_of_document as i32);
        out.labels.resize(to, IGNORE);
        out.seg.resize(to, self.ends.len() as i32);
    }
}

impl Batch {
    fn empty(batch: usize, seq: usize) -> Self {
        let room = || Vec::with_capacity(batch * seq);
        Self { batch, seq, tokens: room(), labels: room(), seg: room() }
    }

    /// Positions whose label counts.
    pub fn counted(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE).count()
    }
}

/// Training rows in a shuffled order that depends on seed and epoch only. A position is the number of rows drawn so far
/// at one `seq`: it is all that a checkpoint keeps.
#[derive(Clone, Debug)]
pub struct Batches {
    stream: TokenStream,
    seed: u64,
}

impl Batches {
    /// Batches over `stream`.
    pub fn new(stream: TokenStream, seed: u64) -> Self {
        Self { stream, seed }
    }

    /// The underlying stream.
    pub fn stream(&self) -> &TokenStream {
        &self.stream
    }

    /// Row at `position`, if the stream has a row of length `seq` at all.
    pub fn row_at(&self, position: u64, seq: usize) -> Option<usize> {
        let rows = self.stream.rows(seq) as u64;
        let epoch = position.checked_div(rows)?;
        Some(permute(position % rows, rows, self.seed, epoch) as usize)
    }

    /// The `batch` rows from `position` on and the position behind them. Batches run across the end of an epoch.
    pub fn next(&self, position: u64, batch: usize, seq: usize) -> Result<(Batch, u64), TextError> {
        let mut out = Batch::empty(batch, seq);
        let end = position + batch as u64;
        for at in position..end {
            let too_short = || TextError::TooShort { tokens: self.stream.tokens.len(), seq };
            self.stream.push_row(self.row_at(at, seq).ok_or_else(too_short)?, seq, &mut out);
        }
        Ok((out, end))
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

    #[test]
    fn batch_size_does_not_change_the_order() {
        let batches = Batches::new(stream(), 11);
        let take = |sizes: &[usize]| {
            let (mut tokens, mut at) = (Vec::new(), 0);
            for &size in sizes {
                let (batch, next) = batches.next(at, size, 5).unwrap();
                assert_eq!(batch.tokens.len(), size * 5);
                tokens.extend(batch.tokens);
                at = next;
            }
            (tokens, at)
        };
        let rows = batches.stream().rows(5);
        assert_eq!(take(&[1; 24]), take(&[7, 7, 7, 3]));
        assert!(24 > 2 * rows, "the batches run over the end of an epoch");
        let mut epoch: Vec<usize> = (0..rows).map(|p| batches.row_at((rows + p) as u64, 5).unwrap()).collect();
        epoch.sort_unstable();
        assert_eq!(epoch, (0..rows).collect::<Vec<_>>());
        let (resumed, _) = batches.next(20, 4, 5).unwrap();
        assert_eq!(take(&[24]).0[100..], resumed.tokens[..]);
        let error = batches.next(0, 1, 1000).unwrap_err().to_string();
        assert!(error.contains("at least 1001"), "{error}");
    }
}
