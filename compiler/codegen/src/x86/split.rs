//! What is spilled gets registers again where that matters: inside of loops, and within single operations.
//!
//! A register that lives in the frame has a copy for every loop one level further in, loaded in front of it and stored behind it; the
//! copy competes for a register of its own. An operation that cannot work on the frame works on copies that always have registers.

use std::collections::HashMap;

use super::alloc::{Alloc, Place};
use super::flat::{Access, Class, Function, IntArg, Op, Reg};
use super::lines::Line;

/// What is known in advance about the places of registers.
#[derive(Debug, Default)]
pub(super) struct Fates {
    /// Those that live in the frame.
    framed: Vec<bool>,
    /// Those that are needed within one operation.
    brief: Vec<bool>,
    /// Loops around the life of a copy.
    levels: Vec<Option<u32>>,
}

impl Fates {
    fn is(set: &[bool], r: u32) -> bool {
        set.get(r as usize).is_some_and(|&x| x)
    }

    pub(super) fn framed(&self, r: u32) -> bool {
        Fates::is(&self.framed, r)
    }

    pub(super) fn brief(&self, r: u32) -> bool {
        Fates::is(&self.brief, r)
    }

    pub(super) fn any_framed(&self) -> bool {
        self.framed.iter().any(|&x| x)
    }

    fn reg(&mut self, f: &mut Function, class: Class) -> Reg {
        let r = f.reg(class);
        self.framed.resize(f.classes.len(), false);
        self.brief.resize(f.classes.len(), false);
        self.levels.resize(f.classes.len(), None);
        r
    }

    /// Give every register that was spilled a copy in the loops right inside of its life. Returns whether there are any.
    pub(super) fn split(&mut self, f: &mut Function, lines: &mut Vec<Line>, alloc: &Alloc) -> bool {
        let mut levels: Vec<Option<u32>> = f.classes.iter().map(|_| None).collect();
        for &r in &alloc.spilled {
            levels[r as usize] =
                Some(self.levels.get(r as usize).copied().flatten().unwrap_or(alloc.levels[r as usize]));
        }
        let uses = uses_by_loops(lines, &levels);
        if uses.is_empty() {
            return false;
        }
        let mut out = Vec::with_capacity(lines.len() + 2 * uses.len());
        // Open loops: the copies of each and what follows it.
        let mut open: Vec<(HashMap<Reg, Reg>, Vec<Op>)> = vec![];
        for (n, line) in lines.iter().enumerate() {
            let mut line = *line;
            if let Line::Top { close, .. } = line {
                let mut copies = HashMap::new();
                let mut after = vec![];
                for &(v, written) in uses.get(&n).into_iter().flatten() {
                    let class = f.classes[v.0 as usize];
                    let copy = self.reg(f, class);
                    self.framed[v.0 as usize] = true;
                    self.levels[copy.0 as usize] = levels[v.0 as usize].map(|level| level + 1);
                    out.push(Line::Op(moved(class, copy, v)));
                    copies.insert(v, copy);
                    if written && alloc.ends[v.0 as usize] > 2 * close + 3 {
                        after.push(moved(class, v, copy));
                    }
                }
                open.push((copies, after));
            }
            for (copies, _) in &open {
                if !copies.is_empty() {
                    each_reg(&mut line, &mut |r, _| {
                        if let Some(copy) = copies.get(r) {
                            *r = *copy;
                        }
                    });
                }
            }
            out.push(line);
            if let Line::Bottom { .. } = line {
                let (_, after) = open.pop().expect("loops close in the order in which they open");
                out.extend(after.into_iter().map(Line::Op));
            }
        }
        *lines = out;
        close_loops(lines);
        true
    }

    /// Let the lines numbered in `needy` work on registers. A line may occur several times.
    pub(super) fn bring_near(&mut self, f: &mut Function, lines: &mut Vec<Line>, alloc: &Alloc, needy: &[u32]) {
        let mut out = Vec::with_capacity(lines.len() + 3 * needy.len());
        let mut needy = needy.iter().copied().peekable();
        for (n, line) in lines.iter().enumerate() {
            let mut line = *line;
            let mut found = false;
            while needy.next_if_eq(&(n as u32)).is_some() {
                found = true;
            }
            if !found {
                out.push(line);
                continue;
            }
            // The counter of a loop stays where it is.
            let only = match line {
                Line::Op(_) => None,
                Line::Top { end: b, .. } | Line::Bottom { end: b, .. } | Line::If { b, .. } => Some(b),
                Line::Else | Line::EndIf => unreachable!("it has no operands"),
            };
            let mut near: Vec<(Reg, Reg, bool, bool)> = vec![];
            each_reg(&mut line, &mut |r, access| {
                let framed = matches!(alloc.places.get(r.0 as usize), Some(Place::Slot(_)));
                if !framed || only.is_some_and(|b| b != IntArg::Reg(*r)) {
                    return;
                }
                let at = near.iter().position(|x| x.0 == *r).unwrap_or_else(|| {
                    let copy = self.reg(f, f.classes[r.0 as usize]);
                    self.brief[copy.0 as usize] = true;
                    near.push((*r, copy, false, false));
                    near.len() - 1
                });
                near[at].2 |= access == Access::Read;
                near[at].3 |= access == Access::Write;
                *r = near[at].1;
            });
            let class = |r: Reg| f.classes[r.0 as usize];
            out.extend(near.iter().filter(|x| x.2).map(|x| Line::Op(moved(class(x.0), x.1, x.0))));
            out.push(line);
            out.extend(near.iter().filter(|x| x.3).map(|x| Line::Op(moved(class(x.0), x.0, x.1))));
        }
        *lines = out;
        close_loops(lines);
    }
}

/// For the first line of a loop: the registers to copy for it, and whether it assigns them.
type Uses = HashMap<usize, Vec<(Reg, bool)>>;

/// The uses of registers with a level in the loops right inside of that level.
fn uses_by_loops(lines: &[Line], levels: &[Option<u32>]) -> Uses {
    let mut uses = Uses::new();
    let mut open = vec![];
    for (n, &line) in lines.iter().enumerate() {
        if let Line::Top { .. } = line {
            open.push(n);
        }
        let mut line = line;
        each_reg(&mut line, &mut |r, access| {
            let Some(level) = levels[r.0 as usize] else { return };
            let Some(&top) = open.get(level as usize) else { return };
            let here = uses.entry(top).or_default();
            match here.iter_mut().find(|x| x.0 == *r) {
                Some(x) => x.1 |= access == Access::Write,
                None => here.push((*r, access == Access::Write)),
            }
        });
        if let Line::Bottom { .. } = line {
            open.pop();
        }
    }
    uses
}

fn moved(class: Class, d: Reg, s: Reg) -> Op {
    match class {
        Class::Int => Op::IntMove { d, s },
        Class::Vec => Op::VecMove { d, s },
    }
}

/// The registers of a line. The first line of a loop belongs to it.
fn each_reg(line: &mut Line, f: &mut dyn FnMut(&mut Reg, Access)) {
    match line {
        Line::Op(op) => op.each_reg(f),
        Line::Top { counter, end, .. } => {
            f(counter, Access::Read);
            end.each(f);
        }
        Line::Bottom { counter, end, .. } => {
            f(counter, Access::Write);
            end.each(f);
        }
        Line::If { a, b, .. } => {
            f(a, Access::Read);
            b.each(f);
        }
        Line::Else | Line::EndIf => {}
    }
}

/// Write the number of its last line into the first line of every loop.
fn close_loops(lines: &mut [Line]) {
    let mut open = vec![];
    for n in 0..lines.len() {
        match lines[n] {
            Line::Top { .. } => open.push(n),
            Line::Bottom { .. } => {
                let top = open.pop().expect("loops close in the order in which they open");
                if let Line::Top { close, .. } = &mut lines[top] {
                    *close = n as u32;
                }
            }
            _ => {}
        }
    }
}
