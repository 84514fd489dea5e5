//! Any bytes as a Roaring bitmap: no panic, nothing marked by what is refused, and what was read is read again from what
//! is written of it.
//!
//! The first byte picks the page size, the block size, the order and how wide numbers are.

#![no_main]

use kho::tracker::{Geometry, RoaringBits, Tracker};
use kho::units::{Order, PageSize, Pfn};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    let page = PageSize::ALL[usize::from(kind & 3) % 3];
    let block = if kind & 4 == 0 { 512 } else { page.bytes() };
    let geometry = Geometry::new(page, block).unwrap();
    let bits = if kind & 8 == 0 { RoaringBits::B32 } else { RoaringBits::B64 };
    let order = Order::saturating(u32::from(kind >> 4));

    let mut tracker = Tracker::new(geometry);
    tracker.preserve(Pfn(0), order).unwrap();
    let had = tracker.clone();
    let new = match tracker.adopt_roaring(order, bits, bytes) {
        Ok(new) => new,
        Err(_) => {
            assert!(tracker == had);
            return;
        }
    };
    assert_eq!(tracker.len(), new + 1);
    assert_eq!(tracker.adopt_roaring(order, bits, bytes).unwrap(), 0);
    for runs in [false, true] {
        let written = tracker.to_roaring(order, bits, runs).unwrap();
        let mut again = Tracker::new(geometry);
        assert_eq!(again.adopt_roaring(order, bits, &written).unwrap(), tracker.len());
        assert!(again == tracker);
        assert_eq!(again.to_roaring(order, bits, runs).unwrap(), written);
    }
});
