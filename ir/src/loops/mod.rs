//! The kernel IR: loop nests over typed flat buffers with expression bodies.
//!
//! A kernel is a grid of independent instances; whoever runs it may split the grid over threads in any way. Everything a
//! kernel computes is defined here to the last bit, also the order of float reductions: what [`interpret`] returns is the
//! meaning, and every emitter must agree with it bit for bit.

mod build;
mod expr;
mod hash;
mod interp;
pub mod math;
mod range;
mod tensors;
mod text;
pub mod tile;
mod variant;
mod verify;

pub use build::Builder;
pub use expr::{f32c, f64c, i32c, int};
pub use interp::{Memory, interpret};
pub use range::{unproven, work};
pub use tensors::Tensors;
pub use text::{parse, print};
pub use variant::Variant;
pub use verify::{KernelError, verify};

use crate::DType;

/// The number of interleaved partial results of a [`Stmt::Reduce`].
pub const STRIPES: usize = 8;

/// The type of a computed scalar. Narrow integers are widened to `I32` by a load, `BF16` to `F32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ty {
    /// IEEE binary32; one rounding for every operation.
    F32,
    /// IEEE binary64.
    F64,
    /// 32-bit integer, wrapping.
    I32,
    /// 64-bit integer, wrapping: indices and loop variables.
    I64,
    /// The result of a comparison.
    Bool,
}

/// A local scalar or loop variable of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Var(pub u32);

/// A buffer of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Buf(pub u32);

/// Unary scalar operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Un {
    /// Negation of any numeric type.
    Neg,
    /// Absolute value of a float (clears the sign bit) or integer (wrapping).
    Abs,
    /// Correctly rounded square root of a float.
    Sqrt,
    /// Largest integral float not above.
    Floor,
    /// Nearest integral float, ties to even.
    Nearest,
    /// The number of set bits of an `I32`.
    Popcnt,
    /// The bits of a `F32` as `I32`.
    ToBits,
    /// An `I32` as the bits of a `F32`.
    FromBits,
    /// Logical negation.
    Not,
}

/// Binary scalar operations on two operands of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bin {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Float quotient, or integer quotient towards zero (`I64` with a positive constant divisor only).
    Div,
    /// Integer remainder (`I64` with a positive constant divisor only).
    Rem,
    /// `a < b ? a : b`, so the second operand when unordered or equal.
    Min,
    /// `a > b ? a : b`, so the second operand when unordered or equal.
    Max,
    /// Bitwise or logical conjunction (integers, Bool).
    And,
    /// Bitwise or logical disjunction (integers, Bool).
    Or,
    /// Bitwise exclusive or (integers).
    Xor,
    /// Shift left; the count is taken modulo the width.
    Shl,
    /// Logical shift right; the count is taken modulo the width.
    Shr,
    /// Arithmetic shift right; the count is taken modulo the width.
    Sar,
    /// The upper 32 bits of the unsigned product of two `I32`.
    MulHi,
}

/// Comparisons of two operands of one type; floats are ordered comparisons (false with NaN, but `Ne` is true). Signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cmp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
}

/// A scalar expression. Constants and variables carry their type; the rest follows from the operands.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// A `F32` literal.
    F32(f32),
    /// A `F64` literal.
    F64(f64),
    /// An `I32` literal.
    I32(i32),
    /// An `I64` literal.
    Int(i64),
    /// A local or loop variable.
    Var(Var),
    /// Element `index` (`I64`) of a buffer.
    Load(Buf, Box<Expr>),
    /// Bytes `4 index .. 4 index + 4` of an `i8` or `u8` buffer as one little-endian `I32`.
    Word(Buf, Box<Expr>),
    /// A unary operation.
    Un(Un, Box<Expr>),
    /// A binary operation.
    Bin(Bin, Box<Expr>, Box<Expr>),
    /// `a * b + c` of `F32` with one rounding.
    Fma(Box<Expr>, Box<Expr>, Box<Expr>),
    /// `acc + sum over the four bytes j of u8(a, j) * i8(b, j)`, all `I32`. Every byte of `a` is a code of at most 2; where `a` is
    /// masked by a literal it may be a multiple of one, at most two thirds of the byte of the mask.
    Dot4(Box<Expr>, Box<Expr>, Box<Expr>),
    /// A comparison.
    Cmp(Cmp, Box<Expr>, Box<Expr>),
    /// `condition ? a : b`; both are evaluated.
    Select(Box<Expr>, Box<Expr>, Box<Expr>),
    /// Numeric conversion: integers sign-extend or wrap, floats round to nearest even, float to integer truncates and saturates
    /// (NaN to 0), Bool gives 0 or 1.
    Cast(Ty, Box<Expr>),
}

/// How the iterations of a loop relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// In ascending order.
    Seq,
    /// Independent: any number at once. The number is how many vectors of the portable width are worth interleaving.
    Lanes(u8),
}

/// What a reduction accumulates.
#[derive(Clone, Debug, PartialEq, Hash)]
pub enum Acc {
    /// `acc = acc + x`, from 0.
    Sum(Expr),
    /// `acc = fma(x, y, acc)` of `F32`, from 0.
    Dot(Expr, Expr),
    /// `acc = x > acc ? x : acc`, from minus infinity (the least value for integers).
    Max(Expr),
}

/// A statement.
#[derive(Clone, Debug, PartialEq, Hash)]
pub enum Stmt {
    /// Define or overwrite a local.
    Let(Var, Expr),
    /// Overwrite one element; integers keep their low bits.
    Store(Buf, Expr, Expr),
    /// A hint that the memory at this element of the buffer will be read soon. It has no meaning: the index may be anywhere, is made
    /// without loads, and inside lanes counts in the first one.
    Prefetch(Buf, Expr),
    /// Run the body for `var` from `lo` while `var < hi`, in steps of `step` (1 for lanes).
    For {
        /// The loop variable, `I64`.
        var: Var,
        /// First value.
        lo: Expr,
        /// Bound, exclusive; evaluated once.
        hi: Expr,
        /// Positive increment.
        step: i64,
        /// Order of the iterations.
        mode: Mode,
        /// The body.
        body: Vec<Stmt>,
    },
    /// Run one of two bodies. Inside lanes the condition must be the same for all lanes.
    If(Expr, Vec<Stmt>, Vec<Stmt>),
    /// Reduce over `var` in `lo .. hi` with [`STRIPES`] partial results each: iteration `i` goes to stripe `(i - lo) mod STRIPES`;
    /// at the end stripe `j` absorbs `j + 4`, then `j + 2`, then `j + 1` (`Sum` and `Dot` by `left + right`, `Max` as above), and
    /// the variable is stripe 0. `body` runs first in each iteration and may bind locals. Not allowed inside lanes.
    Reduce {
        /// The loop variable, `I64`.
        var: Var,
        /// First value.
        lo: Expr,
        /// Bound, exclusive.
        hi: Expr,
        /// Locals of one iteration: `Let` only.
        body: Vec<Stmt>,
        /// Results.
        accs: Vec<(Var, Acc)>,
    },
}

/// What a kernel does with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Read only.
    In,
    /// Written; never read before written.
    Out,
    /// Read and written.
    InOut,
    /// Private to one worker, contents undefined at the start of each grid instance.
    Scratch,
}

/// A buffer of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BufDecl {
    /// A name for people; unique in the kernel.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Number of elements.
    pub len: usize,
    /// Use.
    pub role: Role,
}

/// One kernel. Arguments are the buffers that are not scratch, in order.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Kernel {
    /// A name for people: the operations it came from.
    pub name: String,
    /// The named contract that lets an emitter replace the body by an equal one: a name and its integer parameters.
    pub contract: Option<Contract>,
    /// Which of several ways of doing it this is; empty when there is only one.
    pub variant: Variant,
    /// The buffers.
    pub bufs: Vec<BufDecl>,
    /// The types of the variables; variable 0 is the grid index (`I64`).
    pub vars: Vec<Ty>,
    /// The number of independent instances.
    pub grid: usize,
    /// What instance `Var(0)` does.
    pub body: Vec<Stmt>,
}

/// A promise about what a kernel computes, by which an emitter may recognise it. See `Kernel::contract`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Contract {
    /// Contract name, such as `ternary_product`.
    pub name: String,
    /// Named integer parameters in a fixed order.
    pub params: Vec<(String, i64)>,
}

impl Contract {
    /// A contract.
    pub fn new(name: &str, params: &[(&str, usize)]) -> Contract {
        Contract { name: name.to_owned(), params: Variant::new(params).0 }
    }

    /// The value of a parameter that is a size.
    pub fn size(&self, name: &str) -> Option<usize> {
        let found = self.params.iter().find(|p| p.0 == name)?;
        usize::try_from(found.1).ok()
    }
}

/// Such as `ternary_product(m=64 np=128)`.
impl std::fmt::Display for Contract {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}({})", self.name, Variant(self.params.clone()))
    }
}

/// The grid index of every kernel.
pub const GRID: Var = Var(0);

impl Kernel {
    /// The type of an expression.
    ///
    /// # Panics
    /// When the expression is ill-typed; [`verify()`] says so without a panic.
    pub fn ty(&self, e: &Expr) -> Ty {
        match e {
            Expr::F32(_) | Expr::Fma(..) => Ty::F32,
            Expr::F64(_) => Ty::F64,
            Expr::I32(_) | Expr::Word(..) | Expr::Dot4(..) => Ty::I32,
            Expr::Int(_) => Ty::I64,
            Expr::Var(v) => self.vars[v.0 as usize],
            Expr::Load(b, _) => load_ty(self.bufs[b.0 as usize].dtype),
            Expr::Un(Un::ToBits, _) => Ty::I32,
            Expr::Un(Un::FromBits, _) => Ty::F32,
            Expr::Un(_, a) | Expr::Bin(_, a, _) | Expr::Select(_, a, _) => self.ty(a),
            Expr::Cmp(..) => Ty::Bool,
            Expr::Cast(ty, _) => *ty,
        }
    }

    /// Bytes of scratch memory one worker needs; every buffer starts at a multiple of 64.
    pub fn scratch_bytes(&self) -> usize {
        let bytes = |b: &BufDecl| (b.len * b.dtype.size()).next_multiple_of(64);
        self.bufs.iter().filter(|b| b.role == Role::Scratch).map(bytes).sum()
    }
}

/// The computed type of a loaded element.
pub fn load_ty(dtype: DType) -> Ty {
    match dtype {
        DType::F32 | DType::BF16 => Ty::F32,
        DType::F64 => Ty::F64,
        DType::I8 | DType::U8 | DType::I16 | DType::I32 => Ty::I32,
    }
}

#[cfg(test)]
mod tests;
