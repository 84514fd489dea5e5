//! One error type: a variant for each kind a caller acts on, with the values that explain it.
//!
//! Messages name the place and the value first and say what was wrong with it after the colon.

#![forbid(unsafe_code)]

use crate::filter::{Absent, REMEDY, level_names};
use crate::sizes::SizeRule;
use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

/// Why a reader lacks memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// It is not in the source.
    Outside,
    /// The machine had it, and the source has not.
    Absent(Absent),
}

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The level of a dump, in brackets, if it is known.
fn level_of(level: Option<u32>) -> String {
    level.map_or_else(String::new, |level| format!(" (level {level} = {})", level_names(level)))
}

/// What can go wrong, one variant per remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// An address or pfn that is no multiple of what it must be aligned to (EINVAL).
    #[error("{what} {value:#x} is not a multiple of {align:#x}")]
    Misaligned {
        /// What was checked, as it appears in the message.
        what: &'static str,
        /// The value found.
        value: u64,
        /// What it must be a multiple of.
        align: u64,
    },

    /// A folio order beyond what the format or the allocator knows.
    #[error("order {order} exceeds {max}")]
    OrderTooLarge {
        /// The order.
        order: u64,
        /// The largest that is allowed.
        max: u8,
    },

    /// A page size other than 4, 16 or 64 KiB.
    #[error("page size {bytes} is none of 4096, 16384, 65536")]
    PageSize {
        /// The size in bytes.
        bytes: u64,
    },

    /// A bitmap size other than 512 bytes or one page.
    #[error("bitmap of {bytes} bytes: only 512 (Linux 6.16 and 6.17) or a page of {page} bytes (6.18 and later) exist")]
    BitmapBytes {
        /// The size in bytes.
        bytes: u64,
        /// The page size in bytes.
        page: u64,
    },

    /// A number beyond its domain.
    #[error("{what} {value:#x} is beyond {limit:#x}")]
    OutOfRange {
        /// What was checked, as it appears in the message.
        what: &'static str,
        /// The value found.
        value: u64,
        /// The first value out of range.
        limit: u64,
    },

    /// An argument that makes no sense in itself.
    #[error("{what}: {why}")]
    Invalid {
        /// What was checked, as it appears in the message.
        what: &'static str,
        /// The reason, as it appears in the message.
        why: String,
    },

    /// Physical memory that the image or arena does not have.
    #[error("{what} at {phys:#x}: {len:#x} bytes there are not in this memory")]
    OutsideMemory {
        /// What was checked, as it appears in the message.
        what: &'static str,
        /// The physical address.
        phys: u64,
        /// The number of bytes.
        len: u64,
    },

    /// Memory that the machine had and that the filter of its dump left out.
    #[error("memory at {phys:#x} (+{len:#x}) was left out of this dump{}: {REMEDY}", level_of(*.level))]
    LeftOut {
        /// The physical address.
        phys: u64,
        /// The number of bytes.
        len: u64,
        /// The filter's level (makedumpfile's `-d`), if the dump names it.
        level: Option<u32>,
    },

    /// Memory that the machine had and that was in the part of the file that is gone.
    #[error(
        "{claim}memory at {phys:#x} (+{len:#x}) is missing or incomplete: the file is cut off, it ends before what its headers promise"
    )]
    CutOff {
        /// The file and what in it promises the memory, with a colon after each; may be empty.
        claim: String,
        /// The physical address.
        phys: u64,
        /// The number of bytes.
        len: u64,
    },

    /// Something that must not overlap scratch does.
    #[error(
        "{what} at {phys:#x} (+{len:#x}) overlaps the scratch area {scratch_addr:#x} (+{scratch_size:#x}): the next \
         kernel boots there"
    )]
    ScratchOverlap {
        /// What was checked, as it appears in the message.
        what: &'static str,
        /// The physical address.
        phys: u64,
        /// The number of bytes.
        len: u64,
        /// The address of the scratch area.
        scratch_addr: u64,
        /// The bytes of the scratch area.
        scratch_size: u64,
    },

    /// A change after `finalize` (EBUSY).
    #[error("{what}: the handover is finalized; abort() it to change it again")]
    Finalized {
        /// What was checked, as it appears in the message.
        what: &'static str,
    },

    /// `abort` before `finalize`.
    #[error("abort: the handover is not finalized")]
    NotFinalized,

    /// A name given twice (EEXIST).
    #[error("subtree {name:?} exists already")]
    Exists {
        /// The name.
        name: String,
    },

    /// A name that does not exist (ENOENT).
    #[error("no subtree is named {name:?}")]
    NoSubtree {
        /// The name.
        name: String,
    },

    /// `restore` of something that is not, or no longer, there to restore.
    #[error("folio at {phys:#x}: {why}")]
    NotRestorable {
        /// The physical address.
        phys: u64,
        /// The reason, as it appears in the message.
        why: NotRestorable,
    },

    /// The page allocator's refusal of a request about an existing page.
    #[error("page at {phys:#x} is {state}, not {wanted}")]
    PageState {
        /// The physical address.
        phys: u64,
        /// The state of the page, in words.
        state: &'static str,
        /// The state the request needs, in words.
        wanted: &'static str,
    },

    /// A page that the library keeps something in: a bitmap, the map, the FDT, a subtree's blob.
    #[error("{what} at {phys:#x}: the page is {state}: it holds {owner}; {remedy}")]
    Owned {
        /// What was checked, as it appears in the message.
        what: &'static str,
        /// The physical address.
        phys: u64,
        /// The state of the page, in words.
        state: &'static str,
        /// What the page holds, in words.
        owner: &'static str,
        /// What to do.
        remedy: &'static str,
    },

    /// A folio that was freed since this object was made of it.
    #[error(
        "folio at {phys:#x}: it was freed after this object was made (the page there is {state} now); use the object that \
         alloc() or folio() gives for the folio there now"
    )]
    Freed {
        /// The physical address.
        phys: u64,
        /// The state of the page, in words.
        state: &'static str,
    },

    /// An allocation in an arena's file that holds a handover which was not taken over.
    #[error(
        "handover at {phys:#x}: it was not taken over, so the pages that it needs are not known; call Incoming(arena) \
         before allocating"
    )]
    Untaken {
        /// The physical address.
        phys: u64,
    },

    /// A memory file that every process with a descriptor of it can cut.
    #[error(
        "memory file with seals {seals:#x} lacks F_SEAL_SHRINK: a process that truncates it would kill this one (SIGBUS); \
         make it with MFD_ALLOW_SEALING and seal it (fcntl F_ADD_SEALS), as kho.Arena(backing=\"memfd\") does"
    )]
    Unsealed {
        /// The seals the file has (`F_SEAL_*`).
        seals: u32,
    },

    /// An arena's file that was cut while it was in use.
    #[error(
        "arena's file has {have:#x} bytes, and needs {need:#x}: it was cut while it was open; open an intact copy of it"
    )]
    Cut {
        /// The bytes there are.
        have: u64,
        /// The bytes that are needed.
        need: u64,
    },

    /// The allocator has no free block of that order (ENOMEM).
    #[error("no free block of order {order}{}", .node.map_or(String::new(), |n| format!(" on node {n}")))]
    NoMemory {
        /// The order.
        order: u32,
        /// The NUMA node, if one was asked for.
        node: Option<u32>,
    },

    /// More than this process can have at once, for a list or a copy.
    #[error(
        "{items} items of {bytes} bytes each are more than this process can have memory for; less at a time may do, of a tracker its runs or extents"
    )]
    TooLong {
        /// The number of items.
        items: usize,
        /// The size in bytes.
        bytes: usize,
    },

    /// The arena was taken over since this object was made of it.
    #[error("{what}: the arena has been taken over since; what it held belongs to the new owner")]
    Stale {
        /// What was checked, as it appears in the message.
        what: &'static str,
    },

    /// A flattened devicetree that is not one.
    #[error("FDT at offset {offset:#x}: {problem}")]
    Fdt {
        /// The offset in the blob.
        offset: u64,
        /// What is wrong.
        problem: FdtProblem,
    },

    /// A root FDT that is well-formed but not a handover's.
    #[error("FDT at {phys:#x}: {problem}")]
    Root {
        /// The physical address.
        phys: u64,
        /// What is wrong.
        problem: RootProblem,
    },

    /// A `compatible` this version cannot decode.
    #[error("FDT at {phys:#x}: compatible {compatible:?} is not one this version of kho decodes ({known})")]
    UnsupportedAbi {
        /// The physical address.
        phys: u64,
        /// The `compatible` string found.
        compatible: String,
        /// What is known, for the message.
        known: String,
    },

    /// A preserved-memory map that cannot be what a kernel wrote.
    #[error("{node} at {phys:#x}: {problem}")]
    Map {
        /// The NUMA node, if one was asked for.
        node: &'static str,
        /// The physical address.
        phys: u64,
        /// What is wrong.
        problem: MapProblem,
    },

    /// Neither layout of kho-v1 fits the evidence.
    #[error("map at {phys:#x}: no page size and bitmap size fit: {why}")]
    NoLayout {
        /// The physical address.
        phys: u64,
        /// The reason, as it appears in the message.
        why: String,
        /// Whether a reading fails because a pointer leads out of the memory.
        outside: bool,
    },

    /// No handover in the memory searched.
    #[error("no handover: {why}")]
    NoHandover {
        /// The reason, as it appears in the message.
        why: String,
        /// Why memory that it may be in is not in the file, if some is not.
        absent: Option<Absent>,
    },

    /// The function that reads a memory failed ([`crate::memory::ReaderMemory`]).
    #[error("{source}")]
    Reader {
        /// What it failed with.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// Why, if it failed because it lacks the memory.
        missing: Option<Missing>,
    },

    /// The progress callback asked to stop.
    #[error("interrupted")]
    Interrupted,

    /// A file that cannot be used as a source.
    #[error("{}: {problem}", .path.display())]
    Source {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        problem: SourceProblem,
    },

    /// The operating system's refusal.
    #[error("{what}: {source}")]
    Io {
        /// What was checked, as it appears in the message.
        what: String,
        /// The error of the operating system.
        source: std::io::Error,
    },
}

/// Why a folio cannot be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotRestorable {
    /// The address is not a multiple of the page size.
    Unaligned {
        /// The page size in bytes.
        page: u64,
    },
    /// No preserved folio holds the address.
    NeverPreserved,
    /// The address is inside a folio, not its first page.
    Interior {
        /// The address of the folio's first page.
        head: u64,
        /// The order.
        order: u32,
    },
    /// The folio was restored before.
    AlreadyRestored,
    /// A bitmap of the map itself lies in it.
    Map {
        /// The address of the bitmap.
        bitmap: u64,
    },
    /// The folio is larger than the next kernel restores.
    OrderTooLarge {
        /// The order.
        order: u32,
        /// The largest that is allowed.
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
                write!(f, "its order {order} exceeds MAX_PAGE_ORDER {max}, which Linux before 7.1 refuses")
            }
        }
    }
}

/// What is wrong with a devicetree blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FdtProblem {
    /// The blob does not begin with 0xd00dfeed.
    BadMagic {
        /// The value found.
        found: u32,
    },
    /// The blob has a version that cannot be read.
    BadVersion {
        /// The version of the blob.
        version: u32,
        /// The oldest version it is compatible with.
        last_compatible: u32,
    },
    /// Fewer bytes than the header claims (or than a header has).
    Truncated {
        /// The bytes that are needed.
        need: u64,
        /// The bytes there are.
        have: u64,
    },
    /// A block that reaches outside the blob, or overlaps another.
    BadBlock {
        /// The name of the block.
        block: &'static str,
        /// The offset of the block.
        start: u64,
        /// The number of bytes.
        len: u64,
        /// The bytes there are.
        have: u64,
    },
    /// A block that starts where its words could not be read.
    MisalignedBlock {
        /// The name of the block.
        block: &'static str,
        /// The offset of the block.
        start: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// The structure block has an unknown token.
    BadToken {
        /// The token found.
        token: u32,
    },
    /// A name is unterminated, empty, not printable or too long.
    BadName,
    /// Tokens are in the wrong order.
    BadNesting {
        /// The reason, as it appears in the message.
        why: &'static str,
    },
    /// Nodes nest too deeply.
    TooDeep {
        /// The largest that is allowed.
        max: u32,
    },
    /// A property's name is outside the strings block.
    BadStringOffset {
        /// The offset in the blob.
        offset: u32,
    },
    /// A property read as something its length does not allow.
    BadLength {
        /// The name of the property.
        property: String,
        /// The bytes that are needed.
        need: u64,
        /// The bytes there are.
        have: u64,
    },
    /// A property read as text that is not NUL-terminated UTF-8 (or is several strings).
    BadString {
        /// The name of the property.
        property: String,
    },
    /// A property does not exist.
    NoProperty {
        /// The name of the property.
        property: String,
    },
    /// A node does not exist.
    NoNode {
        /// The path.
        path: String,
    },
    /// The writer's buffer is full (FDT_ERR_NOSPACE).
    NoSpace {
        /// The bytes of the buffer.
        capacity: u64,
    },
    /// The writer was called out of order (FDT_ERR_BADSTATE).
    BadState {
        /// The reason, as it appears in the message.
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
    /// The root node is malformed.
    Malformed {
        /// The reason, as it appears in the message.
        why: String,
    },
    /// The address of the map is 0: nothing was serialized.
    MapIsZero,
    /// There is no property with the address of the map.
    MapMissing,
    /// The node of a subtree is malformed.
    Subtree {
        /// The name.
        name: String,
        /// The reason, as it appears in the message.
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
        /// The page size in bytes.
        page: u64,
    },
    /// The node lies outside the memory at hand.
    Outside {
        /// The number of bytes.
        len: u64,
    },
    /// A chunk has an order out of range.
    Order {
        /// The order.
        order: u64,
        /// The largest that is allowed.
        max: u8,
    },
    /// A chunk has more entries than fit a page.
    TooManyElements {
        /// The number found.
        num: u64,
        /// The largest that is allowed.
        max: u64,
    },
    /// The walk came back to this node.
    Cycle,
    /// Something else leads to this node already.
    Shared,
    /// More nodes than the memory could hold.
    TooLong {
        /// The largest that is allowed.
        max: u64,
    },
    /// More nodes, or entries of a list, than the bytes at hand can plausibly describe.
    TooMany {
        /// The largest that is allowed.
        max: u64,
    },
    /// More runs of folios than the bytes at hand can plausibly be a memory of.
    TooManyRuns {
        /// The number of runs.
        runs: u64,
        /// The largest that is allowed.
        max: u64,
    },
    /// More bytes of bitmaps than are kept.
    TooLarge {
        /// The largest that is allowed.
        max: u64,
    },
    /// Entry `index` of the node.
    Entry {
        /// The number of the entry.
        index: u64,
        /// The value found.
        value: u64,
        /// The reason, as it appears in the message.
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
    /// The file has no bytes.
    Empty,
    /// The path names a directory.
    Directory,
    /// The path names neither a file, a block device nor a pipe.
    NotAFile,
    /// An ELF file that is no usable core.
    Elf {
        /// The reason, as it appears in the message.
        why: String,
    },
    /// A numbered part of a file: "ELF segment", "LiME range".
    Segment {
        /// What is numbered.
        kind: &'static str,
        /// The number of the entry.
        index: u64,
        /// The reason, as it appears in the message.
        why: String,
    },
    /// A kdump file, flattened or not, that cannot be one.
    Dump {
        /// The reason, as it appears in the message.
        why: String,
    },
    /// Pages of a dump that are not there, or not what they were packed from.
    Page {
        /// The physical address.
        phys: u64,
        /// The number of bytes.
        len: u64,
        /// The reason, as it appears in the message.
        why: String,
    },
    /// A packed file, or a stream, that cannot be unpacked, or not here.
    Packed {
        /// The compression format.
        packing: String,
        /// The reason, as it appears in the message.
        why: String,
    },
    /// A file of a known format that holds no memory kho reads.
    Foreign {
        /// What was checked, as it appears in the message.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A FIFO that no process has open for writing.
    NoWriter,
    /// A text after `@` that is not an address.
    Address {
        /// The text that was given.
        text: String,
        /// The field that is not a size or an address, and the rule it breaks.
        why: Option<(String, SizeRule)>,
    },
    /// An unknown name after `machine=`.
    Machine {
        /// The name.
        name: String,
        /// The names that are known.
        known: String,
    },
    /// The part of a raw file that was asked for is not there, or has no address.
    Raw {
        /// The reason, as it appears in the message.
        why: String,
    },
    /// A raw image whose handover is not whole at the address it has, with what to do.
    Elsewhere {
        /// The reason, as it appears in the message.
        why: String,
    },
    /// Two sources hold the same memory.
    Overlap {
        /// An address of the first range.
        first: u64,
        /// An address of the second range.
        second: u64,
    },
    /// The operating system reports an error.
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
            Self::Address { text, why } => {
                write!(f, "{text:?} is not an address")?;
                match why {
                    Some((field, rule)) if field == text => write!(f, ": it {rule}")?,
                    Some((field, rule)) => write!(f, ": {field:?} {rule}")?,
                    None => {}
                }
                f.write_str(" (write FILE@0x40000000 or FILE@1G,size=512M)")
            }
            Self::Machine { name, known } => {
                write!(f, "{name:?} is no machine (write FILE,machine=NAME: {known})")
            }
            Self::Raw { why } | Self::Elsewhere { why } => f.write_str(why),
            Self::Overlap { first, second } => write!(f, "memory at {second:#x} overlaps memory that starts at {first:#x}"),
            Self::Io(e) => e.fmt(f),
        }
    }
}

impl Error {
    /// What kind of problem with a map or list it is ([`MapProblem::kind`]), and the address it is at.
    pub fn place(&self) -> (Option<&'static str>, Option<u64>) {
        match self {
            Error::Map { phys, problem, .. } => (Some(problem.kind()), Some(*phys)),
            Error::NoHandover { absent: Some(why), .. } => (Some(why.name()), None),
            Error::Root { phys, .. }
            | Error::UnsupportedAbi { phys, .. }
            | Error::NoLayout { phys, .. }
            | Error::OutsideMemory { phys, .. }
            | Error::LeftOut { phys, .. }
            | Error::CutOff { phys, .. }
            | Error::PageState { phys, .. }
            | Error::Owned { phys, .. }
            | Error::Freed { phys, .. }
            | Error::Untaken { phys } => (None, Some(*phys)),
            _ => (None, None),
        }
    }

    /// Why the memory that is needed is not in its file, if that is what is wrong.
    pub fn absent(&self) -> Option<Absent> {
        match self {
            Error::LeftOut { .. } => Some(Absent::LeftOut),
            Error::CutOff { .. } => Some(Absent::CutOff),
            Error::Reader { missing: Some(Missing::Absent(why)), .. } => Some(*why),
            _ => None,
        }
    }

    /// Whether a pointer that was followed leads out of the memory.
    pub fn leads_outside(&self) -> bool {
        match self {
            Error::OutsideMemory { .. }
            | Error::NoLayout { outside: true, .. }
            | Error::Reader { missing: Some(Missing::Outside), .. } => true,
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
