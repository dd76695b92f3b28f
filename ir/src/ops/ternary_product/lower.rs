//! The loops of the ternary product.
//!
//! A grid instance owns a tile of rows and a few blocks of 32 weight rows. Many rows share a panel of unpacked codes; few rows
//! unpack in registers. A panel may hold a part of the columns only: what its chains have come to is then kept for all rows.

use super::{
    Shape, TernaryProduct,
    chains::{Chains, Codes, Place},
    tiling::Tiling,
};
use crate::{
    DType,
    loops::{Buf, Expr, f32c, i32c, int},
    lower::Lower,
    ops::{
        pack_ternary::BLOCK_ROWS,
        row_tiles::{Instances, Part, row_tiles},
    },
};

/// Words of one half of a block for four columns.
const HALF: usize = BLOCK_ROWS / 2;

/// What all parts of the loops need.
pub(super) struct Parts<'a> {
    pub(super) op: &'a TernaryProduct,
    pub(super) s: Shape,
    pub(super) t: Tiling,
    pub(super) codes: Buf,
    pub(super) scales: Buf,
    /// Packed codes and scales of each weight.
    pub(super) weights: Vec<(Buf, Buf)>,
    /// Groups of each weight's scales.
    alphas: Vec<usize>,
    /// Sums of the codes of each piece of each row of the instance.
    pub(super) sums: Buf,
    /// Unpacked codes of the current block of each weight, words `[weight][half][width / 4][16]`: lane `l` of half `h` is row
    /// `16 h + l`.
    panel: Buf,
    /// Results, `[weight][row][32]`: of a register tile, or of all rows of the instance where panels hold a part of the columns.
    pub(super) tile: Buf,
    /// Sums within a weight group: `[row][32]` of a register tile, or as the results.
    pub(super) part: Buf,
}

pub(super) fn lower(op: &TernaryProduct, cx: &mut Lower<'_>) {
    let types = cx.in_types();
    let s = op.shape(&types).expect("the operand types were inferred");
    let t = Tiling::of(cx.variant());
    let n = op.n_weights;
    let panel = if t.panel { n * t.width(&s) / 4 * BLOCK_ROWS } else { 1 };
    let kept = if t.columns > 0 { t.rows } else { t.tile };
    let part = if t.columns > 0 && s.nb == 1 { n * kept } else { t.tile };
    let parts = Parts {
        op,
        s,
        t,
        codes: cx.buf(0),
        scales: cx.buf(1),
        weights: (0..n).map(|w| (cx.buf(TernaryProduct::packed(w)), cx.buf(TernaryProduct::packed(w) + 1))).collect(),
        alphas: (0..n)
            .map(|w| types[TernaryProduct::packed(w) + 1].numel() / (op.m.div_ceil(BLOCK_ROWS) * s.nb * BLOCK_ROWS))
            .collect(),
        sums: cx.b.scratch("sums", DType::I32, t.rows * s.pieces()),
        panel: cx.b.scratch("panel", DType::I32, panel),
        tile: cx.b.scratch("tile", DType::F32, n * kept * BLOCK_ROWS),
        part: cx.b.scratch("part", DType::F32, part * BLOCK_ROWS),
    };
    let offsets = types.last().filter(|_| op.grouped_rows);
    let instances = Instances {
        rows: s.rows,
        groups: s.groups,
        offsets: offsets.map(|ty| (cx.buf(types.len() - 1), (ty.numel() - 1) / s.groups)),
        height: t.rows,
        blocks: op.m.div_ceil(BLOCK_ROWS),
        chunk: t.blocks,
    };
    instances.emit(cx, &|cx, lo, hi| parts.row_sums(cx, lo, hi), &|cx, part| {
        let [lo, hi] = part.blocks;
        cx.each(lo, hi, |cx, ob| {
            if t.columns > 0 {
                return parts.in_columns(cx, &part, &ob);
            }
            if t.panel {
                parts.unpack(cx, part.group, &ob, &int(0), s.np / 4);
            }
            row_tiles(cx, part.rows, part.known, t.tile, &|cx, row, rows| {
                let place = Place::of(cx, &parts, part.first, row);
                parts.tile(cx, part.group, &ob, &place, rows, None);
                parts.hand_out(cx, &ob, row, rows, &int(0));
            });
        });
    });
}

/// The codes of four columns of one row of group `q` of a packed word, times 4 where `q` is odd: that saves every other shift.
fn unpack_times(word: &Expr, q: usize) -> Expr {
    let word = if q < 2 { word.clone() } else { word.clone().shr(4) };
    word & i32c(if q.is_multiple_of(2) { 0x0303_0303 } else { 0x0c0c_0c0c })
}

/// The codes of four columns of one row of group `q` of a packed word.
fn unpack(word: &Expr, q: usize) -> Expr {
    let word = if q == 0 { word.clone() } else { word.clone().shr(2 * q as i32) };
    word & i32c(0x0303_0303)
}

impl Parts<'_> {
    /// Sum the codes of every piece of the rows `lo .. hi`, and negate.
    fn row_sums(&self, cx: &mut Lower<'_>, lo: &Expr, hi: &Expr) {
        let s = self.s;
        let piece = |cx: &mut Lower<'_>, row: &Expr, c: &Expr, words: usize| {
            let from = cx.b.bind(row * (s.np / 4) + c * (s.piece / 4));
            let sum = cx.sum(0, words, |_, k| i32c(0).dot4(i32c(0x0101_0101), Expr::word(self.codes, &from + k)));
            cx.b.store(self.sums, (row - lo) * s.pieces() + c, -sum);
        };
        cx.each(lo, hi, |cx, row| {
            let last = s.pieces() - 1;
            let full = if s.words(last) == s.piece / 4 { last + 1 } else { last };
            cx.each(0, full, |cx, c| piece(cx, &row, &c, s.piece / 4));
            if full == last {
                piece(cx, &row, &int(last), s.words(last));
            }
        });
    }

    /// Where the scales of block `ob` of group `g` of weight `w` begin.
    fn scales_base(&self, g: &Expr, ob: &Expr, w: usize) -> Expr {
        let lead = g / (self.s.groups / self.alphas[w]);
        (lead * self.op.m.div_ceil(BLOCK_ROWS) + ob) * (self.s.nb * BLOCK_ROWS)
    }

    /// Unpack `words` words of four columns of block `ob` into the panel, from word `first` on.
    fn unpack(&self, cx: &mut Lower<'_>, g: &Expr, ob: &Expr, first: &Expr, words: usize) {
        let width = self.t.width(&self.s) / 4;
        for (w, &(packed, _)) in self.weights.iter().enumerate() {
            let from = cx.b.bind(self.packed_base(g, ob) + first * 8);
            let to = w * width * BLOCK_ROWS;
            cx.each(0, words, |cx, k| {
                let (from, to) = (cx.b.bind(&from + &k * 8), cx.b.bind(k * HALF + to));
                cx.lanes(0, 8, 1, |cx, lane| {
                    let word = cx.b.bind(Expr::word(packed, &from + &lane));
                    for q in 0..4 {
                        let to = &to + q / 2 * (width * HALF) + q % 2 * 8;
                        cx.b.store(self.panel, to + &lane, unpack(&word, q));
                    }
                });
            });
        }
    }

    /// The rows of an instance against block `ob`, one panel of columns after the other.
    fn in_columns(&self, cx: &mut Lower<'_>, part: &Part<'_>, ob: &Expr) {
        let (s, t) = (self.s, self.t);
        let unit = s.unit().expect("panels end behind whole sums");
        let chains = if s.nb == 1 { self.part } else { self.tile };
        let kept = |row: &Expr| (row - part.first) * BLOCK_ROWS;
        for w in 0..self.op.n_weights {
            let from = cx.b.bind(kept(part.rows[0]) + w * (t.rows * BLOCK_ROWS));
            let to = cx.b.bind(kept(part.rows[1]) + w * (t.rows * BLOCK_ROWS));
            cx.lanes(from, to, 4, |cx, at| cx.b.store(chains, at, f32c(0.0)));
        }
        let panel = |cx: &mut Lower<'_>, first: &Expr, units: usize, words: usize, ends: bool| {
            let word = cx.b.bind(first * (unit / 4));
            self.unpack(cx, part.group, ob, &word, words);
            row_tiles(cx, part.rows, part.known, t.tile, &|cx, row, rows| {
                let place = Place::of(cx, self, part.first, row).further(cx, self, first);
                self.tile(cx, part.group, ob, &place, rows, Some((units, ends)));
                if ends {
                    self.hand_out(cx, ob, row, rows, &place.kept);
                }
            });
        };
        let (all, each) = (s.np.div_ceil(unit), t.columns / unit);
        let rest = if all % each == 0 { each } else { all % each };
        cx.each_step(0, all - rest, each, |cx, first| panel(cx, &first, each, t.columns / 4, false));
        let words = (s.np - (all - rest) * unit) / 4;
        panel(cx, &int(all - rest), rest, words, true);
    }

    /// The first word of block `ob` of group `g` of a packed weight.
    fn packed_base(&self, g: &Expr, ob: &Expr) -> Expr {
        let lead = g / (self.s.groups / self.s.leads);
        (lead * self.op.m.div_ceil(BLOCK_ROWS) + ob) * (self.s.np / 4 * 8)
    }

    /// A register tile of `rows` rows against block `ob` of all weights: all columns, or so many units of which the last may be the
    /// last of the row.
    fn tile(&self, cx: &mut Lower<'_>, g: &Expr, ob: &Expr, place: &Place, rows: usize, units: Option<(usize, bool)>) {
        let width = self.t.width(&self.s) / 4;
        for w in 0..self.op.n_weights {
            let alpha = cx.b.bind(self.scales_base(g, ob, w));
            let alpha = &alpha;
            if self.t.panel {
                cx.each(0, 2, |cx, half| {
                    let from = cx.b.bind(&half * (width * HALF) + w * (width * BLOCK_ROWS));
                    let first = cx.b.bind(half * HALF);
                    let codes: Codes<'_> = &|_, k, lane| vec![Expr::load(self.panel, k * HALF + lane + &from)];
                    cx.lanes(0, HALF, 2, |cx, lane| {
                        let at = cx.b.bind(first + &lane);
                        Chains { parts: self, w, rows, place, lane: &lane, at: &at, alpha, codes, packed: None }
                            .emit(cx, units);
                    });
                });
                continue;
            }
            let from = cx.b.bind(self.packed_base(g, ob));
            let packed = self.weights[w].0;
            let codes: Codes<'_> = &|cx, k, lane| {
                let word = cx.b.bind(Expr::word(packed, k * 8 + lane + &from));
                (0..4).map(|q| unpack_times(&word, q)).collect()
            };
            let ahead = (self.t.ahead > 0).then_some((packed, &from));
            cx.lanes(0, 8, 1, |cx, lane| {
                Chains { parts: self, w, rows, place, lane: &lane, at: &lane, alpha, codes, packed: ahead }
                    .emit(cx, units);
            });
        }
    }

    /// Push the results of a register tile, which lie from `kept` on.
    fn hand_out(&self, cx: &mut Lower<'_>, ob: &Expr, row: &Expr, rows: usize, kept: &Expr) {
        let n = self.op.m;
        let col = cx.b.bind(ob * BLOCK_ROWS);
        let count = cx.b.bind((int(n) - &col).min(int(BLOCK_ROWS)));
        for r in 0..rows {
            let row = cx.b.bind(row + r);
            cx.lanes(0, count.clone(), 2, |cx, o| {
                let value = |w: usize| Expr::load(self.tile, kept + &o + self.result(w, r));
                let values: Vec<(usize, Expr)> = (0..self.op.n_weights).map(|w| (w, value(w))).collect();
                cx.push(&row, &(&col + &o), &values);
            });
        }
    }

    /// Where the results of row `r` of a register tile begin.
    pub(super) fn result(&self, w: usize, r: usize) -> usize {
        let rows = if self.t.columns > 0 { self.t.rows } else { self.t.tile };
        (w * rows + r) * BLOCK_ROWS
    }
}
