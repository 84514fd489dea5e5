//! Detects how a map is to be read. It records neither the page size nor, in kho-v1, the bitmap size (abi.md section 1), so
//! they are decided from evidence: readings that contradict themselves fall away, and of those left the one wins in which
//! the FDT and the subtrees are preserved, and no page is preserved twice, outside memory, in scratch, or under the map
//! itself.

#![forbid(unsafe_code)]

use super::chunk::{self, Chunk};
use super::layout::BitmapSize;
use super::preserved::{InPlace, Preserved};
use super::radix::{self, Shape};
use super::{Abi, MapFormat};
use crate::error::{Error, MapProblem, Result};
use crate::filter::Absent;
use crate::memory::{PhysMemory, PhysRange};
use crate::scratch::{ScratchArea, ranges_of};
use crate::tracker::{Geometry, Tracker};
use crate::units::{Order, PageSize, Pfn, Phys};
use std::fmt;
use std::sync::Arc;

/// How sure a decision is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Certainty {
    /// The caller said so.
    Given,
    /// Every other reading contradicts itself, or reads the same.
    Certain,
    /// Other readings are possible, but less plausible.
    Likely,
    /// Nothing tells the readings apart.
    Guess,
    /// No reading is possible: the map of a version that is not known, or one that is not in its dump.
    Unread,
}

impl fmt::Display for Certainty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Certainty::Given => "given",
            Certainty::Certain => "certain",
            Certainty::Likely => "likely",
            Certainty::Guess => "guess",
            Certainty::Unread => "not read",
        })
    }
}

/// What is known of a handover apart from its map.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The physical address of the root FDT.
    pub fdt: Phys,
    /// The physical addresses of the subtrees' blobs.
    pub subtrees: Vec<Phys>,
    /// The scratch areas; empty if unknown.
    pub scratch: Vec<ScratchArea>,
}

/// What need not be decided, with the reason.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// The page size, and why it is known.
    pub page: Option<(PageSize, &'static str)>,
    /// The bitmap size in bytes.
    pub bitmap_bytes: Option<u64>,
    /// Why `bitmap_bytes` is known, if not because the caller said so.
    pub bitmap_why: Option<&'static str>,
}

/// Why a page size is known that the caller insisted on.
pub const GIVEN: &str = "given by the caller";

/// A decided reading of a map.
#[derive(Debug)]
pub struct Reading {
    /// The page size.
    pub page: PageSize,
    /// Why it is that page size.
    pub page_why: String,
    /// The bitmap size and why it is that; `None` for a tree, which has but one.
    pub bitmap: Option<(BitmapSize, String)>,
    /// Of the bitmap size where there is one, else of the page size.
    pub certainty: Certainty,
    /// Where the map itself lies, ascending: its chunks and bitmaps, or the tree's nodes.
    pub nodes: Vec<PhysRange>,
    /// What the map preserves.
    pub preserved: Preserved,
    /// The page of the map that is not in its dump, and why: then nothing is known of what it preserves.
    pub lost: Option<(Phys, Absent)>,
}

struct Candidate {
    page: PageSize,
    bitmap: Option<BitmapSize>,
    map: Map,
}

enum Map {
    Chunks(Arc<[Chunk]>),
    /// The addresses of the nodes.
    Tree(Vec<u64>),
}

impl Map {
    /// Where the map itself lies, ascending.
    fn nodes(&self, page: PageSize, bitmap: Option<BitmapSize>) -> Vec<PhysRange> {
        let whole = |phys: u64| PhysRange { start: Phys(phys), len: page.bytes() };
        let mut nodes: Vec<PhysRange> = Vec::new();
        match self {
            Map::Tree(pages) => nodes.extend(pages.iter().map(|phys| whole(*phys))),
            Map::Chunks(chunks) => {
                let len = bitmap.map_or(0, |bitmap| bitmap.bytes(page));
                for c in chunks.iter() {
                    nodes.push(whole(c.phys));
                    nodes.extend(c.entries.iter().map(|e| PhysRange { start: Phys(e.bitmap.get()), len }));
                }
            }
        }
        nodes.sort_unstable_by_key(|n| n.start);
        nodes
    }
}

/// What speaks against a reading; less is better, the first difference decides.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Doubts {
    fdt_not_preserved: bool,
    subtrees_not_preserved: usize,
    pages_twice: u128,
    pages_in_scratch: u128,
    pages_of_the_map: u128,
    pages_outside: u128,
    ragged_ranges: usize,
}

impl Doubts {
    /// The first thing that makes `self` worse than `other`, in words.
    fn worse_because(&self, other: &Doubts) -> String {
        if self.fdt_not_preserved != other.fdt_not_preserved {
            return "the FDT's own page would not be preserved".into();
        }
        if self.subtrees_not_preserved != other.subtrees_not_preserved {
            return format!("{} subtrees would not be preserved", self.subtrees_not_preserved);
        }
        let counts = [
            (self.pages_twice, other.pages_twice, "would be preserved twice"),
            (self.pages_in_scratch, other.pages_in_scratch, "would lie in scratch"),
            (self.pages_of_the_map, other.pages_of_the_map, "of the map itself would be preserved"),
            (self.pages_outside, other.pages_outside, "would lie outside this memory"),
        ];
        for (mine, others, what) in counts {
            if mine != others {
                return format!("{mine} pages {what}");
            }
        }
        format!("{} memory ranges would begin or end inside a page", self.ragged_ranges)
    }
}

/// The memory a map is read from.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// Bitmaps are copied.
    Memory(&'a dyn PhysMemory),
    /// Bitmaps are used in place: an arena that is being taken over.
    InPlace(&'a dyn InPlace),
}

impl<'a> Place<'a> {
    /// The memory, for reads.
    pub fn memory(self) -> &'a dyn PhysMemory {
        match self {
            Place::Memory(memory) => memory,
            Place::InPlace(arena) => arena,
        }
    }
}

/// A reading, what it preserves, and what speaks against it.
struct Scored {
    candidate: Candidate,
    preserved: Preserved,
    doubts: Doubts,
}

/// Reads the map of an ABI at `map` in the most plausible way. Where there is but one way its bitmaps are not looked at
/// beyond reading them; where there are several, no more than two are held at a time.
///
/// # Errors
/// [`Error::Map`] when every reading fails alike, [`Error::NoLayout`] when each fails in its own way; [`Error::Invalid`]
/// for a bitmap size where maps have none.
pub fn decide(place: Place<'_>, abi: &Abi, map: Phys, known: &Known, hints: Hints) -> Result<Reading> {
    let (candidates, mut refused) = candidates(place, abi, map, known, hints)?;
    let given = match abi.map {
        MapFormat::Chunks => hints.bitmap_bytes.is_some(),
        MapFormat::Radix { .. } => hints.page.is_some_and(|(_, why)| why == GIVEN),
    };
    let alone = candidates.len() == 1;
    let absent = |refused: &Refused| refused.iter().any(|(_, _, e)| e.absent().is_some());
    let unread = absent(&refused);
    let mut best: Option<Scored> = None;
    let mut beaten = Vec::new();
    for (candidate, read) in candidates {
        let preserved = match read.map_or_else(|| preserved(place, &candidate), Ok) {
            Ok(preserved) => preserved,
            Err(e) => {
                refused.push((candidate.page, candidate.bitmap, e));
                continue;
            }
        };
        if let Place::Memory(memory) = place
            && let Err(e) = check_runs(memory, preserved.tracker(), map)
        {
            refused.push((candidate.page, candidate.bitmap, e));
            continue;
        }
        let doubts = match alone && !unread {
            true => NO_DOUBTS,
            false => doubts(place.memory(), preserved.tracker(), &candidate, known),
        };
        let mut less = Scored { candidate, preserved, doubts };
        if let Some(best) = &mut best {
            let excuse = excuse(place.memory(), &less, best).or_else(|| excuse(place.memory(), best, &less));
            let better = match &excuse {
                Some(excuse) => excuse.right == less.candidate.bitmap,
                None => less.doubts < best.doubts,
            };
            if better {
                std::mem::swap(best, &mut less);
            }
            if let Some(Excuse { why, .. }) = excuse {
                beaten.push((less.candidate.page, less.candidate.bitmap, best.doubts, why));
                continue;
            }
            // Of two with the same doubts the first stays, so that what is said of one here stays true if both are beaten.
            beaten.push((less.candidate.page, less.candidate.bitmap, less.doubts, why_same(&less, best)));
        } else {
            best = Some(less);
        }
    }
    let Some(Scored { candidate, preserved, doubts }) = best else { return Err(no_reading(map, refused)) };
    // A reading that could not be completed may be the right one; only one that nothing speaks against rules it out.
    if absent(&refused) && doubts != NO_DOUBTS {
        return Err(no_reading(map, refused));
    }
    let why = |(page, bitmap, theirs, same): (_, _, Doubts, _)| match theirs == doubts {
        true => (page, bitmap, same),
        false => (page, bitmap, theirs.worse_because(&doubts)),
    };
    let beaten: Vec<_> = beaten.into_iter().map(why).collect();
    Ok(explain(candidate, preserved, &beaten, &refused, hints, given))
}

/// The reading of a root whose map is 0: it preserves nothing, and no map tells its layout.
///
/// # Errors
/// [`Error::BitmapBytes`] for a bitmap size there is not.
pub fn unwritten(known: &Known, hints: Hints) -> Result<Reading> {
    let fits = |page: &PageSize| page.pfn_exact("FDT address", known.fdt).is_ok();
    let mut fitting = PageSize::ALL.into_iter().filter(fits);
    let (page, why, certainty) = match (hints.page, fitting.next(), fitting.next()) {
        (Some((page, GIVEN)), ..) => (page, GIVEN, Certainty::Given),
        (Some((page, why)), ..) => (page, why, Certainty::Certain),
        (None, Some(page), None) => (page, "the FDT is at no address of a larger page", Certainty::Certain),
        (None, page, _) => (page.unwrap_or(PageSize::Size4K), "no map was written that could tell", Certainty::Guess),
    };
    let bitmap = BitmapSize::new(hints.bitmap_bytes.unwrap_or(page.bytes()), page)?;
    let bitmap_why = match hints.bitmap_bytes {
        Some(_) => hints.bitmap_why.unwrap_or(GIVEN),
        None => "a page, as the kernels have it that pass a map of 0",
    };
    let nothing = Tracker::new(chunk::geometry(page, bitmap)?);
    Ok(Reading {
        page,
        page_why: why.into(),
        bitmap: Some((bitmap, bitmap_why.into())),
        certainty,
        nodes: Vec::new(),
        preserved: nothing.into(),
        lost: None,
    })
}

/// Refuses a map in which more runs of folios stand than its memory can plausibly hold folios: every check, list and
/// drawing works by runs.
fn check_runs(memory: &dyn PhysMemory, tracker: &Tracker, map: Phys) -> Result<()> {
    let (runs, max) = (tracker.nr_runs_at_most(), memory.room().runs());
    match runs > max {
        true => Err(Error::Map { node: "map", phys: map.0, problem: MapProblem::TooManyRuns { runs, max } }),
        false => Ok(()),
    }
}

/// Which of two bitmap sizes is right where pages outside this memory tell them apart, and what is said of the other.
struct Excuse {
    right: Option<BitmapSize>,
    why: String,
}

/// A dump may lack pages and not name them. Of two bitmap sizes the larger one names all that the smaller one does, and
/// thus more that is not there; but it is the right one if much of the rest is. `None` if the readings differ in more,
/// or pages beyond all of this memory speak against the larger one.
///
/// Bitmaps of 512 bytes are allocated one after the other, eight to a page, and bitmaps of a page at pages: that four of
/// the former are all at the start of a page, as the larger reading requires, is a chance of 1 in 4096.
fn excuse(memory: &dyn PhysMemory, small: &Scored, large: &Scored) -> Option<Excuse> {
    const ENOUGH: usize = 4;
    let bitmaps = match &large.candidate.map {
        Map::Chunks(chunks) => chunks.iter().map(|chunk| chunk.entries.len()).sum::<usize>(),
        Map::Tree(_) => return None,
    };
    let page = large.candidate.page;
    let outside = large.doubts.pages_outside.checked_sub(small.doubts.pages_outside).filter(|pages| *pages > 0)?;
    let alike = |doubts: Doubts| Doubts { pages_outside: 0, ..doubts };
    let (less, more) = (small.preserved.tracker(), large.preserved.tracker());
    if small.candidate.page != page || alike(small.doubts) != alike(large.doubts) || !less.is_subset(more) {
        return None;
    }
    let inside = more.nr_pages().saturating_sub(less.nr_pages()).saturating_sub(outside);
    let (first, last) = (memory.ranges().first()?, memory.ranges().last()?);
    let (first, last) = (page.pfn(first.start), page.pfn(Phys(last.start.0 + (last.len - 1))));
    let beyond = more.extents().any(|(start, end)| start < first || end.0 - 1 > last.0);
    let lacks = small.doubts.pages_outside > 0;
    let enough = bitmaps >= ENOUGH;
    if beyond && !lacks && !enough {
        return None;
    }
    let found = format!("{inside} pages more lie in this memory, and {outside} do not");
    let why = match enough || (lacks && inside >= outside) {
        true => format!(
            "{found}: {bitmaps} bitmaps are each at the start of a page, and pages may be missing from this dump"
        ),
        false => format!("{UNDECIDED} for certain: {found}; pages may be missing from this dump"),
    };
    let right = if inside > 0 || enough { large } else { small };
    Some(Excuse { right: right.candidate.bitmap, why })
}

/// Why another reading with the same doubts is not the one chosen.
fn why_same(other: &Scored, best: &Scored) -> String {
    if other.doubts != best.doubts {
        return UNDECIDED.into();
    }
    let (tracker, chosen) = (other.preserved.tracker(), best.preserved.tracker());
    if chosen == tracker {
        SAME.into()
    } else if best.candidate.page == other.candidate.page && tracker.is_subset(chosen) {
        let lost = chosen.len().saturating_sub(tracker.len());
        format!("{lost} folios would be lost that lie in memory, each once")
    } else {
        UNDECIDED.into()
    }
}

/// Both readings preserve the same folios.
const SAME: &str = "it is the same";

/// There is no reason to prefer one reading.
const UNDECIDED: &str = "nothing tells it apart";

const NO_DOUBTS: Doubts = Doubts {
    fdt_not_preserved: false,
    subtrees_not_preserved: 0,
    pages_twice: 0,
    pages_in_scratch: 0,
    pages_of_the_map: 0,
    pages_outside: 0,
    ragged_ranges: 0,
};

type Refused = Vec<(PageSize, Option<BitmapSize>, Error)>;

/// Maps that can be read; what reading a tree gave already.
type Candidates = Vec<(Candidate, Option<Preserved>)>;

/// Why a bitmap size cannot be asked for.
pub fn no_bitmap_size(abi: &Abi) -> String {
    let sized: Vec<&str> = Abi::all().filter(|abi| !abi.bitmaps.is_empty()).map(|abi| abi.compatible).collect();
    format!("{} keeps a tree of pages; only {} comes with bitmaps of two sizes", abi.compatible, sized.join(", "))
}

/// What a candidate preserves.
fn preserved(place: Place<'_>, candidate: &Candidate) -> Result<Preserved> {
    let (Map::Chunks(chunks), Some(bitmap)) = (&candidate.map, candidate.bitmap) else {
        return Ok(Tracker::new(Geometry::paged(candidate.page)).into());
    };
    let geometry = chunk::geometry(candidate.page, bitmap)?;
    match place {
        Place::Memory(memory) => chunk::read(memory, geometry, chunks).map(Preserved::from),
        Place::InPlace(arena) => chunk::inherit(arena, geometry, chunks),
    }
}

/// The readings that do not contradict themselves, and why the others do.
fn candidates(place: Place<'_>, abi: &Abi, map: Phys, known: &Known, hints: Hints) -> Result<(Candidates, Refused)> {
    if abi.map != MapFormat::Chunks && hints.bitmap_bytes.is_some() {
        return Err(Error::Invalid { what: "bitmap_bytes", why: no_bitmap_size(abi) });
    }
    let memory = place.memory();
    let mut candidates = Vec::new();
    let mut refused = Vec::new();
    for page in PageSize::ALL {
        if hints.page.is_some_and(|(given, _)| given != page) {
            continue;
        }
        if let Err(e) = page.pfn_exact("FDT address", known.fdt) {
            refused.push((page, None, e));
            continue;
        }
        if let Some(shape) = Shape::of(abi, page) {
            let shape = radix::written(memory, shape, map, page.pfn(known.fdt));
            let read = match place {
                Place::Memory(memory) => radix::read(memory, shape, map).map(|tree| (tree.tracker.into(), tree.nodes)),
                Place::InPlace(arena) => radix::inherit(arena, shape, map),
            };
            match read {
                Ok((preserved, nodes)) => {
                    candidates.push((Candidate { page, bitmap: None, map: Map::Tree(nodes) }, Some(preserved)));
                }
                Err(e) => refused.push((page, None, e)),
            }
            continue;
        }
        let chunks: Arc<[Chunk]> = match chunk::walk(memory, page, map) {
            Ok(chunks) => chunks.into(),
            Err(e) => {
                refused.push((page, None, e));
                continue;
            }
        };
        for bitmap in BitmapSize::ALL {
            if hints.bitmap_bytes.is_some_and(|given| given != bitmap.bytes(page)) {
                continue;
            }
            match chunk::check(memory, chunk::geometry(page, bitmap)?, &chunks) {
                Ok(()) => {
                    let map = Map::Chunks(Arc::clone(&chunks));
                    candidates.push((Candidate { page, bitmap: Some(bitmap), map }, None));
                }
                Err(e) => refused.push((page, Some(bitmap), e)),
            }
        }
    }
    if candidates.is_empty() && refused.is_empty() {
        let page = hints.page.map_or(PageSize::Size4K, |(page, _)| page).bytes();
        return Err(Error::BitmapBytes { bytes: hints.bitmap_bytes.unwrap_or(0), page });
    }
    Ok((candidates, refused))
}

fn doubts(memory: &dyn PhysMemory, tracker: &Tracker, candidate: &Candidate, known: &Known) -> Doubts {
    let page = candidate.page;
    let nodes = candidate.map.nodes(page, candidate.bitmap);
    let scratch = ranges_of(&known.scratch);
    let mut d = NO_DOUBTS;
    let mut union = 0;
    for (start, end) in tracker.extents() {
        union += u128::from(end.0 - start.0);
        let shared = |ranges: &[PhysRange]| covered(page, ranges, start, end);
        d.pages_of_the_map += shared(&nodes);
        d.pages_in_scratch += shared(&scratch);
    }
    d.pages_twice = tracker.nr_pages().saturating_sub(union);
    d.pages_outside = pages_outside(memory, tracker);
    d.fdt_not_preserved = !tracker.contains(page.pfn(known.fdt), Order::ZERO);
    d.subtrees_not_preserved = known.subtrees.iter().filter(|s| tracker.covering(page.pfn(**s)).is_none()).count();
    let ragged = |r: &&PhysRange| !(r.start.0 | r.len).is_multiple_of(page.bytes());
    d.ragged_ranges = memory.ranges().iter().filter(ragged).count();
    d
}

/// How many pages of `[start, end)` touch one of the sorted `ranges`.
fn covered(page: PageSize, ranges: &[PhysRange], start: Pfn, end: Pfn) -> u128 {
    let first = page.phys(start).0;
    let last = page.phys(Pfn(end.0 - 1)).0 | (page.bytes() - 1);
    let from = ranges.partition_point(|r| r.start.0 + (r.len.max(1) - 1) < first);
    let mut pages = 0;
    let mut done = start.0;
    for r in ranges[from..].iter().take_while(|r| r.start.0 <= last).filter(|r| r.len > 0) {
        let low = page.pfn(Phys(r.start.0.max(first))).0.max(done);
        let high = page.pfn(Phys((r.start.0 + (r.len - 1)).min(last))).0 + 1;
        pages += u128::from(high.saturating_sub(low));
        done = done.max(high);
    }
    pages
}

/// Pages a tracker preserves that `memory` does not have.
pub fn pages_outside(memory: &dyn PhysMemory, tracker: &Tracker) -> u128 {
    let page = tracker.geometry().page();
    let missing = |(start, end): (Pfn, Pfn)| {
        u128::from(end.0 - start.0).saturating_sub(covered(page, memory.ranges(), start, end))
    };
    tracker.extents().map(missing).sum()
}

fn no_reading(map: Phys, mut refused: Refused) -> Error {
    // Memory that is not in the file is the reason, whatever else readings came to.
    if let Some(at) = refused.iter().position(|(_, _, e)| e.absent().is_some()) {
        return refused.swap_remove(at).2;
    }
    let mut texts: Vec<String> = Vec::new();
    for (page, bitmap, e) in &refused {
        let reading = match bitmap {
            None => format!("as {page} pages: {e}"),
            Some(b) => format!("as {page} pages and bitmaps of {} bytes: {e}", b.bytes(*page)),
        };
        texts.push(reading);
    }
    let outside = refused.iter().any(|(_, _, e)| e.leads_outside());
    let mut errors = refused.into_iter().map(|(_, _, e)| e);
    match errors.next() {
        Some(first) if errors.all(|e| e.to_string() == first.to_string()) => first,
        _ => Error::NoLayout { phys: map.0, why: texts.join("; "), outside },
    }
}

fn explain(
    candidate: Candidate,
    preserved: Preserved,
    beaten: &[(PageSize, Option<BitmapSize>, String)],
    refused: &Refused,
    hints: Hints,
    given: bool,
) -> Reading {
    let Candidate { page, bitmap, map } = candidate;
    let mut of_bitmap: Vec<String> = Vec::new();
    let mut of_page: Vec<String> = Vec::new();
    for (p, b, why) in beaten {
        match b {
            Some(b) if *p == page => of_bitmap.push(format!("read as {} bytes, {why}", b.bytes(page))),
            _ => of_page.push(format!("read as {p} pages, {why}")),
        }
    }
    for (p, b, e) in refused {
        match b {
            Some(b) if *p == page => of_bitmap.push(format!("not {} bytes: {e}", b.bytes(page))),
            _ if *p != page => of_page.push(format!("not {p}: {e}")),
            _ => {}
        }
    }
    of_page.dedup();
    let certainty = match given {
        true => Certainty::Given,
        _ if beaten.iter().all(|b| b.2 == SAME) => Certainty::Certain,
        _ if beaten.iter().any(|b| b.2.starts_with(UNDECIDED)) => Certainty::Guess,
        _ => Certainty::Likely,
    };
    let bitmap = bitmap.map(|bitmap| {
        let kernels = match bitmap {
            BitmapSize::Small => "as Linux 6.16 and 6.17 write",
            BitmapSize::Page => "a page, as Linux 6.18 and later write",
        };
        let why = match (given, of_bitmap.is_empty()) {
            (true, _) => GIVEN.into(),
            (_, true) => kernels.to_string(),
            _ => format!("{kernels}: {}", of_bitmap.join("; ")),
        };
        (bitmap, why)
    });
    let page_why = match hints.page {
        Some((_, why)) => why.into(),
        None if of_page.is_empty() => "no other fits".into(),
        None => of_page.join("; "),
    };
    let nodes = map.nodes(page, bitmap.as_ref().map(|(bitmap, _)| *bitmap));
    Reading { page, page_why, bitmap, certainty, nodes, preserved, lost: None }
}
