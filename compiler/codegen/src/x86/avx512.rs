//! Vector instructions with EVEX prefixes: AVX-512 F, VL, BW, DQ and VNNI.
//!
//! Reaches registers 0 to 31 at 128, 256 and 512 bits. Mask register 1 is scratch within one operation.

use super::asm::{Asm, Rm};
use super::avx2::{Inst, P66, PF3, Unit, inst};

/// The mask register that single operations may use.
pub(super) const K1: u8 = 1;

/// The sign bits of the lanes to a mask register, and back to all bits of the lanes; `W` for lanes of 64 bits.
pub(super) const SIGNS: Inst = inst(2, PF3, 0x39);
pub(super) const SPREAD: Inst = inst(2, PF3, 0x38);

/// Lanes of 32 bits by mask: set takes `rm`, clear takes `v`.
pub(super) const SELECT: Inst = inst(2, P66, 0x64);

/// The low byte, or the low two, of every 32-bit lane.
pub(super) const NARROW8: Inst = inst(2, PF3, 0x31).unit(Unit::Quarter);
pub(super) const NARROW16: Inst = inst(2, PF3, 0x33).unit(Unit::Half);

/// One instruction; `l` is 0, 1, 2 for 128, 256, 512 bits, `mask` 0 for none, an unused `v` is 0.
#[expect(clippy::too_many_arguments, reason = "the fields of the encoding")]
pub(super) fn put(asm: &mut Asm, inst: Inst, l: u8, reg: u8, v: u8, rm: Rm, imm: Option<u8>, mask: u8) {
    let (mut x, b) = rm.high();
    if let Rm::Reg(r) = rm {
        x = r >> 4;
    }
    let r = !(reg >> 3) & 1;
    let r4 = !(reg >> 4) & 1;
    let v4 = !(v >> 4) & 1;
    asm.put(&[
        0x62,
        r << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | r4 << 4 | inst.map,
        (inst.wide.1 as u8) << 7 | (!v & 15) << 3 | 4 | inst.prefix,
        l << 5 | v4 << 3 | mask,
        inst.op,
    ]);
    let unit = match inst.unit {
        Unit::Full => 16 << l,
        Unit::Half => 8 << l,
        Unit::Quarter => 4 << l,
        Unit::Bytes(n) => i32::from(n),
    };
    asm.operand(reg, rm, unit, imm.is_some() as usize);
    if let Some(imm) = imm {
        asm.bytes.push(imm);
    }
}
