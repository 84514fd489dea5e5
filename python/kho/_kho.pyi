"""The compiled half of kho; import `kho`, not this.

Sizes are in bytes and addresses physical unless a name says otherwise; pfn is an address divided by the page size;
a folio of order `o` is `1 << o` pages. Whole numbers beyond 64 bits raise ParameterError.
"""

import builtins
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, Self, SupportsIndex, final, overload

from typing_extensions import Buffer, disjoint_base

from ._types import FolioInfo, MemfdFolio, OwnedRange, PageInfo, Placement
from .errors import FdtError
from .formats import Luo, Metadata, Payload, Region

__all__ = [
    "Abi",
    "Arena",
    "Fdt",
    "FdtNode",
    "FdtNodeBlock",
    "FdtPlaceholder",
    "FdtWriter",
    "Folio",
    "FolioArray",
    "Incoming",
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
    "join_owners",
    "kho_is_enabled",
    "kho_scratch_of",
    "open_memory",
    "parse_kho_scratch",
]

__version__: Final[str]

def abis() -> dict[str, Abi]:
    """Give the versions of KHO's ABI that this library knows, oldest first, by `compatible` (abi.md section 1).

    This is the one table of what differs between versions; Python keeps none of its own.
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
    def decoded(self) -> bool:
        """Whether this library reads and writes it."""
    @property
    def map(self) -> Literal["chunk list", "radix tree"]:
        """How the preserved-memory map is written: "chunk list" or "radix tree" (abi.md sections 3 and 4)."""
    @property
    def levels(self) -> dict[int, int]:
        """Levels of the tree by page size in bytes, leaves included (KHO_TREE_MAX_DEPTH); empty for a chunk list."""
    @property
    def order_bit(self) -> bool:
        """Whether the tree's depth allows for the bit of a key that tells order 0, which counts at 16 KiB."""
    @property
    def bitmaps(self) -> list[tuple[int | None, str]]:
        """`(bytes, kernels)` of the bitmaps that a chunk list comes with; None bytes are a page. Empty for a tree."""
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
    def _add(compatible: str, *, like: str, **columns: str) -> Abi:
        """Add a version that is `like` another but for the columns given. For tests only.

        A row that was added stays in memory until the process ends, so that nothing that refers to it can break.

        Raises: ValueError for a `compatible` that there is, a `like` or a column that there is not.
        """
    @staticmethod
    def _remove(compatible: str) -> bool:
        """Remove a version that `_add` added; whether it was there. For tests only."""

def kho_is_enabled(cmdline: str, default: bool = False) -> bool:
    """Whether the kernel has KHO on after this command line (`kho=`, read with kstrtobool).

    The last well-formed occurrence wins; a malformed one, or `kho` without a value, changes nothing.

    Args: cmdline: as in /proc/cmdline. default: CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT.
    """

def kho_scratch_of(cmdline: str) -> str | None:
    """The value of the last `kho_scratch=` on a command line, well-formed or not, without quotes; None if none."""

def parse_kho_scratch(value: str, *, trailing_garbage: bool = False) -> ScratchSpec:
    """Read a value of `kho_scratch=`: `N%` or `LOW,GLOBAL,PERNODE` (kho_parse_scratch_size).

    Sizes are read as memparse does: decimal, 0x or octal 0, a suffix K M G T P E; beyond 64 bits they wrap.

    Args: trailing_garbage: let anything follow the third size, as older kernels did.
    Raises: ParameterError, saying what is missing.
    """

@final
class ScratchSpec:
    """How large the scratch areas are to be: `percent` is set, or the three sizes in bytes are; the others are None."""

    @property
    def percent(self) -> int | None:
        """Per cent of the memory the kernel reserved while booting."""
    @property
    def low(self) -> int | None:
        """Bytes in low memory, before rounding."""
    @property
    def global_(self) -> int | None:
        """Bytes anywhere, before rounding."""
    @property
    def pernode(self) -> int | None:
        """Bytes on each NUMA node, before rounding."""
    def sizes(
        self, reserved_low: int, reserved_all: int, reserved_per_node: Sequence[int], align: int = 2097152
    ) -> list[int]:
        """The sizes of the areas in bytes, in the kernel's order: low, global, one per node (scratch_size_update).

        Args: reserved_low, reserved_all, reserved_per_node: bytes the kernel reserved while booting below 4 GiB,
        everywhere, and on each node; only a percentage looks at the amounts. align: what each is rounded up to, a
        power of two: a pageblock, 2 MiB at 4 KiB pages, 32 MiB at 16 KiB, 512 MiB at 64 KiB.
        Raises: ParameterError; OutOfRangeError for a size beyond 64 bits.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Memory:
    """Physical memory that can be read: ELF cores, raw images, bytes. May be shared by threads."""

    @staticmethod
    def open(
        *sources: str | PathLike[str],
        unpack_limit: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Memory:
        """Open files as one memory.

        Args:
            sources: a str is `FILE`, `FILE@ADDRESS`, `FILE@ADDRESS,offset=N,size=N,hole=START:END` (numbers decimal or
                0x, with a suffix K, M, G or T) or `FILE,machine=NAME` (the memory file of a virtual machine: q35, pc,
                microvm, virt, firecracker, cloud-hypervisor, firecracker-arm64, cloud-hypervisor-arm64), or the name of
                an existing file whatever is in it; `-` for FILE is standard input; a Path is a path. A file without an
                address is what its content says: an ELF core, a kdump file, flattened or not, LiME, or else the memory
                at 0. `kho.open` reads a raw image at another address than it has here if its handover is whole only
                there; `,check=no` forbids it. One packed with gzip, xz, zstd, bzip2, lz4 or snappy, and AVML's, is
                unpacked into an unlinked temporary file, and what a pipe holds is put there; a file that is said to be
                raw only if its name says so, too (`ram.bin.gz@0x40000000`).
            unpack_limit: the most bytes a packed file or a pipe may come to; if not given `KHO_UNPACK_LIMIT` of the
                environment, or else 2 GiB or 128 times the packed size (bzip2, xz: 512 MiB or 64 times), of a pipe
                that is not packed 1 TiB.
            progress: called with the number of bytes unpacked so far; what it raises ends that.

        Raises: SourceError for a file that cannot be used, or that has memory another one has; ParameterError for none.

        """
    @staticmethod
    def from_segments(segments: Sequence[tuple[int, bytes | bytearray]]) -> Memory:
        """Memory of byte strings at physical addresses, in any order.

        Raises: ParameterError if two overlap, OutOfRangeError if one runs past the address space.
        """
    @property
    def ranges(self) -> list[tuple[int, int]]:
        """What is here: (phys, size) of each run, ascending, adjacent ones merged."""
    @property
    def nbytes(self) -> int:
        """Bytes here in all."""
    def read(self, phys: int, n: int) -> bytes:
        """`n` bytes at `phys`.

        Raises: OutsideMemoryError if any of them is not here; SourceError if a file is cut short or says no.
        """
    def next_data(self, phys: int) -> tuple[int, int] | None:
        """Find the first run at or behind `phys` that may hold something other than zeros: (phys, size)."""

    @property
    def machine(self) -> str | None:
        """The machine the first ELF core or kdump file names: "x86_64", "aarch64" or "machine N"; None if none does."""
    @property
    def sources(self) -> list[str]:
        """What was opened, in the order given; empty for byte strings."""
    @property
    def truncated(self) -> list[tuple[str, int, int]]:
        """(path, phys, size) of what a file that is cut short claims and does not have: reading it fails.

        Of a kdump file these are the pages that have lost their descriptors, from the first to the last.
        """

@final
class Arena:
    """Physical memory one can write: RAM at chosen addresses, a page allocator, scratch areas.

    Address space is reserved, memory committed when touched: 16 TiB cost next to nothing. A `memfd` or file backing is
    an ELF core that `kho inspect` and any ELF tool reads, and that another process opens with `Arena.open`.
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
    ) -> Arena:
        """Make zeroed memory.

        Args:
            regions: RAM, page-aligned: `(start, size)` or `(start, size, numa_node)` each, or the size (`1 << 30`,
                `"1G"`) of one region at 0.
            page_size: 4096, 16384 or 65536.
            max_page_order: MAX_PAGE_ORDER, the largest order `alloc` gives unless asked for gigantic folios; 10, 11 or
                13 by page size.
            backing: None for memory of this process, "memfd", or the path of a new file.
            scratch: a value of `kho_scratch=` (ABI section 5), placed as the kernel does, or `(addr, size)` each.
            reserved: bytes the kernel reserved while booting, which a percentage in `scratch` is of.

        Raises: ParameterError for what cannot be; SourceError if the backing cannot be made.

        """

    @staticmethod
    def open(source: str | PathLike[str] | int) -> Arena:
        """Map the arena in a file, or of a file descriptor (which is duplicated).

        A memory file must be sealed against shrinking (F_SEAL_SHRINK), as `Arena(backing="memfd")` makes it. Any other
        file can be cut by a process that may write it: kho's own reads and writes raise SourceError then, and touching
        a view that was taken before is fatal (SIGBUS). While the file holds a handover that was not taken over, nothing
        can be allocated.
        Raises: ParameterError for a file no arena made; SourceError, also for a memory file that can shrink.
        """

    def alloc(self, order: int = 0, *, node: int | None = None, gigantic: bool = False) -> Folio:
        """Allocate `1 << order` pages, lowest first, never from scratch or what is preserved (alloc_pages).

        The bytes are what their last owner left; zeros at first.
        Raises: OutOfMemoryError; OrderError beyond max_page_order unless `gigantic`.
        """

    def alloc_at(self, phys: int, order: int = 0) -> Folio:
        """Allocate one particular block. Raises: PageStateError if a page of it is in use; OutsideMemoryError."""

    def folio(self, phys: int) -> Folio:
        """Give the folio allocated at `phys`, its head.

        Raises: PageStateError; OwnedPageError for a page that holds a bitmap, the map, the FDT or a subtree of a
            handover.
        """

    def free(self, folio: Folio | int) -> bool:
        """Drop a reference on an allocated folio; True if it was the last, which frees it (folio_put).

        The folio's pages can be allocated again once no view of them is left.
        Raises: PageStateError unless it is an allocated folio's head, or while it is preserved or linked as a subtree;
            FreedFolioError for a `Folio` that was freed before; OwnedPageError as `folio`; ParameterError for a `Folio`
            of another arena.
        """

    def page(self, phys: int) -> PageInfo:
        """Say what the page is that holds `phys`. Raises: OutsideMemoryError."""

    def read(self, phys: int, n: int) -> bytes:
        """Copy `n` bytes. Raises: OutsideMemoryError unless all are in RAM."""

    def write(self, phys: int, data: Buffer) -> None:
        """Copy bytes into memory, allocated or not.

        Raises: OutsideMemoryError; OwnedPageError, and nothing is written, if a page of it holds a bitmap, the map, the
            FDT or a subtree of a handover, or a bitmap of a map that was taken over and is in use.
        """

    def next_data(self, phys: int) -> tuple[int, int] | None:
        """Find the first run at or behind `phys` that may hold something other than zeros: (phys, size)."""

    def fileno(self) -> int:
        """Give the memfd's or file's descriptor, to pass on. Raises: ParameterError without one."""

    @property
    def page_size(self) -> int: ...
    @property
    def max_page_order(self) -> int: ...
    @property
    def regions(self) -> list[tuple[int, int, int]]:
        """`(start, size, node)`, ascending."""

    @property
    def nodes(self) -> list[int]:
        """NUMA nodes with memory."""

    @property
    def scratch(self) -> list[tuple[int, int]]:
        """`(addr, size)`: low memory, global, then per node."""

    @property
    def scratch_phys(self) -> int | None:
        """Where the scratch array lies, in scratch itself."""

    @property
    def fdt_phys(self) -> int | None:
        """Where the FDT of a finalized handover lies."""

    @property
    def nbytes(self) -> int:
        """Bytes of RAM."""

    @property
    def free_pages(self) -> int: ...
    @property
    def allocated_pages(self) -> int: ...
    @property
    def reserved_pages(self) -> int:
        """Pages that cannot be allocated: page 0, scratch, inherited and not restored, freed with a view left."""

    @property
    def metadata_bytes(self) -> int:
        """Bytes of bookkeeping outside the arena."""

@final
class Folio:
    """A folio as a buffer of bytes: one allocation, not whatever is at its address.

    In an arena `memoryview(folio)` is the memory itself, writable, and keeps it mapped; in an image it is a copy,
    read-only. While a view of it exists its pages are given to no other owner, even if it is freed or taken over: what
    is written through the view then is lost. Raises on every use: StaleError after a take-over, FreedFolioError once it
    was freed, by this or another object.
    """

    @property
    def phys(self) -> int: ...
    @property
    def pfn(self) -> int: ...
    @property
    def order(self) -> int: ...
    @property
    def nr_pages(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def refcount(self) -> int:
        """References; 0 once it was freed."""

    def get(self) -> int:
        """Take a reference (folio_get); the new count. Raises: FreedFolioError, StaleError."""

    def free(self) -> bool:
        """Drop a reference, as `Arena.free`; with the last one this object and all others of the folio are dead.

        Raises: FreedFolioError the next time; StaleError; as `Arena.free`.
        """

    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Pages:
    """A range of restored pages as one buffer of bytes, like `Folio`; each page is an order-0 page of its own."""

    @property
    def phys(self) -> int: ...
    @property
    def pfn(self) -> int: ...
    @property
    def nr_pages(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class FolioArray:
    """Folios as a sequence of `FolioInfo(phys, order)`, and as a read-only buffer of 16-byte records.

    `numpy.asarray(folios)` is a structured array with the fields `phys` (u8) and `order` (u1), without a copy. The
    memory of a long one (4 to 256 MiB) that nobody has any more waits for the next: it counts as resident until the
    kernel wants it (MADV_FREE).
    """

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> FolioInfo: ...
    @overload
    def __getitem__(self, key: slice, /) -> FolioArray: ...
    def __iter__(self) -> Iterator[FolioInfo]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    __hash__: None  # type: ignore[assignment]

@final
class PfnArray:
    """Pfns, ascending, as a sequence of int, and as a read-only buffer of 8-byte integers (format `Q`).

    `numpy.asarray(pfns)` is an array of uint64 without a copy, and `memoryview(pfns).tolist()` the quickest list.
    Memory of long ones is used again, as that of a `FolioArray`.
    """

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> PfnArray: ...
    def __iter__(self) -> Iterator[int]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    __hash__: None  # type: ignore[assignment]

@final
class RunArray:
    """Runs of pages or folios as a sequence of (pfn, n), and as a read-only buffer of 16-byte records.

    `numpy.asarray(runs)` is a structured array with the fields `pfn` and `n` (u8), without a copy.
    """

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, key: slice, /) -> RunArray: ...
    def __iter__(self) -> Iterator[tuple[int, int]]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    __hash__: None  # type: ignore[assignment]

@final
class Tracker:
    """Which folios are preserved: a set of (pfn, order) in sparse bitmaps per order (struct kho_mem_track).

    One bit is one pair; folios of different orders may overlap, as nothing in the format forbids it. Operations say
    what changed. Bitmaps that have become empty stay until `clear`, as the kernel keeps them.

    Threads may share trackers. Whatever may take long (bulk operations, set algebra, lists, bitmaps) leaves the
    interpreter to other threads meanwhile, so threads that work on different trackers run at the same time; those that
    work on one take turns. A buffer that another thread writes to during a call is safe: its numbers are copied a few
    at a time, and it is the copies that are checked and used.

    As with sets, `<=` and `<` say subset, `|`, `&`, `-` and `^` make a new tracker, whose bitmaps have the size of the
    left one's and are none of them empty; page sizes must be equal for those (else ParameterError).
    """

    def __new__(cls, page_size: int = 4096, bitmap_bytes: int | None = None) -> Tracker:
        """Make an empty tracker.

        Args: page_size: 4096, 16384 or 65536. bitmap_bytes: 512 (Linux 6.16) or the page size (6.18 on, default).
        Raises: ParameterError.
        """

    @property
    def page_size(self) -> int: ...
    @property
    def bitmap_bytes(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of metadata: bitmaps and the directories that lead to them."""

    def preserve(self, pfn: int, order: int = 0) -> bool:
        """Mark the folio at `pfn` for the next kernel (__kho_preserve_order).

        Args: pfn: page frame number, a multiple of `1 << order`. order: log2 pages, 0..36.
        Returns: True if it was not yet marked.
        Raises: MisalignedError, OrderError, OutOfRangeError.
        """

    def unpreserve(self, pfn: int, order: int = 0) -> bool:
        """Unmark a folio (__kho_unpreserve_order); True if it was marked. Raises: as `preserve`."""

    def preserve_pages(self, pfn: int, n: int) -> int:
        """Mark `n` pages in naturally aligned blocks, greedily, all or nothing (kho_preserve_pages).

        Returns: how many blocks were not yet marked.  Raises: OutOfRangeError.
        """

    def unpreserve_pages(self, pfn: int, n: int) -> int:
        """Unmark the blocks that `preserve_pages` marks; how many were marked (kho_unpreserve_pages)."""

    def preserve_run(self, pfn: int, order: int, count: int) -> int:
        """Mark `count` folios of one order side by side, by words, all or nothing; how many were not yet marked.

        Raises: as `preserve`.
        """

    def unpreserve_run(self, pfn: int, order: int, count: int) -> int:
        """Unmark the folios that `preserve_run` marks; how many were marked."""

    def preserve_many(self, pfns: Buffer, order: int | Buffer = 0) -> int:
        """Mark many folios at once, all or nothing.

        Args:
            pfns: a one-dimensional buffer of 64-bit or 32-bit integers, signed or not (numpy array, array.array,
                memoryview, PfnArray), in any order; they are read where they are.
            order: one order for all, or a buffer of integers of any size with one for each; bytes are quickest.

        Calls with one order run beside those of other threads with other orders.

        Returns: how many were not yet marked.  Raises: as `preserve`, ParameterError; TypeError for other buffers.

        """

    def unpreserve_many(self, pfns: Buffer, order: int | Buffer = 0) -> int:
        """Unmark many folios at once, all or nothing; how many were marked. As `preserve_many`."""

    def contains_many(self, pfns: Buffer, order: int | Buffer = 0) -> bytes:
        """Say of many folios whether they are marked: for each a byte, 1 or 0. Args as for `preserve_many`.

        What no folio can be is 0, as `in` says. `numpy.frombuffer(found, bool)` is a mask.

        Raises: OrderError, ParameterError if there are not as many orders as pfns.
        """

    def extents(self) -> RunArray:
        """List the runs of pages that folios of any order cover: (pfn, pages), ascending, disjoint, none adjacent.

        Raises: OutOfMemoryError if this process cannot have so long a list.
        """

    def runs(self, order: int = 0) -> RunArray:
        """List the maximal runs of consecutive folios of one order: (pfn, folios), ascending. Raises: as `extents`."""

    def folios(self) -> FolioArray:
        """List every folio, by address, then order. Raises: as `extents`."""

    def pfns(self, order: int = 0) -> PfnArray:
        """List the folios of one order by pfn. Raises: as `extents`."""

    def rank(self, pfn: int, order: int = 0) -> int:
        """Count the folios of one order that begin below `pfn`, which need not be one.

        Time goes with the bytes of that order's bitmaps below.
        """

    def select(self, rank: int, order: int = 0) -> int:
        """Find the folio of one order that `rank` others of it lie below: its pfn. Takes as long as `rank`.

        Raises: IndexError if there is none.
        """

    def to_roaring(self, order: int = 0, *, bits: int = 64, runs: bool = True) -> bytes:
        """Folio numbers (`pfn >> order`) of one order as a Roaring bitmap, in the portable format.

        Args:
            bits: 64 for what BitMap64, RoaringTreemap and Roaring64Map read, 32 for BitMap and RoaringBitmap.
            runs: store as runs what is shorter so, as run_optimize does.

        Raises: OutOfRangeError for a number beyond 32 bits; OrderError; ParameterError for other `bits`.
        Source: the Roaring format specification, "Standard 32-bit Roaring Bitmap", "Extension for 64-bit".

        """

    def update_roaring(self, data: Buffer, order: int = 0, *, bits: int = 64) -> int:
        """Mark the folios of one order whose numbers (`pfn >> order`) a Roaring bitmap holds, all or nothing.

        Time and memory are bounded by the numbers' containers: up to a bitmap or eight for each some 14 bytes of data.

        Returns: how many were not yet marked.
        Raises: ParameterError unless `data` is exactly one well-formed bitmap, OutOfRangeError, OrderError.
        """

    @staticmethod
    def from_roaring(
        data: Buffer, order: int = 0, *, bits: int = 64, page_size: int = 4096, bitmap_bytes: int | None = None
    ) -> Tracker:
        """Make a tracker from a Roaring bitmap, as `update_roaring` reads it."""

    def clear(self) -> None:
        """Unmark everything and give the bitmaps back."""

    def copy(self) -> Tracker: ...
    def stats(self) -> dict[int, dict[str, int]]:
        """Per order: folios, blocks, empty_blocks, bytes."""

    def isdisjoint(self, other: Tracker) -> bool: ...
    def issubset(self, other: Tracker) -> bool: ...
    def issuperset(self, other: Tracker) -> bool: ...
    def union_len(self, other: Tracker) -> int:
        """How many folios `self | other` has, without making it. Trackers of other page sizes have none in common."""

    def intersection_len(self, other: Tracker) -> int: ...
    def difference_len(self, other: Tracker) -> int: ...
    def symmetric_difference_len(self, other: Tracker) -> int: ...
    def __lt__(self, value: Tracker, /) -> bool: ...
    def __le__(self, value: Tracker, /) -> bool: ...
    def __gt__(self, value: Tracker, /) -> bool: ...
    def __ge__(self, value: Tracker, /) -> bool: ...
    def __contains__(self, key: int | tuple[int, int], /) -> bool:
        """Say whether `(pfn, order)`, or the order-0 folio `pfn`, is marked."""

    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (pfn, order) in the order of serialization: by order, then pfn."""

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
    """What `kho.Outgoing` is built upon.

    Bitmaps live in the arena's pages and are never copied. Dropped before `finalize`, it leaves nothing behind.
    """

    def __new__(
        cls,
        arena: Arena,
        abi: str = "kho-v1",
        *,
        bitmap_bytes: int | None = None,
        fdt_phys: int | None = None,
        map_phys: int | None = None,
    ) -> Outgoing:
        """Begin a handover; the FDT's page is allocated and preserved at once.

        Args:
            abi: the `compatible` to write.
            bitmap_bytes: kho-v1: 512 (Linux 6.16) or the page size (6.18 and later, default).
            fdt_phys, map_phys: free pages for the FDT and for the first node of the map, to write an image again
                address for address.

        Raises: UnsupportedAbiError, ParameterError, OutOfMemoryError, PageStateError.

        """

    def preserve_folio(self, folio: Folio | int, order: int | None = None) -> bool:
        """Preserve an allocated folio (kho_preserve_folio); True if it was not preserved before.

        Args: folio: a Folio, or its address. order: by default that of the folio allocated there.
        Raises: FinalizedError, ScratchOverlapError, PageStateError unless allocated, OutsideMemoryError,
            MisalignedError, OutOfMemoryError.
        """

    def unpreserve_folio(self, folio: Folio | int, order: int | None = None) -> bool:
        """Take a folio back (kho_unpreserve_folio); True if it was preserved.

        Raises: FinalizedError, MisalignedError; ParameterError for the pages of the FDT and the subtrees.
        """

    def preserve_many(self, phys: Buffer, order: int | Buffer = 0) -> int:
        """Preserve many allocated folios at once, all or none.

        Args:
            phys: their addresses, a buffer of 64-bit or 32-bit integers (numpy array, array.array, memoryview).
            order: one order for all, or a buffer of bytes with one for each.

        Returns: how many were not preserved before.  Raises: as `preserve_folio`, for the first in the list.

        """

    def preserve_run(self, phys: Folio | Pages | int, order: int, count: int) -> int:
        """Preserve `count` folios of one order side by side, all or none; how many were not preserved before.

        Raises: as `preserve_folio`.
        """

    def preserve_pages(self, phys: Folio | Pages | int, n: int) -> int:
        """Preserve `n` allocated pages in the kernel's greedy split, all or nothing (kho_preserve_pages).

        Returns: how many blocks were not preserved before.  Raises: as `preserve_folio`.
        """

    def unpreserve_pages(self, phys: Folio | Pages | int, n: int) -> int:
        """Take pages back in the same split; how many blocks were preserved (kho_unpreserve_pages)."""

    def preserve_all(self, tracker: Tracker) -> int:
        """Preserve what a tracker of the same page size holds, all or nothing; how many folios that added."""

    def add_subtree(self, name: str, blob: Buffer, *, phys: int | None = None) -> int:
        """Copy a producer's blob into preserved pages of its own, at `phys` if given; its address (kho_add_subtree).

        Raises: ExistsError; FdtError for a name no node can have or when the root FDT's page is full; FinalizedError;
            OutOfMemoryError; PageStateError.
        """

    def link_subtree(self, name: str, phys: int, size: int) -> None:
        """Add a subtree whose blob lies in the arena already; preserving it is the caller's business.

        Its pages cannot be freed until it is removed; the caller may write them.
        Raises: as `add_subtree`; OutsideMemoryError, ScratchOverlapError.
        """

    def _rewrite_subtree(self, name: str, blob: Buffer) -> None: ...
    def remove_subtree(self, name: str) -> None:
        """Remove a subtree and free the pages made for it (kho_remove_subtree).

        Raises: NotFoundError, FinalizedError.
        """

    def serialize(self) -> bytes:
        """Write the map and the FDT into the arena; the FDT's bytes.

        Bitmaps stay where they are; a chunk is exactly one page, with 255 entries at 4 KiB (ABI section 3).
        Raises: OutOfMemoryError; an earlier serialization is still in place then.
        """

    def finalize(self) -> int:
        """Serialize and close the handover; the FDT's address, also recorded in the arena (EBUSY for changes from now).

        Raises: FinalizedError the second time; OutOfMemoryError.
        """

    def abort(self) -> None:
        """Undo `finalize`. Raises: FinalizedError if there is nothing to undo."""

    def tracker(self) -> Tracker:
        """Copy what is preserved, the FDT and the subtrees included."""

    def folios(self) -> FolioArray: ...
    @property
    def arena(self) -> Arena: ...
    @property
    def abi(self) -> str: ...
    @property
    def bitmap_bytes(self) -> int | None: ...
    @property
    def fdt_phys(self) -> int: ...
    @property
    def finalized(self) -> bool: ...
    @property
    def nr_folios(self) -> int: ...
    @property
    def preserved_bytes(self) -> int: ...
    @property
    def subtrees(self) -> dict[str, tuple[int, int]]:
        """Name to (phys, size)."""

@final
class Incoming:
    """A handover that was read or taken over (kho_in): each folio is restored once."""

    def __new__(
        cls,
        memory: Arena | Memory,
        fdt_phys: int | None = None,
        *,
        page_size: int | None = None,
        bitmap_bytes: int | None = None,
        scratch: Sequence[tuple[int, int]] | None = None,
        max_page_order: int | None = None,
    ) -> Incoming:
        """Take over an arena, or read a memory.

        Taking over an arena is a kexec: what was allocated is gone, what was preserved stays reserved until it is
        restored, everything else outside scratch is free. An arena can also be read only, with `kho.open`.

        Args:
            fdt_phys: where the root FDT is; by default what the arena recorded, or where it is found.
            page_size, bitmap_bytes, scratch: override what is decided from evidence (ABI section 1).
            max_page_order: refuse to restore folios of a larger order, as Linux before 7.x does.

        Raises: NoHandoverError, UnsupportedAbiError, FormatError, OutsideMemoryError.

        """

    def restore_folio(self, phys: Folio | int) -> Folio:
        """Restore the folio whose head is at `phys`, once (kho_restore_folio).

        Raises: NotRestorableError for what is no preserved folio's head or was restored; StaleError.
        """

    def restore_many(self, phys: Buffer) -> bytes:
        """Restore the folios whose heads are at many addresses, all or none. In an arena they are allocated then.

        Args: phys: a buffer of 64-bit or 32-bit integers (numpy array, array.array, memoryview).
        Returns: their orders, a byte each.
        Raises: as `restore_folio`, for the first that cannot be restored; one that stands there twice cannot.

        """

    def restore_pages(self, phys: Folio | Pages | int, n: int) -> Pages:
        """Restore `n` pages that were preserved as a range, all or none (kho_restore_pages). Raises: as above."""

    def stats(self) -> dict[str, int]:
        """What the map costs.

        Returns: blocks: bitmaps, the empty ones too; map_bytes: bytes of chunks and bitmaps, or of the tree's nodes;
            in_place_bytes: those of its bitmaps that are used where they lie; held_bytes: bytes held beside the map.

        """

    def retrieve_subtree(self, name: str) -> Subtree:
        """Find a producer's blob (kho_retrieve_subtree). Raises: NotFoundError; FormatError for a malformed node."""

    def read(self, phys: int, n: int) -> bytes:
        """Copy `n` bytes of the memory. Raises: OutsideMemoryError."""

    def preserves(self, phys: int, order: int) -> bool:
        """Say whether the folio of this order at `phys` was preserved."""

    def order_at(self, phys: int) -> int | None:
        """Give the order of the largest preserved folio that begins at `phys`; None without one."""

    def next_to_read(self, phys: int, nbytes: int) -> tuple[int, int] | None:
        """Find what may read as something other than zeros, or not at all, in `nbytes` from `phys`: (phys, size)."""

    def has(self, phys: int, nbytes: int) -> bool:
        """Say whether `nbytes` from `phys` are in this memory."""

    def room(self, what: str) -> int:
        """Give a limit that goes with the bytes of the files that are read, not with what their headers claim.

        Args: what: `held` (the bytes of the files), `items` (of a list or report), `objects` (sessions, files,
            regions), `fdt_bytes` (of devicetrees of subtrees), `contents` (bytes of contents worth reading).
        """

    def unrestored(self) -> FolioArray:
        """List the folios nobody restored."""

    def tracker(self) -> Tracker:
        """Copy what was preserved."""

    @property
    def folios(self) -> FolioArray:
        """Every preserved folio, sorted by address."""

    @property
    def compatible(self) -> str: ...
    @property
    def kernels(self) -> str:
        """Which kernels write that ABI."""

    @property
    def page_size(self) -> int: ...
    @property
    def page_size_why(self) -> str: ...
    @property
    def bitmap_bytes(self) -> int | None: ...
    @property
    def bitmap_bytes_why(self) -> str | None: ...
    @property
    def certainty(self) -> str:
        """How sure the layout is: given, certain, likely, guess."""

    @property
    def fdt(self) -> Fdt: ...
    @property
    def fdt_phys(self) -> int: ...
    @property
    def preserved_memory_map(self) -> int:
        """Address of the map's first node."""

    @property
    def nr_folios(self) -> int: ...
    @property
    def nr_restored(self) -> int: ...
    @property
    def preserved_bytes(self) -> int: ...
    @property
    def folios_by_order(self) -> dict[int, int]: ...
    @property
    def metadata_pages(self) -> int:
        """Pages that hold the map."""

    @property
    def map_pages(self) -> list[int]:
        """Addresses of these pages, ascending."""

    @property
    def address(self) -> Literal["own", "named", "assumed", "solved"]:
        """Where the memory's addresses are from.

        own: the source says them itself, as an ELF core does, or is no file. Of a raw image, named: its name says them;
        assumed: it was named without an address and is read at 0; solved: it is read at another, `placement`.
        """

    @property
    def placement(self) -> Placement | None:
        """Where a raw image was read; None if that is where it was named."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """`(phys, size)` of each run of the memory, ascending."""

    def next_data(self, phys: int) -> tuple[int, int] | None:
        """Find the first run at or behind `phys` that may hold something other than zeros: (phys, size)."""

    @property
    def machine(self) -> str | None:
        """The machine of an ELF core, as `Memory.machine`."""

    def save(self, path: str | PathLike[str], *, everything: bool = False) -> None:
        """Write the handover as an ELF core; see `kho.Image.save`. Raises: SourceError."""

    @property
    def map_nodes(self) -> list[tuple[int, int]]:
        """`(phys, nbytes)` of the map itself, ascending: chunks and bitmaps, or the tree's nodes."""

    @property
    def pages_outside(self) -> int:
        """Preserved pages that this memory does not have."""

    @property
    def scratch(self) -> list[tuple[int, int]] | None:
        """`(addr, size)` of the scratch areas; None if not known."""

    @property
    def scratch_phys(self) -> int | None:
        """Where the array of these areas lies; None if not known."""

    @property
    def others(self) -> list[int]:
        """Addresses of other handovers' FDTs in the same memory."""

    @property
    def subtrees(self) -> dict[str, Subtree]: ...
    @property
    def payloads(self) -> dict[str, Payload]:
        """Every subtree's payload, decoded anew: what nobody has a decoder for is `Raw`, what is refused `Broken`."""

    @property
    def luo(self) -> Luo:
        """The live update orchestrator: `inc.luo.sessions["vm-1"].files[0x10].read()`.

        Raises: NotFoundError without it; FormatError if it cannot be decoded.
        """

    @property
    def metadata(self) -> Metadata:
        """The chain of kexecs: `inc.metadata.previous_release`. Raises: as `luo`."""

    @property
    def reserve_mem(self) -> dict[str, Region]:
        """`reserve_mem=` regions by name. Raises: FormatError if their subtree cannot be decoded."""

    @property
    def malformed_subtrees(self) -> dict[str, str]:
        """Names of nodes that are no valid subtree, with the reason."""

@final
class Subtree:
    """A producer's blob."""

    @property
    def name(self) -> str: ...
    @property
    def phys(self) -> int: ...
    @property
    def size(self) -> int | None:
        """Bytes; None if neither the root nor the blob says."""

    def read(self) -> bytes:
        """Copy the blob. Raises: ParameterError without a size; OutsideMemoryError."""

    def fdt(self) -> Fdt:
        """Read the blob as a devicetree. Raises: FdtError."""

@final
class Vmalloc:
    """A preserved vmalloc area: a list of blocks of pages (`struct kho_vmalloc`, ABI section 6)."""

    def __new__(cls, inc: Incoming, descriptor: bytes, owner: int | None = None) -> Vmalloc:
        """Follow the list that a `struct kho_vmalloc` describes.

        Args: descriptor: the 16 bytes of the struct. owner: an address that tells lists apart; a chunk or block that
            was read for another owner is refused, since no two lists share one.
        Raises: FormatError for a chunk that is unaligned, outside memory, cyclic or shared, and for more blocks than an
            image of this size has room for; ParameterError.
        """

    @property
    def first(self) -> int: ...
    @property
    def total_pages(self) -> int:
        """Pages the descriptor says there are; `nr_pages` is what the list names."""

    @property
    def flags(self) -> int:
        """1 = VM_ALLOC, 2 = huge mappings."""

    @property
    def order(self) -> int:
        """Each block is `1 << order` pages."""

    @property
    def nr_pages(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def nr_blocks(self) -> int:
        """How many `blocks` there are."""

    @property
    def chunks(self) -> list[int]:
        """Addresses of the pages that hold the list."""

    @property
    def blocks(self) -> list[int]:
        """Addresses of the area's blocks, in its order."""

    def read(self, n: int, offset: int = 0) -> bytes:
        """Copy `n` bytes of the area. Raises: OutOfRangeError behind its end; OutsideMemoryError."""

    def records(self, size: int, most: int) -> bytes:
        """Copy records of `size` bytes, at most `most`, up to the first that is all zeros."""

@final
class Memfd:
    """A preserved memfd as it lies in memory (`struct memfd_luo_ser`, ABI section 6)."""

    def __new__(cls, inc: Incoming, phys: int, version: int) -> Memfd:
        """Read the structure at `phys` and its folio list; `version` is 1 or 2.

        Raises: OutsideMemoryError; FormatError for a list that cannot be followed; ParameterError.
        """

    @property
    def phys(self) -> int: ...
    @property
    def pos(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def seals(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def nr_folios(self) -> int:
        """Folios the structure says there are; `nr_listed` is what the list holds."""

    @property
    def nr_listed(self) -> int:
        """Folios that the list holds: `len(folios)`, without making them."""

    def memory_runs(self, most: int) -> builtins.list[tuple[int, int]]:
        """Give the folios' memory by address as `(phys, nbytes)`, neighbors joined; at most `most` of these runs."""

    @property
    def folios(self) -> builtins.list[MemfdFolio]: ...
    @property
    def list(self) -> Vmalloc: ...
    @property
    def extents(self) -> builtins.list[tuple[int, int, int]]:
        """`(offset, phys, nbytes)` of what is data, by offset; the rest of the file is zeros."""

    @property
    def data(self) -> RunArray:
        """`(offset, nbytes)` of what is data, by offset, neighbors joined."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the file that are data."""

    def next_to_read(self, offset: int, end: int) -> tuple[int, int] | None:
        """Find what may read as something other than zeros, or not at all, in `offset` to `end`: (offset, nbytes)."""

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`, fewer at the end; all that follow without `n`. Raises: OutsideMemoryError."""

def open_memory(
    memory: Memory | Arena,
    *,
    fdt_phys: int | None = None,
    page_size: int | None = None,
    bitmap_bytes: int | None = None,
    scratch: Sequence[tuple[int, int]] | None = None,
    max_page_order: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Incoming:
    """Read the handover in a memory or arena without changing anything; see `kho.open`."""

@final
class Fdt:
    """A flattened devicetree, read from any buffer of bytes (Devicetree Specification 0.4, chapter 5)."""

    def __new__(cls, blob: Buffer) -> Fdt:
        """Read a blob; what lies behind its `totalsize` is neither read nor kept.

        Raises: FdtError with the offset of the first thing that is wrong.
        """

    @staticmethod
    def partial(blob: Buffer) -> tuple[Fdt, FdtError | None]:
        """Read what can be read, with the error that `Fdt(blob)` would raise.

        Nodes and properties come in order up to where the blob breaks. Properties whose names are cut off are in
        `raw_properties`: Linux 7.x shows its `out/fdt` in debugfs without the strings.

        Raises: FdtError if this is no header at all (length, magic, version).
        """

    @property
    def root(self) -> FdtNode:
        """The node `/`. Raises: NotFoundError if a partial read did not come as far."""

    @property
    def totalsize(self) -> int:
        """Bytes according to the header; more than `bytes(fdt)` has if the blob is cut short."""

    @property
    def version(self) -> int:
        """17, or 16 of old."""

    @property
    def boot_cpuid(self) -> int: ...
    @property
    def reservations(self) -> list[tuple[int, int]]:
        """The memory reservation map: (address, size) in bytes. Empty in a handover."""

    def walk(self) -> list[FdtNode]:
        """Every node, parents before children, in the blob's order."""

    def __getitem__(self, path: str, /) -> FdtNode:
        """The node at a path such as "/data". Raises: NotFoundError."""

    def __contains__(self, path: str, /) -> bool: ...
    def __bytes__(self) -> bytes: ...

@final
class FdtNode:
    """A node of an `Fdt`, which it keeps alive. Equal to the same node of the same tree."""

    @property
    def name(self) -> builtins.str:
        """Empty for the root; U+FFFD where a partial read let an unprintable name pass."""

    @property
    def path(self) -> builtins.str: ...
    @property
    def offset(self) -> int:
        """Where in the blob its token stands, in bytes."""

    @property
    def parent(self) -> FdtNode | None: ...
    @property
    def children(self) -> list[FdtNode]: ...
    @property
    def properties(self) -> dict[builtins.str, bytes]:
        """The properties in order, by name; of two with one name the first, as libfdt takes it."""

    @property
    def raw_properties(self) -> list[tuple[builtins.str | None, int, bytes]]:
        """Every property in order: name (None if it is not there to read), its offset in the strings, value."""

    def some_properties(self, first: int, most: int) -> list[tuple[str | None, int, bytes]]:
        """Give at most `most` of `raw_properties`, from number `first` on."""

    def u32(self, name: builtins.str) -> int:
        """A property of 4 bytes, native-endian. Raises: NotFoundError, FdtError for another length."""

    def u64(self, name: builtins.str) -> int:
        """A property of 8 bytes, native-endian. Raises: NotFoundError, FdtError for another length."""

    def str(self, name: builtins.str) -> builtins.str:
        """A NUL-terminated string, without its NUL. Raises: NotFoundError, FdtError if it is not exactly one."""

    def strings(self, name: builtins.str) -> list[builtins.str]:
        """NUL-terminated strings, one behind the other. Raises: NotFoundError, FdtError if the last has no NUL."""

    def node(self, name: builtins.str) -> FdtNode:
        """The first child of exactly that name. Raises: NotFoundError."""

    def __getitem__(self, name: builtins.str, /) -> bytes:
        """The value of a property. Raises: NotFoundError."""

    def __contains__(self, name: builtins.str, /) -> bool:
        """Whether there is a property of that name."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class FdtPlaceholder:
    """A property whose value is given later."""

    def fill(self, value: Buffer) -> None:
        """Give the value; again, if need be. Raises: FdtError unless it has the length reserved, or once finished."""

    def fill_u64(self, value: int) -> None:
        """Give 8 bytes, native-endian. Raises: FdtError, OverflowError."""

@final
class FdtNodeBlock:
    """What `FdtWriter.node` returns, for `with`."""

    def __enter__(self) -> FdtWriter: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> bool: ...

@final
class FdtWriter:
    """libfdt's sequential writer (scripts/dtc/libfdt/fdt_sw.c), byte for byte.

    Every method raises FdtError when called out of order or when `capacity` bytes do not suffice; a call that fails
    changes nothing. Properties go before subnodes, since no reader looks behind those.
    """

    def __new__(cls, capacity: int = 4096) -> FdtWriter:
        """An empty tree for a buffer of `capacity` bytes; a handover's root has a page."""

    @property
    def capacity(self) -> int: ...
    def add_reservemap_entry(self, address: int, size: int) -> None:
        """Add to the memory reservation map, before the root node."""

    def begin_node(self, name: str = "") -> None:
        """Begin a node: the root with no name, then its descendants, 64 deep at most."""

    def end_node(self) -> None: ...
    def node(self, name: str = "") -> FdtNodeBlock:
        """`with writer.node(name):` begins the node and ends it."""

    def property(self, name: str, value: Buffer) -> None:
        """Add a property to the open node."""

    def property_u32(self, name: str, value: int) -> None:
        """Add 4 bytes, native-endian. Raises: OverflowError."""

    def property_u64(self, name: str, value: int) -> None:
        """Add 8 bytes, native-endian. Raises: OverflowError."""

    def property_str(self, name: str, text: str) -> None:
        """Add a string and its NUL."""

    def placeholder(self, name: str, length: int) -> FdtPlaceholder:
        """Add `length` zero bytes to be filled before `finish`."""

    def finish(self) -> bytes:
        """The blob; the writer takes nothing more. Raises: FdtError while a node is open or before the root."""

@final
class Snapshot:
    """What a kernel shows of its handover in debugfs: FDTs and scratch areas, no memory (kexec_handover_debugfs.c)."""

    @staticmethod
    def open(source: str | PathLike[str]) -> Snapshot:
        """Read a directory, an FDT, or the running machine.

        Args: source: debugfs' `kho` directory, a directory that has it at `sys/kernel/debug/kho` (and `proc/iomem`,
        `proc/cmdline`, `proc/version`, which may be missing), the file of one root FDT, or the string "live".
        Raises: SourceError with the path of what is missing, unreadable, no regular file, over 1 MiB, or a link out of
        the directory; FdtError, FormatError for a file that is no handover's FDT.
        """
    @staticmethod
    def recognizes(source: str | PathLike[str]) -> bool:
        """Whether this is for `open`, not an image of memory: "live", a directory, a file that starts as an FDT."""
    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> str:
        """What it was: "live", "root", "debugfs" or "fdt"."""
    @property
    def incoming(self) -> SnapshotSide | None:
        """What this kernel was handed; None if nothing."""
    @property
    def outgoing(self) -> SnapshotSide | None:
        """What it will hand over, so far; of a single FDT, whichever it was."""
    @property
    def scratch(self) -> list[tuple[int, int]] | None:
        """(addr, size) in bytes: low memory, global, one per NUMA node."""
    @property
    def finalized(self) -> bool | None:
        """`out/finalize`, which Linux 6.16 to 6.18 have."""
    @property
    def ram(self) -> list[tuple[int, int]] | None:
        """(phys, size) of System RAM; None if /proc/iomem is not there or hides its addresses from who is not root."""
    @property
    def cmdline(self) -> str | None: ...
    @property
    def version(self) -> str | None:
        """/proc/version."""

@final
class SnapshotSide:
    """One direction of a handover, as debugfs shows it."""

    @property
    def fdt(self) -> bytes | None:
        """The root FDT; None before one is finalized (Linux 6.16 to 6.18)."""
    @property
    def compatible(self) -> str | None:
        """As "kho-v4"; known even where Linux 7.x cut the FDT short."""
    @property
    def preserved_memory_map(self) -> int | None:
        """Physical address of the map; known even where Linux 7.x cut the FDT short."""
    @property
    def truncated(self) -> tuple[int, int] | None:
        """(bytes according to the header, bytes there are) of an FDT that is cut short; None if it is whole."""
    @property
    def problem(self) -> str | None:
        """What is wrong with the FDT."""
    @property
    def sub_fdts(self) -> dict[str, bytes]:
        """The blobs of the producers, by name."""

@final
class OwnerRows:
    """Ranges of pages with their owners, by address; made as they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> OwnedRange: ...

def find_memory(
    memory: Memory | Arena, progress: Callable[[int], object] | None = None
) -> tuple[list[int], list[tuple[int, int, int]], list[tuple[int, list[tuple[int, int]]]]]:
    """Where handovers are in a memory, whether or not they can be read.

    Returns: addresses of root FDTs; (FDT, scratch array, its bytes) that a kernel was told of; pages that can be
        scratch arrays, with the (address, size) they would hold.
    """

def check_map(inc: Incoming, nodes: Sequence[tuple[int, int, int]] = ..., most: int = 16) -> dict[str, Any]:
    """Check a map by runs: against itself, its memory, scratch, and NUMA nodes given as (start, size, node).

    Returns: `overlapping`, `in_scratch`, `outside`, `nodes_in_scratch`, `nodes_preserved`, `spanning`: (how many
        places, [(phys, pages, order, other)] of the first `most`); `empty`: [(order, empty bitmaps, bitmaps)].
    """

def check_memfd_folios(
    inc: Incoming, memfd: Memfd, most: int = 16
) -> dict[str, tuple[int, builtins.list[tuple[int, int]]]]:
    """Check a memfd's list of folios.

    Returns: `duplicated`, `beyond`, `interior`, `nowhere`: (how many, [(place in the file in pages, phys)] of the
        first); `listed`: how many folios the list holds.
    """

def join_owners(
    inc: Incoming,
    names: Sequence[tuple[str, str]],
    claims: Sequence[tuple[int, int, tuple[int, int] | Vmalloc | Memfd]],
) -> dict[str, Any]:
    """Join what is claimed with what is preserved; see `kho.owners`.

    Args: names: (owner, what). claims: (index of a name, index of the name for an area's own list, memory).
    Returns: `rows`, `unowned`, `unpreserved` (OwnerRows); `shared`: [(phys, nbytes, name, name)]; `totals`: bytes by
        name; `unowned_bytes`; `more_unpreserved`, `more_shared`: how many of these are not listed.
    """
