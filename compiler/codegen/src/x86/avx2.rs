//! Vector instructions with VEX prefixes: AVX2, FMA, BMI2 and AVX-VNNI.
//!
//! Reaches registers 0 to 15 at 128 and 256 bits.

use super::asm::{Asm, Rm};

/// How many bytes of memory one instruction reads: the unit of displacements of one byte with EVEX prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Full,
    Half,
    Quarter,
    Bytes(u8),
}

/// An instruction in both encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inst {
    pub(super) map: u8,
    pub(super) prefix: u8,
    pub(super) op: u8,
    /// The `W` bits with VEX and EVEX prefixes.
    pub(super) wide: (bool, bool),
    pub(super) unit: Unit,
}

/// The implied prefix.
pub(super) const NP: u8 = 0;
pub(super) const P66: u8 = 1;
pub(super) const PF3: u8 = 2;
pub(super) const PF2: u8 = 3;

/// An instruction of map 1 (`0f`), 2 (`0f38`) or 3 (`0f3a`) on full vectors.
pub(super) const fn inst(map: u8, prefix: u8, op: u8) -> Inst {
    Inst { map, prefix, op, wide: (false, false), unit: Unit::Full }
}

impl Inst {
    /// `W` is set with EVEX prefixes if `yes`.
    pub(super) const fn wide(self, yes: bool) -> Inst {
        Inst { wide: (false, yes), ..self }
    }

    /// `W` is set with both prefixes if `yes`.
    pub(super) const fn both(self, yes: bool) -> Inst {
        Inst { wide: (yes, yes), ..self }
    }

    pub(super) const fn unit(self, unit: Unit) -> Inst {
        Inst { unit, ..self }
    }

    pub(super) const fn bytes(self, n: u8) -> Inst {
        self.unit(Unit::Bytes(n))
    }
}

/// One instruction; `l` is 0 for 128 bits and 1 for 256, an unused `v` is 0.
pub(super) fn put(asm: &mut Asm, inst: Inst, l: u8, reg: u8, v: u8, rm: Rm, imm: Option<u8>) {
    let (x, b) = rm.high();
    let wide = inst.wide.0 as u8;
    let last = (!v & 15) << 3 | l << 2 | inst.prefix;
    let r = !(reg >> 3) & 1;
    if inst.map == 1 && x | b | wide == 0 {
        asm.put(&[0xc5, r << 7 | last, inst.op]);
    } else {
        asm.put(&[0xc4, r << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | inst.map, wide << 7 | last, inst.op]);
    }
    asm.operand(reg, rm, 1, imm.is_some() as usize);
    if let Some(imm) = imm {
        asm.bytes.push(imm);
    }
}
