//! Lists whose memory serves the next one: for the first touch of fresh memory the kernel takes longer than filling it does.

#![forbid(unsafe_code)]

use crate::mapping;
use std::mem;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Bytes of a list that is not worth keeping, and of one that is too much to keep.
const KEPT: Range<usize> = 4 << 20..256 << 20;

/// Memory of a list that was dropped, for the next of its kind, but for what the kernel takes meanwhile: one list, the
/// longest.
#[derive(Debug)]
pub struct Spare<T>(Mutex<Vec<T>>);

impl<T> Spare<T> {
    pub const fn new() -> Self {
        Spare(Mutex::new(Vec::new()))
    }

    /// An empty list for about `len` items: with the memory there is, unless most of it would stay unused.
    pub fn take(&self, len: usize) -> Vec<T> {
        let fits = |spare: &Vec<T>| (spare.capacity() / 2..=spare.capacity()).contains(&len);
        self.lock().filter(|spare| fits(spare)).map(|mut spare| mem::take(&mut *spare)).unwrap_or_default()
    }

    /// Keeps a list's memory, if it is worth that.
    pub fn keep(&self, mut items: Vec<T>) {
        items.clear();
        let worth = KEPT.contains(&(items.capacity() * size_of::<T>()));
        if let Some(mut spare) = self.lock()
            && worth
            && items.capacity() > spare.capacity()
            && mapping::unneeded(items.spare_capacity_mut())
        {
            *spare = items;
        }
    }

    /// Is not waited for: in a child of fork() nobody may have it.
    fn lock(&self) -> Option<MutexGuard<'_, Vec<T>>> {
        self.0.try_lock().ok()
    }
}

impl<T> Default for Spare<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_long_list_serves_one_about_as_long() {
        let spare = Spare::new();
        spare.keep(vec![1u64; 1000]);
        assert_eq!(spare.take(1000).capacity(), 0);
        let list = vec![1u64; 4 << 20];
        let place = list.as_ptr();
        spare.keep(list);
        spare.keep(vec![1; 2 << 20]);
        for another in [1 << 20, 5 << 20] {
            assert_eq!(spare.take(another).capacity(), 0);
        }
        let list = spare.take(3 << 20);
        assert!(list.is_empty() && list.as_ptr() == place);
        assert_eq!(spare.take(3 << 20).capacity(), 0);
    }
}
