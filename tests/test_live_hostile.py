"""kho.live: an image that is torn, damaged or forged is refused, with the address of the fault."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
import kho.live
from kho import _kho
from kho.formats.kernel_write import aligned_blocks
from kho.formats.live import COMPATIBLE, Catalog, Item, decode_catalog, encode_catalog
from kho.live.file import header
from kho.live.file.header import Root

from livefiles import contents, sample

BASE, SIZE, HEAD = 1 << 32, 1 << 20, 2 << 20


@pytest.fixture(scope="module")
def whole() -> bytes:
    """The file of a small image, whose generation before was retired."""
    with kho.live.open("service", SIZE, version="3", backing="memfd") as h:
        h.put("table", sample(1, 30_000).view("<u4").reshape(-1, 4))
        h.commit()
        h.put("blob", b"some bytes")
        h.commit()
        return os.pread(h.fileno(), HEAD + SIZE, 0)


@contextmanager
def image_of(content: bytes) -> Iterator[int]:
    """A sealed memfd with this content."""
    import fcntl

    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, len(content))
    for at in range(0, len(content), 4096):
        if any(content[at : at + 4096]):
            os.pwrite(fd, content[at : at + 4096], at)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        yield fd
    finally:
        os.close(fd)


def root_of(content: bytes) -> tuple[header.Super, Root]:
    """Superblock and current slot."""
    head = memoryview(content)[:HEAD]
    sup = header.read_super(head, len(content))
    word = int.from_bytes(content[sup.word_at : sup.word_at + 8], "little")
    for slot in (0, 1):
        root = header.read_root(head, slot, sup)
        if root is not None and root.fdt_phys == word:
            return sup, root
    raise AssertionError("no root")


def test_a_flipped_bit_in_any_byte_of_the_metadata_is_refused_or_changes_nothing(whole: bytes) -> None:
    chance = random.Random(1)
    sup, root = root_of(whole)
    meta = sup.offset + root.meta_phys - BASE
    blob = [at for at in range(meta, meta + root.meta_bytes) if whole[at]]
    zeros = [at for at in range(meta, meta + root.meta_bytes) if not whole[at]]
    deciding = [*range(sup.elf_bytes), *range(header.SUPER_AT, header.OWNER_AT + 8), *blob, *chance.sample(zeros, 500)]
    with image_of(whole) as fd:
        with kho.live.attach(fd) as reader:
            expected = contents(reader), reader.generation, reader.version
        refused = set()
        for at in deciding:
            os.pwrite(fd, bytes([whole[at] ^ 1 << chance.randrange(8)]), at)
            try:
                with kho.live.attach(fd) as reader:
                    assert (contents(reader), reader.generation, reader.version) == expected, hex(at)
            except kho.FormatError as error:
                refused.add(at)
                assert "descriptor" in str(error)
                assert "left as it is" in str(error) or "nothing was changed" in str(error)
            os.pwrite(fd, whole[at : at + 1], at)
    assert refused >= {at for at in deciding if at >= meta}
    assert refused >= set(range(sup.elf_bytes)), "the header and the word"
    current = header.SLOT_AT[root.generation % 2]
    assert refused >= set(range(current, current + header.SLOT_BYTES))
    assert refused >= set(range(header.SUPER_AT, header.SUPER_AT + header.SUPER_BYTES))


def test_verify_finds_changed_objects(whole: bytes) -> None:
    with image_of(whole) as fd:
        with kho.live.attach(fd) as reader:
            item = reader.info("table")
        at = HEAD + item.phys - BASE + 12345
        os.pwrite(fd, bytes([whole[at] ^ 4]), at)
        with kho.live.attach(fd) as reader:
            assert reader.verify("blob") == 10
            with pytest.raises(kho.FormatError, match=rf"object 'table' at {item.phys:#x}: its bytes sum to"):
                reader.verify()
            with pytest.raises(kho.NotFoundError):
                reader.verify("nothing")


def test_a_file_truncated_anywhere_is_refused(whole: bytes) -> None:
    for size in [0, 1, 4095, 4096, 8192, HEAD - 1, HEAD, HEAD + SIZE // 2, HEAD + SIZE - 1]:
        with image_of(whole[:size]) as fd, pytest.raises(kho.FormatError):
            kho.live.attach(fd)


def test_the_word_never_leads_to_a_torn_slot(whole: bytes) -> None:
    """The next generation's slot, half written or whole: the generation before it counts, and it is said."""
    sup, root = root_of(whole)
    head = bytearray(whole[:HEAD])
    following = Root(root.generation + 1, BASE, BASE, 4096, 0)
    header.write_root(memoryview(head), sup, following)
    at = header.SLOT_AT[following.generation % 2]
    for written in (8, 20, header.SLOT_BYTES):
        content = bytearray(whole)
        content[at : at + written] = head[at : at + written]
        with image_of(bytes(content)) as fd, kho.live.attach(fd) as reader:
            assert (reader.generation, reader.torn) == (root.generation, root.generation + 1)


def test_a_word_set_back_to_the_previous_generation_is_refused() -> None:
    with kho.live.open("x", SIZE) as h:
        h.put("a", b"1")
        h.commit()
        before = os.pread(h.fileno(), HEAD + SIZE, 0)
        h.put("a", b"2")
        h.commit()
        after = bytearray(os.pread(h.fileno(), HEAD + SIZE, 0))
    sup, _ = root_of(before)
    after[sup.word_at : sup.word_at + 8] = before[sup.word_at : sup.word_at + 8]
    with image_of(bytes(after)) as fd, pytest.raises(kho.FormatError, match="is in no slot"):
        kho.live.attach(fd)


# Forgeries with right checksums


def forged(whole: bytes, blob: bytes, preserved: list[tuple[int, int]], **fields: int) -> bytes:
    """The image with another catalog and map, and right checksums."""
    sup, old = root_of(whole)
    n = 64
    start = SIZE // 4096 - n
    first = BASE // 4096
    private = kho.Arena([(0, 1 << 40)], max_page_order=30)
    for begin, end in ((1, first + start), (first + start + n, (1 << 40) // 4096)):
        for pfn, order in aligned_blocks(begin, end):
            private.alloc_at(pfn * 4096, order)
    out = _kho.Outgoing(private, "kho-v4")
    for phys, pages in preserved:
        out.preserve_pages(phys, pages)
    if blob:
        out.add_subtree("kho-live", blob)
    out.serialize()
    meta = private.read(BASE + start * 4096, n * 4096)
    content = bytearray(whole)
    content[HEAD + start * 4096 : HEAD + (start + n) * 4096] = meta
    head = memoryview(content)[:HEAD]
    root = Root(old.generation, out.fdt_phys, BASE + start * 4096, len(meta), zlib.crc32(meta))._replace(**fields)
    header.write_root(head, sup, root)
    head[sup.word_at : sup.word_at + 8] = root.fdt_phys.to_bytes(8, "little")
    del head
    return bytes(content)


def catalog(*items: Item, generation: int = 2) -> bytes:
    """A catalog of these objects, as a commit makes it."""
    return encode_catalog(Catalog("service", "3", generation, dict(enumerate(items))))  # type: ignore[arg-type]


def item(name: str = "a", phys: int = BASE, nbytes: int = 4096, **fields: Any) -> Item:
    """An object of bytes."""
    made = {"dtype": None, "shape": (nbytes,), "crc32": 0, "generation": 1, **fields}
    return Item(name, phys, nbytes, **made)


def test_a_forged_catalog_that_is_consistent_is_read(whole: bytes) -> None:
    with image_of(forged(whole, catalog(item()), [(BASE, 1)])) as fd, kho.live.attach(fd) as reader:
        assert reader.names() == ["a"]


HUGE = 1 << 62
FORGERIES: dict[str, tuple[list[Item], list[tuple[int, int]], str]] = {
    "outside": ([item(phys=BASE + SIZE)], [(BASE + SIZE, 1)], "cannot be"),
    "below": ([item(phys=BASE - 4096)], [(BASE - 4096, 1)], "cannot be"),
    "across the end": ([item(phys=BASE + SIZE - 4096, nbytes=8192)], [], "cannot be"),
    "on the metadata": ([item(phys=BASE + SIZE - 8192)], [], "cannot be"),
    "around 2^64": ([item(phys=(1 << 64) - 4096, nbytes=HUGE)], [], "misaligned or out of range"),
    "all there is": ([item(nbytes=HUGE)], [], "cannot be"),
    "not aligned": ([item(phys=BASE + 8)], [(BASE, 1)], "misaligned or out of range"),
    "nowhere": ([item(phys=0)], [], "misaligned or out of range"),
    "nothing somewhere": ([item(nbytes=0)], [], "misaligned or out of range"),
    "overlapping": ([item(nbytes=8192), item("b", BASE + 4096)], [(BASE, 2)], "overlap at 0x100001000"),
    "twice": ([item(), item()], [(BASE, 1)], "exists twice"),
    "objects": ([item(dtype="|O8", shape=(512,))], [(BASE, 1)], "dtype '|O8'"),
    "void": ([item(dtype="|V8", shape=(512,))], [(BASE, 1)], "dtype"),
    "a pickle": ([item(dtype="pickle", shape=(512,))], [(BASE, 1)], "dtype"),
    "too large a shape": ([item(dtype="<f4", shape=(1025,))], [(BASE, 1)], "take 4100 bytes, not 4096"),
    "a shape that wraps": ([item(dtype="<u8", shape=(1 << 62, 8))], [(BASE, 1)], "take"),
    "a negative shape": ([item(dtype="|u1", shape=((1 << 64) - 1,))], [(BASE, 1)], "each at least 0"),
    "many dimensions": ([item(dtype="|u1", shape=(1,) * 33)], [(BASE, 1)], "32 dimensions"),
    "no name": ([item("")], [(BASE, 1)], "1 to 255 bytes"),
    "a long name": ([item("x" * 256)], [(BASE, 1)], "1 to 255 bytes"),
    "of the future": ([item(generation=3)], [(BASE, 1)], "generation 3 exceeds the image's, 2"),
    "not preserved": ([item()], [], "do not agree"),
    "preserved without an object": ([item()], [(BASE, 2)], "do not agree"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_inconsistent_forgeries_are_refused(whole: bytes, what: str) -> None:
    items, preserved, says = FORGERIES[what]
    with image_of(forged(whole, catalog(*items), preserved)) as fd:
        with pytest.raises(kho.FormatError, match=says.replace("|", r"\|")):
            kho.live.attach(fd)
        with pytest.raises(kho.FormatError):
            kho.live.open("service", version="3", backing=fd)


def test_forged_roots_are_refused(whole: bytes) -> None:
    good = catalog(item())
    cases: list[tuple[bytes, dict[str, int]]] = [
        (b"", {}),
        (b"no tree at all", {}),
        (catalog(generation=5), {}),
        (good, {"meta_bytes": SIZE}),
        (good, {"meta_bytes": HUGE & ~4095}),
        (good, {"meta_phys": BASE - 4096}),
        (good, {"meta_phys": 0, "meta_bytes": (1 << 64) - 4096}),
        (good, {"fdt_phys": BASE}),
        (good, {"fdt_phys": 0}),
        (good, {"generation": 3}),
    ]
    for blob, fields in cases:
        with image_of(forged(whole, blob, [(BASE, 1)], **fields)) as fd, pytest.raises(kho.FormatError):
            kho.live.attach(fd)


def test_an_image_of_a_newer_format_is_refused_as_such(whole: bytes) -> None:
    writer = _kho.FdtWriter()
    with writer.node():
        writer.property_str("compatible", "kho-live-v2")
    with (
        image_of(forged(whole, writer.finish(), [])) as fd,
        pytest.raises(kho.UnsupportedAbiError, match="'kho-live-v2', not 'kho-live-v1': a newer kho wrote it"),
    ):
        kho.live.attach(fd)


def test_a_forged_superblock_cannot_lead_out_of_the_file(whole: bytes) -> None:
    sup, _ = root_of(whole)
    for fields in (
        {"size": SIZE + 4096},
        {"size": HUGE},
        {"size": 0},
        {"size": SIZE - 1},
        {"offset": 0},
        {"offset": HEAD + 4096},
        {"base": 0},
        {"base": BASE + 1},
        {"base": (1 << 63) - 4096},
        {"word_at": 4096},
        {"word_at": HUGE},
        {"word_at": 3},
        {"elf_bytes": 1 << 20},
    ):
        content = bytearray(whole)
        header.write_super(memoryview(content), sup._replace(**fields))
        with image_of(bytes(content)) as fd, pytest.raises(kho.FormatError):
            kho.live.attach(fd)


def test_a_sparse_terabyte_of_metadata_takes_no_memory() -> None:
    with kho.live.open("x", 1 << 40, backing="memfd") as h:
        content = os.pread(h.fileno(), HEAD, 0)
        sup = header.read_super(memoryview(content), HEAD + (1 << 40))
        head = bytearray(content)
        header.write_root(memoryview(head), sup, Root(2, BASE, BASE, 1 << 40, 0))
        head[sup.word_at : sup.word_at + 8] = BASE.to_bytes(8, "little")
        os.pwrite(h.fileno(), head[: header.OWNER_AT], 0)
        with pytest.raises(kho.FormatError, match="bytes of metadata"):
            kho.live.attach(h.fileno())


@given(st.binary(max_size=600))
def test_a_journal_of_any_bytes_is_read(raw: bytes) -> None:
    head = bytearray(HEAD)
    head[header.JOURNAL_AT : header.JOURNAL_AT + 16] = (8).to_bytes(8, "little") + len(raw).to_bytes(8, "little")
    head[header.JOURNAL_AT + 16 : header.JOURNAL_AT + 16 + len(raw)] = raw
    names = header.Journal(memoryview(head)).names(7)
    assert all(isinstance(name, str) for name in names)
    assert header.Journal(memoryview(head)).names(6) == ()


@given(st.data())
def test_a_catalog_with_any_byte_changed_is_read_or_refused(data: st.DataObject) -> None:
    blob = bytearray(catalog(item(dtype="<f4", shape=(32, 32)), item("b", BASE + 8192, 5)))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = decode_catalog(bytes(blob))
    except kho.FormatError:
        return
    for one in read.items.values():
        assert one.phys % 4096 == 0
        assert one.dtype is None or np.dtype(one.dtype).itemsize * np.prod(one.shape, dtype=object) == one.nbytes


def test_catalogs_are_decoded_as_they_were_encoded() -> None:
    items = {i.name: i for i in (item(), item("ü", 0, 0, dtype="<M8[ns]", shape=(0, 4)), item("s", 0, 0))}
    made = Catalog("x", "", 9, items)
    assert decode_catalog(encode_catalog(made)) == made
    assert COMPATIBLE in encode_catalog(made).decode("latin1")
