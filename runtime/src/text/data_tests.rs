//! Tests of data: places of what cannot be read, caches that are used only for the same data, and stable held-out documents.

use std::fs;

use super::*;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> DataSpec {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        DataSpec { path, weight: 1.0 }
    }
}

fn read(vocab: &Vocab, data: &[DataSpec]) -> Result<Vec<TokenSource>, TextError> {
    tokenise(vocab, data, &Reading::default(), &Cache::Off, &mut |_, _| ())
}

fn documents(tokens: &Tokens) -> Vec<Vec<u32>> {
    (0..tokens.documents()).map(|i| tokens.ids(tokens.document(i).ids).collect()).collect()
}

fn ids(stream: &TokenStream) -> Vec<u32> {
    stream.tokens().collect()
}

#[test]
fn what_cannot_be_read_is_placed() {
    let place = Place::new();
    let message = |vocab: &Vocab, spec: &DataSpec| read(vocab, std::slice::from_ref(spec)).unwrap_err().to_string();
    let text = "line\n".repeat(80_000);
    let latin = place.put("latin.txt", [text.as_bytes(), b"two\nab\xff"].concat());
    let error = message(&Vocab::o200k(), &latin);
    assert!(
        error.contains("latin.txt: line 80002 (byte offset 400006) is not UTF-8, which vocabulary o200k"),
        "{error}"
    );
    assert_eq!(read(&Vocab::bytes(), &[latin]).unwrap()[0].tokens.len(), 400_007);
    let zeros = place.put("a.bin", b"one\ntwo\0");
    for vocab in [Vocab::bytes(), Vocab::o200k()] {
        let error = message(&vocab, &zeros);
        assert!(error.contains("a.bin: line 2 (byte offset 7) has a zero byte"), "{error}");
    }
    let reading = Reading { binary: true, field: None };
    let tokens = tokenise(&Vocab::bytes(), &[zeros], &reading, &Cache::Off, &mut |_, _| ()).unwrap();
    assert_eq!(tokens[0].tokens.ids(7..8).collect::<Vec<_>>(), [0]);
    let lines = place.put("a.jsonl", "{\"text\": \"fine\"}\n{\"text\": \"fine\"}\n{\"text\": }\n");
    let error = message(&Vocab::bytes(), &lines);
    assert!(error.contains("a.jsonl: line 3: column 10: expected value"), "{error}");
    let blank = place.put("b.jsonl", "{\"text\": \"\"}\n");
    assert!(message(&Vocab::bytes(), &blank).contains("b.jsonl: no document with text"));
    assert!(read(&Vocab::bytes(), &[]).unwrap_err().to_string().contains("at least one"));
}

#[test]
fn folders_and_records_become_documents() {
    let place = Place::new();
    place.put("d/b.txt", "second");
    place.put(
        "d/a.jsonl",
        "{\"text\": \"first\"}\n{\"text\": \"\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}",
    );
    place.put("d/c/x.txt", "third");
    let folder = DataSpec { path: place.0.path().join("d"), weight: 1.0 };
    let sources = read(&Vocab::bytes(), &[folder]).unwrap();
    let texts: Vec<Vec<u8>> = documents(&sources[0].tokens).iter().map(|d| Vocab::bytes().decode(d)).collect();
    assert_eq!(texts, [&b"first"[..], b"user: hi\n", b"second", b"third"]);
}

#[test]
fn every_vocabulary_serves_and_reports_progress() {
    let place = Place::new();
    let data = [place.put("x.txt", "the cat – the cat"), place.put("y.jsonl", "{\"text\": \"the dog <|endoftext|>\"}")];
    let path = place.0.path().join("v");
    Vocab::restricted(Vocab::o200k().encode("the cat")).save(&path).unwrap();
    let total: u64 = data.iter().map(|d| fs::metadata(&d.path).unwrap().len()).sum();
    for spec in [VocabSpec::Bytes, VocabSpec::O200k, VocabSpec::Restricted, VocabSpec::File(path)] {
        let mut calls = Vec::new();
        let hear = &mut |done, all| calls.push((done, all));
        let (vocab, sources) = prepare(&spec, &data, &Reading::default(), &Cache::Off, hear).unwrap();
        assert!(calls.is_sorted() && calls.last() == Some(&(total, total)), "{calls:?}");
        let texts = ["the cat – the cat", "the dog <|endoftext|>"];
        for (source, text) in sources.iter().zip(texts) {
            let ids = documents(&source.tokens).concat();
            assert_eq!(vocab.decode(&ids), text.as_bytes(), "{spec:?}");
            assert!(!ids.contains(&vocab.end_of_document()));
            assert_eq!(ids, vocab.encode(text), "{spec:?}");
        }
        if spec == VocabSpec::Restricted {
            // A saved restriction that has all the ids shares the tokens of o200k.
            let again = read(&vocab, &data).unwrap();
            assert_eq!(again[0].tokens.checksum(), sources[0].tokens.checksum());
            assert_eq!(documents(&again[1].tokens), documents(&sources[1].tokens));
        }
    }
}

#[test]
fn a_cache_is_used_for_the_same_data_only() {
    let place = Place::new();
    let data = [place.put("x.txt", "the cat sat on the mat. ".repeat(50)), place.put("y.txt", "a dog")];
    let folder = place.0.path().join("cache/deep");
    let run = |vocab: &Vocab, reading: &Reading| {
        let found = tokenise(vocab, &data, reading, &Cache::Folder(folder.clone()), &mut |_, _| ()).unwrap();
        let fresh = tokenise(vocab, &data, reading, &Cache::Off, &mut |_, _| ()).unwrap();
        for (a, b) in found.iter().zip(&fresh) {
            assert_eq!(documents(&a.tokens), documents(&b.tokens));
            assert_eq!(a.tokens.checksum(), b.tokens.checksum(), "the same with and without a cache");
        }
        found.iter().map(|s| s.cached.clone().unwrap().1).collect::<Vec<_>>()
    };
    use Cached::{Reused, Written};
    let (plain, binary) = (Reading::default(), Reading { binary: true, field: None });
    let bytes = Vocab::bytes();
    assert_eq!(run(&bytes, &plain), [Written, Written]);
    assert_eq!(run(&bytes, &plain), [Reused, Reused]);
    assert_eq!(run(&Vocab::o200k(), &plain), [Written, Written]);
    assert_eq!(run(&bytes, &binary), [Written, Written]);
    assert_eq!(run(&bytes, &plain), [Reused, Reused]);
    // The same content at another time; the same size with other content; another size.
    let text = fs::read(&data[1].path).unwrap();
    fs::write(&data[1].path, &text).unwrap();
    assert_eq!(run(&bytes, &plain), [Reused, Reused]);
    fs::write(&data[1].path, "a hog").unwrap();
    assert_eq!(run(&bytes, &plain), [Reused, Written]);
    fs::write(&data[1].path, "a hedgehog").unwrap();
    assert_eq!(run(&bytes, &plain), [Reused, Written]);
    // A damaged or foreign cache is replaced.
    for file in fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        let mut content = fs::read(&path).unwrap();
        content[20] ^= 1;
        fs::write(&path, content).unwrap();
    }
    assert_eq!(run(&bytes, &plain), [Written, Written]);
    assert_eq!(run(&bytes, &plain), [Reused, Reused]);
    // Small data are not worth a cache that nobody asked for.
    let automatic = Cache::Automatic(place.0.path().join("other"));
    let found = tokenise(&bytes, &data, &plain, &automatic, &mut |_, _| ()).unwrap();
    assert!(found.iter().all(|s| s.cached.is_none()) && !place.0.path().join("other").exists());
}

#[test]
fn a_cache_that_cannot_be_written_matters_only_if_asked_for() {
    let place = Place::new();
    let data = [place.put("x.txt", "line\n".repeat(1 << 20))];
    let file = place.put("file", "not a folder").path;
    let with = |cache| tokenise(&Vocab::bytes(), &data, &Reading::default(), &cache, &mut |_, _| ());
    let error = with(Cache::Folder(file.clone())).unwrap_err().to_string();
    assert!(error.contains("cannot write the token cache"), "{error}");
    let tokens = with(Cache::Automatic(file)).unwrap();
    assert!(tokens[0].cached.is_none() && tokens[0].tokens.len() == 5 << 20);
    let good = place.0.path().join("cache");
    let tokens = with(Cache::Automatic(good.clone())).unwrap();
    assert_eq!(tokens[0].cached.as_ref().unwrap().1, Cached::Written);
    // Data that cannot be read are an error, and leave no cache.
    let bad = [place.put("z.txt", "line\n".repeat(1 << 20) + "\0")];
    let error = tokenise(&Vocab::bytes(), &bad, &Reading::default(), &Cache::Automatic(good.clone()), &mut |_, _| ());
    assert!(error.unwrap_err().to_string().contains("line 1048577"));
    assert_eq!(fs::read_dir(good).unwrap().count(), 1);
}

fn source(texts: &[&str]) -> TokenSource {
    TokenSource::of_documents("memory", &Vocab::bytes(), texts).unwrap()
}

#[test]
fn the_end_of_a_single_document_is_held_out() {
    let text: String = ('\u{0}'..='\u{63}').collect();
    let parts = split(&[source(&[&text])], 0.25, 256).unwrap();
    assert_eq!(ids(&parts.train[0].1), (0..75).chain([256]).collect::<Vec<_>>());
    assert_eq!(ids(&parts.validation), (75..100).chain([256]).collect::<Vec<_>>());
    let most = split(&[source(&[&text])], 0.999, 256).unwrap();
    assert_eq!(ids(&most.train[0].1), [0, 256]);
    let none = split(&[source(&[&text])], 0.0, 256).unwrap();
    assert_eq!((none.train[0].1.len(), none.validation.is_empty()), (101, true));
    for bad in [1.0, -0.1, f64::NAN] {
        assert!(split(&[], bad, 256).unwrap_err().to_string().contains("from 0 to below 1"));
    }
}

#[test]
fn held_out_documents_depend_on_their_text_alone() {
    let texts: Vec<String> = (0..400).map(|i| format!("document {i}")).collect();
    let held = |texts: &[&str], fraction| -> Vec<String> {
        let source = source(texts);
        let hashes: Vec<u64> = (0..source.tokens.documents()).map(|i| source.tokens.document(i).hash).collect();
        let held = held_out(&hashes, fraction);
        texts.iter().zip(held).filter(|(_, held)| *held).map(|(text, _)| text.to_string()).collect()
    };
    let all: Vec<&str> = texts.iter().map(String::as_str).collect();
    let some = held(&all, 0.1);
    assert!((25..55).contains(&some.len()), "{}", some.len());
    let mut backwards: Vec<&str> = all.iter().rev().copied().collect();
    let mut found = held(&backwards, 0.1);
    found.reverse();
    assert_eq!(found, some, "the order is no matter");
    let part: Vec<String> = held(&all[..200], 0.1);
    assert!(some.starts_with(&part), "more data move nothing");
    assert!(some.iter().all(|s| held(&all, 0.2).contains(s)), "a larger share has the smaller one");
    backwards.push(&some[0]);
    assert_eq!(held(&backwards, 0.1).len(), some.len() + 1, "copies stay together");
    for texts in [&["a", "b"][..], &["a", "b", "c"]] {
        for fraction in [1e-9, 0.5, 0.999] {
            let n = held(texts, fraction).len();
            assert!(n >= 1 && n < texts.len(), "{fraction}: {n} of {}", texts.len());
        }
        assert_eq!(held(texts, 0.0).len(), 0);
    }
}

#[test]
fn sources_of_one_weight_are_one_stream() {
    let weighted = |text: &str, weight| TokenSource { weight, ..source(&[text]) };
    let sources = [weighted("aa", 1.0), weighted("bb", 2.0), weighted("cc", 1.0)];
    let parts = split(&sources, 0.0, 256).unwrap();
    let found: Vec<_> = parts.train.iter().map(|(w, stream)| (*w, ids(stream))).collect();
    assert_eq!(found, [(1.0, vec![97, 97, 256, 99, 99, 256]), (2.0, vec![98, 98, 256])]);
}
