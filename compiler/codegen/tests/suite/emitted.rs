//! Properties of the emitted code and of the choice of emitters.

use crate::support::product;
use chimera_codegen::{Allowed, CodegenError, Target, assemble, compile, disassemble, host};
use chimera_ir::loops::{Builder, Expr, Kernel, Role, f32c, i32c};
use chimera_ir::lower::Cluster;
use chimera_ir::ops::{GatedDelta, Mlstm, TernaryProduct, TitansMemory, WindowAttention, blocked_type, packed_type};
use chimera_ir::{DType, Type};

fn one_product(m: usize, k: usize, n: usize) -> Kernel {
    let mut b = Builder::new("product");
    let x = b.buf("x", DType::F32, m * k, Role::In);
    let y = b.buf("y", DType::F32, k * n, Role::In);
    let z = b.buf("z", DType::F32, m * n, Role::Out);
    product(&mut b, [m, k, n], x, y, z);
    b.finish()
}

fn dots() -> Kernel {
    let mut b = Builder::new("dots");
    let codes = b.buf("codes", DType::U8, 4 * 8 * 20, Role::In);
    let x = b.buf("x", DType::I8, 4 * 20, Role::In);
    let z = b.buf("z", DType::I32, 8, Role::Out);
    b.lanes(0, 8, 2, |b, j| {
        let acc = b.local(i32c(0));
        b.each(0, 20, |b, k| {
            let q = Expr::word(codes, &k * 8 + &j);
            b.set(acc, Expr::from(acc).dot4(q, Expr::word(x, &k)));
        });
        b.store(z, j, acc);
    });
    b.finish()
}

/// Adds one to numbers and hints at others, of which the last lie far behind the buffer.
fn hints() -> Kernel {
    let mut b = Builder::new("hints");
    let x = b.buf("x", DType::F32, 64, Role::In);
    let z = b.buf("z", DType::F32, 64, Role::Out);
    let g = b.grid(4);
    b.prefetch(x, &g * (1 << 26) - 64);
    b.lanes(0, 16, 1, |b, i| {
        let at = b.bind(&g * 16 + i);
        b.prefetch(x, &at + 16);
        b.store(z, &at, Expr::load(x, &at) + f32c(1.0));
    });
    b.finish()
}

#[test]
fn prefetches_are_emitted_once_for_all_lanes_and_never_fault() {
    let text = disassemble(&hints(), &target("x86-64-v3")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(count(&lines, "prefetcht0"), 2, "one outside and one for two vectors of eight lanes:\n{text}");
    crate::support::check(&hints());
}

fn target(name: &str) -> Target {
    name.parse().unwrap()
}

/// The instructions of every loop without another one in it: from the target of a backward jump to that jump.
fn innermost_loops(text: &str) -> Vec<Vec<&str>> {
    let offset = |l: &str| u64::from_str_radix(l.split_whitespace().next()?, 16).ok();
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with(';')).collect();
    let mut loops: Vec<(usize, usize)> = vec![];
    for (n, line) in lines.iter().enumerate() {
        let mut words = line.split_whitespace().skip(1);
        let Some(to) = words.next().filter(|w| w.starts_with('j')).and(words.last()) else { continue };
        let to = u64::from_str_radix(to.trim_end_matches('h'), 16).ok();
        if let Some(first) = lines[..=n].iter().position(|l| to.is_some() && offset(l) == to) {
            // Loops close from the inside.
            if loops.last().is_none_or(|&(inner, _)| inner < first) {
                loops.push((first, n));
            }
        }
    }
    assert!(!loops.is_empty(), "no loop in\n{text}");
    loops.into_iter().map(|(first, last)| lines[first..=last].to_vec()).collect()
}

/// The first of them.
fn innermost(text: &str) -> Vec<&str> {
    innermost_loops(text).swap_remove(0)
}

fn count(lines: &[&str], mnemonic: &str) -> usize {
    lines.iter().filter(|l| l.contains(mnemonic)).count()
}

#[test]
fn code_is_a_function_of_kernel_and_target() {
    for name in ["x86-64-v3", "x86-64-v4", "aarch64"] {
        let kernels = [one_product(7, 5, 20), dots()];
        let first = kernels.each_ref().map(|k| assemble(k, &target(name)).unwrap());
        let again = kernels.each_ref().map(|k| assemble(&k.clone(), &target(name)).unwrap());
        assert!(first.iter().all(|code| !code.is_empty()));
        assert_eq!(first, again);
    }
}

/// A step of a tile of four rows and two vectors: sixteen lanes of 32 bits.
#[test]
fn the_inner_loop_of_a_tile_stays_in_registers() {
    let text = disassemble(&one_product(8, 64, 64), &target("x86-64-v3")).unwrap();
    let inner = innermost(&text);
    assert_eq!(count(&inner, "vfmadd231ps ymm"), 8, "{}", inner.join("\n"));
    assert_eq!(count(&inner, "rsp"), 0, "{}", inner.join("\n"));
    assert!(inner.len() <= 18, "{}", inner.join("\n"));
    assert!(!text.contains(" call "), "{text}");
}

fn of_op(op: impl Into<chimera_ir::Op>, types: &[Type]) -> Kernel {
    Cluster::single(op.into(), types).unwrap().lower()
}

/// Recurrences, attention and a product whose registers do not suffice for the whole function.
fn under_pressure() -> Vec<Kernel> {
    let (rows, tokens, heads, width) = (2, 128, 4, 32);
    let x = Type::f32(&[rows, tokens, heads * width]);
    let (gate, pos) = (Type::f32(&[rows, tokens, heads]), Type::i32(&[rows, tokens]));
    let operands = |n: usize, gates: usize| [vec![x.clone(); n], vec![gate.clone(); gates], vec![pos.clone()]].concat();
    let memory = vec![Type::f32(&[heads, width, width]); 2];
    let slots = Type::f32(&[4, heads * width]);
    let attention = [vec![x.clone(); 4], vec![slots; 2], vec![x.clone(); 2], vec![pos.clone()]].concat();
    let (m, n, k) = (66, 256, 256);
    let packed = packed_type(&Type::f32(&[n, k]));
    let scales = [Type::f32(&[m, k / 64]), blocked_type(&Type::f32(&[n, k / 128]))];
    let product = [Type::new(DType::I8, &[m, k]), scales[0].clone(), packed, scales[1].clone()];
    vec![
        of_op(GatedDelta { heads, chunk: 64, carry: false }, &operands(3, 2)),
        of_op(Mlstm { heads, chunk: 64, carry: false }, &operands(3, 2)),
        of_op(
            TitansMemory { heads, inner: 16, normalise: true, chunked: true, carry: false },
            &[operands(3, 3), memory].concat(),
        ),
        of_op(WindowAttention { heads, window: 64, carry: false }, &attention),
        of_op(TernaryProduct { m: n, group: 128, block: 64, n_weights: 1, grouped_rows: false }, &product),
    ]
}

#[test]
fn innermost_loops_hold_what_they_need_in_registers() {
    for kernel in under_pressure() {
        let text = disassemble(&kernel, &target("x86-64-v3")).unwrap();
        assert!(text.contains("[rsp"), "kernel {} is no test of this", kernel.name);
        for inner in innermost_loops(&text) {
            assert_eq!(count(&inner, "rsp"), 0, "kernel {}\n{}", kernel.name, inner.join("\n"));
        }
    }
}

/// The instructions that are marked as the hottest.
fn hot(text: &str) -> Vec<&str> {
    let from = text.lines().skip_while(|l| *l != "; hot loop").skip(1);
    from.take_while(|l| *l != "; end of the hot loop").collect()
}

#[test]
fn the_hot_loop_is_marked_and_works_on_whole_vectors() {
    for (kernel, mnemonic) in [(one_product(8, 64, 64), "vfmadd231ps"), (under_pressure().swap_remove(4), "vpmaddubsw")]
    {
        let text = disassemble(&kernel, &target("x86-64-v3")).unwrap();
        let hot = hot(&text);
        assert!(innermost_loops(&text).contains(&hot) && count(&hot, mnemonic) > 0, "{text}");
        assert_eq!(count(&hot, "xmm"), 0, "{}", hot.join("\n"));
    }
}

#[test]
fn upper_halves_are_clean_on_return() {
    for kernel in under_pressure() {
        for name in TARGETS {
            let text = disassemble(&kernel, &target(name)).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            for (n, line) in lines.iter().enumerate().filter(|(_, l)| l.trim_end().ends_with("ret")) {
                assert!(lines[n - 1].contains("vzeroupper"), "kernel {} for {name}: {line}", kernel.name);
            }
        }
    }
}

/// Those with fused byte products at their full width are the second and the last.
const TARGETS: [&str; 5] = ["x86-64-v3", "x86-64-v3+avxvnni", "x86-64-v4", "x86-64-v4+avxvnni", "x86-64-v4+avx512vnni"];

#[test]
fn instructions_are_those_of_the_target() {
    let kernel = under_pressure().swap_remove(4);
    for (n, name) in TARGETS.into_iter().enumerate() {
        let text = disassemble(&kernel, &target(name)).unwrap();
        assert!(text.starts_with("; wide"), "{name}");
        let fused = matches!(n, 1 | 4);
        assert_eq!(text.contains("vpdpbusd"), fused, "{name}");
        assert_eq!(text.contains("vpmaddubsw"), !fused, "{name}");
        assert_eq!(text.contains("zmm"), name.contains("v4"), "{name}");
    }
}

#[test]
fn byte_dots_use_what_the_target_has() {
    let inner = |name| disassemble(&dots(), &target(name)).unwrap();
    let plain = inner("x86-64-v3");
    assert!(plain.contains("vpmaddubsw") && plain.contains("vpmaddwd"), "{plain}");
    for name in ["x86-64-v3+avxvnni", "x86-64-v4+avx512vnni"] {
        let fused = inner(name);
        assert!(fused.contains("vpdpbusd") && !fused.contains("vpmaddubsw"), "{fused}");
    }
    let arm = inner("aarch64+dotprod+i8mm");
    assert!(arm.contains("usdot"), "{arm}");
}

#[test]
fn a_target_without_fused_multiply_add_is_refused_with_the_reason() {
    let mut avx = Target::baseline(chimera_codegen::Arch::X86_64);
    for f in target("x86-64-v3").features().filter(|f| f.name() != "fma") {
        avx = avx.with(f);
    }
    if !avx.runs_on(&host()) {
        return;
    }
    let module = compile(&[one_product(4, 4, 8), dots()], &avx, &Allowed::all()).unwrap();
    let [first, second] = &module.kernels[..] else { panic!("two kernels") };
    assert_eq!((first.emitter, first.code_bytes), ("interp", 0));
    assert!(first.refusals[0].1.0.contains("lacks fma"));
    assert!(first.refusals[1].1.0.contains("fused multiply-add"));
    assert_eq!(second.emitter, "portable");
    let error = compile(&[one_product(4, 4, 8)], &avx, &Allowed::parse("portable").unwrap()).unwrap_err();
    assert!(error.to_string().contains("fused multiply-add"), "{error}");
}

#[test]
fn emitters_are_chosen_by_name() {
    let kernels = [one_product(4, 4, 8)];
    for name in ["interp", "portable", "wide"] {
        let module = compile(&kernels, &host(), &Allowed::parse(name).unwrap()).unwrap();
        assert_eq!(module.kernels[0].emitter, name);
    }
    let all = compile(&kernels, &host(), &Allowed::parse("interp, portable, wide").unwrap()).unwrap();
    assert_eq!(all.kernels[0].emitter, "wide");
    let error = Allowed::parse("portabel").unwrap_err();
    assert!(matches!(&error, CodegenError::UnknownEmitter { .. }) && error.to_string().contains("portable"));
}

#[test]
fn foreign_targets_are_assembled_but_not_run() {
    let foreign = if host().arch().name() == "aarch64" { "x86-64-v3" } else { "aarch64" };
    let error = compile(&[dots()], &target(foreign), &Allowed::all()).unwrap_err();
    assert!(error.to_string().contains(foreign), "{error}");
    assert!(!disassemble(&dots(), &target(foreign)).unwrap().is_empty());
}

#[test]
fn an_ill_formed_kernel_is_an_error() {
    let mut b = Builder::new("ill");
    let x = b.buf("x", DType::F32, 4, Role::In);
    b.store(x, 0, f32c(1.0));
    let error = compile(&[b.finish()], &host(), &Allowed::all()).unwrap_err();
    assert!(matches!(error, CodegenError::Kernel(_)), "{error}");
}

#[test]
fn entries_outlive_their_module_and_run_on_many_threads() {
    let kernels: Vec<Kernel> = (1..6).map(|n| one_product(n, 3, 9)).collect();
    let entries: Vec<_> = {
        let module = compile(&kernels, &host(), &Allowed::all()).unwrap();
        (0..kernels.len()).map(|n| module.entry(n).clone()).collect()
    };
    std::thread::scope(|scope| {
        for (entry, kernel) in entries.iter().zip(&kernels) {
            scope.spawn(move || {
                let contents = crate::support::contents(kernel, 1);
                let mut args = contents.clone();
                let table: Vec<*mut u8> = args.iter_mut().map(|a| a.as_mut_ptr()).collect();
                // SAFETY: one buffer of the declared length for every argument, no scratch memory, the whole grid.
                unsafe { entry.call(table.as_ptr(), std::ptr::null_mut(), 0, 1) };
                assert_eq!(args, crate::support::run(kernel, &host(), "interp", &contents));
            });
        }
    });
}
