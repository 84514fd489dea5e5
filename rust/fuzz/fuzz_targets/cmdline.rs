//! Any bytes as a kernel's command line: no panic, later kernels refuse what earlier ones accept but never the other way
//! round, and sizes are whole multiples of what they are rounded to.

#![no_main]

use kho::cmdline::{
    Rounding, ScratchSpec, Trailing, Zeros, cma_alignment, kho_is_enabled, kho_scratch_of, max_order_alignment,
    parse_kho_scratch,
};
use kho::units::PageSize;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let (on, off) = (kho_is_enabled(&text, true), kho_is_enabled(&text, false));
    // A command line that says something says it whatever the default is.
    assert!(on || !off);
    if !text.contains("kho") {
        assert!(on && !off);
        assert_eq!(kho_scratch_of(&text), None);
    }
    if let Some(value) = kho_scratch_of(&text) {
        assert!(text.contains(value));
    }
    for value in [&*text, kho_scratch_of(&text).unwrap_or_default()] {
        if let Ok(spec) = parse_kho_scratch(value, Trailing::Reject, Zeros::NotAll) {
            assert_eq!(parse_kho_scratch(value, Trailing::Ignore, Zeros::NotAll).unwrap(), spec);
            check(spec, bytes);
        }
        if let Ok(spec) = parse_kho_scratch(value, Trailing::Ignore, Zeros::NotAll) {
            check(spec, bytes);
        }
    }
    for trailing in [Trailing::Reject, Trailing::Ignore] {
        check(ScratchSpec::from_cmdline(&text, trailing), bytes);
    }
});

fn check(spec: ScratchSpec, bytes: &[u8]) {
    let word = |n: usize| bytes.get(8 * n..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b));
    for page in PageSize::ALL {
        for align in [cma_alignment(page), max_order_alignment(page)] {
            if let Ok(sizes) = spec.sizes(word(0), word(1), &[word(2), word(3)], align, Rounding::All) {
                assert_eq!(sizes.len(), 4);
                assert!(sizes.iter().all(|size| size % align == 0));
            }
        }
    }
    let sizes = match spec {
        ScratchSpec::Percent(percent) => format!("{percent}%"),
        ScratchSpec::Sizes { low, global, pernode } => format!("{low},{global},{pernode}"),
    };
    assert_eq!(parse_kho_scratch(&sizes, Trailing::Reject, Zeros::NotAll).unwrap(), spec);
}
