//! Rows of conversations: what counts, what is cut, and the order.

use super::super::pack::IGNORE;
use super::*;
use std::fs;
use std::path::Path;

fn write(folder: &Path, n: usize) -> DataSpec {
    let line = |i: usize| {
        let (ask, say) = ("q".repeat(1 + i % 3), "a".repeat(1 + i % 4));
        format!(
            "{{\"messages\": [{{\"role\": \"u\", \"content\": \"{ask}{i}\"}}, {{\"role\": \"assistant\", \"content\": \"{say}\"}}]}}\n"
        )
    };
    let path = folder.join("chat.jsonl");
    fs::write(&path, (0..n).map(line).collect::<String>()).expect("written");
    DataSpec { path, weight: 1.0 }
}

/// The text of the positions of a row whose label counts, and that of the labels.
fn shown(batch: &Batch, row: usize) -> String {
    let labels = &batch.labels[row * batch.seq..][..batch.seq];
    labels
        .iter()
        .filter(|&&l| l != IGNORE)
        .map(|&l| char::from_u32(l as u32).filter(|_| l < 256).unwrap_or('$'))
        .collect()
}

#[test]
fn only_answers_count() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = write(folder.path(), 40);
    let vocab = Vocab::bytes();
    let (train, held) = answers(&vocab, &[data], None, 64, 0.2, 3).expect("read");
    let (a, b) = (train.taken(), held.taken());
    assert_eq!((a.examples + b.examples, a.cut + b.cut, a.skipped + b.skipped), (40, 0, 0));
    assert!(b.examples > 2 && train.checksum() == held.checksum());
    let (batch, position) = train.next(0, train.rows(), 64);
    assert_eq!(
        (batch.tokens.len(), batch.labels.len(), batch.seg.len()),
        (64 * train.rows(), 64 * train.rows(), 64 * train.rows())
    );
    assert_eq!((position, batch.counted()), (64 * train.rows() as u64, a.counted));
    for row in 0..train.rows() {
        let text = shown(&batch, row);
        assert!(
            text.split('$').all(|answer| answer.is_empty() || (answer.starts_with(" a") && answer.ends_with("a\n"))),
            "{text:?}"
        );
        let seg = &batch.seg[row * 64..][..64];
        assert!(seg.windows(2).all(|w| w[1] == w[0] || w[1] == w[0] + 1) && seg[0] == 0, "{seg:?}");
    }
    let measured = held.measure(0..held.rows(), held.rows() + 1, 64);
    assert_eq!((measured.counted(), measured.tokens.len()), (b.counted, 64 * (held.rows() + 1)));
    // A pass has every row once, and the next one has another order.
    let rows = |from: u64| -> Vec<String> {
        let (batch, _) = train.next(from, train.rows(), 64);
        (0..train.rows()).map(|row| format!("{:?}", &batch.tokens[row * 64..][..64])).collect()
    };
    let (mut first, mut second) = (rows(0), rows(position));
    assert_ne!(first, second);
    first.sort();
    second.sort();
    assert_eq!(first, second);
}

#[test]
fn long_conversations_are_cut_and_those_without_an_answer_left_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("chat.jsonl");
    let line = |ask: usize, say: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"u\", \"content\": \"{}\"}}, {{\"role\": \"assistant\", \"content\": \"{}\"}}]}}\n",
            "q".repeat(ask),
            "a".repeat(say)
        )
    };
    fs::write(&path, [line(2, 3), line(2, 90), line(80, 3)].concat()).expect("written");
    let data = [DataSpec { path, weight: 1.0 }];
    let (train, held) = answers(&Vocab::bytes(), &data, None, 32, 0.0, 0).expect("read");
    assert_eq!((train.taken().examples, train.taken().cut, train.taken().skipped), (2, 1, 1));
    assert_eq!((held.rows(), held.measured_rows(32)), (0, 0));
    // "u: qq\n\nassistant:" are 17 bytes: the row has 16 labels of answers behind them.
    assert_eq!(train.rows(), 2, "neither fits beside the other");
    let batch = train.measure(1..2, 1, 32);
    assert_eq!(batch.counted(), 16);
    let error = answers(&Vocab::bytes(), &data, None, 4, 0.0, 0).expect_err("no answers").to_string();
    assert!(error.contains("3 of them have no answer within a row of 4 tokens"), "{error}");
}
