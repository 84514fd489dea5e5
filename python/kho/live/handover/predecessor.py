"""`Predecessor`: earlier owners of an image, which may still read what this process replaces."""

from __future__ import annotations

import socket

from ...owned import Uncopied

__all__ = ["Predecessor"]


class Predecessor(Uncopied):
    """Earlier owners that may still read: calling it returns None once none of them can.

    Each has a connection open, which its forked children share: it ends when the last of them has closed it or died.
    """

    def __init__(self, conns: list[socket.socket], pinned: list[tuple[int, int]], owner: int) -> None:
        self.conns = conns
        self.owner = owner
        """What the image has noted as its owner: if that is another one by now, `pinned` is out of date."""
        self.pinned = pinned
        """Runs of pages (first, number) of replaced objects that their arrays show."""

    def __call__(self) -> Predecessor | None:
        """Return this, or None if all connections have ended."""
        for conn in list(self.conns):
            try:
                if conn.recv(64, socket.MSG_DONTWAIT):
                    continue
            except BlockingIOError:
                continue
            except OSError:
                pass
            conn.close()
            self.conns.remove(conn)
        return self if self.conns else None

    def close(self) -> None:
        """Close the connections."""
        while self.conns:
            self.conns.pop().close()
