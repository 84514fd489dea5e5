"""A limit of CPU time for tests with hostile or large input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded(seconds: float = 1.0) -> Iterator[None]:
    """Fail if the block takes more CPU time of this process; the load of other processes does not count."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < seconds, f"{took:.1f} s"
