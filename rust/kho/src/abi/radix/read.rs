//! Reading a tree: walk its nodes, read its leaves or use them in place.

#![forbid(unsafe_code)]

use super::Shape;
use crate::abi::budget::Budget;
use crate::abi::preserved::{InPlace, Preserved};
use crate::error::{Error, MapProblem, Result};
use crate::memory::{PhysMemory, PhysRange};
use crate::tracker::{Bitmap, Geometry, Tracker};
use crate::units::{Order, Pfn, Phys};
use std::collections::HashSet;

const NODE: &str = "tree node";

fn bad(phys: u64, problem: MapProblem) -> Error {
    Error::Map { node: NODE, phys, problem }
}

/// A tree that was read.
#[derive(Debug)]
pub struct Tree {
    /// The folios it preserves.
    pub tracker: Tracker,
    /// The address of every node's page, inner nodes before what they lead to.
    pub nodes: Vec<u64>,
}

/// An inner node on the way down.
struct Open {
    level: u32,
    /// The key's bits that led here, in place.
    prefix: u64,
    table: Vec<u64>,
    next: usize,
}

/// Reads the tree at `root`. Every node is a whole page of `memory` and is read once; of a page that the memory only
/// claims (a zero-filled tail, a hole) nothing is read or kept, so that time and space go with what is there.
///
/// A single page's key that lost its topmost bit (kho-v2 at 16 KiB) is read as what it was meant to be; the next
/// kernel itself finds a folio of another order.
///
/// # Errors
/// [`Error::Map`] at the first node that is unaligned, outside, or reached twice, and at a leaf with the key of no folio;
/// what reading memory returns.
pub fn read(memory: &dyn PhysMemory, shape: Shape, root: Phys) -> Result<Tree> {
    let mut tracker = Tracker::new(Geometry::paged(shape.page));
    let data = data_runs(memory)?;
    let mut left = Budget::new(memory);
    let nodes = walk(memory, &data, shape, root, |phys, prefix| {
        let Some(bitmap) = read_node(memory, &data, shape, phys)? else { return Ok(()) };
        left.take(phys, shape.page.bytes(), true, bad)?;
        match shape.leaf(phys, prefix, || Ok(bitmap.clone()))? {
            Leaf::Folios(folios) => {
                folios.into_iter().try_for_each(|(pfn, order)| tracker.preserve(pfn, order).map(drop))
            }
            Leaf::Block(order, index) => tracker.adopt_block(order, index, &bitmap).map(drop),
        }
    })?;
    Ok(Tree { tracker, nodes })
}

/// The shape that a tree was written with: the given one, unless only the other one of its page size leads to the page of
/// the root FDT. At 16 KiB pages Linux 7.1-rc1 to rc5 wrote a level less than every release, under the same compatible.
pub fn written(memory: &dyn PhysMemory, shape: Shape, root: Phys, fdt: Pfn) -> Shape {
    let other = shape.other();
    let leads = |shape| leads_to(memory, shape, root, fdt);
    if other.depth() != shape.depth() && !leads(shape) && leads(other) { other } else { shape }
}

/// Whether the one path of a single page's key leads through a tree to a bit that is set. No more is read than the path.
pub fn leads_to(memory: &dyn PhysMemory, shape: Shape, root: Phys, page: Pfn) -> bool {
    let key = shape.key(page, Order::ZERO);
    let mut node = root.0;
    for level in (1..shape.depth()).rev() {
        let mut child = [0; 8];
        let Some(at) = node.checked_add(8 * shape.index(key, level)) else { return false };
        if memory.read(Phys(at), &mut child).is_err() {
            return false;
        }
        node = u64::from_le_bytes(child);
        if node == 0 || !node.is_multiple_of(shape.page.bytes()) {
            return false;
        }
    }
    let bit = key & ((1 << shape.leaf_bits()) - 1);
    let mut byte = [0; 1];
    let at = node.checked_add(bit / 8);
    at.is_some_and(|at| memory.read(Phys(at), &mut byte).is_ok()) && byte[0] >> (bit % 8) & 1 != 0
}

/// Takes over the tree at `root` of an arena: what its leaves are, where they are, and the address of every node as in
/// [`Tree`].
///
/// # Errors
/// As [`read`].
pub fn inherit(arena: &dyn InPlace, shape: Shape, root: Phys) -> Result<(Preserved, Vec<u64>)> {
    let mut inherited = arena.collect(Geometry::paged(shape.page));
    let nodes = walk(arena, arena.ranges(), shape, root, |phys, prefix| {
        match shape.leaf(phys, prefix, || arena.read_vec(NODE, Phys(phys), shape.page.bytes()))? {
            Leaf::Folios(folios) => folios.into_iter().try_for_each(|(pfn, order)| inherited.preserve(pfn, order)),
            Leaf::Block(order, index) => inherited.add(Bitmap { order, index, phys: Phys(phys) }),
        }
    })?;
    Ok((inherited.finish()?, nodes))
}

impl Shape {
    /// What the leaf at `phys` is whose keys are `prefix` and up. Its bitmap is asked for only where the keys do not tell.
    fn leaf(self, phys: u64, prefix: u64, bitmap: impl FnOnce() -> Result<Vec<u8>>) -> Result<Leaf> {
        let refuse = |index, value, why| Err(bad(phys, MapProblem::Entry { index, value, why }));
        if prefix == 0 {
            let mut folios = Vec::new();
            for key in set_bits(&bitmap()?) {
                match self.folio(key) {
                    Ok(folio) => folios.push(folio),
                    Err(why) => return refuse(key, key, why),
                }
            }
            return Ok(Leaf::Folios(folios));
        }
        match self.folio(prefix) {
            Ok((pfn, order)) => Ok(Leaf::Block(order, pfn.0 >> order.get() >> self.leaf_bits())),
            Err(why) => match set_bits(&bitmap()?).next() {
                Some(bit) => refuse(bit, prefix | bit, why),
                None => Ok(Leaf::Folios(Vec::new())),
            },
        }
    }
}

/// What a leaf is.
enum Leaf {
    /// A block of one order: the leaf's page is its bitmap.
    Block(Order, u64),
    /// Folios of several orders, if any.
    Folios(Vec<(Pfn, Order)>),
}

/// Visits every node once, and calls `leaf` with each leaf's address and the bits of its keys above its own. Returns every
/// node's address, inner nodes before what they lead to. Of the leaves nothing is read.
fn walk(
    memory: &dyn PhysMemory,
    data: &[PhysRange],
    shape: Shape,
    root: Phys,
    mut leaf: impl FnMut(u64, u64) -> Result<()>,
) -> Result<Vec<u64>> {
    let max = memory.room().items();
    let mut nodes = Vec::new();
    let mut seen = HashSet::new();
    let mut open: Vec<Open> = Vec::new();
    let mut visit = Some((root.0, shape.depth() - 1, 0));
    loop {
        if let Some((phys, level, prefix)) = visit.take() {
            enter(memory, shape, phys, &mut seen)?;
            if nodes.len() as u64 >= max {
                return Err(bad(phys, MapProblem::TooMany { max }));
            }
            nodes.push(phys);
            if level == 0 {
                leaf(phys, prefix)?;
            } else if let Some(page) = read_node(memory, data, shape, phys)? {
                let (words, _) = page.as_chunks::<8>();
                let table = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
                open.push(Open { level, prefix, table, next: 0 });
            }
        }
        let Some(node) = open.last_mut() else { return Ok(nodes) };
        let found = node.table.iter().enumerate().skip(node.next).find(|(_, child)| **child != 0);
        let Some((index, &child)) = found else {
            open.pop();
            continue;
        };
        node.next = index + 1;
        visit = Some((child, node.level - 1, node.prefix | (index as u64) << shape.level_shift(node.level)));
    }
}

/// Bounds a node before it is read.
fn enter(memory: &dyn PhysMemory, shape: Shape, phys: u64, seen: &mut HashSet<u64>) -> Result<()> {
    let page = shape.page.bytes();
    if !phys.is_multiple_of(page) {
        return Err(bad(phys, MapProblem::Unaligned { page }));
    }
    if !memory.contains(Phys(phys), page) {
        return Err(bad(phys, MapProblem::Outside { len: page }));
    }
    if seen.insert(phys) { Ok(()) } else { Err(bad(phys, MapProblem::Shared)) }
}

/// Where the memory has more to give than zeros, ascending: collected once, for asking it at every node could cost a walk
/// over all of an image's empty segments each time.
fn data_runs(memory: &dyn PhysMemory) -> Result<Vec<PhysRange>> {
    let mut runs = Vec::new();
    let mut next = memory.next_data(Phys(0))?;
    while let Some(run) = next {
        runs.push(run);
        let after = run.start.0.checked_add(run.len);
        next = after.map_or(Ok(None), |after| memory.next_data(Phys(after)))?;
    }
    Ok(runs)
}

/// A node's page; `None` if there are but zeros.
fn read_node(memory: &dyn PhysMemory, data: &[PhysRange], shape: Shape, phys: u64) -> Result<Option<Vec<u8>>> {
    let page = shape.page.bytes();
    if let Some(error) = memory.absent(Phys(phys), page) {
        return Err(error);
    }
    let run = data.get(data.partition_point(|run| run.start.0 + (run.len - 1) < phys));
    match run {
        Some(run) if run.start.0 <= phys | (page - 1) => memory.read_vec(NODE, Phys(phys), page).map(Some),
        _ => Ok(None),
    }
}

/// The numbers of the bits set, ascending; bit `i` is byte `i / 8`, bit `i % 8`.
fn set_bits(bitmap: &[u8]) -> impl Iterator<Item = u64> + '_ {
    (0u64..)
        .zip(bitmap)
        .flat_map(|(n, &byte)| (0..8).filter(move |bit| byte >> bit & 1 != 0).map(move |bit| 8 * n + bit))
}
