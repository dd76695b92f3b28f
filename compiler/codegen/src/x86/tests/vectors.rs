//! Every vector operation at every width, with its operand in a register and in memory.

use super::super::flat::{FloatCond, Mem, Narrow, Op, Reg, ShiftOp, Size, VecArg, VecOp, VecUn, Width};
use super::{Build, Numbers, has_z, targets};
use crate::Target;

type Bytes = [u8; 64];

/// The lanes of a result: how to compare them.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Bits,
    F32,
    F64,
}

macro_rules! lanes {
    ($name:ident, $ty:ty, $n:expr) => {
        fn $name(bytes: &[u8]) -> Vec<$ty> {
            bytes.chunks_exact($n).map(|c| <$ty>::from_le_bytes(c.try_into().unwrap())).collect()
        }
    };
}

lanes!(f32s, f32, 4);
lanes!(f64s, f64, 8);
lanes!(i32s, i32, 4);
lanes!(i64s, i64, 8);
lanes!(i16s, i16, 2);

fn size(w: Width) -> usize {
    match w {
        Width::S => 4,
        Width::D => 8,
        Width::X => 16,
        Width::Y => 32,
        Width::Z => 64,
    }
}

fn widths(target: &Target) -> Vec<Width> {
    let mut out = vec![Width::S, Width::D, Width::X, Width::Y];
    if has_z(target) {
        out.push(Width::Z);
    }
    out
}

fn floats(numbers: &mut Numbers) -> Bytes {
    const ODD: [f32; 12] =
        [0.0, -0.0, 1.5, -2.5, 0.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e9, -3e9, 1e-40, 16_777_217.0];
    let mut out = [0; 64];
    for lane in out.chunks_exact_mut(4) {
        let x = match numbers.below(3) {
            0 => ODD[numbers.below(12)],
            _ => numbers.below(4001) as f32 / 16.0 - 125.0,
        };
        lane.copy_from_slice(&x.to_le_bytes());
    }
    out
}

fn doubles(numbers: &mut Numbers) -> Bytes {
    let narrow = floats(numbers);
    let mut out = [0; 64];
    for (lane, x) in out.chunks_exact_mut(8).zip(f32s(&narrow)) {
        let x = f64::from(x) + if numbers.below(2) == 0 { 0.0 } else { 1e-9 };
        lane.copy_from_slice(&x.to_le_bytes());
    }
    out
}

fn bits(numbers: &mut Numbers) -> Bytes {
    let mut out = [0; 64];
    for lane in out.chunks_exact_mut(8) {
        let x = numbers.next() >> (numbers.below(2) * 40);
        lane.copy_from_slice(&x.to_le_bytes());
    }
    out
}

fn join<T: Copy, const N: usize>(lanes: impl IntoIterator<Item = T>, f: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    lanes.into_iter().flat_map(f).collect()
}

fn check(found: &[u8], expected: &[u8], kind: Kind, what: &str) {
    let same = match kind {
        Kind::Bits => found[..expected.len()] == *expected,
        Kind::F32 => f32s(&found[..expected.len()])
            .iter()
            .zip(f32s(expected))
            .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())),
        Kind::F64 => f64s(&found[..expected.len()])
            .iter()
            .zip(f64s(expected))
            .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())),
    };
    assert!(same, "{what}:\n{:02x?}\n{expected:02x?}", &found[..expected.len()]);
}

/// One operation on three inputs: `op` makes it from the result and the operands, `expected` says what `bytes` of the result hold.
fn one(
    target: &Target,
    w: Width,
    inputs: &[Bytes; 3],
    kind: Kind,
    expected: &[u8],
    op: &dyn Fn(Reg, [Reg; 3], [Mem; 3]) -> Op,
) {
    let mut b = Build::new();
    let mems = [0, 64, 128].map(|at| b.input(at));
    let regs = mems.map(|m| {
        let d = b.vec();
        b.op(Op::VecLoad { w, d, m });
        d
    });
    let d = b.vec();
    let op = op(d, regs, mems);
    b.op(op);
    let whole = if w < Width::X { Width::X } else { w };
    let m = b.output(0);
    b.op(Op::VecStore { w: whole, m, s: d });
    for (n, &r) in regs.iter().enumerate() {
        // The operands outlive the operation unharmed.
        let m = b.output(64 * (n as i32 + 1));
        b.op(Op::VecStore { w, m, s: r });
    }
    b.run(target, &inputs.concat(), [0, 0], &mut |out, how| {
        check(out, expected, kind, &format!("{op:?} {how}"));
        for n in 0..3 {
            check(&out[64 * (n + 1)..], &inputs[n][..size(w)], Kind::Bits, &format!("operand {n} of {op:?} {how}"));
        }
    });
}

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
        AndNot => i32(&|x, y| !x & y),
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
        AddI64 => i64(&|x, y| x.wrapping_add(y)),
        SubI64 => i64(&|x, y| x.wrapping_sub(y)),
        MulEvenU32 => i64(&|x, y| (u64::from(x as u32) * u64::from(y as u32)) as i64),
        EqI64 => i64(&|x, y| -i64::from(x == y)),
        GtI64 => i64(&|x, y| -i64::from(x > y)),
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
        PermuteI32 => (a.len() >= 32).then(|| {
            let (a, b) = (i32s(a), i32s(b));
            let picked: Vec<i32> = a.iter().map(|&x| b[x as usize % b.len()]).collect();
            (join(picked, i32::to_le_bytes), Kind::Bits)
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

const BINARY: [VecOp; 37] = {
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
        AndNot,
        Or,
        Xor,
        AddI16,
        AddI32,
        AddI64,
        SubI32,
        SubI64,
        MulI32,
        MinI32,
        MaxI32,
        MulEvenU32,
        EqI32,
        GtI32,
        EqI64,
        GtI64,
        MulAddU8I8,
        MulAddI16,
        ShlI32,
        ShrI32,
        SarI32,
        ShuffleBytes,
        PermuteI32,
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
        if t >= -2_147_483_648.0 && t < 2_147_483_648.0 { t as i32 } else { i32::MIN }
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
        I64FromI32 => (n >= 8).then(|| (join(i32s(&s[..n / 2]), |x| i64::from(x).to_le_bytes()), Kind::Bits)),
    }
}

#[test]
fn unary_operations() {
    use VecUn::*;
    let mut numbers = Numbers(11);
    let ops = [
        SqrtF32, SqrtF64, FloorF32, FloorF64, NearestF32, NearestF64, F32FromI32, I32FromF32, F64FromF32, F32FromF64,
        F64FromI32, I32FromF64, OddToEven, I64FromI32,
    ];
    for target in targets() {
        for op in ops {
            for w in widths(&target) {
                let inputs = [0; 3].map(|_| match op {
                    SqrtF32 | FloorF32 | NearestF32 | I32FromF32 | F64FromF32 => floats(&mut numbers),
                    SqrtF64 | FloorF64 | NearestF64 | F32FromF64 | I32FromF64 => doubles(&mut numbers),
                    F32FromI32 | F64FromI32 | OddToEven | I64FromI32 => bits(&mut numbers),
                });
                let Some((expected, kind)) = unary(op, w, &inputs[0]) else { continue };
                one(&target, w, &inputs, kind, &expected, &|d, [s, ..], _| Op::Un { op, w, d, s: VecArg::Reg(s) });
                one(&target, w, &inputs, kind, &expected, &|d, _, [s, ..]| Op::Un { op, w, d, s: VecArg::Mem(s) });
            }
        }
    }
}

#[test]
fn shifts_picks_and_moves_of_lanes() {
    let mut numbers = Numbers(13);
    for target in targets() {
        for w in widths(&target) {
            let inputs = [0; 3].map(|_| bits(&mut numbers));
            let n = size(w);
            let a = &inputs[0][..n];
            for count in [0u8, 1, 7, 15] {
                let mut shift = |op: ShiftOp, expected: Vec<u8>| {
                    one(&target, w, &inputs, Kind::Bits, &expected, &|d, [a, ..], _| Op::Shift {
                        op,
                        w,
                        d,
                        a,
                        n: count,
                    });
                };
                shift(ShiftOp::ShlI32, join(i32s(a), |x| (x << count).to_le_bytes()));
                shift(ShiftOp::ShrI32, join(i32s(a), |x| (x as u32 >> count).to_le_bytes()));
                shift(ShiftOp::SarI32, join(i32s(a), |x| (x >> count).to_le_bytes()));
                shift(ShiftOp::ShlI64, join(i64s(a), |x| (x << count).to_le_bytes()));
                shift(ShiftOp::ShrI64, join(i64s(a), |x| (x as u64 >> count).to_le_bytes()));
                shift(ShiftOp::ShrI16, join(i16s(a), |x| (x as u16 >> count).to_le_bytes()));
            }
            for lane in [Size::W32, Size::W64] {
                let k = if lane == Size::W32 { 4 } else { 8 };
                if n < k {
                    continue;
                }
                let expected: Vec<u8> = (0..n).map(|b| a[b % k]).collect();
                one(&target, w, &inputs, Kind::Bits, &expected, &|d, [s, ..], _| Op::Broadcast {
                    w,
                    lane,
                    d,
                    s: VecArg::Reg(s),
                });
                one(&target, w, &inputs, Kind::Bits, &expected, &|d, _, [s, ..]| Op::Broadcast {
                    w,
                    lane,
                    d,
                    s: VecArg::Mem(s),
                });
            }
            one(&target, w, &inputs, Kind::Bits, a, &|d, [s, ..], _| Op::VecMove { d, s });
            one(&target, w, &inputs, Kind::Bits, &vec![0; n], &|d, _, _| Op::VecZero { d });
            if n == 4 {
                continue;
            }
            one(&target, w, &inputs, Kind::Bits, &a[n / 2..], &|d, [s, ..], _| Op::UpperHalf { w, d, s });
            let both = [&a[..n / 2], &inputs[1][..n / 2]].concat();
            one(&target, w, &inputs, Kind::Bits, &both, &|d, [low, high, _], _| Op::Join { w, d, low, high });
            if n == 8 {
                continue;
            }
            let lanes = i32s(a);
            let picked = (0..lanes.len()).map(|k| lanes[k / 4 * 4 + (0b01_11_00_10 >> (2 * (k % 4)) & 3)]);
            let picked = join(picked, i32::to_le_bytes);
            one(&target, w, &inputs, Kind::Bits, &picked, &|d, [s, ..], _| Op::Pick { w, d, s, pick: 0b01_11_00_10 });
            if n == 16 {
                for lane in 0..4u8 {
                    let mut expected = a.to_vec();
                    let at = 4 * usize::from(lane);
                    expected[at..at + 4].copy_from_slice(&inputs[2][..4]);
                    one(&target, w, &inputs, Kind::Bits, &expected, &|d, [a, ..], [_, _, m]| Op::Insert {
                        d,
                        a,
                        m,
                        lane,
                    });
                }
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

#[test]
fn comparisons_and_blends() {
    let mut numbers = Numbers(19);
    for target in targets() {
        for w in widths(&target) {
            let n = size(w);
            for cond in [FloatCond::Eq, FloatCond::Ne, FloatCond::Lt, FloatCond::Le] {
                fn holds<T: PartialOrd>(cond: FloatCond, x: T, y: T) -> bool {
                    match cond {
                        FloatCond::Eq => x == y,
                        FloatCond::Ne => x != y,
                        FloatCond::Lt => x < y,
                        FloatCond::Le => x <= y,
                    }
                }
                for lane in [Size::W32, Size::W64] {
                    let double = lane == Size::W64;
                    if double && n < 8 {
                        continue;
                    }
                    let mut inputs = [0; 3].map(|_| if double { doubles(&mut numbers) } else { floats(&mut numbers) });
                    let half = inputs[0];
                    inputs[1][..n / 2].copy_from_slice(&half[..n / 2]);
                    let [a, b] = [0, 1].map(|k: usize| &inputs[k][..n]);
                    let expected = match double {
                        true => join(f64s(a).into_iter().zip(f64s(b)), |(x, y)| {
                            (-i64::from(holds(cond, x, y))).to_le_bytes()
                        }),
                        false => join(f32s(a).into_iter().zip(f32s(b)), |(x, y)| {
                            (-i32::from(holds(cond, x, y))).to_le_bytes()
                        }),
                    };
                    one(&target, w, &inputs, Kind::Bits, &expected, &|d, [a, b, _], _| Op::Compare {
                        w,
                        lane,
                        cond,
                        d,
                        a,
                        b: VecArg::Reg(b),
                    });
                    one(&target, w, &inputs, Kind::Bits, &expected, &|d, [a, ..], [_, b, _]| Op::Compare {
                        w,
                        lane,
                        cond,
                        d,
                        a,
                        b: VecArg::Mem(b),
                    });
                }
            }
            let inputs = [0; 3].map(|_| bits(&mut numbers));
            let [m, a, b] = [0, 1, 2].map(|k: usize| i32s(&inputs[k][..n]));
            let expected = join(0..m.len(), |k| if m[k] < 0 { a[k] } else { b[k] }.to_le_bytes());
            one(&target, w, &inputs, Kind::Bits, &expected, &|d, [mask, a, b], _| Op::Blend { w, d, mask, a, b });
        }
    }
}

#[test]
fn dot_products_with_every_alias() {
    let mut numbers = Numbers(23);
    for target in targets().into_iter().filter(super::super::has_dot) {
        for w in widths(&target) {
            let n = size(w);
            let inputs = [0; 3].map(|_| bits(&mut numbers));
            let dot = |c: usize, a: usize, b: usize| {
                let sum = |k: usize| {
                    let products = (4 * k..4 * k + 4).map(|k| i32::from(inputs[a][k]) * i32::from(inputs[b][k] as i8));
                    i32s(&inputs[c])[k].wrapping_add(products.sum())
                };
                join(0..n / 4, |k| sum(k).to_le_bytes())
            };
            one(&target, w, &inputs, Kind::Bits, &dot(0, 1, 2), &|d, [c, a, b], _| Op::Dot {
                w,
                d,
                c,
                a,
                b: VecArg::Reg(b),
            });
            one(&target, w, &inputs, Kind::Bits, &dot(0, 1, 2), &|d, [c, a, _], [_, _, b]| Op::Dot {
                w,
                d,
                c,
                a,
                b: VecArg::Mem(b),
            });
            for pattern in 0..81 {
                let [d, c, a, x] = [pattern % 3, pattern / 3 % 3, pattern / 9 % 3, pattern / 27];
                let mut b = Build::new();
                let regs = [0, 64, 128].map(|at| {
                    let (d, m) = (b.vec(), b.input(at));
                    b.op(Op::VecLoad { w, d, m });
                    d
                });
                b.op(Op::Dot { w, d: regs[d], c: regs[c], a: regs[a], b: VecArg::Reg(regs[x]) });
                let m = b.output(0);
                b.op(Op::VecStore { w, m, s: regs[d] });
                b.run(&target, &inputs.concat(), [0, 0], &mut |out, how| {
                    check(out, &dot(c, a, x), Kind::Bits, &format!("alias {pattern} {w:?} {how}"));
                });
            }
        }
    }
}

#[test]
fn narrow_memory() {
    let mut numbers = Numbers(29);
    for target in targets() {
        for w in widths(&target) {
            let lanes = size(w) / 4;
            let inputs = [0; 3].map(|_| bits(&mut numbers));
            for narrow in [Narrow::I8, Narrow::U8, Narrow::I16, Narrow::U16] {
                let from = &inputs[1];
                let expected = join(0..lanes, |k| {
                    let word = [from[2 * k], from[2 * k + 1]];
                    match narrow {
                        Narrow::I8 => i32::from(from[k] as i8),
                        Narrow::U8 => i32::from(from[k]),
                        Narrow::I16 => i32::from(i16::from_le_bytes(word)),
                        Narrow::U16 => i32::from(u16::from_le_bytes(word)),
                    }
                    .to_le_bytes()
                });
                one(&target, w, &inputs, Kind::Bits, &expected, &|d, _, [_, m, _]| Op::Widen { w, d, m, narrow });
            }
            for bytes in [1u8, 2] {
                let mut b = Build::new();
                let (s, t, m, at) = (b.vec(), b.vec(), b.input(0), b.output(3));
                b.op(Op::VecLoad { w, d: s, m });
                b.op(Op::NarrowStore { w, m: at, s, t, bytes });
                let k = usize::from(bytes);
                b.run(&target, &inputs.concat(), [0, 0], &mut |out, how| {
                    let mut expected = vec![0xa5; 3];
                    (0..lanes).for_each(|n| expected.extend_from_slice(&inputs[0][4 * n..4 * n + k]));
                    expected.resize(96, 0xa5);
                    check(out, &expected, Kind::Bits, &format!("{bytes} of {w:?} {how}"));
                });
            }
        }
    }
}
