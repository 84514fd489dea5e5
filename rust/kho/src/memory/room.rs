//! Limits on what a reader allocates and walks, by the size of the files.

#![forbid(unsafe_code)]

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Limits that go with the bytes that the files of a memory hold, not with what their headers claim: a 56-byte program
/// header claims terabytes of zeros, eight bytes of a table claim a node in them.
///
/// Every preserved folio, list entry and node of a kernel takes a page of its own, at least 4096 bytes, or shares one
/// with its kind. Each limit leaves that a wide margin for dumps that leave out zeros or are compressed, and has a part
/// that is there for every file, however small.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    held: u64,
    packed: bool,
}

impl Room {
    /// The limits for `held` bytes of files.
    pub const fn new(held: u64) -> Self {
        Room { held, packed: false }
    }

    /// The limits for `held` bytes of files, some of them compressed.
    pub const fn packed(held: u64) -> Self {
        Room { held, packed: true }
    }

    /// The bytes of the files.
    pub const fn held(self) -> u64 {
        self.held
    }

    /// Items that are listed one by one: segments, nodes of a map, rows of a report, places that something is wrong at.
    pub const fn items(self) -> u64 {
        (64 * KIB).saturating_add(self.held / 512)
    }

    /// Items that each become several objects of Python: sessions, files, regions.
    pub const fn objects(self) -> u64 {
        (8 * KIB).saturating_add(self.held / 2048)
    }

    /// Runs of folios in a map.
    pub const fn runs(self) -> u64 {
        (256 * KIB).saturating_add(self.held / 64)
    }

    /// Bytes of bitmaps that are kept of a map.
    pub const fn bitmap_bytes(self) -> u64 {
        (16 * MIB).saturating_add(self.held)
    }

    /// Blocks that the vmalloc areas of a handover list.
    pub const fn blocks(self) -> u64 {
        (64 * KIB).saturating_add(self.held / 64)
    }

    /// Folios that the memfds of a handover list.
    pub const fn folios(self) -> u64 {
        (256 * KIB).saturating_add(self.held / 16)
    }

    /// Bytes of one devicetree of a subtree, and of all of them together.
    pub const fn fdt_bytes(self) -> u64 {
        MIB.saturating_add(self.held / 8)
    }

    /// Bytes of contents that are worth reading: what the files hold, of compressed ones what they plausibly unpack to.
    pub const fn contents(self) -> u64 {
        match self.packed {
            true => (64 * MIB).saturating_add(self.held.saturating_mul(32)),
            false => (16 * MIB).saturating_add(self.held),
        }
    }
}
