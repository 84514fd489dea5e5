//! Blocks on the heap, allocated in slabs.

#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::tracker::block::BlockSource;
use crate::units::Phys;
use core::ptr::{self, NonNull};
use rustix::mm;
use std::alloc::{self, Layout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks on the heap: slabs that double from one page on, then huge pages. Small trackers stay small, and big ones take
/// few TLB entries and few page faults: from 512 KiB of blocks on they hold up to one huge page more, for the next ones. Huge
/// pages that were given back serve the next tracker: for the first touch of one the kernel takes longer than filling it does.
#[derive(Default)]
pub struct HeapBlocks(Mutex<Slabs>);

#[derive(Default)]
struct Slabs {
    slabs: Vec<Slab>,
    /// What is left of the last slab.
    next: usize,
    held: usize,
    /// Bytes of blocks.
    given: usize,
}

struct Slab {
    start: NonNull<u8>,
    layout: Layout,
    mapped: bool,
    /// Another tracker's words may still be in it.
    used: bool,
}

// SAFETY: a slab is memory from the allocator or the kernel, which any thread may use and free; one value owns it.
unsafe impl Send for Slab {}
// SAFETY: no method takes `&Slab`, and the fields that others read are numbers.
unsafe impl Sync for Slab {}

/// Huge pages given back, for the next tracker of this process.
static SPARE: Mutex<Vec<Slab>> = Mutex::new(Vec::new());
/// Most of them: 32 MiB.
const MOST_SPARE: usize = 16;

const SMALLEST_SLAB: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

impl Slab {
    fn allocate(bytes: usize) -> Option<Self> {
        if bytes == HUGE_PAGE {
            return spare().and_then(|mut spare| spare.pop()).or_else(Self::map);
        }
        let layout = Layout::from_size_align(bytes, SMALLEST_SLAB).ok()?;
        // SAFETY: `take` asks for `SMALLEST_SLAB` bytes or more, so that the layout's size is not 0.
        let start = NonNull::new(unsafe { alloc::alloc_zeroed(layout) })?;
        Some(Slab { start, layout, mapped: false, used: false })
    }

    /// A huge page, or memory that asks to be one: the aligned half of an anonymous mapping twice as long.
    fn map() -> Option<Self> {
        let (prot, flags) = (mm::ProtFlags::READ | mm::ProtFlags::WRITE, mm::MapFlags::PRIVATE);
        // SAFETY: without MAP_FIXED the kernel chooses addresses that are mapped to nothing.
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
            #[cfg(target_os = "linux")]
            let _ = mm::madvise(aligned.cast(), HUGE_PAGE, mm::Advice::LinuxHugepage);
        }
        Some(Slab {
            start: NonNull::new(aligned)?,
            layout: Layout::from_size_align(HUGE_PAGE, HUGE_PAGE).ok()?,
            mapped: true,
            used: false,
        })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: `start` and `layout` are those of the allocation or mapping, which is freed here alone. Blocks of it are used
        // by trackers that hold the source, so that none is left when the source, and with it the slab, is dropped.
        unsafe {
            if self.mapped {
                let _ = mm::munmap(self.start.as_ptr().cast(), self.layout.size());
            } else {
                alloc::dealloc(self.start.as_ptr(), self.layout);
            }
        }
    }
}

/// Is not waited for, as [`crate::buffer_pool`] is not.
fn spare() -> Option<MutexGuard<'static, Vec<Slab>>> {
    SPARE.try_lock().ok()
}

impl Slabs {
    /// The next piece of a slab, and whether it must be zeroed.
    fn take(&mut self, bytes: usize) -> Result<(NonNull<u64>, bool)> {
        let room = self.slabs.last().map_or(0, |slab| slab.layout.size() - self.next);
        if room < bytes {
            let size = match self.held {
                held if held >= HUGE_PAGE / 4 => HUGE_PAGE,
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
        self.given += bytes;
        Ok((block.cast(), slab.used))
    }
}

impl Drop for Slabs {
    fn drop(&mut self) {
        if self.held < HUGE_PAGE {
            return;
        }
        let Some(mut spare) = spare() else { return };
        let room = MOST_SPARE.saturating_sub(spare.len());
        let huge = self.slabs.extract_if(.., |slab| slab.mapped).take(room);
        spare.extend(huge.map(|mut slab| {
            slab.used = true;
            slab
        }));
    }
}

impl HeapBlocks {
    fn slabs(&self) -> MutexGuard<'_, Slabs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// SAFETY: blocks are disjoint, page-aligned pieces (512 bytes: block-aligned) of slabs, which live as long as the source and
// which nothing else writes; those that held something are zeroed when they are given out.
unsafe impl BlockSource for HeapBlocks {
    fn alloc_block(&self, bytes: usize) -> Result<NonNull<u64>> {
        let (block, used) = self.slabs().take(bytes)?;
        if used {
            // SAFETY: `take` gave `bytes` bytes of a slab, and advances past them, so that no other block has them.
            unsafe { block.cast::<u8>().write_bytes(0, bytes) };
        }
        Ok(block)
    }

    fn alloc_unwritten(&self, bytes: usize) -> Result<NonNull<u64>> {
        self.slabs().take(bytes).map(|(block, _)| block)
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn phys_of(&self, _: NonNull<u64>) -> Option<Phys> {
        None
    }

    fn nbytes(&self) -> u64 {
        self.slabs().given as u64
    }

    fn renewed(&self) -> Arc<dyn BlockSource> {
        Arc::new(HeapBlocks::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_that_somebody_else_is_looking_for_are_not_waited_for() {
        let somebody = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        let blocks = HeapBlocks::default();
        for _ in 0..1024 {
            blocks.alloc_block(SMALLEST_SLAB).unwrap();
        }
        assert!(blocks.slabs().slabs.iter().any(|slab| slab.mapped));
        drop(blocks);
        drop(somebody);
    }
}
