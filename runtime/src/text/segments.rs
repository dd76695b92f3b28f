//! Long sequences in segments, for models that carry their state from one to the next (semantics 12.4).
//!
//! Every row of a step continues the row of the step before, until its sequence is over; all rows begin and end sequences together. What a
//! row continues has its document number, what begins has another.

use super::TextError;
use super::batches::Batches;
use super::feed::{Feed, HeldOut};
use super::pack::{Batch, TokenStream};
use std::ops::Range;

/// Numbers of documents that a sequence can have.
const DOCUMENTS: i32 = 1 << 20;
/// Sequences until numbers come again.
const TURNS: u64 = 1 << 10;

/// Steps on sequences of one length.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Stage {
    /// Tokens of a sequence: a multiple of those of a segment, at most 2^20.
    pub tokens: usize,
    /// Steps, a segment each.
    pub steps: u64,
    /// What the learning rate is multiplied by.
    pub rate: f64,
}

/// Sequences to train on, stage by stage; the last stage goes on where more is asked for.
#[derive(Clone, Debug)]
pub struct Segments {
    stages: Vec<(Stage, Batches)>,
}

/// Where a step is.
struct At<'a> {
    stage: &'a (Stage, Batches),
    /// Sequences of a row before this one, in all stages.
    turn: u64,
    /// Those in this stage.
    group: u64,
    /// Segments of the sequence before this one, and in all.
    segment: u64,
    per: u64,
}

impl Segments {
    /// Sequences of streams with weights, drawn in an order by `seed`.
    ///
    /// # Errors
    /// No stage, or a stream without a sequence of the length of a stage.
    pub fn new(streams: &[(f64, TokenStream)], stages: &[Stage], seed: u64) -> Result<Segments, TextError> {
        if stages.is_empty() {
            return Err(TextError::TooShort { tokens: 0, seq: 1 });
        }
        let of = |stage: &Stage| Ok((*stage, Batches::mixed(streams.to_vec(), stage.tokens.max(1), seed)?));
        Ok(Segments { stages: stages.iter().map(of).collect::<Result<_, TextError>>()? })
    }

    /// Tokens to train on.
    pub fn tokens(&self) -> usize {
        self.stages[0].1.len()
    }

    fn at(&self, position: u64, batch: usize, seq: usize) -> At<'_> {
        let mut step = position / (batch * seq) as u64;
        let mut turn = 0;
        for (i, stage) in self.stages.iter().enumerate() {
            let per = (stage.0.tokens / seq).max(1) as u64;
            if step < stage.0.steps || i + 1 == self.stages.len() {
                return At { stage, turn: turn + step / per, group: step / per, segment: step % per, per };
            }
            step -= stage.0.steps;
            turn += stage.0.steps.div_ceil(per);
        }
        unreachable!("there is a last stage")
    }
}

impl Feed for Segments {
    fn next(&self, position: u64, batch: usize, seq: usize) -> (Batch, u64) {
        let at = self.at(position, batch, seq);
        let mut out = Batch::empty(batch, seq);
        let first = (at.turn % TURNS) as i32 * DOCUMENTS;
        let within = at.segment as usize * seq..(at.segment as usize + 1) * seq;
        for row in 0..batch as u64 {
            at.stage.1.push_part(at.group * batch as u64 + row, within.clone(), first, &mut out);
        }
        (out, position + (batch * seq) as u64)
    }

    fn anew(&self, position: u64, batch: usize, seq: usize) -> u64 {
        let at = self.at(position, batch, seq);
        let left = if at.segment == 0 { 0 } else { at.per - at.segment };
        position + left * (batch * seq) as u64
    }

    fn rate(&self, position: u64, batch: usize, seq: usize) -> f64 {
        self.at(position, batch, seq).stage.0.rate
    }
}

/// Held-out text as sequences, `lanes` of which are measured at once, segment by segment.
#[derive(Clone, Debug)]
pub struct LongText {
    stream: TokenStream,
    tokens: usize,
    lanes: usize,
}

impl LongText {
    /// Sequences of `tokens` tokens, a multiple of those of a segment.
    pub fn new(stream: TokenStream, tokens: usize, lanes: usize) -> LongText {
        LongText { stream, tokens: tokens.max(1), lanes: lanes.max(1) }
    }

    /// Tokens to measure on.
    pub fn tokens(&self) -> usize {
        self.stream.len()
    }

    /// Segments of a sequence.
    fn per(&self, seq: usize) -> usize {
        (self.tokens / seq).max(1)
    }
}

impl HeldOut for LongText {
    fn measured_rows(&self, seq: usize) -> usize {
        self.stream.labelled().div_ceil(self.tokens).div_ceil(self.lanes) * self.per(seq) * self.lanes
    }

    /// Rows come in batches of all lanes.
    fn measure(&self, rows: Range<usize>, batch: usize, seq: usize) -> Batch {
        let mut out = Batch::empty(batch, seq);
        let (number, per) = (rows.start / self.lanes, self.per(seq));
        let (group, segment) = (number / per, number % per);
        let first = (group as u64 % TURNS) as i32 * DOCUMENTS;
        for lane in 0..rows.len() {
            let sequence = (group * self.lanes + lane) * self.tokens;
            let end = (sequence + self.tokens).min(self.stream.labelled());
            let (start, stop) = ((sequence + segment * seq).min(end), (sequence + (segment + 1) * seq).min(end));
            if start < stop {
                let passed = self.stream.document_at(start) - self.stream.document_at(sequence);
                self.stream.push_range(start..stop, Some(first + passed as i32), &mut out);
            }
            self.stream.push_padding((lane + 1) * seq - out.tokens.len(), &mut out);
        }
        let missing = batch * seq - out.tokens.len();
        self.stream.push_padding(missing, &mut out);
        out
    }

    fn unit(&self) -> usize {
        self.lanes
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::IGNORE;
    use super::*;

    fn stream() -> TokenStream {
        let documents: Vec<Vec<u32>> = (0..40u32).map(|d| (d * 40..d * 40 + 7 + d % 30).collect()).collect();
        TokenStream::new(&documents, 5000)
    }

    fn stages() -> [Stage; 2] {
        [Stage { tokens: 24, steps: 7, rate: 1.0 }, Stage { tokens: 48, steps: 12, rate: 0.5 }]
    }

    /// The rows of one lane in consecutive steps, joined.
    fn lane(feed: &Segments, from: u64, steps: u64, row: usize) -> (Vec<i32>, Vec<i32>) {
        let (mut tokens, mut seg) = (vec![], vec![]);
        for step in from..from + steps {
            let (batch, position) = feed.next(step * 16, 2, 8);
            assert_eq!(position, (step + 1) * 16);
            tokens.extend(&batch.tokens[row * 8..][..8]);
            seg.extend(&batch.seg[row * 8..][..8]);
        }
        (tokens, seg)
    }

    #[test]
    fn segments_of_a_sequence_continue_one_another() {
        let feed = Segments::new(&[(1.0, stream())], &stages(), 3).expect("long enough");
        let whole: Vec<i32> = stream().tokens().map(|t| t as i32).collect();
        for (from, steps) in [(0, 3), (3, 3), (7, 6), (13, 6)] {
            for row in 0..2 {
                let (tokens, seg) = lane(&feed, from, steps, row);
                assert!(whole.windows(tokens.len()).any(|w| w == tokens), "steps from {from} are one sequence");
                for t in 1..tokens.len() {
                    assert_eq!(seg[t] != seg[t - 1], tokens[t - 1] == 5000, "documents change where they end");
                }
                if from > 0 {
                    let before = lane(&feed, from - 1, 1, row).1;
                    assert_ne!(before[7], seg[0], "a sequence begins anew");
                }
            }
        }
        // The seventh step is a sequence that the first stage does not end.
        assert_ne!(lane(&feed, 6, 1, 0).1[7], lane(&feed, 7, 1, 0).1[0]);
        let rates: Vec<f64> = [0, 6, 7, 100].map(|step| feed.rate(step * 16, 2, 8)).into();
        assert_eq!(rates, [1.0, 1.0, 0.5, 0.5]);
        let anew: Vec<u64> = [0, 1, 2, 3, 8, 12].map(|step| feed.anew(step * 16, 2, 8) / 16).into();
        assert_eq!(anew, [0, 3, 3, 3, 13, 13]);
        assert!(Segments::new(&[(1.0, stream())], &[Stage { tokens: 8000, steps: 1, rate: 1.0 }], 3).is_err());
    }

    #[test]
    fn measuring_covers_every_label_once() {
        let stream = stream();
        let count = |batch: &Batch| batch.labels.iter().filter(|&&l| l != IGNORE).count();
        let all = count(&stream.measure(0..stream.measured_rows(8), stream.measured_rows(8), 8));
        let held = LongText::new(stream, 24, 3);
        let rows = held.measured_rows(8);
        let (mut labels, mut last) = (0, vec![]);
        for first in (0..rows).step_by(3) {
            let batch = held.measure(first..first + 3, 3, 8);
            assert_eq!((batch.tokens.len(), batch.seg.len()), (24, 24));
            labels += count(&batch);
            let heads: Vec<i32> = (0..3).map(|lane| batch.seg[lane * 8]).collect();
            if first / 3 % 3 == 0 && first > 0 {
                assert!(heads.iter().zip(&last).all(|(a, b)| a != b), "sequences begin anew");
            }
            last = (0..3).map(|lane| batch.seg[lane * 8 + 7]).collect();
        }
        assert_eq!(labels, all);
    }
}
