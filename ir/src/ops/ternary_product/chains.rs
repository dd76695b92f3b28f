//! The chains of one lane: integer sums over blocks of columns, added up in the order that the operation states.
//!
//! What is carried from sum to sum is in memory: registers are for the products.

use super::lower::Parts;
use crate::{
    loops::{Buf, Expr, Ty, f32c, i32c, int},
    lower::Lower,
    ops::pack_ternary::BLOCK_ROWS,
};

/// The codes of word `k` by lane: those of one weight row, or of four with eight rows between them, those of every other one times 4.
pub(super) type Codes<'f> = &'f dyn Fn(&mut Lower<'_>, &Expr, &Expr) -> Vec<Expr>;

/// Bytes of a line of memory.
const LINE: usize = 64;

/// Where the operands of the first row of a register tile are: the first word, the first scale, the first sum, the first weight
/// scale, and the chains that are kept.
pub(super) struct Place {
    word: Expr,
    scale: Expr,
    sum: Expr,
    alpha: Expr,
    pub(super) kept: Expr,
}

impl Place {
    /// Of row `row` of an instance that begins with row `first`.
    pub(super) fn of(cx: &mut Lower<'_>, parts: &Parts<'_>, first: &Expr, row: &Expr) -> Place {
        let s = parts.s;
        let mut at = |e: Expr| cx.b.bind(e);
        let (word, scale) = (at(row * (s.np / 4)), at(row * s.nc));
        let sum = at((row - first) * s.pieces());
        let kept = if parts.t.columns > 0 { at((row - first) * BLOCK_ROWS) } else { int(0) };
        Place { word, scale, sum, alpha: int(0), kept }
    }

    /// The same so many units of columns further.
    pub(super) fn further(self, cx: &mut Lower<'_>, parts: &Parts<'_>, units: &Expr) -> Place {
        let s = parts.s;
        let pieces = if s.nb == 1 { 1 } else { s.span };
        let mut at = |e: Expr| cx.b.bind(e);
        let words = at(units * (pieces * s.piece / 4));
        let pieces = at(units * pieces);
        Place {
            word: at(self.word + words),
            scale: if parts.op.block == 0 { self.scale } else { at(self.scale + &pieces) },
            sum: at(self.sum + pieces),
            alpha: if s.nb == 1 { int(0) } else { at(units * BLOCK_ROWS) },
            kept: self.kept,
        }
    }
}

/// The chains of one lane: `rows` rows times the weight rows `at + 8 q` of weight `w`.
pub(super) struct Chains<'a> {
    pub(super) parts: &'a Parts<'a>,
    pub(super) w: usize,
    pub(super) rows: usize,
    pub(super) place: &'a Place,
    pub(super) lane: &'a Expr,
    pub(super) at: &'a Expr,
    /// Where the scales of the block begin.
    pub(super) alpha: &'a Expr,
    pub(super) codes: Codes<'a>,
    /// The packed codes that are read, and the first word of the block, if they are asked for ahead.
    pub(super) packed: Option<(Buf, &'a Expr)>,
}

impl Chains<'_> {
    /// All columns, or so many units of them, see [`super::lower::Parts::tile`].
    pub(super) fn emit(&self, cx: &mut Lower<'_>, units: Option<(usize, bool)>) {
        let s = self.parts.s;
        let end = s.words(s.pieces() - 1);
        let Some((n, ends)) = units else {
            self.each().for_each(|(r, q)| cx.b.store(self.parts.tile, self.result(r, q), f32c(0.0)));
            return self.groups(cx, s.nb, true);
        };
        if s.nb > 1 {
            return self.groups(cx, n, ends);
        }
        let full = if ends && end < s.piece / 4 { n - 1 } else { n };
        cx.each(0, full, |cx, c| self.piece(cx, &int(0), &c, s.piece / 4, [false, false]));
        if full < n {
            self.piece(cx, &int(0), &int(full), end, [false, false]);
        }
        if ends {
            for (r, q) in self.each() {
                let y = self.alpha(&int(0), q).fma(Expr::load(self.parts.part, self.part(r, q)), f32c(0.0));
                cx.b.store(self.parts.tile, self.result(r, q), y);
            }
        }
    }

    /// `n` groups; the last of them may be the last of the row.
    fn groups(&self, cx: &mut Lower<'_>, n: usize, ends: bool) {
        let s = self.parts.s;
        let last = s.of_group(s.nb - 1);
        let words = s.words(last.end - 1);
        let short = ends && (last.len() < s.span || words < s.piece / 4);
        let full = if short { n - 1 } else { n };
        cx.each(0, full, |cx, b| self.group(cx, &b, s.span, s.piece / 4));
        if short {
            self.group(cx, &int(full), last.len(), words);
        }
    }

    /// Rows of the tile, and steps of eight weight rows.
    fn each(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let per = if self.parts.t.panel { 1 } else { 4 };
        (0..self.rows).flat_map(move |r| (0..per).map(move |q| (r, q)))
    }

    fn result(&self, r: usize, q: usize) -> Expr {
        self.at + &self.place.kept + self.parts.result(self.w, r) + 8 * q
    }

    fn part(&self, r: usize, q: usize) -> Expr {
        if self.parts.t.columns > 0 && self.parts.s.nb == 1 {
            return self.result(r, q);
        }
        self.at + r * BLOCK_ROWS + 8 * q
    }

    fn alpha(&self, b: &Expr, q: usize) -> Expr {
        let at = b * BLOCK_ROWS + self.alpha + &self.place.alpha + self.at + 8 * q;
        Expr::load(self.parts.weights[self.w].1, at)
    }

    /// The pieces of weight group `b`; the last one has `last` words.
    fn group(&self, cx: &mut Lower<'_>, b: &Expr, pieces: usize, last: usize) {
        let whole = self.parts.s.piece / 4;
        let words = |c: usize| if c + 1 == pieces { last } else { whole };
        if pieces <= 2 {
            return (0..pieces).for_each(|c| self.piece(cx, b, &int(c), words(c), [c == 0, c + 1 == pieces]));
        }
        self.piece(cx, b, &int(0), whole, [true, false]);
        cx.each(1, pieces - 1, |cx, c| self.piece(cx, b, &c, whole, [false, false]));
        self.piece(cx, b, &int(pieces - 1), last, [false, true]);
    }

    fn piece(&self, cx: &mut Lower<'_>, b: &Expr, c: &Expr, words: usize, [is_first, is_last]: [bool; 2]) {
        let (s, parts) = (self.parts.s, self.parts);
        let Place { word: x, scale: a, sum: sums, .. } = self.place;
        let c = cx.b.bind(b * s.span + c);
        let products: Vec<_> = self.each().map(|_| cx.b.local(i32c(0))).collect();
        let k0 = cx.b.bind(&c * (s.piece / 4));
        let step = |cx: &mut Lower<'_>, k: Expr| {
            let k = cx.b.bind(&k0 + k);
            let word = |r: usize| Expr::word(parts.codes, x + &k + r * (s.np / 4));
            let codes = (self.codes)(cx, &k, self.lane);
            if let [code] = &codes[..] {
                let code = cx.b.bind(code);
                for (r, &p) in products.iter().enumerate() {
                    cx.b.set(p, Expr::from(p).dot4(&code, word(r)));
                }
                return;
            }
            let words: Vec<Expr> = (0..self.rows).map(|r| cx.b.bind(word(r))).collect();
            for (q, code) in codes.into_iter().enumerate() {
                let code = cx.b.bind(code);
                for (r, word) in words.iter().enumerate() {
                    let p = products[4 * r + q];
                    cx.b.set(p, Expr::from(p).dot4(&code, word));
                }
            }
        };
        if let Some((packed, from)) = self.packed {
            // One hint for each line of codes, between the products: many at once would wait for each other.
            let each = LINE / BLOCK_ROWS;
            let ahead = cx.b.bind((&k0 * 8 + from) * 4 + parts.t.ahead);
            cx.each(0, words / each, |cx, line| {
                cx.b.prefetch(packed, &ahead + &line * LINE);
                (0..each).for_each(|i| step(cx, &line * each + i));
            });
        } else {
            cx.each(0, words, |cx, k| step(cx, k));
        }
        for (i, (r, q)) in self.each().enumerate() {
            let scale = if parts.op.block == 0 { int(0) } else { c.clone() };
            let scale = Expr::load(parts.scales, a + scale + r * s.nc);
            // Codes are one above the weights, so the sum of the activations comes off.
            let product = Expr::from(products[i]);
            let product = if q % 2 == 1 { product.sar(2) } else { product };
            let product = product + Expr::load(parts.sums, sums + &c + r * s.pieces());
            let before = if is_first { f32c(0.0) } else { Expr::load(parts.part, self.part(r, q)) };
            let sum = scale.fma(product.cast(Ty::F32), before);
            if !is_last {
                cx.b.store(parts.part, self.part(r, q), sum);
                continue;
            }
            let y = self.alpha(b, q).fma(sum, Expr::load(parts.tile, self.result(r, q)));
            cx.b.store(parts.tile, self.result(r, q), y);
        }
    }
}
