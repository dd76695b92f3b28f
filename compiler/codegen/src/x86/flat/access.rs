//! Which registers an operation reads and assigns.
//!
//! Every field that holds a register is visited: allocation knows an operation by its visits alone.

use super::{Base, IntArg, Mem, Op, Reg, VecArg};

/// How an operation touches a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Access {
    Read,
    Write,
}

impl Mem {
    fn each(&mut self, f: &mut dyn FnMut(&mut Reg, Access)) {
        if let Base::Reg(r) = &mut self.base {
            f(r, Access::Read);
        }
        if let Some((r, _)) = &mut self.index {
            f(r, Access::Read);
        }
    }
}

impl IntArg {
    pub(in super::super) fn each(&mut self, f: &mut dyn FnMut(&mut Reg, Access)) {
        if let IntArg::Reg(r) = self {
            f(r, Access::Read);
        }
    }
}

impl VecArg {
    fn each(&mut self, f: &mut dyn FnMut(&mut Reg, Access)) {
        match self {
            VecArg::Reg(r) => f(r, Access::Read),
            VecArg::Mem(m) => m.each(f),
        }
    }
}

impl Op {
    /// Every register of the operation: those that are read first, then those that are assigned. A scratch register counts as assigned.
    pub(in super::super) fn each_reg(&mut self, f: &mut dyn FnMut(&mut Reg, Access)) {
        use Access::{Read, Write};
        match self {
            Op::Imm { d, .. } | Op::VecZero { d } => f(d, Write),
            Op::IntMove { d, s }
            | Op::Popcnt { d, s }
            | Op::Extend { d, s, .. }
            | Op::VecFromInt { d, s, .. }
            | Op::IntFromVec { d, s, .. }
            | Op::FloatFromI64 { d, s, .. }
            | Op::I64FromFloat { d, s, .. }
            | Op::VecMove { d, s }
            | Op::UpperHalf { d, s, .. }
            | Op::Pick { d, s, .. } => {
                f(s, Read);
                f(d, Write);
            }
            Op::Int { d, a, b, .. } | Op::SetCond { d, a, b, .. } => {
                f(a, Read);
                b.each(f);
                f(d, Write);
            }
            Op::Lea { d, m } | Op::IntLoad { d, m, .. } | Op::VecLoad { d, m, .. } | Op::Widen { d, m, .. } => {
                m.each(f);
                f(d, Write);
            }
            Op::IntStore { m, s, .. } | Op::VecStore { m, s, .. } => {
                m.each(f);
                f(s, Read);
            }
            Op::Choose { d, c, a, b } => {
                [c, a, b].into_iter().for_each(|r| f(r, Read));
                f(d, Write);
            }
            Op::Divide { d, a, b, .. } => {
                f(a, Read);
                f(b, Read);
                f(d, Write);
            }
            Op::Broadcast { d, s, .. } | Op::Un { d, s, .. } => {
                s.each(f);
                f(d, Write);
            }
            Op::NarrowStore { m, s, t, .. } => {
                m.each(f);
                f(s, Read);
                f(t, Write);
            }
            Op::Vec { d, a, b, .. } | Op::Compare { d, a, b, .. } => {
                f(a, Read);
                b.each(f);
                f(d, Write);
            }
            Op::Shift { d, a, .. } => {
                f(a, Read);
                f(d, Write);
            }
            Op::Fma { d, a, b, c, .. } => {
                [a, b, c].into_iter().for_each(|x| x.each(f));
                f(d, Write);
            }
            Op::Dot { d, c, a, b, .. } => {
                f(c, Read);
                f(a, Read);
                b.each(f);
                f(d, Write);
            }
            Op::Blend { d, mask, a, b, .. } => {
                [mask, a, b].into_iter().for_each(|r| f(r, Read));
                f(d, Write);
            }
            Op::Join { d, low, high, .. } => {
                f(low, Read);
                f(high, Read);
                f(d, Write);
            }
            Op::Insert { d, a, m, .. } => {
                f(a, Read);
                m.each(f);
                f(d, Write);
            }
            Op::InsertInt { d, a, s, .. } => {
                f(a, Read);
                f(s, Read);
                f(d, Write);
            }
            Op::Prefetch { m } => m.each(f),
        }
    }
}

impl Op {
    /// Whether a vector operand is memory that may change.
    pub(in super::super) fn reads_memory(&self) -> bool {
        let changes = |x: &VecArg| matches!(x, VecArg::Mem(m) if !matches!(m.base, Base::Pool(_)));
        match self {
            Op::Broadcast { s, .. } | Op::Un { s, .. } => changes(s),
            Op::Vec { b, .. } | Op::Compare { b, .. } | Op::Dot { b, .. } => changes(b),
            Op::Fma { a, b, c, .. } => [a, b, c].into_iter().any(changes),
            _ => false,
        }
    }
}
