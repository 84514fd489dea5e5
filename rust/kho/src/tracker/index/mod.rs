//! Where the blocks of one order are: a flat window of slots, and a map for blocks far beyond it.

#![deny(unsafe_code)]

pub(super) mod directory;
pub(super) mod window;
