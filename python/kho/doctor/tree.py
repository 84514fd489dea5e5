"""Reading a machine, or a snapshot of one, whoever made it: bounded, never out of the tree, never waiting.

A snapshot may be hostile or broken: links that lead out, FIFOs, devices, gigabytes, no permission. Nothing of this
raises; what was there and could not be read is kept in `Tree.unread`.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

FILE_LIMIT = 4 << 20
"""Bytes read of a file; one with a tail loses its middle, others their end."""
TREE_LIMIT = 64 << 20
"""Bytes read of a tree in all."""
ENTRY_LIMIT = 1024
"""Names read of a directory."""
LINK_LIMIT = 40
"""Links followed for a path, as many as Linux follows."""
TEXT_LIMIT = 240
"""Characters of evidence that are kept."""


class Unread(NamedTuple):
    """Something that is there and was not read, or not wholly."""

    file: str
    why: str


class Piece(NamedTuple):
    """What was read of a file; `tail` is its end where the middle was left out."""

    file: str
    head: bytes
    tail: bytes = b""
    before: int | None = 0
    """Lines of the file before this piece, where it is a section of it; None where that is not known."""

    def line(self, at: int) -> int | None:
        """Give the line, counted from 1, of a place in `head`."""
        return None if self.before is None else self.before + self.head.count(b"\n", 0, at) + 1


def clean(text: bytes | str) -> str:
    """Make text from a file fit to print: valid Unicode, no control characters, not too long."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    shown = text[: 4 * TEXT_LIMIT].decode("utf-8", "replace").strip()
    shown = "".join(c if c.isprintable() else " " if c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in shown)
    return shown if len(shown) <= TEXT_LIMIT else shown[: TEXT_LIMIT - 1] + "\N{HORIZONTAL ELLIPSIS}"


class Tree:
    """Files below a root, named relative to it; absolute links in it are relative to it too."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root = os.fspath(root)
        self.live = os.path.realpath(self.root) == "/"
        self.unread: list[Unread] = []
        self.folder = ""
        """Where in the root the report is that was found deeper; names of files are relative to it."""
        self.layout: str | None = None
        """What the tree is, if a collector made it."""
        self.elsewhere: list[str] = []
        """Folders that look like reports, where it cannot be said which is meant."""
        self.kept: dict[str, Piece] = {}
        """What is kept as sections of other files, by the names the machine has for it."""
        self._left = TREE_LIMIT

    def enter(self, folder: str) -> None:
        """Take a folder of the tree for its root."""
        self.root = os.path.join(self.root, folder)
        self.folder = folder

    def skipped(self, file: str, why: str) -> None:
        """Note, once, that something was not read."""
        entry = Unread(clean(file), clean(why))
        if entry not in self.unread and len(self.unread) < 100:
            self.unread.append(entry)

    def _place(self, file: str) -> tuple[str, os.stat_result] | None:
        """Find a file without leaving the tree: its path, free of links, and what it is; None if there is none."""
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
                    self.skipped(file, "a link that leads out of the tree")
                    return None
                here = here[:-1]
                continue
            path = os.path.join(self.root, *here, part)
            try:
                found = os.lstat(path)
                target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else None
            except (FileNotFoundError, NotADirectoryError):
                if of_link and not self.live:
                    self.skipped(file, "a link to what the tree does not have")
                return None
            except (OSError, ValueError) as error:
                self.skipped(file, _reason(error))
                return None
            if target is None:
                here.append(part)
                continue
            links += 1
            if links > LINK_LIMIT:
                self.skipped(file, "too many links")
                return None
            if target.startswith("/"):
                here = []
            linked = min(linked, len(todo)) if of_link else len(todo)
            todo += [part for part in target.split("/") if part][::-1]
        path = os.path.join(self.root, *here)
        try:
            return path, os.lstat(path)
        except (OSError, ValueError) as error:
            self.skipped(file, _reason(error))
            return None

    def exists(self, name: str) -> bool:
        """Say whether there is a file or folder, without a word on why not."""
        try:
            return os.path.lexists(os.path.join(self.root, name))
        except (OSError, ValueError):
            return False

    def is_folder(self, name: str) -> bool:
        """Say whether there is a folder of this name, and no link to one."""
        try:
            return stat.S_ISDIR(os.lstat(os.path.join(self.root, name)).st_mode)
        except (OSError, ValueError):
            return False

    def stat(self, file: str) -> os.stat_result | None:
        """Say what a file is; None if there is none."""
        place = self._place(file)
        return None if place is None else place[1]

    def read(self, file: str, limit: int = FILE_LIMIT, tail: int = 0) -> Piece | None:
        """Read a regular file, at most `limit` bytes and its last `tail`; None if there is none or it says no."""
        place = self._place(file)
        if place is None:
            return None
        path, found = place
        if not stat.S_ISREG(found.st_mode):
            self.skipped(file, "no regular file")
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            self.skipped(file, _reason(error))
            return None
        try:
            size = os.fstat(fd).st_size
            head = self._bytes(fd, limit)
            end = b""
            if len(head) >= limit and (size > limit or os.read(fd, 1)):
                kept = min(tail, max(size - limit, 0))
                if kept:
                    os.lseek(fd, size - kept, os.SEEK_SET)
                    end = self._bytes(fd, kept)
                self.skipped(file, f"{size - len(head) - len(end)} of {size} bytes" if size > limit else "its end")
            elif self._left <= 0:
                self.skipped(file, "this tree has too much to read")
        except OSError as error:
            self.skipped(file, _reason(error))
            return None
        finally:
            os.close(fd)
        return Piece(file, head, end)

    def peek(self, file: str, nbytes: int) -> bytes:
        """Read how a file begins, without a word on what is not read of it."""
        kept, left = list(self.unread), self._left
        piece = self.read(file, nbytes)
        self.unread[:], self._left = kept, left
        return piece.head if piece is not None else b""

    def _bytes(self, fd: int, limit: int) -> bytes:
        """Read up to `limit` bytes, of which there may be fewer, and as many as the tree has left."""
        parts = []
        while (want := min(limit, self._left, 1 << 18)) > 0 and (part := os.read(fd, want)):
            parts.append(part)
            limit -= len(part)
            self._left -= len(part)
        return b"".join(parts)

    def names(self, folder: str) -> list[str]:
        """List a directory, sorted; empty if there is none or it says no."""
        place = self._place(folder) if folder else (self.root, os.stat(self.root))
        if place is None:
            return []
        if not stat.S_ISDIR(place[1].st_mode):
            self.skipped(folder, "no directory")
            return []
        found: list[str] = []
        try:
            with os.scandir(place[0]) as entries:
                for entry in entries:
                    if len(found) >= ENTRY_LIMIT:
                        self.skipped(folder, f"more than {ENTRY_LIMIT} names")
                        break
                    found.append(entry.name)
        except (OSError, ValueError) as error:
            self.skipped(folder, _reason(error))
        return sorted(found)

    def links(self, folder: str) -> list[tuple[str, str]]:
        """List the links of a directory with what they say, without following them."""
        place = self._place(folder)
        found = []
        for name in self.names(folder) if place is not None else []:
            try:
                found.append((name, clean(os.readlink(os.path.join(place[0] if place else "", name)))))
            except (OSError, ValueError):
                continue
        return found


def _reason(error: OSError | ValueError) -> str:
    """Say why the system said no."""
    if isinstance(error, PermissionError):
        return "permission denied"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
