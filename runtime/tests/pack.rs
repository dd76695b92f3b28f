//! The command `pack`, and models that run from packed weights: the same bits as from the latents, and clear words where packing ends.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use chimera_compiler::{EntryKind, EntrySpec, Options, compile};
use chimera_frontends::config::{self, Overrides, ParamKind, Scale};
use chimera_ir::plan;
use chimera_runtime::files::b158::{self, B158, Encoding, Entry, ScaleEncoding};
use chimera_runtime::files::safetensors::{self, SafeTensors};
use chimera_runtime::files::{HostTensor, TensorView, npy};
use chimera_runtime::rng;

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
    command.args(args).stdin(Stdio::null()).env("CHIMERA_CODE_CACHE", "off").output().expect("the program starts")
}

fn ok(args: &[&str]) -> (String, String) {
    let out = run(args);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is text");
    let (stdout, stderr) = (text(out.stdout), text(out.stderr));
    assert!(out.status.success(), "{args:?}: {stderr}");
    (stdout, stderr)
}

fn fails(args: &[&str], code: i32, part: &str) {
    let out = run(args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    assert!(text.contains(part), "{args:?}: {text}");
}

/// A model with random weights in a folder of its own, as a safetensors file.
struct Sample {
    folder: tempfile::TempDir,
    options: Vec<String>,
}

impl Sample {
    /// The weights of a named scale over bytes, with an extra tensor that no model has.
    fn new(scale: Scale) -> Sample {
        let overrides = Overrides { vocab_size: Some(257), ..Overrides::default() };
        let loaded = config::preset(scale, &overrides).expect("the preset loads");
        let mut tensors = vec![("extra".to_owned(), HostTensor::from_f32(&[1], &[0.5]).expect("one number"))];
        for p in config::parameters(&loaded.model) {
            let mut values = vec![0.0; p.dims.iter().product()];
            rng::fill_gaussian(&mut values, &p.name, 0, 0, 5);
            let (size, offset) = if p.kind == ParamKind::Vector { (0.1, 1.0) } else { (0.1, 0.0) };
            values.iter_mut().for_each(|x| *x = *x * size + offset);
            tensors.push((p.name, HostTensor::from_f32(&p.dims, &values).expect("the shape fits")));
        }
        let folder = tempfile::tempdir().expect("a folder for the test");
        let views: Vec<(&str, TensorView<'_>)> = tensors.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        safetensors::write(&folder.path().join("w.safetensors"), &views, &BTreeMap::new()).expect("written");
        let ids: Vec<i32> = (0..14).map(|i| (i * 37 + 5) % 257).collect();
        let ids = HostTensor::from_i32(&[2, 7], &ids).expect("the shape fits");
        npy::write(&folder.path().join("tokens.npy"), ids.view()).expect("written");
        let options = ["--scale", scale.name(), "--set", "vocab_size=257"].map(str::to_owned).to_vec();
        Sample { folder, options }
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn options(&self) -> Vec<&str> {
        self.options.iter().map(String::as_str).collect()
    }

    /// Packs the weights into `p.b158`; what stderr says.
    fn pack(&self) -> String {
        let (weights, packed) = (self.at("w.safetensors"), self.at("p.b158"));
        let more = ["--weights", &weights, "-o", &packed, "--vocab", "bytes"];
        let (stdout, stderr) = ok(&[&["pack"], &self.options()[..], &more].concat());
        assert_eq!(stdout, format!("{packed}\n"));
        stderr
    }

    /// The outputs of an entry point, in bytes.
    fn call(&self, entry: &str, model: &[&str]) -> Vec<u8> {
        let (tokens, out) = (self.at("tokens.npy"), self.at("out.safetensors"));
        let labels = format!("labels={tokens}");
        let mut args = vec!["call", "--entry", entry, "--inputs", &tokens, "--outputs", &out];
        if entry == "loss" {
            args.extend(["--input", &labels]);
        }
        ok(&[&args[..], model].concat());
        SafeTensors::open(Path::new(&out)).expect("the outputs are a file");
        fs::read(&out).expect("the outputs are there")
    }
}

#[test]
fn packed_weights_give_the_bits_of_their_latents() {
    for scale in [Scale::Pico, Scale::Test] {
        let sample = Sample::new(scale);
        let said = sample.pack();
        assert!(said.contains("1 tensors are no weights of this model and have no effect: `extra`"), "{said}");
        let (weights, packed) = (sample.at("w.safetensors"), sample.at("p.b158"));
        let latents = [&sample.options()[..], &["--weights", &weights]].concat();
        for entry in ["logits", "loss", "prefill", "decode"] {
            assert_eq!(sample.call(entry, &latents), sample.call(entry, &[&packed]), "{} {entry}", scale.name());
        }
        let both = [&sample.options()[..], &["--weights", &packed, "--verify"]].concat();
        assert_eq!(sample.call("logits", &latents), sample.call("logits", &both), "the configuration apart");
        let generate = |model: &[&str]| {
            let args =
                ["generate", "--prompt", "It was a dark and stormy night", "-n", "20", "--temp", "1.5", "--chunk", "8"];
            ok(&[&args[..], model].concat()).0
        };
        assert_eq!(generate(&[&latents[..], &["--vocab", "bytes"]].concat()), generate(&[&packed]), "{}", scale.name());
        let file = B158::open(Path::new(&packed)).expect("the packed file opens");
        file.verify_all().expect("the packed file is sound");
        let ternary: Vec<_> = file.iter().filter(|t| matches!(t.1, Encoding::Ternary { .. })).collect();
        let stacks = ternary.iter().filter(|t| t.0.contains(".experts.*.") && t.2[0] == 4).count();
        assert_eq!(stacks > 0, scale == Scale::Test, "experts are stored together");
        assert!(file.iter().all(|t| !t.0.contains(".experts.0.")));
    }
}

/// The tensors of a packed file, changed and written again.
fn rewrite(
    from: &str,
    to: &str,
    change: impl Fn(&str, Encoding, &[usize], &[u8]) -> Vec<(String, Encoding, Vec<usize>, Vec<u8>)>,
) {
    let file = B158::open(Path::new(from)).expect("opens");
    let mut all = vec![];
    for (name, encoding, shape) in file.iter() {
        all.extend(change(name, encoding, shape, file.require(name).expect("sound").bytes));
    }
    let entries: Vec<Entry<'_>> = all.iter().map(|(n, e, s, b)| Entry::stored(n, *e, s, &b[..])).collect();
    b158::write(Path::new(to), &entries, file.metadata()).expect("written");
}

#[test]
fn experts_may_also_be_packed_one_by_one() {
    let sample = Sample::new(Scale::Test);
    sample.pack();
    let (packed, single) = (sample.at("p.b158"), sample.at("single.b158"));
    rewrite(&packed, &single, |name, encoding, shape, bytes| {
        let [count, n, k] = *shape else { return vec![(name.into(), encoding, shape.into(), bytes.into())] };
        if !matches!(encoding, Encoding::Ternary { .. }) {
            return vec![(name.into(), encoding, shape.into(), bytes.into())];
        }
        let (codes, scales) = bytes.split_at(count * b158::packed_len(n, k).expect("small"));
        let parts = codes.chunks(codes.len() / count).zip(scales.chunks(scales.len() / count));
        let part = |(i, (c, s)): (usize, (&[u8], &[u8]))| {
            (name.replace('*', &i.to_string()), encoding, vec![n, k], [c, s].concat())
        };
        parts.enumerate().map(part).collect()
    });
    assert_eq!(sample.call("logits", &[&packed]), sample.call("logits", &[&single]));
}

#[test]
fn what_packed_weights_cannot_do_is_said() {
    let sample = Sample::new(Scale::Pico);
    sample.pack();
    let (packed, other) = (sample.at("p.b158"), sample.at("o.b158"));
    let (tokens, text) = (sample.at("tokens.npy"), sample.at("text.txt"));
    fs::write(&text, "some words to train on ".repeat(400)).expect("written");
    let out = sample.at("run");
    fails(&["train", &packed, "--data", &text, "--out", &out], 2, "packed ternary weights cannot be trained");
    let dual =
        ["call", &packed, "-e", "dual_loss", "-i", &tokens, "-o", &other, "--input", &format!("labels={tokens}")];
    fails(&dual, 2, "dual_loss changes latents, which packed ternary weights have lost");
    fails(&["pack", &packed, "-o", &other], 2, "is packed already");
    let call = |file: &str, more: &[&str], code: i32, part: &str| {
        let args = ["call", "-e", "logits", "-i", &tokens, "-o", &other, "--weights", file];
        fails(&[&args[..], &sample.options(), more].concat(), code, part);
    };
    call(&packed, &["--set", "quantization.group_size=64"], 1, "with a scale for each 128 columns");
    call(&packed, &["--set", "hidden_size=128"], 1, "expected [");
    let broken = sample.at("broken.b158");
    rewrite(&packed, &broken, |name, encoding, shape, bytes| match name {
        // A float matrix of the model as codes.
        "layers.0.attn.a_proj.weight" => {
            let ternary = Encoding::Ternary { group: 128, scales: ScaleEncoding::F32 };
            vec![(name.into(), ternary, shape.into(), vec![0x55; ternary.byte_len(shape).expect("a matrix")])]
        }
        _ => vec![(name.into(), encoding, shape.into(), bytes.into())],
    });
    call(&broken, &[], 1, "`layers.0.attn.a_proj.weight` is packed ternary and the model reads it as floats");
    rewrite(&packed, &broken, |name, encoding, shape, bytes| {
        let name = if name == "layers.1.attn.q_proj.weight" { "layers.1.attn.q_porj.weight" } else { name };
        vec![(name.into(), encoding, shape.into(), bytes.into())]
    });
    call(&broken, &[], 1, "missing: `layers.1.attn.q_proj.weight`; the file has `layers.1.attn.q_porj.weight`");
    // A damaged code is found when asked for; a damaged float always.
    let damage = |tensor: &str| {
        let mut bytes = fs::read(&packed).expect("the packed file is there");
        let part = B158::open(Path::new(&packed)).expect("opens").require(tensor).expect("sound").bytes.to_vec();
        let at = bytes.windows(part.len()).position(|w| w == part).expect("the tensor is in the file");
        bytes[at] ^= 4;
        fs::write(&broken, bytes).expect("written");
    };
    damage("layers.0.mlp.up_proj.weight");
    call(&broken, &["--verify"], 5, "`layers.0.mlp.up_proj.weight` is corrupted: its checksum");
    sample.call("logits", &[&broken]);
    damage("norm.weight");
    call(&broken, &[], 5, "`norm.weight` is corrupted: its checksum");
}

#[test]
fn compiled_plans_are_for_latents_or_for_packed_weights() {
    let sample = Sample::new(Scale::Pico);
    sample.pack();
    let (packed, weights) = (sample.at("p.b158"), sample.at("w.safetensors"));
    let overrides = Overrides { vocab_size: Some(257), ..Overrides::default() };
    let model = config::preset(Scale::Pico, &overrides).expect("the preset loads").model;
    let file = B158::open(Path::new(&packed)).expect("opens");
    let ternary = file.iter().filter(|t| matches!(t.1, Encoding::Ternary { .. }));
    let names: HashSet<String> = ternary.map(|t| t.0.to_owned()).collect();
    let generate = |plan: &str, weights: &str| {
        run(&["generate", plan, "--weights", weights, "--prompt", "once", "-n", "6", "--temp", "0", "--quiet"])
    };
    let mut said = vec![];
    for (name, packed_names) in [("latent.plan", HashSet::new()), ("packed.plan", names)] {
        let entries = vec![EntrySpec { kind: EntryKind::Decode, rows: 1, tokens: 1, depth: None }];
        let options = Options { entries, packed: packed_names, ..Options::default() };
        let plan = compile(&model, &options).expect("the model compiles");
        fs::write(sample.at(name), plan::to_bytes(&plan)).expect("written");
        let (good, bad, why) = match name {
            "latent.plan" => (&weights, &packed, "is packed ternary, expected floats"),
            _ => (&packed, &weights, "is a float latent, the plan was compiled for packed weights"),
        };
        let (good, bad) = (generate(&sample.at(name), good), generate(&sample.at(name), bad));
        assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
        said.push(good.stdout);
        let error = String::from_utf8_lossy(&bad.stderr);
        assert!(bad.status.code() == Some(1) && error.contains(why), "{error}");
    }
    assert_eq!(said[0], said[1]);
}

#[test]
fn tensors_that_nothing_reads_are_listed() {
    let sample = Sample::new(Scale::Pico);
    let (weights, tokens, out) = (sample.at("w.safetensors"), sample.at("tokens.npy"), sample.at("out.safetensors"));
    let more = ["-e", "logits", "-i", &tokens, "-o", &out, "--weights", &weights, "--json"];
    let (stdout, stderr) = ok(&[&["call"], &sample.options()[..], &more].concat());
    let json: serde_json::Value = serde_json::from_str(&stdout).expect("one object");
    assert_eq!(json["unused_weights"], serde_json::json!(["extra"]));
    assert!(stderr.contains("no weights of this model and have no effect: `extra`"), "{stderr}");
    let more = ["--vocab", "bytes", "--weights", &weights, "--prompt", "a", "-n", "2", "--json"];
    let (stdout, stderr) = ok(&[&["generate"], &sample.options()[..], &more].concat());
    let json: serde_json::Value = serde_json::from_str(&stdout).expect("one object");
    assert_eq!(json["unused_weights"], serde_json::json!(["extra"]));
    assert!(stderr.contains("`extra`"), "{stderr}");
    // What is mapped is not allocated: codes and scales of the packed file.
    sample.pack();
    let (packed, _) = ok(&["generate", &sample.at("p.b158"), "--prompt", "a", "-n", "2", "--json"]);
    let packed: serde_json::Value = serde_json::from_str(&packed).expect("one object");
    let bytes = |of: &serde_json::Value, key: &str| of[key].as_u64().expect("a number of bytes");
    assert_eq!(packed["text"], json["text"]);
    assert!(bytes(&packed, "mapped_bytes") > 0);
    assert!(bytes(&packed, "allocated_bytes") < bytes(&json, "allocated_bytes"));
}
