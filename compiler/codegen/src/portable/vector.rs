//! Vector expressions: one value of four lanes for every group of four.
//!
//! `F32` is F32X4, `I32` and truth values (all ones or zero) are I32X4. What has no vector form runs lane by lane.

use chimera_ir::DType;
use chimera_ir::loops::{Bin, Cmp, Expr, Ty, Un};
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::{ConstantData, InstBuilder, Type, Value, types};

use super::memory::LITTLE;
use super::scalar::{float_cc, int_cc};
use super::stmt::{Lower, Slot};
use crate::Arch;
use crate::shape::Shape;

/// The vector type of a computed scalar; `F64` and `I64` have none.
pub(super) fn vector_type(ty: Ty) -> Option<Type> {
    match ty {
        Ty::F32 => Some(types::F32X4),
        Ty::I32 | Ty::Bool => Some(types::I32X4),
        Ty::F64 | Ty::I64 => None,
    }
}

impl Lower<'_, '_> {
    /// An `F32`, `I32` or `Bool` expression in all lanes.
    pub(super) fn vector(&mut self, e: &Expr) -> Vec<Value> {
        let groups = self.width() / 4;
        if self.shape(e) == Shape::Uniform {
            return vec![self.splat(e); groups];
        }
        let ty = self.kernel.ty(e);
        match e {
            Expr::Var(v) => match self.slots[v.0 as usize].clone() {
                Slot::Vector(xs) => xs.into_iter().map(|x| self.b.use_var(x)).collect(),
                _ => self.lanewise(ty, |lower| lower.scalar(e)),
            },
            Expr::Load(b, i) => self.gather(*b, i),
            Expr::Word(b, i) => self.gather_words(*b, i),
            Expr::Un(op, a) => {
                let xs = self.vector(a);
                xs.into_iter().map(|x| self.unary4(*op, ty, x)).collect()
            }
            Expr::Bin(Bin::Shl | Bin::Shr | Bin::Sar, _, n) if self.shape(n) != Shape::Uniform => {
                self.lanewise(ty, |lower| lower.scalar(e))
            }
            Expr::Bin(op @ (Bin::Shl | Bin::Shr | Bin::Sar), a, n) => {
                let xs = self.vector(a);
                let n = self.scalar(n);
                xs.into_iter().map(|x| self.binary(*op, ty, x, n)).collect()
            }
            Expr::Bin(op, a, b) => {
                let (xs, ys) = (self.vector(a), self.vector(b));
                xs.into_iter().zip(ys).map(|(x, y)| self.binary4(*op, ty, x, y)).collect()
            }
            Expr::Fma(a, b, c) => {
                let (xs, ys, zs) = (self.vector(a), self.vector(b), self.vector(c));
                (0..groups).map(|g| self.b.ins().fma(xs[g], ys[g], zs[g])).collect()
            }
            Expr::Dot4(acc, a, b) => {
                let (xs, ys, zs) = (self.vector(acc), self.vector(a), self.vector(b));
                (0..groups).map(|g| self.dot4x4(xs[g], ys[g], zs[g])).collect()
            }
            Expr::Cmp(op, a, b) => self.compare(*op, a, b, e),
            Expr::Select(c, a, b) => {
                let (cs, xs, ys) = (self.vector(c), self.vector(a), self.vector(b));
                (0..groups).map(|g| self.select4(ty, cs[g], xs[g], ys[g])).collect()
            }
            Expr::Cast(to, a) => self.cast4(*to, a, e),
            Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) => unreachable!("literals are uniform"),
        }
    }

    /// A uniform expression in every lane of one vector.
    pub(super) fn splat(&mut self, e: &Expr) -> Value {
        let ty = self.kernel.ty(e);
        match e {
            Expr::Var(v) => {
                if let Slot::Splat(x) = self.slots[v.0 as usize] {
                    return self.b.use_var(x);
                }
            }
            // A float in memory is broadcast by one instruction, an integer is not.
            Expr::Load(b, i) if self.kernel.bufs[b.0 as usize].dtype == DType::I32 => return self.splat_word(*b, i),
            Expr::Word(b, i) => return self.splat_word(*b, i),
            _ => {}
        }
        let x = self.scalar(e);
        self.splat_value(ty, x)
    }

    fn splat_word(&mut self, buf: chimera_ir::loops::Buf, index: &Expr) -> Value {
        let a = self.address(buf, index, 4, 0);
        let x = self.b.ins().load(types::F32, a.flags, a.at, a.offset);
        let x = self.b.ins().splat(types::F32X4, x);
        self.b.ins().bitcast(types::I32X4, LITTLE, x)
    }

    /// A scalar in every lane of one vector.
    pub(super) fn splat_value(&mut self, ty: Ty, x: Value) -> Value {
        match ty {
            Ty::F32 => self.b.ins().splat(types::F32X4, x),
            Ty::Bool => {
                let x = self.mask(x);
                self.b.ins().splat(types::I32X4, x)
            }
            _ => self.b.ins().splat(types::I32X4, x),
        }
    }

    /// A truth value as all ones or zero.
    fn mask(&mut self, x: Value) -> Value {
        let x = self.b.ins().uextend(types::I32, x);
        self.b.ins().ineg(x)
    }

    /// Four scalars as one vector.
    pub(super) fn pack(&mut self, ty: Ty, xs: [Value; 4]) -> Value {
        let xs = if ty == Ty::Bool { xs.map(|x| self.mask(x)) } else { xs };
        let vector = vector_type(ty).expect("a type with a vector form");
        let mut all = self.b.ins().scalar_to_vector(vector, xs[0]);
        for (l, &x) in xs.iter().enumerate().skip(1) {
            all = self.b.ins().insertlane(all, x, l as u8);
        }
        all
    }

    /// Evaluate something in every lane on its own.
    pub(super) fn each_lane(&mut self, mut f: impl FnMut(&mut Self, usize)) {
        for lane in 0..self.width() {
            self.lane = lane;
            f(self, lane);
        }
        self.lane = 0;
    }

    /// The vectors of what `f` evaluates in the current lane.
    pub(super) fn lanewise(&mut self, ty: Ty, mut f: impl FnMut(&mut Self) -> Value) -> Vec<Value> {
        let mut xs = vec![];
        self.each_lane(|lower, _| {
            let x = f(lower);
            xs.push(x);
        });
        xs.chunks_exact(4).map(|x| self.pack(ty, [x[0], x[1], x[2], x[3]])).collect()
    }

    fn unary4(&mut self, op: Un, ty: Ty, x: Value) -> Value {
        match op {
            Un::ToBits => self.b.ins().bitcast(types::I32X4, LITTLE, x),
            Un::FromBits => self.b.ins().bitcast(types::F32X4, LITTLE, x),
            Un::Not => self.b.ins().bnot(x),
            Un::Popcnt => self.popcnt4(x),
            _ => self.unary(op, ty, x),
        }
    }

    /// Bit counts by bytes, then their sum in every lane.
    fn popcnt4(&mut self, x: Value) -> Value {
        let x = self.b.ins().bitcast(types::I8X16, LITTLE, x);
        let x = self.b.ins().popcnt(x);
        let x = self.b.ins().bitcast(types::I32X4, LITTLE, x);
        let y = self.b.ins().ushr_imm_u(x, 8);
        let x = self.b.ins().iadd(x, y);
        let y = self.b.ins().ushr_imm_u(x, 16);
        let x = self.b.ins().iadd(x, y);
        let low = self.b.ins().iconst(types::I32, 0xff);
        let low = self.b.ins().splat(types::I32X4, low);
        self.b.ins().band(x, low)
    }

    pub(super) fn binary4(&mut self, op: Bin, ty: Ty, x: Value, y: Value) -> Value {
        match (op, ty) {
            (Bin::Min, Ty::F32) => {
                let c = self.b.ins().fcmp(FloatCC::LessThan, x, y);
                let c = self.b.ins().bitcast(types::F32X4, LITTLE, c);
                self.b.ins().bitselect(c, x, y)
            }
            (Bin::Max, Ty::F32) => {
                let c = self.b.ins().fcmp(FloatCC::LessThan, y, x);
                let c = self.b.ins().bitcast(types::F32X4, LITTLE, c);
                self.b.ins().bitselect(c, x, y)
            }
            (Bin::MulHi, _) => {
                let [low, high] = [false, true].map(|high| {
                    let [x, y] = [x, y].map(|x| match high {
                        false => self.b.ins().uwiden_low(x),
                        true => self.b.ins().uwiden_high(x),
                    });
                    self.b.ins().imul(x, y)
                });
                let x = self.shuffle(low, high, [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31]);
                self.b.ins().bitcast(types::I32X4, LITTLE, x)
            }
            _ => self.binary(op, ty, x, y),
        }
    }

    /// `acc` plus the dot products of four unsigned and four signed bytes.
    fn dot4x4(&mut self, acc: Value, codes: Value, bytes: Value) -> Value {
        let codes = self.b.ins().bitcast(types::I8X16, LITTLE, codes);
        let bytes = self.b.ins().bitcast(types::I8X16, LITTLE, bytes);
        if !self.target.fused_dot() {
            // Codes are at most 3, so the sum of two products does not saturate.
            let pairs = self.b.ins().x86_pmaddubsw(bytes, codes);
            let sum = self.pairwise(pairs);
            return self.b.ins().iadd(sum, acc);
        }
        // The trees that Cranelift recognises; they differ in the order of the factors.
        let arm = self.target.arch() == Arch::Aarch64;
        let product = |lower: &mut Self, high: bool| {
            let [u, s] = if high {
                [lower.b.ins().uwiden_high(codes), lower.b.ins().swiden_high(bytes)]
            } else {
                [lower.b.ins().uwiden_low(codes), lower.b.ins().swiden_low(bytes)]
            };
            let x = if arm { lower.b.ins().imul(u, s) } else { lower.b.ins().imul(s, u) };
            lower.pairwise(x)
        };
        let low = product(self, false);
        let high = product(self, true);
        let sum = self.b.ins().iadd_pairwise(low, high);
        self.b.ins().iadd(sum, acc)
    }

    /// Sums of neighbours of an I16X8 as I32X4.
    fn pairwise(&mut self, x: Value) -> Value {
        let low = self.b.ins().swiden_low(x);
        let high = self.b.ins().swiden_high(x);
        self.b.ins().iadd_pairwise(low, high)
    }

    fn compare(&mut self, op: Cmp, a: &Expr, b: &Expr, e: &Expr) -> Vec<Value> {
        match self.kernel.ty(a) {
            Ty::F32 => {
                let (xs, ys) = (self.vector(a), self.vector(b));
                xs.into_iter().zip(ys).map(|(x, y)| self.b.ins().fcmp(float_cc(op), x, y)).collect()
            }
            Ty::I32 | Ty::Bool => {
                let (xs, ys) = (self.vector(a), self.vector(b));
                xs.into_iter().zip(ys).map(|(x, y)| self.b.ins().icmp(int_cc(op), x, y)).collect()
            }
            Ty::I64 if self.compares_indices(e) => {
                let (xs, ys) = (self.indices(a), self.indices(b));
                let halves: Vec<Value> =
                    xs.into_iter().zip(ys).map(|(x, y)| self.b.ins().icmp(int_cc(op), x, y)).collect();
                let even = [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27];
                halves
                    .chunks_exact(2)
                    .map(|h| {
                        let x = self.shuffle(h[0], h[1], even);
                        let x = self.b.ins().bitcast(types::I32X4, LITTLE, x);
                        // A comparison again, so that selections know the lanes to be all ones or zero.
                        let zero = self.b.ins().iconst(types::I32, 0);
                        let zero = self.b.ins().splat(types::I32X4, zero);
                        self.b.ins().icmp(IntCC::SignedLessThan, x, zero)
                    })
                    .collect()
            }
            Ty::I64 | Ty::F64 => self.lanewise(Ty::Bool, |lower| lower.scalar(e)),
        }
    }

    /// An affine `I64` in all lanes, two in a vector.
    fn indices(&mut self, e: &Expr) -> Vec<Value> {
        let stride = match self.shape(e) {
            Shape::Affine(s) => s,
            _ => 0,
        };
        let base = self.scalar(e);
        let base = self.b.ins().splat(types::I64X2, base);
        let pairs = self.width() / 2;
        if stride == 0 {
            return vec![base; pairs];
        }
        let mut at = |pair: usize| {
            let lane = |l: usize| stride.wrapping_mul((2 * pair + l) as i64).to_le_bytes();
            let steps = self.constant(types::I64X2, &[lane(0), lane(1)].concat());
            self.b.ins().iadd(base, steps)
        };
        (0..pairs).map(&mut at).collect()
    }

    fn constant(&mut self, ty: Type, bytes: &[u8]) -> Value {
        let constant = self.b.func.dfg.constants.insert(ConstantData::from(bytes));
        self.b.ins().vconst(ty, constant)
    }

    fn select4(&mut self, ty: Ty, c: Value, x: Value, y: Value) -> Value {
        if ty != Ty::F32 {
            return self.b.ins().bitselect(c, x, y);
        }
        let [x, y] = [x, y].map(|x| self.b.ins().bitcast(types::I32X4, LITTLE, x));
        let z = self.b.ins().bitselect(c, x, y);
        self.b.ins().bitcast(types::F32X4, LITTLE, z)
    }

    fn cast4(&mut self, to: Ty, a: &Expr, e: &Expr) -> Vec<Value> {
        let from = self.kernel.ty(a);
        match (from, to) {
            (Ty::I64, Ty::I32) if self.shape(a) != Shape::Varying => {
                let Shape::Affine(stride) = self.shape(a) else { unreachable!("uniform casts are splat") };
                let groups = self.groups();
                let base = self.scalar(a);
                let base = self.b.ins().ireduce(types::I32, base);
                let base = self.b.ins().splat(types::I32X4, base);
                let group = |g: usize| {
                    let lane = |l: usize| (stride as i32).wrapping_mul((4 * g + l) as i32).to_le_bytes();
                    let steps = self.constant(types::I32X4, &[lane(0), lane(1), lane(2), lane(3)].concat());
                    self.b.ins().iadd(base, steps)
                };
                (0..groups).map(group).collect()
            }
            (Ty::F64 | Ty::I64, _) => self.lanewise(to, |lower| lower.scalar(e)),
            _ => {
                let xs = self.vector(a);
                xs.into_iter().map(|x| self.convert4(from, to, x)).collect()
            }
        }
    }

    fn convert4(&mut self, from: Ty, to: Ty, x: Value) -> Value {
        match (from, to) {
            (Ty::F32, Ty::I32) => self.b.ins().fcvt_to_sint_sat(types::I32X4, x),
            (Ty::I32, Ty::F32) => self.b.ins().fcvt_from_sint(types::F32X4, x),
            (Ty::Bool, Ty::I32 | Ty::F32) => {
                let one = if to == Ty::F32 { i64::from(1f32.to_bits()) } else { 1 };
                let one = self.b.ins().iconst(types::I32, one);
                let one = self.b.ins().splat(types::I32X4, one);
                let x = self.b.ins().band(x, one);
                if to == Ty::F32 { self.b.ins().bitcast(types::F32X4, LITTLE, x) } else { x }
            }
            _ => x,
        }
    }
}
