//! The meaning of the gradients: in f64, with the states of all tokens at once.

use super::{ALPHA, DY, ETA, INIT, K, POS, Q, STATE, THETA, TINY, TitansGrad, V};
use crate::Tensor;

/// Weights, momentum and anchor of one head, each of two layers.
#[derive(Clone)]
struct State {
    w: [Vec<f64>; 2],
    s: [Vec<f64>; 2],
    a: [Vec<f64>; 2],
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `W x`.
fn times(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

/// `W^T x`.
fn transposed(w: &[f64], x: &[f64]) -> Vec<f64> {
    let n = w.len() / x.len();
    (0..n).map(|j| x.iter().enumerate().map(|(i, x)| w[i * n + j] * x).sum()).collect()
}

/// `w += a b^T f`.
fn outer(w: &mut [f64], a: &[f64], b: &[f64], f: f64) {
    w.iter_mut().enumerate().for_each(|(i, w)| *w += f * a[i / b.len()] * b[i % b.len()]);
}

fn scaled(x: &[f64], f: f64) -> Vec<f64> {
    x.iter().map(|x| x * f).collect()
}

fn product(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

fn add(to: &mut [f64], x: &[f64], f: f64) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += f * x);
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

fn slope(x: f64) -> f64 {
    sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))
}

fn bend(x: f64) -> f64 {
    let s = sigmoid(x);
    s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
}

fn each(x: &[f64], f: fn(f64) -> f64) -> Vec<f64> {
    x.iter().map(|&x| f(x)).collect()
}

/// What the memory's own gradient at token `k`, `v` consists of: `u`, `z`, `r`, `A2^T r`, `d`, and the factor of the step.
struct Inner {
    u: Vec<f64>,
    z: Vec<f64>,
    r: Vec<f64>,
    e: Vec<f64>,
    d: Vec<f64>,
    c: f64,
}

fn inner(a: &[Vec<f64>; 2], k: &[f64], v: &[f64], normalise: bool) -> Inner {
    let u = times(&a[0], k);
    let z = each(&u, silu);
    let r: Vec<f64> = times(&a[1], &z).iter().zip(k).zip(v).map(|((x, k), v)| 2.0 * (k + x - v)).collect();
    let e = transposed(&a[1], &r);
    let d = product(&e, &each(&u, slope));
    let c = if normalise { 1.0 / (1.0 + dot(&z, &z) + dot(&d, &d) / (dot(&r, &r) + f64::from(TINY))) } else { 1.0 };
    Inner { u, z, r, e, d, c }
}

pub(super) fn eval(op: &TitansGrad, ins: &[&Tensor]) -> Vec<Tensor> {
    let [rows, tokens, width] = ins[Q].ty.dims[..] else { unreachable!("checked by infer") };
    let (h_n, k_n, m_n) = (op.heads, width / op.heads, ins[INIT].ty.dims[1]);
    let size = m_n * k_n;
    let wide = |i: usize| -> Vec<f64> { ins[i].as_f32().iter().map(|&x| x.into()).collect() };
    let all: Vec<Vec<f64>> = (0..POS).map(wide).collect();
    let (init, dy, pos) = ([wide(INIT), wide(INIT + 1)], wide(DY), ins[POS].to_i64());
    let mut grads: Vec<Vec<f64>> = ins[..POS].iter().map(|t| vec![0.0; t.ty.numel()]).collect();
    let mut dinit = [vec![0.0; rows * h_n * size], vec![0.0; rows * h_n * size]];
    for at in 0..rows * h_n {
        let (r, h) = (at / h_n, at % h_n);
        let state = |i: usize| if op.carry { wide(STATE + i)[at * size..][..size].to_vec() } else { vec![0.0; size] };
        let mut now = State { w: [state(0), state(3)], s: [state(1), state(4)], a: [state(2), state(5)] };
        let place = |t: usize| {
            let gate = (r * tokens + t) * h_n + h;
            (gate, gate * k_n..(gate + 1) * k_n)
        };
        let gates = |gate: usize| (all[ALPHA][gate].min(0.999), all[ETA][gate].max(1e-6), all[THETA][gate]);
        let mut seen = vec![];
        for t in 0..tokens {
            let (gate, cols) = place(t);
            let position = pos[r * tokens + t];
            for (l, init) in init.iter().enumerate() {
                if position == 0 {
                    now.w[l] = init[h * size..][..size].to_vec();
                    now.s[l] = vec![0.0; size];
                }
                if position % op.inner as i64 == 0 {
                    now.a[l] = now.w[l].clone();
                }
            }
            seen.push(now.clone());
            let (k, v) = (&all[K][cols.clone()], &all[V][cols]);
            let i = inner(&now.a, k, v, op.normalise);
            let (alpha, eta, theta) = gates(gate);
            for (l, (left, right)) in [(&i.d, k), (&i.r, &i.z[..])].into_iter().enumerate() {
                now.s[l].iter_mut().for_each(|s| *s *= eta);
                outer(&mut now.s[l], left, right, -theta * i.c);
                now.w[l] = scaled(&now.w[l], 1.0 - alpha);
                add(&mut now.w[l], &now.s[l], 1.0);
            }
        }
        let none = || [vec![0.0; size], vec![0.0; size]];
        let (mut dw, mut ds, mut da) = (none(), none(), none());
        for t in (0..tokens).rev() {
            let (gate, cols) = place(t);
            let State { w, s, a } = &seen[t];
            let [q, k, v] = [Q, K, V].map(|i| &all[i][cols.clone()]);
            let dy = &dy[cols.clone()];
            let (alpha, eta, theta) = gates(gate);
            let i = inner(a, k, v, op.normalise);
            let (mut dalpha, mut deta) = (0.0, 0.0);
            for l in 0..2 {
                add(&mut ds[l], &dw[l], 1.0);
                dalpha -= dot(&dw[l], &w[l]);
                deta += dot(&ds[l], &s[l]);
                dw[l].iter_mut().for_each(|x| *x *= 1.0 - alpha);
            }
            let (g1, g2) = (times(&ds[0], k), times(&ds[1], &i.z));
            grads[ALPHA][gate] = if all[ALPHA][gate] <= 0.999 { dalpha } else { 0.0 };
            grads[ETA][gate] = if all[ETA][gate] >= 1e-6 { deta } else { 0.0 };
            grads[THETA][gate] = -i.c * (dot(&i.d, &g1) + dot(&i.r, &g2));
            let mut dk = scaled(&transposed(&ds[0], &i.d), -theta * i.c);
            let mut dz = scaled(&transposed(&ds[1], &i.r), -theta * i.c);
            let (mut dd, mut dr) = (scaled(&g1, -theta), scaled(&g2, -theta));
            if op.normalise {
                let r2 = dot(&i.r, &i.r) + f64::from(TINY);
                let n = -i.c * i.c * (dot(&dr, &i.r) + dot(&dd, &i.d));
                (dd, dr) = (scaled(&dd, i.c), scaled(&dr, i.c));
                add(&mut dd, &i.d, 2.0 * n / r2);
                add(&mut dr, &i.r, -2.0 * n * dot(&i.d, &i.d) / (r2 * r2));
                add(&mut dz, &i.z, 2.0 * n);
            }
            let b = product(&dd, &each(&i.u, slope));
            let mut du = product(&product(&dd, &i.e), &each(&i.u, bend));
            add(&mut dr, &times(&a[1], &b), 1.0);
            outer(&mut da[1], &i.r, &b, 1.0);
            outer(&mut da[1], &dr, &i.z, 2.0);
            add(&mut dz, &transposed(&a[1], &dr), 2.0);
            add(&mut dk, &dr, 2.0);
            grads[V][cols.clone()].copy_from_slice(&scaled(&dr, -2.0));
            add(&mut du, &product(&dz, &each(&i.u, slope)), 1.0);
            outer(&mut da[0], &du, k, 1.0);
            add(&mut dk, &transposed(&a[0], &du), 1.0);
            grads[K][cols.clone()].copy_from_slice(&dk);
            let p = times(&w[0], q);
            let f = product(&transposed(&w[1], dy), &each(&p, slope));
            outer(&mut dw[1], dy, &each(&p, silu), 1.0);
            outer(&mut dw[0], &f, q, 1.0);
            let mut dq = transposed(&w[0], &f);
            add(&mut dq, dy, 1.0);
            grads[Q][cols].copy_from_slice(&dq);
            let position = pos[r * tokens + t];
            for l in 0..2 {
                ds[l].iter_mut().for_each(|x| *x *= eta);
                if position % op.inner as i64 == 0 {
                    let joined = std::mem::replace(&mut da[l], vec![0.0; size]);
                    add(&mut dw[l], &joined, 1.0);
                }
                if position == 0 {
                    add(&mut dinit[l][at * size..][..size], &dw[l], 1.0);
                    (dw[l], ds[l]) = (vec![0.0; size], vec![0.0; size]);
                }
            }
        }
    }
    let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
    let per_row = |l: usize| [&[rows], &ins[INIT + l].ty.dims[..]].concat();
    let first = grads.into_iter().zip(ins).map(|(x, t)| Tensor::f32(&t.ty.dims, narrow(x)));
    let last = dinit.into_iter().enumerate().map(|(l, x)| Tensor::f32(&per_row(l), narrow(x)));
    first.chain(last).collect()
}
