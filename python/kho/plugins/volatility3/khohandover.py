"""volatility3 plugins that show what Linux Kexec HandOver preserves: no symbols of the kernel are needed.

vol --plugin-dirs "$(python -c 'import kho.readers.volatility as v; print(v.PLUGINS)')" -f core.elf khohandover.Files
"""

from collections.abc import Iterator
from typing import Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

import kho
from kho.formats import MemfdFile
from kho.text import printable


class _Handover(interfaces.plugins.PluginInterface):  # type: ignore[misc]
    """What the plugins share: the layer, and the handover in it."""

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[Any]:
        return [requirements.TranslationLayerRequirement(name="primary", description="Memory layer to search")]

    def handover(self) -> kho.Incoming:
        """Read the handover in the layer. Raises: as `kho.open`."""
        return kho.open(self.context.layers[self.config["primary"]])


class Files(_Handover):
    """Lists the files in the sessions of the live update orchestrator (LUO)."""

    def run(self) -> Any:
        return renderers.TreeGrid(
            [("Session", str), ("Token", format_hints.Hex), ("Kind", str), ("Bytes", int)], self._rows()
        )

    def _rows(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        for name, session in self.handover().luo.sessions.items():
            for token, file in session.files.items():
                size = file.size if isinstance(file, MemfdFile) else renderers.NotApplicableValue()
                yield 0, (printable(name), format_hints.Hex(token), printable(file.compatible), size)


class Folios(_Handover):
    """Lists runs of preserved folios, with their owner and their part in it."""

    def run(self) -> Any:
        columns = [("Address", format_hints.Hex), ("Bytes", format_hints.Hex), ("Owner", str), ("Part", str)]
        return renderers.TreeGrid(columns, self._rows())

    def _rows(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        for row in kho.owners.owners(self.handover()).rows:
            at = format_hints.Hex(row.phys), format_hints.Hex(row.nbytes)
            yield 0, (*at, printable(row.owner), printable(row.what))


class Findings(_Handover):
    """Lists what is wrong with the handover, as `kho verify` does."""

    def run(self) -> Any:
        return renderers.TreeGrid([("Severity", str), ("Id", str), ("Place", str), ("Value", str)], self._rows())

    def _rows(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        for found in kho.verify.verify(self.handover()):
            yield 0, (found.severity, found.id, printable(found.place), printable(found.value))
