//! The blocks of one order: a flat window of slots, and a map for what lies far from it.
//!
//! ```text
//!   index:      3        base ............ base + slots.len()        2^40 - 1
//!            [far map]  [ slot | slot | slot | ... ]                [far map]
//!                          |
//!                        block
//! ```
//! The window may be [`SLACK`] times as long as there are blocks, so that a lookup is one comparison and one load for
//! any memory a machine has, while a few folios at both ends of the address space cost a map entry each.

use super::block::{Block, BlockSource, Shape};
use crate::error::Result;
use core::ops::Range;
use std::collections::BTreeMap;

/// Slots the window may have per block.
const SLACK: u64 = 64;
/// Slots the window may have whatever the blocks.
const SMALL_WINDOW: u64 = 1024;
/// The window begins and grows at multiples of this many slots.
const GRAIN: u64 = 16;

/// The blocks of one order. What a lookup needs is in one cache line.
#[repr(C, align(64))]
pub(super) struct Directory {
    slots: Vec<Option<Block>>,
    base: u64,
    /// Bits set in all.
    pub(super) len: u64,
    /// Blocks that exist.
    pub(super) blocks: u64,
    /// Blocks from here on are never in the window: they do not exist, or an end of theirs lies beyond the address space.
    end: u64,
    /// Blocks whose index the window does not cover.
    far: BTreeMap<u64, Block>,
}

impl Directory {
    /// `end`: how many blocks of the order lie in the address space whole.
    pub(super) const fn new(end: u64) -> Self {
        Directory { slots: Vec::new(), base: 0, len: 0, blocks: 0, end, far: BTreeMap::new() }
    }

    /// A block in the window. Never one of an index that has no block, and so of no folio outside the address space.
    #[inline(always)]
    pub(super) fn near(&self, index: u64) -> Option<Block> {
        // A window is never longer than memory, so the cast loses nothing where it matters.
        *self.slots.get(index.wrapping_sub(self.base) as usize)?
    }

    #[inline]
    pub(super) fn get(&self, index: u64) -> Option<Block> {
        match self.slots.get(index.wrapping_sub(self.base) as usize) {
            Some(slot) => *slot,
            None => self.far.get(&index).copied(),
        }
    }

    /// Makes sure that block `index` exists.
    pub(super) fn ensure(&mut self, index: u64, source: &mut dyn BlockSource, shape: Shape) -> Result<Block> {
        if let Some(block) = self.get(index) {
            return Ok(block);
        }
        let block = Block::allocate(source, shape)?;
        self.put(index, block);
        Ok(block)
    }

    /// Puts a block where none is.
    pub(super) fn put(&mut self, index: u64, block: Block) {
        self.blocks += 1;
        self.reach(index);
        match self.slots.get_mut(index.wrapping_sub(self.base) as usize) {
            Some(slot) => *slot = Some(block),
            None => drop(self.far.insert(index, block)),
        }
    }

    /// Takes in a block whose bits are counted, unless there is one already; then false.
    pub(super) fn adopt(&mut self, index: u64, block: Block, count: u64) -> bool {
        if self.get(index).is_some() {
            return false;
        }
        self.put(index, block);
        self.len += count;
        true
    }

    /// Puts another block with the same bits in the place of one.
    pub(super) fn replace(&mut self, index: u64, block: Block) {
        match self.slots.get_mut(index.wrapping_sub(self.base) as usize) {
            Some(slot) => *slot = Some(block),
            None => drop(self.far.insert(index, block)),
        }
    }

    /// Grows the window to `index` unless that makes it too long for the blocks there are. It grows to a power of two,
    /// towards where it had to grow, so that growing costs a constant per block.
    fn reach(&mut self, index: u64) {
        let end = self.base + self.slots.len() as u64;
        if self.base <= index && index < end || index >= self.end {
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
        let high = high.min(self.end);
        let mut slots = vec![None; (high - low) as usize];
        if !self.slots.is_empty() {
            let from = (self.base - low) as usize;
            slots[from..from + self.slots.len()].copy_from_slice(&self.slots);
        }
        let mut rest = self.far.split_off(&low);
        self.far.append(&mut rest.split_off(&high));
        for (index, block) in rest {
            slots[(index - low) as usize] = Some(block);
        }
        (self.slots, self.base) = (slots, low);
    }

    /// Blocks from index `from` on, ascending, with their indexes.
    pub(super) fn blocks_from(&self, from: u64) -> impl Iterator<Item = (u64, Block)> + '_ {
        self.blocks_in(from..u64::MAX)
    }

    /// Blocks with an index in a range, ascending, with their indexes.
    pub(super) fn blocks_in(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Block)> + '_ {
        let (from, to) = (range.start, range.end.max(range.start));
        let (base, end) = (self.base, self.base + self.slots.len() as u64);
        let at = |index: u64| (index.clamp(base, end) - base) as usize;
        let near = self.slots[at(from)..at(to)].iter().zip(from.clamp(base, end)..);
        let near = near.filter_map(|(slot, index)| Some((index, (*slot)?)));
        let far = |range: Range<u64>| {
            // An empty range stands for one that begins behind its end, which a map's range() would not take.
            let range = range.start.min(range.end)..range.end;
            self.far.range(range).map(|(&index, &block)| (index, block))
        };
        far(from..base.min(to)).chain(near).chain(far(from.max(end)..to))
    }

    /// Asks for the blocks of a range of folios to be brought near, all at once.
    pub(super) fn prefetch(&self, shape: Shape, folios: Range<u64>) {
        for (_, block) in self.blocks_in(folios.start >> shape.log2_bits..folios.end >> shape.log2_bits) {
            block.prefetch(shape);
        }
    }

    /// Bytes held beside the blocks.
    pub(super) fn nbytes(&self) -> u64 {
        let far = self.far.len() * (size_of::<Block>() + size_of::<u64>());
        (self.slots.capacity() * size_of::<Option<Block>>() + far) as u64
    }
}
