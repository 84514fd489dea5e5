//! Thresholds that select a code path, overridable in tests.
//!
//! The length of a list and the processor select one of several code paths. All of them return the same result: the tests
//! override the thresholds and run every path.

#![forbid(unsafe_code)]

/// Overrides of the thresholds. Outside tests it is always [`DEFAULT`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tuning {
    /// Use the portable build of the vector loops only.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) portable: bool,
    /// Do not use the AVX-512 compress instructions.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) without_compress: bool,
    /// Folios up to which a list is processed in its own order.
    pub(crate) short_list: Option<usize>,
    /// Bytes of work per thread; if set, two processors are assumed.
    pub(crate) bytes_per_thread: Option<usize>,
    /// log2 of the bits of the smallest bucket of a partition.
    pub(crate) bucket_bits: Option<u32>,
}

const DEFAULT: Tuning =
    Tuning { portable: false, without_compress: false, short_list: None, bytes_per_thread: None, bucket_bits: None };

/// The thresholds in force: constants, except in tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn tuning() -> Tuning {
    DEFAULT
}

#[cfg(test)]
pub(crate) use overridden::{override_tuning, tuning};

#[cfg(test)]
mod overridden {
    use super::{DEFAULT, Tuning};
    use std::cell::Cell;

    thread_local! {
        static TUNING: Cell<Tuning> = const { Cell::new(DEFAULT) };
    }

    pub(crate) fn tuning() -> Tuning {
        TUNING.get()
    }

    /// Sets the thresholds of the calling thread.
    pub(crate) fn override_tuning(tuning: Tuning) {
        TUNING.set(tuning);
    }
}
