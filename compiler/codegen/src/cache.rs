//! Machine code of earlier runs, in a folder that may be deleted at any time.
//!
//! An entry is used only when its key, its checksum and its permissions are right; anything else is as good as absent and is written
//! anew. The key covers kernels, target, emitters with their versions, and the program that emitted the code.

use std::borrow::Borrow;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use chimera_ir::loops::Kernel;
use rayon::prelude::*;

use crate::module::Emitted;
use crate::{Allowed, Code, Refusal, Target, emitters};

/// First bytes of every entry.
const MAGIC: [u8; 8] = *b"CHIMCODE";
/// Bytes of all entries of a folder; beyond that the oldest go.
const LIMIT: u64 = 256 << 20;
/// Longer files are no entries.
const LONGEST: u64 = 64 << 20;
/// Ending of the names of entries.
const ENDING: &str = "code";
/// In place of a length: the interpreter runs the kernel.
const INTERPRETED: u32 = u32::MAX;

/// What the code of a list of kernels depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(u128);

/// Two independent hashes of 64 bits.
fn hash(value: &impl Hash) -> u128 {
    let half = |salt: u64| {
        let mut state = DefaultHasher::new();
        (salt, value).hash(&mut state);
        u128::from(state.finish())
    };
    half(0) << 64 | half(1)
}

impl Key {
    /// The key; `None` when this program cannot tell which one it is.
    pub(crate) fn of<K: Borrow<Kernel> + Sync>(kernels: &[K], target: &Target, allowed: Allowed) -> Option<Key> {
        let program = fs::metadata(std::env::current_exe().ok()?).ok()?;
        let program = (program.len(), program.modified().ok()?);
        let emitters: Vec<(&str, u32)> = allowed.emitters().map(|e| (e.name(), e.version())).collect();
        let kernels: Vec<u128> = kernels.par_iter().map(|k| hash(k.borrow())).collect();
        Some(Key(hash(&(env!("CARGO_PKG_VERSION"), program, target.to_string(), emitters, kernels))))
    }

    fn file(self, folder: &Path) -> PathBuf {
        folder.join(format!("{:032x}.{ENDING}", self.0))
    }
}

/// The code for `kernels` kernels with this key.
pub(crate) fn load(folder: &Path, key: Key, kernels: usize) -> Option<Vec<Emitted>> {
    let path = key.file(folder);
    let metadata = fs::metadata(&path).ok()?;
    if !metadata.is_file() || metadata.len() > LONGEST || !is_ours(&metadata, &fs::metadata(folder).ok()?) {
        return None;
    }
    decode(&fs::read(path).ok()?, key, kernels)
}

/// Whether an entry and its folder have one owner, who alone can write to them.
#[cfg(unix)]
fn is_ours(entry: &fs::Metadata, folder: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    entry.uid() == folder.uid() && (entry.mode() | folder.mode()) & 0o022 == 0
}

/// Whether an entry and its folder have one owner, who alone can write to them.
#[cfg(not(unix))]
fn is_ours(_: &fs::Metadata, _: &fs::Metadata) -> bool {
    true
}

/// Keep code for later runs and make room for it.
///
/// # Errors
/// The folder cannot be written.
pub(crate) fn store(folder: &Path, key: Key, emitted: &[Emitted]) -> io::Result<()> {
    let Some(bytes) = encode(key, emitted).filter(|b| b.len() as u64 <= LONGEST) else { return Ok(()) };
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)?;
    // The temporary file can be read and written by its owner only.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&bytes)?;
    file.persist(key.file(folder))?;
    shrink(folder, LIMIT)
}

/// Delete the oldest entries until the rest has at most `limit` bytes.
fn shrink(folder: &Path, limit: u64) -> io::Result<()> {
    let mut entries: Vec<(SystemTime, u64, PathBuf)> = vec![];
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // Another process may have deleted it.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_file() && path.extension().is_some_and(|e| e == ENDING) {
            entries.push((metadata.modified()?, metadata.len(), path));
        }
    }
    entries.sort_unstable();
    let mut total: u64 = entries.iter().map(|e| e.1).sum();
    for (_, bytes, path) in entries {
        if total <= limit {
            break;
        }
        fs::remove_file(path)?;
        total -= bytes;
    }
    Ok(())
}

/// Magic, key, then for every kernel the place of its emitter, its refusals and its code, then a checksum of all that; numbers are
/// little-endian. `None` for what is too long.
fn encode(key: Key, emitted: &[Emitted]) -> Option<Vec<u8>> {
    let place = |name: &str| emitters().iter().position(|e| e.name() == name).and_then(|n| u8::try_from(n).ok());
    let mut out = [&MAGIC[..], &key.0.to_le_bytes()].concat();
    for e in emitted {
        out.extend([place(e.emitter)?, u8::try_from(e.refusals.len()).ok()?]);
        for (emitter, why) in &e.refusals {
            out.push(place(emitter)?);
            out.extend(u32::try_from(why.0.len()).ok()?.to_le_bytes());
            out.extend(why.0.as_bytes());
        }
        match &e.code {
            Code::Machine(code) => {
                out.extend(u32::try_from(code.len()).ok()?.to_le_bytes());
                out.extend(code);
            }
            Code::Interpreted => out.extend(INTERPRETED.to_le_bytes()),
        }
    }
    out.extend(crc32c::crc32c(&out).to_le_bytes());
    Some(out)
}

/// What [`encode`] wrote; `None` of anything else.
fn decode(bytes: &[u8], key: Key, kernels: usize) -> Option<Vec<Emitted>> {
    let (bytes, checksum) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(bytes) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let mut at = Reader(bytes);
    if at.take(MAGIC.len())? != MAGIC || at.take(16)? != key.0.to_le_bytes() {
        return None;
    }
    let emitted: Option<Vec<Emitted>> = (0..kernels).map(|_| at.emitted()).collect();
    emitted.filter(|_| at.0.is_empty())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<usize> {
        Some(usize::from(self.take(1)?[0]))
    }

    fn word(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn emitter(&mut self) -> Option<&'static str> {
        Some(emitters().get(self.byte()?)?.name())
    }

    fn emitted(&mut self) -> Option<Emitted> {
        let (emitter, count) = (self.emitter()?, self.byte()?);
        let mut refusals = vec![];
        for _ in 0..count {
            let (emitter, len) = (self.emitter()?, self.word()? as usize);
            refusals.push((emitter, Refusal(String::from_utf8(self.take(len)?.to_vec()).ok()?)));
        }
        let code = match self.word()? {
            INTERPRETED => Code::Interpreted,
            len => Code::Machine(self.take(len as usize)?.to_vec()),
        };
        Some(Emitted { emitter, refusals, code })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compile_with, host};
    use chimera_ir::DType;
    use chimera_ir::loops::{Builder, Expr, Role, f32c};

    /// `y = x + by`.
    fn kernel(by: f32) -> Kernel {
        let mut b = Builder::new("add");
        let (x, y) = (b.buf("x", DType::F32, 8, Role::In), b.buf("y", DType::F32, 8, Role::Out));
        let i = b.grid(8);
        b.store(y, &i, Expr::load(x, &i) + f32c(by));
        b.finish()
    }

    /// What the kernels make of ones, and whether their code was read.
    fn run(folder: &Path, kernels: &[Kernel]) -> (Vec<f32>, bool) {
        let module = compile_with(kernels, &host(), &Allowed::all(), Some(folder)).unwrap();
        let results = (0..kernels.len()).map(|n| {
            let (mut x, mut y, mut scratch) = ([1f32; 8], [0f32; 8], [0u64; 8]);
            let args = [x.as_mut_ptr().cast(), y.as_mut_ptr().cast()];
            // SAFETY: two arrays of eight elements, as the kernel declares; the scratch memory of 64 bytes is more than it wants.
            unsafe { module.entry(n).call(args.as_ptr(), scratch.as_mut_ptr().cast(), 0, 8) };
            y[7]
        });
        (results.collect(), module.cached)
    }

    fn entries(folder: &Path) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths
    }

    #[test]
    fn code_is_kept_by_kernels_and_emitters() {
        let folder = tempfile::tempdir().unwrap();
        let folder = &folder.path().join("made/on/demand");
        let (one, two) = ([kernel(1.0), kernel(2.0)], [kernel(1.0), kernel(3.0)]);
        assert_eq!(run(folder, &one), (vec![2.0, 3.0], false));
        assert_eq!(run(folder, &one), (vec![2.0, 3.0], true));
        assert_eq!(run(folder, &two), (vec![2.0, 4.0], false));
        assert_eq!(entries(folder).len(), 2);
        let key = |kernels: &[Kernel], names: &str| Key::of(kernels, &host(), Allowed::parse(names).unwrap());
        assert_eq!(key(&one, "interp"), key(&one, "interp"));
        assert_ne!(key(&one, "interp"), key(&one, "portable,interp"));
        assert_ne!(key(&one, "interp"), key(&one[..1], "interp"));
        assert_ne!(key(&[kernel(0.0)], "interp"), key(&[kernel(-0.0)], "interp"));
    }

    #[test]
    fn damaged_entries_are_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (folder, kernels) = (folder.path(), [kernel(1.0)]);
        run(folder, &kernels);
        let path = entries(folder).remove(0);
        let whole = fs::read(&path).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).step_by(7).map(|n| whole[..n].to_vec()).collect();
        damaged.extend((0..whole.len()).map(|n| {
            let mut bytes = whole.clone();
            bytes[n] ^= 0x10;
            bytes
        }));
        damaged.push([&whole[..], &[0]].concat());
        for bytes in damaged {
            fs::write(&path, bytes).unwrap();
            assert_eq!(run(folder, &kernels), (vec![2.0], false));
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
        // An entry that was made for other kernels.
        let other = tempfile::tempdir().unwrap();
        run(other.path(), &[kernel(5.0)]);
        fs::copy(entries(other.path()).remove(0), &path).unwrap();
        assert_eq!(run(folder, &kernels), (vec![2.0], false));
    }

    #[cfg(unix)]
    #[test]
    fn what_others_can_write_is_not_run() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (folder, kernels) = (folder.path(), [kernel(1.0)]);
        run(folder, &kernels);
        let path = entries(folder).remove(0);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(!run(folder, &kernels).1);
        assert!(run(folder, &kernels).1);
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(!run(folder, &kernels).1);
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_the_cache_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for _ in 0..2 {
            assert_eq!(run(file.path(), &[kernel(1.0)]), (vec![2.0], false));
        }
    }

    #[test]
    fn the_oldest_entries_go() {
        let folder = tempfile::tempdir().unwrap();
        for (age, name) in ["b.code", "a.code", "c.code", "other.txt"].into_iter().enumerate() {
            let file = fs::File::create(folder.path().join(name)).unwrap();
            file.set_len(100).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(age as u64)).unwrap();
        }
        shrink(folder.path(), 200).unwrap();
        let names: Vec<_> = entries(folder.path()).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["a.code", "c.code", "other.txt"]);
    }
}
