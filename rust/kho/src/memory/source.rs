//! What a user may name as a source of memory: an ELF core, a dump, a raw image with an address, several of them together.

#![forbid(unsafe_code)]

use super::file::{Backing, FileMemory, Part, Segment};
use super::{elf, flat, kdump, lime};
use crate::error::{Error, Result, SourceProblem};
use crate::units::Phys;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A machine of QEMU's, by where its memory backend (`-object memory-backend-file,share=on`) has which memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Board {
    /// x86, `-machine q35`.
    Q35,
    /// x86, `-machine pc` (i440fx).
    Pc,
    /// arm64, `-machine virt`.
    Virt,
}

impl Board {
    const ALL: [Board; 3] = [Board::Q35, Board::Pc, Board::Virt];

    /// As QEMU's `-machine` names it.
    pub const fn name(self) -> &'static str {
        match self {
            Board::Q35 => "q35",
            Board::Pc => "pc",
            Board::Virt => "virt",
        }
    }

    /// Where `size` bytes of RAM are: (address, offset in the backend, bytes), by offset.
    ///
    /// On x86 what does not fit below the PCI hole starts at 4 GiB. q35 (hw/i386/pc_q35.c) has everything below up to
    /// 2.75 GiB and 2 GiB if there is more; i440fx (hw/i386/pc_piix.c) up to 3.5 GiB and 3 GiB if there is more. That
    /// is without `max-ram-below-4g`, and with less than the 1 TiB or so that moves it all up on AMD.
    fn runs(self, size: u64) -> Vec<(u64, u64, u64)> {
        const ABOVE: u64 = 1 << 32;
        let (from, low) = match self {
            Board::Q35 if size >= 0xb000_0000 => (0, 0x8000_0000),
            Board::Pc if size >= 0xe000_0000 => (0, 0xc000_0000),
            Board::Q35 | Board::Pc => (0, size),
            Board::Virt => (0x4000_0000, size),
        };
        let mut runs = vec![(from, 0, low)];
        if size > low {
            runs.push((ABOVE, low, size - low));
        }
        runs
    }
}

/// A file to read memory from. With an address it is a raw image of the memory there, with a machine the memory backend
/// of that machine. With neither its content says what it is: an ELF core, a kdump file, flattened or not, LiME, and
/// anything else a raw image of the memory at 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    pub path: PathBuf,
    pub base: Option<Phys>,
    /// Where in a raw image to begin, in bytes.
    pub offset: u64,
    /// How many bytes of a raw image; all behind `offset` if not given.
    pub size: Option<u64>,
    /// Whose memory backend this is; then there is no `base`, `offset` or `size`.
    pub board: Option<Board>,
}

impl Source {
    /// A file without an address.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Source { path: path.into(), base: None, offset: 0, size: None, board: None }
    }

    /// Reads `FILE`, `FILE@ADDRESS`, `FILE@ADDRESS,offset=N,size=N` or `FILE,machine=q35|pc|virt`; numbers are decimal
    /// or 0x, with a suffix K, M, G or T. A text that is an existing path is that path, so that names with an @ work.
    ///
    /// # Errors
    /// [`SourceProblem::Address`] when what follows the last @ is none, [`SourceProblem::Machine`] for another machine.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<Self> {
        let text = text.as_ref();
        const MACHINE: &[u8] = b",machine=";
        let bytes = text.as_bytes();
        let at = bytes.iter().rposition(|&c| c == b'@');
        let machine = memchr::memmem::rfind(bytes, MACHINE).filter(|&m| at.is_none_or(|at| at < m));
        if at.is_none() && machine.is_none() || Path::new(text).symlink_metadata().is_ok() {
            return Ok(Source::file(text));
        }
        if let Some(end) = machine {
            let (path, name) = (&bytes[..end], &bytes[end + MACHINE.len()..]);
            let board = Board::ALL.into_iter().find(|board| board.name().as_bytes() == name && end > 0);
            let Some(board) = board else {
                let problem = SourceProblem::Machine { name: String::from_utf8_lossy(name).into_owned() };
                return Err(Error::Source { path: PathBuf::from(text), problem });
            };
            return Ok(Source { board: Some(board), ..Source::file(OsStr::from_bytes(path)) });
        }
        let at = at.unwrap_or(0);
        let (path, place) = (&bytes[..at], &bytes[at + 1..]);
        let place = String::from_utf8_lossy(place);
        let mut source = Source::file(OsStr::from_bytes(path));
        let mut understood = !path.is_empty();
        for (i, field) in place.split(',').enumerate() {
            let (name, number) = match field.split_once('=') {
                Some(named) if i > 0 => named,
                _ => ("base", field),
            };
            match (i, name, parse_number(number)) {
                (0, "base", Some(n)) => source.base = Some(Phys(n)),
                (1.., "offset", Some(n)) => source.offset = n,
                (1.., "size", Some(n)) => source.size = Some(n),
                _ => understood = false,
            }
        }
        if !understood {
            return Err(Error::Source {
                path: PathBuf::from(text),
                problem: SourceProblem::Address { text: place.into_owned() },
            });
        }
        Ok(source)
    }

    fn open(self) -> Result<Part> {
        let backing = Backing::open(&self.path)?;
        self.part(backing)
    }

    fn part(self, mut backing: Backing) -> Result<Part> {
        if self.board.is_some() || self.base.is_some() {
            return self.raw_part(backing);
        }
        if flat::is_flat(&backing) {
            backing = flat::unflatten(backing)?;
            if !kdump::is_kdump(&backing) && !elf::is_elf(&backing) {
                let why = "the flattened file is neither kdump nor ELF".into();
                return Err(backing.error(SourceProblem::Dump { why }));
            }
        }
        if elf::is_elf(&backing) {
            self.elf_part(backing)
        } else if kdump::is_kdump(&backing) {
            kdump::open(self, backing)
        } else if lime::is_lime(&backing) {
            let segments = lime::parse(&backing)?;
            Ok(Part { kind: lime::RANGE, ..Part::new(self, backing, segments) })
        } else {
            self.raw_part(backing)
        }
    }

    fn elf_part(self, backing: Backing) -> Result<Part> {
        let core = elf::parse(&backing)?;
        let part = Part::new(self, backing, core.segments);
        Ok(Part { kind: elf::SEGMENT, machine: Some(core.machine), notes: core.notes, ..part })
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
        let runs = match self.board {
            Some(board) => board.runs(len),
            None => vec![(self.base.unwrap_or_default().0, 0, len)],
        };
        let mut segments = Vec::new();
        for (first, skip, len) in runs {
            if first.checked_add(len - 1).is_none() {
                return Err(raw(format!("{len:#x} bytes at address {first:#x} run past the address space")));
            }
            segments.push(Segment { first, len, offset: self.offset + skip, filled: len, index: None, backing: 0 });
        }
        Ok(Part::new(self, backing, segments))
    }
}

impl fmt::Display for Source {
    /// As [`Source::parse`] reads it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(board) = self.board {
            write!(f, ",machine={}", board.name())?;
        }
        if let Some(base) = self.base {
            write!(f, "@{base}")?;
            if self.offset > 0 {
                write!(f, ",offset={:#x}", self.offset)?;
            }
            if let Some(size) = self.size {
                write!(f, ",size={size:#x}")?;
            }
        }
        Ok(())
    }
}

/// A number, decimal or 0x, with one suffix K, M, G or T in either case; none if it is no such or beyond 64 bits.
pub fn parse_number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let (digits, base) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (digits, 10),
    };
    // Which would take a sign.
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, base).ok()?.checked_mul(1 << shift)
}

/// Opens sources together, as one memory.
///
/// # Errors
/// [`Error::Source`] for one that cannot be used, or has memory another one has; [`Error::Invalid`] for none at all.
pub fn open_sources(sources: &[Source]) -> Result<FileMemory> {
    if sources.is_empty() {
        return Err(Error::Invalid { what: "sources", why: "none given".into() });
    }
    let parts: Result<Vec<_>> = sources.iter().cloned().map(Source::open).collect();
    FileMemory::new(parts?)
}

/// Opens an ELF core: little-endian, 64-bit, ET_CORE; by physical address. A core that is cut short opens if its
/// headers are there, see [`FileMemory::truncated`].
///
/// # Errors
/// [`Error::Source`] with what is wrong with it.
pub fn open_elf(path: impl AsRef<Path>) -> Result<FileMemory> {
    let path = path.as_ref();
    let backing = Backing::open(path)?;
    FileMemory::new(vec![Source::file(path).elf_part(backing)?])
}

/// Opens `size` bytes (all, if not given) from `offset` of a raw image as the memory at `base`.
///
/// # Errors
/// [`Error::Source`] with what is wrong with it.
pub fn open_raw(path: impl AsRef<Path>, base: Phys, offset: u64, size: Option<u64>) -> Result<FileMemory> {
    open_sources(&[Source { path: path.as_ref().to_path_buf(), base: Some(base), offset, size, board: None }])
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
        FileMemory::new(vec![source.part(backing)?])
    }
}
