//! One error type: a variant for each kind a caller acts on, with the values that explain it.
//!
//! Messages name the place and the value first and say what was wrong with it after the colon.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, one variant per remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// An address or pfn that is no multiple of what it must be aligned to (EINVAL).
    #[error("{what} {value:#x} is not a multiple of {align:#x}")]
    Misaligned { what: &'static str, value: u64, align: u64 },

    /// A folio order beyond what the format or the allocator knows.
    #[error("order {order} exceeds {max}")]
    OrderTooLarge { order: u64, max: u8 },

    /// A page size other than 4, 16 or 64 KiB.
    #[error("page size {bytes} is none of 4096, 16384, 65536")]
    PageSize { bytes: u64 },

    /// A bitmap size other than 512 bytes or one page.
    #[error("bitmap of {bytes} bytes: only 512 (Linux 6.16) or a page of {page} bytes (6.18 and later) exist")]
    BitmapBytes { bytes: u64, page: u64 },

    /// A number beyond its domain.
    #[error("{what} {value:#x} is beyond {limit:#x}")]
    OutOfRange { what: &'static str, value: u64, limit: u64 },

    /// An argument that makes no sense in itself.
    #[error("{what}: {why}")]
    Invalid { what: &'static str, why: String },

    /// Physical memory that the image or arena does not have.
    #[error("{what} at {phys:#x}: {len:#x} bytes there are not in this memory")]
    OutsideMemory { what: &'static str, phys: u64, len: u64 },

    /// Something that must not overlap scratch does.
    #[error(
        "{what} at {phys:#x} (+{len:#x}) overlaps the scratch area {scratch_addr:#x} (+{scratch_size:#x}): the next \
         kernel boots there"
    )]
    ScratchOverlap { what: &'static str, phys: u64, len: u64, scratch_addr: u64, scratch_size: u64 },

    /// A change after `finalize` (EBUSY).
    #[error("{what}: the handover is finalized; abort() it to change it again")]
    Finalized { what: &'static str },

    /// `abort` before `finalize`.
    #[error("abort: the handover is not finalized")]
    NotFinalized,

    /// A name given twice (EEXIST).
    #[error("subtree {name:?} exists already")]
    Exists { name: String },

    /// A name nobody gave (ENOENT).
    #[error("no subtree is named {name:?}")]
    NoSubtree { name: String },

    /// `restore` of something that is not, or no longer, there to restore.
    #[error("folio at {phys:#x}: {why}")]
    NotRestorable { phys: u64, why: NotRestorable },

    /// The page allocator's refusal of a request about an existing page.
    #[error("page at {phys:#x} is {state}, not {wanted}")]
    PageState { phys: u64, state: &'static str, wanted: &'static str },

    /// A page that the library keeps something in: a bitmap, the map, the FDT, a subtree's blob.
    #[error("{what} at {phys:#x}: the page is {state}: it holds {owner}; {remedy}")]
    Owned { what: &'static str, phys: u64, state: &'static str, owner: &'static str, remedy: &'static str },

    /// A folio that was freed since this object was made of it.
    #[error(
        "folio at {phys:#x}: it was freed after this object was made (the page there is {state} now); use the object that \
         alloc() or folio() gives for the folio there now"
    )]
    Freed { phys: u64, state: &'static str },

    /// An allocation in an arena's file that holds a handover which was not taken over.
    #[error(
        "handover at {phys:#x}: it was not taken over, so the pages that it needs are not known; call Incoming(arena) \
         before allocating"
    )]
    Untaken { phys: u64 },

    /// A memory file that every process with a descriptor of it can cut.
    #[error(
        "memory file with seals {seals:#x} lacks F_SEAL_SHRINK: a process that truncates it would kill this one (SIGBUS); \
         make it with MFD_ALLOW_SEALING and seal it (fcntl F_ADD_SEALS), as kho.Arena(backing=\"memfd\") does"
    )]
    Unsealed { seals: u32 },

    /// An arena's file that was cut while it was in use.
    #[error(
        "arena's file has {have:#x} bytes, and needs {need:#x}: it was cut while it was open; open an intact copy of it"
    )]
    Cut { have: u64, need: u64 },

    /// The allocator has no free block of that order (ENOMEM).
    #[error("no free block of order {order}{}", .node.map_or(String::new(), |n| format!(" on node {n}")))]
    NoMemory { order: u32, node: Option<u32> },

    /// More than this process can have at once, for a list or a copy.
    #[error(
        "{items} items of {bytes} bytes each are more than this process can have memory for; less at a time may do, of a tracker its runs or extents"
    )]
    TooLong { items: usize, bytes: usize },

    /// The arena was taken over since this object was made of it.
    #[error("{what}: the arena has been taken over since; what it held belongs to the new owner")]
    Stale { what: &'static str },

    /// A flattened devicetree that is not one.
    #[error("FDT at offset {offset:#x}: {problem}")]
    Fdt { offset: u64, problem: FdtProblem },

    /// A root FDT that is well-formed but not a handover's.
    #[error("FDT at {phys:#x}: {problem}")]
    Root { phys: u64, problem: RootProblem },

    /// A `compatible` this version cannot decode.
    #[error("FDT at {phys:#x}: compatible {compatible:?} is not one this version of kho decodes ({known})")]
    UnsupportedAbi { phys: u64, compatible: String, known: String },

    /// A preserved-memory map that cannot be what a kernel wrote.
    #[error("{node} at {phys:#x}: {problem}")]
    Map { node: &'static str, phys: u64, problem: MapProblem },

    /// Neither layout of kho-v1 fits the evidence.
    #[error("map at {phys:#x}: no page size and bitmap size fit: {why}")]
    NoLayout {
        phys: u64,
        why: String,
        /// Whether a reading fails because a pointer leads out of the memory.
        outside: bool,
    },

    /// No handover in the memory searched.
    #[error("no handover: {why}")]
    NoHandover { why: String },

    /// Whoever was told of the progress wants no more.
    #[error("interrupted")]
    Interrupted,

    /// A file that cannot be used as a source.
    #[error("{}: {problem}", .path.display())]
    Source { path: PathBuf, problem: SourceProblem },

    /// The operating system's refusal.
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
}

/// Why a folio cannot be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotRestorable {
    Unaligned {
        page: u64,
    },
    NeverPreserved,
    Interior {
        head: u64,
        order: u32,
    },
    AlreadyRestored,
    /// A bitmap of the map itself lies in it.
    Map {
        bitmap: u64,
    },
    OrderTooLarge {
        order: u32,
        max: u32,
    },
}

impl fmt::Display for NotRestorable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unaligned { page } => write!(f, "the address is not a multiple of the page size {page:#x}"),
            Self::NeverPreserved => f.write_str("it was not preserved"),
            Self::Interior { head, order } => {
                write!(f, "it is inside the folio of order {order} at {head:#x}; restore its head")
            }
            Self::AlreadyRestored => f.write_str("it was restored before; a folio is restored once"),
            Self::Map { bitmap } => {
                write!(
                    f,
                    "the map's bitmap at {bitmap:#x}, which is in use, lies in it: its bits changed after it was read"
                )
            }
            Self::OrderTooLarge { order, max } => {
                write!(f, "its order {order} exceeds MAX_PAGE_ORDER {max}, which Linux before 7.x refuses")
            }
        }
    }
}

/// What is wrong with a devicetree blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FdtProblem {
    BadMagic {
        found: u32,
    },
    BadVersion {
        version: u32,
        last_compatible: u32,
    },
    /// Fewer bytes than the header claims (or than a header has).
    Truncated {
        need: u64,
        have: u64,
    },
    /// A block that reaches outside the blob, or overlaps another.
    BadBlock {
        block: &'static str,
        start: u64,
        len: u64,
        have: u64,
    },
    /// A block that starts where its words could not be read.
    MisalignedBlock {
        block: &'static str,
        start: u64,
        align: u64,
    },
    BadToken {
        token: u32,
    },
    BadName,
    BadNesting {
        why: &'static str,
    },
    TooDeep {
        max: u32,
    },
    BadStringOffset {
        offset: u32,
    },
    /// A property read as something its length does not allow.
    BadLength {
        property: String,
        need: u64,
        have: u64,
    },
    /// A property read as text that is not NUL-terminated UTF-8 (or is several strings).
    BadString {
        property: String,
    },
    NoProperty {
        property: String,
    },
    NoNode {
        path: String,
    },
    /// The writer's buffer is full (FDT_ERR_NOSPACE).
    NoSpace {
        capacity: u64,
    },
    /// The writer was called out of order (FDT_ERR_BADSTATE).
    BadState {
        why: &'static str,
    },
}

impl fmt::Display for FdtProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadMagic { found } => write!(f, "magic {found:#010x}, not 0xd00dfeed"),
            Self::BadVersion { version, last_compatible } => {
                write!(f, "version {version} (last compatible {last_compatible}); 16 and 17 are readable")
            }
            Self::Truncated { need, have } => write!(f, "cut short: {have} bytes of {need}"),
            Self::BadBlock { block, start, len, have } => {
                write!(f, "{block} at {start:#x} (+{len:#x}) does not fit a blob of {have:#x} bytes")
            }
            Self::MisalignedBlock { block, start, align } => {
                write!(f, "{block} at {start:#x} is not a multiple of {align}")
            }
            Self::BadToken { token } => write!(f, "unknown token {token:#x}"),
            Self::BadName => f.write_str("name is unterminated, empty, not printable or over 255 bytes"),
            Self::BadNesting { why } => f.write_str(why),
            Self::TooDeep { max } => write!(f, "nodes nest deeper than {max}"),
            Self::BadStringOffset { offset } => {
                write!(f, "property name at string offset {offset:#x} is not there")
            }
            Self::BadLength { property, need, have } => {
                write!(f, "property {property:?} has {have} bytes, not {need}")
            }
            Self::BadString { property } => {
                write!(f, "property {property:?} is not one NUL-terminated string")
            }
            Self::NoProperty { property } => write!(f, "no property {property:?}"),
            Self::NoNode { path } => write!(f, "no node {path:?}"),
            Self::NoSpace { capacity } => write!(f, "does not fit its buffer of {capacity} bytes"),
            Self::BadState { why } => f.write_str(why),
        }
    }
}

/// What is wrong with a handover's root node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootProblem {
    /// A devicetree of something else.
    NotKho,
    Malformed {
        why: String,
    },
    MapIsZero,
    MapMissing,
    Subtree {
        name: String,
        why: String,
    },
}

impl fmt::Display for RootProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed { why } => f.write_str(why),
            Self::NotKho => {
                f.write_str("no KHO compatible at the root: not a handover's root; kho fdt prints the tree")
            }
            Self::MapIsZero => f.write_str("preserved-memory-map is 0: nothing was serialized"),
            Self::MapMissing => f.write_str("no preserved-memory-map: not a handover's root"),
            Self::Subtree { name, why } => write!(f, "subtree {name:?}: {why}"),
        }
    }
}

/// What is wrong with a node of the preserved-memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapProblem {
    /// The node's own address is no page's.
    Unaligned {
        page: u64,
    },
    /// The node lies outside the memory at hand.
    Outside {
        len: u64,
    },
    Order {
        order: u64,
        max: u8,
    },
    TooManyElements {
        num: u64,
        max: u64,
    },
    /// The walk came back to this node.
    Cycle,
    /// Something else leads to this node already.
    Shared,
    /// More nodes than the memory could hold.
    TooLong {
        max: u64,
    },
    /// More nodes, or entries of a list, than the bytes at hand can plausibly describe.
    TooMany {
        max: u64,
    },
    /// More runs of folios than the bytes at hand can plausibly be a memory of.
    TooManyRuns {
        runs: u64,
        max: u64,
    },
    /// More bytes of bitmaps than are kept.
    TooLarge {
        max: u64,
    },
    /// Entry `index` of the node.
    Entry {
        index: u64,
        value: u64,
        why: &'static str,
    },
}

/// A bitmap's `phys_start` that no bitmap of its order can have.
pub const NO_START: &str = "is no multiple of what a bitmap of this order and size spans";
/// A bitmap's own address, where none can lie.
pub const NO_BITMAP: &str = "is no address of a bitmap of this size (alignment)";
/// A bitmap's own address, where there is no memory.
pub const BITMAP_OUTSIDE: &str = "is the address of a bitmap outside this memory";
/// An address in a vmalloc area's list that is no block's.
pub const NO_BLOCK: &str = "is no address of a block of the area's order";

impl MapProblem {
    /// What kind of problem it is, in a word that stays the same when messages change.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Unaligned { .. } => "unaligned",
            Self::Outside { .. } => "outside",
            Self::Order { .. } => "order",
            Self::TooManyElements { .. } => "count",
            Self::Cycle => "cycle",
            Self::Shared => "shared",
            Self::TooLong { .. } | Self::TooMany { .. } | Self::TooManyRuns { .. } | Self::TooLarge { .. } => "length",
            Self::Entry { why: NO_START, .. } => "start",
            Self::Entry { why: NO_BITMAP, .. } => "unaligned",
            Self::Entry { why: NO_BLOCK, .. } => "block",
            Self::Entry { .. } => "entry",
        }
    }
}

impl fmt::Display for MapProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unaligned { page } => write!(f, "the address is not a multiple of the page size {page:#x}"),
            Self::Outside { len } => write!(f, "{len:#x} bytes there are not in this memory"),
            Self::Order { order, max } => write!(f, "order {order} exceeds {max}"),
            Self::TooManyElements { num, max } => {
                write!(f, "num_elms {num} exceeds the {max} entries of a page")
            }
            Self::Cycle => f.write_str("the list comes back to it: a cycle"),
            Self::Shared => f.write_str("a second entry leads to it: a shared node or a cycle"),
            Self::TooLong { max } => write!(f, "the walk is longer than the {max} nodes this memory could hold"),
            Self::TooMany { max } => {
                write!(f, "more than the {max} entries that an image of this size can plausibly describe")
            }
            Self::TooManyRuns { runs, max } => {
                write!(f, "{runs} runs of folios exceed the {max} that an image of this size can plausibly hold")
            }
            Self::TooLarge { max } => write!(f, "its bitmaps exceed the {max:#x} bytes that are kept of this image"),
            Self::Entry { index, value, why } => write!(f, "entry {index}: {value:#x} {why}"),
        }
    }
}

/// Why a file is no source.
#[derive(Debug)]
pub enum SourceProblem {
    Empty,
    Directory,
    NotAFile,
    Elf {
        why: String,
    },
    /// A numbered part of a file: "ELF segment", "LiME range".
    Segment {
        kind: &'static str,
        index: u64,
        why: String,
    },
    /// A kdump file, flattened or not, that cannot be one.
    Dump {
        why: String,
    },
    /// Pages of a dump that are not there, or not what they were packed from.
    Page {
        phys: u64,
        len: u64,
        why: String,
    },
    /// A packed file, or a stream, that cannot be unpacked, or not here.
    Packed {
        packing: String,
        why: String,
    },
    /// A file of a known format that holds no memory kho reads.
    Foreign {
        what: String,
        remedy: &'static str,
    },
    /// A FIFO that no process has open for writing.
    NoWriter,
    Address {
        text: String,
    },
    Machine {
        name: String,
        /// The names that are known.
        known: String,
    },
    /// The part of a raw file that was asked for is not there, or has no address.
    Raw {
        why: String,
    },
    /// A raw image whose handover is not whole at the address it has, with what to do.
    Elsewhere {
        why: String,
    },
    Overlap {
        first: u64,
        second: u64,
    },
    Io(std::io::Error),
}

impl fmt::Display for SourceProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the file is empty"),
            Self::Directory => f.write_str("is a directory, not a memory image"),
            Self::NotAFile => f.write_str("is neither a file nor a block device"),
            Self::Elf { why } => write!(f, "not a usable ELF core: {why}"),
            Self::Segment { kind, index, why } => write!(f, "{kind} {index}: {why}"),
            Self::Dump { why } => write!(f, "not a usable kdump file: {why}"),
            Self::Page { phys, len, why } => write!(f, "memory at {phys:#x} (+{len:#x}): {why}"),
            Self::Packed { packing, why } => write!(f, "{packing}: {why}"),
            Self::Foreign { what, remedy } => write!(f, "this is {what}, not memory that kho reads: {remedy}"),
            Self::NoWriter => f.write_str(
                "is neither a file nor a block device, but a FIFO that no process writes to: start the writer first, or \
                 write COMMAND | kho inspect -",
            ),
            Self::Address { text } => {
                write!(f, "{text:?} is not an address (write FILE@0x40000000)")
            }
            Self::Machine { name, known } => {
                write!(f, "{name:?} is no machine (write FILE,machine=NAME: {known})")
            }
            Self::Raw { why } | Self::Elsewhere { why } => f.write_str(why),
            Self::Overlap { first, second } => write!(f, "memory at {second} overlaps memory that starts at {first}"),
            Self::Io(e) => e.fmt(f),
        }
    }
}

impl Error {
    /// What kind of problem with a map or list it is ([`MapProblem::kind`]), and the address it is at.
    pub fn place(&self) -> (Option<&'static str>, Option<u64>) {
        match self {
            Error::Map { phys, problem, .. } => (Some(problem.kind()), Some(*phys)),
            Error::Root { phys, .. }
            | Error::UnsupportedAbi { phys, .. }
            | Error::NoLayout { phys, .. }
            | Error::OutsideMemory { phys, .. }
            | Error::PageState { phys, .. }
            | Error::Owned { phys, .. }
            | Error::Freed { phys, .. }
            | Error::Untaken { phys } => (None, Some(*phys)),
            _ => (None, None),
        }
    }

    /// Whether a pointer that was followed leads out of the memory.
    pub fn leads_outside(&self) -> bool {
        match self {
            Error::OutsideMemory { .. } | Error::NoLayout { outside: true, .. } => true,
            Error::Map { problem, .. } => {
                matches!(problem, MapProblem::Outside { .. } | MapProblem::Entry { why: BITMAP_OUTSIDE, .. })
            }
            _ => false,
        }
    }

    /// An operating-system error with what was being done.
    pub fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Error::Io { what: what.into(), source: source.into() }
    }
}
