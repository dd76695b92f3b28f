//! `chimera-run compare` as a user meets it: table, JSON and page of several runs, what an interrupt leaves, and what is refused.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use chimera_runtime::files::b158::B158;
use serde_json::Value;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().expect("a folder"));
        fs::write(place.path("data.txt"), "the cat sat on the mat, the dog on the log. ".repeat(200)).expect("written");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `compare --scale pico --data data.txt` and further words.
    fn compare(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
        let always = "compare --scale pico --data data.txt --batch 2 --seq-len 32 --threads 1";
        command.current_dir(self.0.path()).args(always.split(' ')).args(words.split_whitespace());
        command.env("CHIMERA_CODE_CACHE", "off");
        command
    }
}

fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the command starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn two_estimators_are_compared() {
    let place = Place::new();
    let words = "--estimators adamw,perseq-lowrank --seconds 2 --rank 2 --seed 3 --out both --json";
    let (code, stdout, stderr) = output(place.compare(words));
    assert_eq!(code, Some(0), "{stderr}");
    let value: Value = serde_json::from_str(&stdout).expect("JSON and nothing else");
    assert_eq!((value["seconds"].as_u64(), value["seed"].as_u64()), (Some(2), Some(3)));
    let runs = value["estimators"].as_array().expect("a list");
    let number = |run: &Value, key: &str| run[key].as_f64().unwrap_or_else(|| panic!("no {key} in {run}"));
    let worst = number(&value, "worst");
    let mut first = vec![];
    for (run, name) in runs.iter().zip(["adamw", "perseq-lowrank"]) {
        assert_eq!((run["estimator"].as_str(), run["outcome"].as_str()), (Some(name), Some("finished")));
        assert!(
            number(run, "steps") >= 1.0
                && number(run, "resident") > number(run, "allocated")
                && number(run, "held_out_last") <= worst
        );
        assert!(number(run, "allocated") > 1e6);
        assert!(number(run, "held_out_best") <= number(run, "held_out_last"));
        assert!(number(run, "forward_tokens_per_second") >= number(run, "data_tokens_per_second"), "{run}");
        assert!(number(run, "seconds_to_worst") > 0.0 && !run["held_out"].as_array().expect("points").is_empty());
        // The run is one of train.
        let events = fs::read_to_string(place.path(&format!("both/{name}/events.jsonl"))).expect("a history");
        let start: Value = serde_json::from_str(events.lines().next().expect("a line")).expect("JSON");
        let options = &start["options"];
        assert_eq!((&options["estimator"], &options["seed"]), (&name.into(), &3.into()));
        assert_eq!(options["rank"], if name == "adamw" { 1 } else { 2 }, "an option is for those that have it");
        let file = B158::open(&place.path(&format!("both/{name}/step-00000000.b158"))).expect("the beginning");
        let weights = file.iter().filter(|t| !t.0.starts_with("optim.")).map(|t| t.0.to_owned()).collect::<Vec<_>>();
        first.push(weights.iter().map(|n| file.require(n).expect("a tensor").bytes.to_vec()).collect::<Vec<_>>());
    }
    assert_eq!((runs.len(), first[0].len()), (2, first[1].len()));
    assert!(first[0] == first[1], "both begin with the same weights");
    assert!(number(&runs[0], "held_out_last") < 8.0, "something is learned along the gradient");

    let page = fs::read_to_string(place.path("both/compare.html")).expect("a page");
    for what in ["adamw", "perseq-lowrank", "class=\"line s1\"", "tokens of data", "bits/byte"] {
        assert!(page.contains(what), "no {what:?} on the page");
    }
    assert_eq!(value["page"], "both/compare.html");
    let (code, _, stderr) = output(place.compare("--estimators sgd,adamw --seconds 1 --out both"));
    assert!(code == Some(2) && stderr.contains("both/adamw/") && stderr.contains("there is a run already"), "{stderr}");
    assert!(!place.path("both/sgd").exists(), "nothing is begun before everything is checked");
}

#[test]
fn what_has_no_meaning_is_refused() {
    let place = Place::new();
    for (words, parts) in [
        ("--estimators adamw,adagrad", &["adagrad", "perseq-lowrank", "mezo", "adamw", "sgd", "chimera21"][..]),
        ("", &["--estimators"]),
        ("--estimators sgd,adamw,sgd", &["sgd is in places 1 and 3"]),
        ("--estimators sgd --estimator adamw", &["name all of them by --estimators"]),
        ("--estimators sgd,adamw --rank 2", &["--rank has no meaning for any", "perseq-lowrank or mezo"]),
        ("--estimators sgd,adamw --accumulate 3", &["does not divide"]),
        ("--estimators sgd --minutes 1 --seconds 2", &["cannot be used with"]),
        ("--estimators sgd --minutes 0", &["above 0"]),
        ("--estimators sgd --val-every 5m", &["a time such as 30s"]),
        ("--estimators sgd --trace t.json", &["--trace is about one run"]),
    ] {
        let (code, stdout, stderr) = output(place.compare(words));
        assert!(code == Some(2) && stdout.is_empty(), "{words}: {code:?} {stderr}");
        assert!(parts.iter().all(|part| stderr.contains(part)), "{words}: {stderr}");
    }
    // What fails before the first step fails for every estimator and is said once.
    let (code, stdout, stderr) = output(place.compare("--estimators sgd,adamw --seconds 1 --max-memory 1 -q"));
    assert!(code == Some(4) && stdout.is_empty() && stderr.matches("error:").count() == 1, "{code:?} {stderr}");
    assert!(!place.path("chimera-compare").exists(), "nothing is left behind");
}

#[test]
fn help_has_an_example_and_no_second_way_to_name_estimators() {
    let (code, stdout, _) = output(Place::new().compare("--help"));
    assert_eq!(code, Some(0));
    assert!(stdout.contains("chimera-run compare --estimators adamw,"), "{stdout}");
    assert!(!stdout.contains("--estimator <"), "{stdout}");
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill is there");
    assert!(status.success());
}

#[cfg(unix)]
#[test]
fn an_interrupt_keeps_what_was_done() {
    let place = Place::new();
    let mut command = place.compare("--estimators mezo,sgd --minutes 600 --val-every 1 --out left");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    let patience = Instant::now() + Duration::from_secs(300);
    let log = place.path("left/mezo/metrics.jsonl");
    while !fs::read_to_string(&log).is_ok_and(|text| text.lines().count() > 1) {
        assert!(Instant::now() < patience, "no step is done");
        std::thread::sleep(Duration::from_millis(5));
    }
    interrupt(&child);
    let Output { status, stdout, stderr } = child.wait_with_output().expect("it ends");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("--resume left/mezo") && stderr.contains("left/compare.html"), "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(
        lines.len() == 2 && lines[0].starts_with("estimator") && lines[1].starts_with("mezo (stopped)"),
        "{stdout}"
    );
    assert!(fs::read_to_string(place.path("left/compare.html")).is_ok_and(|page| page.contains("an interrupt")));
    assert!(!place.path("left/sgd").exists(), "the next one is not begun");
}
