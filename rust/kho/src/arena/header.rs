//! The head of an arena's file: an ELF core header, so that any tool that reads ELF cores reads an arena.
//!
//! ```text
//! 0        ELF header, program headers (one PT_LOAD a span, p_paddr = physical address), one PT_NOTE
//! ...      note "kho", type 1: struct Note, then the regions, then the scratch areas
//! 4 KiB    where `kho.live` made the file: its superblock, slots and journal (python/kho/live/file/header.py), else holes
//! 2 MiB    the spans, one behind the other, each on a 2 MiB boundary
//! ```

#![forbid(unsafe_code)]

use super::{Region, ScratchArea};
use crate::error::{Error, Result};
use crate::units::{Order, PageSize, Phys};
use object::elf;
use object::endian::LittleEndian as LE;
use object::read::elf::{FileHeader, ProgramHeader};
use object::write::elf::Writer;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Where spans begin, and what their places are rounded to: a huge page.
pub(super) const SPAN_ALIGN: u64 = 2 << 20;

/// The note's type under the name `kho`.
pub const NOTE_TYPE: u32 = 1;
/// The note's owner.
pub const NOTE_NAME: &[u8] = b"kho";
const VERSION: u32 = 1;

/// What the note says of the arena as a whole.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
struct Note {
    version: U32,
    page_shift: U32,
    max_order: U32,
    nr_regions: U32,
    nr_scratch: U32,
    /// kho-v1: bytes of a bitmap, which the format itself does not tell; else 0.
    bitmap_bytes: U32,
    /// The handover's FDT, 0 while there is none: what `setup_data` or `/chosen` tell a kernel.
    fdt_phys: U64,
    /// The scratch array, 0 without one.
    scratch_phys: U64,
}
const _: () = assert!(size_of::<Note>() == 40);

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
struct NoteRegion {
    start: U64,
    len: U64,
    node: U64,
}
const _: () = assert!(size_of::<NoteRegion>() == 24);

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
struct NoteScratch {
    addr: U64,
    size: U64,
}
const _: () = assert!(size_of::<NoteScratch>() == 16);

/// What an arena's file says of the handover that lies in it: what a kernel is told by `setup_data` or `/chosen`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Recorded {
    /// Where the FDT is; 0 while nothing is finalized.
    pub fdt_phys: u64,
    /// kho-v1: bytes of a bitmap; else 0.
    pub bitmap_bytes: u32,
}

impl Recorded {
    /// The bytes as they stand in the note.
    pub(super) fn encode(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&self.bitmap_bytes.to_le_bytes());
        bytes[4..].copy_from_slice(&self.fdt_phys.to_le_bytes());
        bytes
    }
}

/// What an arena's file says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ArenaNote {
    pub page: PageSize,
    pub max_order: Order,
    pub regions: Vec<Region>,
    pub scratch: Vec<ScratchArea>,
    pub handover: Recorded,
    pub scratch_phys: u64,
}

impl ArenaNote {
    fn encode(&self) -> Vec<u8> {
        let count = |n: usize| U32::new(u32::try_from(n).unwrap_or(u32::MAX));
        let head = Note {
            version: VERSION.into(),
            page_shift: self.page.shift().into(),
            max_order: self.max_order.get().into(),
            nr_regions: count(self.regions.len()),
            nr_scratch: count(self.scratch.len()),
            bitmap_bytes: self.handover.bitmap_bytes.into(),
            fdt_phys: self.handover.fdt_phys.into(),
            scratch_phys: self.scratch_phys.into(),
        };
        let mut out = head.as_bytes().to_vec();
        for r in &self.regions {
            let region = NoteRegion { start: r.start.0.into(), len: r.len.into(), node: u64::from(r.node).into() };
            out.extend_from_slice(region.as_bytes());
        }
        for s in &self.scratch {
            out.extend_from_slice(NoteScratch { addr: s.addr.into(), size: s.size.into() }.as_bytes());
        }
        out
    }

    /// Reads the descriptor of a `kho` note. The values are checked by whoever uses them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a descriptor of another version or cut short.
    pub fn decode(desc: &[u8]) -> Result<Self> {
        let invalid = |why: &str| Error::Invalid { what: "arena note", why: why.into() };
        let short = |_| invalid("cut short");
        let (head, rest) = Note::read_from_prefix(desc).map_err(|_| invalid("cut short"))?;
        if head.version.get() != VERSION {
            return Err(invalid(&format!("version {}, not {VERSION}", head.version)));
        }
        let nr = |n: U32| usize::try_from(n.get()).unwrap_or(usize::MAX);
        let (regions, rest) =
            <[NoteRegion]>::ref_from_prefix_with_elems(rest, nr(head.nr_regions)).map_err(|_| invalid("cut short"))?;
        let (scratch, _) =
            <[NoteScratch]>::ref_from_prefix_with_elems(rest, nr(head.nr_scratch)).map_err(|_| short(()))?;
        let node = |n: U64| u32::try_from(n.get()).map_err(|_| invalid("node beyond 32 bits"));
        Ok(ArenaNote {
            page: PageSize::new(1u64.checked_shl(head.page_shift.get()).unwrap_or(0))?,
            max_order: Order::new(head.max_order.get().into())?,
            regions: regions
                .iter()
                .map(|r| Ok(Region { start: Phys(r.start.get()), len: r.len.get(), node: node(r.node)? }))
                .collect::<Result<_>>()?,
            scratch: scratch.iter().map(|s| ScratchArea { addr: s.addr.get(), size: s.size.get() }).collect(),
            handover: Recorded { bitmap_bytes: head.bitmap_bytes.get(), fdt_phys: head.fdt_phys.get() },
            scratch_phys: head.scratch_phys.get(),
        })
    }

    /// The whole head of an arena's file, and where in it `fdt_phys` lies. `spans` are `(phys, len, file offset)`.
    pub(super) fn to_elf(&self, spans: &[(u64, u64, u64)]) -> Result<Vec<u8>> {
        let failed = |e: object::write::Error| Error::Invalid { what: "arena file header", why: e.to_string() };
        let desc = self.encode();
        let mut note = Vec::with_capacity(desc.len() + 16);
        for word in [NOTE_NAME.len() as u64 + 1, desc.len() as u64, NOTE_TYPE.into()] {
            note.extend_from_slice(U32::new(u32::try_from(word).unwrap_or(u32::MAX)).as_bytes());
        }
        note.extend_from_slice(b"kho\0");
        note.extend_from_slice(&desc);

        let mut out = Vec::new();
        let mut writer = Writer::new(object::Endianness::Little, true, &mut out);
        writer.reserve_file_header();
        writer.reserve_program_headers(u32::try_from(spans.len() + 1).unwrap_or(u32::MAX));
        let note_at = writer.reserve(note.len() as u64, 8);
        let machine = if cfg!(target_arch = "aarch64") { elf::EM_AARCH64 } else { elf::EM_X86_64 };
        let header = object::write::elf::FileHeader {
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            e_type: elf::ET_CORE,
            e_machine: machine,
            e_entry: 0,
            e_flags: elf::FileFlags(0),
        };
        writer.write_file_header(&header).map_err(failed)?;
        writer.write_align_program_headers();
        let program = |p_type, p_offset, p_paddr, size, p_align| object::write::elf::ProgramHeader {
            p_type,
            p_flags: elf::PF_R | elf::PF_W,
            p_offset,
            p_vaddr: 0,
            p_paddr,
            p_filesz: size,
            p_memsz: size,
            p_align,
        };
        writer.write_program_header(&program(elf::PT_NOTE, note_at, 0, note.len() as u64, 4));
        for &(phys, len, offset) in spans {
            writer.write_program_header(&program(elf::PT_LOAD, offset, phys, len, self.page.bytes()));
        }
        writer.write_align(8);
        writer.write(&note);
        Ok(out)
    }

    /// The note of a file that begins with `head`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that no arena made.
    pub(super) fn from_elf(head: &[u8]) -> Result<Self> {
        let invalid = |why: String| Error::Invalid { what: "arena file", why };
        let elf_error = |e: object::read::Error| invalid(e.to_string());
        let header = elf::FileHeader64::<LE>::parse(head).map_err(elf_error)?;
        let endian = header.endian().map_err(elf_error)?;
        for program in header.program_headers(endian, head).map_err(elf_error)? {
            let Some(mut notes) = program.notes(endian, head).map_err(elf_error)? else { continue };
            while let Some(note) = notes.next().map_err(elf_error)? {
                if note.name() == NOTE_NAME && note.n_type(endian).0 == NOTE_TYPE {
                    return Self::decode(note.desc());
                }
            }
        }
        Err(invalid("no kho note: an ELF file, but not an arena's".into()))
    }
}

/// Where [`Recorded`] lies in a file head, to be rewritten in place.
pub(super) fn recorded_offset(head: &[u8], desc_len: usize) -> u64 {
    (head.len() - desc_len + core::mem::offset_of!(Note, bitmap_bytes)) as u64
}

/// The length of the descriptor that [`ArenaNote::to_elf`] ends with.
pub(super) fn desc_len(note: &ArenaNote) -> usize {
    size_of::<Note>() + note.regions.len() * size_of::<NoteRegion>() + note.scratch.len() * size_of::<NoteScratch>()
}
