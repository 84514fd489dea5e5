//! Physical memory to read from: a trait of bounded reads, and the files that implement it.

#![forbid(unsafe_code)]

mod absence;
mod backing;
mod coverage;
mod file;
mod format;
mod live;
mod note;
mod open;
mod part;
mod reader;
mod room;
mod slices;
mod source;
mod unpack;

pub use absence::{Absence, absences_in, absent_bytes, next_absence};
pub(crate) use backing::data_in;
pub(crate) use coverage::Coverage;
pub use file::FileMemory;
pub use note::{Machine, NOTE_NAME, Note};
pub use open::{open_elf, open_raw, open_sources, open_sources_with};
pub use part::Cut;
pub use reader::ReaderMemory;
pub use room::Room;
pub use slices::SliceMemory;
pub(crate) use source::runs;
pub use source::{Board, Source};
pub use unpack::{LIMIT_VARIABLE, unpack_bytes};

use crate::error::{Error, Result};
use crate::filter::Absent;
use crate::units::Phys;

/// A run of physical memory: `len` bytes from `start`. The end may be 2^64, so it has no field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PhysRange {
    /// The first address.
    pub start: Phys,
    /// The number of bytes.
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
    /// The machine's memory as the files name it: sorted by address, disjoint, adjacent runs merged. What of it is not in
    /// the files is in [`PhysMemory::absences`].
    fn ranges(&self) -> &[PhysRange];

    /// Fills `buf` from `phys`.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if any byte is not here (then `buf` is unspecified), [`Error::LeftOut`] or
    /// [`Error::CutOff`] if the machine had it and the file has not, [`Error::Io`] or [`Error::Source`] on a read error.
    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()>;

    /// The first run at or after `phys` that may hold something other than zeros; `None` when the rest is
    /// zero-filled or absent. Holes of sparse files and zero-filled tails are skipped this way.
    ///
    /// # Errors
    /// [`Error::Io`] on a read error.
    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>>;

    /// As [`PhysMemory::next_data`], for a caller that reads all of it: holes are looked for even where that takes a moment
    /// of its own, and reading them would fill them.
    ///
    /// # Errors
    /// [`Error::Io`] on a read error.
    fn next_to_search(&self, phys: Phys) -> Result<Option<PhysRange>> {
        self.next_data(phys)
    }

    /// As [`PhysMemory::read`], for a search: memory that turns out to be missing only as it is read is zeros.
    ///
    /// # Errors
    /// What reading returns, unless the memory is missing.
    fn read_to_search(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        self.read(phys, buf)
    }

    /// Whether one thread at a time reads it in each call of the library.
    fn one_thread(&self) -> bool {
        false
    }

    /// The first run in `phys..=last` that does not read as zeros, as far as that is known without reading it: what is
    /// missing counts, so that reading it says so. It looks no further than `last`, which is at or after `phys`.
    ///
    /// # Errors
    /// [`Error::Io`] on a read error.
    fn next_to_read(&self, phys: Phys, last: Phys) -> Result<Option<PhysRange>> {
        let found = self.next_data(phys)?.filter(|run| run.start <= last);
        Ok(found.map(|run| PhysRange { len: run.len.min((last.0 - run.start.0).saturating_add(1)), ..run }))
    }

    /// The runs within [`PhysMemory::ranges`] that cannot be read: sorted by address, disjoint.
    fn absences(&self) -> &[Absence] {
        &[]
    }

    /// The error of reading `len` bytes at `phys`, if some of them are in [`PhysMemory::absences`].
    fn absent(&self, phys: Phys, len: u64) -> Option<Error> {
        absences_in(self.absences(), phys, len).next().map(|absence| match absence.why {
            Absent::LeftOut => Error::LeftOut { phys: absence.range.start.0, len: absence.range.len, level: None },
            Absent::CutOff => {
                Error::CutOff { claim: String::new(), phys: absence.range.start.0, len: absence.range.len }
            }
        })
    }

    /// What is known to be cut off the files, by address: as [`FileMemory::truncated`].
    fn cuts(&self) -> &[Cut] {
        &[]
    }

    /// The level of the filter that wrote the dump (makedumpfile's `-d`), if it names one.
    fn dump_level(&self) -> Option<u32> {
        None
    }

    /// VMCOREINFO, the crashed kernel's description of itself: lines of `NAME=value`.
    fn vmcoreinfo(&self) -> Option<&[u8]> {
        None
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
        if let Some(error) = self.absent(phys, len) {
            return Err(error);
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

#[cfg(test)]
mod tests;
