"""Mapped files: what is exported, how long it lives, and the errors of the system."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import kho
from kho.live.file.mapping import Mapping, punch

PAGE = 4096
SIZE = 4 * PAGE


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("kho-test")
    os.ftruncate(made, SIZE)
    yield made
    os.close(made)


def test_two_mappings_of_a_file_show_the_same_bytes(fd: int) -> None:
    whole, part = Mapping(fd, 0, SIZE, writable=True), Mapping(fd, PAGE, PAGE, writable=False)
    whole.view(PAGE + 7, 3)[:] = b"abc"
    assert bytes(part.view(7, 3)) == b"abc"
    assert os.pread(fd, 3, PAGE + 7) == b"abc"
    whole.flush(PAGE + 7, 3)
    assert (whole.size, part.size) == (SIZE, PAGE)


def test_an_update_stores_the_pages_that_differ_and_no_others(fd: int) -> None:
    mapping = Mapping(fd, 0, SIZE, writable=True)
    data = bytes(range(1, 251)) * 40
    for at in (0, 1, PAGE - 1):
        os.pwrite(fd, bytes(SIZE), 0)
        assert mapping.update(at, data) == 3
        assert mapping.update(at, data) == 0
        assert os.pread(fd, SIZE, 0) == bytes(at) + data + bytes(SIZE - at - len(data))
    changed = data[:5000] + b"\0" + data[5001:]
    assert mapping.update(PAGE - 1, changed) == 1
    assert os.pread(fd, len(data), PAGE - 1) == changed
    assert mapping.update(SIZE, b"") == 0
    with pytest.raises(kho.OutsideMemoryError):
        mapping.update(SIZE - len(data) + 1, data)
    with pytest.raises(TypeError):
        Mapping(fd, 0, SIZE, writable=False).update(0, data[::-1])


def test_what_was_mapped_for_reading_gives_no_writable_view(fd: int) -> None:
    exporter = Mapping(fd, 0, SIZE, writable=False).exporter(0, 16)
    assert memoryview(exporter).readonly
    assert not np.frombuffer(memoryview(exporter), np.uint8).flags.writeable
    with pytest.raises((BufferError, TypeError)):
        os.readv(fd, [exporter])


def test_a_mapping_lives_as_long_as_its_last_view(fd: int) -> None:
    mapping = Mapping(fd, 0, SIZE, writable=True)
    exporter = mapping.exporter(0, PAGE)
    array = np.frombuffer(memoryview(exporter), np.uint8)[100:]
    gone, exported = weakref.ref(mapping), weakref.ref(exporter)
    del mapping, exporter
    gc.collect()
    assert gone() is not None
    assert exported() is not None
    array[0] = 7
    assert os.pread(fd, 1, 100) == b"\x07"
    del array
    gc.collect()
    assert gone() is None
    assert exported() is None


def test_a_circle_through_what_a_mapping_keeps_is_collected(fd: int) -> None:
    mapping = Mapping(fd, 0, SIZE, writable=False)
    mapping.keeps.append(mapping.exporter(0, 8))
    gone = weakref.ref(mapping)
    del mapping
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("at", "nbytes"), [(0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2), (1, 2**64 - 1), (2**64 - 1, 1), (2**63, 2**63)]
)
def test_bytes_outside_are_refused(fd: int, at: int, nbytes: int) -> None:
    mapping = Mapping(fd, 0, SIZE, writable=True)
    with pytest.raises(kho.OutsideMemoryError):
        mapping.view(at, nbytes)
    with pytest.raises(kho.OutsideMemoryError):
        mapping.flush(at, nbytes)
    assert not mapping.view(SIZE, 0)


def test_errors_of_the_system_name_their_number(fd: int) -> None:
    with pytest.raises(kho.SourceError, match=r"map 0x4000 bytes: .*EINVAL") as unaligned:
        Mapping(fd, 1, SIZE, writable=False)
    assert unaligned.value.errno == errno.EINVAL
    with pytest.raises(kho.SourceError, match="EBADF"):
        Mapping(1 << 20, 0, SIZE, writable=False)
    with pytest.raises(kho.ParameterError, match="-1 is negative"):
        Mapping(-1, 0, SIZE, writable=False)
    with pytest.raises(kho.ParameterError, match="0 bytes"):
        Mapping(fd, 0, 0, writable=False)
    with pytest.raises(kho.OutOfMemoryError, match="ENOMEM"):
        Mapping(fd, 0, 1 << 62, writable=False)


def test_a_punched_part_reads_as_zeros_and_takes_no_memory(fd: int) -> None:
    os.pwrite(fd, b"x" * SIZE, 0)
    assert punch(fd, PAGE, 2 * PAGE)
    assert os.pread(fd, SIZE, 0) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
    assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512) == (SIZE, 2 * PAGE)
    assert punch(fd, 0, 0)
    with pytest.raises(kho.SourceError, match="EBADF"):
        punch(1 << 20, 0, PAGE)
