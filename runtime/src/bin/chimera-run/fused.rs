//! What `--fused-cache` (P5) demands of a plan: ternary weights are packed once in a step, and all probes read the same codes.
//!
//! Invariant: the plan is looked at, not the options that it was made from.

use crate::options::Failure;
use chimera_ir::plan::{Entry, Place, Plan, Step, WeightKind};
use std::collections::HashSet;

/// What `--fused-cache` shares in a plan: ternary weights whose codes `prepare` makes once in a step, and the bytes of what it makes.
///
/// # Errors
/// A plan whose probes read latents, so that codes are not shared.
pub fn shared_codes(plan: &Plan) -> Result<String, Failure> {
    let first = plan.entry("dual_loss").or(plan.entry("backward"));
    let ternary: Vec<&str> =
        plan.weights.iter().filter(|w| w.kind == WeightKind::Ternary).map(|w| w.name.as_str()).collect();
    let reads = first.map_or_else(HashSet::new, |e| touched(plan, e));
    if let Some(name) = ternary.iter().find(|name| reads.contains(**name)) {
        return Err(Failure::usage(format!(
            "--fused-cache: the probes read the latents of `{name}`, expected codes that are packed once in a step; choose --mode additive or scales"
        )));
    }
    Ok(format!(
        "--fused-cache: the codes of {} ternary weights are packed once in a step for all probes, {} KB",
        ternary.len(),
        plan.persistent >> 10
    ))
}

/// The names of the weights that an entry point touches.
fn touched<'a>(plan: &'a Plan, entry: &Entry) -> HashSet<&'a str> {
    let buffers = entry.steps.iter().flat_map(|step| match step {
        Step::Run { args, .. } => args.clone(),
        Step::Copy { from, to } => vec![*from, *to],
        Step::LoopBegin { .. } | Step::LoopEnd { .. } => vec![],
    });
    let weight = |b| match plan.buffer(b).place {
        Place::Weight(w) => plan.weights.get(w as usize).map(|w| w.name.as_str()),
        _ => None,
    };
    buffers.filter_map(weight).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hyper::HyperArgs;
    use crate::probes::ModeName;
    use crate::session::training_entries;
    use chimera_compiler::{Options, compile};
    use chimera_frontends::config::{Overrides, Scale, preset};

    #[test]
    fn codes_are_shared_where_probes_leave_them_alone() {
        let sets = ["hidden_size=32", "intermediate_size=32", "num_hidden_layers=2", "head_dim=16"];
        let overrides = Overrides { sets: sets.map(str::to_owned).to_vec(), ..Overrides::default() };
        let model = preset(Scale::Pico, &overrides).expect("a model").model;
        let mezo = |mode| HyperArgs {
            estimator: Some(crate::estimators::EstimatorName::Mezo),
            mode: Some(mode),
            ..HyperArgs::default()
        };
        for (args, shared) in [
            (HyperArgs::default(), true),
            (HyperArgs { estimator: Some(crate::estimators::EstimatorName::Adamw), ..HyperArgs::default() }, true),
            (mezo(ModeName::Additive), true),
            (mezo(ModeName::Scales), true),
            (mezo(ModeName::Requantise), false),
            (mezo(ModeName::Integer), false),
        ] {
            let hyper = HyperArgs { seq_len: Some(8), batch: Some(2), ..args }.fresh();
            let entries = training_entries(&model, &hyper);
            let plan = compile(&model, &Options { entries, ..Options::default() }).expect("a plan");
            let found = shared_codes(&plan);
            assert_eq!(found.is_ok(), shared, "{:?} {:?}: {found:?}", hyper.estimator, hyper.mode);
        }
    }
}
