//! The hot paths alone, for counting instructions: `hot NAME` runs the one function that `benches/guard` counts.
//!
//! ```text
//! valgrind --tool=callgrind --toggle-collect=hot_preserve target/release/hot preserve
//! ```
//! What happens inside of a function `hot_...` is counted and nothing else; a count is over all its calls, divided by
//! the elements that `hot` prints. `..._loop` have the call inlined into a loop, whose own instructions count too.

use kho::find;
use kho::incoming::Incoming;
use kho::memory::SliceMemory;
use kho::payload::unlisted;
use kho::tracker::{Geometry, Tracker};
use kho::units::{Order, PageSize, Pfn, Phys};
use kho_benches::api;
use kho_benches::twin::{KERNEL, Twin, Version};
use kho_benches::workload::{Workload, shuffled};
use std::hint::black_box;

/// Calls of each function.
const N: u64 = 100_000;
/// The pfns are below this: 1 TiB.
const SPAN: u64 = 1 << 28;
/// Folios in a run.
const RUN: u64 = 1 << 24;
/// Pages of the memory that is searched: half noise, half words as kernel data has them.
const PAGES: u64 = 1 << 12;

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_preserve(t: &mut Tracker, pfn: Pfn, order: Order) -> bool {
    matches!(t.preserve(pfn, order), Ok(true))
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_preserve_loop(t: &mut Tracker, workload: &Workload) {
    api::preserve_each(t, workload);
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_unpreserve(t: &mut Tracker, pfn: Pfn, order: Order) -> bool {
    matches!(t.unpreserve(pfn, order), Ok(true))
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_contains(t: &Tracker, pfn: Pfn, order: Order) -> bool {
    t.contains(pfn, order)
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_preserve_many(t: &mut Tracker, workload: &Workload) {
    api::preserve_many(t, workload);
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_search(memory: &SliceMemory) -> usize {
    find::find(memory, |_| Ok(())).map_or(usize::MAX, |found| found.fdts.len() + found.memfds.len())
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_memfd_candidates(pages: &[u8]) -> usize {
    pages.chunks_exact(4096).filter(|page| unlisted::candidate(page).is_some()).count()
}

/// Memory that is searched: every other page is noise; the rest begin with small numbers, zeros and addresses, as the
/// structure of a memfd does, and zeros follow.
fn searched() -> Vec<u8> {
    let mut made = Vec::new();
    for page in 0..PAGES {
        let start = made.len();
        let word = |n: u64| shuffled(page * 512 + n, 63) ^ n << 63;
        let words: Vec<u64> = match page % 2 {
            0 => (0..512).map(word).collect(),
            _ => (0..6)
                .map(|n| [0, 1, word(n) % (1 << 14), word(n) % PAGES * 4096][(word(n) >> 40) as usize % 4])
                .collect(),
        };
        made.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        made.resize(start + 4096, 0);
    }
    made
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_preserve_run(t: &mut Tracker, pages: u64) -> bool {
    t.preserve_run(Pfn(0), Order::ZERO, pages).is_ok_and(|new| new == pages)
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_pfns(t: &Tracker) -> Vec<u64> {
    t.pfns(Order::ZERO)
}

#[unsafe(no_mangle)]
#[inline(never)]
fn hot_restore(incoming: &Incoming, pfn: u64) -> bool {
    api::restore(incoming, pfn).is_ok()
}

macro_rules! of_twin {
    ($($function:ident = |$t:ident, $workload:ident| $work:expr;)*) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        fn $function($t: &mut Twin, $workload: &Workload) {
            $work;
        }
    )*};
}

of_twin! {
    hot_twin_preserve = |t, workload| t.preserve_each(workload);
    hot_twin_unpreserve = |t, workload| t.unpreserve_each(workload);
    hot_twin_iterate = |t, workload| t.iterate(&mut vec![0; workload.len()], workload.len());
}

/// An empty tracker that has every block of the span.
fn blocks() -> Tracker {
    let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
    for first in (0..SPAN).step_by(1 << 15) {
        let _ = t.preserve(Pfn(first), Order::ZERO);
        let _ = t.unpreserve(Pfn(first), Order::ZERO);
    }
    t
}

fn filled(workload: &Workload) -> Tracker {
    let mut t = blocks();
    api::preserve_each(&mut t, workload);
    t
}

/// How many elements were counted; `None` for an unknown name, or if the result is wrong.
fn run(name: &str) -> Option<u64> {
    let pfns: Vec<u64> = (0..N).map(|n| shuffled(n, SPAN.ilog2())).collect();
    let workload = Workload { name: "hot", pfns, orders: None, span: SPAN };
    let order = black_box(Order::ZERO);
    let folios = || workload.pfns.iter().map(|pfn| Pfn(*pfn));
    let all = |count: usize| (count as u64 == N).then_some(N);
    match name {
        "preserve" => {
            let mut t = blocks();
            all(folios().filter(|pfn| hot_preserve(&mut t, *pfn, order)).count())
        }
        "preserve_loop" => {
            let mut t = blocks();
            hot_preserve_loop(&mut t, &workload);
            all(t.len() as usize)
        }
        "unpreserve" => {
            let mut t = filled(&workload);
            all(folios().filter(|pfn| hot_unpreserve(&mut t, *pfn, order)).count())
        }
        "contains" => {
            let t = filled(&workload);
            all(folios().filter(|pfn| hot_contains(&t, *pfn, order)).count())
        }
        "preserve_many" => {
            let mut t = blocks();
            hot_preserve_many(&mut t, &workload);
            all(t.len() as usize)
        }
        // By words of 64 folios.
        "preserve_run" => {
            let mut t = blocks();
            hot_preserve_run(&mut t, RUN).then_some(RUN / 64)
        }
        "search" => {
            let memory = SliceMemory::new([(Phys(0), searched())]).ok()?;
            (hot_search(&memory) == 0).then_some(PAGES)
        }
        "memfd_candidates" => (black_box(hot_memfd_candidates(&searched())) == 0).then_some(PAGES),
        // As dense as W1 and no block empty, so that what is counted is bits and not words.
        "pfns" => {
            let dense: Vec<u64> = (0..N).map(|n| shuffled(n, 21)).collect();
            let mut t = api::empty();
            api::preserve_each(&mut t, &Workload { pfns: dense, ..workload });
            all(black_box(hot_pfns(&t)).len())
        }
        "restore" => {
            // Callgrind has no room for 1 TiB.
            let pfns: Vec<u64> = (0..N).map(|n| shuffled(n, 20)).collect();
            let workload = Workload { name: "hot", pfns, orders: None, span: 1 << 20 };
            let arena = api::arena(workload.span).ok()?;
            let mut out = api::outgoing(&arena, "kho-v1", &api::in_arena(&workload)).ok()?;
            out.finalize().ok()?;
            drop(out);
            let incoming = api::take_over(&arena).ok()?;
            all(workload.pfns.iter().filter(|pfn| hot_restore(&incoming, **pfn)).count())
        }
        "twin_v1_preserve" | "twin_v1_unpreserve" | "twin_v1_iterate" | "twin_v4_preserve" | "twin_v4_unpreserve"
        | "twin_v4_iterate" => {
            let version = if name.contains("v1") { Version::V1 } else { Version::V4 };
            let pfns: Vec<u64> = (0..SPAN).step_by(1 << 15).collect();
            let every_block = Workload { name: "", pfns, orders: None, span: SPAN };
            let mut twin = Twin::for_workload(&KERNEL, version, &workload);
            twin.preserve_each(&every_block);
            twin.unpreserve_each(&every_block);
            if name.ends_with("_preserve") {
                hot_twin_preserve(&mut twin, &workload);
            } else if name.ends_with("_unpreserve") {
                twin.preserve_each(&workload);
                hot_twin_unpreserve(&mut twin, &workload);
            } else {
                let dense: Vec<u64> = (0..N).map(|n| shuffled(n, 21)).collect();
                let workload = Workload { pfns: dense, ..workload };
                let mut twin = Twin::for_workload(&KERNEL, version, &workload);
                twin.preserve_each(&workload);
                hot_twin_iterate(&mut twin, &workload);
            }
            Some(N)
        }
        _ => None,
    }
}

fn main() {
    let name = std::env::args().nth(1).unwrap_or_default();
    match run(&name) {
        Some(elements) => println!("{elements}"),
        None => {
            eprintln!("hot: no function {name:?}, or it did not do its work");
            std::process::exit(2);
        }
    }
}
