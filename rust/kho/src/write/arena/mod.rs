//! Writable physical memory: regions of RAM at chosen addresses, a page allocator, scratch areas.

#![deny(unsafe_code)]

mod blocks;
mod header;
mod pages;
mod regions;
mod scratch;
mod spans;

pub use crate::read::arena_note::{ArenaNote, NOTE_NAME, NOTE_TYPE, Recorded, Region};
pub use crate::scratch::{ScratchArea, check_no_overlap};
pub use blocks::ArenaBlocks;
pub use pages::{Lease, Owner, PageKind};
pub use scratch::{nodes, place};
pub use spans::Backing;

use crate::error::{Error, Result};
use crate::mapping::Items;
use crate::memory::{PhysMemory, PhysRange};
use crate::read::restore::Claims;
use crate::tracker::Tracker;
use crate::units::{Order, PageSize, Pfn, Phys};
use pages::Pages;
use regions::{check_areas, check_regions};
use spans::Spans;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use zerocopy::IntoBytes;

/// What an arena is made of.
#[derive(Clone, Debug)]
pub struct ArenaConfig {
    /// The page size.
    pub page: PageSize,
    /// MAX_PAGE_ORDER: the largest order `alloc` gives without being asked for gigantic folios.
    pub max_order: Order,
    /// Sorted by address, disjoint.
    pub regions: Vec<Region>,
    /// The scratch areas: in RAM, disjoint.
    pub scratch: Vec<ScratchArea>,
    /// Where the bytes live.
    pub backing: Backing,
}

/// What the kernel would say of a page (`struct page`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageState {
    /// What the page is.
    pub kind: PageKind,
    /// The reference count.
    pub refcount: u32,
    /// `page->private`: the KHO marker of an inherited folio's head, else 0.
    pub private: u64,
    /// The NUMA node.
    pub node: u32,
}

/// Sparse, page-granular physical memory. Nothing is committed before it is touched.
#[derive(Debug)]
pub struct Arena {
    config: ArenaConfig,
    /// The page ranges that cannot be allocated.
    reserved: Vec<(Pfn, Pfn)>,
    spans: Arc<Spans>,
    scratch_phys: u64,
    pages: parking_lot::Mutex<Pages>,
    /// Counts the take-overs: what was allocated under another generation is gone.
    generation: AtomicU64,
    handover: Mutex<Handover>,
}

/// What lies ready for the next owner.
#[derive(Debug, Default)]
struct Handover {
    recorded: Recorded,
    /// The tracker of the one `Outgoing`, while there is one: what it holds cannot be freed.
    preserved: Weak<Mutex<Tracker>>,
    /// The same once it is finalized and its `Outgoing` is gone: nothing of it may be freed before it is taken over.
    kept: Option<Arc<Mutex<Tracker>>>,
    /// Pages of blobs that callers wrote and linked as subtrees, by name: they cannot be freed.
    linked: Vec<(String, Pfn, Pfn)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arena {
    /// New, zeroed memory.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Misaligned`] or [`Error::OutOfRange`] for regions or scratch that cannot be;
    /// [`Error::Io`] when the backing cannot be made.
    pub fn new(mut config: ArenaConfig) -> Result<Arc<Self>> {
        config.regions.sort_by_key(|r| r.start);
        check_regions(&config.regions, config.page)?;
        check_areas(&config.regions, &config.scratch)?;
        let mut pages = pages_of(&config)?;
        pages.is_private = config.backing == Backing::Anonymous;
        let scratch_phys = scratch_array_phys(&config);
        let note = ArenaNote {
            page: config.page,
            max_order: config.max_order,
            regions: config.regions.clone(),
            scratch: config.scratch.clone(),
            handover: Recorded::default(),
            scratch_phys,
        };
        let spans = Spans::create(&note, &config.backing)?;
        if scratch_phys != 0 {
            let array: Vec<u8> =
                config.scratch.iter().flat_map(|s| [s.addr, s.size]).flat_map(u64::to_le_bytes).collect();
            // The whole page: a file system with smaller blocks would otherwise have none for the rest of it.
            spans.back(Phys(scratch_phys), config.page.bytes())?;
            spans.write(Phys(scratch_phys), &array)?;
        }
        Ok(Arc::new(Arena {
            reserved: reserved(&config),
            config,
            spans: Arc::new(spans),
            scratch_phys,
            pages: parking_lot::Mutex::new(pages),
            generation: AtomicU64::new(0),
            handover: Mutex::default(),
        }))
    }

    /// The memory of an arena's file, made by this process or another.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that no arena made or that is cut short; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|e| Error::io(format!("open {}", path.display()), e))?;
        Self::of_file(file, Backing::File(path.to_path_buf()))
    }

    /// The same from a descriptor, which is duplicated.
    ///
    /// # Errors
    /// As [`Arena::open`].
    pub fn open_fd(fd: BorrowedFd<'_>) -> Result<Arc<Self>> {
        Self::of_file(spans::duplicate(fd)?, Backing::Memfd)
    }

    fn of_file(file: File, backing: Backing) -> Result<Arc<Self>> {
        let (spans, note) = Spans::open(file)?;
        let config = ArenaConfig {
            page: note.page,
            max_order: note.max_order,
            regions: note.regions,
            scratch: note.scratch,
            backing,
        };
        let mut pages = pages_of(&config)?;
        pages.untaken = note.handover.fdt_phys;
        let handover = Handover { recorded: note.handover, ..Handover::default() };
        Ok(Arc::new(Arena {
            reserved: reserved(&config),
            config,
            spans: Arc::new(spans),
            scratch_phys: note.scratch_phys,
            pages: parking_lot::Mutex::new(pages),
            generation: AtomicU64::new(0),
            handover: Mutex::new(handover),
        }))
    }

    /// What it was made of.
    pub fn config(&self) -> &ArenaConfig {
        &self.config
    }

    /// The page size.
    pub fn page(&self) -> PageSize {
        self.config.page
    }

    /// The scratch areas.
    pub fn scratch(&self) -> &[ScratchArea] {
        &self.config.scratch
    }

    /// Where the scratch array lies; 0 without scratch.
    pub fn scratch_phys(&self) -> u64 {
        self.scratch_phys
    }

    /// Where one NUMA node's memory ends and another's begins, ascending.
    pub fn node_cuts(&self) -> Vec<Pfn> {
        let pairs = self.config.regions.windows(2).filter(|pair| pair[0].node != pair[1].node);
        pairs.map(|pair| self.page().pfn(pair[1].start)).collect()
    }

    /// What is recorded of the handover that lies here.
    pub fn recorded(&self) -> Recorded {
        lock(&self.handover).recorded
    }

    /// Records what the handover says of itself, for the next owner.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn record(&self, recorded: Recorded) -> Result<()> {
        let mut handover = lock(&self.handover);
        self.spans.record(recorded)?;
        handover.recorded = recorded;
        Ok(())
    }

    /// The descriptor of a memfd or file backing.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.spans.fd()
    }

    /// The pages, with everything free that is.
    fn settled(&self) -> Result<parking_lot::MutexGuard<'_, Pages>> {
        let mut pages = self.pages.lock();
        pages.settle(&self.reserved)?;
        Ok(pages)
    }

    /// The same for who only looks: without memory for the books nothing counts as free.
    fn looked_at(&self) -> parking_lot::MutexGuard<'_, Pages> {
        let mut pages = self.pages.lock();
        let _ = pages.settle(&self.reserved);
        pages
    }

    /// Allocates `1 << order` contiguous pages, on `node` if one is given; orders beyond MAX_PAGE_ORDER only when
    /// `gigantic`. The bytes are what the last owner left, zeros at first.
    ///
    /// # Errors
    /// [`Error::NoMemory`]; [`Error::OrderTooLarge`].
    pub fn alloc(&self, order: Order, node: Option<u32>, gigantic: bool) -> Result<Pfn> {
        self.take(&mut *self.settled()?, None, order, node, gigantic)
    }

    /// Takes a free folio, at `at` if given, and the file's blocks for it; without these the folio is free again.
    fn take(&self, pages: &mut Pages, at: Option<Pfn>, order: Order, node: Option<u32>, gigantic: bool) -> Result<Pfn> {
        let pfn = match at {
            Some(pfn) => pages.alloc_at(pfn, order)?,
            None => pages.alloc(order, node, gigantic)?,
        };
        self.spans.back(self.page().phys(pfn), self.page().folio_bytes(order)).inspect_err(|_| {
            // It was taken just now, under the same lock, so that nothing can refuse it.
            let _ = pages.put(pfn);
        })?;
        Ok(pfn)
    }

    /// The same, with a lease: every call that is given it fails once the folio is freed.
    ///
    /// # Errors
    /// As [`Arena::alloc`].
    pub fn lease(&self, order: Order, node: Option<u32>, gigantic: bool) -> Result<Lease> {
        let mut pages = self.settled()?;
        let pfn = self.take(&mut pages, None, order, node, gigantic)?;
        Ok(pages.lease(pfn, Pfn(pfn.0 + order.nr_pages()), self.generation()))
    }

    /// [`Arena::alloc_at`] with a lease.
    ///
    /// # Errors
    /// As [`Arena::alloc_at`].
    pub fn lease_at(&self, pfn: Pfn, order: Order) -> Result<Lease> {
        let mut pages = self.settled()?;
        let pfn = self.take(&mut pages, Some(pfn), order, None, false)?;
        Ok(pages.lease(pfn, Pfn(pfn.0 + order.nr_pages()), self.generation()))
    }

    /// A lease of the folio that is allocated at `pfn`, and its order.
    ///
    /// # Errors
    /// [`Error::PageState`] unless `pfn` is the head of an allocated folio; [`Error::Owned`] for one that the library keeps
    /// something in.
    pub fn lease_of(&self, pfn: Pfn) -> Result<(Lease, Order)> {
        let pages = self.settled()?;
        let order = pages.allocated_at(pfn)?;
        let end = Pfn(pfn.0 + order.nr_pages());
        pages.check_not_owned("folio", pfn, end)?;
        Ok((pages.lease(pfn, end, self.generation()), order))
    }

    /// Refuses a lease of pages that were freed or taken over since.
    ///
    /// # Errors
    /// [`Error::Freed`]; [`Error::Stale`].
    pub fn check_lease(&self, lease: &Lease) -> Result<()> {
        self.leased(lease).map(drop)
    }

    /// The pages, in which a lease is still good.
    fn leased(&self, lease: &Lease) -> Result<parking_lot::MutexGuard<'_, Pages>> {
        let pages = self.settled()?;
        self.check_generation("folio", lease.generation)?;
        pages.check_lease(lease)?;
        Ok(pages)
    }

    /// Begins a view on leased pages: where they are in this process. They are not allocated again until
    /// [`Arena::end_view`], be they freed or taken over.
    ///
    /// # Errors
    /// As [`Arena::check_lease`]; [`Error::Owned`]; [`Error::Cut`].
    pub fn begin_view(&self, lease: &Lease) -> Result<NonNull<u8>> {
        self.spans.check_whole()?;
        let mut pages = self.leased(lease)?;
        pages.check_not_owned("view", lease.start, lease.end)?;
        let (phys, len) = (self.page().phys(lease.start), (lease.end.0 - lease.start.0) << self.page().shift());
        let view = self.spans.ptr(phys, len).ok_or(Error::OutsideMemory { what: "folio", phys: phys.0, len })?;
        pages.begin_view(lease.start, lease.end);
        Ok(view)
    }

    /// Ends a view that [`Arena::begin_view`] began.
    pub fn end_view(&self, lease: &Lease) {
        // Blocks of a folio that was freed are inside of memory, where inserting them needs no more than a bitmap: without
        // memory for that they stay reserved.
        let _ = self.pages.lock().end_view(lease.start, lease.end);
    }

    /// Allocates pages for the library itself, or none.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn alloc_pages(&self, n: u64, owner: Owner) -> Result<Vec<Pfn>> {
        let mut pages = self.settled()?;
        let mut all = Vec::new();
        for _ in 0..n {
            let pfn = self.take(&mut pages, None, Order::ZERO, None, false).and_then(|pfn| {
                pages.own(pfn, Order::ZERO, owner)?;
                Ok(pfn)
            });
            match pfn {
                Ok(pfn) => all.push(pfn),
                Err(e) => {
                    drop(pages);
                    self.put_own(all);
                    return Err(e);
                }
            }
        }
        Ok(all)
    }

    /// Allocates one particular block.
    ///
    /// # Errors
    /// [`Error::PageState`] if any page of it is in use; [`Error::OutsideMemory`]; [`Error::Misaligned`].
    pub fn alloc_at(&self, pfn: Pfn, order: Order) -> Result<Pfn> {
        self.take(&mut *self.settled()?, Some(pfn), order, None, false)
    }

    /// Allocates pages for `len` bytes that the library keeps, zeroed.
    pub(crate) fn alloc_bytes(&self, len: u64, at: Option<Pfn>, owner: Owner) -> Result<(Pfn, Order)> {
        let nr_pages = len.div_ceil(self.page().bytes()).max(1);
        let order = Order::new(nr_pages.next_power_of_two().ilog2().into())?;
        let mut pages = self.settled()?;
        let pfn = self.take(&mut pages, at, order, None, false)?;
        let made = pages.own(pfn, order, owner);
        drop(pages);
        let made = made.and_then(|()| self.spans.zero(self.page().phys(pfn), self.page().folio_bytes(order)));
        made.inspect_err(|_| self.put_own([pfn]))?;
        Ok((pfn, order))
    }

    /// Takes a reference on the folio whose head is `pfn`; returns the new count.
    ///
    /// # Errors
    /// [`Error::PageState`] unless `pfn` is the head of an allocated folio; [`Error::Owned`].
    pub fn get(&self, pfn: Pfn) -> Result<u32> {
        let mut pages = self.settled()?;
        let order = pages.allocated_at(pfn)?;
        pages.check_not_owned("get", pfn, Pfn(pfn.0 + order.nr_pages()))?;
        pages.get(pfn)
    }

    /// The same through a lease.
    ///
    /// # Errors
    /// As [`Arena::get`] and [`Arena::check_lease`].
    pub fn get_leased(&self, lease: &Lease) -> Result<u32> {
        let mut pages = self.leased(lease)?;
        pages.check_not_owned("get", lease.start, lease.end)?;
        pages.get(lease.start)
    }

    /// Drops a reference; the last one frees the folio (then `true`).
    ///
    /// # Errors
    /// [`Error::PageState`] unless `pfn` is the head of an allocated folio, or while the folio is preserved or linked;
    /// [`Error::Owned`] for one that the library keeps something in.
    pub fn put(&self, pfn: Pfn) -> Result<bool> {
        self.put_checked(pfn, None, false)
    }

    /// The same through a lease.
    ///
    /// # Errors
    /// As [`Arena::put`] and [`Arena::check_lease`].
    pub fn put_leased(&self, lease: &Lease) -> Result<bool> {
        self.put_checked(lease.start, Some(lease), false)
    }

    /// Frees a folio of the library's own.
    ///
    /// # Errors
    /// [`Error::PageState`] while something in it is preserved.
    pub(crate) fn put_owned(&self, pfn: Pfn) -> Result<bool> {
        self.put_checked(pfn, None, true)
    }

    fn put_checked(&self, pfn: Pfn, lease: Option<&Lease>, owned: bool) -> Result<bool> {
        // All locks are held from the checks to the change, so that nothing is preserved or linked in between.
        let handover = lock(&self.handover);
        let preserved = handover.preserved.upgrade();
        let tracker = preserved.as_ref().map(|t| lock(t));
        let mut pages = self.settled()?;
        if let Some(lease) = lease {
            self.check_generation("folio", lease.generation)?;
            pages.check_lease(lease)?;
        }
        let order = pages.allocated_at(pfn)?;
        let end = Pfn(pfn.0 + order.nr_pages());
        if !owned {
            pages.check_not_owned("free", pfn, end)?;
        }
        let last = pages.refcount(pfn) == 1;
        let refuse = |state, wanted| Err(Error::PageState { phys: self.page().phys(pfn).0, state, wanted });
        if last && tracker.as_ref().is_some_and(|tracker| tracker.overlapping(pfn, end).is_some()) {
            return refuse("preserved", "free to go (unpreserve it first)");
        }
        if last && !owned && handover.linked.iter().any(|(_, from, to)| *from < end && pfn < *to) {
            return refuse("linked as a subtree", "free to go (remove the subtree first)");
        }
        if owned {
            pages.disown(pfn, order);
        }
        pages.put(pfn)
    }

    /// The order of the folio allocated at `pfn`.
    ///
    /// # Errors
    /// [`Error::PageState`] unless `pfn` is the head of an allocated folio.
    pub fn order_of(&self, pfn: Pfn) -> Result<Order> {
        self.settled()?.allocated_at(pfn)
    }

    /// Refuses a range of pages that is not all allocated.
    ///
    /// # Errors
    /// [`Error::PageState`] or [`Error::OutsideMemory`] for the first page that is not.
    pub fn check_allocated(&self, start: Pfn, end: Pfn) -> Result<()> {
        self.settled()?.check_allocated(start, end)
    }

    /// What a page is; `None` where there is no memory.
    pub fn page_state(&self, pfn: Pfn) -> Option<PageState> {
        let pages = self.looked_at();
        let kind = pages.kind(pfn)?;
        let private = if kind == PageKind::Reserved { pages.private(pfn) } else { 0 };
        Some(PageState { kind, refcount: pages.refcount(pfn), private, node: pages.node_of(pfn)? })
    }

    /// Free pages, and allocated ones; the rest is reserved.
    pub fn usage(&self) -> (u128, u128) {
        let pages = self.looked_at();
        (pages.nr_free(), pages.nr_allocated())
    }

    /// Bytes of bookkeeping.
    pub fn metadata_bytes(&self) -> u64 {
        self.pages.lock().nbytes()
    }

    /// How often the arena was taken over in this process.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Refuses work on behalf of an earlier owner.
    pub fn check_generation(&self, what: &'static str, generation: u64) -> Result<()> {
        if self.generation() == generation { Ok(()) } else { Err(Error::Stale { what }) }
    }

    /// Writes physical memory that the library does not use.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] unless all of it is in one run of RAM; [`Error::Owned`] for pages that hold a bitmap, a node
    /// of the map, the FDT or a subtree's blob; [`Error::Cut`]; [`Error::Io`].
    pub fn write(&self, phys: Phys, bytes: &[u8]) -> Result<()> {
        if !self.contains(phys, bytes.len() as u64) {
            return Err(Error::OutsideMemory { what: "write", phys: phys.0, len: bytes.len() as u64 });
        }
        let Some(last) = (bytes.len() as u64).checked_sub(1) else { return Ok(()) };
        // Held while it writes: no page becomes the library's before that is done.
        let mut pages = self.pages.lock();
        let (start, end) = (self.page().pfn(phys), Pfn(self.page().pfn(Phys(phys.0 + last)).0 + 1));
        if pages.check_not_owned("write", start, end).is_err() {
            // A map that was taken over and dropped is in use no more once its pages are settled.
            pages.settle(&self.reserved)?;
            pages.check_not_owned("write", start, end)?;
        }
        self.spans.write(phys, bytes)
    }

    /// Writes physical memory that the caller owns.
    ///
    /// # Errors
    /// As [`Arena::write`].
    pub(crate) fn write_own(&self, phys: Phys, bytes: &[u8]) -> Result<()> {
        self.spans.write(phys, bytes)
    }

    /// Whether what is mapped stays mapped whatever others do to the file: bitmaps can be used where they are.
    pub(crate) fn is_sealed(&self) -> bool {
        self.spans.is_sealed()
    }

    /// Refuses to go on in a file that was cut: touching a page that it lost would be fatal.
    ///
    /// # Errors
    /// [`Error::Cut`].
    pub fn check_whole(&self) -> Result<()> {
        self.spans.check_whole()
    }

    /// Keeps the pages of a subtree's blob, which the caller made, from being freed.
    pub(crate) fn link(&self, name: &str, start: Pfn, end: Pfn) {
        lock(&self.handover).linked.push((name.into(), start, end));
    }

    /// Undoes [`Arena::link`].
    pub(crate) fn unlink(&self, name: &str) {
        lock(&self.handover).linked.retain(|(linked, ..)| linked != name);
    }

    /// A page of physical memory as items, to be written where they lie.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] unless it is in RAM.
    pub(crate) fn page_items<T: IntoBytes>(&self, phys: Phys) -> Result<Items<'_, T>> {
        let len = self.page().bytes();
        self.spans.items(phys, len).ok_or(Error::OutsideMemory { what: "page", phys: phys.0, len })
    }

    /// Registers the tracker whose folios must not be freed. One at a time, as the kernel has one `kho_out`.
    pub(crate) fn attach(&self, tracker: &Arc<Mutex<Tracker>>) -> Result<()> {
        let mut handover = lock(&self.handover);
        if handover.preserved.strong_count() > 0 {
            return Err(Error::Invalid {
                what: "Outgoing",
                why: "this arena is being handed over already: drop or take over the other handover first".into(),
            });
        }
        handover.preserved = Arc::downgrade(tracker);
        Ok(())
    }

    /// A new owner takes over: what was preserved and is not restored stays reserved, the rest becomes free at the first
    /// request that needs to know. Returns the new generation; `None`, and nothing has changed, while a view can write one
    /// of the bitmaps that the claims would read in place.
    pub(crate) fn take_over(&self, claims: &Arc<Claims>) -> Option<u64> {
        let mut handover = lock(&self.handover);
        let mut pages = self.pages.lock();
        if !pages.take_over(claims, Weak::clone(&handover.preserved)) {
            return None;
        }
        let generation = self.generation.fetch_add(1, Ordering::Release) + 1;
        handover.preserved = Weak::new();
        // Its blocks are of an earlier generation, so that dropping them asks for no lock.
        handover.kept = None;
        handover.linked.clear();
        pages.span_maps();
        Some(generation)
    }

    /// Holds on to what a finalized handover preserves, until it is taken over.
    pub(crate) fn keep(&self, tracker: Arc<Mutex<Tracker>>) {
        lock(&self.handover).kept = Some(tracker);
    }

    /// The pages, if the arena still has the owner of that generation.
    fn owned_by(&self, what: &'static str, generation: u64) -> Result<parking_lot::MutexGuard<'_, Pages>> {
        let pages = self.pages.lock();
        self.check_generation(what, generation)?;
        Ok(pages)
    }

    /// A restored folio becomes an allocated one.
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Owned`] if a bitmap lies in it that is read where it is.
    pub(crate) fn adopt(&self, generation: u64, pfn: Pfn, order: Order) -> Result<()> {
        // Not by `owned_by`, whose result takes more instructions than what is done here.
        let mut pages = self.pages.lock();
        if self.generation() != generation {
            return Err(Error::Stale { what: "restore_folio" });
        }
        pages.adopt(pfn, order)
    }

    /// Restored folios become allocated ones as they are marked by `restore`, which is told which pages they must not be in.
    ///
    /// # Errors
    /// [`Error::Stale`], and what `restore` returns.
    pub(crate) fn adopt_many<T>(
        &self,
        generation: u64,
        restore: impl FnOnce(&mut Tracker, &[(Pfn, Pfn)]) -> Result<T>,
    ) -> Result<T> {
        let mut pages = self.owned_by("restore_many", generation)?;
        let in_place = pages.inherited_pages();
        restore(&mut pages.allocated, &in_place)
    }

    /// Frees pages that the library allocated for itself.
    pub(crate) fn put_own(&self, own: impl IntoIterator<Item = Pfn>) {
        if let Ok(mut pages) = self.settled() {
            for pfn in own {
                // Allocated by the caller and not shared, so that freeing it cannot fail.
                if let Ok(order) = pages.allocated_at(pfn) {
                    pages.disown(pfn, order);
                }
                let _ = pages.put(pfn);
            }
        }
    }

    /// Allocates one particular page for the library itself.
    ///
    /// # Errors
    /// As [`Arena::alloc_at`].
    pub(crate) fn alloc_own_at(&self, pfn: Pfn, owner: Owner) -> Result<Pfn> {
        let mut pages = self.settled()?;
        let pfn = self.take(&mut pages, Some(pfn), Order::ZERO, None, false)?;
        pages.own(pfn, Order::ZERO, owner)?;
        Ok(pfn)
    }

    /// Refuses a range of pages that cannot be preserved.
    ///
    /// # Errors
    /// As [`Arena::check_allocated`]; [`Error::Owned`] for chunks and nodes of the map itself, which come and go with it.
    pub(crate) fn check_preservable(&self, start: Pfn, end: Pfn) -> Result<()> {
        let pages = self.settled()?;
        pages.check_allocated(start, end)?;
        pages.check_no_node("preserve", start, end)
    }

    /// Refuses folios that are not allocated as a whole.
    ///
    /// # Errors
    /// As [`Arena::check_allocated`], for the first in the list.
    pub(crate) fn check_all_allocated(&self, folios: impl Iterator<Item = Result<(Pfn, Order)>>) -> Result<()> {
        self.settled()?.check_all_allocated(folios)
    }

    /// Restored pages become allocated ones, each on its own.
    ///
    /// # Errors
    /// As [`Arena::adopt`].
    pub(crate) fn adopt_pages(&self, generation: u64, pfn: Pfn, nr_pages: u64) -> Result<()> {
        self.owned_by("restore_pages", generation)?.adopt_pages(pfn, nr_pages)
    }

    /// A lease of pages that their owner restored, if they are still allocated.
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::PageState`].
    pub fn lease_restored(&self, generation: u64, start: Pfn, end: Pfn) -> Result<Lease> {
        let pages = self.owned_by("restore", generation)?;
        pages.check_allocated(start, end)?;
        Ok(pages.lease(start, end, generation))
    }
}

impl PhysMemory for Arena {
    fn ranges(&self) -> &[PhysRange] {
        self.spans.ranges()
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        self.spans.read(phys, buf)
    }

    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>> {
        self.spans.next_data(phys)
    }

    fn next_to_search(&self, phys: Phys) -> Result<Option<PhysRange>> {
        self.spans.next_to_search(phys)
    }
}

/// The page ranges that cannot be allocated, ascending: page 0 (an address of 0 means "none" in every KHO structure), and
/// scratch.
fn reserved(config: &ArenaConfig) -> Vec<(Pfn, Pfn)> {
    let page = config.page;
    let mut ranges = vec![(Pfn(0), Pfn(1))];
    for area in &config.scratch {
        let last = area.addr + area.size.max(1) - 1;
        ranges.push((page.pfn(Phys(area.addr)), Pfn(page.pfn(Phys(last)).0 + 1)));
    }
    ranges.sort_unstable();
    ranges
}

/// The pages as they are before anything is allocated.
fn pages_of(config: &ArenaConfig) -> Result<Pages> {
    Pages::new(config.page, config.max_order, &config.regions, &reserved(config))
}

/// Where the scratch array goes: the last page of the first area, as kexec puts it into scratch.
fn scratch_array_phys(config: &ArenaConfig) -> u64 {
    let page = config.page.bytes();
    config.scratch.first().map_or(0, |low| (low.addr + (low.size - 1)) / page * page)
}
