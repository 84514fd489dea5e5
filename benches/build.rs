//! The C twin, twice: a file at a time with the flags of the kernel's own build, and whole with all a compiler has.

use std::env;

const FILES: [&str; 5] = ["memory.c", "xa.c", "v1.c", "v4.c", "pages.c"];

/// Of the x86_64 kernel's flags (Makefile, arch/x86/Makefile) those that shape code. What Kconfig adds (stack protector,
/// landing pads, return thunks) is left out, which makes the twin faster by a tenth.
const KERNEL: &[&str] = &[
    "-std=gnu11",
    "-fno-strict-aliasing",
    "-fno-common",
    "-fno-delete-null-pointer-checks",
    "-fno-allow-store-data-races",
    "-fno-strict-overflow",
    "-fno-stack-check",
    "-fconserve-stack",
    "-fno-asynchronous-unwind-tables",
    "-fno-jump-tables",
    "-fomit-frame-pointer",
    "-fpie",
];
const KERNEL_X86: &[&str] = &[
    "-mno-sse",
    "-mno-mmx",
    "-mno-sse2",
    "-mno-3dnow",
    "-mno-avx",
    "-mno-80387",
    "-mno-red-zone",
    "-mskip-rax-setup",
    "-mtune=generic",
    "-falign-jumps=1",
    "-falign-loops=1",
    "-fcf-protection=none",
];

fn main() {
    println!("cargo::rerun-if-changed=twin");
    let x86 = env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64");

    let mut kernel = cc::Build::new();
    kernel.opt_level(2).pic(false).no_default_flags(true).flag("-O2").warnings(true).define("TWIN_PREFIX", "kernel_");
    let flags = KERNEL.iter().chain(if x86 { KERNEL_X86 } else { &[] });
    for flag in flags {
        kernel.flag_if_supported(flag);
    }
    kernel.files(FILES.map(|file| format!("twin/{file}"))).compile("twin_kernel");

    let mut best = cc::Build::new();
    best.opt_level(3).flag("-march=native").flag("-std=gnu11").define("TWIN_PREFIX", "best_").file("twin/all.c");
    best.compile("twin_best");
}
