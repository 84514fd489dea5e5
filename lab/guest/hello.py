"""Says what the guest is: kernel, Python, kho."""

import os
import platform
from pathlib import Path

import numpy as np

import kho

print("HELLO release", os.uname().release, "python", platform.python_version(), "numpy", np.__version__)
print("HELLO kho", kho.__version__, "liveupdate", Path("/dev/liveupdate").exists())
