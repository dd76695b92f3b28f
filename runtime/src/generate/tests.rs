//! Generation over a model made by hand: it remembers a decaying sum of tokens and likes ids near to it.

use super::*;
use crate::exec::ExecOptions;
use chimera_ir::loops::{Builder, Expr, Kernel, Role, Ty, f32c};
use chimera_ir::plan::{BufferDecl, BufferId, Entry, Group, KernelId, Place, Plan, StateDecl, Step};
use chimera_ir::{DType, Type};

const IDS: usize = 260;
const CHUNK: usize = 4;

/// `s = 0.75 s + 0.3 token` over `n` tokens, then `logits[j] = -|j - s| / 8`.
fn model(n: usize) -> Kernel {
    let mut b = Builder::new("model");
    let tokens = b.buf("tokens", DType::I32, n, Role::In);
    b.buf("seg", DType::I32, n, Role::In);
    let s = b.buf("s", DType::F32, 1, Role::InOut);
    let logits = b.buf("logits", DType::F32, IDS, Role::Out);
    b.grid(1);
    b.each(0, n, |b, t| {
        let token = Expr::load(tokens, t).cast(Ty::F32);
        b.store(s, 0, Expr::load(s, 0) * f32c(0.75) + token * f32c(0.3));
    });
    let center = b.bind(Expr::load(s, 0));
    b.each(0, IDS, |b, j| {
        let distance = (j.clone().cast(Ty::I32).cast(Ty::F32) - center).abs();
        b.store(logits, j, f32c(0.0) - distance * f32c(0.125));
    });
    b.finish()
}

fn plan(chunk: Option<usize>) -> Plan {
    let buffer = |ty: Type, place| BufferDecl { ty, place, name: String::new() };
    let mut plan = Plan {
        states: vec![StateDecl { name: "s".into(), ty: Type::f32(&[1]), copies: 1 }],
        buffers: vec![buffer(Type::f32(&[1]), Place::State(0)), buffer(Type::f32(&[1, 1, IDS]), Place::Arena(0))],
        ..Plan::default()
    };
    for (k, (name, n)) in [(DECODE, Some(1)), (PREFILL, chunk)].into_iter().enumerate() {
        let Some(n) = n else { continue };
        let first = plan.buffers.len() as u32;
        let place = |i: u64| Place::Arena(2048 + 128 * i);
        plan.buffers.extend([0, 1].map(|i| buffer(Type::i32(&[1, n]), place(i))));
        let [tokens, seg] = [BufferId(first), BufferId(first + 1)];
        let args = vec![tokens, seg, BufferId(0), BufferId(1)];
        plan.kernels.push(model(n));
        plan.entries.push(Entry {
            name: name.into(),
            inputs: vec![("tokens".into(), tokens), ("seg".into(), seg)],
            outputs: vec![("logits".into(), BufferId(1))],
            steps: vec![Step::Run { kernel: KernelId(k as u32), args, split: false, group: 0 }],
            groups: vec![Group::default()],
            arena: 4096,
            ..Entry::default()
        });
    }
    plan
}

fn executable(chunk: Option<usize>) -> Executable {
    let options = ExecOptions { threads: 1, ..ExecOptions::default() };
    Executable::new(plan(chunk), &options).expect("the plan is sound")
}

fn continued(chunk: Option<usize>, prompt: &[u32], settings: &Settings) -> (Vec<u32>, Stop) {
    let mut exe = executable(chunk);
    let mut g = Generator::new(&mut exe, &Vocab::bytes()).expect("the plan generates");
    g.feed(prompt).expect("the prompt is in the vocabulary");
    let mut out = vec![];
    let stop = g.generate(settings, &mut |id| {
        out.push(id);
        ControlFlow::Continue(())
    });
    let stop = stop.expect("the logits are numbers");
    assert_eq!(g.position(), (prompt.len() + out.len()) as u64);
    (out, stop)
}

fn greedy(max_tokens: usize) -> Settings {
    let sampling = Sampling { temperature: 0.0, repetition_penalty: 1.0, ..Sampling::default() };
    Settings { sampling, max_tokens, ..Settings::default() }
}

/// What the model would say, computed without it.
fn expected(prompt: &[u32], n: usize) -> Vec<u32> {
    let mut s = prompt.iter().fold(0.0, |s, &id| s * 0.75 + 0.3 * id as f32);
    let mut next = || {
        let id = (0..257u32).min_by(|&a, &b| (a as f32 - s).abs().total_cmp(&(b as f32 - s).abs()));
        let id = id.expect("there are ids");
        s = s * 0.75 + 0.3 * id as f32;
        id
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn chunks_and_single_steps_read_the_same_prompt() {
    for len in 1..=3 * CHUNK + 1 {
        let prompt: Vec<u32> = (0..len as u32).map(|i| 40 + 13 * i % 60).collect();
        for chunk in [None, Some(1), Some(CHUNK)] {
            let (out, stop) = continued(chunk, &prompt, &greedy(6));
            assert_eq!((out, stop), (expected(&prompt, 6), Stop::Length), "{len} tokens in chunks of {chunk:?}");
        }
    }
}

#[test]
fn the_seed_and_the_position_decide_the_draws() {
    let sampled = |seed, chunk| {
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() };
        let settings = Settings { sampling, seed, max_tokens: 20, ..Settings::default() };
        continued(chunk, &[60, 61, 62, 63, 64, 65], &settings).0
    };
    assert_eq!(sampled(1, Some(CHUNK)), sampled(1, None));
    assert_ne!(sampled(1, None), sampled(2, None));
}

#[test]
fn generation_ends_with_the_document_and_when_asked() {
    // The sum rises past every byte, and ids beyond the vocabulary are masked.
    let (out, stop) = continued(Some(CHUNK), &[255; 40], &greedy(50));
    assert_eq!((out, stop), (vec![], Stop::EndOfDocument));
    let mut exe = executable(None);
    let mut g = Generator::new(&mut exe, &Vocab::bytes()).unwrap();
    g.feed(&[100, 101]).unwrap();
    assert_eq!(g.logits().len(), IDS);
    assert!(g.logits()[257..].iter().all(|&z| z == f32::NEG_INFINITY));
    let mut seen = 0;
    let stop = g.generate(&greedy(9), &mut |_| {
        seen += 1;
        if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((stop.unwrap(), seen), (Stop::Asked, 3));
    g.reset();
    assert_eq!((g.position(), g.logits().len()), (0, 0));
}

#[test]
fn the_penalty_sees_a_bounded_window() {
    let mut exe = executable(Some(CHUNK));
    let mut g = Generator::new(&mut exe, &Vocab::bytes()).unwrap();
    g.set_penalty_window(3);
    g.feed(&[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
    assert_eq!(g.recent, [7, 8, 9]);
    g.set_penalty_window(0);
    g.feed(&[1, 2, 3, 4, 5, 6]).unwrap();
    assert!(g.recent.is_empty());
}

#[test]
fn mistakes_are_answered() {
    let mut exe = executable(None);
    let too_big = Generator::new(&mut exe, &Vocab::o200k()).expect_err("more tokens than logits");
    assert!(too_big.to_string().contains("260 logits"), "{too_big}");
    let mut g = Generator::new(&mut exe, &Vocab::bytes()).unwrap();
    let empty = g.generate(&greedy(1), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(empty, Err(GenerateError::EmptyPrompt)));
    assert!(matches!(g.feed(&[3, 257]), Err(GenerateError::Token { id: 257, size: 257 })));
    assert_eq!(g.position(), 0);
    let mut exe = Executable::new(Plan::default(), &ExecOptions::default()).unwrap();
    let nothing = Generator::new(&mut exe, &Vocab::bytes()).expect_err("no way in");
    assert!(nothing.to_string().contains("`decode`"), "{nothing}");
}
