//! Single operations, each as the one kernel that the compiler would make of it.
//!
//! Every kernel is checked before it is timed, against the interpreter where that ends within the limit.

use anyhow::{Context, Result};
use chimera_ir::ops::{
    CrossEntropy, Distribution, GatedDelta, Linear, Mlstm, NormKind, NormQuantise, PANEL, Random, TernaryProduct,
    TitansMemory, blocked_type, packed_type,
};
use chimera_ir::{DType, Op, Type};

use crate::gemv;
use crate::measure::{Case, Effort, Setup, measure};
use crate::peaks::{self, FMA, TERNARY};
use crate::peers;
use crate::row::Row;
use crate::subject::{Subject, check};

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

/// A row for a ternary product.
fn ternary(name: &str, [m, n, k]: [usize; 3], peer: Option<String>) -> Spec {
    let (op, types) = product([m, n, k]);
    (format!("{name}.{m}x{n}x{k}"), Count::Ternary, peer, op.into(), types)
}

/// `C[M, N] = A[M, K] W[N, K]` with ternary weights, and its operands.
pub fn product([m, n, k]: [usize; 3]) -> (TernaryProduct, Vec<Type>) {
    let op = TernaryProduct { m: n, group: 128, block: 64, n_weights: 1, grouped_rows: false };
    let types = vec![
        Type::new(DType::I8, &[m, k]),
        Type::f32(&[m, k / 64]),
        packed_type(&Type::f32(&[n, k])),
        blocked_type(&Type::f32(&[n, k / 128])),
    ];
    (op, types)
}

/// The same with float weights.
fn linear([m, n, k]: [usize; 3]) -> Spec {
    let types = vec![Type::f32(&[m, k]), Type::f32(&[n.div_ceil(PANEL), k, PANEL])];
    (format!("linear.{m}x{n}x{k}"), Count::Mac, None, Linear { m: n, grouped_rows: false }.into(), types)
}

/// Rows of products, and their widths in both directions.
const ROWS: [usize; 2] = [252, 66];
const WIDTHS: [usize; 5] = [256, 512, 1024, 2560, 6912];
const VECTORS: [[usize; 3]; 4] = [[1, 256, 256], [1, 512, 512], [1, 1024, 1024], [1, 2560, 2560]];
/// Products that are measured with float weights too.
const FLOATS: [[usize; 3]; 5] = [[66, 256, 256], [252, 256, 256], [252, 512, 512], [1, 256, 256], [1, 512, 512]];

/// Products of many rows.
fn products() -> impl Iterator<Item = [usize; 3]> {
    let widths = || WIDTHS.into_iter().flat_map(|n| WIDTHS.map(|k| [n, k]));
    ROWS.into_iter().flat_map(move |m| widths().map(move |[n, k]| [m, n, k]))
}

/// Whether the peer multiplies floats of these extents too.
fn has_peer(quick: bool, [m, n, k]: [usize; 3]) -> bool {
    !quick || (m == ROWS[0] && n == k)
}

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

fn specs(quick: bool) -> Vec<Spec> {
    let peer = |s| has_peer(quick, s).then(|| peers::id(s));
    let mut specs: Vec<Spec> = products().map(|s| ternary("gemm", s, peer(s))).collect();
    let float = |[m, n, k]: [usize; 3]| FLOATS.contains(&[m, n, k]).then(|| format!("linear.{m}x{n}x{k}"));
    specs.extend(VECTORS.iter().map(|&s| ternary("gemv", s, float(s))));
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
        let op = Random { dist, shape: vec![1 << 20], members: 0, dtype: DType::F32 };
        let types = [2, 1, 1, 1].map(|n| Type::i32(&[n])).to_vec();
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
    for (id, count, peer, op, types) in specs(quick) {
        progress(&format!("check {id}"));
        let (op, subject) = Subject::of(op, &types, setup)?;
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
            Count::Ternary => ("GMAC/s", Some((TERNARY, 1.0))),
            Count::Mac => ("GMAC/s", Some((FMA, 2.0))),
            Count::Flop => ("GFLOP/s", Some((FMA, 1.0))),
            Count::Elements => ("Gelement/s", None),
        };
        let case = subject.case(id, unit, work, exe);
        let floor = floor.map(|(peak, scale)| (peak, scale * case.work)).into_iter().collect();
        cases.push(Case { floor, peer, ..case });
    }
    progress(gemv::ID);
    cases.push(gemv::case(setup).context(gemv::ID)?);
    for shape in products().filter(|&s| has_peer(quick, s)) {
        progress(&peers::id(shape));
        cases.push(peers::case(shape, setup)?);
    }
    let effort = Effort { rounds: if quick { 9 } else { 21 }, burst: peaks::BURST };
    measure(&mut cases, effort, setup, progress)
}
