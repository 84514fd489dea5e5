//! The address pair of a block, as kho-v1's chunks hold it, and the rule that computes it.

#![forbid(unsafe_code)]

use super::block::Block;

/// Physical addresses, little-endian: of the folio that a block's bit 0 stands for, and of the block.
pub type BitmapPlace = [u64; 2];

/// How an index and a pointer become a [`BitmapPlace`].
#[derive(Clone, Copy)]
pub(super) struct Rule {
    /// Bytes from one block's first folio to the next one's.
    pub(super) stride: u64,
    /// The pointers that this holds for, and the physical address of the first of them.
    pub(super) within: usize,
    pub(super) len: usize,
    pub(super) first: u64,
}

impl Rule {
    /// `None` for a block that lies elsewhere.
    pub(super) fn place(self, index: u64, block: Block) -> Option<BitmapPlace> {
        let offset = block.addr().wrapping_sub(self.within);
        (offset < self.len).then(|| [index.wrapping_mul(self.stride).to_le(), (self.first + offset as u64).to_le()])
    }
}
