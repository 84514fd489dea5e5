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

impl MemfdVersion {
    /// Bytes of the structure.
    pub const fn nbytes(self) -> usize {
        match self {
            MemfdVersion::V1 => size_of::<SerV1>(),
            MemfdVersion::V2 => size_of::<SerV2>(),
        }
    }
}

/// The structure of either version; what a version lacks is 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) pos: u64,
    pub(super) size: u64,
    pub(super) seals: u32,
    pub(super) flags: u32,
    pub(super) nr_folios: u64,
    pub(super) folios: Descriptor,
}

impl Head {
    /// Decodes the bytes of a structure; `None` if they are not as many as it has.
    pub(super) fn of(bytes: &[u8], version: MemfdVersion) -> Option<Head> {
        let (pos, size, seals, flags, nr_folios, folios) = match version {
            MemfdVersion::V1 => {
                let SerV1 { pos, size, nr_folios, folios } = SerV1::read_from_bytes(bytes).ok()?;
                (pos, size, 0.into(), 0.into(), nr_folios, folios)
            }
            MemfdVersion::V2 => {
                let SerV2 { pos, size, seals, flags, nr_folios, folios } = SerV2::read_from_bytes(bytes).ok()?;
                (pos, size, seals, flags, nr_folios, folios)
            }
        };
        let (pos, size, nr_folios) = (pos.get(), size.get(), nr_folios.get());
        Some(Head { pos, size, seals: seals.get(), flags: flags.get(), nr_folios, folios })
    }
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
    /// The map that knows the sizes of the folios is gone: each one reaches to the next one in the list.
    pub orders_by_index: bool,
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
        let len = version.nbytes() as u64;
        let bytes = memory.read_vec(WHAT, phys, len)?;
        let outside = || Error::OutsideMemory { what: WHAT, phys: phys.0, len };
        let head = Head::of(&bytes, version).ok_or_else(outside)?;
        let list = Vmalloc::read(memory, page, head.folios, phys.0, owners)?;
        let mut folios = Vec::new();
        list.each_records(memory, size_of::<SerFolio>(), head.nr_folios, |bytes| {
            let entries = <[SerFolio]>::ref_from_bytes(bytes).map_err(|_| outside())?;
            owners.list_folios(memory, phys.0, (folios.len() + entries.len()) as u64)?;
            // No more than is needed: a list of millions would double as it grows.
            folios.reserve_exact(entries.len());
            folios.extend(entries.iter().map(|e| MemfdFolio { pfn_flags: e.pfn_flags.get(), index: e.index.get() }));
            Ok(())
        })?;
        let Head { pos, size, seals, flags, nr_folios, .. } = head;
        Ok(Memfd { version, pos, size, seals, flags, nr_folios, folios, list, orders_by_index: false })
    }

    /// The order a folio of the file was preserved with; a single page if it was not preserved.
    pub fn order_of(preserved: &Tracker, pfn: Pfn) -> Order {
        preserved.head_order(pfn).unwrap_or_default()
    }

    /// Whether the list alone tells the sizes of the folios: it names the whole file without holes, as the kernel's does,
    /// and each folio is aligned to the size that reaches to the next one.
    pub fn tells_orders(&self) -> bool {
        let pages = self.size.div_ceil(self.list.page.bytes());
        let next = self.folios.iter().skip(1).map(|folio| folio.index).chain([pages]);
        let starts = self.folios.first().is_none_or(|first| first.index == 0);
        starts
            && self.folios.iter().zip(next).all(|(folio, next)| {
                let span = next.saturating_sub(folio.index);
                // The last folio may reach beyond the end of the file.
                let whole = if next == pages { span.checked_next_power_of_two().unwrap_or(0) } else { span };
                span > 0 && whole.is_power_of_two() && (folio.pfn().0 | folio.index).is_multiple_of(whole)
            })
    }

    /// The order of the `n`th folio of the list.
    pub fn order(&self, preserved: &Tracker, n: usize) -> Order {
        let Some(folio) = self.folios.get(n) else { return Order::ZERO };
        if !self.orders_by_index {
            return Self::order_of(preserved, folio.pfn());
        }
        let end = self.folios.get(n + 1).map_or(self.size.div_ceil(self.list.page.bytes()), |next| next.index);
        let pages = end.saturating_sub(folio.index).clamp(1, 1 << Order::MAX).next_power_of_two();
        Order::new(pages.trailing_zeros().into()).unwrap_or_default()
    }

    /// What of the file is data, by offset, clipped to its size; everything else reads as zeros. Where folios claim the
    /// same part, the last one in the list has it.
    pub fn extents(&self, preserved: &Tracker) -> Vec<FileExtent> {
        let page = self.list.page;
        let mut parts: Vec<FileExtent> = Vec::with_capacity(self.folios.len());
        let mut sorted = Vec::new();
        if !self.folios.is_sorted_by_key(|f| f.index) {
            sorted.extend(0..self.folios.len());
            sorted.sort_by_key(|n| self.folios[*n].index);
        }
        for at in 0..self.folios.len() {
            let n = sorted.get(at).copied().unwrap_or(at);
            let folio = self.folios[n];
            let Some(offset) = folio.index.checked_mul(page.bytes()).filter(|offset| *offset < self.size) else {
                continue;
            };
            if let Some(last) = parts.last_mut() {
                last.len = last.len.min(offset - last.offset);
            }
            if folio.flags() & UPTODATE != 0 && folio.pfn().0 < page.pfn_limit() {
                let len = page.folio_bytes(self.order(preserved, n)).min(self.size - offset);
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
        let numbered = self.folios.iter().enumerate();
        let here = numbered.filter(|(_, folio)| folio.pfn().0 < page.pfn_limit());
        let mut folios: Vec<(Pfn, Order)> = here.map(|(n, folio)| (folio.pfn(), self.order(preserved, n))).collect();
        folios.sort_unstable();
        let mut runs: Vec<PhysRange> = Vec::new();
        for (pfn, order) in folios {
            let (start, len) = (page.phys(pfn), page.folio_bytes(order));
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
