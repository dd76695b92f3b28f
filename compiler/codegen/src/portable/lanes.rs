//! Vectorised loops: as many iterations at once as the kernel says, then four at once, then one by one.
//!
//! Iterations are independent by the meaning of the kernel IR, so the split never shows in the result.

use chimera_ir::DType;
use chimera_ir::loops::{Expr, Stmt, Ty, Var};
use cranelift_codegen::ir::types;

use super::scalar::machine;
use super::stmt::{Bound, Lower, Slot};
use super::vector::vector_type;
use crate::shape::{Fact, Lanes, Shape};
use crate::walk;

/// No more vectors than this at once: there are 16 registers on x86.
const MOST: usize = 8;

impl Lower<'_, '_> {
    /// A loop over independent iterations.
    pub(super) fn lanes_loop(&mut self, var: Var, lo: &Expr, hi: &Expr, unroll: u8, body: &[Stmt]) {
        let extent = self.extent(lo, hi);
        let first = Fact::of(lo, self.facts());
        let (mut at, end) = (self.bound(lo), self.bound(hi));
        let mut left = extent;
        self.start(var, at);
        let widest = 4 * usize::from(unroll).clamp(1, MOST);
        let widths = if widest == 4 { &[4][..] } else { &[widest, 4] };
        for &width in widths {
            let step = width as i64;
            if left.is_some_and(|n| n < step) {
                continue;
            }
            let fact = Fact::counting(first, 4);
            let fact = if width == widest { Fact::counting(first, step) } else { fact };
            let Some(lanes) = self.vectorisable(var, width, fact, body, &[]) else { continue };
            self.set_fact(var, fact);
            let full = left.map(|n| n / step * step);
            let bound = match full {
                Some(full) => self.further(at, full),
                None => self.further(end, 1 - step),
            };
            let trips = full.map(|n| n / step);
            self.counted(var, at, bound, trips, step, &mut |lower| lower.vectorised(lanes.clone(), body, |_| ()));
            at = self.behind(var, at, full);
            left = left.zip(full).map(|(n, full)| n - full);
        }
        self.set_fact(var, Fact::counting(first, 1));
        self.counted(var, at, end, left, 1, &mut |lower| lower.block(body));
    }

    /// Where a loop variable is after a loop over `full` values.
    pub(super) fn behind(&mut self, var: Var, at: Bound, full: Option<i64>) -> Bound {
        match (at, full, &self.slots[var.0 as usize]) {
            (Bound::Lit(at), Some(full), _) => Bound::Lit(at + full),
            (_, _, Slot::Scalar(x)) => Bound::Val(self.b.use_var(*x)),
            _ => unreachable!("a loop variable is a scalar"),
        }
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
        Lanes::analyse(self.kernel, &self.counts, self.facts(), (var, width, first), body, inner)
    }

    /// Run a body, and then `last`, for all lanes at once.
    pub(super) fn vectorised(&mut self, lanes: Lanes, body: &[Stmt], last: impl FnOnce(&mut Self)) {
        let width = lanes.width;
        let mut locals = vec![];
        walk::stmts(body, &mut |s| {
            if let Stmt::Let(v, e) = s {
                locals.push((*v, self.loads_word(e)));
            }
        });
        for &(v, word) in &locals {
            let at = v.0 as usize;
            let ty = self.kernel.vars[at];
            let once = self.counts.assigned[at] == 1;
            let mut vars = |n: usize, ty| (0..n).map(|_| self.b.declare_var(ty)).collect::<Vec<_>>();
            self.slots[at] = match (lanes.var(v), vector_type(ty)) {
                (Shape::Uniform, _) if word && once => Slot::Splat(vars(1, types::I32X4)[0]),
                (Shape::Uniform | Shape::Affine(_), _) => Slot::Scalar(vars(1, machine(ty))[0]),
                (Shape::Varying, Some(vector)) => Slot::Vector(vars(width / 4, vector)),
                (Shape::Varying, None) => Slot::Each(vars(width, machine(ty))),
            };
        }
        self.lanes = Some(lanes);
        self.block(body);
        last(self);
        self.lanes = None;
        for (v, _) in locals {
            self.slots[v.0 as usize] = Slot::Unset;
        }
    }

    /// Is it an `I32` in memory, which a vector holds better than a scalar?
    fn loads_word(&self, e: &Expr) -> bool {
        match e {
            Expr::Word(..) => true,
            Expr::Load(b, _) => self.kernel.bufs[b.0 as usize].dtype == DType::I32,
            _ => false,
        }
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
