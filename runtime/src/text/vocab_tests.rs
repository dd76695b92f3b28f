//! Tests of the vocabularies: round trips, control tokens in user text, damaged vocabulary files.

use super::*;

fn own() -> Vocab {
    // "th" "the" "  "
    Vocab::bpe(Bpe::new(vec![(116, 104), (256, 101), (32, 32)]).unwrap())
}

fn small() -> Vocab {
    Vocab::restricted(Vocab::o200k().encode("the cat sat on the mat\nand the dog did too"))
}

#[test]
fn every_vocabulary_round_trips_every_text() {
    for vocab in [Vocab::bytes(), Vocab::o200k(), small(), own()] {
        for text in ["", "the cat", "Grüße, 世界 🜚\r\n\tend", "unseen hippopotamus\u{0}\u{7f}"] {
            let ids = vocab.encode(text);
            assert_eq!(vocab.decode(&ids), text.as_bytes(), "{}", vocab.name());
            assert_eq!(vocab.encode_bytes(text.as_bytes()).as_ref(), Ok(&ids));
            assert_eq!(ids.iter().map(|&id| vocab.bytes_of(id)).sum::<usize>(), text.len());
            assert!(ids.iter().all(|&id| vocab.is_assigned(id) && id != vocab.end_of_document()));
        }
        assert_eq!(vocab.decode(&[vocab.end_of_document(), u32::MAX]), b"");
        assert_eq!(vocab.bytes_of(vocab.end_of_document()), 0);
        assert!(!vocab.is_assigned(vocab.size() as u32));
    }
}

#[test]
fn control_tokens_in_text_stay_text() {
    let text = "a<|endoftext|>b<|pad|><|endofprompt|>";
    for vocab in [Vocab::bytes(), Vocab::o200k(), small(), own()] {
        let ids = vocab.encode(text);
        assert!(!ids.contains(&vocab.end_of_document()));
        assert!(ids.iter().all(|&id| vocab.bytes_of(id) > 0));
        assert_eq!(vocab.decode(&ids), text.as_bytes());
    }
}

#[test]
fn sizes_and_special_ids() {
    assert_eq!((Vocab::bytes().size(), Vocab::bytes().end_of_document()), (257, 256));
    assert_eq!((Vocab::o200k().size(), Vocab::o200k().end_of_document()), (200_073, 199_999));
    let mut logits = vec![0.0; 200_073];
    Vocab::o200k().mask_unassigned(&mut logits);
    let masked: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] != 0.0).collect();
    assert_eq!(masked, [199_998].into_iter().chain(200_000..=200_017).collect::<Vec<_>>());
    assert!(masked.iter().all(|&i| !Vocab::o200k().is_assigned(i as u32)));
}

#[test]
fn restriction_keeps_what_occurs_and_spells_the_rest() {
    let (vocab, full) = (small(), Vocab::o200k());
    let seen = "the cat sat on the mat";
    assert_eq!(vocab.encode(seen).len(), full.encode(seen).len());
    assert_eq!(vocab.encode(" hippopotamus").len(), " hippopotamus".len());
    assert!(vocab.size() < 257 + 20 && vocab.end_of_document() as usize == vocab.size() - 1);
    assert_eq!(Vocab::restricted([199_998, 200_058, u32::MAX]).size(), 257);
}

#[test]
fn text_form_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.txt");
    for vocab in [Vocab::bytes(), Vocab::o200k(), small(), own()] {
        assert_eq!(Vocab::from_text(&vocab.to_text()).unwrap(), vocab);
        vocab.save(&path).unwrap();
        assert_eq!(Vocab::load(&path).unwrap(), vocab);
    }
}

#[test]
fn damaged_files_are_refused_with_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.txt");
    let check = |content: &[u8], line: usize, what: &str| {
        std::fs::write(&path, content).unwrap();
        let message = Vocab::load(&path).unwrap_err().to_string();
        assert!(message.contains(&format!("v.txt: line {line}: ")) && message.contains(what), "{message}");
    };
    let good = small().to_text();
    check(b"", 1, "expected \"chimera-vocab ...\"");
    check(b"chimera-vocab 2\nkind bytes\n", 1, "expected 1");
    check(b"chimera-vocab 1\n", 2, "expected \"kind ...\"");
    check(b"chimera-vocab 1\nkind o201k\n", 2, "expected bytes, o200k, o200k:restricted or bpe");
    check(b"chimera-vocab 1\nkind bytes\nmore\n", 3, "expected the end of the file");
    check(b"chimera-vocab 1\n\xff\n", 2, "not UTF-8");
    check(good.replacen("tokens ", "tokens 9", 1).as_bytes(), 3, "the list has");
    check(&good.as_bytes()[..good.len() - 3], 4, "crc32c");
    check(&vec![b'x'; MAX_FILE as usize + 1], 1, "bytes");
    for cut in 0..good.len() {
        assert!(Vocab::from_text(&good[..cut]).is_err(), "cut at {cut}");
    }
    let with = |ranges: &str| {
        let sum = crc32c::crc32c(ranges.as_bytes());
        format!("chimera-vocab 1\nkind o200k:restricted\ntokens 257\ncrc32c {sum:08x}\n{ranges}").into_bytes()
    };
    check(&with("0-300\n300-400\n199999\n"), 6, "ascending");
    check(&with("0-4294967295\n"), 5, "199998");
    check(&with("0-300\nx\n"), 6, "a range");
    check(&with("0-300\n"), 5, "end of text");
    check(&with("1-300\n199999\n"), 6, "single-byte");
    let pairs = |merges: &str| {
        let (n, sum) = (257 + merges.lines().count(), crc32c::crc32c(merges.as_bytes()));
        format!("chimera-vocab 1\nkind bpe\ntokens {n}\ncrc32c {sum:08x}\n{merges}").into_bytes()
    };
    check(&pairs("97 98\n97\n"), 6, "two ids");
    check(&pairs("97 98\n257 97\n"), 6, "below 257");
    check(&pairs("97 98\n99 99\n97 98\n"), 7, "twice");
    let doubling: String = (0..9).map(|i| format!("{0} {0}\n", if i == 0 { 97 } else { 255 + i })).collect();
    check(&pairs(&doubling), 13, "256 bytes");
}

#[test]
fn own_vocabularies_merge_in_their_order() {
    let vocab = own();
    assert_eq!((vocab.size(), vocab.end_of_document(), vocab.name()), (260, 259, "bpe"));
    assert_eq!(vocab.encode("the th  x"), [257, 32, 256, 32, 32, 120]);
    assert_eq!(vocab.bytes_of(257), 3);
    let again = Vocab::from_text(&vocab.to_text()).unwrap();
    assert!(again == vocab && again.checksum() == vocab.checksum() && again != Vocab::bpe(Bpe::new(vec![]).unwrap()));
}

#[test]
fn the_restricted_loss_is_explained() {
    let meaning = small().meaning().unwrap();
    assert!(meaning.contains(&format!("over {} of the 200073 ids", small().size())), "{meaning}");
    assert!([Vocab::bytes(), Vocab::o200k(), own()].iter().all(|v| v.meaning().is_none()));
}
