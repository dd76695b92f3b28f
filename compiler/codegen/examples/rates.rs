//! Prints what the emitters reach on this machine: a float product, a byte dot product, an elementwise function, a norm.
//!
//! `cargo run --release -p chimera-codegen --example rates [target] [--asm]`

#![allow(clippy::print_stdout, reason = "it is a command line program")]

use std::time::Instant;

use chimera_codegen::{Allowed, Target, compile, disassemble};
use chimera_ir::DType;
use chimera_ir::loops::tile::Product;
use chimera_ir::loops::{Acc, Builder, Expr, Kernel, Role, i32c, math};

/// `z = x y` with `y` packed into panels of eight columns.
fn product(m: usize, k: usize, n: usize) -> Kernel {
    let mut b = Builder::new("product");
    let x = b.buf("x", DType::F32, m * k, Role::In);
    let y = b.buf("y", DType::F32, k * n, Role::In);
    let z = b.buf("z", DType::F32, m * n, Role::Out);
    let p = b.grid(n / 8);
    Product {
        m: m.into(),
        n: 8.into(),
        k: k.into(),
        a: &|_, i, l| Expr::load(x, i * k + l),
        b: &|_, l, j| Expr::load(y, (&p * k + l) * 8 + j),
        init: None,
    }
    .emit(&mut b, &|b, i, j, v| b.store(z, i * n + &p * 8 + j, v));
    b.finish()
}

/// Ternary codes times bytes: tiles of four rows and eight columns.
fn dots(m: usize, k: usize, n: usize) -> Kernel {
    let mut b = Builder::new("dots");
    let codes = b.buf("codes", DType::U8, k * n, Role::In);
    let x = b.buf("x", DType::I8, m * k, Role::In);
    let z = b.buf("z", DType::I32, m * n, Role::Out);
    let p = b.grid(n / 8);
    b.each_step(0, m, 4, |b, i| {
        b.lanes(0, 8, 2, |b, j| {
            let accs: Vec<_> = (0..4).map(|_| b.local(i32c(0))).collect();
            b.each(0, k / 4, |b, l| {
                let q = b.bind(Expr::word(codes, (&p * (k / 4) + &l) * 8 + &j));
                for (r, acc) in accs.iter().enumerate() {
                    let a = b.bind(Expr::word(x, (&i + r) * (k / 4) + &l));
                    b.set(*acc, Expr::from(*acc).dot4(&q, a));
                }
            });
            for (r, acc) in accs.iter().enumerate() {
                b.store(z, (&i + r) * n + &p * 8 + &j, *acc);
            }
        });
    });
    b.finish()
}

fn silu(n: usize) -> Kernel {
    let mut b = Builder::new("silu");
    let x = b.buf("x", DType::F32, n, Role::In);
    let y = b.buf("y", DType::F32, n, Role::In);
    let z = b.buf("z", DType::F32, n, Role::Out);
    b.lanes(0, n, 2, |b, i| {
        let v = math::silu(b, Expr::load(x, &i)) * Expr::load(y, &i);
        b.store(z, i, v);
    });
    b.finish()
}

fn norm(n: usize) -> Kernel {
    let mut b = Builder::new("norm");
    let x = b.buf("x", DType::F32, n, Role::In);
    let z = b.buf("z", DType::F32, n, Role::Out);
    let s = b.reduce(0, n, |b, i| {
        let v = b.bind(Expr::load(x, i));
        vec![Acc::Dot(v.clone(), v)]
    });
    let r = b.bind(math::rsqrt(&s[0] * (1.0 / n as f32) + 1e-6));
    b.lanes(0, n, 4, |b, i| b.store(z, &i, Expr::load(x, &i) * &r));
    b.finish()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut target: Target = chimera_codegen::host();
    let mut asm = false;
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--asm" => asm = true,
            name => target = name.parse()?,
        }
    }
    println!("target {target}");
    let gmac = (252 * 256 * 256) as f64 * 1e-9;
    for (kernel, work, unit) in [
        (product(252, 256, 256), 2.0 * gmac, "GFLOP/s"),
        (dots(252, 256, 256), gmac, "GMAC/s"),
        (silu(2560), 2560e-9, "G elements/s"),
        (norm(2560), 2560e-9, "G elements/s"),
    ] {
        let start = Instant::now();
        let module = compile(&[&kernel], &target, &Allowed::all())?;
        let compile_time = start.elapsed();
        let mut args: Vec<Vec<f32>> =
            kernel.bufs.iter().map(|b| vec![0.0; (b.len * b.dtype.size()).div_ceil(4)]).collect();
        let table: Vec<*mut u8> = args.iter_mut().map(|a| a.as_mut_ptr().cast()).collect();
        let mut scratch = vec![0u8; kernel.scratch_bytes() + 64];
        let at = scratch.as_ptr().align_offset(64);
        let mut best = f64::INFINITY;
        for _ in 0..60 {
            let start = Instant::now();
            let runs = (0.2 / (work * 20.0)).clamp(1.0, 2000.0) as usize;
            for _ in 0..runs {
                // SAFETY: one buffer of the declared size for every argument, aligned scratch memory of the declared size, the whole grid.
                unsafe { module.entry(0).call(table.as_ptr(), scratch[at..].as_mut_ptr(), 0, kernel.grid as i64) };
            }
            best = best.min(start.elapsed().as_secs_f64() / runs as f64);
        }
        let compiled = &module.kernels[0];
        println!(
            "{:8} {:8} {:7.2} {unit}, {} bytes compiled in {:.2} ms",
            kernel.name,
            compiled.emitter,
            work / best,
            compiled.code_bytes,
            compile_time.as_secs_f64() * 1e3
        );
        if asm {
            println!("{}", disassemble(&kernel, &target)?);
        }
    }
    Ok(())
}
