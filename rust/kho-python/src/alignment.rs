//! The alignment of Python classes, checked at compile time.

#![forbid(unsafe_code)]

/// Refuses to compile a class that CPython could not allocate: it aligns objects to 16 bytes (`ALIGNMENT` of
/// Objects/obmalloc.c), and PyO3 does not ask for more. What needs more goes into a `Box`.
macro_rules! assert_object_alignment {
    ($class:ty) => {
        const _: () = assert!(align_of::<$class>() <= 16, "CPython aligns objects to 16 bytes: box what needs more");
    };
}
pub(crate) use assert_object_alignment;
