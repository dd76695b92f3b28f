//! From kernel IR to flat operations: the state of lowering, statements and loops.
//!
//! Lanes become vectors of the widest kind that fits, then narrower ones, then single iterations; iterations of lanes are independent
//! and stripes of reductions are fixed by the kernel IR, so that the split never shows in a result.

mod dots;
mod index;
mod lanes;
mod memory;
mod reduce;
mod scalar;
mod vector;

use chimera_ir::loops::{Cmp, Expr, GRID, Kernel, Mode, Stmt, Ty, Var};

use super::build::{Build, NEW};
use super::flat::{Base, Class, Cond, Function, IntArg, Mem, Op, Reg, Size, Width};
use crate::Target;
use crate::interp::{Place, places};
use crate::shape::{Fact, Lanes, Shape};
use crate::walk::Counts;
use index::Linear;

/// Where a variable of the kernel is.
#[derive(Clone, Debug)]
enum Slot {
    /// Nowhere yet.
    Unset,
    /// An `I64` that is assigned once, as a sum that is formed where it is needed; of an affine one the value in the first lane.
    Form(Linear),
    /// A scalar: integers and truth values in an integer register, floats in the first lane of a vector register.
    Scalar(Reg),
    /// A value that all lanes share, in all lanes.
    Splat(Reg),
    /// Vectors.
    Vector(Vec<Reg>),
    /// One scalar for every lane.
    Each(Vec<Reg>),
}

/// The loop or reduction whose iterations run at once.
struct Wide {
    lanes: Lanes,
    /// Width of a vector of 32-bit lanes.
    w: Width,
    /// Lanes of one.
    per: usize,
}

/// A place on the way of a loop: a literal, or a value.
#[derive(Clone, Copy, Debug)]
enum Bound {
    Lit(i64),
    Val(Reg),
}

struct Lower<'k> {
    kernel: &'k Kernel,
    b: Build,
    places: Vec<Place>,
    table: Reg,
    scratch: Reg,
    slots: Vec<Slot>,
    counts: Counts,
    facts: Vec<Fact>,
    wide: Option<Wide>,
    /// The lane in which scalars are evaluated.
    lane: usize,
    /// Whether there is an instruction for [`Op::Dot`].
    has_dot: bool,
    /// Width of the widest vectors.
    widest: Width,
    /// Sums of 16 bits that stand for what a loop adds to a variable, and whether they are empty yet.
    halves: Vec<Option<Vec<Reg>>>,
    fresh: Vec<Var>,
    /// Variables that are zero in all lanes and have no registers yet.
    zeros: Vec<Var>,
    /// Frame memory: stripes of the accumulators of a reduction, then lanes on their way between vectors and scalars.
    stripes: Vec<i32>,
    transit: [Option<i32>; 2],
}

/// The class of a computed scalar.
fn class(ty: Ty) -> Class {
    match ty {
        Ty::F32 | Ty::F64 => Class::Vec,
        Ty::I32 | Ty::I64 | Ty::Bool => Class::Int,
    }
}

/// The size of an integer scalar.
fn size(ty: Ty) -> Size {
    if ty == Ty::I64 { Size::W64 } else { Size::W32 }
}

/// The width of a float scalar.
fn scalar_width(ty: Ty) -> Width {
    if ty == Ty::F64 { Width::D } else { Width::S }
}

fn cond(op: Cmp) -> Cond {
    match op {
        Cmp::Eq => Cond::Eq,
        Cmp::Ne => Cond::Ne,
        Cmp::Lt => Cond::Lt,
        Cmp::Le => Cond::Le,
    }
}

/// The flat function of a kernel.
pub(super) fn lower(kernel: &Kernel, target: &Target) -> Function {
    let mut b = Build::new();
    let [table, scratch, lo, hi] = [(); 4].map(|()| b.arg());
    let n = kernel.vars.len();
    let mut lower = Lower {
        kernel,
        b,
        places: places(kernel),
        table,
        scratch,
        slots: vec![Slot::Unset; n],
        counts: Counts::of(&kernel.body, n),
        facts: vec![Fact::NONE; n],
        wide: None,
        lane: 0,
        has_dot: super::has_dot(target),
        widest: super::encode::widest(target),
        halves: vec![None; n],
        fresh: vec![],
        zeros: vec![],
        stripes: vec![],
        transit: [None; 2],
    };
    lower.facts[GRID.0 as usize] = Fact::INDEX;
    lower.counted(GRID, Bound::Val(lo), Bound::Val(hi), None, 1, &mut |lower| lower.block(&kernel.body));
    lower.b.finish()
}

impl Lower<'_> {
    fn ty(&self, v: Var) -> Ty {
        self.kernel.vars[v.0 as usize]
    }

    /// The address of a buffer: a register, and bytes from there. Buffers in scratch memory share the register.
    fn base(&mut self, buf: chimera_ir::loops::Buf) -> (Reg, i64) {
        match self.places[buf.0 as usize] {
            Place::Arg(n) => {
                let m = Mem { base: Base::Reg(self.table), index: None, disp: 8 * n as i32 };
                // The table never changes, so its loads are shared like computations.
                (self.b.pure(Class::Int, Op::IntLoad { d: NEW, m, size: Size::W64, narrow: None }), 0)
            }
            Place::Scratch(at) => (self.scratch, at as i64),
        }
    }

    /// Lanes that run at once.
    fn width(&self) -> usize {
        self.wide.as_ref().map_or(1, |w| w.lanes.width)
    }

    fn shape(&self, e: &Expr) -> Shape {
        self.wide.as_ref().map_or(Shape::Uniform, |w| w.lanes.shape(e))
    }

    fn block(&mut self, body: &[Stmt]) {
        body.iter().for_each(|s| self.stmt(s));
    }

    fn stmt(&mut self, s: &Stmt) {
        self.settle_zeros(s);
        match s {
            Stmt::Let(v, e) => self.assign(*v, e),
            Stmt::Store(b, i, e) if self.wide.is_some() => self.scatter(*b, i, e),
            Stmt::Store(b, i, e) => self.store(*b, i, e),
            Stmt::Prefetch(b, i) => {
                let m = self.address(*b, i, self.dtype(*b).size() as i64, 0);
                self.b.push(Op::Prefetch { m });
            }
            Stmt::For { var, lo, hi, mode: Mode::Lanes(unroll), body, .. } if self.wide.is_none() => {
                self.lanes_loop(*var, lo, hi, *unroll, body);
            }
            Stmt::For { var, lo, hi, step, body, .. } => {
                let trips = self.extent(lo, hi).map(|n| (n + step - 1).div_euclid(*step));
                self.facts[var.0 as usize] = Fact::counting(Fact::of(lo, &self.facts), *step);
                let (lo, hi) = (self.bound(lo), self.bound(hi));
                if !self.dots_loop(*var, lo, trips, *step, body) {
                    self.keep_zeros(|_| false);
                    self.counted(*var, lo, hi, trips, *step, &mut |lower| lower.block(body));
                }
            }
            Stmt::If(c, then, other) => self.branch(c, then, other),
            Stmt::Reduce { var, lo, hi, body, accs } => self.reduce(*var, lo, hi, body, accs),
        }
    }

    /// A variable that is assigned in several places.
    fn is_shared(&self, v: Var) -> bool {
        self.counts.assigned[v.0 as usize] > 1
    }

    fn assign(&mut self, v: Var, e: &Expr) {
        let (at, ty) = (v.0 as usize, self.ty(v));
        if self.add_halves(v, e) {
            return;
        }
        if ty == Ty::I64 {
            self.facts[at] = if self.is_shared(v) { Fact::NONE } else { Fact::of(e, &self.facts) };
        }
        let since = self.b.now();
        let shape = self.wide.as_ref().map(|w| w.lanes.var(v));
        if shape == Some(Shape::Varying) && *e == Expr::I32(0) && self.is_shared(v) {
            return self.zeros.push(v);
        }
        let (class, values) = match (ty, shape) {
            (Ty::I64, Some(Shape::Varying)) => {
                let mut values = vec![];
                self.each_lane(|lower| {
                    let x = lower.scalar(e);
                    values.push(x);
                });
                (Class::Int, values)
            }
            (Ty::I64, _) if !self.is_shared(v) => {
                let form = self.linear(e);
                self.slots[at] = Slot::Form(self.settled(form));
                return;
            }
            (_, Some(Shape::Varying)) => (Class::Vec, self.vector(e)),
            (Ty::F32, Some(_)) => (Class::Vec, vec![self.splat(e)]),
            (Ty::I32, Some(_)) if self.is_vector_word(e) && !self.is_shared(v) => (Class::Vec, vec![self.splat(e)]),
            _ => (class(ty), vec![self.scalar(e)]),
        };
        let values = match self.is_shared(v) {
            true => self.overwrite(v, class, values, since),
            // Another variable may be overwritten later.
            false => values.into_iter().map(|r| self.settle(class, r)).collect(),
        };
        let splat = shape.is_some() && class == Class::Vec && ty != Ty::F64;
        self.slots[at] = match (ty, shape) {
            (Ty::I64, Some(Shape::Varying)) => Slot::Each(values),
            (_, Some(Shape::Varying)) => Slot::Vector(values),
            _ if splat => Slot::Splat(values[0]),
            _ => Slot::Scalar(values[0]),
        };
    }

    /// Bring values to the registers that a variable keeps. What was computed `since` then has no other use.
    fn overwrite(&mut self, v: Var, class: Class, values: Vec<Reg>, since: Reg) -> Vec<Reg> {
        let kept = match &self.slots[v.0 as usize] {
            Slot::Scalar(r) | Slot::Splat(r) => vec![*r],
            Slot::Vector(rs) | Slot::Each(rs) => rs.clone(),
            Slot::Unset | Slot::Form(_) => values.iter().map(|_| self.b.mutable(class)).collect(),
        };
        // One register for several groups is moved to each of them.
        let since = if values.len() > 1 && values[0] == values[1] { self.b.now() } else { since };
        for (&d, r) in kept.iter().zip(values) {
            self.b.assign(class, d, r, since);
        }
        kept
    }

    /// The number of values in `lo .. hi`, if it is known.
    fn extent(&mut self, lo: &Expr, hi: &Expr) -> Option<i64> {
        let (lo, hi) = (self.linear(lo), self.linear(hi));
        hi.minus(&lo).map(|n| n.max(0))
    }

    fn bound(&mut self, e: &Expr) -> Bound {
        let l = self.linear(e);
        if l.terms.is_empty() {
            return Bound::Lit(l.konst);
        }
        let x = self.sum(&l);
        // A variable may be overwritten while the loop runs.
        Bound::Val(self.settle(Class::Int, x))
    }

    /// A bound a constant further.
    fn further(&mut self, bound: Bound, by: i64) -> Bound {
        match bound {
            Bound::Lit(x) => Bound::Lit(x.wrapping_add(by)),
            Bound::Val(x) => Bound::Val(self.b.further(x, by)),
        }
    }

    fn bound_arg(&mut self, bound: Bound) -> IntArg {
        match bound {
            Bound::Lit(x) => self.b.int_arg(x),
            Bound::Val(x) => IntArg::Reg(x),
        }
    }

    /// Run `body` while `var < hi`; where `var` is then. `trips` is the number of runs, if it is known.
    fn counted(
        &mut self,
        var: Var,
        lo: Bound,
        hi: Bound,
        trips: Option<i64>,
        step: i64,
        body: &mut dyn FnMut(&mut Self),
    ) -> Bound {
        let at = var.0 as usize;
        let Ok(stride) = i32::try_from(step) else { panic!("kernel {:?} has a step beyond 2^31", self.kernel.name) };
        match trips {
            Some(n) if n <= 0 => return lo,
            Some(1) => {
                self.slots[at] = Slot::Form(match lo {
                    Bound::Lit(x) => Linear { konst: x, terms: vec![] },
                    Bound::Val(r) => Linear::of(r),
                });
                body(self);
                self.slots[at] = Slot::Unset;
                return self.further(lo, step);
            }
            _ => {}
        }
        let (from, end) = (self.bound_arg(lo), self.bound_arg(hi));
        let counter = self.b.enter_loop(from, stride);
        self.slots[at] = Slot::Form(Linear::of(counter));
        body(self);
        self.b.leave_loop(end, trips.is_none());
        self.slots[at] = Slot::Unset;
        match (lo, trips) {
            (Bound::Lit(x), Some(n)) => Bound::Lit(x + n * step),
            _ => Bound::Val(counter),
        }
    }

    fn branch(&mut self, c: &Expr, then: &[Stmt], other: &[Stmt]) {
        let (test, size, a, b) = self.condition(c);
        self.b.enter();
        self.block(then);
        let then = self.b.leave();
        self.b.enter();
        self.block(other);
        let other = self.b.leave();
        self.b.branch(test, size, a, b, then, other);
    }

    /// A condition as a comparison of integers.
    fn condition(&mut self, c: &Expr) -> (Cond, Size, Reg, IntArg) {
        match c {
            Expr::Cmp(op, a, b) if class(self.kernel.ty(a)) == Class::Int => {
                let size = size(self.kernel.ty(a));
                let a = self.scalar(a);
                (cond(*op), size, a, self.int_arg(b))
            }
            _ => (Cond::Ne, Size::W32, self.scalar(c), IntArg::Imm(0)),
        }
    }

    /// The second operand of an integer operation.
    fn int_arg(&mut self, e: &Expr) -> IntArg {
        let literal = match e {
            Expr::I32(x) => Some(i64::from(*x)),
            Expr::Int(x) => Some(*x),
            _ => None,
        };
        match literal.map(i32::try_from) {
            Some(Ok(x)) => IntArg::Imm(x),
            _ => IntArg::Reg(self.scalar(e)),
        }
    }
}
