//! Event files that TensorBoard reads: scalars of a run, one record for each step.
//!
//! Invariant: a record is written whole or the write fails; every record carries checksums of its length and of its content.

use super::TrainError;
use super::metrics::StepMetrics;
use crate::files::FileError;
use crc32c::crc32c;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// An event file.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
    /// The clock on the wall when the file began; later times are counted from there, so that they never go back.
    began: f64,
    started: Instant,
}

impl EventFile {
    /// Begins a file of its own in `folder`, beside those of earlier parts of the run.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(folder: &Path) -> Result<EventFile, TrainError> {
        let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64();
        let name = |n: u32| folder.join(format!("events.out.tfevents.{:010.0}.chimera.{n}", began.floor()));
        let path = (0..).map(name).find(|p| !p.exists()).unwrap_or_else(|| name(0));
        let error = |source| FileError::io(&path, "write", source);
        fs::create_dir_all(folder).map_err(error)?;
        let file = File::options().create_new(true).append(true).open(&path).map_err(error)?;
        let mut out = EventFile { path, file, began, started: Instant::now() };
        let mut event = out.event(None);
        bytes(&mut event, 3, b"brain.Event:2");
        out.write(&event)?;
        Ok(out)
    }

    /// Adds the scalars of a step.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn add(&mut self, m: &StepMetrics) -> Result<(), TrainError> {
        let mut summary = vec![];
        let mut put = |tag: &str, x: f64| {
            let mut value = vec![];
            bytes(&mut value, 1, tag.as_bytes());
            value.push(2 << 3 | 5);
            value.extend((x as f32).to_le_bytes());
            bytes(&mut summary, 1, &value);
        };
        put("loss/nats_per_token", m.loss);
        put("loss/moving_average", m.ema);
        if let Some(bits) = m.bits_per_byte {
            put("loss/bits_per_byte", bits);
        }
        if let (true, Some(v)) = (m.validated, m.validation) {
            put("validation/nats_per_token", v.nats_per_token);
            if let Some(bits) = v.bits_per_byte {
                put("validation/bits_per_byte", bits);
            }
            if let Some(p) = v.preferred {
                put("validation/reward_margin", p.margin);
                put("validation/preferred", p.accuracy);
            }
        }
        put("speed/data_tokens_per_second", m.data_rate());
        put("speed/forward_tokens_per_second", m.forward_rate());
        if let Some(codes) = m.codes {
            put("quantiser/bits", codes.bits());
            put("quantiser/zeros", codes.shares[1]);
            put("quantiser/threshold", codes.threshold);
        }
        if let Some(a) = m.agreement {
            put("agreement/psi", a.psi);
            put("agreement/kappa", a.kappa);
            put("agreement/noise", a.noise);
            put("agreement/gate", a.gate);
        }
        match m.norm {
            Some(norm) => put("estimator/gradient_norm", norm),
            None => put("estimator/spread", m.spread),
        }
        m.health.rows().into_iter().for_each(|(_, tag, x)| put(tag, x));
        put("learning_rate", m.lr);
        put("memory_megabytes", m.memory as f64 / f64::from(1 << 20));
        let mut event = self.event(Some(m.step));
        bytes(&mut event, 5, &summary);
        self.write(&event)
    }

    /// The beginning of an event: time and step.
    fn event(&self, step: Option<u64>) -> Vec<u8> {
        let mut out = vec![1 << 3 | 1];
        out.extend((self.began + self.started.elapsed().as_secs_f64()).to_le_bytes());
        if let Some(step) = step {
            out.push(2 << 3);
            varint(&mut out, step);
        }
        out
    }

    fn write(&mut self, event: &[u8]) -> Result<(), TrainError> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked(&length).to_le_bytes());
        record.extend(event);
        record.extend(masked(event).to_le_bytes());
        Ok(self.file.write_all(&record).map_err(|source| FileError::io(&self.path, "write", source))?)
    }
}

/// The checksum of records: a rotated and shifted CRC-32C.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// A field of bytes, a text or a message.
fn bytes(out: &mut Vec<u8>, field: u8, content: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

fn varint(out: &mut Vec<u8>, mut x: u64) {
    while x >= 0x80 {
        out.push(x as u8 | 0x80);
        x >>= 7;
    }
    out.push(x as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::health::Health;
    use crate::train::metrics::Validation;

    fn metrics(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            steps: None,
            share: 0.5,
            loss: 3.5,
            bits_per_byte: Some(5.0),
            ema: 3.25,
            spread: 0.125,
            health: Health::default(),
            norm: None,
            agreement: None,
            codes: None,
            validation: Some(Validation { nats_per_token: 3.75, bits_per_byte: Some(5.5), preferred: None }),
            validated: step == 300,
            position: 640,
            data_tokens: 64,
            forward_tokens: 128,
            dt: Duration::from_millis(500),
            seconds: 9.0,
            lr: 0.25,
            seq: 16,
            memory: 3 << 20,
            eta: Duration::ZERO,
        }
    }

    /// Number, wire type and value of every field of a message, by the rules of protocol buffers.
    fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn number(at: &mut &[u8]) -> u64 {
            let (mut x, mut shift) = (0, 0);
            loop {
                let (&byte, rest) = at.split_first().expect("a whole number");
                *at = rest;
                x |= u64::from(byte & 0x7F) << shift;
                shift += 7;
                if byte < 0x80 {
                    return x;
                }
            }
        }
        let mut out = vec![];
        while !message.is_empty() {
            let key = number(&mut message);
            let size = match key & 7 {
                0 => {
                    out.push((key >> 3, number(&mut message).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => number(&mut message) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            let (value, rest) = message.split_at(size);
            out.push((key >> 3, value.to_vec()));
            message = rest;
        }
        out
    }

    #[test]
    fn records_are_those_of_the_format() {
        // The checksums of the record that holds "abc", from the reference implementation's definition.
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(masked(b"123456789"), 0xE306_9283u32.rotate_right(15).wrapping_add(0xA282_EAD8));
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = EventFile::create(folder.path()).expect("created");
        [1, 300].iter().for_each(|&step| file.add(&metrics(step)).expect("written"));
        assert!(EventFile::create(folder.path()).expect("another part").path != file.path);
        let content = fs::read(&file.path).expect("read");
        let (mut at, mut events) = (&content[..], vec![]);
        while !at.is_empty() {
            let size = u64::from_le_bytes(at[..8].try_into().expect("8 bytes")) as usize;
            assert_eq!(masked(&at[..8]).to_le_bytes(), at[8..12]);
            assert_eq!(masked(&at[12..12 + size]).to_le_bytes(), at[12 + size..16 + size]);
            events.push(fields(&at[12..12 + size]));
            at = &at[16 + size..];
        }
        assert_eq!(events.len(), 3);
        assert_eq!(events[0][1], (3, b"brain.Event:2".to_vec()));
        let times: Vec<f64> =
            events.iter().map(|e| f64::from_le_bytes(e[0].1[..].try_into().expect("a time"))).collect();
        assert!(events.iter().all(|e| e[0].0 == 1) && times.is_sorted() && times[0] > 1e9, "{times:?}");
        assert_eq!(events[2][1], (2, 300u64.to_le_bytes().to_vec()));
        let values: Vec<(String, f32)> = fields(&events[2][2].1)
            .iter()
            .map(|(_, value)| {
                let value = fields(value);
                assert_eq!((value[0].0, value[1].0), (1, 2));
                let tag = String::from_utf8(value[0].1.clone()).expect("a tag");
                (tag, f32::from_le_bytes(value[1].1[..].try_into().expect("a number")))
            })
            .collect();
        let of = |tag: &str| values.iter().find(|v| v.0 == tag).map(|v| v.1);
        assert_eq!(of("loss/bits_per_byte"), Some(5.0));
        assert_eq!(of("validation/bits_per_byte"), Some(5.5));
        assert_eq!((of("speed/data_tokens_per_second"), of("memory_megabytes")), (Some(128.0), Some(3.0)));
        assert_eq!(fields(&events[1][2].1).len() + 2, values.len(), "no validation where none was made");
    }
}
