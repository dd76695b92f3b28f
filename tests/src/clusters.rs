//! Clusters of operations run on dense data by any emitter, for differential tests.

use chimera_codegen::{Allowed, CodegenError, compile, host};
use chimera_ir::loops::{Kernel, Role, Tensors, interpret, verify};
use chimera_ir::lower::{Argument, Cluster};
use chimera_ir::{DType, Data, Op, Tensor, Type};

/// How a kernel is run.
#[derive(Clone, Copy, Debug)]
pub enum Runner<'a> {
    /// By the reference interpreter over dense data.
    Reference,
    /// By the emitter of that name.
    Emitter(&'a str),
}

/// Memory aligned to 64, as the runtime aligns buffers, filled with ones.
struct Bytes(Vec<[u64; 8]>);

impl Bytes {
    fn new(len: usize) -> Bytes {
        Bytes(vec![[u64::MAX; 8]; len.div_ceil(64)])
    }

    fn slice(&mut self) -> &mut [u8] {
        let (at, len) = (self.0.as_mut_ptr(), self.0.len() * 64);
        // SAFETY: any bit pattern is a valid byte, and the allocation has this many of them.
        unsafe { std::slice::from_raw_parts_mut(at.cast(), len) }
    }
}

fn encode(data: &Data) -> Vec<u8> {
    match data {
        Data::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Data::F64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Data::BF16(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Data::I8(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Data::U8(v) => v.clone(),
        Data::I16(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Data::I32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> Data {
    macro_rules! parts {
        ($Variant:ident, $ty:ty) => {
            Data::$Variant(
                bytes
                    .chunks_exact(size_of::<$ty>())
                    .map(|c| <$ty>::from_le_bytes(c.try_into().expect("whole")))
                    .collect(),
            )
        };
    }
    match dtype {
        DType::F32 => parts!(F32, f32),
        DType::F64 => parts!(F64, f64),
        DType::BF16 => parts!(BF16, u16),
        DType::I8 => parts!(I8, i8),
        DType::U8 => parts!(U8, u8),
        DType::I16 => parts!(I16, i16),
        DType::I32 => parts!(I32, i32),
    }
}

/// Run the grid of `kernel` in the given ranges, in that order, over `args`.
///
/// # Errors
/// When the emitter does not serve the kernel.
pub fn run(kernel: &Kernel, runner: Runner<'_>, args: &mut [Data], ranges: &[(i64, i64)]) -> Result<(), CodegenError> {
    let Runner::Emitter(name) = runner else {
        verify(kernel).map_err(CodegenError::Kernel)?;
        for &(lo, hi) in ranges {
            interpret(kernel, &mut Tensors::new(kernel, args), lo, hi);
        }
        return Ok(());
    };
    let module = compile(&[kernel], &host(), &Allowed::parse(name)?)?;
    let mut buffers: Vec<(Bytes, usize)> = args
        .iter()
        .map(|data| {
            let bytes = encode(data);
            let mut buffer = Bytes::new(bytes.len());
            buffer.slice()[..bytes.len()].copy_from_slice(&bytes);
            (buffer, bytes.len())
        })
        .collect();
    let pointers: Vec<*mut u8> = buffers.iter_mut().map(|(b, _)| b.slice().as_mut_ptr()).collect();
    for &(lo, hi) in ranges {
        let mut scratch = Bytes::new(kernel.scratch_bytes());
        // SAFETY: there is one buffer of the declared length for every argument (the caller checked by the interpreter), scratch memory of
        // the size that the kernel asks for, both aligned and used by this call alone; the kernel was verified by `compile`.
        unsafe { module.entry(0).call(pointers.as_ptr(), scratch.slice().as_mut_ptr(), lo, hi) };
    }
    for (data, (buffer, len)) in args.iter_mut().zip(&mut buffers) {
        // What lies behind the last element must not have been touched.
        assert!(buffer.slice()[*len..].iter().all(|&b| b == u8::MAX), "{}: a store behind a buffer", kernel.name);
        *data = decode(data.dtype(), &buffer.slice()[..*len]);
    }
    Ok(())
}

/// Run a cluster: the outputs, in order. `ranges` split the grid; `None` is all of it.
///
/// # Errors
/// When the emitter does not serve the kernel.
pub fn run_cluster(
    cluster: &Cluster,
    runner: Runner<'_>,
    ins: &[&Tensor],
    ranges: Option<&[(i64, i64)]>,
) -> Result<Vec<Tensor>, CodegenError> {
    run_lowered(cluster, &cluster.lower(), runner, ins, ranges)
}

/// As [`run_cluster`], for a kernel that was lowered before.
///
/// # Errors
/// When the emitter does not serve the kernel.
pub fn run_lowered(
    cluster: &Cluster,
    kernel: &Kernel,
    runner: Runner<'_>,
    ins: &[&Tensor],
    ranges: Option<&[(i64, i64)]>,
) -> Result<Vec<Tensor>, CodegenError> {
    let arguments = cluster.arguments();
    let ty = |o: usize| {
        let (node, result) = cluster.outputs[o];
        cluster.nodes[node].outs[result].clone()
    };
    let mut args: Vec<Data> = arguments
        .iter()
        .map(|a| match *a {
            Argument::Input(k) => ins[k].data.clone(),
            Argument::Output(o) => Data::poison(ty(o).dtype, ty(o).numel()),
        })
        .collect();
    let before = args.clone();
    let whole = [(0, kernel.grid as i64)];
    run(kernel, runner, &mut args, ranges.unwrap_or(&whole))?;
    let read_only =
        kernel.bufs.iter().filter(|b| b.role != Role::Scratch).enumerate().filter(|(_, b)| b.role == Role::In);
    for (n, decl) in read_only {
        assert!(same_bits(&args[n], &before[n]), "{}: read-only buffer {} was written", kernel.name, decl.name);
    }
    // A result that updates an operand is in the operand's buffer.
    let anchor = &cluster.nodes[cluster.anchor];
    let place = |o: usize| {
        let own = arguments.iter().position(|a| *a == Argument::Output(o));
        own.unwrap_or_else(|| {
            let (_, result) = cluster.outputs[o];
            let (operand, _) = *anchor.op.updates().iter().find(|u| u.1 == result).expect("an update without a buffer");
            let chimera_ir::lower::Source::Input(k) = anchor.ins[operand] else { panic!("a fused operand is updated") };
            arguments.iter().position(|a| *a == Argument::Input(k)).expect("every input has a buffer")
        })
    };
    Ok((0..cluster.outputs.len()).map(|o| Tensor { ty: ty(o), data: args[place(o)].clone() }).collect())
}

/// The results of `op` by `eval`, by the reference interpreter and by every emitter, each with the name of the way.
///
/// # Panics
/// When the operation refuses the operands, or an emitter its kernel.
pub fn all_ways(op: impl Into<Op>, ins: &[Tensor]) -> Vec<(&'static str, Vec<Tensor>)> {
    let (op, refs) = (op.into(), ins.iter().collect::<Vec<_>>());
    let types: Vec<Type> = ins.iter().map(|t| t.ty.clone()).collect();
    let cluster = Cluster::single(op.clone(), &types).unwrap_or_else(|e| panic!("{}: {e}", op.text()));
    let emitters = chimera_codegen::emitters().iter().map(|e| (e.name(), Runner::Emitter(e.name())));
    let runners = std::iter::once(("the reference", Runner::Reference)).chain(emitters);
    let run = |(name, runner)| {
        let results = run_cluster(&cluster, runner, &refs, None);
        (name, results.unwrap_or_else(|e| panic!("{} by {name}: {e}", op.text())))
    };
    std::iter::once(("eval", op.eval(&refs))).chain(runners.map(run)).collect()
}

/// Equality of bits; NaNs are equal to NaNs whatever their payload.
pub fn same_bits(a: &Data, b: &Data) -> bool {
    match (a, b) {
        (Data::F32(a), Data::F32(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
        }
        (Data::F64(a), Data::F64(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
        }
        _ => a == b,
    }
}
