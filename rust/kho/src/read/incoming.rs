//! Reading a handover (`kho_in`): validated and walked; each folio is restored once.

#![forbid(unsafe_code)]

use crate::abi::Abi;
use crate::abi::detect::{self, Certainty, Hints, Known, Place, Reading};
use crate::abi::layout::BitmapSize;
use crate::error::{Error, Result, RootProblem};
use crate::filter::{Absent, REMEDY, level_names};
use crate::memory::{FileMemory, Machine, PhysMemory, PhysRange};
use crate::payload::unlisted::{self, Unlisted};
use crate::read::arena_note::{ArenaNote, NOTE_NAME, NOTE_TYPE, Recorded};
use crate::read::find::{self, Found, Soundness};
use crate::read::others::{OtherRoot, RootState};
use crate::read::restore::{Claims, FromImage, Marker, Restore};
use crate::read::root::{self, Root, Subtree};
use crate::read::without_map;
use crate::scratch::ScratchArea;
use crate::tracker::Tracker;
use crate::units::{Order, PageSize, Pfn, Phys};
use std::sync::{Arc, OnceLock};

/// What the caller knows or requires; the rest is detected.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the FDT is; searched for otherwise. Where it is given, nothing of the memory is searched.
    pub fdt_phys: Option<u64>,
    /// The page size; detected otherwise.
    pub page_size: Option<PageSize>,
    /// Why `page_size` is known, for the explanation.
    pub page_why: Option<&'static str>,
    /// kho-v1: bytes of a bitmap; detected otherwise.
    pub bitmap_bytes: Option<u64>,
    /// Why `bitmap_bytes` is known, for the explanation.
    pub bitmap_why: Option<&'static str>,
    /// The scratch areas; read from `scratch_phys`, or else found by the search for the FDT.
    pub scratch: Option<Vec<ScratchArea>>,
    /// Where the array of these areas lies; it is read if `scratch` is not given.
    pub scratch_phys: Option<u64>,
    /// What an ELF core says it is of.
    pub machine: Option<Machine>,
    /// MAX_PAGE_ORDER of the next kernel, where Linux before 7.1 refuses to restore larger folios; none otherwise.
    pub max_page_order: Option<u32>,
}

impl Options {
    pub(crate) fn know_scratch(&mut self, areas: Vec<ScratchArea>, phys: u64) {
        if self.scratch.is_none() && self.scratch_phys.is_none() {
            self.scratch = Some(areas);
            self.scratch_phys = Some(phys).filter(|phys| *phys != 0);
        }
    }

    pub(crate) fn know_recorded(&mut self, handover: Recorded) {
        if handover.fdt_phys != 0 && self.fdt_phys.is_none_or(|phys| phys == handover.fdt_phys) {
            self.fdt_phys = Some(handover.fdt_phys);
            let said = Some(handover.bitmap_bytes.into()).filter(|bytes| *bytes != 0);
            if let (None, Some(_)) = (self.bitmap_bytes, said) {
                self.bitmap_bytes = said;
                self.bitmap_why = Some("the arena's");
            }
        }
    }

    /// What files say of themselves, where the caller said nothing: the note of an arena's file, the machine of an ELF
    /// core. A note that cannot be read says nothing.
    pub fn know_files(&mut self, files: &FileMemory) {
        self.machine = files.machine();
        let mut notes = files.notes().filter(|note| note.name == NOTE_NAME && note.kind == NOTE_TYPE);
        if let Some(Ok(note)) = notes.next().map(|note| ArenaNote::decode(note.desc)) {
            if self.page_size.is_none() {
                self.page_size = Some(note.page);
                self.page_why = Some("the arena's");
            }
            self.know_recorded(note.handover);
            self.know_scratch(note.scratch, note.scratch_phys);
        } else if files.machine() == Some(Machine::X86_64) && self.page_size.is_none() {
            self.page_size = Some(PageSize::Size4K);
            self.page_why = Some("x86_64 has no other");
        } else if self.page_size.is_none()
            && let Some(page) = files.page_size()
        {
            self.page_size = Some(page);
            self.page_why = Some("VMCOREINFO names it");
        }
    }
}

/// How the parts of a handover's format were decided.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The page size.
    pub page: PageSize,
    /// Why it is that page size.
    pub page_why: String,
    /// The bitmap size in bytes and why it is that; `None` from kho-v2 on.
    pub bitmap: Option<(u64, String)>,
    /// Of the bitmap size where there is one, else of the page size.
    pub certainty: Certainty,
}

/// The memory that a map and its reader take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapStats {
    /// Bitmaps, the empty ones too.
    pub blocks: u64,
    /// Bytes of the map itself: its chunks and bitmaps, or the nodes of its tree.
    pub map_bytes: u64,
    /// Bytes of those of its bitmaps that are used where they lie.
    pub in_place_bytes: u64,
    /// Bytes held in addition to the map: copies of bitmaps, directories, what was restored.
    pub held_bytes: u64,
}

/// Where the addresses of a memory are from.
#[derive(Clone, Debug)]
pub enum Address {
    /// The source says them itself, or it is no file.
    Own,
    /// A raw image, and they were named.
    Named,
    /// A raw image that was named without an address, read at 0.
    Assumed,
    /// A raw image that is read elsewhere.
    Solved(Placement),
}

/// Where a raw image was read, when that is not where it was named ([`crate::read::address`]).
#[derive(Clone, Debug)]
pub struct Placement {
    /// The source that names this address.
    pub argument: String,
    /// The source as it was named.
    pub named: String,
    /// The source that reads it as it was named, whatever is found there.
    pub as_is: String,
    /// How sure it is that the image lies there.
    pub certainty: Certainty,
    /// How it was decided.
    pub why: String,
}

/// A handover that was read, and which of its folios were restored.
pub struct Incoming {
    memory: Arc<dyn PhysMemory>,
    restore: Box<dyn Restore>,
    root: Root,
    layout: Layout,
    map_nodes: Vec<PhysRange>,
    map_lost: Option<(Phys, Absent)>,
    claims: Arc<Claims>,
    scratch: Option<Scratch>,
    machine: Option<Machine>,
    others: Vec<OtherRoot>,
    /// Pages that can be the structure of a memfd; `None` if the memory was not searched.
    memfds: Option<Vec<Phys>>,
    /// Pages with VMCOREINFO that a search found.
    vmcoreinfo: Vec<Phys>,
    /// The scratch areas that the kernel's own variable names, if that was read later.
    own_scratch: OnceLock<Scratch>,
    address: Address,
}

impl Incoming {
    /// Reads the handover in `memory`, at `options.fdt_phys` or else where [`find::find`] finds it, which `progress` is
    /// for. Nothing is changed. The scratch areas of an FDT that was not searched for are those that `options` tells.
    ///
    /// # Errors
    /// [`Error::NoHandover`] if none is found; what is wrong with the one given or found: [`Error::Root`],
    /// [`Error::UnsupportedAbi`], [`Error::Map`], [`Error::NoLayout`], [`Error::OutsideMemory`]; [`Error::Invalid`] if no
    /// scratch array lies at `options.scratch_phys`.
    pub fn open(
        memory: Arc<dyn PhysMemory>,
        options: &Options,
        progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let Some(phys) = options.fdt_phys else {
            let found = find::find(&*memory, progress)?;
            let (reads, others) = best(&*memory, &found, options)?;
            let incoming = Self::new(memory, reads, others, options)?;
            return Ok(Incoming { memfds: Some(found.memfds), vmcoreinfo: found.vmcoreinfo, ..incoming });
        };
        let reads = read(Place::Memory(&*memory), Phys(phys), &Found::default(), options)?;
        Self::new(memory, reads, Vec::new(), options)
    }

    pub(crate) fn new(
        memory: Arc<dyn PhysMemory>,
        (root, reading, scratch): Reads,
        others: Vec<OtherRoot>,
        options: &Options,
    ) -> Result<Self> {
        let marker = match reading.bitmap {
            Some((BitmapSize::Small, _)) => Marker::Order,
            _ => Marker::Magic,
        };
        let bitmap = reading.bitmap.map(|(bitmap, why)| (bitmap.bytes(reading.page), why));
        let claims = Arc::new(Claims::new(reading.preserved, marker));
        let restore = Box::new(FromImage { claims: Arc::clone(&claims), max_page_order: options.max_page_order });
        Ok(Incoming {
            memory,
            restore,
            root,
            map_nodes: reading.nodes,
            map_lost: reading.lost,
            layout: Layout { page: reading.page, page_why: reading.page_why, bitmap, certainty: reading.certainty },
            claims,
            scratch,
            machine: options.machine,
            others,
            memfds: None,
            vmcoreinfo: Vec::new(),
            own_scratch: OnceLock::new(),
            address: Address::Own,
        })
    }

    /// This handover, its folios to be restored by `restore`. Its memory is not searched: terabytes that were never touched
    /// would be read.
    pub(crate) fn restored_by(self, restore: Box<dyn Restore>) -> Self {
        Incoming { restore, memfds: Some(Vec::new()), ..self }
    }

    /// What restores its folios.
    pub(crate) fn restorer(&self) -> &dyn Restore {
        &*self.restore
    }

    /// Which folios were handed over and restored.
    pub(crate) fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    /// This handover, with where its memory's addresses are from.
    pub(crate) fn addressed(self, address: Address) -> Self {
        Incoming { address, ..self }
    }

    /// Where its memory's addresses are from.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The ABI version of the root FDT.
    pub fn abi(&self) -> &'static Abi {
        self.root.abi
    }

    /// The root FDT as it was read.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Whether there is a map: `false` for a root whose map is 0, because nothing was finalized.
    pub fn is_finalized(&self) -> bool {
        self.root.map.0 != 0
    }

    /// The page of its map that is not in the dump, and why: then no folio is known, and the sizes of a memfd's folios
    /// follow from its list.
    pub fn map_lost(&self) -> Option<(Phys, Absent)> {
        self.map_lost
    }

    /// How page size and bitmap size were decided.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory the handover is read from.
    pub fn memory(&self) -> &Arc<dyn PhysMemory> {
        &self.memory
    }

    /// Every preserved folio, restored or not.
    pub fn preserved(&self) -> &Tracker {
        self.claims.preserved()
    }

    /// Preserved folios that were not restored.
    ///
    /// # Errors
    /// None in practice: both trackers have one geometry.
    pub fn unrestored(&self) -> Result<Tracker> {
        self.claims.unrestored()
    }

    /// The number of folios restored.
    pub fn nr_restored(&self) -> u64 {
        self.claims.nr_restored()
    }

    /// The pages the map itself takes, by address: chunks and bitmaps, or the nodes of the tree.
    pub fn map_pages(&self) -> Vec<u64> {
        let page = self.layout.page.bytes();
        let mut pages: Vec<u64> = self.map_nodes.iter().map(|node| node.start.0 / page * page).collect();
        pages.dedup();
        pages
    }

    /// Where the scratch array lies, when it was found.
    pub fn scratch_phys(&self) -> Option<Phys> {
        self.known_scratch().and_then(|scratch| scratch.phys)
    }

    fn known_scratch(&self) -> Option<&Scratch> {
        self.own_scratch.get().or(self.scratch.as_ref())
    }

    /// How the scratch areas are known; `None` if they are not.
    pub fn scratch_how(&self) -> Option<ScratchHow> {
        self.known_scratch().map(|scratch| scratch.how)
    }

    /// Uses the scratch areas that a kernel's own variable names (`kho_scratch`), unless the caller named them or a
    /// kernel was told of areas that are in this memory. Returns whether they are used.
    pub fn know_own_scratch(&self, areas: Vec<ScratchArea>, phys: Phys) -> bool {
        let kept = matches!(self.scratch_how(), Some(ScratchHow::Given | ScratchHow::Told | ScratchHow::Own));
        let sound = find::soundness(&*self.memory, &areas) >= Some(Soundness::Sound);
        !kept && sound && self.own_scratch.set(Scratch { areas, phys: Some(phys), how: ScratchHow::Own }).is_ok()
    }

    /// Pages with VMCOREINFO that a search found, ascending; empty if the memory was not searched.
    pub fn vmcoreinfo_pages(&self) -> &[Phys] {
        &self.vmcoreinfo
    }

    /// The machine, when the source names one.
    pub fn machine(&self) -> Option<Machine> {
        self.machine
    }

    /// Where the map itself lies, ascending: chunks and bitmaps, or the nodes of the tree.
    pub fn map_nodes(&self) -> &[PhysRange] {
        &self.map_nodes
    }

    /// The scratch areas, when known.
    pub fn scratch(&self) -> Option<&[ScratchArea]> {
        self.known_scratch().map(|scratch| &*scratch.areas)
    }

    /// Other root FDTs that were found, ascending.
    pub fn others(&self) -> &[OtherRoot] {
        &self.others
    }

    /// Whether there can be memfds in no list: false if the memory was searched and has no page like their structure.
    pub fn may_have_unlisted(&self) -> bool {
        self.memfds.as_ref().is_none_or(|pages| !pages.is_empty())
    }

    /// The memfds whose structure lies in `unknown`, preserved memory that no payload refers to; ascending. If the memory was
    /// not searched when it was opened, `unknown` is searched, up to 16 GiB of it, and of more nothing.
    ///
    /// # Errors
    /// What reading the memory returns.
    pub fn unlisted_memfds(&self, unknown: &[PhysRange]) -> Result<Vec<Unlisted>> {
        const MOST_SEARCHED: u64 = 16 << 30;
        let (page, preserved) = (self.layout.page, self.preserved());
        let bytes = unknown.iter().fold(0u64, |sum, range| sum.saturating_add(range.len));
        let mut pages = match &self.memfds {
            Some(pages) => pages.clone(),
            None if bytes > MOST_SEARCHED => Vec::new(),
            None => unlisted::scan(&*self.memory, unknown)?,
        };
        pages.retain(|phys| {
            let after = unknown.partition_point(|range| range.start <= *phys);
            after > 0 && unknown[after - 1].contains(*phys, 1) && unlisted::is_own_page(preserved, page, *phys)
        });
        Ok(unlisted::find(&*self.memory, page, &pages, Some(preserved)))
    }

    /// The memfds whose structure lies in memory that the map does not preserve, ascending: those of a handover that
    /// this kernel booted from, whose map was given back, that were not retrieved. Only in a memory that was searched, and
    /// where there is such a handover.
    pub fn memfds_outside_map(&self) -> Vec<Unlisted> {
        let (page, preserved) = (self.layout.page, self.preserved());
        if !self.others.iter().any(|other| other.state.is_gone())
            && preserved.covering(page.pfn(self.root.phys)).is_some()
        {
            return Vec::new();
        }
        let pages = self.memfds.iter().flatten().copied();
        let outside =
            |phys: &Phys| phys.0.is_multiple_of(page.bytes()) && preserved.covering(page.pfn(*phys)).is_none();
        let pages: Vec<Phys> = pages.filter(outside).collect();
        unlisted::find(&*self.memory, page, &pages, None)
    }

    /// Pages preserved that this memory does not have.
    pub fn pages_outside(&self) -> u128 {
        detect::pages_outside(&*self.memory, self.preserved())
    }

    /// Restores the folio whose head is at `phys`, once (`kho_restore_folio`). In an arena it is allocated then.
    ///
    /// # Errors
    /// [`Error::NotRestorable`]; [`Error::Stale`] if the arena has another owner by now.
    #[inline]
    pub fn restore_folio(&self, phys: Phys) -> Result<(Pfn, Order)> {
        self.restore.restore_folio(phys)
    }

    /// Restores the folios at many addresses, all or none. Returns their orders.
    ///
    /// # Errors
    /// As [`Incoming::restore_folio`], for the first in the list that cannot be restored; one that stands there twice
    /// cannot.
    pub fn restore_many(&self, phys: &[u64]) -> Result<Vec<u8>> {
        self.restore.restore_many(phys)
    }

    /// The memory that the map and this reader take.
    pub fn stats(&self) -> MapStats {
        let tracker = self.preserved();
        let bitmap = tracker.geometry().block_bytes();
        let in_place = self.claims.bitmaps().count;
        MapStats {
            blocks: tracker.orders().map(|order| tracker.blocks(order).count() as u64).sum(),
            map_bytes: self.map_nodes.iter().map(|node| node.len).sum(),
            in_place_bytes: in_place * bitmap,
            held_bytes: tracker.nbytes() + self.claims.restored_bytes(),
        }
    }

    /// Restores `nr_pages` pages that were preserved as a range, all or none; in an arena each becomes an allocated
    /// page of its own (`kho_restore_pages`).
    ///
    /// # Errors
    /// As [`Incoming::restore_folio`].
    pub fn restore_pages(&self, phys: Phys, nr_pages: u64) -> Result<Pfn> {
        self.restore.restore_pages(phys, nr_pages, self.abi().cuts_at_nodes)
    }

    /// A producer's blob (`kho_retrieve_subtree`).
    ///
    /// # Errors
    /// [`Error::NoSubtree`] (ENOENT); [`Error::Root`] for a malformed node (EINVAL).
    pub fn retrieve_subtree(&self, name: &str) -> Result<&Subtree> {
        if let Some(subtree) = self.root.subtrees.iter().find(|s| s.name == name) {
            return Ok(subtree);
        }
        match self.root.malformed.iter().find(|(n, _)| n == name) {
            Some((name, why)) => {
                let problem = RootProblem::Subtree { name: name.clone(), why: why.clone() };
                Err(Error::Root { phys: self.root.phys.0, problem })
            }
            None => Err(Error::NoSubtree { name: name.into() }),
        }
    }
}

pub(crate) type Reads = (Root, Reading, Option<Scratch>);

/// The scratch areas, and where their array lies.
#[derive(Clone)]
pub(crate) struct Scratch {
    areas: Vec<ScratchArea>,
    phys: Option<Phys>,
    how: ScratchHow,
}

/// How scratch areas are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScratchHow {
    /// The caller, or the file of an arena, named them.
    Given,
    /// A kernel was told of them, and all of them are in this memory.
    Told,
    /// A kernel was told of them, and some of them are not in this memory or no kernel aligns them so.
    Doubtful,
    /// They were found by their content.
    Content,
    /// The kernel's own variable names them.
    Own,
}

impl ScratchHow {
    /// A word for it.
    pub const fn name(self) -> &'static str {
        match self {
            ScratchHow::Given => "given",
            ScratchHow::Told => "told",
            ScratchHow::Doubtful => "doubtful",
            ScratchHow::Content => "content",
            ScratchHow::Own => "kho_scratch",
        }
    }

    const fn told(soundness: Soundness) -> Self {
        match soundness {
            Soundness::Here => ScratchHow::Told,
            Soundness::Odd | Soundness::Sound => ScratchHow::Doubtful,
        }
    }
}

/// Reads one handover. One whose version is not known is read in the way that fits best, and is not taken over.
pub(crate) fn read(place: Place<'_>, fdt: Phys, found: &Found, options: &Options) -> Result<Reads> {
    let memory = place.memory();
    let roots = root::read_roots(memory, fdt)?;
    if let (Place::InPlace(_), Some(root)) = (place, roots.first().filter(|root| !root.doubts.is_empty())) {
        return Err(root::unsupported(fdt, &root.compatible));
    }
    let told = scratch_told(memory, fdt, found, options)?;
    let page = options.page_size.map(|page| (page, options.page_why.unwrap_or(detect::GIVEN)));
    let hints = Hints { page, bitmap_bytes: options.bitmap_bytes, bitmap_why: options.bitmap_why };
    let known = |root: &Root| Known {
        fdt,
        subtrees: root.subtrees.iter().map(|s| s.phys).collect(),
        scratch: told.as_ref().map(|(scratch, _)| scratch.areas.clone()).unwrap_or_default(),
    };
    let (root, reading) = as_fits(place, roots, known, hints, &found.memfds)?;
    let scratch = match told {
        Some((scratch, None | Some(Soundness::Here))) => Some(scratch),
        told => scratch_of(memory, told, scratch_guessed(memory, fdt, found, &reading)),
    };
    Ok((root, reading, scratch))
}

/// Of the ways to read a root, the one whose map preserves most of what the root leads to, and the root itself; the
/// first of those that are alike. If its map is not in the dump, what the root FDT leads to can be read.
///
/// # Errors
/// Of the first way, if its map can be read in none and its version is known.
fn as_fits(
    place: Place<'_>,
    roots: Vec<Root>,
    known: impl Fn(&Root) -> Known,
    hints: Hints,
    memfds: &[Phys],
) -> Result<(Root, Reading)> {
    let mut best: Option<(Root, Reading, usize)> = None;
    let mut failed: Option<(Root, Error)> = None;
    for root in roots {
        let reading = match root.map {
            Phys(0) => detect::unwritten(&known(&root), hints),
            map => detect::decide(place, root.abi, map, &known(&root), hints),
        };
        match reading {
            Ok(reading) => {
                let preserved =
                    |phys: Phys| usize::from(reading.preserved.tracker().covering(reading.page.pfn(phys)).is_some());
                let rank = preserved(root.phys) + root.subtrees.iter().map(|s| preserved(s.phys)).sum::<usize>();
                if best.as_ref().is_none_or(|(_, _, other)| rank > *other) {
                    best = Some((root, reading, rank));
                }
            }
            Err(e) => _ = failed.get_or_insert((root, e)),
        }
    }
    match (best, failed) {
        (Some((root, reading, _)), _) => Ok((root, reading)),
        (None, Some((root, e))) => match without_map::lost(place.memory(), &root, memfds, hints, &e) {
            Some(reading) => Ok((root, reading)),
            None => with_unread_map(root, e, hints),
        },
        (None, None) => Err(Error::NoHandover { why: "no root FDT".into(), absent: None }),
    }
}

/// A handover whose version is not known, and whose map is like no known one: what the root FDT leads to can be read.
///
/// # Errors
/// The one given, for a version that is known, and for any error but that of a map.
fn with_unread_map(mut root: Root, e: Error, hints: Hints) -> Result<(Root, Reading)> {
    if root.doubts.is_empty() || !matches!(e, Error::Map { .. } | Error::NoLayout { .. } | Error::OutsideMemory { .. })
    {
        return Err(e);
    }
    root.doubts.push(format!("its map cannot be read as that of any known version, so no folio is known: {e}"));
    Ok((root, without_map::unread(hints)))
}

/// Of an array that was told and one that was found by its content: what was told, unless only the other one is in this
/// memory or is aligned as a kernel aligns it.
fn scratch_of(
    memory: &dyn PhysMemory,
    told: Option<(Scratch, Option<Soundness>)>,
    guessed: Option<Scratch>,
) -> Option<Scratch> {
    let Some(guessed) = guessed else { return told.map(|(scratch, _)| scratch) };
    let sound = find::soundness(memory, &guessed.areas);
    match told {
        Some((told, soundness)) if soundness >= sound => Some(told),
        _ => Some(guessed),
    }
}

/// What speaks for a root: its own map preserves it; it has no map, as that of a running kernel before it is finalized,
/// next to which every other map was given back; its map is not in the dump, and was in use; a kernel was told of it; how
/// many of its subtrees are preserved; how many handovers came before.
type Rank = (bool, bool, bool, bool, usize, u32);

/// The most complete of several handovers: readable, its FDT and subtrees preserved by its own map.
fn best(memory: &dyn PhysMemory, found: &Found, options: &Options) -> Result<(Reads, Vec<OtherRoot>)> {
    /// Handovers that are read to find the best; a machine's memory holds a few.
    const MOST: usize = 64;
    // Many that lead to one large map would have it read as many times.
    let mut left = (8 << 20) + memory.room().held() / 2;
    let mut best: Option<(Reads, Rank)> = None;
    let mut first_error = None;
    let mut roots: Vec<OtherRoot> = found.fdts.iter().map(|fdt| OtherRoot::of(memory, *fdt)).collect();
    let counts = || roots.iter().filter_map(|other| other.kexec_count);
    let newest = counts().max().filter(|newest| counts().any(|count| count < *newest));
    for (n, other) in roots.iter_mut().enumerate() {
        let fdt = other.phys;
        if n < MOST && left > 0 {
            match read(Place::Memory(memory), fdt, found, options) {
                Ok(reads) => {
                    let (root, reading, _) = &reads;
                    left = left.saturating_sub(reading.nodes.iter().map(|node| node.len).sum());
                    let preserved =
                        |phys: &Phys| reading.preserved.tracker().covering(reading.page.pfn(*phys)).is_some();
                    let told = found.pointers.iter().any(|p| p.fdt == fdt);
                    let subtrees = root.subtrees.iter().filter(|s| preserved(&s.phys)).count();
                    let unset = root.map.0 == 0;
                    other.state = match (reading.lost, unset, preserved(&fdt)) {
                        (Some((_, why)), ..) => RootState::Absent(why),
                        (None, true, _) => RootState::Unset,
                        (None, false, true) => RootState::Whole,
                        (None, false, false) => RootState::Stale,
                    };
                    // The map of the last handover is in use, those before were given back.
                    let used = if newest.is_some() { other.kexec_count == newest } else { told };
                    let lost = reading.lost.is_some() && used;
                    // Pages of a map that was given back can hold what reads as another map.
                    let rank = (preserved(&fdt), unset, lost, told, subtrees, other.kexec_count.unwrap_or(0));
                    if best.as_ref().is_none_or(|(_, other)| rank > *other) {
                        best = Some((reads, rank));
                    }
                }
                Err(e) => {
                    // What was read of it is not known.
                    left = left.saturating_sub(1 << 20);
                    other.state = RootState::of(&e);
                    first_error = first_error.or(Some(e));
                }
            }
        }
    }
    // Where no map is what a root leads to, what was not retrieved may still be found by its content.
    let none = best.as_ref().is_none_or(|(_, (whole, ..))| !whole);
    let without = none.then(|| next_to_given_back(memory, found, options, &roots)).flatten();
    let Some(reads) = without.or(best.map(|(reads, _)| reads)) else {
        return Err(first_error.unwrap_or_else(|| none_found(memory, found)));
    };
    roots.retain(|other| other.phys != reads.0.phys);
    Ok((reads, roots))
}

/// A handover that preserves nothing, next to one whose map was given back and that left memfds: a kernel before Linux 7.1
/// that booted from a handover has a root without a map until the next one is finalized.
fn next_to_given_back(memory: &dyn PhysMemory, found: &Found, options: &Options, roots: &[OtherRoot]) -> Option<Reads> {
    let other = roots.iter().find(|other| other.state == RootState::Unset)?;
    if !roots.iter().any(|other| other.state.is_gone()) {
        return None;
    }
    let page = options.page_size.map(|page| (page, options.page_why.unwrap_or(detect::GIVEN)));
    let reading = without_map::unset(memory, &found.memfds, page)?;
    let root = root::read_root(memory, other.phys).ok()?;
    let scratch = scratch_told(memory, other.phys, found, options).ok()?;
    let guessed = scratch_guessed(memory, other.phys, found, &reading);
    Some((root, reading, scratch_of(memory, scratch, guessed)))
}

/// The error of a memory without a root FDT.
fn none_found(memory: &dyn PhysMemory, found: &Found) -> Error {
    let bytes = |why| {
        let gone = memory.absences().iter().filter(|absence| absence.why == why);
        gone.map(|absence| u128::from(absence.range.len)).sum::<u128>()
    };
    let [left_out, cut_off] = Absent::ALL.map(bytes);
    let absent = match (left_out, memory.cuts()) {
        (_, [_, ..]) => Some(Absent::CutOff),
        (1.., []) => Some(Absent::LeftOut),
        (0, []) => None,
    };
    let why = match (found.searched, absent) {
        (Some(searched), _) => format!(
            "none in the first {searched:#x} bytes, and the dump is packed more tightly than memory ever is: if it is \
             sound, say where its FDT is"
        ),
        (None, Some(why)) => {
            let here = memory.nbytes() - left_out - cut_off;
            let (gone, remedy) = match why {
                Absent::CutOff if cut_off == 0 => (
                    "the file is cut off: it ends before what its headers promise".to_owned(),
                    "copy the whole file".to_owned(),
                ),
                Absent::CutOff => (
                    format!(
                        "the file is cut off: it ends before what its headers promise, and {cut_off:#x} bytes of memory \
                         are missing"
                    ),
                    "copy the whole file".to_owned(),
                ),
                Absent::LeftOut => {
                    let level = memory
                        .dump_level()
                        .map_or_else(String::new, |level| format!(" (level {level} = {})", level_names(level)));
                    (format!("{left_out:#x} bytes of memory were left out of this dump{level}"), REMEDY.to_owned())
                }
            };
            format!(
                "{gone}; no page of the {here:#x} bytes that are there begins with an FDT whose compatible is kho-v...: \
                 {remedy}"
            )
        }
        (None, None) if memory.nbytes() == 0 => {
            "there is no memory in it; a part of a split dump can be so: name all of its parts".into()
        }
        (None, None) => format!(
            "no page of the {:#x} bytes here begins with an FDT whose compatible is kho-v...; if the image is only a \
             part of memory, say where its FDT is",
            memory.nbytes()
        ),
    };
    Error::NoHandover { why, absent }
}

/// The scratch areas the caller gave, those of the array the caller named, or of the one that a kernel was told of
/// together with this FDT.
///
/// # Errors
/// [`Error::Invalid`], [`Error::OutsideMemory`] if the caller named an array that is not there.
fn scratch_told(
    memory: &dyn PhysMemory,
    fdt: Phys,
    found: &Found,
    options: &Options,
) -> Result<Option<(Scratch, Option<Soundness>)>> {
    let phys = options.scratch_phys.map(Phys);
    if let Some(areas) = options.scratch.clone() {
        return Ok(Some((Scratch { areas, phys, how: ScratchHow::Given }, None)));
    }
    if let Some(phys) = phys {
        let areas = find::scratch_array_at(memory, phys)?;
        return Ok(Some((Scratch { areas, phys: Some(phys), how: ScratchHow::Given }, None)));
    }
    let told = find::told_scratch(memory, found, fdt);
    let scratch = |phys, areas, sound| Scratch { areas, phys: Some(phys), how: ScratchHow::told(sound) };
    Ok(told.map(|(phys, areas, sound)| (scratch(phys, areas, sound), Some(sound))))
}

/// The page that must be the scratch array: page-aligned, not preserved, its areas overlapping nothing that was handed
/// over. Where several qualify, one inside its own areas counts more: kexec puts the array into scratch.
fn scratch_guessed(memory: &dyn PhysMemory, fdt: Phys, found: &Found, reading: &Reading) -> Option<Scratch> {
    let page = reading.page;
    let told: Vec<u64> = found.pointers.iter().filter(|p| p.fdt == fdt).map(|p| p.scratch_len / 16).collect();
    let handed_over = |area: &ScratchArea| {
        let (start, end) = (page.pfn(Phys(area.addr)), page.pfn(Phys(area.addr + (area.size - 1))));
        reading.preserved.tracker().overlapping(start, Pfn(end.0 + 1)).is_some() || {
            // The nodes ascend and share no byte: the first that ends after the area's start decides.
            let at = reading.nodes.partition_point(|n| n.len == 0 || n.start.0 + (n.len - 1) < area.addr);
            reading.nodes.get(at).is_some_and(|node| area.overlaps(node.start.0, node.len))
        }
    };
    let possible =
        |(phys, areas): &&(Phys, Vec<ScratchArea>)| phys.0 % page.bytes() == 0 && !areas.iter().any(handed_over);
    /// A machine's memory holds a few that look like one; of more none can be told to be the right one.
    const MOST: usize = 256;
    let only = |fitting: Vec<&(Phys, Vec<ScratchArea>)>| {
        let (phys, areas) = fitting.first()?;
        let scratch = || Scratch { areas: areas.clone(), phys: Some(*phys), how: ScratchHow::Content };
        fitting.iter().all(|(_, others)| others == areas).then(scratch)
    };
    let own = |(phys, areas): &&&(Phys, Vec<ScratchArea>)| areas.iter().any(|a| a.overlaps(phys.0, 1));
    let as_long = |(_, areas): &&&(Phys, Vec<ScratchArea>)| told.contains(&(areas.len() as u64));
    let here = |(_, areas): &&&(Phys, Vec<ScratchArea>)| find::soundness(memory, areas) == Some(Soundness::Here);
    let pick = |arrays: &[(Phys, Vec<ScratchArea>)]| {
        let mut fitting: Vec<_> = arrays.iter().take(MOST).filter(possible).collect();
        // The loaded kernel was told how long the array is, if not yet where.
        for closer in [&as_long as &dyn Fn(&&&(Phys, Vec<ScratchArea>)) -> bool, &here] {
            if fitting.iter().any(|array| closer(&array)) {
                fitting.retain(|array| closer(&array));
            }
        }
        only(fitting.iter().filter(own).copied().collect()).or_else(|| only(fitting))
    };
    pick(&found.scratch_arrays).or_else(|| pick(&found.open_arrays))
}
