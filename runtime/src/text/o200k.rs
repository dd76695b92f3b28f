//! The embedded o200k tokenizer, loaded once on first use.
//!
//! Text is always encoded as ordinary text: a spelling such as `<|endoftext|>` never becomes a control token.

use std::sync::OnceLock;

use splintr::{AnyTokenizer, Backend, SpecialMode, Tokenizer};

/// Ids of o200k_base with the agent tokens behind it.
pub(super) const SIZE: u32 = 200_073;
/// Ids below this one stand for bytes; all others are control tokens or unassigned.
pub(super) const TEXT: u32 = 199_998;
/// `<|endoftext|>`.
pub(super) const END_OF_TEXT: u32 = 199_999;

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

/// Hands the parts that `text` falls into before merging to `each`: no token spans two of them.
pub(super) fn words(text: &str, each: impl FnMut(&str)) {
    bpe(&tables().tokenizer).for_each_pre_token(text, each);
}

#[cfg(test)]
mod tests {
    use super::*;

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
