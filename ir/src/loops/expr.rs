//! Operators that make expressions readable in Rust.

use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Rem, Sub};

use super::{Bin, Buf, Cmp, Expr, Ty, Un, Var};

/// An index literal.
pub fn int(x: usize) -> Expr {
    Expr::Int(x as i64)
}

/// A `F32` literal.
pub fn f32c(x: f32) -> Expr {
    Expr::F32(x)
}

/// A `F64` literal.
pub fn f64c(x: f64) -> Expr {
    Expr::F64(x)
}

/// An `I32` literal.
pub fn i32c(x: i32) -> Expr {
    Expr::I32(x)
}

impl From<Var> for Expr {
    fn from(v: Var) -> Expr {
        Expr::Var(v)
    }
}

impl From<usize> for Expr {
    fn from(x: usize) -> Expr {
        int(x)
    }
}

impl From<f32> for Expr {
    fn from(x: f32) -> Expr {
        Expr::F32(x)
    }
}

impl From<&Expr> for Expr {
    fn from(e: &Expr) -> Expr {
        e.clone()
    }
}

macro_rules! operators {
    ($($Trait:ident $method:ident $Bin:ident),*) => {$(
        impl<R: Into<Expr>> $Trait<R> for Expr {
            type Output = Expr;
            fn $method(self, r: R) -> Expr {
                Expr::bin(Bin::$Bin, self, r.into())
            }
        }
        impl<R: Into<Expr>> $Trait<R> for &Expr {
            type Output = Expr;
            fn $method(self, r: R) -> Expr {
                Expr::bin(Bin::$Bin, self.clone(), r.into())
            }
        }
        impl<R: Into<Expr>> $Trait<R> for Var {
            type Output = Expr;
            fn $method(self, r: R) -> Expr {
                Expr::bin(Bin::$Bin, self.into(), r.into())
            }
        }
    )*};
}

operators!(Add add Add, Sub sub Sub, Mul mul Mul, Div div Div, Rem rem Rem, BitAnd bitand And, BitOr bitor Or, BitXor bitxor Xor);

impl Neg for Expr {
    type Output = Expr;
    fn neg(self) -> Expr {
        Expr::Un(Un::Neg, Box::new(self))
    }
}

impl Expr {
    /// A binary operation; integer sums and products with literals are folded so that indices stay small.
    pub fn bin(op: Bin, a: Expr, b: Expr) -> Expr {
        match (op, &a, &b) {
            (Bin::Add, Expr::Int(0), _) | (Bin::Mul, Expr::Int(1), _) => return b,
            (Bin::Add | Bin::Sub, _, Expr::Int(0)) | (Bin::Mul | Bin::Div, _, Expr::Int(1)) => return a,
            (Bin::Mul, Expr::Int(0), _) | (Bin::Mul, _, Expr::Int(0)) => return Expr::Int(0),
            (Bin::Add, Expr::Int(x), Expr::Int(y)) => return Expr::Int(x + y),
            (Bin::Sub, Expr::Int(x), Expr::Int(y)) => return Expr::Int(x - y),
            (Bin::Mul, Expr::Int(x), Expr::Int(y)) => return Expr::Int(x * y),
            (Bin::Div, Expr::Int(x), Expr::Int(y)) if *y > 0 => return Expr::Int(x / y),
            (Bin::Rem, Expr::Int(x), Expr::Int(y)) if *y > 0 => return Expr::Int(x % y),
            (Bin::Rem, _, Expr::Int(1)) => return Expr::Int(0),
            _ => {}
        }
        Expr::Bin(op, Box::new(a), Box::new(b))
    }

    /// Element `index` of `buf`.
    pub fn load(buf: Buf, index: impl Into<Expr>) -> Expr {
        Expr::Load(buf, Box::new(index.into()))
    }

    /// Four bytes of `buf` as one word, see [`Expr::Word`].
    pub fn word(buf: Buf, index: impl Into<Expr>) -> Expr {
        Expr::Word(buf, Box::new(index.into()))
    }

    /// `self * b + c` with one rounding.
    pub fn fma(self, b: impl Into<Expr>, c: impl Into<Expr>) -> Expr {
        Expr::Fma(Box::new(self), Box::new(b.into()), Box::new(c.into()))
    }

    /// See [`Expr::Dot4`]; `self` is the accumulator.
    pub fn dot4(self, codes: impl Into<Expr>, bytes: impl Into<Expr>) -> Expr {
        Expr::Dot4(Box::new(self), Box::new(codes.into()), Box::new(bytes.into()))
    }

    /// `self > b ? self : b`.
    pub fn max(self, b: impl Into<Expr>) -> Expr {
        Expr::bin(Bin::Max, self, b.into())
    }

    /// `self < b ? self : b`.
    pub fn min(self, b: impl Into<Expr>) -> Expr {
        Expr::bin(Bin::Min, self, b.into())
    }

    /// Shift left.
    #[expect(clippy::should_implement_trait, reason = "the operator would take any expression, this a constant")]
    pub fn shl(self, n: i32) -> Expr {
        Expr::bin(Bin::Shl, self, Expr::I32(n))
    }

    /// Logical shift right.
    #[expect(clippy::should_implement_trait, reason = "the operator would take any expression, this a constant")]
    pub fn shr(self, n: i32) -> Expr {
        Expr::bin(Bin::Shr, self, Expr::I32(n))
    }

    /// Arithmetic shift right.
    pub fn sar(self, n: i32) -> Expr {
        Expr::bin(Bin::Sar, self, Expr::I32(n))
    }

    /// Absolute value.
    pub fn abs(self) -> Expr {
        Expr::Un(Un::Abs, Box::new(self))
    }

    /// Square root.
    pub fn sqrt(self) -> Expr {
        Expr::Un(Un::Sqrt, Box::new(self))
    }

    /// Nearest integral value, ties to even.
    pub fn nearest(self) -> Expr {
        Expr::Un(Un::Nearest, Box::new(self))
    }

    /// Bits of a `F32`.
    pub fn to_bits(self) -> Expr {
        Expr::Un(Un::ToBits, Box::new(self))
    }

    /// `F32` from bits.
    pub fn from_bits(self) -> Expr {
        Expr::Un(Un::FromBits, Box::new(self))
    }

    /// Numeric conversion.
    pub fn cast(self, ty: Ty) -> Expr {
        Expr::Cast(ty, Box::new(self))
    }

    /// A comparison.
    pub fn cmp(self, op: Cmp, b: impl Into<Expr>) -> Expr {
        Expr::Cmp(op, Box::new(self), Box::new(b.into()))
    }

    /// `self < b`.
    pub fn lt(self, b: impl Into<Expr>) -> Expr {
        self.cmp(Cmp::Lt, b)
    }

    /// `self <= b`.
    pub fn le(self, b: impl Into<Expr>) -> Expr {
        self.cmp(Cmp::Le, b)
    }

    /// `self == b`.
    pub fn eq(self, b: impl Into<Expr>) -> Expr {
        self.cmp(Cmp::Eq, b)
    }

    /// `self != b`.
    pub fn ne(self, b: impl Into<Expr>) -> Expr {
        self.cmp(Cmp::Ne, b)
    }

    /// `self ? a : b`.
    pub fn select(self, a: impl Into<Expr>, b: impl Into<Expr>) -> Expr {
        Expr::Select(Box::new(self), Box::new(a.into()), Box::new(b.into()))
    }
}
