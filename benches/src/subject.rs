//! One kernel with operands: how it is run, checked and timed.
//!
//! A checked kernel has given the same bits with one thread and with several, and the bits of the interpreter in one instance of its
//! grid where that was asked for.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Result, ensure};
use chimera_compiler::tuning::Tuning;
use chimera_ir::loops::{Kernel, Tensors, interpret};
use chimera_ir::lower::Cluster;
use chimera_ir::{DType, Data, Op, Tensor, Type};
use chimera_runtime::exec::{ExecOptions, Executable};

use crate::measure::{Case, Setup};
use crate::single::{PlanBuilder, Shared, output, set_weight};

/// Runs of a kernel in one call of the executor, so that the call is not what is measured.
const TIMES: usize = 16;
/// Work in units of 1e9 from which one run is enough.
const LONG: f64 = 0.02;

/// A kernel with operands; the buffers are the operands, then the results.
#[derive(Debug)]
pub struct Subject {
    /// The kernel.
    pub kernel: Kernel,
    /// Values of the read-only buffers.
    pub ins: Vec<Tensor>,
    /// Types of the written buffers.
    pub outs: Vec<Type>,
}

impl Subject {
    /// An operation on operands of the given types.
    ///
    /// # Errors
    /// When it refuses them.
    pub fn of(op: impl Into<Op>, types: &[Type], setup: &Setup) -> Result<(Op, Subject)> {
        let op = op.into();
        let tuning = Tuning { table: None, target: setup.target, threads: setup.threads };
        let cluster = Cluster::single(op.clone(), types)?.with_variant(&tuning.choose(&op, types).0);
        let mut random = sequence(1);
        let ins = types.iter().enumerate().map(|(k, ty)| op.sample_input(k, ty, &mut random)).collect();
        let outs = cluster.nodes[cluster.anchor].outs.clone();
        Ok((op, Subject { kernel: cluster.lower(), ins, outs }))
    }

    /// Entry points `once` and `many` ([`TIMES`]).
    fn executable(&self, options: &ExecOptions) -> Result<Executable> {
        let mut plan = PlanBuilder::default();
        let mut args: Vec<_> =
            self.ins.iter().enumerate().map(|(i, t)| plan.weight(&format!("in{i}"), &t.ty)).collect();
        let outs: Vec<_> = (self.outs.iter().enumerate())
            .map(|(i, ty)| (format!("out{i}"), plan.result(&format!("out{i}"), ty)))
            .collect();
        args.extend(outs.iter().map(|o| o.1));
        plan.entry("once", &self.kernel, &args, 1, &outs);
        plan.entry("many", &self.kernel, &args, TIMES, &outs);
        let mut exe = plan.executable(options)?;
        for (i, t) in self.ins.iter().enumerate() {
            set_weight(&mut exe, &format!("in{i}"), t)?;
        }
        Ok(exe)
    }

    fn results(&self, exe: &mut Executable, entry: &str) -> Result<Vec<Data>> {
        exe.run(entry)?;
        (0..self.outs.len()).map(|i| output(exe, entry, &format!("out{i}"))).collect()
    }

    /// The case of a checked kernel; `work` is that of one run.
    pub fn case(self, id: String, unit: &'static str, work: f64, exe: Shared) -> Case {
        let (entry, times) = if work < LONG { ("many", TIMES) } else { ("once", 1) };
        let run = move || Ok(exe.borrow_mut().run(entry)?);
        let work = work * times as f64;
        Case { id, unit, work, floor: vec![], peer: None, start: Box::new(|| Ok(())), run: Box::new(run) }
    }
}

/// A fixed sequence of numbers in (-1, 1).
pub fn sequence(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        2.0 * ((state >> 40) as f32 / (1u64 << 24) as f32) - 1.0
    }
}

/// Contents that no kernel leaves.
fn unwritten(ty: &Type) -> Data {
    let n = ty.numel();
    match ty.dtype {
        DType::F32 => Data::F32(vec![f32::from_bits(0x7fe1_2345); n]),
        DType::I32 => Data::I32(vec![i32::MIN; n]),
        DType::I8 => Data::I8(vec![i8::MIN; n]),
        dtype => Data::zeros(dtype, n),
    }
}

/// Elements as bits.
pub fn bits(data: &Data) -> Vec<i64> {
    match data {
        Data::F32(v) => v.iter().map(|x| i64::from(x.to_bits())).collect(),
        Data::F64(v) => v.iter().map(|x| x.to_bits() as i64).collect(),
        Data::BF16(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I8(v) => v.iter().map(|&x| x.into()).collect(),
        Data::U8(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I16(v) => v.iter().map(|&x| x.into()).collect(),
        Data::I32(v) => v.iter().map(|&x| x.into()).collect(),
    }
}

/// Run a kernel on `threads` threads and compare with another number of threads, and the last instance of its grid with the
/// interpreter if asked to; returns the executable.
///
/// # Errors
/// When it cannot be run, or a result is not what it should be.
pub fn check(subject: &Subject, setup: &Setup, interpreted: bool) -> Result<Shared> {
    let (threads, other) = (setup.threads, setup.other());
    let mut exe = subject.executable(&setup.options(threads))?;
    let served: Vec<&str> = exe.module().kernels.iter().map(|k| k.emitter).filter(|&e| e == "interp").collect();
    ensure!(served.is_empty(), "no emitter of machine code serves the kernel");
    let got = subject.results(&mut exe, "once")?;
    let again = subject.results(&mut subject.executable(&setup.options(other))?, "once")?;
    for (i, (a, b)) in got.iter().zip(&again).enumerate() {
        ensure!(bits(a) == bits(b), "result {i} differs between {threads} and {other} threads");
    }
    if interpreted {
        interpreter_agrees(&subject.kernel, &subject.ins, &subject.outs, &got)?;
    }
    Ok(Rc::new(RefCell::new(exe)))
}

/// Compare results with those of the interpreter in the last instance of the grid.
///
/// # Errors
/// When they differ.
pub fn interpreter_agrees(kernel: &Kernel, ins: &[Tensor], outs: &[Type], got: &[Data]) -> Result<()> {
    let mut args: Vec<Data> = ins.iter().map(|t| t.data.clone()).collect();
    args.extend(outs.iter().map(unwritten));
    let grid = kernel.grid as i64;
    interpret(kernel, &mut Tensors::new(kernel, &mut args), grid - 1, grid);
    let mut written = 0;
    for (i, got) in got.iter().enumerate() {
        let (want, before) = (bits(&args[ins.len() + i]), bits(&unwritten(&outs[i])));
        for (at, (got, want)) in bits(got).into_iter().zip(want).enumerate() {
            if want != before[at] {
                written += 1;
                ensure!(got == want, "result {i} differs from the interpreter at element {at}");
            }
        }
    }
    ensure!(written > 0, "the interpreter wrote nothing");
    Ok(())
}
