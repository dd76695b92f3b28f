//! Machine code as bytes and as text, for any target from any host.

use chimera_ir::loops::Kernel;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use crate::{Allowed, Arch, Code, CodegenError, Refusal, Target, module, portable};

/// The machine code of a kernel; empty when only the interpreter serves it.
///
/// # Errors
/// As for [`compile`](crate::compile), except that the target need not run here.
pub fn assemble(kernel: &Kernel, target: &Target) -> Result<Vec<u8>, CodegenError> {
    Ok(match module::emit(kernel, target, Allowed::all())?.code {
        Code::Machine(bytes) => bytes,
        Code::Interpreted => vec![],
    })
}

/// The machine code of a kernel as text: Intel syntax with hexadecimal offsets for x86-64, Cranelift's own notation for aarch64.
/// The first line names the emitter; further lines before the code give the reasons of those that refused.
///
/// # Errors
/// As for [`assemble`].
pub fn disassemble(kernel: &Kernel, target: &Target) -> Result<String, CodegenError> {
    let emitted = module::emit(kernel, target, Allowed::all())?;
    let mut text = format!("; {} for {target}, kernel {}\n", emitted.emitter, kernel.name);
    for (name, why) in &emitted.refusals {
        text += &format!("; {name} refused: {why}\n");
    }
    match (emitted.code, target.arch()) {
        (Code::Interpreted, _) => {}
        (Code::Machine(bytes), Arch::X86_64) => text += &intel(&bytes),
        (Code::Machine(_), Arch::Aarch64) => {
            let refused = |why: Refusal| CodegenError::Refused {
                kernel: kernel.name.clone(),
                target: *target,
                refusals: vec![(emitted.emitter, why)],
            };
            text += &portable::text(kernel, target).map_err(refused)?;
        }
    }
    Ok(text)
}

/// Decode up to the constants that follow the last return.
fn intel(bytes: &[u8]) -> String {
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_first_operand_char_index(10);
    options.set_rip_relative_addresses(true);
    let mut text = String::new();
    let mut line = String::new();
    let mut data = bytes.len() as u64;
    let mut reach = 0;
    for instruction in &mut Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE) {
        if instruction.ip() >= data {
            break;
        }
        if instruction.is_ip_rel_memory_operand() {
            data = data.min(instruction.ip_rel_memory_address());
        }
        line.clear();
        formatter.format(&instruction, &mut line);
        text += &format!("{:5x}  {line}\n", instruction.ip());
        reach = reach.max(instruction.near_branch_target());
        let ends = instruction.mnemonic() == iced_x86::Mnemonic::Ret || instruction.is_jmp_short_or_near();
        if ends && reach < instruction.next_ip() {
            break;
        }
    }
    text
}
