use super::*;
use crate::abi::radix::{self, Shape};
use crate::arena::{ArenaConfig, Backing, Region, ScratchArea};
use crate::incoming::{Incoming, Options};
use crate::memory::open_elf;
use std::collections::BTreeMap;
use std::path::Path;

const TREES: [&str; 3] = ["linux-7.3.4-x86_64", "linux-7.3.4-aarch64", "linux-7.3.4-aarch64-64k"];
const LISTS: [&str; 2] = ["linux-6.18.15-x86_64", "linux-6.16-layout-x86_64"];

fn capture(name: &str) -> Incoming {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(name).join("handover.elf");
    let files = open_elf(path).unwrap();
    let mut options = Options::default();
    options.know_files(&files);
    Incoming::open(Arc::new(files), &options, |_| {}).unwrap()
}

/// An arena whose RAM is a capture's and room beside it, with everything preserved allocated at its place, apart from
/// `except`.
fn arena_like(inc: &Incoming, except: &[Pfn]) -> Arc<Arena> {
    let page = inc.layout().page;
    let low = 64 << 20;
    let high = inc.memory().ranges().last().map(|r| (r.start.0 + r.len).next_multiple_of(1 << 30)).unwrap();
    let base = inc.memory().ranges()[0].start.0 >> 30 << 30;
    let region = Region { start: Phys(base), len: high - base + low, node: 0 };
    let max_order = Order::new(10).unwrap();
    let scratch = inc.scratch().map_or(Vec::new(), <[ScratchArea]>::to_vec);
    let config = ArenaConfig { page, max_order, regions: vec![region], scratch, backing: Backing::Anonymous };
    let arena = Arena::new(config).unwrap();
    for (pfn, order) in inc.preserved().iter().filter(|(pfn, _)| !except.contains(pfn)) {
        arena.alloc_at(pfn, order).unwrap();
        let phys = page.phys(pfn);
        let bytes = inc.memory().read_vec("folio", phys, page.folio_bytes(order)).unwrap();
        arena.write(phys, &bytes).unwrap();
    }
    arena
}

/// Writes a handover again: same folios, same subtrees in the order in which they were added.
fn rewritten(inc: &Incoming, abi: &str, place: Placement) -> Outgoing {
    let fdt = inc.layout().page.pfn(inc.root().phys);
    let arena = arena_like(inc, &[fdt]);
    let mut out = Outgoing::new(&arena, abi, None, place).unwrap();
    out.preserve_all(inc.preserved()).unwrap();
    let mut subtrees = inc.root().subtrees.clone();
    if inc.abi().live {
        subtrees.reverse();
    }
    for subtree in subtrees {
        out.link_subtree(&subtree.name, subtree.phys, subtree.size.unwrap()).unwrap();
    }
    out
}

fn same_places(inc: &Incoming) -> Placement {
    Placement { fdt: Some(inc.root().phys), map: Some(inc.root().map) }
}

/// A tree's leaves by the way to them.
fn leaves(memory: &dyn PhysMemory, shape: Shape, root: Phys) -> BTreeMap<Vec<usize>, Vec<u8>> {
    let mut level = BTreeMap::from([(Vec::new(), root)]);
    let page = |at| memory.read_vec("node", at, shape.page().bytes()).unwrap();
    for _ in 1..shape.depth() {
        let nodes = level.into_iter().flat_map(|(way, at)| {
            let words: Vec<u64> = page(at).as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
            let used = words.into_iter().enumerate().filter(|(_, child)| *child != 0);
            used.map(move |(i, child)| ([&way[..], &[i]].concat(), Phys(child))).collect::<Vec<_>>()
        });
        level = nodes.collect();
    }
    level.into_iter().map(|(way, at)| (way, page(at))).collect()
}

#[test]
fn a_handover_of_linux_7_3_written_again_is_the_same() {
    for name in TREES {
        let inc = capture(name);
        let mut out = rewritten(&inc, "kho-v4", same_places(&inc));
        assert_eq!(*out.tracker(), *inc.preserved(), "{name}");
        assert_eq!(out.serialize().unwrap(), inc.root().fdt.as_bytes(), "{name}");
        let arena = Arc::clone(out.arena());
        let fdt = arena.read_vec("FDT", inc.root().phys, u64::from(inc.root().fdt.totalsize())).unwrap();
        assert_eq!(fdt, inc.root().fdt.as_bytes(), "{name}");
        let shape = Shape::of(inc.abi(), inc.layout().page).unwrap();
        let theirs = leaves(&**inc.memory(), shape, inc.root().map);
        assert!(leaves(&*arena, shape, inc.root().map) == theirs, "{name}: the trees differ");
        let nodes = radix::read(&*arena, shape, inc.root().map).unwrap().nodes;
        assert_eq!(nodes.len() as u64, inc.map_pages().len() as u64, "{name}");
    }
}

#[test]
fn a_handover_keeps_its_folios_from_abi_to_abi() {
    for name in TREES.into_iter().chain(LISTS) {
        let inc = capture(name);
        for abi in ["kho-v1", "kho-v2", "kho-v3", "kho-v4"] {
            let mut out = rewritten(&inc, abi, Placement { fdt: Some(inc.root().phys), map: None });
            let fdt = out.finalize().unwrap();
            let memory: Arc<dyn PhysMemory> = out.arena().clone();
            let mut options = Options::default();
            options.know_arena(out.arena());
            let back = Incoming::open(memory, &options, |_| {}).unwrap();
            assert_eq!((back.abi().compatible, back.root().phys), (abi, fdt));
            assert_eq!(back.preserved(), inc.preserved(), "{name} as {abi}");
            assert_eq!(back.layout().bitmap.is_some(), abi == "kho-v1");
            assert!(back.root().malformed.is_empty());
            for subtree in &inc.root().subtrees {
                let found = back.retrieve_subtree(&subtree.name).unwrap();
                assert_eq!(found.phys, subtree.phys, "{name} as {abi}");
                if back.abi().size_property.is_some() {
                    assert_eq!(found.size, subtree.size, "{name} as {abi}");
                }
            }
        }
    }
}

fn arena(page: PageSize) -> Arc<Arena> {
    let regions = vec![Region { start: Phys(0), len: 64 << 20, node: 0 }];
    let max_order = Order::new(8).unwrap();
    let scratch = vec![ScratchArea { addr: 32 << 20, size: 16 << 20 }];
    Arena::new(ArenaConfig { page, max_order, regions, scratch, backing: Backing::Anonymous }).unwrap()
}

#[test]
fn every_abi_hands_over_and_leaves_nothing_behind() {
    for page in PageSize::ALL {
        for abi in ["kho-v1", "kho-v2", "kho-v3", "kho-v4"] {
            let arena = arena(page);
            let mut out = Outgoing::new(&arena, abi, None, Placement::default()).unwrap();
            let big = arena.alloc(Order::new(3).unwrap(), None, false).unwrap();
            out.preserve_pages(Pfn(big.0 + 1), 6).unwrap();
            let blob = out.add_subtree("a", b"first", None).unwrap();
            out.add_subtree("b", &[7; 5000], None).unwrap();
            assert!(matches!(out.add_subtree("a", b"", None), Err(Error::Exists { .. })));
            assert!(out.add_subtree(&"long".repeat(1 << 14), b"", None).is_err());
            out.remove_subtree("b").unwrap();
            let fdt = out.finalize().unwrap();
            assert!(matches!(out.preserve_pages(big, 1), Err(Error::Finalized { .. })));
            out.abort().unwrap();
            out.unpreserve_pages(Pfn(big.0 + 1), 6).unwrap();
            out.preserve_folio(big, Order::new(3).unwrap()).unwrap();
            assert_eq!(out.finalize().unwrap(), fdt);
            let expected = out.tracker().try_clone().unwrap();
            drop(out);

            let inc = Incoming::take_over(&arena, None, &Options::default()).unwrap();
            assert_eq!(*inc.preserved(), expected, "{abi} {page}");
            assert_eq!(inc.root().subtrees.len(), 1);
            assert_eq!(inc.retrieve_subtree("a").unwrap().phys, blob);
            assert_eq!(inc.restore_folio(page.phys(big)).unwrap(), (big, Order::new(3).unwrap()));
            assert!(inc.restore_folio(page.phys(big)).is_err());
            assert!(inc.restore_folio(page.phys(Pfn(big.0 + 1))).is_err());
        }
    }
}

#[test]
fn a_handover_that_is_dropped_frees_its_pages_and_wipes_its_fdt() {
    for abi in ["kho-v1", "kho-v4"] {
        let arena = arena(PageSize::Size4K);
        let map = Placement { fdt: None, map: Some(Phys(0x40_0000)) };
        let mut out = Outgoing::new(&arena, abi, None, map).unwrap();
        out.add_subtree("a", b"first", None).unwrap();
        out.serialize().unwrap();
        let fdt = out.fdt_phys();
        drop(out);
        assert_eq!(arena.usage().1, 0, "{abi}");
        assert_eq!(arena.read_vec("FDT", fdt, 4096).unwrap(), [0; 4096], "{abi}");
    }
}

#[test]
fn what_is_live_is_readable_at_every_moment() {
    let arena = arena(PageSize::Size4K);
    let mut out = Outgoing::new(&arena, "kho-v4", None, Placement::default()).unwrap();
    let fdt = Some(out.fdt_phys().0);
    let read = |out: &Outgoing| {
        let options = Options { fdt_phys: fdt, scratch: Some(Vec::new()), ..Options::default() };
        let inc = Incoming::open(Arc::clone(&arena) as Arc<dyn PhysMemory>, &options, |_| {}).unwrap();
        assert_eq!(*inc.preserved(), *out.tracker());
        inc.root().subtrees.iter().map(|s| s.name.clone()).collect::<Vec<_>>()
    };
    assert!(read(&out).is_empty());
    for name in ["a", "b", "c"] {
        out.add_subtree(name, name.as_bytes(), None).unwrap();
    }
    assert_eq!(read(&out), ["c", "b", "a"]);
    out.remove_subtree("b").unwrap();
    assert_eq!(read(&out), ["c", "a"]);
    let pages = arena.alloc(Order::new(5).unwrap(), None, false).unwrap();
    for n in [32, 7, 1] {
        out.preserve_pages(pages, n).unwrap();
        read(&out);
    }
    out.unpreserve_pages(pages, 7).unwrap();
    read(&out);
    out.finalize().unwrap();
    out.abort().unwrap();
    assert_eq!(read(&out), ["c", "a"]);
}

#[test]
fn a_bitmap_size_is_refused_where_there_is_none() {
    let arena = arena(PageSize::Size4K);
    let error = Outgoing::new(&arena, "kho-v3", Some(4096), Placement::default()).unwrap_err();
    assert!(error.to_string().starts_with("bitmap_bytes: kho-v3 keeps a tree"), "{error}");
    let out = Outgoing::new(&arena, "kho-v3", None, Placement::default()).unwrap();
    let options = Options { fdt_phys: Some(out.fdt_phys().0), bitmap_bytes: Some(512), ..Options::default() };
    let memory: Arc<dyn PhysMemory> = arena.clone();
    assert!(Incoming::open(memory, &options, |_| {}).err().unwrap().to_string().starts_with("bitmap_bytes"));
    assert_eq!(out.bitmap_bytes(), None);
}

#[test]
fn an_arena_tells_the_bitmap_size_that_its_map_does_not() {
    let arena = arena(PageSize::Size4K);
    let mut out = Outgoing::new(&arena, "kho-v1", None, Placement::default()).unwrap();
    // Two folios that share pages: what would make a reader doubt the layout.
    let big = arena.alloc(Order::new(8).unwrap(), None, false).unwrap();
    out.preserve_folio(big, Order::new(8).unwrap()).unwrap();
    out.preserve_folio(big, Order::ZERO).unwrap();
    out.finalize().unwrap();
    let expected = out.tracker().try_clone().unwrap();
    drop(out);
    let inc = Incoming::take_over(&arena, None, &Options::default()).unwrap();
    assert_eq!(*inc.preserved(), expected);
    assert_eq!(inc.layout().bitmap.as_ref().unwrap().0, 4096);
}
