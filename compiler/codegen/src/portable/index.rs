//! Indices as sums of multiples, so that addresses in one loop share what they have in common.
//!
//! Terms are added outermost loop first: the partial sums of outer terms are loop invariant and move out.

use chimera_ir::loops::{Bin, Buf, Expr, Un, Var};
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, Value, types};

use super::memory::MEM;
use super::stmt::{Lower, Slot};

/// `konst + sum of coefficient * atom`, modulo 2^64.
#[derive(Clone, Debug, Default)]
pub(super) struct Linear {
    pub(super) konst: i64,
    pub(super) terms: Vec<(i64, Atom)>,
}

/// What an index is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Atom {
    /// A variable that is assigned once.
    Var(Var),
    /// A computed value and the depth of the loop in which it changes.
    Value(Value, u32),
}

impl Linear {
    fn atom(atom: Atom) -> Linear {
        Linear { konst: 0, terms: vec![(1, atom)] }
    }

    /// A variable and a constant.
    pub(super) fn further(v: Var, konst: i64) -> Linear {
        Linear { konst, terms: vec![(1, Atom::Var(v))] }
    }

    fn plus(mut self, other: Linear) -> Linear {
        self.konst = self.konst.wrapping_add(other.konst);
        for (c, atom) in other.terms {
            match self.terms.iter_mut().find(|(_, a)| *a == atom) {
                Some((old, _)) => *old = old.wrapping_add(c),
                None => self.terms.push((c, atom)),
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

impl Lower<'_, '_> {
    /// An `I64` expression in the current lane.
    pub(super) fn linear(&mut self, e: &Expr) -> Linear {
        match e {
            Expr::Int(c) => Linear { konst: *c, terms: vec![] },
            Expr::Var(v) => {
                let at = v.0 as usize;
                let offset = self.stride(*v).wrapping_mul(self.lane as i64);
                let mut form = match &self.forms[at] {
                    Some(form) => form.clone(),
                    None if self.counts.assigned[at] <= 1 && matches!(self.slots[at], Slot::Scalar(_)) => {
                        Linear::atom(Atom::Var(*v))
                    }
                    None => return self.opaque(e),
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
                let (depth_a, depth_b) = (self.linear_depth(&a), self.linear_depth(&b));
                let (a, b) = (self.sum(&a), self.sum(&b));
                let product = self.b.ins().imul(a, b);
                Linear::atom(Atom::Value(product, depth_a.max(depth_b)))
            }
            _ => self.opaque(e),
        }
    }

    fn opaque(&mut self, e: &Expr) -> Linear {
        let depth = self.depth_of(e);
        let value = self.direct(e);
        Linear::atom(Atom::Value(value, depth))
    }

    fn atom_depth(&self, atom: Atom) -> u32 {
        match atom {
            Atom::Var(v) => self.depths[v.0 as usize],
            Atom::Value(_, depth) => depth,
        }
    }

    fn linear_depth(&self, l: &Linear) -> u32 {
        l.terms.iter().map(|(_, a)| self.atom_depth(*a)).max().unwrap_or(0)
    }

    /// The depth of the innermost loop in which an expression may change.
    pub(super) fn depth_of(&self, e: &Expr) -> u32 {
        let mut depth = 0;
        crate::walk::expr(e, &mut |e| match e {
            Expr::Load(..) | Expr::Word(..) => depth = self.depth,
            Expr::Var(v) => depth = depth.max(self.depths[v.0 as usize]),
            _ => {}
        });
        depth
    }

    fn terms(&mut self, start: Option<Value>, l: &Linear) -> Option<Value> {
        let mut terms = l.terms.clone();
        terms.sort_by_key(|(_, a)| self.atom_depth(*a));
        let mut sum = start;
        for (c, atom) in terms {
            let x = match atom {
                Atom::Var(v) => match self.slots[v.0 as usize] {
                    Slot::Scalar(x) => self.b.use_var(x),
                    _ => unreachable!("an index atom is a scalar"),
                },
                Atom::Value(x, _) => x,
            };
            let x = if c == 1 { x } else { self.b.ins().imul_imm_s(x, c) };
            sum = Some(match sum {
                Some(sum) => self.b.ins().iadd(sum, x),
                None => x,
            });
        }
        sum
    }

    /// The value of a sum.
    pub(super) fn sum(&mut self, l: &Linear) -> Value {
        match self.terms(None, l) {
            Some(x) if l.konst == 0 => x,
            Some(x) => self.b.ins().iadd_imm_s(x, l.konst),
            None => self.b.ins().iconst(types::I64, l.konst),
        }
    }

    /// The address of element `index` of `unit` bytes, with room for `reach` more bytes in both directions.
    pub(super) fn address(&mut self, buf: Buf, index: &Expr, unit: i64, reach: i64) -> Address {
        let l = self.linear(index).times(unit);
        let moves = |(_, a): &(i64, Atom)| matches!(a, Atom::Var(v) if self.tight == Some(*v));
        let flags = if l.terms.iter().any(moves) { MEM.with_readonly().with_can_move() } else { MEM };
        let base = self.bases[buf.0 as usize];
        let at = self.terms(Some(base), &l).unwrap_or(base);
        let fits = |x: i64| i32::try_from(x).is_ok();
        match i32::try_from(l.konst) {
            Ok(offset) if fits(l.konst.saturating_add(reach)) && fits(l.konst.saturating_sub(reach)) => {
                Address { at, offset, flags }
            }
            _ => Address { at: self.b.ins().iadd_imm_s(at, l.konst), offset: 0, flags },
        }
    }
}

/// A place in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) at: Value,
    pub(super) offset: i32,
    /// How a load from it may be placed.
    pub(super) flags: MemFlagsData,
}

impl Address {
    /// So many bytes further.
    pub(super) fn plus(self, bytes: i32) -> Address {
        Address { offset: self.offset + bytes, ..self }
    }
}
