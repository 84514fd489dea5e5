//! Writing a tree from the leaves up.

#![forbid(unsafe_code)]

use super::Shape;
use crate::error::{Error, Result};
use crate::tracker::Tracker;
use crate::units::Phys;
use std::collections::BTreeMap;

/// Lays out a tracker's tree from the leaves up, each level by ascending key; the root comes last. `alloc` gives the
/// pages; their bytes come back with their addresses, to be written there. An empty block becomes an empty leaf, as the
/// kernel keeps one.
///
/// # Errors
/// Whatever `alloc` returns; [`Error::Invalid`] for an order that this shape cannot hold ([`Shape::check_writable`]) and
/// for a tracker of another page size.
pub fn serialize(
    tracker: &Tracker,
    shape: Shape,
    mut alloc: impl FnMut() -> Result<Phys>,
) -> Result<Vec<(Phys, Vec<u8>)>> {
    let geometry = tracker.geometry();
    if geometry.page() != shape.page {
        let why = format!("pages of {} are not {}", geometry.page(), shape.page);
        return Err(Error::Invalid { what: "tracker", why });
    }
    let blank = || vec![0; usize::try_from(shape.page.bytes()).unwrap_or(0)];
    let mut leaves: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for order in tracker.orders() {
        let len = usize::try_from(geometry.bits().min(1 << shape.order_bit_of(order)) / 8).unwrap_or(0);
        for block in tracker.blocks(order) {
            let first = block.index() * geometry.bits();
            match shape.check_writable(order, first >> shape.leaf_bits()) {
                Err(_) if block.is_empty() => continue,
                checked => checked?,
            }
            let key = ((1 << shape.order_bit_of(order)) | first) & ((1 << shape.key_bits()) - 1);
            let leaf = leaves.entry(key >> shape.leaf_bits()).or_insert_with(blank);
            let at = usize::try_from((key & ((1 << shape.leaf_bits()) - 1)) / 8).unwrap_or(0);
            block.copy_to(&mut leaf[at..at + len]);
        }
    }
    let mut pages = Vec::new();
    let mut level = leaves;
    for _ in 1..shape.depth() {
        let mut above: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (key, bytes) in level {
            let phys = alloc()?;
            let index = usize::try_from(key & ((1 << shape.table_bits()) - 1)).unwrap_or(0);
            let table = above.entry(key >> shape.table_bits()).or_insert_with(blank);
            table[8 * index..8 * index + 8].copy_from_slice(&phys.0.to_le_bytes());
            pages.push((phys, bytes));
        }
        level = above;
    }
    // check_writable leaves every key a path from one root.
    let root = level.into_values().next().unwrap_or_else(blank);
    pages.push((alloc()?, root));
    Ok(pages)
}
