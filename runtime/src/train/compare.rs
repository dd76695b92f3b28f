//! From the losses of probes to the scalars of an update: one rule for each [`Comparison`].
//!
//! Invariant: the scalars are a function of the losses and of how many labels count, in a fixed order of additions.

use super::TrainError;
use super::step::weighted;
use chimera_ir::plan::{Comparison, ESTIMATOR, Plan};

/// The comparison that a plan was compiled for.
///
/// # Errors
/// When it does not say, or by a name that nobody knows.
pub(super) fn of(plan: &Plan) -> Result<Comparison, TrainError> {
    let name = plan.option(ESTIMATOR).unwrap_or("nothing");
    let found = Comparison::ALL.iter().find(|(_, n)| *n == name).map(|(c, _)| *c);
    found.ok_or_else(|| {
        let names: Vec<&str> = Comparison::ALL.iter().map(|(_, n)| *n).collect();
        TrainError::Plan(format!(
            "its option `{ESTIMATOR}` is {name}, expected one of {}; compile it again",
            names.join(", ")
        ))
    })
}

/// The number of scalars and of losses of a batch of `rows` rows with `members` directions.
pub(super) fn sizes(comparison: Comparison, members: usize, rows: usize) -> (usize, usize) {
    match comparison {
        Comparison::PerSequence => (members.clamp(1, rows), 2 * rows),
        Comparison::TwoSided | Comparison::TwoSidedScaled => (members, 2 * members * rows),
        Comparison::OneSided | Comparison::OneSidedScaled => (members, (members + 1) * rows),
    }
}

/// The loss of every positive probe of `members` directions and of what it is compared with; `counts` are the counted labels of each row.
pub(super) fn sides(comparison: Comparison, members: usize, losses: &[f64], counts: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let each = |side: &[f64]| side.chunks(counts.len()).map(|rows| weighted(rows, counts)).collect();
    let halves = losses.split_at(losses.len() / 2);
    match comparison {
        Comparison::PerSequence => {
            let shared = (counts.len() / members.max(1)).max(1);
            let each = |side: &[f64]| {
                side.chunks(shared)
                    .zip(counts.chunks(shared))
                    .map(|(l, n)| if l.len() == 1 { l[0] } else { weighted(l, n) })
                    .collect()
            };
            (each(halves.0), each(halves.1))
        }
        Comparison::TwoSided | Comparison::TwoSidedScaled => (each(halves.0), each(halves.1)),
        Comparison::OneSided | Comparison::OneSidedScaled => {
            let (plus, still) = losses.split_at(losses.len() - counts.len());
            let plus: Vec<f64> = each(plus);
            let still = vec![weighted(still, counts); plus.len()];
            (plus, still)
        }
    }
}

/// The scalars of an update.
///
/// Per sequence `(l+ - l-) / (std + 1e-8)` with the population standard deviation over the batch, and the sign alone for a single
/// sequence; otherwise `l+ - l-` of each direction, which the update divides by the distance of its probes. Scaled ones are divided by
/// the population standard deviation of the losses with a direction, and a single one by its magnitude (semantics 13.2, FZOO).
pub(super) fn coefficients(comparison: Comparison, plus: &[f64], minus: &[f64]) -> Vec<f32> {
    let c: Vec<f64> = plus.iter().zip(minus).map(|(p, m)| p - m).collect();
    match (comparison, &c[..]) {
        (Comparison::PerSequence, &[only]) => vec![if only == 0.0 { 0.0 } else { only.signum() as f32 }],
        (Comparison::PerSequence, _) => scaled(&c, spread(&c)),
        (Comparison::TwoSidedScaled, _) => scaled(&c, spread(&[plus, minus].concat())),
        (Comparison::OneSidedScaled, _) => scaled(&c, if c.len() == 1 { c[0].abs() } else { spread(plus) }),
        (Comparison::TwoSided | Comparison::OneSided, _) => c.iter().map(|&x| x as f32).collect(),
    }
}

/// `c / (spread + 1e-8)`.
fn scaled(c: &[f64], spread: f64) -> Vec<f32> {
    c.iter().map(|x| (x / (spread + 1e-8)) as f32).collect()
}

/// The population standard deviation.
fn spread(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_have_unit_spread() {
        let c = coefficients(Comparison::PerSequence, &[1.0, 2.0, 3.0], &[1.0, 1.0, 1.0]);
        let spread = (2f64 / 3.0).sqrt();
        assert_eq!(c, [0.0, 1.0 / spread, 2.0 / spread].map(|x| x as f32));
        assert_eq!(coefficients(Comparison::PerSequence, &[2.0], &[5.0]), [-1.0]);
        assert_eq!(coefficients(Comparison::PerSequence, &[2.0], &[2.0]), [0.0]);
        assert_eq!(coefficients(Comparison::TwoSided, &[2.0, 1.0], &[5.0, 0.5]), [-3.0, 0.5]);
        assert_eq!(coefficients(Comparison::OneSided, &[2.0, 1.0], &[3.0, 3.0]), [-1.0, -2.0]);
        let scaled = |c| coefficients(c, &[2.0, 1.0], &[3.0, 3.0]);
        assert_eq!(
            scaled(Comparison::OneSidedScaled),
            [-1.0 / (0.5 + 1e-8), -2.0 / (0.5 + 1e-8)].map(|x: f64| x as f32)
        );
        let spread = 0.6875f64.sqrt() + 1e-8;
        assert_eq!(scaled(Comparison::TwoSidedScaled), [-1.0 / spread, -2.0 / spread].map(|x| x as f32));
        assert_eq!(coefficients(Comparison::OneSidedScaled, &[2.0], &[3.0]), [-1.0]);
    }

    #[test]
    fn probes_of_a_direction_are_means_over_rows() {
        let (plus, minus) = sides(Comparison::TwoSided, 1, &[1.0, 4.0, 2.0, 6.0], &[3.0, 1.0]);
        assert_eq!((plus, minus), (vec![7.0 / 4.0], vec![3.0]));
        let (plus, still) = sides(Comparison::OneSided, 2, &[1.0, 4.0, 0.0, 4.0, 2.0, 6.0], &[3.0, 1.0]);
        assert_eq!((plus, still), (vec![7.0 / 4.0, 1.0], vec![3.0, 3.0]));
        assert_eq!(sides(Comparison::PerSequence, 1, &[1.0, 4.0], &[3.0]), (vec![1.0], vec![4.0]));
        let losses = [1.0, 5.0, 2.0, 4.0, 1.0, 2.0, 3.0, 5.0];
        let (plus, minus) = sides(Comparison::PerSequence, 2, &losses, &[3.0, 1.0, 1.0, 1.0]);
        assert_eq!((plus, minus), (vec![2.0, 3.0], vec![1.25, 4.0]));
    }
}
