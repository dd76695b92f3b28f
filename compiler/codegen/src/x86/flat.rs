//! Flat operations over virtual registers: what kernel builders write and backends encode.
//!
//! A function is a tree of operations, loops and branches. A register may be assigned more than once; it is never read before it was
//! assigned on every path. Builders say how wide a value is, never which instruction set encodes it.

mod access;

use std::collections::HashMap;

pub(super) use access::Access;

/// A virtual register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Reg(pub(super) u32);

/// The two register files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Class {
    Int,
    Vec,
}

/// How much of an integer register takes part. Results of `W32` operations have zero upper halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Size {
    W32,
    W64,
}

/// How much of a vector register takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Width {
    /// One lane of 32 bits; what the others hold is undefined. Bitwise and integer operations may work on 128 bits.
    S,
    /// One lane of 64 bits, as `S`.
    D,
    /// 128 bits.
    X,
    /// 256 bits.
    Y,
    /// 512 bits.
    Z,
}

/// Where an address starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Base {
    Reg(Reg),
    /// The function's own memory, aligned to 64.
    Frame,
    /// An entry of the constant pool.
    Pool(u32),
}

/// `base + index * scale + disp`. Only a `Reg` base takes an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Mem {
    pub(super) base: Base,
    pub(super) index: Option<(Reg, u8)>,
    pub(super) disp: i32,
}

impl Mem {
    /// So many bytes further.
    pub(super) fn plus(self, bytes: i32) -> Mem {
        Mem { disp: self.disp + bytes, ..self }
    }

    /// A place in the frame.
    pub(super) fn frame(at: i32) -> Mem {
        Mem { base: Base::Frame, index: None, disp: at }
    }
}

/// The second operand of an integer operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum IntArg {
    Reg(Reg),
    Imm(i32),
}

/// An operand of a vector operation. `Mem` is read at the width of the operation (`S`: 4 bytes, `D`: 8) and may be unaligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum VecArg {
    Reg(Reg),
    Mem(Mem),
}

/// Integer operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum IntOp {
    Add,
    Sub,
    Mul,
    And,
    Or,
    Xor,
    /// The signed minimum.
    Min,
    /// The signed maximum.
    Max,
    /// Shifts take the count modulo the size.
    Shl,
    Shr,
    Sar,
}

/// Signed comparisons of integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cond {
    Eq,
    Ne,
    Lt,
    Le,
}

/// What a narrow load widens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Narrow {
    I8,
    U8,
    I16,
    U16,
}

/// Element-wise operations of two vectors; `F32`, `F64`, `I32` ... name the lanes, plain names are bitwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum VecOp {
    AddF32,
    SubF32,
    MulF32,
    DivF32,
    /// `a < b ? a : b`.
    MinF32,
    /// `a > b ? a : b`.
    MaxF32,
    AddF64,
    SubF64,
    MulF64,
    DivF64,
    MinF64,
    MaxF64,
    And,
    Or,
    Xor,
    AddI16,
    AddI32,
    SubI32,
    MulI32,
    MinI32,
    MaxI32,
    /// The products of the even unsigned 32-bit lanes, 64 bits each.
    MulEvenU32,
    EqI32,
    GtI32,
    /// Sums of two neighbouring products of unsigned bytes of `a` and signed bytes of `b`, 16 bits, saturating.
    MulAddU8I8,
    /// Sums of two neighbouring products of 16 bits, 32 bits.
    MulAddI16,
    /// Shifts of every 32-bit lane by the count in the lane of `b`; 32 and more shift everything out.
    ShlI32,
    ShrI32,
    SarI32,
    /// Bytes of `a` chosen by `b` within each 128 bits.
    ShuffleBytes,
    /// The even 32-bit lanes of `a`, then of `b`, within each 128 bits.
    EvenI32,
}

/// Element-wise operations of one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum VecUn {
    SqrtF32,
    SqrtF64,
    FloorF32,
    FloorF64,
    /// Ties to even.
    NearestF32,
    NearestF64,
    /// `I32` to `F32`, to nearest.
    F32FromI32,
    /// `F32` to `I32` towards zero; `i32::MIN` when out of range.
    I32FromF32,
    /// The lower half of the lanes at the width of the result.
    F64FromF32,
    /// The width is that of the operand; the result has half of it (`D` gives `S`).
    F32FromF64,
    /// The lower lanes at the width of the result.
    F64FromI32,
    /// `F64` to `I32` towards zero, `i32::MIN` when out of range. The width is that of the operand.
    I32FromF64,
    /// 32-bit lane `[1]` for every pair of lanes: the odd lanes moved to the even ones.
    OddToEven,
}

/// Shifts by a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ShiftOp {
    ShlI32,
    ShrI32,
    SarI32,
    ShrI64,
}

/// Ordered float comparisons, except that `Ne` is true for NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FloatCond {
    Eq,
    Ne,
    Lt,
    Le,
}

/// One operation. `d` is assigned, the others are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    Imm {
        d: Reg,
        x: i64,
    },
    IntMove {
        d: Reg,
        s: Reg,
    },
    Int {
        op: IntOp,
        size: Size,
        d: Reg,
        a: Reg,
        b: IntArg,
    },
    /// Set bits of the low 32.
    Popcnt {
        d: Reg,
        s: Reg,
    },
    Lea {
        d: Reg,
        m: Mem,
    },
    /// The low 32 bits, sign- or zero-extended to 64.
    Extend {
        d: Reg,
        s: Reg,
        signed: bool,
    },
    /// `None`: `size` bytes as they are; narrow values are widened to 32 bits.
    IntLoad {
        d: Reg,
        m: Mem,
        size: Size,
        narrow: Option<Narrow>,
    },
    /// The low `bytes` (1, 2, 4, 8).
    IntStore {
        m: Mem,
        s: Reg,
        bytes: u8,
    },
    /// 0 or 1.
    SetCond {
        d: Reg,
        cond: Cond,
        size: Size,
        a: Reg,
        b: IntArg,
    },
    /// `c != 0 ? a : b`; the low 32 bits of `c` count.
    Choose {
        d: Reg,
        c: Reg,
        a: Reg,
        b: Reg,
    },
    /// `I64` quotient or remainder, towards zero.
    Divide {
        d: Reg,
        a: Reg,
        b: Reg,
        remainder: bool,
    },
    /// Low bits of an integer register to lane 0, zero elsewhere.
    VecFromInt {
        size: Size,
        d: Reg,
        s: Reg,
    },
    /// Lane 0 to an integer register.
    IntFromVec {
        size: Size,
        d: Reg,
        s: Reg,
    },
    /// One signed `I64` to a float of width `S` or `D`.
    FloatFromI64 {
        w: Width,
        d: Reg,
        s: Reg,
    },
    /// One float of width `S` or `D` to `I64` towards zero, `i64::MIN` when out of range.
    I64FromFloat {
        w: Width,
        d: Reg,
        s: Reg,
    },
    VecMove {
        d: Reg,
        s: Reg,
    },
    VecZero {
        d: Reg,
    },
    /// At width `S` and `D` the upper lanes become zero.
    VecLoad {
        w: Width,
        d: Reg,
        m: Mem,
    },
    VecStore {
        w: Width,
        m: Mem,
        s: Reg,
    },
    /// Lane 0 of `s`, of the given size, to all lanes. `Mem` reads one lane.
    Broadcast {
        w: Width,
        lane: Size,
        d: Reg,
        s: VecArg,
    },
    /// Narrow neighbours, widened to 32-bit lanes.
    Widen {
        w: Width,
        d: Reg,
        m: Mem,
        narrow: Narrow,
    },
    /// The low `bytes` (1 or 2) of every 32-bit lane, next to each other. `t` is scratch.
    NarrowStore {
        w: Width,
        m: Mem,
        s: Reg,
        t: Reg,
        bytes: u8,
    },
    Vec {
        op: VecOp,
        w: Width,
        d: Reg,
        a: Reg,
        b: VecArg,
    },
    Un {
        op: VecUn,
        w: Width,
        d: Reg,
        s: VecArg,
    },
    Shift {
        op: ShiftOp,
        w: Width,
        d: Reg,
        a: Reg,
        n: u8,
    },
    /// `a * b + c` with one rounding; at most one operand is `Mem`.
    Fma {
        w: Width,
        lane: Size,
        d: Reg,
        a: VecArg,
        b: VecArg,
        c: VecArg,
    },
    /// `c +` sums of four products of unsigned bytes of `a` and signed bytes of `b`, by 32-bit lanes. Only for targets that have it.
    Dot {
        w: Width,
        d: Reg,
        c: Reg,
        a: Reg,
        b: VecArg,
    },
    /// All ones where the comparison holds.
    Compare {
        w: Width,
        lane: Size,
        cond: FloatCond,
        d: Reg,
        a: Reg,
        b: VecArg,
    },
    /// By the sign bit of every 32-bit lane of `mask`: set takes `a`, clear takes `b`.
    Blend {
        w: Width,
        d: Reg,
        mask: Reg,
        a: Reg,
        b: Reg,
    },
    /// The upper half: `w` is the width of `s`, the result has half of it.
    UpperHalf {
        w: Width,
        d: Reg,
        s: Reg,
    },
    /// `w` is the width of the result; the halves are half as wide.
    Join {
        w: Width,
        d: Reg,
        low: Reg,
        high: Reg,
    },
    /// 32-bit lane `i` of each 128 bits is lane `pick >> 2 i & 3` of the same 128 bits.
    Pick {
        w: Width,
        d: Reg,
        s: Reg,
        pick: u8,
    },
    /// 128-bit `a` with 32-bit lane `lane` from memory.
    Insert {
        d: Reg,
        a: Reg,
        m: Mem,
        lane: u8,
    },
    /// 128-bit `a` with 32-bit lane `lane` from an integer register.
    InsertInt {
        d: Reg,
        a: Reg,
        s: Reg,
        lane: u8,
    },
    /// Bring a cache line near.
    Prefetch {
        m: Mem,
    },
}

/// A loop: `body`, then `counter += step`, again while `counter < end` (signed). With `guard` the condition is tested first too.
#[derive(Clone, Debug)]
pub(super) struct Loop {
    pub(super) counter: Reg,
    pub(super) step: i32,
    pub(super) end: IntArg,
    pub(super) guard: bool,
    pub(super) body: Vec<Node>,
}

/// A branch on a comparison of integers.
#[derive(Clone, Debug)]
pub(super) struct Branch {
    pub(super) cond: Cond,
    pub(super) size: Size,
    pub(super) a: Reg,
    pub(super) b: IntArg,
    pub(super) then: Vec<Node>,
    pub(super) other: Vec<Node>,
}

/// A statement of a function.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Op(Op),
    Loop(Box<Loop>),
    Branch(Box<Branch>),
}

/// A function: four integer arguments in `args`, no result.
#[derive(Debug, Default)]
pub(super) struct Function {
    pub(super) classes: Vec<Class>,
    pub(super) args: Vec<Reg>,
    pub(super) body: Vec<Node>,
    /// Constants of 64 bytes each.
    pub(super) pool: Vec<[u8; 64]>,
    pooled: HashMap<[u8; 64], u32>,
    /// Bytes of memory of its own.
    pub(super) frame: i32,
}

impl Function {
    pub(super) fn reg(&mut self, class: Class) -> Reg {
        self.classes.push(class);
        Reg(self.classes.len() as u32 - 1)
    }

    /// A constant in memory.
    pub(super) fn constant(&mut self, bytes: [u8; 64]) -> Mem {
        let next = self.pool.len() as u32;
        let at = *self.pooled.entry(bytes).or_insert(next);
        if at == next {
            self.pool.push(bytes);
        }
        Mem { base: Base::Pool(at), index: None, disp: 0 }
    }

    /// Room in the frame, at a multiple of 64.
    pub(super) fn room(&mut self, bytes: i32) -> i32 {
        let at = self.frame;
        self.frame += (bytes + 63) / 64 * 64;
        at
    }
}
