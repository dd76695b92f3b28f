//! Named counter-based random streams (Philox4x32-10, Salmon et al. 2011), reproducible bit for bit on any machine.
//!
//! Invariant: an element depends on (seed, name, step, direction, index) alone. All float arithmetic is float32 with one
//! rounding per written operation and no fused multiply-add, so scalar, vector and generated code give the same bits.

use std::f32::consts::{FRAC_PI_2, LN_2, SQRT_2};

/// The counter word `step` of parameter initialisation.
pub const STEP_INIT: u32 = 0xFFFF_FFFF;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Blocks of Gaussians computed together, so that Box-Muller can use vector registers.
const LANES: usize = 8;
/// Stream from which loop depths are drawn.
const LOOP_DEPTH_STREAM: &str = "@loop_depth";

/// FNV-1a 32-bit hash of a parameter or stream name: its tensor id.
pub fn fnv1a32(name: &str) -> u32 {
    name.bytes().fold(0x811C_9DC5, |h, byte| (h ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// One Philox4x32-10 block: four words for a 128-bit counter under a 64-bit key.
#[inline]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(c0) * u64::from(MULTIPLIERS[0]);
        let p1 = u64::from(c2) * u64::from(MULTIPLIERS[1]);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// Two standard normal values from two words.
///
/// Radius: `sqrt(-2 ln(((x0 >> 8) + 1) / 2^24))`. Angle: quadrant `x1 >> 30`, and inside it the 24 bits below, centred
/// on zero, through polynomials of sine and cosine on `[-pi/4, pi/4]`.
#[inline(always)]
pub fn box_muller(x0: u32, x1: u32) -> (f32, f32) {
    let r = (ln_u24((x0 >> 8) + 1) * -2.0).sqrt();
    let quadrant = x1 >> 30;
    let y = ((x1 >> 6) & 0xFF_FFFF) as f32 * (1.0 / 16_777_216.0) - 0.5;
    let t = y * FRAC_PI_2;
    let z = t * t;
    let mut s = 2.755_731_9e-6_f32;
    s = s * z + -1.984_127e-4;
    s = s * z + 8.333_333e-3;
    s = s * z + -1.666_666_7e-1;
    s = t + (t * z) * s;
    let mut c = 2.480_158_7e-5_f32;
    c = c * z + -1.388_888_9e-3;
    c = c * z + 4.166_666_8e-2;
    c = c * z + -0.5;
    c = c * z + 1.0;
    // A rotation by q quarter turns: swap on odd q, negate the cosine on q in {1, 2}, the sine on q in {2, 3}.
    let (cos, sin) = if quadrant & 1 == 0 { (c, s) } else { (s, c) };
    let cos = if quadrant == 1 || quadrant == 2 { -cos } else { cos };
    let sin = if quadrant >= 2 { -sin } else { sin };
    (r * cos, r * sin)
}

/// Natural logarithm of `u24 * 2^-24` for `1 <= u24 <= 2^24`.
#[inline(always)]
fn ln_u24(u24: u32) -> f32 {
    let bits = (u24 as f32).to_bits();
    let e = (bits >> 23) as i32 - 127;
    let m = f32::from_bits((bits & 0x7F_FFFF) | 0x3F80_0000);
    let big = m > SQRT_2;
    let m = if big { m * 0.5 } else { m };
    let e = if big { e + 1 } else { e } - 24;
    let f = m - 1.0;
    let s = f / (f + 2.0);
    let z = s * s;
    let mut p = 0.222_222_22_f32;
    p = p * z + 0.285_714_3;
    p = p * z + 0.4;
    p = p * z + 0.666_666_7;
    let ln_m = s * 2.0 + (s * z) * p;
    e as f32 * LN_2 + ln_m
}

#[inline(always)]
fn uniform_of(word: u32) -> f32 {
    // 23 bits and a half are exact in float32.
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

#[inline(always)]
fn ternary_of(word: u32) -> f32 {
    ((u64::from(word) * 3) >> 32) as f32 - 1.0
}

#[inline(always)]
fn sign_of(word: u32, bit: u32) -> f32 {
    f32::from_bits(0x3F80_0000 | (((word >> bit) & 1) << 31))
}

/// One stream of random numbers: a name at a step and direction of a run. Elements are addressed by their flat
/// row-major index, so any tile can be produced without the elements before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// FNV-1a hash of the stream's name.
    pub tensor_id: u32,
    /// Training step, or [`STEP_INIT`].
    pub step: u32,
    /// Direction, sequence or probe index.
    pub direction: u32,
    /// Seed of the run.
    pub seed: u64,
}

impl Stream {
    /// The stream of a parameter or of a derived name (`name#A`, `@loop_depth`).
    pub fn new(name: &str, step: u32, direction: u32, seed: u64) -> Self {
        Stream { tensor_id: fnv1a32(name), step, direction, seed }
    }

    /// The four words of one block.
    pub fn block(&self, block: u32) -> [u32; 4] {
        philox4x32([block, self.tensor_id, self.step, self.direction], self.key())
    }

    /// Word `index`: word `index mod 4` of block `index div 4`.
    pub fn word(&self, index: u64) -> u32 {
        self.block(block_of(index, 4))[(index % 4) as usize]
    }

    /// Sign `index`: -1 where its bit is set, least significant bit first, 128 signs a block.
    pub fn rademacher(&self, index: u64) -> f32 {
        let word = self.block(block_of(index, 128))[(index / 32 % 4) as usize];
        sign_of(word, (index % 32) as u32)
    }

    /// Standard normal value `index`: four a block, pairs from words (0, 1) and (2, 3).
    pub fn gaussian(&self, index: u64) -> f32 {
        let w = self.block(block_of(index, 4));
        let pair = if index % 4 < 2 { box_muller(w[0], w[1]) } else { box_muller(w[2], w[3]) };
        if index.is_multiple_of(2) { pair.0 } else { pair.1 }
    }

    /// Uniform value `index`, strictly inside (0, 1).
    pub fn uniform(&self, index: u64) -> f32 {
        uniform_of(self.word(index))
    }

    /// Value `index` of {-1, 0, 1}, all equally probable.
    pub fn ternary_uniform(&self, index: u64) -> f32 {
        ternary_of(self.word(index))
    }

    /// Writes words `first..first + out.len()`.
    pub fn fill_words(&self, first: u64, out: &mut [u32]) {
        fill(first, out, 1, |block| self.block(block));
    }

    /// Writes signs `first..first + out.len()`.
    pub fn fill_rademacher(&self, first: u64, out: &mut [f32]) {
        fill(first, out, 1, |block| -> [f32; 128] {
            let mut signs = [0.0; 128];
            for (chunk, word) in signs.chunks_exact_mut(32).zip(self.block(block)) {
                for (bit, sign) in chunk.iter_mut().enumerate() {
                    *sign = sign_of(word, bit as u32);
                }
            }
            signs
        });
    }

    /// Writes standard normal values `first..first + out.len()`.
    pub fn fill_gaussian(&self, first: u64, out: &mut [f32]) {
        fill(first, out, LANES as u32, |block| -> [f32; 4 * LANES] {
            let mut words = [[0; LANES]; 4];
            for lane in 0..LANES {
                let block = self.block(block.wrapping_add(lane as u32));
                for (row, word) in words.iter_mut().zip(block) {
                    row[lane] = word;
                }
            }
            let mut normal = [[0.0; LANES]; 4];
            for lane in 0..LANES {
                (normal[0][lane], normal[1][lane]) = box_muller(words[0][lane], words[1][lane]);
                (normal[2][lane], normal[3][lane]) = box_muller(words[2][lane], words[3][lane]);
            }
            std::array::from_fn(|i| normal[i % 4][i / 4])
        });
    }

    /// Writes uniform values `first..first + out.len()`.
    pub fn fill_uniform(&self, first: u64, out: &mut [f32]) {
        fill(first, out, 1, |block| self.block(block).map(uniform_of));
    }

    /// Writes ternary values `first..first + out.len()`.
    pub fn fill_ternary_uniform(&self, first: u64, out: &mut [f32]) {
        fill(first, out, 1, |block| self.block(block).map(ternary_of));
    }

    fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }
}

/// Fills `out` with words of a stream from its beginning. See [`Stream::fill_words`].
pub fn fill_words(out: &mut [u32], name: &str, step: u32, direction: u32, seed: u64) {
    Stream::new(name, step, direction, seed).fill_words(0, out);
}

/// Fills `out` with -1 and +1 of a stream from its beginning. See [`Stream::fill_rademacher`].
pub fn fill_rademacher(out: &mut [f32], name: &str, step: u32, direction: u32, seed: u64) {
    Stream::new(name, step, direction, seed).fill_rademacher(0, out);
}

/// Fills `out` with standard normal values of a stream from its beginning. See [`Stream::fill_gaussian`].
pub fn fill_gaussian(out: &mut [f32], name: &str, step: u32, direction: u32, seed: u64) {
    Stream::new(name, step, direction, seed).fill_gaussian(0, out);
}

/// Fills `out` with uniform values in (0, 1) of a stream from its beginning. See [`Stream::fill_uniform`].
pub fn fill_uniform(out: &mut [f32], name: &str, step: u32, direction: u32, seed: u64) {
    Stream::new(name, step, direction, seed).fill_uniform(0, out);
}

/// Fills `out` with -1, 0, +1 of a stream from its beginning. See [`Stream::fill_ternary_uniform`].
pub fn fill_ternary_uniform(out: &mut [f32], name: &str, step: u32, direction: u32, seed: u64) {
    Stream::new(name, step, direction, seed).fill_ternary_uniform(0, out);
}

/// Loop depth of one sequence: the inverse transform of Poisson(`mean`) in float64 with the first uniform value of
/// stream `@loop_depth`, clamped to `[low, high]`. `sequence` is the index of the sequence inside the batch.
pub fn poisson_depth(mean: f64, low: u32, high: u32, step: u32, sequence: u32, seed: u64) -> u32 {
    let u = f64::from(Stream::new(LOOP_DEPTH_STREAM, step, sequence, seed).uniform(0));
    let mut k = 0;
    let mut p = (-mean).exp();
    let mut cumulative = p;
    while u > cumulative && k < high {
        k += 1;
        p *= mean / f64::from(k);
        cumulative += p;
    }
    k.max(low).min(high)
}

fn block_of(index: u64, per_block: u64) -> u32 {
    u32::try_from(index / per_block).expect("a stream has 2^32 blocks; the element index is beyond them")
}

/// Fills `out` with elements `first..` of a stream. `batch` makes the `N` elements of `blocks` consecutive blocks from the
/// number of the first one; elements of blocks beyond the counter are made at most to be dropped.
fn fill<T: Copy, const N: usize>(first: u64, out: &mut [T], blocks: u32, batch: impl Fn(u32) -> [T; N]) {
    let Some(last) = (out.len() as u64).checked_sub(1) else { return };
    block_of(first.saturating_add(last), (N as u64) / u64::from(blocks));
    let skip = (first % N as u64) as usize;
    let mut block = (first / N as u64) as u32 * blocks;
    let head = if skip == 0 { 0 } else { (N - skip).min(out.len()) };
    let (head, body) = out.split_at_mut(head);
    if !head.is_empty() {
        head.copy_from_slice(&batch(block)[skip..skip + head.len()]);
        block = block.wrapping_add(blocks);
    }
    let (full, tail) = body.as_chunks_mut::<N>();
    for chunk in full {
        *chunk = batch(block);
        block = block.wrapping_add(blocks);
    }
    if !tail.is_empty() {
        tail.copy_from_slice(&batch(block)[..tail.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::safetensors::SafeTensors;
    use std::path::Path;

    const STREAMS: [(&str, usize, u32, u32); 3] =
        [("layers.0.attn.q_proj.weight", 301, 0, 0), ("embed.weight#A", 7, 5, 3), ("x", 1, STEP_INIT, 0xFFFF_FFFF)];
    const SEED: u64 = 0x0123_4567_89AB_CDEF;

    fn golden() -> SafeTensors {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/rng.safetensors");
        SafeTensors::open(Path::new(path)).expect("the committed golden file opens")
    }

    fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
        file.require(name).expect("golden tensor").to_f32()
    }

    fn ints(file: &SafeTensors, name: &str) -> Vec<i64> {
        file.require(name).expect("golden tensor").to_i64().expect("integers")
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        assert_eq!(fnv1a32(""), 0x811C_9DC5);
        assert_eq!(fnv1a32("a"), 0xE40C_292C);
    }

    #[test]
    fn streams_match_the_golden_file_bit_for_bit() {
        let file = golden();
        for (j, (name, n, step, direction)) in STREAMS.into_iter().enumerate() {
            assert_eq!(i64::from(fnv1a32(name)), ints(&file, "exact.tensor_id")[j]);
            let mut words = vec![0; n];
            fill_words(&mut words, name, step, direction, SEED);
            let want = ints(&file, &format!("exact.{j}.words"));
            assert_eq!(words.iter().map(|&w| i64::from(w)).collect::<Vec<_>>(), want);
            type Fill = fn(&mut [f32], &str, u32, u32, u64);
            let kinds: [(&str, Fill); 4] = [
                ("rademacher", fill_rademacher),
                ("gaussian", fill_gaussian),
                ("uniform", fill_uniform),
                ("ternary_uniform", fill_ternary_uniform),
            ];
            for (kind, fill) in kinds {
                let mut out = vec![f32::NAN; n];
                fill(&mut out, name, step, direction, SEED);
                let want = floats(&file, &format!("exact.{j}.{kind}"));
                assert_eq!(bits(&out), bits(&want), "{kind} of stream {j}");
            }
        }
    }

    #[test]
    fn box_muller_matches_the_golden_file_on_edge_words() {
        let file = golden();
        let (x0, x1) = (ints(&file, "in.x0"), ints(&file, "in.x1"));
        let (g0, g1) = (floats(&file, "exact.box_muller0"), floats(&file, "exact.box_muller1"));
        for i in 0..x0.len() {
            let (a, b) = box_muller(x0[i] as u32, x1[i] as u32);
            assert_eq!([a.to_bits(), b.to_bits()], [g0[i].to_bits(), g1[i].to_bits()], "entry {i}");
        }
    }

    #[test]
    fn loop_depths_match_the_golden_file() {
        let want = ints(&golden(), "exact.loop_depth");
        for (i, depth) in want.into_iter().enumerate() {
            let (step, sequence) = (i as u32 / 32, i as u32 % 32);
            assert_eq!(i64::from(poisson_depth(2.0, 1, 6, step, sequence, SEED)), depth);
        }
    }

    #[test]
    fn any_tile_equals_the_elements_by_index() {
        let stream = Stream::new("layers.3.mlp.up_proj.weight#B", 17, 2, SEED);
        let starts = [0, 1, 3, 31, 32, 33, 127, 128, 1000, 1023, 1024, (1 << 34) - 3000];
        for first in starts {
            for len in [0usize, 1, 2, 31, 32, 33, 129, 1025, 2050] {
                let at = |i: usize| first + i as u64;
                let mut words = vec![0; len];
                stream.fill_words(first, &mut words);
                assert!(words.iter().enumerate().all(|(i, &w)| w == stream.word(at(i))));
                let mut out = vec![f32::NAN; len];
                stream.fill_rademacher(first, &mut out);
                assert!(out.iter().enumerate().all(|(i, &v)| v == stream.rademacher(at(i))));
                stream.fill_gaussian(first, &mut out);
                assert!(out.iter().enumerate().all(|(i, &v)| v == stream.gaussian(at(i))));
                stream.fill_uniform(first, &mut out);
                assert!(out.iter().enumerate().all(|(i, &v)| v == stream.uniform(at(i))));
                assert!(out.iter().all(|&v| v > 0.0 && v < 1.0));
                stream.fill_ternary_uniform(first, &mut out);
                assert!(out.iter().enumerate().all(|(i, &v)| v == stream.ternary_uniform(at(i))));
            }
        }
    }

    #[test]
    #[should_panic(expected = "2^32 blocks")]
    fn an_index_beyond_the_counter_is_refused() {
        Stream::new("x", 0, 0, 0).fill_words((1 << 34) - 1, &mut [0; 2]);
    }
}
