//! Lists made of a tracker: folios, pfns, blocks, runs of pages, and the n-th folio.

#![deny(unsafe_code)]

pub(super) mod iter;
mod placements;
mod rank;
mod runs;
pub(super) mod stats;
