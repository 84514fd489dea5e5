//! Many folios at once, given by their pfns in any order.
//!
//! The floor of a random bit is a cache miss, so a long list is first scattered to buckets, each a stretch of bitmaps that
//! fits the second-level cache, and a bucket is carried out when it is full:
//!
//! ```text
//! pfns --look--> blocks made --scatter--> | bucket | bucket | ... | --full--> bits of 128 KiB of bitmaps
//! ```
//! A list that ascends needs none of that: its bits come word by word.

use super::block::{Block, LINE, Shape};
use super::directory::Directory;
use super::{Tracker, simd};
use crate::error::{Error, Result};
use crate::units::{Order, Pfn};
use core::ops::Range;

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
const SHORT: usize = 2048;
/// Buckets a list is scattered to, at the most, for each tracker that is looked at.
const BUCKETS: u64 = 256;
/// log2 of the bits of a bucket, at the least: 128 KiB of bitmaps.
const BUCKET_BITS: u32 = 20;
/// log2 of the folios a bucket holds, at the most: 16 MiB of memory for 256 buckets, several for each line of bitmaps.
const BUCKET_LEN: u32 = 14;
/// Folios that share a cache line.
const LINE_BITS: usize = 64 * LINE;
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
            _ if pfns.len() <= SHORT => {
                let page = self.geometry.page();
                each(pfns, orders, |pfn, order| page.check_folio(pfn, order))?;
                let mut gone = 0;
                each(pfns, orders, |pfn, order| self.unpreserve(pfn, order).map(|was| gone += u64::from(was)))?;
                Ok(gone)
            }
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
        let mut bad = None;
        folios(pfns, order, u64::MAX, |piece| {
            let (low, high, descents) = simd::survey(piece, last);
            last = piece.last().copied().unwrap_or(last);
            (look.low, look.high) = (look.low.min(low), look.high.max(high));
            look.descents += descents;
            if high >= limit {
                bad = bad.or_else(|| piece.iter().copied().find(|folio| *folio >= limit));
            }
            for &folio in piece {
                look.touched[(folio >> log2_bits) as usize & (SPAN - 1)] = true;
            }
        });
        match bad {
            Some(folio) => {
                self.geometry.page().check_folio(Pfn(folio.rotate_left(order.get())), order)?;
                Err(Error::Invalid { what: "pfns", why: "they changed while they were read".into() })
            }
            None => Ok(look),
        }
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
        let mut made = Ok(());
        folios(pfns, look.order, look.high, |piece| {
            for folio in piece.iter().filter(|folio| **folio <= look.high) {
                if made.is_ok() {
                    made = self.ensure(look.order, folio >> log2_bits).map(drop);
                }
            }
        });
        made
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
        if look.descents < pfns.len() / 8 {
            folios(pfns, look.order, look.high, |piece| changed += by_word::<MARK>(dir, shape, piece));
        } else {
            let mut change = Change::<MARK> { dir, shape, changed: 0 };
            look.visit(pfns, shape.log2_bits, 1, &mut change);
            changed = change.changed;
        }
        dir.len = if MARK { dir.len + changed } else { dir.len - changed };
        changed
    }

    /// Marks folios that `from` marks and this tracker does not yet, and marks them in `also`, where they are not: all, or
    /// none if that is not so for one of them; then false.
    ///
    /// # Errors
    /// As [`Tracker::preserve_many`].
    pub(crate) fn take_many(
        &mut self,
        from: &Tracker,
        mut also: Option<&mut Tracker>,
        pfns: &(impl Words + ?Sized),
        order: Order,
    ) -> Result<bool> {
        if pfns.is_empty() {
            return Ok(true);
        }
        let look = self.look(pfns, order)?;
        self.make(pfns, &look)?;
        if let Some(also) = &mut also {
            also.look(pfns, order).and_then(|look| also.make(pfns, &look))?;
        }
        let log2_bits = self.shape.log2_bits.max(from.shape.log2_bits);
        let log2_bits = log2_bits.max(also.as_ref().map_or(0, |also| also.shape.log2_bits));
        let (Some(source), Some(mine)) = (from.dirs.get(order.index()), self.dirs.get(order.index())) else {
            return Ok(false);
        };
        let more = also.as_ref().and_then(|also| Some((also.dirs.get(order.index())?, also.shape)));
        let mut take = Take {
            from: (source, from.shape),
            mine: Change { dir: mine, shape: self.shape, changed: 0 },
            also: more.map(|(dir, shape)| Change { dir, shape, changed: 0 }),
        };
        if !look.visit(pfns, log2_bits, 3, &mut take) {
            // A list is visited in the same order every time.
            look.visit(pfns, log2_bits, 3, &mut GiveBack { left: take.mine.changed, take });
            return Ok(false);
        }
        let (taken, also_taken) = (take.mine.changed, take.also.map_or(0, |also| also.changed));
        self.dirs[order.index()].len += taken;
        if let Some(also) = also {
            also.dirs[order.index()].len += also_taken;
        }
        Ok(true)
    }
}

impl Look {
    /// Shows a visitor the folios of the list, neighbours after neighbours if that pays, until it wants no more; then false.
    /// `trackers`: how many bitmaps it looks at for each.
    fn visit(&self, pfns: &(impl Words + ?Sized), log2_bits: u32, trackers: u64, visitor: &mut impl Visitor) -> bool {
        let blocks = (self.high >> log2_bits) - (self.low >> log2_bits);
        if self.descents >= pfns.len() / 8 && blocks < SPAN as u64 && (self.high - self.low) >> BUCKET_BITS > 1 {
            return self.scatter(pfns, log2_bits, trackers, visitor);
        }
        let mut more = true;
        folios(pfns, self.order, self.high, |piece| more = more && visitor.visit(piece.iter().copied()));
        more
    }

    fn scatter(&self, pfns: &(impl Words + ?Sized), log2_bits: u32, trackers: u64, visitor: &mut impl Visitor) -> bool {
        let spread = (self.high - self.low) / (BUCKETS * trackers) + 1;
        let least = BUCKET_BITS - trackers.ilog2();
        let shift = (u64::BITS - spread.leading_zeros()).max(least).max(log2_bits);
        let (base, mask) = (self.low >> shift, (1u64 << shift) - 1);
        let buckets = ((self.high >> shift) - base + 1) as usize;
        let log2_len = (2 * pfns.len() / buckets).next_power_of_two().ilog2().clamp(6, BUCKET_LEN);
        let mut held = vec![0u32; buckets << log2_len];
        let mut fill = vec![0u32; buckets];
        let lines = (1usize << shift) / LINE_BITS;
        let mut more = true;
        let mut empty = |bucket: usize, held: &[u32]| {
            let first = (base + bucket as u64) << shift;
            if held.len() > lines / 2 {
                visitor.ready(first..first + mask + 1);
            }
            visitor.visit(held.iter().map(|low| first + u64::from(*low)))
        };
        folios(pfns, self.order, self.high, |piece| {
            for &folio in piece {
                // What was changed since it was looked at may lie anywhere.
                let bucket = (folio >> shift).wrapping_sub(base) as usize;
                let Some(n) = fill.get_mut(bucket) else { continue };
                let at = bucket << log2_len;
                held[at + *n as usize] = (folio & mask) as u32;
                *n += 1;
                if *n >> log2_len != 0 {
                    more = more && empty(bucket, &held[at..at + (1 << log2_len)]);
                    *n = 0;
                }
            }
        });
        for (bucket, n) in fill.iter().enumerate() {
            more = more && empty(bucket, &held[bucket << log2_len..][..*n as usize]);
        }
        more
    }
}

/// What is done with the folios of a list.
trait Visitor {
    /// Told what folios come next when many of them do.
    fn ready(&self, folios: Range<u64>);

    /// Some folios, in the order in which they are shown every time. False if no more are wanted.
    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool;
}

/// Sets or clears bits in the blocks there are.
struct Change<'a, const MARK: bool> {
    dir: &'a Directory,
    shape: Shape,
    changed: u64,
}

impl<const MARK: bool> Visitor for Change<'_, MARK> {
    fn ready(&self, folios: Range<u64>) {
        self.dir.prefetch(self.shape, folios);
    }

    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool {
        for folio in folios {
            if let Some(block) = self.dir.get(folio >> self.shape.log2_bits) {
                self.changed +=
                    u64::from(if MARK { block.set(self.shape, folio) } else { block.clear(self.shape, folio) });
            }
        }
        true
    }
}

/// Sets bits that are set in one tracker and not in the other, and in a third.
struct Take<'a> {
    from: (&'a Directory, Shape),
    mine: Change<'a, true>,
    also: Option<Change<'a, true>>,
}

impl Visitor for Take<'_> {
    fn ready(&self, folios: Range<u64>) {
        self.from.0.prefetch(self.from.1, folios.clone());
        self.mine.ready(folios.clone());
        if let Some(also) = &self.also {
            also.ready(folios);
        }
    }

    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool {
        let (dir, shape) = self.from;
        let there = |folio: u64| dir.get(folio >> shape.log2_bits).is_some_and(|block| block.test(shape, folio));
        let mut wanted = 0;
        if !folios.clone().fold(true, |all, folio| all & there(folio)) {
            return false;
        }
        for folio in folios.clone() {
            let before = self.mine.changed;
            self.mine.visit(std::iter::once(folio));
            if self.mine.changed == before {
                break;
            }
            wanted += 1;
        }
        let all = folios.clone().nth(wanted).is_none();
        if let Some(also) = &mut self.also {
            also.visit(folios.take(wanted));
        }
        all
    }
}

/// Clears the first bits that were set.
struct GiveBack<'a> {
    take: Take<'a>,
    left: u64,
}

impl Visitor for GiveBack<'_> {
    fn ready(&self, _: Range<u64>) {}

    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool {
        let back = |to: &Change<'_, true>, n: u64| {
            let folios = folios.clone().take(usize::try_from(n).unwrap_or(usize::MAX));
            let mut clear = Change::<false> { dir: to.dir, shape: to.shape, changed: 0 };
            clear.visit(folios);
            clear.changed
        };
        let given = back(&self.take.mine, self.left);
        self.take.also.as_ref().map(|also| back(also, self.left));
        self.left -= given;
        self.left > 0
    }
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

/// Calls `f` for piece after piece of a list: the folios' numbers, which are too large where the pfn is not aligned. One above
/// `high` was not there when the list was looked at, and is that of no folio.
fn folios(pfns: &(impl Words + ?Sized), order: Order, high: u64, mut f: impl FnMut(&[u64])) {
    let mut piece = [0; PIECE];
    for at in (0..pfns.len()).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(pfns.len() - at)];
        pfns.copy(at, piece);
        for pfn in piece.iter_mut() {
            let folio = pfn.rotate_right(order.get());
            *pfn = if folio > high { u64::MAX } else { folio };
        }
        f(piece);
    }
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
