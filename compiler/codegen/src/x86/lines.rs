//! The tree of a function as one list in program order, with every operation in a form that one short instruction sequence serves.
//!
//! Memory is never read beyond the width that an operation names: where the instruction would, a load into a new register comes first.

use super::flat::{Class, Cond, Function, IntArg, IntOp, Node, Op, Reg, Size, VecArg, VecOp, Width};

/// A statement in program order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Line {
    Op(Op),
    /// `close` is the line of the matching `Bottom`.
    Top {
        counter: Reg,
        end: IntArg,
        guard: bool,
        innermost: bool,
        close: u32,
    },
    Bottom {
        counter: Reg,
        step: i32,
        end: IntArg,
    },
    If {
        cond: Cond,
        size: Size,
        a: Reg,
        b: IntArg,
    },
    Else,
    EndIf,
}

/// A function in program order.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) lines: Vec<Line>,
    /// The widest operation, at least `X`.
    pub(super) widest: Width,
    pub(super) divides: bool,
    pub(super) dots: bool,
}

/// One lane in an instruction of its own?
pub(super) fn scalar(op: VecOp, w: Width) -> bool {
    use VecOp::*;
    match op {
        AddF32 | SubF32 | MulF32 | DivF32 | MinF32 | MaxF32 => w == Width::S,
        AddF64 | SubF64 | MulF64 | DivF64 | MinF64 | MaxF64 => w == Width::D,
        _ => false,
    }
}

/// The width of one lane.
pub(super) fn lane_width(lane: Size) -> Width {
    match lane {
        Size::W32 => Width::S,
        Size::W64 => Width::D,
    }
}

/// Put the body in program order.
pub(super) fn flatten(f: &mut Function) -> Lines {
    let body = std::mem::take(&mut f.body);
    let mut out =
        Lines { lines: Vec::with_capacity(size(&body) * 9 / 8), widest: Width::X, divides: false, dots: false };
    block(f, &body, &mut out);
    f.body = body;
    out
}

/// About the number of lines.
fn size(nodes: &[Node]) -> usize {
    let one = |node: &Node| match node {
        Node::Op(_) => 1,
        Node::Loop(l) => size(&l.body) + 2,
        Node::Branch(b) => size(&b.then) + size(&b.other) + 3,
    };
    nodes.iter().map(one).sum()
}

/// Returns whether there was a loop.
fn block(f: &mut Function, nodes: &[Node], out: &mut Lines) -> bool {
    let mut loops = false;
    for node in nodes {
        match node {
            Node::Op(x) => op(f, *x, out),
            Node::Loop(l) => {
                loops = true;
                let top = out.lines.len();
                let (counter, end, guard) = (l.counter, l.end, l.guard);
                out.lines.push(Line::Top { counter, end, guard, innermost: false, close: 0 });
                let innermost = !block(f, &l.body, out);
                let close = out.lines.len() as u32;
                out.lines[top] = Line::Top { counter, end, guard, innermost, close };
                out.lines.push(Line::Bottom { counter, step: l.step, end });
            }
            Node::Branch(b) => {
                out.lines.push(Line::If { cond: b.cond, size: b.size, a: b.a, b: b.b });
                loops |= block(f, &b.then, out);
                if !b.other.is_empty() {
                    out.lines.push(Line::Else);
                    loops |= block(f, &b.other, out);
                }
                out.lines.push(Line::EndIf);
            }
        }
    }
    loops
}

fn op(f: &mut Function, x: Op, out: &mut Lines) {
    if let Some(w) = width(&x) {
        out.widest = out.widest.max(w);
    }
    match x {
        Op::Int { op, size, d, a, b: IntArg::Imm(n) } if matches!(op, IntOp::Min | IntOp::Max) => {
            let b = f.reg(Class::Int);
            let imm = match size {
                Size::W32 => i64::from(n as u32),
                Size::W64 => i64::from(n),
            };
            out.lines.push(Line::Op(Op::Imm { d: b, x: imm }));
            out.lines.push(Line::Op(Op::Int { op, size, d, a, b: IntArg::Reg(b) }));
        }
        Op::Vec { op, w, d, a, b } if !scalar(op, w) => {
            let b = load(f, w, b, out);
            out.lines.push(Line::Op(Op::Vec { op, w, d, a, b }));
        }
        Op::Compare { w, lane, cond, d, a, b } if lane_width(lane) != w => {
            let b = load(f, w, b, out);
            out.lines.push(Line::Op(Op::Compare { w, lane, cond, d, a, b }));
        }
        Op::Fma { w, lane, d, a, b, c } if lane_width(lane) != w => {
            let [a, b, c] = [a, b, c].map(|x| load(f, w, x, out));
            out.lines.push(Line::Op(Op::Fma { w, lane, d, a, b, c }));
        }
        Op::Dot { w, d, c, a, b } => {
            out.dots = true;
            let b = load(f, w, b, out);
            if d != c && (d == a || b == VecArg::Reg(d)) {
                let t = f.reg(Class::Vec);
                out.lines.push(Line::Op(Op::Dot { w, d: t, c, a, b }));
                out.lines.push(Line::Op(Op::VecMove { d, s: t }));
            } else {
                out.lines.push(Line::Op(Op::Dot { w, d, c, a, b }));
            }
        }
        Op::Divide { .. } => {
            out.divides = true;
            out.lines.push(Line::Op(x));
        }
        _ => out.lines.push(Line::Op(x)),
    }
}

/// A memory operand of less than 128 bits in a register.
fn load(f: &mut Function, w: Width, x: VecArg, out: &mut Lines) -> VecArg {
    match x {
        VecArg::Mem(m) if w < Width::X => {
            let d = f.reg(Class::Vec);
            out.lines.push(Line::Op(Op::VecLoad { w, d, m }));
            VecArg::Reg(d)
        }
        _ => x,
    }
}

fn width(op: &Op) -> Option<Width> {
    match *op {
        Op::VecLoad { w, .. }
        | Op::VecStore { w, .. }
        | Op::Broadcast { w, .. }
        | Op::Widen { w, .. }
        | Op::NarrowStore { w, .. }
        | Op::Vec { w, .. }
        | Op::Un { w, .. }
        | Op::Shift { w, .. }
        | Op::Fma { w, .. }
        | Op::Dot { w, .. }
        | Op::Compare { w, .. }
        | Op::Blend { w, .. }
        | Op::UpperHalf { w, .. }
        | Op::Join { w, .. }
        | Op::Pick { w, .. } => Some(w),
        _ => None,
    }
}
