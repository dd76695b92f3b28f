//! Paradigms as options of `chimera-run train`: runs that survive interruption in the middle of each of them, and what is refused.

mod common;

use std::fs;
use std::process::Command;

use chimera_runtime::files::b158::B158;
use chimera_runtime::train::paradigms::Stage;
use chimera_runtime::train::standing::Standing;
use common::{LOOPED, Place};

impl Place {
    fn new() -> Place {
        let place = Place::with_model(LOOPED);
        let lines = (0..40).map(|i| format!("{{\"text\": \"{}\"}}\n", "the cat sat. ".repeat(1 + i * 7 % 5)));
        fs::write(place.path("lines.jsonl"), lines.collect::<String>()).expect("written");
        place
    }

    /// Exit code and messages of `chimera-run` with these words.
    fn run(&self, words: &str, threads: &str) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
        command.current_dir(self.0.path()).args(words.split_whitespace()).args(["--threads", threads]);
        let output = command.env("CHIMERA_CODE_CACHE", "off").output().expect("the command starts");
        (output.status.code(), String::from_utf8(output.stderr).expect("UTF-8"))
    }

    fn train(&self, words: &str, threads: &str) -> (Option<i32>, String) {
        let always = "train model.json --data lines.jsonl --batch 4 --seq-len 32 --val-every 0 --lr-decay constant";
        self.run(&format!("{always} {words}"), threads)
    }

    /// Name and bytes of every tensor of a checkpoint.
    fn tensors(&self, file: &str) -> Vec<(String, Vec<u8>)> {
        let file = B158::open(&self.path(file)).expect("a checkpoint");
        let names: Vec<String> = file.iter().map(|t| t.0.to_owned()).collect();
        names.into_iter().map(|n| (n.clone(), file.require(&n).expect("a tensor").bytes.to_vec())).collect()
    }

    /// The names of the weights that differ between two checkpoints, memory of optimizers apart.
    fn moved(&self, a: &str, b: &str) -> Vec<String> {
        let (a, b) = (self.tensors(a), self.tensors(b));
        let weights = a.into_iter().filter(|(name, _)| !name.starts_with("optim."));
        weights.filter(|t| !b.contains(t)).map(|(name, _)| name).collect()
    }
}

/// Runs of 8 steps that are interrupted behind 3: in the middle of whatever they do in stages.
#[test]
fn runs_of_every_paradigm_resume_and_replay_to_the_same_bits() {
    let place = Place::new();
    for (i, words) in [
        "--growlength",
        "--progressive-unfreeze",
        "--reservoir --reservoir-ratio 1",
        "--sparse-mezo --mezo-sparsity 0.2 --progressive-unfreeze --unfreeze-stages 2 --lr 1e-3",
        "--pipeline --packing=false",
        "--progressive-unfreeze --prefix-cache int8",
        "--progressive-unfreeze --prefix-cache --growlength --estimator adamw --accumulate 2",
        "--all",
        "--all --estimator adamw",
    ]
    .iter()
    .enumerate()
    {
        let (whole, parts) = (format!("whole{i}"), format!("parts{i}"));
        let (code, text) = place.train(&format!("{words} --steps 8 --out {whole}"), "1");
        assert_eq!(code, Some(0), "{words}: {text}");
        let stopped = format!("{words} --steps 8 --save-every 3 --out {parts}");
        let (code, text) = place.train(&stopped, "2");
        assert_eq!(code, Some(0), "{words}: {text}");
        let last = |folder: &str| place.tensors(&format!("{folder}/step-00000008.b158"));
        assert!(last(&whole) == last(&parts), "{words}: any number of threads, any number of checkpoints");
        // As if the process had ended with the journal in the middle of a record of step 5.
        let records = records(&place, &parts);
        for step in [6, 8] {
            fs::remove_file(place.path(&format!("{parts}/step-0000000{step}.b158"))).expect("removed");
        }
        let journal = place.path(&format!("{parts}/journal.bin"));
        let bytes = fs::read(&journal).expect("a journal");
        fs::write(&journal, &bytes[..records[4] - 3]).expect("written");
        let (code, text) = place.run(&format!("train --resume {parts} --steps 8"), "2");
        assert_eq!(code, Some(0), "{words}: {text}");
        assert!(last(&whole) == last(&parts), "{words}: the bits of an uninterrupted run");
        // All of it from the first checkpoint and the journal.
        let (code, text) = place.run(&format!("replay {whole} --to 8 -o again.b158"), "1");
        assert_eq!(code, Some(0), "{words}: {text}");
        assert!(last(&whole) == place.tensors("again.b158"), "{words}: replayed from the beginning");
        let (code, text) = place.run(&format!("verify-run {whole} {parts}"), "2");
        assert_eq!(code, Some(0), "{words}: {text}");
    }
}

/// Offsets behind the records of a journal of steps.
fn records(place: &Place, folder: &str) -> Vec<usize> {
    let bytes = fs::read(place.path(&format!("{folder}/journal.bin"))).expect("a journal");
    let (_, items) = chimera_runtime::train::journal::read(&bytes).expect("a header");
    items.map(|(range, _)| range.end).collect()
}

#[test]
fn stages_train_what_they_say() {
    let place = Place::new();
    let (code, text) = place.train("--progressive-unfreeze --growlength --reservoir --steps 8 --out run", "2");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("stage 2 of 4 trains layers 2 to 3, the final norm") && text.contains("4 x 32"), "{text}");
    let whole = Standing::whole(&place.path("run"), 0).expect("a run");
    let stages: Vec<Stage> = whole.trail.steps.iter().map(|s| s.stage).collect();
    let (thaws, lengths) = (stages.iter().map(|s| s.thaw), stages.iter().map(|s| s.length));
    assert_eq!(thaws.collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3, 3]);
    // An eighth and a quarter of 32 are both 16 in the end; half of it is 16 too.
    assert_eq!(lengths.collect::<Vec<_>>(), [0, 0, 0, 0, 0, 0, 3, 3]);
    assert_eq!(whole.trail.steps.iter().map(|s| s.c.len()).collect::<Vec<_>>(), [8, 8, 8, 8, 8, 8, 4, 4]);
    for (to, first) in [(2, 3), (4, 2), (6, 1), (8, 0)] {
        assert_eq!(place.run(&format!("replay run --to {to} -o {to}.b158"), "1").0, Some(0));
        let moved = place.moved("run/step-00000000.b158", &format!("{to}.b158"));
        let layer = |n: &String| n.strip_prefix("layers.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
        assert_eq!(moved.iter().filter_map(layer).min(), Some(first), "behind step {to}: {moved:?}");
        assert!(moved.iter().any(|n| n == "norm.weight"));
        assert_eq!(moved.iter().any(|n| n == "embed.weight"), to == 8, "the embedding waits");
        assert_eq!(moved.iter().any(|n| n.starts_with("loop.")), to >= 6, "the loop begins with layer 1");
        let still = ["layers.0.attn.a_proj.weight", "layers.0.attn.b_proj.weight", "layers.1.attn.fgate.weight"];
        assert!(!still.iter().any(|s| moved.iter().any(|n| n == s)), "the reservoir stays: {moved:?}");
        assert!(to < 8 || moved.iter().any(|n| n == "layers.2.attn.a_proj.weight"), "half of it: {moved:?}");
    }
    // A longer budget does not take a stage back.
    assert_eq!(place.run("train --resume run --steps 12", "2").0, Some(0));
    let stages = Standing::whole(&place.path("run"), 0).expect("a run").trail.steps.into_iter().map(|s| s.stage.thaw);
    assert_eq!(stages.collect::<Vec<_>>()[8..], [3, 3, 3, 3]);
    assert_eq!(place.run("verify-run run run", "1").0, Some(0));
}

#[test]
fn combinations_without_a_meaning_are_refused() {
    let place = Place::new();
    for (words, part) in [
        ("--reservoir-ratio 0.5", "--reservoir-ratio has no meaning without --reservoir"),
        ("--mezo-sparsity 0.5", "--mezo-sparsity has no meaning without --sparse-mezo"),
        ("--unfreeze-stages 3", "--unfreeze-stages has no meaning without --progressive-unfreeze"),
        ("--progressive-unfreeze --unfreeze-stages 5", "the model has 4; choose fewer --unfreeze-stages"),
        ("--progressive-unfreeze --unfreeze-stages 1", "2..=64"),
        ("--sparse-mezo --estimator adamw", "--sparse-mezo has no meaning for the estimator adamw"),
        ("--sparse-mezo --mask dense", "dense leaves nothing out"),
        ("--sparse-mezo --mask boundary --mezo-sparsity 0.1", "has no meaning with --mask boundary"),
        ("--sparse-mezo --sparsity 0.1", "give that one"),
        ("--sparse-mezo --mask fisher", "expected --fisher FILE"),
        ("--fused-cache --estimator mezo", "each probe packs its own; choose --mode additive or scales"),
        ("--fused-cache --sparse-mezo", "each probe packs its own"),
        ("--progressive-unfreeze --only embed.weight", "leaves nothing to train in stage 1"),
        ("--reservoir=yes", "invalid value 'yes'"),
        ("--prefix-cache", "needs layers that stay as they are; give it with --progressive-unfreeze"),
        ("--prefix-cache --only *layers*", "needs layers that stay as they are"),
        ("--prefix-cache-memory 8 --progressive-unfreeze", "has no meaning without --prefix-cache"),
    ] {
        let (code, text) = place.train(&format!("{words} --steps 2 --out refused"), "1");
        assert!(code == Some(2) && text.contains(part), "{words}: {code:?} {text}");
    }
    let short = "train model.json --data lines.jsonl --batch 4 --seq-len 16 --growlength --steps 2 --out refused";
    let (code, text) = place.run(short, "1");
    assert!(code == Some(2) && text.contains("which cannot grow from 16"), "{code:?} {text}");
    let (code, text) = place.train("--growlength --trace t.json --steps 2 --out refused", "1");
    assert!(code == Some(2) && text.contains("--trace is about one plan"), "{code:?} {text}");
    assert!(!place.path("refused").exists(), "nothing is left behind");
    let (code, text) = place.train("--all --progressive-unfreeze=false --steps 2 --out run", "1");
    assert_eq!(code, Some(0), "{text}");
    let taken = "--all takes growlength, reservoir, pipeline, fused-cache, packing; what";
    assert!(
        text.contains("--all leaves out --sparse-mezo") && text.contains("codes of") && text.contains(taken),
        "{text}"
    );
    for (words, part) in [
        ("--progressive-unfreeze", "--progressive-unfreeze is true, but the run was started with false"),
        ("--reservoir-ratio 0.25", "--reservoir-ratio is 0.25, but the run was started with 0.5"),
        ("--all", "--all is for new runs"),
    ] {
        let (code, text) = place.run(&format!("train --resume run --steps 4 {words}"), "1");
        assert!(code == Some(2) && text.contains(part), "{words}: {code:?} {text}");
    }
    let same = "train --resume run --steps 4 --growlength --reservoir --packing --reservoir-ratio 0.5";
    assert_eq!(place.run(same, "1").0, Some(0));
    let (code, text) = place.run("train run/step-00000002.b158 --data lines.jsonl --reservoir --out other", "1");
    assert!(code == Some(2) && text.contains("draws matrices anew"), "{code:?} {text}");
}

#[test]
fn a_benchmark_measures_every_paradigm() {
    let place = Place::new();
    let words = "train model.json --data lines.jsonl --batch 4 --seq-len 32 --val-tokens 64 --benchmark --seconds 2 --turns 2 --json -q --out all";
    let mut command = place.command(&words.split(' ').collect::<Vec<_>>());
    let output = command.args(["--threads", "2"]).env("CHIMERA_CODE_CACHE", "off").output().expect("it starts");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON and nothing else");
    let runs: Vec<&str> = value["runs"].as_array().expect("a list").iter().filter_map(|r| r["run"].as_str()).collect();
    let rows = value["paradigms"].as_array().expect("a list");
    let names: Vec<&str> = rows.iter().filter_map(|r| r["paradigm"].as_str()).collect();
    let all = [
        "growlength",
        "reservoir",
        "pipeline",
        "progressive-unfreeze",
        "prefix-cache",
        "packing",
        "sparse-mezo",
        "fused-cache",
        "all",
    ];
    assert!(all.iter().all(|name| names.contains(name)) && names.len() == all.len(), "{names:?}");
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"));
        let speed = number("data_tokens_per_second") / number("data_tokens_per_second_without");
        assert!(speed > 0.0 && (speed - number("factor_of_tokens")).abs() < 1e-9);
        assert!((number("held_out_without") / number("held_out") - number("factor_of_loss")).abs() < 1e-9);
        assert!(["with", "without"].iter().all(|side| runs.contains(&row[*side].as_str().expect("a name"))), "{row}");
    }
    let page = fs::read_to_string(place.path("all/benchmark.html")).expect("a page");
    assert!(page.contains("<svg") && page.contains("progressive-unfreeze") && !page.contains("http:"));
    assert!(value["runs"].as_array().expect("a list").iter().all(|r| r["outcome"] == "finished"), "{value}");
    let report = place.command(&["report", "all/growlength"]).output().expect("it starts");
    assert!(report.status.success(), "each run is one of train");
    for (words, part) in [("--steps 3", "--seconds"), ("--growlength", "name none of them"), ("--resume", "fresh runs")]
    {
        let (code, text) = place.train(&format!("--benchmark --out other {words}"), "1");
        assert!(code == Some(2) && text.contains(part), "{words}: {code:?} {text}");
    }
}

#[test]
fn what_frozen_layers_give_is_kept_within_its_bound() {
    let place = Place::new();
    let words = |more: &str, out: &str| format!("--progressive-unfreeze --steps 96 {more} --out {out}");
    let last = |folder: &str| place.tensors(&format!("{folder}/step-00000096.b158"));
    let found = |text: &str| -> u64 {
        let line = text.lines().find(|l| l.contains("were found in memory")).unwrap_or_else(|| panic!("{text}"));
        line.split_whitespace().find_map(|word| word.parse().ok()).expect("a number")
    };
    assert_eq!(place.train(&words("", "plain"), "1").0, Some(0));
    let (code, text) = place.train(&words("--prefix-cache", "kept"), "2");
    assert_eq!(code, Some(0), "{text}");
    assert!(last("plain") == last("kept"), "what is kept as it is changes no bit");
    assert!(found(&text) > 0, "the data repeat: {text}");
    let all = found(&text);
    // A row of 32 tokens of 32 numbers takes more than 4096 bytes.
    let (code, text) = place.train(&words("--prefix-cache --prefix-cache-memory 0.02", "bounded"), "2");
    assert_eq!(code, Some(0), "{text}");
    assert!(last("plain") == last("bounded") && found(&text) < all, "{text}");
    let (code, text) = place.train(&words("--prefix-cache int8", "codes"), "2");
    assert_eq!(code, Some(0), "{text}");
    assert!(last("plain") != last("codes") && found(&text) == all, "codes are something else: {text}");
    let (code, text) = place.train("--only layers.3.*,norm.weight --prefix-cache --steps 6 --out only", "2");
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(place.train("--only layers.3.*,norm.weight --steps 6 --out same", "2").0, Some(0));
    let at = |folder: &str| place.tensors(&format!("{folder}/step-00000006.b158"));
    assert!(at("only") == at("same"), "also where --only leaves layers as they are");
}

#[test]
fn kills_at_random_moments_of_stages_change_nothing() {
    let place = Place::new();
    let words = "train model.json --data lines.jsonl --batch 4 --seq-len 128 --val-every 0 --steps 240 --growlength \
                 --progressive-unfreeze --prefix-cache --sparse-mezo --mezo-sparsity 0.3 --lr 1e-3 --save-every 25 --keep 1 -q";
    let words: Vec<&str> = words.split_whitespace().collect();
    let train = |further: &[&str]| {
        let mut command = place.command(&[&words, further].concat());
        command.env("CHIMERA_CODE_CACHE", place.path("code")).stdout(std::process::Stdio::null());
        command
    };
    assert!(train(&["--out", "whole", "--threads", "2"]).status().expect("it starts").success());
    let mut random = u64::from(std::process::id()) | 1;
    let mut killed = 0;
    for round in 0..12 {
        let threads = if round % 2 == 0 { "1" } else { "2" };
        let mut child = train(&["--out", "parts", "--resume", "--threads", threads]).spawn().expect("it starts");
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(std::time::Duration::from_millis(random >> 54));
        child.kill().expect("killed");
        killed += usize::from(child.wait().expect("it ends").code().is_none());
    }
    assert!(killed > 3, "{killed} were killed");
    assert!(train(&["--out", "parts", "--resume", "--threads", "2"]).status().expect("it starts").success());
    let last = |folder: &str| place.tensors(&format!("{folder}/step-00000240.b158"));
    assert!(last("whole") == last("parts"), "the bits of an undisturbed run");
    assert_eq!(place.run("verify-run whole parts", "1").0, Some(0));
}

#[test]
fn a_run_that_goes_back_across_stages_is_replayed() {
    let place = Place::new();
    // Steps so long that they lead away, from weights so large that it shows.
    let words = "--progressive-unfreeze --steps 16 --save-every 3 --keep 30 --lr 1 --explosion 0.1 --set initializer_range=0.5 --out run";
    let (code, text) = place.train(words, "2");
    assert!(code == Some(0) && text.contains("back to the checkpoint of step 3"), "{text}");
    assert!(text.matches("stage 2 of 4").count() > 1, "it went back across a change: {text}");
    let standing = Standing::newest(&place.path("run")).expect("sound").expect("a run");
    let step = standing.progress().step;
    let (code, again) = place.run("replay run -o newest.b158", "1");
    assert_eq!(code, Some(0), "{again}");
    // All checkpoints but that of the beginning are gone: the journal leads through every stage.
    for entry in fs::read_dir(place.path("run")).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if name.starts_with("step-") && name != "step-00000000.b158" {
            fs::remove_file(path).expect("removed");
        }
    }
    let (code, again) = place.run(&format!("replay run --to {step} -o again.b158"), "2");
    assert_eq!(code, Some(0), "{again}");
    assert!(place.tensors("newest.b158") == place.tensors("again.b158"), "behind step {step}: {text}");
}
