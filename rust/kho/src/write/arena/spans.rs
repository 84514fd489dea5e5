//! The bytes of an arena: mappings of spans of physical memory.

#![forbid(unsafe_code)]

use super::header::{self, SPAN_ALIGN};
use super::regions::{Layout, check_areas, check_regions, layout};
use crate::error::{Error, Result};
use crate::mapping::{Items, Mapping};
use crate::memory::{PhysMemory, PhysRange, data_in};
use crate::read::arena_note::{ArenaNote, Recorded};
use crate::units::Phys;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use zerocopy::IntoBytes;

/// Where an arena's bytes live.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Private memory of this process.
    Anonymous,
    /// A sealed memory file that can be passed to another process.
    Memfd,
    /// A new file at this path.
    File(PathBuf),
}

/// A maximal run of adjacent regions, mapped in one piece.
#[derive(Debug)]
struct Span {
    phys: u64,
    /// Where in the file, if there is one.
    offset: u64,
    map: Mapping,
}

#[derive(Debug)]
pub(super) struct Spans {
    spans: Vec<Span>,
    ranges: Vec<PhysRange>,
    file: Option<Backed>,
    /// Whether the file is on a file system that may be full when a page is touched.
    limited: bool,
}

/// The file that the spans map.
#[derive(Debug)]
struct Backed {
    file: File,
    /// Where [`Recorded`] lies in it.
    recorded_at: u64,
    /// How long it must be for every page of a span to be in it.
    need: u64,
    /// It can never shrink (F_SEAL_SHRINK). Any other file can, at any time, and a mapped page that it lost kills the process
    /// that touches it (SIGBUS). So the library reads and writes such a file by system calls, which fail instead.
    sealed: bool,
}

/// The head with offsets as they will be: its size decides where the spans begin.
fn head_of(note: &ArenaNote) -> Result<(Vec<u8>, Layout)> {
    let head = note.to_elf(&layout(&note.regions, 0)?)?;
    let spans = layout(&note.regions, (head.len() as u64).next_multiple_of(SPAN_ALIGN))?;
    Ok((note.to_elf(&spans)?, spans))
}

impl Spans {
    /// New, zeroed memory as `note` describes it.
    pub(super) fn create(note: &ArenaNote, backing: &Backing) -> Result<Self> {
        let file = match backing {
            Backing::Anonymous => return Self::map(&layout(&note.regions, 0)?, None),
            Backing::Memfd => memfd::create()?,
            Backing::File(path) => new_file(path)?,
        };
        let (head, spans) = head_of(note)?;
        let len = end_of(&spans);
        let whole = |e: std::io::Error| Error::io(format!("reserve a file of {len:#x} bytes"), e);
        file.set_len(len).map_err(whole)?;
        file.write_all_at(&head, 0).map_err(whole)?;
        if matches!(backing, Backing::Memfd) {
            memfd::seal(&file)?;
        }
        let recorded_at = header::recorded_offset(&head, header::desc_len(note));
        let sealed = matches!(backing, Backing::Memfd);
        Self::map(&spans, Some(Backed { file, recorded_at, need: len, sealed }))
    }

    /// The memory of an arena that another process made.
    ///
    /// # Errors
    /// [`Error::Unsealed`] for a memory file that can shrink; [`Error::Invalid`]; [`Error::Io`].
    pub(super) fn open(file: File) -> Result<(Self, ArenaNote)> {
        let metadata = file.metadata().map_err(|e| Error::io("stat the arena's file", e))?;
        // Only memory files have seals. One without a name came by a descriptor, from a process that could cut it.
        let seals = memfd::seals(&file);
        let sealed = seals.is_some_and(|(_, shrink)| shrink);
        if let (Some((seals, _)), false, 0) = (seals, sealed, metadata.nlink()) {
            return Err(Error::Unsealed { seals });
        }
        let len = metadata.len();
        let mut head = vec![0; usize::try_from(len.min(SPAN_ALIGN)).unwrap_or(0)];
        file.read_exact_at(&mut head, 0).map_err(|e| Error::io("read the arena's header", e))?;
        let note = ArenaNote::from_elf(&head)?;
        check_regions(&note.regions, note.page)?;
        check_areas(&note.regions, &note.scratch)?;
        let (head, spans) = head_of(&note)?;
        let need = end_of(&spans);
        if need > len {
            return Err(Error::Invalid {
                what: "arena file",
                why: format!("{len:#x} bytes long; its regions need {need:#x}"),
            });
        }
        let recorded_at = header::recorded_offset(&head, header::desc_len(&note));
        Ok((Self::map(&spans, Some(Backed { file, recorded_at, need, sealed }))?, note))
    }

    fn map(layout: &[(u64, u64, u64)], file: Option<Backed>) -> Result<Self> {
        let spans = layout.iter().map(|&(phys, len, offset)| {
            let map = match &file {
                None => Mapping::anonymous(len),
                Some(backed) => Mapping::shared(&backed.file, offset, len),
            };
            Ok(Span { phys, offset, map: map? })
        });
        let spans = spans.collect::<Result<Vec<_>>>()?;
        let ranges = layout.iter().map(|s| PhysRange { start: Phys(s.0), len: s.1 }).collect();
        let limited = file.as_ref().is_some_and(|backed| backed.file.metadata().is_ok_and(|file| file.nlink() > 0));
        Ok(Spans { spans, ranges, file, limited })
    }

    fn span_of(&self, phys: u64) -> Option<&Span> {
        let after = self.spans.partition_point(|s| s.phys <= phys);
        self.spans[..after].last()
    }

    /// `len` bytes of physical memory as items.
    pub(super) fn items<T: IntoBytes>(&self, phys: Phys, len: u64) -> Option<Items<'_, T>> {
        let span = self.span_of(phys.0)?;
        span.map.items(phys.0 - span.phys, len)
    }

    /// Where `len` bytes of physical memory are in this process.
    pub(super) fn ptr(&self, phys: Phys, len: u64) -> Option<NonNull<u8>> {
        let span = self.span_of(phys.0)?;
        span.map.ptr(phys.0 - span.phys, len)
    }

    /// The physical address of an address that [`Spans::ptr`] gave out.
    pub(super) fn phys_of(&self, ptr: NonNull<u8>) -> Option<Phys> {
        self.spans.iter().find_map(|s| s.map.offset_of(ptr).map(|offset| Phys(s.phys + offset)))
    }

    /// The span an address is in: its pointers, and the physical address of the first.
    pub(super) fn stretch_of(&self, ptr: NonNull<u8>) -> Option<(Range<usize>, Phys)> {
        self.spans.iter().find_map(|s| {
            let start = ptr.addr().get() - usize::try_from(s.map.offset_of(ptr)?).ok()?;
            Some((start..start + usize::try_from(s.map.len()).ok()?, Phys(s.phys)))
        })
    }

    /// The file of an arena whose file can shrink.
    fn unsealed(&self) -> Option<&Backed> {
        self.file.as_ref().filter(|backed| !backed.sealed)
    }

    /// Whether every page of a span stays mapped whatever another process does.
    pub(super) fn is_sealed(&self) -> bool {
        self.unsealed().is_none()
    }

    /// Refuses to go on in a file that has become shorter than its spans.
    pub(super) fn check_whole(&self) -> Result<()> {
        self.unsealed().map_or(Ok(()), Backed::check_whole)
    }

    /// Where `len` bytes of physical memory lie in the file.
    fn offset_of(&self, what: &'static str, phys: Phys, len: u64) -> Result<u64> {
        let span = self.span_of(phys.0).filter(|s| s.map.ptr(phys.0 - s.phys, len).is_some());
        span.map(|s| s.offset + (phys.0 - s.phys)).ok_or_else(|| outside(what, phys, len))
    }

    pub(super) fn write(&self, phys: Phys, bytes: &[u8]) -> Result<()> {
        if let Some(backed) = self.unsealed() {
            return backed.write(self.offset_of("write", phys, bytes.len() as u64)?, bytes);
        }
        let written = self.span_of(phys.0).is_some_and(|s| s.map.write(phys.0 - s.phys, bytes));
        if written { Ok(()) } else { Err(outside("write", phys, bytes.len() as u64)) }
    }

    pub(super) fn zero(&self, phys: Phys, len: u64) -> Result<()> {
        if let Some(backed) = self.unsealed() {
            static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
            let offset = self.offset_of("zero", phys, len)?;
            return (0..len).step_by(ZEROS.len()).try_for_each(|at| {
                let n = (len - at).min(ZEROS.len() as u64) as usize;
                backed.write(offset + at, &ZEROS[..n])
            });
        }
        let done = self.span_of(phys.0).is_some_and(|s| s.map.zero(phys.0 - s.phys, len));
        if done { Ok(()) } else { Err(outside("zero", phys, len)) }
    }

    /// Records what the handover says of itself, for the process that opens the file next.
    pub(super) fn record(&self, handover: Recorded) -> Result<()> {
        match &self.file {
            None => Ok(()),
            Some(backed) => (backed.file)
                .write_all_at(&handover.encode(), backed.recorded_at)
                .map_err(|e| Error::io("record the FDT's address in the arena's header", e)),
        }
    }

    /// Memory of a file is allocated when it is touched, where it is not Linux: there only private memory has no such limit.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn back(&self, _phys: Phys, _len: u64) -> Result<()> {
        let _ = self.limited;
        Ok(())
    }

    /// Allocates the file's blocks for memory that is about to be handed out: touching a page for which the file system has
    /// none kills the process (SIGBUS). Private memory and memfds are limited by the machine alone.
    ///
    /// # Errors
    /// [`Error::Io`], of kind `StorageFull`. File systems that cannot allocate (EOPNOTSUPP) are not asked again.
    #[cfg(target_os = "linux")]
    pub(super) fn back(&self, phys: Phys, len: u64) -> Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        let Some((fd, span)) = self.fd().zip(self.span_of(phys.0)).filter(|_| self.limited) else { return Ok(()) };
        let offset = span.offset + (phys.0 - span.phys);
        match rustix::io::retry_on_intr(|| fallocate(fd, FallocateFlags::KEEP_SIZE, offset, len)) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(e) => Err(Error::io(format!("the arena's file: {len:#x} bytes for memory at {phys}"), e)),
        }
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|backed| backed.file.as_fd())
    }
}

impl Backed {
    fn check_whole(&self) -> Result<()> {
        let have = self.file.metadata().map_err(|e| Error::io("stat the arena's file", e))?.len();
        if have < self.need { Err(Error::Cut { have, need: self.need }) } else { Ok(()) }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, offset).or_else(|e| {
            self.check_whole()?;
            Err(Error::io("read the arena's file", e))
        })
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        // A write after the end would make the file longer again, with zeros for what was cut.
        self.check_whole()?;
        self.file.write_all_at(bytes, offset).map_err(|e| Error::io("write to the arena's file", e))
    }
}

/// Where the last span ends in the file.
fn end_of(spans: &Layout) -> u64 {
    spans.last().map_or(0, |s| s.2 + s.1)
}

impl PhysMemory for Spans {
    fn ranges(&self) -> &[PhysRange] {
        &self.ranges
    }

    fn read(&self, phys: Phys, buf: &mut [u8]) -> Result<()> {
        if let Some(backed) = self.unsealed() {
            return backed.read(self.offset_of("read", phys, buf.len() as u64)?, buf);
        }
        let read = self.span_of(phys.0).is_some_and(|s| s.map.read(phys.0 - s.phys, buf));
        if read { Ok(()) } else { Err(outside("read", phys, buf.len() as u64)) }
    }

    fn next_data(&self, phys: Phys) -> Result<Option<PhysRange>> {
        Ok(self.ranges.iter().find_map(|r| {
            let skip = phys.0.saturating_sub(r.start.0);
            (skip < r.len).then(|| PhysRange { start: Phys(r.start.0 + skip), len: r.len - skip })
        }))
    }

    fn next_to_search(&self, phys: Phys) -> Result<Option<PhysRange>> {
        let Some(Backed { file, .. }) = &self.file else { return self.next_data(phys) };
        Ok(self.spans.iter().find_map(|span| {
            let skip = phys.0.saturating_sub(span.phys);
            let rest = span.offset.checked_add(skip)?..span.offset + span.map.len();
            let run = data_in(file, rest).filter(|run| !run.is_empty())?;
            Some(PhysRange { start: Phys(span.phys + (run.start - span.offset)), len: run.end - run.start })
        }))
    }
}

fn outside(what: &'static str, phys: Phys, len: u64) -> Error {
    Error::OutsideMemory { what, phys: phys.0, len }
}

/// Memory files, which only Linux has.
#[cfg(target_os = "linux")]
mod memfd {
    use crate::error::{Error, Result};
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
    use std::fs::File;

    pub(super) fn create() -> Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        Ok(File::from(memfd_create("kho-arena", flags).map_err(|e| Error::io("memfd_create", e))?))
    }

    pub(super) fn seal(file: &File) -> Result<()> {
        fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW).map_err(|e| Error::io("seal the memfd", e))
    }

    /// The seals of a memory file, and whether it cannot shrink; None for another file.
    pub(super) fn seals(file: &File) -> Option<(u32, bool)> {
        fcntl_get_seals(file).ok().map(|seals| (seals.bits(), seals.contains(SealFlags::SHRINK)))
    }
}

#[cfg(not(target_os = "linux"))]
mod memfd {
    use crate::error::{Error, Result};
    use std::fs::File;

    pub(super) fn create() -> Result<File> {
        Err(Error::Invalid { what: "backing", why: "memory files are of Linux only; name a file".to_owned() })
    }

    pub(super) fn seal(_file: &File) -> Result<()> {
        Ok(())
    }

    pub(super) fn seals(_file: &File) -> Option<(u32, bool)> {
        None
    }
}

fn new_file(path: &Path) -> Result<File> {
    let options = File::options().read(true).write(true).create_new(true).open(path);
    options.map_err(|e| Error::io(format!("create the arena's file {}", path.display()), e))
}

/// A file from a descriptor that stays the caller's.
pub(super) fn duplicate(fd: BorrowedFd<'_>) -> Result<File> {
    let fd: OwnedFd = fd.try_clone_to_owned().map_err(|e| Error::io("duplicate the arena's descriptor", e))?;
    Ok(File::from(fd))
}
