//! The radix tree of an unfinished handover: kept in an arena's pages, and always in force (`kho_radix_add_page`,
//! `kho_radix_del_page`).
//!
//! ```text
//! root -> inner nodes -> the tracker's blocks, which are the leaves
//! ```
//! Marking or unmarking a folio changes one bit of a tracker's block, and that is the change of the tree. What is left to
//! do is to lead to blocks that are new. As in the kernel, nothing is freed when a leaf becomes empty.

#![forbid(unsafe_code)]

use crate::abi::radix::Shape;
use crate::error::{Error, Result};
use crate::memory::PhysMemory;
use crate::tracker::Tracker;
use crate::units::{Order, Pfn, Phys};
use crate::write::arena::{Arena, Owner};
use std::sync::Arc;

/// The inner nodes of a tree whose leaves are blocks of a tracker in the same arena.
#[derive(Debug)]
pub(super) struct LiveTree {
    arena: Arc<Arena>,
    shape: Shape,
    /// The root first.
    nodes: Vec<Pfn>,
    /// The leaf of the lowest keys, a copy of several orders' blocks.
    low: Option<Phys>,
    /// An empty block's bitmap.
    blank: Vec<u8>,
}

impl LiveTree {
    /// An empty tree, its root in a new page or the one at `at`.
    ///
    /// # Errors
    /// [`Error::NoMemory`]; [`Error::PageState`] if the place is in use.
    pub(super) fn new(arena: &Arc<Arena>, shape: Shape, at: Option<Pfn>) -> Result<Self> {
        let (root, _) = arena.alloc_bytes(shape.page().bytes(), at, Owner::Node)?;
        let blank = vec![0; usize::try_from(shape.page().bytes()).unwrap_or(0)];
        Ok(LiveTree { arena: Arc::clone(arena), shape, nodes: vec![root], low: None, blank })
    }

    /// The address of the root.
    pub(super) fn root(&self) -> Phys {
        self.shape.page().phys(self.nodes.first().copied().unwrap_or_default())
    }

    /// Makes a block of `tracker` and the nodes that lead to it, unless it exists. A block that exists is led to: to keep
    /// it so, blocks are made here only.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an order the tree cannot hold, or a tracker that is not in the arena; [`Error::NoMemory`].
    /// Then there is no such block.
    pub(super) fn prepare(&mut self, tracker: &mut Tracker, order: Order, index: u64) -> Result<()> {
        if tracker.block(order, index).is_some() {
            return Ok(());
        }
        self.shape.check_writable(order, index)?;
        if self.shape.is_low(order) {
            if self.low.is_none() {
                let entry = self.entry_of_leaf(0)?;
                let leaf = self.node()?;
                self.set(entry, leaf)?;
                self.low = Some(leaf);
            }
            return tracker.adopt_block(order, index, &self.blank).map(drop);
        }
        let entry = self.entry_of_leaf(self.shape.leaf_of(order, index))?;
        tracker.adopt_block(order, index, &self.blank)?;
        let block = tracker.block(order, index).and_then(|block| block.phys());
        let homeless = || Error::Invalid { what: "tracker", why: "its blocks are not in an arena".into() };
        self.set(entry, block.ok_or_else(homeless)?)
    }

    /// Brings the leaf of the lowest keys up to date with the tracker; the others always are.
    ///
    /// # Errors
    /// None for a tree in its arena.
    pub(super) fn settle(&self, tracker: &Tracker) -> Result<()> {
        let Some(leaf) = self.low else { return Ok(()) };
        for order in tracker.orders().filter(|order| self.shape.is_low(*order)) {
            // An order of 2^b folios has the keys 2^b to 2^(b+1) - 1, and all of them in its first block.
            let bytes = (self.shape.key(Pfn(0), order) / 8) as usize;
            if let Some(block) = tracker.block(order, 0) {
                let mut bits = vec![0; bytes];
                block.copy_to(&mut bits);
                self.arena.write_own(Phys(leaf.0 + bytes as u64), &bits)?;
            }
        }
        Ok(())
    }

    /// Frees the nodes. The tree is gone then.
    pub(super) fn free(&mut self) {
        self.low = None;
        self.arena.put_own(self.nodes.drain(..));
    }

    /// The address of the entry that leads to a leaf, named by its keys' bits above its own; the nodes above it are made.
    fn entry_of_leaf(&mut self, leaf: u64) -> Result<Phys> {
        let key = leaf << self.shape.leaf_bits();
        let mut node = self.root();
        for level in (1..self.shape.depth()).rev() {
            let entry = Phys(node.0 + 8 * self.shape.index(key, level));
            if level == 1 {
                return Ok(entry);
            }
            let mut word = [0; 8];
            self.arena.read(entry, &mut word)?;
            node = match u64::from_le_bytes(word) {
                0 => {
                    let new = self.node()?;
                    self.set(entry, new)?;
                    new
                }
                child => Phys(child),
            };
        }
        Ok(node)
    }

    /// A new, zeroed page.
    fn node(&mut self) -> Result<Phys> {
        let (pfn, _) = self.arena.alloc_bytes(self.shape.page().bytes(), None, Owner::Node)?;
        self.nodes.push(pfn);
        Ok(self.shape.page().phys(pfn))
    }

    fn set(&self, entry: Phys, child: Phys) -> Result<()> {
        self.arena.write_own(entry, &child.0.to_le_bytes())
    }
}
