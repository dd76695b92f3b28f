//! What every plan must satisfy before anyone executes it.
//!
//! A verified plan names only what exists, and every buffer that a step touches lies inside its memory and is at least as
//! large as the kernel declares; the runtime's pointers rest on this. Which elements a kernel touches inside its declared
//! buffers is proven for kernels without [`loops::unproven`] accesses and the promise of all others, so a plan deserves the trust
//! of a program. One pass, linear in the size of the plan.

use super::*;
use crate::loops::{self, Role};
use std::collections::HashSet;

type Result<T> = std::result::Result<T, PlanError>;

/// Sizes of single tensors and memories are below this many bytes.
pub const MAX_BYTES: u64 = 1 << 40;

/// The most iterations that a loop may have.
pub const MAX_LOOP: u32 = 4096;

const MAX_RANK: usize = 16;

/// Check a plan.
///
/// # Errors
/// The first rule that the plan breaks, with its place.
pub fn verify(plan: &Plan) -> Result<()> {
    memories(plan)?;
    for (i, b) in plan.buffers.iter().enumerate() {
        buffer(plan, b).map_err(|e| e.within(format!("buffers[{i}] `{}`", b.name)))?;
    }
    let constant = constants(plan)?;
    for (i, k) in plan.kernels.iter().enumerate() {
        kernel(k).map_err(|e| e.within(format!("kernels[{i}] `{}`", k.name)))?;
    }
    unique("entries", plan.entries.iter().map(|e| &e.name))?;
    for e in &plan.entries {
        Check { plan, entry: e, constant: &constant, in_loop: None }
            .entry()
            .map_err(|err| err.within(format!("entry `{}`", e.name)))?;
    }
    Ok(())
}

fn fail<T>(why: impl Into<String>) -> Result<T> {
    Err(PlanError::new(why))
}

/// The bytes of a type, or why it is none.
fn bytes(ty: &Type) -> Result<u64> {
    if ty.dims.len() > MAX_RANK {
        return fail(format!("found {} dimensions, expected at most {MAX_RANK}", ty.dims.len()));
    }
    let mut n = ty.dtype.size() as u64;
    for &d in &ty.dims {
        if d == 0 {
            return fail(format!("type {ty} has a dimension of 0"));
        }
        n = n
            .checked_mul(d as u64)
            .filter(|n| *n < MAX_BYTES)
            .ok_or_else(|| PlanError::new(format!("type {ty} is larger than {MAX_BYTES} bytes")))?;
    }
    Ok(n)
}

fn unique<'a>(place: &str, names: impl Iterator<Item = &'a String>) -> Result<()> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return fail(format!("{place}: the name `{name}` stands twice, expected unique names"));
        }
    }
    Ok(())
}

/// Weights, states and the sizes of arena and persistent memory.
fn memories(plan: &Plan) -> Result<()> {
    let mut total = 0u64;
    let mut grow = |n: u64| match total.checked_add(n) {
        Some(sum) if sum < MAX_BYTES => {
            total = sum;
            Ok(())
        }
        _ => fail(format!("all memories together are larger than {MAX_BYTES} bytes")),
    };
    unique("weights", plan.weights.iter().map(|w| &w.name))?;
    for (i, w) in plan.weights.iter().enumerate() {
        bytes(&w.ty).and_then(&mut grow).map_err(|e| e.within(format!("weights[{i}] `{}`", w.name)))?;
    }
    unique("states", plan.states.iter().map(|s| &s.name))?;
    for (i, s) in plan.states.iter().enumerate() {
        let mut all = || {
            if s.copies == 0 {
                return fail("found 0 copies, expected at least 1");
            }
            match bytes(&s.ty)?.next_multiple_of(64).checked_mul(s.copies.into()) {
                Some(n) => grow(n),
                None => fail(format!("all copies together are larger than {MAX_BYTES} bytes")),
            }
        };
        all().map_err(|e| e.within(format!("states[{i}] `{}`", s.name)))?;
    }
    grow(plan.persistent).map_err(|e| e.within("persistent"))?;
    grow(plan.arena()).map_err(|e| e.within("arena"))
}

fn buffer(plan: &Plan, b: &BufferDecl) -> Result<()> {
    let n = bytes(&b.ty)?;
    let inside = |what: &str, at: u64, all: u64| {
        if !at.is_multiple_of(64) {
            return fail(format!("found offset {at} in {what}, expected a multiple of 64"));
        }
        match at.checked_add(n) {
            Some(end) if end <= all => Ok(()),
            _ => fail(format!("{n} bytes at offset {at} reach beyond the {all} bytes of {what}")),
        }
    };
    let part = |what: &str, whole: Option<&Type>| match whole {
        None => fail(format!("its {what} does not exist")),
        Some(whole) if n > whole.bytes() as u64 => fail(format!("{} is larger than its {what} {whole}", b.ty)),
        Some(_) => Ok(()),
    };
    match b.place {
        Place::Arena(at) => inside("the arena", at, plan.arena()),
        Place::Persistent(at) => inside("persistent memory", at, plan.persistent),
        Place::Weight(i) => part("weight", plan.weights.get(i as usize).map(|w| &w.ty)),
        Place::State(i) => part("state", plan.states.get(i as usize).map(|s| &s.ty)),
    }
}

/// Check the constants; returns for every buffer whether it is one.
fn constants(plan: &Plan) -> Result<Vec<bool>> {
    let mut constant = vec![false; plan.buffers.len()];
    for (i, (id, t)) in plan.constants.iter().enumerate() {
        let mut check = || {
            let Some(b) = plan.buffers.get(id.0 as usize) else {
                return fail(format!("buffer {} does not exist", id.0));
            };
            if !matches!(b.place, Place::Persistent(_)) {
                return fail(format!("buffer `{}` is not in persistent memory", b.name));
            }
            if t.ty != b.ty || t.data.dtype() != t.ty.dtype || t.data.len() != t.ty.numel() {
                return fail(format!(
                    "found {} elements of {} as {}, expected {}",
                    t.data.len(),
                    t.data.dtype().name(),
                    t.ty,
                    b.ty
                ));
            }
            if std::mem::replace(&mut constant[id.0 as usize], true) {
                return fail(format!("buffer `{}` has a value already", b.name));
            }
            Ok(())
        };
        check().map_err(|e| e.within(format!("constants[{i}]")))?;
    }
    Ok(constant)
}

fn kernel(k: &Kernel) -> Result<()> {
    let mut scratch = 0u64;
    for b in &k.bufs {
        let n = (b.len as u64).checked_mul(b.dtype.size() as u64).filter(|n| (1..MAX_BYTES).contains(n));
        let Some(n) = n else {
            return fail(format!(
                "buffer `{}` has {} elements, expected at least 1 and less than {MAX_BYTES} bytes",
                b.name, b.len
            ));
        };
        if b.role == Role::Scratch {
            scratch = scratch.saturating_add(n.next_multiple_of(64));
        }
    }
    if scratch >= MAX_BYTES {
        return fail(format!("found {scratch} bytes of scratch memory, expected less than {MAX_BYTES}"));
    }
    if i64::try_from(k.grid).is_err() {
        return fail(format!("found a grid of {}, expected at most {}", k.grid, i64::MAX));
    }
    loops::verify(k).map_err(|e| PlanError::new(e.to_string()))
}

/// The walk over one entry point.
struct Check<'a> {
    plan: &'a Plan,
    entry: &'a Entry,
    constant: &'a [bool],
    /// The bound of the loop that is open.
    in_loop: Option<u32>,
}

impl<'a> Check<'a> {
    fn entry(mut self) -> Result<()> {
        let e = self.entry;
        for (what, ports, written) in [("inputs", &e.inputs, true), ("outputs", &e.outputs, false)] {
            unique(what, ports.iter().map(|p| &p.0))?;
            for (name, id) in ports {
                self.touch(*id, written).map_err(|err| err.within(format!("{what} `{name}`")))?;
            }
        }
        for (i, s) in e.steps.iter().enumerate() {
            self.step(s).map_err(|err| err.within(format!("steps[{i}]")))?;
        }
        if self.in_loop.is_some() {
            return fail("the last loop has no end");
        }
        for (i, l) in e.lifetimes.iter().enumerate() {
            self.lifetime(l).map_err(|err| err.within(format!("lifetimes[{i}]")))?;
        }
        Ok(())
    }

    /// A buffer that is read or written here.
    fn touch(&self, id: BufferId, written: bool) -> Result<&'a BufferDecl> {
        let Some(b) = self.plan.buffers.get(id.0 as usize) else {
            return fail(format!("buffer {} does not exist", id.0));
        };
        match b.place {
            // The end was computed without overflow for the whole arena.
            Place::Arena(at) if at + b.ty.bytes() as u64 > self.entry.arena => {
                return fail(format!(
                    "buffer `{}` reaches beyond the {} bytes of arena of this entry",
                    b.name, self.entry.arena
                ));
            }
            Place::State(i) => {
                let (copies, max) = (self.plan.states[i as usize].copies, self.in_loop.unwrap_or(1));
                if copies < max {
                    return fail(format!(
                        "state buffer `{}` has {copies} copies, expected one for each of {max} iterations",
                        b.name
                    ));
                }
            }
            _ => {}
        }
        if written && self.constant[id.0 as usize] {
            return fail(format!("buffer `{}` is a constant and cannot be written", b.name));
        }
        Ok(b)
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Run { kernel, args, group, .. } => {
                let Some(k) = self.plan.kernels.get(kernel.0 as usize) else {
                    return fail(format!("kernel {} does not exist", kernel.0));
                };
                if *group as usize >= self.entry.groups.len() {
                    return fail(format!("group {group} does not exist"));
                }
                let declared = || k.bufs.iter().filter(|d| d.role != Role::Scratch);
                if declared().count() != args.len() {
                    return fail(format!(
                        "found {} arguments, expected {} for kernel `{}`",
                        args.len(),
                        declared().count(),
                        k.name
                    ));
                }
                for (d, &id) in declared().zip(args) {
                    let b = self.touch(id, d.role != Role::In)?;
                    if b.ty.dtype != d.dtype || b.ty.numel() < d.len {
                        return fail(format!(
                            "buffer `{}` is {}, expected {} elements of {} for `{}` of kernel `{}`",
                            b.name,
                            b.ty,
                            d.len,
                            d.dtype.name(),
                            d.name,
                            k.name
                        ));
                    }
                }
                Ok(())
            }
            Step::Copy { from, to } => {
                let (a, b) = (self.touch(*from, false)?, self.touch(*to, true)?);
                if a.ty != b.ty {
                    return fail(format!(
                        "cannot copy `{}` {} to `{}` {}, expected equal types",
                        a.name, a.ty, b.name, b.ty
                    ));
                }
                Ok(())
            }
            Step::LoopBegin { max, counter } => {
                if self.in_loop.is_some() {
                    return fail("a loop begins inside a loop, expected its end first");
                }
                if !(1..=MAX_LOOP).contains(max) {
                    return fail(format!("found at most {max} iterations, expected 1 to {MAX_LOOP}"));
                }
                self.in_loop = Some(*max);
                self.flag(*counter, true)
            }
            Step::LoopEnd { again } => {
                self.flag(*again, false)?;
                match self.in_loop.take() {
                    Some(_) => Ok(()),
                    None => fail("a loop ends that did not begin"),
                }
            }
        }
    }

    /// An `i32[1]` that steers a loop.
    fn flag(&self, id: BufferId, written: bool) -> Result<()> {
        let b = self.touch(id, written)?;
        if b.ty != Type::i32(&[1]) {
            return fail(format!("buffer `{}` is {}, expected i32[1]", b.name, b.ty));
        }
        Ok(())
    }

    fn lifetime(&self, l: &Lifetime) -> Result<()> {
        let b = self.touch(l.buffer, false)?;
        if !matches!(b.place, Place::Arena(_)) {
            return fail(format!("buffer `{}` is not in the arena", b.name));
        }
        if l.first > l.last || l.last as usize >= self.entry.steps.len() {
            return fail(format!(
                "found steps {} to {}, expected an interval of the {} steps",
                l.first,
                l.last,
                self.entry.steps.len()
            ));
        }
        Ok(())
    }
}
