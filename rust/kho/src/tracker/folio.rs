//! A folio as a 16-byte record, the item of folio lists and buffers.

#![forbid(unsafe_code)]

use crate::units::{Order, Phys};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A folio by address, in the form that buffers hold.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Folio {
    /// The physical address of the first page.
    pub phys: u64,
    /// log2 of the pages.
    pub order: u8,
    pub(in crate::tracker) pad: [u8; 7],
}

const _: () = assert!(size_of::<Folio>() == 16);

impl Folio {
    /// A record of the folio at `phys`.
    pub const fn new(phys: Phys, order: Order) -> Self {
        Folio { phys: phys.0, order: order.index() as u8, pad: [0; 7] }
    }
}
