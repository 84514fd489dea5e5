//! What a set of folios does, on each workload: this library, the C twin, and other sets of numbers.

use crate::peers::{Hashed, Peer};
use crate::rows::{ALONE, Other, Row, Rows, one_processor, time};
use criterion::Criterion;
use kho::tracker::{Orders, RoaringBits, Tracker};
use kho::units::{Order, Pfn};
use kho_benches::api;
use kho_benches::twin::{BEST, Build, KERNEL, Twin, Version};
use kho_benches::workload::Workload;
use std::cell::RefCell;
use std::hint::black_box;
use std::time::Duration;

pub(crate) const TWINS: [(&Build, Version); 4] =
    [(&KERNEL, Version::V1), (&BEST, Version::V1), (&KERNEL, Version::V4), (&BEST, Version::V4)];

const ONE: &str = "preserve, one call each";
const BATCH: &str = "preserve, batch";
const UNPRESERVE: &str = "unpreserve";
const ITERATE: &str = "iterate into an array";

pub(crate) fn row(workload: &Workload, operation: &'static str) -> Row {
    Row { workload: workload.name, operation, unit: "folio", units: workload.len() as u64 }
}

pub(crate) fn twins(workload: &Workload) -> [Twin; 4] {
    TWINS.map(|(build, version)| Twin::for_workload(build, version, workload))
}

pub(crate) fn in_turn<'a>(name: impl Into<String>, sample: impl FnMut() -> Duration + 'a) -> Other<'a> {
    (name.into(), Box::new(sample))
}

/// All of it.
pub(crate) fn all(rows: &mut Rows, c: &mut Criterion, workload: &Workload) {
    let mut full = api::empty();
    api::preserve_many(&mut full, workload);
    let mut twins = twins(workload);
    preserve(rows, c, workload, &mut twins);
    batch(rows, c, workload);
    unpreserve(rows, c, workload, &full, &mut twins);
    iterate(rows, c, workload, &full, &mut twins);
    drop(twins);
    if workload.orders.is_none() {
        interchange(rows, workload, &full);
    }
    drop(full);
    peer::<roaring::RoaringBitmap>(rows, workload);
    peer::<croaring::Bitmap>(rows, workload);
    peer::<Hashed>(rows, workload);
}

/// Into nothing, one call a folio. The twins are full afterwards.
fn preserve(rows: &mut Rows, c: &mut Criterion, workload: &Workload, twins: &mut [Twin]) {
    let one = row(workload, ONE);
    let mut bytes = 0;
    let kho = || {
        let mut t = api::empty();
        let took = time(|| api::preserve_each(&mut t, workload)).0;
        assert_eq!(t.len(), workload.len() as u64);
        bytes = t.nbytes();
        took
    };
    let each = twins.iter_mut().map(|twin| {
        in_turn(twin.name(), || {
            twin.clear();
            time(|| twin.preserve_each(workload)).0
        })
    });
    rows.turns(c, one, ("kho", kho), each);
    rows.bytes(one, "kho", bytes, workload.len());
    for twin in twins {
        rows.bytes(one, &twin.name(), twin.nbytes(), workload.len());
    }
}

/// The same in one call.
fn batch(rows: &mut Rows, c: &mut Criterion, workload: &Workload) {
    let batch = row(workload, BATCH);
    let fill = || {
        let mut t = api::empty();
        let took = time(|| api::preserve_many(&mut t, workload)).0;
        assert_eq!(t.len(), workload.len() as u64);
        took
    };
    rows.turns(c, batch, ("kho", fill), [in_turn(ALONE, || one_processor(fill))]);
    let narrow: Vec<u32> = workload.pfns.iter().map(|pfn| *pfn as u32).collect();
    rows.few(batch, "roaring", || time(|| narrow.iter().copied().collect::<roaring::RoaringBitmap>()).0);
    rows.few(batch, "croaring", || time(|| croaring::Bitmap::of(&narrow)).0);
}

fn unpreserve(rows: &mut Rows, c: &mut Criterion, workload: &Workload, full: &Tracker, twins: &mut [Twin]) {
    let kho = || {
        let mut t = full.clone();
        let took = time(|| api::unpreserve_each(&mut t, workload)).0;
        assert!(t.is_empty());
        took
    };
    let each = twins.iter_mut().map(|twin| {
        let (_, full) = twin.memory();
        in_turn(twin.name(), move || {
            twin.put_back(&full);
            time(|| twin.unpreserve_each(workload)).0
        })
    });
    rows.turns(c, row(workload, UNPRESERVE), ("kho", kho), each);
    // As they were.
    twins.iter_mut().for_each(|twin| twin.preserve_each(workload));
}

/// Every pfn into arrays that are there already; and every folio into one that is made.
fn iterate(rows: &mut Rows, c: &mut Criterion, workload: &Workload, full: &Tracker, twins: &mut [Twin]) {
    let row = row(workload, ITERATE);
    let orders: Vec<Order> = full.orders().collect();
    let lists = RefCell::new(vec![Vec::new(); orders.len()]);
    let list = || {
        let mut lists = lists.borrow_mut();
        lists.iter_mut().for_each(Vec::clear);
        time(|| orders.iter().zip(&mut *lists).for_each(|(order, list)| full.pfns_into(*order, list))).0
    };
    let out = RefCell::new(vec![0; workload.len()]);
    let each = twins.iter_mut().map(|twin| {
        in_turn(twin.name(), || {
            let (took, n) = time(|| twin.iterate(&mut out.borrow_mut(), workload.len()));
            assert_eq!(n, workload.len());
            took
        })
    });
    rows.turns(c, row, ("kho", list), [in_turn(ALONE, || one_processor(list))].into_iter().chain(each));
    // What was listed is what there is.
    let mut listed: Vec<(Pfn, Order)> = Vec::with_capacity(workload.len());
    for (order, list) in orders.iter().zip(lists.take()) {
        assert!(list.is_sorted());
        listed.extend(list.into_iter().map(|pfn| (Pfn(pfn), *order)));
    }
    assert!(listed.len() == workload.len() && workload.folios().all(|folio| full.contains(folio.0, folio.1)));
    assert!(listed.iter().all(|(pfn, order)| full.contains(*pfn, *order)));
    rows.run(c, row, "kho, folios", || time(|| black_box(full.folios())).0);
}

/// The portable Roaring format, out of a tracker and into one: by the library's codec, which works on the words of its
/// bitmaps, and by the `roaring` crate, for which each number is listed.
fn interchange(rows: &mut Rows, workload: &Workload, full: &Tracker) {
    let (to, from) = (row(workload, "to Roaring bytes"), row(workload, "from Roaring bytes"));
    let write = || full.to_roaring(Order::ZERO, RoaringBits::B32, true);
    let bytes = write().unwrap_or_default();
    rows.few(to, "kho", || time(|| black_box(write())).0);
    rows.few(to, "roaring", || {
        let (took, made) = time(|| {
            let numbers = full.pfns(Order::ZERO).into_iter().map(|pfn| pfn as u32);
            let mut set = roaring::RoaringBitmap::from_sorted_iter(numbers).unwrap_or_default();
            set.optimize();
            let mut made = Vec::with_capacity(set.serialized_size());
            let _ = set.serialize_into(&mut made);
            made
        });
        assert!(made == bytes);
        took
    });
    rows.few(from, "kho", || {
        let mut t = api::empty();
        let took = time(|| t.adopt_roaring(Order::ZERO, RoaringBits::B32, &bytes)).0;
        assert_eq!(t.len(), workload.len() as u64);
        took
    });
    rows.few(from, "roaring", || {
        let mut t = api::empty();
        let took = time(|| {
            let set = roaring::RoaringBitmap::deserialize_from(&bytes[..]).unwrap_or_default();
            let pfns: Vec<u64> = set.iter().map(u64::from).collect();
            t.preserve_many(&pfns[..], Orders::One(Order::ZERO))
        })
        .0;
        assert_eq!(t.len(), workload.len() as u64);
        took
    });
}

/// All of it by another set of numbers, which knows no orders: pfns alone.
fn peer<P: Peer>(rows: &mut Rows, workload: &Workload) {
    let mut full = None;
    rows.few(row(workload, ONE), P::NAME, || {
        full = None;
        let (took, set) = time(|| P::inserted(&workload.pfns));
        full = Some(set);
        took
    });
    let Some(full) = full else { return };
    rows.bytes(row(workload, ONE), P::NAME, full.nbytes(), workload.len());
    rows.few(row(workload, UNPRESERVE), P::NAME, || {
        let mut set = full.clone();
        let took = time(|| set.remove_each(&workload.pfns)).0;
        assert!(set.is_empty());
        took
    });
    rows.few(row(workload, ITERATE), P::NAME, || time(|| black_box(full.list())).0);
}

/// Consecutive folios kept as order 0, told as a range. The kernel has no such call: it is compared with its one by one.
pub(crate) fn range(rows: &mut Rows, c: &mut Criterion, workload: &Workload) {
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
