//! What pays to be compiled for newer processors too: each function here is one piece of portable code, built twice,
//! once for any processor and once for those with population count, bit manipulation and 256-bit vectors. Which one
//! runs is decided when it is called.

use super::block::{Block, Shape};
use super::iter::Folio;
use core::mem::MaybeUninit;

/// Compiles a function for this processor's extensions as well, and chooses at run time.
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
                // SAFETY: the processor has what the function was compiled for.
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
    has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("popcnt")
}

dispatch! {
    /// Bits set in a block.
    pub(super) fn count(block: Block, shape: Shape) -> u64 = count_portable / count_native {
        block.words(shape).map(|word| u64::from(word.count_ones())).sum()
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
    /// The folios of a block, as `first + bit << shift`, at the beginning of `into`. Returns how many were written: all
    /// there are, or as many as fit.
    pub(super) fn list_numbers(
        block: Block, shape: Shape, first: u64, shift: u32, into: &mut [MaybeUninit<u64>]
    ) -> usize = list_numbers_portable / list_numbers_native {
        list(block, shape, into, |bit| (first + bit) << shift)
    }
}

dispatch! {
    /// As [`list_numbers`], with the rest of the record that `like` is.
    pub(super) fn list_folios(
        block: Block, shape: Shape, first: u64, shift: u32, like: Folio, into: &mut [MaybeUninit<Folio>]
    ) -> usize = list_folios_portable / list_folios_native {
        list(block, shape, into, |bit| Folio { phys: (first + bit) << shift, ..like })
    }
}

/// What a word of bits can come to.
const WORD: usize = 64;
/// Items written without asking how many there are.
const BOLD: usize = 4;

#[inline(always)]
fn list<T: Copy>(block: Block, shape: Shape, into: &mut [MaybeUninit<T>], item: impl Fn(u64) -> T) -> usize {
    let mut at = 0;
    for (n, mut word) in block.words(shape).enumerate() {
        let (base, ones) = ((n * WORD) as u64, word.count_ones() as usize);
        if let Some(room) = into.get_mut(at..at + WORD).and_then(|room| room.first_chunk_mut::<WORD>()) {
            if word == u64::MAX {
                for (bit, place) in (0..).zip(room.iter_mut()) {
                    place.write(item(base + bit));
                }
            } else {
                // What is written beyond the last bit is written over next time.
                for places in room.chunks_exact_mut(BOLD).take(ones.div_ceil(BOLD)) {
                    for place in places {
                        place.write(item(base + u64::from(word.trailing_zeros())));
                        word &= word.wrapping_sub(1);
                    }
                }
            }
        } else {
            for place in into.get_mut(at..).into_iter().flatten().take(ones) {
                place.write(item(base + u64::from(word.trailing_zeros())));
                word &= word.wrapping_sub(1);
            }
        }
        at = (at + ones).min(into.len());
    }
    at
}
