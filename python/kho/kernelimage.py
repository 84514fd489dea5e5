"""What a kernel's file tells before it is booted: its release, configuration, and the versions that LUO accepts.

A vmlinux (ELF), an x86 bzImage, an arm64 Image, an EFI zboot image, any of them packed; or a configuration file.
Formats: Documentation/arch/x86/boot.rst (kernel_version, payload_offset), Documentation/arch/arm64/booting.rst,
drivers/firmware/efi/libstub/zboot-header.S, kernel/configs.c (IKCFG_ST). Sections `.liveupdate_versions` and
`.liveupdate_features` are public drafts (docs/abi.md section 9).
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ._kho import unpack_bytes
from .errors import ParameterError, SourceError
from .kernels import Release

__all__ = ["Features", "KernelImage", "read_config", "read_kernel"]

_Read: TypeAlias = Callable[[int, int], bytes]
"""Reads bytes at an offset, fewer at the end."""

MOST = 1 << 31
"""Bytes of a kernel that are read; a vmlinux with debug information has about 1 GiB."""
WINDOW = 16 << 20
MOST_UNPACKED = 256 << 20
"""Bytes that a packed kernel may come to."""
BANNER = re.compile(rb"Linux version ([0-9]+\.[0-9]+[!-~]{0,64}) \(([ -~]{0,512})")
CONFIG_HEAD = re.compile(r"^# Linux/\S+ (\S+) Kernel Configuration", re.MULTILINE)
MOST_PACKED = 128 << 20
"""Bytes of a packed kernel that are read."""
PACKED = (b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18")
"""What packed files begin with: gzip, xz, bzip2, zstd, and both forms of lz4."""
LZMA, LZO = b"\x5d\0\0", b"\x89LZO\0\r\n\x1a\n"
"""What the kernel's two older packings begin with: LZMA's usual properties and a dictionary's size; lzop's magic."""
LZMA_ROOM = 128 << 20
"""Bytes that unpacking LZMA may take; the kernel's build uses dictionaries of up to 64 MiB."""
NOT_KERNELS = {1: "an object file", 4: "a memory image (ELF core)"}
"""ELF types that are no kernel, although the first contains a banner, and the second the running kernel's."""
LVUP = 0x4C565550
VERSIONS, FEATURES = b".liveupdate_versions", b".liveupdate_features"
FEATURE_BITS = struct.Struct("<QQQ")
"""supp, req, active, after a name of 48 bytes, u32 feat_bytes and u32 reserved."""
LONGEST = 128
"""Characters of a release; the kernel's own field has 65 bytes."""
MOST_NAMES = 4096


class Features(NamedTuple):
    """A row of `.liveupdate_features`: feature bits of one structure."""

    supported: int
    required: int
    active: int


class KernelImage(NamedTuple):
    """What was found in a kernel's file, or in a configuration."""

    path: str
    kind: str
    """bzImage, Image, zboot, vmlinux, config."""
    release: Release
    config: dict[str, str] | None
    """Options that are set, without `CONFIG_`; None if there is no configuration in the file or next to it."""
    versions: list[str] | None
    """Compatibles that LUO accepts, from `.liveupdate_versions`; None without that section."""
    features: dict[str, Features] | None = None
    """Feature bits by structure (`luo`, `memfd`), from `.liveupdate_features`; None without that section."""
    unread: str | None = None
    """Why the packed kernel in the file was not read, so that only its boot header told its release."""

    @property
    def page_size(self) -> int | None:
        """Bytes in a page; None if the configuration does not tell."""
        if self.config is None:
            return None
        for kib in (4, 16, 64):
            if f"ARM64_{kib}K_PAGES" in self.config or f"PAGE_SIZE_{kib}KB" in self.config:
                return kib << 10
        return 4096 if "X86_64" in self.config else None

    @property
    def max_page_order(self) -> int | None:
        """MAX_PAGE_ORDER; None without a configuration."""
        if self.config is None:
            return None
        # The option was renamed in 6.4, and since then counts the largest order itself.
        order = self.config.get("ARCH_FORCE_MAX_ORDER", "10")
        return int(order) if re.fullmatch(r"[0-9]{1,2}", order) else None


def read_kernel(path: str | os.PathLike[str]) -> KernelImage:
    """Read a kernel's file, or a configuration; of a kernel, the configuration that lies next to it, too.

    Raises: SourceError for a file that is neither, or cannot be read.
    """
    where = Path(path)
    try:
        # A FIFO without a writer would block the open.
        with os.fdopen(os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(4096) if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        raise SourceError(f"{where}: {error.strerror}") from error
    if head is None:
        raise SourceError(f"{where}: not a regular file, so no kernel")
    if head[514:518] == b"HdrS":
        return _boot_image(where, head, status.st_size)
    if head[4:8] == b"zimg":
        return _unpacked(where, "zboot", _zboot(where, head, status.st_size))
    if head.startswith((*PACKED, LZMA, LZO)):
        return _unpacked(where, "Image", _bytes_of(where, 0, min(status.st_size, MOST_PACKED)))
    if head.startswith(b"\x7fELF"):
        _refuse_elf(where, head)
        return _plain(where, "vmlinux")
    if head[0x38:0x3C] == b"ARM\x64":
        return _plain(where, "Image")
    if b"CONFIG_" in head:
        text = _text_of(where)
        named = CONFIG_HEAD.search(text)
        if named is None:
            raise SourceError(f"{where}: a configuration without the line that names its kernel's release")
        return _named(where, "config", named[1], read_config(text))
    raise SourceError(
        f"{where}: no kernel: a vmlinux, bzImage, arm64 Image, EFI zboot image, or a configuration is expected"
    )


def _refuse_elf(path: Path, head: bytes) -> None:
    """Refuse ELF files that are no kernel. Raises: SourceError."""
    kind = NOT_KERNELS.get(int.from_bytes(head[16:18], "little")) if head.startswith(b"\x7fELF") else None
    if kind is not None:
        raise SourceError(f"{path}: {kind}, not a kernel")


def _text_of(path: Path) -> str:
    """Read a configuration, up to `WINDOW` bytes."""
    with path.open("rb") as file:
        return file.read(WINDOW).decode(errors="replace")


def read_config(text: str) -> dict[str, str]:
    """Read the options that a configuration sets: `CONFIG_KEXEC_HANDOVER=y` is {"KEXEC_HANDOVER": "y"}."""
    return {name: value.strip('"') for name, value in re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE)}


def _bytes_of(path: Path, offset: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def _boot_image(path: Path, head: bytes, size: int) -> KernelImage:
    """Read a bzImage: its release from the boot header, the rest from the packed vmlinux in it, if that can be read."""
    release = _boot_version(path, head)
    begin = ((head[0x1F1] or 4) + 1) * 512
    version, (offset, nbytes) = int.from_bytes(head[0x206:0x208], "little"), struct.unpack_from("<II", head, 0x248)
    # Protocol 2.08 has the payload's place, which counts from the end of the real-mode code.
    if version >= 0x208 and 0 < nbytes <= min(max(size - begin - offset, 0), MOST_PACKED):
        packed = _bytes_of(path, begin + offset, nbytes)
        try:
            whole = _unpack(path, packed)
        except (SourceError, ParameterError) as error:
            # An unreadable payload leaves the configuration unknown.
            return _named(path, "bzImage", release, unread=str(error).removeprefix(f"{path}: "))
        read = lambda at, n: whole[at : at + n]  # noqa: E731 - as in `_unpacked`
        _, signature, config = _search(read, len(whole))
        return _named(path, "bzImage", release, config, read, len(whole), signature=signature)
    return _named(path, "bzImage", release, unread="its boot header names no packed kernel in it")


def _boot_version(path: Path, head: bytes) -> str:
    """Read the string that kernel_version of the x86 boot header points at, from byte 0x200 on."""
    at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    text = _bytes_of(path, at, 256).partition(b"\0")[0].decode("ascii", "replace")
    release = text.split(" ")[0]
    if not release:
        raise SourceError(f"{path}: a bzImage whose boot header names no version")
    return release


def _zboot(path: Path, head: bytes, size: int) -> bytes:
    """Read the packed kernel out of an EFI zboot image."""
    offset, nbytes = struct.unpack_from("<II", head, 8)
    if not 0 < offset < size or nbytes > min(size - offset, MOST_PACKED):
        raise SourceError(f"{path}: an EFI zboot image: {nbytes} bytes at {offset:#x} are not in it")
    return _bytes_of(path, offset, nbytes)


def _unpacked(path: Path, kind: str, packed: bytes) -> KernelImage:
    """Unpack a kernel, or the payload of one, and search it."""
    try:
        whole = _unpack(path, packed)
    except ParameterError as error:
        raise SourceError(f"{path}: its payload is {error}") from error
    _refuse_elf(path, whole[:64])
    if kind == "Image" and not whole.startswith(b"\x7fELF") and whole[0x38:0x3C] != b"ARM\x64":
        raise SourceError(f"{path}: what is packed in it is no vmlinux and no arm64 Image")
    return _found(path, kind, lambda at, n: whole[at : at + n], len(whole))


def _unpack(path: Path, packed: bytes) -> bytes:
    """Unpack a kernel, up to `MOST_UNPACKED` bytes; of a damaged one, what comes before the damage.

    Kernels are padded after the packed stream, and what comes before damage may hold the banner.
    Raises: SourceError, if nothing comes out of it; ParameterError for bytes that no known packing begins with.
    """
    if packed.startswith(LZO):
        raise SourceError(f"{path}: packed with LZO (lzop), which is not unpacked here: unpack it with lzop -d first")
    if not packed.startswith(LZMA):
        return unpack_bytes(path, packed, MOST_UNPACKED)
    parts: list[bytes] = []
    try:
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=LZMA_ROOM)
        parts.append(stream.decompress(packed, WINDOW))
        while not stream.eof and not stream.needs_input and sum(map(len, parts)) < MOST_UNPACKED:
            parts.append(stream.decompress(b"", WINDOW))
    except lzma.LZMAError as error:
        if not any(parts):
            raise SourceError(f"{path}: packed with LZMA: {error}") from error
    if not any(parts):
        raise SourceError(f"{path}: packed with LZMA: nothing comes out of it")
    return b"".join(parts)


def _plain(path: Path, kind: str) -> KernelImage:
    with path.open("rb") as file:
        return _found(path, kind, lambda at, n: os.pread(file.fileno(), n, at), os.fstat(file.fileno()).st_size)


def _found(path: Path, kind: str, read: _Read, nbytes: int) -> KernelImage:
    release, signature, config = _search(read, nbytes)
    if release is None:
        raise SourceError(f"{path}: no kernel's banner in it ('Linux version ...')")
    return _named(path, kind, release, config, read, nbytes, signature=signature)


def _search(read: _Read, nbytes: int) -> tuple[str | None, str | None, dict[str, str] | None]:
    """Search for the banner, and the configuration: the release, the rest of the banner, and the options."""
    release = signature = config = None
    for at in range(0, min(nbytes, MOST), WINDOW):
        part = read(at, WINDOW + (1 << 12))
        if release is None and (banner := BANNER.search(part)) is not None:
            release, signature = (text.decode("ascii") for text in banner.groups())
        if config is None and (begin := part.find(b"IKCFG_ST\x1f\x8b")) >= 0:
            config = _embedded(read(at + begin + 8, 1 << 20))
        if release is not None and config is not None:
            break
    return release, signature, config


def _embedded(raw: bytes) -> dict[str, str] | None:
    """Unpack the configuration that CONFIG_IKCONFIG puts into a kernel; None if it is damaged."""
    try:
        return read_config(zlib.decompressobj(31).decompress(raw, WINDOW).decode(errors="replace"))
    except zlib.error:
        return None


def _named(
    path: Path,
    kind: str,
    release: str,
    config: dict[str, str] | None = None,
    read: _Read | None = None,
    nbytes: int = 0,
    *,
    signature: str | None = None,
    unread: str | None = None,
) -> KernelImage:
    """Complete what a file tells with the configuration next to it, `config-RELEASE` or `config`.

    Args: read, nbytes: the vmlinux, if it was found. signature: the banner, which may end with the upstream release.
    """
    if len(release) > LONGEST or "/" in release:
        raise SourceError(f"{path}: {release[:LONGEST]!r} is not a kernel's release")
    for name in ("config", f"config-{release}") if config is None else ():
        # One that is missing or unreadable leaves the configuration unknown.
        with contextlib.suppress(OSError):
            text = _text_of(path.with_name(name))
            named = CONFIG_HEAD.search(text)
            # Debian's names the upstream release.
            if named is not None and release.startswith(named[1]):
                config = read_config(text)
    sections = {} if read is None else _sections(read, nbytes)
    versions, features = sections.get(VERSIONS), sections.get(FEATURES)
    try:
        return KernelImage(
            str(path),
            kind,
            Release.parse(release, signature),
            config,
            None if versions is None else [_text(entry) for entry in _split(versions, 48)],
            None
            if features is None
            else {_text(e[:48]): Features(*FEATURE_BITS.unpack_from(e, 56)) for e in _split(features, 80)},
            unread,
        )
    except ParameterError as error:
        raise SourceError(f"{path}: {error}") from error


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii", "replace")


def _sections(read: _Read, nbytes: int) -> dict[bytes, bytes]:
    """Read the sections of LUO in an ELF vmlinux, which begin with a magic and a version: what follows, by name."""
    head = read(0, 64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return {}
    (table,), (size, count, names_at) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HHH", head, 58)
    if size != 64 or count > MOST_NAMES or table + size * count > nbytes or names_at >= count:
        return {}
    sections = [struct.unpack("<IIQQQQIIQQ", raw) for raw in _split(read(table, size * count), size)]
    inside = [section for section in sections if section[4] + section[5] <= nbytes]
    if sections[names_at] not in inside:
        return {}
    strings = read(sections[names_at][4], min(sections[names_at][5], 1 << 20))
    found = {}
    for section in inside:
        name = strings[section[0] : section[0] + 64].partition(b"\0")[0]
        if name in (VERSIONS, FEATURES) and 8 <= section[5] <= 8 + 80 * MOST_NAMES:
            raw = read(section[4], section[5])
            if len(raw) >= 8 and struct.unpack_from("<II", raw) == (LVUP, 1):
                found[name] = raw[8:]
    return found


def _split(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw) - size + 1, size)]
