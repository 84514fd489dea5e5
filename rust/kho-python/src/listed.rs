//! Lists that Python objects hold, whose memory is reused for later lists.

#![forbid(unsafe_code)]

use kho::{BufferPool, Error, Result};
use std::ops::Deref;

/// Initial capacity of a list whose length is not known, in items.
const FEW: usize = 64;

/// An item of a list whose allocation may come from a pool.
pub(crate) trait Pooled: Sized + 'static {
    /// The pool; `None` if lists of these items are allocated each time.
    fn spare() -> Option<&'static BufferPool<Self>> {
        None
    }
}

/// An immutable list. When it is dropped, its memory is kept for the next list of the same type.
pub(crate) struct Listed<T: Pooled>(Vec<T>);

impl<T: Pooled> Listed<T> {
    /// A list that `fill` fills; it gets an empty one with capacity for `len` items.
    ///
    /// # Errors
    /// [`Error::TooLong`].
    pub(crate) fn new(len: usize, fill: impl FnOnce(&mut Vec<T>)) -> Result<Self> {
        let mut items = T::spare().map_or_else(Vec::new, |spare| spare.take(len));
        reserve(&mut items, len)?;
        fill(&mut items);
        Ok(Listed(items))
    }

    /// Collects an iterator of unknown length.
    ///
    /// # Errors
    /// [`Error::TooLong`].
    pub(crate) fn of(there: impl Iterator<Item = T>) -> Result<Self> {
        let mut items = Vec::new();
        for item in there {
            if items.len() == items.capacity() {
                let more = items.len().max(FEW);
                reserve(&mut items, more)?;
            }
            items.push(item);
        }
        Ok(Listed(items))
    }
}

/// Reserves capacity for `more` items.
///
/// # Errors
/// [`Error::TooLong`] if the allocation fails, where `Vec::reserve` would abort the process.
pub(crate) fn reserve<T>(items: &mut Vec<T>, more: usize) -> Result<()> {
    let bytes = size_of::<T>();
    items.try_reserve_exact(more).map_err(|_| Error::TooLong { items: items.len().saturating_add(more), bytes })
}

impl<T: Pooled> From<Vec<T>> for Listed<T> {
    fn from(items: Vec<T>) -> Self {
        Listed(items)
    }
}

impl<T: Pooled> Deref for Listed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Pooled> Drop for Listed<T> {
    fn drop(&mut self) {
        if let Some(spare) = T::spare() {
            spare.keep(std::mem::take(&mut self.0));
        }
    }
}
