"""`kho.Memory.from_reader`: memory that a function reads is read as a file with the same content is."""

from __future__ import annotations

import array
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kho
from kho.handover import extract, memmap, owners
from kho.handover.describe import describe
from kho.handover.verify import verify

from captures import NAMES, elf

SMALL = "linux-6.18.15-x86_64"
LUO = "linux-7.3.4-x86_64"
WINDOW = 1 << 20


class Reader:
    """Reads a file; counts the calls, and lets a test replace what one of them does."""

    def __init__(self, path: Path) -> None:
        self.file = kho.Memory.open(path)
        self.calls: list[tuple[int, int]] = []
        self.instead: dict[int, Callable[[int, int], Any]] = {}

    def __call__(self, phys: int, n: int) -> Any:
        self.calls.append((phys, n))
        return self.instead.get(len(self.calls) - 1, self.file.read)(phys, n)

    def memory(self) -> kho.Memory:
        return kho.Memory.from_reader(self, self.file.ranges)


def everything(memory: kho.Memory, folder: Path | None = None) -> dict[str, Any]:
    """What all parts of the library make of a handover."""
    inc = kho.open(memory)
    found = owners.owners(inc)
    made: dict[str, Any] = {
        "describe": describe(inc, full=True),
        "verify": [finding.as_dict() for finding in verify(inc)],
        "owners": list(found.rows),
        "map": memmap.build(inc, inc.ranges).as_dict(),
        "items": [
            (item.kind, item.name, item.content and extract.sha256_of(item.content)) for item in extract.items(inc)
        ],
        "folios": [bytes(inc.restore_folio(phys)) for phys, _ in list(inc.folios)[:8]],
        "unlisted": len(inc.unlisted_memfds),
    }
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_and_a_file_with_its_content_give_the_same(name: str) -> None:
    reader = Reader(elf(name))
    given, own = everything(reader.memory()), everything(kho.Memory.from_segments(contents(reader.file)))
    assert given == own
    for phys, n in reader.calls:
        assert 0 < n <= WINDOW
        assert any(start <= phys and phys + n <= start + size for start, size in reader.file.ranges)


def contents(memory: kho.Memory) -> list[tuple[int, bytes]]:
    return [(phys, memory.read(phys, n)) for phys, n in memory.ranges]


def test_no_more_is_read_than_is_needed() -> None:
    reader = Reader(elf(LUO))
    fdt = kho.open(elf(LUO)).fdt_phys
    memory = kho.Memory.from_reader(reader, [(0, 1 << 45)])  # most of it is not there, and is not asked for
    inc = kho.open(memory, fdt_phys=fdt)
    assert inc.nr_folios == 134
    assert sum(n for _, n in reader.calls) < 1 << 20
    assert memory.nbytes == 1 << 45


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda read: array.array("B", read)])
def test_any_object_with_a_buffer_is_bytes(make: Callable[[bytes], Any]) -> None:
    memory = kho.Memory.from_reader(lambda phys, n: make(bytes(range(phys, phys + n))), [(0, 200)])
    assert memory.read(5, 4) == b"\5\6\7\10"
    assert memory.read(199, 1) == b"\xc7"


def test_ranges_merge_and_reads_outside_them_never_reach_the_reader() -> None:
    asked: list[int] = []
    count: Any = asked.append
    memory = kho.Memory.from_reader(lambda phys, n: count(phys), iter([(64, 64), (0, 64), (32, 8), (9, 0)]))
    assert memory.ranges == [(0, 128)]
    for phys, n in ((128, 1), (120, 9), (1 << 63, 1), (2**64 - 1, 1)):
        with pytest.raises(kho.OutsideMemoryError):
            memory.read(phys, n)
    assert asked == []
    top = kho.Memory.from_reader(lambda phys, n: bytes(n), [(2**64 - 8, 8)])
    assert top.read(2**64 - 8, 8) == bytes(8)
    with pytest.raises(kho.OutOfRangeError):
        kho.Memory.from_reader(lambda phys, n: b"", [(2**64 - 8, 9)])
    whole = kho.Memory.from_reader(lambda phys, n: bytes(n), [(0, 2**63), (2**63, 2**63)])
    assert whole.nbytes == 2**64


def test_what_is_no_function_or_no_range_is_refused() -> None:
    with pytest.raises(TypeError, match="the reader is a bytes, not a function"):
        kho.Memory.from_reader(b"abc", [(0, 3)])  # type: ignore[arg-type]
    ranges: Any
    for ranges in (7, [7], [(1, 2, 3)], [("a", 1)]):
        with pytest.raises((TypeError, ValueError)):
            kho.Memory.from_reader(lambda phys, n: b"", ranges)


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"abc", kho.SourceError, "memory at 0x10: the reader returned 3 bytes of 4; for memory that it lacks"),
        (b"abcde", kho.SourceError, "the reader returned 5 bytes of 4"),
        (b"", kho.SourceError, "the reader returned 0 bytes of 4"),
        (array.array("Q", [1]), kho.SourceError, "the reader returned 8 bytes of 4"),
        (None, TypeError, "memory at 0x10: the reader returned a NoneType, not 4 bytes"),
        ("abcd", TypeError, "the reader returned a str, not 4 bytes"),
        ([1, 2, 3, 4], TypeError, "the reader returned a list, not 4 bytes"),
    ],
)
def test_an_answer_that_is_not_n_bytes_is_an_error(answer: Any, error: type[Exception], text: str) -> None:
    memory = kho.Memory.from_reader(lambda phys, n: answer, [(0, 1 << 16)])
    with pytest.raises(error, match=text):
        memory.read(0x10, 4)
    with pytest.raises(error, match="the reader returned"):
        kho.open(memory)
    with pytest.raises(error, match="the reader returned"):
        kho.open(memory, fdt_phys=0x1000)


class MineError(Exception):
    """No class of kho."""


@pytest.mark.parametrize("name", [SMALL, LUO])
def test_an_exception_in_any_call_reaches_the_caller_as_it_is(name: str) -> None:
    reader = Reader(elf(name))
    everything(reader.memory())
    calls = len(reader.calls)
    assert calls > 50
    for at in {*range(0, calls, max(calls // 60, 1)), calls - 1}:
        failing = Reader(elf(name))
        error = MineError(at)

        def fail(phys: int, n: int, error: MineError = error) -> bytes:
            raise error

        failing.instead = dict.fromkeys(range(at, at + 1), fail)
        with pytest.raises(MineError) as raised:
            everything(failing.memory())
        assert raised.value is error
        # The work ended there: code that probes memory asked no further.
        assert len(failing.calls) == at + 1


def test_ctrl_c_in_a_reader_ends_the_work() -> None:
    reader = Reader(elf(SMALL))

    def interrupted(phys: int, n: int) -> bytes:
        raise KeyboardInterrupt

    reader.instead[1] = interrupted
    with pytest.raises(KeyboardInterrupt):
        kho.open(reader.memory())
    assert len(reader.calls) == 2
    assert kho.open(reader.memory()).nr_folios == 16  # nothing of it is left


@pytest.mark.parametrize("error", [kho.LeftOutError, kho.CutOffError, kho.OutsideMemoryError])
def test_memory_that_the_reader_lacks_is_skipped_by_the_search_alone(error: type[kho.KhoError]) -> None:
    file = kho.Memory.open(elf(SMALL))
    first = min(phys for phys, _ in file.ranges) & ~(WINDOW - 1)
    last = max(phys + n for phys, n in file.ranges)

    def read(phys: int, n: int) -> bytes:
        if not any(start <= phys and phys + n <= start + size for start, size in file.ranges):
            raise error(f"nothing at {phys:#x}")
        return file.read(phys, n)

    gap = next(end for (_, end), (start, _) in pairs(file.ranges) if end < start)
    memory = kho.Memory.from_reader(read, [(first, last - first)])
    inc = kho.open(memory)
    assert (inc.fdt_phys, inc.nr_folios) == (kho.open(file).fdt_phys, 16)
    with pytest.raises(error) as raised:
        memory.read(gap, 1)
    assert type(raised.value) is error


def pairs(ranges: list[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    ends = [(start, start + size) for start, size in ranges]
    return list(itertools.pairwise(ends))


def test_a_reader_may_read_the_handover_that_it_serves() -> None:
    reader = Reader(elf(LUO))
    inc = kho.open(reader.memory())
    inside = False
    seen = 0

    def nested(phys: int, n: int) -> bytes:
        nonlocal inside, seen
        if not inside:
            inside = True
            seen += sum(len(session.files) for session in inc.luo.sessions.values())
            assert inc.read(phys, n) == reader.file.read(phys, n)
            inside = False
        return reader.file.read(phys, n)

    calls = len(reader.calls)
    reader.instead = dict.fromkeys(range(calls, calls + 10_000), nested)
    assert describe(inc)["luo"] == describe(kho.open(elf(LUO)))["luo"]
    assert seen > 0


def test_a_reader_that_reads_itself_is_refused() -> None:
    depth = 0

    def read(phys: int, n: int) -> bytes:
        nonlocal depth
        depth += 1
        return memory.read(phys, n)

    memory = kho.Memory.from_reader(read, [(0, 1 << 30)])
    with pytest.raises(RecursionError, match="does one read itself"):
        memory.read(0, WINDOW)
    assert depth < 20
    with pytest.raises(RecursionError):
        kho.open(memory)


def test_threads_may_share_a_reader_and_each_gets_its_own_exception() -> None:
    file = kho.Memory.open(elf(LUO))
    broken = threading.local()

    def read(phys: int, n: int) -> bytes:
        if getattr(broken, "error", None) is not None:
            raise broken.error
        return file.read(phys, n)

    inc = kho.open(kho.Memory.from_reader(read, file.ranges))
    results: list[object] = []

    def work(error: Exception | None) -> None:
        broken.error = error
        for _ in range(20):
            try:
                results.append(describe(inc)["luo"]["sessions"][0]["name"])
            except MineError as raised:
                results.append(raised is error)

    threads = [threading.Thread(target=work, args=(error,)) for error in (None, MineError(1), None, MineError(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results.count("vm-1"), results.count(True), len(results)) == (40, 40, 80)


def test_vmcoreinfo_is_that_of_the_source() -> None:
    memory = kho.Memory.from_reader(
        lambda phys, n: bytes(n), [(0, 4096)], vmcoreinfo=b"OSRELEASE=7.3.4\nPAGESIZE=4096\n"
    )
    assert memory.vmcoreinfo("OSRELEASE") == "7.3.4"
    assert (memory.machine, memory.sources, memory.absent, memory.truncated) == (None, [], [], [])
    assert repr(memory) == "<kho.Memory of 0x1000 bytes in 1 run>"


def test_what_is_opened_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="kho"):
        kho.open(elf(SMALL))
        kho.open(Reader(elf(SMALL)).memory())
    first, second = [record.getMessage() for record in caplog.records if record.name == "kho"]
    assert first.startswith(f"{elf(SMALL)}: kho-v1, root FDT at 0x")
    assert second.startswith("<kho.Memory of 0x")
    caplog.clear()
    kho.open(elf(SMALL))
    assert not caplog.records
