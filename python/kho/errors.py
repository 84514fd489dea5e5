"""The exceptions of kho: one class per thing a caller can do about it.

All derive from `KhoError` and, where a builtin says the same, from that builtin too, so that
``except ValueError`` and ``except kho.KhoError`` both read naturally.
"""

from __future__ import annotations

from errno import errorcode

__all__ = [
    "AccessError",
    "BusyError",
    "DescriptorLimitError",
    "ExistsError",
    "FdtError",
    "FinalizedError",
    "FormatError",
    "FreedFolioError",
    "KhoError",
    "LuoAbiError",
    "LuoBusyError",
    "LuoError",
    "LuoExistsError",
    "LuoFileError",
    "LuoNotFoundError",
    "LuoPermissionError",
    "LuoRetrieveError",
    "LuoStateError",
    "LuoUnavailableError",
    "MisalignedError",
    "NoHandoverError",
    "NotCopyableError",
    "NotFoundError",
    "NotOwnerError",
    "NotRestorableError",
    "NotStorableError",
    "OrderError",
    "OutOfMemoryError",
    "OutOfRangeError",
    "OutsideMemoryError",
    "OwnedPageError",
    "PageStateError",
    "ParameterError",
    "ReadOnlyError",
    "SchemaError",
    "ScratchOverlapError",
    "SourceError",
    "StaleError",
    "UnsupportedAbiError",
    "UntrustedError",
]


class KhoError(Exception):
    """Whatever kho refuses. The message names the place and the value."""

    kind: str | None = None
    """What is wrong with a node of a map or list: unaligned, outside, order, count, cycle, shared, length, entry, and
    start or block for an address that nothing of its order can have; devicetree for one that is no handover's root."""
    phys: int | None = None
    """The address it is wrong at, where the error is about one."""


class ParameterError(KhoError, ValueError):
    """An argument that makes no sense in itself: a page size, a bitmap size, a scratch string."""


class MisalignedError(ParameterError):
    """A pfn or address that is no multiple of what it must be (EINVAL)."""


class OrderError(ParameterError):
    """A folio order beyond what the format or the allocator knows."""


class OutOfRangeError(ParameterError):
    """A pfn or address beyond the address space."""


class NotStorableError(ParameterError, TypeError):
    """A value whose meaning an image cannot hold: a masked array, objects, a foreign dtype.

    The message has the remedy.
    """


class NotCopyableError(KhoError, TypeError):
    """A copy or pickle of an object that owns descriptors and a lock.

    Open the image a second time instead.
    """


class OutsideMemoryError(KhoError, LookupError):
    """Physical memory that the image or arena does not have."""


class ScratchOverlapError(KhoError, ValueError):
    """Preserved memory or metadata would lie in scratch, where the next kernel boots (EINVAL)."""


class FinalizedError(KhoError):
    """A change after `finalize` (EBUSY), or an `abort` before it."""


class ExistsError(KhoError):
    """A subtree name given twice (EEXIST)."""


class NotFoundError(KhoError, LookupError):
    """A subtree, node or property that is not there (ENOENT)."""


class NotRestorableError(KhoError, LookupError):
    """A folio that is not, or no longer, there to restore."""


class PageStateError(KhoError, ValueError):
    """A page in another state than the request needs: a double free, an `alloc_at` of a page in use."""


class FreedFolioError(PageStateError):
    """A use of a `Folio` or `Pages` after it was freed, through this object or another one.

    Its pages may be those of another folio by then.
    """


class OwnedPageError(PageStateError):
    """A page that holds a bitmap, the map, the FDT or a subtree of a handover.

    The caller cannot get, free or write it.
    `phys` is the page's address; the message names what it holds, and how to release it.
    """


class OutOfMemoryError(KhoError, MemoryError):
    """No memory in an arena or image (ENOMEM), a file system (ENOSPC), a memory cgroup, or this process."""


class StaleError(KhoError):
    """The arena was taken over since this object was made."""


class FormatError(KhoError, ValueError):
    """Memory that is not what a kernel would have written: the place and the value are in the message."""


class FdtError(FormatError):
    """A flattened devicetree that is malformed, cut short, or does not fit."""


class UnsupportedAbiError(FormatError):
    """A `compatible` this version of kho does not decode."""


class NoHandoverError(KhoError, LookupError):
    """No handover in the memory that was searched."""


class SourceError(KhoError, OSError):
    """A file, directory or address that cannot be read as physical memory."""


class AccessError(SourceError, PermissionError):
    """A file or directory that this user may not use (EACCES, EPERM)."""


class ReadOnlyError(SourceError):
    """A file or directory on a file system that is mounted read-only (EROFS)."""


class UntrustedError(SourceError):
    """A file, directory or descriptor that another user may change.

    The message names owner, mode and the remedy.
    """


class DescriptorLimitError(KhoError, OSError):
    """No descriptor is left, for this process (EMFILE) or for the machine (ENFILE)."""


class BusyError(KhoError):
    """An image that somebody else has, or that is offered to a successor (EBUSY)."""


class NotOwnerError(KhoError):
    """A change to an image by a process that does not own it.

    A forked child does not, and the owner no longer does after `close`, `hand_over` or `release`.
    """


class SchemaError(KhoError, ValueError):
    """An image of another name or version than was asked for. The message names both."""


class LuoError(KhoError, OSError):
    """A refusal of /dev/liveupdate or of a session of it; `errno` is the kernel's.

    The message has the remedy.
    """

    def __str__(self) -> str:
        """The sentence, and the kernel's name for it."""
        name = None if self.errno is None else errorcode.get(self.errno, self.errno)
        return super().__str__() if name is None else f"{self.strerror} ({name})"


class LuoUnavailableError(LuoError):
    """There is no live update device: the kernel has none, or was booted without `liveupdate=on`."""


class LuoPermissionError(LuoError, PermissionError):
    """The device may not be used by this user (EPERM, EACCES)."""


class LuoBusyError(LuoError):
    """The device, a file or a session is in use, and may be free later (EBUSY).

    A session that cannot finish yet is in use, too.
    """


class LuoExistsError(LuoError, ExistsError):
    """A session name or a token given twice (EEXIST)."""


class LuoNotFoundError(LuoError, NotFoundError):
    """A session or token that the last kernel did not hand over (ENOENT)."""


class LuoStateError(LuoError):
    """A session that is closed, was retrieved before, or is of the other direction (EBADF, EINVAL)."""


class LuoFileError(LuoError):
    """A file that cannot be preserved: no memfd, of huge pages, with unknown seals, not open."""


class LuoRetrieveError(LuoError):
    """A file that the kernel could not restore.

    That is permanent: what remains is `finish` and a cold start.
    """


class LuoAbiError(LuoError):
    """A kernel that knows another form of a request, or not this request (EINVAL, E2BIG, ENOTTY)."""
