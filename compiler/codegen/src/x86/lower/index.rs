//! Indices as sums of multiples, so that addresses in one loop share what they have in common.
//!
//! Terms of outer loops are added first and in front of the inner loops; what an inner loop changes is scaled by the instruction or
//! kept up to date from iteration to iteration.

use chimera_ir::loops::{Bin, Buf, Expr, Un, Var};

use super::super::build::NEW;
use super::super::flat::{Base, Class, IntArg, IntOp, Mem, Op, Reg, Size};
use super::{Lower, Slot};
use crate::shape::Shape;

/// `konst + sum of coefficient * register`, modulo 2^64.
#[derive(Clone, Debug, Default)]
pub(super) struct Linear {
    pub(super) konst: i64,
    pub(super) terms: Vec<(i64, Reg)>,
}

impl Linear {
    pub(super) fn of(r: Reg) -> Linear {
        Linear { konst: 0, terms: vec![(1, r)] }
    }

    fn plus(mut self, other: Linear) -> Linear {
        self.konst = self.konst.wrapping_add(other.konst);
        for (c, r) in other.terms {
            match self.terms.iter_mut().find(|(_, a)| *a == r) {
                Some((old, _)) => *old = old.wrapping_add(c),
                None => self.terms.push((c, r)),
            }
        }
        self.terms.retain(|(c, _)| *c != 0);
        self
    }

    fn times(mut self, c: i64) -> Linear {
        self.konst = self.konst.wrapping_mul(c);
        self.terms.iter_mut().for_each(|(k, _)| *k = k.wrapping_mul(c));
        self.terms.retain(|(c, _)| *c != 0);
        self
    }

    /// The constant that this minus `other` is, if it is one.
    pub(super) fn minus(&self, other: &Linear) -> Option<i64> {
        let difference = self.clone().plus(other.clone().times(-1));
        difference.terms.is_empty().then_some(difference.konst)
    }
}

impl Lower<'_> {
    /// How much an `I64` variable grows from lane to lane; 0 when that says nothing.
    fn stride(&self, v: Var) -> i64 {
        self.wide.as_ref().map_or(0, |w| w.lanes.stride(v))
    }

    /// An `I64` expression in the current lane.
    pub(super) fn linear(&mut self, e: &Expr) -> Linear {
        match e {
            Expr::Int(c) => Linear { konst: *c, terms: vec![] },
            Expr::Var(v) => {
                let offset = self.stride(*v).wrapping_mul(self.lane as i64);
                let mut form = match &self.slots[v.0 as usize] {
                    Slot::Form(form) => form.clone(),
                    Slot::Scalar(r) => Linear::of(*r),
                    Slot::Each(rs) => return Linear::of(rs[self.lane]),
                    slot => panic!("kernel {:?} reads index {} from {slot:?}", self.kernel.name, v.0),
                };
                form.konst = form.konst.wrapping_add(offset);
                form
            }
            Expr::Un(Un::Neg, a) => self.linear(a).times(-1),
            Expr::Bin(Bin::Add, a, b) => {
                let a = self.linear(a);
                let b = self.linear(b);
                a.plus(b)
            }
            Expr::Bin(Bin::Sub, a, b) => {
                let a = self.linear(a);
                let b = self.linear(b);
                a.plus(b.times(-1))
            }
            Expr::Bin(Bin::Mul, a, b) => {
                let a = self.linear(a);
                let b = self.linear(b);
                if b.terms.is_empty() {
                    return a.times(b.konst);
                }
                if a.terms.is_empty() {
                    return b.times(a.konst);
                }
                let (a, b) = (self.sum(&a), self.sum(&b));
                Linear::of(self.b.int_op(IntOp::Mul, Size::W64, a, IntArg::Reg(b)))
            }
            _ => Linear::of(self.direct(e)),
        }
    }

    /// The sum with every term in a register whose value stays.
    pub(super) fn settled(&mut self, mut l: Linear) -> Linear {
        for (_, r) in &mut l.terms {
            *r = self.settle(Class::Int, *r);
        }
        l
    }

    /// A register that keeps the value that `r` has now.
    pub(super) fn settle(&mut self, class: Class, r: Reg) -> Reg {
        match class {
            _ if self.b.is_fixed(r) => r,
            Class::Int => self.b.here(class, Op::IntMove { d: NEW, s: r }),
            Class::Vec => self.b.here(class, Op::VecMove { d: NEW, s: r }),
        }
    }

    /// `start` and the terms, outermost first.
    fn add_terms(&mut self, start: Option<Reg>, terms: &[(i64, Reg)]) -> Option<Reg> {
        let mut sum = start;
        for &(c, r) in terms {
            let x = self.scaled(c, r);
            sum = Some(match sum {
                Some(sum) => self.b.sum(sum, x),
                None => x,
            });
        }
        sum
    }

    fn scaled(&mut self, c: i64, r: Reg) -> Reg {
        match c {
            1 => r,
            _ if c > 0 && c.count_ones() == 1 && !self.b.is_fixed(r) => {
                self.b.int_op(IntOp::Shl, Size::W64, r, IntArg::Imm(c.trailing_zeros() as i32))
            }
            _ => self.b.multiple(r, c),
        }
    }

    /// The terms, those of outer loops first.
    fn ordered(&self, l: &Linear) -> Vec<(i64, Reg)> {
        let mut terms = l.terms.clone();
        terms.sort_by_key(|&(_, r)| (self.b.home(r), r));
        terms
    }

    /// The value of a sum.
    pub(super) fn sum(&mut self, l: &Linear) -> Reg {
        let terms = self.ordered(l);
        match self.add_terms(None, &terms) {
            Some(x) => self.b.further(x, l.konst),
            None => self.b.int(l.konst),
        }
    }

    /// The address of element `index` of `unit` bytes, with room for `reach` more bytes in both directions.
    pub(super) fn address(&mut self, buf: Buf, index: &Expr, unit: i64, reach: i64) -> Mem {
        let mut l = self.linear(index).times(unit);
        let mut terms = self.ordered(&l);
        let (mut base, offset) = self.base(buf);
        l.konst = l.konst.wrapping_add(offset);
        let last = terms.pop();
        if let Some(sum) = self.add_terms(Some(base), &terms) {
            base = sum;
        }
        let index = match last {
            None => None,
            Some((c @ (1 | 2 | 4 | 8), r)) => Some((r, c as u8)),
            Some((c, r)) => Some((self.scaled(c, r), 1)),
        };
        let fits = |x: i64| i32::try_from(x).is_ok();
        if fits(l.konst.saturating_add(reach)) && fits(l.konst.saturating_sub(reach)) {
            return Mem { base: Base::Reg(base), index, disp: l.konst as i32 };
        }
        let base = self.b.further(base, l.konst);
        Mem { base: Base::Reg(base), index, disp: 0 }
    }

    /// Bytes from lane to lane of an index of that shape, if offsets within the group fit an instruction.
    pub(super) fn step(&self, shape: Shape, unit: i64) -> Option<i32> {
        let stride = match shape {
            Shape::Affine(s) => s,
            Shape::Uniform => 0,
            Shape::Varying => return None,
        };
        let step = stride.checked_mul(unit)?;
        let far = step.checked_mul(self.width() as i64)?;
        if far.unsigned_abs() < 1 << 30 { i32::try_from(step).ok() } else { None }
    }

    pub(super) fn reach(&self, step: i32) -> i64 {
        i64::from(step).abs() * self.width() as i64
    }
}
