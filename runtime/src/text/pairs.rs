//! Preferences as pairs of rows, with the log-probabilities that a reference gives to their answers.
//!
//! Pair `p` of a batch is its rows `2 p`, the chosen answer, and `2 p + 1`, the rejected one. Each pass shuffles pairs anew.

use std::ops::Range;

use super::TextError;
use super::answers::Taken;
use super::data::held_out;
use super::examples::{Sequences, counted, positions, preferences, push_padding, push_row};
use super::feed::{Feed, HeldOut};
use super::input::DataSpec;
use super::order::Draw;
use super::pack::Batch;
use super::vocab::Vocab;

/// Pairs of rows.
#[derive(Clone, Debug)]
pub struct Pairs {
    streams: Vec<(f64, [Sequences; 2])>,
    /// Nothing where there is no pair.
    draw: Option<Draw>,
    seq: usize,
    end_of_document: u32,
    taken: Taken,
    sum: u32,
    /// Log-probabilities of both answers, pair by pair in the order of measurement; zeros before they are set.
    reference: Vec<[f32; 2]>,
}

/// Reads preferences for rows of `seq` tokens: those to train on, in an order by `seed`, and the share `fraction` that is held out by the
/// hashes of their texts.
///
/// # Errors
/// The first file and line that cannot be read, a fraction outside `[0, 1)`, or no pair with both answers within a row.
pub fn pairs(
    vocab: &Vocab,
    data: &[DataSpec],
    seq: usize,
    fraction: f64,
    seed: u64,
) -> Result<(Pairs, Pairs), TextError> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(TextError::BadFraction(fraction));
    }
    let empty = || Pairs {
        streams: vec![],
        draw: None,
        seq,
        end_of_document: vocab.end_of_document(),
        taken: Taken::default(),
        sum: 0,
        reference: vec![],
    };
    let mut sides = [empty(), empty()];
    for source in preferences(vocab, data)? {
        let held = held_out(&source.hashes, fraction);
        let sum = source.sequences.iter().fold(crc32c::crc32c(&source.weight.to_le_bytes()), |sum, s| s.checksum(sum));
        let mut streams = [0, 1].map(|_| [Sequences::default(), Sequences::default()]);
        for (index, held) in held.into_iter().enumerate() {
            let ids = [0, 1].map(|i| source.sequences[i].get(index));
            let (pairs, stream) = (&mut sides[usize::from(held)], &mut streams[usize::from(held)]);
            let labels = ids.map(|ids| counted(ids, positions(ids, seq)));
            if labels.contains(&0) {
                pairs.taken.skipped += 1;
                continue;
            }
            pairs.taken.examples += 1;
            pairs.taken.counted += labels[0] + labels[1];
            pairs.taken.cut += usize::from(ids.iter().any(|ids| ids.len() > seq + 1));
            stream.iter_mut().zip(ids).for_each(|(sequences, ids)| sequences.push(ids));
        }
        for (pairs, stream) in sides.iter_mut().zip(streams) {
            pairs.sum = crc32c::crc32c_append(pairs.sum, &sum.to_le_bytes());
            if stream[0].len() > 0 {
                pairs.reference.resize(pairs.reference.len() + stream[0].len(), [0.0; 2]);
                pairs.streams.push((source.weight, stream));
            }
        }
    }
    let [mut train, held] = sides;
    let blocks: Vec<(f64, u64)> = train.streams.iter().map(|(weight, s)| (*weight, s[0].len() as u64)).collect();
    if blocks.is_empty() {
        return Err(TextError::NoAnswers { skipped: train.taken.skipped, seq });
    }
    train.draw = Some(Draw::new(&blocks, seed));
    Ok((train, held))
}

impl Pairs {
    /// What became of the pairs.
    pub fn taken(&self) -> Taken {
        self.taken
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.reference.len()
    }

    /// Whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.reference.is_empty()
    }

    /// A checksum of the data, those of the other side included.
    pub fn checksum(&self) -> u32 {
        self.sum
    }

    /// Log-probabilities of the answers under the reference, pair by pair in the order of [`HeldOut::measure`].
    pub fn reference(&self) -> &[[f32; 2]] {
        &self.reference
    }

    /// Sets [`Pairs::reference`]; there must be one for each pair.
    pub fn set_reference(&mut self, reference: Vec<[f32; 2]>) {
        assert_eq!(reference.len(), self.len(), "every pair has its reference");
        self.reference = reference;
    }

    fn push(&self, stream: usize, pair: usize, number: usize, out: &mut Batch) {
        for (sequences, reference) in self.streams[stream].1.iter().zip(self.reference[number]) {
            let (ids, end) = (sequences.get(pair), out.tokens.len() + self.seq);
            push_row(ids, positions(ids, self.seq), 0, out);
            push_padding(end, 1, self.end_of_document, out);
            out.reference.push(reference);
        }
    }

    /// Pairs of the streams before this one.
    fn before(&self, stream: usize) -> usize {
        self.streams[..stream].iter().map(|s| s.1[0].len()).sum()
    }

    fn check(&self, seq: usize) {
        assert_eq!(seq, self.seq, "rows were made for this length");
    }
}

impl Feed for Pairs {
    fn next(&self, position: u64, batch: usize, seq: usize) -> (Batch, u64) {
        self.check(seq);
        let mut out = Batch::empty(batch, seq);
        let first = position / (2 * seq) as u64;
        if let Some(draw) = &self.draw {
            for index in first..first + batch as u64 / 2 {
                let (stream, pair) = draw.at(index);
                self.push(stream, pair, self.before(stream) + pair, &mut out);
            }
        }
        (out, position + (batch * seq) as u64)
    }
}

impl HeldOut for Pairs {
    fn measured_rows(&self, seq: usize) -> usize {
        self.check(seq);
        2 * self.len()
    }

    fn measure(&self, rows: Range<usize>, batch: usize, seq: usize) -> Batch {
        self.check(seq);
        let mut out = Batch::empty(batch, seq);
        for number in rows.start / 2..rows.end / 2 {
            let stream = (1..self.streams.len()).rfind(|&s| self.before(s) <= number).unwrap_or(0);
            self.push(stream, number - self.before(stream), number, &mut out);
        }
        push_padding(batch * seq, 0, self.end_of_document, &mut out);
        out.reference.resize(batch, 0.0);
        out
    }

    fn unit(&self) -> usize {
        2
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::IGNORE;
    use super::*;
    use std::fs;

    #[test]
    fn pairs_keep_their_rows_and_references_together() {
        let folder = tempfile::tempdir().expect("a folder");
        let spec = |name: &str, from: usize, n: usize| {
            let line = |i: usize| format!("{{\"prompt\": \"p\", \"chosen\": \"c{i}\", \"rejected\": \"r{i}\"}}\n");
            let path = folder.path().join(name);
            fs::write(&path, (from..from + n).map(line).collect::<String>()).expect("written");
            DataSpec { path, weight: 1.0 }
        };
        let data = [spec("a", 0, 12), spec("b", 100, 7)];
        let (mut train, held) = pairs(&Vocab::bytes(), &data, 40, 0.2, 5).expect("read");
        assert_eq!(train.len() + held.len(), 19);
        assert!(!held.is_empty() && train.checksum() == held.checksum());
        train.set_reference((0..train.len()).map(|i| [i as f32, -(i as f32)]).collect());
        let all = train.measure(0..2 * train.len(), 2 * train.len() + 2, 40);
        let labels = |batch: &Batch, row: usize| batch.labels[row * 40..][..40].to_vec();
        let text =
            |l: &[i32]| -> String { l.iter().filter(|&&l| l != IGNORE && l < 256).map(|&l| l as u8 as char).collect() };
        assert_eq!(all.weights(), [vec![1.0; 2 * train.len()], vec![0.0; 2]].concat());
        let (drawn, position) = train.next(0, 2 * train.len(), 40);
        assert_eq!(position, 80 * train.len() as u64);
        let mut seen = vec![];
        for p in 0..train.len() {
            let [chosen, rejected] = [2 * p, 2 * p + 1].map(|row| text(&labels(&drawn, row)));
            assert_eq!((&chosen[..2], &rejected[..2]), (" c", " r"));
            assert_eq!(chosen[2..], rejected[2..]);
            let number = drawn.reference[2 * p] as usize;
            assert_eq!(
                (drawn.reference[2 * p + 1], labels(&all, 2 * number)),
                (-(number as f32), labels(&drawn, 2 * p))
            );
            seen.push(number);
        }
        seen.sort_unstable();
        seen.dedup();
        // Sources take turns by their sizes, which may be one off at the end of a pass.
        assert!(seen.len() + 1 >= train.len(), "{seen:?}");
        fs::write(
            folder.path().join("a"),
            "{\"prompt\": \"p\", \"chosen\": \"x\", \"rejected\": \"y\"}\n\n{\"prompt\": 1}\n",
        )
        .expect("written");
        let error = pairs(&Vocab::bytes(), &data, 40, 0.2, 5).expect_err("no pair").to_string();
        assert!(error.contains("a: line 3: field \"prompt\" is a number"), "{error}");
    }
}
