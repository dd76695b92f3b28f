//! Interval analysis of indices: which accesses are in bounds whatever the data.
//!
//! An interval covers every value that the expression can take when its statement runs; wrapping arithmetic gives the full interval.

use super::*;

/// A closed interval of `I64` values; empty when `lo > hi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    lo: i64,
    hi: i64,
}

const FULL: Span = Span { lo: i64::MIN, hi: i64::MAX };

impl Span {
    /// The hull of some exact results; full when one of them does not fit, because then arithmetic may wrap.
    fn of(points: &[i128]) -> Span {
        let lo = points.iter().min().and_then(|&x| i64::try_from(x).ok());
        let hi = points.iter().max().and_then(|&x| i64::try_from(x).ok());
        match (lo, hi) {
            (Some(lo), Some(hi)) => Span { lo, hi },
            _ => FULL,
        }
    }

    fn hull(self, o: Span) -> Span {
        Span { lo: self.lo.min(o.lo), hi: self.hi.max(o.hi) }
    }

    fn meet(self, o: Span) -> Span {
        Span { lo: self.lo.max(o.lo), hi: self.hi.min(o.hi) }
    }

    fn is_empty(self) -> bool {
        self.lo > self.hi
    }
}

/// One access that was not proven.
pub(super) struct Access {
    /// Buffer, index and interval, in words.
    pub(super) text: String,
    /// Whether every value that the interval allows is out of bounds.
    pub(super) never_inside: bool,
}

/// The accesses of a verified kernel that interval analysis cannot prove to be in bounds, each with its index and interval.
pub fn unproven(kernel: &Kernel) -> Vec<String> {
    accesses(kernel).into_iter().map(|a| a.text).collect()
}

/// An upper bound of the expressions that a run over the whole grid of a verified kernel evaluates.
pub fn work(kernel: &Kernel) -> u64 {
    analyse(kernel).work
}

/// As [`unproven`], with what verification needs. The kernel is well-typed.
pub(super) fn accesses(kernel: &Kernel) -> Vec<Access> {
    analyse(kernel).found
}

fn analyse(kernel: &Kernel) -> Analysis<'_> {
    let mut assigned = vec![0u32; kernel.vars.len()];
    count_assignments(&kernel.body, &mut assigned);
    let (spans, times) = (vec![FULL; kernel.vars.len()], kernel.grid as u64);
    let mut a = Analysis { kernel, assigned, spans, times, work: 0, found: vec![] };
    if kernel.grid > 0 {
        a.spans[GRID.0 as usize] = Span { lo: 0, hi: kernel.grid as i64 - 1 };
        a.block(&kernel.body);
    }
    a
}

fn count_assignments(body: &[Stmt], n: &mut [u32]) {
    for s in body {
        match s {
            Stmt::Let(v, _) => n[v.0 as usize] += 1,
            Stmt::Store(..) | Stmt::Prefetch(..) => {}
            Stmt::For { body, .. } => count_assignments(body, n),
            Stmt::If(_, then, other) => {
                count_assignments(then, n);
                count_assignments(other, n);
            }
            Stmt::Reduce { body, accs, .. } => {
                count_assignments(body, n);
                accs.iter().for_each(|(v, _)| n[v.0 as usize] += 1);
            }
        }
    }
}

struct Analysis<'a> {
    kernel: &'a Kernel,
    /// How many statements assign each variable.
    assigned: Vec<u32>,
    /// What is known of each variable here.
    spans: Vec<Span>,
    /// How often the statement under inspection runs at most.
    times: u64,
    /// See [`work`].
    work: u64,
    found: Vec<Access>,
}

impl Analysis<'_> {
    fn block(&mut self, body: &[Stmt]) {
        for s in body {
            self.stmt(s);
        }
    }

    fn stmt(&mut self, s: &Stmt) {
        match s {
            Stmt::Let(v, e) => {
                self.visit(e);
                if self.kernel.vars[v.0 as usize] == Ty::I64 {
                    let once = self.assigned[v.0 as usize] == 1;
                    self.spans[v.0 as usize] = if once { self.span(e) } else { FULL };
                }
            }
            Stmt::Store(buf, index, value) => {
                self.visit(index);
                self.visit(value);
                self.access("store", *buf, index, 1);
            }
            // It may lie anywhere.
            Stmt::Prefetch(..) => {}
            Stmt::For { var, lo, hi, step, body, .. } => self.looped(*var, lo, hi, *step, |a| a.block(body)),
            Stmt::If(c, then, other) => {
                self.visit(c);
                for (truth, body) in [(true, then), (false, other)] {
                    let saved = self.spans.clone();
                    if self.assume(c, truth) {
                        self.block(body);
                    }
                    self.spans = saved;
                }
            }
            Stmt::Reduce { var, lo, hi, body, accs } => self.looped(*var, lo, hi, 1, |a| {
                a.block(body);
                for (_, acc) in accs {
                    match acc {
                        Acc::Sum(x) | Acc::Max(x) => a.visit(x),
                        Acc::Dot(x, y) => {
                            a.visit(x);
                            a.visit(y);
                        }
                    }
                }
            }),
        }
    }

    fn looped(&mut self, var: Var, lo: &Expr, hi: &Expr, step: i64, body: impl FnOnce(&mut Self)) {
        self.visit(lo);
        self.visit(hi);
        let first = self.span(lo);
        let mut span = Span { lo: first.lo, hi: self.span(hi).hi.saturating_sub(1) };
        if first.lo == first.hi {
            // The values are the first one plus multiples of the step.
            span.hi = span.hi.saturating_sub(span.hi.saturating_sub(span.lo).rem_euclid(step));
        }
        if !span.is_empty() {
            let iterations = (span.hi.abs_diff(span.lo) / step.unsigned_abs()).saturating_add(1);
            let times = self.times.saturating_mul(iterations);
            let outer =
                (std::mem::replace(&mut self.spans[var.0 as usize], span), std::mem::replace(&mut self.times, times));
            body(self);
            (self.spans[var.0 as usize], self.times) = outer;
        }
    }

    /// Narrow variables by the truth of a condition; false when it cannot hold.
    fn assume(&mut self, c: &Expr, truth: bool) -> bool {
        match c {
            Expr::Un(Un::Not, a) => self.assume(a, !truth),
            Expr::Bin(Bin::And, a, b) if truth => self.assume(a, true) && self.assume(b, true),
            Expr::Bin(Bin::Or, a, b) if !truth => self.assume(a, false) && self.assume(b, false),
            Expr::Cmp(op, a, b) if self.kernel.ty(a) == Ty::I64 => match (op, truth) {
                (Cmp::Lt, true) => self.ordered(a, b, 1),
                (Cmp::Le, true) => self.ordered(a, b, 0),
                (Cmp::Lt, false) => self.ordered(b, a, 0),
                (Cmp::Le, false) => self.ordered(b, a, 1),
                (Cmp::Eq, true) | (Cmp::Ne, false) => self.ordered(a, b, 0) && self.ordered(b, a, 0),
                (Cmp::Eq, false) | (Cmp::Ne, true) => {
                    let (a, b) = (self.span(a), self.span(b));
                    !(a == b && a.lo == a.hi)
                }
            },
            _ => true,
        }
    }

    /// Narrow by `a + gap <= b`.
    fn ordered(&mut self, a: &Expr, b: &Expr, gap: i64) -> bool {
        let (x, y) = (self.span(a), self.span(b));
        let below = Span { lo: i64::MIN, hi: y.hi.saturating_sub(gap) };
        let above = Span { lo: x.lo.saturating_add(gap), hi: i64::MAX };
        for (e, limit) in [(a, below), (b, above)] {
            // A variable that is overwritten may have another value in a later iteration of a loop in the branch.
            if let Expr::Var(v) = e
                && self.assigned[v.0 as usize] <= 1
            {
                self.spans[v.0 as usize] = self.spans[v.0 as usize].meet(limit);
            }
        }
        !x.meet(below).is_empty() && !y.meet(above).is_empty()
    }

    /// Check the loads in an expression.
    fn visit(&mut self, e: &Expr) {
        self.work = self.work.saturating_add(self.times);
        match e {
            Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) | Expr::Var(_) => {}
            Expr::Load(buf, i) => {
                self.visit(i);
                self.access("load", *buf, i, 1);
            }
            Expr::Word(buf, i) => {
                self.visit(i);
                self.access("word", *buf, i, 4);
            }
            Expr::Un(_, a) | Expr::Cast(_, a) => self.visit(a),
            Expr::Bin(_, a, b) | Expr::Cmp(_, a, b) => {
                self.visit(a);
                self.visit(b);
            }
            Expr::Fma(a, b, c) | Expr::Dot4(a, b, c) | Expr::Select(a, b, c) => {
                self.visit(a);
                self.visit(b);
                self.visit(c);
            }
        }
    }

    fn access(&mut self, what: &str, buf: Buf, index: &Expr, width: usize) {
        let decl = &self.kernel.bufs[buf.0 as usize];
        let Span { lo, hi } = self.span(index);
        let last = (decl.len / width) as i64 - 1;
        if lo < 0 || hi > last {
            let never_inside = hi < 0 || lo > last;
            let index = text::print_expr(self.kernel, index).to_text();
            let index = index.trim_end();
            let text = format!("{what} {} at {index}: index in {lo}..={hi}, expected 0..={last}", decl.name);
            self.found.push(Access { text, never_inside });
        }
    }

    /// The interval of an `I64` expression.
    fn span(&self, e: &Expr) -> Span {
        match e {
            Expr::Int(x) => Span { lo: *x, hi: *x },
            Expr::Var(v) => self.spans[v.0 as usize],
            Expr::Un(Un::Neg, a) => {
                let a = self.span(a);
                Span::of(&[-i128::from(a.lo), -i128::from(a.hi)])
            }
            Expr::Bin(op, a, b) => self.binary(*op, self.span(a), self.span(b)),
            Expr::Select(_, a, b) => self.span(a).hull(self.span(b)),
            Expr::Cast(Ty::I64, a) => self.widened(a),
            _ => FULL,
        }
    }

    fn binary(&self, op: Bin, a: Span, b: Span) -> Span {
        let corners = |f: fn(i128, i128) -> i128| {
            let [al, ah, bl, bh] = [a.lo, a.hi, b.lo, b.hi].map(i128::from);
            Span::of(&[f(al, bl), f(al, bh), f(ah, bl), f(ah, bh)])
        };
        match op {
            Bin::Add => corners(|a, b| a + b),
            Bin::Sub => corners(|a, b| a - b),
            Bin::Mul => corners(|a, b| a * b),
            Bin::Div if b.lo > 0 => corners(|a, b| a / b),
            Bin::Rem if b.lo > 0 => {
                let rest = Span { lo: 1 - b.hi, hi: b.hi - 1 };
                Span { lo: rest.lo.max(a.lo.min(0)), hi: rest.hi.min(a.hi.max(0)) }
            }
            Bin::Min => Span { lo: a.lo.min(b.lo), hi: a.hi.min(b.hi) },
            Bin::Max => Span { lo: a.lo.max(b.lo), hi: a.hi.max(b.hi) },
            // The conjunction with something not negative is neither negative nor larger.
            Bin::And if b.lo >= 0 => Span { lo: 0, hi: b.hi },
            Bin::And if a.lo >= 0 => Span { lo: 0, hi: a.hi },
            _ => FULL,
        }
    }

    /// The interval of an integer or Bool expression cast to `I64`.
    fn widened(&self, e: &Expr) -> Span {
        let all = Span { lo: i32::MIN.into(), hi: i32::MAX.into() };
        match (self.kernel.ty(e), e) {
            (Ty::I64, e) => self.span(e),
            (Ty::Bool, _) => Span { lo: 0, hi: 1 },
            (Ty::I32, Expr::I32(x)) => Span { lo: (*x).into(), hi: (*x).into() },
            (Ty::I32, Expr::Load(buf, _)) => match self.kernel.bufs[buf.0 as usize].dtype {
                DType::I8 => Span { lo: i8::MIN.into(), hi: i8::MAX.into() },
                DType::U8 => Span { lo: 0, hi: u8::MAX.into() },
                DType::I16 => Span { lo: i16::MIN.into(), hi: i16::MAX.into() },
                _ => all,
            },
            (Ty::I32, Expr::Bin(op @ (Bin::Min | Bin::Max | Bin::And), a, b)) => {
                self.binary(*op, self.widened(a), self.widened(b))
            }
            (Ty::I32, _) => all,
            (Ty::F32 | Ty::F64, _) => FULL,
        }
    }
}
