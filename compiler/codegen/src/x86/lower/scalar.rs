//! Scalar expressions, evaluated in the current lane.
//!
//! Integers and truth values (0 or 1) are in integer registers, floats in the first lane of vector registers.

use chimera_ir::loops::{Bin, Buf, Cmp, Expr, Ty, Un, Var};

use super::super::build::NEW;
use super::super::flat::{Class, FloatCond, IntArg, IntOp, Op, Reg, ShiftOp, Size, VecArg, VecOp, VecUn, Width};
use super::{Lower, Slot, class, cond, scalar_width, size};
use crate::shape::Fact;

pub(super) fn float_cond(op: Cmp) -> FloatCond {
    match op {
        Cmp::Eq => FloatCond::Eq,
        Cmp::Ne => FloatCond::Ne,
        Cmp::Lt => FloatCond::Lt,
        Cmp::Le => FloatCond::Le,
    }
}

/// The vector operation of a binary one, if there is one that needs no more.
pub(super) fn vec_op(op: Bin, ty: Ty) -> Option<VecOp> {
    Some(match (op, ty) {
        (Bin::Add, Ty::F32) => VecOp::AddF32,
        (Bin::Sub, Ty::F32) => VecOp::SubF32,
        (Bin::Mul, Ty::F32) => VecOp::MulF32,
        (Bin::Div, Ty::F32) => VecOp::DivF32,
        (Bin::Min, Ty::F32) => VecOp::MinF32,
        (Bin::Max, Ty::F32) => VecOp::MaxF32,
        (Bin::Add, Ty::F64) => VecOp::AddF64,
        (Bin::Sub, Ty::F64) => VecOp::SubF64,
        (Bin::Mul, Ty::F64) => VecOp::MulF64,
        (Bin::Div, Ty::F64) => VecOp::DivF64,
        (Bin::Min, Ty::F64) => VecOp::MinF64,
        (Bin::Max, Ty::F64) => VecOp::MaxF64,
        (Bin::Add, Ty::I32) => VecOp::AddI32,
        (Bin::Sub, Ty::I32) => VecOp::SubI32,
        (Bin::Mul, Ty::I32) => VecOp::MulI32,
        (Bin::Min, Ty::I32) => VecOp::MinI32,
        (Bin::Max, Ty::I32) => VecOp::MaxI32,
        (Bin::And, Ty::I32 | Ty::Bool) => VecOp::And,
        (Bin::Or, Ty::I32 | Ty::Bool) => VecOp::Or,
        (Bin::Xor, Ty::I32 | Ty::Bool) => VecOp::Xor,
        _ => return None,
    })
}

impl Lower<'_> {
    /// An expression in the current lane.
    pub(super) fn scalar(&mut self, e: &Expr) -> Reg {
        match e {
            Expr::Int(_) | Expr::Var(_) | Expr::Bin(Bin::Add | Bin::Sub | Bin::Mul, ..) | Expr::Un(Un::Neg, _)
                if self.kernel.ty(e) == Ty::I64 =>
            {
                let l = self.linear(e);
                self.sum(&l)
            }
            _ => self.direct(e),
        }
    }

    /// As [`Lower::scalar`], without a look at what an index is made of.
    pub(super) fn direct(&mut self, e: &Expr) -> Reg {
        let ty = self.kernel.ty(e);
        match e {
            Expr::F32(_) | Expr::F64(_) => {
                let x = self.float_arg(e);
                self.b.in_reg(scalar_width(ty), x)
            }
            Expr::I32(x) => self.b.int(i64::from(*x as u32)),
            Expr::Int(x) => self.b.int(*x),
            Expr::Var(v) => self.variable(*v),
            Expr::Load(b, i) => self.load(*b, i),
            Expr::Word(b, i) => {
                let m = self.address(*b, i, 4, 0);
                self.b.here(Class::Int, Op::IntLoad { d: NEW, m, size: Size::W32, narrow: None })
            }
            Expr::Un(op, a) => self.unary(*op, a),
            Expr::Bin(op @ (Bin::Div | Bin::Rem), a, b) if ty == Ty::I64 => self.quotient(*op, a, b),
            Expr::Bin(Bin::MulHi, a, b) => {
                let [a, b] = [a, b].map(|e| {
                    let s = self.scalar(e);
                    self.b.pure(Class::Int, Op::Extend { d: NEW, s, signed: false })
                });
                let x = self.b.int_op(IntOp::Mul, Size::W64, a, IntArg::Reg(b));
                self.b.int_op(IntOp::Shr, Size::W64, x, IntArg::Imm(32))
            }
            Expr::Bin(op, a, b) if class(ty) == Class::Vec => {
                let op = vec_op(*op, ty).expect("floats have arithmetic only");
                let a = self.scalar(a);
                let b = self.float_arg(b);
                self.b.pure_unless_memory(Op::Vec { op, w: scalar_width(ty), d: NEW, a, b })
            }
            Expr::Bin(op, a, b) => {
                let op = int_op(*op);
                let a = self.scalar(a);
                let b = self.int_arg(b);
                self.b.int_op(op, size(ty), a, b)
            }
            Expr::Fma(a, b, c) => {
                let (a, b) = (self.scalar(a), self.scalar(b));
                let c = self.float_arg(c);
                let (a, b) = (VecArg::Reg(a), VecArg::Reg(b));
                self.b.pure_unless_memory(Op::Fma { w: Width::S, lane: Size::W32, d: NEW, a, b, c })
            }
            Expr::Dot4(acc, a, b) => self.dot4(acc, a, b),
            Expr::Cmp(op, a, b) if class(self.kernel.ty(a)) == Class::Vec => {
                let mask = self.float_mask(*op, a, b);
                let x = self.b.pure(Class::Int, Op::IntFromVec { size: Size::W32, d: NEW, s: mask });
                self.b.int_op(IntOp::And, Size::W32, x, IntArg::Imm(1))
            }
            Expr::Cmp(op, a, b) => {
                let size = size(self.kernel.ty(a));
                let a = self.scalar(a);
                let b = self.int_arg(b);
                self.b.pure(Class::Int, Op::SetCond { d: NEW, cond: cond(*op), size, a, b })
            }
            Expr::Select(c, a, b) if class(ty) == Class::Vec => {
                let mask = self.scalar_mask(c);
                let (a, b) = (self.scalar(a), self.scalar(b));
                let mask = match ty {
                    // The sign of both halves of the lane counts.
                    Ty::F64 => self.b.pure(Class::Vec, Op::Pick { w: Width::X, d: NEW, s: mask, pick: 0 }),
                    _ => mask,
                };
                self.b.pure(Class::Vec, Op::Blend { w: Width::X, d: NEW, mask, a, b })
            }
            Expr::Select(c, a, b) => {
                let (c, a, b) = (self.scalar(c), self.scalar(a), self.scalar(b));
                self.b.pure(Class::Int, Op::Choose { d: NEW, c, a, b })
            }
            Expr::Cast(to, a) => {
                let from = self.kernel.ty(a);
                let x = self.scalar(a);
                self.cast(from, *to, x)
            }
        }
    }

    fn variable(&mut self, v: Var) -> Reg {
        let ty = self.ty(v);
        match self.slots[v.0 as usize].clone() {
            Slot::Form(form) => self.sum(&form),
            Slot::Scalar(r) => r,
            Slot::Each(rs) => rs[self.lane],
            Slot::Splat(r) => match ty {
                Ty::F32 | Ty::F64 => r,
                _ => self.lane_to_int(ty, r),
            },
            Slot::Vector(rs) => self.extract(ty, &rs),
            Slot::Unset => panic!("kernel {:?} uses variable {} before it is assigned", self.kernel.name, v.0),
        }
    }

    /// The first lane of a vector as an integer or truth value.
    pub(super) fn lane_to_int(&mut self, ty: Ty, s: Reg) -> Reg {
        let x = self.b.pure(Class::Int, Op::IntFromVec { size: Size::W32, d: NEW, s });
        match ty {
            Ty::Bool => self.b.int_op(IntOp::And, Size::W32, x, IntArg::Imm(1)),
            _ => x,
        }
    }

    /// A float operand: a constant or an element in memory as it is, else a register.
    pub(super) fn float_arg(&mut self, e: &Expr) -> VecArg {
        match e {
            Expr::F32(x) => VecArg::Mem(self.b.splat32(x.to_bits())),
            Expr::F64(x) => VecArg::Mem(self.b.splat64(x.to_bits())),
            Expr::Load(b, i) if self.is_plain_float(*b) => {
                let unit = self.dtype(*b).size() as i64;
                VecArg::Mem(self.address(*b, i, unit, 0))
            }
            _ => VecArg::Reg(self.scalar(e)),
        }
    }

    fn is_plain_float(&self, b: Buf) -> bool {
        matches!(self.dtype(b), chimera_ir::DType::F32 | chimera_ir::DType::F64)
    }

    /// All ones or zero in the first lane.
    fn float_mask(&mut self, op: Cmp, a: &Expr, b: &Expr) -> Reg {
        let ty = self.kernel.ty(a);
        let lane = if ty == Ty::F64 { Size::W64 } else { Size::W32 };
        let a = self.scalar(a);
        let b = self.float_arg(b);
        let op = Op::Compare { w: scalar_width(ty), lane, cond: float_cond(op), d: NEW, a, b };
        self.b.pure_unless_memory(op)
    }

    /// A truth value as a mask in the first lane of 32 bits.
    fn scalar_mask(&mut self, c: &Expr) -> Reg {
        match c {
            Expr::Cmp(op, a, b) if class(self.kernel.ty(a)) == Class::Vec => self.float_mask(*op, a, b),
            _ => {
                let x = self.scalar(c);
                self.mask_of(x)
            }
        }
    }

    /// 0 or 1 as zero or all ones in the first lane.
    pub(super) fn mask_of(&mut self, x: Reg) -> Reg {
        let zero = self.b.int(0);
        let s = self.b.int_op(IntOp::Sub, Size::W32, zero, IntArg::Reg(x));
        self.b.pure(Class::Vec, Op::VecFromInt { size: Size::W32, d: NEW, s })
    }

    fn unary(&mut self, op: Un, a: &Expr) -> Reg {
        let ty = self.kernel.ty(a);
        let x = self.scalar(a);
        let w = scalar_width(ty);
        let un = |op| Op::Un { op, w, d: NEW, s: VecArg::Reg(x) };
        match (op, ty) {
            (Un::Neg | Un::Abs, Ty::F32 | Ty::F64) => self.sign(op, ty, Width::X, x),
            (Un::Neg, _) => {
                let zero = self.b.int(0);
                self.b.int_op(IntOp::Sub, size(ty), zero, IntArg::Reg(x))
            }
            (Un::Abs, _) => {
                let zero = self.b.int(0);
                let y = self.b.int_op(IntOp::Sub, size(ty), zero, IntArg::Reg(x));
                self.b.int_op(IntOp::Max, size(ty), x, IntArg::Reg(y))
            }
            (Un::Sqrt, Ty::F32) => self.b.pure(Class::Vec, un(VecUn::SqrtF32)),
            (Un::Sqrt, _) => self.b.pure(Class::Vec, un(VecUn::SqrtF64)),
            (Un::Floor, Ty::F32) => self.b.pure(Class::Vec, un(VecUn::FloorF32)),
            (Un::Floor, _) => self.b.pure(Class::Vec, un(VecUn::FloorF64)),
            (Un::Nearest, Ty::F32) => self.b.pure(Class::Vec, un(VecUn::NearestF32)),
            (Un::Nearest, _) => self.b.pure(Class::Vec, un(VecUn::NearestF64)),
            (Un::Popcnt, _) => self.b.pure(Class::Int, Op::Popcnt { d: NEW, s: x }),
            (Un::ToBits, _) => self.b.pure(Class::Int, Op::IntFromVec { size: Size::W32, d: NEW, s: x }),
            (Un::FromBits, _) => self.b.pure(Class::Vec, Op::VecFromInt { size: Size::W32, d: NEW, s: x }),
            (Un::Not, _) => self.b.int_op(IntOp::Xor, Size::W32, x, IntArg::Imm(1)),
        }
    }

    /// Negation or magnitude of floats: flips or clears the sign bits.
    pub(super) fn sign(&mut self, op: Un, ty: Ty, w: Width, a: Reg) -> Reg {
        let (sign, rest) = match ty {
            Ty::F64 => (self.b.splat64(1 << 63), self.b.splat64(!(1 << 63))),
            _ => (self.b.splat32(1 << 31), self.b.splat32(!(1 << 31))),
        };
        let (op, b) = if op == Un::Neg { (VecOp::Xor, sign) } else { (VecOp::And, rest) };
        self.b.pure(Class::Vec, Op::Vec { op, w, d: NEW, a, b: VecArg::Mem(b) })
    }

    /// `I64` division, cheap by powers of two where the dividend is not negative.
    fn quotient(&mut self, op: Bin, a: &Expr, b: &Expr) -> Reg {
        let positive = Fact::of(a, &self.facts).positive;
        let x = self.scalar(a);
        match b {
            Expr::Int(c) if positive && *c > 0 && c.count_ones() == 1 => {
                if op == Bin::Div {
                    self.b.int_op(IntOp::Shr, Size::W64, x, IntArg::Imm(c.trailing_zeros() as i32))
                } else {
                    let low = self.b.int_arg(*c - 1);
                    self.b.int_op(IntOp::And, Size::W64, x, low)
                }
            }
            _ => {
                let y = self.scalar(b);
                self.b.pure(Class::Int, Op::Divide { d: NEW, a: x, b: y, remainder: op == Bin::Rem })
            }
        }
    }

    fn dot4(&mut self, acc: &Expr, a: &Expr, b: &Expr) -> Reg {
        let acc = self.scalar(acc);
        let [a, b] = [a, b].map(|e| {
            let s = self.scalar(e);
            self.b.pure(Class::Vec, Op::VecFromInt { size: Size::W32, d: NEW, s })
        });
        let zero = self.b.local(Class::Vec, Op::VecZero { d: NEW });
        let s = self.dot(Width::X, zero, a, VecArg::Reg(b));
        let sum = self.b.pure(Class::Int, Op::IntFromVec { size: Size::W32, d: NEW, s });
        self.b.int_op(IntOp::Add, Size::W32, acc, IntArg::Reg(sum))
    }

    fn cast(&mut self, from: Ty, to: Ty, x: Reg) -> Reg {
        let un = |op, w| Op::Un { op, w, d: NEW, s: VecArg::Reg(x) };
        match (from, to) {
            _ if from == to => x,
            (Ty::F32, Ty::F64) => self.b.pure(Class::Vec, un(VecUn::F64FromF32, Width::D)),
            (Ty::F64, Ty::F32) => self.b.pure(Class::Vec, un(VecUn::F32FromF64, Width::D)),
            (Ty::F32, Ty::I32) => {
                let s = self.saturate(Width::S, x);
                self.b.pure(Class::Int, Op::IntFromVec { size: Size::W32, d: NEW, s })
            }
            (Ty::F64, Ty::I32) => {
                let raw = self.b.pure(Class::Vec, un(VecUn::I32FromF64, Width::D));
                let raw = self.b.pure(Class::Int, Op::IntFromVec { size: Size::W32, d: NEW, s: raw });
                let limit = self.b.splat64(f64::from(1u32 << 31).to_bits());
                self.saturated(from, Size::W32, x, raw, limit)
            }
            (Ty::F32 | Ty::F64, _) => {
                let w = scalar_width(from);
                let raw = self.b.pure(Class::Int, Op::I64FromFloat { w, d: NEW, s: x });
                let limit = match from {
                    Ty::F64 => self.b.splat64((2f64.powi(63)).to_bits()),
                    _ => self.b.splat32((2f32.powi(63)).to_bits()),
                };
                self.saturated(from, Size::W64, x, raw, limit)
            }
            (Ty::I64, Ty::F32 | Ty::F64) => {
                self.b.pure(Class::Vec, Op::FloatFromI64 { w: scalar_width(to), d: NEW, s: x })
            }
            (Ty::I32 | Ty::Bool, Ty::F32 | Ty::F64) => {
                let s = self.b.pure(Class::Int, Op::Extend { d: NEW, s: x, signed: true });
                self.b.pure(Class::Vec, Op::FloatFromI64 { w: scalar_width(to), d: NEW, s })
            }
            (Ty::I32, Ty::I64) => self.b.pure(Class::Int, Op::Extend { d: NEW, s: x, signed: true }),
            (Ty::Bool, Ty::I64) | (Ty::I64, _) => self.b.pure(Class::Int, Op::Extend { d: NEW, s: x, signed: false }),
            (_, _) => x,
        }
    }

    /// `raw`, but the greatest integer where `x` reaches `limit`, and 0 where it is NaN.
    fn saturated(&mut self, ty: Ty, size: Size, x: Reg, raw: Reg, limit: super::super::flat::Mem) -> Reg {
        let (w, lane) = if ty == Ty::F64 { (Width::D, Size::W64) } else { (Width::S, Size::W32) };
        let limit = self.b.in_reg(w, VecArg::Mem(limit));
        let mut mask = |cond, a: Reg| {
            let m = self.b.pure(Class::Vec, Op::Compare { w, lane, cond, d: NEW, a, b: VecArg::Reg(x) });
            let m = self.b.pure(Class::Int, Op::IntFromVec { size: Size::W32, d: NEW, s: m });
            self.b.pure(Class::Int, Op::Extend { d: NEW, s: m, signed: true })
        };
        let (above, number) = (mask(FloatCond::Le, limit), mask(FloatCond::Eq, x));
        let y = self.b.int_op(IntOp::Xor, size, raw, IntArg::Reg(above));
        self.b.int_op(IntOp::And, size, y, IntArg::Reg(number))
    }

    /// `F32` to `I32` in all lanes, saturating, NaN to 0.
    pub(super) fn saturate(&mut self, w: Width, x: Reg) -> Reg {
        let raw = self.b.pure(Class::Vec, Op::Un { op: VecUn::I32FromF32, w, d: NEW, s: VecArg::Reg(x) });
        let limit = self.b.splat32((2f32.powi(31)).to_bits());
        let limit = self.b.in_reg(w, VecArg::Mem(limit));
        let compare = |cond, a| Op::Compare { w, lane: Size::W32, cond, d: NEW, a, b: VecArg::Reg(x) };
        let above = self.b.pure(Class::Vec, compare(FloatCond::Le, limit));
        let number = self.b.pure(Class::Vec, compare(FloatCond::Eq, x));
        let bits = |op, a, b| Op::Vec { op, w, d: NEW, a, b: VecArg::Reg(b) };
        let y = self.b.pure(Class::Vec, bits(VecOp::Xor, raw, above));
        self.b.pure(Class::Vec, bits(VecOp::And, y, number))
    }

    /// `c` plus sums of four products of unsigned and signed bytes, by 32-bit lanes. Codes are at most 3, so two products fit 16 bits.
    pub(super) fn dot(&mut self, w: Width, c: Reg, a: Reg, b: VecArg) -> Reg {
        if self.has_dot {
            return self.b.pure_unless_memory(Op::Dot { w, d: NEW, c, a, b });
        }
        let pairs = self.b.pure_unless_memory(Op::Vec { op: VecOp::MulAddU8I8, w, d: NEW, a, b });
        let sums = self.sum_pairs(w, pairs);
        self.b.pure(Class::Vec, Op::Vec { op: VecOp::AddI32, w, d: NEW, a: c, b: VecArg::Reg(sums) })
    }

    /// Sums of two neighbours of 16 bits as 32-bit lanes.
    pub(super) fn sum_pairs(&mut self, w: Width, a: Reg) -> Reg {
        let ones = self.b.splat32(0x0001_0001);
        self.b.pure(Class::Vec, Op::Vec { op: VecOp::MulAddI16, w, d: NEW, a, b: VecArg::Mem(ones) })
    }

    pub(super) fn shift_imm(&mut self, op: ShiftOp, w: Width, a: Reg, n: u8) -> Reg {
        self.b.pure(Class::Vec, Op::Shift { op, w, d: NEW, a, n })
    }
}

fn int_op(op: Bin) -> IntOp {
    match op {
        Bin::Add => IntOp::Add,
        Bin::Sub => IntOp::Sub,
        Bin::Mul => IntOp::Mul,
        Bin::Min => IntOp::Min,
        Bin::Max => IntOp::Max,
        Bin::And => IntOp::And,
        Bin::Or => IntOp::Or,
        Bin::Xor => IntOp::Xor,
        Bin::Shl => IntOp::Shl,
        Bin::Shr => IntOp::Shr,
        Bin::Sar => IntOp::Sar,
        Bin::Div | Bin::Rem | Bin::MulHi => unreachable!("lowered on their own"),
    }
}
