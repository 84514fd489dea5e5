//! The two forms in which an unfinished handover keeps its map and its root FDT.
//!
//! ```text
//!            map                              root FDT
//! written    chunks, when serialized          sequential writer, when serialized      kho-v1
//! live       a tree, led to every new block   edited whenever a subtree comes or goes kho-v2 and later
//! ```
//! Some kernels that write kho-v1 have chunks and an edited root: its map is 0 until the chunks are written
//! ([`RootForm::Edited`]).

#![forbid(unsafe_code)]

use crate::abi::radix::Shape;
use crate::abi::{Abi, COMPATIBLE_PROPERTY, chunk};
use crate::error::{Error, Result};
use crate::fdt::{FdtEditor, FdtWriter};
use crate::tracker::Tracker;
use crate::units::{Order, Pfn, Phys};
use crate::write::arena::{Arena, Owner};
use crate::write::outgoing::live_tree::LiveTree;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks a tracker; a panic in another thread leaves it usable.
pub(super) fn lock(tracker: &Mutex<Tracker>) -> MutexGuard<'_, Tracker> {
    tracker.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the root FDT is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RootForm {
    /// As the ABI has it: in one pass when it is serialized, unless map and root are always in force.
    #[default]
    OfAbi,
    /// At the start, with map 0 where the map is written later; then edited as subtrees come and go.
    Edited,
}

/// A subtree of a handover in the making.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutSubtree {
    /// The name of its node.
    pub name: String,
    /// The physical address of its blob.
    pub phys: Phys,
    /// Bytes of its blob.
    pub size: u64,
    /// The folio made for the blob; `None` for a blob that was in the arena already.
    pub(super) folio: Option<(Pfn, Order)>,
}

/// The map of a handover in the making.
#[derive(Debug)]
pub(super) enum Map {
    Chunks {
        /// Where the first chunk is wanted.
        first: Option<Pfn>,
        /// The pages of the map as last serialized.
        pages: Vec<Pfn>,
    },
    Tree(LiveTree),
}

impl Map {
    pub(super) fn new(arena: &Arc<Arena>, abi: &Abi, at: Option<Pfn>) -> Result<Self> {
        match Shape::of(abi, arena.page()) {
            Some(shape) => Ok(Map::Tree(LiveTree::new(arena, shape, at)?)),
            None => {
                let first = at.map(|pfn| arena.alloc_own_at(pfn, Owner::Node)).transpose()?;
                Ok(Map::Chunks { first, pages: Vec::new() })
            }
        }
    }

    /// Makes room for folios that are about to be marked.
    pub(super) fn prepare(
        &mut self,
        tracker: &mut Tracker,
        mut folios: impl Iterator<Item = (Pfn, Order)>,
    ) -> Result<()> {
        let Map::Tree(tree) = self else { return Ok(()) };
        let bits = tracker.geometry().bits();
        let mut last = None;
        folios.try_for_each(|(pfn, order)| {
            let block = (order, (pfn.0 >> order.get()) / bits);
            if last.replace(block) == Some(block) { Ok(()) } else { tree.prepare(tracker, order, block.1) }
        })
    }

    /// Makes room for `count` folios of an order that follow each other, by their numbers.
    pub(super) fn prepare_run(&mut self, tracker: &mut Tracker, order: Order, first: u64, count: u64) -> Result<()> {
        let Map::Tree(tree) = self else { return Ok(()) };
        let bits = tracker.geometry().bits();
        (first / bits..(first + count).div_ceil(bits)).try_for_each(|block| tree.prepare(tracker, order, block))
    }

    /// Makes room for everything another tracker holds; for its empty blocks too if they are of the same size.
    pub(super) fn prepare_all(&mut self, tracker: &mut Tracker, other: &Tracker) -> Result<()> {
        let same = other.geometry() == tracker.geometry();
        let blocks = other.orders().flat_map(|order| other.blocks(order)).filter(|block| same || !block.is_empty());
        let Map::Tree(tree) = self else {
            let empty = vec![0; usize::try_from(other.geometry().block_bytes()).unwrap_or(0)];
            return blocks
                .filter(|block| block.is_empty())
                .try_for_each(|block| tracker.adopt_block(block.order(), block.index(), &empty).map(drop));
        };
        let (theirs, bits) = (other.geometry().bits(), tracker.geometry().bits());
        { blocks }.try_for_each(|block| tree.prepare(tracker, block.order(), block.index() * theirs / bits))
    }

    /// Brings the map up to date after folios were marked or unmarked.
    pub(super) fn settle(&self, tracker: &Tracker) -> Result<()> {
        match self {
            Map::Chunks { .. } => Ok(()),
            Map::Tree(tree) => tree.settle(tracker),
        }
    }

    /// The address of the first chunk, 0 while there is none, or of the root.
    pub(super) fn phys(&self, arena: &Arena) -> Phys {
        match self {
            Map::Chunks { pages, .. } => pages.first().map_or(Phys(0), |pfn| arena.page().phys(*pfn)),
            Map::Tree(tree) => tree.root(),
        }
    }

    /// Writes chunks next to those of an earlier call (but for the one whose place the caller chose), and returns their
    /// pages; a tree has nothing to write.
    pub(super) fn write(&mut self, arena: &Arena, tracker: &Mutex<Tracker>) -> Result<Vec<Pfn>> {
        let Map::Chunks { first, pages } = self else { return Ok(Vec::new()) };
        // The lock is not held any longer than this, because freeing pages takes it too.
        let (new, written) = {
            let tracker = lock(tracker);
            let nr = chunk::nr_chunks(&tracker);
            let first = first.filter(|_| nr > 0);
            let mut new: Vec<Pfn> = first.into_iter().collect();
            new.extend(arena.alloc_pages(nr - new.len() as u64, Owner::Node)?);
            let mut next = new.iter().map(|pfn| arena.page().phys(*pfn));
            let page = || {
                let phys = next.next().ok_or(Error::NoMemory { order: 0, node: None })?;
                Ok((phys, arena.page_items(phys)?))
            };
            let written = chunk::serialize(&tracker, page);
            (new, written)
        };
        if let Err(e) = written {
            free(arena, new, *first);
            return Err(e);
        }
        Ok(std::mem::replace(pages, new))
    }

    /// Frees pages that [`Map::write`] returned.
    pub(super) fn free_old(&self, arena: &Arena, old: Vec<Pfn>) {
        if let Map::Chunks { first, .. } = self {
            free(arena, old, *first);
        }
    }

    /// Frees what was serialized; a tree stays, as it is always in force.
    pub(super) fn take_back(&mut self, arena: &Arena) {
        if let Map::Chunks { first, pages } = self {
            free(arena, std::mem::take(pages), *first);
        }
    }

    /// Frees everything.
    pub(super) fn free(&mut self, arena: &Arena) {
        match self {
            Map::Chunks { first, pages } => {
                free(arena, std::mem::take(pages), *first);
                free(arena, Vec::from_iter(first.take()), None);
            }
            Map::Tree(tree) => tree.free(),
        }
    }
}

/// Frees pages that were allocated for the map, except the one whose place the caller chose.
fn free(arena: &Arena, pages: Vec<Pfn>, except: Option<Pfn>) {
    arena.put_own(pages.into_iter().filter(|pfn| Some(*pfn) != except));
}

/// The root FDT as libfdt's sequential writer makes it in one page.
pub(super) fn write_root<'a>(
    capacity: usize,
    abi: &Abi,
    map: Phys,
    subtrees: impl IntoIterator<Item = &'a OutSubtree>,
) -> Result<Vec<u8>> {
    let mut w = FdtWriter::new(capacity);
    w.begin_node("")?;
    w.property_str(COMPATIBLE_PROPERTY, abi.compatible)?;
    w.property_u64(abi.map_property, map.0)?;
    for subtree in subtrees {
        w.begin_node(&subtree.name)?;
        w.property_u64(abi.subtree_property, subtree.phys.0)?;
        if let Some(property) = abi.size_property {
            w.property_u64(property, subtree.size)?;
        }
        w.end_node()?;
    }
    w.end_node()?;
    w.finish()
}

/// A root FDT that leads to another map; nothing moves in it (kho_finalize of a root that is edited).
pub(super) fn with_map(root: &[u8], capacity: usize, abi: &Abi, map: Phys) -> Result<Vec<u8>> {
    let mut e = FdtEditor::open_into(root, capacity)?;
    e.set_property(e.root(), abi.map_property, &map.0.to_le_bytes())?;
    Ok(e.pack())
}

/// A root FDT with one subtree more, edited in one page (kho_add_subtree).
pub(super) fn add_to_root(root: &[u8], capacity: usize, abi: &Abi, subtree: &OutSubtree) -> Result<Vec<u8>> {
    let mut e = FdtEditor::open_into(root, capacity)?;
    let node = e.add_subnode(e.root(), &subtree.name)?;
    e.set_property(node, abi.subtree_property, &subtree.phys.0.to_le_bytes())?;
    if let Some(property) = abi.size_property {
        e.set_property(node, property, &subtree.size.to_le_bytes())?;
    }
    Ok(e.pack())
}

/// A root FDT with one subtree less (kho_remove_subtree). Its strings stay.
pub(super) fn remove_from_root(root: &[u8], capacity: usize, name: &str) -> Result<Vec<u8>> {
    let mut e = FdtEditor::open_into(root, capacity)?;
    e.delete_node(e.subnode(e.root(), name)?)?;
    Ok(e.pack())
}
