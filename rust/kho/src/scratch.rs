//! Scratch areas: the memory the next kernel boots in, which no preserved folio may overlap.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::memory::{Coverage, PhysRange};
use crate::units::Phys;

/// One scratch area: an entry of the array that the next kernel receives (`struct { u64 addr, size; }`, abi.md section 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScratchArea {
    /// The first address.
    pub addr: u64,
    /// The number of bytes.
    pub size: u64,
}

impl ScratchArea {
    /// Whether `len` bytes at `phys` share a byte with it.
    pub const fn overlaps(self, phys: u64, len: u64) -> bool {
        if phys < self.addr { len > self.addr - phys } else { phys - self.addr < self.size && len > 0 }
    }
}

/// The first of `areas` that `len` bytes at `phys` overlap, as an error.
pub fn check_no_overlap(areas: &[ScratchArea], what: &'static str, phys: Phys, len: u64) -> Result<()> {
    match areas.iter().find(|area| area.overlaps(phys.0, len)) {
        None => Ok(()),
        Some(area) => {
            Err(Error::ScratchOverlap { what, phys: phys.0, len, scratch_addr: area.addr, scratch_size: area.size })
        }
    }
}

/// Areas as disjoint ranges, ascending.
pub(crate) fn ranges_of(areas: &[ScratchArea]) -> Vec<PhysRange> {
    let mut taken = Coverage::default();
    for area in areas.iter().filter(|area| area.size > 0) {
        taken.take(area.addr, area.addr.saturating_add(area.size - 1));
    }
    taken.ranges()
}
