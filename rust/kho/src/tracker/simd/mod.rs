//! Runtime CPU dispatch: one portable body, compiled for the baseline and for AVX2, BMI1/2, LZCNT and POPCNT.
//!
//! Listing has a third build that compresses vectors with AVX-512 (`compress`). Each call selects the build by the
//! processor's features.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod compress;
mod lines;

use super::block::{Access, Block, Private, Shape, Shared};
use super::folio::Folio;
use super::placement::{BitmapPlace, Rule};
use crate::mapping::Items;
use core::mem::MaybeUninit;
use lines::{ByBits, list};

/// Defines a function with two builds, portable and for the extensions, and selects one at run time.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $portable:ident / $native:ident $body:block) => {
        #[inline(always)]
        fn $portable($($arg: $ty),*) -> $ret $body

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
        fn $native($($arg: $ty),*) -> $ret {
            $portable($($arg),*)
        }

        $(#[$doc])*
        #[inline]
        $vis fn $name($($arg: $ty),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            if has_extensions() {
                // SAFETY: the test above found every feature that the function is compiled for.
                return unsafe { $native($($arg),*) };
            }
            $portable($($arg),*)
        }
    };
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_extensions() -> bool {
    use std::arch::is_x86_feature_detected as has;
    !crate::tuning::tuning().portable && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("popcnt")
}

/// Calls a loop over the words of a block with the way in which they may be read, so that a loop over words that are the
/// tracker's alone becomes vector code.
macro_rules! by_access {
    ($shape:expr, $kernel:ident($($arg:expr),*)) => {
        // SAFETY: the way to read is the one that the shape says.
        unsafe { if $shape.shared { $kernel::<Shared>($($arg),*) } else { $kernel::<Private>($($arg),*) } }
    };
}

/// # Safety
/// `A` is [`Shared`] if the shape says so.
#[inline(always)]
unsafe fn count_by<A: Access>(block: Block, shape: Shape) -> u64 {
    // SAFETY: the caller chose `A`.
    unsafe { block.words_by::<A>(shape) }.map(|word| u64::from(word.count_ones())).sum()
}

/// # Safety
/// As of [`count_by`].
#[inline(always)]
unsafe fn common_by<A: Access>(a: Block, b: Block, shape: Shape) -> u64 {
    // SAFETY: the caller chose `A`.
    let words = unsafe { a.words_by::<A>(shape).zip(b.words_by::<A>(shape)) };
    words.map(|(a, b)| u64::from((a & b).count_ones())).sum()
}

/// # Safety
/// As of [`count_by`].
#[inline(always)]
unsafe fn compare_by<A: Access>(a: Block, b: Block, shape: Shape) -> (u64, u64, u64) {
    let (mut one, mut both, mut other) = (0, 0, 0);
    // SAFETY: the caller chose `A`.
    for (a, b) in unsafe { a.words_by::<A>(shape).zip(b.words_by::<A>(shape)) } {
        one += u64::from((a & !b).count_ones());
        both += u64::from((a & b).count_ones());
        other += u64::from((b & !a).count_ones());
    }
    (one, both, other)
}

dispatch! {
    /// Bits set in a block.
    pub(super) fn count(block: Block, shape: Shape) -> u64 = count_portable / count_native {
        by_access!(shape, count_by(block, shape))
    }
}

dispatch! {
    /// Bits set in both blocks.
    pub(super) fn common(a: Block, b: Block, shape: Shape) -> u64 = common_portable / common_native {
        by_access!(shape, common_by(a, b, shape))
    }
}

dispatch! {
    /// Bits set in the first block alone, in both, in the second alone.
    pub(super) fn compare(a: Block, b: Block, shape: Shape) -> (u64, u64, u64) = compare_portable / compare_native {
        by_access!(shape, compare_by(a, b, shape))
    }
}

dispatch! {
    /// Sets words `from .. to` of a block to one value. Returns how many bits were set in them.
    pub(super) fn fill(block: Block, shape: Shape, from: usize, to: usize, value: u64) -> u64
        = fill_portable / fill_native
    {
        let mut ones = 0;
        block.replace(shape, from, to, |old| {
            ones += u64::from(old.count_ones());
            value
        });
        ones
    }
}

dispatch! {
    /// The lowest and the highest of a list, and how many are lower than the one before, the first one's being `last`.
    pub(super) fn survey(list: &[u64], last: u64) -> (u64, u64, usize) = survey_portable / survey_native {
        let (mut low, mut high) = (u64::MAX, 0);
        for &n in list {
            low = low.min(n);
            high = high.max(n);
        }
        let first = usize::from(list.first().is_some_and(|first| *first < last));
        (low, high, first + list.windows(2).filter(|pair| pair[1] < pair[0]).count())
    }
}

dispatch! {
    /// Whether each of a list is one more than the one before.
    pub(super) fn ascends_by_one(list: &[u64]) -> bool = ascends_by_one_portable / ascends_by_one_native {
        list.windows(2).fold(0, |other, pair| other | (pair[1].wrapping_sub(pair[0]) ^ 1)) == 0
    }
}

dispatch! {
    /// Pfns, in their place, as the numbers of folios of an order.
    pub(super) fn number(pfns: &mut [u64], order: u32) -> () = number_portable / number_native {
        if order > 0 {
            pfns.iter_mut().for_each(|pfn| *pfn = pfn.rotate_right(order));
        }
    }
}

dispatch! {
    /// Writes the places of the blocks of consecutive slots; the first slot belongs to block `index`. The distance of a block
    /// is its slot plus `before`, plus `step` for each slot before it in `slots`.
    ///
    /// Returns false if a slot has no block or a distance does not fit the rule; what was written has no meaning then.
    pub(super) fn places(
        slots: &[*mut u8], before: u64, step: u64, index: u64, rule: Rule, into: Items<'_, BitmapPlace>
    ) -> bool = places_portable / places_native {
        // The uppermost bit of `wrong` says that a distance lies below 0 or beyond the last, bit 0 of `taken` that all exist.
        let (mut wrong, mut taken) = (0, u64::MAX);
        let (mut start, mut at, last) = (index.wrapping_mul(rule.stride), before, (rule.len as u64).wrapping_sub(1));
        into.write(slots.iter().map(|slot| {
            let slot = slot.addr() as u64;
            let distance = slot.wrapping_add(at);
            wrong |= distance | last.wrapping_sub(distance);
            taken &= slot;
            let place = [start.to_le(), rule.first.wrapping_add(distance).to_le()];
            (start, at) = (start.wrapping_add(rule.stride), at.wrapping_add(step));
            place
        }));
        wrong >> 63 == 0 && taken & 1 != 0
    }
}

/// The folios of a block, as `first + bit << shift`, at the beginning of `into`. Returns how many were written: all there
/// are, or as many as fit.
#[inline]
pub(super) fn list_numbers(block: Block, shape: Shape, first: u64, shift: u32, into: &mut [MaybeUninit<u64>]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if compress::is_there() {
        // SAFETY: the test above found every feature that the function is compiled for.
        return unsafe { compress::list_numbers(block, shape, first, shift, into) };
    }
    list_numbers_by_bits(block, shape, first, shift, into)
}

/// As [`list_numbers`], with the rest of the record that `like` is.
#[inline]
pub(super) fn list_folios(
    block: Block,
    shape: Shape,
    first: u64,
    shift: u32,
    like: Folio,
    into: &mut [MaybeUninit<Folio>],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if compress::is_there() {
        // SAFETY: the test above found every feature that the function is compiled for.
        return unsafe { compress::list_folios(block, shape, first, shift, like, into) };
    }
    list_folios_by_bits(block, shape, first, shift, like, into)
}

dispatch! {
    /// [`list_numbers`], bit by bit.
    fn list_numbers_by_bits(
        block: Block, shape: Shape, first: u64, shift: u32, into: &mut [MaybeUninit<u64>]
    ) -> usize = list_numbers_portable / list_numbers_native {
        match shift {
            0 => list(block, shape, into, &ByBits(|bit| first + bit)),
            _ => list(block, shape, into, &ByBits(|bit| (first + bit) << shift)),
        }
    }
}

dispatch! {
    /// [`list_folios`], bit by bit.
    fn list_folios_by_bits(
        block: Block, shape: Shape, first: u64, shift: u32, like: Folio, into: &mut [MaybeUninit<Folio>]
    ) -> usize = list_folios_portable / list_folios_native {
        list(block, shape, into, &ByBits(|bit| Folio { phys: (first + bit) << shift, ..like }))
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::tracker::HeapBlocks;
    use crate::units::{Order, Phys};
    use proptest::prelude::*;

    /// Words of a block that are full, empty, sparse or anything.
    fn words() -> impl Strategy<Value = Vec<u64>> {
        let word = prop_oneof![Just(0), Just(u64::MAX), (0..64u32).prop_map(|bit| 1 << bit), any::<u64>()];
        proptest::collection::vec(word, SHAPE.words())
    }

    fn block_of(words: &[u64]) -> (HeapBlocks, Block) {
        let source = HeapBlocks::default();
        let Ok(block) = Block::allocate(&source, SHAPE) else { unreachable!("there is memory") };
        words.iter().enumerate().for_each(|(n, word)| block.store(SHAPE, n, *word));
        (source, block)
    }

    const SHAPE: Shape = Shape::new(512);

    /// Calls both builds, where the processor can run both.
    macro_rules! both {
        ($portable:ident, $native:ident, $($arg:expr),*) => {{
            let portable = $portable($($arg),*);
            // SAFETY: the processor was asked.
            let native = if has_extensions() { unsafe { $native($($arg),*) } } else { portable };
            prop_assert_eq!(portable, native);
            portable
        }};
    }

    fn written<T: Copy>(into: &[MaybeUninit<T>]) -> Vec<T> {
        // SAFETY: the lists below begin as values, so that every place is one.
        into.iter().map(|place| unsafe { place.assume_init() }).collect()
    }

    proptest! {
        #[test]
        fn both_builds_count_and_fill_alike(words in words(), from in 0..70usize, n in 0..70usize) {
            let (_source, block) = block_of(&words);
            let ones: u64 = block.words(SHAPE).map(|word| u64::from(word.count_ones())).sum();
            prop_assert_eq!(both!(count_portable, count_native, block, SHAPE), ones);
            prop_assert_eq!(count(block, SHAPE), ones);
            let filled = fill(block, SHAPE, from, from + n, 7);
            let held: u32 = words.iter().skip(from).take(n).map(|word| word.count_ones()).sum();
            prop_assert_eq!(filled, u64::from(held));
            for (at, (word, old)) in block.words(SHAPE).zip(words).enumerate() {
                prop_assert_eq!(word, if (from..from + n).contains(&at) { 7 } else { old });
            }
            let again = both!(fill_portable, fill_native, block, SHAPE, from, from + n, 7);
            prop_assert_eq!(again, 3 * block.words(SHAPE).skip(from).take(n).len() as u64);
        }

        #[test]
        fn every_way_lists_alike_whatever_room_there_is(words in words(), room in 0..5000usize, shift in 0..9u32) {
            let (_source, block) = block_of(&words);
            let mut all = Vec::new();
            for (n, word) in words.iter().enumerate() {
                all.extend((0..64u64).filter(|bit| word >> bit & 1 != 0).map(|bit| (40960 + 64 * n as u64 + bit) << shift));
            }
            let fit = room.min(all.len());
            for list in [list_numbers_portable, list_numbers_by_bits, list_numbers] {
                let mut numbers = vec![MaybeUninit::new(9); room];
                prop_assert_eq!(list(block, SHAPE, 40960, shift, &mut numbers), fit);
                prop_assert_eq!(&written(&numbers)[..fit], &all[..fit]);
            }
            let like = Folio::new(Phys(0), Order::saturating(shift));
            let all: Vec<_> = all.iter().map(|phys| Folio { phys: *phys, ..like }).collect();
            for list in [list_folios_portable, list_folios_by_bits, list_folios] {
                let mut folios = vec![MaybeUninit::new(like); room];
                prop_assert_eq!(list(block, SHAPE, 40960, shift, like, &mut folios), fit);
                prop_assert_eq!(&written(&folios)[..fit], &all[..fit]);
            }
        }

        #[test]
        fn both_builds_compare_alike(one in words(), other in words()) {
            let ((_one, a), (_other, b)) = (block_of(&one), block_of(&other));
            let ones = |op: fn(u64, u64) -> u64| -> u64 {
                one.iter().zip(&other).map(|(a, b)| u64::from(op(*a, *b).count_ones())).sum()
            };
            let found = both!(compare_portable, compare_native, a, b, SHAPE);
            prop_assert_eq!(found, (ones(|a, b| a & !b), ones(|a, b| a & b), ones(|a, b| b & !a)));
            prop_assert_eq!(both!(common_portable, common_native, a, b, SHAPE), found.1);
        }

        #[test]
        fn both_builds_number_alike(pfns: Vec<u64>, order in 0..37u32) {
            let (mut one, mut two) = (pfns.clone(), pfns.clone());
            number_portable(&mut one, order);
            number(&mut two, order);
            prop_assert!(one.iter().zip(&pfns).all(|(folio, pfn)| folio.rotate_left(order) == *pfn));
            prop_assert_eq!(one, two);
        }

        #[test]
        fn both_builds_find_the_places_that_one_by_one_has(
            offsets in proptest::collection::vec(0..64u64, 0..40),
            odd in proptest::option::of((any::<proptest::sample::Index>(), prop_oneof![Just(None), any::<i16>().prop_map(Some)])),
            index in 0..1u64 << 40,
        ) {
            let (within, len, step) = (0x7f00_0000_0000u64, 64 * 4096, 4096u64);
            let rule = Rule { stride: 1 << 27, within: within as usize, len, first: 1 << 32 };
            // Where each block lies; none where its slot is empty.
            let mut blocks: Vec<_> = offsets.iter().map(|n| Some(within.wrapping_add(n * step))).collect();
            if let (Some((at, how)), false) = (odd, blocks.is_empty()) {
                *at.get_mut(&mut blocks) = how.map(|off| within.wrapping_add_signed(i64::from(off) * 4096));
            }
            let slots: Vec<*mut u8> = (index..).zip(&blocks).map(|(index, block)| {
                let slot = block.map_or(0, |addr| addr.wrapping_sub(index * step) | 1);
                core::ptr::without_provenance_mut(slot as usize)
            }).collect();
            let before = (index * step).wrapping_sub(within).wrapping_sub(1);
            let expected: Option<Vec<_>> = (index..).zip(&blocks).map(|(index, block)| {
                let offset = (*block)?.wrapping_sub(within);
                (offset < len as u64).then(|| [index.wrapping_mul(1 << 27), (1 << 32) + offset])
            }).collect();
            let (mut one, mut two) = (vec![[0; 2]; slots.len()], vec![[0; 2]; slots.len()]);
            let found = places_portable(&slots, before, step, index, rule, one[..].as_mut().into());
            prop_assert_eq!(found, expected.is_some());
            prop_assert_eq!(places(&slots, before, step, index, rule, two[..].as_mut().into()), found);
            if let Some(expected) = expected {
                prop_assert!(one == expected && two == expected);
            }
        }

        #[test]
        fn both_builds_survey_alike(list: Vec<u64>, last: u64) {
            let found = both!(survey_portable, survey_native, &list, last);
            let falls = std::iter::once(&last).chain(&list).zip(&list).filter(|(a, b)| b < a).count();
            let low = list.iter().copied().min().unwrap_or(u64::MAX);
            prop_assert_eq!(found, (low, list.iter().copied().max().unwrap_or(0), falls));
            prop_assert_eq!(survey(&list, last), found);
        }

        #[test]
        fn both_builds_know_a_run_from_others(first: u64, len in 0..70u64, odd in proptest::option::of((0..70usize, any::<u64>()))) {
            let mut list: Vec<u64> = (0..len).map(|n| first.wrapping_add(n)).collect();
            if let Some((at, other)) = odd.filter(|(at, _)| *at < list.len()) {
                list[at] = other;
            }
            let runs = both!(ascends_by_one_portable, ascends_by_one_native, &list);
            prop_assert_eq!(runs, list.iter().zip(0..).all(|(n, at)| *n == list[0].wrapping_add(at)));
            prop_assert_eq!(ascends_by_one(&list), runs);
        }
    }
}
