//! Where text can be cut so that its parts tokenise as the whole does.
//!
//! The pattern of o200k, which own vocabularies share, has no alternative that continues from a newline into anything but white space
//! and slashes: a line that begins with another character begins a token.

/// Whether a token begins at `at`, by the bytes around: behind a newline, in front of a character that is neither white space nor a
/// slash. Up to four bytes from `at` on are looked at; `0 < at < text.len()`.
pub(super) fn begins_anew(text: &[u8], at: usize) -> bool {
    text[at - 1] == b'\n'
        && match text[at] {
            byte @ 0..=0x7f => byte.is_ascii_graphic() && byte != b'/',
            lead => {
                let length = match lead {
                    0xc2..=0xdf => 2,
                    0xe0..=0xef => 3,
                    _ => 4,
                };
                let character = text.get(at..at + length).and_then(|bytes| std::str::from_utf8(bytes).ok());
                character.is_some_and(|c| !c.trim().is_empty())
            }
        }
}

#[cfg(test)]
mod tests {
    use super::super::o200k::encode;
    use super::*;

    /// Cuts `text` where tokens begin anew, at least `target` bytes apart.
    fn cut(text: &str, target: usize) -> Vec<&str> {
        let (bytes, mut out, mut start) = (text.as_bytes(), Vec::new(), 0);
        let mut at = target;
        while at < bytes.len() {
            if begins_anew(bytes, at) {
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

    #[test]
    fn pieces_tokenise_as_the_whole() {
        let unit = "Fn main() {\n    let x = 1;\n}\n\nWord's end!\n/ path\n\r\n  'Quoted' text…\nÄther 12345 \n \nnext\n\
                    42 \n!\n…\n\u{a0}x\n\u{3000}y\n世界\n🜚\n'll be\n{\n}//\n//a\n\u{85}\nz\u{b}\n\u{301}\n";
        let text = unit.repeat(40);
        let whole = encode(&text);
        for target in [1, 7, 64, 1000] {
            let parts = cut(&text, target);
            assert!(parts.len() > 2, "the text has places to cut");
            assert_eq!(parts.concat(), text);
            assert_eq!(parts.iter().flat_map(|p| encode(p)).collect::<Vec<_>>(), whole, "target {target}");
        }
    }
}
