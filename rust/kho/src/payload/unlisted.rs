//! Memfds that are in no list: from PRESERVE_FD until the file is retrieved, its structure and its list of folios lie in
//! pages of their own, whether or not LUO's lists lead to them (abi.md section 6).
//!
//! The structure is at the start of a page that KHO allocated and zeroed, so a page is a candidate if it holds a plausible
//! structure and then zeros. A candidate counts if its list is exactly as long as the structure needs, in full chunks, and
//! if each entry names memory that fits the file.

#![forbid(unsafe_code)]

use super::memfd::{Head, Memfd, MemfdFolio, MemfdVersion};
use super::vmalloc::{ChunkOwners, chunk_entries};
use crate::error::Result;
use crate::memory::{PhysMemory, PhysRange};
use crate::parallel::{join, threads_for};
use crate::tracker::Tracker;
use crate::units::{Order, PageSize, Pfn, Phys};

/// Pages are looked at at the smallest page size: the starts of larger ones are among them.
const STEP: usize = PageSize::Size4K.bytes() as usize;
/// The largest file size: `loff_t` is signed.
const MAX_SIZE: u64 = 1 << 63;
/// Every `F_SEAL_*` bit that exists (include/uapi/linux/fcntl.h).
const SEALS: u32 = 0x3f;
/// VM_ALLOC, which every area has, and huge mappings.
const VMALLOC_FLAGS: [u16; 2] = [1, 3];
/// Bytes of an entry of the folio list.
const ENTRY: u64 = 16;
/// Candidates that are kept: more of them, and the memory is made of decoys.
pub const MOST: usize = 1 << 16;

/// A structure that was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unlisted {
    /// Where it lies.
    pub phys: Phys,
    /// The version of its format.
    pub version: MemfdVersion,
    /// Whether the map preserves it. Without it the map that did was given back, and sizes of folios follow from the list.
    pub preserved: bool,
}

/// Which structure the page (or the first 4096 bytes of a larger one) can begin with. Nothing is followed.
pub fn candidate(page: &[u8]) -> Option<MemfdVersion> {
    let head = page.first_chunk::<48>()?;
    // Most pages end here: the upper half of a size is zeros, and the descriptor is the last that is not.
    [MemfdVersion::V2, MemfdVersion::V1].into_iter().find(|version| {
        let len = version.nbytes();
        Head::of(&head[..len], *version).is_some_and(|head| plausible(&head))
            && page[len..].iter().all(|byte| *byte == 0)
    })
}

fn plausible(head: &Head) -> bool {
    let list = &head.folios;
    let (first, total) = (list.first.get(), u64::from(list.total_pages.get()));
    let pages = |page: PageSize| head.size.div_ceil(page.bytes());
    head.size > 0
        && head.size < MAX_SIZE
        && head.pos < MAX_SIZE
        && head.seals & !SEALS == 0
        && head.nr_folios > 0
        && first != 0
        && first.is_multiple_of(STEP as u64)
        && VMALLOC_FLAGS.contains(&list.flags.get())
        && u64::from(list.order.get()) <= Order::MAX.into()
        && PageSize::ALL
            .iter()
            .any(|page| head.nr_folios <= pages(*page) && total == list_pages(*page, head, list.order.get()))
}

/// Pages of the area that holds the list: whole blocks.
fn list_pages(page: PageSize, head: &Head, order: u16) -> u64 {
    let pages = head.nr_folios.saturating_mul(ENTRY).div_ceil(page.bytes());
    pages.checked_next_multiple_of(1 << u32::from(order).min(40)).unwrap_or(u64::MAX)
}

/// Looks for candidates in the pages of `ranges`, ascending, at most [`MOST`]; in two threads if there is much to read.
///
/// # Errors
/// What reading the memory returns.
pub fn scan(memory: &dyn PhysMemory, ranges: &[PhysRange]) -> Result<Vec<Phys>> {
    let total: u64 = ranges.iter().map(|range| range.len).fold(0, u64::saturating_add);
    let mut found = if memory.one_thread() || threads_for(usize::try_from(total).unwrap_or(usize::MAX)) < 2 {
        scan_all(memory, ranges)?
    } else {
        let (first, second) = halves(ranges, total / 2);
        let (low, high) = join(|| scan_all(memory, &first), || scan_all(memory, &second));
        let mut low = low?;
        low.extend(high?);
        low
    };
    found.truncate(MOST);
    Ok(found)
}

/// Ranges cut in two after `bytes`, at a whole page.
fn halves(ranges: &[PhysRange], bytes: u64) -> (Vec<PhysRange>, Vec<PhysRange>) {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    let mut left = bytes.next_multiple_of(PageSize::Size64K.bytes());
    for range in ranges {
        let len = left.min(range.len);
        left -= len;
        if len > 0 {
            first.push(PhysRange { len, ..*range });
        }
        if len < range.len {
            second.push(PhysRange { start: Phys(range.start.0 + len), len: range.len - len });
        }
    }
    (first, second)
}

fn scan_all(memory: &dyn PhysMemory, ranges: &[PhysRange]) -> Result<Vec<Phys>> {
    const WINDOW: u64 = 1 << 20;
    let mut found = Vec::new();
    let mut window = Vec::new();
    for range in ranges.iter().filter(|range| range.len > 0) {
        let last = range.start.0 + (range.len - 1);
        let mut at = range.start.0;
        while let Some(run) = memory.next_to_search(Phys(at))? {
            let end = last.min(run.start.0 + (run.len - 1));
            let Some(start) = run.start.0.max(at).checked_next_multiple_of(STEP as u64) else { break };
            if run.start.0 > last {
                break;
            }
            let mut from = start;
            while from < end && end - from >= STEP as u64 - 1 && found.len() < MOST {
                let len = (end - from + 1).min(WINDOW) / STEP as u64 * STEP as u64;
                window.resize(usize::try_from(len).unwrap_or(0), 0);
                memory.read_to_search(Phys(from), &mut window)?;
                let pages = (0u64..).zip(window.chunks_exact(STEP));
                let here = pages.filter(|(_, page)| candidate(page).is_some());
                found.extend(here.map(|(n, _)| Phys(from + n * STEP as u64)));
                from += len;
            }
            match end.checked_add(1) {
                Some(after) if after <= last => at = after,
                _ => break,
            }
        }
    }
    Ok(found)
}

/// How much following the lists of candidates may read in all, so that many candidates that lead to one long list end.
#[derive(Debug)]
pub struct Budget(u64);

impl Budget {
    /// For a memory of this size: each page is in one list of a kernel, and as many again may be in stale ones.
    pub fn new(memory: &dyn PhysMemory) -> Self {
        Budget(4096 + memory.room().held() / (STEP as u64 / 2))
    }
}

/// Reads the memfd at `phys`, if a structure is there whose list fits it in every respect; `None` otherwise.
///
/// With `preserved`, all of it must be preserved, and each entry be the head of a preserved folio. Without, the list must
/// name the whole file without holes, as the kernel's does: the sizes of folios follow from it.
pub fn read(
    memory: &dyn PhysMemory,
    page: PageSize,
    phys: Phys,
    preserved: Option<&Tracker>,
    budget: &mut Budget,
) -> Option<(Unlisted, Memfd)> {
    let bytes = memory.read_vec("memfd", phys, STEP as u64).ok()?;
    let version = candidate(&bytes)?;
    let head = Head::of(&bytes[..version.nbytes()], version)?;
    let kept = |phys: u64| {
        phys.is_multiple_of(page.bytes()) && preserved.is_none_or(|map| map.covering(page.pfn(Phys(phys))).is_some())
    };
    if !kept(phys.0)
        || head.nr_folios > head.size.div_ceil(page.bytes())
        || !list_is_whole(memory, page, &head, &kept, budget)
    {
        return None;
    }
    let mut memfd = Memfd::read(memory, page, phys, version, &ChunkOwners::default()).ok()?;
    memfd.orders_by_index = preserved.is_none();
    let fits = memfd.folios.len() as u64 == head.nr_folios && folios_fit(memory, page, &memfd, preserved);
    fits.then_some((Unlisted { phys, version, preserved: preserved.is_some() }, memfd))
}

/// Whether the list has exactly the chunks and blocks that the structure needs: full chunks, then the last one.
fn list_is_whole(
    memory: &dyn PhysMemory,
    page: PageSize,
    head: &Head,
    kept: &dyn Fn(u64) -> bool,
    budget: &mut Budget,
) -> bool {
    let order = head.folios.order.get();
    let total = u64::from(head.folios.total_pages.get());
    if total != list_pages(page, head, order) {
        return false;
    }
    let mut left = total >> order;
    let mut at = head.folios.first.get();
    while left > 0 {
        let here = left.min(chunk_entries(page));
        let Some(rest) = budget.0.checked_sub(here + 1) else { return false };
        budget.0 = rest;
        let Some(chunk) = (kept(at)).then(|| memory.read_vec("vmalloc chunk", Phys(at), page.bytes()).ok()).flatten()
        else {
            return false;
        };
        let word = |n: u64| {
            usize::try_from(n * 8).ok().and_then(|n| chunk.get(n..)?.first_chunk().map(|b| u64::from_le_bytes(*b)))
        };
        let block = page.bytes() << order;
        let named = |n| word(n).is_some_and(|phys| phys != 0 && kept(phys) && memory.contains(Phys(phys), block));
        if !(1..=here).all(named) || (here < chunk_entries(page) && word(here + 1) != Some(0)) {
            return false;
        }
        left -= here;
        at = word(0).unwrap_or(0);
    }
    at == 0
}

/// Whether the folios ascend in the file, do not reach into each other, and lie in memory.
fn folios_fit(memory: &dyn PhysMemory, page: PageSize, memfd: &Memfd, preserved: Option<&Tracker>) -> bool {
    let pages = memfd.size.div_ceil(page.bytes());
    // What a filter left out of a dump is in no range, but lies between the first and the last.
    let start = memory.ranges().first().map_or(0, |range| range.start.0) >> page.shift();
    let end = memory.ranges().last().map_or(0, |range| range.start.0 + (range.len - 1)) >> page.shift();
    let next = memfd.folios.iter().skip(1).map(|folio| folio.index).chain([pages]);
    let fit = |order: Order, index: u64, next: u64| next == pages || index + order.nr_pages() <= next;
    let mut all = memfd.folios.iter().zip(next);
    (preserved.is_some() || memfd.tells_orders())
        && all.all(|(folio, next)| {
            let MemfdFolio { index, .. } = *folio;
            let pfn = folio.pfn();
            let place = index < next && next <= pages && folio.flags() & !3 == 0;
            place
                && (start.max(1)..=end).contains(&pfn.0)
                && preserved.is_none_or(|map| map.head_order(pfn).is_some_and(|order| fit(order, index, next)))
        })
}

/// The memfds whose structure lies at one of `candidates` and passes [`read`], ascending.
pub fn find(
    memory: &dyn PhysMemory,
    page: PageSize,
    candidates: &[Phys],
    preserved: Option<&Tracker>,
) -> Vec<Unlisted> {
    let mut budget = Budget::new(memory);
    candidates.iter().filter_map(|phys| Some(read(memory, page, *phys, preserved, &mut budget)?.0)).collect()
}

/// The pages of preserved folios of order 0 in `ranges` are where structures lie; of candidates, those.
pub fn is_own_page(preserved: &Tracker, page: PageSize, phys: Phys) -> bool {
    phys.0.is_multiple_of(page.bytes()) && preserved.contains(Pfn(phys.0 >> page.shift()), Order::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SliceMemory;
    use crate::tracker::Geometry;
    use proptest::prelude::*;

    const PAGE: PageSize = PageSize::Size4K;

    fn page(words: &[u64]) -> Vec<u8> {
        let mut page: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        page.resize(STEP, 0);
        page
    }

    /// A memfd-v2 of three pages at page 1: list chunk at 2, list at 3, folios at 4 to 6.
    fn sample() -> Vec<u8> {
        let head = page(&[0, 3 << 12, 0, 3, 2 << 12, 1 | 1 << 32]);
        let chunk = page(&[0, 3 << 12]);
        let list = page(&[3 << 52 | 4, 0, 3 << 52 | 5, 1, 3 << 52 | 6, 2]);
        [page(&[]), head, chunk, list, page(&[7]), page(&[8]), page(&[9])].concat()
    }

    fn found(bytes: &[u8], preserved: Option<&Tracker>) -> Vec<u64> {
        let memory = SliceMemory::new([(Phys(0), bytes)]).unwrap();
        let all = PhysRange { start: Phys(0), len: bytes.len() as u64 };
        let candidates = scan(&memory, &[all]).unwrap();
        find(&memory, PAGE, &candidates, preserved).iter().map(|memfd| memfd.phys.0).collect()
    }

    #[test]
    fn a_structure_with_its_list_is_found_with_and_without_a_map() {
        let mut map = Tracker::new(Geometry::paged(PAGE));
        for pfn in 1..7 {
            map.preserve(Pfn(pfn), Order::ZERO).unwrap();
        }
        assert_eq!(found(&sample(), Some(&map)), [0x1000]);
        assert_eq!(found(&sample(), None), [0x1000]);
        map.unpreserve(Pfn(5), Order::ZERO).unwrap();
        assert_eq!(found(&sample(), Some(&map)), []);
    }

    #[test]
    fn halves_have_all_bytes_once() {
        let ranges = [PhysRange { start: Phys(0), len: 0x5000 }, PhysRange { start: Phys(0x10_0000), len: 0x9_0000 }];
        let (first, second) = halves(&ranges, 0x2_0000);
        let total = |ranges: &[PhysRange]| ranges.iter().map(|range| range.len).sum::<u64>();
        assert_eq!(total(&first) + total(&second), 0x9_5000);
        assert_eq!(total(&first), 0x2_0000);
    }

    proptest! {
        #[test]
        fn a_word_that_changes_is_no_memfd_or_another_whole_one(at in 0usize..6 * 512, value: u64) {
            let mut bytes = sample();
            bytes[512 * 8 + at * 8..][..8].copy_from_slice(&value.to_le_bytes());
            // Whatever is found can be read to its end.
            let memory = SliceMemory::new([(Phys(0), &bytes)]).unwrap();
            if let Some((_, memfd)) = read(&memory, PAGE, Phys(0x1000), None, &mut Budget::new(&memory)) {
                prop_assert_eq!(memfd.folios.len() as u64, memfd.nr_folios);
                prop_assert!(memfd.folios.iter().all(|folio| folio.pfn().0 < 7));
            }
        }

        #[test]
        fn random_words_are_no_memfd(words in proptest::collection::vec(0u64..0x8000, 6)) {
            let mut bytes = sample();
            bytes[STEP..2 * STEP].copy_from_slice(&page(&words));
            let memory = SliceMemory::new([(Phys(0), &bytes)]).unwrap();
            prop_assert!(read(&memory, PAGE, Phys(0x1000), None, &mut Budget::new(&memory)).is_none());
        }
    }
}
