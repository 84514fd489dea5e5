//! Root FDTs of other handovers in the same memory: a machine that was booted by one holds that one's root, too.
//!
//! The pages of the map that it leads to are given back early in boot, and used for other things; its root and its
//! subtrees stay reserved. `kexec-metadata` counts the handovers (abi.md section 6).

#![forbid(unsafe_code)]

use crate::abi::Abi;
use crate::error::{Error, RootProblem};
use crate::filter::Absent;
use crate::memory::PhysMemory;
use crate::read::root;
use crate::units::Phys;

/// What is left of the handover of a root FDT.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RootState {
    /// Its map preserves its root FDT.
    Whole,
    /// Its map can be read, and does not preserve its root FDT: the pages of the map were used again.
    Stale,
    /// Its map pointer is 0: nothing was serialized yet.
    Unset,
    /// Its map cannot be read, or its root is malformed.
    Broken(String),
    /// A part of its map is not in the dump. Of a map that is in use makedumpfile leaves out pages up to 1.7.9; else what
    /// is left out was given back.
    Absent(Absent),
    /// It was not read: there are too many roots.
    Unread,
}

impl RootState {
    /// The state of a root that could not be read.
    pub(crate) fn of(error: &Error) -> RootState {
        match error {
            Error::Root { problem: RootProblem::MapIsZero, .. } => RootState::Unset,
            error => match error.absent() {
                Some(why) => RootState::Absent(why),
                None => RootState::Broken(error.to_string()),
            },
        }
    }

    /// Whether its map is no map of this root any more, or not in the dump: memfds that it preserved may be in no map.
    pub const fn is_gone(&self) -> bool {
        matches!(self, RootState::Stale | RootState::Broken(_) | RootState::Absent(_))
    }

    /// A word for it.
    pub const fn name(&self) -> &'static str {
        match self {
            RootState::Whole => "whole",
            RootState::Stale => "stale",
            RootState::Unset => "unset",
            RootState::Broken(_) => "broken",
            RootState::Absent(why) => why.name(),
            RootState::Unread => "unread",
        }
    }
}

/// A root FDT next to the one that was chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OtherRoot {
    /// Where it lies.
    pub phys: Phys,
    /// What is left of its handover.
    pub state: RootState,
    /// How many handovers came before the kernel that it is for, from `kexec-metadata` (Linux 7.1 and later).
    pub kexec_count: Option<u32>,
}

impl OtherRoot {
    /// The root at `phys`, before its map is read.
    pub(crate) fn of(memory: &dyn PhysMemory, phys: Phys) -> OtherRoot {
        OtherRoot { phys, state: RootState::Unread, kexec_count: kexec_count(memory, phys) }
    }
}

/// The count of `struct kho_kexec_metadata { u32 version = 1; char previous_release[65]; u32 kexec_count; }`, packed.
pub(crate) fn kexec_count(memory: &dyn PhysMemory, phys: Phys) -> Option<u32> {
    let fdt = root::read_fdt(memory, phys).ok()?;
    let abi = Abi::named(fdt.root().ok()?.str(crate::abi::COMPATIBLE_PROPERTY).ok()?)?;
    let at = fdt.node("/kexec-metadata").ok()?.u64(abi.subtree_property).ok()?;
    let bytes = memory.read_vec("kexec-metadata", Phys(at), 73).ok()?;
    let number = |at: usize| bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b));
    (number(0)? == 1).then(|| number(69)).flatten()
}
