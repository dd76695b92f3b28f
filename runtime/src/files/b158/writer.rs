//! Writing of weight containers.
//!
//! Invariant: equal contents give equal bytes, whatever the order in which tensors are given.

use super::{
    CHECKSUM_BYTES, DATA_ALIGN, Encoding, MAGIC, MAX_RANK, MAX_TABLE_BYTES, PROLOGUE_BYTES, ScaleEncoding, Ternary,
    VERSION, block_scales, pack_ternary,
};
use crate::files::tensor::f32_bytes;
use crate::files::{FileError, atomic};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    name: &'a str,
    pub(super) encoding: Encoding,
    shape: Vec<usize>,
    pub(super) bytes: Cow<'a, [u8]>,
}

impl<'a> Entry<'a> {
    /// A tensor whose `bytes` already have the stored form.
    pub fn stored(name: &'a str, encoding: Encoding, shape: &[usize], bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        Entry { name, encoding, shape: shape.to_vec(), bytes: bytes.into() }
    }

    /// A float32 tensor.
    pub fn f32(name: &'a str, shape: &[usize], values: &'a [f32]) -> Self {
        Entry::stored(name, Encoding::F32, shape, f32_bytes(values))
    }

    /// A float32 tensor that owns its values.
    pub fn f32_owned(name: &'a str, shape: &[usize], values: Vec<f32>) -> Self {
        Entry::stored(name, Encoding::F32, shape, f32_bytes(&values).into_owned())
    }

    /// A tensor stored as bfloat16, rounded to nearest even.
    pub fn bf16(name: &'a str, shape: &[usize], values: &[f32]) -> Self {
        Entry::stored(name, Encoding::Bf16, shape, bf16_bytes(values))
    }

    /// A tensor of 32-bit integers.
    pub fn i32(name: &'a str, shape: &[usize], values: &[i32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Entry::stored(name, Encoding::I32, shape, bytes)
    }

    /// A quantised [n, k] matrix.
    ///
    /// # Panics
    /// When the numbers of codes and scales do not follow from n, k and the group size.
    pub fn ternary(name: &'a str, n: usize, k: usize, weights: &Ternary, scales: ScaleEncoding) -> Self {
        let mut entry = Entry::ternary_stack(name, n, k, std::slice::from_ref(weights), scales);
        entry.shape.remove(0);
        entry
    }

    /// Quantised [n, k] matrices of one group size as one tensor [count, n, k].
    ///
    /// # Panics
    /// As for [`Entry::ternary`], when group sizes differ, or when there is no matrix.
    pub fn ternary_stack(name: &'a str, n: usize, k: usize, weights: &[Ternary], scales: ScaleEncoding) -> Self {
        let group = weights[0].group;
        let per_row = k.div_ceil(group.max(1));
        let (mut bytes, mut values) = (vec![], vec![]);
        for part in weights {
            let count = n.checked_mul(per_row);
            assert_eq!((part.group, Some(part.scales.len())), (group, count), "one scale per row and group");
            bytes.extend(pack_ternary(&part.codes, n, k));
            values.extend(block_scales(&part.scales, per_row));
        }
        match scales {
            ScaleEncoding::F32 => bytes.extend_from_slice(&f32_bytes(&values)),
            ScaleEncoding::Bf16 => bytes.extend_from_slice(&bf16_bytes(&values)),
        }
        Entry::stored(name, Encoding::Ternary { group, scales }, &[weights.len(), n, k], bytes)
    }
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
}

/// Writes tensors and metadata to `path`, atomically. Equal contents give equal bytes, whatever the order of `tensors`.
///
/// # Errors
/// When the file cannot be written, a name occurs twice, or the bytes of a tensor do not have the size that its encoding
/// and shape imply.
pub fn write(path: &Path, tensors: &[Entry<'_>], metadata: &BTreeMap<String, String>) -> Result<(), FileError> {
    let mut order: Vec<&Entry<'_>> = tensors.iter().collect();
    order.sort_by_key(|entry| entry.name);
    let refused = |reason: String| FileError::unsupported(path, reason);
    for (i, entry) in order.iter().enumerate() {
        let Entry { name, encoding, shape, bytes } = entry;
        if i > 0 && order[i - 1].name == *name {
            return Err(refused(format!("tensor name `{name}` occurs twice; rename one")));
        }
        if encoding.byte_len(shape) != Some(bytes.len()) || shape.len() > MAX_RANK {
            return Err(refused(format!(
                "tensor `{name}`: {encoding:?} of shape {shape:?} does not have {} bytes; correct its shape",
                bytes.len()
            )));
        }
    }
    let header = header_bytes(&order, metadata).ok_or_else(|| {
        let reason = format!("names and metadata exceed {MAX_TABLE_BYTES} bytes; store less metadata");
        refused(reason)
    })?;
    atomic::write_atomic(path, |w| {
        w.write_all(&header)?;
        let mut at = header.len();
        for entry in &order {
            write_padding(w, at)?;
            w.write_all(&entry.bytes)?;
            at = at.next_multiple_of(DATA_ALIGN) + entry.bytes.len();
        }
        Ok(())
    })
}

fn write_padding(w: &mut dyn io::Write, at: usize) -> io::Result<()> {
    w.write_all(&[0; DATA_ALIGN][..at.next_multiple_of(DATA_ALIGN) - at])
}

/// Prologue, table and header checksum; `None` when a length does not fit its field.
fn header_bytes(order: &[&Entry<'_>], metadata: &BTreeMap<String, String>) -> Option<Vec<u8>> {
    let text = |out: &mut Vec<u8>, text: &str| -> Option<()> {
        out.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
        out.extend(text.as_bytes());
        (out.len() <= MAX_TABLE_BYTES).then_some(())
    };
    // Entries have a fixed size apart from name and rank, so the data's start is known before the offsets.
    let entry_bytes = |entry: &&Entry<'_>| 4 + entry.name.len() + 4 + 8 + 8 * entry.shape.len() + 20;
    let mut table = Vec::new();
    for (key, value) in metadata {
        text(&mut table, key)?;
        text(&mut table, value)?;
    }
    let table_bytes = table.len() + order.iter().map(entry_bytes).sum::<usize>();
    let mut at = PROLOGUE_BYTES + table_bytes + CHECKSUM_BYTES;
    for entry in order {
        at = at.next_multiple_of(DATA_ALIGN);
        text(&mut table, entry.name)?;
        let (encoding, scales, group) = entry.encoding.to_fields();
        table.extend([encoding, scales, u8::try_from(entry.shape.len()).ok()?, 0]);
        table.extend(group.to_le_bytes());
        for &number in entry.shape.iter().chain(&[at, entry.bytes.len()]) {
            table.extend((number as u64).to_le_bytes());
        }
        table.extend(crc32c::crc32c(&entry.bytes).to_le_bytes());
        at += entry.bytes.len();
    }
    debug_assert_eq!(table.len(), table_bytes);
    if table_bytes > MAX_TABLE_BYTES {
        return None;
    }
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    for number in [order.len(), metadata.len(), table_bytes] {
        header.extend(u32::try_from(number).ok()?.to_le_bytes());
    }
    header.extend((at as u64).to_le_bytes());
    header.extend(table);
    let checksum = crc32c::crc32c(&header);
    header.extend(checksum.to_le_bytes());
    Some(header)
}
