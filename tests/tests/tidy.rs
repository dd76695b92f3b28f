//! The laws of the architecture that the text of the project can show.

use std::{collections::BTreeMap, fs, path::Path};

const MAX_LINES: usize = 600;

/// Who may depend on whom. A new edge is an architectural change: discuss it, then add it here.
const EDGES: &[(&str, &[&str])] = &[
    ("ir", &[]),
    ("frontends", &["ir"]),
    ("compiler/codegen", &["ir"]),
    ("compiler", &["codegen", "frontends", "ir"]),
    // The library uses codegen and ir only, see `the_runtime_library_runs_plans_and_compiles_nothing`; the binary joins all.
    ("runtime", &["codegen", "compiler", "frontends", "ir"]),
];

/// Words that must not occur in a folder's sources, with the law they break.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("ir/src", &["std::fs", "std::thread", "std::time", "std::env", "std::net", "rand::", "target_feature"], "law 1"),
    ("ir/src", &["x86", "avx", "neon", "aarch64"], "law 1: no CPU names"),
    ("frontends/src", &["chimera_codegen", "chimera_compiler", "chimera_runtime"], "dependencies point one way"),
    (
        "compiler/codegen/src",
        &["chimera_ir::graph", "chimera_ir::Graph", "chimera_ir::ops", "chimera_ir::plan"],
        "law 4",
    ),
];

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// All Rust sources by path from the root.
fn sources() -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    for top in ["ir", "frontends", "compiler", "runtime", "tests", "benches", "examples"] {
        walk(&root().join(top), &mut out);
    }
    assert!(out.len() > 50, "the sources are where this test looks for them");
    out
}

fn walk(dir: &Path, out: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            walk(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            out.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn dependencies_point_one_way() {
    for (krate, allowed) in EDGES {
        let manifest = fs::read_to_string(root().join(krate).join("Cargo.toml")).unwrap();
        let plain = manifest.split("[dev-dependencies]").next().unwrap();
        let mut deps: Vec<&str> = plain.lines().filter_map(|l| l.strip_prefix("chimera-")?.split('.').next()).collect();
        deps.sort_unstable();
        assert_eq!(deps, *allowed, "{krate}");
    }
}

#[test]
fn the_runtime_library_runs_plans_and_compiles_nothing() {
    for (name, text) in sources() {
        if name.starts_with("runtime/src/") && !name.starts_with("runtime/src/bin/") {
            for word in ["chimera_compiler", "chimera_frontends"] {
                assert!(!text.contains(word), "{name} uses {word}");
            }
        }
    }
}

#[test]
fn files_are_small_and_introduce_themselves() {
    for (name, text) in sources() {
        assert!(text.starts_with("//! "), "{name} does not say what it is for");
        assert!(text.lines().count() <= MAX_LINES, "{name} is longer than {MAX_LINES} lines");
    }
}

#[test]
fn libraries_keep_to_their_side() {
    for (name, text) in sources() {
        let code: String = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        for (folder, words, law) in FORBIDDEN {
            if name.starts_with(folder) {
                for word in *words {
                    assert!(!code.contains(word), "{name} contains {word:?}: {law}");
                }
            }
        }
    }
}

#[test]
fn only_codegen_and_runtime_are_unsafe_or_probe_the_cpu() {
    // An allocator that counts, single kernels called without a plan, and a peer that takes pointers can only be written so.
    let exempt = [
        "compiler/codegen/",
        "runtime/",
        "tests/tests/steady_state.rs",
        "tests/src/clusters.rs",
        "benches/src/peers.rs",
    ];
    let forbidden = [concat!("uns", "afe "), concat!("core::", "arch"), concat!("std::", "arch")];
    let probe = concat!("is_x86_feature", "_detected");
    for (name, text) in sources() {
        for word in forbidden {
            assert!(exempt.iter().any(|e| name.starts_with(e)) || !text.contains(word), "{name} contains {word:?}");
        }
        let host = ["compiler/codegen/src/host.rs", "compiler/codegen/src/target.rs"].contains(&name.as_str());
        assert!(host || !text.contains(probe), "{name} probes the CPU");
    }
}

#[test]
fn operations_are_matched_in_their_own_folder_and_by_rewrites_only() {
    // Rewrite rules name the operations they rewrite; nobody else takes an operation apart.
    let may = ["ir/src/ops/", "compiler/src/passes/", "compiler/src/fuse.rs", "tests/"];
    for (name, text) in sources() {
        if name.starts_with("compiler/codegen/") {
            // It sees kernels only; operations of its own are machine operations.
            let graph = ["chimera_ir::ops", "chimera_ir::Op", "chimera_ir::graph"];
            let test = name.starts_with("compiler/codegen/tests/");
            assert!(test || !graph.iter().any(|g| text.contains(g)), "{name} knows graphs");
            continue;
        }
        // Making an operation takes none apart.
        let code = text.split("#[cfg(test)]").next().unwrap().replace("Op::from", "").replace("Op::of_contract", "");
        assert!(may.iter().any(|m| name.starts_with(m)) || !code.contains("Op::"), "{name} matches on operations");
    }
}

#[test]
fn nothing_is_unfinished_and_no_machine_is_named() {
    let words = [
        concat!("todo", "!("),
        concat!("unimpl", "emented!("),
        concat!("#[ign", "ore"),
        concat!("FIX", "ME"),
        concat!("/wo", "rk/"),
        concat!("../sh", "ared"),
    ];
    for (name, text) in sources() {
        for word in words {
            assert!(!text.contains(word), "{name} contains {word:?}");
        }
    }
}

#[test]
fn versions_live_in_one_place() {
    for krate in ["ir", "frontends", "compiler/codegen", "compiler", "runtime", "tests", "benches", "examples"] {
        let manifest = fs::read_to_string(root().join(krate).join("Cargo.toml")).unwrap();
        for line in manifest.lines().skip_while(|l| *l != "[dependencies]") {
            assert!(!line.contains("version = \"") && !line.contains("= \"="), "{krate}: {line}");
        }
    }
}
