//! The way kernels are written: statements are appended in program order, bodies are closures.

use super::{Acc, Buf, BufDecl, Contract, Expr, GRID, Kernel, Mode, Role, Stmt, Ty, Var, Variant};
use crate::DType;

/// A kernel under construction.
#[derive(Debug)]
pub struct Builder {
    kernel: Kernel,
    blocks: Vec<Vec<Stmt>>,
}

impl Builder {
    /// A kernel without buffers; its grid is 1 until [`Builder::grid`] says otherwise.
    pub fn new(name: impl Into<String>) -> Builder {
        let kernel = Kernel {
            name: name.into(),
            contract: None,
            variant: Variant::default(),
            bufs: vec![],
            vars: vec![Ty::I64],
            grid: 1,
            body: vec![],
        };
        Builder { kernel, blocks: vec![vec![]] }
    }

    /// Add a buffer.
    pub fn buf(&mut self, name: impl Into<String>, dtype: DType, len: usize, role: Role) -> Buf {
        let name = name.into();
        self.kernel.bufs.push(BufDecl { name, dtype, len, role });
        Buf(self.kernel.bufs.len() as u32 - 1)
    }

    /// Add scratch memory of one worker.
    pub fn scratch(&mut self, name: &str, dtype: DType, len: usize) -> Buf {
        let name = format!("{name}.{}", self.kernel.bufs.len());
        self.buf(name, dtype, len, Role::Scratch)
    }

    /// The declaration of a buffer.
    pub fn decl(&self, buf: Buf) -> &BufDecl {
        &self.kernel.bufs[buf.0 as usize]
    }

    /// State the number of instances; returns the grid index.
    pub fn grid(&mut self, n: usize) -> Expr {
        self.kernel.grid = n;
        GRID.into()
    }

    /// State a contract.
    pub fn contract(&mut self, contract: Contract) {
        self.kernel.contract = Some(contract);
    }

    /// Say which variant this is.
    pub fn variant(&mut self, variant: Variant) {
        self.kernel.variant = variant;
    }

    /// Which variant this is.
    pub fn chosen(&self) -> &Variant {
        &self.kernel.variant
    }

    /// The type of an expression.
    pub fn ty(&self, e: &Expr) -> Ty {
        self.kernel.ty(e)
    }

    /// A fresh variable.
    pub fn var(&mut self, ty: Ty) -> Var {
        self.kernel.vars.push(ty);
        Var(self.kernel.vars.len() as u32 - 1)
    }

    /// Bind an expression to a fresh local, so that it is computed once here. Literals and variables are returned as they are.
    pub fn bind(&mut self, e: impl Into<Expr>) -> Expr {
        let e = e.into();
        match e {
            Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) | Expr::Var(_) => e,
            e => self.local(e).into(),
        }
    }

    /// A fresh local with an initial value, for use with [`Builder::set`].
    pub fn local(&mut self, e: impl Into<Expr>) -> Var {
        let e = e.into();
        let v = self.var(self.ty(&e));
        self.push(Stmt::Let(v, e));
        v
    }

    /// Overwrite a local.
    pub fn set(&mut self, v: Var, e: impl Into<Expr>) {
        self.push(Stmt::Let(v, e.into()));
    }

    /// Overwrite an element.
    pub fn store(&mut self, buf: Buf, index: impl Into<Expr>, value: impl Into<Expr>) {
        self.push(Stmt::Store(buf, index.into(), value.into()));
    }

    /// Hint that an element will be read soon, see [`Stmt::Prefetch`].
    pub fn prefetch(&mut self, buf: Buf, index: impl Into<Expr>) {
        self.push(Stmt::Prefetch(buf, index.into()));
    }

    /// Append a statement.
    pub fn push(&mut self, s: Stmt) {
        self.blocks.last_mut().expect("a block is open").push(s);
    }

    fn block(&mut self, f: impl FnOnce(&mut Builder)) -> Vec<Stmt> {
        self.blocks.push(vec![]);
        f(self);
        self.blocks.pop().expect("the block opened above")
    }

    fn looped(&mut self, lo: Expr, hi: Expr, step: i64, mode: Mode, f: impl FnOnce(&mut Builder, Expr)) {
        let var = self.var(Ty::I64);
        let body = self.block(|b| f(b, var.into()));
        self.push(Stmt::For { var, lo, hi, step, mode, body });
    }

    /// A sequential loop over `lo .. hi`.
    pub fn each(&mut self, lo: impl Into<Expr>, hi: impl Into<Expr>, f: impl FnOnce(&mut Builder, Expr)) {
        self.looped(lo.into(), hi.into(), 1, Mode::Seq, f);
    }

    /// A sequential loop over `lo .. hi` in steps.
    pub fn each_step(
        &mut self,
        lo: impl Into<Expr>,
        hi: impl Into<Expr>,
        step: usize,
        f: impl FnOnce(&mut Builder, Expr),
    ) {
        self.looped(lo.into(), hi.into(), step as i64, Mode::Seq, f);
    }

    /// Independent iterations over `lo .. hi`, `unroll` portable vectors at once.
    pub fn lanes(&mut self, lo: impl Into<Expr>, hi: impl Into<Expr>, unroll: u8, f: impl FnOnce(&mut Builder, Expr)) {
        self.looped(lo.into(), hi.into(), 1, Mode::Lanes(unroll), f);
    }

    /// A conditional.
    pub fn when(&mut self, c: impl Into<Expr>, f: impl FnOnce(&mut Builder)) {
        let then = self.block(f);
        self.push(Stmt::If(c.into(), then, vec![]));
    }

    /// A conditional with two sides.
    pub fn if_else(&mut self, c: impl Into<Expr>, f: impl FnOnce(&mut Builder), g: impl FnOnce(&mut Builder)) {
        let then = self.block(f);
        let other = self.block(g);
        self.push(Stmt::If(c.into(), then, other));
    }

    /// A striped reduction over `lo .. hi` with one result for every accumulator that `f` returns.
    pub fn reduce(
        &mut self,
        lo: impl Into<Expr>,
        hi: impl Into<Expr>,
        f: impl FnOnce(&mut Builder, Expr) -> Vec<Acc>,
    ) -> Vec<Expr> {
        let var = self.var(Ty::I64);
        let open = self.open();
        let accs = f(self, var.into());
        self.close_reduce(open, var, lo, hi, accs)
    }

    /// A striped sum.
    pub fn sum(
        &mut self,
        lo: impl Into<Expr>,
        hi: impl Into<Expr>,
        f: impl FnOnce(&mut Builder, Expr) -> Expr,
    ) -> Expr {
        self.reduce(lo, hi, |b, i| vec![Acc::Sum(f(b, i))]).remove(0)
    }

    /// The finished kernel.
    ///
    /// # Panics
    /// When a block is still open.
    pub fn finish(mut self) -> Kernel {
        assert_eq!(self.blocks.len(), 1, "every block is closed");
        self.kernel.body = self.blocks.remove(0);
        self.kernel
    }
}

/// A block opened by [`Builder::open`].
#[derive(Debug)]
#[must_use]
pub struct Open(usize);

impl Builder {
    /// Open a block without a closure, for callers that hold the builder inside a larger context.
    pub fn open(&mut self) -> Open {
        self.blocks.push(vec![]);
        Open(self.blocks.len())
    }

    /// Close a block and return its statements.
    ///
    /// # Panics
    /// When it is not the innermost open block.
    pub fn shut(&mut self, open: Open) -> Vec<Stmt> {
        assert_eq!(open.0, self.blocks.len(), "blocks close in the order they were opened");
        self.blocks.pop().expect("the block is open")
    }

    /// Close a block as the body of a sequential loop over `lo .. hi` in steps.
    pub fn close_each(&mut self, open: Open, var: Var, lo: impl Into<Expr>, hi: impl Into<Expr>, step: usize) {
        let body = self.shut(open);
        self.push(Stmt::For { var, lo: lo.into(), hi: hi.into(), step: step as i64, mode: Mode::Seq, body });
    }

    /// Close a block as the body of lanes over `lo .. hi`.
    pub fn close_lanes(&mut self, open: Open, var: Var, lo: impl Into<Expr>, hi: impl Into<Expr>, unroll: u8) {
        let body = self.shut(open);
        self.push(Stmt::For { var, lo: lo.into(), hi: hi.into(), step: 1, mode: Mode::Lanes(unroll), body });
    }

    /// Close a block as the body of a striped reduction.
    pub fn close_reduce(
        &mut self,
        open: Open,
        var: Var,
        lo: impl Into<Expr>,
        hi: impl Into<Expr>,
        accs: Vec<Acc>,
    ) -> Vec<Expr> {
        let body = self.shut(open);
        let accs: Vec<(Var, Acc)> = accs
            .into_iter()
            .map(|acc| {
                let (Acc::Sum(e) | Acc::Dot(e, _) | Acc::Max(e)) = &acc;
                (self.var(self.ty(e)), acc)
            })
            .collect();
        let results = accs.iter().map(|(v, _)| (*v).into()).collect();
        self.push(Stmt::Reduce { var, lo: lo.into(), hi: hi.into(), body, accs });
        results
    }
}
