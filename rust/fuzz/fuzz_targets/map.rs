//! Any memory as a preserved-memory map of every ABI: no panic, no walk longer than the memory, and what was read is
//! read again from what is written of it.
//!
//! The first byte picks the page size, the rest is memory from the first page on; its map begins there.

#![no_main]

use kho::abi::layout::BitmapSize;
use kho::abi::radix::{self, Shape};
use kho::abi::{ABIS, chunk, detect};
use kho::memory::{PhysMemory, SliceMemory};
use kho::units::{PageSize, Phys};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    let page = PageSize::ALL[usize::from(*kind) % 3];
    let map = Phys(page.bytes());
    let memory = SliceMemory::new([(map, bytes)]).unwrap();
    let pages = memory.nbytes() / u128::from(page.bytes());

    if let Ok(chunks) = chunk::walk(&memory, page, map) {
        assert!(chunks.len() as u128 <= pages);
        for bitmap in BitmapSize::ALL {
            let geometry = chunk::geometry(page, bitmap).unwrap();
            if chunk::check(&memory, geometry, &chunks).is_ok()
                && let Ok(tracker) = chunk::read(&memory, geometry, &chunks)
            {
                assert!(u128::from(tracker.len()) <= 8 * memory.nbytes());
            }
        }
    }

    for abi in &ABIS {
        let known = detect::Known { fdt: map, ..detect::Known::default() };
        if let Ok(reading) = detect::decide(detect::Place::Memory(&memory), abi, map, &known, detect::Hints::default()) {
            assert!(!reading.nodes.is_empty());
        }
        let Some(shape) = Shape::of(abi, page) else {
            continue;
        };
        let Ok(tree) = radix::read(&memory, shape, map) else {
            continue;
        };
        assert!(tree.nodes.len() as u128 <= pages);
        let mut next = 0;
        let written = radix::serialize(&tree.tracker, shape, || {
            next += page.bytes();
            Ok(Phys(next))
        });
        let written = written.expect("what a tree of this shape held");
        let root = written.last().unwrap().0;
        let again = radix::read(&SliceMemory::new(written).unwrap(), shape, root).unwrap();
        assert!(again.tracker == tree.tracker);
    }
});
