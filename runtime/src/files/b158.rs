//! The weight container `.b158`: named tensors, packed ternary or float, with metadata and a checksum each.
//!
//! Invariant: sizes and places are checked when the file is opened; [`B158::require`] hands out nothing before its checksum and, for
//! ternary codes, its packing have been checked. [`B158::mapped`] does not look at the bytes, so that opening a large file is quick.
//!
//! Layout, all numbers little-endian:
//!
//! | part | content |
//! |---|---|
//! | prologue, 32 bytes | magic (8), version u32, tensor count u32, metadata count u32, table bytes u32, file bytes u64 |
//! | table | per metadata entry: key, value; per tensor, ascending by name: name, encoding u8, scale encoding u8, rank u8, 0 u8, group u64, dimensions u64 each, offset u64, length u64, crc32c u32. A string is its u32 length and UTF-8 bytes |
//! | header checksum | crc32c u32 of prologue and table |
//! | data | every tensor at a multiple of 64 from the beginning of the file, gaps zero |
//!
//! A ternary matrix [n, k] is stored as packed codes (see [`pack_ternary`]) followed by the scales of the padded rows in blocks
//! of 32, `[n rounded up to 32 / 32][ceil(k / group)][32]`; scales of padding rows are zero. Matrices of one shape, such as those of the
//! experts of a layer, may be stored as one tensor [count, n, k]: the codes of all, then the scales of all. Its name has `*` in the place
//! of their number: `layers.1.mlp.experts.*.up_proj.weight`.

mod writer;

pub use super::ternary::{
    ScaleMode, Ternary, block_scales, is_packed, pack_ternary, packed_len, padded, ternarise, unblock_scales,
    unpack_ternary,
};
pub use writer::{Entry, write};

use super::{Cursor, DType, FileError, HostTensor, IN_MEMORY, MappedSlice, Storage, TensorView, map_file};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// First bytes of every file; the line ends and the high bit show damage by text-mode transfers.
pub const MAGIC: [u8; 8] = *b"\x89b158\r\n\x1a";
/// Version that is written and read.
pub const VERSION: u32 = 2;
/// Tensors begin at multiples of this many bytes.
pub const DATA_ALIGN: usize = 64;
const PROLOGUE_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 4;
/// Longest table that is read or written, in bytes.
const MAX_TABLE_BYTES: usize = 512 << 20;
const MAX_RANK: usize = 16;

/// Element type of the group scales of a ternary tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleEncoding {
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
}

impl ScaleEncoding {
    fn dtype(self) -> DType {
        match self {
            ScaleEncoding::F32 => DType::F32,
            ScaleEncoding::Bf16 => DType::BF16,
        }
    }
}

/// How the bytes of a tensor are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// float32, row-major.
    F32,
    /// bfloat16, row-major.
    Bf16,
    /// Signed 32-bit integers, row-major.
    I32,
    /// Signed bytes, row-major.
    I8,
    /// Bytes, row-major.
    U8,
    /// Packed codes of a matrix and their scales.
    Ternary {
        /// Input columns that share a scale.
        group: usize,
        /// Element type of the scales.
        scales: ScaleEncoding,
    },
}

impl Encoding {
    /// Bytes of a tensor of this encoding; `None` for a shape that it cannot have.
    pub fn byte_len(self, shape: &[usize]) -> Option<usize> {
        let Encoding::Ternary { group, scales } = self else {
            return self.dtype()?.byte_len(shape);
        };
        let [count, n, k] = matrices(shape)?;
        if count == 0 || n == 0 || k == 0 || group == 0 {
            return None;
        }
        let (rows, _) = padded(n, k)?;
        let scales = scales.dtype().byte_len(&[rows, k.div_ceil(group)])?;
        packed_len(n, k)?.checked_add(scales)?.checked_mul(count).filter(|&n| n <= isize::MAX as usize)
    }

    /// The element type of a plain encoding.
    fn dtype(self) -> Option<DType> {
        match self {
            Encoding::F32 => Some(DType::F32),
            Encoding::Bf16 => Some(DType::BF16),
            Encoding::I32 => Some(DType::I32),
            Encoding::I8 => Some(DType::I8),
            Encoding::U8 => Some(DType::U8),
            Encoding::Ternary { .. } => None,
        }
    }

    /// The fields of the table: encoding, scale encoding, group.
    fn to_fields(self) -> (u8, u8, u64) {
        match self {
            Encoding::F32 => (0, 0, 0),
            Encoding::Bf16 => (1, 0, 0),
            Encoding::I32 => (2, 0, 0),
            Encoding::I8 => (4, 0, 0),
            Encoding::U8 => (5, 0, 0),
            Encoding::Ternary { group, scales: ScaleEncoding::F32 } => (3, 0, group as u64),
            Encoding::Ternary { group, scales: ScaleEncoding::Bf16 } => (3, 1, group as u64),
        }
    }

    fn from_fields(fields: (u8, u8, u64)) -> Option<Encoding> {
        let scales = match fields.1 {
            0 => ScaleEncoding::F32,
            1 => ScaleEncoding::Bf16,
            _ => return None,
        };
        match fields {
            (0, 0, 0) => Some(Encoding::F32),
            (1, 0, 0) => Some(Encoding::Bf16),
            (2, 0, 0) => Some(Encoding::I32),
            (4, 0, 0) => Some(Encoding::I8),
            (5, 0, 0) => Some(Encoding::U8),
            (3, _, group) => Some(Encoding::Ternary { group: usize::try_from(group).ok()?, scales }),
            _ => None,
        }
    }
}

/// Number, rows and columns of the matrices of a ternary tensor; `None` of other shapes.
fn matrices(shape: &[usize]) -> Option<[usize; 3]> {
    match *shape {
        [n, k] => Some([1, n, k]),
        [count, n, k] => Some([count, n, k]),
        _ => None,
    }
}

/// An open `.b158` file.
#[derive(Debug)]
pub struct B158 {
    path: PathBuf,
    storage: Arc<Storage>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Slot>,
}

#[derive(Debug)]
struct Slot {
    encoding: Encoding,
    shape: Vec<usize>,
    /// Byte range in the file.
    range: Range<usize>,
    crc: u32,
    /// Whether checksum and packing were found right.
    verified: AtomicBool,
}

/// A verified tensor of an open file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packed<'a> {
    /// How `bytes` are to be read.
    pub encoding: Encoding,
    /// Logical dimensions; [output rows, input columns] for a matrix, with their number in front for several.
    pub shape: &'a [usize],
    /// The stored bytes; aligned to 64 bytes when the file is mapped.
    pub bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// The tensor as a plain view; `None` for a ternary tensor.
    pub fn plain(&self) -> Option<TensorView<'a>> {
        TensorView::new(self.encoding.dtype()?, self.shape, self.bytes).ok()
    }

    /// The packed codes and the stored scales of a ternary tensor; `None` for others.
    pub fn ternary(&self) -> Option<(&'a [u8], &'a [u8])> {
        let Encoding::Ternary { .. } = self.encoding else { return None };
        let [count, n, k] = matrices(self.shape)?;
        self.bytes.split_at_checked(packed_len(n, k)?.checked_mul(count)?)
    }

    /// The scales of a ternary tensor as float32, [matrices, padded rows, ceil(k / group)] row-major; `None` for others.
    pub fn scales(&self) -> Option<Vec<f32>> {
        let Encoding::Ternary { group, scales } = self.encoding else { return None };
        let [count, n, k] = matrices(self.shape)?;
        let (_, bytes) = self.ternary()?;
        let shape = [count, padded(n, k)?.0, k.div_ceil(group)];
        let stored = TensorView::new(scales.dtype(), &shape, bytes).ok()?.to_f32();
        Some(unblock_scales(&stored, shape[2]))
    }

    /// The values as float32 in the logical shape; a ternary tensor becomes scale times code.
    pub fn to_f32(&self) -> Vec<f32> {
        if let Some(view) = self.plain() {
            return view.to_f32();
        }
        self.dequantised().expect("a verified tensor is plain or a well-packed matrix")
    }

    fn dequantised(&self) -> Option<Vec<f32>> {
        let Encoding::Ternary { group, .. } = self.encoding else { return None };
        let [count, n, k] = matrices(self.shape)?;
        let (packed, scales) = (self.ternary()?.0, self.scales()?);
        let per_row = k.div_ceil(group);
        let mut values = Vec::with_capacity(count * n * k);
        let parts = packed.chunks_exact(packed_len(n, k)?).zip(scales.chunks_exact(padded(n, k)?.0 * per_row));
        for (packed, scales) in parts {
            let codes = unpack_ternary(packed, n, k)?;
            let rows = codes.chunks_exact(k).zip(scales.chunks_exact(per_row));
            values.extend(rows.flat_map(|(codes, scales)| {
                codes.iter().enumerate().map(move |(i, &code)| f32::from(code) * scales[i / group])
            }));
        }
        Some(values)
    }

    /// Whether the codes are those of ternary weights; true of plain tensors.
    fn is_well_packed(&self) -> bool {
        let (Some((codes, _)), Some([_, n, k])) = (self.ternary(), matrices(self.shape)) else { return true };
        packed_len(n, k).is_some_and(|len| codes.chunks_exact(len).all(|part| is_packed(part, n, k)))
    }

    /// The values as an owned tensor: F32 for a ternary tensor, the stored type for others.
    pub fn to_host(&self) -> HostTensor {
        match self.plain() {
            Some(view) => view.to_owned(),
            None => HostTensor::from_f32(self.shape, &self.to_f32()).expect("dequantising keeps the shape"),
        }
    }
}

impl B158 {
    /// Maps the file at `path` and reads its table. Tensor data is verified on first access.
    ///
    /// # Errors
    /// When the file cannot be opened, is no `.b158` file, is damaged or truncated, or has another version.
    pub fn open(path: &Path) -> Result<B158, FileError> {
        B158::parse(path.to_path_buf(), map_file(path)?)
    }

    /// Reads a copy of `bytes`.
    ///
    /// # Errors
    /// As for [`B158::open`].
    pub fn from_bytes(bytes: &[u8]) -> Result<B158, FileError> {
        B158::parse(IN_MEMORY.into(), Storage::Owned(bytes.to_vec()))
    }

    /// The strings stored beside the tensors: configuration, vocabulary, training position.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Names, encodings and logical shapes of all tensors, ascending by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, Encoding, &[usize])> {
        self.tensors.iter().map(|(name, slot)| (name.as_str(), slot.encoding, &slot.shape[..]))
    }

    /// Whether the file has a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name`, verified on first access.
    ///
    /// # Errors
    /// When the file has no such tensor, or its data is damaged.
    pub fn require(&self, name: &str) -> Result<Packed<'_>, FileError> {
        let slot = self.tensors.get(name).ok_or_else(|| FileError::Missing {
            path: self.path.clone(),
            tensor: name.to_string(),
            count: self.tensors.len(),
        })?;
        self.verified(name, slot)
    }

    /// A tensor where it lies, with its encoding and shape, and without a look at its bytes: they may be damaged, see
    /// [`B158::verify_all`]. `None` when the file has no such tensor.
    pub fn mapped(&self, name: &str) -> Option<(Encoding, &[usize], MappedSlice)> {
        let slot = self.tensors.get(name)?;
        Some((slot.encoding, &slot.shape, MappedSlice::new(&self.storage, slot.range.clone())?))
    }

    /// Verifies every tensor that was not verified before, on all threads. Reads the whole file.
    ///
    /// # Errors
    /// The first damaged tensor by name.
    pub fn verify_all(&self) -> Result<(), FileError> {
        let tensors: Vec<(&String, &Slot)> = self.tensors.iter().collect();
        tensors.par_iter().find_map_first(|(name, slot)| self.verified(name, slot).err()).map_or(Ok(()), Err)
    }

    fn verified<'a>(&'a self, name: &str, slot: &'a Slot) -> Result<Packed<'a>, FileError> {
        let bytes = &self.storage[slot.range.clone()];
        let packed = Packed { encoding: slot.encoding, shape: &slot.shape, bytes };
        if slot.verified.load(Ordering::Relaxed) {
            return Ok(packed);
        }
        let corrupted =
            |reason: String| FileError::Corrupted { path: self.path.clone(), tensor: Some(name.to_string()), reason };
        let crc = crc32c::crc32c(packed.bytes);
        if crc != slot.crc {
            return Err(corrupted(format!("its checksum is {crc:08x}, expected {:08x}", slot.crc)));
        }
        if !packed.is_well_packed() {
            return Err(corrupted("its codes are not packed weights of -1, 0 and 1".to_string()));
        }
        slot.verified.store(true, Ordering::Relaxed);
        Ok(packed)
    }

    fn parse(path: PathBuf, storage: Storage) -> Result<B158, FileError> {
        let bytes: &[u8] = &storage;
        let corrupted = |reason: String| FileError::corrupted(&path, reason);
        let prologue = Prologue::parse(&path, bytes)?;
        let table = PROLOGUE_BYTES..PROLOGUE_BYTES + prologue.table_bytes;
        let checksum = bytes.get(table.end..).and_then(<[u8]>::first_chunk).copied();
        let (Some(text), Some(checksum)) = (bytes.get(table.clone()), checksum) else {
            return Err(corrupted(format!(
                "its header claims a table of {} bytes in a file of {}",
                prologue.table_bytes,
                bytes.len()
            )));
        };
        let (found, expected) = (crc32c::crc32c(&bytes[..table.end]), u32::from_le_bytes(checksum));
        if found != expected {
            let reason = format!("the checksum of its header is {found:08x}, expected {expected:08x}");
            return Err(corrupted(reason));
        }
        let data = (table.end + CHECKSUM_BYTES)..bytes.len();
        let mut cursor = Cursor { bytes: text };
        let mut metadata = BTreeMap::new();
        for index in 0..prologue.metadata {
            let entry = cursor.text().and_then(|key| Some((key, cursor.text()?)));
            let fresh = entry.is_some_and(|(k, v)| metadata.insert(k.to_string(), v.to_string()).is_none());
            if !fresh {
                return Err(corrupted(format!("metadata entry {index} is malformed or occurs twice")));
            }
        }
        let mut tensors = BTreeMap::new();
        for index in 0..prologue.tensors {
            let slot = Slot::parse(&mut cursor, &data);
            let fresh = slot.is_some_and(|(name, slot)| tensors.insert(name, slot).is_none());
            if !fresh {
                let reason = format!(
                    "entry {index} of its tensor table is malformed, occurs twice, or does not fit the file of {} bytes",
                    bytes.len()
                );
                return Err(corrupted(reason));
            }
        }
        if !cursor.bytes.is_empty() {
            let reason = format!("its table has {} bytes too many", cursor.bytes.len());
            return Err(corrupted(reason));
        }
        Ok(B158 { path, storage: Arc::new(storage), metadata, tensors })
    }
}

/// The fields of the prologue behind magic and version.
struct Prologue {
    tensors: u32,
    metadata: u32,
    table_bytes: usize,
}

impl Prologue {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Prologue, FileError> {
        let corrupted = |reason: String| FileError::corrupted(path, reason);
        let magic = &bytes[..bytes.len().min(MAGIC.len())];
        if magic != MAGIC {
            return Err(corrupted("it does not begin as a .b158 file".to_string()));
        }
        let mut cursor = Cursor { bytes: &bytes[MAGIC.len()..] };
        let version = cursor.u32();
        if let Some(version) = version.filter(|&version| version != VERSION) {
            let reason = format!(
                "found .b158 version {version}, this program reads version {VERSION}; use a program of the file's version"
            );
            return Err(FileError::unsupported(path, reason));
        }
        let mut counts = || Some((cursor.u32()?, cursor.u32()?, cursor.u32()?, cursor.u64()?));
        let Some((tensors, metadata, table_bytes, file_bytes)) = counts() else {
            let reason = format!("it ends inside its header, after {} bytes", bytes.len());
            return Err(corrupted(reason));
        };
        if file_bytes != bytes.len() as u64 {
            let reason = format!("it has {} bytes, expected {file_bytes}: it was truncated or damaged", bytes.len());
            return Err(corrupted(reason));
        }
        match usize::try_from(table_bytes) {
            Ok(table_bytes) if table_bytes <= MAX_TABLE_BYTES => Ok(Prologue { tensors, metadata, table_bytes }),
            _ => Err(corrupted(format!("its table has {table_bytes} bytes, expected at most {MAX_TABLE_BYTES}"))),
        }
    }
}

impl Slot {
    /// Reads one table entry and checks its size and place against the `data` range of the file.
    fn parse(cursor: &mut Cursor<'_>, data: &Range<usize>) -> Option<(String, Slot)> {
        let name = cursor.text()?.to_string();
        let (kind, scales, rank, zero) = (cursor.u8()?, cursor.u8()?, cursor.u8()?, cursor.u8()?);
        let encoding = Encoding::from_fields((kind, scales, cursor.u64()?))?;
        if zero != 0 || usize::from(rank) > MAX_RANK {
            return None;
        }
        let dim = |cursor: &mut Cursor<'_>| usize::try_from(cursor.u64()?).ok();
        let shape = (0..rank).map(|_| dim(cursor)).collect::<Option<Vec<usize>>>()?;
        let (start, length) = (dim(cursor)?, dim(cursor)?);
        let crc = cursor.u32()?;
        let range = start..start.checked_add(length)?;
        let placed = range.start >= data.start
            && range.end <= data.end
            && range.start.is_multiple_of(DATA_ALIGN)
            && encoding.byte_len(&shape) == Some(length);
        placed.then(|| (name, Slot { encoding, shape, range, crc, verified: AtomicBool::new(false) }))
    }
}

#[cfg(test)]
mod tests;
