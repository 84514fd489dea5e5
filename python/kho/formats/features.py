"""Feature headers, a draft that competes with version strings (abi.md section 9).

128 bytes stand first in LUO's structure and in that of a memfd: `{ u64 supp, req, active, reserved[13]; }`, words of
bits that the writer supports, that a reader must know, and that are in use. A reader refuses bits of `req` that it does
not know.

>>> str(Features(supp=0b111, req=0b1, active=0b11, names=("NUMBER", "SESSIONS", "FLBS")))
'supports NUMBER, SESSIONS, FLBS; requires NUMBER; uses NUMBER, SESSIONS'
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

__all__ = ["HEADER", "LUO_BITS", "MEMFD_BITS", "Features", "is_header"]

HEADER = struct.Struct("<QQQ104s")
"""`{ u64 supp, req, active, reserved[13]; }`"""
LUO_BITS = ("NUMBER", "SESSIONS", "FLBS")
"""Names of the bits of LUO's header, from bit 0 on."""
MEMFD_BITS = ("SEALS", "FOLIOS")
"""Names of the bits of a memfd's header."""


def is_header(data: bytes) -> bool:
    """Whether a structure begins with a feature header: some feature is supported, and the reserved words are 0."""
    if len(data) < HEADER.size:
        return False
    supp, _, _, reserved = HEADER.unpack_from(data)
    return bool(supp) and not any(reserved)


class Features(NamedTuple):
    """A feature header that was read, or is to be written."""

    supp: int
    """Bits that the writer supports."""
    req: int
    """Bits that a reader must know."""
    active: int
    """Bits in use."""
    names: tuple[str, ...]
    """Names of the bits that are known."""
    reserved: bytes = bytes(104)

    @classmethod
    def of(cls, data: bytes, names: tuple[str, ...]) -> Features:
        """Read a header from the first 128 bytes of a structure. Raises: ValueError, which says why it is refused."""
        supp, req, active, reserved = HEADER.unpack_from(data)
        found = cls(supp, req, active, names, reserved)
        known = ", ".join(f"{name} (bit {bit})" for bit, name in enumerate(names))
        if unknown := req >> len(names) << len(names):
            raise ValueError(f"required features are not known: {', '.join(found.listed(unknown))}; known are {known}")
        if req & ~supp:
            raise ValueError(f"features are required but not supported: {', '.join(found.listed(req & ~supp))}")
        if active & ~supp:
            raise ValueError(f"features are active but not supported: {', '.join(found.listed(active & ~supp))}")
        return found

    @classmethod
    def all_of(cls, names: tuple[str, ...]) -> Features:
        """Return the header of a writer that supports, requires and uses every known feature."""
        every = (1 << len(names)) - 1
        return cls(every, every, every, names)

    def pack(self) -> bytes:
        """Return the 128 bytes."""
        return HEADER.pack(self.supp, self.req, self.active, self.reserved)

    def has(self, name: str) -> bool:
        """Whether a feature is in use."""
        return bool(self.active >> self.names.index(name) & 1)

    def listed(self, bits: int) -> list[str]:
        """Name the bits of a word: `SEALS`, `bit 7` for one that is not known."""
        return [
            self.names[bit] if bit < len(self.names) else f"bit {bit}"
            for bit in range(bits.bit_length())
            if bits >> bit & 1
        ]

    def unknown(self) -> list[str]:
        """List what is not known of the header, as text: bits that are not required, reserved words."""
        found = []
        for what, bits in (("supported", self.supp), ("active", self.active)):
            if unknown := bits >> len(self.names) << len(self.names):
                found.append(f"{what} features are not known: {', '.join(self.listed(unknown))}")
        if any(self.reserved):
            found.append("reserved words of the feature header are not 0")
        return found

    def describe(self) -> dict[str, Any]:
        """Return the bits by name, for JSON."""
        words = {"supported": self.supp, "required": self.req, "active": self.active}
        return {what: self.listed(bits) for what, bits in words.items()}

    def __str__(self) -> str:
        """Format the bits by name."""
        words = (("supports", self.supp), ("requires", self.req), ("uses", self.active))
        return "; ".join(f"{what} {', '.join(self.listed(bits)) or 'nothing'}" for what, bits in words)
