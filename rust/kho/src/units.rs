//! Units of physical memory, and the arithmetic the kernel repeats on them.
//!
//! An address is a [`Phys`], a page number a [`Pfn`], a size a number of pages; they convert only through
//! [`PageSize`], so that a pfn of a 64 KiB kernel is never taken for one of a 4 KiB kernel.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use core::fmt;

/// A physical address in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Phys(pub u64);

/// A page frame number: a physical address divided by the page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Pfn(pub u64);

impl fmt::Display for Phys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Phys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Phys({:#x})", self.0)
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// The log2 of a folio's size in pages: `0..=Order::MAX`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order(Level);

/// Defines an enum of consecutive numbers, so that the compiler knows the range of its values.
macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident: $($number:literal $variant:ident,)+) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        enum $name { $($variant = $number),+ }

        impl $name {
            const ALL: &[Self] = &[$($name::$variant),+];

            const fn new(number: u64) -> Option<Self> {
                match number {
                    $($number => Some($name::$variant),)+
                    _ => None,
                }
            }
        }
    };
}

numbers! {
    /// The values of an order. Indexing an array of [`Order::COUNT`] items by one needs no bounds check.
    Level:
    0 L0, 1 L1, 2 L2, 3 L3, 4 L4, 5 L5, 6 L6, 7 L7, 8 L8, 9 L9, 10 L10, 11 L11, 12 L12,
    13 L13, 14 L14, 15 L15, 16 L16, 17 L17, 18 L18, 19 L19, 20 L20, 21 L21, 22 L22, 23 L23, 24 L24, 25 L25,
    26 L26, 27 L27, 28 L28, 29 L29, 30 L30, 31 L31, 32 L32, 33 L33, 34 L34, 35 L35, 36 L36,
}

impl Order {
    /// The largest order: a bitmap of 32768 folios of 4 KiB << 36 spans 2^63 bytes, and the next one up could not
    /// say where it starts in 64 bits.
    pub const MAX: u8 = Level::L36 as u8;
    /// How many orders there are.
    pub const COUNT: usize = Level::ALL.len();
    /// A single page.
    pub const ZERO: Order = Order(Level::L0);

    /// # Errors
    /// [`Error::OrderTooLarge`] beyond [`Order::MAX`].
    pub const fn new(order: u64) -> Result<Self> {
        match Level::new(order) {
            Some(level) => Ok(Order(level)),
            None => Err(Error::OrderTooLarge { order, max: Self::MAX }),
        }
    }

    /// The largest order not above `order`.
    pub const fn saturating(order: u32) -> Self {
        match Level::new(order as u64) {
            Some(level) => Order(level),
            None => Order(Level::L36),
        }
    }

    /// Every order, ascending.
    pub fn all() -> impl DoubleEndedIterator<Item = Order> + ExactSizeIterator {
        Level::ALL.iter().map(|level| Order(*level))
    }

    /// The order as a number.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// The order as an index into an array of [`Order::COUNT`] items.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The folio's size in pages, `1 << order`.
    pub const fn nr_pages(self) -> u64 {
        1 << self.get()
    }
}

impl Default for Order {
    fn default() -> Self {
        Order::ZERO
    }
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Order({})", self.get())
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// The size of a page: 4, 16 or 64 KiB (arm64 has all three, x86_64 the first).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 16 KiB (arm64).
    Size16K,
    /// 64 KiB (arm64).
    Size64K,
}

impl PageSize {
    /// 4 KiB.
    pub const ALL: [PageSize; 3] = [PageSize::Size4K, PageSize::Size16K, PageSize::Size64K];

    /// # Errors
    /// [`Error::PageSize`] unless `bytes` is 4096, 16384 or 65536.
    pub const fn new(bytes: u64) -> Result<Self> {
        match bytes {
            0x1000 => Ok(PageSize::Size4K),
            0x4000 => Ok(PageSize::Size16K),
            0x1_0000 => Ok(PageSize::Size64K),
            _ => Err(Error::PageSize { bytes }),
        }
    }

    /// PAGE_SHIFT.
    pub const fn shift(self) -> u32 {
        match self {
            PageSize::Size4K => 12,
            PageSize::Size16K => 14,
            PageSize::Size64K => 16,
        }
    }

    /// PAGE_SIZE.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// One past the last pfn a 64-bit address can name.
    pub const fn pfn_limit(self) -> u64 {
        1 << (64 - self.shift())
    }

    /// The address of a page. Exact for every pfn below [`PageSize::pfn_limit`].
    pub const fn phys(self, pfn: Pfn) -> Phys {
        Phys(pfn.0 << self.shift())
    }

    /// The page that holds an address.
    pub const fn pfn(self, phys: Phys) -> Pfn {
        Pfn(phys.0 >> self.shift())
    }

    /// The page an address is the first byte of.
    ///
    /// # Errors
    /// [`Error::Misaligned`] inside a page.
    pub fn pfn_exact(self, what: &'static str, phys: Phys) -> Result<Pfn> {
        if phys.0 & (self.bytes() - 1) != 0 {
            return Err(Error::Misaligned { what, value: phys.0, align: self.bytes() });
        }
        Ok(self.pfn(phys))
    }

    /// Bytes in a folio of `order` (at most 64 KiB << 36 = 2^52).
    pub const fn folio_bytes(self, order: Order) -> u64 {
        self.bytes() << order.get()
    }

    /// A folio's pfn, checked: a multiple of its size, and inside the address space.
    ///
    /// # Errors
    /// [`Error::Misaligned`] or [`Error::OutOfRange`].
    #[inline]
    pub const fn check_folio(self, pfn: Pfn, order: Order) -> Result<()> {
        if pfn.0 & (order.nr_pages() - 1) != 0 {
            return Err(Error::Misaligned { what: "pfn", value: pfn.0, align: order.nr_pages() });
        }
        if pfn.0 >= self.pfn_limit() {
            return Err(Error::OutOfRange { what: "pfn", value: pfn.0, limit: self.pfn_limit() });
        }
        Ok(())
    }

    /// The end of a page range, checked.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when it runs past the address space.
    pub fn end_of(self, pfn: Pfn, nr_pages: u64) -> Result<Pfn> {
        match pfn.0.checked_add(nr_pages) {
            Some(end) if end <= self.pfn_limit() => Ok(Pfn(end)),
            _ => Err(Error::OutOfRange {
                what: "end of page range",
                value: pfn.0.saturating_add(nr_pages),
                limit: self.pfn_limit(),
            }),
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB", self.bytes() >> 10)
    }
}

/// Splits `[start, end)` into naturally aligned blocks, greedily: `order = min(ctz(pfn), ilog2(end - pfn))`
/// (`kho_preserve_pages`, kernel/kexec_handover.c).
///
/// ```text
/// pages     3   4 5 6 7   8 9 10 11 12 13 14 15   16
///          [0] [   2   ] [          3          ] [ 0 ]
/// ```
pub fn aligned_blocks(start: Pfn, end: Pfn) -> impl Iterator<Item = (Pfn, Order)> {
    let mut pfn = start.0;
    core::iter::from_fn(move || {
        let left = end.0.checked_sub(pfn).filter(|&left| left > 0)?;
        let order = Order::saturating(pfn.trailing_zeros().min(left.ilog2()));
        let block = (Pfn(pfn), order);
        pfn += order.nr_pages();
        Some(block)
    })
}

/// Cuts `[start, end)` at the pfns of `cuts` (ascending) that lie inside.
pub fn cut_at(start: Pfn, end: Pfn, cuts: &[Pfn]) -> impl Iterator<Item = (Pfn, Pfn)> + '_ {
    let inside = cuts.iter().copied().filter(move |cut| *cut > start && *cut < end);
    let mut from = start;
    inside.chain([end]).map(move |to| (std::mem::replace(&mut from, to), to))
}

/// Sorts and coalesces overlapping or adjacent ranges.
pub fn merge_ranges(mut ranges: Vec<(Pfn, Pfn)>) -> Vec<(Pfn, Pfn)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, run| {
        let joins = next.0 <= run.1;
        run.1 = if joins { run.1.max(next.1) } else { run.1 };
        joins
    });
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        let ranges =
            |pairs: &[(u64, u64)]| pairs.iter().map(|(start, end)| (Pfn(*start), Pfn(*end))).collect::<Vec<_>>();
        let all = ranges(&[(9, 10), (1, 2), (5, 6), (2, 3), (4, 8), (4, 5), (12, 14)]);
        assert_eq!(merge_ranges(all), ranges(&[(1, 3), (4, 8), (9, 10), (12, 14)]));
        assert!(merge_ranges(Vec::new()).is_empty());
    }

    #[test]
    fn an_order_beyond_the_largest_is_refused() {
        assert!(Order::new(36).is_ok());
        assert_eq!(Order::new(37).unwrap_err().to_string(), "order 37 exceeds 36");
        assert!(Order::new(u64::MAX).is_err());
    }

    #[test]
    fn the_greedy_split_of_a_range_is_the_kernels() {
        let blocks: Vec<_> = aligned_blocks(Pfn(3), Pfn(17)).map(|(p, o)| (p.0, o.get())).collect();
        assert_eq!(blocks, [(3, 0), (4, 2), (8, 3), (16, 0)]);
        assert_eq!(aligned_blocks(Pfn(5), Pfn(5)).count(), 0);
        assert_eq!(aligned_blocks(Pfn(6), Pfn(5)).count(), 0);
    }

    #[test]
    fn a_range_is_cut_only_inside() {
        let cut = |cuts: &[u64]| {
            let cuts: Vec<Pfn> = cuts.iter().map(|c| Pfn(*c)).collect();
            cut_at(Pfn(4), Pfn(10), &cuts).map(|(a, b)| (a.0, b.0)).collect::<Vec<_>>()
        };
        assert_eq!(cut(&[]), [(4, 10)]);
        assert_eq!(cut(&[2, 4, 6, 9, 10, 12]), [(4, 6), (6, 9), (9, 10)]);
    }

    #[test]
    fn the_whole_address_space_splits_into_largest_blocks() {
        let limit = PageSize::Size4K.pfn_limit();
        assert_eq!(aligned_blocks(Pfn(0), Pfn(limit)).count() as u64, limit >> 36);
    }

    proptest! {
        #[test]
        fn blocks_are_aligned_adjacent_and_cover_the_range(start in 0u64..1 << 40, len in 0u64..1 << 22) {
            let mut at = start;
            for (pfn, order) in aligned_blocks(Pfn(start), Pfn(start + len)) {
                prop_assert_eq!(pfn.0, at);
                prop_assert_eq!(pfn.0 % order.nr_pages(), 0);
                at += order.nr_pages();
            }
            prop_assert_eq!(at, start + len);
        }
    }
}
