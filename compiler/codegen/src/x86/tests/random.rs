//! Random programs against a direct evaluation of their trees.

use super::super::flat::{
    Access, Branch, Class, Cond, IntArg, IntOp, Loop, Mem, Node, Op, Reg, Size, VecArg, VecOp, Width,
};
use super::{Build, Numbers, targets};

const INTS: [IntOp; 11] = {
    use IntOp::*;
    [Add, Sub, Mul, And, Or, Xor, Min, Max, Shl, Shr, Sar]
};
const CONDS: [Cond; 4] = [Cond::Eq, Cond::Ne, Cond::Lt, Cond::Le];

/// Registers of both classes, and eight numbers in the frame.
struct State {
    ints: Vec<i64>,
    vecs: Vec<[f32; 8]>,
    frame: [i64; 8],
}

fn holds(cond: Cond, size: Size, a: i64, b: i64) -> bool {
    let (a, b) = if size == Size::W32 { (i64::from(a as i32), i64::from(b as i32)) } else { (a, b) };
    match cond {
        Cond::Eq => a == b,
        Cond::Ne => a != b,
        Cond::Lt => a < b,
        Cond::Le => a <= b,
    }
}

fn int(op: IntOp, size: Size, a: i64, b: i64) -> i64 {
    if size == Size::W32 {
        let (x, y) = (a as i32, b as i32);
        let r = match op {
            IntOp::Add => x.wrapping_add(y),
            IntOp::Sub => x.wrapping_sub(y),
            IntOp::Mul => x.wrapping_mul(y),
            IntOp::And => x & y,
            IntOp::Or => x | y,
            IntOp::Xor => x ^ y,
            IntOp::Min => x.min(y),
            IntOp::Max => x.max(y),
            IntOp::Shl => x.wrapping_shl(y as u32),
            IntOp::Shr => (x as u32).wrapping_shr(y as u32) as i32,
            IntOp::Sar => x.wrapping_shr(y as u32),
        };
        return i64::from(r as u32);
    }
    match op {
        IntOp::Add => a.wrapping_add(b),
        IntOp::Sub => a.wrapping_sub(b),
        IntOp::Mul => a.wrapping_mul(b),
        IntOp::And => a & b,
        IntOp::Or => a | b,
        IntOp::Xor => a ^ b,
        IntOp::Min => a.min(b),
        IntOp::Max => a.max(b),
        IntOp::Shl => a.wrapping_shl(b as u32),
        IntOp::Shr => (a as u64).wrapping_shr(b as u32) as i64,
        IntOp::Sar => a.wrapping_shr(b as u32),
    }
}

impl State {
    fn int(&self, r: Reg) -> i64 {
        self.ints[r.0 as usize]
    }

    fn arg(&self, b: IntArg) -> i64 {
        match b {
            IntArg::Reg(r) => self.int(r),
            IntArg::Imm(x) => i64::from(x),
        }
    }

    fn vec(&self, x: VecArg) -> [f32; 8] {
        match x {
            VecArg::Reg(r) => self.vecs[r.0 as usize],
            VecArg::Mem(_) => unreachable!("these programs have no vectors in memory"),
        }
    }

    fn run(&mut self, nodes: &[Node]) {
        for node in nodes {
            match node {
                Node::Op(op) => self.op(op),
                Node::Loop(l) => {
                    if l.guard && self.int(l.counter) >= self.arg(l.end) {
                        continue;
                    }
                    loop {
                        self.run(&l.body);
                        self.ints[l.counter.0 as usize] += i64::from(l.step);
                        if self.int(l.counter) >= self.arg(l.end) {
                            break;
                        }
                    }
                }
                Node::Branch(b) => {
                    let taken = holds(b.cond, b.size, self.int(b.a), self.arg(b.b));
                    self.run(if taken { &b.then } else { &b.other });
                }
            }
        }
    }

    fn op(&mut self, op: &Op) {
        let (d, x) = match *op {
            Op::Imm { d, x } => (d, x),
            Op::IntMove { d, s } => (d, self.int(s)),
            Op::Int { op, size, d, a, b } => (d, int(op, size, self.int(a), self.arg(b))),
            Op::Popcnt { d, s } => (d, i64::from((self.int(s) as u32).count_ones())),
            Op::Lea { d, m: Mem { base: super::Base::Reg(r), index: Some((i, scale)), disp } } => {
                let scaled = self.int(i).wrapping_mul(i64::from(scale));
                (d, self.int(r).wrapping_add(scaled).wrapping_add(i64::from(disp)))
            }
            Op::Extend { d, s, signed: true } => (d, i64::from(self.int(s) as i32)),
            Op::Extend { d, s, signed: false } => (d, i64::from(self.int(s) as u32)),
            Op::SetCond { d, cond, size, a, b } => (d, i64::from(holds(cond, size, self.int(a), self.arg(b)))),
            Op::Choose { d, c, a, b } => (d, self.int(if self.int(c) as i32 != 0 { a } else { b })),
            Op::Divide { d, a, b, remainder } => {
                let (a, b) = (self.int(a), self.int(b));
                (d, if remainder { a % b } else { a / b })
            }
            Op::IntLoad { d, m, .. } => (d, self.frame[m.disp as usize / 8]),
            Op::IntStore { m, s, .. } => {
                self.frame[m.disp as usize / 8] = self.int(s);
                return;
            }
            _ => return self.vector(op),
        };
        self.ints[d.0 as usize] = x;
    }

    fn vector(&mut self, op: &Op) {
        let lanes = |f: &dyn Fn(usize) -> f32| std::array::from_fn(f);
        let (d, x) = match *op {
            Op::VecMove { d, s } => (d, self.vecs[s.0 as usize]),
            Op::Vec { op, d, a, b, .. } => {
                let (a, b) = (self.vecs[a.0 as usize], self.vec(b));
                let f = |n: usize| match op {
                    VecOp::SubF32 => a[n] - b[n],
                    VecOp::MulF32 => a[n] * b[n],
                    _ if a[n] < b[n] => a[n],
                    _ => b[n],
                };
                (d, lanes(&f))
            }
            Op::Fma { d, a, b, c, .. } => {
                let [a, b, c] = [a, b, c].map(|x| self.vec(x));
                (d, lanes(&|n| a[n].mul_add(b[n], c[n])))
            }
            Op::Blend { d, mask, a, b, .. } => {
                let [m, a, b] = [mask, a, b].map(|r| self.vecs[r.0 as usize]);
                (d, lanes(&|n| if m[n].is_sign_negative() { a[n] } else { b[n] }))
            }
            _ => unreachable!("{op:?} is not generated"),
        };
        self.vecs[d.0 as usize] = x;
    }
}

/// Writes random programs.
struct Writer {
    numbers: Numbers,
    ints: Vec<Reg>,
    vecs: Vec<Reg>,
    /// Never assigned again, so that their signs are known.
    masks: Vec<Reg>,
    budget: usize,
}

impl Writer {
    fn int(&mut self) -> Reg {
        self.ints[self.numbers.below(self.ints.len())]
    }

    fn vec(&mut self) -> Reg {
        self.vecs[self.numbers.below(self.vecs.len())]
    }

    fn arg(&mut self) -> IntArg {
        match self.numbers.below(3) {
            0 => IntArg::Imm(self.numbers.next() as i32 >> self.numbers.below(32)),
            _ => IntArg::Reg(self.int()),
        }
    }

    fn size(&mut self) -> Size {
        if self.numbers.below(2) == 0 { Size::W32 } else { Size::W64 }
    }

    fn op(&mut self, b: &mut Build, out: &mut Vec<Node>) {
        let (mut d, a, s) = (self.int(), self.int(), self.int());
        let (mut v, x, y, z) = (self.vec(), self.vec(), self.vec(), self.vec());
        // A third of the results are new registers, which live within the block.
        let new = self.numbers.below(3) == 0;
        if new {
            (d, v) = (b.int(), b.vec());
        }
        let (size, arg, cond) = (self.size(), self.arg(), CONDS[self.numbers.below(CONDS.len())]);
        let op = match self.numbers.below(24) {
            0 => Op::Imm { d, x: self.numbers.next() as i64 >> self.numbers.below(64) },
            1 => Op::IntMove { d, s },
            2 => Op::Popcnt { d, s },
            3 => {
                let scale = 1 << self.numbers.below(4);
                Op::Lea {
                    d,
                    m: Mem { base: super::Base::Reg(a), index: Some((s, scale)), disp: self.numbers.next() as i32 },
                }
            }
            4 => Op::Extend { d, s, signed: self.numbers.below(2) == 0 },
            5 => Op::SetCond { d, cond, size, a, b: arg },
            6 | 7 => Op::Choose { d, c: self.int(), a, b: s },
            8 => {
                let by = b.int();
                out.push(Node::Op(Op::Int { op: IntOp::And, size: Size::W64, d: by, a: s, b: IntArg::Imm(0xfff) }));
                out.push(Node::Op(Op::Int { op: IntOp::Or, size: Size::W64, d: by, a: by, b: IntArg::Imm(1) }));
                Op::Divide { d, a, b: by, remainder: self.numbers.below(2) == 0 }
            }
            9 => Op::IntStore { m: Mem::frame(8 * self.numbers.below(8) as i32), s, bytes: 8 },
            10 => Op::IntLoad { d, m: Mem::frame(8 * self.numbers.below(8) as i32), size: Size::W64, narrow: None },
            11 => Op::VecMove { d: v, s: x },
            12 => Op::Vec { op: VecOp::SubF32, w: Width::Y, d: v, a: x, b: VecArg::Reg(y) },
            13 => Op::Vec { op: VecOp::MinF32, w: Width::Y, d: v, a: x, b: VecArg::Reg(y) },
            14 => Op::Vec { op: VecOp::MulF32, w: Width::Y, d: v, a: x, b: VecArg::Reg(y) },
            15 => {
                let mask = self.masks[self.numbers.below(self.masks.len())];
                Op::Blend { w: Width::Y, d: v, mask, a: x, b: y }
            }
            16 | 17 => {
                let [a, b, c] = [x, y, z].map(VecArg::Reg);
                Op::Fma { w: Width::Y, lane: Size::W32, d: v, a, b, c }
            }
            _ => Op::Int { op: INTS[self.numbers.below(11)], size, d, a, b: arg },
        };
        if new {
            let mut op = op;
            op.each_reg(&mut |&mut r, access| match access {
                Access::Write if r == d => self.ints.push(r),
                Access::Write if r == v => self.vecs.push(r),
                _ => {}
            });
        }
        out.push(Node::Op(op));
    }

    fn block(&mut self, b: &mut Build, depth: usize) -> Vec<Node> {
        let mut out = vec![];
        let outer = (self.ints.len(), self.vecs.len());
        for _ in 0..self.numbers.below(12) + 1 {
            if self.budget == 0 {
                break;
            }
            self.budget -= 1;
            match self.numbers.below(10) {
                0 if depth < 3 => {
                    let counter = b.int();
                    let steps = self.numbers.below(4) as i64;
                    let guard = steps == 0 || self.numbers.below(2) == 0;
                    out.push(Node::Op(Op::Imm { d: counter, x: -2 }));
                    let end = if self.numbers.below(2) == 0 {
                        let end = b.int();
                        out.push(Node::Op(Op::Imm { d: end, x: -2 + 3 * steps }));
                        IntArg::Reg(end)
                    } else {
                        IntArg::Imm(-2 + 3 * steps as i32)
                    };
                    let body = self.block(b, depth + 1);
                    out.push(Node::Loop(Box::new(Loop { counter, step: 3, end, guard, body })));
                }
                1 if depth < 4 => {
                    let (cond, size, a, arg) =
                        (CONDS[self.numbers.below(CONDS.len())], self.size(), self.int(), self.arg());
                    let then = self.block(b, depth + 1);
                    let other = if self.numbers.below(2) == 0 { self.block(b, depth + 1) } else { vec![] };
                    out.push(Node::Branch(Box::new(Branch { cond, size, a, b: arg, then, other })));
                }
                _ => self.op(b, &mut out),
            }
        }
        self.ints.truncate(outer.0);
        self.vecs.truncate(outer.1);
        out
    }
}

#[test]
fn random_programs_compute_what_their_trees_say() {
    let mut branches = 0;
    for seed in 1..=700u64 {
        let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut b = Build::new();
        b.f.room(64);
        let (ints, vecs) = (1 + numbers.below(24), 1 + numbers.below(24));
        let ints: Vec<Reg> = (0..ints).map(|_| b.int()).collect();
        let vecs: Vec<Reg> = (0..vecs).map(|_| b.vec()).collect();
        let masks: Vec<Reg> = (0..2).map(|_| b.vec()).collect();
        let input: Vec<f32> = (0..(vecs.len() + 2) * 8).map(|_| numbers.below(17) as f32 / 4.0 - 2.0).collect();
        let mut w = Writer { numbers, ints, vecs, masks, budget: 30 + seed as usize % 90 };
        for n in 0..8 {
            let zero = b.f.args[2];
            b.op(Op::IntStore { m: Mem::frame(8 * n), s: zero, bytes: 8 });
        }
        for r in w.ints.clone() {
            b.op(Op::Imm { d: r, x: w.numbers.next() as i64 >> w.numbers.below(64) });
        }
        for (n, r) in w.vecs.iter().chain(&w.masks).copied().enumerate() {
            let m = b.input(32 * n as i32);
            b.op(Op::VecLoad { w: Width::Y, d: r, m });
        }
        let start = b.nodes.len();
        while w.budget > 0 {
            let more = w.block(&mut b, 0);
            b.nodes.extend(more);
        }
        branches += b.nodes.iter().filter(|n| !matches!(n, Node::Op(_))).count();
        let mut state =
            State { ints: vec![0; b.f.classes.len()], vecs: vec![[0.0; 8]; b.f.classes.len()], frame: [0; 8] };
        for (n, r) in w.vecs.iter().chain(&w.masks).enumerate() {
            state.vecs[r.0 as usize] = input[8 * n..8 * n + 8].try_into().unwrap();
        }
        for node in &b.nodes[..start] {
            if let Node::Op(op @ Op::Imm { .. }) = node {
                state.op(op);
            }
        }
        state.run(&b.nodes[start..]);
        // The other registers end where they were last used.
        w.ints.truncate(w.ints.len().div_ceil(3));
        w.vecs.truncate(w.vecs.len().div_ceil(3));
        for (n, &r) in w.ints.iter().enumerate() {
            assert_eq!(b.f.classes[r.0 as usize], Class::Int);
            let m = b.output(8 * n as i32);
            b.op(Op::IntStore { m, s: r, bytes: 8 });
        }
        for (n, &r) in w.vecs.iter().enumerate() {
            let m = b.output(1024 + 32 * n as i32);
            b.op(Op::VecStore { w: Width::Y, m, s: r });
        }
        let bytes: Vec<u8> = input.iter().flat_map(|x| x.to_le_bytes()).collect();
        let targets = targets();
        let Some(target) = targets.get(seed as usize % targets.len().max(1)) else { return };
        b.run(target, &bytes, [0, 0], &mut |out, how| {
            for (n, r) in w.ints.iter().enumerate() {
                let found = i64::from_le_bytes(out[8 * n..8 * n + 8].try_into().unwrap());
                assert_eq!(found, state.int(*r), "seed {seed}, {r:?}, {how}");
            }
            for (n, r) in w.vecs.iter().enumerate() {
                for lane in 0..8 {
                    let at = 1024 + 32 * n + 4 * lane;
                    let found = f32::from_le_bytes(out[at..at + 4].try_into().unwrap());
                    let expected = state.vecs[r.0 as usize][lane];
                    let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
                    assert!(same, "seed {seed}, {r:?}, lane {lane}: {found} {expected}, {how}");
                }
            }
        });
    }
    assert!(branches > 500, "only {branches} loops and branches");
}
