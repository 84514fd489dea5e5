"""Finds the kernel of a handover among those whose VMCOREINFO is in its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ... import errors
from ..._kho import Incoming
from ...formats.luo import title
from .sessions import KernelFile, KernelState, read_state
from .vmcoreinfo import Vmcoreinfo

__all__ = ["KernelFound", "find_kernel", "kernel_of", "know_scratch", "session_files", "waiting_files"]

MOST_KERNELS = 16
"""Kernels that are read: after a handover, what the one before left may still be in memory."""


class KernelFound(NamedTuple):
    """The kernel in the memory of a handover, or why it cannot be read."""

    state: KernelState | None
    why: list[str]
    """Why other kernels, or the only one, cannot be read; empty without VMCOREINFO."""


_FOUND: WeakKeyDictionary[Incoming, KernelFound] = WeakKeyDictionary()


def find_kernel(inc: Incoming) -> KernelFound:
    """Read what the kernel in the memory of a handover tells of itself; once for each `Incoming`.

    Of several kernels, as after a live update, the last one counts: the one whose root FDT for the next kernel was
    not given to another one yet.
    """
    if inc not in _FOUND:
        states, why = [], []
        for state in _states(inc):
            if isinstance(state, str):
                why.append(state)
            else:
                states.append(state)
        given = {state.in_fdt for state in states}
        last = [state for state in states if state.out_fdt is None or state.out_fdt not in given]
        _FOUND[inc] = KernelFound(max(last, key=lambda state: state.out_fdt == inc.fdt_phys, default=None), why)
    return _FOUND[inc]


def kernel_of(inc: Incoming) -> KernelState | None:
    """Return what the kernel in the memory of a handover tells of itself; None if it has no symbols."""
    return find_kernel(inc).state


def _states(inc: Incoming) -> Iterator[KernelState | str]:
    """Yield each kernel whose VMCOREINFO is in the dump or in its memory, or why it cannot be read."""
    places = [None] if inc.vmcoreinfo("OSRELEASE") else inc.vmcoreinfo_pages[:MOST_KERNELS]
    for phys in places:
        try:
            yield read_state(inc, Vmcoreinfo(inc.vmcoreinfo) if phys is None else Vmcoreinfo.at(inc, phys))
        except errors.KhoError as error:
            yield str(error)


def know_scratch(inc: Incoming) -> None:
    """Use the kernel's own scratch areas, if no kernel was told of better ones (`Incoming.scratch_how`)."""
    if inc.scratch_how in ("given", "told"):
        return
    state = kernel_of(inc)
    if state is not None and state.scratch is not None and state.scratch_phys is not None:
        inc._know_scratch(state.scratch, state.scratch_phys)


def waiting_files(inc: Incoming) -> list[KernelFile]:
    """Return the files that the kernel got and that were not retrieved."""
    state = kernel_of(inc)
    return [] if state is None else [file for got, _, file in state.files() if got and not file.retrieved and file.data]


def session_files(inc: Incoming) -> dict[int, str]:
    """Return the name of session and file, by the address of what the file's handler wrote."""
    state = kernel_of(inc)
    if state is None:
        return {}
    return {
        file.data: f"{title(session.name)}, file {file.token:#x}" for _, session, file in state.files() if file.data
    }
