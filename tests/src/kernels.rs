//! One operation in every way it can be computed: by its reference semantics, and by its kernel on every emitter.
//!
//! Kernels run in two parts, the later half of the grid first: instances must not depend on one another.

use chimera_codegen::{Allowed, CodegenError, compile, emitters, host};
use chimera_ir::{
    Data, Op, Tensor, Type,
    lower::{Argument, Cluster},
};

/// The results of `op` by `eval`, then by every emitter that serves its kernel, each with the name of the way.
///
/// # Panics
/// When the operation refuses the operands, or no emitter serves the kernel.
pub fn all_ways(op: impl Into<Op>, ins: &[Tensor]) -> Vec<(&'static str, Vec<Tensor>)> {
    let op = op.into();
    let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
    let cluster = Cluster::single(op.clone(), &types).unwrap_or_else(|e| panic!("{}: {e}", op.text()));
    let mut results = vec![("eval", op.eval(&ins.iter().collect::<Vec<_>>()))];
    let kernel = cluster.lower();
    let outs = &cluster.nodes[0].outs;
    for emitter in emitters() {
        let module = match compile(&[&kernel], &host(), &Allowed::parse(emitter.name()).expect("a listed name")) {
            Ok(module) => module,
            Err(CodegenError::Refused { .. }) => continue,
            Err(e) => panic!("{} on {}: {e}", op.text(), emitter.name()),
        };
        let arguments = cluster.arguments();
        let argument = |a: &Argument| match *a {
            Argument::Input(i) => ins[i].data.clone(),
            Argument::Output(o) => Data::zeros(outs[o].dtype, outs[o].numel()),
        };
        let mut data: Vec<Data> = arguments.iter().map(argument).collect();
        let pointers: Vec<*mut u8> = data.iter_mut().map(pointer).collect();
        let mut scratch = vec![0xffu8; kernel.scratch_bytes() + 64];
        let skip = scratch.as_ptr().align_offset(64);
        let n = kernel.grid as i64;
        for (lo, hi) in [(n / 2, n), (0, n / 2)] {
            // SAFETY: one pointer for every argument buffer of the declared type and length, aligned scratch of the declared size, one
            // thread, and a part of the grid of a kernel whose operands are well-formed.
            unsafe { module.entry(0).call(pointers.as_ptr(), scratch.as_mut_ptr().add(skip), lo, hi) }
        }
        let at = |o: usize| {
            let updated = op.updates().iter().find(|u| u.1 == o).map(|u| Argument::Input(u.0));
            let wanted = updated.unwrap_or(Argument::Output(o));
            arguments.iter().position(|a| *a == wanted).expect("every result has a buffer")
        };
        let result = |(o, ty): (usize, &Type)| Tensor { ty: ty.clone(), data: data[at(o)].clone() };
        results.push((emitter.name(), outs.iter().enumerate().map(result).collect()));
    }
    assert!(results.len() > 1, "no emitter serves {}", op.text());
    results
}

fn pointer(data: &mut Data) -> *mut u8 {
    match data {
        Data::F32(v) => v.as_mut_ptr().cast(),
        Data::F64(v) => v.as_mut_ptr().cast(),
        Data::BF16(v) => v.as_mut_ptr().cast(),
        Data::I8(v) => v.as_mut_ptr().cast(),
        Data::U8(v) => v.as_mut_ptr(),
        Data::I16(v) => v.as_mut_ptr().cast(),
        Data::I32(v) => v.as_mut_ptr().cast(),
    }
}
