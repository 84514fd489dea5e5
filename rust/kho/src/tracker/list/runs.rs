//! Runs: maximal stretches of consecutive folios, found by words.

#![forbid(unsafe_code)]

use crate::tracker::Tracker;
use crate::units::{Order, Pfn};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

impl Tracker {
    /// The maximal runs of consecutive folios of one order, ascending: the first pfn, and how many folios.
    pub fn runs(&self, order: Order) -> impl Iterator<Item = (Pfn, u64)> + '_ {
        let bits = self.geometry().bits();
        let mut blocks = self.blocks(order);
        let mut words = None;
        // The first folio of the word that is being read, and what is left of the word.
        let (mut base, mut word) = (0, 0u64);
        let mut stretch = move || {
            while word == 0 {
                let Some(next) = words.as_mut().and_then(Iterator::next) else {
                    let block = blocks.next()?;
                    let first = block.index() * bits;
                    if block.words().all(|word| word == u64::MAX) {
                        words = None;
                        return Some((first, first + bits));
                    }
                    words = Some(block.words());
                    base = first.wrapping_sub(64);
                    continue;
                };
                word = next;
                base = base.wrapping_add(64);
            }
            let start = word.trailing_zeros();
            let end = start + (word >> start).trailing_ones();
            word &= word.wrapping_add(1 << start);
            Some((base + u64::from(start), base + u64::from(end)))
        };
        let mut pending = stretch();
        core::iter::from_fn(move || {
            let (start, mut end) = pending.take()?;
            loop {
                pending = stretch();
                match pending {
                    Some((more, last)) if more == end => end = last,
                    _ => return Some((Pfn(start << order.get()), end - start)),
                }
            }
        })
    }

    /// How many runs there are of all orders together, those that cross the seam of two blocks counted in each: an upper
    /// bound, by words.
    pub fn nr_runs_at_most(&self) -> u64 {
        let in_block = |words: &mut dyn Iterator<Item = u64>| {
            let mut last = 0;
            words
                .map(|word| {
                    // A run begins at each bit that is set and has none before it: the word's own, or the last one's.
                    let before = word << 1 | last >> 63;
                    last = word;
                    u64::from((word & !before).count_ones())
                })
                .sum::<u64>()
        };
        self.orders().flat_map(|order| self.blocks(order)).map(|block| in_block(&mut block.words())).sum()
    }

    /// The maximal page ranges `[start, end)` that folios of any order cover, ascending and disjoint.
    pub fn extents(&self) -> impl Iterator<Item = (Pfn, Pfn)> + '_ {
        self.extents_from(Order::ZERO)
    }

    /// As [`Tracker::extents`], of the folios of an order and the larger ones.
    pub fn extents_from(&self, smallest: Order) -> impl Iterator<Item = (Pfn, Pfn)> + '_ {
        let orders = self.orders().filter(|order| *order >= smallest);
        let mut runs: Vec<_> = orders.map(|order| (order, self.runs(order))).collect();
        let mut heads = BinaryHeap::new();
        for (i, (order, run)) in runs.iter_mut().enumerate() {
            heads.extend(run.next().map(|(pfn, n)| Reverse((pfn.0, pfn.0 + (n << order.get()), i))));
        }
        let mut next = move || {
            let Reverse((start, end, i)) = heads.pop()?;
            let (order, run) = &mut runs[i];
            heads.extend(run.next().map(|(pfn, n)| Reverse((pfn.0, pfn.0 + (n << order.get()), i))));
            Some((start, end))
        };
        let mut pending = next();
        core::iter::from_fn(move || {
            let (start, mut end) = pending.take()?;
            loop {
                pending = next();
                match pending {
                    Some((more, last)) if more <= end => end = end.max(last),
                    _ => return Some((Pfn(start), Pfn(end))),
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::Geometry;
    use crate::units::PageSize;

    #[test]
    fn the_runs_of_a_word_are_its_ones() {
        for (word, want) in
            [(u64::MAX, vec![(0, 64)]), (0b1011 | 1 << 63, vec![(0, 2), (3, 1), (63, 1)]), (1 << 63, vec![(63, 1)])]
        {
            let mut t = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
            let mut bitmap = [0; 512];
            bitmap[..8].copy_from_slice(&word.to_le_bytes());
            t.adopt_block(Order::ZERO, 0, &bitmap).unwrap();
            let runs: Vec<_> = t.runs(Order::ZERO).map(|(pfn, n)| (pfn.0, n)).collect();
            assert_eq!(runs, want);
        }
    }

    #[test]
    fn the_number_of_runs_is_bounded_by_a_count_of_words() {
        let mut t = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
        for (first, n) in [(0, 1), (2, 1), (60, 10), (4090, 3 * 4096), (1 << 20, 4096)] {
            t.preserve_run(Pfn(first), Order::ZERO, n).unwrap();
        }
        t.preserve(Pfn(32), Order::new(5).unwrap()).unwrap();
        // The run at 4090 lies in four blocks.
        let runs: usize = t.orders().map(|order| t.runs(order).count()).sum();
        assert_eq!((runs, t.nr_runs_at_most()), (6, 9));
    }

    #[test]
    fn full_blocks_join_what_lies_beside_them() {
        let mut t = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
        t.preserve_run(Pfn(4090), Order::ZERO, 3 * 4096).unwrap();
        t.preserve_run(Pfn(10 * 4096), Order::ZERO, 4096).unwrap();
        let runs: Vec<_> = t.runs(Order::ZERO).collect();
        assert_eq!(runs, [(Pfn(4090), 3 * 4096), (Pfn(10 * 4096), 4096)]);
    }

    #[test]
    fn runs_join_across_words_and_blocks_and_extents_across_orders() {
        let mut t = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
        t.preserve_run(Pfn(4090), Order::ZERO, 100).unwrap();
        t.preserve(Pfn(4192), Order::new(5).unwrap()).unwrap();
        t.preserve(Pfn(4190), Order::ZERO).unwrap();
        t.preserve(Pfn(4191), Order::ZERO).unwrap();
        t.preserve(Pfn(4192), Order::ZERO).unwrap();
        assert_eq!(t.runs(Order::ZERO).collect::<Vec<_>>(), [(Pfn(4090), 103)]);
        assert_eq!(t.extents().collect::<Vec<_>>(), [(Pfn(4090), Pfn(4224))]);
    }
}
