//! The addresses of an order's bitmaps, as kho-v1 chunks hold them.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::mapping::Items;
use crate::tracker::Tracker;
use crate::tracker::placement::{BitmapPlace, Rule};
use crate::units::Order;

impl Tracker {
    /// Whether an order has blocks of an index from `index` on.
    pub fn has_blocks_from(&self, order: Order, index: u64) -> bool {
        self.dirs[order.index()].blocks_from(index).next().is_some()
    }

    /// Writes the placements of an order's blocks from `index` on, ascending, as many as fit `into`: the address of the
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
