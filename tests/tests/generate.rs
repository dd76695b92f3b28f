//! Generation and calls over a compiled model: what steps, chunks and calls in pieces leave behind is what one parallel pass computes.

use std::ops::ControlFlow;

use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_runtime::call::{self, Tensors};
use chimera_runtime::exec::Executable;
use chimera_runtime::files::HostTensor;
use chimera_runtime::generate::{Generator, Settings};
use chimera_runtime::text::{Sampling, Vocab};
use chimera_runtime::train::weights::WeightFile;
use chimera_tests::engine::exec_options;
use chimera_tests::golden::Golden;

const EMITTER: &str = "portable";

/// The model of a golden file with its weights.
fn executable(file: &str, entries: &[(EntryKind, usize, usize)]) -> Executable {
    let cfg = Golden::open(file).model();
    let spec = |(kind, rows, tokens): &(EntryKind, usize, usize)| EntrySpec {
        kind: kind.clone(),
        rows: *rows,
        tokens: *tokens,
        depth: None,
    };
    let options = Options { entries: entries.iter().map(spec).collect(), ..Options::default() };
    let plan = compile(&cfg, &options).expect("the model compiles");
    let mut exe = Executable::new(plan, &exec_options(EMITTER, 2)).expect("the plan is executable");
    let file = WeightFile::open(&chimera_tests::golden::path("model_params")).expect("the weights are there");
    let unused = file.assign(&mut exe, false).expect("the weights fit");
    assert_eq!(unused, Vec::<String>::new());
    exe
}

fn tokens(rows: usize, ids: &[u32]) -> HostTensor {
    let ids: Vec<i32> = ids.iter().map(|&x| x as i32).collect();
    HostTensor::from_i32(&[rows, ids.len() / rows], &ids).expect("the shape fits")
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().zip(0u32..).fold((f32::NEG_INFINITY, 0), |a, (&z, id)| if z > a.0 { (z, id) } else { a });
    best.1
}

#[test]
fn greedy_decoding_is_the_argmax_of_the_parallel_pass() {
    let vocab = Vocab::bytes();
    let sampling = Sampling { temperature: 0.0, repetition_penalty: 1.0, ..Sampling::default() };
    let settings = Settings { sampling, max_tokens: 12, ..Settings::default() };
    // Prompts of less than a chunk, of exactly one, and of several with a remainder.
    for prompt in ["a", "sixteen bytes...", "The quick brown fox jumps over the lazy dog."] {
        let mut exe = executable("model_none", &[(EntryKind::Prefill, 1, 16), (EntryKind::Decode, 1, 1)]);
        let mut text = vocab.encode(prompt);
        let given = text.len();
        let mut generator = Generator::new(&mut exe, &vocab).expect("the plan generates");
        generator.feed(&text).expect("the prompt is in the vocabulary");
        let stop = generator.generate(&settings, &mut |id| {
            text.push(id);
            ControlFlow::Continue(())
        });
        stop.expect("the logits are numbers");
        let mut exe = executable("model_none", &[(EntryKind::Logits, 1, text.len())]);
        let inputs = Tensors::from([("tokens".to_owned(), tokens(1, &text))]);
        let out = call::run(&mut exe, "logits", &inputs).expect("the call succeeds");
        let logits = out["logits"].to_f32();
        let all = logits.len() / text.len();
        for at in given..text.len() {
            let before = &logits[(at - 1) * all..][..vocab.size()];
            assert_eq!(text[at], argmax(before), "token {at} of {prompt:?}");
        }
        assert!(text.len() > given, "something was generated");
    }
}

/// Largest difference of two states of one shape; the share of different ones for the counters of a knot, whose bits are discontinuous.
fn distance(name: &str, a: &HostTensor, b: &HostTensor) -> f32 {
    assert_eq!(a.shape(), b.shape(), "{name}");
    if name.ends_with(".c") {
        let pairs: Vec<_> = a.bytes().chunks(8).zip(b.bytes().chunks(8)).collect();
        return pairs.iter().filter(|(x, y)| x != y).count() as f32 / pairs.len() as f32 * 0.1;
    }
    a.to_f32().iter().zip(b.to_f32()).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn states_carry_a_text_from_call_to_call() {
    let golden = Golden::open("model_none");
    let column = |name: &str, from: usize, to: usize| {
        let t = golden.tensor(name);
        let ids: Vec<u32> = t.to_i64().chunks(t.ty.dims[1]).flat_map(|row| &row[from..to]).map(|&x| x as u32).collect();
        tokens(t.ty.dims[0], &ids)
    };
    let inputs = |from: usize, to: usize| {
        Tensors::from([
            ("tokens".to_owned(), column("in.tokens", from, to)),
            ("seg".to_owned(), column("in.seg", from, to)),
        ])
    };
    let run = |kind: EntryKind, step: usize, inputs: &Tensors| {
        let mut exe = executable("model_none", &[(kind.clone(), 3, step)]);
        call::run(&mut exe, kind.name(), inputs).expect("the call succeeds")
    };
    let whole = run(EntryKind::Logits, 29, &inputs(0, 29));
    for cut in [1, 7, 14, 20] {
        let first = run(EntryKind::Logits, cut, &inputs(0, cut));
        let mut rest = inputs(cut, 29);
        rest.extend(first.into_iter().filter(|(name, _)| name.starts_with("state.")));
        for (kind, step) in [(EntryKind::Logits, 29 - cut), (EntryKind::Decode, 1)] {
            let second = run(kind.clone(), step, &rest);
            for (name, t) in second.iter().filter(|(name, _)| name.starts_with("state.")) {
                let off = distance(name, t, &whole[name]);
                assert!(off <= 1e-3, "{kind:?} behind {cut}: {name} is off by {off}");
            }
            let (a, b) = (second["logits"].to_f32(), whole["logits"].to_f32());
            let width = 512 * (29 - cut);
            for row in 0..3 {
                let (a, b) = (&a[row * width..][..width], &b[(row * 29 + cut) * 512..][..width]);
                let off = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(off <= golden.tolerance("logits"), "{kind:?} behind {cut}, row {row}: logits are off by {off}");
            }
        }
    }
}

#[test]
fn calls_check_their_tensors() {
    let says = |change: &dyn Fn(&mut Tensors), entry: &str, expected: &str| {
        let mut exe = executable("model_none", &[(EntryKind::Logits, 2, 3), (EntryKind::Loss, 2, 3)]);
        let mut inputs = Tensors::from([("tokens".to_owned(), tokens(2, &[1, 2, 3, 4, 5, 6]))]);
        change(&mut inputs);
        let error = call::run(&mut exe, entry, &inputs).expect_err(expected).to_string();
        assert!(error.contains(expected), "found {error:?}, expected {expected:?}");
    };
    let set = |name: &'static str, t: HostTensor| move |i: &mut Tensors| drop(i.insert(name.to_owned(), t.clone()));
    says(&|i| i.clear(), "logits", "tensor `tokens`: is not among the inputs");
    says(&set("tokens", tokens(3, &[1, 2, 3, 4, 5, 6])), "logits", "the plan was compiled for [2, 3]");
    says(&set("tokens", tokens(2, &[1, 2, 3, 512, 5, 6])), "logits", "element 3 is 512, expected 0 to 511");
    says(&set("seg", tokens(2, &[0; 4])), "logits", "tensor `seg`: found shape [2, 2], expected [2, 3]");
    says(&|_| (), "loss", "tensor `labels`: is not among the inputs");
    says(&set("depth", tokens(1, &[2])), "logits", "compiled for one depth");
    says(&set("state.pos", tokens(1, &[2])), "loss", "`loss` takes no states");
    says(&set("state.0.0.S", tokens(1, &[2])), "logits", "tensor `state.pos`: is not among the inputs");
    let floats = HostTensor::from_f32(&[2, 3], &[0.0; 6]).expect("the shape fits");
    says(&set("tokens", floats), "logits", "found F32, expected I32 or I64");
}
