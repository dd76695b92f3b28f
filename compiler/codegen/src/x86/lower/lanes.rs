//! Vectorised loops: as many iterations at once as the kernel says, then one vector, then half of one, then one by one.

use chimera_ir::loops::{Expr, Stmt, Ty, Var};

use super::super::flat::Width;
use super::{Lower, Slot, Wide};
use crate::shape::{Fact, Lanes};
use crate::walk;

/// No more vectors than this at once.
const MOST: usize = 8;
/// The most lanes that run at once.
pub(super) const MOST_LANES: i32 = (MOST * 16) as i32;

/// 32-bit lanes of a width.
pub(super) fn lanes_of(w: Width) -> usize {
    match w {
        Width::S | Width::D => 1,
        Width::X => 4,
        Width::Y => 8,
        Width::Z => 16,
    }
}

impl Lower<'_> {
    /// A loop over independent iterations.
    pub(super) fn lanes_loop(&mut self, var: Var, lo: &Expr, hi: &Expr, unroll: u8, body: &[Stmt]) {
        let extent = self.extent(lo, hi);
        let first = Fact::of(lo, &self.facts);
        let (mut at, end) = (self.bound(lo), self.bound(hi));
        let mut left = extent;
        // Tails of unknown length are rare and short: the narrow form only serves known ones.
        let narrowest = if extent.is_some() { Width::X } else { Width::Y };
        let mut before = usize::MAX;
        for (w, n) in self.plan_widths(usize::from(unroll).clamp(1, MOST), extent) {
            if w < narrowest {
                continue;
            }
            let width = n * lanes_of(w);
            let step = width as i64;
            if left.is_some_and(|n| n < step) || width >= before {
                continue;
            }
            // Where this loop starts and how it goes on.
            let fact = Fact::counting(first, if before == usize::MAX { step } else { 4 });
            let Some(lanes) = self.vectorisable(var, width, fact, body, &[]) else { continue };
            before = width;
            self.facts[var.0 as usize] = fact;
            let full = left.map(|n| n / step * step);
            let bound = match full {
                Some(full) => self.further(at, full),
                None => self.further(end, 1 - step),
            };
            let trips = full.map(|n| n / step);
            at = self.counted(var, at, bound, trips, step, &mut |lower| lower.at_once(&lanes, w, body, |_| ()));
            left = left.zip(full).map(|(n, full)| n - full);
        }
        self.facts[var.0 as usize] = Fact::counting(first, 1);
        self.counted(var, at, end, left, 1, &mut |lower| lower.block(body));
    }

    /// Widths and numbers of vectors to try, largest first.
    fn plan_widths(&self, n: usize, extent: Option<i64>) -> Vec<(Width, usize)> {
        let widths = [Width::Z, Width::Y, Width::X].into_iter().filter(|w| *w <= self.widest);
        let mut plan = vec![];
        for w in widths {
            // Where there are vectors of 512 bits there are twice as many registers.
            let n = if w == Width::Z { (2 * n).min(MOST) } else { n };
            // As many as fit once.
            let fit = extent.map_or(n, |e| n.min((e.max(0) as usize / lanes_of(w)).max(1)));
            plan.extend([(w, fit), (w, 1)]);
        }
        plan
    }

    /// How `width` iterations run at once, if they can.
    pub(super) fn vectorisable(
        &self,
        var: Var,
        width: usize,
        first: Fact,
        body: &[Stmt],
        inner: &[&Expr],
    ) -> Option<Lanes> {
        Lanes::analyse(self.kernel, &self.counts, &self.facts, (var, width, first), body, inner)
    }

    /// Run a body, and then `last`, for all lanes at once.
    pub(super) fn at_once(&mut self, lanes: &Lanes, w: Width, body: &[Stmt], last: impl FnOnce(&mut Self)) {
        self.forget(body);
        let facts = self.facts.clone();
        self.wide = Some(Wide { lanes: lanes.clone(), w, per: lanes_of(w) });
        self.block(body);
        last(self);
        self.wide = None;
        self.facts = facts;
        self.forget(body);
    }

    /// Let locals of a body start anew.
    pub(super) fn forget(&mut self, body: &[Stmt]) {
        walk::stmts(body, &mut |s| {
            if let Stmt::Let(v, _) = s {
                let at = v.0 as usize;
                self.slots[at] = Slot::Unset;
            }
        });
    }
}

/// The value of an empty accumulation by type.
pub(super) fn least(ty: Ty) -> Expr {
    match ty {
        Ty::F32 => Expr::F32(f32::NEG_INFINITY),
        Ty::F64 => Expr::F64(f64::NEG_INFINITY),
        Ty::I32 => Expr::I32(i32::MIN),
        Ty::I64 | Ty::Bool => Expr::Int(i64::MIN),
    }
}

/// Zero by type.
pub(super) fn zero(ty: Ty) -> Expr {
    match ty {
        Ty::F32 => Expr::F32(0.0),
        Ty::F64 => Expr::F64(0.0),
        Ty::I32 => Expr::I32(0),
        Ty::I64 | Ty::Bool => Expr::Int(0),
    }
}
