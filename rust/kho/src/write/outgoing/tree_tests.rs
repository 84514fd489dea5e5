#![forbid(unsafe_code)]

use crate::abi::radix::{Shape, read, serialize};
use crate::abi::{ABIS, Abi};
use crate::error::Result;
use crate::memory::{PhysMemory, PhysRange, SliceMemory};
use crate::tracker::{Geometry, Tracker};
use crate::units::{Order, PageSize, Pfn, Phys};
use crate::write::arena::{Arena, ArenaBlocks, ArenaConfig, Backing, Region};
use crate::write::outgoing::live_tree::LiveTree;
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

fn order(o: u32) -> Order {
    Order::new(o.into()).unwrap()
}

fn shape(abi: &str, page: PageSize) -> Shape {
    Shape::of(Abi::named(abi).unwrap(), page).unwrap()
}

fn shapes() -> impl Strategy<Value = Shape> {
    let all = PageSize::ALL.into_iter().flat_map(|page| ABIS.iter().filter_map(move |abi| Shape::of(abi, page)));
    select(all.collect::<Vec<_>>())
}

/// A folio that a tree of this shape can hold: near 0, a leaf's edge, the top of the address space, or anywhere.
fn folios(s: Shape) -> impl Strategy<Value = (Pfn, Order)> {
    let lossy = s.order_0_bit() >= s.key_bits();
    let (some, most): (Vec<u32>, u32) = if lossy { (vec![0, 1, 9, 16], 16) } else { (vec![0, 1, 9, 18, 33, 36], 36) };
    let orders = prop_oneof![3 => select(some), 2 => 0..=most];
    (orders, any::<u64>(), 0..5u64, 0..5u32).prop_map(move |(o, any, near, kind)| {
        let limit = if lossy && o == 0 { 1 << 34 } else { s.page().pfn_limit() >> o };
        let folio = match kind {
            0 => near,
            1 => (8 * s.page().bytes() * (any % 3 + 1) + near).wrapping_sub(2),
            2 => limit - 1 - near,
            3 => any % 100_000,
            _ => any,
        } % limit;
        (Pfn(folio << o), order(o))
    })
}

fn tracker(page: PageSize, folios: &[(Pfn, Order)]) -> Tracker {
    let mut t = Tracker::new(Geometry::paged(page));
    for (pfn, order) in folios {
        t.preserve(*pfn, *order).unwrap();
    }
    t
}

/// The tree of a tracker as memory, pages from `first` on, and its root.
fn written(t: &Tracker, s: Shape, first: u64) -> (SliceMemory, Phys) {
    let mut next = first;
    let pages = serialize(t, s, || {
        next += s.page().bytes();
        Ok(Phys(next - s.page().bytes()))
    });
    let pages = pages.unwrap();
    let root = pages.last().unwrap().0;
    (SliceMemory::new(pages).unwrap(), root)
}

/// A tree without its pointers: for each leaf the way to it, and its bytes; and how many inner nodes lead there.
fn content(memory: &dyn PhysMemory, s: Shape, root: Phys) -> (BTreeMap<Vec<u64>, Vec<u8>>, usize) {
    fn walk(
        memory: &dyn PhysMemory,
        s: Shape,
        at: Phys,
        way: &[u64],
        leaves: &mut BTreeMap<Vec<u64>, Vec<u8>>,
    ) -> usize {
        let page = memory.read_vec("node", at, s.page().bytes()).unwrap();
        if way.len() as u32 == s.depth() - 1 {
            leaves.insert(way.to_vec(), page);
            return 0;
        }
        let entries = (0..).zip(page.as_chunks::<8>().0).map(|(i, b)| (i, u64::from_le_bytes(*b)));
        let below = entries.filter(|e| e.1 != 0).map(|(i, child)| {
            let way: Vec<u64> = way.iter().copied().chain([i]).collect();
            walk(memory, s, Phys(child), &way, leaves)
        });
        1 + below.sum::<usize>()
    }
    let mut leaves = BTreeMap::new();
    let inner = walk(memory, s, root, &[], &mut leaves);
    (leaves, inner)
}

#[test]
fn the_tree_is_as_deep_as_the_kernels() {
    let depth = |abi, page| shape(abi, page).depth();
    assert_eq!(PageSize::ALL.map(|page| depth("kho-v2", page)), [6, 4, 4]);
    assert_eq!(PageSize::ALL.map(|page| shape("kho-v2", page).key_bits()), [60, 50, 58]);
    for abi in ["kho-v3", "kho-v4"] {
        assert_eq!(PageSize::ALL.map(|page| depth(abi, page)), [6, 5, 4]);
        assert_eq!(PageSize::ALL.map(|page| shape(abi, page).key_bits()), [60, 61, 58]);
    }
}

#[test]
fn a_folio_is_found_where_the_kernel_would_put_it() {
    let s = shape("kho-v4", PageSize::Size4K);
    assert_eq!(s.key(Pfn(0x4ef), Order::ZERO), 1 << 52 | 0x4ef);
    assert_eq!(s.key(Pfn(0x530), order(4)), 1 << 48 | 0x53);
    let (memory, root) = written(&tracker(PageSize::Size4K, &[(Pfn(0x530), order(4))]), s, 0x1000);
    assert_eq!(root, Phys(0x6000));
    let entry = |table: u64, index: u64| {
        let word = memory.read_vec("entry", Phys(table + 8 * index), 8).unwrap();
        u64::from_le_bytes(word.try_into().unwrap())
    };
    // Bit 48 stands in bits 42 to 50, those of level 4.
    assert_eq!(entry(0x6000, 0), 0x5000);
    assert_eq!(entry(0x5000, 1 << 6), 0x4000);
    for table in [0x4000, 0x3000, 0x2000] {
        assert_eq!(entry(table, 0), table - 0x1000);
    }
    assert_eq!(memory.read_vec("leaf", Phys(0x1000 + 0x53 / 8), 1).unwrap(), [1 << (0x53 % 8)]);
}

#[test]
fn single_pages_of_16_kib_lose_a_bit_before_v3_and_are_read_as_meant() {
    let page = PageSize::Size16K;
    let t = tracker(page, &[(Pfn(0x4_0000), Order::ZERO), (Pfn((1 << 34) - 1), Order::ZERO), (Pfn(0), order(16))]);
    for abi in ["kho-v2", "kho-v3", "kho-v4"] {
        let (memory, root) = written(&t, shape(abi, page), 0x4000);
        assert_eq!(read(&memory, shape(abi, page), root).unwrap().tracker, t, "{abi}");
    }
    let s = shape("kho-v2", page);
    // What the next kernel takes it for.
    assert_eq!(s.key(Pfn(0x4_0000), Order::ZERO) % (1 << s.key_bits()), s.key(Pfn(0), order(32)));
    for folio in [(Pfn(1 << 34), Order::ZERO), (Pfn(0), order(17)), (Pfn(0), order(36))] {
        let error = serialize(&tracker(page, &[folio]), s, || Ok(Phys(0x4000))).unwrap_err();
        assert!(error.to_string().starts_with("preserved-memory map: with 16 KiB pages a tree of 4 levels"), "{error}");
    }
}

#[test]
fn an_empty_tree_is_its_root() {
    for page in PageSize::ALL {
        let s = shape("kho-v4", page);
        let (memory, root) = written(&Tracker::new(Geometry::paged(page)), s, page.bytes());
        let tree = read(&memory, s, root).unwrap();
        assert!(tree.tracker.is_empty());
        assert_eq!(tree.nodes, [page.bytes()]);
    }
}

/// The error of reading a tree of one order-0 folio at pfn 0 whose pages (leaf first, root last) `damage` has changed.
fn damaged(s: Shape, damage: impl FnOnce(&mut Vec<Vec<u8>>)) -> String {
    let page = s.page().bytes();
    let (memory, root) = written(&tracker(s.page(), &[(Pfn(0), Order::ZERO)]), s, page);
    let mut pages: Vec<Vec<u8>> =
        (1..=root.0 / page).map(|n| memory.read_vec("page", Phys(n * page), page).unwrap()).collect();
    damage(&mut pages);
    let memory = SliceMemory::new((1..).zip(pages).map(|(n, bytes)| (Phys(n * page), bytes))).unwrap();
    match read(&memory, s, root) {
        Ok(tree) => format!("{} folios", tree.tracker.len()),
        Err(e) => e.to_string(),
    }
}

fn put(page: &mut [u8], index: usize, value: u64) {
    page[8 * index..8 * index + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn a_node_that_cannot_be_is_named() {
    let s = shape("kho-v4", PageSize::Size4K);
    assert_eq!(damaged(s, |_| {}), "1 folios");
    let root = |index, value| damaged(s, move |pages| put(&mut pages[5], index, value));
    assert_eq!(root(1, 0x2001), "tree node at 0x2001: the address is not a multiple of the page size 0x1000");
    assert_eq!(root(0, 0x7000), "tree node at 0x7000: 0x1000 bytes there are not in this memory");
    assert_eq!(root(0, 0x6000), "tree node at 0x6000: a second entry leads to it: a shared node or a cycle");
    let inner = damaged(s, |pages| put(&mut pages[3], 511, 0x1000));
    assert_eq!(inner, "tree node at 0x1000: a second entry leads to it: a shared node or a cycle");
}

#[test]
fn a_key_of_no_folio_is_named() {
    for s in PageSize::ALL.map(|page| shape("kho-v4", page)) {
        let page = s.page().bytes();
        let root = s.depth() as usize - 1;
        // The way to the leaf of the lowest keys, instead of the one to order 0.
        let lowest = |bit: usize| {
            damaged(s, |pages| {
                for level in &mut pages[1..=root] {
                    let child = level.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).max().unwrap();
                    level.fill(0);
                    put(level, 0, child);
                }
                pages[0].fill(0);
                pages[0][bit / 8] = 1 << (bit % 8);
            })
        };
        let node = format!("tree node at {page:#x}: entry");
        assert_eq!(lowest(0), format!("{node} 0: 0x0 is a key without a bit for the order"));
        assert_eq!(lowest(5), format!("{node} 5: 0x5 is the key of an order beyond 36"));
        let above = damaged(s, |pages| put(&mut pages[root], (1 << s.table_bits()) - 1, page * (root as u64)));
        assert!(above.contains("a second entry"), "{above}");
        let above = damaged(s, |pages| {
            let child = page * root as u64;
            pages[root].fill(0);
            put(&mut pages[root], (1 << s.table_bits()) - 1, child);
        });
        assert!(above.starts_with(&node) && above.ends_with("above that of order 0"), "{above}");
    }
}

/// Memory that claims much and holds little.
struct Claims {
    held: SliceMemory,
    ranges: Vec<PhysRange>,
}

impl PhysMemory for Claims {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        buf.fill(0);
        let Some(run) = self.held.next_data(phys)?.filter(|run| run.start == phys) else { return Ok(()) };
        let len = buf.len().min(run.len as usize);
        self.held.read(phys, &mut buf[..len])
    }

    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>> {
        self.held.next_data(phys)
    }
}

#[test]
fn leaves_that_memory_only_claims_take_no_memory() {
    let s = shape("kho-v4", PageSize::Size64K);
    let (held, root) = written(&tracker(PageSize::Size64K, &[(Pfn(0), Order::ZERO)]), s, 0x1_0000);
    let mut pages: Vec<_> = held.ranges().to_vec().into_iter().map(|r| (r.start, r.len)).collect();
    assert_eq!(pages.pop(), Some((Phys(0x1_0000), 0x4_0000)));
    let mut above = vec![0; 0x1_0000];
    for n in 0..8192 {
        put(&mut above, n, 0x1000_0000 + 0x1_0000 * n as u64);
    }
    let mut slices: Vec<(Phys, Vec<u8>)> =
        (1..=4u64).map(|n| (Phys(n << 16), held.read_vec("page", Phys(n << 16), 0x1_0000).unwrap())).collect();
    slices[1].1 = above;
    let ranges = vec![PhysRange { start: Phys(0), len: 1 << 40 }];
    let memory = Claims { held: SliceMemory::new(slices).unwrap(), ranges };
    let tree = read(&memory, s, root).unwrap();
    assert_eq!(tree.nodes.len(), 8192 + 3);
    assert_eq!(tree.tracker.len(), 0);
    assert!(tree.tracker.nbytes() < 1 << 16, "{}", tree.tracker.nbytes());
}

fn arena(page: PageSize) -> Arc<Arena> {
    let regions = vec![Region { start: Phys(1 << 30), len: 64 << 20, node: 0 }];
    let config = ArenaConfig { page, max_order: order(10), regions, scratch: Vec::new(), backing: Backing::Anonymous };
    Arena::new(config).unwrap()
}

#[test]
fn a_live_tree_without_room_for_a_node_stays_as_it_was() {
    let page = PageSize::Size4K;
    let arena = arena(page);
    let s = shape("kho-v4", page);
    let mut tree = LiveTree::new(&arena, s, None).unwrap();
    let mut t = Tracker::with_source(Geometry::paged(page), Arc::new(ArenaBlocks::new(&arena)));
    tree.prepare(&mut t, Order::ZERO, 0).unwrap();
    t.preserve(Pfn(1), Order::ZERO).unwrap();
    let mut hog = Vec::new();
    while let Ok(pfn) = arena.alloc(Order::ZERO, None, false) {
        hog.push(pfn);
    }
    for freed in 0..5 {
        assert!(tree.prepare(&mut t, order(9), 7).is_err(), "with {freed} pages free");
        assert!(t.block(order(9), 7).is_none());
        assert_eq!(read(&*arena, s, tree.root()).unwrap().tracker, t);
        arena.put(hog.pop().unwrap()).unwrap();
    }
    tree.prepare(&mut t, order(9), 7).unwrap();
    t.preserve(Pfn(7 << 24), order(9)).unwrap();
    assert_eq!(read(&*arena, s, tree.root()).unwrap().tracker, t);
    tree.free();
    t.clear();
    for pfn in hog {
        arena.put(pfn).unwrap();
    }
    assert_eq!(arena.usage().1, 0);
}

proptest! {
    #[test]
    fn a_key_names_its_folio((s, folio) in shapes().prop_flat_map(|s| (Just(s), folios(s)))) {
        prop_assert_eq!(s.folio(s.key(folio.0, folio.1)), Ok(folio));
    }

    #[test]
    fn what_is_serialized_reads_back(
        (s, folios) in shapes().prop_flat_map(|s| (Just(s), prop::collection::btree_set(folios(s), 0..12))),
        small: bool,
    ) {
        let bytes = if small { Geometry::SMALL } else { s.page().bytes() };
        let mut t = Tracker::new(Geometry::new(s.page(), bytes).unwrap());
        for (pfn, order) in &folios {
            t.preserve(*pfn, *order).unwrap();
        }
        let (memory, root) = written(&t, s, s.page().bytes());
        let tree = read(&memory, s, root).unwrap();
        let found: BTreeSet<_> = tree.tracker.iter().collect();
        prop_assert_eq!(found, folios);
        prop_assert_eq!(tree.nodes.len() as u64, memory.nbytes() as u64 / s.page().bytes());
    }

    #[test]
    fn a_live_tree_is_the_one_that_would_be_serialized(
        (s, ops) in shapes().prop_flat_map(|s| (Just(s), prop::collection::vec((folios(s), 0..4u32), 0..16))),
    ) {
        let arena = arena(s.page());
        let mut tree = LiveTree::new(&arena, s, None).unwrap();
        let mut t = Tracker::with_source(Geometry::paged(s.page()), Arc::new(ArenaBlocks::new(&arena)));
        let mut model = BTreeSet::new();
        let mut last = None;
        for ((pfn, order), kind) in ops {
            // Of four, one takes back what was marked before it.
            match last.filter(|_| kind == 0) {
                Some((pfn, order)) => {
                    prop_assert_eq!(t.unpreserve(pfn, order).unwrap(), model.remove(&(pfn, order)));
                }
                None => {
                    tree.prepare(&mut t, order, pfn.0 >> order.get() >> s.leaf_bits()).unwrap();
                    prop_assert_eq!(t.preserve(pfn, order).unwrap(), model.insert((pfn, order)));
                    last = Some((pfn, order));
                }
            }
            tree.settle(&t).unwrap();
        }
        prop_assert_eq!(read(&*arena, s, tree.root()).unwrap().tracker.iter().collect::<BTreeSet<_>>(), model);
        let (memory, root) = written(&t, s, s.page().bytes());
        prop_assert_eq!(content(&*arena, s, tree.root()), content(&memory, s, root));
        tree.free();
        t.clear();
        prop_assert_eq!(arena.usage().1, 0);
    }

    #[test]
    fn arbitrary_memory_never_panics(
        s in shapes(),
        words in prop::collection::vec((0..8u64, 0..8192usize, prop_oneof![(0..9u64).prop_map(|n| n << 16), any::<u64>()]), 0..40),
    ) {
        let mut bytes = vec![0; 8 << 16];
        for (page, index, value) in words {
            put(&mut bytes[(page as usize) << 16..], index % 8192, value);
        }
        let memory = SliceMemory::new([(Phys(0x1_0000), bytes)]).unwrap();
        if let Ok(tree) = read(&memory, s, Phys(0x1_0000)) {
            prop_assert!(tree.nodes.len() as u128 <= memory.nbytes() / u128::from(s.page().bytes()));
        }
    }
}
