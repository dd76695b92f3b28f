//! `chimera-run train --phase` as a user meets it: what phases learn, that they resume to the bit, and what they refuse.

mod common;

use std::fs;
use std::process::Output;

use chimera_runtime::files::b158::B158;
use chimera_runtime::train::journal::{self, Item, Record};
use common::{LOOPED, Place};
use serde_json::Value;

/// A small model, and phases whose parameters tests can tell from defaults.
const MODEL: &str = r#"{
  "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32, "vocab_size": 257,
  "backbone": { "layer_pattern": "GD XM", "moe": { "enabled": false } }, "looping": { "enabled": false },
  "training": { "phases": [
    { "name": "pretrain", "optimizer": "AdamW", "weight_decay": 0.05, "grad_clip": 2.0 },
    { "name": "ctx_extend", "stages": [[64, "main"], [128, 6, 1e-3], [256, 4, 5e-4]] },
    { "name": "sft", "data": ["ChatA", "ChatB"], "epochs": 2, "lr": 0.004, "seq_len": 192 },
    { "name": "dpo", "data": "Preferred", "epochs": 3, "lr": 0.001, "beta": 0.2, "seq_len": 224, "batch_tokens": 1792, "schedule": "constant" }
  ] } }"#;

impl Place {
    fn new() -> Place {
        let place = Place::with_model(MODEL);
        for name in ["chat.jsonl", "preferences.jsonl"] {
            fs::copy(format!("{}/../tests/fixtures/phases/{name}", env!("CARGO_MANIFEST_DIR")), place.path(name))
                .expect("copied");
        }
        place
    }

    fn run(&self, words: &[&str]) -> (Option<i32>, String, String) {
        let mut command = self.command(words);
        let Output { status, stdout, stderr } = command.env("CHIMERA_CODE_CACHE", "off").output().expect("it starts");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (status.code(), text(stdout), text(stderr))
    }

    /// A run that ends well: its steps, and what it says.
    fn train(&self, words: &[&str]) -> (Vec<Value>, String) {
        let (code, stdout, stderr) = self.run(&[&["train", "model.json", "--json"], words].concat());
        assert_eq!(code, Some(0), "{words:?}: {stderr}");
        (stdout.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect(), stderr)
    }

    fn tensors(&self, checkpoint: &str) -> Vec<(String, Vec<u8>)> {
        let file = B158::open(&self.path(checkpoint)).expect("a checkpoint");
        let names: Vec<String> = file.iter().map(|t| t.0.to_owned()).collect();
        names.into_iter().map(|n| (n.clone(), file.require(&n).expect("a tensor").bytes.to_vec())).collect()
    }

    fn options(&self, checkpoint: &str) -> Value {
        let file = B158::open(&self.path(checkpoint)).expect("a checkpoint");
        serde_json::from_str(&file.metadata()["options"]).expect("options")
    }
}

/// The numbers of a key in the steps that have it.
fn all(steps: &[Value], key: &str) -> Vec<f64> {
    steps.iter().filter_map(|s| s[key].as_f64()).collect()
}

fn ends(steps: &[Value], key: &str) -> (f64, f64) {
    let found = all(steps, key);
    (found[0], found[found.len() - 1])
}

/// A run of some steps whose last checkpoint is gone goes on to the same bits as one that was not interrupted.
fn resumes(place: &Place, words: &[&str], steps: u64, last: &str) {
    let (half, whole) = ((steps / 2).to_string(), steps.to_string());
    place.train(&[words, &["--steps", &whole, "--threads", "2", "--out", "whole"]].concat());
    place.train(&[words, &["--steps", &half, "--threads", "1", "--out", "parts"]].concat());
    fs::remove_file(place.path(&format!("parts/step-{:08}.b158", steps / 2))).expect("removed");
    let (code, _, stderr) = place.run(&["train", "--resume", "parts", "--steps", &whole, "--threads", "1"]);
    assert!(code == Some(0) && stderr.contains(&format!("{half} steps of the journal")), "{stderr}");
    assert!(place.tensors(&format!("parts/{last}")) == place.tensors(&format!("whole/{last}")), "the same bits");
    let (code, stdout, stderr) = place.run(&["verify-run", "whole", "parts", "--to", &whole]);
    assert!(code == Some(0) && stdout.starts_with(&format!("equal: {steps} steps")), "{stdout}{stderr}");
}

#[test]
fn answers_are_learned() {
    let place = Place::new();
    let (steps, said) =
        place.train(&["--phase", "sft", "--data", "chat.jsonl", "--steps", "60", "--val-every", "20", "--out", "sft"]);
    for what in ["training and", "held-out conversations", "starts from random weights", "tokens of answers to learn"] {
        assert!(said.contains(what), "no {what:?} in {said}");
    }
    let (first, last) = ends(&steps, "val");
    assert!(last < first - 0.2, "held-out loss on answers: {first}, then {last}");
    let options = place.options("sft/step-00000060.b158");
    let number = |key: &str| options[key].as_f64();
    assert_eq!((number("lr"), number("clip"), number("weight_decay")), (Some(0.004), Some(2.0), Some(0.05)));
    assert_eq!((&options["estimator"], number("seq_len")), (&Value::from("adamw"), Some(192.0)));
    assert_eq!(options["phase"], serde_json::json!({ "name": "sft" }));
    // Two passes, where nothing else says how long.
    let (steps, _) = place.train(&[
        "--phase",
        "sft",
        "--data",
        "chat.jsonl",
        "--val-every",
        "0",
        "--out",
        "passes",
        "--lr",
        "0.001",
    ]);
    let (again, _) =
        place.train(&["--phase", "sft", "--data", "chat.jsonl", "--val-every", "0", "--out", "pass", "--epochs", "1"]);
    assert!(steps.len() > again.len() && steps.len() <= 2 * again.len(), "{} and {}", steps.len(), again.len());
    assert_eq!(place.options("passes/step-00000000.b158")["lr"], 0.001);
    let (code, _, stderr) = place.run(&["report", "sft", "-o", "page.html"]);
    assert_eq!(code, Some(0), "{stderr}");
}

#[test]
fn conversations_resume_to_the_bit() {
    let place = Place::new();
    resumes(&place, &["--phase", "sft", "--data", "chat.jsonl", "--val-every", "0"], 6, "step-00000006.b158");
}

#[test]
fn preferences_are_learned() {
    let place = Place::new();
    place.train(&["--phase", "sft", "--data", "chat.jsonl", "--steps", "40", "--val-every", "0", "--out", "sft"]);
    let dpo = ["--phase", "dpo", "--from", "sft", "--data", "preferences.jsonl", "--val-fraction", "0.3"];
    let words = ["--steps", "30", "--val-every", "10", "--out", "dpo"];
    let (steps, said) = place.train(&[&dpo[..], &words].concat());
    assert!(said.contains("held-out pairs of answers") && said.contains("dpo/reference.b158 (written)"), "{said}");
    assert!(said.contains("(margin") && said.contains("% preferred)"), "{said}");
    // The reference itself has no margin.
    assert!((steps[0]["loss"].as_f64().expect("a loss") - f64::ln(2.0)).abs() < 1e-6, "{}", steps[0]);
    let margins = all(&steps, "val_margin");
    assert!(
        margins[margins.len() - 1] > 0.05 && margins[margins.len() - 1] > margins[0],
        "held-out margins {margins:?}"
    );
    let losses = all(&steps, "loss");
    assert!(
        losses[29] < losses[0] - 0.05 && steps.iter().all(|s| s["bits_per_byte"].is_null()),
        "{losses:?}, {:?}",
        all(&steps, "val")
    );
    let options = place.options("dpo/step-00000030.b158");
    assert_eq!((options["phase"]["beta"].as_f64(), options["batch"].as_u64()), (Some(0.2), Some(8)));
    let (code, _, stderr) = place.run(&["report", "dpo", "-o", "page.html"]);
    let page = fs::read_to_string(place.path("page.html")).expect("a page");
    assert!(code == Some(0) && page.contains("Reward margin"), "{stderr}");

    // The same numbers serve another run on the same data and weights, and no other.
    let shared = ["--reference", "dpo/reference.b158", "--val-every", "0", "--steps", "1"];
    let (other, said) = place.train(&[&dpo[..], &shared, &["--out", "used"]].concat());
    assert!(said.contains("reference.b158 (used)") && other[0]["loss"] == steps[0]["loss"], "{said}");
    let refused = |words: &[&str], what: &str| {
        let (code, _, stderr) = place.run(&[&["train", "model.json"], words].concat());
        assert!(code == Some(1) && stderr.contains(what) && stderr.contains("remove the file"), "{code:?}: {stderr}");
    };
    refused(&[&dpo[..], &shared, &["--out", "none", "--seq-len", "200"]].concat(), "rows of 224");
    let from = ["--phase", "dpo", "--data", "preferences.jsonl", "--val-fraction", "0.3", "--from"];
    refused(&[&from[..], &["dpo", "--out", "none2"], &shared].concat(), "weights crc32c");
}

#[test]
fn preferences_resume_to_the_bit() {
    let place = Place::new();
    let words = ["--phase", "dpo", "--data", "preferences.jsonl", "--val-every", "0", "--accumulate", "2"];
    resumes(&place, &words, 4, "step-00000004.b158");
    // The reference is made again from the first checkpoint, and is refused when it is of something else.
    let before = fs::read(place.path("parts/reference.b158")).expect("a file");
    fs::remove_file(place.path("parts/reference.b158")).expect("removed");
    let (code, _, stderr) = place.run(&["train", "--resume", "parts", "--steps", "5"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(before == fs::read(place.path("parts/reference.b158")).expect("a file"));
    let (code, _, stderr) = place.run(&["train", "--resume", "parts", "--steps", "6", "--beta", "0.3"]);
    assert!(code == Some(2) && stderr.contains("--beta is 0.3, but the run was started with 0.2"), "{stderr}");
    let text = fs::read_to_string(place.path("preferences.jsonl")).expect("a file");
    fs::write(place.path("preferences.jsonl"), text.replace("friend", "fiend")).expect("written");
    let (code, _, stderr) = place.run(&["train", "--resume", "parts", "--steps", "6"]);
    assert!(code == Some(2) && stderr.contains("started with other data"), "{stderr}");
}

#[test]
fn parts_of_pairs_add_up_and_loops_run_equally_deep() {
    let place = Place::with_model(LOOPED);
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/phases/preferences.jsonl");
    let words =
        ["--phase", "dpo", "--data", sample, "--batch", "8", "--seq-len", "160", "--steps", "2", "--val-every", "0"];
    let steps = |parts: &str| {
        let (steps, _) = place
            .train(&[&words[..], &["--lr", "1e-3", "--warmup", "0", "--accumulate", parts, "--out", parts]].concat());
        steps
            .iter()
            .map(|s| ["loss", "gradient_norm"].map(|key| s[key].as_f64().expect("a number")))
            .collect::<Vec<_>>()
    };
    let whole = steps("1");
    assert!((whole[0][0] - f64::ln(2.0)).abs() < 1e-6 && (whole[1][0] - f64::ln(2.0)).abs() > 1e-5, "{whole:?}");
    for (a, b) in whole.iter().zip(steps("4")) {
        assert!((a[0] - b[0]).abs() < 1e-3 && (a[1] / b[1] - 1.0).abs() < 1e-2, "{a:?}, {b:?}");
    }
}

#[test]
fn pretraining_takes_what_the_configuration_says() {
    let place = Place::new();
    let words = ["--phase", "pretrain", "--data", "data.txt", "--steps", "1", "--val-every", "0", "--seq-len", "16"];
    place.train(&[&words[..], &["--out", "said"]].concat());
    let said = place.options("said/step-00000001.b158");
    assert_eq!(
        (&said["estimator"], said["weight_decay"].as_f64(), said["clip"].as_f64()),
        (&Value::from("adamw"), Some(0.05), Some(2.0))
    );
    // Options go before the configuration, and what an estimator does not have is left out.
    place.train(&[&words[..], &["--out", "given", "--estimator", "mezo", "--weight-decay", "0"]].concat());
    let given = place.options("given/step-00000001.b158");
    assert_eq!((&given["estimator"], given["weight_decay"].as_f64()), (&Value::from("mezo"), Some(0.0)));
    // Without the phase the configuration says nothing of training.
    let (code, _, stderr) = place.run(&[
        "train",
        "model.json",
        "--data",
        "data.txt",
        "--steps",
        "1",
        "--val-every",
        "0",
        "--seq-len",
        "16",
        "--out",
        "plain",
    ]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(place.options("plain/step-00000001.b158")["estimator"], "perseq-lowrank");
}

#[test]
fn probes_compare_pairs_too() {
    let place = Place::new();
    let (steps, _) = place.train(&[
        "--phase",
        "sft",
        "--data",
        "chat.jsonl",
        "--estimator",
        "perseq-lowrank",
        "--batch",
        "4",
        "--steps",
        "2",
        "--val-every",
        "0",
        "--out",
        "answers",
    ]);
    assert!(steps[1]["spread"].as_f64() > Some(0.0), "answers are learned by probes too: {}", steps[1]);
    for words in [
        &["--estimator", "perseq-lowrank"][..],
        &["--estimator", "perseq-lowrank", "--group-size", "1"],
        &["--estimator", "mezo"],
    ] {
        let out = words[1..].join("");
        let (steps, _) = place.train(
            &[
                &["--phase", "dpo", "--data", "preferences.jsonl", "--batch", "4", "--seq-len", "160", "--steps", "2"],
                words,
                &["--val-every", "1", "--out", &out],
            ]
            .concat(),
        );
        let loss = steps[0]["loss"].as_f64().expect("a loss");
        assert!(
            (loss - f64::ln(2.0)).abs() < 0.2 && steps[1]["val_margin"].as_f64() != Some(0.0),
            "{words:?}: {}",
            steps[0]
        );
        assert!(steps[0]["spread"].as_f64() > Some(0.0));
    }
}

#[test]
fn states_are_carried_over_segments() {
    let place = Place::new();
    // What a line begins with comes again only after more tokens than a segment has.
    let line = |i: usize| format!("{} {}. ", ["alpha", "bravo", "gamma", "delta"][i * i % 4], "-".repeat(30));
    fs::write(place.path("long.txt"), (0..400).map(line).collect::<String>()).expect("written");
    let words =
        ["--phase", "ctx_extend", "--data", "long.txt", "--seq-len", "32", "--batch", "4", "--val-fraction", "0.1"];
    let (steps, said) =
        place.train(&[&words[..], &["--val-every", "5", "--out", "long", "--sample-every", "3"]].concat());
    assert!(said.contains("tokens in long sequences"), "{said}");
    let rates = all(&steps, "lr");
    assert_eq!((rates.len(), rates[5], rates[6], rates[9]), (10, 1e-3, 5e-4, 5e-4), "{rates:?}");
    assert_eq!(place.options("long/step-00000010.b158")["phase"]["stages"][1]["rate"], 0.5);
    let states = place.tensors("long/step-00000010.b158");
    assert!(states.iter().any(|t| t.0.starts_with("state.backward:") && t.1.iter().any(|&b| b != 0)));
    // Neither texts nor measurements on the way change what is carried.
    let (quiet, _) = place.train(&[&words[..], &["--val-every", "0", "--out", "quiet"]].concat());
    assert_eq!(all(&quiet, "loss"), all(&steps, "loss"));
    assert!(place.tensors("quiet/step-00000010.b158") == states);
    // One segment a sequence is what there is without a state.
    let (fresh, _) =
        place.train(&[&words[..], &["--val-every", "0", "--out", "fresh", "--stages", "32:2:1e-3"]].concat());
    assert_ne!(fresh[1]["loss"], quiet[1]["loss"]);

    resumes(&place, &[&words[..], &["--val-every", "0"]].concat(), 8, "step-00000008.b158");
    // From a checkpoint alone, in the middle of a sequence.
    fs::create_dir(place.path("alone")).expect("made");
    let (code, _, stderr) = place.run(&[
        "train",
        "model.json",
        "--out",
        "begun",
        "--steps",
        "2",
        "--val-every",
        "0",
        words[0],
        words[1],
        words[2],
        words[3],
        words[4],
        words[5],
        words[6],
        words[7],
        words[8],
        words[9],
    ]);
    assert_eq!(code, Some(0), "{stderr}");
    fs::copy(place.path("begun/step-00000002.b158"), place.path("alone/step-00000002.b158")).expect("copied");
    let (code, _, stderr) = place.run(&["train", "--resume", "alone", "--steps", "8"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(place.tensors("alone/step-00000008.b158") == place.tensors("whole/step-00000008.b158"));
    for (more, what) in [
        (&["--estimator", "mezo"][..], "goes along a gradient: the estimator mezo"),
        (&["--accumulate", "2"], "--accumulate has no meaning"),
        (&["--stages", "48:3"], "48 tokens, expected at least one step and a multiple of --seq-len"),
        (&["--stages", "64"], "expected tokens and steps such as 4096:1000"),
    ] {
        let (code, _, stderr) = place.run(&[&["train", "model.json", "--out", "none"], &words[..], more].concat());
        assert!(code == Some(2) && stderr.contains(what), "{more:?}: {code:?}: {stderr}");
    }
}

#[test]
fn the_second_stage_has_no_decay() {
    let place = Place::new();
    let words =
        ["--data", "data.txt", "--batch", "4", "--seq-len", "16", "--steps", "9", "--val-every", "0", "--warmup", "1"];
    let two_stage = ["--estimator", "adamw", "--lr-decay", "two-stage", "--weight-decay", "0.5", "--lr", "0.01"];
    let (steps, _) = place.train(&[&words[..], &two_stage, &["--out", "staged"]].concat());
    let rates = all(&steps, "lr");
    assert!((rates[4] - 0.00625).abs() < 1e-9 && (rates[5] - 0.01 / 3.0).abs() < 1e-9, "{rates:?}");
    let bytes = fs::read(place.path("staged/journal.bin")).expect("a journal");
    let (_, items) = journal::read(&bytes).expect("records");
    let shares: Vec<f32> = items
        .filter_map(|(_, item)| match item {
            Item::Record(Record::Step(step)) => Some(step.c[1]),
            _ => None,
        })
        .collect();
    assert_eq!(shares, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    // The record is enough to take the steps again.
    let end = place.tensors("staged/step-00000009.b158");
    fs::remove_file(place.path("staged/step-00000009.b158")).expect("removed");
    let (code, _, stderr) = place.run(&["replay", "staged", "--to", "9", "-o", "again.b158"]);
    assert!(code == Some(0) && place.tensors("again.b158") == end, "{stderr}");
    let (code, _, stderr) = place.run(
        &[
            &[
                "train",
                "model.json",
                "--out",
                "none",
                "--estimator",
                "mezo",
                "--lr-decay",
                "two-stage",
                "--weight-decay",
                "0.1",
            ],
            &words[..],
        ]
        .concat(),
    );
    assert!(code == Some(2) && stderr.contains("ends the weight decay at half time"), "{stderr}");
}

#[test]
fn states_of_loops_and_experts_are_carried_too() {
    let place = Place::with_model(LOOPED);
    let words = ["--phase", "ctx_extend", "--stages", "64:20", "--data", "data.txt", "--seq-len", "16", "--batch", "2"];
    resumes(&place, &[&words[..], &["--val-every", "2", "--lr", "1e-3"]].concat(), 6, "step-00000006.b158");
}

#[test]
fn what_is_missing_or_does_not_fit_is_said() {
    let place = Place::new();
    fs::write(
        place.path("bad.jsonl"),
        "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n{\"prompt\": \"a\", \"chosen\": \"b\"}\n",
    )
    .expect("written");
    fs::write(place.path("wide.json"), MODEL.replace("\"hidden_size\": 64", "\"hidden_size\": 96")).expect("written");
    place.train(&["--phase", "sft", "--data", "chat.jsonl", "--steps", "1", "--val-every", "0", "--out", "run"]);
    let cases: [(&[&str], i32, &str); 11] = [
        (
            &["model.json", "--phase", "sft"],
            2,
            "no data, expected lines of JSON with messages by --data; the configuration names ChatA, ChatB",
        ),
        (&["model.json", "--phase", "dpo"], 2, "the configuration names Preferred"),
        (&["model.json", "--phase", "dpo", "--data", "bad.jsonl"], 1, "bad.jsonl: line 2: no field \"rejected\""),
        (&["model.json", "--phase", "sft", "--data", "bad.jsonl"], 1, "bad.jsonl: line 1: no field \"messages\""),
        (
            &["model.json", "--phase", "sft", "--data", "chat.jsonl", "--seq-len", "8"],
            1,
            "no answer within a row of 8 tokens",
        ),
        (
            &["model.json", "--phase", "sft", "--data", "chat.jsonl", "--beta", "1"],
            2,
            "--beta has no meaning for the phase sft",
        ),
        (&["model.json", "--data", "chat.jsonl", "--epochs", "1"], 2, "--epochs has no meaning for the phase pretrain"),
        (
            &["model.json", "--phase", "dpo", "--data", "preferences.jsonl", "--batch", "3"],
            2,
            "a pair of answers is two rows",
        ),
        (
            &["wide.json", "--phase", "sft", "--data", "chat.jsonl", "--from", "run"],
            3,
            "another architecture: its hidden_size is 64, that of the configuration 96",
        ),
        (&["run", "--phase", "sft", "--data", "chat.jsonl", "--from", "run"], 2, "has weights itself"),
        (&["model.json", "--phase", "rlhf", "--data", "chat.jsonl"], 2, "possible values: pretrain"),
    ];
    for (words, want, what) in cases {
        let (code, _, stderr) = place.run(&[&["train"], words, &["--out", "none"]].concat());
        assert!(code == Some(want) && stderr.contains(what), "{words:?}: {code:?}: {stderr}");
        assert!(!place.path("none").exists(), "{words:?} leaves no folder");
    }
    let (code, _, stderr) = place.run(&["train", "--resume", "run", "--phase", "dpo"]);
    assert!(code == Some(2) && stderr.contains("--phase is dpo, but the run was started with sft"), "{stderr}");
    // Long conversations are cut, and that is said.
    let (_, said) =
        place.train(&["--phase", "sft", "--data", "chat.jsonl", "--seq-len", "96", "--steps", "1", "--out", "short"]);
    assert!(said.contains("are longer than a row and cut at its end") && said.contains("are left out"), "{said}");
}
