"""kho.live.safetensors: a file's tensors are read once, and attached after that."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import kho
import kho.live
from kho.live import safetensors as cache
from kho.live.safetensors import BITS, DTYPES, RAW, Tensors, load, load_into

from livefiles import blocks, child, descriptors, die, ended, folder

Array = np.ndarray[Any, Any]


@pytest.fixture
def here() -> Iterator[Path]:
    """A directory on tmpfs."""
    with folder() as place:
        yield place


def weights(seed: int = 0, rows: int = 300) -> dict[str, Array]:
    """A model."""
    made = np.random.default_rng(seed)
    return {
        "layers.0.weight": made.standard_normal((rows, 700), "f4"),
        "layers.0.bias": made.standard_normal(rows).astype("f2"),
        "scale": np.array(3.5),
        "nothing": np.empty((0, 4), "i8"),
        "mask": np.array([True, False, True]),
    }


def written(path: Path, tensors: dict[str, Array], **metadata: str) -> Path:
    """A file of them; a new one, as who writes weights makes it."""
    replacement = path.with_suffix(".new")
    save_file(tensors, replacement, metadata or None)
    replacement.rename(path)
    return path


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def same(found: Tensors, expected: dict[str, Array]) -> None:
    """Compare, bit for bit."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from files from now on."""
    names: list[str] = []
    real = cache._read

    def noted(*args: Any) -> None:
        names.append(args[-1].name)
        real(*args)

    monkeypatch.setattr(cache, "_read", noted)
    return names


def test_the_first_start_reads_and_every_later_one_attaches(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, backing = written(here / "m.safetensors", weights(), license="MIT"), here / "image"
    names = reads(monkeypatch)
    first = load(path, backing=backing)
    assert not first.inherited
    same(first, weights())
    assert sorted(names) == ["layers.0.bias", "layers.0.weight", "mask", "scale"]
    assert first.metadata == {"license": "MIT"}
    assert first.dtypes["layers.0.bias"] == "F16"
    assert first.shapes["nothing"] == (0, 4)
    before = descriptors()
    for _ in range(3):
        again = load(path, backing=backing, verify=True)
        assert again.inherited
        same(again, weights())
        assert (again.metadata, again.dtypes, again.shapes) == (first.metadata, first.dtypes, first.shapes)
    assert len(names) == 4
    assert descriptors() <= before, "the arrays need none"


def test_another_process_attaches_what_this_one_read(here: Path) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    load(path, backing=backing)
    program = (
        "import sys, kho; t = kho.live.safetensors.load(sys.argv[1], backing=sys.argv[2]);"
        "print(t.inherited, t['layers.0.weight'].astype('f8').sum())"
    )
    args = [sys.executable, "-c", program, str(path), str(backing)]
    done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", str(weights()["layers.0.weight"].astype("f8").sum())]


def test_any_number_attach_at_once_and_one_reads(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    real = cache._read

    def slow(*args: Any) -> None:
        time.sleep(0.05)
        with (here / "reads").open("a") as file:
            file.write("x")
        real(*args)

    monkeypatch.setattr(cache, "_read", slow)
    children = [child(lambda: same(load(path, backing=backing, timeout=20), weights())) for _ in range(6)]
    assert [ended(pid) for pid in children] == [0] * 6
    assert (here / "reads").read_text() == "xxxx"


def test_a_changed_file_is_read_again_and_processes_with_the_old_image_keep_it(here: Path) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    old = load(path, backing=backing)
    written(path, weights(1, rows=400))
    new = load(path, backing=backing)
    assert not new.inherited
    same(new, weights(1, rows=400))
    same(old, weights())
    assert load(path, backing=backing).inherited
    assert {path.name for path in here.iterdir()} == {"image", "m.safetensors"}


def test_a_file_changed_in_place_is_detected_by_its_time(here: Path) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    load(path, backing=backing)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0")
    assert not load(path, backing=backing).inherited


def test_a_copy_of_the_same_contents_is_the_same_file_by_digest(here: Path) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    load(path, backing=backing, digest=True)
    os.utime(path, ns=(1, 1))
    written(here / "copy.safetensors", weights())
    assert load(path, backing=backing, digest=True).inherited
    assert load(here / "copy.safetensors", backing=backing, name=cache._name_of(path), digest=True).inherited
    written(path, weights(2))
    assert not load(path, backing=backing, digest=True).inherited


def test_a_file_that_changes_while_it_is_read_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    real = cache._read

    def touched(fd: int, *args: Any) -> None:
        real(fd, *args)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(cache, "_read", touched)
    with pytest.raises(kho.StaleError, match="changed while"):
        load(path, backing=backing)

    def cut(*args: Any) -> None:
        os.truncate(path, 500)
        real(*args)

    monkeypatch.setattr(cache, "_read", cut)
    with pytest.raises(kho.StaleError, match="cut short"):
        load(path, backing=backing)
    monkeypatch.setattr(cache, "_read", real)
    written(path, weights())
    same(load(path, backing=backing), weights())


def test_after_a_process_was_killed_while_it_reads_the_next_one_reads(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    monkeypatch.setattr(cache, "_read", lambda *_: die())
    assert ended(child(lambda: load(path, backing=backing))) == -9
    monkeypatch.undo()
    assert backing.exists()
    again = load(path, backing=backing)
    assert not again.inherited
    same(again, weights())


def test_a_wait_that_times_out_names_the_owner(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    reading, go = threading.Event(), threading.Event()
    real = cache._read

    def slow(*args: Any) -> None:
        reading.set()
        go.wait(20)
        real(*args)

    monkeypatch.setattr(cache, "_read", slow)
    thread = threading.Thread(target=load, args=(path,), kwargs={"backing": backing})
    thread.start()
    assert reading.wait(20)
    with pytest.raises(kho.BusyError, match=f"process {os.getpid()} has it"):
        load(path, backing=backing, timeout=0.1)
    go.set()
    thread.join()
    assert load(path, backing=backing).inherited


def known(here: Path, dtype: str) -> bool:
    """Whether the library reads the dtype: 0.6 has no C64, 0.7 no F8 without zeros' signs (FNUZ)."""
    path = raw_file(here / "one.safetensors", {"x": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}, b"")
    try:
        with safetensors.safe_open(path, framework="numpy"):
            return True
    except safetensors.SafetensorError as error:
        assert f"unknown variant `{dtype}`" in str(error)
        return False


def test_dtypes_that_numpy_lacks_are_returned_as_their_bits(here: Path) -> None:
    header: dict[str, dict[str, Any]] = {}
    data = b""
    codes = {dtype: code for dtype, code in {**DTYPES, **RAW}.items() if known(here, dtype)}
    assert {*DTYPES, "BF16", "F8_E4M3"} - {"C64"} <= {*codes}
    for dtype, code in codes.items():
        size = 6 * int(code[2:])
        header[dtype] = {"dtype": dtype, "shape": [2, 3], "data_offsets": [len(data), len(data) + size]}
        data += bytes(i % 2 for i in range(size))
    header["F4"] = {"dtype": "F4", "shape": [2, 2], "data_offsets": [len(data), len(data) + 2]}
    path = raw_file(here / "m.safetensors", header, data + b"\x12\x34")
    found = load(path, backing=here / "image")
    assert found.dtypes == {name: name for name in header}
    for dtype, code in codes.items():
        assert (found[dtype].dtype.str, found[dtype].shape) == (code, (2, 3))
        begin, end = header[dtype]["data_offsets"]
        assert found[dtype].tobytes() == data[begin:end]
    assert (found["F4"].tobytes(), found.shapes["F4"], found["F4"].dtype) == (b"\x12\x34", (2, 2), np.dtype("u1"))
    assert set(BITS).isdisjoint(RAW)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 65 << 20) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"{}x",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_a_malformed_safetensors_file_is_refused(here: Path, content: bytes) -> None:
    (here / "m.safetensors").write_bytes(content)
    with pytest.raises(kho.FormatError, match=r"m\.safetensors"):
        load(here / "m.safetensors", backing=here / "image")
    assert not (here / "image").exists()


U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": U8 | {"data_offsets": [0, 5]}},
        {"a": U8 | {"data_offsets": [4, 0]}},
        {"a": U8 | {"shape": [1 << 62, 4]}},
        {"a": U8 | {"shape": [-4]}},
        {"a": U8 | {"dtype": "O"}},
        {"a": U8, "b": U8},
        {"a": U8 | {"shape": [4] + [1] * 40}},
        {"": U8},
        {"n" * 256: U8},
        {"a\0b": U8},
        {"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
        [],
    ],
)
def test_a_hostile_header_is_refused(here: Path, header: object) -> None:
    path = raw_file(here / "m.safetensors", header, b"data")
    with pytest.raises(kho.FormatError, match=r"m\.safetensors"):
        load(path, backing=here / "image")
    assert not (here / "image").exists()


@given(st.binary(max_size=200), st.integers(-20, 20))
def test_arbitrary_bytes_never_get_further_than_an_error(tail: bytes, off: int) -> None:
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    with folder() as here:
        path = here / "m.safetensors"
        path.write_bytes(struct.pack("<Q", max(0, len(header) + off)) + header[: len(header) - len(tail) % 60] + tail)
        with contextlib.suppress(kho.FormatError):
            load(path, backing=here / "image")


def test_a_path_that_is_not_a_file_is_refused(here: Path) -> None:
    os.mkfifo(here / "pipe")
    for name in ("pipe", "none", "."):
        with pytest.raises(kho.SourceError):
            load(here / name, backing=here / "image")


def test_an_image_of_something_else_is_refused_and_stays(here: Path) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    with kho.live.open("other", "1M", backing=backing) as h:
        h.put("a", b"a")
        h.commit()
    with pytest.raises(kho.SchemaError, match="'other'"):
        load(path, backing=backing)
    with kho.live.open("other", "1M", backing=backing) as h:
        assert bytes(h["a"]) == b"a"


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"none": ["F32", [1]]}},
        {"tensors": {"mask": ["F32"]}},
        {"tensors": {"mask": 5}},
        {"tensors": []},
        {"metadata": None},
        {"size": True},
    ],
)
def test_a_malformed_description_counts_as_none(here: Path, change: dict[str, object]) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    load(path, backing=backing)
    with kho.live.open(cache._name_of(path), backing=backing, version=cache.VERSION) as h:
        index = json.loads(bytes(h[cache.INDEX])) | change
        h.put(cache.INDEX, json.dumps(index).encode())
        h.commit()
    again = load(path, backing=backing)
    assert not again.inherited
    same(again, weights())


def test_verify_finds_tampered_tensors(here: Path) -> None:
    path, backing = written(here / "m.safetensors", weights()), here / "image"
    load(path, backing=backing)
    with kho.live.attach(backing) as candidate:
        at = candidate._image.sup.offset + candidate.info("mask").phys - candidate._image.sup.base
    with backing.open("r+b") as file:
        file.seek(at)
        file.write(b"\0")
    assert load(path, backing=backing).inherited
    with pytest.raises(kho.FormatError, match="mask"):
        load(path, backing=backing, verify=True)


# In the default directory


def test_by_default_images_are_in_a_directory_of_this_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PLACE", str(here / "kho-live-{uid}"))
    path = written(here / "m odel.safetensors", weights())
    place = cache.place_of(cache._name_of(path))
    try:
        assert not load(path).inherited
        assert place.exists()
        assert place.parent.stat().st_mode & 0o777 == 0o700
        assert blocks(place) < 4 << 20
        assert load(path).inherited
        assert not load(path, name=f"{place.stem}-2").inherited
    finally:
        assert cache.release(path)
        cache.release(path, name=f"{place.stem}-2")
    assert not cache.release(path)
    assert not place.parent.exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "n" * 300])
def test_names_that_are_not_file_names_are_refused(here: Path, name: str) -> None:
    path = written(here / "m.safetensors", weights())
    with pytest.raises(kho.ParameterError, match="name"):
        load(path, name=name)


def test_a_directory_that_others_may_write_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PLACE", str(here / "kho-live-{uid}"))
    place = cache.place_of("x").parent
    place.chmod(0o777)
    with pytest.raises(kho.SourceError, match="this user's alone"):
        cache.place_of("x")
    place.rmdir()
    place.symlink_to(here)
    with pytest.raises(kho.SourceError, match="this user's alone"):
        cache.place_of("x")


# In an image that a service owns


def test_a_service_loads_into_its_own_image_and_its_successor_finds_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(here / "m.safetensors", weights())
    names = reads(monkeypatch)
    with kho.live.open("service", "16M") as h:
        first = load_into(h, path, prefix="model/")
        assert not first.inherited
        assert h.generation == 1
        h.put("own", b"own")
        h.commit()
        h.hand_over()
        with kho.live.open("service", backing=h.fileno()) as successor:
            again = load_into(successor, path, prefix="model/")
            assert again.inherited
            same(again, weights())
            assert len(names) == 4
            written(path, weights(1))
            same(load_into(successor, path, prefix="model/"), weights(1))
            assert bytes(successor["own"]) == b"own"


def test_tensors_that_the_new_file_lacks_are_deleted(here: Path) -> None:
    path = written(here / "m.safetensors", weights())
    with kho.live.open("service", "16M") as h:
        load_into(h, path)
        written(path, {"only": np.arange(5)})
        load_into(h, path)
        assert sorted(h.names()) == [cache.INDEX, "only"]


def test_tensors_that_do_not_fit_leave_the_image_unchanged(here: Path) -> None:
    path = written(here / "m.safetensors", weights())
    with kho.live.open("service", "2M") as h:
        load_into(h, path)
        written(path, weights(1, rows=3000))
        with pytest.raises(kho.OutOfMemoryError):
            load_into(h, path)
        assert h.uncommitted == []
        assert h.verify() > 840000
        h.put("mine", b"x")
        with pytest.raises(kho.ParameterError, match="commit or roll back mine"):
            load_into(h, path)


# The identity of a file


def stat_of(path: Path) -> tuple[int, ...]:
    """What tells files apart without a look at their contents, but the time of change."""
    status = path.stat()
    return status.st_size, status.st_ino, status.st_dev, status.st_mtime_ns


def rewritten(path: Path, tensors: dict[str, Array]) -> None:
    """Write a file in place, and put its time back, as `rsync --inplace -t` does."""
    before = stat_of(path)
    other = written(path.with_name("other"), tensors)
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(1, before[-1]))
    assert stat_of(path) == before


@pytest.mark.parametrize("with_handle", [False, True])
@pytest.mark.parametrize("ctime", [True, False])
@pytest.mark.parametrize("rows", [3, 900], ids=["small", "large"])
def test_changed_contents_are_detected_with_equal_size_time_and_inode(
    here: Path, with_handle: bool, ctime: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ctime:
        monkeypatch.setattr(cache, "_identity", without_ctime(cache._identity))
    path = written(here / "m.safetensors", weights(0, rows))
    with kho.live.open("x", "32M", serve=False) as h:

        def get() -> Tensors:
            return load_into(h, path) if with_handle else load(path, backing=here / "image", verify=True)

        get()
        assert get().inherited
        rewritten(path, weights(1, rows))
        again = get()
        assert not again.inherited
        same(again, weights(1, rows))
        assert get().inherited


def test_a_change_outside_the_samples_is_detected_by_the_change_time(here: Path) -> None:
    path = written(here / "m.safetensors", weights(0, 900))
    load(path, backing=here / "image")
    before = stat_of(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 + 5000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(1, before[-1]))
    assert stat_of(path) == before
    assert not load(path, backing=here / "image").inherited


def without_ctime(real: Any) -> Any:
    """Have a file system that has no time of change, or makes it up."""

    def identity(fd: int, status: os.stat_result, digest: bool) -> Any:
        shown = list(status)[:10]
        extra = {"st_ctime_ns": 7, "st_mtime_ns": status.st_mtime_ns}
        return real(fd, os.stat_result(shown, extra), digest)

    return identity


def test_another_volume_at_the_same_path_is_another_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same size, inode, times and samples, on another device."""
    path = written(here / "m.safetensors", weights())
    load(path, backing=here / "image")
    real, names = cache._identity, reads(monkeypatch)

    def elsewhere(*args: Any) -> Any:
        found = real(*args)
        return cache.Identity(**{**vars(found), "device": 12345})

    monkeypatch.setattr(cache, "_identity", elsewhere)
    again = load(path, backing=here / "image")
    assert again.inherited, "it was compared"
    assert names
    same(again, weights())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_volume_that_was_swapped_is_read_again(tmp_path: Path) -> None:
    def work() -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):
            return  # CLONE_NEWNS, MS_REC | MS_PRIVATE: mounts are not allowed here
        volume = tmp_path / "volume"
        volume.mkdir()
        seen = []
        for seed in (0, 1):
            assert libc.mount(b"t", os.fsencode(volume), b"tmpfs", 0, b"mode=700") == 0
            save_file(weights(seed), volume / "m.safetensors")
            os.utime(volume / "m.safetensors", (1, 1))
            seen.append(stat_of(volume / "m.safetensors"))
            same(load(volume / "m.safetensors", backing=tmp_path / "image", verify=True), weights(seed))
            assert libc.umount2(os.fsencode(volume), 0) == 0
        assert seen[0][0] == seen[1][0]

    assert ended(child(work)) == 0


@pytest.mark.parametrize("touch", ["chmod", "utime", "rename", "link", "copy"])
@pytest.mark.parametrize("with_handle", [False, True])
def test_a_file_whose_contents_are_the_same_keeps_its_image(here: Path, touch: str, with_handle: bool) -> None:
    path = written(here / "m.safetensors", weights())
    with kho.live.open("x", "32M", serve=False) as h:

        def get() -> Tensors:
            return load_into(h, path) if with_handle else load(path, backing=here / "image")

        first = get()
        if touch == "chmod":
            path.chmod(0o640)
        elif touch == "utime":
            os.utime(path, (5, 5))
        elif touch == "rename":
            path = path.rename(here / "n.safetensors")
        elif touch == "link":
            (here / "link").hardlink_to(path)
        else:
            written(here / "new", weights()).replace(path)
        again = get()
        assert again.inherited
        same(again, weights())
        assert get().inherited
        if not with_handle:
            assert first["mask"].ctypes.data != 0
            assert blocks(here / "image") < 2 << 20, "it was not made a second time"


def test_digest_identifies_a_file_by_its_contents_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PLACE", str(here / "kho-live-{uid}"))
    path = written(here / "m.safetensors", weights(0, 900))
    names = reads(monkeypatch)
    assert not load(path, digest=True).inherited
    read = len(names)
    copy = written(here / "elsewhere.safetensors", weights(0, 900))
    os.utime(copy, (9, 9))
    assert load(copy, digest=True).inherited
    assert len(names) == read
    # A change outside the samples.
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 + 5000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert not load(path, digest=True).inherited
    assert load(copy, digest=True) is not None
    assert cache.release(path)
    assert cache.release(copy)
    assert not (here / f"kho-live-{os.geteuid()}").exists()


def test_all_names_of_a_file_are_one_image(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PLACE", str(here / "kho-live-{uid}"))
    path = written(here / "m.safetensors", weights())
    (here / "sub").mkdir()
    (here / "symbolic").symlink_to(path)
    (here / "hard").hardlink_to(path)
    (here / "way").symlink_to(here)
    monkeypatch.chdir(here / "sub")
    names: list[str | Path] = [path, here / "symbolic", here / "hard", here / "sub" / ".." / "m.safetensors"]
    names += [here / "way" / "hard", "../symbolic"]
    place = here / f"kho-live-{os.geteuid()}"
    for i, name in enumerate(names):
        found = load(name)
        assert found.inherited == (i > 0), name
        same(found, weights())
        assert len(list(place.iterdir())) == 1
    # Another name changes the file's change time, but needs no other image.
    (here / "later").hardlink_to(path)
    assert load(here / "later").inherited
    assert len(list(place.iterdir())) == 1
    for name in names:
        assert cache.release(name)
        assert not place.exists()
        load(path)
    assert cache.release(path)


def test_a_file_that_is_replaced_leaves_no_image_of_the_old_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PLACE", str(here / "kho-live-{uid}"))
    path = written(here / "m.safetensors", weights())
    place = here / f"kho-live-{os.geteuid()}"
    old = load(path)
    load(written(here / "another.safetensors", weights(7)))
    for seed in (1, 2, 3):
        written(path, weights(seed))
        assert not load(path).inherited
        assert len(list(place.iterdir())) == 2
    same(old, weights())
    path.unlink()
    assert cache.release(path), "it need not be there any more"
    assert not cache.release(path)
    assert cache.release(here / "another.safetensors")
    assert not place.exists()


def test_a_directory_that_a_umask_made_unusable_is_repaired(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PLACE", str(here / "kho-live-{uid}"))
    here.chmod(0o1777)
    path = written(here / "m.safetensors", weights())
    path.chmod(0o644)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        os.umask(0o777)
        same(load(path), weights())
        place = cache.place_of("x").parent
        place.chmod(0)
        assert load(path).inherited
        assert place.stat().st_mode & 0o7777 == 0o700
        assert cache.release(path)

    assert ended(child(work)) == 0


# The mapping


def test_copies_and_unions_of_tensors_keep_dtypes_shapes_and_metadata(here: Path) -> None:
    import copy
    import pickle

    header = {
        "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "f": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [12, 16]},
        "q": {"dtype": "F4", "shape": [2, 2], "data_offsets": [16, 18]},
        "__metadata__": {"license": "MIT"},
    }
    found = load(raw_file(here / "m.safetensors", header, bytes(range(18))), backing=here / "image")
    more = load(written(here / "n.safetensors", {"b": np.ones(3, "f2"), "z": np.ones(2, "i8")}), backing=here / "other")

    def says(tensors: Tensors, *names: str) -> None:
        assert type(tensors) is Tensors
        assert list(tensors) == list(names)
        for name in names:
            known = more if tensors[name].dtype in ("f2", "i8") else found
            assert (tensors.dtypes[name], tensors.shapes[name]) == (known.dtypes[name], known.shapes[name])
            assert tensors[name].tobytes() == known[name].tobytes()
        assert set(tensors.dtypes) == set(tensors.shapes) == set(names)

    copies = [found.copy(), copy.copy(found), copy.deepcopy(found), found | {}, {} | found, Tensors(found)]
    copies += [pickle.loads(pickle.dumps(found, protocol)) for protocol in range(6)]
    for made in copies:
        says(made, "b", "f", "q")
        assert made.metadata == {"license": "MIT"}
        del made["b"]
        made.metadata["x"] = "y"
        says(made, "f", "q")
        assert made.pop("q", None) is not None
        assert made.pop("q", None) is None
        made.popitem()
        says(made)
    says(found, "b", "f", "q")
    assert found.metadata == {"license": "MIT"}
    says(found | more, "b", "f", "q", "z")
    says(more | found, "z", "b", "f", "q")
    assert (found | more).dtypes["b"] == "F16"
    grown = found.copy()
    grown |= more
    says(grown, "b", "f", "q", "z")
    grown["new"] = np.ones((2, 2), "f4")
    assert (grown.dtypes["new"], grown.shapes["new"]) == ("F32", (2, 2))
    assert grown.setdefault("new", None) is grown["new"]
    grown.update(more, b=found["b"])
    grown["odd"] = np.ones(2, "S3")
    assert "odd" not in grown.dtypes
    grown.clear()
    assert (grown, grown.dtypes, grown.shapes) == ({}, {}, {})
    with pytest.raises(TypeError):
        found | 5
