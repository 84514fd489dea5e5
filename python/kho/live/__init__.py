"""Memory that outlives its process: a service restarts and finds its data in place, without a copy.

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

*Handing over by socket.* prepare: the owner passes a descriptor for reading, and holds changes up; the successor reads,
and checks whether it is fit. adopt: the owner lets go of the lock and passes a descriptor for writing, and the
successor takes the lock, and the name with it. adopted: the owner tries for the lock, and if it does not get it, it
drains. If it gets it, then or when the connection breaks before, it goes on: the lock decides, not what was heard. The
connection stays open while the owner before, or a child of it, may be reading; until then the successor keeps what it
replaces (`successor.Predecessor`).

*Files* with a name are looked at, on the opened descriptor, before anything of them is used (`trust`). All waits of
`open` take from one deadline (`deadline`). `oserrors` makes what the operating system refuses an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BusyError, LuoBusyError, LuoExistsError, ParameterError, SourceError, StaleError
from ..formats.live import PAGE, Item, check_name
from ..sizes import parse_size
from . import transports
from .deadline import Deadline
from .file.header import HEAD
from .file.image import LEAST, Image, blank, open_file
from .file.trust import Policy, Trust, check_descriptor, open_directory, path_of, policy_of
from .handle import Candidate, Handle
from .handover import client
from .handover.client import Ready
from .oserrors import error_of
from .reader import Reader
from .transports import inherited
from .transports import kexec as across
from .transports.inherited import Inherited
from .transports.inherited import execute as exec  # noqa: A004 - kho.live.exec reads like os.execv

__all__ = ["Candidate", "Handle", "Item", "Reader", "Trust", "attach", "exec", "open", "transports"]

if TYPE_CHECKING:
    from . import safetensors as safetensors

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
    timeout: float | None = 0.0,
    ready: Ready | None = None,
    serve: bool | None = None,
    kexec: bool = False,
    trust: Trust = "private",
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
        timeout: seconds to wait for an owner that is about to let go, or busy, and for whatever else another process
            may keep from happening: the call ends within half a second after them, apart from the time that `ready` and
            reading the image take. 0: no wait for a turn, only, for moments, for the answers of a process that hands
            over. None: as long as it takes.
        ready: the health check: it is given the image as a `Candidate` before anything changes, and what it raises
            leaves the owner in office.
        serve: answer to the image's name, in a thread. By default memfds are, unless a holder does.
        kexec: preserve it for the next kernel (`Handle.preserve`), or refuse. What the last kernel preserved is found
            either way; with True also a device that cannot be asked is an error, rather than a reason to begin anew.
        trust: whose files are used: "private", this user's and root's, which no other may write, with one name, in a
            directory in which no other may rename them; a number, also that user's; "directory", whatever directory
            they are in; "any", any regular file: users who may write it can cut it short, which kills this process.

    Raises: BusyError if another process owns it, or does not answer; SchemaError for another name or version, with
        both; FormatError for an image that is torn or was tampered with; UntrustedError for a file that others may
        change; OutOfMemoryError; DescriptorLimitError; ParameterError; SourceError; LuoError with kexec=True.

    """
    check_name(name)
    if "\0" in version or len(version.encode()) > 255:
        raise ParameterError(f"version {version!r}: at most 255 bytes without NUL")
    nbytes = size_of(size)
    deadline, policy = Deadline(timeout), policy_of(trust)
    if kexec:
        if not isinstance(backing, int) and backing != "memfd":
            raise ParameterError(f"backing {os.fspath(backing)!r}: memfds go across a kexec, use backing='memfd'")
        # Before anybody hands over to a process that then refuses.
        across.check()
    if backing in ("memfd", "hugetlb"):
        wanted = Wanted(name, nbytes, version, ready, serve, kexec, backing == "hugetlb", deadline, policy)
        return _open_named(wanted)
    wanted = Wanted(name, nbytes, version, ready, serve, kexec, False, deadline, policy)
    if isinstance(backing, int):
        handle = _preserved(_open_fd(backing, wanted), wanted)
    else:
        handle = _open_path(path_of(backing), wanted)
    return _served(handle, wanted) if serve else handle


def attach(source: str | os.PathLike[str] | int, *, lock_fd: int | None = None, trust: Trust = "private") -> Candidate:
    """Read an image whose owner may still have it. To be able to read the file is enough, but for `adopt`.

    Args: source: its path, or a descriptor, which is duplicated. lock_fd: the owner's own lock, kept across exec
        (`Handle.lock_fileno`); it is the candidate's from now on. trust: whose files are used, as for `open`.
    Raises: SourceError; UntrustedError for a file that others may change; FormatError for an image that is torn or was
        tampered with.
    """
    policy = policy_of(trust)
    if isinstance(source, int):
        where = f"descriptor {source}"
        try:
            own = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 0)
        except (OSError, ValueError, OverflowError) as error:
            failed = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
            raise error_of(failed, where) from error
        image = Image(own, where, lock_fd=lock_fd, policy=policy)
    else:
        path = path_of(source)
        try:
            fd = open_file(path, policy, reading=True)
            image = Image(fd, str(path), path, lock_fd=lock_fd, policy=policy)
        except FileNotFoundError as error:
            raise SourceError(f"{path}: no such file") from error
    return Candidate.of(image)


def size_of(size: int | str) -> int:
    size = parse_size(size, "size")
    if size < LEAST or size > 1 << 46:
        raise ParameterError(f"size {size:#x}: at least {LEAST:#x} bytes are needed, at most {1 << 46:#x}")
    return -(-size // PAGE) * PAGE


class Wanted(NamedTuple):
    """What `open` was asked for."""

    name: str
    size: int
    version: str
    ready: Ready | None
    serve: bool | None
    kexec: bool
    huge: bool
    deadline: Deadline
    policy: Policy


def _served(handle: Handle, wanted: Wanted, *, replace: bool = False) -> Handle:
    """Have a new owner answer to its image's name, or be none. Raises: BusyError, SourceError."""
    try:
        handle.serve(replace=replace, deadline=wanted.deadline)
    except BaseException:
        handle.close()
        raise
    return handle


def _preserved(handle: Handle, wanted: Wanted) -> Handle:
    """Settle with the kernel whose the image is. Raises: LuoError; the image stays in this process, for another try."""
    try:
        if wanted.kexec:
            handle.preserve(deadline=wanted.deadline)
        else:
            across.finish(handle.name)
    except BaseException as error:
        if isinstance(error, LuoBusyError) and not wanted.kexec:
            return handle  # it has adopted it, and a kernel that cannot finish yet is asked again by `preserve`
        if handle.inherited:
            across.keep(handle.name, handle.fileno())
        handle.close()
        raise
    across.forget(handle.name)
    return handle


def _open_named(wanted: Wanted) -> Handle:
    """Find a memfd by its image's name, wherever it is, or make one."""
    name, deadline = wanted.name, wanted.deadline
    lost: SourceError | None = None
    try:
        came = inherited.from_environment(name)
    except SourceError as error:
        # A holder answers to the name as well.
        came, lost = None, error
    while True:
        listener = None
        if came is not None:
            try:
                handle = _inherited(came, wanted)
            except BaseException:
                if came.listener is not None:
                    os.close(came.listener)
                raise
            listener = came.listener
        elif (offer := client.ask(name, wanted.version, deadline)) is not None:
            with offer:
                if offer.store:
                    handle = _inherited(Inherited(offer.keep(), None, None, "hold"), wanted)
                else:
                    serve = wanted.serve is not False
                    handle = offer.take(name, wanted.version, wanted.ready, deadline, serve=serve, policy=wanted.policy)
        elif lost is not None:
            raise lost
        elif (stored := inherited.from_systemd(name)) is not None:
            handle = _inherited(stored, wanted)
        elif (fd := transports.find(name)) is not None:
            handle = _open_fd(fd, wanted)
            handle.transport = "found"
        elif (fd := across.find(name, insist=wanted.kexec, deadline=deadline)) is not None:
            handle = _open_fd(fd, wanted)
            handle.transport = "kexec"
        else:
            handle = _new_memfd(wanted)
            handle.transport = "new"
        try:
            _preserved(handle, wanted)
            if wanted.serve or (wanted.serve is None and handle.transport != "hold"):
                # Who was given the image has its name; with a new one there may be somebody who was faster.
                _served(handle, wanted, replace=handle.transport == "exec")
        except BusyError:
            if handle.transport != "new" or not deadline.sleep(POLL / 10):
                raise
            continue
        except LuoExistsError:
            # Who was faster has preserved its image, and will soon answer to the name.
            if handle.transport != "new" or not deadline.left() or not deadline.sleep(POLL):
                raise
            continue
        finally:
            if listener is not None:
                os.close(listener)
        if handle.transport != "hold":
            with deadline.wait() as seconds:
                handle.stored = inherited.store(name, handle.fileno(), seconds)
        return handle


def _inherited(came: Inherited, wanted: Wanted) -> Handle:
    """Own a memfd that this process was given; the descriptors are the handle's from now on."""
    where = f"{wanted.name!r} ({came.transport})"
    try:
        new = came.lock_fd is None and _blank(came.fd, where, wanted.policy)
    except BaseException:
        os.close(came.fd)
        raise
    if new:
        # A holder has said how large it is to be.
        size = max(os.fstat(came.fd).st_size - HEAD, 0) or wanted.size
        handle = _new(came.fd, wanted._replace(size=size), where, None)
    else:
        handle = _adopt(Candidate.of(Image(came.fd, where, lock_fd=came.lock_fd, policy=wanted.policy)), wanted)
    handle.transport = came.transport
    return handle


def _blank(fd: int, where: str, policy: Policy) -> bool:
    """Say whether an image is to be made in a descriptor's file. Raises: SourceError, UntrustedError."""
    check_descriptor(fd, where, policy)
    try:
        return blank(fd)
    except OSError as error:
        raise error_of(error, where, "read") from error


def _adopt(candidate: Candidate, wanted: Wanted) -> Handle:
    try:
        candidate.check(wanted.name, wanted.version)
        if wanted.ready is not None:
            with wanted.deadline.suspended():
                wanted.ready(candidate)
        return candidate.adopt(wanted.deadline.left(), version=wanted.version)
    finally:
        candidate.close()


def _new(fd: int, wanted: Wanted, where: str, path: Path | None) -> Handle:
    """Make an image in a blank file, and lock it before anybody else can find it."""
    image = Image.create(fd, wanted.size, wanted.name, wanted.version, where)
    try:
        if path is not None:
            _link(fd, path, wanted.policy)
            image.path = path
        return Handle(image, image.committed(), inherited=False)
    except BaseException:
        image.close()
        raise


def _link(fd: int, path: Path, policy: Policy) -> None:
    """Give a nameless file its name, unless there is one already. Raises: FileExistsError; SourceError."""
    try:
        at = open_directory(path, policy)
        try:
            # With a directory's descriptor it is linkat, which follows the link.
            os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=True)
        finally:
            os.close(at)
    except FileExistsError:
        raise
    except OSError as error:
        raise error_of(error, path, "give it its name") from error


def _new_memfd(wanted: Wanted) -> Handle:
    huge, executable = MFD_HUGETLB if wanted.huge else 0, MFD_EXEC if wanted.kexec else 0
    where = f"memfd {wanted.name!r}"
    try:
        # The kernel takes 249 bytes of a name.
        label = f"kho-live:{wanted.name.encode()[:200].decode(errors='ignore')}"
        fd = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | huge | executable)
    except OSError as error:
        hint = "vm.memfd_noexec is 2, and 1 is what kexec=True needs" if error.errno == errno.EACCES else ""
        raise error_of(error, where, "memfd_create", hint) from error
    size = -(-wanted.size // HUGE) * HUGE if wanted.huge else wanted.size
    return _new(fd, wanted._replace(size=size), where, None)


def _open_fd(fd: int, wanted: Wanted) -> Handle:
    where = f"descriptor {fd}"
    try:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, ValueError, OverflowError) as error:
        failed = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        raise error_of(failed, where) from error
    try:
        new = _blank(own, where, wanted.policy)
    except BaseException:
        os.close(own)
        raise
    if new:
        return _new(own, wanted, where, None)
    return _adopt(Candidate.of(Image(own, where, policy=wanted.policy)), wanted)


def _open_path(path: Path, wanted: Wanted) -> Handle:
    while True:
        try:
            image = Image(open_file(path, wanted.policy), str(path), path, policy=wanted.policy)
        except FileNotFoundError:
            image = None
        except StaleError:
            if not wanted.deadline.sleep(POLL / 10):
                raise
            continue
        try:
            if image is not None:
                return _adopt(Candidate.of(image), wanted)
            return _new(_nameless(path, wanted.policy), wanted, str(path), path)
        except (FileExistsError, StaleError) as error:
            # Another process was faster: made it, or released it.
            if not wanted.deadline.sleep(POLL / 10):
                raise BusyError(f"{path}: other processes make and release it all the time") from error


def _nameless(path: Path, policy: Policy) -> int:
    """Make a file that takes its name when it is complete. Raises: SourceError, UntrustedError."""
    try:
        at = open_directory(path, policy)
        try:
            return os.open(f"/proc/self/fd/{at}", os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
        finally:
            os.close(at)
    except OSError as error:
        hint = "tmpfs, ext4 and xfs can do that" if error.errno in (errno.EOPNOTSUPP, errno.EISDIR) else ""
        raise error_of(error, path, f"make a file in {path.parent}", hint) from error
