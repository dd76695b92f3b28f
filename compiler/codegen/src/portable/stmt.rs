//! Statements: the state of lowering, loops, conditionals, assignments.
//!
//! Loops test at the bottom. Locals are Cranelift variables, so that those which a loop changes become block parameters.

use chimera_ir::loops::{Expr, GRID, Kernel, Mode, Stmt, Ty, Var};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, StackSlot, Value, types};
use cranelift_codegen::isa::TargetFrontendConfig;
use cranelift_frontend::{FunctionBuilder, Variable};

use super::index::Linear;
use super::scalar::machine;
use crate::Target;
use crate::interp::{Place, places};
use crate::shape::{Fact, Lanes, Shape};
use crate::walk::Counts;

/// Where a variable of the kernel is.
#[derive(Clone, Debug)]
pub(super) enum Slot {
    /// Nowhere yet.
    Unset,
    /// A scalar; of an affine `I64`, the value in the first lane.
    Scalar(Variable),
    /// A uniform value in all lanes of one vector.
    Splat(Variable),
    /// One vector for every four lanes.
    Vector(Vec<Variable>),
    /// One scalar for every lane.
    Each(Vec<Variable>),
}

/// The state of lowering one kernel.
pub(super) struct Lower<'k, 'b> {
    pub(super) kernel: &'k Kernel,
    pub(super) target: &'k Target,
    pub(super) b: FunctionBuilder<'b>,
    /// Addresses of the buffers.
    pub(super) bases: Vec<Value>,
    pub(super) slots: Vec<Slot>,
    pub(super) counts: Counts,
    /// What `I64` locals that are assigned once are made of, while their block is open.
    pub(super) forms: Vec<Option<Linear>>,
    open: Vec<Var>,
    facts: Vec<Fact>,
    /// The number of loops around a variable's assignment.
    pub(super) depths: Vec<u32>,
    pub(super) depth: u32,
    pub(super) lanes: Option<Lanes>,
    /// The lane in which scalars are evaluated.
    pub(super) lane: usize,
    pub(super) stripes: Vec<StackSlot>,
    /// The variable of the tight loop that is being built, see [`Lower::sequence`].
    pub(super) tight: Option<Var>,
}

/// A place on the way of a loop: a literal, or a value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound {
    Lit(i64),
    Val(Value),
}

/// Build the function body.
pub(super) fn lower(kernel: &Kernel, target: &Target, mut b: FunctionBuilder<'_>, config: TargetFrontendConfig) {
    let entry = b.create_block();
    b.append_block_params_for_function_params(entry);
    b.switch_to_block(entry);
    b.seal_block(entry);
    let [table, scratch, lo, hi] = [0, 1, 2, 3].map(|n| b.block_params(entry)[n]);
    let base = |place: &Place| match place {
        Place::Arg(n) => b.ins().load(types::I64, MemFlagsData::trusted(), table, 8 * *n as i32),
        Place::Scratch(0) => scratch,
        Place::Scratch(at) => b.ins().iadd_imm_s(scratch, *at as i64),
    };
    let bases = places(kernel).iter().map(base).collect();
    let n = kernel.vars.len();
    let mut lower = Lower {
        kernel,
        target,
        b,
        bases,
        slots: vec![Slot::Unset; n],
        counts: Counts::of(&kernel.body, n),
        forms: vec![None; n],
        open: vec![],
        facts: vec![Fact::NONE; n],
        depths: vec![0; n],
        depth: 0,
        lanes: None,
        lane: 0,
        stripes: vec![],
        tight: None,
    };
    let grid = lower.declare(GRID);
    lower.facts[GRID.0 as usize] = Fact::INDEX;
    lower.b.def_var(grid, lo);
    lower.counted(GRID, Bound::Val(lo), Bound::Val(hi), None, 1, &mut |lower| lower.block(&kernel.body));
    lower.b.ins().return_(&[]);
    lower.b.finalize(config);
}

impl Lower<'_, '_> {
    /// Lanes that run at once.
    pub(super) fn width(&self) -> usize {
        self.lanes.as_ref().map_or(1, |l| l.width)
    }

    /// Vectors that run at once.
    pub(super) fn groups(&self) -> usize {
        self.width() / 4
    }

    pub(super) fn shape(&self, e: &Expr) -> Shape {
        self.lanes.as_ref().map_or(Shape::Uniform, |l| l.shape(e))
    }

    pub(super) fn stride(&self, v: Var) -> i64 {
        self.lanes.as_ref().map_or(0, |l| l.stride(v))
    }

    pub(super) fn compares_indices(&self, e: &Expr) -> bool {
        self.lanes.as_ref().is_some_and(|l| l.compares_indices(self.kernel, e))
    }

    pub(super) fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// A fresh scalar for a variable.
    pub(super) fn declare(&mut self, v: Var) -> Variable {
        let at = v.0 as usize;
        let x = self.b.declare_var(machine(self.kernel.vars[at]));
        self.slots[at] = Slot::Scalar(x);
        x
    }

    /// A nested list of statements.
    pub(super) fn block(&mut self, body: &[Stmt]) {
        let mark = self.open.len();
        body.iter().for_each(|s| self.stmt(s));
        for v in self.open.drain(mark..) {
            self.forms[v.0 as usize] = None;
        }
    }

    pub(super) fn stmt(&mut self, s: &Stmt) {
        match s {
            Stmt::Let(v, e) => self.assign(*v, e),
            Stmt::Store(b, i, e) if self.lanes.is_some() => self.scatter(*b, i, e),
            Stmt::Store(b, i, e) => self.store(*b, i, e),
            Stmt::Prefetch(..) => {}
            Stmt::For { var, lo, hi, mode: Mode::Lanes(unroll), body, .. } if self.lanes.is_none() => {
                self.lanes_loop(*var, lo, hi, *unroll, body);
            }
            Stmt::For { var, lo, hi, step, body, .. } => {
                let trips = self.extent(lo, hi).map(|n| (n + step - 1).div_euclid(*step));
                self.facts[var.0 as usize] = Fact::counting(Fact::of(lo, &self.facts), *step);
                let (lo, hi) = (self.bound(lo), self.bound(hi));
                self.start(*var, lo);
                self.sequence(*var, (lo, hi), trips, *step, body);
            }
            Stmt::If(c, a, b) => self.branch(c, a, b),
            Stmt::Reduce { var, lo, hi, body, accs } => self.reduce(*var, lo, hi, body, accs),
        }
    }

    fn assign(&mut self, v: Var, e: &Expr) {
        let at = v.0 as usize;
        self.depths[at] = self.depth;
        let once = self.counts.assigned[at] == 1;
        if matches!(self.slots[at], Slot::Unset) {
            self.declare(v);
        }
        match self.slots[at].clone() {
            Slot::Scalar(x) if self.kernel.vars[at] == Ty::I64 => {
                self.facts[at] = if once { Fact::of(e, &self.facts) } else { Fact::NONE };
                let form = self.linear(e);
                let value = self.sum(&form);
                self.b.def_var(x, value);
                if once {
                    self.forms[at] = Some(form);
                    self.open.push(v);
                }
            }
            Slot::Scalar(x) => {
                let value = self.scalar(e);
                self.b.def_var(x, value);
            }
            Slot::Splat(x) => {
                let value = self.splat(e);
                self.b.def_var(x, value);
            }
            Slot::Vector(xs) => {
                let values = self.vector(e);
                xs.into_iter().zip(values).for_each(|(x, value)| self.b.def_var(x, value));
            }
            Slot::Each(xs) => {
                let mut values = vec![];
                self.each_lane(|lower, _| {
                    let value = lower.scalar(e);
                    values.push(value);
                });
                xs.into_iter().zip(values).for_each(|(x, value)| self.b.def_var(x, value));
            }
            Slot::Unset => unreachable!("declared above"),
        }
    }

    /// The number of values in `lo .. hi`, if it is known.
    pub(super) fn extent(&mut self, lo: &Expr, hi: &Expr) -> Option<i64> {
        let (lo, hi) = (self.linear(lo), self.linear(hi));
        hi.minus(&lo).map(|n| n.max(0))
    }

    pub(super) fn bound(&mut self, e: &Expr) -> Bound {
        let l = self.linear(e);
        if l.terms.is_empty() { Bound::Lit(l.konst) } else { Bound::Val(self.sum(&l)) }
    }

    pub(super) fn value(&mut self, bound: Bound) -> Value {
        match bound {
            Bound::Lit(x) => self.b.ins().iconst(types::I64, x),
            Bound::Val(x) => x,
        }
    }

    /// A bound a constant further.
    pub(super) fn further(&mut self, bound: Bound, by: i64) -> Bound {
        match bound {
            Bound::Lit(x) => Bound::Lit(x.wrapping_add(by)),
            Bound::Val(x) if by == 0 => Bound::Val(x),
            Bound::Val(x) => Bound::Val(self.b.ins().iadd_imm_s(x, by)),
        }
    }

    /// Set a fresh loop variable.
    pub(super) fn start(&mut self, var: Var, at: Bound) {
        let x = self.declare(var);
        let at = self.value(at);
        self.b.def_var(x, at);
    }

    /// Run `body` while `var < hi`; `var` is `lo` and is left behind the last value. `trips` is the number of runs, if it is known.
    pub(super) fn counted(
        &mut self,
        var: Var,
        lo: Bound,
        hi: Bound,
        trips: Option<i64>,
        step: i64,
        body: &mut dyn FnMut(&mut Self),
    ) {
        let Slot::Scalar(x) = self.slots[var.0 as usize] else { unreachable!("a loop variable is a scalar") };
        self.depths[var.0 as usize] = self.depth;
        match trips {
            Some(n) if n <= 0 => return,
            Some(1) => {
                body(self);
                let next = self.further(lo, step);
                let next = self.value(next);
                return self.b.def_var(x, next);
            }
            _ => {}
        }
        let (inner, exit) = (self.b.create_block(), self.b.create_block());
        let hi = self.value(hi);
        if trips.is_some() {
            self.b.ins().jump(inner, &[]);
        } else {
            let lo = self.value(lo);
            let any = self.b.ins().icmp(IntCC::SignedLessThan, lo, hi);
            self.b.ins().brif(any, inner, &[], exit, &[]);
        }
        self.b.switch_to_block(inner);
        self.depth += 1;
        self.depths[var.0 as usize] = self.depth;
        body(self);
        self.depth -= 1;
        let at = self.b.use_var(x);
        let next = self.b.ins().iadd_imm_s(at, step);
        self.b.def_var(x, next);
        let more = self.b.ins().icmp(IntCC::SignedLessThan, next, hi);
        self.b.ins().brif(more, inner, &[], exit, &[]);
        self.b.seal_block(inner);
        self.b.switch_to_block(exit);
        self.b.seal_block(exit);
    }

    /// Run `body` if a condition holds.
    pub(super) fn when(&mut self, condition: Value, body: impl FnOnce(&mut Self)) {
        let (inner, exit) = (self.b.create_block(), self.b.create_block());
        self.b.ins().brif(condition, inner, &[], exit, &[]);
        self.b.switch_to_block(inner);
        self.b.seal_block(inner);
        body(self);
        self.b.ins().jump(exit, &[]);
        self.b.switch_to_block(exit);
        self.b.seal_block(exit);
    }

    fn branch(&mut self, c: &Expr, a: &[Stmt], b: &[Stmt]) {
        let c = self.scalar(c);
        let [then, other, exit] = [(); 3].map(|()| self.b.create_block());
        self.b.ins().brif(c, then, &[], other, &[]);
        for (block, body) in [(then, a), (other, b)] {
            self.b.switch_to_block(block);
            self.b.seal_block(block);
            self.block(body);
            self.b.ins().jump(exit, &[]);
        }
        self.b.switch_to_block(exit);
        self.b.seal_block(exit);
    }

    pub(super) fn set_fact(&mut self, v: Var, fact: Fact) {
        self.facts[v.0 as usize] = fact;
    }
}
