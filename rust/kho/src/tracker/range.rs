//! Marks and unmarks ranges and runs word by word; inserts copies of bitmaps.
//!
//! Whatever can fail comes first (alignment, range, blocks to make), so that a change happens whole or not at all.

#![forbid(unsafe_code)]

use super::Tracker;
use crate::error::{Error, Result};
use crate::units::{Order, Pfn, aligned_blocks};
use core::ops::Range;

impl Tracker {
    /// Marks `n` pages as the naturally aligned folios they split into (`kho_preserve_pages`). Returns how many of
    /// those were not marked yet.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] beyond the address space, and the source's; then nothing is marked that was not before.
    pub fn preserve_pages(&mut self, pfn: Pfn, n: u64) -> Result<u64> {
        let end = self.geometry.page().end_of(pfn, n)?;
        self.ensure_split(pfn, end)?;
        Ok(self.fill_split(pfn, end, true))
    }

    /// Splits as [`Tracker::preserve_pages`] does and unmarks those folios. Returns how many were marked.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] beyond the address space.
    pub fn unpreserve_pages(&mut self, pfn: Pfn, n: u64) -> Result<u64> {
        let end = self.geometry.page().end_of(pfn, n)?;
        Ok(self.fill_split(pfn, end, false))
    }

    fn ensure_split(&mut self, pfn: Pfn, end: Pfn) -> Result<()> {
        for (pfn, order) in aligned_blocks(pfn, end) {
            self.ensure(order, (pfn.0 >> order.get()) >> self.shape.log2_bits)?;
        }
        Ok(())
    }

    fn fill_split(&mut self, pfn: Pfn, end: Pfn, mark: bool) -> u64 {
        aligned_blocks(pfn, end).map(|(pfn, order)| self.fill(order, pfn.0 >> order.get(), 1, mark)).sum()
    }

    /// Marks `count` consecutive folios of one order. Returns how many were not marked yet.
    ///
    /// # Errors
    /// As [`Tracker::preserve`]; then nothing is marked that was not before.
    pub fn preserve_run(&mut self, pfn: Pfn, order: Order, count: u64) -> Result<u64> {
        let first = self.check_run(pfn, order, count)?;
        if count == 0 {
            return Ok(0);
        }
        let (last, bits) = (first + (count - 1), self.geometry.bits());
        // New blocks that the range covers entirely are allocated with all bits set. Runs of these, in folios:
        let mut full: Vec<Range<u64>> = Vec::new();
        for index in first >> self.shape.log2_bits..=last >> self.shape.log2_bits {
            let block = index * bits..(index + 1) * bits;
            let whole = block.start >= first && block.end <= last + 1 && self.dirs[order.index()].get(index).is_none();
            let made = match whole {
                true => self.make_full(order, index),
                false => self.ensure(order, index).map(drop),
            };
            match (made, full.last_mut()) {
                (Err(error), _) => {
                    for run in full {
                        self.fill(order, run.start, run.end - run.start, false);
                    }
                    return Err(error);
                }
                (Ok(()), Some(run)) if whole && run.end == block.start => run.end = block.end,
                (Ok(()), _) if whole => full.push(block),
                (Ok(()), _) => {}
            }
        }
        let (mut at, mut new) = (first, 0);
        for run in full {
            new += self.fill(order, at, run.start - at, true) + (run.end - run.start);
            at = run.end;
        }
        Ok(new + self.fill(order, at, last + 1 - at, true))
    }

    /// Unmarks `count` consecutive folios of one order. Returns how many were marked.
    ///
    /// # Errors
    /// [`Error::Misaligned`] or [`Error::OutOfRange`].
    pub fn unpreserve_run(&mut self, pfn: Pfn, order: Order, count: u64) -> Result<u64> {
        let first = self.check_run(pfn, order, count)?;
        Ok(self.fill(order, first, count, false))
    }

    /// The number of the run's first folio, once the run is known to lie inside the address space.
    fn check_run(&self, pfn: Pfn, order: Order, count: u64) -> Result<u64> {
        let page = self.geometry.page();
        if count == 0 && pfn.0 == page.pfn_limit() {
            return Ok(pfn.0 >> order.get());
        }
        page.check_folio(pfn, order)?;
        let first = pfn.0 >> order.get();
        let limit = self.geometry.folio_limit(order);
        if count > limit - first {
            return Err(Error::OutOfRange {
                what: "end of the run's last folio, pfn",
                value: pfn.0.saturating_add(count.saturating_mul(order.nr_pages())),
                limit: page.pfn_limit(),
            });
        }
        Ok(first)
    }

    /// Marks the folios `first + bit`, by number, of the bits set; `first` is a multiple of 64, or all bits stay in its word.
    pub(crate) fn preserve_bits(&mut self, order: Order, first: u64, bits: u64) -> Result<()> {
        let block = self.ensure(order, first >> self.shape.log2_bits)?;
        self.dirs[order.index()].len += block.mask(self.shape, (first >> 6) as usize, bits << (first & 63), true);
        Ok(())
    }

    /// Sets or clears the bits of folios `first .. first + count` in the blocks that exist. Returns how many changed.
    pub(super) fn fill(&mut self, order: Order, first: u64, count: u64, mark: bool) -> u64 {
        let dir = &mut self.dirs[order.index()];
        let changed = dir.fill(self.shape, first..first + count, mark);
        dir.len = if mark { dir.len + changed } else { dir.len - changed };
        changed
    }

    /// Marks what a bitmap of `block_bytes` bytes says about block `index` (bit `i` is byte `i / 8`, bit `i % 8`); the
    /// block exists afterwards even if nothing is set. Returns how many folios were not marked yet.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if the block, or a bit that is set, lies beyond the address space; [`Error::Invalid`] if the
    /// bitmap is not `block_bytes` long; the source's.
    pub fn adopt_block(&mut self, order: Order, index: u64, bitmap: &[u8]) -> Result<u64> {
        let shape = self.shape;
        if bitmap.len() != shape.bytes() {
            return Err(Error::Invalid {
                what: "bitmap",
                why: format!("{} bytes are not {}", bitmap.len(), shape.bytes()),
            });
        }
        let limit = self.geometry.index_limit(order);
        if index >= limit {
            return Err(Error::OutOfRange { what: "block", value: index, limit });
        }
        let words = || {
            let (words, _) = bitmap.as_chunks::<8>();
            words.iter().map(|&bytes| u64::from_le_bytes(bytes))
        };
        let first = index << shape.log2_bits;
        let last = words()
            .enumerate()
            .rfind(|&(_, word)| word != 0)
            .map(|(n, word)| first + 64 * n as u64 + u64::from(word.ilog2()));
        if let Some(last) = last
            && last >= self.geometry.folio_limit(order)
        {
            // Reached only for an order whose blocks are longer than the address space, so this is at most 2^19 << 36.
            return Err(Error::OutOfRange {
                what: "pfn of a bit set",
                value: last << order.get(),
                limit: self.geometry.page().pfn_limit(),
            });
        }
        self.ensure(order, index)?;
        Ok(self.merge_block(order, index, words()))
    }

    /// ORs words into a block that exists. Returns how many bits that set.
    pub(super) fn merge_block(&mut self, order: Order, index: u64, words: impl Iterator<Item = u64>) -> u64 {
        let shape = self.shape;
        let dir = &mut self.dirs[order.index()];
        let Some(block) = dir.get(index) else {
            return 0;
        };
        let mut flips = 0;
        for (n, new) in words.enumerate().take(shape.words()) {
            let old = block.load(shape, n);
            block.store(shape, n, old | new);
            flips += u64::from((new & !old).count_ones());
        }
        dir.len += flips;
        flips
    }
}
