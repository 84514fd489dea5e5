"""The compiled half of kho; import `kho`, not this."""

import builtins
from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import final

from typing_extensions import Buffer

from .errors import FdtError

__all__ = ["Fdt", "FdtNode", "FdtNodeBlock", "FdtPlaceholder", "FdtWriter", "__version__"]

__version__: str

def kho_is_enabled(cmdline: str, default: bool = False) -> bool:
    """Whether the kernel has KHO on after this command line (`kho=`, read with kstrtobool).

    The last well-formed occurrence wins; a malformed one, or `kho` without a value, changes nothing.

    Args: cmdline: as in /proc/cmdline. default: CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT.
    """

def kho_scratch_of(cmdline: str) -> str | None:
    """The value of the last `kho_scratch=` on a command line, well-formed or not, without its quotes; None if there is none."""

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
    def open(*sources: str | PathLike[str]) -> Memory:
        """Open files as one memory.

        Args: sources: a str is `FILE`, `FILE@ADDRESS`, `FILE@ADDRESS,offset=N,size=N` (numbers decimal or 0x, with a
        suffix K, M, G or T) or `FILE,machine=q35|pc|virt` (QEMU's memory backend), or the name of an existing file
        whatever is in it; a Path is a path. A file without an address is what its content says: an ELF core, a kdump
        file, flattened or not, LiME, or else the memory at 0.
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
    """What a kernel shows of its handover in debugfs (kexec_handover_debugfs.c): FDTs and scratch areas, no memory."""

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
        """Whether this is for `open` and no image of memory: "live", a directory, or a file that starts as an FDT."""
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
