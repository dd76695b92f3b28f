//! The loops of the ternary product.
//!
//! A grid instance owns a tile of rows and a few blocks of 32 weight rows. Many rows share a panel of unpacked codes; few rows
//! unpack in registers. Tile shapes never show in the result: every output is the chain that the operation states.

use super::{Shape, TernaryProduct};
use crate::{
    DType,
    loops::{Buf, Expr, Ty, f32c, i32c, int},
    lower::Lower,
    ops::{
        pack_ternary::BLOCK_ROWS,
        row_tiles::{Instances, row_tiles},
    },
};

/// Rows of an instance that unpacks into a panel.
const PANEL_ROWS: usize = 126;
/// Rows of a register tile on a panel: with two vectors of weight rows they keep all sums in 16 registers.
const PANEL_TILE: usize = 6;
/// From this many rows for each group of weights on, a panel pays.
const PANEL_FROM: usize = 12;
/// Words of one half of a block for four columns.
const HALF: usize = BLOCK_ROWS / 2;
/// Instances that keep the threads of a small machine busy.
const INSTANCES: usize = 4;
/// Weight blocks of an instance share the sums of its rows.
const BLOCKS: usize = 16;

/// How the rows of one instance are worked on.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    /// Whether weight codes are unpacked to memory first.
    panel: bool,
    /// Rows of an instance.
    rows: usize,
    /// Rows of a register tile.
    tile: usize,
    /// Weight blocks of an instance.
    blocks: usize,
}

impl Tiling {
    fn of(op: &TernaryProduct, s: &Shape) -> Tiling {
        // Rows that a group of weights has, on average where they are counted at run time.
        let usual = s.rows / s.groups;
        let (extent, leads) = if op.grouped_rows { (s.rows, 1) } else { (usual, s.groups) };
        let panel = usual >= PANEL_FROM;
        let (most, tile) = match (panel, usual) {
            (true, _) => (PANEL_ROWS, PANEL_TILE),
            (false, 0 | 1) => (PANEL_FROM, 1),
            (false, _) => (PANEL_FROM, 2),
        };
        let rows = extent.div_ceil(extent.div_ceil(most)).next_multiple_of(tile);
        let all = op.m.div_ceil(BLOCK_ROWS);
        let fits = |n: &usize| leads * extent.div_ceil(rows) * all.div_ceil(*n) >= INSTANCES;
        Tiling { panel, rows, tile, blocks: (1..=BLOCKS.min(all)).rev().find(fits).unwrap_or(1) }
    }
}

/// What all parts of the loops need.
struct Parts<'a> {
    op: &'a TernaryProduct,
    s: Shape,
    t: Tiling,
    codes: Buf,
    scales: Buf,
    /// Packed codes and scales of each weight.
    weights: Vec<(Buf, Buf)>,
    /// Groups of each weight's scales.
    alphas: Vec<usize>,
    /// Sums of the codes of each piece of each row of the instance.
    sums: Buf,
    /// Scales of the current block of each weight, `[weight][group][32]`.
    alpha: Buf,
    /// Unpacked codes of the current block of each weight, words `[weight][half][np / 4][16]`: lane `l` of half `h` is row `16 h + l`.
    panel: Buf,
    /// Results of a register tile, `[weight][row][32]`.
    tile: Buf,
    /// Sums within a weight group, `[row][32]`.
    part: Buf,
}

pub(super) fn lower(op: &TernaryProduct, cx: &mut Lower<'_>) {
    let types = cx.in_types();
    let s = op.shape(&types).expect("the operand types were inferred");
    let t = Tiling::of(op, &s);
    let params = [
        ("m", op.m),
        ("np", s.np),
        ("rows", s.rows),
        ("group", op.group),
        ("block", op.block),
        ("n_weights", op.n_weights),
        ("groups", s.groups),
        ("grouped_rows", usize::from(op.grouped_rows)),
    ];
    cx.b.contract("ternary_product", &params.map(|(name, x)| (name, x as i64)));
    let n = op.n_weights;
    let panel = if t.panel { n * s.np / 4 * BLOCK_ROWS } else { 1 };
    let parts = Parts {
        op,
        s,
        t,
        codes: cx.buf(0),
        scales: cx.buf(1),
        weights: (0..n).map(|w| (cx.buf(TernaryProduct::packed(w)), cx.buf(TernaryProduct::packed(w) + 1))).collect(),
        alphas: (0..n).map(|w| types[TernaryProduct::packed(w) + 1].rows() / op.m).collect(),
        sums: cx.b.scratch("sums", DType::I32, t.rows * s.pieces()),
        alpha: cx.b.scratch("alpha", DType::F32, n * s.nb * BLOCK_ROWS),
        panel: cx.b.scratch("panel", DType::I32, panel),
        tile: cx.b.scratch("tile", DType::F32, n * t.tile * BLOCK_ROWS),
        part: cx.b.scratch("part", DType::F32, t.tile * BLOCK_ROWS),
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
            parts.stage(cx, part.group, &ob);
            row_tiles(cx, part.rows, part.known, t.tile, &|cx, row, rows| {
                parts.tile(cx, part.group, &ob, part.first, row, rows);
            });
        });
    });
}

/// The codes of word `k` by lane: those of one weight row, or of four with eight rows between them.
type Codes<'f> = &'f dyn Fn(&mut Lower<'_>, &Expr, &Expr) -> Vec<Expr>;

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

    /// Bring the scales of block `ob` into lane order and unpack its codes if there is a panel.
    fn stage(&self, cx: &mut Lower<'_>, g: &Expr, ob: &Expr) {
        let (s, m) = (self.s, self.op.m);
        for (w, (&(packed, alpha), &alphas)) in self.weights.iter().zip(&self.alphas).enumerate() {
            let lead = g / (self.s.groups / alphas) * m;
            let row = cx.b.bind(ob * BLOCK_ROWS);
            let base = cx.b.bind((lead + &row) * s.nb);
            let count = cx.b.bind((int(m) - row).min(int(BLOCK_ROWS)));
            cx.each(0, s.nb, |cx, b| {
                let to = cx.b.bind((&b + w * s.nb) * BLOCK_ROWS);
                let from = cx.b.bind(&base + b);
                cx.lanes(0, count.clone(), 1, |cx, o| {
                    cx.b.store(self.alpha, &to + &o, Expr::load(alpha, &from + o * s.nb));
                });
                cx.lanes(count.clone(), BLOCK_ROWS, 1, |cx, o| cx.b.store(self.alpha, &to + o, f32c(0.0)));
            });
            if self.t.panel {
                let from = cx.b.bind(self.packed_base(g, ob));
                let to = w * s.np / 4 * BLOCK_ROWS;
                cx.each(0, s.np / 4, |cx, k| {
                    let (from, to) = (cx.b.bind(&from + &k * 8), cx.b.bind(k * HALF + to));
                    cx.lanes(0, 8, 1, |cx, lane| {
                        let word = cx.b.bind(Expr::word(packed, &from + &lane));
                        for q in 0..4 {
                            let to = &to + q / 2 * (s.np / 4 * HALF) + q % 2 * 8;
                            cx.b.store(self.panel, to + &lane, unpack(&word, q));
                        }
                    });
                });
            }
        }
    }

    /// The first word of block `ob` of group `g` of a packed weight.
    fn packed_base(&self, g: &Expr, ob: &Expr) -> Expr {
        (g * self.op.m.div_ceil(BLOCK_ROWS) + ob) * (self.s.np / 4 * 8)
    }

    /// Rows `row .. row + rows` against block `ob` of all weights.
    fn tile(&self, cx: &mut Lower<'_>, g: &Expr, ob: &Expr, first: &Expr, row: &Expr, rows: usize) {
        let s = self.s;
        let at = |cx: &mut Lower<'_>, e: Expr| cx.b.bind(e);
        let x = at(cx, row * (self.s.np / 4));
        let a = at(cx, row * self.s.nc);
        let sums = at(cx, (row - first) * self.s.pieces());
        for w in 0..self.op.n_weights {
            let base = [&x, &a, &sums];
            if self.t.panel {
                cx.each(0, 2, |cx, half| {
                    let from = cx.b.bind(&half * (s.np / 4 * HALF) + w * (s.np / 4 * BLOCK_ROWS));
                    let first = cx.b.bind(half * HALF);
                    let codes: Codes<'_> = &|_, k, lane| vec![Expr::load(self.panel, k * HALF + lane + &from)];
                    cx.lanes(0, HALF, 2, |cx, lane| self.chains(cx, w, rows, base, [&lane, &first], codes));
                });
                continue;
            }
            let from = cx.b.bind(self.packed_base(g, ob));
            let codes: Codes<'_> = &|cx, k, lane| {
                let word = cx.b.bind(Expr::word(self.weights[w].0, k * 8 + lane + &from));
                (0..4).map(|q| unpack(&word, q)).collect()
            };
            cx.lanes(0, 8, 1, |cx, lane| self.chains(cx, w, rows, base, [&lane, &int(0)], codes));
        }
        let n = self.op.m;
        let col = cx.b.bind(ob * BLOCK_ROWS);
        let count = cx.b.bind((int(n) - &col).min(int(BLOCK_ROWS)));
        for r in 0..rows {
            let row = cx.b.bind(row + r);
            cx.lanes(0, count.clone(), 2, |cx, o| {
                let value = |w: usize| Expr::load(self.tile, &o + (w * self.t.tile + r) * BLOCK_ROWS);
                let values: Vec<(usize, Expr)> = (0..self.op.n_weights).map(|w| (w, value(w))).collect();
                cx.push(&row, &(&col + &o), &values);
            });
        }
    }

    /// All chains of one lane: `rows` rows times the weight rows `first + lane + 8 q` of weight `w`. `base` are the first word, scale
    /// and sum of the first row. What is carried from piece to piece is in memory: registers are for the products.
    fn chains(
        &self,
        cx: &mut Lower<'_>,
        w: usize,
        rows: usize,
        base: [&Expr; 3],
        [lane, first]: [&Expr; 2],
        codes: Codes<'_>,
    ) {
        let s = self.s;
        let at = cx.b.bind(first + lane);
        let chains = Chains { parts: self, w, rows, base, lane, at: &at, codes };
        for (r, q) in chains.each() {
            cx.b.store(self.tile, chains.result(r, q), f32c(0.0));
        }
        let last = s.of_group(s.nb - 1);
        let words = s.words(last.end - 1);
        let full = if last.len() == s.span && words == s.piece / 4 { s.nb } else { s.nb - 1 };
        cx.each(0, full, |cx, b| chains.group(cx, &b, s.span, s.piece / 4));
        if full < s.nb {
            chains.group(cx, &int(full), last.len(), words);
        }
    }
}

/// The chains of one lane.
struct Chains<'a> {
    parts: &'a Parts<'a>,
    w: usize,
    rows: usize,
    base: [&'a Expr; 3],
    lane: &'a Expr,
    at: &'a Expr,
    codes: Codes<'a>,
}

impl Chains<'_> {
    /// Rows of the tile, and steps of eight weight rows.
    fn each(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let per = if self.parts.t.panel { 1 } else { 4 };
        (0..self.rows).flat_map(move |r| (0..per).map(move |q| (r, q)))
    }

    fn result(&self, r: usize, q: usize) -> Expr {
        self.at + (self.w * self.parts.t.tile + r) * BLOCK_ROWS + 8 * q
    }

    fn part(&self, r: usize, q: usize) -> Expr {
        self.at + r * BLOCK_ROWS + 8 * q
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
        let [x, a, sums] = self.base;
        let c = cx.b.bind(b * s.span + c);
        let products: Vec<_> = self.each().map(|_| cx.b.local(i32c(0))).collect();
        let k0 = cx.b.bind(&c * (s.piece / 4));
        cx.each(0, words, |cx, k| {
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
        });
        for (i, (r, q)) in self.each().enumerate() {
            let scale = if parts.op.block == 0 { int(0) } else { c.clone() };
            let scale = Expr::load(parts.scales, a + scale + r * s.nc);
            // Codes are one above the weights, so the sum of the activations comes off.
            let product = Expr::from(products[i]) + Expr::load(parts.sums, sums + &c + r * s.pieces());
            let before = if is_first { f32c(0.0) } else { Expr::load(parts.part, self.part(r, q)) };
            let sum = scale.fma(product.cast(Ty::F32), before);
            if !is_last {
                cx.b.store(parts.part, self.part(r, q), sum);
                continue;
            }
            let alpha = Expr::load(parts.alpha, (b + self.w * s.nb) * BLOCK_ROWS + self.at + 8 * q);
            let y = alpha.fma(sum, Expr::load(parts.tile, self.result(r, q)));
            cx.b.store(parts.tile, self.result(r, q), y);
        }
    }
}
