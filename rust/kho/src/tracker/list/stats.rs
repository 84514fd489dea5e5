//! Folios, blocks and bytes by order.

#![forbid(unsafe_code)]

use crate::tracker::{BlockRef, Tracker};
use crate::units::Order;

/// Counts and bytes of one order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OrderStats {
    /// The order.
    pub order: Order,
    /// Folios marked.
    pub folios: u64,
    /// Blocks, the empty ones included.
    pub blocks: u64,
    /// Blocks without a folio.
    pub empty_blocks: u64,
    /// Bytes of blocks and of the directory.
    pub bytes: u64,
}

impl Tracker {
    /// One row per order of [`Tracker::orders`].
    pub fn stats(&self) -> Vec<OrderStats> {
        self.orders()
            .map(|order| {
                let dir = &self.dirs[order.index()];
                OrderStats {
                    order,
                    folios: dir.len,
                    blocks: dir.blocks(),
                    empty_blocks: self.blocks(order).filter(BlockRef::is_empty).count() as u64,
                    bytes: dir.blocks() * self.geometry.block_bytes() + dir.nbytes(),
                }
            })
            .collect()
    }
}
