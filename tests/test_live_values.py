"""kho.live: values that an image cannot hold are refused with a remedy that works; lock owners are not copied."""

from __future__ import annotations

import array
import copy
import ctypes
import mmap
import multiprocessing.reduction
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kho
import kho.live
from kho import luo
from kho.live import Handle
from kho.live.file.arrays import HARMLESS
from kho.live.handover import client, server
from kho.live.transports import holder

from livefiles import descriptors

Array = np.ndarray[Any, Any]


@pytest.fixture
def h() -> Iterator[Handle]:
    """An image."""
    with kho.live.open("x", "4M", serve=False) as made:
        yield made


class Quantity(np.ndarray):
    """Numbers with a unit, as astropy's."""

    unit = "m"


def view_of(a: Any) -> memoryview:
    """The buffer of an array."""
    return memoryview(a)


class Point(ctypes.Structure):
    """A structure."""

    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_char_p)]


def subclasses(kind: type) -> set[type]:
    """All that derive from a class."""
    direct: set[type] = set(kind.__subclasses__())
    return direct | {deeper for one in direct for deeper in subclasses(one)}


def of_class(kind: type, value: Array) -> Array:
    """The same elements, as an array of another class."""
    return value.view(kind)


def test_every_subclass_of_an_array_but_memmap_is_refused_by_name(h: Handle) -> None:
    kinds = subclasses(np.ndarray) | {np.ma.MaskedArray, np.matrix, np.recarray, np.char.chararray, Quantity, np.memmap}
    tried = set()
    for kind in kinds:
        value = np.array([b"a", b"b"]) if kind.__name__ == "chararray" else np.arange(4.0).reshape(2, 2)
        if kind.__name__ in HARMLESS:
            continue
        try:
            given = of_class(kind, value)
        except Exception:  # noqa: BLE001 - a class that is made otherwise
            continue
        if type(given) is not kind:
            continue
        with pytest.raises(kho.NotStorableError, match=re.escape(f"{kind.__module__}.{kind.__qualname__}")) as caught:
            h.put("a", given)
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, kho.ParameterError)
        tried.add(kind)
    assert {np.ma.MaskedArray, np.matrix, np.recarray, np.char.chararray, Quantity} <= tried
    assert h.names() == []
    assert h.uncommitted == []


def test_a_mask_is_not_dropped_and_the_remedies_keep_it(h: Handle) -> None:
    for a in (
        np.ma.array([1, 2], mask=[False, True]),
        np.ma.array([1.0, 2.0]),
        np.ma.masked,
        np.ma.masked_array(5, mask=True),
    ):
        with pytest.raises(kho.NotStorableError, match="the data and the mask as two objects"):
            h.put("a", a)
        h.put("data", a.data)
        h.put("mask", np.ma.getmaskarray(a))
        again = np.ma.array(h["data"], mask=h["mask"])
        assert np.array_equal(again.filled(0), np.ma.filled(a, 0))


def test_mapped_arrays_and_scalars_are_arrays(h: Handle, tmp_path: Path) -> None:
    mapped: Array = np.memmap(tmp_path / "m", "f4", "w+", shape=(5, 3))
    mapped[:] = np.arange(15).reshape(5, 3)
    values: list[Any] = [mapped, mapped[::2], mapped.T]
    values += [np.float32(2.5), np.datetime64("2020-01-01"), np.str_("text"), np.bool_(True)]
    for value in values:
        h.put("a", value)
        assert np.array_equal(h["a"], value)
        assert h["a"].dtype == value.dtype


def remedies(text: str) -> list[str]:
    """The code of a message."""
    return re.findall(r"`([^`]*)`", text)


@pytest.mark.parametrize(
    "a",
    [
        np.array([1, 2.5, 3], object),
        np.array(["a", "bc"], object),
        np.zeros(3, [("a", "f4"), ("b", "i2")]),
        np.zeros((), [("a", "f4", (2,)), ("b", "U3")]),
        np.zeros(2, "V8"),
        np.void(b"abc"),
        np.arange(3, dtype="g")[::2],
        np.arange(3, dtype="G"),
        np.array(["a", "bc"], np.dtypes.StringDType()),
        np.zeros(2, np.dtype("i4", metadata={"enum": "colors"})),
    ],
)
def test_the_remedy_of_a_refusal_works_as_it_is_printed(h: Handle, a: Any) -> None:
    with pytest.raises(kho.NotStorableError) as caught:
        h.put("a", a)
    worked = []
    for code in remedies(str(caught.value)):
        try:
            h.put("a", eval(code, {"a": a, "numpy": np}))
        except ValueError:
            continue  # objects are numbers or strings
        worked.append(code)
    assert worked
    if "object" not in str(getattr(a, "dtype", "")):
        assert worked == remedies(str(caught.value))


def foreign() -> list[str]:
    """The dtypes of ml_dtypes."""
    pytest.importorskip("ml_dtypes")
    import ml_dtypes

    names = [
        "bfloat16",
        "int4",
        "uint4",
        "int2",
        "uint2",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e8m0fnu",
        "float4_e2m1fn",
    ]
    return [name for name in names if hasattr(ml_dtypes, name)]


def test_a_dtype_of_another_package_is_named_and_the_remedy_works_for_every_shape(h: Handle) -> None:
    names = foreign()
    import ml_dtypes

    for name in names:
        dtype = np.dtype(getattr(ml_dtypes, name))
        whole = np.arange(24).reshape(2, 3, 4).astype(dtype)
        for a in (whole, whole[0, 0, 0], whole[:, ::2], whole.T, np.array(whole[0, 0, 0]), whole[:0], whole[::-1]):
            with pytest.raises(kho.NotStorableError, match=f"dtype '{name}'") as caught:
                h.put("a", a)
            store, back = remedies(str(caught.value))
            assert store == f'a.view("u{dtype.itemsize}")'
            h.put("a", eval(store, {"a": a}))
            again = eval('h["a"]' + back, {"h": h, "ml_dtypes": ml_dtypes})
            assert (again.dtype, again.shape) == (dtype, a.shape)
            assert np.asarray(again).tobytes() == np.asarray(a).tobytes()
        with pytest.raises(kho.NotStorableError, match=f"dtype '{name}'"):
            h.empty("b", 3, dtype)
    assert names


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (array.array("u", "text"), "array.array"),
        (Point(), "Point"),
        ((Point * 3)(), "Point_Array_3"),
        ((ctypes.c_void_p * 2)(), "c_void_p_Array_2"),
        ((ctypes.c_char_p * 2)(), "c_char_p_Array_2"),
        ((ctypes.py_object * 1)(), "py_object_Array_1"),
        (view_of(np.zeros(3, [("a", "f4")])), "memoryview"),
        (view_of(np.array([object()])), "memoryview"),
        (view_of(np.array(["text"])), "memoryview"),
        (view_of(np.zeros(2, "g")), "memoryview"),
        ("text", "builtins.str"),
        (5, "builtins.int"),
        (None, "builtins.NoneType"),
        ([1, 2], "builtins.list"),
        (object(), "builtins.object"),
        (np.ndarray, "builtins.type"),
    ],
)
def test_a_buffer_that_means_more_than_its_bytes_is_refused_by_name(h: Handle, value: Any, what: str) -> None:
    with pytest.raises(kho.NotStorableError, match=re.escape(what)):
        h.put("a", value)
    assert h.names() == []


@pytest.mark.parametrize("code", "bBhHiIlLqQfd")
def test_buffers_of_numbers_and_bytes_are_bytes(h: Handle, code: str) -> None:
    values: list[Any] = [
        array.array(code, [1, 2, 3]),
        memoryview(array.array(code, [1, 2, 3, 4]))[::2],
        view_of(np.arange(3, dtype=code).astype(np.dtype(code).newbyteorder(">"))),
    ]
    for value in values:
        h.put("a", value)
        assert bytes(h["a"]) == memoryview(value).tobytes()
        assert h.info("a").dtype is None


def test_bytes_of_any_kind_are_bytes(h: Handle) -> None:
    pa = pytest.importorskip("pyarrow")
    mapped = mmap.mmap(-1, 4096)
    mapped[:4] = b"some"
    for value in (
        b"some",
        bytearray(b"some"),
        memoryview(b"some"),
        pa.py_buffer(b"some"),
        mapped,
        (ctypes.c_ubyte * 4).from_buffer_copy(b"some"),
    ):
        h.put("a", value)
        assert bytes(h["a"])[:4] == b"some"
    with pytest.raises(kho.NotStorableError, match="pyarrow"):
        h.put("a", pa.array([1, None]))


# Copies


def owners(h: Handle) -> Iterator[Any]:
    """One of every class that owns descriptors, a mapping or a lock."""
    yield h
    yield kho.live.attach(h.fileno())
    yield h._image
    yield h._memory
    yield client.Predecessor([], [], 0)
    yield object.__new__(client.Offer)
    yield object.__new__(server.Server)
    yield object.__new__(holder.Holder)
    yield object.__new__(luo.Session)
    yield object.__new__(luo.Device)


def test_objects_that_own_a_descriptor_or_a_lock_are_not_copied_or_pickled(h: Handle) -> None:
    h.put("a", b"1")
    h.commit()
    before = descriptors()
    for owned in owners(h):
        ways: list[Callable[[Any], object]] = [copy.copy, copy.deepcopy, multiprocessing.reduction.ForkingPickler.dumps]
        ways += [partial(pickle.dumps, protocol=protocol) for protocol in range(6)]
        for way in ways:
            with pytest.raises(kho.NotCopyableError, match=type(owned).__qualname__) as caught:
                way(owned)
            assert isinstance(caught.value, TypeError)
        if isinstance(owned, kho.live.Candidate):
            owned.close()
    del owned
    assert bytes(h["a"]) == b"1"
    h.put("b", b"2")
    assert h.commit() == 2
    with pytest.raises(kho.BusyError):
        kho.live.attach(h.fileno()).adopt()
    assert descriptors() <= before
