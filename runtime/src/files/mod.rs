//! Files with tensors: safetensors, `.b158` and `.npy`, and the atomic replacement that all writers use.
//!
//! Invariant: bytes from outside are never trusted. Every size is checked before memory is reserved or a slice is taken,
//! and a damaged file is an error with a sentence, never a panic.

pub mod atomic;
pub mod b158;
pub mod npy;
pub mod safetensors;
mod tensor;
mod ternary;

pub use tensor::{DType, HostTensor, TensorError, TensorView};

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a file could not be read or written.
#[derive(Debug)]
pub enum FileError {
    /// The operating system refused an operation.
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, as in "cannot {action} the file".
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The disk or the quota is full, or the file would be larger than files may be.
    NoSpace {
        /// The file that could not be written. A previous file of this name is unchanged.
        path: PathBuf,
    },
    /// The content contradicts itself or its checksums.
    Corrupted {
        /// The file.
        path: PathBuf,
        /// The tensor at fault, when it is one.
        tensor: Option<String>,
        /// What was found and what was expected.
        reason: String,
    },
    /// The content is sound but cannot be read, or the request cannot be written, in this format.
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What was found, what is supported, and the cure.
        reason: String,
    },
    /// A tensor that was asked for is not in the file.
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Number of tensors that the file has.
        count: usize,
    },
}

/// Whether a write failed for want of room.
pub fn is_full(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

impl FileError {
    /// Exit code of a command that ends with this error: 1 failure, 4 resource (disk, memory), 5 corrupted file.
    pub fn exit_code(&self) -> u8 {
        match self {
            FileError::NoSpace { .. } => 4,
            FileError::Io { source, .. } if source.kind() == io::ErrorKind::OutOfMemory => 4,
            FileError::Corrupted { .. } => 5,
            FileError::Io { .. } | FileError::Unsupported { .. } | FileError::Missing { .. } => 1,
        }
    }

    /// The file that the error is about.
    pub fn path(&self) -> &Path {
        match self {
            FileError::Io { path, .. }
            | FileError::NoSpace { path }
            | FileError::Corrupted { path, .. }
            | FileError::Unsupported { path, .. }
            | FileError::Missing { path, .. } => path,
        }
    }

    pub(crate) fn io(path: &Path, action: &'static str, source: io::Error) -> FileError {
        match source.kind() {
            kind if is_full(kind) => FileError::NoSpace { path: path.to_path_buf() },
            _ => FileError::Io { path: path.to_path_buf(), action, source },
        }
    }

    fn corrupted(path: &Path, reason: impl Into<String>) -> FileError {
        FileError::Corrupted { path: path.to_path_buf(), tensor: None, reason: reason.into() }
    }

    fn unsupported(path: &Path, reason: impl Into<String>) -> FileError {
        FileError::Unsupported { path: path.to_path_buf(), reason: reason.into() }
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.path().display();
        match self {
            FileError::Io { action, source, .. } => {
                write!(f, "{shown}: cannot {action} the file: {source}")?;
                match source.kind() {
                    io::ErrorKind::NotFound => {
                        write!(f, "; check the path and that its folder exists")
                    }
                    io::ErrorKind::PermissionDenied => {
                        write!(f, "; check the permissions of the file and its folder")
                    }
                    io::ErrorKind::OutOfMemory => {
                        write!(f, "; free memory or raise the limit of the process")
                    }
                    _ => Ok(()),
                }
            }
            FileError::NoSpace { .. } => write!(
                f,
                "{shown}: no space left on the device, in the quota or below the limit of file sizes; a previous file of this \
                 name is unchanged, free space or choose another folder"
            ),
            FileError::Corrupted { tensor: Some(tensor), reason, .. } => {
                write!(f, "{shown}: tensor `{tensor}` is corrupted: {reason}; restore the file from its source")
            }
            FileError::Corrupted { tensor: None, reason, .. } => {
                write!(f, "{shown}: the file is corrupted: {reason}; restore the file from its source")
            }
            FileError::Unsupported { reason, .. } => write!(f, "{shown}: {reason}"),
            FileError::Missing { tensor, count, .. } => write!(
                f,
                "{shown}: no tensor `{tensor}` among the {count} in the file; check that it belongs to this configuration"
            ),
        }
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            FileError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// The path that errors name for content that did not come from a file.
const IN_MEMORY: &str = "<memory>";

/// The bytes of a file: mapped, or given by the caller.
#[derive(Debug)]
enum Storage {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl Deref for Storage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => map,
            Storage::Owned(bytes) => bytes,
        }
    }
}

/// Bytes of an open file that keep it open: shared without a copy, and read-only. What a mapped file holds changes only when another
/// process writes into it, which programs of this project never do.
#[derive(Clone, Debug)]
pub struct MappedSlice {
    storage: Arc<Storage>,
    range: Range<usize>,
}

impl MappedSlice {
    /// All bytes of a regular file, mapped.
    ///
    /// # Errors
    /// When the file cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<MappedSlice, FileError> {
        let storage = Arc::new(map_file(path)?);
        Ok(MappedSlice { range: 0..storage.len(), storage })
    }

    /// Bytes in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> MappedSlice {
        MappedSlice { range: 0..bytes.len(), storage: Arc::new(Storage::Owned(bytes)) }
    }

    /// A part of `storage`; `None` when it does not lie inside.
    fn new(storage: &Arc<Storage>, range: Range<usize>) -> Option<MappedSlice> {
        storage.get(range.clone())?;
        Some(MappedSlice { storage: Arc::clone(storage), range })
    }

    /// Let the system begin to read these bytes, in large pieces, before they are used. It may decline.
    pub fn will_need(&self) {
        #[cfg(unix)]
        if let Storage::Mapped(map) = &*self.storage {
            let _ = map.advise_range(memmap2::Advice::WillNeed, self.range.start, self.range.len());
        }
    }

    /// The bytes `range` of this slice; `None` when they do not lie inside.
    pub fn part(&self, range: Range<usize>) -> Option<MappedSlice> {
        self.get(range.clone())?;
        let start = self.range.start;
        Some(MappedSlice { storage: Arc::clone(&self.storage), range: start + range.start..start + range.end })
    }
}

impl Deref for MappedSlice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.storage[self.range.clone()]
    }
}

/// Maps a regular file for reading.
fn map_file(path: &Path) -> Result<Storage, FileError> {
    let error = |source| FileError::io(path, "open", source);
    // Before opening: a pipe would block.
    let kind = std::fs::metadata(path).map_err(error)?;
    if !kind.is_file() {
        return Err(FileError::unsupported(path, "found a folder or a device, expected a regular file"));
    }
    let file = std::fs::File::open(path).map_err(error)?;
    if kind.len() == 0 {
        return Ok(Storage::Owned(Vec::new()));
    }
    // SAFETY: the map is read-only. Writers of this project replace files by renaming and never change one in place, so
    // the mapped bytes keep their values; a foreign process that truncates the file ends this one with a bus error.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|source| FileError::io(path, "map", source))?;
    // Large files are then read in large pieces and seen through huge pages, which doubles the rate of both; where the file system
    // has none, small pages are right too.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(Storage::Mapped(map))
}

/// Reads fixed-size fields from untrusted bytes; every read past the end is `None`.
struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.bytes.split_at_checked(n)?;
        self.bytes = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.bytes.split_first_chunk()?;
        self.bytes = tail;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A UTF-8 string behind its length.
    fn text(&mut self) -> Option<&'a str> {
        let n = usize::try_from(self.u32()?).ok()?;
        std::str::from_utf8(self.take(n)?).ok()
    }
}
