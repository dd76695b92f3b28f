//! The commands `call` and `generate` as a user meets them: files in, files and text out, exit codes.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use chimera_frontends::config::{self, Overrides, ParamKind, Scale};
use chimera_runtime::files::safetensors::{self, SafeTensors};
use chimera_runtime::files::{HostTensor, TensorView, npy};
use chimera_runtime::rng;

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(name);
    path.display().to_string()
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
    command.args(args).stdin(Stdio::null()).env("CHIMERA_CODE_CACHE", "off");
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().expect("the program starts")
}

fn ok(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("stdout is text")
}

fn fails(args: &[&str], code: i32, part: &str) {
    let out = run(args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    assert!(text.contains(part), "{args:?}: {text}");
    assert!(out.stdout.is_empty());
}

/// A folder of its own with what the tests put into it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a folder for the test"))
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

fn golden(name: &str) -> SafeTensors {
    SafeTensors::open(&PathBuf::from(fixture("model_none.safetensors"))).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn calls_answer_as_the_specification_does() {
    let (dir, want) = (Folder::new(), golden("model_none"));
    let (model, weights) = (fixture("model_none.safetensors"), fixture("model_params.safetensors"));
    let (out, depth) = (dir.at("out.safetensors"), dir.at("depth.npy"));
    let float = |name: &str| want.require(name).expect("a golden tensor").to_f32();
    let near = |got: &[f32], name: &str, tolerance: f32| {
        let want = float(name);
        assert_eq!(got.len(), want.len(), "{name}");
        let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= tolerance, "{name} is off by {off}");
    };
    let base = ["call", &model, "--weights", &weights, "--inputs", &model, "--outputs", &out];
    let call = |more: &[&str]| {
        let text = ok(&[&base[..], more].concat());
        let file = SafeTensors::open(Path::new(&out)).expect("the outputs are there");
        (text, file)
    };
    let (text, file) = call(&["--entry", "loss", "--json"]);
    near(&file.require("loss").unwrap().to_f32(), "out.loss", 1e-5);
    near(&file.require("losses").unwrap().to_f32(), "out.loss_per_row", 1e-5);
    assert_eq!(file.require("loss").unwrap().shape(), &[] as &[usize]);
    assert!(text.contains(r#""losses":{"dtype":"F32","shape":[3],"values":["#), "{text}");
    let (text, file) = call(&["--entry", "logits", "--threads", "2"]);
    near(&file.require("logits").unwrap().to_f32(), "out.logits", 1e-4);
    near(&file.require("state.5.1.n").unwrap().to_f32(), "state.5.1.n", 1e-4);
    assert_eq!(text, "");
    let (_, file) = call(&["--entry", "loss", "--loops", "3"]);
    near(&file.require("loss").unwrap().to_f32(), "out.loss_loops_3", 1e-5);
    let rows = HostTensor::from_i64(&[3], &[1, 3, 2]).expect("three rows");
    npy::write(Path::new(&depth), rows.view()).expect("the file is written");
    let (_, file) = call(&["--entry", "loss", "--input", &format!("depth={depth}")]);
    near(&file.require("loss").unwrap().to_f32(), "out.loss_mixed_depth_1_3_2", 1e-5);
    let (_, file) = call(&["--entry", "grad"]);
    near(&file.require("loss").unwrap().to_f32(), "out.loss", 1e-5);
    let gain = file.require("grad.norm.weight").unwrap();
    assert_eq!(gain.shape(), [128]);
    near(&gain.to_f32(), "grad.sample.norm.weight", 1e-5);
    let (_, file) = call(&["--entry", "logits", "--adaptive", "--loops", "6"]);
    assert_eq!(file.require("loops").unwrap().to_i64(), want.require("exact.adaptive_loops").unwrap().to_i64());
}

#[test]
fn calls_take_and_give_npy() {
    let dir = Folder::new();
    let (model, weights) = (fixture("model_none.safetensors"), fixture("model_params.safetensors"));
    let all = golden("model_none").require("in.tokens").expect("a golden tensor").to_i64().expect("integers");
    let first: Vec<i64> = all.chunks(29).flat_map(|row| &row[..8]).copied().collect();
    let tokens = HostTensor::from_i64(&[3, 8], &first).expect("the shape fits");
    let (path, logits) = (dir.at("tokens.npy"), dir.at("logits.npy"));
    npy::write(Path::new(&path), tokens.view()).expect("the file is written");
    for (entry, name) in [("decode", "a"), ("logits", "b")] {
        let logits = format!("logits={}", dir.at(&format!("{name}.npy")));
        ok(&["call", &model, "--weights", &weights, "--entry", entry, "--inputs", &path, "--output", &logits]);
    }
    let [a, b] = ["a", "b"].map(|n| npy::read(Path::new(&dir.at(&format!("{n}.npy")))).expect("the output is there"));
    assert_eq!(a.shape(), [3, 8, 512]);
    let off = a.to_f32().iter().zip(b.to_f32()).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(off <= 1e-4, "the forms differ by {off}");
    let unknown = [
        "call",
        &model,
        "--weights",
        &weights,
        "--entry",
        "logits",
        "--inputs",
        &path,
        "--output",
        &format!("logit={logits}"),
    ];
    fails(&unknown, 2, "no output is called `logit`, expected one of hidden,");
}

#[test]
fn mistakes_have_exit_codes() {
    let dir = Folder::new();
    let (model, weights, out) =
        (fixture("model_none.safetensors"), fixture("model_params.safetensors"), dir.at("out.safetensors"));
    let call = |changes: &[(&str, &str)], more: &[&str], code: i32, part: &str| {
        let value = |flag: &str, default: &str| {
            changes.iter().find(|c| c.0 == flag).map_or(default.to_owned(), |c| c.1.to_owned())
        };
        let (m, w, i) = (value("model", &model), value("weights", &weights), value("inputs", &model));
        let entry = value("entry", "loss");
        let args = ["call", &m, "--weights", &w, "--inputs", &i, "--outputs", &out, "--entry", &entry];
        fails(&[&args[..], more].concat(), code, part);
    };
    call(&[("weights", &model)], &[], 1, "weights are missing: `embed.weight`");
    call(&[("weights", "absent.safetensors")], &[], 1, "cannot open the file");
    call(&[("inputs", &fixture("rng.safetensors"))], &[], 1, "tensor `tokens`: is not among the inputs");
    call(&[("entry", "loss")], &["--set", "hiden_size=3"], 3, "hidden_size");
    call(&[("entry", "lose")], &[], 2, "loss");
    call(&[], &["--emitters", "fast"], 2, "fast");
    let whole = fs::read(&weights).expect("the weights are there");
    let cut = dir.at("cut.safetensors");
    fs::write(&cut, &whole[..whole.len() - 7]).expect("the file is written");
    call(&[("weights", &cut)], &[], 5, "corrupted");
    assert!(!Path::new(&out).exists(), "a failed call leaves no output");
}

/// Random weights of a pico model over bytes.
fn pico_weights(path: &str) {
    let loaded = config::preset(Scale::Pico, &Overrides { vocab_size: Some(257), ..Overrides::default() })
        .expect("the preset loads");
    let tensors: Vec<(String, HostTensor)> = config::parameters(&loaded.model)
        .into_iter()
        .map(|p| {
            let mut values = vec![0.0; p.dims.iter().product()];
            rng::fill_gaussian(&mut values, &p.name, 0, 0, 5);
            let (scale, offset) = if p.kind == ParamKind::Vector { (0.1, 1.0) } else { (0.1, 0.0) };
            values.iter_mut().for_each(|x| *x = *x * scale + offset);
            (p.name, HostTensor::from_f32(&p.dims, &values).expect("the shape fits"))
        })
        .collect();
    let views: Vec<(&str, TensorView<'_>)> = tensors.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
    safetensors::write(Path::new(path), &views, &BTreeMap::new()).expect("the weights are written");
}

#[test]
fn text_is_continued() {
    let dir = Folder::new();
    let weights = dir.at("w.safetensors");
    pico_weights(&weights);
    let base = ["generate", "--scale", "pico", "--vocab", "bytes", "--weights", &weights, "-n", "24"];
    let continued = |more: &[&str]| ok(&[&base[..], more].concat());
    let prompt = "The prompt is longer than one chunk of sixteen bytes.";
    let greedy = continued(&["--prompt", prompt, "--temp", "0", "--chunk", "16", "--repeat-penalty", "1"]);
    assert_eq!(
        greedy,
        continued(&["--prompt", prompt, "--temp", "0", "--chunk", "16", "--repeat-penalty", "1", "--seed", "9"])
    );
    let sampled = |seed: &str| continued(&["--prompt", prompt, "--temp", "1.2", "--top-p", "1", "--seed", seed]);
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    let file = dir.at("prompt.txt");
    fs::write(&file, prompt).expect("the prompt is written");
    let from_file = continued(&["-f", &file, "--temp", "1.2", "--top-p", "1", "--seed", "1"]);
    assert_eq!(from_file, sampled("1"));
    let json: serde_json::Value = serde_json::from_str(&continued(&[
        "--prompt", prompt, "--temp", "1.2", "--top-p", "1", "--seed", "1", "--json",
    ]))
    .expect("one object");
    assert_eq!(format!("{}\n", json["text"].as_str().expect("the text")), from_file);
    assert!(json["tokens"].as_array().is_some_and(|t| t.len() <= 24) && json["prompt_tokens"] == prompt.len());

    let with = |more: &[&str], code: i32, part: &str| fails(&[&base[..], more].concat(), code, part);
    with(&["--prompt", ""], 2, "the prompt is empty");
    with(&["--prompt", "a", "--top-p", "0"], 2, "top-p is 0");
    with(&["-f", "absent.txt"], 1, "absent.txt: cannot read the prompt");
    with(&[], 2, "--prompt");
    fails(&["generate", "--scale", "pico", "--vocab", "bytes", "--prompt", "a"], 2, "no weights");
}

#[test]
fn machine_code_is_kept_and_never_trusted() {
    let dir = Folder::new();
    let (weights, code) = (dir.at("w.safetensors"), dir.at("code"));
    pico_weights(&weights);
    let base = ["generate", "--scale", "pico", "--vocab", "bytes", "--weights", &weights, "-n", "4", "--prompt", "a"];
    let run = |cache: &str, more: &[&str]| -> (String, bool) {
        let text = ok(&[&base[..], &["--json", "--seed", "1", "--code-cache", cache], more].concat());
        let json: serde_json::Value = serde_json::from_str(&text).expect("one object");
        (json["tokens"].to_string(), json["cached_code"].as_bool().expect("a truth value"))
    };
    let (tokens, cached) = run("off", &[]);
    assert!(!cached);
    assert_eq!([run(&code, &[]), run(&code, &[])], [(tokens.clone(), false), (tokens.clone(), true)]);
    // Other kernels, and other emitters.
    assert!(!run(&code, &["--chunk", "16"]).1);
    assert!(!run(&code, &["--emitters", "portable,interp"]).1);
    for entry in fs::read_dir(&code).expect("the folder is there") {
        let path = entry.expect("an entry").path();
        let mut bytes = fs::read(&path).expect("an entry");
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(&path, bytes).expect("the entry is written");
    }
    assert_eq!([run(&code, &[]), run(&code, &[])], [(tokens.clone(), false), (tokens, true)]);
    fails(&[&base[..], &["--code-cache", ""]].concat(), 2, "the name is empty");
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let dir = Folder::new();
    let weights = dir.at("w.safetensors");
    pico_weights(&weights);
    let args = ["generate", "--scale", "pico", "--vocab", "bytes", "--weights", &weights, "-n", "100000", "-f", "-"];
    let mut child = command(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    child.stdin.take().expect("stdin is piped").write_all(b"once").expect("the prompt is taken");
    assert_eq!(child.wait().expect("the program ends").code(), Some(0));
}

#[test]
fn a_trace_is_written_beside_the_results() {
    let dir = Folder::new();
    let (model, weights) = (fixture("model_none.safetensors"), fixture("model_params.safetensors"));
    let (out, trace) = (dir.at("out.safetensors"), dir.at("trace.json"));
    let base = ["call", &model, "-e", "loss", "--weights", &weights, "--inputs", &model, "--outputs", &out];
    let plain = ok(&base);
    let bytes = fs::read(&out).expect("the outputs are there");
    let traced = run(&[&base[..], &["--threads", "2", "--trace", &trace]].concat());
    let table = String::from_utf8_lossy(&traced.stderr);
    assert!(traced.status.success() && traced.stdout == plain.as_bytes(), "{table}");
    assert_eq!(fs::read(&out).expect("the outputs are there"), bytes);
    assert!(table.contains("GMAC/s") && table.contains("linear") && table.contains("2 calls traced"), "{table}");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&trace).expect("a trace")).expect("it is JSON");
    let events = json["traceEvents"].as_array().expect("a list of events");
    for name in ["prepare", "loss"] {
        assert!(events.iter().any(|e| e["cat"] == "call" && e["name"] == name), "no call of {name}");
    }
    assert!(events.iter().any(|e| e["args"]["flops"].as_u64() > Some(0) && e["args"]["group"] == "layers.0"));
    // A call is in the trace whole, or in the table alone.
    let table = run(&[&base[..], &["--trace", &trace, "--trace-steps", "3"]].concat());
    let table = String::from_utf8_lossy(&table.stderr).into_owned();
    assert!(table.contains("0 calls traced") && table.contains("--trace-steps above 3"), "{table}");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&trace).expect("a trace")).expect("it is JSON");
    assert!(json["otherData"]["calls_left_out"] == 2, "{json}");
    fails(&[&base[..], &["--trace", &dir.at("no/folder.json")]].concat(), 1, "folder.json");
}
