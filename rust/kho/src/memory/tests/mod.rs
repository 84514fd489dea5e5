//! ELF cores: built here byte by byte, a real one, and what is wrong with either.

#![forbid(unsafe_code)]

mod dumps;
mod sources;

use super::*;
use crate::filter::Absent;
use proptest::prelude::*;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;

const LOAD: u32 = 1;
const NOTE: u32 = 4;

#[derive(Clone, Copy)]
struct Header {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

const fn load(offset: u64, paddr: u64, filesz: u64, memsz: u64) -> Header {
    Header { kind: LOAD, offset, paddr, filesz, memsz }
}

/// A core: ELF header, program headers after it, then `content`.
fn core(headers: &[Header], content: &[u8]) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(4u16.to_le_bytes());
    elf.extend(62u16.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    for word in [0u64, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64, 56, headers.len() as u16, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for h in headers {
        elf.extend(h.kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        for word in [h.offset, 0, h.paddr, h.filesz, h.memsz, 0] {
            elf.extend(word.to_le_bytes());
        }
    }
    elf.extend(content);
    elf
}

/// Where the content of a core with `headers` headers begins.
const fn after_headers(headers: u64) -> u64 {
    64 + 56 * headers
}

fn memory(bytes: Vec<u8>) -> Result<FileMemory> {
    FileMemory::from_bytes("test.elf", bytes)
}

fn refusal(bytes: Vec<u8>) -> String {
    memory(bytes).unwrap_err().to_string()
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn real() -> Vec<u8> {
    std::fs::read(real_path()).unwrap()
}

fn real_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/linux-6.18.15-x86_64/handover.elf")
}

fn range(start: u64, len: u64) -> PhysRange {
    PhysRange { start: Phys(start), len }
}

#[test]
fn segments_are_read_by_physical_address_with_zeros_behind() {
    let at = after_headers(3);
    let m = memory(core(&[load(at + 4, 0x2000, 4, 8), load(at, 0x1ffc, 4, 4), load(at, 0x9000, 0, 0x10)], b"leftmost"))
        .unwrap();
    assert_eq!(m.ranges(), [range(0x1ffc, 12), range(0x9000, 16)]);
    assert_eq!(m.read_vec("x", Phys(0x1ffc), 12).unwrap(), b"leftmost\0\0\0\0");
    assert_eq!(m.read_vec("x", Phys(0x9000), 16).unwrap(), [0; 16]);
    assert_eq!(m.machine(), Some(Machine::X86_64));
    assert!(m.truncated().is_empty());
    for (phys, len) in [(0x1ffb, 2), (0x2004, 5), (0x2008, 1), (0x9000, 17), (u64::MAX, 1)] {
        assert!(matches!(m.read(Phys(phys), &mut vec![1; len]), Err(Error::OutsideMemory { .. })));
    }
}

#[test]
fn data_runs_skip_zero_tails() {
    let at = after_headers(2);
    let m = memory(core(&[load(at, 0x1000, 4, 0x1000), load(at, 0x3000, 4, 4)], b"data")).unwrap();
    assert_eq!(m.next_data(Phys(0)).unwrap(), Some(range(0x1000, 4)));
    assert_eq!(m.next_data(Phys(0x1003)).unwrap(), Some(range(0x1003, 1)));
    assert_eq!(m.next_data(Phys(0x1004)).unwrap(), Some(range(0x3000, 4)));
    assert_eq!(m.next_data(Phys(0x3004)).unwrap(), None);
}

#[test]
fn of_memory_named_twice_the_first_header_is_taken() {
    let at = after_headers(3);
    let m = memory(core(
        &[load(at, 0x1004, 4, 4), load(at + 4, 0x1000, 12, 12), load(at + 4, 0x1000, 12, 12)],
        b"1111abcdefghijkl",
    ))
    .unwrap();
    assert_eq!(m.ranges(), [range(0x1000, 12)]);
    assert_eq!(m.read_vec("x", Phys(0x1000), 12).unwrap(), b"abcd1111ijkl");
}

#[test]
fn the_top_of_the_address_space_can_be_memory() {
    let at = after_headers(2);
    let m = memory(core(&[load(at, u64::MAX - 3, 4, 4), load(at, 0, 0, 1 << 63)], b"last")).unwrap();
    assert_eq!(m.read_vec("x", Phys(u64::MAX - 1), 2).unwrap(), b"st");
    assert!(m.read(Phys(u64::MAX), &mut [0; 2]).is_err());
    assert!(matches!(m.read_vec("x", Phys(0), 1 << 62), Err(Error::Io { .. })));
    assert_eq!(
        refusal(core(&[load(at, u64::MAX - 3, 4, 5)], b"last")),
        "test.elf: ELF segment 0: memory at 0xfffffffffffffffc (+0x5) runs past the address space"
    );
}

#[test]
fn headers_that_say_nothing_are_passed_over() {
    let m = memory(core(&[load(1, 2, 3, 0), load(0, u64::MAX, 0, 0x1000), load(after_headers(3), 0x1000, 1, 1)], b"x"))
        .unwrap();
    assert_eq!(m.ranges(), [range(0x1000, 1)]);
    assert_eq!(
        refusal(core(&[load(1, 2, 3, 0)], b"")),
        "test.elf: not a usable ELF core: none of its 1 program headers is memory (PT_LOAD)"
    );
    assert_eq!(
        refusal(core(&[load(0, 0, 9, 8)], b"")),
        "test.elf: ELF segment 0: 0x9 bytes in the file are more than its 0x8 in memory"
    );
}

#[test]
fn what_is_no_core_is_told_why() {
    let good = core(&[load(after_headers(1), 0, 1, 1)], b"x");
    let with = |at: usize, bytes: &[u8]| {
        let mut elf = good.clone();
        elf[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(elf)
    };
    assert!(memory(good.clone()).is_ok());
    assert!(with(4, &[1]).contains("class 1"));
    assert!(with(5, &[2]).contains("data encoding 2"));
    assert!(with(16, &[2, 0]).contains("type 2, where 4 (ET_CORE)"));
    assert!(with(54, &[32, 0]).contains("program headers of 32 bytes"));
    assert!(with(56, &[0, 0]).contains("none of its 0 program headers"));
    assert!(with(56, &[3, 0]).contains("3 program headers at 0x40 (+0xa8), but the file ends at 0x79"));
    assert!(with(32, &[0xff; 8]).contains("program headers at 0xffffffffffffffff"));
    assert!(with(56, &[0xff, 0xff]).contains("there is no section header 0"));
    let err = open_elf(file(b"not an elf").path()).unwrap_err().to_string();
    assert!(err.contains("does not start with 7f 45 4c 46"), "{err}");
}

#[test]
fn more_headers_than_16_bits_count_are_found_through_section_0() {
    let count = 70_000u64;
    let headers: Vec<Header> = (0..count).map(|i| load(0, i * 0x2000, 4, 0x1000)).collect();
    let mut elf = core(&headers, b"");
    let section = elf.len() as u64;
    elf[40..48].copy_from_slice(&section.to_le_bytes());
    elf[56..58].copy_from_slice(&[0xff, 0xff]);
    elf.resize(elf.len() + 64, 0);
    let info = section as usize + 44;
    elf[info..info + 4].copy_from_slice(&(count as u32).to_le_bytes());
    let m = memory(elf.clone()).unwrap();
    assert_eq!(m.ranges().len(), 70_000);
    assert_eq!(m.read_vec("x", Phys(69_999 * 0x2000), 4).unwrap(), b"\x7fELF");
    elf[info..info + 4].copy_from_slice(&[0xff; 4]);
    assert!(refusal(elf.clone()).contains("4294967295 program headers exceed 1048576"));
    elf.truncate(section as usize + 10);
    assert!(refusal(elf).contains("section header 0 (the number of program headers) at"));
}

#[test]
fn headers_that_overlap_in_every_way_are_read_in_no_time() {
    let started = Instant::now();
    let headers: Vec<Header> = (0..65_000u64)
        .map(|i| if i % 2 == 0 { load(0, i << 12, 0x10, 0x10) } else { load(0, 0, 0x100, 1 << 40) })
        .collect();
    let m = memory(core(&headers, b"")).unwrap();
    assert_eq!(m.ranges(), [range(0, 1 << 40)]);
    let comb: Vec<Header> =
        (0..65_000u64).map(|i| if i < 32_500 { load(0, i << 13, 1, 1) } else { load(0, 0, 1, 1 << 40) }).collect();
    assert_eq!(memory(core(&comb, b"")).unwrap().ranges(), [range(0, 1 << 40)]);
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn notes_are_handed_out_as_they_stand() {
    let mut notes = Vec::new();
    for (name, kind, desc) in [(&b"CORE\0"[..], 1u32, &b"abc"[..]), (b"VMCOREINFO\0", 0, b"OSRELEASE=6.18\n")] {
        notes.extend((name.len() as u32).to_le_bytes());
        notes.extend((desc.len() as u32).to_le_bytes());
        notes.extend(kind.to_le_bytes());
        for part in [name, desc] {
            notes.extend(part);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
    }
    let len = notes.len() as u64;
    let note = |len| Header { kind: NOTE, ..load(after_headers(2), 0, len, 0) };
    let m = memory(core(&[note(len), load(0, 0, 0, 1)], &notes)).unwrap();
    let found: Vec<_> = m.notes().collect();
    assert_eq!(found.len(), 2);
    assert_eq!((found[0].name, found[0].kind, found[0].desc), (&b"CORE"[..], 1, &b"abc"[..]));
    assert_eq!((found[1].name, found[1].desc), (&b"VMCOREINFO"[..], &b"OSRELEASE=6.18\n"[..]));
    // Claimed longer than the file, and cut inside the second note.
    let m = memory(core(&[note(u64::MAX), load(0, 0, 0, 1)], &notes[..30])).unwrap();
    assert_eq!(m.notes().count(), 1);
}

#[test]
fn notes_are_read_up_to_a_limit() {
    let note = Header { kind: NOTE, ..load(0, 0, 1 << 20, 0) };
    let mut headers = vec![note; 2000];
    headers.push(load(0, 0, 0, 1));
    let started = Instant::now();
    let m = memory(core(&headers, &vec![0; 1 << 20])).unwrap();
    assert!(m.notes().count() < 16 << 20);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_core_that_is_cut_short_opens_and_says_what_is_missing() {
    let at = after_headers(3);
    let mut bytes =
        core(&[load(at, 0x1000, 8, 8), load(at + 8, 0x2000, 8, 0x10), load(1 << 60, 0x3000, 1, 1)], b"complete");
    bytes.extend(b"cut");
    let f = file(&bytes);
    let m = open_elf(f.path()).unwrap();
    let missing: Vec<_> = m.truncated().iter().map(|cut| (&*cut.claim, cut.missing)).collect();
    assert_eq!(missing, [("ELF segment 1", range(0x2003, 5)), ("ELF segment 2", range(0x3000, 1))]);
    assert_eq!(m.read_vec("x", Phys(0x1000), 8).unwrap(), b"complete");
    assert_eq!(m.read_vec("x", Phys(0x2000), 3).unwrap(), b"cut");
    assert_eq!(m.read_vec("x", Phys(0x2008), 8).unwrap(), [0; 8]);
    let error = m.read_vec("x", Phys(0x2002), 2).unwrap_err().to_string();
    assert!(error.starts_with(&f.path().display().to_string()), "{error}");
    assert!(
        error.contains("ELF segment 1: memory at 0x2002 (+0x2) is missing or incomplete: the file is cut off"),
        "{error}"
    );
    let absent: Vec<_> = m.absences().iter().map(|absence| (absence.range, absence.why)).collect();
    assert_eq!(absent, [(range(0x2003, 5), Absent::CutOff), (range(0x3000, 1), Absent::CutOff)]);
    assert_eq!(m.next_data(Phys(0x2000)).unwrap(), Some(range(0x2000, 3)));
    assert_eq!(m.next_data(Phys(0x2003)).unwrap(), None);
    assert!(m.truncated()[0].to_string().contains("memory at 0x2003 (+0x5) is missing"));
}

/// A note of this owner with these words.
fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32 + 1, desc.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    for part in [&[name, b"\0"].concat(), desc] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

#[test]
fn what_a_foreign_core_has_no_bytes_for_was_left_out() {
    let vmcoreinfo = note(b"VMCOREINFO", 0, b"OSRELEASE=7.3.4\nPAGESIZE=16384\n");
    let len = vmcoreinfo.len() as u64;
    let content = [&vmcoreinfo[..], b"leftmost"].concat();
    let at = after_headers(4);
    let headers = [
        Header { kind: NOTE, ..load(at, 0, len, len) },
        load(at + len, 0x2000, 4, 0x10),
        load(at + len + 4, 0x2008, 4, 4),
        load(0, 0x9000, 0, 0x10),
    ];
    let m = memory(core(&headers, &content)).unwrap();
    assert_eq!(m.ranges(), [range(0x2000, 0x10), range(0x9000, 0x10)]);
    assert_eq!((m.page_size().unwrap().bytes(), m.vmcoreinfo_value("OSRELEASE")), (16384, Some("7.3.4")));
    let absent: Vec<_> = m.absences().iter().map(|absence| (absence.range, absence.why)).collect();
    let left_out = |start, len| (range(start, len), Absent::LeftOut);
    // What another header has bytes for is there.
    assert_eq!(absent, [left_out(0x2004, 4), left_out(0x200c, 4), left_out(0x9000, 0x10)]);
    assert_eq!(m.read_vec("x", Phys(0x2008), 4).unwrap(), b"most");
    for (phys, len) in [(0x2003, 2), (0x2000, 0x10), (0x900f, 1)] {
        assert!(matches!(m.read(Phys(phys), &mut vec![1; len]), Err(Error::LeftOut { .. })), "{phys:#x}");
        assert!(matches!(m.read_vec("x", Phys(phys), len as u64), Err(Error::LeftOut { .. })), "{phys:#x}");
    }
    assert!(matches!(m.read(Phys(0x900f), &mut [0; 2]), Err(Error::OutsideMemory { .. })));
    assert_eq!(m.next_data(Phys(0x2004)).unwrap(), Some(range(0x2008, 4)));
    assert_eq!(m.next_to_read(Phys(0x2002), Phys(0x200a)).unwrap(), Some(range(0x2002, 2)));
    assert_eq!(m.next_to_read(Phys(0x2005), Phys(0x200a)).unwrap(), Some(range(0x2005, 3)));
    assert_eq!(m.next_to_read(Phys(0x2008), Phys(u64::MAX)).unwrap(), Some(range(0x2008, 4)));
}

#[test]
fn a_note_of_kho_names_what_is_absent_and_the_rest_is_zeros() {
    let mut desc = [1u32.to_le_bytes(), 31u32.to_le_bytes()].concat();
    for word in [0x2000u64, 0x10, 0, 0x3000, 0x10, 1, u64::MAX, 2, 0, 0x5000, 1, 7] {
        desc.extend(word.to_le_bytes());
    }
    let ours = note(b"kho", 2, &desc);
    let (at, len) = (after_headers(2), ours.len() as u64);
    let m = memory(core(&[Header { kind: NOTE, ..load(at, 0, len, len) }, load(0, 0x1000, 0, 0x10)], &ours)).unwrap();
    assert_eq!(m.read_vec("x", Phys(0x1000), 0x10).unwrap(), [0; 0x10]);
    assert_eq!(m.dump_level(), Some(31));
    assert_eq!(
        m.read(Phys(0x2000), &mut [0]).unwrap_err().to_string(),
        "memory at 0x2000 (+0x1) was left out of this dump (level 31 = zero, cache, user, free pages): makedumpfile \
         -d 17 or -d 1 keeps it, and so does running kho in the kdump kernel, on /proc/vmcore before makedumpfile"
    );
    assert!(matches!(m.read(Phys(0x300f), &mut [0]), Err(Error::CutOff { .. })));
    assert_eq!(m.absences().len(), 2);
}

#[test]
fn a_real_core_reads_as_its_headers_say() {
    let m = open_elf(real_path()).unwrap();
    assert_eq!(m.machine(), Some(Machine::X86_64));
    assert_eq!(m.ranges().len(), 12);
    assert_eq!(m.ranges()[0], range(0x43_8000, 0x4000));
    assert_eq!(m.nbytes(), 0x4_2000);
    let bytes = real();
    assert_eq!(m.read_vec("x", Phys(0x6e_7000), 0x2000).unwrap(), &bytes[0x3_0000..0x3_2000]);
    assert_eq!(m.read_vec("x", Phys(0xfb2_d000), 0x1_0000).unwrap(), vec![0; 0x1_0000]);
    assert_eq!(m.next_data(Phys(0xf3f_1000)).unwrap(), None);
}

/// Opens, and if that works reads everything there is.
fn exercise(bytes: Vec<u8>) -> bool {
    let Ok(m) = memory(bytes) else { return false };
    let mut page = [0; 4096];
    let (mut at, mut steps) = (Some(Phys(0)), 0);
    while let Some(run) = at.and_then(|at| m.next_data(at).unwrap()).filter(|_| steps < 1000) {
        assert!(run.len > 0 && m.contains(run.start, run.len));
        let n = page.len().min(run.len as usize);
        m.read(run.start, &mut page[..n]).unwrap();
        at = run.start.0.checked_add(run.len).map(Phys);
        steps += 1;
    }
    for range in m.ranges().iter().take(1000) {
        let n = page.len().min(range.len as usize);
        let readable = m.read(range.start, &mut page[..n]).is_ok();
        assert!(readable || !m.absences().is_empty());
    }
    assert!(m.notes().count() < 1 << 20);
    true
}

#[test]
fn every_prefix_of_a_real_core_opens_or_is_refused() {
    let bytes = real();
    let headers = 64 + 56 * 12;
    let mut opened = 0;
    for len in (0..headers + 64).step_by(3).chain((headers..bytes.len()).step_by(4999)) {
        let opens = exercise(bytes[..len].to_vec());
        // Shorter than its magic, it is a raw image like any other.
        assert_eq!(opens, len >= headers || (1..4).contains(&len), "{len}");
        opened += usize::from(opens);
    }
    assert!(opened > 40);
}

#[test]
fn a_real_core_with_any_bit_of_its_headers_flipped_does_no_harm() {
    let mut bytes = real();
    for bit in 0..8 * (64 + 56 * 12) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        exercise(bytes.clone());
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_behind_the_magic_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        exercise([&b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0"[..], &bytes].concat());
        exercise([&b"\x7fELF"[..], &bytes].concat());
    }

    #[test]
    fn arbitrary_headers_do_no_harm(
        headers in proptest::collection::vec((0u32..6, edge(), edge(), edge(), edge()), 0..12),
        content in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let headers: Vec<_> = headers
            .into_iter()
            .map(|(kind, offset, paddr, filesz, memsz)| Header { kind, offset, paddr, filesz, memsz })
            .collect();
        exercise(core(&headers, &content));
    }

    #[test]
    fn reads_agree_with_a_map_of_bytes(
        headers in proptest::collection::vec((0u64..48, 0u64..64, 0u64..16, 0u64..8), 1..8),
    ) {
        let content: Vec<u8> = (1..=64).collect();
        let start = after_headers(headers.len() as u64);
        let mut model = std::collections::BTreeMap::new();
        let mut loads = Vec::new();
        for (offset, paddr, filesz, tail) in headers {
            loads.push(load(start + offset, paddr, filesz, filesz + tail));
            for i in 0..filesz + tail {
                let byte = if i < filesz { content[(offset + i) as usize] } else { 0 };
                model.entry(paddr + i).or_insert(byte);
            }
        }
        let Ok(m) = memory(core(&loads, &content)) else {
            prop_assert!(model.is_empty());
            return Ok(());
        };
        prop_assert_eq!(m.nbytes(), model.len() as u128);
        for at in 0..100u64 {
            for len in [1, 5, 40] {
                let expected: Option<Vec<u8>> = (at..at + len).map(|a| model.get(&a).copied()).collect();
                prop_assert_eq!(m.read_vec("x", Phys(at), len).ok(), expected);
            }
        }
    }

}

/// Numbers near what breaks arithmetic.
fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..1024, Just(u64::MAX), (u64::MAX - 4096)..=u64::MAX, Just(1 << 63), any::<u64>()]
}
