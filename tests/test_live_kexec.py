"""kho.live across a kexec, on a machine that keeps the kernel's rules."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kho
import kho.live
from kho import luo
from kho.live.file import mapping, memory
from kho.live.transports import kexec
from kho.live.transports.descriptors import create_memfd
from kho.live.transports.kexec import TOKEN, Machine, session_name

from fake_luo import CLIENT, FakeLuo, opened
from livefiles import child, contents, descriptors, die, ended, folder

NAME = "search-index"
SESSION = f"kho-live/{NAME}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLuo]:
    with FakeLuo(tmp_path / "liveupdate") as made:
        monkeypatch.setattr(kexec, "machine", Machine(made.path, CLIENT))
        yield made
        for name in list(kexec._arrivals):
            kexec.forget(name)


def start(version: str = "1", **more: Any) -> kho.live.Handle:
    """The service's two lines; without kexec=True, an image that can be preserved by hand."""
    if not more.get("kexec", True):
        more = {"backing": "memfd"} | more
    h = kho.live.open(NAME, "4M", version=version, **({"kexec": True} | more))
    if not h.inherited:
        h.put("vectors", np.arange(1000))
        h.commit()
    return h


def kexeced(machine: FakeLuo, **more: Any) -> dict[str, Any]:
    """A service, and then the next kernel; what there is to find."""
    with start(**more) as h:
        machine.kexec()
        return contents(h)


# Across a kexec


def test_a_service_finds_its_image_after_a_kexec_with_the_same_lines(machine: FakeLuo) -> None:
    before = descriptors()
    for life in range(4):
        with start() as h:
            assert h.inherited == (life > 0)
            assert machine.outgoing() == {SESSION: {TOKEN}}, "for the next kexec"
            assert machine.incoming() == {}
            assert h.verify() >= 8000
            assert np.array_equal(h["vectors"], np.arange(1000))
            assert h.generation == 1 + life
            h.put(f"life-{life}", bytes([life]) * 5000)
            h.commit()
            machine.kexec()
    with start() as h:
        assert h.names() == ["vectors", *(f"life-{life}" for life in range(4))]
    gc.collect()
    assert (machine.outgoing(), machine.incoming()) == ({}, {})
    assert descriptors() <= before


def test_a_retrieved_image_is_sealed_private_and_writable(machine: FakeLuo) -> None:
    kexeced(machine)
    with start() as h:
        assert h.inherited
        assert fcntl.fcntl(h.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        assert os.fstat(h.fileno()).st_mode & 0o777 == 0o600
        assert not fcntl.fcntl(h.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE


@pytest.mark.parametrize("sealable", [True, False])
def test_a_memfd_that_an_older_kernel_returns_unsealed_is_sealed_again(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch, sealable: bool
) -> None:
    def unsealed(self: luo.Session, token: int) -> int:
        # As 6.19.11 (tests/data/luo): F_SEAL_SEAL alone, so that no seal can be added.
        fd, new = retrieve(self, token), os.memfd_create("", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING * sealable)
        os.truncate(new, os.fstat(fd).st_size)
        os.pwrite(new, os.pread(fd, 1 << 24, 0), 0)
        os.close(fd)
        return new

    retrieve = luo.Session.retrieve_fd
    with start() as h:
        h.put("large", np.arange(300_000))
        h.commit()
        found = contents(h)
        machine.kexec()
    monkeypatch.setattr(luo.Session, "retrieve_fd", unsealed)
    with start(kexec=False) as h:
        assert h.inherited
        assert contents(h) == found
        assert fcntl.fcntl(h.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        assert h.verify() > 2_400_000
        h.put("more", b"more")
        h.commit()


def test_preserving_by_hand_is_found_without_being_asked_for(machine: FakeLuo) -> None:
    with start(kexec=False) as h:
        assert machine.outgoing() == {}
        session = h.preserve()
        assert h.preserve() is session, "once is enough"
        assert session.name == SESSION
        machine.kexec()
    with start(kexec=False) as h:
        assert h.inherited
        assert (machine.outgoing(), machine.incoming()) == ({}, {}), "finished, and not preserved again"


def test_a_device_that_is_open_already_can_be_given(machine: FakeLuo) -> None:
    with start(kexec=False) as h, opened(machine) as device:
        h.preserve(device)
        assert machine.outgoing() == {SESSION: {TOKEN}}


def test_a_preserved_image_changes_as_before(machine: FakeLuo) -> None:
    with start() as h:
        for n in range(300):
            h.put("vectors", np.full(20000, n))
            h.commit()
        del h["vectors"]
        h.rollback()
        assert h.stats()["holes"] == 0
        machine.kexec()
    with start() as h:
        assert h.stats()["holes"] == 0
        assert np.array_equal(h["vectors"], np.full(20000, 299))


def test_uncommitted_changes_do_not_cross(machine: FakeLuo) -> None:
    with start() as h:
        h.put("late", b"x")
        machine.kexec()
    with start() as h:
        assert h.names() == ["vectors"]
        assert h.dropped == ("late",)


@pytest.mark.parametrize("name", ["x", "n" * 54, "n" * 55, "n" * 255, "\u00fc" * 27, "\u00fc" * 28, "kho-live"])
def test_every_name_has_a_session(machine: FakeLuo, name: str) -> None:
    assert len(session_name(name).encode()) < luo.NAME_BYTES
    with kho.live.open(name, "1M", kexec=True) as h:
        h.put("a", b"a")
        h.commit()
        machine.kexec()
    with kho.live.open(name, "1M", kexec=True) as h:
        assert h.inherited


def test_long_names_that_begin_alike_have_sessions_of_their_own() -> None:
    assert len({session_name("n" * 200 + str(end)) for end in range(50)}) == 50


# How long an image is preserved


def test_an_image_is_preserved_as_long_as_its_handle_is_open(machine: FakeLuo) -> None:
    h = start()
    assert machine.outgoing() == {SESSION: {TOKEN}}
    h.close()
    assert machine.outgoing() == {}
    h = start()
    del h
    gc.collect()
    assert machine.outgoing() == {}, "without a warning"


def test_a_released_image_is_not_preserved(machine: FakeLuo) -> None:
    h = start()
    h.release()
    machine.kexec()
    assert machine.incoming() == {}
    with start() as h:
        assert not h.inherited


def test_a_successor_preserves_the_image_and_so_does_an_owner_that_takes_it_back(machine: FakeLuo) -> None:
    with start() as h:
        candidate = kho.live.attach(h.offer())
        h.hand_over()
        assert machine.outgoing() == {}
        candidate.close()
        h.take_back()
        assert machine.outgoing() == {SESSION: {TOKEN}}
        h.hand_over()
        with kho.live.open(NAME, backing=h.fileno(), kexec=True) as successor:
            assert successor.inherited
            assert machine.outgoing() == {SESSION: {TOKEN}}
            machine.kexec()
    with start() as h:
        assert h.inherited


def test_memory_is_punched_again_once_the_image_is_no_longer_preserved(machine: FakeLuo) -> None:
    with start() as h:
        h.put("vectors", bytes(2 << 20))
        h.commit()
        h.put("vectors", b"")
        h.commit()
        assert h.stats()["allocated_bytes"] > 2 << 20
        h.hand_over()
        with kho.live.open(NAME, backing=h.fileno()) as successor:
            assert successor.stats()["allocated_bytes"] < 1 << 20


def test_a_forked_child_does_not_keep_an_image_preserved(machine: FakeLuo) -> None:
    h = start()
    (waiting, go), (up, says) = os.pipe(), os.pipe()

    def wait() -> None:
        os.close(go)
        os.write(says, b"x")
        os.read(waiting, 1)

    pid = child(wait)
    assert os.read(up, 1) == b"x"
    h.close()
    assert machine.outgoing() == {}
    with start() as again:
        assert not again.inherited
    for fd in (go, waiting, up, says):
        os.close(fd)
    assert ended(pid) == 0


def test_a_forked_child_cannot_preserve(machine: FakeLuo) -> None:
    def work() -> None:
        with pytest.raises(kho.NotOwnerError, match="preserve"):
            h.preserve()

    with start() as h:
        assert ended(child(work)) == 0


# Memory


def test_holes_is_0_from_the_first_moment_an_image_is_preserved(machine: FakeLuo) -> None:
    with start(kexec=False) as h:
        assert h.stats()["holes"] == 1
        h.preserve()
        assert h.stats()["holes"] == 0
        h.hand_over()
        h.take_back()
        assert h.stats()["holes"] == 0
    with start() as h:
        assert h.stats()["holes"] == 0
        machine.kexec()
    with start() as h:
        assert h.stats()["holes"] == 0


@pytest.mark.parametrize("size", ["4M", "64M"])
def test_opening_after_a_kexec_touches_no_free_memory_however_large_the_image_is(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    with kho.live.open(NAME, size, kexec=True) as h:
        h.put("a", bytes(100_000))
        h.commit()
        machine.kexec()
    requests: list[tuple[str, int]] = []

    def counted(place: Any, name: str) -> None:
        def request(*args: Any) -> Any:
            requests.append((name, args[1 if name == "pread" else 2]))
            return real(*args)

        real = getattr(place, name)
        monkeypatch.setattr(place, name, request)

    counted(mapping, "punch_hole")
    counted(os, "posix_fallocate")
    counted(os, "pread")
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    with kho.live.open(NAME, size, kexec=True) as h:
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults
        assert h.inherited
    assert [name for name, _ in requests if name == "punch_hole"] == []
    # The head, and the metadata of a generation and of the next commit: not the free pages of the image.
    assert sum(nbytes for name, nbytes in requests if name == "posix_fallocate") < 256 << 10
    assert sum(nbytes for name, nbytes in requests if name == "pread") < 256 << 10
    assert len(requests) < 40
    assert faults < 1500, "64 MiB are 16384 pages"


def test_free_memory_of_a_retrieved_image_is_punched_if_it_is_not_preserved_again(machine: FakeLuo) -> None:
    with start() as h:
        machine.kexec()
        assert h.stats()["allocated_bytes"] > 4 << 20
    with start(kexec=False) as h:
        assert h.inherited
        assert h.stats()["allocated_bytes"] < 1 << 20


def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **kib: int) -> None:
    """Let /proc/meminfo have these numbers, and no memory cgroup a limit."""
    file = tmp_path / "meminfo"
    file.write_text("".join(f"{name}: {n} kB\n" for name, n in kib.items()))
    monkeypatch.setattr(memory, "PLACES", memory.Places(cgroups=tmp_path / "none", meminfo=file))


def test_what_does_not_fit_outside_scratch_is_refused_before_anything_is_allocated(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 1280 MiB; scratch is 664 MiB, 600 MiB of it free.
    meminfo(tmp_path, monkeypatch, MemAvailable=1000 << 10, CmaTotal=0, CmaFree=600 << 10)
    assert memory.outside_scratch() == 400 << 20
    with pytest.raises(kho.OutOfMemoryError, match=r"needs 3\.0 GiB.*400\.0 MiB are available outside.*scratch"):
        kho.live.open(NAME, "3G", kexec=True)
    with pytest.raises(kho.OutOfMemoryError):
        kho.live.open(NAME, "450M", kexec=True)
    assert machine.outgoing() == {}
    with kho.live.open(NAME, "3G", backing="memfd") as h:
        before = h.stats()["allocated_bytes"]
        with pytest.raises(kho.OutOfMemoryError):
            h.preserve()
        assert h.stats()["allocated_bytes"] == before
        assert h.stats()["holes"] == 1
    with start() as h:
        assert machine.outgoing() == {SESSION: {TOKEN}}
    meminfo(tmp_path, monkeypatch, MemAvailable=1000 << 10, CmaTotal=100 << 10, CmaFree=90 << 10)
    assert memory.outside_scratch() == 1000 << 20, "a CMA area that is not KHO's"
    meminfo(tmp_path, monkeypatch, MemTotal=1)
    assert memory.outside_scratch() is None
    with start():
        pass


def test_an_image_that_came_by_kexec_is_preserved_again_without_free_memory(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = kexeced(machine)
    meminfo(tmp_path, monkeypatch, MemAvailable=0)
    with start() as h:
        assert contents(h) == found
        assert machine.outgoing() == {SESSION: {TOKEN}}


def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, current: int) -> None:
    """Let this process's memory cgroup have a limit."""
    group = tmp_path / "cgroup/service"
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(str(limit))
    (group / "memory.current").write_text(str(current))
    (tmp_path / "own").write_text("0::/service\n")
    (tmp_path / "meminfo").write_text("MemAvailable: 100000000 kB\n")
    places = memory.Places(cgroups=tmp_path / "cgroup", own=tmp_path / "own", meminfo=tmp_path / "meminfo")
    monkeypatch.setattr(memory, "PLACES", places)


def test_what_does_not_fit_a_cgroup_is_refused_before_it_is_preserved(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cgroup(tmp_path, monkeypatch, 100 << 20, 90 << 20)
    with pytest.raises(kho.OutOfMemoryError, match="MemoryMax"):
        kho.live.open(NAME, "40M", kexec=True)
    assert machine.outgoing() == {}
    with start() as h:
        assert not h.inherited


def test_a_cgroup_into_which_the_next_kernel_cannot_charge_the_image_is_said_to_be_one(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cgroup(tmp_path, monkeypatch, 5 << 20, 0)
    with kho.live.open(NAME, "4M", backing="memfd") as h:
        h.put("a", b"a")
        h.commit()
        os.posix_fallocate(h.fileno(), 0, os.fstat(h.fileno()).st_size)
        with pytest.warns(RuntimeWarning, match=r"6\.0 MiB are more than the limit .*cgroup/service, 5\.0 MiB"):
            h.preserve()
        machine.kexec()
    charge = r"retrieving it charges up to 8\.0 MiB .*has 5\.0 MiB left of 5\.0 MiB.*MemoryMax"
    with pytest.warns(RuntimeWarning, match=charge), pytest.warns(RuntimeWarning, match="has 4.0 MiB, not 8.0 MiB"):
        h = kho.live.open(NAME, "8M")
    assert h.inherited
    h.close()


def test_the_default_size_is_not_a_gibibyte_that_is_allocated_at_once(machine: FakeLuo) -> None:
    with kho.live.open(NAME, kexec=True) as h:
        assert h.stats()["size"] == 64 << 20
        assert h.stats()["allocated_bytes"] == (64 << 20) + (2 << 20)
    with kho.live.open(NAME) as h:
        assert h.stats()["size"] == 1 << 30
        assert h.stats()["allocated_bytes"] < 1 << 20


# vm.memfd_noexec


def test_every_memfd_of_an_image_is_made_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    refused: list[int] = []
    real = os.memfd_create

    def create(name: str, flags: int) -> int:
        if name.startswith("kho-live:"):
            made.append(flags & 0x10)
            if refused and flags & 0x10:
                raise OSError(refused[0], os.strerror(refused[0]))
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", create)
    with kho.live.open(NAME, "1M", serve=False) as h:
        assert made == [0x10]
        assert not fcntl.fcntl(h.fileno(), fcntl.F_GET_SEALS) & 0x20
    for number in (errno.EINVAL, errno.EACCES):  # Linux before 6.3; vm.memfd_noexec=2
        made[:], refused[:] = [], [number]
        with kho.live.open(NAME, "1M", serve=False):
            assert made == [0x10, 0]
    with pytest.raises(kho.AccessError, match=r"vm\.memfd_noexec is 2"):
        create_memfd(NAME, NAME, kexec=True)
    refused[:] = [errno.EINVAL]
    os.close(create_memfd(NAME, NAME, kexec=True))


# Errors


def test_without_a_device_preserving_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kexec, "machine", Machine(tmp_path / "none", CLIENT))
    before = descriptors()
    with pytest.raises(kho.LuoUnavailableError, match="liveupdate=on"):
        start()
    with start(kexec=False) as h:
        assert not h.inherited
        with pytest.raises(kho.LuoUnavailableError, match="liveupdate=on"):
            h.preserve()
        assert h.names() == ["vectors"], "it serves on"
    gc.collect()
    assert descriptors() <= before


def test_preserving_anything_but_a_memfd_is_refused(machine: FakeLuo) -> None:
    with folder() as here:
        with pytest.raises(kho.ParameterError, match="memfd"):
            kho.live.open(NAME, "1M", backing=here / "image", kexec=True)
        with (
            kho.live.open(NAME, "1M", backing=here / "image") as h,
            pytest.raises(kho.ParameterError, match="normal pages"),
        ):
            h.preserve()
    with pytest.raises(kho.ParameterError, match="memfd"):
        kho.live.open(NAME, "1M", backing="hugetlb", kexec=True)
    assert machine.outgoing() == {}


def test_a_memfd_sealed_against_execution_is_refused_as_it_would_come_back_read_only(machine: FakeLuo) -> None:
    try:
        fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | 0x8)  # MFD_NOEXEC_SEAL
    except OSError:
        pytest.skip("MFD_NOEXEC_SEAL came with Linux 6.3")
    with kho.live.open(NAME, "1M", backing=fd) as h, pytest.raises(kho.ParameterError, match="memfd_noexec"):
        h.preserve()
    os.close(fd)
    assert machine.outgoing() == {}


def test_after_a_reboot_without_kexec_a_service_starts_with_a_new_image(machine: FakeLuo, tmp_path: Path) -> None:
    start().close()
    with FakeLuo(tmp_path / "another") as rebooted:
        kexec_machine, kexec.machine = kexec.machine, Machine(rebooted.path, CLIENT)
        with start() as h:
            assert not h.inherited
            assert rebooted.outgoing() == {SESSION: {TOKEN}}
        kexec.machine = kexec_machine


def test_another_version_is_refused_and_the_image_stays_for_one_that_knows_it(machine: FakeLuo) -> None:
    found = kexeced(machine)
    for _ in range(2):
        with pytest.raises(kho.SchemaError, match="version '1', not '2'") as caught:
            start("2")
        assert "THE IMAGE IS LOST WHEN THIS PROCESS ENDS" in caught.value.__notes__[0]
        assert f"kho.live.kexec.find({NAME!r})" in caught.value.__notes__[0]
    fd = kexec.find(NAME)
    assert fd is not None
    with kho.live.attach(fd) as candidate:
        assert contents(candidate) == found, "to be converted"
    with start("1") as h:
        assert h.inherited
        assert contents(h) == found
    assert machine.incoming() == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EINVAL])
def test_an_image_that_the_kernel_cannot_retrieve_is_lost_with_a_warning(machine: FakeLuo, number: int) -> None:
    kexeced(machine)
    machine.fail("retrieve", SESSION, TOKEN, number)
    with pytest.warns(RuntimeWarning, match="is lost; the service starts with a new image"):
        h = start()
    with h:
        assert not h.inherited
        assert machine.incoming() == {}
        assert machine.outgoing() == {SESSION: {TOKEN}}


def test_a_session_of_that_name_without_the_memfd_counts_as_none(machine: FakeLuo) -> None:
    with opened(machine) as device, device.create_session(SESSION):
        machine.kexec()
    with pytest.warns(RuntimeWarning, match="is lost"):
        h = start()
    with h:
        assert not h.inherited


def test_after_descriptors_have_run_out_the_image_can_still_be_retrieved(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: luo.Session, token: int) -> int:
        raise kho.LuoError(errno.EMFILE, "no free descriptor")

    found = kexeced(machine)
    with monkeypatch.context() as patched:
        patched.setattr(luo.Session, "retrieve_fd", full)
        with pytest.raises(kho.LuoError, match="no free descriptor"):
            start()
    with start() as h:
        assert h.inherited
        assert contents(h) == found


def test_a_tampered_image_is_refused(machine: FakeLuo) -> None:
    with start() as h:
        os.pwrite(h.fileno(), bytes(64), 4096)
        machine.kexec()
    with pytest.raises(kho.FormatError):
        start()


@pytest.mark.parametrize("step", ["preserve", "finish"])
@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOMEM])
def test_an_image_that_cannot_be_preserved_again_is_refused_but_not_lost(
    machine: FakeLuo, step: str, number: int
) -> None:
    found = kexeced(machine)
    machine.fail(step, SESSION, TOKEN, number)
    for _ in range(2):
        with pytest.raises(kho.LuoError):
            start()
        assert machine.outgoing() == {}
    machine.heal(step, SESSION, TOKEN)
    with start() as h:
        assert h.inherited
        assert contents(h) == found
        assert machine.outgoing() == {SESSION: {TOKEN}}
        assert machine.incoming() == {}


def test_a_kernel_that_cannot_finish_yet_keeps_no_service_from_serving(machine: FakeLuo) -> None:
    kexeced(machine)
    machine.fail("finish", SESSION, TOKEN, errno.EBUSY)
    with start(kexec=False) as h:
        assert h.inherited
        with pytest.raises(kho.LuoBusyError):
            h.preserve()
        machine.heal("finish", SESSION, TOKEN)
        h.preserve()
        assert machine.outgoing() == {SESSION: {TOKEN}}


def test_a_failed_kexec_leaves_the_image_preserved(machine: FakeLuo) -> None:
    with start() as h:
        machine.fail("freeze", SESSION, TOKEN, errno.EIO)
        with pytest.raises(OSError):
            machine.kexec()
        h.put("more", b"more")
        h.commit()
        machine.heal("freeze", SESSION, TOKEN)
        machine.kexec()
    with start() as h:
        assert h.names() == ["vectors", "more"]


@pytest.mark.parametrize("when", ["retrieve_fd", "finish", "preserve_fd"])
def test_a_process_killed_while_it_takes_over_loses_the_image_and_the_next_makes_one(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    kexeced(machine)

    def first() -> None:
        monkeypatch.setattr(luo.Session, when, lambda *_: die())
        start()

    assert ended(child(first)) == -9
    assert machine.incoming() == {}, "finished with its last descriptor"
    with start() as h:
        assert not h.inherited
        assert machine.outgoing() == {SESSION: {TOKEN}}


def test_a_process_killed_before_it_takes_over_changes_nothing(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kexeced(machine)

    def first() -> None:
        monkeypatch.setattr(luo.Device, "retrieve_session", lambda *_: die())
        start()

    assert ended(child(first)) == -9
    with start() as h:
        assert contents(h) == found


def test_a_process_killed_as_owner_leaves_the_name_free(machine: FakeLuo) -> None:
    def first() -> None:
        start()
        die()

    assert ended(child(first)) == -9
    with start() as h:
        assert not h.inherited, "a memfd dies with its last holder"


def test_of_two_processes_that_take_over_one_succeeds(machine: FakeLuo, monkeypatch: pytest.MonkeyPatch) -> None:
    kexeced(machine)
    with opened(machine) as device:
        other = device.retrieve_session(SESSION)
    with pytest.raises(kho.BusyError, match="another process is taking it over"):
        start()
    with pytest.raises(kho.BusyError, match="another process is taking it over"):
        start(kexec=False)
    other.close()


def test_a_second_preserved_image_of_the_same_name_is_refused(machine: FakeLuo) -> None:
    with start(serve=False) as h:
        assert machine.outgoing() == {SESSION: {TOKEN}}
        fds = descriptors()
        with pytest.raises(kho.LuoExistsError):
            start()
        gc.collect()
        assert machine.outgoing() == {SESSION: {TOKEN}}
        assert descriptors() <= fds
        assert h.verify()


def test_a_successor_of_a_running_owner_preserves_the_image(machine: FakeLuo) -> None:
    with start() as old, start() as new:
        assert (new.inherited, new.transport) == (True, "socket")
        assert old.handed_over.wait(5)
        assert machine.outgoing() == {SESSION: {TOKEN}}
        new.put("more", b"more")
        new.commit()
        machine.kexec()
    with start() as h:
        assert (h.transport, h.names()) == ("kexec", ["vectors", "more"])


def test_an_image_that_was_taken_over_and_cannot_be_preserved_stays_in_this_process(machine: FakeLuo) -> None:
    machine.fail("preserve", SESSION, TOKEN, errno.ENOMEM)
    with start(kexec=False) as old:
        found = contents(old)
        with pytest.raises(kho.LuoError):
            start()
    machine.heal("preserve", SESSION, TOKEN)
    with start() as h:
        assert h.inherited
        assert contents(h) == found
        assert machine.outgoing() == {SESSION: {TOKEN}}


def test_without_a_device_an_owner_is_not_even_asked(machine: FakeLuo, monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as old:
        monkeypatch.setattr(kexec, "machine", Machine("/nonexistent", CLIENT))
        with pytest.raises(kho.LuoUnavailableError):
            start()
        assert not old.handed_over.is_set()
        old.put("more", b"more")
        assert old.commit() == 2


def test_no_second_process_comes_in_between_adopting_and_preserving(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[bool] = []

    def intruder() -> None:
        with pytest.raises((kho.BusyError, kho.LuoExistsError)):
            start()

    def watched(name: str) -> Any:
        def step(self: luo.Session, *args: Any) -> Any:
            refused.append(ended(child(intruder)) == 0)
            result = steps[name](self, *args)
            refused.append(ended(child(intruder)) == 0)
            return result

        return step

    steps: dict[str, Any] = {name: getattr(luo.Session, name) for name in ("retrieve_fd", "finish", "preserve_fd")}
    found = kexeced(machine)
    for name in steps:
        monkeypatch.setattr(luo.Session, name, watched(name))
    with start() as h:
        assert contents(h) == found
    assert refused == [True] * 6


def test_open_waits_for_a_device_that_is_busy_for_a_short_time(machine: FakeLuo) -> None:
    found = kexeced(machine)
    device = opened(machine)
    threading.Timer(0.2, device.close).start()
    with start() as h:
        assert contents(h) == found


def test_a_device_that_stays_busy_is_refused_and_nothing_is_lost(
    machine: FakeLuo, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kexeced(machine)
    monkeypatch.setattr(kexec, "PATIENCE", 0.05)
    with opened(machine):
        with pytest.raises(kho.LuoBusyError):
            start()
        with start(kexec=False) as h:
            assert not h.inherited, "with kexec=False the device is ignored"
    with start() as h:
        assert contents(h) == found
