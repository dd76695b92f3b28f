//! Golden cases of random streams, expert routing and the Span Knot, through `eval` and every emitter.
//!
//! Everything here is exact, or exact up to one rounding to `f32`.

use chimera_ir::{
    DType, Data, Op, Tensor, Type,
    ops::{
        self, Combine, Dispatch, Distribution, GatherRows, LowRankGrad, MemberDot, Random, RankUpdate, Route, SpanKnot,
        box_muller, philox, stream_id,
    },
};
use chimera_tests::clusters::all_ways;
use safetensors::SafeTensors;

struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Golden {
        let path = format!("{}/fixtures/golden/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        Golden(std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}")))
    }

    fn elements<const N: usize>(&self, name: &str, dtype: safetensors::Dtype) -> Vec<[u8; N]> {
        let file = SafeTensors::deserialize(&self.0).expect("the file is well-formed");
        let view = file.tensor(name).expect("the tensor is in the file");
        assert_eq!(view.dtype(), dtype, "{name}");
        view.data().chunks(N).map(|c| c.try_into().expect("whole elements")).collect()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.elements(name, safetensors::Dtype::F32).into_iter().map(f32::from_le_bytes).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        self.elements(name, safetensors::Dtype::F64).into_iter().map(f64::from_le_bytes).collect()
    }

    fn i64(&self, name: &str) -> Vec<i64> {
        self.elements(name, safetensors::Dtype::I64).into_iter().map(i64::from_le_bytes).collect()
    }

    fn i8(&self, name: &str) -> Vec<i32> {
        self.elements::<1>(name, safetensors::Dtype::I8).into_iter().map(|[b]| i32::from(b as i8)).collect()
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

const SEED: u64 = 0x0123_4567_89AB_CDEF;
const STREAMS: [(&str, usize, u32, u32); 3] =
    [("layers.0.attn.q_proj.weight", 301, 0, 0), ("embed.weight#A", 7, 5, 3), ("x", 1, 0xFFFF_FFFF, 0xFFFF_FFFF)];

#[test]
fn random_streams() {
    let golden = Golden::open("rng");
    let ids = golden.i64("exact.tensor_id");
    for (j, (stream, n, step, direction)) in STREAMS.into_iter().enumerate() {
        assert_eq!(i64::from(stream_id(stream)), ids[j]);
        let words = (0..n).map(|i| philox([(i / 4) as u32, stream_id(stream), step, direction], SEED)[i % 4]);
        let words: Vec<i64> = words.map(i64::from).collect();
        assert_eq!(words, golden.i64(&format!("exact.{j}.words")));
        let table = [
            (Distribution::Rademacher, "rademacher"),
            (Distribution::Gaussian, "gaussian"),
            (Distribution::Uniform, "uniform"),
            (Distribution::TernaryUniform, "ternary_uniform"),
        ];
        for (dist, name) in table {
            let want = golden.f32(&format!("exact.{j}.{name}"));
            // The wanted direction is the second of three members.
            for (members, first) in [(0, direction), (3, direction.wrapping_sub(1))] {
                let op = Random { dist, shape: vec![n], members, dtype: DType::F32 };
                let scalar = |x: u32| Tensor::i32(&[1], vec![x as i32]);
                let seed = Tensor::i32(&[2], vec![SEED as i32, (SEED >> 32) as i32]);
                for (way, outs) in all_ways(op, &[seed, scalar(step), scalar(first), ops::stream(stream)]) {
                    let got = &outs[0].as_f32()[if members == 0 { 0 } else { n }..][..n];
                    assert_eq!(bits(got), bits(&want), "{way}: {name} of {stream}");
                }
            }
        }
    }
}

#[test]
fn box_muller_at_the_edges() {
    let golden = Golden::open("rng");
    let [x0, x1] = ["in.x0", "in.x1"].map(|n| golden.i64(n));
    let got: Vec<[f32; 2]> = x0.iter().zip(&x1).map(|(&a, &b)| box_muller(a as u32, b as u32)).collect();
    for k in 0..2 {
        let got: Vec<f32> = got.iter().map(|g| g[k]).collect();
        assert_eq!(bits(&got), bits(&golden.f32(&format!("exact.box_muller{k}"))));
    }
}

#[test]
fn routing_with_ties() {
    let golden = Golden::open("moe_route");
    let ins = [Tensor::f32(&[3, 1, 4], golden.f32("in.logits")), Tensor::f32(&[4], golden.f32("in.bias"))];
    let (index, weight) = (golden.i64("exact.index"), golden.f32("out.weight"));
    for (way, outs) in all_ways(Route { k: 2, scale: 1.0 }, &ins) {
        assert_eq!(outs[0].to_i64(), index, "{way}");
        for (got, want) in outs[1].as_f32().iter().zip(&weight) {
            assert!((got - want).abs() <= 2e-5 + 1e-4 * want.abs(), "{way}: {got}, expected {want}");
        }
    }
}

#[test]
fn dispatched_tokens_come_back() {
    let (rows, tokens, d, k, experts, groups) = (4, 5, 3, 2, 4, 2);
    let n = rows * tokens * k;
    let choice = |i: usize| (i / k * 7 + i % k * 3) % experts;
    let x = Tensor::f32(&[rows, tokens, d], (0..rows * tokens * d).map(|i| (i as f32 * 0.37).sin()).collect());
    let index = Tensor::i32(&[rows, tokens, k], (0..n).map(|i| choice(i) as i32).collect());
    let weight = Tensor::f32(&[rows, tokens, k], (0..n).map(|i| 0.1 + i as f32 / 64.0).collect());
    for (way, sorted) in all_ways(Dispatch { experts, groups }, std::slice::from_ref(&index)) {
        let offsets = sorted[2].to_i64();
        let position = |p: usize| offsets.iter().filter(|&&o| o <= p as i64).count() - 1;
        let gathered = Op::from(GatherRows { k }).eval(&[&x, &sorted[0]]).remove(0);
        // Expert e of group g multiplies by 10 g + e + 1.
        let factor = |key: usize| (key % groups * 10 + key / groups + 1) as f32;
        let ys = gathered.as_f32().iter().enumerate().map(|(i, y)| y * factor(position(i / d))).collect();
        let ys = Tensor::f32(&[n, d], ys);
        let ins = [ys, sorted[1].clone(), index.clone(), weight.clone()];
        for (other, out) in all_ways(Combine { k }, &ins) {
            for (i, got) in out[0].as_f32().iter().enumerate() {
                let slot = |j: usize| i / d * k + j;
                let group = i / d / tokens / (rows / groups);
                let mut order: Vec<usize> = (0..k).collect();
                order.sort_by_key(|&j| choice(slot(j)));
                let want = order.iter().fold(0.0f32, |sum, &j| {
                    let y = x.as_f32()[i] * factor(choice(slot(j)) * groups + group);
                    sum + y * weight.as_f32()[slot(j)]
                });
                assert_eq!(got.to_bits(), want.to_bits(), "{way}, {other}: element {i}");
            }
        }
        let load: Vec<i64> = (0..experts).map(|e| (0..n).filter(|&i| choice(i) == e).count() as i64).collect();
        assert_eq!(sorted[3].to_i64(), load, "{way}");
    }
}

/// A low-rank probe is the product with the dense shift `sign sigma A B^T`, and its gradient is the shift weighted by the outcome.
#[test]
fn low_rank_probes_are_dense_shifts() {
    let (members, rank, tokens, m, n) = (2, 2, 3, 5, 4);
    let fill = |dims: &[usize], f: f32| {
        Tensor::f32(dims, (0..dims.iter().product::<usize>()).map(|i| (i as f32 * f).sin()).collect())
    };
    let (x, y) = (fill(&[2 * members, tokens, n], 0.7), fill(&[2 * members, tokens, m], 0.3));
    let (a, b) = (fill(&[members, m, rank], 1.1), fill(&[members, n, rank], 0.9));
    let scale = Tensor::f32(&[1], vec![0.125]);
    let shift = |member: usize, i: usize, j: usize| -> f32 {
        let at = |t: &Tensor, row: usize, q: usize| t.as_f32()[(member * t.ty.dims[1] + row) * rank + q];
        (0..rank).map(|q| at(&a, i, q) * at(&b, j, q)).sum()
    };
    let u = Op::from(MemberDot { rank, members, gathered: None }).eval(&[&x, &b]).remove(0);
    let ins = [y.clone(), u, a.clone(), scale];
    for (way, out) in all_ways(RankUpdate { rank, members, gathered: None }, &ins) {
        for (at, got) in out[0].as_f32().iter().enumerate() {
            let (row, i) = (at / m, at % m);
            let batch = row / tokens;
            let sign = if batch < members { 0.125 } else { -0.125 };
            let moved: f32 = (0..n).map(|j| shift(batch % members, i, j) * x.as_f32()[row * n + j]).sum();
            let want = y.as_f32()[at] + sign * moved;
            assert!((got - want).abs() < 1e-5, "{way}: {got}, expected {want}");
        }
    }
    let c = fill(&[members], 2.0);
    for (way, out) in all_ways(LowRankGrad { rank }, &[c.clone(), a.clone(), b.clone()]) {
        for (at, got) in out[0].as_f32().iter().enumerate() {
            let sum: f32 = (0..members).map(|k| c.as_f32()[k] * shift(k, at / n, at % n)).sum();
            assert!((got - sum / members as f32).abs() < 1e-5, "{way}: {got} at {at}");
        }
    }
}

const BITS: usize = 512;
const WIDTH: usize = 100;

fn knot(carry: bool) -> SpanKnot {
    let weights = [1.0, 0.3, 0.2];
    SpanKnot { bits: BITS, weights, iters: 3, fraction: 0.02, exit_delta: 1e-4, eps: 1e-6, carry }
}

#[test]
fn knot_sketch_and_relaxation() {
    let golden = Golden::open("knot_relax");
    let (h, signs, rho) = (golden.f32("in.h"), golden.i8("exact.signs"), golden.f64("exact.rho"));
    let a: Vec<i32> = golden.elements("exact.a", safetensors::Dtype::I32).into_iter().map(i32::from_le_bytes).collect();
    let rows = |name: &str| golden.i8(name);
    let (m, bound, s0, s) = (rows("in.m"), rows("in.bound"), rows("exact.s0"), rows("exact.s"));
    let (flips, energies) = (golden.i64("exact.flips"), ["out.E0", "out.E1"].map(|n| golden.f64(n)));
    for r in 0..9 {
        let (got, norm) = knot(false).sketch(&h[r * WIDTH..][..WIDTH], &signs);
        assert_eq!(got, a[r * BITS..][..BITS], "row {r}");
        // The square root of the reference is one unit off in places.
        assert!(norm.to_bits().abs_diff(rho[r].to_bits()) <= 1, "row {r}: {norm}, expected {}", rho[r]);
    }
    for r in 0..8 {
        let of = |x: &[i32]| x[r * BITS..][..BITS].to_vec();
        let got = knot(false).relax(&a[(r + 1) * BITS..][..BITS], rho[r + 1], &of(&m), &of(&bound));
        assert_eq!((got.start, got.end), (of(&s0), of(&s)), "row {r}");
        assert_eq!(got.flips as i64, flips[r], "row {r}");
        for (got, want) in got.energy.iter().zip(&energies) {
            let want = want[r];
            assert!((got - want).abs() <= 1e-9, "row {r}: energy {got}, expected {want}");
        }
    }
}

/// The whole operation on the rows of the golden file: counters that give `m`, and a role that gives `bound`.
#[test]
fn knot_from_state_to_state() {
    let golden = Golden::open("knot_relax");
    let (h, signs) = (golden.f32("in.h"), golden.i8("exact.signs"));
    let rows = |name: &str| golden.i8(name);
    let (m, bound, s0, s) = (rows("in.m"), rows("in.bound"), rows("exact.s0"), rows("exact.s"));
    let (flips, energies) = (golden.i64("exact.flips"), ["out.E0", "out.E1"].map(|n| golden.f64(n)));
    let emb: Vec<f32> = (0..WIDTH).map(|j| (j as f32 * 1.7).cos()).collect();
    let (filler, _) = knot(true).sketch(&emb, &signs);
    let narrow = |v: &[i32]| Data::I8(v.iter().map(|&x| x as i8).collect());
    let p = WIDTH.next_power_of_two();
    for r in 0..8 {
        let of = |x: &[i32]| x[r * BITS..][..BITS].to_vec();
        // The first row has no coherence term: it starts a document, and its counters must not matter.
        let pos = if of(&m)[0] == 0 { 0 } else { 64 * 3 + 37 };
        let counters: Vec<i32> =
            of(&m).iter().enumerate().map(|(b, m)| if *m == 0 { 999 } else { m * (1 + b as i32) }).collect();
        let mut role = vec![0; BITS];
        for (b, x) in of(&bound).into_iter().enumerate() {
            role[(b + BITS - pos % 64) % BITS] = x * if filler[b] >= 0 { 1 } else { -1 };
        }
        let tensor = |dims: &[usize], data: Data| Tensor { ty: Type::new(data.dtype(), dims), data };
        let ins = [
            Tensor::f32(&[1, 1, WIDTH], h[(r + 1) * WIDTH..][..WIDTH].to_vec()),
            Tensor::f32(&[1, 1, WIDTH], emb.clone()),
            Tensor::i32(&[1, 1], vec![pos as i32]),
            tensor(&[BITS / p, p], narrow(&signs)),
            tensor(&[BITS], narrow(&role)),
            tensor(&[1, BITS], Data::I16(counters.iter().map(|&c| c as i16).collect())),
        ];
        for (way, outs) in all_ways(knot(true), &ins) {
            let stats = outs[1].as_f32();
            assert_eq!(stats[0], flips[r] as f32, "{way}: row {r}");
            for k in 0..2 {
                assert!((f64::from(stats[k + 1]) - energies[k][r]).abs() < 1e-6, "{way}: row {r}: {stats:?}");
            }
            let before = |b: usize| if pos == 0 { 0 } else { i64::from(counters[b]) };
            let c: Vec<i64> = (0..BITS).map(|b| before(b) - (before(b) >> 6) + 256 * i64::from(of(&s)[b])).collect();
            assert_eq!(outs[2].to_i64(), c, "{way}: row {r}");
            let flipped: Vec<i32> = of(&s).iter().zip(of(&s0)).map(|(s, s0)| s - s0).collect();
            for (j, got) in outs[0].as_f32().iter().enumerate() {
                // Column j of a Hadamard matrix has the sign of the parity of the common bits.
                let entry = |b: usize| if ((b % p) & j).count_ones().is_multiple_of(2) { 1 } else { -1 };
                let sum: i32 = (0..BITS).map(|b| flipped[b] * entry(b) * signs[b / p * p + j]).sum();
                let want = sum as f32 / ((p * BITS) as f32).sqrt();
                assert!((got - want).abs() <= 1e-6 * want.abs(), "{way}: row {r}, column {j}: {got}, expected {want}");
            }
        }
    }
}
