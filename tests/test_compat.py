"""Which kernel takes over what: the verdicts are those of the kernels' sources, and of kexecs between real kernels."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import kho
from kernelfiles import BANNER, CONFIG, PACKERS, arm64_image, bzimage, packed_bzimage, vmlinux, zboot
from kho.cli.compat import cell, cells
from kho.crashline import crash_kernel_bytes
from kho.handover.compat import Offer, Target, judge, worst
from kho.kernelimage import read_kernel
from kho.kernels import FIXES, KERNELS, Release, kernel_of, kernels_that_write

import captures
from command import kho as run

# What real kernels did: from, to, verdict. docs/compat.md says how it was seen.
SEEN = [
    ("7.0", "7.0", "taken"),
    ("6.19", "7.0", "panics"),
    ("7.0", "7.1", "cold boot"),
    ("6.19", "7.1", "cold boot"),
    ("7.1", "7.0", "cold boot"),
    ("6.19", "6.19", "taken"),
    ("7.1", "7.1", "taken"),
    ("6.17", "6.19", "panics"),
    ("7.3", "7.3", "taken"),
]


@pytest.mark.parametrize(("old", "new", "seen"), SEEN)
def test_a_pair_of_kernels_does_what_was_seen(old: str, new: str, seen: str) -> None:
    assert cell(cells(old)[new]) == seen


def test_a_kernel_takes_over_what_it_wrote() -> None:
    for name in KERNELS:
        assert worst(judge(Offer.typical(KERNELS[name]), Target(Release.parse(name)))) == "taken", name


def test_kernels_of_one_root_compatible_and_bitmap_size_differ_in_luo_alone() -> None:
    for old in KERNELS.values():
        for new in KERNELS.values():
            rows = judge(Offer.typical(old), Target(Release.parse(new.name)))
            if old.abi != new.abi:
                assert [(row.object, row.verdict) for row in rows] == [("root", "refused")]
            elif old.bitmap != new.bitmap:
                dies = old.bitmap == "512 bytes"
                assert [(row.object, row.verdict) for row in rows] == [("map", "panics" if dies else "lost")]
            else:
                assert {row.object for row in rows if row.verdict != "taken"} <= {"LUO"}


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_capture_is_taken_by_the_kernel_that_made_it(name: str) -> None:
    series = name.split("-")[1]
    rows = judge(Offer.of(kho.open(captures.elf(name))), Target(Release.parse(series)))
    if "6.16-layout" in name:  # Linux 6.18.15 with the bitmaps of 6.16: its test lists folios as 6.18 does.
        rows = [row for row in rows if row.object != "kho_test"]
    # Whether test FLBs are taken depends on a driver; everything else is certain.
    assert {row.verdict for row in rows if not row.object.startswith("FLB ")} == {"taken"}, rows
    assert {row.verdict for row in rows if row.object.startswith("FLB ")} <= {"unknown"}


def test_the_luo_flb_node_decides_between_boot_and_panic() -> None:
    offer = Offer.of(kho.open(captures.elf("linux-7.0-layout-x86_64")))
    assert offer.flb_node
    assert worst(judge(offer, Target(Release.parse("7.0")))) != "panics"
    offer.flb_node = False
    rows = judge(offer, Target(Release.parse("7.0")))
    assert [row.object for row in rows if row.verdict == "panics"] == ["LUO"]
    assert worst(judge(offer, Target(Release.parse("6.19")))) == "lost"  # the FLBs


def test_a_map_of_zero_boots_cold() -> None:
    offer = Offer.of(kho.open(captures.elf("linux-6.18.15-x86_64")))
    offer.map = 0
    assert [(row.object, row.verdict) for row in judge(offer, Target(Release.parse("6.18")))] == [("root", "refused")]


def test_files_that_no_handler_takes_are_lost() -> None:
    offer = Offer.typical(KERNELS["7.1"])
    offer.sessions = {"s": [(1, "memfd-v1"), (2, "memfd-v2"), (3, "vfio-pci-v1")], "empty": []}
    verdicts = {row.object: row.verdict for row in judge(offer, Target(Release.parse("7.1.13")))}
    assert verdicts["session s, file 0x1"] == "lost"
    assert verdicts["session s, file 0x2"] == "taken"
    assert verdicts["session s, file 0x3"] == "unknown"
    assert verdicts["session empty"] == "taken"


def test_folios_beyond_max_page_order_are_lost_up_to_7_0() -> None:
    offer = Offer.typical(KERNELS["7.0"])
    offer.orders = {0: 5, 18: 2}
    verdicts = {row.object: row.verdict for row in judge(offer, Target(Release.parse("7.0")))}
    assert verdicts["folios of order 18 and more"] == "lost"
    offer = Offer.typical(KERNELS["7.1"])
    offer.orders = {0: 5, 18: 2}
    assert worst(judge(offer, Target(Release.parse("7.1")))) == "taken"


def test_kernels_that_are_older_or_newer_than_any_known_one() -> None:
    offer = Offer.typical(KERNELS["7.3"])
    assert worst(judge(offer, Target(Release.parse("6.12.9")))) == "refused"
    assert worst(judge(offer, Target(Release.parse("9.1")))) == "unknown"


@pytest.mark.parametrize(
    ("fix", "release", "signature", "affected"),
    [
        ("memfd-dirty", "6.19.8", None, True),
        ("memfd-dirty", "6.19.9", None, False),
        ("memfd-dirty", "7.0", None, False),
        ("crash-kernel", "7.0.10", None, True),
        ("crash-kernel", "7.0.11", None, False),
        ("crash-kernel", "7.0.0-14-generic", None, None),
        ("crash-kernel", "7.0.0-14-generic", "Ubuntu 7.0.0-14.14-generic 7.0.12", False),
        ("crash-kernel", "7.0.0-14-generic", "Ubuntu 7.0.0-14.14-generic 7.0.3", True),
        ("crash-kernel", "6.18.3", None, False),
        ("scratch-rounding", "6.18.41", None, True),
        ("scratch-rounding", "6.18.42", None, False),
        ("scratch-rounding", "7.0.14", None, True),
        ("scratch-rounding", "7.2-rc1", None, False),
    ],
)
def test_which_release_has_a_fault(fix: str, release: str, signature: str | None, affected: bool | None) -> None:
    assert FIXES[fix].affects(Release.parse(release, signature)) is affected


# A row for each of ABI-7.0-AND-STABLE.md section 2 that a fix mends: commits, releases with the fault, and without it.
POINTS = [
    ("segment-unfinalized", "only fill kimage", ["6.16.12", "6.17.3"], ["6.17.4", "6.18"]),
    ("metadata-allocator", "a2fff99f92da fa759cd75bce e38f65d317df", ["6.16", "6.17.9", "6.17.13"], ["6.18"]),
    ("unpreserve-absent", "b05addf6f059", ["6.17.8"], ["6.17.9", "6.18"]),
    ("arm64-cells", "dt_root_addr_cells", ["6.16.1", "6.17.12", "6.18.1"], ["6.17.13", "6.18.2", "6.19"]),
    ("memoryless-node", "427b2535f513", ["6.16", "6.17.13", "6.18.15", "6.19.5"], ["6.19.6", "7.0"]),
    ("memfd-dirty", "50d7b4332f27 7e04bf1f3315 f85b1c6af5bc", ["6.19.0", "6.19.8"], ["6.18.15", "6.19.9", "7.0"]),
    ("session-error-ignored", "307e0c5859b0", ["6.19.12"], ["6.19.13", "7.0"]),
    ("retrieve-leaks", "3538f90ab89a", ["6.19", "6.19.13", "7.0.3"], ["7.0.4", "7.1"]),
    ("subnode-left", "9ec953298948", ["6.19.13", "7.0.8"], ["6.18.15", "7.0.9", "7.1"]),
    ("crash-kernel", "a6715d7ec472", ["6.19", "6.19.13", "7.0.10"], ["7.0.11", "7.1"]),
    ("retrieve-partial", "0fb1daf0b78d", ["6.19", "6.19.13", "7.0.10"], ["7.0.11", "7.1"]),
    ("restored-blocks", "in 7.1", ["6.19.13", "7.0.14"], ["6.18.15", "7.1"]),
    ("tree-depth", "d64b0372760e 8fd2f26fa2a3", ["7.1-rc1", "7.1.0-rc5"], ["7.0.14", "7.1-rc6", "7.1", "7.1.3", "7.2"]),
    ("empty-session-name", "invalid name length", ["6.19.13", "7.0.14", "7.1.3"], ["7.1.4", "7.2"]),
    (
        "scratch-rounding",
        "0e39380a7316",
        ["6.16", "6.17.13", "6.18.41", "6.19.13", "7.0.14", "7.1.4"],
        ["6.18.42", "7.1.5", "7.2"],
    ),
    ("ioctl-direction", "507e3b479f9c", ["6.19.13", "7.0.14", "7.1.4"], ["7.1.5", "7.2"]),
    ("session-race", "bb1328be35bf 291dcd37c8c8 ef52801fdb96", ["6.19.13", "7.0.14", "7.1.3"], ["7.1.8", "7.2"]),
]


def test_every_row_of_the_point_releases_is_a_fix() -> None:
    assert {row[0] for row in POINTS} == {*FIXES}
    for name, commits, lack, have in POINTS:
        fix = FIXES[name]
        hashes = re.findall(r"\b[0-9a-f]{12}\b", commits)
        assert all(commit in fix.upstream for commit in hashes or [commits]), name
        assert fix.effect, name
        assert fix.remedy, name
        assert [release for release in lack if fix.affects(Release.parse(release)) is not True] == [], name
        assert [release for release in have if fix.affects(Release.parse(release)) is not False] == [], name
        for release in lack:
            vendors = fix.affects(Release.parse(f"{release}-14-generic")) if "rc" not in release else None
            assert vendors is None, f"{name}: a distribution's {release} may have it"


def test_a_fix_names_the_releases_without_and_with_it() -> None:
    assert FIXES["memfd-dirty"].where() == "before 6.19.9"
    assert FIXES["memfd-dirty"].remedied() == "6.19.9, 7.0 and later"
    assert FIXES["tree-depth"].where() == "before 7.1-rc6"
    assert FIXES["retrieve-partial"].where() == "6.19 (every release), before 7.0.11"
    assert FIXES["restored-blocks"].remedied() == "7.1 and later"


def test_the_release_of_this_machine_is_read() -> None:
    running = Release.running()
    assert running is None or running.text == os.uname().release


@pytest.mark.parametrize("text", ["", "seven", "7", "7.", "a.b", "-7.0"])
def test_what_is_no_release_is_refused(text: str) -> None:
    with pytest.raises(kho.ParameterError, match=r"write 7\.0"):
        Release.parse(text)


def test_the_rows_of_the_kernels_and_of_the_readers_agree() -> None:
    for name in captures.NAMES:
        inc = kho.open(captures.elf(name))
        wanted = captures.expected(name)
        row = kernel_of(Release.parse(name[6:].partition("-")[0]))
        assert row is not None
        assert row.abi == inc.compatible
        assert (row.map == "chunk list") == (inc.bitmap_bytes is not None)
        if "luo" in wanted:
            assert row.luo == wanted["luo"]["compatible"]
            memfds = {entry.compatible for session in inc.luo.all_sessions for entry in session.entries}
            assert memfds == {row.memfd}


# Kernels' files


@pytest.mark.parametrize("packer", PACKERS)
def test_kernels_are_unpacked_in_every_way_of_the_kernels_build(packer: str, tmp_path: Path) -> None:
    content = bytes(5000) + BANNER + b"IKCFG_ST" + gzip.compress(CONFIG.encode()) + b"IKCFG_ED" + os.urandom(100_000)
    path = tmp_path / "kernel"
    for kind, made in (
        ("Image", PACKERS[packer](arm64_image(content))),
        ("zboot", zboot(arm64_image(content), PACKERS[packer])),
        ("bzImage", packed_bzimage(b"7.0.3-test", vmlinux(content, [b"memfd-v1"]), PACKERS[packer])),
    ):
        path.write_bytes(made)
        image = read_kernel(path)
        assert (image.kind, image.release.text, image.page_size) == (kind, "7.0.3-test", 16384)
        assert image.versions == (["memfd-v1"] if kind == "bzImage" else None)


@pytest.mark.parametrize("packer", ["gzip", "xz", "bzip2", "lzma"])
def test_every_cut_of_a_packed_kernel_is_read_or_refused(packer: str, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    whole = packed_bzimage(b"7.0.3-test", vmlinux(BANNER + os.urandom(500)), PACKERS[packer])
    zipped = zboot(arm64_image(BANNER + os.urandom(500)), PACKERS[packer])
    for made in (whole, zipped):
        for n in range(0, len(made), 101):
            path.write_bytes(made[:n])
            with contextlib.suppress(kho.SourceError):
                assert read_kernel(path).release.series == (7, 0)


LZOP = b"\x89LZO\0\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (LZOP, "packed with LZO (lzop), which is not unpacked here: unpack it with lzop -d first"),
        (b"\x5d\0\0" + bytes(100), "packed with LZMA: "),
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"no packing at all" * 9, ""),
    ],
)
def test_a_payload_that_cannot_be_unpacked_leaves_the_release_and_is_told(
    payload: bytes, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(packed_bzimage(b"7.0.3-test", b"", lambda _: payload))
    image = read_kernel(path)
    assert (image.kind, image.release.text, image.config) == ("bzImage", "7.0.3-test", None)
    assert image.unread is not None
    assert why in image.unread
    done = run("compat", captures.elf("linux-7.0-layout-x86_64"), path)
    assert f"note: Linux 7.0.3-test: {path}: {image.unread}; its configuration is not known" in done.out


@pytest.mark.parametrize("wrap", [lambda whole: whole, lambda whole: zboot(b"", lambda _: whole)])
def test_a_kernel_packed_with_lzo_alone_is_refused_by_name(wrap: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(wrap(LZOP))
    with pytest.raises(kho.SourceError, match=r"packed with LZO \(lzop\)"):
        read_kernel(path)


def test_the_features_of_a_kernel_are_read(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux(BANNER, features={b"luo": (7, 2, 7), b"memfd": (3, 2, 3)}))
    image = read_kernel(path)
    assert image.versions is None
    assert image.features == {"luo": (7, 2, 7), "memfd": (3, 2, 3)}
    assert image.features["memfd"].required == 2


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("bzImage", bzimage(b"7.0.3-test")),
        ("Image", arm64_image(bytes(5000) + BANNER)),
        ("Image", gzip.compress(arm64_image(bytes(5000) + BANNER))),
        ("Image", lzma.compress(arm64_image(bytes(5000) + BANNER))),
        ("zboot", zboot(arm64_image(bytes(5000) + BANNER))),
        ("vmlinux", vmlinux(bytes(100) + BANNER)),
    ],
    ids=["bzImage", "Image", "Image.gz", "Image.xz", "zboot", "vmlinux"],
)
def test_a_kernels_file_tells_its_release(kind: str, made: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(made)
    found = read_kernel(path)
    assert (found.kind, found.release.text, found.release.vendor) == (kind, "7.0.3-test", True)
    assert found.config is None
    (tmp_path / "config-7.0.3-test").write_text(CONFIG)
    found = read_kernel(path)
    assert found.config is not None
    assert (found.page_size, found.config["KEXEC_HANDOVER"]) == (16384, "y")


def test_a_configuration_inside_the_kernel_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux(BANNER + bytes(10) + b"IKCFG_ST" + gzip.compress(CONFIG.encode()) + b"IKCFG_ED"))
    assert read_kernel(path).page_size == 16384


def test_the_versions_that_luo_accepts_are_read_and_decide(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux(BANNER, [b"memfd-v1", b"vfio-pci-v1"]))
    image = read_kernel(path)
    assert image.versions == ["memfd-v1", "vfio-pci-v1"]
    offer = Offer.typical(KERNELS["7.0"])
    offer.sessions = {"s": [(1, "memfd-v1"), (2, "vfio-pci-v1"), (3, "iommufd-v1")]}
    verdicts = [row.verdict for row in judge(offer, Target(image.release, image)) if row.object.startswith("session")]
    assert verdicts == ["taken", "taken", "lost"]


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", bytes(10_000), b"\x7fELF" + bytes(200), b"MZ\0\0zimg" + bytes(60)]
)
def test_a_file_that_is_no_kernel_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    with pytest.raises(kho.SourceError):
        read_kernel(path)


def test_any_number_in_a_kernels_file_is_read_or_refused(tmp_path: Path) -> None:
    """Offsets and sizes of sections, the payload of zboot, the string of a boot header: each of 8 bytes, all ones."""
    path = tmp_path / "kernel"
    for made in (vmlinux(BANNER, [b"memfd-v1"]), zboot(arm64_image(BANNER)), bzimage(b"7.0.3-test")):
        for at in (*range(0, 64, 4), *range(0x200, 0x220, 4), *range(max(len(made) - 256, 0), len(made) - 8, 4)):
            path.write_bytes(made[:at] + b"\xff" * 8 + made[at + 8 :])
            try:
                assert read_kernel(path).release.series == (7, 0)
            except kho.SourceError:
                continue


@pytest.mark.parametrize("release", [b"7." + b"0" * 300, b"7.0/../../x", b"\xff\xfe", b"7.0.3-" + b"x" * 249])
def test_a_release_that_no_kernel_has_is_refused(release: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(release))
    with pytest.raises(kho.SourceError):
        read_kernel(path)


def test_a_fifo_is_no_kernel_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "kernel")
    with pytest.raises(kho.SourceError, match="not a regular file"):
        read_kernel(tmp_path / "kernel")


def test_a_damaged_configuration_leaves_the_order_unknown(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIG + "CONFIG_ARCH_FORCE_MAX_ORDER=huge\n")
    assert read_kernel(tmp_path / "config").max_page_order is None


def test_every_cut_of_a_vmlinux_is_read_or_refused(tmp_path: Path) -> None:
    whole = vmlinux(BANNER, [b"memfd-v1"])
    path = tmp_path / "vmlinux"
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        try:
            assert read_kernel(path).release.text == "7.0.3-test"
        except kho.SourceError:
            continue


def test_a_kernel_without_kho_refuses(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(b"7.1.13"))
    (tmp_path / "config-7.1.13").write_text(CONFIG.replace("7.0.3", "7.1.13").replace("CONFIG_KEXEC_HANDOVER=y", ""))
    image = read_kernel(path)
    rows = judge(Offer.typical(KERNELS["7.1"]), Target(image.release, image))
    assert [(row.object, row.verdict) for row in rows] == [("root", "refused")]


# The command


def test_the_exit_code_is_that_of_the_worst_object() -> None:
    capture = captures.elf("linux-6.18.15-x86_64")
    assert run("compat", capture, "6.18.15").code == 0
    assert run("compat", capture, "7.1").code == 1
    assert run("compat", capture, "9.9").code == 2
    assert run("compat", capture).code == 2
    assert run("compat", capture, "no/such/file").code == 2


def test_json_has_every_object_with_its_source() -> None:
    done = run("compat", captures.elf("linux-7.1.13-x86_64"), "7.1.13", "--json")
    (target,) = done.json["targets"]
    assert (target["release"], target["verdict"]) == ("7.1.13", "unknown")
    assert {"root", "LUO", "session vm-1, file 0x10", "reserve_mem trace0", "kho_test", "kexec-metadata"} <= {
        row["object"] for row in target["objects"]
    }
    assert all(row["source"] and row["why"] for row in target["objects"])


def test_each_kernel_of_a_directory_is_judged(tmp_path: Path) -> None:
    for release in ("6.18.15", "7.1.13"):
        (tmp_path / f"vmlinuz-{release}").write_bytes(bzimage(release.encode()))
    (tmp_path / "initrd.img").write_bytes(b"")
    done = run("compat", "--json", captures.elf("linux-6.18.15-x86_64"), tmp_path)
    assert [(t["release"], t["verdict"]) for t in done.json["targets"]] == [("6.18.15", "taken"), ("7.1.13", "refused")]
    assert done.code == 1


def test_debugfs_of_a_machine_is_judged_without_its_sessions() -> None:
    done = run("compat", "--json", captures.DATA / "linux-7.1.13-x86_64/host/stage1", "7.1.13")
    verdicts = {row["object"]: row["verdict"] for row in done.json["targets"][0]["objects"]}
    assert (verdicts["root"], verdicts["LUO"], verdicts["sessions"]) == ("taken", "taken", "unknown")
    refused = run("compat", captures.DATA / "linux-7.1.13-x86_64/host/stage2", "7.1.13")
    assert refused.code == 2
    assert "no outgoing root FDT" in refused.err


def test_two_releases_are_compared() -> None:
    found = run("compat", "--json", "6.19.11", "7.0.11").json
    assert found["faults"]["crash-kernel"]["affects"] == [True, False]
    assert "memfd-dirty" not in found["faults"]
    assert found["faults"].keys() == {
        "session-error-ignored",
        "retrieve-leaks",
        "crash-kernel",
        "retrieve-partial",
        "subnode-left",
    }
    assert found["differences"] == {
        "flb_node": [False, True],
        "flbs": [False, True],
    }
    assert "write the same formats" in run("compat", "6.16", "6.17.8").out
    assert "scratch extended after a handover  no" in run("compat", "7.2.1", "7.3").out
    assert run("compat", "6.12", "7.3").code == 2
    assert "| root compatible | kho-v1 | kho-v3 |" in run("compat", "7.0", "7.1", "--markdown").out


def test_the_matrix_has_every_pair() -> None:
    table = run("compat", "--matrix", "--json").json["matrix"]
    assert [*table] == [*KERNELS]
    assert all([*row] == [*KERNELS] for row in table.values())
    page = (Path(__file__).parent.parent / "docs/compat.md").read_text()
    assert run("compat", "--matrix", "--markdown").out in page


# Which kernel wrote a handover


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("linux-6.16-layout-x86_64", "Linux 6.16 and 6.17"),
        ("linux-6.18.15-x86_64", "Linux 6.18 to 7.0"),
        ("linux-7.0-layout-x86_64", "Linux 7.0"),
        ("linux-7.1.13-x86_64", "Linux 7.1"),
        ("linux-7.3.4-x86_64", "Linux 7.2 and 7.3"),
    ],
)
def test_formats_tell_which_kernels_can_have_written_a_handover(name: str, kernels: str) -> None:
    report = run("inspect", "--json", captures.elf(name)).json
    assert report["kernels"] == kernels
    assert kernels in run("inspect", captures.elf(name)).out
    assert report["certainty"] == ("likely" if "6.18" in name else "certain")


def test_luo_without_the_flb_node_is_linux_6_19() -> None:
    assert [kernel.name for kernel in kernels_that_write("kho-v1", 4096, "luo-v1", flb_node=False)] == ["6.19"]
    assert kernels_that_write("kho-v4", None, "luo-v1", flb_node=True) == []


# crashkernel= and the command line of the next kernel

GIB = 1 << 30


@pytest.mark.parametrize(
    ("cmdline", "ram", "nbytes"),
    [
        ("quiet", None, 0),
        ("crashkernel=128M", None, 128 << 20),
        ("crashkernel=128M@16M crashkernel=64M", None, 64 << 20),
        ("crashkernel=256M,high crashkernel=72M,low", None, 256 << 20),
        ("crashkernel=1G,high crashkernel=96M", None, 96 << 20),
        ("crashkernel=72M,low", None, 0),
        ("crashkernel=1G-4G:160M,4G-64G:192M,64G-:512M", 8 * GIB, 192 << 20),
        ("crashkernel=1G-4G:160M,4G-64G:192M,64G-:512M", 4 * GIB, 192 << 20),
        ("crashkernel=1G-4G:160M,4G-64G:192M,64G-:512M@32M", 80 * GIB, 512 << 20),
        ("crashkernel=1G-4G:160M", GIB // 2, 0),
        ("crashkernel=1G-4G:160M", None, None),
        ("crashkernel=0x8000000", None, 128 << 20),
        ("crashkernel=auto", None, 0),
        ("crashkernel=" + "9" * 400, None, 0),
        ("crashkernel=" + "1G-2G:1M," * 5000, 8 * GIB, 0),
        ("xcrashkernel=1G crashkernel", None, 0),
    ],
)
def test_crashkernel_is_read_as_the_kernel_reads_it(cmdline: str, ram: int | None, nbytes: int | None) -> None:
    assert crash_kernel_bytes(cmdline, ram) == nbytes


def verdicts(offer: Offer, cmdline: str | None = None, release: str = "7.0") -> dict[str, str]:
    return {row.object: row.verdict for row in judge(offer, Target(Release.parse(release), None, cmdline))}


def test_a_crash_kernel_must_fit_one_scratch_area() -> None:
    """Linux 7.3.4 with kho_scratch=16M,64M,16M crashkernel=128M, after its first live update: none is reserved."""
    offer = Offer.typical(KERNELS["7.3"])
    offer.scratch = [(0, 16 << 20), (64 << 20, 64 << 20), (128 << 20, 16 << 20)]
    assert "crash kernel" not in verdicts(offer, release="7.3")
    line = "kho=on liveupdate=on reserve_mem=1M:4K:trace0 crashkernel="
    assert verdicts(offer, line + "128M", "7.3")["crash kernel"] == "lost"
    assert verdicts(offer, line + "1G-:128M", "7.3")["crash kernel"] == "unknown"
    offer.scratch[1] = (64 << 20, 256 << 20)
    assert verdicts(offer, line + "128M", "7.3")["crash kernel"] == "taken"
    offer.cmdline = "crashkernel=1G"  # kexec passes the same line on, unless another is given
    assert verdicts(offer, release="7.3")["crash kernel"] == "lost"


def test_scratch_must_hold_the_page_structures() -> None:
    offer = Offer.typical(KERNELS["7.0"])
    offer.scratch, offer.ram = [(0, 16 << 20), (16 << 20, 32 << 20), (48 << 20, 16 << 20)], 8 * GIB  # 128 MiB of pages
    assert verdicts(offer)["scratch"] == "unknown"
    offer.ram = 2 * GIB
    assert verdicts(offer)["scratch"] == "taken"
    newest = Offer.typical(KERNELS["7.3"])
    newest.scratch, newest.ram = offer.scratch, 8 * GIB
    assert verdicts(newest, release="7.3")["scratch"] == "taken"  # it extends scratch
    offer.scratch = [(0, (64 << 20) + 4096)]
    assert verdicts(offer)["scratch"] == "unknown"
    offer.scratch = None
    assert verdicts(offer)["scratch"] == "unknown"


def test_the_command_line_decides_about_reserve_mem_and_luo() -> None:
    offer = Offer.typical(KERNELS["7.0"])
    assert verdicts(offer, "kho=on liveupdate=on reserve_mem=1M:4K:trace0") == verdicts(offer)
    assert verdicts(offer, "kho=on liveupdate=on reserve_mem=2M:4K:trace0")["reserve_mem trace0"] == "lost"
    assert verdicts(offer, "kho=on liveupdate=on reserve_mem=1M:4K:other")["reserve_mem trace0"] == "lost"
    assert verdicts(offer, "kho=on")["LUO"] == "lost"
    assert verdicts(offer, "kho=on liveupdate=off")["LUO"] == "lost"
    assert verdicts(offer, "kho=on liveupdate=1")["LUO"] == "taken"


def test_a_vendors_6_17_may_have_bitmaps_of_a_page() -> None:
    offer = Offer.typical(KERNELS["6.18"])
    rows = judge(offer, Target(Release.parse("6.17.0-14-generic")))
    assert [(row.object, row.verdict) for row in rows if row.object == "map"] == [("map", "unknown")]
    assert "your vendor's 6.17 may have" in rows[-1].why or "your vendor's 6.17 may have" in rows[0].why


def test_debugfs_of_6_17_tells_the_bitmaps_by_its_release(tmp_path: Path) -> None:
    stage = captures.DATA / "linux-6.18.15-x86_64/host/stage1"
    root = tmp_path / "machine"
    shutil.copytree(stage, root)
    (root / "proc/version").write_text("Linux version 6.17.8 (a@b) #1\n")
    rows = run("compat", "--json", root, "6.19").json["targets"][0]["objects"]
    assert [(row["object"], row["verdict"]) for row in rows] == [("map", "panics")]
    (root / "proc/version").write_text("Linux version 6.17.0-14-generic (a@b) #1\n")
    rows = run("compat", "--json", root, "6.19").json["targets"][0]["objects"]
    assert {row["object"]: row["verdict"] for row in rows}["map"] == "unknown"


# Composite compatibles, a draft


def test_composite_compatibles_are_judged_part_by_part_and_refused_by_released_kernels() -> None:
    offer = Offer.typical(KERNELS["7.3"])
    offer.abi = "kho-v4;radix-v1;vmalloc-v1"
    (row,) = judge(offer, Target(Release.parse("7.3")))
    assert (row.object, row.verdict) == ("root", "refused")
    assert "'kho-v4' it reads, 'radix-v1' it reads, 'vmalloc-v1' it reads; but released kernels compare" in row.why
    (row,) = judge(offer, Target(Release.parse("6.17")))
    assert "'kho-v4' it does not read, 'radix-v1' it does not read, 'vmalloc-v1' it does not read" in row.why
    offer = Offer.typical(KERNELS["7.3"])
    offer.luo, offer.sessions = "luo-v5;block-v1", {"s": [(1, "memfd-v2;vmalloc-v1")]}
    assert "'luo-v5' it reads, 'block-v1' is not known here" in next(
        row.why for row in judge(offer, Target(Release.parse("7.3"))) if row.object == "LUO"
    )
    offer.luo = "luo-v5"
    rows = {row.object: row for row in judge(offer, Target(Release.parse("7.3")))}
    assert rows["session s, file 0x1"].verdict == "lost"
    assert "'memfd-v2' it reads, 'vmalloc-v1' it reads" in rows["session s, file 0x1"].why


def test_a_kernel_that_lists_composite_compatibles_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    names = [b"kho-v4;radix-v1;vmalloc-v1", b"luo-v5;block-v1", b"memfd-v2;vmalloc-v1"]
    path.write_bytes(vmlinux(BANNER.replace(b"7.0.3", b"7.3.9"), names))
    image = read_kernel(path)
    offer = Offer.typical(KERNELS["7.3"])
    offer.abi, offer.luo = "kho-v4;radix-v1;vmalloc-v1", "luo-v5;block-v1"
    offer.sessions = {"s": [(1, "memfd-v2;vmalloc-v1"), (2, "memfd-v2")]}
    rows = {row.object: row.verdict for row in judge(offer, Target(image.release, image))}
    assert (rows["root"], rows["LUO"], rows["session s, file 0x1"]) == ("taken", "taken", "taken")
    assert rows["session s, file 0x2"] == "lost"
