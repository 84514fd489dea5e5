//! What a list of folios is like, before anything is done with it.

#![forbid(unsafe_code)]

use super::simd;
use crate::units::Order;

/// Blocks that a list may span to be scattered: what a table of that many bytes can tell apart.
pub(super) const SPAN: usize = 1 << 18;

/// What the folios of one order in a list are like.
pub(super) struct Look {
    pub(super) order: Order,
    /// log2 of the bits in the blocks that are told apart.
    pub(super) log2_bits: u32,
    /// How many there are.
    pub(super) count: usize,
    /// The lowest and the highest, by number.
    pub(super) low: u64,
    pub(super) high: u64,
    /// The last one seen.
    last: u64,
    /// How many are lower than the one before.
    pub(super) descents: usize,
    /// For each block, by the low bits of its index, whether a folio lies in it. Exact if they span no more than that.
    touched: Vec<bool>,
}

/// What two parts of a list are like together, the second behind the first.
pub(super) fn joined(mut looks: Vec<Look>, later: Vec<Look>) -> Vec<Look> {
    for later in later {
        match looks.iter_mut().find(|look| look.order == later.order) {
            Some(look) => look.join(&later),
            None => looks.push(later),
        }
    }
    looks
}

impl Look {
    pub(super) fn new(order: Order, log2_bits: u32) -> Self {
        Look { order, log2_bits, count: 0, low: u64::MAX, high: 0, last: 0, descents: 0, touched: vec![false; SPAN] }
    }

    pub(super) fn add(&mut self, piece: &[u64]) {
        let (low, high, descents) = simd::survey(piece, self.last);
        self.last = piece.last().copied().unwrap_or(self.last);
        (self.low, self.high) = (self.low.min(low), self.high.max(high));
        self.descents += descents;
        self.count += piece.len();
        // Where all are in one block there is one to touch: an empty piece touches none.
        let all = if low >> self.log2_bits == high >> self.log2_bits { &piece[..1] } else { piece };
        for &folio in all {
            self.touched[(folio >> self.log2_bits) as usize & (SPAN - 1)] = true;
        }
    }

    fn join(&mut self, later: &Look) {
        self.count += later.count;
        (self.low, self.high) = (self.low.min(later.low), self.high.max(later.high));
        self.descents += later.descents;
        self.last = later.last;
        self.touched.iter_mut().zip(&later.touched).for_each(|(touched, later)| *touched |= later);
    }

    /// Whether `touched` tells all blocks apart.
    pub(super) fn is_near(&self) -> bool {
        self.blocks(self.log2_bits) < SPAN as u64
    }

    /// Blocks with a folio in them, ascending, if they are near.
    pub(super) fn touched(&self) -> impl Iterator<Item = u64> + '_ {
        let blocks = self.low >> self.log2_bits..=self.high >> self.log2_bits;
        blocks.filter(|index| self.touched[*index as usize & (SPAN - 1)])
    }

    /// From the first block to the last one.
    pub(super) fn blocks(&self, log2_bits: u32) -> u64 {
        (self.high >> log2_bits) - (self.low >> log2_bits)
    }
}
