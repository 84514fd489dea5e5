//! The hot paths alone, for counting instructions:
//!
//! ```text
//! valgrind --tool=callgrind --toggle-collect='hot::*' target/release/examples/hot
//! ```
//! Each function below is one call of the tracker per element; its cost per element is its count over [`N`].

use kho::Result;
use kho::tracker::{Geometry, Tracker};
use kho::units::{Order, PageSize, Pfn};
use std::hint::black_box;

/// Calls measured in each function.
const N: u64 = 100_000;

#[inline(never)]
fn preserve(t: &mut Tracker, pfn: Pfn, order: Order) -> Result<bool> {
    t.preserve(pfn, order)
}

/// `pages` order-0 pfns at an odd stride.
#[inline(never)]
fn preserve_loop(t: &mut Tracker, pages: u64) -> Result<()> {
    let mut pfn = 0;
    for _ in 0..pages {
        t.preserve(Pfn(pfn), Order::ZERO)?;
        pfn = (pfn + 104_729) & 0xfff_ffff;
    }
    Ok(())
}

#[inline(never)]
fn unpreserve(t: &mut Tracker, pfn: Pfn, order: Order) -> Result<bool> {
    t.unpreserve(pfn, order)
}

#[inline(never)]
fn contains(t: &Tracker, pfn: Pfn, order: Order) -> bool {
    t.contains(pfn, order)
}

#[inline(never)]
fn folios(t: &Tracker) -> usize {
    black_box(t.folios()).len()
}

fn main() {
    let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
    let order = black_box(Order::ZERO);
    // Random pages of 1 TiB, in blocks that exist: an odd multiplier permutes the pfns.
    let pages = || (1..=N).map(|n| Pfn(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 36));
    for block in 0..1 << 13 {
        let first = Pfn(block << 15);
        let _ = t.preserve(first, order);
        let _ = t.unpreserve(first, order);
    }
    let set = pages().filter(|&pfn| matches!(preserve(&mut t, pfn, order), Ok(true))).count();
    let found = pages().filter(|&pfn| contains(&t, pfn, order)).count();
    let listed = folios(&t);
    let cleared = pages().filter(|&pfn| matches!(unpreserve(&mut t, pfn, order), Ok(true))).count();
    let _ = preserve_loop(&mut t, black_box(N));
    println!("calls {N}\nset {set}\nfound {found}\nlisted {listed}\ncleared {cleared}\nleft {}", t.len());
}
