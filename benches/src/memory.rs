//! Memory that costs no faults: huge pages, touched before anything is measured, as the kernel's own memory is mapped.

use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use std::ptr;

/// A private mapping of zeros, aligned to a huge page.
pub struct Touched {
    at: *mut u8,
    mapped: (*mut u8, usize),
    len: usize,
}

/// Bytes of a huge page.
pub const HUGE: usize = 2 << 20;

impl Touched {
    /// `len` bytes, rounded up to huge pages.
    ///
    /// # Panics
    /// Without that much memory there is nothing to measure.
    #[allow(clippy::expect_used)]
    pub fn new(len: usize) -> Self {
        let touched = Self::untouched(len, true);
        for at in (0..touched.len).step_by(4096) {
            // SAFETY: the mapping is `len` bytes long, and only this value uses it.
            unsafe { touched.at.add(at).write_volatile(0) };
        }
        touched
    }

    /// The same without its pages, which are huge when touched or not at all.
    #[allow(clippy::expect_used)]
    pub fn untouched(len: usize, huge: bool) -> Self {
        let len = len.next_multiple_of(HUGE);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let base = unsafe { mm::mmap_anonymous(ptr::null_mut(), len + HUGE, prot, flags) }.expect("memory to map");
        let base = base.cast::<u8>();
        let at = base.wrapping_add(base.align_offset(HUGE));
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        // SAFETY: the range lies in the mapping just made; advice changes nothing that can be seen.
        let _ = unsafe { mm::madvise(at.cast(), len, advice) };
        Touched { at, mapped: (base, len + HUGE), len }
    }

    pub fn ptr(&self) -> *mut u8 {
        self.at
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Touched {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped.
        let _ = unsafe { mm::munmap(self.mapped.0.cast(), self.mapped.1) };
    }
}
