//! A set of addresses as disjoint runs.

#![forbid(unsafe_code)]

use super::PhysRange;
use crate::units::Phys;
use std::collections::BTreeMap;

/// Which addresses are taken, as disjoint runs that do not touch: first address to last address, inclusive since the
/// last may be the top of the address space.
#[derive(Default)]
pub(crate) struct Coverage {
    runs: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Takes `first..=last` and returns the parts of it that were free, ascending. Runs that it touches become one, so
    /// that many calls cost as many steps in all, whatever they overlap.
    pub(crate) fn take(&mut self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let before = self.runs.range(..=first).next_back();
        let from = match before {
            Some((&start, &end)) if end >= first.saturating_sub(1) => start,
            _ => first,
        };
        let touched: Vec<_> =
            self.runs.range(from..=last.saturating_add(1)).map(|(&start, &end)| (start, end)).collect();
        let mut free = Vec::new();
        let (mut run_first, mut run_last) = (first, last);
        // The first address not looked at; none once the top of the address space is.
        let mut at = Some(first);
        for (start, end) in touched {
            self.runs.remove(&start);
            run_first = run_first.min(start);
            run_last = run_last.max(end);
            if let Some(next) = at.filter(|&next| next < start && next <= last) {
                free.push((next, last.min(start - 1)));
            }
            at = at.and_then(|next| Some(next.max(end.checked_add(1)?)));
        }
        if let Some(next) = at.filter(|&next| next <= last) {
            free.push((next, last));
        }
        self.runs.insert(run_first, run_last);
        free
    }

    /// The runs as ranges. All 2^64 bytes have no length in 64 bits; they come out as two halves.
    pub(crate) fn ranges(&self) -> Vec<PhysRange> {
        const HALF: u64 = 1 << 63;
        self.runs
            .iter()
            .flat_map(|(&first, &last)| match (last - first).checked_add(1) {
                Some(len) => vec![PhysRange { start: Phys(first), len }],
                None => [0, HALF].map(|start| PhysRange { start: Phys(start), len: HALF }).to_vec(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn coverage_returns_what_was_free() {
        let mut taken = Coverage::default();
        assert_eq!(taken.take(10, 19), [(10, 19)]);
        assert_eq!(taken.take(30, 39), [(30, 39)]);
        assert_eq!(taken.take(12, 15), []);
        assert_eq!(taken.take(5, 50), [(5, 9), (20, 29), (40, 50)]);
        assert_eq!(taken.take(51, 60), [(51, 60)]);
        let all = PhysRange { start: Phys(5), len: 56 };
        assert_eq!(taken.ranges(), [all]);
    }

    #[test]
    fn coverage_reaches_the_top_of_the_address_space() {
        let mut taken = Coverage::default();
        assert_eq!(taken.take(u64::MAX, u64::MAX), [(u64::MAX, u64::MAX)]);
        assert_eq!(taken.take(0, u64::MAX), [(0, u64::MAX - 1)]);
        assert_eq!(taken.take(1, u64::MAX), []);
        let halves = taken.ranges();
        assert_eq!(halves.len(), 2);
        assert!(halves[1].contains(Phys(u64::MAX), 1));
    }

    proptest! {
        #[test]
        fn coverage_is_a_set_of_addresses(takes in proptest::collection::vec((0u64..200, 0u64..40), 0..30)) {
            let mut taken = Coverage::default();
            let mut model = std::collections::BTreeSet::new();
            for (first, more) in takes {
                let free: Vec<u64> = taken.take(first, first + more).into_iter().flat_map(|(a, b)| a..=b).collect();
                let expected: Vec<u64> = (first..=first + more).filter(|at| model.insert(*at)).collect();
                prop_assert_eq!(free, expected);
            }
            let ranges = taken.ranges();
            let covered: Vec<u64> = ranges.iter().flat_map(|r| r.start.0..r.start.0 + r.len).collect();
            prop_assert_eq!(covered, model.into_iter().collect::<Vec<_>>());
            prop_assert!(ranges.windows(2).all(|w| w[0].start.0 + w[0].len < w[1].start.0));
        }
    }
}
