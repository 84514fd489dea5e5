//! Memory in files: segments that say which bytes of which file are at which address.
//!
//! Files are read with positioned reads, not mapped: one that is cut short while it is read gives an error, no SIGBUS.

#![forbid(unsafe_code)]

use super::format::elf::{Machine, Note, NoteBytes};
use super::source::Source;
use super::unpack::{self, Work};
use super::{PhysMemory, PhysRange, Room};
use crate::error::{Error, Result, SourceProblem};
use crate::units::Phys;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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
    /// Opens a file; the content of a pipe is put into a temporary one first, or unpacked into one. Waits for nothing but
    /// a pipe's writer.
    ///
    /// # Errors
    /// [`Error::Source`] for what is neither a file, a block device nor a pipe, is empty, or may not be read.
    pub(crate) fn open(path: &Path, work: &Work<'_>) -> Result<Self> {
        match open(path)? {
            Opened::File(file, size) => {
                Ok(Backing { path: path.to_path_buf(), store: super::live::store(file), size, held: size })
            }
            Opened::Stream(stream) => unpack::spool(path, stream, work),
        }
    }

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
    fn run(&self, within: Range<u64>) -> PhysRange {
        PhysRange { start: Phys(self.first + (within.start - self.offset)), len: within.end - within.start }
    }

    /// How many of the `filled` bytes a file of `size` bytes has.
    fn present(&self, size: u64) -> u64 {
        self.filled.min(size.saturating_sub(self.offset))
    }
}

/// Memory that a file claims and, cut short, does not have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cut {
    pub path: PathBuf,
    /// What claims it: "ELF segment 3".
    pub claim: String,
    pub missing: PhysRange,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: memory at {} (+{:#x}) is missing, the file is cut short",
            self.path.display(),
            self.claim,
            self.missing.start,
            self.missing.len
        )
    }
}

/// One file as it goes into a [`FileMemory`]: its segments are disjoint.
pub(crate) struct Part {
    pub(crate) source: Source,
    pub(crate) backing: Backing,
    pub(crate) segments: Vec<Segment>,
    /// How messages name a segment with an index.
    pub(crate) kind: &'static str,
    pub(crate) machine: Option<Machine>,
    pub(crate) notes: Vec<NoteBytes>,
    /// What its segments leave out because the file is cut short.
    pub(crate) cuts: Vec<Cut>,
    /// Whether it is a raw image: nothing in the file says where in memory it is.
    pub(crate) raw: bool,
}

impl Part {
    pub(crate) fn new(source: Source, backing: Backing, segments: Vec<Segment>) -> Self {
        let (kind, machine) = ("segment", None);
        Part { source, backing, segments, kind, machine, notes: Vec::new(), cuts: Vec::new(), raw: false }
    }
}

/// Memory in one or several open files: ELF cores, dumps and raw images.
pub struct FileMemory {
    sources: Vec<Source>,
    backings: Vec<Backing>,
    /// How messages name a segment of each.
    kinds: Vec<&'static str>,
    /// By address; disjoint, none empty.
    segments: Vec<Segment>,
    /// For each segment the first one, from it on, that is not all zeros; the number of segments if there is none. A
    /// search for data would otherwise look at every segment of zeros each time.
    filled: Vec<u32>,
    ranges: Vec<PhysRange>,
    machine: Option<Machine>,
    notes: Vec<NoteBytes>,
    truncated: Vec<Cut>,
    raw: bool,
}

impl fmt::Debug for FileMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileMemory")
            .field("sources", &self.sources)
            .field("ranges", &self.ranges)
            .finish_non_exhaustive()
    }
}

impl FileMemory {
    /// # Errors
    /// [`SourceProblem::Overlap`] if two parts have the same memory.
    pub(crate) fn new(parts: Vec<Part>) -> Result<Self> {
        let mut memory = FileMemory {
            sources: Vec::new(),
            backings: Vec::new(),
            kinds: Vec::new(),
            segments: Vec::new(),
            filled: Vec::new(),
            ranges: Vec::new(),
            machine: None,
            notes: Vec::new(),
            truncated: Vec::new(),
            raw: parts.iter().all(|part| part.raw),
        };
        for (backing, part) in (0u32..).zip(parts) {
            memory.sources.push(part.source);
            memory.backings.push(part.backing);
            memory.kinds.push(part.kind);
            memory.machine = memory.machine.or(part.machine);
            memory.truncated.extend(part.cuts);
            memory.notes.extend(part.notes);
            // In place: the segments of one file may be many.
            let segments: Vec<_> = part.segments.into_iter().map(|segment| Segment { backing, ..segment }).collect();
            match memory.segments.is_empty() {
                true => memory.segments = segments,
                false => memory.segments.extend(segments),
            }
        }
        memory.segments.sort_unstable_by_key(|s| s.first);
        memory.check_count()?;
        let mut ranges = Vec::new();
        let mut before: Option<&Segment> = None;
        for segment in &memory.segments {
            if let Some(before) = before.filter(|before| before.last() >= segment.first) {
                let later = &memory.backings[before.backing.max(segment.backing) as usize];
                return Err(
                    later.error(SourceProblem::Overlap { first: Phys(before.first), second: Phys(segment.first) })
                );
            }
            before = Some(segment);
            append(&mut ranges, segment);
            let backing = &memory.backings[segment.backing as usize];
            let present = segment.present(backing.size);
            if let Some(index) = segment.index.filter(|_| present < segment.filled) {
                memory.truncated.push(Cut {
                    path: backing.path.clone(),
                    claim: format!("{} {index}", memory.kinds[segment.backing as usize]),
                    missing: PhysRange { start: Phys(segment.first + present), len: segment.filled - present },
                });
            }
        }
        memory.ranges = ranges;
        let mut next = memory.segments.len() as u32;
        let mut filled = vec![next; memory.segments.len()];
        for (at, segment) in memory.segments.iter().enumerate().rev() {
            if segment.filled > 0 {
                next = at as u32;
            }
            filled[at] = next;
        }
        memory.filled = filled;
        Ok(memory)
    }

    /// Refuses files that are little else than headers, and segments that name the same bytes of a file: reading each
    /// address once would read these again and again.
    fn check_count(&self) -> Result<()> {
        let room = self.room();
        let Some(first) = self.segments.first() else { return Ok(()) };
        let backing = |at: u32| &self.backings[at as usize];
        let count = self.segments.len() as u64;
        if count > room.items() {
            let why = format!(
                "{count} runs of memory are more than the {} that {:#x} bytes of file can plausibly describe",
                room.items(),
                room.held()
            );
            return Err(backing(first.backing).error(SourceProblem::Raw { why }));
        }
        let mut present = vec![0u128; self.backings.len()];
        for segment in &self.segments {
            present[segment.backing as usize] += u128::from(segment.present(backing(segment.backing).size));
        }
        for (backing, present) in self.backings.iter().zip(present) {
            if present > u128::from(backing.size) {
                let why = format!(
                    "its headers put {present:#x} bytes of contents into a file of {:#x}: some name the same bytes for \
                     several addresses",
                    backing.size
                );
                return Err(backing.error(SourceProblem::Raw { why }));
            }
        }
        Ok(())
    }

    /// What this was opened from.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// The sources, if all are raw images: nothing but their names says where they lie.
    pub fn raw_sources(&self) -> Option<&[Source]> {
        self.raw.then_some(&self.sources)
    }

    /// Of one raw image (place in it, address, bytes) of its runs, by place.
    pub(crate) fn raw_runs(&self) -> Option<Vec<(u64, u64, u64)>> {
        let [source] = self.raw_sources()? else { return None };
        let mut runs: Vec<_> = self.segments.iter().map(|s| (s.offset - source.offset, s.first, s.len)).collect();
        runs.sort_unstable();
        Some(runs)
    }

    /// The machine that the first of the sources to name one does: an ELF core, or a kdump file.
    pub fn machine(&self) -> Option<Machine> {
        self.machine
    }

    /// The notes of ELF cores and kdump files, in order; of each file at most the first 16 MiB. A malformed note ends its segment.
    pub fn notes(&self) -> impl Iterator<Item = Note<'_>> {
        self.notes.iter().flat_map(NoteBytes::iter)
    }

    /// What the files should have had and do not: reading there fails, [`PhysMemory::next_data`] skips it. Of a kdump
    /// file these are the pages whose descriptors are gone, as one range; what else is gone shows when it is read.
    pub fn truncated(&self) -> &[Cut] {
        &self.truncated
    }

    /// Fills `out` from `skip` bytes into the segment, where it has that many.
    fn fill(&self, segment: &Segment, skip: u64, out: &mut [u8]) -> Result<()> {
        let backing = &self.backings[segment.backing as usize];
        let filled = segment.filled.saturating_sub(skip);
        let n = usize::try_from(filled).map_or(out.len(), |filled| filled.min(out.len()));
        let (file, zeros) = out.split_at_mut(n);
        zeros.fill(0);
        if file.is_empty() {
            return Ok(());
        }
        let missing = || {
            let why = format!(
                "memory at {:#x} (+{n:#x}) would be at file offset {:#x}, but the file ends before that",
                segment.first + skip,
                segment.offset.saturating_add(skip)
            );
            backing.error(match segment.index {
                Some(index) => {
                    SourceProblem::Segment { kind: self.kinds[segment.backing as usize], index: index.into(), why }
                }
                None => SourceProblem::Raw { why },
            })
        };
        // Known to be cut: no need to ask the file, whose offsets end at 2^63.
        if skip + n as u64 > segment.present(backing.size) {
            return Err(missing());
        }
        backing.store.read_exact_at(segment.offset + skip, file).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => missing(),
            io::ErrorKind::InvalidData => {
                let phys = Phys(segment.first + skip);
                backing.error(SourceProblem::Page { phys, len: n as u64, why: e.to_string() })
            }
            _ => backing.error(SourceProblem::Io(e)),
        })
    }

    /// The first segment from `at` on that is not all zeros, with its index.
    fn filled_from(&self, at: usize) -> Option<(usize, &Segment)> {
        let index = *self.filled.get(at)? as usize;
        Some((index, self.segments.get(index)?))
    }

    /// The index of the first segment that ends at or behind `phys`.
    fn at_or_behind(&self, phys: Phys) -> usize {
        self.segments.partition_point(|s| s.last() < phys.0)
    }
}

impl PhysMemory for FileMemory {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        let outside = Error::OutsideMemory { what: "read", phys: phys.0, len: buf.len() as u64 };
        let mut at = Some(phys.0);
        let mut rest = buf;
        for segment in &self.segments[self.at_or_behind(phys)..] {
            let Some(here) = at.filter(|&at| !rest.is_empty() && segment.first <= at) else {
                break;
            };
            let skip = here - segment.first;
            let n = usize::try_from(segment.len - skip).map_or(rest.len(), |n| n.min(rest.len()));
            let (now, later) = rest.split_at_mut(n);
            self.fill(segment, skip, now)?;
            rest = later;
            at = here.checked_add(n as u64);
        }
        if rest.is_empty() { Ok(()) } else { Err(outside) }
    }

    fn room(&self) -> Room {
        let held = self.backings.iter().fold(0, |held: u64, backing| held.saturating_add(backing.held));
        match self.most_to_search() {
            u64::MAX => Room::new(held),
            _ => Room::packed(held),
        }
    }

    fn most_to_search(&self) -> u64 {
        let most = |backing: &Backing| backing.store.most_to_search(backing.held);
        self.backings.iter().fold(0, |sum: u64, backing| sum.saturating_add(most(backing)))
    }

    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>> {
        let mut at = self.at_or_behind(phys);
        while let Some((index, segment)) = self.filled_from(at) {
            at = index + 1;
            let backing = &self.backings[segment.backing as usize];
            let skip = phys.0.saturating_sub(segment.first);
            let present = segment.present(backing.size);
            if skip >= present {
                continue;
            }
            if let Some(run) = backing.store.data_in(segment.offset + skip..segment.offset + present) {
                return Ok(Some(segment.run(run)));
            }
        }
        Ok(None)
    }

    fn next_to_read(&self, phys: Phys, last: Phys) -> Result<Option<PhysRange>> {
        let mut at = self.at_or_behind(phys);
        while let Some((index, segment)) = self.filled_from(at).filter(|(_, segment)| segment.first <= last.0) {
            at = index + 1;
            let backing = &self.backings[segment.backing as usize];
            let skip = phys.0.saturating_sub(segment.first);
            let wanted = segment.filled.min((last.0 - segment.first).saturating_add(1));
            let present = segment.present(backing.size).min(wanted);
            if skip < present
                && let Some(run) = backing.store.to_read_in(segment.offset + skip..segment.offset + present)
            {
                return Ok(Some(segment.run(run)));
            }
            let missing = present.max(skip);
            if missing < wanted {
                return Ok(Some(PhysRange { start: Phys(segment.first + missing), len: wanted - missing }));
            }
        }
        Ok(None)
    }
}

/// Adds a segment behind the ranges, which end where it begins or before. All 2^64 bytes have no length in 64 bits, so
/// that what would be as long stays two.
fn append(ranges: &mut Vec<PhysRange>, segment: &Segment) {
    if let Some(last) = ranges.last_mut()
        && last.start.0.checked_add(last.len) == Some(segment.first)
        && let Some(len) = last.len.checked_add(segment.len)
    {
        last.len = len;
    } else {
        ranges.push(PhysRange { start: Phys(segment.first), len: segment.len });
    }
}

/// What a path led to.
enum Opened {
    /// A file or block device, and its size.
    File(File, u64),
    /// A pipe or FIFO; reading may give `WouldBlock`.
    Stream(File),
}

fn open(path: &Path) -> Result<Opened> {
    use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
    let fail = |problem| Error::Source { path: path.to_path_buf(), problem };
    let io = |e: io::Error| fail(SourceProblem::Io(e));
    let check = |kind: std::fs::FileType| match () {
        () if kind.is_file() || kind.is_block_device() => Ok(()),
        () if kind.is_fifo() => Ok(()),
        () if kind.is_dir() => Err(fail(SourceProblem::Directory)),
        () => Err(fail(SourceProblem::NotAFile)),
    };
    // Asked before, since opening some devices does something; and again, since it may be another one by now.
    check(std::fs::metadata(path).map_err(io)?.file_type())?;
    let file = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    check(metadata.file_type())?;
    if metadata.file_type().is_fifo() {
        return Ok(Opened::Stream(file));
    }
    let size = if metadata.is_file() {
        metadata.len()
    } else {
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| io(e.into()))?
    };
    if size == 0 {
        return Err(fail(SourceProblem::Empty));
    }
    Ok(Opened::File(file, size))
}
