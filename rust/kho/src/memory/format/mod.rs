//! File formats of memory images: each module recognizes one and lists its segments.

#![forbid(unsafe_code)]

pub(crate) mod codec;
pub(crate) mod elf;
pub(crate) mod flat;
pub(crate) mod foreign;
pub(crate) mod kdump;
pub(crate) mod lime;
