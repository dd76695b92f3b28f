//! Every operation, every sample, every emitter: no line per operation.
//!
//! `eval` is the meaning of an operation, the interpreter that of a kernel; everything else must agree with the interpreter bit for
//! bit, however the grid is split and whatever is fused into the kernel.

use chimera_ir::{
    DType, Data, Graph, Op, Tensor, Type,
    loops::{Variant, parse, print, verify},
    lower::{Cluster, ClusterNode, Source},
    ops::{Accuracy, Binary, BinaryFn, Unary, UnaryFn, random_tensor},
};
use chimera_tests::clusters::{Runner, run_cluster, run_lowered, same_bits};

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

struct Sample {
    name: String,
    op: Op,
    types: Vec<Type>,
    ins: Vec<Tensor>,
}

fn samples() -> impl Iterator<Item = Sample> {
    Op::samples().into_iter().enumerate().map(|(i, (op, types))| {
        let mut random = sequence(i as u64 + 1);
        let ins = types.iter().enumerate().map(|(k, ty)| op.sample_input(k, ty, &mut random)).collect();
        let name = format!("sample {i}: {} ({})", op.text(), list(&types));
        Sample { name, op, types, ins }
    })
}

impl Sample {
    /// The operation lowered in every legal way, each with a name.
    fn ways(&self) -> Vec<(String, Cluster)> {
        let cluster = Cluster::single(self.op.clone(), &self.types).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let way = |v: Variant| (format!("{} [{v}]", self.name), cluster.with_variant(&v));
        self.op.variants(&self.types).into_iter().map(way).collect()
    }
}

fn list(types: &[Type]) -> String {
    types.iter().map(Type::to_string).collect::<Vec<_>>().join(", ")
}

fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

/// Run by the interpreter.
fn interpreted(name: &str, cluster: &Cluster, ins: &[Tensor]) -> Vec<Tensor> {
    run_cluster(cluster, Runner::Reference, &refs(ins), None).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn assert_bits(name: &str, what: &str, got: &[Tensor], want: &[Tensor]) {
    assert_eq!(got.len(), want.len(), "{name}: {what}");
    for (o, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.ty, want.ty, "{name}: {what}: result {o}");
        if !same_bits(&got.data, &want.data) {
            let (i, g, w) = first_difference(&got.data, &want.data);
            panic!("{name}: {what}: result {o} differs at element {i}: {g}, expected {w}");
        }
    }
}

fn first_difference(got: &Data, want: &Data) -> (usize, String, String) {
    let (g, w) = (elements(got), elements(want));
    let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    let i = (0..g.len()).find(|&i| !same(g[i], w[i])).unwrap_or(0);
    (i, format!("{:e}", g[i]), format!("{:e}", w[i]))
}

fn elements(data: &Data) -> Vec<f64> {
    match data {
        Data::F32(v) => v.iter().map(|&x| x.into()).collect(),
        Data::F64(v) => v.clone(),
        Data::BF16(v) => v.iter().map(|&x| f32::from_bits(u32::from(x) << 16).into()).collect(),
        Data::I8(v) => v.iter().map(|&x| x.into()).collect(),
        Data::U8(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I16(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I32(v) => v.iter().map(|&x| x.into()).collect(),
    }
}

fn assert_accuracy(name: &str, accuracy: Accuracy, got: &[Tensor], want: &[Tensor]) {
    let (rtol, atol, roundings) = match accuracy {
        Accuracy::Bits => return assert_bits(name, "interpreter against eval", got, want),
        Accuracy::Close { rtol, atol } => (rtol, atol, false),
        Accuracy::Rounding { rtol, atol } => (rtol, atol, true),
    };
    for (o, (got, want)) in got.iter().zip(want).enumerate() {
        let float = matches!(got.data, Data::F32(_) | Data::F64(_) | Data::BF16(_));
        let (g, w) = (elements(&got.data), elements(&want.data));
        let bad = |i: &usize| {
            let gap = (g[*i] - w[*i]).abs();
            // A difference that is not a number is not within bounds.
            let within = if float { gap <= f64::from(atol) + f64::from(rtol) * w[*i].abs() } else { gap == 0.0 };
            !(within || g[*i].is_nan() && w[*i].is_nan())
        };
        let mut off: Vec<usize> = (0..g.len()).filter(bad).collect();
        if roundings && !float && off.len() <= g.len().div_ceil(1000) {
            off.retain(|&i| (g[i] - w[i]).abs() > 1.0);
        }
        if let Some(&i) = off.first() {
            let n = off.len();
            panic!(
                "{name}: result {o}: {n} of {} differ from eval; element {i} is {}, expected {}",
                g.len(),
                g[i],
                w[i]
            );
        }
    }
}

#[test]
fn every_operation_is_sampled() {
    let named: std::collections::BTreeSet<&str> = Op::samples().iter().map(|(op, _)| op.name()).collect();
    let rejected: std::collections::BTreeSet<&str> = Op::rejects().iter().map(|(op, _)| op.name()).collect();
    assert!(named.len() > 40, "the registry is there");
    assert_eq!(named, rejected, "every operation has samples and rejects");
}

#[test]
fn samples_infer_verify_and_evaluate_to_their_types() {
    for s in samples() {
        let outs = s.op.infer(&s.types).unwrap_or_else(|e| panic!("{}: {e}", s.name));
        let mut g = Graph::default();
        let values: Vec<_> = s.types.iter().enumerate().map(|(k, ty)| g.input(format!("in{k}"), ty.clone())).collect();
        let results = g.ops(s.op.clone(), &values).unwrap_or_else(|e| panic!("{}: {e}", s.name));
        g.outputs = results.iter().enumerate().map(|(o, v)| (format!("out{o}"), *v)).collect();
        g.verify().unwrap_or_else(|e| panic!("{}: {e}", s.name));
        for (k, (t, ty)) in s.ins.iter().zip(&s.types).enumerate() {
            assert_eq!(
                (&t.ty, t.data.len(), t.data.dtype()),
                (ty, ty.numel(), ty.dtype),
                "{}: sample input {k}",
                s.name
            );
        }
        let got = s.op.eval(&refs(&s.ins));
        assert_eq!(got.len(), outs.len(), "{}", s.name);
        for (t, ty) in got.iter().zip(&outs) {
            assert_eq!((&t.ty, t.data.len(), t.data.dtype()), (ty, ty.numel(), ty.dtype), "{}", s.name);
        }
        assert_eq!(s.op.axes(&s.types).len(), s.types.len(), "{}: one axis for each operand", s.name);
        for (operand, result) in s.op.updates() {
            assert_eq!(s.types[operand], outs[result], "{}: an update keeps its type", s.name);
        }
        let _ = s.op.cost(&s.types, &outs);
    }
}

#[test]
fn kernels_verify_print_and_agree_with_eval() {
    for s in samples() {
        let want = s.op.eval(&refs(&s.ins));
        let mut first: Option<Vec<Tensor>> = None;
        for (name, cluster) in s.ways() {
            let kernel = cluster.lower();
            verify(&kernel).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(kernel.grid > 0, "{name}");
            let back = parse(&print(&kernel)).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(back, kernel, "{name}: the text form round-trips");
            let got = interpreted(&name, &cluster, &s.ins);
            assert_accuracy(&name, s.op.accuracy(), &got, &want);
            assert_bits(&name, "against the first way", &got, first.get_or_insert_with(|| got.clone()));
        }
    }
}

#[test]
fn contracts_give_their_operations_back_and_variants_are_distinct() {
    let mut variants = 0;
    for s in samples() {
        let ways = s.op.variants(&s.types);
        let distinct: std::collections::BTreeSet<_> = ways.iter().collect();
        assert_eq!((distinct.len(), ways.is_empty()), (ways.len(), false), "{}: each way once", s.name);
        variants += ways.len() - 1;
        let Some(contract) = s.op.contract(&s.types) else {
            assert_eq!(ways.len(), 1, "{}: who has variants has a contract", s.name);
            continue;
        };
        let (op, types) = Op::of_contract(&contract).unwrap_or_else(|| panic!("{}: {contract}", s.name));
        let elements = |types: &[Type]| types.iter().map(|t| (t.dtype, t.numel())).collect::<Vec<_>>();
        assert_eq!((&op, elements(&types)), (&s.op, elements(&s.types)), "{}", s.name);
        assert_eq!(op.contract(&types), Some(contract), "{}", s.name);
        assert_eq!(op.variants(&types), ways, "{}", s.name);
        for way in &ways {
            let work = s.op.work(&s.types, way);
            assert!(work.macs > 0 && work.instances > 0, "{}: {way}: {work:?}", s.name);
        }
    }
    assert!(variants > 50, "there is something to choose");
}

#[test]
fn grids_split_anywhere() {
    for s in samples() {
        for (name, cluster) in s.ways() {
            let kernel = cluster.lower();
            let (want, n) = (interpreted(&name, &cluster, &s.ins), kernel.grid as i64);
            let third = n.div_euclid(3);
            for ranges in [
                vec![(n / 2, n), (0, n / 2)],
                vec![(third, n), (0, third)],
                (0..n.min(40)).rev().map(|i| (i, i + 1)).collect(),
            ] {
                let covered: i64 = ranges.iter().map(|r| r.1 - r.0).sum();
                if covered == n && n > 1 {
                    let got = run_lowered(&cluster, &kernel, Runner::Reference, &refs(&s.ins), Some(&ranges));
                    assert_bits(&name, &format!("grid in {} parts", ranges.len()), &got.expect("interpreted"), &want);
                }
            }
        }
    }
}

#[test]
fn emitters_agree_with_the_interpreter() {
    for s in samples() {
        for (name, cluster) in s.ways() {
            let kernel = cluster.lower();
            let (want, n) = (interpreted(&name, &cluster, &s.ins), kernel.grid as i64);
            for emitter in chimera_codegen::emitters() {
                let what = format!("emitter {}", emitter.name());
                let run = |ranges: Option<&[(i64, i64)]>| {
                    run_lowered(&cluster, &kernel, Runner::Emitter(emitter.name()), &refs(&s.ins), ranges)
                        .unwrap_or_else(|e| panic!("{name}: {e}"))
                };
                assert_bits(&name, &what, &run(None), &want);
                assert_bits(&name, &format!("{what} in two parts"), &run(Some(&[(n / 2, n), (0, n / 2)])), &want);
            }
        }
    }
}

#[test]
fn ill_typed_applications_are_errors() {
    for (op, types) in Op::rejects() {
        if let Ok(outs) = op.infer(&types) {
            panic!("{} accepts ({}) and returns ({})", op.text(), list(&types), list(&outs));
        }
    }
}

/// Results that do not depend on where values live: the operation alone, then the same with pointwise producers in its pulled
/// operands and consumers behind its pushed results.
#[test]
fn fusion_changes_nothing() {
    for s in samples() {
        let outs = s.op.infer(&s.types).expect("checked above");
        let producer = Op::from(Unary { f: UnaryFn::Affine { mul: 0.75, add: 0.125 } });
        let consumer = Op::from(Binary { f: BinaryFn::Mul });
        let mut random = sequence(99);
        let floats = |k: &usize| s.types.get(*k).is_some_and(|t| t.dtype == DType::F32);
        let updated = |k: &usize| s.op.updates().iter().any(|u| u.0 == *k);
        let pulled: Vec<usize> = s.op.pulls().iter().copied().filter(|k| floats(k) && !updated(k)).collect();
        let pushed: Vec<usize> = s.op.pushes().filter(|&o| outs[o].dtype == DType::F32).collect();
        if pulled.is_empty() && pushed.is_empty() {
            continue;
        }
        // Inputs: those of the operation, then a factor for every pushed result. Nodes: producers, the operation, consumers.
        let mut inputs = s.types.clone();
        let mut tensors = s.ins.clone();
        let mut nodes: Vec<ClusterNode> = vec![];
        let mut sources: Vec<Source> = (0..inputs.len()).map(Source::Input).collect();
        for &k in &pulled {
            sources[k] = Source::Node(nodes.len(), 0);
            nodes.push(ClusterNode {
                op: producer.clone(),
                ins: vec![Source::Input(k)],
                outs: vec![s.types[k].clone()],
            });
        }
        let anchor = nodes.len();
        nodes.push(ClusterNode { op: s.op.clone(), ins: sources, outs: outs.clone() });
        let mut outputs: Vec<(usize, usize)> = (0..outs.len()).map(|o| (anchor, o)).collect();
        for &o in &pushed {
            inputs.push(outs[o].clone());
            tensors.push(random_tensor(&outs[o], &mut random));
            let ins = vec![Source::Node(anchor, o), Source::Input(inputs.len() - 1)];
            outputs.push((nodes.len(), 0));
            nodes.push(ClusterNode { op: consumer.clone(), ins, outs: vec![outs[o].clone()] });
        }
        // The unfused way.
        let mut alone = s.ins.clone();
        for &k in &pulled {
            alone[k] = interpreted(
                &s.name,
                &Cluster::single(producer.clone(), &s.types[k..=k]).expect("pointwise"),
                &s.ins[k..=k],
            )
            .remove(0);
        }
        let mut want = interpreted(&s.name, &Cluster::single(s.op.clone(), &s.types).expect("checked above"), &alone);
        for (j, &o) in pushed.iter().enumerate() {
            let pair = [want[o].clone(), tensors[s.ins.len() + j].clone()];
            let single = Cluster::single(consumer.clone(), &[outs[o].clone(), outs[o].clone()]).expect("pointwise");
            want.push(interpreted(&s.name, &single, &pair).remove(0));
        }
        // All results stored, then only those at the end.
        let ends: Vec<usize> =
            (0..outputs.len()).filter(|&i| outputs[i].0 != anchor || !pushed.contains(&outputs[i].1)).collect();
        for keep in [(0..outputs.len()).collect::<Vec<_>>(), ends] {
            let outputs = keep.iter().map(|&i| outputs[i]).collect();
            let variant = Variant::default();
            let cluster = Cluster { inputs: inputs.clone(), nodes: nodes.clone(), anchor, outputs, variant };
            let want: Vec<Tensor> = keep.iter().map(|&i| want[i].clone()).collect();
            let kernel = cluster.lower();
            let runners = chimera_codegen::emitters().iter().map(|e| Runner::Emitter(e.name()));
            for runner in [Runner::Reference].into_iter().chain(runners) {
                let got = run_lowered(&cluster, &kernel, runner, &refs(&tensors), None);
                let got = got.unwrap_or_else(|e| panic!("{} fused: {e}", s.name));
                assert_bits(&s.name, &format!("fused, {runner:?}"), &got, &want);
            }
        }
    }
}
