//! Loss in nats per token and bits per byte, and what a model without context would reach.
//!
//! Bytes are those of the tokens that were predicted; an end of document costs nats and has no bytes.

use std::f64::consts::LN_2;

use super::pack::{Batch, IGNORE};
use super::vocab::Vocab;

/// Sums over measured batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossTally {
    /// Summed negative log-likelihood in nats.
    pub nats: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Bytes that these tokens stand for.
    pub bytes: u64,
}

impl LossTally {
    /// Adds a batch whose mean loss over counted labels is `mean` nats. A batch without counted labels adds nothing. Rows that are
    /// compared are one token each, without bytes.
    pub fn add(&mut self, mean: f64, batch: &Batch, vocab: &Vocab) {
        let counted: f64 = batch.weights().iter().sum();
        if counted > 0.0 {
            self.nats += mean * counted;
            self.tokens += counted as u64;
            self.bytes += if batch.reference.is_empty() { label_bytes(vocab, &batch.labels) } else { 0 };
        }
    }

    /// Mean loss, if any token was predicted.
    pub fn nats_per_token(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.nats / self.tokens as f64)
    }

    /// Loss per byte of text, if any byte was predicted.
    pub fn bits_per_byte(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.nats / LN_2 / self.bytes as f64)
    }
}

/// Bytes that the counted labels stand for.
fn label_bytes(vocab: &Vocab, labels: &[i32]) -> u64 {
    labels.iter().filter(|&&label| label != IGNORE).map(|&label| vocab.bytes_of(label as u32) as u64).sum()
}

/// Entropy of single tokens in `tokens` (such as [`super::TokenStream::tokens`]) in bits per byte: the best that a model without
/// context could reach on it. `None` without bytes. Ids must lie inside the vocabulary.
pub fn unigram_bits_per_byte(vocab: &Vocab, tokens: impl IntoIterator<Item = u32>) -> Option<f64> {
    let mut counts = vec![0u64; vocab.size()];
    for id in tokens {
        counts[id as usize] += 1;
    }
    let total = counts.iter().sum::<u64>() as f64;
    let (mut bits, mut bytes) = (0.0, 0);
    for (id, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
        bits -= count as f64 * (count as f64 / total).log2();
        bytes += count * vocab.bytes_of(id as u32) as u64;
    }
    (bytes > 0).then(|| bits / bytes as f64)
}

#[cfg(test)]
mod tests {
    use super::super::TokenStream;
    use super::*;

    #[test]
    fn tally_weights_batches_by_their_labels() {
        let vocab = Vocab::bytes();
        let stream = TokenStream::new(&[vocab.encode("abcde"), vocab.encode("xy")], vocab.end_of_document());
        let mut tally = LossTally::default();
        assert_eq!((tally.nats_per_token(), tally.bits_per_byte()), (None, None));
        for first in 0..stream.measured_rows(3) {
            tally.add(2.0, &stream.measure(first..first + 1, 1, 3), &vocab);
        }
        // Predicted: b c d e END, y END.
        assert_eq!((tally.tokens, tally.bytes), (7, 5));
        assert_eq!(tally.nats_per_token(), Some(2.0));
        assert!((tally.bits_per_byte().unwrap() - 14.0 / LN_2 / 5.0).abs() < 1e-12);
        let before = tally;
        tally.add(f64::NAN, &stream.measure(0..0, 2, 3), &vocab);
        assert_eq!(tally, before);
    }

    #[test]
    fn unigram_entropy_of_known_streams() {
        let bytes = Vocab::bytes();
        assert_eq!(unigram_bits_per_byte(&bytes, bytes.encode("abab")), Some(1.0));
        assert_eq!(unigram_bits_per_byte(&bytes, bytes.encode("abcdabcd")), Some(2.0));
        assert_eq!(unigram_bits_per_byte(&bytes, [256]), None);
        let o200k = Vocab::o200k();
        let ids = o200k.encode(" hello world");
        assert_eq!((ids.len(), unigram_bits_per_byte(&o200k, ids.clone())), (2, Some(2.0 / 12.0)));
    }
}
