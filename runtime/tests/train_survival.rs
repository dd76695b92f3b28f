//! Runs that survive: killed at random moments, damaged, out of disk, rolled back; always the bits of an undisturbed run.
//!
//! `CHIMERA_KILLS` sets how often the loop kills the process; everything else is the same for any number.

#![cfg(unix)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use chimera_runtime::files::b158::B158;
use chimera_runtime::train::checkpoint;
use chimera_runtime::train::journal::{self, Item, Record};
use chimera_runtime::train::standing::Standing;
use common::{LOOPED, Place};

const SMALL: [&str; 9] = ["model.json", "--data", "data.txt", "--batch", "2", "--seq-len", "16", "--val-every", "0"];

impl Place {
    fn new() -> Place {
        Place::with_model(LOOPED)
    }

    /// Runs a command that must succeed; its stdout and stderr.
    fn ok(&self, words: &[&str]) -> (String, String) {
        let (code, stdout, stderr) = output(self.command(words));
        assert_eq!(code, Some(0), "{words:?}: {stderr}");
        (stdout, stderr)
    }

    fn train(&self, words: &[&str]) -> (String, String) {
        self.ok(&[&["train"], &SMALL[..], &["--threads", "1"], words].concat())
    }

    /// Name and bytes of every tensor of a checkpoint.
    fn tensors(&self, checkpoint: &str) -> Vec<(String, Vec<u8>)> {
        let file = B158::open(&self.path(checkpoint)).unwrap_or_else(|e| panic!("{e}"));
        let names: Vec<String> = file.iter().map(|t| t.0.to_owned()).collect();
        names.into_iter().map(|n| (n.clone(), file.require(&n).expect("a tensor").bytes.to_vec())).collect()
    }
}

fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the command starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

/// Steps that a folder leads to; nothing before the first checkpoint.
fn reached(folder: &Path) -> u64 {
    // A checkpoint may be replaced between listing and opening it.
    Standing::newest(folder).ok().flatten().map_or(0, |s| s.progress().step)
}

fn wait(mut until: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(300);
    while !until() {
        assert!(Instant::now() < patience, "nothing happens");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn journal_bytes(folder: &Path) -> u64 {
    fs::metadata(folder.join(journal::NAME)).map_or(0, |m| m.len())
}

#[test]
fn kills_at_random_moments_change_nothing() {
    let place = Place::new();
    let kills: u64 = std::env::var("CHIMERA_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    let steps = (150 * kills).to_string();
    let run = place.path("run");
    let words = |threads| [&["train"], &SMALL[..], &["--threads", threads, "--resume", "auto", "--quiet"]].concat();
    let further = ["--out", "run", "--steps", &steps, "--save-every", "7", "--keep", "1"];
    let mut random = std::process::id() as u64 | 1;
    let (mut killed, mut lost) = (0, 0);
    for round in 0..kills {
        let threads = if round % 2 == 0 { "1" } else { "2" };
        let mut child = place.command(&[&words(threads)[..], &further].concat());
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the command starts");
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Every fifth dies at any time from its start on, the others while they write.
        match round % 5 {
            4 => std::thread::sleep(Duration::from_millis(random >> 55)),
            _ => {
                let before = journal_bytes(&run);
                wait(|| {
                    journal_bytes(&run) > before + (random >> 61) * 90 || child.try_wait().expect("known").is_some()
                });
                std::thread::sleep(Duration::from_micros(random >> 51));
            }
        }
        let before = reached(&run);
        child.kill().expect("killed");
        let Output { status, stderr, .. } = child.wait_with_output().expect("it ends");
        killed += u64::from(status.code().is_none());
        assert!(status.code().is_none_or(|c| c == 0), "{}", String::from_utf8_lossy(&stderr));
        let after = reached(&run);
        assert!(after >= before, "step {before} was on disk, now {after} is");
        lost = lost.max(before.saturating_sub(after));
    }
    assert!(killed >= kills / 2 && lost == 0, "{killed} of {kills} were killed");
    place.ok(&[&words("2")[..], &further].concat());
    place.train(&["--out", "whole", "--steps", &steps]);
    let last = format!("step-{:08}.b158", 150 * kills);
    assert!(place.tensors(&format!("run/{last}")) == place.tensors(&format!("whole/{last}")), "bits of the whole run");
    let (stdout, _) = place.ok(&["verify-run", "run", "whole", "--threads", "1"]);
    assert!(stdout.starts_with(&format!("equal: {steps} steps")), "{stdout}");
    // Between the checkpoints, the journal leads to any step, in both runs to the same.
    let (middle, line) = ((6 * kills + 2).to_string(), format!("behind step {}", 6 * kills + 2));
    let (stdout, _) = place.ok(&["verify-run", "run", "whole", "--to", &middle, "--threads", "2"]);
    assert!(stdout.contains(&line), "{stdout}");
}

#[test]
fn any_step_is_reached_and_differences_are_named() {
    let place = Place::new();
    place.train(&["--out", "run", "--steps", "9", "--save-every", "4", "--keep", "9", "--lr-decay", "constant"]);
    place.train(&["--out", "short", "--steps", "6", "--lr-decay", "constant"]);
    let (stdout, stderr) = place.ok(&["replay", "run", "--to", "6", "--threads", "2"]);
    assert_eq!(stdout.trim(), "run/replayed-00000006.b158");
    assert!(stderr.contains("the checkpoint of step 4 and 2 steps"), "{stderr}");
    assert!(place.tensors("run/replayed-00000006.b158") == place.tensors("short/step-00000006.b158"));
    place.ok(&["replay", "run", "--to", "0", "-o", "begin.b158", "-q"]);
    assert!(place.tensors("begin.b158") == place.tensors("short/step-00000000.b158"));

    // A branch from the past of a run.
    place.ok(&["train", "--resume", "run/replayed-00000006.b158", "--out", "branch", "--steps", "9", "--threads", "1"]);
    assert!(place.tensors("branch/step-00000009.b158") == place.tensors("run/step-00000009.b158"));
    let (stdout, _) = place.ok(&["verify-run", "run", "branch"]);
    assert!(stdout.starts_with("equal: 3 steps"), "{stdout}");

    place.train(&["--out", "other", "--steps", "9", "--lr-decay", "constant", "--lr", "0.011"]);
    let fails = |words: &[&str], code: i32, what: &str| {
        let (found, stdout, stderr) = output(place.command(words));
        assert_eq!((found, stdout.as_str()), (Some(code), ""), "{words:?}: {stderr}");
        assert!(stderr.contains(what), "{words:?}: {stderr}");
    };
    fails(&["verify-run", "run", "other"], 1, "the runs differ: step 1, learning rate: 0.01 and 0.011");
    fails(&["verify-run", "run", "short"], 1, "one has 9 steps, the other 6; the first 6 are equal");
    fails(&["replay", "run", "--to", "10"], 1, "found steps up to 9, expected 10");
    fails(&["train", "--resume", "run/step-00000004.b158"], 2, "branch off from this checkpoint by --out");
    fails(&["train", "--resume", "run", "--out", "other"], 2, "there is a run already");
}

#[test]
fn damage_costs_time_and_no_bits() {
    let place = Place::new();
    let words = ["--steps", "12", "--save-every", "20", "--lr-decay", "cosine"];
    place.train(&[&words[..], &["--out", "whole"]].concat());
    let expected = place.tensors("whole/step-00000012.b158");
    let begin = |name: &str| {
        // What a killed process leaves: the first checkpoint and the journal.
        fs::create_dir(place.path(name)).expect("a folder");
        for file in [journal::NAME, "step-00000000.b158", "metrics.jsonl"] {
            fs::copy(place.path("whole").join(file), place.path(name).join(file)).expect("copied");
        }
        place.path(name).join(journal::NAME)
    };
    let ends: Vec<(u64, usize)> = {
        let bytes = fs::read(place.path("whole").join(journal::NAME)).expect("a journal");
        let (_, items) = journal::read(&bytes).expect("sound");
        let step = |item| match item {
            Item::Record(Record::Step(s)) => s.step,
            other => panic!("{other:?}"),
        };
        items.map(|(place, item)| (step(item), place.end)).collect()
    };
    assert_eq!(ends.len(), 12);
    let size = (ends[11].1 - ends[10].1) as f64;
    assert!(size < 100.0, "a record takes {size} bytes");
    let resume = |name: &str| {
        let (_, stderr) = place.ok(&["train", "--resume", name, "--threads", "2"]);
        assert!(place.tensors(&format!("{name}/step-00000012.b158")) == expected, "{name}: {stderr}");
        place.ok(&["verify-run", "whole", name]);
        stderr
    };
    // All steps, and half of the last one.
    begin("all");
    assert!(resume("all").contains("resuming behind step 12: the checkpoint of step 0 and 12 steps"));
    let torn = begin("torn");
    fs::File::options().write(true).open(&torn).and_then(|f| f.set_len(ends[11].1 as u64 - 5)).expect("cut");
    assert!(resume("torn").contains("behind step 11: the checkpoint of step 0 and 11 steps of the journal; a record"));
    let damaged = begin("damaged");
    let mut bytes = fs::read(&damaged).expect("a journal");
    bytes[ends[6].1 + 10] ^= 0x20;
    fs::write(&damaged, &bytes).expect("damage");
    let stderr = resume("damaged");
    assert!(
        stderr.contains(&format!("damaged at byte {}; 4 steps", ends[6].1)) && stderr.contains("behind step 7"),
        "{stderr}"
    );
    assert!(fs::read(place.path("damaged/journal.bin.damaged-1")).expect("a copy") == bytes);

    // Without a journal, or with that of another run.
    let gone = begin("gone");
    fs::remove_file(gone).expect("removed");
    let (_, stderr) = place.ok(&["train", "--resume", "gone", "--threads", "1"]);
    assert!(stderr.contains("and 0 steps of the journal"), "{stderr}");
    assert!(place.tensors("gone/step-00000012.b158") == expected);
    let foreign = begin("foreign");
    place.train(&["--steps", "1", "--out", "alien", "--data", "model.json"]);
    fs::copy(place.path("alien").join(journal::NAME), foreign).expect("copied");
    let (code, _, stderr) = output(place.command(&["train", "--resume", "foreign"]));
    assert!(code == Some(5) && stderr.contains("that of another run"), "{stderr}");
}

#[test]
fn clocks_that_jump_and_disks_that_fill_change_nothing() {
    let place = Place::new();
    let words = ["--steps", "10", "--save-every", "4"];
    place.train(&[&words[..], &["--out", "whole"]].concat());
    let expected = place.tensors("whole/step-00000010.b158");
    let program = env!("CARGO_BIN_EXE_chimera-run");
    // No room for the first checkpoint, nor, in the second case, for a line of the history.
    for (limit, out) in [(16, "tiny"), (1, "least")] {
        let line = format!(
            "ulimit -f {limit}; exec {program} train --resume whole/step-00000000.b158 --out {out} --threads 1 --steps 10"
        );
        let mut shell = Command::new("sh");
        shell.current_dir(place.path("")).args(["-c", &line]);
        let (code, _, stderr) = output(shell);
        assert!(code == Some(4) && stderr.contains("no space left"), "{code:?}: {stderr}");
        assert_eq!(checkpoint::steps(&place.path(out)).expect("listed"), [0u64; 0], "no part of a checkpoint");
        place.ok(&["train", "--resume", "whole/step-00000000.b158", "--out", out, "--threads", "1", "--steps", "10"]);
        assert!(place.tensors(&format!("{out}/step-00000010.b158")) == expected);
    }
    // A run that cannot write what it did, some steps behind its first checkpoint.
    let out = place.path("grown");
    fs::create_dir(&out).expect("a folder");
    for file in [journal::NAME, "step-00000000.b158"] {
        fs::copy(place.path("whole").join(file), out.join(file)).expect("copied");
    }
    let bytes = fs::read(out.join(journal::NAME)).expect("a journal");
    fs::write(out.join(journal::NAME), &bytes[..300]).expect("cut");
    let line = format!("ulimit -f 5; exec {program} train --resume grown --threads 1 --save-every 1000");
    let mut shell = Command::new("sh");
    shell.current_dir(place.path("")).args(["-c", &line]);
    let (code, _, stderr) = output(shell);
    assert!(code == Some(4) && stderr.contains("no space left"), "{code:?}: {stderr}");
    // Times of files say nothing: the newest is the oldest by its clock, and the first is from the future.
    let touch = |file: &str, at: SystemTime| {
        let file = fs::File::options().append(true).open(place.path(file)).expect("opened");
        file.set_modified(at).expect("set");
    };
    touch("grown/journal.bin", SystemTime::UNIX_EPOCH);
    touch("grown/step-00000000.b158", SystemTime::now() + Duration::from_secs(1 << 30));
    place.ok(&["train", "--resume", "grown", "--threads", "2"]);
    assert!(place.tensors("grown/step-00000010.b158") == expected);
    place.ok(&["verify-run", "grown", "whole"]);
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let place = Place::new();
    fs::write(place.path("file"), "no folder").expect("written");
    let (code, stdout, stderr) = output(place.command(&[&["train"], &SMALL[..], &["--out", "file/run"]].concat()));
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.contains("file/run"), "{stderr}");
    if Path::new("/proc/version").exists() {
        // Nobody may write there, not even an administrator.
        let (code, stdout, stderr) = output(place.command(&[&["train"], &SMALL[..], &["--out", "/proc/run"]].concat()));
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.contains("/proc/run"), "{stderr}");
    }
}

#[test]
fn an_exploding_loss_goes_back_and_the_run_goes_on() {
    let place = Place::new();
    // Steps far too large: the loss rises by more than a fifth of a nat.
    let words = ["--steps", "24", "--save-every", "4", "--lr", "0.4", "--lr-decay", "constant", "--explosion", "0.2"];
    let (_, stderr) = place.train(&[&words[..], &["--out", "run", "--keep", "9"]].concat());
    assert!(stderr.contains("back to the checkpoint of step") && stderr.contains("half the learning rate"), "{stderr}");
    let first = Standing::newest(&place.path("run")).expect("sound").expect("a run").progress();
    assert!(first.step == 24 && first.rollbacks > 0, "{first:?}");
    let events = fs::read_to_string(place.path("run/events.jsonl")).expect("events");
    assert_eq!(events.matches("\"event\":\"rollback\"").count(), first.rollbacks as usize);
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).expect("metrics");
    assert_eq!(metrics.lines().count(), 24, "the metrics are those of the steps that count");
    // The whole way again from the journal, and again with the process killed.
    place.ok(&["replay", "run", "--to", "24", "-o", "again.b158"]);
    assert!(place.tensors("again.b158") == place.tensors("run/step-00000024.b158"));
    let begin = place.path("begin");
    fs::create_dir(&begin).expect("a folder");
    for file in [journal::NAME, "step-00000000.b158"] {
        fs::copy(place.path("run").join(file), begin.join(file)).expect("copied");
    }
    place.ok(&["train", "--resume", "begin", "--threads", "2"]);
    assert!(place.tensors("begin/step-00000024.b158") == place.tensors("run/step-00000024.b158"));
    place.ok(&["verify-run", "begin", "run"]);
    let (code, _, stderr) = output(
        place.command(
            &[&["train"], &SMALL[..], &["--steps", "200", "--lr", "3e3", "--explosion", "1e-6", "--out", "hopeless"]]
                .concat(),
        ),
    );
    assert!(code == Some(1) && stderr.contains("start again with a smaller --lr"), "{code:?}: {stderr}");
}

/// A run that only its end bounds, behind its first step.
fn endless(place: &Place, out: &str) -> Child {
    let words = [&["train"], &SMALL[..], &["--steps", "1000000", "--threads", "1", "--out", out]].concat();
    let mut command = place.command(&words);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    wait(|| reached(&place.path(out)) > 0);
    child
}

#[test]
fn the_second_interrupt_quits_at_once_and_one_folder_has_one_run() {
    let place = Place::new();
    let child = endless(&place, "run");
    let (code, _, stderr) = output(place.command(&["train", "--resume", "run", "--steps", "1000000"]));
    assert!(code == Some(1) && stderr.contains("another process trains in this folder"), "{code:?}: {stderr}");
    // The page of a run that goes on.
    let (stdout, _) = place.ok(&["report", "run", "-o", "live.html"]);
    assert_eq!(stdout.trim(), "live.html");
    let id = child.id().to_string();
    // Both at once: the first would save and leave, the second does not wait.
    let kill = format!("kill -INT {id}; kill -INT {id}");
    assert!(Command::new("sh").args(["-c", &kill]).status().expect("kill is there").success());
    let Output { status, stderr, .. } = child.wait_with_output().expect("it ends");
    let stderr = String::from_utf8_lossy(&stderr);
    // The system may join two signals that come together into one.
    assert!(status.code() == Some(130) || (status.code() == Some(0) && stderr.contains("stopped behind")), "{stderr}");
    let step = reached(&place.path("run"));
    place.ok(&["train", "--resume", "run", "--steps", &(step + 2).to_string(), "--threads", "1"]);
    assert_eq!(reached(&place.path("run")), step + 2);
}

#[test]
fn what_is_shown_changes_no_bit() {
    let place = Place::new();
    place.train(&["--out", "plain", "--steps", "6"]);
    let words = [
        "--sample-every",
        "2",
        "--sample-prompt",
        "the <cat>",
        "--sample-tokens",
        "9",
        "--tensorboard",
        "--val-every",
        "3",
    ];
    let (_, stderr) = output_of(&place, &[&words[..], &["--out", "shown", "--steps", "6"]].concat());
    assert!(stderr.contains("the model writes: \"the <cat>"), "{stderr}");
    assert!(!stderr.contains("memory are in use"), "memory is within the plan's figure: {stderr}");
    assert!(place.tensors("plain/step-00000006.b158") == place.tensors("shown/step-00000006.b158"));
    let names: Vec<String> = fs::read_dir(place.path("shown"))
        .expect("a folder")
        .map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    assert!(names.iter().any(|n| n.starts_with("events.out.tfevents.")), "{names:?}");
    let (stdout, _) = place.ok(&["report", "shown"]);
    assert_eq!(stdout.trim(), "shown/report.html");
    let page = fs::read_to_string(place.path("shown/report.html")).expect("a page");
    for what in [
        "Loss over time",
        "bits/byte held out, best",
        "the &lt;cat&gt;",
        "<th>threads</th><td>1</td>",
        "finished 6 steps",
    ] {
        assert!(page.contains(what), "no {what:?}");
    }
    assert!(!page.contains("http"), "nothing from outside");
    let (code, _, stderr) = output(place.command(&["report", "absent"]));
    assert!(code == Some(1) && stderr.contains("the folder has no run"), "{stderr}");
}

/// As [`Place::train`], with options that [`SMALL`] has given another value of.
fn output_of(place: &Place, words: &[&str]) -> (String, String) {
    place.ok(&[
        &["train", "model.json", "--data", "data.txt", "--batch", "2", "--seq-len", "16", "--threads", "1"],
        words,
    ]
    .concat())
}
