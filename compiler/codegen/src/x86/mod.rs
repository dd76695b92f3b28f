//! The wide emitter: kernel IR to 256-bit and 512-bit x86-64 code of our own.
//!
//! `lower` writes flat operations over virtual registers, `alloc` gives them machine registers, the backends encode them. Every
//! function is self-contained: no calls, no relocations, all constants behind the code.

mod alloc;
mod asm;
mod avx2;
mod avx512;
mod build;
mod encode;
mod flat;
mod lines;
mod lower;
mod split;
#[cfg(test)]
mod tests;
mod vector;

use chimera_ir::DType;
use chimera_ir::loops::{Expr, Kernel, Stmt, Ty};

use crate::{Arch, Code, Emitter, Feature, Refusal, Target, walk};
use flat::Width;

pub(crate) struct Wide;

/// What every machine that this emitter serves has.
const NEEDED: [Feature; 4] = [Feature::Avx2, Feature::Fma, Feature::Bmi2, Feature::Popcnt];

impl Emitter for Wide {
    fn name(&self) -> &'static str {
        "wide"
    }

    fn version(&self) -> u32 {
        2
    }

    fn accepts(&self, kernel: &Kernel, target: &Target) -> Result<(), Refusal> {
        let refuse = |why: String| Err(Refusal(why));
        if target.arch() != Arch::X86_64 {
            return refuse("it writes x86-64 code only".to_owned());
        }
        if let Some(lacking) = NEEDED.iter().find(|f| !target.has(**f)) {
            return refuse(format!("the target lacks {}, expected at least x86-64-v3", lacking.name()));
        }
        let (mut to_bool, mut bf16) = (false, false);
        walk::exprs(&kernel.body, &mut |e| to_bool |= matches!(e, Expr::Cast(Ty::Bool, _)));
        walk::stmts(&kernel.body, &mut |s| {
            if let Stmt::Store(b, ..) = s {
                bf16 |= kernel.bufs[b.0 as usize].dtype == DType::BF16;
            }
        });
        if to_bool {
            return refuse("a cast to a truth value has no machine form".to_owned());
        }
        if bf16 {
            return refuse("bf16 buffers are read only".to_owned());
        }
        Ok(())
    }

    fn emit(&self, kernel: &Kernel, target: &Target) -> Result<Code, Refusal> {
        let mut function = lower::lower(kernel, target);
        encode::emit(&mut function, target).map(Code::Machine).map_err(Refusal)
    }
}

/// Whether there is an instruction for byte products that are added to 32 bits, at every width.
fn has_dot(target: &Target) -> bool {
    target.has(match encode::widest(target) {
        Width::Z => Feature::Avx512Vnni,
        _ => Feature::AvxVnni,
    })
}
