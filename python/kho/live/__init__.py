"""Memory that outlives its process: a service restarts, and what it held is there, in place, checked, without a copy.

    >>> with kho.live.open("search-index", size="8G", version="2", backing="/dev/shm/search-index") as h:
    ...     if not h.inherited:
    ...         vectors = h.empty("vectors", (1_000_000, 768), "f4")
    ...         fill(vectors)
    ...         h.commit()
    ...     serve(h["vectors"])

Design
------
*The file.* An image is an arena's file (`kho.Arena`), so an ELF core that `kho inspect` and any ELF tool reads: on a
memfd sealed against shrinking and growing, a hugetlb memfd, or a file on tmpfs or pmem. An object is one run of pages
(virtually contiguous, since the memory is one segment), preserved as the folios of the kernel's greedy split; large
ones begin on 2 MiB. What is there is said by a handover of kho-v4 (its subtrees have sizes, and its map can be read
without being told a bitmap size, which kho-v1 says nowhere) with one subtree, `kho-live`: names, dtypes, shapes,
versions, checksums (`kho.payload.live`). No pickle, no object dtypes.

*Commits.* A handover whose map is changed in place would be torn by a crash, so a commit writes all its metadata anew
into free pages: it builds them in private memory (`image.build`) and copies them in as one run. Then it fills one of
two slots (generation, place, checksum) and stores one aligned word: the arena note's `fdt_phys`, which every reader of
the file follows anyway (`slots`). Memory that a committed generation refers to is neither written nor freed before a
newer one is committed; what is freed goes back to the machine (hole punching), unless it is still read (`pins`).
A process killed at any instruction leaves the word as it was or as it shall be, so it always leads to a complete
generation: there is nothing older to fall back to, and a reader refuses what does not check. A commit that was cut
short before the word is reported (`torn`, `dropped`).

*Readers* lock the generation that they read, and owners keep it (`pins`). They trust nothing: superblock, slots and
metadata have checksums, which tell damage, and whatever is read is checked as if these did not exist, which tells
malice: bounds, overlaps, dtypes, shapes, and that map and catalogue agree. Attaching takes time by names, not bytes.
The objects' own checksums are compared by `verify`; a commit sums up only what has changed.

*Owners.* One process may change an image: it holds a `flock` on an open file description that nothing else refers to
(the file is opened once more through /proc/self/fd), which dies with it, and which its forked children close. A
successor looks first (`attach`), and then adopts what the owner has let go of (`hand_over`), or the owner takes it back
(`take_back`). Of those that race for the lock one wins, the others get BusyError.

*Transports* find a memfd by its image's name; a path or a descriptor need none. `open` asks, in this order: what came
with the process across exec or from a holder (`inherited`); who answers to the name (`runtime`, `wire`, `server`,
`successor`); systemd's store; whatever else there is (`transports`); the kernel before this one (`kexec`). An owner of
a memfd answers to its name, so that of those that begin at the same time one finds the other's image.

*Handing over by socket.* prepare: the owner passes the descriptor, and lets nobody begin to change anything; the
successor reads, and checks whether it is fit. adopt: the owner lets go of the lock, and the successor takes it, and the
name with it. adopted: the owner drains. Whenever the connection breaks before, the owner tries for the lock, and if it
gets it goes on: the lock decides, not what was heard. The connection stays open while the owner before, or a child of
it, may be reading; until then the successor keeps what it replaces (`successor.Predecessor`).
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BusyError, LuoBusyError, LuoExistsError, ParameterError, SourceError, StaleError
from ..payload.live import PAGE, Item, check_name
from . import inherited, successor, transports
from . import kexec as across
from .handle import Candidate, Handle
from .image import LEAST, Image, blank, open_file
from .inherited import Inherited
from .inherited import execute as exec  # noqa: A004 - kho.live.exec reads like os.execv
from .reader import Reader
from .slots import HEAD
from .successor import Ready

__all__ = ["Candidate", "Handle", "Item", "Reader", "attach", "exec", "open", "transports"]

if TYPE_CHECKING:
    from . import safetensors as safetensors

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MFD_HUGETLB = 0x4
MFD_EXEC = 0x10
"""From Linux 6.3: no F_SEAL_EXEC, whatever vm.memfd_noexec says, which a kexec would make F_SEAL_WRITE."""
HUGE = 2 << 20
POLL = 0.02
"""Seconds to wait for who was faster."""


def __getattr__(name: str) -> Any:
    """Import what few need, when it is asked for."""
    if name == "safetensors":
        return import_module(".safetensors", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open(  # noqa: A001 - kho.live.open reads like open()
    name: str,
    size: int | str = "1G",
    *,
    version: str = "1",
    backing: str | os.PathLike[str] | int = "memfd",
    timeout: float = 0.0,
    ready: Ready | None = None,
    serve: bool | None = None,
    kexec: bool = False,
) -> Handle:
    """Own the image of a service: the one that is there, or, the first time, a new one.

    A memfd that another process owns is taken over from it: its `handed_over` is set then, and it reads on until it
    ends. While it has uncommitted changes, or a successor, it is busy.

    Args:
        name: the service's, 1 to 255 bytes.
        size: bytes for objects and metadata of a new image, as 4096 or "8G"; an image that is there keeps its own.
        version: of what the service keeps in it; an image of another is refused, and stays as it is.
        backing: "memfd" or "hugetlb", which a transport passes on; the path of a file on tmpfs or pmem; or the
            descriptor of a memfd, empty or with an image.
        timeout: seconds to wait for an owner that is about to let go, or busy.
        ready: the health check: it is given the image as a `Candidate` before anything changes, and what it raises
            leaves the owner in office.
        serve: answer to the image's name, in a thread. By default memfds are, unless a holder does.
        kexec: preserve it for the next kernel (`Handle.preserve`), or refuse. What the last kernel preserved is found
            either way; with True also a device that cannot be asked is an error, rather than a reason to begin anew.

    Raises: BusyError if another process owns it; SchemaError for another name or version, with both; FormatError for an
        image that is torn or was tampered with; OutOfMemoryError; ParameterError; SourceError; LuoError with
        kexec=True.

    """
    check_name(name)
    if "\0" in version or len(version.encode()) > 255:
        raise ParameterError(f"version {version!r}: at most 255 bytes without NUL")
    nbytes = size_of(size)
    if kexec:
        if not isinstance(backing, int) and backing != "memfd":
            raise ParameterError(f"backing {os.fspath(backing)!r}: memfds go across a kexec, use backing='memfd'")
        # Before anybody hands over to a process that then refuses.
        across.check()
    if backing in ("memfd", "hugetlb"):
        return _open_named(name, nbytes, version, timeout, ready, serve, kexec, huge=backing == "hugetlb")
    if isinstance(backing, int):
        handle = _preserved(_open_fd(backing, name, nbytes, version, timeout, ready), kexec)
    else:
        handle = _open_path(Path(backing), name, nbytes, version, timeout, ready)
    return _served(handle) if serve else handle


def attach(source: str | os.PathLike[str] | int, *, lock_fd: int | None = None) -> Candidate:
    """Read an image whose owner may still have it.

    Args: source: its path, or a descriptor, which is duplicated. lock_fd: the owner's own lock, kept across exec
        (`Handle.lock_fileno`); it is the candidate's from now on.
    Raises: SourceError; FormatError for an image that is torn or was tampered with.
    """
    if isinstance(source, int):
        where = f"descriptor {source}"
        try:
            image = Image(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 0), where, lock_fd=lock_fd)
        except OSError as error:
            raise error if isinstance(error, SourceError) else SourceError(f"{where}: {error.strerror}") from error
    else:
        path = Path(source)
        try:
            image = Image(open_file(path), str(path), path, lock_fd=lock_fd)
        except FileNotFoundError as error:
            raise SourceError(f"{path}: no such file") from error
    return Candidate.of(image)


def size_of(size: int | str) -> int:
    if isinstance(size, str):
        found = re.fullmatch(r"([0-9]{1,20})([KMGT]?)", size.strip().upper())
        if found is None:
            raise ParameterError(f"size {size!r}: write 1048576 or '8G'")
        size = int(found[1]) * UNITS[found[2]]
    if size < LEAST or size > 1 << 46:
        raise ParameterError(f"size {size:#x}: at least {LEAST:#x} bytes are needed, at most {1 << 46:#x}")
    return -(-size // PAGE) * PAGE


def _served(handle: Handle, *, replace: bool = False) -> Handle:
    """Have a new owner answer to its image's name, or be none. Raises: BusyError, SourceError."""
    try:
        handle.serve(replace=replace)
    except BaseException:
        handle.close()
        raise
    return handle


def _preserved(handle: Handle, kexec: bool) -> Handle:
    """Settle with the kernel whose the image is. Raises: LuoError; the image stays in this process, for another try."""
    try:
        if kexec:
            handle.preserve()
        else:
            across.finish(handle.name)
    except BaseException as error:
        if isinstance(error, LuoBusyError) and not kexec:
            return handle  # it has adopted it, and a kernel that cannot finish yet is asked again by `preserve`
        if handle.inherited:
            across.keep(handle.name, handle.fileno())
        handle.close()
        raise
    across.forget(handle.name)
    return handle


def _open_named(
    name: str,
    size: int,
    version: str,
    timeout: float,
    ready: Ready | None,
    serve: bool | None,
    kexec: bool,
    *,
    huge: bool,
) -> Handle:
    """Find a memfd by its image's name, wherever it is, or make one."""
    until = time.monotonic() + timeout
    lost: SourceError | None = None
    try:
        came = inherited.from_environment(name)
    except SourceError as error:
        # A holder answers to the name as well.
        came, lost = None, error
    while True:
        left = max(until - time.monotonic(), 0.0)
        listener = None
        if came is not None:
            handle = _inherited(came, name, size, version, left, ready)
            listener = came.listener
        elif (offer := successor.ask(name, version, until)) is not None:
            with offer:
                if offer.store:
                    given = Inherited(offer.keep(), None, None, "hold")
                    handle = _inherited(given, name, size, version, left, ready)
                else:
                    handle = offer.take(name, version, ready, serve=serve is not False)
        elif lost is not None:
            raise lost
        elif (stored := inherited.from_systemd(name)) is not None:
            handle = _inherited(stored, name, size, version, left, ready)
        elif (fd := transports.find(name)) is not None:
            handle = _open_fd(fd, name, size, version, left, ready)
            handle.transport = "found"
        elif (fd := across.find(name, insist=kexec)) is not None:
            handle = _open_fd(fd, name, size, version, left, ready)
            handle.transport = "kexec"
        else:
            handle = _new_memfd(name, size, version, huge=huge, executable=kexec)
            handle.transport = "new"
        try:
            _preserved(handle, kexec)
            if serve or (serve is None and handle.transport != "hold"):
                # Who was given the image has its name; with a new one there may be somebody who was faster.
                _served(handle, replace=handle.transport == "exec")
        except BusyError:
            if handle.transport != "new":
                raise
            continue
        except LuoExistsError:
            # Who was faster has preserved its image, and will soon answer to the name.
            if handle.transport != "new" or time.monotonic() >= until:
                raise
            time.sleep(POLL)
            continue
        finally:
            if listener is not None:
                os.close(listener)
        if handle.transport != "hold":
            handle.stored = inherited.store(name, handle.fileno())
        return handle


def _inherited(came: Inherited, name: str, size: int, version: str, timeout: float, ready: Ready | None) -> Handle:
    """Own a memfd that this process was given; the descriptors are the handle's from now on."""
    where = f"{name!r} ({came.transport})"
    if came.lock_fd is None and blank(came.fd):
        # A holder has said how large it is to be.
        handle = _new(came.fd, max(os.fstat(came.fd).st_size - HEAD, 0) or size, name, version, where, None)
    else:
        handle = _adopt(Candidate.of(Image(came.fd, where, lock_fd=came.lock_fd)), name, version, timeout, ready)
    handle.transport = came.transport
    return handle


def _adopt(candidate: Candidate, name: str, version: str, timeout: float, ready: Ready | None) -> Handle:
    try:
        candidate.check(name, version)
        if ready is not None:
            ready(candidate)
        return candidate.adopt(timeout, version=version)
    finally:
        candidate.close()


def _new(fd: int, size: int, name: str, version: str, where: str, path: Path | None) -> Handle:
    """Make an image in a blank file, and lock it before anybody else can find it."""
    image = Image.create(fd, size, name, version, where)
    try:
        if path is not None:
            try:
                _link(fd, path)
            except FileExistsError:
                raise
            except OSError as error:
                raise SourceError(f"{path}: {error.strerror}") from error
            image.path = path
        return Handle(image, image.committed(), inherited=False)
    except BaseException:
        image.close()
        raise


def _link(fd: int, path: Path) -> None:
    """Give a nameless file its name. Raises: OSError."""
    # With a directory's descriptor, which an absolute path ignores, it is linkat, which follows the link.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def _new_memfd(name: str, size: int, version: str, *, huge: bool, executable: bool) -> Handle:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (MFD_HUGETLB if huge else 0) | (MFD_EXEC if executable else 0)
    where = f"memfd {name!r}"
    try:
        # The kernel takes 249 bytes of a name.
        fd = os.memfd_create(f"kho-live:{name.encode()[:200].decode(errors='ignore')}", flags)
    except PermissionError as error:
        raise SourceError(f"{where}: {error.strerror}: vm.memfd_noexec is 2, and 1 is what kexec=True needs") from error
    except OSError as error:
        raise SourceError(f"{where}: {error.strerror}") from error
    return _new(fd, -(-size // HUGE) * HUGE if huge else size, name, version, where, None)


def _open_fd(fd: int, name: str, size: int, version: str, timeout: float, ready: Ready | None) -> Handle:
    where = f"descriptor {fd}"
    try:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0) if blank(fd) else None
    except OSError as error:
        raise SourceError(f"{where}: {error.strerror}") from error
    if own is None:
        return _adopt(attach(fd), name, version, timeout, ready)
    return _new(own, size, name, version, where, None)


def _open_path(path: Path, name: str, size: int, version: str, timeout: float, ready: Ready | None) -> Handle:
    until = time.monotonic() + timeout
    while True:
        try:
            image = Image(open_file(path), str(path), path)
        except FileNotFoundError:
            image = None
        try:
            if image is not None:
                return _adopt(Candidate.of(image), name, version, max(until - time.monotonic(), 0.0), ready)
            return _new(_nameless(path), size, name, version, str(path), path)
        except (FileExistsError, StaleError):
            # Somebody was faster: made it, or released it.
            continue


def _nameless(path: Path) -> int:
    """Make a file that takes its name when it is complete. Raises: SourceError."""
    try:
        return os.open(path.parent, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
    except OSError as error:
        raise SourceError(f"{path}: make a file in {path.parent}: {error.strerror}; tmpfs, ext4 and xfs can") from error
