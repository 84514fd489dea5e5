//! Blocks and their sources; words of a block are read and written through raw pointers.
//!
//! No reference into a block is ever made. Blocks of a source that is shared ([`BlockSource::is_shared`]) lie in memory that
//! another process may write at any time: each of their words is read and written by relaxed atomic operations, so that such a
//! write changes which bits are seen and nothing else. Blocks of any other source belong to one tracker alone; loops over them
//! use plain loads and stores, which compilers make vectors of. [`Shape::shared`] says which it is.

#![allow(unsafe_code)]

use super::word::{TAKEN, Word};
use crate::error::Result;
use crate::units::Phys;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;

/// Where a tracker's blocks live.
///
/// # Safety
/// Every pointer returned by `alloc_block` is valid for reads and writes of `bytes` bytes, 8-aligned and zeroed, until the
/// source is dropped, and no other block of any source has a byte of them. Unless the source is shared, nothing but the
/// tracker reads or writes them. What `block_at` returns is as it says there, and only shared sources return any.
pub unsafe trait BlockSource: Send + Sync {
    /// A zeroed block of `bytes` bytes (512, 4096, 16384 or 65536; the same at every call of one tracker).
    ///
    /// # Errors
    /// [`Error::NoMemory`](crate::Error::NoMemory), or another reason why the source has no block.
    fn alloc_block(&self, bytes: usize) -> Result<NonNull<u64>>;

    /// As [`BlockSource::alloc_block`], for a caller that writes every word before it reads any: the block need not be
    /// zeroed.
    ///
    /// # Errors
    /// As [`BlockSource::alloc_block`].
    fn alloc_unwritten(&self, bytes: usize) -> Result<NonNull<u64>> {
        self.alloc_block(bytes)
    }

    /// Whether the blocks lie in memory that another process, or another object of this one, may read and write.
    fn is_shared(&self) -> bool {
        true
    }

    /// The physical address of a block, when blocks have one.
    fn phys_of(&self, block: NonNull<u64>) -> Option<Phys>;

    /// The `bytes` bytes at a physical address, to be a block as they are; `None` where the source has no memory there.
    /// Others may write them at any time.
    ///
    /// Implementors: the pointer is valid for reads and writes of `bytes` bytes and 8-aligned as long as the source lives.
    fn block_at(&self, phys: Phys, bytes: usize) -> Option<NonNull<u64>> {
        let _ = (phys, bytes);
        None
    }

    /// A stretch of memory around a block in which physical addresses go up with pointers, and where it begins: so that
    /// many blocks' addresses take one call. `None` if blocks have no addresses.
    fn stretch_of(&self, block: NonNull<u64>) -> Option<(Range<usize>, Phys)> {
        let at = block.addr().get();
        Some((at..at + 1, self.phys_of(block)?))
    }

    /// Bytes of memory that blocks take.
    fn nbytes(&self) -> u64;

    /// Another source of the same kind, which has given out no blocks yet. This one takes its blocks back when it is dropped.
    fn renewed(&self) -> Arc<dyn BlockSource>;
}

/// A block's size as the shifts and masks of the hot path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// log2 of the bits in a block.
    pub(super) log2_bits: u32,
    word_mask: usize,
    /// Whether other processes may access the block: [`Shared`] or [`Private`].
    pub(super) shared: bool,
}

/// How words are read and written in a loop.
pub(super) trait Access {
    /// # Safety
    /// A word of a block that may be accessed so.
    unsafe fn load(word: *const u64) -> u64;
    /// # Safety
    /// As of [`Access::load`].
    unsafe fn store(word: *mut u64, value: u64);
}

/// Of blocks that are the tracker's alone.
pub(super) struct Private;

/// Of any block.
pub(super) struct Shared;

impl Access for Private {
    #[inline(always)]
    unsafe fn load(word: *const u64) -> u64 {
        // SAFETY: the caller guarantees a word of a block that only this tracker accesses, whose borrow excludes writers.
        unsafe { word.read() }
    }

    #[inline(always)]
    unsafe fn store(word: *mut u64, value: u64) {
        // SAFETY: as in `load`; callers are `&mut` methods of the tracker.
        unsafe { word.write(value) }
    }
}

impl Access for Shared {
    #[inline(always)]
    unsafe fn load(word: *const u64) -> u64 {
        // SAFETY: the caller guarantees a word of a block, which is valid and 8-aligned; concurrent accesses are atomic, or
        // another process's.
        unsafe { AtomicU64::from_ptr(word.cast_mut()) }.load(Relaxed)
    }

    #[inline(always)]
    unsafe fn store(word: *mut u64, value: u64) {
        // SAFETY: as in `load`.
        unsafe { AtomicU64::from_ptr(word) }.store(value, Relaxed);
    }
}

impl Shape {
    /// `bytes`: a power of two, at least 8.
    pub(super) const fn new(bytes: u64) -> Self {
        Shape { log2_bits: bytes.ilog2() + 3, word_mask: (bytes / 8 - 1) as usize, shared: false }
    }

    /// The shape of a source's blocks.
    pub(super) fn of(self, source: &dyn BlockSource) -> Self {
        Shape { shared: source.is_shared(), ..self }
    }

    pub(super) const fn words(self) -> usize {
        self.word_mask + 1
    }

    pub(super) const fn bytes(self) -> usize {
        self.words() * 8
    }
}

/// Words in a cache line, and in a part of a block that is looked at at once.
pub(super) const LINE: usize = 8;

/// The words of one block. A block meets only the [`Shape`] it was allocated with: both are private to one tracker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Block(NonNull<u64>);

// SAFETY: the words are integers at an address that no thread's state is part of; the tracker that holds the block also holds
// the source, which keeps them valid.
unsafe impl Send for Block {}
// SAFETY: `&Tracker` only reads words; they are written through `&mut Tracker`, and where two threads work on one of those
// (`split_off`, `scatter`), each block is written by one of them. Accesses of other processes are met by atomic ones.
unsafe impl Sync for Block {}

impl Block {
    /// A block of that shape from a source; its words are zero.
    pub(super) fn allocate(source: &dyn BlockSource, shape: Shape) -> Result<Self> {
        source.alloc_block(shape.bytes()).map(Block)
    }

    /// A block of that shape from a source; every bit is set.
    pub(super) fn allocate_full(source: &dyn BlockSource, shape: Shape) -> Result<Self> {
        let block = Block(source.alloc_unwritten(shape.bytes())?);
        block.replace(shape, 0, usize::MAX, |_| u64::MAX);
        Ok(block)
    }

    /// An existing block at an address of a source, to be read only.
    pub(super) fn at(source: &dyn BlockSource, phys: Phys, shape: Shape) -> Option<Self> {
        source.block_at(phys, shape.bytes()).filter(|block| block.is_aligned()).map(Block)
    }

    pub(super) fn phys(self, source: &dyn BlockSource) -> Option<Phys> {
        source.phys_of(self.0)
    }

    /// As [`BlockSource::stretch_of`].
    pub(super) fn stretch(self, source: &dyn BlockSource) -> Option<(Range<usize>, Phys)> {
        source.stretch_of(self.0)
    }

    /// What [`Block::from_raw`] makes the block of again.
    pub(super) fn as_raw(self) -> *mut u64 {
        self.0.as_ptr()
    }

    /// # Safety
    /// A pointer that [`Block::as_raw`] gave, of a block that is still its tracker's.
    #[inline(always)]
    pub(super) unsafe fn from_raw(raw: *mut u64) -> Self {
        // SAFETY: the caller guarantees that `as_raw` gave it, which gives the pointer of a `NonNull`.
        Block(unsafe { NonNull::new_unchecked(raw) })
    }

    /// Where in this process it lies.
    pub(super) fn addr(self) -> usize {
        self.0.addr().get()
    }

    /// Word `word` modulo the block's words.
    #[inline(always)]
    pub(super) fn load(self, shape: Shape, word: usize) -> u64 {
        // SAFETY: the masked index lies inside the `shape.bytes()` bytes that the source's contract makes readable; it says
        // that plain loads may be used unless it is shared.
        unsafe {
            let word = self.0.as_ptr().add(word & shape.word_mask);
            if shape.shared { Shared::load(word) } else { Private::load(word) }
        }
    }

    /// Sets word `word` modulo the block's words. For the tracker that owns the block alone.
    #[inline(always)]
    pub(super) fn store(self, shape: Shape, word: usize, value: u64) {
        // SAFETY: as in `load`; only the owner's `&mut` methods come here.
        unsafe {
            let word = self.0.as_ptr().add(word & shape.word_mask);
            if shape.shared { Shared::store(word, value) } else { Private::store(word, value) }
        }
    }
}

impl Block {
    /// Replaces each of the words `from .. to`, as far as they exist. For the tracker that owns the block alone.
    #[inline(always)]
    pub(super) fn replace(self, shape: Shape, from: usize, to: usize, new: impl FnMut(u64) -> u64) {
        match shape.shared {
            true => self.replace_by::<Shared>(shape, from, to, new),
            false => self.replace_by::<Private>(shape, from, to, new),
        }
    }

    #[inline(always)]
    fn replace_by<A: Access>(self, shape: Shape, from: usize, to: usize, mut new: impl FnMut(u64) -> u64) {
        for n in from..to.min(shape.words()) {
            // SAFETY: `n` is a word of the block, as in `load`; only the owner's `&mut` methods come here, and `A` is what
            // the shape says.
            unsafe {
                let word = self.0.as_ptr().add(n);
                A::store(word, new(A::load(word)));
            }
        }
    }

    /// Prefetches the words of the block.
    #[inline]
    pub(super) fn prefetch(self, shape: Shape) {
        for word in (0..shape.words()).step_by(LINE) {
            self.nth(word as u64).prefetch();
        }
    }

    /// The words, as many at once as a cache line has.
    ///
    /// # Safety
    /// `A` is [`Shared`] if the shape says so.
    #[inline(always)]
    pub(super) unsafe fn lines<A: Access>(self, shape: Shape) -> impl ExactSizeIterator<Item = [u64; LINE]> {
        let line = move |n: usize| {
            core::array::from_fn(|word| {
                // SAFETY: words of the block, as in `load`: it has a multiple of `LINE` of them. The caller chose `A`.
                unsafe { A::load(self.0.as_ptr().add(n * LINE + word)) }
            })
        };
        (0..shape.words() / LINE).map(line)
    }

    /// The words.
    #[inline(always)]
    pub(super) fn words(self, shape: Shape) -> impl ExactSizeIterator<Item = u64> {
        (0..shape.words()).map(move |n| self.load(shape, n))
    }

    /// The words, for a loop that is compiled for each way to read them.
    ///
    /// # Safety
    /// `A` is [`Shared`] if the shape says so.
    #[inline(always)]
    pub(super) unsafe fn words_by<A: Access>(self, shape: Shape) -> impl ExactSizeIterator<Item = u64> {
        // SAFETY: `n` is a word of the block, as in `load`. The caller chose `A`.
        (0..shape.words()).map(move |n| unsafe { A::load(self.0.as_ptr().add(n)) })
    }

    /// The word of a folio, modulo the block's words.
    #[inline(always)]
    pub(super) fn word(self, shape: Shape, folio: u64) -> Word {
        self.nth(folio >> 6 & shape.word_mask as u64)
    }

    /// A word of the block.
    #[inline(always)]
    fn nth(self, n: u64) -> Word {
        // SAFETY: `word` masks the number, and `prefetch` counts up to the block's words, so that it is a word of the block.
        unsafe { Word::at(self.as_raw().cast::<u8>().wrapping_add(TAKEN), n) }
    }

    /// Sets or clears bits of one word. Returns how many changed.
    #[inline(always)]
    pub(super) fn mask(self, shape: Shape, word: usize, mask: u64, mark: bool) -> u64 {
        let old = self.load(shape, word);
        let new = if mark { old | mask } else { old & !mask };
        self.store(shape, word, new);
        (old ^ new).count_ones().into()
    }

    pub(super) fn is_empty(self, shape: Shape) -> bool {
        self.words(shape).all(|word| word == 0)
    }
}
