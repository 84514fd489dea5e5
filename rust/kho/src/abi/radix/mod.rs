//! The map of kho-v2, v3 and v4: a radix tree, every node a page (abi.md section 4, kernel/liveupdate/kexec_handover.c).
//!
//! ```text
//! key   1 | folio number             the place of the 1 tells the order: bit 64 - PAGE_SHIFT - order
//!       [ index | ... | index | bit ]
//!         root    inner    inner  leaf
//! ```
//! A leaf holds as many bits as a tracker's block of one page. The keys it covers are one order's, and the leaf is that
//! very block, as soon as the order's bit stands above them; only the leaf of the lowest keys mixes orders, those of
//! 64 TiB a folio and more.

#![forbid(unsafe_code)]

mod read;
mod write;

pub use read::{Tree, inherit, leads_to, read, written};
pub use write::serialize;

use super::{ABIS, Abi, MapFormat};
use crate::error::{Error, Result};
use crate::units::{Order, PageSize, Pfn};

/// The measures of a tree (`enum kho_radix_consts`, include/linux/kho/abi/kexec_handover.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    page: PageSize,
    order_bit: bool,
}

impl Abi {
    /// The levels of the version's tree, including leaves; `None` if its map is a chunk list.
    pub fn levels(&self, page: PageSize) -> Option<u32> {
        Shape::of(self, page).map(Shape::depth)
    }
}

impl Shape {
    /// The shape of an ABI's trees; `None` if its map is no tree.
    pub const fn of(abi: &Abi, page: PageSize) -> Option<Shape> {
        match abi.map {
            MapFormat::Radix { order_bit } => Some(Shape { page, order_bit }),
            MapFormat::Chunks => None,
        }
    }

    /// The other shape of this page size, which differs at 16 KiB pages only.
    const fn other(self) -> Shape {
        Shape { order_bit: !self.order_bit, ..self }
    }

    /// The page size.
    pub const fn page(self) -> PageSize {
        self.page
    }

    /// The bit that tells order 0 (KHO_ORDER_0_LOG2): 52, 50 or 48.
    pub const fn order_0_bit(self) -> u32 {
        64 - self.page.shift()
    }

    /// Bits of a key that an inner node decides (KHO_TABLE_SIZE_LOG2): 9, 11 or 13.
    pub const fn table_bits(self) -> u32 {
        self.page.shift() - 3
    }

    /// Bits of a key that a leaf decides (KHO_BITMAP_SIZE_LOG2): 15, 17 or 19.
    pub const fn leaf_bits(self) -> u32 {
        self.page.shift() + 3
    }

    /// Levels, the leaves included (KHO_TREE_MAX_DEPTH): 6 at 4 KiB, 4 at 64 KiB; at 16 KiB 4 in kho-v2, 5 from v3 on
    /// (but for kho-v3 of 7.1-rc1 to rc5, see [`written`]).
    pub const fn depth(self) -> u32 {
        let width = self.order_0_bit() + self.order_bit as u32;
        (width - self.leaf_bits()).div_ceil(self.table_bits()) + 1
    }

    /// Bits of a key that the tree can tell apart: 60 at 4 KiB, 58 at 64 KiB; at 16 KiB 50 or 61.
    pub const fn key_bits(self) -> u32 {
        (self.depth() - 1) * self.table_bits() + self.leaf_bits()
    }

    /// Where in a key a level's index stands; level 1 is the one above the leaves.
    const fn level_shift(self, level: u32) -> u32 {
        (level - 1) * self.table_bits() + self.leaf_bits()
    }

    /// The index of the entry that leads from an inner node of `level` towards a key (kho_radix_get_table_index).
    pub const fn index(self, key: u64, level: u32) -> u64 {
        (key >> self.level_shift(level)) & ((1 << self.table_bits()) - 1)
    }

    /// The bit that tells an order.
    const fn order_bit_of(self, order: Order) -> u32 {
        self.order_0_bit() - order.get()
    }

    /// A folio's key (kho_radix_encode_key). `pfn` is a multiple of the folio's size, inside the address space.
    pub const fn key(self, pfn: Pfn, order: Order) -> u64 {
        1 << self.order_bit_of(order) | pfn.0 >> order.get()
    }

    /// The folio a key names (kho_radix_decode_key).
    ///
    /// # Errors
    /// What is wrong with a key that names none.
    pub fn folio(self, key: u64) -> Result<(Pfn, Order), &'static str> {
        if self.loses_order_0() && key >> Self::LOST_KEY_BITS == 0 {
            return Ok((Pfn(key), Order::ZERO));
        }
        if key == 0 {
            return Err("is a key without a bit for the order");
        }
        let top = key.ilog2();
        let Some(order) = self.order_0_bit().checked_sub(top) else {
            return Err("is a key with the order's bit above that of order 0");
        };
        match Order::new(order.into()) {
            Ok(order) => Ok((Pfn((key ^ 1 << top) << order.get()), order)),
            Err(_) => Err("is the key of an order beyond 36"),
        }
    }

    /// Whether the keys of single pages lose the bit that tells their order, as in kho-v2 at 16 KiB: the kernel
    /// takes indices modulo the size of a table (which is why v4 has a level more).
    const fn loses_order_0(self) -> bool {
        self.order_0_bit() >= self.key_bits()
    }

    /// Refuses a block whose keys could not be read back: in trees that lose the bit of order 0, what is left of a single
    /// page's key is its pfn, and keys below 2^34 are taken for that. It leaves pages below 256 TiB and folios of up to
    /// 1 GiB, which is every folio of a kernel with 16 KiB pages.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check_writable(self, order: Order, index: u64) -> Result<()> {
        let fits = match order {
            Order::ZERO => index >> (Self::LOST_KEY_BITS - self.leaf_bits()) == 0,
            _ => self.order_bit_of(order) >= Self::LOST_KEY_BITS,
        };
        if !self.loses_order_0() || fits {
            return Ok(());
        }
        let deeper = ABIS.iter().find(|abi| abi.levels(self.page) > Some(self.depth()));
        let why = format!(
            "with {} pages a tree of {} levels cannot tell this folio of order {order} from a single page; {} has one \
             more level",
            self.page,
            self.depth(),
            deeper.map_or("a later version", |abi| abi.compatible)
        );
        Err(Error::Invalid { what: "preserved-memory map", why })
    }

    /// Bits of a single page's key where the topmost one is lost.
    const LOST_KEY_BITS: u32 = 34;

    /// Whether an order's keys share the leaf of the lowest keys with other orders'.
    pub(crate) const fn is_low(self, order: Order) -> bool {
        self.order_bit_of(order) < self.leaf_bits()
    }

    /// The bits of a key above a leaf's own, for the leaf that holds block `index` of an order that is not low.
    pub(crate) const fn leaf_of(self, order: Order, index: u64) -> u64 {
        let leaf = 1 << (self.order_bit_of(order) - self.leaf_bits()) | index;
        leaf & ((1 << (self.key_bits() - self.leaf_bits())) - 1)
    }
}
