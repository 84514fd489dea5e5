"""Format sizes and shares for output."""

from __future__ import annotations

from ..sizes import format_size as size

__all__ = ["share", "size"]


def share(part: float | None) -> str:
    """Write a share of 1 in per cent."""
    return "?" if part is None else f"{part * 100:.1f} %"
