//! Linux Kexec HandOver (KHO) in userspace.
//!
//! Rooms, from the ground up; a room imports only from those above it in this list.

pub mod units;

pub mod error;

pub mod cmdline;
pub mod memory;

pub mod fdt;

pub mod tracker;

pub use error::{Error, Result};
