"""Bounded time for input of any kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded(seconds: float = 1.0) -> Iterator[None]:
    """Context manager: fail if the block takes longer, in processor time of this process."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < seconds, f"{took:.1f} s"
