//! Training of a vocabulary of byte pairs: the most frequent pair of neighbours becomes a token, again and again.
//!
//! The result depends on the texts and the size alone: of pairs that are as frequent as one another, the one with the smallest ids wins.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use rayon::prelude::*;

use super::bpe::{Bpe, MAX_SIZE, MAX_TOKEN};
use super::data::{ProgressFn, text_in};
use super::input::{DataSpec, Pieces, Reading, list};
use super::jsonl::record_text;
use super::vocab::Vocab;
use super::{TextError, o200k};

/// Bytes of text whose words are counted at a time.
const GROUP_BYTES: usize = 8 << 20;
/// More different words than this are not kept: the rarest are forgotten.
const MAX_WORDS: usize = 1 << 22;
/// A pair that occurs less often becomes no token.
const MIN_COUNT: i64 = 2;

type Words = HashMap<Box<str>, i64>;
type Pair = (u32, u32);

/// A vocabulary of `size` ids for the texts of `data`: 256 bytes, merges, and the end of a document. It has fewer ids if no more pairs
/// occur twice. Words beyond 256 bytes are not looked at.
///
/// # Errors
/// A size below 257 or above 262144, or data that cannot be read.
pub fn train_vocab(
    data: &[DataSpec],
    reading: &Reading,
    size: usize,
    progress: ProgressFn<'_>,
) -> Result<Vocab, TextError> {
    if !(257..=MAX_SIZE).contains(&size) {
        return Err(TextError::BadSize { size, what: format!("expected 257 to {MAX_SIZE}") });
    }
    let words = count(data, reading, progress)?;
    let bpe = Bpe::new(merges(words, size - 257)).unwrap_or_else(|(i, what)| panic!("trained merge {i}: {what}"));
    Ok(Vocab::bpe(bpe))
}

fn count(data: &[DataSpec], reading: &Reading, progress: ProgressFn<'_>) -> Result<Words, TextError> {
    if data.is_empty() {
        return Err(TextError::NoFiles);
    }
    let lists = data.iter().map(|d| list(&d.path)).collect::<Result<Vec<_>, _>>()?;
    let total = lists.iter().flatten().map(|f| f.size).sum();
    let (mut words, mut done) = (Words::new(), 0);
    progress(0, total);
    for file in lists.iter().flatten() {
        let mut pieces = Pieces::open(file, reading, true)?;
        loop {
            let (mut group, mut bytes) = (vec![], 0);
            while bytes < GROUP_BYTES
                && let Some(piece) = pieces.next()?
            {
                bytes += piece.bytes.len();
                group.push(piece);
            }
            if group.is_empty() {
                break;
            }
            let source = || file.path.display().to_string();
            let records = pieces.is_records();
            let counted: Vec<Words> = group
                .par_iter()
                .map(|piece| {
                    let bad = |what| TextError::BadRecord { source: source(), line: piece.line, what };
                    let text = match records {
                        true => record_text(&piece.bytes, reading.field.as_deref()).map_err(bad)?,
                        false => text_in(piece, reading, &source(), "bpe")?.to_owned(),
                    };
                    let mut words = Words::new();
                    o200k::words(&text, |word| add(&mut words, word, 1));
                    Ok(words)
                })
                .collect::<Result<_, TextError>>()?;
            for (word, n) in counted.into_iter().flatten() {
                *words.entry(word).or_insert(0) += n;
            }
            forget(&mut words, MAX_WORDS);
            progress(done + pieces.bytes_read(), total);
        }
        pieces.finish()?;
        done += file.size;
    }
    Ok(words)
}

fn add(words: &mut Words, word: &str, n: i64) {
    if word.len() > MAX_TOKEN {
        return;
    }
    match words.get_mut(word) {
        Some(count) => *count += n,
        None => drop(words.insert(word.into(), n)),
    }
}

/// Forgets the rarest words of more than `most`.
fn forget(words: &mut Words, most: usize) {
    let mut least = 1;
    while words.len() > most {
        words.retain(|_, n| *n > least);
        least *= 2;
    }
}

/// At most `most` merges.
fn merges(words: Words, most: usize) -> Vec<Pair> {
    let mut sorted: Vec<(Box<str>, i64)> = words.into_iter().collect();
    sorted.sort_unstable();
    let counts: Vec<i64> = sorted.iter().map(|w| w.1).collect();
    let mut words: Vec<Vec<u32>> = sorted.iter().map(|w| w.0.bytes().map(u32::from).collect()).collect();
    let mut pairs: HashMap<Pair, i64> = HashMap::new();
    let mut places: HashMap<Pair, Vec<u32>> = HashMap::new();
    for (word, index) in words.iter().zip(0..) {
        for pair in word.windows(2).map(|w| (w[0], w[1])) {
            *pairs.entry(pair).or_insert(0) += counts[index as usize];
            let places = places.entry(pair).or_default();
            if places.last() != Some(&index) {
                places.push(index);
            }
        }
    }
    let mut heap: BinaryHeap<(i64, Reverse<Pair>)> = pairs.iter().map(|(&pair, &n)| (n, Reverse(pair))).collect();
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
    let mut known: HashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut out = vec![];
    while out.len() < most
        && let Some((n, Reverse(pair))) = heap.pop()
    {
        let now = pairs.get(&pair).copied().unwrap_or(0);
        if now != n {
            // Counts on the heap are those of an earlier time, never too small.
            heap.extend((now >= MIN_COUNT).then_some((now, Reverse(pair))));
            continue;
        }
        if n < MIN_COUNT {
            break;
        }
        let bytes = [&tokens[pair.0 as usize][..], &tokens[pair.1 as usize]].concat();
        // Another pair may have made the same bytes: then they are the same token.
        let id = *known.entry(bytes).or_insert_with_key(|bytes| {
            out.push(pair);
            tokens.push(bytes.clone());
            tokens.len() as u32 - 1
        });
        let mut changed = HashSet::new();
        for index in places.remove(&pair).unwrap_or_default() {
            let (word, n) = (&mut words[index as usize], counts[index as usize]);
            let merged = merge(word, pair, id);
            if merged.len() == word.len() {
                continue;
            }
            for pair in word.windows(2).map(|w| (w[0], w[1])) {
                *pairs.entry(pair).or_insert(0) -= n;
            }
            for pair in merged.windows(2).map(|w| (w[0], w[1])) {
                *pairs.entry(pair).or_insert(0) += n;
                if pair.0 == id || pair.1 == id {
                    let places = places.entry(pair).or_default();
                    if places.last() != Some(&index) {
                        places.push(index);
                    }
                    changed.insert(pair);
                }
            }
            *word = merged;
        }
        pairs.remove(&pair);
        heap.extend(changed.into_iter().map(|pair| (pairs[&pair], Reverse(pair))));
    }
    out
}

/// A word with every occurrence of a pair, from the left, replaced.
fn merge(word: &[u32], pair: Pair, id: u32) -> Vec<u32> {
    let (mut out, mut at) = (Vec::with_capacity(word.len()), 0);
    while at < word.len() {
        if at + 1 < word.len() && (word[at], word[at + 1]) == pair {
            out.push(id);
            at += 2;
        } else {
            out.push(word[at]);
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The obvious way: count all pairs anew for every merge.
    fn naive(words: &Words, most: usize) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, i64)> =
            words.iter().map(|(w, &n)| (w.bytes().map(u32::from).collect(), n)).collect();
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
        let mut out = vec![];
        while out.len() < most {
            let mut pairs: HashMap<Pair, i64> = HashMap::new();
            for (word, n) in &words {
                word.windows(2).for_each(|w| *pairs.entry((w[0], w[1])).or_insert(0) += n);
            }
            let best = pairs.into_iter().filter(|p| p.1 >= MIN_COUNT).max_by_key(|&(pair, n)| (n, Reverse(pair)));
            let Some((pair, _)) = best else { break };
            let bytes = [&tokens[pair.0 as usize][..], &tokens[pair.1 as usize]].concat();
            let id = tokens.iter().position(|t| *t == bytes).unwrap_or_else(|| {
                out.push(pair);
                tokens.push(bytes);
                tokens.len() - 1
            });
            words.iter_mut().for_each(|(word, _)| *word = merge(word, pair, id as u32));
        }
        out
    }

    fn corpus() -> Words {
        let mut words = Words::new();
        let text = super::super::corpus::documents()[..3].join("\n") + &" aaaaaaa aaaa abababab".repeat(20);
        o200k::words(&text, |word| add(&mut words, word, 1));
        words
    }

    #[test]
    fn training_matches_the_naive_one() {
        let words = corpus();
        assert!(words.len() > 500);
        let found = merges(words.clone(), 300);
        assert_eq!(found.len(), 300);
        assert_eq!(found, naive(&words, 300));
        let few: Words = [("aaaa".into(), 1), ("ab".into(), 1)].into();
        assert_eq!(merges(few.clone(), 9), naive(&few, 9));
        assert_eq!(merges(Words::new(), 9), []);
    }

    #[test]
    fn trained_vocabularies_round_trip_and_shorten() {
        let vocab = Vocab::bpe(Bpe::new(merges(corpus(), 600)).unwrap());
        for text in ["the kernel of the plan", "Grüße 🜚\n\n\tfn main() {}", "<|endoftext|>", ""] {
            assert_eq!(vocab.decode(&vocab.encode(text)), text.as_bytes());
        }
        assert!(vocab.encode("the kernel of the plan").len() < 12);
        assert_eq!(Vocab::from_text(&vocab.to_text()).unwrap(), vocab);
    }

    #[test]
    fn rare_words_are_forgotten_first() {
        let mut words: Words = (0..100).map(|i| (format!("w{i}").into(), i)).collect();
        forget(&mut words, 40);
        assert!(words.len() <= 40 && words.values().all(|&n| n > 32), "{}", words.len());
    }
}
