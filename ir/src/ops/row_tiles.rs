//! Loops over a range of rows in register tiles, and the float product that linear layers and the loss share.
//!
//! Every output is one chain of fused multiply-adds in ascending order, so the tile shape never shows in the result.

use super::{InferError, check, pack_panels::PANEL};
use crate::{
    DType, Type,
    loops::{Buf, Expr, Ty, f32c, int},
    lower::Lower,
};

/// Rows of a register tile: six rows by two vectors of a panel, what is loaded of it and one element of a row fill 16 registers.
pub(super) const TILE: usize = 6;

/// How a product of grouped rows with blocks of weight rows becomes independent instances.
#[derive(Clone, Copy, Debug)]
pub(super) struct Instances {
    /// Rows, all leading dimensions together.
    pub(super) rows: usize,
    /// Groups of weights.
    pub(super) groups: usize,
    /// Where each section of the rows begins, and how many sections each group has: `i32 [groups * sections + 1]`. Without it the
    /// groups are equally long.
    pub(super) offsets: Option<(Buf, usize)>,
    /// Most rows of an instance.
    pub(super) height: usize,
    /// Blocks of weight rows.
    pub(super) blocks: usize,
    /// Most blocks of an instance.
    pub(super) chunk: usize,
}

/// The rows of one instance that use one group of weights, and the blocks of the instance.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    /// The group.
    pub(super) group: &'a Expr,
    /// The first row of the instance.
    pub(super) first: &'a Expr,
    /// The rows.
    pub(super) rows: [&'a Expr; 2],
    /// How many they are, if that is known.
    pub(super) known: Option<usize>,
    /// The blocks.
    pub(super) blocks: [&'a Expr; 2],
}

impl Instances {
    /// Instances along the rows and along the blocks, for each group that has rows of its own.
    fn counts(&self) -> (usize, usize) {
        let extent = if self.offsets.is_some() { self.rows } else { self.rows / self.groups };
        (extent.div_ceil(self.height), self.blocks.div_ceil(self.chunk))
    }

    /// Append the loops: `start(cx, lo, hi)` with all rows of an instance, then `run` for each group among them.
    pub(super) fn emit(
        &self,
        cx: &mut Lower<'_>,
        start: &dyn Fn(&mut Lower<'_>, &Expr, &Expr),
        run: &dyn Fn(&mut Lower<'_>, Part<'_>),
    ) {
        let (tiles, chunks) = self.counts();
        let leads = if self.offsets.is_some() { 1 } else { self.groups };
        let extent = self.rows / leads;
        let at = cx.b.grid(leads * tiles * chunks);
        let tile = cx.b.bind(&at / chunks);
        let lead = cx.b.bind(&tile / tiles);
        let inner = cx.b.bind(tile % tiles * self.height);
        let lo = cx.b.bind(&lead * extent + &inner);
        let hi = cx.b.bind(&lead * extent + (inner + self.height).min(int(extent)));
        let block = cx.b.bind(at % chunks * self.chunk);
        let end = cx.b.bind((&block + self.chunk).min(int(self.blocks)));
        start(cx, &lo, &hi);
        let blocks = [&block, &end];
        let Some((offsets, sections)) = self.offsets else {
            let known = (tiles == 1).then_some(extent);
            return run(cx, Part { group: &lead, first: &lo, rows: [&lo, &hi], known, blocks });
        };
        cx.each(0, self.groups, |cx, g| {
            let bound = |at: Expr| Expr::load(offsets, at).cast(Ty::I64);
            let from = cx.b.bind(bound(&g * sections).max(lo.clone()));
            let to = cx.b.bind(bound((&g + 1) * sections).min(hi.clone()));
            let part = Part { group: &g, first: &lo, rows: [&from, &to], known: None, blocks };
            cx.when(from.clone().lt(to.clone()), |cx| run(cx, part));
        });
    }
}

/// Sections of each of `groups` groups of weights, if `offsets` fit.
pub(super) fn sections(op: &'static str, groups: usize, offsets: &Type) -> Result<usize, InferError> {
    check::is(op, "offsets", offsets, DType::I32, 1..=1)?;
    let n = offsets.numel() - 1;
    if n > 0 && n.is_multiple_of(groups) {
        return Ok(n / groups);
    }
    Err(InferError::new(
        op,
        format!("{groups} groups of weights want a multiple of them and one offset, found {offsets}"),
    ))
}

/// The group of every row, for reference semantics.
pub(super) fn group_of_rows(rows: usize, groups: usize, offsets: Option<&[i64]>) -> Vec<usize> {
    let Some(offsets) = offsets else { return (0..rows).map(|row| row / (rows / groups)).collect() };
    let sections = (offsets.len() - 1) / groups;
    let section = |row: usize| offsets[1..].iter().filter(|&&end| end <= row as i64).count();
    (0..rows).map(|row| section(row) / sections).collect()
}

/// Offsets for samples with grouped rows: uneven sections, the second one empty where there are more than two.
pub(super) fn sample_offsets(n: usize, rows: usize) -> Vec<i32> {
    let last = n - 1;
    let at = |g: usize| match g {
        0 => 0,
        _ if g == last => rows,
        1 | 2 => rows / 4,
        _ => rows * g / last,
    };
    (0..n).map(|g| at(g) as i32).collect()
}

/// Call `run(cx, row, rows)` for the rows `lo .. hi` in tiles of `tile`. When the number of rows is `known`, the rest is one smaller
/// tile, else single rows.
pub(super) fn row_tiles(
    cx: &mut Lower<'_>,
    [lo, hi]: [&Expr; 2],
    known: Option<usize>,
    tile: usize,
    run: &dyn Fn(&mut Lower<'_>, &Expr, usize),
) {
    let Some(n) = known else {
        let full = cx.b.bind(lo + (hi - lo) / tile * tile);
        cx.each_step(lo, full.clone(), tile, |cx, row| run(cx, &row, tile));
        if tile > 1 {
            cx.each(full, hi, |cx, row| run(cx, &row, 1));
        }
        return;
    };
    let full = cx.b.bind(lo + n / tile * tile);
    if n >= tile {
        cx.each_step(lo, full.clone(), tile, |cx, row| run(cx, &row, tile));
    }
    if n % tile > 0 {
        run(cx, &full, n % tile);
    }
}

/// `rows` rows of `x`, each of `n` elements from index `x0` on, times `span` panels from index `p0` on: `store(cx, r, q, lane, value)`
/// receives `sum_k x[r, k] * panel[q, k, lane]` for the lanes below `width`, a multiple of four.
pub(super) fn panel_product(
    cx: &mut Lower<'_>,
    (x, x0): (Buf, &Expr),
    (panels, p0): (Buf, &Expr),
    [rows, span, n, width]: [usize; 4],
    store: &dyn Fn(&mut Lower<'_>, usize, usize, &Expr, Expr),
) {
    cx.lanes(0, width, 2, |cx, lane| {
        let accs: Vec<Vec<_>> = (0..span).map(|_| (0..rows).map(|_| cx.b.local(f32c(0.0))).collect()).collect();
        cx.each(0, n, |cx, k| {
            for (q, accs) in accs.iter().enumerate() {
                let w = cx.b.bind(Expr::load(panels, p0 + &k * PANEL + &lane + q * n * PANEL));
                for (r, &acc) in accs.iter().enumerate() {
                    cx.b.set(acc, Expr::load(x, x0 + &k + r * n).fma(&w, acc));
                }
            }
        });
        for (q, accs) in accs.into_iter().enumerate() {
            for (r, acc) in accs.into_iter().enumerate() {
                store(cx, r, q, &lane, acc.into());
            }
        }
    });
}
