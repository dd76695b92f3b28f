//! A keyed permutation of `0..n` that is computed per element.
//!
//! `position -> row` depends on (seed, epoch, n) only, so that a run resumes from its position alone.

/// Rounds of the network; small domains need more than the customary four to look shuffled.
const ROUNDS: u64 = 8;

/// Image of `index` under the permutation of `0..n` that (seed, epoch) selects. A balanced Feistel network over the next
/// even number of bits, applied again until it lands inside. `index < n`.
pub(super) fn permute(index: u64, n: u64, seed: u64, epoch: u64) -> u64 {
    assert!(index < n, "the index lies inside the domain");
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let key = mix(seed ^ mix(epoch));
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(key ^ (round << 56) ^ right) & mask));
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

/// A bijection of 64-bit words in which every output bit depends on every input bit.
pub(super) fn mix(word: u64) -> u64 {
    let mut x = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Which block of which of several streams is drawn next: each stream has weight times blocks in every sum of weight times blocks,
/// spread evenly, and its blocks are shuffled anew for every pass over it.
#[derive(Clone, Debug)]
pub(super) struct Draw {
    /// Number of blocks, and the share of blocks that come from this stream or from those behind it that come from it: of 2^64.
    streams: Vec<(u64, u64)>,
    seed: u64,
}

impl Draw {
    /// Weight and number of blocks of each stream; at least one, none without a block.
    pub(super) fn new(streams: &[(f64, u64)], seed: u64) -> Draw {
        assert!(!streams.is_empty() && streams.iter().all(|s| s.1 > 0), "there is a block to draw from every stream");
        let shares: Vec<f64> = streams.iter().map(|(weight, blocks)| weight * *blocks as f64).collect();
        let share = |i: usize| {
            let rest: f64 = shares[i..].iter().sum();
            // The conversion saturates at the greatest number.
            (shares[i] / rest * 2f64.powi(64)) as u64
        };
        Draw { streams: streams.iter().enumerate().map(|(i, s)| (s.1, share(i))).collect(), seed }
    }

    /// The stream and the block in it that are drawn as number `index`.
    pub(super) fn at(&self, index: u64) -> (usize, usize) {
        // How many of the first n blocks that this stream or one behind it gives are its own.
        let own = |n: u64, share: u64| ((u128::from(n) * u128::from(share)) >> 64) as u64;
        let mut index = index;
        for (number, &(blocks, share)) in self.streams.iter().enumerate() {
            let before = own(index, share);
            if number + 1 == self.streams.len() || own(index + 1, share) > before {
                let drawn = if number + 1 == self.streams.len() { index } else { before };
                let seed = self.seed.wrapping_add(number as u64);
                return (number, permute(drawn % blocks, blocks, seed, drawn / blocks) as usize);
            }
            index -= before;
        }
        unreachable!("the last stream takes what the others leave")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(n: u64, seed: u64, epoch: u64) -> Vec<u64> {
        (0..n).map(|i| permute(i, n, seed, epoch)).collect()
    }

    #[test]
    fn every_order_is_a_permutation() {
        for n in (1..130).chain([255, 256, 257, 1000, 4097]) {
            for epoch in 0..3 {
                let mut seen = order(n, 7, epoch);
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<_>>(), "n {n}");
            }
        }
        assert!(permute((1 << 40) - 1, 1 << 40, 1, 2) < 1 << 40);
    }

    #[test]
    fn seeds_and_epochs_give_different_orders() {
        assert_ne!(order(50, 1, 0), order(50, 1, 1));
        assert_ne!(order(50, 1, 0), order(50, 2, 0));
        let stays = order(1000, 3, 0).iter().enumerate().filter(|&(i, &x)| i as u64 == x).count();
        assert!(stays < 10, "{stays} of 1000 rows keep their place");
        let orders: std::collections::BTreeSet<_> = (0..600).map(|epoch| order(4, 5, epoch)).collect();
        assert_eq!(orders.len(), 24, "all orders of four rows occur");
    }

    #[test]
    fn the_order_is_part_of_the_checkpoint_format() {
        assert_eq!(order(12, 42, 3), [3, 8, 7, 1, 5, 9, 10, 6, 11, 2, 4, 0]);
    }
}
