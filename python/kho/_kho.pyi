"""The compiled half of kho."""

from collections.abc import Sequence
from os import PathLike
from typing import final

__all__ = ["Memory", "ScratchSpec", "__version__", "kho_is_enabled", "kho_scratch_of", "parse_kho_scratch"]

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

        Args: sources: a str is `FILE`, `FILE@ADDRESS` or `FILE@ADDRESS,offset=N,size=N` (numbers decimal or 0x, with a
        suffix K, M, G or T), or the name of an existing file whatever is in it; a Path is a path. Without an address
        an ELF core is read by its physical addresses, any other file as the memory at 0.
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
        """The machine the first ELF core names: "x86_64", "aarch64" or "machine N"; None without a core."""
    @property
    def sources(self) -> list[str]:
        """What was opened, in the order given; empty for byte strings."""
    @property
    def truncated(self) -> list[tuple[str, int, int]]:
        """(path, phys, size) of what an ELF core that is cut short claims and does not have: reading it fails."""
