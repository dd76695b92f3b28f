//! The kernel of the gradients: one instance for every head of a row.

use super::{ALPHA, DY, ETA, INIT, K, POS, Q, STATE, THETA, TINY, TitansGrad, V};
use crate::{
    DType,
    loops::{Acc, Buf, Expr, Ty, f32c, i32c, int, math},
    lower::Lower,
    ops::heads::{Pieces, clear, dots},
};

const MAX_ALPHA: f32 = 0.999;
const MIN_ETA: f32 = 1e-6;

/// Places of the six matrices of a state, in the order of the operands.
const W1: usize = 0;
const S1: usize = 1;
const A1: usize = 2;
const W2: usize = 3;
const S2: usize = 4;
const A2: usize = 5;

/// Vectors of `m` elements of one token.
struct Wide {
    u: Buf,
    z: Buf,
    e: Buf,
    d: Buf,
    dd: Buf,
    dz: Buf,
    /// `b`, then `f`.
    b: Buf,
    du: Buf,
    hidden: Buf,
}

/// One head of one row.
struct Frame<'a> {
    op: &'a TitansGrad,
    k: usize,
    m: usize,
    /// States of the tokens of a piece.
    states: Buf,
    /// Gradient of the state.
    grad: Buf,
    wide: Wide,
    /// `r` of a token.
    r: Buf,
    /// Its gradient.
    dr: Buf,
    /// The gradient of `k`.
    dk: Buf,
    /// Gradients of the initial weights.
    sums: [Buf; 2],
    init: Expr,
    row0: Expr,
    h: Expr,
    at: Expr,
}

pub(super) fn lower(op: &TitansGrad, cx: &mut Lower<'_>) {
    let [rows, tokens, d] = cx.ty(Q).dims[..] else { unreachable!("checked by infer") };
    let (k, m) = (d / op.heads, cx.ty(INIT).dims[1]);
    let all = 6 * k * m;
    let at = cx.grid(rows * op.heads);
    let (r, h) = (cx.bind(&at / op.heads), cx.bind(&at % op.heads));
    let pieces = Pieces::new(cx, tokens, all);
    let mut scratch = |name: &str, len: usize| cx.scratch(name, DType::F32, len);
    let wide = Wide {
        u: scratch("u", m),
        z: scratch("z", m),
        e: scratch("e", m),
        d: scratch("d", m),
        dd: scratch("dd", m),
        dz: scratch("dz", m),
        b: scratch("b", m),
        du: scratch("du", m),
        hidden: scratch("hidden", m),
    };
    let f = Frame {
        op,
        k,
        m,
        states: pieces.states,
        grad: scratch("grad", all),
        wide,
        r: scratch("r", k),
        dr: scratch("dr", k),
        dk: scratch("dk", k),
        sums: [scratch("first", k * m), scratch("second", k * m)],
        init: cx.bind(&h * (k * m)),
        row0: cx.bind(r * tokens),
        h,
        at,
    };
    let start = Expr::from(0);
    clear(cx, f.states, &start, all);
    if op.carry {
        let from = cx.bind(&f.at * (k * m));
        for s in 0..6 {
            let state = cx.buf(STATE + s);
            cx.lanes(0, k * m, 4, |cx, i| cx.store(f.states, &i + s * k * m, Expr::load(state, &from + &i)));
        }
    }
    clear(cx, f.grad, &start, all);
    let out = cx.bind(&f.at * (k * m));
    for l in [6, 7] {
        cx.lanes(0, k * m, 4, |cx, i| cx.put(l, &out + i, f32c(0.0)));
        clear(cx, f.sums[l - 6], &start, k * m);
    }
    pieces.there_and_back(cx, &|cx, t, from, to| f.step(cx, t, from, to), &|cx, t, from| f.back(cx, t, from));
}

/// A vector by index.
type Vector<'f> = &'f dyn Fn(&Expr) -> Expr;

impl Frame<'_> {
    fn size(&self) -> usize {
        self.k * self.m
    }

    /// The row of token `t`, its first column and its gate.
    fn place(&self, cx: &mut Lower<'_>, t: &Expr) -> [Expr; 3] {
        let row = cx.bind(&self.row0 + t);
        let gate = cx.bind(&row * self.op.heads + &self.h);
        [row, cx.bind(&gate * self.k), gate]
    }

    fn gates(&self, cx: &mut Lower<'_>, gate: &Expr) -> [Expr; 3] {
        let [alpha, eta, theta] = [ALPHA, ETA, THETA].map(|i| Expr::load(cx.buf(i), gate));
        [alpha.min(f32c(MAX_ALPHA)), eta.max(f32c(MIN_ETA)), theta].map(|e| cx.bind(e))
    }

    /// `store(i, sum of M[i, j] x[j])` for the matrix of `shape` at `base` of `buf`.
    fn times(
        &self,
        cx: &mut Lower<'_>,
        (buf, base): (Buf, Expr),
        [rows, cols]: [usize; 2],
        x: Vector<'_>,
        store: &dyn Fn(&mut Lower<'_>, &Expr, Expr),
    ) {
        let base = cx.bind(base);
        let matrix = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(buf, &base + i * cols + j);
        dots(cx, (0.into(), rows.into()), cols, &matrix, &|_, j| x(j), store);
    }

    /// `store(j, sum of M[i, j] x[i])`.
    fn transposed(
        &self,
        cx: &mut Lower<'_>,
        (buf, base): (Buf, Expr),
        [rows, cols]: [usize; 2],
        x: Vector<'_>,
        store: &dyn Fn(&mut Lower<'_>, &Expr, Expr),
    ) {
        let base = cx.bind(base);
        cx.lanes(0, cols, 4, |cx, j| {
            let sum = cx.local(f32c(0.0));
            cx.each(0, rows, |cx, i| {
                let w = Expr::load(buf, &base + &i * cols + &j);
                cx.set(sum, x(&i).fma(w, sum));
            });
            store(cx, &j, sum.into());
        });
    }

    /// `M[i, j] = M[i, j] + a[i] b[j]` for matrix `which` of the gradient.
    fn outer(&self, cx: &mut Lower<'_>, which: usize, cols: usize, a: Vector<'_>, b: Vector<'_>) {
        let (grad, size) = (self.grad, self.size());
        cx.each(0, size / cols, |cx, i| {
            let left = cx.bind(a(&i));
            let line = cx.bind(i * cols + which * size);
            cx.lanes(0, cols, 4, |cx, j| {
                let at = cx.bind(&line + &j);
                cx.store(grad, &at, left.clone().fma(b(&j), Expr::load(grad, &at)));
            });
        });
    }

    /// Resets at a document start, and the anchor where one is taken, in the state at `base`.
    fn start(&self, cx: &mut Lower<'_>, row: &Expr, base: &Expr) {
        let (states, size) = (self.states, self.size());
        let pos = Expr::load(cx.buf(POS), row);
        let pos = cx.bind(pos);
        cx.when(pos.clone().eq(i32c(0)), |cx| {
            for (w, s, l) in [(W1, S1, 0), (W2, S2, 1)] {
                let init = cx.buf(INIT + l);
                cx.lanes(0, size, 4, |cx, i| {
                    cx.store(states, base + &i + w * size, Expr::load(init, &self.init + &i));
                    cx.store(states, base + i + s * size, f32c(0.0));
                });
            }
        });
        cx.when(self.anchored(pos), |cx| {
            for (w, a) in [(W1, A1), (W2, A2)] {
                cx.lanes(0, size, 4, |cx, i| {
                    cx.store(states, base + &i + a * size, Expr::load(states, base + &i + w * size));
                });
            }
        });
    }

    /// Whether a token at this position takes an anchor.
    fn anchored(&self, pos: Expr) -> Expr {
        (pos.cast(Ty::I64) % self.op.inner).eq(int(0))
    }

    /// `u`, `z`, `r`, `e` and `d` of a token at the anchor of the state at `base`; the factor of its step, `|r|^2` and `|d|^2`.
    fn inner(&self, cx: &mut Lower<'_>, cols: &Expr, base: &Expr) -> [Expr; 3] {
        let (k_n, m_n, w) = (self.k, self.m, &self.wide);
        let (k, v) = (cx.buf(K), cx.buf(V));
        let anchor = |a: usize| (self.states, base + a * self.size());
        self.times(cx, anchor(A1), [m_n, k_n], &|j| Expr::load(k, cols + j), &|cx, i, u| {
            let u = cx.bind(u);
            cx.store(w.u, i, &u);
            let z = math::silu(cx, u);
            cx.store(w.z, i, z);
        });
        self.times(cx, anchor(A2), [k_n, m_n], &|j| Expr::load(w.z, j), &|cx, i, x| {
            let r = Expr::load(k, cols + i) + x - Expr::load(v, cols + i);
            cx.store(self.r, i, r * f32c(2.0));
        });
        self.transposed(cx, anchor(A2), [k_n, m_n], &|i| Expr::load(self.r, i), &|cx, j, e| {
            let e = cx.bind(e);
            cx.store(w.e, j, &e);
            let (slope, _) = self.slopes(cx, w.u, j);
            cx.store(w.d, j, e * slope);
        });
        let square = |buf: Buf, i: &Expr| Acc::Dot(Expr::load(buf, i), Expr::load(buf, i));
        let sums = cx.reduce(0, m_n, |_, i| vec![square(w.z, &i), square(w.d, &i)]);
        let r2 = cx.reduce(0, k_n, |_, i| vec![square(self.r, &i)]);
        let r2 = cx.bind(&r2[0] + f32c(TINY));
        let c = if self.op.normalise { f32c(1.0) / (f32c(1.0) + &sums[0] + &sums[1] / &r2) } else { f32c(1.0) };
        [cx.bind(c), r2, sums[1].clone()]
    }

    /// `silu'` and `silu''` at element `i` of `x`.
    fn slopes(&self, cx: &mut Lower<'_>, x: Buf, i: &Expr) -> (Expr, Expr) {
        let x = cx.bind(Expr::load(x, i));
        let s = math::sigmoid(cx, x.clone());
        let s = cx.bind(s);
        let rest = cx.bind(f32c(1.0) - &s);
        let bend = &s * &rest * (f32c(2.0) + &x * (&rest - &s));
        (s * (f32c(1.0) + x * rest), bend)
    }

    /// The state behind token `t` at `to` of `states`, from that at `from`, which becomes the one that the token reads.
    fn step(&self, cx: &mut Lower<'_>, t: &Expr, from: &Expr, to: &Expr) {
        let (states, size, w) = (self.states, self.size(), &self.wide);
        let [row, cols, gate] = self.place(cx, t);
        self.start(cx, &row, from);
        let [c, ..] = self.inner(cx, &cols, from);
        let [alpha, eta, theta] = self.gates(cx, &gate);
        let step = cx.bind(-(theta * c));
        let keep = cx.bind(f32c(1.0) - alpha);
        let k = cx.buf(K);
        let right = |first: bool, j: &Expr| if first { Expr::load(k, &cols + j) } else { Expr::load(w.z, j) };
        for (w_at, s_at, left, width) in [(W1, S1, w.d, self.k), (W2, S2, self.r, self.m)] {
            cx.each(0, size / width, |cx, i| {
                let left = cx.bind(Expr::load(left, &i) * &step);
                let line = cx.bind(i * width);
                cx.lanes(0, width, 4, |cx, j| {
                    let at = cx.bind(&line + &j);
                    let s = Expr::load(states, from + &at + s_at * size) * &eta;
                    let s = cx.bind(left.clone().fma(right(w_at == W1, &j), s));
                    let w = Expr::load(states, from + &at + w_at * size) * &keep + &s;
                    cx.store(states, to + &at + s_at * size, s);
                    cx.store(states, to + at + w_at * size, w);
                });
            });
        }
        for a in [A1, A2] {
            cx.lanes(a * size, (a + 1) * size, 4, |cx, i| {
                cx.store(states, to + &i, Expr::load(states, from + &i));
            });
        }
    }

    /// The gradients of token `t`, which read the state at `from` of `states`.
    fn back(&self, cx: &mut Lower<'_>, t: &Expr, from: &Expr) {
        let (k_n, m_n, size) = (self.k, self.m, self.size());
        let (states, grad, w) = (self.states, self.grad, &self.wide);
        let [row, cols, gate] = self.place(cx, t);
        let [q, k, dy, pos] = [Q, K, DY, POS].map(|i| cx.buf(i));
        let [c, r2, d2] = self.inner(cx, &cols, from);
        let [alpha, eta, theta] = self.gates(cx, &gate);
        self.decay(cx, &gate, from, &alpha);
        let minus = cx.bind(-theta);
        // G1 k and G2 z.
        let dtheta = cx.local(f32c(0.0));
        self.times(cx, (grad, (S1 * size).into()), [m_n, k_n], &|j| Expr::load(k, &cols + j), &|cx, i, g| {
            let g = cx.bind(g);
            cx.set(dtheta, Expr::load(w.d, i).fma(g.clone(), dtheta));
            cx.store(w.dd, i, g * &minus);
        });
        self.times(cx, (grad, (S2 * size).into()), [k_n, m_n], &|j| Expr::load(w.z, j), &|cx, i, g| {
            let g = cx.bind(g);
            cx.set(dtheta, Expr::load(self.r, i).fma(g.clone(), dtheta));
            cx.store(self.dr, i, g * &minus);
        });
        cx.put(5, &gate, -(dtheta * &c));
        let scale = cx.bind(&minus * &c);
        self.transposed(cx, (grad, (S1 * size).into()), [m_n, k_n], &|i| Expr::load(w.d, i), &|cx, j, x| {
            cx.store(self.dk, j, x * &scale);
        });
        self.transposed(cx, (grad, (S2 * size).into()), [k_n, m_n], &|i| Expr::load(self.r, i), &|cx, j, x| {
            cx.store(w.dz, j, x * &scale);
        });
        if self.op.normalise {
            self.unscale(cx, &c, &r2, &d2);
        }
        cx.lanes(0, m_n, 1, |cx, i| {
            let (slope, bend) = self.slopes(cx, w.u, &i);
            let dd = cx.bind(Expr::load(w.dd, &i));
            cx.store(w.b, &i, &dd * slope);
            cx.store(w.du, &i, dd * Expr::load(w.e, &i) * bend);
        });
        let anchor = |a: usize| (states, from + a * size);
        let load = |buf: Buf| move |i: &Expr| Expr::load(buf, i);
        self.times(cx, anchor(A2), [k_n, m_n], &load(w.b), &|cx, i, x| {
            cx.store(self.dr, i, Expr::load(self.dr, i) + x);
        });
        self.outer(cx, A2, m_n, &load(self.r), &load(w.b));
        self.outer(cx, A2, m_n, &|i| Expr::load(self.dr, i) * f32c(2.0), &load(w.z));
        self.transposed(cx, anchor(A2), [k_n, m_n], &load(self.dr), &|cx, j, x| {
            let dz = cx.bind(x.fma(f32c(2.0), Expr::load(w.dz, j)));
            let (slope, _) = self.slopes(cx, w.u, j);
            cx.store(w.du, j, dz.fma(slope, Expr::load(w.du, j)));
        });
        cx.lanes(0, k_n, 1, |cx, j| cx.put(2, &cols + &j, Expr::load(self.dr, &j) * f32c(-2.0)));
        self.outer(cx, A1, k_n, &load(w.du), &|j| Expr::load(k, &cols + j));
        self.transposed(cx, anchor(A1), [m_n, k_n], &load(w.du), &|cx, j, x| {
            let dk = Expr::load(self.dr, j).fma(f32c(2.0), Expr::load(self.dk, j));
            cx.put(1, &cols + j, dk + x);
        });
        // The read.
        let weights = |a: usize| (states, from + a * size);
        self.times(cx, weights(W1), [m_n, k_n], &|j| Expr::load(q, &cols + j), &|cx, i, p| cx.store(w.hidden, i, p));
        self.transposed(cx, weights(W2), [k_n, m_n], &|i| Expr::load(dy, &cols + i), &|cx, j, x| {
            let (slope, _) = self.slopes(cx, w.hidden, j);
            cx.store(w.b, j, x * slope);
        });
        self.transposed(cx, weights(W1), [m_n, k_n], &load(w.b), &|cx, j, x| {
            cx.put(0, &cols + j, x + Expr::load(dy, &cols + j));
        });
        self.outer(cx, W1, k_n, &load(w.b), &|j| Expr::load(q, &cols + j));
        cx.lanes(0, m_n, 1, |cx, i| {
            let h = math::silu(cx, Expr::load(w.hidden, &i));
            cx.store(w.hidden, i, h);
        });
        self.outer(cx, W2, m_n, &|i| Expr::load(dy, &cols + i), &load(w.hidden));
        for s in [S1, S2] {
            cx.lanes(s * size, (s + 1) * size, 4, |cx, i| cx.store(grad, &i, Expr::load(grad, &i) * &eta));
        }
        let pos = cx.bind(Expr::load(pos, row));
        self.join(cx, pos);
    }

    /// The gradients of `alpha` and `eta`; from then on `dS` is `G`, and `dW` that of the weights before the token.
    fn decay(&self, cx: &mut Lower<'_>, gate: &Expr, from: &Expr, alpha: &Expr) {
        let (states, grad, size) = (self.states, self.grad, self.size());
        let mut sums = [f32c(0.0), f32c(0.0)];
        for (w, s) in [(W1, S1), (W2, S2)] {
            cx.lanes(0, size, 4, |cx, i| {
                let at = cx.bind(&i + s * size);
                cx.store(grad, &at, Expr::load(grad, &at) + Expr::load(grad, i + w * size));
            });
            let dots = cx.reduce(0, size, |_, i| {
                let pair = |which: usize| {
                    Acc::Dot(Expr::load(grad, &i + which * size), Expr::load(states, from + &i + which * size))
                };
                vec![pair(w), pair(s)]
            });
            sums = [0, 1].map(|x| sums[x].clone() + &dots[x]);
            let keep = f32c(1.0) - alpha;
            let keep = cx.bind(keep);
            cx.lanes(w * size, (w + 1) * size, 4, |cx, i| cx.store(grad, &i, Expr::load(grad, &i) * &keep));
        }
        let [dalpha, deta] = sums;
        let [alpha, eta] = [ALPHA, ETA].map(|i| Expr::load(cx.buf(i), gate));
        cx.put(3, gate, alpha.le(f32c(MAX_ALPHA)).select(-dalpha, f32c(0.0)));
        cx.put(4, gate, f32c(MIN_ETA).le(eta).select(deta, f32c(0.0)));
    }

    /// Through the factor of the normalised step: `dd`, `dr` and `dz`.
    fn unscale(&self, cx: &mut Lower<'_>, c: &Expr, r2: &Expr, d2: &Expr) {
        let w = &self.wide;
        let pair = |a: Buf, b: Buf, i: Expr| Acc::Dot(Expr::load(a, &i), Expr::load(b, i));
        let left = cx.reduce(0, self.m, |_, i| vec![pair(w.dd, w.d, i)]);
        let right = cx.reduce(0, self.k, |_, i| vec![pair(self.dr, self.r, i)]);
        let n = cx.bind(-(c * c * (&left[0] + &right[0])) * f32c(2.0));
        let over = cx.bind(&n / r2);
        let back = cx.bind(-(&over * d2 / r2));
        cx.lanes(0, self.m, 1, |cx, i| {
            cx.store(w.dd, &i, Expr::load(w.d, &i).fma(over.clone(), Expr::load(w.dd, &i) * c));
            cx.store(w.dz, &i, Expr::load(w.z, &i).fma(n.clone(), Expr::load(w.dz, &i)));
        });
        cx.lanes(0, self.k, 1, |cx, i| {
            cx.store(self.dr, &i, Expr::load(self.r, &i).fma(back.clone(), Expr::load(self.dr, &i) * c));
        });
    }

    /// What the token at this position took its state from.
    fn join(&self, cx: &mut Lower<'_>, pos: Expr) {
        let (grad, size) = (self.grad, self.size());
        cx.when(self.anchored(pos.clone()), |cx| {
            for (w, a) in [(W1, A1), (W2, A2)] {
                cx.lanes(0, size, 4, |cx, i| {
                    let (to, from) = (cx.bind(&i + w * size), cx.bind(&i + a * size));
                    cx.store(grad, &to, Expr::load(grad, &to) + Expr::load(grad, &from));
                    cx.store(grad, from, f32c(0.0));
                });
            }
        });
        cx.when(pos.eq(i32c(0)), |cx| self.restart(cx));
    }

    /// The gradient of the weights belongs to the initial ones.
    fn restart(&self, cx: &mut Lower<'_>) {
        let (grad, size) = (self.grad, self.size());
        let out = cx.bind(&self.at * size);
        for (w, s, o) in [(W1, S1, 6), (W2, S2, 7)] {
            let sum = self.sums[o - 6];
            cx.lanes(0, size, 4, |cx, i| {
                let at = cx.bind(&i + w * size);
                let total = cx.bind(Expr::load(sum, &i) + Expr::load(grad, &at));
                cx.store(sum, &i, &total);
                cx.put(o, &out + &i, total);
                cx.store(grad, at, f32c(0.0));
                cx.store(grad, i + s * size, f32c(0.0));
            });
        }
    }
}
