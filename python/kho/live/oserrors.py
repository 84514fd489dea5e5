"""What the operating system refuses, as kho's errors: one class per thing to do about it, and what that is."""

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
    """Make the error for what the operating system refused; `errno` is kept where the class has one.

    Args: where: the place. doing: what was tried. hint: the remedy that another place is, for what is the place's
        fault. pool: the remedy for a want of memory that is not the machine's.
    Returns: the error to raise; one of kho's own as it is.
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
    """Make the error for what the operating system refused to the Rust core, which tells it in its text."""
    found = re.search(r"\(os error ([0-9]{1,3})\)", str(error))
    if found is None:
        return error
    number = int(found[1])
    return error_of(OSError(number, os.strerror(number)), where, doing)


def no_descriptor(where: object, doing: str) -> KhoError | None:
    """Give the error if this process cannot open another descriptor: a passed one is dropped silently then."""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        return error_of(error, where, doing)
    return None
