//! Estimators and optimisers as options of `chimera-run train`: runs of a looped model with experts that survive interruption, and
//! combinations that are refused.

mod common;

use std::fs;
use std::process::Command;

use chimera_runtime::files::b158::B158;
use common::{LOOPED, Place};

impl Place {
    fn new() -> Place {
        Place::with_model(LOOPED)
    }

    /// Exit code and messages of `chimera-run` with these words.
    fn run(&self, words: &str, threads: &str) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
        command.current_dir(self.0.path()).args(words.split_whitespace()).args(["--threads", threads]);
        let output = command.env("CHIMERA_CODE_CACHE", "off").output().expect("the command starts");
        (output.status.code(), String::from_utf8(output.stderr).expect("UTF-8"))
    }

    fn train(&self, words: &str, threads: &str) -> (Option<i32>, String) {
        let always = "train model.json --data data.txt --batch 2 --seq-len 16 --val-every 0 --lr-decay constant";
        self.run(&format!("{always} {words}"), threads)
    }

    /// Name and bytes of every tensor of the checkpoint of a step.
    fn tensors(&self, folder: &str, step: u32) -> Vec<(String, Vec<u8>)> {
        let file = B158::open(&self.path(&format!("{folder}/step-{step:08}.b158"))).expect("a checkpoint");
        let names: Vec<String> = file.iter().map(|t| t.0.to_owned()).collect();
        names.into_iter().map(|n| (n.clone(), file.require(&n).expect("a tensor").bytes.to_vec())).collect()
    }
}

#[test]
fn runs_of_every_estimator_resume_to_the_same_bits() {
    let place = Place::new();
    assert_eq!(place.train("--steps 1 --out scores", "1").0, Some(0));
    let mezo = [
        "--mode scales --directions 2",
        "--mode integer --one-sided --scaled --directions 2",
        "--mask boundary --distribution gaussian --eps-rel 0.2 --optimiser adam",
        "--mode additive --mask small-mag --sparsity 0.2 --mask-refresh 2 --optimiser momentum",
        "--mode additive --mask fisher --fisher scores/step-00000001.b158 --mask-refresh 4 --optimiser normalised",
        "--mode additive --family lozo --rank 2 --period 2 --directions 2 --eps-rel 0.1",
        "--family subzero --rank 2 --period 2",
        "--mode additive --family tezo --rank 2 --scaled",
        "--mode scales --optimiser replay --history 3 --momentum 0.5",
        "--hybrid-head --mode scales --one-sided --directions 2 --mask random --sparsity 0.5 --mask-refresh 2",
    ];
    let all = mezo.map(|words| format!("--estimator mezo {words}")).into_iter();
    let others = [
        "--rank 2 --group-size 2 --optimiser adam --second 0.99",
        "--hybrid-head",
        "--hybrid-head --only *norm*",
        "--optimiser replay --history 2",
    ];
    for (i, words) in all.chain(others.map(str::to_owned)).enumerate() {
        let (whole, parts) = (format!("whole{i}"), format!("parts{i}"));
        let (code, text) = place.train(&format!("{words} --lr 1e-3 --steps 5 --out {whole}"), "1");
        assert_eq!(code, Some(0), "{words}: {text}");
        assert_eq!(place.train(&format!("{words} --lr 1e-3 --steps 3 --out {parts}"), "2").0, Some(0), "{words}");
        // From the beginning and the journal alone.
        fs::remove_file(place.path(&format!("{parts}/step-00000003.b158"))).expect("removed");
        let (code, text) = place.run(&format!("train --resume {parts} --steps 5"), "2");
        assert_eq!(code, Some(0), "{words}: {text}");
        assert!(place.tensors(&whole, 5) == place.tensors(&parts, 5), "{words}: the bits of an uninterrupted run");
        assert!(place.tensors(&whole, 0) != place.tensors(&whole, 5), "{words}: the run moves weights");
    }
}

#[test]
fn options_without_a_meaning_are_refused() {
    let place = Place::new();
    for (words, part) in [
        (
            "--mask boundary",
            "--mask has no meaning for the estimator perseq-lowrank; leave it out, or choose --estimator mezo",
        ),
        ("--group-size 3", "2 sequences of a batch cannot be divided into groups of 3"),
        ("--estimator mezo --kappa 0.1", "--kappa has no meaning for the estimator mezo"),
        ("--estimator adamw --optimiser adam", "choose --estimator perseq-lowrank or mezo"),
        ("--estimator sgd --one-sided", "--one-sided has no meaning for the estimator sgd"),
        ("--estimator mezo --clip 1", "choose --estimator adamw or sgd or chimera21"),
        ("--estimator mezo --momentum 0.5", "expected --optimiser momentum, replay, normalised or adam"),
        ("--history 3", "expected --optimiser replay"),
        ("--second 0.9", "expected --optimiser adam"),
        ("--optimiser momentum --vec-scale 0.1", "expected --optimiser normalised"),
        ("--estimator mezo --rank 2", "expected --family lozo, subzero or tezo"),
        ("--estimator mezo --family tezo --period 3", "expected --family lozo or subzero"),
        ("--estimator mezo --sparsity 0.1", "expected a --mask of a share"),
        ("--estimator mezo --mask fisher", "expected --fisher FILE"),
        ("--estimator mezo --mode additive --mask boundary", "expected --mode requantise"),
        ("--estimator adamw --hybrid-head", "choose --estimator perseq-lowrank or mezo"),
        ("--hybrid-head --only layers.*", "--only leaves out norm.weight and embed.weight"),
        ("--hybrid-head --only embed.weight,norm.weight", "no weight to probe"),
        ("--estimator mezo --unit 2^-9", "expected --mode integer"),
        ("--estimator mezo --mode integer --unit 0.3", "expected a power of two"),
    ] {
        let (code, text) = place.train(&format!("{words} --steps 1 --out refused"), "1");
        assert!(code == Some(2) && text.contains(part), "{words}: {code:?} {text}");
    }
    assert!(!place.path("refused").exists(), "nothing is left behind");
}
