"""volatility3: a layer of physical memory, or the physical memory below a layer of virtual memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from volatility3.framework import exceptions
from volatility3.framework.interfaces.layers import DataLayerInterface, TranslationLayerInterface
from volatility3.framework.layers.intel import Intel

from .. import errors
from .._kho import Memory

__all__ = ["PLUGINS", "memory"]

PLUGINS = str(Path(__file__).parent.parent / "plugins" / "volatility3")
"""The directory of kho's volatility3 plugins, for `vol --plugin-dirs`."""


def memory(layer: object) -> Memory:
    """Make a memory of a layer: a dump's, or that of the file below it. Of a layer of page tables it is its memory.

    Raises: ParameterError for another object of volatility3.
    """
    if not isinstance(layer, DataLayerInterface):
        raise errors.ParameterError(f"a {type(layer).__name__} of volatility3 is no memory: a layer is")
    while isinstance(layer, Intel):
        layer = layer.context.layers[layer.config["memory_layer"]]
    source: Any = layer

    def read(phys: int, n: int) -> bytes:
        try:
            found: bytes = source.read(phys, n)
        except exceptions.InvalidAddressException as error:
            raise errors.LeftOutError(f"memory at {phys:#x} (+{n:#x}): {error}") from error
        return found

    return Memory.from_reader(read, _ranges(source))


def _ranges(layer: DataLayerInterface) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a layer, as (phys, nbytes); they may overlap."""
    first = layer.minimum_address
    size = layer.maximum_address - first + 1
    if not isinstance(layer, TranslationLayerInterface):
        yield first, size
        return
    for start, nbytes, *_ in layer.mapping(first, size, ignore_errors=True):
        yield start, nbytes
