//! The order in which training sees the data.
//!
//! A position is the number of tokens drawn so far. What stands at it depends on the data, the seed and the length of a block only: not on
//! the size of batches, nor on where a run was interrupted.

use super::TextError;
use super::order::Draw;
use super::pack::{Batch, TokenStream};
use std::ops::Range;

/// Streams that are drawn from in the ratio of their weights and sizes, each in blocks that are shuffled anew for every pass over it.
#[derive(Clone, Debug)]
pub struct Batches {
    streams: Vec<TokenStream>,
    draw: Draw,
    /// Where blocks have one document each: the blocks of each document of a stream and those before it.
    own: Option<Vec<Vec<usize>>>,
    block: usize,
}

impl Batches {
    /// One stream, in blocks of `block >= 1` tokens.
    ///
    /// # Errors
    /// A stream without a block.
    pub fn new(stream: TokenStream, block: usize, seed: u64) -> Result<Self, TextError> {
        Self::mixed(vec![(1.0, stream)], block, seed)
    }

    /// Several streams. Each one has weight times blocks in every sum of weight times blocks, spread evenly.
    ///
    /// # Errors
    /// No stream, or one without a block.
    pub fn mixed(streams: Vec<(f64, TokenStream)>, block: usize, seed: u64) -> Result<Self, TextError> {
        let blocks = streams.iter().map(|(_, stream)| stream.rows(block)).collect();
        Self::shared(streams, blocks, None, block, seed)
    }

    /// As [`Batches::mixed`], where a block has tokens of one document alone and is filled up.
    ///
    /// # Errors
    /// No stream, or one without a token.
    pub fn apart(streams: Vec<(f64, TokenStream)>, block: usize, seed: u64) -> Result<Self, TextError> {
        let own: Vec<Vec<usize>> = streams.iter().map(|(_, stream)| stream.rows_of_documents(block)).collect();
        let blocks = own.iter().map(|ends| ends.last().copied().unwrap_or(0)).collect();
        Self::shared(streams, blocks, Some(own), block, seed)
    }

    fn shared(
        streams: Vec<(f64, TokenStream)>,
        blocks: Vec<usize>,
        own: Option<Vec<Vec<usize>>>,
        block: usize,
        seed: u64,
    ) -> Result<Self, TextError> {
        if streams.is_empty() {
            return Err(TextError::TooShort { tokens: 0, seq: block });
        }
        if let Some(((_, short), _)) = streams.iter().zip(&blocks).find(|(_, blocks)| **blocks == 0) {
            return Err(TextError::TooShort { tokens: short.len(), seq: block });
        }
        let sizes: Vec<(f64, u64)> = streams.iter().zip(&blocks).map(|((weight, _), &n)| (*weight, n as u64)).collect();
        let streams = streams.into_iter().map(|s| s.1).collect();
        Ok(Self { streams, draw: Draw::new(&sizes, seed), own, block })
    }

    /// All streams.
    pub fn streams(&self) -> impl Iterator<Item = &TokenStream> {
        self.streams.iter()
    }

    /// Tokens of all streams, end-of-document tokens included.
    pub fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        self.streams().flat_map(TokenStream::tokens)
    }

    /// Number of [`Batches::tokens`].
    pub fn len(&self) -> usize {
        self.streams().map(TokenStream::len).sum()
    }

    /// Whether there is no token; never.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Adds positions `within` of the block that is drawn as number `index`; its documents are numbered from `first` on.
    pub(super) fn push_part(&self, index: u64, within: Range<usize>, first: i32, out: &mut Batch) {
        let (stream, block) = self.draw.at(index);
        let (stream, start) = (&self.streams[stream], block * self.block);
        let passed = stream.document_at(start + within.start) - stream.document_at(start);
        stream.push_range(start + within.start..start + within.end, Some(first + passed as i32), out);
    }

    /// `batch` rows of `seq` tokens from `position` on, and the position behind them. A row may hold several blocks, or part of one;
    /// where it goes from one to another, a document ends.
    pub fn next(&self, position: u64, batch: usize, seq: usize) -> (Batch, u64) {
        let mut out = Batch::empty(batch, seq);
        let mut at = position;
        for row in 1..=batch {
            let mut number = 0;
            while out.tokens.len() < row * seq {
                let (index, within) = (at / self.block as u64, (at % self.block as u64) as usize);
                let (stream, block) = self.draw.at(index);
                let n = (self.block - within).min(row * seq - out.tokens.len());
                let from = &self.streams[stream];
                let begin = out.seg.len();
                match &self.own {
                    None => {
                        let start = block * self.block + within;
                        from.push_range(start..start + n, Some(number), &mut out);
                    }
                    Some(own) => {
                        from.push_own_row(block, &own[stream], self.block, within..within + n, &mut out);
                        out.seg[begin..].iter_mut().for_each(|s| *s = number.wrapping_add(i32::from(*s != 0)));
                    }
                }
                number = out.seg.last().map_or(0, |last| last.wrapping_add(1));
                at += n as u64;
            }
        }
        (out, at)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::IGNORE;
    use super::*;

    fn stream() -> TokenStream {
        let documents: Vec<Vec<u32>> = (0..9u32).map(|d| (d * 10..d * 10 + d).collect()).collect();
        TokenStream::new(&documents, 999)
    }

    fn take(batches: &Batches, from: u64, shapes: &[(usize, usize)]) -> (Vec<i32>, Vec<i32>, u64) {
        let (mut tokens, mut labels, mut at) = (Vec::new(), Vec::new(), from);
        for &(batch, seq) in shapes {
            let (drawn, next) = batches.next(at, batch, seq);
            assert_eq!(
                (drawn.tokens.len(), drawn.labels.len(), drawn.seg.len()),
                (batch * seq, batch * seq, batch * seq)
            );
            assert_eq!(next, at + (batch * seq) as u64);
            tokens.extend(drawn.tokens);
            labels.extend(drawn.labels);
            at = next;
        }
        (tokens, labels, at)
    }

    #[test]
    fn neither_batch_size_nor_row_length_changes_the_order() {
        let batches = Batches::new(stream(), 5, 11).unwrap();
        let whole = take(&batches, 0, &[(24, 5)]);
        assert_eq!(whole, take(&batches, 0, &[(1, 5); 24]));
        assert_eq!(whole, take(&batches, 0, &[(7, 5), (7, 5), (7, 5), (3, 5)]));
        assert_eq!(whole, take(&batches, 0, &[(2, 15), (9, 10)]));
        assert_eq!(whole, take(&batches, 0, &[(8, 3), (16, 6)]));
        let resumed = take(&batches, 100, &[(4, 5)]);
        assert_eq!((&whole.0[100..], &whole.1[100..], whole.2), (&resumed.0[..], &resumed.1[..], resumed.2));
        let blocks = stream().rows(5);
        assert!(24 > 2 * blocks, "the batches run over the end of a pass");
        for pass in 0..2 {
            let mut seen: Vec<usize> = (0..blocks).map(|i| batches.draw.at((pass * blocks + i) as u64).1).collect();
            assert!(seen != (0..blocks).collect::<Vec<_>>());
            seen.sort_unstable();
            assert_eq!(seen, (0..blocks).collect::<Vec<_>>());
        }
        let error = Batches::new(stream(), 1000, 11).unwrap_err().to_string();
        assert!(error.contains("at least 1001"), "{error}");
        assert!(Batches::mixed(vec![], 4, 1).is_err());
    }

    #[test]
    fn rows_reset_between_blocks_and_documents() {
        let one = TokenStream::new(&[(0..63).collect()], 999);
        let batches = Batches::new(one, 4, 3).unwrap();
        let (drawn, _) = batches.next(2, 3, 8);
        for row in 0..3 {
            let part = row * 8..row * 8 + 8;
            let (tokens, seg) = (&drawn.tokens[part.clone()], &drawn.seg[part.clone()]);
            assert_eq!(seg, [0, 0, 1, 1, 1, 1, 2, 2], "two blocks and parts of one on each side");
            for (t, label) in drawn.labels[part].iter().enumerate() {
                assert_eq!(*label, tokens[t] + 1, "labels go on behind the end of a block");
            }
        }
        // Within a block, segments change where documents do.
        let batches = Batches::new(stream(), 9, 3).unwrap();
        let (drawn, _) = batches.next(0, 5, 9);
        for t in (0..45).filter(|t| t % 9 > 0) {
            assert_eq!(drawn.seg[t] != drawn.seg[t - 1], drawn.labels[t - 1] == IGNORE, "position {t}");
        }
    }

    #[test]
    fn blocks_apart_have_one_document_each() {
        let batches = Batches::apart(vec![(1.0, stream())], 5, 11).unwrap();
        // Documents of 1 to 8 ids: one block up to five, two beyond.
        let blocks = 5 + 2 * 3;
        let (drawn, at) = batches.next(0, blocks, 5);
        assert_eq!((at, drawn.padding, drawn.counted()), (55, 55 - 36, 36));
        let mut seen: Vec<i32> = vec![];
        for row in 0..blocks {
            let ids = &drawn.tokens[row * 5..row * 5 + 5];
            let own: Vec<i32> = ids.iter().copied().filter(|&id| id != 999).collect();
            assert!(own.windows(2).all(|w| w[1] == w[0] + 1) && !own.is_empty(), "{ids:?}");
            let fill = drawn.seg[row * 5..row * 5 + 5].iter().filter(|&&s| s == 1).count();
            assert_eq!(fill, 5 - own.len());
            seen.extend(own);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..9).flat_map(|d| d * 10..d * 10 + d).collect::<Vec<i32>>(), "a pass has every token once");
        // A longer row goes from block to block, a document at a time.
        let (long, _) = batches.next(0, 1, 15);
        assert_eq!(long.tokens, drawn.tokens[..15]);
        for edge in [5, 10] {
            assert_ne!(long.seg[edge - 1], long.seg[edge]);
        }
        let empty = TokenStream::new(&[vec![], vec![]], 999);
        assert!(Batches::apart(vec![(1.0, empty)], 5, 11).is_err());
    }

    #[test]
    fn weights_decide_how_often() {
        let of = |n: u32, id: u32| TokenStream::new(&[vec![id; n as usize]], 999);
        // 10, 20 and 10 blocks with weights 1, 2 and 0.5: shares 10, 40 and 5.
        let batches = Batches::mixed(vec![(1.0, of(40, 1)), (2.0, of(80, 2)), (0.5, of(40, 3))], 4, 5).unwrap();
        let mut counts = [0; 4];
        for index in 0..550 {
            let (drawn, _) = batches.next(index * 4, 1, 4);
            counts[drawn.tokens[0] as usize] += 1;
            if (index + 1) % 55 == 0 {
                let turns = (index as i64 + 1) / 55;
                for (id, share) in [(1, 10), (2, 40), (3, 5)] {
                    assert!((counts[id] - share * turns).abs() <= 1, "{counts:?} behind {index}");
                }
            }
        }
        let mut own: Vec<usize> =
            (0..550).map(|i| batches.draw.at(i)).filter(|b| b.0 == 0).take(10).map(|b| b.1).collect();
        own.sort_unstable();
        assert_eq!(own, (0..10).collect::<Vec<_>>(), "a pass over a stream has each of its blocks once");
    }
}
