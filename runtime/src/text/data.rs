//! Data files to tokenised documents, and the part of them that is held out.
//!
//! A source is a file; its documents never mix with those of another source. One file is one document.

use std::fs;
use std::path::Path;

use super::TextError;
use super::vocab::{Vocab, VocabSpec, line_of};

/// The documents of one file as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// File path or another name for messages.
    pub name: String,
    /// In order.
    pub documents: Vec<Vec<u8>>,
}

/// The documents of one file as ids, without end-of-document tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSource {
    /// As in [`Source`].
    pub name: String,
    /// In order.
    pub documents: Vec<Vec<u32>>,
}

/// Training and held-out documents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// What is trained on.
    pub train: Vec<Vec<u32>>,
    /// What is only measured.
    pub validation: Vec<Vec<u32>>,
}

/// Reads each path as one source of one document. A directory, a device, an empty file and a file that cannot be read
/// are errors that name the path.
pub fn read_files<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Source>, TextError> {
    if paths.is_empty() {
        return Err(TextError::NoFiles);
    }
    paths.iter().map(|path| read_file(path.as_ref())).collect()
}

fn read_file(path: &Path) -> Result<Source, TextError> {
    let io = |error| TextError::Io { path: path.into(), doing: "read the data", error };
    let kind = fs::metadata(path).map_err(io)?;
    if !kind.is_file() {
        return Err(TextError::NotAFile { path: path.into(), directory: kind.is_dir() });
    }
    let bytes = fs::read(path).map_err(io)?;
    if bytes.is_empty() {
        return Err(TextError::EmptyFile(path.into()));
    }
    Ok(Source { name: path.display().to_string(), documents: vec![bytes] })
}

/// Encodes all documents. `progress` gets (bytes done, bytes in all), ascending, and is called at least once.
pub fn tokenise(
    vocab: &Vocab,
    sources: &[Source],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<TokenSource>, TextError> {
    let total: u64 = sources.iter().flat_map(|s| &s.documents).map(|d| d.len() as u64).sum();
    let mut done = 0;
    progress(0, total);
    let mut out = Vec::with_capacity(sources.len());
    for source in sources {
        let mut documents = Vec::with_capacity(source.documents.len());
        for (i, bytes) in source.documents.iter().enumerate() {
            let ids = vocab.encode_bytes(bytes, &mut |here| progress(done + here as u64, total)).map_err(|error| {
                let offset = error.valid_up_to();
                let name = match source.documents.len() {
                    1 => source.name.clone(),
                    _ => format!("{}: document {}", source.name, i + 1),
                };
                TextError::NotUtf8 { source: name, line: line_of(bytes, offset), offset, vocab: vocab.name() }
            })?;
            done += bytes.len() as u64;
            documents.push(ids);
        }
        out.push(TokenSource { name: source.name.clone(), documents });
    }
    Ok(out)
}

/// Resolves `--vocab` against the data and encodes the data with it.
pub fn prepare(
    spec: &VocabSpec,
    sources: &[Source],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Vocab, Vec<TokenSource>), TextError> {
    let vocab = match spec {
        VocabSpec::Bytes => Vocab::bytes(),
        VocabSpec::O200k | VocabSpec::Restricted => Vocab::o200k(),
        VocabSpec::File(path) => Vocab::load(path)?,
    };
    let mut tokens = tokenise(&vocab, sources, progress)?;
    if *spec != VocabSpec::Restricted {
        return Ok((vocab, tokens));
    }
    let vocab = Vocab::restricted(tokens.iter().flat_map(|s| s.documents.iter().flatten().copied()));
    for document in tokens.iter_mut().flat_map(|s| &mut s.documents) {
        *document = vocab.narrow(document);
    }
    Ok((vocab, tokens))
}

/// Holds out the end of every source, at least `fraction` of its tokens: the fewest last documents that reach the
/// fraction when the source has several (never the first one), otherwise a contiguous tail of the only one. A fraction of
/// 0 holds out nothing; `0 <= fraction < 1`.
pub fn split(sources: Vec<TokenSource>, fraction: f64) -> Result<Split, TextError> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(TextError::BadFraction(fraction));
    }
    let mut out = Split::default();
    for mut source in sources {
        let total: usize = source.documents.iter().map(Vec::len).sum();
        let wanted = (total as f64 * fraction).ceil() as usize;
        if let [only] = source.documents.as_mut_slice() {
            let tail = only.split_off(only.len() - wanted.min(only.len().saturating_sub(1)));
            out.train.append(&mut source.documents);
            out.validation.extend((!tail.is_empty()).then_some(tail));
            continue;
        }
        let (mut first, mut held) = (source.documents.len(), 0);
        while held < wanted && first > 1 {
            first -= 1;
            held += source.documents[first].len();
        }
        let tail = source.documents.split_off(first);
        out.train.append(&mut source.documents);
        out.validation.extend(tail);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, documents: &[&[u8]]) -> Source {
        Source { name: name.into(), documents: documents.iter().map(|d| d.to_vec()).collect() }
    }

    #[test]
    fn files_that_cannot_serve_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let (text, empty) = (folder.path().join("a.txt"), folder.path().join("b.txt"));
        fs::write(&text, "hello").unwrap();
        fs::write(&empty, "").unwrap();
        let message = |paths: &[&Path]| read_files(paths).unwrap_err().to_string();
        assert!(message(&[]).contains("at least one"));
        assert!(message(&[&text, &empty]).ends_with("b.txt: the file is empty, expected text"));
        assert!(message(&[folder.path()]).contains("is a directory"));
        assert!(message(&[&folder.path().join("gone")]).contains("gone: cannot read the data"));
        assert!(message(&[Path::new("/dev/zero")]).contains("not a regular file"));
        assert_eq!(read_files(&[&text]).unwrap()[0].documents, [b"hello"]);
    }

    #[test]
    fn bytes_that_are_not_text_are_placed() {
        let data = [source("x.txt", &[b"one\ntwo\nab\xff"])];
        let error = tokenise(&Vocab::o200k(), &data, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.starts_with("x.txt: line 3 (byte offset 10) is not UTF-8"), "{error}");
        let tokens = tokenise(&Vocab::bytes(), &data, &mut |_, _| ()).unwrap();
        assert_eq!(tokens[0].documents[0].last(), Some(&255));
        let two = [source("y", &[b"ok", b"\xc3("])];
        let error = tokenise(&Vocab::o200k(), &two, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.starts_with("y: document 2: line 1 (byte offset 0)"), "{error}");
    }

    #[test]
    fn prepare_serves_every_vocabulary_and_reports_progress() {
        let data = [source("x", &["the cat – the cat".as_bytes(), b"a dog"]), source("y", &[b"the dog"])];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        Vocab::restricted(Vocab::o200k().encode("the cat")).save(&path).unwrap();
        let total: usize = data.iter().flat_map(|s| &s.documents).map(Vec::len).sum();
        for spec in [VocabSpec::Bytes, VocabSpec::O200k, VocabSpec::Restricted, VocabSpec::File(path)] {
            let mut calls = Vec::new();
            let (vocab, tokens) = prepare(&spec, &data, &mut |done, all| calls.push((done, all))).unwrap();
            assert!(calls.is_sorted() && calls.last() == Some(&(total as u64, total as u64)));
            for (raw, coded) in data.iter().zip(&tokens) {
                assert_eq!(raw.name, coded.name);
                for (bytes, ids) in raw.documents.iter().zip(&coded.documents) {
                    assert_eq!(vocab.decode(ids), *bytes, "{spec:?}");
                }
            }
        }
        let (_, full) = prepare(&VocabSpec::O200k, &data, &mut |_, _| ()).unwrap();
        let (_, narrow) = prepare(&VocabSpec::Restricted, &data, &mut |_, _| ()).unwrap();
        assert_eq!(full[0].documents[0].len(), narrow[0].documents[0].len());
    }

    #[test]
    fn held_out_part_is_the_end_of_each_source() {
        let one = TokenSource { name: "a".into(), documents: vec![(0..100).collect()] };
        let many = TokenSource { name: "b".into(), documents: vec![vec![1; 50], vec![2; 30], vec![3; 20], vec![]] };
        let parts = split(vec![one.clone(), many.clone()], 0.25).unwrap();
        assert_eq!(parts.train, [(0..75).collect(), vec![1; 50]]);
        assert_eq!(parts.validation, [(75..100).collect(), vec![2; 30], vec![3; 20], vec![]]);
        assert_eq!(split(vec![many.clone()], 0.2).unwrap().validation, [vec![3; 20], vec![]]);
        let most = split(vec![one, many], 0.999).unwrap();
        assert_eq!(most.train, [vec![0], vec![1; 50]]);
        let none = TokenSource { name: "c".into(), documents: vec![vec![7], vec![8]] };
        assert_eq!(split(vec![none], 0.0).unwrap(), Split { train: vec![vec![7], vec![8]], validation: vec![] });
        assert_eq!(split(vec![TokenSource { name: "d".into(), documents: vec![] }], 0.5).unwrap(), Split::default());
        for bad in [1.0, -0.1, f64::NAN] {
            assert!(split(vec![], bad).unwrap_err().to_string().contains("from 0 to below 1"));
        }
    }
}
