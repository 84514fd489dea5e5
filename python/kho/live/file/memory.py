"""Limits on the memory that an image can allocate: memory cgroups and pools of huge pages.

tmpfs and memfd pages are charged to the memory cgroup of the process that allocates them, and stay charged. If they
exceed the limit of that cgroup or of an ancestor, the OOM killer kills a process of the group: no call fails. So the
limits are read first. What the kernel reclaims before it kills counts as free: the page cache and reclaimable slab of
the group, and swap, to which these pages can go. `memory.high` only throttles a group, so it is not a limit here.

    cgroup v2   memory.max             memory.current         memory.stat: inactive_file, active_file, slab_reclaimable
    cgroup v1   memory.limit_in_bytes  memory.usage_in_bytes  the same, total_inactive_file ...; memory.memsw.*
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import OutOfMemoryError
from ...sizes import format_size as _size

__all__ = ["Limit", "Meter", "Places", "check", "check_pinned", "huge_pool", "limits", "outside_scratch", "unallocated"]

UNLIMITED = 1 << 62
"""Bytes. A cgroup v1 without a limit has one near 2**63."""
RECLAIMED = ("inactive_file", "active_file", "slab_reclaimable")
RECLAIMED_V1 = ("total_inactive_file", "total_active_file")
DEEPEST = 64
"""Most levels of nested cgroups that are read."""
STEP = 1 << 20
"""Bytes that may be allocated between two checks of the limits."""


@dataclass(frozen=True)
class Places:
    """The kernel's files on memory; tests use others."""

    cgroups: Path = Path("/sys/fs/cgroup")
    own: Path = Path("/proc/self/cgroup")
    meminfo: Path = Path("/proc/meminfo")
    hugepages: Path = Path("/sys/kernel/mm/hugepages")


PLACES = Places()


@dataclass(frozen=True)
class Limit:
    """A memory cgroup that has a limit; sizes in bytes."""

    path: Path
    limit: int
    current: int
    reclaimable: int
    """Page cache and slab that the kernel reclaims before it kills."""
    swap: int
    """Bytes that may go to swap."""

    @property
    def left(self) -> int:
        """Bytes that may be allocated before the kernel kills."""
        return max(self.limit - self.current + min(self.reclaimable, self.current), 0) + self.swap


def _number(file: Path) -> int | None:
    """Read a number; None for "max", or if the file is missing or malformed."""
    with contextlib.suppress(OSError, ValueError):
        number = int(file.read_bytes()[:32])
        return number if 0 <= number < UNLIMITED else None
    return None


def _table(file: Path) -> dict[str, int]:
    """Read lines of `name number`, or `name: number kB`."""
    table: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_bytes()[: 64 << 10].decode(errors="replace").splitlines():
            words = line.replace(":", " ").split()
            if len(words) >= 2:
                table[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return table


def limits(places: Places | None = None) -> Iterator[Limit]:
    """Iterate over the memory cgroups of this process that have a limit: its own first, then its ancestors."""
    places = places or PLACES
    try:
        lines = places.own.read_bytes()[: 64 << 10].decode(errors="surrogateescape").splitlines()
    except OSError:
        return
    swap = _table(places.meminfo).get("SwapFree", 0)
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            for base in (places.cgroups, places.cgroups / "unified"):
                for folder in _upwards(base, group):
                    yield from _v2(folder, swap)
        elif "memory" in controllers.split(","):
            for folder in _upwards(places.cgroups / "memory", group):
                yield from _v1(folder, swap)


def _upwards(base: Path, group: str) -> Iterator[Path]:
    """Iterate over a group's directory and its ancestors, as far as this mount shows them.

    In a container the group may have the name that the host sees, while the mount shows only the container's own.
    """
    parts = [part for part in os.path.normpath("/" + group).split("/") if part][:DEEPEST]
    for n in range(len(parts), -1, -1):
        yield Path(base, *parts[:n])


def _v2(folder: Path, swap: int) -> Iterator[Limit]:
    limit, current = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or current is None:
        return
    stat = _table(folder / "memory.stat")
    most = _number(folder / "memory.swap.max")
    if most is not None:
        swap = min(swap, max(most - (_number(folder / "memory.swap.current") or 0), 0))
    yield Limit(folder, limit, current, sum(stat.get(name, 0) for name in RECLAIMED), swap)


def _v1(folder: Path, swap: int) -> Iterator[Limit]:
    limit, current = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or current is None:
        return
    stat = _table(folder / "memory.stat")
    both, used = _number(folder / "memory.memsw.limit_in_bytes"), _number(folder / "memory.memsw.usage_in_bytes")
    if both is not None and used is not None:
        swap = min(swap, max(both - limit - max(used - current, 0), 0))
    yield Limit(folder, limit, current, sum(stat.get(name, 0) for name in RECLAIMED_V1), swap)


def check(nbytes: int, what: str, places: Places | None = None) -> None:
    """Check that memory cgroups allow an allocation, as far as their limits can be read.

    Args: nbytes: bytes to allocate. what: the place and the act, for the message.
    Raises: OutOfMemoryError with the cgroup, its limit, what it has in use, and what is needed.
    """
    for limit in limits(places):
        if nbytes > limit.left:
            raise OutOfMemoryError(
                f"{what} needs {_size(nbytes)}, and the memory cgroup {limit.path} has {_size(limit.left)} left: limit "
                f"{_size(limit.limit)}, in use {_size(limit.current)}; {_size(limit.reclaimable)} of this can be "
                f"reclaimed, swap {_size(limit.swap)}; the kernel would kill a process of it. Raise the limit "
                "(MemoryMax=, `docker run --memory`, resources.limits.memory), or free memory"
            )


def unallocated(fd: int, nbytes: int) -> int:
    """Return how many of `nbytes` of a file would be charged to a memory cgroup, at most.

    0 for a file on a disk, whose pages are page cache, and for huge pages, which are taken from a pool.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
            return 0
        status = os.fstat(fd)
    except OSError:
        return 0
    return min(nbytes, max(status.st_size - status.st_blocks * 512, 0))


def outside_scratch(places: Places | None = None) -> int | None:
    """Return the bytes of memory that can be pinned for long; None if /proc/meminfo does not tell.

    This is MemAvailable without free scratch. No long-term pin is in scratch, whose pageblocks are of type MIGRATE_CMA:
    their free pages count as CmaFree, but their size not as CmaTotal.
    """
    table = _table((places or PLACES).meminfo)
    if "MemAvailable" not in table:
        return None
    return max(table["MemAvailable"] - max(table.get("CmaFree", 0) - table.get("CmaTotal", 0), 0), 0)


def _is_whole(fd: int, size: int) -> bool:
    """Return whether a file has no hole; its position stays. Memory that was allocated and never written is a hole."""
    try:
        at = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            return os.lseek(fd, 0, os.SEEK_HOLE) >= size
        finally:
            os.lseek(fd, at, os.SEEK_SET)
    except OSError:
        return False


def check_pinned(fd: int, what: str, places: Places | None = None) -> None:
    """Check that there is memory to allocate all of a memfd and pin it, as a live update session does.

    Warns (RuntimeWarning) of a memory cgroup whose limit is below the file's size: in the next kernel, retrieving the
    file charges all of it at once.
    Raises: OutOfMemoryError with what is needed and available: the OOM killer would end this process, or others.
    """
    size = os.fstat(fd).st_size
    # Before Linux 7.1 the blocks of a retrieved memfd are too few: a large folio counts as one page.
    nbytes = 0 if _is_whole(fd, size) else unallocated(fd, size)
    check(nbytes, what, places)
    available = outside_scratch(places)
    if available is not None and nbytes > available:
        raise OutOfMemoryError(
            f"{what} needs {_size(nbytes)}, all at once, and {_size(available)} are available outside KHO's scratch "
            "areas, in which nothing can be pinned (MemAvailable - (CmaFree - CmaTotal) of /proc/meminfo); the kernel "
            "would kill processes. Take a smaller size=, or free memory; `kho doctor` shows what scratch takes"
        )
    for limit in limits(places):
        if size > limit.limit:
            warnings.warn(
                f"{what}: {_size(size)} are more than the limit of the memory cgroup {limit.path}, "
                f"{_size(limit.limit)}: the next kernel charges them at once to the process that retrieves them, and "
                "kills it at that limit, with the image. Raise the limit (MemoryMax=)",
                RuntimeWarning,
                stacklevel=4,
            )
            break


class Meter:
    """Checks the limits for an image's allocations, once per `STEP` bytes: reading them for each is slow."""

    def __init__(self) -> None:
        self._since = STEP

    def check(self, fd: int, nbytes: int, what: str) -> None:
        """Count an allocation, and check it if it is time. Raises: OutOfMemoryError."""
        if self._since + nbytes < STEP:
            self._since += nbytes
            return
        check(unallocated(fd, nbytes), what)
        self._since = 0


def huge_pool(fd: int, places: Places | None = None) -> str:
    """Return the state of the pool of a file's huge pages, and how to enlarge it; "" for normal pages."""
    try:
        size = os.fstatvfs(fd).f_bsize
    except OSError:
        return ""
    if size <= mmap.PAGESIZE:
        return ""
    pool = (places or PLACES).hugepages / f"hugepages-{size >> 10}kB"
    total, free, reserved, more = (
        _number(pool / name) for name in ("nr_hugepages", "free_hugepages", "resv_hugepages", "nr_overcommit_hugepages")
    )
    if total is None:
        return f"this kernel has no pool of huge pages of {_size(size)}"
    return (
        f"vm.nr_hugepages is {total}, {free} are free ({reserved} of these reserved), with {more} more on "
        f"demand (vm.nr_overcommit_hugepages), {_size(size)} each; enlarge the pool, `sysctl vm.nr_hugepages=N`, "
        "or use backing='memfd'"
    )
