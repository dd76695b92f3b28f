//! Loops that only add byte products: sums of 16 bits in the loop, of 32 bits behind it.
//!
//! Codes are at most 3, so one step adds at most `2 * 3 * 128` to a sum of 16 bits: [`STEPS`] steps are exact, and exact sums may be
//! formed in any order.

use chimera_ir::loops::{Expr, Stmt, Var};

use super::super::build::NEW;
use super::super::flat::{Class, Op, Reg, VecArg, VecOp};
use super::{Bound, Lower, Slot};
use crate::shape::Shape;
use crate::walk::{self, Counts};

/// Steps that cannot overflow: `42 * 768 < 2^15`.
const STEPS: i64 = 32;

impl Lower<'_> {
    /// Lower the loop in this way, if it is one whose byte products deserve it.
    pub(super) fn dots_loop(
        &mut self,
        var: Var,
        (lo, _): (Bound, Bound),
        trips: Option<i64>,
        step: i64,
        body: &[Stmt],
    ) -> bool {
        let Some(trips) = trips.filter(|&n| n > 1 && !self.has_dot) else { return false };
        let sums = self.byte_sums(body);
        if sums.is_empty() {
            return false;
        }
        let full = trips / STEPS;
        let piece = step * STEPS;
        let mut at = lo;
        if full > 0 {
            let end = self.further(lo, full * piece);
            at = self.counted(var, lo, end, Some(full), piece, &mut |lower| {
                let from = match &lower.slots[var.0 as usize] {
                    Slot::Form(l) if l.terms.is_empty() => Bound::Lit(l.konst),
                    Slot::Form(l) => Bound::Val(l.terms[0].1),
                    slot => unreachable!("a loop variable is a form, not {slot:?}"),
                };
                let outer = lower.slots[var.0 as usize].clone();
                lower.in_halves(var, from, STEPS, step, body, &sums);
                lower.slots[var.0 as usize] = outer;
            });
        }
        if trips % STEPS > 0 {
            self.in_halves(var, at, trips % STEPS, step, body, &sums);
        }
        true
    }

    /// Variables that the loop changes only by adding byte products once.
    fn byte_sums(&self, body: &[Stmt]) -> Vec<Var> {
        let Some(wide) = &self.wide else { return vec![] };
        let here = Counts::of(body, self.kernel.vars.len());
        let sum = |s: &Stmt| match s {
            Stmt::Let(v, Expr::Dot4(acc, ..)) if **acc == Expr::Var(*v) => Some(*v),
            _ => None,
        };
        let alone = |v: &Var| here.assigned[v.0 as usize] == 1 && here.mentioned[v.0 as usize] == 1;
        let mut found: Vec<Var> = body.iter().filter_map(sum).filter(alone).collect();
        found.retain(|v| wide.lanes.var(*v) == Shape::Varying);
        let mut nested = false;
        walk::stmts(body, &mut |s| nested |= !matches!(s, Stmt::Let(..)));
        if nested { vec![] } else { found }
    }

    fn in_halves(&mut self, var: Var, lo: Bound, trips: i64, step: i64, body: &[Stmt], sums: &[Var]) {
        for v in sums {
            let n = self.width() / self.per(chimera_ir::loops::Ty::I32);
            let halves: Vec<Reg> = (0..n).map(|_| self.b.mutable(Class::Vec)).collect();
            halves.iter().for_each(|&d| self.b.push(Op::VecZero { d }));
            self.halves[v.0 as usize] = Some(halves);
        }
        let end = self.further(lo, trips * step);
        self.counted(var, lo, end, Some(trips), step, &mut |lower| lower.block(body));
        for v in sums {
            let Some(halves) = self.halves[v.0 as usize].take() else { continue };
            let w = self.w(chimera_ir::loops::Ty::I32);
            let old = self.vector(&Expr::Var(*v));
            let add = |lower: &mut Self, x: Reg, half: Reg| {
                let sums = lower.sum_pairs(w, half);
                let op = Op::Vec { op: VecOp::AddI32, w, d: NEW, a: x, b: VecArg::Reg(sums) };
                lower.b.here(Class::Vec, op)
            };
            let since = self.b.now();
            let new = old.iter().zip(halves).map(|(&x, half)| add(self, x, half)).collect();
            let kept = self.overwrite(*v, Class::Vec, new, since);
            self.slots[v.0 as usize] = Slot::Vector(kept);
        }
    }

    /// In such a loop: add to the sums of 16 bits.
    pub(super) fn add_halves(&mut self, v: Var, e: &Expr) -> bool {
        let Some(halves) = self.halves[v.0 as usize].clone() else { return false };
        let Expr::Dot4(_, codes, bytes) = e else { unreachable!("found by its shape") };
        let w = self.w(chimera_ir::loops::Ty::I32);
        let (codes, bytes) = (self.vector(codes), self.vector(bytes));
        for (n, &d) in halves.iter().enumerate() {
            let op = Op::Vec { op: VecOp::MulAddU8I8, w, d: NEW, a: codes[n], b: VecArg::Reg(bytes[n]) };
            let pairs = self.b.pure(Class::Vec, op);
            self.b.push(Op::Vec { op: VecOp::AddI16, w, d, a: d, b: VecArg::Reg(pairs) });
        }
        true
    }
}
