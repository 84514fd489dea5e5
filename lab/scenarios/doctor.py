"""doctor, inspect, verify, owners, map, fdt on a live machine and /proc/kcore, before and after a kexec, as root and as
a user.
"""

from __future__ import annotations

from collections.abc import Iterator

from lab import Claim, Lab
from lab.initramfs import GUEST

APPEND = "kho=on liveupdate=on kho_scratch=32M,320M,32M retain_initrd lab=doctor.py loglevel=1"


def run(lab: Lab) -> Iterator[Claim]:
    """Two kernels in one guest, with Python."""
    version = lab.newest
    kernel = lab.kernel(version)
    initrd = lab.python_initramfs([GUEST / "doctor.py", GUEST / "kexec.py"], {"next": kernel})
    console = lab.boot(kernel, initrd, APPEND, memory="1280M", timeout=1800)
    for line in console.lines("CHECK "):
        held, _, rest = line.partition(" ")
        text, _, evidence = rest.partition(" :: ")
        yield Claim(
            text, version, "x86_64", held == "1", evidence.replace(" | ", "\n") if held != "1" else evidence[:160]
        )
    if "CHECKS END" not in console.text:
        yield Claim("the guest comes to its end", version, "x86_64", False, console.tail(30))
