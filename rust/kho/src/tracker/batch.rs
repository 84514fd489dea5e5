//! Many folios at once, given by their pfns in any order.

use super::Tracker;
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

impl Tracker {
    /// Marks many folios. Returns how many were not marked yet.
    ///
    /// # Errors
    /// As [`Tracker::preserve`], for the first in the list, and [`Error::Invalid`] if there are not as many orders as pfns;
    /// then nothing is marked that was not before.
    pub fn preserve_many(&mut self, pfns: &(impl Words + ?Sized), orders: Orders<'_>) -> Result<u64> {
        let page = self.geometry.page();
        each(pfns, orders, |pfn, order| {
            page.check_folio(pfn, order)?;
            self.ensure(order, (pfn.0 >> order.get()) >> self.shape.log2_bits)
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
        let page = self.geometry.page();
        each(pfns, orders, |pfn, order| page.check_folio(pfn, order))?;
        let mut gone = 0;
        each(pfns, orders, |pfn, order| self.unpreserve(pfn, order).map(|removed| gone += u64::from(removed)))?;
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
        let mut places = found.iter_mut();
        each(pfns, orders, |pfn, order| {
            if let Some(place) = places.next() {
                *place = self.contains(pfn, order).into();
            }
            Ok(())
        })
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
