"""Format sizes and shares for output."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """Write a number of bytes with the unit that leaves at most four digits before the point."""
    sign, value = ("-" if nbytes < 0 else ""), float(abs(nbytes))
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{sign}{value:.1f} {unit}"


def share(part: float | None) -> str:
    """Write a share of 1 in per cent."""
    return "?" if part is None else f"{part * 100:.1f} %"
