//! The ELF notes of a core or kdump file, and its machine (`e_machine`).

#![forbid(unsafe_code)]

use object::LittleEndian as LE;
use object::elf::FileHeader64;
use object::read::elf::NoteIterator;
use std::fmt;

/// The most bytes of notes that are kept of a file.
pub(crate) const MAX_NOTES: u64 = 16 << 20;
/// The owner of the notes that kho writes.
pub const NOTE_NAME: &[u8] = b"kho";

/// The machine a core is of (`e_machine`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Machine {
    /// EM_X86_64.
    X86_64,
    /// EM_AARCH64.
    Aarch64,
    /// Any other number.
    Other(u16),
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Machine::X86_64 => f.write_str("x86_64"),
            Machine::Aarch64 => f.write_str("aarch64"),
            Machine::Other(number) => write!(f, "machine {number}"),
        }
    }
}

/// A note: `name` without its terminating NULs, `kind` (n_type) and `desc` as they stand in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Note<'a> {
    /// The owner, without terminating NULs.
    pub name: &'a [u8],
    /// The type (`n_type`).
    pub kind: u32,
    /// The descriptor.
    pub desc: &'a [u8],
}

/// A PT_NOTE segment.
pub(crate) struct NoteBytes {
    pub(crate) align: u64,
    pub(crate) bytes: Vec<u8>,
}

impl NoteBytes {
    pub(crate) fn iter(&self) -> impl Iterator<Item = Note<'_>> {
        NoteIterator::<FileHeader64<LE>>::new(LE, self.align, &self.bytes).into_iter().flatten().map_while(|note| {
            let note = note.ok()?;
            Some(Note { name: note.name(), kind: note.n_type(LE).0, desc: note.desc() })
        })
    }
}
