//! The ABI versions: one row of facts each. What differs between versions is a column here, not an `if` elsewhere.

#![forbid(unsafe_code)]

mod budget;
pub mod chunk;
pub mod detect;
pub mod layout;
pub mod preserved;
pub mod radix;

/// How the preserved-memory map is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapFormat {
    /// A list of chunks of bitmaps (ABI section 3).
    Chunks,
    /// A radix tree of pages (ABI section 4).
    Radix {
        /// Whether the depth of the tree leaves room for the key's bit that marks order 0. It differs at 16 KiB pages only.
        order_bit: bool,
    },
}

/// What a `compatible` string stands for (ABI section 1).
#[derive(Debug)]
pub struct Abi {
    /// The `compatible` string of the root node.
    pub compatible: &'static str,
    /// The format of the preserved-memory map.
    pub map: MapFormat,
    /// Whether map and root FDT are in force from the start and edited as things come and go; otherwise they are written
    /// when the handover is finalized (ABI section 2).
    pub live: bool,
    /// The subtree property that holds the blob's physical address.
    pub subtree_property: &'static str,
    /// The subtree property that holds the blob's size in bytes.
    pub size_property: Option<&'static str>,
    /// Whether this version of the library reads and writes it.
    pub decoded: bool,
    /// Whether a page range is cut where the NUMA node changes before it is split (Linux 7.3).
    pub cuts_at_nodes: bool,
    /// The kernels that use it, for messages.
    pub kernels: &'static str,
}

/// Every version there is, oldest first.
pub static ABIS: [Abi; 4] = [
    Abi {
        compatible: "kho-v1",
        map: MapFormat::Chunks,
        live: false,
        subtree_property: "fdt",
        size_property: None,
        decoded: true,
        cuts_at_nodes: false,
        kernels: "Linux 6.16 to 7.0",
    },
    Abi {
        compatible: "kho-v2",
        map: MapFormat::Radix { order_bit: false },
        live: true,
        subtree_property: "preserved-data",
        size_property: None,
        decoded: true,
        cuts_at_nodes: false,
        kernels: "development trees between Linux 7.0 and 7.1",
    },
    Abi {
        compatible: "kho-v3",
        map: MapFormat::Radix { order_bit: false },
        live: true,
        subtree_property: "preserved-data",
        size_property: Some("blob-size"),
        decoded: true,
        cuts_at_nodes: false,
        kernels: "Linux 7.1",
    },
    Abi {
        compatible: "kho-v4",
        map: MapFormat::Radix { order_bit: true },
        live: true,
        subtree_property: "preserved-data",
        size_property: Some("blob-size"),
        decoded: true,
        cuts_at_nodes: true,
        kernels: "Linux 7.2 and 7.3",
    },
];

/// The root node's property with the map's physical address.
pub const MAP_PROPERTY: &str = "preserved-memory-map";
/// The root node's property that names the version.
pub const COMPATIBLE_PROPERTY: &str = "compatible";

impl Abi {
    /// The version a `compatible` names.
    pub fn named(compatible: &str) -> Option<&'static Abi> {
        ABIS.iter().find(|abi| abi.compatible == compatible)
    }

    /// The versions this library decodes, for messages.
    pub fn decoded() -> String {
        let names: Vec<&str> = ABIS.iter().filter(|abi| abi.decoded).map(|abi| abi.compatible).collect();
        names.join(", ")
    }
}
