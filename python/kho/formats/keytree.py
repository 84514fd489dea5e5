"""Radix trees of KHO whose keys are plain numbers: those of page frames, as a public draft keeps them (mshv).

The nodes are those of the preserved-memory map (abi.md section 4): a page each, tables of addresses above bitmaps. Only
the meaning of a key differs. No public draft says in which property or field the root of such a tree stands, so a
payload's declaration names it: `pages = keytree(owns="deposited page")`. The draft of a tree whose keys have values of
64 bits is not read, as the layout of its leaves is not published.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from .. import errors
from .._kho import Incoming, abis
from .fields import Field, Member, Place, Room
from .registry import Blob, Budget, Owned

__all__ = ["KeyTree", "keytree", "write_keytree"]

ONES = re.compile("1+")


def levels_of(page_size: int) -> int:
    """Return the number of levels of a tree as the newest kernels have it, the leaves included."""
    return [abi.levels[page_size] for abi in abis().values() if abi.levels][-1]


class KeyTree:
    """A tree that was read: runs of keys, and the pages of its nodes.

    Args: root: physical address of the root node; 0 for an empty tree. what: the owner, for messages.
    Raises: FormatError for a node that is misaligned, outside memory, or reached twice, and for more runs of keys than
        an image of this size can hold.
    """

    def __init__(self, inc: Incoming, root: int, what: str, budget: Budget | None = None) -> None:
        self.inc = inc
        self.nodes: list[int] = []
        """Physical addresses of the nodes."""
        self.runs: list[tuple[int, int]] = []
        """`(first key, number of keys)`, ascending and disjoint."""
        self._what = what
        self._budget = budget or Budget(inc)
        self._table = inc.page_size // 8
        self._zeros = bytes(inc.page_size)
        self._entries = struct.Struct(f"<{self._table}Q")
        if root:
            self._walk(root, levels_of(inc.page_size) - 1, 0)

    def _walk(self, phys: int, level: int, prefix: int) -> None:
        page, what = self.inc.page_size, f"{self._what}: tree node"
        if phys % page:
            raise errors.FormatError(f"{what} at {phys:#x}: not a multiple of the page size {page}")
        self._budget.take_memory(phys, page, what)
        try:
            data = self.inc.read(phys, page)
        except errors.KhoError as error:
            raise errors.FormatError(f"{what} at {phys:#x}: {error}") from error
        self.nodes.append(phys)
        self._budget.take_items(1, f"{what} at {phys:#x}")
        if data == self._zeros:
            return
        if level:
            for index, entry in enumerate(self._entries.unpack(data)):
                if entry:
                    self._walk(entry, level - 1, prefix * self._table + index)
            return
        bits = 8 * page
        text = f"{int.from_bytes(data, 'little'):0{bits}b}"[::-1]
        found = [(prefix * bits + m.start(), m.end() - m.start()) for m in ONES.finditer(text)]
        self._budget.take_items(len(found), f"{what} at {phys:#x}")
        for start, n in found:
            if self.runs and sum(self.runs[-1]) == start:
                first, before = self.runs.pop()
                self.runs.append((first, before + n))
            else:
                self.runs.append((start, n))

    def __len__(self) -> int:
        """Return the number of keys."""
        return sum(n for _, n in self.runs)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the keys, ascending."""
        return (key for first, n in self.runs for key in range(first, first + n))

    def __contains__(self, key: object) -> bool:
        """Whether a key is set."""
        return isinstance(key, int) and any(first <= key < first + n for first, n in self.runs)


class _KeyTree(Field[KeyTree]):
    code = "Q"
    align = 8

    def __init__(self, owns: str | None, key: str | None) -> None:
        super().__init__(key=key)
        self.owns = owns

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> KeyTree:
        blob: Blob = place.blob
        tree = KeyTree(blob.inc, cast("int", data), f"{blob.owner}, {self.name}", blob.budget)
        limit = (1 << 64) // blob.inc.page_size
        if tree.runs and sum(tree.runs[-1]) > limit:
            raise place.malformed(f"{self.name}: page frame {sum(tree.runs[-1]) - 1:#x} is beyond the address space")
        return tree

    def dump(self, value: Any, room: Room | None) -> int:
        keys = list(value)
        if not keys:
            return 0
        if room is None:
            raise errors.ParameterError(f"{self.name}: a tree needs pages; encode it into a handover")
        return write_keytree(room, keys)

    def missing(self) -> Any:
        return ()

    def tell(self, value: KeyTree) -> dict[str, Any]:
        most = 1024
        said: dict[str, Any] = {self.name: {"keys": len(value), "runs": [list(run) for run in value.runs[:most]]}}
        if len(value.runs) > most:
            said[f"{self.name}_omitted"] = len(value.runs) - most
        return said

    def owned(self, value: KeyTree, place: Place, values: Mapping[str, Any]) -> Iterator[Owned]:
        inc = place.blob.inc
        for node in value.nodes:
            # Nodes of the map itself are not preserved; whether those of other trees are is not published.
            if inc.preserves(node, 0):
                yield Owned(place.blob.owner, f"{self.name} node", (node, inc.page_size))
        if self.owns is not None:
            for first, n in value.runs:
                yield Owned(place.blob.owner, self.owns, (first * inc.page_size, n * inc.page_size))


def keytree(*, owns: str | None = None, key: str | None = None) -> Field[KeyTree]:
    """Declare the address of the root of a radix tree of page frame numbers.

    Args: owns: the pages belong to the payload under this name. key: as in `Int`.
    """
    return _KeyTree(owns, key)


def write_keytree(room: Room, keys: Iterable[int]) -> int:
    """Write a radix tree of plain keys and return the address of its root; 0 without keys.

    Raises: ParameterError for a key beyond the tree; OutOfMemoryError.
    """
    page = room.page_size
    bits, table, depth = 8 * page, page // 8, levels_of(page)
    leaves: dict[int, bytearray] = {}
    for key in keys:
        if not 0 <= key < bits * table ** (depth - 1):
            raise errors.ParameterError(
                f"key {key:#x}: a tree of {depth} levels holds keys below {bits * table ** (depth - 1):#x}"
            )
        leaf = leaves.setdefault(key // bits, bytearray(page))
        leaf[key % bits // 8] |= 1 << key % 8
    level = {prefix: room.put(bytes(leaf)) for prefix, leaf in sorted(leaves.items())}
    for _ in range(depth - 1 if level else 0):
        above: dict[int, list[int]] = {}
        for prefix, phys in level.items():
            above.setdefault(prefix // table, [0] * table)[prefix % table] = phys
        level = {prefix: room.put(struct.pack(f"<{table}Q", *entries)) for prefix, entries in above.items()}
    return level.get(0, 0)
