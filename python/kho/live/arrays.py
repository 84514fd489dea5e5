"""Bytes as arrays: numpy's where there is numpy, memoryviews where there is none."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import ParameterError
from ..payload.live import itemsize

__all__ = ["View", "dtype_of", "make_readonly", "shaped"]

View = Any
"""What an object is handed out as: a numpy array, or a memoryview for bytes and where there is no numpy."""
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
"""What memoryviews call a dtype, on little-endian machines; what else there is is shown as bytes without numpy."""


def shaped(raw: memoryview, dtype: str | None, shape: tuple[int, ...]) -> View:
    """Make an array of bytes, or a memoryview where there is no numpy."""
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
    """Give a dtype as images have it. Raises: ParameterError."""
    try:
        import numpy as np
    except ImportError:
        if not isinstance(dtype, str):
            raise ParameterError(f"dtype {dtype!r}: without numpy, say it as '<f4'") from None
        code = dtype if dtype[:1] in "<>|" else ("|" if dtype[1:] == "1" else "<") + dtype
    else:
        try:
            code = np.dtype(dtype).str
        except TypeError as error:
            raise ParameterError(f"dtype {dtype!r}: {error}") from error
    itemsize(code)
    return code


def make_readonly(view: Any) -> None:
    """Have an array that was handed out to be filled refuse further writes."""
    if view is None:
        return
    if isinstance(view, memoryview):
        try:
            view.release()
        except BufferError:
            return
    else:
        view.flags.writeable = False
