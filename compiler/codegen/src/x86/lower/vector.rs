//! Vector expressions: one register for every group of lanes, or a single one when all lanes are equal.
//!
//! `F32`, `I32` and truth values (all ones or zero) have lanes of 32 bits, `F64` four lanes of 64 bits in 256. What has no vector form
//! runs lane by lane.

use chimera_ir::DType;
use chimera_ir::loops::{Bin, Cmp, Expr, Ty, Un};

use super::super::build::NEW;
use super::super::flat::{Class, IntArg, IntOp, Mem, Op, Reg, ShiftOp, Size, VecArg, VecOp, VecUn, Width};
use super::scalar::{float_cond, vec_op};
use super::{Lower, Slot};
use crate::shape::Shape;

/// Registers or memory, one for every group or a single one.
type Groups<T> = Vec<T>;

fn at<T: Copy>(xs: &[T], g: usize) -> T {
    xs[if xs.len() == 1 { 0 } else { g }]
}

impl Lower<'_> {
    /// The width of a vector register of that type.
    pub(super) fn w(&self, ty: Ty) -> Width {
        match (ty, &self.wide) {
            (Ty::F64, _) => Width::Y,
            (_, Some(wide)) => wide.w,
            (_, None) => unreachable!("vectors exist in wide loops only"),
        }
    }

    /// Lanes of a register of that type.
    pub(super) fn per(&self, ty: Ty) -> usize {
        match (ty, &self.wide) {
            (Ty::F64, _) => 4,
            (_, Some(wide)) => wide.per,
            (_, None) => unreachable!("vectors exist in wide loops only"),
        }
    }

    /// An `F32`, `F64`, `I32` or `Bool` expression in all lanes, one register for every group.
    pub(super) fn vector(&mut self, e: &Expr) -> Vec<Reg> {
        let n = self.width() / self.per(self.kernel.ty(e));
        let xs = self.eval(e);
        (0..n).map(|g| at(&xs, g)).collect()
    }

    /// A uniform expression in every lane of one register.
    pub(super) fn splat(&mut self, e: &Expr) -> Reg {
        self.eval(e)[0]
    }

    /// Operands: what lies in memory as it is needed is used from there.
    pub(super) fn args(&mut self, e: &Expr) -> Groups<VecArg> {
        match e {
            Expr::F32(x) => return vec![VecArg::Mem(self.b.splat32(x.to_bits()))],
            Expr::F64(x) => return vec![VecArg::Mem(self.b.splat64(x.to_bits()))],
            Expr::I32(x) => return vec![VecArg::Mem(self.b.splat32(*x as u32))],
            Expr::Load(b, i)
                if matches!(self.dtype(*b), DType::F32 | DType::I32 | DType::F64)
                    && self.shape(i) == Shape::Affine(1) =>
            {
                let size = self.dtype(*b).size();
                return self.neighbours(*b, i, size);
            }
            Expr::Word(b, i) if self.shape(i) == Shape::Affine(1) => return self.neighbours(*b, i, 4),
            _ => {}
        }
        self.eval(e).into_iter().map(VecArg::Reg).collect()
    }

    /// Elements of `size` bytes next to each other, by groups.
    fn neighbours(&mut self, buf: chimera_ir::loops::Buf, index: &Expr, size: usize) -> Groups<VecArg> {
        let (ty, unit) = (if size == 8 { Ty::F64 } else { Ty::F32 }, size as i32);
        let per = self.per(ty);
        let first = self.address(buf, index, i64::from(unit), self.reach(unit));
        (0..self.width() / per).map(|g| VecArg::Mem(first.plus((g * per) as i32 * unit))).collect()
    }

    /// As [`Lower::vector`], but a single register when all lanes are equal.
    fn eval(&mut self, e: &Expr) -> Groups<Reg> {
        let ty = self.kernel.ty(e);
        let uniform = self.shape(e) == Shape::Uniform;
        let w = self.w(ty);
        match e {
            Expr::F32(_) | Expr::F64(_) | Expr::I32(_) => self.in_regs(w, e),
            Expr::Int(_) => unreachable!("indices have no vector form"),
            Expr::Var(v) => match self.slots[v.0 as usize].clone() {
                Slot::Vector(xs) => xs,
                Slot::Splat(x) => vec![x],
                _ if uniform => vec![self.splat_scalar(e)],
                _ => self.lanewise(ty, |lower| lower.scalar(e)),
            },
            Expr::Load(b, i) if uniform => vec![self.splat_load(*b, i, e)],
            Expr::Word(b, i) if uniform => {
                let m = self.address(*b, i, 4, 0);
                vec![self.broadcast_from(Size::W32, w, m)]
            }
            Expr::Load(b, i) => self.gather(*b, i, e),
            Expr::Word(_, i) if self.shape(i) == Shape::Affine(1) => self.in_regs(w, e),
            Expr::Word(..) => self.lanewise(ty, |lower| lower.scalar(e)),
            Expr::Un(op, a) => {
                let xs = self.eval(a);
                xs.into_iter().map(|x| self.unary_vec(*op, ty, w, x)).collect()
            }
            Expr::Bin(op @ (Bin::Shl | Bin::Shr | Bin::Sar), a, n) => self.shift(*op, w, a, n),
            Expr::Bin(Bin::MulHi, a, b) => {
                let (xs, ys) = (self.eval(a), self.eval(b));
                (0..xs.len().max(ys.len())).map(|g| self.mul_hi(w, at(&xs, g), at(&ys, g))).collect()
            }
            Expr::Bin(op, a, b) => {
                let op = vec_op(*op, ty).expect("a verified kernel has vector arithmetic only");
                // A constant or an element in memory is better off on the right.
                let swap = commutes(op) && matches!(**a, Expr::F32(_) | Expr::I32(_) | Expr::F64(_) | Expr::Load(..));
                let (a, b) = if swap && !matches!(**b, Expr::Load(..)) { (b, a) } else { (a, b) };
                self.zip(w, a, b, |a, b| Op::Vec { op, w, d: NEW, a, b })
            }
            Expr::Fma(a, b, c) => self.fma(w, a, b, c),
            Expr::Dot4(acc, a, b) => {
                let (cs, xs, ys) = (self.eval(acc), self.eval(a), self.args(b));
                let n = cs.len().max(xs.len()).max(ys.len());
                (0..n).map(|g| self.dot(w, at(&cs, g), at(&xs, g), at(&ys, g))).collect()
            }
            Expr::Cmp(op, a, b) => self.compare(*op, a, b, e),
            Expr::Select(c, a, b) if ty == Ty::F64 && !uniform => {
                let _ = (c, a, b);
                self.lanewise(ty, |lower| lower.scalar(e))
            }
            Expr::Select(..) if ty == Ty::F64 => vec![self.splat_scalar(e)],
            Expr::Select(c, a, b) => {
                let (cs, xs, ys) = (self.eval(c), self.eval(a), self.eval(b));
                let n = cs.len().max(xs.len()).max(ys.len());
                let blend = |g| Op::Blend { w, d: NEW, mask: at(&cs, g), a: at(&xs, g), b: at(&ys, g) };
                (0..n).map(|g| self.b.pure(Class::Vec, blend(g))).collect()
            }
            Expr::Cast(to, a) => self.cast_vec(*to, a, e),
        }
    }

    fn in_regs(&mut self, w: Width, e: &Expr) -> Groups<Reg> {
        self.args(e).into_iter().map(|x| self.b.in_reg(w, x)).collect()
    }

    fn zip(&mut self, w: Width, a: &Expr, b: &Expr, op: impl Fn(Reg, VecArg) -> Op) -> Groups<Reg> {
        let xs = self.args(a);
        let xs: Vec<Reg> = xs.into_iter().map(|x| self.b.in_reg(w, x)).collect();
        let ys = self.args(b);
        (0..xs.len().max(ys.len())).map(|g| self.b.pure_unless_memory(op(at(&xs, g), at(&ys, g)))).collect()
    }

    fn fma(&mut self, w: Width, a: &Expr, b: &Expr, c: &Expr) -> Groups<Reg> {
        let mut args = [self.args(a), self.args(b), self.args(c)];
        // One operand may stay in memory: the last one that is there.
        let keep = args.iter().rposition(|x| matches!(x[0], VecArg::Mem(_)));
        for (n, xs) in args.iter_mut().enumerate() {
            if Some(n) != keep {
                xs.iter_mut().for_each(|x| *x = VecArg::Reg(self.b.in_reg(w, *x)));
            }
        }
        let [xs, ys, zs] = args;
        let n = xs.len().max(ys.len()).max(zs.len());
        let op = |g| Op::Fma { w, lane: Size::W32, d: NEW, a: at(&xs, g), b: at(&ys, g), c: at(&zs, g) };
        (0..n).map(|g| self.b.pure_unless_memory(op(g))).collect()
    }

    /// One element in all lanes.
    fn splat_load(&mut self, buf: chimera_ir::loops::Buf, index: &Expr, e: &Expr) -> Reg {
        match self.dtype(buf) {
            DType::F32 | DType::I32 => {
                let m = self.address(buf, index, 4, 0);
                self.broadcast_from(Size::W32, self.w(Ty::F32), m)
            }
            DType::F64 => {
                let m = self.address(buf, index, 8, 0);
                self.broadcast_from(Size::W64, Width::Y, m)
            }
            _ => self.splat_scalar(e),
        }
    }

    fn broadcast_from(&mut self, lane: Size, w: Width, m: Mem) -> Reg {
        self.b.here(Class::Vec, Op::Broadcast { w, lane, d: NEW, s: VecArg::Mem(m) })
    }

    /// A uniform expression that is evaluated as a scalar, in all lanes.
    fn splat_scalar(&mut self, e: &Expr) -> Reg {
        let ty = self.kernel.ty(e);
        let x = self.scalar(e);
        self.splat_value(ty, x)
    }

    /// A scalar in all lanes of one register.
    pub(super) fn splat_value(&mut self, ty: Ty, x: Reg) -> Reg {
        let w = self.w(ty);
        let s = match ty {
            Ty::F32 | Ty::F64 => x,
            Ty::Bool => self.mask_of(x),
            Ty::I32 | Ty::I64 => self.b.pure(Class::Vec, Op::VecFromInt { size: Size::W32, d: NEW, s: x }),
        };
        let lane = if ty == Ty::F64 { Size::W64 } else { Size::W32 };
        self.b.pure(Class::Vec, Op::Broadcast { w, lane, d: NEW, s: VecArg::Reg(s) })
    }

    /// Evaluate something in every lane on its own.
    pub(super) fn each_lane(&mut self, mut f: impl FnMut(&mut Self)) {
        for lane in 0..self.width() {
            self.lane = lane;
            f(self);
        }
        self.lane = 0;
    }

    /// The registers of what `f` evaluates in the current lane, by way of memory.
    pub(super) fn lanewise(&mut self, ty: Ty, mut f: impl FnMut(&mut Self) -> Reg) -> Groups<Reg> {
        let (unit, w, per) = (if ty == Ty::F64 { 8 } else { 4 }, self.w(ty), self.per(ty));
        let mut xs = vec![];
        self.each_lane(|lower| {
            let x = f(lower);
            xs.push(x);
        });
        let from = self.transit(false);
        for (lane, x) in xs.into_iter().enumerate() {
            let m = Mem::frame(from + unit * lane as i32);
            match ty {
                Ty::F32 => self.b.push(Op::VecStore { w: Width::S, m, s: x }),
                Ty::F64 => self.b.push(Op::VecStore { w: Width::D, m, s: x }),
                Ty::I32 | Ty::I64 => self.b.push(Op::IntStore { m, s: x, bytes: 4 }),
                Ty::Bool => {
                    let s = self.mask_of(x);
                    self.b.push(Op::VecStore { w: Width::S, m, s });
                }
            }
        }
        let group = |g: usize| Op::VecLoad { w, d: NEW, m: Mem::frame(from + unit * (g * per) as i32) };
        (0..self.width() / per).map(|g| self.b.here(Class::Vec, group(g))).collect()
    }

    /// The current lane of a value in vectors, as a scalar.
    pub(super) fn extract(&mut self, ty: Ty, xs: &[Reg]) -> Reg {
        let (unit, per) = (if ty == Ty::F64 { 8 } else { 4 }, self.per(ty));
        let (g, lane) = (self.lane / per, self.lane % per);
        let float = matches!(ty, Ty::F32 | Ty::F64);
        if lane == 0 {
            return if float { xs[g] } else { self.lane_to_int(ty, xs[g]) };
        }
        let from = self.transit(false);
        self.b.push(Op::VecStore { w: self.w(ty), m: Mem::frame(from), s: xs[g] });
        let m = Mem::frame(from + unit * lane as i32);
        match ty {
            Ty::F32 => self.b.here(Class::Vec, Op::VecLoad { w: Width::S, d: NEW, m }),
            Ty::F64 => self.b.here(Class::Vec, Op::VecLoad { w: Width::D, d: NEW, m }),
            _ => {
                let x = self.b.here(Class::Int, Op::IntLoad { d: NEW, m, size: Size::W32, narrow: None });
                if ty == Ty::Bool { self.b.int_op(IntOp::And, Size::W32, x, IntArg::Imm(1)) } else { x }
            }
        }
    }

    fn unary_vec(&mut self, op: Un, ty: Ty, w: Width, x: Reg) -> Reg {
        let un = |op| Op::Un { op, w, d: NEW, s: VecArg::Reg(x) };
        let op = match (op, ty) {
            (Un::ToBits | Un::FromBits, _) => return x,
            (Un::Neg | Un::Abs, Ty::F32 | Ty::F64) => return self.sign(op, ty, w, x),
            (Un::Neg | Un::Abs, _) => {
                let zero = self.b.local(Class::Vec, Op::VecZero { d: NEW });
                let minus = Op::Vec { op: VecOp::SubI32, w, d: NEW, a: zero, b: VecArg::Reg(x) };
                let y = self.b.pure(Class::Vec, minus);
                if op == Un::Neg {
                    return y;
                }
                let max = Op::Vec { op: VecOp::MaxI32, w, d: NEW, a: x, b: VecArg::Reg(y) };
                return self.b.pure(Class::Vec, max);
            }
            (Un::Not, _) => {
                let ones = VecArg::Mem(self.b.splat32(u32::MAX));
                return self.b.pure(Class::Vec, Op::Vec { op: VecOp::Xor, w, d: NEW, a: x, b: ones });
            }
            (Un::Popcnt, _) => return self.popcnt(w, x),
            (Un::Sqrt, Ty::F32) => VecUn::SqrtF32,
            (Un::Sqrt, _) => VecUn::SqrtF64,
            (Un::Floor, Ty::F32) => VecUn::FloorF32,
            (Un::Floor, _) => VecUn::FloorF64,
            (Un::Nearest, Ty::F32) => VecUn::NearestF32,
            (Un::Nearest, _) => VecUn::NearestF64,
        };
        self.b.pure(Class::Vec, un(op))
    }

    /// Bit counts of half bytes from a table, then their sums.
    fn popcnt(&mut self, w: Width, x: Reg) -> Reg {
        let half = VecArg::Mem(self.b.splat32(0x0f0f_0f0f));
        let table = self.b.f.constant(std::array::from_fn(|i| (i % 16).count_ones() as u8));
        let table = self.b.in_reg(w, VecArg::Mem(table));
        let ones = VecArg::Mem(self.b.splat32(0x0101_0101));
        let high = self.shift_imm(ShiftOp::ShrI32, w, x, 4);
        let bin = |op, a, b| Op::Vec { op, w, d: NEW, a, b };
        let pairs = [x, high].map(|x| {
            let x = self.b.pure(Class::Vec, bin(VecOp::And, x, half));
            let counts = self.b.pure(Class::Vec, bin(VecOp::ShuffleBytes, table, VecArg::Reg(x)));
            self.b.pure(Class::Vec, bin(VecOp::MulAddU8I8, counts, ones))
        });
        let sums = self.b.pure(Class::Vec, bin(VecOp::AddI16, pairs[0], VecArg::Reg(pairs[1])));
        self.sum_pairs(w, sums)
    }

    fn shift(&mut self, op: Bin, w: Width, a: &Expr, n: &Expr) -> Groups<Reg> {
        let xs = self.eval(a);
        if let Expr::I32(n) = n {
            let op = match op {
                Bin::Shl => ShiftOp::ShlI32,
                Bin::Shr => ShiftOp::ShrI32,
                _ => ShiftOp::SarI32,
            };
            let n = (*n & 31) as u8;
            return if n == 0 { xs } else { xs.into_iter().map(|x| self.shift_imm(op, w, x, n)).collect() };
        }
        let op = match op {
            Bin::Shl => VecOp::ShlI32,
            Bin::Shr => VecOp::ShrI32,
            _ => VecOp::SarI32,
        };
        let below = VecArg::Mem(self.b.splat32(31));
        let ns = self.eval(n);
        let bin = |op, a, b| Op::Vec { op, w, d: NEW, a, b };
        let ns: Vec<Reg> = ns.into_iter().map(|n| self.b.pure(Class::Vec, bin(VecOp::And, n, below))).collect();
        let n = xs.len().max(ns.len());
        (0..n).map(|g| self.b.pure(Class::Vec, bin(op, at(&xs, g), VecArg::Reg(at(&ns, g))))).collect()
    }

    /// The upper halves of unsigned products, from those of the even and of the odd lanes.
    fn mul_hi(&mut self, w: Width, x: Reg, y: Reg) -> Reg {
        let bin = |op, a, b| Op::Vec { op, w, d: NEW, a, b };
        let even = self.b.pure(Class::Vec, bin(VecOp::MulEvenU32, x, VecArg::Reg(y)));
        let [x, y] = [x, y].map(|s| {
            let odd = Op::Un { op: VecUn::OddToEven, w, d: NEW, s: VecArg::Reg(s) };
            self.b.pure(Class::Vec, odd)
        });
        let odd = self.b.pure(Class::Vec, bin(VecOp::MulEvenU32, x, VecArg::Reg(y)));
        let even = self.shift_imm(ShiftOp::ShrI64, w, even, 32);
        let upper = VecArg::Mem(self.b.splat64(0xffff_ffff_0000_0000));
        let odd = self.b.pure(Class::Vec, bin(VecOp::And, odd, upper));
        self.b.pure(Class::Vec, bin(VecOp::Or, even, VecArg::Reg(odd)))
    }

    fn compare(&mut self, op: Cmp, a: &Expr, b: &Expr, e: &Expr) -> Groups<Reg> {
        match self.kernel.ty(a) {
            Ty::F32 => {
                let w = self.w(Ty::F32);
                let cond = float_cond(op);
                self.zip(w, a, b, |a, b| Op::Compare { w, lane: Size::W32, cond, d: NEW, a, b })
            }
            Ty::I32 | Ty::Bool => {
                let (xs, ys) = (self.eval(a), self.eval(b));
                let n = xs.len().max(ys.len());
                (0..n).map(|g| self.compare_i32(op, at(&xs, g), at(&ys, g))).collect()
            }
            _ if self.shape(e) == Shape::Uniform => vec![self.splat_scalar(e)],
            Ty::I64 if self.wide.as_ref().is_some_and(|w| w.lanes.compares_indices(self.kernel, e)) => {
                self.compare_indices(op, a, b)
            }
            Ty::I64 | Ty::F64 => self.lanewise(Ty::Bool, |lower| lower.scalar(e)),
        }
    }

    fn compare_i32(&mut self, op: Cmp, x: Reg, y: Reg) -> Reg {
        let w = self.w(Ty::I32);
        let bin = |op, a, b| Op::Vec { op, w, d: NEW, a, b: VecArg::Reg(b) };
        let (op, x, y, not) = match op {
            Cmp::Eq => (VecOp::EqI32, x, y, false),
            Cmp::Ne => (VecOp::EqI32, x, y, true),
            Cmp::Lt => (VecOp::GtI32, y, x, false),
            Cmp::Le => (VecOp::GtI32, x, y, true),
        };
        let mask = self.b.pure(Class::Vec, bin(op, x, y));
        if not { self.unary_vec(Un::Not, Ty::Bool, w, mask) } else { mask }
    }

    /// Affine indices: their difference in the first lane, brought into 32 bits, plus what it grows by.
    fn compare_indices(&mut self, op: Cmp, a: &Expr, b: &Expr) -> Groups<Reg> {
        let stride = |shape| if let Shape::Affine(s) = shape { s } else { 0 };
        let step = stride(self.shape(a)).wrapping_sub(stride(self.shape(b)));
        if step.unsigned_abs() >= 1 << 20 {
            let e = Expr::Cmp(op, Box::new(a.clone()), Box::new(b.clone()));
            return self.lanewise(Ty::Bool, |lower| lower.scalar(&e));
        }
        let difference = Expr::bin(Bin::Sub, a.clone(), b.clone());
        let x = self.scalar(&difference);
        let x = self.b.int_op(IntOp::Min, Size::W64, x, IntArg::Imm(1 << 29));
        let x = self.b.int_op(IntOp::Max, Size::W64, x, IntArg::Imm(-(1 << 29)));
        let x = self.splat_value(Ty::I32, x);
        let xs = self.ramp(x, step as i32);
        let zero = self.b.local(Class::Vec, Op::VecZero { d: NEW });
        xs.into_iter().map(|x| self.compare_i32(op, x, zero)).collect()
    }

    /// `x` plus `step` from lane to lane.
    fn ramp(&mut self, x: Reg, step: i32) -> Groups<Reg> {
        let (w, per) = (self.w(Ty::I32), self.per(Ty::I32));
        let group = |lower: &mut Self, g: usize| {
            let steps = lower.b.lanes32(|l| step.wrapping_mul((g * per + l) as i32));
            let op = Op::Vec { op: VecOp::AddI32, w, d: NEW, a: x, b: VecArg::Mem(steps) };
            lower.b.pure(Class::Vec, op)
        };
        (0..self.width() / per).map(|g| group(self, g)).collect()
    }

    fn cast_vec(&mut self, to: Ty, a: &Expr, e: &Expr) -> Groups<Reg> {
        let (from, shape) = (self.kernel.ty(a), self.shape(a));
        let w = self.w(to);
        match (from, to) {
            _ if from == to && from != Ty::I64 => self.eval(a),
            (Ty::I64, Ty::I32) if matches!(shape, Shape::Affine(_)) => {
                let Shape::Affine(stride) = shape else { unreachable!("just matched") };
                let x = self.scalar(a);
                let x = self.splat_value(Ty::I32, x);
                self.ramp(x, stride as i32)
            }
            (Ty::F32, Ty::I32) => {
                let xs = self.eval(a);
                xs.into_iter().map(|x| self.saturate(w, x)).collect()
            }
            (Ty::I32, Ty::F32) => {
                let xs = self.args(a);
                let un = |s| Op::Un { op: VecUn::F32FromI32, w, d: NEW, s };
                xs.into_iter().map(|x| self.b.pure_unless_memory(un(x))).collect()
            }
            (Ty::Bool, Ty::I32 | Ty::F32) => {
                let one = if to == Ty::F32 { 1f32.to_bits() } else { 1 };
                let one = VecArg::Mem(self.b.splat32(one));
                let xs = self.eval(a);
                let and = |a| Op::Vec { op: VecOp::And, w, d: NEW, a, b: one };
                xs.into_iter().map(|x| self.b.pure(Class::Vec, and(x))).collect()
            }
            (Ty::F32 | Ty::I32, Ty::F64) => {
                let op = if from == Ty::F32 { VecUn::F64FromF32 } else { VecUn::F64FromI32 };
                let xs = self.eval(a);
                let halves: Vec<Reg> =
                    if shape == Shape::Uniform { xs } else { xs.into_iter().flat_map(|x| self.quarters(x)).collect() };
                let un = |s| Op::Un { op, w: Width::Y, d: NEW, s: VecArg::Reg(s) };
                halves.into_iter().map(|x| self.b.pure(Class::Vec, un(x))).collect()
            }
            _ if self.shape(e) == Shape::Uniform => vec![self.splat_scalar(e)],
            _ => self.lanewise(to, |lower| lower.scalar(e)),
        }
    }

    /// A register of 32-bit lanes as registers of four of them.
    fn quarters(&mut self, x: Reg) -> Vec<Reg> {
        let mut parts = vec![x];
        for w in [Width::Z, Width::Y] {
            if w <= self.w(Ty::F32) {
                let upper = |lower: &mut Self, s| lower.b.pure(Class::Vec, Op::UpperHalf { w, d: NEW, s });
                parts = parts.into_iter().flat_map(|x| [x, upper(self, x)]).collect();
            }
        }
        parts
    }
}

fn commutes(op: VecOp) -> bool {
    use VecOp::*;
    matches!(op, AddF32 | MulF32 | AddF64 | MulF64 | And | Or | Xor | AddI32 | MulI32 | MinI32 | MaxI32)
}
