//! The one battery for emitters: run a kernel with each of them on the same bytes and compare what they leave.
//!
//! The interpreter is the oracle; memory around every buffer is watched.

use chimera_codegen::{Allowed, Target, compile};
use chimera_ir::DType;
use chimera_ir::loops::tile::Product;
use chimera_ir::loops::{Buf, Builder, Expr, Kernel, Role, verify};

/// `to [m, n] = x [m, k] y [k, n]`.
pub(crate) fn product(b: &mut Builder, [m, k, n]: [usize; 3], x: Buf, y: Buf, to: Buf) {
    let (left, right) = (
        |_: &mut Builder, i: &Expr, l: &Expr| Expr::load(x, i * k + l),
        |_: &mut Builder, l: &Expr, j: &Expr| Expr::load(y, l * n + j),
    );
    let tiled = Product { m: m.into(), n: n.into(), k: k.into(), a: &left, b: &right, init: None };
    tiled.emit(b, &|b, i, j, v| b.store(to, i * n + j, v));
}

/// A small deterministic generator of numbers.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn float(&mut self) -> f32 {
        match self.below(8) {
            0 => [0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, 3e38, -2.5][self.below(8)],
            1 => self.below(100) as f32 - 50.0,
            _ => (self.bits() >> 40) as f32 / 8_388_608.0 - 1.0,
        }
    }
}

const GUARD: usize = 64;

/// A buffer between two guards, not aligned to more than its elements.
struct Guarded {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Guarded {
    fn new(content: &[u8]) -> Guarded {
        let mut bytes = vec![0xa5; GUARD + 16 + content.len() + GUARD];
        let start = GUARD + 8 - bytes.as_ptr() as usize % 8;
        bytes[start..start + content.len()].copy_from_slice(content);
        Guarded { bytes, start, len: content.len() }
    }

    fn content(&self) -> &[u8] {
        let (before, rest) = self.bytes.split_at(self.start);
        let (content, after) = rest.split_at(self.len);
        assert!(before.iter().chain(after).all(|&b| b == 0xa5), "a kernel wrote outside of its buffer");
        content
    }
}

/// Start contents of every argument. A byte buffer whose name begins with `codes` holds 0, 1 and 2.
pub(crate) fn contents(kernel: &Kernel, seed: u64) -> Vec<Vec<u8>> {
    let mut r = Random(seed);
    let args = kernel.bufs.iter().filter(|b| b.role != Role::Scratch);
    args.map(|b| {
        (0..b.len)
            .flat_map(|_| match b.dtype {
                DType::F32 => r.float().to_le_bytes().to_vec(),
                DType::F64 => f64::from(r.float()).to_le_bytes().to_vec(),
                DType::BF16 => r.float().to_le_bytes()[2..].to_vec(),
                DType::U8 if b.name.starts_with("codes") => vec![(r.bits() % 3) as u8],
                dtype => r.bits().to_le_bytes()[..dtype.size()].to_vec(),
            })
            .collect()
    })
    .collect()
}

/// What a kernel leaves in its arguments.
pub(crate) fn run(kernel: &Kernel, target: &Target, emitters: &str, contents: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let module = compile(&[kernel], target, &Allowed::parse(emitters).unwrap()).unwrap();
    let mut args: Vec<Guarded> = contents.iter().map(|c| Guarded::new(c)).collect();
    let table: Vec<*mut u8> = args.iter_mut().map(|a| a.bytes[a.start..].as_mut_ptr()).collect();
    let mut scratch = vec![0x7fu8; kernel.scratch_bytes() + 64];
    let scratch = &mut scratch[..];
    let aligned = scratch.as_ptr().align_offset(64);
    // SAFETY: the table has a pointer to a buffer of the declared length for every argument, the scratch memory is large enough and
    // aligned, nothing else uses them, and the interpreter checks the indices of the same kernel first.
    unsafe { module.entry(0).call(table.as_ptr(), scratch[aligned..].as_mut_ptr(), 0, kernel.grid as i64) };
    args.iter().map(|a| a.content().to_vec()).collect()
}

/// The targets that this machine can run, beginning with the least.
pub(crate) fn targets() -> Vec<Target> {
    let names = ["x86-64-v2", "x86-64-v3", "x86-64-v3+avxvnni", "x86-64-v4", "aarch64", "host"];
    let all = names.into_iter().map(|n| n.parse::<Target>().unwrap());
    all.filter(|t| t.runs_on(&chimera_codegen::host())).collect()
}

fn canonical(dtype: DType, bytes: &[u8]) -> Vec<u64> {
    let word = |c: &[u8]| c.iter().rev().fold(0, |x, &b| x << 8 | u64::from(b));
    bytes
        .chunks_exact(dtype.size())
        .map(|c| match dtype {
            DType::F32 if f32::from_bits(word(c) as u32).is_nan() => u64::MAX,
            DType::F64 if f64::from_bits(word(c)).is_nan() => u64::MAX,
            _ => word(c),
        })
        .collect()
}

/// Every emitter of machine code must leave what the interpreter leaves, on every target at hand, and must serve the kernel on the host.
pub(crate) fn check(kernel: &Kernel) {
    for emitter in ["wide", "portable"] {
        if emitter == "portable" || cfg!(target_arch = "x86_64") {
            check_emitter(kernel, emitter);
        }
    }
}

fn check_emitter(kernel: &Kernel, emitter: &str) {
    verify(kernel).unwrap();
    for seed in 0..2 {
        let contents = contents(kernel, seed);
        let expected = run(kernel, &chimera_codegen::host(), "interp", &contents);
        let declared: Vec<_> = kernel.bufs.iter().filter(|b| b.role != Role::Scratch).collect();
        for target in targets() {
            let host = target == chimera_codegen::host();
            let fallback = format!("{emitter},interp");
            let found = run(kernel, &target, if host { emitter } else { &fallback }, &contents);
            for ((b, e), f) in declared.iter().zip(&expected).zip(&found) {
                let (e, f) = (canonical(b.dtype, e), canonical(b.dtype, f));
                if let Some(at) = (0..b.len).find(|&i| e[i] != f[i]) {
                    panic!(
                        "kernel {} by {emitter} on {target}, seed {seed}: {}[{at}] is {:x}, the interpreter says {:x}\n{}\n{}",
                        kernel.name,
                        b.name,
                        f[at],
                        e[at],
                        chimera_ir::loops::print(kernel).to_text(),
                        chimera_codegen::disassemble(kernel, &target).unwrap(),
                    );
                }
            }
        }
    }
    let arm = "aarch64+dotprod+i8mm".parse().unwrap();
    assert!(!chimera_codegen::assemble(kernel, &arm).unwrap().is_empty(), "kernel {} on aarch64", kernel.name);
}
