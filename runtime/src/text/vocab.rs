//! Vocabularies: bytes, o200k, o200k restricted to the tokens that occur in given data, and byte pairs of one's own.
//!
//! Ids are dense, every vocabulary can encode every text, and control tokens are never produced from text.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::str::Utf8Error;
use std::sync::Arc;

use super::bpe::Bpe;
use super::{TextError, o200k};

/// First line of a saved vocabulary; the number is the format.
const MAGIC: &str = "chimera-vocab 1";
/// No vocabulary needs more bytes than this when saved.
const MAX_FILE: u64 = 4 << 20;

/// A mapping between text and ids `0..size()`. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocab(Kind);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Id = byte; 256 ends a document.
    Bytes,
    /// The whole of o200k.
    O200k,
    /// Dense id -> o200k id, ascending. Holds the 256 single-byte tokens and the end of text, which comes last.
    Restricted(Arc<[u32]>),
    /// Id = byte, then the merges in their order; the last id ends a document.
    Bpe(Arc<Bpe>),
}

impl Vocab {
    /// 256 bytes and the end of document: 257 ids.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// All 200,073 ids of o200k. The tables are loaded when they are first needed.
    pub fn o200k() -> Self {
        Self(Kind::O200k)
    }

    /// The o200k ids among `used`, the 256 single-byte tokens and the end of text. Control tokens in `used` are dropped.
    pub fn restricted(used: impl IntoIterator<Item = u32>) -> Self {
        let mut present = vec![false; o200k::TEXT as usize];
        for byte in 0..=255 {
            present[o200k::byte_id(byte) as usize] = true;
        }
        for id in used {
            if let Some(slot) = present.get_mut(id as usize) {
                *slot = true;
            }
        }
        let text = (0..o200k::TEXT).filter(|&id| present[id as usize]);
        Self(Kind::Restricted(text.chain([o200k::END_OF_TEXT]).collect()))
    }

    /// A vocabulary of one's own.
    pub(super) fn bpe(bpe: Bpe) -> Self {
        Self(Kind::Bpe(Arc::new(bpe)))
    }

    /// `bytes`, `o200k`, `o200k:restricted` or `bpe`.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Kind::Bytes => "bytes",
            Kind::O200k => "o200k",
            Kind::Restricted(_) => "o200k:restricted",
            Kind::Bpe(_) => "bpe",
        }
    }

    /// Whether only UTF-8 can be encoded, in pieces that no token spans.
    pub(super) fn is_text(&self) -> bool {
        self.0 != Kind::Bytes
    }

    /// What a loss over this vocabulary means, where that is not plain.
    pub fn meaning(&self) -> Option<String> {
        let Kind::Restricted(ids) = &self.0 else { return None };
        let (n, full) = (ids.len(), o200k::SIZE);
        Some(format!(
            "vocabulary o200k:restricted: the softmax runs over {n} of the {full} ids of o200k, those that occur in the data (held-out text \
             included), the 256 single bytes and the end of a document; the loss is exact for this model and its nats/token are not those \
             of a softmax over all ids, which could only be greater; text with other tokens is spelled in bytes; bits/byte may be compared \
             between vocabularies"
        ))
    }

    /// The o200k ids of a restricted vocabulary, by id.
    pub(super) fn restriction(&self) -> Option<&Arc<[u32]>> {
        match &self.0 {
            Kind::Restricted(ids) => Some(ids),
            _ => None,
        }
    }

    /// Checksum of [`Vocab::to_text`].
    pub fn checksum(&self) -> u32 {
        crc32c::crc32c(self.to_text().as_bytes())
    }

    /// Number of ids, unassigned ones included: the rows of the embedding.
    pub fn size(&self) -> usize {
        match &self.0 {
            Kind::Bytes => 257,
            Kind::O200k => o200k::SIZE as usize,
            Kind::Restricted(ids) => ids.len(),
            Kind::Bpe(bpe) => bpe.size(),
        }
    }

    /// The id that closes a document.
    pub fn end_of_document(&self) -> u32 {
        match &self.0 {
            Kind::Bytes => 256,
            Kind::O200k => o200k::END_OF_TEXT,
            Kind::Restricted(ids) => (ids.len() - 1) as u32,
            Kind::Bpe(bpe) => (bpe.size() - 1) as u32,
        }
    }

    /// False for ids to which the vocabulary gives no meaning; a sampler must not draw them.
    pub fn is_assigned(&self, id: u32) -> bool {
        (id as usize) < self.size() && (!matches!(self.0, Kind::O200k) || o200k::is_assigned(id))
    }

    /// Sets the logits `[size]` of unassigned ids to minus infinity.
    pub fn mask_unassigned(&self, logits: &mut [f32]) {
        if matches!(self.0, Kind::O200k) {
            let first = (o200k::TEXT as usize).min(logits.len());
            for (z, id) in logits[first..].iter_mut().zip(o200k::TEXT..) {
                if !o200k::is_assigned(id) {
                    *z = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Ids of ordinary text, without an end of document.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match &self.0 {
            Kind::Bytes => text.bytes().map(u32::from).collect(),
            Kind::O200k => o200k::encode(text),
            Kind::Restricted(_) => self.narrow(&o200k::encode(text)),
            Kind::Bpe(bpe) => bpe.encode(text),
        }
    }

    /// Ids of raw bytes. Fails where a text vocabulary meets bytes that are not UTF-8; `bytes` takes anything.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Result<Vec<u32>, Utf8Error> {
        Ok(match &self.0 {
            Kind::Bytes => bytes.iter().map(|&b| u32::from(b)).collect(),
            _ => self.encode(std::str::from_utf8(bytes)?),
        })
    }

    /// o200k ids to ids of this vocabulary; a token that a restricted vocabulary lacks becomes its bytes.
    pub(super) fn narrow(&self, full: &[u32]) -> Vec<u32> {
        let Kind::Restricted(ids) = &self.0 else { return full.to_vec() };
        let dense = |id: u32| ids.binary_search(&id).ok().map(|i| i as u32);
        let mut out = Vec::with_capacity(full.len());
        for &id in full {
            match dense(id) {
                Some(i) => out.push(i),
                None => out.extend(o200k::bytes_of(id).iter().filter_map(|&b| dense(o200k::byte_id(b)))),
            }
        }
        out
    }

    /// Bytes of a sequence; control tokens, unassigned ids and ids outside the vocabulary contribute none.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        ids.iter().for_each(|&id| self.append_bytes(id, &mut out));
        out
    }

    /// Number of bytes that `id` stands for: what nats per token are divided by to get bits per byte.
    pub fn bytes_of(&self, id: u32) -> usize {
        match &self.0 {
            Kind::Bytes => usize::from(id < 256),
            Kind::O200k => o200k::bytes_of(id).len(),
            Kind::Restricted(ids) => ids.get(id as usize).map_or(0, |&full| o200k::bytes_of(full).len()),
            Kind::Bpe(bpe) => bpe.bytes_of(id).len(),
        }
    }

    pub(super) fn append_bytes(&self, id: u32, out: &mut Vec<u8>) {
        match &self.0 {
            Kind::Bytes => out.extend(u8::try_from(id)),
            Kind::O200k => out.extend_from_slice(o200k::bytes_of(id)),
            Kind::Restricted(ids) => {
                if let Some(&full) = ids.get(id as usize) {
                    out.extend_from_slice(o200k::bytes_of(full));
                }
            }
            Kind::Bpe(bpe) => out.extend_from_slice(bpe.bytes_of(id)),
        }
    }

    /// The canonical text form: for metadata of a model and for vocabulary files. A restricted vocabulary lists its
    /// o200k ids as ascending ranges, byte pairs their two ids, one a line, under the number of ids and a checksum.
    pub fn to_text(&self) -> String {
        let mut text = format!("{MAGIC}\nkind {}\n", self.name());
        let mut list = String::new();
        match &self.0 {
            Kind::Bytes | Kind::O200k => return text,
            Kind::Restricted(ids) => {
                for run in ids.chunk_by(|a, b| a + 1 == *b) {
                    let written = match run {
                        [id] => writeln!(list, "{id}"),
                        _ => writeln!(list, "{}-{}", run[0], run[run.len() - 1]),
                    };
                    written.expect("writing to a string succeeds");
                }
            }
            Kind::Bpe(bpe) => {
                for (a, b) in bpe.merges() {
                    writeln!(list, "{a} {b}").expect("writing to a string succeeds");
                }
            }
        }
        let sum = crc32c::crc32c(list.as_bytes());
        write!(text, "tokens {}\ncrc32c {sum:08x}\n{list}", self.size()).expect("writing to a string succeeds");
        text
    }

    /// Reads what [`Vocab::to_text`] wrote.
    pub fn from_text(text: &str) -> Result<Self, TextError> {
        parse(text).map_err(|(line, what)| TextError::BadVocab { origin: "vocabulary".into(), line, what })
    }

    /// Reads a vocabulary file; at most 4 MiB are looked at.
    pub fn load(path: &Path) -> Result<Self, TextError> {
        let io = |error| TextError::Io { path: path.into(), doing: "read the vocabulary", error };
        let bad = |line, what| TextError::BadVocab { origin: path.display().to_string(), line, what };
        let mut bytes = Vec::new();
        File::open(path).map_err(io)?.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(bad(1, format!("the file has more than {MAX_FILE} bytes, expected a saved vocabulary")));
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            bad(line_of(&bytes, error.valid_up_to()), "not UTF-8, expected a saved vocabulary".into())
        })?;
        parse(text).map_err(|(line, what)| bad(line, what))
    }

    /// Writes a vocabulary file: the whole new content, or the file as it was before.
    pub fn save(&self, path: &Path) -> Result<(), TextError> {
        let io = |error| TextError::Io { path: path.into(), doing: "write the vocabulary", error };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        file.write_all(self.to_text().as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(io)?;
        file.persist(path).map_err(|e| io(e.error))?;
        Ok(())
    }
}

/// Line of byte `offset`, from 1.
pub(super) fn line_of(bytes: &[u8], offset: usize) -> usize {
    1 + bytes[..offset].iter().filter(|&&b| b == b'\n').count()
}

fn parse(text: &str) -> Result<Vocab, (usize, String)> {
    let mut lines = text.lines().zip(1..);
    let mut field = |key: &str| {
        let (line, number) = lines.next().unwrap_or(("", text.lines().count() + 1));
        match line.strip_prefix(key).and_then(|rest| rest.strip_prefix(' ')) {
            Some(value) => Ok((value, number)),
            None => Err((number, format!("found {:?}, expected \"{key} ...\"", shorten(line)))),
        }
    };
    let (format, line) = field("chimera-vocab")?;
    if format != "1" {
        return Err((line, format!("found format {:?}, expected 1", shorten(format))));
    }
    let (kind, line) = field("kind")?;
    let vocab = match kind {
        "bytes" => Vocab::bytes(),
        "o200k" => Vocab::o200k(),
        "o200k:restricted" | "bpe" => {
            let (count, count_line) = field("tokens")?;
            let (sum, sum_line) = field("crc32c")?;
            let start = text.match_indices('\n').nth(3).map_or(text.len(), |(at, _)| at + 1);
            let actual = format!("{:08x}", crc32c::crc32c(&text.as_bytes()[start..]));
            if sum != actual {
                return Err((sum_line, format!("found crc32c {:?}, the list of ids has {actual}", shorten(sum))));
            }
            let vocab = match kind {
                "bpe" => Vocab::bpe(parse_merges(&mut lines)?),
                _ => Vocab(Kind::Restricted(parse_ranges(&mut lines)?.into())),
            };
            if count.parse() != Ok(vocab.size()) {
                return Err((count_line, format!("found {:?} tokens, the list has {}", shorten(count), vocab.size())));
            }
            vocab
        }
        other => {
            let found = shorten(other);
            return Err((line, format!("found kind {found:?}, expected bytes, o200k, o200k:restricted or bpe")));
        }
    };
    match lines.next() {
        Some((extra, line)) => Err((line, format!("found {:?}, expected the end of the file", shorten(extra)))),
        None if !text.ends_with('\n') => {
            Err((text.lines().count(), "the last line has no end, expected a newline".into()))
        }
        None => Ok(vocab),
    }
}

fn parse_ranges<'a>(lines: &mut impl Iterator<Item = (&'a str, usize)>) -> Result<Vec<u32>, (usize, String)> {
    let (mut ids, mut last_line) = (Vec::<u32>::new(), 4);
    for (text, line) in lines {
        let wrong = |expected: &str| (line, format!("found {:?}, expected {expected}", shorten(text)));
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else {
            return Err(wrong("an id or a range such as 10-20"));
        };
        if first > last || ids.last().is_some_and(|&before| first <= before) {
            return Err(wrong("ids in ascending order"));
        }
        if last >= o200k::TEXT && (first, last) != (o200k::END_OF_TEXT, o200k::END_OF_TEXT) {
            return Err(wrong("ids of text below 199998, and 199999 alone"));
        }
        ids.extend(first..=last);
        last_line = line;
    }
    if ids.last() != Some(&o200k::END_OF_TEXT) {
        return Err((last_line, "the last id is not 199999, expected the end of text".into()));
    }
    match (0..=255).map(o200k::byte_id).find(|id| ids.binary_search(id).is_err()) {
        Some(id) => Err((last_line, format!("id {id} is missing, expected all 256 single-byte tokens"))),
        None => Ok(ids),
    }
}

fn parse_merges<'a>(lines: &mut impl Iterator<Item = (&'a str, usize)>) -> Result<Bpe, (usize, String)> {
    let (mut merges, mut last_line) = (Vec::new(), 4);
    for (text, line) in lines {
        let pair = text.split_once(' ').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        merges.push(pair.ok_or_else(|| (line, format!("found {:?}, expected two ids such as 97 98", shorten(text))))?);
        last_line = line;
    }
    // Merges stand in consecutive lines.
    let first = last_line + 1 - merges.len();
    Bpe::new(merges).map_err(|(index, what)| (first + index, what))
}

/// The start of foreign text, for a message.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Which vocabulary is wanted, before any data is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VocabSpec {
    /// `bytes`.
    Bytes,
    /// `o200k`.
    O200k,
    /// `o200k:restricted`: the tokens that occur in the data.
    Restricted,
    /// A saved vocabulary.
    File(PathBuf),
}

#[cfg(test)]
#[path = "vocab_tests.rs"]
mod tests;
