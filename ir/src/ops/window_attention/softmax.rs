//! The two ways to do some tokens of one head: a few one after another, or a tile of them as lanes.

use super::{
    super::heads::{NEG, chains, dots},
    *,
};
use crate::loops::{
    Acc, f32c, math,
    tile::{Extent, Product},
};

/// Tokens of one tile.
pub(super) const TILE: usize = 16;

/// Consecutive tokens whose keys and values lie in consecutive rows of one buffer.
struct Piece {
    keys: Buf,
    values: Buf,
    /// How many.
    n: Expr,
    /// Where the columns of the head start in the first of the rows.
    from: Expr,
    /// Place of the first one among the visible tokens.
    to: Expr,
}

impl Frame {
    /// Tokens `first .. first + tile`, as far as they exist.
    pub(super) fn tile(&self, cx: &mut Lower<'_>, tile: usize, first: &Expr) {
        let n = cx.bind((Expr::from(self.tokens) - first).min(Expr::from(tile)));
        if tile < TILE {
            let scores = cx.scratch("scores", DType::F32, self.slots + self.window + 1);
            cx.each(0, n, |cx, i| {
                let t = cx.bind(first + i);
                self.one(cx, scores, &t);
            });
        } else {
            self.many(cx, first, &n);
        }
    }

    fn scale(&self) -> f32 {
        (self.k as f32).powf(-0.5)
    }

    /// Where the columns of the head start in `row`.
    fn column(&self, row: &Expr) -> Expr {
        row * self.d + &self.head
    }

    /// The greatest visible lag of token `t`, which has a window.
    fn reach(&self, cx: &mut Lower<'_>, t: &Expr) -> Expr {
        let pos = Expr::load(cx.buf(self.at.pos), &self.row0 + t).cast(Ty::I64);
        let number = self.cache.as_ref().map_or_else(|| t.clone(), |c| &c.before + t);
        let reach = pos.min(number).min(Expr::from(self.window - 1)).max(Expr::from(0));
        cx.bind(reach)
    }

    /// Tokens `lo .. hi` in ascending order; negative ones are cached.
    fn pieces(&self, cx: &mut Lower<'_>, lo: &Expr, hi: &Expr) -> Vec<Piece> {
        let zero = || Expr::from(0);
        let (keys, values) = (cx.buf(self.at.kr), cx.buf(self.at.v));
        let start = cx.bind(lo.clone().max(zero()));
        let mut pieces = vec![Piece {
            keys,
            values,
            n: cx.bind(hi - &start),
            from: cx.bind(self.column(&(&self.row0 + &start))),
            to: cx.bind(start - lo),
        }];
        if let Some(c) = &self.cache {
            // The slots in front of the next one to be written are younger than those behind it.
            let next = cx.bind(&c.before % self.window);
            let ring = cx.bind(&self.r * self.window + &next);
            let turn = cx.bind(-next);
            let young = cx.bind(lo.clone().max(turn.clone()).min(zero()));
            for (from, to, wrap) in [(young.clone(), zero(), 0), (lo.clone(), young, self.window)] {
                let n = cx.bind((&to - &from).max(zero()));
                let row = cx.bind(self.column(&(&ring + &from + wrap)));
                pieces.push(Piece { keys: c.keys, values: c.values, n, from: row, to: cx.bind(from - lo) });
            }
            pieces.reverse();
        }
        pieces
    }

    /// Token `t` alone.
    fn one(&self, cx: &mut Lower<'_>, scores: Buf, t: &Expr) {
        let (d, k, slots) = (self.d, self.k, self.slots);
        let [q, qr, pk, pv, hn, h] =
            [self.at.q, self.at.qr, self.at.pk, self.at.pk + 1, self.at.hn, self.at.hn + 1].map(|i| cx.buf(i));
        let at = cx.bind(self.column(&(&self.row0 + t)));
        let p0 = cx.bind(self.column(&self.p0));
        let of = |x: Buf, at: &Expr| {
            let at = at.clone();
            move |_: &mut Lower<'_>, c: &Expr| Expr::load(x, &at + c)
        };
        let rows = |x: Buf, at: &Expr| {
            let at = at.clone();
            move |_: &mut Lower<'_>, i: &Expr, c: &Expr| Expr::load(x, &at + i * d + c)
        };
        let put =
            |to: Expr| move |cx: &mut Lower<'_>, i: &Expr, x: Expr| cx.store(scores, &to + i, x * f32c(self.scale()));
        let zero = || Expr::from(0);
        dots(cx, (zero(), Expr::from(slots)), k, &rows(pk, &p0), &of(q, &at), &put(zero()));
        let (pieces, seen) = if self.window > 0 {
            let reach = self.reach(cx, t);
            let (lo, hi) = (cx.bind(t - &reach), cx.bind(t + 1));
            (self.pieces(cx, &lo, &hi), cx.bind(reach + 1))
        } else {
            (vec![], zero())
        };
        for p in &pieces {
            dots(cx, (zero(), p.n.clone()), k, &rows(p.keys, &p.from), &of(qr, &at), &put(&p.to + slots));
        }
        let last = cx.bind(seen + slots);
        dots(cx, (zero(), Expr::from(1)), k, &rows(hn, &at), &of(q, &at), &put(last.clone()));

        let all = cx.bind(&last + 1);
        let most = cx.reduce(0, all.clone(), |_, j| vec![Acc::Max(Expr::load(scores, j))]).remove(0);
        cx.lanes(0, all.clone(), 2, |cx, j| {
            let e = math::exp(cx, Expr::load(scores, &j) - &most);
            cx.store(scores, j, e);
        });
        let total = cx.sum(0, all, |_, j| Expr::load(scores, j));
        let part = cx.bind(f32c(1.0) / total);
        cx.lanes(0, k, chains(k), |cx, c| {
            let y = cx.local(Expr::load(scores, &last) * Expr::load(h, &at + &c));
            let mut add = |n: Expr, values: Buf, from: &Expr, to: Expr| {
                cx.each(0, n, |cx, j| {
                    let weight = Expr::load(scores, &to + &j);
                    cx.set(y, weight.fma(Expr::load(values, from + j * d + &c), y));
                });
            };
            add(Expr::from(slots), pv, &p0, zero());
            for p in &pieces {
                add(p.n.clone(), p.values, &p.from, &p.to + slots);
            }
            cx.put(0, &at + c, y * &part);
        });
    }

    /// Tokens `first .. first + n`, at most [`TILE`], as the columns of a matrix of scores.
    fn many(&self, cx: &mut Lower<'_>, first: &Expr, n: &Expr) {
        let (d, k, slots) = (self.d, self.k, self.slots);
        let [q, qr, pk, pv, hn, h] =
            [self.at.q, self.at.qr, self.at.pk, self.at.pk + 1, self.at.hn, self.at.hn + 1].map(|i| cx.buf(i));
        let reachable = if self.cache.is_some() { self.window } else { self.window.min(self.tokens) };
        let span = if self.window > 0 { reachable + TILE - 1 } else { 0 };
        let scores = cx.scratch("scores", DType::F32, (slots + span + 1) * TILE);
        let (qt, qrt) = (cx.scratch("qt", DType::F32, k * TILE), cx.scratch("qrt", DType::F32, k * TILE));
        let [out, part] = [TILE * k, TILE].map(|len| cx.scratch("sums", DType::F32, len));
        let oldest = cx.scratch("oldest", DType::I32, TILE);
        let at = cx.bind(self.column(&(&self.row0 + first)));
        let p0 = cx.bind(self.column(&self.p0));
        let end = cx.bind(first + n);

        for (from, to) in [(q, qt), (qr, qrt)].into_iter().take(if self.window > 0 { 2 } else { 1 }) {
            cx.each(0, k, |cx, c| {
                let (from0, to0) = (cx.bind(&at + &c), cx.bind(c * TILE));
                cx.lanes(0, n.clone(), 1, |cx, i| {
                    cx.store(to, &to0 + &i, Expr::load(from, &from0 + i * d) * f32c(self.scale()));
                });
                cx.lanes(n.clone(), TILE, 1, |cx, i| cx.store(to, &to0 + i, f32c(0.0)));
            });
        }
        let queries = |x: Buf| move |_: &mut Lower<'_>, c: &Expr, i: &Expr| Expr::load(x, c * TILE + i);
        let rows = |x: Buf, at: &Expr| {
            let at = at.clone();
            move |_: &mut Lower<'_>, i: &Expr, c: &Expr| Expr::load(x, &at + i * d + c)
        };
        Product { m: slots.into(), n: TILE.into(), k: k.into(), a: &rows(pk, &p0), b: &queries(qt), init: None }
            .emit(cx, &|cx, j, i, x| cx.store(scores, j * TILE + i, x));
        let (pieces, seen) = if self.window > 0 {
            let lo = self.oldest(cx, oldest, first, n);
            let (pieces, seen) = (self.pieces(cx, &lo, &end), cx.bind(&end - &lo));
            for p in &pieces {
                let (row, token) = (cx.bind(&p.to + slots), cx.bind(&p.to + &lo));
                let keys = rows(p.keys, &p.from);
                let m = Extent::Of(p.n.clone());
                Product { m, n: TILE.into(), k: k.into(), a: &keys, b: &queries(qrt), init: None }.emit(
                    cx,
                    &|cx, j, i, x| {
                        // Column `i` is token `first + i`, which sees its oldest token and those up to itself.
                        let token = cx.bind((&token + j).cast(Ty::I32));
                        let own = first.clone().cast(Ty::I32) + i.clone().cast(Ty::I32);
                        let seen = Expr::load(oldest, i).le(&token) & token.clone().le(own);
                        cx.store(scores, (&row + j) * TILE + i, seen.select(x, f32c(NEG)));
                    },
                );
            }
            (pieces, seen)
        } else {
            (vec![], Expr::from(0))
        };
        let last = cx.bind((seen + slots) * TILE);
        cx.lanes(0, TILE, 1, |cx, i| cx.store(scores, &last + i, f32c(0.0)));
        cx.each(0, n.clone(), |cx, i| {
            let row = cx.bind(&at + &i * d);
            let x =
                cx.reduce(0, k, |_, c| vec![Acc::Dot(Expr::load(q, &row + &c), Expr::load(hn, &row + c))]).remove(0);
            cx.store(scores, &last + i, x * f32c(self.scale()));
        });
        self.softmax(cx, scores, part, &last);

        let weights = |to: &Expr| {
            let to = to.clone();
            move |_: &mut Lower<'_>, i: &Expr, j: &Expr| Expr::load(scores, (&to + j) * TILE + i)
        };
        let sums = |_: &mut Lower<'_>, i: &Expr, c: &Expr| Expr::load(out, i * k + c);
        let keep = |cx: &mut Lower<'_>, i: &Expr, c: &Expr, x: Expr| cx.store(out, i * k + c, x);
        let m = || Extent::Of(n.clone());
        let zero = Expr::from(0);
        Product { m: m(), n: k.into(), k: slots.into(), a: &weights(&zero), b: &rows(pv, &p0), init: None }
            .emit(cx, &keep);
        for p in &pieces {
            let row = cx.bind(&p.to + slots);
            let (a, b) = (weights(&row), rows(p.values, &p.from));
            Product { m: m(), n: k.into(), k: p.n.clone().into(), a: &a, b: &b, init: Some(&sums) }.emit(cx, &keep);
        }
        cx.each(0, n.clone(), |cx, i| {
            let row = cx.bind(&at + &i * d);
            let weight = cx.bind(Expr::load(scores, &last + &i));
            let part = cx.bind(Expr::load(part, &i));
            let from = cx.bind(i * k);
            cx.lanes(0, k, 2, |cx, c| {
                let y = weight.fma(Expr::load(h, &row + &c), Expr::load(out, &from + &c));
                cx.put(0, &row + c, y * part);
            });
        });
    }

    /// Store the oldest visible token of every column, for columns without a token one that never comes; returns the oldest of all.
    fn oldest(&self, cx: &mut Lower<'_>, oldest: Buf, first: &Expr, n: &Expr) -> Expr {
        let least = cx.local(first.clone());
        cx.lanes(0, TILE, 1, |cx, i| cx.store(oldest, i, i32c(i32::MAX)));
        cx.each(0, n.clone(), |cx, i| {
            let t = cx.bind(first + &i);
            let reach = self.reach(cx, &t);
            let lo = cx.bind(t - reach);
            cx.store(oldest, i, lo.clone().cast(Ty::I32));
            cx.set(least, lo.min(least));
        });
        let bound = first - (self.window - 1);
        cx.bind(Expr::from(least).min(first).max(bound))
    }

    /// Turn every column of `scores` up to the row that starts at `last` into weights; `part` gets the inverse of their sums.
    fn softmax(&self, cx: &mut Lower<'_>, scores: Buf, part: Buf, last: &Expr) {
        let rows = cx.bind(last / TILE + 1);
        cx.lanes(0, TILE, 2, |cx, i| {
            let most = cx.local(f32c(NEG));
            cx.each(0, rows.clone(), |cx, j| {
                cx.set(most, Expr::load(scores, j * TILE + &i).max(most));
            });
            let total = cx.local(f32c(0.0));
            cx.each(0, rows, |cx, j| {
                let at = cx.bind(j * TILE + &i);
                let x = cx.bind(Expr::load(scores, &at));
                let e = math::exp(cx, &x - most);
                let e = cx.bind(x.le(f32c(0.5 * NEG)).select(f32c(0.0), e));
                cx.store(scores, at, &e);
                cx.set(total, total + e);
            });
            cx.store(part, i, f32c(1.0) / Expr::from(total));
        });
    }
}
