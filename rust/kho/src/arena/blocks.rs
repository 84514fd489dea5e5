//! A tracker's blocks in an arena's pages, so that serializing copies no bitmap.

use super::Arena;
use super::spans::Spans;
use crate::error::{Error, Result};
use crate::tracker::BlockSource;
use crate::units::{PageSize, Pfn, Phys};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

/// Hands out blocks from pages it allocates; blocks smaller than a page share one.
#[derive(Debug)]
pub struct ArenaBlocks {
    /// Weak, because an arena can own a tracker whose blocks are its pages ([`Arena::keep`]).
    arena: Weak<Arena>,
    spans: Arc<Spans>,
    page: PageSize,
    generation: u64,
    pages: Vec<Pfn>,
    /// Bytes of the last page that are taken.
    used: u64,
}

impl ArenaBlocks {
    pub fn new(arena: &Arc<Arena>) -> Self {
        ArenaBlocks {
            arena: Arc::downgrade(arena),
            spans: Arc::clone(&arena.spans),
            page: arena.page(),
            generation: arena.generation(),
            pages: Vec::new(),
            used: arena.page().bytes(),
        }
    }
}

// SAFETY: a block lies in a page that was allocated for this source alone, zeroed, inside a mapping that `spans` keeps
// mapped; `used` only grows within a page, so no two blocks share a byte.
unsafe impl BlockSource for ArenaBlocks {
    fn alloc_block(&mut self, bytes: usize) -> Result<NonNull<u64>> {
        let arena = self.arena.upgrade().ok_or(Error::Stale { what: "tracker" })?;
        arena.check_generation("tracker", self.generation)?;
        let bytes = bytes as u64;
        if self.used + bytes > self.page.bytes() {
            self.pages.push(arena.alloc_bytes(self.page.bytes(), None)?.0);
            self.used = 0;
        }
        let pfn = self.pages.last().copied().unwrap_or_default();
        let phys = Phys(self.page.phys(pfn).0 + self.used);
        let outside = Error::OutsideMemory { what: "tracker block", phys: phys.0, len: bytes };
        let block = self.spans.ptr(phys, bytes).ok_or(outside)?;
        self.used += bytes;
        Ok(block.cast())
    }

    fn phys_of(&self, block: NonNull<u64>) -> Option<Phys> {
        self.spans.phys_of(block.cast())
    }

    fn nbytes(&self) -> u64 {
        self.pages.len() as u64 * self.page.bytes()
    }

    fn release_all(&mut self) {
        let arena = self.arena.upgrade().filter(|arena| arena.generation() == self.generation);
        for pfn in self.pages.drain(..) {
            // The page was allocated for this source and is in nobody's tracker, so that nothing can refuse it.
            let _ = arena.as_ref().map(|arena| super::lock(&arena.pages).put(pfn));
        }
        self.used = self.page.bytes();
    }
}
