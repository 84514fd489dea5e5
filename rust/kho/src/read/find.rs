//! Searches a memory for handovers, in one pass over everything that is not a hole.
//!
//! Three traces are looked for: root FDTs (page-aligned, `compatible = "kho-v..."`), what tells a kernel of one (x86's
//! `struct kho_data` in setup_data, arm64's `/chosen`), and pages that can be a scratch array (abi.md section 2). What else
//! is of use is noted on the way: pages that can be the structure of a memfd, and VMCOREINFO.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::fdt::Fdt;
use crate::memory::{PhysMemory, PhysRange};
use crate::payload::unlisted;
use crate::read::root;
use crate::scratch::ScratchArea;
use crate::units::{PageSize, Phys};
use memchr::memmem;
use std::collections::BTreeSet;

/// A place where a kernel was told of a handover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pointer {
    /// The physical address of the root FDT.
    pub fdt: Phys,
    /// The physical address of the scratch array.
    pub scratch: Phys,
    /// Bytes of the scratch array.
    pub scratch_len: u64,
}

/// What a search found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Root FDTs, ascending.
    pub fdts: Vec<Phys>,
    /// Where a kernel was told of a handover.
    pub pointers: Vec<Pointer>,
    /// Pages that can be scratch arrays, with what they would say.
    pub scratch_arrays: Vec<(Phys, Vec<ScratchArea>)>,
    /// The same for arrays that something follows in their page. The kernel allocates the array alone, so what lies
    /// after it may be of anything.
    pub open_arrays: Vec<(Phys, Vec<ScratchArea>)>,
    /// Pages that can be the structure of a memfd, ascending ([`unlisted::candidate`]).
    pub memfds: Vec<Phys>,
    /// Pages that begin as VMCOREINFO does, ascending.
    pub vmcoreinfo: Vec<Phys>,
    /// The bytes that were searched, where that was not all data there is.
    pub searched: Option<u64>,
    boot_fdts: usize,
}

const WINDOW: usize = 1 << 20;
/// What a window repeats of the one before it, so that nothing is missed on the seam.
const OVERLAP: usize = 4096;
/// Pages are looked at at the smallest page size: addresses of larger ones are among them.
const STEP: usize = PageSize::Size4K.bytes() as usize;
/// More of one kind than this, and the memory is made of decoys.
const MOST: usize = 4096;
/// Devicetrees that are looked into for `/chosen`: each may be megabytes.
const MOST_BOOT_FDTS: usize = 64;
/// Pages with VMCOREINFO that are kept: a kernel has one, and those before it may have left theirs.
const MOST_VMCOREINFO: usize = 64;
/// How VMCOREINFO begins, in a page of its own (kernel/vmcore_info.c).
const VMCOREINFO: &[u8] = b"OSRELEASE=";
/// `{ u32 type = SETUP_KEXEC_KHO (10); u32 len = 32; }` of a setup_data entry, then `struct kho_data`.
const SETUP_KEXEC_KHO: [u8; 8] = [10, 0, 0, 0, 32, 0, 0, 0];
const FDT_MAGIC: [u8; 4] = [0xd0, 0x0d, 0xfe, 0xed];

/// Searches all of `memory`, or as much of a packed one as it can plausibly be ([`PhysMemory::most_to_search`]). `progress` is told how many bytes of data have been seen, and ends the search with an error.
///
/// # Errors
/// What reading the memory returns; what `progress` does.
pub fn find(memory: &dyn PhysMemory, mut progress: impl FnMut(u64) -> Result<()>) -> Result<Found> {
    let setup = memmem::Finder::new(&SETUP_KEXEC_KHO);
    let mut found = Found::default();
    let mut fdts = BTreeSet::new();
    let mut window = vec![0; WINDOW];
    let mut seen = 0;
    let mut next = memory.next_to_search(Phys(0))?;
    while let Some(PhysRange { start, len }) = next {
        let first = start.0 & !(STEP as u64 - 1);
        let mut at = if memory.contains(Phys(first), start.0 - first) { first } else { start.0 };
        let last = start.0 + (len - 1);
        loop {
            let size = usize::try_from((last - at).min(WINDOW as u64 - 1)).unwrap_or(0) + 1;
            let bytes = &mut window[..size];
            memory.read_to_search(Phys(at), bytes)?;
            look(memory, &setup, Phys(at), bytes, &mut found, &mut fdts);
            seen += size as u64;
            progress(seen)?;
            if seen > memory.most_to_search() {
                found.searched = Some(seen);
                found.fdts = fdts.into_iter().collect();
                return Ok(found);
            }
            if last - at < WINDOW as u64 {
                break;
            }
            at += (WINDOW - OVERLAP) as u64;
        }
        next = match last.checked_add(1) {
            Some(after) => memory.next_to_search(Phys(after))?,
            None => None,
        };
    }
    found.fdts = fdts.into_iter().collect();
    Ok(found)
}

fn look(
    memory: &dyn PhysMemory,
    setup: &memmem::Finder<'_>,
    at: Phys,
    bytes: &[u8],
    found: &mut Found,
    fdts: &mut BTreeSet<Phys>,
) {
    let skip = usize::try_from(at.0.next_multiple_of(STEP as u64) - at.0).unwrap_or(0);
    for offset in (skip..bytes.len()).step_by(STEP) {
        let page = &bytes[offset..bytes.len().min(offset + STEP)];
        let phys = Phys(at.0 + offset as u64);
        if page.starts_with(&FDT_MAGIC) {
            if fdts.len() < MOST && root::is_root(memory, phys) {
                fdts.insert(phys);
            } else if found.boot_fdts < MOST_BOOT_FDTS {
                found.boot_fdts += 1;
                found.pointers.extend(chosen(memory, phys));
            }
        } else if page.starts_with(VMCOREINFO) {
            if found.vmcoreinfo.len() < MOST_VMCOREINFO && found.vmcoreinfo.last().is_none_or(|p| *p < phys) {
                found.vmcoreinfo.push(phys);
            }
        } else if let Some((areas, closed)) = scratch_array(page) {
            let arrays = if closed { &mut found.scratch_arrays } else { &mut found.open_arrays };
            if arrays.len() < MOST && arrays.last().is_none_or(|(p, _)| *p < phys) {
                arrays.push((phys, areas));
            }
        } else if page.len() == STEP
            && found.memfds.len() < unlisted::MOST
            && found.memfds.last().is_none_or(|p| *p < phys)
            && unlisted::candidate(page).is_some()
        {
            found.memfds.push(phys);
        }
    }
    for hit in setup.find_iter(bytes).take(MOST) {
        let data = bytes.get(hit + SETUP_KEXEC_KHO.len()..).and_then(|b| b.first_chunk::<32>());
        if let Some(pointer) = data.and_then(kho_data)
            && found.pointers.len() < MOST
            && !found.pointers.contains(&pointer)
        {
            found.pointers.push(pointer);
        }
    }
}

/// The `n`th u64 of some bytes.
fn word(bytes: &[u8], n: usize) -> Option<u64> {
    bytes.get(n * 8..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}

/// `struct kho_data { u64 fdt_addr, fdt_size, scratch_addr, scratch_size; }` (arch/x86/include/uapi/asm/setup_data.h).
fn kho_data(bytes: &[u8; 32]) -> Option<Pointer> {
    let (fdt, fdt_size) = (word(bytes, 0)?, word(bytes, 1)?);
    let (scratch, scratch_len) = (word(bytes, 2)?, word(bytes, 3)?);
    let plausible = fdt % STEP as u64 == 0 && fdt != 0 && fdt_size > 0 && scratch_len % 16 == 0;
    plausible.then_some(Pointer { fdt: Phys(fdt), scratch: Phys(scratch), scratch_len })
}

/// `/chosen` of a boot devicetree: `linux,kho-fdt` and `linux,kho-scratch`, `<addr size>` in big-endian cells.
fn chosen(memory: &dyn PhysMemory, phys: Phys) -> Option<Pointer> {
    /// The largest devicetree arm64 boots with (MAX_FDT_SIZE).
    const MAX_BOOT_FDT: u64 = 2 << 20;
    let header = memory.read_vec("FDT header", phys, 40).ok()?;
    let total = u64::from(crate::fdt::totalsize(&header)?).min(MAX_BOOT_FDT);
    let blob = memory.read_vec("FDT", phys, total).ok()?;
    let (fdt, _) = Fdt::parse_partial(&blob).ok()?;
    let chosen = fdt.node("/chosen").ok()?;
    let cells = |name| {
        let value = chosen.prop(name)?;
        let (addr, size) = value.split_at_checked(8)?;
        Some((u64::from_be_bytes(addr.try_into().ok()?), u64::from_be_bytes(size.try_into().ok()?)))
    };
    let (fdt, _) = cells("linux,kho-fdt")?;
    let (scratch, scratch_len) = cells("linux,kho-scratch")?;
    Some(Pointer { fdt: Phys(fdt), scratch: Phys(scratch), scratch_len })
}

/// Beyond every physical address of x86_64 and arm64.
const BEYOND: u64 = 1 << 52;
const MIB: u64 = 1 << 20;

/// The areas of a page that begins with what a scratch array looks like: low, global and at least one node's, each
/// with an address and a size in whole MiB, disjoint. Whether zeros follow, or the page ends.
fn scratch_array(page: &[u8]) -> Option<(Vec<ScratchArea>, bool)> {
    let mut areas: Vec<ScratchArea> = Vec::new();
    let mut closed = true;
    for i in 0..page.len() / 16 {
        let (addr, size) = (word(page, 2 * i)?, word(page, 2 * i + 1)?);
        if addr == 0 && size == 0 {
            break;
        }
        let whole = addr % MIB == 0 && size % MIB == 0 && addr != 0 && size != 0;
        let clash = || areas.iter().any(|a| a.overlaps(addr, size));
        if !whole || addr.checked_add(size).is_none_or(|end| end > BEYOND) || clash() {
            closed = false;
            break;
        }
        areas.push(ScratchArea { addr, size });
    }
    (areas.len() >= 3).then_some((areas, closed))
}

/// How far what a pointer leads to can be the scratch array that it names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Soundness {
    /// Areas that no kernel allocates, but areas: in whole pages, disjoint, below the end of physical addresses.
    Odd,
    /// Three areas or more, aligned as every kernel aligns them.
    Sound,
    /// As [`Soundness::Sound`], and all of them are in this memory.
    Here,
}

/// What the areas of an array can be; `None` if it is not one. The kernel that is loaded and not started is told where its
/// array *will* be copied to: until then, anything lies there.
pub fn soundness(memory: &dyn PhysMemory, areas: &[ScratchArea]) -> Option<Soundness> {
    const PAGE: u64 = PageSize::Size4K.bytes();
    let inside = |area: &ScratchArea| area.addr.checked_add(area.size).is_some_and(|end| end <= BEYOND);
    let mut by_address: Vec<_> = areas.iter().filter(|area| area.size > 0).collect();
    by_address.sort_unstable_by_key(|area| area.addr);
    let disjoint = by_address.is_sorted_by(|a, b| !a.overlaps(b.addr, b.size));
    let odd = !by_address.is_empty()
        && disjoint
        && areas.iter().all(|a| a.addr != 0 && a.addr % PAGE == 0 && a.size % PAGE == 0 && inside(a));
    // Sizes of the command line are not rounded before Linux 7.1, and any of them may be 0 from 6.18 on.
    let sound = areas.len() >= 3
        && !by_address.is_empty()
        && disjoint
        && areas.iter().all(|a| a.addr != 0 && a.addr % MIB == 0 && inside(a));
    let here = || areas.iter().all(|area| memory.contains(Phys(area.addr), area.size));
    match (odd, sound) {
        (_, true) if here() => Some(Soundness::Here),
        (_, true) => Some(Soundness::Sound),
        (true, false) => Some(Soundness::Odd),
        (false, false) => None,
    }
}

/// The array that a kernel was told of together with `fdt`: of several the soundest, then the first.
pub fn told_scratch(memory: &dyn PhysMemory, found: &Found, fdt: Phys) -> Option<(Phys, Vec<ScratchArea>, Soundness)> {
    let mut best: Option<(Phys, Vec<ScratchArea>, Soundness)> = None;
    for pointer in found.pointers.iter().filter(|pointer| pointer.fdt == fdt) {
        let Ok(areas) = read_scratch(memory, pointer.scratch, pointer.scratch_len) else { continue };
        let Some(sound) = soundness(memory, &areas) else { continue };
        if best.as_ref().is_none_or(|(_, _, other)| sound > *other) {
            best = Some((pointer.scratch, areas, sound));
        }
    }
    best
}

/// Reads the scratch array at an address that the caller names, without a length: it ends at the first entry of zeros.
///
/// # Errors
/// [`Error::Invalid`] if no scratch array lies there; [`Error::OutsideMemory`].
pub(crate) fn scratch_array_at(memory: &dyn PhysMemory, phys: Phys) -> Result<Vec<ScratchArea>> {
    let page = memory.read_vec("scratch array", phys, STEP as u64)?;
    scratch_array(&page).map(|(areas, _)| areas).ok_or_else(|| {
        let why = format!(
            "no scratch array lies at {phys}: it has at least three (address, size), low, global and one per node, in \
             whole MiB, and then zeros"
        );
        Error::Invalid { what: "scratch", why }
    })
}

/// Reads the scratch array that a kernel was told of.
///
/// # Errors
/// [`crate::Error::OutsideMemory`] if it is not in this memory.
pub fn read_scratch(memory: &dyn PhysMemory, phys: Phys, len: u64) -> Result<Vec<ScratchArea>> {
    let bytes = memory.read_vec("scratch array", phys, len.min(1 << 16))?;
    let areas = bytes.chunks_exact(16).filter_map(|entry| {
        let (addr, size) = (word(entry, 0)?, word(entry, 1)?);
        Some(ScratchArea { addr, size })
    });
    Ok(areas.collect())
}
