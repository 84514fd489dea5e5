"""One deadline for a call that waits several times.

A call with `timeout=T` waits for its turn until T seconds have passed. A handshake with a process that runs takes
moments even if the caller does not want to wait for a turn (`timeout=0`), so all waits together may end `GRACE` seconds
after T, and no later. Only time spent waiting counts against `GRACE`: reading a large image does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ParameterError

__all__ = ["GRACE", "Deadline"]

GRACE = 0.3
"""Seconds that all waits of one call together may take after its timeout: for answers of processes that run."""
LEAST = 1e-4
"""Seconds that are not worth a sleep."""
LONGEST = 1e6
"""Seconds of a single wait without a deadline: less than what poll and sleep refuse."""


class Deadline:
    """The end of a call's waits, on the monotonic clock."""

    def __init__(self, timeout: float | None) -> None:
        """Begin now.

        Args: timeout: seconds; 0 waits for no turn; None waits as long as it takes.
        Raises: ParameterError for a negative number or NaN.
        """
        if timeout is not None and not timeout >= 0:
            raise ParameterError(f"timeout {timeout!r}: seconds, 0 or more, or None to wait as long as it takes")
        self.timeout = timeout
        self._until = None if timeout is None else time.monotonic() + timeout
        self._spare = GRACE

    def left(self) -> float:
        """Give the seconds until the timeout: how long to wait for a turn."""
        return LONGEST if self._until is None else min(max(self._until - time.monotonic(), 0.0), LONGEST)

    @contextmanager
    def wait(self, most: float = LONGEST) -> Iterator[float]:
        """Give the seconds that the wait in the `with` block may take, at most `most`, and charge what it takes."""
        began = time.monotonic()
        try:
            yield min(self.left() + self._spare, most)
        finally:
            if self._until is not None:
                self._spare -= max(time.monotonic() - max(began, self._until), 0.0)
                self._spare = max(self._spare, 0.0)

    def sleep(self, seconds: float) -> bool:
        """Sleep before another try; False, at once, if there is no time left for one."""
        with self.wait(seconds) as allowed:
            if allowed < LEAST:
                return False
            time.sleep(allowed)
        return True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Move the deadline by the time that the `with` block takes: the caller's own code runs in it."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._until is not None:
                self._until += time.monotonic() - began
