//! Taking over an arena: an [`Incoming`] whose restored folios become allocations of the arena.

#![forbid(unsafe_code)]

use crate::abi::detect::Place;
use crate::error::{Error, Result};
use crate::memory::PhysMemory;
use crate::read::arena_note::Recorded;
use crate::read::find::Found;
use crate::read::incoming::{Incoming, Options, read};
use crate::read::restore::{RestoreMany, RestoreTarget};
use crate::tracker::Tracker;
use crate::units::{Order, Pfn, Phys};
use crate::write::arena::{Arena, Lease};
use std::any::Any;
use std::sync::Arc;

/// An arena that was taken over, and the generation of that take-over.
struct Taken {
    arena: Arc<Arena>,
    generation: u64,
}

impl RestoreTarget for Taken {
    fn adopt(&self, pfn: Pfn, order: Order) -> Result<()> {
        self.arena.adopt(self.generation, pfn, order)
    }

    fn adopt_many(&self, restore: &mut RestoreMany<'_>) -> Result<Vec<u8>> {
        self.arena.adopt_many(self.generation, restore)
    }

    fn adopt_pages(&self, pfn: Pfn, nr_pages: u64) -> Result<()> {
        self.arena.adopt_pages(self.generation, pfn, nr_pages)
    }

    fn node_cuts(&self) -> Vec<Pfn> {
        self.arena.node_cuts()
    }
}

impl Options {
    /// What an arena says of itself, where the caller said nothing.
    pub fn know_arena(&mut self, arena: &Arena) {
        self.page_size = Some(arena.page());
        self.page_why = Some("the arena's");
        self.know_recorded(arena.recorded());
        self.know_scratch(arena.scratch().to_vec(), arena.scratch_phys());
    }
}

impl Incoming {
    /// Takes over an arena: what was preserved stays reserved until it is restored, everything else is free, and
    /// whatever was allocated before is gone, as after a kexec.
    ///
    /// # Errors
    /// As [`Incoming::open`], and then nothing has changed; [`Error::OutsideMemory`] for a preserved folio that the
    /// arena does not have.
    pub fn take_over(arena: &Arc<Arena>, fdt_phys: Option<u64>, options: &Options) -> Result<Self> {
        let mut options = Options { fdt_phys, ..options.clone() };
        options.know_arena(arena);
        let nothing = || Error::NoHandover { why: "nothing was finalized in this arena".into() };
        let fdt_phys = options.fdt_phys.ok_or_else(nothing)?;
        arena.check_whole()?;
        // Bitmaps are read where they are, unless another process can cut the file (which would be fatal), or this process
        // has views on them (which could write them): then they are copied.
        for in_place in [arena.is_sealed(), false] {
            let memory: Arc<dyn PhysMemory> = arena.clone();
            let place = if in_place { Place::InPlace(&**arena) } else { Place::Memory(&*memory) };
            let reads = read(place, Phys(fdt_phys), &Found::default(), &options)?;
            let preserved = &reads.1.preserved;
            let outside = if in_place { preserved.outside() } else { first_outside(arena, preserved.tracker()) };
            if let Some((phys, len)) = outside {
                return Err(Error::OutsideMemory { what: "preserved range", phys: phys.0, len });
            }
            let incoming = Self::new(memory, reads, Vec::new(), &options)?;
            if let Some(generation) = arena.take_over(incoming.claims()) {
                arena.record(Recorded::default())?;
                return Ok(incoming.restored_to(Arc::new(Taken { arena: Arc::clone(arena), generation })));
            }
        }
        let why = "other threads take it over at the same time".into();
        Err(Error::Invalid { what: "arena", why })
    }

    /// The arena that was taken over; `None` for an image.
    pub fn arena(&self) -> Option<&Arc<Arena>> {
        self.taken().map(|taken| &taken.arena)
    }

    /// A lease of pages that were restored in the arena; `None` in an image.
    ///
    /// # Errors
    /// [`Error::Stale`] if the arena has another owner by now; [`Error::PageState`] if they are freed by now.
    pub fn lease(&self, start: Pfn, end: Pfn) -> Result<Option<Lease>> {
        self.taken().map(|taken| taken.arena.lease_restored(taken.generation, start, end)).transpose()
    }

    fn taken(&self) -> Option<&Taken> {
        let target: &dyn Any = self.target()?;
        target.downcast_ref()
    }
}

/// The first preserved memory, and its bytes, that an arena does not have.
fn first_outside(arena: &Arena, preserved: &Tracker) -> Option<(Phys, u64)> {
    let page = arena.page();
    let runs = preserved.extents().map(|(start, end)| (page.phys(start), (end.0 - start.0) << page.shift()));
    { runs }.find(|&(phys, len)| !arena.contains(phys, len))
}
