"""Names without a vmlinux: a kernel's own symbols and types, read from a dump of its memory.

VMCOREINFO leads to the kernel's table of symbols (`kallsyms`), and that one to its description of types (`btf`). With
both, the variables of KHO and LUO are found and walked (`sessions`): the sessions that the next kernel will get, before
the kernel writes them into the handover. A kernel that has none of it is read without.

>>> kernel = kernel_of(kho.open("vmcore"))
>>> [(session.name, file.token) for session in kernel.outgoing for file in session.files]
[('vm-1', 16), ('vm-1', 17)]
"""

from __future__ import annotations

from .find import KernelFound, find_kernel, kernel_of, know_scratch, session_files, waiting_files
from .sessions import SOURCE, KernelFile, KernelSession, KernelState

__all__ = [
    "SOURCE",
    "KernelFile",
    "KernelFound",
    "KernelSession",
    "KernelState",
    "find_kernel",
    "kernel_of",
    "know_scratch",
    "session_files",
    "waiting_files",
]
