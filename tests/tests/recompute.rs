//! Activation checkpointing: a plan keeps to its budget, and gradients keep their bits whatever is made again.

use std::collections::BTreeMap;

use chimera_compiler::{CompileError, EntryKind, EntrySpec, MemoryBudget, Options, compile};
use chimera_frontends::layers::Depth;
use chimera_ir::Tensor;
use chimera_ir::plan::Plan;
use chimera_runtime::call::{self, Tensors};
use chimera_runtime::exec::Executable;
use chimera_runtime::files::HostTensor;
use chimera_tests::engine::exec_options;
use chimera_tests::golden::Golden;

const THREADS: usize = 2;

fn plan(golden: &Golden, depth: Option<Depth>, bytes: Option<u64>) -> Result<Plan, CompileError> {
    let [rows, tokens] = golden.tensor("in.tokens").ty.dims[..] else { panic!("tokens are a matrix") };
    let kind = EntryKind::Grad;
    let budget = bytes.map(|bytes| MemoryBudget { bytes, outside: 1000, threads: THREADS });
    let entries = vec![EntrySpec { kind, rows, tokens, depth }];
    compile(&golden.model(), &Options { entries, budget, ..Options::default() })
}

/// The bits of all outputs.
fn run(golden: &Golden, plan: Plan, threads: usize, depth: Option<Depth>) -> BTreeMap<String, Vec<u32>> {
    let weights = Golden::open("model_params").with_prefix("");
    let mut exe = Executable::new(plan, &exec_options("wide", threads)).expect("the plan is executable");
    for w in exe.plan().weights.clone() {
        let t = &weights[&w.name];
        exe.set_weight(&w.name, &t.ty.dims, t.as_f32()).expect("the weight fits");
    }
    let host = |t: &Tensor| {
        let values: Vec<i32> = t.to_i64().into_iter().map(|x| x as i32).collect();
        HostTensor::from_i32(&t.ty.dims, &values).expect("the shape fits")
    };
    let mut inputs: Tensors = golden.with_prefix("in.").iter().map(|(n, t)| (n.clone(), host(t))).collect();
    if depth.is_some() {
        inputs.insert("depth".into(), host(&Tensor::i32(&[3], vec![3, 1, 2])));
    }
    let out = call::run(&mut exe, "grad", &inputs).expect("the call succeeds");
    out.iter().map(|(n, t)| (n.clone(), t.to_f32().iter().map(|x| x.to_bits()).collect())).collect()
}

fn needs(plan: &Plan) -> u64 {
    plan.memory(THREADS).total() + 1000
}

/// The bytes that an error names as the least.
fn least(golden: &Golden, depth: Option<Depth>) -> u64 {
    match plan(golden, depth, Some(1001)) {
        Err(e @ CompileError::Budget { budget: 1001, least }) => {
            assert!(e.to_string().contains(&format!("expected at least {least}")), "{e}");
            least
        }
        other => panic!("{:?}", other.map(|p| p.options)),
    }
}

#[test]
fn gradients_keep_their_bits() {
    let own = Some(Depth::PerRow { max: 3, adaptive: false });
    for (file, depth) in [("model_none", None), ("model_absmax_per_block", None), ("model_none", own)] {
        let golden = Golden::open(file);
        let whole = plan(&golden, depth, None).expect("the gradient compiles");
        let (most, want) = (needs(&whole), run(&golden, whole, 2, depth));
        let least = least(&golden, depth);
        assert!(least < most, "{file}: {least} of {most}");
        for (bytes, threads) in [(least, 1), (least, 2), (least.midpoint(most), 2)] {
            let small = plan(&golden, depth, Some(bytes)).expect("it is enough");
            assert!(needs(&small) <= bytes, "{file}: {} of {bytes}", needs(&small));
            assert!(small.option("recompute in grad").is_some_and(|t| t.contains("parts")), "{:?}", small.options);
            let got = run(&golden, small, threads, depth);
            let differ: Vec<_> = want.iter().filter(|(n, bits)| got[*n] != **bits).map(|(n, _)| n).collect();
            assert!(differ.is_empty() && got.len() == want.len(), "{file}, {bytes}: {differ:?}");
        }
    }
}

/// More memory never means more work, and less than the least is refused.
#[test]
fn no_more_is_made_again_than_must_be() {
    let golden = Golden::open("model_none");
    let most = needs(&plan(&golden, None, None).expect("the gradient compiles"));
    let least = least(&golden, None);
    let work = |bytes| {
        let plan = plan(&golden, None, Some(bytes)).expect("it is enough");
        plan.entries.iter().flat_map(|e| &e.groups).map(|g| g.flops + 2 * g.ternary).sum::<u64>()
    };
    let steps: Vec<u64> = (0..=4).map(|i| work(least + (most - least) * i / 4)).collect();
    assert!(steps.is_sorted_by(|a, b| a >= b) && steps[0] > steps[4], "{steps:?}");
    let free = plan(&golden, None, Some(most)).expect("all of it fits");
    assert_eq!(free.option("recompute in grad").map(|t| t.starts_with("nothing of")), Some(true));
    assert!(matches!(plan(&golden, None, Some(least - 1)), Err(CompileError::Budget { .. })));
    // Twice the same plan.
    let twice = [0; 2].map(|_| chimera_ir::plan::to_bytes(&plan(&golden, None, Some(least)).expect("it is enough")));
    assert!(twice[0] == twice[1]);
}

/// Entry points without gradients have nothing to give.
#[test]
fn other_plans_fit_or_do_not() {
    let golden = Golden::open("model_none");
    let entries = vec![EntrySpec { kind: EntryKind::Loss, rows: 2, tokens: 16, depth: None }];
    let compiled = |bytes| {
        let budget = Some(MemoryBudget { bytes, outside: 0, threads: 1 });
        compile(&golden.model(), &Options { entries: entries.clone(), budget, ..Options::default() })
    };
    let Err(CompileError::Budget { least, .. }) = compiled(1) else { panic!("a byte is not enough") };
    assert_eq!(compiled(least).expect("the least is enough").memory(1).total(), least);
}
