"""The exceptions of kho: one class per reaction of a caller.

All derive from `KhoError` and, where a builtin exception has the same meaning, from that builtin too, so both
``except ValueError`` and ``except kho.KhoError`` work.
"""

from __future__ import annotations

from errno import errorcode

__all__ = [
    "AccessError",
    "BusyError",
    "CutOffError",
    "DescriptorLimitError",
    "ExistsError",
    "FdtError",
    "FinalizedError",
    "FormatError",
    "FreedFolioError",
    "KhoError",
    "LeftOutError",
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
    "MissingMemoryError",
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
    """Base class of all exceptions of kho. The message names the place, the value and the rule."""

    kind: str | None = None
    """The kind of error in a node of a map or list: unaligned, outside, order, count, cycle, shared, length, entry;
    start or block for an address that is not aligned to its order; devicetree for an FDT that is not a handover's;
    left out or cut off for a handover that may be in memory that is not in the file."""
    phys: int | None = None
    """Physical address of the error, or None."""


class ParameterError(KhoError, ValueError):
    """An invalid argument, such as a page size, a bitmap size or a scratch string."""


class MisalignedError(ParameterError):
    """A pfn or address that is not aligned as required (EINVAL)."""


class OrderError(ParameterError):
    """A folio order that exceeds the limit of the format or the allocator."""


class OutOfRangeError(ParameterError):
    """A pfn or address outside the address space."""


class NotStorableError(ParameterError, TypeError):
    """A value whose meaning an image cannot hold: a masked array, objects, a foreign dtype.

    The message has the remedy.
    """


class NotCopyableError(KhoError, TypeError):
    """A copy or pickle of an object that owns descriptors and a lock.

    Open the image a second time instead.
    """


class OutsideMemoryError(KhoError, LookupError):
    """An access to physical memory outside the image or arena."""


class MissingMemoryError(OutsideMemoryError):
    """Memory that the machine had and that its dump does not have."""


class LeftOutError(MissingMemoryError):
    """Memory that the filter of a dump left out, such as makedumpfile's levels.

    The message names the level and how to get a dump that has it.
    """


class ScratchOverlapError(KhoError, ValueError):
    """Preserved memory or metadata overlaps scratch, where the next kernel boots (EINVAL)."""


class FinalizedError(KhoError):
    """A change after `finalize` (EBUSY), or an `abort` before it."""


class ExistsError(KhoError):
    """A name or token that exists already (EEXIST)."""


class NotFoundError(KhoError, LookupError):
    """A subtree, node, property, session or file that does not exist (ENOENT)."""


class NotRestorableError(KhoError, LookupError):
    """A folio that was not preserved, or was restored before."""


class PageStateError(KhoError, ValueError):
    """A page in a state that does not allow the request: a double free, an `alloc_at` of a page in use."""


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
    """An object from before the arena was taken over."""


class FormatError(KhoError, ValueError):
    """A malformed structure in memory; the message names the place and the value."""


class FdtError(FormatError):
    """A flattened devicetree that is malformed, truncated, or does not fit its buffer."""


class UnsupportedAbiError(FormatError):
    """A `compatible` that this version of kho does not decode."""


class NoHandoverError(KhoError, LookupError):
    """No handover in the memory that was searched."""


class SourceError(KhoError, OSError):
    """A file, directory or address that cannot be read as physical memory."""


class CutOffError(MissingMemoryError, SourceError):
    """Memory that was in a part of the file that is gone: the file ends before what its headers promise."""


class AccessError(SourceError, PermissionError):
    """A file or directory without permission for this user (EACCES, EPERM)."""


class ReadOnlyError(SourceError):
    """A file or directory on a read-only file system (EROFS)."""


class UntrustedError(SourceError):
    """A file, directory or descriptor that another user may change.

    The message names owner, mode and the remedy.
    """


class DescriptorLimitError(KhoError, OSError):
    """Out of file descriptors, in this process (EMFILE) or on the machine (ENFILE)."""


class BusyError(KhoError):
    """An image that another process owns, or that is offered to a successor (EBUSY)."""


class NotOwnerError(KhoError):
    """A change to an image by a process that does not own it.

    A forked child does not, and the owner no longer does after `close`, `hand_over` or `release`.
    """


class SchemaError(KhoError, ValueError):
    """An image with another name or version than requested; the message names both."""


class LuoError(KhoError, OSError):
    """A refusal of /dev/liveupdate or of a session of it; `errno` is the kernel's.

    The message has the remedy.
    """

    def __str__(self) -> str:
        """Return the message, followed by the name of `errno`."""
        name = None if self.errno is None else errorcode.get(self.errno, self.errno)
        return super().__str__() if name is None else f"{self.strerror} ({name})"


class LuoUnavailableError(LuoError):
    """No live update device: the kernel does not support it, or was booted without `liveupdate=on`."""


class LuoPermissionError(LuoError, PermissionError):
    """No permission for the device (EPERM, EACCES)."""


class LuoBusyError(LuoError):
    """The device, a file or a session is in use, and may be free later (EBUSY).

    A session that cannot finish yet is in use, too.
    """


class LuoExistsError(LuoError, ExistsError):
    """A duplicate session name or token (EEXIST)."""


class LuoNotFoundError(LuoError, NotFoundError):
    """A session or token that the previous kernel did not hand over (ENOENT)."""


class LuoStateError(LuoError):
    """A session that is closed, was retrieved before, or has the other direction (EBADF, EINVAL)."""


class LuoFileError(LuoError):
    """A file that cannot be preserved: not a memfd, with huge pages, with unknown seals, or not open."""


class LuoRetrieveError(LuoError):
    """A file that the kernel could not restore.

    That is permanent: what remains is `finish` and a cold start.
    """


class LuoAbiError(LuoError):
    """A kernel with another version of a request, or without this request (EINVAL, E2BIG, ENOTTY)."""
