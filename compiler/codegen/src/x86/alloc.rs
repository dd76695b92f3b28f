//! Register allocation by linear scan.
//!
//! Every virtual register has one place for its whole life: a hardware register or a slot of the frame. Two that live at the same
//! time never share one. `split` gives what lives in the frame shorter lives elsewhere.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::asm::{RBP, RSP};
use super::flat::{Access, Class, Function, IntArg, Op, Reg, VecArg, Width};
use super::lines::{Line, Lines};
use super::split::Fates;

/// Where a virtual register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It is never touched.
    Nowhere,
    Reg(u8),
    /// So many bytes into the frame.
    Slot(i32),
}

/// The result of allocation.
#[derive(Debug)]
pub(super) struct Alloc {
    pub(super) places: Vec<Place>,
    /// Bit `n`: integer register `n` is used.
    pub(super) used: u16,
    /// Bytes of the frame, 0 if there is none.
    pub(super) frame: i32,
    /// Where 24 bytes for divisions lie.
    pub(super) divide: i32,
    /// The registers that live in the frame and had a choice.
    pub(super) spilled: Vec<u32>,
    /// Whether one that is needed within one operation has no register.
    pub(super) crowded: bool,
    /// Where the life of each register ends, and the number of loops around its first assignment.
    pub(super) ends: Vec<u32>,
    pub(super) levels: Vec<u32>,
}

/// The hardware registers of the arguments.
pub(super) const ARGS: [u8; 4] = [7, 6, 2, 1];
/// What the caller expects unchanged.
pub(super) const SAVED: [u8; 6] = [3, RBP, 12, 13, 14, 15];
/// Integer registers that encoding uses for spilled operands, when there are any.
pub(super) const INT_SCRATCH: [u8; 3] = [11, 10, 9];
/// The same for vectors.
pub(super) const VEC_SCRATCH: [u8; 2] = [15, 14];

/// Integer registers in order of preference.
const INTS: [u8; 15] = [0, 1, 2, 6, 7, 8, 9, 10, 11, 3, 12, 13, 14, 15, RBP];
/// Uses that a write counts for when the next iteration of the loop reads it.
const CARRIED: u64 = 5;
const MAX_FRAME: i32 = 1 << 20;
const NONE: u32 = u32::MAX;

/// The life of a virtual register: from its first assignment to its last use, in half steps of lines.
#[derive(Clone, Copy, Debug)]
struct Life {
    start: u32,
    end: u32,
    /// Loops around its first assignment.
    level: u32,
    /// Uses, each counting eight times more for every loop around it.
    uses: u64,
    /// Registers whose place would save a move.
    hints: [u32; 3],
}

const UNBORN: Life = Life { start: NONE, end: 0, level: 0, uses: 0, hints: [NONE; 3] };

/// The hardware registers that may be used, one bit each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Available {
    pub(super) ints: u32,
    pub(super) vecs: u32,
}

impl Available {
    /// All that there are, with so many vector registers.
    pub(super) fn all(vecs: u8) -> Available {
        Available { ints: INTS.iter().fold(0, |m, r| m | 1 << r), vecs: ((1u64 << vecs) - 1) as u32 }
    }
}

/// Choose a place for every virtual register. With `scratch` the registers that encoding uses for spilled operands stay free.
///
/// # Errors
/// A register is read before it is assigned, or the frame is too large.
pub(super) fn allocate(
    f: &Function,
    lines: &Lines,
    available: Available,
    fates: &Fates,
    scratch: bool,
) -> Result<Alloc, String> {
    let (lives, order) = lives(f, lines)?;
    let mut framed = f.frame > 0 || lines.divides || fates.any_framed();
    let mut reserved = [false; 2];
    loop {
        let mut places = vec![Place::Nowhere; lives.len()];
        let Available { ints: free, vecs: free_vecs } = available;
        let mut ints = Scan { lives: &lives, fates, places: &mut places, owner: [NONE; 32], free, spilled: vec![] };
        if framed {
            ints.free &= !(1 << RBP);
        }
        if reserved[0] {
            ints.free &= !INT_SCRATCH.iter().fold(0, |m, r| m | 1 << r);
        }
        let used = ints.run(f, &order, Class::Int);
        let int_slots = std::mem::take(&mut ints.spilled);
        let mut vecs =
            Scan { lives: &lives, fates, places: &mut places, owner: [NONE; 32], free: free_vecs, spilled: vec![] };
        if reserved[1] {
            vecs.free &= !VEC_SCRATCH.iter().fold(0, |m, r| m | 1 << r);
        }
        vecs.run(f, &order, Class::Vec);
        let vec_slots = std::mem::take(&mut vecs.spilled);
        let needs = [!int_slots.is_empty(), !vec_slots.is_empty()];
        let more = scratch && ((needs[0] && !reserved[0]) || (needs[1] && !reserved[1]));
        if more || (!framed && (needs[0] || needs[1])) {
            framed = true;
            reserved = [scratch && (reserved[0] | needs[0]), scratch && (reserved[1] | needs[1])];
            continue;
        }
        let all = || int_slots.iter().chain(&vec_slots).copied();
        let crowded = all().any(|v| fates.brief(v));
        let chosen: Vec<u32> = all().filter(|&v| !fates.framed(v)).collect();
        let bytes = if lines.widest == Width::Z { 64 } else { 32 };
        let mut frame = i64::from(f.frame + 63) / 64 * 64;
        for (mut spilled, bytes) in [(vec_slots, bytes), (int_slots, 8)] {
            frame += slots(&lives, &mut spilled, frame, bytes, &mut places);
        }
        let divide = frame as i32;
        frame += if lines.divides { 24 } else { 0 };
        if frame > i64::from(MAX_FRAME) {
            return Err(format!(
                "a frame of {frame} bytes is needed, expected at most {MAX_FRAME}: use fewer registers"
            ));
        }
        let used = if framed { used & !(1 << RBP) } else { used };
        return Ok(Alloc {
            places,
            used,
            frame: if framed { (frame as i32).max(8) } else { 0 },
            divide,
            spilled: chosen,
            crowded,
            ends: lives.iter().map(|l| l.end).collect(),
            levels: lives.iter().map(|l| l.level).collect(),
        });
    }
}

/// The lives of all registers, and those that live in order of their start.
fn lives(f: &Function, lines: &Lines) -> Result<(Vec<Life>, Vec<u32>), String> {
    let mut lives = vec![UNBORN; f.classes.len()];
    let mut order = Vec::with_capacity(lives.len());
    let mut loops: Vec<(u32, u32)> = vec![];
    let mut bad = None;
    let mut touch = |r: Reg, at: u32, loops: &[(u32, u32)], write: bool, order: &mut Vec<u32>| -> bool {
        let life = &mut lives[r.0 as usize];
        let first = life.start == NONE;
        if first {
            if !write {
                bad = Some(r);
            }
            life.start = at;
            life.level = loops.len() as u32;
            order.push(r.0);
        }
        // What one iteration hands to the next is on the path that every iteration waits for.
        let carried = write && loops.last().is_some_and(|&(top, _)| top > life.start);
        life.uses += (if carried { CARRIED } else { 1 }) << (3 * loops.len().min(6));
        let outer = loops.iter().find(|&&(start, _)| start > life.start);
        life.end = life.end.max(outer.map_or(at, |&(_, end)| end));
        first
    };
    f.args.iter().for_each(|&r| _ = touch(r, 1, &[], true, &mut order));
    let mut hints: Vec<(u32, [u32; 3])> = Vec::with_capacity(f.classes.len());
    for (n, &line) in lines.lines.iter().enumerate() {
        let at = 2 * n as u32 + 2;
        match line {
            Line::Op(mut op) => {
                // The addend of a dot product moves to the result before the factors are read.
                let early = match op {
                    Op::Dot { d, c, .. } if d != c => Some(c),
                    _ => None,
                };
                let mut hint = None;
                let mut reads = [NONE; 8];
                let mut count = 0;
                op.each_reg(&mut |&mut r, access| match access {
                    Access::Read => {
                        let late = early.is_some_and(|c| c != r);
                        touch(r, at + late as u32, &loops, false, &mut order);
                        reads[count] = r.0;
                        count += 1;
                    }
                    Access::Write => {
                        if touch(r, at + 1, &loops, true, &mut order) {
                            hint = Some(r.0);
                        }
                    }
                });
                if let Some(d) = hint {
                    hints.push((d, prefer(&op, &reads)));
                }
            }
            Line::Top { counter, end, guard, close, .. } => {
                if guard {
                    touch(counter, at, &loops, false, &mut order);
                    if let IntArg::Reg(r) = end {
                        touch(r, at, &loops, false, &mut order);
                    }
                }
                loops.push((at, 2 * close + 3));
            }
            Line::Bottom { counter, end, .. } => {
                touch(counter, at, &loops, false, &mut order);
                touch(counter, at + 1, &loops, true, &mut order);
                if let IntArg::Reg(r) = end {
                    touch(r, at + 1, &loops, false, &mut order);
                }
                loops.pop();
            }
            Line::If { a, b, .. } => {
                touch(a, at, &loops, false, &mut order);
                if let IntArg::Reg(r) = b {
                    touch(r, at, &loops, false, &mut order);
                }
            }
            Line::Else | Line::EndIf => {}
        }
    }
    if let Some(r) = bad {
        return Err(format!("register {} is read before it is assigned: assign it first", r.0));
    }
    for (d, hint) in hints {
        lives[d as usize].hints = hint;
    }
    Ok((lives, order))
}

/// The registers whose place the result would like, best first.
fn prefer(op: &Op, reads: &[u32; 8]) -> [u32; 3] {
    let arg = |x: VecArg| match x {
        VecArg::Reg(r) => r.0,
        VecArg::Mem(_) => NONE,
    };
    match *op {
        Op::Fma { a, b, c, .. } => [arg(c), arg(a), arg(b)],
        Op::Dot { c, .. } => [c.0, NONE, NONE],
        Op::Choose { a, b, .. } => [b.0, a.0, NONE],
        _ => [reads[0], reads[1], reads[2]],
    }
}

/// Allocation of one class.
struct Scan<'a> {
    lives: &'a [Life],
    fates: &'a Fates,
    places: &'a mut [Place],
    /// The virtual register in every hardware register.
    owner: [u32; 32],
    free: u32,
    spilled: Vec<u32>,
}

impl Scan<'_> {
    /// Returns the integer registers that were used.
    fn run(&mut self, f: &Function, order: &[u32], class: Class) -> u16 {
        let mut used = 0;
        let mut held: u32 = 0;
        for &v in order {
            if f.classes[v as usize] != class {
                continue;
            }
            let life = self.lives[v as usize];
            let mut rest = held;
            while rest != 0 {
                let r = rest.trailing_zeros();
                rest &= rest - 1;
                if self.lives[self.owner[r as usize] as usize].end < life.start {
                    held &= !(1 << r);
                    self.free |= 1 << r;
                }
            }
            if self.fates.framed(v) {
                self.spilled.push(v);
                continue;
            }
            let mut chosen = self.pick(f, v, class);
            if chosen.is_none() {
                chosen = self.evict(v, held);
            }
            if let Some(r) = chosen {
                self.free &= !(1 << r);
                held |= 1 << r;
                self.owner[r as usize] = v;
                self.places[v as usize] = Place::Reg(r);
                used |= 1u64 << r;
            }
        }
        used as u16 & !(1 << RSP)
    }

    fn pick(&self, f: &Function, v: u32, class: Class) -> Option<u8> {
        let free = |r: u8| self.free & 1 << r != 0;
        let life = &self.lives[v as usize];
        if life.start == 1 {
            // An argument stays where it arrives.
            let n = f.args.iter().position(|r| r.0 == v)?;
            return Some(ARGS[n]).filter(|&r| free(r));
        }
        for hint in life.hints {
            if hint == NONE {
                continue;
            }
            if let Place::Reg(r) = self.places[hint as usize]
                && f.classes[hint as usize] == class
                && free(r)
            {
                return Some(r);
            }
        }
        match class {
            Class::Int => INTS.into_iter().find(|&r| free(r)),
            Class::Vec => (self.free != 0).then(|| self.free.trailing_zeros() as u8),
        }
    }

    /// Make room for `v` by moving the register that is cheapest to spill to the frame; that may be `v` itself.
    fn evict(&mut self, v: u32, held: u32) -> Option<u8> {
        let cost = |v: u32| {
            let life = &self.lives[v as usize];
            let length = life.end - life.start;
            // The shortest lives gain nothing in the frame.
            if length <= 3 || self.fates.brief(v) { f64::INFINITY } else { life.uses as f64 / f64::from(length) }
        };
        let argument = self.lives[v as usize].start == 1;
        let mut best = (v, cost(v), None);
        let mut rest = if argument { 0 } else { held };
        while rest != 0 {
            let r = rest.trailing_zeros() as u8;
            rest &= rest - 1;
            let owner = self.owner[r as usize];
            let c = cost(owner);
            if c < best.1 {
                best = (owner, c, Some(r));
            }
        }
        self.spilled.push(best.0);
        self.places[best.0 as usize] = Place::Nowhere;
        best.2
    }
}

/// Give spilled registers places of `bytes` bytes from `base` on, shared by those that do not live at the same time. Returns the bytes taken.
fn slots(lives: &[Life], spilled: &mut [u32], base: i64, bytes: i64, places: &mut [Place]) -> i64 {
    spilled.sort_unstable_by_key(|&v| (lives[v as usize].start, v));
    let mut busy: BinaryHeap<Reverse<(u32, i64)>> = BinaryHeap::new();
    let mut free: VecDeque<i64> = VecDeque::new();
    let mut count = 0;
    for &v in spilled.iter() {
        let life = &lives[v as usize];
        while let Some(&Reverse((end, slot))) = busy.peek() {
            if end >= life.start {
                break;
            }
            busy.pop();
            free.push_back(slot);
        }
        let slot = free.pop_back().unwrap_or_else(|| {
            count += 1;
            count - 1
        });
        busy.push(Reverse((life.end, slot)));
        // A place beyond 32 bits belongs to a frame that is refused.
        places[v as usize] = Place::Slot(i32::try_from(base + slot * bytes).unwrap_or(i32::MAX));
    }
    count * bytes
}
