"""A process that holds an array is restarted: how long until its successor has read the first element.

    python benches/live.py [--json]          KHO_LIVE_BYTES=4G for the size; 256M by default
    python benches/live.py --readers         what being read costs an owner that commits

Each successor is a process of its own that has imported what it needs: milliseconds to attach or load, and then to
read three elements; page faults while it did both, memory of its own afterwards, and time since its exec. Then all of
the contents are summed up and compared. Files are on tmpfs, so that no disk is measured. Bytes are copied where memory
of its own grows with the size.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np

import kho.live
from kho.live import size_of

CHILD = """
import json, resource, sys, time, zlib
started = float(sys.argv[1])
import mmap, pickle
from multiprocessing import resource_tracker, shared_memory
import numpy as np
import kho.live
source, nbytes, crc = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

own, before, begin = anonymous(), faults(), time.perf_counter()
{load}
attached = time.perf_counter()
first = int(array[0]), int(array[len(array) // 2]), int(array[-1])
read = time.perf_counter()
after, since = faults(), time.monotonic() - started
grown = anonymous() - own
same = array.nbytes == nbytes and zlib.crc32(array) == crc
print(json.dumps(dict(attach_ms=(attached - begin) * 1e3, first_read_ms=(read - attached) * 1e3, faults=after - before,
                      own_bytes=grown, from_exec_ms=since * 1e3, verified=same)))
{end}
"""
Prepare = Callable[[Path, "np.ndarray[Any, np.dtype[np.uint64]]"], Any]


def contents(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Make numbers that are all different."""
    array = np.arange(nbytes // 8, dtype=np.uint64)
    array *= np.uint64(0x9E3779B97F4A7C15)
    return array


@contextmanager
def memfd(_: Path, array: np.ndarray[Any, Any]) -> Iterator[str]:
    """An image on a memfd, which the process that starts the successor passes on."""
    with kho.live.open("bench", array.nbytes + (64 << 20)) as h:
        h.put("array", array)
        h.commit()
        fd = os.dup(h.fileno())
    yield str(fd)
    os.close(fd)


@contextmanager
def tmpfs(path: Path, array: np.ndarray[Any, Any]) -> Iterator[str]:
    """An image on tmpfs."""
    with kho.live.open("bench", array.nbytes + (64 << 20), backing=path) as h:
        h.put("array", array)
        h.commit()
    yield str(path)
    with kho.live.open("bench", backing=path) as h:
        h.release()


@contextmanager
def pickled(path: Path, array: np.ndarray[Any, Any]) -> Iterator[str]:
    """A pickle on tmpfs."""
    with path.open("wb") as file:
        pickle.dump(array, file, protocol=5)
    yield str(path)
    path.unlink()


@contextmanager
def saved(path: Path, array: np.ndarray[Any, Any]) -> Iterator[str]:
    """A .npy on tmpfs."""
    with path.open("wb") as file:
        np.save(file, array)
    yield str(path)
    path.unlink()


@contextmanager
def shared(_: Path, array: np.ndarray[Any, Any]) -> Iterator[str]:
    """A multiprocessing.shared_memory."""
    memory = shared_memory.SharedMemory(create=True, size=array.nbytes)
    there: np.ndarray[Any, Any] = np.ndarray(array.shape, array.dtype, memory.buf)
    there[:] = array
    del there
    yield memory.name
    memory.close()
    memory.unlink()


KHO = 'h = kho.live.open("bench", backing={})\narray = h["array"]'
SHARED = "memory = shared_memory.SharedMemory(source)\narray = np.ndarray(nbytes // 8, np.uint64, memory.buf)"
# Attached memory would be unlinked, with a warning, when the process ends (fixed by track= in Python 3.13).
END = 'resource_tracker.unregister(memory._name, "shared_memory"); del array; memory.close()'
WAYS: list[tuple[str, Any, str, str]] = [
    ("kho.live, memfd", memfd, KHO.format("int(source)"), ""),
    ("kho.live, tmpfs", tmpfs, KHO.format("source"), ""),
    ("shared_memory", shared, SHARED, END),
    ("np.load(mmap_mode)", saved, 'array = np.load(source, mmap_mode="r")', ""),
    ("np.load", saved, "array = np.load(source)", ""),
    ("pickle.load", pickled, "with open(source, 'rb') as file: array = pickle.load(file)", ""),
]


def measure(source: str, load: str, end: str, nbytes: int, crc: int) -> dict[str, Any]:
    """Start a successor; the best of three, but for the large ones that copy."""
    program = CHILD.replace("{load}", load).replace("{end}", end)
    runs = []
    while len(runs) < 3 and sum(run["attach_ms"] for run in runs) < 2000:
        args = [sys.executable, "-c", program, str(time.monotonic()), source, str(nbytes), str(crc)]
        fds = (int(source),) if source.isdecimal() else ()
        done = subprocess.run(args, check=True, capture_output=True, text=True, pass_fds=fds)
        runs.append(json.loads(done.stdout))
    if not all(run["verified"] for run in runs):
        raise SystemExit(f"{load}: the contents are not those that were left")
    best: dict[str, Any] = min(runs, key=lambda run: float(run["attach_ms"] + run["first_read_ms"]))
    return best


SIZES = (8, 250_000)
"""Bytes of the object that an owner replaces with each commit while it is read."""


def read_image(path: Path, nbytes: int) -> None:
    """Attach, read everything, and close."""
    with kho.live.attach(path) as candidate:
        candidate.verify()


def read_file(path: Path, nbytes: int) -> None:
    """Read a plain file the same way: mapped, and summed up."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        zlib.crc32(mapped)


IDLE, SPIN, OTHER, OWN = range(4)
"""What the other processes do during a phase: sleep; compute; read another image; read the image that is replaced."""


def work(read: Callable[[Path, int], None], paths: tuple[Path, Path], nbytes: int, phase: Any, count: Any) -> None:
    """Do what the phase says until it is negative, and count what was read of the image that is replaced."""
    while (now := phase.value) >= 0:
        if now == IDLE:
            time.sleep(0.001)
        elif now == SPIN:
            sum(range(2000))
        else:
            read(paths[now == OTHER], nbytes)
            if now == OWN:
                count.value += 1


def plain_writer(path: Path, nbytes: int) -> Callable[[int], None]:
    """Make what replaces contents in a plain file as an image does: allocate new pages, write, punch the old ones."""
    pages = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 2 * pages)
    c = ctypes.CDLL(None, use_errno=True)
    punch_hole_keep_size = 3

    def replace(i: int) -> None:
        at, old = (i & 1) * pages, (1 - (i & 1)) * pages
        os.posix_fallocate(file, at, pages)
        os.pwrite(file, bytes([i % 251]) * nbytes, at)
        if c.fallocate(file, punch_hole_keep_size, ctypes.c_long(old), ctypes.c_long(pages)):
            raise OSError(ctypes.get_errno(), "fallocate")

    return replace


def readers() -> None:
    """Print what being read costs an owner that commits, and the writer of a plain file.

    The measure is the owner's processor time per commit, not its rate: with as many busy processes as processors, the
    rate depends on the scheduler, whatever they do. It is compared with that of the same owner while the same number of
    processes does something else: they sleep, compute, or read another image, and so take the same share of the
    processors and caches as readers of the image do. Part of the cost of being read is the machine's: memory that
    another processor has read is slower to write again. The plain file, which nothing protects from torn reads, has
    this cost alone.
    """
    print("processor time of a commit while processes ...                      of being read, to that")
    print("   object            sleep     spin  read other  are readers    sleep   spin  other     wall   attaches/s")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for nbytes in SIZES:
            path, other = Path(folder) / f"image-{nbytes}", Path(folder) / f"other-{nbytes}"
            with kho.live.open("bench", "64M", backing=path) as h, kho.live.open("other", "64M", backing=other) as same:
                same.put("a", bytes(nbytes))
                same.commit()

                def commit(i: int, h: kho.live.Handle = h, nbytes: int = nbytes) -> None:
                    h.put("a", bytes([i % 251]) * nbytes)
                    h.commit()

                commit(0)
                for n in (1, 2):
                    compare(f"{nbytes:9}, {n}", commit, read_image, (path, other), nbytes, n)
        plain, other = Path(folder) / "plain", Path(folder) / "other"
        plain.write_bytes(bytes(2 * SIZES[-1]))
        other.write_bytes(bytes(2 * SIZES[-1]))
        for n in (1, 2):
            compare(
                f"{SIZES[-1]:9}, {n}, file", plain_writer(plain, SIZES[-1]), read_file, (plain, other), SIZES[-1], n
            )


def compare(
    row: str,
    replace: Callable[[int], None],
    read: Callable[[Path, int], None],
    paths: tuple[Path, Path],
    nbytes: int,
    n: int,
) -> None:
    """Print what `replace` costs in each phase of `n` other processes, and the medians of the ratios.

    A round is a short phase of each kind, in an order that rotates; a ratio is of two phases of one round. So what
    other programs do to the machine in the meantime changes both.
    """
    context = multiprocessing.get_context("spawn")
    rounds, commits = int(os.environ.get("KHO_LIVE_ROUNDS", "60")), 100
    phase, counts = context.Value("i", OWN, lock=False), [context.Value("q", 0, lock=False) for _ in range(n)]
    processes = [context.Process(target=work, args=(read, paths, nbytes, phase, count)) for count in counts]
    for process in processes:
        process.start()
    while not all(count.value for count in counts):
        time.sleep(0.01)
    used: dict[int, list[float]] = {kind: [] for kind in range(4)}
    took: dict[int, list[float]] = {kind: [] for kind in range(4)}
    reads = 0
    for at in range(rounds):
        for kind in sorted(range(4), key=lambda kind: (kind + at) % 4):
            phase.value = kind
            time.sleep(0.005)
            before, cpu, wall = sum(count.value for count in counts), time.process_time(), time.perf_counter()
            for i in range(commits):
                replace(i)
            used[kind].append((time.process_time() - cpu) / commits * 1e6)
            took[kind].append(time.perf_counter() - wall)
            reads += sum(count.value for count in counts) - before
    phase.value = -1
    for process in processes:
        process.join()
    us = [statistics.median(used[kind]) for kind in range(4)]
    ratios = [
        statistics.median(own / base for own, base in zip(used[OWN], used[kind], strict=True)) for kind in range(3)
    ]
    wall = statistics.median(own / base for own, base in zip(took[OWN], took[SPIN], strict=True))
    print(
        f"{row:18}{us[IDLE]:6.0f} us{us[SPIN]:6.0f} us {us[OTHER]:8.0f} us {us[OWN]:9.0f} us  {ratios[IDLE]:7.2f}"
        f"{ratios[SPIN]:7.2f}{ratios[OTHER]:7.2f}  {wall:7.2f} {reads / sum(took[OWN]):12.0f}",
        flush=True,
    )


def main() -> None:
    """Measure every way, print a table or JSON."""
    if sys.argv[1:] == ["--readers"]:
        readers()
        return
    nbytes = size_of(os.environ.get("KHO_LIVE_BYTES", "256M"))
    array = contents(nbytes)
    crc = zlib.crc32(array)
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name, prepare, load, end in WAYS:
            began = time.perf_counter()
            with prepare(Path(folder) / "file", array) as source:
                prepared = time.perf_counter() - began
                rows.append({"way": name, "prepare_s": prepared, **measure(source, load, end, nbytes, crc)})
    for row in rows:
        row["total_ms"] = row["attach_ms"] + row["first_read_ms"]
        row["ratio"] = row["total_ms"] / rows[0]["total_ms"]
    if sys.argv[1:] == ["--json"]:
        print(json.dumps({"nbytes": nbytes, "rows": rows}, indent=1))
        return
    print(f"{nbytes >> 20} MiB           attach  first read     faults   own memory  from exec    ratio")
    for row in rows:
        print(
            f"{row['way']:19}{row['attach_ms']:9.2f} ms {row['first_read_ms']:8.3f} ms {row['faults']:10} "
            f"{row['own_bytes'] >> 10:8} KiB {row['from_exec_ms']:7.0f} ms {row['ratio']:8.1f}"
        )


if __name__ == "__main__":
    main()
