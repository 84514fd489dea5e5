//! Reads a kernel's view of its handover in debugfs, live or copied: no memory, but the FDTs and where the scratch areas
//! are (abi.md section 2).
//!
//! ```text
//! ROOT/proc/{iomem,cmdline,version}                      each may be missing
//! ROOT/sys/kernel/debug/kho/in/{fdt,sub_fdts/*}          what this kernel was handed
//!                          /out/{fdt,sub_fdts/*}         what it will hand over
//!                          /out/{scratch_phys,scratch_len,finalize}
//! ```

#![forbid(unsafe_code)]

use crate::abi::{ABIS, Abi, COMPATIBLE_PROPERTY};
use crate::error::{Error, Result, SourceProblem};
use crate::fdt::{self, Fdt};
use crate::memory::PhysRange;
use crate::scratch::ScratchArea;
use crate::sizes::parse_size;
use crate::units::Phys;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The most bytes of a file that are read: far more than a page, which is what a handover's blobs fit in.
const MAX_FILE: u64 = 1 << 20;
/// The most files of a directory, and bytes of them in all.
const MAX_FILES: usize = 4096;
const MAX_TOTAL: usize = 16 << 20;
/// Where debugfs shows the handover.
const DEBUGFS: &str = "sys/kernel/debug/kho";

/// What a snapshot was read from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The running machine.
    Live,
    /// A directory with `proc` and `sys` in it.
    Root,
    /// debugfs' `kho` directory alone.
    Debugfs,
    /// One root FDT.
    Fdt,
}

impl Kind {
    /// The name in messages and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Live => "live",
            Kind::Root => "root",
            Kind::Debugfs => "debugfs",
            Kind::Fdt => "fdt",
        }
    }
}

/// A root FDT, as much of it as can be read.
#[derive(Debug)]
pub struct RootFdt {
    /// The blob.
    pub bytes: Vec<u8>,
    /// Bytes according to its header; 0 if it has none. Linux 6.19 and later show `out/fdt` with the size it had at boot, so that
    /// `bytes` are fewer once a subtree has been added: the names of the properties are cut off.
    pub totalsize: u32,
    /// The `compatible` string, if it can be read.
    pub compatible: Option<String>,
    /// The physical address of the map, if it can be read.
    pub preserved_memory_map: Option<Phys>,
    /// What is wrong with the blob.
    pub problem: Option<Error>,
}

impl RootFdt {
    /// Reads what can be read. Where the names are cut off, `compatible` is known by its value, and the map as the
    /// first 8 bytes after it.
    pub fn read(bytes: Vec<u8>) -> Self {
        let (totalsize, found, problem) = match Fdt::parse_partial(&bytes) {
            Ok((fdt, problem)) => (fdt.totalsize(), facts(&fdt), problem),
            Err(problem) => (fdt::totalsize(&bytes).unwrap_or(0), (None, None), Some(problem)),
        };
        RootFdt { bytes, totalsize, compatible: found.0, preserved_memory_map: found.1.map(Phys), problem }
    }

    /// Whether the header claims more bytes than there are.
    pub fn is_truncated(&self) -> bool {
        u64::from(self.totalsize) > self.bytes.len() as u64
    }
}

fn facts(fdt: &Fdt) -> (Option<String>, Option<u64>) {
    let Ok(root) = fdt.root() else { return (None, None) };
    let known = |name: Option<&str>, wanted| name.is_none_or(|name| name == wanted);
    let version = |value: &[u8]| {
        let text = std::str::from_utf8(value.strip_suffix(&[0])?).ok()?;
        (text.starts_with("kho-v") && !text.contains(char::is_control)).then(|| text.to_owned())
    };
    let mut properties = root.properties();
    let compatible = properties.find_map(|p| version(p.value).filter(|_| known(p.name, COMPATIBLE_PROPERTY)));
    let word = |value: &[u8]| value.try_into().ok().map(u64::from_le_bytes);
    // In any order if it is named; after `compatible`, where kernels write it, if not.
    let abi = compatible.as_deref().and_then(Abi::named).unwrap_or(&ABIS[ABIS.len() - 1]);
    let map = match root.prop(abi.map_property) {
        Some(value) => word(value),
        None => properties.filter(|p| p.name.is_none()).find_map(|p| word(p.value)),
    };
    (compatible, map)
}

/// One direction of a handover.
#[derive(Debug, Default)]
pub struct Side {
    /// The root FDT, if the kernel shows one.
    pub fdt: Option<RootFdt>,
    /// The blobs of the producers, by name.
    pub sub_fdts: Vec<(String, Vec<u8>)>,
}

/// What a kernel shows of its handover.
#[derive(Debug)]
pub struct Snapshot {
    /// Where it was read.
    pub path: PathBuf,
    /// What was read there.
    pub kind: Kind,
    /// What the kernel was handed, if it was.
    pub incoming: Option<Side>,
    /// What it will hand over; of a lone FDT, which may be either, this.
    pub outgoing: Option<Side>,
    /// Low memory, global, then one per NUMA node.
    pub scratch: Option<Vec<ScratchArea>>,
    /// `out/finalize` of 6.16 to 7.0.
    pub finalized: Option<bool>,
    /// "System RAM" of /proc/iomem; none where the addresses are hidden from who is not root.
    pub ram: Option<Vec<PhysRange>>,
    /// /proc/cmdline.
    pub cmdline: Option<String>,
    /// /proc/version: the kernel that ran.
    pub version: Option<String>,
}

impl Snapshot {
    /// Reads the running machine's.
    ///
    /// # Errors
    /// [`Error::Source`] if its kernel shows none, or not to this user.
    pub fn live() -> Result<Self> {
        Reader { root: PathBuf::from("/") }.snapshot("/".as_ref(), Kind::Live)
    }

    /// Reads a root FDT, a directory that is debugfs' `kho`, or one that has it at `sys/kernel/debug/kho`.
    ///
    /// # Errors
    /// [`Error::Source`] for what is none of these, may not be read, is no regular file, is larger than 1 MiB or lies
    /// outside the directory; [`Error::Fdt`] for a file that is no FDT, [`Error::Root`] for one that is no handover's.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fail = |e| fail(path, SourceProblem::Io(e));
        let root = path.canonicalize().map_err(fail)?;
        if root.metadata().map_err(fail)?.is_dir() {
            let kind = match root.join(DEBUGFS).symlink_metadata() {
                Ok(_) => Kind::Root,
                Err(_) => Kind::Debugfs,
            };
            return Reader { root }.snapshot(path, kind);
        }
        let reader = Reader { root: PathBuf::from("/") };
        let bytes = reader.required(&root).map_err(|e| named(e, path))?;
        let fdt = RootFdt::read(bytes);
        match (&fdt.compatible, fdt.problem) {
            (None, Some(problem)) => Err(problem),
            (None, None) => Err(Error::Root { phys: 0, problem: crate::error::RootProblem::NotKho }),
            (Some(_), problem) => {
                let side = Side { fdt: Some(RootFdt { problem, ..fdt }), sub_fdts: Vec::new() };
                Ok(Snapshot { outgoing: Some(side), ..Snapshot::of(path, Kind::Fdt) })
            }
        }
    }

    /// Whether `path` is what [`Snapshot::open`] reads rather than an image of memory: a directory, or an FDT.
    pub fn recognizes(path: impl AsRef<Path>) -> bool {
        let path = path.as_ref();
        let Ok(metadata) = path.metadata() else { return false };
        metadata.is_dir() || metadata.is_file() && metadata.len() <= MAX_FILE && starts_as_fdt(path)
    }

    fn of(path: &Path, kind: Kind) -> Self {
        Snapshot {
            path: path.to_path_buf(),
            kind,
            incoming: None,
            outgoing: None,
            scratch: None,
            finalized: None,
            ram: None,
            cmdline: None,
            version: None,
        }
    }
}

fn fail(path: &Path, problem: SourceProblem) -> Error {
    Error::Source { path: path.to_path_buf(), problem }
}

/// The same error under the name the caller gave.
fn named(error: Error, path: &Path) -> Error {
    match error {
        Error::Source { problem, .. } => fail(path, problem),
        other => other,
    }
}

/// Opens a regular file; never blocks.
fn open_file(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let io = |e| fail(path, SourceProblem::Io(e));
    let check = |m: std::fs::Metadata| match () {
        () if m.is_file() => Ok(()),
        () if m.is_dir() => Err(fail(path, SourceProblem::Directory)),
        () => Err(fail(path, SourceProblem::NotAFile)),
    };
    check(path.metadata().map_err(io)?)?;
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(io)?;
    check(file.metadata().map_err(io)?)?;
    Ok(file)
}

fn starts_as_fdt(path: &Path) -> bool {
    let mut magic = [0; 4];
    open_file(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == fdt::MAGIC.to_be_bytes()
}

struct Reader {
    /// Nothing outside of this is read. Canonical.
    root: PathBuf,
}

impl Reader {
    fn snapshot(&self, path: &Path, kind: Kind) -> Result<Snapshot> {
        let (base, proc) = match kind {
            Kind::Debugfs => (self.root.clone(), None),
            _ => (self.root.join(DEBUGFS), Some(self.root.join("proc"))),
        };
        let (incoming, outgoing) = (self.side(&base.join("in"))?, self.side(&base.join("out"))?);
        if incoming.is_none() && outgoing.is_none() {
            let why = "shows no handover: no in or out is there (is debugfs mounted, and kho=on?)".into();
            return Err(fail(&base, SourceProblem::Raw { why }));
        }
        let proc = |name: &str| proc.as_ref().map_or(Ok(None), |proc| self.text(&proc.join(name)));
        let line = |text: Option<String>| text.map(|text| text.trim_end().to_owned());
        Ok(Snapshot {
            incoming,
            outgoing,
            scratch: self.scratch(&base.join("out"))?,
            finalized: self.text(&base.join("out/finalize"))?.and_then(|text| match text.trim() {
                "0" => Some(false),
                "1" => Some(true),
                _ => None,
            }),
            ram: proc("iomem")?.and_then(|text| ram(&text)),
            cmdline: line(proc("cmdline")?),
            version: line(proc("version")?),
            ..Snapshot::of(path, kind)
        })
    }

    /// One direction; none if its directory is not there.
    fn side(&self, dir: &Path) -> Result<Option<Side>> {
        match dir.metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail(dir, SourceProblem::Io(e))),
            _ => return Ok(None),
        }
        let fdt = self.optional(&dir.join("fdt"))?.map(RootFdt::read);
        Ok(Some(Side { fdt, sub_fdts: self.sub_fdts(&dir.join("sub_fdts"))? }))
    }

    fn sub_fdts(&self, dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
        let io = |e| fail(dir, SourceProblem::Io(e));
        let entries = match std::fs::read_dir(self.inside(dir).or_else(|e| absent(e, dir.to_path_buf()))?) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io(e)),
        };
        let mut blobs = Vec::new();
        let mut total = 0;
        for entry in entries {
            let entry = entry.map_err(io)?;
            let blob = self.required(&entry.path())?;
            total += blob.len();
            if blobs.len() == MAX_FILES || total > MAX_TOTAL {
                let why = format!("more than {MAX_FILES} files, or {MAX_TOTAL:#x} bytes");
                return Err(fail(dir, SourceProblem::Raw { why }));
            }
            blobs.push((entry.file_name().to_string_lossy().into_owned(), blob));
        }
        blobs.sort();
        Ok(blobs)
    }

    /// `scratch_phys` and `scratch_len`: a number a line, each.
    fn scratch(&self, dir: &Path) -> Result<Option<Vec<ScratchArea>>> {
        let (starts, lens) = (dir.join("scratch_phys"), dir.join("scratch_len"));
        let numbers = |path: &Path, text: &str| -> Result<Vec<u64>> {
            let number = |word: &str| {
                let why = || format!("{word:?} is no number");
                parse_size(word).map_err(|_| fail(path, SourceProblem::Raw { why: why() }))
            };
            text.split_whitespace().map(number).collect()
        };
        let (Some(phys), Some(len)) = (self.text(&starts)?, self.text(&lens)?) else { return Ok(None) };
        let (phys, len) = (numbers(&starts, &phys)?, numbers(&lens, &len)?);
        if phys.len() != len.len() {
            let why = format!("{} sizes, but scratch_phys has {} addresses", len.len(), phys.len());
            return Err(fail(&lens, SourceProblem::Raw { why }));
        }
        Ok(Some(phys.into_iter().zip(len).map(|(addr, size)| ScratchArea { addr, size }).collect()))
    }

    fn text(&self, path: &Path) -> Result<Option<String>> {
        Ok(self.optional(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// A file's content; none if it is not there.
    fn optional(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        self.required(path).map(Some).or_else(|e| absent(e, None))
    }

    fn required(&self, path: &Path) -> Result<Vec<u8>> {
        let file = open_file(&self.inside(path)?).map_err(|e| named(e, path))?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| fail(path, SourceProblem::Io(e)))?;
        if bytes.len() as u64 > MAX_FILE {
            let why = format!("has more than {MAX_FILE:#x} bytes: no file of a handover");
            return Err(fail(path, SourceProblem::Raw { why }));
        }
        Ok(bytes)
    }

    /// The path with its links resolved, which must lie inside the root.
    fn inside(&self, path: &Path) -> Result<PathBuf> {
        let real = path.canonicalize().map_err(|e| fail(path, SourceProblem::Io(e)))?;
        if !real.starts_with(&self.root) {
            let why = format!("is a link to {}, outside of {}", real.display(), self.root.display());
            return Err(fail(path, SourceProblem::Raw { why }));
        }
        Ok(real)
    }
}

/// `default` if the error says that something is not there.
fn absent<T>(error: Error, default: T) -> Result<T> {
    match error {
        Error::Source { problem: SourceProblem::Io(e), .. } if e.kind() == ErrorKind::NotFound => Ok(default),
        other => Err(other),
    }
}

/// The top-level "System RAM" lines of /proc/iomem, `start-end : name` with both ends in hex and inclusive.
fn ram(text: &str) -> Option<Vec<PhysRange>> {
    let line = |line: &str| {
        let (range, name) = line.split_once(" : ")?;
        let (first, last) = range.split_once('-')?;
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let (first, last) = (hex(first)?, hex(last)?);
        let len = last.checked_sub(first)?.checked_add(1)?;
        (name.trim_end() == "System RAM" && last != 0).then_some(PhysRange { start: Phys(first), len })
    };
    let ranges: Vec<_> = text.lines().filter_map(line).collect();
    (!ranges.is_empty()).then_some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
    }

    #[test]
    fn a_fdt_that_linux_7_shows_cut_short_still_has_compatible_and_map() {
        let s = Snapshot::open(data("linux-7.3.4-x86_64/host/stage1")).unwrap();
        let fdt = s.outgoing.unwrap().fdt.unwrap();
        assert_eq!((fdt.totalsize, fdt.bytes.len(), fdt.is_truncated()), (405, 233, true));
        assert_eq!(fdt.compatible.as_deref(), Some("kho-v4"));
        assert!(fdt.preserved_memory_map.is_some());
        assert_eq!(fdt.problem.unwrap().to_string(), "FDT at offset 0xe9: cut short: 233 bytes of 405");
    }

    #[test]
    fn every_prefix_of_a_fdt_is_read_or_refused_and_says_nothing_else() {
        let whole = std::fs::read(data("fdt/linux-7.3.4-in-fdt.dtb")).unwrap();
        let known = RootFdt::read(whole.clone());
        assert!(known.problem.is_none());
        for len in 0..whole.len() {
            let cut = RootFdt::read(whole[..len].to_vec());
            assert!(cut.problem.is_some());
            assert!(cut.compatible.is_none() || cut.compatible == known.compatible, "{len}");
            let map = cut.preserved_memory_map;
            assert!(map.is_none() || map == known.preserved_memory_map, "{len}");
        }
    }

    #[test]
    fn hidden_addresses_are_no_ram() {
        assert_eq!(ram("00000000-00000000 : System RAM\n00000000-00000000 : System RAM\n"), None);
        let one = PhysRange { start: Phys(0x1000), len: 0x1000 };
        assert_eq!(
            ram("00001000-00001fff : System RAM\n  00001000-000010ff : Kernel code\nx\n2-1 : System RAM"),
            Some(vec![one])
        );
        assert_eq!(ram("0-ffffffffffffffff : System RAM"), None);
    }

    #[test]
    fn a_scratch_list_of_unequal_columns_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join("scratch_phys"), "0x1000\n0x2000\n").unwrap();
        std::fs::write(out.join("scratch_len"), "0x1000\n").unwrap();
        let refused = Snapshot::open(dir.path()).unwrap_err().to_string();
        assert!(refused.ends_with("scratch_len: 1 sizes, but scratch_phys has 2 addresses"), "{refused}");
        std::fs::write(out.join("scratch_len"), "0x1000\n-1\n").unwrap();
        assert!(Snapshot::open(dir.path()).unwrap_err().to_string().ends_with("scratch_len: \"-1\" is no number"));
    }

    #[test]
    fn a_file_that_is_no_small_one_of_its_root_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = dir.path().join("in/sub_fdts");
        std::fs::create_dir_all(&blobs).unwrap();
        let refused = || Snapshot::open(dir.path()).unwrap_err().to_string();
        let blob = blobs.join("blob");
        std::os::unix::fs::symlink("/proc/version", &blob).unwrap();
        assert!(refused().contains("blob: is a link to /proc/version, outside of"), "{}", refused());
        std::fs::remove_file(&blob).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&blob).status().unwrap().success());
        assert!(refused().ends_with("blob: is neither a file nor a block device"), "{}", refused());
        std::fs::remove_file(&blob).unwrap();
        std::fs::write(&blob, vec![0; (MAX_FILE + 1) as usize]).unwrap();
        assert!(refused().contains("blob: has more than 0x100000 bytes"), "{}", refused());
        std::fs::write(&blob, vec![0; MAX_FILE as usize]).unwrap();
        let read = Snapshot::open(dir.path()).unwrap();
        assert_eq!(read.incoming.unwrap().sub_fdts[0].1.len() as u64, MAX_FILE);
        std::os::unix::fs::symlink("blob", blobs.join("same")).unwrap();
        assert_eq!(Snapshot::open(dir.path()).unwrap().incoming.unwrap().sub_fdts.len(), 2);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_root_or_have_a_problem(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let fdt = RootFdt::read(bytes);
            prop_assert!(fdt.problem.is_some() || fdt.totalsize > 0);
        }

        #[test]
        fn a_flipped_bit_changes_no_more_than_what_is_read(at in 0usize..405 * 8) {
            let mut bytes = std::fs::read(data("fdt/linux-7.3.4-in-fdt.dtb")).unwrap();
            let at = at % (bytes.len() * 8);
            bytes[at / 8] ^= 1 << (at % 8);
            let fdt = RootFdt::read(bytes);
            prop_assert!(fdt.compatible.is_none_or(|c| c.starts_with("kho-v")));
        }

        #[test]
        fn any_iomem_is_text(text in "([0-9a-f]{0,17}-[0-9a-f]{0,17} : System RAM\n| ?.{0,20}\n){0,8}") {
            for range in ram(&text).unwrap_or_default() {
                prop_assert!(range.len > 0 && range.start.0.checked_add(range.len - 1).is_some());
            }
        }
    }
}
