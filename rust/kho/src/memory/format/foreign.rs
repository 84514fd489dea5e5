//! Files that are recognized by their first bytes: packed ones, which are unpacked, and formats that hold no memory kho
//! reads, which are named together with what to do.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::fmt;

/// Bytes of a file that are looked at: the mark of a suspended system lies in the last bytes of a page of 64 KiB.
pub(crate) const HEAD: usize = 0x11000;

/// How a file is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Packing {
    Gzip,
    Xz,
    Zstd,
    Bzip2,
    Lz4,
    /// Snappy's framing format.
    Snappy,
    /// AVML's: LiME's headers, each with memory in snappy frames (version 2).
    Avml,
}

impl Packing {
    /// The packing a file begins with.
    pub(crate) fn of(head: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(*head.get(at..)?.first_chunk()?));
        Some(match head {
            [0x1f, 0x8b, 8, ..] => Packing::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Packing::Xz,
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..]
            | [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, 0x45, 0x38, 0x50, 0x90, ..] => Packing::Bzip2,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
            [0x04, 0x22, 0x4d, 0x18, ..] | [0x02, 0x21, 0x4c, 0x18, ..] => Packing::Lz4,
            [0xff, 6, 0, 0, b's', b'N', b'a', b'P', b'p', b'Y', ..] => Packing::Snappy,
            [b'A', b'V', b'M', b'L', 2, 0, 0, 0, ..] => Packing::Avml,
            // A skippable frame first: of zstd (pzstd, seekable files) or of lz4. What follows tells.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                let next = usize::try_from(word(4)?).ok()?.checked_add(8)?;
                match word(next) {
                    Some(0x184d_2204) => Packing::Lz4,
                    _ => Packing::Zstd,
                }
            }
            _ => return None,
        })
    }

    /// Whether a name ends as files of this packing do, for files that are said to be raw.
    pub(crate) fn names(self, path: &[u8]) -> bool {
        let suffixes: &[&[u8]] = match self {
            Packing::Gzip => &[b".gz"],
            Packing::Xz => &[b".xz"],
            Packing::Zstd => &[b".zst", b".zstd"],
            Packing::Bzip2 => &[b".bz2"],
            Packing::Lz4 => &[b".lz4"],
            Packing::Snappy => &[b".sz"],
            Packing::Avml => &[],
        };
        suffixes.iter().any(|suffix| path.ends_with(suffix))
    }

    /// The command that unpacks it.
    pub(crate) const fn command(self) -> &'static str {
        match self {
            Packing::Gzip => "gzip -d",
            Packing::Xz => "xz -d",
            Packing::Zstd => "zstd -d --long=31",
            Packing::Bzip2 => "bzip2 -d",
            Packing::Lz4 => "lz4 -d",
            Packing::Snappy => "snzip -d",
            Packing::Avml => "avml-convert",
        }
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Packing::Gzip => "gzip",
            Packing::Xz => "xz",
            Packing::Zstd => "zstd",
            Packing::Bzip2 => "bzip2",
            Packing::Lz4 => "lz4",
            Packing::Snappy => "snappy",
            Packing::Avml => "AVML",
        })
    }
}

/// A format that holds no memory kho reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Foreign {
    pub(crate) what: Cow<'static, str>,
    pub(crate) remedy: &'static str,
}

/// How to take memory of a running guest.
pub(crate) const DUMP: &str =
    "dump the running guest instead: virsh dump --memory-only DOMAIN FILE, or dump-guest-memory in QEMU's monitor";
const CONVERT: &str = "if a raw memory image is stored in it, qemu-img convert -O raw gets it out; else dump the running guest: virsh dump --memory-only DOMAIN FILE";
const RESUME: &str = "restore the guest (virsh restore FILE, or qemu -incoming), then virsh dump --memory-only DOMAIN FILE, or dump-guest-memory in QEMU's monitor";
const WINDOWS: &str =
    "write an ELF core instead: virsh dump --memory-only DOMAIN FILE, or dump-guest-memory without -w";
const VMWARE: &str = "vmss2core -N FILE.vmss FILE.vmem writes an ELF core of it; the .vmem file alone is raw memory up to 3 GiB (FILE.vmem@0x0)";
const CRASH: &str = "no kernel that writes it has KHO; the crash utility reads it";
const ARCHIVE: &str =
    "extract it first, and name the file in it; a directory of an extracted support archive is for kho doctor";
const DISK: &str = "a disk holds no running memory; of a vmcore on it, name the file";
const KERNEL: &str = "name a dump of memory: /proc/vmcore, or virsh dump --memory-only DOMAIN FILE";
const SUSPENDED: &str = "resume the machine, and read its memory with makedumpfile or AVML";
const FIRECRACKER: &str = "the memory is in the snapshot's other file: name that one, as MEMORY@0x0";

/// Offset, bytes that stand there, what it is, what to do.
type Mark = (usize, &'static [u8], &'static str, &'static str);

const MARKS: &[Mark] = &[
    // Guests' states.
    (0, b"LibvirtQemudSave", "a guest's state saved by libvirt (virsh save)", RESUME),
    (0, b"LibvirtQemudPart", "a guest's state that libvirt has not finished saving (virsh save)", RESUME),
    (0, b"QEVM", "a QEMU migration stream (virsh save, virsh dump without --memory-only, migrate to a file)", RESUME),
    (
        0,
        b"Xen saved domain, xl format",
        "a guest's state saved by Xen (xl save)",
        "take the dump inside the guest, with kdump",
    ),
    (
        0,
        b"libvirt-xml\n \0 \r",
        "a guest's state saved by Xen (virsh save)",
        "take the dump inside the guest, with kdump",
    ),
    (
        0,
        b"\xff\xff\xff\xff\xff\xff\xff\xffXENF",
        "a Xen migration stream",
        "take the dump inside the guest, with kdump",
    ),
    (0, b"\xd0\xbe\xd2\xbe", "a VMware saved state (.vmss or .vmsn)", VMWARE),
    (0, b"\xd1\xba\xd1\xba", "a VMware saved state (.vmss or .vmsn)", VMWARE),
    (0, b"\xd2\xbe\xd2\xbe", "a VMware saved state (.vmss or .vmsn)", VMWARE),
    (0, b"\xd3\xbe\xd3\xbe", "a VMware saved state (.vmss or .vmsn)", VMWARE),
    (
        0,
        b"\x7fVirtualBox SavedState",
        "a VirtualBox saved state",
        "VBoxManage debugvm VM dumpvmcore --filename=FILE writes an ELF core",
    ),
    (0, b"\x00\x00\x64\x86\x84\x19\x10\x07", "the device state of a Firecracker snapshot", FIRECRACKER),
    (0, b"\x00\x00\xaa\xaa\x84\x19\x10\x07", "the device state of a Firecracker snapshot", FIRECRACKER),
    // Dumps.
    (0, b"PAGEDU64", "a Windows crash dump (64-bit; QEMU's win-dmp)", WINDOWS),
    (0, b"PAGEDUMP", "a Windows crash dump (32-bit)", WINDOWS),
    (0, b"MDMP", "a Windows minidump, of one process", WINDOWS),
    (0, b"\xed\x23\x8f\x61\x73\x01\x19\xa8", "an LKCD dump", CRASH),
    (0, b"\xa8\x19\x01\x73\x61\x8f\x23\xed", "an LKCD dump (big-endian)", CRASH),
    (0, b"\xcd\x23\x8f\x61\x73\x01\x19\xa8", "an LKCD dump of a live system", CRASH),
    (0, b"\xa8\x19\x01\x73\x61\x8f\x23\xcd", "an LKCD dump of a live system (big-endian)", CRASH),
    (0, b"\xa8\x19\x01\x73\x61\x8f\x23\xfd", "an s390 dump", "KHO exists on x86_64 and arm64 only; zgetdump reads it"),
    (
        0,
        b"\xa8\x19\x01\x73\x61\x8f\x23\xfe",
        "an s390 dump (extended)",
        "KHO exists on x86_64 and arm64 only; zgetdump reads it",
    ),
    (0, b"DISKDUMP", "a diskdump, of Linux 2.4 and 2.6", CRASH),
    (
        0,
        b"sadump\0\0",
        "an sadump",
        "makedumpfile writes a kdump file of it, which kho reads: makedumpfile -c FILE OUT",
    ),
    (0, b"AVML", "an AVML dump of an unknown version (1 and 2 are known)", "avml-convert FILE OUT writes a LiME dump"),
    (4086, b"S1SUSPEND", "a hibernation image (swsusp)", SUSPENDED),
    (4086, b"ULSUSPEND", "a hibernation image (uswsusp)", SUSPENDED),
    (65526, b"S1SUSPEND", "a hibernation image (swsusp, 64 KiB pages)", SUSPENDED),
    (16374, b"S1SUSPEND", "a hibernation image (swsusp, 16 KiB pages)", SUSPENDED),
    (4086, b"SWAPSPACE2", "swap space", DISK),
    (16374, b"SWAPSPACE2", "swap space", DISK),
    (65526, b"SWAPSPACE2", "swap space", DISK),
    (0, b"hibr", "a Windows hibernation file", WINDOWS),
    (0, b"HIBR", "a Windows hibernation file", WINDOWS),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O file, of macOS", KERNEL),
    // Disks.
    (0, b"QED\0", "a QED disk image", CONVERT),
    (0, b"KDMV", "a VMware disk image (vmdk)", CONVERT),
    (0, b"COWD", "a VMware disk image (vmdk)", CONVERT),
    (0, b"# Disk DescriptorFile", "the description of a VMware disk image (vmdk)", CONVERT),
    (0x40, b"\x7f\x10\xda\xbe", "a VirtualBox disk image (vdi)", CONVERT),
    (0, b"vhdxfile", "a Hyper-V disk image (vhdx)", CONVERT),
    (0, b"conectix", "a disk image (vhd, vpc)", CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels disk image", CONVERT),
    (0, b"WithouFreSpacExt", "a Parallels disk image", CONVERT),
    (0, b"Bochs Virtual HD Image", "a Bochs disk image", CONVERT),
    (0, b"LUKS\xba\xbe", "an encrypted disk (LUKS)", DISK),
    (0, b"EVF\x09\x0d\x0a\xff\x00", "a forensic disk image (EWF, E01)", "ewfexport writes the raw image"),
    (512, b"EFI PART", "a disk (GPT)", DISK),
    (0, b"hsqs", "a squashfs file system", DISK),
    (0, b"XFSB", "an XFS file system", DISK),
    (0x8001, b"CD001", "an ISO 9660 file system", DISK),
    (0x10040, b"_BHRfS_M", "a btrfs file system", DISK),
    // Archives, and packings that are not unpacked here.
    (0, b"PK\x03\x04", "a zip archive", "unzip it first, and name the file in it"),
    (0, b"PK\x05\x06", "an empty zip archive", "unzip it first, and name the file in it"),
    (0, b"PK\x07\x08", "a zip archive in parts", "unzip it first, and name the file in it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x extracts it; then name the file in it"),
    (0, b"Rar!\x1a\x07", "a rar archive", "unrar x extracts it; then name the file in it"),
    (0, b"MSCF", "a cabinet archive", "cabextract extracts it; then name the file in it"),
    (257, b"ustar", "a tar archive", ARCHIVE),
    (0, b"070701", "a cpio archive", ARCHIVE),
    (0, b"070702", "a cpio archive", ARCHIVE),
    (0, b"070707", "a cpio archive", ARCHIVE),
    (0, b"!<arch>\n", "an ar archive, as Debian packages are", ARCHIVE),
    (0, b"\xed\xab\xee\xdb", "an RPM package", ARCHIVE),
    (0, b"\x89LZO\0\x0d\x0a\x1a\x0a", "packed with lzop", "unpack it first: lzop -d FILE"),
    (0, b"LZIP", "packed with lzip", "unpack it first: lzip -d FILE"),
    (0, b"LRZI", "packed with lrzip", "unpack it first: lrzip -d FILE"),
    (0, b"\x1f\x9d", "packed with compress", "unpack it first: gzip -d FILE"),
    (0, b"\x1f\xa0", "packed with compress -H", "unpack it first: gzip -d FILE"),
    (0, b"\x1f\x1e", "packed with pack", "unpack it first: gzip -d FILE"),
    (0, b"\x5d\x00\x00\x80\x00", "packed with lzma", "unpack it first: xz -d --format=lzma FILE"),
    (0, b"\x5d\x00\x00\x00\x01", "packed with lzma", "unpack it first: xz -d --format=lzma FILE"),
    (0, b"\x5d\x00\x00\x00\x02", "packed with lzma", "unpack it first: xz -d --format=lzma FILE"),
    (0, b"\x5d\x00\x00\x00\x04", "packed with lzma", "unpack it first: xz -d --format=lzma FILE"),
    (0, b"\x5d\x00\x00\x10\x00", "packed with lzma", "unpack it first: xz -d --format=lzma FILE"),
    // Kernels.
    (0x202, b"HdrS", "a kernel (bzImage)", KERNEL),
    (0x38, b"ARM\x64", "a kernel (arm64 Image)", KERNEL),
    (4, b"zimg", "a kernel (EFI zboot)", KERNEL),
    // Data.
    (0, b"PAR1", "a Parquet file", "name the dump it was made of"),
    (0, b"\x89PNG\x0d\x0a\x1a\x0a", "a PNG image", KERNEL),
    (0, b"%PDF-", "a PDF document", KERNEL),
    (0, b"SQLite format 3\0", "an SQLite database", KERNEL),
];

/// What a file that begins with `head`, and is no dump kho reads, is; none if nothing says so.
pub(crate) fn recognize(head: &[u8]) -> Option<Foreign> {
    let known = |what: &'static str, remedy| Foreign { what: Cow::Borrowed(what), remedy };
    if let Some(rest) = head.strip_prefix(b"QFI\xfb") {
        let version = rest.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let what =
            if version == 1 { "a qcow disk image".into() } else { format!("a qcow2 disk image (version {version})") };
        return Some(Foreign { what: what.into(), remedy: CONVERT });
    }
    let stands = |&&(at, mark, ..): &&Mark| head.get(at..).is_some_and(|bytes| bytes.starts_with(mark));
    if let Some(&(.., what, remedy)) = MARKS.iter().find(stands) {
        return Some(known(what, remedy));
    }
    if is_old_tar(head) {
        return Some(known("a tar archive", ARCHIVE));
    }
    if head.starts_with(b"MZ") && head.get(0x3c..0x40).is_some_and(|at| is_pe(head, at)) {
        return Some(known("a program of Windows or EFI", KERNEL));
    }
    is_text(head).then(|| {
        known("text", "kernel logs, and trees of /proc and /sys, are for kho doctor; name a dump of memory here")
    })
}

/// Whether a PE header is where the word at 0x3c says.
fn is_pe(head: &[u8], at: &[u8]) -> bool {
    let at = at.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    usize::try_from(at).ok().and_then(|at| head.get(at..)).is_some_and(|bytes| bytes.starts_with(b"PE\0\0"))
}

/// Whether a file begins with a tar header of before POSIX: one whose checksum is right.
fn is_old_tar(head: &[u8]) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let Some(header) = head.first_chunk::<512>() else { return false };
    let digits: String = header[CHECKSUM].iter().map(|&byte| byte as char).filter(|c| c.is_digit(8)).collect();
    let sum = |at: usize| u32::from(if CHECKSUM.contains(&at) { b' ' } else { header[at] });
    header[0] != 0 && u32::from_str_radix(&digits, 8) == Ok((0..512).map(sum).sum())
}

/// Whether the first 512 bytes are lines of text.
fn is_text(head: &[u8]) -> bool {
    let Some(head) = head.first_chunk::<512>() else { return false };
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        // The last character may be cut.
        Err(e) if e.valid_up_to() > 508 => std::str::from_utf8(&head[..e.valid_up_to()]).unwrap_or_default(),
        Err(_) => return false,
    };
    text.contains('\n') && text.chars().all(|c| !c.is_control() || "\n\r\t\x1b".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mark_is_found_where_it_stands() {
        for &(at, mark, what, remedy) in MARKS {
            let mut head = vec![0; HEAD];
            head[at..at + mark.len()].copy_from_slice(mark);
            assert_eq!(recognize(&head), Some(Foreign { what: what.into(), remedy }), "{what}");
            assert_eq!(recognize(&head[..at + mark.len() - 1]), None, "{what}, cut short");
        }
    }

    #[test]
    fn zeros_and_an_empty_file_are_nothing_known() {
        assert_eq!(recognize(&[]), None);
        assert_eq!(recognize(&[0; HEAD]), None);
        assert_eq!((Packing::of(&[]), Packing::of(&[0; 64])), (None, None));
    }

    #[test]
    fn qcow_says_its_version() {
        assert_eq!(
            recognize(b"QFI\xfb\0\0\0\x03").map(|f| f.what.into_owned()),
            Some("a qcow2 disk image (version 3)".into())
        );
        assert_eq!(recognize(b"QFI\xfb\0\0\0\x01").map(|f| f.what.into_owned()), Some("a qcow disk image".into()));
    }

    #[test]
    fn what_follows_a_skippable_frame_says_whose_it_is() {
        let with = |magic: [u8; 4]| [&[0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &magic].concat();
        assert_eq!(Packing::of(&with([0x04, 0x22, 0x4d, 0x18])), Some(Packing::Lz4));
        assert_eq!(Packing::of(&with([0x28, 0xb5, 0x2f, 0xfd])), Some(Packing::Zstd));
    }
}
