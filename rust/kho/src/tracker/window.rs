//! Where the blocks of one order are: a table of slots, laid out for the lookup.
//!
//! A random bit is a cache miss, and how many of them are under way at once is bounded by the loads and instructions
//! between one and the next. So a lookup makes do with three loads before the word itself:
//!
//! ```text
//!   table | log2 of a block's bits  -> shift --+
//!   len                             -> bound   |     slot of block i:  address of its words - i * its bytes | 1
//!                                              v
//!   folio ------------------------------> table[folio >> shift] + folio / 64 * 8 - 1  = address of the folio's word
//! ```
//! The table begins at block 0. Its address is a multiple of 64, which leaves room for the shift in it; a slot points to
//! where word 0 of all folios would be if the block's were among them, so that no mask is needed; slots of blocks that do
//! not exist are null. Memory of the table that was never written takes none.

use super::block::{Block, Shape, Word};
use super::places::{BitmapPlace, Rule};
use super::simd;
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr;

/// A table of slots.
pub(super) struct Window {
    slots: Slots<'static>,
    memory: Vec<Slot>,
}

/// What a lookup needs to know of a window: so little that a loop keeps it in registers.
#[derive(Clone, Copy)]
pub(super) struct Slots<'a> {
    /// Its low bits are log2 of the bits in a block.
    table: *mut Slot,
    len: u64,
    window: PhantomData<&'a Window>,
}

type Slot = *mut u8;

/// The table's alignment: more than log2 of the bits in any block.
const ALIGN: usize = 64;
/// Bytes from which on zeroed memory comes from the kernel, and takes none until it is written.
const LARGE: usize = 128 << 10;
/// Says that a slot has a block, whatever its address.
const TAKEN: usize = 1;

// SAFETY: the table is the window's own, and what it points to are blocks, which are fit for this themselves.
unsafe impl Send for Window {}
// SAFETY: as above; `&Window` only reads.
unsafe impl Sync for Window {}

impl Slots<'_> {
    /// The word of a folio, if its block is here.
    #[inline(always)]
    pub(super) fn word(self, folio: u64) -> Option<Word> {
        let slot = self.slot(folio >> (self.table.addr() % ALIGN))?;
        // SAFETY: the slot is that of the block which the folio is in, and leads to its words as `Window::put` says.
        Some(unsafe { Word::at(slot.wrapping_sub(TAKEN).cast(), folio >> 6) })
    }

    /// A block, if it is here.
    #[inline(always)]
    pub(super) fn get(self, index: u64) -> Option<Block> {
        let slot = self.slot(index)?;
        // SAFETY: this is what `Window::put` was given: what it took away is added again.
        Some(unsafe { Block::from_raw(slot.wrapping_sub(TAKEN).wrapping_add(self.bytes_before(index)).cast()) })
    }

    /// Block `index`'s slot, if the block is here.
    #[inline(always)]
    fn slot(self, index: u64) -> Option<Slot> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the table has `len` slots, as long as the window is not changed.
        let slot = unsafe { *self.start().add(index as usize) };
        (!slot.is_null()).then_some(slot)
    }

    #[inline(always)]
    fn start(self) -> *mut Slot {
        self.table.map_addr(|addr| addr & !(ALIGN - 1))
    }

    /// Bytes of all blocks before one, modulo the address space: they may never have been anywhere.
    #[inline(always)]
    fn bytes_before(self, index: u64) -> usize {
        (index as usize) << (self.table.addr() % ALIGN - 3)
    }
}

impl Window {
    /// A window of no blocks.
    pub(super) const fn new(shape: Shape) -> Self {
        let table = ptr::without_provenance_mut(shape.log2_bits as usize);
        Window { slots: Slots { table, len: 0, window: PhantomData }, memory: Vec::new() }
    }

    #[inline(always)]
    pub(super) fn slots(&self) -> Slots<'_> {
        self.slots
    }

    /// How many slots there are: those of blocks `0 .. len`.
    pub(super) const fn len(&self) -> u64 {
        self.slots.len
    }

    /// A block, if it is here.
    #[inline(always)]
    pub(super) fn get(&self, index: u64) -> Option<Block> {
        self.slots.get(index)
    }

    /// The slots of a range, as far as there are any.
    #[inline(always)]
    fn range(&self, range: Range<u64>) -> &[Slot] {
        let end = range.end.min(self.len());
        let start = range.start.min(end);
        // SAFETY: the table has `len` slots, and is written only by who borrows the window for it.
        unsafe { core::slice::from_raw_parts(self.slots.start().add(start as usize), (end - start) as usize) }
    }

    /// The blocks that are here of a range, ascending, with their indexes.
    #[inline(always)]
    pub(super) fn blocks(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Block)> + '_ {
        let slots = self.range(range.clone()).iter().zip(range.start..);
        slots.filter(|(slot, _)| !slot.is_null()).filter_map(|(_, index)| Some((index, self.get(index)?)))
    }

    /// Fills in the places of the blocks of a range, all of which must be here and the rule hold for them; else false.
    pub(super) fn places(&self, range: Range<u64>, into: &mut [BitmapPlace], rule: Rule) -> bool {
        let before = self.slots.bytes_before(range.start).wrapping_sub(rule.within).wrapping_sub(TAKEN);
        let step = self.slots.bytes_before(1);
        simd::places(self.range(range.clone()), before as u64, step as u64, range.start, rule, into)
    }

    /// Puts a block in the place of what is there. False if there is no slot for it.
    pub(super) fn put(&mut self, index: u64, block: Block) -> bool {
        if index >= self.slots.len {
            return false;
        }
        let slot = block.as_raw().cast::<u8>().wrapping_sub(self.slots.bytes_before(index)).wrapping_add(TAKEN);
        // SAFETY: one of the table's slots, as in `Slots::slot`; the window is borrowed for writing.
        unsafe { *self.slots.start().add(index as usize) = slot };
        true
    }

    /// Makes the window longer. Its blocks have indexes in `used`.
    pub(super) fn grow(&mut self, len: u64, used: Range<u64>) {
        let mut memory: Vec<Slot> = vec![ptr::null_mut(); len as usize + ALIGN / size_of::<Slot>()];
        let skip = memory.as_ptr().align_offset(ALIGN);
        let log2_bits = self.slots.table.addr() % ALIGN;
        let table = memory[skip..].as_mut_ptr().map_addr(|addr| addr | log2_bits);
        let mut grown = Window { slots: Slots { table, len, window: PhantomData }, memory };
        for index in used {
            if let Some(block) = self.get(index) {
                grown.put(index, block);
            }
        }
        *self = grown;
    }

    /// Bytes of memory that the table takes: of a large one only pages with a block's slot were ever written.
    pub(super) fn nbytes(&self) -> u64 {
        const PAGE: usize = 4096;
        let bytes = self.memory.capacity() * size_of::<Slot>();
        if bytes < LARGE {
            return bytes as u64;
        }
        let pages = self.memory.chunks(PAGE / size_of::<Slot>());
        (PAGE * pages.filter(|page| page.iter().any(|slot| !slot.is_null())).count()) as u64
    }
}
