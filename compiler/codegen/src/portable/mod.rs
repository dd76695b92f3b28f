//! The portable emitter: kernel IR to Cranelift IR, vectorised at 128 bits.
//!
//! Every function is self-contained: no calls, no relocations, all constants behind the code.

mod index;
mod lanes;
mod memory;
mod reduce;
mod scalar;
mod sequence;
mod stmt;
mod vector;

use std::sync::Arc;

use chimera_ir::DType;
use chimera_ir::loops::{Acc, Expr, Kernel, Stmt, Ty};
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::{AbiParam, Function, Signature, UserFuncName, types};
use cranelift_codegen::isa::{CallConv, TargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{CodegenError, CompiledCode, Context};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};

use crate::{Arch, Code, Emitter, Feature, Refusal, Target, walk};

pub(crate) struct Portable;

impl Emitter for Portable {
    fn name(&self) -> &'static str {
        "portable"
    }

    fn version(&self) -> u32 {
        1
    }

    fn accepts(&self, kernel: &Kernel, target: &Target) -> Result<(), Refusal> {
        let refuse = |why: &str| Err(Refusal(why.to_owned()));
        let x86 = target.arch() == Arch::X86_64;
        // Without AVX, Cranelift folds unaligned vector loads into comparisons that require alignment.
        if x86 && !(target.has(Feature::Sse42) && target.has(Feature::Avx)) {
            return refuse("the target lacks AVX, expected at least x86-64-v3");
        }
        let (mut fma, mut to_bool, mut bf16) = (false, false, false);
        walk::exprs(&kernel.body, &mut |e| {
            fma |= matches!(e, Expr::Fma(..));
            to_bool |= matches!(e, Expr::Cast(Ty::Bool, _));
        });
        walk::stmts(&kernel.body, &mut |s| match s {
            Stmt::Reduce { accs, .. } => fma |= accs.iter().any(|(_, a)| matches!(a, Acc::Dot(..))),
            Stmt::Store(b, ..) => bf16 |= kernel.bufs[b.0 as usize].dtype == DType::BF16,
            _ => {}
        });
        if x86 && fma && !target.has(Feature::Fma) {
            return refuse("the target has no fused multiply-add");
        }
        if to_bool {
            return refuse("a cast to a truth value has no machine form");
        }
        if bf16 {
            return refuse("bf16 buffers are read only");
        }
        Ok(())
    }

    fn emit(&self, kernel: &Kernel, target: &Target) -> Result<Code, Refusal> {
        let compiled = compile(kernel, target, false)?;
        if !compiled.buffer.relocs().is_empty() {
            return Err(Refusal("an operation needs a library call on this target".to_owned()));
        }
        Ok(Code::Machine(compiled.code_buffer().to_vec()))
    }
}

/// The Cranelift notation of the machine code.
pub(crate) fn text(kernel: &Kernel, target: &Target) -> Result<String, Refusal> {
    compile(kernel, target, true)?.vcode.ok_or_else(|| Refusal("Cranelift gave no text".to_owned()))
}

/// Cranelift for a target.
///
/// # Panics
/// When Cranelift does not know a setting of the feature table.
pub(crate) fn isa(target: &Target) -> Arc<dyn TargetIsa> {
    let mut flags = settings::builder();
    let verify = if cfg!(debug_assertions) { "true" } else { "false" };
    for (name, value) in [
        ("opt_level", "speed"),
        ("enable_verifier", verify),
        ("enable_probestack", "false"),
        ("unwind_info", "false"),
        ("is_pic", "false"),
    ] {
        flags.set(name, value).expect("a known setting");
    }
    let mut isa = cranelift_codegen::isa::lookup(target.triple()).expect("both architectures are built in");
    for setting in target.features().filter_map(Feature::setting) {
        isa.enable(setting).expect("a known setting");
    }
    isa.finish(settings::Flags::new(flags)).expect("consistent flags")
}

fn compile(kernel: &Kernel, target: &Target, text: bool) -> Result<CompiledCode, Refusal> {
    let isa = isa(target);
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params.extend([AbiParam::new(types::I64); 4]);
    let mut context = Context::for_function(Function::with_name_signature(UserFuncName::user(0, 0), signature));
    context.set_disasm(text);
    let mut frontend = FunctionBuilderContext::new();
    let builder = FunctionBuilder::new(&mut context.func, &mut frontend);
    stmt::lower(kernel, target, builder, isa.frontend_config());
    let refused = |e: &dyn std::fmt::Display| Refusal(format!("Cranelift cannot compile the kernel: {e}"));
    if let Err(e) = context.compile(&*isa, &mut ControlPlane::default()) {
        return Err(match &e.inner {
            CodegenError::Verifier(errors) if !errors.0.is_empty() => refused(&errors.0[0]),
            other => refused(other),
        });
    }
    context.take_compiled_code().ok_or_else(|| refused(&"no code"))
}
