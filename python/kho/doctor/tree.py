"""Reads the files of a machine or of an untrusted snapshot: bounded, without leaving the tree, without blocking.

A snapshot may be hostile or broken: links that leave the tree, FIFOs, devices, gigabytes of data, missing permissions.
None of these raises; a file that exists and could not be read is listed in `Tree.unread`.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from ..sizes import format_size

FILE_LIMIT = 4 << 20
"""Maximum number of bytes read from a file. The rest, or the middle if the tail is read too, is skipped."""
TREE_LIMIT = 64 << 20
"""Maximum number of bytes read from a tree."""
ENTRY_LIMIT = 1024
"""Maximum number of names read from a directory."""
LINK_LIMIT = 40
"""Maximum number of links followed for a path; Linux has the same limit."""
TEXT_LIMIT = 240
"""Maximum number of characters in the text of evidence."""


class Unread(NamedTuple):
    """A file or directory that exists but was not read, or only in part."""

    file: str
    why: str


class Piece(NamedTuple):
    """The content read from a file; `tail` is its end if the middle was skipped."""

    file: str
    head: bytes
    tail: bytes = b""
    before: int | None = 0
    """Number of lines before this piece, if it is a section of the file; None if unknown."""

    def line(self, at: int) -> int | None:
        """Return the line number, counted from 1, of an offset in `head`."""
        return None if self.before is None else self.before + self.head.count(b"\n", 0, at) + 1


def clean(text: bytes | str) -> str:
    """Make text from a file printable: valid Unicode, no control characters, at most `TEXT_LIMIT` characters."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    shown = text[: 4 * TEXT_LIMIT].decode("utf-8", "replace").strip()
    shown = "".join(c if c.isprintable() else " " if c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in shown)
    return shown if len(shown) <= TEXT_LIMIT else shown[: TEXT_LIMIT - 1] + "\N{HORIZONTAL ELLIPSIS}"


class Tree:
    """Files below a root directory. Names and absolute links are relative to the root."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root = os.fspath(root)
        self.live = os.path.realpath(self.root) == "/"
        self.unread: list[Unread] = []
        self.folder = ""
        """The directory below the root that has the report, if it is not the root; file names are relative to it."""
        self.layout: str | None = None
        """The kind of collection ("an sosreport"), if a collector made the tree."""
        self.elsewhere: list[str] = []
        """Directories that look like reports, if more than one does: one of them must be named."""
        self.kept: dict[str, Piece] = {}
        """Sections of files, by the name that their content has on the machine itself ("proc/meminfo")."""
        self._budget = TREE_LIMIT

    def enter(self, folder: str) -> None:
        """Make a directory of the tree the root."""
        self.root = os.path.join(self.root, folder)
        self.folder = folder

    def note_unread(self, file: str, why: str) -> None:
        """Record that a file was not read; the same entry is recorded once."""
        entry = Unread(clean(file), clean(why))
        if entry not in self.unread and len(self.unread) < 100:
            self.unread.append(entry)

    def _resolve(self, file: str) -> tuple[str, os.stat_result] | None:
        """Resolve a name without leaving the tree: the path without links, and its stat; None if it is absent."""
        todo = [part for part in file.split("/") if part][::-1]
        here: list[str] = []
        links = 0
        linked = 0
        found = None
        while todo:
            part = todo.pop()
            of_link = links > 0 and len(todo) >= linked
            if part == ".":
                continue
            if part == "..":
                if not here and of_link:
                    self.note_unread(file, "a link leads out of the tree")
                    return None
                here = here[:-1]
                continue
            path = os.path.join(self.root, *here, part)
            try:
                found = os.lstat(path)
                target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else None
            except (FileNotFoundError, NotADirectoryError):
                if of_link and not self.live:
                    self.note_unread(file, "a link to a file that is not in the tree")
                return None
            except (OSError, ValueError) as error:
                self.note_unread(file, _reason(error))
                return None
            if target is None:
                here.append(part)
                continue
            links += 1
            if links > LINK_LIMIT:
                self.note_unread(file, "too many links")
                return None
            if target.startswith("/"):
                here = []
            linked = min(linked, len(todo)) if of_link else len(todo)
            todo += [part for part in target.split("/") if part][::-1]
        path = os.path.join(self.root, *here)
        try:
            return path, os.lstat(path)
        except (OSError, ValueError) as error:
            self.note_unread(file, _reason(error))
            return None

    def exists(self, name: str) -> bool:
        """Return whether a file or directory exists. Records nothing in `unread`."""
        try:
            return os.path.lexists(os.path.join(self.root, name))
        except (OSError, ValueError):
            return False

    def is_folder(self, name: str) -> bool:
        """Return whether a name is a directory, and not a link to one."""
        try:
            return stat.S_ISDIR(os.lstat(os.path.join(self.root, name)).st_mode)
        except (OSError, ValueError):
            return False

    def stat(self, file: str) -> os.stat_result | None:
        """Return the stat of a file; None if it is absent."""
        place = self._resolve(file)
        return None if place is None else place[1]

    def read(self, file: str, limit: int = FILE_LIMIT, tail: int = 0) -> Piece | None:
        """Read a regular file: its first `limit` bytes and its last `tail`; None if it is absent or unreadable."""
        place = self._resolve(file)
        if place is None:
            return None
        path, found = place
        if not stat.S_ISREG(found.st_mode):
            self.note_unread(file, "not a regular file")
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            self.note_unread(file, _reason(error))
            return None
        try:
            size = os.fstat(fd).st_size
            head = self._read_bytes(fd, limit)
            end = b""
            if len(head) >= limit and (size > limit or os.read(fd, 1)):
                kept = min(tail, max(size - limit, 0))
                if kept:
                    os.lseek(fd, size - kept, os.SEEK_SET)
                    end = self._read_bytes(fd, kept)
                self.note_unread(
                    file,
                    f"{size - len(head) - len(end)} of {size} bytes" if size > limit else f"what follows {limit} bytes",
                )
            elif self._budget <= 0:
                self.note_unread(file, f"the limit of {format_size(TREE_LIMIT)} for a tree is used up")
        except OSError as error:
            self.note_unread(file, _reason(error))
            return None
        finally:
            os.close(fd)
        return Piece(file, head, end)

    def peek(self, file: str, nbytes: int) -> bytes:
        """Return the first bytes of a file. Records nothing in `unread`, and does not count for the tree's limit."""
        kept, left = list(self.unread), self._budget
        piece = self.read(file, nbytes)
        self.unread[:], self._budget = kept, left
        return piece.head if piece is not None else b""

    def _read_bytes(self, fd: int, limit: int) -> bytes:
        """Read up to `limit` bytes, or fewer at the end of the file or of the tree's limit."""
        parts = []
        while (want := min(limit, self._budget, 1 << 18)) > 0 and (part := os.read(fd, want)):
            parts.append(part)
            limit -= len(part)
            self._budget -= len(part)
        return b"".join(parts)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names in a directory; empty if it is absent or unreadable."""
        place = self._resolve(folder) if folder else (self.root, os.stat(self.root))
        if place is None:
            return []
        if not stat.S_ISDIR(place[1].st_mode):
            self.note_unread(folder, "not a directory")
            return []
        found: list[str] = []
        try:
            with os.scandir(place[0]) as entries:
                for entry in entries:
                    if len(found) >= ENTRY_LIMIT:
                        self.note_unread(folder, f"more than {ENTRY_LIMIT} names")
                        break
                    found.append(entry.name)
        except (OSError, ValueError) as error:
            self.note_unread(folder, _reason(error))
        return sorted(found)

    def links(self, folder: str) -> list[tuple[str, str]]:
        """Return (name, target) of the links in a directory, without following them."""
        place = self._resolve(folder)
        found = []
        for name in self.names(folder) if place is not None else []:
            try:
                found.append((name, clean(os.readlink(os.path.join(place[0] if place else "", name)))))
            except (OSError, ValueError):
                continue
        return found


def _reason(error: OSError | ValueError) -> str:
    """Return the reason of a failed system call as text."""
    if isinstance(error, PermissionError):
        return "permission denied"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
