//! The ELF note `kho` in an arena's file: page size, RAM, scratch areas, and where the handover's FDT is.
//!
//! `write/arena/header.rs` writes it.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::scratch::ScratchArea;
use crate::units::{Order, PageSize, Phys};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The note's type under the name `kho`.
pub const NOTE_TYPE: u32 = 1;
pub use crate::memory::NOTE_NAME;
pub(crate) const VERSION: u32 = 1;

/// What the note says of the arena as a whole.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
pub(crate) struct Note {
    pub(crate) version: U32,
    pub(crate) page_shift: U32,
    pub(crate) max_order: U32,
    pub(crate) nr_regions: U32,
    pub(crate) nr_scratch: U32,
    /// kho-v1: bytes of a bitmap, which the format itself does not tell; else 0.
    pub(crate) bitmap_bytes: U32,
    /// The handover's FDT, 0 while there is none: what `setup_data` or `/chosen` tell a kernel.
    pub(crate) fdt_phys: U64,
    /// The scratch array, 0 without one.
    pub(crate) scratch_phys: U64,
}
const _: () = assert!(size_of::<Note>() == 40);

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
pub(crate) struct NoteRegion {
    pub(crate) start: U64,
    pub(crate) len: U64,
    pub(crate) node: U64,
}
const _: () = assert!(size_of::<NoteRegion>() == 24);

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
pub(crate) struct NoteScratch {
    pub(crate) addr: U64,
    pub(crate) size: U64,
}
const _: () = assert!(size_of::<NoteScratch>() == 16);

/// RAM: `len` bytes from `start` on a NUMA node. Page-aligned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// The first address.
    pub start: Phys,
    /// The number of bytes.
    pub len: u64,
    /// The NUMA node.
    pub node: u32,
}

impl Region {
    /// The address of its last byte.
    pub const fn last(&self) -> u64 {
        self.start.0 + (self.len - 1)
    }
}

/// The handover in an arena's file, as its note records it: what a kernel is told by `setup_data` or `/chosen`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Recorded {
    /// Where the FDT is; 0 while nothing is finalized.
    pub fdt_phys: u64,
    /// kho-v1: bytes of a bitmap; else 0.
    pub bitmap_bytes: u32,
}

/// The note of an arena's file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ArenaNote {
    /// The page size.
    pub page: PageSize,
    /// The largest order that is allocated by default (MAX_PAGE_ORDER).
    pub max_order: Order,
    /// RAM, by address.
    pub regions: Vec<Region>,
    /// The scratch areas.
    pub scratch: Vec<ScratchArea>,
    /// The finalized handover, if there is one.
    pub handover: Recorded,
    /// The physical address of the scratch array; 0 without one.
    pub scratch_phys: u64,
}

impl ArenaNote {
    /// Reads the descriptor of a `kho` note. The caller checks the values.
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
}
