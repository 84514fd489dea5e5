//! The map of kho-v2, v3 and v4: a radix tree, every node a page (ABI section 4, kernel/liveupdate/kexec_handover.c).
//!
//! ```text
//! key   1 | folio number             the place of the 1 tells the order: bit 64 - PAGE_SHIFT - order
//!       [ index | ... | index | bit ]
//!         root    inner    inner  leaf
//! ```
//! A leaf holds as many bits as a tracker's block of one page. The keys it covers are one order's, and the leaf is that
//! very block, as soon as the order's bit stands above them; only the leaf of the lowest keys mixes orders, those of
//! 64 TiB a folio and more.

#![forbid(unsafe_code)]

use super::chunk::Left;
use super::{ABIS, Abi, MapFormat};
use crate::arena::{Arena, Inherited};
use crate::claims::Preserved;
use crate::error::{Error, MapProblem, Result};
use crate::memory::{PhysMemory, PhysRange};
use crate::tracker::{Bitmap, Geometry, Tracker};
use crate::units::{Order, PageSize, Pfn, Phys};
use std::collections::{BTreeMap, HashSet};

const NODE: &str = "tree node";

fn bad(phys: u64, problem: MapProblem) -> Error {
    Error::Map { node: NODE, phys, problem }
}

/// The measures of a tree (`enum kho_radix_consts`, include/linux/kho/abi/kexec_handover.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    page: PageSize,
    order_bit: bool,
}

impl Shape {
    /// The shape of an ABI's trees; `None` if its map is no tree.
    pub const fn of(abi: &Abi, page: PageSize) -> Option<Shape> {
        match abi.map {
            MapFormat::Radix { order_bit } => Some(Shape { page, order_bit }),
            MapFormat::Chunks => None,
        }
    }

    pub const fn page(self) -> PageSize {
        self.page
    }

    /// The bit that tells order 0 (KHO_ORDER_0_LOG2): 52, 50 or 48.
    pub const fn order_0_bit(self) -> u32 {
        64 - self.page.shift()
    }

    /// Bits of a key that an inner node decides (KHO_TABLE_SIZE_LOG2): 9, 11 or 13.
    pub const fn table_bits(self) -> u32 {
        self.page.shift() - 3
    }

    /// Bits of a key that a leaf decides (KHO_BITMAP_SIZE_LOG2): 15, 17 or 19.
    pub const fn leaf_bits(self) -> u32 {
        self.page.shift() + 3
    }

    /// Levels, the leaves included (KHO_TREE_MAX_DEPTH): 6 at 4 KiB, 4 at 64 KiB; at 16 KiB 4 in kho-v2, 5 from v3 on.
    pub const fn depth(self) -> u32 {
        let width = self.order_0_bit() + self.order_bit as u32;
        (width - self.leaf_bits()).div_ceil(self.table_bits()) + 1
    }

    /// Bits of a key that the tree can tell apart: 60 at 4 KiB, 58 at 64 KiB; at 16 KiB 50 or 61.
    pub const fn key_bits(self) -> u32 {
        (self.depth() - 1) * self.table_bits() + self.leaf_bits()
    }

    /// Where in a key a level's index stands; level 1 is the one above the leaves.
    const fn level_shift(self, level: u32) -> u32 {
        (level - 1) * self.table_bits() + self.leaf_bits()
    }

    /// The index of the entry that leads from an inner node of `level` towards a key (kho_radix_get_table_index).
    pub const fn index(self, key: u64, level: u32) -> u64 {
        (key >> self.level_shift(level)) & ((1 << self.table_bits()) - 1)
    }

    /// The bit that tells an order.
    const fn order_bit_of(self, order: Order) -> u32 {
        self.order_0_bit() - order.get()
    }

    /// A folio's key (kho_radix_encode_key). `pfn` is a multiple of the folio's size, inside the address space.
    pub const fn key(self, pfn: Pfn, order: Order) -> u64 {
        1 << self.order_bit_of(order) | pfn.0 >> order.get()
    }

    /// The folio a key names (kho_radix_decode_key).
    ///
    /// # Errors
    /// What is wrong with a key that names none.
    pub fn folio(self, key: u64) -> Result<(Pfn, Order), &'static str> {
        if self.loses_order_0() && key >> Self::LOST_KEY_BITS == 0 {
            return Ok((Pfn(key), Order::ZERO));
        }
        if key == 0 {
            return Err("is a key without a bit for the order");
        }
        let top = key.ilog2();
        let Some(order) = self.order_0_bit().checked_sub(top) else {
            return Err("is a key with the order's bit above that of order 0");
        };
        match Order::new(order.into()) {
            Ok(order) => Ok((Pfn((key ^ 1 << top) << order.get()), order)),
            Err(_) => Err("is the key of an order beyond 36"),
        }
    }

    /// Whether the keys of single pages lose the bit that tells their order, as in kho-v2 at 16 KiB: the kernel takes
    /// indices modulo the size of a table (which is why v3 has a level more).
    const fn loses_order_0(self) -> bool {
        self.order_0_bit() >= self.key_bits()
    }

    /// Refuses a block whose keys could not be read back: in trees that lose the bit of order 0, what is left of a single
    /// page's key is its pfn, and keys below 2^34 are taken for that. It leaves pages below 256 TiB and folios of up to
    /// 1 GiB, which is every folio of a kernel with 16 KiB pages.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check_writable(self, order: Order, index: u64) -> Result<()> {
        let fits = match order {
            Order::ZERO => index >> (Self::LOST_KEY_BITS - self.leaf_bits()) == 0,
            _ => self.order_bit_of(order) >= Self::LOST_KEY_BITS,
        };
        if !self.loses_order_0() || fits {
            return Ok(());
        }
        let deeper = ABIS.iter().find(|abi| abi.levels(self.page) > Some(self.depth()));
        let why = format!(
            "with {} pages a tree of {} levels cannot tell this folio of order {order} from a single page; {} has a \
             level more",
            self.page,
            self.depth(),
            deeper.map_or("a later version", |abi| abi.compatible)
        );
        Err(Error::Invalid { what: "preserved-memory map", why })
    }

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

    /// Bits of a single page's key where the topmost one is lost.
    const LOST_KEY_BITS: u32 = 34;

    /// Whether an order's keys share the leaf of the lowest keys with other orders'.
    pub(super) const fn is_low(self, order: Order) -> bool {
        self.order_bit_of(order) < self.leaf_bits()
    }

    /// The bits of a key above a leaf's own, for the leaf that holds block `index` of an order that is not low.
    pub(super) const fn leaf_of(self, order: Order, index: u64) -> u64 {
        let leaf = 1 << (self.order_bit_of(order) - self.leaf_bits()) | index;
        leaf & ((1 << (self.key_bits() - self.leaf_bits())) - 1)
    }
}

/// A tree that was read.
#[derive(Debug)]
pub struct Tree {
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
    let mut left = Left::new(memory);
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
pub fn inherit(arena: &Arena, shape: Shape, root: Phys) -> Result<(Preserved, Vec<u64>)> {
    let mut inherited = Inherited::new(arena, Geometry::paged(shape.page));
    let nodes = walk(arena, arena.ranges(), shape, root, |phys, prefix| {
        match shape.leaf(phys, prefix, || arena.read_vec(NODE, Phys(phys), shape.page.bytes()))? {
            Leaf::Folios(folios) => folios.into_iter().try_for_each(|(pfn, order)| inherited.preserve(pfn, order)),
            Leaf::Block(order, index) => inherited.add(Bitmap { order, index, phys: Phys(phys) }),
        }
    })?;
    Ok((inherited.finish()?, nodes))
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
        let behind = run.start.0.checked_add(run.len);
        next = behind.map_or(Ok(None), |behind| memory.next_data(Phys(behind)))?;
    }
    Ok(runs)
}

/// A node's page; `None` if there are but zeros.
fn read_node(memory: &dyn PhysMemory, data: &[PhysRange], shape: Shape, phys: u64) -> Result<Option<Vec<u8>>> {
    let page = shape.page.bytes();
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

/// Lays out a tracker's tree from the leaves up, each level by ascending key; the root comes last. `alloc` gives the
/// pages; their bytes come back with their addresses, to be written there. An empty block becomes an empty leaf, as the
/// kernel leaves one behind.
///
/// # Errors
/// Whatever `alloc` returns; [`Error::Invalid`] for an order that this shape cannot hold ([`Shape::check_writable`]) and
/// for a tracker of another page size.
pub fn serialize(
    tracker: &Tracker,
    shape: Shape,
    mut alloc: impl FnMut() -> Result<Phys>,
) -> Result<Vec<(Phys, Vec<u8>)>> {
    let geometry = tracker.geometry();
    if geometry.page() != shape.page {
        let why = format!("pages of {} are not {}", geometry.page(), shape.page);
        return Err(Error::Invalid { what: "tracker", why });
    }
    let blank = || vec![0; usize::try_from(shape.page.bytes()).unwrap_or(0)];
    let mut leaves: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for order in tracker.orders() {
        let len = usize::try_from(geometry.bits().min(1 << shape.order_bit_of(order)) / 8).unwrap_or(0);
        for block in tracker.blocks(order) {
            let first = block.index() * geometry.bits();
            match shape.check_writable(order, first >> shape.leaf_bits()) {
                Err(_) if block.is_empty() => continue,
                checked => checked?,
            }
            let key = ((1 << shape.order_bit_of(order)) | first) & ((1 << shape.key_bits()) - 1);
            let leaf = leaves.entry(key >> shape.leaf_bits()).or_insert_with(blank);
            let at = usize::try_from((key & ((1 << shape.leaf_bits()) - 1)) / 8).unwrap_or(0);
            block.copy_to(&mut leaf[at..at + len]);
        }
    }
    let mut pages = Vec::new();
    let mut level = leaves;
    for _ in 1..shape.depth() {
        let mut above: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (key, bytes) in level {
            let phys = alloc()?;
            let index = usize::try_from(key & ((1 << shape.table_bits()) - 1)).unwrap_or(0);
            let table = above.entry(key >> shape.table_bits()).or_insert_with(blank);
            table[8 * index..8 * index + 8].copy_from_slice(&phys.0.to_le_bytes());
            pages.push((phys, bytes));
        }
        level = above;
    }
    // check_writable leaves every key a path from one root.
    let root = level.into_values().next().unwrap_or_else(blank);
    pages.push((alloc()?, root));
    Ok(pages)
}
