//! What a run reports of itself: one line for people, one line of JSON for programs.
//!
//! Invariant: tokens of data and tokens of forward passes are never mixed; rates of both are reported apart.

use super::TrainError;
use super::agreement::Agreement;
use super::health::Health;
use super::quantiser::Codes;
use crate::files::FileError;
use crate::files::atomic::write_atomic;
use serde_json::{Map, Value, json};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Weight of the newest loss in the moving average.
const EMA: f64 = 0.05;

/// The next value of the moving average of the loss.
pub fn moving_average(before: Option<f64>, loss: f64) -> f64 {
    before.map_or(loss, |ema| ema + EMA * (loss - ema))
}

/// Loss on held-out data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Validation {
    /// Nats per token.
    pub nats_per_token: f64,
    /// Bits per byte of text; nothing when the tokens stand for no bytes.
    pub bits_per_byte: Option<f64>,
    /// How answers are told apart, where pairs of them are compared; the loss is then that of a pair.
    pub preferred: Option<Preferred>,
}

/// How the chosen answers of held-out pairs compare with the rejected ones (semantics 12.3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preferred {
    /// Mean difference of rewards: `beta` times what the log-probability of an answer has gained on the reference.
    pub margin: f64,
    /// Share of pairs whose chosen answer has the greater reward; ties count half.
    pub accuracy: f64,
}

/// The state of a run behind one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMetrics {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run; nothing when time alone ends it.
    pub steps: Option<u64>,
    /// Share of the run that is over.
    pub share: f64,
    /// Mean loss of the step over both signs of all probes, nats per token.
    pub loss: f64,
    /// The same in bits per byte of the predicted text; nothing when its tokens stand for no bytes.
    pub bits_per_byte: Option<f64>,
    /// Moving average of the loss.
    pub ema: f64,
    /// Root mean square of the differences between both signs of the probes, nats per token; 0 along a gradient.
    pub spread: f64,
    /// What else is known of the estimate.
    pub health: Health,
    /// Norm of the gradient before it is limited, where the step goes along one.
    pub norm: Option<f64>,
    /// What the agreement of gradients does, where the rule goes by it and the step was measured.
    pub agreement: Option<Agreement>,
    /// Codes of the ternary weights, where their quantiser is dynamic and the step was measured.
    pub codes: Option<Codes>,
    /// Latest measurement on held-out data.
    pub validation: Option<Validation>,
    /// Whether the measurement was made behind this step.
    pub validated: bool,
    /// Position in the data behind the step, in tokens and what fills rows up.
    pub position: u64,
    /// Tokens of data in the step.
    pub data_tokens: u64,
    /// Tokens that went through the model in the step: one pass for each sign and direction.
    pub forward_tokens: u64,
    /// Duration of the step, without validation.
    pub dt: Duration,
    /// Time spent in steps so far, measuring and saving included.
    pub seconds: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Length of a row.
    pub seq: usize,
    /// Resident memory of the process in bytes.
    pub memory: u64,
    /// Estimated time to the end.
    pub eta: Duration,
}

impl StepMetrics {
    /// Tokens of data a second.
    pub fn data_rate(&self) -> f64 {
        self.data_tokens as f64 / self.dt.as_secs_f64().max(1e-9)
    }

    /// Tokens through the model a second.
    pub fn forward_rate(&self) -> f64 {
        self.forward_tokens as f64 / self.dt.as_secs_f64().max(1e-9)
    }

    /// One line of JSON without its end. Rates are tokens a second, times seconds, memory bytes; losses nats per token.
    pub fn to_json(&self) -> String {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.into(), value);
        put("step", json!(self.step));
        put("steps", json!(self.steps));
        put("share", json!(self.share));
        put("loss", json!(self.loss));
        put("bits_per_byte", json!(self.bits_per_byte));
        put("ema", json!(self.ema));
        match self.norm {
            Some(norm) => put("gradient_norm", json!(norm)),
            None => put("spread", json!(self.spread)),
        };
        if let Some(codes) = &self.codes {
            put("quantiser", codes.to_json());
        }
        if let Some(agreement) = &self.agreement {
            put("agreement", agreement.to_json());
        }
        for (key, _, x) in self.health.rows() {
            put(key, json!(x));
        }
        if let (true, Some(v)) = (self.validated, self.validation) {
            put("val", json!(v.nats_per_token));
            put("val_bits_per_byte", json!(v.bits_per_byte));
            if let Some(p) = v.preferred {
                put("val_margin", json!(p.margin));
                put("val_accuracy", json!(p.accuracy));
            }
        }
        put("position", json!(self.position));
        put("data_tokens", json!(self.data_tokens));
        put("forward_tokens", json!(self.forward_tokens));
        put("tokens_per_second", json!(self.data_rate().round()));
        put("forward_tokens_per_second", json!(self.forward_rate().round()));
        put("dt", json!(self.dt.as_secs_f64()));
        put("seconds", json!(self.seconds));
        put("lr", json!(self.lr));
        put("seq", json!(self.seq));
        put("memory", json!(self.memory));
        put("eta", json!(self.eta.as_secs_f64().round()));
        Value::Object(out).to_string()
    }
}

/// The JSON lines of a run, one for each step.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// The name of the file in the folder of a run.
    pub const NAME: &str = "metrics.jsonl";

    /// Opens the log in `folder` for what follows `step`: lines of later steps, and lines that are damaged, are removed.
    ///
    /// # Errors
    /// When the folder or the file cannot be read or written.
    pub fn open(folder: &Path, step: u64) -> Result<Log, TrainError> {
        let path = folder.join(Log::NAME);
        let error = |source| TrainError::Io { path: Some(path.clone()), source };
        fs::create_dir_all(folder).map_err(error)?;
        let mut kept = String::new();
        match File::open(&path) {
            Ok(old) => {
                for line in BufReader::new(old).lines() {
                    let line = line.map_err(error)?;
                    let number = |v: Value| v.get("step")?.as_u64();
                    if serde_json::from_str(&line).ok().and_then(number).is_some_and(|s| s <= step) {
                        kept += &line;
                        kept.push('\n');
                    }
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(error(e)),
        }
        write_atomic(&path, |w| w.write_all(kept.as_bytes()))?;
        let file = File::options().append(true).open(&path).map_err(error)?;
        Ok(Log { path, file })
    }

    /// Removes the lines of steps behind `step`, to which the run went back.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn go_back(&mut self, step: u64) -> Result<(), TrainError> {
        *self = Log::open(self.path.parent().unwrap_or(Path::new(".")), step)?;
        Ok(())
    }

    /// Adds one line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&mut self, metrics: &StepMetrics) -> Result<(), TrainError> {
        let line = metrics.to_json() + "\n";
        Ok(self.file.write_all(line.as_bytes()).map_err(|source| FileError::io(&self.path, "write", source))?)
    }
}

/// `step 120/5000 2.4% | loss 3.412 (ema 3.50, 4.92 bits/byte) val 3.61 | tok/s 1843 (fwd 3686) | dt 278ms | lr 1e-4 | seq 128 | mem 412M | eta 22m10s`
impl fmt::Display for StepMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.step)?;
        if let Some(steps) = self.steps {
            write!(f, "/{steps}")?;
        }
        write!(f, " {:.1}% | loss {:.3} (ema {:.2}", 100.0 * self.share, self.loss, self.ema)?;
        if let Some(bits) = self.bits_per_byte {
            write!(f, ", {bits:.2} bits/byte")?;
        }
        f.write_str(")")?;
        if let Some(v) = self.validation {
            write!(f, " val {:.2}", v.nats_per_token)?;
            if let Some(bits) = v.bits_per_byte {
                write!(f, " ({bits:.2} bits/byte)")?;
            }
            if let Some(p) = v.preferred {
                write!(f, " (margin {:.3}, {:.0}% preferred)", p.margin, 100.0 * p.accuracy)?;
            }
        }
        write!(f, " | tok/s {:.0} (fwd {:.0}) | dt {}", self.data_rate(), self.forward_rate(), Short(self.dt))?;
        write!(f, " | lr {} | seq {}", Rate(self.lr), self.seq)?;
        if let Some(flips) = self.health.flips {
            write!(f, " | flips {:.2}%", 100.0 * flips)?;
        }
        if let Some(cosine) = self.health.cosine {
            write!(f, " | cos {cosine:.3}")?;
        }
        write!(f, " | mem {} | eta {}", Bytes(self.memory), Short(self.eta))
    }
}

/// A learning rate with at most three digits: `1e-4`, `3.33e-5`.
struct Rate(f64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.2e}", self.0);
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
        write!(f, "{digits}e{exponent}")
    }
}

/// A number of bytes in the largest fitting unit: `412M`.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n < 10 << 20 => write!(f, "{}K", n >> 10),
            n if n < 10 << 30 => write!(f, "{}M", n >> 20),
            n => write!(f, "{:.1}G", n as f64 / f64::from(1u32 << 30)),
        }
    }
}

/// A duration in its two largest units: `278ms`, `5.2s`, `22m10s`, `3h05m`, `2d04h`.
pub struct Short(pub Duration);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (s, exact) = (self.0.as_secs(), self.0.as_secs_f64());
        match s {
            0 => write!(f, "{:.0}ms", exact * 1e3),
            1..10 => write!(f, "{exact:.1}s"),
            10..60 => write!(f, "{s}s"),
            60..3600 => write!(f, "{}m{:02}s", s / 60, s % 60),
            3600..86400 => write!(f, "{}h{:02}m", s / 3600, s / 60 % 60),
            _ => write!(f, "{}d{:02}h", s / 86400, s / 3600 % 24),
        }
    }
}

/// Resident memory of this process in bytes, where the system tells it.
pub fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// The most resident memory that this process has had so far in bytes, where the system tells it.
pub fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// Lets [`peak_bytes`] begin anew with what is resident now, where the system can.
pub fn forget_peak() {
    // Without it the peak is that of the whole process, which is right for one run.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> StepMetrics {
        StepMetrics {
            step: 120,
            steps: Some(5000),
            share: 0.024,
            loss: 3.4123,
            bits_per_byte: None,
            ema: 3.5,
            spread: 0.02,
            health: Health::default(),
            norm: None,
            agreement: None,
            codes: None,
            validation: None,
            validated: false,
            position: 5120,
            data_tokens: 512,
            forward_tokens: 1024,
            dt: Duration::from_millis(278),
            seconds: 33.5,
            lr: 1e-4,
            seq: 128,
            memory: 412 << 20,
            eta: Duration::from_secs(1330),
        }
    }

    #[test]
    fn the_line_is_the_documented_one() {
        let mut m = metrics();
        assert_eq!(
            m.to_string(),
            "step 120/5000 2.4% | loss 3.412 (ema 3.50) | tok/s 1842 (fwd 3683) | dt 278ms | lr 1e-4 | seq 128 | mem 412M | eta 22m10s"
        );
        m.validation = Some(Validation { nats_per_token: 3.61, bits_per_byte: Some(5.2082), preferred: None });
        (m.steps, m.lr, m.bits_per_byte) = (None, 3.333e-5, Some(4.9229));
        assert_eq!(
            m.to_string(),
            "step 120 2.4% | loss 3.412 (ema 3.50, 4.92 bits/byte) val 3.61 (5.21 bits/byte) | tok/s 1842 (fwd 3683) | dt 278ms | lr 3.33e-5 | seq 128 | mem 412M | eta 22m10s"
        );
    }

    #[test]
    fn health_shows_where_it_was_measured() {
        let health = Health { mean: Some(0.5), flips: Some(0.0123), cosine: Some(0.25), ..Health::default() };
        let m = StepMetrics { health, ..metrics() };
        assert!(m.to_string().contains(" | seq 128 | flips 1.23% | cos 0.250 | mem 412M"), "{m}");
        let value: Value = serde_json::from_str(&m.to_json()).expect("JSON");
        let found = ["scalar_mean", "flips", "cosine"].map(|key| value[key].as_f64());
        assert_eq!((found, value.get("scalar_deviation")), ([Some(0.5), Some(0.0123), Some(0.25)], None));
    }

    #[test]
    fn json_has_validation_only_where_it_was_measured() {
        let mut m = metrics();
        m.validation = Some(Validation { nats_per_token: 3.61, bits_per_byte: None, preferred: None });
        let parse = |m: &StepMetrics| serde_json::from_str::<Value>(&m.to_json()).expect("JSON");
        assert!(parse(&m).get("val").is_none());
        m.validated = true;
        let value = parse(&m);
        assert_eq!((value["val"].as_f64(), value["val_bits_per_byte"].is_null()), (Some(3.61), true));
        assert!(value.get("val_margin").is_none());
        let preferred = Some(Preferred { margin: 0.25, accuracy: 0.625 });
        m.validation = Some(Validation { nats_per_token: 0.61, bits_per_byte: None, preferred });
        let value = parse(&m);
        assert_eq!((value["val_margin"].as_f64(), value["val_accuracy"].as_f64()), (Some(0.25), Some(0.625)));
        assert!(m.to_string().contains("val 0.61 (margin 0.250, 62% preferred) |"), "{m}");
        assert_eq!((value["step"].as_u64(), value["loss"].as_f64()), (Some(120), Some(3.4123)));
        assert_eq!(value["forward_tokens_per_second"].as_f64(), Some(3683.0));
        assert!(!m.to_json().contains('\n'));
    }

    #[test]
    fn a_log_goes_on_behind_its_checkpoint() {
        let folder = tempfile::tempdir().expect("folder");
        let at = folder.path().join("run");
        let add = |log: &mut Log, step| log.add(&StepMetrics { step, ..metrics() }).expect("written");
        let mut log = Log::open(&at, 0).expect("opened");
        (1..=5).for_each(|step| add(&mut log, step));
        log.file.write_all(b"{\"step\": 6, \"lo").expect("half a line");
        let mut log = Log::open(&at, 4).expect("opened");
        log.go_back(3).expect("opened");
        add(&mut log, 4);
        let text = fs::read_to_string(at.join(Log::NAME)).expect("read");
        let step = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["step"].as_u64();
        assert_eq!(text.lines().map(step).collect::<Vec<_>>(), [1, 2, 3, 4].map(Some));
    }

    #[test]
    fn durations_and_sizes_are_short() {
        let shown = |ms: u64| Short(Duration::from_millis(ms)).to_string();
        assert_eq!([0, 999, 5200, 59_999, 61_000].map(shown), ["0ms", "999ms", "5.2s", "59s", "1m01s"]);
        assert_eq!([11_100_000, 187_200_000].map(shown), ["3h05m", "2d04h"]);
        assert_eq!([3 << 10, 412 << 20, 12 << 30].map(|n| Bytes(n).to_string()), ["3K", "412M", "12.0G"]);
        assert_eq!([0.01, 1.0, 0.0].map(|x| Rate(x).to_string()), ["1e-2", "1e0", "0e0"]);
    }

    #[test]
    fn averages_start_at_the_first_loss() {
        assert_eq!(moving_average(None, 4.0), 4.0);
        assert!((moving_average(Some(4.0), 2.0) - 3.9).abs() < 1e-12);
    }
}
