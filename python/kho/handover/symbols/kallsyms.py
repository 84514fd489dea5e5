"""The kernel's own table of symbols (kernel/kallsyms.c), read from its memory.

Names are compressed with a table of 256 tokens. The address of a symbol is that of its entry plus a signed offset, or
`kallsyms_relative_base` plus an unsigned one where VMCOREINFO names that base (Linux 6.16 to 6.19). VMCOREINFO names
the tables, but two: `kallsyms_markers`, where each 256th name begins, lies right before the tokens, and
`kallsyms_seqs_of_names`, the order of names, after the offsets. With these a name is found as the kernel finds it, in a
few pages; without, all names are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from ... import errors
from .space import AddressSpace

__all__ = ["Kallsyms"]

MOST_SYMBOLS = 1 << 21
"""Symbols that are read at most: a distribution's kernel has some 200000."""
MOST_NAMES = 16 << 20
"""Bytes of compressed names that are read at most."""
MOST_NAME = 1024
"""Bytes of the longest name: KSYM_NAME_LEN is 512."""
MOST_PAGES = 4096
"""Pages of the tables that are kept."""
GROUP = 256
"""Names after each marker."""
CHUNK = 4096


class Kallsyms:
    """Addresses of symbols by name."""

    def __init__(self, space: AddressSpace) -> None:
        """Read the tokens. Raises: FormatError if the tables are malformed; KhoError if they cannot be read."""
        self._space = space
        info = space.info
        self._names = info.symbol_value("kallsyms_names")
        self._offsets = info.symbol_value("kallsyms_offsets")
        self._tokens_at = info.symbol_value("kallsyms_token_table")
        self._base_at = info.symbol("kallsyms_relative_base")
        self.count = int.from_bytes(space.read_image(info.symbol_value("kallsyms_num_syms"), 4), "little")
        if not 0 < self.count <= MOST_SYMBOLS:
            raise errors.FormatError(f"kallsyms_num_syms: {self.count} symbols, of at most {MOST_SYMBOLS}")
        raw = space.read_image(info.symbol_value("kallsyms_token_index"), 512)
        index = struct.unpack("<256H", raw)
        table = space.read_image(self._tokens_at, max(index) + 1)
        while b"\0" not in table[max(index) :]:
            if len(table) > max(index) + MOST_NAME:
                raise errors.FormatError("kallsyms_token_table: the last token does not end")
            table += space.read_image(self._tokens_at + len(table), 16)
        self.tokens = [table[at : table.index(b"\0", at)] for at in index]
        if max(map(len, self.tokens)) > MOST_NAME:
            raise errors.FormatError("kallsyms_token_table: a token is longer than a name")
        self._base = 0
        if self._base_at is not None:
            self._base = int.from_bytes(space.read_image(self._base_at, 8), "little")
        self._pages: dict[int, bytes] = {}

    def find(self, names: Iterable[str]) -> dict[str, int]:
        """Look up symbols; return the addresses of those that there are.

        Raises: FormatError if the tables are malformed; KhoError if they cannot be read.
        """
        wanted = list(names)
        # VMCOREINFO names these, too: if the search finds them, the two tables are where they were looked for.
        known = ("init_uts_ns", "_stext")
        try:
            if all(self._search(name) == self._space.info.symbol(name) for name in known):
                return {name: at for name in wanted if (at := self._search(name)) is not None}
        except errors.MissingMemoryError:
            raise
        except (errors.FormatError, errors.OutsideMemoryError):
            pass
        found = self._scan({*wanted, known[0]})
        told = self._space.info.symbol_value(known[0])
        at = found.get(known[0], told)
        if at != told:
            raise errors.FormatError(f"kallsyms: {known[0]} at {at:#x}, and VMCOREINFO names {told:#x}")
        return {name: found[name] for name in wanted if name in found}

    def address(self, index: int) -> int:
        """Return the address of the symbol with a number, in the order of addresses."""
        at = self._offsets + 4 * index
        raw = self._bytes(at, 4)
        if self._base_at is not None:
            return (self._base + int.from_bytes(raw, "little")) % (1 << 64)
        return (at + int.from_bytes(raw, "little", signed=True)) % (1 << 64)

    def _search(self, name: str) -> int | None:
        """Find a name by bisection, as kallsyms_lookup_names does."""
        wanted = name.encode()
        markers = -(-self.count // GROUP) * 4
        if self._base_at is None:
            self._markers, seqs = self._tokens_at - markers, self._offsets + 4 * self.count
        else:
            # Up to Linux 7.0 each table begins at a multiple of 8.
            self._markers, seqs = self._tokens_at - -(-markers // 8) * 8, self._base_at + 8
        low, high = 0, self.count - 1
        while low <= high:
            middle = (low + high) // 2
            seq = int.from_bytes(self._bytes(seqs + 3 * middle, 3), "big")
            if seq >= self.count:
                raise errors.FormatError(f"kallsyms_seqs_of_names[{middle}]: {seq} of {self.count}")
            found = self._name(seq)
            if found == wanted:
                return self.address(seq)
            low, high = (middle + 1, high) if found < wanted else (low, middle - 1)
        return None

    def _name(self, seq: int) -> bytes:
        """Return the name of the symbol with a number, without its type."""
        marker = int.from_bytes(self._bytes(self._markers + seq // GROUP * 4, 4), "little")
        if marker > MOST_NAMES:
            raise errors.FormatError(f"kallsyms_markers[{seq // GROUP}]: {marker:#x}")
        at = self._names + marker
        for _ in range(seq % GROUP):
            head, n = self._length(at)
            at += head + n
        head, n = self._length(at)
        return self.expand(self._bytes(at + head, n))

    def _length(self, at: int) -> tuple[int, int]:
        """Return the bytes of a name's length, and the length: 7 bits, or 15 if the highest bit of the first is set."""
        first = self._bytes(at, 1)[0]
        if not first & 0x80:
            return 1, first
        return 2, first & 0x7F | self._bytes(at + 1, 1)[0] << 7

    def expand(self, packed: bytes) -> bytes:
        """Expand a compressed name, without its type."""
        name = b""
        for byte in packed:
            name += self.tokens[byte]
            if len(name) > MOST_NAME:
                raise errors.FormatError(f"kallsyms_names: a name of more than {MOST_NAME} bytes: {name[:32]!r}")
        return name[1:]

    def _scan(self, wanted: set[str]) -> dict[str, int]:
        """Read names one after the other, until all were found."""
        left = {name.encode(): name for name in wanted}
        # A name is expanded only if its first token can begin one of those that are looked for.
        first = [
            any(name.startswith(token[1:]) or token[1:].startswith(name) for name in left) for token in self.tokens
        ]
        found: dict[str, int] = {}
        data, start, at = b"", 0, 0
        for seq in range(self.count):
            if at + 2 * MOST_NAME > len(data):
                start, data, at = start + at, data[at:], 0
                if start > MOST_NAMES:
                    raise errors.FormatError(f"kallsyms_names: more than {MOST_NAMES:#x} bytes")
                data += self._ahead(self._names + start + len(data))
            if at + 2 > len(data):
                raise errors.OutsideMemoryError(f"kallsyms_names: cut off at symbol {seq} of {self.count}")
            n = data[at]
            at += 1
            if n & 0x80:
                n = n & 0x7F | data[at] << 7
                at += 1
            if n and at < len(data) and first[data[at]]:
                name = self.expand(data[at : at + n])
                if name in left:
                    found.setdefault(left[name], self.address(seq))
                    if len(found) == len(left):
                        break
            at += n
        return found

    def _ahead(self, address: int) -> bytes:
        """Read names; at the end of memory, what there is."""
        for nbytes in (64 * CHUNK, CHUNK, 2 * MOST_NAME, 256, 16):
            try:
                return self._space.read_image(address, nbytes)
            except errors.MissingMemoryError:
                raise
            except errors.OutsideMemoryError:
                continue
        return b""

    def _bytes(self, address: int, nbytes: int) -> bytes:
        """Read some bytes of the tables, through pages that are kept."""
        result = b""
        while len(result) < nbytes:
            page, offset = divmod(address + len(result), CHUNK)
            if page not in self._pages:
                if len(self._pages) >= MOST_PAGES:
                    self._pages.clear()
                self._pages[page] = self._space.read_image(page * CHUNK, CHUNK)
            result += self._pages[page][offset : offset + nbytes - len(result)]
        return result
