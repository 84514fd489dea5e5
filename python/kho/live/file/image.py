"""An image's file: creating it, reading and checking what is committed, its lock."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ... import _kho
from ...errors import (
    BusyError,
    FormatError,
    KhoError,
    OutOfMemoryError,
    ParameterError,
    ReadOnlyError,
    SourceError,
    StaleError,
    UnsupportedAbiError,
)
from ...formats.live import PAGE, SUBTREE, Catalog, decode_catalog
from ...handover.elfcore import clipped, merged
from ...owned import Uncopied
from ...sizes import format_size
from ..oserrors import error_of, rust_error
from . import header, pins
from .header import HEAD, JOURNAL_END, Journal, Root, Super
from .mapping import Mapping, allocate
from .memory import huge_pool
from .metadata import LARGEST_ORDER, LEAST_METADATA, MOST_METADATA, build, meta_zone
from .pins import Pin
from .trust import PRIVATE, Policy, check_descriptor, open_trusted, same_file

if TYPE_CHECKING:
    from ...luo import Session

__all__ = ["Image", "ImageFile", "State", "blank", "build", "meta_zone", "open_file", "reopen"]

BASE = 1 << 32
"""Physical address of an image's memory: an arbitrary one, so that no address in it is 0."""
LEAST = 1 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 0x10
POLL = 0.005
"""Seconds between two attempts to take a lock."""
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
RETRIES = 1000


class State(NamedTuple):
    """A committed generation."""

    root: Root
    catalog: Catalog
    torn: int | None
    """A generation whose commit was cut short."""


class ImageFile(Uncopied):
    """An open file that holds an image, and a lock on it.

    The lock is a `flock` of an open file description that nothing else refers to. A lock on the description that is
    mapped, or passed to other processes, would last until the last mapping and descriptor is gone, also in children.
    """

    def __init__(
        self,
        fd: int,
        where: str,
        path: Path | None = None,
        *,
        own: bool = False,
        lock_fd: int | None = None,
        policy: Policy = PRIVATE,
    ) -> None:
        """Read the superblock.

        Args: fd: belongs to the image from now on. own: this process has just made the file. lock_fd: a descriptor that
            holds the lock already. policy: which files are trusted.
        Raises: FormatError, SourceError, UntrustedError; the descriptors are closed then.
        """
        self.fd = fd
        self.lock_fd = -1 if lock_fd is None else lock_fd
        self.where = where
        self.path = path
        self.session: Session | None = None
        """The live update session that preserves the file for the next kernel."""
        self.kept = False
        """Whether `path` is the place at which the next process finds an image by its name (`handover.kept`)."""
        self.keep_free = False
        """Whether its owner keeps free memory allocated, as preserving the file would allocate it again."""
        self._seen: tuple[tuple[int, bytes], State] | None = None
        try:
            size = _checked_size(fd, where, own, path is not None, policy)
            if lock_fd is None:
                self.lock_fd = reopen(fd, where, reading=True)
            elif not _is_file_of(lock_fd, fd):
                raise SourceError(f"{where}: descriptor {lock_fd}, which is to be its lock's, leads to another file")
            if size < HEAD + LEAST:
                raise FormatError(f"{where}: {size:#x} bytes are no kho.live image")
            self._mapping = Mapping(fd, 0, HEAD, writable=False)
            self.head = self._mapping.view(0, HEAD)
            try:
                self.sup: Super = header.read_super(self.head, size)
            except FormatError as error:
                raise type(error)(f"{where}: {error}; nothing was changed, remove the file to start again") from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, fd: int, size: int, name: str, version: str, where: str) -> ImageFile:
        """Make an empty image, of generation 0, in a blank file, and lock it; its ELF magic is written last.

        Args: size: bytes of memory for objects and metadata.
        Raises: BusyError if another process does the same; ParameterError, OutOfMemoryError, SourceError. The
            descriptor is closed then.
        """
        lock_fd = -1
        try:
            # The umask, or the creator of a memfd, may have set another mode.
            os.fchmod(fd, 0o600)
            lock_fd = reopen(fd, where)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not blank(fd):
                raise BusyError(f"{where}: another process has made an image in it")
            if pins.held(lock_fd, pins.READERS, 0, 3 * pins.GENERATIONS):
                raise BusyError(
                    f"{where}: arrays of the image that was released here are still held; drop them, or end the "
                    "processes that hold them (/proc/locks lists these by the file's inode), or take another file"
                )
            _fill(fd, size, name, version, where)
        except BaseException as error:
            for opened in (fd, lock_fd):
                if opened >= 0:
                    os.close(opened)
            if isinstance(error, BlockingIOError):
                raise BusyError(f"{where}: another process is making it") from error
            if isinstance(error, OSError) and not isinstance(error, KhoError):
                raise error_of(error, where, "make an image") from error
            raise
        return cls(fd, where, own=True, lock_fd=lock_fd)

    def word(self) -> int:
        """Read the word: the physical address of the committed root FDT."""
        at = self.sup.word_at
        return self.head[at : at + 8].cast("Q")[0]

    def committed(self) -> State:
        """Read and check the committed generation, also while its owner commits.

        Raises: FormatError with the address of what no commit would have written; UnsupportedAbiError.
        """
        for _ in range(RETRIES):
            before = self._roots()
            if self._seen is not None and self._seen[0] == before:
                return self._seen[1]
            try:
                self._seen = before, self._state(self._root(before[0]))
                return self._seen[1]
            except (UnsupportedAbiError, FormatError) as error:
                # If the roots have changed, a commit has replaced what was read: it is not damaged.
                if self._roots() == before:
                    raise self._refused(error) from error
        raise BusyError(f"{self.where}: {RETRIES} times another generation was committed while one was being read")

    def pinned(self) -> tuple[State, Pin]:
        """Lock, read and check the committed generation: it is kept until the pin and its mappings are gone.

        Warns (RuntimeWarning) that nothing is kept, where the file system has no locks of open file descriptions.
        Raises: as `committed`; SourceError.
        """
        pin = Pin(self.fd, self.where)
        for _ in range(RETRIES):
            before = self._roots()
            try:
                root = self._root(before[0])
                if not pin.take(pins.READERS + root.generation):
                    warnings.warn(
                        f"{self.where}: its file system has no locks of open file descriptions (F_OFD_SETLK), so an "
                        "owner that commits does not keep what is read here; have it `offer` first, or use tmpfs",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                    return self.committed(), pin
                # If the slot is still there, the owner will see the lock: see `pins`.
                if self._roots()[0] == before[0] and self._root(before[0]) == root:
                    state = self._state(root)
                    self.fill_holes(state)
                    return state, pin
            except StaleError:
                raise
            except (UnsupportedAbiError, FormatError) as error:
                if self._roots() == before:
                    raise self._refused(error) from error
                continue
            pin.drop(pins.READERS + root.generation)
        raise BusyError(f"{self.where}: {RETRIES} times another generation was committed while one was being read")

    def _refused(self, error: KhoError) -> KhoError:
        kind = UnsupportedAbiError if isinstance(error, UnsupportedAbiError) else FormatError
        return kind(f"{self.where}: {error}; refused and left as it is; remove it to begin again")

    def fill_holes(self, state: State) -> None:
        """Allocate holes in what is committed: a sparse copy of the file (`cp --sparse`) has them, kho's files do not.

        On a full tmpfs, reading a hole through a mapping is a SIGBUS.
        Raises: OutOfMemoryError.
        """
        base, offset = self.sup.base, self.sup.offset
        root = state.root
        runs = [(0, JOURNAL_END), (offset + root.meta_phys - base, root.meta_bytes)]
        runs += [(offset + item.phys - base, item.pages * PAGE) for item in state.catalog.items.values() if item.nbytes]
        if os.fstat(self.fd).st_blocks * 512 >= sum(n for _, n in runs):
            return
        for at, n in runs:
            try:
                allocate(self.fd, at, n)
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EROFS):
                    return  # opened for reading; files on a compressing file system have fewer blocks than bytes, too
                raise OutOfMemoryError(
                    f"{self.where}: {n:#x} bytes at {at:#x} of the file are a hole, for which the file system has no "
                    f"memory ({error.strerror}); free memory, or enlarge it"
                ) from error

    def _roots(self) -> tuple[int, bytes]:
        return self.word(), bytes(self.head[header.SLOT_AT[0] : header.OWNER_AT])

    def _root(self, word: int) -> Root:
        if word == 0:
            if not self.still_there():
                raise StaleError(f"{self.where}: another process has released it")
            raise FormatError(f"the word at {self.sup.word_at:#x} is 0: it was released")
        roots = [header.read_root(self.head, slot, self.sup) for slot in (0, 1)]
        named = [root for root in roots if root is not None and root.fdt_phys == word]
        if len(named) != 1:
            raise FormatError(
                f"the root at {word:#x}, to which the word at {self.sup.word_at:#x} points, is in no slot"
            )
        return named[0]

    def _state(self, root: Root) -> State:
        try:
            catalog = self._metadata(root)
        except UnsupportedAbiError:
            raise
        except KhoError as error:
            raise FormatError(f"generation {root.generation}: {error}") from error
        slot = 1 - root.generation % 2
        begun = (
            bytes(self.head[header.SLOT_AT[slot] : header.SLOT_AT[slot] + len(header.SLOT_MAGIC)]) == header.SLOT_MAGIC
        )
        other = header.read_root(self.head, slot, self.sup)
        torn = begun and (other is None or other.generation > root.generation)
        return State(root, catalog, root.generation + 1 if torn else None)

    def _metadata(self, root: Root) -> Catalog:
        if root.meta_bytes > MOST_METADATA:
            raise FormatError(f"{root.meta_bytes:#x} bytes of metadata")
        meta = os.pread(self.fd, root.meta_bytes, self.sup.offset + root.meta_phys - self.sup.base)
        if len(meta) != root.meta_bytes or zlib.crc32(meta) != root.meta_crc:
            raise FormatError(f"metadata at {root.meta_phys:#x}: wrong checksum")
        # `meta` is a copy: what was checked is what is used, also if the file is changed in between.
        memory = _kho.Memory.from_segments([(root.meta_phys, meta)])
        inc = _kho.open_memory(memory, fdt_phys=root.fdt_phys, page_size=PAGE, scratch=[])
        catalog = decode_catalog(inc.retrieve_subtree(SUBTREE).read())
        if catalog.generation != root.generation:
            raise FormatError(f"its catalog is of generation {catalog.generation}")
        own = (root.meta_phys, root.meta_bytes)
        everywhere = [(self.sup.base, self.sup.size)]
        runs = merged((item.phys, item.pages * PAGE) for item in catalog.items.values())
        if clipped(runs, everywhere) != runs or clipped(runs, [own]):
            wrong = [item for item in catalog.items.values() if not self._fits(item.phys, item.pages * PAGE, own)]
            name, phys, nbytes = wrong[0].name, wrong[0].phys, wrong[0].nbytes
            raise FormatError(f"object {name!r}: {nbytes:#x} bytes at {phys:#x} cannot be: out of range or overlapping")
        preserved = [(pfn * PAGE, n * PAGE) for pfn, n in inc.tracker().extents()]
        if merged([*runs, *clipped(preserved, [own])]) != merged(preserved):
            raise FormatError("the map of preserved memory and the catalog do not agree")
        for run in catalog.retired:
            if not self._fits(run.phys, run.pages * PAGE, own):
                raise FormatError(
                    f"retired memory: {run.pages:#x} pages at {run.phys:#x} cannot be: out of range or overlapping"
                )
        return catalog

    def _fits(self, phys: int, nbytes: int, own: tuple[int, int]) -> bool:
        inside = self.sup.base <= phys and phys + nbytes <= self.sup.base + self.sup.size
        return nbytes == 0 or (inside and not clipped([(phys, nbytes)], [own]))

    def journal(self, generation: int) -> tuple[str, ...]:
        """Return the names of objects that were changed since a generation, as far as the journal has them."""
        return Journal(self.head).names(generation)

    # One owner at a time

    def make_writable(self) -> None:
        """Open the file for writing, unless its descriptor is for writing already.

        Raises: ReadOnlyError for a memfd that came back from a kexec sealed against writing; SourceError.
        """
        if sealed_for_good(self.fd):
            raise ReadOnlyError(
                f"{self.where}: the memfd is sealed against writing for good (F_SEAL_WRITE), as one with F_SEAL_EXEC "
                "(vm.memfd_noexec=1) is after a kexec; it can be read, and copied to a new image: see docs/live.md, "
                '"Across kexec"'
            )
        if fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            fd = reopen(self.fd, self.where)
            os.dup2(fd, self.fd, inheritable=False)
            os.close(fd)

    def lock(self, timeout: float = 0.0) -> None:
        """Acquire the lock, and so become the owner. Raises: BusyError if it is still held after `timeout` seconds."""
        until = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    raise error_of(error, self.where, "lock") from error
                if time.monotonic() >= until:
                    pid = self.owner()
                    raise BusyError(
                        f"{self.where}: process {pid} has it; stop that, have it hand over, or wait with timeout="
                    ) from error
                time.sleep(POLL)
            else:
                return

    def unlock(self) -> None:
        """Release the lock: another process may become the owner."""
        if self.lock_fd >= 0:
            fcntl.flock(self.lock_fd, fcntl.LOCK_UN)

    def owner(self) -> int:
        """Return the process id that the last owner has noted."""
        return int.from_bytes(self.head[header.OWNER_AT : header.OWNER_AT + 8], "little")

    def still_there(self) -> bool:
        """Return whether the path still leads to this file."""
        if self.path is None:
            return True
        try:
            now, own = self.path.stat(), os.fstat(self.fd)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (own.st_dev, own.st_ino)

    def close(self) -> None:
        """Close the descriptors, which releases the lock; views stay valid."""
        self.forget_lock()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def forget_lock(self) -> None:
        """Close the descriptors of lock and session; a forked child does, as they are its parent's."""
        self.end_session()
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def end_session(self) -> bool:
        """Stop preserving the file; returns whether it was preserved."""
        session, self.session = self.session, None
        if session is not None:
            session.close()
        return session is not None


Image = ImageFile
"""The name of the class in earlier versions."""


def _is_file_of(other: int, fd: int) -> bool:
    try:
        return same_file(os.fstat(other), os.fstat(fd))
    except OSError:
        return False


def _checked_size(fd: int, where: str, own: bool, named: bool, policy: Policy) -> int:
    status = os.fstat(fd) if own else check_descriptor(fd, where, policy)
    if status.st_nlink == 0 and not own and not _sealed(fd):
        if named:
            raise StaleError(f"{where}: it was removed while it was being opened")
        raise FormatError(f"{where}: a memfd that can be shrunk under its readers; seal it with F_SEAL_SHRINK")
    return status.st_size


def _sealed(fd: int) -> bool:
    """Return whether a file is sealed against shrinking; only memfds have seals."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def _fill(fd: int, size: int, name: str, version: str, where: str) -> None:
    try:
        arena = _kho.Arena([(BASE, size)], backing="memfd", max_page_order=LARGEST_ORDER)
    except SourceError as error:
        raise rust_error(error, where, "make an image") from error
    elf = os.pread(arena.fileno(), PAGE, 0)
    word_at, offset, elf_bytes = header.describe_elf(elf)
    try:
        if os.fstat(fd).st_size < offset + size:
            os.ftruncate(fd, offset + size)
    except OSError as error:
        raise error_of(error, where, f"make it {offset + size:#x} bytes long") from error
    _seal(fd, where)
    pages = size // PAGE
    at = pages - LEAST_METADATA
    try:
        allocate(fd, 0, JOURNAL_END)
        allocate(fd, offset + at * PAGE, LEAST_METADATA * PAGE)
    except OSError as error:
        doing = f"an empty image needs {JOURNAL_END + LEAST_METADATA * PAGE:#x} bytes"
        raise error_of(error, where, doing, pool=huge_pool(fd)) from error
    mapping = Mapping(fd, 0, HEAD, writable=True)
    head = mapping.view(0, HEAD)
    sup = Super(word_at, BASE, size, offset, elf_bytes, zlib.crc32(elf[:elf_bytes]))
    # The magic of the superblock is written first: `blank` then recognizes an unfinished image.
    header.write_super(head, sup)
    head[: header.SUPER_AT] = bytes(header.SUPER_AT)
    head[header.SLOT_AT[0] : header.JOURNAL_END] = bytes(header.JOURNAL_END - header.SLOT_AT[0])
    meta, fdt_phys, _ = build(BASE, size, at, LEAST_METADATA, Catalog(name, version, 0, {}))
    memory = Mapping(fd, offset, size, writable=True)
    memory.view(at * PAGE, len(meta))[:] = meta
    header.write_root(head, sup, Root(0, fdt_phys, BASE + at * PAGE, len(meta), zlib.crc32(meta)))
    head[8:elf_bytes] = elf[8:elf_bytes]
    head[word_at : word_at + 8].cast("Q")[0] = fdt_phys
    memory.flush(at * PAGE, len(meta))
    mapping.flush(0, HEAD)
    head[:8].cast("Q")[0] = int.from_bytes(elf[:8], "little")
    mapping.flush(0, PAGE)


def blank(fd: int) -> bool:
    """Return whether a file is empty, or has an image that was not completed. Raises: OSError."""
    if os.fstat(fd).st_size == 0:
        return True
    head = os.pread(fd, header.JOURNAL_END, 0)
    begun = head[header.SUPER_AT : header.SUPER_AT + len(header.MAGIC)] == header.MAGIC
    return head[:8] == bytes(8) and (begun or not any(head))


def sealed_for_good(fd: int) -> bool:
    """Return whether a memfd is sealed against writing."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE))
    except OSError:
        return False


def _seal(fd: int, where: str) -> None:
    """Seal a memfd against changes of its size; files with a name cannot be sealed."""
    if os.fstat(fd).st_nlink or _sealed(fd):
        return
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        # A file that O_TMPFILE made has no name yet, and no seals. The link does not tell: a memfd that came by a kexec
        # is `/ (deleted)`.
        if _is_memfd(fd):
            raise ParameterError(f"{where}: make the memfd with MFD_ALLOW_SEALING ({error.strerror})") from error


def _is_memfd(fd: int) -> bool:
    """Return whether a file is on the kernel's own mount of tmpfs, on which memfds are."""
    other = os.memfd_create("kho", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev == os.fstat(other).st_dev
    finally:
        os.close(other)


def reopen(fd: int, where: str, *, reading: bool = False) -> int:
    """Open a file again, for writing: a description of its own for a lock.

    Args: reading: fall back to reading where it cannot be written: of the file systems, only NFS needs more to lock it.
    Raises: SourceError.
    """
    try:
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if not reading or error.errno not in UNWRITABLE:
                raise
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise error_of(error, where, "open it again") from error


def open_file(path: Path, policy: Policy = PRIVATE, *, reading: bool = False) -> int:
    """Open an image's file for reading and writing, if the policy trusts it.

    Args: reading: fall back to reading where this process may not write it.
    Raises: UntrustedError; SourceError; FileNotFoundError; StaleError if it is removed at the same time.
    """
    try:
        return open_trusted(path, policy)
    except SourceError as error:
        cause = error.__cause__
        if not reading or not isinstance(cause, OSError) or cause.errno not in UNWRITABLE:
            raise
        return open_trusted(path, policy, os.O_RDONLY)


def free_text(used: Iterable[tuple[str, int]]) -> str:
    """Say numbers of pages as sizes: `3 MiB free`."""
    return ", ".join(f"{format_size(pages * PAGE)} {what}" for what, pages in used)


def no_memory(where: str, what: str, pages: int, free: int, largest: int, kept: int) -> OutOfMemoryError:
    """Return the error for a full image. Args: kept: pages of replaced objects that other processes still read."""
    sizes = free_text([("free", free), ("in the largest run", largest)])
    readers = ""
    if kept:
        readers = (
            f" {free_text([('of replaced objects', kept)])} wait for readers in other processes to end or to attach "
            "again; /proc/locks lists their locks by the file's inode (OFDLCK)."
        )
    return OutOfMemoryError(
        f"{where}: {what} needs {free_text([('in one run', pages)])}; {sizes}.{readers} Delete objects and commit, or "
        "make a new image with a larger size"
    )
