"""Import paths of earlier versions, which lead to the modules where they are now.

`import kho.image` gives `kho.handover.elfcore`: the same module object under both names, imported once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

MOVED = {
    "payload": "formats",
    "payload.base": "formats.registry",
    "payload.kernel": "formats.kernel",
    "payload.live": "formats.live",
    "payload.luo": "formats.luo",
    "writers": "formats.kernel_write",
    "luo_out": "formats.luo_write",
    "addresses": "handover.addresses",
    "outgoing": "handover.outgoing",
    "image": "handover.elfcore",
    "conversion": "handover.convert",
    "report": "handover.describe",
    "owners": "handover.owners",
    "extract": "handover.extract",
    "diff": "handover.diff",
    "memmap": "handover.memmap",
    "mapdraw": "handover.mapdraw",
    "findings": "handover.rules",
    "verify": "handover.verify",
    "planning": "sizing.plan",
    "simulation": "sizing.simulate",
    "live.image": "live.file.image",
    "live.slots": "live.file.header",
    "live.runs": "live.file.allocator",
    "live.arrays": "live.file.arrays",
    "live.mapping": "live.file.mapping",
    "live.memory": "live.file.memory",
    "live.pins": "live.file.pins",
    "live.trust": "live.file.trust",
    "live.turns": "live.ownership",
    "live.server": "live.handover.server",
    "live.successor": "live.handover.client",
    "live.wire": "live.handover.wire",
    "live.runtime": "live.handover.sockets",
    "live.census": "live.handover.registry",
    "live.hold": "live.transports.holder",
    "live.kexec": "live.transports.kexec",
}
"""Earlier names of modules, and the present ones; all without `kho.`."""

PACKAGE = __name__.partition(".")[0] + "."


class _Moved(MetaPathFinder, Loader):
    """Finds a module by its earlier name; loading it imports the module that has moved."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.removeprefix(PACKAGE) not in MOVED or not fullname.startswith(PACKAGE):
            return None
        return spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(PACKAGE + MOVED[spec.name.removeprefix(PACKAGE)])
        # The import system writes its own specification and loader to the module: `exec_module` restores these.
        spec.loader_state = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__, module.__loader__ = module.__spec__.loader_state


def install() -> None:
    """Let the earlier names be imported. The first finder, as the package's own would import a module twice."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
