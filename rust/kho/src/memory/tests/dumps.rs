//! kdump files, flattened or not, and LiME: built here byte by byte, and what is wrong with them.

#![forbid(unsafe_code)]

use super::*;
use crate::filter::Absent;
use crate::units::PageSize;

const PAGE: usize = 4096;
const FLAT_HEADER: usize = 4096;

/// A page of a dump: its pfn, what it was packed to, and the flags that say how.
type Packed = (u64, Vec<u8>, u32);

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A kdump file of these pages, by pfn, as makedumpfile would write it: descriptors of zero pages share the first page.
fn kdump(pages: &[Packed], max_mapnr: u64) -> Vec<u8> {
    let blocks = max_mapnr.div_ceil(8).div_ceil(PAGE as u64) as usize;
    let mut file = vec![0; PAGE * (2 + 2 * blocks)];
    put(&mut file, 0, b"KDUMP   ");
    put(&mut file, 8, &6u32.to_le_bytes());
    put(&mut file, 12 + 4 * 65, b"x86_64");
    for (at, value) in [(428, PAGE as u32), (432, 1), (436, 2 * blocks as u32), (440, max_mapnr as u32)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    put(&mut file, PAGE + 96, &max_mapnr.to_le_bytes());
    for (pfn, _, _) in pages {
        for bitmap in [2, 2 + blocks] {
            file[bitmap * PAGE + (pfn / 8) as usize] |= 1 << (pfn % 8);
        }
    }
    let zeros = file.len() + 24 * pages.len();
    let mut body = vec![0; PAGE];
    for (_, packed, flags) in pages {
        let zero = *flags == 0 && packed.iter().all(|&b| b == 0);
        let offset = if zero { zeros } else { zeros + body.len() };
        file.extend((offset as u64).to_le_bytes());
        file.extend((packed.len() as u32).to_le_bytes());
        file.extend(flags.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        if !zero {
            body.extend(packed);
        }
    }
    file.extend(body);
    file
}

fn zlib(page: &[u8]) -> Vec<u8> {
    miniz_oxide::deflate::compress_to_vec_zlib(page, 6)
}

fn filled(byte: u8) -> Vec<u8> {
    (0..PAGE).map(|i| byte.wrapping_add((i / 64) as u8)).collect()
}

/// Pages 3, 4 (zeros), 5 and 9, each packed another way.
fn sample() -> Vec<u8> {
    let snappy = snap::raw::Encoder::new().compress_vec(&filled(9)).unwrap();
    kdump(&[(3, filled(3), 0), (4, vec![0; PAGE], 0), (5, zlib(&filled(5)), 1), (9, snappy, 4)], 100)
}

/// Reads all there is, in every way; nothing may panic, and nothing be read twice in different ways.
fn exhaust(m: &FileMemory) {
    for range in m.ranges() {
        for at in [0, range.len / 2, range.len - 1] {
            let _ = m.read(Phys(range.start.0 + at), &mut [0; 3]);
        }
        let mut all = vec![0; range.len.min(1 << 20) as usize];
        if m.read(range.start, &mut all).is_ok() {
            let mut one = [0];
            m.read(range.start, &mut one).unwrap();
            assert_eq!(one[0], all[0]);
        }
    }
    let mut at = Phys(0);
    for _ in 0..10_000 {
        let Ok(Some(run)) = m.next_data(at) else { break };
        assert!(run.len > 0 && run.start >= at && m.contains(run.start, run.len));
        let Some(next) = run.start.0.checked_add(run.len) else { break };
        at = Phys(next);
    }
}

fn flatten(file: &[u8], step: usize) -> Vec<u8> {
    let mut flat = vec![0; FLAT_HEADER];
    put(&mut flat, 0, b"makedumpfile");
    put(&mut flat, 16, &1u64.to_be_bytes());
    put(&mut flat, 24, &1u64.to_be_bytes());
    let mut record = |offset: u64, len: u64, bytes: &[u8]| {
        flat.extend(offset.to_be_bytes());
        flat.extend(len.to_be_bytes());
        flat.extend(bytes);
    };
    // The header is written first without its content, and again at the end: later records replace earlier ones.
    record(0, 16, &[0xff; 16]);
    for (i, part) in file.chunks(step).enumerate().rev() {
        record((i * step) as u64, part.len() as u64, part);
    }
    record(u64::MAX, u64::MAX, &[]);
    flat
}

#[test]
fn a_dump_has_the_pages_of_its_bitmap() {
    let m = memory(sample()).unwrap();
    assert_eq!(m.ranges(), [range(0x3000, 0x3000), range(0x9000, 0x1000)]);
    assert_eq!(m.machine(), Some(Machine::X86_64));
    let all = m.read_vec("x", Phys(0x3000), 0x3000).unwrap();
    assert_eq!(all, [filled(3), vec![0; PAGE], filled(5)].concat());
    assert_eq!(m.read_vec("x", Phys(0x9000), 0x1000).unwrap(), filled(9));
    assert_eq!(m.read_vec("x", Phys(0x3ffe), 4).unwrap(), [filled(3)[4094], filled(3)[4095], 0, 0]);
    assert!(m.read(Phys(0x8000), &mut [0]).is_err());
    assert_eq!(m.next_data(Phys(0)).unwrap(), Some(range(0x3000, 0x1000)));
    assert_eq!(m.next_data(Phys(0x4001)).unwrap(), Some(range(0x5000, 0x1000)));
    assert_eq!(m.next_data(Phys(0x5801)).unwrap(), Some(range(0x5801, 0x7ff)));
    assert_eq!(m.next_data(Phys(0xa000)).unwrap(), None);
}

#[test]
fn a_flattened_dump_is_the_same_whatever_its_records() {
    let whole = memory(sample()).unwrap();
    for step in [17, 4096, 100_000] {
        let m = memory(flatten(&sample(), step)).unwrap();
        assert_eq!(m.ranges(), whole.ranges());
        for r in m.ranges() {
            assert_eq!(m.read_vec("x", r.start, r.len).unwrap(), whole.read_vec("x", r.start, r.len).unwrap());
        }
    }
    let core = core(&[load(after_headers(1), 0x1000, 4, 4)], b"core");
    assert_eq!(memory(flatten(&core, 7)).unwrap().read_vec("x", Phys(0x1000), 4).unwrap(), b"core");
    assert_eq!(
        refusal(flatten(&[7; 99], 10)),
        "test.elf: not a usable kdump file: the flattened file is neither kdump nor ELF"
    );
}

#[test]
fn a_part_of_a_split_dump_has_its_pfns_alone() {
    let pages = |pfns: [u64; 2]| pfns.map(|pfn| (pfn, filled(pfn as u8), 0));
    let part = |pfns: [u64; 2], first: u64, end: u64| {
        let mut file = kdump(&pages(pfns), 100);
        // Each part has the whole bitmaps.
        for bitmap in [2 * PAGE, 3 * PAGE] {
            file[bitmap] = 0b0001_0110;
            file[bitmap + 8] = 0b10;
        }
        put(&mut file, PAGE + 12, &1u32.to_le_bytes());
        put(&mut file, PAGE + 80, &first.to_le_bytes());
        put(&mut file, PAGE + 88, &end.to_le_bytes());
        memory(file).unwrap()
    };
    let first = part([1, 2], 0, 3);
    assert_eq!(first.ranges(), [range(0x1000, 0x2000)]);
    let second = part([4, 65], 3, 100);
    assert_eq!(second.ranges(), [range(0x4000, 0x1000), range(0x41000, 0x1000)]);
    assert_eq!(second.read_vec("x", Phys(0x41000), 0x1000).unwrap(), filled(65));
    // makedumpfile may put all pages into the first part; the others are valid.
    let none = part([4, 65], 70, 100);
    assert!(none.ranges().is_empty() && none.absences().is_empty());
}

#[test]
fn a_dump_that_is_cut_off_says_what_is_missing() {
    let whole = sample();
    let cut_off = |m: &FileMemory| {
        assert!(m.absences().iter().all(|absence| absence.why == Absent::CutOff));
        m.absences().iter().map(|absence| (absence.range.start.0 >> 12, absence.range.len >> 12)).collect::<Vec<_>>()
    };
    // Within the descriptors, at their start, and within the pages, where pages of zeros are shared.
    let m = memory(whole[..4 * PAGE + 3 * 24 - 1].to_vec()).unwrap();
    assert_eq!(m.ranges(), [range(0x3000, 0x3000), range(0x9000, 0x1000)]);
    assert_eq!(cut_off(&m), [(3, 3), (9, 1)]);
    let missing: Vec<_> = m.truncated().iter().map(|cut| cut.missing).collect();
    assert_eq!(missing, [range(0x3000, 0x2000), range(0x5000, 0x1000), range(0x9000, 0x1000)]);
    assert_eq!(m.next_data(Phys(0)).unwrap(), None);
    assert_eq!(
        m.read(Phys(0x3000), &mut [0]).unwrap_err().to_string(),
        "test.elf: kdump file: memory at 0x3000 (+0x1) is missing or incomplete: the file is cut off, it ends before what its headers \
         promise"
    );
    assert_eq!(cut_off(&memory(whole[..4 * PAGE].to_vec()).unwrap()), [(3, 3), (9, 1)]);
    let m = memory(whole[..4 * PAGE + 4 * 24 + 2 * PAGE].to_vec()).unwrap();
    assert_eq!(cut_off(&m), [(5, 1), (9, 1)]);
    assert_eq!(m.read_vec("x", Phys(0x3000), 0x2000).unwrap(), [filled(3), vec![0; PAGE]].concat());
    assert_eq!(
        refusal(whole[..4 * PAGE - 1].to_vec()),
        "test.elf: not a usable kdump file: it is cut off: its bitmaps end at 0x4000, and the file at 0x3fff, so that \
         none of its pages is there"
    );
}

#[test]
fn pages_of_ram_that_were_not_dumped_were_left_out() {
    let filtered = |level: u32| {
        let mut file = sample();
        put(&mut file, PAGE + 8, &level.to_le_bytes());
        // RAM is 2 to 15; 3, 4, 5 and 9 were dumped.
        put(&mut file, 2 * PAGE, &[0b1111_1100, 0xff]);
        memory(file).unwrap()
    };
    let m = filtered(31);
    assert_eq!(m.ranges(), [range(0x2000, 0xe000)]);
    let absent: Vec<_> = m.absences().iter().map(|absence| (absence.range, absence.why)).collect();
    let left_out = |start, len| (range(start, len), Absent::LeftOut);
    assert_eq!(absent, [left_out(0x2000, 0x1000), left_out(0x6000, 0x3000), left_out(0xa000, 0x6000)]);
    assert!(matches!(m.read(Phys(0x5fff), &mut [0; 2]), Err(Error::LeftOut { phys: 0x6000, len: 1, level: Some(31) })));
    assert!(matches!(m.read(Phys(0x1fff), &mut [0; 2]), Err(Error::OutsideMemory { .. })));
    // Level 1 leaves out pages of zeros alone.
    let m = filtered(1);
    assert_eq!(m.ranges(), [range(0x2000, 0xe000)]);
    assert!(m.absences().is_empty());
    assert_eq!(m.read_vec("x", Phys(0x6000), 0x3000).unwrap(), vec![0; 3 * PAGE]);
    assert_eq!(m.next_data(Phys(0x6000)).unwrap(), Some(range(0x9000, 0x1000)));
}

#[test]
fn a_flattened_dump_without_its_end_has_no_zeros_for_what_no_record_wrote() {
    let flat = flatten(&sample(), PAGE);
    // Without the record of -1 all is there.
    let m = memory(flat[..flat.len() - 16].to_vec()).unwrap();
    assert_eq!(m.read_vec("x", Phys(0x3000), 0x3000).unwrap(), [filled(3), vec![0; PAGE], filled(5)].concat());
    for len in (FLAT_HEADER..flat.len()).step_by(511) {
        let Ok(m) = memory(flat[..len].to_vec()) else { continue };
        for (pfn, page) in [(3, filled(3)), (4, vec![0; PAGE]), (5, filled(5)), (9, filled(9))] {
            if let Ok(read) = m.read_vec("x", Phys(pfn << 12), PAGE as u64) {
                assert_eq!(read, page, "{len}: {pfn}");
            }
        }
    }
}

#[test]
fn a_dump_whose_header_counts_one_bitmap_is_read() {
    let mut file = sample();
    put(&mut file, 436, &1u32.to_le_bytes());
    put(&mut file, 12 + 65, b"synthetic");
    put(&mut file, 424, &1u32.to_le_bytes());
    // Its flags: 4 for every page, and 1 for what is packed as the header says.
    for (at, flags) in [(0, 4u32), (1, 4), (2, 5), (3, 4)] {
        put(&mut file, 4 * PAGE + 24 * at + 12, &flags.to_le_bytes());
    }
    let m = memory(file).unwrap();
    assert_eq!(m.ranges(), [range(0x3000, 0x3000), range(0x9000, 0x1000)]);
    assert_eq!(m.read_vec("x", Phys(0x3000), 0x3000).unwrap(), [filled(3), vec![0; PAGE], filled(5)].concat());
}

#[test]
fn a_page_that_is_not_what_it_says_is_refused_by_place() {
    let unpacks = |flags, size: usize| {
        let mut file = sample();
        put(&mut file, 4 * PAGE + 48 + 8, &(size as u32).to_le_bytes());
        put(&mut file, 4 * PAGE + 48 + 12, &u32::to_le_bytes(flags));
        let m = memory(file).unwrap();
        m.read_vec("x", Phys(0x4000), 0x1000).unwrap();
        m.read(Phys(0x5000), &mut [0; 8]).unwrap_err().to_string()
    };
    assert!(unpacks(3, 10).ends_with("unknown compression"), "{}", unpacks(3, 10));
    assert!(unpacks(0, 10).ends_with("stored: 0xa bytes, where a page has 0x1000"), "{}", unpacks(0, 10));
    assert!(unpacks(2, 10).contains("memory at 0x5000 (+0x8): descriptor 2 (offset 0x6060"), "{}", unpacks(2, 10));
    let large = zlib(&[0; 3 * PAGE]);
    let m = memory(kdump(&[(1, large, 1)], 8)).unwrap();
    assert!(m.read(Phys(0x1000), &mut [0]).is_err());
    let m = memory(kdump(&[(1, vec![1; 3 * PAGE], 1)], 8)).unwrap();
    let error = m.read(Phys(0x1000), &mut [0]).unwrap_err().to_string();
    assert!(error.ends_with("more than two pages of 0x1000 bytes"), "{error}");
}

#[test]
fn what_a_header_claims_is_bounded_by_the_file() {
    let started = Instant::now();
    for (at, value) in [(PAGE + 96, u64::MAX), (PAGE + 96, 0), (PAGE + 80, u64::MAX), (PAGE + 56, u64::MAX)] {
        let mut file = sample();
        put(&mut file, at, &value.to_le_bytes());
        if let Ok(m) = memory(file) {
            exhaust(&m);
        }
    }
    for (at, value, why) in [
        (8, 0, "header version 0, where 1 to 6 are known"),
        (8, 7, "header version 7, where 1 to 6 are known"),
        (428, 512, "page size 512 is none of 4096, 16384, 65536; only 64-bit little-endian machines have KHO"),
        (432, u32::MAX, "it is cut off: its bitmaps end at 0x100000002000, and the file at 0x"),
        (436, u32::MAX, "it is cut off: its bitmaps end at 0x100000001000, and the file at 0x"),
    ] {
        let mut file = sample();
        put(&mut file, at, &value.to_le_bytes());
        let refused = refusal(file);
        assert!(refused.starts_with(&format!("test.elf: not a usable kdump file: {why}")), "{refused}");
    }
    // A file of holes alone, as large as they come.
    let f = file(&sample());
    f.as_file().set_len(1 << 43).unwrap();
    std::os::unix::fs::FileExt::write_all_at(f.as_file(), &0x7000_0000u32.to_le_bytes(), 436).unwrap();
    std::os::unix::fs::FileExt::write_all_at(f.as_file(), &u64::MAX.to_le_bytes(), PAGE as u64 + 96).unwrap();
    let _ = open_sources(&[Source::file(f.path())]);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn every_prefix_of_a_dump_is_read_or_refused() {
    let lime = lime(&[(0x1000, b"first"), (0x8000, b"second")]);
    for whole in [sample(), flatten(&sample(), 1000), lime] {
        for len in (0..whole.len()).step_by(if whole.len() > 1000 { 37 } else { 1 }) {
            if let Ok(m) = memory(whole[..len].to_vec()) {
                exhaust(&m);
            }
        }
    }
}

fn lime(ranges: &[(u64, &[u8])]) -> Vec<u8> {
    let mut file = Vec::new();
    for (first, bytes) in ranges {
        file.extend(b"EMiL\x01\0\0\0");
        for word in [*first, first + bytes.len() as u64 - 1, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(*bytes);
    }
    file
}

#[test]
fn lime_ranges_are_memory_and_the_first_of_two_is_taken() {
    let m = memory(lime(&[(0x8000, b"later"), (0x1000, b"first"), (0x1003, b"XXrest")])).unwrap();
    assert_eq!(m.ranges(), [range(0x1000, 9), range(0x8000, 5)]);
    assert_eq!(m.read_vec("x", Phys(0x1000), 9).unwrap(), b"firstrest");
    let mut cut = lime(&[(0x1000, b"first"), (0x2000, b"second")]);
    cut.truncate(cut.len() - 2);
    let m = memory(cut).unwrap();
    assert_eq!(
        m.truncated()[0].to_string(),
        "test.elf: LiME range 1: memory at 0x2004 (+0x2) is missing, the file is cut off"
    );
    assert!(m.read(Phys(0x2004), &mut [0]).unwrap_err().to_string().contains("LiME range 1: memory at 0x2004"));
    let mut bad = lime(&[(0x1000, b"first"), (0x2000, b"second")]);
    bad[37] = b'X';
    assert_eq!(
        refusal(bad),
        "test.elf: LiME range 1: magic 0x4c694d58, version 1 at 0x25, where 0x4c694d45, 1 are known"
    );
    let mut backwards = lime(&[(0x1000, b"first")]);
    put(&mut backwards, 16, &0xfffu64.to_le_bytes());
    assert_eq!(refusal(backwards), "test.elf: LiME range 0: memory from 0x1000 to 0xfff");
}

#[test]
fn a_memory_backend_lies_where_its_machine_has_it() {
    let f = file(b"");
    let open = |size: u64, machine: &str| {
        f.as_file().set_len(size).unwrap();
        let source = Source::parse(format!("{},machine={machine}", f.path().display())).unwrap();
        assert_eq!(Source::parse(source.to_string()).unwrap(), source);
        open_sources(&[source]).unwrap().ranges().to_vec()
    };
    const G: u64 = 1 << 30;
    assert_eq!(open(G, "q35"), [range(0, G)]);
    assert_eq!(open(0xb000_0000 - 1, "q35"), [range(0, 0xb000_0000 - 1)]);
    assert_eq!(open(0xb000_0000, "q35"), [range(0, 2 * G), range(4 * G, 0x3000_0000)]);
    assert_eq!(open(0xdfff_f000, "pc"), [range(0, 0xdfff_f000)]);
    assert_eq!(open(8 * G, "pc"), [range(0, 3 * G), range(4 * G, 5 * G)]);
    assert_eq!(open(8 * G, "virt"), [range(G, 8 * G)]);
    assert_eq!(open(0xe000_0000, "microvm"), [range(0, 0xe000_0000)]);
    assert_eq!(open(4 * G, "microvm"), [range(0, 0xe000_0000), range(4 * G, 0x2000_0000)]);
    assert_eq!(open(4 * G, "firecracker"), [range(0, 0xd000_0000), range(4 * G, 0x3000_0000)]);
    assert_eq!(open(4 * G, "cloud-hypervisor"), [range(0, 3 * G), range(4 * G, G)]);
    assert_eq!(open(4 * G, "firecracker-arm64"), [range(2 * G, 4 * G)]);
    // What is below the 64 MiB that are skipped ends 0xbc000000 bytes after 1 GiB.
    assert_eq!(open(3 * G, "cloud-hypervisor-arm64"), [range(G, 0xbc00_0000), range(4 * G, 0x400_0000)]);
    let refused = Source::parse("ram,machine=sun4m").unwrap_err().to_string();
    let names = "q35, pc, microvm, virt, firecracker, cloud-hypervisor, firecracker-arm64, cloud-hypervisor-arm64";
    assert_eq!(refused, format!("ram,machine=sun4m: \"sun4m\" is no machine (write FILE,machine=NAME: {names})"));
}

#[test]
fn bits_of_larger_pages_are_larger_pages() {
    for page in [PageSize::Size16K, PageSize::Size64K] {
        let size = page.bytes() as usize;
        let mut file = vec![0; size * 4];
        put(&mut file, 0, b"KDUMP   ");
        for (at, value) in [(8, 5), (428, size as u32), (432, 1), (436, 2), (440, 64)] {
            put(&mut file, at, &u32::to_le_bytes(value));
        }
        file[3 * size] = 0b100;
        let packed = zlib(&vec![7; size]);
        let offset = (file.len() + 24) as u64;
        file.extend(offset.to_le_bytes());
        file.extend((packed.len() as u32).to_le_bytes());
        file.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        file.extend(packed);
        let m = memory(file).unwrap();
        assert_eq!(m.ranges(), [range(2 * page.bytes(), page.bytes())]);
        assert_eq!(m.read_vec("x", m.ranges()[0].start, page.bytes()).unwrap(), vec![7; size]);
        assert_eq!(m.machine(), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_changed_dump_is_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), kind in 0..3, near in any::<bool>(),
    ) {
        let mut file = match kind {
            0 => sample(),
            1 => flatten(&sample(), 4096),
            _ => lime(&[(0x1000, b"first"), (0x8000, b"second")]),
        };
        for (at, value) in changes {
            // Headers are where it matters.
            let headers = if near { file.len().min(PAGE + 104) } else { file.len() };
            let at = at.index(headers);
            file[at] = value;
        }
        if let Ok(m) = memory(file) {
            exhaust(&m);
        }
    }

    #[test]
    fn pages_read_as_they_were_packed(pfns in prop::collection::btree_set(0u64..300, 1..40), flags in 0u32..2) {
        let contents = |pfn: u64| if pfn.is_multiple_of(3) { vec![0; PAGE] } else { filled(pfn as u8) };
        let pack = |pfn| if flags == 1 && pfn % 3 != 0 { (pfn, zlib(&contents(pfn)), 1) } else { (pfn, contents(pfn), 0) };
        let pages: Vec<Packed> = pfns.iter().map(|&pfn| pack(pfn)).collect();
        let m = memory(kdump(&pages, 300)).unwrap();
        prop_assert_eq!(m.nbytes(), (pfns.len() * PAGE) as u128);
        for &pfn in &pfns {
            prop_assert_eq!(m.read_vec("x", Phys(pfn << 12), PAGE as u64).unwrap(), contents(pfn));
            let data = m.next_data(Phys(pfn << 12)).unwrap();
            prop_assert_eq!(data.is_some_and(|run| run.start.0 == pfn << 12), pfn % 3 != 0);
        }
    }
}
