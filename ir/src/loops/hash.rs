//! Hashes of expressions, so that kernels can be keys.
//!
//! Literals hash by their bits: expressions of one hash compute the same, and equal ones differ in their hash only by the sign of a zero.

use std::hash::{Hash, Hasher};
use std::mem::discriminant;

use super::Expr;

impl Hash for Expr {
    fn hash<H: Hasher>(&self, state: &mut H) {
        discriminant(self).hash(state);
        match self {
            Expr::F32(x) => x.to_bits().hash(state),
            Expr::F64(x) => x.to_bits().hash(state),
            Expr::I32(x) => x.hash(state),
            Expr::Int(x) => x.hash(state),
            Expr::Var(v) => v.hash(state),
            Expr::Load(b, i) | Expr::Word(b, i) => (b, i).hash(state),
            Expr::Un(op, a) => (op, a).hash(state),
            Expr::Bin(op, a, b) => (op, a, b).hash(state),
            Expr::Fma(a, b, c) | Expr::Dot4(a, b, c) | Expr::Select(a, b, c) => (a, b, c).hash(state),
            Expr::Cmp(op, a, b) => (op, a, b).hash(state),
            Expr::Cast(ty, a) => (ty, a).hash(state),
        }
    }
}
