//! The blocks of one order: a window of slots from the first block on, and a map for what lies beyond it.
//!
//! ```text
//!   index:   0 ........................ window.len()            2^40 - 1
//!            [ slot | slot | slot | ... ]          [far map]
//!                       |
//!                     block
//! ```
//! The window is up to [`SLACK`] times as long as there are blocks: so that a lookup is one comparison and one load, while
//! few blocks far apart cost a map entry each, and slots take no more than the nodes of the kernel's tree. Of the blocks
//! beyond the window the last one used is kept at hand, so that neighbours need no search either.

#![allow(unsafe_code)]

use crate::error::Result;
use crate::mapping::Items;
use crate::tracker::block::{Block, BlockSource, Shape};
use crate::tracker::index::window::Window;
use crate::tracker::placement::{BitmapPlace, Rule};
use crate::tracker::simd;
use crate::tracker::word::Word;
use core::iter::once;
use core::mem::offset_of;
use core::ops::Range;
use std::collections::BTreeMap;

/// Slots the window may have per block. Nodes of the kernel's tree take 9 bytes a slot, and where blocks lie at random as
/// densely as this there are as good as all of them.
const SLACK: u64 = 16;
/// Slots looked at together, and one by one where not all of them have blocks.
const GROUP: u64 = 256;
/// Bytes of a far block's entry: a node of the map has 192, and at least five entries.
const FAR: usize = 40;
/// Slots it has at least.
const SHORT: u64 = 16;

/// The blocks of one order. What a lookup needs is in one cache line.
#[repr(C, align(32))]
#[derive(Default)]
pub(in crate::tracker) struct Directory {
    pub(in crate::tracker) window: Window,
    /// Bits set in all.
    pub(in crate::tracker) len: u64,
    /// What no lookup asks for, once there are blocks.
    rest: Option<Box<Rest>>,
}

/// Facts about blocks that a lookup in the window does not need.
#[derive(Default)]
struct Rest {
    /// Blocks that exist.
    blocks: u64,
    /// The indexes of blocks in the window lie in here.
    used: Range<u64>,
    /// Blocks whose index the window does not cover.
    far: BTreeMap<u64, Block>,
    /// The last one of them that was looked for.
    last: Option<(u64, Block)>,
}

impl Directory {
    /// Blocks that exist.
    pub(in crate::tracker) fn blocks(&self) -> u64 {
        self.rest.as_ref().map_or(0, |rest| rest.blocks)
    }

    #[inline]
    pub(in crate::tracker) fn get(&self, index: u64) -> Option<Block> {
        if index < self.window.len() {
            return self.window.get(index);
        }
        let rest = self.rest.as_ref()?;
        match rest.last {
            Some((last, block)) if last == index => Some(block),
            _ => rest.far.get(&index).copied(),
        }
    }

    /// The same, for who is likely to ask for it again.
    pub(in crate::tracker) fn seek(&mut self, index: u64) -> Option<Block> {
        let block = self.get(index)?;
        if index >= self.window.len()
            && let Some(rest) = &mut self.rest
        {
            rest.last = Some((index, block));
        }
        Some(block)
    }

    /// The word of a folio whose block the window does not have.
    #[cold]
    pub(in crate::tracker) fn far_word(&self, shape: Shape, folio: u64) -> Option<Word> {
        self.get(folio >> shape.log2_bits).map(|block| block.word(shape, folio))
    }

    /// Sets the bit of a folio, whose word that is. True if it was clear.
    #[inline(always)]
    pub(in crate::tracker) fn set(&mut self, word: Word, folio: u64) -> bool {
        let before = self.len;
        // SAFETY: `len` is a u64 at that offset in `Directory`, and `self` is borrowed for writing.
        unsafe { word.set_counted::<_, { offset_of!(Directory, len) }>(folio, self) };
        self.len != before
    }

    /// Clears the bit of a folio, whose word that is. True if it was set.
    #[inline(always)]
    pub(in crate::tracker) fn clear(&mut self, word: Word, folio: u64) -> bool {
        let before = self.len;
        // SAFETY: `len` is a u64 at that offset in `Directory`, and `self` is borrowed for writing.
        unsafe { word.clear_counted::<_, { offset_of!(Directory, len) }>(folio, self) };
        self.len != before
    }

    /// Makes sure that block `index` exists. `end`: how many blocks of the order lie in the address space whole.
    pub(in crate::tracker) fn ensure(
        &mut self,
        index: u64,
        source: &dyn BlockSource,
        shape: Shape,
        end: u64,
    ) -> Result<Block> {
        if let Some(block) = self.seek(index) {
            return Ok(block);
        }
        let block = Block::allocate(source, shape)?;
        self.put(index, block, shape, end);
        Ok(block)
    }

    /// Puts a block where none is. Those from `end` on are never in the window: an end of theirs lies beyond the address
    /// space.
    pub(in crate::tracker) fn put(&mut self, index: u64, block: Block, shape: Shape, end: u64) {
        let rest = self.rest.get_or_insert_default();
        rest.blocks += 1;
        rest.place(&mut self.window, index, block);
        // The window grows up to the next far block as soon as there are enough blocks for its length.
        while let Some((&next, _)) = rest.far.first_key_value().filter(|(next, _)| **next < end) {
            let len = (next + 1).max(self.window.len() / 8 * 9).next_multiple_of(SHORT);
            if len > SLACK * rest.blocks {
                break;
            }
            self.window.grow(len.min(end), shape, rest.used.clone());
            let beyond = rest.far.split_off(&self.window.len());
            for (index, block) in std::mem::replace(&mut rest.far, beyond) {
                rest.place(&mut self.window, index, block);
            }
        }
    }

    /// Takes in a block whose bits are counted, unless there is one already; then false.
    pub(in crate::tracker) fn adopt(&mut self, index: u64, block: Block, shape: Shape, count: u64, end: u64) -> bool {
        if self.get(index).is_some() {
            return false;
        }
        self.put(index, block, shape, end);
        self.len += count;
        true
    }

    /// Puts another block with the same bits in the place of one.
    pub(in crate::tracker) fn replace(&mut self, index: u64, block: Block) {
        if let Some(rest) = &mut self.rest {
            rest.last = None;
            rest.place(&mut self.window, index, block);
        }
    }

    /// Blocks from index `from` on, ascending, with their indexes.
    pub(in crate::tracker) fn blocks_from(&self, from: u64) -> impl Iterator<Item = (u64, Block)> + '_ {
        self.blocks_in(from..u64::MAX)
    }

    /// Blocks with an index in a range, ascending, with their indexes.
    pub(in crate::tracker) fn blocks_in(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Block)> + '_ {
        let (used, far) = self.rest.as_ref().map_or((0..0, None), |rest| (rest.used.clone(), Some(&rest.far)));
        let near = range.start.clamp(used.start, used.end)..range.end.clamp(used.start, used.end);
        // An empty range stands for one that begins after its end, which a map's range() would not take.
        let beyond = range.start.max(self.window.len());
        let beyond = beyond..range.end.max(beyond);
        let near = near.filter_map(|index| Some((index, self.window.get(index)?)));
        near.chain(
            far.into_iter().flat_map(move |far| far.range(beyond.clone())).map(|(&index, &block)| (index, block)),
        )
    }

    /// Writes the places of the blocks from index `from` on, ascending, until `into` is full or a block does not fit the
    /// rule. Returns how many it wrote, and the index to continue at.
    pub(in crate::tracker) fn fill_from(&self, from: u64, into: Items<'_, BitmapPlace>, rule: Rule) -> (usize, u64) {
        let Some(rest) = &self.rest else { return (0, from) };
        let (mut filled, mut index) = (0, from.max(rest.used.start));
        while index < rest.used.end && filled < into.len() {
            let group = GROUP.min(rest.used.end - index).min((into.len() - filled) as u64);
            if self.window.places(index..index + group, into.from(filled), rule) {
                filled += group as usize;
            } else {
                for (at, block) in self.window.blocks(index..index + group) {
                    let Some(place) = rule.place(at, block) else { return (filled, at) };
                    into.from(filled).write(once(place));
                    filled += 1;
                }
            }
            index += group;
        }
        if filled == into.len() {
            return (filled, index);
        }
        let mut next = from.max(rest.used.end);
        for (&index, &block) in rest.far.range(from..) {
            let free = into.from(filled);
            let Some(place) = rule.place(index, block).filter(|_| !free.is_empty()) else { return (filled, index) };
            free.write(once(place));
            (filled, next) = (filled + 1, index + 1);
        }
        (filled, next)
    }

    /// Sets or clears the bits of a range of folios in the blocks that exist. Returns how many changed, which is not counted.
    /// For the tracker that owns the blocks alone.
    pub(in crate::tracker) fn fill(&self, shape: Shape, folios: Range<u64>, mark: bool) -> u64 {
        if folios.is_empty() {
            return 0;
        }
        let (first, last, bits) = (folios.start, folios.end - 1, 1 << shape.log2_bits);
        let mut changed = 0;
        for (index, block) in self.blocks_in(first >> shape.log2_bits..(last >> shape.log2_bits) + 1) {
            let low = first.max(index << shape.log2_bits) & (bits - 1);
            let high = last.min(index << shape.log2_bits | (bits - 1)) & (bits - 1);
            changed += fill(block, shape, low, high, mark);
        }
        changed
    }

    /// Prefetches the blocks of a range of folios.
    pub(in crate::tracker) fn prefetch(&self, shape: Shape, folios: Range<u64>) {
        for (_, block) in self.blocks_in(folios.start >> shape.log2_bits..folios.end >> shape.log2_bits) {
            block.prefetch(shape);
        }
    }

    /// Bytes held in addition to the blocks.
    pub(in crate::tracker) fn nbytes(&self) -> u64 {
        let rest = self.rest.as_ref().map_or(0, |rest| size_of::<Rest>() + rest.far.len() * FAR);
        self.window.nbytes() + rest as u64
    }
}

impl Rest {
    /// Puts a block where its index belongs.
    fn place(&mut self, window: &mut Window, index: u64, block: Block) {
        if window.put(index, block) {
            let empty = self.used.is_empty();
            self.used.start = if empty { index } else { self.used.start.min(index) };
            self.used.end = self.used.end.max(index + 1);
        } else {
            self.far.insert(index, block);
        }
    }
}

/// Sets or clears the bits `low ..= high`. Returns how many changed.
fn fill(block: Block, shape: Shape, low: u64, high: u64, mark: bool) -> u64 {
    let (first, last) = ((low >> 6) as usize, (high >> 6) as usize);
    let (head, tail) = (!0 << (low & 63), !0 >> (63 - (high & 63)));
    if first == last {
        return block.mask(shape, first, head & tail, mark);
    }
    let inner = simd::fill(block, shape, first + 1, last, if mark { !0 } else { 0 });
    let inner = if mark { 64 * (last - first - 1) as u64 - inner } else { inner };
    block.mask(shape, first, head, mark) + inner + block.mask(shape, last, tail, mark)
}
