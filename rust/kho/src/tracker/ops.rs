//! Trackers as sets: union, intersection, difference, symmetric difference, and what follows from their sizes.
//!
//! How many folios two blocks have alone and in common says what each operation leaves of them, so that what changes
//! nothing writes nothing. Where block sizes differ, what the other tracker says about a block is gathered into one of
//! this tracker's size first, by chunks of [`CHUNK`] words, which all sizes are multiples of.

#![forbid(unsafe_code)]

use super::block::{Block, Shape};
use super::{Geometry, HeapBlocks, Tracker, simd};
use crate::error::{Error, Result};
use crate::units::{Order, PageSize};
use core::fmt;
use std::alloc::{Layout, handle_alloc_error};

/// Words in the smallest block.
const CHUNK: usize = Geometry::SMALL as usize / 8;

const SHAPE_512: Shape = Shape::new(Geometry::SMALL);
const SHAPE_4K: Shape = Shape::new(PageSize::Size4K.bytes());
const SHAPE_16K: Shape = Shape::new(PageSize::Size16K.bytes());
const SHAPE_64K: Shape = Shape::new(PageSize::Size64K.bytes());

/// Calls a loop over all words of a block with a constant for its shape, so that it becomes vector code.
macro_rules! by_shape {
    ($kernel:ident($shape:expr, $($arg:expr),*)) => {
        match $shape {
            SHAPE_512 => $kernel(SHAPE_512, $($arg),*),
            SHAPE_4K => $kernel(SHAPE_4K, $($arg),*),
            SHAPE_16K => $kernel(SHAPE_16K, $($arg),*),
            SHAPE_64K => $kernel(SHAPE_64K, $($arg),*),
            shape => $kernel(shape, $($arg),*),
        }
    };
}

/// Whether `op` leaves a bit set.
fn any(shape: Shape, a: Block, b: Block, op: impl Fn(u64, u64) -> u64) -> bool {
    a.words(shape).zip(b.words(shape)).fold(0, |some, (a, b)| some | op(a, b)) != 0
}

/// Sets every word of `into`, which may be one of the two, to `op` of both.
#[inline(always)]
fn put(shape: Shape, into: Block, a: Block, b: Block, op: impl Fn(u64, u64) -> u64) {
    for n in 0..shape.words() {
        into.store(shape, n, op(a.load(shape, n), b.load(shape, n)));
    }
}

/// What an operation does to two blocks: the bits it adds to this one, those it takes away, and those it leaves.
fn change(op: impl Fn(u64, u64) -> u64, shape: Shape, mine: Block, theirs: Option<Block>) -> (u64, u64, u64) {
    let (mine, both, theirs) = match theirs {
        Some(theirs) => simd::compare(mine, theirs, shape),
        None => (simd::count(mine, shape), 0, 0),
    };
    let kept = |keeps: u64, bits: u64| if keeps != 0 { bits } else { 0 };
    let (mine_kept, both_kept, added) = (kept(op(!0, 0), mine), kept(op(!0, !0), both), kept(op(0, !0), theirs));
    (added, mine + both - mine_kept - both_kept, mine_kept + both_kept + added)
}

/// What one tracker says about the blocks of another, whose size may differ.
struct Lens<'a> {
    tracker: &'a Tracker,
    shape: Shape,
    /// A block to gather in, when the sizes differ.
    gathered: Option<(HeapBlocks, Block)>,
}

impl<'a> Lens<'a> {
    fn new(tracker: &'a Tracker, shape: Shape) -> Self {
        let gathered = (tracker.shape != shape).then(|| {
            let source = HeapBlocks::default();
            match Block::allocate(&source, shape) {
                Ok(block) => (source, block),
                Err(_) => handle_alloc_error(Layout::new::<[u64; CHUNK]>()),
            }
        });
        Lens { tracker, shape, gathered }
    }

    /// What there is where block `index` lies, if anything. Good until the next call.
    fn get(&mut self, order: Order, index: u64) -> Option<Block> {
        let Some((_, block)) = &self.gathered else {
            return self.tracker.dirs[order.index()].get(index);
        };
        let per_block = self.shape.words() / CHUNK;
        let mut found = false;
        for n in 0..per_block {
            let chunk = self.tracker.chunk(order, index * per_block as u64 + n as u64);
            found |= chunk.is_some();
            for word in 0..CHUNK {
                let bits = chunk.map_or(0, |(from, at)| from.load(self.tracker.shape, at + word));
                block.store(self.shape, n * CHUNK + word, bits);
            }
        }
        found.then_some(*block)
    }

    /// The indices, ascending, of blocks in which something is set.
    fn indices(&self, order: Order) -> impl Iterator<Item = u64> + use<'a> {
        let (tracker, same) = (self.tracker, self.gathered.is_none());
        let (theirs, mine) = (tracker.shape.words() / CHUNK, (self.shape.words() / CHUNK) as u64);
        let blocks = tracker.dirs[order.index()].blocks_from(0);
        let mut last = None;
        let indices = blocks.flat_map(move |(index, block)| {
            (0..if same { 1 } else { theirs }).filter_map(move |n| {
                let words = if same { 0..tracker.shape.words() } else { n * CHUNK..(n + 1) * CHUNK };
                let set = words.map(|word| block.load(tracker.shape, word)).any(|word| word != 0);
                set.then_some(if same { index } else { (index * theirs as u64 + n as u64) / mine })
            })
        });
        indices.filter(move |&index| last.replace(index) != Some(index))
    }
}

impl Tracker {
    /// Marks what `other` marks. Returns how many folios that added.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the page sizes differ, and the source's; then nothing is marked that was not before.
    pub fn union_with(&mut self, other: &Tracker) -> Result<u64> {
        self.combine(other, |mine, theirs| mine | theirs).map(|(added, _)| added)
    }

    /// Unmarks what `other` does not mark. Returns how many folios that removed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the page sizes differ.
    pub fn intersect_with(&mut self, other: &Tracker) -> Result<u64> {
        self.combine(other, |mine, theirs| mine & theirs).map(|(_, removed)| removed)
    }

    /// Unmarks what `other` marks. Returns how many folios that removed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the page sizes differ.
    pub fn subtract(&mut self, other: &Tracker) -> Result<u64> {
        self.combine(other, |mine, theirs| mine & !theirs).map(|(_, removed)| removed)
    }

    /// Flips what `other` marks. Returns how many folios that added and how many it removed.
    ///
    /// # Errors
    /// As [`Tracker::union_with`].
    pub fn symmetric_difference_with(&mut self, other: &Tracker) -> Result<(u64, u64)> {
        self.combine(other, |mine, theirs| mine ^ theirs)
    }

    /// What either marks, on the heap, in blocks of this tracker's size; only those in which something is set.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the page sizes differ, [`Error::NoMemory`].
    pub fn union(&self, other: &Tracker) -> Result<Tracker> {
        self.combined(other, |mine, theirs| mine | theirs)
    }

    /// What both mark, as [`Tracker::union`].
    ///
    /// # Errors
    /// As [`Tracker::union`].
    pub fn intersection(&self, other: &Tracker) -> Result<Tracker> {
        self.combined(other, |mine, theirs| mine & theirs)
    }

    /// What this tracker marks and `other` does not, as [`Tracker::union`].
    ///
    /// # Errors
    /// As [`Tracker::union`].
    pub fn difference(&self, other: &Tracker) -> Result<Tracker> {
        self.combined(other, |mine, theirs| mine & !theirs)
    }

    /// What exactly one of both marks, as [`Tracker::union`].
    ///
    /// # Errors
    /// As [`Tracker::union`].
    pub fn symmetric_difference(&self, other: &Tracker) -> Result<Tracker> {
        self.combined(other, |mine, theirs| mine ^ theirs)
    }

    /// Whether `other` marks everything that this tracker marks. Never, unless empty, when the page sizes differ.
    pub fn is_subset(&self, other: &Tracker) -> bool {
        let fits = |order| self.len_of(order) <= other.len_of(order);
        if self.is_empty() || self.geometry.page() != other.geometry.page() || !Order::all().all(fits) {
            return self.is_empty();
        }
        self.each_block(other, |shape, mine, theirs| match theirs {
            Some(theirs) => !any(shape, mine, theirs, |mine, theirs| mine & !theirs),
            None => mine.is_empty(shape),
        })
    }

    /// Whether no folio is in both.
    pub fn is_disjoint(&self, other: &Tracker) -> bool {
        self.geometry.page() != other.geometry.page()
            || self.each_block(other, |shape, mine, theirs| {
                theirs.is_none_or(|theirs| !any(shape, mine, theirs, |mine, theirs| mine & theirs))
            })
    }

    /// How many folios are in both. None are when the page sizes differ.
    pub fn intersection_len(&self, other: &Tracker) -> u64 {
        let mut len = 0;
        if self.geometry.page() == other.geometry.page() {
            self.each_block(other, |shape, mine, theirs| {
                len += theirs.map_or(0, |theirs| simd::common(mine, theirs, shape));
                true
            });
        }
        len
    }

    /// How many folios are in either.
    pub fn union_len(&self, other: &Tracker) -> u64 {
        // Saturating, because bits of a map that was taken over may change after they were counted.
        (self.len() + other.len()).saturating_sub(self.intersection_len(other))
    }

    /// How many folios are in this tracker and not in `other`.
    pub fn difference_len(&self, other: &Tracker) -> u64 {
        // Saturating, as in `union_len`.
        self.len().saturating_sub(self.intersection_len(other))
    }

    /// How many folios are in exactly one of the two trackers.
    pub fn symmetric_difference_len(&self, other: &Tracker) -> u64 {
        // Saturating, as in `union_len`.
        (self.len() + other.len()).saturating_sub(2 * self.intersection_len(other))
    }

    /// Whether `f` says so of every block and what `other` has there.
    fn each_block(&self, other: &Tracker, mut f: impl FnMut(Shape, Block, Option<Block>) -> bool) -> bool {
        let mut lens = Lens::new(other, self.shape);
        Order::all()
            .zip(&self.dirs)
            .filter(|(_, dir)| dir.len > 0)
            .all(|(order, dir)| dir.blocks_from(0).all(|(index, block)| f(self.shape, block, lens.get(order, index))))
    }

    /// The block that holds a chunk, if it exists, and the chunk's first word in it.
    fn chunk(&self, order: Order, chunk: u64) -> Option<(Block, usize)> {
        let per_block = (self.shape.words() / CHUNK) as u64;
        let block = self.dirs[order.index()].get(chunk / per_block)?;
        Some((block, (chunk % per_block) as usize * CHUNK))
    }

    fn check_comparable(&self, other: &Tracker) -> Result<()> {
        if self.geometry.page() != other.geometry.page() {
            return Err(Error::Invalid {
                what: "trackers",
                why: format!("pages of {} and of {} do not compare", self.geometry.page(), other.geometry.page()),
            });
        }
        Ok(())
    }

    /// Sets every word to `op(mine, theirs)`. Returns the bits set and the bits cleared.
    fn combine(&mut self, other: &Tracker, op: impl Fn(u64, u64) -> u64 + Copy) -> Result<(u64, u64)> {
        self.check_comparable(other)?;
        let (shape, grows) = (self.shape, op(0, !0) != 0);
        let mut lens = Lens::new(other, shape);
        if grows {
            for order in other.orders() {
                for index in lens.indices(order) {
                    self.ensure(order, index)?;
                }
            }
        }
        let (mut added, mut removed) = (0, 0);
        for (order, dir) in Order::all().zip(&mut self.dirs) {
            if dir.len == 0 && !grows {
                continue;
            }
            let (mut all_added, mut all_removed) = (0, 0);
            for (index, block) in dir.blocks_from(0) {
                let theirs = lens.get(order, index);
                let (plus, minus, _) = change(op, shape, block, theirs);
                if plus + minus > 0 {
                    match theirs {
                        Some(theirs) => by_shape!(put(shape, block, block, theirs, op)),
                        None => by_shape!(put(shape, block, block, block, |mine, _| op(mine, 0))),
                    }
                    all_added += plus;
                    all_removed += minus;
                }
            }
            // As above.
            dir.len = (dir.len + all_added).saturating_sub(all_removed);
            added += all_added;
            removed += all_removed;
        }
        Ok((added, removed))
    }

    /// A tracker of `op(mine, theirs)`.
    fn combined(&self, other: &Tracker, op: impl Fn(u64, u64) -> u64 + Copy) -> Result<Tracker> {
        self.check_comparable(other)?;
        let shape = self.shape;
        let mut new = Tracker::new(self.geometry);
        let mut lens = Lens::new(other, shape);
        for (order, dir) in Order::all().zip(&self.dirs) {
            for (index, block) in dir.blocks_from(0) {
                let theirs = lens.get(order, index);
                let (.., left) = change(op, shape, block, theirs);
                if left > 0 {
                    let into = new.room(order, index, left)?;
                    match theirs {
                        Some(theirs) => by_shape!(put(shape, into, block, theirs, op)),
                        None => by_shape!(put(shape, into, block, block, |mine, _| mine)),
                    }
                }
            }
        }
        if op(0, !0) != 0 {
            for order in other.orders() {
                for index in lens.indices(order).filter(|&index| self.block(order, index).is_none()) {
                    if let Some(theirs) = lens.get(order, index) {
                        let into = new.room(order, index, simd::count(theirs, shape))?;
                        by_shape!(put(shape, into, theirs, theirs, |theirs, _| theirs));
                    }
                }
            }
        }
        Ok(new)
    }

    /// A block that is not there yet, for the caller to set `count` bits in.
    fn room(&mut self, order: Order, index: u64, count: u64) -> Result<Block> {
        let block = self.ensure(order, index)?;
        self.dirs[order.index()].len += count;
        Ok(block)
    }

    /// A copy on the heap, of every block, the empty ones too.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn try_clone(&self) -> Result<Tracker> {
        let (mut copy, shape) = (Tracker::new(self.geometry), self.shape);
        for (order, dir) in Order::all().zip(&self.dirs) {
            for (index, block) in dir.blocks_from(0) {
                let into = copy.ensure(order, index)?;
                by_shape!(put(shape, into, block, block, |mine, _| mine));
                // Counted again: of bitmaps in shared memory the tracker knows what they had.
                copy.dirs[order.index()].len += simd::count(into, shape);
            }
        }
        Ok(copy)
    }
}

/// Copies to the heap; aborts, as allocation does, when there is none left ([`Tracker::try_clone`] returns).
impl Clone for Tracker {
    fn clone(&self) -> Self {
        self.try_clone().unwrap_or_else(|_| handle_alloc_error(Layout::new::<Tracker>()))
    }
}

/// The same folios and page size, whatever the block size and the empty blocks.
impl PartialEq for Tracker {
    fn eq(&self, other: &Self) -> bool {
        self.geometry.page() == other.geometry.page()
            && Order::all().all(|order| self.len_of(order) == other.len_of(order))
            && self.each_block(other, |shape, mine, theirs| match theirs {
                Some(theirs) => !any(shape, mine, theirs, |mine, theirs| mine ^ theirs),
                None => mine.is_empty(shape),
            })
    }
}

impl Eq for Tracker {}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").field("geometry", &self.geometry).field("len", &self.len()).finish_non_exhaustive()
    }
}
