//! Linux Kexec HandOver (KHO) in userspace.
//!
//! Rooms, from the ground up; a room imports only from those above it in this list.

#![deny(unsafe_code)]

pub mod error;
pub mod units;

mod buffer_pool;
pub mod mapping;
mod parallel;
mod tuning;

pub mod cmdline;
pub mod fdt;
pub mod memory;
mod scratch;
pub mod tracker;

pub mod abi;
pub mod payload;

mod read;
mod write;

pub use buffer_pool::BufferPool;
pub use error::{Error, Result};
pub use read::{address, find, incoming, owners, root, snapshot, verify};
pub use write::{arena, outgoing};
