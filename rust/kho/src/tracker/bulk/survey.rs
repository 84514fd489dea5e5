//! Statistics of a folio list, used to choose how to process it.

#![forbid(unsafe_code)]

use crate::tracker::simd;
use crate::units::Order;

/// Blocks that a list may span and still be partitioned: the entries of [`ListStats::touched`].
pub(in crate::tracker) const SPAN: usize = 1 << 18;

/// Statistics of the folios of one order in a list.
pub(in crate::tracker) struct ListStats {
    pub(in crate::tracker) order: Order,
    /// log2 of the bits per entry of `touched`.
    pub(in crate::tracker) log2_bits: u32,
    /// Number of folios.
    pub(in crate::tracker) count: usize,
    /// The lowest folio number.
    pub(in crate::tracker) low: u64,
    /// The highest folio number.
    pub(in crate::tracker) high: u64,
    /// The last folio number added.
    last: u64,
    /// How many folio numbers are lower than the one before them.
    pub(in crate::tracker) descents: usize,
    /// Whether a folio lies in a block, indexed by the block's index modulo [`SPAN`]. Exact if the list spans fewer blocks.
    touched: Vec<bool>,
}

/// Merges the statistics of two parts of a list; `later` is the second part.
pub(in crate::tracker) fn merge_stats(mut earlier: Vec<ListStats>, later: Vec<ListStats>) -> Vec<ListStats> {
    for later in later {
        match earlier.iter_mut().find(|stats| stats.order == later.order) {
            Some(stats) => stats.merge(&later),
            None => earlier.push(later),
        }
    }
    earlier
}

impl ListStats {
    pub(in crate::tracker) fn new(order: Order, log2_bits: u32) -> Self {
        ListStats {
            order,
            log2_bits,
            count: 0,
            low: u64::MAX,
            high: 0,
            last: 0,
            descents: 0,
            touched: vec![false; SPAN],
        }
    }

    /// Adds folio numbers, in the order of the list.
    pub(in crate::tracker) fn add(&mut self, piece: &[u64]) {
        let (low, high, descents) = simd::survey(piece, self.last);
        self.last = piece.last().copied().unwrap_or(self.last);
        (self.low, self.high) = (self.low.min(low), self.high.max(high));
        self.descents += descents;
        self.count += piece.len();
        // If all folios lie in one block, marking the first one's is enough. An empty piece (low > high) marks none.
        let marked = if low >> self.log2_bits == high >> self.log2_bits { &piece[..1] } else { piece };
        for &folio in marked {
            self.touched[(folio >> self.log2_bits) as usize & (SPAN - 1)] = true;
        }
    }

    fn merge(&mut self, later: &ListStats) {
        self.count += later.count;
        (self.low, self.high) = (self.low.min(later.low), self.high.max(later.high));
        self.descents += later.descents;
        self.last = later.last;
        self.touched.iter_mut().zip(&later.touched).for_each(|(touched, later)| *touched |= later);
    }

    /// Whether the blocks span fewer than [`SPAN`] indexes, so that `touched` is exact.
    pub(in crate::tracker) fn is_near(&self) -> bool {
        self.blocks(self.log2_bits) < SPAN as u64
    }

    /// The indexes of blocks with a folio in them, ascending. Exact if [`ListStats::is_near`].
    pub(in crate::tracker) fn touched(&self) -> impl Iterator<Item = u64> + '_ {
        let blocks = self.low >> self.log2_bits..=self.high >> self.log2_bits;
        blocks.filter(|index| self.touched[*index as usize & (SPAN - 1)])
    }

    /// The distance from the first block to the last one, in blocks of `1 << log2_bits` bits.
    pub(in crate::tracker) fn blocks(&self, log2_bits: u32) -> u64 {
        (self.high >> log2_bits) - (self.low >> log2_bits)
    }
}
