//! The C twin (`benches/twin`) as safe structures. It is a stand-in for the kernel's algorithm, not the kernel's code.

use crate::memory::Touched;
use crate::workload::Workload;
use std::ffi::{c_int, c_uint};
use std::ptr;

#[repr(C)]
struct Pool {
    page: *mut u8,
    page_end: *mut u8,
    object: *mut u8,
    object_end: *mut u8,
}

#[repr(C)]
struct Xa {
    lock: usize,
    flags: c_uint,
    head: *mut u8,
}

/// `struct v1` of twin.h.
#[repr(C)]
struct V1 {
    orders: Xa,
    pool: *mut Pool,
}

/// `struct v4` of twin.h.
#[repr(C)]
struct V4 {
    lock: usize,
    root: *mut u64,
    pool: *mut Pool,
}

/// `struct machine` of twin.h.
#[repr(C)]
struct RawMachine {
    pages: *mut u8,
    nr_pages: u64,
    online: *const u64,
    managed: i64,
    total: i64,
}

type Each<T> = unsafe extern "C" fn(*mut T, *const u64, *const u8, usize) -> c_int;
type Forget<T> = unsafe extern "C" fn(*mut T, *const u64, *const u8, usize);

/// One compilation of the twin.
pub struct Build {
    /// What a table calls it.
    pub name: &'static str,
    v1_init: unsafe extern "C" fn(*mut V1, *mut Pool),
    v1_preserve_each: Each<V1>,
    v1_unpreserve_each: Forget<V1>,
    v1_iterate: unsafe extern "C" fn(*mut V1, *mut u64) -> usize,
    v1_serialize: unsafe extern "C" fn(*mut V1) -> u64,
    v1_take_over: unsafe extern "C" fn(*mut RawMachine, u64) -> usize,
    v4_init: unsafe extern "C" fn(*mut V4, *mut Pool),
    v4_preserve_each: Each<V4>,
    v4_unpreserve_each: Forget<V4>,
    v4_iterate: unsafe extern "C" fn(*mut V4, *mut u64) -> usize,
    v4_take_over: unsafe extern "C" fn(*mut RawMachine, *mut V4) -> usize,
    restore_each: unsafe extern "C" fn(*mut RawMachine, *const u64, usize) -> usize,
}

macro_rules! builds {
    ($($build:ident $name:literal: $v1_init:ident $v1_preserve_each:ident $v1_unpreserve_each:ident $v1_iterate:ident
        $v1_serialize:ident $v1_take_over:ident $v4_init:ident $v4_preserve_each:ident $v4_unpreserve_each:ident
        $v4_iterate:ident $v4_take_over:ident $restore_each:ident;)*) => {$(
        unsafe extern "C" {
            fn $v1_init(t: *mut V1, pool: *mut Pool);
            fn $v1_preserve_each(t: *mut V1, pfns: *const u64, orders: *const u8, n: usize) -> c_int;
            fn $v1_unpreserve_each(t: *mut V1, pfns: *const u64, orders: *const u8, n: usize);
            fn $v1_iterate(t: *mut V1, out: *mut u64) -> usize;
            fn $v1_serialize(t: *mut V1) -> u64;
            fn $v1_take_over(machine: *mut RawMachine, chunk: u64) -> usize;
            fn $v4_init(t: *mut V4, pool: *mut Pool);
            fn $v4_preserve_each(t: *mut V4, pfns: *const u64, orders: *const u8, n: usize) -> c_int;
            fn $v4_unpreserve_each(t: *mut V4, pfns: *const u64, orders: *const u8, n: usize);
            fn $v4_iterate(t: *mut V4, out: *mut u64) -> usize;
            fn $v4_take_over(machine: *mut RawMachine, t: *mut V4) -> usize;
            fn $restore_each(machine: *mut RawMachine, pfns: *const u64, n: usize) -> usize;
        }
        pub static $build: Build = Build {
            name: $name,
            v1_init: $v1_init,
            v1_preserve_each: $v1_preserve_each,
            v1_unpreserve_each: $v1_unpreserve_each,
            v1_iterate: $v1_iterate,
            v1_serialize: $v1_serialize,
            v1_take_over: $v1_take_over,
            v4_init: $v4_init,
            v4_preserve_each: $v4_preserve_each,
            v4_unpreserve_each: $v4_unpreserve_each,
            v4_iterate: $v4_iterate,
            v4_take_over: $v4_take_over,
            restore_each: $restore_each,
        };
    )*};
}

builds! {
    KERNEL "": kernel_v1_init kernel_v1_preserve_each kernel_v1_unpreserve_each kernel_v1_iterate kernel_v1_serialize
        kernel_v1_take_over kernel_v4_init kernel_v4_preserve_each kernel_v4_unpreserve_each kernel_v4_iterate
        kernel_v4_take_over kernel_restore_each;
    BEST " -O3": best_v1_init best_v1_preserve_each best_v1_unpreserve_each best_v1_iterate best_v1_serialize
        best_v1_take_over best_v4_init best_v4_preserve_each best_v4_unpreserve_each best_v4_iterate best_v4_take_over
        best_restore_each;
}

/// Which of the kernel's two ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    V1,
    V4,
}

enum State {
    V1(Box<V1>),
    V4(Box<V4>),
}

/// A tracker of the twin, with memory of its own.
pub struct Twin {
    build: &'static Build,
    version: Version,
    state: State,
    pool: Box<Pool>,
    pages: Touched,
    objects: Touched,
}

impl Twin {
    /// An empty one with room for `pages` pages of 4 KiB: bitmaps, tables, chunks.
    pub fn new(build: &'static Build, version: Version, pages: usize) -> Self {
        let (pages, objects) = (Touched::new(pages << 12), Touched::new((pages / 32).max(64) << 12));
        let null = ptr::null_mut();
        let mut pool = Box::new(Pool { page: null, page_end: null, object: null, object_end: null });
        let state = match version {
            Version::V1 => {
                State::V1(Box::new(V1 { orders: Xa { lock: 0, flags: 0, head: null }, pool: &raw mut *pool }))
            }
            Version::V4 => State::V4(Box::new(V4 { lock: 0, root: ptr::null_mut(), pool: &raw mut *pool })),
        };
        let mut twin = Twin { build, version, state, pool, pages, objects };
        twin.clear();
        twin
    }

    /// Room for what a workload needs.
    pub fn for_workload(build: &'static Build, version: Version, workload: &Workload) -> Self {
        Self::new(build, version, ((workload.span >> 15) + (workload.span >> 22) + 4096) as usize)
    }

    /// What a table calls it.
    pub fn name(&self) -> String {
        let version = if self.version == Version::V1 { "v1" } else { "v4" };
        format!("twin {version}{}", self.build.name)
    }

    /// Forgets everything; the memory is used again, as it is, without faults.
    pub fn clear(&mut self) {
        let (pages, objects) = (self.pages.ptr(), self.objects.ptr());
        *self.pool = Pool {
            page: pages,
            page_end: pages.wrapping_add(self.pages.len()),
            object: objects,
            object_end: objects.wrapping_add(self.objects.len()),
        };
        let pool = &raw mut *self.pool;
        // SAFETY: state and pool are this structure's own and outlive the call.
        unsafe {
            match &mut self.state {
                State::V1(t) => (self.build.v1_init)(&raw mut **t, pool),
                State::V4(t) => (self.build.v4_init)(&raw mut **t, pool),
            }
        }
    }

    /// # Panics
    /// If the room was too small: then it would be compared with what it did not do.
    pub fn preserve_each(&mut self, workload: &Workload) {
        let (pfns, n) = (workload.pfns.as_ptr(), workload.len());
        let orders = workload.orders.as_ref().map_or(ptr::null(), |orders| orders.as_ptr());
        // SAFETY: `n` pfns and, unless NULL, `n` orders.
        let err = unsafe {
            match &mut self.state {
                State::V1(t) => (self.build.v1_preserve_each)(&raw mut **t, pfns, orders, n),
                State::V4(t) => (self.build.v4_preserve_each)(&raw mut **t, pfns, orders, n),
            }
        };
        assert_eq!(err, 0, "the twin's memory is too small");
    }

    pub fn unpreserve_each(&mut self, workload: &Workload) {
        let (pfns, n) = (workload.pfns.as_ptr(), workload.len());
        let orders = workload.orders.as_ref().map_or(ptr::null(), |orders| orders.as_ptr());
        // SAFETY: as above.
        unsafe {
            match &mut self.state {
                State::V1(t) => (self.build.v1_unpreserve_each)(&raw mut **t, pfns, orders, n),
                State::V4(t) => (self.build.v4_unpreserve_each)(&raw mut **t, pfns, orders, n),
            }
        }
    }

    /// Every folio as `pfn << 6 | order`; how many there are.
    ///
    /// # Panics
    /// `out` must have room for `folios`, which is at least as many as there are.
    pub fn iterate(&mut self, out: &mut [u64], folios: usize) -> usize {
        assert!(out.len() >= folios);
        // SAFETY: the caller's number bounds what was preserved, and `out` has that much room.
        unsafe {
            match &mut self.state {
                State::V1(t) => (self.build.v1_iterate)(&raw mut **t, out.as_mut_ptr()),
                State::V4(t) => (self.build.v4_iterate)(&raw mut **t, out.as_mut_ptr()),
            }
        }
    }

    /// Where the map begins, after the chunks were written (v1); they are given back by [`Twin::free_chunks`].
    pub fn serialize(&mut self) -> u64 {
        match &mut self.state {
            // SAFETY: the state is initialized.
            State::V1(t) => unsafe { (self.build.v1_serialize)(&raw mut **t) },
            State::V4(t) => t.root as u64,
        }
    }

    /// Serializes into memory that is taken back afterwards.
    pub fn serialize_again(&mut self) -> u64 {
        let before = self.pool.page;
        let map = self.serialize();
        self.pool.page = before;
        map
    }

    /// Bytes of pages and of small objects in use.
    pub fn nbytes(&self) -> u64 {
        (self.pool.page.addr() - self.pages.ptr().addr() + self.pool.object.addr() - self.objects.ptr().addr()) as u64
    }

    /// Puts the pages back as they were at [`Twin::memory`], if none was handed out since.
    ///
    /// # Panics
    /// If one was.
    pub fn put_back(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.pool.page.addr() - self.pages.ptr().addr());
        // SAFETY: `bytes.len()` bytes of the mapping are in use, and the twin, which alone writes them, is not running.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.pages.ptr(), bytes.len()) }
    }

    /// The pages in use: where they begin, which is their physical address too, and their bytes.
    pub fn memory(&self) -> (u64, Vec<u8>) {
        let len = self.pool.page.addr() - self.pages.ptr().addr();
        // SAFETY: `bytes.len()` bytes of the mapping were handed out, all of them written.
        let bytes = unsafe { std::slice::from_raw_parts(self.pages.ptr(), len) };
        (self.pages.ptr().addr() as u64, bytes.to_vec())
    }
}

/// The next kernel: a page structure for every page of a span.
pub struct Machine {
    raw: RawMachine,
    _pages: Touched,
    _online: Vec<u64>,
}

impl Machine {
    /// All of `span` pages online.
    pub fn new(span: u64) -> Self {
        let pages = Touched::new(8 * span as usize);
        let online = vec![!0; (span as usize >> 15).div_ceil(64).max(1)];
        let raw = RawMachine { pages: pages.ptr(), nr_pages: span, online: online.as_ptr(), managed: 0, total: 0 };
        Machine { raw, _pages: pages, _online: online }
    }

    /// Marks what a twin handed over; how many folios.
    ///
    /// # Panics
    /// A span smaller than the twin's folios.
    pub fn take_over(&mut self, twin: &mut Twin, map: u64, workload: &Workload) -> usize {
        assert!(workload.span <= self.raw.nr_pages);
        // SAFETY: the map is the twin's own, and its folios lie in the span that has page structures.
        unsafe {
            match &mut twin.state {
                State::V1(_) => (twin.build.v1_take_over)(&raw mut self.raw, map),
                State::V4(t) => (twin.build.v4_take_over)(&raw mut self.raw, &raw mut **t),
            }
        }
    }

    /// Restores each folio; how many were restored now.
    pub fn restore_each(&mut self, build: &Build, pfns: &[u64]) -> usize {
        // SAFETY: the twin checks each pfn against the span.
        unsafe { (build.restore_each)(&raw mut self.raw, pfns.as_ptr(), pfns.len()) }
    }
}
