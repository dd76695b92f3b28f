//! Ternary weights on the host: quantisation of float latents and the packed 2-bit layout that all kernels read.
//!
//! Invariant: quantisation is exact in every bit (the sum of magnitudes runs in float64 and is rounded once), and padding
//! rows and columns hold code 1, the weight 0.

/// Rows in one packed block.
const BLOCK_ROWS: usize = 32;
/// Columns in one packed group of 32 bytes.
const PACK_COLUMNS: usize = 4;
/// Packed columns are a multiple of this.
const COLUMN_ALIGN: usize = 64;
/// Bytes of one block of rows at one group of columns.
const PACK_BYTES: usize = BLOCK_ROWS * PACK_COLUMNS / 4;
/// Four weights of value 0.
const ZERO_BYTE: u8 = 0b0101_0101;
/// Smallest scale.
const MIN_SCALE: f32 = 1e-5;

/// Which weights share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleMode {
    /// Consecutive inputs of one output row; the last group may be short.
    PerGroup,
    /// All inputs of one output row.
    PerRow,
    /// The whole matrix; the scale is repeated for every row.
    PerTensor,
}

/// A quantised matrix: weight [o, i] is `scales[o, i / group] * codes[o, i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Ternary {
    /// -1, 0 or 1, [n, k] row-major.
    pub codes: Vec<i8>,
    /// [n, ceil(k / group)] row-major.
    pub scales: Vec<f32>,
    /// Inputs that share a scale; k when a whole row does.
    pub group: usize,
}

/// Quantises latents `w` [n, k]: a scale is the mean magnitude of its weights, at least 1e-5, and a code is the sign where
/// the magnitude exceeds `ratio` times the scale, else 0. A NaN makes the scale of its group NaN.
///
/// # Panics
/// When `w` does not have n * k entries, or when k or `group` is 0.
pub fn ternarise(w: &[f32], n: usize, k: usize, group: usize, ratio: f32, mode: ScaleMode) -> Ternary {
    assert!(k > 0 && group > 0, "a ternary matrix has columns and a group size");
    assert_eq!(Some(w.len()), n.checked_mul(k), "latents have n * k entries");
    let group = if mode == ScaleMode::PerGroup { group } else { k };
    let scales = if mode == ScaleMode::PerTensor {
        vec![mean_magnitude(w); n]
    } else {
        w.chunks_exact(k).flat_map(|row| row.chunks(group).map(mean_magnitude)).collect()
    };
    let mut codes = Vec::with_capacity(w.len());
    let groups = w.chunks_exact(k).flat_map(|row| row.chunks(group));
    for (weights, &scale) in groups.zip(&scales) {
        let threshold = ratio * scale;
        codes.extend(weights.iter().map(|&v| if v.abs() > threshold { if v > 0.0 { 1 } else { -1 } } else { 0 }));
    }
    Ternary { codes, scales, group }
}

fn mean_magnitude(weights: &[f32]) -> f32 {
    let total: f64 = weights.iter().map(|&v| f64::from(v).abs()).sum();
    let mean = (total / weights.len() as f64) as f32;
    // Not `max`, which would hide a NaN.
    if mean < MIN_SCALE { MIN_SCALE } else { mean }
}

/// Rows and columns of a packed [n, k] matrix: multiples of 32 and 64. `None` on overflow.
pub fn padded(n: usize, k: usize) -> Option<(usize, usize)> {
    Some((n.checked_next_multiple_of(BLOCK_ROWS)?, k.checked_next_multiple_of(COLUMN_ALIGN)?))
}

/// Bytes of the packed codes of an [n, k] matrix. `None` on overflow.
pub fn packed_len(n: usize, k: usize) -> Option<usize> {
    let (rows, columns) = padded(n, k)?;
    Some(rows.checked_mul(columns)? / 4)
}

/// Byte index and bit offset of weight [o, i].
fn position(columns: usize, o: usize, i: usize) -> (usize, usize) {
    let (block, row) = (o / BLOCK_ROWS, o % BLOCK_ROWS);
    let pack = block * (columns / PACK_COLUMNS) + i / PACK_COLUMNS;
    (pack * PACK_BYTES + row % 8 * PACK_COLUMNS + i % PACK_COLUMNS, row / 8 * 2)
}

/// Packs codes -1, 0, 1 of shape [n, k] as `[n/32][k/4][32 bytes]`. Byte `r8 * 4 + k4` of a block holds, in bits `2g` and
/// `2g + 1`, the weight plus one of row `32 * block + 8 * g + r8` and column `4 * group + k4`.
///
/// # Panics
/// When `codes` does not have n * k entries or one of them is not -1, 0 or 1.
pub fn pack_ternary(codes: &[i8], n: usize, k: usize) -> Vec<u8> {
    assert_eq!(Some(codes.len()), n.checked_mul(k), "codes have n * k entries");
    let (_, columns) = padded(n, k).expect("the padded size of a matrix in memory is addressable");
    let len = packed_len(n, k).expect("the padded size of a matrix in memory is addressable");
    let mut packed = vec![ZERO_BYTE; len];
    if k == 0 {
        return packed;
    }
    for (o, row) in codes.chunks_exact(k).enumerate() {
        for (i, &code) in row.iter().enumerate() {
            assert!((-1..=1).contains(&code), "a ternary code is -1, 0 or 1, found {code}");
            let (byte, bit) = position(columns, o, i);
            // The field holds 1; changing it to code + 1 flips the bits of 1 ^ (code + 1).
            packed[byte] ^= (1 ^ (code + 1) as u8) << bit;
        }
    }
    packed
}

/// Scales [n, per_row] row-major in blocks of 32 rows, `[n rounded up to 32 / 32][per_row][32]`; those of padding rows are zero.
pub fn block_scales(scales: &[f32], per_row: usize) -> Vec<f32> {
    let rows = scales.len() / per_row.max(1);
    let mut blocked = vec![0.0; rows.next_multiple_of(BLOCK_ROWS) * per_row];
    for (i, &scale) in scales.iter().enumerate() {
        blocked[blocked_at(i, per_row)] = scale;
    }
    blocked
}

/// The inverse of [`block_scales`], padding rows included.
pub fn unblock_scales(blocked: &[f32], per_row: usize) -> Vec<f32> {
    (0..blocked.len()).map(|i| blocked[blocked_at(i, per_row)]).collect()
}

/// Where scale `i` of rows of `per_row` lies among blocked ones.
fn blocked_at(i: usize, per_row: usize) -> usize {
    let (row, group) = (i / per_row, i % per_row);
    (row / BLOCK_ROWS * per_row + group) * BLOCK_ROWS + row % BLOCK_ROWS
}

/// The inverse of [`pack_ternary`]: codes [n, k] row-major, padding dropped. `None` when `packed` has another length than
/// [`packed_len`], or holds the value 3, which is no code, or a weight in its padding.
pub fn unpack_ternary(packed: &[u8], n: usize, k: usize) -> Option<Vec<i8>> {
    if !is_packed(packed, n, k) {
        return None;
    }
    let (_, columns) = padded(n, k)?;
    let count = n.checked_mul(k)?;
    let mut codes = Vec::with_capacity(count);
    if count == 0 {
        return Some(codes);
    }
    for o in 0..n {
        codes.extend((0..k).map(|i| {
            let (byte, bit) = position(columns, o, i);
            (packed[byte] >> bit & 3) as i8 - 1
        }));
    }
    Some(codes)
}

/// Whether `packed` is what [`pack_ternary`] makes of some [n, k] codes.
pub fn is_packed(packed: &[u8], n: usize, k: usize) -> bool {
    let (Some((rows, columns)), Some(len)) = (padded(n, k), packed_len(n, k)) else { return false };
    if packed.len() != len || len == 0 {
        return packed.len() == len;
    }
    // Both bits of a field set: the value 3. Folding instead of a search, for vector registers.
    if packed.iter().fold(0, |threes, &byte| threes | (byte & (byte >> 1))) & ZERO_BYTE != 0 {
        return false;
    }
    let is_zero = |o: usize, i: usize| {
        let (byte, bit) = position(columns, o, i);
        packed[byte] >> bit & 3 == 1
    };
    let right = (0..n).all(|o| (k..columns).all(|i| is_zero(o, i)));
    right && (n..rows).all(|o| (0..columns).all(|i| is_zero(o, i)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::safetensors::SafeTensors;
    use std::path::Path;

    #[test]
    fn quantisation_matches_the_golden_files_bit_for_bit() {
        let modes = [
            ("absmean_per_group", ScaleMode::PerGroup),
            ("absmean_per_row", ScaleMode::PerRow),
            ("absmean_per_tensor", ScaleMode::PerTensor),
        ];
        for case in 0..5 {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");
            let path = format!("{folder}/quant_{case}.safetensors");
            let file = SafeTensors::open(Path::new(&path)).expect("the committed golden file opens");
            let w = file.require("in.W").expect("latents");
            let &[n, k] = w.shape() else { panic!("a matrix") };
            let w = w.to_f32();
            for (name, mode) in modes {
                let golden = |suffix: &str| file.require(&format!("exact.{name}.{suffix}")).expect("golden");
                for (ratio, codes) in [(0.5, "q"), (0.7, "q_ratio_0.7")] {
                    let found = ternarise(&w, n, k, 128, ratio, mode);
                    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    let alpha = golden("alpha");
                    assert_eq!(alpha.shape(), [n, k.div_ceil(found.group)]);
                    assert_eq!(bits(&found.scales), bits(&alpha.to_f32()), "case {case} {name}");
                    let want = golden(codes).to_i64().expect("integers");
                    let codes: Vec<i64> = found.codes.iter().map(|&c| i64::from(c)).collect();
                    assert_eq!(codes, want, "case {case} {name} {ratio}");
                    let packed = pack_ternary(&found.codes, n, k);
                    assert_eq!(unpack_ternary(&packed, n, k), Some(found.codes));
                }
            }
        }
    }

    #[test]
    fn a_nan_is_not_hidden() {
        let t = ternarise(&[1.0, f32::NAN, 0.0, 0.0], 2, 2, 2, 0.5, ScaleMode::PerGroup);
        assert!(t.scales[0].is_nan());
        assert_eq!(t.scales[1], 1e-5);
        assert_eq!(t.codes, [0; 4]);
    }

    #[test]
    fn the_layout_is_as_documented() {
        let (n, k) = (70, 130);
        let (rows, columns) = padded(n, k).expect("small");
        assert_eq!((rows, columns), (96, 192));
        assert_eq!(packed_len(n, k), Some(rows * columns / 4));
        for (o, i) in [(0, 0), (7, 3), (8, 0), (31, 5), (32, 4), (69, 129)] {
            let mut codes = vec![0; n * k];
            codes[o * k + i] = 1;
            let packed = pack_ternary(&codes, n, k);
            let (block, g, r8) = (o / 32, o % 32 / 8, o % 8);
            let byte = (block * (columns / 4) + i / 4) * 32 + r8 * 4 + i % 4;
            for (at, &found) in packed.iter().enumerate() {
                let want = if at == byte { ZERO_BYTE + (1 << (2 * g)) } else { ZERO_BYTE };
                assert_eq!(found, want, "weight [{o}, {i}], byte {at}");
            }
            assert_eq!(unpack_ternary(&packed, n, k), Some(codes));
        }
    }

    #[test]
    fn bytes_that_are_no_packing_are_refused() {
        let good = pack_ternary(&[1; 33 * 65], 33, 65);
        assert!(is_packed(&good, 33, 65));
        for at in [0, 40, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] |= 3;
            assert!(!is_packed(&bad, 33, 65), "value 3 in byte {at}");
        }
        let mut bad = good.clone();
        let (byte, bit) = position(128, 33, 0);
        bad[byte] ^= 1 << bit;
        assert!(!is_packed(&bad, 33, 65), "a weight in a padding row");
        let mut bad = good.clone();
        let (byte, bit) = position(128, 0, 65);
        bad[byte] ^= 1 << bit;
        assert!(!is_packed(&bad, 33, 65), "a weight in a padding column");
        assert_eq!(unpack_ternary(&good[1..], 33, 65), None);
        assert_eq!(packed_len(usize::MAX, 1), None);
        assert_eq!(unpack_ternary(&[], usize::MAX, usize::MAX), None);
        assert_eq!(unpack_ternary(&pack_ternary(&[], 0, 5), 0, 5), Some(vec![]));
        assert_eq!(unpack_ternary(&[], 1 << 60, 0), Some(vec![]));
    }
}
