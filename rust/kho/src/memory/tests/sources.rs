//! What a user may name, and raw images.

#![forbid(unsafe_code)]

use super::*;
use crate::error::SourceProblem;
use std::os::unix::fs::FileExt;
use tempfile::{TempDir, tempdir};

#[test]
fn several_files_make_one_memory() {
    let dir = tempdir().unwrap();
    let (low, high) = (dir.path().join("low"), dir.path().join("high@ram"));
    std::fs::write(&low, b"..low").unwrap();
    std::fs::write(&high, b"high").unwrap();
    let low_spec = format!("{}@0x1000,offset=2,size=0x3", low.display());
    let sources = [Source::parse(format!("{}@4099", high.display())).unwrap(), Source::parse(&low_spec).unwrap()];
    assert_eq!(sources[1].to_string(), low_spec.replace("=2", "=0x2"));
    let m = open_sources(&sources).unwrap();
    assert_eq!(m.ranges(), [range(0x1000, 7)]);
    assert_eq!(m.read_vec("x", Phys(0x1000), 7).unwrap(), b"lowhigh");
    assert_eq!(m.sources(), sources);
    let twice = open_sources(&[sources[0].clone(), Source::parse(format!("{}@0x1000", low.display())).unwrap()]);
    assert!(matches!(
        twice,
        Err(Error::Source { path, problem: SourceProblem::Overlap { first: 0x1000, second: 0x1003 } }) if path == low
    ));
    assert!(matches!(open_sources(&[]), Err(Error::Invalid { .. })));
}

#[test]
fn a_source_is_read_from_text() {
    let raw = |path: &str, base, offset, size| Source { base: Some(Phys(base)), offset, size, ..Source::file(path) };
    for (text, expected) in [
        ("nowhere.elf", Source::file("nowhere.elf")),
        ("a@0x40000000", raw("a", 0x4000_0000, 0, None)),
        ("a@1G", raw("a", 1 << 30, 0, None)),
        ("a@b@0x1k,size=2m,offset=0x3T", raw("a@b", 1024, 3 << 40, Some(2 << 20))),
        ("a@0,size=18446744073709551615", raw("a", 0, 0, Some(u64::MAX))),
    ] {
        assert_eq!(Source::parse(text).unwrap(), expected, "{text}");
    }
    for text in [
        "a@",
        "@1",
        "a@x",
        "a@-1",
        "a@+1",
        "a@0x",
        "a@0x+1",
        "a@1,",
        "a@1,2",
        "a@1,size",
        "a@1,size=",
        "a@1,sise=2",
        "a@size=1",
        "a@base=1",
        "a@18446744073709551616",
        "a@16777216T",
        "a@1KK",
        "a@K",
        "a@ü",
        "@",
        "a@1 x",
        "a@-1",
        "a@1.5",
        "a@1.0001K",
        "a@1G,size=0.1",
    ] {
        let error = Source::parse(text).unwrap_err();
        assert!(matches!(error, Error::Source { problem: SourceProblem::Address { .. }, .. }), "{text}");
    }
    assert_eq!(
        Source::parse("ram@home").unwrap_err().to_string(),
        "ram@home: \"home\" is not an address: it is not a number with an optional unit K, M, G, T, P or E \
         (write FILE@0x40000000 or FILE@1G,size=512M)"
    );
    assert_eq!(
        Source::parse("ram@1G,size=-1").unwrap_err().to_string(),
        "ram@1G,size=-1: \"1G,size=-1\" is not an address: \"size=-1\" is negative \
         (write FILE@0x40000000 or FILE@1G,size=512M)"
    );
}

#[test]
fn an_existing_name_with_an_at_sign_is_that_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("ram@0x1000");
    std::fs::write(&path, b"x").unwrap();
    assert_eq!(Source::parse(&path).unwrap(), Source::file(&path));
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe@0x10");
    assert_eq!(Source::parse(odd).unwrap().base, Some(Phys(0x10)));
    assert!(Source::parse(std::ffi::OsStr::from_bytes(b"a@\xff")).is_err());
}

#[test]
fn a_file_without_magic_is_raw_and_a_core_with_an_address_too() {
    let f = file(&core(&[load(after_headers(1), 0x1000, 1, 1)], b"x"));
    let plain = open_sources(&[Source::file(f.path())]).unwrap();
    assert_eq!(plain.ranges(), [range(0x1000, 1)]);
    let raw = open_raw(f.path(), Phys(0x5000), 1, Some(3)).unwrap();
    assert_eq!(raw.read_vec("x", Phys(0x5000), 3).unwrap(), b"ELF");
    assert_eq!(raw.machine(), None);
    let f = file(b"abc");
    let zero = open_sources(&[Source::file(f.path())]).unwrap();
    assert_eq!(zero.ranges(), [range(0, 3)]);
}

#[test]
fn a_part_that_a_raw_file_has_not_is_refused() {
    let f = file(&[0; 8]);
    for (base, offset, size) in
        [(0, 8, None), (0, u64::MAX, None), (0, 4, Some(5)), (0, 0, Some(0)), (u64::MAX, 0, None)]
    {
        let refused = open_raw(f.path(), Phys(base), offset, size);
        assert!(
            matches!(refused, Err(Error::Source { problem: SourceProblem::Raw { .. }, .. })),
            "{base:#x} {offset:#x} {size:?}"
        );
    }
    assert!(open_raw(f.path(), Phys(u64::MAX - 7), 0, None).is_ok());
}

#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let dir = tempdir().unwrap();
    let problem = |path: &std::path::Path| match open_sources(&[Source::file(path)]).unwrap_err() {
        Error::Source { path: named, problem } => {
            assert_eq!(named, path);
            problem
        }
        other => panic!("{other}"),
    };
    assert!(matches!(problem(dir.path()), SourceProblem::Directory));
    assert!(
        matches!(problem(&dir.path().join("gone")), SourceProblem::Io(e) if e.kind() == std::io::ErrorKind::NotFound)
    );
    assert!(matches!(problem(file(b"").path()), SourceProblem::Empty));
    assert!(matches!(problem("/dev/null".as_ref()), SourceProblem::NotAFile));
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(matches!(problem(&socket), SourceProblem::NotAFile));
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(matches!(problem(&fifo), SourceProblem::NoWriter));
    assert!(matches!(problem("".as_ref()), SourceProblem::Io(_)));
}

#[test]
fn a_file_cut_short_while_it_is_read_is_an_error() {
    let f = file(&[7; 0x3000]);
    let m = open_raw(f.path(), Phys(0x1000), 0, None).unwrap();
    f.as_file().set_len(0x1000).unwrap();
    assert_eq!(m.read_vec("x", Phys(0x1fff), 1).unwrap(), [7]);
    let error = m.read_vec("x", Phys(0x2000), 1).unwrap_err().to_string();
    assert!(error.contains("memory at 0x2000 (+0x1) would be at file offset 0x1000"), "{error}");
}

#[test]
fn holes_of_sparse_files_are_skipped() {
    let f = file(b"");
    let size = 64 << 20;
    f.as_file().set_len(size).unwrap();
    f.as_file().write_all_at(b"x", 16 << 20).unwrap();
    f.as_file().write_all_at(b"y", 48 << 20).unwrap();
    let m = open_raw(f.path(), Phys(0x4000_0000), 0, None).unwrap();
    let (mut at, mut runs) = (Phys(0), Vec::new());
    while let Some(run) = m.next_data(at).unwrap() {
        assert!(run.len > 0 && run.start >= at);
        runs.push(run);
        at = Phys(run.start.0 + run.len);
    }
    for data in [0x4000_0000 + (16 << 20), 0x4000_0000 + (48u64 << 20)] {
        assert!(runs.iter().any(|run| run.contains(Phys(data), 1)), "{runs:?}");
    }
    // On a file system that knows holes; one run of everything is right where none does.
    assert!(runs.len() == 2 && runs[0].len < 16 << 20 || runs == [range(0x4000_0000, size)]);
}

#[test]
fn threads_may_share_a_memory() {
    let dir: TempDir = tempdir().unwrap();
    let path = dir.path().join("ram");
    std::fs::write(&path, (0..=255u8).cycle().take(1 << 16).collect::<Vec<_>>()).unwrap();
    let m = open_raw(&path, Phys(0), 0, None).unwrap();
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let m = &m;
            s.spawn(move || {
                for i in 0..500 {
                    let at = (i * 97 + t) % 65_000;
                    assert_eq!(m.read_vec("x", Phys(at), 1).unwrap(), [(at % 256) as u8]);
                    assert_eq!(m.next_data(Phys(at)).unwrap(), Some(range(at, 65536 - at)));
                }
            });
        }
    });
}

proptest! {
    #[test]
    fn any_text_is_a_source_or_an_error(text in ".{0,40}", place in "[@0-9xKMGT,=a-z]{0,30}") {
        for text in [text.clone(), format!("{text}@{place}")] {
            if let Ok(source) = Source::parse(&text) && source.base.is_some() {
                prop_assert_eq!(Source::parse(source.to_string()).unwrap(), source);
            }
        }
    }
}
