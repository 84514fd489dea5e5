import builtins
from types import TracebackType
from typing import final

from typing_extensions import Buffer

from kho.errors import FdtError

__all__ = ["Fdt", "FdtNode", "FdtNodeBlock", "FdtPlaceholder", "FdtWriter", "__version__"]

__version__: str

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
