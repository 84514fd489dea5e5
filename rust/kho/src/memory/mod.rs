//! Physical memory to read from: a trait of bounded reads, and the files that implement it.

#![forbid(unsafe_code)]

mod file;
mod format;
mod live;
mod room;
mod slices;
mod source;
mod unpack;

pub(crate) use file::data_in;
pub use file::{Cut, FileMemory};
pub use format::elf::{Machine, Note};
pub use room::Room;
pub use slices::SliceMemory;
pub(crate) use source::runs;
pub use source::{Board, Source, open_elf, open_raw, open_sources, open_sources_with, parse_number};
pub use unpack::LIMIT_VARIABLE;

use crate::error::{Error, Result};
use crate::units::Phys;
use std::collections::BTreeMap;

/// A run of physical memory: `len` bytes from `start`. The end may be 2^64, so it has no field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PhysRange {
    pub start: Phys,
    pub len: u64,
}

impl PhysRange {
    /// Whether `len` bytes at `phys` lie inside.
    pub const fn contains(&self, phys: Phys, len: u64) -> bool {
        phys.0 >= self.start.0 && phys.0 - self.start.0 <= self.len && len <= self.len - (phys.0 - self.start.0)
    }
}

/// Memory that can be read by physical address. No read is followed before it was bounded by `ranges`.
pub trait PhysMemory: Send + Sync {
    /// What is here: sorted by address, disjoint, adjacent runs merged.
    fn ranges(&self) -> &[PhysRange];

    /// Fills `buf` from `phys`.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if any byte is not here (then `buf` is unspecified), [`Error::Io`] or
    /// [`Error::Source`] if the file says no.
    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()>;

    /// The first run at or behind `phys` that may hold something other than zeros; `None` when the rest is
    /// zero-filled or absent. Holes of sparse files and zero-filled tails are skipped this way.
    ///
    /// # Errors
    /// [`Error::Io`] if the file says no.
    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>>;

    /// As [`PhysMemory::next_data`], for whoever will read all of it: holes are looked for even where that takes a moment
    /// of its own, and reading them would fill them.
    ///
    /// # Errors
    /// [`Error::Io`] if the file says no.
    fn next_to_search(&self, phys: Phys) -> Result<Option<PhysRange>> {
        self.next_data(phys)
    }

    /// The first run in `phys..=last` that does not read as zeros, as far as that is known without reading it: what is
    /// missing counts, so that reading it says so. It looks no further than `last`, which is at or after `phys`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file says no.
    fn next_to_read(&self, phys: Phys, last: Phys) -> Result<Option<PhysRange>> {
        let found = self.next_data(phys)?.filter(|run| run.start <= last);
        Ok(found.map(|run| PhysRange { len: run.len.min((last.0 - run.start.0).saturating_add(1)), ..run }))
    }

    /// How much a reader allocates for this memory: of files by their bytes, of other memory by what is here.
    fn room(&self) -> Room {
        Room::new(u64::try_from(self.nbytes()).unwrap_or(u64::MAX))
    }

    /// Bytes of data that are searched for a handover: of a compressed dump fewer than it can be made to unpack to.
    fn most_to_search(&self) -> u64 {
        u64::MAX
    }

    /// Whether `len` bytes at `phys` are here.
    fn contains(&self, phys: Phys, len: u64) -> bool {
        let ranges = self.ranges();
        let after = ranges.partition_point(|r| r.start <= phys);
        after > 0 && ranges[after - 1].contains(phys, len)
    }

    /// Bytes here in all.
    fn nbytes(&self) -> u128 {
        self.ranges().iter().map(|r| u128::from(r.len)).sum()
    }

    /// `len` bytes at `phys`, which is bounded before anything is allocated.
    ///
    /// # Errors
    /// As [`PhysMemory::read`]; [`Error::Io`] when there is no room for that much.
    fn read_vec(&self, what: &'static str, phys: Phys, len: u64) -> Result<Vec<u8>> {
        let outside = || Error::OutsideMemory { what, phys: phys.0, len };
        if !self.contains(phys, len) {
            return Err(outside());
        }
        let room = usize::try_from(len).map_err(|_| outside())?;
        let mut buf = Vec::new();
        // A zero-filled tail may claim more than this machine has.
        buf.try_reserve_exact(room)
            .map_err(|_| Error::io(format!("{what} at {phys}: {len:#x} bytes"), std::io::ErrorKind::OutOfMemory))?;
        buf.resize(room, 0);
        self.read(phys, &mut buf)?;
        Ok(buf)
    }
}

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
mod tests;

#[cfg(test)]
mod coverage_tests {
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
