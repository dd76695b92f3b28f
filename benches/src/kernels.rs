//! Single operations, each as the one kernel that the compiler would make of it.
//!
//! Before it is timed, every kernel has given the same bits with one thread and with several, and the bits of the interpreter in one
//! instance of its grid where that ends within the limit.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use chimera_ir::loops::{Kernel, Tensors, interpret};
use chimera_ir::lower::Cluster;
use chimera_ir::ops::{
    CrossEntropy, Distribution, GatedDelta, Linear, Mlstm, NormKind, NormQuantise, PANEL, Random, TernaryProduct,
    TitansMemory, packed_type,
};
use chimera_ir::{DType, Data, Op, Tensor, Type};
use chimera_runtime::exec::{ExecOptions, Executable};

use crate::measure::{Case, Effort, Setup, measure};
use crate::peaks::{self, DOT4, FMA};
use crate::row::Row;
use crate::single::{PlanBuilder, Shared, output, set_weight};

/// Runs of a kernel in one call of the executor, so that the call is not what is measured.
const TIMES: usize = 16;
/// Work in units of 1e9 from which one run is enough.
const LONG: f64 = 0.02;

/// A kernel with operands; the buffers are the operands, then the results.
#[derive(Debug)]
pub struct Subject {
    /// The kernel.
    pub kernel: Kernel,
    /// Values of the read-only buffers.
    pub ins: Vec<Tensor>,
    /// Types of the written buffers.
    pub outs: Vec<Type>,
}

impl Subject {
    fn of(op: impl Into<Op>, types: &[Type]) -> Result<(Op, Subject)> {
        let op = op.into();
        let cluster = Cluster::single(op.clone(), types)?;
        let mut random = sequence(1);
        let ins = types.iter().enumerate().map(|(k, ty)| op.sample_input(k, ty, &mut random)).collect();
        let outs = cluster.nodes[cluster.anchor].outs.clone();
        Ok((op, Subject { kernel: cluster.lower(), ins, outs }))
    }

    /// Entry points `once` and `many` ([`TIMES`]).
    fn executable(&self, options: &ExecOptions) -> Result<Executable> {
        let mut plan = PlanBuilder::default();
        let mut args: Vec<_> =
            self.ins.iter().enumerate().map(|(i, t)| plan.weight(&format!("in{i}"), &t.ty)).collect();
        let outs: Vec<_> = (self.outs.iter().enumerate())
            .map(|(i, ty)| (format!("out{i}"), plan.result(&format!("out{i}"), ty)))
            .collect();
        args.extend(outs.iter().map(|o| o.1));
        plan.entry("once", &self.kernel, &args, 1, &outs);
        plan.entry("many", &self.kernel, &args, TIMES, &outs);
        let mut exe = plan.executable(options)?;
        for (i, t) in self.ins.iter().enumerate() {
            set_weight(&mut exe, &format!("in{i}"), t)?;
        }
        Ok(exe)
    }

    fn results(&self, exe: &mut Executable, entry: &str) -> Result<Vec<Data>> {
        exe.run(entry)?;
        (0..self.outs.len()).map(|i| output(exe, entry, &format!("out{i}"))).collect()
    }

    /// The case of a checked kernel; `work` is that of one run.
    pub fn case(self, id: String, unit: &'static str, work: f64, exe: Shared) -> Case {
        let (entry, times) = if work < LONG { ("many", TIMES) } else { ("once", 1) };
        let run = move || Ok(exe.borrow_mut().run(entry)?);
        let work = work * times as f64;
        Case { id, unit, work, floor: vec![], peer: None, start: Box::new(|| Ok(())), run: Box::new(run) }
    }
}

/// A fixed sequence of numbers in (-1, 1).
fn sequence(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        2.0 * ((state >> 40) as f32 / (1u64 << 24) as f32) - 1.0
    }
}

/// Contents that no kernel leaves.
fn unwritten(ty: &Type) -> Data {
    let n = ty.numel();
    match ty.dtype {
        DType::F32 => Data::F32(vec![f32::from_bits(0x7fe1_2345); n]),
        DType::I32 => Data::I32(vec![i32::MIN; n]),
        DType::I8 => Data::I8(vec![i8::MIN; n]),
        dtype => Data::zeros(dtype, n),
    }
}

/// Elements as bits.
fn bits(data: &Data) -> Vec<i64> {
    match data {
        Data::F32(v) => v.iter().map(|x| i64::from(x.to_bits())).collect(),
        Data::F64(v) => v.iter().map(|x| x.to_bits() as i64).collect(),
        Data::BF16(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I8(v) => v.iter().map(|&x| x.into()).collect(),
        Data::U8(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I16(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I32(v) => v.iter().map(|&x| x.into()).collect(),
    }
}

/// Run a kernel on `threads` threads and compare with another number of threads, and the last instance of its grid with the
/// interpreter if asked to; returns the executable.
///
/// # Errors
/// When it cannot be run, or a result is not what it should be.
pub fn check(subject: &Subject, setup: &Setup, interpreted: bool) -> Result<Shared> {
    let (threads, other) = (setup.threads, setup.other());
    let mut exe = subject.executable(&setup.options(threads))?;
    let served: Vec<&str> = exe.module().kernels.iter().map(|k| k.emitter).filter(|&e| e == "interp").collect();
    ensure!(served.is_empty(), "no emitter of machine code serves the kernel");
    let got = subject.results(&mut exe, "once")?;
    let again = subject.results(&mut subject.executable(&setup.options(other))?, "once")?;
    for (i, (a, b)) in got.iter().zip(&again).enumerate() {
        ensure!(bits(a) == bits(b), "result {i} differs between {threads} and {other} threads");
    }
    if interpreted {
        let kernel = &subject.kernel;
        let mut args: Vec<Data> = subject.ins.iter().map(|t| t.data.clone()).collect();
        args.extend(subject.outs.iter().map(unwritten));
        let grid = kernel.grid as i64;
        interpret(kernel, &mut Tensors::new(kernel, &mut args), grid - 1, grid);
        let mut written = 0;
        for (i, got) in got.iter().enumerate() {
            let (want, before) = (bits(&args[subject.ins.len() + i]), bits(&unwritten(&subject.outs[i])));
            for (at, (got, want)) in bits(got).into_iter().zip(want).enumerate() {
                if want != before[at] {
                    written += 1;
                    ensure!(got == want, "result {i} differs from the interpreter at element {at}");
                }
            }
        }
        ensure!(written > 0, "the interpreter wrote nothing");
    }
    Ok(Rc::new(RefCell::new(exe)))
}

/// What a row counts.
#[derive(Clone, Copy, Debug)]
enum Count {
    /// Ternary multiply-accumulates.
    Ternary,
    /// Float multiply-accumulates.
    Mac,
    /// Float operations.
    Flop,
    /// Elements of the first result.
    Elements,
}

/// One row: identifier, count, the row it is compared with, operation and operand types.
type Spec = (String, Count, Option<String>, Op, Vec<Type>);

/// `C[M, N] = A[M, K] W[N, K]` with ternary weights.
fn ternary(name: &str, [m, n, k]: [usize; 3]) -> Spec {
    let op = TernaryProduct { m: n, group: 128, block: 64, n_weights: 1, grouped_rows: false };
    let types = vec![
        Type::new(DType::I8, &[m, k]),
        Type::f32(&[m, k / 64]),
        packed_type(&Type::f32(&[n, k])),
        Type::f32(&[n, k / 128]),
    ];
    let peer = FLOATS.contains(&[m, n, k]).then(|| format!("linear.{m}x{n}x{k}"));
    (format!("{name}.{m}x{n}x{k}"), Count::Ternary, peer, op.into(), types)
}

/// The same with float weights.
fn linear([m, n, k]: [usize; 3]) -> Spec {
    let types = vec![Type::f32(&[m, k]), Type::f32(&[n.div_ceil(PANEL), k, PANEL])];
    (format!("linear.{m}x{n}x{k}"), Count::Mac, None, Linear { m: n, grouped_rows: false }.into(), types)
}

const PRODUCTS: [[usize; 3]; 6] =
    [[66, 256, 256], [252, 256, 256], [252, 768, 256], [252, 512, 512], [252, 1024, 1024], [252, 2560, 2560]];
const VECTORS: [[usize; 3]; 4] = [[1, 256, 256], [1, 512, 512], [1, 1024, 1024], [1, 2560, 2560]];
/// Products that are measured with float weights too.
const FLOATS: [[usize; 3]; 5] = [[66, 256, 256], [252, 256, 256], [252, 512, 512], [1, 256, 256], [1, 512, 512]];

/// Operands of a recurrence: `n` of `[rows, tokens, heads * width]`, `gates` of `[rows, tokens, heads]`, positions.
fn sequences(n: usize, gates: usize, [rows, tokens, heads, width]: [usize; 4]) -> Vec<Type> {
    let mut types = vec![Type::f32(&[rows, tokens, heads * width]); n];
    types.extend(vec![Type::f32(&[rows, tokens, heads]); gates]);
    types.push(Type::i32(&[rows, tokens]));
    types
}

fn recurrences(shape: [usize; 4]) -> [Spec; 3] {
    let [rows, tokens, heads, width] = shape;
    let size = format!("{rows}x{tokens}x{heads}x{width}");
    let chunk = if tokens == 1 { 0 } else { 64 };
    let mut titans = sequences(3, 3, shape);
    titans.extend(vec![Type::f32(&[heads, width, width]); 2]);
    let memory = TitansMemory { heads, inner: 16, normalise: true, chunked: tokens > 1, carry: false };
    [
        (
            format!("gd.{size}"),
            Count::Flop,
            None,
            GatedDelta { heads, chunk, carry: false }.into(),
            sequences(3, 2, shape),
        ),
        (
            format!("mlstm.{size}"),
            Count::Flop,
            None,
            Mlstm { heads, chunk, carry: false }.into(),
            sequences(3, 2, shape),
        ),
        (format!("titans.{size}"), Count::Flop, None, memory.into(), titans),
    ]
}

fn specs() -> Vec<Spec> {
    let mut specs: Vec<Spec> = PRODUCTS.iter().map(|&s| ternary("gemm", s)).collect();
    specs.extend(VECTORS.iter().map(|&s| ternary("gemv", s)));
    specs.extend(FLOATS.iter().map(|&s| linear(s)));
    specs.extend(recurrences([8, 128, 4, 32]));
    specs.extend(recurrences([2, 128, 4, 64]));
    specs.extend(recurrences([1, 1, 4, 64]));
    for (tokens, n, vocab) in [(1024, 128, 8192), (256, 256, 8192)] {
        let types = vec![
            Type::f32(&[tokens / 128, 128, n]),
            Type::f32(&[vocab / PANEL, n, PANEL]),
            Type::i32(&[tokens / 128, 128]),
        ];
        let op = CrossEntropy { vocab };
        specs.push((format!("cross_entropy.{tokens}x{vocab}x{n}"), Count::Flop, None, op.into(), types));
    }
    for [rows, n] in [[252, 256], [252, 2560], [1, 2560]] {
        let op = NormQuantise { kind: NormKind::Rms, eps: 1e-6, block: 64 };
        let types = vec![Type::f32(&[rows, n]), Type::f32(&[n])];
        specs.push((format!("norm_quantise.{rows}x{n}"), Count::Elements, None, op.into(), types));
    }
    for (name, dist) in [("gaussian", Distribution::Gaussian), ("rademacher", Distribution::Rademacher)] {
        let op = Random { dist, stream: "bench".to_owned(), shape: vec![1 << 20], members: 0, dtype: DType::F32 };
        let types = vec![Type::i32(&[2]), Type::i32(&[1]), Type::i32(&[1])];
        specs.push((format!("random.{name}"), Count::Elements, None, op.into(), types));
    }
    specs
}

/// Operations of one grid instance that the interpreter checks.
const QUICK_LIMIT: u64 = 3_000_000;
const FULL_LIMIT: u64 = 100_000_000;

/// Measure peaks and kernels.
///
/// # Errors
/// When a kernel cannot be run or gives a wrong answer.
pub fn run(setup: &Setup, quick: bool, progress: &mut dyn FnMut(&str)) -> Result<Vec<Row>> {
    progress("peaks");
    let mut cases = peaks::cases(setup)?;
    let limit = if quick { QUICK_LIMIT } else { FULL_LIMIT };
    for (id, count, peer, op, types) in specs() {
        progress(&format!("check {id}"));
        let (op, subject) = Subject::of(op, &types)?;
        let flops = op.flops(&types, &subject.outs);
        let amount = match count {
            Count::Ternary => flops.ternary,
            Count::Mac => flops.float / 2,
            Count::Flop => flops.float,
            Count::Elements => subject.outs[0].numel() as u64,
        };
        let work = amount as f64 * 1e-9;
        let each = (flops.ternary + flops.float) / subject.kernel.grid as u64;
        let exe = check(&subject, setup, each <= limit).with_context(|| id.clone())?;
        let (unit, floor) = match count {
            Count::Ternary => ("GMAC/s", Some((DOT4, 1.0))),
            Count::Mac => ("GMAC/s", Some((FMA, 2.0))),
            Count::Flop => ("GFLOP/s", Some((FMA, 1.0))),
            Count::Elements => ("Gelement/s", None),
        };
        let case = subject.case(id, unit, work, exe);
        let floor = floor.map(|(peak, scale)| (peak, scale * case.work)).into_iter().collect();
        cases.push(Case { floor, peer, ..case });
    }
    let effort = Effort { rounds: if quick { 5 } else { 15 }, burst: peaks::BURST };
    measure(&mut cases, effort, setup, progress)
}
