"""Linux Kexec HandOver (KHO) in userspace: read, write and check what a kernel hands to the next.

Reading what a kernel handed over:

>>> inc = kho.open("handover.elf")
>>> inc.compatible, inc.nr_folios
('kho-v1', 16)

Handing memory over, and taking it over:

>>> arena = kho.Arena("1G", scratch="16M,32M,16M")
>>> folio = arena.alloc(order=2)
>>> memoryview(folio)[:5] = b"hello"
>>> out = kho.Outgoing(arena)
>>> out.preserve_folio(folio)
True
>>> inc = kho.Incoming(arena, out.finalize())
>>> bytes(inc.restore_folio(folio.phys))[:5]
b'hello'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import _moved
from ._kho import (
    Arena,
    Folio,
    FolioArray,
    Incoming,
    Memory,
    Pages,
    PfnArray,
    RunArray,
    ScratchSpec,
    Snapshot,
    SnapshotSide,
    Subtree,
    Tracker,
    __version__,
    kho_is_enabled,
    parse_kho_scratch,
)
from ._types import FolioInfo, MemfdFolio, PageInfo
from .errors import (
    AccessError,
    BusyError,
    CutOffError,
    DescriptorLimitError,
    ExistsError,
    FdtError,
    FinalizedError,
    FormatError,
    FreedFolioError,
    KhoError,
    LeftOutError,
    LuoAbiError,
    LuoBusyError,
    LuoError,
    LuoExistsError,
    LuoFileError,
    LuoNotFoundError,
    LuoPermissionError,
    LuoRetrieveError,
    LuoStateError,
    LuoUnavailableError,
    MisalignedError,
    MissingMemoryError,
    NoHandoverError,
    NotCopyableError,
    NotFoundError,
    NotOwnerError,
    NotRestorableError,
    NotStorableError,
    OrderError,
    OutOfMemoryError,
    OutOfRangeError,
    OutsideMemoryError,
    OwnedPageError,
    PageStateError,
    ParameterError,
    ReadOnlyError,
    SchemaError,
    ScratchOverlapError,
    SourceError,
    StaleError,
    UnsupportedAbiError,
    UntrustedError,
)
from .sources import open

_moved.install()

if TYPE_CHECKING:
    from . import doctor, fdt, live, luo
    from . import formats as formats
    from . import handover as handover
    from . import kernels as kernels
    from . import sizing as sizing
    from .handover import diff as diff
    from .handover import extract as extract
    from .handover import mapdraw as mapdraw
    from .handover import memmap as memmap
    from .handover import owners as owners
    from .handover import verify as verify
    from .handover.convert import convert
    from .handover.elfcore import Image, save_elf
    from .handover.outgoing import Outgoing
    from .sizing.plan import Plan, plan
    from .sizing.simulate import Simulation, simulate
else:
    _LATE = {
        **dict.fromkeys(["doctor", "fdt", "formats", "handover", "kernels", "live", "luo", "sizing"]),
        **dict.fromkeys(["diff", "extract", "mapdraw", "memmap", "owners", "verify"], "handover"),
        "Image": "handover.elfcore",
        "Outgoing": "handover.outgoing",
        "Plan": "sizing.plan",
        "Simulation": "sizing.simulate",
        "convert": "handover.convert",
        "plan": "sizing.plan",
        "save_elf": "handover.elfcore",
        "simulate": "sizing.simulate",
    }
    """What is imported when it is first asked for, so that commands start quickly: names, and where they are."""

    def __getattr__(name: str) -> object:
        """Import what is asked for; a module of the package, or what one of them defines."""
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _LATE[name]
        if module is None:
            found: object = import_module(f".{name}", __name__)
        elif module == "handover":
            found = import_module(f".{module}.{name}", __name__)
        else:
            found = getattr(import_module(f".{module}", __name__), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted(globals().keys() | _LATE.keys())


__all__ = [
    "AccessError",
    "Arena",
    "BusyError",
    "CutOffError",
    "DescriptorLimitError",
    "ExistsError",
    "FdtError",
    "FinalizedError",
    "Folio",
    "FolioArray",
    "FolioInfo",
    "FormatError",
    "FreedFolioError",
    "Image",
    "Incoming",
    "KhoError",
    "LeftOutError",
    "LuoAbiError",
    "LuoBusyError",
    "LuoError",
    "LuoExistsError",
    "LuoFileError",
    "LuoNotFoundError",
    "LuoPermissionError",
    "LuoRetrieveError",
    "LuoStateError",
    "LuoUnavailableError",
    "MemfdFolio",
    "Memory",
    "MisalignedError",
    "MissingMemoryError",
    "NoHandoverError",
    "NotCopyableError",
    "NotFoundError",
    "NotOwnerError",
    "NotRestorableError",
    "NotStorableError",
    "OrderError",
    "OutOfMemoryError",
    "OutOfRangeError",
    "Outgoing",
    "OutsideMemoryError",
    "OwnedPageError",
    "PageInfo",
    "PageStateError",
    "Pages",
    "ParameterError",
    "PfnArray",
    "Plan",
    "ReadOnlyError",
    "RunArray",
    "SchemaError",
    "ScratchOverlapError",
    "ScratchSpec",
    "Simulation",
    "Snapshot",
    "SnapshotSide",
    "SourceError",
    "StaleError",
    "Subtree",
    "Tracker",
    "UnsupportedAbiError",
    "UntrustedError",
    "__version__",
    "convert",
    "doctor",
    "fdt",
    "kho_is_enabled",
    "live",
    "luo",
    "open",
    "parse_kho_scratch",
    "plan",
    "save_elf",
    "simulate",
]
