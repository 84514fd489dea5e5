//! Checks of an arena's RAM and scratch areas, and where its file holds them.

#![forbid(unsafe_code)]

use super::header::SPAN_ALIGN;
use crate::error::{Error, Result};
use crate::memory::PhysRange;
use crate::read::arena_note::Region;
use crate::scratch::ScratchArea;
use crate::units::{PageSize, Phys};

/// Regions that can be an arena's: some, page-aligned, not empty, sorted, disjoint, inside the address space.
pub(super) fn check_regions(regions: &[Region], page: PageSize) -> Result<()> {
    let invalid = |why: String| Err(Error::Invalid { what: "regions", why });
    if regions.is_empty() {
        return invalid("an arena needs memory".into());
    }
    let mut free_from = Some(0);
    for r in regions {
        page.pfn_exact("region start", r.start)?;
        page.pfn_exact("region size", Phys(r.len))?;
        if r.len == 0 {
            return invalid(format!("the region at {} is empty", r.start));
        }
        let Some(last) = r.start.0.checked_add(r.len - 1) else {
            return Err(Error::OutOfRange { what: "region end", value: r.start.0, limit: u64::MAX });
        };
        if free_from.is_none_or(|from| r.start.0 < from) {
            return invalid(format!("the region at {} overlaps the one before it", r.start));
        }
        free_from = last.checked_add(1);
    }
    check_size(regions)
}

/// Scratch areas that can be an arena's: in its memory, disjoint.
pub(super) fn check_areas(regions: &[Region], areas: &[ScratchArea]) -> Result<()> {
    let invalid = |why: String| Err(Error::Invalid { what: "scratch", why });
    for (i, area) in areas.iter().enumerate() {
        let inside =
            regions.iter().any(|r| PhysRange { start: r.start, len: r.len }.contains(Phys(area.addr), area.size));
        if !inside || area.size == 0 {
            return invalid(format!("{:#x} (+{:#x}) is not in one region of RAM", area.addr, area.size));
        }
        if areas[..i].iter().any(|other| other.overlaps(area.addr, area.size)) {
            return invalid(format!("the area at {:#x} overlaps another", area.addr));
        }
    }
    Ok(())
}

/// `(phys, len, file offset)` of each span.
pub(super) type Layout = Vec<(u64, u64, u64)>;

/// The spans of regions that [`check_regions`] accepted, the first of them at an offset in the file.
///
/// # Errors
/// [`Error::OutOfRange`] if they do not fit a file, whose offsets have 63 bits.
pub(super) fn layout(regions: &[Region], first: u64) -> Result<Layout> {
    let mut spans = Layout::new();
    let mut total = first;
    for r in regions {
        total = total.checked_add(r.len).filter(|total| *total <= MOST).ok_or_else(|| too_large(total, r.len))?;
        match spans.last_mut() {
            Some(last) if last.0.checked_add(last.1) == Some(r.start.0) => last.1 += r.len,
            _ => spans.push((r.start.0, r.len, 0)),
        }
    }
    let mut offset = first;
    for span in &mut spans {
        span.2 = offset;
        let end = offset.checked_add(span.1).and_then(|end| end.checked_next_multiple_of(SPAN_ALIGN));
        offset = end.filter(|end| *end <= MOST).ok_or_else(|| too_large(offset, span.1))?;
    }
    Ok(spans)
}

/// The most bytes of RAM that an arena can have, its file's head included: what a file offset (and a pointer difference) can
/// say.
const MOST: u64 = i64::MAX as u64;

fn too_large(total: u64, more: u64) -> Error {
    Error::OutOfRange { what: "size of all regions", value: total.saturating_add(more), limit: MOST }
}

/// Refuses regions that are too large together.
///
/// # Errors
/// [`Error::OutOfRange`].
fn check_size(regions: &[Region]) -> Result<()> {
    layout(regions, SPAN_ALIGN).map(drop)
}
