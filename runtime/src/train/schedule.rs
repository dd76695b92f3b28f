//! Learning rate over a run.
//!
//! Invariant: a rate is a function of the step and of the share of the run that is over; nothing is carried from step to step.

use std::f64::consts::PI;

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// The peak to the end.
    Constant,
    /// Half a cosine from the peak to the floor.
    Cosine,
    /// A line from the peak to zero, not below the floor; in the second half a third lower and without weight decay.
    TwoStage,
}

/// Learning rate of the second stage, as a share of what the first would have had.
const SECOND_STAGE: f64 = 2.0 / 3.0;

impl Decay {
    /// All, with their names on command lines and in checkpoints.
    pub const ALL: [(Decay, &'static str); 3] =
        [(Decay::Constant, "constant"), (Decay::Cosine, "cosine"), (Decay::TwoStage, "two-stage")];

    /// The name.
    pub fn name(self) -> &'static str {
        Decay::ALL[self as usize].1
    }
}

impl std::str::FromStr for Decay {
    type Err = String;

    fn from_str(name: &str) -> Result<Decay, String> {
        let found = Decay::ALL.iter().find(|d| d.1 == name);
        found.map(|d| d.0).ok_or_else(|| format!("found {name:?}, expected constant, cosine or two-stage"))
    }
}

/// A learning rate schedule (semantics 12.1): linear warm-up, then constant, cosine, or the two stages of BitNet practice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Greatest rate.
    pub peak: f64,
    /// Steps of the warm-up; step `s` of it has `peak * (s + 1) / warmup`.
    pub warmup: u64,
    /// What follows.
    pub decay: Decay,
    /// Last rate of the decay, as a share of the peak.
    pub floor: f64,
}

impl Schedule {
    /// The rate of `step`, counted from 0, in a run of `steps` steps.
    pub fn at_step(&self, step: u64, steps: u64) -> f64 {
        let over = step.saturating_sub(self.warmup) as f64 / steps.saturating_sub(self.warmup).max(1) as f64;
        self.at(step, over)
    }

    /// The rate of `step` when the share `over` of what follows the warm-up is over.
    pub fn at(&self, step: u64, over: f64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Cosine => {
                self.peak * (self.floor + (1.0 - self.floor) * 0.5 * (1.0 + (PI * over.clamp(0.0, 1.0)).cos()))
            }
            Decay::TwoStage => {
                let stage = if over < 0.5 { 1.0 } else { SECOND_STAGE };
                self.peak * ((1.0 - over.clamp(0.0, 1.0)) * stage).max(self.floor)
            }
        }
    }

    /// The share of the weight decay that counts when the share `over` of what follows the warm-up is over.
    pub fn decay_share(&self, over: f64) -> f64 {
        if self.decay == Decay::TwoStage && over >= 0.5 { 0.0 } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::safetensors::SafeTensors;
    use std::path::Path;

    #[test]
    fn cosine_matches_the_golden_file() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/schedules.safetensors");
        let file = SafeTensors::open(Path::new(path)).expect("the committed golden file opens");
        let want = file.require("out.cosine").expect("rates").to_f32();
        let schedule = Schedule { peak: 3e-4, warmup: 5, decay: Decay::Cosine, floor: 0.1 };
        for (step, want) in want.iter().enumerate() {
            let found = schedule.at_step(step as u64, 40) as f32;
            assert!((found - want).abs() < 1e-9, "step {step}: {found} is not {want}");
        }
        assert!(want.len() > 40);
    }

    #[test]
    fn the_second_stage_is_lower_and_without_decay() {
        let schedule = Schedule { peak: 1.0, warmup: 0, decay: Decay::TwoStage, floor: 0.1 };
        let near = |step: u64, want: f64| assert!((schedule.at_step(step, 100) - want).abs() < 1e-12, "step {step}");
        for (step, want) in [(0, 1.0), (25, 0.75), (49, 0.51), (50, 1.0 / 3.0), (75, 1.0 / 6.0), (99, 0.1)] {
            near(step, want);
        }
        assert_eq!([0.0, 0.49, 0.5, 1.0].map(|over| schedule.decay_share(over)), [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(Schedule { decay: Decay::Cosine, ..schedule }.decay_share(0.9), 1.0);
    }

    #[test]
    fn constant_follows_its_warm_up() {
        let schedule = Schedule { peak: 2.0, warmup: 4, decay: Decay::Constant, floor: 0.0 };
        let rates: Vec<f64> = (0..6).map(|s| schedule.at_step(s, 6)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]);
        assert!(Decay::ALL.iter().all(|(d, name)| name.parse() == Ok(*d) && d.name() == *name));
        assert!("linear".parse::<Decay>().is_err());
    }
}
