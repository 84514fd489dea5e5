//! Where blocks are, what they cost, and what is no folio.

#![forbid(unsafe_code)]

use super::*;

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
        let after = t.dirs[0].window.len() * g.bits();
        for folio in after - 1..after + 64 {
            assert!(!t.contains(Pfn(folio), Order::ZERO) && !t.unpreserve(Pfn(folio), Order::ZERO).unwrap());
        }
        assert_eq!((t.len(), t.blocks(Order::ZERO).count()), (1, 1));
        assert!(t.preserve(Pfn(after), Order::ZERO).unwrap() && t.contains(Pfn(after), Order::ZERO));
        assert_eq!(t.pfns(Order::ZERO), [0, after]);
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
