//! One file of a memory: its segments, notes and machine, and what is missing because the file is truncated.

#![forbid(unsafe_code)]

use super::backing::{Backing, Segment};
use super::note::{Machine, NoteBytes};
use super::source::Source;
use super::{Absence, PhysRange};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Memory that a file claims and, cut short, does not have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cut {
    /// The file.
    pub path: Arc<Path>,
    /// What claims it: "ELF segment 3".
    pub claim: Arc<str>,
    /// The memory that is missing; empty if the file does not name it.
    pub missing: PhysRange,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: ", self.path.display(), self.claim)?;
        match self.missing.len {
            0 => f.write_str("the file is cut off there, and how much memory is missing is not known"),
            len => write!(f, "memory at {} (+{len:#x}) is missing, the file is cut off", self.missing.start),
        }
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
    /// What is missing because the file is cut off, and does not follow from the segments.
    pub(crate) cuts: Vec<Cut>,
    /// Memory that the file names and does not have: in any order; what a segment has is taken out.
    pub(crate) absences: Vec<Absence>,
    /// The level of the filter that wrote it (makedumpfile's `-d`).
    pub(crate) level: Option<u32>,
    /// VMCOREINFO, where it is no note.
    pub(crate) vmcoreinfo: Option<Vec<u8>>,
    /// Whether it is a raw image: nothing in the file gives its address.
    pub(crate) raw: bool,
}

impl Part {
    pub(crate) fn new(source: Source, backing: Backing, segments: Vec<Segment>) -> Self {
        let (kind, machine) = ("segment", None);
        Part {
            source,
            backing,
            segments,
            kind,
            machine,
            notes: Vec::new(),
            cuts: Vec::new(),
            absences: Vec::new(),
            level: None,
            vmcoreinfo: None,
            raw: false,
        }
    }
}
