//! One step of gradient descent: a weight and its memory in one pass, where they are (semantics 12.1, 12.2).

use super::{Accuracy, Axis, Flops, InferError, OpDef};
use crate::{
    DType, Data, Tensor, Type,
    loops::{Buf, Expr, Ty, f32c, math},
    lower::Lower,
};

/// What becomes of the agreement of an element whose gradient is exactly zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// It fades as for any gradient that says nothing.
    Standard,
    /// It stays.
    Freeze,
    /// It fades by a factor.
    Decay,
    /// It grows as if the gradient agreed with the running mean, unless that is zero.
    Inertia,
}

/// How a gradient becomes a step. `m` and `v` are running means of the gradient and of its square, bias corrected where they are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DescentRule {
    /// `w <- w (1 - lr wd) - lr m^ / (sqrt(v^) + eps)`; memory `m`, `v`.
    AdamW {
        /// Decay of the mean of gradients.
        beta1: f32,
        /// Decay of the mean of squares.
        beta2: f32,
        /// Added to the root.
        eps: f32,
    },
    /// `m <- mu m + g`, `w <- w (1 - lr wd) - lr m`; memory `m`.
    Momentum {
        /// Decay of the sum of gradients.
        mu: f32,
    },
    /// AdamW whose step is multiplied by `kappa = clamp(exp(lambda psi), least, most)`, where `psi` is the running mean of
    /// `sign(m) sign(g)`; memory `m`, `v`, `psi`.
    Agreement {
        /// Decay of the mean of gradients.
        beta1: f32,
        /// Decay of the mean of squares.
        beta2: f32,
        /// Added to the root.
        eps: f32,
        /// Decay of the agreement.
        rho: f32,
        /// What the agreement is multiplied by.
        lambda: f32,
        /// Bounds of `kappa`.
        bounds: [f32; 2],
        /// Elements without a gradient.
        idle: Idle,
        /// Factor of [`Idle::Decay`].
        fade: f32,
        /// Threshold and sharpness of a gate: `kappa <- 1 + sigmoid(sharpness (threshold - sqrt(v^) / (|m^| + eps))) (kappa - 1)`.
        gate: Option<[f32; 2]>,
        /// Whether `psi` is kept as `round(127 psi)` in a byte.
        bytes: bool,
    },
}

/// What a byte of the agreement stands for is divided by this.
const PSI_TOP: f32 = 127.0;

impl DescentRule {
    /// Names of the memory that every weight has, in the order of the operands.
    pub fn memory(&self) -> &'static [&'static str] {
        match self {
            DescentRule::AdamW { .. } => &["m", "v"],
            DescentRule::Momentum { .. } => &["m"],
            DescentRule::Agreement { .. } => &["m", "v", "psi"],
        }
    }

    /// The types of the memory of a weight, in the order of the operands.
    pub fn memory_types(&self, w: &Type) -> Vec<Type> {
        let narrow = |name: &str| name == "psi" && matches!(self, DescentRule::Agreement { bytes: true, .. });
        self.memory().iter().map(|name| w.with(if narrow(name) { DType::I8 } else { DType::F32 })).collect()
    }

    /// Decay of the running means, 0 for those that it has not.
    pub fn betas(&self) -> [f32; 2] {
        match *self {
            DescentRule::AdamW { beta1, beta2, .. } | DescentRule::Agreement { beta1, beta2, .. } => [beta1, beta2],
            DescentRule::Momentum { .. } => [0.0, 0.0],
        }
    }
}

/// `(w, memory.., g, rates f32 [5]) -> (w, memory..)`, all `f32` of one shape and updated in place; `rates` are those of
/// [`super::DescentRates`]: the factor of the gradient, the learning rate, the corrections of both running means, and the share of the
/// weight decay.
#[derive(Clone, Debug, PartialEq)]
pub struct Descend {
    /// How.
    pub rule: DescentRule,
    /// Weight decay, as a share of the learning rate.
    pub decay: f32,
}

/// `1 - beta`, rounded once.
fn rest(beta: f32) -> f32 {
    (1.0 - f64::from(beta)) as f32
}

fn sign(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

impl Descend {
    /// The number of tensors that are updated.
    fn n(&self) -> usize {
        1 + self.rule.memory().len()
    }

    /// The new values of one element.
    fn step(&self, old: &[f32], g: f32, rates: &[f32]) -> Vec<f32> {
        let [scale, lr, c1, c2, share] = rates[..] else { unreachable!("there are five rates") };
        let g = g * scale;
        let kept = old[0] * (1.0 - lr * (self.decay * share));
        let means = |beta1: f32, beta2: f32| {
            let m = beta1 * old[1] + rest(beta1) * g;
            (m, beta2 * old[2] + rest(beta2) * (g * g))
        };
        match self.rule {
            DescentRule::AdamW { beta1, beta2, eps } => {
                let (m, v) = means(beta1, beta2);
                vec![kept - lr * (m * c1) / ((v * c2).sqrt() + eps), m, v]
            }
            DescentRule::Momentum { mu } => {
                let m = mu * old[1] + g;
                vec![kept - lr * m, m]
            }
            DescentRule::Agreement { beta1, beta2, eps, rho, lambda, bounds, idle, fade, gate, bytes } => {
                let (m, v) = means(beta1, beta2);
                let (mean, root) = (m * c1, (v * c2).sqrt());
                let before = if bytes { old[3] / PSI_TOP } else { old[3] };
                let agreed = |a: f32| rho * before + rest(rho) * a;
                let psi = match idle {
                    _ if g != 0.0 => agreed(sign(m) * sign(g)),
                    Idle::Standard => agreed(0.0),
                    Idle::Freeze => before,
                    Idle::Decay => before * fade,
                    Idle::Inertia => agreed(sign(m).abs()),
                };
                let kappa = (lambda * psi).exp().clamp(bounds[0], bounds[1]);
                let kappa = gate.map_or(kappa, |[threshold, sharpness]| {
                    let open = sharpness * (threshold - root / (mean.abs() + eps));
                    1.0 + (kappa - 1.0) / (1.0 + (-open).exp())
                });
                let psi = if bytes { (psi.clamp(-1.0, 1.0) * PSI_TOP).round_ties_even() } else { psi };
                vec![kept - lr * kappa * (mean / (root + eps)), m, v, psi]
            }
        }
    }

    /// [`Descend::step`] as expressions; `old` are bound.
    fn emit(&self, cx: &mut Lower<'_>, old: &[Expr], g: Expr, rates: &[Expr]) -> Vec<Expr> {
        let [scale, lr, c1, c2, share] = rates else { unreachable!("there are five rates") };
        let g = cx.bind(g * scale);
        let kept = match self.decay {
            0.0 => old[0].clone(),
            decay => &old[0] * cx.b.bind(f32c(1.0) - lr * (f32c(decay) * share)),
        };
        let means = |cx: &mut Lower<'_>, beta1: f32, beta2: f32| {
            let m = cx.bind(f32c(beta1) * &old[1] + f32c(rest(beta1)) * &g);
            (m, cx.bind(f32c(beta2) * &old[2] + f32c(rest(beta2)) * (&g * &g)))
        };
        match self.rule {
            DescentRule::AdamW { beta1, beta2, eps } => {
                let (m, v) = means(cx, beta1, beta2);
                let step = lr * (&m * c1) / ((&v * c2).sqrt() + f32c(eps));
                vec![kept - step, m, v]
            }
            DescentRule::Momentum { mu } => {
                let m = cx.bind(f32c(mu) * &old[1] + &g);
                vec![kept - lr * &m, m]
            }
            DescentRule::Agreement { beta1, beta2, eps, rho, lambda, bounds, idle, fade, gate, bytes } => {
                let (m, v) = means(cx, beta1, beta2);
                let (mean, root) = (cx.bind(&m * c1), cx.bind((&v * c2).sqrt()));
                let none = || f32c(0.0);
                let sign = |x: &Expr| x.clone().lt(none()).select(f32c(-1.0), none().lt(x).select(f32c(1.0), none()));
                let before = if bytes { cx.bind(&old[3] / f32c(PSI_TOP)) } else { old[3].clone() };
                let agreed = |a: Expr| f32c(rho) * &before + f32c(rest(rho)) * a;
                let idle = match idle {
                    Idle::Standard => agreed(none()),
                    Idle::Freeze => before.clone(),
                    Idle::Decay => &before * f32c(fade),
                    Idle::Inertia => agreed(sign(&m).abs()),
                };
                let both = agreed(sign(&m) * sign(&g));
                let psi = cx.bind(g.eq(none()).select(idle, both));
                let kappa = math::exp(cx, f32c(lambda) * &psi).max(f32c(bounds[0])).min(f32c(bounds[1]));
                let kappa = match gate {
                    None => kappa,
                    Some([threshold, sharpness]) => {
                        let noise = &root / (mean.clone().abs() + f32c(eps));
                        let open = math::sigmoid(cx, f32c(sharpness) * (f32c(threshold) - noise));
                        f32c(1.0) + (kappa - f32c(1.0)) * open
                    }
                };
                let step = lr * kappa * (mean / (root + f32c(eps)));
                // The low byte of the bits of the rounded sum is the code, and a store keeps the low byte.
                let code =
                    || (psi.clone().max(f32c(-1.0)).min(f32c(1.0)) * f32c(PSI_TOP) + f32c(math::ROUND)).to_bits();
                let psi = if bytes { code() } else { psi };
                vec![kept - step, m, v, psi]
            }
        }
    }
}

impl OpDef for Descend {
    const NAME: &'static str = "descend";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let n = self.n();
        let fits = ins.len() == n + 2
            && ins[0].dtype == DType::F32
            && ins[1..n] == self.rule.memory_types(&ins[0])
            && ins[n] == ins[0]
            && ins[n + 1] == Type::f32(&[5]);
        if fits {
            return Ok(ins[..n].to_vec());
        }
        let memory = self.rule.memory().join(", ");
        Err(InferError::new(
            Self::NAME,
            format!("takes a weight f32, {memory} (a byte each where they are narrow), a gradient and five rates"),
        ))
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let n = self.n();
        let (g, rates) = (ins[n].as_f32(), ins[n + 1].as_f32());
        let mut out = vec![vec![]; n];
        for (i, &g) in g.iter().enumerate() {
            let value = |t: &&Tensor| match &t.data {
                Data::I8(codes) => f32::from(codes[i]),
                _ => t.as_f32()[i],
            };
            let old: Vec<f32> = ins[..n].iter().map(value).collect();
            out.iter_mut().zip(self.step(&old, g, rates)).for_each(|(o, x)| o.push(x));
        }
        let stored = |(values, t): (Vec<f32>, &&Tensor)| match t.ty.dtype {
            DType::I8 => Tensor { ty: t.ty.clone(), data: Data::I8(values.into_iter().map(|x| x as i8).collect()) },
            _ => Tensor::f32(&t.ty.dims, values),
        };
        out.into_iter().zip(ins).map(stored).collect()
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let each = match self.rule {
            DescentRule::AdamW { .. } => 16,
            DescentRule::Momentum { .. } => 6,
            DescentRule::Agreement { .. } => 40,
        };
        Flops::float(each * ins[0].numel())
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        let (n, ty, tys) = (self.n(), cx.ty(0).clone(), cx.in_types());
        let bufs: Vec<_> = (0..n + 2).map(|k| cx.buf(k)).collect();
        let row = cx.grid(ty.rows());
        let base = cx.bind(row * ty.cols());
        let rates: Vec<Expr> = (0..5).map(|i| cx.b.bind(Expr::load(bufs[n + 1], Expr::from(i)))).collect();
        cx.lanes(0, ty.cols(), 2, |cx, col| {
            let at = cx.bind(&base + col);
            let narrow = |k: usize| tys[k].dtype == DType::I8;
            let load = |(k, &b): (usize, &Buf)| {
                let x = Expr::load(b, &at);
                cx.b.bind(if narrow(k) { x.cast(Ty::F32) } else { x })
            };
            let old: Vec<Expr> = bufs[..n].iter().enumerate().map(load).collect();
            let new = self.emit(cx, &old, Expr::load(bufs[n], &at), &rates);
            new.into_iter().zip(&bufs).for_each(|(x, &b)| cx.store(b, &at, x));
        });
    }

    fn updates(&self) -> Vec<(usize, usize)> {
        (0..self.n()).map(|i| (i, i)).collect()
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        vec![Axis::Shared; ins.len()]
    }

    fn accuracy(&self) -> Accuracy {
        match self.rule {
            DescentRule::Agreement { .. } => Accuracy::Close { rtol: 1e-5, atol: 1e-6 },
            DescentRule::AdamW { .. } | DescentRule::Momentum { .. } => Accuracy::Bits,
        }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let adam = DescentRule::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
        let agreement = |idle, gate, bytes| DescentRule::Agreement {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            rho: 0.95,
            lambda: 0.1,
            bounds: [0.5, 2.0],
            idle,
            fade: 0.95,
            gate,
            bytes,
        };
        let of = |rule: DescentRule, decay, dims: &[usize]| {
            let w = Type::f32(dims);
            let memory = rule.memory_types(&w);
            (Descend { rule, decay }, [vec![w.clone()], memory, vec![w, Type::f32(&[5])]].concat())
        };
        vec![
            of(adam, 0.1, &[7, 11]),
            of(adam, 0.0, &[37]),
            of(DescentRule::Momentum { mu: 0.9 }, 0.1, &[3, 40]),
            of(agreement(Idle::Standard, None, false), 0.0, &[5, 9]),
            of(agreement(Idle::Freeze, Some([2.0, 4.0]), false), 0.1, &[2, 2, 17]),
            of(agreement(Idle::Decay, None, false), 0.0, &[33]),
            of(agreement(Idle::Inertia, None, false), 0.0, &[3, 8]),
            of(agreement(Idle::Decay, Some([2.0, 4.0]), true), 0.1, &[3, 40]),
        ]
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        let n = self.n();
        let mut t = super::random_tensor(ty, random);
        if let Data::I8(codes) = &mut t.data {
            codes.iter_mut().for_each(|c| *c = (*c).max(-127));
        }
        if let Data::F32(values) = &mut t.data {
            for (i, x) in values.iter_mut().enumerate() {
                *x = match k {
                    2 if n > 2 => x.abs(),
                    k if k == n && i % 3 == 0 => 0.0,
                    k if k == n + 1 => [0.7, 0.01, 2.5, 1.5, 0.5][i],
                    _ => *x,
                };
            }
        }
        t
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = |k: usize, ty: Type| {
            let mut ins = ins.clone();
            ins[k] = ty;
            (op.clone(), ins)
        };
        vec![with(2, Type::f32(&[7, 12])), with(4, Type::f32(&[3])), (op.clone(), ins[..4].to_vec())]
    }
}
