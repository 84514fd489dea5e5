//! Operations on many folios at once, given by their pfns in any order.
//!
//! A long list is surveyed (`survey`), then its blocks are allocated, then it is applied (`partition`).

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::parallel::{join, threads_for};
use crate::tracker::block::Shape;
use crate::tracker::bulk::partition::{Visit, Visitor};
use crate::tracker::bulk::survey::{ListStats, merge_stats};
use crate::tracker::index::directory::Directory;
use crate::tracker::word::Word;
use crate::tracker::{Tracker, simd};
use crate::tuning::tuning;
use crate::units::{Order, Pfn};
use core::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Pfns in memory that others may write concurrently: they are copied, a few at a time, before they are checked.
pub trait Words: Sync {
    /// The number of words.
    fn len(&self) -> usize;

    /// Whether there are no words.
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

impl Orders<'_> {
    /// Whether there are as many as pfns.
    fn check(self, pfns: usize) -> Result<()> {
        match self {
            Orders::Each(orders) if orders.len() != pfns => {
                Err(Error::Invalid { what: "order", why: format!("{} orders for {pfns} pfns", orders.len()) })
            }
            _ => Ok(()),
        }
    }
}

/// Words copied at a time.
const PIECE: usize = 256;
/// Lists up to here are taken as they come.
const SHORT: usize = 2048;

fn short() -> usize {
    tuning().short_list.unwrap_or(SHORT)
}

impl Tracker {
    /// Marks many folios. Returns how many were not marked yet.
    ///
    /// # Errors
    /// As [`Tracker::preserve`], for the first in the list, and [`Error::Invalid`] if there are not as many orders as pfns;
    /// then nothing is marked that was not before.
    pub fn preserve_many(&mut self, pfns: &(impl Words + ?Sized), orders: Orders<'_>) -> Result<u64> {
        if pfns.len() <= short() {
            return self.preserve_short(pfns, orders);
        }
        let stats = self.survey(pfns, orders, self.shape.log2_bits)?;
        self.make(pfns, orders, &stats)?;
        Ok(self.change::<true>(pfns, orders, &stats))
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
        if pfns.len() > short() {
            let stats = self.survey(pfns, orders, self.shape.log2_bits)?;
            return Ok(self.change::<false>(pfns, orders, &stats));
        }
        let page = self.geometry.page();
        each(pfns, orders, |pfn, order| page.check_folio(pfn, order))?;
        let mut gone = 0;
        each(pfns, orders, |pfn, order| self.unpreserve(pfn, order).map(|was| gone += u64::from(was)))?;
        Ok(gone)
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
        orders.check(pfns.len())?;
        if threads_for(pfns.len() * size_of::<u64>()) < 2 {
            return self.find(pfns, orders, 0, found);
        }
        let half = pfns.len() / 2;
        let (low, high) = found.split_at_mut(half);
        let high = Mutex::new(high);
        let (low, high) = join(
            || self.find(pfns, orders, 0, low),
            || self.find(pfns, orders, half, &mut high.lock().unwrap_or_else(PoisonError::into_inner)),
        );
        low.and(high)
    }

    /// Looks for as many folios as there are places, from `start` in the list on.
    fn find(&self, pfns: &(impl Words + ?Sized), orders: Orders<'_>, start: usize, found: &mut [u8]) -> Result<()> {
        let mut piece = [0; PIECE];
        for (at, found) in (start..).step_by(PIECE).zip(found.chunks_mut(PIECE)) {
            let piece = &mut piece[..found.len()];
            pfns.copy(at, piece);
            match orders {
                Orders::One(order) => self.find_piece(piece, order, found),
                Orders::Each(orders) => {
                    for ((&pfn, &order), found) in piece.iter().zip(&orders[at..]).zip(found) {
                        *found = self.contains(Pfn(pfn), Order::new(order.into())?).into();
                    }
                }
            }
        }
        Ok(())
    }

    /// Looks for folios of one order: words that are still on their way are asked for all at once.
    fn find_piece(&self, pfns: &mut [u64], order: Order, found: &mut [u8]) {
        let window = self.dirs[order.index()].window.slots();
        simd::number(pfns, order.get());
        pfns.iter().filter_map(|folio| window.word(*folio)).for_each(Word::prefetch);
        for (&folio, found) in pfns.iter().zip(found) {
            *found = match window.word(folio) {
                Some(word) => word.test(folio),
                None => self.contains(Pfn(folio.rotate_left(order.get())), order),
            }
            .into();
        }
    }

    /// Reads a list once, checks every pfn, and returns the statistics of each order in it.
    fn survey(&self, pfns: &(impl Words + ?Sized), orders: Orders<'_>, log2_bits: u32) -> Result<Vec<ListStats>> {
        orders.check(pfns.len())?;
        let stats = if threads_for(pfns.len() * size_of::<u64>()) < 2 {
            self.survey_part(pfns, orders, log2_bits, 0..pfns.len())
        } else {
            let half = pfns.len() / 2;
            let (low, high) = join(
                || self.survey_part(pfns, orders, log2_bits, 0..half),
                || self.survey_part(pfns, orders, log2_bits, half..pfns.len()),
            );
            low.and_then(|low| Ok(merge_stats(low, high?)))
        };
        if stats.is_err() {
            // Whatever comes first in the list is what is wrong with it; what was, if that is not there any more.
            let page = self.geometry.page();
            each(pfns, orders, |pfn, order| page.check_folio(pfn, order))?;
        }
        stats
    }

    /// A part of that, where not the first is named that is wrong but some.
    fn survey_part(
        &self,
        pfns: &(impl Words + ?Sized),
        orders: Orders<'_>,
        log2_bits: u32,
        part: Range<usize>,
    ) -> Result<Vec<ListStats>> {
        let mut stats: Vec<ListStats> = Vec::new();
        let mut bad = None;
        pieces(pfns, orders, part, |order, piece| {
            let at = stats.iter().position(|stats| stats.order == order).unwrap_or_else(|| {
                stats.push(ListStats::new(order, log2_bits));
                stats.len() - 1
            });
            stats[at].add(piece);
            let limit = self.geometry.folio_limit(order);
            if stats[at].high >= limit && bad.is_none() {
                bad = piece
                    .iter()
                    .find(|folio| **folio >= limit)
                    .map(|folio| (Pfn(folio.rotate_left(order.get())), order));
            }
        })?;
        bad.map_or(Ok(()), |(pfn, order)| self.geometry.page().check_folio(pfn, order))?;
        Ok(stats)
    }

    /// Makes the blocks that a list of folios needs. Blocks that were told apart are no larger than these.
    fn make(&mut self, pfns: &(impl Words + ?Sized), orders: Orders<'_>, stats: &[ListStats]) -> Result<()> {
        let log2_bits = self.shape.log2_bits;
        let (near, far): (Vec<&ListStats>, Vec<&ListStats>) = stats.iter().partition(|stats| stats.is_near());
        for stats in near {
            let mut last = None;
            for index in stats.touched().map(|index| index >> (log2_bits - stats.log2_bits)) {
                if last.replace(index) != Some(index) {
                    self.ensure(stats.order, index)?;
                }
            }
        }
        let mut made = Ok(());
        if !far.is_empty() {
            pieces(pfns, orders, 0..pfns.len(), |order, piece| {
                let high = far.iter().find(|stats| stats.order == order).map(|stats| stats.high);
                for folio in piece.iter().filter(|folio| Some(**folio) <= high) {
                    if made.is_ok() {
                        made = self.ensure(order, folio >> log2_bits).map(drop);
                    }
                }
            })?;
        }
        made
    }

    /// Sets or clears the bits of a list, in the blocks there are. Returns how many changed.
    fn change<const MARK: bool>(
        &mut self,
        pfns: &(impl Words + ?Sized),
        orders: Orders<'_>,
        stats: &[ListStats],
    ) -> u64 {
        let mut visits: Vec<_> =
            stats.iter().map(|stats| Visit::new(stats, Change::<MARK>::of(self, stats.order))).collect();
        // As many orders as pfns, or there would be no statistics.
        let _ = pieces(pfns, orders, 0..pfns.len(), |order, piece| {
            if let Some(visit) = visits.iter_mut().find(|visit| visit.order == order) {
                visit.take(piece);
            }
        });
        let changed: Vec<_> = visits.into_iter().map(|visit| (visit.order, visit.finish().1.changed)).collect();
        for (order, changed) in &changed {
            let len = &mut self.dirs[order.index()].len;
            *len = if MARK { *len + changed } else { *len - changed };
        }
        changed.iter().map(|(_, changed)| changed).sum()
    }

    /// Marks folios that `from` marks and this tracker does not yet, and marks them in `also`, where they are not: all, or
    /// none if that is not so for one of them; then false.
    ///
    /// # Errors
    /// As [`Tracker::preserve_many`].
    pub(crate) fn take_many(
        &mut self,
        from: &Tracker,
        also: Option<&mut Tracker>,
        pfns: &(impl Words + ?Sized),
        order: Order,
    ) -> Result<bool> {
        let all = Orders::One(order);
        let smallest = also.as_ref().map_or(u32::MAX, |also| also.shape.log2_bits).min(self.shape.log2_bits);
        let surveyed = self.survey(pfns, all, smallest)?;
        let Some(stats) = surveyed.first() else { return Ok(true) };
        let was_empty = self.is_empty();
        self.make(pfns, all, &surveyed)?;
        // A tracker's first folios are all of it. Where they are many to a block, they come by words; each block there is
        // takes as long then as a few folios.
        let words = self.dirs[order.index()].blocks() * self.shape.words() as u64;
        let blocks: u64 = also.iter().flat_map(|also| &also.dirs).map(Directory::blocks).sum();
        let by_words = was_empty && stats.count as u64 >= words.max(8 * blocks);
        let (mut other, later) = if by_words { (None, also) } else { (also, None) };
        if let Some(other) = &mut other {
            other.make(pfns, all, &surveyed)?;
        }
        let take = Take {
            from: (&from.dirs[order.index()], from.shape),
            mine: Change::of(self, order),
            also: other.as_ref().map(|other| Change::of(other, order)),
        };
        let (all_taken, take) = show(stats, pfns, take);
        if !all_taken {
            // A list is shown in the same order every time.
            show(stats, pfns, GiveBack { left: take.mine.changed, take });
            return Ok(false);
        }
        let (taken, also_taken) = (take.mine.changed, take.also.map_or(0, |also| also.changed));
        self.dirs[order.index()].len += taken;
        if let Some(other) = other {
            other.dirs[order.index()].len += also_taken;
        }
        if let Some(later) = later {
            later.union_with(self).inspect_err(|_| self.clear())?;
        }
        Ok(true)
    }
}

/// Shows a visitor all folios of a list; false if the visitor stops early.
fn show<V: Visitor>(stats: &ListStats, pfns: &(impl Words + ?Sized), visitor: V) -> (bool, V) {
    let mut visit = Visit::new(stats, visitor);
    // One order for all is as many as pfns.
    let _ = pieces(pfns, Orders::One(stats.order), 0..pfns.len(), |_, piece| visit.take(piece));
    visit.finish()
}

/// Sets or clears bits in the blocks there are.
struct Change<'a, const MARK: bool> {
    dir: &'a Directory,
    shape: Shape,
    changed: u64,
}

impl<'a, const MARK: bool> Change<'a, MARK> {
    /// The caller owns the tracker or its directory, and updates the count of folios afterwards.
    fn of(tracker: &'a Tracker, order: Order) -> Self {
        Change { dir: &tracker.dirs[order.index()], shape: tracker.shape, changed: 0 }
    }
}

impl Change<'_, true> {
    /// Clears bits that were set. Returns how many.
    fn clear(&self, folios: impl Iterator<Item = u64> + Clone) -> u64 {
        let mut back = Change::<false> { dir: self.dir, shape: self.shape, changed: 0 };
        back.visit(folios);
        back.changed
    }
}

impl<const MARK: bool> Visitor for Change<'_, MARK> {
    fn fork(&self) -> Option<Self> {
        Some(Change { dir: self.dir, shape: self.shape, changed: 0 })
    }

    fn join(&mut self, fork: Self) {
        self.changed += fork.changed;
    }

    fn log2_bits(&self) -> u32 {
        self.shape.log2_bits
    }

    fn ready(&self, folios: Range<u64>) {
        self.dir.prefetch(self.shape, folios);
    }

    fn expect(&self, folios: impl Iterator<Item = u64>) {
        let window = self.dir.window.slots();
        folios.filter_map(|folio| window.word(folio)).for_each(Word::prefetch);
    }

    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool {
        let window = self.dir.window.slots();
        let changed = |folio| {
            let word = window.word(folio).or_else(|| self.dir.far_word(self.shape, folio));
            word.is_some_and(|word| if MARK { word.set(folio) } else { word.clear(folio) })
        };
        self.changed += folios.map(changed).map(u64::from).sum::<u64>();
        true
    }

    fn visit_run(&mut self, folios: Range<u64>) -> bool {
        self.changed += self.dir.fill(self.shape, folios, MARK);
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
    fn log2_bits(&self) -> u32 {
        let also = self.also.as_ref().map_or(0, Change::log2_bits);
        self.from.1.log2_bits.max(self.mine.log2_bits()).max(also)
    }

    fn ready(&self, folios: Range<u64>) {
        self.from.0.prefetch(self.from.1, folios.clone());
        self.mine.ready(folios.clone());
        if let Some(also) = &self.also {
            also.ready(folios);
        }
    }

    fn expect(&self, folios: impl Iterator<Item = u64>) {
        let (theirs, mine) = (self.from.0.window.slots(), self.mine.dir.window.slots());
        let also = self.also.as_ref().map(|also| also.dir.window.slots());
        for folio in folios {
            let words = [theirs.word(folio), mine.word(folio), also.and_then(|also| also.word(folio))];
            words.into_iter().flatten().for_each(Word::prefetch);
        }
    }

    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool {
        let (dir, shape) = self.from;
        let (theirs, mine) = (dir.window.slots(), self.mine.dir.window.slots());
        let mut taken = 0;
        let all_taken = folios.clone().all(|folio| {
            let there = theirs.word(folio).or_else(|| dir.far_word(shape, folio));
            let place = mine.word(folio).or_else(|| self.mine.dir.far_word(self.mine.shape, folio));
            // One that comes twice is set when it comes again.
            let free = there.is_some_and(|word| word.test(folio)) && place.is_some_and(|word| word.set(folio));
            taken += usize::from(free);
            free
        });
        if !all_taken {
            self.mine.clear(folios.take(taken));
            return false;
        }
        self.mine.changed += taken as u64;
        self.also.as_mut().is_none_or(|also| also.visit(folios))
    }
}

/// Clears the first bits that were set.
struct GiveBack<'a> {
    take: Take<'a>,
    left: u64,
}

impl Visitor for GiveBack<'_> {
    fn log2_bits(&self) -> u32 {
        self.take.log2_bits()
    }

    fn ready(&self, _: Range<u64>) {}

    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool {
        let taken = folios.take(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= self.take.mine.clear(taken.clone());
        self.take.also.as_ref().map(|also| also.clear(taken));
        self.left > 0
    }
}

/// Calls `f` for piece after piece of a part of a list, each of folios of one order: their numbers, which are too large where
/// the pfn is not aligned. Folios of one order come as they are in the list. There are as many orders as pfns.
fn pieces(
    pfns: &(impl Words + ?Sized),
    orders: Orders<'_>,
    part: Range<usize>,
    mut f: impl FnMut(Order, &mut [u64]),
) -> Result<()> {
    let mut piece = [0; PIECE];
    let mut sorted = [0; PIECE];
    for at in part.clone().step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(part.end - at)];
        pfns.copy(at, piece);
        let orders = match orders {
            Orders::One(order) => {
                simd::number(piece, order.get());
                f(order, piece);
                continue;
            }
            Orders::Each(orders) => &orders[at..at + piece.len()],
        };
        // How many there are of each order, and then where they begin.
        let mut starts = [0; Order::COUNT + 1];
        for &order in orders {
            starts[Order::new(order.into())?.index() + 1] += 1;
        }
        if let Some(order) = Order::all().find(|order| starts[order.index() + 1] == piece.len()) {
            simd::number(piece, order.get());
            f(order, piece);
            continue;
        }
        for order in 0..Order::COUNT {
            starts[order + 1] += starts[order];
        }
        let mut next = starts;
        for (&pfn, &order) in piece.iter().zip(orders) {
            let place = &mut next[usize::from(order)];
            sorted[*place] = pfn;
            *place += 1;
        }
        for order in Order::all() {
            let of_order = &mut sorted[starts[order.index()]..starts[order.index() + 1]];
            if !of_order.is_empty() {
                simd::number(of_order, order.get());
                f(order, of_order);
            }
        }
    }
    Ok(())
}

/// Calls `f` for each folio of a list.
fn each(pfns: &(impl Words + ?Sized), orders: Orders<'_>, mut f: impl FnMut(Pfn, Order) -> Result<()>) -> Result<()> {
    orders.check(pfns.len())?;
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
