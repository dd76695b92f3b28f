//! How the value of an expression differs between the lanes of a vectorised loop.
//!
//! All facts are about the value in the first lane and hold for every group of lanes that the loop runs.

use chimera_ir::loops::{Bin, Cmp, Expr, Kernel, Stmt, Ty, Un, Var};

use crate::walk::{self, Counts};

/// The difference between lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// None.
    Uniform,
    /// An `I64` that grows by this much, not 0, from lane to lane.
    Affine(i64),
    /// Anything.
    Varying,
}

/// What is known of an `I64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fact {
    /// The value is a multiple of this; 0 is a multiple of everything.
    pub(crate) align: u64,
    /// It is never negative, and adding up facts never overflows.
    pub(crate) positive: bool,
}

impl Fact {
    pub(crate) const NONE: Fact = Fact { align: 1, positive: false };
    pub(crate) const INDEX: Fact = Fact { align: 1, positive: true };

    fn join(self, other: Fact) -> Fact {
        Fact { align: gcd(self.align, other.align), positive: self.positive && other.positive }
    }

    /// The fact about a loop variable.
    pub(crate) fn counting(lo: Fact, step: i64) -> Fact {
        Fact { align: gcd(lo.align, step.unsigned_abs()), ..lo }
    }

    pub(crate) fn of(e: &Expr, facts: &[Fact]) -> Fact {
        match e {
            Expr::Int(c) => Fact { align: c.unsigned_abs(), positive: *c >= 0 },
            Expr::Var(v) => facts[v.0 as usize],
            Expr::Bin(op, a, b) => {
                let (x, y) = (Fact::of(a, facts), Fact::of(b, facts));
                match (op, &**b) {
                    (Bin::Add, _) => x.join(y),
                    (Bin::Sub, _) => Fact { positive: false, ..x.join(y) },
                    (Bin::Mul, _) => {
                        let positive = x.positive && y.positive;
                        x.align
                            .checked_mul(y.align)
                            .map_or(Fact { align: 1, positive }, |align| Fact { align, positive })
                    }
                    (Bin::Div, Expr::Int(c)) => {
                        let c = c.unsigned_abs().max(1);
                        let align = if x.align.is_multiple_of(c) { x.align / c } else { 1 };
                        Fact { align, ..x }
                    }
                    (Bin::Rem, Expr::Int(c)) => Fact { align: gcd(x.align, c.unsigned_abs()), ..x },
                    (Bin::Min, _) => x.join(y),
                    (Bin::Max, _) => Fact { positive: x.positive || y.positive, ..x.join(y) },
                    _ => Fact::NONE,
                }
            }
            _ => Fact::NONE,
        }
    }
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// A vectorised loop: `width` consecutive values of its variable at once.
#[derive(Clone, Debug)]
pub(crate) struct Lanes {
    pub(crate) width: usize,
    shapes: Vec<Shape>,
    facts: Vec<Fact>,
    assigned: Vec<u32>,
    tys: Vec<Ty>,
}

impl Lanes {
    /// Can `body` run for `width` values of `var` at once? `inner` are further expressions evaluated in it. `facts` are about the
    /// variables outside, `first` about `var` in the first lane; `total` counts the whole kernel.
    pub(crate) fn analyse(
        kernel: &Kernel,
        total: &Counts,
        facts: &[Fact],
        (var, width, first): (Var, usize, Fact),
        body: &[Stmt],
        inner: &[&Expr],
    ) -> Option<Lanes> {
        let n = kernel.vars.len();
        let mut here = Counts::of(body, n);
        for e in inner {
            walk::expr(e, &mut |e| {
                if let Expr::Var(v) = e {
                    here.mentioned[v.0 as usize] += 1;
                }
            });
        }
        // A local that is also used outside would have to leave the loop with the value of the last lane.
        let private = |v: usize| {
            here.assigned[v] == 0 || (here.assigned[v] == total.assigned[v] && here.mentioned[v] == total.mentioned[v])
        };
        if !(0..n).all(private) {
            return None;
        }
        let mut lanes = Lanes {
            width,
            shapes: vec![Shape::Uniform; n],
            facts: facts.to_vec(),
            assigned: total.assigned.clone(),
            tys: kernel.vars.clone(),
        };
        lanes.shapes[var.0 as usize] = Shape::Affine(1);
        lanes.facts[var.0 as usize] = first;
        loop {
            let before = lanes.shapes.clone();
            lanes.block(kernel, body)?;
            if lanes.shapes == before {
                return Some(lanes);
            }
        }
    }

    fn block(&mut self, kernel: &Kernel, body: &[Stmt]) -> Option<()> {
        for s in body {
            match s {
                Stmt::Let(v, e) => {
                    let at = v.0 as usize;
                    let single = self.assigned[at] == 1;
                    self.shapes[at] = match (self.shape(e), self.shapes[at]) {
                        (Shape::Uniform, old) => old,
                        (new, _) if single => new,
                        _ => Shape::Varying,
                    };
                    if kernel.vars[at] == Ty::I64 {
                        self.facts[at] = if single { Fact::of(e, &self.facts) } else { Fact::NONE };
                    }
                }
                Stmt::Store(..) | Stmt::Prefetch(..) => {}
                Stmt::For { var, lo, hi, step, body, .. } => {
                    if [lo, hi].iter().any(|e| self.shape(e) != Shape::Uniform) {
                        return None;
                    }
                    self.facts[var.0 as usize] = Fact::counting(Fact::of(lo, &self.facts), *step);
                    self.block(kernel, body)?;
                }
                Stmt::If(c, a, b) => {
                    if self.shape(c) != Shape::Uniform {
                        return None;
                    }
                    self.block(kernel, a)?;
                    self.block(kernel, b)?;
                }
                Stmt::Reduce { .. } => return None,
            }
        }
        Some(())
    }

    /// The shape of a variable.
    pub(crate) fn var(&self, v: Var) -> Shape {
        self.shapes[v.0 as usize]
    }

    /// How much an `I64` variable grows from lane to lane; 0 when that says nothing.
    pub(crate) fn stride(&self, v: Var) -> i64 {
        match (self.tys[v.0 as usize], self.var(v)) {
            (Ty::I64, Shape::Affine(s)) => s,
            _ => 0,
        }
    }

    /// The shape of an expression.
    pub(crate) fn shape(&self, e: &Expr) -> Shape {
        use Shape::*;
        let uniform = |es: &[&Expr]| {
            if es.iter().all(|e| self.shape(e) == Uniform) { Uniform } else { Varying }
        };
        match e {
            Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) => Uniform,
            Expr::Var(v) => self.var(*v),
            Expr::Load(_, a) | Expr::Word(_, a) | Expr::Cast(_, a) => uniform(&[a]),
            Expr::Un(Un::Neg, a) => affine(self.shape(a), Uniform, |x, _| x.wrapping_neg()),
            Expr::Un(_, a) => uniform(&[a]),
            Expr::Cmp(_, a, b) => uniform(&[a, b]),
            Expr::Fma(a, b, c) | Expr::Dot4(a, b, c) | Expr::Select(a, b, c) => uniform(&[a, b, c]),
            Expr::Bin(op, a, b) => {
                let (x, y) = (self.shape(a), self.shape(b));
                match (op, &**a, &**b) {
                    (Bin::Add, ..) => affine(x, y, i64::wrapping_add),
                    (Bin::Sub, ..) => affine(x, y, i64::wrapping_sub),
                    (Bin::Mul, Expr::Int(c), _) => affine(y, Uniform, |s, _| s.wrapping_mul(*c)),
                    (Bin::Mul, _, Expr::Int(c)) => affine(x, Uniform, |s, _| s.wrapping_mul(*c)),
                    (Bin::Div, _, Expr::Int(c)) if self.within(x, a, *c) => Uniform,
                    (Bin::Rem, _, Expr::Int(c)) if self.within(x, a, *c) => x,
                    _ => uniform(&[a, b]),
                }
            }
        }
    }

    /// Do all lanes of `e` have the same quotient by `c`?
    fn within(&self, shape: Shape, e: &Expr, c: i64) -> bool {
        let fact = Fact::of(e, &self.facts);
        let Shape::Affine(stride) = shape else { return false };
        let group = gcd(fact.align, c.unsigned_abs());
        fact.positive && stride > 0 && (stride as u64).saturating_mul(self.width as u64 - 1) < group
    }

    /// Is the comparison one of two `I64` that are affine?
    pub(crate) fn compares_indices(&self, kernel: &Kernel, e: &Expr) -> bool {
        let index = |e: &Expr| kernel.ty(e) == Ty::I64 && self.shape(e) != Shape::Varying;
        matches!(e, Expr::Cmp(Cmp::Eq | Cmp::Ne | Cmp::Lt | Cmp::Le, a, b) if index(a) && index(b))
    }
}

fn affine(x: Shape, y: Shape, f: impl Fn(i64, i64) -> i64) -> Shape {
    let stride = |s| match s {
        Shape::Uniform => Some(0),
        Shape::Affine(s) => Some(s),
        Shape::Varying => None,
    };
    match (stride(x), stride(y)) {
        (Some(x), Some(y)) if f(x, y) == 0 => Shape::Uniform,
        (Some(x), Some(y)) => Shape::Affine(f(x, y)),
        _ => Shape::Varying,
    }
}
