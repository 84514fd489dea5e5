"""The levels of a radix tree: the page of the root FDT is in it only under the number that it was written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from .. import errors
from .._kho import Incoming

__all__ = ["MOST_LEVELS", "Read", "in_tree", "levels_written"]

Read: TypeAlias = Callable[[int, int], bytes]
MOST_LEVELS = 8
"""More than any page size needs."""


def levels_written(inc: Incoming) -> int | None:
    """Return the number of levels of a handover's tree, from the page of its root FDT; None if that does not tell."""
    expected = inc.abi.levels.get(inc.page_size)
    if expected is None or not inc.finalized or inc.certainty == "not read":
        return None
    shift = inc.page_size.bit_length() - 1
    key = 1 << (64 - shift) | inc.fdt_phys >> shift
    for levels in sorted(range(2, MOST_LEVELS + 1), key=lambda n: abs(n - expected)):
        if in_tree(inc.read, inc.page_size, inc.preserved_memory_map, key, levels):
            return levels
    return None


def in_tree(read: Read, page: int, node: int, key: int, levels: int) -> bool:
    """Look `key` up in a radix tree with `levels` levels, as kho_radix_walk_tree does: is its bit set?"""
    shift = page.bit_length() - 1
    table, leaf = shift - 3, shift + 3
    try:
        for level in range(levels - 1, 0, -1):
            index = key >> ((level - 1) * table + leaf) & ((1 << table) - 1)
            node = int.from_bytes(read(node + 8 * index, 8), "little")
            if not node or node % page:
                return False
        bit = key & ((1 << leaf) - 1)
        return bool(read(node + bit // 8, 1)[0] >> bit % 8 & 1)
    except errors.KhoError:
        return False
