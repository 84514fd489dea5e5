//! Reading chunks: walk the list, check it against a bitmap size, read its bitmaps or use them in place.

#![forbid(unsafe_code)]

use super::{Chunk, NODE, bad};
use crate::abi::budget::Budget;
use crate::abi::layout::{BitmapPtr, ChunkHeader, SMALL_BITMAP, chunk_entries};
use crate::abi::preserved::{InPlace, Preserved};
use crate::error::{BITMAP_OUTSIDE, Error, MapProblem, NO_BITMAP, NO_START, Result};
use crate::memory::PhysMemory;
use crate::tracker::{Bitmap, Geometry, Tracker};
use crate::units::{Order, PageSize, Phys};
use std::collections::HashSet;
use zerocopy::FromBytes;

/// Walks the list from `map`, reading every chunk once. Nothing but chunk pages is read; their number is bounded by
/// what the memory could hold.
///
/// # Errors
/// [`Error::Map`] at the first chunk that is unaligned, outside, cyclic, or whose order or count cannot be.
pub fn walk(memory: &dyn PhysMemory, page: PageSize, map: Phys) -> Result<Vec<Chunk>> {
    let most = chunk_entries(page);
    let room = memory.room();
    let mut bitmaps = 0;
    let max_chunks = memory.nbytes() / u128::from(page.bytes());
    let mut seen = HashSet::new();
    let mut chunks = Vec::new();
    let mut at = map.0;
    while at != 0 {
        if !at.is_multiple_of(page.bytes()) {
            return Err(bad(at, MapProblem::Unaligned { page: page.bytes() }));
        }
        if !memory.contains(Phys(at), page.bytes()) {
            return Err(bad(at, MapProblem::Outside { len: page.bytes() }));
        }
        if !seen.insert(at) {
            return Err(bad(at, MapProblem::Cycle));
        }
        if seen.len() as u128 > max_chunks {
            return Err(bad(at, MapProblem::TooLong { max: u64::try_from(max_chunks).unwrap_or(u64::MAX) }));
        }
        let mut header = [0; size_of::<ChunkHeader>()];
        memory.read(Phys(at), &mut header)?;
        let header = ChunkHeader::read_from_bytes(&header).map_err(|_| bad(at, MapProblem::Outside { len: 16 }))?;
        let order = Order::new(header.order.get().into())
            .map_err(|_| bad(at, MapProblem::Order { order: header.order.get().into(), max: Order::MAX }))?;
        let num = u64::from(header.num_elms.get());
        if num > most {
            return Err(bad(at, MapProblem::TooManyElements { num, max: most }));
        }
        bitmaps += num;
        if bitmaps > room.items().max(room.bitmap_bytes() / SMALL_BITMAP) || seen.len() as u64 > room.items() {
            return Err(bad(at, MapProblem::TooMany { max: room.items() }));
        }
        let len = num * size_of::<BitmapPtr>() as u64;
        let bytes = memory.read_vec(NODE, Phys(at + size_of::<ChunkHeader>() as u64), len)?;
        let entries = <[BitmapPtr]>::ref_from_bytes(&bytes).map_err(|_| bad(at, MapProblem::Outside { len }))?;
        chunks.push(Chunk { phys: at, order, entries: entries.to_vec() });
        at = header.next.get();
    }
    Ok(chunks)
}

/// Checks that chunks can be read as of one bitmap size: every bitmap is whole, in memory, 8-aligned (a page if it is
/// a page), shares no byte with another node, and starts where a bitmap of its order can start.
///
/// # Errors
/// [`Error::Map`] at the first entry for which that is not so.
pub fn check(memory: &dyn PhysMemory, geometry: Geometry, chunks: &[Chunk]) -> Result<()> {
    let bytes = geometry.block_bytes();
    let page = geometry.page().bytes();
    let align = if bytes == page { page } else { 8 };
    let mut nodes: Vec<(u64, u64, u64, u64)> = chunks.iter().map(|c| (c.phys, page, c.phys, u64::MAX)).collect();
    let mut starts = Starts::default();
    for chunk in chunks {
        for (index, entry) in (0..).zip(&chunk.entries) {
            let (start, bitmap) = (entry.phys_start.get(), entry.bitmap.get());
            let refuse = |value, why| Err(bad(chunk.phys, MapProblem::Entry { index, value, why }));
            if bitmap == 0 || bitmap % align != 0 {
                return refuse(bitmap, NO_BITMAP);
            }
            if !memory.contains(Phys(bitmap), bytes) {
                return refuse(bitmap, BITMAP_OUTSIDE);
            }
            if geometry.index_of(chunk.order, Phys(start)).is_none() {
                return refuse(start, NO_START);
            }
            if !starts.insert(chunk.order, start) {
                return refuse(start, "is where another bitmap of the same order starts");
            }
            nodes.push((bitmap, bytes, chunk.phys, index));
        }
    }
    nodes.sort_unstable();
    for pair in nodes.windows(2) {
        let [(first, len, ..), second] = pair else { continue };
        if first + len > second.0 {
            let (_, _, chunk, index) = if second.3 == u64::MAX { pair[0] } else { *second };
            let why = "is the address of a bitmap that overlaps another node of the map";
            return Err(bad(chunk, MapProblem::Entry { index, value: second.0, why }));
        }
    }
    Ok(())
}

/// Where bitmaps start. Those that ascend, as kernels write them, are a set without being put into one.
#[derive(Default)]
struct Starts {
    ascending: Vec<(Order, u64)>,
    others: HashSet<(Order, u64)>,
}

impl Starts {
    /// False for one that was there.
    fn insert(&mut self, order: Order, start: u64) -> bool {
        let start = (order, start);
        if self.ascending.last().is_none_or(|last| *last < start) {
            self.ascending.push(start);
            return !self.others.contains(&start);
        }
        self.ascending.binary_search(&start).is_err() && self.others.insert(start)
    }
}

/// Reads the bitmaps of chunks that [`check`] accepted.
///
/// # Errors
/// [`Error::Map`] where a set bit names a folio beyond the address space; what reading memory returns.
pub fn read(memory: &dyn PhysMemory, geometry: Geometry, chunks: &[Chunk]) -> Result<Tracker> {
    let mut tracker = Tracker::new(geometry);
    let mut bytes = vec![0; usize::try_from(geometry.block_bytes()).unwrap_or(0)];
    let mut left = Budget::new(memory);
    each(geometry, chunks, |bitmap| {
        let data = memory.next_to_read(bitmap.phys, Phys(bitmap.phys.0 + (geometry.block_bytes() - 1)))?;
        if !left.take(bitmap.phys.0, geometry.block_bytes(), data.is_some(), bad)? {
            return Ok(());
        }
        memory.read(bitmap.phys, &mut bytes)?;
        tracker.adopt_block(bitmap.order, bitmap.index, &bytes).map(drop)
    })?;
    Ok(tracker)
}

/// Takes over the bitmaps of chunks that [`check`] accepted, where they are.
///
/// # Errors
/// As [`read`].
pub fn inherit(arena: &dyn InPlace, geometry: Geometry, chunks: &[Chunk]) -> Result<Preserved> {
    let mut inherited = arena.collect(geometry);
    each(geometry, chunks, |bitmap| inherited.add(bitmap))?;
    inherited.finish()
}

/// Every bitmap of chunks, in their order.
fn each(geometry: Geometry, chunks: &[Chunk], mut take: impl FnMut(Bitmap) -> Result<()>) -> Result<()> {
    for chunk in chunks {
        for (i, entry) in (0..).zip(&chunk.entries) {
            let start = entry.phys_start.get();
            let beyond = || {
                let why = "is the start of a bitmap that reaches beyond the address space";
                bad(chunk.phys, MapProblem::Entry { index: i, value: start, why })
            };
            let index = geometry.index_of(chunk.order, Phys(start)).ok_or_else(beyond)?;
            let bitmap = Bitmap { order: chunk.order, index, phys: Phys(entry.bitmap.get()) };
            take(bitmap).map_err(|e| if matches!(e, Error::OutOfRange { .. }) { beyond() } else { e })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_start_is_new_once_whatever_the_order(starts in proptest::collection::vec((0..3u32, 0..8u64), 0..40)) {
            let (mut found, mut all) = (Starts::default(), HashSet::new());
            for (order, start) in starts {
                prop_assert_eq!(found.insert(Order::saturating(order), start), all.insert((order, start)));
            }
        }
    }
}
