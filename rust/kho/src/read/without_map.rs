//! Readings of a handover whose map cannot be read: nothing that it preserves is known, and the root FDT, its subtrees and
//! what they lead to still are.

#![forbid(unsafe_code)]

use crate::abi::detect::{Certainty, Hints, Reading};
use crate::error::Error;
use crate::filter::Absent;
use crate::memory::PhysMemory;
use crate::payload::unlisted;
use crate::read::root::Root;
use crate::tracker::{Geometry, Tracker};
use crate::units::{PageSize, Phys};

fn nothing(page: PageSize, page_why: String, certainty: Certainty) -> Reading {
    let preserved = Tracker::new(Geometry::paged(page)).into();
    Reading { page, page_why, bitmap: None, certainty, nodes: Vec::new(), preserved, lost: None }
}

/// The reading of a map that is like that of no known version.
pub(crate) fn unread(hints: Hints) -> Reading {
    let (page, page_why) = hints.page.unwrap_or((PageSize::Size4K, "assumed, as the map cannot be read"));
    nothing(page, page_why.into(), Certainty::Unread)
}

/// The reading of a map with a page that is not in its dump, as `error` reports: left out by a filter, or cut off.
/// `None` for any other error.
pub(crate) fn lost(
    memory: &dyn PhysMemory,
    root: &Root,
    memfds: &[Phys],
    hints: Hints,
    error: &Error,
) -> Option<Reading> {
    let why = error.absent()?;
    let at = error.place().1.map_or(root.map, Phys);
    let (page, page_why) = match hints.page {
        Some((page, why)) => (page, why.to_owned()),
        None => page_of_memfds(memory, memfds).unwrap_or_else(|| page_of_places(memory, root)),
    };
    let page_of = Phys(at.0 / page.bytes() * page.bytes());
    Some(Reading { lost: Some((page_of, why)), ..nothing(page, page_why, Certainty::Unread) })
}

/// The reading of a root without a map, next to one whose map was given back and that left memfds; `None` without memfds.
pub(crate) fn unset(memory: &dyn PhysMemory, memfds: &[Phys], page: Option<(PageSize, &str)>) -> Option<Reading> {
    let (page, page_why) = match page {
        Some((page, why)) => {
            unlisted::find(memory, page, memfds, None).first()?;
            (page, why.to_owned())
        }
        None => page_of_memfds(memory, memfds)?,
    };
    Some(nothing(page, page_why, Certainty::Likely))
}

/// The page size with which memfds are found by their content.
fn page_of_memfds(memory: &dyn PhysMemory, memfds: &[Phys]) -> Option<(PageSize, String)> {
    let page = PageSize::ALL.into_iter().find(|page| !unlisted::find(memory, *page, memfds, None).is_empty())?;
    Some((page, "memfds are found that have pages of this size; there is no map".into()))
}

/// The largest page size that divides the addresses of the root FDT, of its map, and of the ends of what a filter left out:
/// it works by pages, so that a smaller one is unlikely if there are some.
fn page_of_places(memory: &dyn PhysMemory, root: &Root) -> (PageSize, String) {
    let left_out = memory.absences().iter().filter(|absence| absence.why == Absent::LeftOut);
    let ends = left_out.fold(0, |bits, absence| bits | absence.range.start.0 | absence.range.len);
    let fits = |page: &PageSize| (ends | root.phys.0 | root.map.0).is_multiple_of(page.bytes());
    let page = PageSize::ALL.into_iter().rfind(fits).unwrap_or(PageSize::Size4K);
    (page, "the largest that divides the addresses of the root FDT, its map, and what was left out".into())
}
