//! Physical memory to read from: a trait of bounded reads, and the files that implement it.

use crate::error::{Error, Result};
use crate::units::Phys;

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
    /// As [`PhysMemory::read`].
    fn read_vec(&self, what: &'static str, phys: Phys, len: u64) -> Result<Vec<u8>> {
        let outside = || Error::OutsideMemory { what, phys: phys.0, len };
        if !self.contains(phys, len) {
            return Err(outside());
        }
        let mut buf = vec![0; usize::try_from(len).map_err(|_| outside())?];
        self.read(phys, &mut buf)?;
        Ok(buf)
    }
}
