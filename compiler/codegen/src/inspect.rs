//! Machine code as bytes and as text, for any target from any host.

use std::ops::Range;

use chimera_ir::loops::Kernel;
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

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
/// The first line names the emitter; further lines before the code give the reasons of those that refused. Lines `; hot loop` and
/// `; end of the hot loop` stand around the largest of the innermost loops of x86-64.
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

/// Decode up to the constants that follow the last return. Comments stand around the hottest loop.
fn intel(bytes: &[u8]) -> String {
    let mut code = vec![];
    let mut data = bytes.len() as u64;
    let mut reach = 0;
    for instruction in &mut Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE) {
        if instruction.ip() >= data {
            break;
        }
        if instruction.is_ip_rel_memory_operand() {
            data = data.min(instruction.ip_rel_memory_address());
        }
        code.push(instruction);
        reach = reach.max(instruction.near_branch_target());
        let ends = instruction.mnemonic() == iced_x86::Mnemonic::Ret || instruction.is_jmp_short_or_near();
        if ends && reach < instruction.next_ip() {
            break;
        }
    }
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_first_operand_char_index(10);
    options.set_rip_relative_addresses(true);
    let hot = hottest(&code);
    let mut text = String::new();
    let mut line = String::new();
    for (n, instruction) in code.iter().enumerate() {
        if hot.as_ref().is_some_and(|hot| hot.start == n) {
            text += "; hot loop\n";
        }
        line.clear();
        formatter.format(instruction, &mut line);
        text += &format!("{:5x}  {line}\n", instruction.ip());
        if hot.as_ref().is_some_and(|hot| hot.end == n + 1) {
            text += "; end of the hot loop\n";
        }
    }
    text
}

/// Of the loops in most others the one that has most instructions: from the target of a backward jump to that jump.
fn hottest(code: &[Instruction]) -> Option<Range<usize>> {
    let mut loops: Vec<Range<usize>> = vec![];
    for (n, i) in code.iter().enumerate() {
        if i.is_jcc_short_or_near() && i.near_branch_target() <= i.ip() {
            let first = code.binary_search_by_key(&i.near_branch_target(), Instruction::ip).ok()?;
            loops.push(first..n + 1);
        }
    }
    let around = |l: &Range<usize>| loops.iter().filter(|o| o.start <= l.start && l.end <= o.end).count();
    loops.iter().rev().max_by_key(|l| (around(l), l.len())).cloned()
}
