//! ELF cores: where their segments are, by physical address, and their notes. Only headers and notes are read here,
//! and no more of them than the file has.

#![forbid(unsafe_code)]

use crate::error::{Result, SourceProblem};
use crate::filter::Absent;
use crate::memory::backing::{Backing, Segment};
use crate::memory::note::{MAX_NOTES, Machine, NOTE_NAME, Note, NoteBytes};
use crate::memory::{Absence, Coverage, PhysRange, Room};
use crate::units::Phys;
use object::LittleEndian as LE;
use object::elf::{self, ELFCLASS64, ELFDATA2LSB, ELFMAG, FileHeader64, ProgramHeader64, SectionHeader64};
use object::pod::{Pod, from_bytes, slice_from_all_bytes};

/// The most program headers that are read: far more than any core has, and no reason to run out of memory.
const MAX_HEADERS: u64 = 1 << 20;
/// How messages name a program header.
pub(crate) const SEGMENT: &str = "ELF segment";
/// Program headers read at a time.
const HEADERS_AT_ONCE: u64 = 1024;

const HEADER_SIZE: u64 = size_of::<FileHeader64<LE>>() as u64;
const PROGRAM_HEADER_SIZE: u64 = size_of::<ProgramHeader64<LE>>() as u64;
const _: () = assert!(HEADER_SIZE == 64 && PROGRAM_HEADER_SIZE == 56);

/// What the headers of a core say.
pub(crate) struct Core {
    pub(crate) machine: Machine,
    /// Disjoint: of memory that several headers name (QEMU writes the same memory under several virtual addresses), the
    /// first one's is taken.
    pub(crate) segments: Vec<Segment>,
    pub(crate) notes: Vec<NoteBytes>,
    /// What the file leaves out.
    pub(crate) absences: Vec<Absence>,
    /// The level of the filter that left it out, if it is known.
    pub(crate) level: Option<u32>,
}

/// Whether a file starts like an ELF file.
pub(crate) fn is_elf(file: &Backing) -> bool {
    let mut magic = [0; ELFMAG.len()];
    file.store.read_exact_at(0, &mut magic).is_ok() && magic == ELFMAG
}

/// Reads the headers and notes of a core. Contents may be missing: that is for who reads them.
///
/// # Errors
/// [`SourceProblem::Elf`] for anything but a little-endian 64-bit core with memory in it,
/// [`SourceProblem::Segment`] for a segment that cannot be.
pub(crate) fn parse(file: &Backing) -> Result<Core> {
    let elf = |why: String| file.error(SourceProblem::Elf { why });
    if !is_elf(file) {
        return Err(elf("it does not start with 7f 45 4c 46 (give its address to read it raw: FILE@0x0)".into()));
    }
    let header: FileHeader64<LE> = read_struct(file, 0, "ELF header")?;
    let ident = &header.e_ident;
    if ident.class != ELFCLASS64 {
        return Err(elf(format!(
            "class {}, where 2 (64-bit) is needed: KHO exists on 64-bit machines only. Of a 64-bit machine, dump it \
             again with 64-bit headers (kexec -p --elf64-core-headers)",
            ident.class.0
        )));
    }
    if ident.data != ELFDATA2LSB {
        return Err(elf(format!(
            "data encoding {}, where 1 (little-endian) is needed: this is of a big-endian machine{}, and KHO exists on \
             x86_64 and arm64 only",
            ident.data.0,
            big_endian(header.e_machine.get(LE).0.swap_bytes())
        )));
    }
    let e_type = header.e_type.get(LE);
    if e_type != elf::ET_CORE {
        return Err(elf(format!(
            "type {}, where 4 (ET_CORE) is needed: this is {}, no image of memory. Fix: {}",
            e_type.0,
            program(file, &header, e_type),
            crate::memory::format::foreign::DUMP
        )));
    }
    let count = header_count(file, &header)?;
    if count > 0 && u64::from(header.e_phentsize.get(LE)) != PROGRAM_HEADER_SIZE {
        return Err(elf(format!(
            "program headers of {} bytes, where they have {PROGRAM_HEADER_SIZE}",
            header.e_phentsize.get(LE)
        )));
    }
    let start = header.e_phoff.get(LE);
    // At most 2^20 * 56 bytes.
    let table = count * PROGRAM_HEADER_SIZE;
    if start.checked_add(table).is_none_or(|end| count > 0 && end > file.size) {
        return Err(elf(format!(
            "{count} program headers at {start:#x} (+{table:#x}), but the file ends at {:#x}",
            file.size
        )));
    }
    let mut core = Core {
        machine: match header.e_machine.get(LE) {
            elf::EM_X86_64 => Machine::X86_64,
            elf::EM_AARCH64 => Machine::Aarch64,
            other => Machine::Other(other.0),
        },
        segments: Vec::new(),
        notes: Vec::new(),
        absences: Vec::new(),
        level: None,
    };
    let mut loads = Vec::new();
    let (mut noted, mut ours) = (false, true);
    let mut taken = Coverage::default();
    let mut notes_left = MAX_NOTES;
    for first in (0..count).step_by(HEADERS_AT_ONCE as usize) {
        let n = HEADERS_AT_ONCE.min(count - first);
        let bytes = read(file, start + first * PROGRAM_HEADER_SIZE, n * PROGRAM_HEADER_SIZE, "program headers")?;
        let headers: &[ProgramHeader64<LE>] =
            slice_from_all_bytes(&bytes).map_err(|()| elf("program headers are not readable".into()))?;
        for (index, header) in (first..).zip(headers) {
            match header.p_type.get(LE) {
                elf::PT_LOAD => {
                    ours &= is_ours(header);
                    loads.extend(load(file, header, index)?);
                }
                elf::PT_NOTE => {
                    noted = true;
                    let offset = header.p_offset.get(LE);
                    let len = header.p_filesz.get(LE).min(file.size.saturating_sub(offset)).min(notes_left);
                    if len > 0 {
                        notes_left -= len;
                        core.notes.push(NoteBytes {
                            align: header.p_align.get(LE),
                            bytes: read(file, offset, len, "notes")?,
                        });
                    }
                }
                _ => {}
            }
        }
    }
    // What is not in the file is zeros where kho wrote it, which notes that, or did not before it had filtered dumps.
    let zeros = core.notes.iter().flat_map(NoteBytes::iter).any(|note| note.name == NOTE_NAME) || !noted && ours;
    let most = Room::new(file.held).items();
    for segment in &loads {
        let last = if zeros { segment.last() } else { segment.first.saturating_add(segment.filled).saturating_sub(1) };
        if zeros || segment.filled > 0 {
            let free = taken.take(segment.first, last);
            core.segments.extend(free.into_iter().map(|(a, b)| segment.part(a, b)));
        }
        if !zeros && segment.filled < segment.len {
            let range = PhysRange { start: Phys(segment.first + segment.filled), len: segment.len - segment.filled };
            core.absences.push(Absence { range, why: Absent::LeftOut });
        }
        if (core.segments.len() + core.absences.len()) as u64 > most {
            let why =
                format!("more than {most} segments of memory, which a file of {:#x} bytes cannot fill", file.held);
            return Err(elf(why));
        }
    }
    if let Some((level, absences)) = core.notes.iter().flat_map(NoteBytes::iter).find_map(|note| absence_note(&note)) {
        core.level = level;
        core.absences.extend(absences);
    }
    let xen = sections_contain(file, &header, b".xen_");
    if loads.is_empty() {
        let none = format!("none of its {count} program headers is memory (PT_LOAD)");
        return Err(elf(match xen {
            true => format!("this is a guest's core of Xen (xl dump-core), and {none}. {XEN}"),
            false => none,
        }));
    }
    if xen {
        return Err(elf(format!("this is a guest's core of Xen (xl dump-core). {XEN}")));
    }
    if let Some(name) = process(&core.notes) {
        return Err(elf(format!(
            "this is the core of a process{name}, with its virtual memory, no image of a machine's. Fix: {}",
            crate::memory::format::foreign::DUMP
        )));
    }
    Ok(core)
}

/// How memory of a Xen guest gets into a form that is read here.
const XEN: &str = "Fix: take the dump inside the guest, with kdump";

/// The machines that write big-endian cores, by `e_machine`.
fn big_endian(machine: u16) -> &'static str {
    match machine {
        21 => " (ppc64)",
        22 => " (s390x)",
        _ => "",
    }
}

/// What a file is that is no core.
fn program(file: &Backing, header: &FileHeader64<LE>, e_type: elf::FileType) -> &'static str {
    let kernel = sections_contain(file, header, b"__ksymtab") || sections_contain(file, header, b".init.text");
    match e_type {
        elf::ET_REL if sections_contain(file, header, b".gnu.linkonce.this_module") => "a kernel module",
        elf::ET_REL => "an object file",
        elf::ET_EXEC | elf::ET_DYN if kernel => "a kernel (vmlinux)",
        elf::ET_EXEC | elf::ET_DYN => "a program or library",
        _ => "an ELF file that is no core",
    }
}

/// Whether the names of the sections contain a text.
fn sections_contain(file: &Backing, header: &FileHeader64<LE>, text: &[u8]) -> bool {
    /// More than the names of any kernel's sections.
    const MOST: u64 = 1 << 20;
    let entry = size_of::<SectionHeader64<LE>>() as u64;
    let names = || {
        let at = header.e_shoff.get(LE).checked_add(entry * u64::from(header.e_shstrndx.get(LE).0))?;
        let section: SectionHeader64<LE> = read_struct(file, at, "section header").ok()?;
        let len = section.sh_size.get(LE).min(MOST);
        read(file, section.sh_offset.get(LE), len, "section names").ok()
    };
    header.e_shoff.get(LE) != 0 && names().is_some_and(|names| memchr::memmem::find(&names, text).is_some())
}

/// The program's name, in brackets, if these are the notes of a process: what a kernel's dump never has is where the
/// process's auxiliary vector, mapped files or last signal were. /proc/kcore has a process's status, but none of these.
fn process(notes: &[NoteBytes]) -> Option<String> {
    const NT_PRPSINFO: u32 = 3;
    const NT_AUXV: u32 = 6;
    const NT_FILE: u32 = 0x4649_4c45;
    const NT_SIGINFO: u32 = 0x5349_4749;
    /// Where `pr_fname` stands in `struct elf_prpsinfo`: 16 bytes.
    const NAME: std::ops::Range<usize> = 40..56;
    let all = || notes.iter().flat_map(NoteBytes::iter);
    let of_kernel = all().any(|note| note.name == b"VMCOREINFO" || note.name == b"QEMU");
    let mut of_process =
        all().filter(|note| note.name == b"CORE" && matches!(note.kind, NT_AUXV | NT_FILE | NT_SIGINFO));
    if of_kernel || of_process.next().is_none() {
        return None;
    }
    let info = all().find(|note| note.name == b"CORE" && note.kind == NT_PRPSINFO);
    let name = info.and_then(|note| note.desc.get(NAME)).map(|name| name.split(|&b| b == 0).next().unwrap_or_default());
    Some(
        name.filter(|name| !name.is_empty())
            .map_or(String::new(), |name| format!(" ({:?})", String::from_utf8_lossy(name))),
    )
}

/// How many program headers there are: beyond 65534, section header 0 has the number.
fn header_count(file: &Backing, header: &FileHeader64<LE>) -> Result<u64> {
    let count = match header.e_phnum.get(LE) {
        elf::PN_XNUM => {
            let offset = header.e_shoff.get(LE);
            if offset == 0 {
                let why = "more than 65534 program headers, but there is no section header 0 to say how many".into();
                return Err(file.error(SourceProblem::Elf { why }));
            }
            let section: SectionHeader64<LE> =
                read_struct(file, offset, "section header 0 (the number of program headers)")?;
            section.sh_info.get(LE).into()
        }
        count => count.into(),
    };
    if count > MAX_HEADERS {
        let why = format!("{count} program headers exceed {MAX_HEADERS}");
        return Err(file.error(SourceProblem::Elf { why }));
    }
    Ok(count)
}

/// Whether a PT_LOAD header is as kho writes them, and no other program does.
fn is_ours(header: &ProgramHeader64<LE>) -> bool {
    let all = elf::PF_R | elf::PF_W | elf::PF_X;
    header.p_flags.get(LE) == all && header.p_vaddr.get(LE) == 0 && header.p_align.get(LE) == 0
}

/// The level and the memory that a note of kho's says is not in the file (python/kho/handover/elfcore.py writes it):
/// version 1, the level or 2^32-1, then (address, bytes, 0 for left out and 1 for cut off).
fn absence_note(note: &Note<'_>) -> Option<(Option<u32>, Vec<Absence>)> {
    const NOTE_TYPE: u32 = 2;
    let (head, rest) = note.desc.split_first_chunk::<8>()?;
    let half = |at: usize| head[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
    if note.name != NOTE_NAME || note.kind != NOTE_TYPE || half(0) != 1 {
        return None;
    }
    let one = |entry: &[u8; 24]| {
        let word = |at: usize| entry[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let range = PhysRange { start: Phys(word(0)), len: word(8) };
        let why = *Absent::ALL.get(usize::try_from(word(16)).ok()?)?;
        (range.len > 0 && range.start.0.checked_add(range.len - 1).is_some()).then_some(Absence { range, why })
    };
    let level = Some(half(4)).filter(|level| *level != u32::MAX);
    Some((level, rest.as_chunks::<24>().0.iter().filter_map(one).collect()))
}

/// The segment of a PT_LOAD header; none if it is empty or says that its physical address is unknown.
fn load(file: &Backing, header: &ProgramHeader64<LE>, index: u64) -> Result<Option<Segment>> {
    /// /proc/kcore writes this for what is not linearly mapped.
    const UNKNOWN: u64 = u64::MAX;
    let (first, len) = (header.p_paddr.get(LE), header.p_memsz.get(LE));
    let filled = header.p_filesz.get(LE);
    if len == 0 || first == UNKNOWN {
        return Ok(None);
    }
    let wrong = |why| file.error(SourceProblem::Segment { kind: SEGMENT, index, why });
    if filled > len {
        return Err(wrong(format!("{filled:#x} bytes in the file are more than its {len:#x} in memory")));
    }
    if first.checked_add(len - 1).is_none() {
        return Err(wrong(format!("memory at {first:#x} (+{len:#x}) runs past the address space")));
    }
    Ok(Some(Segment {
        first,
        len,
        offset: header.p_offset.get(LE),
        filled,
        index: u32::try_from(index).ok(),
        backing: 0,
    }))
}

/// `len` bytes at `offset`, which the file had when it was opened.
fn read(file: &Backing, offset: u64, len: u64, what: &str) -> Result<Vec<u8>> {
    let short = || {
        let why = format!("{what} at {offset:#x} (+{len:#x}), but the file ends at {:#x}", file.size);
        file.error(SourceProblem::Elf { why })
    };
    if offset.checked_add(len).is_none_or(|end| end > file.size) {
        return Err(short());
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| short())?];
    file.store.read_exact_at(offset, &mut bytes).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => short(),
        _ => file.error(SourceProblem::Io(e)),
    })?;
    Ok(bytes)
}

fn read_struct<T: Pod>(file: &Backing, offset: u64, what: &str) -> Result<T> {
    let bytes = read(file, offset, size_of::<T>() as u64, what)?;
    from_bytes::<T>(&bytes).map(|(t, _)| *t).map_err(|()| {
        let why = format!("{what} is not readable");
        file.error(SourceProblem::Elf { why })
    })
}
