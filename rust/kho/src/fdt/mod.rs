//! Flattened devicetrees: a hostile-safe reader and libfdt's sequential writer and editor.
//!
//! ```text
//! header 40 | reservation map 16 n | structure block        | strings block
//! 0xd00dfeed  (addr, size)... (0,0)  BEGIN "" PROP ... END    "fdt\0preserved-memory-map\0compatible\0"
//! ```
//!
//! Header, tokens and lengths are big-endian (Devicetree Specification 0.4, chapter 5). KHO takes the format for a
//! container only: property values are in native byte order, which is little-endian wherever KHO exists.

#![forbid(unsafe_code)]

mod edit;
mod reader;
mod writer;

pub use edit::{FdtEditor, NodeOffset};
pub use reader::{Fdt, Node, Property, totalsize};
pub use writer::{FdtWriter, Placeholder};

use crate::error::{Error, FdtProblem};

/// 0xd00dfeed, the first four bytes.
pub const MAGIC: u32 = 0xd00d_feed;
/// The deepest a node may nest (the root is at 1), read or written.
pub const MAX_DEPTH: u32 = 64;
/// The longest name of a node or property in bytes, read or written. The specification has 31; an end to it keeps a
/// hostile blob from naming all its properties by one huge string.
pub const MAX_NAME: usize = 255;

/// Bytes in a header of version 17; version 16 has no `size_dt_struct`.
const HEADER_V17: usize = 40;
const HEADER_V16: usize = 36;

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

fn problem(offset: usize, problem: FdtProblem) -> Error {
    Error::Fdt { offset: offset as u64, problem }
}

/// `n` rounded up to the next token.
fn align4(n: usize) -> Option<usize> {
    n.checked_next_multiple_of(4)
}

/// A name as text, if it is one: UTF-8 without control characters (the kernel takes `reserve_mem=` names as they come).
fn printable(name: &[u8]) -> Option<&str> {
    std::str::from_utf8(name).ok().filter(|s| !s.is_empty() && s.len() <= MAX_NAME && !s.contains(char::is_control))
}

#[cfg(test)]
mod tests;
