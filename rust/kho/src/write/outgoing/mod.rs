//! Handing over (`kho_out`): preserved folios and subtrees of an arena, written as a kernel writes them.

#![forbid(unsafe_code)]

mod form;
mod live_tree;

pub use form::{OutSubtree, RootForm};

use crate::abi::layout::BitmapSize;
use crate::abi::{Abi, MapFormat, SubtreeOrder, chunk, detect};
use crate::error::{Error, Result};
use crate::memory::PhysMemory;
use crate::tracker::{Orders, Tracker};
use crate::units::{Order, PageSize, Pfn, Phys, aligned_blocks, cut_at};
use crate::write::arena::{Arena, ArenaBlocks, Owner, Recorded, check_no_overlap};
use form::{Map, lock};
use std::ops::Deref;
use std::sync::{Arc, Mutex};

/// Where the caller wants things, to write an image again address for address; `None` leaves it to the allocator.
#[derive(Clone, Copy, Debug, Default)]
pub struct Placement {
    /// The root FDT.
    pub fdt: Option<Phys>,
    /// The first node of the map.
    pub map: Option<Phys>,
}

/// How a handover is written where its ABI leaves that open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// Bytes of a bitmap; `None` for the newest size.
    pub bitmap_bytes: Option<u64>,
    /// How the root FDT is made.
    pub root: RootForm,
    /// Where things go.
    pub place: Placement,
}

/// A handover in the making: a tracker over an arena, and subtrees. One at a time per arena.
#[derive(Debug)]
pub struct Outgoing {
    arena: Arc<Arena>,
    generation: u64,
    abi: &'static Abi,
    tracker: Arc<Mutex<Tracker>>,
    fdt: Pfn,
    map: Map,
    subtrees: Vec<OutSubtree>,
    /// The root FDT where it is edited, and so always in force.
    root: Option<Vec<u8>>,
    finalized: bool,
}

/// Frees a page that was just allocated.
fn free(arena: &Arena, page: Option<Pfn>) {
    if let Some(pfn) = page {
        arena.put_own([pfn]);
    }
}

impl Outgoing {
    /// Begins a handover. The FDT's page is allocated and preserved at once.
    ///
    /// # Errors
    /// [`Error::UnsupportedAbi`]; [`Error::BitmapBytes`]; [`Error::NoMemory`]; [`Error::PageState`] for a placement
    /// that is in use; [`Error::Invalid`] while another `Outgoing` of the arena lives, for a bitmap size where the ABI
    /// has none.
    pub fn new(arena: &Arc<Arena>, abi: &str, bitmap_bytes: Option<u64>, place: Placement) -> Result<Self> {
        Self::styled(arena, abi, Style { bitmap_bytes, place, root: RootForm::OfAbi })
    }

    /// The same in the style of one of the kernels that write the ABI.
    ///
    /// # Errors
    /// As [`Outgoing::new`].
    pub fn styled(arena: &Arc<Arena>, abi: &str, style: Style) -> Result<Self> {
        let Style { bitmap_bytes, root, place } = style;
        let page = arena.page();
        let abi = Abi::named(abi).filter(|abi| abi.decoded).ok_or_else(|| Error::UnsupportedAbi {
            phys: 0,
            compatible: abi.into(),
            known: Abi::decoded(),
        })?;
        if abi.map != MapFormat::Chunks && bitmap_bytes.is_some() {
            return Err(Error::Invalid { what: "bitmap_bytes", why: detect::no_bitmap_size(abi) });
        }
        let bitmap = BitmapSize::new(bitmap_bytes.unwrap_or(page.bytes()), page)?;
        let source = Arc::new(ArenaBlocks::new(arena));
        let tracker = Arc::new(Mutex::new(Tracker::with_source(chunk::geometry(page, bitmap)?, source)));
        let at = |phys: Option<Phys>| phys.map(|phys| page.pfn_exact("placement", phys)).transpose();
        let (fdt_at, map_at) = (at(place.fdt)?, at(place.map)?);
        // The FDT first if it has a place: the map must not go there.
        let fdt = fdt_at.map(|at| arena.alloc_bytes(page.bytes(), Some(at), Owner::Fdt)).transpose()?;
        let placed = fdt.map(|(fdt, _)| fdt);
        let mut map = Map::new(arena, abi, map_at).inspect_err(|_| free(arena, placed))?;
        let fdt = match placed.map_or_else(|| arena.alloc_bytes(page.bytes(), None, Owner::Fdt).map(|(fdt, _)| fdt), Ok)
        {
            Ok(fdt) => fdt,
            Err(e) => {
                map.free(arena);
                return Err(e);
            }
        };
        let mut out = Outgoing {
            generation: arena.generation(),
            arena: Arc::clone(arena),
            abi,
            tracker,
            fdt,
            map,
            subtrees: Vec::new(),
            root: None,
            finalized: false,
        };
        arena.attach(&out.tracker)?;
        out.preserve_folio(fdt, Order::ZERO)?;
        if abi.live || root == RootForm::Edited {
            let root = form::write_root(out.fdt_capacity(), abi, out.map.phys(arena), &[])?;
            out.edit_root(Some(root))?;
        }
        Ok(out)
    }

    /// The arena that is handed over.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// The ABI version that is written.
    pub fn abi(&self) -> &'static Abi {
        self.abi
    }

    /// The physical address of the root FDT.
    pub fn fdt_phys(&self) -> Phys {
        self.page().phys(self.fdt)
    }

    /// The subtrees, in the order in which they were added.
    pub fn subtrees(&self) -> &[OutSubtree] {
        &self.subtrees
    }

    /// Where the node of a new subtree goes in the root FDT.
    pub fn subtree_order(&self) -> SubtreeOrder {
        match self.root {
            Some(_) => SubtreeOrder::Prepend,
            None => self.abi.subtree_order,
        }
    }

    /// Whether changes are refused until [`Outgoing::abort`].
    pub fn is_finalized(&self) -> bool {
        self.finalized
    }

    /// What is preserved, the FDT and the subtrees included.
    pub fn tracker(&self) -> impl Deref<Target = Tracker> + '_ {
        lock(&self.tracker)
    }

    /// The size of the bitmaps in bytes; `None` in an ABI that has but one.
    pub fn bitmap_bytes(&self) -> Option<u64> {
        (self.abi.map == MapFormat::Chunks).then(|| self.tracker().geometry().block_bytes())
    }

    fn page(&self) -> PageSize {
        self.arena.page()
    }

    fn fdt_capacity(&self) -> usize {
        usize::try_from(self.page().bytes()).unwrap_or(0)
    }

    /// Refuses to go on once the arena has another owner, whose the tracker's bitmaps are then, or has lost its file.
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Cut`].
    fn check_current(&self, what: &'static str) -> Result<()> {
        self.arena.check_generation(what, self.generation)?;
        self.arena.check_whole()
    }

    fn check_open(&self, what: &'static str) -> Result<()> {
        self.check_current(what)?;
        if self.finalized { Err(Error::Finalized { what }) } else { Ok(()) }
    }

    /// Refuses memory that cannot be preserved: in scratch, or not allocated (nothing would keep the allocator from
    /// giving it to another owner, the map itself included).
    fn check_range(&self, what: &'static str, start: Pfn, end: Pfn) -> Result<()> {
        let phys = self.page().phys(start);
        let len = (end.0 - start.0) << self.page().shift();
        check_no_overlap(self.arena.scratch(), what, phys, len)?;
        self.arena.check_preservable(start, end)
    }

    /// Preserves a folio (`kho_preserve_folio`); `true` if it was not preserved before.
    ///
    /// # Errors
    /// [`Error::ScratchOverlap`]; [`Error::PageState`] unless it is allocated; [`Error::OutsideMemory`];
    /// [`Error::Misaligned`]; [`Error::Finalized`]; [`Error::NoMemory`] for the bitmap.
    pub fn preserve_folio(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        self.check_open("preserve_folio")?;
        self.page().check_folio(pfn, order)?;
        let end = self.page().end_of(pfn, order.nr_pages())?;
        // Locked before the check, as in `Arena::put`: no other thread frees the pages between the check and the mark.
        let tracker = &mut *lock(&self.tracker);
        self.check_range("folio", pfn, end)?;
        self.map.prepare(tracker, [(pfn, order)].into_iter())?;
        let new = tracker.preserve(pfn, order)?;
        self.map.settle(tracker)?;
        Ok(new)
    }

    /// Takes a folio back (`kho_unpreserve_folio`); `true` if it was preserved.
    ///
    /// # Errors
    /// [`Error::Misaligned`], [`Error::Finalized`]; [`Error::Invalid`] for the FDT's own page.
    pub fn unpreserve_folio(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        self.check_open("unpreserve_folio")?;
        self.page().check_folio(pfn, order)?;
        // A folio of another order has another owner, wherever it lies.
        if self.own().any(|own| own == (pfn, order)) {
            return Err(self.is_own("unpreserve_folio", pfn));
        }
        let tracker = &mut *lock(&self.tracker);
        let gone = tracker.unpreserve(pfn, order)?;
        self.map.settle(tracker)?;
        Ok(gone)
    }

    /// Preserves a page range as the kernel splits it (`kho_preserve_pages`), all or nothing; the number of folios
    /// that were not preserved before.
    ///
    /// # Errors
    /// As [`Outgoing::preserve_folio`].
    pub fn preserve_pages(&mut self, pfn: Pfn, nr_pages: u64) -> Result<u64> {
        self.check_open("preserve_pages")?;
        let end = self.page().end_of(pfn, nr_pages)?;
        let cuts = self.cuts();
        let tracker = &mut *lock(&self.tracker);
        if nr_pages > 0 {
            self.check_range("page range", pfn, end)?;
        }
        self.map.prepare(tracker, cut_at(pfn, end, &cuts).flat_map(|(start, end)| aligned_blocks(start, end)))?;
        let mut new = 0;
        // Every block is there by now, so that no piece can fail.
        for (start, end) in cut_at(pfn, end, &cuts) {
            new += tracker.preserve_pages(start, end.0 - start.0)?;
        }
        self.map.settle(tracker)?;
        Ok(new)
    }

    /// Preserves `count` consecutive folios of one order, all or none; how many were not preserved before.
    ///
    /// # Errors
    /// As [`Outgoing::preserve_folio`].
    pub fn preserve_run(&mut self, pfn: Pfn, order: Order, count: u64) -> Result<u64> {
        self.check_open("preserve_run")?;
        self.page().check_folio(pfn, order)?;
        let end = self.page().end_of(pfn, count.saturating_mul(order.nr_pages()))?;
        let tracker = &mut *lock(&self.tracker);
        if count > 0 {
            self.check_range("run of folios", pfn, end)?;
        }
        self.map.prepare_run(tracker, order, pfn.0 >> order.get(), count)?;
        let new = tracker.preserve_run(pfn, order, count)?;
        self.map.settle(tracker)?;
        Ok(new)
    }

    /// Preserves many folios, all or none; how many were not preserved before.
    ///
    /// # Errors
    /// As [`Outgoing::preserve_folio`], for the first in the list; [`Error::Invalid`] if there are not as many orders as
    /// pfns.
    pub fn preserve_many(&mut self, pfns: &[u64], orders: Orders<'_>) -> Result<u64> {
        self.check_open("preserve_many")?;
        if let Orders::Each(orders) = orders
            && orders.len() != pfns.len()
        {
            let why = format!("{} orders for {} folios", orders.len(), pfns.len());
            return Err(Error::Invalid { what: "preserve_many", why });
        }
        let order_of = |n: usize| match orders {
            Orders::One(order) => Ok(order),
            Orders::Each(orders) => Order::new(orders.get(n).copied().unwrap_or(u8::MAX).into()),
        };
        let page = self.page();
        let checked = pfns.iter().enumerate().map(|(n, &pfn)| {
            let (pfn, order) = (Pfn(pfn), order_of(n)?);
            page.check_folio(pfn, order)?;
            check_no_overlap(self.arena.scratch(), "folio", page.phys(pfn), page.folio_bytes(order))?;
            Ok((pfn, order))
        });
        let tracker = &mut *lock(&self.tracker);
        self.arena.check_all_allocated(checked)?;
        let folios = pfns.iter().enumerate().map(|(n, &pfn)| (Pfn(pfn), order_of(n).unwrap_or(Order::ZERO)));
        self.map.prepare(tracker, folios)?;
        let new = tracker.preserve_many(pfns, orders)?;
        self.map.settle(tracker)?;
        Ok(new)
    }

    /// Where page ranges are cut before they are split.
    fn cuts(&self) -> Vec<Pfn> {
        if self.abi.cuts_at_nodes { self.arena.node_cuts() } else { Vec::new() }
    }

    /// Takes a page range back, split the same way; the number of folios that were preserved.
    ///
    /// # Errors
    /// As [`Outgoing::unpreserve_folio`].
    pub fn unpreserve_pages(&mut self, pfn: Pfn, nr_pages: u64) -> Result<u64> {
        self.check_open("unpreserve_pages")?;
        let end = self.page().end_of(pfn, nr_pages)?;
        self.check_not_own("unpreserve_pages", pfn, end)?;
        let cuts = self.cuts();
        let tracker = &mut *lock(&self.tracker);
        let mut gone = 0;
        for (start, end) in cut_at(pfn, end, &cuts) {
            gone += tracker.unpreserve_pages(start, end.0 - start.0)?;
        }
        self.map.settle(tracker)?;
        Ok(gone)
    }

    /// Preserves everything another tracker of the same page size holds, empty bitmaps included when the bitmaps are of
    /// the same size; the number of folios that were not preserved before.
    ///
    /// # Errors
    /// As [`Outgoing::preserve_folio`]; nothing has changed then.
    pub fn preserve_all(&mut self, other: &Tracker) -> Result<u64> {
        self.check_open("preserve_all")?;
        if other.geometry().page() != self.page() {
            return Err(Error::Invalid { what: "preserve_all", why: "the tracker has another page size".into() });
        }
        let tracker = &mut *lock(&self.tracker);
        for (start, end) in other.extents() {
            self.check_range("folio", start, end)?;
        }
        self.map.prepare_all(tracker, other)?;
        let new = tracker.union_with(other)?;
        self.map.settle(tracker)?;
        Ok(new)
    }

    /// The FDT and the subtrees' blobs stay preserved: without them there is no handover.
    fn own(&self) -> impl Iterator<Item = (Pfn, Order)> + '_ {
        self.subtrees.iter().filter_map(|s| s.folio).chain([(self.fdt, Order::ZERO)])
    }

    fn is_own(&self, what: &'static str, pfn: Pfn) -> Error {
        Error::Invalid { what, why: format!("{} holds the FDT or a subtree of this handover", self.page().phys(pfn)) }
    }

    fn check_not_own(&self, what: &'static str, start: Pfn, end: Pfn) -> Result<()> {
        match self.own().find(|(pfn, order)| *pfn < end && start.0 < pfn.0 + order.nr_pages()) {
            Some((pfn, _)) => Err(self.is_own(what, pfn)),
            None => Ok(()),
        }
    }

    /// Adds a subtree (`kho_add_subtree`): copies `blob` into pages of its own and preserves them. Returns its address.
    ///
    /// # Errors
    /// [`Error::Exists`]; [`Error::Fdt`] for a name that no node can have, or when the FDT's page is full;
    /// [`Error::NoMemory`]; [`Error::Finalized`].
    pub fn add_subtree(&mut self, name: &str, blob: &[u8], at: Option<Phys>) -> Result<Phys> {
        let at = at.map(|phys| self.page().pfn_exact("subtree address", phys)).transpose()?;
        self.check_new("add_subtree", name)?;
        let (pfn, order) = self.arena.alloc_bytes(blob.len() as u64, at, Owner::Subtree)?;
        let phys = self.page().phys(pfn);
        let subtree = OutSubtree { name: name.into(), phys, size: blob.len() as u64, folio: Some((pfn, order)) };
        let added = self.arena.write_own(phys, blob).and_then(|()| self.root_with(&subtree)).and_then(|root| {
            self.preserve_folio(pfn, order)?;
            self.link(subtree, root)
        });
        if let Err(e) = added {
            lock(&self.tracker).unpreserve(pfn, order)?;
            self.arena.put_owned(pfn)?;
            return Err(e);
        }
        Ok(phys)
    }

    /// The root FDT with a subtree more, if it is kept up to date; one that is written later must have room for it, too.
    fn root_with(&self, subtree: &OutSubtree) -> Result<Option<Vec<u8>>> {
        if let Some(root) = &self.root {
            return form::add_to_root(root, self.fdt_capacity(), self.abi, subtree).map(Some);
        }
        let all = self.subtrees.iter().chain([subtree]);
        form::write_root(self.fdt_capacity(), self.abi, Phys(1), all).map(|_| None)
    }

    fn link(&mut self, subtree: OutSubtree, root: Option<Vec<u8>>) -> Result<()> {
        self.edit_root(root)?;
        self.subtrees.push(subtree);
        Ok(())
    }

    /// Adds a subtree whose blob of `size` bytes lies at `phys` already. Preserving it is the caller's business, as it
    /// is in the kernel.
    ///
    /// # Errors
    /// As [`Outgoing::add_subtree`]; [`Error::OutsideMemory`]; [`Error::ScratchOverlap`].
    pub fn link_subtree(&mut self, name: &str, phys: Phys, size: u64) -> Result<()> {
        self.check_new("link_subtree", name)?;
        if !self.arena.contains(phys, size.max(1)) {
            return Err(Error::OutsideMemory { what: "subtree", phys: phys.0, len: size });
        }
        check_no_overlap(self.arena.scratch(), "subtree", phys, size.max(1))?;
        let (page, last) = (self.page(), Phys(phys.0 + (size.max(1) - 1)));
        let subtree = OutSubtree { name: name.into(), phys, size, folio: None };
        let root = self.root_with(&subtree)?;
        self.link(subtree, root)?;
        self.arena.link(name, page.pfn(phys), Pfn(page.pfn(last).0 + 1));
        Ok(())
    }

    /// Writes another blob, no longer than the pages made for it, in the place of a subtree's that [`Outgoing::add_subtree`]
    /// copied. Its size in the FDT stays.
    ///
    /// # Errors
    /// [`Error::NoSubtree`]; [`Error::Finalized`]; [`Error::Invalid`] for a blob of another size, or one that was linked.
    pub fn rewrite_subtree(&mut self, name: &str, blob: &[u8]) -> Result<()> {
        self.check_open("rewrite_subtree")?;
        let subtree = self.subtrees.iter().find(|s| s.name == name);
        let subtree = subtree.ok_or_else(|| Error::NoSubtree { name: name.into() })?;
        if subtree.folio.is_none() || subtree.size != blob.len() as u64 {
            let why = format!("the blob of {name:?} is {:#x} bytes of this handover's own", subtree.size);
            return Err(Error::Invalid { what: "rewrite_subtree", why });
        }
        self.arena.write_own(subtree.phys, blob)
    }

    fn check_new(&self, what: &'static str, name: &str) -> Result<()> {
        self.check_open(what)?;
        match self.subtrees.iter().any(|s| s.name == name) {
            true => Err(Error::Exists { name: name.into() }),
            false => Ok(()),
        }
    }

    /// Removes a subtree (`kho_remove_subtree`); the pages made for its blob are freed.
    ///
    /// # Errors
    /// [`Error::NoSubtree`]; [`Error::Finalized`]; [`Error::PageState`] while something else in these pages is preserved,
    /// and then nothing has changed.
    pub fn remove_subtree(&mut self, name: &str) -> Result<()> {
        self.check_open("remove_subtree")?;
        let at = self.subtrees.iter().position(|s| s.name == name);
        let at = at.ok_or_else(|| Error::NoSubtree { name: name.into() })?;
        let root = self.root.as_ref().map(|root| form::remove_from_root(root, self.fdt_capacity(), name));
        let root = root.transpose()?;
        let subtree = self.subtrees.remove(at);
        if let Err(error) = self.free(&subtree) {
            self.subtrees.insert(at, subtree);
            return Err(error);
        }
        self.arena.unlink(name);
        self.edit_root(root)
    }

    /// Frees the pages made for a subtree's blob, or leaves them as they are.
    fn free(&mut self, subtree: &OutSubtree) -> Result<()> {
        let Some((pfn, order)) = subtree.folio else { return Ok(()) };
        let end = self.page().phys(Pfn(pfn.0 + (order.nr_pages() - 1))).0 + (self.page().bytes() - 1);
        let inside = |other: &&mut OutSubtree| {
            other.folio.is_none() && other.phys.0 <= end && subtree.phys.0 <= other.phys.0 + (other.size.max(1) - 1)
        };
        if let Some(other) = self.subtrees.iter_mut().find(inside) {
            // A subtree that was linked to a part of the blob: its pages go with that one.
            other.folio = Some((pfn, order));
            return Ok(());
        }
        self.unpreserve_folio(pfn, order)?;
        let freed = self.arena.put_owned(pfn);
        if freed.is_err() {
            self.preserve_folio(pfn, order)?;
        }
        freed.map(drop)
    }

    /// The FDT's bytes, once map and FDT are in the arena. Where they always are, that is all. Else they are written:
    /// bitmaps stay where they are, the chunks of an earlier call are freed, and the FDT in memory is the last thing to
    /// change.
    ///
    /// # Errors
    /// [`Error::NoMemory`] for the chunks, [`Error::Stale`]; an earlier serialization is then still in place.
    pub fn serialize(&mut self) -> Result<Vec<u8>> {
        self.check_current("serialize")?;
        if let (true, Some(root)) = (self.abi.live || self.finalized, &self.root) {
            return Ok(root.clone());
        }
        if self.finalized {
            return self.fdt_bytes();
        }
        let old = self.map.write(&self.arena, &self.tracker)?;
        let fdt = self.fdt_bytes()?;
        self.write_fdt(&fdt)?;
        if self.root.is_some() {
            self.root = Some(fdt.clone());
        }
        self.map.free_old(&self.arena, old);
        Ok(fdt)
    }

    fn fdt_bytes(&self) -> Result<Vec<u8>> {
        let map = self.map.phys(&self.arena);
        match &self.root {
            Some(root) => form::with_map(root, self.fdt_capacity(), self.abi, map),
            None => form::write_root(self.fdt_capacity(), self.abi, map, &self.subtrees),
        }
    }

    /// Puts an edited root FDT in force, if there is one.
    fn edit_root(&mut self, root: Option<Vec<u8>>) -> Result<()> {
        if let Some(root) = root {
            self.write_fdt(&root)?;
            self.root = Some(root);
        }
        Ok(())
    }

    fn write_fdt(&self, bytes: &[u8]) -> Result<()> {
        let mut page = bytes.to_vec();
        page.resize(self.fdt_capacity(), 0);
        self.arena.write_own(self.fdt_phys(), &page)
    }

    /// Serializes and closes the handover: from here on changes are refused (EBUSY) until [`Outgoing::abort`].
    /// The FDT's address is recorded in the arena's file for the next owner.
    ///
    /// # Errors
    /// [`Error::Finalized`] the second time; as [`Outgoing::serialize`].
    pub fn finalize(&mut self) -> Result<Phys> {
        self.check_open("finalize")?;
        self.serialize()?;
        let bitmap_bytes = self.bitmap_bytes().and_then(|bytes| u32::try_from(bytes).ok()).unwrap_or(0);
        self.arena.record(Recorded { fdt_phys: self.fdt_phys().0, bitmap_bytes })?;
        self.finalized = true;
        Ok(self.fdt_phys())
    }

    /// Undoes [`Outgoing::finalize`]: changes are possible again, and what was written for it is freed.
    ///
    /// # Errors
    /// [`Error::NotFinalized`]; [`Error::Stale`].
    pub fn abort(&mut self) -> Result<()> {
        self.check_current("abort")?;
        if !self.finalized {
            return Err(Error::NotFinalized);
        }
        self.arena.record(Recorded::default())?;
        if !self.abi.live {
            let root = self.root.as_deref().map(|root| form::with_map(root, self.fdt_capacity(), self.abi, Phys(0)));
            match root.transpose()? {
                None => self.write_fdt(&[])?,
                root => self.edit_root(root)?,
            }
            self.map.take_back(&self.arena);
        }
        self.finalized = false;
        Ok(())
    }
}

impl Drop for Outgoing {
    /// A handover that was finalized stays in the arena for the next owner; any other is removed completely.
    fn drop(&mut self) {
        if self.arena.generation() != self.generation {
            return;
        }
        if self.finalized {
            return self.arena.keep(Arc::clone(&self.tracker));
        }
        // In its own arena nothing keeps the FDT from being wiped.
        let _ = self.write_fdt(&[]);
        self.map.free(&self.arena);
        lock(&self.tracker).clear();
        self.subtrees.iter().for_each(|subtree| self.arena.unlink(&subtree.name));
        let blobs = self.subtrees.drain(..).filter_map(|s| s.folio.map(|(pfn, _)| pfn));
        self.arena.put_own(blobs.chain([self.fdt]));
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tree_tests;
