//! Tests of reading: cuts depend on bytes alone, memory is bounded, and what cannot be read is named.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::*;

fn pieces(path: &Path, reading: &Reading, text: bool) -> Result<Vec<Piece>, TextError> {
    let file = list(path)?.remove(0);
    let mut pieces = Pieces::open(&file, reading, text)?;
    let mut out = vec![];
    while let Some(piece) = pieces.next()? {
        out.push(piece);
    }
    let sum = pieces.finish()?;
    assert_eq!(sum, crc32c::crc32c(&fs::read(path).unwrap()));
    Ok(out)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(vec![], Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

#[test]
fn packed_files_have_the_pieces_of_plain_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let text = "Some line of text, number 17.\nÄnother — line\n\n".repeat(30_000).into_bytes();
    for cut_for_text in [true, false] {
        fs::write(&path, &text).unwrap();
        let plain = pieces(&path, &Reading::default(), cut_for_text).unwrap();
        assert!(plain.len() > 4 && plain.iter().all(|p| p.bytes.len() < 2 * PIECE));
        assert_eq!(plain.concat_bytes(), text);
        assert!(plain.iter().enumerate().all(|(i, p)| p.last == (i + 1 == plain.len())));
        assert_eq!(plain[1].line, 1 + plain[0].bytes.iter().filter(|&&b| b == b'\n').count() as u64);
        assert_eq!(plain[1].offset, plain[0].bytes.len() as u64);
        let (a, b) = text.split_at(text.len() / 3);
        for packed in [gzip(&text), [gzip(a), gzip(b)].concat(), zstd(&text), [zstd(a), zstd(b)].concat()] {
            fs::write(&path, &packed).unwrap();
            assert!(pieces(&path, &Reading::default(), cut_for_text).unwrap() == plain);
            fs::write(&path, &packed[..packed.len() - 9]).unwrap();
            let error = pieces(&path, &Reading::default(), cut_for_text).unwrap_err();
            assert!(matches!(error, TextError::Damaged { .. }), "{error}");
        }
    }
}

trait Concat {
    fn concat_bytes(&self) -> Vec<u8>;
}

impl Concat for Vec<Piece> {
    fn concat_bytes(&self) -> Vec<u8> {
        self.iter().flat_map(|p| p.bytes.iter().copied()).collect()
    }
}

#[test]
fn sizes_around_a_piece_end_their_document_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    for n in [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1] {
        fs::write(&path, vec![b'a'; n]).unwrap();
        for text in [true, false] {
            let found = pieces(&path, &Reading::default(), text).unwrap();
            assert_eq!(found.concat_bytes().len(), n);
            assert_eq!(found.iter().filter(|p| p.last).count(), 1);
            assert!(found.last().is_some_and(|p| p.last));
        }
    }
}

#[test]
fn lines_without_end_are_refused_with_their_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.txt");
    // Packed, the file is small; unpacked, its second line never ends.
    let mut text = b"first\n".to_vec();
    text.resize(MAX_LINE + 100, b'x');
    fs::write(&path, gzip(&text)).unwrap();
    let error = pieces(&path, &Reading::default(), true).unwrap_err().to_string();
    assert!(error.contains("long.txt: line 1 has more than 32 MB") || error.contains("line 2 has more"), "{error}");
    assert_eq!(pieces(&path, &Reading::default(), false).unwrap().concat_bytes().len(), text.len());
    let reading = Reading { field: Some("text".into()), binary: false };
    let error = pieces(&path, &reading, true).unwrap_err().to_string();
    assert!(error.contains("line 2 has more than 32 MB"), "{error}");
    // Lines that all begin with white space have no good place for a cut; an end of line serves then.
    fs::write(&path, b" indented\n".repeat(MAX_LINE / 10 + 1000)).unwrap();
    let found = pieces(&path, &Reading::default(), true).unwrap();
    assert!(found.len() == 2 && found[0].bytes.ends_with(b"\n") && found[0].bytes.len() <= MAX_LINE);
}

#[test]
fn records_are_lines_and_keep_their_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl.gz");
    fs::write(&path, gzip(b"{\"text\": 1}\n\n  \n{}\r\n{}")).unwrap();
    let found = pieces(&path, &Reading::default(), true).unwrap();
    assert_eq!(found.iter().map(|p| p.line).collect::<Vec<_>>(), [1, 4, 5]);
    assert!(found.iter().all(|p| p.last));
    assert!(records(Path::new("x.NDJSON.zst")) && !records(Path::new("x.json")) && !records(Path::new("jsonl")));
}

#[test]
fn folders_are_listed_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("sub/deep")).unwrap();
    fs::create_dir_all(at("empty")).unwrap();
    for name in ["b.txt", "sub/deep/z.txt", "sub/a.txt", ".hidden", "a.txt"] {
        fs::write(at(name), "text").unwrap();
    }
    fs::write(at("nothing.txt"), "").unwrap();
    let found: Vec<PathBuf> = list(folder.path()).unwrap().into_iter().map(|f| f.path).collect();
    assert_eq!(found, ["a.txt", "b.txt", "sub/a.txt", "sub/deep/z.txt"].map(at));
    let message = |path: &Path| list(path).unwrap_err().to_string();
    assert!(message(&at("empty")).contains("no document with text"));
    assert!(message(&at("nothing.txt")).ends_with("nothing.txt: the file is empty, expected text"));
    assert!(message(&at("gone")).contains("gone: cannot read the data"));
    #[cfg(unix)]
    assert!(message(Path::new("/dev/zero")).contains("not a regular file"));
}

#[test]
fn files_that_vanish_or_change_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    fs::write(&path, "text").unwrap();
    let file = list(&path).unwrap().remove(0);
    let mut open = Pieces::open(&file, &Reading::default(), true).unwrap();
    while open.next().unwrap().is_some() {}
    fs::write(&path, "longer text").unwrap();
    assert!(open.finish().unwrap_err().to_string().contains("a.txt: the file changed while it was read"));
    fs::remove_file(&path).unwrap();
    let error = Pieces::open(&file, &Reading::default(), true).err().unwrap().to_string();
    assert!(error.contains("a.txt: cannot read the data"), "{error}");
}

#[test]
fn arguments_may_have_weights() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("x=3");
    fs::write(&there, "text").unwrap();
    let parse = |text: &str| text.parse::<DataSpec>().map(|d| (d.path, d.weight));
    assert_eq!(parse("a.txt"), Ok(("a.txt".into(), 1.0)));
    assert_eq!(parse("a=b.txt=2.5"), Ok(("a=b.txt".into(), 2.5)));
    assert_eq!(parse(there.to_str().unwrap()), Ok((there, 1.0)));
    for bad in ["a=0", "a=-1", "a=nan", "a=inf", "a=two"] {
        assert!(parse(bad).unwrap_err().contains("expected a number"), "{bad}");
    }
}
