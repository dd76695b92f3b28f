//! What `chimera-run train` says of its estimates: in metrics and report, without a change to the run.

mod common;

use std::fs;

use chimera_runtime::files::b158::B158;
use common::{LOOPED, Place};
use serde_json::Value;

/// Exit code and messages of `chimera-run` with these words.
fn run(place: &Place, words: &str) -> (Option<i32>, String) {
    let words: Vec<&str> = words.split_whitespace().collect();
    let output = place.command(&words).env("CHIMERA_CODE_CACHE", "off").output().expect("the command starts");
    (output.status.code(), String::from_utf8(output.stderr).expect("UTF-8"))
}

const ALWAYS: &str = "train model.json --data data.txt --batch 4 --seq-len 16 --val-every 0 --steps 4";

#[test]
fn metrics_tell_of_the_estimate_and_change_nothing() {
    let place = Place::with_model(LOOPED);
    for (i, words) in
        ["--lr 0.05", "--estimator mezo --directions 2 --mode additive --lr 0.05 --hybrid-head"].iter().enumerate()
    {
        let (plain, seen) = (format!("plain{i}"), format!("seen{i}"));
        assert_eq!(run(&place, &format!("{ALWAYS} {words} --flips-every 0 --out {plain}")).0, Some(0), "{words}");
        let (code, text) =
            run(&place, &format!("{ALWAYS} {words} --gradient-cosine 2 --tensorboard --out {seen} --threads 2"));
        assert_eq!(code, Some(0), "{words}: {text}");
        assert!(text.contains("flips ") && text.contains("cos "), "{text}");
        let weights = |run: &str| {
            let file = B158::open(&place.path(&format!("{run}/step-00000004.b158"))).expect("a checkpoint");
            let names: Vec<String> = file.iter().map(|t| t.0.to_owned()).collect();
            names.into_iter().map(|n| file.require(&n).expect("a tensor").bytes.to_vec()).collect::<Vec<_>>()
        };
        assert!(weights(&plain) == weights(&seen), "{words}: looking changes nothing");
        let lines = |run: &str| -> Vec<Value> {
            let text = fs::read_to_string(place.path(&format!("{run}/metrics.jsonl"))).expect("metrics");
            text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
        };
        for (step, line) in (1..).zip(lines(&seen)) {
            let number = |key: &str| line.get(key).and_then(Value::as_f64);
            assert!(number("flips").is_some_and(|x| (0.0..1.0).contains(&x)), "{line}");
            assert!(number("scalar_mean").is_some() && number("scalar_deviation") > Some(0.0), "{line}");
            let hybrid = words.contains("--hybrid-head");
            assert_eq!(number("head_gradient_norm").is_some_and(|x| x > 0.0), hybrid, "{line}");
            // An embedding that follows its gradient is not probed.
            assert_eq!(number("cosine_embedding").is_some(), step % 2 == 0 && !hybrid, "{line}");
            let cosines = ["cosine", "cosine_ternary", "cosine_matrix", "cosine_vector"].map(number);
            assert!(cosines.iter().all(|c| c.is_some() == (step % 2 == 0)), "{line}");
            assert!(cosines.iter().flatten().all(|c| c.abs() < 1.0 && *c != 0.0), "{line}");
        }
        assert!(lines(&seen).iter().any(|l| l["flips"].as_f64() > Some(0.0)), "{words}: some codes change");
        assert!(lines(&plain).iter().all(|l| l.get("flips").is_none() && l.get("cosine").is_none()));
        assert_eq!(run(&place, &format!("report {seen} -o {seen}.html")).0, Some(0));
        let page = fs::read_to_string(place.path(&format!("{seen}.html"))).expect("a page");
        assert!(page.contains("Ternary codes that a step changes") && page.contains("cosine to the gradient"));
        let events = fs::read_dir(place.path(&seen)).expect("a folder").flatten().map(|e| e.path());
        let events = events.filter(|p| p.to_string_lossy().contains("tfevents")).map(|p| fs::read(p).expect("read"));
        let has = |bytes: &[u8], tag: &str| bytes.windows(tag.len()).any(|w| w == tag.as_bytes());
        assert!(events.into_iter().all(|e| has(&e, "estimator/flips") && has(&e, "estimator/cosine_ternary")));
    }
    let (code, text) = run(&place, &format!("{ALWAYS} --estimator adamw --gradient-cosine 2 --out refused"));
    assert!(code == Some(2) && text.contains("--gradient-cosine has no meaning for the estimator adamw"), "{text}");
}
