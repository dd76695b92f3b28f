//! Tests of the weight container: round trips, damage of every byte, and files made to deceive.

use super::*;

fn metadata() -> BTreeMap<String, String> {
    [("config", "{\"hidden_size\": 64}"), ("vocab", "ä\n\u{1F600}")].map(|(k, v)| (k.to_string(), v.to_string())).into()
}

fn latents(n: usize, k: usize) -> Vec<f32> {
    let mut values = vec![0.0; n * k];
    crate::rng::fill_gaussian(&mut values, "latents", 0, 0, 7);
    values
}

/// A file with every encoding, and its tensors as float32.
fn sample() -> (Vec<u8>, BTreeMap<&'static str, Vec<f32>>) {
    let floats = latents(3, 5);
    let halves: Vec<f32> = floats.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect();
    let w = latents(33, 70);
    let grouped = ternarise(&w, 33, 70, 32, 0.5, ScaleMode::PerGroup);
    let whole = ternarise(&w, 33, 70, 32, 0.5, ScaleMode::PerTensor);
    let stack = [0, 1].map(|i| ternarise(&w[i * 70..][..5 * 70], 5, 70, 32, 0.5, ScaleMode::PerGroup));
    let values = |t: &Ternary, scale: fn(f32) -> f32| -> Vec<f32> {
        let per_row = 70usize.div_ceil(t.group);
        let at = |i: usize| scale(t.scales[i / 70 * per_row + i % 70 / t.group]);
        t.codes.iter().enumerate().map(|(i, &c)| f32::from(c) * at(i)).collect()
    };
    let expected = BTreeMap::from([
        ("norm.weight", floats.clone()),
        ("embed.weight", halves),
        ("position", vec![-1.0, 7.0]),
        ("nothing", vec![]),
        ("layers.0.attn.q_proj.weight", values(&grouped, |s| s)),
        ("layers.0.attn.k_proj.weight", values(&whole, |s| half::bf16::from_f32(s).to_f32())),
        ("mlp.experts.*.up_proj.weight", stack.iter().flat_map(|t| values(t, |s| s)).collect()),
    ]);
    let entries = [
        Entry::f32("norm.weight", &[3, 5], &floats),
        Entry::bf16("embed.weight", &[5, 3, 1], &floats),
        Entry::i32("position", &[2], &[-1, 7]),
        Entry::f32("nothing", &[0, 9], &[]),
        Entry::ternary("layers.0.attn.q_proj.weight", 33, 70, &grouped, ScaleEncoding::F32),
        Entry::ternary("layers.0.attn.k_proj.weight", 33, 70, &whole, ScaleEncoding::Bf16),
        Entry::ternary_stack("mlp.experts.*.up_proj.weight", 5, 70, &stack, ScaleEncoding::F32),
    ];
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("m.b158");
    write(&path, &entries, &metadata()).expect("written");
    let bytes = std::fs::read(&path).expect("read");
    let mut reversed = entries;
    reversed.reverse();
    write(&path, &reversed, &metadata()).expect("written");
    assert_eq!(std::fs::read(&path).expect("read"), bytes, "the order of the entries does not matter");
    let mapped = B158::open(&path).expect("opened");
    for (name, _, _) in mapped.iter() {
        let tensor = mapped.require(name).expect("sound");
        assert_eq!(tensor.bytes.as_ptr().align_offset(DATA_ALIGN), 0);
    }
    (bytes, expected)
}

#[test]
fn tensors_survive_a_round_trip() {
    let (bytes, expected) = sample();
    let file = B158::from_bytes(&bytes).expect("read");
    file.verify_all().expect("sound");
    assert_eq!(*file.metadata(), metadata());
    assert_eq!(file.iter().map(|(name, ..)| name).collect::<Vec<_>>(), expected.keys().copied().collect::<Vec<_>>());
    for (name, values) in &expected {
        let tensor = file.require(name).expect("present");
        assert_eq!(tensor.to_f32(), *values, "{name}");
        assert_eq!(tensor.to_host().to_f32(), *values, "{name}");
        assert_eq!(tensor.to_host().shape(), tensor.shape);
        assert_eq!(tensor.plain().is_some(), tensor.ternary().is_none());
    }
    let q = file.require("layers.0.attn.q_proj.weight").expect("present");
    assert_eq!(q.encoding, Encoding::Ternary { group: 32, scales: ScaleEncoding::F32 });
    let scales = q.scales().expect("ternary");
    assert_eq!(scales.len(), 64 * 3);
    assert!(scales[33 * 3..].iter().all(|&s| s == 0.0));
    let up = file.require("mlp.experts.*.up_proj.weight").expect("present");
    assert_eq!((up.shape, up.scales().expect("ternary").len()), (&[2, 5, 70][..], 2 * 32 * 3));
    assert!(file.contains("position") && !file.contains("positions"));
    let error = file.require("positions").expect_err("not in the file");
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("no tensor `positions` among the 7"), "{error}");
}

/// Byte ranges of the file that hold header or tensors, as opposed to gaps.
fn covered(bytes: &[u8]) -> Vec<bool> {
    let file = B158::from_bytes(bytes).expect("read");
    let table = u32::from_le_bytes(bytes[20..24].try_into().expect("four bytes")) as usize;
    let mut covered = vec![false; bytes.len()];
    covered[..PROLOGUE_BYTES + table + CHECKSUM_BYTES].fill(true);
    for slot in file.tensors.values() {
        covered[slot.range.clone()].fill(true);
    }
    covered
}

fn read_all(bytes: &[u8]) -> Result<(), FileError> {
    let file = B158::from_bytes(bytes)?;
    for (name, _, _) in file.iter() {
        std::hint::black_box(file.require(name)?.to_f32());
    }
    Ok(())
}

#[test]
fn every_damaged_byte_is_noticed() {
    let (good, _) = sample();
    read_all(&good).expect("sound");
    let covered = covered(&good);
    let mut bytes = good.clone();
    for at in 0..good.len() {
        for flip in [1, 0x80, 0xFF] {
            bytes[at] = good[at] ^ flip;
            let found = read_all(&bytes);
            assert_eq!(found.is_err(), covered[at], "byte {at}");
            if let Err(error) = found {
                let code = if (8..12).contains(&at) { 1 } else { 5 };
                assert_eq!(error.exit_code(), code, "byte {at}: {error}");
            }
        }
        bytes[at] = good[at];
    }
    for end in 0..good.len() {
        assert_eq!(read_all(&good[..end]).expect_err("truncated").exit_code(), 5);
    }
    bytes.push(0);
    assert_eq!(read_all(&bytes).expect_err("too long").exit_code(), 5);
}

#[test]
fn a_damaged_tensor_is_named_and_the_others_stay_readable() {
    let (mut bytes, _) = sample();
    let file = B158::from_bytes(&bytes).expect("read");
    let at = file.tensors["norm.weight"].range.start;
    bytes[at] ^= 1;
    let file = B158::from_bytes(&bytes).expect("the header is sound");
    assert!(file.require("embed.weight").is_ok());
    let (encoding, shape, lazily) = file.mapped("norm.weight").expect("what is there is handed out as it is");
    assert_eq!((encoding, shape, lazily[0]), (Encoding::F32, &[3, 5][..], bytes[at]));
    for error in [file.require("norm.weight").expect_err("damaged"), file.verify_all().expect_err("damaged")] {
        assert_eq!(error.exit_code(), 5);
        assert!(error.to_string().contains("tensor `norm.weight` is corrupted: its checksum"), "{error}");
    }
}

/// Makes the header's checksum right again.
fn seal(bytes: &mut [u8]) {
    let table = u32::from_le_bytes(bytes[20..24].try_into().expect("four bytes")) as usize;
    let end = PROLOGUE_BYTES.saturating_add(table);
    if let Some(head) = bytes.get(..end) {
        let crc = crc32c::crc32c(head).to_le_bytes();
        if let Some(place) = bytes.get_mut(end..end + CHECKSUM_BYTES) {
            place.copy_from_slice(&crc);
        }
    }
}

#[test]
fn headers_made_to_deceive_never_panic() {
    let (good, _) = sample();
    let table = u32::from_le_bytes(good[20..24].try_into().expect("four bytes")) as usize;
    for at in 12..PROLOGUE_BYTES + table {
        for value in [0, 1, 2, 3, 0x7F, 0x80, 0xFF, good[at] ^ 1, good[at] ^ 0x40] {
            let mut bytes = good.clone();
            bytes[at] = value;
            seal(&mut bytes);
            std::hint::black_box(read_all(&bytes).is_ok());
        }
        for wide in [u64::MAX, 1 << 63, 1 << 60, 0] {
            let mut bytes = good.clone();
            let end = (at + 8).min(bytes.len());
            bytes[at..end].copy_from_slice(&wide.to_le_bytes()[..end - at]);
            seal(&mut bytes);
            std::hint::black_box(read_all(&bytes).is_ok());
        }
    }
}

#[test]
fn codes_of_value_three_are_refused_in_spite_of_a_right_checksum() {
    let weights = ternarise(&latents(2, 8), 2, 8, 8, 0.5, ScaleMode::PerGroup);
    let entry = Entry::ternary("w", 2, 8, &weights, ScaleEncoding::F32);
    let mut stored = entry.bytes.to_vec();
    stored[0] |= 3;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("m.b158");
    let entry = Entry::stored("w", entry.encoding, &[2, 8], stored);
    write(&path, &[entry], &BTreeMap::new()).expect("written");
    let error = B158::open(&path).expect("the table is sound").verify_all().expect_err("no weight");
    assert_eq!(error.exit_code(), 5);
    assert!(error.to_string().contains("not packed weights"), "{error}");
}

#[test]
fn other_files_get_a_sentence() {
    let (mut bytes, _) = sample();
    bytes[8] = 3;
    let cases: [(&[u8], u8, &str); 5] = [
        (b"", 5, "does not begin as a .b158 file"),
        (b"GGUF....................................", 5, "does not begin as a .b158 file"),
        (&MAGIC, 5, "ends inside its header, after 8 bytes"),
        (&bytes, 1, "found .b158 version 3, this program reads version 2"),
        (&sample().0[..100], 5, "it has 100 bytes, expected"),
    ];
    for (bytes, code, sentence) in cases {
        let error = B158::from_bytes(bytes).expect_err(sentence);
        assert!(error.to_string().contains(sentence), "{error}");
        assert_eq!(error.exit_code(), code);
    }
    let missing = B158::open(Path::new("no/such/file.b158")).expect_err("missing");
    assert_eq!(missing.exit_code(), 1);
    assert!(missing.to_string().starts_with("no/such/file.b158: cannot open the file"), "{missing}");
    let folder = B158::open(Path::new(".")).expect_err("a folder");
    assert!(folder.to_string().contains("expected a regular file"), "{folder}");
}

#[test]
fn entries_are_checked_before_writing() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("m.b158");
    let bad = [
        vec![Entry::f32("a", &[2], &[1.0]), Entry::f32("b", &[1], &[1.0])],
        vec![Entry::f32("a", &[1], &[1.0]), Entry::f32("a", &[1], &[1.0])],
        vec![Entry::f32("a", &[1; 17], &[1.0])],
        vec![Entry::stored("a", Encoding::Ternary { group: 0, scales: ScaleEncoding::F32 }, &[1, 1], vec![])],
        vec![Entry::stored("a", Encoding::Ternary { group: 1, scales: ScaleEncoding::F32 }, &[1], vec![])],
    ];
    for entries in bad {
        assert_eq!(write(&path, &entries, &BTreeMap::new()).expect_err("refused").exit_code(), 1);
        assert!(!path.exists());
    }
}
