//! Which folios were handed over and which were restored: each folio once.

#![forbid(unsafe_code)]

use crate::abi::preserved::{Bitmaps, Preserved};
use crate::error::{Error, NotRestorable, Result};
use crate::tracker::{Tracker, Words};
use crate::units::{Order, PageSize, Pfn, Phys, aligned_blocks, cut_at};
use parking_lot::{Mutex, MutexGuard};
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// The most cuts of one range that are looked for: an order each at the borders of 1024 nodes.
const MOST_CUTS: usize = 1024 * Order::COUNT;

/// How the next kernel marks the head page of a preserved folio, in `page->private`, until it is restored
/// (abi.md section 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Marker {
    /// Linux 6.16 and 6.17: the bare order.
    Order,
    /// From 6.18: `{ u32 order; u32 magic = "KHOP" }`.
    Magic,
}

/// KHO_PAGE_MAGIC, "KHOP".
pub(crate) const PAGE_MAGIC: u32 = 0x4b48_4f50;

impl Marker {
    /// The value of `private` for a folio of `order`.
    pub(crate) fn value(self, order: Order) -> u64 {
        match self {
            Marker::Order => order.get().into(),
            Marker::Magic => u64::from(PAGE_MAGIC) << 32 | u64::from(order.get()),
        }
    }
}

/// The preserved folios of a handover. A folio that is in `preserved` and not in `restored` has its marker;
/// putting it into `restored` *is* taking the marker, so two claims of one folio cannot both succeed.
#[derive(Debug)]
pub(crate) struct Claims {
    preserved: Preserved,
    restored: Mutex<Tracker>,
    /// The orders of preserved folios, the largest first.
    orders: OnceLock<Vec<Order>>,
    marker: Marker,
}

impl Claims {
    pub(crate) fn new(preserved: impl Into<Preserved>, marker: Marker) -> Self {
        let preserved = preserved.into();
        let restored = Mutex::new(Tracker::new(preserved.geometry()));
        Claims { preserved, restored, orders: OnceLock::new(), marker }
    }

    /// Everything that was handed over, restored or not.
    pub(crate) fn preserved(&self) -> &Tracker {
        self.preserved.tracker()
    }

    /// The map's bitmaps that are used where they are.
    pub(crate) fn bitmaps(&self) -> &Bitmaps {
        self.preserved.bitmaps()
    }

    /// The pages whose bitmaps are, or may be, read where they are.
    pub(crate) fn in_place(&self) -> &[(Pfn, Pfn)] {
        self.preserved.pages_in_place()
    }

    /// The order of a preserved folio that starts at `pfn`, the largest if there are several.
    #[inline(always)]
    fn head_order(&self, pfn: Pfn) -> Option<Order> {
        let preserved = self.preserved();
        let used = || preserved.orders().filter(|order| preserved.len_of(*order) > 0);
        let orders = self.orders.get_or_init(|| used().collect::<Vec<_>>().into_iter().rev().collect());
        orders.iter().copied().find(|order| preserved.contains(pfn, *order))
    }

    fn restored(&self) -> MutexGuard<'_, Tracker> {
        self.restored.lock()
    }

    fn page(&self) -> PageSize {
        self.preserved.geometry().page()
    }

    /// Claims the folio at `phys` (`kho_restore_folio`).
    ///
    /// # Errors
    /// [`Error::NotRestorable`]: no head page of a preserved folio, restored before, or of an order beyond `max`.
    // Two callers, and the one for arenas is a hot path: without this it costs 80 instructions more (`make guard`).
    #[inline(always)]
    pub(crate) fn restore_folio(&self, phys: Phys, max: Option<u32>) -> Result<(Pfn, Order)> {
        let (pfn, order) = self.find(phys)?;
        if let Some(max) = max.filter(|max| order.get() > *max) {
            return Err(not_restorable(phys, NotRestorable::OrderTooLarge { order: order.get(), max }));
        }
        if !self.restored().preserve(pfn, order)? {
            return Err(not_restorable(phys, NotRestorable::AlreadyRestored));
        }
        Ok((pfn, order))
    }

    /// Takes back a claim of a folio that could not be used.
    #[cold]
    #[inline(never)]
    pub(crate) fn give_back(&self, pfn: Pfn, order: Order) {
        // A folio that was just claimed is one: unmarking it cannot fail.
        let _ = self.restored().unpreserve(pfn, order);
    }

    /// The same for a range of pages.
    pub(crate) fn give_back_pages(&self, pfn: Pfn, nr_pages: u64, cuts: &[Pfn]) {
        let mut restored = self.restored();
        for (start, end) in cut_at(pfn, Pfn(pfn.0 + nr_pages), cuts) {
            // As above.
            let _ = restored.unpreserve_pages(start, end.0 - start.0);
        }
    }

    /// Claims the folios at many addresses, all or none. Returns their orders. The heads are marked in `allocated` too.
    /// None of them may lie in the page ranges `in_place`, where bitmaps are read: a folio that does has been marked by
    /// another process after the map was checked.
    ///
    /// # Errors
    /// As [`Claims::restore_folio`], for the first address in the list that cannot be claimed, be it because it stands in
    /// the list before; [`Error::NoMemory`] for the bitmaps of what was restored.
    pub(crate) fn restore_many(
        &self,
        phys: &[u64],
        max: Option<u32>,
        allocated: Option<&mut Tracker>,
        in_place: &[(Pfn, Pfn)],
    ) -> Result<Vec<u8>> {
        let preserved = self.preserved();
        let mut taking = Taking { preserved, restored: &mut self.restored(), allocated };
        let orders = self.take_many(&mut taking, phys, max)?;
        let allocated = taking.allocated.as_deref();
        let overlap = |(start, end): &(Pfn, Pfn)| Some((*start, allocated?.overlapping(*start, *end)?.0));
        if let Some((bitmap, head)) = in_place.iter().find_map(overlap) {
            taking.give_all_back(self.page(), phys, &orders);
            let why = NotRestorable::Map { bitmap: self.page().phys(bitmap).0 };
            return Err(not_restorable(self.page().phys(head), why));
        }
        Ok(orders)
    }

    fn take_many(&self, taking: &mut Taking<'_>, phys: &[u64], max: Option<u32>) -> Result<Vec<u8>> {
        let preserved = taking.preserved;
        let mut used = preserved.orders().filter(|order| preserved.len_of(*order) > 0);
        if let (Some(order), None) = (used.next(), used.next())
            && max.is_none_or(|max| order.get() <= max)
            && taking.all_of(phys, order)?
        {
            return Ok(vec![order.index() as u8; phys.len()]);
        }
        // Several orders, or a list with something wrong in it: in the list's own order, so that the first is named.
        let mut orders = Vec::with_capacity(phys.len());
        for &at in phys {
            let taken = self.find(Phys(at)).and_then(|(pfn, order)| match max {
                Some(max) if order.get() > max => {
                    Err(not_restorable(Phys(at), NotRestorable::OrderTooLarge { order: order.get(), max }))
                }
                _ if taking.one(pfn, order)? => Ok(order),
                _ => Err(not_restorable(Phys(at), NotRestorable::AlreadyRestored)),
            });
            match taken {
                Ok(order) => orders.push(order.index() as u8),
                Err(e) => {
                    taking.give_all_back(self.page(), phys, &orders);
                    return Err(e);
                }
            }
        }
        Ok(orders)
    }

    /// Claims `nr_pages` pages that were preserved as a range (`kho_restore_pages`): every block of the split, or none.
    /// The range is cut at `cuts` first, as it was when it was preserved.
    ///
    /// # Errors
    /// [`Error::NotRestorable`] naming the first block that is not there; [`Error::OutOfRange`].
    pub(crate) fn restore_pages(&self, phys: Phys, nr_pages: u64, cuts: &[Pfn]) -> Result<Pfn> {
        let pfn = self.head_page(phys)?;
        let end = self.page().end_of(pfn, nr_pages)?;
        let mut restored = self.restored();
        let pieces = || cut_at(pfn, end, cuts);
        for (at, order) in pieces().flat_map(|(start, end)| aligned_blocks(start, end)) {
            let refuse = |why| Err(not_restorable(self.page().phys(at), why));
            if !self.preserved().contains(at, order) {
                return refuse(NotRestorable::NeverPreserved);
            }
            if restored.contains(at, order) {
                return refuse(NotRestorable::AlreadyRestored);
            }
        }
        for (start, end) in pieces() {
            restored.preserve_pages(start, end.0 - start.0)?;
        }
        Ok(pfn)
    }

    /// Where a range of an image was cut when it was preserved, as the nodes of its machine are not known: after each folio
    /// that is smaller than the split of the whole range would make it.
    ///
    /// ```text
    /// pages 0 to 15, a node begins at 6     preserved: [0 4) [4 6) [6 8) [8 16)     cuts: 4, 6
    /// ```
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::NotRestorable`] for an address inside a page.
    pub(crate) fn cuts_of(&self, phys: Phys, nr_pages: u64) -> Result<Vec<Pfn>> {
        let mut at = self.head_page(phys)?;
        let end = self.page().end_of(at, nr_pages)?;
        let mut cuts = Vec::new();
        while let Some((_, order)) = aligned_blocks(at, end).next() {
            if self.preserved().contains(at, order) {
                at.0 += order.nr_pages();
                continue;
            }
            match self.head_order(at) {
                // Each node costs a cut for every order at most.
                Some(smaller) if smaller < order && cuts.len() < MOST_CUTS => {
                    at.0 += smaller.nr_pages();
                    cuts.push(at);
                }
                _ => break,
            }
        }
        Ok(cuts)
    }

    #[inline(always)]
    fn head_page(&self, phys: Phys) -> Result<Pfn> {
        let unaligned = NotRestorable::Unaligned { page: self.page().bytes() };
        self.page().pfn_exact("phys", phys).map_err(|_| not_restorable(phys, unaligned))
    }

    /// The folio whose head page is at `phys`.
    #[inline(always)]
    fn find(&self, phys: Phys) -> Result<(Pfn, Order)> {
        let pfn = self.head_page(phys)?;
        if let Some(order) = self.head_order(pfn) {
            return Ok((pfn, order));
        }
        Err(not_restorable(
            phys,
            match self.preserved().covering(pfn) {
                None => NotRestorable::NeverPreserved,
                Some((head, order)) => NotRestorable::Interior { head: self.page().phys(head).0, order: order.get() },
            },
        ))
    }

    /// `page->private` of a page: the marker, if it is the head of a folio that was not restored, else 0.
    pub(crate) fn private(&self, pfn: Pfn) -> u64 {
        match self.head_order(pfn) {
            Some(order) if !self.restored().contains(pfn, order) => self.marker.value(order),
            _ => 0,
        }
    }

    /// The folios that were not restored.
    pub(crate) fn unrestored(&self) -> Result<Tracker> {
        let mut left = self.preserved().clone();
        left.subtract(&self.restored())?;
        Ok(left)
    }

    /// Bytes that it takes to know what was restored.
    pub(crate) fn restored_bytes(&self) -> u64 {
        self.restored().nbytes()
    }

    /// How many folios were restored.
    pub(crate) fn nr_restored(&self) -> u64 {
        self.restored().len()
    }
}

/// Restores the folios of one handover.
///
/// One call does all of the work, so that the caller's dynamic dispatch costs no more than a jump.
pub(crate) trait Restore: Any + Send + Sync {
    /// Restores the folio whose head is at `phys`.
    ///
    /// # Errors
    /// As [`Claims::restore_folio`], and the memory's refusal.
    fn restore_folio(&self, phys: Phys) -> Result<(Pfn, Order)>;

    /// Restores the folios at many addresses, all or none. Returns their orders.
    ///
    /// # Errors
    /// As [`Claims::restore_many`], and the memory's refusal.
    fn restore_many(&self, phys: &[u64]) -> Result<Vec<u8>>;

    /// Restores `nr_pages` pages that were preserved as a range, all or none; `cuts_at_nodes` as in [`crate::abi::Abi`].
    ///
    /// # Errors
    /// As [`Claims::restore_pages`], and the memory's refusal.
    fn restore_pages(&self, phys: Phys, nr_pages: u64, cuts_at_nodes: bool) -> Result<Pfn>;
}

/// Restoring from an image: a folio is marked as restored, and nothing else changes.
pub(crate) struct FromImage {
    pub(crate) claims: Arc<Claims>,
    pub(crate) max_page_order: Option<u32>,
}

impl Restore for FromImage {
    fn restore_folio(&self, phys: Phys) -> Result<(Pfn, Order)> {
        self.claims.restore_folio(phys, self.max_page_order)
    }

    fn restore_many(&self, phys: &[u64]) -> Result<Vec<u8>> {
        self.claims.restore_many(phys, self.max_page_order, None, &[])
    }

    fn restore_pages(&self, phys: Phys, nr_pages: u64, cuts_at_nodes: bool) -> Result<Pfn> {
        let cuts = if cuts_at_nodes { self.claims.cuts_of(phys, nr_pages)? } else { Vec::new() };
        self.claims.restore_pages(phys, nr_pages, &cuts)
    }
}

/// Claims being made, under one lock.
struct Taking<'a> {
    preserved: &'a Tracker,
    restored: &'a mut Tracker,
    allocated: Option<&'a mut Tracker>,
}

impl Taking<'_> {
    /// Takes a preserved folio's marker; false if it is gone.
    fn one(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        if !self.restored.preserve(pfn, order)? {
            return Ok(false);
        }
        if let Some(allocated) = &mut self.allocated
            && let Err(e) = allocated.preserve(pfn, order)
        {
            self.restored.unpreserve(pfn, order)?;
            return Err(e);
        }
        Ok(true)
    }

    fn give_back(&mut self, pfn: Pfn, order: Order) {
        // A folio that was just taken is one: unmarking it cannot fail.
        let _ = self.restored.unpreserve(pfn, order);
        let _ = self.allocated.as_mut().map(|allocated| allocated.unpreserve(pfn, order));
    }

    fn give_all_back(&mut self, page: PageSize, phys: &[u64], orders: &[u8]) {
        for (&at, &order) in phys.iter().zip(orders) {
            self.give_back(page.pfn(Phys(at)), Order::saturating(order.into()));
        }
    }

    /// Takes folios of one order; false, and nothing taken, if one of them cannot be.
    fn all_of(&mut self, phys: &[u64], order: Order) -> Result<bool> {
        let pfns = Pages { phys, page: self.preserved.geometry().page() };
        self.restored.take_many(self.preserved, self.allocated.as_deref_mut(), &pfns, order).or_else(|e| match e {
            Error::Misaligned { .. } | Error::OutOfRange { .. } => Ok(false),
            e => Err(e),
        })
    }
}

/// Addresses as pfns; one in the middle of a page as a pfn that no folio has.
struct Pages<'a> {
    phys: &'a [u64],
    page: PageSize,
}

impl Words for Pages<'_> {
    fn len(&self) -> usize {
        self.phys.len()
    }

    fn copy(&self, at: usize, into: &mut [u64]) {
        for (pfn, phys) in into.iter_mut().zip(&self.phys[at..]) {
            *pfn = phys.rotate_right(self.page.shift());
        }
    }
}

fn not_restorable(phys: Phys, why: NotRestorable) -> Error {
    Error::NotRestorable { phys: phys.0, why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::Geometry;
    use crate::units::PageSize;
    use proptest::prelude::*;

    fn claims(folios: &[(u64, u64)]) -> Claims {
        let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
        for &(pfn, order) in folios {
            t.preserve(Pfn(pfn), Order::new(order).unwrap()).unwrap();
        }
        Claims::new(t, Marker::Magic)
    }

    #[test]
    fn a_long_list_is_restored_once_whatever_its_order() {
        let pages: Vec<u64> = (0..1_000_000).map(|n| n * 0x9e37_79b9 % (1 << 24)).collect();
        let claims = claims(&pages.iter().map(|pfn| (*pfn, 0)).collect::<Vec<_>>());
        let phys: Vec<u64> = pages.iter().map(|pfn| pfn << 12).collect();
        let mut allocated = Tracker::new(Geometry::new(PageSize::Size4K, 512).unwrap());
        let mut twice = phys.clone();
        twice.push(phys[17]);
        let error = claims.restore_many(&twice, None, Some(&mut allocated), &[]).unwrap_err();
        assert_eq!(error.to_string(), not_restorable(Phys(phys[17]), NotRestorable::AlreadyRestored).to_string());
        assert_eq!((claims.nr_restored(), allocated.len()), (0, 0));
        assert_eq!(claims.restore_many(&phys, None, Some(&mut allocated), &[]).unwrap(), vec![0; phys.len()]);
        assert_eq!((claims.nr_restored(), allocated.len()), (phys.len() as u64, phys.len() as u64));
        assert!(allocated == *claims.preserved());
        assert!(claims.restore_many(&phys[3..4], None, None, &[]).is_err());
        // In two lists; the second comes folio by folio, in addition to what was allocated before.
        let claims = super::tests::claims(&pages.iter().map(|pfn| (*pfn, 0)).collect::<Vec<_>>());
        allocated.clear();
        allocated.preserve(Pfn(1 << 30), Order::new(4).unwrap()).unwrap();
        for part in phys.chunks(phys.len() / 2) {
            assert_eq!(claims.restore_many(part, None, Some(&mut allocated), &[]).unwrap(), vec![0; part.len()]);
        }
        assert!(allocated.unpreserve(Pfn(1 << 30), Order::new(4).unwrap()).unwrap());
        assert!(allocated == *claims.preserved());
    }

    proptest! {
        #[test]
        fn many_are_restored_as_one_by_one_or_not_at_all(
            folios in prop::collection::vec((0u64..40, 0u64..3), 1..20),
            one_order: bool,
            before in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
            list in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
            other in prop::option::of(0u64..0x40_000),
            max in prop::option::of(0u32..3),
        ) {
            let order = |o| if one_order { 1 } else { o };
            let folios: Vec<_> = folios.into_iter().map(|(pfn, o)| (pfn >> order(o) << order(o), order(o))).collect();
            let (many, single) = (claims(&folios), claims(&folios));
            for at in before {
                let phys = Phys(at.get(&folios).0 << 12);
                prop_assert_eq!(many.restore_folio(phys, max).is_ok(), single.restore_folio(phys, max).is_ok());
            }
            let restored = many.nr_restored();
            let mut list: Vec<u64> = list.iter().map(|at| at.get(&folios).0 << 12).collect();
            list.extend(other);
            let one_by_one: Result<Vec<u8>> =
                list.iter().map(|at| single.restore_folio(Phys(*at), max).map(|(_, order)| order.index() as u8)).collect();
            let mut allocated = Tracker::new(many.preserved().geometry());
            match (many.restore_many(&list, max, Some(&mut allocated), &[]), one_by_one) {
                (Ok(orders), Ok(expected)) => {
                    prop_assert_eq!(orders, expected);
                    prop_assert_eq!(many.nr_restored(), restored + list.len() as u64);
                    prop_assert_eq!(allocated.len(), list.len() as u64);
                }
                (Err(error), Err(expected)) => {
                    prop_assert_eq!(error.to_string(), expected.to_string());
                    prop_assert_eq!(many.nr_restored(), restored);
                    prop_assert!(allocated.is_empty());
                }
                (found, expected) => prop_assert!(false, "{found:?}, not {expected:?}"),
            }
        }
    }
}
