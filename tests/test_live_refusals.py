"""kho.live: errors of the operating system name the limit; the lock, not messages, decides who owns an image."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import resource
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import kho
import kho.live
from kho.live import Handle, oserrors
from kho.live.file import memory
from kho.live.file.memory import Limit, Places
from kho.live.handover import client, registry, server, wire
from kho.live.handover import sockets as runtime

from livefiles import Channel, child, descriptors, ended, filled, folder, goes_on, process, service, wait_until

MIB = 1 << 20
OTHER = 65534
ERRNOS = {
    errno.EMFILE: (kho.DescriptorLimitError, "RLIMIT_NOFILE"),
    errno.ENFILE: (kho.DescriptorLimitError, "fs.file-max"),
    errno.ENOMEM: (kho.OutOfMemoryError, "no memory left|size="),
    errno.ENOSPC: (kho.OutOfMemoryError, "df|XDG_RUNTIME_DIR|size="),
    errno.EDQUOT: (kho.OutOfMemoryError, "quota|XDG_RUNTIME_DIR"),
    errno.EROFS: (kho.ReadOnlyError, "read-only|XDG_RUNTIME_DIR"),
    errno.EACCES: (kho.AccessError, "user 0 may not|XDG_RUNTIME_DIR|memfd_noexec|may not"),
}
CALLS: list[tuple[Any, str]] = [
    (os, "open"),
    (os, "memfd_create"),
    (os, "link"),
    (os, "ftruncate"),
    (os, "posix_fallocate"),
    (os, "eventfd"),
    (os, "rename"),
    (Path, "mkdir"),
    (socket, "socket"),
    (fcntl, "flock"),
]


class Refused:
    """A function whose call number `step` fails."""

    def __init__(self, real: Any, step: int, number: int) -> None:
        self.real, self.left, self.number, self.failed = real, step, number, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call, or fail."""
        self.left -= 1
        if self.left == -1:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("number", list(ERRNOS))
@pytest.mark.parametrize("kind", ["memfd", "path"])
@pytest.mark.parametrize(("place", "name"), CALLS)
def test_an_error_of_any_call_names_the_limit(
    number: int, kind: str, place: Any, name: str, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of a kind that `open` makes, one after the other, is refused."""
    made, remedy = ERRNOS[number]
    for step in range(50):
        with contextlib.suppress(OSError):
            sockets.rmdir()
        before, fails = descriptors(), Refused(getattr(place, name), step, number)
        with folder() as here:
            try:
                with monkeypatch.context() as patched:
                    patched.setattr(place, name, lambda *args, fails=fails, **kwargs: fails(*args, **kwargs))
                    backing = here / "image" if kind == "path" else "memfd"
                    with kho.live.open("x", "1M", backing=backing, serve=True) as h:
                        h.put("a", bytes(100_000))
            except kho.KhoError as error:
                assert fails.failed
                assert isinstance(error, made), (step, error)
                assert os.strerror(number) in str(error), step
                assert re.search(remedy, str(error)), (step, error)
                if made is kho.DescriptorLimitError:
                    assert "directory of your own" not in str(error)
                if isinstance(error, OSError):
                    assert error.errno == number
            assert descriptors() <= before, step
        if not fails.failed:
            break
    assert step < 49


def limited(free: int, work: Callable[[], object]) -> None:
    """Call something with that many descriptors left."""
    used = max(int(fd) for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + 200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    fill = []
    with contextlib.suppress(OSError):
        while True:
            fill.append(os.open("/", os.O_PATH))
    for _ in range(free):
        os.close(fill.pop())
    work()


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("how", ["new", "path", "successor", "readable"])
def test_with_any_number_of_descriptors_left_open_works_or_names_the_limit(how: str, tmp_path: Path) -> None:
    def once(line: Channel, free: int) -> None:
        def work() -> None:
            try:
                if how == "readable":
                    registry.readable("x")
                elif how == "path":
                    kho.live.open("y", "1M", backing=tmp_path / f"image{free}").close()
                else:
                    kho.live.open("x" if how == "successor" else "y", "1M").close()
            except kho.DescriptorLimitError as error:
                assert "RLIMIT_NOFILE" in str(error)
                line.say("limit")
            else:
                line.say("done")

        limited(free, work)

    answers = []
    for free in range(30):
        with filled() as old, process(lambda line, free=free: once(line, free)) as other:  # type: ignore[misc]
            answers.append(other.hear()[0])
            if answers[-1] == "limit":
                wait_until(lambda: old.ask("phase") != "transferring")
                goes_on(old)
        if answers[-2:] == ["done", "done"]:
            break
    assert answers[0] == "limit"
    assert answers == sorted(answers, reverse=True), "from a number on it works"
    assert answers[-1] == "done"


def test_every_errno_keeps_its_message_and_kho_errors_are_unchanged() -> None:
    for number in errno.errorcode:
        made = oserrors.error_of(OSError(number, os.strerror(number)), "here", "try")
        assert str(made).startswith(f"here: try: {os.strerror(number)}")
        assert isinstance(made, kho.KhoError)
    own = kho.SourceError("own")
    assert oserrors.error_of(own, "here") is own
    assert type(oserrors.error_of(OSError(errno.EIO, "Input/output error"), "here")) is kho.SourceError


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    def work() -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):  # CLONE_NEWNS; MS_REC | MS_PRIVATE
            return
        assert libc.mount(b"t", os.fsencode(tmp_path), b"tmpfs", 1, None) == 0  # MS_RDONLY
        with pytest.raises(kho.ReadOnlyError, match=r"Read-only file system \(EROFS\).*take a path on another one"):
            kho.live.open("x", "1M", backing=tmp_path / "image")

    assert ended(child(work)) == 0


def test_a_file_size_limit_is_named(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
        with pytest.raises(kho.OutOfMemoryError, match="ulimit -f"):
            kho.live.open("x", "8M", backing=tmp_path / "image")

    assert ended(child(work)) == 0


def test_an_empty_pool_of_huge_pages_is_named(tmp_path: Path) -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists() or int(free.read_text()):
        pytest.skip("needs a kernel whose pool of huge pages is empty")
    with pytest.raises(kho.OutOfMemoryError, match=r"vm.nr_hugepages is \d+, 0 are free.*sysctl vm.nr_hugepages=N"):
        kho.live.open("x", "4M", backing="hugetlb")


def test_the_pool_of_huge_pages_is_read_where_the_kernel_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tmp_path / "hugepages-2048kB"
    fd = os.memfd_create("x")
    assert memory.huge_pool(fd) == "", "normal pages have no pool"
    real = os.fstatvfs(fd)
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((2 * MIB, *real[1:])))
    assert "no pool" in memory.huge_pool(fd, Places(hugepages=tmp_path))
    pool.mkdir()
    for name, value in (("nr", 8), ("free", 3), ("resv", 2), ("nr_overcommit", 1)):
        (pool / f"{name}_hugepages").write_text(f"{value}\n")
    text = memory.huge_pool(fd, Places(hugepages=tmp_path))
    assert "vm.nr_hugepages is 8, 3 are free (2 of these reserved), with 1 more" in text
    os.close(fd)


# Directories


@pytest.mark.parametrize("umask", [0o777, 0o700, 0o277, 0])
def test_no_umask_makes_the_runtime_directory_unusable(umask: int) -> None:
    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(OTHER)
        os.umask(umask)
        for _ in range(2):
            with kho.live.open("x", "1M") as h:
                assert h.served
                assert stat.S_IMODE(runtime.folder().stat().st_mode) == 0o700
        with contextlib.suppress(OSError):
            runtime.folder().chmod(0)
        with kho.live.open("x", "1M") as h:
            assert h.served, "one's own directory is repaired"

    with folder() as here:
        here.chmod(0o1777)
        run = here / "run"
        run.mkdir()
        run.chmod(0o1777)
        with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": str(run), "KHO_LIVE_DIR": str(run / "kho")}):
            assert ended(child(work)) == 0


@pytest.mark.parametrize("kind", ["missing", "file", "relative", "empty"])
def test_an_unusable_xdg_runtime_dir_is_ignored(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    fallback = runtime.folder()
    (tmp_path / "file").touch()
    named = {"missing": str(tmp_path / "none"), "file": str(tmp_path / "file"), "relative": "run", "empty": ""}[kind]
    monkeypatch.setenv("XDG_RUNTIME_DIR", named)
    assert runtime.folder() == fallback
    assert fallback.parent.is_dir()


# The lock decides


@pytest.mark.usefixtures("sockets")
def test_adopted_is_refused_while_the_lock_is_free() -> None:
    with filled() as old:
        for _ in range(3):
            conn = runtime.connect("x")
            assert conn is not None
            with conn:
                _, (fd,) = wire.ask(conn, {"do": "prepare", "name": "x", "version": "1"}, fds=1)
                _, fds = wire.ask(conn, {"do": "adopt"}, fds=9)
                with pytest.raises(wire.WireError, match="lock of 'x' was free: no process has adopted it"):
                    wire.ask(conn, {"do": "adopted"})
                for one in (fd, *fds):
                    os.close(one)
                goes_on(old)
        assert old.ask("handed over", 0) is False
        with kho.live.open("x", timeout=10) as h:
            assert bytes(h["a"]) == b"one"
            assert old.ask("handed over", 5)


def answers(name: str) -> bool:
    """Whether a process listens at a name; the connection is closed."""
    conn = runtime.connect(name)
    if conn is not None:
        conn.close()
    return conn is not None


@pytest.mark.usefixtures("sockets")
def test_an_owner_whose_image_has_a_new_generation_stops_answering() -> None:
    with filled() as old:
        conn = runtime.connect("x")
        assert conn is not None
        with conn:
            _, (fd,) = wire.ask(conn, {"do": "prepare", "name": "x", "version": "1"}, fds=1)
            wire.ask(conn, {"do": "adopt"})
            with kho.live.attach(fd).adopt() as h:
                h.put("b", b"two")
                h.commit()
            with pytest.raises(wire.WireError):
                wire.ask(conn, {"do": "adopted"})
        assert old.ask("handed over", 5)
        wait_until(lambda: not answers("x"))
        os.close(fd)


@pytest.mark.usefixtures("sockets")
def test_prepare_passes_a_read_only_descriptor_and_adopt_a_writable_one() -> None:
    with filled() as old:
        conn = runtime.connect("x")
        assert conn is not None
        with conn:
            _, (fd,) = wire.ask(conn, {"do": "prepare", "name": "x", "version": "1"}, fds=1)
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 4096)
            with kho.live.attach(fd) as reader:
                assert bytes(reader["a"]) == b"one"
            os.close(fd)
        wait_until(lambda: old.ask("phase") != "transferring")
        with kho.live.open("x", timeout=5) as h:
            h.put("b", b"two")
            assert h.commit() == 2
            assert fcntl.fcntl(h.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize("passes", ["nothing", "another file"])
def test_a_successor_opens_the_image_itself_where_its_owner_passes_none(passes: str) -> None:
    def odd(line: Channel) -> None:
        owners: Any = server.Owner
        transfer = owners.transfer
        other = os.memfd_create("other")
        owners.transfer = lambda self: (transfer(self)[0], [] if passes == "nothing" else [other, 0])
        service(line)

    with process(odd) as old:
        assert old.hear()[0] == "new"
        before = descriptors()
        with kho.live.open("x", timeout=5) as h:
            h.put("b", b"two")
            assert h.commit() == 1
        del h
        assert descriptors() <= before
    assert client.MOST_PASSED == 9


# Memory cgroups


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A machine of memory cgroups without swap."""
    made = Places(tmp_path / "cgroup", tmp_path / "own", tmp_path / "meminfo", tmp_path / "hugepages")
    made.cgroups.mkdir()
    made.meminfo.write_text("MemTotal: 1000 kB\nSwapFree: 0 kB\n")
    monkeypatch.setattr(memory, "PLACES", made)
    return made


def group(place: Path, *, v1: bool = False, **files: object) -> None:
    """A cgroup."""
    place.mkdir(parents=True, exist_ok=True)
    names = (
        {"limit": "memory.limit_in_bytes", "current": "memory.usage_in_bytes"}
        if v1
        else {"limit": "memory.max", "current": "memory.current"}
    )
    for name, value in files.items():
        known = names.get(name) or "memory." + name.replace("_", ".")
        (place / known).write_text(f"{value}\n")


def test_an_object_that_a_cgroup_has_no_memory_for_is_refused_before_it_is_made(places: Places) -> None:
    places.own.write_text("0::/a/b\n")
    group(places.cgroups / "a" / "b", limit=100 * MIB, current=90 * MIB, stat="anon 5\ninactive_file 0")
    with kho.live.open("x", "64M", serve=False) as h:
        for act in (lambda: h.put("a", bytes(12 * MIB)), lambda: h.empty("a", 12 * MIB)):
            with pytest.raises(kho.OutOfMemoryError) as caught:
                act()
            text = str(caught.value)
            for part in (
                "'a' needs 12.0 MiB",
                str(places.cgroups / "a" / "b"),
                "10.0 MiB left",
                "limit 100.0 MiB",
                "in use 90.0 MiB",
            ):
                assert part in text
        assert h.names() == []
        assert h.stats()["allocated_bytes"] < MIB
        h.put("a", bytes(9 * MIB))
        h.commit()


@pytest.mark.parametrize(
    "stat",
    ["inactive_file {0}", "active_file {0}", "slab_reclaimable {0}", "file 0\ninactive_file {0}\nanon 7"],
)
def test_memory_that_the_kernel_reclaims_counts_as_free(places: Places, stat: str) -> None:
    places.own.write_text("0::/a\n")
    group(places.cgroups / "a", limit=100 * MIB, current=100 * MIB, stat=stat.format(50 * MIB))
    with kho.live.open("x", "64M", serve=False) as h:
        h.put("a", bytes(40 * MIB))
        with pytest.raises(kho.OutOfMemoryError, match="50.0 MiB of this can be reclaimed"):
            memory.check(51 * MIB, "b")


def test_swap_counts_as_free_as_far_as_a_cgroup_may_use_it(places: Places) -> None:
    places.own.write_text("0::/a\n")
    places.meminfo.write_text("SwapFree: 20480 kB\n")
    group(places.cgroups / "a", limit=100 * MIB, current=100 * MIB)
    memory.check(20 * MIB, "x")
    group(places.cgroups / "a", swap_max=15 * MIB, swap_current=5 * MIB)
    memory.check(10 * MIB, "x")
    with pytest.raises(kho.OutOfMemoryError, match="swap 10.0 MiB"):
        memory.check(11 * MIB, "x")


@pytest.mark.parametrize("tight", ["a/b/c", "a/b", "a", ""])
@pytest.mark.parametrize("v1", [False, True])
def test_the_limit_of_any_cgroup_above_counts(places: Places, tight: str, v1: bool) -> None:
    places.own.write_text("3:cpu,memory:/a/b/c\n1:name=systemd:/z\n" if v1 else "0::/a/b/c\n")
    base = places.cgroups / "memory" if v1 else places.cgroups
    none = 9223372036854771712 if v1 else "max"
    for at in ("a/b/c", "a/b", "a"):
        group(base / at, v1=v1, limit=none, current=MIB)
    memory.check(1 << 40, "x")
    group(base / tight, v1=v1, limit=10 * MIB, current=MIB, stat="total_inactive_file 1048576" if v1 else "")
    memory.check(9 * MIB, "x")
    with pytest.raises(kho.OutOfMemoryError, match=str(base / tight)):
        memory.check(11 * MIB, "x")


@pytest.mark.parametrize(
    ("own", "finds"),
    [
        ("0::/\n", 1),
        ("0::/../../elsewhere\n", 1),
        ("0::/a/host/path/that/is/not/mounted\n", 1),
        ("", 0),
        ("garbage\n\n:::\n9:cpu:/\n", 0),
        ("0::/" + "a/" * 2000 + "\n", 1),
    ],
)
def test_missing_or_malformed_cgroup_files_refuse_nothing(places: Places, own: str, finds: int) -> None:
    places.own.write_text(own)
    group(places.cgroups, limit=10 * MIB, current=MIB)
    assert len(list(memory.limits(places))) == finds
    for broken in ("", "x", "-1", "1 2", "9" * 40, "\xff"):
        (places.cgroups / "memory.current").write_text(broken)
        assert all(isinstance(limit, Limit) for limit in memory.limits(places))
    memory.check(5 * MIB, "x")
    places.own.unlink()
    assert list(memory.limits(places)) == []


def test_files_on_a_disk_and_pages_that_are_there_already_need_no_memory_of_a_cgroup(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(MIB)
        on_disk = os.fstatvfs(file.fileno())
        with contextlib.suppress(OSError):
            fcntl.fcntl(file.fileno(), fcntl.F_GET_SEALS)
            pytest.skip(f"{tmp_path} is on tmpfs ({on_disk.f_bsize})")
        assert memory.unallocated(file.fileno(), MIB) == 0
    fd = os.memfd_create("x")
    os.ftruncate(fd, 4 * MIB)
    assert memory.unallocated(fd, MIB) == MIB
    os.posix_fallocate(fd, 0, 4 * MIB)
    assert memory.unallocated(fd, MIB) == 0
    os.close(fd)


def test_weights_that_a_cgroup_has_no_memory_for_are_refused_before_they_are_read(
    places: Places, tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({f"t{i}": np.zeros(MIB // 4, "f4") for i in range(20)}, tmp_path / "m.safetensors")
    places.own.write_text("0::/a\n")
    group(places.cgroups / "a", limit=100 * MIB, current=95 * MIB)
    with (
        folder() as here,
        pytest.raises(kho.OutOfMemoryError, match=r"an image of its 20 tensors needs 20.0 MiB.*5.0 MiB left"),
    ):
        kho.live.safetensors.load(tmp_path / "m.safetensors", backing=here / "image")


def test_a_real_cgroup_refuses_instead_of_a_kill() -> None:
    own = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    v1 = [path for _, controllers, path in own if "memory" in controllers.split(",")]
    base = Path("/sys/fs/cgroup/memory" + v1[0]) if v1 else Path("/sys/fs/cgroup" + own[-1][2])
    made = base / f"kho-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(64 * MIB))
    except OSError as error:
        with contextlib.suppress(OSError):
            made.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")

    def work() -> None:
        (made / "cgroup.procs").write_text(str(os.getpid()))
        with kho.live.open("x", "256M", serve=False) as h:
            with pytest.raises(kho.OutOfMemoryError, match=made.name):
                for i in range(40):
                    h.empty(f"o{i}", 8 * MIB)[:] = 1
            assert 3 <= len(h.names()) <= 8

    try:
        assert ended(child(work)) == 0
    finally:
        wait_until(lambda: not (made / "cgroup.procs").read_text())
        made.rmdir()
    assert isinstance(Handle, type)
