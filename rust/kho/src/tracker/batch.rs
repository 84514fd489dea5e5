//! Many folios at once, given by their pfns in any order.
//!
//! The floor of a random bit is a cache miss, so a long list is first scattered to buckets, each a stretch of bitmaps that
//! fits the second-level cache, and a bucket is carried out when it is full:
//!
//! ```text
//! pfns --look--> blocks made --scatter--> | bucket | bucket | ... | --full--> bits of 128 KiB of bitmaps
//! ```
//! A list that ascends needs none of that: its bits come word by word.

use super::block::{Block, Shape};
use super::directory::Directory;
use super::{Tracker, simd};
use crate::error::{Error, Result};
use crate::units::{Order, Pfn};

/// Pfns that may lie in memory of somebody else: they are copied, a few at a time, before they are looked at.
pub trait Words: Sync {
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `into.len()` words from word `at` on, which the caller keeps inside `len`.
    fn copy(&self, at: usize, into: &mut [u64]);
}

impl Words for [u64] {
    fn len(&self) -> usize {
        <[u64]>::len(self)
    }

    fn copy(&self, at: usize, into: &mut [u64]) {
        into.copy_from_slice(&self[at..at + into.len()]);
    }
}

/// The orders of a list of pfns.
#[derive(Clone, Copy, Debug)]
pub enum Orders<'a> {
    /// All have this one.
    One(Order),
    /// Each has its own, in the list's order.
    Each(&'a [u8]),
}

/// Words copied at a time.
const PIECE: usize = 1024;
/// Lists up to here are taken as they come.
const SHORT: usize = 256;
/// Buckets a list is scattered to, at the most.
const BUCKETS: usize = 256;
/// log2 of the bits of a bucket, at the least: 128 KiB of bitmaps.
const BUCKET_BITS: u32 = 20;
/// Folios a bucket holds, at the most.
const BUCKET_LEN: usize = 8192;
/// Blocks that a list may span to be scattered: what a table of that many bytes can tell apart.
const SPAN: usize = 1 << 18;

/// What a list of folios of one order is like.
struct Look {
    order: Order,
    /// The lowest and the highest folio, by number.
    low: u64,
    high: u64,
    /// How many are lower than the one before.
    descents: usize,
    /// For each block, by the low bits of its index, whether a folio lies in it. Exact if the list spans no more than that.
    touched: Vec<bool>,
}

impl Tracker {
    /// Marks many folios. Returns how many were not marked yet.
    ///
    /// # Errors
    /// As [`Tracker::preserve`], for the first in the list, and [`Error::Invalid`] if there are not as many orders as pfns;
    /// then nothing is marked that was not before.
    pub fn preserve_many(&mut self, pfns: &(impl Words + ?Sized), orders: Orders<'_>) -> Result<u64> {
        let order = match orders {
            Orders::One(order) if pfns.len() > SHORT => order,
            Orders::Each(of) if pfns.len() > SHORT => {
                let groups = self.by_order(pfns, of)?;
                for (order, group) in &groups {
                    let look = self.look(&**group, *order)?;
                    self.make(&**group, &look)?;
                }
                return Ok(groups.iter().map(|(order, group)| self.change::<true>(&**group, *order)).sum());
            }
            _ => return self.preserve_short(pfns, orders),
        };
        let look = self.look(pfns, order)?;
        self.make(pfns, &look)?;
        Ok(self.change_as::<true>(pfns, &look))
    }

    fn preserve_short(&mut self, pfns: &(impl Words + ?Sized), orders: Orders<'_>) -> Result<u64> {
        let page = self.geometry.page();
        each(pfns, orders, |pfn, order| {
            page.check_folio(pfn, order)?;
            self.ensure(order, (pfn.0 >> order.get()) >> self.shape.log2_bits).map(drop)
        })?;
        let mut new = 0;
        each(pfns, orders, |pfn, order| self.preserve(pfn, order).map(|added| new += u64::from(added)))?;
        Ok(new)
    }

    /// Unmarks many folios. Returns how many were marked.
    ///
    /// # Errors
    /// As [`Tracker::preserve_many`], but it needs no memory; then nothing is unmarked.
    pub fn unpreserve_many(&mut self, pfns: &(impl Words + ?Sized), orders: Orders<'_>) -> Result<u64> {
        match orders {
            Orders::One(order) => {
                let look = self.look(pfns, order)?;
                Ok(self.change_as::<false>(pfns, &look))
            }
            Orders::Each(of) => {
                let groups = self.by_order(pfns, of)?;
                Ok(groups.iter().map(|(order, group)| self.change::<false>(&**group, *order)).sum())
            }
        }
    }

    /// For each folio 1 if it is marked, else 0, as [`Tracker::contains`] says.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are not as many orders, or places in `found`, as pfns; [`Error::OrderTooLarge`].
    pub fn contains_many(&self, pfns: &(impl Words + ?Sized), orders: Orders<'_>, found: &mut [u8]) -> Result<()> {
        if found.len() != pfns.len() {
            return Err(Error::Invalid {
                what: "found",
                why: format!("{} places for {} pfns", found.len(), pfns.len()),
            });
        }
        let mut places = found.iter_mut();
        each(pfns, orders, |pfn, order| {
            if let Some(place) = places.next() {
                *place = self.contains(pfn, order).into();
            }
            Ok(())
        })
    }

    /// The pfns of each order, all checked.
    fn by_order(&self, pfns: &(impl Words + ?Sized), orders: &[u8]) -> Result<Vec<(Order, Vec<u64>)>> {
        let mut groups: Vec<(Order, Vec<u64>)> = Order::all().map(|order| (order, Vec::new())).collect();
        let page = self.geometry.page();
        each(pfns, Orders::Each(orders), |pfn, order| {
            page.check_folio(pfn, order)?;
            groups[order.index()].1.push(pfn.0);
            Ok(())
        })?;
        groups.retain(|(_, group)| !group.is_empty());
        Ok(groups)
    }

    /// Reads a list once, and checks every pfn.
    fn look(&self, pfns: &(impl Words + ?Sized), order: Order) -> Result<Look> {
        let limit = self.geometry.folio_limit(order);
        let mut look = Look { order, low: u64::MAX, high: 0, descents: 0, touched: vec![false; SPAN] };
        let mut last = 0;
        let log2_bits = self.shape.log2_bits;
        folios(pfns, order, |piece| {
            let (low, high, descents) = simd::survey(piece, last);
            if high >= limit {
                let page = self.geometry.page();
                return piece.iter().try_for_each(|folio| page.check_folio(Pfn(folio.rotate_left(order.get())), order));
            }
            last = piece.last().copied().unwrap_or(last);
            (look.low, look.high) = (look.low.min(low), look.high.max(high));
            look.descents += descents;
            for &folio in piece.iter() {
                look.touched[(folio >> log2_bits) as usize & (SPAN - 1)] = true;
            }
            Ok(())
        })?;
        Ok(look)
    }

    /// Makes the blocks that a list of folios needs.
    fn make(&mut self, pfns: &(impl Words + ?Sized), look: &Look) -> Result<()> {
        let log2_bits = self.shape.log2_bits;
        let (first, last) = (look.low >> log2_bits, look.high >> log2_bits);
        if pfns.is_empty() {
            return Ok(());
        }
        if last - first < SPAN as u64 {
            for index in (first..=last).filter(|index| look.touched[*index as usize & (SPAN - 1)]) {
                self.ensure(look.order, index)?;
            }
            return Ok(());
        }
        folios(pfns, look.order, |piece| {
            for folio in piece.iter().filter(|folio| **folio <= look.high) {
                self.ensure(look.order, folio >> log2_bits)?;
            }
            Ok(())
        })
    }

    fn change<const MARK: bool>(&mut self, pfns: &(impl Words + ?Sized), order: Order) -> u64 {
        // The list was looked at before, and is nobody else's.
        self.look(pfns, order).map_or(0, |look| self.change_as::<MARK>(pfns, &look))
    }

    /// Sets or clears the bits of a list, in the blocks there are. Returns how many changed.
    fn change_as<const MARK: bool>(&mut self, pfns: &(impl Words + ?Sized), look: &Look) -> u64 {
        let shape = self.shape;
        let Some(dir) = self.dirs.get_mut(look.order.index()) else { return 0 };
        if pfns.is_empty() {
            return 0;
        }
        let mut changed = 0;
        let log2_bits = shape.log2_bits;
        let blocks = (look.high >> log2_bits) - (look.low >> log2_bits);
        let result = if look.descents < pfns.len() / 8 {
            folios(pfns, look.order, |piece| {
                changed += by_word::<MARK>(dir, shape, piece);
                Ok(())
            })
        } else if blocks < SPAN as u64 && (look.high - look.low) >> BUCKET_BITS > 1 {
            changed += scatter::<MARK>(dir, shape, pfns, look);
            Ok(())
        } else {
            folios(pfns, look.order, |piece| {
                changed += one_by_one::<MARK>(dir, shape, piece);
                Ok(())
            })
        };
        debug_assert!(result.is_ok());
        dir.len = if MARK { dir.len + changed } else { dir.len - changed };
        changed
    }
}

/// Carries out folios in the order they have.
fn one_by_one<const MARK: bool>(dir: &Directory, shape: Shape, folios: &[u64]) -> u64 {
    let mut changed = 0;
    for &folio in folios {
        if let Some(block) = dir.get(folio >> shape.log2_bits) {
            changed += u64::from(if MARK { block.set(shape, folio) } else { block.clear(shape, folio) });
        }
    }
    changed
}

/// Carries out folios that mostly ascend: the bits of a word at once.
fn by_word<const MARK: bool>(dir: &Directory, shape: Shape, folios: &[u64]) -> u64 {
    let mut changed = 0;
    let mut at = 0;
    let mut current: Option<(u64, Option<Block>)> = None;
    while let Some(&folio) = folios.get(at) {
        let (word, mut mask) = (folio >> 6, 0);
        while let Some(&next) = folios.get(at).filter(|next| **next >> 6 == word) {
            mask |= 1 << (next & 63);
            at += 1;
        }
        let index = folio >> shape.log2_bits;
        let block = match current {
            Some((same, block)) if same == index => block,
            _ => dir.get(index),
        };
        current = Some((index, block));
        if let Some(block) = block {
            changed += block.mask(shape, word as usize, mask, MARK);
        }
    }
    changed
}

/// Carries out folios in any order, a bucket at a time.
fn scatter<const MARK: bool>(dir: &Directory, shape: Shape, pfns: &(impl Words + ?Sized), look: &Look) -> u64 {
    let spread = (look.high - look.low) / BUCKETS as u64 + 1;
    let shift = (u64::BITS - spread.leading_zeros()).max(BUCKET_BITS).max(shape.log2_bits);
    let (base, mask) = (look.low >> shift, (1u64 << shift) - 1);
    let buckets = ((look.high >> shift) - base + 1) as usize;
    let len = (2 * pfns.len() / buckets).next_power_of_two().clamp(64, BUCKET_LEN);
    let mut held = vec![0u32; buckets * len];
    let mut fill = vec![0u32; buckets];
    let mut changed = 0;
    let mut empty = |bucket: usize, held: &[u32]| {
        let first = (base + bucket as u64) << (shift - shape.log2_bits);
        changed += carry_out::<MARK>(dir, shape, first, held);
    };
    let result = folios(pfns, look.order, |piece| {
        for &folio in piece.iter() {
            // What was changed since it was looked at may lie anywhere.
            let bucket = (folio >> shift).wrapping_sub(base) as usize;
            let Some(n) = fill.get_mut(bucket) else { continue };
            let at = bucket * len;
            held[at + *n as usize] = (folio & mask) as u32;
            *n += 1;
            if *n as usize == len {
                empty(bucket, &held[at..at + len]);
                *n = 0;
            }
        }
        Ok(())
    });
    debug_assert!(result.is_ok());
    for (bucket, n) in fill.iter().enumerate() {
        empty(bucket, &held[bucket * len..][..*n as usize]);
    }
    changed
}

/// Carries out folios of one bucket, numbered from block `first` on.
fn carry_out<const MARK: bool>(dir: &Directory, shape: Shape, first: u64, folios: &[u32]) -> u64 {
    let mut changed = 0;
    for &folio in folios {
        let folio = u64::from(folio);
        if let Some(block) = dir.get(first + (folio >> shape.log2_bits)) {
            changed += u64::from(if MARK { block.set(shape, folio) } else { block.clear(shape, folio) });
        }
    }
    changed
}

/// Calls `f` for piece after piece of a list: the folios' numbers, which are too large where the pfn is not aligned.
fn folios(pfns: &(impl Words + ?Sized), order: Order, mut f: impl FnMut(&mut [u64]) -> Result<()>) -> Result<()> {
    let mut piece = [0; PIECE];
    for at in (0..pfns.len()).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(pfns.len() - at)];
        pfns.copy(at, piece);
        for pfn in piece.iter_mut() {
            *pfn = pfn.rotate_right(order.get());
        }
        f(piece)?;
    }
    Ok(())
}

/// Calls `f` for each folio of a list.
fn each(pfns: &(impl Words + ?Sized), orders: Orders<'_>, mut f: impl FnMut(Pfn, Order) -> Result<()>) -> Result<()> {
    if let Orders::Each(orders) = orders
        && orders.len() != pfns.len()
    {
        return Err(Error::Invalid { what: "order", why: format!("{} orders for {} pfns", orders.len(), pfns.len()) });
    }
    let mut piece = [0; PIECE];
    for at in (0..pfns.len()).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(pfns.len() - at)];
        pfns.copy(at, piece);
        for (n, &pfn) in piece.iter().enumerate() {
            let order = match orders {
                Orders::One(order) => order,
                Orders::Each(orders) => Order::new(orders[at + n].into())?,
            };
            f(Pfn(pfn), order)?;
        }
    }
    Ok(())
}
