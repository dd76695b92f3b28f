//! The chunk form of the Titans memory: all tokens that share an anchor at once.
//!
//! Token-indexed matrices are stored with tokens as contiguous columns, padded with zeros to whole tiles, so that the matrices of the
//! memory are left operands and need no transposition.

use super::{super::heads::Entry, *};
use crate::loops::{
    Var,
    tile::{Element, Extent, Product},
};

/// Memory of one chunk; `ld` columns are tokens.
struct Scratch {
    ld: usize,
    /// Inputs, transposed.
    kt: Buf,
    qt: Buf,
    /// Targets, then residuals.
    rt: Buf,
    /// Hidden activations at the anchor, `[m, ld]` and `[ld, m]`.
    zt: Buf,
    z: Buf,
    /// Slopes, then first gradients.
    dt: Buf,
    /// Hidden activations of the reads.
    ht: Buf,
    /// Reads.
    ot: Buf,
    /// Weighted products of pairs of tokens, negated.
    pair: Buf,
    /// Weight of the gradient of token `j` in the weights before token `t`, `[j, t]`.
    before: Buf,
    /// Weight of the gradient of token `j` in the current weights, and in the momentum.
    in_w: Buf,
    in_s: Buf,
    /// Weight of the incoming weights and momentum before a token.
    w0: Buf,
    s0: Buf,
    /// Scale of gradients.
    scale: Buf,
    /// Gradients weighted for an update.
    weighted: Buf,
}

/// Weights of the incoming state at the end of a chunk.
struct End {
    /// Of the incoming weights in the weights.
    w: Var,
    /// Of the incoming momentum in the weights.
    s: Var,
    /// Of the incoming momentum in the momentum.
    momentum: Var,
}

impl Frame<'_> {
    /// All tokens, in chunks that end where the next token sets an anchor.
    pub(super) fn chunks(&self, cx: &mut Lower<'_>) {
        let (k, m, tokens, inner) = (self.k, self.m, self.tokens, self.op.inner);
        let ld = inner.next_multiple_of(8);
        let mut scratch = |name: &str, len: usize| cx.scratch(name, DType::F32, len);
        let sc = Scratch {
            ld,
            kt: scratch("kt", k * ld),
            qt: scratch("qt", k * ld),
            rt: scratch("rt", k * ld),
            zt: scratch("zt", m * ld),
            z: scratch("z", m * ld),
            dt: scratch("dt", m * ld),
            ht: scratch("ht", m * ld),
            ot: scratch("ot", k * ld),
            pair: scratch("pair", ld * ld),
            before: scratch("before", ld * ld),
            in_w: scratch("in_w", ld),
            in_s: scratch("in_s", ld),
            w0: scratch("w0", ld),
            s0: scratch("s0", ld),
            scale: scratch("scale", ld),
            weighted: scratch("weighted", k.max(m) * ld),
        };
        let start = cx.local(Expr::from(0));
        cx.each(0, tokens, |cx, t| {
            let next = cx.bind(t + 1);
            let row = cx.bind(&self.row0 + next.clone().min(Expr::from(tokens - 1)));
            let anchors = self.anchors(cx, &row);
            let full = Expr::from(inner).le(&next - start);
            cx.when(next.clone().eq(Expr::from(tokens)) | anchors | full, |cx| {
                let s = cx.bind(Expr::from(start).max(Expr::from(0)).min(Expr::from(tokens - 1)));
                let n = cx.bind((&next - &s).min(Expr::from(inner)));
                self.chunk(cx, &sc, &s, &n);
                cx.set(start, &next);
            });
        });
    }

    fn chunk(&self, cx: &mut Lower<'_>, sc: &Scratch, s: &Expr, n: &Expr) {
        let row0 = cx.bind(&self.row0 + s);
        self.start(cx, &row0);
        let [q, k, v] = [Q, K, V].map(|x| cx.buf(x));
        let at = cx.bind(self.column(&row0, self.k));
        for (from, to) in [(q, sc.qt), (k, sc.kt), (v, sc.rt)] {
            cx.each(0, self.k, |cx, i| {
                let (from0, to0) = (cx.bind(&at + &i), cx.bind(i * sc.ld));
                let stride = self.op.heads * self.k;
                cx.lanes(0, n.clone(), 1, |cx, t| cx.store(to, &to0 + &t, Expr::load(from, &from0 + t * stride)));
                cx.lanes(n.clone(), sc.ld, 1, |cx, t| cx.store(to, &to0 + t, f32c(0.0)));
            });
        }
        self.gradients(cx, sc, &row0, n);
        let end = self.weights(cx, sc, &row0, n);
        self.reads(cx, sc, &at, n);
        self.update(cx, sc, &at, n, &end);
    }

    /// Residuals and first gradients at the anchor, scaled.
    fn gradients(&self, cx: &mut Lower<'_>, sc: &Scratch, row0: &Expr, n: &Expr) {
        let (ld, k_n, m_n, base) = (sc.ld, self.k, self.m, &self.base);
        let [_, _, a1, _, _, a2] = self.state;
        let back = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(a2, base + j * m_n + i);
        sc.product(cx, (m_n, k_n), &self.weight(a1, k_n), &sc.cols(sc.kt), None, &sc.keep(sc.zt));
        cx.lanes(0, m_n * ld, 2, |cx, at| {
            let u = cx.bind(Expr::load(sc.zt, &at));
            let s = math::sigmoid(cx, &u);
            cx.store(sc.dt, &at, &s * (f32c(1.0) + &u * (f32c(1.0) - &s)));
            cx.store(sc.zt, at, u * s);
        });
        sc.product(cx, (k_n, m_n), &self.weight(a2, m_n), &sc.cols(sc.zt), Some(&sc.cols(sc.kt)), &|cx, i, t, x| {
            let at = cx.bind(i * ld + t);
            cx.store(sc.rt, &at, f32c(2.0) * (x - Expr::load(sc.rt, &at)));
        });
        sc.product(cx, (m_n, k_n), &back, &sc.cols(sc.rt), None, &|cx, i, t, x| {
            let at = cx.bind(i * ld + t);
            cx.store(sc.dt, &at, x * Expr::load(sc.dt, &at));
        });
        cx.lanes(0, ld, 1, |cx, t| {
            let mut square = |x: Buf, n: usize| {
                let sum = cx.local(f32c(0.0));
                cx.each(0, n, |cx, i| {
                    let x = cx.bind(Expr::load(x, i * ld + &t));
                    cx.set(sum, x.clone().fma(x, sum));
                });
                sum
            };
            let (r2, z2, d2) = (square(sc.rt, k_n), square(sc.zt, m_n), square(sc.dt, m_n));
            let gain = f32c(1.0) + z2 + d2 / (r2 + f32c(1e-12));
            cx.store(sc.scale, &t, f32c(1.0) / gain);
            // The surprise waits here until the weights are computed.
            cx.store(sc.w0, t, Expr::from(r2).sqrt());
        });
        cx.each(0, n.clone(), |cx, t| {
            let row = cx.bind(row0 + &t);
            cx.put(1, self.column(&row, 1), Expr::load(sc.w0, t));
        });
        if self.op.normalise {
            for (buf, rows) in [(sc.rt, k_n), (sc.dt, m_n)] {
                cx.each(0, rows, |cx, i| {
                    let row = cx.bind(i * ld);
                    cx.lanes(0, ld, 2, |cx, t| {
                        let at = cx.bind(&row + &t);
                        cx.store(buf, &at, Expr::load(buf, &at) * Expr::load(sc.scale, t));
                    });
                });
            }
        }
    }

    /// How much of every gradient and of the incoming state is in the memory before each token and at the end.
    fn weights(&self, cx: &mut Lower<'_>, sc: &Scratch, row0: &Expr, n: &Expr) -> End {
        let (ld, zero) = (sc.ld, Expr::from(0));
        for (buf, len) in [(sc.in_w, ld), (sc.in_s, ld), (sc.w0, ld), (sc.s0, ld), (sc.before, ld * ld)] {
            clear(cx, buf, &zero, len);
        }
        let end = End { w: cx.local(f32c(1.0)), s: cx.local(f32c(0.0)), momentum: cx.local(f32c(1.0)) };
        cx.each(0, n.clone(), |cx, t| {
            cx.store(sc.w0, &t, end.w);
            cx.store(sc.s0, &t, end.s);
            cx.each(0, ld, |cx, j| cx.store(sc.before, &j * ld + &t, Expr::load(sc.in_w, &j)));
            let row = cx.bind(row0 + &t);
            let [alpha, eta, theta] = self.gates(cx, &row);
            let keep = cx.bind(f32c(1.0) - alpha);
            cx.lanes(0, ld, 2, |cx, j| cx.store(sc.in_s, &j, Expr::load(sc.in_s, &j) * &eta));
            cx.store(sc.in_s, &t, theta);
            cx.lanes(0, ld, 2, |cx, j| {
                cx.store(sc.in_w, &j, keep.clone().fma(Expr::load(sc.in_w, &j), Expr::load(sc.in_s, &j)));
            });
            cx.set(end.momentum, end.momentum * &eta);
            cx.set(end.w, end.w * &keep);
            cx.set(end.s, keep.fma(end.s, end.momentum));
        });
        end
    }

    /// Reads before every token.
    fn reads(&self, cx: &mut Lower<'_>, sc: &Scratch, at: &Expr, n: &Expr) {
        let (ld, k_n, m_n) = (sc.ld, self.k, self.m);
        let [w1, s1, _, w2, s2, _] = self.state;
        // Weights of the state are those of tokens, the columns, so that the product comes first.
        let scaled = |to: Buf, by: Buf| {
            move |cx: &mut Lower<'_>, i: &Expr, t: &Expr, x: Expr| cx.store(to, i * ld + t, x * Expr::load(by, t))
        };
        let added = |to: Buf, by: Buf| {
            move |cx: &mut Lower<'_>, i: &Expr, t: &Expr, x: Expr| {
                let at = cx.bind(i * ld + t);
                cx.store(to, &at, x.fma(Expr::load(by, t), Expr::load(to, &at)));
            }
        };
        let negated = |cx: &mut Lower<'_>, j: &Expr, t: &Expr, x: Expr| {
            let at = cx.bind(j * ld + t);
            cx.store(sc.pair, &at, -(x * Expr::load(sc.before, &at)));
        };
        let pair = sc.cols(sc.pair);

        sc.product(cx, (ld, k_n), &sc.rows(sc.kt), &sc.cols(sc.qt), None, &negated);
        let input = sc.cols(sc.qt);
        sc.product(cx, (m_n, k_n), &self.weight(w1, k_n), &input, None, &scaled(sc.ht, sc.w0));
        sc.product(cx, (m_n, k_n), &self.weight(s1, k_n), &input, None, &added(sc.ht, sc.s0));
        let hidden = sc.cols(sc.ht);
        sc.product(cx, (m_n, ld), &sc.cols(sc.dt), &pair, Some(&hidden), &sc.keep(sc.ht));
        cx.lanes(0, m_n * ld, 2, |cx, at| {
            let h = math::silu(cx, Expr::load(sc.ht, &at));
            cx.store(sc.ht, at, h);
        });

        sc.product(cx, (ld, m_n), &sc.rows(sc.zt), &hidden, None, &negated);
        let read = sc.cols(sc.ot);
        sc.product(cx, (k_n, m_n), &self.weight(w2, m_n), &hidden, None, &scaled(sc.ot, sc.w0));
        sc.product(cx, (k_n, m_n), &self.weight(s2, m_n), &hidden, None, &added(sc.ot, sc.s0));
        sc.product(cx, (k_n, ld), &sc.cols(sc.rt), &pair, Some(&read), &|cx, i, t, x| {
            let at = cx.bind(i * ld + t);
            cx.store(sc.ot, &at, x + Expr::load(sc.qt, &at));
        });
        cx.each(0, n.clone(), |cx, t| {
            let to = cx.bind(at + &t * (self.op.heads * k_n));
            cx.lanes(0, k_n, 1, |cx, i| cx.put(0, &to + &i, Expr::load(sc.ot, i * ld + &t)));
        });
    }

    /// The memory after the chunk.
    fn update(&self, cx: &mut Lower<'_>, sc: &Scratch, at: &Expr, n: &Expr, end: &End) {
        let (ld, k_n, m_n, base, d) = (sc.ld, self.k, self.m, &self.base, self.op.heads * self.k);
        let [w1, s1, _, w2, s2, _] = self.state;
        let k = cx.buf(K);
        cx.each(0, n.clone(), |cx, t| {
            cx.lanes(0, m_n, 1, |cx, i| cx.store(sc.z, &t * m_n + &i, Expr::load(sc.zt, i * ld + &t)));
        });
        let keys = |_: &mut Lower<'_>, t: &Expr, j: &Expr| Expr::load(k, at + t * d + j);
        let hidden = |_: &mut Lower<'_>, t: &Expr, j: &Expr| Expr::load(sc.z, t * m_n + j);
        let layers: [(Buf, Buf, Buf, usize, usize, Element<'_, Lower<'_>>); 2] =
            [(w1, s1, sc.dt, m_n, k_n, &keys), (w2, s2, sc.rt, k_n, m_n, &hidden)];
        for (w, s, gradient, rows, cols, right) in layers {
            let index = |i: &Expr, j: &Expr| base + i * cols + j;
            let old_w = |_: &mut Lower<'_>, i: &Expr, j: &Expr| {
                Expr::load(w, index(i, j)) * end.w + Expr::load(s, index(i, j)) * end.s
            };
            let old_s = |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(s, index(i, j)) * end.momentum;
            // The weights first: they need the incoming momentum.
            let parts: [(Buf, Buf, Element<'_, Lower<'_>>); 2] = [(w, sc.in_w, &old_w), (s, sc.in_s, &old_s)];
            for (to, weight, old) in parts {
                cx.each(0, rows, |cx, i| {
                    let row = cx.bind(i * ld);
                    cx.lanes(0, ld, 2, |cx, t| {
                        let at = cx.bind(&row + &t);
                        cx.store(sc.weighted, &at, -(Expr::load(gradient, &at) * Expr::load(weight, t)));
                    });
                });
                Product {
                    m: rows.into(),
                    n: cols.into(),
                    k: Extent::Of(n.clone()),
                    a: &sc.cols(sc.weighted),
                    b: right,
                    init: Some(old),
                }
                .emit(cx, &|cx, i, j, x| cx.store(to, index(i, j), x));
            }
        }
    }

    /// A matrix of the memory with `cols` columns.
    fn weight(&self, w: Buf, cols: usize) -> impl Fn(&mut Lower<'_>, &Expr, &Expr) -> Expr + '_ {
        move |_, i, j| Expr::load(w, &self.base + i * cols + j)
    }
}

/// Where one product leaves an element: row, token, value.
type Sink<'f> = &'f dyn Fn(&mut Lower<'_>, &Expr, &Expr, Expr);

impl Scratch {
    /// Element `(i, t)` of a matrix whose columns are tokens.
    fn cols(&self, x: Buf) -> impl Fn(&mut Lower<'_>, &Expr, &Expr) -> Expr + use<> {
        let ld = self.ld;
        move |_, i, t| Expr::load(x, i * ld + t)
    }

    /// Element `(t, i)` of a matrix whose columns are tokens.
    fn rows(&self, x: Buf) -> impl Fn(&mut Lower<'_>, &Expr, &Expr) -> Expr + use<> {
        let ld = self.ld;
        move |_, t, i| Expr::load(x, i * ld + t)
    }

    /// Stores element `(i, t)` of a matrix whose columns are tokens.
    fn keep(&self, to: Buf) -> impl Fn(&mut Lower<'_>, &Expr, &Expr, Expr) + use<> {
        let ld = self.ld;
        move |cx, i, t, x| cx.store(to, i * ld + t, x)
    }

    /// `store(i, t, init(i, t) + sum over j < k of a(i, j) b(j, t))` for `i < m` and all columns `t`.
    fn product(
        &self,
        cx: &mut Lower<'_>,
        (m, k): (usize, usize),
        a: Entry<'_>,
        b: Entry<'_>,
        init: Option<Entry<'_>>,
        store: Sink<'_>,
    ) {
        let init = init.map(|f| move |cx: &mut Lower<'_>, i: &Expr, t: &Expr| f(cx, i, t));
        Product {
            m: m.into(),
            n: self.ld.into(),
            k: k.into(),
            a: &|cx: &mut Lower<'_>, i, j| a(cx, i, j),
            b: &|cx: &mut Lower<'_>, j, t| b(cx, j, t),
            init: init.as_ref().map(|f| f as Element<'_, _>),
        }
        .emit(cx, &|cx, i, t, x| store(cx, i, t, x));
    }
}
