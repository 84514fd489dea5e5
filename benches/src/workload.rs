//! The folios that every row is about. Seeded: the same in each run and for every peer.

use kho::units::{Order, Pfn};

/// Folios in the order in which they come.
pub struct Workload {
    pub name: &'static str,
    pub pfns: Vec<u64>,
    /// As many; `None` where all are of order 0.
    pub orders: Option<Vec<u8>>,
    /// One past the last pfn that may occur.
    pub span: u64,
}

/// Folios of W1. With fewer everything else shrinks along, spans too, so that maps stay as dense as they are.
pub const FULL: u64 = 10_000_000;

/// How many folios W1 is to have: `KHO_BENCH_N`.
pub fn size() -> u64 {
    let given = std::env::var("KHO_BENCH_N").ok().and_then(|n| n.parse().ok());
    given.unwrap_or(FULL).max(1000)
}

/// `full` scaled as a W1 of `n` is, at least 1.
fn scaled(full: u64, n: u64) -> u64 {
    (u128::from(full) * u128::from(n) / u128::from(FULL)).max(1) as u64
}

/// A permutation of the numbers below `1 << bits` that looks random: rounds of multiplying and folding.
pub fn shuffled(number: u64, bits: u32) -> u64 {
    let mask = !0 >> (64 - bits);
    let mut x = number & mask;
    for odd in [0x9e37_79b9_7f4a_7c15u64, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = x.wrapping_mul(odd) & mask;
        x ^= x >> bits.div_ceil(2);
    }
    x
}

impl Workload {
    /// 10,000,000 random order-0 folios of 1 TiB, each once.
    pub fn w1(n: u64) -> Self {
        let span = scaled(1 << 28, n).next_power_of_two();
        let pfns = (0..n).map(|n| shuffled(n, span.ilog2())).collect();
        Workload { name: "W1", pfns, orders: None, span }
    }

    /// 2^24 consecutive order-0 folios.
    pub fn w2(n: u64) -> Self {
        let n = scaled(1 << 24, n);
        Workload { name: "W2", pfns: (0..n).collect(), orders: None, span: n }
    }

    /// A guest of 2 TiB: 1,048,576 order-9 folios, shuffled; then 1,000,000 random order-0 and 512 order-18 folios
    /// after it.
    pub fn w3(n: u64) -> Self {
        let guest = scaled(1 << 20, n).next_power_of_two();
        let small = scaled(1_000_000, n);
        let small_span = scaled(1 << 28, n).next_power_of_two().max(small.next_power_of_two());
        let huge = scaled(512, n);
        let after = guest << 9;
        let mut pfns: Vec<u64> = (0..guest).map(|n| shuffled(n, guest.ilog2()) << 9).collect();
        pfns.extend((0..small).map(|n| after + shuffled(n, small_span.ilog2())));
        let aligned = (after + small_span).next_multiple_of(1 << 18);
        pfns.extend((0..huge).map(|n| aligned + (n << 18)));
        let mut orders = vec![9; guest as usize];
        orders.resize(orders.len() + small as usize, 0);
        orders.resize(orders.len() + huge as usize, 18);
        Workload { name: "W3", pfns, orders: Some(orders), span: aligned + (huge << 18) }
    }

    pub fn len(&self) -> usize {
        self.pfns.len()
    }

    pub fn is_empty(&self) -> bool {
        self.pfns.is_empty()
    }

    /// (pfn, order) of every folio.
    ///
    /// # Panics
    /// An order that does not exist is a mistake in this file.
    #[allow(clippy::expect_used)]
    pub fn folios(&self) -> impl Iterator<Item = (Pfn, Order)> + Clone + '_ {
        let order = |n: usize| self.orders.as_ref().map_or(0, |orders| orders[n]);
        let folio = move |(n, pfn): (usize, &u64)| (Pfn(*pfn), Order::new(order(n).into()).expect("an order"));
        self.pfns.iter().enumerate().map(folio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_shuffle_is_a_permutation() {
        for bits in [1, 2, 7, 16] {
            let all: HashSet<u64> = (0..1 << bits).map(|n| shuffled(n, bits)).collect();
            assert_eq!(all.len(), 1 << bits);
        }
    }

    #[test]
    fn no_folio_of_a_workload_comes_twice_and_all_are_aligned() {
        for workload in [Workload::w1(20_000), Workload::w2(20_000), Workload::w3(20_000)] {
            let all: HashSet<_> = workload.folios().collect();
            assert_eq!(all.len(), workload.len(), "{}", workload.name);
            assert!(all.iter().all(|(pfn, order)| pfn.0 % order.nr_pages() == 0 && pfn.0 < workload.span));
        }
    }
}
