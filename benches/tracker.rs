//! The tracker beside roaring and a hash set: W1 (random order-0 pages of 1 TiB), W2 (consecutive pages).
//!
//! `cargo bench -p kho --bench tracker`. Criterion reports elements a second; ratios between the peers of one group are
//! what counts. `KHO_BENCH_N` sets the number of pages (1,000,000).

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kho::tracker::{Geometry, Tracker};
use kho::units::{Order, PageSize, Pfn};
use roaring::RoaringBitmap;
use std::collections::HashSet;
use std::hint::black_box;
use std::time::Duration;

/// `n` pseudo-random pfns of the 2^28 pages in 1 TiB: xorshift64*, seeded.
fn w1(n: u64) -> Vec<u64> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let draw = |_| {
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 36
    };
    (0..n).map(draw).collect()
}

fn tracker(pfns: &[u64]) -> Tracker {
    let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
    for &pfn in pfns {
        let _ = t.preserve(Pfn(pfn), Order::ZERO);
    }
    t
}

fn roaring(pfns: &[u64]) -> RoaringBitmap {
    let mut set = RoaringBitmap::new();
    for &pfn in pfns {
        set.insert(pfn as u32);
    }
    set
}

fn hash_set(pfns: &[u64]) -> HashSet<u64> {
    let mut set = HashSet::new();
    set.extend(pfns);
    set
}

fn size() -> u64 {
    let given = std::env::var("KHO_BENCH_N").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(1_000_000)
}

fn insert(c: &mut Criterion) {
    let n = size();
    for (name, pfns) in [("W1", w1(n)), ("W2", (0..n).collect())] {
        let mut group = c.benchmark_group(format!("{name} preserve"));
        group.throughput(Throughput::Elements(n));
        group.bench_function("kho", |b| b.iter_with_large_drop(|| tracker(&pfns)));
        group.bench_function("roaring", |b| b.iter_with_large_drop(|| roaring(&pfns)));
        group.bench_function("HashSet", |b| b.iter_with_large_drop(|| hash_set(&pfns)));
        // The same into blocks that exist, and back: what a call costs without its share of page faults.
        let mut t = tracker(&pfns);
        group.bench_function(BenchmarkId::new("kho", "warm"), |b| {
            b.iter(|| {
                for &pfn in &pfns {
                    let _ = t.unpreserve(Pfn(pfn), Order::ZERO);
                }
                for &pfn in &pfns {
                    let _ = t.preserve(Pfn(pfn), Order::ZERO);
                }
            });
        });
        group.finish();
    }
    let mut group = c.benchmark_group("W2 as a range");
    group.throughput(Throughput::Elements(n));
    group.bench_function("kho", |b| {
        b.iter_with_large_drop(|| {
            let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
            let _ = t.preserve_run(Pfn(0), Order::ZERO, n);
            t
        });
    });
    group.bench_function("roaring", |b| {
        b.iter_with_large_drop(|| {
            let mut set = RoaringBitmap::new();
            set.insert_range(0..n as u32);
            set
        });
    });
    group.finish();
}

fn remove(c: &mut Criterion) {
    let pfns = w1(size());
    let mut group = c.benchmark_group("W1 unpreserve");
    group.throughput(Throughput::Elements(pfns.len() as u64));
    let full = tracker(&pfns);
    group.bench_function("kho", |b| {
        let clear = |mut t: Tracker| {
            for &pfn in &pfns {
                let _ = t.unpreserve(Pfn(pfn), Order::ZERO);
            }
            t
        };
        b.iter_batched(|| full.clone(), clear, BatchSize::PerIteration);
    });
    let full = roaring(&pfns);
    group.bench_function("roaring", |b| {
        let clear = |mut set: RoaringBitmap| {
            for &pfn in &pfns {
                set.remove(pfn as u32);
            }
            set
        };
        b.iter_batched(|| full.clone(), clear, BatchSize::PerIteration);
    });
    group.finish();
}

fn list(c: &mut Criterion) {
    let pfns = w1(size());
    let (t, set) = (tracker(&pfns), roaring(&pfns));
    let mut group = c.benchmark_group("W1 list");
    group.throughput(Throughput::Elements(t.len()));
    group.bench_function("kho pfns", |b| b.iter(|| black_box(t.pfns(Order::ZERO))));
    group.bench_function("kho folios", |b| b.iter(|| black_box(t.folios())));
    group.bench_function("kho iter", |b| b.iter(|| t.iter().map(|f| f.0.0).sum::<u64>()));
    group.bench_function("roaring", |b| {
        b.iter(|| black_box(set.iter().collect::<Vec<u32>>()));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    targets = insert, remove, list
}
criterion_main!(benches);
