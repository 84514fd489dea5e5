//! Any bytes as a file of memory with a handover in it: found, its root and map read, its subtrees, lists and files
//! followed, all of it verified, each folio restored once. No panic, and nothing that the memory does not hold.
//!
//! A raw image is read wherever it is whole, so that the search for its address is in it as well.

#![no_main]

use kho::fdt::Fdt;
use kho::incoming::{Incoming, Options};
use kho::memory::FileMemory;
use kho::owners::{Claims, join, totals};
use kho::payload::{ChunkOwners, Memfd, MemfdVersion};
use kho::units::Phys;
use kho::verify::{NodeRange, check, check_memfd};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

/// Pages that are taken for a file's, and folios that are restored.
const MOST: usize = 64;

fuzz_target!(|bytes: &[u8]| {
    let Ok(files) = FileMemory::from_bytes("fuzz", bytes.to_vec()) else { return };
    let files = Arc::new(files);
    let mut options = Options::default();
    options.know_files(&files);
    let Ok(incoming) = kho::address::open(files, &options, &mut |_| Ok(())) else { return };
    walk(&incoming);
});

fn walk(incoming: &Incoming) {
    let memory = &**incoming.memory();
    let preserved = incoming.preserved();
    let page = incoming.layout().page;
    assert!(incoming.map_nodes().iter().all(|node| memory.contains(node.start, node.len)));
    assert!(incoming.pages_outside() <= preserved.nr_pages());

    let numa = [NodeRange { start: Phys(0), len: 1 << 40, node: 0 }, NodeRange { start: Phys(1 << 40), len: 1 << 40, node: 1 }];
    let checks = check(incoming, &numa, 4);
    assert!(checks.overlapping.spots.len() <= 4 && checks.outside.spots.len() <= 4);

    let mut claims = Claims::default();
    for (n, subtree) in (0..).zip(&incoming.root().subtrees) {
        assert!(incoming.retrieve_subtree(&subtree.name).is_ok());
        let size = subtree.size.unwrap_or(page.bytes());
        claims.range(n, subtree.phys, size, Some(0));
        if let Ok(blob) = memory.read_vec("subtree", subtree.phys, size.min(1 << 16)) {
            let _ = Fdt::parse_partial(&blob);
        }
    }
    let owners = ChunkOwners::default();
    let heads: Vec<_> = preserved.iter().take(MOST).collect();
    for (n, (pfn, _)) in (1000..).zip(&heads) {
        for version in [MemfdVersion::V1, MemfdVersion::V2] {
            let Ok(memfd) = Memfd::read(memory, page, page.phys(*pfn), version, &owners) else { continue };
            assert!(memfd.folios.len() as u128 * 16 <= memory.nbytes());
            let extents = memfd.extents(preserved);
            let mut window = vec![0; usize::try_from(memfd.size.min(1 << 14)).unwrap()];
            let _ = memfd.copy(memory, &extents, 0, &mut window);
            let _ = check_memfd(&memfd, preserved, 4);
            claims.vmalloc(n, n, &memfd.list);
            claims.memfd(n, &memfd, preserved);
        }
    }
    let joined = join(preserved, claims);
    let (owned, unowned) = totals(&joined.rows, 1000 + heads.len());
    let rows: u128 = joined.rows.iter().map(|row| u128::from(row.pages)).sum();
    assert_eq!(owned.iter().sum::<u128>() + unowned, rows);

    for (pfn, order) in heads {
        if let Ok(restored) = incoming.restore_folio(page.phys(pfn)) {
            assert!(restored.1 >= order && restored.0 == pfn);
            assert!(incoming.restore_folio(page.phys(pfn)).is_err());
        }
    }
    assert!(incoming.nr_restored() <= MOST as u64);
    assert!(incoming.unrestored().is_ok());
}
