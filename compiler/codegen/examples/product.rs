//! Measure kernels.
use chimera_codegen::*;
use chimera_ir::{lower::*, ops::*, *};
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let what = args.get(1).map(String::as_str).unwrap_or("all");
    let asm = args.iter().any(|a| a == "--asm");
    let target = host();
    let mut cases: Vec<(String, Op, Vec<Type>, f64)> = vec![];
    let product = |rows: usize, m: usize, n: usize, k: usize, block: usize| {
        let op = TernaryProduct { m, group: 128, block, n_weights: k, grouped_rows: false };
        let mut ins =
            vec![Type::new(DType::I8, &[rows, n]), Type::f32(&[rows, if block == 0 { 1 } else { n.div_ceil(block) }])];
        for _ in 0..k {
            ins.push(Type::new(DType::U8, &[m.div_ceil(32), n / 4, 32]));
            ins.push(Type::f32(&[m, n.div_ceil(128)]));
        }
        (format!("ternary {rows}x{m}x{n} w{k} b{block}"), Op::from(op), ins, (rows * m * n * k) as f64)
    };
    for (r, m, n, k) in [
        (252, 512, 512, 1),
        (252, 128, 128, 1),
        (252, 384, 128, 2),
        (252, 256, 256, 1),
        (252, 2560, 2560, 1),
        (24, 512, 512, 1),
        (12, 512, 512, 1),
        (8, 512, 512, 1),
        (4, 512, 512, 1),
        (2, 512, 512, 1),
        (1, 512, 512, 1),
        (1, 2560, 2560, 1),
    ] {
        cases.push(product(r, m, n, k, 64));
    }
    let linear = |rows: usize, m: usize, n: usize| {
        let ins = vec![Type::f32(&[rows, n]), Type::f32(&[m.div_ceil(16), n, 16])];
        (format!("linear {rows}x{m}x{n}"), Op::from(Linear { m, grouped_rows: false }), ins, (rows * m * n) as f64)
    };
    for (r, m, n) in [(252, 512, 512), (252, 4, 128), (252, 40, 256), (1, 8192, 256), (1, 512, 512)] {
        cases.push(linear(r, m, n));
    }
    let ce = |rows: usize, v: usize, n: usize| {
        let ins = vec![Type::f32(&[4, rows / 4, n]), Type::f32(&[v.div_ceil(16), n, 16]), Type::i32(&[4, rows / 4])];
        (format!("cross_entropy {rows}x{v}x{n}"), Op::from(CrossEntropy { vocab: v }), ins, (rows * v * n) as f64)
    };
    for (r, v, n) in [(252, 8192, 128), (252, 8192, 256), (252, 8192, 512), (252, 256, 64)] {
        cases.push(ce(r, v, n));
    }
    let nq = |rows: usize, n: usize| {
        let ins = vec![Type::f32(&[rows, n]), Type::f32(&[n])];
        (
            format!("norm_quantise {rows}x{n}"),
            Op::from(NormQuantise { kind: NormKind::Rms, eps: 1e-6, block: 64 }),
            ins,
            (rows * n) as f64,
        )
    };
    cases.push(nq(252, 512));
    cases.push((
        format!("norm 252x512"),
        Op::from(Norm { kind: NormKind::Rms, width: 512, eps: 1e-6 }),
        vec![Type::f32(&[252, 512]), Type::f32(&[512])],
        252.0 * 512.0,
    ));
    cases.push((
        "pack 512x512".into(),
        Op::from(PackTernary { group: 128, ratio: 0.5 }),
        vec![Type::f32(&[512, 512]), Type::f32(&[512, 4])],
        512.0 * 512.0,
    ));
    cases.push((
        "scale 512x512".into(),
        Op::from(GroupScale { mode: ScaleMode::PerGroup(128) }),
        vec![Type::f32(&[512, 512])],
        512.0 * 512.0,
    ));
    cases.push(("panels 8192x256".into(), Op::from(PackPanels {}), vec![Type::f32(&[8192, 256])], 8192.0 * 256.0));
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    for (name, op, types, work) in cases {
        if what != "all" && !name.contains(what) {
            continue;
        }
        let cluster = Cluster::single(op.clone(), &types).unwrap();
        let kernel = cluster.lower();
        let start = Instant::now();
        let module = compile(&[&kernel], &target, &Allowed::parse("portable").unwrap()).unwrap();
        let compile_ms = start.elapsed().as_secs_f64() * 1e3;
        if asm {
            println!("{}", disassemble(&kernel, &target).unwrap());
        }
        let mut data: Vec<Vec<u8>> = types
            .iter()
            .enumerate()
            .map(|(k, ty)| {
                let t = op.sample_input(k, ty, &mut random);
                match t.data {
                    Data::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
                    Data::I32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
                    Data::I8(v) => v.iter().map(|x| *x as u8).collect(),
                    Data::U8(v) => v,
                    _ => panic!(),
                }
            })
            .collect();
        data.extend(op.infer(&types).unwrap().iter().map(|t| vec![0; t.bytes()]));
        let pointers: Vec<*mut u8> = data.iter_mut().map(|d| d.as_mut_ptr()).collect();
        let mut scratch = vec![0u8; kernel.scratch_bytes() + 64];
        let at = scratch.as_ptr().align_offset(64);
        let mut best = f64::MAX;
        let begin = Instant::now();
        let mut n = 0;
        while n < 10 || (begin.elapsed().as_secs_f64() < 0.4 && n < 3000) {
            let start = Instant::now();
            unsafe { module.entry(0).call(pointers.as_ptr(), scratch.as_mut_ptr().add(at), 0, kernel.grid as i64) };
            best = best.min(start.elapsed().as_secs_f64());
            n += 1;
        }
        println!(
            "{name:36} grid {:5}  {:9.1} us  {:8.2} G/s  compile {compile_ms:.1} ms  {} B  scratch {} B",
            kernel.grid,
            best * 1e6,
            work / best / 1e9,
            module.kernels[0].code_bytes,
            kernel.scratch_bytes()
        );
    }
}
