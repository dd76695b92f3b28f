//! `chimera-run train` as a user meets it: results on stdout, errors with exit codes, and runs that survive interruption.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use chimera_compiler::{EntryKind, EntrySpec, Options, PerSequence, Scheme, UpdateRule, compile};
use chimera_frontends::config::{self, Overrides};
use chimera_ir::plan;
use chimera_runtime::files::b158::B158;
use chimera_runtime::train::checkpoint;
use common::{LOOPED, Place};

/// A model that compiles and trains in no time.
const MODEL: &str = r#"{
  "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "vocab_size": 257,
  "backbone": { "layer_pattern": "GD XM", "moe": { "enabled": false } },
  "looping": { "enabled": false }
}"#;

impl Place {
    fn new() -> Place {
        Place::with_model(MODEL)
    }

    /// `train model.json --data data.txt` and further words.
    fn train(&self, words: &[&str]) -> Command {
        let mut command = self.bare(&["model.json", "--data", "data.txt"]);
        command.args(words);
        command
    }

    /// Name and bytes of every tensor of a checkpoint.
    fn tensors(&self, checkpoint: &str) -> Vec<(String, Vec<u8>)> {
        let file = B158::open(&self.path(checkpoint)).expect("a checkpoint");
        let names: Vec<String> = file.iter().map(|t| t.0.to_owned()).collect();
        names.into_iter().map(|n| (n.clone(), file.require(&n).expect("a tensor").bytes.to_vec())).collect()
    }

    fn bare(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
        command.current_dir(self.0.path()).arg("train").args(words);
        command.args(["--threads", "1"]);
        command
    }
}

fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        command.env("CHIMERA_CODE_CACHE", "off").output().expect("the command starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn a_run_trains_saves_and_resumes() {
    let place = Place::new();
    let small = ["--batch", "2", "--seq-len", "16", "--val-every", "2"];
    let (code, stdout, stderr) = output(place.train(&[&small[..], &["--steps", "4", "--out", "whole"]].concat()));
    assert_eq!((code, stdout.trim()), (Some(0), "whole/step-00000004.b158"), "{stderr}");
    assert!(stderr.contains("unigram entropy") && stderr.contains("step 4/4 100.0% | loss"), "{stderr}");

    let (code, stdout, stderr) = output(place.train(&[&small[..], &["--steps", "4", "--out", "whole"]].concat()));
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(stderr.contains("--resume"), "{stderr}");

    // Two of six steps, resumed by the folder alone, against six at once: a constant rate knows nothing of the budget.
    let constant = [&small[..], &["--lr-decay", "constant"]].concat();
    let parted = |words: &[&str]| output(place.train(&[&constant[..], words].concat())).0;
    assert_eq!(parted(&["--steps", "6", "--out", "six"]), Some(0));
    assert_eq!(parted(&["--steps", "2", "--out", "parts"]), Some(0));
    let (code, stdout, stderr) = output(place.bare(&["--resume", "parts", "--steps", "6", "--json"]));
    assert_eq!((code, stdout.lines().count()), (Some(0), 4), "{stderr}");
    let tensors = |folder: &str| place.tensors(&format!("{folder}/step-00000006.b158"));
    assert!(tensors("parts") == tensors("six"), "a resumed run has the bits of an uninterrupted one");

    for (words, what) in [(["--seed", "9"], "--seed is 9"), (["--data", "model.json"], "other data")] {
        let (code, _, stderr) = output(place.bare(&[&["--resume", "parts"][..], &words].concat()));
        assert!(code == Some(2) && stderr.contains(what), "{code:?}: {stderr}");
    }
    let (code, _, stderr) = output(place.bare(&["parts", "--data", "model.json", "--steps", "1", "--out", "other"]));
    assert_eq!(code, Some(0), "other data starts another run from the weights: {stderr}");
}

#[test]
fn a_looped_model_with_experts_trains_at_drawn_depths() {
    let place = Place::new();
    let mut losses = vec![];
    for depths in ["stochastic_per_sequence", "fixed"] {
        fs::write(place.path("looped.json"), LOOPED.replace("stochastic_per_sequence", depths)).expect("written");
        let words = ["looped.json", "--data", "data.txt", "--batch", "4", "--seq-len", "16", "--steps", "3"];
        let (code, stdout, stderr) = output(place.bare(&[&words[..], &["--json", "--out", depths]].concat()));
        assert_eq!((code, stdout.lines().count()), (Some(0), 3), "{stderr}");
        assert!(!stderr.contains("depth_selection"), "{stderr}");
        let step: serde_json::Value = serde_json::from_str(stdout.lines().next().expect("a line")).expect("JSON");
        losses.push(step["loss"].as_f64().expect("a loss"));
    }
    assert_ne!(losses[0], losses[1], "drawn depths show in the loss");
}

#[test]
fn a_plan_trains_to_the_bits_of_its_configuration() {
    let place = Place::new();
    fs::write(place.path("looped.json"), LOOPED).expect("written");
    let loaded = config::load(place.path("looped.json"), &Overrides::default()).expect("a configuration").model;
    let scheme = Scheme::PerSequence(PerSequence { rank: 1, kappa: 0.1, sigma_vec: 0.01, group: 1 });
    let balance = loaded.moe.as_ref().expect("experts").bias_update_rate as f32;
    assert!(balance > 0.0);
    let rule = UpdateRule { balance, ..UpdateRule::default() };
    let spec = |kind, rows| EntrySpec { kind, rows, tokens: 16, depth: None };
    let entries = vec![
        spec(EntryKind::DualLoss(scheme.clone()), 3),
        spec(EntryKind::Update(scheme, rule), 3),
        spec(EntryKind::Loss, 2),
    ];
    let compiled = compile(&loaded, &Options { entries, ..Options::default() }).expect("a plan");
    fs::write(place.path("a.plan"), plan::to_bytes(&compiled)).expect("written");
    fs::write(place.path("a.txt"), plan::to_text(&compiled)).expect("written");

    let data = ["--data", "data.txt", "--val-every", "2"];
    let train = |words: &[&str]| {
        let (code, stdout, stderr) = output(place.bare(words));
        assert_eq!(code, Some(0), "{words:?}: {stderr}");
        place.tensors(stdout.trim())
    };
    let with = |words: &[&'static str]| [words, &data].concat();
    let shape = ["--batch", "3", "--seq-len", "16", "--steps", "4", "--lr-decay", "constant"];
    let expected = train(&[&with(&["looped.json", "--out", "config"])[..], &shape].concat());
    for (name, folder) in [("a.plan", "binary"), ("a.txt", "text")] {
        let found = train(&with(&[name, "--out", folder, "--steps", "4", "--lr-decay", "constant"]));
        assert!(found == expected, "{name} trains to other bits than its configuration");
    }
    train(&with(&["a.plan", "--out", "parts", "--steps", "1", "--lr-decay", "constant"]));
    let found = train(&["--resume", "parts", "--steps", "4"]);
    assert!(found == expected, "a run from a plan resumes with that plan");
}

/// Names of the files in a folder, the log apart.
#[cfg(unix)]
fn checkpoints(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name());
    let names = entries.map(|n| n.into_string().expect("UTF-8"));
    let mut names: Vec<String> = names.filter(|n| n.contains("step-") || n.contains("partial")).collect();
    names.sort();
    names
}

#[cfg(unix)]
#[test]
fn a_full_disk_ends_the_run_and_keeps_the_last_checkpoint() {
    let place = Place::new();
    let words = ["--batch", "2", "--seq-len", "16", "--val-every", "0", "--lr-decay", "constant"];
    assert_eq!(output(place.train(&[&words[..], &["--steps", "4", "--out", "whole"]].concat())).0, Some(0));
    assert_eq!(output(place.train(&[&words[..], &["--steps", "2", "--out", "run"]].concat())).0, Some(0));
    let before = fs::read(place.path("run/step-00000002.b158")).expect("a checkpoint");
    assert!(before.len() > 3 << 14, "the limit below is smaller than a checkpoint");

    // No file beyond 16 kB: the signal that ends other programs is an error of the write here.
    let resume = |prefix: &str, out: &str| {
        let mut command = Command::new("sh");
        let run = env!("CARGO_BIN_EXE_chimera-run");
        let line =
            format!("{prefix} exec {run} train --resume run/step-00000002.b158 --out {out} --steps 4 --threads 1");
        command.current_dir(place.0.path()).args(["-c", &line]);
        output(command)
    };
    let (code, stdout, stderr) = resume("ulimit -f 32;", "run");
    assert_eq!((code, stdout.as_str()), (Some(4), ""), "{stderr}");
    assert!(stderr.contains("step-00000004.b158: no space left") && stderr.contains("unchanged"), "{stderr}");
    assert_eq!(checkpoints(&place.path("run")), ["step-00000000.b158", "step-00000002.b158"], "no part is left");

    if cfg!(target_os = "linux") {
        // A device that is always full stands where the journal goes.
        fs::create_dir(place.path("full")).expect("a folder");
        std::os::unix::fs::symlink("/dev/full", place.path("full/journal.bin")).expect("a link");
        let (code, _, stderr) = resume("", "full");
        assert!(code == Some(4) && stderr.contains("no space left"), "{code:?}: {stderr}");
    }
    assert!(fs::read(place.path("run/step-00000002.b158")).expect("a checkpoint") == before);
    let (code, _, stderr) = resume("", "run");
    assert_eq!(code, Some(0), "{stderr}");
    let last = "step-00000004.b158";
    assert!(place.tensors(&format!("run/{last}")) == place.tensors(&format!("whole/{last}")), "nothing was lost");
}

#[test]
fn a_vocabulary_is_saved_and_used() {
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
    command.current_dir(place.0.path()).args(["vocab", "--data", "data.txt", "-o", "text.vocab"]);
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{stderr}");
    let n: usize = stdout.trim().parse().expect("a number of ids");
    assert!((258..400).contains(&n), "{n}");
    let small = ["--batch", "1", "--seq-len", "8", "--steps", "1", "--json"];
    let exact = format!("o200k:restricted={n}");
    let lines = ["text.vocab", "o200k:restricted", &exact].map(|vocab| {
        let folder = format!("run-{vocab}");
        let (code, stdout, stderr) = output(place.train(&[&small[..], &["--out", &folder, "--vocab", vocab]].concat()));
        assert_eq!(code, Some(0), "{vocab}: {stderr}");
        let line: serde_json::Value = serde_json::from_str(stdout.trim()).expect("JSON");
        line["loss"].as_f64().expect("a loss")
    });
    assert!(lines[0] == lines[1] && lines[1] == lines[2], "one vocabulary by three names: {lines:?}");
    for (vocab, what) in [("o200k:restricted=999", format!("the data need {n} ids")), ("300", "what they mean".into())]
    {
        let (code, _, stderr) = output(place.train(&[&small[..], &["--out", "no", "--vocab", vocab]].concat()));
        assert!(code == Some(2) && stderr.contains(&what), "{vocab}: {code:?} {stderr}");
    }
}

#[test]
fn bad_input_has_a_sentence_and_a_code() {
    let place = Place::new();
    fs::write(place.path("empty.txt"), "").expect("written");
    fs::write(place.path("latin.txt"), b"caf\xe9 ".repeat(100)).expect("written");
    fs::write(place.path("short.txt"), "abc").expect("written");
    fs::write(place.path("bad.json"), "{ \"hiden_size\": 3 }").expect("written");
    fs::write(place.path("noise.b158"), b"\x89b158\r\n\x1a\x02\0\0\0 and then noise that is no table")
        .expect("written");
    fs::write(place.path("noise.plan"), "chimera-plan 1 crc32c 00000000\n(plan)").expect("written");
    let cases: [(&[&str], i32, &str); 11] = [
        (&["model.json", "--data", "empty.txt"], 1, "empty.txt: the file is empty"),
        (&["model.json", "--data", "absent.txt"], 1, "absent.txt"),
        (&["model.json"], 2, "no data file given"),
        (&["--data", "data.txt"], 2, "no model is named"),
        (&["model.json", "--data", "latin.txt", "--vocab", "o200k:restricted"], 1, "not UTF-8"),
        (&["model.json", "--data", "short.txt"], 1, "expected at least 65 for one row of 64"),
        (&["bad.json", "--data", "data.txt"], 3, "hidden_size"),
        (&["model.json", "--data", "data.txt", "--set", "hidden_size=0"], 3, "hidden_size"),
        (&["noise.b158", "--data", "data.txt"], 5, "noise.b158"),
        (&["noise.plan", "--data", "data.txt"], 5, "noise.plan"),
        (&["model.json", "--data", "data.txt", "--lr", "0"], 2, "--lr"),
    ];
    for (words, code, what) in cases {
        let (found, stdout, stderr) = output(place.bare(words));
        assert_eq!((found, stdout.as_str()), (Some(code), ""), "{words:?}: {stderr}");
        assert!(stderr.contains(what), "{words:?}: {stderr}");
        assert!(!place.path("chimera-run").exists(), "{words:?} left a folder");
    }
}

#[test]
fn weights_must_belong_to_the_vocabulary() {
    let place = Place::new();
    let (code, _, stderr) = output(place.train(&["--steps", "1", "--batch", "2", "--seq-len", "16", "--out", "run"]));
    assert_eq!(code, Some(0), "{stderr}");
    let (code, _, stderr) =
        output(place.bare(&["run", "--data", "data.txt", "--vocab", "o200k:restricted", "--out", "b"]));
    assert!(code == Some(3) && stderr.contains("vocabulary bytes"), "{code:?}: {stderr}");
    let (code, _, stderr) = output(place.bare(&["run", "--data", "data.txt", "--scale", "pico", "--out", "b"]));
    assert!(code == Some(2) && stderr.contains("--scale and --set"), "{code:?}: {stderr}");
    // One flipped bit in a tensor.
    let path = place.path("run/step-00000001.b158");
    let mut bytes = fs::read(&path).expect("a checkpoint");
    let at = bytes.len() - 5;
    bytes[at] ^= 4;
    fs::write(&path, bytes).expect("written");
    let (code, _, stderr) = output(place.bare(&["--resume", "run", "--steps", "3"]));
    assert!(code == Some(5) && stderr.contains("corrupted"), "{code:?}: {stderr}");
}

/// A run that only its end bounds, behind its first checkpoint.
#[cfg(unix)]
fn endless(place: &Place, out: &str) -> Child {
    let words = [
        "--steps",
        "1000000",
        "--batch",
        "2",
        "--seq-len",
        "16",
        "--save-every",
        "1",
        "--val-every",
        "0",
        "--out",
        out,
    ];
    let mut command = place.train(&words);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    let patience = Instant::now() + Duration::from_secs(300);
    while newest(&place.path(out)).is_none() {
        assert!(Instant::now() < patience, "no checkpoint appears");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn newest(folder: &Path) -> Option<PathBuf> {
    checkpoint::latest(folder).expect("the folder can be listed")
}

#[cfg(unix)]
fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().expect("kill is there");
    assert!(status.success());
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_leaves() {
    let place = Place::new();
    let child = endless(&place, "run");
    signal(&child, "-INT");
    let Output { status, stdout, stderr } = child.wait_with_output().expect("it ends");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("stopped behind step") && stderr.contains("--resume run"), "{stderr}");
    let newest = newest(&place.path("run")).expect("a checkpoint");
    assert!(newest.ends_with(Path::new(stdout.trim()).file_name().expect("a name")), "{stdout}");
}

#[cfg(unix)]
#[test]
fn a_kill_at_any_moment_leaves_a_sound_checkpoint() {
    let place = Place::new();
    for round in 0..3 {
        let out = format!("run-{round}");
        let mut child = endless(&place, &out);
        std::thread::sleep(Duration::from_millis(7 * round));
        child.kill().expect("killed");
        child.wait().expect("it ends");
        let path = newest(&place.path(&out)).expect("a checkpoint");
        let file = B158::open(&path).unwrap_or_else(|e| panic!("{e}"));
        file.verify_all().unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn the_quickstart_trains_saves_loads_and_writes() {
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
    command.current_dir(place.0.path()).env("CHIMERA_CODE_CACHE", "off").args([
        "quickstart",
        "--seconds",
        "1",
        "--batch",
        "4",
        "--threads",
        "2",
    ]);
    let Output { status, stdout, stderr } = command.output().expect("the command starts");
    let stderr = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert_eq!(stderr.matches("trial of ").count(), 2, "both estimators are tried: {stderr}");
    for what in
        ["trial of adamw: ", "unigram entropy", "held out:", "bits/byte", "saved chimera-quickstart/step-", "next:"]
    {
        assert!(stderr.contains(what), "no {what:?} in {stderr}");
    }
    assert!(stdout.len() > 20, "a sample");
    let path = newest(&place.path("chimera-quickstart")).expect("a checkpoint");
    B158::open(&path).expect("opened").verify_all().expect("sound");
}
