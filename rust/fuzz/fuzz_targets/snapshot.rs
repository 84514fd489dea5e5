//! Any bytes as the root FDT that debugfs shows: no panic, and what is not whole has a problem.

#![no_main]

use kho::snapshot::RootFdt;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let fdt = RootFdt::read(bytes.to_vec());
    assert!(!fdt.is_truncated() || fdt.problem.is_some());
    assert!(fdt.compatible.is_none_or(|c| c.starts_with("kho-v")));
});
