"""Bounded time for input of any kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded(seconds: float = 1.0) -> Iterator[None]:
    """Fail if what is done within takes longer: the time of this process, whatever else the machine does meanwhile."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < seconds, f"{took:.1f} s"
