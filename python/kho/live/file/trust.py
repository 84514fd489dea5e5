"""Checks of owner, mode and directory of a file, on its opened descriptor, before it is read, mapped or written.

A user who may write an image may also truncate it, which kills every process that maps it; a user who may read it sees
the service's data. So a file is used only if it is a regular file of this user or root, with a single name, which no
other user may write. The descriptor is checked, which no rename affects. The name is looked up in a directory that
passes the same checks, and must not be a symbolic link. Directories above are not checked: a rename there leads to
another file, which has to pass the same checks.

A descriptor without a name (a memfd) is reached only by processes it was passed to, so its mode does not matter.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import stat
from pathlib import Path
from typing import Literal, NamedTuple

from ...errors import ParameterError, SourceError, StaleError, UntrustedError
from ..oserrors import error_of

__all__ = [
    "PRIVATE",
    "Policy",
    "Trust",
    "check_descriptor",
    "open_directory",
    "open_trusted",
    "path_of",
    "policy_of",
    "private_directory",
    "same_file",
    "trusted",
]

Trust = Literal["private", "directory", "any"] | int
"""Values of `trust=`. "private": files of this user or root, which no other user may write, in a directory in which no
other user may rename them. A number: also files and directories of that user. "directory": in any directory; users who
may write it can remove the image, or replace it by another file of this user. "any": any regular file."""
PROC_FD = re.compile(r"/proc/(?:self|thread-self|[0-9]+)(?:/task/[0-9]+)?/fd/[0-9]+|/dev/fd/[0-9]+")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Policy(NamedTuple):
    """The checks that a value of `trust=` stands for."""

    uid: int | None
    """Another user whose files are trusted."""
    directory: bool
    """Whether the directory is checked."""
    file: bool
    """Whether owner, mode and names of the file are checked."""


PRIVATE = Policy(None, True, True)


def policy_of(trust: Trust) -> Policy:
    """Check `trust=`. Raises: ParameterError."""
    if isinstance(trust, int) and not isinstance(trust, bool) and 0 <= trust < 1 << 32:
        return Policy(trust, True, True)
    known = {"private": PRIVATE, "directory": Policy(None, False, True), "any": Policy(None, False, False)}
    if not isinstance(trust, str) or trust not in known:
        raise ParameterError(f"trust {trust!r}: 'private', 'directory', 'any', or the number of a user")
    return known[trust]


def path_of(path: str | os.PathLike[str]) -> Path:
    """Convert a path. Raises: ParameterError if it contains NUL."""
    if "\0" in os.fspath(path):
        raise ParameterError(f"path {os.fspath(path)!r}: a path has no NUL")
    return Path(path)


def trusted(uid: int, policy: Policy = PRIVATE) -> bool:
    """Return whether a user is trusted: this one, root, and the one that the policy names."""
    return uid in (0, os.geteuid()) or uid == policy.uid


def user(uid: int) -> str:
    """Return a user's number and, if there is one, name."""
    with contextlib.suppress(KeyError):
        return f"{uid} ({pwd.getpwuid(uid).pw_name})"
    return str(uid)


def check_descriptor(fd: int, where: str, policy: Policy = PRIVATE) -> os.stat_result:
    """Check the file of a descriptor; returns its status. Raises: SourceError, UntrustedError; the fd stays open."""
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise error_of(error, where) from error
    if stat.S_ISLNK(status.st_mode):
        raise UntrustedError(
            f"{where}: a symbolic link, which is not followed; give the path that it leads to, or say trust='any'"
        )
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{where}: not a file")
    if not policy.file:
        return status
    if not trusted(status.st_uid, policy):
        raise UntrustedError(
            f"{where}: of user {user(status.st_uid)}, who may read what is written to it, and cut it short under its "
            f"readers; take a path in a directory of your own, or say trust={status.st_uid} if you trust that user"
        )
    mode = stat.S_IMODE(status.st_mode)
    if status.st_nlink and mode & OTHERS_WRITE:
        raise UntrustedError(
            f"{where}: mode {mode:#o}: others may write it, and cut it short under its readers; `chmod go-w` it if you "
            "trust what is in it, or say trust='any'"
        )
    if status.st_nlink > 1:
        raise UntrustedError(
            f"{where}: the file has {status.st_nlink} names (hard links), and may be another one than it seems; remove "
            "the others (`find -samefile`), or say trust='any'"
        )
    return status


def _check_directory(status: os.stat_result, where: Path, policy: Policy) -> None:
    remedy = "take a directory of your own (mode 0700), or say trust='directory' if you trust those users"
    if not trusted(status.st_uid, policy):
        raise UntrustedError(
            f"{where}: a directory of user {user(status.st_uid)}, who may replace what is in it; {remedy}"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_ISVTX or not mode & OTHERS_WRITE:
        return
    if mode & stat.S_IWOTH or not _private_group(status.st_gid):
        raise UntrustedError(f"{where}: a directory of mode {mode:#o}: others may replace what is in it; {remedy}")


def _private_group(gid: int) -> bool:
    """Return whether a group is this user's private group (USERGROUPS_ENAB of login.defs): same name, no members."""
    try:
        group, own = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return gid == os.getegid() and group.gr_name == own and set(group.gr_mem) <= {own}


def open_directory(path: Path, policy: Policy = PRIVATE) -> int:
    """Open the directory of an image's file, to look names up (O_PATH).

    Raises: UntrustedError if other users may rename files in it; SourceError; FileNotFoundError.
    """
    folder = path.parent
    try:
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise error_of(error, folder, "open the directory") from error
    try:
        if policy.directory:
            _check_directory(os.fstat(fd), folder, policy)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_trusted(path: Path, policy: Policy = PRIVATE, flags: int = os.O_RDWR) -> int:
    """Open a file that the policy trusts.

    It is checked before it is opened for reading and writing: opening a device or a pipe can have side effects.
    Raises: UntrustedError, SourceError; FileNotFoundError; StaleError if it was removed at the same time.
    """
    named = PROC_FD.fullmatch(os.fspath(path)) is None
    if path.name in ("", ".."):
        raise SourceError(f"{path}: not a file")
    look = os.O_PATH | os.O_CLOEXEC
    try:
        if not named or not policy.file:
            found = os.open(path, look)
        else:
            at = open_directory(path, policy)
            try:
                found = os.open(path.name, look | os.O_NOFOLLOW, dir_fd=at)
            finally:
                os.close(at)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise error_of(error, path) from error
    try:
        status = check_descriptor(found, str(path), policy)
        if named and not status.st_nlink:
            raise StaleError(f"{path}: it was removed while it was being opened")
        return os.open(f"/proc/self/fd/{found}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise error_of(error, path, "open") from error
    finally:
        os.close(found)


def private_directory(path: Path, *, make: bool, hint: str = "") -> int:
    """Open a directory of mode 0700 that belongs to this user (O_PATH).

    Args: make: make it if it is missing, whatever the umask. hint: the remedy where it cannot be made.
    Raises: UntrustedError if it belongs to another user, or others may enter it; SourceError; FileNotFoundError.
    """
    if make:
        try:
            path.mkdir(0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise error_of(error, path, "make the directory", hint) from error
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise error_of(error, path, "open the directory", hint) from error
    try:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISDIR(status.st_mode):
            raise UntrustedError(f"{path}: it must be a directory of your own; remove it, or {hint}")
        if not trusted(status.st_uid) or mode & 0o077:
            raise UntrustedError(
                f"{path}: of user {user(status.st_uid)}, mode {mode:#o}; it must be yours alone: mode 0o700; `chmod "
                f"700` or remove it, or {hint}"
            )
        if mode & 0o700 != 0o700 and status.st_uid == os.geteuid():
            # A umask took the owner's bits when it was made. O_PATH descriptors have no fchmod.
            os.chmod(f"/proc/self/fd/{fd}", 0o700)  # noqa: PTH101
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError) and not isinstance(error, SourceError):
            raise error_of(error, path, "chmod 700", hint) from error
        raise
    return fd


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Return whether two descriptors lead to the same file."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
