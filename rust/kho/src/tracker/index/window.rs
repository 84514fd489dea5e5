//! Where the blocks of one order are: a table of slots, laid out for the lookup.
//!
//! A random bit is a cache miss, and how many of them are under way at once is bounded by the loads and instructions
//! between one and the next. So a lookup makes do with three loads before the word itself:
//!
//! ```text
//!   limit: folios of all slots | log2 of a block's bits     slot of block i:  address of its words - i * its bytes | 1
//!             |                          |
//!   folio < limit,  table[folio >> log2] + folio / 64 * 8 - 1  =  address of the folio's word
//! ```
//! The table begins at block 0. A block has more bits than its log2, so that one load gets both bound and shift; folios
//! that are under the limit because of the shift in it have one slot more, which is null as those of blocks that do not
//! exist are. A slot points to where word 0 of all folios would be if the block's were among them, so that no mask is
//! needed. Memory of the table that was never written takes none.

#![allow(unsafe_code)]

use crate::mapping::Items;
use crate::tracker::block::{Block, Shape};
use crate::tracker::placement::{BitmapPlace, Rule};
use crate::tracker::simd;
use crate::tracker::word::{TAKEN, Word};
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr::{self, NonNull};
use core::slice;

/// A table of slots, one more than there are blocks with slots.
#[derive(Default)]
pub(in crate::tracker) struct Window {
    /// As [`Slots::limit`].
    limit: u64,
    table: Option<NonNull<Slot>>,
}

/// What a lookup needs to know of a window: so little that a loop keeps it in registers.
#[derive(Clone, Copy)]
pub(in crate::tracker) struct Slots<'a> {
    /// The first folio that has no slot, plus log2 of the bits in a block; 0 without slots.
    limit: u64,
    table: *const Slot,
    window: PhantomData<&'a Window>,
}

type Slot = *mut u8;

/// The bits of a limit that are log2 of the bits in a block. Shifts look at no others.
const LOG2: u64 = 63;
/// Bytes from which on zeroed memory comes from the kernel, and takes none until it is written.
const LARGE: usize = 128 << 10;

// SAFETY: the table is the window's own allocation, and the slots are addresses of blocks, which are `Send`.
unsafe impl Send for Window {}
// SAFETY: `&Window` only reads the table, which `&mut Window` alone changes; blocks are `Sync`.
unsafe impl Sync for Window {}

impl Slots<'_> {
    /// The word of a folio, if its block is here.
    #[inline(always)]
    pub(in crate::tracker) fn word(self, folio: u64) -> Option<Word> {
        if folio >= self.limit {
            return None;
        }
        // SAFETY: `folio < limit`, and `limit` is `len << log2` plus `log2`, where `log2 < 1 << log2`: so `folio >> log2` is
        // at most `len`, and `Window::grow` made `len + 1` slots, which `Slots` borrows.
        let slot = unsafe { *self.table.add((folio >> (self.limit & LOG2)) as usize) };
        if slot.is_null() {
            return None;
        }
        // SAFETY: a slot that is not null was written by `Window::put` for the block with this index: its words' address
        // less the bytes of all blocks before, plus `TAKEN`. So word `folio >> 6` counted from there is one of the block's.
        Some(unsafe { Word::at(slot, folio >> 6) })
    }
}

impl Window {
    #[inline(always)]
    pub(in crate::tracker) fn slots(&self) -> Slots<'_> {
        Slots { limit: self.limit, table: self.table.map_or(ptr::null(), |table| table.as_ptr()), window: PhantomData }
    }

    /// The table, with the slot at its end that stays null.
    #[inline(always)]
    fn table(&self) -> &[Slot] {
        match self.table {
            // SAFETY: `Window::grow` made the table with `len() + 1` initialized slots; it is freed in `drop` alone.
            Some(table) => unsafe { slice::from_raw_parts(table.as_ptr(), self.len() as usize + 1) },
            None => &[],
        }
    }

    /// How many blocks have slots: blocks `0 .. len`.
    #[inline(always)]
    pub(in crate::tracker) const fn len(&self) -> u64 {
        self.limit >> (self.limit & LOG2)
    }

    /// Bytes of all blocks before one, modulo the address space: they may never have been anywhere.
    #[inline(always)]
    const fn bytes_before(&self, index: u64) -> usize {
        ((index << (self.limit & LOG2)) / 8) as usize
    }

    /// A block, if it is here.
    #[inline(always)]
    pub(in crate::tracker) fn get(&self, index: u64) -> Option<Block> {
        let slot = self.table().get(usize::try_from(index).ok()?).filter(|slot| !slot.is_null())?;
        // SAFETY: `Window::put` was given the pointer of a block and took `bytes_before` away and added `TAKEN`, which is undone
        // here: it is the pointer that `as_raw` gave.
        Some(unsafe { Block::from_raw(slot.wrapping_sub(TAKEN).wrapping_add(self.bytes_before(index)).cast()) })
    }

    /// The slots of a range, as far as there are any.
    #[inline(always)]
    fn range(&self, range: Range<u64>) -> &[Slot] {
        let end = range.end.min(self.len());
        &self.table()[range.start.min(end) as usize..end as usize]
    }

    /// The blocks that are here of a range, ascending, with their indexes.
    #[inline(always)]
    pub(in crate::tracker) fn blocks(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Block)> + '_ {
        let slots = self.range(range.clone()).iter().zip(range.start..);
        slots.filter(|(slot, _)| !slot.is_null()).filter_map(|(_, index)| Some((index, self.get(index)?)))
    }

    /// Fills in the places of the blocks of a range; false unless all are here and the rule holds for them.
    pub(in crate::tracker) fn places(&self, range: Range<u64>, into: Items<'_, BitmapPlace>, rule: Rule) -> bool {
        let before = self.bytes_before(range.start).wrapping_sub(rule.within).wrapping_sub(TAKEN);
        let step = self.bytes_before(1);
        simd::places(self.range(range.clone()), before as u64, step as u64, range.start, rule, into)
    }

    /// Puts a block in the place of what is there. False if there is no slot for it.
    pub(in crate::tracker) fn put(&mut self, index: u64, block: Block) -> bool {
        if index >= self.len() {
            return false;
        }
        let slot = block.as_raw().cast::<u8>().wrapping_sub(self.bytes_before(index)).wrapping_add(TAKEN);
        if let Some(table) = self.table {
            // SAFETY: `index < len()`, and the table has `len() + 1` slots; `&mut self` excludes other accesses.
            unsafe { table.add(index as usize).write(slot) };
        }
        true
    }

    /// Makes the window longer: slots for `len` blocks, and one that stays null. Its blocks have indexes in `used`.
    pub(in crate::tracker) fn grow(&mut self, len: u64, shape: Shape, used: Range<u64>) {
        let limit = (len << shape.log2_bits) + u64::from(shape.log2_bits);
        let table = Box::leak(vec![ptr::null_mut::<u8>(); len as usize + 1].into_boxed_slice());
        let mut grown = Window { limit, table: Some(NonNull::from(table).cast()) };
        for index in used {
            if let Some(block) = self.get(index) {
                grown.put(index, block);
            }
        }
        *self = grown;
    }

    /// Bytes of memory that the table takes: of a large one only pages with a block's slot were ever written.
    pub(in crate::tracker) fn nbytes(&self) -> u64 {
        const PAGE: usize = 4096;
        let bytes = size_of_val(self.table());
        if bytes < LARGE {
            return bytes as u64;
        }
        let pages = self.table().chunks(PAGE / size_of::<Slot>());
        (PAGE * pages.filter(|page| page.iter().any(|slot| !slot.is_null())).count()) as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some(table) = self.table {
            let table = ptr::slice_from_raw_parts_mut(table.as_ptr(), self.len() as usize + 1);
            // SAFETY: `Window::grow` leaked the box of `len() + 1` slots that this is, and `Window` is not `Clone`: nothing else
            // frees it.
            drop(unsafe { Box::from_raw(table) });
        }
    }
}
