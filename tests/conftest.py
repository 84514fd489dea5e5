"""What tests share: how hypothesis runs, places for sockets that no service outside knows, and for an image."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from kho.live.handover import sockets as live_sockets

SHM = Path("/dev/shm")

# A shell starts what runs in the background with Ctrl-C ignored, for it and for all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The model is slow on purpose and machines are shared, so a slow example is no failure.
settings.register_profile("quick", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@contextmanager
def _runtime() -> Iterator[Path]:
    """A runtime directory on tmpfs if there is one, as on a machine with systemd."""
    with (
        tempfile.TemporaryDirectory(dir=SHM if os.access(SHM, os.W_OK) else None, prefix="kho-run-") as here,
        mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": here, "KHO_LIVE_DIR": f"{here}/kho"}),
    ):
        yield Path(here)


@pytest.fixture(autouse=True, scope="session")
def _runtime_of_fixtures() -> Iterator[None]:
    """Where fixtures of a module have their sockets and images."""
    with _runtime():
        yield


@pytest.fixture(autouse=True)
def runtime() -> Iterator[Path]:
    """Where kho.live has its sockets and its images in this test; nothing is left there."""
    with _runtime() as here:
        yield here


@pytest.fixture
def sockets(runtime: Path) -> Iterator[Path]:
    """Where kho.live has its sockets in this test alone; no process answers there in the end, and nothing is open."""
    from livefiles import descriptors  # needs NumPy, which smoke tests do without

    before = descriptors()
    yield runtime / "kho"
    gc.collect()
    left = list((runtime / "kho").glob("*.sock")) if (runtime / "kho").is_dir() else []
    assert descriptors() <= before
    assert left == [] or all(live_sockets.connect("x") is None for _ in left), left


@pytest.fixture
def image() -> Iterator[Path]:
    """Where an image may be."""
    from livefiles import folder

    with folder() as here:
        yield here / "image"
