//! Reductions over long rows.
//!
//! One vector of partial results waits for every addition before the next one. A long row is therefore cut into four parts that are
//! reduced side by side; the order is fixed by the length alone.

use crate::{
    loops::{Acc, Expr},
    lower::Lower,
};

/// Parts of a long row.
const PARTS: usize = 4;
/// Rows below this many elements have one part.
const LONG: usize = 128;
/// Parts have a multiple of this many elements, so that all their vectors are full.
const UNIT: usize = 16;

/// The reduction over `0 .. n` of what `f` accumulates: parts `(0 + 1) + (2 + 3)`, then the elements behind the four parts.
pub(super) fn long(cx: &mut Lower<'_>, n: usize, f: &dyn Fn(&mut Lower<'_>, &Expr) -> Acc) -> Expr {
    let part = if n < LONG { 0 } else { n / (PARTS * UNIT) * UNIT };
    if part == 0 {
        return cx.reduce(0, n, |cx, i| vec![f(cx, &i)]).remove(0);
    }
    let mut is_max = false;
    let mut sums = cx.reduce(0, part, |cx, i| {
        let at: Vec<Expr> = (0..PARTS).map(|p| cx.bind(&i + p * part)).collect();
        let accs: Vec<Acc> = at.iter().map(|i| f(cx, i)).collect();
        is_max = matches!(accs[0], Acc::Max(_));
        accs
    });
    if n > PARTS * part {
        sums.extend(cx.reduce(PARTS * part, n, |cx, i| vec![f(cx, &i)]));
    }
    let join = |a: &Expr, b: &Expr| if is_max { a.clone().max(b) } else { a + b };
    let (low, high) = (join(&sums[0], &sums[1]), join(&sums[2], &sums[3]));
    let all = sums[PARTS..].iter().fold(join(&low, &high), |all, rest| join(&all, rest));
    cx.bind(all)
}

/// The sum of the squares of row `row` of operand 0, which has `n` columns.
pub(super) fn sum_of_squares(cx: &mut Lower<'_>, row: &Expr, n: usize) -> Expr {
    long(cx, n, &|cx, i| {
        let v = cx.load(0, row, i);
        let v = cx.b.bind(v);
        Acc::Dot(v.clone(), v)
    })
}
