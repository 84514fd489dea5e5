"""The subtree `kho-live`: an FDT that lists the objects in the image of a running service (`kho.live`).

    / { compatible = "kho-live-v1"; image = "search-index"; version = "2"; generation = <u64>;
        0 { key = "vectors"; memory = <u64 phys, u64 nbytes>; dtype = "<f4"; shape = <u64 ...>;
            crc32 = <u32>; generation = <u64>; };
        1 { ... };
        retired = <u64 phys, u64 pages, u64 born, u64 freed, ...>; };

`retired` is optional: memory of earlier generations that readers may still use (`Retired`).
A node without `dtype` and `shape` is plain bytes. Memory is page-aligned and contiguous; no two objects share a page.
`dtype` is numpy's `dtype.str` of one of the kinds in `DTYPE`: numbers, booleans, times and fixed-length strings, never
Python objects. The FDT is untrusted input, so `decode_catalog` checks everything except the bounds of addresses.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Any, NamedTuple

from .. import errors
from .._kho import Fdt, FdtNode, FdtWriter
from .registry import Blob, Owned, Payload, decoder

COMPATIBLE = "kho-live-v1"
SUBTREE = "kho-live"
PAGE = 4096
"""Page size of images in bytes, independent of the machine's."""
MOST_DIMENSIONS = 32
MOST_NAME = 255
"""Maximum bytes of an object's name in UTF-8."""
DTYPE = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(?:8|16)|\|S[1-9][0-9]{0,8}|[<>]U[1-9][0-9]{0,8}"
    r"|[<>][mM]8(?:\[[0-9]{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)

_RETIRED = struct.Struct("<4Q")


@dataclass(frozen=True, slots=True)
class Item:
    """A committed object."""

    name: str
    phys: int
    """Page-aligned address; 0 for an object of size 0."""
    nbytes: int
    dtype: str | None
    """numpy's `dtype.str`; None for bytes."""
    shape: tuple[int, ...]
    """Shape of the array; `(nbytes,)` for bytes."""
    crc32: int
    """CRC-32 of the bytes (zlib)."""
    generation: int
    """The commit that wrote the object: its version."""

    @property
    def pages(self) -> int:
        """Number of pages of the object."""
        return -(-self.nbytes // PAGE)


class Retired(NamedTuple):
    """Memory of earlier generations whose readers may still use it."""

    phys: int
    pages: int
    born: int
    """The first generation that refers to it."""
    freed: int
    """The first generation after `born` that does not refer to it."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """The contents of one generation of an image."""

    image: str
    version: str
    generation: int
    items: dict[str, Item]
    retired: tuple[Retired, ...] = ()


def itemsize(dtype: str) -> int:
    """Return the bytes of one element. Raises: ParameterError for a dtype that images do not support."""
    if DTYPE.fullmatch(dtype) is None:
        raise errors.ParameterError(
            f"dtype {dtype!r}: images hold numbers, booleans, times and fixed-length strings; store other data as "
            "bytes, `array.tobytes()`"
        )
    if dtype[1] in "mM":
        return 8
    return int(dtype[2:]) * (4 if dtype[1] == "U" else 1)


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an array. Raises: ParameterError for an unsupported dtype or shape."""
    if len(shape) > MOST_DIMENSIONS or any(not 0 <= n < 1 << 63 for n in shape):
        raise errors.ParameterError(f"shape {shape}: at most {MOST_DIMENSIONS} dimensions, each at least 0")
    return itemsize(dtype) * math.prod(shape)


def check_name(name: str) -> str:
    """Check an object's or image's name. Raises: ParameterError."""
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raw = b""
    if not 1 <= len(raw) <= MOST_NAME or b"\0" in raw:
        raise errors.ParameterError(f"name {name!r}: must be 1 to {MOST_NAME} bytes of UTF-8 without NUL")
    return name


def check_service(name: str) -> str:
    """Check a service's name, which is part of the paths of its socket and its image. Raises: ParameterError."""
    if "/" in check_name(name):
        raise errors.ParameterError(
            f"name {name!r}: a service's name has no slash, as that of an image's file has; take another name, or open "
            "it with the path as backing="
        )
    return name


def encode_catalog(catalog: Catalog) -> bytes:
    """Return the subtree's FDT."""
    writer = FdtWriter(
        4096
        + sum(256 + 2 * len(item.name.encode()) + 8 * len(item.shape) for item in catalog.items.values())
        + 32 * len(catalog.retired)
    )
    with writer.node():
        writer.property_str("compatible", COMPATIBLE)
        writer.property_str("image", catalog.image)
        writer.property_str("version", catalog.version)
        writer.property_u64("generation", catalog.generation)
        if catalog.retired:
            writer.property("retired", b"".join(starmap(_RETIRED.pack, catalog.retired)))
        for at, item in enumerate(catalog.items.values()):
            with writer.node(str(at)):
                writer.property_str("key", item.name)
                writer.property("memory", _words(item.phys, item.nbytes))
                if item.dtype is not None:
                    writer.property_str("dtype", item.dtype)
                    writer.property("shape", _words(*item.shape))
                writer.property_u32("crc32", item.crc32)
                writer.property_u64("generation", item.generation)
    return writer.finish()


def decode_catalog(blob: bytes | Fdt) -> Catalog:
    """Decode the subtree's FDT, given as bytes or `Fdt`.

    Raises: FormatError for an FDT that no commit can have written: of another format, with an object that is not
        page-aligned, whose dtype, shape and size contradict each other, that shares its name or a page with another
        object, or whose generation exceeds the image's; UnsupportedAbiError for a later version of the format.
    """
    root = (blob if isinstance(blob, Fdt) else Fdt(blob)).root
    try:
        if (says := root.str("compatible")) != COMPATIBLE:
            raise errors.UnsupportedAbiError(f"image of a {says!r}, not {COMPATIBLE!r}: a newer kho wrote it")
        retired = tuple(_retired(root["retired"], root.u64("generation"))) if "retired" in root else ()
        catalog = Catalog(check_name(root.str("image")), root.str("version"), root.u64("generation"), {}, retired)
        for node in root.children:
            item = _item(node)
            if item.name in catalog.items:
                raise errors.FormatError(f"object {item.name!r} exists twice")
            if item.generation > catalog.generation:
                raise errors.FormatError(
                    f"object {item.name!r}: generation {item.generation} exceeds the image's, {catalog.generation}"
                )
            catalog.items[item.name] = item
    except (errors.NotFoundError, errors.ParameterError) as error:
        raise errors.FormatError(str(error)) from error
    used = sorted(
        [(item.phys, item.pages * PAGE, f"object {item.name!r}") for item in catalog.items.values() if item.nbytes]
        + [(run.phys, run.pages * PAGE, "retired memory") for run in catalog.retired]
    )
    for (phys, nbytes, name), (after, _, other) in pairwise(used):
        if phys + nbytes > after:
            raise errors.FormatError(f"{name} and {other} overlap at {after:#x}")
    return catalog


def _retired(value: bytes, generation: int) -> Iterator[Retired]:
    numbers = _numbers(value)
    if len(numbers) % 4:
        raise errors.FormatError(f"retired memory: {len(numbers)} numbers are not a multiple of 4")
    for at in range(0, len(numbers), 4):
        run = Retired(*numbers[at : at + 4])
        if run.phys % PAGE or not run.phys or not run.pages or run.phys + run.pages * PAGE > 1 << 64:
            raise errors.FormatError(
                f"retired memory: {run.pages:#x} pages at {run.phys:#x}: misaligned or out of range"
            )
        if not run.born <= run.freed <= generation + 1:
            raise errors.FormatError(
                f"retired memory at {run.phys:#x}: generations {run.born} to {run.freed}, in generation {generation}"
            )
        yield run


def _item(node: FdtNode) -> Item:
    name = check_name(node.str("key"))
    memory = _numbers(node["memory"])
    if len(memory) != 2:
        raise errors.FormatError(f"object {name!r}: memory has {len(memory)} numbers, not 2")
    phys, nbytes = memory
    dtype = node.str("dtype") if "dtype" in node else None
    shape = (nbytes,) if dtype is None else tuple(_numbers(node["shape"]))
    if phys % PAGE or (phys == 0) != (nbytes == 0) or phys + nbytes > 1 << 64:
        raise errors.FormatError(f"object {name!r}: {nbytes:#x} bytes at {phys:#x}: misaligned or out of range")
    if dtype is not None and (needs := nbytes_of(dtype, shape)) != nbytes:
        raise errors.FormatError(f"object {name!r}: dtype {dtype} and shape {shape} take {needs} bytes, not {nbytes}")
    return Item(name, phys, nbytes, dtype, shape, node.u32("crc32"), node.u64("generation"))


def _words(*numbers: int) -> bytes:
    return b"".join(n.to_bytes(8, "little") for n in numbers)


def _numbers(value: bytes) -> list[int]:
    if len(value) % 8:
        raise errors.FormatError(f"{len(value)} bytes are not a multiple of 8, for 64-bit numbers")
    return [int.from_bytes(value[at : at + 8], "little") for at in range(0, len(value), 8)]


@decoder(COMPATIBLE)
class Live(Payload):
    """The objects in the image of a running service."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        fdt = blob.fdt()
        blob.budget.take_objects(len(fdt.root.children), f"{blob.owner} at {blob.phys:#x}")
        self.catalog = decode_catalog(fdt)

    def describe(self) -> dict[str, Any]:
        """Return the image and its objects, in the order in which they were put."""
        return {
            "image": self.catalog.image,
            "version": self.catalog.version,
            "generation": self.catalog.generation,
            "objects": [
                {
                    "name": item.name,
                    "dtype": item.dtype,
                    "shape": list(item.shape),
                    "phys": item.phys,
                    "nbytes": item.nbytes,
                    "crc32": item.crc32,
                    "generation": item.generation,
                }
                for item in self.catalog.items.values()
            ],
        }

    def owned(self) -> Iterator[Owned]:
        """Yield the memory of every object."""
        for item in self.catalog.items.values():
            if item.nbytes:
                yield Owned(f"{self.catalog.image} {item.name}", "object", (item.phys, item.pages * PAGE))
