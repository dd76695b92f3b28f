//! Memory planning: arena offsets for buffers with known lifetimes.

/// A request: bytes and the steps (inclusive) between which they are live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bytes.
    pub bytes: u64,
    /// First step.
    pub first: u32,
    /// Last step.
    pub last: u32,
}

/// Every offset is a multiple of this many bytes.
pub const ALIGN: u64 = 64;

/// Offsets for `requests` such that no two live ones overlap, the bytes needed, and the least any plan could need.
///
/// Largest first, each at the lowest free offset.
pub fn plan(requests: &[Request]) -> (Vec<u64>, u64, u64) {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(requests[i].bytes), requests[i].first, i));
    let mut offsets = vec![0u64; requests.len()];
    let mut placed: Vec<usize> = vec![];
    let mut total = 0;
    for i in order {
        let r = requests[i];
        let mut taken: Vec<(u64, u64)> = placed
            .iter()
            .filter(|&&j| requests[j].first <= r.last && r.first <= requests[j].last)
            .map(|&j| (offsets[j], offsets[j] + requests[j].bytes))
            .collect();
        taken.sort_unstable();
        let mut at = 0;
        for (lo, hi) in taken {
            if at + r.bytes <= lo {
                break;
            }
            at = at.max(hi.next_multiple_of(ALIGN));
        }
        offsets[i] = at;
        total = total.max((at + r.bytes).next_multiple_of(ALIGN));
        placed.push(i);
    }
    (offsets, total, bound(requests))
}

/// The largest sum of live bytes over the steps.
fn bound(requests: &[Request]) -> u64 {
    let mut events: Vec<(u32, bool, u64)> = vec![];
    for r in requests {
        events.push((r.first, true, r.bytes));
        events.push((r.last + 1, false, r.bytes));
    }
    // At one step, what ended before it goes first.
    events.sort_unstable_by_key(|&(at, starts, _)| (at, starts));
    let (mut live, mut most) = (0, 0);
    for (_, starts, bytes) in events {
        live = if starts { live + bytes } else { live - bytes };
        most = most.max(live);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_buffers_never_overlap_and_dead_ones_are_reused() {
        let mut seed = 1u32;
        let mut next = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % n
        };
        for _ in 0..50 {
            let requests: Vec<Request> = (0..40)
                .map(|_| {
                    let first = next(30);
                    Request { bytes: 1 + u64::from(next(5000)), first, last: first + next(8) }
                })
                .collect();
            let (offsets, total, least) = plan(&requests);
            assert!(least <= total);
            for (i, a) in requests.iter().enumerate() {
                assert_eq!(offsets[i] % ALIGN, 0);
                assert!(offsets[i] + a.bytes <= total);
                for (j, b) in requests.iter().enumerate().take(i) {
                    let live = a.first <= b.last && b.first <= a.last;
                    let apart = offsets[i] + a.bytes <= offsets[j] || offsets[j] + b.bytes <= offsets[i];
                    assert!(!live || apart, "{i} and {j} share bytes");
                }
            }
        }
        let chain: Vec<Request> = (0..10).map(|i| Request { bytes: 640, first: i, last: i + 1 }).collect();
        assert_eq!(plan(&chain).1, 1280, "two buffers take turns");
    }
}
