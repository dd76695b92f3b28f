//! Files, folders and compressed files as pieces of documents.
//!
//! Where a document is cut into pieces depends on its bytes alone, and memory does not depend on the size of a file: a piece is read,
//! handed out and forgotten.

use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use flate2::bufread::MultiGzDecoder;

use super::TextError;
use super::pieces::begins_anew;
use super::zstd::{self, Zstd};

/// Most bytes of a line of JSON, and of a line of text under a vocabulary that encodes text.
pub const MAX_LINE: usize = 32 << 20;
/// Text is handed out in pieces of about this many bytes.
pub(super) const PIECE: usize = 256 * 1024;
/// Most files of one folder, and how deep folders may lie in one another.
const MAX_FILES: usize = 1 << 20;
const MAX_DEPTH: usize = 64;
const BUFFER: usize = 1 << 16;

/// One thing to train on, and how often.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DataSpec {
    /// A file or a folder.
    pub path: PathBuf,
    /// Rows are drawn from it so many times as often as its size says.
    pub weight: f64,
}

impl std::str::FromStr for DataSpec {
    type Err = String;

    /// `PATH` or `PATH=WEIGHT`; a path that exists as it is written is meant as it is written.
    fn from_str(text: &str) -> Result<DataSpec, String> {
        let plain = || DataSpec { path: text.into(), weight: 1.0 };
        match text.rsplit_once('=') {
            Some((path, weight)) if !Path::new(text).exists() && !path.is_empty() => match weight.parse::<f64>() {
                Ok(weight) if weight.is_finite() && (1e-6..=1e6).contains(&weight) => {
                    Ok(DataSpec { path: path.into(), weight })
                }
                _ => Err(format!("found the weight {weight:?} of {path}, expected a number from 0.000001 to 1000000")),
            },
            _ => Ok(plain()),
        }
    }
}

/// How files are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Field of JSON records; every file is then read as lines of JSON.
    pub field: Option<String>,
    /// Zero bytes are data.
    pub binary: bool,
}

/// A file as it was when it was listed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InputFile {
    /// Where it lies.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Bytes on disk.
    pub size: u64,
    /// Time of the last change in nanoseconds since 1970.
    pub modified: u64,
}

/// A path that is no UTF-8 is written as well as can be: a cache that has it is not found again.
fn lossy<S: serde::Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_string_lossy())
}

/// The files of a data path: itself, or all regular files below it, ascending by path. Names that begin with a dot and empty files in
/// folders are left out; links to folders are not followed.
///
/// # Errors
/// A path that cannot be read, is a device or an empty file, or a folder without a file.
pub fn list(path: &Path) -> Result<Vec<InputFile>, TextError> {
    let kind = metadata(path)?;
    if kind.is_file() {
        return match kind.len() {
            0 => Err(TextError::EmptyFile(path.into())),
            _ => Ok(vec![input_file(path, &kind)]),
        };
    }
    if !kind.is_dir() {
        return Err(TextError::NotAFile(path.into()));
    }
    let mut out = vec![];
    walk(path, 0, &mut out)?;
    if out.is_empty() {
        return Err(TextError::NoDocuments(path.into()));
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}

fn walk(folder: &Path, depth: usize, out: &mut Vec<InputFile>) -> Result<(), TextError> {
    let io = |error| TextError::Io { path: folder.into(), doing: "list the folder", error };
    if depth > MAX_DEPTH {
        return Err(io(io::Error::other(format!("folders lie more than {MAX_DEPTH} deep"))));
    }
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        if entry.file_type().map_err(io)?.is_dir() {
            walk(&path, depth + 1, out)?;
            continue;
        }
        let kind = metadata(&path)?;
        if kind.is_file() && kind.len() > 0 {
            if out.len() == MAX_FILES {
                return Err(io(io::Error::other(format!("there are more than {MAX_FILES} files"))));
            }
            out.push(input_file(&path, &kind));
        }
    }
    Ok(())
}

fn metadata(path: &Path) -> Result<Metadata, TextError> {
    fs::metadata(path).map_err(|error| TextError::Io { path: path.into(), doing: "read the data", error })
}

fn input_file(path: &Path, kind: &Metadata) -> InputFile {
    let modified = kind.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    InputFile {
        path: path.into(),
        size: kind.len(),
        modified: modified.and_then(|at| u64::try_from(at.as_nanos()).ok()).unwrap_or(0),
    }
}

/// A part of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Bytes of text, or one line of JSON.
    pub bytes: Vec<u8>,
    /// Line of the first byte, from 1.
    pub line: u64,
    /// Offset of the first byte in the (unpacked) file.
    pub offset: u64,
    /// Whether the document ends here.
    pub last: bool,
}

/// How a file is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// Records are lines.
    Lines,
    /// Where no token of text can span the cut.
    Text,
    /// Anywhere.
    Bytes,
}

/// The pieces of one file.
pub(super) struct Pieces {
    file: InputFile,
    input: Box<dyn BufRead>,
    meter: Arc<Meter>,
    cut: Cut,
    buffer: Vec<u8>,
    line: u64,
    offset: u64,
    ended: bool,
}

/// What was read from disk so far.
#[derive(Debug, Default)]
struct Meter {
    bytes: AtomicU64,
    sum: AtomicU32,
}

struct Metered(File, Arc<Meter>);

impl Read for Metered {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(out)?;
        let sum = self.1.sum.load(Ordering::Relaxed);
        self.1.sum.store(crc32c::crc32c_append(sum, &out[..n]), Ordering::Relaxed);
        self.1.bytes.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

impl Pieces {
    /// Opens a file. `text` tells whether a vocabulary needs cuts that no token spans.
    pub(super) fn open(file: &InputFile, reading: &Reading, text: bool) -> Result<Pieces, TextError> {
        let io = |error| TextError::Io { path: file.path.clone(), doing: "read the data", error };
        let meter = Arc::new(Meter::default());
        let raw = File::open(&file.path).map_err(io)?;
        let input = unpacked(BufReader::with_capacity(BUFFER, Metered(raw, meter.clone()))).map_err(io)?;
        let cut = match (records(&file.path) || reading.field.is_some(), text) {
            (true, _) => Cut::Lines,
            (false, true) => Cut::Text,
            (false, false) => Cut::Bytes,
        };
        Ok(Pieces { file: file.clone(), input, meter, cut, buffer: vec![], line: 1, offset: 0, ended: false })
    }

    /// Whether pieces are lines of JSON.
    pub(super) fn is_records(&self) -> bool {
        self.cut == Cut::Lines
    }

    /// Bytes read from disk.
    pub(super) fn bytes_read(&self) -> u64 {
        self.meter.bytes.load(Ordering::Relaxed)
    }

    /// Checksum of the bytes on disk, when all pieces were read.
    ///
    /// # Errors
    /// When the file is not the one that was listed.
    pub(super) fn finish(self) -> Result<u32, TextError> {
        let now = input_file(&self.file.path, &metadata(&self.file.path)?);
        if now != self.file || self.meter.bytes.load(Ordering::Relaxed) != now.size {
            return Err(TextError::Changed(self.file.path));
        }
        Ok(self.meter.sum.load(Ordering::Relaxed))
    }

    /// The next piece; nothing behind the last one. Empty lines between records are skipped.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, TextError> {
        let piece = match self.cut {
            Cut::Lines => self.record(),
            Cut::Text => self.text(),
            Cut::Bytes => self.bytes(),
        }?;
        if let Some(piece) = &piece {
            self.line += piece.bytes.iter().filter(|&&b| b == b'\n').count() as u64;
            self.offset += piece.bytes.len() as u64;
        }
        Ok(piece)
    }

    fn piece(&self, bytes: Vec<u8>, last: bool) -> Piece {
        Piece { bytes, line: self.line, offset: self.offset, last }
    }

    fn record(&mut self) -> Result<Option<Piece>, TextError> {
        loop {
            let mut line = vec![];
            let limit = MAX_LINE as u64 + 1;
            (&mut self.input).take(limit).read_until(b'\n', &mut line).map_err(|e| self.failed(e))?;
            if line.len() > MAX_LINE {
                return Err(self.too_long());
            }
            if line.is_empty() {
                return Ok(None);
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                self.line += 1;
                self.offset += line.len() as u64;
                continue;
            }
            return Ok(Some(self.piece(line, true)));
        }
    }

    fn bytes(&mut self) -> Result<Option<Piece>, TextError> {
        self.fill(PIECE + 1)?;
        Ok(self.hand_out(PIECE))
    }

    /// The piece of the first `at` buffered bytes.
    fn hand_out(&mut self, at: usize) -> Option<Piece> {
        let rest = self.buffer.split_off(at.min(self.buffer.len()));
        let bytes = std::mem::replace(&mut self.buffer, rest);
        let last = self.ended && self.buffer.is_empty();
        (!bytes.is_empty()).then(|| self.piece(bytes, last))
    }

    fn text(&mut self) -> Result<Option<Piece>, TextError> {
        let (mut at, mut wanted) = (PIECE, 2 * PIECE);
        loop {
            self.fill(wanted)?;
            // A cut is decided by the character behind it, which has at most four bytes.
            let known = if self.ended { self.buffer.len() } else { self.buffer.len() - 4 };
            while at < known.min(MAX_LINE) {
                if begins_anew(&self.buffer, at) {
                    return Ok(self.hand_out(at));
                }
                at += 1;
            }
            if self.ended && self.buffer.len() <= MAX_LINE {
                return Ok(self.hand_out(usize::MAX));
            }
            if at >= MAX_LINE {
                // No good place in so much text: any line end will do.
                let line_end = self.buffer[..MAX_LINE].iter().rposition(|&b| b == b'\n');
                let line_end = line_end.ok_or_else(|| self.too_long())?;
                return Ok(self.hand_out(line_end + 1));
            }
            wanted = (2 * wanted).min(MAX_LINE + 8);
        }
    }

    /// Buffers `wanted` bytes, or all that are left.
    fn fill(&mut self, wanted: usize) -> Result<(), TextError> {
        if !self.ended && self.buffer.len() < wanted {
            let missing = wanted - self.buffer.len();
            let read = (&mut self.input).take(missing as u64).read_to_end(&mut self.buffer);
            self.ended = read.map_err(|e| self.failed(e))? < missing;
        }
        Ok(())
    }

    fn too_long(&self) -> TextError {
        TextError::LongLine { source: self.file.path.display().to_string(), line: self.line }
    }

    fn failed(&self, error: io::Error) -> TextError {
        let path = self.file.path.clone();
        match error.kind() {
            ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof | ErrorKind::Other => {
                TextError::Damaged { path, what: error.to_string() }
            }
            _ => TextError::Io { path, doing: "read the data", error },
        }
    }
}

/// Whether a name says that a file has lines of JSON, compressed or not.
fn records(path: &Path) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(&name);
    name.ends_with(".jsonl") || name.ends_with(".ndjson")
}

/// Looks at the first bytes: gzip and zstd are unpacked, anything else is read as it is.
fn unpacked(mut raw: BufReader<Metered>) -> io::Result<Box<dyn BufRead>> {
    let head = raw.fill_buf()?;
    Ok(if head.starts_with(&[0x1f, 0x8b]) {
        Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(raw)))
    } else if head.starts_with(&zstd::MAGIC) {
        Box::new(BufReader::with_capacity(BUFFER, Zstd::new(raw)))
    } else {
        Box::new(raw)
    })
}

#[cfg(test)]
#[path = "input_tests.rs"]
mod tests;
