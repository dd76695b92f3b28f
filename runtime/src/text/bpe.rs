//! Byte pairs: a vocabulary of one's own that begins with the 256 bytes and merges two known tokens at a time.
//!
//! Ids are bytes, then merges in the order in which they were learned and are applied, then the end of a document. Text falls into the
//! same words as for o200k before it is merged.

use std::fmt;

use splintr::{FxHashMap, FxHashSet, O200K_BASE_PATTERN, Tokenizer};

/// Most ids of a vocabulary.
pub(super) const MAX_SIZE: usize = 262_144;
/// Most bytes of a token.
pub(super) const MAX_TOKEN: usize = 256;

/// Merges, and what follows from them.
pub(super) struct Bpe {
    merges: Vec<(u32, u32)>,
    /// Bytes of all tokens one behind the other, and where each one ends.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    tokenizer: Tokenizer,
}

impl Bpe {
    /// A vocabulary of 256 bytes, these merges and the end of a document.
    ///
    /// # Errors
    /// The number of the merge, from 0, that names an unknown token, makes one that is there already or too long, and what is wrong.
    pub(super) fn new(merges: Vec<(u32, u32)>) -> Result<Bpe, (usize, String)> {
        if merges.len() > MAX_SIZE - 257 {
            return Err((MAX_SIZE - 257, format!("found more than {} merges, expected no more", MAX_SIZE - 257)));
        }
        let (mut bytes, mut ends): (Vec<u8>, Vec<u32>) = ((0..=255).collect(), (1..=256).collect());
        let mut seen = FxHashSet::default();
        for (index, &(a, b)) in merges.iter().enumerate() {
            let known = ends.len() as u32;
            if a >= known || b >= known {
                return Err((index, format!("found the ids {a} and {b}, expected two below {known}")));
            }
            let start = bytes.len();
            for id in [a, b] {
                bytes.extend_from_within(range(&ends, id));
            }
            if bytes.len() - start > MAX_TOKEN {
                return Err((index, format!("the token has more than {MAX_TOKEN} bytes")));
            }
            if !seen.insert(bytes[start..].to_vec()) {
                return Err((index, format!("the ids {a} and {b} make a token twice")));
            }
            ends.push(bytes.len() as u32);
        }
        let ranks: FxHashMap<Vec<u8>, u32> =
            (0..ends.len() as u32).map(|id| (bytes[range(&ends, id)].to_vec(), id)).collect();
        let none = FxHashMap::<String, u32>::default();
        let tokenizer = Tokenizer::new(ranks, none, O200K_BASE_PATTERN);
        Ok(Bpe { merges, bytes, ends, tokenizer: tokenizer.expect("the pattern of o200k compiles") })
    }

    /// Number of ids.
    pub(super) fn size(&self) -> usize {
        self.ends.len() + 1
    }

    /// Pairs of ids in the order of the ids they make, from 256 on.
    pub(super) fn merges(&self) -> &[(u32, u32)] {
        &self.merges
    }

    /// The bytes of a token; none for the end of a document and ids outside.
    pub(super) fn bytes_of(&self, id: u32) -> &[u8] {
        if (id as usize) < self.ends.len() { &self.bytes[range(&self.ends, id)] } else { &[] }
    }

    /// Encodes ordinary text: there are no control tokens that it could spell.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode_ordinary(text)
    }
}

fn range(ends: &[u32], id: u32) -> std::ops::Range<usize> {
    let id = id as usize;
    let start = id.checked_sub(1).map_or(0, |before| ends[before]);
    start as usize..ends[id] as usize
}

impl PartialEq for Bpe {
    fn eq(&self, other: &Bpe) -> bool {
        self.merges == other.merges
    }
}

impl Eq for Bpe {}

impl fmt::Debug for Bpe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bpe").field("merges", &self.merges.len()).finish_non_exhaustive()
    }
}
