//! Tokenised documents as one sequence of bytes: in memory, or mapped from a cache file.
//!
//! Sizes, places, checksums and every id are checked when the bytes are opened; nothing is allocated by what they say before that.
//!
//! Layout, all numbers little-endian: magic (8), version u32, bytes of an id u32 (2 or 4); the ids of all documents one behind the other,
//! without ends; zeros up to a multiple of 8; for each document the number of ids up to its end u64 and a hash of its text u64; what the
//! tokens were made from, as JSON; and 32 bytes: ids u64, documents u64, bytes of JSON u32, crc32c of the ids, crc32c of documents and
//! JSON, crc32c of the 28 bytes before.

use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::TextError;
use super::input::InputFile;
use super::vocab::Vocab;
use crate::files::MappedSlice;

const MAGIC: [u8; 8] = *b"CHIMTOKS";
const VERSION: u32 = 1;
const HEAD: usize = 16;
const TAIL: usize = 32;
/// Bytes of a document in the table.
const DOCUMENT: usize = 16;
/// Most bytes of JSON: a folder with the greatest number of files has less.
const MAX_ORIGIN: usize = 1 << 30;
/// More ids than any vocabulary has.
const MAX_VOCAB: u64 = 1 << 20;
/// Ids that are checked at a time.
const BLOCK: usize = 1 << 20;

/// What tokens were made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Origin {
    /// Kind of the vocabulary, for messages.
    pub vocab: String,
    /// See [`Vocab::checksum`].
    pub vocab_sum: u32,
    /// Number of ids of the vocabulary.
    pub vocab_size: u64,
    /// As in [`super::Reading`].
    pub field: Option<String>,
    /// As in [`super::Reading`].
    pub binary: bool,
    /// The files as they were before they were read.
    pub files: Vec<InputFile>,
    /// Checksums of the files, in order.
    pub sums: Vec<u32>,
}

impl Origin {
    pub(super) fn new(vocab: &Vocab) -> Origin {
        Origin {
            vocab: vocab.name().into(),
            vocab_sum: vocab.checksum(),
            vocab_size: vocab.size() as u64,
            field: None,
            binary: false,
            files: vec![],
            sums: vec![],
        }
    }
}

/// Writes tokens in the layout of this module.
pub(super) struct TokenWriter<W> {
    out: W,
    width: usize,
    ids: u64,
    sum: u32,
    documents: Vec<u8>,
    bytes: Vec<u8>,
}

impl<W: Write> TokenWriter<W> {
    pub(super) fn new(mut out: W, vocab: &Vocab) -> io::Result<TokenWriter<W>> {
        let width = if vocab.size() <= 1 << 16 { 2 } else { 4 };
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&(width as u32).to_le_bytes())?;
        Ok(TokenWriter { out, width, ids: 0, sum: 0, documents: vec![], bytes: vec![] })
    }

    /// Ids of the current document.
    pub(super) fn push(&mut self, ids: &[u32]) -> io::Result<()> {
        self.bytes.clear();
        match self.width {
            2 => self.bytes.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            _ => self.bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
        }
        self.ids += ids.len() as u64;
        self.sum = crc32c::crc32c_append(self.sum, &self.bytes);
        self.out.write_all(&self.bytes)
    }

    /// Ends the document.
    pub(super) fn end(&mut self, hash: u64) {
        self.documents.extend(self.ids.to_le_bytes());
        self.documents.extend(hash.to_le_bytes());
    }

    /// Documents so far.
    pub(super) fn documents(&self) -> usize {
        self.documents.len() / DOCUMENT
    }

    pub(super) fn finish(mut self, origin: &Origin) -> io::Result<W> {
        let json = serde_json::to_vec(origin)?;
        let padding = (self.ids as usize * self.width).next_multiple_of(8) - self.ids as usize * self.width;
        self.out.write_all(&[0; 8][..padding])?;
        self.out.write_all(&self.documents)?;
        self.out.write_all(&json)?;
        let mut tail = Vec::with_capacity(TAIL);
        tail.extend(self.ids.to_le_bytes());
        tail.extend((self.documents() as u64).to_le_bytes());
        tail.extend(u32::try_from(json.len()).map_err(io::Error::other)?.to_le_bytes());
        tail.extend(self.sum.to_le_bytes());
        tail.extend(crc32c::crc32c_append(crc32c::crc32c(&self.documents), &json).to_le_bytes());
        tail.extend(crc32c::crc32c(&tail).to_le_bytes());
        self.out.write_all(&tail)?;
        Ok(self.out)
    }
}

/// Tokenised documents, checked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tokens {
    ids: MappedSlice,
    width: usize,
    documents: MappedSlice,
    origin: Arc<Origin>,
    sum: u32,
    /// What ids stand for, where that is not themselves.
    renamed: Option<Arc<[u32]>>,
}

/// A document among [`Tokens`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its ids.
    pub ids: Range<usize>,
    /// A hash of its text; equal texts have equal hashes.
    pub hash: u64,
}

impl Tokens {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, or does not hold together.
    pub fn open(path: &Path) -> Result<Tokens, TextError> {
        let slice = MappedSlice::open(path).map_err(|e| bad(path, e.to_string()))?;
        Tokens::check(slice, path)
    }

    /// Checks tokens in memory.
    ///
    /// # Errors
    /// When they do not hold together.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Tokens, TextError> {
        Tokens::check(MappedSlice::from_bytes(bytes), &PathBuf::from("<memory>"))
    }

    fn check(all: MappedSlice, path: &Path) -> Result<Tokens, TextError> {
        let fail = |what: String| Err(bad(path, what));
        let Some(tail_at) = all.len().checked_sub(TAIL).filter(|&at| at >= HEAD) else {
            return fail(format!("the file has {} bytes, expected at least {}", all.len(), HEAD + TAIL));
        };
        if all[..8] != MAGIC {
            return fail("the first bytes are not those of a token cache".into());
        }
        let (version, width) = (word(&all, 8), word(&all, 12) as usize);
        if version != VERSION || !matches!(width, 2 | 4) {
            return fail(format!("found version {version} with ids of {width} bytes, expected {VERSION} with 2 or 4"));
        }
        let tail = &all[tail_at..];
        if crc32c::crc32c(&tail[..28]) != word(tail, 28) {
            return fail("the checksum of the last 32 bytes does not match; the file may have been cut off".into());
        }
        let (ids, documents, json) = (long(tail, 0), long(tail, 8), word(tail, 16) as usize);
        let places = || {
            let ids_end = HEAD.checked_add(usize::try_from(ids).ok()?.checked_mul(width)?)?;
            let table = ids_end.checked_next_multiple_of(8)?;
            let origin = table.checked_add(usize::try_from(documents).ok()?.checked_mul(DOCUMENT)?)?;
            (origin.checked_add(json)? == tail_at && json <= MAX_ORIGIN).then_some((ids_end, table, origin))
        };
        let Some((ids_end, table, origin_at)) = places() else {
            return fail(format!("{ids} ids and {documents} documents do not make the size of the file"));
        };
        if crc32c::crc32c(&all[table..tail_at]) != word(tail, 24) {
            return fail("the checksum of the table of documents does not match".into());
        }
        let origin: Origin = match serde_json::from_slice(&all[origin_at..tail_at]) {
            Ok(origin) => origin,
            Err(e) => return fail(format!("what the tokens were made from cannot be read: {e}")),
        };
        if origin.vocab_size > MAX_VOCAB {
            return fail(format!("found a vocabulary of {} ids, expected at most {MAX_VOCAB}", origin.vocab_size));
        }
        let part = |range: Range<usize>| all.part(range).expect("the places were compared with the size");
        let out = Tokens {
            ids: part(HEAD..ids_end),
            width,
            documents: part(table..origin_at),
            origin: Arc::new(origin),
            sum: word(tail, 20),
            renamed: None,
        };
        let mut before = 0;
        for index in 0..out.documents() {
            let end = long(&out.documents, index * DOCUMENT);
            if end < before || end > ids {
                return fail(format!("document {index} ends at id {end}, expected {before} to {ids}"));
            }
            before = end;
        }
        if before != ids {
            return fail(format!("the last document ends at id {before}, expected {ids}"));
        }
        out.check_ids(path)?;
        Ok(out)
    }

    /// Compares the checksum of the ids, and every id with the size of the vocabulary.
    fn check_ids(&self, path: &Path) -> Result<(), TextError> {
        let blocks: Vec<(u32, usize, u32)> = self
            .ids
            .par_chunks(BLOCK * self.width)
            .map(|block| {
                let largest = match self.width {
                    2 => block.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).max(),
                    _ => block.chunks_exact(4).map(|b| word(b, 0)).max(),
                };
                (crc32c::crc32c(block), block.len(), largest.unwrap_or(0))
            })
            .collect();
        let sum = blocks.iter().fold(0, |sum, &(block, n, _)| crc32c::crc32c_combine(sum, block, n));
        if sum != self.sum {
            return Err(bad(path, "the checksum of the ids does not match".into()));
        }
        match blocks.iter().map(|b| b.2).max() {
            Some(id) if u64::from(id) >= self.origin.vocab_size => {
                Err(bad(path, format!("found id {id}, the vocabulary has {}", self.origin.vocab_size)))
            }
            _ => Ok(()),
        }
    }

    /// Number of ids, ends of documents not counted.
    pub fn len(&self) -> usize {
        self.ids.len() / self.width
    }

    /// Whether there is no id.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.documents.len() / DOCUMENT
    }

    /// Document `index`, below [`Tokens::documents`].
    pub fn document(&self, index: usize) -> Document {
        let end_of = |index: usize| long(&self.documents, index * DOCUMENT) as usize;
        let start = index.checked_sub(1).map_or(0, end_of);
        Document { ids: start..end_of(index), hash: long(&self.documents, index * DOCUMENT + 8) }
    }

    /// The ids `range`, in order.
    pub fn ids(&self, range: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        let bytes = &self.ids[range.start * self.width..range.end * self.width];
        bytes.chunks_exact(self.width).map(|b| {
            let id = if let [a, b] = *b { u32::from(u16::from_le_bytes([a, b])) } else { word(b, 0) };
            self.renamed.as_ref().map_or(id, |names| names[id as usize])
        })
    }

    /// Which ids occur, by id.
    pub fn used(&self) -> Vec<bool> {
        let none = || vec![false; self.origin.vocab_size as usize];
        let starts: Vec<usize> = (0..self.len()).step_by(BLOCK).collect();
        let marked = starts.into_par_iter().fold(none, |mut used, start| {
            self.ids(start..(start + BLOCK).min(self.len())).for_each(|id| used[id as usize] = true);
            used
        });
        marked.reduce(none, |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a |= b);
            a
        })
    }

    /// The same with every id replaced by what `names` has at its place.
    pub(super) fn renamed(self, names: &Arc<[u32]>) -> Tokens {
        assert!(names.len() as u64 >= self.origin.vocab_size, "every id has a name");
        Tokens { renamed: Some(Arc::clone(names)), ..self }
    }

    /// What they were made from.
    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Checksum of ids and documents, before ids were replaced.
    pub fn checksum(&self) -> u32 {
        crc32c::crc32c_append(self.sum, &self.documents)
    }
}

fn bad(path: &Path, what: String) -> TextError {
    TextError::BadCache { path: path.into(), what }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(vocab: &Vocab, documents: &[&[u32]]) -> Vec<u8> {
        let mut out = TokenWriter::new(vec![], vocab).unwrap();
        for (i, ids) in documents.iter().enumerate() {
            out.push(&ids[..ids.len() / 2]).unwrap();
            out.push(&ids[ids.len() / 2..]).unwrap();
            out.end(i as u64 * 7);
        }
        out.finish(&Origin::new(vocab)).unwrap()
    }

    #[test]
    fn tokens_come_back() {
        for (vocab, last) in [(Vocab::bytes(), 256), (Vocab::o200k(), 200_072)] {
            let tokens = Tokens::from_bytes(image(&vocab, &[&[1, 2, 3], &[], &[last]])).unwrap();
            assert_eq!((tokens.len(), tokens.documents(), tokens.is_empty()), (4, 3, false));
            assert_eq!(tokens.ids(1..4).collect::<Vec<_>>(), [2, 3, last]);
            assert_eq!(tokens.document(2), Document { ids: 3..4, hash: 14 });
            let used: Vec<usize> = tokens.used().iter().enumerate().filter_map(|(i, u)| u.then_some(i)).collect();
            assert_eq!(used, [1, 2, 3, last as usize]);
            let names: Arc<[u32]> = (0..200_073).rev().collect();
            assert_eq!(tokens.renamed(&names).ids(0..1).collect::<Vec<_>>(), [200_071]);
        }
        assert!(Tokens::from_bytes(image(&Vocab::bytes(), &[])).unwrap().is_empty());
    }

    #[test]
    fn every_damage_is_found() {
        let good = image(&Vocab::bytes(), &[&[1, 2, 3], &[4; 30]]);
        for cut in 0..good.len() {
            assert!(Tokens::from_bytes(good[..cut].to_vec()).is_err(), "cut at {cut}");
        }
        for at in (0..HEAD + 66).chain(HEAD + 72..good.len()) {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            let error = Tokens::from_bytes(bytes).expect_err("a flipped bit").to_string();
            assert!(error.starts_with("<memory>: the token cache is damaged: "), "at {at}: {error}");
        }
        let foreign = image(&Vocab::bytes(), &[&[257]]);
        assert!(Tokens::from_bytes(foreign).unwrap_err().to_string().contains("found id 257, the vocabulary has 257"));
    }
}
