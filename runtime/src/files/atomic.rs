//! Atomic replacement of a file: readers see the old content or the new one, never a part.
//!
//! Invariant: the old file stays in place until the new one is complete and synced; an error leaves no temporary file.

use super::FileError;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

const BUFFER_BYTES: usize = 1 << 20;

/// Writes `path` through `fill`: a temporary file in the same folder, flushed and synced, renamed over `path`, and the
/// folder synced. A symbolic link keeps pointing at the replaced file; the permissions of a replaced file are kept. A
/// device or pipe, which cannot be replaced, is written directly.
///
/// # Errors
/// [`FileError::NoSpace`] when the disk or quota is full, [`FileError::Io`] otherwise. The old file is then unchanged and
/// the temporary file is removed; only when syncing the folder fails is the new file, complete, already in place.
pub fn write_atomic<T>(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> Result<T, FileError> {
    replace(path, fill).map_err(|source| FileError::io(path, "write", source))
}

fn replace<T>(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> io::Result<T> {
    let old = match fs::metadata(path) {
        Ok(old) => Some(old),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if old.as_ref().is_some_and(fs::Metadata::is_dir) {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if old.as_ref().is_some_and(|old| !old.is_file()) {
        let mut file = BufWriter::new(fs::OpenOptions::new().write(true).open(path)?);
        let value = fill(&mut file)?;
        file.flush()?;
        return Ok(value);
    }
    let target = if old.is_some() { fs::canonicalize(path)? } else { path.to_path_buf() };
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".chimera-").suffix(".partial");
    // As any newly created file: readable to whom the process's mask permits.
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions);
    // Dropping the temporary file, on every early return, removes it.
    let temporary = builder.tempfile_in(&folder)?;
    let mut writer = BufWriter::with_capacity(BUFFER_BYTES, temporary.as_file());
    let value = fill(&mut writer)?;
    writer.flush()?;
    drop(writer);
    if let Some(old) = old {
        temporary.as_file().set_permissions(old.permissions())?;
    }
    temporary.as_file().sync_all()?;
    temporary.persist(&target).map_err(|error| error.error)?;
    sync_folder(&folder)?;
    Ok(value)
}

/// Makes the rename durable, on file systems that can sync a folder.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .expect("the folder can be read")
            .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_and_returns_the_value() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.bin");
        for content in ["first", "second, longer", ""] {
            let n = write_atomic(&path, |w| {
                w.write_all(content.as_bytes())?;
                Ok(content.len())
            });
            assert_eq!(n.expect("written"), content.len());
            assert_eq!(fs::read_to_string(&path).expect("read"), content);
        }
        assert_eq!(names(folder.path()), ["a.bin"]);
    }

    #[test]
    fn an_error_keeps_the_old_file_and_leaves_no_other() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.bin");
        write_atomic(&path, |w| w.write_all(b"good")).expect("written");
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::Other] {
            let error = write_atomic(&path, |w| -> io::Result<()> {
                w.write_all(&[0; 3 << 20])?;
                Err(kind.into())
            })
            .expect_err("the closure failed");
            let full = kind != io::ErrorKind::Other;
            assert_eq!(error.exit_code(), if full { 4 } else { 1 });
            assert!(error.to_string().contains("a.bin"), "{error}");
            assert_eq!(fs::read(&path).expect("read"), b"good");
            assert_eq!(names(folder.path()), ["a.bin"]);
        }
        let unwound = std::panic::catch_unwind(|| {
            write_atomic(&path, |w| -> io::Result<()> {
                w.write_all(b"bad")?;
                panic!("in the closure");
            })
        });
        assert!(unwound.is_err());
        assert_eq!(fs::read(&path).expect("read"), b"good");
        assert_eq!(names(folder.path()), ["a.bin"]);
    }

    #[test]
    fn wrong_places_are_named() {
        let folder = tempfile::tempdir().expect("folder");
        let error = write_atomic(folder.path(), |_| Ok(())).expect_err("a folder");
        assert_eq!(error.exit_code(), 1);
        let missing = folder.path().join("missing/a.bin");
        let error = write_atomic(&missing, |_| Ok(())).expect_err("no such folder");
        assert!(error.to_string().contains("check the path and that its folder exists"), "{error}");
        assert!(names(folder.path()).is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_device_is_a_resource_error_and_stays_a_device() {
        let path = Path::new("/dev/full");
        let error = write_atomic(path, |w| w.write_all(&[1; 1 << 16])).expect_err("full");
        assert!(matches!(error, FileError::NoSpace { .. }), "{error}");
        assert!(!fs::metadata(path).expect("still there").is_file());
    }

    #[cfg(unix)]
    #[test]
    fn links_and_permissions_survive() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().expect("folder");
        let (path, link) = (folder.path().join("a.bin"), folder.path().join("latest"));
        write_atomic(&path, |w| w.write_all(b"1")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("permissions");
        symlink("a.bin", &link).expect("link");
        write_atomic(&link, |w| w.write_all(b"2")).expect("written");
        assert!(fs::symlink_metadata(&link).expect("link").is_symlink());
        assert_eq!(fs::read(&path).expect("read"), b"2");
        assert_eq!(fs::metadata(&path).expect("file").permissions().mode() & 0o777, 0o640);
    }
}
