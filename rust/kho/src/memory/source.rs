//! Names of memory sources: a file whose content tells its format, or a raw image with an address or a machine.

#![forbid(unsafe_code)]

use crate::error::{Error, Result, SourceProblem};
use crate::sizes::parse_size;
use crate::units::Phys;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Where standard input is.
const STDIN: &str = "/dev/stdin";

/// A virtual machine, by where its memory file has which memory: the memory backend of QEMU
/// (`-object memory-backend-file,share=on`), the memory file of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Board {
    /// QEMU on x86, `-machine q35`.
    Q35,
    /// QEMU on x86, `-machine pc` (i440fx).
    Pc,
    /// QEMU on x86, `-machine microvm`.
    Microvm,
    /// QEMU on arm64, `-machine virt`.
    Virt,
    /// Firecracker on x86, with the gap of 768 MiB; crosvm and kvmtool have the same.
    Firecracker,
    /// Cloud Hypervisor on x86, and the Firecracker releases whose gap is 1 GiB.
    CloudHypervisor,
    /// Firecracker on arm64.
    FirecrackerArm64,
    /// Cloud Hypervisor on arm64.
    CloudHypervisorArm64,
}

impl Board {
    /// All boards.
    pub const ALL: [Board; 8] = [
        Board::Q35,
        Board::Pc,
        Board::Microvm,
        Board::Virt,
        Board::Firecracker,
        Board::CloudHypervisor,
        Board::FirecrackerArm64,
        Board::CloudHypervisorArm64,
    ];

    /// As QEMU's `-machine` names it, or the program's own name.
    pub const fn name(self) -> &'static str {
        match self {
            Board::Q35 => "q35",
            Board::Pc => "pc",
            Board::Microvm => "microvm",
            Board::Virt => "virt",
            Board::Firecracker => "firecracker",
            Board::CloudHypervisor => "cloud-hypervisor",
            Board::FirecrackerArm64 => "firecracker-arm64",
            Board::CloudHypervisorArm64 => "cloud-hypervisor-arm64",
        }
    }

    /// All names, for messages.
    pub fn names() -> String {
        Board::ALL.map(Board::name).join(", ")
    }

    /// Where RAM of `size` bytes begins, and the hole in it, if it reaches one: first address and first address after.
    ///
    /// On x86 RAM that does not fit below the PCI hole continues at 4 GiB. q35 (hw/i386/pc_q35.c) keeps all of it below
    /// up to 2.75 GiB, and 2 GiB if there is more; i440fx (hw/i386/pc_piix.c) up to 3.5 GiB, and 3 GiB if there is more;
    /// microvm 3.5 GiB (MICROVM_MAX_BELOW_4G, hw/i386/microvm.c). That is without `max-ram-below-4g`. With an AMD
    /// processor and RAM that would reach 0xfd00000000 QEMU 7.1 and later move what is above to 1 TiB
    /// (AMD_ABOVE_1TB_START, hw/i386/pc.c): `hole=2G:1T`. Firecracker keeps 3.25 GiB below its MMIO gap
    /// (MEM_32BIT_GAP_SIZE, src/arch/src/x86_64/layout.rs), later releases 3 GiB (MMIO32_MEM_START, PCI support), as
    /// Cloud Hypervisor does (MEM_32BIT_RESERVED_START, arch/src/x86_64/layout.rs). On arm64 RAM begins at 1 GiB (QEMU,
    /// Cloud Hypervisor, whose RAM skips the last 64 MiB below 4 GiB) or 2 GiB (Firecracker, DRAM_MEM_START).
    pub fn ram(self, size: u64) -> (u64, Option<(u64, u64)>) {
        const ABOVE: u64 = 1 << 32;
        let hole = |low: u64, most: u64| (size > most).then_some((low, ABOVE));
        match self {
            Board::Q35 => (0, hole(0x8000_0000, 0xb000_0000 - 1)),
            Board::Pc => (0, hole(0xc000_0000, 0xe000_0000 - 1)),
            Board::Microvm => (0, hole(0xe000_0000, 0xe000_0000)),
            Board::Firecracker => (0, hole(0xd000_0000, 0xd000_0000)),
            Board::CloudHypervisor => (0, hole(0xc000_0000, 0xc000_0000)),
            Board::Virt => (0x4000_0000, None),
            Board::FirecrackerArm64 => (0x8000_0000, None),
            Board::CloudHypervisorArm64 => (0x4000_0000, hole(0xfc00_0000, 0xbc00_0000)),
        }
    }
}

/// Where `size` bytes are that begin at `base` and leave out `hole`: (address, offset, bytes), by offset.
pub(crate) fn runs(base: u64, hole: Option<(u64, u64)>, size: u64) -> Vec<(u64, u64, u64)> {
    match hole.map(|(start, end)| (start.saturating_sub(base), end)) {
        Some((low, above)) if low < size => vec![(base, 0, low), (above, low, size - low)],
        _ => vec![(base, 0, size)],
    }
}

/// A file to read memory from. With an address it is a raw image of the memory there, with a machine the memory backend
/// of that machine. With neither its content says what it is: an ELF core, a kdump file, flattened or not, LiME, one of
/// these packed, a format that holds no memory and is refused by name, and anything else a raw image of the memory at 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// The address of the first byte of a raw image, if it was given.
    pub base: Option<Phys>,
    /// Where in a raw image to begin, in bytes.
    pub offset: u64,
    /// How many bytes of a raw image; all after `offset` if not given.
    pub size: Option<u64>,
    /// Whose memory backend this is; then there is no `base`, `offset` or `size`.
    pub board: Option<Board>,
    /// Addresses that a raw image leaves out: the first, and the first after, where its next byte lies.
    pub hole: Option<(Phys, Phys)>,
    /// Whether the address may be wrong: a handover that is not whole there is looked for at others.
    pub check: bool,
}

impl Source {
    /// A file without an address.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Source { path: path.into(), base: None, offset: 0, size: None, board: None, hole: None, check: true }
    }

    /// Reads `FILE`, `FILE@ADDRESS`, `FILE@ADDRESS,offset=N,size=N,hole=START:END,check=no` or
    /// `FILE,machine=NAME,check=no` ([`Board`]); numbers are those of [`parse_size`]. A text that is an existing path is
    /// that path, so that names with an @ work; `-` for FILE is standard input.
    ///
    /// # Errors
    /// [`SourceProblem::Address`] when what follows the last @ is none, [`SourceProblem::Machine`] for another machine.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<Self> {
        let text = text.as_ref();
        const MACHINE: &[u8] = b",machine=";
        let bytes = text.as_bytes();
        let at = bytes.iter().rposition(|&c| c == b'@');
        let machine = memchr::memmem::rfind(bytes, MACHINE).filter(|&m| at.is_none_or(|at| at < m));
        if bytes == b"-" {
            return Ok(Source::file(STDIN));
        }
        if at.is_none() && machine.is_none() || Path::new(text).symlink_metadata().is_ok() {
            return Ok(Source::file(text));
        }
        let named = |path: &[u8]| Source::file(if path == b"-" { OsStr::new(STDIN) } else { OsStr::from_bytes(path) });
        if let Some(end) = machine {
            let (path, name) = (&bytes[..end], &bytes[end + MACHINE.len()..]);
            let (name, check) = name.strip_suffix(b",check=no").map_or((name, true), |name| (name, false));
            let board = Board::ALL.into_iter().find(|board| board.name().as_bytes() == name && end > 0);
            let Some(board) = board else {
                let problem =
                    SourceProblem::Machine { name: String::from_utf8_lossy(name).into_owned(), known: Board::names() };
                return Err(Error::Source { path: PathBuf::from(text), problem });
            };
            return Ok(Source { board: Some(board), check, ..named(path) });
        }
        let at = at.unwrap_or(0);
        let (path, place) = (&bytes[..at], &bytes[at + 1..]);
        let place = String::from_utf8_lossy(place);
        let mut source = named(path);
        let mut understood = !path.is_empty();
        let mut why = None;
        for (i, field) in place.split(',').enumerate() {
            let (name, number) = match field.split_once('=') {
                Some(named) if i > 0 => named,
                _ => ("base", field),
            };
            match (i, name, parse_size(number)) {
                (0, "base", Ok(n)) => source.base = Some(Phys(n)),
                (1.., "offset", Ok(n)) => source.offset = n,
                (1.., "size", Ok(n)) => source.size = Some(n),
                (1.., "hole", Err(_)) => {
                    let ends = number.split_once(':');
                    source.hole = ends
                        .and_then(|(start, end)| Some((parse_size(start).ok()?, parse_size(end).ok()?)))
                        .map(|(start, end)| (Phys(start), Phys(end)));
                    let base = source.base.unwrap_or_default();
                    understood &= source.hole.is_some_and(|(start, end)| base < start && start < end);
                }
                (1.., "check", Err(_)) if number == "no" => source.check = false,
                (0, "base", Err(error)) | (1.., "offset" | "size", Err(error)) => {
                    why.get_or_insert((field.to_owned(), error.rule));
                    understood = false;
                }
                _ => understood = false,
            }
        }
        if !understood {
            return Err(Error::Source {
                path: PathBuf::from(text),
                problem: SourceProblem::Address { why, text: place.into_owned() },
            });
        }
        Ok(source)
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
            if let Some((start, end)) = self.hole {
                write!(f, ",hole={start}:{end}")?;
            }
        }
        if !self.check {
            f.write_str(",check=no")?;
        }
        Ok(())
    }
}
