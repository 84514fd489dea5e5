//! Writing chunks: a tracker's bitmaps stay in place, and chunks point to them.

#![forbid(unsafe_code)]

use crate::abi::layout::{BitmapPtr, ChunkHeader, chunk_entries};
use crate::error::Result;
use crate::mapping::Items;
use crate::tracker::{BitmapPlace, Tracker};
use crate::units::{Order, Phys};

/// How many chunks a tracker takes.
pub fn nr_chunks(tracker: &Tracker) -> u64 {
    let entries = chunk_entries(tracker.geometry().page());
    tracker.orders().map(|order| tracker.nr_blocks(order).div_ceil(entries)).sum()
}

/// Writes a tracker's chunks: orders ascending, in each the bitmaps ascending, each order in chunks of its own. `alloc`
/// gives the pages, each with its address. Bitmaps stay where they are.
///
/// # Errors
/// What `alloc` returns; [`Error::Invalid`](crate::Error::Invalid) for a tracker whose blocks have no physical address.
pub fn serialize<'a>(
    tracker: &Tracker,
    mut alloc: impl FnMut() -> Result<(Phys, Items<'a, BitmapPlace>)>,
) -> Result<()> {
    // The header, as long as an entry, is written when it is known what follows.
    let write_header = |(chunk, order, num): (Items<'a, BitmapPlace>, Order, usize), next: Phys| {
        let num = u32::try_from(num).unwrap_or(u32::MAX).into();
        let header = ChunkHeader { next: next.0.into(), order: order.get().into(), num_elms: num };
        chunk.write(std::iter::once(zerocopy::transmute!(header)));
    };
    let mut last = None;
    for order in tracker.orders() {
        let mut index = 0;
        loop {
            let (phys, chunk) = alloc()?;
            let entries = chunk.from(1);
            let filled;
            (filled, index) = tracker.places_from(order, index, entries)?;
            entries.from(filled).write(std::iter::repeat([0; 2]));
            if let Some(last) = last.replace((chunk, order, filled)) {
                write_header(last, phys);
            }
            if filled < entries.len() || !tracker.has_blocks_from(order, index) {
                break;
            }
        }
    }
    if let Some(last) = last {
        write_header(last, Phys(0));
    }
    Ok(())
}

const _: () =
    assert!(size_of::<BitmapPlace>() == size_of::<BitmapPtr>() && size_of::<BitmapPlace>() == size_of::<ChunkHeader>());
