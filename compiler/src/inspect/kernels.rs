//! The kernels of a plan and who would make code for them.
//!
//! Emitters are asked in their order, as a module does; nothing is placed in executable memory.

use std::{error, fmt};

use chimera_codegen::{Code, Target, emitters};
use chimera_ir::{
    Op,
    loops::{self, Kernel, Role},
    plan::{Plan, Step},
};
use rayon::prelude::*;
use serde::Serialize;

use super::table::{Table, bytes};
use crate::tuning::share_of_peak;

/// A buffer of a kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Argument {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: &'static str,
    /// Number of elements.
    pub len: usize,
    /// `in`, `out`, `inout` or `scratch`.
    pub role: &'static str,
}

/// One kernel.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Index in the plan.
    pub index: usize,
    /// Name.
    pub name: String,
    /// How many steps run it.
    pub uses: usize,
    /// Independent instances.
    pub grid: usize,
    /// Its buffers.
    pub buffers: Vec<Argument>,
    /// Bytes of private memory of one worker.
    pub scratch_bytes: usize,
    /// The contract with its parameters.
    pub contract: Option<String>,
    /// The emitter that serves it; none when all refuse.
    pub emitter: Option<&'static str>,
    /// More specific emitters, and why they do not.
    pub refusals: Vec<(&'static str, String)>,
    /// Bytes of machine code; 0 when interpreted.
    pub code_bytes: usize,
    /// The variant of its lowering; empty where there is one way only.
    pub variant: String,
    /// The share of the peak of byte products that the cost model predicts for one thread, of kernels that it covers.
    pub predicted_share: Option<f64>,
    /// Kernel IR, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loops: Option<String>,
}

/// All kernels.
#[derive(Clone, Debug, Serialize)]
pub struct KernelReport {
    /// The target that code is for.
    pub target: String,
    /// One for each kernel, in the order of the plan.
    pub kernels: Vec<KernelRow>,
}

/// The kernels of a plan as served on `target`, with their text if `text` is set.
pub fn kernels(plan: &Plan, target: &Target, text: bool) -> KernelReport {
    let mut uses = vec![0; plan.kernels.len()];
    for step in plan.entries.iter().flat_map(|e| &e.steps) {
        if let Step::Run { kernel, .. } = step {
            uses[kernel.0 as usize] += 1;
        }
    }
    let row = |(index, k): (usize, &Kernel)| row(index, k, uses[index], target, text);
    KernelReport { target: target.to_string(), kernels: plan.kernels.par_iter().enumerate().map(row).collect() }
}

fn row(index: usize, k: &Kernel, uses: usize, target: &Target, text: bool) -> KernelRow {
    let (mut emitter, mut code_bytes, mut refusals) = (None, 0, vec![]);
    for e in emitters() {
        match e.accepts(k, target).and_then(|()| e.emit(k, target)) {
            Ok(code) => {
                emitter = Some(e.name());
                code_bytes = match code {
                    Code::Machine(code) => code.len(),
                    Code::Interpreted => 0,
                };
                break;
            }
            Err(why) => refusals.push((e.name(), why.to_string())),
        }
    }
    let buffer = |b: &loops::BufDecl| Argument {
        name: b.name.clone(),
        dtype: b.dtype.name(),
        len: b.len,
        role: match b.role {
            Role::In => "in",
            Role::Out => "out",
            Role::InOut => "inout",
            Role::Scratch => "scratch",
        },
    };
    KernelRow {
        index,
        name: k.name.clone(),
        uses,
        grid: k.grid,
        buffers: k.bufs.iter().map(buffer).collect(),
        scratch_bytes: k.scratch_bytes(),
        contract: k.contract.as_ref().map(ToString::to_string),
        emitter,
        refusals,
        code_bytes,
        variant: k.variant.to_string(),
        predicted_share: predicted(k, target),
        loops: text.then(|| loops::print(k).to_text()),
    }
}

/// The predicted share of the peak of the operation that a kernel is made for.
fn predicted(k: &Kernel, target: &Target) -> Option<f64> {
    let (op, ins) = Op::of_contract(k.contract.as_ref()?)?;
    op.variants(&ins).contains(&k.variant).then(|| share_of_peak(&op.work(&ins, &k.variant), target))?
}

impl fmt::Display for KernelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code: usize = self.kernels.iter().map(|k| k.code_bytes).sum();
        writeln!(f, "{} kernels for {}, {} of machine code", self.kernels.len(), self.target, bytes(code as u64))?;
        let mut table = Table::new(&[
            "index", "uses", "grid", "buffers", "scratch", "code", "of peak", "emitter", "contract", "kernel",
        ]);
        for k in &self.kernels {
            let args = k.buffers.iter().filter(|b| b.role != "scratch").count();
            let numbers = [k.index, k.uses, k.grid, args].map(|n| n.to_string());
            let sizes = [bytes(k.scratch_bytes as u64), bytes(k.code_bytes as u64)];
            let contract = k.contract.as_ref().map_or("-", |c| c.split('(').next().unwrap_or(c));
            let words = [k.emitter.unwrap_or("none").to_owned(), contract.to_owned(), k.name.clone()];
            let share = k.predicted_share.map_or("-".to_owned(), |x| format!("{:.0} %", 100.0 * x));
            table.row(numbers.into_iter().chain(sizes).chain([share]).chain(words));
        }
        write!(f, "{table}")?;
        for k in self.kernels.iter().filter(|k| !k.variant.is_empty()) {
            writeln!(f, "  kernel {} {}: {}", k.index, k.name, k.variant)?;
        }
        for k in self.kernels.iter().filter(|k| !k.refusals.is_empty()) {
            writeln!(f, "  kernel {} {}", k.index, k.name)?;
            k.refusals.iter().try_for_each(|(name, why)| writeln!(f, "    {name} refused: {why}"))?;
        }
        let detailed = if f.alternate() { &self.kernels[..] } else { &[] };
        for k in detailed {
            writeln!(f, "\nkernel {} {}", k.index, k.name)?;
            if let Some(c) = &k.contract {
                writeln!(f, "  contract {c}")?;
            }
            for b in &k.buffers {
                writeln!(f, "  {:7} {}: {}[{}]", b.role, b.name, b.dtype, b.len)?;
            }
            if let Some(text) = &k.loops {
                writeln!(f, "{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A kernel that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKernel {
    wanted: String,
    candidates: Vec<String>,
    total: usize,
}

impl fmt::Display for UnknownKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.candidates.is_empty() {
            let total = self.total;
            return write!(f, "no kernel is called {:?}, expected a name or an index below {total}", self.wanted);
        }
        write!(f, "kernel {:?} could be any of {}", self.wanted, self.candidates.join(", "))
    }
}

impl error::Error for UnknownKernel {}

/// The kernel with that index or name; the part of a name before `#` suffices where it is unique.
///
/// # Errors
/// When there is none, or more than one.
pub fn find_kernel<'a>(plan: &'a Plan, wanted: &str) -> Result<&'a Kernel, UnknownKernel> {
    let total = plan.kernels.len();
    let by_index = wanted.parse::<usize>().ok().and_then(|i| plan.kernels.get(i));
    if let Some(k) = by_index.or_else(|| plan.kernels.iter().find(|k| k.name == wanted)) {
        return Ok(k);
    }
    let stem = |k: &&Kernel| k.name.split('#').next() == Some(wanted);
    let found: Vec<&Kernel> = plan.kernels.iter().filter(stem).collect();
    match found[..] {
        [one] => Ok(one),
        _ => Err(UnknownKernel {
            wanted: wanted.to_owned(),
            candidates: found.iter().map(|k| k.name.clone()).collect(),
            total,
        }),
    }
}
