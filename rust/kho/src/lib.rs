//! Linux Kexec HandOver (KHO) in userspace.
//!
//! With KHO one kernel leaves memory to the next one across a kexec: a root FDT, a map of preserved folios, and blobs of
//! data ("subtrees"). This crate reads all of that from memory images, and writes it into memory of its own, byte for byte as
//! the kernel does. `docs/abi.md` of the repository describes the formats.
//!
//! | module | what |
//! |---|---|
//! | [`units`], [`sizes`], [`error`] | addresses, page numbers, orders, page sizes; sizes as text; one [`Error`] |
//! | [`memory`] | bounded reads of physical memory: ELF cores, kdump, LiME, raw images, bytes |
//! | [`fdt`], [`cmdline`] | devicetree blobs; `kho=` and `kho_scratch=` |
//! | [`tracker`] | sets of folios: sparse bitmaps by order |
//! | [`abi`] | one row of facts per ABI version; the formats of the map, and which one a map has |
//! | [`find`], [`incoming`], [`root`], [`snapshot`], [`address`] | reading a handover |
//! | [`verify`], [`owners`], [`payload`] | checking it, and finding out whose its pages are |
//! | [`arena`], [`outgoing`] | memory to allocate from, and writing a handover |
//!
//! # Example
//!
//! A handover in an [arena](arena::Arena): one owner preserves a page, the next one takes over and restores it, once.
//!
//! ```
//! use kho::arena::{Arena, ArenaConfig, Backing, Region};
//! use kho::incoming::{Incoming, Options};
//! use kho::memory::PhysMemory;
//! use kho::outgoing::{Outgoing, Placement};
//! use kho::units::{Order, PageSize, Phys};
//!
//! # fn main() -> kho::Result<()> {
//! let page = PageSize::Size4K;
//! let arena = Arena::new(ArenaConfig {
//!     page,
//!     max_order: Order::new(10)?,
//!     regions: vec![Region { start: Phys(0x4000_0000), len: 16 << 20, node: 0 }],
//!     scratch: Vec::new(),
//!     backing: Backing::Anonymous,
//! })?;
//!
//! // The first owner writes a page and preserves it.
//! let pfn = arena.alloc(Order::ZERO, None, false)?;
//! arena.write(page.phys(pfn), b"left to the next kernel")?;
//! let mut outgoing = Outgoing::new(&arena, "kho-v4", None, Placement::default())?;
//! outgoing.preserve_folio(pfn, Order::ZERO)?;
//! let fdt = outgoing.finalize()?;
//!
//! // The next owner finds it where the first one left it.
//! let incoming = Incoming::take_over(&arena, Some(fdt.0), &Options::default())?;
//! let (restored, order) = incoming.restore_folio(page.phys(pfn))?;
//! assert_eq!((restored, order), (pfn, Order::ZERO));
//! assert_eq!(arena.read_vec("page", page.phys(pfn), 23)?, b"left to the next kernel");
//! assert!(incoming.restore_folio(page.phys(pfn)).is_err());
//! # Ok(())
//! # }
//! ```
//!
//! A memory image is opened by [`memory::open_sources`] and read by [`incoming::Incoming::open`], which needs no arena.

#![deny(unsafe_code)]
#![warn(missing_docs)]

#[cfg(not(target_endian = "little"))]
compile_error!(
    "kho supports little-endian targets only: KHO exists on x86_64 and arm64, and its maps are little-endian"
);

// From the ground up; a module imports only from those above it. tests/test_import_graph_rust.py checks that no file
// imports itself through others, and that nothing outside `write` imports `write`.

pub mod filter;
pub mod sizes;

pub mod error;
pub mod units;

mod buffer_pool;
mod mapping;
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
pub use mapping::{FileView, Items, Mapping, punch_hole};
pub use read::{address, find, incoming, others, owners, root, snapshot, verify};
pub use write::{arena, outgoing};
