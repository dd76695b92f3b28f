//! Reader and writer of safetensors files.
//!
//! Invariant: every range is checked against the file before a tensor can be seen, so access never fails. Equal contents
//! are written as equal bytes.

use super::{DType, FileError, IN_MEMORY, MappedSlice, Storage, TensorView, atomic, map_file};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest header that is read, in bytes.
pub const MAX_HEADER_BYTES: usize = 100_000_000;
/// Bytes of the header's length at the beginning of the file.
const LENGTH_BYTES: usize = 8;
const METADATA: &str = "__metadata__";

/// An open safetensors file.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    storage: Arc<Storage>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    /// Byte range in the file.
    range: Range<usize>,
}

impl SafeTensors {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// When the file cannot be opened, is damaged, or has a dtype other than those of [`DType`].
    pub fn open(path: &Path) -> Result<SafeTensors, FileError> {
        SafeTensors::parse(path.to_path_buf(), map_file(path)?)
    }

    /// Reads a copy of `bytes`.
    ///
    /// # Errors
    /// When the content is damaged or has a dtype other than those of [`DType`].
    pub fn from_bytes(bytes: &[u8]) -> Result<SafeTensors, FileError> {
        SafeTensors::parse(IN_MEMORY.into(), Storage::Owned(bytes.to_vec()))
    }

    /// The free-form strings of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Names of all tensors, ascending.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor `name`, if the file has it.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get(name).map(|entry| self.view(entry))
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// When the file has no tensor of this name.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>, FileError> {
        self.get(name).ok_or_else(|| FileError::Missing {
            path: self.path.clone(),
            tensor: name.to_string(),
            count: self.tensors.len(),
        })
    }

    /// The bytes of the tensor `name` where they lie, if the file has it.
    pub fn mapped(&self, name: &str) -> Option<MappedSlice> {
        MappedSlice::new(&self.storage, self.tensors.get(name)?.range.clone())
    }

    /// All tensors with their names, ascending.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, TensorView<'_>)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), self.view(entry)))
    }

    fn view<'a>(&'a self, entry: &'a Entry) -> TensorView<'a> {
        TensorView::new(entry.dtype, &entry.shape, &self.storage[entry.range.clone()])
            .expect("ranges were checked when the file was opened")
    }

    fn parse(path: PathBuf, storage: Storage) -> Result<SafeTensors, FileError> {
        let total = storage.len();
        let Some((length, rest)) = storage.split_first_chunk::<LENGTH_BYTES>() else {
            let reason = format!("it has {total} bytes, expected at least {LENGTH_BYTES}");
            return Err(FileError::corrupted(&path, reason));
        };
        let length = u64::from_le_bytes(*length);
        let header = match usize::try_from(length) {
            Ok(n) if n <= MAX_HEADER_BYTES => rest.get(..n),
            _ => None,
        };
        let Some(header) = header else {
            let reason = format!(
                "its header claims {length} bytes, expected at most {} in a file of {total} bytes",
                rest.len().min(MAX_HEADER_BYTES)
            );
            return Err(FileError::corrupted(&path, reason));
        };
        let data = LENGTH_BYTES + header.len();
        // `Header` has a fixed depth, and serde_json skips unknown values without recursion.
        let header: Header = serde_json::from_slice(header)
            .map_err(|error| FileError::corrupted(&path, format!("its header is not understood: {error}")))?;
        let mut tensors = BTreeMap::new();
        for (name, info) in header.tensors {
            let entry = info.locate(&path, &name, data..total)?;
            tensors.insert(name, entry);
        }
        Ok(SafeTensors { path, storage: Arc::new(storage), metadata: header.metadata, tensors })
    }
}

/// The header as written: one JSON object.
#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Info>,
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Info {
    /// Checks dtype, shape and offsets against the `data` section, a byte range of the file.
    fn locate(self, path: &Path, name: &str, data: Range<usize>) -> Result<Entry, FileError> {
        let Some(dtype) = DType::from_name(&self.dtype) else {
            let known = DType::NAMES.map(|(_, name)| name).join(", ");
            let reason = format!("tensor `{name}` has dtype `{}`, supported are {known}; convert it", self.dtype);
            return Err(FileError::unsupported(path, reason));
        };
        let corrupted =
            |reason| FileError::Corrupted { path: path.to_path_buf(), tensor: Some(name.to_string()), reason };
        let (start, end) = self.data_offsets;
        let available = data.len();
        let inside = match (usize::try_from(start), usize::try_from(end)) {
            (Ok(start), Ok(end)) if start <= end && end <= available => Some(start..end),
            _ => None,
        };
        let inside = inside.ok_or_else(|| {
            corrupted(format!("its data lies at {start}..{end}, the file has data at 0..{available}"))
        })?;
        let shape: Option<Vec<usize>> = self.shape.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let bytes = shape.as_deref().and_then(|shape| dtype.byte_len(shape));
        match (shape, bytes) {
            (Some(shape), Some(bytes)) if bytes == inside.len() => {
                let range = data.start + inside.start..data.start + inside.end;
                Ok(Entry { dtype, shape, range })
            }
            _ => {
                Err(corrupted(format!("{} of shape {:?} does not have {} bytes", self.dtype, self.shape, inside.len())))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    let duplicate = if name == METADATA {
                        header.metadata = map.next_value()?;
                        std::mem::replace(&mut has_metadata, true)
                    } else {
                        header.tensors.insert(name.clone(), map.next_value()?).is_some()
                    };
                    if duplicate {
                        return Err(A::Error::custom(format!("`{name}` occurs twice")));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Writes tensors and metadata to `path`, atomically. Data is ordered by element size, largest first, then by name.
///
/// # Errors
/// When the file cannot be written, or a name occurs twice or is reserved.
pub fn write(
    path: &Path,
    tensors: &[(&str, TensorView<'_>)],
    metadata: &BTreeMap<String, String>,
) -> Result<(), FileError> {
    let mut order: Vec<&(&str, TensorView<'_>)> = tensors.iter().collect();
    order.sort_by_key(|(name, view)| (std::cmp::Reverse(view.dtype().size()), *name));
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    let twice = names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
    if let Some(name) = twice.or(names.iter().copied().find(|name| *name == METADATA)) {
        let reason = format!("tensor name `{name}` is reserved or occurs twice; rename one");
        return Err(FileError::unsupported(path, reason));
    }
    let header = header_text(&order, metadata);
    if header.len() > MAX_HEADER_BYTES {
        let reason = format!(
            "the header would have {} bytes, the format allows {MAX_HEADER_BYTES}; write fewer tensors or metadata",
            header.len()
        );
        return Err(FileError::unsupported(path, reason));
    }
    atomic::write_atomic(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(header.as_bytes())?;
        order.iter().try_for_each(|(_, view)| w.write_all(view.bytes()))
    })
}

/// The JSON header, padded with spaces so that the data is aligned to 8 bytes.
fn header_text(order: &[&(&str, TensorView<'_>)], metadata: &BTreeMap<String, String>) -> String {
    use serde_json::{Map, Value, json};
    let mut header = Map::new();
    if !metadata.is_empty() {
        let strings = metadata.iter().map(|(key, value)| (key.clone(), Value::from(value.as_str())));
        header.insert(METADATA.to_string(), Value::Object(strings.collect()));
    }
    let mut start = 0;
    for (name, view) in order {
        let end = start + view.bytes().len();
        let info = json!({
            "dtype": view.dtype().name(),
            "shape": view.shape(),
            "data_offsets": [start, end],
        });
        header.insert(name.to_string(), info);
        start = end;
    }
    let mut text = Value::Object(header).to_string();
    let padding = text.len().next_multiple_of(LENGTH_BYTES) - text.len();
    text.extend(std::iter::repeat_n(' ', padding));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::HostTensor;
    use ::safetensors as oracle;

    fn samples() -> Vec<(&'static str, HostTensor)> {
        let tensor = |dtype: DType, shape: &[usize]| {
            let n = dtype.byte_len(shape).expect("small");
            let modulus = if dtype == DType::Bool { 2 } else { 251 };
            let bytes = (0..n).map(|i| (i * 7 % modulus) as u8).collect();
            HostTensor::new(dtype, shape.to_vec(), bytes).expect("sizes agree")
        };
        let names = ["z", "a.weight", "b \"quoted\"", "ü", "e", "f", "g", "h", "i", "j"];
        let shapes: [&[usize]; 10] = [&[2, 3], &[5], &[], &[0, 4], &[1, 1, 2], &[3], &[7], &[2, 2], &[1], &[9]];
        let dtypes = DType::NAMES.iter().map(|(dtype, _)| *dtype);
        names.into_iter().zip(dtypes.zip(shapes).map(|(d, s)| tensor(d, s))).collect()
    }

    fn written(metadata: &BTreeMap<String, String>) -> Vec<u8> {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("t.safetensors");
        let samples = samples();
        let views: Vec<_> = samples.iter().map(|(name, t)| (*name, t.view())).collect();
        write(&path, &views, metadata).expect("written");
        let mapped = SafeTensors::open(&path).expect("opened");
        assert_eq!(mapped.metadata(), metadata);
        std::fs::read(&path).expect("read")
    }

    fn metadata() -> BTreeMap<String, String> {
        [("config", "{\"a\": [1, 2]}"), ("note", "ä\n")].map(|(k, v)| (k.to_string(), v.to_string())).into()
    }

    #[test]
    fn the_reference_crate_reads_what_is_written() {
        let bytes = written(&metadata());
        let file = oracle::SafeTensors::deserialize(&bytes).expect("the reference reads it");
        assert_eq!(file.len(), samples().len());
        for (name, tensor) in samples() {
            let view = file.tensor(name).expect("present");
            assert_eq!(view.dtype().to_string(), tensor.dtype().name());
            assert_eq!(view.shape(), tensor.shape());
            assert_eq!(view.data(), tensor.bytes());
        }
        let (_, header) = oracle::SafeTensors::read_metadata(&bytes).expect("header");
        let found: BTreeMap<_, _> = header.metadata().clone().expect("some").into_iter().collect();
        assert_eq!(found, metadata());
    }

    #[test]
    fn what_the_reference_crate_writes_is_read() {
        use oracle::tensor::TensorView as Theirs;
        let samples = samples();
        let views: Vec<_> = samples
            .iter()
            .map(|(name, t)| {
                let dtype = serde_json::from_value(t.dtype().name().into()).expect("a known dtype");
                let view = Theirs::new(dtype, t.shape().to_vec(), t.bytes()).expect("sizes agree");
                (name.to_string(), view)
            })
            .collect();
        let info = metadata().into_iter().collect();
        let bytes = oracle::serialize(views, Some(info)).expect("the reference writes");
        let file = SafeTensors::from_bytes(&bytes).expect("read");
        assert_eq!(*file.metadata(), metadata());
        assert_eq!(file.names().len(), samples.len());
        for (name, tensor) in &samples {
            assert_eq!(file.require(name).expect("present"), tensor.view());
        }
        assert!(file.iter().all(|(name, view)| file.get(name) == Some(view)));
        let error = file.require("missing").expect_err("not in the file");
        assert!(error.to_string().contains("no tensor `missing` among the 10"), "{error}");
    }

    #[test]
    fn equal_contents_give_equal_bytes() {
        assert_eq!(written(&metadata()), written(&metadata()));
        let none = written(&BTreeMap::new());
        assert!(SafeTensors::from_bytes(&none).expect("read").metadata().is_empty());
    }

    #[test]
    fn names_are_checked_before_writing() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("t.safetensors");
        let t = HostTensor::from_f32(&[1], &[0.0]).expect("sizes agree");
        for names in [["x", "x"], ["x", METADATA]] {
            let views = names.map(|name| (name, t.view()));
            assert_eq!(write(&path, &views, &BTreeMap::new()).expect_err("refused").exit_code(), 1);
        }
        assert!(!path.exists());
    }

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn bad_headers_get_a_sentence() {
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            file(&format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), 8)
        };
        let deep = format!(r#"{{"t":{{"x":{}1{}}}}}"#, "[".repeat(5000), "]".repeat(5000));
        let twice = r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        let cases = [
            (Vec::new(), "expected at least 8"),
            (vec![0xFF; 12], "its header claims"),
            (file("{}", 0)[..9].to_vec(), "its header claims"),
            (file("[]", 0), "not understood"),
            (file("null", 0), "not understood"),
            (file(&deep, 0), "missing field `dtype`"),
            (file(twice, 8), "`t` occurs twice"),
            (file(r#"{"__metadata__":{"a":1}}"#, 0), "not understood"),
            (entry("F32", "[3]", "[0,8]"), "F32 of shape [3] does not have 8 bytes"),
            (entry("F32", "[2]", "[4,12]"), "lies at 4..12"),
            (entry("F32", "[2]", "[8,0]"), "lies at 8..0"),
            (entry("F32", "[4294967296,4294967296,4]", "[0,0]"), "does not have 0 bytes"),
            (entry("F32", "[18446744073709551615]", "[0,8]"), "does not have 8 bytes"),
            (entry("F32", "[-1]", "[0,8]"), "not understood"),
            (entry("F32", "[1e3]", "[0,8]"), "not understood"),
            (entry("F8_E5M2", "[8]", "[0,8]"), "dtype `F8_E5M2`, supported are F64, F32"),
        ];
        for (bytes, sentence) in cases {
            let error = SafeTensors::from_bytes(&bytes).expect_err(sentence);
            assert!(error.to_string().contains(sentence), "{error}");
            let unsupported = matches!(error, FileError::Unsupported { .. });
            assert_eq!(error.exit_code(), if unsupported { 1 } else { 5 });
        }
        assert!(SafeTensors::from_bytes(&entry("F32", "[0,18446744073709551615]", "[8,8]")).is_ok());
    }

    #[test]
    fn mutated_and_truncated_bytes_never_panic() {
        let good = written(&metadata());
        let visit = |bytes: &[u8]| {
            if let Ok(file) = SafeTensors::from_bytes(bytes) {
                for (_, view) in file.iter() {
                    std::hint::black_box((view.to_f32(), view.to_i64().ok()));
                }
            }
        };
        for end in 0..good.len() {
            visit(&good[..end]);
        }
        let mut bytes = good.clone();
        for at in 0..good.len() {
            for value in [0, 0xFF, b'9', b'[', b'"', good[at] ^ 1, good[at] ^ 0x80] {
                bytes[at] = value;
                visit(&bytes);
            }
            bytes[at] = good[at];
        }
    }
}
