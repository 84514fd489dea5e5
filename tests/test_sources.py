"""Sources of memory, through the public API."""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho import errors
from kho._kho import Memory

CAPTURE = Path(__file__).parent / "data" / "linux-6.18.15-x86_64" / "handover.elf"
PT_LOAD = 1


def core(*loads: tuple[int, int, bytes], e_type: int = 4, machine: int = 62) -> bytes:
    """An ELF core of segments `(phys, size in memory, bytes in the file)`."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", e_type, machine, 1, 0, 64, 0, 0, 64, 56, len(loads), 0, 0, 0
    )
    headers, content = b"", b""
    start = 64 + 56 * len(loads)
    for phys, size, data in loads:
        headers += struct.pack("<IIQQQQQQ", PT_LOAD, 7, start + len(content), 0, phys, len(data), size, 0)
        content += data
    return header + headers + content


def test_a_real_core_is_read() -> None:
    memory = Memory.open(CAPTURE)
    content = CAPTURE.read_bytes()
    assert memory.machine == "x86_64"
    assert memory.ranges[0] == (0x438000, 0x4000)
    assert len(memory.ranges) == 12
    assert memory.nbytes == sum(size for _, size in memory.ranges) == 0x42000
    assert memory.read(0x6E7000, 0x2000) == content[0x30000:0x32000]
    assert memory.read(0xFB2D000, 0x10000) == bytes(0x10000)
    assert memory.truncated == []
    assert memory.sources == [str(CAPTURE)]
    assert repr(memory) == "<kho.Memory of 0x42000 bytes in 12 runs>"


def test_reads_outside_are_refused() -> None:
    memory = Memory.open(str(CAPTURE))
    for phys, n in ((0, 1), (0x437FFF, 2), (0x43BFFF, 2), (2**64 - 1, 1), (0x438000, 2**63)):
        with pytest.raises(errors.OutsideMemoryError, match=f"{phys:#x}: {n:#x} bytes"):
            memory.read(phys, n)
    assert memory.read(0x438000, 0) == b""


def test_raw_images_need_an_address(tmp_path: Path) -> None:
    image = tmp_path / "ram.bin"
    image.write_bytes(b"0123456789")
    assert Memory.open(image).ranges == [(0, 10)]
    assert Memory.open(f"{image}@1G").ranges == [(1 << 30, 10)]
    part = Memory.open(f"{image}@0x40000000,offset=2,size=0x3")
    assert part.ranges == [(0x40000000, 3)]
    assert part.read(0x40000000, 3) == b"234"
    assert part.machine is None
    assert part.sources == [f"{image}@0x40000000,offset=0x2,size=0x3"]


def test_several_sources_make_one_memory(tmp_path: Path) -> None:
    elf, raw = tmp_path / "a.elf", tmp_path / "b.bin"
    elf.write_bytes(core((0x1000, 8, b"core"), machine=183))
    raw.write_bytes(b"raw!")
    memory = Memory.open(f"{raw}@0x1008", elf)
    assert memory.ranges == [(0x1000, 12)]
    assert memory.read(0x1000, 12) == b"core\0\0\0\0raw!"
    assert memory.machine == "aarch64"
    with pytest.raises(errors.SourceError, match="memory at 0x1007 overlaps memory that starts at 0x1000"):
        Memory.open(elf, f"{raw}@0x1007")
    with pytest.raises(errors.ParameterError, match="none given"):
        Memory.open()


def test_an_existing_file_name_takes_precedence_over_an_address(tmp_path: Path) -> None:
    odd = tmp_path / "ram@0x1000"
    with pytest.raises(errors.SourceError, match="No such file"):
        Memory.open(odd)
    odd.write_bytes(b"x")
    assert Memory.open(odd).ranges == Memory.open(str(odd)).ranges == [(0, 1)]


@pytest.mark.parametrize("place", ["", "x", "0x", "-1", "1,size", "1,end=2", "0x10000000000000000", "size=1"])
def test_an_invalid_address_is_shown(place: str) -> None:
    with pytest.raises(errors.SourceError, match="is not an address") as caught:
        Memory.open(f"ram.bin@{place}")
    assert f'"{place}"' in str(caught.value)


def test_a_source_that_is_not_an_image_is_refused_by_name(tmp_path: Path) -> None:
    empty, fifo, sock = tmp_path / "empty", tmp_path / "fifo", tmp_path / "sock"
    empty.touch()
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sock))
        for path, problem in (
            (tmp_path, "is a directory"),
            (tmp_path / "missing", "No such file"),
            (empty, "is empty"),
            (fifo, "neither a file nor a block device"),
            (sock, "neither a file nor a block device"),
            (Path("/dev/zero"), "neither a file nor a block device"),
        ):
            with pytest.raises(errors.SourceError, match=problem) as caught:
                Memory.open(path)
            assert str(caught.value).startswith(str(path))
            assert isinstance(caught.value, OSError)
    with pytest.raises(TypeError):
        Memory.open(3)  # type: ignore[arg-type]


def as_a_user(act: Callable[[], object]) -> str:
    """Return the class and text of what `act` raises in a child without root's rights; empty if nothing."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = ""
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            act()
        except BaseException as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


def test_what_a_user_may_not_read_is_an_access_error(tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "kho"
    secret.write_bytes(b"x")
    (folder / "in").mkdir(parents=True)
    secret.chmod(0)
    folder.chmod(0)
    try:
        assert re.match("AccessError: .*secret: Permission denied", as_a_user(lambda: Memory.open(secret)))
        assert re.match("AccessError: .*kho.*: Permission denied", as_a_user(lambda: kho.Snapshot.open(folder)))
    finally:
        folder.chmod(0o700)


def test_an_executable_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "vmlinux"
    program.write_bytes(core((0, 1, b"x"), e_type=2))
    with pytest.raises(errors.SourceError, match="type 2, where 4"):
        Memory.open(program)
    assert Memory.open(f"{program}@0").read(1, 3) == b"ELF"


def test_a_read_beyond_the_end_of_a_truncated_core_names_the_address(tmp_path: Path) -> None:
    cut = tmp_path / "cut.elf"
    cut.write_bytes(core((0x1000, 16, b"complete"), (0x3000, 16, b"cut here"))[:-5])
    memory = Memory.open(cut)
    assert memory.truncated == [(str(cut), 0x3003, 5)]
    assert memory.read(0x1000, 16) == b"complete" + bytes(8)
    assert memory.read(0x3000, 3) == b"cut"
    with pytest.raises(errors.SourceError, match="cut.elf: ELF segment 1: memory at 0x3002"):
        memory.read(0x3002, 2)


def test_a_read_larger_than_memory_raises_memory_error(tmp_path: Path) -> None:
    path = tmp_path / "zeros.elf"
    path.write_bytes(core((0x1000, 2**62, b"x")))
    memory = Memory.open(path)
    assert memory.nbytes == 2**62
    assert memory.read(2**61, 8) == bytes(8)
    with pytest.raises(MemoryError):
        memory.read(0x1000, 2**61)


def test_a_file_that_shrinks_is_an_error_not_a_signal(tmp_path: Path) -> None:
    image = tmp_path / "ram.bin"
    image.write_bytes(bytes(0x3000))
    memory = Memory.open(f"{image}@0x1000")
    os.truncate(image, 0x1000)
    assert memory.read(0x1000, 0x1000) == bytes(0x1000)
    with pytest.raises(errors.SourceError, match="memory at 0x1fff"):
        memory.read(0x1FFF, 2)


def test_every_prefix_of_a_core_opens_or_is_refused(tmp_path: Path) -> None:
    content, path = core((0x1000, 16, b"complete"), (0x3000, 16, b"cut here")), tmp_path / "prefix"
    headers = 64 + 2 * 56
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        if length >= headers:
            assert sum(size for _, _, size in Memory.open(path).truncated) == len(content) - length
        elif not 1 <= length <= 3:
            with pytest.raises(errors.SourceError, match="prefix"):
                Memory.open(path)


def test_bytes_are_accepted_as_memory() -> None:
    memory = Memory.from_segments([(0x2000, b"later"), (0x1000, bytearray(b"first")), (0x1005, b"+")])
    assert memory.ranges == [(0x1000, 6), (0x2000, 5)]
    assert memory.read(0x1000, 6) == b"first+"
    assert (memory.machine, memory.sources, memory.truncated) == (None, [], [])
    with pytest.raises(errors.ParameterError, match="0x1003 .* overlaps"):
        Memory.from_segments([(0x1000, b"first"), (0x1003, b"x")])
    with pytest.raises(errors.OutOfRangeError):
        Memory.from_segments([(2**64 - 1, b"xx")])
    assert Memory.from_segments([]).ranges == []


def test_threads_may_share_a_memory() -> None:
    memory, content, wrong = Memory.open(CAPTURE), CAPTURE.read_bytes(), []

    def read(step: int) -> None:
        for offset in range(0, 0x4000, step):
            if memory.read(0x438000 + offset, 1) != content[0x1000 + offset : 0x1001 + offset]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(step,)) for step in (61, 67, 71, 73)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=20), st.integers(0, 9)), min_size=1, max_size=6))
def test_reads_agree_with_a_dict(tmp_path_factory: pytest.TempPathFactory, loads: list[tuple[int, bytes, int]]) -> None:
    model: dict[int, int] = {}
    for phys, data, tail in loads:
        for i, byte in enumerate(data + bytes(tail)):
            model.setdefault(phys + i, byte)
    path = tmp_path_factory.getbasetemp() / "model.elf"
    path.write_bytes(core(*((phys, len(data) + tail, data) for phys, data, tail in loads)))
    if not model:
        with pytest.raises(errors.SourceError, match="is memory"):
            Memory.open(path)
        return
    memory = Memory.open(path)
    assert [at for phys, size in memory.ranges for at in range(phys, phys + size)] == sorted(model)
    for phys, size in memory.ranges:
        assert memory.read(phys, size) == bytes(model[at] for at in range(phys, phys + size))


@given(st.text(max_size=40))
def test_any_text_names_a_source_or_is_refused(text: str) -> None:
    with pytest.raises((errors.SourceError, ValueError)):
        Memory.open(f"/nonexistent/{text}")
