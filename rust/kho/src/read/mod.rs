//! Reading a handover: find it, decode its map, restore its folios, verify it, attribute its pages.
//!
//! Nothing here depends on [`crate::arena`] or [`crate::outgoing`]: an image can be read where none can be written.

#![forbid(unsafe_code)]

pub mod address;
pub(crate) mod arena_note;
pub mod find;
pub mod incoming;
pub mod others;
pub mod owners;
pub(crate) mod restore;
pub mod root;
pub mod snapshot;
pub mod verify;
pub(crate) mod without_map;
