"""Decoders for subtrees of the kernel itself: memblock (reserve_mem), kexec-metadata and kho_test."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import errors
from .._kho import Incoming, Vmalloc
from .declare import Declared, text, u32
from .registry import Blob, Owned, Payload, decoder

if TYPE_CHECKING:
    from ..handover.rules import Finding


WINDOW = 1 << 20
"""Bytes per read; even, as checksums are over 16-bit words."""
MAX_ORDER = 36


@dataclass(frozen=True)
class Region:
    """A `reserve_mem=` region: `size` bytes from `start`."""

    inc: Incoming = field(repr=False)
    name: str
    start: int
    size: int

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`, by default up to the end. Raises: OutsideMemoryError."""
        return self.inc.read(self.start + offset, max(self.size - offset, 0) if n is None else n)


@decoder("memblock-v1")
class ReserveMem(Payload):
    """The regions that `reserve_mem=SIZE:ALIGN:NAME` reserved (mm/memblock.c)."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        self.regions: dict[str, Region] = {}
        nodes = blob.fdt().root.children
        blob.budget.take_objects(len(nodes), f"{blob.owner} at {blob.phys:#x}")
        for node in nodes:
            if "start" in node and "size" in node:
                region = Region(blob.inc, node.name, node.u64("start"), node.u64("size"))
                self.regions[node.name] = region

    def describe(self) -> dict[str, Any]:
        """Return `[start, size]` by region name."""
        return {"reserve_mem": {name: [r.start, r.size] for name, r in self.regions.items()}}

    def owned(self) -> Iterator[Owned]:
        """Yield every region."""
        for name, region in self.regions.items():
            yield Owned(f"reserve_mem {name}", "region", (region.start, region.size))


@decoder("kexec-metadata")
class Metadata(Declared):
    """The history of kexecs: `struct kho_kexec_metadata`, packed, 73 bytes (Linux 7.1 and later)."""

    version = u32(equals=1)
    previous_release = text(65)
    kexec_count = u32()


@decoder("kho-test-v1")
class KhoTest(Payload):
    """The data of the kernel's KHO test (lib/test_kho.c): folios, and a checksum of their content."""

    MAGIC = 0x4B484F21
    PHYS_MASK = ~0xFFF

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        fdt = blob.fdt()
        if fdt.root.u32("magic") != self.MAGIC:
            raise self.malformed(f"magic {fdt.root.u32('magic'):#x}, not {self.MAGIC:#x}")
        data = fdt["/data"]
        self.nr_folios = data.u32("nr_folios")
        self.csum = data.u32("csum")
        self.list: Vmalloc | None = None
        words = self._inline(data["folios_info"])
        if words is None:
            self.list = Vmalloc(blob.inc, data["folios_info"], blob.phys)
            # Zero words end the list: the word of a folio is never 0.
            records = self.list.records(8, min(self.nr_folios, blob.budget.most_objects + 1))
            blob.budget.take_objects(len(records) // 8, f"{blob.owner} at {blob.phys:#x}: folio list")
            words = [word for (word,) in struct.iter_unpack("<Q", records)]
        self.folios = [(word & self.PHYS_MASK, word & 0xFFF) for word in words]
        self._computed: int | None = None

    def _inline(self, info: bytes) -> list[int] | None:
        """Read the inline array of Linux 6.16 and 6.17; later kernels have a `struct kho_vmalloc` in its place.

        An array of two folios has the same length as that struct; it is an array if both folios are preserved, and, if
        the map is not in the dump, unless it is the struct of an area of one page.
        """
        if len(info) != 8 * self.nr_folios:
            if len(info) != 16:
                raise self.malformed(f"folios_info has {len(info)} bytes, which do not fit {self.nr_folios} folios")
            return None
        words = [word for (word,) in struct.iter_unpack("<Q", info)]
        if len(info) == 16:
            inc = self.blob.inc
            if inc.map_lost is not None:
                return None if words[1] == 1 << 32 | 1 else words  # VM_ALLOC, and total_pages
            if not all(inc.preserves(word & self.PHYS_MASK, word & 0xFFF) for word in words):
                return None
        return words

    def computed(self) -> int:
        """Compute the one's-complement sum of the folios, folded to 16 bits without the final complement.

        Equals csum_partial and csum_fold. As 2^16 = 1 modulo 2^16 - 1, the sum of the 16-bit words is the remainder of
        the bytes read as one large integer.

        Raises: FormatError for folios that share memory or hold more than the image can; OutsideMemoryError.
        """
        if self._computed is not None:
            return self._computed
        inc = self.blob.inc
        self._check_folios()
        left = inc.room("contents")
        total = 0
        for phys, order in self.folios:
            end = phys + (inc.page_size << order)
            at = phys
            # Zeros do not change the sum, so only data runs are read, in whole 16-bit words.
            while at < end and (found := inc.next_to_read(at, end - at)):
                start = found[0] // 2 * 2
                at = min(-(-sum(found) // 2) * 2, start + WINDOW)
                left -= at - start
                if left < 0:
                    raise self.malformed("its folios hold more bytes than the image")
                total += int.from_bytes(inc.read(start, at - start), "little") % 0xFFFF
        self._computed = total % 0xFFFF
        return self._computed

    def _check_folios(self) -> None:
        """Check that folios do not overlap and are inside memory. Raises: FormatError; OutsideMemoryError."""
        inc = self.blob.inc
        reach, last = -1, 0
        for phys, order in sorted(self.folios):
            if order > MAX_ORDER:
                raise self.malformed(f"folio at {phys:#x}: order {order} exceeds {MAX_ORDER}")
            if phys < reach:
                raise self.malformed(f"folio of order {order} at {phys:#x}: overlaps the folio at {last:#x}")
            reach, last = phys + (inc.page_size << order), phys
            if not inc.has(phys, inc.page_size << order):
                raise errors.OutsideMemoryError(
                    f"kho_test folio at {phys:#x}: {inc.page_size << order:#x} bytes are not in this memory"
                )

    def holds(self) -> bool:
        """Whether the recorded checksum equals that of the folios."""
        return self.computed() == self.csum % 0xFFFF

    def describe(self) -> dict[str, Any]:
        """Return the folios, the checksum and whether it matches."""
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
        """Yield the folios and their list."""
        owner = "kho_test"
        if self.list is not None:
            yield Owned(owner, "folio list", self.list)
        for phys, order in self.folios:
            yield Owned(owner, "folio", (phys, self.blob.inc.page_size << order))

    def findings(self) -> Iterator[Finding]:
        """Report a checksum mismatch (KHO024)."""
        from ..handover.rules import Finding

        try:
            self.computed()
        except errors.MissingMemoryError:
            return
        except errors.KhoError:
            pass
        holds = self._holds_or_error()
        if holds is not True:
            got = holds if isinstance(holds, str) else f"the folios sum to {self.computed():#06x}"
            yield Finding("KHO024", f"kho_test at {self.blob.phys:#x}", f"csum {self.csum:#010x}: {got}")
