//! Execution in steady state: allocates nothing (law 8), and gives the same bits with any number of threads (law 9).
//!
//! One test in one process, so that the counting allocator sees nobody else's work.

use chimera_codegen::Allowed;
use chimera_ir::loops::{Builder, Expr, Kernel, Role, Ty};
use chimera_ir::plan::{
    BufferDecl, BufferId, Entry, Group, KernelId, Place, Plan, StateDecl, Step, WeightDecl, WeightKind,
};
use chimera_ir::{DType, Tensor, Type};
use chimera_runtime::exec::{ExecOptions, Executable};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts every allocation of the process.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROWS: usize = 37;
const COLS: usize = 67;

/// `y[row] = x[row] * softened norm of (x w)`, a reduction, scratch memory and lanes in every instance.
fn mix() -> Kernel {
    let mut b = Builder::new("mix");
    let x = b.buf("x", DType::F32, ROWS * COLS, Role::In);
    let w = b.buf("w", DType::F32, COLS, Role::In);
    let y = b.buf("y", DType::F32, ROWS * COLS, Role::Out);
    let t = b.scratch("t", DType::F32, COLS);
    let row = b.grid(ROWS);
    b.lanes(0, COLS, 2, |b, i| b.store(t, &i, Expr::load(x, &row * COLS + &i) * Expr::load(w, &i)));
    let norm = b.sum(0, COLS, |_, i| Expr::load(t, &i) * Expr::load(t, &i));
    let scale = b.bind((norm + 1.0).sqrt());
    b.lanes(0, COLS, 2, |b, i| b.store(y, &row * COLS + &i, Expr::load(t, &i) / &scale));
    b.finish()
}

/// `s = s + y` over everything.
fn accumulate() -> Kernel {
    let mut b = Builder::new("accumulate");
    let y = b.buf("y", DType::F32, ROWS * COLS, Role::In);
    let s = b.buf("s", DType::F32, ROWS * COLS, Role::InOut);
    let row = b.grid(ROWS);
    b.lanes(0, COLS, 1, |b, i| {
        let at = &row * COLS + &i;
        b.store(s, &at, Expr::load(s, &at) + Expr::load(y, &at));
    });
    b.finish()
}

/// `w2 = w + w`.
fn double() -> Kernel {
    let mut b = Builder::new("double");
    let w = b.buf("w", DType::F32, COLS, Role::In);
    let w2 = b.buf("w2", DType::F32, COLS, Role::Out);
    b.grid(1);
    b.lanes(0, COLS, 1, |b, i| b.store(w2, &i, Expr::load(w, &i) + Expr::load(w, &i)));
    b.finish()
}

/// `flag = counter < 2`.
fn less() -> Kernel {
    let mut b = Builder::new("less");
    let counter = b.buf("counter", DType::I32, 1, Role::In);
    let limit = b.buf("limit", DType::I32, 1, Role::In);
    let flag = b.buf("flag", DType::I32, 1, Role::Out);
    b.store(flag, 0, Expr::load(counter, 0).lt(Expr::load(limit, 0)).cast(Ty::I32));
    b.finish()
}

/// A prepared weight, a loop with a state for every iteration, a copy and a constant.
fn plan() -> Plan {
    let (m, v, i) = (Type::f32(&[ROWS, COLS]), Type::f32(&[COLS]), Type::i32(&[1]));
    let matrix = m.bytes().next_multiple_of(64) as u64;
    let vector = v.bytes().next_multiple_of(64) as u64;
    let places = [
        ("x", &m, Place::Arena(0)),
        ("y", &m, Place::Arena(matrix)),
        ("w", &v, Place::Weight(0)),
        ("w2", &v, Place::Persistent(0)),
        ("s", &m, Place::State(0)),
        ("counter", &i, Place::Arena(2 * matrix)),
        ("again", &i, Place::Arena(2 * matrix + 64)),
        ("limit", &i, Place::Persistent(vector)),
    ];
    let buffers = places.map(|(name, ty, place)| BufferDecl { ty: ty.clone(), place, name: name.into() });
    let id = |name: &str| BufferId(places.iter().position(|p| p.0 == name).expect("a buffer") as u32);
    let run = |kernel: u32, args: &[&str]| Step::Run {
        kernel: KernelId(kernel),
        args: args.iter().map(|a| id(a)).collect(),
        split: true,
        group: 0,
    };
    let entry = |name: &str, steps: Vec<Step>| Entry {
        name: name.into(),
        steps,
        groups: vec![Group::default()],
        arena: 2 * matrix + 128,
        ..Entry::default()
    };
    let mut step = entry(
        "step",
        vec![
            run(0, &["x", "w2", "y"]),
            Step::LoopBegin { max: 4, counter: id("counter") },
            run(1, &["y", "s"]),
            Step::Copy { from: id("s"), to: id("x") },
            run(0, &["x", "w2", "y"]),
            run(3, &["counter", "limit", "again"]),
            Step::LoopEnd { again: id("again") },
        ],
    );
    step.inputs = vec![("x".into(), id("x"))];
    step.outputs = vec![("y".into(), id("y"))];
    Plan {
        weights: vec![WeightDecl { name: "w".into(), ty: v.clone(), kind: WeightKind::Vector }],
        states: vec![StateDecl { name: "s".into(), ty: m.clone(), copies: 4 }],
        buffers: buffers.to_vec(),
        constants: vec![(id("limit"), Tensor::i32(&[1], vec![2]))],
        persistent: vector + 64,
        kernels: vec![mix(), accumulate(), double(), less()],
        entries: vec![entry("prepare", vec![run(2, &["w", "w2"])]), step],
        ..Plan::default()
    }
}

/// The bits of two steps, the second of which must not allocate.
fn two_steps(threads: usize, emitters: &str, counted: bool, traced: bool) -> Vec<u8> {
    let emitters = Allowed::parse(emitters).expect("a known emitter");
    let options = ExecOptions { threads, emitters, ..ExecOptions::default() };
    let mut e = Executable::new(plan(), &options).expect("the plan is sound");
    let values = |n: usize| (0..n).map(|i| ((i * 7919) % 1009) as f32 / 251.0 - 2.0).collect::<Vec<_>>();
    let (w, x) = (values(COLS), values(ROWS * COLS));
    e.set_weight("w", &[COLS], &w).expect("a weight");
    let step = e.entry("step").expect("an entry point");
    e.set_input(step, "x", &x).expect("an input");
    if traced {
        // The second step does not fit.
        e.start_trace(40);
    }
    e.run(step).expect("the first step");
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    // A weight in place, an input, `prepare` and the entry point itself: nothing of it is new.
    e.set_weight("w", &[COLS], &w).expect("a weight");
    e.set_input(step, "x", &x).expect("an input");
    e.run("step").expect("the second step");
    let during = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(e.end_trace().is_some(), traced);
    if counted {
        assert_eq!(during, 0, "{threads} threads");
    }
    let y = e.output::<f32>(step, "y").expect("an output");
    let mut bits: Vec<u8> = y.iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect();
    for copy in 0..4 {
        bits.extend(e.state("s", copy).expect("a copy"));
    }
    bits
}

#[test]
fn steady_state_allocates_nothing_and_threads_do_not_show() {
    let one = two_steps(1, "portable", true, false);
    assert!(one.iter().any(|&b| b != 0));
    for threads in [2, 3] {
        assert!(two_steps(threads, "portable", true, false) == one, "{threads} threads give other bits");
    }
    assert!(two_steps(2, "portable", true, true) == one, "a trace gives other bits");
    assert!(two_steps(2, "interp", false, false) == one, "the interpreter gives other bits");
}
