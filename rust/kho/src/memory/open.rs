//! Opens sources: recognizes the format of each file and calls its reader.

#![forbid(unsafe_code)]

use super::backing::{Backing, Segment};
use super::file::FileMemory;
use super::format::foreign::{self, Packing};
use super::format::{elf, flat, kdump, lime};
use super::part::Part;
use super::source::{Source, runs};
use super::unpack::{self, Work};
use crate::error::{Error, Result, SourceProblem};
use crate::units::Phys;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of a file that say how it is packed, with a short skippable frame before.
const PACKING: usize = 4096;

/// Opens sources together, as one memory.
///
/// # Errors
/// [`Error::Source`] for one that cannot be used, or has memory another one has; [`Error::Invalid`] for none at all.
pub fn open_sources(sources: &[Source]) -> Result<FileMemory> {
    open_sources_with(sources, None, &mut |_| Ok(()))
}

/// As [`open_sources`], for packed files and streams that may come to `limit` bytes (if not given, as many as the
/// environment's [`LIMIT_VARIABLE`](unpack::LIMIT_VARIABLE), or else 2 GiB or 128 times the packed size, of bzip2 and xz
/// 512 MiB or 64 times); `told` is called with the number of bytes that are unpacked.
///
/// # Errors
/// As [`open_sources`]; what `told` gives.
pub fn open_sources_with(
    sources: &[Source],
    limit: Option<u64>,
    told: &mut (dyn FnMut(u64) -> Result<()> + Send),
) -> Result<FileMemory> {
    if sources.is_empty() {
        return Err(Error::Invalid { what: "sources", why: "none given".into() });
    }
    let work = Work::new(limit, told)?;
    let parts: Result<Vec<_>> = sources.iter().cloned().map(|source| source.open(&work)).collect();
    FileMemory::new(parts?)
}

/// Opens an ELF core: little-endian, 64-bit, ET_CORE; by physical address. A core that is cut short opens if its
/// headers are there, see [`FileMemory::truncated`].
///
/// # Errors
/// [`Error::Source`] with what is wrong with it.
pub fn open_elf(path: impl AsRef<Path>) -> Result<FileMemory> {
    let path = path.as_ref();
    let told = &mut |_| Ok(());
    let backing = Backing::open(path, &Work::new(None, told)?)?;
    FileMemory::new(vec![Source::file(path).elf_part(backing)?])
}

/// Opens `size` bytes (all, if not given) from `offset` of a raw image as the memory at `base`.
///
/// # Errors
/// [`Error::Source`] with what is wrong with it.
pub fn open_raw(path: impl AsRef<Path>, base: Phys, offset: u64, size: Option<u64>) -> Result<FileMemory> {
    open_sources(&[Source { base: Some(base), offset, size, ..Source::file(path.as_ref()) }])
}

impl FileMemory {
    /// A file's content that is at hand already, as [`Source::file`] would open it; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Source`] with what is wrong with it.
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self> {
        let source = Source::file(name);
        let size = bytes.len() as u64;
        let backing = Backing { path: source.path.clone(), size, held: size, store: Box::new(bytes) };
        if backing.size == 0 {
            return Err(backing.error(SourceProblem::Empty));
        }
        let told = &mut |_| Ok(());
        FileMemory::new(vec![source.part(backing, &Work::new(None, told)?)?])
    }
}

impl Source {
    fn open(self, work: &Work<'_>) -> Result<Part> {
        let backing = Backing::open(&self.path, work)?;
        self.part(backing, work)
    }

    fn part(self, mut backing: Backing, work: &Work<'_>) -> Result<Part> {
        let raw = self.board.is_some() || self.base.is_some();
        // A file that is said to be raw memory is packed only if its name says so, too: memory may hold anything.
        if let Some(packing) = Packing::of(&backing.head(PACKING)?)
            && (!raw || packing.names(self.path.as_os_str().as_bytes()))
        {
            backing = unpack::unpack(backing, packing, work)?;
        }
        if raw {
            return self.raw_part(backing);
        }
        if flat::is_flat(&backing) {
            backing = flat::unflatten(backing)?;
            if !kdump::is_kdump(&backing) && !elf::is_elf(&backing) {
                let why = match backing.head(1)?.is_empty() {
                    true => "the flattened file is cut off: what it begins with is in the part that is missing".into(),
                    false => "the flattened file is neither kdump nor ELF".into(),
                };
                return Err(backing.error(SourceProblem::Dump { why }));
            }
        }
        if elf::is_elf(&backing) {
            self.elf_part(backing)
        } else if kdump::is_kdump(&backing) {
            kdump::open(self, backing)
        } else if lime::is_lime(&backing) {
            let (segments, cuts) = lime::parse(&backing)?;
            Ok(Part { kind: lime::RANGE, cuts, ..Part::new(self, backing, segments) })
        } else if let Some(found) = foreign::recognize(&backing.head(foreign::HEAD)?) {
            let problem = SourceProblem::Foreign { what: found.what.into_owned(), remedy: found.remedy };
            Err(backing.error(problem))
        } else {
            self.raw_part(backing)
        }
    }

    fn elf_part(self, backing: Backing) -> Result<Part> {
        let core = elf::parse(&backing)?;
        let part = Part::new(self, backing, core.segments);
        Ok(Part {
            kind: elf::SEGMENT,
            machine: Some(core.machine),
            notes: core.notes,
            absences: core.absences,
            level: core.level,
            ..part
        })
    }

    fn raw_part(self, backing: Backing) -> Result<Part> {
        let raw = |why| backing.error(SourceProblem::Raw { why });
        let have = backing.size;
        let left = have
            .checked_sub(self.offset)
            .filter(|&left| left > 0)
            .ok_or_else(|| raw(format!("offset {:#x} is not inside its {have:#x} bytes", self.offset)))?;
        let len = self.size.unwrap_or(left);
        if len == 0 || len > left {
            return Err(raw(format!(
                "size {len:#x} is not between 1 and the {left:#x} bytes at offset {:#x}",
                self.offset
            )));
        }
        let (base, hole) = match self.board {
            Some(board) => board.ram(len),
            None => (self.base.unwrap_or_default().0, self.hole.map(|(start, end)| (start.0, end.0))),
        };
        let mut segments = Vec::new();
        for (first, skip, len) in runs(base, hole, len) {
            if first.checked_add(len - 1).is_none() {
                return Err(raw(format!("{len:#x} bytes at address {first:#x} run past the address space")));
            }
            segments.push(Segment { first, len, offset: self.offset + skip, filled: len, index: None, backing: 0 });
        }
        Ok(Part { raw: true, ..Part::new(self, backing, segments) })
    }
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
