//! Gradients of operations against central differences of their reference semantics: no line per operation.
//!
//! What is straight through by definition (roundings, ternary codes) has no derivative to compare with; those are compared with the
//! gradients of the executable specification elsewhere, and their composition here.

use std::collections::HashMap;

use chimera_ir::{
    DType, Data, Graph, Op, Tensor, Type, Value,
    graph::Kind,
    ops::{
        BlockScales, CrossEntropy, Dequantise, GroupScale, InferError, Linear, OpDef, PackPanels, PackTernary,
        Quantise, ScaleMode, TernaryDense, TernaryProduct, random_tensor,
    },
};
use chimera_tests::reference::{Memory, evaluate};

/// A fixed sequence of numbers in (-1, 1).
fn sequence(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let unit = (state >> 40) as f32 / (1u64 << 24) as f32;
        2.0 * unit - 1.0
    }
}

/// Derivatives that were compared, and those that were not because the function bends there.
#[derive(Default, Debug)]
struct Count {
    checked: usize,
    bent: usize,
}

/// Operations whose gradient is not that of their reference semantics, by definition.
const STRAIGHT_THROUGH: [&str; 1] = [TernaryDense::NAME];

/// Compare the gradient of `sum(weight * output)` of `g` with differences, in every float input.
fn check(
    name: &str,
    mut g: Graph,
    output: Value,
    inputs: &HashMap<String, Tensor>,
    count: &mut Count,
) -> Result<(), InferError> {
    let mut random = sequence(7);
    let weight = random_tensor(g.ty(output), &mut random);
    g.outputs = vec![("y".to_owned(), output)];
    let forward = g.clone();
    let floats: Vec<(String, Value)> = g
        .nodes()
        .iter()
        .filter_map(|n| match &n.kind {
            Kind::Input(name) if g.ty(n.outs[0]).dtype == DType::F32 => Some((name.clone(), n.outs[0])),
            _ => None,
        })
        .collect();
    let seed = g.input("seed", weight.ty.clone());
    let wanted: Vec<Value> = floats.iter().map(|f| f.1).collect();
    let grads = g.grad(output, seed, &wanted)?;
    let mut found = vec![];
    for (name, v) in floats {
        // A packed form has the gradient of what it stands for.
        if let Some(grad) = grads[v.0 as usize].filter(|&d| g.ty(d) == g.ty(v)) {
            g.outputs.push((format!("grad.{name}"), grad));
            found.push(name);
        }
    }
    g.verify()?;
    let mut given = inputs.clone();
    given.insert("seed".to_owned(), weight.clone());
    let results = evaluate(&g, &given, &mut Memory::default());
    let objective = |inputs: &HashMap<String, Tensor>| -> f64 {
        let y = &evaluate(&forward, inputs, &mut Memory::default())["y"];
        y.as_f32().iter().zip(weight.as_f32()).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum()
    };
    for input in found {
        let grad = results[&format!("grad.{input}")].as_f32();
        for i in (0..grad.len()).step_by(grad.len().div_ceil(7)) {
            let slope = |eps: f32| {
                let at = |delta: f32| {
                    let mut inputs = inputs.clone();
                    let Data::F32(x) = &mut inputs.get_mut(&input).expect("it was given").data else { unreachable!() };
                    x[i] += delta;
                    objective(&inputs)
                };
                (at(eps) - at(-eps)) / (2.0 * f64::from(eps))
            };
            let (wide, slope) = (slope(1e-2), slope(5e-3));
            let bound = 1e-2 * slope.abs().max(1.0);
            // Differences say nothing where the function bends within a step, as near a pole.
            if (wide - slope).abs() > bound / 2.0 || slope.is_nan() {
                count.bent += 1;
                continue;
            }
            count.checked += 1;
            let gap = (slope - f64::from(grad[i])).abs();
            assert!(gap <= bound, "{name}: d {input}[{i}] is {}, expected {slope}", grad[i]);
        }
    }
    Ok(())
}

#[test]
fn gradients_agree_with_differences() {
    let (mut count, mut names) = (Count::default(), std::collections::BTreeSet::new());
    for (i, (op, types)) in Op::samples().into_iter().enumerate() {
        if STRAIGHT_THROUGH.contains(&op.name()) {
            continue;
        }
        let mut random = sequence(i as u64 + 1);
        let inputs = types.iter().enumerate().map(|(k, ty)| (format!("in{k}"), op.sample_input(k, ty, &mut random)));
        let inputs: HashMap<String, Tensor> = inputs.collect();
        let mut g = Graph::default();
        let values: Vec<Value> =
            types.iter().enumerate().map(|(k, ty)| g.input(format!("in{k}"), ty.clone())).collect();
        let outs = g.ops(op.clone(), &values).expect("samples are well typed");
        let name = format!("sample {i}: {}", op.text());
        for out in outs.into_iter().filter(|&v| g.ty(v).dtype == DType::F32) {
            let before = count.checked;
            // Operations without a gradient say so; that is tested where gradients are asked for.
            if check(&name, g.clone(), out, &inputs, &mut count).is_ok() && count.checked > before {
                names.insert(op.name());
            }
        }
    }
    assert!(count.checked > 20 * count.bent && names.len() >= 20, "{count:?} of {names:?}");
}

/// A graph of float inputs, and labels or offsets beside them.
fn inputs(g: &mut Graph, types: &[(&str, Type)], seed: u64) -> (Vec<Value>, HashMap<String, Tensor>) {
    let mut random = sequence(seed);
    let values = types.iter().map(|(n, ty)| g.input(*n, ty.clone())).collect();
    (values, types.iter().map(|(n, ty)| ((*n).to_owned(), random_tensor(ty, &mut random))).collect())
}

#[test]
fn weights_behind_panels() {
    let mut count = Count::default();
    for (m, n) in [(5, 7), (33, 20), (16, 16)] {
        let mut g = Graph::default();
        let (v, given) = inputs(&mut g, &[("x", Type::f32(&[2, 3, n])), ("w", Type::f32(&[m, n]))], 3);
        let panels = g.op(PackPanels {}, &[v[1]]).expect("well typed");
        let y = g.op(Linear { m, grouped_rows: false }, &[v[0], panels]).expect("well typed");
        check(&format!("linear {m} x {n}"), g, y, &given, &mut count).expect("differentiable");

        let mut g = Graph::default();
        let (v, mut given) = inputs(&mut g, &[("h", Type::f32(&[2, 3, n])), ("e", Type::f32(&[m, n]))], 4);
        let labels = g.input("labels", Type::i32(&[2, 3]));
        given.insert("labels".to_owned(), Tensor::i32(&[2, 3], vec![0, 3, -100, 4, 1, 1]));
        let panels = g.op(PackPanels {}, &[v[1]]).expect("well typed");
        let y = g.op(CrossEntropy { vocab: m }, &[v[0], panels, labels]).expect("well typed");
        check(&format!("cross-entropy {m} x {n}"), g, y, &given, &mut count).expect("differentiable");
    }
    // Experts: rows of a product in sections.
    let mut g = Graph::default();
    let (v, mut given) = inputs(&mut g, &[("x", Type::f32(&[11, 6])), ("w", Type::f32(&[3, 9, 6]))], 5);
    let offsets = g.input("offsets", Type::i32(&[4]));
    given.insert("offsets".to_owned(), Tensor::i32(&[4], vec![0, 4, 4, 11]));
    let panels = g.op(PackPanels {}, &[v[1]]).expect("well typed");
    let y = g.op(Linear { m: 9, grouped_rows: true }, &[v[0], panels, offsets]).expect("well typed");
    check("linear of experts", g, y, &given, &mut count).expect("differentiable");
    assert!(count.checked > 60 && count.bent == 0, "{count:?}");
}

/// The integer product has the gradient of the float product of what its codes stand for.
#[test]
fn straight_through() {
    for (n, block, mode) in
        [(72, 64, ScaleMode::PerGroup(128)), (200, 0, ScaleMode::PerRow), (192, 64, ScaleMode::PerGroup(128))]
    {
        let (m, group) = (37, if mode == ScaleMode::PerRow { n } else { 128 });
        let mut g = Graph::default();
        let (v, mut given) = inputs(&mut g, &[("x", Type::f32(&[2, 3, n])), ("w", Type::f32(&[m, n]))], 6);
        let alpha = g.op(GroupScale { mode }, &[v[1]]).expect("well typed");
        let codes = g.ops(Quantise { block }, &[v[0]]).expect("well typed");
        let packed = g.op(PackTernary { group, ratio: 0.5 }, &[v[1], alpha]).expect("well typed");
        let op = TernaryProduct { m, group, block, n_weights: 1, grouped_rows: false };
        let scales = g.op(BlockScales {}, &[alpha]).expect("well typed");
        let y = g.op(op, &[codes[0], codes[1], packed, scales]).expect("well typed");
        // The float product of what codes stand for, whose operands are the ends of the gradient.
        let padded = g.op(Dequantise { block, n }, &codes).expect("well typed");
        let dense = g.op(TernaryDense { group, ratio: 0.5 }, &[v[1], alpha]).expect("well typed");
        let panels = g.op(PackPanels {}, &[dense]).expect("well typed");
        let float = g.op(Linear { m, grouped_rows: false }, &[padded, panels]).expect("well typed");
        let seed = g.input("seed", g.ty(y).clone());
        given.insert("seed".to_owned(), random_tensor(g.ty(y), &mut sequence(8)));
        let got = g.grad(y, seed, &v).expect("differentiable");
        let want = g.grad(float, seed, &[padded, dense]).expect("differentiable");
        let pairs = [(got[v[0].0 as usize], want[padded.0 as usize]), (got[v[1].0 as usize], want[dense.0 as usize])];
        for (i, (got, want)) in pairs.into_iter().enumerate() {
            g.outputs.push((format!("got{i}"), got.expect("there is a gradient")));
            g.outputs.push((format!("want{i}"), want.expect("there is a gradient")));
        }
        let out = evaluate(&g, &given, &mut Memory::default());
        for i in 0..2 {
            let (got, want) = (&out[&format!("got{i}")], &out[&format!("want{i}")]);
            assert_eq!(got, want, "{n} columns, operand {i}");
            assert!(got.as_f32().iter().any(|x| *x != 0.0), "{n} columns, operand {i}");
        }
    }
}

#[test]
fn what_has_no_gradient_says_where() {
    let mut g = Graph::default();
    let w = g.input("w", Type::f32(&[2, 128]));
    g.at("layers.3.attn");
    let y = g.op(GroupScale { mode: ScaleMode::PerRow }, &[w]).expect("well typed");
    let seed = g.input("seed", g.ty(y).clone());
    let error = g.grad(y, seed, &[w]).expect_err("a scale is a constant for gradients").to_string();
    assert!(error.contains(GroupScale::NAME) && error.contains("layers.3.attn"), "{error}");
    // What nothing asks for is not differentiated.
    assert_eq!(g.grad(y, seed, &[]).expect("there is nothing to do")[w.0 as usize], None);
}
