#![forbid(unsafe_code)]

use super::*;
use crate::read::incoming::{Incoming, Options};
use crate::tracker::Orders;
use crate::write::arena::{ArenaConfig, Backing, Region, ScratchArea};

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
        let inc = Incoming::open(Arc::clone(&arena) as Arc<dyn PhysMemory>, &options, |_| Ok(())).unwrap();
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
    assert!(Incoming::open(memory, &options, |_| Ok(())).err().unwrap().to_string().starts_with("bitmap_bytes"));
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

#[test]
fn from_7_1_on_no_piece_of_a_range_spans_nodes() {
    // An edge that is a multiple of 8 pages and not of 16, in the middle of a block of order 4.
    for (abi, pieces) in [("kho-v2", 1), ("kho-v3", 2), ("kho-v4", 2)] {
        let edge = (16 << 20) + (8 << 12);
        let regions =
            vec![Region { start: Phys(0), len: edge, node: 0 }, Region { start: Phys(edge), len: 16 << 20, node: 1 }];
        let config = ArenaConfig { regions, scratch: Vec::new(), ..arena(PageSize::Size4K).config().clone() };
        let arena = Arena::new(config).unwrap();
        let mut out = Outgoing::new(&arena, abi, None, Placement::default()).unwrap();
        let middle = Pfn(edge >> 12);
        let start = Pfn(middle.0 - 8);
        for at in [start, middle] {
            arena.alloc_at(at, Order::new(3).unwrap()).unwrap();
        }
        assert_eq!(out.preserve_pages(start, 16).unwrap(), pieces, "{abi}");
        let fdt = out.finalize().unwrap();
        drop(out);
        let inc = Incoming::take_over(&arena, Some(fdt.0), &Options::default()).unwrap();
        inc.restore_pages(arena.page().phys(start), 16).unwrap();
        assert_eq!(inc.nr_restored(), pieces);
    }
}

/// An arena in which bitmaps of single pages speak of its memory only.
fn wide(page: PageSize, len: u64) -> Arc<Arena> {
    let regions = vec![Region { start: Phys(0), len, node: 0 }];
    let max_order = Order::new(8).unwrap();
    Arena::new(ArenaConfig { page, max_order, regions, scratch: Vec::new(), backing: Backing::Anonymous }).unwrap()
}

/// A handover of every third of `n` pages, and where its bitmaps lie.
fn thirds(arena: &Arc<Arena>, abi: &str, n: u64) -> (Vec<u64>, Vec<Phys>) {
    let mut out = Outgoing::new(arena, abi, None, Placement::default()).unwrap();
    let pfns: Vec<u64> = (0..n).map(|_| arena.alloc(Order::ZERO, None, false).unwrap().0).step_by(3).collect();
    assert_eq!(out.preserve_many(&pfns, Orders::One(Order::ZERO)).unwrap(), pfns.len() as u64);
    out.finalize().unwrap();
    let bitmaps = out.tracker().blocks(Order::ZERO).map(|block| block.phys().unwrap()).collect();
    (pfns, bitmaps)
}

#[test]
fn a_map_is_used_where_it_lies_and_its_pages_are_free_again_when_nobody_uses_it() {
    for abi in ["kho-v1", "kho-v2", "kho-v4"] {
        let page = PageSize::Size4K;
        let arena = wide(page, 1 << 30);
        let (pfns, bitmaps) = thirds(&arena, abi, 300);
        let inc = Incoming::take_over(&arena, None, &Options::default()).unwrap();
        assert_eq!(inc.stats().in_place_bytes, 4096, "{abi}");
        let places: Vec<Phys> = inc.preserved().blocks(Order::ZERO).map(|block| block.phys().unwrap()).collect();
        assert_eq!(places, bitmaps, "{abi}");
        let bitmap = page.pfn(bitmaps[0]);
        assert!(matches!(arena.alloc_at(bitmap, Order::ZERO), Err(Error::PageState { .. })), "{abi}");
        let reserved = |arena: &Arena| (1 << 18) - arena.usage().0 - arena.usage().1;
        // Page 0, the FDT, the folios, the bitmap.
        assert_eq!(reserved(&arena), 3 + pfns.len() as u128, "{abi}");
        drop(inc);
        assert_eq!(reserved(&arena), 2 + pfns.len() as u128, "{abi}");
        arena.alloc_at(bitmap, Order::ZERO).unwrap();
    }
}

#[test]
fn an_owner_that_was_succeeded_still_knows_what_it_got() {
    let arena = wide(PageSize::Size4K, 1 << 28);
    let (pfns, _) = thirds(&arena, "kho-v1", 300);
    let first = Incoming::take_over(&arena, None, &Options::default()).unwrap();
    thirds(&arena, "kho-v4", 30);
    let second = Incoming::take_over(&arena, None, &Options::default()).unwrap();
    let mut all = Vec::new();
    while let Ok(pfn) = arena.alloc(Order::ZERO, None, false) {
        arena.write(arena.page().phys(pfn), &[0xff; 4096]).unwrap();
        all.push(pfn);
    }
    assert!(pfns.iter().all(|pfn| first.preserved().contains(Pfn(*pfn), Order::ZERO)));
    assert_eq!((first.preserved().len(), second.preserved().len()), (101, 11));
    drop(first);
    assert!(arena.alloc(Order::ZERO, None, false).is_ok(), "the first map's page is free");
}

#[test]
fn a_bitmap_in_a_preserved_page_is_copied_because_its_owner_may_write_there() {
    let arena = wide(PageSize::Size4K, 1 << 30);
    let mut out = Outgoing::new(&arena, "kho-v1", None, Placement::default()).unwrap();
    let bitmap = out.tracker().blocks(Order::ZERO).next().unwrap().phys().unwrap();
    out.preserve_folio(arena.page().pfn(bitmap), Order::ZERO).unwrap();
    let fdt = out.finalize().unwrap();
    drop(out);
    let inc = Incoming::take_over(&arena, None, &Options::default()).unwrap();
    inc.restore_folio(bitmap).unwrap();
    arena.write(bitmap, &[0xff; 4096]).unwrap();
    assert_eq!(inc.preserved().iter().count(), 2);
    assert!(inc.restore_folio(Phys(fdt.0 + (64 << 12))).is_err());
    inc.restore_folio(fdt).unwrap();
}

#[test]
fn whatever_others_write_into_a_map_no_folio_is_outside_memory_or_restored_twice() {
    let arena = wide(PageSize::Size4K, 1 << 28);
    let (pfns, bitmaps) = thirds(&arena, "kho-v4", 300);
    let inc = Incoming::take_over(&arena, None, &Options::default()).unwrap();
    inc.restore_folio(Phys(pfns[0] << 12)).unwrap();
    arena.write_own(bitmaps[0], &[0xff; 4096]).unwrap();
    let len = 1 << 28;
    assert!(inc.preserved().folios().iter().all(|folio| folio.phys < len));
    assert!(inc.preserved().extents().all(|(_, end)| end.0 <= len >> 12));
    assert!(inc.restore_many(&[pfns[0] << 12]).is_err());
    arena.write_own(bitmaps[0], &[0; 4096]).unwrap();
    assert!(inc.restore_many(&[pfns[1] << 12]).is_err());
    assert_eq!(inc.nr_restored(), 1);
    assert!(inc.unrestored().unwrap().is_empty());
    let other = inc.preserved().try_clone().unwrap();
    assert!(other.union_len(inc.preserved()) < 1 << 16);
}

#[test]
fn a_map_of_many_bitmaps_is_counted_by_several_threads_as_by_one() {
    let page = PageSize::Size4K;
    let arena = wide(page, 1 << 40);
    let first = arena.alloc_at(Pfn(1 << 27), Order::new(27).unwrap()).unwrap();
    let mut out = Outgoing::new(&arena, "kho-v4", None, Placement::default()).unwrap();
    out.preserve_run(first, Order::ZERO, 1 << 27).unwrap();
    out.preserve_run(first, Order::new(9).unwrap(), 3).unwrap();
    for hole in 0..4096 {
        out.unpreserve_folio(Pfn(first.0 + (hole << 15) + hole), Order::ZERO).unwrap();
    }
    out.finalize().unwrap();
    let expected = out.tracker().len();
    drop(out);
    let inc = Incoming::take_over(&arena, None, &Options::default()).unwrap();
    assert_eq!((inc.preserved().len(), expected), ((1 << 27) - 4096 + 4, (1 << 27) - 4096 + 4));
    assert!(inc.preserved().blocks(Order::ZERO).all(|block| block.count() <= 1 << 15));
    assert_eq!(inc.stats().in_place_bytes, 4098 << 12);
}

#[test]
fn an_edited_root_of_a_list_has_map_0_until_it_is_finalized_and_its_newest_subtree_first() {
    for page in PageSize::ALL {
        let arena = arena(page);
        let style = Style { root: RootForm::Edited, ..Style::default() };
        let mut out = Outgoing::styled(&arena, "kho-v1", style).unwrap();
        let at = out.fdt_phys();
        let read = || crate::read::root::read_root(&*arena, at).unwrap();
        let names = |root: &crate::read::root::Root| root.subtrees.iter().map(|s| s.name.clone()).collect::<Vec<_>>();
        assert_eq!(read().map, Phys(0));
        out.add_subtree("a", b"first", None).unwrap();
        out.add_subtree("b", b"second", None).unwrap();
        assert_eq!((names(&read()), out.subtree_order()), (vec!["b".into(), "a".into()], SubtreeOrder::Prepend));
        out.remove_subtree("a").unwrap();
        // What lies there is a root, but no handover: a reader finds nothing preserved, and no owner takes it over.
        let options = Options { fdt_phys: Some(at.0), page_size: Some(page), ..Options::default() };
        let memory: Arc<dyn PhysMemory> = arena.clone();
        let unfinished = Incoming::open(memory, &options, |_| Ok(())).unwrap();
        assert!(!unfinished.is_finalized() && unfinished.preserved().is_empty() && unfinished.map_nodes().is_empty());
        assert_eq!(names(unfinished.root()), ["b"]);
        let refused = Incoming::take_over(&arena, Some(at.0), &Options::default()).err().unwrap();
        assert!(matches!(refused, Error::Root { problem: crate::error::RootProblem::MapIsZero, .. }), "{refused}");
        for _ in 0..2 {
            assert_eq!(out.finalize().unwrap(), at);
            let root = read();
            assert!(root.map.0 != 0 && names(&root) == ["b"]);
            assert_eq!(root.fdt.as_bytes(), out.serialize().unwrap());
            out.abort().unwrap();
            assert_eq!(read().map, Phys(0));
        }
        out.finalize().unwrap();
        drop(out);
        let inc = Incoming::take_over(&arena, None, &Options::default()).unwrap();
        assert_eq!(inc.preserved().len(), 2);
    }
}

#[test]
fn a_tree_that_is_always_in_force_has_no_map_of_0() {
    let arena = arena(PageSize::Size4K);
    let style = Style { root: RootForm::Edited, ..Style::default() };
    let mut out = Outgoing::styled(&arena, "kho-v4", style).unwrap();
    let blob = out.serialize().unwrap();
    assert_eq!(
        blob,
        Outgoing::new(&self::arena(PageSize::Size4K), "kho-v4", None, Placement::default())
            .unwrap()
            .serialize()
            .unwrap()
    );
    let none = form::with_map(&blob, 4096, out.abi(), Phys(0)).unwrap();
    arena.write_own(out.fdt_phys(), &none).unwrap();
    let refused = crate::read::root::read_root(&*arena, out.fdt_phys()).unwrap_err();
    assert!(matches!(refused, Error::Root { problem: crate::error::RootProblem::MapIsZero, .. }), "{refused}");
}

#[test]
fn a_range_over_two_nodes_is_cut_where_the_abi_says_so() {
    for (abi, heads) in [
        ("kho-v1", &[(0x100, 4)][..]),
        ("kho-v2", &[(0x100, 4)]),
        ("kho-v3", &[(0x100, 3), (0x108, 3)]),
        ("kho-v4", &[(0x100, 3), (0x108, 3)]),
    ] {
        let regions = vec![
            Region { start: Phys(0), len: 0x108 << 12, node: 0 },
            Region { start: Phys(0x108 << 12), len: 64 << 20, node: 1 },
        ];
        let config = ArenaConfig {
            page: PageSize::Size4K,
            max_order: Order::new(8).unwrap(),
            regions,
            scratch: Vec::new(),
            backing: Backing::Anonymous,
        };
        let arena = Arena::new(config).unwrap();
        for at in [0x100, 0x108] {
            arena.alloc_at(Pfn(at), Order::new(3).unwrap()).unwrap();
        }
        let mut out = Outgoing::new(&arena, abi, None, Placement::default()).unwrap();
        out.preserve_pages(Pfn(0x100), 16).unwrap();
        let fdt = arena.page().pfn(out.fdt_phys());
        let made: Vec<_> =
            out.tracker().iter().filter(|(pfn, _)| *pfn != fdt).map(|(pfn, o)| (pfn.0, o.get())).collect();
        assert_eq!(made, heads, "{abi}");
        assert_eq!(out.unpreserve_pages(Pfn(0x100), 16).unwrap(), heads.len() as u64, "{abi}");
        assert_eq!(out.tracker().len(), 1, "{abi}");
    }
}
