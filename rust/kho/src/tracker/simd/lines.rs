//! Lists the bits of a block a cache line at a time.

#![allow(unsafe_code)]

use crate::tracker::block::{Access, Block, LINE, Private, Shape, Shared};
use core::mem::MaybeUninit;

/// The words of a line.
pub(super) type Line = [u64; LINE];
/// What a word of bits can come to.
pub(super) const WORD: usize = 64;
/// Items that the words of a line can come to.
pub(super) const ROOM: usize = LINE * WORD;
/// Items written without checking how many there are.
const BOLD: usize = 4;

/// The room for what a line can come to, and for what a word can.
pub(super) type Room<T> = [MaybeUninit<T>; ROOM];
pub(super) type WordRoom<T> = [MaybeUninit<T>; WORD];

/// How the items of a line are written. Not a closure: it must become a part of what calls it, with that one's extensions.
pub(super) trait Lines<T> {
    /// Writes the items of a line, which is not empty, at the beginning of its room, and anything after them.
    /// `base` is the number of the line's bit 0 in the block. Returns how many there are.
    fn line(&self, words: Line, base: u64, room: &mut Room<T>) -> usize;
}

/// Lists a block. Returns how many items there are: all, or as many as fit.
#[inline(always)]
pub(super) fn list<T: Copy>(block: Block, shape: Shape, into: &mut [MaybeUninit<T>], lines: &impl Lines<T>) -> usize {
    // SAFETY: the way to read is the one that the shape says.
    unsafe {
        match shape.shared {
            true => list_by::<Shared, T>(block, shape, into, lines),
            false => list_by::<Private, T>(block, shape, into, lines),
        }
    }
}

/// # Safety
/// `A` is [`Shared`] if the shape says so.
#[inline(always)]
unsafe fn list_by<A: Access, T: Copy>(
    block: Block,
    shape: Shape,
    into: &mut [MaybeUninit<T>],
    lines: &impl Lines<T>,
) -> usize {
    let mut at = 0;
    // SAFETY: the caller chose `A`.
    for (line, words) in unsafe { block.lines::<A>(shape) }.enumerate() {
        if words.iter().fold(0, |any, word| any | word) == 0 {
            continue;
        }
        let rest = &mut into[at..];
        let mut last = [MaybeUninit::uninit(); ROOM];
        let room = rest.first_chunk_mut().unwrap_or(&mut last);
        let fit = lines.line(words, (line * ROOM) as u64, room).min(rest.len());
        if rest.len() < ROOM {
            rest[..fit].copy_from_slice(&last[..fit]);
        }
        at += fit;
    }
    at
}

/// Bit by bit, each as an item.
pub(super) struct ByBits<F>(pub(super) F);

impl<T: Copy, F: Fn(u64) -> T> Lines<T> for ByBits<F> {
    #[inline(always)]
    fn line(&self, words: Line, base: u64, room: &mut Room<T>) -> usize {
        let item = |bit| self.0(base + bit);
        // Where most words are empty it pays to ask; where most are not, to be wrong about it now and then does not.
        if words.iter().map(|word| word.count_ones()).sum::<u32>() < LINE as u32 {
            each_word(words, room, |word, base, room| {
                if word != 0 {
                    list_word(word, room, |bit| item(base + bit));
                }
            })
        } else {
            each_word(words, room, |word, base, room| list_word(word, room, |bit| item(base + bit)))
        }
    }
}

/// Calls `write` for each word with the number of its bit 0 in the line and the room for its items, in which it may write
/// beyond them. Returns how many there are in all.
#[inline(always)]
pub(super) fn each_word<T: Copy>(
    words: Line,
    room: &mut Room<T>,
    mut write: impl FnMut(u64, u64, &mut WordRoom<T>),
) -> usize {
    let start = room.as_mut_ptr();
    let (mut at, mut base) = (start, 0);
    for word in words {
        // SAFETY: a line has `LINE` words, and `at` has advanced by at most `WORD` items for each of those before, so that
        // the room of `LINE * WORD` items has `WORD` left; `room` is borrowed for writing.
        write(word, base, unsafe { &mut *at.cast::<WordRoom<T>>() });
        // What is written beyond the last bit is written over next time.
        at = at.wrapping_add(word.count_ones() as usize);
        base += WORD as u64;
    }
    (at.addr() - start.addr()) / size_of::<T>()
}

/// The items of a word.
#[inline(always)]
fn list_word<T: Copy>(mut word: u64, room: &mut WordRoom<T>, item: impl Fn(u64) -> T) {
    let full = word == u64::MAX;
    let mut write = |places: &mut [MaybeUninit<T>]| {
        for place in places {
            place.write(item(u64::from(word.trailing_zeros())));
            word &= word.wrapping_sub(1);
        }
        word != 0
    };
    let (first, rest) = room.split_at_mut(BOLD);
    if !write(first) {
        return;
    }
    if full {
        for (bit, place) in (BOLD as u64..).zip(rest) {
            place.write(item(bit));
        }
    } else {
        let _ = rest.chunks_exact_mut(BOLD).all(write);
    }
}
