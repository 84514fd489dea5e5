use super::*;
use crate::error::Error;
use crate::units::{PageSize, Phys, aligned_blocks};
use crate::ways::{Ways, go};
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

/// A list of folios: short or long, of one order or several, ascending or not, close together or all over.
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
            // Now and then apart from the other orders, as a thread beside others has it.
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
fn every_way() -> impl Strategy<Value = Ways> {
    let simd = select(vec![(false, false), (false, true), (true, false)]);
    let bucket_bits = select(vec![None, Some(12), Some(1)]);
    let ways = (simd, select(vec![None, Some(0), Some(3)]), select(vec![None, None, Some(16)]), bucket_bits);
    ways.prop_map(|((portable, by_bits), short, worth_a_thread, bucket_bits)| Ways {
        portable,
        by_bits,
        short,
        worth_a_thread,
        bucket_bits,
    })
}

/// A tracker with its model, made in some way that is gone from here on.
pub(super) fn trackers() -> impl Strategy<Value = (Tracker, Model)> {
    geometries().prop_flat_map(|g| {
        (every_way(), proptest::collection::vec(ops(g), 0..40)).prop_map(move |(ways, ops)| {
            go(ways);
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
        (every_way(), ops(), ops(), ops()).prop_map(move |(ways, both, mine, theirs)| {
            go(ways);
            let fits = |ops: &[Op]| {
                // A block to adopt is of one size: leave those out where sizes differ.
                let keep = |op: &&Op| a == b || !matches!(op, Op::Adopt(..));
                ops.iter().filter(keep).cloned().collect::<Vec<_>>()
            };
            (build(g(a), &[fits(&both), fits(&mine)].concat()), build(g(b), &[fits(&both), fits(&theirs)].concat()))
        })
    })
}

/// Heap blocks, but only so many; they have addresses.
struct Limited(HeapBlocks, AtomicUsize);

// SAFETY: the blocks are those of HeapBlocks.
unsafe impl BlockSource for Limited {
    fn alloc_block(&self, bytes: usize) -> Result<NonNull<u64>> {
        let taken = self.1.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        taken.map_err(|_| Error::NoMemory { order: 0, node: None })?;
        self.0.alloc_block(bytes)
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_tracker_is_a_set_of_pfn_and_order((t, model) in trackers()) {
        prop_assert_eq!(contents(&t), model.clone());
        prop_assert_eq!(t.len(), model.len() as u64);
        prop_assert_eq!(t.is_empty(), model.is_empty());
        prop_assert_eq!(t.nr_pages(), model.iter().map(|&(o, _)| 1u128 << o).sum::<u128>());
        prop_assert!(t.iter().map(|(p, o)| (o, p)).is_sorted());
        for o in Order::all() {
            let pfns: Vec<u64> = model.iter().filter(|f| f.0 == o.get()).map(|f| f.1).collect();
            prop_assert_eq!(t.len_of(o), pfns.len() as u64);
            prop_assert_eq!(t.pfns(o), pfns);
        }
    }

    #[test]
    fn folios_are_sorted_by_address_then_order((t, model) in trackers()) {
        let page = t.geometry().page();
        let want: BTreeSet<_> = model.iter().map(|&(o, p)| Folio::new(page.phys(Pfn(p)), order(o))).collect();
        prop_assert_eq!(t.folios(), want.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn lookups_agree_with_a_search((t, model) in trackers(), near in any::<proptest::sample::Index>(), by in 0..5u64) {
        let all: Vec<_> = model.iter().copied().collect();
        let pfn = if all.is_empty() { by } else { near.get(&all).1.wrapping_add(by).wrapping_sub(2) };
        let limit = t.geometry().page().pfn_limit();
        let covers = |&&(o, p): &&(u32, u64)| p <= pfn && pfn - p < 1 << o;
        let folio = |&(o, p): &(u32, u64)| (Pfn(p), order(o));
        prop_assert_eq!(t.covering(Pfn(pfn)), all.iter().find(covers).map(folio));
        let heads = all.iter().filter(|f| f.1 == pfn).map(|f| order(f.0));
        prop_assert_eq!(t.head_order(Pfn(pfn)), heads.max());
        for o in Order::all() {
            prop_assert_eq!(t.contains(Pfn(pfn), o), model.contains(&(o.get(), pfn)));
            let next = all.iter().find(|f| f.0 == o.get() && f.1 >= pfn);
            prop_assert_eq!(t.next(o, Pfn(pfn)), next.map(|f| Pfn(f.1)));
            let rest: Vec<_> = t.iter_from(o, Pfn(pfn)).take(3).collect();
            let want = all.iter().filter(|f| f.0 > o.get() || f.0 == o.get() && f.1 >= pfn).map(folio);
            prop_assert_eq!(rest, want.take(3).collect::<Vec<_>>());
        }
        for len in [0, 1, 7, 1 << 20] {
            let end = pfn.saturating_add(len).min(limit);
            let shares = |f: &&(u32, u64)| f.1 < end && (f.1 + (1 << f.0)) > pfn && pfn < end;
            let want = all.iter().find(shares).map(folio);
            prop_assert_eq!(t.overlapping(Pfn(pfn), Pfn(end)), want);
        }
    }

    #[test]
    fn blocks_adopted_elsewhere_make_the_same_tracker((t, _) in trackers()) {
        let g = t.geometry();
        let mut copy = Tracker::new(g);
        let mut bitmap = vec![0xff; g.block_bytes() as usize];
        for o in t.orders() {
            let mut at = None;
            for block in t.blocks(o) {
                prop_assert!(at < Some(block.index()));
                at = Some(block.index());
                prop_assert_eq!(g.index_of(o, block.phys_start()), Some(block.index()));
                prop_assert_eq!(block.copy_to(&mut bitmap), bitmap.len());
                prop_assert_eq!(copy.adopt_block(o, block.index(), &bitmap).unwrap(), block.count());
            }
        }
        prop_assert_eq!(&copy, &t);
        // The directory's size depends on the order of creation; all else is the same, the empty blocks too.
        let rows = |t: &Tracker| t.stats().iter().map(|s| OrderStats { bytes: 0, ..*s }).collect::<Vec<_>>();
        prop_assert_eq!(rows(&copy), rows(&t));
        prop_assert_eq!(rows(&t.clone()), rows(&t));
    }

    #[test]
    fn equality_looks_through_block_sizes(((a, in_a), (b, in_b)) in pairs()) {
        prop_assert_eq!(a == b, in_a == in_b);
        let mut other = Tracker::new(Geometry::paged(a.geometry().page()));
        other.union_with(&a).unwrap();
        prop_assert_eq!(&other, &a);
        prop_assert!(other.is_subset(&a) && a.is_subset(&other));
    }

    #[test]
    fn unions_are_commutative(((a, in_a), (b, in_b)) in pairs()) {
        let (mut ab, mut ba) = (a.clone(), b.clone());
        prop_assert_eq!(ab.union_with(&b).unwrap(), in_b.difference(&in_a).count() as u64);
        ba.union_with(&a).unwrap();
        prop_assert_eq!(&ab, &ba);
        prop_assert_eq!(ab.len(), a.union_len(&b));
        prop_assert_eq!(contents(&ab), in_a.union(&in_b).copied().collect::<Model>());
    }

    #[test]
    fn intersections_are_commutative(((a, in_a), (b, in_b)) in pairs()) {
        let (mut ab, mut ba) = (a.clone(), b.clone());
        prop_assert_eq!(ab.intersect_with(&b).unwrap(), in_a.difference(&in_b).count() as u64);
        ba.intersect_with(&a).unwrap();
        prop_assert_eq!(&ab, &ba);
        prop_assert_eq!(ab.len(), a.intersection_len(&b));
        prop_assert_eq!(contents(&ab), in_a.intersection(&in_b).copied().collect::<Model>());
        prop_assert_eq!(a.is_disjoint(&b), in_a.is_disjoint(&in_b));
        prop_assert_eq!(a.is_subset(&b), in_a.is_subset(&in_b));
    }

    #[test]
    fn a_difference_and_the_intersection_make_the_whole(((a, in_a), (b, in_b)) in pairs()) {
        let (mut minus, mut both) = (a.clone(), a.clone());
        prop_assert_eq!(minus.subtract(&b).unwrap(), a.intersection_len(&b));
        both.intersect_with(&b).unwrap();
        prop_assert!(minus.is_disjoint(&b) && minus.is_disjoint(&both));
        prop_assert_eq!(contents(&minus), in_a.difference(&in_b).copied().collect::<Model>());
        minus.union_with(&both).unwrap();
        prop_assert_eq!(minus, a);
    }

    #[test]
    fn a_new_set_is_what_the_change_in_place_makes_without_empty_blocks(((a, in_a), (b, in_b)) in pairs()) {
        let made = [a.union(&b), a.intersection(&b), a.difference(&b), a.symmetric_difference(&b)];
        let mut changed = [a.clone(), a.clone(), a.clone(), a.clone()];
        changed[0].union_with(&b).unwrap();
        changed[1].intersect_with(&b).unwrap();
        changed[2].subtract(&b).unwrap();
        changed[3].symmetric_difference_with(&b).unwrap();
        let lens = [a.union_len(&b), a.intersection_len(&b), a.difference_len(&b), a.symmetric_difference_len(&b)];
        let want = [&in_a | &in_b, &in_a & &in_b, &in_a - &in_b, &in_a ^ &in_b];
        for (((made, changed), len), want) in made.into_iter().zip(&changed).zip(lens).zip(want) {
            let made = made.unwrap();
            prop_assert_eq!(made.geometry(), a.geometry());
            prop_assert_eq!(contents(&made), want);
            prop_assert_eq!(&made, changed);
            prop_assert_eq!(made.len(), len);
            prop_assert!(made.stats().iter().all(|row| row.empty_blocks == 0));
            for t in [&made, changed] {
                for block in t.orders().flat_map(|o| t.blocks(o)) {
                    prop_assert_eq!(block.count(), block.words().map(|w| u64::from(w.count_ones())).sum::<u64>());
                }
            }
        }
        prop_assert_eq!(a == b, in_a == in_b);
        prop_assert_eq!(a.is_subset(&b), in_a.is_subset(&in_b));
    }

    #[test]
    fn selecting_undoes_ranking((t, model) in trackers(), pfn: u64) {
        for o in [0, 1, 9, 18, 36].map(order) {
            let pfns: Vec<u64> = model.iter().filter(|f| f.0 == o.get()).map(|f| f.1).collect();
            for (n, &pfn) in (0u64..).zip(&pfns).step_by(pfns.len() / 50 + 1) {
                prop_assert_eq!(t.rank(Pfn(pfn), o), n);
                prop_assert_eq!(t.select(n, o), Some(Pfn(pfn)));
                prop_assert_eq!(t.rank(Pfn(pfn + 1), o), n + 1);
            }
            prop_assert_eq!(t.select(pfns.len() as u64, o), None);
            prop_assert_eq!(t.rank(Pfn(u64::MAX), o), pfns.len() as u64);
            prop_assert_eq!(t.rank(Pfn(pfn), o), pfns.partition_point(|&p| p < pfn) as u64);
        }
    }

    #[test]
    fn a_symmetric_difference_undoes_itself(((a, in_a), (b, in_b)) in pairs()) {
        let mut c = a.clone();
        let (added, removed) = c.symmetric_difference_with(&b).unwrap();
        prop_assert_eq!(contents(&c), in_a.symmetric_difference(&in_b).copied().collect::<Model>());
        prop_assert_eq!((added, removed), (in_b.difference(&in_a).count() as u64, a.intersection_len(&b)));
        prop_assert_eq!(c.symmetric_difference_with(&b).unwrap(), (removed, added));
        prop_assert_eq!(c, a);
    }

    #[test]
    fn what_fails_for_want_of_blocks_changes_nothing(g in geometries(), seed in 0..40_000u64, n in 1..200_000u64, have in 0..9usize) {
        let mut t = limited(g, have + 1);
        t.preserve(Pfn(seed), Order::ZERO).unwrap();
        let before = contents(&t);
        let whole = Tracker::new(g).preserve_pages(Pfn(seed), n).unwrap();
        match t.preserve_pages(Pfn(seed), n) {
            Ok(set) => prop_assert!(set == whole || set == whole - 1),
            Err(_) => prop_assert_eq!(contents(&t), before.clone()),
        }
        let mut t = limited(g, have + 1);
        t.preserve(Pfn(seed), Order::ZERO).unwrap();
        let blocks = (seed + n - 1) / g.bits() - seed / g.bits() + 1;
        match t.preserve_run(Pfn(seed), Order::ZERO, n) {
            Ok(set) => prop_assert!(set == n - 1 && blocks <= have as u64 + 1),
            Err(_) => {
                prop_assert!(blocks > have as u64 + 1);
                prop_assert_eq!(contents(&t), before);
            }
        }
    }

    #[test]
    fn a_union_without_enough_blocks_changes_nothing(((a, _), (b, _)) in pairs(), spare in 0..4usize) {
        let room = a.stats().iter().map(|s| s.blocks as usize).sum::<usize>() + spare;
        let mut t = limited(a.geometry(), room);
        for (pfn, order) in a.iter() {
            t.preserve(pfn, order).unwrap();
        }
        if t.union_with(&b).is_err() {
            prop_assert_eq!(t, a);
        } else {
            prop_assert!(a.is_subset(&t) && b.is_subset(&t));
        }
    }
}

#[test]
fn folios_are_taken_in_both_trackers_or_in_none_whichever_finds_no_blocks() {
    let g = Geometry::paged(PageSize::Size4K);
    for (n, step) in [(200_000u64, 1), (5000, 700)] {
        let pfns: Vec<u64> = (0..n).map(|pfn| pfn * step).collect();
        let mut from = Tracker::new(g);
        from.preserve_many(&*pfns, Orders::One(order(0))).unwrap();
        let need = from.blocks(order(0)).count();
        for (mine, theirs) in [(need, need), (need, need - 1), (need - 1, need)] {
            let (mut t, mut also) = (limited(g, mine), limited(g, theirs));
            let taken = t.take_many(&from, Some(&mut also), &*pfns, order(0));
            assert_eq!(taken.is_ok(), mine + theirs == 2 * need);
            let expected = if taken.is_ok() { (n, n) } else { (0, 0) };
            assert_eq!((t.len(), also.len()), expected, "{n} folios, {mine} and {theirs} of {need} blocks");
            assert!(taken.is_err() || (t == from && also == from));
        }
    }
}

#[test]
fn many_are_marked_whole_or_not_at_all() {
    let (pfns, orders) = ([0, 1 << 30, 512, 1 << 30].as_slice(), [0, 0, 9, 0].as_slice());
    let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
    assert_eq!(t.preserve_many(pfns, Orders::Each(orders)).unwrap(), 3);
    assert_eq!(t.preserve_many(pfns, Orders::Each(orders)).unwrap(), 0);
    for (bad, o) in [(513, 9), (1 << 52, 0), (0, 37u8)] {
        let orders = [0, o];
        let orders = Orders::Each(&orders);
        assert!(t.preserve_many([7, bad].as_slice(), orders).is_err());
        assert!(t.unpreserve_many([0, bad].as_slice(), orders).is_err());
        assert_eq!(t.len(), 3);
    }
    assert!(t.preserve_many(pfns, Orders::Each(&orders[1..])).is_err());
    let mut found = [7; 4];
    t.contains_many([0, 512, 1024, 1 << 60].as_slice(), Orders::Each(&[0, 9, 9, 0]), &mut found).unwrap();
    assert_eq!(found, [1, 1, 0, 0]);
    assert_eq!(t.unpreserve_many(pfns, Orders::Each(orders)).unwrap(), 3);
    assert!(t.is_empty());
    let mut t = limited(t.geometry(), 2);
    assert!(t.preserve_many(pfns, Orders::Each(orders)).is_err());
    assert!(t.is_empty());
}

#[test]
fn long_lists_are_whole_whichever_way_they_are_carried_out() {
    // The longer one by two threads.
    let [short, long] = [300_000, 5 << 19];
    let small = Geometry::new(PageSize::Size4K, 512).unwrap();
    for (g, n) in [(small, short), (Geometry::paged(PageSize::Size64K), short), (small, long)] {
        let scattered: Vec<u64> = (0..n as u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 36).collect();
        let mut ascending = scattered.clone();
        ascending.sort();
        let mut one_by_one = Tracker::new(g);
        let new = ascending.iter().filter(|pfn| one_by_one.preserve(Pfn(**pfn), Order::ZERO).unwrap()).count() as u64;
        for list in [&scattered, &ascending] {
            let mut t = Tracker::new(g);
            assert_eq!(t.preserve_many(&**list, Orders::One(Order::ZERO)).unwrap(), new);
            assert_eq!(t.preserve_many(&**list, Orders::Each(&vec![0; n])).unwrap(), 0);
            assert_eq!(t, one_by_one);
            assert_eq!(t.blocks(Order::ZERO).count(), one_by_one.blocks(Order::ZERO).count());
            let mut asked = list.clone();
            asked.iter_mut().step_by(3).for_each(|pfn| *pfn ^= 1);
            (asked[n / 3], asked[n - 1]) = (1 << 60, 1 << 45);
            let there: Vec<u8> = asked.iter().map(|pfn| t.contains(Pfn(*pfn), Order::ZERO).into()).collect();
            let mut found = vec![7; n];
            for orders in [Orders::One(Order::ZERO), Orders::Each(&vec![0; n])] {
                t.contains_many(&*asked, orders, &mut found).unwrap();
                assert!(found == there && found.contains(&0) && found.contains(&1));
            }
            assert_eq!(t.unpreserve_many(&**list, Orders::One(Order::ZERO)).unwrap(), new);
            assert!(t.is_empty());
        }
        for bad in [1 << 52, u64::MAX] {
            let mut with_bad = scattered.clone();
            (with_bad[n / 4 * 3], with_bad[n - 1]) = (bad, 1 << 60);
            let mut t = Tracker::new(g);
            let error = t.preserve_many(&*with_bad, Orders::One(Order::ZERO)).map(drop);
            assert_eq!(error.unwrap_err().to_string(), t.preserve(Pfn(bad), Order::ZERO).unwrap_err().to_string());
            assert!(t.preserve_many(&*with_bad, Orders::One(order(1))).is_err());
            assert!(t.orders().next().is_none());
        }
    }
}

/// A list that another thread writes to: what it says changes after it was read once.
struct Changing(Vec<u64>, core::sync::atomic::AtomicUsize);

impl Words for Changing {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn copy(&self, at: usize, into: &mut [u64]) {
        let copied = self.1.fetch_add(into.len(), core::sync::atomic::Ordering::Relaxed);
        for (n, word) in into.iter_mut().enumerate() {
            *word = if copied < self.0.len() { self.0[at + n] } else { [u64::MAX, 1 << 48, 3, 1 << 60][n % 4] };
        }
    }
}

#[test]
fn a_list_that_changes_while_it_is_read_marks_nothing_outside_the_address_space() {
    let g = Geometry::paged(PageSize::Size64K);
    for o in [0, 1, 30, 36] {
        let mut t = Tracker::new(g);
        let limit = g.folio_limit(order(o)).min(1 << 30);
        let list: Vec<u64> = (0..5000u64).map(|n| (n.wrapping_mul(0x9e37_79b9) % limit) << o).collect();
        let _ = t.preserve_many(&Changing(list, Default::default()), Orders::One(order(o)));
        assert!(t.iter().all(|(pfn, o)| g.page().check_folio(pfn, o).is_ok()));
        assert_eq!(t.len(), t.iter().count() as u64);
    }
}

#[test]
fn of_a_long_list_with_several_mistakes_the_first_is_named() {
    let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
    let mut pfns: Vec<u64> = (0..9000u64).map(|n| (n.wrapping_mul(0x9e37_79b9) % (1 << 30)) << 3).collect();
    let mut orders: Vec<u8> = (0..9000u64).map(|n| (n * n % 7 % 4) as u8).collect();
    let marked = t.preserve_many(&*pfns, Orders::Each(&orders)).unwrap();
    let mut one_by_one = Tracker::new(t.geometry());
    for (pfn, o) in pfns.iter().zip(&orders) {
        one_by_one.preserve(Pfn(*pfn), order((*o).into())).unwrap();
    }
    assert!(t == one_by_one && marked == t.len() && marked > 8000);
    // An order that is none, behind a pfn that is not aligned, behind one that is out of range.
    orders[8000] = 37;
    let error = |t: &mut Tracker, pfns: &[u64], orders: &[u8]| {
        let refused = t.preserve_many(pfns, Orders::Each(orders)).unwrap_err().to_string();
        assert_eq!(t.unpreserve_many(pfns, Orders::Each(orders)).unwrap_err().to_string(), refused);
        assert!(*t == one_by_one);
        refused
    };
    assert!(error(&mut t, &pfns, &orders).contains("order 37"));
    (pfns[7000], orders[7000]) = (7, 3);
    assert!(error(&mut t, &pfns, &orders).contains("multiple of 0x8"));
    (pfns[1234], orders[1234]) = (1 << 60, 0);
    assert!(error(&mut t, &pfns, &orders).contains("0x1000000000000000"));
    assert!(error(&mut t, &pfns[1..], &orders).contains("9000 orders for 8999 pfns"));
}

#[test]
fn two_threads_list_what_one_lists() {
    let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
    t.preserve_run(Pfn(1000), order(0), (2 << 20) + 77).unwrap();
    for hole in (0..3 << 20).step_by(977) {
        t.unpreserve(Pfn(hole), order(0)).unwrap();
    }
    t.preserve_run(Pfn(1 << 30), order(3), 1234).unwrap();
    let pfns: Vec<u64> = t.iter().filter(|(_, o)| o.get() == 0).map(|(p, _)| p.0).collect();
    assert!(pfns.len() > 1 << 20);
    assert_eq!(t.pfns(order(0)), pfns);
    let folios: Vec<_> = t.iter().map(|(p, o)| Folio::new(Phys(p.0 << 12), o)).collect();
    assert_eq!(t.folios(), folios);
    let mut other = vec![5; 2000];
    t.pfns_into(order(3), &mut other);
    assert_eq!((other.len(), other[0]), (1234, 1 << 30));
    let mut other = vec![folios[7]];
    t.folios_into(&mut other);
    assert_eq!(other, folios);
}

#[test]
fn what_others_change_while_it_is_listed_leaves_no_gap() {
    for (word, fewer) in [(0, true), (u64::MAX, false)] {
        let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
        t.preserve_run(Pfn(0), Order::ZERO, 2 << 20).unwrap();
        for hole in (0..2 << 20).step_by(977) {
            t.unpreserve(Pfn(hole), Order::ZERO).unwrap();
        }
        let len = t.len() as usize;
        for index in [3, 40] {
            t.dirs[0].get(index).unwrap().replace(t.shape, 0, t.shape.words(), |_| word);
        }
        let there: Vec<u64> = t.iter().map(|(pfn, _)| pfn.0).collect();
        assert!(if fewer { there.len() < len } else { there.len() > len });
        assert!(t.pfns(Order::ZERO) == there[..len.min(there.len())]);
        assert!(t.folios().iter().map(|folio| folio.phys >> 12).eq(there.into_iter().take(len)));
    }
}

#[test]
fn memory_given_back_is_zeroed_for_the_next_tracker() {
    let g = Geometry::paged(PageSize::Size4K);
    for _ in 0..3 {
        let mut t = Tracker::new(g);
        // More than a huge page of blocks, all full.
        t.preserve_run(Pfn(0), Order::ZERO, 1 << 26).unwrap();
        t.clear();
        for block in 0..2000 {
            t.preserve(Pfn(block << 15), Order::ZERO).unwrap();
        }
        assert!(t.blocks(Order::ZERO).all(|block| block.count() == 1));
    }
}

#[test]
fn a_run_that_finds_no_memory_marks_nothing() {
    let mut t = limited(Geometry::paged(PageSize::Size4K), 3);
    t.preserve(Pfn(1 << 15), Order::ZERO).unwrap();
    assert!(t.preserve_run(Pfn(5), Order::ZERO, 4 << 15).is_err());
    assert_eq!(t.pfns(Order::ZERO), [1 << 15]);
    assert_eq!(t.len(), 1);
}

#[test]
fn what_is_no_folio_is_refused_and_never_contained() {
    for page in PageSize::ALL {
        let mut t = Tracker::new(Geometry::paged(page));
        let limit = page.pfn_limit();
        // Once with no directory, once with: the checks of the fast path and of the slow one.
        for _ in 0..2 {
            for (pfn, o) in [(limit, 0), (limit, 2), (u64::MAX, 0), (1 << 63, 36)] {
                let error = t.preserve(Pfn(pfn), order(o)).unwrap_err();
                assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
                assert!(t.unpreserve(Pfn(pfn), order(o)).is_err());
                assert!(!t.contains(Pfn(pfn), order(o)));
            }
            for (pfn, o) in [(1, 1), (3, 2), (1 << 35, 36), (limit - 1, 9)] {
                let error = t.preserve(Pfn(pfn), order(o)).unwrap_err();
                assert!(matches!(error, Error::Misaligned { .. }), "{error}");
                assert!(t.unpreserve(Pfn(pfn), order(o)).is_err());
                assert!(!t.contains(Pfn(pfn), order(o)));
                assert!(t.preserve_run(Pfn(pfn), order(o), 1).is_err());
            }
            for o in [0, 1, 2, 9, 36] {
                t.preserve(Pfn(0), order(o)).unwrap();
            }
        }
        assert!(t.preserve_pages(Pfn(limit - 1), 2).is_err());
        assert!(t.preserve_pages(Pfn(2), u64::MAX).is_err());
        assert!(t.preserve_run(Pfn(0), order(36), (limit >> 36) + 1).is_err());
        assert!(t.preserve_run(Pfn(0), order(36), u64::MAX).is_err());
        assert_eq!(t.preserve_run(Pfn(limit), Order::ZERO, 0).unwrap(), 0);
        assert_eq!(t.preserve_pages(Pfn(limit), 0).unwrap(), 0);
        assert_eq!(t.len(), 5);
    }
}

#[test]
fn a_block_starts_where_the_stride_says_even_where_the_stride_exceeds_the_address_space() {
    let g = |page, bytes| Geometry::new(page, bytes).unwrap();
    let small = g(PageSize::Size4K, 512);
    assert_eq!(small.phys_start(order(0), 3), Phys(3 << 24));
    assert_eq!(small.index_of(order(0), Phys(3 << 24)), Some(3));
    assert_eq!(small.index_of(order(0), Phys((3 << 24) + 4096)), None);
    let large = g(PageSize::Size4K, 4096);
    assert_eq!(large.phys_start(order(9), 2), Phys(2 << 36));
    assert_eq!(large.index_of(order(36), Phys(1 << 63)), Some(1));
    assert_eq!((large.index_limit(order(36)), large.index_limit(order(0))), (2, 1 << 37));
    let huge = g(PageSize::Size64K, 65536);
    assert_eq!(huge.index_limit(order(36)), 1);
    assert_eq!(huge.index_of(order(36), Phys(0)), Some(0));
    assert_eq!(huge.index_of(order(36), Phys(1 << 52)), None);
    assert_eq!(huge.index_of(order(29), Phys(1 << 63)), None);
    assert_eq!(huge.pfn_of(order(36), 0, 4095), Some(Pfn(4095 << 36)));
    assert_eq!(huge.pfn_of(order(36), 0, 4096), None);
    assert!(Geometry::new(PageSize::Size64K, 4096).is_err());
    assert!(Geometry::new(PageSize::Size4K, 1024).is_err());
}

#[test]
fn a_bitmap_that_reaches_beyond_the_address_space_is_refused() {
    let mut t = Tracker::new(Geometry::paged(PageSize::Size64K));
    let mut bitmap = vec![0; 65536];
    bitmap[4095 / 8] = 0x80;
    assert_eq!(t.adopt_block(order(36), 0, &bitmap).unwrap(), 1);
    bitmap[4096 / 8] = 1;
    assert!(t.adopt_block(order(36), 0, &bitmap).is_err());
    assert!(t.adopt_block(order(36), 1, &bitmap).is_err());
    assert!(t.adopt_block(order(0), u64::MAX, &bitmap).is_err());
    assert!(t.adopt_block(order(0), 0, &bitmap[1..]).is_err());
    assert_eq!(t.len(), 1);
    assert_eq!(t.adopt_block(order(3), 7, &[0; 65536]).unwrap(), 0);
    assert_eq!(t.orders().map(Order::get).collect::<Vec<_>>(), [3, 36]);
}

#[test]
fn blocks_that_become_empty_stay_until_clear() {
    let mut t = limited(Geometry::paged(PageSize::Size4K), 9);
    t.preserve(Pfn(512), order(9)).unwrap();
    t.unpreserve(Pfn(512), order(9)).unwrap();
    assert!(t.is_empty());
    let row = t.stats()[0];
    assert_eq!((row.order.get(), row.folios, row.blocks, row.empty_blocks), (9, 0, 1, 1));
    let block = t.blocks(order(9)).next().unwrap();
    assert!(block.is_empty() && block.phys().is_some());
    t.clear();
    assert_eq!((t.orders().count(), t.stats().len()), (0, 0));
}

#[test]
fn folios_at_both_ends_of_the_address_space_cost_next_to_nothing() {
    let page = PageSize::Size4K;
    let empty = Tracker::new(Geometry::paged(page)).nbytes();
    assert!(empty < page.bytes() / 3, "{empty}");
    let mut t = Tracker::new(Geometry::new(page, 512).unwrap());
    for pfn in [0, 1 << 30, 1 << 40, 1 << 50, page.pfn_limit() - 1] {
        assert!(t.preserve(Pfn(pfn), Order::ZERO).unwrap());
        assert!(t.contains(Pfn(pfn), Order::ZERO));
    }
    assert!(t.nbytes() - empty < 6 * 512, "{}", t.nbytes());
}

#[test]
fn slots_take_no_more_than_nodes_of_the_kernels_tree_would() {
    // A node has 64 slots and takes 576 bytes: of the tree's lowest level alone there is one for each 64 blocks side by side.
    let nodes =
        |indices: &BTreeSet<u64>| 576 * indices.iter().map(|index| index >> 6).collect::<BTreeSet<_>>().len() as u64;
    for spread in [1, 3, 64, 100, 5000, 1 << 20] {
        let mut t = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
        let mut indices = BTreeSet::new();
        for n in 0..3000u64 {
            let index = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (3000 * spread);
            t.preserve(Pfn(index << 12), Order::ZERO).unwrap();
            indices.insert(index);
            // Two more for what does not depend on how many there are.
            let most = nodes(&indices) + 2 * 576;
            let slots = t.stats()[0].bytes - 512 * indices.len() as u64;
            assert!(slots <= most, "{slots} for {} blocks, {spread} apart", indices.len());
        }
    }
}

/// Marks a few folios of an order, one by one, in a list and as a run.
fn mark_some(t: &mut Tracker, o: Order, seed: u64) {
    let limit = 1 << 20;
    let pfns: Vec<u64> = (0..5000).map(|n| (seed.wrapping_mul(n * n + 1) % limit) << o.get()).collect();
    for pfn in &pfns[..100] {
        t.preserve(Pfn(*pfn), o).unwrap();
    }
    t.preserve_many(&pfns[100..], Orders::One(o)).unwrap();
    t.unpreserve(Pfn(pfns[7]), o).unwrap();
    t.preserve_run(Pfn(limit << o.get()), o, 70_000).unwrap();
}

#[test]
fn two_threads_work_on_two_orders_of_one_tracker() {
    for g in [Geometry::paged(PageSize::Size4K), Geometry::new(PageSize::Size16K, 512).unwrap()] {
        let (mut t, mut whole) = (Tracker::new(g), Tracker::new(g));
        t.preserve(Pfn(4), order(2)).unwrap();
        whole.preserve(Pfn(4), order(2)).unwrap();
        for round in 1..20u64 {
            let [mut small, mut large] = [0, 9].map(|o| t.split_off(order(o)));
            assert!(t.len_of(Order::ZERO) == 0 && t.len_of(order(9)) == 0);
            std::thread::scope(|scope| {
                scope.spawn(|| mark_some(&mut small, Order::ZERO, 3 * round));
                scope.spawn(|| mark_some(&mut large, order(9), 5 * round));
                mark_some(&mut t, order(2), 7 * round);
            });
            t.append(small).unwrap();
            t.append(large).unwrap();
            for (o, seed) in [(0, 3), (9, 5), (2, 7)] {
                mark_some(&mut whole, order(o), seed * round);
            }
            assert!(t == whole && t.len() == whole.len() && t.folios() == whole.folios());
        }
    }
}

#[test]
fn what_is_appended_is_marked_wherever_its_blocks_are() {
    let g = Geometry::paged(PageSize::Size4K);
    let mut t = Tracker::new(g);
    t.preserve(Pfn(1), Order::ZERO).unwrap();
    let mut part = t.split_off(Order::ZERO);
    part.preserve(Pfn(2), Order::ZERO).unwrap();
    // There is something of its order again, and a tracker of its own has other blocks.
    t.preserve(Pfn(3), Order::ZERO).unwrap();
    t.append(part).unwrap();
    let mut other = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
    other.preserve(Pfn(4), Order::ZERO).unwrap();
    other.preserve(Pfn(8), order(3)).unwrap();
    t.append(other).unwrap();
    assert_eq!((t.pfns(Order::ZERO), t.pfns(order(3))), (vec![1, 2, 3, 4], vec![8]));
    // What was taken out stays what it is, whatever becomes of the rest.
    let part = t.split_off(Order::ZERO);
    t.clear();
    t.preserve_run(Pfn(0), Order::ZERO, 1 << 16).unwrap();
    drop(t);
    assert_eq!(part.pfns(Order::ZERO), [1, 2, 3, 4]);
    assert!(Tracker::new(g).append(Tracker::new(Geometry::paged(PageSize::Size64K))).is_ok());
}

#[test]
fn a_block_far_away_is_found_again_and_again_wherever_it_is_by_then() {
    let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
    let (block, far) = (1 << 15, 5000 << 15);
    for n in 0..600 {
        assert!(t.preserve(Pfn(far + n), Order::ZERO).unwrap() && t.contains(Pfn(far + n), Order::ZERO));
        assert!(t.preserve(Pfn(far + block + n), Order::ZERO).unwrap());
        assert!(t.unpreserve(Pfn(far + n), Order::ZERO).unwrap() && !t.contains(Pfn(far + n), Order::ZERO));
        assert!(t.preserve(Pfn(far + n), Order::ZERO).unwrap());
        // From some time on there are enough for a window that reaches it.
        assert!(t.preserve(Pfn(3 * n * block), Order::ZERO).unwrap());
        assert!(t.contains(Pfn(far), Order::ZERO) && !t.contains(Pfn(far + 3 * block), Order::ZERO));
    }
    assert!(t.dirs[0].window.len() > 5000 && t.len() == 3 * 600);
}

#[test]
fn the_first_folios_behind_a_window_have_no_block_until_they_are_marked() {
    for g in
        PageSize::ALL.into_iter().flat_map(|page| [512, page.bytes()].map(|bytes| Geometry::new(page, bytes).unwrap()))
    {
        let mut t = Tracker::new(g);
        t.preserve(Pfn(0), Order::ZERO).unwrap();
        let behind = t.dirs[0].window.len() * g.bits();
        for folio in behind - 1..behind + 64 {
            assert!(!t.contains(Pfn(folio), Order::ZERO) && !t.unpreserve(Pfn(folio), Order::ZERO).unwrap());
        }
        assert_eq!((t.len(), t.blocks(Order::ZERO).count()), (1, 1));
        assert!(t.preserve(Pfn(behind), Order::ZERO).unwrap() && t.contains(Pfn(behind), Order::ZERO));
        assert_eq!(t.pfns(Order::ZERO), [0, behind]);
    }
}

#[test]
fn a_window_grows_over_scattered_blocks_in_any_order_of_creation() {
    let g = Geometry::new(PageSize::Size4K, 512).unwrap();
    let mut x = 1u64;
    let mut t = Tracker::new(g);
    let mut indices = BTreeSet::new();
    for n in 0..4000 {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let index = (x >> 33) % if n < 2000 { 1 << 16 } else { 1 << 24 };
        let index = if n % 2 == 0 { index + (1 << 30) } else { index };
        t.preserve(Pfn(index * g.bits()), Order::ZERO).unwrap();
        indices.insert(index);
    }
    assert!(t.blocks(Order::ZERO).map(|b| b.index()).eq(indices));
}
