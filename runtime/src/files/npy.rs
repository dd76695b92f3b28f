//! Reader and writer of `.npy` files, versions 1 and 2: one array, little-endian, row-major.
//!
//! Invariant: the data has exactly the length that the header's dtype and shape imply.

use super::{DType, FileError, HostTensor, IN_MEMORY, TensorView, atomic, map_file};
use std::path::Path;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Headers end on a multiple of this.
const ALIGN: usize = 64;
/// Dimensions that are read at most.
const MAX_RANK: usize = 64;

/// Type descriptions. BF16 has none.
const DESCRIPTIONS: [(DType, &str); 9] = [
    (DType::F64, "<f8"),
    (DType::F32, "<f4"),
    (DType::F16, "<f2"),
    (DType::I64, "<i8"),
    (DType::I32, "<i4"),
    (DType::I16, "<i2"),
    (DType::I8, "|i1"),
    (DType::U8, "|u1"),
    (DType::Bool, "|b1"),
];

/// Reads the array at `path`.
///
/// # Errors
/// When the file cannot be opened, is damaged, is in Fortran order, or has a dtype that is not supported.
pub fn read(path: &Path) -> Result<HostTensor, FileError> {
    parse(path, &map_file(path)?)
}

/// Reads an array from bytes in memory.
///
/// # Errors
/// As for [`read`].
pub fn from_bytes(bytes: &[u8]) -> Result<HostTensor, FileError> {
    parse(Path::new(IN_MEMORY), bytes)
}

/// Writes an array to `path`, atomically.
///
/// # Errors
/// When the file cannot be written, or for BF16, which the format does not have.
pub fn write(path: &Path, tensor: TensorView<'_>) -> Result<(), FileError> {
    let dtype = tensor.dtype();
    let Some((_, description)) = DESCRIPTIONS.iter().find(|(known, _)| *known == dtype) else {
        let reason = format!("the .npy format has no {}; convert the tensor to F32", dtype.name());
        return Err(FileError::unsupported(path, reason));
    };
    let header = header_bytes(description, tensor.shape());
    atomic::write_atomic(path, |w| {
        w.write_all(&header)?;
        w.write_all(tensor.bytes())
    })
}

fn header_bytes(description: &str, shape: &[usize]) -> Vec<u8> {
    let mut dims: String = shape.iter().map(|dim| format!("{dim}, ")).collect();
    let keep = if shape.len() == 1 { 1 } else { 2 };
    dims.truncate(dims.len().saturating_sub(keep));
    let mut text = format!("{{'descr': '{description}', 'fortran_order': False, 'shape': ({dims}), }}");
    // Version 1 has a 16-bit length.
    let wide = text.len() + 2 * ALIGN > usize::from(u16::MAX);
    let prefix = MAGIC.len() + 2 + if wide { 4 } else { 2 };
    let length = (prefix + text.len() + 1).next_multiple_of(ALIGN) - prefix;
    text.extend(std::iter::repeat_n(' ', length - 1 - text.len()));
    text.push('\n');
    let mut header = MAGIC.to_vec();
    if wide {
        header.extend([2, 0]);
        header.extend((length as u32).to_le_bytes());
    } else {
        header.extend([1, 0]);
        header.extend((length as u16).to_le_bytes());
    }
    header.extend(text.as_bytes());
    header
}

fn parse(path: &Path, bytes: &[u8]) -> Result<HostTensor, FileError> {
    let corrupted = |reason: &str| FileError::corrupted(path, reason);
    let (magic, rest) = bytes.split_at_checked(MAGIC.len()).unwrap_or((bytes, &[]));
    if magic != MAGIC {
        return Err(corrupted("it does not begin as a .npy file"));
    }
    let short = || corrupted("it ends inside its header");
    let ([major, _minor], rest) = rest.split_first_chunk().ok_or_else(short)?;
    let (length, rest) = match major {
        1 => {
            let (n, rest) = rest.split_first_chunk().ok_or_else(short)?;
            (usize::from(u16::from_le_bytes(*n)), rest)
        }
        2 => {
            let (n, rest) = rest.split_first_chunk().ok_or_else(short)?;
            (usize::try_from(u32::from_le_bytes(*n)).unwrap_or(usize::MAX), rest)
        }
        _ => {
            let reason = format!("found .npy version {major}, supported are 1 and 2; save it again as version 1");
            return Err(FileError::unsupported(path, reason));
        }
    };
    let (text, data) = rest.split_at_checked(length).ok_or_else(short)?;
    let header = Header::parse(text)
        .ok_or_else(|| corrupted("its header is not a dictionary of descr, fortran_order and shape"))?;
    let Some((dtype, _)) = DESCRIPTIONS.iter().find(|(_, known)| *known == header.description) else {
        let known = DESCRIPTIONS.map(|(_, name)| name).join(", ");
        let reason = format!("found dtype `{}`, supported are {known}; convert the array", header.description);
        return Err(FileError::unsupported(path, reason));
    };
    if header.fortran_order {
        let reason = "found an array in Fortran order, expected C order; save numpy.ascontiguousarray(array)";
        return Err(FileError::unsupported(path, reason));
    }
    TensorView::new(*dtype, &header.shape, data)
        .map(|view| view.to_owned())
        .map_err(|error| corrupted(&error.to_string()))
}

struct Header<'a> {
    description: &'a str,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl<'a> Header<'a> {
    /// Parses the header's Python dictionary; its three keys may come in any order.
    fn parse(text: &'a [u8]) -> Option<Header<'a>> {
        let mut scan = Scan { rest: std::str::from_utf8(text).ok()? };
        let (mut description, mut fortran_order, mut shape) = (None, None, None);
        scan.symbol("{")?;
        while scan.symbol("}").is_none() {
            let key = scan.string()?;
            scan.symbol(":")?;
            let new = match key {
                "descr" => description.replace(scan.string()?).is_none(),
                "fortran_order" => fortran_order.replace(scan.boolean()?).is_none(),
                "shape" => shape.replace(scan.shape()?).is_none(),
                _ => false,
            };
            if !new {
                return None;
            }
            if scan.symbol(",").is_none() {
                scan.symbol("}")?;
                break;
            }
        }
        let (description, fortran_order, shape) = (description?, fortran_order?, shape?);
        scan.rest.trim().is_empty().then_some(Header { description, fortran_order, shape })
    }
}

/// A scanner over the Python literals that occur in headers.
struct Scan<'a> {
    rest: &'a str,
}

impl<'a> Scan<'a> {
    fn symbol(&mut self, symbol: &str) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(symbol)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let text = self.rest.trim_start();
        let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let (inside, rest) = text[1..].split_once(quote)?;
        self.rest = rest;
        Some(inside)
    }

    fn boolean(&mut self) -> Option<bool> {
        if self.symbol("False").is_some() {
            return Some(false);
        }
        self.symbol("True").map(|()| true)
    }

    fn shape(&mut self) -> Option<Vec<usize>> {
        let mut dims = Vec::new();
        self.symbol("(")?;
        while self.symbol(")").is_none() {
            let text = self.rest.trim_start();
            let digits = text.find(|c: char| !c.is_ascii_digit())?;
            dims.push(text[..digits].parse().ok()?);
            // Python 2 marked long integers.
            self.rest = text[digits..].strip_prefix('L').unwrap_or(&text[digits..]);
            if dims.len() > MAX_RANK {
                return None;
            }
            if self.symbol(",").is_none() {
                self.symbol(")")?;
                break;
            }
        }
        Some(dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, text: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([version, 0]);
        if version == 1 {
            bytes.extend((text.len() as u16).to_le_bytes());
        } else {
            bytes.extend((text.len() as u32).to_le_bytes());
        }
        bytes.extend(text.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn arrays_survive_a_round_trip() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.npy");
        let shapes: [&[usize]; 5] = [&[], &[3], &[2, 3], &[0, 4], &[1, 2, 1, 3]];
        for (dtype, _) in DESCRIPTIONS {
            for shape in shapes {
                let n = dtype.byte_len(shape).expect("small");
                let bytes = (0..n).map(|i| (i % 2) as u8).collect();
                let tensor = HostTensor::new(dtype, shape.to_vec(), bytes).expect("sizes agree");
                write(&path, tensor.view()).expect("written");
                assert_eq!(read(&path).expect("read"), tensor);
            }
        }
        let bf16 = HostTensor::new(DType::BF16, vec![1], vec![0; 2]).expect("sizes agree");
        let error = write(&path, bf16.view()).expect_err("no such dtype");
        assert!(error.to_string().contains("has no BF16"), "{error}");
    }

    #[test]
    fn headers_are_those_of_numpy() {
        let dict = |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
        for (shape, text) in [(&[][..], "()"), (&[3], "(3,)"), (&[2, 3], "(2, 3)")] {
            let header = header_bytes("<f4", shape);
            assert_eq!(header.len() % ALIGN, 0);
            assert_eq!(header.last(), Some(&b'\n'));
            assert_eq!(&header[..8], b"\x93NUMPY\x01\x00");
            assert_eq!(std::str::from_utf8(&header[10..]).expect("text").trim_end(), dict(text));
        }
    }

    #[test]
    fn both_versions_and_any_key_order_are_read() {
        let text = "{\"shape\": (2 , 1L), 'fortran_order': False, 'descr': \"<i4\"} \n";
        for version in [1, 2] {
            let tensor = from_bytes(&file(version, text, &[1, 0, 0, 0, 2, 0, 0, 0])).expect("read");
            assert_eq!(tensor.shape(), [2, 1]);
            assert_eq!(tensor.to_i64().expect("integers"), [1, 2]);
        }
    }

    #[test]
    fn what_cannot_be_read_gets_a_sentence() {
        let dict = |descr: &str, fortran: &str, shape: &str| {
            format!("{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}")
        };
        let cases = [
            (b"PK\x03\x04".to_vec(), 5, "does not begin as a .npy"),
            (Vec::new(), 5, "does not begin as a .npy"),
            (file(3, "{}", &[]), 1, "version 3, supported are 1 and 2"),
            (file(1, "{}", &[]), 5, "not a dictionary of"),
            (file(1, &dict("'>f4'", "False", "(1,)"), &[0; 4]), 1, "dtype `>f4`"),
            (file(1, &dict("[('a', '<f4')]", "False", "(1,)"), &[0; 4]), 5, "not a dictionary of"),
            (file(1, &dict("'<f4'", "True", "(1,)"), &[0; 4]), 1, "Fortran order"),
            (file(1, &dict("'<f4'", "False", "(2,)"), &[0; 4]), 5, "needs 8 bytes, found 4"),
            (file(1, &dict("'<f4'", "False", "(1,)"), &[0; 5]), 5, "needs 4 bytes, found 5"),
            (file(1, &dict("'<f4'", "False", "(9999999999, 9999999999)"), &[]), 5, "more bytes than can be addressed"),
            (file(1, &dict("'<f4'", "False", "(99999999999999999999,)"), &[]), 5, "not a dictionary"),
            (file(2, "{}", &[])[..14 - 1].to_vec(), 5, "ends inside its header"),
        ];
        for (bytes, code, sentence) in cases {
            let error = from_bytes(&bytes).expect_err(sentence);
            assert!(error.to_string().contains(sentence), "{error}");
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }

    #[test]
    fn mutated_and_truncated_bytes_never_panic() {
        let mut good = header_bytes("<f4", &[2, 2]);
        good.extend([0; 16]);
        assert!(from_bytes(&good).is_ok());
        for end in 0..good.len() {
            assert!(from_bytes(&good[..end]).is_err());
        }
        let mut bytes = good.clone();
        for at in 0..good.len() {
            for value in 0..=255 {
                bytes[at] = value;
                // Any outcome is fine as long as there is one.
                std::hint::black_box(from_bytes(&bytes).is_ok());
            }
            bytes[at] = good[at];
        }
    }
}
