//! Random kernels: the portable emitter agrees with the interpreter bit for bit.
//!
//! Indices stay in bounds by construction; `ToBits` is applied to loaded values only, because payloads of NaN may differ.

use crate::support::{Random, check};
use chimera_ir::DType;
use chimera_ir::loops::{Acc, Bin, Buf, Builder, Cmp, Expr, Kernel, Role, Ty, Un, f32c, f64c, i32c, int};

const LEN: usize = 600;

struct Gen {
    r: Random,
    inputs: Vec<Buf>,
    words: [Buf; 2],
    /// Values in scope, with their types.
    values: Vec<(Ty, Expr)>,
    /// Loop variables in scope, all below this bound.
    loops: Vec<(Expr, usize)>,
    outputs: usize,
}

impl Gen {
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.r.below(of.len())]
    }

    /// An `I64` in `0 .. n`.
    fn index(&mut self, n: usize) -> Expr {
        let mut e = int(self.r.below(8));
        let mut most = 8;
        for _ in 0..1 + self.r.below(3) {
            let (v, bound) = match self.r.below(self.loops.len() + 1) {
                0 => {
                    let byte = Expr::load(self.inputs[0], e.clone() % 50);
                    ((byte & i32c(31)).cast(Ty::I64), 32)
                }
                l => self.loops[l - 1].clone(),
            };
            let (v, bound) = match self.r.below(6) {
                0 => (v / int(self.pick(&[1, 2, 3, 4, 8, 16])), bound),
                1 => (v % int(self.pick(&[1, 3, 4, 8, 16, 64])), bound),
                2 => (int(bound) - v, bound),
                3 => (v * self.pick(&[2usize, 3, 8]), bound * 8),
                _ => (v, bound),
            };
            if most + bound < n {
                e = if self.r.chance(50) { e + v } else { v + e };
                most += bound;
            }
        }
        e
    }

    fn local(&mut self, ty: Ty) -> Option<Expr> {
        let of: Vec<Expr> = self.values.iter().filter(|(t, _)| *t == ty).map(|(_, e)| e.clone()).collect();
        if of.is_empty() { None } else { Some(of[self.r.below(of.len())].clone()) }
    }

    fn leaf(&mut self, b: &Builder, ty: Ty) -> Expr {
        if self.r.chance(50)
            && let Some(e) = self.local(ty)
        {
            return e;
        }
        match ty {
            Ty::F32 if self.r.chance(15) => f32c(self.pick(&[0.0, -0.0, 1.5, -3.0, 1e10])),
            Ty::F64 if self.r.chance(15) => f64c(self.pick(&[0.0, 0.1, -7.5])),
            Ty::I32 if self.r.chance(15) => i32c(self.pick(&[0, 1, -1, 77, i32::MIN])),
            Ty::I32 if self.r.chance(20) => {
                let at = self.index(LEN / 4);
                Expr::word(self.words[self.r.below(2)], at)
            }
            Ty::I64 => match self.r.below(2) {
                0 => self.index(1 << 20),
                _ => int(self.r.below(40)),
            },
            Ty::Bool => self.leaf(b, Ty::I32).lt(i32c(3)),
            _ => {
                let of: Vec<Buf> = self
                    .inputs
                    .iter()
                    .copied()
                    .filter(|&x| chimera_ir::loops::load_ty(b.decl(x).dtype) == ty)
                    .collect();
                let buf = of[self.r.below(of.len())];
                let at = self.index(LEN);
                Expr::load(buf, at)
            }
        }
    }

    fn expr(&mut self, b: &Builder, ty: Ty, depth: usize) -> Expr {
        if depth == 0 || self.r.chance(20) {
            return self.leaf(b, ty);
        }
        let d = depth - 1;
        if self.r.chance(12) {
            let (c, x, y) = (self.expr(b, Ty::Bool, d), self.expr(b, ty, d), self.expr(b, ty, d));
            return c.select(x, y);
        }
        if self.r.chance(12) && ty != Ty::Bool {
            let from = self.pick(&[Ty::F32, Ty::F64, Ty::I32, Ty::I64, Ty::Bool]);
            return self.expr(b, from, d).cast(ty);
        }
        let un = |op, x| Expr::Un(op, Box::new(x));
        match ty {
            Ty::F32 | Ty::F64 => match self.r.below(8) {
                0 => {
                    let op = self.pick(&[Un::Neg, Un::Abs, Un::Sqrt, Un::Floor, Un::Nearest]);
                    un(op, self.expr(b, ty, d))
                }
                1 if ty == Ty::F32 => un(Un::FromBits, self.expr(b, Ty::I32, d)),
                2 | 3 if ty == Ty::F32 => {
                    let (x, y, z) = (self.expr(b, ty, d), self.expr(b, ty, d), self.expr(b, ty, d));
                    x.fma(y, z)
                }
                _ => {
                    let op = self.pick(&[Bin::Add, Bin::Sub, Bin::Mul, Bin::Div, Bin::Min, Bin::Max]);
                    Expr::bin(op, self.expr(b, ty, d), self.expr(b, ty, d))
                }
            },
            Ty::I32 => match self.r.below(8) {
                0 => {
                    let op = self.pick(&[Un::Neg, Un::Abs, Un::Popcnt]);
                    un(op, self.expr(b, ty, d))
                }
                1 => {
                    let at = self.index(LEN);
                    un(Un::ToBits, Expr::load(self.inputs[1], at))
                }
                2 => {
                    let (at, acc) = (self.index(LEN / 4), self.expr(b, ty, d));
                    acc.dot4(Expr::word(self.words[0], at), self.expr(b, ty, d))
                }
                _ => {
                    let op = self.pick(&[
                        Bin::Add,
                        Bin::Sub,
                        Bin::Mul,
                        Bin::Min,
                        Bin::Max,
                        Bin::And,
                        Bin::Or,
                        Bin::Xor,
                        Bin::Shl,
                        Bin::Shr,
                        Bin::Sar,
                        Bin::MulHi,
                    ]);
                    Expr::bin(op, self.expr(b, ty, d), self.expr(b, ty, d))
                }
            },
            Ty::I64 => match self.r.below(5) {
                0 => {
                    let c = int(1 + self.r.below(12));
                    let op = self.pick(&[Bin::Div, Bin::Rem]);
                    Expr::bin(op, self.expr(b, ty, d), c)
                }
                1 => un(self.pick(&[Un::Neg, Un::Abs]), self.expr(b, ty, d)),
                _ => {
                    let op =
                        self.pick(&[Bin::Add, Bin::Sub, Bin::Mul, Bin::Min, Bin::Max, Bin::Xor, Bin::Shl, Bin::Sar]);
                    Expr::bin(op, self.expr(b, ty, d), self.expr(b, ty, d))
                }
            },
            Ty::Bool => match self.r.below(4) {
                0 => un(Un::Not, self.expr(b, ty, d)),
                1 => Expr::bin(self.pick(&[Bin::And, Bin::Or]), self.expr(b, ty, d), self.expr(b, ty, d)),
                _ => {
                    let of = self.pick(&[Ty::F32, Ty::F64, Ty::I32, Ty::I64]);
                    let op = self.pick(&[Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::Le]);
                    self.expr(b, of, d).cmp(op, self.expr(b, of, d))
                }
            },
        }
    }

    fn ty(&mut self) -> Ty {
        self.pick(&[Ty::F32, Ty::F32, Ty::F32, Ty::I32, Ty::I32, Ty::F64, Ty::I64, Ty::Bool])
    }

    /// A uniform condition: about loop variables outside of the lanes.
    fn condition(&mut self, outer: usize) -> Expr {
        let (v, n) = self.loops[self.r.below(outer)].clone();
        v.lt(int(self.r.below(n + 1)))
    }

    /// A few statements on locals; `outer` loop variables are uniform.
    fn locals(&mut self, b: &mut Builder, outer: usize, depth: usize) {
        let mark = self.values.len();
        let mut own = vec![];
        for _ in 0..1 + self.r.below(3) {
            let ty = self.ty();
            let e = self.expr(b, ty, 3);
            let v = b.local(e);
            own.push((ty, v));
            self.values.push((ty, v.into()));
        }
        if depth > 0 && self.r.chance(60) {
            let n = 1 + self.r.below(6);
            let mut inner = vec![];
            b.each(0, n, |b, k| {
                self.loops.insert(0, (k, n));
                for _ in 0..1 + self.r.below(3) {
                    let (ty, v) = own[self.r.below(own.len())];
                    let e = self.expr(b, ty, 2);
                    b.set(v, e);
                }
                if self.r.chance(50) {
                    let (ty, v) = own[self.r.below(own.len())];
                    let e = self.expr(b, ty, 2);
                    let c = self.condition(outer + 1);
                    if self.r.chance(50) {
                        b.when(c, |b| b.set(v, e));
                    } else {
                        let other = self.expr(b, ty, 1);
                        b.if_else(c, |b| b.set(v, e), |b| b.set(v, other));
                    }
                }
                inner.push(self.loops.remove(0));
            });
        }
        // Some locals are forgotten, so that the uses of the others differ.
        while self.values.len() > mark + 3 {
            self.values.remove(mark);
        }
    }

    fn output(&mut self, b: &mut Builder, ty: Ty) -> Buf {
        let dtype = match ty {
            Ty::F32 => DType::F32,
            Ty::F64 => DType::F64,
            _ => self.pick(&[DType::I8, DType::U8, DType::I16, DType::I32]),
        };
        self.outputs += 1;
        b.buf(format!("z{}", self.outputs), dtype, 3 * LEN, Role::InOut)
    }

    /// Store a value where only this iteration stores.
    fn result(&mut self, b: &mut Builder, own: Expr) {
        let ty = self.pick(&[Ty::F32, Ty::F32, Ty::I32, Ty::F64]);
        let z = self.output(b, ty);
        let e = self.expr(b, ty, 3);
        let stride = self.pick(&[1usize, 1, 1, 2]);
        b.store(z, own * stride, e);
    }

    fn kernel(seed: u64) -> Kernel {
        let mut b = Builder::new(format!("random {seed}"));
        let types = [DType::U8, DType::F32, DType::BF16, DType::I8, DType::I16, DType::I32, DType::F64];
        let inputs: Vec<Buf> = types.iter().map(|t| b.buf(format!("in_{}", t.name()), *t, LEN, Role::In)).collect();
        let words = [b.buf("codes", DType::U8, LEN, Role::In), inputs[3]];
        let mut g = Gen { r: Random(seed), inputs, words, values: vec![], loops: vec![], outputs: 0 };
        let grid = b.grid(3);
        g.loops.push((grid.clone(), 3));
        g.locals(&mut b, 1, 1);
        for _ in 0..2 {
            let (values, loops) = (g.values.clone(), g.loops.clone());
            match g.r.below(3) {
                0 => g.reduction(&mut b, &grid),
                _ => {
                    let n = g.r.below(40) + 1;
                    let unroll = 1 + g.r.below(3) as u8;
                    let (lo, hi) = match g.r.below(3) {
                        0 => (int(0), int(n)),
                        1 => (int(0), &grid * 7 + n),
                        _ => (grid.clone(), &grid + n),
                    };
                    b.lanes(lo, hi, unroll, |b, j| {
                        let outer = g.loops.len();
                        g.loops.push((j.clone(), 60));
                        g.locals(b, outer, 1);
                        g.result(b, &grid * 100 + &j);
                        if g.r.chance(50) {
                            g.result(b, &grid * 100 + &j);
                        }
                    });
                }
            }
            (g.values, g.loops) = (values, loops);
        }
        b.finish()
    }

    fn reduction(&mut self, b: &mut Builder, grid: &Expr) {
        let n = self.r.below(30);
        let hi = if self.r.chance(50) { int(n) } else { grid * 5 + n };
        let (values, mut kinds) = (self.values.clone(), vec![]);
        let totals = b.reduce(0, hi, |b, i| {
            self.loops.push((i, 60));
            for _ in 0..self.r.below(3) {
                let ty = self.ty();
                let e = self.expr(b, ty, 2);
                let e = b.bind(e);
                self.values.push((ty, e));
            }
            (0..1 + self.r.below(3))
                .map(|_| {
                    let ty = self.pick(&[Ty::F32, Ty::F32, Ty::I32, Ty::F64, Ty::I64]);
                    kinds.push(ty);
                    let e = self.expr(b, ty, 2);
                    match self.r.below(3) {
                        0 => Acc::Max(e),
                        1 if ty == Ty::F32 => Acc::Dot(e, self.expr(b, ty, 2)),
                        _ => Acc::Sum(e),
                    }
                })
                .collect()
        });
        self.loops.pop();
        self.values = values;
        for (ty, total) in kinds.into_iter().zip(totals) {
            let (ty, total) = if ty == Ty::I64 { (Ty::I32, total.cast(Ty::I32)) } else { (ty, total) };
            let z = self.output(b, ty);
            b.store(z, grid, total);
        }
    }
}

#[test]
fn random_kernels_agree() {
    for seed in 0..120 {
        check(&Gen::kernel(seed));
    }
}
