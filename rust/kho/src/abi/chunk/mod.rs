//! kho-v1's map: a list of chunks, each one page of pointers to bitmaps.
//!
//! ```text
//! preserved-memory-map -> [next|order|n|(start, bitmap)*255] -> [next|...] -> 0
//!                                               \-> bitmap: bit i = folio at start + (i << (order + PAGE_SHIFT))
//! ```

#![forbid(unsafe_code)]

mod read;
mod write;

pub use read::{check, inherit, read, walk};
pub use write::{nr_chunks, serialize};

use super::layout::{BitmapPtr, BitmapSize};
use crate::error::{Error, MapProblem, Result};
use crate::tracker::Geometry;
use crate::units::{Order, PageSize};

/// A chunk as it lies in memory. Its bitmaps are not followed yet.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The physical address of the chunk.
    pub phys: u64,
    /// The order of all its bitmaps.
    pub order: Order,
    /// Its bitmaps: where each starts, and where it lies.
    pub entries: Vec<BitmapPtr>,
}

const NODE: &str = "chunk";

/// An error about a node of this map.
pub(crate) fn bad(phys: u64, problem: MapProblem) -> Error {
    Error::Map { node: NODE, phys, problem }
}

/// The geometry of a page size and a bitmap size.
///
/// # Errors
/// None for the pairs that exist.
pub fn geometry(page: PageSize, bitmap: BitmapSize) -> Result<Geometry> {
    Geometry::new(page, bitmap.bytes(page))
}
