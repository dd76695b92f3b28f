//! The frames of a zstd file, one behind the other, as a reader.
//!
//! Memory is bounded by the window of a frame, which is checked before anything is allocated; checksums of frames are compared.

use std::io::{self, BufRead, ErrorKind, Read};

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// First bytes of a frame.
pub(super) const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Greatest distance that a frame may look back: what `zstd --long` makes without further consent of the reader.
const MAX_WINDOW: u64 = 128 << 20;

/// Unpacks what `input` holds.
pub struct Zstd<R> {
    input: R,
    decoder: FrameDecoder,
    /// Whether a frame is being unpacked.
    open: bool,
}

fn damaged(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.to_string())
}

impl<R: BufRead> Zstd<R> {
    /// Reads frames from `input`.
    pub fn new(input: R) -> Zstd<R> {
        Zstd { input, decoder: FrameDecoder::new(), open: false }
    }

    /// Opens the next frame; false at the end of the file. The layout is that of RFC 8878, section 3.1.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.input.fill_buf()?.is_empty() {
            let mut head = [0; 18];
            self.input.read_exact(&mut head[..5])?;
            if head[1..4] == [0x2a, 0x4d, 0x18] && head[0] >> 4 == 5 {
                // A frame to be skipped: its length has begun at byte 4.
                self.input.read_exact(&mut head[5..8])?;
                let length = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
                if io::copy(&mut (&mut self.input).take(length), &mut io::sink())? < length {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            if head[..4] != MAGIC {
                return Err(damaged("found other bytes behind a frame, expected another frame or the end"));
            }
            let descriptor = head[4];
            let single = descriptor & 0x20 != 0;
            let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
            let size = [usize::from(single), 2, 4, 8][usize::from(descriptor >> 6)];
            let length = 5 + usize::from(!single) + dictionary + size;
            self.input.read_exact(&mut head[5..length])?;
            let mut word = [0; 8];
            word[..size].copy_from_slice(&head[length - size..length]);
            let window = match single {
                true => u64::from_le_bytes(word) + if size == 2 { 256 } else { 0 },
                false => {
                    let base = 1u64 << (10 + (head[5] >> 3));
                    base + base / 8 * u64::from(head[5] & 7)
                }
            };
            if window > MAX_WINDOW {
                let (found, most) = (window >> 20, MAX_WINDOW >> 20);
                return Err(damaged(format!("a frame needs {found} MB to unpack, expected at most {most}")));
            }
            self.decoder = FrameDecoder::new();
            self.decoder.init(&head[..length]).map_err(damaged)?;
            self.open = true;
            return Ok(true);
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.open && !self.next_frame()? {
                return Ok(0);
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let some = BlockDecodingStrategy::UptoBytes(out.len());
                self.decoder.decode_blocks(&mut self.input, some).map_err(damaged)?;
            }
            let n = self.decoder.read(out)?;
            if n > 0 {
                return Ok(n);
            }
            if let Some(sum) = self.decoder.get_checksum_from_data()
                && self.decoder.get_calculated_checksum() != Some(sum)
            {
                return Err(damaged("the checksum of a frame does not match its content"));
            }
            self.open = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    fn unpack(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = vec![];
        Zstd::new(bytes).read_to_end(&mut out).map(|_| out)
    }

    #[test]
    fn frames_follow_one_another() {
        let (a, b) = (b"some text, some text".repeat(9000), b"and more".to_vec());
        let pack = |bytes: &[u8]| compress_to_vec(bytes, CompressionLevel::Fastest);
        let skipped = [&[0x51, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        let file = [pack(&a), skipped, pack(&b), pack(b"")].concat();
        assert!(unpack(&file).unwrap() == [a, b].concat());
        assert_eq!(unpack(b"").unwrap(), b"");
    }

    #[test]
    fn damage_is_an_error() {
        let file = compress_to_vec(&b"some text, some text".repeat(900)[..], CompressionLevel::Fastest);
        for cut in 1..file.len() {
            assert!(unpack(&file[..cut]).is_err(), "cut at {cut}");
        }
        let mut other = file.clone();
        let last = other.len() - 1;
        other[last] ^= 1;
        assert!(unpack(&other).unwrap_err().to_string().contains("checksum"));
        assert!(unpack(&[&file[..], b"noise"].concat()).unwrap_err().to_string().contains("another frame"));
        // A window of 2^41 bytes, and a single segment of 2^60.
        for head in
            [vec![0x28, 0xb5, 0x2f, 0xfd, 0, 31 << 3], [&MAGIC[..], &[0xe0], &(1u64 << 60).to_le_bytes()].concat()]
        {
            assert!(unpack(&head).unwrap_err().to_string().contains("to unpack, expected at most"));
        }
        for byte in 0..file.len() {
            let mut bad = file.clone();
            bad[byte] ^= 0x10;
            let _ = unpack(&bad);
        }
    }
}
