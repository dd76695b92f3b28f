//! What every kernel must satisfy before anything else looks at it.
//!
//! A verified kernel is well-typed, defines before it uses, respects buffer roles, keeps lanes independent of control flow, and is
//! shallow enough for recursion.

use std::fmt;

use super::*;

/// The greatest nesting of statements and expressions together.
pub(super) const MAX_DEPTH: usize = 200;
/// The greatest buffer length and grid.
const MAX_LEN: usize = 1 << 40;
/// The greatest number of buffers.
const MAX_BUFS: usize = 4096;
/// The greatest number of variables.
const MAX_VARS: usize = 1 << 20;
/// The most vectors that lanes interleave.
const MAX_INTERLEAVE: u8 = 16;

/// Why a kernel was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelError {
    /// The text form is not that of a kernel.
    Syntax {
        /// The offending part, abbreviated.
        found: String,
        /// What belongs there.
        expected: String,
    },
    /// The kernel breaks a rule.
    Invalid {
        /// Name of the kernel.
        kernel: String,
        /// The offending statement or declaration, abbreviated.
        place: String,
        /// What was found and what was expected.
        reason: String,
    },
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelError::Syntax { found, expected } => {
                write!(f, "kernel text: found {found}, expected {expected}")
            }
            KernelError::Invalid { kernel, place, reason } => {
                write!(f, "kernel {kernel}: {place}: {reason}")
            }
        }
    }
}

impl std::error::Error for KernelError {}

/// Check a kernel.
///
/// # Errors
/// The first rule that the kernel breaks, with the statement that breaks it.
pub fn verify(kernel: &Kernel) -> Result<(), KernelError> {
    let invalid =
        |(place, reason): (String, String)| KernelError::Invalid { kernel: kernel.name.clone(), place, reason };
    declarations(kernel).map_err(|reason| invalid(("declarations".to_owned(), reason)))?;
    if !shallow(&kernel.body, 1) {
        let reason = format!("nesting exceeds {MAX_DEPTH}, bind parts to locals");
        return Err(invalid(("body".to_owned(), reason)));
    }
    let mut defined = vec![false; kernel.vars.len()];
    defined[GRID.0 as usize] = true;
    let mut loops = vec![false; kernel.vars.len()];
    loops[GRID.0 as usize] = true;
    let mut check = Check { kernel, defined, loops, varying: None, fixed: vec![], place: String::new() };
    check.block(&kernel.body).map_err(|reason| invalid((check.place.clone(), reason)))?;
    match range::accesses(kernel).into_iter().find(|a| a.never_inside) {
        Some(a) => Err(invalid((a.text, "the access is always out of bounds".to_owned()))),
        None => Ok(()),
    }
}

fn declarations(k: &Kernel) -> Result<(), String> {
    if k.vars.first() != Some(&Ty::I64) {
        return Err("variable 0 is the grid index, expected I64".to_owned());
    }
    let limits =
        [("grid", k.grid, MAX_LEN), ("buffers", k.bufs.len(), MAX_BUFS), ("variables", k.vars.len(), MAX_VARS)];
    for (what, n, limit) in limits {
        if n > limit {
            return Err(format!("{what} {n}, expected at most {limit}"));
        }
    }
    let mut names = std::collections::HashSet::new();
    for b in &k.bufs {
        if !names.insert(&b.name) {
            return Err(format!("two buffers are named {}, expected unique names", b.name));
        }
        if b.len > MAX_LEN {
            return Err(format!("buffer {} has {} elements, expected at most {MAX_LEN}", b.name, b.len));
        }
    }
    Ok(())
}

struct Check<'a> {
    kernel: &'a Kernel,
    /// Variables that have a value here.
    defined: Vec<bool>,
    /// Loop variables in scope, the grid index among them.
    loops: Vec<bool>,
    /// Inside lanes: the variables that may differ between lanes.
    varying: Option<Vec<bool>>,
    /// Inside lanes: the variables that had a value where the lanes begin. They carry between lanes, hence stay as they are.
    fixed: Vec<bool>,
    /// The statement under inspection.
    place: String,
}

impl Check<'_> {
    fn block(&mut self, body: &[Stmt]) -> Result<(), String> {
        body.iter().try_for_each(|s| self.stmt(s))
    }

    fn stmt(&mut self, s: &Stmt) -> Result<(), String> {
        self.place = place(self.kernel, s);
        match s {
            Stmt::Let(v, e) => {
                let ty = self.expr(e)?;
                self.assign(*v, ty)
            }
            Stmt::Store(buf, index, value) => self.store(*buf, index, value),
            Stmt::Prefetch(buf, index) => {
                self.buf(*buf)?;
                self.expect(index, Ty::I64, "the index")?;
                if has_load(index) {
                    return Err("the index has a load, expected arithmetic only".to_owned());
                }
                Ok(())
            }
            Stmt::For { var, lo, hi, step, mode, body } => {
                if *step < 1 || *step > MAX_LEN as i64 {
                    return Err(format!("step {step}, expected 1..={MAX_LEN}"));
                }
                self.enter(*var, lo, hi)?;
                let outer = self.defined.clone();
                self.defined[var.0 as usize] = true;
                match mode {
                    Mode::Seq => self.block(body)?,
                    Mode::Lanes(n) => self.lanes(*var, *n, *step, body, &outer)?,
                }
                self.defined = outer;
                self.loops[var.0 as usize] = false;
                Ok(())
            }
            Stmt::If(c, then, other) => {
                self.expect(c, Ty::Bool, "the condition")?;
                self.uniform(c, "a condition inside lanes")?;
                let before = self.defined.clone();
                self.block(then)?;
                let after = std::mem::replace(&mut self.defined, before);
                self.block(other)?;
                self.defined.iter_mut().zip(after).for_each(|(d, a)| *d &= a);
                Ok(())
            }
            Stmt::Reduce { var, lo, hi, body, accs } => {
                if self.varying.is_some() {
                    return Err("a reduction inside lanes, expected it outside".to_owned());
                }
                if !body.iter().all(|s| matches!(s, Stmt::Let(..))) {
                    return Err("the body of a reduction has other statements, expected let only".to_owned());
                }
                self.enter(*var, lo, hi)?;
                let outer = self.defined.clone();
                self.defined[var.0 as usize] = true;
                self.block(body)?;
                self.place = place(self.kernel, s);
                let types = accs.iter().map(|(_, acc)| self.acc(acc)).collect::<Result<Vec<_>, _>>()?;
                self.defined = outer;
                self.loops[var.0 as usize] = false;
                accs.iter().zip(types).try_for_each(|((v, _), ty)| self.assign(*v, ty))
            }
        }
    }

    fn store(&mut self, buf: Buf, index: &Expr, value: &Expr) -> Result<(), String> {
        let decl = self.buf(buf)?;
        if decl.role == Role::In {
            return Err(format!("{} is read only, expected another role", decl.name));
        }
        if decl.dtype == DType::BF16 {
            return Err(format!("{} is bf16, which kernels never write", decl.name));
        }
        let wanted = load_ty(decl.dtype);
        self.expect(index, Ty::I64, "the index")?;
        self.expect(value, wanted, "the value")
    }

    fn lanes(&mut self, var: Var, interleave: u8, step: i64, body: &[Stmt], outer: &[bool]) -> Result<(), String> {
        if self.varying.is_some() {
            return Err("lanes inside lanes, expected one level".to_owned());
        }
        if step != 1 || interleave == 0 || interleave > MAX_INTERLEAVE {
            return Err(format!(
                "lanes of step {step} interleaving {interleave}, expected step 1 and 1..={MAX_INTERLEAVE}"
            ));
        }
        let mut varying = vec![false; self.kernel.vars.len()];
        varying[var.0 as usize] = true;
        while spread(body, &mut varying)? {}
        self.varying = Some(varying);
        self.fixed = outer.to_vec();
        self.block(body)?;
        self.varying = None;
        self.fixed.clear();
        Ok(())
    }

    /// Check the head of a loop and bring its variable into scope.
    fn enter(&mut self, var: Var, lo: &Expr, hi: &Expr) -> Result<(), String> {
        for e in [lo, hi] {
            self.expect(e, Ty::I64, "the bound")?;
            self.uniform(e, "a loop bound inside lanes")?;
        }
        match self.kernel.vars.get(var.0 as usize) {
            Some(Ty::I64) if !self.loops[var.0 as usize] => {
                self.loops[var.0 as usize] = true;
                Ok(())
            }
            Some(Ty::I64) => Err(format!("variable {} already counts an enclosing loop, expected a fresh one", var.0)),
            found => Err(format!("loop variable {} is {found:?}, expected I64", var.0)),
        }
    }

    fn assign(&mut self, v: Var, ty: Ty) -> Result<(), String> {
        let at = v.0 as usize;
        let Some(&declared) = self.kernel.vars.get(at) else {
            return Err(format!("variable {at} is not declared"));
        };
        if declared != ty {
            return Err(format!("variable {at} is {declared:?}, found a value of {ty:?}"));
        }
        if self.loops[at] {
            return Err(format!("variable {at} counts an enclosing loop, expected another one to assign"));
        }
        if self.fixed.get(at) == Some(&true) {
            return Err(format!("variable {at} has its value from outside the lanes, expected one of this lane only"));
        }
        self.defined[at] = true;
        Ok(())
    }

    fn uniform(&self, e: &Expr, what: &str) -> Result<(), String> {
        match &self.varying {
            Some(varying) if reads(e, varying) => Err(format!("{what} differs between lanes, expected the same")),
            _ => Ok(()),
        }
    }

    fn acc(&mut self, acc: &Acc) -> Result<Ty, String> {
        match acc {
            Acc::Sum(x) | Acc::Max(x) => {
                let ty = self.expr(x)?;
                if ty == Ty::Bool {
                    return Err("a reduction of Bool, expected a number".to_owned());
                }
                Ok(ty)
            }
            Acc::Dot(x, y) => {
                self.expect(x, Ty::F32, "a factor")?;
                self.expect(y, Ty::F32, "a factor")?;
                Ok(Ty::F32)
            }
        }
    }

    fn buf(&self, b: Buf) -> Result<&BufDecl, String> {
        self.kernel.bufs.get(b.0 as usize).ok_or_else(|| format!("buffer {} is not declared", b.0))
    }

    fn expect(&self, e: &Expr, wanted: Ty, what: &str) -> Result<(), String> {
        match self.expr(e)? {
            ty if ty == wanted => Ok(()),
            ty => Err(format!("{what} is {ty:?}, expected {wanted:?}")),
        }
    }

    /// The type of an expression.
    fn expr(&self, e: &Expr) -> Result<Ty, String> {
        match e {
            Expr::F32(_) => Ok(Ty::F32),
            Expr::F64(_) => Ok(Ty::F64),
            Expr::I32(_) => Ok(Ty::I32),
            Expr::Int(_) => Ok(Ty::I64),
            Expr::Var(v) => match self.defined.get(v.0 as usize) {
                Some(true) => Ok(self.kernel.vars[v.0 as usize]),
                Some(false) => Err(format!("variable {} has no value here", v.0)),
                None => Err(format!("variable {} is not declared", v.0)),
            },
            Expr::Load(buf, i) => {
                let decl = self.buf(*buf)?;
                if decl.role == Role::Out {
                    return Err(format!("{} is write only, expected another role", decl.name));
                }
                self.expect(i, Ty::I64, "the index")?;
                Ok(load_ty(decl.dtype))
            }
            Expr::Word(buf, i) => {
                let decl = self.buf(*buf)?;
                if decl.role == Role::Out {
                    return Err(format!("{} is write only, expected another role", decl.name));
                }
                if !matches!(decl.dtype, DType::I8 | DType::U8) {
                    return Err(format!("a word of {}, which is {}, expected bytes", decl.name, decl.dtype.name()));
                }
                self.expect(i, Ty::I64, "the index")?;
                Ok(Ty::I32)
            }
            Expr::Un(op, a) => un_ty(*op, self.expr(a)?),
            Expr::Bin(op, a, b) => {
                let (x, y) = (self.expr(a)?, self.expr(b)?);
                if x != y {
                    return Err(format!("{op:?} of {x:?} and {y:?}, expected one type"));
                }
                let by_positive = matches!(**b, Expr::Int(1..));
                bin_ty(*op, x, by_positive)
            }
            Expr::Fma(a, b, c) => {
                [a, b, c].iter().try_for_each(|e| self.expect(e, Ty::F32, "an operand of fma"))?;
                Ok(Ty::F32)
            }
            Expr::Dot4(a, b, c) => {
                [a, b, c].iter().try_for_each(|e| self.expect(e, Ty::I32, "an operand of dot4"))?;
                Ok(Ty::I32)
            }
            Expr::Cmp(op, a, b) => match (self.expr(a)?, self.expr(b)?) {
                (x, y) if x == y && x != Ty::Bool => Ok(Ty::Bool),
                (x, y) => Err(format!("{op:?} of {x:?} and {y:?}, expected numbers of one type")),
            },
            Expr::Select(c, a, b) => {
                self.expect(c, Ty::Bool, "the condition")?;
                match (self.expr(a)?, self.expr(b)?) {
                    (x, y) if x == y => Ok(x),
                    (x, y) => Err(format!("a choice between {x:?} and {y:?}, expected one type")),
                }
            }
            Expr::Cast(ty, a) => {
                self.expr(a)?;
                if *ty == Ty::Bool { Err("a cast to Bool, expected a comparison".to_owned()) } else { Ok(*ty) }
            }
        }
    }
}

/// Whether the nesting of statements and expressions stays within [`MAX_DEPTH`]; everything else may then recurse.
fn shallow(body: &[Stmt], depth: usize) -> bool {
    let expr = |e| shallow_expr(e, depth + 1);
    depth <= MAX_DEPTH
        && body.iter().all(|s| match s {
            Stmt::Let(_, e) => expr(e),
            Stmt::Store(_, i, e) => expr(i) && expr(e),
            Stmt::Prefetch(_, i) => expr(i),
            Stmt::For { lo, hi, body, .. } => expr(lo) && expr(hi) && shallow(body, depth + 1),
            Stmt::If(c, then, other) => expr(c) && shallow(then, depth + 2) && shallow(other, depth + 2),
            Stmt::Reduce { lo, hi, body, accs, .. } => {
                let within = |e| shallow_expr(e, depth + 2);
                expr(lo)
                    && expr(hi)
                    && shallow(body, depth + 1)
                    && accs.iter().all(|(_, acc)| match acc {
                        Acc::Sum(x) | Acc::Max(x) => within(x),
                        Acc::Dot(x, y) => within(x) && within(y),
                    })
            }
        })
}

fn shallow_expr(e: &Expr, depth: usize) -> bool {
    let expr = |e| shallow_expr(e, depth + 1);
    depth <= MAX_DEPTH
        && match e {
            Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) | Expr::Var(_) => true,
            Expr::Load(_, a) | Expr::Word(_, a) | Expr::Un(_, a) | Expr::Cast(_, a) => expr(a),
            Expr::Bin(_, a, b) | Expr::Cmp(_, a, b) => expr(a) && expr(b),
            Expr::Fma(a, b, c) | Expr::Dot4(a, b, c) | Expr::Select(a, b, c) => expr(a) && expr(b) && expr(c),
        }
}

fn un_ty(op: Un, a: Ty) -> Result<Ty, String> {
    let (ok, result) = match op {
        Un::Neg | Un::Abs => (a != Ty::Bool, a),
        Un::Sqrt | Un::Floor | Un::Nearest => (matches!(a, Ty::F32 | Ty::F64), a),
        Un::Popcnt => (a == Ty::I32, a),
        Un::ToBits => (a == Ty::F32, Ty::I32),
        Un::FromBits => (a == Ty::I32, Ty::F32),
        Un::Not => (a == Ty::Bool, a),
    };
    if ok { Ok(result) } else { Err(format!("{op:?} of {a:?}, which it is not defined for")) }
}

fn bin_ty(op: Bin, a: Ty, by_positive: bool) -> Result<Ty, String> {
    let ok = match op {
        Bin::Add | Bin::Sub | Bin::Mul | Bin::Min | Bin::Max => a != Ty::Bool,
        Bin::Div => matches!(a, Ty::F32 | Ty::F64) || a == Ty::I64 && by_positive,
        Bin::Rem => a == Ty::I64 && by_positive,
        Bin::And | Bin::Or => matches!(a, Ty::I32 | Ty::I64 | Ty::Bool),
        Bin::Xor | Bin::Shl | Bin::Shr | Bin::Sar => matches!(a, Ty::I32 | Ty::I64),
        Bin::MulHi => a == Ty::I32,
    };
    match op {
        _ if ok => Ok(a),
        Bin::Div | Bin::Rem => Err(format!("{op:?} of {a:?}, expected floats or I64 by a positive literal")),
        _ => Err(format!("{op:?} of {a:?}, which it is not defined for")),
    }
}

/// Add to `varying` what lanes assign from it; whether anything was added.
fn spread(body: &[Stmt], varying: &mut [bool]) -> Result<bool, String> {
    let mut grown = false;
    for s in body {
        match s {
            Stmt::Let(v, e) => match varying.get(v.0 as usize) {
                Some(false) if reads(e, varying) => {
                    varying[v.0 as usize] = true;
                    grown = true;
                }
                Some(_) => {}
                None => return Err(format!("variable {} is not declared", v.0)),
            },
            Stmt::Store(..) | Stmt::Prefetch(..) | Stmt::Reduce { .. } => {}
            Stmt::For { body, .. } => grown |= spread(body, varying)?,
            Stmt::If(_, then, other) => grown |= spread(then, varying)? | spread(other, varying)?,
        }
    }
    Ok(grown)
}

/// Whether an expression reads one of the marked variables.
fn reads(e: &Expr, marked: &[bool]) -> bool {
    match e {
        Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) => false,
        Expr::Var(v) => marked.get(v.0 as usize) == Some(&true),
        Expr::Load(_, a) | Expr::Word(_, a) | Expr::Un(_, a) | Expr::Cast(_, a) => reads(a, marked),
        Expr::Bin(_, a, b) | Expr::Cmp(_, a, b) => reads(a, marked) || reads(b, marked),
        Expr::Fma(a, b, c) | Expr::Dot4(a, b, c) | Expr::Select(a, b, c) => {
            reads(a, marked) || reads(b, marked) || reads(c, marked)
        }
    }
}

/// Whether an expression reads memory.
fn has_load(e: &Expr) -> bool {
    match e {
        Expr::F32(_) | Expr::F64(_) | Expr::I32(_) | Expr::Int(_) | Expr::Var(_) => false,
        Expr::Load(..) | Expr::Word(..) => true,
        Expr::Un(_, a) | Expr::Cast(_, a) => has_load(a),
        Expr::Bin(_, a, b) | Expr::Cmp(_, a, b) => has_load(a) || has_load(b),
        Expr::Fma(a, b, c) | Expr::Dot4(a, b, c) | Expr::Select(a, b, c) => has_load(a) || has_load(b) || has_load(c),
    }
}

/// A statement in words, without its operands.
fn place(k: &Kernel, s: &Stmt) -> String {
    match s {
        Stmt::Let(v, _) => format!("let of variable {}", v.0),
        Stmt::Store(b, ..) => {
            format!("store to {}", k.bufs.get(b.0 as usize).map_or("?", |b| &b.name))
        }
        Stmt::Prefetch(b, _) => format!("prefetch of {}", k.bufs.get(b.0 as usize).map_or("?", |b| &b.name)),
        Stmt::For { var, .. } => format!("loop over variable {}", var.0),
        Stmt::If(..) => "if".to_owned(),
        Stmt::Reduce { var, .. } => format!("reduction over variable {}", var.0),
    }
}
