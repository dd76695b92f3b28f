//! Golden cases of quantisation, the ternary product, norms and the loss, by `eval`, the interpreter and every emitter.
//!
//! What the files call exact is compared bit for bit.

use chimera_ir::{
    DType, Data, Tensor, Type,
    loops::{Builder, Expr, Role},
    ops::{
        BlockScales, CrossEntropy, GroupScale, Linear, Norm, NormKind, NormQuantise, PackPanels, PackTernary, Quantise,
        ScaleMode, TernaryDense, TernaryProduct, packed_type,
    },
};
use chimera_tests::{
    clusters::{Runner, all_ways, run},
    golden::{Golden, assert_close},
};

const GROUP: usize = 128;

fn assert_exact(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.ty, want.ty, "{what}");
    let bits = |t: &Tensor| t.as_f32().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(got), bits(want), "{what}");
}

/// Codes as the packed layout states them, from `q` `[m, n]`.
fn pack(q: &Tensor) -> Tensor {
    let (m, n) = (q.ty.dims[0], q.ty.dims[1]);
    let ty = packed_type(&q.ty);
    let (values, kbs) = (q.to_i64(), ty.dims[1]);
    let mut bytes = vec![0u8; ty.numel()];
    for row in 0..ty.dims[0] * 32 {
        for col in 0..kbs * 4 {
            let code = if row < m && col < n { (values[row * n + col] + 1) as u8 } else { 1 };
            let (ob, g, r8) = (row / 32, row % 32 / 8, row % 8);
            bytes[(ob * kbs + col / 4) * 32 + r8 * 4 + col % 4] |= code << (2 * g);
        }
    }
    Tensor { ty, data: Data::U8(bytes) }
}

fn expanded(alpha: &Tensor, q: &Tensor) -> Tensor {
    let (n, nb) = (q.ty.cols(), alpha.ty.cols());
    let scale = |i: usize| alpha.as_f32()[i / n * nb + if nb == 1 { 0 } else { i % n / GROUP }];
    let data = q.to_i64().iter().enumerate().map(|(i, &q)| q as f32 * scale(i)).collect();
    Tensor::f32(&q.ty.dims, data)
}

fn narrow(codes: &Tensor) -> Vec<i64> {
    codes.to_i64()
}

/// Codes padded with zeros to whole blocks, as bytes.
fn padded(codes: &Tensor) -> Tensor {
    let (n, rows) = (codes.ty.cols(), codes.ty.rows());
    let np = n.next_multiple_of(64);
    let values = narrow(codes);
    let at = |i: usize| if i % np < n { values[i / np * n + i % np] as i8 } else { 0 };
    Tensor { ty: Type::new(DType::I8, &[rows, np]), data: Data::I8((0..rows * np).map(at).collect()) }
}

#[test]
fn scales_and_codes_of_weights() {
    for case in 0..5 {
        let g = Golden::open(&format!("quant_{case}"));
        let w = g.tensor("in.W");
        let modes = [
            ("absmean_per_group", ScaleMode::PerGroup(GROUP)),
            ("absmean_per_row", ScaleMode::PerRow),
            ("absmean_per_tensor", ScaleMode::PerTensor),
        ];
        for (name, mode) in modes {
            let alpha = g.tensor(&format!("exact.{name}.alpha"));
            for (way, got) in all_ways(GroupScale { mode }, std::slice::from_ref(&w)) {
                assert_exact(&format!("quant_{case} {name} alpha by {way}"), &got[0], &alpha);
            }
            for (suffix, ratio) in [("", 0.5), ("_ratio_0.7", 0.7)] {
                let q = g.tensor(&format!("exact.{name}.q{suffix}"));
                let ins = [w.clone(), alpha.clone()];
                for (way, got) in all_ways(PackTernary { group: GROUP, ratio }, &ins) {
                    assert_eq!(got[0], pack(&q), "quant_{case} {name}{suffix} codes by {way}");
                }
                for (way, got) in all_ways(TernaryDense { group: GROUP, ratio }, &ins) {
                    assert_eq!(got[0], expanded(&alpha, &q), "quant_{case} {name}{suffix} values by {way}");
                }
            }
        }
    }
}

#[test]
fn codes_of_activations_and_their_product() {
    for case in 0..5 {
        let g = Golden::open(&format!("quant_{case}"));
        let (x, codes, scales) = (g.tensor("in.x"), padded(&g.tensor("exact.xq")), g.tensor("exact.a"));
        for (way, got) in all_ways(Quantise { block: 64 }, &[x]) {
            assert_eq!(got[0], codes, "quant_{case} codes by {way}");
            assert_exact(&format!("quant_{case} scales by {way}"), &got[1], &scales);
        }
        let (q, alpha) = (g.tensor("exact.absmean_per_group.q"), g.tensor("exact.absmean_per_group.alpha"));
        let (packed, m) = (pack(&q), q.ty.dims[0]);
        let op = TernaryProduct { m, group: GROUP, block: 64, n_weights: 1, grouped_rows: false };
        let alpha = blocked(&alpha);
        for (way, got) in all_ways(op.clone(), &[codes.clone(), scales.clone(), packed.clone(), alpha.clone()]) {
            assert_exact(&format!("quant_{case} product by {way}"), &got[0], &g.tensor("exact.y"));
        }
        // With all scales 1 and one block left, a product is the integer sum of that block.
        let dots = g.tensor("exact.block_dots").to_i64();
        let blocks = scales.ty.cols();
        let ones = |t: &Tensor| Tensor::f32(&t.ty.dims, vec![1.0; t.ty.numel()]);
        for c in 0..blocks {
            let (np, all) = (codes.ty.cols(), narrow(&codes));
            let kept = (0..all.len()).map(|i| if i % np / 64 == c { all[i] as i8 } else { 0 }).collect();
            let kept = Tensor { ty: codes.ty.clone(), data: Data::I8(kept) };
            let want = dots.iter().skip(c).step_by(blocks).map(|&p| p as f32).collect();
            let want = Tensor::f32(&[codes.ty.rows(), m], want);
            for (way, got) in all_ways(op.clone(), &[kept, ones(&scales), packed.clone(), ones(&alpha)]) {
                assert_eq!(got[0], want, "quant_{case} sums of block {c} by {way}");
            }
        }
    }
}

/// Scales in the layout that a product reads, by the last way.
fn blocked(alpha: &Tensor) -> Tensor {
    all_ways(BlockScales {}, std::slice::from_ref(alpha)).remove(0).1.remove(0)
}

/// Scales and packed codes of the weight of a `bitlinear` case.
fn ternary_weight(g: &Golden) -> (Tensor, Tensor, Tensor) {
    let w = g.tensor("param.weight");
    let alpha =
        all_ways(GroupScale { mode: ScaleMode::PerGroup(GROUP) }, std::slice::from_ref(&w)).remove(0).1.remove(0);
    let packed = all_ways(PackTernary { group: GROUP, ratio: 0.5 }, &[w.clone(), alpha.clone()]).remove(0).1.remove(0);
    (w, packed, alpha)
}

/// `x W^T` for the ternary values of `w` as floats, by every way.
fn dense_product(x: &Tensor, w: &Tensor, alpha: &Tensor) -> Vec<(&'static str, Tensor)> {
    let dense = all_ways(TernaryDense { group: GROUP, ratio: 0.5 }, &[w.clone(), alpha.clone()]).remove(0).1.remove(0);
    let panels = all_ways(PackPanels {}, &[dense]).remove(0).1.remove(0);
    let op = Linear { m: w.ty.dims[0], grouped_rows: false };
    all_ways(op, &[x.clone(), panels]).into_iter().map(|(way, mut y)| (way, y.remove(0))).collect()
}

#[test]
fn bit_linear_with_a_scale_for_each_block() {
    let g = Golden::open("bitlinear_absmax_per_block");
    let (w, packed, alpha) = ternary_weight(&g);
    let (rtol, atol) = (g.tolerance("rtol"), g.tolerance("atol"));
    let norm = NormQuantise { kind: NormKind::Rms, eps: 1e-6, block: 64 };
    for (first, outs) in all_ways(norm, &[g.tensor("in.x")]) {
        let op = TernaryProduct { m: w.ty.dims[0], group: GROUP, block: 64, n_weights: 1, grouped_rows: false };
        let ins = [outs[1].clone(), outs[2].clone(), packed.clone(), blocked(&alpha)];
        for (way, y) in all_ways(op, &ins) {
            assert_close(&format!("norm by {first}, product by {way}"), &y[0], &g.tensor("out.y"), rtol, atol);
        }
    }
}

/// The file's own result is zero (its scales of groups never meet a block as long as the row), so the product of dequantised values
/// stands in for it: the sum over weight groups of `alpha` times the exact integer sum times the one scale of the row.
#[test]
fn bit_linear_with_a_scale_for_each_token() {
    let g = Golden::open("bitlinear_absmax_per_token");
    assert!(g.tensor("out.y").as_f32().iter().all(|&y| y == 0.0), "the file has a result now: compare with it");
    let (w, packed, alpha) = ternary_weight(&g);
    let (rtol, atol) = (g.tolerance("rtol"), g.tolerance("atol"));
    let norm = NormQuantise { kind: NormKind::Rms, eps: 1e-6, block: 0 };
    for (first, outs) in all_ways(norm, &[g.tensor("in.x")]) {
        let (codes, n) = (narrow(&outs[1]), w.ty.cols());
        let np = outs[1].ty.cols();
        let value = |i: usize| codes[i / n * np + i % n] as f32 * outs[2].as_f32()[i / n];
        let x = Tensor::f32(&[outs[1].ty.rows(), n], (0..outs[1].ty.rows() * n).map(value).collect());
        let want = dense_product(&x, &w, &alpha).remove(0).1;
        let op = TernaryProduct { m: w.ty.dims[0], group: GROUP, block: 0, n_weights: 1, grouped_rows: false };
        let ins = [outs[1].clone(), outs[2].clone(), packed.clone(), blocked(&alpha)];
        for (way, y) in all_ways(op, &ins) {
            let y = Tensor::f32(&want.ty.dims, y[0].as_f32().to_vec());
            assert_close(&format!("norm by {first}, product by {way}"), &y, &want, rtol, atol);
        }
    }
}

#[test]
fn bit_linear_on_floats() {
    let g = Golden::open("bitlinear_none");
    let (w, _, alpha) = ternary_weight(&g);
    let (rtol, atol) = (g.tolerance("rtol"), g.tolerance("atol"));
    let norm = Norm { kind: NormKind::Rms, width: w.ty.cols(), eps: 1e-6 };
    for (first, outs) in all_ways(norm, &[g.tensor("in.x")]) {
        for (way, y) in dense_product(&outs[0], &w, &alpha) {
            assert_close(&format!("norm by {first}, product by {way}"), &y, &g.tensor("out.y"), rtol, atol);
        }
    }
}

#[test]
fn norm_then_quantise_is_the_composite() {
    let x = Golden::open("rms_norm").tensor("in.x");
    for block in [0, 64, 128] {
        let both = all_ways(NormQuantise { kind: NormKind::Rms, eps: 1e-6, block }, std::slice::from_ref(&x));
        let norm = all_ways(Norm { kind: NormKind::Rms, width: x.ty.cols(), eps: 1e-6 }, std::slice::from_ref(&x));
        for ((way, both), (_, norm)) in both.into_iter().zip(norm) {
            let codes = all_ways(Quantise { block }, &norm)
                .into_iter()
                .find(|(other, _)| *other == way)
                .expect("the same ways")
                .1;
            assert_eq!(both, [norm, codes].concat(), "block {block} by {way}");
        }
    }
}

#[test]
fn rms_norm_with_gain() {
    let g = Golden::open("rms_norm");
    let (x, gain) = (g.tensor("in.x"), g.tensor("param.gain"));
    for (way, y) in all_ways(Norm { kind: NormKind::Rms, width: x.ty.cols(), eps: 1e-6 }, &[x.clone(), gain.clone()]) {
        assert_close(way, &y[0], &g.tensor("out.y"), g.tolerance("rtol"), g.tolerance("atol"));
    }
}

#[test]
fn cross_entropy() {
    let g = Golden::open("cross_entropy");
    let (h, e, labels) = (g.tensor("in.h"), g.tensor("in.E"), g.tensor("in.labels"));
    let (rows, n) = (h.ty.dims[0], h.ty.dims[1]);
    let panels = all_ways(PackPanels {}, std::slice::from_ref(&e)).remove(0).1.remove(0);
    let h = Tensor::f32(&[1, rows, n], h.as_f32().to_vec());
    let labels = Tensor { ty: Type::i32(&[1, rows]), data: labels.data };
    let want = Tensor::f32(&[1, rows], g.tensor("out.y").as_f32().to_vec());
    for (way, y) in all_ways(CrossEntropy { vocab: e.ty.dims[0] }, &[h, panels, labels]) {
        assert_close(way, &y[0], &want, g.tolerance("rtol"), g.tolerance("atol"));
    }
}

#[test]
fn fused_multiply_add_rounds_once() {
    let g = Golden::open("fma32");
    let ins = ["in.a", "in.b", "in.c"].map(|name| g.tensor(name));
    let n = ins[0].ty.numel();
    let mut b = Builder::new("fma");
    let bufs = ["a", "b", "c"].map(|name| b.buf(name, DType::F32, n, Role::In));
    let out = b.buf("y", DType::F32, n, Role::Out);
    b.lanes(0, n, 1, |b, i| {
        let [x, y, z] = bufs.map(|buf| Expr::load(buf, &i));
        b.store(out, i, x.fma(y, z));
    });
    let kernel = b.finish();
    let emitters = chimera_codegen::emitters().iter().map(|e| Runner::Emitter(e.name()));
    for runner in [Runner::Reference].into_iter().chain(emitters) {
        let mut args: Vec<Data> = ins.iter().map(|t| t.data.clone()).chain([Data::zeros(DType::F32, n)]).collect();
        run(&kernel, runner, &mut args, &[(0, 1)]).unwrap_or_else(|e| panic!("{runner:?}: {e}"));
        let got = Tensor { ty: ins[0].ty.clone(), data: args.remove(3) };
        assert_exact(&format!("{runner:?}"), &got, &g.tensor("exact.y"));
    }
}
