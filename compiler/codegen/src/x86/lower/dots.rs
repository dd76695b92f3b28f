//! Loops that only add byte products: sums of 16 bits in the loop, of 32 bits behind it.
//!
//! With codes of at most `c` one step adds at most `2 * 128 c` to a sum of 16 bits, so that `128 / c` steps are exact, and exact sums
//! may be formed in any order.

use chimera_ir::loops::{Bin, Expr, Stmt, Ty, Var};

use super::super::build::NEW;
use super::super::flat::{Class, Op, Reg, VecArg, VecOp};
use super::{Bound, Lower, Slot};
use crate::shape::Shape;
use crate::walk::{self, Counts};

/// What a code comes to at most.
const CODE: i64 = 2;

/// The additions of products with `codes` that fit 16 bits, where `body` says what the codes are; see [`Expr::Dot4`].
fn steps(codes: &Expr, body: &[Stmt]) -> i64 {
    let mut value = codes.clone();
    if let Expr::Var(v) = codes {
        walk::stmts(body, &mut |s| match s {
            Stmt::Let(of, e) if of == v => value = e.clone(),
            _ => {}
        });
    }
    let most = match value {
        Expr::Bin(Bin::And, _, mask) => match *mask {
            Expr::I32(mask) => mask.to_le_bytes().iter().map(|&b| i64::from(b) * 2 / 3).fold(1, i64::max),
            _ => CODE,
        },
        _ => CODE,
    };
    (1 << 15) / (2 * 128 * most)
}

impl Lower<'_> {
    /// Lower the loop in this way, if it is one whose byte products deserve it.
    pub(super) fn dots_loop(&mut self, var: Var, lo: Bound, trips: Option<i64>, step: i64, body: &[Stmt]) -> bool {
        let Some(trips) = trips.filter(|&n| n > 1 && !self.has_dot) else { return false };
        let (sums, each, steps) = self.byte_sums(body);
        let part = steps / each;
        if sums.is_empty() || part == 0 {
            return false;
        }
        let whole = trips <= part;
        self.keep_zeros(|v| whole && sums.contains(&v));
        if whole {
            self.in_halves(var, lo, trips, step, body, &sums);
            return true;
        }
        let full = trips / part;
        let end = self.further(lo, full * part * step);
        let at = self.counted(var, lo, end, Some(full), part * step, &mut |lower| {
            let outer = lower.slots[var.0 as usize].clone();
            let from = match &outer {
                Slot::Form(l) if l.terms.is_empty() => Bound::Lit(l.konst),
                Slot::Form(l) => Bound::Val(l.terms[0].1),
                slot => unreachable!("a loop variable is a form, not {slot:?}"),
            };
            lower.in_halves(var, from, part, step, body, &sums);
            lower.slots[var.0 as usize] = outer;
        });
        if trips % part > 0 {
            self.in_halves(var, at, trips % part, step, body, &sums);
        }
        true
    }

    /// Give registers to the variables that are zero, except where `keep` says that they need none.
    pub(super) fn keep_zeros(&mut self, keep: impl Fn(Var) -> bool) {
        for v in std::mem::take(&mut self.zeros) {
            if keep(v) {
                self.zeros.push(v);
                continue;
            }
            let n = self.width() / self.per(Ty::I32);
            let kept = match &self.slots[v.0 as usize] {
                Slot::Vector(rs) => rs.clone(),
                _ => (0..n).map(|_| self.b.mutable(Class::Vec)).collect(),
            };
            kept.iter().for_each(|&d| self.b.push(Op::VecZero { d }));
            self.slots[v.0 as usize] = Slot::Vector(kept);
        }
    }

    /// Give registers to the variables that are zero and that a statement uses; loops decide on their own.
    pub(super) fn settle_zeros(&mut self, s: &Stmt) {
        let adds = |s: &Stmt| matches!(s, Stmt::Let(v, _) if self.halves[v.0 as usize].is_some());
        if self.zeros.is_empty() || matches!(s, Stmt::For { .. }) || adds(s) {
            return;
        }
        let mut used = matches!(s, Stmt::If(..) | Stmt::Reduce { .. });
        walk::exprs(std::slice::from_ref(s), &mut |e| {
            used |= matches!(e, Expr::Var(v) if self.zeros.contains(v));
        });
        if let Stmt::Let(v, _) = s {
            self.zeros.retain(|z| z != v);
        }
        if used {
            self.keep_zeros(|_| false);
        }
    }

    /// Variables that the loop changes only by adding byte products, how many it adds to one of them at most, and how many additions
    /// are exact.
    fn byte_sums(&self, body: &[Stmt]) -> (Vec<Var>, i64, i64) {
        let Some(wide) = &self.wide else { return (vec![], 1, 0) };
        let here = Counts::of(body, self.kernel.vars.len());
        let mut found: Vec<(Var, u32)> = vec![];
        let (mut other, mut exact) = (false, i64::MAX);
        walk::stmts(body, &mut |s| match s {
            Stmt::Let(v, Expr::Dot4(acc, codes, _)) if **acc == Expr::Var(*v) => {
                exact = exact.min(steps(codes, body));
                match found.iter_mut().find(|f| f.0 == *v) {
                    Some(known) => known.1 += 1,
                    None => found.push((*v, 1)),
                }
            }
            Stmt::Let(..) | Stmt::Prefetch(..) => {}
            _ => other = true,
        });
        found.retain(|&(v, n)| {
            let alone = here.assigned[v.0 as usize] == n && here.mentioned[v.0 as usize] == n;
            alone && wide.lanes.var(v) == Shape::Varying
        });
        if other {
            return (vec![], 1, 0);
        }
        let most = found.iter().map(|f| i64::from(f.1)).max().unwrap_or(0);
        (found.into_iter().map(|f| f.0).collect(), most.max(1), exact)
    }

    fn in_halves(&mut self, var: Var, lo: Bound, trips: i64, step: i64, body: &[Stmt], sums: &[Var]) {
        let n = self.width() / self.per(Ty::I32);
        for v in sums {
            self.halves[v.0 as usize] = Some((0..n).map(|_| self.b.mutable(Class::Vec)).collect());
        }
        // The first addition of the first step sets what the others add to.
        self.fresh = sums.to_vec();
        let end = self.further(lo, step);
        let at = self.counted(var, lo, end, Some(1), step, &mut |lower| lower.block(body));
        self.fresh.clear();
        let end = self.further(lo, trips * step);
        self.counted(var, at, end, Some(trips - 1), step, &mut |lower| lower.block(body));
        for v in sums {
            let Some(halves) = self.halves[v.0 as usize].take() else { continue };
            let w = self.w(Ty::I32);
            let zero = self.zeros.contains(v);
            self.zeros.retain(|z| z != v);
            let since = self.b.now();
            let mut new: Vec<Reg> = halves.into_iter().map(|half| self.sum_pairs(w, half)).collect();
            if !zero {
                let old = self.vector(&Expr::Var(*v));
                let add = |a, b| Op::Vec { op: VecOp::AddI32, w, d: NEW, a, b: VecArg::Reg(b) };
                new = old.iter().zip(new).map(|(&x, y)| self.b.here(Class::Vec, add(x, y))).collect();
            }
            let kept = self.overwrite(*v, Class::Vec, new, since);
            self.slots[v.0 as usize] = Slot::Vector(kept);
        }
    }

    /// In such a loop: add to the sums of 16 bits.
    pub(super) fn add_halves(&mut self, v: Var, e: &Expr) -> bool {
        let Some(halves) = self.halves[v.0 as usize].clone() else { return false };
        let Expr::Dot4(_, codes, bytes) = e else { unreachable!("found by its shape") };
        let w = self.w(Ty::I32);
        let fresh = self.fresh.iter().position(|&f| f == v).map(|at| self.fresh.swap_remove(at)).is_some();
        let (codes, bytes) = (self.vector(codes), self.args(bytes));
        for (n, &d) in halves.iter().enumerate() {
            let since = self.b.now();
            let b = bytes[if bytes.len() == 1 { 0 } else { n }];
            let op = Op::Vec { op: VecOp::MulAddU8I8, w, d: NEW, a: codes[n], b };
            let pairs = self.b.pure_unless_memory(op);
            if fresh {
                self.b.assign(Class::Vec, d, pairs, since);
            } else {
                self.b.push(Op::Vec { op: VecOp::AddI16, w, d, a: d, b: VecArg::Reg(pairs) });
            }
        }
        true
    }
}
