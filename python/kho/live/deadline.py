"""One deadline for a call that waits several times.

A call with `timeout=T` waits for a busy owner until T seconds have passed. A handshake takes a few milliseconds even if
the owner is ready (`timeout=0`), so all waits together may end up to `GRACE` seconds after T. Only time spent waiting
counts against `GRACE`: reading a large image does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ParameterError

__all__ = ["GRACE", "Deadline"]

GRACE = 0.3
"""Seconds that all waits of one call together may take after its timeout, for answers of running processes."""
LEAST = 1e-4
"""Seconds. With less time than this left, `sleep` does not sleep."""
LONGEST = 1e6
"""Seconds of a single wait without a deadline: below the limits of poll and sleep."""


class Deadline:
    """The end of a call's waits, on the monotonic clock."""

    def __init__(self, timeout: float | None) -> None:
        """Start the clock.

        Args: timeout: seconds; 0 does not wait for a busy owner; None has no limit.
        Raises: ParameterError for a negative number or NaN.
        """
        if timeout is not None and not timeout >= 0:
            raise ParameterError(f"timeout {timeout!r}: seconds, 0 or more, or None to wait as long as it takes")
        self.timeout = timeout
        self._until = None if timeout is None else time.monotonic() + timeout
        self._spare = GRACE

    def left(self) -> float:
        """Return the seconds until the timeout: how long to wait for a busy owner."""
        return LONGEST if self._until is None else min(max(self._until - time.monotonic(), 0.0), LONGEST)

    @contextmanager
    def wait(self, most: float = LONGEST) -> Iterator[float]:
        """Yield the seconds that the wait in the `with` block may take, at most `most`; charges the time it takes."""
        began = time.monotonic()
        try:
            yield min(self.left() + self._spare, most)
        finally:
            if self._until is not None:
                self._spare -= max(time.monotonic() - max(began, self._until), 0.0)
                self._spare = max(self._spare, 0.0)

    def sleep(self, seconds: float) -> bool:
        """Sleep before another attempt; returns False at once if no time is left for one."""
        with self.wait(seconds) as allowed:
            if allowed < LEAST:
                return False
            time.sleep(allowed)
        return True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Move the deadline by the time that the `with` block takes, in which the caller's own code runs."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._until is not None:
                self._until += time.monotonic() - began
