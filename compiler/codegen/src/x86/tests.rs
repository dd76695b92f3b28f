//! Flat functions run on this machine and agree with what their operations mean.
//!
//! Every function runs with all registers, with few, with none and, where there are EVEX prefixes, with those only these reach.

mod arithmetic;
mod control;
mod random;
mod vectors;

use iced_x86::{Decoder, DecoderOptions, Register};

use super::alloc::Available;
use super::encode::emit_within;
use super::flat::{Base, Class, Function, IntArg, Mem, Node, Op, Reg, Width};
use crate::memory::CodeMemory;
use crate::{Target, host, portable};

/// Numbers that look random, the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
}

/// The targets that this machine can run.
fn targets() -> Vec<Target> {
    let names = ["x86-64-v3", "x86-64-v3+avxvnni", "x86-64-v4+avx512vnni"];
    names.iter().map(|n| n.parse().unwrap()).filter(|t: &Target| t.runs_on(&host())).collect()
}

fn has_z(target: &Target) -> bool {
    super::encode::widest(target) == Width::Z
}

/// Choices of registers that together reach every form of operand.
fn choices(target: &Target) -> Vec<Available> {
    let all = Available::all(16);
    let mut out = vec![
        all,
        Available { ints: 0, vecs: 0 },
        Available { ints: 0b1, vecs: 0b1 },
        Available { ints: 0b1100, vecs: 0b110 },
        Available { ints: 0x3008, vecs: 0x2400 },
    ];
    if has_z(target) {
        out.push(Available::all(32));
        out.push(Available { vecs: 0xffff_0000, ..all });
        out.push(Available { ints: 0b10, vecs: 0x8001_0000 });
    }
    out
}

fn code(f: &mut Function, target: &Target, available: Available) -> Vec<u8> {
    emit_within(f, target, Some(available)).unwrap()
}

fn run(bytes: &[u8], target: &Target, args: [i64; 4]) {
    let memory = CodeMemory::place(portable::isa(target), &[bytes]).unwrap();
    // SAFETY: the code was emitted for this signature, for a target that runs here.
    let f: unsafe extern "sysv64" fn(i64, i64, i64, i64) = unsafe { std::mem::transmute(memory.entry(0)) };
    // SAFETY: the functions of these tests touch what their arguments point to.
    unsafe { f(args[0], args[1], args[2], args[3]) }
}

/// A function under construction; its arguments are pointers to input and output and two numbers.
struct Build {
    f: Function,
    nodes: Vec<Node>,
    /// No instruction may read more bytes of the input.
    limit: usize,
}

impl Build {
    fn new() -> Build {
        let mut f = Function::default();
        f.args = (0..4).map(|_| f.reg(Class::Int)).collect();
        Build { f, nodes: vec![], limit: 64 }
    }

    fn int(&mut self) -> Reg {
        self.f.reg(Class::Int)
    }

    fn vec(&mut self) -> Reg {
        self.f.reg(Class::Vec)
    }

    fn op(&mut self, op: Op) {
        self.nodes.push(Node::Op(op));
    }

    fn input(&self, at: i32) -> Mem {
        Mem { base: Base::Reg(self.f.args[0]), index: None, disp: at }
    }

    fn output(&self, at: i32) -> Mem {
        Mem { base: Base::Reg(self.f.args[1]), index: None, disp: at }
    }

    /// Run with every choice of registers; `check` sees the output after each.
    fn run(mut self, target: &Target, input: &[u8], numbers: [i64; 2], check: &mut dyn FnMut(&[u8], &str)) {
        self.f.body = std::mem::take(&mut self.nodes);
        for available in choices(target) {
            let bytes = code(&mut self.f, target, available);
            for i in &mut Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE) {
                // With all registers the pointer to the input stays where it arrives.
                let reads = available.ints.count_ones() > 8 && i.memory_base() == Register::RDI;
                assert!(!reads || i.memory_size().size() <= self.limit, "{i:?} reads beyond {} bytes", self.limit);
            }
            let mut output = vec![0xa5u8; 4096];
            run(&bytes, target, [input.as_ptr() as i64, output.as_mut_ptr() as i64, numbers[0], numbers[1]]);
            check(&output, &format!("{target} {available:x?}"));
        }
    }
}

fn imm(x: i32) -> IntArg {
    IntArg::Imm(x)
}
