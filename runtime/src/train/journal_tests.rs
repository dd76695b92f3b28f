//! Journals as they are written, and as damage leaves them.

use super::*;

fn step(step: u64) -> StepRecord {
    let loss = 3.0 + 1.0 / step as f64;
    let (c, loads) = (vec![1.5, -0.25 * step as f32], vec![step as i32, -7, i32::MIN]);
    let stage = Stage { length: step as u16 % 4, thaw: step as u16 % 5 };
    StepRecord { step, rollbacks: 0, position: 300 * step, lr: 0.01, loss, seconds: 0.5 * step as f64, c, loads, stage }
}

fn header() -> Header {
    Header::new(0, "{}", "7 tokens")
}

/// A journal of these records and the offsets behind them.
fn journal(records: &[Record]) -> (Vec<u8>, Vec<usize>) {
    let mut bytes = header().to_bytes();
    let ends = records.iter().map(|r| {
        r.write(&mut bytes);
        bytes.len()
    });
    let ends = ends.collect();
    (bytes, ends)
}

fn steps(range: std::ops::RangeInclusive<u64>) -> Vec<Record> {
    range.map(|n| Record::Step(step(n))).collect()
}

fn trail_of(bytes: &[u8], from: u64, rollbacks: u32) -> Trail {
    trail(read(bytes).expect("a header").1, from, rollbacks)
}

fn numbers(trail: &Trail) -> Vec<u64> {
    trail.steps.iter().map(|s| s.step).collect()
}

#[test]
fn records_are_small_and_come_back() {
    let back = Record::Rollback(Rollback { at: 9, to: 4, position: 77, rollbacks: 1, loss: f64::NAN });
    let mut bytes = vec![];
    back.write(&mut bytes);
    let Some((Record::Rollback(r), size)) = Record::read(&bytes) else { panic!("a rollback") };
    assert!(r.loss.is_nan() && (r.at, r.to, r.position, r.rollbacks, size) == (9, 4, 77, 1, bytes.len()));
    for n in [1, 127, 128, u64::MAX / 300] {
        let mut bytes = vec![];
        Record::Step(step(n)).write(&mut bytes);
        assert_eq!(Record::read(&bytes), Some((Record::Step(step(n)), bytes.len())));
        assert!(bytes.len() < 100, "{} bytes", bytes.len());
        for at in 0..bytes.len() {
            assert_eq!(Record::read(&bytes[..at]), None, "the first {at} bytes");
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert_eq!(Record::read(&flipped), None, "bit flipped in byte {at}");
        }
    }
}

#[test]
fn a_torn_end_is_dropped_at_any_byte() {
    let (bytes, ends) = journal(&steps(1..=5));
    for cut in ends[2]..ends[3] {
        let found = trail_of(&bytes[..cut], 0, 0);
        assert_eq!((numbers(&found), found.end, found.gap), (vec![1, 2, 3], ends[2], None));
        assert_eq!(found.torn, cut - ends[2]);
    }
    assert_eq!(numbers(&trail_of(&bytes, 3, 0)), [4, 5]);
    assert_eq!(numbers(&trail_of(&bytes, 5, 0)), [0u64; 0]);
}

#[test]
fn damage_in_the_middle_ends_the_trail_unless_a_checkpoint_is_behind_it() {
    let (mut bytes, ends) = journal(&steps(1..=6));
    bytes[ends[2] + 9] ^= 1;
    let found = trail_of(&bytes, 0, 0);
    assert_eq!((numbers(&found), found.end), (vec![1, 2, 3], ends[2]));
    assert_eq!((found.gap, found.torn), (Some(Gap { offset: ends[2], behind: 2 }), 0));
    assert_eq!(found.gap, trail_of(&bytes, 3, 0).gap);
    let found = trail_of(&bytes, 4, 0);
    assert_eq!((numbers(&found), found.gap, found.end), (vec![5, 6], None, ends[5]));
}

#[test]
fn what_was_taken_back_is_not_in_the_trail() {
    let again = |n: u64, rollbacks| Record::Step(StepRecord { rollbacks, position: 9000 + n, ..step(n) });
    let back = |rollbacks, to| Record::Rollback(Rollback { at: 5, to, position: 9000, rollbacks, loss: 99.0 });
    let mut records = steps(1..=5);
    records.extend([back(1, 2), again(3, 1), again(4, 1), back(2, 2)]);
    let (bytes, ends) = journal(&records);
    let found = trail_of(&bytes, 0, 0);
    assert_eq!((numbers(&found), found.rollbacks, found.end), (vec![1, 2], 2, ends[8]));
    assert_eq!(found.rollback.map(|r| (r.to, r.position)), Some((2, 9000)));
    // A checkpoint between the returns, and one behind a record that was lost.
    records.push(again(3, 2));
    let (mut bytes, ends) = journal(&records);
    assert_eq!(trail_of(&bytes, 3, 2).steps.len(), 0);
    assert_eq!(numbers(&trail_of(&bytes, 2, 0)), [3]);
    assert_eq!(trail_of(&bytes, 2, 0).steps[0].position, 9003);
    bytes[ends[8] - 1] ^= 1;
    let found = trail_of(&bytes, 0, 0);
    assert_eq!((numbers(&found), found.rollbacks), (vec![1, 2, 3, 4], 1));
    assert_eq!(found.gap, Some(Gap { offset: ends[7], behind: 1 }));
}

#[test]
fn headers_are_checked() {
    let (bytes, _) = journal(&[]);
    let (found, mut items) = read(&bytes).expect("a header");
    assert_eq!((found, items.next()), (header(), None));
    assert_ne!(Header::new(0, "{ }", "7 tokens"), header());
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 4;
        assert!(read(&flipped).is_err() && read(&bytes[..at]).is_err(), "byte {at}");
    }
    let mut newer = bytes.clone();
    newer[8] = 9;
    assert!(read(&newer).expect_err("a later version").contains("version 9"));
}

#[test]
fn a_writer_goes_on_behind_the_trail_and_keeps_what_was_damaged() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(NAME);
    let mut first = Journal::create(folder.path(), &header()).expect("begun");
    steps(1..=4).iter().for_each(|r| first.add(r).expect("written"));
    let error = Journal::resume(folder.path(), &Trail::default()).expect_err("it is being written");
    assert!(error.to_string().contains("another process"), "{error}");
    drop(first);
    let error = Journal::create(folder.path(), &header()).expect_err("there is one");
    assert!(error.to_string().contains(NAME), "{error}");

    let mut bytes = fs::read(&path).expect("read");
    bytes.extend(&MARK);
    fs::write(&path, &bytes).expect("half a record");
    let mut second = Journal::resume(folder.path(), &trail_of(&bytes, 2, 0)).expect("resumed");
    second.add(&Record::Step(step(5))).expect("written");
    drop(second);
    let (whole, ends) = journal(&steps(1..=5));
    assert!(fs::read(&path).expect("read") == whole);

    let mut damaged = whole.clone();
    damaged[ends[1] + 2] ^= 1;
    fs::write(&path, &damaged).expect("damage");
    let mut third = Journal::resume(folder.path(), &trail_of(&damaged, 0, 0)).expect("resumed");
    steps(3..=5).iter().for_each(|r| third.add(r).expect("written"));
    assert!(fs::read(&path).expect("read") == whole);
    assert!(fs::read(folder.path().join(format!("{NAME}.damaged-1"))).expect("a copy") == damaged);
}

#[test]
fn a_journal_without_records_may_be_begun_again() {
    let folder = tempfile::tempdir().expect("a folder");
    drop(Journal::create(folder.path(), &header()).expect("begun"));
    drop(Journal::create(folder.path(), &header()).expect("begun again"));
    fs::write(folder.path().join(NAME), b"CHIM").expect("half a header");
    drop(Journal::create(folder.path(), &header()).expect("begun again"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_of_resources() {
    let folder = tempfile::tempdir().expect("a folder");
    std::os::unix::fs::symlink("/dev/full", folder.path().join(NAME)).expect("a link");
    let error = Journal::create(folder.path(), &header()).expect_err("full");
    assert_eq!(error.exit_code(), 4, "{error}");
}
