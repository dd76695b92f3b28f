//! Golden cases of the recurrences, through `eval` and every emitter, in recurrent and in chunked form; and calls in parts.
//!
//! The golden files order activations `[B, H, T, K]`; operations order them `[R, T, H * K]`.

use chimera_ir::{
    DType, Data, Op, Tensor, Type,
    ops::{EflaBeta, GatedDelta, Mlstm, Positions, RopeScaling, RopeTable, ShortConv, TitansMemory, WindowAttention},
};
use chimera_tests::{
    clusters::all_ways,
    golden::{Golden, assert_close},
};

/// `[B, H, T, K]` or `[B, H, T]` by token.
fn by_token(t: &Tensor) -> Tensor {
    let (b, h, n) = (t.ty.dims[0], t.ty.dims[1], t.ty.dims[2]);
    let k = t.ty.numel() / (b * h * n);
    let x = t.as_f32();
    let at = |i: usize| {
        let (row, head, col) = (i / (h * k), i / k % h, i % k);
        x[((row / n * h + head) * n + row % n) * k + col]
    };
    Tensor::f32(&[b, n, h * k], (0..x.len()).map(at).collect())
}

/// Tokens `lo .. hi` of `[R, T, ..]`.
fn tokens(t: &Tensor, lo: usize, hi: usize) -> Tensor {
    let (r, n) = (t.ty.dims[0], t.ty.dims[1]);
    let each = t.ty.numel() / (r * n);
    let rows = |len: usize| (0..r).flat_map(move |r| (r * n + lo) * len..(r * n + hi) * len);
    let mut dims = t.ty.dims.clone();
    dims[1] = hi - lo;
    match &t.data {
        Data::F32(x) => Tensor::f32(&dims, rows(each).map(|i| x[i]).collect()),
        Data::I32(x) => Tensor::i32(&dims, rows(each).map(|i| x[i]).collect()),
        other => panic!("no activations of type {}", other.dtype().name()),
    }
}

fn compare(file: &Golden, op: &Op, ins: &[Tensor], want: &[Option<Tensor>]) {
    let (rtol, atol) = (file.tolerance("rtol"), file.tolerance("atol"));
    for (way, got) in all_ways(op.clone(), ins) {
        for (o, want) in want.iter().enumerate() {
            if let Some(want) = want {
                assert_close(&format!("{} by {way}, result {o}", op.text()), &got[o], want, rtol, atol);
            }
        }
    }
}

/// Run in parts of `step` tokens, the state of one part given to the next: operands that `cut` names are cut by token, the others
/// given in full. Returns the first result and the final results from `outs` on, which are the state.
fn in_parts(op: &Op, ins: &[Tensor], cut: impl Fn(usize) -> bool, outs: usize, step: usize) -> Vec<Tensor> {
    let total = ins[0].ty.dims[1];
    let mut ins_now = ins.to_vec();
    let states = op.updates();
    let mut parts: Vec<Tensor> = vec![];
    let mut last = vec![];
    for lo in (0..total).step_by(step) {
        let hi = (lo + step).min(total);
        for (k, whole) in ins.iter().enumerate().filter(|(k, _)| cut(*k)) {
            ins_now[k] = tokens(whole, lo, hi);
        }
        // All ways are compared elsewhere.
        let (_, results) = all_ways(op.clone(), &ins_now).pop().expect("a way");
        for &(operand, result) in &states {
            ins_now[operand] = results[result].clone();
        }
        parts.push(results[0].clone());
        last = results[outs..].to_vec();
    }
    let (rows, each) = (ins[0].ty.dims[0], parts[0].ty.dims[2]);
    let row = |r: usize| {
        parts.iter().flat_map(move |p| p.as_f32()[r * p.ty.dims[1] * each..][..p.ty.dims[1] * each].to_vec())
    };
    let whole = Tensor::f32(&[rows, total, each], (0..rows).flat_map(row).collect());
    std::iter::once(whole).chain(last).collect()
}

fn random(ty: &Type, seed: u64) -> Tensor {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    chimera_ir::ops::random_tensor(ty, &mut draw)
}

#[test]
fn gated_delta_rule() {
    for name in ["gated_delta_rule_recurrent", "gated_delta_rule_chunk"] {
        let file = Golden::open(name);
        let mut ins: Vec<Tensor> =
            ["q", "k", "v", "g", "beta"].map(|n| by_token(&file.tensor(&format!("in.{n}")))).into();
        ins.extend([file.tensor("in.pos"), file.tensor("in.S")]);
        let want = [by_token(&file.tensor("out.y")), file.tensor("state.S")];
        for chunk in [0, 1, 5, 16, 32, 64] {
            let op = Op::from(GatedDelta { heads: 2, chunk, carry: true });
            compare(&file, &op, &ins, &want.clone().map(Some));
            for (got, want) in in_parts(&op, &ins, |k| k < 6, 1, 9).iter().zip(&want) {
                assert_close("in parts", got, want, file.tolerance("rtol"), file.tolerance("atol"));
            }
        }
    }
}

#[test]
fn mlstm() {
    let file = Golden::open("mlstm_cell");
    let mut ins: Vec<Tensor> = ["q", "k", "v", "i", "f"].map(|n| by_token(&file.tensor(&format!("in.{n}")))).into();
    ins.extend(["pos", "C", "n", "m"].map(|n| file.tensor(&format!("in.{n}"))));
    let want =
        [by_token(&file.tensor("out.y")), file.tensor("state.C"), file.tensor("state.n"), file.tensor("state.m")];
    for chunk in [0, 1, 5, 16, 32, 64] {
        let op = Op::from(Mlstm { heads: 2, chunk, carry: true });
        compare(&file, &op, &ins, &want.clone().map(Some));
        for (got, want) in in_parts(&op, &ins, |k| k < 6, 1, 9).iter().zip(&want) {
            assert_close("in parts", got, want, file.tolerance("rtol"), file.tolerance("atol"));
        }
    }
}

#[test]
fn titans_memory() {
    const STATE: [&str; 6] = ["W1", "S1", "A1", "W2", "S2", "A2"];
    for (name, normalise) in [("titans_memory_plain", false), ("titans_memory_normalised", true)] {
        let file = Golden::open(name);
        let mut ins: Vec<Tensor> =
            ["q", "k", "v", "alpha", "eta", "theta"].map(|n| by_token(&file.tensor(&format!("in.{n}")))).into();
        ins.extend(["pos", "init1", "init2"].map(|n| file.tensor(&format!("in.{n}"))));
        ins.extend(STATE.map(|n| file.tensor(&format!("in.{n}"))));
        let mut want = vec![Some(by_token(&file.tensor("out.y"))), None];
        want.extend(STATE.map(|n| Some(file.tensor(&format!("state.{n}")))));
        let surprise = file.tensor("out.surprise");
        for chunked in [false, true] {
            let op = Op::from(TitansMemory { heads: 2, inner: 8, normalise, chunked, carry: true });
            compare(&file, &op, &ins, &want);
            for (way, got) in all_ways(op.clone(), &ins) {
                let mean = got[1].as_f32().chunks_exact(2).map(|h| (h[0] + h[1]) / 2.0).collect();
                let mean = Tensor::f32(&surprise.ty.dims, mean);
                let (rtol, atol) = (file.tolerance("rtol"), file.tolerance("atol"));
                assert_close(&format!("surprise by {way}"), &mean, &surprise, rtol, atol);
            }
            let whole = in_parts(&op, &ins, |k| k < 7, 2, 9);
            for (got, want) in whole.iter().zip(want.iter().flatten()) {
                assert_close("in parts", got, want, file.tolerance("rtol"), file.tolerance("atol"));
            }
        }
    }
}

#[test]
fn rope() {
    let file = Golden::open("rope");
    let pos = file.tensor("in.pos");
    let pos = Tensor::i32(&[1, 31], pos.to_i64().into_iter().map(|p| p as i32).collect());
    let scalings = [
        ("None", RopeScaling::None),
        ("ntk", RopeScaling::Ntk(4.0)),
        ("linear", RopeScaling::Linear(4.0)),
        ("seed_legacy", RopeScaling::SeedLegacy(4.0)),
    ];
    for (name, scaling) in scalings {
        for (way, got) in all_ways(RopeTable { dim: 32, theta: 10000.0, scaling }, std::slice::from_ref(&pos)) {
            for (got, part) in got.iter().zip(["cos", "sin"]) {
                let want = file.tensor(&format!("out.{name}.{part}"));
                let want = Tensor::f32(&[1, 31, 16], want.as_f32().to_vec());
                assert_close(&format!("{name} {part} by {way}"), got, &want, 0.0, file.tolerance("atol"));
            }
        }
    }
}

#[test]
fn efla_beta() {
    let file = Golden::open("efla_beta");
    let lift = |n: &str, cols: usize| Tensor::f32(&[1, 9, cols], file.tensor(n).as_f32().to_vec());
    let ins = [lift("in.k", 24), lift("in.beta", 1)];
    compare(&file, &EflaBeta { heads: 1 }.into(), &ins, &[Some(lift("out.y", 1))]);
}

#[test]
fn short_conv_continues() {
    let whole = Op::from(ShortConv { taps: 4, carry: false });
    let parts = Op::from(ShortConv { taps: 4, carry: true });
    let mut pos = vec![];
    for r in 0..2 {
        pos.extend((0..23).map(|t| if t < 9 + r { t } else { t - 9 - r }));
    }
    let mut ins =
        vec![random(&Type::f32(&[2, 23, 70]), 1), random(&Type::f32(&[70, 4]), 2), Tensor::i32(&[2, 23], pos)];
    let want = all_ways(whole, &ins);
    // What the state holds in front of a document is ignored.
    ins.push(Tensor::f32(&[2, 3, 70], vec![f32::NAN; 2 * 3 * 70]));
    for step in [1, 2, 3, 8, 23] {
        let got = in_parts(&parts, &ins, |k| k == 0 || k == 2, 1, step);
        assert_eq!(got[0], want[0].1[0], "in parts of {step}");
        let last = tokens(&ins[0], 20, 23);
        assert_eq!(got[1], last, "the state after parts of {step}");
    }
}

#[test]
fn window_attention_continues() {
    let (r, t, h, k, p) = (2, 45, 2, 8, 3);
    let x = Type::f32(&[r, t, h * k]);
    let mut ins: Vec<Tensor> = (0..4).map(|i| random(&x, 10 + i)).collect();
    ins.extend([random(&Type::f32(&[p, h * k]), 20), random(&Type::f32(&[p, h * k]), 21)]);
    ins.extend([random(&x, 22), random(&x, 23)]);
    let document = |t: i32| [0, 30, 33].into_iter().filter(|s| *s <= t).max().map_or(0, |s| t - s);
    ins.push(Tensor::i32(&[r, t], (0..2 * t as i32).map(|i| document(i % t as i32)).collect()));
    for window in [1, 5, 12, 64] {
        let want = all_ways(WindowAttention { heads: h, window, carry: false }, &ins);
        let mut carried = ins.clone();
        carried.extend(vec![Tensor::f32(&[r, window, h * k], vec![f32::NAN; r * window * h * k]); 2]);
        carried.push(Tensor::zeros(&Type::new(DType::I32, &[r, h])));
        let op = Op::from(WindowAttention { heads: h, window, carry: true });
        for step in [1, 3, 7, 20, 45] {
            let got = in_parts(&op, &carried, |k| k < 4 || (6..9).contains(&k), 1, step);
            assert_close(&format!("window {window} in parts of {step}"), &got[0], &want[0].1[0], 2e-5, 2e-6);
        }
    }
}

#[test]
fn positions_continue() {
    let seg: Vec<i32> = (0..2 * 17).map(|i| (i % 17 / 5) % 2).collect();
    let seg = Tensor::i32(&[2, 17], seg);
    let want = Positions { carry: false };
    let want = all_ways(want, std::slice::from_ref(&seg));
    let zero = Tensor::i32(&[2], vec![0; 2]);
    for (way, whole) in &want {
        assert_eq!(whole[0], want[0].1[0], "{way}");
    }
    let mut state = vec![zero.clone(), zero];
    for lo in 0..17 {
        let ins = [tokens(&seg, lo, lo + 1), state[0].clone(), state[1].clone()];
        let (_, got) = all_ways(Positions { carry: true }, &ins).pop().expect("a way");
        assert_eq!(got[0], tokens(&want[0].1[0], lo, lo + 1));
        state = got[1..].to_vec();
    }
}
