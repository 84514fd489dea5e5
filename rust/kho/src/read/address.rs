//! Finds the address of a raw image: the one at which its handover is whole. The image does not record it.
//!
//! A handover tells: the map that a root FDT points to preserves the root's own page and its subtrees' pages, and at no
//! address but the right one does it. So an image is read at the address it was named with, and where it is not whole
//! there, each address is tried that makes a pointer land on what it points to:
//!
//! ```text
//! root FDT at place 0x2a000 in the file, preserved-memory-map = 0x40029000
//! a page at 0x29000 that can be the root of a tree   ->  it lies at 0x40029000, the file begins at 0x40000000
//! ```
//! The same difference with 4 GiB or 1 TiB, where RAM continues that does not fit below a hole, gives the hole. The usual
//! layouts of virtual machines ([`Board`]) are tried as well. An address is used if it alone makes everything whole.

#![forbid(unsafe_code)]

use crate::abi::detect::{Certainty, Place, pages_outside};
use crate::abi::layout::chunk_entries;
use crate::abi::radix::{self, Shape};
use crate::abi::{Abi, MapFormat};
use crate::error::{Error, Result, RootProblem, SourceProblem};
use crate::memory::{Board, FileMemory, PhysMemory, PhysRange, Source, runs};
use crate::read::find::{self, Found};
use crate::read::incoming::{self, Address, Incoming, Options, Placement, Reads};
use crate::read::root::{self, Root};
use crate::tracker::Tracker;
use crate::units::{PageSize, Phys};
use memchr::memmem;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

const STEP: u64 = PageSize::Size4K.bytes();
const GIB: u64 = 1 << 30;
/// Where RAM continues that does not fit below a hole: x86's PCI hole, AMD's HyperTransport hole.
const CONTINUES: [u64; 2] = [4 * GIB, 1024 * GIB];
/// The lowest address at which a hole of the usual layouts on x86 begins.
const LOWEST_HOLE: u64 = 2 * GIB;
/// Physical addresses have at most 52 bits, on x86_64 and on arm64.
const BEYOND: u64 = 1 << 52;
/// Root FDTs that are tried, pages of one kind that are kept, layouts whose whole map is read: more of them, and the
/// memory is made of decoys.
const MOST_ROOTS: usize = 16;
const MOST_PAGES: usize = 1 << 16;
const MOST_READ: usize = 64;
/// Layouts named in an error.
const MOST_NAMED: usize = 4;

/// Where the bytes of an image lie. The first `cut` of them lie nowhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Layout {
    base: u64,
    cut: u64,
    hole: Option<(u64, u64)>,
}

/// A run of an image: (address, place in the image, bytes).
type Run = (u64, u64, u64);

impl Layout {
    /// All of it from `base`, which may be below 0: then what lies there is cut.
    fn flat(base: i64) -> Layout {
        Layout { base: base.max(0).unsigned_abs(), cut: base.min(0).unsigned_abs(), hole: None }
    }

    fn runs(self, len: u64) -> Vec<Run> {
        let left = len.saturating_sub(self.cut);
        let runs = runs(self.base, self.hole, left).into_iter();
        runs.filter(|run| run.2 > 0).map(|(first, place, len)| (first, place + self.cut, len)).collect()
    }

    /// The argument that names it.
    fn named(self, source: &Source) -> Source {
        Source {
            base: Some(Phys(self.base)),
            offset: source.offset + self.cut,
            size: source.size.map(|size| size.saturating_sub(self.cut)),
            hole: self.hole.map(|(start, end)| (Phys(start), Phys(end))),
            ..Source::file(&source.path)
        }
    }
}

/// Where a place in the image lies.
fn phys_of(runs: &[Run], place: u64) -> Option<u64> {
    let run = runs.iter().find(|run| place >= run.1 && place - run.1 < run.2)?;
    run.0.checked_add(place - run.1)
}

/// Which place in the image lies at an address.
fn place_of(runs: &[Run], phys: u64) -> Option<u64> {
    let run = runs.iter().find(|run| phys >= run.0 && phys - run.0 < run.2)?;
    Some(run.1 + (phys - run.0))
}

/// An image's bytes at other addresses than those it was opened at.
struct Placed {
    inner: Arc<FileMemory>,
    /// (address, address in `inner`, bytes), by address; disjoint.
    pieces: Vec<Run>,
    ranges: Vec<PhysRange>,
}

impl Placed {
    /// `opened`: the runs of the image as it is opened, by place.
    fn new(inner: &Arc<FileMemory>, opened: &[(u64, u64, u64)], runs: &[Run]) -> Placed {
        let mut pieces: Vec<Run> = Vec::new();
        for &(first, place, len) in runs {
            for &(at, phys, filled) in opened {
                let start = place.max(at);
                let end = (place + len).min(at + filled);
                if start < end {
                    pieces.push((first + (start - place), phys + (start - at), end - start));
                }
            }
        }
        pieces.sort_unstable();
        let mut ranges: Vec<PhysRange> = Vec::new();
        for &(first, _, len) in &pieces {
            match ranges.last_mut() {
                Some(last) if last.start.0 + last.len == first => last.len += len,
                _ => ranges.push(PhysRange { start: Phys(first), len }),
            }
        }
        Placed { inner: Arc::clone(inner), pieces, ranges }
    }

    /// The first piece that ends after `phys`.
    fn pieces_from(&self, phys: u64) -> &[Run] {
        &self.pieces[self.pieces.partition_point(|piece| piece.0 + (piece.2 - 1) < phys)..]
    }
}

impl PhysMemory for Placed {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        let outside = Error::OutsideMemory { what: "read", phys: phys.0, len: buf.len() as u64 };
        if !self.contains(phys, buf.len() as u64) {
            return Err(outside);
        }
        let (mut at, mut rest) = (phys.0, buf);
        for &(first, inner, len) in self.pieces_from(phys.0) {
            if rest.is_empty() {
                break;
            }
            let skip = at - first;
            let n = usize::try_from(len - skip).map_or(rest.len(), |n| n.min(rest.len()));
            let (now, later) = rest.split_at_mut(n);
            self.inner.read(Phys(inner + skip), now)?;
            at += n as u64;
            rest = later;
        }
        Ok(())
    }

    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>> {
        for &(first, inner, len) in self.pieces_from(phys.0) {
            let skip = phys.0.saturating_sub(first);
            let Some(run) = self.inner.next_data(Phys(inner + skip))? else { continue };
            // What is next in the image may lie after this piece.
            let Some(skip) = run.start.0.checked_sub(inner).filter(|skip| *skip < len) else { continue };
            return Ok(Some(PhysRange { start: Phys(first + skip), len: run.len.min(len - skip) }));
        }
        Ok(None)
    }
}

/// Opens the handover in files. One in raw images must be whole where they lie; that of one raw image is looked for at
/// other addresses where it is not, unless its source forbids it ([`Source::check`]).
///
/// # Errors
/// As [`Incoming::open`]; [`SourceProblem::Elsewhere`] for an image that is not whole at its address and at no other, or
/// at several.
pub fn open(
    files: Arc<FileMemory>,
    options: &Options,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Incoming> {
    let opened = Incoming::open(files.clone(), options, &mut *progress);
    let Some(sources) = files.raw_sources() else { return opened };
    let assumed = sources.iter().any(|s| s.base.is_none() && s.board.is_none());
    let address = if assumed { Address::Assumed } else { Address::Named };
    let opened = opened.map(|incoming| incoming.addressed(address));
    if !sources.iter().all(|source| source.check) {
        return opened;
    }
    let named = match opened {
        Ok(incoming) => Ok((Fit::of(&*files, &Handed::of(&incoming)), incoming)),
        Err(
            error @ (Error::NoHandover { .. }
            | Error::Map { .. }
            | Error::NoLayout { .. }
            | Error::OutsideMemory { .. }
            | Error::Misaligned { .. }
            | Error::Root { problem: RootProblem::Malformed { .. }, .. }),
        ) => Err(error),
        Err(other) => return Err(other),
    };
    let ([source], Some(runs)) = (sources, files.raw_runs()) else { return parts(sources, named) };
    let image = Image::new(&files, source, runs);
    if let Ok((fit, incoming)) = &named
        && fit.whole
        && !image.is_doubtful(fit, incoming)
    {
        return named.map(|(_, incoming)| incoming);
    }
    let search = image.search(options, progress)?;
    image.decide(named, search, options, progress)
}

/// Several raw images as one memory: each has its address, so only whether the handover is whole is decided.
fn parts(sources: &[Source], named: Result<(Fit, Incoming)>) -> Result<Incoming> {
    let why = match named {
        Ok((fit, incoming)) if fit.whole || fit.supported => return Ok(incoming),
        Ok((fit, _)) => fit.why,
        Err(error) if error.leads_outside() => error.to_string(),
        Err(error) => return Err(error),
    };
    let why = format!(
        "{why}: the parts do not lie where they were named, or some are missing; say where each lies \
         (FILE@ADDRESS,offset=N,size=N), or add ,check=no to each to read them as they are"
    );
    let path = sources.first().map(|source| source.path.clone()).unwrap_or_default();
    Err(Error::Source { path, problem: SourceProblem::Elsewhere { why } })
}

/// How well a handover fits the memory it is read in.
#[derive(Clone, Debug)]
struct Fit {
    /// The map is one a kernel writes, it preserves the root FDT and every subtree, and these are there.
    whole: bool,
    /// What is not whole is the kernel's or a producer's fault, as far as the address goes.
    supported: bool,
    /// Pages preserved that are not in the memory.
    outside: u128,
    /// The first address after what is preserved.
    end: u64,
    /// What is not whole.
    why: String,
}

impl Fit {
    fn of(memory: &dyn PhysMemory, handed: &Handed<'_>) -> Fit {
        let Handed { root, page, preserved, .. } = *handed;
        let covers = |phys: Phys| preserved.covering(page.pfn(phys)).is_some();
        let not_there = root.subtrees.iter().find(|s| blob_is(memory, s) == Some(false));
        let lost = root.subtrees.iter().find(|s| !covers(s.phys));
        let empty = Shape::of(root.abi, page).and_then(|shape| empty_table(memory, shape, root.map.0));
        let pages: u128 = preserved.extents().map(|(start, end)| u128::from(end.0 - start.0)).sum();
        let twice = preserved.nr_pages().saturating_sub(pages);
        let map = root.map;
        let mut supported = false;
        let why = if !covers(root.phys) {
            let empty = if preserved.is_empty() { " (empty)" } else { "" };
            format!("the map at {map}{empty} does not preserve the root FDT at {} that points to it", root.phys)
        } else if let Some(subtree) = not_there {
            format!(
                "the root FDT at {} has a subtree {:?} at {}, and none is there",
                root.phys, subtree.name, subtree.phys
            )
        } else if let Some(empty) = empty {
            format!("the map at {map} leads to a table at {empty:#x} that leads nowhere")
        } else if let Some(lost) = lost {
            supported = blob_is(memory, lost) == Some(true);
            format!("the map at {map} does not preserve the subtree {:?} at {}", lost.name, lost.phys)
        } else if twice > 0 {
            supported = root.subtrees.iter().any(|s| blob_is(memory, s) == Some(true));
            format!("the map at {map} preserves {twice} pages twice")
        } else {
            String::new()
        };
        let end = preserved.extents().last().map_or(0, |(_, end)| page.phys(end).0);
        Fit { whole: why.is_empty(), supported, outside: pages_outside(memory, preserved), end, why }
    }
}

/// An inner node without an entry, of a tree that was read: no kernel makes one, for a node is made for what it leads to.
/// What a wrong address leads to often is one. The topmost one of an empty map is none.
fn empty_table(memory: &dyn PhysMemory, shape: Shape, root: u64) -> Option<u64> {
    let mut page = vec![0; usize::try_from(shape.page().bytes()).unwrap_or(0)];
    let mut nodes = vec![root];
    for _ in 1..shape.depth() {
        let mut below = Vec::new();
        for node in nodes {
            memory.read(Phys(node), &mut page).ok()?;
            let before = below.len();
            let children = page.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
            below.extend(children.filter(|child| *child != 0));
            if below.len() == before && node != root {
                return Some(node);
            }
        }
        nodes = below;
    }
    None
}

/// Whether a subtree's blob is what its size and name say: `None` where that cannot be told.
fn blob_is(memory: &dyn PhysMemory, subtree: &root::Subtree) -> Option<bool> {
    let known = matches!(&*subtree.name, "memblock" | "kho_test" | "LUO" | "kexec-metadata");
    let says_no = known.then_some(false);
    let Ok(head) = memory.read_vec("subtree", subtree.phys, 40.min(subtree.size.unwrap_or(40))) else {
        return Some(false);
    };
    if let Some(total) = crate::fdt::totalsize(&head) {
        let size = subtree.size.unwrap_or(total.into());
        return if u64::from(total) <= size && memory.contains(subtree.phys, size) { Some(true) } else { says_no };
    }
    let luo = subtree.name == "LUO" && (head.starts_with(LUO) || is_feature_header(&head));
    let metadata =
        subtree.name == "kexec-metadata" && head.starts_with(&1u32.to_le_bytes()) && subtree.size == Some(73);
    if luo || metadata { Some(true) } else { says_no }
}

/// What LUO's structure begins with, whatever its version.
const LUO: &[u8] = b"luo-v";

/// Whether memory begins with the header of a draft that has no version string (abi.md section 9): words of bits that
/// are supported, required and active, then zeros.
fn is_feature_header(head: &[u8]) -> bool {
    let (words, rest) = head.as_chunks::<8>();
    let [supported, required, active, reserved @ ..] = words else { return false };
    let [supported, required, active] = [supported, required, active].map(|word| u64::from_le_bytes(*word));
    let zeros = rest.is_empty() && !reserved.is_empty() && reserved.iter().all(|word| *word == [0; 8]);
    supported != 0 && (required | active) & !supported == 0 && zeros
}

const FDT_MAGIC: &[u8] = &[0xd0, 0x0d, 0xfe, 0xed];

/// A layout at which a handover is whole.
struct Whole {
    layout: Layout,
    runs: Vec<Run>,
    memory: Placed,
    reads: Reads,
    outside: u128,
}

impl Whole {
    fn handed(&self) -> Handed<'_> {
        let (root, reading, _) = &self.reads;
        Handed { root, page: reading.page, nodes: &reading.nodes, preserved: reading.preserved.tracker() }
    }

    /// Whether another layout has other bytes where something was handed over.
    fn differs(&self, other: &Whole) -> bool {
        let areas = differing(&self.runs, &other.runs);
        [self, other].iter().any(|w| !w.handed().pages_in(&areas, 1).is_empty())
    }
}

/// What a handover hands over, and what leads to it.
struct Handed<'a> {
    root: &'a Root,
    page: PageSize,
    nodes: &'a [PhysRange],
    preserved: &'a Tracker,
}

impl<'a> Handed<'a> {
    fn of(incoming: &'a Incoming) -> Self {
        let (root, preserved) = (incoming.root(), incoming.preserved());
        Handed { root, page: incoming.layout().page, nodes: incoming.map_nodes(), preserved }
    }

    /// Its pages in any of `areas`: at most `most` of them.
    fn pages_in(&self, areas: &[(u64, u64)], most: usize) -> Vec<u64> {
        let page = self.page.bytes();
        let step = usize::try_from(page).unwrap_or(usize::MAX);
        let inside = |phys: &u64| areas.iter().any(|&(start, end)| start <= *phys && *phys < end);
        let leads = std::iter::once(self.root.phys).chain(self.nodes.iter().map(|n| n.start));
        let leads = leads.chain(self.root.subtrees.iter().map(|s| s.phys)).map(|phys| phys.0).filter(inside);
        let folios = self.preserved.extents().flat_map(|(start, end)| {
            let (start, end) = (self.page.phys(start).0, self.page.phys(end).0);
            let clipped = areas.iter().map(move |&(from, to)| (start.max(from / page * page), end.min(to)));
            clipped.filter(|(start, end)| start < end).flat_map(move |(start, end)| (start..end).step_by(step))
        });
        leads.chain(folios).take(most).collect()
    }
}

/// The addresses at which two layouts have different places of the image.
fn differing(a: &[Run], b: &[Run]) -> Vec<(u64, u64)> {
    let mut cuts: Vec<u64> = a.iter().chain(b).flat_map(|run| [run.0, run.0 + run.2]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let other = |pair: &&[u64]| place_of(a, pair[0]) != place_of(b, pair[0]);
    cuts.windows(2).filter(other).map(|pair| (pair[0], pair[1])).collect()
}

/// One raw image.
struct Image<'a> {
    files: &'a Arc<FileMemory>,
    source: &'a Source,
    /// (place, address, bytes) as it is opened.
    opened: Vec<(u64, u64, u64)>,
    len: u64,
}

/// What a search over an image found, by place.
#[derive(Default)]
struct Traces {
    /// Pages that can be the root of a tree, or a chunk.
    trees: Vec<u64>,
    chunks: Vec<u64>,
    /// Devicetrees and their sizes.
    fdts: Vec<(u64, u64)>,
    luo: Vec<u64>,
}

/// A root FDT at a place in the image.
struct Candidate {
    place: u64,
    abi: &'static Abi,
    map: u64,
    subtrees: Vec<root::Subtree>,
}

impl<'a> Image<'a> {
    fn new(files: &'a Arc<FileMemory>, source: &'a Source, opened: Vec<(u64, u64, u64)>) -> Self {
        let len = opened.iter().map(|(place, _, len)| place + len).max().unwrap_or(0);
        Image { files, source, opened, len }
    }

    fn placed(&self, layout: Layout) -> Placed {
        Placed::new(self.files, &self.opened, &layout.runs(self.len))
    }

    /// Whether a handover that is whole as named may lie elsewhere in part: some of it lies where the usual layouts have
    /// a hole, or continue after one, and the caller did not say that this is one of them or there is nothing but zeros; or
    /// some of it is outside.
    fn is_doubtful(&self, fit: &Fit, incoming: &Incoming) -> bool {
        if fit.outside > 0 {
            return true;
        }
        let high = self.len > LOWEST_HOLE && fit.end > LOWEST_HOLE;
        high && !(self.is_usual() && {
            let handed = Handed::of(incoming);
            nonzero(&**self.files, handed.page, &handed.pages_in(&[(LOWEST_HOLE, u64::MAX)], SAMPLE)) > 0
        })
    }

    /// Whether the source names a machine, a hole, or where RAM begins on arm64: then it is believed where it fits.
    fn is_usual(&self) -> bool {
        let base = self.source.base.map(|base| base.0);
        self.source.board.is_some() || self.source.hole.is_some() || matches!(base, Some(GIB | 0x8000_0000))
    }

    fn error(&self, why: String) -> Error {
        Error::Source { path: self.source.path.clone(), problem: SourceProblem::Elsewhere { why } }
    }

    /// The layouts at which a handover is whole and leads to different bytes, the most usual of each first, and the one
    /// that is whole but for pages outside the image.
    fn search(&self, options: &Options, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<Search> {
        let flat = self.placed(Layout::flat(0));
        let found = find::find(&flat, &mut *progress)?;
        let mut places: BTreeSet<u64> = found.fdts.iter().map(|phys| phys.0).collect();
        if places.is_empty() {
            places = self.unaligned_roots(&flat, progress)?;
        }
        let mut by_rest: BTreeMap<u64, Vec<Candidate>> = BTreeMap::new();
        for &place in places.iter().take(MOST_ROOTS) {
            if let Some(candidate) = self.candidate(place) {
                by_rest.entry(place % STEP).or_default().push(candidate);
            }
        }
        let any = !by_rest.is_empty();
        let mut whole: Vec<Whole> = Vec::new();
        let mut partly: Option<Whole> = None;
        let as_named: Vec<Run> = self.opened.iter().map(|&(place, phys, len)| (phys, place, len)).collect();
        let mut supported = false;
        let mut budget = MOST_READ;
        for (rest, candidates) in by_rest {
            let traces = self.traces(rest, progress)?;
            for candidate in &candidates {
                let there = |s| blob_is(&**self.files, s);
                supported |= phys_of(&as_named, candidate.place).is_some()
                    && candidate.subtrees.iter().any(|s| there(s) == Some(true))
                    && candidate.subtrees.iter().all(|s| there(s) != Some(false));
                for layout in self.layouts(candidate, &traces, &found, options) {
                    if budget == 0 {
                        break;
                    }
                    let Some(fits) = self.try_layout(layout, candidate, options, &mut budget) else { continue };
                    if fits.outside > 0 {
                        partly.get_or_insert(fits);
                    } else if !whole.iter().any(|other| other.runs == fits.runs || !other.differs(&fits)) {
                        whole.push(fits);
                    }
                }
            }
        }
        Ok(Search { whole, partly, supported, any })
    }

    /// Places of root FDTs that begin inside a page of the image: what came before them is no whole number of pages.
    fn unaligned_roots(&self, flat: &Placed, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<BTreeSet<u64>> {
        /// Devicetrees that are read to see whether they are a root.
        const MOST: usize = 4096;
        let magic = memmem::Finder::new(FDT_MAGIC);
        let mut places = BTreeSet::new();
        let mut looked = 0;
        each_window(flat, progress, |at, bytes| {
            for hit in magic.find_iter(bytes) {
                let version = bytes.get(hit + 20..hit + 28);
                if looked < MOST && version.is_some_and(|v| v == [0, 0, 0, 17, 0, 0, 0, 16]) {
                    looked += 1;
                    if root::is_root(flat, Phys(at + hit as u64)) {
                        places.insert(at + hit as u64);
                    }
                }
            }
        })?;
        Ok(places)
    }

    /// The root FDT at a place, if its map can be anywhere.
    fn candidate(&self, place: u64) -> Option<Candidate> {
        // A root is read at whole pages only.
        let shift = (STEP - place % STEP) % STEP;
        let memory = self.placed(Layout { base: shift, cut: 0, hole: None });
        let Root { abi, map, subtrees, .. } = root::read_root(&memory, Phys(place + shift)).ok()?;
        let subtrees = match abi.size_property {
            Some(_) => subtrees,
            // What is taken for the size of a blob was read elsewhere.
            None => subtrees.into_iter().map(|s| root::Subtree { size: None, ..s }).collect(),
        };
        (map.0 != 0 && map.0 % STEP == 0 && map.0 < BEYOND).then_some(Candidate { place, abi, map: map.0, subtrees })
    }

    /// Looks at every page of the image that begins `rest` bytes into a page of the file.
    fn traces(&self, rest: u64, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<Traces> {
        let memory = self.placed(Layout { base: 0, cut: rest, hole: None });
        let mut traces = Traces::default();
        let mut after = 0;
        each_window(&memory, progress, |at, bytes| {
            let skip = usize::try_from(at.next_multiple_of(STEP) - at).unwrap_or(0);
            for (n, page) in (0u64..).zip(bytes.get(skip..).unwrap_or_default().as_chunks::<{ STEP as usize }>().0) {
                let phys = at + skip as u64 + n * STEP;
                // Windows overlap.
                if phys < after {
                    continue;
                }
                after = phys + STEP;
                let place = phys + rest;
                if let Some(total) = crate::fdt::totalsize(page) {
                    keep(&mut traces.fdts, (place, total.into()));
                } else if page.starts_with(LUO) {
                    keep(&mut traces.luo, place);
                } else if is_tree_root(page) {
                    keep(&mut traces.trees, place);
                } else if is_chunk(page) {
                    keep(&mut traces.chunks, place);
                }
            }
        })?;
        Ok(traces)
    }

    /// The layouts at which the map of a root, and its own address where something tells it, are where they must be; the
    /// usual ones first.
    fn layouts(&self, root: &Candidate, traces: &Traces, found: &Found, options: &Options) -> Vec<Layout> {
        let apart = |phys: u64, place: u64| phys.cast_signed().wrapping_sub(place.cast_signed());
        let nodes = match root.abi.map {
            MapFormat::Chunks => &traces.chunks,
            MapFormat::Radix { .. } => &traces.trees,
        };
        // Where two or more say the same: what is certain comes first.
        let told = found.pointers.iter().map(|p| p.fdt.0).chain(options.fdt_phys);
        let mut strong: BTreeSet<i64> = told.map(|phys| apart(phys, root.place)).collect();
        let mut weak: BTreeSet<i64> = BTreeSet::new();
        for subtree in &root.subtrees {
            let blobs = traces.fdts.iter().filter(|fdt| subtree.size.is_none_or(|size| size == fdt.1)).map(|fdt| fdt.0);
            let luo = traces.luo.iter().copied().filter(|_| subtree.name == "LUO");
            let into = if subtree.size.is_some() { &mut strong } else { &mut weak };
            into.extend(blobs.chain(luo).map(|place| apart(subtree.phys.0, place)));
        }
        weak.extend(nodes.iter().map(|&place| apart(root.map, place)));
        let possible = |d: &i64| d.unsigned_abs() < BEYOND && *d > -self.len.cast_signed();
        let bases: Vec<i64> = strong.iter().chain(&weak).copied().filter(possible).collect();
        let nodes: HashSet<u64> = nodes.iter().copied().collect();
        let mut layouts: Vec<Layout> = Vec::new();
        let mut seen = HashSet::new();
        let mut add = |layout: Layout| {
            let runs = layout.runs(self.len);
            // Both cost nothing: the map's first node is where one can be, and the root is where it was said to be.
            let node = place_of(&runs, root.map).is_some_and(|place| nodes.contains(&place));
            let fdt = phys_of(&runs, root.place).is_some_and(|phys| options.fdt_phys.is_none_or(|told| told == phys));
            if node && fdt && seen.insert(runs) {
                layouts.push(layout);
            }
        };
        for base in [0, GIB, 2 * GIB] {
            add(Layout { base, cut: 0, hole: None });
        }
        for board in Board::ALL {
            let (base, hole) = board.ram(self.len);
            add(Layout { base, cut: 0, hole });
        }
        let lows: BTreeSet<i64> =
            strong.iter().copied().filter(|d| possible(d) && *d >= 0).take(8).chain([0]).collect();
        for &base in &bases {
            for end in CONTINUES {
                let place = end.cast_signed() - base;
                for &low in &lows {
                    let start = low + place;
                    if base > low && 0 < place && start <= CONTINUES[0].cast_signed() && start < end.cast_signed() {
                        let hole = Some((start.unsigned_abs(), end));
                        add(Layout { base: low.unsigned_abs(), cut: 0, hole });
                    }
                }
            }
        }
        for low_split in [LOWEST_HOLE, 0xc000_0000, 0xe000_0000] {
            add(Layout { base: 0, cut: 0, hole: Some((low_split, CONTINUES[1])) });
        }
        for base in bases {
            add(Layout::flat(base));
        }
        layouts
    }

    /// Reads a root's map at a layout; `None` if it is not whole there.
    fn try_layout(&self, layout: Layout, root: &Candidate, options: &Options, budget: &mut usize) -> Option<Whole> {
        let runs = layout.runs(self.len);
        let memory = Placed::new(self.files, &self.opened, &runs);
        let fdt = phys_of(&runs, root.place)?;
        if !fdt.is_multiple_of(STEP) || !may_preserve(&memory, root.abi, root.map, fdt) {
            return None;
        }
        *budget -= 1;
        let reads = incoming::read(Place::Memory(&memory), Phys(fdt), &Found::default(), options).ok()?;
        let mut whole = Whole { layout, runs, memory, reads, outside: 0 };
        let fit = Fit::of(&whole.memory, &whole.handed());
        whole.outside = fit.outside;
        fit.whole.then_some(whole)
    }

    /// Of what was named and what was found, what is right.
    fn decide(
        &self,
        named: Result<(Fit, Incoming)>,
        search: Search,
        options: &Options,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Incoming> {
        let Search { mut whole, partly, supported, any } = search;
        let error = match named {
            Ok((fit, incoming)) if fit.whole => return self.decide_whole(fit, incoming, whole, options, progress),
            Ok((fit, incoming)) if whole.is_empty() && fit.supported => return Ok(incoming),
            Ok((fit, _)) => fit.why,
            Err(error) if whole.is_empty() => {
                if !any || supported && !error.leads_outside() {
                    return Err(error);
                }
                error.to_string()
            }
            Err(error) => error.to_string(),
        };
        let nr_whole = whole.len();
        drop_blank(&mut whole);
        match &whole[..] {
            [only] => {
                let certainty = if nr_whole == 1 { Certainty::Certain } else { Certainty::Likely };
                self.open_at(only, &error, certainty, options, progress)
            }
            [] => Err(self.error(self.nowhere(&error, partly.as_ref()))),
            _ => Err(self.error(self.several(&error, whole.iter().map(|w| w.layout.named(self.source))))),
        }
    }

    /// The handover is whole as named; `whole` is where it is as well.
    fn decide_whole(
        &self,
        fit: Fit,
        incoming: Incoming,
        whole: Vec<Whole>,
        options: &Options,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Incoming> {
        let as_named: Vec<Run> = self.opened.iter().map(|&(place, phys, len)| (phys, place, len)).collect();
        let handed = Handed::of(&incoming);
        let mut others = Vec::new();
        for other in whole {
            let areas = differing(&as_named, &other.runs);
            let (mine, theirs) = (handed.pages_in(&areas, SAMPLE), other.handed().pages_in(&areas, SAMPLE));
            if mine.is_empty() && theirs.is_empty() {
                continue;
            }
            let filled = nonzero(&**self.files, handed.page, &mine) > 0;
            let other_filled = nonzero(&other.memory, other.reads.1.page, &theirs) > 0;
            // What a hole would leave out is there, and it is blank as a hole is: nothing is left out.
            let kept = || match other.layout.hole {
                Some((start, end)) => is_blank(&**self.files, start, end),
                None => Ok(false),
            };
            let ruled_out = match self.is_usual() {
                true => fit.outside == 0 && (filled || !other_filled),
                false => filled && (!other_filled || kept()?),
            };
            if !ruled_out {
                others.push(other);
            }
        }
        let outside = fit.outside;
        match &others[..] {
            [] if outside > 0 && self.source.base.is_none() => {
                let here = self.named_as_is();
                Err(self.error(format!(
                    "{outside} preserved pages lie outside if it begins at 0: it is a part of a memory, or leaves out a \
                     hole that no known machine has; say {here} if it begins there, or where each part of it lies \
                     (FILE@ADDRESS,offset=N,size=N)"
                )))
            }
            [] => Ok(incoming),
            [only] if outside > 0 => {
                let why = format!("{outside} preserved pages lie outside");
                self.open_at(only, &why, Certainty::Likely, options, progress)
            }
            _ => {
                let mut named: Vec<Source> = others.iter().map(|other| other.layout.named(self.source)).collect();
                if outside == 0 {
                    named.insert(0, self.named_as_is());
                }
                let why = "the map and what leads to it are whole, but folios may lie elsewhere".to_string();
                Err(self.error(self.several(&why, named.into_iter())))
            }
        }
    }

    /// The source as it was named, not to be doubted.
    fn named_as_is(&self) -> Source {
        let base = if self.source.board.is_some() { None } else { Some(self.source.base.unwrap_or_default()) };
        Source { base, check: false, ..self.source.clone() }
    }

    /// Opens the handover at a layout, and says that it did.
    fn open_at(
        &self,
        whole: &Whole,
        why: &str,
        certainty: Certainty,
        options: &Options,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Incoming> {
        let memory: Arc<dyn PhysMemory> = Arc::new(self.placed(whole.layout));
        let incoming = Incoming::open(memory, options, progress)?;
        let how = match certainty {
            Certainty::Certain => "at this address alone",
            _ => "of the addresses that fit, at this one alone the folios that differ hold data, and",
        };
        let placement = Placement {
            argument: whole.layout.named(self.source).to_string(),
            named: self.source.to_string(),
            as_is: self.named_as_is().to_string(),
            certainty,
            why: format!(
                "as named, {why}; {how} the map preserves the root FDT at {} and every subtree, and all of it lies in \
                 the file",
                whole.reads.0.phys
            ),
        };
        Ok(incoming.addressed(Address::Solved(placement)))
    }

    fn several(&self, why: &str, sources: impl Iterator<Item = Source>) -> String {
        let sources: Vec<_> = sources.map(|source| source.to_string()).collect();
        let more = if sources.len() > MOST_NAMED {
            format!(" and {} more", sources.len() - MOST_NAMED)
        } else {
            String::new()
        };
        let named = sources.iter().take(MOST_NAMED).map(String::as_str).collect::<Vec<_>>().join(" or ");
        format!("{why}; several addresses fit: name the one that is right, as {named}{more}")
    }

    fn nowhere(&self, why: &str, partly: Option<&Whole>) -> String {
        let as_is = self.named_as_is();
        let advice = match partly {
            Some(partly) => format!(
                "it fits best as {}, where {} preserved pages are not in the file: say so if it is a part of a memory",
                partly.layout.named(self.source),
                partly.outside
            ),
            None => "at no address is it whole: this is a part of a memory, or the map was overwritten since".into(),
        };
        format!(
            "{why}: this memory does not begin there; {advice}. Name where it begins (FILE@0x40000000), or where each part \
             lies (FILE@ADDRESS,offset=N,size=N); {as_is} reads it as it is"
        )
    }
}

/// What a search came to.
struct Search {
    /// Layouts at which a handover is whole, of those that lead to the same bytes the most usual.
    whole: Vec<Whole>,
    /// One at which it is whole but for folios outside.
    partly: Option<Whole>,
    /// As named, a subtree of a root lies where the root says.
    supported: bool,
    /// Whether there is any root FDT whose map can be somewhere.
    any: bool,
}

/// Of several layouts drops those under which what they disagree about is blank, unless it is under all.
fn drop_blank(whole: &mut Vec<Whole>) {
    if whole.len() < 2 {
        return;
    }
    let mut areas = Vec::new();
    for (n, one) in whole.iter().enumerate() {
        for other in &whole[n + 1..] {
            areas.extend(differing(&one.runs, &other.runs));
        }
    }
    let filled: Vec<bool> =
        whole.iter().map(|w| nonzero(&w.memory, w.reads.1.page, &w.handed().pages_in(&areas, SAMPLE)) > 0).collect();
    if filled.contains(&true) {
        let mut filled = filled.into_iter();
        whole.retain(|_| filled.next().unwrap_or(true));
    }
}

/// How many of these pages hold something other than zeros.
fn nonzero(memory: &dyn PhysMemory, page: PageSize, pages: &[u64]) -> usize {
    let mut bytes = vec![0; usize::try_from(page.bytes()).unwrap_or(0)];
    let mut filled = |phys: u64| memory.read(Phys(phys), &mut bytes).is_ok() && bytes.iter().any(|&b| b != 0);
    pages.iter().filter(|&&phys| filled(phys)).count()
}

/// Whether the memory has nothing but zeros, or nothing, from `start` to before `end`.
fn is_blank(memory: &dyn PhysMemory, start: u64, end: u64) -> Result<bool> {
    let mut window = vec![0; WINDOW];
    let mut next = memory.next_data(Phys(start))?;
    while let Some(run) = next.filter(|run| run.start.0 < end) {
        let last = (run.start.0 + (run.len - 1)).min(end - 1);
        let mut at = run.start.0;
        while at <= last {
            let size = usize::try_from(last - at).unwrap_or(usize::MAX).min(WINDOW - 1) + 1;
            memory.read(Phys(at), &mut window[..size])?;
            if window[..size].iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
            at += size as u64;
        }
        next = memory.next_data(Phys(last + 1))?;
    }
    Ok(true)
}

const WINDOW: usize = 1 << 20;
/// What a window repeats of the one before it, so that nothing is missed on the seam.
const OVERLAP: u64 = STEP;
/// Pages that are looked at to see whether folios hold data.
const SAMPLE: usize = 1024;

/// Reads everything that is not a hole in windows of whole pages, and gives each with its address to `look`.
fn each_window(
    memory: &dyn PhysMemory,
    progress: &mut dyn FnMut(u64) -> Result<()>,
    mut look: impl FnMut(u64, &[u8]),
) -> Result<()> {
    let mut window = vec![0; WINDOW];
    let mut seen = 0;
    let mut next = memory.next_to_search(Phys(0))?;
    while let Some(PhysRange { start, len }) = next {
        let end = start.0 + len;
        let whole = (start.0 / STEP * STEP, end.next_multiple_of(STEP));
        let inside = |from: u64, to: u64| memory.contains(Phys(from), to - from);
        let mut at = if inside(whole.0, end) { whole.0 } else { start.0 };
        let end = if inside(at, whole.1) { whole.1 } else { end };
        loop {
            let size = usize::try_from(end - at).unwrap_or(usize::MAX).min(WINDOW);
            memory.read(Phys(at), &mut window[..size])?;
            look(at, &window[..size]);
            seen += size as u64;
            progress(seen)?;
            if size as u64 == end - at {
                break;
            }
            at += WINDOW as u64 - OVERLAP;
        }
        next = memory.next_to_search(Phys(end))?;
    }
    Ok(())
}

fn keep<T>(kept: &mut Vec<T>, one: T) {
    if kept.len() < MOST_PAGES {
        kept.push(one);
    }
}

/// Whether a page can be the first of the topmost node of a tree. A key's topmost bits tell the folio's order, and below
/// 2^52 all others of the topmost index are 0: entries are at 0, or a power of two.
fn is_tree_root(page: &[u8; STEP as usize]) -> bool {
    let mut entries = 0;
    for (index, word) in page.as_chunks::<8>().0.iter().enumerate() {
        let child = u64::from_le_bytes(*word);
        if child != 0 {
            if index & index.wrapping_sub(1) != 0 || child % STEP != 0 || child >= BEYOND {
                return false;
            }
            entries += 1;
        }
    }
    entries > 0
}

/// Whether a page can be the first of a chunk.
fn is_chunk(page: &[u8; STEP as usize]) -> bool {
    let word = |n: usize| page.as_chunks::<8>().0.get(n).map_or(0, |word| u64::from_le_bytes(*word));
    let (next, order, num) = (word(0), word(1) & 0xffff_ffff, word(1) >> 32);
    let most = chunk_entries(PageSize::Size64K);
    if next % STEP != 0 || next >= BEYOND || order > 52 || num == 0 || num > most {
        return false;
    }
    let entries = usize::try_from(num.min(chunk_entries(PageSize::Size4K))).unwrap_or(0);
    (0..entries).all(|n| {
        let (start, bitmap) = (word(2 + 2 * n), word(3 + 2 * n));
        start % STEP == 0 && bitmap % 8 == 0 && bitmap != 0 && bitmap < BEYOND
    })
}

/// Whether a map can preserve the page of the root FDT, by the one path through a tree that says so. A list of chunks
/// has none: it is read.
fn may_preserve(memory: &dyn PhysMemory, abi: &Abi, map: u64, fdt: u64) -> bool {
    PageSize::ALL.into_iter().any(|page| {
        let Some(shape) = Shape::of(abi, page) else { return true };
        fdt.is_multiple_of(page.bytes()) && radix::leads_to(memory, shape, Phys(map), page.pfn(Phys(fdt)))
    })
}
