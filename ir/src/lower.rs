//! From a cluster of operations to one kernel.
//!
//! A cluster has one anchor. Pointwise operations before it are evaluated where the anchor pulls an element, pointwise operations
//! after it where the anchor pushes one; so operations are lowered once and know nothing of fusion.

use std::ops::{Deref, DerefMut};

use crate::{
    Op, Type,
    loops::{Acc, Buf, Builder, Expr, Kernel, Role, Stmt, Ty, Variant, tile::Context},
    ops::InferError,
};

/// Where an operand of a cluster node comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Input of the cluster.
    Input(usize),
    /// Result of an earlier node: node, result.
    Node(usize, usize),
}

/// One operation of a cluster.
#[derive(Clone, Debug)]
pub struct ClusterNode {
    /// The operation.
    pub op: Op,
    /// Its operands.
    pub ins: Vec<Source>,
    /// The types of its results.
    pub outs: Vec<Type>,
}

/// Operations that become one kernel.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// The types of the inputs; each becomes one `In` buffer.
    pub inputs: Vec<Type>,
    /// The operations in order; those before the anchor are pulled, those behind it pushed.
    pub nodes: Vec<ClusterNode>,
    /// The index of the anchor.
    pub anchor: usize,
    /// What is stored: node, result. Each becomes one `Out` buffer.
    pub outputs: Vec<(usize, usize)>,
    /// How the anchor is lowered: one of its variants; the first one when empty.
    pub variant: Variant,
}

impl Cluster {
    /// A cluster of one operation.
    pub fn single(op: Op, ins: &[Type]) -> Result<Cluster, InferError> {
        let outs = op.infer(ins)?;
        let outputs = (0..outs.len()).map(|o| (0, o)).collect();
        let nodes = vec![ClusterNode { op, ins: (0..ins.len()).map(Source::Input).collect(), outs }];
        Ok(Cluster { inputs: ins.to_vec(), nodes, anchor: 0, outputs, variant: Variant::default() })
    }

    /// The same with its anchor lowered in another way.
    pub fn with_variant(&self, variant: &Variant) -> Cluster {
        Cluster { variant: variant.clone(), ..self.clone() }
    }

    /// The types of the operands of the anchor.
    pub fn anchor_types(&self) -> Vec<Type> {
        let ty = |s: &Source| match *s {
            Source::Input(i) => self.inputs[i].clone(),
            Source::Node(n, o) => self.nodes[n].outs[o].clone(),
        };
        self.nodes[self.anchor].ins.iter().map(ty).collect()
    }

    /// The kernel. Its arguments are the inputs, then the outputs, but an output that [`crate::ops::OpDef::updates`] an input of
    /// the cluster has no buffer of its own: the input's buffer is read and written.
    ///
    /// # Panics
    /// When the anchor has no such variant.
    pub fn lower(&self) -> Kernel {
        let name: Vec<&str> = self.nodes.iter().map(|n| n.op.name()).collect();
        let mut b = Builder::new(name.join("+"));
        let anchor = &self.nodes[self.anchor];
        let updated = |o: usize| anchor.op.updates().iter().find(|u| u.1 == o).map(|u| anchor.ins[u.0]);
        let mutated: Vec<Source> = (0..anchor.outs.len()).filter_map(updated).collect();
        let ins: Vec<Buf> = self
            .inputs
            .iter()
            .enumerate()
            .map(|(i, ty)| {
                let role = if mutated.contains(&Source::Input(i)) { Role::InOut } else { Role::In };
                b.buf(format!("in{i}"), ty.dtype, ty.numel(), role)
            })
            .collect();
        let outs: Vec<Buf> = self
            .outputs
            .iter()
            .enumerate()
            .map(|(i, &(node, o))| match updated(o).filter(|_| node == self.anchor) {
                Some(Source::Input(k)) => ins[k],
                _ => {
                    let ty = &self.nodes[node].outs[o];
                    b.buf(format!("out{i}"), ty.dtype, ty.numel(), Role::Out)
                }
            })
            .collect();
        let types = self.anchor_types();
        let mut legal = anchor.op.variants(&types);
        let at = if self.variant.is_empty() { Some(0) } else { legal.iter().position(|v| *v == self.variant) };
        let Some(at) = at else { panic!("{} has no variant `{}`", anchor.op.text(), self.variant) };
        b.variant(legal.swap_remove(at));
        if let Some(contract) = anchor.op.contract(&types) {
            b.contract(contract);
        }
        let mut cx = Lower { b, cluster: self, ins, outs, node: self.anchor, known: vec![] };
        anchor.op.lower(&mut cx);
        cx.b.finish()
    }

    /// For each buffer argument of [`Cluster::lower`]: the input index or the output index.
    pub fn arguments(&self) -> Vec<Argument> {
        let anchor = &self.nodes[self.anchor];
        let shared = |&(node, o): &(usize, usize)| node == self.anchor && anchor.op.updates().iter().any(|u| u.1 == o);
        let ins = (0..self.inputs.len()).map(Argument::Input);
        let outs = (0..self.outputs.len()).filter(|&i| !shared(&self.outputs[i])).map(Argument::Output);
        ins.chain(outs).collect()
    }
}

/// What a kernel argument stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// An input of the cluster.
    Input(usize),
    /// An output of the cluster.
    Output(usize),
}

/// What an operation sees while it is lowered.
///
/// Elements are addressed as `(row, col)`: `col` is the last dimension, `row` counts all others together.
#[derive(Debug)]
pub struct Lower<'a> {
    /// The kernel under construction.
    pub b: Builder,
    cluster: &'a Cluster,
    ins: Vec<Buf>,
    outs: Vec<Buf>,
    node: usize,
    known: Vec<((usize, usize), Expr)>,
}

impl Lower<'_> {
    fn current(&self) -> &ClusterNode {
        &self.cluster.nodes[self.node]
    }

    /// The number of operands.
    pub fn n_ins(&self) -> usize {
        self.current().ins.len()
    }

    /// The type of operand `k`.
    pub fn ty(&self, k: usize) -> &Type {
        self.source_ty(self.current().ins[k])
    }

    /// The types of all operands.
    pub fn in_types(&self) -> Vec<Type> {
        (0..self.n_ins()).map(|k| self.ty(k).clone()).collect()
    }

    fn source_ty(&self, s: Source) -> &Type {
        match s {
            Source::Input(i) => &self.cluster.inputs[i],
            Source::Node(n, o) => &self.cluster.nodes[n].outs[o],
        }
    }

    /// The variant to lower: one of those that the operation lists.
    pub fn variant(&self) -> &Variant {
        self.b.chosen()
    }

    /// The type of result `o`.
    pub fn out_ty(&self, o: usize) -> &Type {
        &self.current().outs[o]
    }

    /// The buffer of operand `k`, for operands that are addressed directly.
    ///
    /// # Panics
    /// When the operand was fused; an operation that calls this must not list the operand in [`crate::ops::OpDef::pulls`].
    pub fn buf(&self, k: usize) -> Buf {
        match self.current().ins[k] {
            Source::Input(i) => self.ins[i],
            Source::Node(..) => panic!("{} operand {k} has no buffer", self.current().op.name()),
        }
    }

    /// The buffer of result `o`, or `None` when nobody wants it.
    pub fn out(&self, o: usize) -> Option<Buf> {
        let at = self.cluster.outputs.iter().position(|&x| x == (self.node, o))?;
        Some(self.outs[at])
    }

    /// Whether result `o` is used, directly or by a fused operation.
    pub fn wants(&self, o: usize) -> bool {
        let used = |n: &ClusterNode| n.ins.contains(&Source::Node(self.node, o));
        self.out(o).is_some() || self.cluster.nodes.iter().any(used)
    }

    /// Element `(row, col)` of operand `k`.
    pub fn load(&mut self, k: usize, row: &Expr, col: &Expr) -> Expr {
        self.value(self.current().ins[k], row, col)
    }

    fn value(&mut self, s: Source, row: &Expr, col: &Expr) -> Expr {
        match s {
            Source::Input(i) => {
                let cols = self.cluster.inputs[i].cols();
                Expr::load(self.ins[i], row * cols + col)
            }
            Source::Node(n, o) => {
                if let Some((_, e)) = self.known.iter().rev().find(|(at, _)| *at == (n, o)) {
                    return e.clone();
                }
                let cluster = self.cluster;
                let back = std::mem::replace(&mut self.node, n);
                let e = cluster.nodes[n].op.element(self, row, col).expect("only pointwise operations are fused");
                self.node = back;
                self.b.bind(e)
            }
        }
    }

    /// Hand out element `(row, col)` of the results `o`, given together; fused operations continue from here. Every element is
    /// pushed exactly once.
    pub fn push(&mut self, row: &Expr, col: &Expr, values: &[(usize, Expr)]) {
        let anchor = self.node;
        self.known = values.iter().map(|(o, e)| ((anchor, *o), self.b.bind(e))).collect();
        for at in 0..self.cluster.outputs.len() {
            let (n, o) = self.cluster.outputs[at];
            if n < anchor || (n == anchor && !values.iter().any(|v| v.0 == o)) {
                continue;
            }
            let e = self.value(Source::Node(n, o), row, col);
            let cols = self.cluster.nodes[n].outs[o].cols();
            self.b.store(self.outs[at], row * cols + col, e);
        }
        self.known.clear();
    }

    /// Store element `index` (row-major) of result `o` directly, if it is wanted. For results that are not pushed.
    pub fn put(&mut self, o: usize, index: impl Into<Expr>, value: impl Into<Expr>) {
        if let Some(buf) = self.out(o) {
            self.b.store(buf, index, value);
        }
    }

    /// The body of a pointwise operation: rows are the grid, columns are lanes.
    pub fn pointwise(&mut self) {
        let ty = self.out_ty(0).clone();
        let row = self.b.grid(ty.rows());
        let (cluster, node) = (self.cluster, self.node);
        self.lanes(0, ty.cols(), 2, |cx, col| {
            let e = cluster.nodes[node].op.element(cx, &row, &col).expect("a pointwise operation");
            cx.push(&row, &col, &[(0, e)]);
        });
    }

    /// See [`Builder::each`]; the closure receives the context.
    pub fn each(&mut self, lo: impl Into<Expr>, hi: impl Into<Expr>, f: impl FnOnce(&mut Self, Expr)) {
        self.each_step(lo, hi, 1, f);
    }

    /// See [`Builder::each_step`]; the closure receives the context.
    pub fn each_step(
        &mut self,
        lo: impl Into<Expr>,
        hi: impl Into<Expr>,
        step: usize,
        f: impl FnOnce(&mut Self, Expr),
    ) {
        let (lo, hi) = (lo.into(), hi.into());
        let var = self.b.var(Ty::I64);
        let open = self.b.open();
        f(self, var.into());
        self.b.close_each(open, var, lo, hi, step);
    }

    /// Lanes over `lo .. hi`, see [`Builder::lanes`]; the closure receives the context.
    pub fn lanes(&mut self, lo: impl Into<Expr>, hi: impl Into<Expr>, unroll: u8, f: impl FnOnce(&mut Self, Expr)) {
        let (lo, hi) = (lo.into(), hi.into());
        let var = self.b.var(Ty::I64);
        let open = self.b.open();
        f(self, var.into());
        self.b.close_lanes(open, var, lo, hi, unroll);
    }

    /// See [`Builder::when`]; the closure receives the context.
    pub fn when(&mut self, c: impl Into<Expr>, f: impl FnOnce(&mut Self)) {
        self.if_else(c, f, |_| {});
    }

    /// See [`Builder::if_else`]; the closures receive the context.
    pub fn if_else(&mut self, c: impl Into<Expr>, f: impl FnOnce(&mut Self), g: impl FnOnce(&mut Self)) {
        let c = c.into();
        let then = self.b.open();
        f(self);
        let then = self.b.shut(then);
        let other = self.b.open();
        g(self);
        let other = self.b.shut(other);
        self.b.push(Stmt::If(c, then, other));
    }

    /// See [`Builder::reduce`]; the closure receives the context.
    pub fn reduce(
        &mut self,
        lo: impl Into<Expr>,
        hi: impl Into<Expr>,
        f: impl FnOnce(&mut Self, Expr) -> Vec<Acc>,
    ) -> Vec<Expr> {
        let (lo, hi) = (lo.into(), hi.into());
        let var = self.b.var(Ty::I64);
        let open = self.b.open();
        let accs = f(self, var.into());
        self.b.close_reduce(open, var, lo, hi, accs)
    }

    /// See [`Builder::sum`]; the closure receives the context.
    pub fn sum(&mut self, lo: impl Into<Expr>, hi: impl Into<Expr>, f: impl FnOnce(&mut Self, Expr) -> Expr) -> Expr {
        self.reduce(lo, hi, |cx, i| vec![Acc::Sum(f(cx, i))]).remove(0)
    }
}

impl Deref for Lower<'_> {
    type Target = Builder;
    fn deref(&self) -> &Builder {
        &self.b
    }
}

impl DerefMut for Lower<'_> {
    fn deref_mut(&mut self) -> &mut Builder {
        &mut self.b
    }
}

impl Context for Lower<'_> {
    fn builder(&mut self) -> &mut Builder {
        &mut self.b
    }
}
