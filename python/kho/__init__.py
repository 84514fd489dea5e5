"""Linux Kexec HandOver (KHO) in userspace."""

from kho._kho import FolioArray, Tracker
from kho._types import FolioInfo

__all__ = ["FolioArray", "FolioInfo", "Tracker"]
