//! Lists that Python has, in memory that serves the next list when they are dropped.

use crate::array::Item;
use std::ops::Deref;

/// A list that was made. Dropped, its memory is kept for the next of its kind.
pub(crate) struct Listed<T: Item>(Vec<T>);

impl<T: Item> Listed<T> {
    /// What `fill` makes of an empty list of about `len` items.
    pub(crate) fn new(len: usize, fill: impl FnOnce(&mut Vec<T>)) -> Self {
        let mut items = T::spare().map_or_else(Vec::new, |spare| spare.take(len));
        fill(&mut items);
        Listed(items)
    }
}

impl<T: Item> From<Vec<T>> for Listed<T> {
    fn from(items: Vec<T>) -> Self {
        Listed(items)
    }
}

impl<T: Item> Deref for Listed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Item> Drop for Listed<T> {
    fn drop(&mut self) {
        if let Some(spare) = T::spare() {
            spare.keep(std::mem::take(&mut self.0));
        }
    }
}
