//! Other sets of numbers.

use std::collections::HashSet;

/// A set that is filled, emptied and listed one number at a time.
pub(crate) trait Peer: Clone {
    const NAME: &'static str;
    fn inserted(pfns: &[u64]) -> Self;
    fn remove_each(&mut self, pfns: &[u64]);
    fn list(&self) -> Vec<u32>;
    fn is_empty(&self) -> bool;
    fn nbytes(&self) -> u64;
}

impl Peer for roaring::RoaringBitmap {
    const NAME: &'static str = "roaring";

    fn inserted(pfns: &[u64]) -> Self {
        let mut set = Self::new();
        for &pfn in pfns {
            set.insert(pfn as u32);
        }
        set
    }

    fn remove_each(&mut self, pfns: &[u64]) {
        for &pfn in pfns {
            self.remove(pfn as u32);
        }
    }

    fn list(&self) -> Vec<u32> {
        self.iter().collect()
    }

    fn is_empty(&self) -> bool {
        self.is_empty()
    }

    fn nbytes(&self) -> u64 {
        self.serialized_size() as u64
    }
}

impl Peer for croaring::Bitmap {
    const NAME: &'static str = "croaring";

    fn inserted(pfns: &[u64]) -> Self {
        let mut set = Self::new();
        for &pfn in pfns {
            set.add(pfn as u32);
        }
        set
    }

    fn remove_each(&mut self, pfns: &[u64]) {
        for &pfn in pfns {
            self.remove(pfn as u32);
        }
    }

    fn list(&self) -> Vec<u32> {
        self.to_vec()
    }

    fn is_empty(&self) -> bool {
        self.is_empty()
    }

    fn nbytes(&self) -> u64 {
        self.get_serialized_size_in_bytes::<croaring::Portable>() as u64
    }
}

/// The standard library's.
#[derive(Clone)]
pub(crate) struct Hashed(HashSet<u64>);

impl Peer for Hashed {
    const NAME: &'static str = "HashSet";

    fn inserted(pfns: &[u64]) -> Self {
        let mut set = HashSet::new();
        for &pfn in pfns {
            set.insert(pfn);
        }
        Hashed(set)
    }

    fn remove_each(&mut self, pfns: &[u64]) {
        for pfn in pfns {
            self.0.remove(pfn);
        }
    }

    fn list(&self) -> Vec<u32> {
        self.0.iter().map(|pfn| *pfn as u32).collect()
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A slot has 8 bytes and one of control; capacity is seven eighths of the slots.
    fn nbytes(&self) -> u64 {
        self.0.capacity() as u64 * 8 / 7 * 9
    }
}
