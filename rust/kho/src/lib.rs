//! Linux Kexec HandOver (KHO) in userspace.
//!
//! Rooms, from the ground up; a room imports only from those above it in this list.

#![deny(unsafe_code)]

pub mod units;

pub mod error;

mod tuning;

mod parallel;

mod buffer_pool;
pub mod cmdline;
pub mod mapping;
pub mod memory;

pub mod fdt;
pub mod tracker;

pub(crate) mod restore;

pub mod arena;

pub mod abi;

pub mod root;

pub mod find;

pub mod payload;

pub mod incoming;

pub mod address;

pub mod owners;
pub mod verify;

pub mod outgoing;
pub mod snapshot;

pub use buffer_pool::BufferPool;
pub use error::{Error, Result};
