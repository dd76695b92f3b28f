//! What is measured of an estimate besides losses: how its scalars scatter, how many codes a step changes, where it points.
//!
//! Invariant: nothing here changes a bit of a run; what was not measured is absent, never zero.

use super::codes::Codes;
use super::step::{DEPTH, Probed, input_type, set_batch};
use super::{TrainError, Trainer};
use crate::text::Batch;
use chimera_ir::plan::{Plan, WeightKind};

/// The entry point that compares the estimate with the gradient.
pub(super) const COSINE: &str = "cosine";
/// Its outputs for a weight begin so: inner product, and squared lengths of gradient and estimate.
const PARTS: [&str; 3] = ["inner.", "gradient.", "estimate."];

/// How often what costs something is measured; 0 never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Steps from one count of changed codes to the next.
    pub flips: u64,
    /// Steps from one comparison with the gradient to the next.
    pub cosine: u64,
}

impl Inspection {
    /// Whether something that happens every so many steps happens behind `step`.
    pub(super) fn is_due(every: u64, step: u64) -> bool {
        every > 0 && step.is_multiple_of(every)
    }
}

/// The health of an estimate in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Health {
    /// Mean of the scalars, in nats: of the differences of losses that directions are compared by.
    pub mean: Option<f64>,
    /// Their population standard deviation, where there is more than one.
    pub deviation: Option<f64>,
    /// Norm of the gradient of final norm and head, where they follow it.
    pub head_norm: Option<f64>,
    /// Share of the ternary weights whose codes the step changed.
    pub flips: Option<f64>,
    /// Cosine of the estimate and the gradient over all weights that are probed.
    pub cosine: Option<f64>,
    /// The same over the weights of one kind.
    pub kinds: Vec<(WeightKind, f64)>,
}

/// Names of the kinds in logs.
const KINDS: [(WeightKind, &str, &str); 4] = [
    (WeightKind::Ternary, "cosine_ternary", "estimator/cosine_ternary"),
    (WeightKind::Matrix, "cosine_matrix", "estimator/cosine_matrix"),
    (WeightKind::Embedding, "cosine_embedding", "estimator/cosine_embedding"),
    (WeightKind::Vector, "cosine_vector", "estimator/cosine_vector"),
];

impl Health {
    /// The scatter of the scalars of a step.
    pub(super) fn of(probed: &Probed) -> Health {
        let c: Vec<f64> = probed.plus.iter().zip(&probed.minus).map(|(p, m)| p - m).collect();
        if c.is_empty() {
            return Health::default();
        }
        let n = c.len() as f64;
        let mean = c.iter().sum::<f64>() / n;
        let deviation = (c.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt();
        Health { mean: Some(mean), deviation: (c.len() > 1).then_some(deviation), ..Health::default() }
    }

    /// The deviation of the scalars as a multiple of their mean's magnitude.
    pub fn variation(&self) -> Option<f64> {
        let ratio = self.deviation? / self.mean?.abs();
        Some(ratio).filter(|x| x.is_finite())
    }

    /// What there is: key in JSON lines, tag in event files, value.
    pub(super) fn rows(&self) -> Vec<(&'static str, &'static str, f64)> {
        let own = [
            ("scalar_mean", "estimator/scalar_mean", self.mean),
            ("scalar_deviation", "estimator/scalar_deviation", self.deviation),
            ("scalar_variation", "estimator/scalar_variation", self.variation()),
            ("head_gradient_norm", "estimator/head_gradient_norm", self.head_norm),
            ("flips", "estimator/flips", self.flips),
            ("cosine", "estimator/cosine", self.cosine),
        ];
        let kind = |(k, x): &(WeightKind, f64)| KINDS.iter().find(|row| row.0 == *k).map(|row| (row.1, row.2, *x));
        own.into_iter()
            .filter_map(|(key, tag, x)| Some((key, tag, x?)))
            .chain(self.kinds.iter().filter_map(kind))
            .collect()
    }
}

/// The cosine of two vectors from their inner product and squared lengths; nothing where one has no length.
fn cosine([inner, a, b]: [f64; 3]) -> Option<f64> {
    let length = a.sqrt() * b.sqrt();
    (length > 0.0 && inner.is_finite() && length.is_finite()).then(|| inner / length)
}

impl Trainer {
    /// Keeps the ternary codes of the weights as they are, for [`Trainer::flips`].
    ///
    /// # Errors
    /// When execution fails.
    pub fn keep_codes(&mut self) -> Result<(), TrainError> {
        if self.codes.is_none() {
            self.codes = Codes::of(self.exec.plan()).map(Box::new);
        }
        self.codes.as_mut().map_or(Ok(()), |codes| codes.keep(&mut self.exec))
    }

    /// The share of the ternary weights whose codes changed since [`Trainer::keep_codes`]; nothing where the plan has no packed codes.
    ///
    /// # Errors
    /// When execution fails.
    pub fn flips(&mut self) -> Result<Option<f64>, TrainError> {
        self.codes.as_ref().map(|codes| codes.changed(&mut self.exec)).transpose()
    }

    /// Compares the estimate that [`Trainer::probe`] found on this batch with the gradient of the loss on it, before the weights are
    /// moved, and adds the cosines to `health`.
    ///
    /// # Errors
    /// A plan without the entry point `cosine`, or a failure to execute.
    pub fn compare(
        &mut self,
        batch: &Batch,
        step: u64,
        probed: &Probed,
        health: &mut Health,
    ) -> Result<(), TrainError> {
        let entry = self.exec().entry(COSINE)?;
        let members = input_type(self.exec().plan(), COSINE, "c")?.numel();
        let depths = input_type(self.exec().plan(), COSINE, DEPTH).is_ok().then(|| self.drawn(batch, step)).flatten();
        let (seed, word) = self.stream(step);
        let exec = self.exec_mut();
        set_batch(exec, entry, batch)?;
        if let Some(depths) = depths {
            exec.set_input(entry, DEPTH, &depths)?;
        }
        exec.set_input(entry, "c", probed.c.get(..members).unwrap_or_default())?;
        exec.set_input(entry, "seed", &seed)?;
        exec.set_input(entry, "step", &[word])?;
        exec.run_entry(entry)?;
        let mut all = [0.0; 3];
        let mut kinds = KINDS.map(|row| (row.0, [0.0; 3]));
        for (kind, name) in compared(self.exec().plan()) {
            let mut sums = [0.0; 3];
            for (sum, part) in sums.iter_mut().zip(PARTS) {
                *sum = self.exec().output::<f64>(entry, &format!("{part}{name}"))?.iter().sum();
            }
            let own = kinds.iter_mut().filter(|k| k.0 == kind).map(|k| &mut k.1);
            own.chain([&mut all]).for_each(|total| total.iter_mut().zip(sums).for_each(|(t, x)| *t += x));
        }
        health.cosine = cosine(all);
        health.kinds = kinds.into_iter().filter_map(|(kind, sums)| Some((kind, cosine(sums)?))).collect();
        Ok(())
    }
}

/// Kinds and names of the weights whose estimate is compared.
fn compared(plan: &Plan) -> Vec<(WeightKind, String)> {
    let outputs = plan.entry(COSINE).map_or(&[][..], |e| &e.outputs);
    let names = outputs.iter().filter_map(|port| port.0.strip_prefix(PARTS[0]));
    let kind = |name: &str| plan.weights.iter().find(|w| w.name == name).map(|w| (w.kind, name.to_owned()));
    names.filter_map(kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_scatter_around_their_mean() {
        let probed = |plus: &[f64], minus: &[f64]| {
            let (plus, minus) = (plus.to_vec(), minus.to_vec());
            Health::of(&Probed { plus, minus, c: vec![], loads: vec![], loss: 0.0 })
        };
        let health = probed(&[3.0, 5.0], &[2.0, 2.0]);
        assert_eq!((health.mean, health.deviation, health.variation()), (Some(2.0), Some(1.0), Some(0.5)));
        let one = probed(&[3.0], &[2.0]);
        assert_eq!((one.mean, one.deviation, one.variation()), (Some(1.0), None, None));
        assert_eq!(probed(&[1.0, -1.0], &[0.0, 0.0]).variation(), None, "no multiple of nothing");
        assert_eq!(probed(&[], &[]), Health::default());
        let health = Health { kinds: vec![(WeightKind::Vector, 0.5)], ..health };
        let keys: Vec<_> = health.rows().into_iter().map(|row| (row.0, row.2)).collect();
        let want = [("scalar_mean", 2.0), ("scalar_deviation", 1.0), ("scalar_variation", 0.5), ("cosine_vector", 0.5)];
        assert_eq!(keys, want);
    }

    #[test]
    fn vectors_without_length_have_no_cosine() {
        assert_eq!(cosine([-6.0, 4.0, 9.0]), Some(-1.0));
        assert_eq!((cosine([0.0, 0.0, 9.0]), cosine([f64::NAN, 1.0, 1.0])), (None, None));
    }
}
