//! The entry points of fuzzing: every reader of outside bytes, and what must hold of whatever it accepts.
//!
//! A function returns for every input; a panic is a finding. Checksums keep random damage out, so inputs are read twice: as they are, and
//! with checksums and lengths made right.

use chimera_codegen::{Allowed, host};
use chimera_frontends::config::{self, Overrides};
use chimera_ir::plan::{self, Plan, Step};
use chimera_ir::{DType, loops};
use chimera_runtime::exec::{ExecOptions, Executable};
use chimera_runtime::files::b158::{self, B158};
use chimera_runtime::files::npy;
use chimera_runtime::files::safetensors::SafeTensors;
use chimera_runtime::text::{Tokens, Vocab, chat, jsonl as records, zstd as packed};
use chimera_runtime::train::journal::{self, Item, Record};
use std::io::Read;

/// A fuzz target.
pub type Target = fn(&[u8]);

/// All targets by name; the corpus of each is the folder of that name.
pub const TARGETS: [(&str, Target); 11] = [
    ("config", config),
    ("plan", plan),
    ("b158", b158),
    ("safetensors", safetensors),
    ("npy", npy),
    ("vocab", vocab),
    ("journal", journal),
    ("tokens", tokens),
    ("jsonl", jsonl),
    ("preferences", preferences),
    ("zstd", zstd),
];

/// Errors are sentences.
fn sentence(e: &dyn std::fmt::Display) {
    assert!(!e.to_string().is_empty(), "an error says what is wrong");
}

/// Elements of an accepted shape; other dimensions beside a zero may have any size.
fn elements(shape: &[usize]) -> usize {
    if shape.contains(&0) { 0 } else { shape.iter().product() }
}

/// A configuration: what is accepted can be counted, and its canonical form is the same model.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match config::from_text("input.json", text, &Overrides::default()) {
        Ok(loaded) => {
            let model = &loaded.model;
            let _ =
                (config::parameter_count(model), config::active_parameters(model, 1), config::claims(&loaded).len());
            let _ = (config::parts(model).len(), config::state_memory(model, 1).len());
            let canonical = model.to_json().to_string();
            let again = config::from_text("canonical.json", &canonical, &Overrides::default());
            let again = again.unwrap_or_else(|e| panic!("the canonical form is refused: {e}\n{canonical}"));
            assert_eq!(&again.model, model, "the canonical form is another model");
        }
        Err(e) => sentence(&e),
    }
}

/// A plan in binary or text form: what is accepted is written and read back to the same bytes, and runs.
pub fn plan(data: &[u8]) {
    plan_once(data);
    plan_once(&repaired_plan(data));
}

fn plan_once(data: &[u8]) {
    let found = match std::str::from_utf8(data) {
        Ok(text) if !data.starts_with(b"CHIMPLAN") => plan::from_text(text),
        _ => plan::from_bytes(data),
    };
    let plan = match found {
        Ok(plan) => plan,
        Err(e) => return sentence(&e),
    };
    let (bytes, text) = (plan::to_bytes(&plan), plan::to_text(&plan));
    // Compared as written, because a plan may hold numbers that are not equal to themselves.
    let again = plan::from_bytes(&bytes).unwrap_or_else(|e| panic!("the binary form is refused: {e}"));
    assert!(plan::to_bytes(&again) == bytes, "the binary form changes");
    let again = plan::from_text(&text).unwrap_or_else(|e| panic!("the text form is refused: {e}"));
    assert!(plan::to_text(&again) == text, "the text form changes");
    plan_runs(&plan);
}

/// Most expressions that one plan evaluates here, and most bytes of its memories.
const MAX_WORK: u64 = 1 << 18;
const MAX_BYTES: u64 = 1 << 22;

/// A verified plan compiles on every emitter, and runs to an end or an error: kernels whose indices are proven to be inside their
/// buffers stay there whatever they are given. Other kernels are programs to be trusted, not data, and are compiled only.
fn plan_runs(plan: &Plan) {
    if plan::verify(plan).is_err() {
        return;
    }
    let (mut work, mut times) = (0u64, 1);
    for step in plan.entries.iter().flat_map(|e| &e.steps) {
        let once = match step {
            Step::Run { kernel, .. } => loops::work(&plan.kernels[kernel.0 as usize]),
            Step::Copy { from, .. } => plan.buffer(*from).ty.bytes() as u64,
            Step::LoopBegin { max, .. } => {
                times = u64::from(*max);
                1
            }
            Step::LoopEnd { .. } => std::mem::replace(&mut times, 1),
        };
        work = work.saturating_add(once.saturating_mul(times));
    }
    let bounded = work <= MAX_WORK;
    let proven = plan.kernels.iter().all(|k| loops::unproven(k).is_empty());
    for emitters in ["interp", "portable,interp"] {
        let emitters = Allowed::parse(emitters).expect("emitters know their names");
        let options =
            ExecOptions { threads: 1, emitters, target: host(), max_bytes: MAX_BYTES, ..ExecOptions::default() };
        match Executable::new(plan.clone(), &options) {
            Ok(mut exe) if bounded && proven => plan_entries(&mut exe, plan),
            Ok(_) => {}
            Err(e) => sentence(&e),
        }
    }
}

/// Every entry point on numbers that indices and loops do not expect.
fn plan_entries(exe: &mut Executable, plan: &Plan) {
    let floats = |n: usize| -> Vec<f32> { [0.5, -3.0e38, f32::NAN, 0.0, 1.0e9].into_iter().cycle().take(n).collect() };
    let ints = |n: usize| -> Vec<i32> { [1, i32::MIN, 0, 7, i32::MAX, -1].into_iter().cycle().take(n).collect() };
    for w in &plan.weights {
        let (name, dims, n) = (&w.name, &w.ty.dims, w.ty.numel());
        let set = match w.ty.dtype {
            DType::I32 => exe.set_weight(name, dims, &ints(n)),
            _ => exe.set_weight(name, dims, &floats(n)),
        };
        set.unwrap_or_else(|e| sentence(&e));
    }
    for entry in &plan.entries {
        for (name, id) in &entry.inputs {
            let ty = &plan.buffer(*id).ty;
            let set = match ty.dtype {
                DType::I32 => exe.set_input(entry.name.as_str(), name, &ints(ty.numel())),
                _ => exe.set_input(entry.name.as_str(), name, &floats(ty.numel())),
            };
            set.unwrap_or_else(|e| sentence(&e));
        }
        if let Err(e) = exe.run(entry.name.as_str()) {
            sentence(&e);
        }
    }
}

/// The same content behind a header that agrees with it.
fn repaired_plan(data: &[u8]) -> Vec<u8> {
    const HEADER: usize = 24;
    if data.starts_with(b"CHIMPLAN") && data.len() >= HEADER {
        let body = &data[HEADER..];
        let mut out = b"CHIMPLAN".to_vec();
        out.extend(plan::VERSION.to_le_bytes());
        out.extend((body.len() as u64).to_le_bytes());
        out.extend(crc32c::crc32c(body).to_le_bytes());
        out.extend(body);
        return out;
    }
    let body = data.iter().position(|&b| b == b'\n').map_or(data, |at| &data[at + 1..]);
    let mut out = format!("chimera-plan {} crc32c {:08x}\n", plan::VERSION, crc32c::crc32c(body)).into_bytes();
    out.extend(body);
    out
}

/// A weight container: what is accepted can be read to the last tensor, or says which one is damaged.
pub fn b158(data: &[u8]) {
    b158_once(data);
    b158_once(&repaired_b158(data));
}

fn b158_once(data: &[u8]) {
    let file = match B158::from_bytes(data) {
        Ok(file) => file,
        Err(e) => return sentence(&e),
    };
    let whole = file.verify_all();
    if let Err(e) = &whole {
        sentence(e);
    }
    let mut all = true;
    for (name, _, shape) in file.iter() {
        match file.require(name) {
            Ok(tensor) => {
                let n = elements(shape);
                assert_eq!(tensor.to_f32().len(), n, "{name}");
                let _ = (tensor.scales(), tensor.to_host());
                assert!(file.mapped(name).is_some_and(|(.., bytes)| bytes[..] == *tensor.bytes));
            }
            Err(e) => {
                all = false;
                sentence(&e);
            }
        }
    }
    assert_eq!(all, whole.is_ok(), "verification and reading agree");
}

/// A little-endian number at `at`.
fn number<const N: usize>(data: &[u8], at: usize) -> Option<usize> {
    let bytes = data.get(at..)?.first_chunk::<N>()?;
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(bytes);
    usize::try_from(u64::from_le_bytes(wide)).ok()
}

/// The same table and data behind a prologue and checksums that agree with them, as far as the table makes sense.
fn repaired_b158(data: &[u8]) -> Vec<u8> {
    const PROLOGUE: usize = 32;
    let mut out = data.to_vec();
    if out.len() < PROLOGUE {
        return out;
    }
    out[..8].copy_from_slice(&b158::MAGIC);
    out[8..12].copy_from_slice(&b158::VERSION.to_le_bytes());
    let length = out.len() as u64;
    out[24..32].copy_from_slice(&length.to_le_bytes());
    let _ = repair_tensors(&mut out, PROLOGUE);
    let end = number::<4>(&out, 20).and_then(|table| table.checked_add(PROLOGUE)).filter(|end| *end + 4 <= out.len());
    if let Some(end) = end {
        let sum = crc32c::crc32c(&out[..end]);
        out[end..end + 4].copy_from_slice(&sum.to_le_bytes());
    }
    out
}

/// Checksums of the tensors of a table; `None` where the table ends or contradicts itself.
fn repair_tensors(out: &mut [u8], mut at: usize) -> Option<()> {
    let (tensors, metadata) = (number::<4>(out, 12)?, number::<4>(out, 16)?);
    for _ in 0..metadata.checked_mul(2)? {
        at = at.checked_add(4)?.checked_add(number::<4>(out, at)?)?;
    }
    for _ in 0..tensors {
        at = at.checked_add(4)?.checked_add(number::<4>(out, at)?)?;
        let rank = number::<1>(out, at.checked_add(2)?)?;
        at += 12 + 8 * rank;
        let (start, length) = (number::<8>(out, at)?, number::<8>(out, at + 8)?);
        let sum = crc32c::crc32c(out.get(start..start.checked_add(length)?)?);
        out.get_mut(at + 16..at + 20)?.copy_from_slice(&sum.to_le_bytes());
        at += 20;
    }
    Some(())
}

/// A safetensors file: what is accepted can be read to the last element.
pub fn safetensors(data: &[u8]) {
    match SafeTensors::from_bytes(data) {
        Ok(file) => {
            assert_eq!(file.names().len(), file.iter().len());
            for (name, tensor) in file.iter() {
                let n = elements(tensor.shape());
                assert_eq!(tensor.to_f32().len(), n, "{name}");
                assert!(tensor.to_i64().map_or(true, |v| v.len() == n), "{name}");
                assert_eq!(tensor.to_owned().view().bytes(), tensor.bytes());
            }
        }
        Err(e) => sentence(&e),
    }
}

/// An array of NumPy: what is accepted can be read to the last element.
pub fn npy(data: &[u8]) {
    match npy::from_bytes(data) {
        Ok(tensor) => {
            let n = elements(tensor.shape());
            assert_eq!(tensor.to_f32().len(), n);
            let _ = tensor.to_i64();
        }
        Err(e) => sentence(&e),
    }
}

/// A token cache: what is accepted can be read to the last id of the last document.
pub fn tokens(data: &[u8]) {
    tokens_once(data.to_vec());
    tokens_once(repaired_tokens(data));
}

fn tokens_once(data: Vec<u8>) {
    match Tokens::from_bytes(data) {
        Ok(tokens) => {
            let documents = (0..tokens.documents()).map(|i| tokens.ids(tokens.document(i).ids).count());
            assert_eq!(documents.sum::<usize>(), tokens.len());
            let used = tokens.used();
            assert!(tokens.ids(0..tokens.len()).all(|id| used[id as usize]), "every id is counted");
            let _ = tokens.checksum();
        }
        Err(e) => sentence(&e),
    }
}

/// The same ids, documents and origin behind sizes and checksums that agree with them.
fn repaired_tokens(data: &[u8]) -> Vec<u8> {
    const HEAD: usize = 16;
    const TAIL: usize = 32;
    let mut out = data.to_vec();
    let Some(tail) = out.len().checked_sub(TAIL).filter(|&at| at >= HEAD) else { return out };
    out[..12].copy_from_slice(b"CHIMTOKS\x01\0\0\0");
    let width = if out[12].is_multiple_of(4) { 4 } else { 2 };
    out[12..16].copy_from_slice(&[width, 0, 0, 0]);
    let parts = || {
        let (documents, json) = (number::<8>(&out, tail + 8)?, number::<4>(&out, tail + 16)?);
        let origin = tail.checked_sub(json)?;
        let table = origin.checked_sub(documents.checked_mul(16)?).filter(|&at| at >= HEAD)?;
        Some(((table - HEAD) / usize::from(width), table))
    };
    let Some((ids, table)) = parts() else { return out };
    let end = HEAD + ids * usize::from(width);
    let sums = [crc32c::crc32c(&out[HEAD..end]), crc32c::crc32c(&out[table..tail])];
    out[tail..tail + 8].copy_from_slice(&(ids as u64).to_le_bytes());
    out[tail + 20..tail + 24].copy_from_slice(&sums[0].to_le_bytes());
    out[tail + 24..tail + 28].copy_from_slice(&sums[1].to_le_bytes());
    let last = crc32c::crc32c(&out[tail..tail + 28]);
    out[tail + 28..].copy_from_slice(&last.to_le_bytes());
    out
}

/// Lines of JSON: what is accepted is text, and does not depend on the white space around the line.
pub fn jsonl(data: &[u8]) {
    for line in data.split(|&b| b == b'\n') {
        for field in [None, Some("text"), Some("a.b")] {
            match records::record_text(line, field) {
                Ok(text) => {
                    let spaced = [b" ", line, b"\r"].concat();
                    assert_eq!(records::record_text(&spaced, field), Ok(text));
                }
                Err(e) => sentence(&e),
            }
        }
    }
}

/// Lines of JSON with conversations and preferences: parts that count and parts that do not take turns, and together they are the text of
/// the record; both continuations of a prompt begin with it.
pub fn preferences(data: &[u8]) {
    let alternate = |parts: &[chat::Part]| {
        assert!(parts.windows(2).all(|p| p[0].counts != p[1].counts) && parts.iter().all(|p| !p.text.is_empty()));
    };
    for line in data.split(|&b| b == b'\n') {
        match chat::conversation(line, None) {
            Ok(parts) => {
                alternate(&parts);
                let whole: String = parts.iter().map(|p| p.text.as_str()).collect();
                assert_eq!(records::record_text(line, Some("messages")), Ok(whole));
            }
            Err(e) => sentence(&e),
        }
        match chat::preference(line) {
            Ok(pair) => {
                for parts in [&pair.chosen, &pair.rejected] {
                    alternate(parts);
                    assert!(parts.iter().any(|p| p.counts), "an answer counts");
                }
            }
            Err(e) => sentence(&e),
        }
    }
}

/// Packed text: ends or says what is wrong.
pub fn zstd(data: &[u8]) {
    const MOST: u64 = 1 << 20;
    if let Err(e) = std::io::copy(&mut packed::Zstd::new(data).take(MOST), &mut std::io::sink()) {
        sentence(&e);
    }
}

/// A saved vocabulary: what is accepted is written and read back, and encodes any text.
pub fn vocab(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    vocab_once(text);
    vocab_once(&repaired_vocab(text));
}

fn vocab_once(text: &str) {
    match Vocab::from_text(text) {
        Ok(vocab) => {
            let again =
                Vocab::from_text(&vocab.to_text()).unwrap_or_else(|e| panic!("the written form is refused: {e}"));
            assert!(again == vocab, "the written form is another vocabulary");
            let ids = vocab.encode("a word, ein Wörtchen\n");
            assert!(ids.iter().all(|&id| (id as usize) < vocab.size() && vocab.is_assigned(id)));
            assert_eq!(vocab.decode(&ids), "a word, ein Wörtchen\n".as_bytes());
        }
        Err(e) => sentence(&e),
    }
}

/// The same ranges behind a checksum that agrees with them.
fn repaired_vocab(text: &str) -> String {
    let mut lines = text.split_inclusive('\n');
    let head: String = lines.by_ref().take(3).collect();
    let ranges: String = lines.skip(1).collect();
    format!("{head}crc32c {:08x}\n{ranges}", crc32c::crc32c(ranges.as_bytes()))
}

/// A journal: what is accepted is written and read back to the same bytes, and every trail is one of steps that follow each other.
pub fn journal(data: &[u8]) {
    journal_once(data);
    journal_once(&repaired_journal(data));
}

fn journal_once(data: &[u8]) {
    let (header, items) = match journal::read(data) {
        Ok(found) => found,
        Err(e) => return sentence(&e),
    };
    let (mut end, mut known) = (None, vec![]);
    for (place, item) in items.clone() {
        assert!(!place.is_empty() && end.is_none_or(|end| end == place.start), "items lie side by side");
        end = Some(place.end);
        if let Item::Record(record) = item {
            let mut again = vec![];
            record.write(&mut again);
            // A number may be written longer than it needs to be.
            let found = Record::read(&again).unwrap_or_else(|| panic!("what was read is written and refused"));
            assert!(found.1 == again.len() && again.len() <= place.len(), "the written form is not longer");
            let (step, rollbacks) = match &record {
                Record::Step(s) => (s.step, s.rollbacks),
                Record::Rollback(r) => (r.to, r.rollbacks),
            };
            known.push((step, rollbacks));
        }
    }
    assert!(end.is_none_or(|end| end == data.len()), "every byte belongs to an item");
    let starts = known.iter().take(8).flat_map(|&(s, r)| [(s, r), (s.saturating_sub(1), r), (s, r.saturating_sub(1))]);
    for (step, rollbacks) in starts.chain([(header.from, 0), (u64::MAX, u32::MAX)]) {
        let trail = journal::trail(items.clone(), step, rollbacks);
        assert!(trail.end <= data.len(), "the trail ends inside of the journal");
        for (i, s) in trail.steps.iter().enumerate() {
            assert!(s.step - step == i as u64 + 1 && s.rollbacks <= trail.rollbacks, "steps follow each other");
        }
    }
}

/// The same content with right checksums: of the header, and of everything that begins as a record does.
fn repaired_journal(data: &[u8]) -> Vec<u8> {
    let size = |at: usize| data.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    let mut out = data.to_vec();
    let Some(end) = size(12).map(|n| 16 + n).filter(|end| end + 4 <= out.len()) else { return out };
    out[..8].copy_from_slice(&journal::MAGIC);
    out[8..12].copy_from_slice(&journal::VERSION.to_le_bytes());
    let sum = crc32c::crc32c(&out[..end]);
    out[end..end + 4].copy_from_slice(&sum.to_le_bytes());
    let mut at = end + 4;
    while let Some(end) = size(at + 4).map(|n| at + 8 + n).filter(|end| end + 4 <= out.len()) {
        out[at..at + 3].copy_from_slice(&journal::MARK);
        let sum = crc32c::crc32c(&out[at..end]);
        out[end..end + 4].copy_from_slice(&sum.to_le_bytes());
        at = end + 4;
    }
    out
}
