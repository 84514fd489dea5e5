//! Radix partitioning of a folio list: a visitor gets the folios bucket by bucket, where that pays.
//!
//! The floor of a random bit is a cache miss, so a long list is first partitioned into buckets, each a stretch of bitmaps
//! that fits the second-level cache, and a bucket is visited when it is full:
//!
//! ```text
//! pfns --survey--> blocks allocated --partition--> | bucket | bucket | ... | --full--> bits of 64 KiB of bitmaps
//! ```
//! An ascending list is not partitioned. Nor is a list with few folios per cache line: most lines are fetched for one folio
//! each in any order, so its words are prefetched in the list's own order, some hundreds at once.

#![forbid(unsafe_code)]

use crate::buffer_pool::BufferPool;
use crate::mapping;
use crate::parallel::{join, threads_for};
use crate::tracker::block::LINE;
use crate::tracker::bulk::survey::{ListStats, SPAN};
use crate::tracker::simd;
use crate::tuning::tuning;
use crate::units::Order;
use core::mem;
use core::ops::Range;

/// log2 of the largest number of buckets.
const BUCKETS: u32 = 9;
/// log2 of the bits of a bucket, at the least: 64 KiB of bitmaps; a second-level cache holds several.
const BUCKET_BITS: u32 = 19;
/// Folios a bucket holds, at the most: 64 MiB of memory for all, and never much more than half of what the list takes.
const BUCKET_LEN: usize = 1 << 15;
/// Places between two buckets: a cache line, for if all began at the same place of a page, all would share a few lines of the
/// cache.
const GAP: usize = 16;
/// Folios that share a cache line.
const LINE_BITS: usize = 64 * LINE;
/// Folios in each line that a list reaches, on an average, from which on buckets pay: with fewer, most cache lines are
/// fetched for one folio each, in any order.
const CROWD: u64 = 3;

/// Folios of one order being shown to a visitor, neighbours after neighbours if that pays.
pub(in crate::tracker) struct Visit<V> {
    pub(in crate::tracker) order: Order,
    /// One above this was not there when the list was looked at, and is that of no folio.
    high: u64,
    /// None for a list that is shown as it comes: where buckets do not pay, or there is no memory for them.
    buckets: Option<Buckets>,
    /// Whether folios that come one after another lie anywhere.
    scattered: bool,
    visitor: V,
    more: bool,
}

/// Folios held back until there are many in the same stretch of bitmaps.
struct Buckets {
    layout: Layout,
    /// Folios less the first of their bucket's, bucket after bucket.
    held: Vec<u32>,
    /// Where the next folio of each bucket goes, and where there is no more room for it.
    ends: Vec<(u32, u32)>,
}

/// Memory of buckets that are empty.
static POOL: BufferPool<u32> = BufferPool::new();

impl Drop for Buckets {
    fn drop(&mut self) {
        POOL.keep(mem::take(&mut self.held));
    }
}

/// What each bucket is for.
#[derive(Clone, Copy)]
struct Layout {
    /// log2 of the folios a bucket may be asked to hold, each once.
    shift: u32,
    /// The number of the first bucket.
    base: u64,
    /// Above this is no folio.
    high: u64,
    /// How many folios a bucket holds.
    len: usize,
}

impl<V: Visitor> Visit<V> {
    pub(in crate::tracker) fn new(stats: &ListStats, visitor: V) -> Self {
        let ascends = stats.descents < stats.count / 8;
        let far = stats.blocks(visitor.log2_bits()) >= SPAN as u64;
        let span = stats.high - stats.low;
        let sparse = stats.count as u64 / CROWD < span / LINE_BITS as u64;
        let scattered = !ascends && span >> bucket_bits() > 1;
        let pays = scattered && !far && !sparse;
        let buckets = if pays { Buckets::new(stats, visitor.log2_bits()) } else { None };
        Visit { order: stats.order, high: stats.high, buckets, scattered, visitor, more: true }
    }

    pub(in crate::tracker) fn take(&mut self, piece: &mut [u64]) {
        if let Some(buckets) = &mut self.buckets {
            self.more = self.more && buckets.take(piece, &mut self.visitor);
            return;
        }
        for folio in piece.iter_mut() {
            *folio = if *folio > self.high { u64::MAX } else { *folio };
        }
        if self.scattered {
            self.visitor.expect(piece.iter().copied());
        }
        self.more = self.more
            && match run_of(piece) {
                Some(run) => self.visitor.visit_run(run),
                None => self.visitor.visit(piece.iter().copied()),
            };
    }

    /// Whether the visitor wanted all, and the visitor.
    pub(in crate::tracker) fn finish(mut self) -> (bool, V) {
        if let Some(buckets) = &mut self.buckets {
            self.more = self.more && buckets.empty_all(&mut self.visitor);
        }
        (self.more, self.visitor)
    }
}

fn bucket_bits() -> u32 {
    tuning().bucket_bits.unwrap_or(BUCKET_BITS)
}

/// Folios side by side, ascending, if that is what they are.
fn run_of(folios: &[u64]) -> Option<Range<u64>> {
    let (first, last) = (*folios.first()?, *folios.last()?);
    let run = last.wrapping_sub(first) == folios.len() as u64 - 1 && simd::ascends_by_one(folios);
    run.then_some(first..last.checked_add(1)?)
}

impl Buckets {
    /// None if there is no memory for them.
    fn new(stats: &ListStats, log2_bits: u32) -> Option<Self> {
        let spread = u64::BITS - (stats.high - stats.low).leading_zeros();
        let shift = spread.saturating_sub(BUCKETS).max(bucket_bits()).max(log2_bits);
        let base = stats.low >> shift;
        let buckets = ((stats.high >> shift) - base + 1) as usize;
        // Some more than there are on an average, so that most are emptied once.
        let len = (stats.count / buckets + stats.count / buckets / 16 + GAP).next_multiple_of(GAP).min(BUCKET_LEN);
        let places = buckets * (len + GAP);
        let mut held = POOL.take(places);
        if held.capacity() == 0 {
            held.try_reserve_exact(places).ok()?;
            mapping::prefer_huge_pages(held.spare_capacity_mut());
        }
        held.resize(places, 0);
        let layout = Layout { shift, base, high: stats.high, len };
        Some(Buckets { layout, held, ends: (0..buckets).map(|bucket| layout.ends(bucket)).collect() })
    }

    fn take(&mut self, piece: &[u64], visitor: &mut impl Visitor) -> bool {
        let (layout, held, ends) = (self.layout, &mut *self.held, &mut *self.ends);
        for &folio in piece {
            // What was changed since it was looked at may lie anywhere.
            let bucket = (folio >> layout.shift).wrapping_sub(layout.base) as usize;
            let Some((next, end)) = ends.get_mut(bucket) else { continue };
            let at = *next as usize;
            let Some(place) = held.get_mut(at) else { continue };
            *place = (folio & ((1 << layout.shift) - 1)) as u32;
            *next += 1;
            if at + 1 == *end as usize {
                *next -= layout.len as u32;
                if !layout.empty(bucket, &held[*next as usize..=at], visitor) {
                    return false;
                }
            }
        }
        true
    }

    /// Shows what all buckets hold. False if no more is wanted.
    fn empty_all<V: Visitor>(&mut self, visitor: &mut V) -> bool {
        let buckets = self.ends.len();
        if threads_for(size_of_val(&*self.held)) < 2 || visitor.fork().is_none() {
            return self.empty_some(0..buckets, visitor);
        }
        let half = |part: Range<usize>| visitor.fork().map(|mut fork| (self.empty_some(part, &mut fork), fork));
        match join(|| half(0..buckets / 2), || half(buckets / 2..buckets)) {
            (Some((low_more, low)), Some((high_more, high))) => {
                visitor.join(low);
                visitor.join(high);
                low_more && high_more
            }
            _ => self.empty_some(0..buckets, visitor),
        }
    }

    fn empty_some(&self, mut part: Range<usize>, visitor: &mut impl Visitor) -> bool {
        part.all(|bucket| {
            let (next, end) = self.ends[bucket];
            let held = &self.held[end as usize - self.layout.len..next as usize];
            self.layout.empty(bucket, held, visitor)
        })
    }
}

impl Layout {
    /// Where a bucket begins, and where it ends. A gap follows each. There are fewer than 2^32 places.
    fn ends(self, bucket: usize) -> (u32, u32) {
        let start = bucket * (self.len + GAP);
        (start as u32, (start + self.len) as u32)
    }

    /// Shows what a bucket holds. False if no more is wanted.
    #[inline(never)]
    fn empty(self, bucket: usize, held: &[u32], visitor: &mut impl Visitor) -> bool {
        let first = (self.base + bucket as u64) << self.shift;
        if held.len() > (1usize << self.shift) / LINE_BITS / 2 {
            visitor.ready(first..first + (1 << self.shift));
        }
        let folios = held.iter().map(|low| first + u64::from(*low));
        if self.high >> self.shift > self.base + bucket as u64 {
            visitor.visit(folios)
        } else {
            visitor.visit(folios.filter(|folio| *folio <= self.high))
        }
    }
}

/// What is done with the folios of a list.
pub(in crate::tracker) trait Visitor: Send + Sync + Sized {
    /// One more, for folios of other blocks at the same time; none if a visitor has to see them all.
    fn fork(&self) -> Option<Self> {
        None
    }

    /// Merges the result of a visitor that ran concurrently.
    fn join(&mut self, _fork: Self) {}

    /// log2 of the bits in the largest block it looks at.
    fn log2_bits(&self) -> u32;

    /// Told what folios come next when many of them do.
    fn ready(&self, folios: Range<u64>);

    /// Told what folios come next when they lie anywhere: a few, whose words are asked for all at once.
    fn expect(&self, _folios: impl Iterator<Item = u64>) {}

    /// Some folios, in the order in which they are shown every time. False if no more are wanted.
    fn visit(&mut self, folios: impl Iterator<Item = u64> + Clone) -> bool;

    /// The same for folios side by side.
    fn visit_run(&mut self, folios: Range<u64>) -> bool {
        self.visit(folios)
    }
}
