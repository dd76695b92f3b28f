//! What a machine can do, as a value: detected once, or stated for cross-compilation.
//!
//! A target is an architecture and a set of features of it; names and values correspond one to one.

use std::fmt;
use std::str::FromStr;

use target_lexicon::{Aarch64Architecture, Architecture, BinaryFormat, Environment, OperatingSystem, Triple, Vendor};

/// An instruction set architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

impl Arch {
    /// The stable name; also the name of the target without optional features.
    pub fn name(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86-64",
            Arch::Aarch64 => "aarch64",
        }
    }
}

macro_rules! features {
    ($($(#[$doc:meta])* $Feature:ident $arch:ident $name:literal $setting:expr;)*) => {
        /// An optional instruction set extension.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Feature { $($(#[$doc])* $Feature),* }

        impl Feature {
            /// Every feature.
            pub const ALL: &'static [Feature] = &[$(Feature::$Feature),*];

            /// The architecture it extends, its stable name, and the Cranelift setting that stands for it.
            fn row(self) -> (Arch, &'static str, Option<&'static str>) {
                match self { $(Feature::$Feature => (Arch::$arch, $name, $setting)),* }
            }
        }
    };
}

features! {
    /// SSE3.
    Sse3 X86_64 "sse3" Some("has_sse3");
    /// SSSE3.
    Ssse3 X86_64 "ssse3" Some("has_ssse3");
    /// SSE4.1.
    Sse41 X86_64 "sse4.1" Some("has_sse41");
    /// SSE4.2.
    Sse42 X86_64 "sse4.2" Some("has_sse42");
    /// Bit count.
    Popcnt X86_64 "popcnt" Some("has_popcnt");
    /// AVX.
    Avx X86_64 "avx" Some("has_avx");
    /// AVX2.
    Avx2 X86_64 "avx2" Some("has_avx2");
    /// Fused multiply-add.
    Fma X86_64 "fma" Some("has_fma");
    /// Half precision conversion.
    F16c X86_64 "f16c" None;
    /// Bit manipulation, first set.
    Bmi1 X86_64 "bmi1" Some("has_bmi1");
    /// Bit manipulation, second set.
    Bmi2 X86_64 "bmi2" Some("has_bmi2");
    /// Leading zero count.
    Lzcnt X86_64 "lzcnt" Some("has_lzcnt");
    /// AVX-512 foundation.
    Avx512f X86_64 "avx512f" Some("has_avx512f");
    /// AVX-512 bytes and words.
    Avx512bw X86_64 "avx512bw" None;
    /// AVX-512 conflict detection.
    Avx512cd X86_64 "avx512cd" None;
    /// AVX-512 doublewords and quadwords.
    Avx512dq X86_64 "avx512dq" Some("has_avx512dq");
    /// AVX-512 at 128 and 256 bits.
    Avx512vl X86_64 "avx512vl" Some("has_avx512vl");
    /// Byte dot products with EVEX encoding.
    Avx512Vnni X86_64 "avx512vnni" Some("has_avx512vnni");
    /// Byte permutations.
    Avx512Vbmi X86_64 "avx512vbmi" Some("has_avx512vbmi");
    /// Bit algorithms.
    Avx512Bitalg X86_64 "avx512bitalg" Some("has_avx512bitalg");
    /// Byte dot products with VEX encoding.
    AvxVnni X86_64 "avxvnni" Some("has_avx_vnni");
    /// Signed byte dot products.
    Dotprod Aarch64 "dotprod" Some("has_dotprod");
    /// Mixed-sign byte dot products.
    I8mm Aarch64 "i8mm" Some("has_i8mm");
}

impl Feature {
    /// The stable name.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The architecture it extends.
    pub fn arch(self) -> Arch {
        self.row().0
    }

    pub(crate) fn setting(self) -> Option<&'static str> {
        self.row().2
    }
}

use Feature::*;

/// The named levels of x86-64, each including those before it. Listed from the least.
const LEVELS: [(&str, &[Feature]); 4] = [
    ("x86-64", &[]),
    ("x86-64-v2", &[Sse3, Ssse3, Sse41, Sse42, Popcnt]),
    ("x86-64-v3", &[Avx, Avx2, Fma, F16c, Bmi1, Bmi2, Lzcnt]),
    ("x86-64-v4", &[Avx512f, Avx512bw, Avx512cd, Avx512dq, Avx512vl]),
];

/// An architecture with a set of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    arch: Arch,
    bits: u64,
}

impl Target {
    /// The least machine of an architecture.
    pub fn baseline(arch: Arch) -> Target {
        Target { arch, bits: 0 }
    }

    /// The architecture.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Is the feature present?
    pub fn has(&self, feature: Feature) -> bool {
        self.bits & (1 << feature as u64) != 0
    }

    /// The same target with one more feature; a feature of another architecture changes nothing.
    pub fn with(mut self, feature: Feature) -> Target {
        if feature.arch() == self.arch {
            self.bits |= 1 << feature as u64;
        }
        self
    }

    /// The features that are present, in a fixed order.
    pub fn features(&self) -> impl Iterator<Item = Feature> {
        let target = *self;
        Feature::ALL.iter().copied().filter(move |&f| target.has(f))
    }

    /// Can `machine` execute code for this target?
    pub fn runs_on(&self, machine: &Target) -> bool {
        self.arch == machine.arch && self.bits & !machine.bits == 0
    }

    /// Can byte dot products be fused into one instruction of 128 bits?
    pub(crate) fn fused_dot(&self) -> bool {
        self.has(AvxVnni) || (self.has(Avx512Vnni) && self.has(Avx512vl)) || self.arch == Arch::Aarch64
    }

    /// The triple, with the one calling convention that kernels use on every operating system.
    pub(crate) fn triple(&self) -> Triple {
        let architecture = match self.arch {
            Arch::X86_64 => Architecture::X86_64,
            Arch::Aarch64 => Architecture::Aarch64(Aarch64Architecture::Aarch64),
        };
        Triple {
            architecture,
            vendor: Vendor::Unknown,
            operating_system: OperatingSystem::Linux,
            environment: Environment::Gnu,
            binary_format: BinaryFormat::Elf,
        }
    }
}

/// The named level followed by the features beyond it, such as `x86-64-v3+avxvnni`.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut level = Target::baseline(self.arch);
        let mut name = self.arch.name();
        if self.arch == Arch::X86_64 {
            for (level_name, features) in LEVELS {
                let next = features.iter().fold(level, |t, &x| t.with(x));
                if !next.runs_on(self) {
                    break;
                }
                (level, name) = (next, level_name);
            }
        }
        f.write_str(name)?;
        self.features().filter(|&x| !level.has(x)).try_for_each(|x| write!(f, "+{}", x.name()))
    }
}

/// A name that is not that of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetError {
    found: String,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "target {:?} is unknown: expected host, aarch64", self.found)?;
        LEVELS.iter().try_for_each(|(name, _)| write!(f, ", {name}"))?;
        f.write_str(", optionally followed by features such as +avxvnni or +dotprod")
    }
}

impl std::error::Error for TargetError {}

/// Parses what [`Display`](fmt::Display) prints, and `host` for the machine this process runs on.
impl FromStr for Target {
    type Err = TargetError;

    fn from_str(s: &str) -> Result<Target, TargetError> {
        let unknown = || TargetError { found: s.to_owned() };
        let mut parts = s.split('+');
        let base = parts.next().unwrap_or_default();
        let mut target = match base {
            "host" => crate::host(),
            "aarch64" => Target::baseline(Arch::Aarch64),
            _ => {
                let level = LEVELS.iter().position(|(name, _)| *name == base).ok_or_else(unknown)?;
                let features = LEVELS[..=level].iter().flat_map(|(_, features)| features.iter());
                features.fold(Target::baseline(Arch::X86_64), |t, &x| t.with(x))
            }
        };
        for name in parts {
            let of = |x: &&Feature| x.name() == name && x.arch() == target.arch;
            target = target.with(*Feature::ALL.iter().find(of).ok_or_else(unknown)?);
        }
        Ok(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_targets_correspond() {
        for name in ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v3+avxvnni", "aarch64", "aarch64+dotprod"]
        {
            assert_eq!(name.parse::<Target>().unwrap().to_string(), name);
        }
        let host: Target = "host".parse().unwrap();
        assert_eq!(host.to_string().parse(), Ok(host));
        assert!(host.runs_on(&host));
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        for name in ["", "x86-64-v9", "x86-64-v3+dotprod", "riscv64"] {
            let message = name.parse::<Target>().unwrap_err().to_string();
            assert!(message.contains(&format!("{name:?}")) && message.contains("x86-64-v3"), "{message}");
        }
    }

    #[test]
    fn a_lesser_target_runs_on_a_greater_machine() {
        let [v2, v3, arm] = ["x86-64-v2", "x86-64-v3", "aarch64"].map(|n| n.parse::<Target>().unwrap());
        assert!(v2.runs_on(&v3));
        assert!(!v3.runs_on(&v2));
        assert!(!arm.runs_on(&v3));
    }
}
