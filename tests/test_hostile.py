"""Malformed input of any kind ends in bounded time with a `KhoError` that names the defect."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho.handover.describe import describe

import captures
import hostile
from bounded import bounded
from command import kho as run
from command import process
from images import MIB

V1 = pytest.mark.parametrize("name", captures.V1_NAMES)


def attempt(path: Path | str, **options: int) -> kho.Incoming | kho.KhoError:
    """Open a source and use the result. Anything except success and KhoError, such as a panic or a hang, fails."""
    result: kho.Incoming | kho.KhoError
    with bounded():
        try:
            result = kho.open(path, **options)  # type: ignore[arg-type]
            use(result)
        except kho.KhoError as error:
            assert str(error)
            result = error
    return result


def use(inc: kho.Incoming) -> None:
    """Read everything that `kho inspect` shows, and the contents of the first folios."""
    assert len(inc.folios) == inc.nr_folios
    assert sum(inc.folios_by_order.values()) == inc.nr_folios
    assert inc.map_lost is None or not inc.nr_folios
    assert inc.certainty
    assert inc.page_size_why
    assert describe(inc)["nr_folios"] == (inc.nr_folios if inc.map_lost is None else None)
    assert inc.pages_outside >= 0
    for subtree in inc.subtrees.values():
        try:
            subtree.fdt()
        except kho.KhoError as error:
            assert str(error)
    for phys in dict(inc.folios[:4]):
        # If several folios begin at one address, the largest is restored.
        try:
            folio = inc.restore_folio(phys)
            if folio.order < 12:
                assert len(bytes(folio)) == inc.page_size << folio.order
        except kho.KhoError as error:
            assert str(error)


def refused(path: Path, **options: int) -> kho.KhoError:
    """The error for a malformed image; also checks that the command prints it."""
    error = attempt(path, **options)
    assert isinstance(error, kho.KhoError), f"read as {error!r}"
    with bounded():
        done = run("inspect", path)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0] == f"kho: {error}"
    assert "Traceback" not in done.err
    return error


# Images with one defect


@pytest.mark.parametrize("what", sorted(hostile.REFUSED))
def test_malformed_images_are_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.elf"
    path.write_bytes(hostile.damaged(hostile.REFUSED[what]))
    error = refused(path)
    assert isinstance(error, kho.FormatError | kho.NoHandoverError | kho.OutsideMemoryError | kho.ParameterError)
    assert any(char.isdigit() for char in str(error)), "the message contains no value"


@pytest.mark.parametrize("what", sorted(hostile.REFUSED))
@pytest.mark.parametrize("bitmap_bytes", [512, 4096])
def test_malformed_images_are_refused_with_given_sizes_too(what: str, bitmap_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "hostile.elf"
    layout = hostile.sane().lay_out()
    path.write_bytes(hostile.damaged(hostile.REFUSED[what]))
    result = attempt(path, fdt_phys=layout.fdt_phys, page_size=4096, bitmap_bytes=bitmap_bytes)
    assert isinstance(result, kho.KhoError), f"read as {result!r}"


@pytest.mark.parametrize("what", sorted(hostile.ODD))
def test_odd_images_are_handled_in_bounded_time(what: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.elf"
    path.write_bytes(hostile.damaged(hostile.ODD[what]))
    result = attempt(path)
    done = run("inspect", path)
    assert done.code == (2 if isinstance(result, kho.KhoError) else 0)
    assert "Traceback" not in done.err


@pytest.mark.parametrize("what", ["subtree of 4 bytes", "subtree without a pointer"])
def test_a_malformed_subtree_is_named_and_the_rest_is_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.elf"
    path.write_bytes(hostile.damaged(hostile.ODD[what]))
    inc = kho.open(path)
    assert list(inc.malformed_subtrees) == ["producer"]
    with pytest.raises(kho.FormatError, match="producer"):
        inc.retrieve_subtree("producer")
    assert "producer: " in run("inspect", path).out


def test_a_subtree_outside_memory_has_no_size(tmp_path: Path) -> None:
    path = tmp_path / "odd.elf"
    path.write_bytes(hostile.damaged(hostile.ODD["subtree outside memory"]))
    subtree = kho.open(path).retrieve_subtree("producer")
    assert subtree.size is None
    with pytest.raises(kho.KhoError):
        subtree.read()


@pytest.mark.parametrize("what", sorted(hostile.FILES))
def test_damaged_elf_files_are_refused_or_read_in_part(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file.elf"
    path.write_bytes(hostile.FILES[what](hostile.sane().to_bytes()))
    result = attempt(path)
    done = run("inspect", path)
    assert done.code == (2 if isinstance(result, kho.KhoError) else 0)
    assert isinstance(result, kho.KhoError) or what in ("cut in half", "segment larger in the file than in memory")


@pytest.mark.parametrize("fill", [b"\xff", b"\0", b"\xd0\x0d\xfe\xed"])
def test_four_megabytes_of_one_byte_contain_no_handover(fill: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ram.bin"
    path.write_bytes(fill * (4 * MIB // len(fill)))
    assert isinstance(refused(path), kho.NoHandoverError)
    assert isinstance(attempt(path, fdt_phys=0x1000), kho.FormatError)
    assert isinstance(attempt(path, fdt_phys=4 * MIB), kho.OutsideMemoryError)
    assert isinstance(attempt(path, fdt_phys=2**64 - 4096), kho.OutsideMemoryError)
    assert isinstance(attempt(path, fdt_phys=8), kho.MisalignedError)


def test_a_source_that_is_not_a_file_is_named(tmp_path: Path) -> None:
    empty, fifo = tmp_path / "empty", tmp_path / "fifo"
    empty.touch()
    os.mkfifo(fifo)
    done = run("inspect", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"kho: {tmp_path}: ")
    directory = attempt(tmp_path)
    for path in (empty, tmp_path, tmp_path / "missing", fifo):
        error = directory if path == tmp_path else refused(path)
        assert isinstance(error, kho.SourceError)
        assert str(error).startswith(str(path))


def test_a_process_prints_the_error_on_stderr_and_exits_2(tmp_path: Path) -> None:
    path = tmp_path / "ring.elf"
    path.write_bytes(hostile.damaged(hostile.REFUSED["chunks in a ring"]))
    for source in (path, tmp_path, tmp_path / "missing"):
        done = process("inspect", source)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("kho: ")
        assert "Traceback" not in done.err
        assert "panicked" not in done.err


# Captures, truncated and with flipped bits


def marks(name: str) -> dict[str, int]:
    """File offsets of the ELF header, the FDT and the map."""
    content = captures.elf(name).read_bytes()
    memory = kho.Memory.open(captures.elf(name))
    expected = captures.expected(name)
    phoff, phnum = struct.unpack_from("<Q", content, 32)[0], struct.unpack_from("<H", content, 56)[0]
    loads = [struct.unpack_from("<IIQQQQQQ", content, phoff + 56 * i) for i in range(phnum)]

    def offset(phys: int) -> int:
        inside = (load for load in loads if load[0] == 1 and 0 <= phys - load[4] < load[5])
        _, _, at, _, start, *_ = next(inside)
        return int(at) + phys - int(start)

    found = {"elf": 0, "program headers": phoff, "end of headers": phoff + 56 * phnum}
    found["fdt"] = offset(expected["fdt_phys"])
    chunk, n = expected["preserved_memory_map"], 0
    while chunk:
        found[f"chunk {n}"] = offset(chunk)
        following, _, count = struct.unpack("<QII", memory.read(chunk, 16))
        for i in range(count):
            bitmap = struct.unpack("<Q", memory.read(chunk + 24 + 16 * i, 8))[0]
            found[f"bitmap {n}.{i}"] = offset(bitmap)
        chunk, n = following, n + 1
    return found


def lengths(name: str) -> Iterator[int]:
    """Lengths of prefixes: through the headers, around each structure, and in coarse steps through the rest."""
    places, size = marks(name), captures.elf(name).stat().st_size
    edges = {at + delta for at in places.values() for delta in (-1, 0, 1, 8, 16, 40, 4095)}
    steps = set(range(0, places["end of headers"], 13)) | set(range(0, size, 997))
    yield from sorted(at for at in edges | steps if 0 <= at < size)


@V1
def test_every_prefix_of_a_capture_is_read_or_refused(name: str, tmp_path: Path) -> None:
    content, path = captures.elf(name).read_bytes(), tmp_path / "prefix.elf"
    expected = captures.expected(name)
    whole = marks(name)
    needed = max(
        at + (512 if key.startswith("bitmap") and expected["bitmap_bytes"] == 512 else 4096)
        for key, at in whole.items()
        if key == "fdt" or key.startswith(("chunk", "bitmap"))
    )
    read = 0
    path.write_bytes(content)
    for length in reversed(list(lengths(name))):
        os.truncate(path, length)
        result = attempt(path)
        if isinstance(result, kho.Incoming) and result.map_lost is None:
            read += 1
            assert length > whole["fdt"]
            assert list(result.folios) == [tuple(folio) for folio in expected["folios"]]
        else:
            assert length < needed, f"{length} bytes contain the complete map, yet: {result!r}"
            assert not isinstance(result, kho.Incoming) or (result.map_lost or ())[1:] == ("cut off",)
    assert read
    assert run("inspect", path).code == 2


def flips(name: str) -> list[tuple[str, int, int]]:
    """`(place, offset, bit)`: a reproducible sample of the bits of all small structures."""
    chosen = random.Random(name)
    places = marks(name)
    spans = {"elf": 64, "program headers": 56 * 4, "fdt": 240}
    out = []
    for place, at in places.items():
        span = 48 if place.startswith("chunk") else 64 if place.startswith("bitmap") else spans.get(place, 0)
        for offset in range(span):
            bits = range(8) if place.startswith("chunk") else chosen.sample(range(8), 2)
            out += [(place, at + offset, bit) for bit in bits]
    return out


@V1
def test_a_flipped_bit_never_crashes(name: str, tmp_path: Path) -> None:
    content, path = bytearray(captures.elf(name).read_bytes()), tmp_path / "flipped.elf"
    path.write_bytes(content)
    outcomes = {"read": 0, "refused": 0}
    with path.open("r+b") as file:
        for place, offset, bit in flips(name):
            os.pwrite(file.fileno(), bytes([content[offset] ^ 1 << bit]), offset)
            try:
                result = attempt(path)
            except BaseException as error:
                error.add_note(f"{place}: bit {bit} of byte {offset:#x}")
                raise
            outcomes["refused" if isinstance(result, kho.KhoError) else "read"] += 1
            os.pwrite(file.fileno(), bytes([content[offset]]), offset)
    assert min(outcomes.values()) > 100, outcomes
    assert isinstance(attempt(path), kho.Incoming)


RADIX = pytest.mark.parametrize("name", captures.RADIX_NAMES)


@RADIX
def test_every_prefix_of_a_capture_with_a_tree_is_read_or_refused(name: str, tmp_path: Path) -> None:
    content, path = captures.elf(name).read_bytes(), tmp_path / "prefix.elf"
    path.write_bytes(content)
    steps = [*range(0, 2048, 29), *range(2048, len(content), len(content) // 40)]
    outcomes = set()
    for length in reversed(steps):
        os.truncate(path, length)
        result = attempt(path)
        lost = result.map_lost if isinstance(result, kho.Incoming) else None
        outcomes.add((type(result).__name__, lost is None))
        if lost is not None:
            assert lost[1] == "cut off"
        elif isinstance(result, kho.Incoming):
            assert list(result.folios) == [tuple(folio) for folio in captures.expected(name)["folios"]]
    assert len(outcomes) > 2, outcomes


@RADIX
def test_a_flipped_bit_in_a_tree_never_crashes(name: str, tmp_path: Path) -> None:
    path, chosen = tmp_path / "flipped.elf", random.Random(name)
    content = captures.elf(name).read_bytes()
    path.write_bytes(content)
    used = [at for at in range(len(content)) if content[at]]
    with path.open("r+b") as file:
        for offset in [*range(200), *chosen.sample(used, 300)]:
            os.pwrite(file.fileno(), bytes([content[offset] ^ 1 << chosen.randrange(8)]), offset)
            attempt(path)
            os.pwrite(file.fileno(), content[offset : offset + 1], offset)
    assert isinstance(attempt(path), kho.Incoming)


# Random bytes


@given(st.data())
@settings(max_examples=150)
def test_random_damage_to_the_map_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layout = hostile.sane().lay_out()
    targets = [
        *layout.chunks,
        layout.fdt_phys,
        *(bitmap for chunk in layout.chunks for _, bitmap in layout.bitmaps(chunk)),
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        page = data.draw(st.sampled_from(targets))
        at = data.draw(st.integers(0, 64)) * 4
        value = data.draw(st.one_of(st.sampled_from([*targets, 0, 2**64 - 1, 2**63, 4096]), st.integers(0, 2**64 - 1)))
        layout.put(page + at, struct.pack("<Q", value))
    path = tmp_path_factory.getbasetemp() / "damaged.elf"
    path.write_bytes(layout.to_elf())
    attempt(path)
    attempt(path, fdt_phys=layout.fdt_phys, page_size=65536)


@given(st.binary(max_size=8192), st.sampled_from([0, 4096, 2**63, 2**64 - 8192]))
@settings(max_examples=150)
def test_arbitrary_bytes_contain_no_handover(data: bytes, phys: int) -> None:
    memory = kho.Memory.from_segments([(phys, data)])
    with pytest.raises(kho.KhoError):
        kho.open(memory)
    with pytest.raises(kho.KhoError):
        kho.open(memory, fdt_phys=phys)
