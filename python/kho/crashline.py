"""`crashkernel=` of a command line: the bytes that a kernel reserves for its crash kernel.

Grammar of kernel/crash_reserve.c (parse_crashkernel): SIZE[@OFFSET], SIZE,high, SIZE,low, SIZE,cma, or
START-[END]:SIZE[,...][@OFFSET], where the range that holds the amount of memory decides.
"""

from __future__ import annotations

import re

__all__ = ["crash_kernel_bytes"]

SUFFIX = re.compile(r",(high|low|cma)$")
SIZE = re.compile(r"(0x[0-9a-f]{1,12}|[0-9]{1,15})([kmgt]?)", re.IGNORECASE)
"""What memparse reads; more digits are no size of a machine."""
MOST_RANGES = 64


def crash_kernel_bytes(cmdline: str, ram: int | None = None) -> int | None:
    """Read how many bytes `crashkernel=` asks for in one piece.

    The last value without a suffix counts, otherwise the last one with `,high`; `,low` and `,cma` come on top of that.

    Args: ram: bytes of memory, which ranges depend on.
    Returns: 0 without the parameter, or with one that is not understood; None if it depends on `ram`, which is None.
    """
    values: dict[str, str] = {}
    for word in cmdline.split():
        name, _, value = word.partition("=")
        if name == "crashkernel":
            suffix = SUFFIX.search(value)
            values["" if suffix is None else suffix[1]] = SUFFIX.sub("", value)
    value = values.get("", values.get("high", "")).partition("@")[0]
    if ":" not in value:
        return _bytes(value)
    if ram is None:
        return None
    for part in value.split(",")[:MOST_RANGES]:
        span, _, nbytes = part.partition(":")
        first, _, last = span.partition("-")
        if _bytes(first) <= ram and (not last or ram < _bytes(last)):
            return _bytes(nbytes)
    return 0


def _bytes(text: str) -> int:
    found = SIZE.fullmatch(text)
    if found is None:
        return 0
    digits, unit = found[1].lower(), found[2].lower()
    return int(digits, 0 if digits.startswith("0x") else 10) << (10 * "kmgt".index(unit) + 10 if unit else 0)
