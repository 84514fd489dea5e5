"""Payloads of public drafts: no released kernel writes them, and any of them may still change.

The layouts are those of the headers that were posted for review under include/linux/kho/abi/ (abi.md section 9). They
are read wherever they are found, and marked as drafts; `kho.Outgoing.add_payload` writes them only with draft=True.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import FormatError
from .declare import Declared, Place, Record, array, raw, text, u8, u16, u32, u64, vmalloc
from .folio_file import FolioEntry, FolioFile
from .registry import Blob, decoder

if TYPE_CHECKING:
    from ..handover.rules import Finding

__all__ = ["EventFd", "GuestMemfd", "HugeMemfd", "Hugetlb", "HwPoison", "KvmVm", "Pci", "TmpfsFile", "TmpfsMount"]

MOST = 16
"""Maximum number of findings of one kind."""


def bdf(value: int) -> str:
    """Write bus, device and function of a PCI device as `lspci` does: 00:1f.3."""
    return f"{value >> 8:02x}:{value >> 3 & 31:02x}.{value & 7}"


class PciDevice(Record):
    """A preserved PCI device."""

    domain = u32()
    bdf = u16(show=bdf)
    refcount = u16()


@decoder("pci-v2")
class Pci(Declared):
    """FLB `pci-v2`: the PCI devices that are in use across the kexec."""

    draft = True
    source = "include/linux/kho/abi/pci.h of the series for PCI live update"

    max_devices = u32()
    nr_devices = u32()
    devices = array(PciDevice, "nr_devices")

    def check(self) -> None:
        """Refuse more devices than there is room for."""
        if self.nr_devices > self.max_devices:
            raise self.malformed(f"nr_devices {self.nr_devices} exceeds max_devices {self.max_devices}")

    @property
    def nbytes(self) -> int:
        """Bytes of the structure, with the room for devices that are not in use."""
        return self.layout.size + self.max_devices * PciDevice.layout.size


@decoder("kvm_vm_luo_v1")
class KvmVm(Declared):
    """File `kvm_vm_luo_v1`: a virtual machine of KVM."""

    draft = True
    source = "include/linux/kho/abi/kvm.h of the series for guest_memfd"
    unsure = "one version of the series ends after type"

    type = u64()
    nr_attrs = u64()
    attrs = vmalloc(None)


class GuestFolio(Record):
    """A folio of a guest_memfd."""

    pfn = u64(bits=52, unit="pfn", owns="data")
    flags = u64(bits=12, default=0, flags={1: "up to date"})
    index = u64(unit="pages")


@decoder("guest_memfd_luo_v1")
class GuestMemfd(FolioFile):
    """File `guest_memfd_luo_v1`: the memory of a guest."""

    draft = True
    source = "include/linux/kho/abi/kvm.h of the series for guest_memfd"

    size = u64(unit="bytes")
    flags = u64(flags={1: "mmap", 2: "initially shared"}, default=0)
    nr_folios = u64()
    vm_token = u64(unit="token")
    folios = vmalloc(GuestFolio, count="nr_folios", listed=False)

    def present(self, flags: int) -> bool:
        """Whether the folio is up to date, which is bit 0 here."""
        return bool(flags & 1)


class HugePool(Record):
    """The preserved pages of one size."""

    nr_pages = u64(unit="huge pages")
    order = u8()


class HugePoolPadded(Record, packed=False):
    """The same as C lays it out without `__packed`."""

    nr_pages = u64(unit="huge pages")
    order = u8()


class HugetlbPadded(Record, packed=False):
    """The whole of it without `__packed`."""

    hstates = array(HugePoolPadded, 4, used="nr_hstates")
    nr_hstates = u8()


@decoder("hugetlb-v1")
class Hugetlb(Declared):
    """FLB `hugetlb-v1`: how many huge pages of each size are preserved.

    Entries beyond `nr_hstates` are zeros; with that, the two ways to lay it out can be told apart.
    """

    draft = True
    source = "include/linux/kho/abi/hugetlb.h of the series for hugetlb-backed memfds"

    hstates = array(HugePool, 4, used="nr_hstates")
    nr_hstates = u8()

    def __init__(self, blob: Blob) -> None:
        self.padded = False
        """Whether it was written with padding; its header has `__packed`."""
        try:
            super().__init__(blob)
        except FormatError:
            place = Place(blob, blob.phys)
            padded = HugetlbPadded.load(blob.read(HugetlbPadded.layout.size), place)
            if self._in_use(HugetlbPadded, padded.nr_hstates):
                raise
            self._values, self.padded = padded._values, True
        self.unsure = f"padding: read as {'laid out by C' if self.padded else 'packed'}"

    def _in_use(self, kind: type[Record], nr: int) -> bool:
        """Whether entries beyond `nr` are other than zeros."""
        size = kind.layout.size
        each = size // 4 if kind is Hugetlb else HugePoolPadded.layout.size
        return any(self.blob.read(4 * each)[nr * each :])

    def check(self) -> None:
        """Refuse an entry that is not in use and not zeros."""
        if self._in_use(Hugetlb, self.nr_hstates):
            raise self.malformed(f"nr_hstates {self.nr_hstates}: entries after it are not zeros")

    @property
    def nbytes(self) -> int:
        """Bytes of the structure."""
        return (HugetlbPadded if self.padded else Hugetlb).layout.size


class HugeFolio(Record):
    """A huge page of a file."""

    pfn = u64(bits=52, unit="pfn", owns="data")
    _reserved = u64(bits=12)
    index = u64(unit="pages")


@decoder("huge-memfd-v1")
class HugeMemfd(FolioFile):
    """File `huge-memfd-v1`: a memfd of huge pages."""

    draft = True
    source = "include/linux/kho/abi/hugetlb.h of the series for hugetlb-backed memfds"

    size = u64(unit="bytes")
    pos = u64(unit="bytes", default=0)
    nr_folios = u64()
    folios = vmalloc(HugeFolio, count="nr_folios", listed=False)
    order = u8(at_most=63)

    def present(self, flags: int) -> bool:
        """Every folio of the list has content: there is no flag for it."""
        return True


@decoder("tmpfs-mnt-v1")
class TmpfsMount(Declared):
    """File `tmpfs-mnt-v1`: a mount of tmpfs."""

    draft = True
    source = "include/linux/kho/abi/tmpfs.h of the series for tmpfs"

    max_blocks = u64(unit="pages")
    mode = u32(unit="mode")
    flags = u32(default=0)


@decoder("tmpfs-file-v1")
class TmpfsFile(FolioFile):
    """File `tmpfs-file-v1`: a regular file in the root of a preserved mount of tmpfs."""

    draft = True
    source = "include/linux/kho/abi/tmpfs.h of the series for tmpfs"

    mnt_token = u64(unit="token")
    pos = u64(unit="bytes", default=0)
    size = u64(unit="bytes")
    mode = u32(unit="mode")
    flags = u32(default=0)
    nr_folios = u64()
    folios = vmalloc(FolioEntry, count="nr_folios", listed=False)
    name = text(256)

    def check(self) -> None:
        """Refuse a name that is not one component of a path."""
        if self.name in ("", ".", "..") or "/" in self.name:
            raise self.malformed(f"name {self.name!r}: not a name of a file in the root of its mount")


@decoder("eventfd-v1")
class EventFd(Declared):
    """File `eventfd-v1`: the counter of an eventfd."""

    draft = True
    source = "include/linux/kho/abi/eventfd.h of a series for eventfds, not in abi.md section 9"
    unsure = "its compatible and layout are those of one posting"

    count = u64()
    flags = u32(flags={1: "EFD_SEMAPHORE", 0o4000: "EFD_NONBLOCK", 0o2000000: "EFD_CLOEXEC"}, default=0)


@decoder("hwpoison")
class HwPoison(Declared):
    """Subtree `hwpoison`: the pages with memory errors that the previous kernel took out of use."""

    draft = True
    source = "include/linux/kho/abi/hwpoison.h of the series for memory failures"

    version = u32(equals=1)
    _pad = raw(4)
    count = u64()
    pfns = vmalloc(u64(unit="pfn"), count="count")

    def findings(self) -> Iterator[Finding]:
        """Report poisoned pages that are inside a preserved folio (KHO035)."""
        from ..handover.rules import Finding

        inc = self.blob.inc
        page = inc.page_size
        orders = list(inc.folios_by_order)
        limit = (1 << 64) // page
        found: list[Finding] = []
        more = 0
        for pfn in dict.fromkeys(self.pfns):
            if pfn >= limit:
                continue
            for order in orders:
                head = (pfn >> order << order) * page
                if not inc.preserves(head, order):
                    continue
                if len(found) == MOST:
                    more += 1
                else:
                    value = f"in the preserved folio of order {order} at {head:#x}"
                    found.append(Finding("KHO035", f"poisoned page at {pfn * page:#x}", value, pfn * page))
                break
        if more:
            last = found.pop()
            found.append(Finding(last.id, last.place, f"{last.value} (and {more + 1} more places)", last.phys))
        yield from found
