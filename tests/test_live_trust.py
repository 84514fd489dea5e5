"""kho.live: a file, directory or descriptor that other users may change is refused before anything of it is used."""

from __future__ import annotations

import contextlib
import grp
import itertools
import os
import pwd
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import kho
import kho.live
from kho.live.file import trust
from kho.live.handover import registry, server
from kho.live.transports import environ

from livefiles import SHM, child, descriptors, ended, filled, process

OTHER = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def here() -> Iterator[Path]:
    """A directory on tmpfs as /dev/shm is: everybody's, sticky."""
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None, prefix="kho-test-") as name:
        place = Path(name)
        place.chmod(0o1777)
        yield place


def image_at(path: Path) -> Path:
    """An image with an object."""
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", b"secret")
        h.commit()
    return path


def opened(path: Path) -> None:
    """Own it."""
    kho.live.open("x", "1M", backing=path).close()


def attached(path: Path) -> None:
    """Read it."""
    kho.live.attach(path).close()


def loaded(path: Path) -> None:
    """Use it as the image of weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({"a": np.ones(3, "f4")}, file)
        kho.live.safetensors.load(file, backing=path)


WAYS: list[Callable[[Path], object]] = [opened, attached, registry.release, loaded]


@contextmanager
def seen_as(monkeypatch: pytest.MonkeyPatch, euid: int, **fields: int) -> Iterator[None]:
    """Have regular files look as if they had these fields of stat, to a process of that user."""
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        status = real(fd)
        if not stat.S_ISREG(status.st_mode):
            return status
        order = ["st_mode", "st_ino", "st_dev", "st_nlink", "st_uid"]
        shown = list(status)
        for at, key in enumerate(order):
            shown[at] = fields.get(key, shown[at])
        return os.stat_result(shown, {"st_blocks": status.st_blocks, "st_blksize": status.st_blksize})

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fstat)
        patched.setattr(os, "geteuid", lambda: euid)
        yield


def test_a_file_is_used_if_and_only_if_no_other_user_may_change_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_at(here / "image")
    fd = os.open(path, os.O_RDWR)
    for uid, mode, links in itertools.product((0, 1000, 2000), (0o600, 0o644, 0o660, 0o602, 0o666), (1, 2)):
        good = uid in (0, 1000) and not mode & 0o022 and links == 1
        fields = {"st_uid": uid, "st_mode": stat.S_IFREG | mode, "st_nlink": links}
        with seen_as(monkeypatch, 1000, **fields):
            for policy in ("private", uid, "directory", "any"):
                allowed = policy == "any" or good or (policy == uid and not mode & 0o022 and links == 1)
                checks = trust.policy_of(policy)
                if allowed:
                    trust.check_descriptor(fd, "here", checks)
                    continue
                with pytest.raises(kho.UntrustedError, match="here: .*trust="):
                    trust.check_descriptor(fd, "here", checks)
    os.close(fd)


def test_a_file_without_a_name_is_used_with_any_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o777)
    trust.check_descriptor(fd, "here")
    with seen_as(monkeypatch, 1000, st_uid=2000), pytest.raises(kho.UntrustedError, match="of user 2000"):
        trust.check_descriptor(fd, "here")
    os.close(fd)


def test_a_directory_is_used_if_and_only_if_no_other_user_may_rename_in_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = here / "place"
    place.mkdir()
    path = image_at(place / "image")
    monkeypatch.setattr(trust, "_private_group", lambda gid: False)
    for mode in (0o700, 0o755, 0o1777, 0o1770, 0o2755, 0o775, 0o757, 0o777, 0o2775):
        place.chmod(mode)
        good = bool(mode & stat.S_ISVTX) or not mode & 0o022
        for way in (opened, attached, lambda path: kho.live.open("y", "1M", backing=path.with_name("new")).release()):
            if good:
                way(path)
                continue
            with pytest.raises(kho.UntrustedError, match=r"mode 0o\d+: others may replace.*trust='directory'"):
                way(path)
        kho.live.attach(path, trust="directory").close()
    place.chmod(0o775)
    monkeypatch.setattr(trust, "_private_group", lambda gid: True)
    attached(path)
    assert {file.name for file in place.iterdir()} == {"image"}


@pytest.mark.parametrize("value", ["", "Private", "root", -1, 1 << 32, True, 1.5, None, b"any"])
def test_trust_takes_one_of_four_values(here: Path, value: Any) -> None:
    says = "'private', 'directory', 'any'"
    with pytest.raises(kho.ParameterError, match=says):
        kho.live.open("x", "1M", backing=here / "image", trust=value)
    with pytest.raises(kho.ParameterError, match=says):
        kho.live.attach(0, trust=value)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_symbolic_link_is_not_followed(here: Path, way: Callable[[Path], object]) -> None:
    image_at(here / "image")
    (here / "link").symlink_to(here / "image")
    with pytest.raises(kho.UntrustedError, match="link: a symbolic link.*the path that it leads to"):
        way(here / "link")
    (here / "dangling").symlink_to(here / "none")
    with pytest.raises(kho.UntrustedError, match="symbolic link"):
        way(here / "dangling")
    assert not (here / "none").exists()
    kho.live.attach(here / "link", trust="any").close()


@pytest.mark.parametrize("way", WAYS)
def test_a_second_name_of_a_file_is_refused(here: Path, way: Callable[[Path], object]) -> None:
    image_at(here / "image")
    (here / "second").hardlink_to(here / "image")
    for name in ("image", "second"):
        with pytest.raises(kho.UntrustedError, match="2 names"):
            way(here / name)
    (here / "second").unlink()
    attached(here / "image")


@pytest.mark.parametrize("way", WAYS)
def test_a_path_that_is_not_a_regular_file_is_not_opened(here: Path, way: Callable[[Path], object]) -> None:
    os.mkfifo(here / "pipe")
    (here / "directory").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(here / "socket"))
    for path in (here / "pipe", here / "directory", here / "socket", Path("/dev/null"), Path("/dev/ptmx")):
        with pytest.raises(kho.SourceError, match="not a file"):
            way(path)
    listener.close()


@root
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [0o666, 0o600, 0o644])
def test_a_file_that_another_user_made_is_refused_and_stays_as_it_is(
    here: Path, way: Callable[[Path], object], mode: int
) -> None:
    path = image_at(here / "image")
    for content in (b"", path.read_bytes()):
        path.unlink()

        def plant(content: bytes = content) -> None:
            os.setuid(OTHER)
            os.umask(0)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            os.write(fd, content)

        assert ended(child(plant)) == 0
        assert path.stat().st_uid == OTHER
        with pytest.raises(kho.UntrustedError, match=rf"of user {OTHER} .*directory of your own, or say trust={OTHER}"):
            way(path)
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == mode
    with kho.live.attach(path, trust="any") as reader:
        assert bytes(reader["a"]) == b"secret"
    if not mode & 0o022:
        kho.live.attach(path, trust=OTHER).close()


@root
def test_a_user_takes_roots_files_and_not_a_third_ones(here: Path) -> None:
    roots, third = image_at(here / "root"), image_at(here / "third")
    roots.chmod(0o600)
    os.chown(third, 1234, 1234)
    third.chmod(0o600)

    def user() -> None:
        fds = [os.open(path, os.O_RDWR) for path in (roots, third)]
        os.setuid(OTHER)
        trust.check_descriptor(fds[0], "root's")
        with pytest.raises(kho.UntrustedError, match="of user 1234"):
            trust.check_descriptor(fds[1], "a third one's")
        with pytest.raises(kho.AccessError, match="user 65534 may not"):
            attached(roots)

    assert ended(child(user)) == 0


@root
def test_a_user_who_may_only_read_a_file_attaches_and_cannot_adopt(here: Path) -> None:
    path = image_at(here / "root")
    path.chmod(0o644)
    with kho.live.open("x", backing=path) as h:

        def user() -> None:
            os.setuid(OTHER)
            before = path.read_bytes()
            with kho.live.attach(path) as reader, kho.live.attach(os.open(path, os.O_RDONLY)) as second:
                assert reader.verify() == second.verify() > 0
                assert reader.names() == second.names() == ["a"]
                for candidate in (reader, second):
                    with pytest.raises(kho.AccessError, match=f"user {OTHER} may not"):
                        candidate.adopt()
                    assert bytes(candidate["a"]) == b"secret"
            with pytest.raises(kho.AccessError, match=f"user {OTHER} may not"):
                kho.live.open("x", backing=path)
            assert path.read_bytes() == before

        assert ended(child(user)) == 0
        h.put("b", b"the owner is the owner still")
        h.commit()


@root
def test_a_file_that_takes_the_name_first_is_not_used(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = here / "image", os.link

    def late(*args: Any, **kwargs: Any) -> None:
        path.touch()
        path.chmod(0o666)
        os.chown(path, OTHER, OTHER)
        real(*args, **kwargs)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(kho.UntrustedError, match=f"of user {OTHER}"):
        opened(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_new_image_has_mode_0600_with_any_umask(here: Path, umask: int) -> None:
    def make() -> None:
        if os.geteuid() == 0:
            os.setuid(OTHER)
        os.umask(umask)
        image_at(here / "image")
        image_at(here / "image")
        status = (here / "image").stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_nlink) == (0o600, os.geteuid(), 1)

    assert ended(child(make)) == 0


def test_every_name_of_the_same_place_is_the_same_image(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_at(here / "image")
    (here / "sub").mkdir()
    (here / "way").symlink_to(here)
    monkeypatch.chdir(here / "sub")
    fd = os.open(path, os.O_RDWR)
    links = f"/proc/self/fd/{fd}", f"/dev/fd/{fd}"
    for name in ("../image", here / "sub" / ".." / "image", here / "way" / "image", *links):
        with kho.live.attach(name) as reader:
            assert bytes(reader["a"]) == b"secret"
    os.close(fd)


# Descriptors


@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize(("third", "says"), [("lock", "leads to another file"), ("listener", "is no socket")])
def test_descriptors_of_the_environment_are_checked(
    here: Path, monkeypatch: pytest.MonkeyPatch, third: str, says: str
) -> None:
    with kho.live.open("x", "1M", serve=False) as h:
        h.put("a", b"1")
        h.commit()
        fd, lock = os.dup(h.fileno()), os.dup(h.lock_fileno())
        other = os.open(here / "file", os.O_RDWR | os.O_CREAT)
        given = f"{fd}:{other}:-" if third == "lock" else f"{fd}:{lock}:{other}"
        monkeypatch.setenv(environ.VARIABLE, f"x:{given}")
        with pytest.raises(kho.SourceError, match=says):
            kho.live.open("x")
        for one in (fd, lock, other):
            with contextlib.suppress(OSError):  # a descriptor of another file is not closed
                os.close(one)


def test_a_lock_on_another_file_is_refused(here: Path) -> None:
    one, two = image_at(here / "one"), os.open(here / "two", os.O_RDWR | os.O_CREAT)
    with pytest.raises(kho.SourceError, match="which is to be its lock's, leads to another file"):
        kho.live.attach(one, lock_fd=two)


@root
@pytest.mark.usefixtures("sockets")
def test_a_descriptor_of_another_users_file_is_refused_wherever_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    for content in (True, False):
        fd = os.memfd_create("kho-live:x", os.MFD_ALLOW_SEALING)
        if content:
            with kho.live.open("x", "1M", backing=fd) as h:
                h.put("a", b"1")
                h.commit()
        os.fchown(fd, OTHER, OTHER)
        with pytest.raises(kho.UntrustedError, match="of user"):
            kho.live.open("x", "1M", backing=fd)
        with pytest.raises(kho.UntrustedError, match="of user"):
            kho.live.attach(fd)
        monkeypatch.setenv(environ.VARIABLE, f"x:{os.dup(fd)}:-:-")
        with pytest.raises(kho.UntrustedError, match="of user"):
            kho.live.open("x", "1M")
        with kho.live.open("x", "1M", backing=fd, trust=OTHER) as h:
            assert h.inherited == content
        os.close(fd)
    assert descriptors() <= before


@root
@pytest.mark.usefixtures("sockets")
def test_a_successor_checks_the_descriptor_that_an_owner_passes() -> None:
    def lying(line: Any) -> None:
        h = kho.live.open("x", "4M")
        h.put("a", b"1")
        h.commit()
        os.fchown(h.fileno(), OTHER, OTHER)
        line.say("ready")
        line.hear()

    with process(lying) as old:
        assert old.hear() == ["ready"]
        with pytest.raises(kho.UntrustedError, match="of user"):
            kho.live.open("x")
        with pytest.raises(kho.UntrustedError, match="of user"):
            registry.readable("x")
        old.say("end")


@pytest.mark.usefixtures("sockets")
def test_a_running_services_image_is_used_without_trust() -> None:
    with filled() as old, kho.live.open("x", timeout=5) as h:
        assert bytes(h["a"]) == b"one"
        assert old.ask("handed over", 5)
    assert server.LOOK > 0


def test_a_users_private_group_counts_as_that_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a umask of 002 directories are writable for a group that has the user's name and no other member."""
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: type("User", (), {"pw_name": "me"}))
    for name, members, gid, own in (
        ("me", [], 1000, True),
        ("me", ["me"], 1000, True),
        ("me", ["me", "other"], 1000, False),
        ("staff", [], 1000, False),
        ("me", [], 1001, False),
    ):
        found = type("Group", (), {"gr_name": name, "gr_mem": members})
        monkeypatch.setattr(grp, "getgrgid", lambda _, found=found: found)
        assert trust._private_group(gid) is own


@pytest.mark.parametrize("way", WAYS)
def test_a_path_with_nul_is_a_parameter_error(way: Callable[[Path], object]) -> None:
    with pytest.raises(kho.ParameterError, match="no NUL"):
        way(Path("/dev/shm/a\0b"))
