//! Element types, tensor types and the dense tensor of reference semantics.
//!
//! A [`Type`] is a value: two tensors have the same type exactly when dtype and dimensions agree.

use std::fmt;

/// The type of one stored element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
    /// The upper half of an IEEE binary32. Kernels read it as `f32` and never write it.
    BF16,
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
}

impl DType {
    /// Every dtype with its name; names are stable and appear in plans.
    pub const ALL: [(DType, &'static str, usize); 7] = [
        (DType::F32, "f32", 4),
        (DType::F64, "f64", 8),
        (DType::BF16, "bf16", 2),
        (DType::I8, "i8", 1),
        (DType::U8, "u8", 1),
        (DType::I16, "i16", 2),
        (DType::I32, "i32", 4),
    ];

    fn row(self) -> (DType, &'static str, usize) {
        Self::ALL[self as usize]
    }

    /// The stable name.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The dtype of that name.
    pub fn parse(name: &str) -> Option<DType> {
        Self::ALL.iter().find(|r| r.1 == name).map(|r| r.0)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        self.row().2
    }
}

/// An element type and a row-major shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first. Never zero.
    pub dims: Vec<usize>,
}

impl Type {
    /// A tensor type.
    pub fn new(dtype: DType, dims: &[usize]) -> Type {
        Type { dtype, dims: dims.to_vec() }
    }

    /// A `f32` tensor type.
    pub fn f32(dims: &[usize]) -> Type {
        Type::new(DType::F32, dims)
    }

    /// An `i32` tensor type.
    pub fn i32(dims: &[usize]) -> Type {
        Type::new(DType::I32, dims)
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.dims.iter().product()
    }

    /// The number of bytes.
    pub fn bytes(&self) -> usize {
        self.numel() * self.dtype.size()
    }

    /// The last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.dims.last().copied().unwrap_or(1)
    }

    /// The product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.numel() / self.cols().max(1)
    }

    /// The same shape with another element type.
    pub fn with(&self, dtype: DType) -> Type {
        Type { dtype, dims: self.dims.clone() }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype.name(), self.dims)
    }
}

/// Dense row-major elements.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// See [`DType::F32`].
    F32(Vec<f32>),
    /// See [`DType::F64`].
    F64(Vec<f64>),
    /// Bit patterns, see [`DType::BF16`].
    BF16(Vec<u16>),
    /// See [`DType::I8`].
    I8(Vec<i8>),
    /// See [`DType::U8`].
    U8(Vec<u8>),
    /// See [`DType::I16`].
    I16(Vec<i16>),
    /// See [`DType::I32`].
    I32(Vec<i32>),
}

impl Data {
    /// `len` zero elements.
    pub fn zeros(dtype: DType, len: usize) -> Data {
        match dtype {
            DType::F32 => Data::F32(vec![0.0; len]),
            DType::F64 => Data::F64(vec![0.0; len]),
            DType::BF16 => Data::BF16(vec![0; len]),
            DType::I8 => Data::I8(vec![0; len]),
            DType::U8 => Data::U8(vec![0; len]),
            DType::I16 => Data::I16(vec![0; len]),
            DType::I32 => Data::I32(vec![0; len]),
        }
    }

    /// `len` elements that no kernel should leave behind: NaN and -1.
    pub fn poison(dtype: DType, len: usize) -> Data {
        match dtype {
            DType::F32 => Data::F32(vec![f32::NAN; len]),
            DType::F64 => Data::F64(vec![f64::NAN; len]),
            DType::BF16 => Data::BF16(vec![u16::MAX; len]),
            DType::I8 => Data::I8(vec![-1; len]),
            DType::U8 => Data::U8(vec![u8::MAX; len]),
            DType::I16 => Data::I16(vec![-1; len]),
            DType::I32 => Data::I32(vec![-1; len]),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Data::F32(_) => DType::F32,
            Data::F64(_) => DType::F64,
            Data::BF16(_) => DType::BF16,
            Data::I8(_) => DType::I8,
            Data::U8(_) => DType::U8,
            Data::I16(_) => DType::I16,
            Data::I32(_) => DType::I32,
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::F64(v) => v.len(),
            Data::BF16(v) => v.len(),
            Data::I8(v) => v.len(),
            Data::U8(v) => v.len(),
            Data::I16(v) => v.len(),
            Data::I32(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A dense row-major tensor; the currency of reference semantics, never of hot paths.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The type of the tensor.
    pub ty: Type,
    /// Its elements; length and dtype agree with `ty`.
    pub data: Data,
}

impl Tensor {
    /// All zero.
    pub fn zeros(ty: &Type) -> Tensor {
        Tensor { ty: ty.clone(), data: Data::zeros(ty.dtype, ty.numel()) }
    }

    /// A `f32` tensor from its elements.
    ///
    /// # Panics
    /// When the number of elements is not that of `dims`.
    pub fn f32(dims: &[usize], data: Vec<f32>) -> Tensor {
        let ty = Type::f32(dims);
        assert_eq!(ty.numel(), data.len(), "a tensor holds as many elements as its type says");
        Tensor { ty, data: Data::F32(data) }
    }

    /// An `i32` tensor from its elements.
    ///
    /// # Panics
    /// When the number of elements is not that of `dims`.
    pub fn i32(dims: &[usize], data: Vec<i32>) -> Tensor {
        let ty = Type::i32(dims);
        assert_eq!(ty.numel(), data.len(), "a tensor holds as many elements as its type says");
        Tensor { ty, data: Data::I32(data) }
    }

    /// The elements of a `f32` tensor.
    ///
    /// # Panics
    /// When the tensor is not `f32`.
    pub fn as_f32(&self) -> &[f32] {
        match &self.data {
            Data::F32(v) => v,
            other => panic!("expected f32, found {}", other.dtype().name()),
        }
    }

    /// The elements of an integer or boolean tensor, widened.
    ///
    /// # Panics
    /// When the tensor is not integral.
    pub fn to_i64(&self) -> Vec<i64> {
        match &self.data {
            Data::I8(v) => v.iter().map(|&x| x.into()).collect(),
            Data::U8(v) => v.iter().map(|&x| x.into()).collect(),
            Data::I16(v) => v.iter().map(|&x| x.into()).collect(),
            Data::I32(v) => v.iter().map(|&x| x.into()).collect(),
            other => panic!("expected integers, found {}", other.dtype().name()),
        }
    }
}
