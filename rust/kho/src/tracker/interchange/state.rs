//! A tracker as bytes, for pickles and pipes. Not a kernel format.
//!
//! ```text
//! "khot" version=1 | { order: u8 | blocks: u64 | blocks * { index: u64 | bitmap } } ...      little-endian
//! ```
//! Bitmaps go whole, so that bytes never make a tracker much larger than themselves.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::tracker::Tracker;
use crate::units::Order;

const MAGIC: [u8; 5] = *b"khot\x01";

impl Tracker {
    /// Every block as bytes. Geometry is not in them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for order in self.orders() {
            let blocks = self.dirs[order.index()].blocks();
            bytes.push(order.index() as u8);
            bytes.extend(blocks.to_le_bytes());
            bytes.reserve(blocks as usize * (8 + self.shape.bytes()));
            for block in self.blocks(order) {
                bytes.extend(block.index().to_le_bytes());
                let at = bytes.len();
                bytes.resize(at + self.shape.bytes(), 0);
                block.copy_to(&mut bytes[at..]);
            }
        }
        bytes
    }

    /// Marks what [`Tracker::to_bytes`] of a tracker with the same geometry wrote.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the bytes are not that, [`Error::OrderTooLarge`] or [`Error::OutOfRange`] if they name what
    /// cannot be, and the source's. A part may be marked then.
    pub fn adopt_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let invalid = |why: &str| Error::Invalid { what: "tracker state", why: why.to_owned() };
        let cut = || invalid("cut short");
        let mut rest = bytes.strip_prefix(&MAGIC).ok_or_else(|| invalid("does not begin with \"khot\" 1"))?;
        while let Some((&order, tail)) = rest.split_first() {
            let order = Order::new(order.into())?;
            let (blocks, tail) = tail.split_first_chunk().ok_or_else(cut)?;
            rest = tail;
            for _ in 0..u64::from_le_bytes(*blocks) {
                let (index, tail) = rest.split_first_chunk().ok_or_else(cut)?;
                let (bitmap, tail) = tail.split_at_checked(self.shape.bytes()).ok_or_else(cut)?;
                self.adopt_block(order, u64::from_le_bytes(*index), bitmap)?;
                rest = tail;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::Geometry;
    use crate::units::{PageSize, Pfn};
    use proptest::prelude::*;

    fn sample() -> Tracker {
        let mut t = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
        t.preserve_pages(Pfn(3), 9000).unwrap();
        t.preserve(Pfn((1 << 52) - 1), Order::ZERO).unwrap();
        t.unpreserve(Pfn(3), Order::ZERO).unwrap();
        t
    }

    fn adopted(bytes: &[u8]) -> Result<Tracker> {
        let mut t = Tracker::new(sample().geometry());
        t.adopt_bytes(bytes).map(|()| t)
    }

    #[test]
    fn bytes_make_the_same_tracker_and_no_prefix_makes_another() {
        let bytes = sample().to_bytes();
        let copy = adopted(&bytes).unwrap();
        assert_eq!(copy, sample());
        assert_eq!(copy.to_bytes(), bytes);
        for n in 0..bytes.len() {
            if let Ok(part) = adopted(&bytes[..n]) {
                assert!(part.to_bytes() == bytes[..n]);
            }
        }
    }

    #[test]
    fn bytes_of_the_other_block_size_are_refused() {
        let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
        assert!(t.adopt_bytes(&sample().to_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_changes_to_the_bytes_never_panic(at in any::<proptest::sample::Index>(), value: u8, garbage: Vec<u8>) {
            let mut bytes = sample().to_bytes();
            let at = at.index(bytes.len());
            bytes[at] = value;
            let _ = adopted(&bytes);
            let _ = adopted(&[&MAGIC, &garbage[..]].concat());
        }
    }
}
