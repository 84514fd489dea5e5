//! Writing a handover: memory to allocate from, the preserved-memory map and the root FDT, and taking an arena over.

#![deny(unsafe_code)]

pub mod arena;
pub mod outgoing;
mod take_over;
