//! The text form of a kernel: one list, readable and exact.
//!
//! `parse(print(k)) == k` for every kernel that verifies; floats keep their bits.
//!
//! ```text
//! (kernel "axpy" (vars iif) (grid 4)
//!   (buf x f32 256 in) (buf y f32 256 inout)
//!   (for i1 0 64 lanes2
//!     (let f2 (fma 0.5f (load x (+ (* i0 64) i1)) (load y (+ (* i0 64) i1))))
//!     (store y (+ (* i0 64) i1) f2)))
//! ```
//!
//! A variable is the letter of its type (`f` F32, `d` F64, `w` I32, `i` I64, `b` Bool) and its number; `vars` lists the letters of
//! all variables. A plain integer is an index literal, `(i32 n)` an `I32` literal.

use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::sexpr::Sexpr;

type Read<T> = Result<T, KernelError>;

const TYPES: [(Ty, char, &str); 5] = [
    (Ty::F32, 'f', "f32"),
    (Ty::F64, 'd', "f64"),
    (Ty::I32, 'w', "i32"),
    (Ty::I64, 'i', "i64"),
    (Ty::Bool, 'b', "bool"),
];

const UNARY: [(Un, &str); 9] = [
    (Un::Neg, "neg"),
    (Un::Abs, "abs"),
    (Un::Sqrt, "sqrt"),
    (Un::Floor, "floor"),
    (Un::Nearest, "nearest"),
    (Un::Popcnt, "popcnt"),
    (Un::ToBits, "to_bits"),
    (Un::FromBits, "from_bits"),
    (Un::Not, "not"),
];

const BINARY: [(Bin, &str); 14] = [
    (Bin::Add, "+"),
    (Bin::Sub, "-"),
    (Bin::Mul, "*"),
    (Bin::Div, "/"),
    (Bin::Rem, "%"),
    (Bin::Min, "min"),
    (Bin::Max, "max"),
    (Bin::And, "and"),
    (Bin::Or, "or"),
    (Bin::Xor, "xor"),
    (Bin::Shl, "shl"),
    (Bin::Shr, "shr"),
    (Bin::Sar, "sar"),
    (Bin::MulHi, "mulhi"),
];

const COMPARE: [(Cmp, &str); 4] = [(Cmp::Eq, "="), (Cmp::Ne, "!="), (Cmp::Lt, "<"), (Cmp::Le, "<=")];

const ROLES: [(Role, &str); 4] =
    [(Role::In, "in"), (Role::Out, "out"), (Role::InOut, "inout"), (Role::Scratch, "scratch")];

fn name_of<T: PartialEq>(rows: &[(T, &'static str)], x: &T) -> &'static str {
    rows.iter().find(|r| r.0 == *x).map(|r| r.1).expect("every value has a row")
}

fn value_of<T: Copy>(rows: &[(T, &'static str)], name: &str) -> Option<T> {
    rows.iter().find(|r| r.1 == name).map(|r| r.0)
}

fn row(ty: Ty) -> (Ty, char, &'static str) {
    *TYPES.iter().find(|r| r.0 == ty).expect("every type has a row")
}

/// The text form of a kernel. References to things that the kernel does not declare print as `?`.
pub fn print(k: &Kernel) -> Sexpr {
    let mut items = vec![Sexpr::sym("kernel"), Sexpr::str(&k.name)];
    let letters: String = k.vars.iter().map(|ty| row(*ty).1).collect();
    items.push(Sexpr::form("vars", [Sexpr::sym(&letters)]));
    items.push(Sexpr::form("grid", [Sexpr::Int(k.grid as i64)]));
    let param = |(n, v): &(String, i64)| Sexpr::List(vec![Sexpr::sym(n), Sexpr::Int(*v)]);
    if let Some(c) = &k.contract {
        items.push(Sexpr::form("contract", std::iter::once(Sexpr::sym(&c.name)).chain(c.params.iter().map(param))));
    }
    if !k.variant.is_empty() {
        items.push(Sexpr::form("variant", k.variant.0.iter().map(param)));
    }
    for b in &k.bufs {
        let (dtype, role) = (Sexpr::sym(b.dtype.name()), Sexpr::sym(name_of(&ROLES, &b.role)));
        items.push(Sexpr::form("buf", [Sexpr::sym(&b.name), dtype, Sexpr::Int(b.len as i64), role]));
    }
    items.extend(block(k, &k.body));
    Sexpr::List(items)
}

fn block<'a>(k: &'a Kernel, body: &'a [Stmt]) -> impl Iterator<Item = Sexpr> + 'a {
    body.iter().map(|s| print_stmt(k, s))
}

fn print_stmt(k: &Kernel, s: &Stmt) -> Sexpr {
    let e = |e: &Expr| print_expr(k, e);
    match s {
        Stmt::Let(v, x) => Sexpr::form("let", [print_var(k, *v), e(x)]),
        Stmt::Store(b, i, x) => Sexpr::form("store", [print_buf(k, *b), e(i), e(x)]),
        Stmt::Prefetch(b, i) => Sexpr::form("prefetch", [print_buf(k, *b), e(i)]),
        Stmt::For { var, lo, hi, step, mode, body } => {
            let mode = match (mode, step) {
                (Mode::Seq, 1) => "seq".to_owned(),
                (Mode::Seq, step) => format!("seq{step}"),
                (Mode::Lanes(n), 1) => format!("lanes{n}"),
                (Mode::Lanes(n), step) => format!("lanes{n}step{step}"),
            };
            let head = [print_var(k, *var), e(lo), e(hi), Sexpr::sym(&mode)];
            Sexpr::form("for", head.into_iter().chain(block(k, body)))
        }
        Stmt::If(c, then, other) => {
            let mut items = vec![e(c), Sexpr::form("then", block(k, then))];
            if !other.is_empty() {
                items.push(Sexpr::form("else", block(k, other)));
            }
            Sexpr::form("if", items)
        }
        Stmt::Reduce { var, lo, hi, body, accs } => {
            let acc = |(v, acc): &(Var, Acc)| match acc {
                Acc::Sum(x) => Sexpr::form("sum", [print_var(k, *v), e(x)]),
                Acc::Dot(x, y) => Sexpr::form("dot", [print_var(k, *v), e(x), e(y)]),
                Acc::Max(x) => Sexpr::form("max", [print_var(k, *v), e(x)]),
            };
            let head = [print_var(k, *var), e(lo), e(hi)];
            Sexpr::form("reduce", head.into_iter().chain(block(k, body)).chain(accs.iter().map(acc)))
        }
    }
}

fn print_var(k: &Kernel, v: Var) -> Sexpr {
    let letter = k.vars.get(v.0 as usize).map_or('?', |ty| row(*ty).1);
    Sexpr::sym(&format!("{letter}{}", v.0))
}

fn print_buf(k: &Kernel, b: Buf) -> Sexpr {
    Sexpr::sym(k.bufs.get(b.0 as usize).map_or("?", |b| &b.name))
}

/// The text form of one expression.
pub(super) fn print_expr(k: &Kernel, e: &Expr) -> Sexpr {
    let p = |e: &Expr| print_expr(k, e);
    match e {
        Expr::F32(x) => Sexpr::F32(x.to_bits()),
        Expr::F64(x) => Sexpr::F64(x.to_bits()),
        Expr::I32(x) => Sexpr::form("i32", [Sexpr::Int((*x).into())]),
        Expr::Int(x) => Sexpr::Int(*x),
        Expr::Var(v) => print_var(k, *v),
        Expr::Load(b, i) => Sexpr::form("load", [print_buf(k, *b), p(i)]),
        Expr::Word(b, i) => Sexpr::form("word", [print_buf(k, *b), p(i)]),
        Expr::Un(op, a) => Sexpr::form(name_of(&UNARY, op), [p(a)]),
        Expr::Bin(op, a, b) => Sexpr::form(name_of(&BINARY, op), [p(a), p(b)]),
        Expr::Fma(a, b, c) => Sexpr::form("fma", [p(a), p(b), p(c)]),
        Expr::Dot4(a, b, c) => Sexpr::form("dot4", [p(a), p(b), p(c)]),
        Expr::Cmp(op, a, b) => Sexpr::form(name_of(&COMPARE, op), [p(a), p(b)]),
        Expr::Select(c, a, b) => Sexpr::form("select", [p(c), p(a), p(b)]),
        Expr::Cast(ty, a) => Sexpr::form("cast", [Sexpr::sym(row(*ty).2), p(a)]),
    }
}

/// The kernel of a text form, verified.
///
/// # Errors
/// [`KernelError::Syntax`] when the text form is not that of a kernel, [`KernelError::Invalid`] when the kernel breaks a rule.
pub fn parse(s: &Sexpr) -> Result<Kernel, KernelError> {
    let Some(("kernel", [Sexpr::Str(name), rest @ ..])) = s.as_form() else {
        return Err(wrong(s, "(kernel \"name\" ...)"));
    };
    let kernel = Kernel { name: name.to_string(), vars: vec![], grid: 0, ..Builder::new("").finish() };
    let mut r = Reader { kernel, bufs: HashMap::new() };
    let [vars, grid, rest @ ..] = rest else {
        return Err(wrong(s, "(vars ...) and (grid n) after the name"));
    };
    let Some(("vars", [Sexpr::Sym(letters)])) = vars.as_form() else {
        return Err(wrong(vars, "(vars letters)"));
    };
    for c in letters.chars() {
        let ty = TYPES.iter().find(|r| r.1 == c).ok_or_else(|| wrong(vars, "letters out of f d w i b"))?;
        r.kernel.vars.push(ty.0);
    }
    let Some(("grid", [Sexpr::Int(n)])) = grid.as_form() else {
        return Err(wrong(grid, "(grid n)"));
    };
    r.kernel.grid = usize::try_from(*n).map_err(|_| wrong(grid, "a grid that is not negative"))?;
    let rest = r.contract(rest)?;
    let rest = r.variant(rest)?;
    let bufs = rest.iter().take_while(|s| matches!(s.as_form(), Some(("buf", _)))).count();
    for s in &rest[..bufs] {
        r.buf_decl(s)?;
    }
    r.kernel.body = r.block(&rest[bufs..], 0)?;
    verify(&r.kernel)?;
    Ok(r.kernel)
}

/// A syntax error at `s`.
fn wrong(s: &Sexpr, expected: &str) -> KernelError {
    KernelError::Syntax { found: s.excerpt(), expected: expected.to_owned() }
}

fn param(s: &Sexpr) -> Read<(String, i64)> {
    match s.as_list() {
        Some([Sexpr::Sym(n), Sexpr::Int(v)]) => Ok((n.to_string(), *v)),
        _ => Err(wrong(s, "a parameter (name n)")),
    }
}

struct Reader {
    /// What has been read so far.
    kernel: Kernel,
    bufs: HashMap<Arc<str>, Buf>,
}

impl Reader {
    fn contract<'s>(&mut self, items: &'s [Sexpr]) -> Read<&'s [Sexpr]> {
        let Some((first, rest)) = items.split_first() else { return Ok(items) };
        let Some(("contract", parts)) = first.as_form() else { return Ok(items) };
        let [Sexpr::Sym(name), params @ ..] = parts else {
            return Err(wrong(first, "(contract name (param n) ...)"));
        };
        let params = params.iter().map(param).collect::<Read<Vec<_>>>()?;
        self.kernel.contract = Some(Contract { name: name.to_string(), params });
        Ok(rest)
    }

    fn variant<'s>(&mut self, items: &'s [Sexpr]) -> Read<&'s [Sexpr]> {
        let Some((first, rest)) = items.split_first() else { return Ok(items) };
        let Some(("variant", params)) = first.as_form() else { return Ok(items) };
        if params.is_empty() {
            return Err(wrong(first, "(variant (param n) ...)"));
        }
        self.kernel.variant = Variant(params.iter().map(param).collect::<Read<Vec<_>>>()?);
        Ok(rest)
    }

    fn buf_decl(&mut self, s: &Sexpr) -> Read<()> {
        let Some((_, [Sexpr::Sym(name), Sexpr::Sym(dtype), Sexpr::Int(len), Sexpr::Sym(role)])) = s.as_form() else {
            return Err(wrong(s, "(buf name dtype len role)"));
        };
        let dtype = DType::parse(dtype).ok_or_else(|| wrong(s, "a dtype such as f32"))?;
        let role = value_of(&ROLES, role).ok_or_else(|| wrong(s, "a role out of in, out, inout, scratch"))?;
        let len = usize::try_from(*len).map_err(|_| wrong(s, "a length that is not negative"))?;
        self.bufs.insert(name.clone(), Buf(self.kernel.bufs.len() as u32));
        self.kernel.bufs.push(BufDecl { name: name.to_string(), dtype, len, role });
        Ok(())
    }

    fn block(&self, items: &[Sexpr], depth: usize) -> Read<Vec<Stmt>> {
        items.iter().map(|s| self.stmt(s, depth + 1)).collect()
    }

    fn stmt(&self, s: &Sexpr, depth: usize) -> Read<Stmt> {
        bounded(s, depth)?;
        let e = |e| self.expr(e, depth + 1);
        match s.as_form() {
            Some(("let", [v, x])) => Ok(Stmt::Let(self.var(v)?, e(x)?)),
            Some(("store", [b, i, x])) => Ok(Stmt::Store(self.buf(b)?, e(i)?, e(x)?)),
            Some(("prefetch", [b, i])) => Ok(Stmt::Prefetch(self.buf(b)?, e(i)?)),
            Some(("for", [v, lo, hi, m, body @ ..])) => {
                let number = |text: &str| text.parse().map_err(|_| wrong(m, "seq, seqN or lanesN"));
                let (mode, step) = match m.as_sym() {
                    Some("seq") => (Mode::Seq, 1),
                    Some(m) if m.starts_with("seq") => (Mode::Seq, number(&m[3..])?),
                    Some(name) if name.starts_with("lanes") => {
                        let n = u8::try_from(number(&name[5..])?).map_err(|_| wrong(m, "at most 255 lanes"))?;
                        (Mode::Lanes(n), 1)
                    }
                    _ => return Err(wrong(m, "seq, seqN or lanesN")),
                };
                let (var, lo, hi) = (self.var(v)?, e(lo)?, e(hi)?);
                Ok(Stmt::For { var, lo, hi, step, mode, body: self.block(body, depth)? })
            }
            Some(("if", [c, then, other @ ..])) if other.len() <= 1 => {
                let Some(("then", then)) = then.as_form() else {
                    return Err(wrong(then, "(then ...)"));
                };
                let other = match other.first().map(|s| (s, s.as_form())) {
                    None => &[][..],
                    Some((_, Some(("else", other)))) if !other.is_empty() => other,
                    Some((s, _)) => return Err(wrong(s, "(else ...) that is not empty")),
                };
                Ok(Stmt::If(e(c)?, self.block(then, depth + 1)?, self.block(other, depth + 1)?))
            }
            Some(("reduce", [v, lo, hi, rest @ ..])) => {
                let lets = rest.iter().take_while(|s| matches!(s.as_form(), Some(("let", _)))).count();
                let body = self.block(&rest[..lets], depth)?;
                let accs = rest[lets..].iter().map(|s| self.acc(s, depth + 2)).collect::<Read<_>>()?;
                Ok(Stmt::Reduce { var: self.var(v)?, lo: e(lo)?, hi: e(hi)?, body, accs })
            }
            _ => Err(wrong(s, "a statement: let, store, prefetch, for, if or reduce")),
        }
    }

    fn acc(&self, s: &Sexpr, depth: usize) -> Read<(Var, Acc)> {
        let e = |e| self.expr(e, depth);
        match s.as_form() {
            Some(("sum", [v, x])) => Ok((self.var(v)?, Acc::Sum(e(x)?))),
            Some(("dot", [v, x, y])) => Ok((self.var(v)?, Acc::Dot(e(x)?, e(y)?))),
            Some(("max", [v, x])) => Ok((self.var(v)?, Acc::Max(e(x)?))),
            _ => Err(wrong(s, "(sum v x), (dot v x y) or (max v x)")),
        }
    }

    fn var(&self, s: &Sexpr) -> Read<Var> {
        let found = s.as_sym().and_then(|name| {
            let digits = name.get(1..)?;
            let n: u32 = digits.parse().ok()?;
            let letter = row(*self.kernel.vars.get(n as usize)?).1;
            let canonical = !digits.starts_with('+') && (n == 0 || !digits.starts_with('0'));
            (canonical && name.starts_with(letter)).then_some(Var(n))
        });
        found.ok_or_else(|| wrong(s, "a declared variable such as i0"))
    }

    fn buf(&self, s: &Sexpr) -> Read<Buf> {
        let found = s.as_sym().and_then(|name| self.bufs.get(name));
        found.copied().ok_or_else(|| wrong(s, "the name of a declared buffer"))
    }

    fn expr(&self, s: &Sexpr, depth: usize) -> Read<Expr> {
        bounded(s, depth)?;
        let e = |e| self.expr(e, depth + 1).map(Box::new);
        let (head, args) = match s {
            Sexpr::F32(bits) => return Ok(Expr::F32(f32::from_bits(*bits))),
            Sexpr::F64(bits) => return Ok(Expr::F64(f64::from_bits(*bits))),
            Sexpr::Int(x) => return Ok(Expr::Int(*x)),
            Sexpr::Sym(_) => return self.var(s).map(Expr::Var),
            Sexpr::Str(_) | Sexpr::List(_) => s.as_form().ok_or_else(|| wrong(s, "an expression"))?,
        };
        let expr = match (head, args) {
            ("i32", [Sexpr::Int(x)]) => Expr::I32(i32::try_from(*x).map_err(|_| wrong(s, "an integer of 32 bits"))?),
            ("load", [b, i]) => Expr::Load(self.buf(b)?, e(i)?),
            ("word", [b, i]) => Expr::Word(self.buf(b)?, e(i)?),
            ("fma", [a, b, c]) => Expr::Fma(e(a)?, e(b)?, e(c)?),
            ("dot4", [a, b, c]) => Expr::Dot4(e(a)?, e(b)?, e(c)?),
            ("select", [c, a, b]) => Expr::Select(e(c)?, e(a)?, e(b)?),
            ("cast", [Sexpr::Sym(ty), a]) => {
                let ty = TYPES.iter().find(|r| r.2 == &**ty).ok_or_else(|| wrong(s, "a type such as f32"))?;
                Expr::Cast(ty.0, e(a)?)
            }
            (op, [a]) => {
                let op = value_of(&UNARY, op).ok_or_else(|| wrong(s, "an operation on one operand"))?;
                Expr::Un(op, e(a)?)
            }
            (op, [a, b]) => match (value_of(&BINARY, op), value_of(&COMPARE, op)) {
                (Some(op), _) => Expr::Bin(op, e(a)?, e(b)?),
                (_, Some(op)) => Expr::Cmp(op, e(a)?, e(b)?),
                _ => return Err(wrong(s, "an operation on two operands")),
            },
            _ => return Err(wrong(s, "an expression")),
        };
        Ok(expr)
    }
}

fn bounded(s: &Sexpr, depth: usize) -> Read<()> {
    if depth > verify::MAX_DEPTH {
        return Err(wrong(s, "nesting within the limit; bind parts to locals"));
    }
    Ok(())
}
