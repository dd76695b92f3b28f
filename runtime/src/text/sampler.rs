//! From logits to the next token: repetition penalty, temperature, top-k, top-p, draw.
//!
//! The uniform number comes from outside, indexed by absolute position: the same logits, context and number always give
//! the same token, however the positions were computed. Ties go to the lowest id everywhere.

use std::cmp::Ordering;
use std::fmt;

/// How to sample. The default is the configuration's: 0.7, top-p 0.92, penalty 1.08.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Keep this many most likely tokens.
    pub top_k: Option<usize>,
    /// Keep the smallest set of most likely tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Positive logits of tokens in the context are divided by this, negative ones multiplied.
    pub repetition_penalty: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.7, top_k: None, top_p: 0.92, repetition_penalty: 1.08 }
    }
}

/// Why no token could be drawn.
#[derive(Clone, Debug, PartialEq)]
pub enum SampleError {
    /// A setting outside its range.
    BadSetting {
        /// Name on the command line.
        name: &'static str,
        /// Value found.
        found: f64,
        /// Values that would do.
        expected: &'static str,
    },
    /// A logit that is NaN or plus infinity.
    BadLogit {
        /// Token id.
        id: usize,
        /// Its logit.
        value: f32,
    },
    /// No token is left to choose from.
    AllMasked,
    /// A context token outside the vocabulary.
    BadContext {
        /// The token.
        id: u32,
        /// Size of the vocabulary.
        size: usize,
    },
}

impl fmt::Display for SampleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadSetting { name, found, expected } => {
                write!(f, "{name} is {found}, expected {expected}")
            }
            Self::BadLogit { id, value } => write!(
                f,
                "the logit of token {id} is {value}, expected a finite number; the model's weights are damaged or its \
                 training diverged"
            ),
            Self::AllMasked => write!(f, "no token can be drawn: all logits are masked"),
            Self::BadContext { id, size } => {
                write!(f, "context token {id} is outside the vocabulary of {size} tokens")
            }
        }
    }
}

impl std::error::Error for SampleError {}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    score: f32,
    weight: f64,
}

/// Highest score first, then lowest id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// Draws tokens; keeps its buffers between draws.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Sampling,
    scores: Vec<f32>,
    context: Vec<u32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Checks the settings: temperature >= 0, top-k >= 1, 0 < top-p <= 1, penalty > 0, all finite.
    pub fn new(settings: Sampling) -> Result<Self, SampleError> {
        let Sampling { temperature, top_k, top_p, repetition_penalty } = settings;
        let check = |fine: bool, name, found: f64, expected| match fine {
            true => Ok(()),
            false => Err(SampleError::BadSetting { name, found, expected }),
        };
        check(temperature.is_finite() && temperature >= 0.0, "temperature", temperature.into(), "0 or more")?;
        check(top_k != Some(0), "top-k", 0.0, "1 or more")?;
        check(top_p > 0.0 && top_p <= 1.0, "top-p", top_p.into(), "a number above 0, at most 1")?;
        let fine = repetition_penalty.is_finite() && repetition_penalty > 0.0;
        check(fine, "repetition penalty", repetition_penalty.into(), "a number above 0")?;
        Ok(Self { settings, scores: Vec::new(), context: Vec::new(), candidates: Vec::new() })
    }

    /// Draws from `logits` `[vocabulary]`, where minus infinity masks a token. `context` holds the tokens that the
    /// repetition penalty looks at; `uniform` lies in `[0, 1)`.
    pub fn draw(&mut self, logits: &[f32], context: &[u32], uniform: f32) -> Result<u32, SampleError> {
        assert!((0.0..1.0).contains(&uniform), "the uniform number lies in [0, 1)");
        if let Some((id, &value)) = logits.iter().enumerate().find(|(_, z)| z.is_nan() || **z == f32::INFINITY) {
            return Err(SampleError::BadLogit { id, value });
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        self.penalise(context)?;
        let (best, top) = self.argmax()?;
        if self.settings.temperature == 0.0 {
            return Ok(best);
        }
        self.candidates.clear();
        let unmasked = self.scores.iter().zip(0u32..).filter(|(z, _)| **z > f32::NEG_INFINITY);
        self.candidates.extend(unmasked.map(|(&score, id)| Candidate { id, score, weight: 0.0 }));
        self.keep_top_k();
        let temperature = f64::from(self.settings.temperature);
        for c in &mut self.candidates {
            c.weight = ((f64::from(c.score) - f64::from(top)) / temperature).exp();
        }
        self.keep_top_p();
        Ok(self.pick(f64::from(uniform)))
    }

    fn penalise(&mut self, context: &[u32]) -> Result<(), SampleError> {
        let penalty = self.settings.repetition_penalty;
        if penalty == 1.0 {
            return Ok(());
        }
        self.context.clear();
        self.context.extend_from_slice(context);
        self.context.sort_unstable();
        self.context.dedup();
        let size = self.scores.len();
        for &id in &self.context {
            let z = self.scores.get_mut(id as usize).ok_or(SampleError::BadContext { id, size })?;
            *z = (if *z > 0.0 { *z / penalty } else { *z * penalty }).min(f32::MAX);
        }
        Ok(())
    }

    fn argmax(&self) -> Result<(u32, f32), SampleError> {
        let mut best = (0, f32::NEG_INFINITY);
        for (&z, id) in self.scores.iter().zip(0..) {
            if z > best.1 {
                best = (id, z);
            }
        }
        if best.1 == f32::NEG_INFINITY { Err(SampleError::AllMasked) } else { Ok(best) }
    }

    fn keep_top_k(&mut self) {
        if let Some(k) = self.settings.top_k.filter(|&k| k < self.candidates.len()) {
            self.candidates.select_nth_unstable_by(k - 1, by_rank);
            self.candidates.truncate(k);
            self.candidates.sort_unstable_by_key(|c| c.id);
        }
    }

    /// Expects and leaves the candidates in ascending order of id.
    fn keep_top_p(&mut self) {
        let p = f64::from(self.settings.top_p);
        if p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        // All candidates below this weight together have less than half of 1 - p, so none of them is needed.
        let negligible = 0.5 * (1.0 - p) * total / self.candidates.len() as f64;
        self.candidates.retain(|c| c.weight >= negligible);
        let (mut ranked, mut step, mut mass) = (0, 64, 0.0);
        'grow: while ranked < self.candidates.len() {
            let rest = &mut self.candidates[ranked..];
            let part = step.min(rest.len());
            if part < rest.len() {
                rest.select_nth_unstable_by(part - 1, by_rank);
            }
            rest[..part].sort_unstable_by(by_rank);
            for c in &rest[..part] {
                mass += c.weight;
                ranked += 1;
                if mass >= p * total {
                    break 'grow;
                }
            }
            step *= 4;
        }
        self.candidates.truncate(ranked);
        self.candidates.sort_unstable_by_key(|c| c.id);
    }

    /// Inverse of the cumulative sum in ascending order of id.
    fn pick(&self, uniform: f64) -> u32 {
        let target = uniform * self.candidates.iter().map(|c| c.weight).sum::<f64>();
        let mut sum = 0.0;
        for c in &self.candidates {
            sum += c.weight;
            if sum > target {
                return c.id;
            }
        }
        let last = self.candidates.iter().rfind(|c| c.weight > 0.0);
        last.expect("the most likely candidate has weight one").id
    }
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
