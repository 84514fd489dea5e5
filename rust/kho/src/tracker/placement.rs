//! Where an order's blocks lie, for a list of them: what kho-v1's chunks hold.

#![forbid(unsafe_code)]

use super::Tracker;
use super::block::Block;
use crate::error::{Error, Result};
use crate::mapping::Items;
use crate::units::Order;

/// Physical addresses, little-endian: of the folio that a block's bit 0 stands for, and of the block.
pub type BitmapPlace = [u64; 2];

/// How an index and a pointer become a [`BitmapPlace`].
#[derive(Clone, Copy)]
pub(super) struct Rule {
    /// Bytes from one block's first folio to the next one's.
    pub(super) stride: u64,
    /// The pointers that this holds for, and the physical address of the first of them.
    pub(super) within: usize,
    pub(super) len: usize,
    pub(super) first: u64,
}

impl Rule {
    /// `None` for a block that lies elsewhere.
    pub(super) fn place(self, index: u64, block: Block) -> Option<BitmapPlace> {
        let offset = block.addr().wrapping_sub(self.within);
        (offset < self.len).then(|| [index.wrapping_mul(self.stride).to_le(), (self.first + offset as u64).to_le()])
    }
}

impl Tracker {
    /// Whether an order has blocks of an index from `index` on.
    pub fn has_blocks_from(&self, order: Order, index: u64) -> bool {
        self.dirs[order.index()].blocks_from(index).next().is_some()
    }

    /// Of an order's blocks from `index` on, ascending, those that became empty too, as many as fit `into`: the address of the
    /// folio that bit 0 stands for, and that of the bitmap. [`Tracker::blocks`] for whom it is enough to know where they are.
    /// Returns how many there were, and the index to go on from.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a tracker whose blocks have no addresses.
    pub fn places_from(&self, order: Order, index: u64, into: Items<'_, BitmapPlace>) -> Result<(usize, u64)> {
        let dir = &self.dirs[order.index()];
        // From one bitmap to the next; 0 where there is one bitmap only, as none of them begins elsewhere.
        let stride = self.geometry.phys_start(order, 1).0;
        let (mut filled, mut index) = (0, index);
        while filled < into.len()
            && let Some((_, block)) = dir.blocks_from(index).next()
        {
            let why = || Error::Invalid { what: "tracker", why: "its blocks are not in an arena".into() };
            let (within, first) = block.stretch(&*self.source).ok_or_else(why)?;
            let rule = Rule { stride, within: within.start, len: within.len(), first: first.0 };
            let (more, next) = dir.fill_from(index, into.from(filled), rule);
            (filled, index) = (filled + more, next);
        }
        Ok((filled, index))
    }
}
