"""Arrays over an image's memory: numpy's if numpy is installed, else memoryviews; and which values can be stored."""

from __future__ import annotations

import re
import sys
from typing import Any

from ...errors import NotStorableError, ParameterError
from ...formats.live import itemsize

__all__ = ["View", "dtype_of", "make_readonly", "plain_array", "plain_bytes", "shaped"]

View = Any
"""An object as it is handed out: a numpy array, or a memoryview for bytes and without numpy."""
FORMATS = {
    "|b1": "?",
    "|i1": "b",
    "|u1": "B",
    "<i2": "h",
    "<u2": "H",
    "<i4": "i",
    "<u4": "I",
    "<i8": "q",
    "<u8": "Q",
    "<f4": "f",
    "<f8": "d",
}
"""Memoryview formats of dtypes, on little-endian machines; without numpy, objects of other dtypes are bytes."""
PLAIN = re.compile(r"[@=<>!]?(?:[cbB?hHiIlLqQnNefdFD]|Z[fd])")
"""Buffer formats of single numbers or bytes: their bytes are their whole value."""
HARMLESS = ("ndarray", "memmap")
"""numpy's classes whose elements are their whole value."""
WIDTHS = (1, 2, 4, 8)


def plain_array(name: str, value: object) -> Any:
    """Return a plain numpy array of an array or scalar; None for what is not numpy's.

    Raises: NotStorableError for a subclass, or a dtype with metadata: their elements are not their whole value.
    """
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray | numpy.generic):
        return None
    kind = type(value)
    if isinstance(value, numpy.ndarray) and kind not in [getattr(numpy, known) for known in HARMLESS]:
        if isinstance(value, numpy.ma.MaskedArray):
            how = "the data and the mask as two objects (`a.data`, `numpy.ma.getmaskarray(a)`), or `a.filled(value)`"
        else:
            how = "what it means by a name of its own, and the elements, `numpy.asarray(a)`"
        raise NotStorableError(
            f"put {name!r}: {kind.__module__}.{kind.__qualname__}: images hold plain numpy arrays, not what this class "
            f"adds to them; put {how}"
        )
    array: Any = numpy.asarray(value)
    if array.dtype.metadata:
        raise NotStorableError(
            f"put {name!r}: a dtype with metadata {str(dict(array.dtype.metadata))[:80]}, which images do not hold; "
            f"put that by a name of its own, and the elements, `a.view({array.dtype.str!r})`"
        )
    return array


def plain_bytes(name: str, value: Any) -> memoryview:
    """Return an object's buffer, if its bytes are its whole value. Raises: NotStorableError."""
    kind = type(value)
    what = f"put {name!r}: {kind.__module__}.{kind.__qualname__}"
    try:
        raw = memoryview(value)
    except (TypeError, BufferError) as error:
        raise NotStorableError(
            f"{what}: neither a numpy array nor an object that exports a buffer; put `numpy.asarray(a)`, or bytes"
        ) from error
    if PLAIN.fullmatch(raw.format) is None:
        raise NotStorableError(
            f"{what}: a buffer of format {raw.format!r}: images hold numbers and bytes, not pointers, characters or "
            "structures; put its bytes with `memoryview(a).tobytes()` if you know how to read them again"
        )
    return raw


def shaped(raw: memoryview, dtype: str | None, shape: tuple[int, ...]) -> View:
    """Return bytes as an array of a dtype and shape, or as a memoryview without numpy."""
    if dtype is None:
        return raw
    try:
        import numpy as np
    except ImportError:
        form: Any = FORMATS.get(dtype) if sys.byteorder == "little" or dtype[0] == "|" else None
        return raw.cast(form, list(shape)) if form is not None and raw.nbytes else raw
    if not raw.nbytes:
        empty = np.empty(shape, np.dtype(dtype))
        empty.flags.writeable = not raw.readonly
        return empty
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


def dtype_of(dtype: Any) -> str:
    """Return a dtype's `str`, as images store it. Raises: ParameterError, NotStorableError."""
    try:
        import numpy as np
    except ImportError:
        if not isinstance(dtype, str):
            raise ParameterError(f"dtype {dtype!r}: without numpy, say it as '<f4'") from None
        code = dtype if dtype[:1] in "<>|" else ("|" if dtype[1:] == "1" else "<") + dtype
    else:
        try:
            known = np.dtype(dtype)
        except (TypeError, ValueError, SyntaxError) as error:
            raise ParameterError(f"dtype {dtype!r}: {error}") from error
        if refusal := _refusal(known):
            shown = known.name if known.isbuiltin == 2 else known.str
            raise NotStorableError(
                f"dtype {shown!r}: images hold numbers, booleans, times and fixed-length strings; {refusal}"
            )
        code = known.str
    itemsize(code)
    return code


def _refusal(dtype: Any) -> str:
    """Return what to store instead of elements of a dtype that images do not hold; "" for one that they hold."""
    if dtype.names is not None:
        first = next(iter(dtype.names), "field")
        return f"store each field by a name, `a[{first!r}]`, or bytes, `a.tobytes()`"
    if dtype.isbuiltin == 2:
        # A dtype of another package, as ml_dtypes.
        width = dtype.itemsize if dtype.itemsize in WIDTHS else 0
        back = f"{dtype.type.__module__}.{dtype.name}"
        return f'store `a.view("u{width}")`, and read `.view({back})`' if width else "store bytes, `a.tobytes()`"
    if dtype.kind == "O":
        return 'store numbers or fixed-length strings, `a.astype("f8")` or `a.astype("U")`'
    if dtype.kind == "T":
        return 'store fixed-length strings, `a.astype(object).astype("U")`'
    if dtype.kind == "f" and dtype.itemsize > 8:
        return 'store `a.astype("f8")`, or bytes, `a.tobytes()`'
    if dtype.kind == "c" and dtype.itemsize > 16:
        return 'store `a.astype("c16")`, or bytes, `a.tobytes()`'
    if dtype.kind == "V":
        return "store bytes, `a.tobytes()`"
    return ""


def make_readonly(view: Any) -> None:
    """Make an array that was handed out to be filled read-only."""
    if view is None:
        return
    if isinstance(view, memoryview):
        try:
            view.release()
        except BufferError:
            return
    else:
        view.flags.writeable = False
