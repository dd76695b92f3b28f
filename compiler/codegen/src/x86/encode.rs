//! From flat functions to machine code: frame, control flow and integer operations.
//!
//! The code is position independent and follows the System V convention; vector operations are in `vector`.

use super::alloc::{ARGS, Alloc, Available, INT_SCRATCH, Place, SAVED, allocate};
use super::asm::{Alu, Asm, Flag, Pending, RAX, RBP, RDX, RSP, Rm, Shift};
use super::flat::{Base, Cond, Function, IntArg, IntOp, Mem, Narrow, Op, Reg, Size, Width};
use super::lines::{Line, flatten};
use super::split::Fates;
use super::{avx2, vector};
use crate::{Feature, Target};

/// Rounds of allocation that split lives, and all of them, before spilled operands get registers of their own.
const SPLITS: u32 = 10;
const ROUNDS: u32 = 20;

/// The widest vectors of a target that [`emit`] serves.
pub(super) fn widest(target: &Target) -> Width {
    use Feature::{Avx512bw, Avx512dq, Avx512f, Avx512vl};
    match [Avx512f, Avx512vl, Avx512bw, Avx512dq].iter().all(|&x| target.has(x)) {
        true => Width::Z,
        false => Width::Y,
    }
}

/// Machine code for a function. Operations may be added to its pool and registers to it, its body stays.
///
/// # Errors
/// The target lacks what the function needs, or an operation has a form that the flat operations do not define.
pub(super) fn emit(f: &mut Function, target: &Target) -> Result<Vec<u8>, String> {
    emit_within(f, target, None)
}

/// As [`emit`] with a choice of registers; `None` takes all that reach every operation.
pub(super) fn emit_within(f: &mut Function, target: &Target, available: Option<Available>) -> Result<Vec<u8>, String> {
    use Feature::{Avx2, Bmi2, Fma, Popcnt};
    for feature in [Avx2, Fma, Bmi2, Popcnt] {
        if !target.has(feature) {
            return Err(format!("target {target} lacks {}, which every wide kernel needs", feature.name()));
        }
    }
    if f.args.len() > ARGS.len() {
        return Err(format!("the function has {} arguments, expected at most {}", f.args.len(), ARGS.len()));
    }
    let mut lines = flatten(f);
    let evex = widest(target) == Width::Z;
    let (vex_dot, evex_dot) = (target.has(Feature::AvxVnni), evex && target.has(Feature::Avx512Vnni));
    if lines.widest == Width::Z && !evex {
        return Err(format!("target {target} has no vectors of 512 bits"));
    }
    if lines.dots && !evex_dot && (!vex_dot || lines.widest == Width::Z) {
        return Err(format!("target {target} has no fused dot products of bytes"));
    }
    let registers = if evex && (evex_dot || !lines.dots) { 32 } else { 16 };
    let available = available.unwrap_or(Available::all(registers));
    let stride = if lines.widest == Width::Z { 64 } else { 32 };
    let mut fates = Fates::default();
    let mut scratch = false;
    let mut rounds = 0;
    loop {
        let alloc = allocate(f, &lines, available, &fates, scratch)?;
        rounds += 1;
        if !scratch {
            scratch = alloc.crowded || rounds > ROUNDS;
            if scratch || (rounds < SPLITS && fates.split(f, &mut lines.lines, &alloc)) {
                continue;
            }
        }
        let asm = Asm::with_capacity(lines.lines.len() * 16 + 256);
        let (widest, needy) = (lines.widest, vec![]);
        let mut e = Emit { f, alloc: &alloc, asm, widest, evex, vex_dot, line: 0, needy };
        e.enter();
        e.body(&lines.lines)?;
        e.leave();
        let (asm, needy) = (e.asm, e.needy);
        if needy.is_empty() || scratch {
            return Ok(asm.finish(&f.pool, stride));
        }
        fates.bring_near(f, &mut lines.lines, &alloc, &needy);
    }
}

/// The state of encoding.
pub(super) struct Emit<'a> {
    pub(super) f: &'a mut Function,
    pub(super) alloc: &'a Alloc,
    pub(super) asm: Asm,
    /// The width of whole registers in this function.
    pub(super) widest: Width,
    /// EVEX prefixes are there.
    pub(super) evex: bool,
    /// Dot products with VEX prefixes are there.
    pub(super) vex_dot: bool,
    /// The line that is encoded, and those that used scratch registers so far, in ascending order.
    line: u32,
    needy: Vec<u32>,
}

/// A loop or branch that is open.
enum Open {
    Loop { top: usize, skip: Option<Pending> },
    Branch(Pending),
}

fn flag(cond: Cond) -> Flag {
    match cond {
        Cond::Eq => Flag::E,
        Cond::Ne => Flag::Ne,
        Cond::Lt => Flag::L,
        Cond::Le => Flag::Le,
    }
}

/// The operation with two operands that can also work on memory.
fn alu(op: IntOp) -> Option<Alu> {
    match op {
        IntOp::Add => Some(Alu::Add),
        IntOp::Sub => Some(Alu::Sub),
        IntOp::And => Some(Alu::And),
        IntOp::Or => Some(Alu::Or),
        IntOp::Xor => Some(Alu::Xor),
        IntOp::Mul | IntOp::Min | IntOp::Max | IntOp::Shl | IntOp::Shr | IntOp::Sar => None,
    }
}

impl Emit<'_> {
    fn saved(&self) -> impl Iterator<Item = u8> + Clone + use<> {
        let used = self.alloc.used;
        SAVED.into_iter().filter(move |&r| used & 1 << r != 0)
    }

    fn enter(&mut self) {
        let framed = self.alloc.frame > 0;
        if framed {
            self.asm.push(RBP);
            self.asm.mov(true, RBP, Rm::Reg(RSP));
        }
        self.saved().for_each(|r| self.asm.push(r));
        if framed {
            self.asm.alu_imm(Alu::Sub, true, Rm::Reg(RSP), self.alloc.frame);
            self.asm.alu_imm(Alu::And, true, Rm::Reg(RSP), -64);
        }
        for (n, r) in ARGS.into_iter().enumerate() {
            let place = self.f.args.get(n).map(|&v| self.place(v));
            if let Some(Place::Slot(at)) = place {
                self.asm.store(8, Rm::slot(at), r);
            }
        }
    }

    fn leave(&mut self) {
        let saved = self.saved();
        if self.alloc.frame > 0 {
            let below = -8 * saved.clone().count() as i32;
            self.asm.lea(true, RSP, Rm::At { base: RBP, index: None, disp: below });
        }
        let mut saved: Vec<u8> = saved.collect();
        saved.reverse();
        saved.into_iter().for_each(|r| self.asm.pop(r));
        if self.alloc.frame > 0 {
            self.asm.pop(RBP);
        }
        if self.widest > Width::X {
            self.asm.vzeroupper();
        }
        self.asm.ret();
    }

    fn body(&mut self, lines: &[Line]) -> Result<(), String> {
        const ORDER: &str = "loops and branches close in the order in which they open";
        let mut open = vec![];
        for (n, line) in lines.iter().enumerate() {
            self.line = n as u32;
            match *line {
                Line::Op(ref op) => self.op(op)?,
                Line::Top { counter, end, guard, innermost, .. } => {
                    let skip = guard.then(|| {
                        self.compare(Size::W64, counter, end);
                        self.asm.jump(Some(Flag::Ge))
                    });
                    if innermost {
                        self.asm.align(32);
                    }
                    open.push(Open::Loop { top: self.asm.bytes.len(), skip });
                }
                Line::Bottom { counter, step, end } => {
                    let Some(Open::Loop { top, skip }) = open.pop() else { unreachable!("{ORDER}") };
                    let counted = self.rm(counter);
                    self.asm.alu_imm(Alu::Add, true, counted, step);
                    self.compare(Size::W64, counter, end);
                    self.asm.jump_back(Flag::L, top);
                    skip.into_iter().for_each(|jump| self.asm.land(jump));
                }
                Line::If { cond, size, a, b, .. } => {
                    self.compare(size, a, b);
                    let jump = self.asm.jump(Some(flag(cond).not()));
                    open.push(Open::Branch(jump));
                }
                Line::Else => {
                    let Some(Open::Branch(other)) = open.pop() else { unreachable!("{ORDER}") };
                    let end = self.asm.jump(None);
                    open.push(Open::Branch(end));
                    self.asm.land(other);
                }
                Line::EndIf => {
                    let Some(Open::Branch(end)) = open.pop() else { unreachable!("{ORDER}") };
                    self.asm.land(end);
                }
            }
        }
        Ok(())
    }

    pub(super) fn place(&self, r: Reg) -> Place {
        self.alloc.places[r.0 as usize]
    }

    /// Where a register lives, as an operand.
    pub(super) fn rm(&self, r: Reg) -> Rm {
        match self.place(r) {
            Place::Reg(r) => Rm::Reg(r),
            Place::Slot(at) => Rm::slot(at),
            Place::Nowhere => unreachable!("allocation gives a place to every register that an operation touches"),
        }
    }

    /// An integer in a register, if need be in scratch register `n`.
    pub(super) fn int(&mut self, r: Reg, n: usize) -> u8 {
        match self.rm(r) {
            Rm::Reg(r) => r,
            slot => {
                let r = self.scratch(INT_SCRATCH[n]);
                self.asm.mov(true, r, slot);
                r
            }
        }
    }

    /// A scratch register, for this line.
    pub(super) fn scratch(&mut self, r: u8) -> u8 {
        self.needy.push(self.line);
        r
    }

    /// The register in which an integer result is made; [`Emit::keep`] follows.
    pub(super) fn result(&mut self, d: Reg) -> u8 {
        match self.place(d) {
            Place::Reg(r) => r,
            _ => self.scratch(INT_SCRATCH[2]),
        }
    }

    pub(super) fn keep(&mut self, d: Reg) {
        if let slot @ Rm::At { .. } = self.rm(d) {
            self.asm.store(8, slot, INT_SCRATCH[2]);
        }
    }

    /// An address; spilled parts of it use the first two scratch registers.
    pub(super) fn mem(&mut self, m: Mem) -> Result<Rm, String> {
        match (m.base, m.index) {
            (Base::Frame, None) => Ok(Rm::slot(m.disp)),
            (Base::Pool(entry), None) => Ok(Rm::Pool { entry, disp: m.disp }),
            (Base::Reg(base), index) => {
                let base = self.int(base, 0);
                let index = match index {
                    Some((r, scale @ (1 | 2 | 4 | 8))) => Some((self.int(r, 1), scale)),
                    Some((_, scale)) => return Err(format!("an index is scaled by {scale}, expected 1, 2, 4 or 8")),
                    None => None,
                };
                Ok(Rm::At { base, index, disp: m.disp })
            }
            (base, Some(_)) => Err(format!("an address in {base:?} has an index: use Lea and add")),
        }
    }

    fn compare(&mut self, size: Size, a: Reg, b: IntArg) {
        let wide = size == Size::W64;
        match (self.rm(a), b) {
            (Rm::Reg(a), IntArg::Imm(0)) => self.asm.test(wide, a),
            (a, IntArg::Imm(x)) => self.asm.alu_imm(Alu::Cmp, wide, a, x),
            (Rm::Reg(a), IntArg::Reg(b)) => {
                let b = self.rm(b);
                self.asm.alu(Alu::Cmp, wide, a, b);
            }
            (a, IntArg::Reg(b)) => {
                let b = self.int(b, 0);
                self.asm.alu_to(Alu::Cmp, wide, a, b);
            }
        }
    }

    fn op(&mut self, op: &Op) -> Result<(), String> {
        match *op {
            Op::Imm { d, x } => match (self.rm(d), i32::try_from(x)) {
                (Rm::Reg(r), _) => self.asm.imm(r, x),
                (slot, Ok(x)) => self.asm.store_imm(slot, x),
                (_, Err(_)) => {
                    let r = self.result(d);
                    self.asm.imm(r, x);
                    self.keep(d);
                }
            },
            Op::IntMove { d, s } => match (self.rm(d), self.rm(s)) {
                (d, s) if d == s => {}
                (Rm::Reg(d), s) => self.asm.mov(true, d, s),
                (d, _) => {
                    let s = self.int(s, 2);
                    self.asm.store(8, d, s);
                }
            },
            Op::Int { op, size, d, a, b } => self.arithmetic(op, size == Size::W64, d, a, b),
            Op::Popcnt { d, s } => {
                let (r, s) = (self.result(d), self.rm(s));
                self.asm.popcnt(r, s);
                self.keep(d);
            }
            Op::Lea { d, m } => {
                let (r, m) = (self.result(d), self.mem(m)?);
                self.asm.lea(true, r, m);
                self.keep(d);
            }
            Op::Extend { d, s, signed } => {
                let (r, s) = (self.result(d), self.rm(s));
                match signed {
                    true => self.asm.sign_extend(r, s),
                    false => self.asm.mov(false, r, s),
                }
                self.keep(d);
            }
            Op::IntLoad { d, m, size, narrow } => {
                let (r, m) = (self.result(d), self.mem(m)?);
                match narrow {
                    None => self.asm.mov(size == Size::W64, r, m),
                    Some(Narrow::I8) => self.asm.extend(true, 1, r, m),
                    Some(Narrow::U8) => self.asm.extend(false, 1, r, m),
                    Some(Narrow::I16) => self.asm.extend(true, 2, r, m),
                    Some(Narrow::U16) => self.asm.extend(false, 2, r, m),
                }
                self.keep(d);
            }
            Op::IntStore { m, s, bytes } => {
                if !matches!(bytes, 1 | 2 | 4 | 8) {
                    return Err(format!("a store has {bytes} bytes, expected 1, 2, 4 or 8"));
                }
                let m = self.mem(m)?;
                let s = self.int(s, 2);
                self.asm.store(bytes, m, s);
            }
            Op::SetCond { d, cond, size, a, b } => {
                self.compare(size, a, b);
                let r = self.result(d);
                self.asm.set(flag(cond), r);
                self.keep(d);
            }
            Op::Choose { d, c, a, b } => {
                match self.rm(c) {
                    Rm::Reg(c) => self.asm.test(false, c),
                    c => self.asm.alu_imm(Alu::Cmp, false, c, 0),
                }
                let (r, a, b) = (self.result(d), self.rm(a), self.rm(b));
                if a == Rm::Reg(r) {
                    self.asm.cmov(Flag::E, true, r, b);
                } else {
                    self.copy(true, r, b);
                    self.asm.cmov(Flag::Ne, true, r, a);
                }
                self.keep(d);
            }
            Op::Divide { d, a, b, remainder } => self.divide(d, a, b, remainder),
            Op::Prefetch { m } => {
                let m = self.mem(m)?;
                self.asm.prefetch(m);
            }
            _ => vector::op(self, op)?,
        }
        Ok(())
    }

    /// Nothing if it is there already.
    fn copy(&mut self, wide: bool, d: u8, s: Rm) {
        if s != Rm::Reg(d) {
            self.asm.mov(wide, d, s);
        }
    }

    fn arithmetic(&mut self, op: IntOp, wide: bool, d: Reg, a: Reg, b: IntArg) {
        if let (true, slot @ Rm::At { .. }, Some(alu), true) = (d == a, self.rm(d), alu(op), wide) {
            match b {
                IntArg::Imm(x) => self.asm.alu_imm(alu, wide, slot, x),
                IntArg::Reg(b) => {
                    let b = self.int(b, 0);
                    self.asm.alu_to(alu, wide, slot, b);
                }
            }
            return;
        }
        let (r, a) = (self.result(d), self.rm(a));
        match b {
            IntArg::Imm(x) => self.immediate(op, wide, r, a, x),
            IntArg::Reg(b) => {
                if let IntOp::Shl | IntOp::Shr | IntOp::Sar = op {
                    let count = self.int(b, 1);
                    let prefix = match op {
                        IntOp::Shl => avx2::P66,
                        IntOp::Shr => avx2::PF2,
                        _ => avx2::PF3,
                    };
                    avx2::put(&mut self.asm, avx2::inst(2, prefix, 0xf7).both(wide), 0, r, count, a, None);
                } else {
                    let b = self.rm(b);
                    self.two(op, wide, r, a, b);
                }
            }
        }
        self.keep(d);
    }

    fn immediate(&mut self, op: IntOp, wide: bool, r: u8, a: Rm, x: i32) {
        let count = (x & if wide { 63 } else { 31 }) as u8;
        let shift = match op {
            IntOp::Mul => return self.asm.mul_imm(wide, r, a, x),
            IntOp::Shl => Shift::Shl,
            IntOp::Shr => Shift::Shr,
            IntOp::Sar => Shift::Sar,
            IntOp::Add | IntOp::Sub | IntOp::And | IntOp::Or | IntOp::Xor | IntOp::Min | IntOp::Max => {
                match (op, a) {
                    (IntOp::Add, Rm::Reg(base)) if base != r => {
                        self.asm.lea(wide, r, Rm::At { base, index: None, disp: x });
                    }
                    _ => {
                        self.copy(wide, r, a);
                        let alu = alu(op).expect("minimum and maximum of an immediate became two operations");
                        self.asm.alu_imm(alu, wide, Rm::Reg(r), x);
                    }
                }
                return;
            }
        };
        if count == 0 {
            // A move even to itself clears the upper half.
            self.asm.mov(wide, r, a);
        } else {
            self.copy(wide, r, a);
            self.asm.shift(shift, wide, r, count);
        }
    }

    /// `r = a op b` where `r` may be the register of either.
    fn two(&mut self, op: IntOp, wide: bool, r: u8, a: Rm, b: Rm) {
        let swap = b == Rm::Reg(r) && a != b;
        if swap && op == IntOp::Sub {
            self.asm.neg(wide, r);
            return self.asm.alu(Alu::Add, wide, r, a);
        }
        let (a, b) = if swap { (b, a) } else { (a, b) };
        if let (IntOp::Add, Rm::Reg(x), Rm::Reg(y)) = (op, a, b)
            && x != r
        {
            return self.asm.lea(wide, r, Rm::At { base: x, index: Some((y, 1)), disp: 0 });
        }
        self.copy(wide, r, a);
        match (op, alu(op)) {
            (_, Some(alu)) => self.asm.alu(alu, wide, r, b),
            (IntOp::Mul, _) => self.asm.mul(wide, r, b),
            _ => {
                self.asm.alu(Alu::Cmp, wide, r, b);
                let worse = if op == IntOp::Min { Flag::G } else { Flag::L };
                self.asm.cmov(worse, wide, r, b);
            }
        }
    }

    fn divide(&mut self, d: Reg, a: Reg, b: Reg, remainder: bool) {
        let place = |n: i32| Rm::slot(self.alloc.divide + 8 * n);
        let (rax, rdx, by) = (place(0), place(1), place(2));
        let (a, d) = (self.rm(a), self.rm(d));
        let b = self.int(b, 0);
        self.asm.store(8, rax, RAX);
        self.asm.store(8, rdx, RDX);
        self.asm.store(8, by, b);
        self.copy(true, RAX, a);
        self.asm.divide(by);
        let from = if remainder { RDX } else { RAX };
        match d {
            Rm::Reg(d) => self.copy(true, d, Rm::Reg(from)),
            slot => self.asm.store(8, slot, from),
        }
        for (r, saved) in [(RAX, rax), (RDX, rdx)] {
            if d != Rm::Reg(r) {
                self.asm.mov(true, r, saved);
            }
        }
    }
}
