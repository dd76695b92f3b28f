//! Sequential loops, and the tight ones among them whose loads may be placed where they are needed.
//!
//! Otherwise Cranelift keeps all loads of a block in order before the arithmetic, and runs out of registers.

use chimera_ir::loops::{Expr, Stmt, Var};

use super::index::Linear;
use super::stmt::{Bound, Lower};
use crate::Arch;
use crate::walk::{self, Counts};

impl Lower<'_, '_> {
    /// A loop in ascending order. `trips` is the number of iterations, if it is known.
    pub(super) fn sequence(
        &mut self,
        var: Var,
        (mut at, end): (Bound, Bound),
        trips: Option<i64>,
        step: i64,
        body: &[Stmt],
    ) {
        if !self.is_tight(body) || trips.is_some_and(|n| n < 2) {
            return self.counted(var, at, end, trips, step, &mut |lower| lower.block(body));
        }
        self.tight = Some(var);
        let mut left = trips;
        if self.worth_two(body) {
            let two = trips.map(|n| n / 2);
            self.tight = self.tight.filter(|_| two != Some(1));
            let bound = match two {
                Some(n) => self.further(at, 2 * n * step),
                None => self.further(end, -step),
            };
            self.counted(var, at, bound, two, 2 * step, &mut |lower| {
                lower.block(body);
                lower.forms[var.0 as usize] = Some(Linear::further(var, step));
                lower.block(body);
                lower.forms[var.0 as usize] = None;
            });
            self.tight = Some(var);
            at = self.behind(var, at, two.map(|n| 2 * n * step));
            left = trips.map(|n| n % 2);
        }
        // A single iteration is no loop: its addresses are like those of the code around it.
        self.tight = self.tight.filter(|_| left != Some(1));
        self.counted(var, at, end, left, step, &mut |lower| lower.block(body));
        self.tight = None;
    }

    /// Are there only assignments, each to a local of the body or to one that it continues? Then nothing is stored between the loads of
    /// an iteration, and all of them are needed before the iteration ends.
    fn is_tight(&self, body: &[Stmt]) -> bool {
        let here = Counts::of(body, self.kernel.vars.len());
        body.iter().all(|s| {
            let Stmt::Let(v, e) = s else { return false };
            let at = v.0 as usize;
            let mut continued = false;
            walk::expr(e, &mut |e| continued |= *e == Expr::Var(*v));
            continued || here.mentioned[at] == self.counts.mentioned[at]
        })
    }

    /// Fused multiply-adds overwrite a factor on x86, so that accumulators move from register to register: two iterations at once
    /// bring them back.
    fn worth_two(&self, body: &[Stmt]) -> bool {
        let mut fused = false;
        walk::exprs(body, &mut |e| fused |= matches!(e, Expr::Fma(..)));
        fused && body.len() <= 16 && self.lanes.is_some() && self.target.arch() == Arch::X86_64
    }
}
