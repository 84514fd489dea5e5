//! Placement of scratch areas, as the kernel does it at boot.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::read::arena_note::Region;
use crate::scratch::ScratchArea;

/// ARCH_LOW_ADDRESS_LIMIT of x86_64 and arm64: devices of 32 address bits reach this far.
const LOW_LIMIT: u64 = 1 << 32;

/// Places areas of the given sizes (`low, global, node 0, node 1, ...`) as the kernel does at boot: one after the
/// other, each as high in memory as it fits, aligned; the low one below 4 GiB, the last ones on their nodes
/// (`kho_reserve_scratch`, kernel/kexec_handover.c). A size of 0 asks for no area.
///
/// # Errors
/// [`Error::Invalid`] when an area does not fit: the kernel then does without KHO.
pub fn place(regions: &[Region], sizes: &[u64], align: u64) -> Result<Vec<ScratchArea>> {
    let nodes = nodes(regions);
    let mut areas: Vec<ScratchArea> = Vec::with_capacity(sizes.len());
    for (i, &size) in sizes.iter().enumerate().filter(|(_, size)| **size > 0) {
        let node = i.checked_sub(2).map(|n| nodes.get(n).copied().unwrap_or(u32::MAX));
        let limit = if i == 0 { LOW_LIMIT } else { u64::MAX };
        let fitting = regions.iter().filter(|r| node.is_none_or(|n| n == r.node));
        let highest = fitting.filter_map(|region| highest_fit(region, size, align, limit, &areas)).max();
        let Some(addr) = highest else {
            let name = match i {
                0 => "low".to_string(),
                1 => "global".to_string(),
                _ => format!("node {}", node.unwrap_or_default()),
            };
            return Err(Error::Invalid {
                what: "scratch",
                why: format!("{size:#x} bytes for the {name} area, aligned to {align:#x}, do not fit this memory"),
            });
        };
        areas.push(ScratchArea { addr, size });
    }
    Ok(areas)
}

/// The nodes that have memory, ascending.
pub fn nodes(regions: &[Region]) -> Vec<u32> {
    let mut nodes: Vec<u32> = regions.iter().map(|r| r.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

fn highest_fit(region: &Region, size: u64, align: u64, limit: u64, taken: &[ScratchArea]) -> Option<u64> {
    let mut end = region.last().saturating_add(1).min(limit);
    loop {
        let addr = end.checked_sub(size)? / align * align;
        if addr < region.start.0 || addr == 0 {
            return None;
        }
        match taken.iter().find(|area| area.overlaps(addr, size)) {
            Some(area) => end = area.addr,
            None => return Some(addr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Phys;

    const MIB: u64 = 1 << 20;

    fn region(start: u64, len: u64, node: u32) -> Region {
        Region { start: Phys(start), len, node }
    }

    #[test]
    fn areas_go_as_high_as_they_fit_and_the_low_one_below_four_gib() {
        let ram = [region(0, 2048 * MIB, 0), region(1 << 32, 2048 * MIB, 1)];
        let areas = place(&ram, &[16 * MIB, 32 * MIB, 16 * MIB, 64 * MIB], 2 * MIB).unwrap();
        let at: Vec<u64> = areas.iter().map(|a| a.addr / MIB).collect();
        assert_eq!(at, [2032, 6112, 2016, 6048]);
    }

    #[test]
    fn an_area_that_does_not_fit_is_named() {
        let e = place(&[region(0, 64 * MIB, 0)], &[16 * MIB, 3072 * MIB, 16 * MIB], 2 * MIB).unwrap_err();
        assert!(e.to_string().contains("global area"), "{e}");
    }

    #[test]
    fn overlap_is_exact_at_both_ends() {
        let area = ScratchArea { addr: 0x1000, size: 0x1000 };
        assert!(!area.overlaps(0, 0x1000) && area.overlaps(0, 0x1001));
        assert!(area.overlaps(0x1fff, 1) && !area.overlaps(0x2000, 1));
        assert!(area.overlaps(0, u64::MAX) && !area.overlaps(0x1800, 0));
    }
}
