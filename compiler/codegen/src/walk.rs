//! Visits all statements and expressions of a kernel body.
//!
//! Order is program order; children of an expression come after it.

use chimera_ir::loops::{Acc, Expr, Stmt, Var};

/// Every statement, also nested ones.
pub(crate) fn stmts(body: &[Stmt], f: &mut dyn FnMut(&Stmt)) {
    for s in body {
        f(s);
        match s {
            Stmt::Let(..) | Stmt::Store(..) | Stmt::Prefetch(..) => {}
            Stmt::For { body, .. } | Stmt::Reduce { body, .. } => stmts(body, f),
            Stmt::If(_, a, b) => {
                stmts(a, f);
                stmts(b, f);
            }
        }
    }
}

/// Every expression, also nested ones.
pub(crate) fn exprs(body: &[Stmt], f: &mut dyn FnMut(&Expr)) {
    stmts(body, &mut |s| match s {
        Stmt::Let(_, e) | Stmt::Prefetch(_, e) | Stmt::If(e, ..) => expr(e, f),
        Stmt::Store(_, a, b) => {
            expr(a, f);
            expr(b, f);
        }
        Stmt::For { lo, hi, .. } => {
            expr(lo, f);
            expr(hi, f);
        }
        Stmt::Reduce { lo, hi, accs, .. } => {
            expr(lo, f);
            expr(hi, f);
            for (_, acc) in accs {
                terms(acc).into_iter().flatten().for_each(|e| expr(e, f));
            }
        }
    });
}

/// The operands of an accumulation.
pub(crate) fn terms(acc: &Acc) -> [Option<&Expr>; 2] {
    match acc {
        Acc::Sum(e) | Acc::Max(e) => [Some(e), None],
        Acc::Dot(x, y) => [Some(x), Some(y)],
    }
}

/// An expression and everything in it.
pub(crate) fn expr(e: &Expr, f: &mut dyn FnMut(&Expr)) {
    f(e);
    match e {
        Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) | Expr::Var(_) => {}
        Expr::Load(_, a) | Expr::Word(_, a) | Expr::Un(_, a) | Expr::Cast(_, a) => expr(a, f),
        Expr::Bin(_, a, b) | Expr::Cmp(_, a, b) => {
            expr(a, f);
            expr(b, f);
        }
        Expr::Fma(a, b, c) | Expr::Dot4(a, b, c) | Expr::Select(a, b, c) => {
            expr(a, f);
            expr(b, f);
            expr(c, f);
        }
    }
}

/// The variables that a statement itself assigns.
pub(crate) fn assigned(s: &Stmt, f: &mut dyn FnMut(Var)) {
    match s {
        Stmt::Let(v, _) => f(*v),
        Stmt::For { var, .. } => f(*var),
        Stmt::Reduce { var, accs, .. } => {
            f(*var);
            accs.iter().for_each(|(v, _)| f(*v));
        }
        Stmt::Store(..) | Stmt::Prefetch(..) | Stmt::If(..) => {}
    }
}

/// How often each variable is assigned and mentioned in a body.
pub(crate) struct Counts {
    pub(crate) assigned: Vec<u32>,
    pub(crate) mentioned: Vec<u32>,
}

impl Counts {
    pub(crate) fn of(body: &[Stmt], n_vars: usize) -> Counts {
        let mut counts = Counts { assigned: vec![0; n_vars], mentioned: vec![0; n_vars] };
        stmts(body, &mut |s| assigned(s, &mut |v| counts.assigned[v.0 as usize] += 1));
        exprs(body, &mut |e| {
            if let Expr::Var(v) = e {
                counts.mentioned[v.0 as usize] += 1;
            }
        });
        counts
    }
}
