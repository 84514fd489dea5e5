//! What no method can go below on this machine, measured in the same run.

use crate::rows::{Row, Rows, time};
use criterion::Criterion;
use kho_benches::memory::{HUGE, Touched};
use kho_benches::workload::shuffled;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The memory that is not in a cache, or in the last at best.
const BYTES: usize = 32 << 20;

const fn floor(operation: &'static str, unit: &'static str, units: u64) -> Row {
    Row { workload: "floor", operation, unit, units }
}

/// All floors.
pub(crate) fn all(rows: &mut Rows, c: &mut Criterion) {
    const LARGE: usize = 256 << 20;
    let (from, to) = (Touched::new(LARGE), Touched::new(LARGE));
    // SAFETY: both mappings are touched, zeroed, and this function's own.
    let (from, to) = unsafe {
        (
            std::slice::from_raw_parts(from.ptr().cast::<u64>(), LARGE / 8),
            std::slice::from_raw_parts_mut(to.ptr(), LARGE),
        )
    };
    let bytes = floor("memcpy", "KiB", LARGE as u64 >> 10);
    rows.run(c, bytes, "machine", || {
        // SAFETY: u64s are bytes, eight each.
        let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr().cast::<u8>(), LARGE) };
        time(|| black_box(&mut *to).copy_from_slice(black_box(bytes))).0
    });
    rows.run(c, floor("popcount", "KiB", LARGE as u64 >> 10), "machine", || {
        time(|| black_box(black_box(from).iter().map(|word| u64::from(word.count_ones())).sum::<u64>())).0
    });
    loads(rows, c);
    for (name, step, huge) in [("first touch of 4 KiB", 4096, false), ("first touch of 2 MiB", HUGE, true)] {
        const TOUCHED: usize = 64 << 20;
        rows.run(c, floor(name, "page", (TOUCHED / step) as u64), "machine", || {
            let memory = Touched::untouched(TOUCHED, huge);
            let touch = || {
                for at in (0..TOUCHED).step_by(step) {
                    // SAFETY: inside the mapping, which only this function uses.
                    unsafe { memory.ptr().add(at).write_volatile(1) };
                }
            };
            time(touch).0
        });
    }
}

/// Random loads of words, each telling where the next is or not, and random locked bit sets.
fn loads(rows: &mut Rows, c: &mut Criterion) {
    const WORDS: u64 = BYTES as u64 / 8;
    const N: u64 = 1 << 20;
    let bits = WORDS.ilog2();
    // One cycle through all words: each says where its successor in a shuffled order is.
    let order: Vec<u64> = (0..WORDS).map(|n| shuffled(n, bits)).collect();
    let mut next = vec![0u64; WORDS as usize];
    for pair in order.windows(2) {
        next[pair[0] as usize] = pair[1];
    }
    rows.run(c, floor("dependent load over 32 MiB", "load", N), "machine", || {
        time(|| black_box((0..N).fold(order[0], |at, _| next[at as usize]))).0
    });
    rows.run(c, floor("independent load over 32 MiB", "load", N), "machine", || {
        time(|| black_box(order[..N as usize].iter().map(|at| next[*at as usize]).fold(0, u64::wrapping_add))).0
    });
    let words: Vec<AtomicU64> = next.into_iter().map(AtomicU64::new).collect();
    let mut set = |name, mask: u64| {
        rows.run(c, floor(name, "bit", N), "machine", || -> Duration {
            let work = || {
                for at in &order[..N as usize] {
                    words[(at & mask) as usize].fetch_or(1 << (at & 63), Ordering::Relaxed);
                }
            };
            time(work).0
        });
    };
    set("locked bit set over 32 MiB", !0);
    set("locked bit set over 4 KiB", 511);
}
