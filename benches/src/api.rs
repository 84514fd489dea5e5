//! The library as the benches call it.

use crate::workload::Workload;
use kho::Result;
use kho::arena::{Arena, ArenaConfig, Backing, Region};
use kho::incoming::{Incoming, Options};
use kho::outgoing::{Outgoing, Placement};
use kho::tracker::{Geometry, Orders, Tracker};
use kho::units::{Order, PageSize, Pfn, Phys};
use std::sync::Arc;

pub fn empty() -> Tracker {
    Tracker::new(Geometry::paged(PageSize::Size4K))
}

/// Calls `f` for each folio, in a loop of its own where all are of order 0.
#[inline(always)]
fn each(workload: &Workload, mut f: impl FnMut(Pfn, Order)) {
    match &workload.orders {
        None => workload.pfns.iter().for_each(|pfn| f(Pfn(*pfn), Order::ZERO)),
        Some(orders) => {
            for (pfn, order) in workload.pfns.iter().zip(orders) {
                let _ = Order::new((*order).into()).map(|order| f(Pfn(*pfn), order));
            }
        }
    }
}

/// One call a folio.
pub fn preserve_each(t: &mut Tracker, workload: &Workload) {
    each(workload, |pfn, order| drop(t.preserve(pfn, order)));
}

pub fn unpreserve_each(t: &mut Tracker, workload: &Workload) {
    each(workload, |pfn, order| drop(t.unpreserve(pfn, order)));
}

/// One call for all.
pub fn preserve_many(t: &mut Tracker, workload: &Workload) {
    let orders = workload.orders.as_ref().map_or(Orders::One(Order::ZERO), |orders| Orders::Each(orders));
    let _ = t.preserve_many(&*workload.pfns, orders);
}

/// Where an arena's RAM begins, in pages: the page at 0 is not RAM.
const BASE: u64 = 1 << 18;

/// A workload's folios of order 0 as they lie in an arena.
pub fn in_arena(workload: &Workload) -> Tracker {
    let pfns = workload.pfns.iter().map(|pfn| BASE + pfn).collect();
    let mut t = empty();
    preserve_many(&mut t, &Workload { name: workload.name, pfns, orders: None, span: BASE + workload.span });
    t
}

/// RAM of `pages` pages, all allocated in large folios, and room after it for the map.
///
/// # Errors
/// Without that much address space.
pub fn arena(span: u64) -> Result<Arc<Arena>> {
    let page = PageSize::Size4K;
    let largest = Order::new(18)?;
    let guest = span.next_multiple_of(largest.nr_pages());
    let arena = Arena::new(ArenaConfig {
        page,
        max_order: Order::new(10)?,
        regions: vec![Region { start: page.phys(Pfn(BASE)), len: (guest + (1 << 16)) << page.shift(), node: 0 }],
        scratch: Vec::new(),
        backing: Backing::Anonymous,
    })?;
    for pfn in (0..guest).step_by(1 << 18) {
        arena.alloc_at(Pfn(BASE + pfn), largest)?;
    }
    Ok(arena)
}

/// A handover that preserves these.
///
/// # Errors
/// None in an arena that is large enough.
pub fn outgoing(arena: &Arc<Arena>, abi: &str, folios: &Tracker) -> Result<Outgoing> {
    let mut out = Outgoing::new(arena, abi, None, Placement::default())?;
    out.preserve_all(folios)?;
    Ok(out)
}

/// The next owner of an arena in which a handover was finalized.
///
/// # Errors
/// None for what this library wrote.
pub fn take_over(arena: &Arc<Arena>) -> Result<Incoming> {
    Incoming::take_over(arena, None, &Options::default())
}

/// One of a workload's folios.
///
/// # Errors
/// If it is not there, or no more.
#[inline]
pub fn restore(incoming: &Incoming, pfn: u64) -> Result<()> {
    incoming.restore_folio(Phys((BASE + pfn) << 12)).map(drop)
}

/// The addresses of a workload's folios in an arena.
pub fn addresses(pfns: &[u64]) -> Vec<u64> {
    pfns.iter().map(|pfn| (BASE + pfn) << 12).collect()
}

/// All in one call.
///
/// # Errors
/// The first folio that is not there.
pub fn restore_many(incoming: &Incoming, phys: &[u64]) -> Result<()> {
    incoming.restore_many(phys).map(drop)
}

/// One call each.
///
/// # Errors
/// The first folio that is not there.
pub fn restore_each(incoming: &Incoming, pfns: &[u64]) -> Result<()> {
    for pfn in pfns {
        restore(incoming, *pfn)?;
    }
    Ok(())
}
