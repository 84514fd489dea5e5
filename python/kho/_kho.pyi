"""The compiled half of kho; import `kho`, not this module.

Sizes are in bytes and addresses are physical unless a name says otherwise. A pfn is an address divided by the page
size; a folio of order `o` is `1 << o` pages. An integer that does not fit 64 bits raises ParameterError or
OverflowError.
"""

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, Self, SupportsIndex, final, overload

from typing_extensions import Buffer, disjoint_base

from ._types import FolioInfo, MemfdFolio, OtherRoot, OwnedRange, PageInfo, Placement
from .errors import FdtError
from .formats import Luo, MemfdFile, Metadata, Payload, Region

__all__ = [
    "Abi",
    "Arena",
    "Fdt",
    "FdtNode",
    "FdtNodeBlock",
    "FdtPlaceholder",
    "FdtWriter",
    "FileMapping",
    "Folio",
    "FolioArray",
    "Incoming",
    "MappedBytes",
    "Memfd",
    "Memory",
    "Outgoing",
    "OwnerRows",
    "Pages",
    "PfnArray",
    "RunArray",
    "ScratchSpec",
    "Snapshot",
    "SnapshotSide",
    "Subtree",
    "Tracker",
    "Vmalloc",
    "__version__",
    "abis",
    "check_map",
    "check_memfd_folios",
    "find_memory",
    "find_outside_map",
    "find_unlisted",
    "join_owners",
    "kho_is_enabled",
    "kho_scratch_of",
    "open_memory",
    "parse_kho_scratch",
    "punch_hole",
    "split_compatible",
    "unpack_bytes",
    "versions_of",
]

__version__: Final[str]

def abis(*, drafts: bool = False) -> dict[str, Abi]:
    """The versions of KHO's ABI that this library knows, oldest first, by `compatible`: abi.md section 1.

    This is the one table of what differs between versions; Python keeps none of its own. With `drafts`, those of public
    drafts follow, which no release of Linux writes or reads (abi.md section 9).
    """

def split_compatible(compatible: str) -> tuple[str, list[str], list[str]]:
    """Take a compatible apart, as the draft of June 2026 composes it: `base;part;part` (abi.md section 9).

    Returns: the base, the parts, and what speaks against reading each part as the known version of it: unknown parts by
    name, and an order that no writer makes. A compatible without parts is its own base.
    """

def versions_of(fdt: Fdt) -> list[tuple[Abi, list[str]]]:
    """As which versions a root FDT may be read, the most plausible first.

    Each is `(abi, doubts)` (abi.md section 9). There is one, without doubts, if the FDT's `compatible` names a version,
    released or draft. Otherwise its properties decide, and the doubts say what is not known.

    Raises: FormatError without a `compatible`; UnsupportedAbiError if the FDT fits no version.
    """

@final
class Abi:
    """One version of KHO's ABI: what its kernels write and read, a row of `abis()`."""

    @property
    def compatible(self) -> str:
        """The root FDT's `compatible`."""
    @property
    def kernels(self) -> str:
        """The kernels that write and read it, as "Linux 7.2 and 7.3"."""
    @property
    def released(self) -> bool:
        """Whether a release of Linux writes it; otherwise only development trees did."""
    @property
    def draft(self) -> bool:
        """Whether only a public draft has it; such a version is written only if asked for by its name."""
    @property
    def decoded(self) -> bool:
        """Whether this library reads and writes it."""
    @property
    def map(self) -> Literal["chunk list", "radix tree"]:
        """How the preserved-memory map is written: "chunk list" or "radix tree" (abi.md sections 3 and 4)."""
    @property
    def levels(self) -> dict[int, int]:
        """Levels of the tree by page size in bytes, leaves included; empty for a chunk list.

        As KHO_TREE_MAX_DEPTH (include/linux/kho/abi/kexec_handover.h).
        """
    @property
    def order_bit(self) -> bool:
        """Whether the tree's depth allows for the bit of a key that tells order 0, which counts at 16 KiB."""
    @property
    def bitmaps(self) -> list[tuple[int | None, str]]:
        """Sizes of the bitmaps of a chunk list, as `(bytes, kernels)`; empty for a tree.

        The bytes are None for a bitmap of one page.
        """
    @property
    def live(self) -> bool:
        """Whether map and root FDT are in force from the start; otherwise they are written by finalizing."""
    @property
    def subtree_order(self) -> Literal["append", "prepend"]:
        """Where kho puts a new subtree among the root's nodes: "append" or "prepend"."""
    @property
    def map_property(self) -> str:
        """The root's property with the map's address."""
    @property
    def subtree_property(self) -> str:
        """A subtree's property with its blob's address."""
    @property
    def size_property(self) -> str | None:
        """A subtree's property with its blob's bytes; None if the version has none."""
    @property
    def cuts_at_nodes(self) -> bool:
        """Whether a preserved range of pages is cut where the NUMA node changes."""
    @property
    def luo(self) -> str | None:
        """The compatible of the LUO subtree that its kernels read; None if they have no LUO."""
    @property
    def memfd(self) -> str | None:
        """The compatible of a memfd in a LUO session that its kernels read."""
    @staticmethod
    def _add(compatible: str, *, like: str, **columns: str) -> Abi: ...
    @staticmethod
    def _remove(compatible: str) -> bool: ...

def unpack_bytes(path: str | PathLike[str], packed: bytes, limit: int) -> bytes:
    """Unpack a byte string that is packed with gzip, xz, zstd, bzip2, lz4 or snappy.

    Args:
        path: the file that it comes from, for messages.
        packed: the bytes; what follows the packed stream is ignored.
        limit: the most bytes that are returned.

    Returns: what was packed; of a damaged stream, or one that other bytes follow, the bytes before that.

    Raises: SourceError if nothing comes out of it; ParameterError for bytes that no known packing begins with.

    """

def kho_is_enabled(cmdline: str, default: bool = False) -> bool:
    """Say whether the kernel enables KHO with this command line.

    The last well-formed `kho=` wins, read with kstrtobool; a malformed one, or `kho` without a value, changes nothing.

    Args:
        cmdline: as in /proc/cmdline.
        default: CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT, which holds if no `kho=` decides.

    Source: kho_parse_enable, kernel/liveupdate/kexec_handover.c.

    """

def kho_scratch_of(cmdline: str) -> str | None:
    """Give the value of the last `kho_scratch=` of a command line, without quotes.

    The value may be malformed; `parse_kho_scratch` decides that.

    Returns: None if the command line has no `kho_scratch=`.
    """

def parse_kho_scratch(value: str, *, trailing_garbage: bool = False, zeros: bool = True) -> ScratchSpec:
    """Read a value of `kho_scratch=`: `N%` or `LOW,GLOBAL,PERNODE`.

    Sizes are read as memparse does: decimal, 0x or octal 0, a suffix K, M, G, T, P or E; beyond 64 bits they wrap.

    Args:
        value: the text after `kho_scratch=`.
        trailing_garbage: accept any text after the third size, as the kernels before 6.19 do.
        zeros: accept sizes of 0 as long as one is not, as the kernels from 6.18 on do.

    Raises: ParameterError with the part that is missing or malformed.

    Source: kho_parse_scratch_size, kernel/liveupdate/kexec_handover.c.

    """

@final
class ScratchSpec:
    """The requested size of the scratch areas, as `kho_scratch=` states it.

    Either `percent` is set and the three sizes are None, or the three sizes are set and `percent` is None. Instances
    are immutable, hashable, and equal if all four values are. Made by `parse_kho_scratch`.
    """

    @property
    def percent(self) -> int | None:
        """Percentage of the memory that the kernel reserved during boot; None if sizes were given."""
    @property
    def low(self) -> int | None:
        """Bytes in low memory, before rounding; None if a percentage was given."""
    @property
    def global_(self) -> int | None:
        """Bytes on any node, before rounding; None if a percentage was given."""
    @property
    def pernode(self) -> int | None:
        """Bytes on each NUMA node, before rounding; None if a percentage was given."""
    def sizes(
        self,
        reserved_low: int,
        reserved_all: int,
        reserved_per_node: Sequence[int],
        align: int = 2097152,
        *,
        rounds_all: bool = True,
    ) -> list[int]:
        """Compute the sizes of the areas in bytes, in the kernel's order: low, global, one per node.

        Args:
            reserved_low: bytes that the kernel reserved below 4 GiB during boot. Only a percentage uses the reserved
                amounts.
            reserved_all: bytes that it reserved everywhere.
            reserved_per_node: bytes that it reserved on each node; one area is computed for each item.
            align: what each size is rounded up to, a power of two: a pageblock, which is 2 MiB with 4 KiB pages, 32 MiB
                with 16 KiB pages, and 512 MiB with 64 KiB pages.
            rounds_all: whether the low and the global size of `LOW,GLOBAL,PERNODE` are rounded, too: from Linux
                6.18.42, 7.1.5 and 7.2 on (`kho.kernels.FIXES["scratch-rounding"]`).

        Raises: ParameterError for a wrong `align`; OutOfRangeError for a size beyond 64 bits.

        Source: scratch_size_update, kernel/liveupdate/kexec_handover.c.

        """
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Memory:
    """Physical memory to read: ELF cores, dumps, raw images, byte strings.

    Made by `Memory.open`, `Memory.from_segments` and `Memory.from_reader`. Threads may share it.
    """

    @staticmethod
    def open(
        *sources: str | PathLike[str],
        unpack_limit: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Memory:
        """Open files as one memory.

        Args:
            sources: a str is `FILE`, `FILE@ADDRESS`, `FILE@ADDRESS,offset=N,size=N,hole=START:END` (numbers as
                `kho.sizes` reads them: 0x40000000, 1.5G) or `FILE,machine=NAME` (the memory file of a virtual machine:
                q35, pc, microvm, virt, firecracker, cloud-hypervisor, firecracker-arm64, cloud-hypervisor-arm64); if a
                file of exactly that name exists, it is that file. `-` for FILE is standard input. A Path is a path. A
                file without an address is read as its content says: an ELF core, a kdump file, flattened or not, LiME,
                or else raw memory at 0. A file that is packed with gzip, xz, zstd, bzip2, lz4 or snappy, or that AVML
                wrote, is unpacked into an unlinked temporary file, and so is the content of a pipe; a packed raw image
                is accepted only if its name says what it is (`ram.bin.gz@0x40000000`). `kho.open` reads a raw image at
                another address if its handover is whole only there; `,check=no` forbids that.
            unpack_limit: the most bytes that a packed file or a pipe may come to. By default `KHO_UNPACK_LIMIT` of the
                environment, or else the larger of 2 GiB and 128 times the packed size (for bzip2 and xz: 512 MiB and 64
                times); 1 TiB for a pipe that is not packed.
            progress: called with the number of bytes unpacked so far; an exception that it raises ends the call.

        Raises: SourceError for a file that cannot be used, or that overlaps another one; ParameterError without
        sources.

        """
    @staticmethod
    def from_segments(segments: Sequence[tuple[int, bytes | bytearray]]) -> Memory:
        """Make a memory of byte strings at physical addresses.

        Args:
            segments: (phys, bytes) each, in any order.

        Raises: ParameterError if two segments overlap; OutOfRangeError if one ends beyond the address space.

        """
    @staticmethod
    def from_reader(
        read: Callable[[int, int], Buffer],
        ranges: Iterable[tuple[int, int]],
        *,
        vmcoreinfo: bytes | None = None,
    ) -> Memory:
        """Make a memory that a function reads, as that of a debugger or of another tool's dump.

        Nothing is copied beforehand and nothing is kept: each read of kho becomes calls of the function, for at most
        1 MiB each, inside `ranges`. It is called in the thread that called kho; if several threads use the memory, it
        is called by each. It may use kho itself.

        Args:
            read: called as `read(phys, n)`; returns the `n` bytes at physical address `phys` as bytes or another object
                with a buffer. For memory that it lacks it raises LeftOutError or another OutsideMemoryError: searches
                skip that page, other readers raise the error. All other exceptions reach the caller unchanged.
            ranges: (phys, nbytes) of each run of memory, in any order; runs that overlap are merged.
            vmcoreinfo: VMCOREINFO, lines of `NAME=value`, if the source has it.

        Raises: TypeError if `read` cannot be called; OutOfRangeError if a run ends beyond the address space. A read
        raises SourceError if the function returns another number of bytes, TypeError if it returns no bytes.

        """
    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The runs of the machine's memory, as (phys, nbytes), ascending; adjacent runs are merged.

        What the files name and do not have is among them: `absent`.
        """
    @property
    def nbytes(self) -> int:
        """Bytes of `ranges`, in total."""
    def read(self, phys: int, n: int) -> bytes:
        """Copy `n` bytes at physical address `phys`.

        Raises: OutsideMemoryError if any of them is not in this memory; its subclasses LeftOutError and CutOffError if
        the machine had it and the files have not; SourceError on a read error, or if a file has become shorter.
        """
    def next_data(self, phys: int) -> tuple[int, int] | None:
        """Find the first run at or after `phys` that may hold something other than zeros.

        Returns: (phys, nbytes), or None if only holes and zeros follow.

        Raises: SourceError on a read error.
        """

    @property
    def machine(self) -> str | None:
        """The machine that an ELF core or kdump file names: "x86_64", "aarch64" or "machine N".

        Of several files the first that names one counts; None if none does.
        """
    @property
    def sources(self) -> list[str]:
        """The sources that were opened, in the order given; empty for byte strings."""
    @property
    def absent(self) -> list[tuple[int, int, str]]:
        """The memory that the machine had and the files have not, as (phys, nbytes, why), ascending.

        `why` is "left out" (by the filter of the dump: reading it raises LeftOutError) or "cut off" (CutOffError).
        """
    def next_absent(self, phys: int) -> tuple[int, int, str] | None:
        """Find the first run at or after `phys` that is not in the files.

        Returns: (phys, nbytes, why), the part of the run from `phys` on, as in `absent`; None if there is none.
        """
    @property
    def dump_level(self) -> int | None:
        """The level of the filter that wrote the dump (makedumpfile's -d); None if the files name none."""
    def vmcoreinfo(self, name: str) -> str | None:
        """The value of a line of VMCOREINFO, the crashed kernel's description of itself; None without it.

        Args:
            name: as in "OSRELEASE", "CRASHTIME", "PAGESIZE".

        """
    @property
    def truncated(self) -> list[tuple[str, int, int]]:
        """The parts that truncated files claim and do not have, as (path, phys, nbytes), ascending.

        Reading them raises CutOffError. If a file is cut where it would name more memory, nbytes of its entry is 0.
        """

@final
class Arena:
    """Physical memory that can be written: RAM at chosen addresses, a page allocator, scratch areas.

    Address space is reserved and memory committed at first touch, so that 16 TiB cost next to nothing. A memfd or file
    that backs an arena is an ELF core: `kho inspect` and any ELF tool read it, and another process opens it with
    `Arena.open`.

    Args:
        regions: RAM, page-aligned: (start, nbytes) or (start, nbytes, numa_node) each, or the size of one region at 0,
            as an int or a str (`1 << 30`, `"1G"`).
        page_size: 4096, 16384 or 65536.
        max_page_order: MAX_PAGE_ORDER, the largest order that `alloc` gives without `gigantic`; by default 10, 11 or 13
            by page size.
        backing: None for memory of this process, "memfd", or the path of a new file.
        scratch: a value of `kho_scratch=` (abi.md section 5), placed as the kernel does, or (addr, nbytes) of each
            area.
        reserved: bytes that the kernel reserved during boot; a percentage in `scratch` refers to them.

    Raises: ParameterError for regions or areas that cannot be; SourceError if the backing cannot be made.

    """

    def __new__(
        cls,
        regions: int | str | Sequence[tuple[int, int]] | Sequence[tuple[int, int, int]],
        *,
        page_size: int = 4096,
        max_page_order: int | None = None,
        backing: str | PathLike[str] | None = None,
        scratch: str | ScratchSpec | Sequence[tuple[int, int]] | None = None,
        reserved: int = 0,
    ) -> Arena: ...
    @staticmethod
    def open(source: str | PathLike[str] | int) -> Arena:
        """Map the arena in a file, or of a file descriptor, which is duplicated.

        A memory file must be sealed against shrinking (F_SEAL_SHRINK), as `Arena(backing="memfd")` makes it. Any other
        file can be truncated by a process that may write it: kho's own reads and writes then raise SourceError, and
        touching a view that was taken before is fatal (SIGBUS). While the file holds a handover that was not taken
        over, nothing can be allocated.

        Args:
            source: a path, or the number of an open file descriptor.

        Raises: ParameterError for a file that no arena made; SourceError for one that cannot be read or mapped, or for
        a memory file that is not sealed.

        """

    def alloc(self, order: int = 0, *, node: int | None = None, gigantic: bool = False) -> Folio:
        """Allocate a folio of `1 << order` pages, at the lowest free address (alloc_pages).

        Scratch and preserved pages are never allocated. The folio holds zeros at first, and later what its last owner
        left.

        Args:
            order: log2 of the number of pages.
            node: the NUMA node to allocate from; any node by default.
            gigantic: accept orders above `max_page_order`.

        Returns: the folio, with one reference.

        Raises: OutOfMemoryError; OrderError above `max_page_order` without `gigantic`; PageStateError while the arena
        holds a handover that was not taken over.

        """

    def alloc_at(self, phys: int, order: int = 0) -> Folio:
        """Allocate the folio of `1 << order` pages at physical address `phys`.

        Raises: PageStateError if one of its pages is in use; OutsideMemoryError; MisalignedError; OrderError.
        """

    def folio(self, phys: int) -> Folio:
        """Give the folio that is allocated at physical address `phys`, the address of its head page.

        Raises: PageStateError if no folio begins there; OwnedPageError for a page that holds a bitmap, the map, the FDT
        or a subtree of a handover; MisalignedError.
        """

    def free(self, folio: Folio | int) -> bool:
        """Drop a reference on an allocated folio (folio_put); the last one frees it.

        The pages can be allocated again once no view of them is left.

        Args:
            folio: a `Folio`, or the physical address of its head page.

        Returns: True if this was the last reference.

        Raises: PageStateError for an address that is not the head of an allocated folio, and while the folio is
        preserved or linked as a subtree; FreedFolioError for a `Folio` that was freed before; OwnedPageError as
        `Arena.folio`; ParameterError for a `Folio` of another arena.

        """

    def page(self, phys: int) -> PageInfo:
        """Describe the page that holds physical address `phys`.

        Returns: a `PageInfo`.

        Raises: OutsideMemoryError.
        """

    def read(self, phys: int, n: int) -> bytes:
        """Copy `n` bytes at physical address `phys`.

        Raises: OutsideMemoryError unless all of them are in RAM; SourceError on a read error.
        """

    def write(self, phys: int, data: Buffer) -> None:
        """Copy bytes into memory at physical address `phys`, allocated or not.

        Raises: OutsideMemoryError; OwnedPageError, and nothing is written, if a page holds a bitmap, the map, the FDT
        or a subtree of a handover, or a bitmap of a map that was taken over and is in use.
        """

    def next_data(self, phys: int) -> tuple[int, int] | None:
        """Find the first run at or after `phys` that may hold something other than zeros.

        Returns: (phys, nbytes), or None if only zeros follow.
        """

    def fileno(self) -> int:
        """Give the descriptor of the memfd or file, for another process to open.

        Raises: ParameterError for an arena in memory of this process.
        """

    @property
    def page_size(self) -> int:
        """Bytes in a page."""
    @property
    def max_page_order(self) -> int:
        """MAX_PAGE_ORDER: the largest order that `alloc` gives without `gigantic`."""
    @property
    def regions(self) -> list[tuple[int, int, int]]:
        """RAM, as (start, nbytes, numa_node) of each region, ascending."""

    @property
    def nodes(self) -> list[int]:
        """The NUMA nodes that have memory, ascending."""

    @property
    def scratch(self) -> list[tuple[int, int]]:
        """The scratch areas, as (addr, nbytes): low memory, global, then one per node."""

    @property
    def scratch_phys(self) -> int | None:
        """Physical address of the scratch array, which lies in scratch itself; None without scratch."""

    @property
    def fdt_phys(self) -> int | None:
        """Physical address of the root FDT of a finalized handover; None without one."""

    @property
    def nbytes(self) -> int:
        """Bytes of RAM."""

    @property
    def free_pages(self) -> int:
        """Pages that can be allocated."""
    @property
    def allocated_pages(self) -> int:
        """Pages of allocated folios."""
    @property
    def reserved_pages(self) -> int:
        """Pages that cannot be allocated: page 0, scratch, inherited and not restored, freed with a view left."""

    @property
    def metadata_bytes(self) -> int:
        """Bytes of bookkeeping outside the arena's RAM."""

@disjoint_base
class FileMapping:
    """A shared mapping of a part of a file, unmapped when the last view of it is gone.

    Raises: OSError as mmap; ParameterError for no bytes, or a negative descriptor.
    """

    def __new__(cls, fd: int, offset: int, size: int, *, writable: bool) -> Self: ...
    @property
    def size(self) -> int:
        """Bytes of the mapping."""
    def exporter(self, at: int, nbytes: int) -> MappedBytes:
        """Export `nbytes` at offset `at` as a buffer: an object that lives as long as any view of it.

        Raises: OutsideMemoryError.
        """
    def flush(self, at: int, nbytes: int) -> None:
        """Flush bytes to the medium of the file, if it has one (msync).

        Raises: OSError; OutsideMemoryError.
        """

@final
class MappedBytes:
    """A part of a `FileMapping` as a buffer: `FileMapping.exporter` makes it."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Free a part of a file, which reads as zeros then; the file keeps its size (FALLOC_FL_PUNCH_HOLE).

    Raises: OSError as fallocate; ParameterError for a negative descriptor.
    """

@final
class Folio:
    """A folio as a buffer of bytes: one allocation, not whatever lies at its address.

    In an arena `memoryview(folio)` is the memory itself, writable, and keeps it mapped; in an image it is a read-only
    copy. `bytes(folio)` copies, and `len(folio)` is `nbytes`. While a view exists, its pages are given to no other
    owner, even if the folio is freed or taken over; what is written through the view after that is lost.

    Raises: on every use StaleError after the arena was taken over, and FreedFolioError once the folio was freed,
    through this object or another one.
    """

    @property
    def phys(self) -> int:
        """Physical address of the head page."""
    @property
    def pfn(self) -> int:
        """Page frame number of the head page."""
    @property
    def order(self) -> int:
        """Log2 of the number of pages."""
    @property
    def nr_pages(self) -> int:
        """Number of pages, `1 << order`."""
    @property
    def nbytes(self) -> int:
        """Bytes in the folio."""
    @property
    def refcount(self) -> int:
        """The number of references; 0 once the folio was freed.

        Raises: StaleError; ParameterError for a folio in an image.
        """

    def get(self) -> int:
        """Take a reference (folio_get).

        Returns: the new number of references.

        Raises: FreedFolioError; StaleError; ParameterError for a folio in an image.
        """

    def free(self) -> bool:
        """Drop a reference, as `Arena.free`; the last one frees the folio.

        After that this object, and every other object of the same folio, is refused.

        Returns: True if this was the last reference.

        Raises: FreedFolioError if it was freed before; StaleError; ParameterError for a folio in an image;
        PageStateError and OwnedPageError as `Arena.free`.
        """

    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Pages:
    """A range of pages that were restored together, as one buffer of bytes; each page has order 0.

    The buffer behaves as that of a `Folio`.
    """

    @property
    def phys(self) -> int:
        """Physical address of the first page."""
    @property
    def pfn(self) -> int:
        """Page frame number of the first page."""
    @property
    def nr_pages(self) -> int:
        """Number of pages."""
    @property
    def nbytes(self) -> int:
        """Bytes in the range."""
    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class FolioArray:
    """Folios as a sequence of `FolioInfo(phys, order)`, and as a read-only buffer of 16-byte records.

    Sorted by address, then order; immutable. Slices with step 1 share the memory. `numpy.asarray(folios)` is a
    structured array with the fields `phys` (u8) and `order` (u1), without a copy. The memory of a long list (4 to
    256 MiB) is kept for the next one after the last reference to it is gone: it counts as resident until the kernel
    reclaims it (MADV_FREE).
    """

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> FolioInfo: ...
    @overload
    def __getitem__(self, key: slice, /) -> FolioArray: ...
    def __iter__(self) -> Iterator[FolioInfo]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __arrow_c_array__(self, requested_schema: object | None = None) -> tuple[object, object]: ...
    def __dlpack__(
        self,
        *,
        stream: object | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    __hash__: None  # type: ignore[assignment]

@final
class PfnArray:
    """Pfns as a sequence of int, and as a read-only buffer of 8-byte integers (format `Q`).

    Ascending; immutable. Slices with step 1 share the memory. `numpy.asarray(pfns)` is an array of uint64 without a
    copy; `memoryview(pfns).tolist()` is the fastest way to a list. The memory of long lists is reused as that of a
    `FolioArray`.
    """

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> PfnArray: ...
    def __iter__(self) -> Iterator[int]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __arrow_c_array__(self, requested_schema: object | None = None) -> tuple[object, object]: ...
    def __dlpack__(
        self,
        *,
        stream: object | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    __hash__: None  # type: ignore[assignment]

@final
class RunArray:
    """Runs of pages or folios as a sequence of (pfn, n), and as a read-only buffer of 16-byte records.

    Ascending; immutable. Slices with step 1 share the memory. `numpy.asarray(runs)` is a structured array with the
    fields `pfn` and `n` (u8), without a copy.
    """

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, key: slice, /) -> RunArray: ...
    def __iter__(self) -> Iterator[tuple[int, int]]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __arrow_c_array__(self, requested_schema: object | None = None) -> tuple[object, object]: ...
    def __dlpack__(
        self,
        *,
        stream: object | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    __hash__: None  # type: ignore[assignment]

@final
class Tracker:
    """The set of folios to preserve, (pfn, order) pairs in sparse bitmaps per order.

    One bit is one pair; folios of different orders may overlap, since nothing in the format forbids it. Operations
    return what changed. Bitmaps that become empty stay allocated until `clear`, as in the kernel.

    `(pfn, order) in tracker` looks a folio up, and `pfn in tracker` one of order 0; `len` counts folios, and iteration
    yields (pfn, order) of a snapshot in the order of serialization: by order, then pfn. As with sets, `<=` and `<` mean
    subset; `|`, `&`, `-` and `^` make a new tracker, which has the left operand's bitmap size and no empty bitmaps, and
    raise ParameterError if the page sizes differ. Trackers can be copied and pickled.

    Threads may share trackers. Long calls (bulk operations, set algebra, lists, bitmaps) release the interpreter, so
    that threads that work on different trackers run concurrently; those that work on one tracker run one after another,
    except that bulk calls of one order run concurrently with those of other orders. A buffer that another thread writes
    during a call is safe: its integers are copied a few at a time, and the copies are checked and used.

    Args:
        page_size: 4096, 16384 or 65536.
        bitmap_bytes: 512 (Linux 6.16 and 6.17) or the page size (6.18 and later, the default).

    Raises: ParameterError for another page size or bitmap size.

    Source: struct kho_mem_track of kernel/kexec_handover.c; abi.md section 3.

    """

    def __new__(cls, page_size: int = 4096, bitmap_bytes: int | None = None) -> Tracker: ...
    @property
    def page_size(self) -> int:
        """Bytes in a page."""
    @property
    def bitmap_bytes(self) -> int:
        """Bytes in a bitmap: 512 (Linux 6.16 and 6.17) or the page size (6.18 and later)."""
    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tracker takes: bitmaps and the directories that lead to them."""

    def preserve(self, pfn: int, order: int = 0) -> bool:
        """Mark the folio at `pfn` for the next kernel (__kho_preserve_order).

        Args:
            pfn: page frame number, a multiple of `1 << order`.
            order: log2 of the number of pages, 0 to 36.

        Returns: True if it was not yet marked.

        Raises: MisalignedError, OrderError, OutOfRangeError.

        """

    def unpreserve(self, pfn: int, order: int = 0) -> bool:
        """Unmark the folio at `pfn` (__kho_unpreserve_order).

        Args:
            pfn: page frame number, a multiple of `1 << order`.
            order: log2 of the number of pages, 0 to 36.

        Returns: True if it was marked.

        Raises: MisalignedError, OrderError, OutOfRangeError.

        """

    def preserve_pages(self, pfn: int, n: int) -> int:
        """Mark `n` pages from `pfn` on as the naturally aligned folios they split into (kho_preserve_pages).

        The split is greedy: each folio is as large as its alignment and the rest of the range allow. All or nothing.

        Returns: the number of these folios that were not yet marked.

        Raises: OutOfRangeError.
        """

    def unpreserve_pages(self, pfn: int, n: int) -> int:
        """Unmark the folios that `preserve_pages` marks for the same range (kho_unpreserve_pages).

        Returns: the number of these folios that were marked.

        Raises: OutOfRangeError.
        """

    def preserve_run(self, pfn: int, order: int, count: int) -> int:
        """Mark `count` consecutive folios of one order from `pfn` on, all or nothing.

        Whole words of a bitmap are filled at a time, which is faster than `preserve_many`.

        Returns: the number of folios that were not yet marked.

        Raises: MisalignedError, OrderError, OutOfRangeError.
        """

    def unpreserve_run(self, pfn: int, order: int, count: int) -> int:
        """Unmark `count` consecutive folios of one order from `pfn` on.

        Returns: the number of folios that were marked.

        Raises: MisalignedError, OrderError, OutOfRangeError.
        """

    def preserve_many(self, pfns: Buffer, order: int | Buffer = 0) -> int:
        """Mark many folios, all or nothing.

        Args:
            pfns: a one-dimensional buffer of 64-bit or 32-bit integers, signed or not (numpy array, array.array,
                memoryview, PfnArray), in any order. The buffer is not copied.
            order: one order for all, or a buffer of integers of any width with one for each; bytes are fastest.

        Calls with one order run concurrently with those of other threads with other orders.

        Returns: the number of folios that were not yet marked.

        Raises: MisalignedError, OrderError, OutOfRangeError for the first folio that is wrong; ParameterError if the
        lengths differ; TypeError for other buffers.

        """

    def unpreserve_many(self, pfns: Buffer, order: int | Buffer = 0) -> int:
        """Unmark many folios, all or nothing.

        Args:
            pfns: as of `preserve_many`.
            order: as of `preserve_many`.

        Returns: the number of folios that were marked.

        Raises: as `preserve_many`.

        """

    def contains_many(self, pfns: Buffer, order: int | Buffer = 0) -> bytes:
        """Look many folios up.

        Args:
            pfns: as of `preserve_many`.
            order: as of `preserve_many`.

        Returns: one byte for each folio, 1 if it is marked and else 0, also for a pfn that no folio of the order can
        have. `numpy.frombuffer(found, bool)` is a mask.

        Raises: OrderError; ParameterError if the lengths differ; TypeError for other buffers.

        """

    def extents(self) -> RunArray:
        """List the runs of pages that folios of any order cover: (pfn, pages), ascending.

        The runs are disjoint, and no two are adjacent.

        Raises: OutOfMemoryError if this process cannot allocate the list.
        """

    def runs(self, order: int = 0) -> RunArray:
        """List the maximal runs of consecutive folios of one order: (pfn, folios), ascending.

        Raises: OrderError; OutOfMemoryError if this process cannot allocate the list.
        """

    def folios(self) -> FolioArray:
        """List every folio, by address, then order.

        Raises: OutOfMemoryError if this process cannot allocate the list.
        """

    def pfns(self, order: int = 0) -> PfnArray:
        """List the pfns of the folios of one order, ascending.

        Raises: OrderError; OutOfMemoryError if this process cannot allocate the list.
        """

    def rank(self, pfn: int, order: int = 0) -> int:
        """Count the folios of one order that begin below `pfn`.

        No folio needs to begin at `pfn`. The time is proportional to the bytes of that order's bitmaps below it.

        Raises: OrderError.
        """

    def select(self, rank: int, order: int = 0) -> int:
        """Find the pfn of the folio of one order that has `rank` others of that order below it.

        The time is as that of `Tracker.rank`.

        Raises: IndexError if there is none; OrderError.
        """

    def to_roaring(self, order: int = 0, *, bits: int = 64, runs: bool = True) -> bytes:
        """Give the folio numbers (`pfn >> order`) of one order as a Roaring bitmap in the portable format.

        Args:
            order: log2 of the number of pages.
            bits: 64 for BitMap64, RoaringTreemap and Roaring64Map; 32 for BitMap and RoaringBitmap.
            runs: store a container as runs where that is shorter, as run_optimize does.

        Raises: OutOfRangeError for a number beyond 32 bits; OrderError; ParameterError for other `bits`.

        Source: the Roaring format specification, "Standard 32-bit Roaring Bitmap" and "Extension for 64-bit".

        """

    def update_roaring(self, data: Buffer, order: int = 0, *, bits: int = 64) -> int:
        """Mark the folios of one order whose numbers (`pfn >> order`) a Roaring bitmap holds, all or nothing.

        Time and memory are bounded by the number of containers: at most eight bitmaps for each 14 bytes of data or so.

        Args:
            data: a buffer of bytes, exactly one bitmap as `to_roaring` writes it.
            order: log2 of the number of pages.
            bits: 64 or 32, as for `to_roaring`.

        Returns: the number of folios that were not yet marked.

        Raises: ParameterError unless `data` is exactly one well-formed bitmap; OutOfRangeError; OrderError; TypeError
        for other buffers.

        """

    @staticmethod
    def from_roaring(
        data: Buffer, order: int = 0, *, bits: int = 64, page_size: int = 4096, bitmap_bytes: int | None = None
    ) -> Tracker:
        """Make a tracker from a Roaring bitmap.

        Args:
            data: as of `update_roaring`.
            order: log2 of the number of pages.
            bits: 64 or 32, as for `to_roaring`.
            page_size: as of `Tracker`.
            bitmap_bytes: as of `Tracker`.

        Raises: as `update_roaring`; ParameterError as `Tracker`.

        """

    def clear(self) -> None:
        """Unmark every folio and free the bitmaps."""

    def copy(self) -> Tracker:
        """Make a tracker with the same folios.

        Raises: OutOfMemoryError.
        """
    def stats(self) -> dict[int, dict[str, int]]:
        """Give what each order holds and costs.

        Returns: for each order that has bitmaps a dict of `folios`, `blocks` (bitmaps), `empty_blocks`, and `bytes`.
        """

    def isdisjoint(self, other: Tracker) -> bool:
        """Say whether no folio is in both trackers."""
    def issubset(self, other: Tracker) -> bool:
        """Say whether `other` has every folio of this tracker."""
    def issuperset(self, other: Tracker) -> bool:
        """Say whether this tracker has every folio of `other`."""
    def union_len(self, other: Tracker) -> int:
        """Count the folios of `self | other` without making it.

        Trackers of different page sizes have no folio in common.
        """

    def intersection_len(self, other: Tracker) -> int:
        """Count the folios of `self & other` without making it."""
    def difference_len(self, other: Tracker) -> int:
        """Count the folios of `self - other` without making it."""
    def symmetric_difference_len(self, other: Tracker) -> int:
        """Count the folios of `self ^ other` without making it."""
    def __lt__(self, value: Tracker, /) -> bool: ...
    def __le__(self, value: Tracker, /) -> bool: ...
    def __gt__(self, value: Tracker, /) -> bool: ...
    def __ge__(self, value: Tracker, /) -> bool: ...
    def __contains__(self, key: int | tuple[int, int], /) -> bool: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __iter__(self) -> Iterator[tuple[int, int]]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __or__(self, value: Tracker, /) -> Tracker: ...
    def __and__(self, value: Tracker, /) -> Tracker: ...
    def __sub__(self, value: Tracker, /) -> Tracker: ...
    def __xor__(self, value: Tracker, /) -> Tracker: ...
    def __ror__(self, value: Tracker, /) -> Tracker: ...
    def __rand__(self, value: Tracker, /) -> Tracker: ...
    def __rsub__(self, value: Tracker, /) -> Tracker: ...
    def __rxor__(self, value: Tracker, /) -> Tracker: ...
    def __ior__(self, value: Tracker, /) -> Self: ...
    def __iand__(self, value: Tracker, /) -> Self: ...
    def __isub__(self, value: Tracker, /) -> Self: ...
    def __ixor__(self, value: Tracker, /) -> Self: ...
    def __copy__(self) -> Tracker: ...
    def __deepcopy__(self, memo: object, /) -> Tracker: ...
    def __reduce__(self) -> tuple[type[Tracker], tuple[int, int], bytes]: ...
    def __setstate__(self, state: bytes, /) -> None: ...
    __hash__: None  # type: ignore[assignment]

@disjoint_base
class Outgoing:
    """The compiled base of `kho.Outgoing`: a handover in the making (kho_out).

    Bitmaps lie in the arena's pages and are never copied. An object that is dropped before `finalize` leaves nothing in
    the arena. The page of the FDT is allocated and preserved at once.

    Args:
        arena: the memory to hand over.
        abi: the `compatible` to write.
        bitmap_bytes: for kho-v1, 512 (Linux 6.16 and 6.17) or the page size (6.18 and later, the default).
        fdt_phys: a free page for the FDT; chosen by default.
        map_phys: a free page for the first node of the map; chosen by default. Both serve to write an image again,
            address for address.
        edited_root: write the root FDT at once, with map 0 until `finalize`, and edit it, as Linux 6.19 and 7.0 do
            with kho-v1; always so from kho-v2 on (abi.md section 2).

    Raises: UnsupportedAbiError, ParameterError, OutOfMemoryError, PageStateError, OwnedPageError.

    """

    def __new__(
        cls,
        arena: Arena,
        abi: str = "kho-v1",
        *,
        bitmap_bytes: int | None = None,
        fdt_phys: int | None = None,
        map_phys: int | None = None,
        edited_root: bool = False,
    ) -> Self: ...
    def preserve_folio(self, folio: Folio | int, order: int | None = None) -> bool:
        """Preserve an allocated folio (kho_preserve_folio).

        Args:
            folio: a `Folio`, or the physical address of its head page.
            order: by default that of the folio allocated there.

        Returns: True if it was not yet preserved.

        Raises: FinalizedError, ScratchOverlapError, PageStateError for pages that are not allocated,
        OutsideMemoryError, MisalignedError, OrderError, OutOfMemoryError; FreedFolioError, StaleError, ParameterError
        for a `Folio` that is freed, taken over, or of another arena.

        """

    def unpreserve_folio(self, folio: Folio | int, order: int | None = None) -> bool:
        """Withdraw a folio from the handover (kho_unpreserve_folio).

        Args:
            folio: a `Folio`, or the physical address of its head page.
            order: by default that of the folio allocated there.

        Returns: True if it was preserved.

        Raises: FinalizedError, MisalignedError; ParameterError for the pages of the FDT and of subtrees.

        """

    def preserve_many(self, phys: Buffer, order: int | Buffer = 0) -> int:
        """Preserve many allocated folios, all or nothing.

        Args:
            phys: their physical addresses, a buffer of 64-bit or 32-bit integers (numpy array, array.array,
                memoryview).
            order: one order for all, or a buffer of integers with one for each.

        Returns: the number of folios that were not yet preserved.

        Raises: as `preserve_folio`, for the first folio that is refused; ParameterError if the lengths differ;
        TypeError for other buffers.

        """

    def preserve_run(self, phys: Folio | Pages | int, order: int, count: int) -> int:
        """Preserve `count` consecutive folios of one order, all or nothing.

        Args:
            phys: a `Folio`, `Pages`, or the physical address of the first.
            order: log2 of the number of pages of each.
            count: the number of folios.

        Returns: the number of folios that were not yet preserved.

        Raises: as `preserve_folio`.

        """

    def preserve_pages(self, phys: Folio | Pages | int, n: int) -> int:
        """Preserve `n` allocated pages in the kernel's greedy split, all or nothing (kho_preserve_pages).

        Args:
            phys: a `Folio`, `Pages`, or the physical address of the first page.
            n: the number of pages.

        Returns: the number of folios of the split that were not yet preserved.

        Raises: as `preserve_folio`.

        """

    def unpreserve_pages(self, phys: Folio | Pages | int, n: int) -> int:
        """Withdraw the folios that `preserve_pages` preserves for the same range (kho_unpreserve_pages).

        Returns: the number of these folios that were preserved.

        Raises: FinalizedError, MisalignedError; ParameterError for the pages of the FDT and of subtrees.
        """

    def preserve_all(self, tracker: Tracker) -> int:
        """Preserve every folio of a tracker with the same page size, all or nothing.

        Returns: the number of folios that were not yet preserved.

        Raises: as `preserve_folio`; ParameterError if the page sizes differ.
        """

    def add_subtree(self, name: str, blob: Buffer, *, phys: int | None = None) -> int:
        """Copy a producer's blob into preserved pages of its own (kho_add_subtree).

        Args:
            name: of its node in the root FDT.
            blob: the bytes. Before kho-v3 a devicetree, since the root FDT does not state the size then (abi.md section
                2).
            phys: where the copy goes, free pages; chosen by default.

        Returns: the physical address of the copy.

        Raises: ExistsError; FdtError for a name that no node can have, or if the page of the root FDT is full;
        FinalizedError; OutOfMemoryError; PageStateError.

        """

    def link_subtree(self, name: str, phys: int, size: int) -> None:
        """Add a subtree whose blob lies in the arena already, at `phys`; the caller preserves it.

        Its pages cannot be freed until it is removed; the caller may write them.

        Raises: as `add_subtree`; OutsideMemoryError; ScratchOverlapError.
        """

    def _rewrite_subtree(self, name: str, blob: Buffer) -> None: ...
    def remove_subtree(self, name: str) -> None:
        """Remove a subtree and free the pages allocated for it (kho_remove_subtree).

        Raises: NotFoundError; FinalizedError.
        """

    def serialize(self) -> bytes:
        """Write the map and the FDT into the arena.

        Bitmaps stay where they are; a chunk is exactly one page, with 255 entries at 4 KiB (abi.md section 3).

        Returns: the bytes of the FDT.

        Raises: OutOfMemoryError; an earlier serialization stays in place then.
        """

    def finalize(self) -> int:
        """Serialize and close the handover: from now on changes raise FinalizedError (EBUSY).

        Returns: the physical address of the root FDT, which the arena records.

        Raises: FinalizedError if it is finalized; OutOfMemoryError.
        """

    def abort(self) -> None:
        """Undo `finalize`, so that the handover can be changed again.

        Raises: FinalizedError if it is not finalized.
        """

    def tracker(self) -> Tracker:
        """Copy the set of preserved folios, the FDT's and the subtrees' included.

        Raises: OutOfMemoryError; SourceError if the arena's file was truncated.
        """

    def folios(self) -> FolioArray:
        """List the preserved folios, by address, then order.

        Raises: OutOfMemoryError; SourceError if the arena's file was truncated.
        """
    @property
    def arena(self) -> Arena:
        """The arena that is handed over."""
    @property
    def abi(self) -> str:
        """The `compatible` that is written, as "kho-v1"."""
    @property
    def bitmap_bytes(self) -> int | None:
        """Bytes in a bitmap of kho-v1; None for later versions, whose bitmaps are a page."""
    @property
    def subtree_order(self) -> str:
        """Where a new subtree goes among the root's nodes: "append" or "prepend"."""
    @property
    def fdt_phys(self) -> int:
        """Physical address of the root FDT's page."""
    @property
    def finalized(self) -> bool:
        """Whether `finalize` was called, and not undone."""
    @property
    def nr_folios(self) -> int:
        """The number of preserved folios."""
    @property
    def preserved_bytes(self) -> int:
        """Bytes of the preserved folios."""
    @property
    def subtrees(self) -> dict[str, tuple[int, int]]:
        """The subtrees: name to (phys, nbytes)."""

@final
class Incoming:
    """A handover that was read or taken over (kho_in); each of its folios is restored once.

    `Incoming(arena)` takes the arena over, as a kexec does: what was allocated is gone, what was preserved stays
    reserved until it is restored, and all other memory outside scratch is free. `kho.open` reads an arena without that.
    `Incoming(memory)` reads, as `kho.open` does.

    Args:
        memory: an `Arena` to take over, or a `Memory` to read.
        fdt_phys: physical address of the root FDT; by default the one that the arena recorded, or else the one that a
            search of the memory finds. If it is given, the memory is not searched.
        page_size: 4096, 16384 or 65536; by default decided from evidence (abi.md section 1).
        bitmap_bytes: for kho-v1, 512 or the page size; by default decided from evidence (abi.md section 1).
        scratch: (addr, nbytes) of each scratch area, or the physical address of the array that lists them; by default
            the arena's, or those that the search finds.
        max_page_order: refuse to restore folios of a larger order, as Linux before 7.1 does.

    Raises: NoHandoverError, UnsupportedAbiError, FormatError, OutsideMemoryError; ParameterError if no scratch array
    lies at `scratch`.

    """

    def __new__(
        cls,
        memory: Arena | Memory,
        fdt_phys: int | None = None,
        *,
        page_size: int | None = None,
        bitmap_bytes: int | None = None,
        scratch: Sequence[tuple[int, int]] | int | None = None,
        max_page_order: int | None = None,
    ) -> Incoming: ...
    def restore_folio(self, phys: Folio | int) -> Folio:
        """Restore the folio whose head is at `phys`, once (kho_restore_folio).

        In an arena it is allocated then.

        Args:
            phys: physical address of the head page, or a `Folio` there.

        Raises: NotRestorableError for an address that is not the head of a preserved folio, or whose folio was restored
        before; StaleError.

        """

    def restore_many(self, phys: Buffer) -> bytes:
        """Restore the folios whose heads are at many addresses, all or nothing.

        In an arena they are allocated then.

        Args:
            phys: a buffer of 64-bit or 32-bit integers (numpy array, array.array, memoryview), no address twice.

        Returns: their orders, one byte each.

        Raises: NotRestorableError for the first that cannot be restored; StaleError; TypeError for other buffers.

        """

    def restore_pages(self, phys: Folio | Pages | int, n: int) -> Pages:
        """Restore `n` pages that were preserved as a range, all or nothing (kho_restore_pages).

        From kho-v3 on, ranges are cut where the NUMA node changes (kho_preserve_pages): here at the arena's nodes, or
        where those of an image were cut. kho_restore_pages of Linux 7.1 to 7.3 does not cut: it restores the first
        folio of each piece of the uncut split, and the rest of the piece stays reserved.

        Args:
            phys: physical address of the first page, or a `Folio` or `Pages` there.
            n: the number of pages.

        Raises: NotRestorableError unless each folio of the range's greedy split is preserved and was not restored;
        StaleError.

        """

    def stats(self) -> dict[str, int]:
        """Give what the map costs.

        Returns: a dict of `blocks` (bitmaps, empty ones included), `map_bytes` (bytes of chunks and bitmaps, or of the
        tree's nodes), `in_place_bytes` (bytes of bitmaps that are used where they lie), and `held_bytes` (bytes held
        next to the map: copies of bitmaps, directories, the set of restored folios).
        """

    def retrieve_subtree(self, name: str) -> Subtree:
        """Find a producer's blob by the name of its node (kho_retrieve_subtree).

        Raises: NotFoundError; FormatError for a malformed node.
        """

    def read(self, phys: int, n: int) -> bytes:
        """Copy `n` bytes of the memory at physical address `phys`.

        Raises: OutsideMemoryError; SourceError on a read error.
        """

    def preserves(self, phys: int, order: int) -> bool:
        """Say whether the folio of this order at physical address `phys` was preserved."""

    def order_at(self, phys: int) -> int | None:
        """Give the order of the largest preserved folio that begins at `phys`; None without one."""

    def next_to_read(self, phys: int, nbytes: int) -> tuple[int, int] | None:
        """Find the first run in `nbytes` from `phys` on that may hold other than zeros, or cannot be read.

        Returns: (phys, nbytes), or None if all of it is zeros.

        Raises: SourceError on a read error.
        """

    def has(self, phys: int, nbytes: int) -> bool:
        """Say whether all of `nbytes` from `phys` on are in this memory."""

    def room(self, what: str) -> int:
        """Give a limit proportional to the bytes of the files that are read, not to what their headers claim.

        Args:
            what: `held` (bytes of the files), `items` (of a list or report), `objects` (sessions, files, regions),
                `fdt_bytes` (of devicetrees of subtrees), or `contents` (bytes of contents worth reading).

        Raises: ParameterError for another name.

        """

    def unrestored(self) -> FolioArray:
        """List the preserved folios that were not restored, by address.

        Raises: OutOfMemoryError if this process cannot allocate the list.
        """

    def tracker(self) -> Tracker:
        """Copy the set of preserved folios, restored or not."""

    @property
    def folios(self) -> FolioArray:
        """Every preserved folio, restored or not, by address, then order."""

    @property
    def compatible(self) -> str:
        """The `compatible` of the root FDT, as "kho-v1"."""
    @property
    def abi(self) -> Abi:
        """The ABI version that the handover is read as: the one that `compatible` names, if it names one."""
    @property
    def unverified(self) -> list[str]:
        """Why the handover may not be what it is read as; empty if its version is known.

        A version that is neither released nor a known draft is read as the one that fits best (abi.md section 9).
        """
    @property
    def kernels(self) -> str:
        """The kernel versions that write this ABI, as text (abi.md section 1)."""

    @property
    def page_size(self) -> int:
        """Bytes in a page of the kernel that handed over."""
    @property
    def page_size_why(self) -> str:
        """The reason for `page_size`, as text."""
    @property
    def bitmap_bytes(self) -> int | None:
        """Bytes in a bitmap of kho-v1; None for later versions, whose bitmaps are a page."""
    @property
    def bitmap_bytes_why(self) -> str | None:
        """The reason for `bitmap_bytes`, as text; None without bitmaps."""
    @property
    def certainty(self) -> str:
        """How certain the layout is: "given", "certain", "likely", "guess"; "not read" without a map."""

    @property
    def map_lost(self) -> tuple[int, str] | None:
        """The page of the map that is not in the dump, as (phys, why), else None.

        `why` is "left out" (by the filter that wrote the dump) or "cut off" (with the end of the file). What was
        preserved is not known then, so that no folio is; the root FDT, the subtrees and what they lead to are read.
        """

    @property
    def fdt(self) -> Fdt:
        """The root FDT (abi.md section 2).

        Raises: FdtError.
        """
    @property
    def fdt_phys(self) -> int:
        """Physical address of the root FDT."""
    @property
    def preserved_memory_map(self) -> int:
        """Physical address of the map's first node.

        That is a chunk in kho-v1 (abi.md section 3), and the root of the tree later (abi.md section 4). It is 0 in a
        root of kho-v1 that was never finalized, which Linux 6.19 and 7.0 pass on: nothing is preserved then.
        """

    @property
    def finalized(self) -> bool:
        """Whether there is a map. If not, nothing was finalized, and the next kernel boots cold."""
    @property
    def nr_folios(self) -> int:
        """The number of preserved folios."""
    @property
    def nr_restored(self) -> int:
        """The number of folios that were restored."""
    @property
    def preserved_bytes(self) -> int:
        """Bytes of the preserved folios."""
    @property
    def folios_by_order(self) -> dict[int, int]:
        """The number of preserved folios by order, for the orders that have any."""
    @property
    def metadata_pages(self) -> int:
        """The number of pages that hold the map."""

    @property
    def map_pages(self) -> list[int]:
        """Physical addresses of the pages that hold the map, ascending."""

    @property
    def address(self) -> Literal["own", "named", "assumed", "solved"]:
        """Where the memory's addresses come from: "own", "named", "assumed" or "solved".

        own: the source states them, as an ELF core does, or is not a file. Of a raw image, named: its name states them;
        assumed: it was named without an address and is read at 0; solved: it is read at another address, see
        `placement`.
        """

    @property
    def placement(self) -> Placement | None:
        """Where a raw image was read, if that is not where it was named; else None."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The runs of the memory, as (phys, nbytes), ascending."""

    @property
    def truncated(self) -> list[tuple[str, int, int]]:
        """The parts that truncated files claim and do not have, as `Memory.truncated`."""
    @property
    def dump_level(self) -> int | None:
        """The level of the filter that wrote the dump, as `Memory.dump_level`."""
    def vmcoreinfo(self, name: str) -> str | None:
        """The value of a line of VMCOREINFO, as `Memory.vmcoreinfo`."""
    def absent(self, phys: int | None = None, nbytes: int | None = None) -> list[tuple[int, int, str]]:
        """List what of the memory in `nbytes` from `phys` on is not in the files (`Memory.absent`)."""
    def absent_bytes(self, phys: int | None = None, nbytes: int | None = None) -> tuple[int, int]:
        """Count the bytes of the memory in `nbytes` from `phys` on that are not in the files.

        Returns: bytes that were left out, and bytes that are cut off.
        """
    def next_absent(self, phys: int) -> tuple[int, int, str] | None:
        """Find the first run at or after `phys` that is not in the files.

        Returns: (phys, nbytes, why), the part of the run from `phys` on, as `Memory.absent` has it, or None.
        """
    @property
    def cut_files(self) -> list[str]:
        """The files that are cut off, each once."""
    def count_absent(self) -> tuple[int, int, int]:
        """Count what is preserved and not in the files.

        Returns: preserved pages that were left out, those that are cut off, and the folios whose second page alone was
        left out.
        """
    def next_data(self, phys: int) -> tuple[int, int] | None:
        """Find the first run at or after `phys` that may hold something other than zeros.

        Returns: (phys, nbytes), or None if only holes and zeros follow.

        Raises: SourceError on a read error.
        """

    @property
    def machine(self) -> str | None:
        """The machine that the source names, as `Memory.machine`; None if none does."""

    def save(self, path: str | PathLike[str], *, everything: bool = False) -> None:
        """Write the handover as an ELF core, as `kho.Image.save` does.

        Args:
            path: of the new file.
            everything: write all memory, not only what belongs to the handover.

        Raises: SourceError.

        """

    @property
    def map_nodes(self) -> list[tuple[int, int]]:
        """The map itself, as (phys, nbytes), ascending: its chunks and bitmaps, or its tree's nodes."""

    @property
    def pages_outside(self) -> int:
        """The number of preserved pages that this memory does not have."""

    @property
    def scratch(self) -> list[tuple[int, int]] | None:
        """The scratch areas, as (addr, nbytes): low memory, global, one per NUMA node; None if not known."""

    @property
    def scratch_phys(self) -> int | None:
        """Physical address of the array that lists the scratch areas; None if not known."""

    @property
    def scratch_how(self) -> Literal["given", "told", "doubtful", "content", "kho_scratch"] | None:
        """How `scratch` is known: "given", "told", "doubtful", "content" or "kho_scratch"; None if it is not.

        told: a kernel was told of the array with its FDT; doubtful: the same, of areas that are not all in this memory
        or that no kernel aligns so; content: an array was found by its content; kho_scratch: by the variable of the
        kernel (`kho.handover.symbols`).
        """
    def _know_scratch(self, areas: list[tuple[int, int]], phys: int) -> bool: ...
    @property
    def vmcoreinfo_pages(self) -> list[int]:
        """Physical addresses of the pages with VMCOREINFO that the search found, ascending.

        Such a page begins with `OSRELEASE=`. After a handover that of the kernel before may still be there.
        """
    @property
    def others(self) -> list[int]:
        """Physical addresses of other root FDTs that the search found in the same memory."""

    @property
    def other_roots(self) -> list[OtherRoot]:
        """What is left of the handovers of these other root FDTs, an `OtherRoot` each."""

    @property
    def may_have_unlisted(self) -> bool:
        """Whether there can be memfds in no session: false if a search found no page like their structure."""

    @property
    def unlisted_memfds(self) -> list[MemfdFile]:
        """The memfds that no session lists, a `kho.formats.MemfdFile` each, ascending; found at each access.

        A memfd is in no list from PRESERVE_FD until LUO's lists are written at the jump. In the memory of a kernel that
        booted from a handover, those of this handover that were not retrieved are found as well, if the memory was
        searched: their `in_map` is False.

        Raises: SourceError on a read error.

        Source: abi.md section 6.

        """

    @property
    def subtrees(self) -> dict[str, Subtree]:
        """The subtrees of the root FDT by name."""
    @property
    def payloads(self) -> dict[str, Payload]:
        """Every subtree's payload by name, decoded at each access.

        A subtree without a decoder is a `Raw`, one that its decoder refuses a `Broken`.
        """

    @property
    def luo(self) -> Luo:
        """The live update orchestrator's state: `inc.luo.sessions["vm-1"].files[0x10].read()`.

        Raises: NotFoundError without one; FormatError if it cannot be decoded.

        Source: abi.md section 6.
        """

    @property
    def metadata(self) -> Metadata:
        """The chain of kexecs: `inc.metadata.previous_release`.

        Raises: NotFoundError without one; FormatError if it cannot be decoded.

        Source: abi.md section 6.
        """

    @property
    def reserve_mem(self) -> dict[str, Region]:
        """The `reserve_mem=` regions by name.

        Raises: FormatError if their subtree cannot be decoded.

        Source: abi.md section 6.
        """

    @property
    def malformed_subtrees(self) -> dict[str, str]:
        """Nodes of the root FDT that are not valid subtrees: name to reason."""

@final
class Subtree:
    """A producer's blob, that a node of the root FDT points to (abi.md section 2)."""

    @property
    def name(self) -> str:
        """The name of its node in the root FDT."""
    @property
    def phys(self) -> int:
        """Physical address of the blob."""
    @property
    def size(self) -> int | None:
        """Bytes of the blob; None if neither the root FDT nor the blob states it."""

    def read(self) -> bytes:
        """Copy the blob.

        Raises: ParameterError if its size is not known; OutsideMemoryError; SourceError on a read error.
        """

    def fdt(self) -> Fdt:
        """Read the blob as a devicetree.

        Raises: FdtError; as `read`.
        """

@final
class Vmalloc:
    """A preserved vmalloc area: a list of blocks of pages (`struct kho_vmalloc`, abi.md section 6).

    Args:
        inc: the handover.
        descriptor: the 16 bytes of the struct.
        owner: an address that tells lists apart, by default that of the first chunk. No two lists share a chunk or
            block, so one that was read for another owner is refused.

    Raises: FormatError for a chunk that is misaligned, outside memory, in a cycle or shared, and for more blocks than
    an image of this size has room for; ParameterError unless `descriptor` has 16 bytes.

    """

    def __new__(cls, inc: Incoming, descriptor: bytes, owner: int | None = None) -> Vmalloc: ...
    @property
    def first(self) -> int:
        """Physical address of the first chunk of the list."""
    @property
    def total_pages(self) -> int:
        """Pages that the descriptor claims; `nr_pages` is what the list names."""

    @property
    def flags(self) -> int:
        """The flags of the descriptor: 1 is VM_ALLOC, 2 is huge mappings."""

    @property
    def order(self) -> int:
        """Log2 of the number of pages of each block."""

    @property
    def nr_pages(self) -> int:
        """Pages that the list names."""
    @property
    def nbytes(self) -> int:
        """Bytes of the area."""
    @property
    def nr_blocks(self) -> int:
        """The number of `blocks`."""

    @property
    def chunks(self) -> list[int]:
        """Physical addresses of the pages that hold the list."""

    @property
    def blocks(self) -> list[int]:
        """Physical addresses of the area's blocks, in the order of the area."""

    def read(self, n: int, offset: int = 0) -> bytes:
        """Copy `n` bytes of the area from `offset` on.

        Raises: OutOfRangeError beyond its end; OutsideMemoryError; SourceError on a read error.
        """

    def records(self, size: int, most: int) -> bytes:
        """Copy records of `size` bytes, at most `most`, up to the first record of zeros.

        Raises: ParameterError if `size` is 0; OutsideMemoryError; SourceError on a read error.
        """

@final
class Memfd:
    """A preserved memfd as it lies in memory (`struct memfd_luo_ser`, abi.md section 6).

    Args:
        inc: the handover.
        phys: physical address of the structure.
        version: 1 for memfd-v1, 2 for memfd-v2.
        orders_by_index: the map that preserved the file is gone, so each folio reaches to the next one in the list; by
            default a folio is as large as it was preserved, unless the map is not in the dump (`Incoming.map_lost`).

    Raises: OutsideMemoryError; FormatError for a list of folios that cannot be followed; ParameterError for another
    version.

    """

    def __new__(cls, inc: Incoming, phys: int, version: int, *, orders_by_index: bool = False) -> Memfd: ...
    @property
    def phys(self) -> int:
        """Physical address of the structure."""
    @property
    def pos(self) -> int:
        """The file position, in bytes."""
    @property
    def size(self) -> int:
        """Bytes of the file."""
    @property
    def seals(self) -> int:
        """The seals of the file, as F_SEAL_* bits; 0 in memfd-v1, which has none."""
    @property
    def flags(self) -> int:
        """The flags word of the structure."""
    @property
    def nr_folios(self) -> int:
        """Folios that the structure claims; `nr_listed` is what the list holds."""

    @property
    def nr_listed(self) -> int:
        """Folios that the list holds: `len(folios)`, without making them."""

    def memory_runs(self, most: int) -> builtins.list[tuple[int, int]]:
        """List the runs of memory that the folios take: (phys, nbytes), ascending, at most `most` of them.

        Adjacent and overlapping folios are one run.
        """

    @property
    def folios(self) -> builtins.list[MemfdFolio]:
        """The folios of the file, a `MemfdFolio` each, in the order of the list."""
    @property
    def list(self) -> Vmalloc:
        """The area that holds the list of folios."""
    @property
    def extents(self) -> builtins.list[tuple[int, int, int]]:
        """The parts of the file that are data, as (offset, phys, nbytes), by offset; the rest is zeros."""

    @property
    def data(self) -> RunArray:
        """The parts of the file that are data, as (offset, nbytes), by offset; adjacent parts are merged."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the file that are data."""

    def next_to_read(self, offset: int, end: int) -> tuple[int, int] | None:
        """Find the first run from `offset` to `end` that may hold other than zeros, or cannot be read.

        Returns: (offset, nbytes), or None if all of it is zeros.
        """

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset` on, fewer at the end of the file.

        Args:
            n: bytes; by default all that follow.
            offset: in the file, in bytes.

        Raises: OutsideMemoryError for a folio that is not in this memory; OutOfRangeError for more bytes than an object
        can have; SourceError on a read error.

        """

def open_memory(
    memory: Memory | Arena,
    *,
    fdt_phys: int | None = None,
    page_size: int | None = None,
    bitmap_bytes: int | None = None,
    scratch: Sequence[tuple[int, int]] | int | None = None,
    max_page_order: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Incoming:
    """Read the handover in a memory or arena without changing anything, as `kho.open` does.

    Args:
        memory: a `Memory` or `Arena`.
        fdt_phys, page_size, bitmap_bytes, scratch, max_page_order: as of `Incoming`.
        progress: called with the number of bytes searched so far; an exception that it raises ends the call.

    Raises: as `Incoming`; SourceError for a raw image whose handover is whole at no address, or at several.

    """

@final
class Fdt:
    """A flattened devicetree, read from a buffer of bytes (Devicetree Specification 0.4, chapter 5).

    `fdt["/data"]` is the node at a path (NotFoundError without it), `"/data" in fdt` says whether there is one, and
    `bytes(fdt)` is the blob.

    Args:
        blob: the bytes; those after the header's `totalsize` are neither read nor kept.

    Raises: FdtError with the offset of the first thing that is wrong.

    """

    def __new__(cls, blob: Buffer) -> Fdt: ...
    @staticmethod
    def partial(blob: Buffer) -> tuple[Fdt, FdtError | None]:
        """Read as much of a blob as can be read.

        Nodes and properties are given in order, up to where the blob is damaged. Properties whose names are cut off are
        in `FdtNode.raw_properties`: Linux 6.19 and later show `out/fdt` in debugfs without the strings.

        Returns: the tree, and the FdtError that `Fdt(blob)` would raise; None if the blob is whole.

        Raises: FdtError if it does not begin with the header of a devicetree (length, magic, version).
        """

    @property
    def root(self) -> FdtNode:
        """The node `/`.

        Raises: NotFoundError if a partial read ended before it.
        """

    @property
    def totalsize(self) -> int:
        """Bytes according to the header; more than `len(bytes(fdt))` if the blob is truncated."""

    @property
    def version(self) -> int:
        """The version of the format: 17, or 16 for old blobs."""

    @property
    def boot_cpuid(self) -> int:
        """The header's `boot_cpuid_phys`: the physical ID of the boot CPU."""
    @property
    def reservations(self) -> list[tuple[int, int]]:
        """The memory reservation map, as (address, nbytes); empty in a handover."""

    def walk(self) -> list[FdtNode]:
        """List every node, parents before children, in the order of the blob."""

    def __getitem__(self, path: str, /) -> FdtNode: ...
    def __contains__(self, path: str, /) -> bool: ...
    def __bytes__(self) -> bytes: ...

@final
class FdtNode:
    """A node of an `Fdt`; it keeps the tree alive.

    `node["reg"]` is the value of a property as bytes (NotFoundError without it), and `"reg" in node` says whether there
    is one. A node is equal to the same node of the same tree only, and hashable.
    """

    @property
    def name(self) -> builtins.str:
        """The name of the node; empty for the root.

        U+FFFD stands for what is unprintable in a name that a partial read accepted.
        """

    @property
    def path(self) -> builtins.str:
        """The path of the node, as "/data"."""
    @property
    def offset(self) -> int:
        """Offset of the node's token in the blob, in bytes."""

    @property
    def parent(self) -> FdtNode | None:
        """The parent; None for the root."""
    @property
    def children(self) -> list[FdtNode]:
        """The children, in the order of the blob."""
    @property
    def properties(self) -> dict[builtins.str, bytes]:
        """The properties by name, in order; of two with one name the first, which is what libfdt reads."""

    @property
    def raw_properties(self) -> list[tuple[builtins.str | None, int, bytes]]:
        """Every property in order, as (name, offset of the name in the strings block, value).

        The name is None where the strings block does not hold it.
        """

    def some_properties(self, first: int, most: int) -> list[tuple[str | None, int, bytes]]:
        """Give at most `most` of `raw_properties`, from number `first` on."""

    def u32(self, name: builtins.str) -> int:
        """Read a property of 4 bytes, in native byte order.

        Raises: NotFoundError; FdtError for another length.
        """

    def u64(self, name: builtins.str) -> int:
        """Read a property of 8 bytes, in native byte order.

        Raises: NotFoundError; FdtError for another length.
        """

    def str(self, name: builtins.str) -> builtins.str:
        """Read a property that is one NUL-terminated string, and leave its NUL out.

        Raises: NotFoundError; FdtError if it is not exactly one string in UTF-8.
        """

    def strings(self, name: builtins.str) -> list[builtins.str]:
        """Read a property that is a sequence of NUL-terminated strings.

        Raises: NotFoundError; FdtError if the last string has no NUL, or one is not UTF-8.
        """

    def node(self, name: builtins.str) -> FdtNode:
        """Find the first child of exactly this name.

        Raises: NotFoundError.
        """

    def __getitem__(self, name: builtins.str, /) -> bytes: ...
    def __contains__(self, name: builtins.str, /) -> bool: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class FdtPlaceholder:
    """A property whose value is given later, made by `FdtWriter.placeholder`."""

    def fill(self, value: Buffer) -> None:
        """Give the value; it can be given again until the writer finishes.

        Raises: FdtError for another length than was reserved, and once the writer has finished.
        """

    def fill_u64(self, value: int) -> None:
        """Give a value of 8 bytes, in native byte order.

        Raises: FdtError as `fill`; OverflowError.
        """

@final
class FdtNodeBlock:
    """The context manager that `FdtWriter.node` returns: entering begins the node, leaving ends it.

    Raises: FdtError on leaving if the nodes begun and ended in the block do not match.
    """

    def __enter__(self) -> FdtWriter: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> bool: ...

@final
class FdtWriter:
    """A writer of devicetrees, equal to libfdt's sequential writer byte for byte.

    Properties go before subnodes, since no reader looks for them after those.

    Args:
        capacity: bytes that the blob may take; the root FDT of a handover has one page.

    Raises: from every method FdtError if it is called out of order, or if `capacity` does not suffice; then nothing has
    changed.

    Source: scripts/dtc/libfdt/fdt_sw.c.

    """

    def __new__(cls, capacity: int = 4096) -> FdtWriter: ...
    @property
    def capacity(self) -> int:
        """Bytes that the blob may take."""
    def add_reservemap_entry(self, address: int, size: int) -> None:
        """Add a range to the memory reservation map, before the root node begins.

        Args:
            address: physical address of the range.
            size: bytes.

        Raises: FdtError, OverflowError.

        """

    def begin_node(self, name: str = "") -> None:
        """Begin a node: the root, which has no name, or a child of the open node; at most 64 deep.

        Raises: FdtError.
        """

    def end_node(self) -> None:
        """End the open node.

        Raises: FdtError if no node is open.
        """
    def node(self, name: str = "") -> FdtNodeBlock:
        """Give a context manager for a node: `with writer.node(name):` begins the node and ends it.

        Raises: FdtError on entering or leaving it.
        """

    def property(self, name: str, value: Buffer) -> None:
        """Add a property to the open node.

        Args:
            name: of the property.
            value: a buffer of bytes.

        Raises: FdtError.

        """

    def property_u32(self, name: str, value: int) -> None:
        """Add a property of 4 bytes, in native byte order.

        Raises: FdtError, OverflowError.
        """

    def property_u64(self, name: str, value: int) -> None:
        """Add a property of 8 bytes, in native byte order.

        Raises: FdtError, OverflowError.
        """

    def property_str(self, name: str, text: str) -> None:
        """Add a property that is a string and its NUL.

        Raises: FdtError.
        """

    def placeholder(self, name: str, length: int) -> FdtPlaceholder:
        """Add a property of `length` zero bytes, to be filled before `finish`.

        Raises: FdtError.
        """

    def finish(self) -> bytes:
        """Give the blob, and close the writer.

        Raises: FdtError while a node is open, before the root, and if the writer has finished.
        """

@final
class Snapshot:
    """What a kernel shows of its handover in debugfs: FDTs and scratch areas, but no memory.

    Source: kernel/liveupdate/kexec_handover_debugfs.c.
    """

    @staticmethod
    def open(source: str | PathLike[str]) -> Snapshot:
        """Read a directory, a root FDT, or the running machine.

        Args:
            source: debugfs' `kho` directory; a directory that has it at `sys/kernel/debug/kho`, and may have
                `proc/iomem`, `proc/cmdline` and `proc/version`; the file of one root FDT; or the string "live".

        Raises: SourceError with the path that is missing, unreadable, not a regular file, over 1 MiB, or a link out of
        the directory; FdtError or FormatError for a file that is not the root FDT of a handover.

        """
    @staticmethod
    def recognizes(source: str | PathLike[str]) -> bool:
        """Say whether `source` is one that `Snapshot.open` reads, rather than an image of memory.

        That is "live", a directory, or a file that begins as a devicetree.
        """
    @property
    def path(self) -> str:
        """The path that was read."""
    @property
    def kind(self) -> str:
        """The kind of source: "live", "root" (a directory with sys and proc), "debugfs" or "fdt"."""
    @property
    def incoming(self) -> SnapshotSide | None:
        """What this kernel was handed; None if nothing."""
    @property
    def outgoing(self) -> SnapshotSide | None:
        """What this kernel will hand over, as far as it is known; of a single FDT, that FDT."""
    @property
    def scratch(self) -> list[tuple[int, int]] | None:
        """The scratch areas, as (addr, nbytes): low memory, global, one per NUMA node; None if not shown."""
    @property
    def finalized(self) -> bool | None:
        """The content of `out/finalize`, which Linux 6.16 to 7.0 have; None without it."""
    @property
    def ram(self) -> list[tuple[int, int]] | None:
        """System RAM, as (phys, nbytes); None if /proc/iomem is missing or hides its addresses (not root)."""
    @property
    def cmdline(self) -> str | None:
        """The kernel's command line; None if /proc/cmdline is missing."""
    @property
    def version(self) -> str | None:
        """The content of /proc/version; None if it is missing."""

@final
class SnapshotSide:
    """One direction of a handover, as debugfs shows it."""

    @property
    def fdt(self) -> bytes | None:
        """The bytes of the root FDT; None before one is finalized (Linux 6.16 to 6.18)."""
    @property
    def compatible(self) -> str | None:
        """The ABI version, as "kho-v4"; known even where Linux 6.19 and later truncate the FDT."""
    @property
    def preserved_memory_map(self) -> int | None:
        """Physical address of the map; known even where Linux 6.19 and later truncate the FDT."""
    @property
    def truncated(self) -> tuple[int, int] | None:
        """(bytes according to the header, bytes shown) of a truncated FDT; None if it is whole."""
    @property
    def problem(self) -> str | None:
        """What is wrong with the FDT, as text; None if nothing."""
    @property
    def sub_fdts(self) -> dict[str, bytes]:
        """The blobs of the producers by name."""

@final
class OwnerRows:
    """Ranges of pages with their owners, by address: a sequence of `OwnedRange`, each made on access."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> OwnedRange: ...

def find_memory(
    memory: Memory | Arena, progress: Callable[[int], object] | None = None
) -> tuple[list[int], list[tuple[int, int, int]], list[tuple[int, list[tuple[int, int]]]]]:
    """Find the traces of handovers in a memory, whether or not they can be read.

    Args:
        memory: a `Memory` or `Arena`.
        progress: called with the number of bytes searched so far; an exception that it raises ends the call.

    Returns: the physical addresses of root FDTs; (FDT, scratch array, its bytes) for each place where a kernel was told
    of a handover, if something like scratch areas is listed there, the soundest first; and (phys, areas) of each page
    that can be a scratch array, with the (addr, nbytes) it lists.

    Raises: SourceError on a read error.

    Source: abi.md section 2.

    """

def check_map(inc: Incoming, nodes: Sequence[tuple[int, int, int]] = ..., most: int = 16) -> dict[str, Any]:
    """Check a map by runs: against itself, its memory, scratch, and NUMA nodes.

    Args:
        inc: the handover.
        nodes: NUMA memory, as (start, nbytes, node).
        most: the number of places to list for each condition.

    Returns: a dict. `overlapping`, `in_scratch`, `outside`, `nodes_in_scratch`, `nodes_preserved` and `spanning` are
    (number of places, [(phys, pages, order, other)] of the first ones); `empty` is [(order, empty bitmaps, bitmaps)].

    """

def check_memfd_folios(
    inc: Incoming, memfd: Memfd, most: int = 16
) -> dict[str, tuple[int, builtins.list[tuple[int, int]]]]:
    """Check a memfd's list of folios.

    Args:
        inc: the handover.
        memfd: the file.
        most: the number of places to list for each condition.

    Returns: a dict. `duplicated`, `beyond`, `interior` and `nowhere` are (number of folios, [(place in the file in
    pages, phys)] of the first ones); `listed` has the number of folios that the list holds.

    """

def join_owners(
    inc: Incoming,
    names: Sequence[tuple[str, str]],
    claims: Sequence[tuple[int, int, tuple[int, int] | Vmalloc | Memfd]],
) -> dict[str, Any]:
    """Join the memory that is claimed with the memory that is preserved, for `kho.owners`.

    Args:
        inc: the handover.
        names: (owner, what) each.
        claims: (index of a name, index of the name for the list of an area, memory) each; memory is (phys, nbytes), a
            `Vmalloc` or a `Memfd`.

    Returns: a dict of `rows`, `unowned`, `unpreserved` (`OwnerRows`), `shared` ([(phys, nbytes, name, name)]), `totals`
    (bytes by name), `unowned_bytes`, and `more_unpreserved` and `more_shared`, the numbers of those that are not
    listed.

    Raises: ParameterError for an index without a name.

    """

def find_unlisted(inc: Incoming, unowned: OwnerRows) -> list[tuple[int, int]]:
    """Find the memfds whose structure lies in preserved pages without an owner.

    Args:
        inc: the handover.
        unowned: the pages, as `join_owners` returns them.

    Returns: (physical address of the structure, version) each, ascending.

    Raises: SourceError on a read error.

    Source: abi.md section 6.

    """

def find_outside_map(inc: Incoming) -> list[tuple[int, int]]:
    """Find the memfds whose structure lies in memory that the map does not preserve.

    Args: inc: the handover.

    Returns: as `find_unlisted`; empty if the memory was not searched, and without the root FDT of a handover whose map
    was given back.

    Source: abi.md section 6.
    """
