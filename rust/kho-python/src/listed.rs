//! Lists whose memory serves the next one: for the first touch of fresh memory the kernel takes longer than filling it does.

use crate::array::Item;
use kho::mapping;
use std::ops::Deref;
use std::sync::MutexGuard;

/// Bytes of a list that is not worth keeping, and of one that is too much to keep.
const KEPT: std::ops::Range<usize> = 4 << 20..256 << 20;

/// A list that was made. Dropped, its memory is kept for the next of its kind, but for what the kernel takes meanwhile:
/// one list of each kind, the longest.
pub(crate) struct Listed<T: Item>(Vec<T>);

impl<T: Item> Listed<T> {
    /// What `fill` makes of an empty list of about `len` items.
    pub(crate) fn new(len: usize, fill: impl FnOnce(&mut Vec<T>)) -> Self {
        let mut items = Vec::new();
        // Not for what would leave most of it unused.
        if let Some(mut spare) = spare::<T>()
            && (spare.capacity() / 2..=spare.capacity()).contains(&len)
        {
            items = std::mem::take(&mut *spare);
        }
        fill(&mut items);
        Listed(items)
    }
}

/// Memory that waits. Its lock is not waited for: in a child of fork() nobody may have it.
fn spare<T: Item>() -> Option<MutexGuard<'static, Vec<T>>> {
    T::spare()?.try_lock().ok()
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
        let mut items = std::mem::take(&mut self.0);
        items.clear();
        let worth = KEPT.contains(&(items.capacity() * size_of::<T>()));
        if let Some(mut spare) = spare::<T>()
            && worth
            && items.capacity() > spare.capacity()
            && mapping::unneeded(items.spare_capacity_mut())
        {
            *spare = items;
        }
    }
}
