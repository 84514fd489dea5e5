//! Memory that a machine had and its dump does not: left out by a filter, or cut off with the end of the file.

#![forbid(unsafe_code)]

use super::PhysRange;
use crate::filter::Absent;
use crate::units::Phys;

/// A run of memory that is not in its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Absence {
    /// The memory.
    pub range: PhysRange,
    /// Why it is not there.
    pub why: Absent,
}

impl Absence {
    /// The last address, inclusive; the range is not empty.
    pub(crate) const fn last(&self) -> u64 {
        self.range.start.0 + (self.range.len - 1)
    }
}

/// The parts of sorted, disjoint `all` within `len` bytes from `phys`.
pub fn absences_in(all: &[Absence], phys: Phys, len: u64) -> impl Iterator<Item = Absence> + '_ {
    let last = phys.0.saturating_add(len.saturating_sub(1));
    let from = all.partition_point(|absence| absence.last() < phys.0);
    let near = all[from..].iter().take_while(move |absence| len > 0 && absence.range.start.0 <= last);
    near.map(move |absence| {
        let (start, end) = (absence.range.start.0.max(phys.0), absence.last().min(last));
        Absence { range: PhysRange { start: Phys(start), len: end - start + 1 }, why: absence.why }
    })
}

/// The part of the first of sorted, disjoint `all` that lies at or after `phys`.
pub fn next_absence(all: &[Absence], phys: Phys) -> Option<Absence> {
    let absence = all.get(all.partition_point(|absence| absence.last() < phys.0))?;
    let start = absence.range.start.0.max(phys.0);
    Some(Absence { range: PhysRange { start: Phys(start), len: absence.last() - start + 1 }, why: absence.why })
}

/// Bytes of sorted, disjoint `all` within `len` bytes from `phys`, for each of [`Absent::ALL`].
pub fn absent_bytes(all: &[Absence], phys: Phys, len: u64) -> [u128; 2] {
    let mut bytes = [0; 2];
    for absence in absences_in(all, phys, len) {
        bytes[usize::from(absence.why == Absent::CutOff)] += u128::from(absence.range.len);
    }
    bytes
}

/// Sorts runs that may overlap, takes out what is in the sorted, disjoint `present` (first and last address), and what
/// is there twice; of two, the one that starts first stays.
pub(crate) fn without(mut runs: Vec<Absence>, present: impl Iterator<Item = (u64, u64)>) -> Vec<Absence> {
    runs.retain(|run| run.range.len > 0);
    runs.sort_by_key(|run| run.range.start);
    let mut present = present.peekable();
    let mut out: Vec<Absence> = Vec::with_capacity(runs.len());
    // The first address that is not decided; none past the top of the address space.
    let mut next = Some(0u64);
    for run in runs {
        let Some(mut at) = next.map(|next| next.max(run.range.start.0)) else { break };
        let last = run.last();
        while at <= last {
            while present.next_if(|(_, end)| *end < at).is_some() {}
            let taken = present.peek().copied().filter(|(start, _)| *start <= last);
            let stop = taken.map_or(last, |(start, _)| start.saturating_sub(1));
            if taken.is_none_or(|(start, _)| start > at) {
                push(&mut out, at, stop, run.why);
            }
            match taken.map_or(last, |(_, end)| end).checked_add(1) {
                Some(after) => at = after,
                None => return out,
            }
        }
        next = Some(next.unwrap_or(0).max(at));
    }
    out
}

/// Adds `first..=last`, after all earlier ones, to the last run if it continues it.
fn push(out: &mut Vec<Absence>, first: u64, last: u64, why: Absent) {
    let len = (last - first).saturating_add(1);
    match out.last_mut() {
        Some(before) if before.why == why && before.last().checked_add(1) == Some(first) => {
            match before.range.len.checked_add(len) {
                Some(both) => before.range.len = both,
                None => out.push(Absence { range: PhysRange { start: Phys(first), len }, why }),
            }
        }
        _ => out.push(Absence { range: PhysRange { start: Phys(first), len }, why }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_top_of_the_address_space_can_be_absent() {
        let run = |start, len, why| Absence { range: PhysRange { start: Phys(start), len }, why };
        let top = run(u64::MAX - 9, 10, Absent::CutOff);
        assert_eq!(without(vec![top, top], std::iter::empty()), [top]);
        assert_eq!(without(vec![top], [(u64::MAX, u64::MAX)].into_iter()), [run(u64::MAX - 9, 9, Absent::CutOff)]);
        let found: Vec<_> = absences_in(&[top], Phys(u64::MAX), 1).collect();
        assert_eq!(found, [run(u64::MAX, 1, Absent::CutOff)]);
    }

    proptest! {
        #[test]
        fn what_is_present_is_not_absent(
            runs in proptest::collection::vec((0u64..200, 0u64..30, any::<bool>()), 0..20),
            present in proptest::collection::btree_set(0u64..240, 0..60),
        ) {
            let why = |left| if left { Absent::LeftOut } else { Absent::CutOff };
            let mut sorted = runs.clone();
            sorted.sort_by_key(|run| run.0);
            let all = runs.iter().map(|&(start, len, left)| Absence {
                range: PhysRange { start: Phys(start), len },
                why: why(left),
            });
            let found = without(all.collect(), present.iter().map(|&at| (at, at)));
            prop_assert!(found.windows(2).all(|pair| pair[0].last() < pair[1].range.start.0));
            for at in 0u64..260 {
                let named = sorted.iter().any(|&(start, len, _)| start <= at && at < start + len);
                let inside = absences_in(&found, Phys(at), 1).next();
                prop_assert_eq!(inside.is_some(), named && !present.contains(&at), "{}", at);
                prop_assert_eq!(next_absence(&found, Phys(at)), absences_in(&found, Phys(at), u64::MAX).next());
            }
            let sum = |why| found.iter().filter(|run| run.why == why).map(|run| u128::from(run.range.len)).sum::<u128>();
            prop_assert_eq!(absent_bytes(&found, Phys(0), u64::MAX), Absent::ALL.map(sum));
        }
    }
}
