//! An open file, and the runs of memory in it.
//!
//! Files are read with positioned reads, not mapped: a file that is truncated while it is read causes an error, not SIGBUS.

#![forbid(unsafe_code)]

use super::PhysRange;
use crate::error::{Error, Result, SourceProblem};
use crate::units::Phys;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Bytes that can be read by offset: a file, or its content.
pub(crate) trait Store: Send + Sync {
    /// Fills `buf`; `UnexpectedEof` if the bytes end before.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The first run in `within`, which is not empty, that may be other than zeros.
    fn data_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        Some(within)
    }

    /// As [`Store::data_in`], but bytes that cannot be read count as data.
    fn to_read_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        self.data_in(within)
    }

    /// Bytes that are searched for a handover at most, of a file of `held` bytes.
    fn most_to_search(&self, _held: u64) -> u64 {
        u64::MAX
    }
}

impl Store for Vec<u8> {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|at| self.get(at..)?.get(..buf.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

impl Store for File {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn data_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        data_in(self, within)
    }
}

/// The first run of a file in `within` that may be other than zeros, by SEEK_DATA and SEEK_HOLE; where there is no such
/// thing, all may be.
pub(crate) fn data_in(file: &File, within: Range<u64>) -> Option<Range<u64>> {
    use rustix::fs::{SeekFrom, seek};
    match seek(file, SeekFrom::Data(within.start)) {
        Ok(data) if data >= within.end => None,
        Ok(data) => {
            let data = data.max(within.start);
            let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(within.end);
            // A hole before the data is a file that changes under us.
            Some(data..if hole > data { hole.min(within.end) } else { within.end })
        }
        Err(rustix::io::Errno::NXIO) => None,
        Err(_) => Some(within),
    }
}

/// An open file.
pub(crate) struct Backing {
    pub(crate) path: PathBuf,
    pub(crate) store: Box<dyn Store>,
    /// Bytes in it when it was opened.
    pub(crate) size: u64,
    /// Bytes of the file on disk that it is made of: what is kept of it is a fixed multiple of this at most.
    pub(crate) held: u64,
}

impl Backing {
    /// The first `n` bytes, or as many as there are.
    ///
    /// # Errors
    /// [`SourceProblem::Io`] on a read error.
    pub(crate) fn head(&self, n: usize) -> Result<Vec<u8>> {
        let mut head = vec![0; usize::try_from(self.size).map_or(n, |size| size.min(n))];
        match self.store.read_exact_at(0, &mut head) {
            Ok(()) => Ok(head),
            // A file that was cut after it was opened, or the first page of a dump that is not there.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Vec::new()),
            Err(e) => Err(self.error(SourceProblem::Io(e))),
        }
    }

    pub(crate) fn error(&self, problem: SourceProblem) -> Error {
        Error::Source { path: self.path.clone(), problem }
    }
}

/// A run of memory whose first `filled` bytes are in a file and whose rest reads as zeros.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) first: u64,
    /// Not 0, and `first + len` is at most 2^64.
    pub(crate) len: u64,
    pub(crate) offset: u64,
    pub(crate) filled: u64,
    /// Its number, in a format that numbers them: the program header's in an ELF core.
    pub(crate) index: Option<u32>,
    /// Which of the files.
    pub(crate) backing: u32,
}

impl Segment {
    /// The last address, inclusive.
    pub(crate) const fn last(&self) -> u64 {
        self.first + (self.len - 1)
    }

    /// The part `first..=last`, which lies inside.
    pub(crate) fn part(&self, first: u64, last: u64) -> Segment {
        let skipped = first - self.first;
        let len = last - first + 1;
        Segment {
            first,
            len,
            offset: self.offset.saturating_add(skipped),
            filled: self.filled.saturating_sub(skipped).min(len),
            ..*self
        }
    }

    /// The memory of a run of the file that lies inside.
    pub(super) fn run(&self, within: Range<u64>) -> PhysRange {
        PhysRange { start: Phys(self.first + (within.start - self.offset)), len: within.end - within.start }
    }

    /// How many of the `filled` bytes a file of `size` bytes has.
    pub(super) fn present(&self, size: u64) -> u64 {
        self.filled.min(size.saturating_sub(self.offset))
    }
}
