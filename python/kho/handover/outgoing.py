"""Handing over: `Outgoing`, with writers for what the kernel's own producers hand over."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from .. import _kho
from .._types import MemfdFolio
from ..errors import ExistsError, FinalizedError, NotFoundError, ParameterError
from ..formats import kernel_write
from ..formats.kernel_write import VM_ALLOC, VM_HUGE, VMALLOC, Holding, MemfdLayout, give_back
from ..formats.luo_write import LuoOut, luo_out
from ..formats.registry import writer_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["VM_ALLOC", "VM_HUGE", "Outgoing"]

DEFAULT_ABI = "kho-v1"
"""What an `Outgoing` writes unless it is told: the version of the earliest kernels with KHO."""


class Outgoing(_kho.Outgoing):
    """A handover in the making (kho_out): what of an arena the next owner gets. One at a time per arena.

    Beside folios, page ranges and subtrees of one's own it takes what Linux 7.3 hands over: vmalloc areas, LUO sessions
    with memfds, `reserve_mem=` regions, the chain of kexecs, the kernel's test vector. What a writer allocates it also
    preserves, and frees when the payload is removed. Bitmaps live in the arena's pages and are never copied. Dropped
    before `finalize`, a handover leaves nothing behind.

    >>> out = kho.Outgoing(arena, "kho-v4")
    >>> out.add_memfd("vm-1", 0x10, b"guest memory")
    >>> out.set_kexec_metadata("7.3.4", 1)
    >>> out.finalize()
    """

    def __init__(
        self,
        arena: _kho.Arena,
        abi: str = DEFAULT_ABI,
        *,
        bitmap_bytes: int | None = None,
        fdt_phys: int | None = None,
        map_phys: int | None = None,
    ) -> None:
        self._places: deque[int] | None = None
        self._vmallocs: dict[int, Holding] = {}
        self._held: dict[str, Holding] = {}
        self._regions: dict[str, tuple[tuple[int, int], Holding]] = {}
        self._luo: LuoOut | None = None

    # Page lists

    @contextlib.contextmanager
    def placed(self, places: Iterable[int]) -> Iterator[None]:
        """Within the block, put the pages that writers allocate at these addresses, in the order in which they do.

        Writers take pages as the kernel does: a memfd its structure, its data, its list, the list's chunks; LUO its
        own page and the FLBs'; a session its block, then with the first file its files'; kho_test its list, the chunks,
        the FDT.
        Raises: ParameterError for addresses that are left over; PageStateError for one in use.
        """
        before, self._places = self._places, deque(places)
        try:
            yield
            if self._places:
                raise ParameterError(f"placed: nothing was put at {', '.join(map(hex, self._places))}")
        finally:
            self._places = before

    def preserve_vmalloc(
        self, data: Buffer | Iterable[_kho.Folio | int], *, order: int = 0, flags: int = VM_ALLOC
    ) -> bytes:
        """Preserve a vmalloc area: blocks of pages, and the chunks that list them (kho_preserve_vmalloc).

        Args:
            data: bytes, copied into folios of `order`; or allocated folios (or their addresses), all of one order.
            flags: VM_ALLOC, VM_HUGE.

        Returns: the `struct kho_vmalloc`, 16 bytes, for `kho.payload` readers and `unpreserve_vmalloc`; zeros for
            no data.
        Raises: OutOfMemoryError, FinalizedError, PageStateError, ScratchOverlapError; ParameterError for folios of
            several orders. Nothing has changed then.

        """
        with self._hold() as hold:
            blocks, order, _ = kernel_write.blocks_of(hold, data, order)
            descriptor = kernel_write.vmalloc(hold, blocks, order, flags)
        if blocks:
            self._vmallocs[VMALLOC.unpack(descriptor)[0]] = hold
        return descriptor

    def unpreserve_vmalloc(self, descriptor: bytes) -> None:
        """Take back what `preserve_vmalloc` gave (kho_unpreserve_vmalloc). Raises: NotFoundError, FinalizedError."""
        first = VMALLOC.unpack(descriptor)[0] if len(descriptor) == VMALLOC.size else 0
        if descriptor == kernel_write.NULL_VMALLOC:
            return
        if first not in self._vmallocs:
            raise NotFoundError(f"vmalloc {descriptor.hex()}: this handover has not preserved it")
        self._vmallocs[first].release()
        del self._vmallocs[first]

    # LUO

    def add_luo(self, *, liveupdate_num: int = 1) -> None:
        """Add the subtree `LUO` without sessions; the others make it where it is missing.

        Args: liveupdate_num: how many live updates there have been, this one included.
        Raises: ExistsError, OutOfMemoryError, FinalizedError; UnsupportedAbiError if kho cannot write the LUO version
            that goes with the handover's ABI, here and in what adds to LUO.
        """
        if self._luo is not None or "LUO" in self.subtrees:
            raise ExistsError("subtree LUO exists")
        this = weakref.ref(self)

        def hold() -> Holding:
            out = this()
            assert out is not None, "its LUO goes with a handover"
            return out._hold()

        luo = luo_out(self.abi, hold, liveupdate_num=liveupdate_num)
        try:
            self.link_subtree("LUO", luo.phys, luo.size)
        except BaseException:
            luo.release()
            raise
        self._luo = luo

    def add_session(self, name: str) -> None:
        """Add a LUO session without files. Raises: ExistsError; ParameterError for a name beyond 63 bytes."""
        self._luo_open("add_session").add_session(name)

    def add_file(self, session: str, token: int, compatible: str, data: int) -> None:
        """Add a file of any kind to a session, which is made if there is none.

        Args: token: names the file in its session. compatible: at most 47 bytes. data: 64 bits for the file's decoder,
            by custom the address of preserved memory.
        Raises: ExistsError for a token given twice; ParameterError.
        """
        self._luo_open("add_file").add_file(session, token, compatible, lambda: (data, None))

    def add_memfd(
        self,
        session: str,
        token: int,
        data: Buffer | Iterable[_kho.Folio | MemfdFolio],
        *,
        pos: int = 0,
        size: int | None = None,
        seals: int = 0,
        order: int = 0,
    ) -> int:
        """Add a memfd to a LUO session, which is made if there is none (memfd_luo_preserve).

        Args:
            token: names the file in its session.
            data: the contents, copied once into folios of `order`; or allocated folios that hold them, in the order of
                the file, of any orders; or a `MemfdFolio` each, for holes and flags of one's own.
            pos: the file position. size: bytes in the file; by default all there is.
            seals: F_SEAL_* bits; memfd-v1, before kho-v3, has none.

        Returns: the address of the `struct memfd_luo_ser`.
        Raises: ExistsError for a token given twice; OutOfMemoryError, FinalizedError, PageStateError, MisalignedError,
            ParameterError; UnsupportedAbiError if kho cannot write the memfd version that goes with the handover's
            ABI. Nothing has changed then.

        """
        version: MemfdLayout = writer_of("memfd", _kho.abis()[self.abi].memfd, self.abi, family="memfd-")
        luo = self._luo_open("add_memfd")

        def write() -> tuple[int, Holding]:
            with self._hold() as hold:
                return kernel_write.memfd(hold, version, data, pos=pos, size=size, seals=seals, order=order), hold

        return luo.add_file(session, token, version.compatible, write)

    def remove_file(self, session: str, token: int) -> None:
        """Remove a file from its session. Raises: NotFoundError, FinalizedError."""
        self._luo_open("remove_file").remove_file(session, token)

    def remove_session(self, session: str) -> None:
        """Remove a session with all its files. Raises: NotFoundError, FinalizedError."""
        self._luo_open("remove_session").remove_session(session)

    def add_flb(self, name: str, data: int, count: int = 1) -> None:
        """Add file-lifecycle-bound data: what `count` files of one kind share. Raises: ExistsError; ParameterError."""
        self._luo_open("add_flb").add_flb(name, data, count)

    def remove_flb(self, name: str) -> None:
        """Remove file-lifecycle-bound data. Raises: NotFoundError, FinalizedError."""
        self._luo_open("remove_flb").remove_flb(name)

    def _luo_open(self, what: str) -> LuoOut:
        """Give LUO, made if need be, as long as it can change."""
        if self.finalized:
            raise FinalizedError(f"{what}: the handover is finalized (EBUSY)")
        if self._luo is None:
            self.add_luo()
        assert self._luo is not None
        return self._luo

    # Subtrees of the kernel itself

    def add_reserve_mem(
        self, name: str, memory: int | Sequence[_kho.Folio], *, start: int | None = None
    ) -> tuple[int, int]:
        """Add a `reserve_mem=` region to the subtree `memblock`, which then names one more.

        Args: memory: bytes of a region to allocate, zeroed, a multiple of the page size, at `start` if given; or
            allocated folios that are adjacent in memory.
        Returns: (start, size), as `kho.Incoming.reserve_mem[name]` will have it.
        Raises: ExistsError; OutOfMemoryError; ParameterError; FinalizedError; PageStateError. Nothing has changed then.
        """
        if name in self._regions:
            raise ExistsError(f"reserve_mem {name!r} exists")
        with self._hold() as hold:
            region = self._reserve(hold, name, memory, start)
            self._regions[name] = (region, hold)
            try:
                self._write_memblock()
            except BaseException:
                del self._regions[name]
                raise
        return region

    def remove_reserve_mem(self, name: str) -> None:
        """Remove a region; without any, the subtree goes. Raises: NotFoundError, FinalizedError."""
        if name not in self._regions:
            raise NotFoundError(f"no reserve_mem {name!r}")
        if self.finalized:
            raise FinalizedError("remove_reserve_mem: the handover is finalized (EBUSY)")
        _, hold = self._regions.pop(name)
        self._write_memblock()
        hold.release()

    def _reserve(
        self, hold: Holding, name: str, memory: int | Sequence[_kho.Folio], start: int | None
    ) -> tuple[int, int]:
        page = self.arena.page_size
        if isinstance(memory, int):
            if memory <= 0 or memory % page:
                raise ParameterError(f"reserve_mem {name!r}: {memory} bytes, which must be a multiple of {page}")
            pages = memory // page
            if start is None:
                # The pages of a folio large enough, but no more of them than are asked for.
                found = self.arena.alloc((pages - 1).bit_length())
                start = found.phys
                found.free()
            hold.range(start, pages)
            return start, memory
        folios = sorted(memory, key=lambda folio: folio.phys)
        if not folios:
            raise ParameterError(f"reserve_mem {name!r}: no folios")
        for folio, following in pairwise(folios):
            if folio.phys + folio.nbytes != following.phys:
                raise ParameterError(f"reserve_mem {name!r}: a gap behind the folio at {folio.phys:#x}")
        size = sum(folio.nbytes for folio in folios)
        hold.keep(folios[0].phys, size // page)
        return folios[0].phys, size

    def _write_memblock(self) -> None:
        """Replace the subtree: its size changes with its regions."""
        if "memblock" in self.subtrees:
            place: int | None = self.subtrees["memblock"][0]
            super().remove_subtree("memblock")
        else:
            place = self._places.popleft() if self._places else None
        if self._regions:
            blob = kernel_write.memblock_fdt({name: region for name, (region, _) in self._regions.items()})
            self.add_subtree("memblock", blob, phys=place)

    def set_kexec_metadata(self, previous_release: str, kexec_count: int) -> None:
        """Say which kernel this is and how many kexecs there have been: the subtree `kexec-metadata` (from Linux 7.1).

        Args: previous_release: at most 64 bytes. kexec_count: 32 bits.
        Raises: ParameterError, FinalizedError.
        """
        blob = kernel_write.metadata(previous_release, kexec_count)
        if "kexec-metadata" in self.subtrees:
            self._rewrite_subtree("kexec-metadata", blob)
        else:
            place = self._places.popleft() if self._places else None
            self.add_subtree("kexec-metadata", blob, phys=place)

    def add_kho_test(self, folios: Iterable[_kho.Folio], *, machine: str | None = None, inline: bool = False) -> int:
        """Add the kernel's own test vector: folios and a checksum over what they hold now (lib/test_kho.c).

        Args:
            folios: allocated; they are preserved.
            machine: whose `csum_partial` is meant, "x86_64" or "aarch64"; by default what has the arena's page size.
            inline: list them in the FDT itself, as Linux 6.16 does.

        Returns: the checksum, 32 bits.
        Raises: ExistsError; ParameterError; as `preserve_vmalloc`. Nothing has changed then.

        """
        given = list(folios)
        if machine is None:
            machine = "x86_64" if self.arena.page_size == 4096 else "aarch64"
        total = kernel_write.csum((memoryview(folio) for folio in given), machine)
        with self._hold() as hold:
            for folio in given:
                hold.keep(folio.phys, folio.nr_pages)
            pairs = [(folio.phys, folio.order) for folio in given]
            listed = None
            if not inline:
                blocks, _, _ = kernel_write.blocks_of(hold, kernel_write.folio_words(pairs))
                listed = kernel_write.vmalloc(hold, blocks)
            blob = kernel_write.kho_test_fdt(pairs, total, listed)
            pages = -(-(self.arena.page_size + 8 * len(pairs)) // self.arena.page_size)
            home = hold.page((pages - 1).bit_length())
            self.arena.write(home.phys, blob)
            self.link_subtree("kho_test", home.phys, len(blob))
        self._held["kho_test"] = hold
        return total

    # The handover as a whole

    def remove_subtree(self, name: str) -> None:
        """Remove a subtree and free the pages made for it (kho_remove_subtree), with all that a writer added to it.

        Raises: NotFoundError, FinalizedError; PageStateError while something else in these pages is preserved.
        """
        super().remove_subtree(name)
        if name == "LUO" and self._luo is not None:
            luo, self._luo = self._luo, None
            luo.release()
        elif name == "memblock":
            while self._regions:
                self._regions.popitem()[1][1].release()
        elif name in self._held:
            self._held.pop(name).release()

    def finalize(self) -> int:
        """Serialize and close the handover; the FDT's address, also recorded in the arena (EBUSY for changes from now).

        LUO's lists are written here, as the kernel does at freeze.
        Raises: FinalizedError the second time; OutOfMemoryError.
        """
        if self._luo is None or self.finalized:
            return super().finalize()
        self._luo.seal()
        try:
            return super().finalize()
        except BaseException:
            self._luo.unseal()
            raise

    def abort(self) -> None:
        """Undo `finalize`. Raises: FinalizedError if there is nothing to undo."""
        super().abort()
        if self._luo is not None:
            self._luo.unseal()

    def save(self, path: str | os.PathLike[str], *, everything: bool = False, machine: str | None = None) -> None:
        """Write the finalized handover as an ELF core; see `kho.Image.save`. Raises: NoHandoverError; SourceError."""
        from .elfcore import Image

        Image.of_arena(self.arena, machine=machine).save(path, everything=everything)

    def _hold(self) -> Holding:
        return Holding(self, self._places)

    def __del__(self) -> None:
        """Leave nothing behind, unless it was finalized."""
        if not hasattr(self, "_luo") or self.finalized:
            return
        # Pages of linked blobs cannot be freed before.
        for name in {"LUO", "kho_test"} & self.subtrees.keys():
            super().remove_subtree(name)
        if self._luo is not None:
            give_back(self._luo.holdings(), self)
        give_back([hold for _, hold in self._regions.values()], self)
        give_back(self._held.values(), self)
        give_back(self._vmallocs.values(), self)
