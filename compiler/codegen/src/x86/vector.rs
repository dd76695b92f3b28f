//! Vector operations, in the encoding that reaches their width and registers.
//!
//! Results of spilled registers are made in the first scratch register; only the second holds other operands then.

use super::alloc::{Place, VEC_SCRATCH};
use super::asm::Rm;
use super::avx2::{self, Inst, NP, P66, PF2, PF3, Unit, inst};
use super::avx512::{self, K1, NARROW8, NARROW16, SELECT, SIGNS, SPREAD};
use super::encode::Emit;
use super::flat::{FloatCond, Mem, Narrow, Op, Reg, ShiftOp, Size, VecArg, VecOp, VecUn, Width};
use super::lines::{lane_width, scalar};

/// Whole vectors from and to memory and between registers.
const LOAD: Inst = inst(1, NP, 0x10);
const STORE: Inst = inst(1, NP, 0x11);
const MOVE: Inst = inst(1, NP, 0x28);
const XOR: Inst = inst(1, P66, 0xef);
const EXTRACT_BYTE: Inst = inst(3, P66, 0x14).bytes(1);
const EXTRACT_WORD: Inst = inst(3, P66, 0x15).bytes(2);
const INSERT_BYTE: Inst = inst(3, P66, 0x20).bytes(1);
const INSERT_WORD: Inst = inst(1, P66, 0xc4).bytes(2);
const INSERT_LANE: Inst = inst(3, P66, 0x22).bytes(4);

fn length(w: Width) -> u8 {
    match w {
        Width::S | Width::D | Width::X => 0,
        Width::Y => 1,
        Width::Z => 2,
    }
}

/// A one-lane float instruction: `F3` and 4 bytes, or `F2` and 8.
fn one(op: u8, w: Width) -> Inst {
    match w {
        Width::S => inst(1, PF3, op).bytes(4),
        _ => inst(1, PF2, op).bytes(8).wide(true),
    }
}

fn binary(op: VecOp, w: Width) -> Inst {
    use VecOp::*;
    let float = |code: u8, double: bool| match (scalar(op, w), double) {
        (true, _) => one(code, w),
        (false, true) => inst(1, P66, code).wide(true),
        (false, false) => inst(1, NP, code),
    };
    match op {
        AddF32 => float(0x58, false),
        MulF32 => float(0x59, false),
        SubF32 => float(0x5c, false),
        MinF32 => float(0x5d, false),
        DivF32 => float(0x5e, false),
        MaxF32 => float(0x5f, false),
        AddF64 => float(0x58, true),
        MulF64 => float(0x59, true),
        SubF64 => float(0x5c, true),
        MinF64 => float(0x5d, true),
        DivF64 => float(0x5e, true),
        MaxF64 => float(0x5f, true),
        And => inst(1, P66, 0xdb),
        Or => inst(1, P66, 0xeb),
        Xor => XOR,
        AddI16 => inst(1, P66, 0xfd),
        AddI32 => inst(1, P66, 0xfe),
        SubI32 => inst(1, P66, 0xfa),
        MulI32 => inst(2, P66, 0x40),
        MinI32 => inst(2, P66, 0x39),
        MaxI32 => inst(2, P66, 0x3d),
        MulEvenU32 => inst(1, P66, 0xf4).wide(true),
        EqI32 => inst(1, P66, 0x76),
        GtI32 => inst(1, P66, 0x66),
        MulAddU8I8 => inst(2, P66, 0x04),
        MulAddI16 => inst(1, P66, 0xf5),
        ShlI32 => inst(2, P66, 0x47),
        ShrI32 => inst(2, P66, 0x45),
        SarI32 => inst(2, P66, 0x46),
        ShuffleBytes => inst(2, P66, 0x00),
        EvenI32 => inst(1, NP, 0xc6),
    }
}

/// The instruction, its immediate, and whether it works on one lane.
fn unary(op: VecUn, w: Width) -> (Inst, Option<u8>, bool) {
    use VecUn::*;
    let lane = match op {
        SqrtF32 | FloorF32 | NearestF32 => w == Width::S,
        SqrtF64 | FloorF64 | NearestF64 | F64FromF32 | F32FromF64 => w == Width::D,
        F32FromI32 | I32FromF32 | F64FromI32 | I32FromF64 | OddToEven => false,
    };
    let (ps, pd, ss, sd) = (inst(3, P66, 0x08), inst(3, P66, 0x09), inst(3, P66, 0x0a), inst(3, P66, 0x0b));
    // Towards minus infinity and to nearest, both without exceptions.
    let (floor, nearest) = (Some(9), Some(8));
    let pick = |one: Inst, all: Inst| if lane { one } else { all };
    let (inst, imm) = match op {
        SqrtF32 => (pick(one(0x51, w), inst(1, NP, 0x51)), None),
        SqrtF64 => (pick(one(0x51, w), inst(1, P66, 0x51).wide(true)), None),
        FloorF32 => (pick(ss, ps), floor),
        NearestF32 => (pick(ss, ps), nearest),
        FloorF64 => (pick(sd, pd).wide(true), floor),
        NearestF64 => (pick(sd, pd).wide(true), nearest),
        F32FromI32 => (inst(1, NP, 0x5b), None),
        I32FromF32 => (inst(1, PF3, 0x5b), None),
        F64FromF32 => (pick(inst(1, PF3, 0x5a), inst(1, NP, 0x5a).unit(Unit::Half)), None),
        F32FromF64 => (pick(one(0x5a, w), inst(1, P66, 0x5a).wide(true)), None),
        F64FromI32 => (inst(1, PF3, 0xe6).unit(Unit::Half), None),
        I32FromF64 => (inst(1, P66, 0xe6).wide(true), None),
        OddToEven => (inst(1, PF3, 0x16), None),
    };
    (inst, imm, lane)
}

/// The lane of 64 bits has the wide form, the lane of 32 the narrow one.
fn double(lane: Size) -> bool {
    lane == Size::W64
}

/// The instruction that moves an integer of a size to or from lane 0.
fn crossing(op: u8, size: Size) -> Inst {
    inst(1, P66, op).both(double(size)).bytes(if double(size) { 8 } else { 4 })
}

/// Encode a vector operation.
pub(super) fn op(e: &mut Emit, op: &Op) -> Result<(), String> {
    match *op {
        Op::VecFromInt { size, d, s } => {
            let (r, s) = (e.made(d), e.rm(s));
            e.put(crossing(0x6e, size), Width::X, r, 0, s, None);
            e.done(d);
        }
        Op::IntFromVec { size, d, s } => {
            let (r, s) = (e.result(d), e.vec(s, 1));
            e.put(crossing(0x7e, size), Width::X, s, 0, Rm::Reg(r), None);
            e.keep(d);
        }
        Op::FloatFromI64 { w, d, s } => {
            one_lane(op, w)?;
            let (r, s) = (e.made(d), e.rm(s));
            e.put(XOR, Width::X, r, r, Rm::Reg(r), None);
            e.put(one(0x2a, w).both(true).bytes(8), w, r, r, s, None);
            e.done(d);
        }
        Op::I64FromFloat { w, d, s } => {
            one_lane(op, w)?;
            let (r, s) = (e.result(d), e.vec(s, 1));
            e.put(one(0x2c, w).both(true), w, r, 0, Rm::Reg(s), None);
            e.keep(d);
        }
        Op::VecMove { d, s } => match (e.rm(d), e.rm(s)) {
            (d, s) if d == s => {}
            (d, Rm::Reg(s)) => e.store(e.widest, d, s),
            (_, s) => {
                let r = e.made(d);
                e.load(e.widest, r, s);
                e.done(d);
            }
        },
        Op::VecZero { d } => {
            let r = e.made(d);
            e.put(XOR, Width::X, r, r, Rm::Reg(r), None);
            e.done(d);
        }
        Op::VecLoad { w, d, m } => {
            let (r, m) = (e.made(d), e.mem(m)?);
            e.load(w, r, m);
            e.done(d);
        }
        Op::VecStore { w, m, s } => {
            let (m, s) = (e.mem(m)?, e.vec(s, 1));
            e.store(w, m, s);
        }
        Op::Broadcast { w, lane, d, s } => {
            let (r, s) = (e.made(d), e.arg(s)?);
            let code = if double(lane) { inst(2, P66, 0x59).bytes(8) } else { inst(2, P66, 0x58).bytes(4) };
            e.put(code.wide(double(lane)), w, r, 0, s, None);
            e.done(d);
        }
        Op::Widen { w, d, m, narrow } => widen(e, w, d, m, narrow)?,
        Op::NarrowStore { w, m, s, t, bytes } => narrow_store(e, w, m, s, t, bytes)?,
        Op::Vec { op, w, d, a, b } => {
            let (r, a, b) = (e.made(d), e.vec(a, 1), e.arg(b)?);
            let imm = (op == VecOp::EvenI32).then_some(0x88);
            match op {
                VecOp::EqI32 | VecOp::GtI32 => e.mask(binary(op, w), w, r, a, b, imm, false),
                _ => e.put(binary(op, w), w, r, a, b, imm),
            }
            e.done(d);
        }
        Op::Un { op, w, d, s } => un(e, op, w, d, s)?,
        Op::Shift { op, w, d, a, n } => {
            let (r, a) = (e.made(d), e.vec(a, 1));
            let (code, which, wide) = match op {
                ShiftOp::ShlI32 => (0x72, 6, false),
                ShiftOp::ShrI32 => (0x72, 2, false),
                ShiftOp::SarI32 => (0x72, 4, false),
                ShiftOp::ShrI64 => (0x73, 2, true),
            };
            e.put(inst(1, P66, code).wide(wide), w, which, r, Rm::Reg(a), Some(n));
            e.done(d);
        }
        Op::Fma { w, lane, d, a, b, c } => {
            let [a, b, c] = [e.arg(a)?, e.arg(b)?, e.arg(c)?];
            fma(e, w, lane, d, a, b, c);
        }
        Op::Dot { w, d, c, a, b } => {
            let (r, c) = (e.made(d), e.rm(c));
            e.load(e.widest, r, c);
            let (a, b) = (e.vec(a, 1), e.arg(b)?);
            let code = inst(2, P66, 0x50);
            match e.vex_dot {
                true => e.put(code, w, r, a, b, None),
                false => avx512::put(&mut e.asm, code, length(w), r, a, b, None, 0),
            }
            e.done(d);
        }
        Op::Compare { w, lane, cond, d, a, b } => {
            let code = match (w == lane_width(lane), double(lane)) {
                (true, _) => one(0xc2, w),
                (false, true) => inst(1, P66, 0xc2).wide(true),
                (false, false) => inst(1, NP, 0xc2),
            };
            let imm = match cond {
                FloatCond::Eq => 0x00,
                FloatCond::Ne => 0x04,
                FloatCond::Lt => 0x11,
                FloatCond::Le => 0x12,
            };
            let (r, a, b) = (e.made(d), e.vec(a, 1), e.arg(b)?);
            e.mask(code, w, r, a, b, Some(imm), double(lane));
            e.done(d);
        }
        Op::Blend { w, d, mask, a, b } => {
            let (r, mask) = (e.made(d), e.vec(mask, 1));
            let (a, b) = (e.rm(a), e.vec(b, 0));
            if far(w, &[r, mask, b], a) {
                avx512::put(&mut e.asm, SIGNS, length(w), K1, 0, Rm::Reg(mask), None, 0);
                avx512::put(&mut e.asm, SELECT, length(w), r, b, a, None, K1);
            } else {
                e.put(inst(3, P66, 0x4a), w, r, b, a, Some(mask << 4));
            }
            e.done(d);
        }
        Op::UpperHalf { w, d, s } => {
            let (r, s) = (e.made(d), e.vec(s, 1));
            match w {
                Width::Z => e.put(inst(3, P66, 0x3b).wide(true), w, s, 0, Rm::Reg(r), Some(1)),
                Width::Y => e.put(inst(3, P66, 0x39), w, s, 0, Rm::Reg(r), Some(1)),
                Width::X => e.put(inst(1, P66, 0x6d).wide(true), w, r, s, Rm::Reg(s), None),
                Width::D => e.put(inst(1, PF3, 0x16), w, r, 0, Rm::Reg(s), None),
                Width::S => return Err(format!("{op:?} halves one lane: expected at least D")),
            }
            e.done(d);
        }
        Op::Join { w, d, low, high } => {
            let (r, low, high) = (e.made(d), e.vec(low, 1), e.rm(high));
            match w {
                Width::Z => e.put(inst(3, P66, 0x3a).wide(true).bytes(32), w, r, low, high, Some(1)),
                Width::Y => e.put(inst(3, P66, 0x38).bytes(16), w, r, low, high, Some(1)),
                Width::X => e.put(inst(1, P66, 0x6c).wide(true), w, r, low, high, None),
                Width::D => e.put(inst(1, P66, 0x62), w, r, low, high, None),
                Width::S => return Err(format!("{op:?} makes one lane: expected at least D")),
            }
            e.done(d);
        }
        Op::Pick { w, d, s, pick } => {
            let (r, s) = (e.made(d), e.rm(s));
            e.put(inst(1, P66, 0x70), w, r, 0, s, Some(pick));
            e.done(d);
        }
        Op::Insert { d, a, m, lane } => {
            let (r, a, m) = (e.made(d), e.vec(a, 1), e.mem(m)?);
            e.put(INSERT_LANE, Width::X, r, a, m, Some(lane & 3));
            e.done(d);
        }
        Op::InsertInt { d, a, s, lane } => {
            let (r, a, s) = (e.made(d), e.vec(a, 1), e.rm(s));
            e.put(INSERT_LANE, Width::X, r, a, s, Some(lane & 3));
            e.done(d);
        }
        _ => unreachable!("the caller encodes integer operations"),
    }
    Ok(())
}

fn one_lane(op: &Op, w: Width) -> Result<(), String> {
    match w {
        Width::S | Width::D => Ok(()),
        _ => Err(format!("{op:?} is wider than one lane: expected S or D")),
    }
}

/// Out of reach for VEX prefixes?
fn far(w: Width, regs: &[u8], rm: Rm) -> bool {
    w == Width::Z || regs.iter().any(|&r| r > 15) || matches!(rm, Rm::Reg(16..))
}

fn un(e: &mut Emit, op: VecUn, w: Width, d: Reg, s: VecArg) -> Result<(), String> {
    let (code, imm, lane) = unary(op, w);
    let r = e.made(d);
    let from = match s {
        VecArg::Mem(m) if w < Width::X => {
            use VecUn::{F64FromF32, F64FromI32};
            let half = w == Width::D && matches!(op, F64FromF32 | F64FromI32);
            let m = e.mem(m)?;
            e.load(if half { Width::S } else { w }, r, m);
            Rm::Reg(r)
        }
        VecArg::Reg(s) if lane => Rm::Reg(e.vec(s, 1)),
        _ => e.arg(s)?,
    };
    match from {
        // The upper lanes come from the operand itself, which waits for nothing else.
        Rm::Reg(s) if lane => e.put(code, w, r, s, from, imm),
        _ => e.put(code, w, r, 0, from, imm),
    }
    e.done(d);
    Ok(())
}

/// `a * b + c`. At most one operand is the caller's memory, the others may be spilled.
fn fma(e: &mut Emit, w: Width, lane: Size, d: Reg, a: Rm, b: Rm, c: Rm) {
    let single = (w == lane_width(lane)) as u8;
    let code = |op: u8| {
        let code = inst(2, P66, op + single).both(double(lane));
        if single == 0 { code } else { code.bytes(if double(lane) { 8 } else { 4 }) }
    };
    let is_reg = |x: Rm| matches!(x, Rm::Reg(_));
    let r = e.made(d);
    let here = Rm::Reg(r);
    if c != here && (a == here || b == here) {
        let factor = if a == here { b } else { a };
        match (factor, c) {
            (Rm::Reg(factor), _) => e.put(code(0xa8), w, r, factor, c, None),
            _ => {
                let c = e.near(w, c);
                e.put(code(0x98), w, r, c, factor, None);
            }
        }
    } else {
        e.load(w, r, c);
        let (a, b) = if is_reg(a) { (a, b) } else { (b, a) };
        let a = e.near(w, a);
        e.put(code(0xb8), w, r, a, b, None);
    }
    e.done(d);
}

fn widen(e: &mut Emit, w: Width, d: Reg, m: Mem, narrow: Narrow) -> Result<(), String> {
    let (code, bytes) = match narrow {
        Narrow::I8 => (inst(2, P66, 0x21).unit(Unit::Quarter), 1),
        Narrow::U8 => (inst(2, P66, 0x31).unit(Unit::Quarter), 1),
        Narrow::I16 => (inst(2, P66, 0x23).unit(Unit::Half), 2),
        Narrow::U16 => (inst(2, P66, 0x33).unit(Unit::Half), 2),
    };
    let lanes = match w {
        Width::S => 1,
        Width::D => 2,
        _ => 4,
    };
    let (r, m) = (e.made(d), e.mem(m)?);
    let part = match lanes * bytes {
        1 => Some((INSERT_BYTE, Some(0))),
        2 => Some((INSERT_WORD, Some(0))),
        4 if lanes == 2 => Some((crossing(0x6e, Size::W32), None)),
        _ => None,
    };
    match part {
        Some((part, imm)) => {
            let onto = if imm.is_some() {
                e.put(XOR, Width::X, r, r, Rm::Reg(r), None);
                r
            } else {
                0
            };
            e.put(part, Width::X, r, onto, m, imm);
            e.put(code, w, r, 0, Rm::Reg(r), None);
        }
        None => e.put(code, w, r, 0, m, None),
    }
    e.done(d);
    Ok(())
}

fn narrow_store(e: &mut Emit, w: Width, m: Mem, s: Reg, t: Reg, bytes: u8) -> Result<(), String> {
    if !matches!(bytes, 1 | 2) {
        return Err(format!("a narrow store has {bytes} bytes for every lane, expected 1 or 2"));
    }
    let m = e.mem(m)?;
    let further = |n: i32| match m {
        Rm::At { base, index, disp } => Rm::At { base, index, disp: disp + n },
        Rm::Pool { entry, disp } => Rm::Pool { entry, disp: disp + n },
        Rm::Reg(_) => m,
    };
    let s = e.vec(s, 1);
    if w == Width::S {
        let code = if bytes == 1 { EXTRACT_BYTE } else { EXTRACT_WORD };
        e.put(code, Width::X, s, 0, m, Some(0));
        return Ok(());
    }
    if e.evex && w > Width::D {
        let code = if bytes == 1 { NARROW8 } else { NARROW16 };
        avx512::put(&mut e.asm, code, length(w), s, 0, m, None, 0);
        return Ok(());
    }
    let pattern: [u8; 64] = std::array::from_fn(|n| match n % 16 {
        n if bytes == 1 && n < 4 => 4 * n as u8,
        n if bytes == 2 && n < 8 => (4 * (n / 2) + n % 2) as u8,
        _ => 0x80,
    });
    let pattern = e.f.constant(pattern);
    let (r, pattern) = (e.made(t), e.mem(pattern)?);
    e.put(binary(VecOp::ShuffleBytes, w), w, r, s, pattern, None);
    let (word, quad) = (crossing(0x7e, Size::W32), crossing(0x7e, Size::W64));
    match (w, bytes) {
        (Width::D, 1) => e.put(EXTRACT_WORD, Width::X, r, 0, m, Some(0)),
        (Width::D, _) | (Width::X, 1) => e.put(word, Width::X, r, 0, m, None),
        (Width::X, _) => e.put(quad, Width::X, r, 0, m, None),
        (_, 1) => {
            e.put(word, Width::X, r, 0, m, None);
            e.put(inst(3, P66, 0x39), w, r, 0, Rm::Reg(r), Some(1));
            e.put(word, Width::X, r, 0, further(4), None);
        }
        _ => {
            // Both halves' quads next to each other.
            e.put(inst(3, P66, 0x00).both(true), w, r, 0, Rm::Reg(r), Some(0x08));
            e.store(Width::X, m, r);
        }
    }
    Ok(())
}

impl Emit<'_> {
    /// One instruction in the shortest encoding that reaches its operands.
    fn put(&mut self, inst: Inst, w: Width, reg: u8, v: u8, rm: Rm, imm: Option<u8>) {
        let l = length(w);
        if far(w, &[reg, v], rm) {
            avx512::put(&mut self.asm, inst, l, reg, v, rm, imm, 0);
        } else {
            avx2::put(&mut self.asm, inst, l, reg, v, rm, imm);
        }
    }

    /// A comparison: lanes of ones and zeros. EVEX prefixes give a mask register, which is spread.
    #[expect(clippy::too_many_arguments, reason = "the fields of the encoding")]
    fn mask(&mut self, inst: Inst, w: Width, r: u8, a: u8, b: Rm, imm: Option<u8>, wide: bool) {
        if far(w, &[r, a], b) {
            avx512::put(&mut self.asm, inst, length(w), K1, a, b, imm, 0);
            avx512::put(&mut self.asm, SPREAD.wide(wide), length(w), r, 0, Rm::Reg(K1), None, 0);
        } else {
            avx2::put(&mut self.asm, inst, length(w), r, a, b, imm);
        }
    }

    /// A vector in a register, if need be in scratch register `n`.
    fn vec(&mut self, r: Reg, n: usize) -> u8 {
        match self.rm(r) {
            Rm::Reg(r) => r,
            slot => {
                let r = self.scratch(VEC_SCRATCH[n]);
                self.load(self.widest, r, slot);
                r
            }
        }
    }

    /// As [`Emit::vec`] for operands, in the second scratch register.
    fn near(&mut self, w: Width, x: Rm) -> u8 {
        match x {
            Rm::Reg(r) => r,
            _ => {
                let r = self.scratch(VEC_SCRATCH[1]);
                self.load(w, r, x);
                r
            }
        }
    }

    fn arg(&mut self, x: VecArg) -> Result<Rm, String> {
        match x {
            VecArg::Reg(r) => Ok(self.rm(r)),
            VecArg::Mem(m) => self.mem(m),
        }
    }

    /// The register in which a vector result is made; [`Emit::done`] follows.
    fn made(&mut self, d: Reg) -> u8 {
        match self.place(d) {
            Place::Reg(r) => r,
            _ => self.scratch(VEC_SCRATCH[0]),
        }
    }

    fn done(&mut self, d: Reg) {
        if let slot @ Rm::At { .. } = self.rm(d) {
            self.store(self.widest, slot, VEC_SCRATCH[0]);
        }
    }

    /// From memory at a width, or all of another register.
    fn load(&mut self, w: Width, d: u8, s: Rm) {
        match (s, w) {
            (Rm::Reg(s), _) if s == d => {}
            (Rm::Reg(_), _) => self.put(MOVE, self.widest, d, 0, s, None),
            (_, Width::S | Width::D) => self.put(one(0x10, w), w, d, 0, s, None),
            _ => self.put(LOAD, w, d, 0, s, None),
        }
    }

    fn store(&mut self, w: Width, d: Rm, s: u8) {
        match (d, w) {
            (Rm::Reg(d), _) => self.put(MOVE, self.widest, d, 0, Rm::Reg(s), None),
            (_, Width::S | Width::D) => self.put(one(0x11, w), w, s, 0, d, None),
            _ => self.put(STORE, w, s, 0, d, None),
        }
    }
}
