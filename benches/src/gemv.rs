//! One row against more weights than caches hold: many matrices in turn, each read once.
//!
//! The figure is bytes of weights by second, scales included, beside the plain reading of memory.

use anyhow::{Result, ensure};
use chimera_ir::{Data, Tensor};
use chimera_runtime::exec::Executable;

use crate::kernels::product;
use crate::machine;
use crate::measure::{Case, Setup};
use crate::peaks::DRAM;
use crate::single::{PlanBuilder, output, set_weight};
use crate::subject::{Subject, bits, interpreter_agrees};

/// Identifier of the row.
pub const ID: &str = "gemv.dram";
const SHAPE: [usize; 3] = [1, 6912, 2560];
/// Bytes between two weights of one column; moved by so much, a matrix is another one.
const MOVE: usize = 32;
const ENTRY: &str = "all";

/// The codes of matrix `i`, made of the first one's.
fn codes(first: &Tensor, i: usize) -> Tensor {
    let mut out = first.clone();
    if let Data::U8(bytes) = &mut out.data {
        let at = i * MOVE % bytes.len();
        bytes.rotate_left(at);
    }
    out
}

fn executable(subject: &Subject, matrices: usize, setup: &Setup, threads: usize) -> Result<Executable> {
    let mut plan = PlanBuilder::default();
    let weight = |plan: &mut PlanBuilder, name: &str, at: usize| plan.weight(name, &subject.ins[at].ty);
    let row = [weight(&mut plan, "codes", 0), weight(&mut plan, "scales", 1)];
    let mut calls = vec![];
    let mut outputs = vec![];
    for i in 0..matrices {
        let matrix = [weight(&mut plan, &format!("w{i}"), 2), weight(&mut plan, &format!("alpha{i}"), 3)];
        let y = plan.result(&format!("y{i}"), &subject.outs[0]);
        calls.push([&row[..], &matrix, &[y]].concat());
        outputs.push((format!("y{i}"), y));
    }
    plan.entry_of(ENTRY, &subject.kernel, &calls, &outputs);
    let mut exe = plan.executable(&setup.options(threads))?;
    set_weight(&mut exe, "codes", &subject.ins[0])?;
    set_weight(&mut exe, "scales", &subject.ins[1])?;
    for i in 0..matrices {
        set_weight(&mut exe, &format!("w{i}"), &codes(&subject.ins[2], i))?;
        set_weight(&mut exe, &format!("alpha{i}"), &subject.ins[3])?;
    }
    exe.run(ENTRY)?;
    Ok(exe)
}

fn results(exe: &Executable, matrices: usize) -> Result<Vec<Data>> {
    (0..matrices).map(|i| output(exe, ENTRY, &format!("y{i}"))).collect()
}

/// The case, with checked answers.
///
/// # Errors
/// When there is no memory, or an answer is wrong.
pub fn case(setup: &Setup) -> Result<Case> {
    let (op, types) = product(SHAPE);
    let (_, subject) = Subject::of(op, &types, setup)?;
    let each = (types[2].bytes() + types[3].bytes()) as u64;
    let matrices = (machine::beyond_caches() / each) as usize;
    ensure!(matrices > 1, "there is no memory for weights");
    let want = results(&executable(&subject, matrices, setup, setup.other())?, matrices)?;
    let mut exe = executable(&subject, matrices, setup, setup.threads)?;
    ensure!(exe.module().kernels.iter().all(|k| k.emitter != "interp"), "no emitter of machine code serves the kernel");
    let got = results(&exe, matrices)?;
    for (i, (a, b)) in got.iter().zip(&want).enumerate() {
        ensure!(bits(a) == bits(b), "matrix {i}: {} and {} threads differ", setup.threads, setup.other());
    }
    for i in [0, matrices - 1] {
        let mut ins = subject.ins.clone();
        ins[2] = codes(&ins[2], i);
        interpreter_agrees(&subject.kernel, &ins, &subject.outs, &got[i..=i])?;
    }
    let work = matrices as f64 * each as f64 * 1e-9;
    Ok(Case {
        id: ID.to_owned(),
        unit: "GB/s",
        work,
        floor: vec![(DRAM, work)],
        peer: None,
        start: Box::new(|| Ok(())),
        run: Box::new(move || Ok(exe.run(ENTRY)?)),
    })
}
