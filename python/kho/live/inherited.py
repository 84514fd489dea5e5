"""Earlier import path of `kho.live.transports.environ`, `exec` and `systemd`: their public names."""

from __future__ import annotations

from .transports.descriptors import Inherited
from .transports.environ import VARIABLE, described, from_environment
from .transports.exec import execute
from .transports.systemd import fdname, from_systemd, store

__all__ = ["VARIABLE", "Inherited", "described", "execute", "fdname", "from_environment", "from_systemd", "store"]
