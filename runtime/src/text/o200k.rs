//! The embedded o200k tokenizer, loaded once on first use.
//!
//! Text is always encoded as ordinary text: a spelling such as `<|endoftext|>` never becomes a control token.

use std::sync::OnceLock;

use rayon::prelude::*;
use splintr::{AnyTokenizer, Backend, SpecialMode, Tokenizer};

/// Ids of o200k_base with the agent tokens behind it.
pub(super) const SIZE: u32 = 200_073;
/// Ids below this one stand for bytes; all others are control tokens or unassigned.
pub(super) const TEXT: u32 = 199_998;
/// `<|endoftext|>`.
pub(super) const END_OF_TEXT: u32 = 199_999;

/// Text is tokenised in pieces of about this many bytes, cut where no token can span the cut.
const PIECE: usize = 256 * 1024;
/// Pieces between two reports of progress.
const PIECES_PER_REPORT: usize = 8;

/// True for ids that stand for bytes or are a named control token.
pub(super) fn is_assigned(id: u32) -> bool {
    id < SIZE && id != TEXT && !(200_000..=200_017).contains(&id)
}

struct Tables {
    tokenizer: AnyTokenizer,
    byte_ids: [u32; 256],
}

fn tables() -> &'static Tables {
    static TABLES: OnceLock<Tables> = OnceLock::new();
    TABLES.get_or_init(|| {
        let tokenizer = splintr::from_pretrained("o200k_base").expect("the embedded o200k ranks are well formed");
        let mut byte_ids = [u32::MAX; 256];
        for (id, bytes) in bpe(&tokenizer).decoder().iter() {
            if let ([byte], true) = (bytes, id < TEXT) {
                byte_ids[usize::from(*byte)] = id;
            }
        }
        assert!(!byte_ids.contains(&u32::MAX), "every single byte is an o200k token");
        Tables { tokenizer, byte_ids }
    })
}

fn bpe(tokenizer: &AnyTokenizer) -> &Tokenizer {
    match tokenizer.backend() {
        Backend::Bpe(bpe) => bpe,
        _ => unreachable!("o200k is a byte-pair vocabulary"),
    }
}

/// The id of the token that is exactly `byte`.
pub(super) fn byte_id(byte: u8) -> u32 {
    tables().byte_ids[usize::from(byte)]
}

/// The bytes of a token; empty for control tokens and unassigned ids.
pub(super) fn bytes_of(id: u32) -> &'static [u8] {
    if id >= TEXT {
        return &[];
    }
    bpe(&tables().tokenizer).decoder().get(id).unwrap_or(&[])
}

/// Encodes ordinary text.
pub(super) fn encode(text: &str) -> Vec<u32> {
    tables()
        .tokenizer
        .encode_with(text, &SpecialMode::Ordinary)
        .expect("ordinary mode has no list of allowed tokens to violate")
}

/// As [`encode`], on all cores; `progress` gets the number of bytes done so far.
pub(super) fn encode_long(text: &str, progress: &mut dyn FnMut(usize)) -> Vec<u32> {
    let pieces = pieces(text, PIECE);
    let (mut ids, mut done) = (Vec::with_capacity(text.len() / 4), 0);
    for group in pieces.chunks(PIECES_PER_REPORT) {
        let encoded: Vec<Vec<u32>> = group.par_iter().map(|piece| encode(piece)).collect();
        encoded.iter().for_each(|piece| ids.extend_from_slice(piece));
        done += group.iter().map(|piece| piece.len()).sum::<usize>();
        progress(done);
    }
    ids
}

/// Cuts `text` after a newline that an ASCII letter follows, at least `target` bytes apart. The o200k pattern has no
/// alternative that continues from a newline into a letter, so the pieces tokenise exactly as the whole does.
fn pieces(text: &str, target: usize) -> Vec<&str> {
    let (bytes, mut out, mut start) = (text.as_bytes(), Vec::new(), 0);
    let mut at = target;
    while at < bytes.len() {
        if bytes[at - 1] == b'\n' && bytes[at].is_ascii_alphabetic() {
            out.push(&text[start..at]);
            start = at;
            at += target;
        } else {
            at += 1;
        }
    }
    out.push(&text[start..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_tokenise_as_the_whole() {
        let unit =
            "Fn main() {\n    let x = 1;\n}\n\nWord's end!\n/ path\n\r\n  'Quoted' text…\nÄther 12345 \n \nnext\n";
        let text = unit.repeat(40);
        let whole = encode(&text);
        for target in [1, 7, 64, 1000] {
            let parts = pieces(&text, target);
            assert!(parts.len() > 2, "the text has places to cut");
            assert_eq!(parts.concat(), text);
            assert_eq!(parts.iter().flat_map(|p| encode(p)).collect::<Vec<_>>(), whole, "target {target}");
        }
        let mut last = 0;
        assert_eq!(encode_long(&text, &mut |done| last = done), whole);
        assert_eq!(last, text.len());
    }

    #[test]
    fn the_table_is_the_documented_one() {
        assert_eq!(bpe(&tables().tokenizer).vocab_size(), SIZE as usize);
        assert_eq!(encode("hello world"), [24912, 2375]);
        for id in 0..TEXT {
            assert!(!bytes_of(id).is_empty(), "id {id} stands for bytes");
        }
        let named = bpe(&tables().tokenizer).special_tokens_decoder();
        for id in TEXT..SIZE {
            assert_eq!(named.contains_key(&id), is_assigned(id), "id {id}");
        }
        assert_eq!(named[&END_OF_TEXT], "<|endoftext|>");
        assert_eq!(named[&200_058], "<|pad|>");
    }
}
