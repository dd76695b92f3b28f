//! What a run reads: rows to train on by position, and rows to measure on by number.
//!
//! Invariant: the same position gives the same rows, whatever was read before.

use super::batches::Batches;
use super::pack::{Batch, TokenStream};
use std::fmt::Debug;
use std::ops::Range;

/// Rows to train on.
pub trait Feed: Debug {
    /// `batch` rows of `seq` tokens from `position` on, and the position behind them. Positions count tokens.
    fn next(&self, position: u64, batch: usize, seq: usize) -> (Batch, u64);

    /// The first position from `position` on where nothing continues what was read before.
    fn anew(&self, position: u64, batch: usize, seq: usize) -> u64 {
        let _ = (batch, seq);
        position
    }

    /// What the learning rate is multiplied by at a position.
    fn rate(&self, position: u64, batch: usize, seq: usize) -> f64 {
        let _ = (position, batch, seq);
        1.0
    }
}

/// Rows to measure on.
pub trait HeldOut: Debug {
    /// Rows of `seq` tokens that measure everything.
    fn measured_rows(&self, seq: usize) -> usize;

    /// Rows `rows` in a batch of exactly `batch` rows; what is missing to a full batch has ignored labels.
    fn measure(&self, rows: Range<usize>, batch: usize, seq: usize) -> Batch;

    /// Rows that are measured together.
    fn unit(&self) -> usize {
        1
    }
}

impl Feed for Batches {
    fn next(&self, position: u64, batch: usize, seq: usize) -> (Batch, u64) {
        Batches::next(self, position, batch, seq)
    }
}

impl HeldOut for TokenStream {
    fn measured_rows(&self, seq: usize) -> usize {
        TokenStream::measured_rows(self, seq)
    }

    fn measure(&self, rows: Range<usize>, batch: usize, seq: usize) -> Batch {
        TokenStream::measure(self, rows, batch, seq)
    }
}
