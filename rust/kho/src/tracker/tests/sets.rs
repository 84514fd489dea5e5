//! A tracker is a set, whatever its blocks are.

#![forbid(unsafe_code)]

use super::*;

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
