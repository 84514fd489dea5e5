"""Time and seed of the laws."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def attack_seconds() -> float:
    """Seconds per law: `ATTACK_SECONDS`."""
    return float(os.environ.get("ATTACK_SECONDS", "4"))


@pytest.fixture(scope="session")
def attack_seed() -> int:
    """Seed of every generator: `ATTACK_SEED`."""
    return int(os.environ.get("ATTACK_SEED", "1"))
