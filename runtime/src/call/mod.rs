//! One call of an entry point on given tensors: the door through which other programs check the engine.
//!
//! Tensors carry the names and shapes of the executable specification; everything that is particular to plans (states by copies, ring
//! buffers, single-token decoding) stays behind it. Nothing reaches a kernel before its shape, type and range are checked.

pub mod states;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use chimera_ir::{DType as ElementType, Type};

use crate::exec::{EntryId, ExecError, Executable};
use crate::files::safetensors::SafeTensors;
use crate::files::{DType, FileError, HostTensor, npy};
use crate::generate::DECODE;
use crate::text::IGNORE;

/// Tensors by name.
pub type Tensors = BTreeMap<String, HostTensor>;

/// What the names of input tensors start with in files that also hold other tensors.
const IN: &str = "in.";

/// Why a call failed.
#[derive(Debug)]
pub enum CallError {
    /// Execution failed.
    Exec(ExecError),
    /// A file could not be read.
    File(FileError),
    /// A tensor that does not fit.
    Tensor {
        /// Its name.
        name: String,
        /// What was found and what was expected.
        reason: String,
    },
}

impl CallError {
    /// Exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            CallError::Exec(e) => e.exit_code(),
            CallError::File(e) => e.exit_code(),
            CallError::Tensor { .. } => 1,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Exec(e) => e.fmt(f),
            CallError::File(e) => e.fmt(f),
            CallError::Tensor { name, reason } => write!(f, "tensor `{name}`: {reason}"),
        }
    }
}

impl std::error::Error for CallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            CallError::Exec(e) => Some(e),
            CallError::File(e) => Some(e),
            CallError::Tensor { .. } => None,
        }
    }
}

impl From<ExecError> for CallError {
    fn from(e: ExecError) -> CallError {
        CallError::Exec(e)
    }
}

impl From<FileError> for CallError {
    fn from(e: FileError) -> CallError {
        CallError::File(e)
    }
}

fn bad<T>(name: &str, reason: impl Into<String>) -> Result<T, CallError> {
    Err(CallError::Tensor { name: name.to_owned(), reason: reason.into() })
}

/// Read tensors: a `.npy` file holds one called `tokens`; of a safetensors file that has `in.tokens`, the tensors under `in.` count,
/// without that prefix.
///
/// # Errors
/// A file that cannot be read.
pub fn read_tensors(path: &Path) -> Result<Tensors, FileError> {
    if path.extension().is_some_and(|e| e == "npy") {
        return Ok(Tensors::from([("tokens".to_owned(), npy::read(path)?)]));
    }
    let file = SafeTensors::open(path)?;
    let prefix = if file.get(&format!("{IN}tokens")).is_some() { IN } else { "" };
    let inside = file.iter().filter_map(|(name, view)| Some((name.strip_prefix(prefix)?, view)));
    Ok(inside.map(|(name, view)| (name.to_owned(), view.to_owned())).collect())
}

/// Integers of 32 or 64 bits as `i32`, each within `range`.
fn ints(
    name: &str,
    t: &HostTensor,
    range: std::ops::RangeInclusive<i64>,
    also: Option<i64>,
) -> Result<Vec<i32>, CallError> {
    if !matches!(t.dtype(), DType::I32 | DType::I64) {
        return bad(name, format!("found {}, expected I32 or I64", t.dtype().name()));
    }
    let values = t.to_i64().unwrap_or_default();
    match values.iter().position(|x| !range.contains(x) && Some(*x) != also) {
        Some(at) => {
            let or = also.map_or(String::new(), |x| format!(" or {x}"));
            bad(name, format!("element {at} is {}, expected {} to {}{or}", values[at], range.start(), range.end()))
        }
        None => Ok(values.into_iter().map(|x| x as i32).collect()),
    }
}

/// The `[rows, tokens]` of the `tokens` among `inputs`.
///
/// # Errors
/// When they are absent or not a matrix of at least one element.
pub fn batch_shape(inputs: &Tensors) -> Result<[usize; 2], CallError> {
    match inputs.get("tokens") {
        None => bad("tokens", "is not among the inputs"),
        Some(t) => match *t.shape() {
            [rows, tokens] if rows * tokens > 0 => Ok([rows, tokens]),
            _ => bad("tokens", format!("found shape {:?}, expected [rows, tokens]", t.shape())),
        },
    }
}

/// The loop depth of every row among the inputs: `depth` or `loops`, a number or one for each of `rows`.
///
/// # Errors
/// Another shape, or no positive integers.
pub fn depths(inputs: &Tensors, rows: usize) -> Result<Option<Vec<i32>>, CallError> {
    let Some((name, t)) = ["depth", "loops"].iter().find_map(|n| Some((*n, inputs.get(*n)?))) else { return Ok(None) };
    let values = ints(name, t, 1..=i64::from(u16::MAX), None)?;
    match values.len() {
        1 => Ok(Some(vec![values[0]; rows])),
        n if n == rows => Ok(Some(values)),
        n => bad(name, format!("found {n} numbers, expected 1 or {rows}")),
    }
}

/// Run an entry point.
///
/// Inputs by name: `tokens` and optionally `seg` (zeros), `labels`, `depth`, `seed` (one integer or its low and high word), `step`,
/// and incoming states (see [`states`]; fresh when absent). An entry point of single tokens is run once for each column of
/// `tokens`. Returned are the outputs of the plan, `loss` as a scalar, and the states afterwards where the plan has any.
///
/// # Errors
/// Inputs that do not fit the plan, or a failed execution.
pub fn run(exe: &mut Executable, entry: &str, inputs: &Tensors) -> Result<Tensors, CallError> {
    let id = exe.entry(entry)?;
    let [rows, tokens] = batch_shape(inputs)?;
    let planned = input_type(exe, entry, "tokens")?;
    let steps = match planned.dims[..] {
        [r, 1] if r == rows && entry == DECODE => tokens,
        [r, t] if r == rows && t == tokens => 1,
        _ => {
            return bad(
                "tokens",
                format!("found shape [{rows}, {tokens}], the plan was compiled for {:?}", planned.dims),
            );
        }
    };
    let stateful = !["loss", "grad", "dual_loss"].contains(&entry) && !exe.plan().states.is_empty();
    match inputs.keys().find(|n| n.starts_with(states::PREFIX)) {
        Some(name) if !stateful => return bad(name, format!("`{entry}` takes no states")),
        Some(_) => states::import(exe, inputs)?,
        None => exe.reset_states(),
    }
    let columns = matrices(exe, id, entry, inputs, [rows, tokens])?;
    set_scalars(exe, id, entry, inputs, rows)?;

    let mut results = Results::default();
    let mut column = vec![0; rows * tokens / steps];
    for step in 0..steps {
        for (name, values) in &columns {
            for (row, to) in column.chunks_exact_mut(tokens / steps).enumerate() {
                let from = row * tokens + step;
                to.copy_from_slice(&values[from..from + to.len()]);
            }
            exe.set_input(id, name, &column)?;
        }
        exe.run(id)?;
        results.take(exe, id, entry, step, steps, rows)?;
    }
    let mut out = results.finish()?;
    if stateful {
        let ran = out.get("loops").map(|t| t.to_i64().unwrap_or_default());
        let iterations = ran.and_then(|used| used.into_iter().max()).unwrap_or(i64::MAX);
        out.extend(states::export(exe, iterations as usize)?);
    }
    Ok(out)
}

/// The `[rows, tokens]` inputs that the entry point takes, checked.
fn matrices(
    exe: &Executable,
    id: EntryId,
    entry: &str,
    inputs: &Tensors,
    shape: [usize; 2],
) -> Result<Vec<(&'static str, Vec<i32>)>, CallError> {
    let vocab = vocab_size(exe, id);
    let documents = i64::from(i32::MAX) - 1;
    let mut out = Vec::with_capacity(3);
    for (name, top, also) in
        [("tokens", vocab - 1, None), ("seg", documents, None), ("labels", vocab - 1, Some(i64::from(IGNORE)))]
    {
        if input_type(exe, entry, name).is_err() {
            continue;
        }
        match inputs.get(name) {
            None if name == "seg" => out.push((name, vec![0; shape[0] * shape[1]])),
            None => return bad(name, format!("is not among the inputs, `{entry}` needs it")),
            Some(t) if t.shape() != shape => {
                return bad(name, format!("found shape {:?}, expected {shape:?} like `tokens`", t.shape()));
            }
            Some(t) => out.push((name, ints(name, t, 0..=top, also)?)),
        }
    }
    Ok(out)
}

/// `depth`, `seed` and `step`, where the entry point takes them.
fn set_scalars(exe: &mut Executable, id: EntryId, entry: &str, inputs: &Tensors, rows: usize) -> Result<(), CallError> {
    let takes = |name: &str| input_type(exe, entry, name).is_ok();
    let (depth, seed, step) = (takes("depth"), takes("seed"), takes("step"));
    if !depth && depths(inputs, rows)?.is_some() {
        return bad("depth", format!("`{entry}` was compiled for one depth of all rows"));
    }
    if depth {
        let max = exe.plan().states.iter().map(|s| s.copies).max().unwrap_or(1);
        match depths(inputs, rows)? {
            None => {
                return bad(
                    "depth",
                    format!("is not among the inputs, `{entry}` was compiled for rows of their own depth"),
                );
            }
            // Without states the plan does not tell its bound; it was compiled for these inputs.
            Some(d) if max > 1 && d.iter().any(|&n| n as u32 > max) => {
                return bad("depth", format!("found {:?}, the plan was compiled for at most {max}", d));
            }
            Some(d) => exe.set_input(id, "depth", &d)?,
        }
    }
    let words = |name: &str| -> Result<Vec<i64>, CallError> {
        match inputs.get(name) {
            None => Ok(vec![0]),
            Some(t) => t.to_i64().or_else(|e| bad(name, e.to_string())),
        }
    };
    if seed {
        let words = match words("seed")?[..] {
            [seed] => [seed as i32, (seed >> 32) as i32],
            [low, high] => [low as i32, high as i32],
            _ => return bad("seed", "expected one integer, or its low and high word"),
        };
        exe.set_input(id, "seed", &words)?;
    }
    if step {
        match words("step")?[..] {
            [step] => exe.set_input(id, "step", &[step as i32])?,
            _ => return bad("step", "expected one integer"),
        }
    }
    Ok(())
}

fn input_type<'a>(exe: &'a Executable, entry: &str, name: &str) -> Result<&'a Type, CallError> {
    let plan = exe.plan();
    let inputs = plan.entry(entry).map(|e| &e.inputs[..]).unwrap_or_default();
    match inputs.iter().find(|(n, _)| n == name) {
        Some((_, buffer)) => Ok(&plan.buffer(*buffer).ty),
        None => bad(name, format!("is not an input of `{entry}`")),
    }
}

/// The rows of the embedding, which bound tokens and labels.
fn vocab_size(exe: &Executable, id: EntryId) -> i64 {
    let embedding = exe.plan().weights.iter().find(|w| w.name == "embed.weight").and_then(|w| w.ty.dims.first());
    let logits = || exe.output_type(id, "logits").map(Type::cols).ok();
    embedding.copied().or_else(logits).map_or(i64::from(i32::MAX), |n| n as i64)
}

/// The outputs of all steps, by name, in bytes.
#[derive(Default)]
struct Results(Vec<(String, Type, Vec<u8>)>);

impl Results {
    /// Take the outputs of one of `steps` steps: what is `[rows, 1, ..]` is a column, loads are added up, the rest is replaced.
    fn take(
        &mut self,
        exe: &Executable,
        id: EntryId,
        entry: &str,
        step: usize,
        steps: usize,
        rows: usize,
    ) -> Result<(), CallError> {
        let names = exe.plan().entry(entry).map(|e| &e.outputs[..]).unwrap_or_default();
        for (i, (name, _)) in names.iter().enumerate() {
            let ty = exe.output_type(id, name)?;
            let bytes = output_bytes(exe, id, name, ty.dtype)?;
            let column = ty.dims.len() > 1 && ty.dims[..2] == [rows, 1];
            if step == 0 {
                let mut all = ty.clone();
                if column {
                    all.dims[1] = steps;
                }
                self.0.push((name.clone(), all.clone(), vec![0; all.bytes()]));
            }
            let (_, _, all) = &mut self.0[i];
            if column {
                let n = bytes.len() / rows;
                for (row, from) in bytes.chunks_exact(n).enumerate() {
                    let at = (row * steps + step) * n;
                    all[at..at + n].copy_from_slice(from);
                }
            } else if ty.dtype == ElementType::I32 && name.starts_with("load.") {
                for (sum, x) in all.as_chunks_mut::<4>().0.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *sum = (i32::from_le_bytes(*sum) + i32::from_le_bytes(*x)).to_le_bytes();
                }
            } else {
                *all = bytes;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Tensors, CallError> {
        let mut out = Tensors::new();
        for (name, ty, bytes) in self.0 {
            let dims = if name == "loss" { vec![] } else { ty.dims };
            out.insert(name.clone(), states::host(&name, ty.dtype, dims, bytes)?);
        }
        Ok(out)
    }
}

fn output_bytes(exe: &Executable, id: EntryId, name: &str, dtype: ElementType) -> Result<Vec<u8>, CallError> {
    macro_rules! le {
        ($T:ty) => {
            exe.output::<$T>(id, name)?.iter().flat_map(|x| x.to_le_bytes()).collect()
        };
    }
    Ok(match dtype {
        ElementType::F32 => le!(f32),
        ElementType::F64 => le!(f64),
        ElementType::BF16 => le!(half::bf16),
        ElementType::I8 => le!(i8),
        ElementType::U8 => le!(u8),
        ElementType::I16 => le!(i16),
        ElementType::I32 => le!(i32),
    })
}
