//! Striped reductions: eight partial results at once, then the fixed tree.
//!
//! Stripe `j` is lane `j`; the elements that do not fill all stripes are added to theirs one by one, in memory.

use chimera_ir::loops::{Acc, Bin, Expr, STRIPES, Stmt, Ty, Var};

use super::super::build::NEW;
use super::super::flat::{Base, Class, Cond, IntArg, IntOp, Mem, Op, Reg, Size, VecArg, VecOp, Width};
use super::lanes::{least, zero};
use super::scalar::vec_op;
use super::{Bound, Lower, Slot, class, scalar_width, size};
use crate::shape::Fact;
use crate::walk;

/// The stripes of one accumulator: vectors of eight or four, or eight scalars.
struct Striped {
    ty: Ty,
    parts: Vec<Reg>,
    /// Width of a part, if it is a vector.
    w: Option<Width>,
}

impl Striped {
    fn unit(&self) -> i32 {
        if matches!(self.ty, Ty::F64 | Ty::I64) { 8 } else { 4 }
    }

    /// Bytes of one part.
    fn bytes(&self) -> i32 {
        (STRIPES / self.parts.len()) as i32 * self.unit()
    }

    fn class(&self) -> Class {
        if self.w.is_some() { Class::Vec } else { class(self.ty) }
    }
}

fn combine(acc: &Acc) -> Bin {
    match acc {
        Acc::Sum(_) | Acc::Dot(..) => Bin::Add,
        Acc::Max(_) => Bin::Max,
    }
}

impl Lower<'_> {
    /// See [`Stmt::Reduce`].
    pub(super) fn reduce(&mut self, var: Var, lo: &Expr, hi: &Expr, body: &[Stmt], accs: &[(Var, Acc)]) {
        let step = STRIPES as i64;
        let extent = self.extent(lo, hi);
        let fact = Fact::of(lo, &self.facts);
        let (mut at, end) = (self.bound(lo), self.bound(hi));
        let striped: Vec<Striped> = accs.iter().map(|(v, acc)| self.stripes_of(*v, acc)).collect();

        let inner: Vec<&Expr> = accs.iter().flat_map(|(_, acc)| walk::terms(acc)).flatten().collect();
        let first = Fact::counting(fact, step);
        // A local that lives on outside of the reduction keeps everything in order.
        let lanes = self.vectorisable(var, STRIPES, first, body, &inner);
        let full = extent.map(|n| if lanes.is_some() { n / step * step } else { 0 });
        if let Some(lanes) = lanes {
            self.facts[var.0 as usize] = first;
            let bound = match full {
                Some(full) => self.further(at, full),
                None => self.further(end, 1 - step),
            };
            at = self.counted(var, at, bound, full.map(|n| n / step), step, &mut |lower| {
                lower.at_once(&lanes, Width::Y, body, |lower| {
                    for (s, (_, acc)) in striped.iter().zip(accs) {
                        lower.accumulate(s, acc);
                    }
                });
            });
        }
        self.facts[var.0 as usize] = Fact::counting(fact, 1);
        self.rest(var, [at, end], extent.zip(full).map(|(n, full)| n - full), body, accs, &striped);
        for ((v, acc), s) in accs.iter().zip(&striped) {
            let since = self.b.now();
            let mut total = self.tree(s, acc);
            if self.is_shared(*v) {
                total = self.overwrite(*v, class(s.ty), vec![total], since)[0];
            }
            self.slots[v.0 as usize] = Slot::Scalar(total);
        }
    }

    fn stripes_of(&mut self, v: Var, acc: &Acc) -> Striped {
        let ty = self.ty(v);
        let start = if combine(acc) == Bin::Max { least(ty) } else { zero(ty) };
        let (n, w) = match ty {
            Ty::F32 | Ty::I32 => (1, Some(Width::Y)),
            Ty::F64 => (2, Some(Width::Y)),
            Ty::I64 | Ty::Bool => (STRIPES, None),
        };
        let class = if w.is_some() { Class::Vec } else { Class::Int };
        let x = match (w, &start) {
            (None, _) => self.scalar(&start),
            (_, Expr::F32(x)) => self.constant(x.to_bits()),
            (_, Expr::I32(x)) => self.constant(*x as u32),
            (_, Expr::F64(x)) => {
                let m = self.b.splat64(x.to_bits());
                self.b.in_reg(Width::Y, VecArg::Mem(m))
            }
            (_, _) => unreachable!("literals of vector types are matched"),
        };
        let parts: Vec<Reg> = (0..n).map(|_| self.b.mutable(class)).collect();
        for &d in &parts {
            self.b.push(if class == Class::Vec { Op::VecMove { d, s: x } } else { Op::IntMove { d, s: x } });
        }
        Striped { ty, parts, w }
    }

    fn constant(&mut self, bits: u32) -> Reg {
        if bits == 0 {
            return self.b.local(Class::Vec, Op::VecZero { d: NEW });
        }
        let m = self.b.splat32(bits);
        self.b.in_reg(Width::Y, VecArg::Mem(m))
    }

    /// One step of all stripes.
    fn accumulate(&mut self, s: &Striped, acc: &Acc) {
        if let (Acc::Sum(Expr::Cast(Ty::I32, flag)), Some(w)) = (acc, s.w)
            && self.kernel.ty(flag) == Ty::Bool
        {
            // A mask is minus one where the flag is one.
            let mask = self.vector(flag)[0];
            let op = VecOp::SubI32;
            return self.b.push(Op::Vec { op, w, d: s.parts[0], a: s.parts[0], b: VecArg::Reg(mask) });
        }
        let mut all = |e: &Expr| -> Vec<Reg> {
            if s.w.is_some() {
                return self.vector(e);
            }
            let mut xs = vec![];
            self.each_lane(|lower| {
                let x = lower.scalar(e);
                xs.push(x);
            });
            xs
        };
        let [x, y] = walk::terms(acc).map(|e| e.map(&mut all).unwrap_or_default());
        let since = self.b.now();
        for (n, &part) in s.parts.iter().enumerate() {
            let new = match acc {
                Acc::Dot(..) => {
                    let [a, b, c] = [x[n], y[n], part].map(VecArg::Reg);
                    self.b.here(Class::Vec, Op::Fma { w: Width::Y, lane: Size::W32, d: NEW, a, b, c })
                }
                Acc::Sum(_) => self.join(s.w, s.ty, Bin::Add, part, x[n]),
                Acc::Max(_) => self.join(s.w, s.ty, Bin::Max, x[n], part),
            };
            self.b.assign(s.class(), part, new, since);
        }
    }

    /// `Sum` or `Max` of two partial results: vectors of width `w`, or integers.
    fn join(&mut self, w: Option<Width>, ty: Ty, op: Bin, a: Reg, b: Reg) -> Reg {
        match w {
            Some(w) => {
                let op = vec_op(op, ty).expect("sums and maxima have a vector form");
                self.b.pure(Class::Vec, Op::Vec { op, w, d: NEW, a, b: VecArg::Reg(b) })
            }
            None => {
                let op = if op == Bin::Add { IntOp::Add } else { IntOp::Max };
                self.b.int_op(op, size(ty), a, IntArg::Reg(b))
            }
        }
    }

    /// The elements from `at` on, in order: the first goes to stripe 0.
    fn rest(
        &mut self,
        var: Var,
        [at, end]: [Bound; 2],
        left: Option<i64>,
        body: &[Stmt],
        accs: &[(Var, Acc)],
        striped: &[Striped],
    ) {
        if left == Some(0) {
            return;
        }
        while self.stripes.len() < striped.len() {
            let room = self.b.f.room(8 * STRIPES as i32);
            self.stripes.push(room);
        }
        let from = match at {
            Bound::Lit(x) => self.b.int(x),
            Bound::Val(r) => r,
        };
        let slots = self.stripes.clone();
        let run = |lower: &mut Self| {
            for (s, &slot) in striped.iter().zip(&slots) {
                for (n, &part) in s.parts.iter().enumerate() {
                    let m = Mem::frame(slot + n as i32 * s.bytes());
                    lower.b.push(match s.w {
                        Some(w) => Op::VecStore { w, m, s: part },
                        None => Op::IntStore { m, s: part, bytes: 8 },
                    });
                }
            }
            lower.counted(var, at, end, left, 1, &mut |lower| {
                lower.block(body);
                let here = lower.scalar(&var.into());
                let stripe = lower.b.int_op(IntOp::Sub, Size::W64, here, IntArg::Reg(from));
                let stripe = lower.b.int_op(IntOp::And, Size::W64, stripe, IntArg::Imm(STRIPES as i32 - 1));
                for ((s, &slot), (_, acc)) in striped.iter().zip(&slots).zip(accs) {
                    lower.one(s, slot, stripe, acc);
                }
            });
            for (s, &slot) in striped.iter().zip(&slots) {
                for (n, &d) in s.parts.iter().enumerate() {
                    let m = Mem::frame(slot + n as i32 * s.bytes());
                    lower.b.push(match s.w {
                        Some(w) => Op::VecLoad { w, d, m },
                        None => Op::IntLoad { d, m, size: Size::W64, narrow: None },
                    });
                }
            }
        };
        if left.is_some() {
            return run(self);
        }
        let end = self.bound_arg(end);
        self.b.enter();
        run(self);
        let then = self.b.leave();
        self.b.branch(Cond::Lt, Size::W64, from, end, then, vec![]);
    }

    /// Add the current element to a stripe in memory.
    fn one(&mut self, s: &Striped, slot: i32, stripe: Reg, acc: &Acc) {
        let base = self.b.pure(Class::Int, Op::Lea { d: NEW, m: Mem::frame(slot) });
        let m = Mem { base: Base::Reg(base), index: Some((stripe, s.unit() as u8)), disp: 0 };
        let [x, y] = walk::terms(acc).map(|e| e.map(|e| self.scalar(e)));
        let x = x.expect("an accumulation has an operand");
        if class(s.ty) == Class::Int {
            let size = size(s.ty);
            let old = self.b.here(Class::Int, Op::IntLoad { d: NEW, m, size, narrow: None });
            let new = self.join(None, s.ty, combine(acc), x, old);
            return self.b.push(Op::IntStore { m, s: new, bytes: s.unit() as u8 });
        }
        let w = scalar_width(s.ty);
        let old = self.b.here(Class::Vec, Op::VecLoad { w, d: NEW, m });
        let new = match (acc, y) {
            (Acc::Dot(..), Some(y)) => {
                let [a, b, c] = [x, y, old].map(VecArg::Reg);
                self.b.here(Class::Vec, Op::Fma { w, lane: Size::W32, d: NEW, a, b, c })
            }
            (Acc::Sum(_), _) => self.join(Some(w), s.ty, Bin::Add, old, x),
            _ => self.join(Some(w), s.ty, Bin::Max, x, old),
        };
        self.b.push(Op::VecStore { w, m, s: new });
    }

    /// Stripe `j` absorbs `j + 4`, then `j + 2`, then `j + 1`.
    fn tree(&mut self, s: &Striped, acc: &Acc) -> Reg {
        let op = combine(acc);
        // For a sum the left operand is the stripe that absorbs; for a maximum it comes second and stays when equal.
        let absorb = |lower: &mut Self, w, x: Reg, y: Reg| match op {
            Bin::Max => lower.join(w, s.ty, op, y, x),
            _ => lower.join(w, s.ty, op, x, y),
        };
        if s.w.is_none() {
            let mut parts = s.parts.clone();
            while parts.len() > 1 {
                let high = parts.split_off(parts.len() / 2);
                parts = parts.into_iter().zip(high).map(|(x, y)| absorb(self, None, x, y)).collect();
            }
            return self.settle(Class::Int, parts[0]);
        }
        let upper = |lower: &mut Self, s| lower.b.pure(Class::Vec, Op::UpperHalf { w: Width::Y, d: NEW, s });
        let mut moves = vec![0b01_00_11_10, 0b10_11_00_01];
        let mut x = if s.ty == Ty::F64 {
            // Four lanes absorb four, then two absorb two; lanes have 64 bits.
            moves.truncate(1);
            let x = absorb(self, Some(Width::Y), s.parts[0], s.parts[1]);
            let y = upper(self, x);
            absorb(self, Some(Width::X), x, y)
        } else {
            let y = upper(self, s.parts[0]);
            absorb(self, Some(Width::X), s.parts[0], y)
        };
        for pick in moves {
            let y = self.b.pure(Class::Vec, Op::Pick { w: Width::X, d: NEW, s: x, pick });
            x = absorb(self, Some(Width::X), x, y);
        }
        if !matches!(s.ty, Ty::I32) {
            return x;
        }
        self.lane_to_int(s.ty, x)
    }
}
