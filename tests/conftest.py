"""What tests share: how hypothesis runs, places for sockets that no service outside knows, and for an image."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kho.live.handover import sockets as live_sockets

# A shell starts what runs in the background with Ctrl-C ignored, for it and for all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The model is slow on purpose and machines are shared, so a slow example is no failure.
settings.register_profile("quick", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True, scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where kho.live has its sockets; nothing is left there."""
    here = tmp_path_factory.mktemp("run")
    here.chmod(0o700)
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(here)
    yield here
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where kho.live has its sockets in this test alone; nothing is left there, or open."""
    from livefiles import descriptors  # needs NumPy, which smoke tests do without

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = descriptors()
    yield tmp_path / "kho"
    gc.collect()
    left = [file.name for file in (tmp_path / "kho").iterdir()] if (tmp_path / "kho").is_dir() else []
    assert descriptors() <= before
    assert left == [] or all(live_sockets.connect("x") is None for _ in left), left


@pytest.fixture
def image() -> Iterator[Path]:
    """Where an image may be."""
    from livefiles import folder

    with folder() as here:
        yield here / "image"
