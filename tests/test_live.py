"""kho.live: objects that stay in place from one process to the next."""

from __future__ import annotations

import array
import gc
import json
import mmap
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kho
import kho.live
from kho.formats import Live

from livefiles import DTYPES, blocks, contents, descriptors

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIB = 1 << 20


def test_committed_objects_are_found_in_place_by_the_next_process(image: Path) -> None:
    with kho.live.open("index", "8M", backing=image, version="2") as h:
        assert (h.inherited, h.generation, h.names(), h.dropped, h.torn) == (False, 0, [], (), None)
        vectors = h.empty("vectors", (100, 30), "f4")
        vectors[:] = np.arange(3000, dtype="f4").reshape(100, 30)
        h.put("blob", b"hello")
        assert h.commit() == 1
    with kho.live.open("index", backing=image, version="2") as h:
        assert (h.inherited, h.generation, h.names()) == (True, 1, ["vectors", "blob"])
        assert h.stats()["size"] == 8 * MIB, "an image keeps its size"
        assert np.array_equal(h["vectors"], np.arange(3000).reshape(100, 30))
        assert bytes(h["blob"]) == b"hello"
        assert h.verify() == 12005
        assert len(h) == 2
        assert "blob" in h
        assert list(h) == ["vectors", "blob"]
        h.release()
    assert not image.exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 300, 2)])
def test_arrays_of_any_plain_dtype_come_back(image: Path, dtype: str, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = np.frombuffer(bytes(i * 7 % 2 for i in range(size)), dtype).reshape(shape)
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", array)
        filled = h.empty("b", shape, dtype)
        filled[...] = array
        h.commit()
    with kho.live.open("x", "1M", backing=image) as h:
        for name in ("a", "b"):
            again = h[name]
            assert isinstance(again, np.ndarray)
            assert (again.dtype, again.shape) == (np.dtype(dtype), shape)
            assert again.tobytes() == array.tobytes()
            assert not again.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.zeros(3, [("a", "f4"), ("b", "i2")]),
        np.zeros(2, "V8"),
        np.zeros(2, "g"),
        np.array(["", ""], "S0").view("S1")[:0].astype("O"),
    ],
)
def test_values_that_an_image_cannot_hold_are_refused(image: Path, value: np.ndarray) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        with pytest.raises(kho.ParameterError, match="images hold numbers, booleans, times"):
            h.put("a", value)
        assert h.names() == []
        with pytest.raises(TypeError):
            h.put("a", "text")  # type: ignore[arg-type]
        with pytest.raises(kho.ParameterError):
            h.empty("a", (-1,))
        with pytest.raises(kho.ParameterError, match="32 dimensions"):
            h.empty("a", (1,) * 33)
        with pytest.raises(kho.ParameterError, match="dtype 'nonsense'"):
            h.empty("a", 3, "nonsense")
        for name in ("", "a\0b", "x" * 256, "\ud800"):
            with pytest.raises(kho.ParameterError, match="1 to 255 bytes"):
                h.put(name, b"")


def test_buffers_and_arrays_that_are_not_contiguous_are_copied_in_order(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        grid = np.arange(24, dtype="i4").reshape(4, 6)
        h.put("fortran", np.asfortranarray(grid))
        h.put("strided", grid[::2, ::-1])
        h.put("buffer", array.array("h", [1, 2, 3]))
        h.put("slice", memoryview(bytes(range(10)))[::3])
        h.put("nothing", b"")
        h.commit()
        assert np.array_equal(h["fortran"], grid)
        assert np.array_equal(h["strided"], grid[::2, ::-1])
        assert bytes(h["buffer"]) == b"\1\0\2\0\3\0"
        assert bytes(h["slice"]) == b"\0\3\6\x09"
        assert bytes(h["nothing"]) == b""


# Views


def test_committed_arrays_cannot_be_written(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        filled = h.empty("a", 4, "u1")
        filled[:] = 7
        with pytest.raises(ValueError):
            h["a"][0] = 1
        h.commit()
        for view in (filled, h["a"]):
            with pytest.raises(ValueError, match="read-only"):
                view[0] = 1
        with pytest.raises(ValueError):
            h["a"].flags.writeable = True
        h.put("b", b"bytes")
        h.commit()
        with pytest.raises(TypeError):
            h["b"][0] = 1
        h.verify()


def test_views_are_the_memory_itself(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        filled = h.empty("a", 4096, "u1")
        seen = h["a"]
        filled[17] = 3
        assert seen[17] == 3
        assert not np.asarray(seen).flags.owndata


def test_an_array_that_is_held_outlives_its_object_and_the_handle(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", np.full(100_000, 7, "u1"))
        h.commit()
        held = h["a"][5:]
        del h["a"]
        h.commit()
        assert h.stats()["pinned_bytes"] == 102_400
        for i in range(8):
            h.put("b", np.full(100_000, i, "u1"))
            h.commit()
        assert (held == 7).all(), "memory that an array shows is not given to another object"
        half = held[::2]
        del held
        gc.collect()
        assert h.stats()["pinned_bytes"] == 102_400
        del half
        gc.collect()
        assert h.stats()["pinned_bytes"] == 0
        last = h["b"]
    assert (last == 7).all(), "and stays mapped when the handle is closed"


def test_an_edit_is_a_copy_until_it_is_committed(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", np.arange(10))
        h.commit()
        before = h["a"]
        edited = h.edit("a")
        edited[0] = 99
        assert before[0] == 0
        with kho.live.attach(image) as other:
            assert other["a"][0] == 0
        h.commit()
        assert (before[0], h["a"][0], h.info("a").generation) == (0, 99, 2)
        with pytest.raises(kho.NotFoundError):
            h.edit("b")


# Commits


def test_uncommitted_changes_are_dropped_and_their_names_reported(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("kept", b"1")
        h.put("changed", b"old")
        h.commit()
        h.put("changed", b"new")
        h.put("new", b"2")
        del h["kept"]
        assert h.uncommitted == ["changed", "new", "kept"]
        assert h.names() == ["changed", "new"]
    with kho.live.open("x", "1M", backing=image) as h:
        assert h.dropped == ("changed", "new", "kept")
        h.rollback()
        assert {name: bytes(h[name]) for name in h} == {"kept": b"1", "changed": b"old"}
    with kho.live.open("x", "1M", backing=image) as h:
        assert h.dropped == (), "it is reported once"


def test_a_rollback_drops_uncommitted_changes(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", b"1")
        h.commit()
        free = h.stats()["free"]
        h.put("a", b"2")
        h.put("b", b"3")
        h.rollback()
        assert (h.names(), bytes(h["a"]), h.uncommitted, h.stats()["free"]) == (["a"], b"1", [], free)
        assert h.commit() == 1, "there is nothing to commit"


def test_a_deleted_object_is_gone_with_the_commit(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:

        def free() -> int:
            return h.stats()["free"] + h.stats()["metadata_bytes"]

        before = free()
        h.put("a", bytes(100_000))
        del h["a"]
        assert (h.names(), h.uncommitted, free()) == ([], [], before)
        for read in (h.__getitem__, h.__delitem__, h.info):
            with pytest.raises(kho.NotFoundError, match="no object 'a'"):
                read("a")
        h.put("a", bytes(100_000))
        h.commit()
        del h["a"]
        with pytest.raises(kho.NotFoundError, match="was deleted"):
            h["a"]
        h.commit()
        assert h.names() == []
        assert free() == before


def test_checksums_of_unchanged_objects_are_not_computed_again(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kho.live.open("x", "4M", backing=image) as h:
        h.put("large", bytes(MIB))
        h.commit()
        summed: list[int] = []
        real = zlib.crc32

        def crc32(data: Buffer) -> int:
            summed.append(memoryview(data).nbytes)
            return real(data)

        monkeypatch.setattr(zlib, "crc32", crc32)
        h.put("small", b"1234")
        h.commit()
        assert 4 in summed
        assert MIB not in summed


def test_a_thousand_generations_take_no_more_memory_than_ten(image: Path) -> None:
    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    with kho.live.open("x", "4M", backing=image) as h:
        h.put("stays", bytes(50_000))
        seen = []
        before = (0, Counter[str](), 0, 0)
        for i in range(1000):
            h.put("a", np.full(20_000 + i % 7 * 5000, i % 256, "u1"))
            h.put(f"b{i % 5}", b"x" * (i % 3000))
            h.commit()
            if i >= 10:
                seen.append(blocks(image))
            if i == 100:
                before = rss(), descriptors(), image.stat().st_size, h.stats()["free"] // (64 << 10)
        assert max(seen) - min(seen) <= 64 << 10
        assert max(seen) < 500 << 10, "up to 140 KiB are kept for the next commit"
        after = rss(), descriptors(), image.stat().st_size, h.stats()["free"] // (64 << 10)
        assert after[1:3] == before[1:3]
        assert abs(after[3] - before[3]) <= 1
        assert after[0] - before[0] < 4 * MIB
        h.verify()


def test_a_full_image_reports_needed_and_free_bytes_and_can_be_emptied(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        with pytest.raises(kho.OutOfMemoryError, match=r"put 'big' needs 980.0 KiB in one run; 832.0 KiB free"):
            h.put("big", bytes(1_000_000))
        assert (h.names(), h.uncommitted) == ([], [])
        count = 0
        with pytest.raises(kho.OutOfMemoryError, match="larger size"):
            for i in range(300):
                h.put(f"o{i}", bytes(4096))
                count = i + 1
        h.commit()
        assert count > 120
        for i in range(count):
            del h[f"o{i}"]
        h.commit()
        h.put("big", bytes(600_000))
        h.commit()
    with pytest.raises(kho.ParameterError, match="size"):
        kho.live.open("x", "1K", backing=image.with_name("other"))
    with pytest.raises(kho.ParameterError, match="'lots' is not a number.*write 4096"):
        kho.live.open("x", "lots", backing=image.with_name("other"))


def test_many_names_make_metadata_of_many_pages(image: Path) -> None:
    with kho.live.open("x", "32M", backing=image) as h:
        for i in range(3000):
            h.put(f"object number {i}", i.to_bytes(4, "little"))
        h.commit()
    with kho.live.open("x", "32M", backing=image) as h:
        assert len(h) == 3000
        assert all(int.from_bytes(h[f"object number {i}"], "little") == i for i in range(0, 3000, 97))


# Other tools


def test_inspect_and_verify_read_the_image_of_a_running_service(image: Path) -> None:
    with kho.live.open("search", "4M", backing=image, version="7") as h:
        h.put("vectors", np.zeros((300, 8), "f4"))
        h.put("[names]", b"a,b")
        h.commit()
        del h["vectors"]
        run = [sys.executable, "-m", "kho", "inspect", str(image)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        assert "kho.live: generation 1 of search, version 7" in text
        assert "vectors  <f4    300 x 8" in text
        assert "[names]  bytes" in text
        data = json.loads(subprocess.run([*run, "--json"], capture_output=True, check=True).stdout)
        assert [(row["name"], row["dtype"], row["shape"]) for row in data["live"]["objects"]] == [
            ("vectors", "<f4", [300, 8]),
            ("[names]", None, [3]),
        ]
        verify = [sys.executable, "-m", "kho", "verify", str(image)]
        assert "0 errors, 0 warnings" in subprocess.run(verify, capture_output=True, text=True, check=True).stdout
        inc = kho.open(image)
        live = inc.payloads["kho-live"]
        assert isinstance(live, Live)
        item = live.catalog.items["vectors"]
        assert inc.read(item.phys, item.nbytes) == bytes(9600)
        assert kho.Arena.open(image).fdt_phys == inc.fdt_phys
        assert {owned.owner for owned in live.owned()} == {"search vectors", "search [names]"}


def test_importing_kho_does_not_import_live() -> None:
    program = "import sys, kho; assert 'kho.live' not in sys.modules; kho.live.open; assert 'kho.live' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_numpy_objects_are_memoryviews(image: Path) -> None:
    program = """
import sys
sys.modules["numpy"] = None
import array, kho.live
h = kho.live.open("x", "1M", backing=sys.argv[1])
a = h.empty("a", (2, 3), "f4")
a[1, 2] = 1.5
h.put("b", array.array("i", [1, 2]))
h.empty("c", 4, "<U3")
h.commit()
try: a[0, 0] = 1
except ValueError: pass
else: raise SystemExit("writable")
print(h["a"].format, h["a"].shape, h["a"][1, 2], h["a"].readonly, bytes(h["b"]), h["c"].nbytes)
try: h.empty("d", 3, 5)
except kho.ParameterError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(image)], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        r"f (2, 3) 1.5 True b'\x01\x00\x00\x00\x02\x00\x00\x00' 48",
        "dtype 5: without numpy, say it as '<f4'",
    ]
    with kho.live.open("x", "1M", backing=image) as h:
        assert contents(h)["a"] == (("<f4", (2, 3)), np.array([[0, 0, 0], [0, 0, 1.5]], "f4").tobytes())
