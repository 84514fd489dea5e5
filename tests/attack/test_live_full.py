"""On a full file system, every operation of kho.live and arenas succeeds or raises OutOfMemoryError, never a signal."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kho
import kho.live
from kho.live import Candidate, Handle

from livefiles import check_described, describe, sample

KIB = 1 << 10
SIZES = {"tmpfs": 4 << 20, "ext4": 8 << 20}
UNSHARED = "KHO_TEST_PRIVATE_MOUNTS"


def mounted(kind: str, where: Path) -> None:
    """Mount a small file system in the mount namespace of this process. Raises: OSError."""
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZES[kind]}", "tmpfs", str(where)]
    else:
        disk = where.with_suffix(".disk")
        with disk.open("wb") as file:
            file.truncate(SIZES[kind])
        made = subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", str(disk)], capture_output=True)
        if made.returncode:
            raise OSError(errno.ENOSYS, made.stderr.decode())
        command = ["mount", "-o", "loop", str(disk), str(where)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(errno.EPERM, done.stderr)


class Disk:
    """A small file system that can be filled to its last block."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.image = where / "image"

    def fill(self, leave: int = 0) -> None:
        """Allocate all blocks except `leave` bytes."""
        fd = os.open(self.where / "ballast", os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            at = os.fstat(fd).st_size
            for step in (1 << 20, 64 << 10, 4 << 10, 1 << 10):
                with contextlib.suppress(OSError):
                    while True:
                        at += os.pwrite(fd, b"x" * step, at)
            if leave:
                os.ftruncate(fd, max(os.fstat(fd).st_size - leave, 0))
            os.fsync(fd)
        finally:
            os.close(fd)

    def free(self) -> None:
        """Free the allocated blocks."""
        (self.where / "ballast").unlink(missing_ok=True)

    @contextlib.contextmanager
    def full(self, leave: int = 0) -> Iterator[None]:
        """Context manager: the file system is full within the block."""
        self.fill(leave)
        try:
            yield
        finally:
            self.free()


def tried(work: Callable[[], Any]) -> Any:
    """Call `work`; return its result, or its OutOfMemoryError."""
    try:
        return work()
    except kho.OutOfMemoryError as error:
        return error


def a_new_image(disk: Disk, chance: random.Random) -> None:
    """Create an image with too little space, for every amount of space, then with enough space."""
    for leave in (0, 4, 8, 16, 32, 60, 64, 68, 80, 100, 128, 132, 160, 200, 260, 400):
        with disk.full(leave * KIB):
            h = tried(lambda: kho.live.open("x", "2M", backing=disk.image))
            if isinstance(h, Handle):
                tried(lambda h=h: h.put("a", b"1" * 5000))  # type: ignore[misc]
                tried(h.commit)
                h.close()
        with kho.live.open("x", "2M", backing=disk.image) as again:
            again.put("b", b"2")
            again.commit()
            again.release()


def every_call(disk: Disk, chance: random.Random) -> None:
    """Random calls while the file system is full, nearly full or not; the owner may restart."""
    h = kho.live.open("x", "2M", backing=disk.image)
    made: dict[str, tuple[int, int]] = {}
    h.put("state", describe(made, 1))
    h.commit()
    now = dict(made)
    readers: list[tuple[Candidate, dict[str, tuple[int, int]]]] = []
    arrays: list[tuple[Any, bytes]] = []

    def settle() -> None:
        nonlocal now
        h.rollback()
        now = dict(made)

    for step in range(120):
        drawn = chance.random()
        if drawn < 0.15:
            disk.fill(chance.choice([0, 0, 4, 16, 100]) * KIB)
        elif drawn < 0.22:
            disk.free()
        what = chance.choice(
            ["put", "empty", "edit", "del", "commit", "commit", "rollback", "attach", "drop", "hold", "reopen", "core"]
        )
        name, seed, size = f"o{chance.randrange(5)}", chance.randrange(1000), chance.choice([0, 100, 5000, 200_000])
        try:
            if what in ("put", "empty"):
                if what == "put":
                    h.put(name, sample(seed, size))
                else:
                    h.empty(name, size)[:] = sample(seed, size)
                now[name] = (seed, size)
            elif what == "edit" and now.get(name, (0, 0))[1]:
                h.edit(name)[:] = sample(seed, now[name][1])
                now[name] = (seed, now[name][1])
            elif what == "del" and name in now:
                del h[name]
                del now[name]
            elif what == "commit" and now != made:
                h.put("state", describe(now, h.generation + 1))
                h.commit()
                made = dict(now)
            elif what == "rollback":
                settle()
            elif what == "attach":
                readers.append((kho.live.attach(disk.image), dict(made)))
            elif what == "drop":
                readers, arrays = readers[2:], arrays[2:]
            elif what == "hold" and now:
                name = chance.choice(sorted(now))
                arrays.append((h[name], sample(*now[name]).tobytes()))
            elif what == "reopen":
                h.close()
                h = kho.live.open("x", "2M", backing=disk.image)
                now = dict(made)
            elif what == "core":
                kho.open(disk.image)
        except kho.OutOfMemoryError:
            if what == "reopen":
                disk.free()
                h = kho.live.open("x", "2M", backing=disk.image)
            settle()
        assert sorted(set(h.names()) - {"state"}) == sorted(now), (step, what)
        for reader, there in readers:
            assert check_described(reader) == there, (step, what)
        for array, content in arrays:
            assert bytes(array) == content, (step, what)
    disk.free()
    settle()
    assert check_described(h) == made, "nothing committed is lost"
    arrays.clear()
    h.put("last", b"1")
    h.commit()
    held = h["state"]
    before = bytes(held)
    h.release()
    disk.fill()
    assert bytes(held) == before, "an array that is held keeps its content after a release"
    for reader, there in readers:
        assert check_described(reader) == there
        reader.close()
    disk.free()


def deleting(disk: Disk, chance: random.Random) -> None:
    """Deleting objects and committing works without a free block, and frees space."""
    h = kho.live.open("x", "3M", backing=disk.image)
    for i in range(40):
        h.put(f"o{i}", sample(i, 40_000))
    h.commit()
    disk.fill()
    for i in range(40):
        assert isinstance(tried(lambda i=i: h.put(f"n{i}", sample(i, 100_000))), kho.OutOfMemoryError) or i  # type: ignore[misc]
        h.rollback()
        del h[f"o{i}"]
        h.commit()
        disk.fill()
    assert h.names() == []
    disk.free()
    h.release()


def a_view_over_release(disk: Disk, chance: random.Random) -> None:
    """An array is held while its image is released and the file system fills."""
    h = kho.live.open("x", "2M", backing=disk.image)
    h.put("a", sample(1, 500_000))
    h.put("b", sample(2, 500_000))
    h.commit()
    edited = h.edit("b")
    held = np.asarray(h["a"])
    h.release()
    disk.fill()
    np.testing.assert_array_equal(held, sample(1, 500_000))
    edited[:] = 7
    disk.free()


def a_reader_of_what_is_replaced(disk: Disk, chance: random.Random) -> None:
    """A reader holds an array while its object is replaced, its image released, and the file system fills."""
    h = kho.live.open("x", "2M", backing=disk.image)
    h.put("a", sample(1, 500_000))
    h.commit()
    reader = kho.live.attach(disk.image)
    h.put("a", sample(2, 500_000))
    h.commit()
    disk.fill()
    np.testing.assert_array_equal(np.asarray(reader["a"]), sample(1, 500_000))
    disk.free()
    del h["a"]
    h.commit()
    h.release()
    disk.fill()
    np.testing.assert_array_equal(np.asarray(reader["a"]), sample(1, 500_000))
    reader.verify()
    with pytest.raises(kho.StaleError):
        reader.adopt()
    disk.free()


def a_copy_with_holes(disk: Disk, chance: random.Random) -> None:
    """Reading a sparse copy of an image on a full file system is refused or succeeds."""
    with kho.live.open("x", "2M", backing=disk.image) as h:
        h.put("zeros", bytes(800_000))
        h.put("ones", b"1" * 5000)
        h.commit()
    copy = disk.where / "copy"
    subprocess.run(["cp", "--sparse=always", disk.image, copy], check=True)
    disk.image.unlink()
    with disk.full():
        for opened in (lambda: kho.live.attach(copy), lambda: kho.live.open("x", backing=copy)):
            reader = tried(opened)
            if not isinstance(reader, kho.OutOfMemoryError):
                reader.verify()
                reader.close()
    with kho.live.open("x", backing=copy) as h:
        assert h.verify() == 805_000
        h.release()


def an_arena(disk: Disk, chance: random.Random) -> None:
    """A sparse arena larger than its file system allocates memory until the file system is full."""
    arena = kho.Arena("1G", scratch="1M,1M,1M", backing=str(disk.where / "arena"))
    folios = []
    with pytest.raises(kho.OutOfMemoryError):
        while True:
            folio = arena.alloc(order=chance.choice([0, 2, 4]))
            memoryview(folio)[:] = b"x" * folio.nbytes
            folios.append(folio)
    assert len(folios) > 20
    assert isinstance(tried(lambda: arena.alloc_at(512 << 20, order=8)), kho.OutOfMemoryError)
    out = tried(lambda: kho.Outgoing(arena, abi="kho-v1"))
    if not isinstance(out, kho.OutOfMemoryError):
        with contextlib.suppress(kho.OutOfMemoryError):
            for folio in folios[:5]:
                out.preserve_folio(folio)
            out.finalize()
    for folio in folios:
        assert bytes(memoryview(folio)[:3]) == b"xxx"
    del folio, folios
    (disk.where / "arena").unlink()


def an_arena_on_a_full_disk(disk: Disk, chance: random.Random) -> None:
    """Create an arena without enough space for it."""
    for leave in (0, 4, 8, 12, 16, 64):
        with disk.full(leave * KIB):
            made = tried(lambda: kho.Arena("64M", scratch="1M,1M,1M", backing=str(disk.where / "arena")))
            if not isinstance(made, kho.OutOfMemoryError):
                tried(lambda made=made: memoryview(made.alloc())[:1])  # type: ignore[misc]
        (disk.where / "arena").unlink(missing_ok=True)


STEPS = [
    a_new_image,
    every_call,
    deleting,
    a_view_over_release,
    a_reader_of_what_is_replaced,
    a_copy_with_holes,
    an_arena,
    an_arena_on_a_full_disk,
]


def run(step: str, kind: str, where: str, seed: int) -> None:
    """Main program of this file: run a step on a new file system."""
    try:
        mounted(kind, Path(where))
    except OSError as error:
        print(json.dumps({"skip": error.strerror}))
        return
    try:
        (chosen,) = [known for known in STEPS if known.__name__ == step]
        chosen(Disk(Path(where)), random.Random(seed))
    finally:
        shutil.rmtree(where, ignore_errors=True)
    print(json.dumps({"done": step}))


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_full_file_system_gives_only_out_of_memory_errors(
    step: Callable[[Disk, random.Random], None], kind: str, tmp_path: Path, attack_seconds: float, attack_seed: int
) -> None:
    where = tmp_path / "small"
    where.mkdir()
    tries = max(1, int(attack_seconds / 20)) if step is every_call else 1
    for seed in range(attack_seed, attack_seed + tries):
        program = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}; "
        program += f"import test_live_full as t; t.run({step.__name__!r}, {kind!r}, {str(where)!r}, {seed})"
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and '"skip"' in done.stdout:
            reason = json.loads(done.stdout.splitlines()[-1])["skip"]
            assert not (os.environ.get("CI") and kind == "tmpfs"), f"CI is root and can mount: {reason}"
            pytest.skip(f"{kind} cannot be mounted here: {reason}")
        if done.returncode and os.geteuid() and "unshare" in done.stderr:
            pytest.skip(f"cannot create a mount namespace: {done.stderr.strip()}")
        assert done.returncode == 0, f"seed {seed}: exit {done.returncode} (-7 is SIGBUS)\n{done.stderr[-3000:]}"
