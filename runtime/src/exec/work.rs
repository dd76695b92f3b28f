//! What one run of a kernel costs, counted in its loops: operations and bytes.
//!
//! Counts are exact where bounds are constant or linear in the loops around them; elsewhere they are those of the middle iteration, a
//! bound that depends on data is as large as it may be, and so is the cost of a choice that does. The ternary product states its work
//! in its contract.

use chimera_ir::loops::{Acc, Bin, Cmp, Expr, GRID, Kernel, Role, Stmt, Ty, Un, Var};
use std::collections::HashMap;
use std::ops::{Add, Mul};

/// Grid instances that are looked at; they stand for all.
const SAMPLES: usize = 16;

/// Operations and memory traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Float operations; a fused multiply-add counts two, an elementary function those of its polynomial.
    pub flops: f64,
    /// Multiply-accumulates of bytes with ternary codes.
    pub ternary: f64,
    /// Bytes read and written: of every buffer what is touched, once.
    pub bytes: f64,
}

impl Add for Work {
    type Output = Work;

    fn add(self, o: Work) -> Work {
        Work { flops: self.flops + o.flops, ternary: self.ternary + o.ternary, bytes: self.bytes + o.bytes }
    }
}

impl Mul<f64> for Work {
    type Output = Work;

    fn mul(self, n: f64) -> Work {
        Work { flops: self.flops * n, ternary: self.ternary * n, bytes: self.bytes * n }
    }
}

/// The cost of one run over the whole grid.
pub fn work(kernel: &Kernel) -> Work {
    let n = kernel.grid.clamp(1, SAMPLES);
    let mut assigned = HashMap::new();
    count_assignments(&kernel.body, &mut assigned);
    let touched = vec![0.0; kernel.bufs.len()];
    let mut counter = Counter { kernel, assigned, known: HashMap::new(), touched, times: 0.0 };
    let mut total = Work::default();
    for sample in 0..n {
        // The middles of equal parts of the grid.
        let at = ((2 * sample + 1) * kernel.grid / (2 * n)) as f64;
        counter.known.clear();
        counter.known.insert(GRID, at);
        counter.times = kernel.grid as f64 / n as f64;
        total = total + counter.body(&kernel.body);
    }
    let exact = kernel.contract.as_ref().filter(|c| c.name == "ternary_product").and_then(|c| {
        let of = |name: &str| c.params.iter().find(|p| p.0 == name).map(|p| p.1 as f64);
        Some(of("rows")? * of("m")? * of("np")? * of("n_weights")?)
    });
    if let Some(exact) = exact.filter(|_| total.ternary > 0.0) {
        // Rows of groups that data bound were counted for every group.
        total = total * (exact / total.ternary);
    }
    let bufs = kernel.bufs.iter().zip(&counter.touched).filter(|(b, _)| b.role != Role::Scratch);
    total.bytes = bufs.map(|(b, touched)| touched.min(b.len as f64) * b.dtype.size() as f64 * passes(b.role)).sum();
    total
}

fn passes(role: Role) -> f64 {
    if role == Role::InOut { 2.0 } else { 1.0 }
}

/// How many statements assign each local.
fn count_assignments(body: &[Stmt], n: &mut HashMap<Var, u32>) {
    for s in body {
        match s {
            Stmt::Let(v, _) => *n.entry(*v).or_default() += 1,
            Stmt::For { body, .. } | Stmt::Reduce { body, .. } => count_assignments(body, n),
            Stmt::If(_, a, b) => [a, b].into_iter().for_each(|body| count_assignments(body, n)),
            Stmt::Store(..) | Stmt::Prefetch(..) => {}
        }
    }
}

struct Counter<'a> {
    kernel: &'a Kernel,
    /// What several statements assign has no expected value.
    assigned: HashMap<Var, u32>,
    /// Expected values of integer variables.
    known: HashMap<Var, f64>,
    /// Elements of each buffer that are touched, repetitions included.
    touched: Vec<f64>,
    /// How often the code that is looked at runs.
    times: f64,
}

impl Counter<'_> {
    fn body(&mut self, body: &[Stmt]) -> Work {
        body.iter().fold(Work::default(), |sum, s| sum + self.statement(s))
    }

    fn statement(&mut self, s: &Stmt) -> Work {
        match s {
            Stmt::Let(v, e) => {
                match self.value(e).filter(|_| self.assigned.get(v) == Some(&1)) {
                    Some(x) => drop(self.known.insert(*v, x)),
                    None => drop(self.known.remove(v)),
                }
                self.expr(e)
            }
            Stmt::Store(b, index, e) => {
                self.touched[b.0 as usize] += self.times;
                self.expr(index) + self.expr(e)
            }
            // A hint computes nothing that anybody reads.
            Stmt::Prefetch(..) => Work::default(),
            Stmt::For { var, lo, hi, step, body, .. } => {
                self.repeated(*var, lo, hi, *step as f64, |counter| counter.body(body))
            }
            Stmt::If(c, then, other) => {
                let (cost, often, times) = (self.expr(c), self.often(c), self.times);
                self.times = times * often.unwrap_or(1.0);
                let a = self.body(then);
                self.times = times * (1.0 - often.unwrap_or(0.0));
                let b = self.body(other);
                self.times = times;
                match often {
                    Some(_) => cost + a + b,
                    None => cost + if a.flops + a.ternary >= b.flops + b.ternary { a } else { b },
                }
            }
            Stmt::Reduce { var, lo, hi, body, accs } => self.repeated(*var, lo, hi, 1.0, |counter| {
                accs.iter().fold(counter.body(body), |sum, (v, acc)| {
                    let each = if is_float(counter.kernel.vars[v.0 as usize]) { counter.times } else { 0.0 };
                    sum + match acc {
                        Acc::Sum(e) | Acc::Max(e) => counter.expr(e) + flops(each),
                        Acc::Dot(a, b) => counter.expr(a) + counter.expr(b) + flops(2.0 * each),
                    }
                })
            }),
        }
    }

    /// The cost of a loop: its middle iteration, times their number.
    fn repeated(&mut self, var: Var, lo: &Expr, hi: &Expr, step: f64, inside: impl FnOnce(&mut Self) -> Work) -> Work {
        let (from, to) = (self.value(lo).unwrap_or(0.0), self.value(hi).unwrap_or(0.0));
        let n = ((to - from) / step).max(0.0);
        let (before, times) = (self.known.insert(var, from + step * (n - 1.0).max(0.0) / 2.0), self.times);
        self.times *= n;
        let cost = inside(self);
        self.times = times;
        if let Some(before) = before {
            self.known.insert(var, before);
        }
        cost
    }

    /// The operations of an expression for all the times it is evaluated.
    fn expr(&mut self, e: &Expr) -> Work {
        let float = |counter: &Self, e: &Expr| if is_float(counter.kernel.ty(e)) { counter.times } else { 0.0 };
        match e {
            Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) | Expr::Var(_) => Work::default(),
            Expr::Load(b, index) => {
                self.touched[b.0 as usize] += self.times;
                self.expr(index)
            }
            Expr::Word(b, index) => {
                self.touched[b.0 as usize] += 4.0 * self.times;
                self.expr(index)
            }
            Expr::Un(Un::Neg | Un::Abs | Un::Sqrt | Un::Floor | Un::Nearest, a) => flops(float(self, a)) + self.expr(a),
            Expr::Un(Un::Popcnt | Un::ToBits | Un::FromBits | Un::Not, a) | Expr::Cast(_, a) => self.expr(a),
            Expr::Bin(_, a, b) => flops(float(self, a)) + self.expr(a) + self.expr(b),
            Expr::Cmp(_, a, b) => self.expr(a) + self.expr(b),
            Expr::Fma(a, b, c) => flops(2.0 * self.times) + self.expr(a) + self.expr(b) + self.expr(c),
            Expr::Dot4(c, a, b) => {
                let macs = Work { ternary: 4.0 * self.times, ..Work::default() };
                macs + self.expr(c) + self.expr(a) + self.expr(b)
            }
            Expr::Select(c, a, b) => self.expr(c) + self.expr(a) + self.expr(b),
        }
    }

    /// How often a condition holds, as far as that is known: of alternatives the most frequent one that is, and one residue in `n` is
    /// met every `n` times.
    fn often(&self, c: &Expr) -> Option<f64> {
        match c {
            Expr::Bin(op @ (Bin::Or | Bin::And), a, b) => match (self.often(a), self.often(b)) {
                (Some(a), Some(b)) => Some(if *op == Bin::Or { a.max(b) } else { a.min(b) }),
                (a, b) => a.or(b),
            },
            Expr::Un(Un::Not, a) => self.often(a).map(|p| 1.0 - p),
            Expr::Cmp(op, a, b) => match (op, &**a, self.value(a), self.value(b)) {
                (Cmp::Eq, Expr::Bin(Bin::Rem, _, n), None, Some(_)) => Some(1.0 / self.value(n)?.max(1.0)),
                (_, _, Some(a), Some(b)) => Some(f64::from(u8::from(match op {
                    Cmp::Eq => a == b,
                    Cmp::Ne => a != b,
                    Cmp::Lt => a < b,
                    Cmp::Le => a <= b,
                }))),
                _ => None,
            },
            _ => None,
        }
    }

    /// What an integer is in the middle of the loops around it; a bound by unknown data is reached.
    fn value(&self, e: &Expr) -> Option<f64> {
        match e {
            Expr::Int(x) => Some(*x as f64),
            Expr::I32(x) => Some(f64::from(*x)),
            Expr::Var(v) => self.known.get(v).copied(),
            Expr::Cast(Ty::I32 | Ty::I64, a) if !is_float(self.kernel.ty(a)) => self.value(a),
            Expr::Bin(op @ (Bin::Min | Bin::Max), a, b) => match (self.value(a), self.value(b)) {
                (Some(a), Some(b)) => Some(if *op == Bin::Min { a.min(b) } else { a.max(b) }),
                (a, b) => a.or(b),
            },
            Expr::Bin(op, a, b) => {
                let (a, b) = (self.value(a)?, self.value(b)?);
                match op {
                    Bin::Add => Some(a + b),
                    Bin::Sub => Some(a - b),
                    Bin::Mul => Some(a * b),
                    Bin::Div => Some((a / b).floor()),
                    Bin::Rem => Some(a - b * (a / b).floor()),
                    _ => None,
                }
            }
            _ => None,
        }
        .filter(|x| x.is_finite())
    }
}

fn is_float(ty: Ty) -> bool {
    matches!(ty, Ty::F32 | Ty::F64)
}

fn flops(flops: f64) -> Work {
    Work { flops, ..Work::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chimera_ir::lower::Cluster;
    use chimera_ir::ops::{
        GatedDelta, Linear, Mlstm, NormKind, NormQuantise, PANEL, TernaryProduct, TitansMemory, blocked_type,
        packed_type,
    };
    use chimera_ir::{DType, Op, Type};

    fn of(op: impl Into<Op>, types: &[Type]) -> Work {
        work(&Cluster::single(op.into(), types).expect("the operation fits").lower())
    }

    #[test]
    fn products_cost_what_they_state() {
        let (m, n, k) = (66, 256, 128);
        let types = [Type::f32(&[m, k]), Type::f32(&[n / PANEL, k, PANEL])];
        let float = of(Linear { m: n, grouped_rows: false }, &types);
        assert_eq!((float.flops, float.ternary), ((2 * m * n * k) as f64, 0.0));
        assert_eq!(float.bytes, (4 * (m * k + n * k + m * n)) as f64);
        let types = [
            Type::new(DType::I8, &[m, k]),
            Type::f32(&[m, k / 64]),
            packed_type(&Type::f32(&[n, k])),
            blocked_type(&Type::f32(&[n, k / 128])),
        ];
        let op = TernaryProduct { m: n, group: 128, block: 64, n_weights: 1, grouped_rows: false };
        let ternary = of(op, &types);
        assert_eq!(ternary.ternary, (m * n * k) as f64);
        assert!(ternary.flops > 0.0 && ternary.flops < ternary.ternary / 8.0, "{ternary:?}");
        let all: usize = types.iter().map(Type::bytes).sum::<usize>() + 4 * m * n;
        assert_eq!(ternary.bytes, all as f64);
    }

    #[test]
    fn recurrences_cost_about_what_they_state() {
        let (shape, heads, width) = ([2, 128], 4, 64);
        let of_row = |cols: usize| Type::f32(&[shape[0], shape[1], cols]);
        let operands = |gates: usize, more: &[Type]| {
            let mut types = vec![of_row(heads * width); 3];
            types.extend(vec![of_row(heads); gates]);
            types.push(Type::i32(&shape));
            types.extend_from_slice(more);
            types
        };
        let start = Type::f32(&[heads, width, width]);
        let cases: [(Op, Vec<Type>); 3] = [
            (GatedDelta { heads, chunk: 64, carry: false }.into(), operands(2, &[])),
            (Mlstm { heads, chunk: 64, carry: false }.into(), operands(2, &[])),
            (
                TitansMemory { heads, inner: 16, normalise: true, chunked: true, carry: false }.into(),
                operands(3, &[start.clone(), start]),
            ),
        ];
        for (op, types) in cases {
            let outs = op.infer(&types).expect("the operation fits");
            let ratio = of(op.clone(), &types).flops / op.flops(&types, &outs).float as f64;
            assert!((0.7..1.4).contains(&ratio), "{}: {ratio} times as many", op.name());
        }
    }

    #[test]
    fn elements_are_read_and_written_once() {
        let types = [Type::f32(&[8, 256]), Type::f32(&[256])];
        let op = NormQuantise { kind: NormKind::Rms, eps: 1e-6, block: 64 };
        let outs = Op::from(op.clone()).infer(&types).expect("the operation fits");
        let norm = of(op, &types);
        assert!(norm.flops >= (3 * 8 * 256) as f64 && norm.flops < (40 * 8 * 256) as f64, "{norm:?}");
        assert_eq!(norm.bytes, types.iter().chain(&outs).map(Type::bytes).sum::<usize>() as f64);
    }
}
