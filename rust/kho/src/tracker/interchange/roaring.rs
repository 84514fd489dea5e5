//! Roaring bitmaps of the folio numbers (`pfn >> order`) of one order, as every Roaring library stores them.
//!
//! Roaring format specification, <https://github.com/RoaringBitmap/RoaringFormatSpec>; all little-endian:
//!
//! ```text
//! 32 bits:  cookie | { key: u16 | cardinality - 1: u16 } ... | [offset: u32] ... | container ...
//!           cookie   12346: u32 | containers: u32                                  no run container, offsets
//!                    12347: u16 | containers - 1: u16 | a bit per container        offsets from 4 containers on
//!           container of 2^16 numbers:  sorted u16s up to 4096 of them, else a bitmap of 8 KiB, or
//!                                       runs: u16 | { first: u16 | length - 1: u16 } ...
//! 64 bits:  maps: u64 | { high half: u32 | 32-bit map } ...
//! ```

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::tracker::Tracker;
use crate::tracker::list::iter::Ones;
use crate::units::Order;

const COOKIE: u32 = 12346;
const COOKIE_RUNS: u32 = 12347;
/// Number of containers from which on offsets are written even if there are run containers.
const OFFSETS_FROM: usize = 4;
/// The most numbers a container has as an array.
const ARRAY_MAX: u32 = 4096;
/// Words in a container.
const WORDS: usize = 1024;

/// How wide the numbers of a Roaring bitmap are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RoaringBits {
    /// `BitMap`, `RoaringBitmap`.
    B32,
    /// `BitMap64`, `RoaringTreemap`.
    B64,
}

/// A container to write: numbers `key << 16 ..`.
struct Container {
    key: u64,
    cardinality: u32,
    /// How many runs they are, when that is the shortest way to say them.
    runs: Option<u32>,
}

impl Container {
    /// Nothing if there is nothing in it.
    fn new(key: u64, words: &[u64; WORDS], runs: bool) -> Option<Self> {
        let cardinality: u32 = words.iter().map(|word| word.count_ones()).sum();
        let plain = if cardinality > ARRAY_MAX { 8 * WORDS } else { 2 * cardinality as usize };
        let mut last = 0;
        let count = |word: &u64| (word & !(word << 1 | core::mem::replace(&mut last, *word) >> 63)).count_ones();
        let count = if runs { words.iter().map(count).sum() } else { u32::MAX };
        let runs = (count <= 2048 && 2 + 4 * (count as usize) < plain).then_some(count);
        (cardinality > 0).then_some(Container { key, cardinality, runs })
    }

    fn len(&self) -> usize {
        match self.runs {
            Some(runs) => 2 + 4 * runs as usize,
            None if self.cardinality > ARRAY_MAX => 8 * WORDS,
            None => 2 * self.cardinality as usize,
        }
    }

    fn write(&self, words: &[u64; WORDS], bytes: &mut Vec<u8>) {
        let numbers = || words.iter().zip((0u32..).step_by(64));
        if let Some(runs) = self.runs {
            bytes.extend((runs as u16).to_le_bytes());
            let mut open = None;
            for (&word, base) in numbers() {
                let mut at = 0;
                while at < 64 {
                    // Up to where the bits are no longer what they were: set inside a run, clear outside.
                    let rest = if open.is_some() { !word } else { word } >> at;
                    at += rest.trailing_zeros();
                    if at >= 64 {
                        break;
                    }
                    let here = base + at;
                    open = match open {
                        None => Some(here),
                        Some(first) => {
                            bytes.extend((first as u16).to_le_bytes());
                            bytes.extend(((here - 1 - first) as u16).to_le_bytes());
                            None
                        }
                    };
                }
            }
            if let Some(first) = open {
                bytes.extend((first as u16).to_le_bytes());
                bytes.extend(((0xffff - first) as u16).to_le_bytes());
            }
        } else if self.cardinality > ARRAY_MAX {
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        } else {
            let (mut array, mut n) = ([[0; 2]; ARRAY_MAX as usize], 0);
            for (&word, base) in numbers() {
                for (bit, place) in Ones(word).zip(&mut array[n..]) {
                    *place = ((u64::from(base) + bit) as u16).to_le_bytes();
                    n += 1;
                }
            }
            bytes.extend_from_slice(array[..n].as_flattened());
        }
    }
}

/// Bytes before the containers of a 32-bit map, and whether a container is runs.
fn head_len(containers: &[Container]) -> (usize, bool) {
    let n = containers.len();
    let runs = containers.iter().any(|c| c.runs.is_some());
    let offsets = if !runs || n >= OFFSETS_FROM { 4 * n } else { 0 };
    (if runs { 4 + n.div_ceil(8) } else { 8 } + 4 * n + offsets, runs)
}

fn write_head(containers: &[Container], bytes: &mut Vec<u8>) {
    let (len, runs) = head_len(containers);
    let n = containers.len();
    if runs {
        bytes.extend((COOKIE_RUNS | (n as u32 - 1) << 16).to_le_bytes());
        let flags = |eight: &[Container]| (0..).zip(eight).map(|(i, c)| u8::from(c.runs.is_some()) << i).sum::<u8>();
        bytes.extend(containers.chunks(8).map(flags));
    } else {
        bytes.extend(COOKIE.to_le_bytes());
        bytes.extend((n as u32).to_le_bytes());
    }
    for c in containers {
        bytes.extend((c.key as u16).to_le_bytes());
        bytes.extend(((c.cardinality - 1) as u16).to_le_bytes());
    }
    if !runs || n >= OFFSETS_FROM {
        let mut at = len as u32;
        for c in containers {
            bytes.extend(at.to_le_bytes());
            at += c.len() as u32;
        }
    }
}

impl Tracker {
    /// The folio numbers of an order as a Roaring bitmap; with `runs`, runs as runs where that is shorter.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if a number does not fit in the bits.
    pub fn to_roaring(&self, order: Order, bits: RoaringBits, runs: bool) -> Result<Vec<u8>> {
        let mut containers = Vec::new();
        self.each_container(order, |key, words| containers.extend(Container::new(key, words, runs)));
        let maps: Vec<&[Container]> = containers.chunk_by(|a, b| a.key >> 16 == b.key >> 16).collect();
        let body: usize = containers.iter().map(Container::len).sum();
        let heads: usize = maps.iter().map(|map| 4 + head_len(map).0).sum();
        let mut bytes = Vec::with_capacity(16 + heads + body);
        match bits {
            RoaringBits::B64 => bytes.extend((maps.len() as u64).to_le_bytes()),
            RoaringBits::B32 if maps.is_empty() => write_head(&[], &mut bytes),
            RoaringBits::B32 => {
                if containers.last().is_some_and(|c| c.key >> 16 != 0) {
                    let last = self.select(self.len_of(order) - 1, order).map_or(0, |pfn| pfn.0 >> order.get());
                    return Err(Error::OutOfRange { what: "folio number in 32 bits", value: last, limit: 1 << 32 });
                }
            }
        }
        let mut next = containers.iter();
        let mut high = None;
        let mut maps = maps.into_iter();
        self.each_container(order, |key, words| {
            // What has no bits set has no container.
            let Some(c) = next.as_slice().first().filter(|c| c.key == key) else { return };
            if high.replace(key >> 16) != Some(key >> 16) {
                if bits == RoaringBits::B64 {
                    bytes.extend(((key >> 16) as u32).to_le_bytes());
                }
                write_head(maps.next().unwrap_or_default(), &mut bytes);
            }
            c.write(words, &mut bytes);
            next.next();
        });
        Ok(bytes)
    }

    /// Calls `f` with the bits of each stretch of 2^16 folio numbers that has a block in which something is set.
    fn each_container(&self, order: Order, mut f: impl FnMut(u64, &[u64; WORDS])) {
        let (mut words, mut key) = ([0; WORDS], None);
        let per_block = self.shape.words();
        for block in self.blocks(order).filter(|block| !block.is_empty()) {
            let mut load = block.words();
            for at in (0..per_block).step_by(WORDS) {
                let first = block.index() * per_block as u64 + at as u64;
                let here = first / WORDS as u64;
                if key != Some(here) {
                    if let Some(key) = key.replace(here) {
                        f(key, &words);
                    }
                    words = [0; WORDS];
                }
                let into = &mut words[first as usize % WORDS..];
                for (into, word) in into.iter_mut().zip(load.by_ref().take(per_block)) {
                    *into = word;
                }
            }
        }
        if let Some(key) = key {
            f(key, &words);
        }
    }

    /// Marks the folios of an order whose numbers a Roaring bitmap holds. Returns how many were not marked yet.
    ///
    /// Every container takes the blocks that its numbers lie in, as [`Tracker::preserve_many`] of them would.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the bytes are not exactly one well-formed bitmap, [`Error::OutOfRange`] if a number is beyond
    /// the address space, and the source's; then nothing is marked that was not before.
    pub fn adopt_roaring(&mut self, order: Order, bits: RoaringBits, bytes: &[u8]) -> Result<u64> {
        let limit = self.geometry.folio_limit(order);
        let per_block = self.shape.words();
        read(bits, bytes, |key, words| {
            let last = words.iter().rposition(|&word| word != 0).unwrap_or(0);
            let top = (key << 16) + 64 * last as u64 + u64::from(words[last].checked_ilog2().unwrap_or(0));
            if top >= limit {
                return Err(Error::OutOfRange { what: "folio number", value: top, limit });
            }
            let first = key * WORDS as u64;
            for (n, part) in words.chunks(per_block).enumerate() {
                if part.iter().any(|&word| word != 0) {
                    self.ensure(order, (first + (n * per_block) as u64) / per_block as u64)?;
                }
            }
            Ok(())
        })?;
        let mut new = 0;
        read(bits, bytes, |key, words| {
            let first = key * WORDS as u64;
            for (n, part) in words.chunks(per_block).enumerate() {
                let at = first + (n * per_block) as u64;
                if part.iter().any(|&word| word != 0) {
                    new += self.merge_words(order, at, part);
                }
            }
            Ok(())
        })?;
        Ok(new)
    }

    /// ORs words into a block that exists, from word `first` of the order on. Returns how many bits that set.
    fn merge_words(&mut self, order: Order, first: u64, words: &[u64]) -> u64 {
        let shape = self.shape;
        let dir = &mut self.dirs[order.index()];
        let Some(block) = dir.get(first / shape.words() as u64) else {
            return 0;
        };
        let mut flips = 0;
        for (n, &new) in words.iter().enumerate() {
            let at = first as usize + n;
            let old = block.load(shape, at);
            block.store(shape, at, old | new);
            flips += u64::from((new & !old).count_ones());
        }
        dir.len += flips;
        flips
    }
}

/// Calls `f` with every container of a bitmap, ascending.
fn read(bits: RoaringBits, bytes: &[u8], mut f: impl FnMut(u64, &[u64; WORDS]) -> Result<()>) -> Result<()> {
    let mut input = Input { bytes, at: 0, start: 0 };
    match bits {
        RoaringBits::B32 => read_map(&mut input, 0, &mut f)?,
        RoaringBits::B64 => {
            let maps = u64::from_le_bytes(input.take()?);
            let mut last = None;
            for _ in 0..maps {
                let high = u32::from_le_bytes(input.take()?);
                if last.replace(high) >= Some(high) {
                    return Err(input.invalid("high halves are not ascending"));
                }
                read_map(&mut input, u64::from(high) << 16, &mut f)?;
            }
        }
    }
    if input.at < bytes.len() {
        return Err(input.invalid("bytes follow the bitmap"));
    }
    Ok(())
}

/// Reads one 32-bit map.
fn read_map(input: &mut Input<'_>, high: u64, f: &mut impl FnMut(u64, &[u64; WORDS]) -> Result<()>) -> Result<()> {
    input.start = input.at;
    let cookie = u32::from_le_bytes(input.take()?);
    let (n, flags): (usize, &[u8]) = match cookie {
        COOKIE => (u32::from_le_bytes(input.take()?) as usize, &[]),
        _ if cookie & 0xffff == COOKIE_RUNS => {
            let n = (cookie >> 16) as usize + 1;
            (n, input.slice(n.div_ceil(8))?)
        }
        _ => return Err(input.invalid(&format!("{cookie:#x} is no cookie of a Roaring bitmap"))),
    };
    if n > 1 << 16 {
        return Err(input.invalid(&format!("{n} containers are more than 65536")));
    }
    let (heads, _) = input.slice(4 * n)?.as_chunks::<4>();
    let offsets = if flags.is_empty() || n >= OFFSETS_FROM { input.slice(4 * n)?.as_chunks::<4>().0 } else { &[] };
    let mut last = None;
    for (i, &[k0, k1, c0, c1]) in heads.iter().enumerate() {
        let (key, cardinality) = (u16::from_le_bytes([k0, k1]), u32::from(u16::from_le_bytes([c0, c1])) + 1);
        if last.replace(key) >= Some(key) {
            return Err(input.invalid("containers are not ascending"));
        }
        if offsets.get(i).is_some_and(|&offset| u32::from_le_bytes(offset) as usize != input.at - input.start) {
            return Err(input.invalid("a container is not where its offset says"));
        }
        let runs = flags.get(i / 8).is_some_and(|flags| flags >> (i % 8) & 1 != 0);
        f(high | u64::from(key), &read_container(input, cardinality, runs)?)?;
    }
    Ok(())
}

fn read_container(input: &mut Input<'_>, cardinality: u32, runs: bool) -> Result<[u64; WORDS]> {
    let mut words = [0u64; WORDS];
    if runs {
        let n = u16::from_le_bytes(input.take()?);
        let (pairs, _) = input.slice(4 * usize::from(n))?.as_chunks::<4>();
        let (mut next, mut marked) = (0, 0);
        for &[f0, f1, l0, l1] in pairs {
            let first = u32::from(u16::from_le_bytes([f0, f1]));
            let end = first + u32::from(u16::from_le_bytes([l0, l1])) + 1;
            if first < next || end > 1 << 16 {
                return Err(input.invalid("runs overlap, are not ascending, or leave their container"));
            }
            let mut at = first;
            while at < end {
                let stop = end.min((at | 63) + 1);
                words[(at >> 6) as usize] |= !0 >> (64 - (stop - at)) << (at & 63);
                at = stop;
            }
            marked += end - first;
            next = end;
        }
        if marked != cardinality {
            return Err(input.invalid(&format!("runs of {marked} numbers in a container of {cardinality}")));
        }
    } else if cardinality > ARRAY_MAX {
        let (from, _) = input.slice(8 * WORDS)?.as_chunks::<8>();
        for (word, &bytes) in words.iter_mut().zip(from) {
            *word = u64::from_le_bytes(bytes);
        }
        let marked: u32 = words.iter().map(|word| word.count_ones()).sum();
        if marked != cardinality {
            return Err(input.invalid(&format!("{marked} bits in a container of {cardinality} numbers")));
        }
    } else {
        let (numbers, _) = input.slice(2 * cardinality as usize)?.as_chunks::<2>();
        let mut last = None;
        for &number in numbers {
            let number = u16::from_le_bytes(number);
            if last.replace(number) >= Some(number) {
                return Err(input.invalid("numbers are not ascending"));
            }
            words[usize::from(number >> 6)] |= 1 << (number & 63);
        }
    }
    Ok(words)
}

/// Bytes to read, how far they are read, and where the map that is being read begins: offsets count from there.
struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
    start: usize,
}

impl<'a> Input<'a> {
    fn slice(&mut self, n: usize) -> Result<&'a [u8]> {
        let slice = self.bytes[self.at..].get(..n).ok_or_else(|| self.invalid("cut short"))?;
        self.at += n;
        Ok(slice)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let chunk = self.bytes[self.at..].first_chunk().copied().ok_or_else(|| self.invalid("cut short"))?;
        self.at += N;
        Ok(chunk)
    }

    fn invalid(&self, why: &str) -> Error {
        Error::Invalid { what: "Roaring bitmap", why: format!("{why}, at byte {}", self.at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::Geometry;
    use crate::tracker::tests::{contents, geometries, order, trackers};
    use crate::units::{PageSize, Pfn};
    use ::roaring::{RoaringBitmap, RoaringTreemap};
    use RoaringBits::{B32, B64};
    use proptest::prelude::*;
    use proptest::sample::Index;

    fn numbers(t: &Tracker, order: Order) -> Vec<u64> {
        t.pfns(order).into_iter().map(|pfn| pfn >> order.get()).collect()
    }

    fn adopted(g: Geometry, order: Order, bits: RoaringBits, bytes: &[u8]) -> Result<Tracker> {
        let mut t = Tracker::new(g);
        t.adopt_roaring(order, bits, bytes).map(|_| t)
    }

    /// Every kind of container: an array, a bitmap, runs, a full one, and a number that needs 64 bits.
    fn sample() -> Tracker {
        let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
        t.preserve_many(
            (0..40_000).step_by(7).map(|n| 65_536 + n).collect::<Vec<u64>>().as_slice(),
            crate::tracker::Orders::One(Order::ZERO),
        )
        .unwrap();
        t.preserve_run(Pfn(3), Order::ZERO, 9).unwrap();
        t.preserve_run(Pfn(200_000), Order::ZERO, 200_000).unwrap();
        for pfn in [1, 63, 64, 65_535, 1_000_000, (1 << 32) - 1] {
            t.preserve(Pfn(pfn), Order::ZERO).unwrap();
        }
        t
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_written_is_read_by_others_and_what_they_write_is_read((t, _) in trackers(), runs: bool, o in prop::sample::select(vec![0u32, 1, 9, 18, 36])) {
            let o = order(o);
            let (want, g) = (numbers(&t, o), t.geometry());
            let bytes = t.to_roaring(o, B64, runs).unwrap();
            let map = RoaringTreemap::deserialize_from(&bytes[..]).unwrap();
            prop_assert!(map.iter().eq(want.iter().copied()));
            let mut theirs = vec![];
            map.serialize_into(&mut theirs).unwrap();
            for bytes in [&bytes, &theirs] {
                let back = adopted(g, o, B64, bytes).unwrap();
                prop_assert_eq!(numbers(&back, o), want.clone());
                prop_assert_eq!(back.len(), back.len_of(o));
            }
            let narrow = t.to_roaring(o, B32, runs);
            if want.last().is_some_and(|&last| last >= 1 << 32) {
                let is_so = matches!(narrow, Err(Error::OutOfRange { value, .. }) if Some(&value) == want.last());
                prop_assert!(is_so);
            } else {
                let bytes = narrow.unwrap();
                let map = RoaringBitmap::deserialize_from(&bytes[..]).unwrap();
                prop_assert!(map.iter().map(u64::from).eq(want.iter().copied()));
                let mut theirs = vec![];
                map.serialize_into(&mut theirs).unwrap();
                for bytes in [&bytes, &theirs] {
                    prop_assert_eq!(numbers(&adopted(g, o, B32, bytes).unwrap(), o), want.clone());
                }
            }
        }

        #[test]
        fn a_bitmap_of_others_is_adopted_whatever_the_block_size(g in geometries(), ranges in prop::collection::vec((0u32..300_000, 0u32..70_000, 1usize..5), 0..6), before: bool, optimize: bool) {
            let mut map = RoaringBitmap::new();
            for (from, n, step) in ranges {
                map.extend((from..from + n).step_by(step));
            }
            if optimize {
                map.optimize();
            }
            let mut bytes = vec![];
            map.serialize_into(&mut bytes).unwrap();
            let mut t = Tracker::new(g);
            if before {
                t.preserve_run(Pfn(1000), Order::ZERO, 66_000).unwrap();
            }
            let there = map.range_cardinality(1000..67_000);
            prop_assert_eq!(t.adopt_roaring(Order::ZERO, B32, &bytes).unwrap(), map.len() - if before { there } else { 0 });
            if before {
                map.insert_range(1000..67_000);
            }
            prop_assert!(numbers(&t, Order::ZERO).into_iter().eq(map.iter().map(u64::from)));
            // Runs are chosen where the other library chooses them, so the sizes agree too.
            map.optimize();
            prop_assert_eq!(t.to_roaring(Order::ZERO, B32, true).unwrap().len(), map.serialized_size());
            map.remove_run_compression();
            prop_assert_eq!(t.to_roaring(Order::ZERO, B32, false).unwrap().len(), map.serialized_size());
        }

        #[test]
        fn hostile_bytes_are_refused_or_read_as_one_bitmap(at in any::<Index>(), value: u8, garbage: Vec<u8>, runs: bool) {
            for bits in [B32, B64] {
                let mut bytes = sample().to_roaring(Order::ZERO, bits, runs).unwrap();
                let at = at.index(bytes.len());
                bytes[at] = value;
                if let Ok(t) = adopted(sample().geometry(), Order::ZERO, bits, &bytes) {
                    prop_assert_eq!(t.to_roaring(Order::ZERO, bits, runs).unwrap().len(), bytes.len());
                }
                let _ = adopted(sample().geometry(), Order::ZERO, bits, &garbage);
                let _ = adopted(sample().geometry(), Order::ZERO, bits, &[&12346u32.to_le_bytes()[..], &garbage].concat());
                let _ = adopted(sample().geometry(), Order::ZERO, bits, &[&12347u32.to_le_bytes()[..], &garbage].concat());
            }
        }
    }

    #[test]
    fn no_prefix_and_no_longer_text_is_a_bitmap() {
        for bits in [B32, B64] {
            let bytes = sample().to_roaring(Order::ZERO, bits, true).unwrap();
            assert_eq!(adopted(sample().geometry(), Order::ZERO, bits, &bytes).unwrap(), sample());
            for n in 0..bytes.len() {
                assert!(adopted(sample().geometry(), Order::ZERO, bits, &bytes[..n]).is_err(), "{n}");
            }
            assert!(adopted(sample().geometry(), Order::ZERO, bits, &[&bytes[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn nothing_is_marked_by_a_bitmap_that_reaches_beyond_the_address_space() {
        let mut t = Tracker::new(Geometry::paged(PageSize::Size64K));
        t.preserve(Pfn(0), order(36)).unwrap();
        let numbers = |last: u64| {
            let mut bytes = vec![];
            RoaringTreemap::from_iter([1, last]).serialize_into(&mut bytes).unwrap();
            bytes
        };
        assert!(matches!(t.adopt_roaring(order(36), B64, &numbers(1 << 12)), Err(Error::OutOfRange { .. })));
        assert!(matches!(t.adopt_roaring(order(36), B64, &numbers(u64::MAX)), Err(Error::OutOfRange { .. })));
        assert_eq!(contents(&t).len(), 1);
        assert_eq!(t.adopt_roaring(order(36), B64, &numbers((1 << 12) - 1)).unwrap(), 2);
    }

    #[test]
    fn an_empty_bitmap_is_empty_in_both_widths() {
        let t = Tracker::new(Geometry::paged(PageSize::Size4K));
        assert_eq!(t.to_roaring(Order::ZERO, B64, true).unwrap(), [0; 8]);
        assert_eq!(t.to_roaring(Order::ZERO, B32, true).unwrap(), [0x3a, 0x30, 0, 0, 0, 0, 0, 0]);
    }
}
