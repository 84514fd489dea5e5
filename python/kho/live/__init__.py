"""Memory that outlives its process: a restarted service finds its arrays in place, without a copy.

    >>> with kho.live.open("search-index", size="8G", version="2") as h:
    ...     if not h.inherited:
    ...         vectors = h.empty("vectors", (1_000_000, 768), "f4")
    ...         fill(vectors)
    ...         h.commit()
    ...     serve(h["vectors"])

Design
------
*The file* (`file/`). An image is the file of an arena (`kho.Arena`), so it is an ELF core, which `kho inspect` and any
ELF tool can read: a memfd that is sealed against shrinking and growing, a hugetlb memfd, or a file on tmpfs or pmem. An
object is one run of pages (virtually contiguous, since the memory is one segment), preserved as the folios of the
kernel's greedy split; large objects start at a multiple of 2 MiB. A kho-v4 handover with one subtree, `kho-live`, lists
the objects: names, dtypes, shapes, versions, checksums (`kho.formats.live`). It is kho-v4 because its subtrees have
sizes and its map does not depend on a bitmap size, which kho-v1 does not record. There is no pickle, and there are no
object dtypes.

*Commits.* A crash would tear a handover whose map is changed in place. So a commit builds all its metadata in private
memory (`file.metadata`) and copies them to free pages as one run. Then it fills one of two slots (generation, address,
checksum) and stores one aligned word: `fdt_phys` of the arena's note, which every reader of the file follows
(`file.header`). Memory that a committed generation refers to is neither written nor freed before a newer generation is
committed. Freed memory that is no longer read is punched out of the file, except for up to 1 MiB, to which the next
commits write (`file.space`, `file.pins`). A process that
is killed at any instruction leaves either the old word or the new one, so the word always leads to a complete
generation; there is no older generation to fall back to, and a reader refuses a file with a wrong checksum. A commit
that was cut short before its word is reported (`torn`, `dropped`).

*Readers* lock the generation that they read, and owners keep its memory (`file.pins`). Readers trust nothing.
Checksums of superblock, slots and metadata detect damage. Malice is detected by checks that do not rely on them: of
bounds, overlaps, dtypes and shapes, and that map and catalog agree. The time to attach depends on the number of
objects, not on their bytes. `verify` compares the objects' own checksums; a commit computes those of changed objects.

*Owners.* One process may change an image. It holds a `flock` on an open file description that nothing else refers to
(the file is opened once more through /proc/self/fd): the lock ends with the process, and forked children close it. A
successor first reads the image (`attach`), and adopts it once the owner has released it (`hand_over`), unless the owner
takes it back (`take_back`). Of several processes that try to lock it one succeeds; the others get BusyError.
`ownership` has the states.

*Transports* find an image by its name; a path or a descriptor needs none. `opening` asks them in this order:
descriptors that came with the process across exec or from a holder (`transports.environ`); the process that answers to
the name (`handover`); systemd's store (`transports.systemd`); the previous kernel (`transports.kexec`); the files that
ended processes have left (`handover.kept`). The owner of an image answers to its name, so that of several processes
that start at the same time one makes the image and the others find it.

*Handover by socket* (`handover/`). prepare: the owner passes a descriptor for reading and delays changes; the successor
checks the image. adopt: the owner unlocks the image and passes a descriptor for writing; the successor takes the lock,
and then the name. adopted: the owner tries to take the lock. If it fails, it drains. If it succeeds, or when the
connection breaks before, it goes on as the owner: the lock decides, not the messages. The connection stays open while
the previous owner, or a child of it, may be reading; until then the successor keeps what it replaces
(`handover.predecessor`).

*Files* with a name are checked on the opened descriptor before anything of them is used (`file.trust`). All waits of
`open` take from one deadline (`deadline`). `oserrors` turns errors of the operating system into kho's.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import SourceError

if sys.platform != "linux":
    raise SourceError("kho.live: Linux only: it needs memory files, seals and locks of open files")

from ..formats.live import Item
from . import transports
from .candidate import Candidate
from .file.trust import Trust
from .handle import Handle
from .opening import attach, open  # noqa: A004 - kho.live.open reads like open()
from .opening import size_of as size_of
from .reader import Reader
from .transports import kexec as kexec
from .transports.exec import execute as exec  # noqa: A004 - kho.live.exec reads like os.execv

__all__ = ["Candidate", "Handle", "Item", "Reader", "Trust", "attach", "exec", "open", "transports"]

if TYPE_CHECKING:
    from . import safetensors as safetensors


def __getattr__(name: str) -> Any:
    """Import the submodules that few programs need on first use."""
    if name == "safetensors":
        return import_module(".safetensors", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
