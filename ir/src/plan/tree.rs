//! A plan as a tree of symbolic expressions, and back.
//!
//! Sections stand in a fixed order and nothing is optional, so that a plan has exactly one tree. Reading checks form only;
//! whether ids and sizes agree is the business of `verify`. Unsigned words travel as the signed word of the same bits.

use super::*;
use crate::loops;
use crate::sexpr::Sexpr;
use crate::{DType, Data};

type Result<T> = std::result::Result<T, PlanError>;

const PLACES: [&str; 4] = ["arena", "persistent", "weight", "state"];
const SPLIT: [&str; 2] = ["whole", "split"];

/// The tree of a plan.
pub(super) fn write(plan: &Plan) -> Sexpr {
    let pair = |(a, b): &(String, String)| Sexpr::List(vec![Sexpr::str(a), Sexpr::str(b)]);
    Sexpr::form(
        "plan",
        [
            Sexpr::form("config", [Sexpr::str(&plan.config)]),
            Sexpr::form("options", plan.options.iter().map(pair)),
            Sexpr::form("target", [Sexpr::str(&plan.target)]),
            Sexpr::form("weights", plan.weights.iter().map(write_weight)),
            Sexpr::form("states", plan.states.iter().map(write_state)),
            Sexpr::form("buffers", plan.buffers.iter().map(write_buffer)),
            Sexpr::form("constants", plan.constants.iter().map(write_constant)),
            Sexpr::form("persistent", [word(plan.persistent)]),
            Sexpr::form("kernels", plan.kernels.iter().map(loops::print)),
            Sexpr::form("entries", plan.entries.iter().map(write_entry)),
            Sexpr::form("decisions", plan.decisions.iter().map(write_decision)),
        ],
    )
}

/// The plan of a tree, not verified.
pub(super) fn read(tree: &Sexpr) -> Result<Plan> {
    let mut r = Reader::form(tree, "plan")?;
    Ok(Plan {
        config: r.section("config", Reader::string)?,
        options: r.list("options", read_pair)?,
        target: r.section("target", Reader::string)?,
        weights: r.list("weights", read_weight)?,
        states: r.list("states", read_state)?,
        buffers: r.list("buffers", read_buffer)?,
        constants: r.list("constants", read_constant)?,
        persistent: r.section("persistent", Reader::word)?,
        kernels: r.list("kernels", |s| loops::parse(s).map_err(|e| PlanError::new(e.to_string())))?,
        entries: r.list("entries", read_entry)?,
        decisions: r.last("decisions", read_decision)?,
    })
}

fn word(x: u64) -> Sexpr {
    Sexpr::Int(x as i64)
}

fn id(x: u32) -> Sexpr {
    Sexpr::Int(x.into())
}

fn write_type(ty: &Type) -> Sexpr {
    Sexpr::form(ty.dtype.name(), ty.dims.iter().map(|&d| word(d as u64)))
}

fn read_type(s: &Sexpr) -> Result<Type> {
    let (name, dims) = s.as_form().ok_or_else(|| expected("a type", s))?;
    let dtype = DType::parse(name)
        .ok_or_else(|| PlanError::new(format!("found dtype `{name}`, expected one of f32 f64 bf16 i8 u8 i16 i32")))?;
    let dims = dims.iter().map(|d| narrow(d, "a dimension")).collect::<Result<_>>()?;
    Ok(Type { dtype, dims })
}

fn write_weight(w: &WeightDecl) -> Sexpr {
    let kind = WeightKind::ALL[w.kind as usize].1;
    Sexpr::List(vec![Sexpr::str(&w.name), write_type(&w.ty), Sexpr::sym(kind)])
}

fn read_weight(s: &Sexpr) -> Result<WeightDecl> {
    let mut r = Reader::list_of(s)?;
    let w = WeightDecl {
        name: r.string()?,
        ty: read_type(r.next()?)?,
        kind: {
            let name = r.symbol()?;
            let row = WeightKind::ALL.iter().find(|k| k.1 == name);
            row.ok_or_else(|| PlanError::new(format!("found weight kind `{name}`, which is not known")))?.0
        },
    };
    r.end(w)
}

fn write_state(s: &StateDecl) -> Sexpr {
    Sexpr::List(vec![Sexpr::str(&s.name), write_type(&s.ty), id(s.copies)])
}

fn read_state(s: &Sexpr) -> Result<StateDecl> {
    let mut r = Reader::list_of(s)?;
    let state = StateDecl { name: r.string()?, ty: read_type(r.next()?)?, copies: r.id()? };
    r.end(state)
}

fn write_buffer(b: &BufferDecl) -> Sexpr {
    let (kind, at) = match b.place {
        Place::Arena(at) => (0, word(at)),
        Place::Persistent(at) => (1, word(at)),
        Place::Weight(i) => (2, id(i)),
        Place::State(i) => (3, id(i)),
    };
    Sexpr::List(vec![write_type(&b.ty), Sexpr::sym(PLACES[kind]), at, Sexpr::str(&b.name)])
}

fn read_buffer(s: &Sexpr) -> Result<BufferDecl> {
    let mut r = Reader::list_of(s)?;
    let ty = read_type(r.next()?)?;
    let place = match PLACES.iter().position(|p| Some(*p) == r.peek_symbol()) {
        Some(kind) => {
            r.next()?;
            match kind {
                0 => Place::Arena(r.word()?),
                1 => Place::Persistent(r.word()?),
                2 => Place::Weight(r.id()?),
                _ => Place::State(r.id()?),
            }
        }
        None => return Err(PlanError::new("expected a place: arena, persistent, weight or state")),
    };
    let b = BufferDecl { ty, place, name: r.string()? };
    r.end(b)
}

fn write_constant((buffer, t): &(BufferId, Tensor)) -> Sexpr {
    let mut items = vec![id(buffer.0), write_type(&t.ty)];
    match &t.data {
        Data::F32(v) => items.extend(v.iter().map(|x| Sexpr::F32(x.to_bits()))),
        Data::F64(v) => items.extend(v.iter().map(|x| Sexpr::F64(x.to_bits()))),
        Data::BF16(v) => items.extend(v.iter().map(|&x| Sexpr::Int(x.into()))),
        Data::I8(v) => items.extend(v.iter().map(|&x| Sexpr::Int(x.into()))),
        Data::U8(v) => items.extend(v.iter().map(|&x| Sexpr::Int(x.into()))),
        Data::I16(v) => items.extend(v.iter().map(|&x| Sexpr::Int(x.into()))),
        Data::I32(v) => items.extend(v.iter().map(|&x| Sexpr::Int(x.into()))),
    }
    Sexpr::List(items)
}

fn read_constant(s: &Sexpr) -> Result<(BufferId, Tensor)> {
    fn ints<T: TryFrom<i64>>(items: &[Sexpr]) -> Result<Vec<T>> {
        items.iter().map(|s| narrow(s, "an element")).collect()
    }
    let mut r = Reader::list_of(s)?;
    let buffer = BufferId(r.id()?);
    let ty = read_type(r.next()?)?;
    let items = r.items;
    let data = match ty.dtype {
        DType::F32 => Data::F32(
            items
                .iter()
                .map(|s| match s {
                    Sexpr::F32(bits) => Ok(f32::from_bits(*bits)),
                    s => Err(expected("a binary32", s)),
                })
                .collect::<Result<_>>()?,
        ),
        DType::F64 => Data::F64(
            items
                .iter()
                .map(|s| match s {
                    Sexpr::F64(bits) => Ok(f64::from_bits(*bits)),
                    s => Err(expected("a binary64", s)),
                })
                .collect::<Result<_>>()?,
        ),
        DType::BF16 => Data::BF16(ints(items)?),
        DType::I8 => Data::I8(ints(items)?),
        DType::U8 => Data::U8(ints(items)?),
        DType::I16 => Data::I16(ints(items)?),
        DType::I32 => Data::I32(ints(items)?),
    };
    Ok((buffer, Tensor { ty, data }))
}

fn write_entry(e: &Entry) -> Sexpr {
    let port = |(name, buffer): &(String, BufferId)| Sexpr::List(vec![Sexpr::str(name), id(buffer.0)]);
    let group = |g: &Group| Sexpr::List(vec![Sexpr::str(&g.name), word(g.flops), word(g.ternary), word(g.bytes)]);
    let lifetime = |l: &Lifetime| Sexpr::List(vec![id(l.buffer.0), id(l.first), id(l.last)]);
    Sexpr::List(vec![
        Sexpr::str(&e.name),
        Sexpr::form("inputs", e.inputs.iter().map(port)),
        Sexpr::form("outputs", e.outputs.iter().map(port)),
        Sexpr::form("steps", e.steps.iter().map(write_step)),
        Sexpr::form("groups", e.groups.iter().map(group)),
        Sexpr::form("lifetimes", e.lifetimes.iter().map(lifetime)),
        Sexpr::form("arena", [word(e.arena)]),
        Sexpr::form("arena_bound", [word(e.arena_bound)]),
        Sexpr::form("shared", [word(e.shared.0), word(e.shared.1)]),
    ])
}

fn read_entry(s: &Sexpr) -> Result<Entry> {
    let mut r = Reader::list_of(s)?;
    let name = r.string()?;
    let place = format!("entry `{name}`");
    let read = || {
        let e = Entry {
            name,
            inputs: r.list("inputs", read_port)?,
            outputs: r.list("outputs", read_port)?,
            steps: r.list("steps", read_step)?,
            groups: r.list("groups", read_group)?,
            lifetimes: r.list("lifetimes", read_lifetime)?,
            arena: r.section("arena", Reader::word)?,
            arena_bound: r.section("arena_bound", Reader::word)?,
            shared: r.section("shared", |r| Ok((r.word()?, r.word()?)))?,
        };
        r.end(e)
    };
    read().map_err(|e: PlanError| e.within(place))
}

fn write_step(s: &Step) -> Sexpr {
    match s {
        Step::Run { kernel, args, split, group } => Sexpr::form(
            "run",
            [id(kernel.0), Sexpr::sym(SPLIT[usize::from(*split)]), id(*group)]
                .into_iter()
                .chain(args.iter().map(|a| id(a.0))),
        ),
        Step::Copy { from, to } => Sexpr::form("copy", [id(from.0), id(to.0)]),
        Step::LoopBegin { max, counter } => Sexpr::form("loop", [id(*max), id(counter.0)]),
        Step::LoopEnd { again } => Sexpr::form("again", [id(again.0)]),
    }
}

fn read_step(s: &Sexpr) -> Result<Step> {
    let mut r = Reader::list_of(s)?;
    let step = match r.symbol()? {
        "run" => {
            let kernel = KernelId(r.id()?);
            let split = match r.symbol()? {
                "whole" => false,
                "split" => true,
                other => {
                    return Err(PlanError::new(format!("found `{other}`, expected `split` or `whole`")));
                }
            };
            let group = r.id()?;
            let args = std::mem::take(&mut r.items)
                .iter()
                .map(|a| Ok(BufferId(narrow(a, "a buffer")?)))
                .collect::<Result<_>>()?;
            Step::Run { kernel, args, split, group }
        }
        "copy" => Step::Copy { from: BufferId(r.id()?), to: BufferId(r.id()?) },
        "loop" => Step::LoopBegin { max: r.id()?, counter: BufferId(r.id()?) },
        "again" => Step::LoopEnd { again: BufferId(r.id()?) },
        other => {
            return Err(PlanError::new(format!("found step `{other}`, expected run, copy, loop or again")));
        }
    };
    r.end(step)
}

fn read_pair(s: &Sexpr) -> Result<(String, String)> {
    let mut r = Reader::list_of(s)?;
    let pair = (r.string()?, r.string()?);
    r.end(pair)
}

fn read_port(s: &Sexpr) -> Result<(String, BufferId)> {
    let mut r = Reader::list_of(s)?;
    let port = (r.string()?, BufferId(r.id()?));
    r.end(port)
}

fn read_group(s: &Sexpr) -> Result<Group> {
    let mut r = Reader::list_of(s)?;
    let group = Group { name: r.string()?, flops: r.word()?, ternary: r.word()?, bytes: r.word()? };
    r.end(group)
}

fn read_lifetime(s: &Sexpr) -> Result<Lifetime> {
    let mut r = Reader::list_of(s)?;
    let lifetime = Lifetime { buffer: BufferId(r.id()?), first: r.id()?, last: r.id()? };
    r.end(lifetime)
}

fn write_decision(d: &Decision) -> Sexpr {
    Sexpr::List(vec![Sexpr::str(&d.entry), Sexpr::str(&d.edge), Sexpr::str(&d.verdict), id(d.count)])
}

fn read_decision(s: &Sexpr) -> Result<Decision> {
    let mut r = Reader::list_of(s)?;
    let decision = Decision { entry: r.string()?, edge: r.string()?, verdict: r.string()?, count: r.id()? };
    r.end(decision)
}

/// A complaint about a node, without its content, which may be large.
fn expected(what: &str, found: &Sexpr) -> PlanError {
    let found = match found {
        Sexpr::Sym(_) => "a name",
        Sexpr::Str(_) => "a string",
        Sexpr::Int(_) => "an integer",
        Sexpr::F32(_) => "a binary32",
        Sexpr::F64(_) => "a binary64",
        Sexpr::List(_) => "a list",
    };
    PlanError::new(format!("found {found}, expected {what}"))
}

fn narrow<T: TryFrom<i64>>(s: &Sexpr, what: &str) -> Result<T> {
    let x = s.as_int().ok_or_else(|| expected(what, s))?;
    T::try_from(x).map_err(|_| PlanError::new(format!("found {x}, which is out of range for {what}")))
}

/// Takes the items of a list one by one.
struct Reader<'a> {
    items: &'a [Sexpr],
}

impl<'a> Reader<'a> {
    fn list_of(s: &'a Sexpr) -> Result<Reader<'a>> {
        Ok(Reader { items: s.as_list().ok_or_else(|| expected("a list", s))? })
    }

    fn form(s: &'a Sexpr, name: &str) -> Result<Reader<'a>> {
        match s.as_form() {
            Some((head, items)) if head == name => Ok(Reader { items }),
            Some((head, _)) => Err(PlanError::new(format!("found section `{head}`, expected `{name}`"))),
            None => Err(expected(&format!("section `{name}`"), s)),
        }
    }

    fn next(&mut self) -> Result<&'a Sexpr> {
        let (first, rest) = self.items.split_first().ok_or_else(|| PlanError::new("the list ends too early"))?;
        self.items = rest;
        Ok(first)
    }

    fn end<T>(&self, value: T) -> Result<T> {
        match self.items.len() {
            0 => Ok(value),
            n => Err(PlanError::new(format!("found {n} more items, expected the end of the list"))),
        }
    }

    fn string(&mut self) -> Result<String> {
        let s = self.next()?;
        s.as_str().map(str::to_owned).ok_or_else(|| expected("a string", s))
    }

    fn symbol(&mut self) -> Result<&'a str> {
        let s = self.next()?;
        s.as_sym().ok_or_else(|| expected("a name", s))
    }

    fn peek_symbol(&self) -> Option<&'a str> {
        self.items.first()?.as_sym()
    }

    fn id(&mut self) -> Result<u32> {
        narrow(self.next()?, "a 32-bit number")
    }

    fn word(&mut self) -> Result<u64> {
        let s = self.next()?;
        s.as_int().map(|x| x as u64).ok_or_else(|| expected("an integer", s))
    }

    /// The next item as a form of that name with fixed contents.
    fn section<T>(&mut self, name: &str, f: impl FnOnce(&mut Reader<'a>) -> Result<T>) -> Result<T> {
        let mut r = Reader::form(self.next()?, name)?;
        f(&mut r).and_then(|value| r.end(value)).map_err(|e| e.within(name))
    }

    /// The next item as a form of that name with any number of like items.
    fn list<T>(&mut self, name: &str, f: impl Fn(&'a Sexpr) -> Result<T>) -> Result<Vec<T>> {
        let r = Reader::form(self.next()?, name)?;
        r.items.iter().enumerate().map(|(i, s)| f(s).map_err(|e| e.within(format!("{name}[{i}]")))).collect()
    }

    /// [`Reader::list`] for the last section.
    fn last<T>(&mut self, name: &str, f: impl Fn(&'a Sexpr) -> Result<T>) -> Result<Vec<T>> {
        let items = self.list(name, f)?;
        self.end(items)
    }
}
