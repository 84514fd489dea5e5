//! A pool that reuses the allocation of the last large list.
//!
//! The first touch of fresh memory is a page fault per page, which takes the kernel longer than filling the page takes us.

#![forbid(unsafe_code)]

use crate::mapping;
use std::mem;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Bytes of an allocation that is kept: smaller ones are cheap to make, larger ones are too much to hold.
const KEPT: Range<usize> = 4 << 20..256 << 20;

/// One kept allocation, the longest of those returned. The kernel may reclaim its pages in the meantime.
#[derive(Debug)]
pub struct BufferPool<T>(Mutex<Vec<T>>);

impl<T> BufferPool<T> {
    /// An empty pool.
    pub const fn new() -> Self {
        BufferPool(Mutex::new(Vec::new()))
    }

    /// An empty list for about `len` items: the kept allocation if `len` fills at least half of it, else a new list.
    pub fn take(&self, len: usize) -> Vec<T> {
        let fits = |kept: &Vec<T>| (kept.capacity() / 2..=kept.capacity()).contains(&len);
        self.lock().filter(|kept| fits(kept)).map(|mut kept| mem::take(&mut *kept)).unwrap_or_default()
    }

    /// Returns a list's allocation to the pool, which keeps it if it is large and longer than the one held.
    pub fn keep(&self, mut items: Vec<T>) {
        items.clear();
        let large = KEPT.contains(&(items.capacity() * size_of::<T>()));
        if let Some(mut kept) = self.lock()
            && large
            && items.capacity() > kept.capacity()
            && mapping::mark_reclaimable(items.spare_capacity_mut())
        {
            *kept = items;
        }
    }

    /// Does not wait: in a child of fork() the lock may be held by a thread that no longer exists.
    fn lock(&self) -> Option<MutexGuard<'_, Vec<T>>> {
        self.0.try_lock().ok()
    }
}

impl<T> Default for BufferPool<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allocation_of_a_long_list_is_reused_by_a_list_of_about_that_length() {
        let pool = BufferPool::new();
        pool.keep(vec![1u64; 1000]);
        assert_eq!(pool.take(1000).capacity(), 0);
        let list = vec![1u64; 4 << 20];
        let place = list.as_ptr();
        pool.keep(list);
        pool.keep(vec![1; 2 << 20]);
        for another in [1 << 20, 5 << 20] {
            assert_eq!(pool.take(another).capacity(), 0);
        }
        let list = pool.take(3 << 20);
        assert!(list.is_empty() && list.as_ptr() == place);
        assert_eq!(pool.take(3 << 20).capacity(), 0);
    }
}
