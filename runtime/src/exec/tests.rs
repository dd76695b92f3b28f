//! Execution of plans made by hand, on every emitter and with one and several threads.

use super::*;
use crate::files::MappedSlice;
use chimera_ir::loops::{Builder, Expr, Kernel, Role, Ty};
use chimera_ir::plan::{BufferDecl, BufferId, Entry, Group, KernelId, Place, StateDecl, Step, WeightDecl};
use chimera_ir::{DType, Tensor, Type};

const N: usize = 40;

/// `z = x + y`, where `z` may be `y` when `in_place`.
fn add(in_place: bool) -> Kernel {
    let mut b = Builder::new("add");
    let x = b.buf("x", DType::F32, N, Role::In);
    let y = b.buf("y", DType::F32, N, if in_place { Role::InOut } else { Role::In });
    let z = if in_place { y } else { b.buf("z", DType::F32, N, Role::Out) };
    let t = b.scratch("t", DType::F32, 8);
    let block = b.grid(N / 8);
    b.lanes(0, 8, 1, |b, i| {
        let at = &block * 8 + &i;
        b.store(t, &i, Expr::load(x, &at) + Expr::load(y, &at));
    });
    b.lanes(0, 8, 1, |b, i| b.store(z, &block * 8 + &i, Expr::load(t, &i)));
    b.finish()
}

/// `flag = counter < limit`.
fn less() -> Kernel {
    let mut b = Builder::new("less");
    let counter = b.buf("counter", DType::I32, 1, Role::In);
    let limit = b.buf("limit", DType::I32, 1, Role::In);
    let flag = b.buf("flag", DType::I32, 1, Role::Out);
    b.store(flag, 0, Expr::load(counter, 0).lt(Expr::load(limit, 0)).cast(Ty::I32));
    b.finish()
}

const X: BufferId = BufferId(0);
const H: BufferId = BufferId(1);
const W: BufferId = BufferId(2);
const DERIVED: BufferId = BufferId(3);
const ONE: BufferId = BufferId(4);
const S: BufferId = BufferId(5);
const COUNTER: BufferId = BufferId(6);
const LIMIT: BufferId = BufferId(7);
const AGAIN: BufferId = BufferId(8);
const M: BufferId = BufferId(9);

fn run(kernel: u32, args: &[BufferId]) -> Step {
    Step::Run { kernel: KernelId(kernel), args: args.to_vec(), split: true, group: 0 }
}

fn entry(name: &str, inputs: &[(&str, BufferId)], outputs: &[(&str, BufferId)], steps: &[Step]) -> Entry {
    let ports = |p: &[(&str, BufferId)]| p.iter().map(|(n, b)| ((*n).to_owned(), *b)).collect();
    Entry {
        name: name.into(),
        inputs: ports(inputs),
        outputs: ports(outputs),
        steps: steps.to_vec(),
        groups: vec![Group::default()],
        arena: 1024,
        ..Entry::default()
    }
}

/// `prepare`: derived = w + w. `forward`: h = x + derived. `update`: w += x, m += x.
/// `loop`: h = x, then for at most 3 iterations, while counter < limit: s[iteration] += h, h += one.
fn plan() -> Plan {
    let (v, i) = (Type::f32(&[N]), Type::i32(&[1]));
    let buffer = |ty: &Type, place| BufferDecl { ty: ty.clone(), place, name: String::new() };
    let weight = |name: &str, kind| WeightDecl { name: name.into(), ty: v.clone(), kind };
    Plan {
        weights: vec![weight("w", WeightKind::Ternary), weight("m", WeightKind::Optimizer)],
        states: vec![StateDecl { name: "s".into(), ty: v.clone(), copies: 3 }],
        buffers: vec![
            buffer(&v, Place::Arena(0)),
            buffer(&v, Place::Arena(256)),
            buffer(&v, Place::Weight(0)),
            buffer(&v, Place::Persistent(0)),
            buffer(&v, Place::Persistent(256)),
            buffer(&v, Place::State(0)),
            buffer(&i, Place::Arena(512)),
            buffer(&i, Place::Arena(576)),
            buffer(&i, Place::Arena(640)),
            buffer(&v, Place::Weight(1)),
        ],
        constants: vec![(ONE, Tensor::f32(&[N], vec![1.0; N]))],
        persistent: 512,
        kernels: vec![add(false), add(true), less()],
        entries: vec![
            entry("forward", &[("x", X)], &[("h", H)], &[run(0, &[X, DERIVED, H])]),
            entry("update", &[("x", X)], &[], &[run(1, &[X, W]), run(1, &[X, M])]),
            entry(PREPARE, &[], &[("derived", DERIVED)], &[run(0, &[W, W, DERIVED])]),
            entry(
                "loop",
                &[("x", X), ("limit", LIMIT)],
                &[("h", H), ("counter", COUNTER)],
                &[
                    Step::Copy { from: X, to: H },
                    Step::LoopBegin { max: 3, counter: COUNTER },
                    run(1, &[H, S]),
                    run(1, &[ONE, H]),
                    run(2, &[COUNTER, LIMIT, AGAIN]),
                    Step::LoopEnd { again: AGAIN },
                ],
            ),
        ],
        ..Plan::default()
    }
}

fn options(threads: usize, emitters: &str) -> ExecOptions {
    ExecOptions { threads, emitters: Allowed::parse(emitters).expect("known emitters"), ..ExecOptions::default() }
}

/// Every emitter with 1, 2 and 3 threads.
fn each(f: impl Fn(&mut Executable)) {
    for emitters in ["portable", "interp"] {
        for threads in [1, 2, 3] {
            f(&mut Executable::new(plan(), &options(threads, emitters)).expect("the plan is sound"));
        }
    }
}

fn ramp(scale: f32) -> Vec<f32> {
    (0..N).map(|i| i as f32 * scale).collect()
}

fn state(e: &Executable, copy: usize) -> Vec<f32> {
    let bytes = e.state("s", copy).expect("the copy exists").chunks_exact(4);
    bytes.map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[test]
fn derived_memory_follows_the_weights() {
    each(|e| {
        let (forward, update) = (e.entry("forward").unwrap(), e.entry("update").unwrap());
        e.set_input(forward, "x", &ramp(1.0)).unwrap();
        e.set_weight("w", &[N], &ramp(2.0)).unwrap();
        e.run("forward").unwrap();
        assert_eq!(e.output::<f32>(forward, "h").unwrap(), ramp(5.0));
        // Another weight: the input of this call was set before `prepare` runs, and keeps its value.
        e.set_weight("w", &[N], &ramp(4.0)).unwrap();
        e.run(forward).unwrap();
        assert_eq!(e.output::<f32>(forward, "h").unwrap(), ramp(9.0));
        e.set_input(update, "x", &ramp(1.0)).unwrap();
        e.run(update).unwrap();
        e.run(update).unwrap();
        assert_eq!(e.weight::<f32>("w").unwrap(), ramp(6.0));
        assert_eq!(e.weight_f32("m").unwrap(), ramp(2.0));
        e.run(forward).unwrap();
        assert_eq!(e.output::<f32>(forward, "h").unwrap(), ramp(13.0));
        let derived = e.entry(PREPARE).unwrap();
        assert_eq!(e.output::<f32>(derived, "derived").unwrap(), ramp(12.0), "persistent outputs stay");
    });
}

#[test]
fn prepare_runs_only_when_needed() {
    let mut e = Executable::new(plan(), &options(1, "portable")).unwrap();
    let (forward, looped) = (e.entry("forward").unwrap(), e.entry("loop").unwrap());
    e.set_weight("w", &[N], &ramp(1.0)).unwrap();
    for id in [forward, looped] {
        e.set_input(id, "x", &ramp(0.0)).unwrap();
    }
    e.set_input(looped, "limit", &[0i32]).unwrap();
    e.run(looped).unwrap();
    assert!(e.stale, "the loop does not read what prepare derives");
    e.run(forward).unwrap();
    assert!(!e.stale);
    // Were `prepare` run again, it would repair this.
    e.memory.persistent.slice_mut::<f32>(0, N).fill(7.0);
    e.set_weight("m", &[N], &ramp(1.0)).unwrap();
    e.run(forward).unwrap();
    assert_eq!(e.output::<f32>(forward, "h").unwrap(), [7.0; N]);
    e.set_weight("w", &[N], &ramp(1.0)).unwrap();
    e.prepare().unwrap();
    assert!(!e.stale);
}

#[test]
fn loops_have_a_state_for_every_iteration() {
    for (limit, iterations) in [(-1, 1), (0, 1), (1, 2), (2, 3), (9, 3)] {
        each(|e| {
            let id = e.entry("loop").unwrap();
            e.set_input(id, "x", &ramp(1.0)).unwrap();
            e.set_input(id, "limit", &[limit]).unwrap();
            e.run(id).unwrap();
            e.run(id).unwrap();
            let expected: Vec<f32> = ramp(1.0).iter().map(|x| x + iterations as f32).collect();
            assert_eq!(e.output::<f32>(id, "h").unwrap(), expected);
            assert_eq!(e.output::<i32>(id, "counter").unwrap(), [iterations - 1]);
            for copy in 0..3 {
                let on = if (copy as i32) < iterations { 2.0 } else { 0.0 };
                let expected: Vec<f32> = ramp(1.0).iter().map(|x| on * (x + copy as f32)).collect();
                assert_eq!(state(e, copy), expected, "limit {limit} copy {copy}");
            }
            e.set_state("s", 1, &[0; N * 4]).unwrap();
            assert_eq!(state(e, 1), [0.0; N]);
            e.reset_states();
            assert!((0..3).all(|copy| state(e, copy) == [0.0; N]));
        });
    }
}

#[test]
fn traces_name_every_executed_step() {
    let mut e = Executable::new(plan(), &options(2, "portable")).unwrap();
    let id = e.entry("loop").unwrap();
    e.set_input(id, "x", &ramp(1.0)).unwrap();
    e.set_input(id, "limit", &[1]).unwrap();
    let trace: Vec<_> = e.run_traced(id).unwrap().iter().map(|t| (t.step, t.iteration)).collect();
    assert_eq!(trace, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (2, 1), (3, 1), (4, 1), (5, 1)]);
}

/// The numbers of one event.
fn times(event: &serde_json::Value) -> (f64, f64, u64) {
    let number = |key: &str| event[key].as_f64().unwrap_or_else(|| panic!("{key} of {event}"));
    (number("ts"), number("ts") + number("dur"), event["tid"].as_u64().unwrap())
}

#[test]
fn traces_nest_in_their_calls_and_name_threads() {
    let mut e = Executable::new(plan(), &options(2, "portable")).unwrap();
    assert!(e.end_trace().is_none());
    e.set_weight("w", &[N], &ramp(1.0)).unwrap();
    e.set_input("forward", "x", &ramp(1.0)).unwrap();
    e.set_input("loop", "x", &ramp(1.0)).unwrap();
    e.set_input("loop", "limit", &[2]).unwrap();
    // Enough for `forward` with `prepare`, and one `loop`, whose most are 14.
    e.start_trace(16);
    for entry in ["forward", "loop", "loop", "forward"] {
        e.run(entry).unwrap();
    }
    let trace = e.end_trace().unwrap();
    assert_eq!(trace.calls(), (3, 2));
    let mut text = vec![];
    trace.write(e.plan(), &mut text).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let events = json["traceEvents"].as_array().unwrap();
    let of = |kind: &str| events.iter().filter(|e| e["cat"] == kind).collect::<Vec<_>>();
    let (calls, steps) = (of("call"), of("step"));
    assert_eq!(calls.iter().map(|c| c["name"].as_str().unwrap()).collect::<Vec<_>>(), ["prepare", "forward", "loop"]);
    assert!(calls.windows(2).all(|w| times(w[0]).1 <= times(w[1]).0), "calls follow one another");
    for step in &steps {
        let (begin, end, thread) = times(step);
        assert!(begin <= end && thread < 2, "{step}");
        let inside = |c: &&&serde_json::Value| times(c).0 <= begin && end <= times(c).1;
        let call = calls.iter().find(inside).unwrap_or_else(|| panic!("{step} is in no call"));
        assert_eq!(call["name"], step["args"]["entry"], "{step}");
    }
    // Grids of one instance are not split; who takes which part of a split one is a matter of time.
    let (adds, alone): (Vec<&serde_json::Value>, Vec<&serde_json::Value>) =
        steps.iter().copied().partition(|s| s["name"] == "add");
    assert!(alone.iter().all(|s| times(s).2 == 0));
    let names: Vec<_> = alone.iter().map(|s| s["name"].as_str().unwrap()).collect();
    let body = ["less", "loop end"];
    assert_eq!(names, [&["copy", "loop begin"], &body[..], &body[..], &body[..]].concat());
    let flops: u64 = adds.iter().map(|s| s["args"]["flops"].as_u64().unwrap()).sum();
    assert_eq!(flops, 8 * N as u64, "the parts of steps make the whole");
    let threads: Vec<_> = events.iter().filter(|e| e["name"] == "thread_name").map(|e| e["tid"].as_u64()).collect();
    assert_eq!(threads, [Some(0), Some(1)]);

    let table = trace.roofline(e.plan());
    let adds = table.kernels.iter().find(|k| k.entry == "loop" && k.kernel == "add").unwrap();
    assert_eq!((adds.runs, adds.work.flops), (12, (12 * N) as f64), "the table has all calls");
    assert!(table.to_string().contains(" add"), "{table}");
    e.run("forward").unwrap();
    assert!(e.end_trace().is_none());
}

#[test]
fn narrow_weights_take_floats() {
    let mut narrow = Plan { weights: plan().weights, ..Plan::default() };
    narrow.weights[0].ty = Type::new(DType::BF16, &[2, 2]);
    let mut e = Executable::new(narrow, &options(1, "interp")).unwrap();
    e.set_weight("w", &[2, 2], &[1.0f32, -0.5, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]).unwrap();
    assert_eq!(e.weight_f32("w").unwrap()[..], [1.0, -0.5, 1.0, 1.015625], "ties go to even");
    e.set_weight("w", &[2, 2], &[half::bf16::from_f32(3.0); 4]).unwrap();
    assert_eq!(e.weight_f32("w").unwrap()[..], [3.0; 4]);
    assert_eq!(e.missing_weights(), Vec::<&str>::new());
}

#[test]
fn mistakes_are_answered_with_names_and_shapes() {
    fn says<T>(result: Result<T, ExecError>, parts: &[&str]) {
        let Err(error) = result else { panic!("expected an error with {parts:?}") };
        let text = error.to_string();
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }
    let mut e = Executable::new(plan(), &options(1, "portable")).unwrap();
    let (forward, looped) = (e.entry("forward").unwrap(), e.entry("loop").unwrap());
    says(e.run("backward"), &["no entry point", "`backward`", "`forward`, `update`, `prepare`, `loop`"]);
    says(e.run("forward"), &["`prepare` reads 1 weights that were never set: `w`"]);
    says(e.run("update"), &["`update` reads 1 weights"]);
    assert_eq!(e.missing_weights(), ["w"]);
    says(e.set_weight("v", &[N], &ramp(1.0)), &["no weight is called `v`", "`w`, `m`"]);
    says(e.set_weight("w", &[N, 1], &ramp(1.0)), &["weight `w`: found f32[40, 1], expected f32[40]"]);
    says(e.set_weight("w", &[N], &[1i32; N]), &["found i32[40], expected f32[40]"]);
    says(e.set_weight("w", &[N], &[1.0f32]), &["found 1 elements, expected 40"]);
    says(e.weight::<i8>("w"), &["found 40 elements of i8"]);
    e.set_weight("w", &[N], &ramp(1.0)).unwrap();
    says(e.run("loop"), &["`loop` reads 2 inputs that were never set: `x`, `limit`"]);
    says(e.set_input(forward, "y", &[0f32]), &["no input is called `y`", "`x`"]);
    says(e.set_input(forward, "x", &[0f32; 3]), &["input `x`: found 3 elements of f32, expected f32[40]"]);
    says(e.set_input(forward, "x", &[0i32; N]), &["40 elements of i32"]);
    says(e.output::<f32>(forward, "h"), &["output `h` of entry point `forward` is not there"]);
    e.set_input(forward, "x", &ramp(1.0)).unwrap();
    e.run("forward").unwrap();
    says(e.output::<i32>(forward, "h"), &["40 elements of i32"]);
    says(e.output::<i32>(forward, "loss"), &["no output is called `loss`"]);
    e.set_input(looped, "x", &ramp(1.0)).unwrap();
    e.set_input(looped, "limit", &[1]).unwrap();
    e.run("loop").unwrap();
    says(e.output::<f32>(forward, "h"), &["is not there"]);
    says(e.state("t", 0), &["no state is called `t`", "`s`"]);
    says(e.state("s", 3), &["copy 3", "one of 3 copies"]);
    says(e.set_state("s", 0, &[0]), &["found 1 bytes, expected 160 bytes"]);
}

#[test]
fn unsound_plans_and_small_limits_are_refused() {
    let mut broken = plan();
    broken.buffers[0].place = Place::Arena(1 << 20);
    let error = Executable::new(broken, &options(1, "portable")).unwrap_err();
    assert_eq!((error.exit_code(), error.to_string().contains("buffers[0]")), (5, true), "{error}");
    let bytes = Executable::new(plan(), &options(2, "portable")).unwrap().bytes();
    let limited = |max_bytes| Executable::new(plan(), &ExecOptions { max_bytes, ..options(2, "portable") });
    assert_eq!(limited(bytes).unwrap().bytes(), bytes);
    let error = limited(bytes - 1).unwrap_err();
    assert_eq!(error.exit_code(), 4, "{error}");
    assert!(matches!(limited(1500).unwrap_err(), ExecError::Memory { needed: 512, allowed: Some(476), .. }));
    let mut huge = plan();
    huge.states[0] = StateDecl { name: "s".into(), ty: Type::f32(&[1 << 28]), copies: 1000 };
    let error = Executable::new(huge, &ExecOptions { max_bytes: 1 << 34, ..options(1, "portable") }).unwrap_err();
    assert!(matches!(error, ExecError::Memory { what: "the states", .. }), "{error}");
}

#[test]
fn a_table_is_as_long_as_computed() {
    let e = Executable::new(plan(), &options(1, "interp")).unwrap();
    assert_eq!(e.table.len() as u64, e.plan().addresses());
}

#[test]
fn an_executable_moves_between_threads() {
    fn moves<T: Send + Sync>(_: &T) {}
    let mut e = Executable::new(plan(), &options(2, "portable")).unwrap();
    moves(&e);
    let id = e.entry("update").unwrap();
    e.set_weight("w", &[N], &ramp(1.0)).unwrap();
    e.set_input(id, "x", &ramp(1.0)).unwrap();
    let e = std::thread::spawn(move || {
        e.run(id).unwrap();
        e
    });
    assert_eq!(e.join().unwrap().weight::<f32>("w").unwrap(), ramp(2.0));
}

/// [`plan`] without the entry point that writes weights.
fn frozen() -> Plan {
    let mut plan = plan();
    plan.entries.retain(|e| e.name != "update");
    plan
}

/// Floats in a mapped file, `skew` bytes behind a multiple of 64.
fn shared(values: &[f32], skew: usize) -> MappedSlice {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    let mut bytes = vec![0; 64 + skew];
    bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
    std::io::Write::write_all(&mut file, &bytes).expect("written");
    MappedSlice::open(file.path()).expect("mapped").part(64 + skew..bytes.len()).expect("inside")
}

#[test]
fn weights_that_nobody_writes_stay_where_they_are() {
    for (skew, in_place) in [(0, true), (4, false)] {
        let mut e = Executable::new(frozen(), &options(2, "portable")).unwrap();
        let id = e.entry("forward").unwrap();
        e.set_input(id, "x", &ramp(1.0)).unwrap();
        let without = e.bytes();
        let bytes = shared(&ramp(2.0), skew);
        assert_eq!(e.bind_weight("w", &Type::f32(&[N]), bytes.clone()).unwrap(), in_place);
        let (copied, mapped) = if in_place { (0, 160) } else { (160, 0) };
        assert_eq!((e.bytes() - without, e.mapped_bytes()), (copied, mapped));
        assert_eq!(e.weight::<f32>("w").unwrap().as_ptr().addr() == bytes.as_ptr().addr(), in_place);
        drop(bytes);
        e.run("forward").unwrap();
        assert_eq!(e.output::<f32>(id, "h").unwrap(), ramp(5.0));
        // Other bytes, then values: what is derived follows, and the steps find the weight where it is.
        assert!(e.bind_weight("w", &Type::f32(&[N]), shared(&ramp(3.0), 0)).unwrap());
        e.run("forward").unwrap();
        assert_eq!(e.output::<f32>(id, "h").unwrap(), ramp(7.0));
        assert_eq!((e.bytes(), e.mapped_bytes()), (without, 160));
        e.set_weight("w", &[N], &ramp(4.0)).unwrap();
        e.run("forward").unwrap();
        assert_eq!(e.output::<f32>(id, "h").unwrap(), ramp(9.0));
        assert_eq!((e.bytes(), e.mapped_bytes()), (without + 160, 0));
    }
}

#[test]
fn weights_that_an_entry_point_writes_are_copied() {
    each(|e| {
        let (update, before) = (e.entry("update").unwrap(), e.bytes());
        let bytes = shared(&ramp(2.0), 0);
        assert!(!e.bind_weight("w", &Type::f32(&[N]), bytes.clone()).unwrap());
        e.set_input(update, "x", &ramp(1.0)).unwrap();
        e.run(update).unwrap();
        assert_eq!(e.weight::<f32>("w").unwrap(), ramp(3.0));
        assert!(bytes.iter().zip(ramp(2.0).iter().flat_map(|x| x.to_le_bytes())).all(|(a, b)| *a == b));
        assert_eq!((e.bytes(), e.mapped_bytes()), (before, 0));
    });
}

#[test]
fn weights_have_no_memory_before_they_have_values() {
    let with = Executable::new(plan(), &options(1, "interp")).unwrap().bytes();
    let mut e = Executable::new(frozen(), &options(1, "interp")).unwrap();
    assert!(e.bytes() <= with - 160, "w needs none, m is an optimizer's");
    assert!(matches!(e.weight::<f32>("w"), Err(ExecError::Unset { .. })));
    assert!(matches!(e.run("forward"), Err(ExecError::MissingWeights { .. })));
    let ty = Type::f32(&[N]);
    assert!(matches!(e.bind_weight("w", &Type::f32(&[N, 1]), shared(&ramp(1.0), 0)), Err(ExecError::Shape { .. })));
    assert!(matches!(e.bind_weight("w", &ty, shared(&[1.0], 0)), Err(ExecError::Shape { .. })));
    assert!(matches!(e.bind_weight("v", &ty, shared(&ramp(1.0), 0)), Err(ExecError::Unknown { .. })));
    let limit = ExecOptions { max_bytes: e.bytes(), ..options(1, "interp") };
    let mut e = Executable::new(frozen(), &limit).unwrap();
    assert!(matches!(
        e.set_weight("w", &[N], &ramp(1.0)),
        Err(ExecError::Memory { needed: 160, allowed: Some(0), .. })
    ));
    assert!(e.bind_weight("w", &ty, shared(&ramp(1.0), 0)).unwrap(), "what is mapped needs no memory");
    e.prepare().unwrap();
}
