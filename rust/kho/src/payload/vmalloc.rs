//! A preserved vmalloc area: a list of pages that were contiguous in the old kernel's address space
//! (`struct kho_vmalloc`, include/linux/kho/abi/kexec_handover.h; ABI section 6).

#![forbid(unsafe_code)]

use crate::error::{Error, MapProblem, NO_BLOCK, Result};
use crate::memory::PhysMemory;
use crate::units::{Order, PageSize, Phys};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `struct kho_vmalloc`: where the list begins, and how much it must hold.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
pub struct Descriptor {
    /// The first chunk of the list; 0 for none.
    pub first: U64,
    /// Pages in all.
    pub total_pages: U32,
    /// 1 = VM_ALLOC, 2 = huge mappings.
    pub flags: U16,
    /// Each address of the list stands for `1 << order` contiguous pages.
    pub order: U16,
}
const _: () = assert!(size_of::<Descriptor>() == 16);

/// Addresses in a chunk, behind its `next`.
pub const fn chunk_entries(page: PageSize) -> u64 {
    (page.bytes() - 8) / 8
}

/// An area that was read.
#[derive(Clone, Debug)]
pub struct Vmalloc {
    pub descriptor: Descriptor,
    pub page: PageSize,
    pub order: Order,
    /// The pages that hold the list.
    pub chunks: Vec<Phys>,
    /// The area's blocks, in its order.
    pub blocks: Vec<Phys>,
}

/// Which list a chunk belongs to. No two lists of a kernel share one; without this, a small image could make its reader
/// follow one long list a million times.
#[derive(Debug, Default)]
pub struct ChunkOwners(Mutex<HashMap<u64, u64>>);

impl ChunkOwners {
    /// Whether the chunk is, or now becomes, that of `owner` (an address that tells lists apart).
    fn claim(&self, chunk: u64, owner: u64) -> bool {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *owners.entry(chunk).or_insert(owner) == owner
    }
}

const CHUNK: &str = "vmalloc chunk";

fn bad(phys: u64, problem: MapProblem) -> Error {
    Error::Map { node: CHUNK, phys, problem }
}

impl Vmalloc {
    /// Follows the list. Each chunk is visited once, and belongs to one `owner`; there cannot be more blocks than the
    /// chunks hold.
    ///
    /// # Errors
    /// [`Error::Map`] for a chunk that is unaligned, outside memory or visited before, an address that is no page's, or
    /// an order that cannot be. A `total_pages` that is not the sum is no error: see [`Vmalloc::pages`].
    pub fn read(
        memory: &dyn PhysMemory,
        page: PageSize,
        descriptor: Descriptor,
        owner: u64,
        owners: &ChunkOwners,
    ) -> Result<Self> {
        let first = descriptor.first.get();
        let order = Order::new(descriptor.order.get().into())
            .map_err(|_| bad(first, MapProblem::Order { order: descriptor.order.get().into(), max: Order::MAX }))?;
        let mut seen = HashSet::new();
        let mut named = HashSet::new();
        let mut area = Vmalloc { descriptor, page, order, chunks: Vec::new(), blocks: Vec::new() };
        let mut at = first;
        while at != 0 {
            if !at.is_multiple_of(page.bytes()) {
                return Err(bad(at, MapProblem::Unaligned { page: page.bytes() }));
            }
            if !seen.insert(at) {
                return Err(bad(at, MapProblem::Cycle));
            }
            if !owners.claim(at, owner) {
                return Err(bad(at, MapProblem::Shared));
            }
            let bytes = memory
                .read_vec(CHUNK, Phys(at), page.bytes())
                .map_err(|_| bad(at, MapProblem::Outside { len: page.bytes() }))?;
            let words = <[U64]>::ref_from_bytes(&bytes).unwrap_or_default();
            let Some((next, addresses)) = words.split_first() else { break };
            area.chunks.push(Phys(at));
            for (index, phys) in (0..).zip(addresses.iter().map(|a| a.get()).take_while(|a| *a != 0)) {
                if page.check_folio(page.pfn(Phys(phys)), order).is_err() || phys % page.bytes() != 0 {
                    return Err(bad(at, MapProblem::Entry { index, value: phys, why: NO_BLOCK }));
                }
                if !named.insert(phys) {
                    let why = "is a block that the area has already";
                    return Err(bad(at, MapProblem::Entry { index, value: phys, why }));
                }
                area.blocks.push(Phys(phys));
            }
            at = next.get();
        }
        Ok(area)
    }

    /// Pages that the list names; `descriptor.total_pages` says how many it should.
    pub fn pages(&self) -> u64 {
        (self.blocks.len() as u64) << self.order.get()
    }

    /// Bytes the list names.
    pub fn nbytes(&self) -> u64 {
        self.pages() << self.page.shift()
    }

    /// Copies bytes out of the area from `offset`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] behind its end; [`Error::OutsideMemory`] for a page that is not here.
    pub fn copy(&self, memory: &dyn PhysMemory, mut offset: u64, mut into: &mut [u8]) -> Result<()> {
        let block = self.page.folio_bytes(self.order);
        let end = offset.saturating_add(into.len() as u64);
        if end > self.nbytes() {
            return Err(Error::OutOfRange { what: "vmalloc offset", value: end, limit: self.nbytes() });
        }
        while !into.is_empty() {
            let at = usize::try_from(offset / block).unwrap_or(usize::MAX);
            let inside = offset % block;
            let len = usize::try_from(block - inside).unwrap_or(usize::MAX).min(into.len());
            let (part, rest) = into.split_at_mut(len);
            let phys = self.blocks.get(at).map_or(0, |p| p.0);
            memory.read(Phys(phys + inside), part)?;
            offset += len as u64;
            into = rest;
        }
        Ok(())
    }

    /// The records of `size` bytes that the area holds, at most `most` of them, up to the first that is all zeros: no
    /// record of a kernel is, and what lies behind the end of the data may be as large as a header claims.
    ///
    /// # Errors
    /// As [`Vmalloc::copy`].
    pub fn records(&self, memory: &dyn PhysMemory, size: usize, most: u64) -> Result<Vec<u8>> {
        const WINDOW: u64 = 1 << 16;
        let total = most.min(self.nbytes() / size as u64);
        let mut records = Vec::new();
        let mut done = 0;
        while done < total {
            let count = WINDOW.min(total - done);
            let from = records.len();
            records.resize(from + usize::try_from(count).unwrap_or(0) * size, 0);
            self.copy(memory, done * size as u64, &mut records[from..])?;
            let empty = records[from..].chunks_exact(size).position(|record| record.iter().all(|byte| *byte == 0));
            if let Some(empty) = empty {
                records.truncate(from + empty * size);
                break;
            }
            done += count;
        }
        Ok(records)
    }
}
