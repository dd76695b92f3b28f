//! Carried states under the names and shapes of the executable specification.
//!
//! `state.{layer}.{iteration}.{name}`, `state.pos` and `state.seg`, row by row. What differs from a plan: positions and document ids are
//! stored plus one, counters are 16 bits wide, and the window of an attention layer is a ring of `[rows, window, heads * K]` in which
//! the token with the running number `c` lies in slot `c mod window`; outside it is `[rows, heads, n, K]` in the order of time with the
//! latest `n = min(c, window - 1)` tokens, the only ones that a later token can see; a row that has seen fewer than others has zeros first.

use chimera_ir::DType as ElementType;
use chimera_ir::plan::StateDecl;

use super::{CallError, Tensors, bad};
use crate::exec::Executable;
use crate::files::{DType, HostTensor};

/// What the names of states start with.
pub const PREFIX: &str = "state.";
/// The stabiliser of an mLSTM that has seen nothing.
const NOTHING: f32 = -1.0e30;

/// A state of a layer.
struct LayerState {
    layer: usize,
    name: String,
    decl: StateDecl,
}

fn layer_states(exe: &Executable) -> Vec<LayerState> {
    let parse = |s: &StateDecl| {
        let (layer, name) = s.name.strip_prefix("layers.")?.split_once('.')?;
        Some(LayerState { layer: layer.parse().ok()?, name: name.to_owned(), decl: s.clone() })
    };
    exe.plan().states.iter().filter_map(parse).collect()
}

/// A ring buffer of an attention layer: `[rows, window, heads, k]`.
#[derive(Clone, Copy)]
struct Ring {
    rows: usize,
    window: usize,
    heads: usize,
    k: usize,
}

impl Ring {
    /// The keys or values of a layer; the memory of the same layer tells the number of heads.
    fn of(s: &LayerState, all: &[LayerState]) -> Option<Ring> {
        let memory = all.iter().find(|m| m.layer == s.layer && m.name == "W1")?;
        let ring = (s.name == "k" || s.name == "v") && s.decl.ty.dtype == ElementType::F32;
        let (&[rows, window, width], heads) = (ring.then_some(&s.decl.ty.dims[..])?, *memory.decl.ty.dims.get(1)?)
        else {
            return None;
        };
        Some(Ring { rows, window, heads, k: width / heads })
    }

    /// For every row, head and token: offsets inside, and outside among `n` tokens. `seen[row]` tokens came before; a row that has seen
    /// fewer than `n` lacks the earliest ones.
    fn each(self, seen: &[usize], n: usize, mut f: impl FnMut(usize, usize)) {
        for (row, &seen) in seen.iter().enumerate() {
            for head in 0..self.heads {
                for age in 1..=n.min(seen) {
                    let inside = ((row * self.window + (seen - age) % self.window) * self.heads + head) * self.k;
                    f(inside, ((row * self.heads + head) * n + n - age) * self.k);
                }
            }
        }
    }
}

/// A tensor of little-endian bytes under a name for errors.
pub(super) fn host(name: &str, dtype: ElementType, dims: Vec<usize>, bytes: Vec<u8>) -> Result<HostTensor, CallError> {
    let dtype = match dtype {
        ElementType::F32 => DType::F32,
        ElementType::F64 => DType::F64,
        ElementType::BF16 => DType::BF16,
        ElementType::I8 => DType::I8,
        ElementType::U8 => DType::U8,
        ElementType::I16 => DType::I16,
        ElementType::I32 => DType::I32,
    };
    HostTensor::new(dtype, dims, bytes).or_else(|e| bad(name, e.to_string()))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_ne_bytes(*b)).collect()
}

fn integers(bytes: &[u8], dtype: ElementType) -> Vec<i64> {
    match dtype {
        ElementType::I16 => bytes.as_chunks::<2>().0.iter().map(|b| i16::from_ne_bytes(*b).into()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|b| i32::from_ne_bytes(*b).into()).collect(),
    }
}

fn tensor<T>(name: &str, made: Result<HostTensor, T>) -> Result<HostTensor, CallError>
where
    T: ToString,
{
    made.or_else(|e| bad(name, e.to_string()))
}

/// The number of tokens that the ring of each row has seen; multiples of the window may be missing from it.
fn seen(exe: &Executable, layer: usize, copy: usize, rows: usize) -> Result<Vec<usize>, CallError> {
    let counts = integers(exe.state(&format!("layers.{layer}.count"), copy)?, ElementType::I32);
    // All heads of a row count the same.
    Ok(counts.chunks(counts.len() / rows).map(|row| row[0].max(0) as usize).collect())
}

/// The states of `exe`, those of looped layers for the first `iterations` iterations.
///
/// # Errors
/// A state of an element type that has no form outside.
pub fn export(exe: &Executable, iterations: usize) -> Result<Tensors, CallError> {
    let mut out = Tensors::new();
    for name in ["pos", "seg"] {
        if exe.plan().states.iter().any(|s| s.name == name) {
            let values: Vec<i64> = integers(exe.state(name, 0)?, ElementType::I32).iter().map(|x| x - 1).collect();
            let full = format!("{PREFIX}{name}");
            out.insert(full.clone(), tensor(&full, HostTensor::from_i64(&[values.len()], &values))?);
        }
    }
    let all = layer_states(exe);
    for s in all.iter().filter(|s| s.name != "count") {
        for copy in 0..(s.decl.copies as usize).min(iterations) {
            let full = format!("{PREFIX}{}.{copy}.{}", s.layer, s.name);
            let (bytes, ty) = (exe.state(&s.decl.name, copy)?, &s.decl.ty);
            let made = match (ty.dtype, Ring::of(s, &all)) {
                (_, Some(ring)) => {
                    let seen = seen(exe, s.layer, copy, ring.rows)?;
                    let n = seen.iter().map(|&c| c.min(ring.window - 1)).max().unwrap_or(0);
                    let (inside, mut outside) = (floats(bytes), vec![0.0; ring.rows * ring.heads * n * ring.k]);
                    ring.each(&seen, n, |i, o| outside[o..o + ring.k].copy_from_slice(&inside[i..i + ring.k]));
                    HostTensor::from_f32(&[ring.rows, ring.heads, n, ring.k], &outside)
                }
                (ElementType::F32, None) => HostTensor::from_f32(&ty.dims, &floats(bytes)),
                (ElementType::I16 | ElementType::I32, None) => {
                    HostTensor::from_i64(&ty.dims, &integers(bytes, ty.dtype))
                }
                (other, None) => return bad(&full, format!("{} has no form outside", other.name())),
            };
            out.insert(full.clone(), tensor(&full, made)?);
        }
    }
    Ok(out)
}

/// Set the states of `exe` from tensors named as above; a layer or iteration that is absent starts fresh.
///
/// # Errors
/// A name, shape or type that the plan does not have, or layer states without `state.pos`.
pub fn import(exe: &mut Executable, tensors: &Tensors) -> Result<(), CallError> {
    exe.reset_states();
    let all = layer_states(exe);
    for s in all.iter().filter(|s| s.name == "m") {
        let fresh = NOTHING.to_ne_bytes().repeat(s.decl.ty.numel());
        (0..s.decl.copies as usize).try_for_each(|copy| exe.set_state(&s.decl.name, copy, &fresh))?;
    }
    if !tensors.contains_key("state.pos") {
        return bad("state.pos", "is not among the inputs, states need it");
    }
    for (full, t) in tensors.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
        let rest = &full[PREFIX.len()..];
        if rest == "pos" || rest == "seg" {
            set_stream(exe, full, rest, t)?;
            continue;
        }
        let mut parts = rest.splitn(3, '.');
        let mut number = || parts.next().and_then(|p| p.parse::<usize>().ok());
        let (Some(layer), Some(copy), Some(name)) = (number(), number(), parts.next()) else {
            return bad(full, "expected a name like `state.5.0.S`: layer, iteration, state");
        };
        let found = all.iter().find(|s| s.layer == layer && s.name == name && s.name != "count");
        let Some(s) = found.filter(|s| copy < s.decl.copies as usize) else {
            return bad(full, "the plan has no such state");
        };
        match Ring::of(s, &all) {
            Some(ring) => set_ring(exe, full, s, ring, copy, t)?,
            None => set_plain(exe, full, s, copy, t)?,
        }
    }
    Ok(())
}

fn expect_shape(full: &str, t: &HostTensor, dims: &[usize], dtypes: &[DType]) -> Result<(), CallError> {
    if t.shape() == dims && dtypes.contains(&t.dtype()) {
        return Ok(());
    }
    bad(full, format!("found {} {:?}, expected {} {dims:?}", t.dtype().name(), t.shape(), dtypes[0].name()))
}

fn set_stream(exe: &mut Executable, full: &str, name: &str, t: &HostTensor) -> Result<(), CallError> {
    let Some(rows) = exe.plan().states.iter().find(|s| s.name == name).map(|s| s.ty.numel()) else {
        return bad(full, "the plan has no such state");
    };
    expect_shape(full, t, &[rows], &[DType::I64, DType::I32])?;
    let values = super::ints(full, t, -1..=i64::from(i32::MAX) - 1, None)?;
    let bytes: Vec<u8> = values.iter().flat_map(|x| (x + 1).to_ne_bytes()).collect();
    Ok(exe.set_state(name, 0, &bytes)?)
}

fn set_plain(exe: &mut Executable, full: &str, s: &LayerState, copy: usize, t: &HostTensor) -> Result<(), CallError> {
    let ty = &s.decl.ty;
    let bytes: Vec<u8> = match ty.dtype {
        ElementType::I16 => {
            expect_shape(full, t, &ty.dims, &[DType::I64, DType::I32, DType::I16])?;
            let values = t.to_i64().or_else(|e| bad(full, e.to_string()))?;
            let narrow = values.iter().map(|&x| i16::try_from(x)).collect::<Result<Vec<_>, _>>();
            let narrow = narrow.or_else(|_| bad(full, "a counter does not fit 16 bits"))?;
            narrow.iter().flat_map(|x| x.to_ne_bytes()).collect()
        }
        _ => {
            expect_shape(full, t, &ty.dims, &[DType::F32])?;
            t.to_f32().iter().flat_map(|x| x.to_ne_bytes()).collect()
        }
    };
    Ok(exe.set_state(&s.decl.name, copy, &bytes)?)
}

fn set_ring(
    exe: &mut Executable,
    full: &str,
    s: &LayerState,
    ring: Ring,
    copy: usize,
    t: &HostTensor,
) -> Result<(), CallError> {
    let n = t.shape().get(2).copied().unwrap_or(0);
    if n >= ring.window {
        return bad(full, format!("found {n} tokens, the window keeps at most {}", ring.window - 1));
    }
    expect_shape(full, t, &[ring.rows, ring.heads, n, ring.k], &[DType::F32])?;
    let (outside, mut inside) = (t.to_f32(), vec![0.0f32; s.decl.ty.numel()]);
    ring.each(&vec![n; ring.rows], n, |i, o| inside[i..i + ring.k].copy_from_slice(&outside[o..o + ring.k]));
    let bytes: Vec<u8> = inside.iter().flat_map(|x| x.to_ne_bytes()).collect();
    exe.set_state(&s.decl.name, copy, &bytes)?;
    // Below the length of the window the count is the number of tokens itself.
    let count = format!("layers.{}.count", s.layer);
    let len = exe.state(&count, copy)?.len() / size_of::<i32>();
    Ok(exe.set_state(&count, copy, &(n as i32).to_ne_bytes().repeat(len))?)
}
