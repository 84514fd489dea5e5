//! The ABI versions: one row of facts each. What differs between versions is a column here, not an `if` elsewhere.
//!
//! Python has these rows as `kho._kho.abis()` and keeps no table of its own; `tests/test_abis.py` compares them with
//! `docs/abi.md`, and adds a made-up version to see that a row is enough.

#![forbid(unsafe_code)]

mod budget;
pub mod chunk;
pub mod composite;
pub mod detect;
pub mod layout;
pub mod preserved;
pub mod radix;

use layout::BitmapSize;
use std::sync::{PoisonError, RwLock};

/// How the preserved-memory map is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapFormat {
    /// A list of chunks of bitmaps (abi.md section 3).
    Chunks,
    /// A radix tree of pages (abi.md section 4).
    Radix {
        /// Whether the depth of the tree leaves room for the key's bit that marks order 0. It differs at 16 KiB pages only.
        order_bit: bool,
    },
}

/// Where a new subtree's node goes among those of the root FDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SubtreeOrder {
    /// After the others, as the sequential writer puts it.
    Append,
    /// Before the others, as `fdt_add_subnode` puts it.
    Prepend,
}

/// What a `compatible` string stands for (abi.md section 1).
#[derive(Clone, Debug)]
pub struct Abi {
    /// The `compatible` string of the root node.
    pub compatible: &'static str,
    /// The kernels that write and read it.
    pub kernels: &'static str,
    /// Whether a release of Linux writes it; otherwise only development trees did.
    pub released: bool,
    /// Whether only a public draft has it: it is in no list of versions, and is written only if asked for by its name.
    pub draft: bool,
    /// Whether this version of the library reads and writes it.
    pub decoded: bool,
    /// The format of the preserved-memory map.
    pub map: MapFormat,
    /// The bitmap sizes that a chunk list comes with, and the kernels that write each; empty for a tree, whose leaves
    /// are pages.
    pub bitmaps: &'static [(BitmapSize, &'static str)],
    /// Whether map and root FDT are in force from the start and edited as things come and go; otherwise they are written
    /// when the handover is finalized (abi.md section 2).
    pub live: bool,
    /// The order in which this library writes subtrees.
    pub subtree_order: SubtreeOrder,
    /// The root's property that holds the map's physical address.
    pub map_property: &'static str,
    /// The subtree property that holds the blob's physical address.
    pub subtree_property: &'static str,
    /// The subtree property that holds the blob's size in bytes.
    pub size_property: Option<&'static str>,
    /// Whether a page range is cut where the NUMA node changes before it is split (Linux 7.1 and later).
    pub cuts_at_nodes: bool,
    /// The `compatible` of the LUO subtree that its kernels read; `None` if they have no LUO.
    pub luo: Option<&'static str>,
    /// The `compatible` of a memfd in a LUO session that its kernels read.
    pub memfd: Option<&'static str>,
}

/// Every version there is, oldest first.
pub static ABIS: [Abi; 4] = [
    Abi {
        compatible: "kho-v1",
        kernels: "Linux 6.16 to 7.0",
        released: true,
        draft: false,
        decoded: true,
        map: MapFormat::Chunks,
        bitmaps: &[(BitmapSize::Small, "Linux 6.16 and 6.17"), (BitmapSize::Page, "Linux 6.18 to 7.0")],
        live: false,
        subtree_order: SubtreeOrder::Append,
        map_property: "preserved-memory-map",
        subtree_property: "fdt",
        size_property: None,
        cuts_at_nodes: false,
        luo: Some("luo-v1"),
        memfd: Some("memfd-v1"),
    },
    Abi {
        compatible: "kho-v2",
        kernels: "development trees between Linux 7.0 and 7.1",
        released: false,
        draft: false,
        decoded: true,
        map: MapFormat::Radix { order_bit: false },
        bitmaps: &[],
        live: true,
        subtree_order: SubtreeOrder::Prepend,
        map_property: "preserved-memory-map",
        subtree_property: "preserved-data",
        size_property: None,
        cuts_at_nodes: false,
        luo: Some("luo-v1"),
        memfd: Some("memfd-v1"),
    },
    Abi { compatible: "kho-v3", kernels: "Linux 7.1", luo: Some("luo-v1"), ..KHO_V4 },
    KHO_V4,
];

/// The version that 7.1's differs from in LUO alone, and that the draft adds parts to.
const KHO_V4: Abi = Abi {
    compatible: "kho-v4",
    kernels: "Linux 7.2 and 7.3",
    released: true,
    draft: false,
    decoded: true,
    map: MapFormat::Radix { order_bit: true },
    bitmaps: &[],
    live: true,
    subtree_order: SubtreeOrder::Prepend,
    map_property: "preserved-memory-map",
    subtree_property: "preserved-data",
    size_property: Some("blob-size"),
    cuts_at_nodes: true,
    luo: Some("luo-v5"),
    memfd: Some("memfd-v2"),
};

/// Versions of public drafts (abi.md section 9): no release of Linux writes or reads them.
pub static DRAFTS: [Abi; 1] = [Abi {
    compatible: "kho-v4;radix-v1;vmalloc-v1",
    kernels: "a draft of June 2026, in no release",
    released: false,
    draft: true,
    luo: Some("luo-v5;block-v1"),
    memfd: Some("memfd-v2;vmalloc-v1"),
    ..KHO_V4
}];

/// The parts that a composite compatible of the draft names after its base, and what each is the format of.
pub static PARTS: [(&str, &str); 3] =
    [("block-v1", "chains of blocks"), ("radix-v1", "the radix tree of the map"), ("vmalloc-v1", "lists of pages")];

/// The root node's property that names the version.
pub const COMPATIBLE_PROPERTY: &str = "compatible";

/// Rows that tests added. Nothing is ever freed: a handover may refer to a row that was removed.
static ADDED: RwLock<Vec<&'static Abi>> = RwLock::new(Vec::new());

impl Abi {
    /// All versions, oldest first, then the rows that tests added; not those of drafts.
    pub fn all() -> impl Iterator<Item = &'static Abi> {
        let added = ADDED.read().unwrap_or_else(PoisonError::into_inner).clone();
        ABIS.iter().chain(added)
    }

    /// The version a `compatible` names, be it a draft.
    pub fn named(compatible: &str) -> Option<&'static Abi> {
        Abi::all().chain(&DRAFTS).find(|abi| abi.compatible == compatible)
    }

    /// The versions that read root FDT and map differently, the newest first: as which a version that is not known may
    /// be read.
    pub fn layouts() -> Vec<&'static Abi> {
        let rows: Vec<&'static Abi> = Abi::all().filter(|abi| abi.decoded).collect();
        let mut layouts: Vec<&'static Abi> = Vec::new();
        for abi in rows.into_iter().rev() {
            if layouts.iter().all(|known| !known.is_laid_out_as(abi)) {
                layouts.push(abi);
            }
        }
        layouts
    }

    /// Whether root FDT and map of two versions are read in the same way.
    pub fn is_laid_out_as(&self, other: &Abi) -> bool {
        let layout = |abi: &Abi| (abi.map, abi.map_property, abi.subtree_property, abi.size_property);
        layout(self) == layout(other)
    }

    /// The versions this library decodes, for messages.
    pub fn decoded() -> String {
        let names: Vec<&str> = Abi::all().filter(|abi| abi.decoded).map(|abi| abi.compatible).collect();
        names.join(", ")
    }

    /// Adds a row at run time, which leaks it: for tests with a version that no kernel writes yet.
    /// `None` if there is a row of that name.
    #[doc(hidden)]
    pub fn add(row: Abi) -> Option<&'static Abi> {
        let mut added = ADDED.write().unwrap_or_else(PoisonError::into_inner);
        if ABIS.iter().chain(&DRAFTS).chain(added.iter().copied()).any(|abi| abi.compatible == row.compatible) {
            return None;
        }
        let row: &'static Abi = Box::leak(Box::new(row));
        added.push(row);
        Some(row)
    }

    /// Takes a row that [`Abi::add`] added off the list; whether it was there.
    #[doc(hidden)]
    pub fn remove(compatible: &str) -> bool {
        let mut added = ADDED.write().unwrap_or_else(PoisonError::into_inner);
        let before = added.len();
        added.retain(|abi| abi.compatible != compatible);
        added.len() < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageSize;

    #[test]
    fn a_tree_has_levels_and_a_chunk_list_has_bitmaps() {
        for abi in ABIS.iter().chain(&DRAFTS) {
            let tree = abi.map != MapFormat::Chunks;
            assert_eq!(abi.bitmaps.is_empty(), tree, "{}", abi.compatible);
            for page in PageSize::ALL {
                assert_eq!(abi.levels(page).is_some(), tree, "{}", abi.compatible);
            }
        }
    }

    #[test]
    fn a_root_that_is_edited_has_its_newest_subtree_first() {
        for abi in &ABIS {
            assert_eq!(abi.live, abi.subtree_order == SubtreeOrder::Prepend, "{}", abi.compatible);
        }
    }

    #[test]
    fn a_draft_is_found_by_its_name_and_is_in_no_list() {
        for draft in &DRAFTS {
            assert_eq!(Abi::named(draft.compatible).map(|abi| abi.compatible), Some(draft.compatible));
            assert!(draft.draft && !draft.released && draft.decoded);
            assert!(Abi::all().all(|abi| !abi.draft && abi.compatible != draft.compatible));
            assert!(!Abi::decoded().contains(draft.compatible));
            assert!(Abi::add(draft.clone()).is_none());
        }
    }

    #[test]
    fn versions_of_one_layout_are_one_candidate_and_the_newest_is_first() {
        let names: Vec<&str> = Abi::layouts().iter().map(|abi| abi.compatible).collect();
        assert_eq!(names, ["kho-v4", "kho-v2", "kho-v1"]);
    }

    #[test]
    fn a_row_is_added_once_and_is_found_until_it_is_removed() {
        let row = Abi { compatible: "kho-v77", ..ABIS[3].clone() };
        assert!(Abi::add(row.clone()).is_some());
        assert!(Abi::add(row).is_none());
        assert!(Abi::add(ABIS[0].clone()).is_none());
        assert!(Abi::decoded().ends_with(", kho-v77"));
        assert_eq!(Abi::named("kho-v77").map(|abi| abi.compatible), Some("kho-v77"));
        assert!(Abi::remove("kho-v77"));
        assert!(!Abi::remove("kho-v77"));
        assert!(!Abi::remove("kho-v1"));
        assert!(Abi::named("kho-v77").is_none());
    }
}
