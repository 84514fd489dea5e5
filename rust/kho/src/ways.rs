//! Which of several ways leads to a result: lengths and processors decide. Whatever the way, the result is the same, which
//! tests hold by going every one of them.

#![forbid(unsafe_code)]

/// What decides otherwise than usual; nothing does but a test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ways {
    /// Without the processor's newer extensions.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) portable: bool,
    /// Without those that compress vectors.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) by_bits: bool,
    /// Folios of a list that is taken as it comes.
    pub(crate) short: Option<usize>,
    /// Bytes that a thread more is worth; there are two processors then.
    pub(crate) worth_a_thread: Option<usize>,
    /// log2 of the bits of a bucket, at the least.
    pub(crate) bucket_bits: Option<u32>,
}

const USUAL: Ways = Ways { portable: false, by_bits: false, short: None, worth_a_thread: None, bucket_bits: None };

#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn ways() -> Ways {
    USUAL
}

#[cfg(test)]
pub(crate) use other::{go, ways};

#[cfg(test)]
mod other {
    use super::{USUAL, Ways};
    use std::cell::Cell;

    thread_local! {
        static WAYS: Cell<Ways> = const { Cell::new(USUAL) };
    }

    pub(crate) fn ways() -> Ways {
        WAYS.get()
    }

    /// The ways of this thread from here on.
    pub(crate) fn go(ways: Ways) {
        WAYS.set(ways);
    }
}
