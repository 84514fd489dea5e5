//! A preserved memfd: a file's size, seals and position, and the folios of its page cache
//! (`struct memfd_luo_ser`, include/linux/kho/abi/memfd.h; abi.md section 6).

#![forbid(unsafe_code)]

use super::vmalloc::{ChunkOwners, Descriptor, Vmalloc};
use crate::error::{Error, Result};
use crate::memory::{PhysMemory, PhysRange};
use crate::tracker::Tracker;
use crate::units::{Order, PageSize, Pfn, Phys};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The two layouts there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemfdVersion {
    /// `memfd-v1` (Linux 6.19 and 7.0): no seals, no flags.
    V1,
    /// `memfd-v2` (Linux 7.1 and later).
    V2,
}

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
struct SerV1 {
    pos: U64,
    size: U64,
    nr_folios: U64,
    folios: Descriptor,
}
const _: () = assert!(size_of::<SerV1>() == 40);

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
struct SerV2 {
    pos: U64,
    size: U64,
    seals: U32,
    flags: U32,
    nr_folios: U64,
    folios: Descriptor,
}
const _: () = assert!(size_of::<SerV2>() == 48);

/// An entry of the folio list: `{ u64 pfn:52, flags:12; u64 index; }`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
struct SerFolio {
    pfn_flags: U64,
    index: U64,
}
const _: () = assert!(size_of::<SerFolio>() == 16);

const PFN_BITS: u32 = 52;
/// The folio was dirty.
pub const DIRTY: u16 = 1;
/// The folio's content counts; otherwise it reads as zeros.
pub const UPTODATE: u16 = 2;

/// A folio of the file, as small as its record: there may be millions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemfdFolio {
    pfn_flags: u64,
    /// Where in the file it lies, in pages.
    pub index: u64,
}

impl MemfdFolio {
    /// Its head page.
    pub const fn pfn(self) -> Pfn {
        Pfn(self.pfn_flags & ((1 << PFN_BITS) - 1))
    }

    /// [`DIRTY`], [`UPTODATE`].
    pub const fn flags(self) -> u16 {
        (self.pfn_flags >> PFN_BITS) as u16
    }
}

/// A memfd that was read; its contents are read when asked for.
#[derive(Clone, Debug)]
pub struct Memfd {
    /// The version of the format.
    pub version: MemfdVersion,
    /// The file position.
    pub pos: u64,
    /// The file size in bytes.
    pub size: u64,
    /// The seals (`F_SEAL_*`); 0 in versions without.
    pub seals: u32,
    /// Flags of the header; 0 in versions without.
    pub flags: u32,
    /// How many folios the header says there are.
    pub nr_folios: u64,
    /// The area that holds the list of folios.
    pub list: Vmalloc,
    /// The folios the list holds, in its order; fewer than `nr_folios` when the list is too short.
    pub folios: Vec<MemfdFolio>,
}

/// A part of a file that is not a hole: `len` bytes at `offset`, from `phys`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileExtent {
    /// Where in the file, in bytes.
    pub offset: u64,
    /// The physical address.
    pub phys: Phys,
    /// The number of bytes.
    pub len: u64,
}

/// Extents by place in the file alone, those that adjoin as one: `(offset, len)`.
pub fn joined(extents: &[FileExtent]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut rest = extents.iter().peekable();
    std::iter::from_fn(move || {
        let first = rest.next()?;
        let mut end = first.offset + first.len;
        while let Some(more) = rest.next_if(|e| e.offset == end) {
            end = more.offset + more.len;
        }
        Some((first.offset, end - first.offset))
    })
}

impl Memfd {
    /// Reads the structure at `phys` and its list of folios.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`]; [`Error::Map`] for a list that cannot be followed.
    pub fn read(
        memory: &dyn PhysMemory,
        page: PageSize,
        phys: Phys,
        version: MemfdVersion,
        owners: &ChunkOwners,
    ) -> Result<Self> {
        const WHAT: &str = "memfd";
        let len = match version {
            MemfdVersion::V1 => size_of::<SerV1>(),
            MemfdVersion::V2 => size_of::<SerV2>(),
        } as u64;
        let bytes = memory.read_vec(WHAT, phys, len)?;
        let outside = || Error::OutsideMemory { what: WHAT, phys: phys.0, len };
        let ser = match version {
            MemfdVersion::V2 => SerV2::read_from_bytes(&bytes).map_err(|_| outside())?,
            MemfdVersion::V1 => {
                let SerV1 { pos, size, nr_folios, folios } = SerV1::read_from_bytes(&bytes).map_err(|_| outside())?;
                SerV2 { pos, size, seals: 0.into(), flags: 0.into(), nr_folios, folios }
            }
        };
        let list = Vmalloc::read(memory, page, ser.folios, phys.0, owners)?;
        let mut folios = Vec::new();
        list.each_records(memory, size_of::<SerFolio>(), ser.nr_folios.get(), |bytes| {
            let entries = <[SerFolio]>::ref_from_bytes(bytes).map_err(|_| outside())?;
            owners.list_folios(memory, phys.0, (folios.len() + entries.len()) as u64)?;
            // No more than is needed: a list of millions would double as it grows.
            folios.reserve_exact(entries.len());
            folios.extend(entries.iter().map(|e| MemfdFolio { pfn_flags: e.pfn_flags.get(), index: e.index.get() }));
            Ok(())
        })?;
        Ok(Memfd {
            version,
            pos: ser.pos.get(),
            size: ser.size.get(),
            seals: ser.seals.get(),
            flags: ser.flags.get(),
            nr_folios: ser.nr_folios.get(),
            folios,
            list,
        })
    }

    /// The order a folio of the file was preserved with; a single page if it was not preserved.
    pub fn order_of(preserved: &Tracker, pfn: Pfn) -> Order {
        preserved.head_order(pfn).unwrap_or_default()
    }

    /// What of the file is data, by offset, clipped to its size; everything else reads as zeros. Where folios claim the
    /// same part, the last one in the list has it.
    pub fn extents(&self, preserved: &Tracker) -> Vec<FileExtent> {
        let page = self.list.page;
        let mut parts: Vec<FileExtent> = Vec::with_capacity(self.folios.len());
        let mut sorted = None;
        if !self.folios.is_sorted_by_key(|f| f.index) {
            let mut folios = self.folios.clone();
            folios.sort_by_key(|f| f.index);
            sorted = Some(folios);
        }
        for folio in sorted.as_ref().unwrap_or(&self.folios) {
            let Some(offset) = folio.index.checked_mul(page.bytes()).filter(|offset| *offset < self.size) else {
                continue;
            };
            if let Some(last) = parts.last_mut() {
                last.len = last.len.min(offset - last.offset);
            }
            if folio.flags() & UPTODATE != 0 && folio.pfn().0 < page.pfn_limit() {
                let len = page.folio_bytes(Self::order_of(preserved, folio.pfn())).min(self.size - offset);
                parts.push(FileExtent { offset, phys: page.phys(folio.pfn()), len });
            }
        }
        parts.retain(|part| part.len > 0);
        parts
    }

    /// The memory of the folios by address, what adjoins or overlaps made one; the first `most` of these runs. Not that
    /// of folios beyond the address space.
    pub fn memory_runs(&self, preserved: &Tracker, most: usize) -> Vec<PhysRange> {
        let page = self.list.page;
        let here = self.folios.iter().filter(|folio| folio.pfn().0 < page.pfn_limit());
        let mut pfns: Vec<Pfn> = here.map(|folio| folio.pfn()).collect();
        pfns.sort_unstable();
        let mut runs: Vec<PhysRange> = Vec::new();
        for pfn in pfns {
            let (start, len) = (page.phys(pfn), page.folio_bytes(Self::order_of(preserved, pfn)));
            match runs.last_mut() {
                Some(last) if start.0 - last.start.0 <= last.len => {
                    last.len = last.len.max((start.0 - last.start.0).saturating_add(len));
                }
                _ => {
                    if runs.len() == most {
                        break;
                    }
                    runs.push(PhysRange { start, len });
                }
            }
        }
        runs
    }

    /// The first run of the file at or after `offset`, and before `end`, that does not read as zeros, as
    /// `(offset, len)`. A run outside the memory counts, so that reading it says so.
    ///
    /// # Errors
    /// As [`PhysMemory::next_to_read`].
    pub fn next_to_read(
        &self,
        memory: &dyn PhysMemory,
        extents: &[FileExtent],
        offset: u64,
        end: u64,
    ) -> Result<Option<(u64, u64)>> {
        let from = extents.partition_point(|e| e.offset + e.len <= offset);
        for e in extents[from..].iter().take_while(|e| e.offset < end) {
            let (start, stop) = (e.offset.max(offset), (e.offset + e.len).min(end));
            let phys = Phys(e.phys.0 + (start - e.offset));
            if !memory.contains(phys, stop - start) {
                return Ok(Some((start, stop - start)));
            }
            if let Some(run) = memory.next_to_read(phys, Phys(phys.0 + (stop - start - 1)))? {
                let at = start + (run.start.0 - phys.0);
                return Ok(Some((at, run.len.min(stop - at))));
            }
        }
        Ok(None)
    }

    /// Copies a part of the file's contents; holes are zeros.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] past the file's end; [`Error::OutsideMemory`] for a folio that is not here.
    pub fn copy(&self, memory: &dyn PhysMemory, extents: &[FileExtent], offset: u64, into: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(into.len() as u64);
        if end > self.size {
            return Err(Error::OutOfRange { what: "memfd offset", value: end, limit: self.size });
        }
        into.fill(0);
        let from = extents.partition_point(|e| e.offset + e.len <= offset);
        for e in extents[from..].iter().take_while(|e| e.offset < end) {
            let (start, stop) = (e.offset.max(offset), (e.offset + e.len).min(end));
            let place = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
            memory.read(Phys(e.phys.0 + (start - e.offset)), &mut into[place(start)..place(stop)])?;
        }
        Ok(())
    }
}
