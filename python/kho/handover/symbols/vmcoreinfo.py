"""VMCOREINFO, a kernel's description of itself in a dump or in memory: symbols, numbers, offsets.

The kernel writes it as text at boot (kernel/vmcore_info.c). Dumps have it as a note; in a raw image it is found as the
page that begins with `OSRELEASE=`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ... import errors

__all__ = ["Readable", "Vmcoreinfo"]

ENDS = 1 << 64
MOST_BYTES = 65536
"""Bytes of the longest text: VMCOREINFO_BYTES is a page."""


class Readable(Protocol):
    """Physical memory: `kho.Incoming`, `kho.Memory`."""

    def read(self, phys: int, n: int, /) -> bytes:
        """Copy `n` bytes at `phys`. Raises: KhoError."""

    def vmcoreinfo(self, name: str, /) -> str | None:
        """Return the value of a line of the dump's note."""

    @property
    def machine(self) -> str | None:
        """The machine that the source names."""


@dataclass(frozen=True)
class Vmcoreinfo:
    """The lines of one VMCOREINFO."""

    value: Callable[[str], str | None]
    """Returns the value of a line, by name; None if absent."""
    phys: int | None = None
    """Where the text was found; None for a note."""

    @classmethod
    def at(cls, memory: Readable, phys: int) -> Vmcoreinfo:
        """Read the text that begins at a page. Raises: KhoError if it cannot be read."""
        raw = b""
        while len(raw) < MOST_BYTES and b"\0" not in raw:
            try:
                raw += memory.read(phys + len(raw), 4096)
            except errors.KhoError:
                if not raw:
                    raise
                break
        lines = raw.split(b"\0")[0].decode("latin-1").splitlines()
        values = dict(reversed([line.partition("=")[::2] for line in lines if "=" in line]))
        return cls(values.get, phys)

    @property
    def release(self) -> str | None:
        """OSRELEASE, as in "7.3.4"."""
        return self.value("OSRELEASE")

    def number(self, name: str) -> int | None:
        """Return `NUMBER(name)`; None if absent or malformed."""
        return _number(self.value(f"NUMBER({name})"))

    def symbol(self, name: str) -> int | None:
        """Return `SYMBOL(name)`, a virtual address; None if absent or malformed."""
        return _hexadecimal(self.value(f"SYMBOL({name})"))

    def symbol_value(self, name: str) -> int:
        """Return `SYMBOL(name)`. Raises: FormatError if absent."""
        found = self.symbol(name)
        if found is None:
            raise errors.FormatError(f"VMCOREINFO: no SYMBOL({name})")
        return found

    def offset(self, name: str) -> int | None:
        """Return `OFFSET(name)`, bytes in a structure; None if absent or malformed."""
        return _number(self.value(f"OFFSET({name})"))

    def size(self, name: str) -> int | None:
        """Return `SIZE(name)`, bytes of a structure; None if absent or malformed."""
        return _number(self.value(f"SIZE({name})"))

    @property
    def page_size(self) -> int | None:
        """PAGESIZE; None if it is no page size."""
        found = _number(self.value("PAGESIZE"))
        return found if found in (4096, 16384, 65536) else None


def _number(text: str | None) -> int | None:
    """Parse a decimal number, or a hexadecimal one with 0x."""
    try:
        found = int(text or "", 16 if (text or "").lstrip("-").startswith("0x") else 10)
    except ValueError:
        return None
    return found if -(ENDS >> 1) <= found < ENDS else None


def _hexadecimal(text: str | None) -> int | None:
    try:
        found = int(text or "", 16)
    except ValueError:
        return None
    return found if 0 <= found < ENDS else None
