//! Control flow, integer operations at their edges, the frame, the pool and the shape of the code.

use iced_x86::{Decoder, DecoderOptions, EncodingKind, OpKind, Register};

use super::super::encode::emit;
use super::super::flat::{Base, Class, Function, IntArg};
use super::super::flat::{Branch, Cond, IntOp, Loop, Mem, Narrow, Node, Op, Reg, ShiftOp, Size, VecArg, VecOp, Width};
use super::{Build, Numbers, choices, code, imm, targets};
use crate::Target;

fn word(out: &[u8], n: usize) -> i64 {
    i64::from_le_bytes(out[8 * n..8 * n + 8].try_into().unwrap())
}

fn run_loop(counter: Reg, step: i32, end: IntArg, guard: bool, body: Vec<Node>) -> Node {
    Node::Loop(Box::new(Loop { counter, step, end, guard, body }))
}

#[test]
fn guarded_loops_may_run_not_at_all() {
    for target in targets() {
        for (from, to, guard, expected) in
            [(0, 0, true, 0), (5, 2, true, 0), (0, 7, true, 3), (0, 0, false, 1), (0, 6, false, 2), (-4, 3, true, 3)]
        {
            let mut b = Build::new();
            let (count, total) = (b.int(), b.int());
            let [.., start, end] = b.f.args[..] else { unreachable!() };
            b.op(Op::IntMove { d: count, s: start });
            b.op(Op::Imm { d: total, x: 0 });
            let more = Op::Int { op: IntOp::Add, size: Size::W64, d: total, a: total, b: imm(1) };
            b.nodes.push(run_loop(count, 3, IntArg::Reg(end), guard, vec![Node::Op(more)]));
            let (m, n) = (b.output(0), b.output(8));
            b.op(Op::IntStore { m, s: total, bytes: 8 });
            b.op(Op::IntStore { m: n, s: count, bytes: 8 });
            b.run(&target, &[0; 64], [from, to], &mut |out, how| {
                assert_eq!(word(out, 0), expected, "{from} {to} {guard} {how}");
                assert_eq!(word(out, 1), from + 3 * expected, "{from} {to} {guard} {how}");
            });
        }
    }
}

/// Far more values than registers, all alive throughout two nested loops.
#[test]
fn pressure_in_nested_loops() {
    for target in targets() {
        let mut b = Build::new();
        let ints: Vec<Reg> = (0..40).map(|_| b.int()).collect();
        let vecs: Vec<Reg> = (0..60).map(|_| b.vec()).collect();
        for (n, &d) in ints.iter().enumerate() {
            b.op(Op::Imm { d, x: n as i64 });
        }
        for (n, &d) in vecs.iter().enumerate() {
            let m = b.input(4 * n as i32);
            b.op(Op::VecLoad { w: Width::Y, d, m });
        }
        let (i, j) = (b.int(), b.int());
        let mut body = vec![];
        for n in 0..40 {
            let (d, a) = (ints[n], IntArg::Reg(ints[(n + 7) % 40]));
            body.push(Node::Op(Op::Int { op: IntOp::Add, size: Size::W64, d, a: d, b: a }));
        }
        for n in 0..60 {
            let (d, a) = (vecs[n], VecArg::Reg(vecs[(n + 11) % 60]));
            body.push(Node::Op(Op::Vec { op: VecOp::AddI32, w: Width::Y, d, a: d, b: a }));
        }
        let inner = run_loop(j, 1, imm(3), false, body);
        let outer = vec![Node::Op(Op::Imm { d: j, x: 0 }), inner];
        b.op(Op::Imm { d: i, x: 0 });
        b.nodes.push(run_loop(i, 1, imm(5), false, outer));
        for (n, &s) in ints.iter().enumerate() {
            let m = b.output(8 * n as i32);
            b.op(Op::IntStore { m, s, bytes: 8 });
        }
        for (n, &s) in vecs.iter().enumerate() {
            let m = b.output(512 + 32 * n as i32);
            b.op(Op::VecStore { w: Width::Y, m, s });
        }
        let input: Vec<u8> = (0..80i32).flat_map(|n| (n * n).to_le_bytes()).collect();
        let mut x: Vec<i64> = (0..40).collect();
        let mut v: Vec<Vec<i32>> = (0..60).map(|n| (n..n + 8).map(|k| k * k).collect()).collect();
        for _ in 0..15 {
            (0..40).for_each(|n| x[n] = x[n].wrapping_add(x[(n + 7) % 40]));
            for n in 0..60 {
                (0..8).for_each(|k| v[n][k] = v[n][k].wrapping_add(v[(n + 11) % 60][k]));
            }
        }
        b.run(&target, &input, [0, 0], &mut |out, how| {
            (0..40).for_each(|n| assert_eq!(word(out, n), x[n], "{n} {how}"));
            for (n, k) in (0..60).flat_map(|n| (0..8).map(move |k| (n, k))) {
                let at = 512 + 32 * n + 4 * k;
                assert_eq!(i32::from_le_bytes(out[at..at + 4].try_into().unwrap()), v[n][k], "{n} {k} {how}");
            }
        });
    }
}

#[test]
fn branches_merge() {
    for target in targets() {
        for (x, y) in [(3, 4), (4, 4), (5, 4), (-1, 4), (1 << 32, 4)] {
            let mut b = Build::new();
            let d = b.int();
            let [.., p, q] = b.f.args[..] else { unreachable!() };
            let set = |x| vec![Node::Op(Op::Imm { d, x })];
            let inner = Branch { cond: Cond::Eq, size: Size::W32, a: p, b: imm(4), then: set(2), other: set(3) };
            let other = vec![Node::Branch(Box::new(inner))];
            let outer = Branch { cond: Cond::Lt, size: Size::W64, a: p, b: IntArg::Reg(q), then: set(1), other };
            b.nodes.push(Node::Branch(Box::new(outer)));
            let only = Branch { cond: Cond::Ne, size: Size::W32, a: p, b: imm(0), then: vec![], other: vec![] };
            b.nodes.push(Node::Branch(Box::new(only)));
            let m = b.output(0);
            b.op(Op::IntStore { m, s: d, bytes: 8 });
            let expected = if x < y {
                1
            } else if x == 4 {
                2
            } else {
                3
            };
            b.run(&target, &[0; 64], [x, y], &mut |out, how| assert_eq!(word(out, 0), expected, "{x} {how}"));
        }
    }
}

#[test]
fn integers_cross_memory_and_vectors() {
    let input: Vec<u8> = (0..64u8).map(|n| n.wrapping_mul(77) ^ 0x80).collect();
    for target in targets() {
        let mut b = Build::new();
        let mut expected = vec![];
        let mut put = |b: &mut Build, s: Reg, x: i64| {
            let m = b.output(8 * expected.len() as i32);
            b.op(Op::IntStore { m, s, bytes: 8 });
            expected.push(x);
        };
        let half = i16::from_le_bytes([input[5], input[6]]);
        for (narrow, x) in [
            (Narrow::I8, i64::from(i32::from(input[5] as i8) as u32)),
            (Narrow::U8, i64::from(input[5])),
            (Narrow::I16, i64::from(i32::from(half) as u32)),
            (Narrow::U16, i64::from(half as u16)),
        ] {
            let (d, m) = (b.int(), b.input(5));
            b.op(Op::IntLoad { d, m, size: Size::W32, narrow: Some(narrow) });
            put(&mut b, d, x);
        }
        let whole = i64::from_le_bytes(input[9..17].try_into().unwrap());
        for (size, x) in [(Size::W32, i64::from(whole as u32)), (Size::W64, whole)] {
            let (d, m, v, back) = (b.int(), b.input(9), b.vec(), b.int());
            b.op(Op::IntLoad { d, m, size, narrow: None });
            b.op(Op::VecFromInt { size, d: v, s: d });
            b.op(Op::IntFromVec { size, d: back, s: v });
            b.op(Op::Prefetch { m });
            put(&mut b, back, x);
            let (v2, back) = (b.vec(), b.int());
            b.op(Op::VecZero { d: v2 });
            b.op(Op::InsertInt { d: v2, a: v2, s: d, lane: 1 });
            b.op(Op::IntFromVec { size: Size::W64, d: back, s: v2 });
            put(&mut b, back, whole << 32);
        }
        for (w, x) in [(Width::S, -16_777_217i64), (Width::D, -16_777_217), (Width::D, i64::MAX), (Width::S, 12)] {
            let (d, v, back) = (b.int(), b.vec(), b.int());
            b.op(Op::Imm { d, x });
            b.op(Op::FloatFromI64 { w, d: v, s: d });
            b.op(Op::I64FromFloat { w, d: back, s: v });
            let expected = match w {
                // Rounded up to a number that is out of range.
                _ if x == i64::MAX => i64::MIN,
                Width::S => x as f32 as i64,
                _ => x,
            };
            put(&mut b, back, expected);
        }
        let index = b.int();
        b.op(Op::Imm { d: index, x: 3 });
        for scale in [1u8, 2, 4, 8] {
            let d = b.int();
            let m = Mem { base: Base::Reg(b.f.args[0]), index: Some((index, scale)), disp: 2 };
            b.op(Op::IntLoad { d, m, size: Size::W32, narrow: Some(Narrow::U8) });
            put(&mut b, d, i64::from(input[2 + 3 * usize::from(scale)]));
        }
        for bytes in [1u8, 2, 4] {
            let (d, m) = (b.int(), b.output(8 * expected.len() as i32));
            b.op(Op::Imm { d, x: -2 });
            b.op(Op::IntStore { m, s: d, bytes });
            let keep = 0xa5a5_a5a5_a5a5_a5a5u64 as i64 >> (8 * bytes) << (8 * bytes);
            expected.push(keep | (-2i64 as u64 & ((1 << (8 * bytes)) - 1)) as i64);
        }
        b.run(&target, &input, [0, 0], &mut |out, how| {
            let found: Vec<i64> = (0..expected.len()).map(|n| word(out, n)).collect();
            assert_eq!(found, expected, "{how}");
        });
    }
}

#[test]
fn the_frame_is_aligned_and_private() {
    for target in targets() {
        let mut b = Build::new();
        let (first, second) = (b.f.room(10), b.f.room(64));
        assert_eq!((first, second), (0, 64));
        let (at, low, v) = (b.int(), b.int(), b.vec());
        b.op(Op::Lea { d: at, m: Mem::frame(second) });
        b.op(Op::Int { op: IntOp::And, size: Size::W64, d: low, a: at, b: imm(63) });
        let (m, out) = (b.input(0), b.output(0));
        b.op(Op::VecLoad { w: Width::Y, d: v, m });
        b.op(Op::VecStore { w: Width::Y, m: Mem::frame(second), s: v });
        let through = Mem { base: Base::Reg(at), index: None, disp: 0 };
        b.op(Op::Vec { op: VecOp::AddI32, w: Width::Y, d: v, a: v, b: VecArg::Mem(through) });
        b.op(Op::VecStore { w: Width::Y, m: out, s: v });
        let m = b.output(32);
        b.op(Op::IntStore { m, s: low, bytes: 8 });
        b.run(&target, &[1; 64], [0, 0], &mut |out, how| {
            assert_eq!(out[..32], [2; 32], "{how}");
            assert_eq!(word(out, 4), 0, "{how}");
        });
    }
}

#[test]
fn constants_lie_behind_the_code() {
    for target in targets() {
        let mut b = Build::new();
        let pattern: [u8; 64] = std::array::from_fn(|n| n as u8);
        let (one, two) = (b.f.constant([1; 64]), b.f.constant(pattern));
        assert_eq!(b.f.constant([1; 64]), one);
        let (v, x, p) = (b.vec(), b.vec(), b.int());
        b.op(Op::VecLoad { w: Width::Y, d: v, m: one });
        b.op(Op::Vec { op: VecOp::AddI32, w: Width::Y, d: v, a: v, b: VecArg::Mem(two) });
        // An immediate follows the address.
        b.op(Op::Vec { op: VecOp::EvenI32, w: Width::X, d: x, a: v, b: VecArg::Mem(two.plus(16)) });
        b.op(Op::Lea { d: p, m: two.plus(4) });
        b.op(Op::IntLoad { d: p, m: Mem { base: Base::Reg(p), index: None, disp: 0 }, size: Size::W64, narrow: None });
        let (m, n, o) = (b.output(0), b.output(32), b.output(48));
        b.op(Op::VecStore { w: Width::Y, m, s: v });
        b.op(Op::VecStore { w: Width::X, m: n, s: x });
        b.op(Op::IntStore { m: o, s: p, bytes: 8 });
        b.run(&target, &[0; 64], [0, 0], &mut |out, how| {
            (0..32).for_each(|n| assert_eq!(out[n], n as u8 + 1, "{how}"));
            let lanes = [1u8, 9, 16, 24].map(|k| [k, k + 1, k + 2, k + 3]);
            assert_eq!(out[32..48], lanes.concat()[..], "{how}");
            assert_eq!(out[48..56], [4, 5, 6, 7, 8, 9, 10, 11], "{how}");
        });
    }
}

/// Vectors of one width under pressure, in a loop.
fn busy(w: Width, dot: bool) -> Function {
    let mut numbers = Numbers(5);
    let mut b = Build::new();
    let regs: Vec<Reg> = (0..40).map(|_| b.vec()).collect();
    for (n, &d) in regs.iter().enumerate() {
        let m = b.input(64 * n as i32);
        b.op(Op::VecLoad { w, d, m });
    }
    let counter = b.int();
    b.op(Op::Imm { d: counter, x: 0 });
    let mut body = vec![];
    for _ in 0..100 {
        let [d, a, x, c] = [0; 4].map(|_| regs[numbers.below(40)]);
        body.push(Node::Op(match numbers.below(5) {
            0 => Op::Fma { w, lane: Size::W32, d, a: VecArg::Reg(a), b: VecArg::Reg(x), c: VecArg::Reg(c) },
            1 => Op::Vec { op: VecOp::GtI32, w, d, a, b: VecArg::Reg(x) },
            2 => Op::Blend { w, d, mask: c, a, b: x },
            3 if dot => Op::Dot { w, d, c, a, b: VecArg::Reg(x) },
            _ => Op::Shift { op: ShiftOp::SarI32, w, d, a, n: 3 },
        }));
    }
    b.nodes.push(run_loop(counter, 1, imm(10), false, body));
    for (n, &s) in regs.iter().enumerate() {
        let m = b.output(64 * n as i32);
        b.op(Op::VecStore { w, m, s });
    }
    b.f.body = b.nodes;
    b.f
}

fn decoded(bytes: &[u8]) -> Vec<iced_x86::Instruction> {
    let mut out: Vec<_> = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).into_iter().collect();
    let end = out.iter().position(|i| i.mnemonic() == iced_x86::Mnemonic::Ret).unwrap();
    out.truncate(end + 1);
    assert!(out.iter().all(|i| !i.is_invalid()));
    out
}

#[test]
fn code_stays_within_its_target() {
    let v3: Target = "x86-64-v3+avxvnni".parse().unwrap();
    let v4: Target = "x86-64-v4+avx512vnni".parse().unwrap();
    for available in choices(&v3) {
        for i in decoded(&code(&mut busy(Width::Y, true), &v3, available)) {
            assert!(matches!(i.code().encoding(), EncodingKind::VEX | EncodingKind::Legacy), "{i:?}");
            let operands = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
            assert!(operands.into_iter().all(|r| !r.is_zmm() && !r.is_k()), "{i:?}");
        }
    }
    let wide = decoded(&emit(&mut busy(Width::Z, true), &v4).unwrap());
    assert!(wide.iter().any(|i| i.op0_register() >= Register::ZMM16 && i.op0_register() <= Register::ZMM31));
    assert!(wide.iter().any(|i| i.op0_register() == Register::K1));
    for (i, next) in wide.iter().zip(&wide[1..]) {
        assert!(
            next.mnemonic() != iced_x86::Mnemonic::Ret
                || i.mnemonic() == iced_x86::Mnemonic::Vzeroupper
                || i.mnemonic() == iced_x86::Mnemonic::Pop
        );
    }
    assert_eq!(wide.iter().filter(|i| i.mnemonic() == iced_x86::Mnemonic::Vzeroupper).count(), 1);
}

#[test]
fn loops_start_at_multiples_of_32() {
    let v3: Target = "x86-64-v3".parse().unwrap();
    let code = decoded(&emit(&mut busy(Width::Y, false), &v3).unwrap());
    let back = code.iter().find(|i| i.is_jcc_short_or_near()).unwrap();
    assert_eq!(back.near_branch_target() % 32, 0);
    assert!(back.near_branch_target() < back.ip());
}

#[test]
fn the_same_function_gives_the_same_code() {
    let v3: Target = "x86-64-v3+avxvnni".parse().unwrap();
    let first = emit(&mut busy(Width::Y, true), &v3).unwrap();
    let mut again = busy(Width::Y, true);
    assert_eq!(emit(&mut again, &v3).unwrap(), first);
    assert_eq!(emit(&mut again, &v3).unwrap(), first);
}

#[test]
fn what_cannot_be_encoded_is_refused() {
    let message = |f: &mut Function, target: &str| emit(f, &target.parse().unwrap()).unwrap_err();
    assert!(message(&mut busy(Width::X, false), "x86-64-v2").contains("lacks avx2"));
    assert!(message(&mut busy(Width::Z, false), "x86-64-v3").contains("512"));
    assert!(message(&mut busy(Width::Y, true), "x86-64-v3").contains("dot products"));
    let mut b = Build::new();
    let (x, m) = (b.int(), b.output(0));
    assert_eq!(b.f.classes[x.0 as usize], Class::Int);
    b.op(Op::IntStore { m, s: x, bytes: 8 });
    b.f.body = b.nodes;
    assert!(message(&mut b.f, "x86-64-v3").contains("read before it is assigned"));
}
