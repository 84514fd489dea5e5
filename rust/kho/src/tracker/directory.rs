//! The blocks of one order: a flat window of slots, and a map for what lies far from it.
//!
//! ```text
//!   index:      3        base ............ base + slots.len()        2^40 - 1
//!            [far map]  [ slot | slot | slot | ... ]                [far map]
//!                          |
//!                        block, its count
//! ```
//! The window may be [`SLACK`] times as long as there are blocks, so that a lookup is one comparison and one load for
//! any memory a machine has, while a few folios at both ends of the address space cost a map entry each.

use super::block::{Block, BlockSource, Shape};
use crate::error::Result;
use std::collections::BTreeMap;

/// Slots the window may have per block.
const SLACK: u64 = 64;
/// Slots the window may have whatever the blocks.
const SMALL_WINDOW: u64 = 1024;
/// The window begins and grows at multiples of this many slots.
const GRAIN: u64 = 16;

/// A block's place: absent, or the block and how many of its bits are set.
#[derive(Clone, Copy, Default)]
pub(super) struct Slot {
    pub(super) block: Option<Block>,
    pub(super) count: u64,
}

/// The blocks of one order.
pub(super) struct Directory {
    slots: Vec<Slot>,
    base: u64,
    /// Bits set in all.
    pub(super) len: u64,
    /// Bits a valid pfn has not: those below the order, those beyond the address space.
    pub(super) invalid: u64,
    /// Blocks that exist.
    pub(super) blocks: u64,
    /// Slots whose index the window does not cover.
    far: BTreeMap<u64, Slot>,
}

impl Directory {
    pub(super) const fn new(invalid: u64) -> Self {
        Directory { slots: Vec::new(), base: 0, len: 0, invalid, blocks: 0, far: BTreeMap::new() }
    }

    /// The slot of a block in the window.
    #[inline(always)]
    pub(super) fn near_mut(&mut self, index: u64) -> Option<&mut Slot> {
        // A window is never longer than memory, so the cast loses nothing where it matters.
        self.slots.get_mut(index.wrapping_sub(self.base) as usize)
    }

    #[inline]
    pub(super) fn get(&self, index: u64) -> Option<(Block, u64)> {
        let slot = match self.slots.get(index.wrapping_sub(self.base) as usize) {
            Some(slot) => slot,
            None => self.far.get(&index)?,
        };
        Some((slot.block?, slot.count))
    }

    /// A block that exists, and its count to keep.
    #[inline]
    pub(super) fn get_mut(&mut self, index: u64) -> Option<(Block, &mut u64)> {
        let slot = match self.slots.get_mut(index.wrapping_sub(self.base) as usize) {
            Some(slot) => slot,
            None => self.far.get_mut(&index)?,
        };
        Some((slot.block?, &mut slot.count))
    }

    /// Makes sure that block `index` exists.
    pub(super) fn ensure(&mut self, index: u64, source: &mut dyn BlockSource, shape: Shape) -> Result<()> {
        if self.get(index).is_some() {
            return Ok(());
        }
        let slot = Slot { block: Some(Block::allocate(source, shape)?), count: 0 };
        self.blocks += 1;
        self.reach(index);
        match self.near_mut(index) {
            Some(near) => *near = slot,
            None => drop(self.far.insert(index, slot)),
        }
        Ok(())
    }

    /// Takes in a block whose bits are counted, unless there is one already; then false.
    pub(super) fn adopt(&mut self, index: u64, block: Block, count: u64) -> bool {
        if self.get(index).is_some() {
            return false;
        }
        let slot = Slot { block: Some(block), count };
        self.blocks += 1;
        self.len += count;
        self.reach(index);
        match self.near_mut(index) {
            Some(near) => *near = slot,
            None => drop(self.far.insert(index, slot)),
        }
        true
    }

    /// Puts another block with the same bits in the place of one.
    pub(super) fn replace(&mut self, index: u64, block: Block) {
        let slot = match self.slots.get_mut(index.wrapping_sub(self.base) as usize) {
            Some(slot) => Some(slot),
            None => self.far.get_mut(&index),
        };
        if let Some(slot) = slot {
            slot.block = Some(block);
        }
    }

    /// Grows the window to `index` unless that makes it too long for the blocks there are. It grows to a power of two,
    /// towards where it had to grow, so that growing costs a constant per block.
    fn reach(&mut self, index: u64) {
        let end = self.base + self.slots.len() as u64;
        if self.base <= index && index < end {
            return;
        }
        let floor = index & !(GRAIN - 1);
        let (low, high) =
            if self.slots.is_empty() { (floor, floor + GRAIN) } else { (self.base.min(floor), end.max(floor + GRAIN)) };
        if high - low > SMALL_WINDOW.max(SLACK * self.blocks) {
            return;
        }
        let want = (high - low).next_power_of_two();
        let (low, high) = if !self.slots.is_empty() && low < self.base {
            (high.saturating_sub(want), high)
        } else {
            (low, low + want)
        };
        let mut slots = vec![Slot::default(); (high - low) as usize];
        if !self.slots.is_empty() {
            let from = (self.base - low) as usize;
            slots[from..from + self.slots.len()].copy_from_slice(&self.slots);
        }
        let mut rest = self.far.split_off(&low);
        let mut above = rest.split_off(&high);
        self.far.append(&mut above);
        for (index, slot) in rest {
            slots[(index - low) as usize] = slot;
        }
        (self.slots, self.base) = (slots, low);
    }

    /// Blocks from index `from` on, ascending: index, block, count.
    pub(super) fn blocks_from(&self, from: u64) -> impl Iterator<Item = (u64, Block, u64)> + '_ {
        self.blocks_in(from..u64::MAX)
    }

    /// Blocks with an index in a range, ascending: index, block, count.
    pub(super) fn blocks_in(&self, range: core::ops::Range<u64>) -> impl Iterator<Item = (u64, Block, u64)> + '_ {
        let (from, to) = (range.start, range.end.max(range.start));
        let (base, end) = (self.base, self.base + self.slots.len() as u64);
        let at = |index: u64| (index.clamp(base, end) - base) as usize;
        let near = self.slots[at(from)..at(to)].iter().zip(from.clamp(base, end)..);
        let near = near.map(|(slot, index)| (index, *slot));
        let far = |range: core::ops::Range<u64>| {
            // An empty range stands for one that begins behind its end, which a map's range() would not take.
            let range = range.start.min(range.end)..range.end;
            self.far.range(range).map(|(&index, slot)| (index, *slot))
        };
        far(from..base.min(to))
            .chain(near)
            .chain(far(from.max(end)..to))
            .filter_map(|(index, slot)| Some((index, slot.block?, slot.count)))
    }

    /// As `blocks_from(0)`, with the counts to keep.
    pub(super) fn blocks_mut(&mut self) -> impl Iterator<Item = (u64, Block, &mut u64)> + '_ {
        let base = self.base;
        let near = self.slots.iter_mut().zip(base..).map(|(s, i)| (i, s));
        let far = self.far.iter_mut().map(|(&i, s)| (i, s));
        near.chain(far).filter_map(|(index, slot)| Some((index, slot.block?, &mut slot.count)))
    }

    /// Sums the counts again, after `blocks_mut` changed them.
    pub(super) fn recount(&mut self) {
        self.len = self.blocks_mut().map(|(.., count)| *count).sum();
    }

    /// Bytes held beside the blocks.
    pub(super) fn nbytes(&self) -> u64 {
        (self.slots.capacity() * size_of::<Slot>() + self.far.len() * (size_of::<Slot>() + size_of::<u64>())) as u64
    }
}
