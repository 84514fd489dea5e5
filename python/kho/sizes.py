"""Sizes: the grammar that users write, the form that is printed, and the sizes of pages and bitmaps.

    SIZE   = NUMBER [UNIT]            spaces before, after and between them; letters in either case
    NUMBER = 0x1000 | 4096 | 1.5      an underscore may separate two digits of a whole number
    UNIT   = B | K | M | G | T | P | E, each but B also with B or iB: 1024 to the power of 1 to 6

The value is a whole number of bytes below 2^64; addresses have the same grammar. In a hexadecimal number B and E are
digits. `rust/kho/src/sizes.rs` has the same grammar and the same printer; the tests of both read `sizes_cases.txt` next
to it. `kho_scratch=` is read as the kernel reads it (`parse_kho_scratch`), which is another grammar.
"""

from __future__ import annotations

import re
from operator import index

from .errors import ParameterError

__all__ = ["MAX_PAGE_ORDERS", "PAGEBLOCK_ORDERS", "PAGE_SIZES", "PATTERN", "SMALL_BITMAP", "format_size", "parse_size"]

PAGE_SIZES = (4096, 16384, 65536)
"""Page sizes of kernels with KHO: x86_64 has the first, arm64 all of them."""
PAGEBLOCK_ORDERS = {4096: 9, 16384: 11, 65536: 13}
"""The pageblock's order by page size, as kernels with huge pages have it (include/linux/pageblock-flags.h)."""
MAX_PAGE_ORDERS = {4096: 10, 16384: 11, 65536: 13}
"""The default MAX_PAGE_ORDER by page size (ARCH_FORCE_MAX_ORDER, arch/arm64/Kconfig)."""
SMALL_BITMAP = 512
"""Bytes of a bitmap of Linux 6.16 and 6.17, whatever the page size; later ones are a page."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
"""By powers of 1024."""
LONGEST = 100
"""Characters of the longest text that is read; a fraction that is a whole number of bytes has at most 60 digits."""
SHOWN = 40
"""Characters of a refused text that the message repeats."""
SPACE = " \t\n\f\r"

# Possessive: the digits of a hexadecimal number are as many as there are, so that 0x1EiB is not 1 EiB.
HEX, DECIMAL = (rf"{digits}++(?:_{digits}++)*+" for digits in ("[0-9a-f]", "[0-9]"))
PATTERN = rf"(?ai:(?:0x{HEX}|{DECIMAL}(?:\.[0-9]+)?)[{SPACE}]*(?:[KMGTPE](?:i?B)?|B)?)"
"""A regular expression for a size without spaces around it, to be part of a larger one."""
PARTS = re.compile(rf"(?ai)(?:0x({HEX})|({DECIMAL})(?:\.([0-9]+))?)[{SPACE}]*(?:([KMGTPE])(?:i?B)?|B)?")


def parse_size(size: int | str, what: str = "") -> int:
    """Read a size or an address in bytes: `4096`, `0x4000_0000`, `64K`, `1.5G`, `2 MiB`.

    Args: size: a text of the module's grammar, or the number itself. what: begins the message.
    Raises: ParameterError with the value, the rule that it breaks, and an example.
    """
    if not isinstance(size, str):
        number = index(size)
        if 0 <= number < 1 << 64:
            return number
        raise _refused(what, number, "is negative" if number < 0 else "is not below 2^64")
    text = size.strip(SPACE)
    found = PARTS.fullmatch(text) if len(text) <= LONGEST else None
    if found is None:
        negative = len(text) <= LONGEST and text.startswith("-") and PARTS.fullmatch(text[1:])
        rule = "is negative" if negative else "is not a number with an optional unit K, M, G, T, P or E"
        raise _refused(what, text, rule)
    whole, fraction = int(found[1] or found[2], 16 if found[1] else 10), found[3] or ""
    shift = 10 * "_KMGTPE".index((found[4] or "_").upper())
    if whole << shift >= 1 << 64:
        raise _refused(what, text, "is not below 2^64")
    part, rest = divmod(int(fraction or 0) << shift, int(10 ** len(fraction)))
    if rest:
        raise _refused(what, text, "is not a whole number of bytes")
    return (whole << shift) + part


def _refused(what: str, value: int | str, rule: str) -> ParameterError:
    shown = repr(value[:SHOWN]) if isinstance(value, str) else f"{value:#x}"
    return ParameterError(f"{what}{': ' if what else ''}{shown} {rule} (write 4096, 0x1000, 64K or 1.5G)")


def format_size(nbytes: int) -> str:
    """Write a number of bytes as people read it, in the largest unit that is not above it.

    With one decimal, rounded half up, so that columns align: `1.0 GiB`, `1.9 TiB`. Bytes have none: `100 B`. What
    rounds to 1024.0 KiB is `1.0 MiB`.
    """
    sign, nbytes = ("-" if nbytes < 0 else ""), abs(nbytes)
    power = min((max(nbytes, 1).bit_length() - 1) // 10, len(UNITS) - 1)
    if power == 0:
        return f"{sign}{nbytes} {UNITS[0]}"
    if _tenths(nbytes, power) >= 10240 and power < len(UNITS) - 1:
        power += 1
    whole, tenth = divmod(_tenths(nbytes, power), 10)
    return f"{sign}{whole}.{tenth} {UNITS[power]}"


def _tenths(nbytes: int, power: int) -> int:
    return nbytes * 10 + (1 << 10 * power >> 1) >> 10 * power
