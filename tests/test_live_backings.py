"""kho.live: backings of an image: files, memfds, huge pages."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kho
import kho.live

from livefiles import descriptors

MIB = 1 << 20


def test_a_memfd_is_sealed_and_goes_by_its_descriptor() -> None:
    before = descriptors()
    with kho.live.open("x", "1M", backing="memfd") as h:
        h.put("a", b"1")
        h.commit()
        with pytest.raises(OSError):
            os.ftruncate(h.fileno(), 0)
        with pytest.raises(OSError):
            os.ftruncate(h.fileno(), 1 << 30)
        passed = os.dup(h.fileno())
        with pytest.raises(kho.BusyError):
            kho.live.open("x", "1M", backing=passed)
    with kho.live.open("x", "1M", backing=passed) as h:
        assert (h.inherited, bytes(h["a"])) == (True, b"1")
        h.release()
    with kho.live.open("x", "1M", backing=passed) as h:
        assert (h.inherited, h.generation, h.names()) == (False, 0, []), "a released memfd can be used again"
    os.close(passed)
    assert descriptors() <= before


def test_the_owners_lock_goes_across_exec() -> None:
    h = kho.live.open("x", "1M")
    h.put("a", b"1")
    h.commit()
    fds = h.fileno(), h.lock_fileno()
    program = (
        "import sys, kho.live, os\n"
        "fd, lock = map(int, sys.argv[1:])\n"
        "try: kho.live.attach(fd).adopt()\n"
        "except kho.BusyError: pass\n"
        "else: sys.exit('adopted without the lock')\n"
        "with kho.live.attach(fd, lock_fd=lock).adopt() as h: print(bytes(h['a']))\n"
    )
    args = [sys.executable, "-c", program, *map(str, fds)]
    done = subprocess.run(args, pass_fds=fds, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("b'1'\n", "")
    h.close()


def test_memfds_that_can_be_shrunk_are_refused() -> None:
    with kho.live.open("x", "1M") as h:
        whole = os.pread(h.fileno(), 8 * MIB, 0)
    fd = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, whole)
    with pytest.raises(kho.FormatError, match="can be shrunk under its readers"):
        kho.live.attach(fd)
    os.close(fd)
    fd = os.memfd_create("unsealable", os.MFD_CLOEXEC)
    with pytest.raises(kho.ParameterError, match="MFD_ALLOW_SEALING"):
        kho.live.open("x", "1M", backing=fd)
    os.close(fd)


def test_an_image_on_huge_pages_behaves_like_any_other(image: Path) -> None:
    free = Path("/proc/sys/vm/nr_hugepages")
    if not free.exists() or int(free.read_text()) < 4:
        with pytest.raises(kho.KhoError):
            kho.live.open("x", "4M", backing="hugetlb")
        pytest.skip("no huge pages")
    with kho.live.open("x", "4M", backing="hugetlb") as h:
        h.put("a", b"1")
        h.commit()
        fd = os.dup(h.fileno())
    with kho.live.open("x", "4M", backing=fd) as h:
        assert bytes(h["a"]) == b"1"
        h.release()
    os.close(fd)


def test_sources_without_an_image_are_refused(image: Path, tmp_path: Path) -> None:
    with pytest.raises(kho.SourceError, match="no such file"):
        kho.live.attach(image)
    with pytest.raises(kho.SourceError):
        kho.live.attach(12345)
    with pytest.raises(kho.SourceError, match=r"no such|No such"):
        kho.live.open("x", "1M", backing=image / "no" / "directory")
    with pytest.raises(kho.KhoError):
        kho.live.open("x", "1M", backing=tmp_path)
    os.mkfifo(image)
    with pytest.raises(kho.SourceError, match="not a file"):
        kho.live.attach(image)
    image.unlink()
    for content in (b"", b"x", bytes(4 * MIB), b"\x7fELF" + bytes(4 * MIB)):
        image.write_bytes(content)
        with pytest.raises(kho.FormatError, match="remove the file|no kho.live image"):
            kho.live.open("x", "1M", backing=image)
        assert image.read_bytes() == content


def test_an_image_can_be_a_file_on_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", b"1")
        h.commit()
    assert image.stat().st_mode & 0o777 == 0o600
    with kho.live.open("x", "1M", backing=image) as h:
        assert bytes(h["a"]) == b"1"


def test_a_full_file_system_raises_an_error_and_no_signal(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", b"1")
        free = h.stats()["free"]
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            with pytest.raises(kho.OutOfMemoryError, match="No space left on device"):
                h.put("b", b"2")
            assert (h.names(), h.generation, h.stats()["free"]) == (["a"], 0, free)
            assert h.commit() == 1, "memory for it was kept"
        h.put("b", b"2")
        assert h.commit() == 2


def test_a_released_image_leaves_nothing(image: Path) -> None:
    before, files = descriptors(), sorted(image.parent.iterdir())
    h = kho.live.open("x", "8M", backing=image)
    h.put("a", b"1" * MIB)
    h.commit()
    candidate = kho.live.attach(image)
    held = h["a"]
    assert h.release() < MIB, "the machine has back what is not read"
    assert os.fstat(candidate.fileno()).st_blocks * 512 > MIB
    assert bytes(held[:4]) == bytes(candidate["a"][:4]) == b"1111"
    with pytest.raises(kho.StaleError, match="another process has released it"):
        candidate.adopt()
    candidate.close()
    del h, candidate, held
    gc.collect()
    assert sorted(image.parent.iterdir()) == files
    assert descriptors() <= before
    with kho.live.open("x", "8M", backing=image) as h:
        assert not h.inherited
