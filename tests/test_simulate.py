"""A simulation matches its plan in every layout; one that does not fit is refused with a scale that fits."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

import kho
from kho.cli import simulate as command_module
from kho.errors import OutOfMemoryError, ParameterError, SourceError
from kho.kernels import KERNELS
from kho.sizing.plan import LAYOUTS, Calibration
from kho.sizing.simulate import calibrate, simulate

from command import kho as run
from images import GIB, TIB

PAGES = (4096, 16384, 65536)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("scattered", [False, True])
def test_metadata_and_folios_are_as_planned(layout: str, page: int, scattered: bool) -> None:
    done = simulate("96G", ["5000x2M", "9000x64K", "2x1G"], layout=layout, page_size=page, random=scattered)
    assert done.as_planned
    assert done.nr_folios == 14003
    assert done.nbytes == done.pages * page
    if not scattered:
        assert done.pages == done.cost.pages
    marked = {"mark"} if scattered else set()
    assert set(done.seconds) == marked | {"preserve", "serialize", "take over", "count"}


def test_terabytes_cost_what_their_map_costs() -> None:
    done = simulate("16T", preserve=["95%:1G"], folios=["100000x2M"])
    assert done.plan.preserved > 15 * TIB
    assert done.as_planned
    assert done.nbytes < 1 << 20


@pytest.mark.parametrize("count", [1, 20000, 60000])
def test_every_folio_is_restored(count: int) -> None:
    done = simulate("4G", [f"{count}x64K@random"], restore=True, layout="kho-v1-512")
    assert done.as_planned
    assert done.seconds["restore"] > 0


def test_another_number_of_folios_does_not_match_the_plan() -> None:
    done = simulate("4G", ["100x64K"])
    assert done.as_planned
    assert not replace(done, pages=done.pages + 1).as_planned
    assert not replace(done, nr_folios=done.nr_folios - 1).as_planned


@pytest.mark.parametrize("layout", ["kho-v1-512", "kho-v1", "kho-v4"])
def test_a_kept_image_contains_the_handover(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.elf"
    done = simulate("64G", ["300x2M", "500x4K@random"], layout=layout, keep=path, restore=True)
    inc = kho.open(path)
    assert inc.nr_folios == done.nr_folios == 801
    assert inc.folios_by_order == {0: 501, 9: 300}
    assert inc.metadata_pages == done.pages - 1
    assert inc.compatible == LAYOUTS[layout].abi
    with pytest.raises(SourceError, match="exists"):
        simulate("64G", ["1x2M"], keep=path)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_decides_layout_and_root(kernel: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.elf"
    done = simulate("1G", ["30x2M", "50x4K@random"], kernel=kernel, keep=path)
    assert done.as_planned
    inc = kho.open(path)
    row = KERNELS[kernel]
    assert (inc.compatible, inc.bitmap_bytes) == (row.abi, row.bitmap_bytes(4096))
    wanted = kho.Outgoing(kho.Arena("64M"), kernel=kernel)
    wanted.finalize()
    theirs = kho.open(wanted.arena)
    # The address of the map is the last number of 8 bytes.
    (mine, other) = (
        each.read(each.fdt_phys, each.fdt.totalsize).rpartition(struct.pack("<Q", each.preserved_memory_map))
        for each in (inc, theirs)
    )
    assert (mine[0], mine[2]) == (other[0], other[2])


def test_a_layout_that_the_kernel_does_not_write_is_refused() -> None:
    done = run(*ARGS, "--no-calibrate", "--kernel", "7.0", "--abi", "kho-v4")
    assert (done.code, done.out) == (2, "")
    assert "layout 'kho-v4' and kernel '7.0': Linux 7.0 writes kho-v1" in done.err
    assert "kho-v1, pages of 4.0 KiB" in run(*ARGS, "--no-calibrate", "--kernel", "7.0").out


def test_a_scale_reduces_memory_and_folios() -> None:
    done = simulate("64G", ["1000x2M", "70000x64K@random"], scale=0.1)
    assert (done.plan.nr_folios, done.as_planned) == (7100, True)
    assert done.plan.memory == pytest.approx(6.4 * GIB, rel=1e-3)
    for scale in (0, -1, 1.5, float("nan")):
        with pytest.raises(ParameterError, match="scale"):
            simulate("64G", ["1000x2M"], scale=scale)
    with pytest.raises(ParameterError, match="leaves no folios"):
        simulate("64G", ["10x2M"], scale=0.01)


def test_a_run_that_does_not_fit_names_a_scale_that_fits() -> None:
    with (
        mock.patch("kho.sizing.simulate._available", return_value=80 << 20),
        pytest.raises(OutOfMemoryError, match="80.0 MiB are available; a scale of ") as caught,
    ):
        simulate("1T", ["5000000x4K@random"])
    scale = float(str(caught.value).split("a scale of ")[1].split()[0])
    with mock.patch("kho.sizing.simulate._available", return_value=80 << 20):
        assert simulate("1T", ["5000000x4K@random"], scale=scale).as_planned


def test_a_layout_that_cannot_hold_the_folios_is_refused() -> None:
    with pytest.raises(ParameterError, match="kho-v3 has one more level"):
        simulate("64G", ["4x2G"], layout="kho-v2", page_size=16384)


def test_progress_counts_every_folio() -> None:
    told: list[tuple[str, int, int]] = []
    simulate("64G", ["200000x64K"], restore=True, progress=lambda *what: told.append(what))
    assert told[0][0] == "preserve"
    assert [at for what, at, _ in told if what == "preserve"][-1] == 200000
    assert told[-1] == ("restore", 200001, 200001)


def test_a_calibration_is_measured_for_every_layout() -> None:
    found = calibrate()
    assert Calibration.from_dict({"serialize": found.serialize, "take_over": found.take_over}) == found
    for row in found.take_over.values():
        assert row[0] > 0
        assert row[1] > 0
    assert found.serialize["kho-v4"][1] == 0, "a tree needs no serialization"


# The command

ARGS = ("simulate", "--memory", "64G", "--preserve", "50%:2M", "--folios", "1000x4K@random")


def test_the_command_compares_with_the_plan() -> None:
    done = run(*ARGS, "--no-calibrate")
    assert (done.code, done.err) == (0, "")
    assert "as planned\n" in done.out
    assert "17384" in done.out
    assert "take over" in done.out
    data = run(*ARGS, "--no-calibrate", "--json", "--restore").json
    assert data["as_planned"]
    assert (data["nr_folios"], set(data["seconds"]) >= {"restore"}) == (17385, True)


def test_a_deviation_from_the_plan_exits_1() -> None:
    real = simulate("1G", ["10x2M"])
    with mock.patch.object(command_module, "simulate", return_value=replace(real, pages=1)):
        done = run(*ARGS, "--no-calibrate")
    assert done.code == 1
    assert "NOT as planned" in done.out


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("mine")
    done = run(*ARGS, "--no-calibrate", "--keep", path)
    assert (done.code, done.out, path.read_text()) == (2, "", "mine")
    assert str(path) in done.err


@pytest.mark.parametrize("wrong", ["--memory=400T", "--scale=2", "--page-size=5K", "--folios=1000000000x1G"])
def test_impossible_simulations_are_refused(wrong: str) -> None:
    done = run(*ARGS, "--no-calibrate", wrong)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
