"""Subtrees of the kernel itself: reserve_mem regions, the chain of kexecs, the kernel's own test vector."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import errors
from .._kho import Fdt, Incoming, Vmalloc
from .base import Blob, Owned, Payload, decoder

if TYPE_CHECKING:
    from ..findings import Finding


@dataclass(frozen=True)
class Region:
    """A `reserve_mem=` region: `size` bytes from `start`."""

    inc: Incoming
    name: str
    start: int
    size: int

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`; all of them when `n` is not given. Raises: OutsideMemoryError."""
        return self.inc.read(self.start + offset, max(self.size - offset, 0) if n is None else n)


@decoder("memblock-v1")
class ReserveMem(Payload):
    """The regions that `reserve_mem=SIZE:ALIGN:NAME` reserved (mm/memblock.c)."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        self.regions: dict[str, Region] = {}
        for node in Fdt(blob.read()).root.children:
            if "start" in node and "size" in node:
                region = Region(blob.inc, node.name, node.u64("start"), node.u64("size"))
                self.regions[node.name] = region

    def describe(self) -> dict[str, Any]:
        """Give name to [start, size]."""
        return {"reserve_mem": {name: [r.start, r.size] for name, r in self.regions.items()}}

    def owned(self) -> Iterator[Owned]:
        """Account for every region."""
        for name, region in self.regions.items():
            yield Owned(f"reserve_mem {name}", "region", (region.start, region.size))


@decoder("kexec-metadata")
class Metadata(Payload):
    """The chain of kexecs: `struct kho_kexec_metadata`, packed, 73 bytes (from Linux 7.1)."""

    LAYOUT = struct.Struct("<I65sI")

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        self.version, release, self.kexec_count = self.LAYOUT.unpack(blob.read(self.LAYOUT.size))
        self.previous_release: str = release.split(b"\0")[0].decode("utf-8", "replace")
        if self.version != 1:
            raise self.malformed(f"version {self.version}, not 1")

    def describe(self) -> dict[str, Any]:
        """Give the three fields."""
        return {
            "version": self.version,
            "previous_release": self.previous_release,
            "kexec_count": self.kexec_count,
        }


@decoder("kho-test-v1")
class KhoTest(Payload):
    """The kernel's own test vector (lib/test_kho.c): folios, and a checksum over what they hold."""

    MAGIC = 0x4B484F21
    PHYS_MASK = ~0xFFF

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        fdt = Fdt(blob.read())
        if fdt.root.u32("magic") != self.MAGIC:
            raise self.malformed(f"magic {fdt.root.u32('magic'):#x}, not {self.MAGIC:#x}")
        data = fdt["/data"]
        self.nr_folios = data.u32("nr_folios")
        self.csum = data.u32("csum")
        self.list: Vmalloc | None = None
        words = self._inline(data["folios_info"])
        if words is None:
            self.list = Vmalloc(blob.inc, data["folios_info"], blob.phys)
            words = [word for (word,) in struct.iter_unpack("<Q", self.list.records(8, self.nr_folios))]
        self.folios = [(word & self.PHYS_MASK, word & 0xFFF) for word in words]

    def _inline(self, info: bytes) -> list[int] | None:
        """Read Linux 6.16's array, which stands where later kernels have a `struct kho_vmalloc`.

        Two folios are as long as that struct; they are an array if both were preserved.
        """
        if len(info) != 8 * self.nr_folios:
            if len(info) != 16:
                raise self.malformed(f"folios_info has {len(info)} bytes for {self.nr_folios} folios")
            return None
        words = [word for (word,) in struct.iter_unpack("<Q", info)]
        if len(info) == 16:
            tracker = self.blob.inc.tracker()
            size = self.blob.inc.page_size
            if not all(word & 0xFFF <= 36 and (word // size, word & 0xFFF) in tracker for word in words):
                return None
        return words

    def computed(self) -> int:
        """Fold the one's-complement sum over the folios to 16 bits (csum_partial, csum_fold without the complement).

        2^16 is 1 modulo 2^16 - 1, so the sum of 16-bit words is the whole number's remainder.
        """
        total = 0
        for phys, order in self.folios:
            data = self.blob.inc.read(phys, self.blob.inc.page_size << order)
            total += int.from_bytes(data, "little") % 0xFFFF
        return total % 0xFFFF

    def holds(self) -> bool:
        """Say whether the checksum is that of the folios."""
        return self.computed() == self.csum % 0xFFFF

    def describe(self) -> dict[str, Any]:
        """Give the folios and the checksum."""
        return {
            "nr_folios": self.nr_folios,
            "folios": [list(folio) for folio in self.folios],
            "csum": self.csum,
            "csum_holds": self._holds_or_error(),
        }

    def _holds_or_error(self) -> bool | str:
        try:
            return self.holds()
        except errors.KhoError as error:
            return str(error)

    def owned(self) -> Iterator[Owned]:
        """Account for the folios and their list."""
        owner = "kho_test"
        if self.list is not None:
            yield Owned(owner, "folio list", self.list)
        for phys, order in self.folios:
            yield Owned(owner, "folio", (phys, self.blob.inc.page_size << order))

    def findings(self) -> Iterator[Finding]:
        """Report a checksum that does not hold."""
        from ..findings import Finding

        holds = self._holds_or_error()
        if holds is not True:
            got = holds if isinstance(holds, str) else f"the folios sum to {self.computed():#06x}"
            yield Finding("KHO024", f"kho_test at {self.blob.phys:#x}", f"csum {self.csum:#010x}: {got}")
