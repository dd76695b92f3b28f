//! `chimera-run train` along gradients as a user meets it: what it prints, how it resumes and replays, and what it refuses.

mod common;

use std::fs;
use std::process::{Command, Output};

use chimera_runtime::files::b158::B158;
use common::{LOOPED, Place};

/// A quantiser whose threshold warms up, and is then corrected in every second step.
const DYNAMIC: [&str; 10] = [
    "--set",
    "quantization.weight_scale=absmean_per_tensor",
    "--set",
    "quantization.dynamic.mode=chimera",
    "--set",
    "quantization.dynamic.warmup_steps=4",
    "--set",
    "quantization.dynamic.target_bits=1.3",
    "--set",
    "quantization.dynamic.control_steps=2",
];

impl Place {
    fn new() -> Place {
        Place::with_model(LOOPED)
    }

    fn run(&self, words: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
        command.current_dir(self.0.path()).args(words).env("CHIMERA_CODE_CACHE", "off");
        let Output { status, stdout, stderr } = command.output().expect("the command starts");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (status.code(), text(stdout), text(stderr))
    }

    /// `train model.json` on the data and further words.
    fn train(&self, words: &[&str]) -> (Option<i32>, String, String) {
        let first = ["train", "model.json", "--data", "data.txt", "--batch", "4", "--seq-len", "16"];
        self.run(&[&first[..], &["--lr-decay", "constant", "--warmup", "2", "--val-every", "0"], words].concat())
    }

    /// Name and bytes of every tensor of a checkpoint.
    fn tensors(&self, checkpoint: &str) -> Vec<(String, Vec<u8>)> {
        let file = B158::open(&self.path(checkpoint)).expect("a checkpoint");
        let names: Vec<String> = file.iter().map(|t| t.0.to_owned()).collect();
        names.into_iter().map(|n| (n.clone(), file.require(&n).expect("a tensor").bytes.to_vec())).collect()
    }
}

#[test]
fn runs_learn_resume_and_replay() {
    let place = Place::new();
    let (none, bytes) = (&[][..], &["--state", "8bit"][..]);
    let gated = &["--kappa-gate", "noise-ratio", "--psi-bytes"][..];
    for (i, (estimator, options, memory)) in [
        ("adamw", none, "optim.v."),
        ("adamw", bytes, "optim.v8."),
        ("sgd", none, "optim.m."),
        ("chimera21", none, "optim.psi."),
        ("chimera21", gated, "optim.psi."),
        ("adamw", &DYNAMIC[..], "quantiser.layers."),
    ]
    .into_iter()
    .enumerate()
    {
        let whole = format!("{i}-whole");
        let words = ["--estimator", estimator, "--threads", "2", "--steps", "12", "--json", "--out", &whole];
        let (code, stdout, stderr) = place.train(&[&words[..], options].concat());
        assert_eq!((code, stdout.lines().count()), (Some(0), 12), "{stderr}");
        let steps: Vec<serde_json::Value> = stdout.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
        let loss = |i: usize| steps[i]["loss"].as_f64().expect("a loss");
        assert!(loss(11) < loss(0) - 0.1, "{estimator}: {} after {}", loss(11), loss(0));
        assert!(steps.iter().all(|s| s["gradient_norm"].as_f64().is_some_and(|n| n > 0.0) && s["spread"].is_null()));

        let (code, _, stderr) = place.run(&["report", &whole, "-o", "page.html"]);
        let page = fs::read_to_string(place.path("page.html")).expect("a page");
        assert!(code == Some(0) && page.contains("norm of the gradient") && !page.contains("probes' diff"), "{stderr}");

        // Five steps, then a process that is killed: the journal has them, the checkpoint behind them is gone.
        let parts = format!("{i}-parts");
        let words = ["--estimator", estimator, "--threads", "1", "--steps", "5", "--out", &parts];
        let (code, _, stderr) = place.train(&[&words[..], options].concat());
        assert_eq!(code, Some(0), "{stderr}");
        fs::remove_file(place.path(&format!("{parts}/step-00000005.b158"))).expect("removed");
        let (code, stdout, stderr) = place.run(&["replay", &parts, "--to", "3", "--threads", "1"]);
        assert_eq!((code, stdout.trim()), (Some(0), format!("{parts}/replayed-00000003.b158").as_str()), "{stderr}");
        let (code, _, stderr) = place.run(&["train", "--resume", &parts, "--steps", "12", "--threads", "1"]);
        assert_eq!(code, Some(0), "{stderr}");
        assert!(stderr.contains("5 steps of the journal"), "{stderr}");
        let end = place.tensors(&format!("{parts}/step-00000012.b158"));
        assert!(
            end == place.tensors(&format!("{whole}/step-00000012.b158")),
            "{estimator}: a resumed run has the same bits"
        );
        assert!(end.iter().any(|t| t.0.starts_with(memory)) && !end.iter().any(|t| t.0.starts_with("grad.")));
        let (code, stdout, stderr) = place.run(&["verify-run", &whole, &parts, "--to", "12", "--threads", "1"]);
        assert!(code == Some(0) && stdout.starts_with("equal: 12 steps"), "{stdout}{stderr}");
    }
}

#[test]
fn parts_of_a_batch_add_up() {
    let place = Place::new();
    let steps = |parts: &str| {
        let words = ["--estimator", "adamw", "--steps", "3", "--json", "--accumulate", parts, "--out", parts];
        let (code, stdout, stderr) = place.train(&words);
        assert_eq!((code, stdout.lines().count()), (Some(0), 3), "{stderr}");
        let line = |l: &str| -> [f64; 3] {
            let v: serde_json::Value = serde_json::from_str(l).expect("JSON");
            ["loss", "gradient_norm", "data_tokens"].map(|key| v[key].as_f64().expect("a number"))
        };
        stdout.lines().map(line).collect::<Vec<_>>()
    };
    let whole = steps("1");
    for parts in ["2", "4"] {
        for (a, b) in whole.iter().zip(steps(parts)) {
            assert!((a[0] - b[0]).abs() < 1e-4 && (a[1] / b[1] - 1.0).abs() < 1e-3 && a[2] == b[2], "{a:?}, {b:?}");
        }
    }
    // A run in parts goes on from its journal too.
    fs::remove_file(place.path("2/step-00000003.b158")).expect("removed");
    let (code, _, stderr) = place.run(&["replay", "2", "--to", "3", "-o", "again.b158"]);
    assert_eq!(code, Some(0), "{stderr}");
}

/// What the run says of memory: predicted and measured bytes.
fn said(place: &Place, folder: &str) -> [f64; 2] {
    let events = fs::read_to_string(place.path(&format!("{folder}/events.jsonl"))).expect("events");
    let lines = events.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).expect("JSON"));
    let line = lines.into_iter().find(|l| l["event"] == "memory").expect("a line about memory");
    ["predicted", "measured"].map(|key| line[key].as_f64().expect("a number"))
}

#[test]
fn memory_keeps_to_its_budget() {
    let place = Place::new();
    let shape = ["train", "--scale", "nano", "--data", "data.txt", "--batch", "12", "--seq-len", "128", "--steps", "1"];
    let train = |words: &[&str]| {
        place.run(&[&shape[..], &["--estimator", "adamw", "--threads", "2", "--val-every", "0"], words].concat())
    };
    let (code, _, stderr) = train(&["--out", "free"]);
    assert_eq!(code, Some(0), "{stderr}");
    let [predicted, measured] = said(&place, "free");
    assert!((predicted / measured - 1.0).abs() < 0.05, "predicted {predicted}, measured {measured}");
    let (code, _, stderr) = train(&["--out", "none", "--budget", "20M"]);
    assert!(code == Some(4) && !place.path("none").exists(), "{code:?}: {stderr}");
    let least = stderr.split("at least ").nth(1).and_then(|t| t.split(' ').next()).expect("the least").to_owned();
    let budget = least.parse::<f64>().expect("a number") * 1.05;
    assert!(budget < 0.7 * predicted, "{budget} of {predicted}");
    let (code, _, stderr) = train(&["--out", "tight", "--budget", &format!("{budget:.0}")]);
    assert_eq!(code, Some(0), "{stderr}");
    let [predicted, measured] = said(&place, "tight");
    assert!((predicted / measured - 1.0).abs() < 0.05, "predicted {predicted}, measured {measured}");
    assert!(measured < 1.05 * budget, "{measured} of {budget}");
    let [free, tight] = ["free", "tight"].map(|run| place.tensors(&format!("{run}/step-00000001.b158")));
    assert!(free == tight, "the same step");
}

#[test]
fn the_agreement_of_gradients_is_in_the_metrics() {
    let place = Place::new();
    let measured = |words: &[&str]| -> serde_json::Value {
        let first =
            ["train", "model.json", "--data", "data.txt", "--batch", "4", "--seq-len", "16", "--val-every", "1"];
        let (code, stdout, stderr) = place.run(&[&first[..], &["--json"], words].concat());
        assert_eq!(code, Some(0), "{stderr}");
        serde_json::from_str(stdout.lines().last().expect("a line")).expect("JSON")
    };
    let of = |line: &serde_json::Value, key: &str| line["agreement"][key].as_f64().expect("a number");
    let first = measured(&["--estimator", "chimera21", "--steps", "1", "--out", "a"]);
    // One gradient agrees with its own mean: psi is 0.05 where there is one, and both magnitudes are the same.
    let [psi, kappa, noise] = ["psi", "kappa_max", "noise"].map(|key| of(&first, key));
    assert!(psi > 0.02 && psi < 0.0501 && (kappa - 0.005f64.exp()).abs() < 1e-6, "{first}");
    assert!(noise > 0.4 && noise < 1.01 && of(&first, "gate") == 1.0 && of(&first, "step_norm") > 0.0, "{first}");
    let gated = ["--kappa-gate", "noise-ratio", "--psi-bytes"];
    let later = measured(&[&["--estimator", "chimera21", "--steps", "6", "--out", "b"], &gated[..]].concat());
    let [least, kappa, most, gate] = ["kappa_min", "kappa", "kappa_max", "gate"].map(|key| of(&later, key));
    assert!(0.9 < least && least < kappa && kappa < most && most < 1.11 && gate < 0.999, "{later}");
    let other = measured(&["--estimator", "adamw", "--steps", "1", "--out", "c"]);
    assert!(other["agreement"].is_null(), "{other}");
}

#[test]
fn replay_without_the_data_says_so() {
    let place = Place::new();
    let (code, _, stderr) = place.train(&["--estimator", "sgd", "--steps", "2", "--out", "run"]);
    assert_eq!(code, Some(0), "{stderr}");
    fs::write(place.path("data.txt"), "other words. ".repeat(200)).expect("written");
    let (code, _, stderr) = place.run(&["replay", "run", "--to", "1"]);
    assert!(code == Some(1) && stderr.contains("need the data of the run"), "{code:?}: {stderr}");
    let (code, _, stderr) = place.run(&["replay", "run", "--to", "2"]);
    assert_eq!(code, Some(0), "a step with a checkpoint needs no data: {stderr}");
}

#[test]
fn options_of_other_estimators_are_refused() {
    let place = Place::new();
    for (words, what) in [
        (&["--estimator", "adamw", "--rank", "2"][..], "--rank has no meaning for the estimator adamw"),
        (&["--beta1", "0.8"], "choose --estimator adamw or chimera21"),
        (&["--estimator", "sgd", "--zero-gradient", "freeze"], "choose --estimator chimera21"),
        (&["--estimator", "adamw", "--clip=-1"], "expected a number of at least 0"),
        (&["--estimator", "adamw", "--accumulate", "3"], "does not divide the batch of 4 rows"),
        (&["--estimator", "sgd", "--state", "8bit"], "choose --estimator adamw"),
        (&["--estimator", "adamw", "--psi-bytes"], "choose --estimator chimera21"),
        (&["--estimator", "adamw", "--state", "8bit", "--beta2", "0.999"], "expected at most 0.99"),
        (&["--estimator", "adam"], "adamw"),
    ] {
        let (code, _, stderr) = place.train(&[words, &["--steps", "1", "--out", "none"]].concat());
        assert!(code == Some(2) && stderr.contains(what), "{words:?}: {code:?}: {stderr}");
        assert!(!place.path("none").exists(), "{words:?} leaves no folder");
    }
}
