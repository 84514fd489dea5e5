//! Operations on lists of folios: survey the list, partition it by block, apply it.

#![forbid(unsafe_code)]

pub(super) mod batch;
pub(super) mod partition;
pub(super) mod survey;
