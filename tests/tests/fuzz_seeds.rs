//! The valid files that the corpora of the fuzz targets begin with.
//!
//! `CHIMERA_REWRITE_SEEDS=1` writes them again, after a change of a format; else they must be there and their readers accept them. Those
//! of `zstd` were written by zstd 1.5.4 and stay as they are.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use chimera_compiler::{EntryKind, Options, compile_graphs};
use chimera_frontends::config::{self, Overrides, Scale, preset};
use chimera_ir::graph::Repeat;
use chimera_ir::ops::{Binary, BinaryFn, InferError, Linear, Norm, NormKind, PackPanels, Unary, UnaryFn};
use chimera_ir::plan::{self, Plan, WeightKind};
use chimera_ir::{Graph, Tensor, Type};
use chimera_runtime::files::b158::{self, B158, Entry, ScaleEncoding, ScaleMode, ternarise};
use chimera_runtime::files::safetensors::SafeTensors;
use chimera_runtime::files::{HostTensor, npy, safetensors};
use chimera_runtime::text::data::encode_documents;
use chimera_runtime::text::{Tokens, Vocab, chat, jsonl, zstd};
use chimera_runtime::train::journal::{self, Header, Item, Record, Rollback, StepRecord};

type Failure = Box<dyn Error>;

/// A graph with an input, weights, a state, a loop and a literal.
fn graph() -> Result<Graph, InferError> {
    let ty = Type::f32(&[2, 8]);
    let mut body = Graph::default();
    body.at("loop");
    let (counter, h, gain) =
        (body.input("i", Type::i32(&[1])), body.input("h", ty.clone()), body.input("gain", Type::f32(&[8])));
    let next = body.op(Norm { kind: NormKind::Rms, width: 8, eps: 1e-6 }, &[h, gain])?;
    let again = body.constant(Tensor::i32(&[1], vec![1]));
    body.outputs = vec![("h".to_owned(), next), ("again".to_owned(), again)];
    let mut g = Graph::default();
    g.at("layers.0");
    let x = g.input("x", ty.clone());
    let weight = g.param("layers.0.weight", Type::f32(&[8, 8]));
    let gain = g.param("layers.0.norm.weight", Type::f32(&[8]));
    let panels = g.op(PackPanels {}, &[weight])?;
    let y = g.op(Linear { m: 8, grouped_rows: false }, &[x, panels])?;
    let repeat = Repeat { body, args: vec![counter, h, gain], n_carried: 1, max: 2 };
    let y = g.repeat(repeat, &[y, gain])?[0];
    let before = g.state("layers.0.S", ty);
    let half = g.op(Unary { f: UnaryFn::Affine { mul: 0.5, add: 0.25 } }, &[before])?;
    let after = g.op(Binary { f: BinaryFn::Add }, &[y, half])?;
    g.outputs = vec![("y".to_owned(), after)];
    g.writes = vec![("layers.0.S".to_owned(), after)];
    Ok(g)
}

fn small_plan() -> Result<Plan, Failure> {
    let kinds = [("layers.0.weight", WeightKind::Matrix), ("layers.0.norm.weight", WeightKind::Vector)];
    let kinds = kinds.into_iter().map(|(n, k)| (n.to_owned(), k)).collect();
    let start = Plan { config: "{}".to_owned(), target: "x86-64-v3".to_owned(), ..Plan::default() };
    Ok(compile_graphs(start, vec![(EntryKind::Logits, 2, graph()?)], &kinds, &Options::default())?)
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn write_all(root: &Path) -> Result<(), Failure> {
    let folder = |name: &str| -> Result<PathBuf, std::io::Error> {
        let path = root.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    };
    let put = |folder: &Path, name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes);

    let at = folder("config")?;
    for scale in [Scale::Pico, Scale::Nano, Scale::Test] {
        let text = preset(scale, &Overrides::default())?.model.to_json().to_string();
        put(&at, &format!("seed-{scale}.json"), text.as_bytes())?;
    }
    put(&at, "seed-empty.json", b"{}")?;
    put(
        &at,
        "wrong.json",
        b"{\n  \"hiden_size\": 64,\n  \"num_heads\": \"four\",\n  \"vocab_size\": -1, \"head_dim\": 1e400\n}\n",
    )?;

    let at = folder("plan")?;
    let plan = small_plan()?;
    put(&at, "seed-small.plan", &plan::to_bytes(&plan))?;
    put(&at, "seed-small.txt", plan::to_text(&plan).as_bytes())?;
    put(&at, "seed-empty.plan", &plan::to_bytes(&Plan::default()))?;
    put(&at, "seed-empty.txt", plan::to_text(&Plan::default()).as_bytes())?;

    let at = folder("b158")?;
    let metadata = BTreeMap::from([("config".to_owned(), "{}".to_owned()), ("step".to_owned(), "7".to_owned())]);
    let latents = numbers(40 * 130);
    let matrix = ternarise(&latents, 40, 130, 128, 0.5, ScaleMode::PerGroup);
    let ternary = |scales| Entry::ternary("layers.0.attn.q_proj.weight", 40, 130, &matrix, scales);
    let (small, table) = (numbers(12), numbers(33));
    let plain = [
        Entry::f32("norm.weight", &[12], &small),
        Entry::bf16("embed.weight", &[11, 3], &table),
        Entry::i32("load", &[2], &[1, -1]),
    ];
    b158::write(&at.join("seed-plain.b158"), &plain, &metadata)?;
    b158::write(&at.join("seed-ternary-f32.b158"), &[ternary(ScaleEncoding::F32)], &BTreeMap::new())?;
    b158::write(&at.join("seed-ternary-bf16.b158"), &[ternary(ScaleEncoding::Bf16)], &metadata)?;
    let parts = [0, 1, 2].map(|i| ternarise(&latents[i * 990..][..33 * 30], 33, 30, 128, 0.5, ScaleMode::PerGroup));
    let stack = Entry::ternary_stack("mlp.experts.*.up_proj.weight", 33, 30, &parts, ScaleEncoding::F32);
    b158::write(&at.join("seed-ternary-stack.b158"), &[stack], &metadata)?;
    b158::write(&at.join("seed-empty.b158"), &[], &BTreeMap::new())?;

    let (npys, safes) = (folder("npy")?, folder("safetensors")?);
    let floats = HostTensor::from_f32(&[3, 5], &numbers(15))?;
    let words = HostTensor::from_i32(&[2, 2], &[0, -100, 7, i32::MAX])?;
    let longs = HostTensor::from_i64(&[4], &[0, -1, i64::MAX, i64::MIN])?;
    let scalar = HostTensor::from_f32(&[], &[1.5])?;
    for (name, tensor) in [("floats", &floats), ("words", &words), ("longs", &longs), ("scalar", &scalar)] {
        npy::write(&npys.join(format!("seed-{name}.npy")), tensor.view())?;
    }
    let tensors =
        [("floats", floats.view()), ("longs", longs.view()), ("scalar", scalar.view()), ("words", words.view())];
    safetensors::write(&safes.join("seed-four.safetensors"), &tensors, &metadata)?;
    safetensors::write(&safes.join("seed-empty.safetensors"), &[], &BTreeMap::new())?;

    let at = folder("journal")?;
    let step = |step: u64, rollbacks| {
        let (c, loads) = (numbers(step as usize % 4), vec![step as i32, -1, 300]);
        let (position, lr, loss, seconds) = (16 * step, 0.01, 3.5, 0.25 * step as f64);
        Record::Step(StepRecord { step, rollbacks, position, lr, loss, seconds, c, loads, ..StepRecord::default() })
    };
    let back = Record::Rollback(Rollback { at: 3, to: 1, position: 64, rollbacks: 1, loss: f64::NAN });
    let write = |name: &str, header: &Header, records: &[Record]| {
        let mut bytes = header.to_bytes();
        records.iter().for_each(|r| r.write(&mut bytes));
        put(&at, name, &bytes)
    };
    write("seed-empty.journal", &Header::new(0, "{}", "data"), &[])?;
    write("seed-steps.journal", &Header::new(7, "{}", "9 tokens"), &[step(8, 0), step(9, 0), step(10, 0)])?;
    let taken_back = [step(1, 0), step(2, 0), step(3, 0), back, step(2, 1), step(3, 1)];
    write("seed-rollback.journal", &Header::new(0, "{}", "9 tokens"), &taken_back)?;

    let at = folder("vocab")?;
    put(&at, "seed-bytes.vocab", Vocab::bytes().to_text().as_bytes())?;
    put(&at, "seed-o200k.vocab", Vocab::o200k().to_text().as_bytes())?;
    put(&at, "seed-restricted.vocab", Vocab::restricted([300, 301, 302, 5000]).to_text().as_bytes())?;
    let own = "chimera-vocab 1\nkind bpe\ntokens 260\ncrc32c ";
    let merges = "116 104\n256 101\n32 257\n";
    put(&at, "seed-bpe.vocab", format!("{own}{:08x}\n{merges}", crc32c::crc32c(merges.as_bytes())).as_bytes())?;

    let at = folder("tokens")?;
    for (name, vocab) in [("bytes", Vocab::bytes()), ("o200k", Vocab::o200k())] {
        put(&at, &format!("seed-{name}.tokens"), &encode_documents(&vocab, &["the cat", "", "a dog"])?)?;
    }
    put(&at, "seed-empty.tokens", &encode_documents(&Vocab::bytes(), &[])?)?;

    let at = folder("jsonl")?;
    put(&at, "seed-text.jsonl", b"{\"text\": \"a \\u00e4\\n\", \"more\": [1, null]}\n{\"text\": \"\"}\n")?;
    put(&at, "seed-field.jsonl", b"{\"text\": \"x\", \"a\": {\"b\": \"c\"}}\n")?;
    let parts = r#"[{"type": "text", "text": "he"}, {"text": "llo"}]"#;
    let chat = format!(r#"{{"messages": [{{"role": "user", "content": null}}, {{"role": "a", "content": {parts}}}]}}"#);
    put(&at, "seed-chat.jsonl", chat.as_bytes())?;

    let at = folder("preferences")?;
    let pair = r#"{"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#;
    put(&at, "seed-pair.jsonl", pair.as_bytes())?;
    let turns = r#"{"prompt": [{"role": "assistant", "content": "x"}], "chosen": "", "rejected": "y", "messages": [{"role": "assistant", "content": "z"}]}"#;
    put(&at, "seed-turns.jsonl", turns.as_bytes())?;
    put(&at, "seed-lines.jsonl", format!("{turns}\n{pair}\n").as_bytes())?;

    Ok(())
}

/// Reads a seed in the way of its target.
fn accepted(target: &str, file: &Path) -> Result<(), Failure> {
    match target {
        "config" => drop(config::load(file, &Overrides::default())?),
        "plan" => match file.extension().is_some_and(|e| e == "txt") {
            true => drop(plan::from_text(&fs::read_to_string(file)?)?),
            false => drop(plan::from_bytes(&fs::read(file)?)?),
        },
        "b158" => B158::open(file)?.verify_all()?,
        "safetensors" => drop(SafeTensors::open(file)?),
        "npy" => drop(npy::read(file)?),
        "journal" => journal_of_records(&fs::read(file)?)?,
        "vocab" => drop(Vocab::load(file)?),
        "tokens" => drop(Tokens::open(file)?),
        "jsonl" => {
            for line in fs::read_to_string(file)?.lines() {
                jsonl::record_text(line.as_bytes(), None)?;
            }
        }
        "preferences" => {
            for line in fs::read_to_string(file)?.lines() {
                chat::preference(line.as_bytes())?;
            }
        }
        "zstd" => drop(std::io::copy(&mut zstd::Zstd::new(&fs::read(file)?[..]), &mut std::io::sink())?),
        other => return Err(format!("no target is called {other}").into()),
    }
    Ok(())
}

/// A journal without damage.
fn journal_of_records(bytes: &[u8]) -> Result<(), Failure> {
    let (_, mut items) = journal::read(bytes)?;
    match items.all(|(_, item)| matches!(item, Item::Record(_))) {
        true => Ok(()),
        false => Err("it has bytes that are no record".into()),
    }
}

#[test]
fn seeds_are_accepted() -> Result<(), Failure> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    if std::env::var_os("CHIMERA_REWRITE_SEEDS").is_some() {
        write_all(&root)?;
    }
    let mut seeds = BTreeMap::new();
    for folder in fs::read_dir(&root)? {
        let folder = folder?;
        let target = folder.file_name().to_string_lossy().into_owned();
        for file in fs::read_dir(folder.path())? {
            let file = file?.path();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("seed-") {
                accepted(&target, &file).map_err(|e| format!("{}: {e}; see the head of this file", file.display()))?;
                *seeds.entry(target.clone()).or_insert(0) += 1;
            }
        }
    }
    assert_eq!(seeds.len(), 11, "every target has seeds: {seeds:?}");
    assert!(seeds.values().all(|&n| n >= 2), "{seeds:?}");
    Ok(())
}
