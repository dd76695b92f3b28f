//! Round trips, refusals and mutations of written plans.

use super::*;
use crate::loops::{Builder, Expr, Role};
use crate::{DType, Data};

/// `y = x + w` over `n` elements.
fn add(n: usize) -> Kernel {
    let mut b = Builder::new("add");
    let x = b.buf("x", DType::F32, n, Role::In);
    let w = b.buf("w", DType::F32, n, Role::In);
    let y = b.buf("y", DType::F32, n, Role::Out);
    let t = b.scratch("t", DType::F32, 4);
    let i = b.grid(n);
    b.store(t, 0, Expr::load(x, &i) + Expr::load(w, &i));
    b.store(y, &i, Expr::load(t, 0));
    b.finish()
}

fn buffer(ty: Type, place: Place, name: &str) -> BufferDecl {
    BufferDecl { ty, place, name: name.into() }
}

/// A plan that uses everything the format has.
pub(super) fn sample() -> Plan {
    let (v, c) = (Type::f32(&[2, 4]), Type::i32(&[1]));
    let (x, w, s, y, counter, again) = (BufferId(0), BufferId(1), BufferId(2), BufferId(3), BufferId(4), BufferId(5));
    let run = |args: &[BufferId]| Step::Run { kernel: KernelId(0), args: args.to_vec(), split: true, group: 0 };
    let mut plan = Plan {
        config: "{\"name\": \"sample\",\n \"x\": [1, \"\\u0000\"]}".into(),
        options: vec![("batch".into(), "2".into()), ("seq".into(), "4".into())],
        target: "host".into(),
        weights: WeightKind::ALL
            .iter()
            .map(|(kind, n)| WeightDecl { name: format!("w.{n}"), ty: v.clone(), kind: *kind })
            .collect(),
        states: vec![StateDecl { name: "layers.0.S".into(), ty: v.clone(), copies: 3 }],
        buffers: vec![
            buffer(v.clone(), Place::Arena(0), "x"),
            buffer(v.clone(), Place::Weight(1), "w"),
            buffer(v.clone(), Place::State(0), "s"),
            buffer(v.clone(), Place::Arena(64), "y"),
            buffer(c.clone(), Place::Arena(128), "counter"),
            buffer(c, Place::Persistent(64 * 7), "again"),
        ],
        persistent: 64 * 8,
        kernels: vec![add(8)],
        entries: vec![Entry {
            name: "loss".into(),
            inputs: vec![("tokens".into(), x)],
            outputs: vec![("loss".into(), y)],
            steps: vec![
                run(&[x, w, y]),
                Step::LoopBegin { max: 3, counter },
                run(&[y, s, s]),
                Step::Copy { from: s, to: y },
                Step::LoopEnd { again },
            ],
            groups: vec![Group { name: "layers.0".into(), flops: 3, ternary: u64::MAX, bytes: 1 << 63 }],
            lifetimes: vec![Lifetime { buffer: x, first: 0, last: 0 }, Lifetime { buffer: y, first: 0, last: 4 }],
            arena: 192,
            arena_bound: 132,
            shared: (7, 9),
        }],
        decisions: vec![Decision { entry: "loss".into(), edge: "a -> b".into(), verdict: "fused".into(), count: 4 }],
        ..Plan::default()
    };
    let constants = [
        Data::F32(vec![1.5, -0.0, f32::INFINITY, f32::MIN_POSITIVE / 8.0]),
        Data::F64(vec![0.1, -1e300]),
        Data::BF16(vec![0x3F80, 0xFFFF]),
        Data::I8(vec![-128, 127]),
        Data::U8(vec![0, 255]),
        Data::I16(vec![-32768, 32767]),
        Data::I32(vec![i32::MIN, i32::MAX]),
    ];
    for (i, data) in constants.into_iter().enumerate() {
        let ty = Type::new(data.dtype(), &[data.len()]);
        plan.buffers.push(buffer(ty.clone(), Place::Persistent(64 * i as u64), "c"));
        plan.constants.push((BufferId(plan.buffers.len() as u32 - 1), Tensor { ty, data }));
    }
    plan
}

#[test]
fn both_forms_round_trip_byte_for_byte() {
    for plan in [sample(), Plan::default()] {
        verify(&plan).expect("the sample verifies");
        let (text, bytes) = (to_text(&plan), to_bytes(&plan));
        let (a, b) = (from_text(&text).expect("text reads"), from_bytes(&bytes).expect("bytes read"));
        assert_eq!(a, plan);
        assert_eq!(b, plan);
        assert_eq!((to_text(&b), to_bytes(&a)), (text, bytes));
    }
}

#[test]
fn bits_of_constants_survive() {
    let mut plan = sample();
    plan.constants[0].1.data = Data::F32([0x7FC0_1234u32, 0xFF80_0000, 0x8000_0000, 1].map(f32::from_bits).to_vec());
    for read in [from_text(&to_text(&plan)).unwrap(), from_bytes(&to_bytes(&plan)).unwrap()] {
        let bits: Vec<u32> = read.constants[0].1.as_f32().iter().map(|x| x.to_bits()).collect();
        assert_eq!(bits, [0x7FC0_1234, 0xFF80_0000, 0x8000_0000, 1]);
    }
}

/// A new header with the right checksum.
fn sealed(body: &str) -> String {
    format!("chimera-plan {VERSION} crc32c {:08x}\n{body}", super::crc32c::crc32c(body.as_bytes()))
}

fn sealed_bytes(body: &[u8]) -> Vec<u8> {
    let mut out = to_bytes(&Plan::default())[..12].to_vec();
    out.extend_from_slice(&(body.len() as u64).to_le_bytes());
    out.extend_from_slice(&super::crc32c::crc32c(body).to_le_bytes());
    out.extend_from_slice(body);
    out
}

/// Small steps of a fixed sequence.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn truncated_and_mutated_plans_never_panic() {
    let (text, bytes) = (to_text(&sample()), to_bytes(&sample()));
    let (text_body, body) = (text.split_once('\n').unwrap().1, &bytes[24..]);
    for n in 0..bytes.len() {
        assert!(from_bytes(&bytes[..n]).is_err());
    }
    for n in 0..body.len() {
        assert!(from_bytes(&sealed_bytes(&body[..n])).is_err());
    }
    // The last byte is a line end, without which the text is still whole, but not what the checksum is of.
    for n in (0..text.len()).filter(|&n| text.is_char_boundary(n)) {
        assert!(from_text(&text[..n]).is_err());
    }
    let mut random = Lcg(1);
    let mut accepted = 0;
    for _ in 0..20_000 {
        let mut damaged = body.to_vec();
        for _ in 0..1 + random.below(3) {
            let at = random.below(damaged.len());
            damaged[at] = random.below(256) as u8;
        }
        if let Ok(plan) = from_bytes(&sealed_bytes(&damaged)) {
            accepted += 1;
            verify(&plan).expect("what is read is verified");
            assert_eq!(to_bytes(&plan), sealed_bytes(&damaged), "one plan has one byte form");
        }
        let mut damaged = text_body.as_bytes().to_vec();
        for _ in 0..1 + random.below(3) {
            let (at, from) = (random.below(damaged.len()), random.below(damaged.len()));
            damaged[at] = damaged[from];
        }
        if let Ok(plan) = from_text(&sealed(&String::from_utf8(damaged).unwrap())) {
            verify(&plan).expect("what is read is verified");
        }
    }
    assert!(accepted > 0, "some mutations, such as those of names, leave a plan");
    for at in 0..24 {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(from_bytes(&damaged).is_err(), "byte {at} of the header");
    }
}

#[test]
fn headers_are_checked() {
    let (text, bytes) = (to_text(&sample()), to_bytes(&sample()));
    let refused = |text: String, part: &str| {
        let why = from_text(&text).expect_err("refused").why;
        assert!(why.contains(part), "{why}");
    };
    refused(text.replacen("chimera-plan 1 ", "chimera-plan 2 ", 1), "format version 2, this program reads version 1");
    refused(text.replacen("chimera-plan", "chimera-clan", 1), "line 1 is not the header");
    refused(text.replacen("layers.0", "layers.1", 1), "changed or damaged");
    refused(sealed("(plan)"), "too early");
    refused(sealed("(plan"), "line 1, column 1");
    refused(sealed(&(text.split_once('\n').unwrap().1.to_owned() + "(plan)")), "after the end");
    let mut newer = bytes.clone();
    newer[8] = 9;
    assert!(from_bytes(&newer).unwrap_err().why.contains("format version 9"));
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(from_bytes(&longer).unwrap_err().why.contains("bytes after the header"));
    let mut longer = bytes[24..].to_vec();
    longer.push(0);
    assert!(from_bytes(&sealed_bytes(&longer)).unwrap_err().why.contains("after the end"));
}

#[test]
fn broken_rules_are_named_with_their_place() {
    type Break = fn(&mut Plan);
    type BreakRun = fn(&mut Vec<BufferId>, &mut KernelId, &mut u32);
    let runs: [(BreakRun, &str); 5] = [
        (|a, _, _| a[0] = BufferId(99), "steps[0]: buffer 99 does not exist"),
        (|a, _, _| a.truncate(2), "steps[0]: found 2 arguments, expected 3"),
        (|a, _, _| a[0] = BufferId(4), "steps[0]: buffer `counter` is i32[1], expected 8 elements of f32"),
        (|_, k, _| k.0 = 1, "steps[0]: kernel 1 does not exist"),
        (|_, _, g| *g = 1, "steps[0]: group 1 does not exist"),
    ];
    for (f, part) in runs {
        let mut plan = sample();
        match &mut plan.entries[0].steps[0] {
            Step::Run { kernel, args, group, .. } => f(args, kernel, group),
            other => panic!("{other:?}"),
        }
        expect(&plan, part);
    }
    let rules: [(Break, &str); 26] = [
        (|p| p.weights[1].name = "w.ternary".into(), "weights: the name `w.ternary` stands twice"),
        (|p| p.weights[0].ty.dims[1] = 0, "weights[0] `w.ternary`: type f32[2, 0] has a dimension of 0"),
        (|p| p.weights[0].ty.dims = vec![1 << 30; 3], "weights[0] `w.ternary`: type f32"),
        (|p| p.weights[0].ty.dims = vec![1; 17], "17 dimensions"),
        (|p| p.states[0].copies = 0, "states[0] `layers.0.S`: found 0 copies"),
        (|p| p.states[0].copies = 2, "steps[2]: state buffer `s` has 2 copies, expected one for each of 3"),
        (|p| p.buffers[0].place = Place::Arena(32), "buffers[0] `x`: found offset 32"),
        (|p| p.buffers[0].place = Place::Arena(192), "buffers[0] `x`: 32 bytes at offset 192 reach beyond the 192"),
        (|p| p.buffers[0].place = Place::Arena(u64::MAX - 63), "reach beyond"),
        (|p| p.buffers[5].place = Place::Persistent(512), "buffers[5] `again`: 4 bytes"),
        (|p| p.buffers[1].place = Place::Weight(p.weights.len() as u32), "buffers[1] `w`: its weight does not exist"),
        (|p| p.buffers[2].place = Place::State(1), "buffers[2] `s`: its state does not exist"),
        (|p| p.buffers[1].ty = Type::f32(&[9]), "buffers[1] `w`: f32[9] is larger than its weight f32[2, 4]"),
        (|p| p.persistent = MAX_BYTES, "persistent: all memories together"),
        (|p| p.constants[1].0 = BufferId(0), "constants[1]: buffer `x` is not in persistent memory"),
        (|p| p.constants[1].0 = p.constants[0].0, "constants[1]: found 2 elements"),
        (|p| p.constants[3].1.data = Data::I8(vec![0; 3]), "constants[3]: found 3 elements of i8 as i8[2]"),
        (|p| p.constants.push(p.constants[0].clone()), "constants[7]: buffer `c` has a value already"),
        (|p| p.kernels[0].bufs[0].len = 1 << 62, "kernels[0] `add`: buffer `x`"),
        (|p| p.kernels[0].vars.clear(), "kernels[0] `add`: "),
        (|p| p.entries.push(p.entries[0].clone()), "entries: the name `loss` stands twice"),
        (|p| p.entries[0].inputs.push(("tokens".into(), BufferId(0))), "entry `loss`: inputs: the name `tokens`"),
        (|p| p.entries[0].inputs[0].1 = BufferId(6), "inputs `tokens`: buffer `c` is a constant"),
        (|p| p.entries[0].lifetimes[0].last = 5, "lifetimes[0]: found steps 0 to 5"),
        (
            |p| {
                p.entries.push(Entry { arena: 512, ..Entry::default() });
                p.buffers[0].place = Place::Arena(192);
            },
            "entry `loss`: inputs `tokens`: buffer `x` reaches beyond the 192 bytes",
        ),
        (|p| p.entries[0].steps[3] = Step::Copy { from: BufferId(4), to: BufferId(0) }, "steps[3]: cannot copy"),
    ];
    for (f, part) in rules {
        let mut plan = sample();
        f(&mut plan);
        expect(&plan, part);
    }
    let loops: [(Break, &str); 5] = [
        (|p| drop(p.entries[0].steps.pop()), "entry `loss`: the last loop has no end"),
        (|p| drop(p.entries[0].steps.remove(1)), "steps[3]: a loop ends that did not begin"),
        (|p| p.entries[0].steps[2] = p.entries[0].steps[1].clone(), "steps[2]: a loop begins inside a loop"),
        (
            |p| p.entries[0].steps[1] = Step::LoopBegin { max: MAX_LOOP + 1, counter: BufferId(4) },
            "steps[1]: found at most 4097",
        ),
        (
            |p| p.entries[0].steps[4] = Step::LoopEnd { again: BufferId(0) },
            "steps[4]: buffer `x` is f32[2, 4], expected i32[1]",
        ),
    ];
    for (f, part) in loops {
        let mut plan = sample();
        f(&mut plan);
        expect(&plan, part);
    }
}

fn expect(plan: &Plan, part: &str) {
    let direct = verify(plan).expect_err(part);
    assert!(direct.why.contains(part), "expected `{part}`, found `{direct}`");
    for read in [from_text(&to_text(plan)), from_bytes(&to_bytes(plan))] {
        assert!(read.is_err(), "{part}");
    }
}

#[test]
fn many_steps_are_read() {
    let mut plan = sample();
    let step = plan.entries[0].steps[0].clone();
    plan.entries[0].steps.extend(std::iter::repeat_n(step, 100_000));
    assert_eq!(from_text(&to_text(&plan)).as_ref(), Ok(&plan));
    assert_eq!(from_bytes(&to_bytes(&plan)), Ok(plan));
}

#[test]
fn entry_points_are_left_out_with_their_kernels() {
    let mut plan = sample();
    let named = |name: &str| Kernel { name: name.into(), ..add(8) };
    plan.kernels = vec![named("only of the second"), named("of both"), named("of none")];
    let mut second = Entry { name: "second".into(), ..plan.entries[0].clone() };
    for (entry, kernels) in [(&mut plan.entries[0], [1, 1]), (&mut second, [1, 0])] {
        let mut next = kernels.iter();
        for step in &mut entry.steps {
            if let Step::Run { kernel, .. } = step {
                *kernel = KernelId(*next.next().unwrap());
            }
        }
    }
    // A buffer in front of the others, beyond the arena that the first entry point needs.
    second.inputs.push(("mask".into(), BufferId(0)));
    second.arena = 1024;
    second.each_buffer(&mut |b| b.0 += 1);
    plan.entries[0].each_buffer(&mut |b| b.0 += 1);
    plan.constants.iter_mut().for_each(|(b, _)| b.0 += 1);
    plan.buffers.insert(0, buffer(Type::f32(&[8]), Place::Arena(960), "mask"));
    second.inputs.last_mut().unwrap().1 = BufferId(0);
    plan.entries.push(second);
    verify(&plan).unwrap();
    let kernels = |plan: &Plan| plan.kernels.iter().map(|k| k.name.clone()).collect::<Vec<_>>();
    let runs = |plan: &Plan| {
        let id = |s: &Step| if let Step::Run { kernel, .. } = s { Some(kernel.0) } else { None };
        plan.entries.iter().map(|e| e.steps.iter().filter_map(id).collect()).collect::<Vec<Vec<u32>>>()
    };
    for (keep, names, ids) in [
        (&["loss", "second"][..], &["of both", "only of the second"][..], &[vec![0, 0], vec![0, 1]][..]),
        (&["second"], &["of both", "only of the second"], &[vec![0, 1]]),
        (&["loss", "absent"], &["of both"], &[vec![0, 0]]),
        (&[], &[], &[]),
    ] {
        let mut rest = plan.clone();
        rest.retain_entries(|name| keep.contains(&name));
        verify(&rest).unwrap();
        assert_eq!((kernels(&rest), runs(&rest)), (names.iter().map(|n| n.to_string()).collect(), ids.to_vec()));
        assert_eq!(rest.decisions.len(), usize::from(keep.contains(&"loss")));
        let name = |b: &BufferId| rest.buffer(*b).name.clone();
        let inputs: Vec<Vec<String>> =
            rest.entries.iter().map(|e| e.inputs.iter().map(|i| name(&i.1)).collect()).collect();
        let all = [vec!["x".to_owned()], vec!["x".into(), "mask".into()]];
        let kept = ["loss", "second"].iter().zip(all).filter(|(n, _)| keep.contains(n)).map(|(_, i)| i);
        assert_eq!(inputs, kept.collect::<Vec<_>>());
        assert!(rest.constants.iter().all(|(b, t)| name(b) == "c" && rest.buffer(*b).ty == t.ty));
    }
}
