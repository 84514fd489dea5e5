//! The head of an arena's file: an ELF core header, so that any tool that reads ELF cores reads an arena.
//!
//! ```text
//! 0        ELF header, program headers (one PT_LOAD a span, p_paddr = physical address), one PT_NOTE
//! ...      note "kho", type 1: struct Note, then the regions, then the scratch areas
//! 4 KiB    where `kho.live` made the file: its superblock, slots and journal (python/kho/live/file/header.py), else holes
//! 2 MiB    the spans, one after the other, each on a 2 MiB boundary
//! ```

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::read::arena_note::{ArenaNote, NOTE_NAME, NOTE_TYPE, Note, NoteRegion, NoteScratch, Recorded, VERSION};
use object::elf;
use object::endian::LittleEndian as LE;
use object::read::elf::{FileHeader, ProgramHeader};
use object::write::elf::Writer;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

/// Where spans begin, and what their places are rounded to: a huge page.
pub(super) const SPAN_ALIGN: u64 = 2 << 20;

impl Recorded {
    /// The bytes as they stand in the note.
    pub(super) fn encode(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&self.bitmap_bytes.to_le_bytes());
        bytes[4..].copy_from_slice(&self.fdt_phys.to_le_bytes());
        bytes
    }
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
        let machine = match std::env::consts::ARCH {
            "x86_64" => elf::EM_X86_64,
            "aarch64" => elf::EM_AARCH64,
            other => {
                let why = format!("KHO is of x86_64 and arm64, and its ELF header has no number for {other}");
                return Err(Error::Invalid { what: "arena file", why });
            }
        };
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
