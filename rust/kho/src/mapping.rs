//! Memory mappings: reserved address space that commits a page when it is first touched.
//!
//! Mapped bytes may be shared with a Python memoryview or another process, which read and write them at any time. So no
//! reference to them is ever made: they are copied in and out by volatile accesses; each reads or writes the bytes
//! once, whatever another process does to them, and yields some value; or they are written in place as [`Items`].

#![allow(unsafe_code)]

use crate::error::{Error, Result};
#[cfg(target_os = "linux")]
use rustix::fs::{FallocateFlags, fallocate};
#[cfg(target_os = "linux")]
use rustix::mm::{Advice, madvise};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, mmap_anonymous, msync, munmap};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use zerocopy::IntoBytes;

/// A readable and writable mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned and its address does not depend on the thread.
unsafe impl Send for Mapping {}
// SAFETY: no method makes a reference to the bytes. They are copied by volatile accesses, so that a concurrent write (by
// another process, or through a view) changes which value is copied and nothing else.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` zeroed bytes that take no memory until touched (MAP_NORESERVE).
    ///
    /// # Errors
    /// [`Error::Io`] if the address space is not available.
    pub fn anonymous(len: u64) -> Result<Self> {
        let len = size(len)?;
        // SAFETY: a fresh private mapping at an address the kernel chooses aliases nothing.
        let base = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)
        };
        Self::checked(base, len)
    }

    /// `len` bytes of a file from `offset`, shared with everyone who maps it. The file must stay at least that
    /// long: touching a page past its end is fatal (SIGBUS), so memfds are sealed against shrinking.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be mapped.
    pub fn shared(file: impl AsFd, offset: u64, len: u64) -> Result<Self> {
        Self::file(file, offset, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE)
    }

    fn file(file: impl AsFd, offset: u64, len: u64, access: ProtFlags, flags: MapFlags) -> Result<Self> {
        let len = size(len)?;
        // SAFETY: a fresh mapping at an address the kernel chooses aliases no Rust object.
        let base = unsafe { mmap(std::ptr::null_mut(), len, access, flags, file, offset) };
        Self::checked(base, len)
    }

    fn checked(base: rustix::io::Result<*mut core::ffi::c_void>, len: usize) -> Result<Self> {
        let base = base.map_err(|e| Error::io(format!("map {len:#x} bytes"), e))?;
        match NonNull::new(base.cast()) {
            Some(base) => Ok(Mapping { base, len }),
            None => Err(Error::io("map", std::io::Error::other("mapped at address 0"))),
        }
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the mapping has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where `len` bytes at `offset` are in this process; `None` if they are not in the mapping.
    pub fn ptr(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        if offset.checked_add(len)? > self.len() {
            return None;
        }
        // SAFETY: the offset was just bounded by the mapping's length.
        Some(unsafe { self.base.add(usize::try_from(offset).ok()?) })
    }

    /// The offset of an address that [`Mapping::ptr`] gave out.
    pub fn offset_of(&self, ptr: NonNull<u8>) -> Option<u64> {
        let offset = ptr.addr().get().checked_sub(self.base.addr().get())?;
        (offset < self.len).then_some(offset as u64)
    }

    /// Copies out of the mapping; `false` if the bytes are not in it.
    #[must_use]
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        let Some(from) = self.ptr(offset, buf.len() as u64) else { return false };
        // SAFETY: `ptr` bounded `buf.len()` bytes at `from` by the mapping, which lives as long as `self`.
        unsafe { copy_out(from.as_ptr(), buf) };
        true
    }

    /// Copies into the mapping; `false` if the place is not in it.
    #[must_use]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some(to) = self.ptr(offset, bytes.len() as u64) else { return false };
        // SAFETY: `ptr` bounded `bytes.len()` bytes at `to` by the mapping, which lives as long as `self`.
        unsafe { copy_in(to.as_ptr(), bytes) };
        true
    }

    /// A part of the mapping as items; `None` if it is not in it, or does not begin where an item can.
    pub fn items<T: IntoBytes>(&self, offset: u64, len: u64) -> Option<Items<'_, T>> {
        let start = self.ptr(offset, len)?.cast::<T>();
        let len = usize::try_from(len).ok()?.checked_div(size_of::<T>())?;
        start.is_aligned().then_some(Items { start, len, memory: PhantomData })
    }

    /// Zeroes a part of the mapping; `false` if it is not in it.
    #[must_use]
    pub fn zero(&self, offset: u64, len: u64) -> bool {
        let (Some(to), Ok(len)) = (self.ptr(offset, len), usize::try_from(len)) else { return false };
        const ZEROS: [u8; 4096] = [0; 4096];
        for at in (0..len).step_by(ZEROS.len()) {
            let piece = &ZEROS[..ZEROS.len().min(len - at)];
            // SAFETY: `ptr` bounded `len` bytes at `to` by the mapping, and `at + piece.len()` is at most `len`.
            unsafe { copy_in(to.as_ptr().add(at), piece) };
        }
        true
    }
}

/// A shared mapping of a part of a file, which may be read-only: it hands out addresses, and touches no byte itself.
#[derive(Debug)]
pub struct FileView {
    mapping: Mapping,
    writable: bool,
}

impl FileView {
    /// `len` bytes of a file from `offset`. Memory of a huge page pool is reserved now, so that it does not run out later.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no bytes; [`Error::Io`] if the file cannot be mapped.
    pub fn new(file: impl AsFd, offset: u64, len: u64, writable: bool) -> Result<Self> {
        let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        Ok(FileView { mapping: Mapping::file(file, offset, len, access, MapFlags::SHARED)?, writable })
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> u64 {
        self.mapping.len()
    }

    /// Never: a mapping of no bytes is refused.
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }

    /// Whether the bytes may be written.
    pub const fn writable(&self) -> bool {
        self.writable
    }

    /// Where `len` bytes at `offset` are in this process; `None` if they are not in the mapping.
    pub fn ptr(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        self.mapping.ptr(offset, len)
    }

    /// Flushes bytes to the medium of the file, if it has one (msync with MS_SYNC).
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] if they are not in the mapping; [`Error::Io`] if the medium refuses them.
    pub fn flush(&self, offset: u64, len: u64) -> Result<()> {
        let outside = || Error::OutsideMemory { what: "flush", phys: offset, len };
        let before = offset % rustix::param::page_size() as u64;
        let start = self.ptr(offset, len).and_then(|_| self.ptr(offset - before, before + len)).ok_or_else(outside)?;
        let len = usize::try_from(before + len).map_err(|_| outside())?;
        // SAFETY: `ptr` bounded `len` bytes at `start` by the mapping, and MS_SYNC changes none of them.
        unsafe { msync(start.as_ptr().cast(), len, MsyncFlags::SYNC) }
            .map_err(|e| Error::io(format!("flush {len:#x} bytes"), e))
    }
}

/// The type by which most bytes are copied.
type Word = u64;
const WORD: usize = size_of::<Word>();

/// How many bytes at the start of `len` bytes at `address` come before the first aligned word, and how many words follow.
fn split(address: usize, len: usize) -> (usize, usize) {
    let head = (address.wrapping_neg() % WORD).min(len);
    (head, (len - head) / WORD)
}

/// Copies bytes that another process may write at the same time.
///
/// # Safety
/// `buf.len()` bytes at `from` are mapped and readable.
unsafe fn copy_out(from: *const u8, buf: &mut [u8]) {
    let (head, words) = split(from.addr(), buf.len());
    let (first, rest) = buf.split_at_mut(head);
    let (middle, last) = rest.split_at_mut(words * WORD);
    for (n, byte) in first.iter_mut().enumerate() {
        // SAFETY: byte `n` of the `buf.len()` at `from`.
        *byte = unsafe { from.add(n).read_volatile() };
    }
    for (n, word) in middle.as_chunks_mut::<WORD>().0.iter_mut().enumerate() {
        // SAFETY: `head + n * WORD` bytes after `from` is aligned, as `split` says, and the word ends inside `buf.len()`.
        *word = unsafe { from.add(head + n * WORD).cast::<Word>().read_volatile() }.to_ne_bytes();
    }
    for (n, byte) in last.iter_mut().enumerate() {
        // SAFETY: one of the last bytes of the `buf.len()` at `from`.
        *byte = unsafe { from.add(head + words * WORD + n).read_volatile() };
    }
}

/// Copies bytes to where another process may read or write them at the same time.
///
/// # Safety
/// `bytes.len()` bytes at `to` are mapped and writable.
unsafe fn copy_in(to: *mut u8, bytes: &[u8]) {
    let (head, words) = split(to.addr(), bytes.len());
    let (first, rest) = bytes.split_at(head);
    let (middle, last) = rest.split_at(words * WORD);
    for (n, byte) in first.iter().enumerate() {
        // SAFETY: byte `n` of the `bytes.len()` at `to`.
        unsafe { to.add(n).write_volatile(*byte) };
    }
    for (n, word) in middle.as_chunks::<WORD>().0.iter().enumerate() {
        // SAFETY: `head + n * WORD` bytes after `to` is aligned, as `split` says, and the word ends inside `bytes.len()`.
        unsafe { to.add(head + n * WORD).cast::<Word>().write_volatile(Word::from_ne_bytes(*word)) };
    }
    for (n, byte) in last.iter().enumerate() {
        // SAFETY: one of the last bytes of the `bytes.len()` at `to`.
        unsafe { to.add(head + words * WORD + n).write_volatile(*byte) };
    }
}

/// Items in memory that another process may read or write at any time: they are written, by volatile accesses, and never
/// borrowed.
#[derive(Clone, Copy)]
pub struct Items<'a, T> {
    start: NonNull<T>,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<T: IntoBytes> Items<'_, T> {
    /// The number of items.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The items from item `n` on; empty past the last one.
    #[must_use]
    pub fn from(self, n: usize) -> Self {
        let skip = n.min(self.len);
        // SAFETY: `skip` is at most `self.len`, so that this is at most one past the last item.
        Items { start: unsafe { self.start.add(skip) }, len: self.len - skip, memory: PhantomData }
    }

    /// Writes the items one after another, as many as there are here and there.
    #[inline(always)]
    pub fn write(self, items: impl Iterator<Item = T>) {
        // SAFETY: `n` is below `self.len`, so that the item lies in the memory borrowed for `'a`; `Mapping::items` and the
        // slice that `From` was given make it aligned and writable.
        (0..self.len).zip(items).for_each(|(n, item)| unsafe { self.start.add(n).write_volatile(item) });
    }
}

impl<'a, T> From<&'a mut [T]> for Items<'a, T> {
    fn from(items: &'a mut [T]) -> Self {
        Items { len: items.len(), start: NonNull::from(items).cast(), memory: PhantomData }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are those of the mapping that `checked` made, which nothing else unmaps. Pointers into it
        // come from `ptr` and `items`: the latter borrow it, and the users of the former (arena views, blocks) hold the
        // `Arc<Spans>` that owns it. Failure leaves it mapped, harmlessly.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Asks for huge pages for memory that is about to be written for the first time, where it is long enough for any.
pub(crate) fn prefer_huge_pages<T>(memory: &mut [T]) {
    // SAFETY: this advice changes no byte.
    #[cfg(target_os = "linux")]
    let _ = unsafe { advise(memory, Advice::LinuxHugepage) };
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// `madvise(MADV_FREE)`: the kernel may reclaim these pages. A page written before that is kept, without a page fault.
/// Returns false if the kernel refuses.
pub(crate) fn mark_reclaimable<T>(memory: &mut [MaybeUninit<T>]) -> bool {
    // SAFETY: the kernel may turn bytes to zeros, which is as good as anything where nothing is initialized.
    #[cfg(target_os = "linux")]
    return unsafe { advise(memory, Advice::LinuxFree) };
    #[cfg(not(target_os = "linux"))]
    return memory.is_empty();
}

/// Gives the kernel advice about the huge pages that memory has whole. False if it does not take it, or there are none.
///
/// # Safety
/// The advice does nothing to the bytes that `memory` does not allow.
#[cfg(target_os = "linux")]
unsafe fn advise<T>(memory: &mut [T], advice: Advice) -> bool {
    const HUGE_PAGE: usize = 2 << 20;
    let start = memory.as_mut_ptr().cast::<u8>();
    let skip = start.align_offset(HUGE_PAGE);
    let len = size_of_val(memory).saturating_sub(skip) & !(HUGE_PAGE - 1);
    // SAFETY: the range lies in `memory`, which is borrowed for writing; what the advice does there is the caller's.
    len > 0 && unsafe { madvise(start.wrapping_add(skip).cast(), len, advice) }.is_ok()
}

/// Frees a part of a file, which reads as zeros then; the file keeps its size (fallocate with FALLOC_FL_PUNCH_HOLE).
///
/// # Errors
/// Those of fallocate: EOPNOTSUPP where the file system has no holes. `Unsupported` where it is not Linux.
#[cfg(target_os = "linux")]
pub fn punch_hole(file: impl AsFd, offset: u64, len: u64) -> std::io::Result<()> {
    Ok(fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
}

/// Frees a part of a file: of Linux only.
///
/// # Errors
/// Always, of kind `Unsupported`.
#[cfg(not(target_os = "linux"))]
pub fn punch_hole(_file: impl AsFd, _offset: u64, _len: u64) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

fn size(len: u64) -> Result<usize> {
    match usize::try_from(len) {
        Ok(len) if len > 0 => Ok(len),
        _ => Err(Error::Invalid { what: "mapping", why: format!("{len} bytes cannot be mapped") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_bounded_on_every_side() {
        let m = Mapping::anonymous(8192).unwrap();
        assert!(m.write(8190, b"ab"));
        assert!(!m.write(8191, b"ab"));
        assert!(!m.write(u64::MAX, b"a"));
        let mut buf = [0; 2];
        assert!(m.read(8190, &mut buf));
        assert_eq!(&buf, b"ab");
        assert!(m.zero(8190, 2) && m.read(8190, &mut buf));
        assert_eq!(&buf, b"\0\0");
        assert_eq!(m.offset_of(m.ptr(4096, 1).unwrap()), Some(4096));
        assert!(Mapping::anonymous(0).is_err());
    }

    #[test]
    fn a_view_of_a_file_is_bounded_and_shared() {
        let file = rustix::fs::memfd_create("kho-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 16384).unwrap();
        let (all, part) =
            (FileView::new(&file, 0, 16384, true).unwrap(), FileView::new(&file, 4096, 8192, false).unwrap());
        assert!((all.writable(), part.writable()) == (true, false) && part.len() == 8192);
        assert!(part.ptr(8192, 0).is_some() && part.ptr(8192, 1).is_none() && part.ptr(1, u64::MAX).is_none());
        assert_eq!(rustix::io::pwrite(&file, b"x", 5000).unwrap(), 1);
        // SAFETY: one byte inside the mapping of a file of that size.
        assert_eq!(unsafe { part.ptr(904, 1).unwrap().read_volatile() }, b'x');
        all.flush(5000, 7000).unwrap();
        assert!(matches!(part.flush(8000, 193), Err(Error::OutsideMemory { .. })));
        assert!(matches!(FileView::new(&file, 1, 4096, false), Err(Error::Io { .. })));
    }

    #[test]
    fn copies_of_every_length_at_every_alignment_are_exact() {
        let m = Mapping::anonymous(4096).unwrap();
        for offset in 0..17u64 {
            for len in 0..40usize {
                let bytes: Vec<u8> = (1..).take(len).map(|n: u8| n.wrapping_mul(7) | 1).collect();
                assert!(m.zero(0, 4096) && m.write(64 + offset, &bytes));
                let mut around = vec![0xee; len + 2];
                assert!(m.read(63 + offset, &mut around));
                assert_eq!((around[0], &around[1..=len], around[len + 1]), (0, &bytes[..], 0));
                assert!(m.zero(64 + offset, len as u64) && m.read(63 + offset, &mut around));
                assert!(around.iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn items_are_written_where_they_lie_and_nowhere_else() {
        let m = Mapping::anonymous(4096).unwrap();
        assert!(m.items::<u64>(4, 16).is_none() && m.items::<u64>(4096 - 8, 16).is_none());
        let items = m.items::<u64>(16, 31).unwrap();
        assert_eq!((items.len(), items.from(2).len(), items.from(7).len()), (3, 1, 0));
        items.write(1..=2);
        items.from(2).write(std::iter::repeat(3));
        items.from(9).write(std::iter::once(4));
        let mut bytes = [0; 48];
        assert!(m.read(8, &mut bytes));
        assert_eq!(
            bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect::<Vec<_>>(),
            [0, 1, 2, 3, 0, 0]
        );
    }

    #[test]
    fn memory_that_was_not_needed_can_be_written_again() {
        let mut list: Vec<u64> = Vec::with_capacity(1 << 20);
        assert!(!mark_reclaimable(&mut list.spare_capacity_mut()[..100]));
        for round in 0..2 {
            list.extend((0..1 << 20).map(|n| n ^ round));
            assert!((0..).zip(&list).all(|(n, item)| *item == n ^ round));
            list.clear();
            assert!(mark_reclaimable(list.spare_capacity_mut()));
        }
    }

    #[test]
    fn sixteen_tebibytes_are_reserved_not_committed() {
        let m = Mapping::anonymous(1 << 44).unwrap();
        assert!(m.write((1 << 44) - 1, b"x"));
    }
}
