//! The only CPU probe in the project.
//!
//! Everything else receives a [`Target`] and never asks the machine.

use std::sync::OnceLock;

use crate::{Feature, Target};

/// The machine this process runs on, probed once.
pub fn host() -> Target {
    static HOST: OnceLock<Target> = OnceLock::new();
    *HOST.get_or_init(probe)
}

/// The name of the processor of this machine, as it calls itself: people read it, and figures measured on one are not those of another.
#[cfg(target_arch = "x86_64")]
pub fn processor() -> String {
    use std::arch::x86_64::__cpuid;
    let mut name = vec![];
    if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
        for leaf in 0x8000_0002..=0x8000_0004u32 {
            let x = __cpuid(leaf);
            name.extend([x.eax, x.ebx, x.ecx, x.edx].into_iter().flat_map(u32::to_le_bytes));
        }
    }
    let signature = __cpuid(1).eax;
    let name = String::from_utf8_lossy(&name);
    let words: Vec<&str> = name.split(|c: char| c == '\0' || c.is_whitespace()).filter(|w| !w.is_empty()).collect();
    // Virtual machines hide the model in the name; the signature has family, model and stepping.
    format!("{} ({signature:x})", words.join(" "))
}

/// The name of the processor of this machine.
#[cfg(not(target_arch = "x86_64"))]
pub fn processor() -> String {
    std::env::consts::ARCH.to_owned()
}

#[cfg(target_arch = "x86_64")]
fn probe() -> Target {
    use Feature::*;
    use std::is_x86_feature_detected as has;
    let found = [
        (Sse3, has!("sse3")),
        (Ssse3, has!("ssse3")),
        (Sse41, has!("sse4.1")),
        (Sse42, has!("sse4.2")),
        (Popcnt, has!("popcnt")),
        (Avx, has!("avx")),
        (Avx2, has!("avx2")),
        (Fma, has!("fma")),
        (F16c, has!("f16c")),
        (Bmi1, has!("bmi1")),
        (Bmi2, has!("bmi2")),
        (Lzcnt, has!("lzcnt")),
        (Avx512f, has!("avx512f")),
        (Avx512bw, has!("avx512bw")),
        (Avx512cd, has!("avx512cd")),
        (Avx512dq, has!("avx512dq")),
        (Avx512vl, has!("avx512vl")),
        (Avx512Vnni, has!("avx512vnni")),
        (Avx512Vbmi, has!("avx512vbmi")),
        (Avx512Bitalg, has!("avx512bitalg")),
        (AvxVnni, has!("avxvnni")),
    ];
    target(crate::Arch::X86_64, &found)
}

#[cfg(target_arch = "aarch64")]
fn probe() -> Target {
    use Feature::*;
    use std::arch::is_aarch64_feature_detected as has;
    target(crate::Arch::Aarch64, &[(Dotprod, has!("dotprod")), (I8mm, has!("i8mm"))])
}

fn target(arch: crate::Arch, found: &[(Feature, bool)]) -> Target {
    let present = found.iter().filter(|(_, present)| *present);
    present.fold(Target::baseline(arch), |t, (feature, _)| t.with(*feature))
}
