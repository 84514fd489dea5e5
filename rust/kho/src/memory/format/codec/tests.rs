//! What the libraries themselves packed (liblzo2 2.10, zstd), and anything else.

#![forbid(unsafe_code)]

use super::*;
use proptest::prelude::*;

const TEXT: &[u8] = b"The quick brown fox jumps over the lazy dog. 7 ";
const PACKED: [(Codec, &str); 4] = [
    (
        Codec::Lzo,
        "002254686520717569636b2062726f776e20666f78206a756d7073206f76657220746865206c617a7920646f672e20372054\
         6865207120000000000000000000000000000000aab8000d7920646f672e20372054686520717569110000",
    ),
    (
        Codec::Lzo,
        "3154686520717569636b2062726f776e20666f78206a756d7073206f76657220745803096c617a7920646f672e2037202000\
         000000000000e6b8002000000000000000b7b800110000",
    ),
    (
        Codec::Zstd,
        "28b52ffd0058c50100f40254686520717569636b2062726f776e20666f78206a756d7073206f76657220746865206c617a79\
         20646f672e203720010077bef45519",
    ),
    (Codec::Zstd, "28b52ffd00584d00001000000100fbf70116"),
];

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

fn page(codec: Codec, packed: &[u8], len: usize) -> Result<Vec<u8>, String> {
    let mut page = vec![0xee; len];
    codec.unpack(packed, &mut page).map(|()| page)
}

fn text() -> Vec<u8> {
    TEXT.iter().copied().cycle().take(4096).collect()
}

/// A 64 KiB page that repeats itself 32000 bytes on.
fn far() -> Vec<u8> {
    let mut x = 1u64;
    let random: Vec<u8> = (0..12_000)
        .map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        })
        .collect();
    let mut page = random.clone();
    page.resize(32_000, 0);
    page.extend(random);
    page.resize(65536, 0);
    page
}

fn file(name: &str) -> Vec<u8> {
    let dir = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/dumps");
    std::fs::read(dir.join(name)).unwrap()
}

#[test]
fn pages_that_the_libraries_packed_are_unpacked() {
    for (codec, packed) in &PACKED[..3] {
        assert_eq!(page(*codec, &hex(packed), 4096).unwrap(), text(), "{codec}");
    }
    assert_eq!(page(Codec::Zstd, &hex(PACKED[3].1), 4096).unwrap(), [0; 4096]);
    for (codec, name) in [(Codec::Lzo, "far.lzo1x-1"), (Codec::Lzo, "far.lzo1x-999"), (Codec::Zstd, "far.zst")] {
        assert_eq!(page(codec, &file(name), 65536).unwrap(), far(), "{name}");
    }
    for expected in [text(), far()] {
        let packed = snap::raw::Encoder::new().compress_vec(&expected).unwrap();
        assert_eq!(page(Codec::Snappy, &packed, expected.len()).unwrap(), expected);
        let packed = miniz_oxide::deflate::compress_to_vec_zlib(&expected, 6);
        assert_eq!(page(Codec::Zlib, &packed, expected.len()).unwrap(), expected);
        assert_eq!(page(Codec::Stored, &expected, expected.len()).unwrap(), expected);
    }
}

#[test]
fn a_page_of_another_size_is_refused() {
    let snappy = snap::raw::Encoder::new().compress_vec(&text()).unwrap();
    let zlib = miniz_oxide::deflate::compress_to_vec_zlib(&text(), 6);
    for len in [0, 1, 4095, 4097, 65536] {
        for (codec, packed) in [(Codec::Zlib, &zlib), (Codec::Snappy, &snappy), (Codec::Stored, &text())] {
            assert!(page(codec, packed, len).is_err(), "{codec} {len}");
        }
        for (codec, packed) in &PACKED[..3] {
            assert!(page(*codec, &hex(packed), len).is_err(), "{codec} {len}");
        }
    }
}

#[test]
fn every_prefix_of_a_packed_page_is_refused() {
    let lzo = file("far.lzo1x-999");
    for len in 0..lzo.len().min(3000) {
        assert!(page(Codec::Lzo, &lzo[..len], 65536).is_err(), "{len}");
    }
    let zstd = hex(PACKED[2].1);
    for len in 0..zstd.len() {
        assert!(page(Codec::Zstd, &zstd[..len], 4096).is_err(), "{len}");
    }
}

#[test]
fn flags_name_one_packing() {
    assert_eq!(Codec::of_flags(0), Some(Codec::Stored));
    assert_eq!(Codec::of_flags(0x20), Some(Codec::Zstd));
    for flags in [3, 8, 0x10, 0x40, u32::MAX] {
        assert_eq!(Codec::of_flags(flags), None);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_page_or_refused(packed in prop::collection::vec(any::<u8>(), 0..400)) {
        for codec in [Codec::Zlib, Codec::Lzo, Codec::Snappy, Codec::Zstd] {
            let _ = page(codec, &packed, 4096);
        }
    }

    #[test]
    fn a_changed_page_is_a_page_or_refused(at in any::<prop::sample::Index>(), bit in 0u8..8, which in 0usize..3) {
        let (codec, name) = [(Codec::Lzo, "far.lzo1x-1"), (Codec::Lzo, "far.lzo1x-999"), (Codec::Zstd, "far.zst")][which];
        let mut packed = file(name);
        let at = at.index(packed.len());
        packed[at] ^= 1 << bit;
        let _ = page(codec, &packed, 65536);
    }
}
