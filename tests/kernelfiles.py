"""Files of kernels, made up: boot headers, a banner, a configuration, and the sections that LUO's drafts have."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable

import pytest

BANNER = b"Linux version 7.0.3-test (someone@somewhere) (cc) #1 SMP"
CONFIG = "#\n# Linux/arm64 7.0.3 Kernel Configuration\n#\nCONFIG_KEXEC_HANDOVER=y\nCONFIG_ARM64_16K_PAGES=y\n"


def bzimage(release: bytes) -> bytes:
    """A boot header, and the string that its kernel_version points at."""
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x800)
    return bytes(head[:0xA00]) + release + b" (someone) #1\0" + bytes(100)


def arm64_image(content: bytes) -> bytes:
    head = bytearray(0x1000)
    head[0x38:0x3C] = b"ARM\x64"
    return bytes(head) + content


LVUP = struct.pack("<II", 0x4C565550, 1)


def vmlinux(
    content: bytes,
    versions: list[bytes] | None = None,
    features: dict[bytes, tuple[int, int, int]] | None = None,
) -> bytes:
    """An ELF file with a section table, and the drafts' sections."""
    parts = {b".shstrtab": b"\0.shstrtab\0.liveupdate_versions\0.liveupdate_features\0"}
    if versions is not None:
        parts[b".liveupdate_versions"] = LVUP + b"".join(v.ljust(48, b"\0") for v in versions)
    if features is not None:
        rows = [struct.pack("<48sIIQQQ", name, 64, 0, *bits) for name, bits in features.items()]
        parts[b".liveupdate_features"] = LVUP + b"".join(rows)
    names, at, table = parts[b".shstrtab"], 64 + len(content), bytes(64)
    for name, part in parts.items():
        kind = 3 if name == b".shstrtab" else 1
        table += struct.pack("<IIQQQQIIQQ", names.index(name + b"\0"), kind, 0, 0, at, len(part), 0, 0, 1, 0)
        at += len(part)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, len(table) // 64, 1)
    return head + content + b"".join(parts.values()) + table


def zboot(content: bytes, pack: Callable[[bytes], bytes] = gzip.compress) -> bytes:
    packed = pack(content)
    return b"MZ\0\0zimg" + struct.pack("<II", 0x100, len(packed)) + bytes(0x100 - 16) + packed


def with_tool(*command: str) -> Callable[[bytes], bytes]:
    """Pack with a program, as the kernel's build does."""

    def pack(content: bytes) -> bytes:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        return subprocess.run(command, input=content, capture_output=True, check=True).stdout

    return pack


PACKERS = {
    "gzip": gzip.compress,
    "xz": lambda content: lzma.compress(content, check=lzma.CHECK_CRC32),
    "bzip2": bz2.compress,
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    "zstd": with_tool("zstd", "-q", "-19", "--ultra", "-c"),
    "lz4": with_tool("lz4", "-q", "-l", "-9", "-c"),  # the kernel's form is the older one
    "lz4 frame": with_tool("lz4", "-q", "-c"),
}


def packed_bzimage(release: bytes, whole: bytes, pack: Callable[[bytes], bytes]) -> bytes:
    """A boot header of protocol 2.15 with four setup sectors, and a packed vmlinux with its size after it."""
    payload = pack(whole) + struct.pack("<I", len(whole))
    head = bytearray(bzimage(release)[:0xA00].ljust(0xA00, b"\0"))
    head[0x1F1] = 7  # setup_sects: the protected-mode code begins at 0x1000
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, 0x300, len(payload))
    return bytes(head) + (release + b" (someone) #1\0").ljust(0x600, b"\0") + bytes(0x300) + payload
