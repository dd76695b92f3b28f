//! Plans of small models: every entry point compiles, kernels verify, and compilation is a function of its input.

use chimera_compiler::{EntryKind, EntrySpec, Options, Scheme, UpdateRule, compile};
use chimera_frontends::config::{Overrides, Scale, preset};
use chimera_ir::{loops, ops::Distribution, plan::Plan};

fn all_entries(rows: usize, tokens: usize, scheme: &Scheme) -> Options {
    let spec = |kind, rows, tokens| EntrySpec { kind, rows, tokens, depth: None };
    Options {
        entries: vec![
            spec(EntryKind::Loss, rows, tokens),
            spec(EntryKind::Logits, 1, tokens),
            spec(EntryKind::Prefill, 1, tokens),
            spec(EntryKind::Decode, 1, 1),
            spec(EntryKind::DualLoss(scheme.clone()), rows, tokens),
            spec(EntryKind::Update(scheme.clone(), UpdateRule::default()), rows, tokens),
        ],
        ..Options::default()
    }
}

fn schemes() -> Vec<Scheme> {
    let mezo = |requantise, directions| Scheme::Mezo {
        requantise,
        directions,
        dist: Distribution::Rademacher,
        eps: 1e-3,
        eps_rel: Some(0.1),
    };
    vec![Scheme::PerSequence { rank: 2, kappa: 0.1, sigma_vec: 0.01 }, mezo(true, 1), mezo(false, 2)]
}

fn plan(scale: Scale, scheme: &Scheme) -> Plan {
    let loaded = preset(scale, &Overrides::default()).expect("a preset loads");
    compile(&loaded.model, &all_entries(2, 24, scheme)).unwrap_or_else(|e| panic!("{scale}: {e}"))
}

#[test]
fn every_entry_point_of_every_scheme_compiles_and_its_kernels_verify() {
    for scale in [Scale::Pico, Scale::Test] {
        for scheme in schemes() {
            let plan = plan(scale, &scheme);
            let names: Vec<&str> = plan.entries.iter().map(|e| e.name.as_str()).collect();
            assert_eq!(names, ["prepare", "loss", "logits", "prefill", "decode", "dual_loss", "update"]);
            for kernel in &plan.kernels {
                loops::verify(kernel).unwrap_or_else(|e| panic!("{scale} {}: {e}", kernel.name));
            }
            for entry in &plan.entries {
                assert!(entry.arena_bound <= entry.arena, "{}", entry.name);
            }
        }
    }
}

#[test]
fn compiling_twice_gives_the_same_plan() {
    let scheme = &schemes()[0];
    assert_eq!(plan(Scale::Test, scheme), plan(Scale::Test, scheme));
}
