"""Errors of the operating system as kho's exceptions: one class per remedy, with the remedy in the message."""

from __future__ import annotations

import errno
import os
import re
import resource

from ..errors import AccessError, DescriptorLimitError, KhoError, OutOfMemoryError, ReadOnlyError, SourceError

__all__ = ["error_of", "no_descriptor", "rust_error"]

KINDS: dict[int, type[KhoError]] = {
    errno.EMFILE: DescriptorLimitError,
    errno.ENFILE: DescriptorLimitError,
    errno.ENOMEM: OutOfMemoryError,
    errno.ENOSPC: OutOfMemoryError,
    errno.EDQUOT: OutOfMemoryError,
    errno.EFBIG: OutOfMemoryError,
    errno.EROFS: ReadOnlyError,
    errno.EACCES: AccessError,
    errno.EPERM: AccessError,
}


def _remedy(number: int | None) -> str:
    if number == errno.EMFILE:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"this process has as many descriptors open as it may (RLIMIT_NOFILE {limit}, hard limit {most}): raise "
            "that (`ulimit -n`, LimitNOFILE=), or close some"
        )
    if number == errno.ENFILE:
        return "the machine has as many files open as it may: raise fs.file-max (`sysctl fs.file-max`)"
    return {
        errno.ENOMEM: "the machine, or this process's memory cgroup or address space (`ulimit -v`), has no memory left",
        errno.ENOSPC: "free space or inodes (`df`, `df -i`), enlarge the file system, or take a smaller size=",
        errno.EDQUOT: "this user's quota is used up (`quota`): free some, or take a smaller size=",
        errno.EFBIG: "larger than a file may be here: raise `ulimit -f`, or take a smaller size=",
        errno.EROFS: "the file system is mounted read-only: take a path on another one, as tmpfs",
        errno.EACCES: f"user {os.geteuid()} may not: see owner and mode (`namei -l`), or take another path",
        errno.EPERM: f"user {os.geteuid()} may not: see owner, mode, attributes (`lsattr`) and the process's sandbox",
        errno.ELOOP: "a symbolic link leads in a circle, or is refused here: give the path that it leads to",
        errno.ENOTDIR: "a part of the path is not a directory",
        errno.ENAMETOOLONG: "take a shorter path",
        errno.ETXTBSY: "the file is being executed: take another",
        errno.ENOLCK: "the kernel has no memory for locks, or this file system has none: take a path on tmpfs",
    }.get(number or 0, "")


def error_of(error: OSError, where: object, doing: str = "", hint: str = "", pool: str = "") -> KhoError:
    """Convert an OSError to the exception to raise; `errno` is kept where the class has one.

    Args: where: the file or object. doing: the operation that failed. hint: the remedy if another file or directory
        helps. pool: the remedy if a pool of huge pages, not the machine's memory, is used up.
    Returns: the exception; one of kho's own is returned as it is.
    """
    if isinstance(error, KhoError):
        return error
    name = errno.errorcode.get(error.errno or 0)
    text = f"{where}: {doing}: " if doing else f"{where}: "
    text += error.strerror or str(error)
    text += f" ({name})" if name else ""
    kind = KINDS.get(error.errno or 0, SourceError)
    if issubclass(kind, OutOfMemoryError):
        remedy = pool or _remedy(error.errno)
    elif kind is DescriptorLimitError:
        remedy = _remedy(error.errno)
    else:
        remedy = hint or _remedy(error.errno)
    made = kind(f"{text}; {remedy}" if remedy else text)
    if isinstance(made, OSError):
        made.errno = error.errno
    return made


def rust_error(error: SourceError, where: object, doing: str) -> KhoError:
    """Convert an error of the operating system that the Rust core raised: its message has the number."""
    found = re.search(r"\(os error ([0-9]{1,3})\)", str(error))
    if found is None:
        return error
    number = int(found[1])
    return error_of(OSError(number, os.strerror(number)), where, doing)


def no_descriptor(where: object, doing: str) -> KhoError | None:
    """Return the error if this process cannot open another descriptor: the kernel then drops passed ones silently."""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        return error_of(error, where, doing)
    return None
