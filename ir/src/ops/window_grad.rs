//! The gradients of attention over persistent slots, a window and a memory.
//!
//! Weights are made again for every token; a head is one instance, which sums over its tokens in ascending order.

mod lower;

use super::{
    Accuracy, Axis, Flops, InferError, OpDef, WindowAttention,
    heads::{expect, operands},
};
use crate::{Tensor, Type, lower::Lower};

/// `(the operands of a WindowAttention up to pos, dy [R,T,H*K], keys, values, count if carried) ->` the gradients of its operands
/// before `pos` in their order, those of `pk` and `pv` as `[R,P,H*K]`, apart for every row.
///
/// With weights `w_i = softmax(s_i)` of slots with scores `s_i = q k_i / sqrt(K)` and values `v_i`:
/// `ds_i = w_i (dy v_i - sum_j w_j dy v_j)`, `dq = sum ds_i k_i / sqrt(K)`, `dk_i = ds_i q / sqrt(K)`, `dv_i = w_i dy`. Tokens of earlier
/// calls are constants.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowGrad {
    /// H.
    pub heads: usize,
    /// Tokens that are visible, the current one included; 0 for none.
    pub window: usize,
    /// Whether the keys and values of earlier calls are operands.
    pub carry: bool,
}

/// The places of the operands; `qr` and `kr` are those of `q` and `v` when there is no window.
#[derive(Clone, Copy)]
struct Places {
    qr: usize,
    kr: usize,
    v: usize,
    pk: usize,
    hn: usize,
    pos: usize,
    dy: usize,
    state: usize,
}

impl WindowGrad {
    fn forward(&self) -> WindowAttention {
        let Self { heads, window, carry } = *self;
        WindowAttention { heads, window, carry }
    }

    fn places(&self) -> Places {
        let n = if self.window > 0 { 2 } else { 0 };
        Places { qr: n / 2, kr: n, v: 1 + n, pk: 2 + n, hn: 4 + n, pos: 6 + n, dy: 7 + n, state: 8 + n }
    }

    fn cached(&self) -> bool {
        self.carry && self.window > 0
    }

    /// Most tokens of a window that a token of this call can see.
    fn reach(&self, tokens: usize) -> usize {
        if self.cached() { self.window } else { self.window.min(tokens) }
    }
}

impl OpDef for WindowGrad {
    const NAME: &'static str = "window_grad";

    fn infer(&self, ins: &[Type]) -> Result<Vec<Type>, InferError> {
        let at = self.places();
        operands(Self::NAME, ins, at.state + if self.cached() { 3 } else { 0 })?;
        let forward: Vec<Type> = ins[..at.dy].iter().chain(&ins[at.state..]).cloned().collect();
        let y = self.forward().infer(&forward)?.remove(0);
        expect(Self::NAME, "dy", &ins[at.dy], &y)?;
        let [slots, d] = ins[at.pk].dims[..] else {
            return Err(InferError::new(Self::NAME, format!("pk is {}, expected slots of one group", ins[at.pk])));
        };
        let mut outs = ins[..at.pos].to_vec();
        outs[at.pk..at.hn].fill(Type::f32(&[y.dims[0], slots, d]));
        Ok(outs)
    }

    fn eval(&self, ins: &[&Tensor]) -> Vec<Tensor> {
        let [rows, tokens, d] = ins[0].ty.dims[..] else { unreachable!("checked by infer") };
        let (at, k_n, window) = (self.places(), d / self.heads, self.window);
        let slots = ins[at.pk].ty.dims[0];
        let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
        let outs = self.infer(&types).expect("accepted before");
        let mut grads: Vec<Vec<f64>> = outs.iter().map(|ty| vec![0.0; ty.numel()]).collect();
        let pos = ins[at.pos].to_i64();
        let counts = if self.cached() { ins[at.state + 2].to_i64() } else { vec![0; rows * self.heads] };
        let part = |i: usize, row: usize, h: usize| -> Vec<f64> {
            ins[i].as_f32()[row * d + h * k_n..][..k_n].iter().map(|&x| x.into()).collect()
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let scale = (k_n as f64).powf(-0.5);
        for (r, h, t) in (0..rows).flat_map(|r| (0..self.heads).flat_map(move |h| (0..tokens).map(move |t| (r, h, t))))
        {
            let row = r * tokens + t;
            // Operands of query, key and value of every slot; where the gradients of key and value go, if anywhere.
            type Slot = ([(usize, usize); 3], Option<[(usize, usize); 2]>);
            let mut seen: Vec<Slot> = vec![];
            for p in 0..slots {
                let to = [(at.pk, r * slots + p), (at.pk + 1, r * slots + p)];
                seen.push(([(0, row), (at.pk, p), (at.pk + 1, p)], Some(to)));
            }
            if window > 0 {
                let c = counts[r * self.heads + h].max(0) as usize + t;
                for lag in 0..=c.min(window - 1).min(pos[row].max(0) as usize) {
                    seen.push(match t.checked_sub(lag) {
                        Some(t) => {
                            let from = [(at.kr, r * tokens + t), (at.v, r * tokens + t)];
                            ([(at.qr, row), from[0], from[1]], Some(from))
                        }
                        None => {
                            let slot = r * window + (c - lag) % window;
                            ([(at.qr, row), (at.state, slot), (at.state + 1, slot)], None)
                        }
                    });
                }
            }
            seen.push(([(0, row), (at.hn, row), (at.hn + 1, row)], Some([(at.hn, row), (at.hn + 1, row)])));
            let dy = part(at.dy, row, h);
            let of = |(i, row): (usize, usize)| part(i, row, h);
            let scores: Vec<f64> = seen.iter().map(|(s, _)| dot(&of(s[0]), &of(s[1])) * scale).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp() / total).collect();
            let values: Vec<f64> = seen.iter().map(|(s, _)| dot(&dy, &of(s[2]))).collect();
            let mean = dot(&weights, &values);
            for (((slot, to), w), value) in seen.iter().zip(&weights).zip(&values) {
                let ds = w * (value - mean) * scale;
                let mut add = |(i, row): (usize, usize), x: &[f64], f: f64| {
                    let out = &mut grads[i][row * d + h * k_n..][..k_n];
                    out.iter_mut().zip(x).for_each(|(o, x)| *o += f * x);
                };
                add(slot[0], &of(slot[1]), ds);
                if let Some([key, value]) = *to {
                    add(key, &of(slot[0]), ds);
                    add(value, &dy, *w);
                }
            }
        }
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        grads.into_iter().zip(outs).map(|(x, ty)| Tensor::f32(&ty.dims, narrow(x))).collect()
    }

    fn flops(&self, ins: &[Type], _: &[Type]) -> Flops {
        let seen = ins[self.places().pk].dims[0] + self.reach(ins[0].dims[1].div_ceil(2)) + 1;
        Flops::float(ins[0].numel() * 10 * seen)
    }

    fn lower(&self, cx: &mut Lower<'_>) {
        lower::lower(self, cx);
    }

    fn axes(&self, ins: &[Type]) -> Vec<Axis> {
        let (mut axes, pk) = (vec![Axis::Rows; ins.len()], self.places().pk);
        axes[pk..pk + 2].fill(Axis::Weight { rank: 2 });
        axes
    }

    fn accuracy(&self) -> Accuracy {
        Accuracy::Close { rtol: 5e-5, atol: 1e-5 }
    }

    fn samples() -> Vec<(Self, Vec<Type>)> {
        let make = |(op, mut ins): (WindowAttention, Vec<Type>)| {
            let WindowAttention { heads, window, carry } = op;
            let op = WindowGrad { heads, window, carry };
            ins.insert(op.places().dy, ins[0].clone());
            (op, ins)
        };
        let all = WindowAttention::samples().into_iter().map(make);
        all.filter(|(op, ins)| ins[op.places().pk].dims.len() == 2).collect()
    }

    fn sample_input(&self, k: usize, ty: &Type, random: &mut dyn FnMut() -> f32) -> Tensor {
        match k {
            k if k == self.places().dy => super::random_tensor(ty, random),
            k if k > self.places().dy => self.forward().sample_input(k - 1, ty, random),
            k => self.forward().sample_input(k, ty, random),
        }
    }

    fn rejects() -> Vec<(Self, Vec<Type>)> {
        let (op, ins) = Self::samples().remove(0);
        let with = super::heads::with_operand;
        let at = op.places();
        vec![
            with(at.dy, Type::f32(&[1, 1, 1])),
            with(at.pk, Type::f32(&[1])),
            with(at.state, Type::f32(&[1])),
            (WindowGrad { carry: !op.carry, ..op }, ins),
        ]
    }
}
