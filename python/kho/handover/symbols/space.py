"""Kernel virtual addresses in a dump: the page tables of the kernel, walked as the processor does.

VMCOREINFO has the root of the tables (`swapper_pg_dir`) and where the kernel's image lies. All other addresses, the
direct map with its random start among them, follow from the tables: of x86_64 (4 and 5 levels) and of arm64 (pages of
4, 16 and 64 KiB).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ... import errors
from .vmcoreinfo import Readable, Vmcoreinfo

__all__ = ["AddressSpace"]

ENDS = 1 << 64
START_KERNEL_MAP = 0xFFFFFFFF80000000
"""Where x86_64 maps its image (__START_KERNEL_map)."""
MOST_TABLES = 4096
"""Pages of tables that are kept."""
MOST_BYTES = 64 << 20
"""Bytes that one read may have."""


class _Layout(NamedTuple):
    """How the tables of a kernel are built."""

    shift: int
    """Bits of an offset in a page."""
    bits: int
    """Bits of an address that the tables translate."""
    levels: int
    leaf: int
    """The bits of a descriptor that decide whether it is one of a large page: 0 in arm64, set in x86_64."""
    leaf_set: bool
    largest: int
    """The highest level, from the pages up (0), that can have large pages."""
    output: int
    """Mask of the physical address in a descriptor."""
    high: bool
    """Bits 12 to 15 of a descriptor are bits 48 to 51 of the address: arm64 with pages of 64 KiB."""


class AddressSpace:
    """Reads memory at kernel virtual addresses."""

    def __init__(self, memory: Readable, info: Vmcoreinfo) -> None:
        """Prepare the walk. Raises: FormatError if VMCOREINFO has not what it needs."""
        self.memory = memory
        self.info = info
        self.machine = "aarch64" if info.number("kimage_voffset") is not None else "x86_64"
        page = info.page_size or 4096
        if self.machine == "aarch64":
            self._image_offset = info.number("kimage_voffset") or 0
            self._layout = _arm64(info, page)
        else:
            base = info.number("phys_base")
            if base is None:
                raise errors.FormatError("VMCOREINFO: neither NUMBER(phys_base) nor NUMBER(kimage_voffset)")
            self._image_offset = START_KERNEL_MAP - base
            self._layout = _x86_64(info)
        self.page_size = 1 << self._layout.shift
        self._root = self.image_phys(info.symbol_value("swapper_pg_dir"))
        self.image = range(0)
        """Addresses of the image, where no tables are needed."""
        if self.machine == "x86_64":
            size = min(info.number("KERNEL_IMAGE_SIZE") or 1 << 30, 1 << 30)
            self.image = range(START_KERNEL_MAP, START_KERNEL_MAP + max(size, 0))
        self._tables: dict[int, bytes] = {}

    def image_phys(self, address: int) -> int:
        """Translate an address in the kernel's image, which lies in one piece."""
        return (address - self._image_offset) % ENDS

    def phys(self, address: int) -> int:
        """Translate an address. Raises: FormatError if no page is mapped there; KhoError if a table cannot be read."""
        return self._translate(address)[0]

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy bytes. Raises: FormatError if they are not mapped; OutsideMemoryError and others of the memory."""
        return b"".join(self.memory.read(phys, n) for phys, n in self._pieces(address, nbytes))

    def read_image(self, address: int, nbytes: int) -> bytes:
        """Copy bytes of the kernel's image, without the tables."""
        if not 0 <= nbytes <= MOST_BYTES:
            raise errors.FormatError(f"{nbytes:#x} bytes at {address:#x}: more than {MOST_BYTES:#x}")
        return self.memory.read(self.image_phys(address), nbytes)

    def text(self, address: int, most: int) -> str:
        """Read a C string of at most `most` bytes. Raises: FormatError if it does not end."""
        raw = b""
        while len(raw) < most:
            here = (address + len(raw)) % ENDS
            raw += self.read(here, min(most - len(raw), 64 - here % 64))
            if b"\0" in raw:
                return raw.split(b"\0")[0].decode("utf-8", "replace")
        raise errors.FormatError(f"string at {address:#x}: no end within {most} bytes")

    def _pieces(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        if not 0 <= nbytes <= MOST_BYTES or address < 0 or address + nbytes > ENDS:
            raise errors.FormatError(f"{nbytes:#x} bytes at {address:#x}: beyond the address space, or too many")
        end = address + nbytes
        while address < end:
            phys, rest = self._translate(address)
            n = min(rest, end - address)
            yield phys, n
            address += n

    def _translate(self, address: int) -> tuple[int, int]:
        """Translate an address; return the bytes from there to the end of its page, too."""
        layout = self._layout
        if address in self.image:
            return self.image_phys(address), self.page_size - address % self.page_size
        if self.machine == "aarch64" and address >> 55 & 1:
            address |= 0xFF << 56  # the processor ignores a tag
        if address >> layout.bits != (1 << (64 - layout.bits)) - 1:
            raise errors.FormatError(f"{address:#x} is no address of the kernel")
        table, width = self._root, layout.shift - 3
        for level in reversed(range(layout.levels)):
            shift = layout.shift + level * width
            index = address >> shift & (1 << min(width, layout.bits - shift)) - 1
            entry = self._entry(table, index)
            if not entry & 1:
                raise errors.FormatError(f"{address:#x} is not mapped")
            phys = entry & layout.output
            if layout.high:
                phys |= (entry >> 12 & 0xF) << 48
            is_leaf = bool(entry & layout.leaf) == layout.leaf_set
            if level == 0 or (is_leaf and level <= layout.largest):
                size = 1 << shift
                return phys // size * size + address % size, size - address % size
            if is_leaf:
                raise errors.FormatError(f"{address:#x}: entry {entry:#x} of its page tables is malformed")
            table = phys
        raise errors.FormatError(f"{address:#x} is not mapped")

    def _entry(self, table: int, index: int) -> int:
        place = table + index * 8
        page = place // 4096
        if page not in self._tables:
            if len(self._tables) >= MOST_TABLES:
                self._tables.clear()
            self._tables[page] = self.memory.read(page * 4096, 4096)
        return int.from_bytes(self._tables[page][place % 4096 :][:8], "little")


def _x86_64(info: Vmcoreinfo) -> _Layout:
    five = info.number("pgtable_l5_enabled") == 1
    secret = (info.number("sme_mask") or 0) % ENDS
    output = ((1 << 52) - 4096) & ~secret
    return _Layout(12, 57 if five else 48, 5 if five else 4, 1 << 7, True, 2, output, False)


def _arm64(info: Vmcoreinfo, page: int) -> _Layout:
    """Work out the tables: with pages of 64 KiB the root has the size of VA_BITS, whatever the processor uses."""
    shift = page.bit_length() - 1
    configured, unused = info.number("VA_BITS"), info.number("TCR_EL1_T1SZ")
    bits = configured if unused is None or shift == 16 else 64 - unused
    if bits is None or not 36 <= bits <= 52:
        raise errors.FormatError(f"VMCOREINFO: NUMBER(VA_BITS) {configured}, NUMBER(TCR_EL1_T1SZ) {unused}")
    levels = -(-(bits - shift) // (shift - 3))
    output = ((1 << (48 if shift == 16 else 50)) - 1) >> shift << shift
    return _Layout(shift, bits, levels, 1 << 1, False, 2 if shift == 12 else 1, output, shift == 16)
