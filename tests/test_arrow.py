"""Lists of folios, pfns and runs in other libraries: Arrow's C data interface, and DLPack."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import pytest

import kho
from kho.handover import memmap
from kho.handover.verify import verify

from captures import NAMES, elf

np = pytest.importorskip("numpy")


def tracker(count: int = 3000) -> kho.Tracker:
    """Folios of two orders, in runs of several lengths."""
    made = kho.Tracker()
    for pfn in range(0, count * 7, 7):
        made.preserve_run(pfn, 0, 1 + pfn % 3)
        made.preserve(pfn * 8 + (1 << 30), 3)
    return made


EMPTY = kho.Tracker()


@pytest.mark.parametrize("of", [tracker(), EMPTY])
def test_arrow_has_the_same_columns(of: kho.Tracker) -> None:
    pa = pytest.importorskip("pyarrow")
    folios, runs, pfns = of.folios(), of.runs(0), of.pfns(0)
    table = pa.record_batch(folios)
    assert table.schema == pa.schema([pa.field("phys", pa.uint64(), False), pa.field("order", pa.uint8(), False)])
    assert table.to_pydict() == {"phys": [f.phys for f in folios], "order": [f.order for f in folios]}
    assert pa.record_batch(runs).to_pydict() == {"pfn": [pfn for pfn, _ in runs], "n": [n for _, n in runs]}
    column = pa.array(pfns)
    assert column.type == pa.uint64()
    assert column.to_pylist() == list(pfns)
    assert column.null_count == 0
    column.validate(full=True)
    table.validate(full=True)


def test_pfns_share_their_memory_and_keep_it() -> None:
    pa = pytest.importorskip("pyarrow")
    pfns = tracker().pfns(0)
    column = pa.array(pfns)
    assert column.buffers()[1].address == np.asarray(pfns).__array_interface__["data"][0]
    part = pa.array(pfns[10:20])
    expected, tail = list(pfns), list(pfns[10:20])
    del pfns
    gc.collect()
    assert column.to_pylist() == expected
    assert part.to_pylist() == tail


def test_polars_and_pandas_read_them_by_arrow() -> None:
    pl = pytest.importorskip("polars")
    folios = tracker().folios()
    frame = pl.DataFrame(folios)
    assert frame.columns == ["phys", "order"]
    assert frame.rows() == [tuple(folio) for folio in folios]
    assert pl.Series(tracker().pfns(0)).to_list() == list(tracker().pfns(0))
    by_order = frame.group_by("order").len().sort("order").rows()
    assert by_order == [(0, len(tracker().pfns(0))), (3, len(tracker().pfns(3)))]


def test_capsules_that_no_consumer_takes_are_released() -> None:
    folios = tracker().folios()
    for _ in range(100):
        schema, array = folios.__arrow_c_array__()
        assert "arrow_schema" in repr(schema)
        assert "arrow_array" in repr(array)
        tracker(10).pfns(0).__dlpack__(max_version=(1, 0))
    with pytest.raises(ValueError, match="not a capsule"):
        folios.__arrow_c_array__(7)


@pytest.mark.parametrize("of", [tracker(), EMPTY])
def test_dlpack_shares_the_memory_read_only(of: kho.Tracker) -> None:
    pfns = of.pfns(0)
    array = np.from_dlpack(pfns)
    assert (array.dtype, array.shape, array.flags.writeable) == (np.uint64, (len(pfns),), False)
    assert array.tolist() == list(pfns)
    if len(pfns):
        assert array.__array_interface__["data"][0] == np.asarray(pfns).__array_interface__["data"][0]
    runs = np.from_dlpack(of.runs(0))
    assert runs.shape == (len(of.runs(0)), 2)
    assert [tuple(row) for row in runs.tolist()] == list(of.runs(0))
    folios = np.from_dlpack(of.folios())
    assert [tuple(row) for row in folios.tolist()] == [tuple(folio) for folio in of.folios()]
    del pfns, of
    gc.collect()
    assert array.sum() >= 0


def test_a_copy_may_be_written() -> None:
    pfns = tracker().pfns(0)
    array = np.from_dlpack(pfns, copy=True)
    assert array.flags.writeable
    array[0] = 99
    assert pfns[0] == 0


def test_what_a_read_only_array_of_the_cpu_cannot_be_is_refused() -> None:
    pfns: Any = tracker().pfns(0)
    assert pfns.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match=r"read-only.*DLPack below 1\.0"):
        pfns.__dlpack__()
    with pytest.raises(BufferError, match="memory of the CPU"):
        pfns.__dlpack__(max_version=(1, 0), dl_device=(2, 0))
    with pytest.raises(TypeError):
        pfns.__dlpack__(max_version="1.0")


def test_a_list_that_does_not_fit_twice_is_an_error_not_an_abort() -> None:
    program = """
import resource, kho
t = kho.Tracker()
t.preserve_run(0, 0, 40 << 20)
folios = t.folios()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20), resource.RLIM_INFINITY))
for take in (folios.__arrow_c_array__, lambda: folios.__dlpack__(max_version=(1, 0), copy=True)):
    try:
        take()
    except kho.OutOfMemoryError as error:
        print(type(error).__name__)
print(len(folios))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["OutOfMemoryError", "OutOfMemoryError", str(40 << 20)], done.stderr


# Notebooks


@pytest.mark.parametrize("name", NAMES)
def test_handovers_findings_and_maps_are_html(name: str) -> None:
    import xml.etree.ElementTree as ET

    inc: Any = kho.open(elf(name))
    text = ET.fromstring(f"<div>{inc._repr_html_()}</div>")
    cells = ["".join(cell.itertext()) for cell in text.iter("td")]
    assert "root FDT" not in cells
    for subtree in inc.subtrees:
        assert subtree in cells
    assert f"{inc.nr_folios} folios" in "".join(text.itertext())
    findings: Any = verify(inc)
    assert ET.fromstring(findings._repr_html_()) is not None
    assert findings == list(findings)
    drawn: Any = memmap.build(inc, inc.ranges)
    assert ET.fromstring(drawn._repr_html_()).tag.endswith("svg")


def test_names_of_an_image_are_escaped_in_html() -> None:
    arena = kho.Arena("256M", scratch="16M,32M,16M")
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("<script>alert(1)</script>", 1, b"x" * 5000)
    out.finalize()
    inc: Any = kho.open(arena)
    text = inc._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("name", NAMES)
def test_objects_say_what_they_are_in_a_line(name: str) -> None:
    inc = kho.open(elf(name))
    found: list[object] = [inc, *inc.payloads.values(), *inc.reserve_mem.values(), kho.Image(inc)]
    found += [memmap.build(inc), kho.owners.owners(inc).rows]
    if "LUO" in inc.payloads:
        for session in inc.luo.sessions.values():
            found += [session, session.files, *session.files.values()]
    for each in found:
        text = repr(each)
        assert "object at 0x" not in text
        assert len(text) < 300
        assert text.isprintable()
