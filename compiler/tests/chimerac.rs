//! The command line of the compiler, run as users run it.
//!
//! Every test starts the built binary; nothing here knows how it works inside, the names of the stages apart.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use chimera_compiler::passes::STAGES;
use serde_json::Value;

/// A folder of its own for each test, empty at the start.
fn folder(test: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chimerac").join(test);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).expect("a temporary folder");
    path
}

fn config(name: &str) -> String {
    format!("{}/../examples/configs/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chimerac"));
    let set = std::env::vars().map(|v| v.0).filter(|name| name.starts_with("CHIMERA_"));
    for name in set {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn chimerac(args: &[&str]) -> Output {
    command(args).output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("output is UTF-8")
}

/// Stdout of a run that must succeed.
fn good(args: &[&str]) -> String {
    let out = chimerac(args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout).to_owned()
}

fn good_json(args: &[&str]) -> Value {
    serde_json::from_str(&good(args)).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

/// A run that must fail with this code, silent on stdout; the message has all these words.
fn bad(args: &[&str], code: i32, words: &[&str]) {
    let out = chimerac(args);
    let message = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
    assert!(out.stdout.is_empty(), "{args:?} writes to stdout: {}", text(&out.stdout));
    words.iter().for_each(|w| assert!(message.contains(w), "{args:?}: {w:?} is missing in {message}"));
}

/// Compile to a file and return its bytes.
fn plan(path: &Path, args: &[&str]) -> Vec<u8> {
    let file = path.to_str().expect("a UTF-8 path");
    good(&[&["compile"], args, &["-o", file]].concat());
    fs::read(path).expect("the plan is there")
}

#[test]
fn presets_and_real_configurations_compile() {
    let small = ["--tokens", "16", "--rows", "2", "--json"];
    let bytes = ["--vocab", "bytes"];
    let (v51, v53) = (config("chimera-5.1.json"), config("chimera-5.3.json"));
    let (pico, nano) = (config("pico.json"), config("nano.json"));
    let cases: [&[&str]; 6] = [
        &["--scale", "pico"],
        &[&pico],
        &[&nano],
        &[&v51, "--scale", "nano", bytes[0], bytes[1]],
        &[&v53, "--scale", "nano", bytes[0], bytes[1], "--estimator", "mezo", "--directions", "2"],
        &[&v53, "--scale", "test", "--loops-per-row", "--entries", "loss,decode"],
    ];
    for case in cases {
        let report = good_json(&[&["compile"], case, &small].concat());
        let entries = report["plan"]["entries"].as_array().expect("entries");
        assert!(entries.len() >= 3, "{case:?}: {entries:?}");
        for e in entries {
            assert!(e["arena_bound"].as_u64() <= e["arena"].as_u64(), "{case:?}: {e}");
        }
        assert!(report["model"]["parameters"].as_u64() > Some(10_000), "{case:?}");
        assert!(report["plan"]["kernels"].as_u64() > Some(10), "{case:?}");
    }
}

#[test]
fn the_full_model_compiles_and_says_what_it_leaves_out() {
    let path = config("chimera-5.3.json");
    let report = good_json(&["compile", &path, "--entries", "loss,decode", "--json"]);
    assert!(report["model"]["parameters"].as_u64() > Some(4_000_000_000));
    let not_yet = report["model"]["not_yet"].as_array().expect("a list");
    let paths: Vec<&str> = not_yet.iter().filter_map(|n| n["path"].as_str()).collect();
    assert!(paths.contains(&"span_inference.enabled"), "{paths:?}");
    assert!(not_yet.iter().all(|n| n["reason"].as_str().is_some_and(|r| r.contains("not implemented"))));
    let claims = report["model"]["claims"].as_array().expect("a list");
    assert!(claims.iter().any(|c| c["path"] == "params.physical" && c["agrees"] == false), "{claims:?}");
    let human = good(&["compile", &path, "--scale", "full", "--entries", "decode"]);
    for word in [
        "span_inference.enabled",
        "params.physical",
        "differs",
        "state of one stream",
        "memory of the plan",
        "compiled in",
    ] {
        assert!(human.contains(word), "{word} is missing");
    }
}

#[test]
fn gradients_keep_to_a_budget() {
    let args = ["--scale", "pico", "--vocab", "bytes", "--entries", "grad", "--rows", "8", "--tokens", "64"];
    let compiled = |more: &[&str]| good_json(&[&["compile"], &args[..], more, &["--json"]].concat());
    let peak = |report: &Value| report["plan"]["predicted_peak"].as_u64().expect("bytes");
    let most = peak(&compiled(&[]));
    bad(&[&["compile"], &args[..], &["--budget", "1K"]].concat(), 4, &["the budget is 1024 bytes", "at least"]);
    let budget = most * 3 / 4;
    let small = compiled(&["--budget", &budget.to_string()]);
    assert!(peak(&small) <= budget, "{small}");
    let human = good(&[&["inspect"], &args[..], &["--budget", &budget.to_string()]].concat());
    for word in ["recompute in grad", "of the operations twice", "predicted peak on 2 threads"] {
        assert!(human.contains(word), "{word} is missing");
    }
    bad(&[&["compile"], &args[..], &["--budget", "lots"]].concat(), 2, &["such as 4G"]);
}

#[test]
fn plans_for_packed_weights_are_smaller_and_only_run() {
    let forward = ["compile", "--scale", "test", "--entries", "logits,decode", "--tokens", "8", "--json"];
    let weights = |args: &[&str]| {
        let report = good_json(args);
        let memory = report["plan"]["memory"].as_array().expect("a list").clone();
        let row = memory.into_iter().find(|m| m["name"] == "weights");
        row.and_then(|m| m["bytes"].as_u64()).expect("bytes of the weights")
    };
    assert!(weights(&[&forward[..], &["--packed"]].concat()) * 2 < weights(&forward));
    bad(&["compile", "--scale", "test", "--packed"], 2, &["dual_loss changes latents", "leave it out"]);
}

#[test]
fn compiling_twice_gives_the_same_bytes_in_both_forms() {
    let dir = folder("twice");
    let args = ["--scale", "test", "--tokens", "12", "--target", "x86-64-v3"];
    let first = plan(&dir.join("a.plan"), &args);
    assert_eq!(first, plan(&dir.join("b.plan"), &args));
    let written = plan(&dir.join("a.txt"), &args);
    assert!(written.starts_with(b"chimera-plan "));
    let flagged = plan(&dir.join("c.plan"), &[&args[..], &["--text"]].concat());
    assert_eq!(written, flagged, "--text and .txt are the same form");
    let inspect = |name: &str| good(&["inspect", dir.join(name).to_str().unwrap(), "--section", "all", "--json"]);
    assert_eq!(inspect("a.plan"), inspect("a.txt"), "both forms hold the same plan");
    let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "no temporary file is left: {left:?}");
}

#[test]
fn every_stage_can_be_the_last_and_is_dumped() {
    let dir = folder("stages");
    let args = ["compile", "--scale", "test", "--tokens", "8", "--entries", "loss,dual_loss"];
    let (last, stages) = STAGES.split_last().expect("there are stages");
    assert_eq!(*last, "plan");
    for &stage in stages {
        let out = good(&[&args[..], &["--stop-after", stage]].concat());
        assert!(out.contains("entry dual_loss\n"), "{stage}");
        assert_eq!(out.contains("entry loss\n"), stage != "transform", "{stage}: only probes transform");
    }
    let stopped = good_json(&[&args[..], &["--stop-after", "cse", "--json"]].concat());
    assert_eq!(stopped["stopped_after"], "cse");
    let dump = dir.join("dump");
    let whole = good(&[&args[..], &["--stop-after", "plan", "--dump-phases", dump.to_str().unwrap()]].concat());
    assert!(whole.contains("memory of the plan"), "the last stage gives the plan");
    let mut files: Vec<String> =
        fs::read_dir(&dump).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files[0], "001-loss-build.txt");
    assert!(files.iter().any(|f| f.ends_with("-dual_loss-transform.txt")), "{files:?}");
    bad(&[&args[..], &["--stop-after", "fusion"]].concat(), 2, &["fusion", "gate-up"]);
    bad(&[&args[..], &["--stop-after", "fuse", "-o", "x"]].concat(), 2, &["cannot be used"]);
}

/// A table with every variant of every product of a small plan, of which the plan must have the fastest, whatever the model says.
#[test]
fn tables_choose_variants_and_only_where_they_belong() {
    let dir = folder("tune");
    let at = |name: &str| dir.join(name).to_str().expect("a UTF-8 path").to_owned();
    let (table, first, second) = (at("table.json"), at("first.plan"), at("second.plan"));
    let model = ["--scale", "test", "--tokens", "16", "--entries", "loss,decode"];
    let out = good(&[&["tune"], &model[..], &["-o", &table, "--threads", "1", "--seconds", "1"]].concat());
    assert!(out.contains("ternary_product(m=") && out.contains("the cost model is"), "{out}");
    let written = fs::read_to_string(&table).unwrap();
    let mut json: Value = serde_json::from_str(&written).unwrap();
    assert_eq!((json["threads"].as_u64(), json["version"].as_u64()), (Some(1), Some(1)));
    assert!(json["processor"].is_string() && json["date"].as_str().is_some_and(|d| d.len() == 10), "{json}");
    // Not the fastest, but another one: the table decides, not the clock.
    for e in json["entries"].as_array_mut().unwrap() {
        let candidates = e["candidates"].as_array().unwrap().clone();
        assert!(candidates.len() > 1 && candidates.iter().all(|c| c["measured"].as_f64() > Some(0.0)), "{e}");
        let last = candidates.last().unwrap()["variant"].clone();
        e["chosen"] = last;
    }
    fs::write(&table, json.to_string()).unwrap();
    let tuned = [&model[..], &["--tuning", &table]].concat();
    let bytes = plan(Path::new(&first), &tuned);
    assert_eq!(bytes, plan(Path::new(&second), &tuned), "the same table gives the same plan");
    assert_ne!(bytes, plan(Path::new(&at("model.plan")), &model), "the table is used");
    let why = good_json(&["inspect", &first, "--why", "--tuning", &table, "--json"]);
    let mut seen = 0;
    for k in
        why["kernels"].as_array().unwrap().iter().filter(|k| k["candidates"].as_array().is_some_and(|c| !c.is_empty()))
    {
        let entries = json["entries"].as_array().unwrap();
        let entry = entries.iter().find(|e| e["contract"] == k["contract"]).unwrap_or_else(|| panic!("{k}"));
        assert_eq!((&k["variant"], &k["reason"]), (&entry["chosen"], &Value::from("the fastest that was measured")));
        let chosen: Vec<&Value> = k["candidates"].as_array().unwrap().iter().filter(|c| c["chosen"] == true).collect();
        assert!(chosen.len() == 1 && chosen[0]["measured_us"].is_f64() && chosen[0]["predicted_us"].is_f64(), "{k}");
        seen += 1;
    }
    assert!(seen > 2, "{why}");
    let why = good(&["inspect", &first, "--why"]);
    assert!(why.contains("times from the cost model") && why.contains("chosen when the plan was made"), "{why}");
    let own = good(&["inspect", &at("model.plan"), "--why"]);
    assert!(own.contains("the least predicted time"), "{own}");
    // A plan is tuned by its own kernels.
    good(&["tune", &first, "-o", &at("again.json"), "--seconds", "0", "--threads", "2"]);
    let again: Value = serde_json::from_str(&fs::read_to_string(at("again.json")).unwrap()).unwrap();
    assert_eq!(again["entries"].as_array().unwrap().len(), json["entries"].as_array().unwrap().len());
    // Another machine's table is left out with a warning, a damaged one is an error.
    let foreign = at("foreign.json");
    fs::write(&foreign, json.to_string().replace(json["processor"].as_str().unwrap(), "Abacus 1")).unwrap();
    let out = chimerac(&[&["compile"], &model[..], &["--tuning", &foreign, "-o", &second]].concat());
    assert!(out.status.success() && text(&out.stderr).contains("Abacus 1"), "{}", text(&out.stderr));
    assert_eq!(fs::read(&second).unwrap(), fs::read(at("model.plan")).unwrap(), "the cost model chooses");
    fs::write(&foreign, &written[..written.len() / 2]).unwrap();
    bad(&[&["compile"], &model[..], &["--tuning", &foreign]].concat(), 5, &["no tuning table", "chimerac tune"]);
    bad(&["compile", "--scale", "test", "--tuning", &at("missing.json")], 1, &["missing.json"]);
    bad(&["tune", "--scale", "test", "-o", &table, "--target", "aarch64"], 2, &["does not run on this machine"]);
    bad(&["tune", "--scale", "test", "-o", &table, "--seconds=-1"], 2, &["a number of seconds"]);
    bad(&["tune", "--scale", "test"], 2, &["--output"]);
}

#[test]
fn the_number_of_rewrites_is_bounded() {
    let steps = |n: &str| {
        let args = ["compile", "--scale", "pico", "--tokens", "8", "--entries", "loss", "--max-rewrites", n, "--json"];
        let report = good_json(&args);
        let entries = report["plan"]["entries"].as_array().expect("a list").clone();
        entries.iter().find(|e| e["name"] == "loss").and_then(|e| e["steps"].as_u64()).expect("a number")
    };
    let (none, some, all) = (steps("0"), steps("20"), steps("1000000"));
    assert!(none > some && some > all, "{none} {some} {all}");
}

#[test]
fn every_section_is_shown_to_people_and_to_programs() {
    let dir = folder("sections");
    let path = dir.join("nano.plan");
    plan(&path, &[&config("nano.json"), "--tokens", "16"]);
    let path = path.to_str().unwrap();
    let words = [
        ("summary", "entry points"),
        ("fusion", "left apart"),
        ("memory", "lower bound"),
        ("kernels", "ternary_product"),
        ("entries", "shared work"),
        ("groups", "layers.0"),
    ];
    for (section, word) in words {
        assert!(good(&["inspect", path, "--section", section]).contains(word), "{section}");
        let value = good_json(&["inspect", path, "--section", section, "--json"]);
        assert!(value.get(section).is_some(), "{section}: {value}");
    }
    let graph = good(&["inspect", &config("nano.json"), "--tokens", "16", "--section", "graph"]);
    assert!(graph.contains("graph of dual_loss") && graph.contains("transform"), "{graph}");
    bad(&["inspect", path, "--section", "graph"], 2, &["configuration"]);
    let all = good_json(&["inspect", path, "--section", "all", "--json", "--verbose", "--entry", "decode"]);
    assert_eq!(all.as_object().map(serde_json::Map::len), Some(6));
    assert_eq!(all["entries"].as_array().map(Vec::len), Some(1));
    assert!(all["kernels"]["kernels"][0]["loops"].as_str().is_some_and(|t| t.starts_with("(kernel")));
    let configured = good_json(&["inspect", &config("nano.json"), "--section", "summary", "--json"]);
    assert!(configured["summary"]["model"]["stream_bytes"].as_u64() > Some(0));
    bad(&["inspect", path, "--entry", "los"], 2, &["decode"]);
    bad(&["inspect", path, "--scale", "pico"], 2, &["compile its configuration again"]);
}

#[test]
fn the_memory_map_keeps_what_the_plan_promises() {
    let args = ["inspect", "--scale", "test", "--tokens", "16", "--section", "memory,kernels,fusion", "--json"];
    let report = good_json(&args);
    for e in report["memory"].as_array().expect("a list") {
        let live: Vec<u64> = e["live"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        assert_eq!(live.iter().max().copied(), e["arena_bound"].as_u64(), "{}", e["entry"]);
        for b in e["buffers"].as_array().unwrap() {
            let end = b["offset"].as_u64().unwrap() + b["bytes"].as_u64().unwrap();
            assert!(end <= e["arena"].as_u64().unwrap(), "{b}");
        }
    }
    for k in report["kernels"]["kernels"].as_array().expect("a list") {
        assert!(k["uses"].as_u64() > Some(0), "{k} is not used");
        assert!(k["emitter"].is_string(), "{k}");
    }
    let decisions = report["fusion"]["decisions"].as_array().expect("a list");
    let total = |fused: bool| -> u64 {
        let of = decisions.iter().filter(|d| (d["verdict"] == "fused") == fused);
        of.map(|d| d["count"].as_u64().unwrap()).sum()
    };
    assert_eq!(Some(total(true)), report["fusion"]["fused"].as_u64());
    assert_eq!(Some(total(false)), report["fusion"]["kept"].as_u64());
    assert!(total(true) > 0 && total(false) > 0);
}

#[test]
fn probing_fewer_weights_shares_more_work() {
    let share = |trainable: &[&str]| {
        let args = [
            "inspect",
            "--scale",
            "pico",
            "--tokens",
            "16",
            "--entries",
            "dual_loss",
            "--section",
            "entries",
            "--json",
        ];
        let report = good_json(&[&args[..], trainable].concat());
        let entries = report["entries"].as_array().expect("a list").clone();
        let dual = entries.into_iter().find(|e| e["name"] == "dual_loss").expect("the entry");
        dual["shared"]["share"].as_f64().expect("a share")
    };
    let (all, last) = (share(&[]), share(&["--trainable", "layers.3,norm"]));
    assert!(last > all + 0.2, "{all} {last}");
    bad(&["compile", "--scale", "pico", "--trainable", "layer.3"], 2, &["layer.3"]);
}

#[test]
fn machine_code_and_graphs_are_text() {
    let dir = folder("asm");
    let path = dir.join("p.plan");
    plan(&path, &["--scale", "pico", "--tokens", "8", "--target", "x86-64-v3", "--entries", "decode"]);
    let path = path.to_str().unwrap();
    let by_index = good(&["inspect", path, "--asm", "0"]);
    assert!(by_index.starts_with("; wide for x86-64-v3") && by_index.contains("ret"), "{by_index}");
    let kernels = good_json(&["inspect", path, "--section", "kernels", "--json"]);
    let name = kernels["kernels"]["kernels"][0]["name"].as_str().expect("a name").to_owned();
    assert_eq!(by_index, good(&["inspect", path, "--asm", &name]));
    let arm = good(&["inspect", path, "--asm", &name, "--target", "aarch64"]);
    assert!(arm.contains("aarch64") && !arm.contains("rbp"), "{arm}");
    bad(&["inspect", path, "--asm", "99999"], 2, &["99999"]);
    let dot = good(&["inspect", path, "--dot=decode"]);
    assert!(dot.starts_with("digraph {") && dot.contains("output logits") && dot.contains("->"), "{dot}");
    assert!(good(&["inspect", path, "--dot"]).matches("digraph").count() >= 2);
}

#[test]
fn wrong_configurations_end_with_3_and_the_key() {
    let dir = folder("wrong");
    let file = dir.join("bad.json");
    let cases = [
        ("{ \"hiden_size\": 64 }", "bad.json:1:3"),
        ("{ \"hidden_size\": \"big\" }", "key: hidden_size"),
        ("{ \"backbone\": { \"layer_pattern\": \"GD XX\" } }", "key: backbone.layer_pattern"),
        ("{ \"hidden_size\": 64", "truncated"),
        ("", "expected"),
    ];
    for (source, place) in cases {
        fs::write(&file, source).unwrap();
        bad(&["compile", file.to_str().unwrap()], 3, &["error[C", "bad.json", place]);
        bad(&["inspect", file.to_str().unwrap()], 3, &["error[C"]);
    }
    fs::write(&file, cases[0].0).unwrap();
    bad(&["compile", file.to_str().unwrap()], 3, &["did you mean `hidden_size`"]);
    fs::write(&file, "[".repeat(100_000)).unwrap();
    bad(&["compile", file.to_str().unwrap()], 3, &["error[C"]);
    bad(&["compile", "--scale", "pico", "--set", "titans.core=tree"], 3, &["titans.core"]);
    bad(&["compile", dir.to_str().unwrap()], 3, &["error[C0101]"]);
    bad(&["compile", dir.join("absent.json").to_str().unwrap()], 3, &["error[C0101]"]);
}

#[test]
fn the_rate_of_the_expert_balance_is_the_configurations() {
    let dir = folder("balance");
    let rate = |args: &[&str]| {
        let written =
            plan(&dir.join("a.txt"), &[args, &["--entries", "loss,dual_loss,update", "--tokens", "8"]].concat());
        let all = String::from_utf8(written).expect("the text form");
        let at = all.find("balance: ").expect("the update names its rate") + "balance: ".len();
        all[at..].split(' ').next().expect("a number").to_owned()
    };
    assert_eq!(rate(&["--scale", "test"]), "0.001");
    assert_eq!(rate(&["--scale", "test", "--set", "backbone.moe.bias_update_rate=0.25"]), "0.25");
    assert_eq!(rate(&["--scale", "test", "--balance", "0.5"]), "0.5");
    assert_eq!(rate(&["--scale", "pico"]), "0.0");
}

#[test]
fn vocabularies_give_the_number_of_ids() {
    let dir = folder("vocabularies");
    let file = dir.join("text.vocab");
    fs::write(&file, "chimera-vocab 1\nkind o200k:restricted\ntokens 301\ncrc32c 00000000\n").expect("written");
    let file = file.to_str().unwrap();
    let parameters = |vocab: &str| {
        let report = good_json(&["compile", "--scale", "pico", "--entries", "decode", "--vocab", vocab, "--json"]);
        report["model"]["parameters"].as_u64().expect("a number")
    };
    let width = (parameters("302") - parameters("301")) as usize;
    for (vocab, ids) in [("bytes", 257), (file, 301), ("o200k:restricted=4711", 4711), ("o200k", 200_073)] {
        assert_eq!(parameters(vocab), parameters("301") - (301 * width) as u64 + (ids * width) as u64, "{vocab}");
    }
    fs::write(file, "a text\n").expect("written");
    bad(&["compile", "--scale", "pico", "--vocab", file], 5, &["text.vocab", "line 1", "chimera-vocab"]);
}

#[test]
fn wrong_usage_ends_with_2() {
    let pico = ["compile", "--scale", "pico"];
    for (args, word) in [
        (&["--scale", "pica"][..], "pico"),
        (&["--entries", "loss,loss"], "twice"),
        (&["--entries", "los"], "loss"),
        (&["--rows", "0"], "rows"),
        (&["--kappa", "nan"], "positive"),
        (&["--target", "vax"], "x86-64"),
        (&["--vocab", "words"], "o200k:restricted=N"),
        (&["--vocab", "o200k:restricted"], "chimera-run vocab"),
        (&["--vocab", "o200k:restricted=12"], "257"),
        (&["--loops", "3"], "no looped layers"),
    ] {
        bad(&[&pico[..], args].concat(), 2, &[word]);
    }
    bad(&["compile"], 2, &["--scale"]);
    bad(&["compil"], 2, &["compile"]);
    bad(&["compile", "--scale", "test", "--loops", "99"], 2, &["99"]);
}

#[test]
fn damaged_plans_end_with_5() {
    let dir = folder("damaged");
    let file = dir.join("p.plan");
    let args = ["--scale", "pico", "--tokens", "4", "--entries", "decode"];
    let bytes = plan(&file, &args);
    let check = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        bad(&["inspect", file.to_str().unwrap()], 5, &["p.plan"]);
    };
    for at in [0, 4, 8, 20, 24, bytes.len() / 2, bytes.len() - 1] {
        check(&bytes[..at]);
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        // A file with a wrong first byte that is not called a plan would be read as a configuration.
        check(&changed);
    }
    check(&[&bytes[..], b"x"].concat());
    let mut later = bytes.clone();
    later[8] = 99;
    fs::write(&file, later).unwrap();
    bad(&["inspect", file.to_str().unwrap()], 5, &["version 99", "compile the plan again"]);
    let written = plan(&dir.join("p.txt"), &args);
    let mut changed = written.clone();
    let at = changed.len() / 2;
    changed[at] = if changed[at] == b'1' { b'2' } else { b'1' };
    fs::write(dir.join("p.txt"), changed).unwrap();
    bad(&["inspect", dir.join("p.txt").to_str().unwrap()], 5, &["checksum"]);
    fs::write(dir.join("p.txt"), [&written[..], &[0xff, 0xfe]].concat()).unwrap();
    bad(&["inspect", dir.join("p.txt").to_str().unwrap()], 5, &["utf-8"]);
    fs::write(&file, &bytes).unwrap();
    bad(&["compile", file.to_str().unwrap()], 3, &["is a plan"]);
}

#[test]
fn a_failed_write_leaves_the_old_plan_alone() {
    let dir = folder("write");
    bad(&["compile", "--scale", "pico", "-o", dir.to_str().unwrap()], 1, &["cannot write"]);
    let missing = dir.join("no/such/folder.plan");
    bad(&["compile", "--scale", "pico", "-o", missing.to_str().unwrap()], 1, &["cannot write"]);
    if Path::new("/dev/full").exists() {
        bad(&["compile", "--scale", "pico", "--tokens", "4", "-o", "/dev/full"], 4, &["cannot write /dev/full"]);
    }
    let old = dir.join("old.plan");
    fs::write(&old, "old").unwrap();
    bad(
        &[
            "compile",
            "--scale",
            "pico",
            "--rows",
            "65536",
            "--tokens",
            "1048576",
            "--vocab",
            "o200k",
            "-o",
            old.to_str().unwrap(),
        ],
        4,
        &["smaller sizes"],
    );
    assert_eq!(fs::read(&old).unwrap(), b"old");
}

#[test]
fn environment_twins_stand_for_flags() {
    let out = command(&["compile"])
        .env("CHIMERA_SCALE", "pico")
        .env("CHIMERA_ENTRIES", "decode")
        .env("CHIMERA_JSON", "1")
        .output();
    let out = out.expect("the binary starts");
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let names: Vec<&Value> = report["plan"]["entries"].as_array().unwrap().iter().map(|e| &e["name"]).collect();
    assert_eq!(names, ["prepare", "decode"]);
}

#[test]
fn the_key_table_and_the_schema_agree() {
    let keys = good_json(&["keys", "--json"]);
    let hidden = keys.as_array().unwrap().iter().find(|k| k["path"] == "hidden_size").expect("the key");
    assert_eq!((&hidden["disposition"], &hidden["default"]), (&Value::from("consumed"), &Value::from(2560)));
    assert!(good(&["keys", "hidden_size"]).contains("default 2560"));
    bad(&["keys", "no such key"], 1, &["no key contains"]);
    let schema = good_json(&["schema"]);
    assert_eq!(schema["properties"]["hidden_size"]["default"], 2560);
}

#[test]
fn help_has_examples_and_a_closed_pipe_is_no_error() {
    for args in
        [&["--help"][..], &["compile", "--help"], &["inspect", "--help"], &["schema", "--help"], &["keys", "--help"]]
    {
        assert!(good(args).contains("chimerac "), "{args:?}");
    }
    let mut child =
        command(&["keys", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    drop(child.stdout.take());
    let out = child.wait_with_output().expect("the binary ends");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(out.stderr.is_empty(), "{}", text(&out.stderr));
}
