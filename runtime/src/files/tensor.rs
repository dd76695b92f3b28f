//! Tensors on the host as files hold them: a dtype, a shape and little-endian bytes in row-major order.
//!
//! Invariant: the byte count of a view or tensor equals the product of its shape times the size of its dtype.

use std::borrow::Cow;
use std::fmt;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE float64.
    F64,
    /// IEEE float32.
    F32,
    /// IEEE float16.
    F16,
    /// The upper half of a float32.
    BF16,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte, zero or one.
    Bool,
}

impl DType {
    /// All element types, with their names in safetensors files.
    pub const NAMES: [(DType, &'static str); 10] = [
        (DType::F64, "F64"),
        (DType::F32, "F32"),
        (DType::F16, "F16"),
        (DType::BF16, "BF16"),
        (DType::I64, "I64"),
        (DType::I32, "I32"),
        (DType::I16, "I16"),
        (DType::I8, "I8"),
        (DType::U8, "U8"),
        (DType::Bool, "BOOL"),
    ];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 | DType::I16 => 2,
            DType::I8 | DType::U8 | DType::Bool => 1,
        }
    }

    /// Name in safetensors files.
    pub fn name(self) -> &'static str {
        DType::NAMES.iter().find(|(dtype, _)| *dtype == self).map_or("", |(_, name)| name)
    }

    /// The element type of a safetensors name.
    pub fn from_name(name: &str) -> Option<DType> {
        DType::NAMES.iter().find(|(_, known)| *known == name).map(|(dtype, _)| *dtype)
    }

    /// Bytes of a tensor of this type; `None` when the number does not fit the address space.
    pub fn byte_len(self, shape: &[usize]) -> Option<usize> {
        element_count(shape)?.checked_mul(self.size()).filter(|&n| n <= isize::MAX as usize)
    }
}

/// Product of the dimensions; `None` on overflow. A dimension of zero makes it zero whatever the others are.
pub(super) fn element_count(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))
}

/// Why bytes and a shape do not make a tensor, or a tensor not the values asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorError {
    /// The number of bytes does not follow from the shape.
    Size {
        /// Element type.
        dtype: DType,
        /// Dimensions.
        shape: Vec<usize>,
        /// Bytes found.
        found: usize,
    },
    /// Integers were asked for and the tensor holds floats.
    NotInteger {
        /// Element type found.
        dtype: DType,
    },
}

impl fmt::Display for TensorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TensorError::Size { dtype, shape, found } => {
                write!(f, "{} of shape {shape:?} needs ", dtype.name())?;
                match dtype.byte_len(shape) {
                    Some(n) => write!(f, "{n} bytes, found {found}"),
                    None => write!(f, "more bytes than can be addressed, found {found}"),
                }
            }
            TensorError::NotInteger { dtype } => {
                write!(f, "found a tensor of {}, expected integers; convert it to I64 or I32", dtype.name())
            }
        }
    }
}

impl std::error::Error for TensorError {}

/// A borrowed tensor. `bytes` may have any alignment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorView<'a> {
    dtype: DType,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// A view of little-endian row-major `bytes`.
    ///
    /// # Errors
    /// When the byte count does not follow from dtype and shape.
    pub fn new(dtype: DType, shape: &'a [usize], bytes: &'a [u8]) -> Result<Self, TensorError> {
        if dtype.byte_len(shape) != Some(bytes.len()) {
            return Err(TensorError::Size { dtype, shape: shape.to_vec(), found: bytes.len() });
        }
        Ok(TensorView { dtype, shape, bytes })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// The little-endian elements in row-major order.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements as float32: exact from F32, F16, BF16 and small integers, rounded to nearest otherwise.
    pub fn to_f32(&self) -> Vec<f32> {
        use half::{bf16, f16};
        let b = self.bytes;
        match self.dtype {
            DType::F64 => each(b, |v| f64::from_le_bytes(v) as f32),
            DType::F32 => each(b, f32::from_le_bytes),
            DType::F16 => each(b, |v| f16::from_le_bytes(v).to_f32()),
            DType::BF16 => each(b, |v| bf16::from_le_bytes(v).to_f32()),
            DType::I64 => each(b, |v| i64::from_le_bytes(v) as f32),
            DType::I32 => each(b, |v| i32::from_le_bytes(v) as f32),
            DType::I16 => each(b, |v| f32::from(i16::from_le_bytes(v))),
            DType::I8 => each(b, |v| f32::from(i8::from_le_bytes(v))),
            DType::U8 => each(b, |v| f32::from(u8::from_le_bytes(v))),
            DType::Bool => each(b, |[v]| if v == 0 { 0.0 } else { 1.0 }),
        }
    }

    /// The elements as integers; booleans become 0 and 1.
    ///
    /// # Errors
    /// When the tensor holds floats.
    pub fn to_i64(&self) -> Result<Vec<i64>, TensorError> {
        let b = self.bytes;
        Ok(match self.dtype {
            DType::I64 => each(b, i64::from_le_bytes),
            DType::I32 => each(b, |v| i64::from(i32::from_le_bytes(v))),
            DType::I16 => each(b, |v| i64::from(i16::from_le_bytes(v))),
            DType::I8 => each(b, |v| i64::from(i8::from_le_bytes(v))),
            DType::U8 => each(b, |v| i64::from(u8::from_le_bytes(v))),
            DType::Bool => each(b, |[v]| i64::from(v != 0)),
            dtype @ (DType::F64 | DType::F32 | DType::F16 | DType::BF16) => {
                return Err(TensorError::NotInteger { dtype });
            }
        })
    }

    /// A copy that owns its bytes.
    pub fn to_owned(&self) -> HostTensor {
        HostTensor { dtype: self.dtype, shape: self.shape.to_vec(), bytes: self.bytes.to_vec() }
    }
}

fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| f(*chunk)).collect()
}

/// An owned tensor, shared by all file formats.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// A tensor of little-endian row-major `bytes`.
    ///
    /// # Errors
    /// When the byte count does not follow from dtype and shape.
    pub fn new(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Self, TensorError> {
        TensorView::new(dtype, &shape, &bytes)?;
        Ok(HostTensor { dtype, shape, bytes })
    }

    /// An F32 tensor.
    ///
    /// # Errors
    /// When the number of values does not follow from the shape.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Result<Self, TensorError> {
        HostTensor::new(DType::F32, shape.to_vec(), f32_bytes(values).into_owned())
    }

    /// An I32 tensor.
    ///
    /// # Errors
    /// When the number of values does not follow from the shape.
    pub fn from_i32(shape: &[usize], values: &[i32]) -> Result<Self, TensorError> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        HostTensor::new(DType::I32, shape.to_vec(), bytes)
    }

    /// An I64 tensor.
    ///
    /// # Errors
    /// When the number of values does not follow from the shape.
    pub fn from_i64(shape: &[usize], values: &[i64]) -> Result<Self, TensorError> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        HostTensor::new(DType::I64, shape.to_vec(), bytes)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The little-endian elements in row-major order.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The tensor as a view.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: &self.shape, bytes: &self.bytes }
    }

    /// See [`TensorView::to_f32`].
    pub fn to_f32(&self) -> Vec<f32> {
        self.view().to_f32()
    }

    /// See [`TensorView::to_i64`].
    ///
    /// # Errors
    /// When the tensor holds floats.
    pub fn to_i64(&self) -> Result<Vec<i64>, TensorError> {
        self.view().to_i64()
    }
}

/// The little-endian bytes of `values`, without a copy on little-endian machines.
pub(super) fn f32_bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        let (start, len) = (values.as_ptr().cast::<u8>(), size_of_val(values));
        // SAFETY: the pointer and length cover exactly the initialised slice `values`, bytes have no alignment or
        // validity requirement, and the result borrows `values`.
        Cow::Borrowed(unsafe { std::slice::from_raw_parts(start, len) })
    } else {
        Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        assert!(HostTensor::from_f32(&[2, 3], &[0.0; 6]).is_ok());
        let error = HostTensor::from_f32(&[2, 3], &[0.0; 5]).expect_err("one value is missing");
        assert_eq!(error.to_string(), "F32 of shape [2, 3] needs 24 bytes, found 20");
        for shape in [&[usize::MAX, 2][..], &[1 << 40, 1 << 40], &[usize::MAX]] {
            assert_eq!(DType::F64.byte_len(shape), None);
            assert!(TensorView::new(DType::F64, shape, &[]).is_err());
        }
        assert_eq!(DType::F64.byte_len(&[usize::MAX, 0, 7]), Some(0));
        assert_eq!(DType::Bool.byte_len(&[]), Some(1));
    }

    #[test]
    fn values_convert() {
        let cases: [(DType, &[u8], f32, Option<i64>); 10] = [
            (DType::F64, &1.5f64.to_le_bytes(), 1.5, None),
            (DType::F32, &(-2.25f32).to_le_bytes(), -2.25, None),
            (DType::F16, &[0x00, 0x3E], 1.5, None),
            (DType::BF16, &[0xC0, 0x3F], 1.5, None),
            (DType::I64, &(-7i64).to_le_bytes(), -7.0, Some(-7)),
            (DType::I32, &70_000i32.to_le_bytes(), 70_000.0, Some(70_000)),
            (DType::I16, &(-300i16).to_le_bytes(), -300.0, Some(-300)),
            (DType::I8, &[0xFF], -1.0, Some(-1)),
            (DType::U8, &[0xFF], 255.0, Some(255)),
            (DType::Bool, &[2], 1.0, Some(1)),
        ];
        for (dtype, bytes, float, int) in cases {
            let view = TensorView::new(dtype, &[1, 1], bytes).expect("sizes agree");
            assert_eq!(view.to_f32(), [float], "{dtype:?}");
            assert_eq!(view.to_i64().ok(), int.map(|v| vec![v]), "{dtype:?}");
            assert_eq!(view.to_owned().view(), view);
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
        }
    }
}
