"""`Outgoing`: a handover to the next owner, with writers for the payloads of the kernel's own producers."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from .. import _kho
from .._types import MemfdFolio
from ..errors import ExistsError, FinalizedError, NotFoundError, ParameterError, UnsupportedAbiError
from ..formats import Declared, kernel_write
from ..formats.declare import compatible_of
from ..formats.kernel_write import VM_ALLOC, VM_HUGE, VMALLOC, Holding, MemfdLayout, release_all
from ..formats.luo_write import LuoOut, luo_out
from ..formats.registry import writer_of
from .style import Style, style_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["VM_ALLOC", "VM_HUGE", "Outgoing"]


class Outgoing(_kho.Outgoing):
    """A handover that is being written (kho_out), one at a time per arena.

    Takes folios, page ranges and subtrees, and the payloads of Linux 7.3: vmalloc areas, LUO sessions with memfds,
    `reserve_mem=` regions, kexec metadata, kho_test. Writers preserve the pages that they allocate, and free them when
    the payload is removed. Bitmaps are in the arena's pages and are never copied. A handover that is dropped before
    `finalize` releases everything.

    Args:
        abi: the `compatible` to write, with the payload formats of its newest kernel; default: kho-v1.
        kernel: write what this release writes: "6.17", "7.0.11". It decides what the ABI leaves open: bitmap size, form
            of the root FDT, LUO, FLBs, memfd, list of kho_test. Payloads that this kernel does not have are refused.
        bitmap_bytes, fdt_phys, map_phys: as in the base class.

    Raises: ParameterError if `kernel` does not write `abi` or `bitmap_bytes`; as the base class.

    >>> out = kho.Outgoing(arena, "kho-v4")
    >>> out.add_memfd("vm-1", 0x10, b"guest memory")
    >>> out.set_kexec_metadata("7.3.4", 1)
    >>> out.finalize()

    """

    _style: Style

    def __new__(
        cls,
        arena: _kho.Arena,
        abi: str | None = None,
        *,
        kernel: str | None = None,
        bitmap_bytes: int | None = None,
        fdt_phys: int | None = None,
        map_phys: int | None = None,
    ) -> Self:
        """Begin a handover."""
        style = style_of(abi, kernel, bitmap_bytes, arena.page_size)
        self = super().__new__(
            cls,
            arena,
            style.abi,
            bitmap_bytes=style.bitmap_bytes,
            fdt_phys=fdt_phys,
            map_phys=map_phys,
            edited_root=style.edited_root,
        )
        self._style = style
        return self

    def __init__(
        self,
        arena: _kho.Arena,
        abi: str | None = None,
        *,
        kernel: str | None = None,
        bitmap_bytes: int | None = None,
        fdt_phys: int | None = None,
        map_phys: int | None = None,
    ) -> None:
        self._places: deque[int] | None = None
        self._vmallocs: dict[int, Holding] = {}
        self._held: dict[str, Holding] = {}
        self._flbs: dict[str, Holding] = {}
        self._regions: dict[str, tuple[tuple[int, int], Holding]] = {}
        self._luo: LuoOut | None = None

    # Page lists

    @contextlib.contextmanager
    def placed(self, places: Iterable[int]) -> Iterator[None]:
        """Within the block, place the pages that writers allocate at these addresses, in order.

        Writers allocate pages in the kernel's order: a memfd its structure, data, folio list and chunks; LUO its own
        page, the array of sessions of luo-v1, and the page of the FLBs; a session its block (luo-v5) and, with the
        first file, its file block or array; kho_test its list, the
        chunks and the FDT.
        Raises: ParameterError if addresses are left unused; PageStateError if one is in use.
        """
        before, self._places = self._places, deque(places)
        try:
            yield
            if self._places:
                raise ParameterError(f"placed: no page was allocated at {', '.join(map(hex, self._places))}")
        finally:
            self._places = before

    def preserve_vmalloc(
        self, data: Buffer | Iterable[_kho.Folio | int], *, order: int = 0, flags: int = VM_ALLOC
    ) -> bytes:
        """Preserve a vmalloc area: its blocks of pages, and the chunks that list them (kho_preserve_vmalloc).

        Args:
            data: bytes, copied into folios of `order`; or allocated folios (or their addresses), all of one order.
            flags: VM_ALLOC, VM_HUGE.

        Returns: the 16 bytes of `struct kho_vmalloc`, for readers in `kho.formats` and `unpreserve_vmalloc`; zeros if
            there is no data.
        Raises: OutOfMemoryError, FinalizedError, PageStateError, ScratchOverlapError; ParameterError for folios of
            several orders. An error leaves the handover unchanged.

        """
        with self._hold() as hold:
            blocks, order, _ = kernel_write.blocks_of(hold, data, order)
            descriptor = kernel_write.vmalloc(hold, blocks, order, flags)
        if blocks:
            self._vmallocs[VMALLOC.unpack(descriptor)[0]] = hold
        return descriptor

    def unpreserve_vmalloc(self, descriptor: bytes) -> None:
        """Withdraw an area that `preserve_vmalloc` preserved (kho_unpreserve_vmalloc).

        Raises: NotFoundError, FinalizedError.
        """
        first = VMALLOC.unpack(descriptor)[0] if len(descriptor) == VMALLOC.size else 0
        if descriptor == kernel_write.NULL_VMALLOC:
            return
        if first not in self._vmallocs:
            raise NotFoundError(f"vmalloc {descriptor.hex()}: not preserved by this handover")
        self._vmallocs[first].release()
        del self._vmallocs[first]

    # LUO

    def add_luo(self, *, liveupdate_num: int = 1, version: str | None = None) -> None:
        """Add the subtree `LUO` without sessions; the other LUO methods create it if it is missing.

        Args:
            liveupdate_num: number of live updates so far, including this one.
            version: the compatible to write, by default that of the ABI or kernel; "luo-features" is the draft with
                feature headers, whose memfds have them too (abi.md section 9).

        Raises: ExistsError, OutOfMemoryError, FinalizedError; UnsupportedAbiError if the kernel has no LUO, or kho
            cannot write its version; so do the other methods that add to LUO.

        """
        if self._luo is not None or "LUO" in self.subtrees:
            raise ExistsError("subtree LUO exists")
        this = weakref.ref(self)

        def hold() -> Holding:
            out = this()
            assert out is not None, "LUO exists only as long as its handover"
            return out._hold()

        style = self._style
        luo = luo_out(style.luo, style.whose, hold, version, liveupdate_num=liveupdate_num, flb_node=style.flb_node)
        try:
            self.link_subtree("LUO", luo.phys, luo.size)
        except BaseException:
            luo.release()
            raise
        self._luo = luo

    def add_session(self, name: str, *, empty: bool = False) -> None:
        """Add a LUO session without files.

        Args: name: 1 to 63 bytes as UTF-8; surrogates are bytes that are no UTF-8, as in `os.fsdecode`.
            empty: accept an empty name, as CREATE_SESSION does in Linux 6.19 to 7.1.3.
        Raises: ExistsError; ParameterError for a name of more than 63 bytes.
        """
        self._luo_open("add_session").add_session(name, empty=empty)

    def add_file(self, session: str, token: int, compatible: str, data: int) -> None:
        """Add a file of any kind to a session; the session is created if it does not exist.

        Args: token: identifies the file in its session. compatible: at most 47 bytes. data: 64 bits for the file's
            decoder, usually the address of preserved memory.
        Raises: ExistsError for a duplicate token; ParameterError.
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
        """Add a memfd to a LUO session (memfd_luo_preserve); the session is created if it does not exist.

        Args:
            token: identifies the file in its session.
            data: the contents, copied once into folios of `order`; or allocated folios of any orders, in the order of
                the file; or `MemfdFolio` objects, to set index and flags of each folio.
            pos: the file position. size: bytes in the file; by default the end of the data.
            seals: F_SEAL_* bits; memfd-v1, which goes with kho-v1 and kho-v2, cannot record any: its kernels lose them.

        Returns: the physical address of the `struct memfd_luo_ser`.
        Raises: ExistsError for a duplicate token; OutOfMemoryError, FinalizedError, PageStateError, MisalignedError,
            ParameterError; UnsupportedAbiError if kho cannot write the memfd version of the handover's ABI. An error
            leaves the handover unchanged.

        """
        named = self._luo.memfd if self._luo is not None else None
        named = named or self._style.memfd
        version: MemfdLayout = writer_of("memfd", named, self._style.whose, family="memfd-")
        luo = self._luo_open("add_memfd")

        def write() -> tuple[int, Holding]:
            with self._hold() as hold:
                return kernel_write.memfd(hold, version, data, pos=pos, size=size, seals=seals, order=order), hold

        return luo.add_file(session, token, version.compatible, write)

    def add_payload(
        self,
        kind: type[Declared],
        values: Mapping[str, Any] | bytes,
        *,
        file: tuple[str, int] | None = None,
        flb: int | None = None,
        subtree: str | None = None,
        draft: bool = False,
    ) -> int:
        """Add a payload whose format is declared (docs/decoders.md), as a file, as an FLB or as a subtree.

        Args:
            kind: a registered class of `kho.formats.Declared`; files and FLBs get its compatible.
            values: its fields, as `kind.encode` takes them, or its bytes. The pages of lists are allocated and
                preserved; memory that records refer to is the caller's to preserve.
            file: the session and the token, for a file.
            flb: the number of files that share it, for file-lifecycle-bound data.
            subtree: the name, for a subtree.
            draft: confirms that the format is a draft, which no released kernel reads.

        Returns: the physical address of the structure.
        Raises: ParameterError for a draft without draft=True, for a value that does not fit, and unless one of file,
            flb and subtree is given; ExistsError, OutOfMemoryError, FinalizedError. An error leaves the handover
            unchanged.

        """
        if kind.draft and not draft:
            raise ParameterError(f"{kind.__name__}: a draft, which no released kernel reads; draft=True writes it")
        if [file, flb, subtree].count(None) != 2:
            raise ParameterError("add_payload: exactly one of file, flb and subtree is required")

        def write() -> tuple[int, Holding]:
            with self._hold() as hold:
                return hold.put(encoded(hold)), hold

        def encoded(hold: Holding) -> bytes:
            return bytes(values) if isinstance(values, bytes) else kind.encode(hold, **values)

        if file is not None:
            return self._luo_open("add_payload").add_file(*file, compatible_of(kind), write)
        if flb is not None:
            luo, name = self._luo_open("add_payload"), compatible_of(kind)
            with self._hold() as hold:
                made = hold.put(encoded(hold))
                luo.add_flb(name, made, flb)
            self._flbs[name] = hold
            return made
        assert subtree is not None
        with self._hold() as hold:
            made = self.add_subtree(subtree, encoded(hold))
        self._held[subtree] = hold
        return made

    def remove_file(self, session: str, token: int) -> None:
        """Remove a file from its session. Raises: NotFoundError, FinalizedError."""
        self._luo_open("remove_file").remove_file(session, token)

    def remove_session(self, session: str) -> None:
        """Remove a session and its files. Raises: NotFoundError, FinalizedError."""
        self._luo_open("remove_session").remove_session(session)

    def add_flb(self, name: str, data: int, count: int = 1) -> None:
        """Add file-lifecycle-bound data: what `count` files of one kind share.

        Raises: ExistsError; ParameterError.
        """
        self._luo_open("add_flb").add_flb(name, data, count)

    def remove_flb(self, name: str) -> None:
        """Remove file-lifecycle-bound data. Raises: NotFoundError, FinalizedError."""
        self._luo_open("remove_flb").remove_flb(name)
        if name in self._flbs:
            self._flbs.pop(name).release()

    def _luo_open(self, what: str) -> LuoOut:
        """Return the LUO writer, created if missing. Raises: FinalizedError."""
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
        """Add a `reserve_mem=` region to the subtree `memblock`.

        Args: memory: size in bytes of a region to allocate, zeroed, a multiple of the page size, at `start` if given;
            or allocated folios that are adjacent in memory.
        Returns: `(start, size)`, as later in `kho.Incoming.reserve_mem[name]`.
        Raises: ExistsError; OutOfMemoryError; ParameterError; FinalizedError; PageStateError. An error leaves the
            handover unchanged.
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
        """Remove a region, and with the last one the subtree. Raises: NotFoundError, FinalizedError."""
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
                raise ParameterError(f"reserve_mem {name!r}: {memory} bytes are not a multiple of {page}")
            pages = memory // page
            if start is None:
                # Finds room with a folio that is large enough, then takes only the requested pages of it.
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
                raise ParameterError(f"reserve_mem {name!r}: a gap after the folio at {folio.phys:#x}")
        size = sum(folio.nbytes for folio in folios)
        hold.keep(folios[0].phys, size // page)
        return folios[0].phys, size

    def _write_memblock(self) -> None:
        """Replace the subtree, as its size depends on the number of regions."""
        if "memblock" in self.subtrees:
            place: int | None = self.subtrees["memblock"][0]
            super().remove_subtree("memblock")
        else:
            place = self._places.popleft() if self._places else None
        if self._regions:
            blob = kernel_write.memblock_fdt({name: region for name, (region, _) in self._regions.items()})
            self.add_subtree("memblock", blob, phys=place)

    def set_kexec_metadata(self, previous_release: str, kexec_count: int) -> None:
        """Write the subtree `kexec-metadata` (from Linux 7.1).

        It names this kernel and the number of kexecs so far.

        Args: previous_release: at most 64 bytes. kexec_count: 32 bits.
        Raises: ParameterError, FinalizedError; UnsupportedAbiError for a `kernel` that does not have it.
        """
        if not self._style.kexec_metadata:
            raise UnsupportedAbiError(f"kexec-metadata: {self._style.whose} does not have it; leave it out")
        blob = kernel_write.metadata(previous_release, kexec_count)
        if "kexec-metadata" in self.subtrees:
            self._rewrite_subtree("kexec-metadata", blob)
        else:
            place = self._places.popleft() if self._places else None
            self.add_subtree("kexec-metadata", blob, phys=place)

    def add_kho_test(
        self, folios: Iterable[_kho.Folio], *, machine: str | None = None, inline: bool | None = None
    ) -> int:
        """Add the subtree `kho_test` (lib/test_kho.c): folios and a checksum of their present content.

        Args:
            folios: allocated; they are preserved.
            machine: whose `csum_partial` to use, "x86_64" or "aarch64"; default: one with the arena's page size.
            inline: list them in the FDT itself, as Linux 6.16 and 6.17 do; default: as the handover's kernel does.

        Returns: the checksum, 32 bits.
        Raises: ExistsError; ParameterError; as `preserve_vmalloc`. An error leaves the handover unchanged.

        """
        given = list(folios)
        inline = self._style.inline_test if inline is None else inline
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
        """Remove a subtree and free its pages, with all that a writer added to it (kho_remove_subtree).

        Raises: NotFoundError, FinalizedError; PageStateError while these pages contain other preserved memory.
        """
        super().remove_subtree(name)
        if name == "LUO" and self._luo is not None:
            luo, self._luo = self._luo, None
            luo.release()
            while self._flbs:
                self._flbs.popitem()[1].release()
        elif name == "memblock":
            while self._regions:
                self._regions.popitem()[1][1].release()
        elif name in self._held:
            self._held.pop(name).release()

    def finalize(self) -> int:
        """Serialize and close the handover: from now on changes raise FinalizedError (EBUSY).

        Returns the physical address of the root FDT, which the arena records.
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
        """Undo `finalize`. Raises: FinalizedError if the handover is not finalized."""
        super().abort()
        if self._luo is not None:
            self._luo.unseal()

    def save(self, path: str | os.PathLike[str], *, everything: bool = False, machine: str | None = None) -> None:
        """Write the finalized handover as an ELF core, as `kho.Image.save` does.

        Raises: NoHandoverError; SourceError.
        """
        from .elfcore import Image

        Image.of_arena(self.arena, machine=machine).save(path, everything=everything)

    def _hold(self) -> Holding:
        return Holding(self, self._places)

    def __del__(self) -> None:
        """Release everything, unless the handover is finalized."""
        if not hasattr(self, "_luo") or self.finalized:
            return
        # Subtrees first: pages of linked blobs cannot be freed.
        for name in {"LUO", "kho_test"} & self.subtrees.keys():
            super().remove_subtree(name)
        if self._luo is not None:
            release_all(self._luo.holdings(), self)
        release_all([hold for _, hold in self._regions.values()], self)
        release_all(self._held.values(), self)
        release_all(self._flbs.values(), self)
        release_all(self._vmallocs.values(), self)
