//! The Rust half of `make bench`: W1, W2, W3 by this library, the C twin, and other sets.
//!
//! `cargo bench --manifest-path benches/Cargo.toml`, and a filter behind `--` as criterion takes it. Every sample goes to
//! `KHO_BENCH_JSON` (else target/bench.json), from which benches/report.py makes the table.

mod floors;
mod handover;
mod peers;
mod rows;

use criterion::{Criterion, criterion_group, criterion_main};
use kho::units::{Order, Pfn};
use kho_benches::api;
use kho_benches::memory::Touched;
use kho_benches::twin::{BEST, Build, KERNEL, Twin, Version};
use kho_benches::workload::{self, Workload};
use peers::{Hashed, Peer};
use rows::{Other, Row, Rows, time};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Duration;

const TWINS: [(&Build, Version); 4] =
    [(&KERNEL, Version::V1), (&BEST, Version::V1), (&KERNEL, Version::V4), (&BEST, Version::V4)];

fn row(workload: &Workload, operation: &'static str) -> Row {
    Row { workload: workload.name, operation, unit: "folio", units: workload.len() as u64 }
}

fn twins(workload: &Workload) -> [Twin; 4] {
    TWINS.map(|(build, version)| Twin::for_workload(build, version, workload))
}

fn in_turn<'a>(name: String, sample: impl FnMut() -> Duration + 'a) -> Other<'a> {
    (name, Box::new(sample))
}

/// Into nothing, one call a folio.
fn preserve(rows: &mut Rows, c: &mut Criterion, workload: &Workload, others: bool) {
    let one = row(workload, "preserve, one call each");
    let mut bytes = 0;
    let kho = || {
        let mut t = api::empty();
        let took = time(|| api::preserve_each(&mut t, workload)).0;
        assert_eq!(t.len(), workload.len() as u64);
        bytes = t.nbytes();
        took
    };
    let mut twins = twins(workload);
    let each = twins.iter_mut().map(|twin| {
        in_turn(twin.name(), || {
            twin.clear();
            time(|| twin.preserve_each(workload)).0
        })
    });
    rows.turns(c, one, ("kho", kho), each);
    rows.bytes(one, "kho", bytes, workload.len());
    for twin in &twins {
        rows.bytes(one, &twin.name(), twin.nbytes(), workload.len());
    }
    if !others {
        return;
    }
    fn other<P: Peer>(rows: &mut Rows, row: Row, workload: &Workload) {
        let mut bytes = 0;
        rows.few(row, P::NAME, || {
            let (took, set) = time(|| P::inserted(&workload.pfns));
            bytes = set.nbytes();
            took
        });
        rows.bytes(row, P::NAME, bytes, workload.len());
    }
    other::<roaring::RoaringBitmap>(rows, one, workload);
    other::<croaring::Bitmap>(rows, one, workload);
    other::<Hashed>(rows, one, workload);
}

/// The same in one call.
fn preserve_batch(rows: &mut Rows, c: &mut Criterion, workload: &Workload, others: bool) {
    let batch = row(workload, "preserve, batch");
    rows.run(c, batch, "kho", || {
        let mut t = api::empty();
        let took = time(|| api::preserve_many(&mut t, workload)).0;
        assert_eq!(t.len(), workload.len() as u64);
        took
    });
    if others {
        let narrow: Vec<u32> = workload.pfns.iter().map(|pfn| *pfn as u32).collect();
        rows.few(batch, "roaring", || time(|| narrow.iter().copied().collect::<roaring::RoaringBitmap>()).0);
        rows.few(batch, "croaring", || time(|| croaring::Bitmap::of(&narrow)).0);
    }
}

fn unpreserve(rows: &mut Rows, c: &mut Criterion, workload: &Workload) {
    let row = row(workload, "unpreserve");
    let mut full = api::empty();
    api::preserve_many(&mut full, workload);
    let kho = || {
        let mut t = full.clone();
        let took = time(|| api::unpreserve_each(&mut t, workload)).0;
        assert!(t.is_empty());
        took
    };
    let mut twins = twins(workload);
    let each = twins.iter_mut().map(|twin| {
        twin.preserve_each(workload);
        let (_, full) = twin.memory();
        in_turn(twin.name(), move || {
            twin.put_back(&full);
            time(|| twin.unpreserve_each(workload)).0
        })
    });
    rows.turns(c, row, ("kho", kho), each);
    fn other<P: Peer>(rows: &mut Rows, row: Row, workload: &Workload) {
        let full = P::inserted(&workload.pfns);
        rows.few(row, P::NAME, || {
            let mut set = full.clone();
            let took = time(|| set.remove_each(&workload.pfns)).0;
            assert!(set.is_empty());
            took
        });
    }
    other::<roaring::RoaringBitmap>(rows, row, workload);
    other::<croaring::Bitmap>(rows, row, workload);
    other::<Hashed>(rows, row, workload);
}

/// Every pfn into an array that is there already; and every folio into one that is made.
fn iterate(rows: &mut Rows, c: &mut Criterion, workload: &Workload) {
    let row = row(workload, "iterate into an array");
    let mut full = api::empty();
    api::preserve_many(&mut full, workload);
    let mut sorted = workload.pfns.clone();
    sorted.sort_unstable();
    let mut pfns = Vec::with_capacity(sorted.len());
    let kho = || {
        pfns.clear();
        let took = time(|| full.pfns_into(Order::ZERO, &mut pfns)).0;
        assert_eq!(pfns, sorted);
        took
    };
    let mut twins = twins(workload);
    let out = RefCell::new(vec![0; workload.len()]);
    let each = twins.iter_mut().map(|twin| {
        twin.preserve_each(workload);
        in_turn(twin.name(), || {
            let (took, n) = time(|| twin.iterate(&mut out.borrow_mut(), workload.len()));
            assert_eq!(n, workload.len());
            took
        })
    });
    rows.turns(c, row, ("kho", kho), each);
    rows.run(c, row, "kho, folios", || time(|| black_box(full.folios())).0);
    fn other<P: Peer>(rows: &mut Rows, row: Row, workload: &Workload) {
        let set = P::inserted(&workload.pfns);
        rows.few(row, P::NAME, || time(|| black_box(set.list())).0);
    }
    other::<roaring::RoaringBitmap>(rows, row, workload);
    other::<croaring::Bitmap>(rows, row, workload);
}

/// W2 kept as order 0, told as a range. The kernel has no such call: it is compared with its one by one.
fn range(rows: &mut Rows, c: &mut Criterion, workload: &Workload) {
    let (row, n) = (row(workload, "as a range kept order-0"), workload.len() as u64);
    rows.run(c, row, "kho", || {
        let mut t = api::empty();
        let took = time(|| t.preserve_run(Pfn(0), Order::ZERO, n)).0;
        assert_eq!(t.len(), n);
        took
    });
    let end = n as u32;
    rows.few(row, "roaring", || {
        let mut set = roaring::RoaringBitmap::new();
        time(|| set.insert_range(0..end)).0
    });
    rows.few(row, "croaring", || {
        let mut set = croaring::Bitmap::new();
        time(|| set.add_range(0..end)).0
    });
}

/// Two trackers, each filled by a thread of its own, against one filled by one: per folio and thread. Two processors share
/// caches and memory, so that two flat bitmaps say what of it is the machine's.
fn threads(rows: &mut Rows, workload: &Workload) {
    const ROUNDS: usize = 11;
    let row = row(workload, "preserve, per thread");
    let tracker = || {
        let mut t = api::empty();
        let took = time(|| api::preserve_each(&mut t, workload)).0;
        (took, t.len())
    };
    let flat = || {
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
    };
    let sample = |threads: usize, fill: &(dyn Fn() -> (Duration, u64) + Sync)| {
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(fill)).collect();
            let filled = running.into_iter().filter_map(|thread| thread.join().ok());
            filled.inspect(|(_, n)| assert_eq!(*n, row.units)).map(|(took, _)| took).max().unwrap_or_default()
        })
    };
    // One after the other, as the machine is not the same from one minute to the next.
    for round in 0..ROUNDS {
        for (peer, threads, fill) in [
            ("kho", 2, &tracker as &(dyn Fn() -> _ + Sync)),
            ("kho, one thread", 1, &tracker),
            ("flat bitmaps", 2, &flat),
            ("flat bitmap, one thread", 1, &flat),
        ] {
            let took = sample(threads, fill);
            if round > 0 {
                rows.record(row, peer, took.as_secs_f64());
            }
        }
    }
}

fn all(c: &mut Criterion) {
    let mut rows = Rows::default();
    let n = workload::size();
    floors::all(&mut rows, c);
    let w1 = Workload::w1(n);
    preserve(&mut rows, c, &w1, true);
    preserve_batch(&mut rows, c, &w1, true);
    unpreserve(&mut rows, c, &w1);
    iterate(&mut rows, c, &w1);
    threads(&mut rows, &w1);
    handover::all(&mut rows, c, &w1);
    let w2 = Workload::w2(n);
    preserve(&mut rows, c, &w2, true);
    range(&mut rows, c, &w2);
    let w3 = Workload::w3(n);
    preserve(&mut rows, c, &w3, false);
    preserve_batch(&mut rows, c, &w3, false);
    let path = std::env::var("KHO_BENCH_JSON").unwrap_or_else(|_| "target/bench.json".into());
    let facts = BTreeMap::from([("folios", n.to_string()), ("arch", std::env::consts::ARCH.to_owned())]);
    if let Err(e) = std::fs::write(&path, rows.json(&facts)) {
        eprintln!("{path}: {e}");
        std::process::exit(2);
    }
}

/// As few samples as criterion takes: a sample is one pass over millions of folios.
fn config() -> Criterion {
    Criterion::default()
        .without_plots()
        .sample_size(10)
        .nresamples(1000)
        .warm_up_time(Duration::from_nanos(1))
        .measurement_time(Duration::from_nanos(1))
}

criterion_group! {
    name = benches;
    config = config();
    targets = all
}
criterion_main!(benches);
