//! Trackers of every kind compared with a model, a set.

#![allow(unsafe_code)]

mod blocks;
mod lists;
mod sets;

use super::*;
use crate::error::Error;
use crate::tuning::{Tuning, override_tuning};
use crate::units::{PageSize, Phys, aligned_blocks};
use core::ptr::NonNull;
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

pub(super) type Model = BTreeSet<(u32, u64)>;

pub(super) fn order(o: u32) -> Order {
    Order::new(o.into()).unwrap()
}

pub(super) fn geometries() -> impl Strategy<Value = Geometry> {
    let all = PageSize::ALL
        .into_iter()
        .flat_map(|page| [Geometry::SMALL, page.bytes()].map(|bytes| Geometry::new(page, bytes).unwrap()));
    select(all.collect::<Vec<_>>())
}

/// A folio: an order, and a number near 0, a block's edge, a word's edge, the end of the address space, or anywhere.
fn folios(g: Geometry) -> impl Strategy<Value = (Pfn, Order)> {
    let orders = prop_oneof![4 => select(vec![0u32, 1, 9, 18, 36]), 1 => 0..=36u32];
    (orders, any::<u64>(), 0..6u64, 0..8u32).prop_map(move |(o, any, near, kind)| {
        let limit = g.folio_limit(order(o));
        let folio = match kind {
            0 => near,
            1 => 4093 + near,
            2 => 32765 + near,
            3 => (g.bits() * (any % 5 + 1) + near).wrapping_sub(3),
            4 => limit - 1 - near,
            5 => 61 + near,
            6 => any % 100_000,
            _ => any,
        } % limit;
        (Pfn(folio << o), order(o))
    })
}

#[derive(Clone, Debug)]
enum Op {
    Preserve(Pfn, Order),
    Unpreserve(Pfn, Order),
    Pages(Pfn, u64, bool),
    Run(Pfn, Order, u64, bool),
    Adopt(Pfn, Order, u64),
    Many(Vec<(Pfn, Order)>, bool),
}

/// A list of folios: short_list or long, of one order or several, ascending or not, close together or all over.
fn lists(g: Geometry) -> impl Strategy<Value = Vec<(Pfn, Order)>> {
    let scattered = (folios(g), any::<u64>(), 1..9u32, 0..700u64, any::<bool>());
    let scattered = scattered.prop_map(move |((p, o), seed, spread, n, sorted)| {
        let (first, limit) = (p.0 >> o.get(), g.folio_limit(o));
        let draw = |i: u64| (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - 3 * spread);
        let mut list: Vec<_> = (0..n).map(|i| (Pfn(((first + draw(i)) % limit) << o.get()), o)).collect();
        if sorted {
            list.sort();
        }
        list
    });
    let mixed = proptest::collection::vec(folios(g), 0..500);
    prop_oneof![3 => scattered, 1 => mixed]
}

fn ops(g: Geometry) -> impl Strategy<Value = Op> {
    let lengths = || prop_oneof![0..200u64, select(vec![4096u64, 32768, 40_000]), 0..70_000u64];
    prop_oneof![
        4 => folios(g).prop_map(|(p, o)| Op::Preserve(p, o)),
        2 => folios(g).prop_map(|(p, o)| Op::Unpreserve(p, o)),
        1 => (folios(g), lengths(), any::<bool>()).prop_map(|((p, _), n, on)| Op::Pages(p, n, on)),
        1 => (folios(g), lengths(), any::<bool>()).prop_map(|((p, o), n, on)| Op::Run(p, o, if o.get() == 0 { n } else { n % 700 }, on)),
        1 => (folios(g), any::<u64>()).prop_map(|((p, o), word)| Op::Adopt(p, o, word)),
        1 => (lists(g), any::<bool>()).prop_map(|(list, on)| Op::Many(list, on)),
    ]
}

fn toggle(model: &mut Model, on: bool, folios: impl Iterator<Item = (Pfn, Order)>) -> u64 {
    folios
        .filter(|&(p, o)| match on {
            true => model.insert((o.get(), p.0)),
            false => model.remove(&(o.get(), p.0)),
        })
        .count() as u64
}

fn apply(t: &mut Tracker, model: &mut Model, op: &Op) {
    let page = t.geometry().page();
    match *op {
        Op::Preserve(p, o) => {
            let new = toggle(model, true, [(p, o)].into_iter()) == 1;
            assert_eq!(t.preserve(p, o).unwrap(), new);
        }
        Op::Unpreserve(p, o) => {
            let was = toggle(model, false, [(p, o)].into_iter()) == 1;
            assert_eq!(t.unpreserve(p, o).unwrap(), was);
        }
        Op::Pages(p, n, on) => {
            let result = match on {
                true => t.preserve_pages(p, n),
                false => t.unpreserve_pages(p, n),
            };
            if p.0 + n > page.pfn_limit() {
                assert!(matches!(result, Err(Error::OutOfRange { .. })));
            } else {
                let n = toggle(model, on, aligned_blocks(p, Pfn(p.0 + n)));
                assert_eq!(result.unwrap(), n);
            }
        }
        Op::Run(p, o, n, on) => {
            let result = match on {
                true => t.preserve_run(p, o, n),
                false => t.unpreserve_run(p, o, n),
            };
            if (p.0 >> o.get()) + n > t.geometry().folio_limit(o) {
                assert!(matches!(result, Err(Error::OutOfRange { .. })));
            } else {
                let run = (0..n).map(|i| (Pfn(p.0 + i * o.nr_pages()), o));
                assert_eq!(result.unwrap(), toggle(model, on, run));
            }
        }
        Op::Many(ref list, on) => {
            let pfns: Vec<u64> = list.iter().map(|(p, _)| p.0).collect();
            let each: Vec<u8> = list.iter().map(|(_, o)| o.index() as u8).collect();
            let one = list.first().filter(|first| list.iter().all(|(_, o)| *o == first.1));
            let orders = one.map_or(Orders::Each(&each), |(_, o)| Orders::One(*o));
            let mut found = vec![2; list.len()];
            t.contains_many(&*pfns, orders, &mut found).unwrap();
            let held = list.iter().map(|(p, o)| u8::from(model.contains(&(o.get(), p.0))));
            assert!(found.into_iter().eq(held));
            let change = |t: &mut Tracker| match on {
                true => t.preserve_many(&*pfns, orders),
                false => t.unpreserve_many(&*pfns, orders),
            };
            // Sometimes split off from the other orders, as concurrent threads do.
            let changed = match one.filter(|_| pfns.len() % 2 == 1) {
                Some((_, o)) => {
                    let mut part = t.split_off(*o);
                    let changed = change(&mut part);
                    t.append(part).unwrap();
                    changed
                }
                None => change(t),
            };
            assert_eq!(changed.unwrap(), toggle(model, on, list.iter().copied()));
        }
        Op::Adopt(p, o, word) => {
            let g = t.geometry();
            let folio = p.0 >> o.get();
            let index = folio / g.bits();
            let at = (folio % g.bits() / 64 * 8) as usize;
            let mut bitmap = vec![0; g.block_bytes() as usize];
            bitmap[at..at + 8].copy_from_slice(&word.to_le_bytes());
            let first = folio & !63;
            let bits = (0..64).filter(|b| word >> b & 1 != 0).map(|b| first + b);
            let result = t.adopt_block(o, index, &bitmap);
            if bits.clone().any(|f| f >= g.folio_limit(o)) {
                assert!(matches!(result, Err(Error::OutOfRange { .. })));
            } else {
                let new = toggle(model, true, bits.map(|f| (Pfn(f << o.get()), o)));
                assert_eq!(result.unwrap(), new);
                assert!(t.block(o, index).is_some());
            }
        }
    }
}

fn build(g: Geometry, ops: &[Op]) -> (Tracker, Model) {
    let (mut t, mut model) = (Tracker::new(g), Model::new());
    for op in ops {
        apply(&mut t, &mut model, op);
    }
    (t, model)
}

pub(super) fn contents(t: &Tracker) -> Model {
    t.iter().map(|(p, o)| (o.get(), p.0)).collect()
}

/// Every way there is: with and without the processor's extensions, lists as they come and in buckets, one thread and two.
fn every_path() -> impl Strategy<Value = Tuning> {
    let simd = select(vec![(false, false), (false, true), (true, false)]);
    let bucket_bits = select(vec![None, Some(12), Some(1)]);
    let tuning = (simd, select(vec![None, Some(0), Some(3)]), select(vec![None, None, Some(16)]), bucket_bits);
    tuning.prop_map(|((portable, without_compress), short_list, bytes_per_thread, bucket_bits)| Tuning {
        portable,
        without_compress,
        short_list,
        bytes_per_thread,
        bucket_bits,
    })
}

/// A tracker with its model, made in some way that is gone from here on.
pub(super) fn trackers() -> impl Strategy<Value = (Tracker, Model)> {
    geometries().prop_flat_map(|g| {
        (every_path(), proptest::collection::vec(ops(g), 0..40)).prop_map(move |(tuning, ops)| {
            override_tuning(tuning);
            build(g, &ops)
        })
    })
}

/// Two trackers of one page size, with the same or different blocks, that have much in common.
fn pairs() -> impl Strategy<Value = ((Tracker, Model), (Tracker, Model))> {
    let blocks = select(vec![(true, true), (true, false), (false, true), (false, false)]);
    (select(PageSize::ALL.to_vec()), blocks).prop_flat_map(|(page, (a, b))| {
        let g = move |small| match small {
            true => Geometry::new(page, Geometry::SMALL).unwrap(),
            false => Geometry::paged(page),
        };
        let ops = || proptest::collection::vec(ops(g(a)), 0..20);
        (every_path(), ops(), ops(), ops()).prop_map(move |(tuning, both, mine, theirs)| {
            override_tuning(tuning);
            let fits = |ops: &[Op]| {
                // A block to adopt is of one size: leave those out where sizes differ.
                let keep = |op: &&Op| a == b || !matches!(op, Op::Adopt(..));
                ops.iter().filter(keep).cloned().collect::<Vec<_>>()
            };
            (build(g(a), &[fits(&both), fits(&mine)].concat()), build(g(b), &[fits(&both), fits(&theirs)].concat()))
        })
    })
}

/// A limited number of heap blocks; they have addresses.
struct Limited(HeapBlocks, AtomicUsize);

// SAFETY: the blocks are those of HeapBlocks.
unsafe impl BlockSource for Limited {
    fn alloc_block(&self, bytes: usize) -> Result<NonNull<u64>> {
        let taken = self.1.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        taken.map_err(|_| Error::NoMemory { order: 0, node: None })?;
        self.0.alloc_block(bytes)
    }
    fn is_shared(&self) -> bool {
        false
    }

    fn phys_of(&self, block: NonNull<u64>) -> Option<Phys> {
        Some(Phys(block.addr().get() as u64))
    }
    fn nbytes(&self) -> u64 {
        self.0.nbytes()
    }
    fn renewed(&self) -> Arc<dyn BlockSource> {
        Arc::new(Limited(HeapBlocks::default(), self.1.load(Relaxed).into()))
    }
}

fn limited(g: Geometry, blocks: usize) -> Tracker {
    Tracker::with_source(g, Arc::new(Limited(HeapBlocks::default(), blocks.into())))
}
