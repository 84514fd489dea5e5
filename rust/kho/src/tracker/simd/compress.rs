//! Listing with AVX-512: the numbers 0 to 63 as bytes of one vector, compressed by the word whose bits are listed.
//!
//! ```text
//!   word   ...0010 1001        bytes  63 ... 5 4 3 2 1 0   --compress-->   5 3 0   --widen, add, shift-->  3 items
//! ```
//! A line that has no two bits in one word is one vector of items, compressed by which words have one.

#![allow(unsafe_code)]

use super::super::block::{Block, LINE, Shape};
use super::super::folio::Folio;
use super::lines::{Line, Lines, Room, WORD, WordRoom, each_word, list};
use crate::tuning::{Tuning, tuning};
use core::arch::x86_64::*;
use core::mem::{MaybeUninit, transmute};

/// Numbers in a vector.
const LANES: usize = 8;
const _: () = assert!(LANES == LINE);

/// Whether this processor has what the functions here are compiled for.
#[inline]
pub(super) fn is_there() -> bool {
    use std::arch::is_x86_feature_detected as has;
    let Tuning { portable, without_compress, .. } = tuning();
    !(portable || without_compress)
        && has!("avx512f")
        && has!("avx512bw")
        && has!("avx512cd")
        && has!("avx512vbmi2")
        && has!("popcnt")
        && has!("bmi1")
}

/// [`super::list_numbers`].
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512vbmi2,popcnt,bmi1")]
pub(super) fn list_numbers(block: Block, shape: Shape, first: u64, shift: u32, into: &mut [MaybeUninit<u64>]) -> usize {
    let write = |numbers, room: &mut [MaybeUninit<u64>; LANES]| {
        // SAFETY: both types have 64 bytes, and all bytes of a vector are initialized.
        *room = unsafe { transmute::<__m512i, [MaybeUninit<u64>; LANES]>(numbers) };
    };
    list(block, shape, into, &Compressed { numbers: Numbers::new(first, shift), write })
}

/// [`super::list_folios`].
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512vbmi2,popcnt,bmi1")]
pub(super) fn list_folios(
    block: Block,
    shape: Shape,
    first: u64,
    shift: u32,
    like: Folio,
    into: &mut [MaybeUninit<Folio>],
) -> usize {
    // Of each record the address, and the rest, which is that of `like`.
    let [_, rest] = zerocopy::transmute!(like);
    let rest = _mm512_set1_epi64(rest);
    let (low, high) = (_mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15));
    let write = |phys, room: &mut [MaybeUninit<Folio>; LANES]| {
        let records = [low, high].map(|half| _mm512_permutex2var_epi64(phys, half, rest));
        // SAFETY: both types have 128 bytes. Each record is an address and the second half of `like`: a valid `Folio`, all of
        // whose bytes are initialized.
        *room = unsafe { transmute::<[__m512i; 2], [MaybeUninit<Folio>; LANES]>(records) };
    };
    list(block, shape, into, &Compressed { numbers: Numbers::new(first, shift), write })
}

/// Eight items at a time: `write` is given their numbers and the room.
struct Compressed<W> {
    numbers: Numbers,
    write: W,
}

impl<T: Copy, W: Fn(__m512i, &mut [MaybeUninit<T>; LANES])> Lines<T> for Compressed<W> {
    #[inline(always)]
    fn line(&self, words: Line, base: u64, room: &mut Room<T>) -> usize {
        // SAFETY: `Numbers` are made by functions with the same target features alone, which run after `is_there`.
        unsafe { self.numbers.of_line(words, base, room, &self.write) }
    }
}

/// How bits become numbers.
#[derive(Clone, Copy)]
struct Numbers {
    /// What the block's bit 0 stands for, and what every number is shifted by.
    first: u64,
    shift: __m128i,
    /// 0 to 63, as bytes.
    bits: __m512i,
}

impl Numbers {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(first: u64, shift: u32) -> Self {
        let bits: [u8; WORD] = core::array::from_fn(|bit| bit as u8);
        // SAFETY: both types have 64 bytes, and any bits are a vector.
        let bits = unsafe { transmute::<[u8; WORD], __m512i>(bits) };
        Numbers { first, shift: _mm_cvtsi32_si128(shift as i32), bits }
    }

    /// Calls `write` with the numbers of a line's bits, eight at a time, and with the room for their items; with what is
    /// no number after the last. Returns how many bits there are.
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512vbmi2,popcnt,bmi1")]
    #[inline]
    fn of_line<T: Copy>(
        self,
        words: Line,
        base: u64,
        room: &mut Room<T>,
        write: &impl Fn(__m512i, &mut [MaybeUninit<T>; LANES]),
    ) -> usize {
        // SAFETY: both types have 64 bytes, and any bits are a vector.
        let line = unsafe { transmute::<Line, __m512i>(words) };
        let one = _mm512_set1_epi64(1);
        let further = _mm512_and_si512(line, _mm512_sub_epi64(line, one));
        if _mm512_test_epi64_mask(further, further) != 0 {
            return each_word(words, room, |word, at, room| self.of_word(word, base + at, room, write));
        }
        let there = _mm512_test_epi64_mask(line, line);
        let bits = _mm512_sub_epi64(_mm512_set1_epi64(WORD as i64 - 1), _mm512_lzcnt_epi64(line));
        let starts = _mm512_setr_epi64(0, 64, 128, 192, 256, 320, 384, 448);
        let numbers = _mm512_add_epi64(_mm512_add_epi64(bits, starts), _mm512_set1_epi64((self.first + base) as i64));
        let numbers = _mm512_maskz_compress_epi64(there, numbers);
        let (rooms, _) = room.as_chunks_mut::<LANES>();
        write(_mm512_sll_epi64(numbers, self.shift), &mut rooms[0]);
        there.count_ones() as usize
    }

    /// The same for a word; `write` is called at least once.
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512vbmi2,popcnt,bmi1")]
    #[inline]
    fn of_word<T>(
        self,
        word: u64,
        base: u64,
        room: &mut WordRoom<T>,
        write: &impl Fn(__m512i, &mut [MaybeUninit<T>; LANES]),
    ) {
        let base = _mm512_set1_epi64((self.first + base) as i64);
        let mut bits = _mm512_maskz_compress_epi8(word, self.bits);
        let mut left = word.count_ones() as usize;
        let (rooms, _) = room.as_chunks_mut::<LANES>();
        for room in rooms {
            let numbers = _mm512_add_epi64(_mm512_cvtepu8_epi64(_mm512_castsi512_si128(bits)), base);
            write(_mm512_sll_epi64(numbers, self.shift), room);
            if left <= LANES {
                break;
            }
            left -= LANES;
            bits = _mm512_alignr_epi64::<1>(bits, bits);
        }
    }
}
