//! One file of a memory: its segments, notes and machine, and what is missing because the file is truncated.

#![forbid(unsafe_code)]

use super::PhysRange;
use super::backing::{Backing, Segment};
use super::note::{Machine, NoteBytes};
use super::source::Source;
use std::fmt;
use std::path::PathBuf;

/// Memory that a file claims and, cut short, does not have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cut {
    /// The file.
    pub path: PathBuf,
    /// What claims it: "ELF segment 3".
    pub claim: String,
    /// The memory that is missing.
    pub missing: PhysRange,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: memory at {} (+{:#x}) is missing, the file is cut short",
            self.path.display(),
            self.claim,
            self.missing.start,
            self.missing.len
        )
    }
}

/// One file as it goes into a [`FileMemory`]: its segments are disjoint.
pub(crate) struct Part {
    pub(crate) source: Source,
    pub(crate) backing: Backing,
    pub(crate) segments: Vec<Segment>,
    /// How messages name a segment with an index.
    pub(crate) kind: &'static str,
    pub(crate) machine: Option<Machine>,
    pub(crate) notes: Vec<NoteBytes>,
    /// What its segments leave out because the file is cut short.
    pub(crate) cuts: Vec<Cut>,
    /// Whether it is a raw image: nothing in the file gives its address.
    pub(crate) raw: bool,
}

impl Part {
    pub(crate) fn new(source: Source, backing: Backing, segments: Vec<Segment>) -> Self {
        let (kind, machine) = ("segment", None);
        Part { source, backing, segments, kind, machine, notes: Vec::new(), cuts: Vec::new(), raw: false }
    }
}
