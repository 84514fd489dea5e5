//! Structures of kho-v1 as they lie in memory, little-endian.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::tracker::Geometry;
use crate::units::PageSize;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The head of a chunk (`struct khoser_mem_chunk_hdr`, kernel/kexec_handover.c; abi.md section 3).
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
pub struct ChunkHeader {
    /// Physical address of the next chunk; 0 ends the list.
    pub next: U64,
    /// The order of all bitmaps of the chunk.
    pub order: U32,
    /// The number of entries in use.
    pub num_elms: U32,
}
const _: () = assert!(size_of::<ChunkHeader>() == 16);

/// An entry of a chunk (`struct khoser_mem_bitmap_ptr`).
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
pub struct BitmapPtr {
    /// Physical address of the folio that bit 0 stands for.
    pub phys_start: U64,
    /// Physical address of the bitmap.
    pub bitmap: U64,
}
const _: () = assert!(size_of::<BitmapPtr>() == 16);

/// Entries that fit a chunk, which is exactly one page: 255 at 4 KiB.
pub const fn chunk_entries(page: PageSize) -> u64 {
    (page.bytes() - size_of::<ChunkHeader>() as u64) / size_of::<BitmapPtr>() as u64
}
const _: () = assert!(chunk_entries(PageSize::Size4K) == 255);

/// Bytes of a bitmap of Linux 6.16 and 6.17: PRESERVE_BITS / 8, whatever the page size.
pub const SMALL_BITMAP: u64 = Geometry::SMALL;

/// One of the two bitmap sizes kho-v1 has been written with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum BitmapSize {
    /// 512 bytes: Linux 6.16 and 6.17.
    Small,
    /// One page: Linux 6.18 and later.
    Page,
}

impl BitmapSize {
    /// Both sizes, the newer one first.
    pub const ALL: [BitmapSize; 2] = [BitmapSize::Page, BitmapSize::Small];

    /// # Errors
    /// [`Error::BitmapBytes`] for any other size.
    pub fn new(bytes: u64, page: PageSize) -> Result<Self> {
        match bytes {
            SMALL_BITMAP => Ok(BitmapSize::Small),
            _ if bytes == page.bytes() => Ok(BitmapSize::Page),
            _ => Err(Error::BitmapBytes { bytes, page: page.bytes() }),
        }
    }

    /// The bytes of a bitmap if they do not depend on the page size.
    pub const fn fixed_bytes(self) -> Option<u64> {
        match self {
            BitmapSize::Small => Some(SMALL_BITMAP),
            BitmapSize::Page => None,
        }
    }

    /// The size in bytes, with pages of `page`.
    pub const fn bytes(self, page: PageSize) -> u64 {
        match self {
            BitmapSize::Small => SMALL_BITMAP,
            BitmapSize::Page => page.bytes(),
        }
    }
}
