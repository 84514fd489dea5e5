"""What becomes of each subtree in a conversion, and which memory is then no longer preserved.

LUO is written in the formats of the target (`convert_luo`). For a kernel that is named, kho_test lists its folios in
that kernel's form, and kexec-metadata is left out where the kernel does not read it. Other subtrees stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from .. import _kho
from ..formats import KhoTest, Luo, Metadata, Owned, Payload, payloads
from ..formats.kernel_write import folio_words, kho_test_fdt
from ..kernels import Kernel
from .compat import Offer
from .convert_luo import SUBTREE, Drop, Formats, plan_luo
from .elfcore import merged, whole_pages, without
from .outgoing import Outgoing
from .owners import claims

__all__ = ["Plan"]

KHO_TEST = "kho_test"
METADATA = "kexec-metadata"


class Plan:
    """What becomes of the subtrees of a handover, decided before anything is written.

    Args: kernel: the target, if one is named. drop, keep_unknown: as in `convert`.
    Raises: ParameterError, FormatError: as `plan_luo`.
    """

    def __init__(
        self, inc: _kho.Incoming, formats: Formats, kernel: Kernel | None, drop: Collection[Drop], *, keep_unknown: bool
    ) -> None:
        found = payloads(inc)
        self._form = None if kernel is None else kernel.kho_test
        self._test: KhoTest | None = None
        self.luo = plan_luo(found.get(SUBTREE), formats, drop, keep_unknown=keep_unknown)
        self.losses = list(self.luo.losses)
        """What is left out, as text."""
        self.written: set[str] = set()
        """Subtrees that are written again."""
        self.dropped: set[str] = set()
        """Subtrees that are left out."""
        if self.luo.action != "keep":
            (self.written if self.luo.action == "write" else self.dropped).add(SUBTREE)
        test, metadata = found.get(KHO_TEST), found.get(METADATA)
        if isinstance(test, KhoTest) and self._form not in (None, _form_of(test)):
            self._test = test
            self.written.add(KHO_TEST)
        if kernel is not None and not kernel.kexec_metadata and isinstance(metadata, Metadata):
            self.dropped.add(METADATA)
            self.losses.append(f"left out kexec-metadata, which {formats.whom} does not read")
        self.gone = self._gone(inc, found) if self.written or self.dropped else []
        """`(phys, nbytes)` of memory that is no longer preserved: whole pages, sorted."""

    def write(self, name: str, out: Outgoing) -> None:
        """Write one of the subtrees in `written`. Raises: as `LuoPlan.write`."""
        if name == SUBTREE:
            self.luo.write(out)
            return
        assert self._test is not None
        listed = out.preserve_vmalloc(folio_words(self._test.folios)) if self._form == "vmalloc" else None
        out.add_subtree(name, kho_test_fdt(self._test.folios, self._test.csum, listed))

    def amend(self, offer: Offer) -> None:
        """Change what `kho compat` judges as the conversion changes it."""
        self.luo.amend(offer)
        if METADATA in self.dropped:
            offer.metadata = False
        if KHO_TEST in self.written:
            offer.kho_test = self._form

    def _gone(self, inc: _kho.Incoming, found: Mapping[str, Payload]) -> list[tuple[int, int]]:
        """List the pages of what is replaced or left out, without those that anything else refers to."""
        replaced = Counter(_blob(found[name]) for name in self.written)
        replaced.update(self.luo.replaced)
        old: list[tuple[int, int]] = []
        others: list[tuple[int, int]] = []
        for name in self.dropped:
            old.append(_blob(found[name]))
            if not isinstance(found[name], Luo) or self.luo.action == "drop":
                for owned in found[name].owned():
                    old += _runs(owned, inc)
        for owned in claims(inc, {name: payload for name, payload in found.items() if name not in self.dropped}):
            memory = owned.memory
            if isinstance(memory, tuple) and replaced[memory]:
                replaced[memory] -= 1
                old.append(memory)
            elif self._test is not None and memory is self._test.list:
                old += _runs(owned, inc)
            else:
                others += _runs(owned, inc)
        folios = inc.tracker()
        whole = merged(_whole(phys, nbytes, inc, folios) for phys, nbytes in old)
        return without(whole, merged(whole_pages(phys, nbytes, inc.page_size) for phys, nbytes in others))


def _form_of(test: KhoTest) -> str:
    return "array" if test.list is None else "vmalloc"


def _blob(payload: Payload) -> tuple[int, int]:
    """Give the memory of a subtree's blob as `claims` does."""
    return payload.blob.phys, max(payload.blob.size or 1, 1)


def _runs(owned: Owned, inc: _kho.Incoming) -> list[tuple[int, int]]:
    """List the memory of a claim as runs of bytes."""
    memory = owned.memory
    if isinstance(memory, tuple):
        return [memory]
    if isinstance(memory, _kho.Memfd):
        return memory.memory_runs(memory.nr_listed)
    size = inc.page_size << memory.order
    return [*((phys, size) for phys in memory.blocks), *((phys, inc.page_size) for phys in memory.chunks)]


def _whole(phys: int, nbytes: int, inc: _kho.Incoming, folios: _kho.Tracker) -> tuple[int, int]:
    """Expand a run to whole pages, and to the folio that holds its first byte."""
    start, size = whole_pages(phys, nbytes, inc.page_size)
    pfn = start // inc.page_size
    for order in inc.folios_by_order:
        head = pfn >> order << order
        if (head, order) in folios:
            begin = head * inc.page_size
            return begin, max(start + size, begin + (inc.page_size << order)) - begin
    return start, size
