//! Two threads at once, on a tracker each and on an order each of one tracker.

use crate::rows::{ALONE, Rows, time};
use crate::sets::row;
use kho::tracker::Tracker;
use kho::units::{Order, Pfn};
use kho_benches::api;
use kho_benches::memory::Touched;
use kho_benches::workload::Workload;
use std::time::Duration;

const ROUNDS: usize = 11;

/// How long a thread took, and how many folios it marked.
type Filled = (Duration, u64);

/// Per folio and thread, compared with one thread alone. Two processors share caches and memory, so that two flat bitmaps say what
/// of it is the machine's.
pub(crate) fn all(rows: &mut Rows, workload: &Workload) {
    let trackers = row(workload, "preserve, per thread");
    let orders = row(workload, "preserve, per thread, orders of one tracker");
    // One after the other, as the machine is not the same from one minute to the next.
    for round in 0..ROUNDS {
        let tracker = || {
            let mut t = api::empty();
            let took = time(|| api::preserve_each(&mut t, workload)).0;
            (took, t.len())
        };
        let flat = || flat(workload);
        let samples = [
            ("kho", together([&tracker, &tracker])),
            (ALONE, tracker()),
            ("flat bitmaps", together([&flat, &flat])),
            ("flat bitmap, one thread", flat()),
        ];
        let apart = [("kho", two_orders(workload)), (ALONE, one_order(workload))];
        for (row, (peer, (took, n))) in samples
            .into_iter()
            .map(|sample| (trackers, sample))
            .chain(apart.into_iter().chain(samples.into_iter().skip(2)).map(|sample| (orders, sample)))
        {
            assert_eq!(n, row.units);
            if round > 0 {
                rows.record(row, peer, took.as_secs_f64());
            }
        }
    }
}

/// Both at once: the longer one's time.
fn together(both: [&(dyn Fn() -> Filled + Sync); 2]) -> Filled {
    std::thread::scope(|scope| {
        let running = both.map(|fill| scope.spawn(fill));
        let filled = running.into_iter().filter_map(|thread| thread.join().ok());
        filled.max_by_key(|(took, _)| *took).unwrap_or_default()
    })
}

/// A workload's folios as folios of another order.
fn fill(t: &mut Tracker, workload: &Workload, order: Order) -> Filled {
    let mark = || workload.pfns.iter().for_each(|pfn| drop(t.preserve(Pfn(pfn << order.get()), order)));
    let took = time(mark).0;
    (took, t.len_of(order))
}

fn one_order(workload: &Workload) -> Filled {
    fill(&mut api::empty(), workload, Order::saturating(1))
}

fn two_orders(workload: &Workload) -> Filled {
    let mut t = api::empty();
    let mut parts = [0, 1].map(|order| (Order::saturating(order), t.split_off(Order::saturating(order))));
    let filled = std::thread::scope(|scope| {
        let running = parts.each_mut().map(|(order, part)| scope.spawn(|| fill(part, workload, *order)));
        let filled = running.into_iter().filter_map(|thread| thread.join().ok());
        filled.max_by_key(|(took, _)| *took).unwrap_or_default()
    });
    for (_, part) in parts {
        // What was taken out of a tracker goes back without a copy.
        assert!(t.append(part).is_ok());
    }
    assert_eq!(t.len(), 2 * workload.len() as u64);
    filled
}

fn flat(workload: &Workload) -> Filled {
    let memory = Touched::new(workload.span as usize / 8);
    // SAFETY: touched, zeroed, and this function's own.
    let bitmap = unsafe { std::slice::from_raw_parts_mut(memory.ptr().cast::<u64>(), memory.len() / 8) };
    time(|| {
        workload.pfns.iter().fold(0, |new, pfn| {
            let (word, bit) = (&mut bitmap[(pfn >> 6) as usize], 1 << (pfn & 63));
            let clear = *word & bit == 0;
            *word |= bit;
            new + u64::from(clear)
        })
    })
}
