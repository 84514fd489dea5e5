//! Memory in files: segments map ranges of addresses to ranges of files.

#![forbid(unsafe_code)]

use super::backing::{Backing, Segment};
use super::note::{Machine, Note, NoteBytes};
use super::part::{Cut, Part};
use super::source::Source;
use super::{Absence, PhysMemory, PhysRange, Room, absence};
use crate::error::{Error, Result, SourceProblem};
use crate::filter::Absent;
use crate::units::{PageSize, Phys};
use std::fmt;
use std::io;

/// Memory in one or several open files: ELF cores, dumps and raw images.
pub struct FileMemory {
    sources: Vec<Source>,
    backings: Vec<Backing>,
    /// How messages name a segment of each.
    kinds: Vec<&'static str>,
    /// By address; disjoint, none empty. Their files had all of them when they were opened.
    segments: Vec<Segment>,
    /// For each segment the first one, from it on, that is not all zeros; the number of segments if there is none. A
    /// search for data would otherwise look at every segment of zeros each time.
    filled: Vec<u32>,
    ranges: Vec<PhysRange>,
    machine: Option<Machine>,
    notes: Vec<NoteBytes>,
    vmcoreinfo: Option<Vec<u8>>,
    level: Option<u32>,
    absences: Vec<Absence>,
    /// By address.
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
            vmcoreinfo: None,
            level: None,
            absences: Vec::new(),
            truncated: Vec::new(),
            raw: parts.iter().all(|part| part.raw),
        };
        let mut absences = Vec::new();
        for (backing, part) in (0u32..).zip(parts) {
            memory.sources.push(part.source);
            memory.backings.push(part.backing);
            memory.kinds.push(part.kind);
            memory.machine = memory.machine.or(part.machine);
            memory.level = memory.level.or(part.level);
            memory.vmcoreinfo = memory.vmcoreinfo.or(part.vmcoreinfo);
            memory.truncated.extend(part.cuts);
            memory.notes.extend(part.notes);
            match absences.is_empty() {
                true => absences = part.absences,
                false => absences.extend(part.absences),
            }
            // In place: the segments of one file may be many.
            let segments: Vec<_> = part.segments.into_iter().map(|segment| Segment { backing, ..segment }).collect();
            match memory.segments.is_empty() {
                true => memory.segments = segments,
                false => memory.segments.extend(segments),
            }
        }
        memory.segments.sort_unstable_by_key(|s| s.first);
        memory.check_count(absences.len())?;
        let mut before: Option<&Segment> = None;
        for segment in &memory.segments {
            if let Some(before) = before.filter(|before| before.last() >= segment.first) {
                let later = &memory.backings[before.backing.max(segment.backing) as usize];
                return Err(later.error(SourceProblem::Overlap { first: before.first, second: segment.first }));
            }
            before = Some(segment);
        }
        memory.cut(&mut absences);
        let present = memory.segments.iter().map(|segment| (segment.first, segment.last()));
        memory.absences = absence::without(absences, present);
        memory.ranges = memory.named();
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

    /// Takes what the files do not have any more out of the segments.
    fn cut(&mut self, absences: &mut Vec<Absence>) {
        let whole = |segment: &Segment| segment.present(self.backings[segment.backing as usize].size) == segment.filled;
        if !self.segments.iter().all(whole) {
            let mut left = Vec::with_capacity(self.segments.len());
            for segment in &self.segments {
                let backing = &self.backings[segment.backing as usize];
                let present = segment.present(backing.size);
                if present == segment.filled {
                    left.push(*segment);
                    continue;
                }
                let kind = self.kinds[segment.backing as usize];
                let missing = PhysRange { start: Phys(segment.first + present), len: segment.filled - present };
                absences.push(Absence { range: missing, why: Absent::CutOff });
                self.truncated.push(Cut {
                    path: backing.path.as_path().into(),
                    claim: segment.index.map_or_else(|| kind.into(), |index| format!("{kind} {index}").into()),
                    missing,
                });
                if present > 0 {
                    left.push(segment.part(segment.first, segment.first + (present - 1)));
                }
                if segment.filled < segment.len {
                    left.push(segment.part(segment.first + segment.filled, segment.last()));
                }
            }
            self.segments = left;
        }
        self.truncated.sort_by_key(|cut| cut.missing.start);
    }

    /// What the segments and what is missing are together.
    fn named(&self) -> Vec<PhysRange> {
        let mut ranges = Vec::new();
        let mut absences = self.absences.iter().peekable();
        for segment in &self.segments {
            while let Some(absence) = absences.next_if(|absence| absence.range.start.0 < segment.first) {
                append(&mut ranges, absence.range);
            }
            append(&mut ranges, PhysRange { start: Phys(segment.first), len: segment.len });
        }
        absences.for_each(|absence| append(&mut ranges, absence.range));
        ranges
    }

    /// Refuses files that are little else than headers, and segments that name the same bytes of a file: reading each
    /// address once would read these again and again.
    fn check_count(&self, absences: usize) -> Result<()> {
        let room = self.room();
        let first = self.segments.first().map_or(0, |segment| segment.backing);
        let backing = |at: u32| &self.backings[at as usize];
        let count = (self.segments.len() + absences) as u64;
        if count > room.items() {
            let why = format!(
                "{count} runs of memory are more than the {} that {:#x} bytes of file can plausibly describe",
                room.items(),
                room.held()
            );
            return Err(backing(first).error(SourceProblem::Raw { why }));
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

    /// The value of a line of VMCOREINFO.
    pub fn vmcoreinfo_value(&self, name: &str) -> Option<&str> {
        let lines = self.vmcoreinfo()?.split(|&byte| byte == b'\n');
        let mut values = lines.filter_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
        std::str::from_utf8(values.next()?).ok().map(str::trim)
    }

    /// The page size that VMCOREINFO names.
    pub fn page_size(&self) -> Option<PageSize> {
        PageSize::new(self.vmcoreinfo_value("PAGESIZE")?.parse().ok()?).ok()
    }

    /// What the files should have had and do not, by address: reading there fails, [`PhysMemory::next_data`] skips it.
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
                "memory at {:#x} (+{n:#x}) would be at file offset {:#x}, but the file ends before that: it became \
                 shorter while it was read",
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
        backing.store.read_exact_at(segment.offset + skip, file).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => missing(),
            io::ErrorKind::InvalidData => {
                let phys = segment.first + skip;
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

    /// The index of the first segment that ends at or after `phys`.
    fn at_or_behind(&self, phys: Phys) -> usize {
        self.segments.partition_point(|s| s.last() < phys.0)
    }
}

impl PhysMemory for FileMemory {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        let wanted = buf.len() as u64;
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
        if rest.is_empty() {
            return Ok(());
        }
        let absent = if self.contains(phys, wanted) { self.absent(phys, wanted) } else { None };
        Err(absent.unwrap_or(Error::OutsideMemory { what: "read", phys: phys.0, len: wanted }))
    }

    fn absences(&self) -> &[Absence] {
        &self.absences
    }

    fn cuts(&self) -> &[Cut] {
        &self.truncated
    }

    fn dump_level(&self) -> Option<u32> {
        self.level
    }

    fn vmcoreinfo(&self) -> Option<&[u8]> {
        let note = self.notes().find(|note| note.name == b"VMCOREINFO");
        note.map(|note| note.desc).or(self.vmcoreinfo.as_deref())
    }

    fn absent(&self, phys: Phys, wanted: u64) -> Option<Error> {
        let Absence { range: PhysRange { start, len }, why } =
            absence::absences_in(&self.absences, phys, wanted).next()?;
        Some(match why {
            Absent::LeftOut => Error::LeftOut { phys: start.0, len, level: self.level },
            Absent::CutOff => {
                let after = self.truncated.partition_point(|cut| cut.missing.start <= start);
                let cut = after.checked_sub(1).and_then(|at| self.truncated.get(at));
                let claim = cut.map_or_else(String::new, |cut| format!("{}: {}: ", cut.path.display(), cut.claim));
                Error::CutOff { claim, phys: phys.0, len: wanted }
            }
        })
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
        let absent = absence::absences_in(&self.absences, phys, (last.0 - phys.0).saturating_add(1)).next();
        let last = absent.map_or(last, |absence| Phys(absence.range.start.0.saturating_sub(1)));
        let absent = absent.map(|absence| absence.range);
        if absent.is_some_and(|range| range.start == phys) {
            return Ok(absent);
        }
        let mut at = self.at_or_behind(phys);
        while let Some((index, segment)) = self.filled_from(at).filter(|(_, segment)| segment.first <= last.0) {
            at = index + 1;
            let backing = &self.backings[segment.backing as usize];
            let skip = phys.0.saturating_sub(segment.first);
            let present = segment.filled.min((last.0 - segment.first).saturating_add(1));
            if skip < present
                && let Some(run) = backing.store.to_read_in(segment.offset + skip..segment.offset + present)
            {
                return Ok(Some(segment.run(run)));
            }
        }
        Ok(absent)
    }
}

/// Adds a range after the others, which end where it begins or before. All 2^64 bytes have no length in 64 bits, so
/// that what would be as long stays two.
fn append(ranges: &mut Vec<PhysRange>, range: PhysRange) {
    if let Some(last) = ranges.last_mut()
        && last.start.0.checked_add(last.len) == Some(range.start.0)
        && let Some(len) = last.len.checked_add(range.len)
    {
        last.len = len;
    } else {
        ranges.push(range);
    }
}
