//! Compressed dumps of Linux, as makedumpfile and QEMU's `dump-guest-memory -z` write them (makedumpfile's
//! diskdump_mod.h, header versions 1 to 6, 64-bit little-endian).
//!
//! ```text
//! block 0    1 ..          1 + sub_hdr_size ..                     ..
//! header     sub header    bitmap of RAM   bitmap of what is here  descriptors           pages
//! "KDUMP   " notes         bit n: pfn n                            {offset, size, flags, page_flags} each
//! ```
//!
//! The n-th set bit's page is described by the n-th descriptor. Pages of zeros share one, and what it describes is the
//! first page after the descriptors. All dumped pages one after the other are a file of their own here, so that a
//! run of memory is a segment like any other's.

#![forbid(unsafe_code)]

use crate::error::{Result, SourceProblem};
use crate::filter::Absent;
use crate::memory::backing::{Backing, Segment, Store};
use crate::memory::format::codec::Codec;
use crate::memory::note::{MAX_NOTES, Machine, NoteBytes};
use crate::memory::part::{Cut, Part};
use crate::memory::source::Source;
use crate::memory::{Absence, PhysRange, Room, absence};
use crate::units::{PageSize, Pfn};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

const SIGNATURE: &[u8; 8] = b"KDUMP   ";
/// Where `machine` stands: `struct new_utsname` is at 12, six strings of 65 bytes.
const UTS_MACHINE: Range<usize> = 12 + 4 * 65..12 + 5 * 65;
const NODENAME: Range<usize> = 12 + 65..12 + 2 * 65;
/// The filter's level that leaves out nothing but pages of zeros.
const LEVEL_ZERO: u32 = 1;
/// Bytes of `struct disk_dump_header` and of `struct kdump_sub_header` that are read.
const HEADER: usize = 464;
const SUB_HEADER: usize = 104;
/// Bytes of `struct page_desc`.
const DESCRIPTOR: u64 = 24;
/// Descriptors read at a time.
const AT_ONCE: u64 = 256;
/// Unpacked pages that are kept.
const KEPT: usize = 16;
/// Bytes of a bitmap read at a time, a multiple of 8.
const BITMAP_WINDOW: u64 = 1 << 16;

pub(crate) fn is_kdump(file: &Backing) -> bool {
    let mut signature = [0; SIGNATURE.len()];
    file.store.read_exact_at(0, &mut signature).is_ok() && signature == *SIGNATURE
}

/// Reads the headers and the bitmaps. Pages may be missing: that is for who reads them.
///
/// # Errors
/// [`SourceProblem::Dump`] for what cannot be, or is not 64-bit little-endian, or ends before its descriptors.
pub(crate) fn open(source: Source, file: Backing) -> Result<Part> {
    let header = Header::read(&file)?;
    let capacity = file.size.saturating_sub(header.descriptors).min(file.held) / DESCRIPTOR;
    let most = Room::new(file.held).items();
    let page = header.page;
    let mut runs = Runs { capacity: capacity.min(1 << (63 - page.shift())), most, ..Runs::default() };
    header.walk(&file, &header.bitmap, |first, pages| runs.add(first, pages))?;
    runs.close();
    let mut ram = Runs { most, ..Runs::default() };
    if let Some(bitmap) = &header.ram {
        header.walk(&file, bitmap, |first, pages| ram.add(first, pages))?;
    }
    if runs.missing.len() as u64 > most || ram.missing.len() as u64 > most {
        let why =
            format!("its bitmaps name more than the {most} runs of pages that {:#x} bytes can describe", file.held);
        return Err(file.error(SourceProblem::Dump { why }));
    }
    if runs.found.is_empty() && runs.missing.is_empty() && ram.missing.is_empty() && !header.split {
        return Err(file.error(SourceProblem::Dump { why: "no page was dumped".into() }));
    }
    let (path, held, size) = (file.path.clone(), file.held, runs.count << page.shift());
    let notes = header.notes(&file);
    let pages = Pages {
        zeros: zero_page(&file, header.descriptors + DESCRIPTOR * runs.claimed, page),
        descriptors: header.descriptors,
        page,
        packed: header.packed,
        kept: Mutex::default(),
        file,
    };
    let mut missing = std::mem::take(&mut runs.missing);
    if pages.lost_the_last(runs.count) {
        runs.found = pages.still_there(&runs.found, &mut missing, most)?;
    }
    let range = |first: u64, pages: u64| PhysRange { start: page.phys(Pfn(first)), len: pages << page.shift() };
    // Shared by all: there may be millions.
    let (cut_path, claim): (Arc<Path>, Arc<str>) = (path.as_path().into(), "kdump file".into());
    let cut = |&(first, pages): &(u64, u64)| Cut {
        path: Arc::clone(&cut_path),
        claim: Arc::clone(&claim),
        missing: range(first, pages),
    };
    let cuts: Vec<_> = missing.iter().map(cut).collect();
    let mut absences: Vec<_> = cuts.iter().map(|cut| Absence { range: cut.missing, why: Absent::CutOff }).collect();
    let segment = |run: &Run, filled: u64| Segment {
        first: page.phys(Pfn(run.first)).0,
        len: run.pages << page.shift(),
        offset: run.index << page.shift(),
        filled: filled << page.shift(),
        index: None,
        backing: 0,
    };
    let mut segments: Vec<_> = runs.found.iter().map(|run| segment(run, run.pages)).collect();
    let left_out =
        ram.missing.iter().map(|&(first, pages)| Absence { range: range(first, pages), why: Absent::LeftOut });
    let last = |range: PhysRange| range.start.0 + (range.len - 1);
    let dumped = segments.iter().map(|s| (s.first, s.last()));
    let mut dumped: Vec<_> = dumped.chain(cuts.iter().map(|cut| (cut.missing.start.0, last(cut.missing)))).collect();
    dumped.sort_unstable();
    let left_out = absence::without(left_out.collect(), dumped.into_iter());
    if header.level == Some(LEVEL_ZERO) {
        // Pages of zeros alone were left out, so their contents are known.
        segments.extend(left_out.iter().map(|zeros| {
            let PhysRange { start, len } = zeros.range;
            Segment { first: start.0, len, offset: 0, filled: 0, index: None, backing: 0 }
        }));
    } else {
        absences.extend(left_out);
    }
    let machine = header.machine.or_else(|| machine_of(&notes));
    let vmcoreinfo = header.vmcoreinfo(&pages.file);
    let backing = Backing { path, size, held, store: Box::new(pages) };
    let level = header.level.filter(|level| *level > 0);
    Ok(Part { machine, notes, cuts, absences, level, vmcoreinfo, ..Part::new(source, backing, segments) })
}

/// The machine whose registers a core's first note has: QEMU calls it "Unknown", of arm64 always.
fn machine_of(notes: &[NoteBytes]) -> Option<Machine> {
    const NT_PRSTATUS: u32 = 1;
    /// Bytes of `struct elf_prstatus`.
    const X86_64: usize = 336;
    const ARM64: usize = 392;
    let status = notes.iter().flat_map(NoteBytes::iter).find(|n| n.name == b"CORE" && n.kind == NT_PRSTATUS)?;
    match status.desc.len() {
        X86_64 => Some(Machine::X86_64),
        ARM64 => Some(Machine::Aarch64),
        _ => None,
    }
}

/// The offset that descriptors of zero pages have, if there is one.
fn zero_page(file: &Backing, offset: u64, page: PageSize) -> Option<u64> {
    let mut bytes = vec![1; usize::try_from(page.bytes()).ok()?];
    file.store.read_exact_at(offset, &mut bytes).ok()?;
    bytes.iter().all(|&byte| byte == 0).then_some(offset)
}

struct Header {
    page: PageSize,
    machine: Option<Machine>,
    /// The bitmap of what was dumped, in bytes of the file.
    bitmap: Range<u64>,
    /// The bitmap of RAM, if there is one.
    ram: Option<Range<u64>>,
    /// The filter's level.
    level: Option<u32>,
    /// Whether this is a part of a split dump: another part may have all pages.
    split: bool,
    packed: Packed,
    /// The pfns that this file can have pages of: below `max_mapnr`, and of a split dump its part.
    pfns: Range<u64>,
    descriptors: u64,
    notes: Range<u64>,
    vmcoreinfo: Range<u64>,
}

impl Header {
    fn read(file: &Backing) -> Result<Self> {
        let wrong = |why: String| file.error(SourceProblem::Dump { why });
        let main: [u8; HEADER] = bytes(file, 0, "its header")?;
        let half = |at: usize| main[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let version = half(8);
        if !(1..=6).contains(&version) {
            return Err(wrong(format!("header version {version}, where 1 to 6 are known")));
        }
        let page = PageSize::new(half(428).into())
            .map_err(|e| wrong(format!("{e}; only 64-bit little-endian machines have KHO")))?;
        let block = page.bytes();
        let (sub_blocks, bitmap_blocks) = (u64::from(half(432)), u64::from(half(436)));
        let sub: [u8; SUB_HEADER] = bytes(file, block, "its sub header")?;
        let word = |at: usize| sub[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let split = sub[12..16] != [0; 4] && version >= 2;
        let (max_mapnr, part) = match version {
            6 => (word(96), word(80)..word(88)),
            _ => (half(440).into(), word(16)..word(24)),
        };
        // Blocks are counted in 32 bits and have 64 KiB at most.
        let start = (1 + sub_blocks) * block;
        let one = max_mapnr.div_ceil(8).div_ceil(block);
        let (mut bitmap_bytes, mut packed) = (bitmap_blocks * block, Packed::ByPage);
        if bitmap_blocks == one && main[NODENAME].starts_with(b"synthetic\0") {
            // kdumpling up to 0.4.0 counts one of the two bitmaps that it writes, and has a flag of its own.
            if block != PageSize::Size4K.bytes() {
                return Err(wrong(format!(
                    "it is kdumpling's, with pages of {block:#x} bytes: write an ELF core with it"
                )));
            }
            bitmap_bytes *= 2;
            packed = Packed::ByHeader(half(424));
        }
        let descriptors = start + bitmap_bytes;
        if descriptors > file.size {
            return Err(wrong(format!(
                "it is cut off: its bitmaps end at {descriptors:#x}, and the file at {:#x}, so that none of its pages is \
                 there",
                file.size
            )));
        }
        let (ram, bitmap) = if one.checked_mul(2).is_some_and(|both| bitmap_bytes / block >= both) {
            let middle = start + bitmap_bytes / 2;
            (Some(start..middle), middle..descriptors)
        } else {
            (None, start..descriptors)
        };
        let limit = max_mapnr.min(8 * (bitmap.end - bitmap.start)).min(page.pfn_limit());
        Ok(Header {
            page,
            machine: match main[UTS_MACHINE].split(|&byte| byte == 0).next() {
                Some(b"x86_64") => Some(Machine::X86_64),
                Some(b"aarch64") => Some(Machine::Aarch64),
                _ => None,
            },
            bitmap,
            ram,
            level: sub[8..].first_chunk().map(|b| u32::from_le_bytes(*b)),
            split,
            packed,
            pfns: if split { part.start.min(limit)..part.end.min(limit) } else { 0..limit },
            descriptors,
            notes: if version >= 4 { word(48)..word(48).saturating_add(word(56)) } else { 0..0 },
            vmcoreinfo: if version >= 3 { word(32)..word(32).saturating_add(word(40)) } else { 0..0 },
        })
    }

    /// The notes; none if they are not there.
    fn notes(&self, file: &Backing) -> Vec<NoteBytes> {
        optional(file, &self.notes).map(|bytes| NoteBytes { align: 4, bytes }).into_iter().collect()
    }

    /// VMCOREINFO, which is text of its own next to the notes; none if it is not there.
    fn vmcoreinfo(&self, file: &Backing) -> Option<Vec<u8>> {
        optional(file, &self.vmcoreinfo)
    }

    /// Calls `run` for the set bits of a bitmap, passing over holes of a sparse file.
    fn walk(&self, file: &Backing, bitmap: &Range<u64>, mut run: impl FnMut(u64, u64)) -> Result<()> {
        let end = bitmap.start + self.pfns.end.div_ceil(8);
        let mut at = bitmap.start + self.pfns.start / 64 * 8;
        let mut window = vec![0; BITMAP_WINDOW as usize];
        while at < end {
            let Some(data) = file.store.data_in(at..end) else { break };
            // Words of the bitmap start at multiples of 8 bytes of it.
            at = at.max(data.start - (data.start - bitmap.start) % 8);
            let stop = data.end.min(end);
            while at < stop {
                let n = (end - at).min(BITMAP_WINDOW);
                let n = usize::try_from(n).unwrap_or(0);
                window[n..].fill(0);
                file.store.read_exact_at(at, &mut window[..n]).map_err(|e| match e.kind() {
                    io::ErrorKind::UnexpectedEof => {
                        let why = "it is cut off in its bitmaps, so that it is not known which pages it has".into();
                        file.error(SourceProblem::Dump { why })
                    }
                    _ => file.error(SourceProblem::Io(e)),
                })?;
                let first = (at - bitmap.start) * 8;
                for (pfn, word) in (first..).step_by(64).zip(window[..n.next_multiple_of(8)].chunks_exact(8)) {
                    let word = word.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
                    self.bits(pfn, word, &mut run);
                }
                at += n.next_multiple_of(8) as u64;
            }
        }
        Ok(())
    }

    /// The set bits of one word that lie within `pfns`.
    fn bits(&self, first: u64, mut word: u64, run: &mut impl FnMut(u64, u64)) {
        let below = self.pfns.start.saturating_sub(first).min(64);
        let above = self.pfns.end.saturating_sub(first).min(64);
        word &= low(above) & !low(below);
        while word != 0 {
            let skip = u64::from(word.trailing_zeros());
            let len = u64::from((!(word >> skip)).trailing_zeros()).min(64 - skip);
            run(first + skip, len);
            word &= !(low(len) << skip);
        }
    }
}

/// The lowest `n` of 64 bits.
const fn low(n: u64) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// Pages that follow one another, in memory and among the descriptors.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    pages: u64,
    /// The first one's descriptor.
    index: u64,
}

/// The runs of a bitmap, as far as there are descriptors for them: not more of them than the file could hold.
#[derive(Default)]
struct Runs {
    capacity: u64,
    /// Runs without descriptors that are kept.
    most: u64,
    found: Vec<Run>,
    open: Option<Run>,
    /// Pages in the runs, and pages in the bitmap.
    count: u64,
    claimed: u64,
    /// Runs without descriptors, (first page, pages), and at most one more than `most`.
    missing: Vec<(u64, u64)>,
}

impl Runs {
    /// Adds `pages` set bits from `first`, which is after all earlier ones.
    fn add(&mut self, first: u64, pages: u64) {
        self.claimed = self.claimed.saturating_add(pages);
        let here = pages.min(self.capacity - self.count);
        if here > 0 {
            match &mut self.open {
                Some(run) if run.first + run.pages == first => run.pages += here,
                _ => {
                    self.close();
                    self.open = Some(Run { first, pages: here, index: self.count });
                }
            }
            self.count += here;
        }
        if here < pages {
            append(&mut self.missing, first + here, pages - here, self.most);
        }
    }

    fn close(&mut self) {
        self.found.extend(self.open.take());
    }
}

/// Adds pages to runs that end before them, but to no more than one run beyond `most`.
fn append(runs: &mut Vec<(u64, u64)>, first: u64, pages: u64, most: u64) {
    let full = runs.len() as u64 > most;
    match runs.last_mut() {
        Some((start, n)) if *start + *n == first => *n += pages,
        _ if full => {}
        _ => runs.push((first, pages)),
    }
}

/// Bytes of the file, at most as many as are kept of notes; none if they are not there.
fn optional(file: &Backing, place: &Range<u64>) -> Option<Vec<u8>> {
    let len = place.end.min(file.size).saturating_sub(place.start).min(MAX_NOTES);
    let mut bytes = vec![0; usize::try_from(len).ok().filter(|len| *len > 0)?];
    file.store.read_exact_at(place.start, &mut bytes).ok()?;
    Some(bytes)
}

/// Reads `N` bytes of a header.
fn bytes<const N: usize>(file: &Backing, offset: u64, what: &str) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    file.store.read_exact_at(offset, &mut bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            let why = format!("{what} at {offset:#x} (+{N:#x}), but the file ends at {:#x}", file.size);
            file.error(SourceProblem::Dump { why })
        }
        _ => file.error(SourceProblem::Io(e)),
    })?;
    Ok(bytes)
}

/// `struct page_desc`, without the page's own flags.
#[derive(Clone, Copy)]
struct Descriptor {
    offset: u64,
    size: u64,
    flags: u32,
}

/// Where it stands how a page is packed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Packed {
    /// In its descriptor's flags.
    ByPage,
    /// In the header's `status`; the descriptor's flags say only whether it is (kdumpling).
    ByHeader(u32),
}

impl Packed {
    /// The flags of a descriptor as makedumpfile would have written them.
    const fn flags(self, flags: u32) -> u32 {
        /// What kdumpling sets of a page that it compressed, and of all.
        const COMPRESSED: u32 = 1;
        const DUMPABLE: u32 = 4;
        match self {
            Packed::ByPage => flags,
            Packed::ByHeader(_) if flags & !COMPRESSED != DUMPABLE => flags,
            Packed::ByHeader(_) if flags & COMPRESSED == 0 => 0,
            Packed::ByHeader(8) => 0x20,
            Packed::ByHeader(status) => status,
        }
    }
}

/// The dumped pages, one after the other.
struct Pages {
    file: Backing,
    page: PageSize,
    descriptors: u64,
    packed: Packed,
    /// Where the page is that all zero pages share.
    zeros: Option<u64>,
    kept: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

/// An error that says what is wrong with a page.
fn bad(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Pages {
    /// Descriptors from `index` on: `n` of them, or as many as are read at once.
    fn describe(&self, index: u64, n: u64) -> io::Result<Vec<Descriptor>> {
        let n = n.min(AT_ONCE);
        let mut raw = vec![0; (n * DESCRIPTOR) as usize];
        self.file.store.read_exact_at(self.descriptors + index * DESCRIPTOR, &mut raw)?;
        let word = |b: &[u8]| b.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let half = |b: &[u8]| b.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let one = |b: &[u8]| Descriptor {
            offset: word(b),
            size: half(&b[8..]).into(),
            flags: self.packed.flags(half(&b[12..])),
        };
        Ok(raw.chunks_exact(DESCRIPTOR as usize).map(one).collect())
    }

    /// Whether the page's bytes are there to read. A dump that ran out of space leaves descriptors of zeros.
    fn present(&self, descriptor: Descriptor) -> bool {
        descriptor.offset != 0
            && descriptor.offset.checked_add(descriptor.size).is_some_and(|end| end <= self.file.size)
    }

    fn is_zero(&self, descriptor: Descriptor) -> bool {
        descriptor.flags == 0 && Some(descriptor.offset) == self.zeros && descriptor.size == self.page.bytes()
    }

    /// Unpacks a page into `page`, which is as long.
    fn unpack(&self, index: u64, descriptor: Descriptor, page: &mut [u8], packed: &mut Vec<u8>) -> io::Result<()> {
        let Descriptor { offset, size, flags } = descriptor;
        let place = || format!("descriptor {index} (offset {offset:#x}, size {size:#x}, flags {flags:#x})");
        if !self.present(descriptor) {
            let why = if offset == 0 { "the page was not written" } else { "the file is cut off before it" };
            return Err(bad(format!("{}: {why}", place())));
        }
        if self.is_zero(descriptor) {
            page.fill(0);
            return Ok(());
        }
        let codec = Codec::of_flags(flags).ok_or_else(|| bad(format!("{}: unknown compression", place())))?;
        if codec == Codec::Stored && size == page.len() as u64 {
            return self.file.store.read_exact_at(offset, page);
        }
        // Packed pages that are not smaller are stored; a little more than a page is what a writer may still produce.
        if size > 2 * page.len() as u64 {
            return Err(bad(format!("{}: more than two pages of {:#x} bytes", place(), page.len())));
        }
        packed.resize(usize::try_from(size).unwrap_or(0), 0);
        self.file.store.read_exact_at(offset, packed)?;
        codec.unpack(packed, page).map_err(|why| bad(format!("{}: {codec}: {why}", place())))
    }

    /// The page, from those kept.
    fn kept(&self, index: u64) -> Option<Arc<[u8]>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|(at, _)| *at == index).map(|(_, page)| Arc::clone(page))
    }

    fn keep(&self, index: u64, page: &[u8]) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_back();
        }
        kept.push_front((index, page.into()));
    }
}

impl Store for Pages {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let shift = self.page.shift();
        let size = self.page.bytes() as usize;
        let (mut packed, mut whole) = (Vec::new(), Vec::new());
        let (mut known, mut known_from) = (Vec::new(), 0);
        // A small request is likely to be followed by another one for the same page.
        let small = buf.len() <= size;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let index = at >> shift;
            let skip = (at & (self.page.bytes() - 1)) as usize;
            let (now, later) = rest.split_at_mut(rest.len().min(size - skip));
            if let Some(page) = self.kept(index) {
                now.copy_from_slice(&page[skip..skip + now.len()]);
            } else {
                if index >= known_from + known.len() as u64 {
                    let wanted = 1 + (later.len() as u64).div_ceil(self.page.bytes());
                    (known, known_from) = (self.describe(index, wanted)?, index);
                }
                let descriptor = known[(index - known_from) as usize];
                if now.len() == size && !small {
                    self.unpack(index, descriptor, now, &mut packed)?;
                } else {
                    whole.resize(size, 0);
                    self.unpack(index, descriptor, &mut whole, &mut packed)?;
                    now.copy_from_slice(&whole[skip..skip + now.len()]);
                    if small {
                        self.keep(index, &whole);
                    }
                }
            }
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn most_to_search(&self, held: u64) -> u64 {
        /// What a dump of any size may unpack to; more is how many times its own size.
        const BASE: u64 = 1 << 30;
        const RATIO: u64 = 128;
        BASE.saturating_add(held.saturating_mul(RATIO))
    }

    /// Passes over pages that share the one of zeros, and over those that are not there.
    fn data_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        self.first_run(within, |descriptor| self.present(descriptor) && !self.is_zero(descriptor))
    }

    fn to_read_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        self.first_run(within, |descriptor| !self.present(descriptor) || !self.is_zero(descriptor))
    }
}

impl Pages {
    /// Whether the last of `count` pages, that the zero page does not stand for, is not in the file. Pages are written in
    /// the order of their descriptors, so that a file is cut off if, and only if, that one is gone.
    fn lost_the_last(&self, count: u64) -> bool {
        let mut end = count;
        while end > 0 {
            let start = end.saturating_sub(AT_ONCE);
            let Ok(descriptors) = self.describe(start, end - start) else { return true };
            if let Some(last) = descriptors.iter().rev().find(|descriptor| !self.is_zero(**descriptor)) {
                return !self.present(*last);
            }
            end = start;
        }
        false
    }

    /// The parts of the runs whose pages are in the file; the others go to `missing`, which is sorted then.
    fn still_there(&self, runs: &[Run], missing: &mut Vec<(u64, u64)>, most: u64) -> Result<Vec<Run>> {
        let mut found: Vec<Run> = Vec::new();
        let mut lost = Vec::new();
        for run in runs {
            let mut done = 0;
            while done < run.pages {
                let descriptors = self.describe(run.index + done, run.pages - done);
                let there: Vec<bool> = match descriptors {
                    Ok(descriptors) => descriptors.iter().map(|d| self.present(*d)).collect(),
                    Err(_) => vec![false; (run.pages - done).min(AT_ONCE) as usize],
                };
                for (at, there) in (done..).zip(&there) {
                    let (first, index) = (run.first + at, run.index + at);
                    match found.last_mut() {
                        _ if !there => append(&mut lost, first, 1, most),
                        Some(last) if (last.first + last.pages, last.index + last.pages) == (first, index) => {
                            last.pages += 1;
                        }
                        _ => found.push(Run { first, pages: 1, index }),
                    }
                }
                if lost.len() as u64 > most || found.len() as u64 > most {
                    let why = format!("more than {most} runs of its pages are missing");
                    return Err(self.file.error(SourceProblem::Dump { why }));
                }
                done += there.len() as u64;
            }
        }
        // What has no descriptor comes after what has one.
        missing.splice(0..0, lost);
        Ok(found)
    }

    /// The first run of pages in `within` whose descriptors `matches` says yes to.
    fn first_run(&self, within: Range<u64>, matches: impl Fn(Descriptor) -> bool) -> Option<Range<u64>> {
        let shift = self.page.shift();
        let last = (within.end - 1) >> shift;
        let mut index = within.start >> shift;
        let mut found: Option<u64> = None;
        // Few at first: runs may be short.
        let mut n = 8;
        while index <= last {
            let Ok(descriptors) = self.describe(index, n.min(last - index + 1)) else {
                // A read there reports it.
                return Some(found.map_or((index << shift).max(within.start), |start| start)..within.end);
            };
            n = AT_ONCE;
            for descriptor in descriptors {
                let data = matches(descriptor);
                match found {
                    None if data => found = Some((index << shift).max(within.start)),
                    Some(start) if !data => return Some(start..index << shift),
                    _ => {}
                }
                index += 1;
            }
        }
        found.map(|start| start..within.end)
    }
}
