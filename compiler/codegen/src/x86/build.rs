//! Writes flat operations: scopes, one value for equal operations, and operations as far outside of loops as they can stand.
//!
//! A register is *fixed* when it is assigned once, so that its value is that of its operation wherever the scope is open. Only
//! operations of fixed registers are shared or moved.

use std::collections::HashMap;

use super::flat::{
    Access, Branch, Class, Cond, Function, IntArg, IntOp, Loop, Mem, Node, Op, Reg, Size, VecArg, Width,
};

/// Stands for the register that an operation will assign.
pub(super) const NEW: Reg = Reg(u32::MAX);

/// A body under construction.
#[derive(Default)]
struct Scope {
    nodes: Vec<Node>,
    /// What was made known here.
    keys: Vec<Op>,
    counter: Option<Counter>,
}

/// The counter of the loop whose body a scope is.
struct Counter {
    reg: Reg,
    step: i32,
    /// Multiples of the counter that are kept up to date.
    induced: Vec<(i64, Reg)>,
}

/// A function under construction.
pub(super) struct Build {
    pub(super) f: Function,
    scopes: Vec<Scope>,
    known: HashMap<Op, Reg>,
    /// For each register: the scope that it belongs to, and whether it is fixed.
    home: Vec<u32>,
    fixed: Vec<bool>,
    shared: Vec<bool>,
}

impl Build {
    pub(super) fn new() -> Build {
        Build {
            f: Function::default(),
            scopes: vec![Scope::default()],
            known: HashMap::new(),
            home: vec![],
            fixed: vec![],
            shared: vec![],
        }
    }

    pub(super) fn finish(mut self) -> Function {
        self.f.body = self.scopes.pop().expect("the outermost scope").nodes;
        self.f
    }

    fn top(&self) -> usize {
        self.scopes.len() - 1
    }

    fn reg(&mut self, class: Class, home: usize, fixed: bool) -> Reg {
        self.home.push(home as u32);
        self.fixed.push(fixed);
        self.shared.push(false);
        self.f.reg(class)
    }

    /// A register that will be assigned more than once.
    pub(super) fn mutable(&mut self, class: Class) -> Reg {
        self.reg(class, self.top(), false)
    }

    /// An argument of the function.
    pub(super) fn arg(&mut self) -> Reg {
        let r = self.reg(Class::Int, 0, true);
        self.f.args.push(r);
        r
    }

    pub(super) fn is_fixed(&self, r: Reg) -> bool {
        self.fixed[r.0 as usize]
    }

    /// How many scopes are around the one in which the value of a register is settled.
    pub(super) fn home(&self, r: Reg) -> usize {
        (self.home[r.0 as usize] as usize).min(self.top())
    }

    /// Append an operation that assigns no new register.
    pub(super) fn push(&mut self, op: Op) {
        let top = self.top();
        self.scopes[top].nodes.push(Node::Op(op));
    }

    /// Append an operation with a new register in place of [`NEW`], here and unshared: for reads of memory.
    pub(super) fn here(&mut self, class: Class, op: Op) -> Reg {
        let top = self.top();
        self.define(class, op, top)
    }

    fn define(&mut self, class: Class, mut op: Op, at: usize) -> Reg {
        let d = self.reg(class, at, true);
        op.each_reg(&mut |r, access| {
            if access == Access::Write && *r == NEW {
                *r = d;
            }
        });
        self.scopes[at].nodes.push(Node::Op(op));
        d
    }

    /// The value of an operation without memory, moved out of the loops that it does not depend on.
    pub(super) fn pure(&mut self, class: Class, mut op: Op) -> Reg {
        let top = self.top();
        let (mut home, mut fixed) = (0, true);
        op.each_reg(&mut |r, access| {
            if access == Access::Read {
                home = home.max(self.home[r.0 as usize] as usize);
                fixed &= self.fixed[r.0 as usize];
            }
        });
        if !fixed {
            return self.here(class, op);
        }
        let outermost = (home + 1..=top).find(|&s| self.scopes[s].counter.is_some());
        self.share(class, op, outermost.map_or(top, |s| s - 1))
    }

    /// The value of a vector operation, shared and moved only when it reads no memory but constants.
    pub(super) fn pure_unless_memory(&mut self, op: Op) -> Reg {
        if op.reads_memory() { self.here(Class::Vec, op) } else { self.pure(Class::Vec, op) }
    }

    /// The value of an operation without memory other than constants, shared in this scope only.
    pub(super) fn local(&mut self, class: Class, op: Op) -> Reg {
        let top = self.top();
        self.share(class, op, top)
    }

    fn share(&mut self, class: Class, op: Op, at: usize) -> Reg {
        if let Some(&r) = self.known.get(&op) {
            return r;
        }
        let r = self.define(class, op, at);
        self.shared[r.0 as usize] = true;
        self.known.insert(op, r);
        self.scopes[at].keys.push(op);
        r
    }

    /// A point in time: registers from here on are new.
    pub(super) fn now(&self) -> Reg {
        Reg(self.fixed.len() as u32)
    }

    /// Let `d`, which may be assigned elsewhere too, take the value of `r`. If `r` is newer than `since`, nobody else knows of it.
    pub(super) fn assign(&mut self, class: Class, d: Reg, r: Reg, since: Reg) {
        if d == r {
            return;
        }
        if r >= since && !self.shared[r.0 as usize] && self.redirect(r, d) {
            return;
        }
        self.copy(class, d, r);
    }

    /// Let `d` take the value of `r`.
    pub(super) fn copy(&mut self, class: Class, d: Reg, r: Reg) {
        self.push(match class {
            Class::Int => Op::IntMove { d, s: r },
            Class::Vec => Op::VecMove { d, s: r },
        });
    }

    /// Make one of the last operations assign `d` in place of `r`.
    fn redirect(&mut self, r: Reg, d: Reg) -> bool {
        let top = self.top();
        for node in self.scopes[top].nodes.iter_mut().rev().take(64) {
            let Node::Op(op) = node else { return false };
            let (mut writes, mut touches) = (false, false);
            op.each_reg(&mut |x, access| {
                writes |= access == Access::Write && *x == r;
                touches |= *x == d || *x == r;
            });
            if writes {
                op.each_reg(&mut |x, access| {
                    if access == Access::Write && *x == r {
                        *x = d;
                    }
                });
                return true;
            }
            if touches {
                return false;
            }
        }
        false
    }

    /// Enter the body of a branch.
    pub(super) fn enter(&mut self) {
        self.scopes.push(Scope::default());
    }

    /// Leave a body.
    pub(super) fn leave(&mut self) -> Vec<Node> {
        let scope = self.scopes.pop().expect("a scope was entered");
        for key in &scope.keys {
            self.known.remove(key);
        }
        scope.nodes
    }

    pub(super) fn branch(&mut self, cond: Cond, size: Size, a: Reg, b: IntArg, then: Vec<Node>, other: Vec<Node>) {
        let top = self.top();
        let branch = Branch { cond, size, a, b, then, other };
        self.scopes[top].nodes.push(Node::Branch(Box::new(branch)));
    }

    /// Enter the body of a loop whose counter starts at `from`; the counter.
    pub(super) fn enter_loop(&mut self, from: IntArg, step: i32) -> Reg {
        let top = self.top();
        let reg = self.reg(Class::Int, top + 1, true);
        self.push(match from {
            IntArg::Imm(x) => Op::Imm { d: reg, x: i64::from(x) },
            IntArg::Reg(s) => Op::IntMove { d: reg, s },
        });
        self.enter();
        self.scopes[top + 1].counter = Some(Counter { reg, step, induced: vec![] });
        reg
    }

    /// Leave the body of a loop.
    pub(super) fn leave_loop(&mut self, end: IntArg, guard: bool) {
        let counter = self.scopes.last_mut().and_then(|s| s.counter.take()).expect("the scope is that of a loop");
        for (factor, reg) in counter.induced {
            // `multiple` made sure that the step fits.
            let b = IntArg::Imm((factor * i64::from(counter.step)) as i32);
            self.push(Op::Int { op: IntOp::Add, size: Size::W64, d: reg, a: reg, b });
        }
        let body = self.leave();
        let top = self.top();
        let node = Loop { counter: counter.reg, step: counter.step, end, guard, body };
        self.scopes[top].nodes.push(Node::Loop(Box::new(node)));
        self.home[counter.reg.0 as usize] = top as u32;
    }

    /// `factor * r`. A multiple of the counter of an open loop is kept up to date instead of computed again.
    pub(super) fn multiple(&mut self, r: Reg, factor: i64) -> Reg {
        let of = |s: &Scope| s.counter.as_ref().is_some_and(|c| c.reg == r);
        let Ok(imm) = i32::try_from(factor) else {
            let c = self.int(factor);
            return self.pure(Class::Int, Op::Int { op: IntOp::Mul, size: Size::W64, d: NEW, a: r, b: IntArg::Reg(c) });
        };
        let product = Op::Int { op: IntOp::Mul, size: Size::W64, d: NEW, a: r, b: IntArg::Imm(imm) };
        let Some(at) = self.scopes.iter().position(of) else { return self.pure(Class::Int, product) };
        let counter = self.scopes[at].counter.as_ref().expect("found by its counter");
        if let Some(&(_, known)) = counter.induced.iter().find(|(f, _)| *f == factor) {
            return known;
        }
        if i32::try_from(factor * i64::from(counter.step)).is_err() {
            return self.pure(Class::Int, product);
        }
        // The counter has its first value in front of the loop.
        let induced = self.define(Class::Int, product, at - 1);
        self.home[induced.0 as usize] = at as u32;
        let counter = self.scopes[at].counter.as_mut().expect("found by its counter");
        counter.induced.push((factor, induced));
        induced
    }

    pub(super) fn int(&mut self, x: i64) -> Reg {
        self.local(Class::Int, Op::Imm { d: NEW, x })
    }

    pub(super) fn int_arg(&mut self, x: i64) -> IntArg {
        match i32::try_from(x) {
            Ok(x) => IntArg::Imm(x),
            Err(_) => IntArg::Reg(self.int(x)),
        }
    }

    pub(super) fn int_op(&mut self, op: IntOp, size: Size, a: Reg, b: IntArg) -> Reg {
        self.pure(Class::Int, Op::Int { op, size, d: NEW, a, b })
    }

    /// `a + b`.
    pub(super) fn sum(&mut self, a: Reg, b: Reg) -> Reg {
        self.int_op(IntOp::Add, Size::W64, a.min(b), IntArg::Reg(a.max(b)))
    }

    /// `a + x`.
    pub(super) fn further(&mut self, a: Reg, x: i64) -> Reg {
        match x {
            0 => a,
            _ => {
                let b = self.int_arg(x);
                self.int_op(IntOp::Add, Size::W64, a, b)
            }
        }
    }

    /// A constant that has the same 32 bits everywhere.
    pub(super) fn splat32(&mut self, bits: u32) -> Mem {
        self.f.constant(std::array::from_fn(|i| bits.to_le_bytes()[i % 4]))
    }

    /// A constant that has the same 64 bits everywhere.
    pub(super) fn splat64(&mut self, bits: u64) -> Mem {
        self.f.constant(std::array::from_fn(|i| bits.to_le_bytes()[i % 8]))
    }

    /// A constant of 32-bit lanes.
    pub(super) fn lanes32(&mut self, lane: impl Fn(usize) -> i32) -> Mem {
        self.f.constant(std::array::from_fn(|i| lane(i / 4).to_le_bytes()[i % 4]))
    }

    /// A vector operand in a register.
    pub(super) fn in_reg(&mut self, w: Width, x: VecArg) -> Reg {
        match x {
            VecArg::Reg(r) => r,
            VecArg::Mem(m) => {
                let load = Op::VecLoad { w, d: NEW, m };
                if matches!(m.base, super::flat::Base::Pool(_)) {
                    self.local(Class::Vec, load)
                } else {
                    self.here(Class::Vec, load)
                }
            }
        }
    }
}
