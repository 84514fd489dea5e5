//! A preserved vmalloc area: a list of pages that were contiguous in the old kernel's address space
//! (`struct kho_vmalloc`, include/linux/kho/abi/kexec_handover.h; abi.md section 6).

#![forbid(unsafe_code)]

use crate::error::{Error, MapProblem, NO_BLOCK, Result};
use crate::memory::PhysMemory;
use crate::units::{Order, PageSize, Phys};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
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

/// Addresses in a chunk, after its `next`.
pub const fn chunk_entries(page: PageSize) -> u64 {
    (page.bytes() - 8) / 8
}

/// An area that was read.
#[derive(Clone, Debug)]
pub struct Vmalloc {
    /// The descriptor it was read from.
    pub descriptor: Descriptor,
    /// The page size.
    pub page: PageSize,
    /// The order of its blocks.
    pub order: Order,
    /// The pages that hold the list.
    pub chunks: Vec<Phys>,
    /// The area's blocks, in its order.
    pub blocks: Vec<Phys>,
}

/// Whose each chunk and each block of the page lists of a handover is, and how many blocks and folios they list.
///
/// No two lists of a kernel share a page; without this, a small image could make its reader follow one long list a
/// million times, or name the same pages in a million lists. What was read before is not counted again.
#[derive(Debug, Default)]
pub struct ChunkOwners(Mutex<Listed>);

#[derive(Debug, Default)]
struct Listed {
    /// The owner of each chunk, by address, and what was wrong with its blocks.
    chunks: HashMap<u64, (u64, Option<MapProblem>)>,
    /// Disjoint ranges of blocks by their first address: the last address, and the owner.
    blocks: BTreeMap<u64, (u64, u64)>,
    nr_blocks: u64,
    /// Folios of each memfd, by its address.
    folios: HashMap<u64, u64>,
    nr_folios: u64,
}

impl ChunkOwners {
    fn lock(&self) -> MutexGuard<'_, Listed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the folios of the memfd at `phys`, once.
    ///
    /// # Errors
    /// [`Error::Map`] if with them there are more than the memory has room for.
    pub(super) fn list_folios(&self, memory: &dyn PhysMemory, phys: u64, folios: u64) -> Result<()> {
        let mut listed = self.lock();
        let max = memory.room().folios();
        let before = listed.folios.get(&phys).copied().unwrap_or(0);
        let total = listed.nr_folios - before + folios;
        if total > max {
            return Err(Error::Map { node: "folio list of the memfd", phys, problem: MapProblem::TooMany { max } });
        }
        listed.nr_folios = total;
        listed.folios.insert(phys, folios);
        Ok(())
    }
}

impl Listed {
    /// Whether the chunk at `at` was taken for `owner` before.
    fn check(&self, at: u64, owner: u64) -> Result<bool> {
        match self.chunks.get(&at) {
            Some((whose, _)) if *whose != owner => Err(bad(at, MapProblem::Shared)),
            Some((_, Some(problem))) => Err(bad(at, *problem)),
            known => Ok(known.is_some()),
        }
    }

    /// Takes a chunk's blocks of `bytes` each for `owner`; what is wrong with the first that cannot be.
    fn take_all(&mut self, blocks: &[Phys], bytes: u64, owner: u64, max: u64) -> Option<MapProblem> {
        self.nr_blocks += blocks.len() as u64;
        if self.nr_blocks > max {
            return Some(MapProblem::TooMany { max });
        }
        (0..).zip(blocks).find_map(|(index, phys)| {
            let why = self.take(phys.0, phys.0 + (bytes - 1), owner).err()?;
            Some(MapProblem::Entry { index, value: phys.0, why })
        })
    }

    /// Takes a block for `owner`; the reason if another one has a byte of it.
    fn take(&mut self, first: u64, last: u64, owner: u64) -> Result<(), &'static str> {
        let before = self.blocks.range(..=last).next_back().map(|(start, (end, whose))| (*start, *end, *whose));
        match before {
            Some((_, end, whose)) if end >= first && whose == owner => Err("is a block that the area has already"),
            Some((_, end, _)) if end >= first => Err("is a block that another area has"),
            // Neighbors of one owner become one range, as lists of a kernel mostly are runs.
            Some((start, end, whose)) if end + 1 == first && whose == owner => {
                self.blocks.insert(start, (last, owner));
                Ok(())
            }
            _ => {
                self.blocks.insert(first, (last, owner));
                Ok(())
            }
        }
    }
}

const CHUNK: &str = "vmalloc chunk";

fn bad(phys: u64, problem: MapProblem) -> Error {
    Error::Map { node: CHUNK, phys, problem }
}

impl Vmalloc {
    /// Follows the list. Each chunk is visited once; chunks and blocks belong to one `owner`. There cannot be more blocks
    /// than the chunks hold, nor than the memory has room for.
    ///
    /// # Errors
    /// [`Error::Map`] for a chunk that is unaligned, outside memory or visited before, an address that is no page's or in
    /// a block before, too many blocks, or an order that cannot be. A `total_pages` that is not the sum is no error: see [`Vmalloc::pages`].
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
        let max = memory.room().blocks();
        let mut area = Vmalloc { descriptor, page, order, chunks: Vec::new(), blocks: Vec::new() };
        let mut at = first;
        while at != 0 {
            if !at.is_multiple_of(page.bytes()) {
                return Err(bad(at, MapProblem::Unaligned { page: page.bytes() }));
            }
            if !seen.insert(at) {
                return Err(bad(at, MapProblem::Cycle));
            }
            owners.lock().check(at, owner)?;
            // Not locked here: a reader of the caller may read the handover itself.
            let bytes = memory.read_vec(CHUNK, Phys(at), page.bytes()).map_err(|e| match e.absent() {
                Some(_) => e,
                None => bad(at, MapProblem::Outside { len: page.bytes() }),
            })?;
            let words = <[U64]>::ref_from_bytes(&bytes).unwrap_or_default();
            let Some((next, addresses)) = words.split_first() else { break };
            area.chunks.push(Phys(at));
            let from = area.blocks.len();
            for (index, phys) in (0..).zip(addresses.iter().map(|a| a.get()).take_while(|a| *a != 0)) {
                if page.check_folio(page.pfn(Phys(phys)), order).is_err() || phys % page.bytes() != 0 {
                    return Err(bad(at, MapProblem::Entry { index, value: phys, why: NO_BLOCK }));
                }
                area.blocks.push(Phys(phys));
            }
            let mut listed = owners.lock();
            // Another thread may have read the chunk since.
            if !listed.check(at, owner)? {
                let problem = listed.take_all(&area.blocks[from..], page.folio_bytes(order), owner, max);
                listed.chunks.insert(at, (owner, problem));
                if let Some(problem) = problem {
                    return Err(bad(at, problem));
                }
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
    /// [`Error::OutOfRange`] past its end; [`Error::OutsideMemory`] for a page that is not here.
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
    /// record of a kernel is, and what follows the end of the data may be as large as a header claims.
    ///
    /// # Errors
    /// As [`Vmalloc::copy`].
    pub fn records(&self, memory: &dyn PhysMemory, size: usize, most: u64) -> Result<Vec<u8>> {
        let mut records = Vec::new();
        self.each_records(memory, size, most, |window| {
            records.reserve_exact(window.len());
            records.extend_from_slice(window);
            Ok(())
        })?;
        Ok(records)
    }

    /// Calls `take` with the records that [`Vmalloc::records`] returns, in windows.
    ///
    /// # Errors
    /// As [`Vmalloc::copy`], and what `take` returns.
    pub fn each_records(
        &self,
        memory: &dyn PhysMemory,
        size: usize,
        most: u64,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        const WINDOW: u64 = 1 << 16;
        let total = most.min(self.nbytes() / size as u64);
        let mut window = Vec::new();
        let mut done = 0;
        while done < total {
            let count = WINDOW.min(total - done);
            window.resize(usize::try_from(count).unwrap_or(0) * size, 0);
            self.copy(memory, done * size as u64, &mut window)?;
            let empty = window.chunks_exact(size).position(|record| record.iter().all(|byte| *byte == 0));
            if let Some(empty) = empty {
                return take(&window[..empty * size]);
            }
            take(&window)?;
            done += count;
        }
        Ok(())
    }
}
