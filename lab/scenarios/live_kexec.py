"""kho.live over three kernels: sizes, late changes, deaths, `kho hold`, exec, and a store like systemd's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from lab import Claim, Lab
from lab.initramfs import GUEST

from .images import release

APPEND = "kho=on liveupdate=on kho_scratch=32M,320M,32M retain_initrd lab=live_images.py loglevel=1"
SIZES = "8M,64M"
LARGE = "8M,64M,512M"
"""Sizes of the images; the large one is for the newest kernel."""
FIRST = (6, 19)
"""The first version with a live update device."""


def run(lab: Lab) -> Iterator[Claim]:
    """One guest of three kernels for each version, two guests at a time."""
    versions = [version for version in lab.long_versions if release(version) >= FIRST]
    for claims in lab.side_by_side(partial(kernels, lab), versions):
        yield from claims


def kernels(lab: Lab, version: str) -> list[Claim]:
    """Boot a version and let it start itself twice by kexec."""
    kernel = lab.kernel(version)
    initrd = lab.python_initramfs([GUEST / "live_images.py", GUEST / "kexec.py"], {"next": kernel})
    # Outside scratch: the images, the archive as files, as it came, and once more for the next kernel.
    sizes, memory = (LARGE, "2560M") if version == lab.newest else (SIZES, "1536M")
    console = lab.boot(kernel, initrd, f"{APPEND} phase=1 sizes={sizes}", memory=memory, timeout=1800)
    decoder = json.JSONDecoder()
    said = [decoder.raw_decode(line)[0] for line in console.lines("CLAIM ")]
    claims = [Claim(f"kho.live: {one['text']}", version, "x86_64", one["held"], one["evidence"]) for one in said]
    ends = console.lines("END ")
    held = ends == ["1", "2", "3"] and not console.lines("BROKEN")
    evidence = f"ended: kernels {', '.join(ends)}" if held else console.tail(25)
    return [*claims, Claim("kho.live: three kernels run to their end", version, "x86_64", held, evidence)]
