//! What it takes to start: machine code for the largest model, and its first token from a file that is not in memory.
//!
//! The weights have the shapes of the model and made-up values; the file is deleted afterwards.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use chimera_codegen::{Allowed, Module, compile_with};
use chimera_compiler::{EntryKind, EntrySpec, Options, PerSequence, Scheme, UpdateRule, compile};
use chimera_frontends::config::{
    BYTE_VOCABULARY, ModelConfig, Overrides, ParamKind, Scale, WeightScale, expert_stack, from_text, parameters, preset,
};
use chimera_ir::plan::Plan;
use chimera_runtime::exec::Executable;
use chimera_runtime::files::b158::{self, Encoding, Entry, ScaleEncoding};
use chimera_runtime::generate::{Generator, Settings};
use chimera_runtime::text::Vocab;
use chimera_runtime::train::weights::WeightFile;
use rustix::fs::{Advice, fadvise};

use crate::measure::{Setup, median};
use crate::row::Row;

/// Tokens of a sequence, and of a chunk of a prompt.
const TOKENS: usize = 128;
/// Tokens of a chunk of the prompt that is read in front of the first token.
const CHUNK: usize = 16;
/// Rows of a ternary weight come in so many.
const PANEL: usize = 32;
const MIB: f64 = (1u64 << 20) as f64;

fn spec(kind: EntryKind, tokens: usize) -> EntrySpec {
    EntrySpec { kind, rows: 1, tokens, depth: None }
}

/// The plan of everything that the compiler makes by default.
fn whole_plan(model: &ModelConfig, target: &str) -> Result<Plan> {
    let scheme = Scheme::PerSequence(PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 });
    let entries = vec![
        spec(EntryKind::Loss, TOKENS),
        spec(EntryKind::Logits, TOKENS),
        spec(EntryKind::Prefill, TOKENS),
        spec(EntryKind::Decode, 1),
        spec(EntryKind::DualLoss(scheme.clone()), TOKENS),
        spec(EntryKind::Update(scheme, UpdateRule::default()), TOKENS),
    ];
    Ok(compile(model, &Options { target: target.to_owned(), entries, ..Options::default() })?)
}

/// Median milliseconds of making machine code, and the last result.
fn emit(plan: &Plan, setup: &Setup, times: usize, cache: Option<&Path>) -> Result<(Module, f64)> {
    let mut all = vec![];
    loop {
        let start = Instant::now();
        let module = compile_with(&plan.kernels, &setup.target, &Allowed::all(), cache)?;
        all.push(start.elapsed().as_secs_f64() * 1e3);
        if all.len() >= times {
            return Ok((module, median(all)));
        }
    }
}

/// Machine code for the plan: emitted, and read again.
fn code(setup: &Setup, times: usize, folder: &Path) -> Result<Vec<Row>> {
    let plan = whole_plan(&preset(Scale::Full, &Overrides::default())?.model, &setup.target.to_string())?;
    let (module, emitted) = emit(&plan, setup, times, None)?;
    let interpreted = module.kernels.iter().zip(&plan.kernels).find(|(k, _)| k.emitter == "interp");
    ensure!(interpreted.is_none(), "no emitter of machine code serves {:?}", interpreted.map(|(_, k)| &k.name));
    let cache = folder.join("code");
    emit(&plan, setup, 1, Some(&cache))?;
    let (again, read) = emit(&plan, setup, times, Some(&cache))?;
    ensure!(again.cached, "the machine code that was kept was not used");
    let bytes = |m: &Module| m.kernels.iter().map(|k| k.code_bytes).sum::<usize>();
    ensure!(bytes(&again) == bytes(&module), "the machine code that was kept has another size");
    // Emission uses all cores, whatever the number of threads that execute.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let row = |id: &str, value, unit| Row::plain(id, value, unit, cores);
    Ok(vec![
        row("jit.full", emitted, "ms"),
        Row { peer: Some(emitted), ratio: Some(read / emitted), ..row("jit_cached.full", read, "ms") },
        row("jit_kernels.full", plan.kernels.len() as f64, "kernels"),
        row("jit_code.full", bytes(&module) as f64 / MIB, "MiB"),
    ])
}

/// Kind, dimensions of one matrix, and how many are stacked; 0 of a tensor that is no stack.
type Shape = (ParamKind, Vec<usize>, usize);

/// The stored bytes of made-up weights: of `count` ternary matrices together, or of floats.
fn stored(kind: ParamKind, dims: &[usize], count: usize, group: usize) -> Result<Vec<u8>> {
    let word = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let floats = |len: usize, f: &dyn Fn(usize) -> f32| (0..len).flat_map(|i| f(i).to_le_bytes()).collect::<Vec<u8>>();
    if kind != ParamKind::Ternary {
        let centre = if kind == ParamKind::Vector { 1.0 } else { 0.0 };
        return Ok(floats(dims.iter().product(), &|i| centre + ((word(i) % 1024) as f32 / 512.0 - 1.0) * 0.02));
    }
    let [n, k] = dims[..] else { bail!("a ternary weight has shape {dims:?}, expected a matrix") };
    let codes: Vec<i8> = (0..n * k).map(|i| (word(i) % 3) as i8 - 1).collect();
    let codes = b158::pack_ternary(&codes, n, k).repeat(count);
    let per_row = k.div_ceil(group);
    let rows = n.next_multiple_of(PANEL);
    // Scales of padding rows are zero.
    let scales = floats(rows * per_row, &|i| if i < n * per_row { 0.02 } else { 0.0 });
    Ok([codes, scales.repeat(count)].concat())
}

/// Write packed weights for `model`; those of one shape have the same values. Returns the bytes of ternary weights.
fn write(model: &ModelConfig, path: &Path) -> Result<u64> {
    let group = |k: usize| match model.quantization.weight_scale {
        WeightScale::Group => model.quantization.group_size.min(k),
        WeightScale::Row | WeightScale::Tensor => k,
    };
    let mut tensors: BTreeMap<String, Shape> = BTreeMap::new();
    for p in parameters(model) {
        let stack = expert_stack(&p.name).filter(|_| p.kind == ParamKind::Ternary).map(|s| s.0);
        let stacked = usize::from(stack.is_some());
        tensors.entry(stack.unwrap_or(p.name)).or_insert((p.kind, p.dims, 0)).2 += stacked;
    }
    let mut made: Vec<(&Shape, Vec<u8>)> = vec![];
    for shape in tensors.values() {
        let (kind, dims, count) = shape;
        if !made.iter().any(|(known, _)| *known == shape) {
            made.push((shape, stored(*kind, dims, (*count).max(1), group(dims[dims.len() - 1]))?));
        }
    }
    let mut ternary = 0;
    let entry = |(name, shape): (&String, &Shape)| {
        let (kind, dims, count) = shape;
        let bytes = made.iter().find(|(known, _)| *known == shape).map_or(&[][..], |m| &m.1);
        if *kind != ParamKind::Ternary {
            return (name.clone(), Encoding::F32, dims.clone(), bytes);
        }
        ternary += bytes.len() as u64;
        let encoding = Encoding::Ternary { group: group(dims[dims.len() - 1]), scales: ScaleEncoding::F32 };
        let dims = if *count > 0 { [&[*count], &dims[..]].concat() } else { dims.clone() };
        (name.clone(), encoding, dims, bytes)
    };
    let parts: Vec<_> = tensors.iter().map(entry).collect();
    let entries: Vec<Entry<'_>> = parts.iter().map(|(n, e, dims, bytes)| Entry::stored(n, *e, dims, *bytes)).collect();
    let metadata = BTreeMap::from([("config".to_owned(), model.to_json().to_string())]);
    b158::write(path, &entries, &metadata)?;
    Ok(ternary)
}

/// A first token, and the seconds until the model was ready and until the token was there.
struct Start {
    token: u32,
    ready: f64,
    first: f64,
}

/// From a file with weights to a first token, as `chimera-run generate` goes.
fn start(path: &Path, setup: &Setup) -> Result<Start> {
    let start = Instant::now();
    let file = WeightFile::open(path)?;
    let text = file.metadata().get("config").context("the file was written with a configuration")?;
    let model = from_text("weights", text, &Overrides::default())?.model;
    let packed: HashSet<String> = file.packed().into_iter().map(|t| t.name.to_owned()).collect();
    let entries = vec![spec(EntryKind::Prefill, CHUNK), spec(EntryKind::Decode, 1)];
    let options = Options { target: setup.target.to_string(), entries, packed, ..Options::default() };
    let plan = compile(&model, &options)?;
    let mut exe = Executable::new(plan, &setup.options(setup.threads))?;
    let unread = file.assign(&mut exe, false)?;
    ensure!(unread.is_empty(), "the model does not read {unread:?}");
    exe.prepare()?;
    let ready = start.elapsed().as_secs_f64();
    let vocab = Vocab::bytes();
    // One token, so that it is the start that counts and not the length of the prompt.
    let prompt = vocab.encode("O");
    let mut generator = Generator::new(&mut exe, &vocab)?;
    generator.feed(&prompt)?;
    let (mut token, settings) = (None, Settings { max_tokens: 1, ..Settings::default() });
    generator.generate(&settings, &mut |id| {
        token = Some(id);
        ControlFlow::Break(())
    })?;
    let first = start.elapsed().as_secs_f64();
    // A model of made-up weights may end its text at once.
    Ok(Start { token: token.unwrap_or(u32::MAX), ready, first })
}

/// The first token with the file on the disk only, then with the file in memory.
fn first_token(setup: &Setup, folder: &Path, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    let overrides = Overrides { vocab_size: Some(BYTE_VOCABULARY), ..Overrides::default() };
    let model = preset(Scale::Full, &overrides)?.model;
    let path = folder.join("full.b158");
    progress("write weights");
    let ternary = write(&model, &path)?;
    fadvise(File::open(&path)?, 0, None, Advice::DontNeed)?;
    progress("first token");
    let cold = start(&path, setup)?;
    let warm = start(&path, setup)?;
    ensure!(cold.token == warm.token, "the first token is {} and then {}", cold.token, warm.token);
    let row = |id: &str, value, unit| Row::plain(id, value, unit, setup.threads);
    Ok(vec![
        row("cold_ready.full", cold.ready, "s"),
        row("cold_start.full", cold.first, "s"),
        row("warm_ready.full", warm.ready, "s"),
        row("warm_start.full", warm.first, "s"),
        row("packed.full", ternary as f64 / MIB, "MiB"),
    ])
}

/// Measure the starts of the largest model.
///
/// # Errors
/// When the model cannot be compiled, its file cannot be written, or two starts give different tokens.
pub fn run(setup: &Setup, quick: bool, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    // Beside the program, because the folder of temporary files may be in memory.
    let program = std::env::current_exe().context("cannot find out where this program is")?;
    let beside = program.parent().context("this program is in a folder")?;
    let folder = tempfile::tempdir_in(beside).context("cannot make a folder beside this program")?;
    progress("machine code");
    let mut rows = code(setup, if quick { 5 } else { 15 }, folder.path())?;
    rows.extend(first_token(setup, folder.path(), progress)?);
    Ok(rows)
}
