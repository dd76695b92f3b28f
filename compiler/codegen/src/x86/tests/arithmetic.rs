//! Arithmetic of vectors at every width, with the operand in a register and in memory.

use super::super::flat::{Op, Size, VecArg, VecOp, VecUn, Width};
use super::vectors::{Kind, bits, doubles, f32s, f64s, floats, i16s, i32s, i64s, join, one, size, widths};
use super::{Numbers, targets};

fn binary(op: VecOp, a: &[u8], b: &[u8]) -> Option<(Vec<u8>, Kind)> {
    use VecOp::*;
    let f32 = |f: &dyn Fn(f32, f32) -> f32| {
        Some((join(f32s(a).into_iter().zip(f32s(b)), |(x, y)| f(x, y).to_le_bytes()), Kind::F32))
    };
    let f64 = |f: &dyn Fn(f64, f64) -> f64| {
        (a.len() >= 8).then(|| (join(f64s(a).into_iter().zip(f64s(b)), |(x, y)| f(x, y).to_le_bytes()), Kind::F64))
    };
    let i32 = |f: &dyn Fn(i32, i32) -> i32| {
        Some((join(i32s(a).into_iter().zip(i32s(b)), |(x, y)| f(x, y).to_le_bytes()), Kind::Bits))
    };
    let i64 = |f: &dyn Fn(i64, i64) -> i64| {
        (a.len() >= 8).then(|| (join(i64s(a).into_iter().zip(i64s(b)), |(x, y)| f(x, y).to_le_bytes()), Kind::Bits))
    };
    let whole = a.len() >= 16;
    match op {
        AddF32 => f32(&|x, y| x + y),
        SubF32 => f32(&|x, y| x - y),
        MulF32 => f32(&|x, y| x * y),
        DivF32 => f32(&|x, y| x / y),
        MinF32 => f32(&|x, y| if x < y { x } else { y }),
        MaxF32 => f32(&|x, y| if x > y { x } else { y }),
        AddF64 => f64(&|x, y| x + y),
        SubF64 => f64(&|x, y| x - y),
        MulF64 => f64(&|x, y| x * y),
        DivF64 => f64(&|x, y| x / y),
        MinF64 => f64(&|x, y| if x < y { x } else { y }),
        MaxF64 => f64(&|x, y| if x > y { x } else { y }),
        And => i32(&|x, y| x & y),
        Or => i32(&|x, y| x | y),
        Xor => i32(&|x, y| x ^ y),
        AddI16 => {
            let sums = i16s(a).into_iter().zip(i16s(b));
            Some((join(sums, |(x, y)| x.wrapping_add(y).to_le_bytes()), Kind::Bits))
        }
        AddI32 => i32(&|x, y| x.wrapping_add(y)),
        SubI32 => i32(&|x, y| x.wrapping_sub(y)),
        MulI32 => i32(&|x, y| x.wrapping_mul(y)),
        MinI32 => i32(&|x, y| x.min(y)),
        MaxI32 => i32(&|x, y| x.max(y)),
        EqI32 => i32(&|x, y| -i32::from(x == y)),
        GtI32 => i32(&|x, y| -i32::from(x > y)),
        ShlI32 => i32(&|x, y| if y as u32 > 31 { 0 } else { x << y }),
        ShrI32 => i32(&|x, y| if y as u32 > 31 { 0 } else { (x as u32 >> y) as i32 }),
        SarI32 => i32(&|x, y| x >> (y as u32).min(31)),
        MulEvenU32 => i64(&|x, y| (u64::from(x as u32) * u64::from(y as u32)) as i64),
        MulAddU8I8 => {
            let pairs = a.chunks_exact(2).zip(b.chunks_exact(2));
            let sum = |(x, y): (&[u8], &[u8])| {
                let sum: i32 = (0..2).map(|n| i32::from(x[n]) * i32::from(y[n] as i8)).sum();
                (sum.clamp(-32768, 32767) as i16).to_le_bytes()
            };
            Some((pairs.flat_map(sum).collect(), Kind::Bits))
        }
        MulAddI16 => i32(&|x, y| {
            let part = |x: i32, y: i32| i32::from(x as i16) * i32::from(y as i16);
            part(x, y).wrapping_add(part(x >> 16, y >> 16))
        }),
        ShuffleBytes => whole.then(|| {
            let one = |n: usize| if b[n] & 0x80 != 0 { 0 } else { a[n / 16 * 16 + usize::from(b[n] & 15)] };
            ((0..a.len()).map(one).collect(), Kind::Bits)
        }),
        EvenI32 => whole.then(|| {
            let (a, b) = (i32s(a), i32s(b));
            let one = |n: usize| match n % 4 {
                k @ (0 | 1) => a[n / 4 * 4 + 2 * k],
                k => b[n / 4 * 4 + 2 * (k - 2)],
            };
            (join((0..a.len()).map(one), i32::to_le_bytes), Kind::Bits)
        }),
    }
}

const BINARY: [VecOp; 31] = {
    use VecOp::*;
    [
        AddF32,
        SubF32,
        MulF32,
        DivF32,
        MinF32,
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
        MulEvenU32,
        EqI32,
        GtI32,
        MulAddU8I8,
        MulAddI16,
        ShlI32,
        ShrI32,
        SarI32,
        ShuffleBytes,
        EvenI32,
    ]
};

#[test]
fn binary_operations() {
    let mut numbers = Numbers(7);
    for target in targets() {
        for op in BINARY {
            for w in widths(&target) {
                let mut inputs = [0; 3].map(|_| match format!("{op:?}") {
                    name if name.ends_with("F32") => floats(&mut numbers),
                    name if name.ends_with("F64") => doubles(&mut numbers),
                    _ => bits(&mut numbers),
                });
                let half = inputs[0];
                inputs[1][..8].copy_from_slice(&half[..8]);
                if let VecOp::ShlI32 | VecOp::ShrI32 | VecOp::SarI32 = op {
                    inputs[1].iter_mut().enumerate().for_each(|(n, x)| *x = if n % 4 == 0 { *x % 40 } else { 0 });
                }
                let n = size(w);
                let Some((expected, kind)) = binary(op, &inputs[0][..n], &inputs[1][..n]) else { continue };
                one(&target, w, &inputs, kind, &expected, &|d, [a, b, _], _| Op::Vec {
                    op,
                    w,
                    d,
                    a,
                    b: VecArg::Reg(b),
                });
                one(&target, w, &inputs, kind, &expected, &|d, [a, ..], [_, b, _]| Op::Vec {
                    op,
                    w,
                    d,
                    a,
                    b: VecArg::Mem(b),
                });
            }
        }
    }
}

fn round_even(x: f64) -> f64 {
    x.round_ties_even()
}

/// Result, its kind, and whether the operation is defined at the width.
fn unary(op: VecUn, w: Width, s: &[u8]) -> Option<(Vec<u8>, Kind)> {
    use VecUn::*;
    let n = size(w);
    let f32 = |f: &dyn Fn(f32) -> f32| Some((join(f32s(&s[..n]), |x| f(x).to_le_bytes()), Kind::F32));
    let f64 = |f: &dyn Fn(f64) -> f64| (n >= 8).then(|| (join(f64s(&s[..n]), |x| f(x).to_le_bytes()), Kind::F64));
    let to_int = |x: f64| {
        let t = x.trunc();
        if (-2_147_483_648.0..2_147_483_648.0).contains(&t) { t as i32 } else { i32::MIN }
    };
    match op {
        SqrtF32 => f32(&f32::sqrt),
        SqrtF64 => f64(&f64::sqrt),
        FloorF32 => f32(&f32::floor),
        FloorF64 => f64(&f64::floor),
        NearestF32 => f32(&f32::round_ties_even),
        NearestF64 => f64(&round_even),
        F32FromI32 => Some((join(i32s(&s[..n]), |x| (x as f32).to_le_bytes()), Kind::F32)),
        I32FromF32 => Some((join(f32s(&s[..n]), |x| to_int(f64::from(x)).to_le_bytes()), Kind::Bits)),
        F64FromF32 => (n >= 8).then(|| (join(f32s(&s[..n / 2]), |x| f64::from(x).to_le_bytes()), Kind::F64)),
        F32FromF64 => (n >= 8).then(|| (join(f64s(&s[..n]), |x| (x as f32).to_le_bytes()), Kind::F32)),
        F64FromI32 => (n >= 8).then(|| (join(i32s(&s[..n / 2]), |x| f64::from(x).to_le_bytes()), Kind::F64)),
        I32FromF64 => (n >= 8).then(|| (join(f64s(&s[..n]), |x| to_int(x).to_le_bytes()), Kind::Bits)),
        OddToEven => (n >= 8).then(|| {
            let lanes = i32s(&s[..n]);
            (join((0..lanes.len()).map(|k| lanes[k | 1]), i32::to_le_bytes), Kind::Bits)
        }),
    }
}

#[test]
fn unary_operations() {
    use VecUn::*;
    let mut numbers = Numbers(11);
    let ops = [
        SqrtF32, SqrtF64, FloorF32, FloorF64, NearestF32, NearestF64, F32FromI32, I32FromF32, F64FromF32, F32FromF64,
        F64FromI32, I32FromF64, OddToEven,
    ];
    for target in targets() {
        for op in ops {
            for w in widths(&target) {
                let inputs = [0; 3].map(|_| match op {
                    SqrtF32 | FloorF32 | NearestF32 | I32FromF32 | F64FromF32 => floats(&mut numbers),
                    SqrtF64 | FloorF64 | NearestF64 | F32FromF64 | I32FromF64 => doubles(&mut numbers),
                    F32FromI32 | F64FromI32 | OddToEven => bits(&mut numbers),
                });
                let Some((expected, kind)) = unary(op, w, &inputs[0]) else { continue };
                one(&target, w, &inputs, kind, &expected, &|d, [s, ..], _| Op::Un { op, w, d, s: VecArg::Reg(s) });
                one(&target, w, &inputs, kind, &expected, &|d, _, [s, ..]| Op::Un { op, w, d, s: VecArg::Mem(s) });
            }
        }
    }
}

#[test]
fn products_with_addends() {
    let mut numbers = Numbers(17);
    for target in targets() {
        for (w, lane) in widths(&target).into_iter().flat_map(|w| [(w, Size::W32), (w, Size::W64)]) {
            let n = size(w);
            let double = lane == Size::W64;
            if double && n < 8 {
                continue;
            }
            let inputs = [0; 3].map(|_| if double { doubles(&mut numbers) } else { floats(&mut numbers) });
            let (expected, kind) = if double {
                let [a, b, c] = [0, 1, 2].map(|k: usize| f64s(&inputs[k][..n]));
                (join(0..a.len(), |k| a[k].mul_add(b[k], c[k]).to_le_bytes()), Kind::F64)
            } else {
                let [a, b, c] = [0, 1, 2].map(|k: usize| f32s(&inputs[k][..n]));
                (join(0..a.len(), |k| a[k].mul_add(b[k], c[k]).to_le_bytes()), Kind::F32)
            };
            for memory in 0..4 {
                one(&target, w, &inputs, kind, &expected, &|d, regs, mems| {
                    let at = |k: usize| if k == memory { VecArg::Mem(mems[k]) } else { VecArg::Reg(regs[k]) };
                    Op::Fma { w, lane, d, a: at(0), b: at(1), c: at(2) }
                });
            }
        }
    }
}
