"""Images that outlive their process without a successor: files in the user's runtime directory, found by name."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kho
import kho.live
from kho.live import opening
from kho.live.handover import client, kept, registry
from kho.live.handover.predecessor import Predecessor
from kho.live.transports import kexec, systemd
from kho.live.transports.descriptors import _move, copied
from kho.live.transports.kexec import Machine

from command import kho as run
from fake_luo import CLIENT, FakeLuo
from livefiles import SHM, Channel, child, descriptors, die, ended, owner, process, service

pytestmark = pytest.mark.skipif(not os.access(SHM, os.W_OK), reason="no tmpfs at /dev/shm")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeLuo]:
    """A machine with live updates."""
    with FakeLuo(tmp_path / "liveupdate") as made:
        monkeypatch.setattr(kexec, "machine", Machine(made.path, CLIENT))
        yield made
        for name in list(kexec._arrivals):
            kexec.forget(name)


def leave(name: str = "x", size: str = "4M", **options: object) -> None:
    """Let a process make an image, commit to it, and be killed."""

    def work() -> None:
        h = kho.live.open(name, size, **options)  # type: ignore[arg-type]
        h.put("a", b"one")
        h.commit()
        h.put("b", b"not committed")
        die()

    assert ended(child(work)) == -9


ENDS = {"ends": lambda h: None, "closes": lambda h: h.close(), "killed": lambda h: die()}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_was_committed_is_there_for_the_next_process(
    runtime: Path, end: Callable[[kho.live.Handle], None]
) -> None:
    def work() -> None:
        h = kho.live.open("x", "4M")
        h.put("a", np.arange(1000))
        h.commit()
        end(h)

    assert ended(child(work)) in (0, -9)
    with kho.live.open("x", "4M") as h:
        assert (h.inherited, h.transport, h.generation) == (True, "file", 1)
        assert np.array_equal(h["a"], np.arange(1000))
        assert h.verify() == 8000
        file = Path(f"/proc/self/fd/{h.fileno()}").readlink()
        assert file == runtime / "kho/x.live"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_changes_without_a_commit_are_lost_and_named() -> None:
    leave()
    with kho.live.open("x") as h:
        assert (h.names(), h.dropped) == (["a"], ("b",))


def test_an_image_is_listed_read_and_released_without_a_process(runtime: Path) -> None:
    leave()
    (row,) = registry.holdings()
    assert (row.name, row.pid, row.state, row.transport, row.generation, row.objects) == (
        "x",
        None,
        "left",
        "file",
        1,
        1,
    )
    shown = run("ps")
    assert re.search(r"^x +left +1 +1 ", shown.out, re.MULTILINE), shown.out
    assert json.loads(run("ps", "--json").out)["images"][0]["pid"] is None
    assert "kho.live: generation 1 of x" in run("inspect", "live:x").out
    done = run("release", "x", "--yes")
    assert (done.code, list((runtime / "kho").glob("*.live")), registry.holdings()) == (0, [], [])
    assert run("release", "x", "--yes").code == 2


def test_an_image_that_a_process_has_is_not_released(runtime: Path) -> None:
    with owner() as line:
        assert line.hear()[0] == "new"
        done = run("release", "x", "--yes")
        assert done.code == 1
        assert (runtime / "kho/x.live").exists()
        assert [row.state for row in registry.holdings()] == ["serving"]


def test_nothing_is_left_of_an_image_without_a_commit(runtime: Path) -> None:
    with kho.live.open("x", "4M") as h:
        h.put("a", b"1")
        assert (runtime / "kho/x.live").exists()
    assert not (runtime / "kho/x.live").exists()


@pytest.mark.parametrize("other", [{"size": "8M"}, {"version": "2"}], ids=["size", "version"])
def test_an_image_of_which_nothing_was_committed_gives_way(other: dict[str, str]) -> None:
    def work() -> None:
        kho.live.open("x", "4M")
        die()

    assert ended(child(work)) == -9
    with kho.live.open("x", **({"size": "4M"} | other)) as h:  # type: ignore[arg-type]
        assert (h.inherited, h.transport, h.version) == (False, "new", other.get("version", "1"))
        assert h.stats()["size"] == (8 << 20 if "size" in other else 4 << 20)


def test_another_version_is_refused_and_its_image_stays(runtime: Path) -> None:
    leave()
    with pytest.raises(kho.SchemaError):
        kho.live.open("x", "4M", version="2")
    with kho.live.open("x", "4M") as h:
        assert bytes(h["a"]) == b"one"


def test_the_handle_that_releases_an_image_removes_its_file_also_after_a_handover_or_exec(runtime: Path) -> None:
    with owner() as old:
        assert old.hear()[0] == "new"
        assert [old.ask("put", "a", "one"), old.ask("commit")] == ["put", 1]
        h = kho.live.open("x", "4M")
        assert h.transport == "socket"
        h.release()
    assert list((runtime / "kho").glob("*.live")) == []
    program = (
        "import sys, kho.live; h = kho.live.open('x', '4M')\n"
        "if not h.inherited: h.put('a', b'1'); h.commit(); kho.live.exec([sys.executable, *sys.orig_argv[1:]])\n"
        "print(h.transport); h.release()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "exec\n"
    assert list((runtime / "kho").glob("*.live")) == []


def test_of_processes_that_start_at_once_after_a_crash_one_owns_the_image() -> None:
    leave()

    def successor(line: Channel) -> None:
        line.hear()
        service(line, timeout=20)

    with process(successor) as one, process(successor) as two, process(successor) as three:
        lines = [one, two, three]
        for line in lines:
            line.say("go")
        answers = [line.hear() for line in lines]
        assert sorted(answer[0] for answer in answers) == ["file", "socket", "socket"]
        assert {answer[1] for answer in answers} == {1}


def test_a_directory_or_a_file_that_others_may_change_is_not_used(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave()
    file = runtime / "kho/x.live"
    file.chmod(0o666)
    with pytest.raises(kho.UntrustedError, match="mode 0o666"):
        kho.live.open("x", "4M")
    file.chmod(0o600)
    here = runtime / "elsewhere"
    here.mkdir(0o777)
    here.chmod(0o777)
    (runtime / "link").symlink_to(runtime / "kho")
    for place in (here, runtime / "link"):
        monkeypatch.setattr(kept, "places", lambda place=place: [place])
        assert kept.find("x") is None
        assert isinstance(reason := kept.blank_file("x", 1 << 20), str)
        assert str(place) in reason
    file.unlink()
    file.symlink_to("/etc/passwd")
    monkeypatch.setattr(kept, "places", lambda: [runtime / "kho"])
    with pytest.raises(kho.UntrustedError, match="symbolic link"):
        kho.live.open("x", "4M")


def test_without_a_place_the_caller_is_warned_and_has_a_memfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept, "places", lambda: [tmp_path / "none" / "kho"])
    with pytest.warns(RuntimeWarning, match=r"'x': the image will be lost .*none/kho: .*backing='memfd'") as caught:
        h = kho.live.open("x", "4M")
    assert caught[0].filename == __file__
    assert os.fstat(h.fileno()).st_nlink == 0
    h.close()
    # Asked for by the caller, it is no surprise.
    for options in ({"backing": "memfd"}, {"serve": False}):
        with kho.live.open("x", "4M", **options) as h:
            assert os.fstat(h.fileno()).st_nlink == 0


def test_a_larger_image_goes_where_there_is_room(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    places = [runtime / "small", runtime / "large"]
    monkeypatch.setattr(kept, "places", lambda: places)
    real = kept._unfit

    def unfit(fd: int, place: Path, size: int) -> str | None:
        return f"{place}: full" if place.name == "small" and size > 8 << 20 else real(fd, place, size)

    monkeypatch.setattr(kept, "_unfit", unfit)
    for name, size in (("a", "4M"), ("b", "16M")):
        with kho.live.open(name, size) as h:
            h.put("a", b"1")
            h.commit()
    assert [[path.name for path in place.iterdir()] for place in places] == [["a.live"], ["b.live"]]
    for name in "ab":
        with kho.live.open(name) as h:
            assert h.transport == "file"
    with pytest.warns(RuntimeWarning, match="free, for an image of up to 16"):
        kho.live.open("c", 1 << 44).close()


def test_what_is_left_is_bounded_in_number_and_in_bytes(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    monkeypatch.setattr(kept, "places", lambda: [runtime / "kho"])
    monkeypatch.setattr(kept, "MOST", 3)
    for name in "abc":
        leave(name)
    with pytest.warns(RuntimeWarning, match="3 images that no process has take .*kho ps.*kho release"):
        kho.live.open("d", "4M").close()
    with kho.live.open("a", "4M") as h:
        assert h.inherited, "what is there is used all the same"
        kho.live.open("d", "4M").close()  # an image that a process has does not count
    monkeypatch.setattr(kept, "MOST", 64)
    monkeypatch.setattr(kept, "SHARE", os.statvfs(runtime).f_blocks * os.statvfs(runtime).f_frsize >> 12)
    with pytest.warns(RuntimeWarning, match="3 images that no process has"):
        kho.live.open("d", "4M").close()


def test_an_image_that_is_left_is_moved_to_a_memfd_for_the_next_kernel(runtime: Path, machine: FakeLuo) -> None:
    leave()
    with kho.live.open("x", "4M", kexec=True) as h:
        assert (h.transport, h.generation, h.dropped) == ("file", 1, ("b",))
        assert not (runtime / "kho/x.live").exists()
        machine.kexec()
    with kho.live.open("x", "4M") as h:
        assert (h.transport, bytes(h["a"])) == ("kexec", b"one")
        h.release()


def test_an_image_that_is_taken_over_moves_too_and_its_readers_keep_it(runtime: Path, machine: FakeLuo) -> None:
    with owner() as old:
        assert old.hear()[0] == "new"
        assert [old.ask("put", "a", "one"), old.ask("commit"), old.ask("hold", "a")] == ["put", 1, "held"]
        with kho.live.open("x", "4M", kexec=True) as h:
            assert (h.transport, bytes(h["a"])) == ("socket", b"one")
            h.put("a", b"two")
            h.commit()
            assert (runtime / "kho/x.live").exists() is False
            assert old.ask("held", "a") == "one"
            assert [(row.pid, row.state) for row in registry.holdings()] == [(os.getpid(), "serving")]


def test_an_image_that_is_too_large_to_be_moved_stays(
    runtime: Path, machine: FakeLuo, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave()

    def full(fd: int, name: str) -> int:
        raise kho.OutOfMemoryError("full")

    monkeypatch.setattr(opening, "copied", full)
    with pytest.raises(kho.OutOfMemoryError):
        kho.live.open("x", "4M", kexec=True)
    assert [row.state for row in registry.holdings()] == ["left"]


def test_a_store_gets_the_image_that_was_left(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave()
    stored = []

    def store(name: str, fd: int | None, within: float = 0.0) -> bool:
        stored.append((name, fd is None))
        return True

    monkeypatch.setattr(systemd, "keeps", lambda: True)
    monkeypatch.setattr(systemd, "store", store)
    with kho.live.open("x", "4M") as h:
        assert (h.transport, h.stored, stored) == ("file", True, [("x", False)])
        assert os.fstat(h.fileno()).st_nlink == 0
    with kho.live.open("y", "4M") as h:
        assert os.fstat(h.fileno()).st_nlink == 0, "the store keeps it, not a file"
    assert list((runtime / "kho").glob("*.live")) == []


def test_a_smaller_image_than_asked_for_is_said_to_be_one(runtime: Path) -> None:
    leave()
    with pytest.warns(RuntimeWarning, match=r"x\.live: 'x' has 4\.0 MiB, not 8\.0 MiB.*release") as caught:
        kho.live.open("x", "8M").close()
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match=r"has 4\.0 MiB, not 1\.0 GiB"):
        kho.live.open("x", "1G", backing=runtime / "kho/x.live").close()
    kho.live.open("x", "2M").close()
    kho.live.open("x").close()


def test_a_damaged_file_is_listed_and_refused(runtime: Path) -> None:
    leave()
    file = runtime / "kho/x.live"
    file.write_bytes(b"\x7fELF" + bytes(100))
    (row,) = registry.holdings()
    assert (row.name, row.state, row.command) == ("x", "unreadable", str(file))
    with pytest.raises(kho.FormatError, match=r"0x68 bytes are no kho\.live image"):
        kho.live.open("x", "4M")


def test_names_become_file_names_and_a_slash_is_refused(runtime: Path) -> None:
    long = "n" * 255
    for name in ("..", "a b", "é", long):
        leave(name)
        with kho.live.open(name, "4M") as h:
            assert (h.name, h.transport) == (name, "file")
            h.release()
    with pytest.raises(kho.ParameterError, match=r"'a/b': .* no slash.*the path as backing="):
        kho.live.open("a/b", "4M")
    assert [row.name for row in registry.holdings()] == []


def test_a_copy_in_a_memfd_has_the_same_bytes_and_holes(runtime: Path) -> None:
    leave(size="64M")
    with (runtime / "kho/x.live").open("rb") as file:
        fd = copied(file.fileno(), "x")
        try:
            assert os.pread(fd, 1 << 27, 0) == os.pread(file.fileno(), 1 << 27, 0)
            assert os.fstat(fd).st_blocks <= os.fstat(file.fileno()).st_blocks
            with kho.live.open("x", backing=fd) as h:
                assert bytes(h["a"]) == b"one"
        finally:
            os.close(fd)


@pytest.mark.parametrize("copy", [copied, _move])
def test_a_copy_of_a_file_that_is_cut_meanwhile_ends(
    copy: Callable[[int, str], int | None], runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(size="4M")
    file = os.open(runtime / "kho/x.live", os.O_RDWR)
    before = descriptors()
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(kho.SourceError, match="cut at 0x"):
        copy(file, "x")
    assert descriptors() == before
    os.close(file)


def test_an_image_between_two_owners_is_not_taken_for_one_that_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that looked for its owner a moment too early finds the file, and for that moment no lock on it."""
    with kho.live.open("x", "4M") as h:
        h.put("a", b"one")
        h.commit()

        def early() -> int:
            monkeypatch.setattr(client, "ask", lambda *_, **__: None)
            try:
                kho.live.open("x", "4M", timeout=0.2)
            except kho.BusyError as error:
                return 3 if "hands it over" in str(error) else 4
            return 5

        h._image.unlock()
        assert ended(child(lambda: os._exit(early()))) == 3
        h._image.lock()
        h.put("a", b"two")
        assert h.commit() == 2


def test_what_an_earlier_owner_keeps_is_not_believed_of_a_later_one(image: Path) -> None:
    kho.live.open("x", "4M", backing=image).close()
    with kho.live.attach(image) as candidate:
        with pytest.raises(kho.BusyError, match="another process has become its owner"):
            candidate.adopt(predecessor=Predecessor([], [(0, 1)], os.getpid() + 1))
        with candidate.adopt(predecessor=Predecessor([], [], os.getpid())) as h:
            h.put("a", b"one")
            assert h.commit() == 1
