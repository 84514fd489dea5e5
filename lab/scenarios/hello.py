"""A kernel of the lab boots, with Python, numpy and kho inside."""

from __future__ import annotations

from collections.abc import Iterator

from lab import Claim, Lab
from lab.initramfs import GUEST


def run(lab: Lab) -> Iterator[Claim]:
    """Boot the newest kernel with Python as the only program."""
    kernel = lab.kernel(lab.newest)
    initrd = lab.python_initramfs([GUEST / "hello.py"])
    console = lab.boot(
        kernel, initrd, "kho=on liveupdate=on kho_scratch=32M,320M,32M lab=hello.py loglevel=3", timeout=300
    )
    said = console.lines("HELLO ")
    held = any(line.startswith("release") for line in said) and "liveupdate True" in " ".join(said)
    text = "Python imports numpy and kho, and the kernel has /dev/liveupdate"
    yield Claim(text, lab.newest, "x86_64", held, "; ".join(said) or console.tail())
