//! Data as a user meets them on the command line: kinds of files, caches, weights, vocabularies of one's own, and what cannot be read.

use chimera_runtime::train::standing::Standing;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A model that compiles and trains in no time.
const MODEL: &str = r#"{
  "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "vocab_size": 257,
  "backbone": { "layer_pattern": "GD XM", "moe": { "enabled": false } },
  "looping": { "enabled": false }
}"#;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().expect("a folder"));
        place.put("model.json", MODEL);
        place.put("data.txt", TEXT.repeat(60));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("created");
        fs::write(path, bytes).expect("written");
    }

    fn run(&self, words: &[&str]) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chimera-run"));
        command.current_dir(self.0.path()).env_remove("XDG_CACHE_HOME").env("HOME", self.path("home"));
        command.env("CHIMERA_CODE_CACHE", "off").args(words);
        let Output { status, stdout, stderr } = command.output().expect("the command starts");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (status.code(), text(stdout), text(stderr))
    }

    /// Trains for a few steps; the losses, and what was said.
    fn train(&self, out: &str, words: &[&str]) -> (Vec<f64>, String) {
        let fixed = ["--batch", "2", "--seq-len", "16", "--threads", "1", "--json", "--out", out];
        let (code, stdout, stderr) = self.run(&[&["train", "model.json", "--steps", "3"], words, &fixed].concat());
        assert_eq!(code, Some(0), "{words:?}: {stderr}");
        let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["loss"].as_f64();
        (stdout.lines().map(|line| loss(line).expect("a loss")).collect(), stderr)
    }
}

const TEXT: &str = "the cat sat on the mat, the dog on the log. ";

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![];
    let mut packer = flate2::read::GzEncoder::new(bytes, flate2::Compression::fast());
    std::io::Read::read_to_end(&mut packer, &mut out).expect("packed");
    out
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn packed_files_train_to_the_bits_of_plain_ones() {
    let place = Place::new();
    let text = TEXT.repeat(60);
    place.put("data.txt.gz", gzip(text.as_bytes()));
    place.put("data.zst", zstd(text.as_bytes()));
    place.put("one.jsonl", format!("{{\"text\": \"{text}\"}}\n"));
    place.put("body.zst", zstd(format!("{{\"doc\": {{\"body\": \"{text}\"}}}}\n").as_bytes()));
    place.put("folder/deep/data.txt", &text);
    let (plain, _) = place.train("plain", &["--data", "data.txt"]);
    for (out, words) in [
        ("a", &["--data", "data.txt.gz"][..]),
        ("b", &["--data", "data.zst"]),
        ("c", &["--data", "one.jsonl"]),
        ("d", &["--data", "body.zst", "--field", "doc.body"]),
        ("e", &["--data", "folder"]),
        ("f", &["--data", "data.txt", "--cache", "cache"]),
        ("g", &["--data", "data.txt", "--cache", "off"]),
    ] {
        assert_eq!(place.train(out, words).0, plain, "{words:?}");
    }
    let (code, _, stderr) = place.run(&["train", "--resume", "d", "--steps", "4", "--threads", "1"]);
    assert_eq!(code, Some(0), "the field is remembered: {stderr}");
}

#[test]
fn a_cache_is_written_once() {
    let place = Place::new();
    let words = ["--data", "data.txt", "--vocab", "o200k:restricted", "--cache", "cache"];
    let (first, said) = place.train("a", &words);
    assert!(said.contains("data.txt: ") && said.contains("are kept in cache/data-"), "{said}");
    assert!(said.contains("the softmax runs over"), "{said}");
    let (again, said) = place.train("b", &words);
    assert!(said.contains("are those in cache/data-"), "{said}");
    assert_eq!(first, again);
    let (code, _, stderr) =
        place.run(&["train", "--resume", "b", "--steps", "4", "--threads", "1", "--cache", "cache"]);
    assert!(code == Some(0) && stderr.contains("are those in cache/data-"), "a resumed run uses it too: {stderr}");
    assert_eq!(fs::read_dir(place.path("cache")).expect("a folder").count(), 1);
    assert!(!place.path("home").exists(), "small data leave nothing behind");
    place.put("data.txt", TEXT.repeat(61));
    let (code, _, stderr) =
        place.run(&["train", "--resume", "b", "--steps", "5", "--threads", "1", "--cache", "cache"]);
    assert!(code == Some(2) && stderr.contains("other data"), "{stderr}");
}

#[test]
fn weights_change_what_is_drawn() {
    let place = Place::new();
    place.put("other.txt", "0123456789 ".repeat(300));
    let (plain, _) = place.train("a", &["--data", "data.txt", "other.txt"]);
    let (double, _) = place.train("b", &["--data", "data.txt", "other.txt=2"]);
    assert_ne!(plain, double);
    let (code, _, stderr) = place.run(&["train", "--resume", "b", "--steps", "4", "--threads", "1"]);
    assert_eq!(code, Some(0), "weights are remembered: {stderr}");
    let words = ["train", "--resume", "b", "--steps", "5", "--data", "data.txt", "other.txt=3", "--threads", "1"];
    let (code, _, stderr) = place.run(&words);
    assert!(code == Some(2) && stderr.contains("other data"), "{stderr}");
    let (code, _, stderr) = place.run(&["train", "model.json", "--data", "data.txt=0"]);
    assert!(code == Some(2) && stderr.contains("expected a number from"), "{stderr}");
}

#[test]
fn a_mixed_run_goes_on_from_its_journal_with_the_same_data() {
    let place = Place::new();
    place.put("chat.jsonl.zst", zstd("{\"text\": \"0123456789\"}\n".repeat(200).as_bytes()));
    place.put("folder/deep/more.txt.gz", gzip("abc def\n".repeat(300).as_bytes()));
    let words = ["--data", "data.txt", "chat.jsonl.zst=2", "folder=0.5", "--lr-decay", "constant", "--val-every", "0"];
    place.train("parted", &words);
    place.train("whole", &words);
    fs::remove_file(place.path("parted/step-00000003.b158")).expect("the checkpoint of the end");
    for out in ["parted", "whole"] {
        let at = Standing::newest(&place.path(out)).expect("a run").expect("a checkpoint").progress();
        assert_eq!((at.step, at.position), (3, 3 * 2 * 16), "{out}: positions are tokens");
        let (code, _, stderr) = place.run(&["train", "--resume", out, "--steps", "12", "--threads", "1"]);
        assert_eq!(code, Some(0), "{stderr}");
    }
    let (code, stdout, stderr) = place.run(&["verify-run", "parted", "whole"]);
    assert!(code == Some(0) && stdout.starts_with("equal: 12 steps"), "{stdout}{stderr}");
    let straight = ["train", "model.json", "--out", "straight", "--steps", "12", "--batch", "2", "--seq-len", "16"];
    let (code, _, stderr) = place.run(&[&straight[..], &words].concat());
    assert_eq!(code, Some(0), "{stderr}");
    let (code, stdout, stderr) = place.run(&["verify-run", "straight", "parted"]);
    assert!(code == Some(0) && stdout.starts_with("equal: 12 steps"), "{stdout}{stderr}");
}

#[test]
fn an_own_vocabulary_is_trained_used_and_remembered() {
    let place = Place::new();
    place.put(
        "chat.jsonl",
        format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"{}\"}}]}}\n", TEXT.repeat(30)),
    );
    let train = ["tokenizer", "train", "--data", "data.txt", "chat.jsonl"];
    let (code, stdout, stderr) = place.run(&[&train[..], &["--size", "270", "-o", "own.vocab"]].concat());
    assert_eq!((code, stdout.as_str()), (Some(0), "270\n"), "{stderr}");
    let own = fs::read(place.path("own.vocab")).expect("a vocabulary");
    assert_eq!(place.run(&[&train[..], &["--size", "270", "-o", "own.vocab"]].concat()).0, Some(0));
    assert!(fs::read(place.path("own.vocab")).expect("a vocabulary") == own, "training is deterministic");
    let (code, stdout, stderr) = place.run(&[&train[..], &["--size", "90000", "-o", "all.vocab"]].concat());
    assert!(code == Some(0) && stdout.trim().parse::<usize>().expect("a number") < 500, "{stdout}");
    assert!(stderr.contains("no more pairs occur twice"), "{stderr}");
    let (code, _, stderr) = place.run(&[&train[..], &["--size", "256", "-o", "no.vocab"]].concat());
    assert!(code == Some(2) && stderr.contains("expected 257 to"), "{stderr}");

    let (_, said) = place.train("run", &["--data", "data.txt", "--vocab", "own.vocab"]);
    assert!(said.contains("vocabulary bpe (270)"), "{said}");
    let (code, stdout, stderr) = place.run(&["generate", "run", "--prompt", "the cat <|endoftext|>", "-n", "4"]);
    assert!(code == Some(0) && !stdout.is_empty(), "the weights bring their vocabulary: {stderr}");
    let resume = ["train", "--resume", "run", "--steps", "4", "--threads", "1"];
    let (code, _, stderr) = place.run(&[&resume[..], &["--vocab", "all.vocab"]].concat());
    assert!(code == Some(3) && stderr.contains("all.vocab") && stderr.contains("is not the one"), "{stderr}");
    assert_eq!(place.run(&[&resume[..], &["--vocab", "own.vocab"]].concat()).0, Some(0));

    // As many ids, but others.
    let (code, _, stderr) =
        place.run(&["tokenizer", "train", "--data", "model.json", "--size", "270", "-o", "other.vocab"]);
    assert_eq!(code, Some(0), "{stderr}");
    let (code, _, stderr) = place.run(&["train", "run", "--data", "data.txt", "--vocab", "other.vocab", "--out", "no"]);
    assert!(
        code == Some(3) && stderr.contains("other.vocab: this vocabulary (bpe, 270 ids) is not the one"),
        "{stderr}"
    );
    let mut damaged = own;
    let at = damaged.len() - 3;
    damaged[at] ^= 1;
    place.put("own.vocab", damaged);
    let (code, _, stderr) = place.run(&["train", "model.json", "--data", "data.txt", "--vocab", "own.vocab"]);
    assert!(code == Some(5) && stderr.contains("own.vocab: line 4: found crc32c"), "{stderr}");
}

#[test]
fn what_cannot_be_read_has_a_place_and_a_code() {
    let place = Place::new();
    place.put("binary.txt", b"line\nzero\0");
    place.put("bad.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"a\"}\n");
    place.put("cut.txt.gz", &gzip(TEXT.repeat(60).as_bytes())[..40]);
    place.put("latin.txt", b"fine\ncaf\xe9 \n".repeat(100));
    fs::create_dir(place.path("empty")).expect("created");
    let own = ["--vocab", "o200k:restricted"];
    for (words, code, what) in [
        (&["binary.txt"][..], 1, "binary.txt: line 2 (byte offset 9) has a zero byte"),
        (&["bad.jsonl"], 1, "bad.jsonl: line 2: no field \"text\" or \"messages\", the record has [\"txt\"]"),
        (&["data.txt", "--field", "body"], 1, "data.txt: line 1: column 2"),
        (&["cut.txt.gz"], 5, "cut.txt.gz: the compressed data are damaged"),
        (&["empty"], 1, "empty: no document with text"),
        (&["latin.txt", own[0], own[1]], 1, "latin.txt: line 2 (byte offset 8) is not UTF-8"),
        (&["data.txt", "--cache", "model.json"], 1, "cannot write the token cache"),
    ] {
        let (found, stdout, stderr) = place.run(&[&["train", "model.json", "--data"], words].concat());
        assert!(found == Some(code) && stdout.is_empty() && stderr.contains(what), "{words:?}: {found:?} {stderr}");
    }
}

#[test]
fn help_has_examples() {
    let place = Place::new();
    for words in [&["train"][..], &["vocab"], &["tokenizer", "train"]] {
        let (code, stdout, _) = place.run(&[words, &["--help"]].concat());
        assert!(code == Some(0) && stdout.contains("Example") && stdout.contains("--cache <DIR|off>"), "{stdout}");
    }
}
