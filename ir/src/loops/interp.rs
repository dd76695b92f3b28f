//! The reference interpreter: the meaning of a kernel, one obvious evaluator per scalar type.
//!
//! Loops run in ascending order, also where a kernel promises independence; nothing is reassociated or contracted. Every index is
//! checked against the declared length before memory sees it.

use super::*;

/// What a kernel reads and writes. Indices were checked against the declared length of the buffer.
pub trait Memory {
    /// Element `i` of a `f32` or `bf16` buffer.
    fn load_f32(&self, buf: Buf, i: i64) -> f32;
    /// Element `i` of a `f64` buffer.
    fn load_f64(&self, buf: Buf, i: i64) -> f64;
    /// Element `i` of an integer buffer, widened.
    fn load_i32(&self, buf: Buf, i: i64) -> i32;
    /// Bytes `4 i .. 4 i + 4` of a byte buffer, little-endian.
    fn word(&self, buf: Buf, i: i64) -> i32;
    /// Overwrite element `i` of a `f32` buffer.
    fn store_f32(&mut self, buf: Buf, i: i64, x: f32);
    /// Overwrite element `i` of a `f64` buffer.
    fn store_f64(&mut self, buf: Buf, i: i64, x: f64);
    /// Overwrite element `i` of an integer buffer with the low bits of `x`.
    fn store_i32(&mut self, buf: Buf, i: i64, x: i32);
}

/// Run the grid instances `lo .. hi` of a verified kernel.
///
/// # Panics
/// When an index is out of bounds, or the kernel is one that [`verify()`] refuses.
pub fn interpret<M: Memory>(kernel: &Kernel, memory: &mut M, lo: i64, hi: i64) {
    let mut run = Run { kernel, memory, vars: vec![0; kernel.vars.len()] };
    for i in lo..hi {
        run.vars[GRID.0 as usize] = i as u64;
        run.block(&kernel.body);
    }
}

struct Run<'a, M> {
    kernel: &'a Kernel,
    memory: &'a mut M,
    /// The bits of every variable, zero-extended.
    vars: Vec<u64>,
}

/// `a < b ? a : b`.
fn min<T: PartialOrd>(a: T, b: T) -> T {
    if a < b { a } else { b }
}

/// `a > b ? a : b`.
fn max<T: PartialOrd>(a: T, b: T) -> T {
    if a > b { a } else { b }
}

fn compare<T: PartialOrd>(op: Cmp, a: T, b: T) -> bool {
    match op {
        Cmp::Eq => a == b,
        Cmp::Ne => a != b,
        Cmp::Lt => a < b,
        Cmp::Le => a <= b,
    }
}

/// `acc` plus the four products of the unsigned bytes of `codes` and the signed bytes of `bytes`.
fn dot4(acc: i32, codes: i32, bytes: i32) -> i32 {
    let (codes, bytes) = (codes.to_le_bytes(), bytes.to_le_bytes());
    (0..4).fold(acc, |acc, j| acc.wrapping_add(i32::from(codes[j]) * i32::from(bytes[j] as i8)))
}

/// The bits of `Sum` or `Max` of two partial results: `acc + x`, or `x > acc ? x : acc`.
fn absorb(ty: Ty, is_max: bool, acc: u64, x: u64) -> u64 {
    let (a, b) = (f32::from_bits(acc as u32), f32::from_bits(x as u32));
    let (c, d) = (f64::from_bits(acc), f64::from_bits(x));
    match (ty, is_max) {
        (Ty::F32, false) => (a + b).to_bits().into(),
        (Ty::F32, true) => max(b, a).to_bits().into(),
        (Ty::F64, false) => (c + d).to_bits(),
        (Ty::F64, true) => max(d, c).to_bits(),
        (Ty::I32, false) => (acc as u32).wrapping_add(x as u32).into(),
        (Ty::I32, true) => (max(x as i32, acc as i32) as u32).into(),
        (Ty::I64, false) => acc.wrapping_add(x),
        (Ty::I64, true) => max(x as i64, acc as i64) as u64,
        (Ty::Bool, _) => ill("a reduction of Bool"),
    }
}

/// The bits from which an accumulator starts.
fn identity(ty: Ty, acc: &Acc) -> u64 {
    match (acc, ty) {
        (Acc::Sum(_) | Acc::Dot(..), _) => 0,
        (Acc::Max(_), Ty::F32) => f32::NEG_INFINITY.to_bits().into(),
        (Acc::Max(_), Ty::F64) => f64::NEG_INFINITY.to_bits(),
        (Acc::Max(_), Ty::I32) => (i32::MIN as u32).into(),
        (Acc::Max(_), Ty::I64) => i64::MIN as u64,
        (Acc::Max(_), Ty::Bool) => ill("a reduction of Bool"),
    }
}

#[cold]
fn ill(what: &str) -> ! {
    panic!("a verified kernel is well-typed, found {what}")
}

#[cold]
fn ill_expr(ty: Ty, e: &Expr) -> ! {
    panic!("a verified kernel is well-typed, found {e:?} as {ty:?}")
}

impl<M: Memory> Run<'_, M> {
    fn block(&mut self, body: &[Stmt]) {
        for s in body {
            self.stmt(s);
        }
    }

    fn stmt(&mut self, s: &Stmt) {
        match s {
            Stmt::Let(v, e) => self.vars[v.0 as usize] = self.bits(self.kernel.vars[v.0 as usize], e),
            Stmt::Store(buf, index, value) => {
                let i = self.index(*buf, index, 1);
                match self.kernel.bufs[buf.0 as usize].dtype {
                    DType::F32 => self.memory.store_f32(*buf, i, self.f32(value)),
                    DType::F64 => self.memory.store_f64(*buf, i, self.f64(value)),
                    DType::I8 | DType::U8 | DType::I16 | DType::I32 => {
                        self.memory.store_i32(*buf, i, self.i32(value));
                    }
                    DType::BF16 => ill("a store to a bf16 buffer"),
                }
            }
            Stmt::Prefetch(..) => {}
            Stmt::For { var, lo, hi, step, mode: Mode::Seq | Mode::Lanes(_), body } => {
                let (mut i, hi) = (self.i64(lo), self.i64(hi));
                while i < hi {
                    self.vars[var.0 as usize] = i as u64;
                    self.block(body);
                    i = i.saturating_add(*step);
                }
            }
            Stmt::If(c, then, other) => self.block(if self.bool(c) { then } else { other }),
            Stmt::Reduce { var, lo, hi, body, accs } => self.reduce(*var, lo, hi, body, accs),
        }
    }

    fn reduce(&mut self, var: Var, lo: &Expr, hi: &Expr, body: &[Stmt], accs: &[(Var, Acc)]) {
        let (lo, hi) = (self.i64(lo), self.i64(hi));
        let ty = |kernel: &Kernel, v: Var| kernel.vars[v.0 as usize];
        let mut partial: Vec<[u64; STRIPES]> =
            accs.iter().map(|(v, acc)| [identity(ty(self.kernel, *v), acc); STRIPES]).collect();
        for i in lo..hi {
            self.vars[var.0 as usize] = i as u64;
            self.block(body);
            let stripe = (i - lo) as usize % STRIPES;
            for ((v, acc), partial) in accs.iter().zip(&mut partial) {
                let (p, ty) = (&mut partial[stripe], ty(self.kernel, *v));
                *p = match acc {
                    Acc::Sum(x) => absorb(ty, false, *p, self.bits(ty, x)),
                    Acc::Max(x) => absorb(ty, true, *p, self.bits(ty, x)),
                    Acc::Dot(x, y) => self.f32(x).mul_add(self.f32(y), f32::from_bits(*p as u32)).to_bits().into(),
                };
            }
        }
        for ((v, acc), partial) in accs.iter().zip(&mut partial) {
            for width in [4, 2, 1] {
                for j in 0..width {
                    partial[j] =
                        absorb(ty(self.kernel, *v), matches!(acc, Acc::Max(_)), partial[j], partial[j + width]);
                }
            }
            self.vars[v.0 as usize] = partial[0];
        }
    }

    /// The value of an index whose element occupies `width` elements of the buffer.
    fn index(&self, buf: Buf, index: &Expr, width: usize) -> i64 {
        let i = self.i64(index);
        let decl = &self.kernel.bufs[buf.0 as usize];
        if i < 0 || i as usize >= decl.len / width {
            self.outside(decl, i, width);
        }
        i
    }

    #[cold]
    fn outside(&self, decl: &BufDecl, i: i64, width: usize) -> ! {
        let (name, len) = (&decl.name, decl.len / width);
        let unit = if width == 1 { "elements" } else { "words" };
        panic!("kernel {}: index {i} is outside buffer {name} of {len} {unit}", self.kernel.name)
    }

    fn var(&self, v: Var) -> u64 {
        self.vars[v.0 as usize]
    }

    /// The bits of a value of any type, zero-extended.
    fn bits(&self, ty: Ty, e: &Expr) -> u64 {
        match ty {
            Ty::F32 => self.f32(e).to_bits().into(),
            Ty::F64 => self.f64(e).to_bits(),
            Ty::I32 => (self.i32(e) as u32).into(),
            Ty::I64 => self.i64(e) as u64,
            Ty::Bool => self.bool(e).into(),
        }
    }

    fn f32(&self, e: &Expr) -> f32 {
        match e {
            Expr::F32(x) => *x,
            Expr::Var(v) => f32::from_bits(self.var(*v) as u32),
            Expr::Load(buf, i) => self.memory.load_f32(*buf, self.index(*buf, i, 1)),
            Expr::Bin(op, a, b) => {
                let (a, b) = (self.f32(a), self.f32(b));
                match op {
                    Bin::Add => a + b,
                    Bin::Sub => a - b,
                    Bin::Mul => a * b,
                    Bin::Div => a / b,
                    Bin::Min => min(a, b),
                    Bin::Max => max(a, b),
                    _ => ill_expr(Ty::F32, e),
                }
            }
            Expr::Fma(a, b, c) => self.f32(a).mul_add(self.f32(b), self.f32(c)),
            Expr::Un(Un::FromBits, a) => f32::from_bits(self.i32(a) as u32),
            Expr::Un(op, a) => {
                let a = self.f32(a);
                match op {
                    Un::Neg => -a,
                    Un::Abs => a.abs(),
                    Un::Sqrt => a.sqrt(),
                    Un::Floor => a.floor(),
                    Un::Nearest => a.round_ties_even(),
                    _ => ill_expr(Ty::F32, e),
                }
            }
            Expr::Select(c, a, b) => {
                let (c, a, b) = (self.bool(c), self.f32(a), self.f32(b));
                if c { a } else { b }
            }
            Expr::Cast(Ty::F32, a) => match self.kernel.ty(a) {
                Ty::F32 => self.f32(a),
                Ty::F64 => self.f64(a) as f32,
                Ty::I32 => self.i32(a) as f32,
                Ty::I64 => self.i64(a) as f32,
                Ty::Bool => u8::from(self.bool(a)).into(),
            },
            e => ill_expr(Ty::F32, e),
        }
    }

    fn f64(&self, e: &Expr) -> f64 {
        match e {
            Expr::F64(x) => *x,
            Expr::Var(v) => f64::from_bits(self.var(*v)),
            Expr::Load(buf, i) => self.memory.load_f64(*buf, self.index(*buf, i, 1)),
            Expr::Bin(op, a, b) => {
                let (a, b) = (self.f64(a), self.f64(b));
                match op {
                    Bin::Add => a + b,
                    Bin::Sub => a - b,
                    Bin::Mul => a * b,
                    Bin::Div => a / b,
                    Bin::Min => min(a, b),
                    Bin::Max => max(a, b),
                    _ => ill_expr(Ty::F64, e),
                }
            }
            Expr::Un(op, a) => {
                let a = self.f64(a);
                match op {
                    Un::Neg => -a,
                    Un::Abs => a.abs(),
                    Un::Sqrt => a.sqrt(),
                    Un::Floor => a.floor(),
                    Un::Nearest => a.round_ties_even(),
                    _ => ill_expr(Ty::F64, e),
                }
            }
            Expr::Select(c, a, b) => {
                let (c, a, b) = (self.bool(c), self.f64(a), self.f64(b));
                if c { a } else { b }
            }
            Expr::Cast(Ty::F64, a) => match self.kernel.ty(a) {
                Ty::F32 => self.f32(a).into(),
                Ty::F64 => self.f64(a),
                Ty::I32 => self.i32(a).into(),
                Ty::I64 => self.i64(a) as f64,
                Ty::Bool => u8::from(self.bool(a)).into(),
            },
            e => ill_expr(Ty::F64, e),
        }
    }

    fn i32(&self, e: &Expr) -> i32 {
        match e {
            Expr::I32(x) => *x,
            Expr::Var(v) => self.var(*v) as i32,
            Expr::Load(buf, i) => self.memory.load_i32(*buf, self.index(*buf, i, 1)),
            Expr::Word(buf, i) => self.memory.word(*buf, self.index(*buf, i, 4)),
            Expr::Bin(op, a, b) => {
                let (a, b) = (self.i32(a), self.i32(b));
                match op {
                    Bin::Add => a.wrapping_add(b),
                    Bin::Sub => a.wrapping_sub(b),
                    Bin::Mul => a.wrapping_mul(b),
                    Bin::Min => min(a, b),
                    Bin::Max => max(a, b),
                    Bin::And => a & b,
                    Bin::Or => a | b,
                    Bin::Xor => a ^ b,
                    Bin::Shl => a.wrapping_shl(b as u32),
                    Bin::Shr => (a as u32).wrapping_shr(b as u32) as i32,
                    Bin::Sar => a.wrapping_shr(b as u32),
                    Bin::MulHi => ((u64::from(a as u32) * u64::from(b as u32)) >> 32) as i32,
                    Bin::Div | Bin::Rem => ill_expr(Ty::I32, e),
                }
            }
            Expr::Dot4(acc, codes, bytes) => dot4(self.i32(acc), self.i32(codes), self.i32(bytes)),
            Expr::Un(Un::ToBits, a) => self.f32(a).to_bits() as i32,
            Expr::Un(op, a) => {
                let a = self.i32(a);
                match op {
                    Un::Neg => a.wrapping_neg(),
                    Un::Abs => a.wrapping_abs(),
                    Un::Popcnt => a.count_ones() as i32,
                    _ => ill_expr(Ty::I32, e),
                }
            }
            Expr::Select(c, a, b) => {
                let (c, a, b) = (self.bool(c), self.i32(a), self.i32(b));
                if c { a } else { b }
            }
            Expr::Cast(Ty::I32, a) => match self.kernel.ty(a) {
                Ty::F32 => self.f32(a) as i32,
                Ty::F64 => self.f64(a) as i32,
                Ty::I32 => self.i32(a),
                Ty::I64 => self.i64(a) as i32,
                Ty::Bool => self.bool(a).into(),
            },
            e => ill_expr(Ty::I32, e),
        }
    }

    fn i64(&self, e: &Expr) -> i64 {
        match e {
            Expr::Int(x) => *x,
            Expr::Var(v) => self.var(*v) as i64,
            Expr::Bin(op, a, b) => {
                let (a, b) = (self.i64(a), self.i64(b));
                match op {
                    Bin::Add => a.wrapping_add(b),
                    Bin::Sub => a.wrapping_sub(b),
                    Bin::Mul => a.wrapping_mul(b),
                    Bin::Div => a / b,
                    Bin::Rem => a % b,
                    Bin::Min => min(a, b),
                    Bin::Max => max(a, b),
                    Bin::And => a & b,
                    Bin::Or => a | b,
                    Bin::Xor => a ^ b,
                    Bin::Shl => a.wrapping_shl(b as u32),
                    Bin::Shr => (a as u64).wrapping_shr(b as u32) as i64,
                    Bin::Sar => a.wrapping_shr(b as u32),
                    Bin::MulHi => ill_expr(Ty::I64, e),
                }
            }
            Expr::Un(Un::Neg, a) => self.i64(a).wrapping_neg(),
            Expr::Un(Un::Abs, a) => self.i64(a).wrapping_abs(),
            Expr::Select(c, a, b) => {
                let (c, a, b) = (self.bool(c), self.i64(a), self.i64(b));
                if c { a } else { b }
            }
            Expr::Cast(Ty::I64, a) => match self.kernel.ty(a) {
                Ty::F32 => self.f32(a) as i64,
                Ty::F64 => self.f64(a) as i64,
                Ty::I32 => self.i32(a).into(),
                Ty::I64 => self.i64(a),
                Ty::Bool => self.bool(a).into(),
            },
            e => ill_expr(Ty::I64, e),
        }
    }

    fn bool(&self, e: &Expr) -> bool {
        match e {
            Expr::Var(v) => self.var(*v) != 0,
            Expr::Cmp(op, a, b) => match self.kernel.ty(a) {
                Ty::F32 => compare(*op, self.f32(a), self.f32(b)),
                Ty::F64 => compare(*op, self.f64(a), self.f64(b)),
                Ty::I32 => compare(*op, self.i32(a), self.i32(b)),
                Ty::I64 => compare(*op, self.i64(a), self.i64(b)),
                Ty::Bool => ill_expr(Ty::Bool, e),
            },
            Expr::Bin(Bin::And, a, b) => self.bool(a) & self.bool(b),
            Expr::Bin(Bin::Or, a, b) => self.bool(a) | self.bool(b),
            Expr::Un(Un::Not, a) => !self.bool(a),
            Expr::Select(c, a, b) => {
                let (c, a, b) = (self.bool(c), self.bool(a), self.bool(b));
                if c { a } else { b }
            }
            e => ill_expr(Ty::Bool, e),
        }
    }
}
