//! Ids to text while they are being generated.
//!
//! What `push` and `flush` return, joined, is the lossy UTF-8 decoding of all bytes; a character is never cut.

use super::vocab::Vocab;

/// Emits complete characters only; bytes that can no longer become UTF-8 turn into U+FFFD.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    vocab: Vocab,
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// A decoder at the start of a text.
    pub fn new(vocab: &Vocab) -> Self {
        Self { vocab: vocab.clone(), pending: Vec::new() }
    }

    /// Text that `id` completes, possibly empty.
    pub fn push(&mut self, id: u32) -> String {
        self.vocab.append_bytes(id, &mut self.pending);
        self.take(false)
    }

    /// What is left at the end of the text: at most one U+FFFD, for a character that was never finished.
    pub fn flush(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, at_end: bool) -> String {
        let mut out = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(good));
                    rest = bad;
                    let Some(skip) = error.error_len().or(at_end.then_some(bad.len())) else {
                        break;
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[skip..];
                }
            }
        }
        let used = self.pending.len() - rest.len();
        self.pending.drain(..used);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8]) {
        let mut decoder = StreamDecoder::new(&Vocab::bytes());
        let mut text = String::new();
        for &byte in bytes {
            text += &decoder.push(u32::from(byte));
        }
        text += &decoder.flush();
        assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:?}");
        assert_eq!(decoder.flush(), "");
    }

    #[test]
    fn joined_output_is_the_lossy_decoding() {
        check("plain, ä, €, 𝄞 and 👩‍👩‍👧".as_bytes());
        check(b"\xff\xfe ok \xe2\x82 cut \xf0\x9f\x98");
        check(b"\xe2\x82");
        let mut state = 1u32;
        for _ in 0..200 {
            let bytes: Vec<u8> = (0..40)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    [b'a', 0xc3, 0xa4, 0xe2, 0x82, 0xac, 0xf0, 0x9f, 0x98, 0x80][(state >> 16) as usize % 10]
                })
                .collect();
            check(&bytes);
        }
    }

    #[test]
    fn a_character_over_several_tokens_comes_out_once() {
        let vocab = Vocab::o200k();
        let text = "🜚 und 𓀀!";
        let ids = vocab.encode(text);
        let mut decoder = StreamDecoder::new(&vocab);
        let parts: Vec<String> = ids.iter().map(|&id| decoder.push(id)).collect();
        assert!(parts.iter().any(String::is_empty), "some token ends inside a character");
        assert_eq!(parts.concat(), text);
        assert_eq!(decoder.push(vocab.end_of_document()), "");
    }
}
