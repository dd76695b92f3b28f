//! Phase 2 of the Span Knot: sketch a state as bits, relax them, read the flipped ones back.
//!
//! Everything between the rounded input and the flip set is integer or exact double arithmetic, so it is free of summation order.

use super::{Axis, Flops, InferError, OpDef, VjpCx};
use crate::{DType, Data, Tensor, Type, Value, lower::Lower};

mod lower;

/// `(h [R, T, d], emb [R, T, d], pos i32 [R, T], signs i8 [N / P, P], role i8 [N], (c i16 [R, N])) -> (delta [R, T, d], stats [R, T, 3], (c))`.
///
/// `P` is the next power of two of `d`; `signs` are the diagonals of the sketch transform and `role` the role vector of the layer,
/// all +-1. Section 8.1 of the semantics with erratum 3:
/// * sketch: `x = clamp(round(256 h / sqrt(mean(h^2) + eps)), +-32767)`, `a` = stacked Walsh-Hadamard transforms of `x signs`,
///   `rho = sqrt(sum x^2)`; the filler is the sign of the sketch of `emb`;
/// * `m` is the sign of the counters `c`, absent at the first token of a document; `bound = filler * role turned by pos mod 64`;
/// * relaxation: see [`SpanKnot::relax`];
/// * `c = c - (c >> 6) + 256 s`, `delta = R^T (s - s0) / sqrt(P N)`, `stats` = flips, energy before, energy after.
///
/// The sum of squares of a row is striped by eight. Without `carry` every row starts from zero counters.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanKnot {
    /// Bits of the sketch, `N`.
    pub bits: usize,
    /// Weights of the autoregressive, coherence and binding terms.
    pub weights: [f64; 3],
    /// The greatest number of relaxation steps.
    pub iters: usize,
    /// The fraction of bits that one step may flip.
    pub fraction: f64,
    /// A step that lowers the energy by less is the last one.
    pub exit_delta: f64,
    /// Regulariser of the root mean square.
    pub eps: f32,
    /// Whether the counters are a state of the stream.
    pub carry: bool,
}

/// What [`SpanKnot::relax`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Relaxed {
    /// Signs of the sketch.
    pub start: Vec<i32>,
    /// Signs after the relaxation.
    pub end: Vec<i32>,
    /// The number of flipped bits.
    pub flips: usize,
    /// Energy of `start` and `end` without the constant terms.
    pub energy: [f64; 2],
}

const ROTATION: usize = 64;
const MAX_WIDTH: usize = 32_768;

/// `x / (sqrt(mean(x^2) + eps))` times 256 as integers; the squares are summed in eight stripes as kernels do.
fn rounded(h: &[f32], eps: f32) -> Vec<i32> {
    let mut stripes = [0.0f32; 8];
    for (i, &x) in h.iter().enumerate() {
        stripes[i % 8] = x.mul_add(x, stripes[i % 8]);
    }
    for half in [4, 2, 1] {
        for j in 0..half {
            stripes[j] += stripes[j + half];
        }
    }
    let r = 1.0 / (stripes[0] / h.len() as f32 + eps).sqrt();
    h.iter().map(|&x| (x * r * 256.0).clamp(-32767.0, 32767.0).round_ties_even() as i32).collect()
}

/// Unnormalised Walsh-Hadamard transform of each run of `p` elements, in place.
fn hadamard(a: &mut [i32], p: usize) {
    let mut h = 1;
    while h < p {
        for i in (0..a.len()).filter(|i| i & h == 0) {
            (a[i], a[i + h]) = (a[i] + a[i + h], a[i] - a[i + h]);
        }
        h *= 2;
    }
}

fn sign(x: i32) -> i32 {
    if x >= 0 { 1 } else { -1 }
}

impl SpanKnot {
    /// The sketch of one row: `a [N]` and `rho`. `signs [N / P, P]`.
    pub fn sketch(&self, h: &[f32], signs: &[i32]) -> (Vec<i32>, f64) {
        let (x, p) = (rounded(h, self.eps), h.len().next_power_of_two());
        let mut a: Vec<i32> = signs.iter().enumerate().map(|(i, s)| x.get(i % p).map_or(0, |x| x * s)).collect();
        hadamard(&mut a, p);
        (a, x.iter().map(|&x| f64::from(x * x)).sum::<f64>().sqrt())
    }

    /// Greedy relaxation of one token. The field is `a + round(w2 / 2 rho) m + round(w3 / 2 rho) bound` (weights relative to the first);
    /// every step flips the bits with the largest field among those that oppose it, at most `fraction N`, ties to the lowest bit.
    /// `a [N]`, `m [N]` in -1, 0, 1 (0 = term absent), `bound [N]` +-1.
    pub fn relax(&self, a: &[i32], rho: f64, m: &[i32], bound: &[i32]) -> Relaxed {
        let (n, [w1, w2, w3]) = (self.bits as f64, self.weights);
        let [c2, c3] = self.couplings().map(|c| (c * rho).round_ties_even() as i32);
        let field: Vec<i32> = (0..self.bits).map(|b| a[b] + c2 * m[b] + c3 * bound[b]).collect();
        let start: Vec<i32> = a.iter().map(|&a| sign(a)).collect();
        let mut end = start.clone();
        let mut flips = 0;
        for _ in 0..self.iters {
            let mut order: Vec<usize> = (0..self.bits).filter(|&b| end[b].signum() * field[b].signum() < 0).collect();
            order.sort_by_key(|&b| std::cmp::Reverse(field[b].abs()));
            order.truncate(self.limit());
            if order.is_empty() {
                break;
            }
            order.iter().for_each(|&b| end[b] = -end[b]);
            flips += order.len();
            let gain: i64 = order.iter().map(|&b| i64::from(field[b].abs())).sum();
            if 2.0 * w1 * gain as f64 / (n * rho) < self.exit_delta {
                break;
            }
        }
        let dot = |x: &[i32], y: &[i32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
        let energy = |z: &[i32]| {
            let auto = -w1 * dot(z, a) / (n * rho.max(1.0));
            let present = m.iter().any(|&m| m != 0);
            let coherence = if present { w2 * (1.0 - dot(z, m) / n) / 2.0 } else { 0.0 };
            auto + coherence + w3 * (1.0 - dot(z, bound) / n) / 2.0
        };
        let energy = [energy(&start), energy(&end)];
        Relaxed { start, end, flips, energy }
    }

    /// Field of the coherence and the binding term for `rho = 1`.
    fn couplings(&self) -> [f64; 2] {
        let [w1, w2, w3] = self.weights;
        [w2 / (2.0 * w1), w3 / (2.0 * w1)]
    }

    /// The number of bits that one step may flip.
    fn limit(&self) -> usize {
        (self.fraction * self.bits as f64) as usize
    }

    /// A bound on the field of a bit that may flip: the norm of `x` is at most `256 sqrt(d)` before rounding.
    fn greatest_gain(&self, d: usize) -> f64 {
        let rho = 256.5 * (d as f64).sqrt();
        self.couplings().iter().map(|c| (c.abs() * rho).ceil()).sum()
    }

    fn check(&self, d: usize) -> Result<(), String> {
        let [w1, w2, w3] = self.weights;
        if !(w1 > 0.0 && w2.is_finite() && w3.is_finite() && w1.is_finite()) {
            return Err(format!("weights {:?}, expected finite numbers and a positive first one", self.weights));
        }
        if d > MAX_WIDTH || self.bits < ROTATION || !self.bits.is_multiple_of(d.next_power_of_two()) {
            let p = d.next_power_of_two();
            return Err(format!("{} bits for {d} columns, expected a multiple of {p}, at least {ROTATION}", self.bits));
        }
        let most = self.bits.next_power_of_two() as f64 * (self.greatest_gain(d) + 2.0).max(256.5 * (d as f64).sqrt());
        if most > f64::from(i32::MAX) {
            return Err(
                "the weights or the bits are too large for exact integers, expected about one and 8192".to_owned()
            );
        }
        if !(0.0..=1.0).contains(&self.fraction) {
            return Err(format!("fraction {}, expected 0 to 1", self.fraction));
        }
        Ok(())
    }
}

impl OpDef for SpanKnot {
    const NAME: &'static str = "span_knot";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let [h, emb, pos, signs, role, state @ ..] = ins else {
            return Err(InferError::new(Self::NAME, "takes h, emb, pos, signs, role and, to carry, the counters"));
        };
        if h.dtype != DType::F32 || h.dims.len() != 3 || emb != h || *pos != Type::i32(&h.dims[..2]) {
            let why = format!("wants h and emb [R, T, d] and pos i32 [R, T], found {h}, {emb} and {pos}");
            return Err(InferError::new(Self::NAME, why));
        }
        let (rows, d, n) = (h.dims[0], h.cols(), self.bits);
        self.check(d).map_err(|why| InferError::new(Self::NAME, why))?;
        let p = d.next_power_of_two();
        let counters = Type::new(DType::I16, &[rows, n]);
        let tables = *signs == Type::new(DType::I8, &[n / p, p]) && *role == Type::new(DType::I8, &[n]);
        let states = if self.carry { state == [counters.clone()] } else { state.is_empty() };
        if !tables || !states {
            let why = format!("wants signs i8[{}, {p}], role i8[{n}] and, to carry, {counters}", n / p);
            return Err(InferError::new(Self::NAME, why));
        }
        let mut outs = vec![h.clone(), Type::f32(&[rows, h.dims[1], 3])];
        outs.extend(self.carry.then_some(counters));
        Ok(outs)
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[0].ty.dims[..] else { unreachable!("infer accepted three dimensions") };
        let (n, p) = (self.bits, d.next_power_of_two());
        let ints = |k: usize| ins[k].to_i64().into_iter().map(|x| x as i32).collect::<Vec<i32>>();
        let (pos, signs, role) = (ints(2), ints(3), ints(4));
        let mut counters = if self.carry { ints(5) } else { vec![0; rows * n] };
        let (mut delta, mut stats) = (vec![], vec![]);
        for r in 0..rows {
            let c = &mut counters[r * n..][..n];
            for (t, pos) in pos[r * tokens..][..tokens].iter().enumerate() {
                let (row, first) = (r * tokens + t, *pos == 0);
                if first {
                    c.fill(0);
                }
                let (a, rho) = self.sketch(&ins[0].as_f32()[row * d..][..d], &signs);
                let (filler, _) = self.sketch(&ins[1].as_f32()[row * d..][..d], &signs);
                let m: Vec<i32> = c.iter().map(|&c| if first { 0 } else { sign(c) }).collect();
                let turn = pos.rem_euclid(ROTATION as i32) as usize;
                let bound: Vec<i32> = (0..n).map(|b| role[(b + n - turn) % n] * sign(filler[b])).collect();
                let relaxed = self.relax(&a, rho, &m, &bound);
                c.iter_mut().zip(&relaxed.end).for_each(|(c, s)| *c = *c - (*c >> 6) + 256 * s);
                let mut back: Vec<i32> = relaxed.end.iter().zip(&relaxed.start).map(|(s, s0)| s - s0).collect();
                hadamard(&mut back, p);
                let sum = |j: usize| (0..n / p).map(|k| back[k * p + j] * signs[k * p + j]).sum::<i32>();
                delta.extend((0..d).map(|j| sum(j) as f32 / ((p * n) as f64).sqrt() as f32));
                stats.push(relaxed.flips as f32);
                stats.extend(relaxed.energy.map(|e| e as f32));
            }
        }
        let mut outs = vec![Tensor::f32(&ins[0].ty.dims, delta), Tensor::f32(&[rows, tokens, 3], stats)];
        if self.carry {
            let data = Data::I16(counters.into_iter().map(|c| c as i16).collect());
            outs.push(Tensor { ty: ins[5].ty.clone(), data });
        }
        outs
    }

    fn vjp(&self, cx: &mut VjpCx<'_>) -> Result<Vec<Option<Value>>, InferError> {
        // Signs and flips are constants for gradients.
        Ok(vec![None; cx.ins.len()])
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let stages = ins[0].cols().next_power_of_two().ilog2() as usize;
        Flops::float(ins[0].rows() * self.bits * (3 * stages + 20))
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        lower::lower(self, cx);
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        if self.carry { vec![(5, 2)] } else { vec![] }
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        [Axis::Rows, Axis::Rows, Axis::Rows, Axis::Shared, Axis::Shared, Axis::Rows][..ins.len()].to_vec()
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let of = |bits: usize, iters, fraction, carry, [r, t, d]: [usize; 3]| {
            let weights = [1.0, 0.3, 0.2];
            let op = SpanKnot { bits, weights, iters, fraction, exit_delta: 1e-4, eps: 1e-6, carry };
            let (h, p) = (Type::f32(&[r, t, d]), d.next_power_of_two());
            let signs = Type::new(DType::I8, &[bits / p, p]);
            let mut ins = vec![h.clone(), h, Type::i32(&[r, t]), signs, Type::new(DType::I8, &[bits])];
            ins.extend(carry.then(|| Type::new(DType::I16, &[r, bits])));
            (op, ins)
        };
        vec![
            of(128, 3, 0.05, true, [2, 5, 13]),
            of(256, 2, 0.02, false, [1, 4, 32]),
            of(64, 3, 1.0, true, [3, 1, 3]),
            of(192, 1, 0.02, false, [1, 2, 50]),
            of(64, 3, 0.01, false, [1, 2, 1]),
            of(64, 0, 0.5, true, [1, 2, 8]),
            // As many transforms as lanes, and tokens that make it worth while to have them side by side.
            of(128, 3, 0.05, true, [2, 9, 13]),
            of(512, 3, 0.02, false, [1, 70, 20]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let n = ty.numel();
        let data = match k {
            // Rows continue at 5, the second one starts over in the middle.
            2 => {
                let t = ty.cols();
                let at = |i: usize| if i / t == 1 && i % t >= t / 2 { i % t - t / 2 } else { 5 + i % t + 60 * (i / t) };
                Data::I32((0..n).map(|i| at(i) as i32).collect())
            }
            3 | 4 => Data::I8((0..n).map(|_| if random() < 0.0 { -1 } else { 1 }).collect()),
            5 => Data::I16((0..n).map(|_| (random() * 16_000.0) as i16).collect()),
            _ => return super::random_tensor(ty, random),
        };
        Tensor { ty: ty.clone(), data }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (good, ins) = Self::samples().remove(0);
        let without = |k: usize| [&ins[..k], &ins[k + 1..]].concat();
        let with = |k: usize, ty: Type| [&ins[..k], &[ty], &ins[k + 1..]].concat();
        let weights = |weights| SpanKnot { weights, ..good.clone() };
        vec![
            (good.clone(), without(5)),
            (good.clone(), without(0)),
            (good.clone(), with(1, Type::f32(&[2, 5, 12]))),
            (good.clone(), with(3, Type::new(DType::I8, &[16, 8]))),
            (SpanKnot { carry: false, ..good.clone() }, ins.clone()),
            (SpanKnot { bits: 120, ..good.clone() }, ins.clone()),
            (SpanKnot { fraction: 2.0, ..good.clone() }, ins.clone()),
            (weights([0.0, 0.3, 0.2]), ins.clone()),
            (weights([1e-9, 0.3, 0.2]), ins.clone()),
        ]
    }
}
