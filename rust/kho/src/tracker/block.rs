//! Where a tracker's blocks live, and the only unsafe code of this room: words read and written through raw pointers.
//!
//! No reference into a block outlives a statement, because a source may lie in memory that others look at.

use crate::error::{Error, Result};
use crate::units::Phys;
use core::ops::Range;
use core::ptr::{self, NonNull};
use rustix::mm;
use std::alloc::{self, Layout};

/// Where a tracker's blocks live.
///
/// # Safety
/// Every pointer returned by `alloc_block` is valid for reads and writes of `bytes` bytes, 8-aligned, zeroed, and
/// exclusively the tracker's to write, until the source is dropped or `release_all` is called; what `block_at` returns is
/// as it says there.
pub unsafe trait BlockSource: Send + Sync {
    /// A zeroed block of `bytes` bytes (512, 4096, 16384 or 65536; the same at every call of one tracker).
    ///
    /// # Errors
    /// [`Error::NoMemory`], or whatever else keeps the source from giving one.
    fn alloc_block(&mut self, bytes: usize) -> Result<NonNull<u64>>;

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

    /// Bytes of memory held, used by blocks or not yet.
    fn nbytes(&self) -> u64;

    /// Gives every block back.
    fn release_all(&mut self);
}

/// A block's size as the shifts and masks of the hot path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// log2 of the bits in a block.
    pub(super) log2_bits: u32,
    word_mask: usize,
}

impl Shape {
    /// `bytes`: a power of two, at least 8.
    pub(super) const fn new(bytes: u64) -> Self {
        Shape { log2_bits: bytes.ilog2() + 3, word_mask: (bytes / 8 - 1) as usize }
    }

    pub(super) const fn words(self) -> usize {
        self.word_mask + 1
    }

    pub(super) const fn bytes(self) -> usize {
        self.words() * 8
    }
}

/// The words of one block. A block meets only the [`Shape`] it was allocated with: both are private to one tracker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Block(NonNull<u64>);

// SAFETY: the words are plain integers owned by one tracker, written only through `&mut Tracker`.
unsafe impl Send for Block {}
// SAFETY: as above; `&Tracker` only reads.
unsafe impl Sync for Block {}

impl Block {
    /// A block of that shape from a source; its words are zero.
    pub(super) fn allocate(source: &mut dyn BlockSource, shape: Shape) -> Result<Self> {
        source.alloc_block(shape.bytes()).map(Block)
    }

    /// The block that lies at an address of a source already, to be read only.
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

    /// Where in this process it lies.
    pub(super) fn addr(self) -> usize {
        self.0.addr().get()
    }

    /// Bits set.
    pub(super) fn count(self, shape: Shape) -> u64 {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512vpopcntdq") && std::arch::is_x86_feature_detected!("avx512f")
            {
                // SAFETY: the processor has what the function is compiled for.
                return unsafe { self.count_avx512(shape) };
            }
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: as above.
                return unsafe { self.count_avx2(shape) };
            }
        }
        self.count_words(shape)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vpopcntdq")]
    fn count_avx512(self, shape: Shape) -> u64 {
        self.count_words(shape)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,popcnt")]
    fn count_avx2(self, shape: Shape) -> u64 {
        self.count_words(shape)
    }

    /// As [`Block::count`], compiled for whatever the caller is.
    #[inline(always)]
    fn count_words(self, shape: Shape) -> u64 {
        (0..shape.words()).map(|word| u64::from(self.load(shape, word).count_ones())).sum()
    }

    /// Word `word` modulo the block's words.
    #[inline(always)]
    pub(super) fn load(self, shape: Shape, word: usize) -> u64 {
        // SAFETY: the masked index lies inside the `shape.bytes()` bytes that the source's contract makes readable.
        unsafe { self.0.add(word & shape.word_mask).read() }
    }

    /// Sets word `word` modulo the block's words. For the tracker that owns the block alone.
    #[inline(always)]
    pub(super) fn store(self, shape: Shape, word: usize, value: u64) {
        // SAFETY: as in `load`; only the owner's `&mut` methods come here.
        unsafe { self.0.add(word & shape.word_mask).write(value) }
    }
}

/// Blocks on the heap: slabs that double from one page to 1 MiB, then huge pages. Small trackers stay small, and big
/// ones take few TLB entries and few page faults.
#[derive(Default)]
pub struct HeapBlocks {
    slabs: Vec<Slab>,
    /// What is left of the last slab.
    next: usize,
    held: usize,
}

struct Slab {
    start: NonNull<u8>,
    layout: Layout,
    mapped: bool,
}

// SAFETY: a slab is plain memory that this owner alone allocates and frees.
unsafe impl Send for Slab {}
// SAFETY: nothing is reached through a shared slab.
unsafe impl Sync for Slab {}

const SMALLEST_SLAB: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

impl Slab {
    fn allocate(bytes: usize) -> Option<Self> {
        if bytes == HUGE_PAGE {
            return Self::map();
        }
        let layout = Layout::from_size_align(bytes, SMALLEST_SLAB).ok()?;
        // SAFETY: `bytes` is never 0.
        let start = NonNull::new(unsafe { alloc::alloc_zeroed(layout) })?;
        Some(Slab { start, layout, mapped: false })
    }

    /// A huge page, or memory that asks to be one: the aligned half of an anonymous mapping twice as long.
    fn map() -> Option<Self> {
        let (prot, flags) = (mm::ProtFlags::READ | mm::ProtFlags::WRITE, mm::MapFlags::PRIVATE);
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let start = unsafe { mm::mmap_anonymous(ptr::null_mut(), 2 * HUGE_PAGE, prot, flags) };
        let start = start.ok()?.cast::<u8>();
        let head = start.align_offset(HUGE_PAGE);
        let aligned = start.wrapping_add(head);
        // SAFETY: head, tail and the page between them are parts of the mapping just made, and nothing points there.
        // A part that cannot be unmapped is only address space; a page that cannot be huge is only slower.
        unsafe {
            if head > 0 {
                let _ = mm::munmap(start.cast(), head);
            }
            let _ = mm::munmap(aligned.wrapping_add(HUGE_PAGE).cast(), HUGE_PAGE - head);
            let _ = mm::madvise(aligned.cast(), HUGE_PAGE, mm::Advice::LinuxHugepage);
        }
        Some(Slab {
            start: NonNull::new(aligned)?,
            layout: Layout::from_size_align(HUGE_PAGE, HUGE_PAGE).ok()?,
            mapped: true,
        })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: `start` and `layout` are those of the allocation or mapping, and every block in it was given up.
        unsafe {
            if self.mapped {
                let _ = mm::munmap(self.start.as_ptr().cast(), self.layout.size());
            } else {
                alloc::dealloc(self.start.as_ptr(), self.layout);
            }
        }
    }
}

// SAFETY: blocks are disjoint, page-aligned pieces (512 bytes: block-aligned) of zeroed slabs, which live until
// `release_all` or drop and which nothing else writes.
unsafe impl BlockSource for HeapBlocks {
    fn alloc_block(&mut self, bytes: usize) -> Result<NonNull<u64>> {
        let room = self.slabs.last().map_or(0, |slab| slab.layout.size() - self.next);
        if room < bytes {
            let size = match self.held {
                held if held >= HUGE_PAGE / 2 => HUGE_PAGE,
                held => held.next_power_of_two().max(SMALLEST_SLAB).max(bytes.next_power_of_two()),
            };
            let slab = Slab::allocate(size)
                .ok_or(Error::NoMemory { order: (bytes / SMALLEST_SLAB).max(1).ilog2(), node: None })?;
            self.slabs.push(slab);
            self.next = 0;
            self.held += size;
        }
        let slab = self.slabs.last().ok_or(Error::NoMemory { order: 0, node: None })?;
        // SAFETY: `next + bytes` lies inside the slab, as checked above.
        let block = unsafe { slab.start.add(self.next) };
        self.next += bytes;
        Ok(block.cast())
    }

    fn phys_of(&self, _: NonNull<u64>) -> Option<Phys> {
        None
    }

    fn nbytes(&self) -> u64 {
        self.held as u64
    }

    fn release_all(&mut self) {
        *self = HeapBlocks::default();
    }
}
