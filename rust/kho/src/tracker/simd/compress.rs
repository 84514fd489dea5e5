//! Listing with AVX-512: the numbers 0 to 63 as bytes of one vector, compressed by the word whose bits are listed.
//!
//! ```text
//!   word   ...0010 1001        bytes  63 ... 5 4 3 2 1 0   --compress-->   5 3 0   --widen, add, shift-->  3 items
//! ```

use super::super::block::{Block, Shape};
use super::super::iter::Folio;
use super::{Room, WORD, list};
use core::arch::x86_64::*;
use core::mem::{MaybeUninit, transmute};

/// Numbers in a vector.
const LANES: usize = 8;

/// Whether this processor has what the functions here are compiled for.
#[inline]
pub(super) fn is_there() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512vbmi2") && has!("popcnt") && has!("bmi1")
}

/// [`super::list_numbers`].
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt,bmi1")]
pub(super) fn list_numbers(block: Block, shape: Shape, first: u64, shift: u32, into: &mut [MaybeUninit<u64>]) -> usize {
    let items = Items::new(first, shift);
    list(block, shape, into, |word, base, room: &mut Room<u64>| {
        items.of(word, base, room, |numbers, room: &mut [MaybeUninit<u64>; LANES]| {
            // SAFETY: a vector is eight numbers, and any number is a number.
            *room = unsafe { transmute::<__m512i, [MaybeUninit<u64>; LANES]>(numbers) };
        });
    })
}

/// [`super::list_folios`].
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt,bmi1")]
pub(super) fn list_folios(
    block: Block,
    shape: Shape,
    first: u64,
    shift: u32,
    like: Folio,
    into: &mut [MaybeUninit<Folio>],
) -> usize {
    let items = Items::new(first, shift);
    // Of each record the address, and the rest, which is that of `like`.
    let [_, rest] = zerocopy::transmute!(like);
    let rest = _mm512_set1_epi64(rest);
    let (low, high) = (_mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15));
    list(block, shape, into, |word, base, room: &mut Room<Folio>| {
        items.of(word, base, room, |phys, room: &mut [MaybeUninit<Folio>; LANES]| {
            let records = [low, high].map(|half| _mm512_permutex2var_epi64(phys, half, rest));
            // SAFETY: two vectors are eight records: an address each, and what follows it in `like`.
            *room = unsafe { transmute::<[__m512i; 2], [MaybeUninit<Folio>; LANES]>(records) };
        });
    })
}

/// How bits become numbers.
#[derive(Clone, Copy)]
struct Items {
    /// What the block's bit 0 stands for, and what every number is shifted by.
    first: u64,
    shift: __m128i,
    /// 0 to 63, as bytes.
    bits: __m512i,
}

impl Items {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(first: u64, shift: u32) -> Self {
        let bits: [u8; WORD] = core::array::from_fn(|bit| bit as u8);
        // SAFETY: a vector is as many bytes.
        Items { first, shift: _mm_cvtsi32_si128(shift as i32), bits: unsafe { transmute::<[u8; WORD], __m512i>(bits) } }
    }

    /// Calls `write` with the numbers of a word's bits, eight at a time, and with the room for their items; at least once, and
    /// with what is nobody's number behind the last.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt,bmi1")]
    #[inline]
    fn of<T>(
        self,
        word: u64,
        base: u64,
        room: &mut Room<T>,
        mut write: impl FnMut(__m512i, &mut [MaybeUninit<T>; LANES]),
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
