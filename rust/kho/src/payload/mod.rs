//! Data of a handover that may be large: page lists and files. The small structures around them are read in
//! Python, where third parties add their own decoders.

#![forbid(unsafe_code)]

pub mod memfd;
pub mod unlisted;
pub mod vmalloc;

pub use memfd::{Memfd, MemfdFolio, MemfdVersion};
pub use vmalloc::{ChunkOwners, Vmalloc};
