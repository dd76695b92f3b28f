//! Scalar expressions, evaluated in the current lane.
//!
//! Outside of vectorised loops there is one lane. Truth values are bytes, 0 or 1.

use chimera_ir::loops::{Bin, Cmp, Expr, Ty, Un};
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{InstBuilder, Type, Value, types};

use super::stmt::{Lower, Slot};
use crate::shape::Fact;

/// The machine type of a computed scalar.
pub(super) fn machine(ty: Ty) -> Type {
    match ty {
        Ty::F32 => types::F32,
        Ty::F64 => types::F64,
        Ty::I32 => types::I32,
        Ty::I64 => types::I64,
        Ty::Bool => types::I8,
    }
}

pub(super) fn is_float(ty: Ty) -> bool {
    matches!(ty, Ty::F32 | Ty::F64)
}

pub(super) fn float_cc(op: Cmp) -> FloatCC {
    match op {
        Cmp::Eq => FloatCC::Equal,
        Cmp::Ne => FloatCC::NotEqual,
        Cmp::Lt => FloatCC::LessThan,
        Cmp::Le => FloatCC::LessThanOrEqual,
    }
}

pub(super) fn int_cc(op: Cmp) -> IntCC {
    match op {
        Cmp::Eq => IntCC::Equal,
        Cmp::Ne => IntCC::NotEqual,
        Cmp::Lt => IntCC::SignedLessThan,
        Cmp::Le => IntCC::SignedLessThanOrEqual,
    }
}

impl Lower<'_, '_> {
    /// An expression in the current lane.
    pub(super) fn scalar(&mut self, e: &Expr) -> Value {
        match e {
            Expr::Int(_) | Expr::Bin(Bin::Add | Bin::Sub | Bin::Mul, ..) | Expr::Un(Un::Neg, _)
                if self.kernel.ty(e) == Ty::I64 =>
            {
                let l = self.linear(e);
                self.sum(&l)
            }
            _ => self.direct(e),
        }
    }

    /// As [`Lower::scalar`], without a look at what an index is made of.
    pub(super) fn direct(&mut self, e: &Expr) -> Value {
        match e {
            Expr::F32(x) => self.b.ins().f32const(*x),
            Expr::F64(x) => self.b.ins().f64const(*x),
            Expr::I32(x) => self.b.ins().iconst(types::I32, i64::from(*x as u32)),
            Expr::Int(x) => self.b.ins().iconst(types::I64, *x),
            Expr::Var(v) if self.forms[v.0 as usize].is_some() => {
                let l = self.linear(e);
                self.sum(&l)
            }
            Expr::Var(v) => self.variable(*v),
            Expr::Load(b, i) => self.load(*b, i),
            Expr::Word(b, i) => {
                let a = self.address(*b, i, 4, 0);
                self.b.ins().load(types::I32, a.flags, a.at, a.offset)
            }
            Expr::Un(op, a) => {
                let ty = self.kernel.ty(a);
                let a = self.scalar(a);
                self.unary(*op, ty, a)
            }
            Expr::Bin(op @ (Bin::Div | Bin::Rem), a, b) if self.kernel.ty(a) == Ty::I64 => self.quotient(*op, a, b),
            Expr::Bin(op, a, b) => {
                let ty = self.kernel.ty(a);
                let (a, b) = (self.scalar(a), self.scalar(b));
                self.binary(*op, ty, a, b)
            }
            Expr::Fma(a, b, c) => {
                let (a, b, c) = (self.scalar(a), self.scalar(b), self.scalar(c));
                self.b.ins().fma(a, b, c)
            }
            Expr::Dot4(acc, a, b) => {
                let (acc, a, b) = (self.scalar(acc), self.scalar(a), self.scalar(b));
                self.dot4(acc, a, b)
            }
            Expr::Cmp(op, a, b) => {
                let float = is_float(self.kernel.ty(a));
                let (a, b) = (self.scalar(a), self.scalar(b));
                match float {
                    true => self.b.ins().fcmp(float_cc(*op), a, b),
                    false => self.b.ins().icmp(int_cc(*op), a, b),
                }
            }
            Expr::Select(c, a, b) => {
                let (c, a, b) = (self.scalar(c), self.scalar(a), self.scalar(b));
                self.b.ins().select(c, a, b)
            }
            Expr::Cast(to, a) => {
                let from = self.kernel.ty(a);
                let a = self.scalar(a);
                self.cast(from, *to, a)
            }
        }
    }

    fn variable(&mut self, v: chimera_ir::loops::Var) -> Value {
        let at = v.0 as usize;
        match &self.slots[at] {
            Slot::Scalar(x) => {
                let x = self.b.use_var(*x);
                let offset = self.stride(v).wrapping_mul(self.lane as i64);
                if offset == 0 { x } else { self.b.ins().iadd_imm_s(x, offset) }
            }
            Slot::Splat(x) => {
                let x = self.b.use_var(*x);
                self.b.ins().extractlane(x, 0)
            }
            Slot::Vector(xs) => {
                let x = self.b.use_var(xs[self.lane / 4]);
                self.extract(self.kernel.vars[at], x, self.lane % 4)
            }
            Slot::Each(xs) => self.b.use_var(xs[self.lane]),
            Slot::Unset => panic!("kernel {:?} uses variable {} before it is assigned", self.kernel.name, v.0),
        }
    }

    /// One lane of a vector as a scalar.
    pub(super) fn extract(&mut self, ty: Ty, x: Value, lane: usize) -> Value {
        let x = self.b.ins().extractlane(x, lane as u8);
        match ty {
            Ty::Bool => self.b.ins().icmp_imm_s(IntCC::NotEqual, x, 0),
            _ => x,
        }
    }

    pub(super) fn unary(&mut self, op: Un, ty: Ty, a: Value) -> Value {
        let ins = self.b.ins();
        match (op, is_float(ty)) {
            (Un::Neg, true) => ins.fneg(a),
            (Un::Neg, false) => ins.ineg(a),
            (Un::Abs, true) => ins.fabs(a),
            (Un::Abs, false) => ins.iabs(a),
            (Un::Sqrt, _) => ins.sqrt(a),
            (Un::Floor, _) => ins.floor(a),
            (Un::Nearest, _) => ins.nearest(a),
            (Un::Popcnt, _) => ins.popcnt(a),
            (Un::ToBits, _) => ins.bitcast(types::I32, super::memory::LITTLE, a),
            (Un::FromBits, _) => ins.bitcast(types::F32, super::memory::LITTLE, a),
            (Un::Not, _) => ins.bxor_imm_u(a, 1),
        }
    }

    pub(super) fn binary(&mut self, op: Bin, ty: Ty, a: Value, b: Value) -> Value {
        let ins = self.b.ins();
        match (op, is_float(ty)) {
            (Bin::Add, true) => ins.fadd(a, b),
            (Bin::Sub, true) => ins.fsub(a, b),
            (Bin::Mul, true) => ins.fmul(a, b),
            (Bin::Div, true) => ins.fdiv(a, b),
            (Bin::Min, true) => {
                let c = ins.fcmp(FloatCC::LessThan, a, b);
                self.b.ins().select(c, a, b)
            }
            (Bin::Max, true) => {
                let c = ins.fcmp(FloatCC::LessThan, b, a);
                self.b.ins().select(c, a, b)
            }
            (Bin::Add, false) => ins.iadd(a, b),
            (Bin::Sub, false) => ins.isub(a, b),
            (Bin::Mul, false) => ins.imul(a, b),
            (Bin::Div, false) => ins.sdiv(a, b),
            (Bin::Rem, _) => ins.srem(a, b),
            (Bin::Min, false) => ins.smin(a, b),
            (Bin::Max, false) => ins.smax(a, b),
            (Bin::And, _) => ins.band(a, b),
            (Bin::Or, _) => ins.bor(a, b),
            (Bin::Xor, _) => ins.bxor(a, b),
            (Bin::Shl, _) => ins.ishl(a, b),
            (Bin::Shr, _) => ins.ushr(a, b),
            (Bin::Sar, _) => ins.sshr(a, b),
            (Bin::MulHi, _) => {
                let a = ins.uextend(types::I64, a);
                let b = self.b.ins().uextend(types::I64, b);
                let x = self.b.ins().imul(a, b);
                let x = self.b.ins().ushr_imm_u(x, 32);
                self.b.ins().ireduce(types::I32, x)
            }
        }
    }

    /// `I64` division, cheap by powers of two where the dividend is not negative.
    fn quotient(&mut self, op: Bin, a: &Expr, b: &Expr) -> Value {
        let positive = Fact::of(a, self.facts()).positive;
        let x = self.scalar(a);
        match (op, b) {
            (Bin::Div, Expr::Int(c)) if positive && c.count_ones() == 1 && *c > 0 => {
                self.b.ins().ushr_imm_u(x, i64::from(c.trailing_zeros()))
            }
            (_, Expr::Int(c)) if positive && c.count_ones() == 1 && *c > 0 => self.b.ins().band_imm_u(x, *c - 1),
            _ => {
                let y = self.scalar(b);
                self.binary(op, Ty::I64, x, y)
            }
        }
    }

    fn dot4(&mut self, acc: Value, a: Value, b: Value) -> Value {
        let mut sum = acc;
        for n in 0..4 {
            let code = self.b.ins().ushr_imm_u(a, 8 * n);
            let code = self.b.ins().band_imm_u(code, 0xff);
            let byte = self.b.ins().ishl_imm_u(b, 24 - 8 * n);
            let byte = self.b.ins().sshr_imm_u(byte, 24);
            let x = self.b.ins().imul(code, byte);
            sum = self.b.ins().iadd(sum, x);
        }
        sum
    }

    fn cast(&mut self, from: Ty, to: Ty, x: Value) -> Value {
        let ins = self.b.ins();
        match (from, to) {
            _ if from == to => x,
            (Ty::Bool, Ty::F32 | Ty::F64) => {
                let x = ins.uextend(types::I32, x);
                self.b.ins().fcvt_from_sint(machine(to), x)
            }
            (Ty::Bool, _) => ins.uextend(machine(to), x),
            (_, Ty::Bool) => unreachable!("refused by `accepts`"),
            (Ty::F32, Ty::F64) => ins.fpromote(types::F64, x),
            (Ty::F64, Ty::F32) => ins.fdemote(types::F32, x),
            (Ty::F32 | Ty::F64, _) => ins.fcvt_to_sint_sat(machine(to), x),
            (_, Ty::F32 | Ty::F64) => ins.fcvt_from_sint(machine(to), x),
            (Ty::I32, _) => ins.sextend(types::I64, x),
            (_, _) => ins.ireduce(types::I32, x),
        }
    }
}
