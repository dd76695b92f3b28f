//! Register-tiled matrix products inside kernels.
//!
//! Every output is one chain of fused multiply-adds in ascending `k`, so the tile shape never shows in the result.

use super::{Builder, Expr, Ty, f32c};

/// Rows of a tile. Four rows by two portable vectors of columns keep all accumulators in 16 registers.
pub const ROWS: usize = 4;

/// The extent of a loop: known when the kernel is built, or computed.
#[derive(Clone, Debug)]
pub enum Extent {
    /// Known.
    Is(usize),
    /// An `I64` expression.
    Of(Expr),
}

impl From<usize> for Extent {
    fn from(n: usize) -> Extent {
        Extent::Is(n)
    }
}

impl From<Expr> for Extent {
    fn from(e: Expr) -> Extent {
        Extent::Of(e)
    }
}

/// Something that holds the builder of a kernel: the builder itself, or the lowering context of an operation.
pub trait Context {
    /// The builder.
    fn builder(&mut self) -> &mut Builder;
}

impl Context for Builder {
    fn builder(&mut self) -> &mut Builder {
        self
    }
}

/// One element of an operand: row or column, then position in the sum, or as the field says.
pub type Element<'f, C> = &'f dyn Fn(&mut C, &Expr, &Expr) -> Expr;

/// `store(i, j, init(i, j) + sum over k of a(i, k) * b(k, j))` for `i < m`, `j < n`.
///
/// `a` must not depend on `j` and should be cheap; `b` and `init` should be contiguous in `j`, the lane index. All callbacks may bind
/// locals. `init = None` starts from 0.
#[allow(missing_debug_implementations, reason = "holds callbacks")]
pub struct Product<'f, C> {
    /// Rows.
    pub m: Extent,
    /// Columns.
    pub n: Extent,
    /// Length of the sum.
    pub k: Extent,
    /// Left operand at `(i, k)`.
    pub a: Element<'f, C>,
    /// Right operand at `(k, j)`.
    pub b: Element<'f, C>,
    /// Start value at `(i, j)`.
    pub init: Option<Element<'f, C>>,
}

impl<C: Context> Product<'_, C> {
    /// Append the loops; `store(cx, i, j, value)` receives every element once.
    pub fn emit(&self, cx: &mut C, store: &dyn Fn(&mut C, &Expr, &Expr, Expr)) {
        match &self.m {
            Extent::Is(m) => {
                let full = m / ROWS * ROWS;
                if full > 0 {
                    self.blocks(cx, Expr::from(0), Expr::from(full), ROWS, store);
                }
                if m % ROWS > 0 {
                    self.rows(cx, &Expr::from(full), m % ROWS, store);
                }
            }
            Extent::Of(m) => {
                let m = cx.builder().bind(m);
                let full = cx.builder().bind(&m / ROWS * ROWS);
                self.blocks(cx, Expr::from(0), full.clone(), ROWS, store);
                self.blocks(cx, full, m, 1, store);
            }
        }
    }

    fn blocks(&self, cx: &mut C, lo: Expr, hi: Expr, rows: usize, store: &dyn Fn(&mut C, &Expr, &Expr, Expr)) {
        let var = cx.builder().var(Ty::I64);
        let open = cx.builder().open();
        self.rows(cx, &var.into(), rows, store);
        cx.builder().close_each(open, var, lo, hi, rows);
    }

    fn rows(&self, cx: &mut C, i: &Expr, rows: usize, store: &dyn Fn(&mut C, &Expr, &Expr, Expr)) {
        let bound = |e: &Extent| match e {
            Extent::Is(n) => Expr::from(*n),
            Extent::Of(e) => e.clone(),
        };
        let (jv, kv) = (cx.builder().var(Ty::I64), cx.builder().var(Ty::I64));
        let (j, k) = (Expr::from(jv), Expr::from(kv));
        let at: Vec<Expr> = (0..rows).map(|r| cx.builder().bind(i + r)).collect();
        let columns = cx.builder().open();
        let accs: Vec<_> = at
            .iter()
            .map(|i| {
                let start = self.init.map_or(f32c(0.0), |f| f(cx, i, &j));
                cx.builder().local(start)
            })
            .collect();
        let sum = cx.builder().open();
        let right = (self.b)(cx, &k, &j);
        let right = cx.builder().bind(right);
        for (i, &acc) in at.iter().zip(&accs) {
            let left = (self.a)(cx, i, &k);
            cx.builder().set(acc, left.fma(&right, acc));
        }
        cx.builder().close_each(sum, kv, 0, bound(&self.k), 1);
        for (i, &acc) in at.iter().zip(&accs) {
            store(cx, i, &j, acc.into());
        }
        cx.builder().close_lanes(columns, jv, 0, bound(&self.n), 2);
    }
}
