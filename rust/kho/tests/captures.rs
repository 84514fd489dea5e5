//! Handovers of real kernels (`tests/data` of the repository), written again. Not part of the packed crate: the data is large.

#![allow(clippy::unwrap_used)]

use kho::abi::radix::{self, Shape};
use kho::arena::{Arena, ArenaConfig, Backing, Region, ScratchArea};
use kho::incoming::{Incoming, Options};
use kho::memory::{PhysMemory, open_elf};
use kho::outgoing::{Outgoing, Placement};
use kho::units::{Order, Pfn, Phys};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const TREES: [&str; 3] = ["linux-7.3.4-x86_64", "linux-7.3.4-aarch64", "linux-7.3.4-aarch64-64k"];
const LISTS: [&str; 2] = ["linux-6.18.15-x86_64", "linux-6.16-layout-x86_64"];

fn capture(name: &str) -> Incoming {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(name).join("handover.elf");
    let files = open_elf(path).unwrap();
    let mut options = Options::default();
    options.know_files(&files);
    Incoming::open(Arc::new(files), &options, |_| Ok(())).unwrap()
}

/// An arena whose RAM is a capture's and more room, with everything preserved allocated at its place, apart from
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
            let back = Incoming::open(memory, &options, |_| Ok(())).unwrap();
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
