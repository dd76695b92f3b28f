//! Rows of their own loop depth: a batch of mixed depths computes, bit for bit, what each row computes alone.
//!
//! Alone, a row never enters an iteration beyond its depth, so nothing can touch the states of that iteration.

use chimera_codegen::emitters;
use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::layers::Depth;
use chimera_runtime::exec::Executable;
use chimera_runtime::train::weights::WeightFile;
use chimera_tests::engine::{exec_options, output};
use chimera_tests::golden::{Golden, path};

const ROWS: usize = 3;
const TOKENS: usize = 9;
/// Depths of the rows in one call after the other: every row meets iterations that it has and has not run before.
const DEPTHS: [[i32; ROWS]; 3] = [[1, 3, 2], [3, 1, 2], [2, 3, 1]];

fn executable(kind: EntryKind, rows: usize, tokens: usize, emitter: &str) -> Executable {
    let cfg = Golden::open("model_absmax_per_block").model();
    let depth = Some(Depth::PerRow { max: 3, adaptive: false });
    let options = Options { entries: vec![EntrySpec { kind, rows, tokens, depth }], ..Options::default() };
    let plan = compile(&cfg, &options).expect("the model compiles");
    let mut exe = Executable::new(plan, &exec_options(emitter, 2)).expect("the plan is executable");
    let weights = WeightFile::open(&path("model_params")).expect("the weights are there");
    weights.assign(&mut exe, false).expect("the weights fit");
    exe
}

/// Logits of one call after the other, and the states after each: `(name, copy, bytes)`.
struct Trace {
    logits: Vec<Vec<u32>>,
    states: Vec<Vec<(String, usize, Vec<u8>)>>,
}

/// `tokens[call]` are rows of equal length, `depths[call]` one for each row.
fn trace(kind: &EntryKind, emitter: &str, tokens: &[Vec<Vec<i32>>], depths: &[Vec<i32>]) -> Trace {
    let (rows, n) = (tokens[0].len(), tokens[0][0].len());
    let mut exe = executable(kind.clone(), rows, n, emitter);
    let id = exe.entry(kind.name()).expect("the entry point was compiled");
    let mut trace = Trace { logits: vec![], states: vec![] };
    for (tokens, depths) in tokens.iter().zip(depths) {
        exe.set_input(id, "tokens", &tokens.concat()).expect("tokens fit");
        exe.set_input(id, "seg", &vec![0; rows * n]).expect("documents fit");
        exe.set_input(id, "depth", depths).expect("depths fit");
        exe.run(id).expect("the entry point runs");
        trace.logits.push(output(&exe, id, "logits").as_f32().iter().map(|x| x.to_bits()).collect());
        let states = exe.plan().states.iter().flat_map(|s| (0..s.copies as usize).map(|c| (s.name.clone(), c)));
        let bytes = |(name, c): (String, usize)| {
            let bytes = exe.state(&name, c).expect("the state is there").to_vec();
            (name, c, bytes)
        };
        trace.states.push(states.map(bytes).collect());
    }
    trace
}

fn check(kind: &EntryKind, emitter: &str) {
    let n = if *kind == EntryKind::Decode { 1 } else { TOKENS };
    let all = Golden::open("model_none").tensor("in.tokens");
    let columns = all.ty.dims[1];
    let text: Vec<i32> = all.to_i64().iter().map(|&x| x as i32).collect();
    let row = |r: usize, call: usize| text[r * columns + call * n..][..n].to_vec();
    let calls = 0..DEPTHS.len();
    let batch: Vec<Vec<Vec<i32>>> = calls.clone().map(|c| (0..ROWS).map(|r| row(r, c)).collect()).collect();
    let mixed = trace(kind, emitter, &batch, &DEPTHS.map(|d| d.to_vec()));
    for r in 0..ROWS {
        let own: Vec<Vec<Vec<i32>>> = calls.clone().map(|c| vec![row(r, c)]).collect();
        let alone = trace(kind, emitter, &own, &DEPTHS.map(|d| vec![d[r]]));
        for c in calls.clone() {
            let at = format!("{emitter}, {}, row {r}, call {c}", kind.name());
            let len = alone.logits[c].len();
            assert!(mixed.logits[c][r * len..][..len] == alone.logits[c][..], "{at}: other logits");
            assert_eq!(mixed.states[c].len(), alone.states[c].len());
            for ((name, copy, many), (same, _, one)) in mixed.states[c].iter().zip(&alone.states[c]) {
                assert_eq!(name, same);
                assert!(many[r * one.len()..][..one.len()] == one[..], "{at}: state {name}, iteration {copy} differs");
            }
        }
    }
}

#[test]
fn rows_of_mixed_depth_are_the_rows_alone() {
    for emitter in emitters() {
        check(&EntryKind::Logits, emitter.name());
        check(&EntryKind::Decode, emitter.name());
    }
}
