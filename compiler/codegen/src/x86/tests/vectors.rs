//! Moves, comparisons, dot products and narrow memory at every width, and what all tests of vectors share.

use super::super::flat::{FloatCond, Mem, Narrow, Op, Reg, ShiftOp, Size, VecArg, Width};
use super::{Build, Numbers, has_z, targets};
use crate::Target;

type Bytes = [u8; 64];

/// The lanes of a result: how to compare them.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Bits,
    F32,
    F64,
}

macro_rules! lanes {
    ($name:ident, $ty:ty, $n:expr) => {
        pub(super) fn $name(bytes: &[u8]) -> Vec<$ty> {
            bytes.chunks_exact($n).map(|c| <$ty>::from_le_bytes(c.try_into().unwrap())).collect()
        }
    };
}

lanes!(f32s, f32, 4);
lanes!(f64s, f64, 8);
lanes!(i32s, i32, 4);
lanes!(i64s, i64, 8);
lanes!(i16s, i16, 2);

pub(super) fn size(w: Width) -> usize {
    match w {
        Width::S => 4,
        Width::D => 8,
        Width::X => 16,
        Width::Y => 32,
        Width::Z => 64,
    }
}

pub(super) fn widths(target: &Target) -> Vec<Width> {
    let mut out = vec![Width::S, Width::D, Width::X, Width::Y];
    if has_z(target) {
        out.push(Width::Z);
    }
    out
}

pub(super) fn floats(numbers: &mut Numbers) -> Bytes {
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

pub(super) fn doubles(numbers: &mut Numbers) -> Bytes {
    let narrow = floats(numbers);
    let mut out = [0; 64];
    for (lane, x) in out.chunks_exact_mut(8).zip(f32s(&narrow)) {
        let x = f64::from(x) + if numbers.below(2) == 0 { 0.0 } else { 1e-9 };
        lane.copy_from_slice(&x.to_le_bytes());
    }
    out
}

pub(super) fn bits(numbers: &mut Numbers) -> Bytes {
    let mut out = [0; 64];
    for lane in out.chunks_exact_mut(8) {
        let x = numbers.next() >> (numbers.below(2) * 40);
        lane.copy_from_slice(&x.to_le_bytes());
    }
    out
}

pub(super) fn join<T: Copy, const N: usize>(lanes: impl IntoIterator<Item = T>, f: impl Fn(T) -> [u8; N]) -> Vec<u8> {
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
pub(super) fn one(
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
    b.limit = size(w);
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

#[test]
fn shifts_picks_and_moves_of_lanes() {
    let mut numbers = Numbers(13);
    for target in targets() {
        for w in widths(&target) {
            let inputs = [0; 3].map(|_| bits(&mut numbers));
            let n = size(w);
            let a = &inputs[0][..n];
            for count in [0u8, 1, 7, 15] {
                let shift = |op: ShiftOp, expected: Vec<u8>| {
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
                shift(ShiftOp::ShrI64, join(i64s(a), |x| (x as u64 >> count).to_le_bytes()));
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
