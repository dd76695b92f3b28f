//! Tokens of data files, kept on disk: encoded once, mapped from then on.
//!
//! A cache is used only if the vocabulary, the way of reading, and the files are those it was made from; it is replaced whole.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::TextError;
use super::data::encode_files;
use super::input::{DataSpec, InputFile, Reading};
use super::tokens::{Origin, Tokens};
use super::vocab::Vocab;
use crate::files::FileError;
use crate::files::atomic::write_atomic;

/// Smaller data are encoded faster than anybody would notice.
const MIN_AUTOMATIC: u64 = 4 << 20;
/// Bytes that are compared at a time.
const BUFFER: usize = 1 << 20;

/// Where tokens are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nowhere: data are encoded anew, in memory.
    Off,
    /// In this folder, which is created.
    Folder(PathBuf),
    /// In this folder if data are large and it can be written, else nowhere.
    Automatic(PathBuf),
}

/// What a cache file was good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// It was there, made from the same data.
    Reused,
    /// It was written.
    Written,
}

/// Tokens of the files of a source, from a cache where there is one. `progress` gets bytes on disk that were encoded.
pub(super) fn tokens_of(
    vocab: &Vocab,
    spec: &DataSpec,
    files: Vec<InputFile>,
    reading: &Reading,
    cache: &Cache,
    progress: &mut dyn FnMut(u64),
) -> Result<(Tokens, Option<(PathBuf, Cached)>), TextError> {
    let size: u64 = files.iter().map(|f| f.size).sum();
    let folder = match cache {
        Cache::Folder(folder) => Some(folder),
        Cache::Automatic(folder) if size >= MIN_AUTOMATIC => Some(folder),
        Cache::Off | Cache::Automatic(_) => None,
    };
    if let Some(folder) = folder {
        let path = folder.join(name(vocab, spec, reading));
        if let Some(tokens) = reusable(&path, vocab, &files, reading) {
            return Ok((tokens, Some((path, Cached::Reused))));
        }
        match write(&path, vocab, spec, files.clone(), reading, progress) {
            Ok(()) => return Ok((Tokens::open(&path)?, Some((path, Cached::Written)))),
            // Nobody asked for this folder.
            Err(Failed::Cache(_)) if matches!(cache, Cache::Automatic(_)) => {}
            Err(Failed::Cache(error) | Failed::Data(error)) => return Err(error),
        }
    }
    let mut image = vec![];
    encode_files(vocab, spec, files, reading, &mut image, progress)?;
    Ok((Tokens::from_bytes(image)?, None))
}

/// The name of the cache of a source: one for each path, vocabulary and way of reading.
fn name(vocab: &Vocab, spec: &DataSpec, reading: &Reading) -> String {
    let path = std::path::absolute(&spec.path).unwrap_or_else(|_| spec.path.clone());
    let stem: String = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let stem: String = stem.chars().filter(|c| c.is_ascii_alphanumeric() || "-_".contains(*c)).take(40).collect();
    let place = crc32c::crc32c(path.as_os_str().as_encoded_bytes());
    let way = crc32c::crc32c(format!("{:08x} {reading:?}", vocab.checksum()).as_bytes());
    format!("{stem}-{place:08x}{way:08x}.tokens")
}

/// The tokens in `path`, if they were made from these files; a damaged file is as good as none.
fn reusable(path: &Path, vocab: &Vocab, files: &[InputFile], reading: &Reading) -> Option<Tokens> {
    if !path.is_file() {
        return None;
    }
    let tokens = Tokens::open(path).ok()?;
    let found = tokens.origin();
    let wanted = Origin {
        field: reading.field.clone(),
        binary: reading.binary,
        files: found.files.clone(),
        sums: found.sums.clone(),
        ..Origin::new(vocab)
    };
    let same_file = |(now, (then, &sum)): (&InputFile, (&InputFile, &u32))| {
        now.path == then.path
            && now.size == then.size
            && (now.modified == then.modified || checksum(&now.path).is_ok_and(|found| found == sum))
    };
    let counts = found.files.len() == files.len() && found.sums.len() == files.len();
    (*found == wanted && counts && files.iter().zip(found.files.iter().zip(&found.sums)).all(same_file))
        .then_some(tokens)
}

/// Checksum of the bytes of a file.
fn checksum(path: &Path) -> io::Result<u32> {
    let (mut file, mut buffer, mut sum) = (File::open(path)?, vec![0; BUFFER], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(sum),
            n => sum = crc32c::crc32c_append(sum, &buffer[..n]),
        }
    }
}

/// Whose fault it is.
enum Failed {
    Data(TextError),
    Cache(TextError),
}

fn write(
    path: &Path,
    vocab: &Vocab,
    spec: &DataSpec,
    files: Vec<InputFile>,
    reading: &Reading,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Failed> {
    let refused = |error| Failed::Cache(TextError::Io { path: path.into(), doing: "write the token cache", error });
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(refused)?;
    }
    let mut of_data = None;
    let written = write_atomic(path, |out| {
        encode_files(vocab, spec, files, reading, out, progress).map_err(|error| match error {
            TextError::Io { doing: "keep the tokens of the data", error, .. } => error,
            other => {
                of_data = Some(other);
                io::Error::other("the data cannot be read")
            }
        })
    });
    match (of_data, written) {
        (Some(error), _) => Err(Failed::Data(error)),
        (None, Ok(())) => Ok(()),
        (None, Err(FileError::NoSpace { .. })) => Err(refused(io::ErrorKind::StorageFull.into())),
        (None, Err(FileError::Io { source, .. })) => Err(refused(source)),
        (None, Err(other)) => Err(refused(io::Error::other(other.to_string()))),
    }
}
