//! Any memory as page lists and memfds: no panic, no chunk visited twice, and no more read than there is.
//!
//! The first byte picks page size and version, the rest is memory from the first page on.

#![no_main]

use kho::memory::{PhysMemory, SliceMemory};
use kho::payload::{ChunkOwners, Memfd, MemfdVersion};
use kho::tracker::{Geometry, Tracker};
use kho::units::{PageSize, Phys};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    let page = PageSize::ALL[usize::from(*kind) % 3];
    let version = if kind & 0x80 == 0 { MemfdVersion::V1 } else { MemfdVersion::V2 };
    let memory = SliceMemory::new([(Phys(page.bytes()), bytes)]).unwrap();
    let owners = ChunkOwners::default();
    let Ok(memfd) = Memfd::read(&memory, page, Phys(page.bytes()), version, &owners) else {
        return;
    };
    assert!(memfd.list.chunks.len() as u128 <= memory.nbytes() / u128::from(page.bytes()));
    assert!(memfd.folios.len() as u128 * 16 <= memory.nbytes());
    let preserved = Tracker::new(Geometry::new(page, 512).unwrap());
    let extents = memfd.extents(&preserved);
    assert!(extents.windows(2).all(|pair| pair[0].offset + pair[0].len <= pair[1].offset));
    let mut window = vec![0; usize::try_from(memfd.size.min(1 << 16)).unwrap()];
    let _ = memfd.copy(&memory, &extents, 0, &mut window);
});
