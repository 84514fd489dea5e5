//! Trackers as bytes: the Roaring format, and a format of our own for pickles.

#![forbid(unsafe_code)]

pub(super) mod roaring;
pub(super) mod state;
