//! The journal of a run: one checksummed record for each step, from which the weights of any step follow without a forward pass.
//!
//! Invariant: a record is in the file before the next step begins; what a reader accepts passed its checksum, and records behind damage
//! are found again but never joined to those before it.

use super::TrainError;
use super::paradigms::Stage;
use crate::files::FileError;
use crate::files::atomic::write_atomic;
use crc32c::{crc32c, crc32c_append};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The name of the file in the folder of a run.
pub const NAME: &str = "journal.bin";
/// First bytes of a journal.
pub const MAGIC: [u8; 8] = *b"CHIMJRNL";
/// Version of the format.
pub const VERSION: u32 = 1;
/// Bytes in front of the header: magic, version, length.
const PRELUDE: usize = 16;
/// First bytes of a record.
pub const MARK: [u8; 3] = [0xC5, 0x4A, 0xE1];
/// Bytes of a record in front of its payload: mark, kind, length; and behind it: checksum.
const FRONT: usize = 8;
const BACK: usize = 4;
/// Most bytes of a header and of a payload.
const MAX_HEADER: usize = 1 << 16;
const MAX_PAYLOAD: usize = 1 << 20;
/// Records reach the disk, and not the system alone, at least so often.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// What ties a journal to its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Steps done where it begins; there is a checkpoint behind them.
    pub from: u64,
    /// Checksum of the canonical configuration.
    pub config: u32,
    /// What identifies the training data.
    pub data: String,
}

impl Header {
    /// The header of a run of `config` on `data` that begins behind `from` steps.
    pub fn new(from: u64, config: &str, data: &str) -> Header {
        Header { from, config: crc32c(config.as_bytes()), data: data.to_owned() }
    }

    /// The first bytes of a journal.
    pub fn to_bytes(&self) -> Vec<u8> {
        let text = json!({ "from": self.from, "config": self.config, "data": self.data }).to_string();
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
        out.extend(crc32c(&out).to_le_bytes());
        out
    }
}

/// What a step did to the weights, and where it left the run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Times that the run went back to a checkpoint before.
    pub rollbacks: u32,
    /// Tokens of data used, those of this step included.
    pub position: u64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Mean loss of its probes, nats per token.
    pub loss: f64,
    /// Time spent in steps so far, seconds.
    pub seconds: f64,
    /// The scalars that the update was given: one for each sequence or direction.
    pub c: Vec<f32>,
    /// The loads of all routers that the update was given, one behind the other.
    pub loads: Vec<i32>,
    /// The stage of the run that the step belongs to.
    pub stage: Stage,
}

/// The run went back to a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rollback {
    /// The step, counted from 0, whose loss was the reason.
    pub at: u64,
    /// Steps behind which the checkpoint is.
    pub to: u64,
    /// Tokens of data used: those of the failed step are not used again.
    pub position: u64,
    /// Times that the run went back, this one included.
    pub rollbacks: u32,
    /// The loss that was the reason.
    pub loss: f64,
}

/// One entry of a journal.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A step was done.
    Step(StepRecord),
    /// The run went back.
    Rollback(Rollback),
}

impl Record {
    /// The record as it stands in the file, behind what `out` holds.
    pub fn write(&self, out: &mut Vec<u8>) {
        let begin = out.len();
        out.extend(MARK);
        out.push(u8::from(matches!(self, Record::Rollback(_))));
        out.extend([0; 4]);
        match self {
            Record::Step(s) => {
                [s.step, u64::from(s.rollbacks), s.position].iter().for_each(|&x| put_varint(out, x));
                [s.lr, s.loss, s.seconds].iter().for_each(|x| out.extend(x.to_le_bytes()));
                put_varint(out, s.c.len() as u64);
                s.c.iter().for_each(|x| out.extend(x.to_le_bytes()));
                put_varint(out, s.loads.len() as u64);
                s.loads.iter().for_each(|&x| put_varint(out, u64::from(((x << 1) ^ (x >> 31)) as u32)));
                // The first stage goes without saying.
                if s.stage != Stage::default() {
                    put_varint(out, s.stage.code());
                }
            }
            Record::Rollback(r) => {
                [r.at, r.to, r.position, u64::from(r.rollbacks)].iter().for_each(|&x| put_varint(out, x));
                out.extend(r.loss.to_le_bytes());
            }
        }
        let payload = (out.len() - begin - FRONT) as u32;
        out[begin + 4..begin + FRONT].copy_from_slice(&payload.to_le_bytes());
        let sum = crc32c(&out[begin..]);
        out.extend(sum.to_le_bytes());
    }

    /// The record at the beginning of `bytes` and its length; nothing where there is no sound one.
    pub fn read(bytes: &[u8]) -> Option<(Record, usize)> {
        let front = bytes.get(..FRONT)?;
        let size = u32::from_le_bytes(front[4..FRONT].try_into().ok()?) as usize;
        if front[..3] != MARK || size > MAX_PAYLOAD {
            return None;
        }
        let payload = bytes.get(FRONT..FRONT + size)?;
        let sum = bytes.get(FRONT + size..FRONT + size + BACK)?;
        if crc32c_append(crc32c(front), payload).to_le_bytes() != *sum {
            return None;
        }
        let mut at = Cursor(payload);
        let record = match front[3] {
            0 => Record::Step(at.step()?),
            1 => {
                let [step, to, position, rollbacks] = [at.varint()?, at.varint()?, at.varint()?, at.varint()?];
                let rollbacks = u32::try_from(rollbacks).ok()?;
                Record::Rollback(Rollback { at: step, to, position, rollbacks, loss: at.f64()? })
            }
            _ => return None,
        };
        at.0.is_empty().then_some((record, FRONT + size + BACK))
    }
}

fn put_varint(out: &mut Vec<u8>, mut x: u64) {
    while x >= 0x80 {
        out.push(x as u8 | 0x80);
        x >>= 7;
    }
    out.push(x as u8);
}

/// What is left of a payload.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut x = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            let part = u64::from(byte & 0x7F);
            if part << shift >> shift != part {
                return None;
            }
            x |= part << shift;
            if byte < 0x80 {
                return Some(x);
            }
        }
        None
    }

    fn f64(&mut self) -> Option<f64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(f64::from_le_bytes(*bytes))
    }

    /// A number of things of at least `size` bytes each, all of which must follow.
    fn count(&mut self, size: usize) -> Option<usize> {
        let n = usize::try_from(self.varint()?).ok()?;
        (n <= self.0.len() / size).then_some(n)
    }

    fn step(&mut self) -> Option<StepRecord> {
        let [step, rollbacks, position] = [self.varint()?, self.varint()?, self.varint()?];
        let [lr, loss, seconds] = [self.f64()?, self.f64()?, self.f64()?];
        let n = self.count(4)?;
        let (values, rest) = self.0.split_at(4 * n);
        let c = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        self.0 = rest;
        let n = self.count(1)?;
        let mut loads = Vec::with_capacity(n);
        for _ in 0..n {
            let x = u32::try_from(self.varint()?).ok()?;
            loads.push((x >> 1) as i32 ^ -((x & 1) as i32));
        }
        let rollbacks = u32::try_from(rollbacks).ok()?;
        let stage = match self.0.is_empty() {
            true => Stage::default(),
            false => Stage::of_code(self.varint()?).filter(|&stage| stage != Stage::default())?,
        };
        Some(StepRecord { step, rollbacks, position, lr, loss, seconds, c, loads, stage })
    }
}

/// What is at a place of a journal.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A sound record.
    Record(Record),
    /// Bytes that are no record, with sound ones behind them.
    Damage,
    /// Bytes at the end that are no record: what a killed process or a full disk leaves.
    Torn,
}

/// The items of a journal with the bytes that they take.
#[derive(Clone, Debug)]
pub struct Items<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Iterator for Items<'_> {
    type Item = (Range<usize>, Item);

    fn next(&mut self) -> Option<(Range<usize>, Item)> {
        let begin = self.at;
        let rest = self.bytes.get(begin..).filter(|rest| !rest.is_empty())?;
        let (item, size) = match Record::read(rest) {
            Some((record, size)) => (Item::Record(record), size),
            None => {
                let marked = (1..rest.len()).filter(|&i| rest[i..].starts_with(&MARK));
                match marked.into_iter().find(|&i| Record::read(&rest[i..]).is_some()) {
                    Some(lost) => (Item::Damage, lost),
                    None => (Item::Torn, rest.len()),
                }
            }
        };
        self.at += size;
        Some((begin..self.at, item))
    }
}

/// The header of a journal and its items.
///
/// # Errors
/// What is wrong with the header: found, expected.
pub fn read(bytes: &[u8]) -> Result<(Header, Items<'_>), String> {
    let damaged = || "the header is damaged".to_owned();
    if bytes.get(..8) != Some(&MAGIC[..]) {
        return Err("it does not begin as a journal does".into());
    }
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (version, size) = (word(8).ok_or_else(damaged)?, word(12).ok_or_else(damaged)? as usize);
    if version != VERSION {
        return Err(format!("found version {version}, expected {VERSION}; use the program that wrote it"));
    }
    if size > MAX_HEADER {
        return Err(damaged());
    }
    let end = PRELUDE + size;
    let (head, sum) = (bytes.get(..end).ok_or_else(damaged)?, word(end).ok_or_else(damaged)?);
    if crc32c(head) != sum {
        return Err(damaged());
    }
    let value: Value = serde_json::from_slice(&head[PRELUDE..]).map_err(|_| damaged())?;
    let number = |key: &str| value.get(key).and_then(Value::as_u64);
    let config = number("config").and_then(|x| u32::try_from(x).ok());
    let data = value.get("data").and_then(Value::as_str);
    match (number("from"), config, data) {
        (Some(from), Some(config), Some(data)) => {
            Ok((Header { from, config, data: data.to_owned() }, Items { bytes, at: end + 4 }))
        }
        _ => Err(damaged()),
    }
}

/// Where a gap in a journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Offset of the damage in bytes.
    pub offset: usize,
    /// Sound steps behind it, which cannot be reached.
    pub behind: usize,
}

/// The steps that follow a checkpoint, without those that were taken back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trail {
    /// Steps in ascending order without a gap.
    pub steps: Vec<StepRecord>,
    /// Times that the run went back, where the trail ends.
    pub rollbacks: u32,
    /// The last return that the trail has.
    pub rollback: Option<Rollback>,
    /// Offset behind the last record that belongs to the trail or to what precedes it.
    pub end: usize,
    /// Bytes of an unfinished record at the end.
    pub torn: usize,
    /// What ended the trail early.
    pub gap: Option<Gap>,
}

/// The trail behind the checkpoint of `step` that was written after `rollbacks` returns.
pub fn trail(items: Items<'_>, step: u64, rollbacks: u32) -> Trail {
    let mut out = Trail { rollbacks, end: items.at, ..Trail::default() };
    // Behind damage, whether records are missing that the checkpoint does not contain shows in the next step.
    let mut damage = None;
    for (place, item) in items {
        let reached = step + out.steps.len() as u64;
        if let Some(gap) = &mut out.gap {
            gap.behind += usize::from(matches!(item, Item::Record(Record::Step(_))));
            continue;
        }
        let gap = |behind| Some(Gap { offset: damage.unwrap_or(place.start), behind });
        match item {
            Item::Torn => out.torn = place.len(),
            Item::Damage => damage = Some(place.start),
            Item::Record(Record::Rollback(r)) if r.rollbacks <= rollbacks => out.end = place.end,
            Item::Record(Record::Rollback(r)) => {
                match r.rollbacks.checked_sub(1) == Some(out.rollbacks) && (step..=reached).contains(&r.to) {
                    true => {
                        out.steps.truncate((r.to - step) as usize);
                        (out.rollbacks, out.rollback, out.end) = (r.rollbacks, Some(r), place.end);
                    }
                    false => out.gap = gap(0),
                }
            }
            Item::Record(Record::Step(s))
                if s.rollbacks < rollbacks || (s.rollbacks == rollbacks && s.step <= step) =>
            {
                out.end = place.end;
            }
            Item::Record(Record::Step(s)) if s.rollbacks == out.rollbacks && s.step.checked_sub(1) == Some(reached) => {
                out.steps.push(s);
                out.end = place.end;
            }
            Item::Record(Record::Step(_)) => out.gap = gap(1),
        }
    }
    out
}

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    end: u64,
    buffer: Vec<u8>,
    synced: Instant,
}

impl Journal {
    /// Begins a journal in `folder`, which is made if need be.
    ///
    /// # Errors
    /// When there is one already, another process writes it, or it cannot be written.
    pub fn create(folder: &Path, header: &Header) -> Result<Journal, TrainError> {
        let path = folder.join(NAME);
        let error = |source| failed(&path, source);
        fs::create_dir_all(folder).map_err(error)?;
        // One without records belongs to a run that ended before its first step.
        let is_file = fs::metadata(&path).is_ok_and(|m| m.is_file());
        let begun =
            is_file && fs::read(&path).is_ok_and(|old| read(&old).is_ok_and(|(_, mut items)| items.next().is_some()));
        if begun {
            return Err(error(io::ErrorKind::AlreadyExists.into()));
        }
        let bytes = header.to_bytes();
        write_atomic(&path, |w| w.write_all(&bytes))?;
        Journal::append_to(path, bytes.len() as u64)
    }

    /// Goes on with the journal in `folder` behind `end` bytes; what lies behind them is cut off. A copy of it is kept under another
    /// name if there were sound records in it.
    ///
    /// # Errors
    /// When another process writes it, or it cannot be written.
    pub fn resume(folder: &Path, trail: &Trail) -> Result<Journal, TrainError> {
        let path = folder.join(NAME);
        let journal = Journal::append_to(path.clone(), trail.end as u64)?;
        if trail.gap.is_some_and(|g| g.behind > 0) {
            let free = (1u32..).map(|n| folder.join(format!("{NAME}.damaged-{n}"))).find(|p| !p.exists());
            let copy = free.unwrap_or_else(|| folder.join(format!("{NAME}.damaged")));
            fs::copy(&path, &copy).map_err(|source| failed(&copy, source))?;
        }
        journal.file.set_len(journal.end).map_err(|source| failed(&path, source))?;
        Ok(journal)
    }

    fn append_to(path: PathBuf, end: u64) -> Result<Journal, TrainError> {
        let file = File::options().append(true).open(&path).map_err(|source| failed(&path, source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let reason = "another process trains in this folder; let it end, or choose another folder".to_owned();
                return Err(TrainError::Journal { path, reason, damaged: false });
            }
            // Not every file system can lock.
            Err(fs::TryLockError::Error(_)) => {}
        }
        Ok(Journal { path, file, end, buffer: vec![], synced: Instant::now() })
    }

    /// Adds a record: to the system at once, so that it outlives the process, and to the disk at least once a second.
    ///
    /// # Errors
    /// When it cannot be written; the journal then ends behind the record before.
    pub fn add(&mut self, record: &Record) -> Result<(), TrainError> {
        self.buffer.clear();
        record.write(&mut self.buffer);
        if let Err(source) = self.file.write_all(&self.buffer) {
            // Best effort: a reader finds out by itself where whole records end.
            drop(self.file.set_len(self.end));
            return Err(failed(&self.path, source));
        }
        self.end += self.buffer.len() as u64;
        match self.synced.elapsed() >= SYNC_EVERY {
            true => self.sync(),
            false => Ok(()),
        }
    }

    /// Waits until all records are on the disk.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn sync(&mut self) -> Result<(), TrainError> {
        self.synced = Instant::now();
        match self.file.sync_data() {
            // A device or pipe in place of a file cannot be synced.
            Err(source) if source.kind() != io::ErrorKind::InvalidInput => Err(failed(&self.path, source)),
            _ => Ok(()),
        }
    }
}

/// An error of the system at `path`.
fn failed(path: &Path, source: io::Error) -> TrainError {
    FileError::io(path, "write", source).into()
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
