//! Runs: maximal stretches of consecutive folios, found by words.

use super::Tracker;
use crate::units::{Order, Pfn};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

impl Tracker {
    /// The maximal runs of consecutive folios of one order, ascending: the first pfn, and how many folios.
    pub fn runs(&self, order: Order) -> impl Iterator<Item = (Pfn, u64)> + '_ {
        let bits = self.geometry().bits();
        let stretches = self.blocks(order).filter(|block| !block.is_empty()).flat_map(move |block| {
            let base = block.index() * bits;
            // A full block is one stretch without a look at it.
            let full = block.count() == bits;
            let words = if full { 0 } else { bits / 64 };
            let words = (0..words).zip(block.words()).filter(|&(_, word)| word != 0);
            let parts = words.flat_map(move |(i, word)| stretches_of(word).map(move |(at, n)| (base + i * 64 + at, n)));
            full.then_some((base, bits)).into_iter().chain(parts)
        });
        let mut stretches = stretches.peekable();
        core::iter::from_fn(move || {
            let (start, mut count) = stretches.next()?;
            while let Some((_, more)) = stretches.next_if(|(at, _)| *at == start + count) {
                count += more;
            }
            Some((Pfn(start << order.get()), count))
        })
    }

    /// The maximal page ranges `[start, end)` that folios of any order cover, ascending and disjoint.
    pub fn extents(&self) -> impl Iterator<Item = (Pfn, Pfn)> + '_ {
        let mut runs: Vec<_> = self.orders().map(|order| (order, self.runs(order))).collect();
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

/// The stretches of set bits of a word: where each begins, and how long it is.
fn stretches_of(mut word: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let skip = word.trailing_zeros();
        let len = (word >> skip).trailing_ones();
        let at = done + skip;
        done = at + len;
        word = word.checked_shr(skip + len).unwrap_or(0);
        Some((at.into(), len.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::Geometry;
    use crate::units::PageSize;

    #[test]
    fn the_stretches_of_a_word_are_its_ones() {
        assert_eq!(stretches_of(0).count(), 0);
        assert_eq!(stretches_of(u64::MAX).collect::<Vec<_>>(), [(0, 64)]);
        assert_eq!(stretches_of(0b1011 | 1 << 63).collect::<Vec<_>>(), [(0, 2), (3, 1), (63, 1)]);
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
