//! Page size and block size, and the addresses at which blocks begin.

#![forbid(unsafe_code)]

use super::block::Shape;
use crate::error::{Error, Result};
use crate::units::{Order, PageSize, Pfn, Phys};

/// Page size and block size: 512 bytes (Linux 6.16 and 6.17) or one page (6.18 and later).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    page: PageSize,
    block_bytes: u64,
}

impl Geometry {
    /// The block size of Linux 6.16 and 6.17, PRESERVE_BITS / 8.
    pub const SMALL: u64 = 512;

    /// # Errors
    /// [`Error::BitmapBytes`] unless `block_bytes` is 512 or the page size.
    pub fn new(page: PageSize, block_bytes: u64) -> Result<Self> {
        if block_bytes != Self::SMALL && block_bytes != page.bytes() {
            return Err(Error::BitmapBytes { bytes: block_bytes, page: page.bytes() });
        }
        Ok(Geometry { page, block_bytes })
    }

    /// Blocks of one page.
    pub const fn paged(page: PageSize) -> Self {
        Geometry { page, block_bytes: page.bytes() }
    }

    /// The page size.
    pub const fn page(self) -> PageSize {
        self.page
    }

    /// Bytes of a block: 512 or one page.
    pub const fn block_bytes(self) -> u64 {
        self.block_bytes
    }

    /// Folios a block speaks for.
    pub const fn bits(self) -> u64 {
        self.block_bytes * 8
    }

    pub(super) const fn shape(self) -> Shape {
        Shape::new(self.block_bytes)
    }

    /// log2 of the bytes from one block's first folio to the next one's: at most 19 + 36 + 16 = 71.
    const fn stride_shift(self, order: Order) -> u32 {
        self.bits().ilog2() + order.get() + self.page.shift()
    }

    /// Where block `index` begins: `index * bits << (order + PAGE_SHIFT)` (kernel/kexec_handover.c), exact for every
    /// index below [`Geometry::index_limit`].
    pub const fn phys_start(self, order: Order, index: u64) -> Phys {
        match self.stride_shift(order) {
            shift @ ..64 => Phys(index << shift),
            _ => Phys(0),
        }
    }

    /// The block that begins at an address; `None` if none does.
    pub const fn index_of(self, order: Order, phys_start: Phys) -> Option<u64> {
        let index = match self.stride_shift(order) {
            shift @ ..64 => phys_start.0 >> shift,
            _ => 0,
        };
        if self.phys_start(order, index).0 == phys_start.0 { Some(index) } else { None }
    }

    /// One past the last block of an order that has a folio inside the address space.
    pub const fn index_limit(self, order: Order) -> u64 {
        self.folio_limit(order).div_ceil(self.bits())
    }

    /// The memory that a block speaks of: where it begins, and its bytes; `None` if it reaches beyond the address space.
    pub const fn span(self, order: Order, index: u64) -> Option<(Phys, u64)> {
        if self.stride_shift(order) >= 64 || index >= self.index_limit(order) {
            return None;
        }
        Some((self.phys_start(order, index), 1 << self.stride_shift(order)))
    }

    /// How many folios of an order the address space has.
    pub(super) const fn folio_limit(self, order: Order) -> u64 {
        self.page.pfn_limit() >> order.get()
    }

    /// The pfn of bit `bit` of a block, when it lies inside the address space.
    pub const fn pfn_of(self, order: Order, index: u64, bit: u64) -> Option<Pfn> {
        if index >= self.index_limit(order) || bit >= self.bits() {
            return None;
        }
        let folio = index * self.bits() + bit;
        if folio < self.folio_limit(order) { Some(Pfn(folio << order.get())) } else { None }
    }
}
