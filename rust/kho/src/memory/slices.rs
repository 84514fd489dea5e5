//! Memory given as byte strings at physical addresses.

#![forbid(unsafe_code)]

use super::{Coverage, PhysMemory, PhysRange};
use crate::error::{Error, Result};
use crate::units::Phys;

/// Byte strings at physical addresses; `B` is whatever owns the bytes.
#[derive(Debug)]
pub struct SliceMemory<B = Vec<u8>> {
    /// By address; disjoint, none empty.
    segments: Vec<(Phys, B)>,
    ranges: Vec<PhysRange>,
}

impl<B: AsRef<[u8]>> SliceMemory<B> {
    /// Memory of these segments, in any order; empty ones are dropped.
    ///
    /// # Errors
    /// [`Error::Invalid`] if two overlap, [`Error::OutOfRange`] if one runs past the address space.
    pub fn new(segments: impl IntoIterator<Item = (Phys, B)>) -> Result<Self> {
        let mut segments: Vec<_> = segments.into_iter().filter(|(_, bytes)| !bytes.as_ref().is_empty()).collect();
        segments.sort_by_key(|(phys, _)| *phys);
        let mut taken = Coverage::default();
        for (phys, bytes) in &segments {
            let more = bytes.as_ref().len() as u64 - 1;
            let last = phys.0.checked_add(more).ok_or(Error::OutOfRange {
                what: "segment",
                value: phys.0,
                limit: u64::MAX - more,
            })?;
            if taken.take(phys.0, last) != [(phys.0, last)] {
                return Err(Error::Invalid {
                    what: "segments",
                    why: format!("{phys} (+{:#x}) overlaps another", bytes.as_ref().len()),
                });
            }
        }
        Ok(SliceMemory { ranges: taken.ranges(), segments })
    }

    /// The index of the first segment that ends after `phys`.
    fn at_or_behind(&self, phys: Phys) -> usize {
        self.segments.partition_point(|(start, bytes)| start.0 + (bytes.as_ref().len() as u64 - 1) < phys.0)
    }
}

impl<B: AsRef<[u8]> + Send + Sync> PhysMemory for SliceMemory<B> {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        let outside = Error::OutsideMemory { what: "read", phys: phys.0, len: buf.len() as u64 };
        let mut done = 0;
        for (start, bytes) in &self.segments[self.at_or_behind(phys)..] {
            let rest = &mut buf[done..];
            let Some(at) =
                phys.0.checked_add(done as u64).and_then(|at| at.checked_sub(start.0)).filter(|_| !rest.is_empty())
            else {
                break;
            };
            let Some(here) = usize::try_from(at).ok().and_then(|at| bytes.as_ref().get(at..)) else {
                break;
            };
            let n = rest.len().min(here.len());
            rest[..n].copy_from_slice(&here[..n]);
            done += n;
        }
        if done == buf.len() { Ok(()) } else { Err(outside) }
    }

    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>> {
        Ok(self.segments.get(self.at_or_behind(phys)).map(|(start, bytes)| {
            let from = phys.max(*start);
            PhysRange { start: from, len: bytes.as_ref().len() as u64 - (from.0 - start.0) }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> SliceMemory<&'static [u8]> {
        SliceMemory::new([
            (Phys(0x2000), &b"later"[..]),
            (Phys(0x1000), b"first"),
            (Phys(0x1005), b"second"),
            (Phys(0x1800), b""),
        ])
        .unwrap()
    }

    #[test]
    fn adjacent_segments_read_as_one() {
        let m = memory();
        assert_eq!(m.read_vec("x", Phys(0x1000), 11).unwrap(), b"firstsecond");
        assert_eq!(m.read_vec("x", Phys(0x1004), 2).unwrap(), b"ts");
        assert_eq!(m.ranges().len(), 2);
        assert_eq!(m.nbytes(), 16);
    }

    #[test]
    fn a_read_outside_is_refused() {
        let m = memory();
        for (phys, len) in [(0xfff, 2), (0x100a, 2), (0x100b, 1), (0x1fff, 3), (0x2004, 2), (u64::MAX, 1)] {
            let mut buf = vec![0; len];
            assert!(m.read(Phys(phys), &mut buf).is_err(), "{phys:#x}");
        }
        m.read(Phys(0), &mut []).unwrap();
    }

    #[test]
    fn overlaps_and_the_end_of_the_address_space_are_refused() {
        let overlap = SliceMemory::new([(Phys(0x10), vec![0; 4]), (Phys(0x13), vec![0; 4])]);
        assert_eq!(overlap.unwrap_err().to_string(), "segments: 0x13 (+0x4) overlaps another");
        assert!(SliceMemory::new([(Phys(u64::MAX), vec![0; 2])]).is_err());
        let top = SliceMemory::new([(Phys(u64::MAX - 1), vec![1, 2])]).unwrap();
        assert_eq!(top.read_vec("x", Phys(u64::MAX), 1).unwrap(), [2]);
        assert!(top.read(Phys(u64::MAX), &mut [0; 2]).is_err());
    }

    #[test]
    fn data_runs_are_the_segments() {
        let m = memory();
        let run = |phys| m.next_data(Phys(phys)).unwrap().map(|r| (r.start.0, r.len));
        assert_eq!(run(0), Some((0x1000, 5)));
        assert_eq!(run(0x1004), Some((0x1004, 1)));
        assert_eq!(run(0x1005), Some((0x1005, 6)));
        assert_eq!(run(0x100b), Some((0x2000, 5)));
        assert_eq!(run(0x2005), None);
        let empty = SliceMemory::<Vec<u8>>::new([]).unwrap();
        assert_eq!(empty.next_data(Phys(0)).unwrap(), None);
    }
}
