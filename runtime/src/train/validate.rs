//! Measuring on held-out data: the loss, and how pairs of answers are told apart.
//!
//! Invariant: a measurement changes neither weights nor what the next step depends on.

use super::TrainError;
use super::metrics::{Preferred, Validation};
use super::step::{Trainer, weighted};
use crate::text::{HeldOut, LossTally, Pairs, Vocab};

/// The output of a loss over pairs: the reward margin of the pair of every row.
const MARGINS: &str = "margins";
/// Its output with the log-probability of the labels of every row.
const LOGP: &str = "logp";

impl Trainer {
    /// Loss, and reward margins where pairs are compared, on the first rows of held-out data; nothing when there are none.
    ///
    /// # Errors
    /// When execution fails.
    pub fn validate(
        &mut self,
        held: &dyn HeldOut,
        rows: usize,
        vocab: &Vocab,
    ) -> Result<Option<Validation>, TrainError> {
        let mut tally = LossTally::default();
        let (mut pairs, mut margin, mut right) = (0.0, 0.0, 0.0);
        self.measured(held, rows, &mut |exec, loss, batch| {
            let (losses, weights) = (exec.output::<f32>(loss, "losses")?, batch.weights());
            let losses: Vec<f64> = losses.iter().map(|&x| f64::from(x)).collect();
            tally.add(weighted(&losses, &weights), batch, vocab);
            if batch.reference.is_empty() {
                return Ok(());
            }
            for (pair, weights) in exec.output::<f32>(loss, MARGINS)?.chunks(2).zip(weights.chunks(2)) {
                if weights.contains(&0.0) {
                    continue;
                }
                let m = f64::from(pair[0]);
                pairs += 1.0;
                margin += m;
                right += if m == 0.0 { 0.5 } else { f64::from(u8::from(m > 0.0)) };
            }
            Ok(())
        })?;
        let preferred = (pairs > 0.0).then(|| Preferred { margin: margin / pairs, accuracy: right / pairs });
        let nats = tally.nats_per_token();
        Ok(nats.map(|nats_per_token| Validation { nats_per_token, bits_per_byte: tally.bits_per_byte(), preferred }))
    }

    /// The log-probabilities of both answers of every pair under the weights as they are.
    ///
    /// # Errors
    /// When execution fails.
    pub fn reference(&mut self, pairs: &Pairs) -> Result<Vec<[f32; 2]>, TrainError> {
        let mut out = Vec::with_capacity(pairs.len());
        self.measured(pairs, usize::MAX, &mut |exec, loss, _| {
            let logp = exec.output::<f32>(loss, LOGP)?;
            out.extend(logp.chunks(2).take(pairs.len() - out.len()).map(|pair| [pair[0], pair[1]]));
            Ok(())
        })?;
        Ok(out)
    }
}
