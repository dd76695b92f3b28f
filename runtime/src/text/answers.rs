//! Conversations packed into rows, with a loss on what the assistant says.
//!
//! A row holds whole conversations, in the order of the files, and is filled up with ends of document. Which conversations share a row
//! depends on the data and the length of a row alone; rows are shuffled anew for every pass.

use std::ops::Range;

use super::TextError;
use super::data::held_out;
use super::examples::{Sequences, conversations, counted, positions, push_padding, push_row};
use super::feed::{Feed, HeldOut};
use super::input::DataSpec;
use super::order::Draw;
use super::pack::Batch;
use super::vocab::Vocab;

/// What became of examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Examples that are used.
    pub examples: usize,
    /// Those of them that were longer than a row and lost their end.
    pub cut: usize,
    /// Examples that are left out, because no answer begins within a row.
    pub skipped: usize,
    /// Labels that count.
    pub counted: usize,
}

/// Rows of conversations.
#[derive(Clone, Debug)]
pub struct Answers {
    streams: Vec<Stream>,
    /// Nothing where there is no row.
    draw: Option<Draw>,
    seq: usize,
    end_of_document: u32,
    taken: Taken,
    sum: u32,
}

#[derive(Clone, Debug, Default)]
struct Stream {
    weight: f64,
    sequences: Sequences,
    /// The sequences of each row.
    rows: Vec<Range<usize>>,
    /// Positions of the last row that are taken.
    filled: usize,
}

impl Stream {
    fn add(&mut self, ids: &[u32], seq: usize) {
        let needed = positions(ids, seq);
        let index = self.sequences.len();
        self.sequences.push(ids);
        match self.rows.last_mut() {
            Some(row) if self.filled + needed <= seq => {
                row.end = index + 1;
                self.filled += needed;
            }
            _ => {
                self.rows.push(index..index + 1);
                self.filled = needed;
            }
        }
    }
}

/// Reads conversations and packs them into rows of `seq` tokens: those to train on, in an order by `seed`, and the share `fraction` that is
/// held out by the hashes of their texts. Nothing is held out of a source with a single conversation.
///
/// # Errors
/// The first file and line that cannot be read, a fraction outside `[0, 1)`, or no conversation with an answer within a row.
pub fn answers(
    vocab: &Vocab,
    data: &[DataSpec],
    field: Option<&str>,
    seq: usize,
    fraction: f64,
    seed: u64,
) -> Result<(Answers, Answers), TextError> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(TextError::BadFraction(fraction));
    }
    let empty = || Answers {
        streams: vec![],
        draw: None,
        seq,
        end_of_document: vocab.end_of_document(),
        taken: Taken::default(),
        sum: 0,
    };
    let mut sides = [empty(), empty()];
    for source in conversations(vocab, data, field)? {
        let held = held_out(&source.hashes, fraction);
        let [sequences] = source.sequences;
        let sum = sequences.checksum(crc32c::crc32c(&source.weight.to_le_bytes()));
        let mut streams = [Stream::default(), Stream::default()];
        for (index, held) in held.into_iter().enumerate() {
            let ids = sequences.get(index);
            let (answers, side) = (&mut sides[usize::from(held)], &mut streams[usize::from(held)]);
            let labels = counted(ids, positions(ids, seq));
            if labels == 0 {
                answers.taken.skipped += 1;
                continue;
            }
            answers.taken.examples += 1;
            answers.taken.counted += labels;
            answers.taken.cut += usize::from(ids.len() > seq + 1);
            side.add(ids, seq);
        }
        for (answers, stream) in sides.iter_mut().zip(streams) {
            answers.sum = crc32c::crc32c_append(answers.sum, &sum.to_le_bytes());
            if !stream.rows.is_empty() {
                answers.streams.push(Stream { weight: source.weight, ..stream });
            }
        }
    }
    let [mut train, held] = sides;
    let blocks: Vec<(f64, u64)> = train.streams.iter().map(|s| (s.weight, s.rows.len() as u64)).collect();
    if blocks.is_empty() {
        let skipped = train.taken.skipped;
        return Err(TextError::NoAnswers { skipped, seq });
    }
    train.draw = Some(Draw::new(&blocks, seed));
    Ok((train, held))
}

impl Answers {
    /// What became of the conversations.
    pub fn taken(&self) -> Taken {
        self.taken
    }

    /// Rows of a pass over all sources.
    pub fn rows(&self) -> usize {
        self.streams.iter().map(|s| s.rows.len()).sum()
    }

    /// Number of ids, ends of document included.
    pub fn tokens(&self) -> usize {
        self.streams.iter().map(|s| s.sequences.tokens()).sum()
    }

    /// A checksum of the data, those of the other side included.
    pub fn checksum(&self) -> u32 {
        self.sum
    }

    fn push(&self, stream: usize, row: usize, out: &mut Batch) {
        let end = out.tokens.len() + self.seq;
        let stream = &self.streams[stream];
        let mut number = 0;
        for index in stream.rows[row].clone() {
            let ids = stream.sequences.get(index);
            push_row(ids, positions(ids, self.seq), number, out);
            number += 1;
        }
        push_padding(end, number, self.end_of_document, out);
    }

    fn check(&self, seq: usize) {
        assert_eq!(seq, self.seq, "rows were packed for this length");
    }
}

impl Feed for Answers {
    fn next(&self, position: u64, batch: usize, seq: usize) -> (Batch, u64) {
        self.check(seq);
        let mut out = Batch::empty(batch, seq);
        let first = position / seq as u64;
        if let Some(draw) = &self.draw {
            for index in first..first + batch as u64 {
                let (stream, row) = draw.at(index);
                self.push(stream, row, &mut out);
            }
        }
        (out, position + (batch * seq) as u64)
    }
}

impl HeldOut for Answers {
    fn measured_rows(&self, seq: usize) -> usize {
        self.check(seq);
        self.rows()
    }

    fn measure(&self, rows: Range<usize>, batch: usize, seq: usize) -> Batch {
        self.check(seq);
        let mut out = Batch::empty(batch, seq);
        let all = self.streams.iter().enumerate().flat_map(|(s, stream)| (0..stream.rows.len()).map(move |r| (s, r)));
        all.skip(rows.start).take(rows.len()).for_each(|(stream, row)| self.push(stream, row, &mut out));
        push_padding(batch * seq, 0, self.end_of_document, &mut out);
        out
    }
}

#[cfg(test)]
#[path = "answers_tests.rs"]
mod tests;
