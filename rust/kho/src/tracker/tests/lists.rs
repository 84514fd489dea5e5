//! Many folios at once, into a tracker and out of it.

#![forbid(unsafe_code)]

use super::*;

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
    // An invalid order, after a misaligned pfn, after a pfn out of range.
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
