"""`kho compat`: two kernels by their files, vendors' releases, feature headers, and what a directory of kernels has."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from pathlib import Path

import pytest

import kho
from kernelfiles import BANNER, CONFIG, arm64_image, bzimage, vmlinux, zboot
from kho.formats.features import LUO_BITS, MEMFD_BITS, Features
from kho.formats.luo_write import LuoFeaturesOut
from kho.handover.compat import Judged, Offer, Target, judge
from kho.kernelimage import read_kernel
from kho.kernels import FIXES, KERNELS, Release

import captures
from command import kho as run

MIB = 1 << 20
UBUNTU = (
    b"Linux version 7.0.0-14-generic (buildd@host) (gcc 15.2.0) #14-Ubuntu SMP (Ubuntu 7.0.0-14.14-generic 7.0.%d)\n"
)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def configured(release: str, *options: str) -> bytes:
    """A vmlinux with its configuration inside."""
    text = f"# Linux/x86 {release} Kernel Configuration\n" + "".join(f"CONFIG_{name}\n" for name in options)
    banner = f"Linux version {release} (a@b) (cc) #1 SMP".encode()
    return vmlinux(banner + b"IKCFG_ST" + gzip.compress(text.encode()) + b"IKCFG_ED")


# Two kernels


def test_kernels_files_and_releases_are_compared_in_any_combination(tmp_path: Path) -> None:
    old, new = written(tmp_path / "old", bzimage(b"6.19.11")), written(tmp_path / "new", bzimage(b"7.0.11"))
    wanted = run("compat", "--json", "6.19.11", "7.0.11").json
    assert wanted["files"] == [None, None]
    for one, two in ((old, "7.0.11"), ("6.19.11", new), (old, new)):
        found = run("compat", "--json", one, two).json
        assert found["files"] == [str(each) if isinstance(each, Path) else None for each in (one, two)]
        assert {**found, "files": None} == {**wanted, "files": None}
    shown = run("compat", old, new)
    assert shown.code == 0
    assert shown.out.splitlines()[0].split() == ["old", "new"]


def test_what_two_files_tell_of_their_configuration_is_compared(tmp_path: Path) -> None:
    one = written(tmp_path / "one", configured("7.3.1", "KEXEC_HANDOVER=y", "X86_64=y", "LIVEUPDATE=y"))
    two = written(tmp_path / "two", configured("7.3.2", "X86_64=y", "ARCH_FORCE_MAX_ORDER=12"))
    done = run("compat", one, two)
    assert "CONFIG_LIVEUPDATE      yes  no" in done.out
    assert "MAX_PAGE_ORDER         10   12" in done.out
    assert done.err == f"warning: {two}: built without CONFIG_KEXEC_HANDOVER\n"
    found = run("compat", "--json", one, two).json
    assert found["configured"] == {
        "largest_order": [10, 12],
        "CONFIG_KEXEC_HANDOVER": [True, False],
        "CONFIG_LIVEUPDATE": [True, False],
    }
    assert run("compat", "--json", one, "7.3").json["configured"] == {}
    assert "| CONFIG_LIVEUPDATE | yes | no |" in run("compat", "--markdown", one, two).out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere", "7.0"], "nowhere: no such file: HANDOVER is a memory image, live, or a directory"),
        (["6.19", "nowhere"], "nowhere: no such file: TARGET is a release (7.0.11), or a kernel's file"),
        (["6.19", "."], ".: a directory; of two kernels each is a release (7.0.11), or a kernel's file"),
        (["6.19", "CAPTURE"], "handover.elf: a memory image (ELF core), not a kernel"),
        (["CAPTURE", "CAPTURE"], "handover.elf: a memory image (ELF core), not a kernel"),
        (["6.12", "7.0"], "Linux 6.12: kernels with KHO that are known here: 6.16"),
    ],
)
def test_an_argument_that_is_neither_is_told_what_it_may_be(args: list[str], said: str) -> None:
    capture = str(captures.elf("linux-7.0-layout-x86_64"))
    done = run("compat", *(capture if arg == "CAPTURE" else arg for arg in args))
    assert done.code == 2
    assert said in done.err


def test_a_packed_memory_image_is_no_kernel(tmp_path: Path) -> None:
    """Memory has the running kernel's banner, too."""
    core = captures.elf("linux-7.0-layout-x86_64").read_bytes() + BANNER
    for content in (core, bytes(4096) + BANNER):
        with pytest.raises(kho.SourceError, match="not a kernel|no vmlinux and no arm64 Image"):
            read_kernel(written(tmp_path / "x.gz", gzip.compress(content)))
    done = run("compat", written(tmp_path / "core.gz", gzip.compress(core)), "7.0")
    assert done.out.startswith("kho-v1 handover to Linux 7.0")


def test_files_next_to_kernels_are_warned_of_and_do_not_end_a_directory(tmp_path: Path) -> None:
    written(tmp_path / "vmlinuz-6.18.15", bzimage(b"6.18.15"))
    written(tmp_path / "vmlinux.o", b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + b"\1\0" + BANNER)
    written(tmp_path / "vmlinuz-6.18.15.hmac", b"0123")
    done = run("compat", captures.elf("linux-6.18.15-x86_64"), tmp_path)
    assert (done.code, done.out.splitlines()[0].split(" (")[0]) == (0, "kho-v1 handover to Linux 6.18.15")
    assert "vmlinux.o: an object file, not a kernel" in done.err
    assert "vmlinuz-6.18.15.hmac: no kernel" in done.err
    (tmp_path / "vmlinuz-6.18.15").unlink()
    assert run("compat", captures.elf("linux-6.18.15-x86_64"), tmp_path).code == 2


# A vendor's release


@pytest.mark.parametrize(("point", "affected"), [(3, True), (12, False)])
def test_the_banner_of_a_vendors_kernel_tells_the_upstream_release(point: int, affected: bool, tmp_path: Path) -> None:
    for name, content in (
        ("vmlinux", vmlinux(UBUNTU % point)),
        ("Image.gz", gzip.compress(arm64_image(bytes(100) + UBUNTU % point))),
        ("zboot", zboot(arm64_image(UBUNTU % point))),
    ):
        release = read_kernel(written(tmp_path / name, content)).release
        assert (release.text, release.point, release.vendor) == ("7.0.0-14-generic", point, False)
        assert FIXES["crash-kernel"].affects(release) is affected
    plain = read_kernel(written(tmp_path / "plain", vmlinux(BANNER))).release
    assert (plain.point, plain.vendor) == (3, True)


def test_the_signature_of_a_machine_decides_about_its_faults(tmp_path: Path) -> None:
    root = tmp_path / "machine"
    shutil.copytree(captures.DATA / "linux-7.1.13-x86_64/host/stage1", root)
    (root / "proc/version").write_text("Linux version 7.1.0-9-generic (a@b) #9\n")
    fault = f"note: Linux 7.1.0-9-generic: upstream; your vendor may have the fix: {FIXES['session-race'].effect}"
    assert fault in run("compat", root, "7.1.13").out
    signature = root / "proc/version_signature"
    signature.write_text("Ubuntu 7.1.0-9.9-generic 7.1.8\n")
    assert "note: Linux 7.1.0" not in run("compat", root, "7.1.13").out
    signature.write_text("Ubuntu 7.1.0-9.9-generic 7.1.7\n")
    said = run("compat", root, "7.1.13").out
    assert f"note: Linux 7.1.0-9-generic: {FIXES['session-race'].effect}" in said
    for bad in (b"\xff" * 4096, b"", b"Ubuntu 6.8.0-1 6.8.12\n"):
        signature.write_bytes(bad)
        assert fault in run("compat", root, "7.1.13").out
    signature.unlink()
    os.mkfifo(signature)
    assert fault in run("compat", root, "7.1.13").out
    signature.unlink()
    (tmp_path / "outside").write_text("Ubuntu 7.1.0-9.9-generic 7.1.8\n")
    signature.symlink_to(tmp_path / "outside")
    assert fault in run("compat", root, "7.1.13").out


# Levels of a tree


@pytest.mark.parametrize(("abi", "levels"), [("kho-v2", 4), ("kho-v3", 5), ("kho-v4", 5)])
def test_the_levels_of_a_tree_are_told_by_the_tree(abi: str, levels: int) -> None:
    arena = kho.Arena(256 * MIB, page_size=16384)
    kho.Outgoing(arena, abi).finalize()
    assert Offer.of(kho.open(arena)).levels == levels


@pytest.mark.parametrize("name", captures.NAMES)
def test_the_levels_of_real_trees_are_those_of_their_kernels(name: str) -> None:
    inc = kho.open(captures.elf(name))
    assert Offer.of(inc).levels == inc.abi.levels.get(inc.page_size)


def test_a_tree_of_a_release_candidate_panics_released_kernels(tmp_path: Path) -> None:
    """Linux 7.1-rc1 to rc5 wrote kho-v3 with four levels at 16 KiB; every release has five."""
    arena = kho.Arena(256 * MIB, page_size=16384, scratch="32M,32M,32M")
    out = kho.Outgoing(arena, "kho-v2")
    out.finalize()
    out.save(tmp_path / "x.elf")
    image = (tmp_path / "x.elf").read_bytes()
    assert image.count(b"kho-v2\0") == 1
    path = written(tmp_path / "rc.elf", image.replace(b"kho-v2\0", b"kho-v3\0"))
    (row,) = judge(Offer.of(kho.open(path, page_size=16384)), Target(Release.parse("7.1.13")))
    assert (row.object, row.verdict) == ("map", "panics")
    assert "a tree of 4 levels, and Linux 7.1 reads 5 at 16 KiB pages" in row.why


# Feature headers, a draft


def featured(luo_req: int | None = None, memfd_req: int | None = None) -> kho.Arena:
    """A handover with feature headers; the bits that they require may be given."""
    arena = kho.Arena(64 * MIB, scratch="4M,4M,4M")
    out = kho.Outgoing(arena, "kho-v4")
    with pytest.MonkeyPatch.context() as patched:
        if luo_req is not None:
            patched.setattr(LuoFeaturesOut, "features", Features(7 | luo_req, luo_req, 7, LUO_BITS))
        out.add_luo(version="luo-features")
        memfd = out.add_memfd("vm", 1, b"guest")
        if memfd_req is not None:
            arena.write(memfd, struct.pack("<QQ", 3 | memfd_req, memfd_req))
        out.finalize()
    return arena


def rows_of(arena: kho.Arena, image: Path) -> dict[str, Judged]:
    found = read_kernel(image)
    return {row.object: row for row in judge(Offer.of(kho.open(arena)), Target(found.release, found))}


@pytest.mark.parametrize(
    ("luo_req", "memfd_req", "supported", "verdicts"),
    [
        (None, None, (7, 3), ("taken", "taken")),
        (None, None, (7, 1), ("taken", "lost")),
        (None, None, (3, 3), ("panics", None)),
        (0x107, None, (7, 3), ("panics", None)),
        (0x107, None, (0x107, 3), ("taken", None)),
        (0, 0x83, (0, 3), ("taken", "lost")),
        (0, 0x83, (0, 0xFF), ("taken", "taken")),
    ],
)
def test_required_features_are_compared_with_those_that_the_kernel_supports(
    luo_req: int | None,
    memfd_req: int | None,
    supported: tuple[int, int],
    verdicts: tuple[str, str | None],
    tmp_path: Path,
) -> None:
    lists = {name: (bits, 0, bits) for name, bits in zip((b"luo", b"memfd"), supported, strict=True)}
    kernel = written(tmp_path / "vmlinux", vmlinux(BANNER.replace(b"7.0.3", b"7.3.9"), features=lists))
    rows = rows_of(featured(luo_req, memfd_req), kernel)
    file = rows.get("session vm, file 0x1")
    assert (rows["LUO"].verdict, None if file is None else file.verdict) == verdicts
    if luo_req == 0x107 and supported[0] == 7:
        assert "it requires bit 8, which .liveupdate_features of the kernel does not support" in rows["LUO"].why
    if supported == (7, 1):
        assert file is not None
        assert "it requires FOLIOS, which" in file.why


def test_released_kernels_take_no_feature_headers() -> None:
    rows = {row.object: row for row in judge(Offer.of(kho.open(featured())), Target(Release.parse("7.3")))}
    assert rows["LUO"].verdict == "panics"


def test_a_kernel_that_lists_no_features_does_not_decide_by_them(tmp_path: Path) -> None:
    image = read_kernel(written(tmp_path / "vmlinux", vmlinux(BANNER)))
    assert Target(image.release, image).lacks("memfd", Features.all_of(MEMFD_BITS)) is None


# FLBs of the kernel's own test


@pytest.mark.parametrize(("option", "verdict"), [("LIVEUPDATE_TEST=y", "taken"), ("X=y", "lost")])
def test_the_configuration_decides_about_the_flbs_of_the_test(option: str, verdict: str, tmp_path: Path) -> None:
    options = ("KEXEC_HANDOVER=y", "X86_64=y", "LIVEUPDATE=y", "LIVEUPDATE_MEMFD=y", option)
    image = read_kernel(written(tmp_path / "vmlinux", configured("7.1.13", *options)))
    offer = Offer.typical(KERNELS["7.1"])
    offer.flbs = ["liveupdate-test-flb-v0", "pci-v2"]
    rows = {row.object: row.verdict for row in judge(offer, Target(image.release, image))}
    assert (rows["FLB liveupdate-test-flb-v0"], rows["FLB pci-v2"]) == (verdict, "unknown")


def test_a_configuration_in_a_directory_is_no_panic(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIG)
    assert run("compat", "6.19", tmp_path / "config").code == 0
