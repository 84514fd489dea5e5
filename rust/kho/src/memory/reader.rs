//! Memory that a function of the caller reads: a debugger's, a layer of another tool, a dump in a format of its own.

#![forbid(unsafe_code)]

use super::{Coverage, PhysMemory, PhysRange};
use crate::error::{Error, Result};
use crate::units::{PageSize, Phys};

/// The largest read that is passed on in one call.
const WINDOW: usize = 1 << 20;
/// The unit in which a search looks for what is missing.
const STEP: u64 = PageSize::Size4K.bytes();

/// Memory at given addresses that a function reads, in windows of at most 1 MiB. Nothing is kept between calls.
///
/// The function fills all of the buffer, or fails with [`Error::Reader`]: memory that it lacks is skipped by a search, any
/// other failure ends the work. It is called by one thread at a time for each call of the library, and may itself read.
pub struct ReaderMemory<F> {
    read: F,
    ranges: Vec<PhysRange>,
    vmcoreinfo: Option<Vec<u8>>,
}

impl<F: Fn(Phys, &mut [u8]) -> Result<()>> ReaderMemory<F> {
    /// Memory of these ranges, (start, bytes) each, in any order; ranges that touch or overlap become one.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if a range runs past the address space.
    pub fn new(read: F, ranges: impl IntoIterator<Item = (Phys, u64)>, vmcoreinfo: Option<Vec<u8>>) -> Result<Self> {
        let mut taken = Coverage::default();
        for (start, len) in ranges {
            let Some(more) = len.checked_sub(1) else { continue };
            let last = start.0.checked_add(more).ok_or(Error::OutOfRange {
                what: "range",
                value: start.0,
                limit: u64::MAX - more,
            })?;
            taken.take(start.0, last);
        }
        Ok(ReaderMemory { read, ranges: taken.ranges(), vmcoreinfo })
    }
}

/// Whether an error says that the memory is not there, rather than that reading it failed.
fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Reader { missing: Some(_), .. })
}

impl<F: Fn(Phys, &mut [u8]) -> Result<()> + Send + Sync> PhysMemory for ReaderMemory<F> {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        if !self.contains(phys, buf.len() as u64) {
            return Err(Error::OutsideMemory { what: "read", phys: phys.0, len: buf.len() as u64 });
        }
        let mut at = phys.0;
        for window in buf.chunks_mut(WINDOW) {
            (self.read)(Phys(at), window)?;
            // The last window may end at the top of the address space.
            at = at.wrapping_add(window.len() as u64);
        }
        Ok(())
    }

    fn read_to_search(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        match self.read(phys, buf) {
            Err(error) if is_missing(&error) => {}
            done => return done,
        }
        // Page by page, from an address that may lie inside a page.
        let mut at = phys.0;
        let mut rest = buf;
        while !rest.is_empty() {
            let len = usize::try_from(STEP - at % STEP).unwrap_or(rest.len()).min(rest.len());
            let (page, after) = rest.split_at_mut(len);
            match self.read(Phys(at), page) {
                Err(error) if is_missing(&error) => page.fill(0),
                done => done?,
            }
            at = at.wrapping_add(len as u64);
            rest = after;
        }
        Ok(())
    }

    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>> {
        let after = self.ranges.partition_point(|range| range.start.0 + (range.len - 1) < phys.0);
        Ok(self.ranges.get(after).map(|range| {
            let start = phys.max(range.start);
            PhysRange { start, len: range.len - (start.0 - range.start.0) }
        }))
    }

    fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.vmcoreinfo.as_deref()
    }

    fn one_thread(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Missing;
    use std::sync::Mutex;

    /// Memory whose bytes are the low byte of the page's number; page 3 is missing.
    fn reader(calls: &Mutex<Vec<(u64, usize)>>) -> impl Fn(Phys, &mut [u8]) -> Result<()> + Send + Sync {
        |phys, buf| {
            calls.lock().unwrap().push((phys.0, buf.len()));
            let end = phys.0 + buf.len() as u64;
            if phys.0 < 4 * STEP && end > 3 * STEP {
                return Err(Error::Reader { source: "page 3".into(), missing: Some(Missing::Outside) });
            }
            for (n, byte) in (phys.0..).zip(buf) {
                *byte = (n / STEP) as u8;
            }
            Ok(())
        }
    }

    #[test]
    fn ranges_merge_and_reads_are_bounded_by_them() {
        let calls = Mutex::default();
        let ranges = [(Phys(0x3000), 0x1000), (Phys(0), 0x2000), (Phys(0x1000), 0x2000), (Phys(0x9000), 0)];
        let memory = ReaderMemory::new(reader(&calls), ranges, None).unwrap();
        assert_eq!(memory.ranges(), [PhysRange { start: Phys(0), len: 0x4000 }]);
        assert!(memory.read(Phys(0x3fff), &mut [0; 2]).is_err());
        assert!(calls.lock().unwrap().is_empty());
        assert_eq!(memory.read_vec("x", Phys(0x1fff), 2).unwrap(), [1, 2]);
        assert_eq!(memory.next_data(Phys(0x1001)).unwrap(), Some(PhysRange { start: Phys(0x1001), len: 0x2fff }));
        assert_eq!(memory.next_data(Phys(0x4000)).unwrap(), None);
        assert!(ReaderMemory::new(reader(&calls), [(Phys(u64::MAX), 2)], None).is_err());
    }

    #[test]
    fn a_long_read_is_passed_on_in_windows() {
        let calls = Mutex::default();
        let memory = ReaderMemory::new(reader(&calls), [(Phys(4 * STEP), 3 << 20)], None).unwrap();
        memory.read_vec("x", Phys(4 * STEP), (2 << 20) + 1).unwrap();
        let expected = [(4 * STEP, WINDOW), (4 * STEP + (1 << 20), WINDOW), (4 * STEP + (2 << 20), 1)];
        assert_eq!(*calls.lock().unwrap(), expected);
    }

    #[test]
    fn a_search_skips_the_page_that_is_missing_alone() {
        let calls = Mutex::default();
        let memory = ReaderMemory::new(reader(&calls), [(Phys(0), 6 * STEP)], None).unwrap();
        let mut bytes = vec![9; 5 * STEP as usize - 1];
        memory.read_to_search(Phys(STEP / 2), &mut bytes).unwrap();
        let at = |phys: u64| bytes[(phys - STEP / 2) as usize];
        assert_eq!([at(STEP - 1), at(3 * STEP - 1), at(3 * STEP), at(4 * STEP - 1), at(4 * STEP)], [0, 2, 0, 0, 4]);
        assert!(memory.read(Phys(2 * STEP), &mut bytes[..2 * STEP as usize]).is_err());
    }
}
