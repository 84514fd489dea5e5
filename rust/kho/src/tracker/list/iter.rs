//! Iterators and lists of folios: by order and pfn, by address, by block; the folio at or after a pfn.

#![allow(unsafe_code)]

use crate::mapping;
use crate::parallel::{join, threads_for};
use crate::tracker::block::{Block, Shape};
use crate::tracker::folio::Folio;
use crate::tracker::{Tracker, simd};
use crate::units::{Order, Pfn, Phys};
use core::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// Bytes of bitmaps that a thread takes at once: what its first cache holds.
const SHARE: usize = 16 << 10;

/// Blocks that are not listed yet, and the room for their items.
struct Left<'a, T> {
    blocks: &'a [(u64, Block)],
    room: &'a mut [MaybeUninit<T>],
    /// How many blocks a thread takes at once.
    share: usize,
}

impl<'a, T: Send> Left<'a, T> {
    /// Takes blocks from one end.
    fn blocks(&mut self, low: bool) -> Option<&'a [(u64, Block)]> {
        let n = self.share.min(self.blocks.len());
        if low { self.blocks.split_off(..n) } else { self.blocks.split_off(self.blocks.len() - n..) }
    }

    /// Takes the room for `n` items from one end.
    fn room(&mut self, n: usize, low: bool) -> Option<&'a mut [MaybeUninit<T>]> {
        if low { self.room.split_off_mut(..n) } else { self.room.split_off_mut(self.room.len().checked_sub(n)?..) }
    }

    /// Has `write` list all blocks: one thread begins with the first, another with the last, and they meet wherever that
    /// is. False if that has not filled the room without a gap.
    fn by_two(self, shape: Shape, write: impl Fn(&[(u64, Block)], &mut [MaybeUninit<T>]) -> usize + Sync) -> bool {
        let left = Mutex::new(self);
        let left = || left.lock().unwrap_or_else(PoisonError::into_inner);
        let side = |low| {
            loop {
                let Some(blocks) = left().blocks(low).filter(|blocks| !blocks.is_empty()) else { return true };
                let n = blocks.iter().map(|(_, block)| simd::count(*block, shape)).sum::<u64>() as usize;
                let Some(room) = left().room(n, low) else { return false };
                if write(blocks, room) < n {
                    return false;
                }
            }
        };
        let whole = join(|| side(true), || side(false));
        whole == (true, true) && left().room.is_empty()
    }
}

/// The numbers of the bits set in a word, ascending.
#[derive(Clone, Copy)]
pub(in crate::tracker) struct Ones(pub(in crate::tracker) u64);

impl Iterator for Ones {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        let bit = (self.0 != 0).then(|| u64::from(self.0.trailing_zeros()))?;
        self.0 &= self.0 - 1;
        Some(bit)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.0.count_ones() as usize;
        (left, Some(left))
    }
}

/// One block of a tracker.
#[derive(Clone, Copy)]
pub struct BlockRef<'a> {
    tracker: &'a Tracker,
    order: Order,
    index: u64,
    block: Block,
}

impl<'a> BlockRef<'a> {
    /// The order of its folios.
    pub fn order(&self) -> Order {
        self.order
    }

    /// The block's number in its order.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The address of the folio that bit 0 stands for.
    pub fn phys_start(&self) -> Phys {
        self.tracker.geometry.phys_start(self.order, self.index)
    }

    /// Where the bitmap itself lies, when the tracker's blocks have addresses.
    pub fn phys(&self) -> Option<Phys> {
        self.block.phys(&*self.tracker.source)
    }

    /// Folios marked in this block; counted now.
    pub fn count(&self) -> u64 {
        simd::count(self.block, self.tracker.shape)
    }

    /// Whether no folio of the block is marked; counted now.
    pub fn is_empty(&self) -> bool {
        self.block.is_empty(self.tracker.shape)
    }

    /// The bitmap as words: folio `64 * n + b` is bit `b` of word `n`.
    pub fn words(&self) -> impl ExactSizeIterator<Item = u64> + use<'a> {
        self.block.words(self.tracker.shape)
    }

    /// Copies the bitmap, bit `i` as bit `i % 8` of byte `i / 8`, as far as `into` reaches. Returns the bytes copied.
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let (chunks, _) = into.as_chunks_mut::<8>();
        let copied = chunks.len().min(self.tracker.shape.words());
        for (chunk, word) in chunks.iter_mut().zip(self.words()) {
            *chunk = word.to_le_bytes();
        }
        copied * 8
    }
}

/// The folios (by number) from `from` on in blocks given as (index, block), ascending.
fn folios_in(shape: Shape, from: u64, blocks: impl Iterator<Item = (u64, Block)>) -> impl Iterator<Item = u64> {
    blocks.flat_map(move |(index, block)| {
        let first = index << shape.log2_bits;
        let skip = (from.max(first) - first) >> 6;
        (skip..shape.words() as u64).flat_map(move |n| {
            let base = first + 64 * n;
            let mut word = block.load(shape, n as usize);
            if base < from {
                word &= !0 << (from & 63);
            }
            Ones(word).map(move |bit| base + bit)
        })
    })
}

/// Sorts a list that consists of `runs` sorted runs: merges them if there is memory for that.
fn merge(folios: &mut [Folio], runs: usize) {
    if runs < 2 {
        return;
    }
    // A stable sort finds the runs. It takes up to as much memory again, without which it would end the process.
    match Vec::<Folio>::new().try_reserve_exact(folios.len()) {
        Ok(()) => folios.sort(),
        Err(_) => folios.sort_unstable(),
    }
}

impl Tracker {
    /// Every folio: order ascending, then pfn, as they are serialized.
    pub fn iter(&self) -> impl Iterator<Item = (Pfn, Order)> + '_ {
        self.iter_from(Order::ZERO, Pfn(0))
    }

    /// The folios of `order` at or after `from`, then those of the larger orders, as [`Tracker::iter`].
    pub fn iter_from(&self, order: Order, from: Pfn) -> impl Iterator<Item = (Pfn, Order)> + '_ {
        let dirs = Order::all().zip(&self.dirs).skip(order.index());
        dirs.flat_map(move |(o, dir)| {
            let first = if o == order { from.0.div_ceil(o.nr_pages()) } else { 0 };
            let blocks = dir.blocks_from(first >> self.shape.log2_bits);
            folios_in(self.shape, first, blocks).map(move |folio| (Pfn(folio << o.get()), o))
        })
    }

    /// The first folio of an order.
    pub fn first(&self, order: Order) -> Option<Pfn> {
        self.next(order, Pfn(0))
    }

    /// The first folio of an order at or after a pfn.
    pub fn next(&self, order: Order, from: Pfn) -> Option<Pfn> {
        self.next_before(order, from, Pfn(u64::MAX))
    }

    /// The first folio of an order in `[from, end)`, without reading blocks after `end`.
    pub fn next_before(&self, order: Order, from: Pfn, end: Pfn) -> Option<Pfn> {
        let dir = Some(&self.dirs[order.index()]).filter(|dir| dir.len > 0)?;
        let (first, last) = (from.0.div_ceil(order.nr_pages()), end.0.div_ceil(order.nr_pages()));
        let blocks = dir.blocks_in(first >> self.shape.log2_bits..(last >> self.shape.log2_bits) + 1);
        let folio = folios_in(self.shape, first, blocks).next().filter(|&folio| folio < last)?;
        Some(Pfn(folio << order.get()))
    }

    /// The order of a folio that starts at `pfn`, the largest if there are several.
    pub fn head_order(&self, pfn: Pfn) -> Option<Order> {
        self.used().rev().find(|&order| self.contains(pfn, order))
    }

    /// A folio that holds a page, the smallest if there are several.
    pub fn covering(&self, pfn: Pfn) -> Option<(Pfn, Order)> {
        self.used().find_map(|order| {
            let head = Pfn(pfn.0 & !(order.nr_pages() - 1));
            self.contains(head, order).then_some((head, order))
        })
    }

    /// A folio that shares a page with `[start, end)`, one of the smallest such order.
    pub fn overlapping(&self, start: Pfn, end: Pfn) -> Option<(Pfn, Order)> {
        if start >= end {
            return None;
        }
        self.used().find_map(|order| {
            let head = Pfn(start.0 & !(order.nr_pages() - 1));
            Some((self.next_before(order, head, end)?, order))
        })
    }

    /// Orders that have a folio now.
    fn used(&self) -> impl DoubleEndedIterator<Item = Order> + '_ {
        Order::all().filter(|&order| self.len_of(order) > 0)
    }

    /// Every folio by address, then order. A long list is made by two threads.
    pub fn folios(&self) -> Vec<Folio> {
        let mut folios = Vec::new();
        self.folios_into(&mut folios);
        folios
    }

    /// The same, written over the contents of a list, whose allocation is reused.
    pub fn folios_into(&self, folios: &mut Vec<Folio>) {
        folios.clear();
        folios.reserve_exact(self.len() as usize);
        // Orders whose folios do not interleave are listed one after the other; where they do, their lists are merged.
        let mut orders: Vec<_> = self.used().map(|order| (self.first(order), order)).collect();
        orders.sort();
        let (mut group, mut runs, mut highest) = (0, 0, None);
        for (_, order) in orders {
            let shift = order.get() + self.geometry.page().shift();
            let like = Folio::new(Phys(0), order);
            let list = |block, first, into: &mut _| simd::list_folios(block, self.shape, first, shift, like, into);
            let start = folios.len();
            self.list_blocks(order, folios, list);
            if folios.get(start) > highest.as_ref() {
                merge(&mut folios[group..start], runs);
                (group, runs) = (start, 0);
            }
            highest = highest.max(folios.last().copied());
            runs += 1;
        }
        merge(&mut folios[group..], runs);
    }

    /// The pfns of one order, ascending. A long list is made by two threads.
    pub fn pfns(&self, order: Order) -> Vec<u64> {
        let mut pfns = Vec::new();
        self.pfns_into(order, &mut pfns);
        pfns
    }

    /// The same in the place of what is in a list, which may have room already.
    pub fn pfns_into(&self, order: Order, pfns: &mut Vec<u64>) {
        pfns.clear();
        self.list_blocks(order, pfns, |block, first, into| {
            simd::list_numbers(block, self.shape, first, order.get(), into)
        });
    }

    /// Appends what `list` writes for the blocks of an order; `list` is given a block and its first folio's number.
    fn list_blocks<T: Send>(
        &self,
        order: Order,
        items: &mut Vec<T>,
        list: impl Fn(Block, u64, &mut [MaybeUninit<T>]) -> usize + Sync,
    ) {
        let dir = &self.dirs[order.index()];
        let len = dir.len as usize;
        items.reserve_exact(len);
        let room = &mut items.spare_capacity_mut()[..len];
        mapping::prefer_huge_pages(room);
        let write = |blocks: &[(u64, Block)], room: &mut [MaybeUninit<T>]| {
            blocks
                .iter()
                .fold(0, |at, &(index, block)| at + list(block, index << self.shape.log2_bits, &mut room[at..]))
        };
        let blocks: Vec<_> = dir.blocks_from(0).collect();
        let by_two = threads_for(size_of_val(room)) > 1;
        let left = Left { blocks: &blocks, room, share: (SHARE / self.shape.bytes()).max(1) };
        // If another process changes the bitmaps concurrently, there may be more or fewer folios than counted: no gap
        // is left.
        let listed = if by_two && left.by_two(self.shape, write) { len } else { write(&blocks, room) };
        // SAFETY: `listed` is what `write` returned, which counts the items that it wrote at the beginning of the room it was
        // given; or `len`, and then both threads filled every place of a room of `len` items (`by_two`). The room is the
        // list's spare capacity.
        unsafe { items.set_len(items.len() + listed) };
    }

    /// The blocks of an order, ascending; those that became empty too.
    pub fn blocks(&self, order: Order) -> impl Iterator<Item = BlockRef<'_>> {
        self.blocks_between(order, Pfn(0), Pfn(u64::MAX))
    }

    /// As [`Tracker::blocks`], those that speak for a pfn in `[from, end)`.
    pub fn blocks_between(&self, order: Order, from: Pfn, end: Pfn) -> impl Iterator<Item = BlockRef<'_>> {
        let index = |pfn: u64| (pfn >> order.get()) >> self.shape.log2_bits;
        let range = index(from.0)..index(end.0.saturating_sub(1)) + 1;
        let blocks = self.dirs[order.index()].blocks_in(range);
        blocks.map(move |(index, block)| BlockRef { tracker: self, order, index, block })
    }

    /// One block, if it exists.
    pub fn block(&self, order: Order, index: u64) -> Option<BlockRef<'_>> {
        let block = self.dirs[order.index()].get(index)?;
        Some(BlockRef { tracker: self, order, index, block })
    }
}
