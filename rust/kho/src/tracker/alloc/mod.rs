//! Sources of blocks that are not an arena: the heap.

#![deny(unsafe_code)]

pub(super) mod heap;
