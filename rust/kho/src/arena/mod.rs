//! Physical memory one can write: regions of RAM at chosen addresses, a page allocator, scratch.

mod blocks;
mod header;
mod pages;
mod scratch;
mod spans;

pub use blocks::{ArenaBlocks, Inherited};
pub use header::{ArenaNote, NOTE_NAME, NOTE_TYPE, Recorded};
pub use pages::PageKind;
pub(crate) use scratch::ranges_of;
pub use scratch::{ScratchArea, check_no_overlap, nodes, place};

use crate::claims::Claims;
use crate::error::{Error, Result};
use crate::mapping::Items;
use crate::memory::{PhysMemory, PhysRange};
use crate::tracker::Tracker;
use crate::units::{Order, PageSize, Pfn, Phys};
use pages::Pages;
use spans::Spans;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use zerocopy::IntoBytes;

/// RAM: `len` bytes from `start` on a NUMA node. Page-aligned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    pub start: Phys,
    pub len: u64,
    pub node: u32,
}

impl Region {
    /// The address of its last byte.
    pub const fn last(&self) -> u64 {
        self.start.0 + (self.len - 1)
    }
}

/// Where an arena's bytes live.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Private memory of this process.
    Anonymous,
    /// A sealed memory file that can be passed to another process.
    Memfd,
    /// A new file at this path.
    File(PathBuf),
}

/// What an arena is made of.
#[derive(Clone, Debug)]
pub struct ArenaConfig {
    pub page: PageSize,
    /// MAX_PAGE_ORDER: the largest order `alloc` gives without being asked for gigantic folios.
    pub max_order: Order,
    /// Sorted by address, disjoint.
    pub regions: Vec<Region>,
    pub scratch: Vec<ScratchArea>,
    pub backing: Backing,
}

/// What the kernel would say of a page (`struct page`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageState {
    pub kind: PageKind,
    pub refcount: u32,
    /// `page->private`: the KHO marker of an inherited folio's head, else 0.
    pub private: u64,
    pub node: u32,
}

/// Sparse, page-granular physical memory. Nothing is committed before it is touched.
#[derive(Debug)]
pub struct Arena {
    config: ArenaConfig,
    /// The page ranges nobody may allocate.
    reserved: Vec<(Pfn, Pfn)>,
    spans: Arc<Spans>,
    scratch_phys: u64,
    pages: Mutex<Pages>,
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
        let pages = pages_of(&config)?;
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
            spans.write(Phys(scratch_phys), &array)?;
        }
        Ok(Arc::new(Arena {
            reserved: reserved(&config),
            config,
            spans: Arc::new(spans),
            scratch_phys,
            pages: Mutex::new(pages),
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
        let pages = pages_of(&config)?;
        let handover = Handover { recorded: note.handover, ..Handover::default() };
        Ok(Arc::new(Arena {
            reserved: reserved(&config),
            config,
            spans: Arc::new(spans),
            scratch_phys: note.scratch_phys,
            pages: Mutex::new(pages),
            generation: AtomicU64::new(0),
            handover: Mutex::new(handover),
        }))
    }

    pub fn config(&self) -> &ArenaConfig {
        &self.config
    }

    pub fn page(&self) -> PageSize {
        self.config.page
    }

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
    fn settled(&self) -> Result<MutexGuard<'_, Pages>> {
        let mut pages = lock(&self.pages);
        pages.settle(&self.reserved)?;
        Ok(pages)
    }

    /// The same for who only looks: without memory for the books nothing counts as free.
    fn looked_at(&self) -> MutexGuard<'_, Pages> {
        let mut pages = lock(&self.pages);
        let _ = pages.settle(&self.reserved);
        pages
    }

    /// Allocates `1 << order` contiguous pages, on `node` if one is given; orders beyond MAX_PAGE_ORDER only when
    /// `gigantic`. The bytes are what the last owner left, zeros at first.
    ///
    /// # Errors
    /// [`Error::NoMemory`]; [`Error::OrderTooLarge`].
    pub fn alloc(&self, order: Order, node: Option<u32>, gigantic: bool) -> Result<Pfn> {
        self.settled()?.alloc(order, node, gigantic)
    }

    /// Allocates many single pages, or none.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(crate) fn alloc_pages(&self, n: u64) -> Result<Vec<Pfn>> {
        let mut pages = self.settled()?;
        let mut all = Vec::new();
        for _ in 0..n {
            match pages.alloc(Order::ZERO, None, false) {
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
        self.settled()?.alloc_at(pfn, order)
    }

    /// Allocates pages for `len` bytes, zeroed.
    pub(crate) fn alloc_bytes(&self, len: u64, at: Option<Pfn>) -> Result<(Pfn, Order)> {
        let pages = len.div_ceil(self.page().bytes()).max(1);
        let order = Order::new(pages.next_power_of_two().ilog2().into())?;
        let pfn = match at {
            Some(pfn) => self.alloc_at(pfn, order)?,
            None => self.alloc(order, None, false)?,
        };
        self.spans.zero(self.page().phys(pfn), self.page().folio_bytes(order))?;
        Ok((pfn, order))
    }

    /// Takes a reference on the folio whose head is `pfn`; returns the new count.
    ///
    /// # Errors
    /// [`Error::PageState`] unless `pfn` is the head of an allocated folio.
    pub fn get(&self, pfn: Pfn) -> Result<u32> {
        self.settled()?.get(pfn)
    }

    /// Drops a reference; the last one frees the folio (then `true`).
    ///
    /// # Errors
    /// [`Error::PageState`] unless `pfn` is the head of an allocated folio, or while the folio is preserved.
    pub fn put(&self, pfn: Pfn) -> Result<bool> {
        let preserved = lock(&self.handover).preserved.upgrade();
        let tracker = preserved.as_ref().map(|t| lock(t));
        let mut pages = self.settled()?;
        let order = pages.allocated_at(pfn)?;
        if let Some(tracker) = tracker
            && tracker.overlapping(pfn, Pfn(pfn.0 + order.nr_pages())).is_some()
            && pages.refcount(pfn) == 1
        {
            let phys = self.page().phys(pfn).0;
            return Err(Error::PageState { phys, state: "preserved", wanted: "free to go (unpreserve it first)" });
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
        lock(&self.pages).nbytes()
    }

    /// How often the arena was taken over in this process.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Refuses work on behalf of an earlier owner.
    pub fn check_generation(&self, what: &'static str, generation: u64) -> Result<()> {
        if self.generation() == generation { Ok(()) } else { Err(Error::Stale { what }) }
    }

    /// Where `len` bytes at `phys` are in this process: for views, which must keep the arena alive.
    pub fn ptr(&self, phys: Phys, len: u64) -> Option<NonNull<u8>> {
        self.spans.ptr(phys, len)
    }

    /// Writes physical memory.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] unless all of it is in one run of RAM.
    pub fn write(&self, phys: Phys, bytes: &[u8]) -> Result<()> {
        self.spans.write(phys, bytes)
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

    /// A new owner takes over: what was preserved and is not restored stays reserved, the rest is free, once somebody
    /// asks for it.
    pub(crate) fn take_over(&self, claims: &Arc<Claims>) {
        let mut handover = lock(&self.handover);
        let mut pages = lock(&self.pages);
        pages.take_over(claims);
        self.generation.fetch_add(1, Ordering::Release);
        drop(pages);
        handover.preserved = Weak::new();
        handover.kept = None;
    }

    /// Holds on to what a finalized handover preserves, until it is taken over.
    pub(crate) fn keep(&self, tracker: Arc<Mutex<Tracker>>) {
        lock(&self.handover).kept = Some(tracker);
    }

    /// A restored folio becomes an allocated one.
    pub(crate) fn adopt(&self, pfn: Pfn, order: Order) -> Result<()> {
        lock(&self.pages).adopt(pfn, order)
    }

    /// Restored folios become allocated ones as they are marked by `restore`.
    pub(crate) fn adopt_many<T>(&self, restore: impl FnOnce(&mut Tracker) -> Result<T>) -> Result<T> {
        restore(&mut lock(&self.pages).allocated)
    }

    /// Frees pages that were allocated for oneself and that nobody preserves.
    pub(crate) fn put_own(&self, own: impl IntoIterator<Item = Pfn>) {
        if let Ok(mut pages) = self.settled() {
            for pfn in own {
                // Allocated by the caller and known to nobody else, so that nothing can refuse it.
                let _ = pages.put(pfn);
            }
        }
    }

    /// Refuses folios that are not allocated as a whole.
    ///
    /// # Errors
    /// As [`Arena::check_allocated`], for the first in the list.
    pub(crate) fn check_all_allocated(&self, folios: impl Iterator<Item = Result<(Pfn, Order)>>) -> Result<()> {
        self.settled()?.check_all_allocated(folios)
    }

    /// Restored pages become allocated ones, each on its own.
    pub(crate) fn adopt_pages(&self, pfn: Pfn, nr_pages: u64) -> Result<()> {
        lock(&self.pages).adopt_pages(pfn, nr_pages)
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

/// The page ranges nobody may allocate, ascending: page 0 (an address of 0 means "none" in every KHO structure), and scratch.
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

fn pages_of(config: &ArenaConfig) -> Result<Pages> {
    Pages::new(config.page, config.max_order, &config.regions, &reserved(config))
}

/// Where the scratch array goes: the last page of the first area, as kexec puts it into scratch.
fn scratch_array_phys(config: &ArenaConfig) -> u64 {
    let page = config.page.bytes();
    config.scratch.first().map_or(0, |low| (low.addr + (low.size - 1)) / page * page)
}

/// Regions that can be an arena's: some, page-aligned, not empty, sorted, disjoint, inside the address space.
fn check_regions(regions: &[Region], page: PageSize) -> Result<()> {
    let invalid = |why: String| Err(Error::Invalid { what: "regions", why });
    if regions.is_empty() {
        return invalid("an arena needs memory".into());
    }
    let mut free_from = Some(0);
    for r in regions {
        page.pfn_exact("region start", r.start)?;
        page.pfn_exact("region size", Phys(r.len))?;
        if r.len == 0 {
            return invalid(format!("the region at {} is empty", r.start));
        }
        let Some(last) = r.start.0.checked_add(r.len - 1) else {
            return Err(Error::OutOfRange { what: "region end", value: r.start.0, limit: u64::MAX });
        };
        if free_from.is_none_or(|from| r.start.0 < from) {
            return invalid(format!("the region at {} overlaps the one before it", r.start));
        }
        free_from = last.checked_add(1);
    }
    Ok(())
}

/// Scratch areas that can be an arena's: in its memory, disjoint.
fn check_areas(regions: &[Region], areas: &[ScratchArea]) -> Result<()> {
    let invalid = |why: String| Err(Error::Invalid { what: "scratch", why });
    for (i, area) in areas.iter().enumerate() {
        let inside =
            regions.iter().any(|r| PhysRange { start: r.start, len: r.len }.contains(Phys(area.addr), area.size));
        if !inside || area.size == 0 {
            return invalid(format!("{:#x} (+{:#x}) is not in one region of RAM", area.addr, area.size));
        }
        if areas[..i].iter().any(|other| other.overlaps(area.addr, area.size)) {
            return invalid(format!("the area at {:#x} overlaps another", area.addr));
        }
    }
    Ok(())
}
