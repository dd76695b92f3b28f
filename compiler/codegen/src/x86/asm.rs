//! Bytes of instructions: addressing forms and the general-purpose instructions.
//!
//! Registers are the numbers of the hardware; nothing here knows virtual registers.

/// The stack pointer, which is also the base of the frame.
pub(super) const RSP: u8 = 4;
pub(super) const RBP: u8 = 5;
pub(super) const RAX: u8 = 0;
pub(super) const RDX: u8 = 2;

/// A register or a place in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rm {
    Reg(u8),
    /// `base + index * scale + disp`.
    At {
        base: u8,
        index: Option<(u8, u8)>,
        disp: i32,
    },
    /// So many bytes into an entry of the constant pool.
    Pool {
        entry: u32,
        disp: i32,
    },
}

impl Rm {
    /// A place in the frame.
    pub(super) fn slot(disp: i32) -> Rm {
        Rm::At { base: RSP, index: None, disp }
    }

    /// The bits of register numbers beyond the third, `(x, b)` of the prefixes of one to three bytes.
    pub(super) fn high(self) -> (u8, u8) {
        match self {
            Rm::Reg(r) => (0, r >> 3 & 1),
            Rm::At { base, index, .. } => (index.map_or(0, |(i, _)| i >> 3), base >> 3),
            Rm::Pool { .. } => (0, 0),
        }
    }
}

/// Arithmetic of two operands; the discriminants are the hardware's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Conditions of signed comparisons; the discriminants are the hardware's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flag {
    E = 4,
    Ne = 5,
    L = 12,
    Ge = 13,
    Le = 14,
    G = 15,
}

impl Flag {
    pub(super) fn not(self) -> Flag {
        match self {
            Flag::E => Flag::Ne,
            Flag::Ne => Flag::E,
            Flag::L => Flag::Ge,
            Flag::Ge => Flag::L,
            Flag::Le => Flag::G,
            Flag::G => Flag::Le,
        }
    }
}

/// Shifts by an immediate count; the discriminants are the hardware's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// A displacement that needs the address of a pool entry.
#[derive(Clone, Copy, Debug)]
struct Fix {
    at: usize,
    end: usize,
    entry: u32,
    disp: i32,
}

/// A jump forward whose goal is not yet known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending(usize);

const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// Code under construction.
#[derive(Debug)]
pub(super) struct Asm {
    pub(super) bytes: Vec<u8>,
    fixes: Vec<Fix>,
}

impl Asm {
    pub(super) fn with_capacity(bytes: usize) -> Asm {
        Asm { bytes: Vec::with_capacity(bytes), fixes: vec![] }
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The addressing bytes. `unit` scales displacements of one byte; `trail` bytes of the instruction follow.
    pub(super) fn operand(&mut self, reg: u8, rm: Rm, unit: i32, trail: usize) {
        let reg = (reg & 7) << 3;
        match rm {
            Rm::Reg(r) => self.bytes.push(0xc0 | reg | r & 7),
            Rm::Pool { entry, disp } => {
                self.put(&[reg | 5, 0, 0, 0, 0]);
                let end = self.bytes.len();
                self.fixes.push(Fix { at: end - 4, end: end + trail, entry, disp });
            }
            Rm::At { base, index, disp } => {
                let short = disp % unit == 0 && (-128..128).contains(&(disp / unit));
                let mode = match (disp, short) {
                    (0, _) if base & 7 != 5 => 0,
                    (_, true) => 0x40,
                    (_, false) => 0x80,
                };
                match index {
                    Some((i, scale)) => {
                        let scale = scale.trailing_zeros() as u8;
                        self.put(&[mode | reg | 4, scale << 6 | (i & 7) << 3 | base & 7]);
                    }
                    None if base & 7 == 4 => self.put(&[mode | reg | 4, 0x24]),
                    None => self.bytes.push(mode | reg | base & 7),
                }
                match mode {
                    0 => {}
                    0x40 => self.bytes.push((disp / unit) as u8),
                    _ => self.put(&disp.to_le_bytes()),
                }
            }
        }
    }

    fn general(&mut self, wide: bool, op: &[u8], reg: u8, rm: Rm, trail: usize) {
        let (x, b) = rm.high();
        let rex = 0x40 | (wide as u8) << 3 | reg >> 3 << 2 | x << 1 | b;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.put(op);
        self.operand(reg, rm, 1, trail);
    }

    /// As `general` for byte registers: those beyond the fourth need a prefix.
    fn byte(&mut self, op: &[u8], reg: u8, rm: Rm) {
        let (x, b) = rm.high();
        self.bytes.push(0x40 | reg >> 3 << 2 | x << 1 | b);
        self.put(op);
        self.operand(reg, rm, 1, 0);
    }

    pub(super) fn mov(&mut self, wide: bool, d: u8, s: Rm) {
        self.general(wide, &[0x8b], d, s, 0);
    }

    /// The low `bytes` (1, 2, 4, 8) of `s`.
    pub(super) fn store(&mut self, bytes: u8, d: Rm, s: u8) {
        match bytes {
            1 => self.byte(&[0x88], s, d),
            2 => {
                self.bytes.push(0x66);
                self.general(false, &[0x89], s, d, 0);
            }
            _ => self.general(bytes == 8, &[0x89], s, d, 0),
        }
    }

    pub(super) fn imm(&mut self, d: u8, x: i64) {
        if x == 0 {
            self.alu(Alu::Xor, false, d, Rm::Reg(d));
        } else if let Ok(x) = u32::try_from(x) {
            if d >= 8 {
                self.bytes.push(0x41);
            }
            self.bytes.push(0xb8 | d & 7);
            self.put(&x.to_le_bytes());
        } else if let Ok(x) = i32::try_from(x) {
            self.store_imm(Rm::Reg(d), x);
        } else {
            self.put(&[0x48 | d >> 3, 0xb8 | d & 7]);
            self.put(&x.to_le_bytes());
        }
    }

    /// All 64 bits of `d` from a signed immediate.
    pub(super) fn store_imm(&mut self, d: Rm, x: i32) {
        self.general(true, &[0xc7], 0, d, 4);
        self.put(&x.to_le_bytes());
    }

    pub(super) fn lea(&mut self, wide: bool, d: u8, m: Rm) {
        self.general(wide, &[0x8d], d, m, 0);
    }

    pub(super) fn alu(&mut self, op: Alu, wide: bool, d: u8, s: Rm) {
        self.general(wide, &[(op as u8) << 3 | 3], d, s, 0);
    }

    pub(super) fn alu_to(&mut self, op: Alu, wide: bool, d: Rm, s: u8) {
        self.general(wide, &[(op as u8) << 3 | 1], s, d, 0);
    }

    pub(super) fn alu_imm(&mut self, op: Alu, wide: bool, d: Rm, x: i32) {
        if let Ok(short) = i8::try_from(x) {
            self.general(wide, &[0x83], op as u8, d, 1);
            self.bytes.push(short as u8);
        } else {
            self.general(wide, &[0x81], op as u8, d, 4);
            self.put(&x.to_le_bytes());
        }
    }

    pub(super) fn test(&mut self, wide: bool, r: u8) {
        self.general(wide, &[0x85], r, Rm::Reg(r), 0);
    }

    pub(super) fn mul(&mut self, wide: bool, d: u8, s: Rm) {
        self.general(wide, &[0x0f, 0xaf], d, s, 0);
    }

    pub(super) fn mul_imm(&mut self, wide: bool, d: u8, s: Rm, x: i32) {
        if let Ok(short) = i8::try_from(x) {
            self.general(wide, &[0x6b], d, s, 1);
            self.bytes.push(short as u8);
        } else {
            self.general(wide, &[0x69], d, s, 4);
            self.put(&x.to_le_bytes());
        }
    }

    pub(super) fn neg(&mut self, wide: bool, d: u8) {
        self.general(wide, &[0xf7], 3, Rm::Reg(d), 0);
    }

    pub(super) fn shift(&mut self, op: Shift, wide: bool, d: u8, n: u8) {
        self.general(wide, &[0xc1], op as u8, Rm::Reg(d), 1);
        self.bytes.push(n);
    }

    pub(super) fn cmov(&mut self, flag: Flag, wide: bool, d: u8, s: Rm) {
        self.general(wide, &[0x0f, 0x40 | flag as u8], d, s, 0);
    }

    /// 0 or 1 in all of `d`.
    pub(super) fn set(&mut self, flag: Flag, d: u8) {
        self.byte(&[0x0f, 0x90 | flag as u8], 0, Rm::Reg(d));
        self.byte(&[0x0f, 0xb6], d, Rm::Reg(d));
    }

    /// From 8 or 16 bits of memory to 32.
    pub(super) fn extend(&mut self, signed: bool, bytes: u8, d: u8, s: Rm) {
        let op = 0xb6 | (signed as u8) << 3 | (bytes == 2) as u8;
        self.general(false, &[0x0f, op], d, s, 0);
    }

    pub(super) fn sign_extend(&mut self, d: u8, s: Rm) {
        self.general(true, &[0x63], d, s, 0);
    }

    pub(super) fn popcnt(&mut self, d: u8, s: Rm) {
        self.bytes.push(0xf3);
        self.general(false, &[0x0f, 0xb8], d, s, 0);
    }

    /// `rdx:rax` from `rax`, then its signed quotient and remainder.
    pub(super) fn divide(&mut self, by: Rm) {
        self.put(&[0x48, 0x99]);
        self.general(true, &[0xf7], 7, by, 0);
    }

    pub(super) fn prefetch(&mut self, m: Rm) {
        self.general(false, &[0x0f, 0x18], 1, m, 0);
    }

    pub(super) fn push(&mut self, r: u8) {
        if r >= 8 {
            self.bytes.push(0x41);
        }
        self.bytes.push(0x50 | r & 7);
    }

    pub(super) fn pop(&mut self, r: u8) {
        if r >= 8 {
            self.bytes.push(0x41);
        }
        self.bytes.push(0x58 | r & 7);
    }

    pub(super) fn vzeroupper(&mut self) {
        self.put(&[0xc5, 0xf8, 0x77]);
    }

    pub(super) fn ret(&mut self) {
        self.bytes.push(0xc3);
    }

    pub(super) fn align(&mut self, to: usize) {
        let mut missing = self.bytes.len().next_multiple_of(to) - self.bytes.len();
        while missing > 0 {
            let nop = NOPS[missing.min(NOPS.len()) - 1];
            self.put(nop);
            missing -= nop.len();
        }
    }

    pub(super) fn jump_back(&mut self, flag: Flag, to: usize) {
        let near = to as i64 - (self.bytes.len() as i64 + 2);
        if let Ok(near) = i8::try_from(near) {
            self.put(&[0x70 | flag as u8, near as u8]);
        } else {
            self.put(&[0x0f, 0x80 | flag as u8]);
            self.put(&((near - 4) as i32).to_le_bytes());
        }
    }

    /// `None` jumps always.
    pub(super) fn jump(&mut self, flag: Option<Flag>) -> Pending {
        match flag {
            Some(flag) => self.put(&[0x0f, 0x80 | flag as u8]),
            None => self.bytes.push(0xe9),
        }
        self.put(&[0; 4]);
        Pending(self.bytes.len())
    }

    /// The goal of a jump is here.
    pub(super) fn land(&mut self, jump: Pending) {
        let far = (self.bytes.len() - jump.0) as i32;
        self.bytes[jump.0 - 4..jump.0].copy_from_slice(&far.to_le_bytes());
    }

    /// The code followed by the first `stride` bytes of every constant, at a multiple of 64.
    pub(super) fn finish(mut self, pool: &[[u8; 64]], stride: usize) -> Vec<u8> {
        if self.fixes.is_empty() {
            return self.bytes;
        }
        let start = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(start, 0xcc);
        for fix in &self.fixes {
            let to = (start + fix.entry as usize * stride) as i64 + i64::from(fix.disp) - fix.end as i64;
            self.bytes[fix.at..fix.at + 4].copy_from_slice(&(to as i32).to_le_bytes());
        }
        for constant in pool {
            self.bytes.extend_from_slice(&constant[..stride]);
        }
        self.bytes
    }
}
