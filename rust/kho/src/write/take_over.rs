//! Taking over an arena: an [`Incoming`] whose restored folios become allocations of the arena.

#![forbid(unsafe_code)]

use crate::abi::detect::Place;
use crate::error::{Error, Result, RootProblem};
use crate::memory::PhysMemory;
use crate::read::arena_note::Recorded;
use crate::read::find::Found;
use crate::read::incoming::{Incoming, Options, read};
use crate::read::restore::{Claims, Restore};
use crate::tracker::Tracker;
use crate::units::{Order, Pfn, Phys};
use crate::write::arena::{Arena, Lease};
use std::any::Any;
use std::sync::Arc;

/// Restoring in an arena that was taken over: restored folios become allocations.
struct Taken {
    arena: Arc<Arena>,
    /// The generation of the take-over.
    generation: u64,
    claims: Arc<Claims>,
    max_page_order: Option<u32>,
}

impl Restore for Taken {
    fn restore_folio(&self, phys: Phys) -> Result<(Pfn, Order)> {
        let (pfn, order) = self.claims.restore_folio(phys, self.max_page_order)?;
        if let Err(e) = self.arena.adopt(self.generation, pfn, order) {
            self.claims.give_back(pfn, order);
            return Err(e);
        }
        Ok((pfn, order))
    }

    fn restore_many(&self, phys: &[u64]) -> Result<Vec<u8>> {
        self.arena.adopt_many(self.generation, |allocated, in_place| {
            self.claims.restore_many(phys, self.max_page_order, Some(allocated), in_place)
        })
    }

    fn restore_pages(&self, phys: Phys, nr_pages: u64, cuts_at_nodes: bool) -> Result<Pfn> {
        let cuts = if cuts_at_nodes { self.arena.node_cuts() } else { Vec::new() };
        let pfn = self.claims.restore_pages(phys, nr_pages, &cuts)?;
        if let Err(e) = self.arena.adopt_pages(self.generation, pfn, nr_pages) {
            self.claims.give_back_pages(pfn, nr_pages, &cuts);
            return Err(e);
        }
        Ok(pfn)
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
        let nothing = || Error::NoHandover { why: "nothing was finalized in this arena".into(), absent: None };
        let fdt_phys = options.fdt_phys.ok_or_else(nothing)?;
        arena.check_whole()?;
        // Bitmaps are read where they are, unless another process can cut the file (which would be fatal), or this process
        // has views on them (which could write them): then they are copied.
        for in_place in [arena.is_sealed(), false] {
            let memory: Arc<dyn PhysMemory> = arena.clone();
            let place = if in_place { Place::InPlace(&**arena) } else { Place::Memory(&*memory) };
            let reads = read(place, Phys(fdt_phys), &Found::default(), &options)?;
            if reads.0.map.0 == 0 {
                return Err(Error::Root { phys: fdt_phys, problem: RootProblem::MapIsZero });
            }
            let preserved = &reads.1.preserved;
            let outside = if in_place { preserved.outside() } else { first_outside(arena, preserved.tracker()) };
            if let Some((phys, len)) = outside {
                return Err(Error::OutsideMemory { what: "preserved range", phys: phys.0, len });
            }
            let incoming = Self::new(memory, reads, Vec::new(), &options)?;
            if let Some(generation) = arena.take_over(incoming.claims()) {
                arena.record(Recorded::default())?;
                let claims = Arc::clone(incoming.claims());
                let max_page_order = options.max_page_order;
                let taken = Taken { arena: Arc::clone(arena), generation, claims, max_page_order };
                return Ok(incoming.restored_by(Box::new(taken)));
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
        let restorer: &dyn Any = self.restorer();
        restorer.downcast_ref()
    }
}

/// The first preserved memory, and its bytes, that an arena does not have.
fn first_outside(arena: &Arena, preserved: &Tracker) -> Option<(Phys, u64)> {
    let page = arena.page();
    let runs = preserved.extents().map(|(start, end)| (page.phys(start), (end.0 - start.0) << page.shift()));
    { runs }.find(|&(phys, len)| !arena.contains(phys, len))
}
