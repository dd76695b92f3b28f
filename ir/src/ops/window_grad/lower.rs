//! The kernel of the gradients: one instance for every head of a row.

use super::{Places, WindowGrad};
use crate::{
    DType,
    loops::{Acc, Buf, Expr, Ty, f32c, i32c, math},
    lower::Lower,
    ops::heads::clear,
};

/// One head of one row.
struct Frame {
    at: Places,
    d: usize,
    k: usize,
    slots: usize,
    window: usize,
    /// Weights of a token: persistent slots, tokens by lag, the memory.
    w: Buf,
    /// Gradients of the weights, then of the scores.
    ds: Buf,
    /// Sums over tokens: gradients of keys and values of the window, of persistent keys and values.
    sums: [Buf; 4],
    /// Gradients of `q` and `qr` of a token.
    dq: [Buf; 2],
    r: Expr,
    /// Row of the first token.
    row0: Expr,
    /// First column.
    head: Expr,
    /// Tokens before this call, where they are kept.
    before: Option<Expr>,
}

/// Where a slot's key or value is: a buffer and the index of its first element.
type Place = (Buf, Expr);

/// The slots of one token by kind.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Persistent,
    /// A token of this call.
    Token,
    /// A token of an earlier call.
    Kept,
    Memory,
}

/// One token.
struct Token {
    t: Expr,
    row: Expr,
    /// First element of its columns.
    col: Expr,
    /// The first lag that reaches an earlier call, or is out of sight.
    own: Expr,
    /// The first lag that is out of sight.
    end: Expr,
}

pub(super) fn lower(op: &WindowGrad, cx: &mut Lower<'_>) {
    let [rows, tokens, d] = cx.ty(0).dims[..] else { unreachable!("checked by infer") };
    let (at, k) = (op.places(), d / op.heads);
    let slots = cx.ty(at.pk).dims[0];
    let n = cx.grid(rows * op.heads);
    let (r, h) = (cx.bind(&n / op.heads), cx.bind(&n % op.heads));
    let all = slots + op.reach(tokens) + 1;
    let kept = op.window.min(1) * tokens * k;
    let mut scratch = |name: &str, len: usize| cx.scratch(name, DType::F32, len.max(1));
    let f = Frame {
        at,
        d,
        k,
        slots,
        window: op.window,
        w: scratch("w", all),
        ds: scratch("ds", all),
        sums: [scratch("dkr", kept), scratch("dv", kept), scratch("dpk", slots * k), scratch("dpv", slots * k)],
        dq: [scratch("dq", k), scratch("dqr", k)],
        row0: cx.bind(&r * tokens),
        head: cx.bind(h * k),
        r,
        before: None,
    };
    let f = match op.cached() {
        false => f,
        true => {
            let count = Expr::load(cx.buf(at.state + 2), n);
            let before = cx.bind(count.max(i32c(0)).cast(Ty::I64));
            Frame { before: Some(before), ..f }
        }
    };
    for (buf, len) in f.sums.into_iter().zip([kept, kept, slots * k, slots * k]) {
        clear(cx, buf, &Expr::from(0), len);
    }
    cx.each(0, tokens, |cx, t| f.token(cx, &t));
    cx.each(0, slots, |cx, p| {
        let from = cx.bind(&p * k);
        let to = cx.bind((&f.r * slots + p) * d + &f.head);
        for (o, buf) in [(at.pk, f.sums[2]), (at.pk + 1, f.sums[3])] {
            cx.lanes(0, k, 4, |cx, c| cx.put(o, &to + &c, Expr::load(buf, &from + c)));
        }
    });
    cx.each(0, tokens, |cx, t| {
        let from = cx.bind(&t * k);
        let to = cx.bind((&f.row0 + t) * d + &f.head);
        if f.window > 0 {
            for (o, buf) in [(at.kr, f.sums[0]), (at.v, f.sums[1])] {
                cx.lanes(0, k, 4, |cx, c| cx.put(o, &to + &c, Expr::load(buf, &from + c)));
            }
        } else {
            cx.lanes(0, k, 4, |cx, c| cx.put(at.v, &to + &c, f32c(0.0)));
        }
    });
}

impl Frame {
    fn token(&self, cx: &mut Lower<'_>, t: &Expr) {
        let row = cx.bind(&self.row0 + t);
        let col = cx.bind(&row * self.d + &self.head);
        let (own, end) = self.sight(cx, t, &row);
        let token = Token { t: t.clone(), row, col, own, end };
        let most = cx.local(f32c(-1e30));
        let scale = f32c((self.k as f32).powf(-0.5));
        let dy = (cx.buf(self.at.dy), token.col.clone());
        // Scores and what the values give.
        self.slots(cx, &token, &|cx, slot, kind, keys, values| {
            let q = self.query(cx, &token, kind);
            let dots = cx.reduce(0, self.k, |_, c| {
                let pair = |a: &Place, b: &Place| Acc::Dot(Expr::load(a.0, &a.1 + &c), Expr::load(b.0, &b.1 + &c));
                vec![pair(&q, keys), pair(&dy, values)]
            });
            let score = cx.bind(&dots[0] * &scale);
            cx.store(self.w, slot, &score);
            cx.store(self.ds, slot, &dots[1]);
            cx.set(most, score.max(most));
        });
        let (total, mean) = (cx.local(f32c(0.0)), cx.local(f32c(0.0)));
        let n = cx.bind(&token.end + (self.slots + 1));
        cx.each(0, &n, |cx, i| {
            let e = math::exp(cx, Expr::load(self.w, &i) - most);
            let e = cx.bind(e);
            cx.store(self.w, &i, &e);
            cx.set(total, total + &e);
            cx.set(mean, e.fma(Expr::load(self.ds, i), mean));
        });
        let over = cx.bind(f32c(1.0) / total);
        let mean = cx.bind(mean * &over);
        cx.lanes(0, n, 2, |cx, i| {
            let w = cx.bind(Expr::load(self.w, &i) * &over);
            cx.store(self.w, &i, &w);
            cx.store(self.ds, &i, w * (Expr::load(self.ds, &i) - &mean) * &scale);
        });
        self.dq.into_iter().for_each(|buf| clear(cx, buf, &Expr::from(0), self.k));
        self.slots(cx, &token, &|cx, slot, kind, keys, _| self.spread(cx, &token, slot, kind, keys));
        cx.lanes(0, self.k, 4, |cx, c| {
            cx.put(0, &token.col + &c, Expr::load(self.dq[0], &c));
            if self.window > 0 {
                cx.put(self.at.qr, &token.col + &c, Expr::load(self.dq[1], c));
            }
        });
    }

    /// The lags at which this call and the window end for a token.
    fn sight(&self, cx: &mut Lower<'_>, t: &Expr, row: &Expr) -> (Expr, Expr) {
        if self.window == 0 {
            return (0.into(), 0.into());
        }
        let pos = Expr::load(cx.buf(self.at.pos), row).max(i32c(0)).cast(Ty::I64);
        let count = self.before.iter().fold(t.clone(), |t, before| t + before);
        let end = count.min(Expr::from(self.window - 1)).min(pos) + 1;
        let end = cx.bind(end);
        (cx.bind(end.clone().min(t + 1)), end)
    }

    /// Call `run(cx, slot, kind, key, value)` for everything the token sees.
    fn slots(&self, cx: &mut Lower<'_>, token: &Token, run: &dyn Fn(&mut Lower<'_>, &Expr, Kind, &Place, &Place)) {
        let at = self.at;
        let [pk, pv, hn, h, kr, v] = [at.pk, at.pk + 1, at.hn, at.hn + 1, at.kr, at.v].map(|i| cx.buf(i));
        cx.each(0, self.slots, |cx, p| {
            let from = cx.bind(&p * self.d + &self.head);
            run(cx, &p, Kind::Persistent, &(pk, from.clone()), &(pv, from));
        });
        if self.window > 0 {
            cx.each(0, &token.own, |cx, lag| {
                let from = cx.bind((&token.row - &lag) * self.d + &self.head);
                let slot = cx.bind(lag + self.slots);
                run(cx, &slot, Kind::Token, &(kr, from.clone()), &(v, from));
            });
        }
        if let Some(before) = &self.before {
            let [keys, values] = [at.state, at.state + 1].map(|i| cx.buf(i));
            cx.each(&token.own, &token.end, |cx, lag| {
                let number = before + &token.t - &lag;
                let from = cx.bind((&self.r * self.window + number % self.window) * self.d + &self.head);
                let slot = cx.bind(lag + self.slots);
                run(cx, &slot, Kind::Kept, &(keys, from.clone()), &(values, from));
            });
        }
        let last = cx.bind(&token.end + self.slots);
        run(cx, &last, Kind::Memory, &(hn, token.col.clone()), &(h, token.col.clone()));
    }

    fn query(&self, cx: &Lower<'_>, token: &Token, kind: Kind) -> Place {
        let windowed = matches!(kind, Kind::Token | Kind::Kept);
        (cx.buf(if windowed { self.at.qr } else { 0 }), token.col.clone())
    }

    /// What the score and the weight of a slot add to the gradients of query, key and value.
    fn spread(&self, cx: &mut Lower<'_>, token: &Token, slot: &Expr, kind: Kind, keys: &Place) {
        let q = self.query(cx, token, kind);
        let dy = cx.buf(self.at.dy);
        let (ds, w) = (cx.bind(Expr::load(self.ds, slot)), cx.bind(Expr::load(self.w, slot)));
        let dq = self.dq[usize::from(matches!(kind, Kind::Token | Kind::Kept))];
        let sums = match kind {
            Kind::Persistent => Some((self.sums[2], self.sums[3], cx.bind(slot * self.k))),
            Kind::Token => Some((self.sums[0], self.sums[1], cx.bind((&token.t + self.slots - slot) * self.k))),
            Kind::Kept | Kind::Memory => None,
        };
        cx.lanes(0, self.k, 4, |cx, c| {
            cx.store(dq, &c, ds.clone().fma(Expr::load(keys.0, &keys.1 + &c), Expr::load(dq, &c)));
            let query = Expr::load(q.0, &q.1 + &c);
            let dy = Expr::load(dy, &token.col + &c);
            match &sums {
                Some((key, value, base)) => {
                    let at = cx.bind(base + &c);
                    cx.store(*key, &at, ds.clone().fma(query, Expr::load(*key, &at)));
                    cx.store(*value, &at, w.clone().fma(dy, Expr::load(*value, &at)));
                }
                None if kind == Kind::Memory => {
                    cx.put(self.at.hn, &token.col + &c, query * &ds);
                    cx.put(self.at.hn + 1, &token.col + &c, dy * &w);
                }
                None => {}
            }
        });
    }
}
