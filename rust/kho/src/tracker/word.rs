//! One word of a block: where a folio's bit is set, cleared, and counted.
//!
//! A random bit waits for memory, and with it whatever needs its word. How many such words are under way at once depends on
//! how little that is. x86_64 has an instruction that sets a bit and says what it was, and one that counts what was said;
//! compilers know no way to have both, so that there are some lines of assembly here, and their portable twins.

#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One word of a block.
#[derive(Clone, Copy)]
pub(super) struct Word {
    /// [`TAKEN`] bytes after word 0, wherever that would be.
    start: *mut u8,
    n: u64,
}

/// A change of a bit that is counted where it was one, in a u64 that is `AT` bytes into `counts`.
macro_rules! counted {
    ($(#[$doc:meta])* $name:ident = $change:ident as $portable:tt, $instruction:literal then $count:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// There is a u64.
        #[inline(always)]
        pub(super) unsafe fn $name<T, const AT: usize>(self, folio: u64, counts: &mut T) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the word is valid for reads and writes, as in `load` and `store`; the two `mov` are the relaxed
            // atomic ones; the caller guarantees that the u64 at `AT` is the tracker's own. No other memory is touched.
            unsafe {
                core::arch::asm!(
                    "mov {word}, [{start} + 8 * {n} - {taken}]",
                    concat!($instruction, " {word}, {folio}"),
                    "mov [{start} + 8 * {n} - {taken}], {word}",
                    concat!("sbb qword ptr [{counts} + {at}], ", $count),
                    word = out(reg) _,
                    start = in(reg) self.start,
                    n = in(reg) self.n,
                    taken = const TAKEN,
                    folio = in(reg) folio,
                    counts = in(reg) &raw mut *counts,
                    at = const AT,
                    options(nostack)
                );
            }
            #[cfg(not(target_arch = "x86_64"))]
            // SAFETY: the caller guarantees that there is a u64 at `AT` in `counts`, which is borrowed for writing.
            unsafe {
                *(&raw mut *counts).byte_add(AT).cast::<u64>() $portable u64::from(self.$change(folio));
            }
        }
    };
}

/// Added to where words are, so that this is never null.
pub(super) const TAKEN: usize = 1;

impl Word {
    /// Word `n` of those that begin [`TAKEN`] before `start`.
    ///
    /// # Safety
    /// That is a word of a block, whatever lies at `start`.
    #[inline(always)]
    pub(super) unsafe fn at(start: *mut u8, n: u64) -> Self {
        Word { start, n }
    }

    #[inline(always)]
    fn ptr(self) -> *mut u64 {
        self.start.wrapping_sub(TAKEN).cast::<u64>().wrapping_add(self.n as usize)
    }

    counted! {
        /// As [`Word::set`]; one more is counted if the bit was clear: the carry that `bts` leaves is the bit as it was, and
        /// `count + 1 - carry` is what is wanted.
        set_counted = set as +=, "bts" then "-1"
    }

    counted! {
        /// As [`Word::clear`]; one less is counted if the bit was set: `count - carry`.
        clear_counted = clear as -=, "btr" then "0"
    }

    /// Prefetches the word into L1.
    #[inline(always)]
    pub(super) fn prefetch(self) {
        #[cfg(target_arch = "x86_64")]
        {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: SSE is in every x86_64 processor, and a prefetch of any address, mapped or not, has no effect but on caches.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.ptr().cast()) }
        }
    }

    /// Sets the bit of a folio. True if it was clear. For the tracker that owns the block alone, as all that writes.
    #[inline(always)]
    pub(super) fn set(self, folio: u64) -> bool {
        let old = self.load();
        // Stored unconditionally: a mispredicted branch would wait for the cache miss and stall the loads after it.
        self.store(old | bit_of(folio));
        old & bit_of(folio) == 0
    }

    /// Clears the bit of a folio. True if it was set.
    #[inline(always)]
    pub(super) fn clear(self, folio: u64) -> bool {
        let (old, bit) = (self.load(), bit_of(folio));
        self.store(old & !bit);
        old & bit != 0
    }

    #[inline(always)]
    pub(super) fn test(self, folio: u64) -> bool {
        self.load() & bit_of(folio) != 0
    }

    #[inline(always)]
    fn load(self) -> u64 {
        // SAFETY: `at` was given a word of a block, which its source keeps valid and 8-aligned as long as the tracker lives.
        // Another process may write it at the same time: a relaxed atomic load yields one of the values it has had.
        unsafe { AtomicU64::from_ptr(self.ptr()) }.load(Relaxed)
    }

    #[inline(always)]
    fn store(self, value: u64) {
        // SAFETY: as in `load`. Only the owner's `&mut` methods come here, so that no other thread of this process stores.
        unsafe { AtomicU64::from_ptr(self.ptr()) }.store(value, Relaxed);
    }
}

/// A folio's bit in its word.
#[inline(always)]
const fn bit_of(folio: u64) -> u64 {
    1u64.wrapping_shl(folio as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_counted_is_what_changes(old: u64, folio: u64, count in 1..u64::MAX) {
            let (mut one, mut two, mut counts) = (old, old, [7, count, 9]);
            // SAFETY: `one` and `two` are borrowed for writing, and each is word 0 of itself.
            let [mine, portable] = [&raw mut one, &raw mut two]
                .map(|at| unsafe { Word::at(at.cast::<u8>().wrapping_add(TAKEN), 0) });
            for _ in 0..2 {
                let expected = counts[1] + u64::from(portable.set(folio));
                // SAFETY: `counts` is three u64; the second is 8 bytes after the first.
                unsafe { mine.set_counted::<_, 8>(folio, &mut counts) };
                prop_assert_eq!((counts, mine.load()), ([7, expected, 9], portable.load()));
                prop_assert!(mine.test(folio) && mine.load() == old | 1 << (folio % 64));
            }
            for _ in 0..2 {
                let expected = counts[1] - u64::from(portable.clear(folio));
                // SAFETY: as above.
                unsafe { mine.clear_counted::<_, 8>(folio, &mut counts) };
                prop_assert_eq!((counts, mine.load()), ([7, expected, 9], portable.load()));
                prop_assert!(!mine.test(folio) && mine.load() == old & !(1 << (folio % 64)));
            }
        }
    }
}
