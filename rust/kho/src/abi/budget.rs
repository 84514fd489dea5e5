//! A bound on the bytes of bitmaps that are kept of a map, by the size of the image.

#![forbid(unsafe_code)]

use crate::error::{Error, MapProblem, Result};
use crate::memory::PhysMemory;

/// The bytes of bitmaps that may still be kept of a map, and of these the ones that are zeros an image only claims.
pub(crate) struct Budget {
    max: u64,
    bytes: u64,
    claimed: u64,
}

impl Budget {
    /// Empty bitmaps that a kernel left in a map are kept, to be counted, if they are no more than this.
    const CLAIMED: u64 = 4 << 20;

    pub(crate) fn new(memory: &dyn PhysMemory) -> Self {
        let max = memory.room().bitmap_bytes();
        Budget { max, bytes: max, claimed: Self::CLAIMED }
    }

    /// Whether the bitmap at `phys` is kept: one with data always, one of zeros as long as there are few.
    ///
    /// # Errors
    /// [`Error::Map`], made by `bad`, when there are more bytes of data than the image can hold.
    pub(crate) fn take(
        &mut self,
        phys: u64,
        bytes: u64,
        data: bool,
        bad: fn(u64, MapProblem) -> Error,
    ) -> Result<bool> {
        if !data {
            let left = self.claimed.checked_sub(bytes);
            self.claimed = left.unwrap_or(self.claimed);
            return Ok(left.is_some());
        }
        self.bytes = self.bytes.checked_sub(bytes).ok_or_else(|| bad(phys, MapProblem::TooLarge { max: self.max }))?;
        Ok(true)
    }
}
