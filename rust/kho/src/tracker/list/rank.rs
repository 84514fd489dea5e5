//! Rank and select: how many folios lie below a pfn, and which folio has n folios below it.
//!
//! What lies below is counted, by blocks and then by words: O(bytes of blocks below), which is 32 MiB, or some
//! milliseconds, per TiB of order-0 folios.

#![forbid(unsafe_code)]

use crate::tracker::{Tracker, simd};
use crate::units::{Order, Pfn};

impl Tracker {
    /// How many folios of an order begin below a pfn; no folio needs to begin at the pfn itself.
    pub fn rank(&self, pfn: Pfn, order: Order) -> u64 {
        let dir = &self.dirs[order.index()];
        if dir.len == 0 {
            return 0;
        }
        let folio = pfn.0.div_ceil(order.nr_pages());
        let index = folio >> self.shape.log2_bits;
        let before: u64 = dir.blocks_in(0..index).map(|(_, block)| simd::count(block, self.shape)).sum();
        let Some(block) = dir.get(index) else {
            return before;
        };
        let words = (folio >> 6) as usize & (self.shape.words() - 1);
        let whole: u64 = (0..words).map(|n| u64::from(block.load(self.shape, n).count_ones())).sum();
        let part = block.load(self.shape, words) & !(!0 << (folio & 63));
        before + whole + u64::from(part.count_ones())
    }

    /// The folio of an order that `rank` others of it lie below; `None` if there are not as many.
    pub fn select(&self, rank: u64, order: Order) -> Option<Pfn> {
        let dir = Some(&self.dirs[order.index()]).filter(|dir| rank < dir.len)?;
        let mut left = rank;
        let (index, block) = dir.blocks_from(0).find(|&(_, block)| {
            let count = simd::count(block, self.shape);
            let here = left < count;
            left -= if here { 0 } else { count };
            here
        })?;
        let words = (0u64..).zip(block.words(self.shape));
        for (n, word) in words {
            let count = u64::from(word.count_ones());
            if left < count {
                let folio = (index << self.shape.log2_bits) + 64 * n + u64::from(nth_one(word, left as u32));
                return Some(Pfn(folio << order.get()));
            }
            left -= count;
        }
        None
    }
}

/// The number of the bit set that `n` others lie below, by halves. There are more than `n`.
fn nth_one(word: u64, mut n: u32) -> u32 {
    let mut at = 0;
    for width in [32, 16, 8, 4, 2, 1] {
        let below = (word >> at & !(!0 << width)).count_ones();
        if n >= below {
            n -= below;
            at += width;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::list::iter::Ones;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_nth_one_is_the_nth_of_all(word: u64) {
            let ones: Vec<u64> = Ones(word).collect();
            for (n, &bit) in (0..).zip(&ones) {
                prop_assert_eq!(u64::from(nth_one(word, n)), bit);
            }
        }
    }

    #[test]
    fn the_nth_of_all_ones_is_n() {
        assert!((0..64).all(|n| nth_one(!0, n) == n));
    }
}
