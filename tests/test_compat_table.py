"""Every pair of kernels, and every capture for every kernel: the verdicts of the sources, and of real kexecs.

KH is kernel/kexec_handover.c (6.16 to 6.18) or kernel/liveupdate/kexec_handover.c, with lines of 6.17.8, 6.18.15,
6.19.11, 7.0, 7.1.13, 7.2.13 and 7.3.4. "run" is a kexec of QEMU between these two kernels (docs/compat.md).
"""

from __future__ import annotations

import pytest

import kho
from kho.handover.compat import Offer, Target, judge, worst
from kho.kernels import KERNELS, Release

import captures

SOURCES = {
    "same": "one series: no point release changes a format (6.18.5 = 6.18.15, 6.19.6 = 6.19.8, 7.1.8 = 7.1.13)",
    "bitmap": "PRESERVE_BITS: 512 bytes in 6.17 KH:64, a page in 6.18 KH:83, 6.19 KH:85, 7.0 KH:82; run",
    "less": "the same lines: 6.17 reads an eighth of each; 6.18.15 to 6.17.8 run: booted, kho_test lost",
    "root": "kho_populate: strcmp of the compatible, 6.19 KH:1483, 7.0 KH:1483, 7.1 KH:1657, 7.3 KH:1978; run",
    "flb": "luo_flb_setup_incoming, 7.0 luo_flb.c: a missing node is -ENOENT, luo_core.c:141 panics; run",
    "no luo": "6.18 has no kernel/liveupdate: the subtree LUO is not looked for, its memory stays reserved",
    "map": "6.18 KH:83, 6.19 KH:85, 7.0 KH:82: the same bitmaps; reserve_mem and kho_test are the same",
    "extra node": "6.19 luo_core.c:95-117 looks at luo-session only; 7.0 -> 6.19.11 run",
    "v4": "ABI/kexec_handover.h: 7.2.13 and 7.3.4 differ in the name of a constant; 7.2.13 -> 7.3.4 run",
    "run": "the same kernel, run: 6.19.11, 7.0, 7.1.13, 7.3.4",
}

TAKEN, COLD, DIES, PARTLY = "taken", "root refused", "map panics", "map lost"
# (from, to): what is not taken, and its source. 6.16 is as 6.17: KH differs in nothing that is handed over.
PAIRS: dict[tuple[str, str], tuple[str, str]] = {
    ("6.17", "6.17"): (TAKEN, "same"),
    ("6.17", "6.18"): (DIES, "bitmap"),
    ("6.17", "6.19"): (DIES, "bitmap"),
    ("6.17", "7.0"): (DIES, "bitmap"),
    ("6.17", "7.1"): (COLD, "root"),
    ("6.17", "7.2"): (COLD, "root"),
    ("6.17", "7.3"): (COLD, "root"),
    ("6.18", "6.17"): (PARTLY, "less"),
    ("6.18", "6.18"): (TAKEN, "same"),
    ("6.18", "6.19"): (TAKEN, "map"),
    ("6.18", "7.0"): (TAKEN, "map"),
    ("6.18", "7.1"): (COLD, "root"),
    ("6.18", "7.2"): (COLD, "root"),
    ("6.18", "7.3"): (COLD, "root"),
    ("6.19", "6.17"): (PARTLY, "less"),
    ("6.19", "6.18"): ("LUO lost", "no luo"),
    ("6.19", "6.19"): (TAKEN, "run"),
    ("6.19", "7.0"): ("LUO panics", "flb"),
    ("6.19", "7.1"): (COLD, "root"),
    ("6.19", "7.2"): (COLD, "root"),
    ("6.19", "7.3"): (COLD, "root"),
    ("7.0", "6.17"): (PARTLY, "less"),
    ("7.0", "6.18"): ("LUO lost", "no luo"),
    ("7.0", "6.19"): (TAKEN, "extra node"),
    ("7.0", "7.0"): (TAKEN, "run"),
    ("7.0", "7.1"): (COLD, "root"),
    ("7.0", "7.2"): (COLD, "root"),
    ("7.0", "7.3"): (COLD, "root"),
    ("7.1", "6.17"): (COLD, "root"),
    ("7.1", "6.18"): (COLD, "root"),
    ("7.1", "6.19"): (COLD, "root"),
    ("7.1", "7.0"): (COLD, "root"),
    ("7.1", "7.1"): (TAKEN, "run"),
    ("7.1", "7.2"): (COLD, "root"),
    ("7.1", "7.3"): (COLD, "root"),
    ("7.2", "6.17"): (COLD, "root"),
    ("7.2", "6.18"): (COLD, "root"),
    ("7.2", "6.19"): (COLD, "root"),
    ("7.2", "7.0"): (COLD, "root"),
    ("7.2", "7.1"): (COLD, "root"),
    ("7.2", "7.2"): (TAKEN, "same"),
    ("7.2", "7.3"): (TAKEN, "v4"),
    ("7.3", "6.17"): (COLD, "root"),
    ("7.3", "6.18"): (COLD, "root"),
    ("7.3", "6.19"): (COLD, "root"),
    ("7.3", "7.0"): (COLD, "root"),
    ("7.3", "7.1"): (COLD, "root"),
    ("7.3", "7.2"): (TAKEN, "v4"),
    ("7.3", "7.3"): (TAKEN, "run"),
}


def alike(name: str) -> str:
    """The kernel that a row of the table stands for: 6.16 is as 6.17."""
    return "6.17" if name == "6.16" else name


def missing(offer: Offer, release: str) -> str:
    """What is not taken, in the words of the table."""
    rows = [row for row in judge(offer, Target(Release.parse(release))) if row.verdict != "taken"]
    return ", ".join(f"{row.object} {row.verdict}" for row in rows) or TAKEN


def test_the_table_has_every_pair_and_names_a_source() -> None:
    names = {alike(name) for name in KERNELS}
    assert {*PAIRS} == {(old, new) for old in names for new in names}
    assert {source for _, source in PAIRS.values()} == {*SOURCES}


@pytest.mark.parametrize("new", KERNELS)
@pytest.mark.parametrize("old", KERNELS)
def test_a_pair_of_kernels_does_what_its_sources_and_runs_say(old: str, new: str) -> None:
    wanted, source = PAIRS[alike(old), alike(new)]
    assert missing(Offer.typical(KERNELS[old]), new) == wanted, SOURCES[source]


FLBS = "liveupdate-test-flb-v0", "liveupdate-test-flb-v1", "liveupdate-test-flb-v2"
DRIVER, GONE = (", ".join(f"FLB {name} {verdict}" for name in FLBS) for verdict in ("unknown", "lost"))
"""FLBs are taken if the next kernel has the test's driver; 6.19 has no FLBs."""

# Capture: the kernel that hands it over as far as its formats go, and what differs from the pair of kernels.
CAPTURES: dict[str, tuple[str, dict[str, str]]] = {
    # Linux 6.18.15 with the bitmaps of 6.16: its test lists folios as 6.18 does (lib/test_kho.c:84-89 of 6.17).
    "linux-6.16-layout-x86_64": ("6.17", {"6.17": "kho_test lost"}),
    "linux-6.18.15-x86_64": ("6.18", {}),
    "linux-7.0-layout-x86_64": ("7.0", {"6.19": GONE, "7.0": DRIVER}),
    "linux-7.1.13-x86_64": ("7.1", {"7.1": DRIVER}),
    "linux-7.3.4-x86_64": ("7.3", {"7.2": DRIVER, "7.3": DRIVER}),
    "linux-7.3.4-aarch64": ("7.3", {"7.2": DRIVER, "7.3": DRIVER}),
    "linux-7.3.4-aarch64-64k": ("7.3", {"7.2": DRIVER, "7.3": DRIVER}),
}


def test_every_capture_is_in_the_table() -> None:
    assert {*CAPTURES} == {*captures.NAMES}


@pytest.mark.parametrize("new", KERNELS)
@pytest.mark.parametrize("name", CAPTURES)
def test_every_capture_is_judged_for_every_kernel(name: str, new: str) -> None:
    old, special = CAPTURES[name]
    wanted, source = PAIRS[old, alike(new)]
    found = missing(Offer.of(kho.open(captures.elf(name))), new)
    assert found == special.get(alike(new), wanted), SOURCES[source]


def with_formats(old: str, **given: str | bool | dict[str, list[tuple[int, str]]]) -> Offer:
    """What a kernel writes, with other formats in it."""
    offer = Offer.typical(KERNELS[old])
    for name, value in given.items():
        setattr(offer, name, value)
    return offer


# Images that were converted or written by kho, given to real kernels: LINUX-7.0-BOOTED section 4, ABI-BY-VERSION.
WRITTEN = [
    (with_formats("7.0", flb_node=True), "6.19.11", TAKEN, "taken whole: it does not look at luo-flb"),
    (with_formats("6.19", flb_node=False), "7.0.11", "LUO panics", "panic, Unable to get FLB node [luo-flb]"),
    (with_formats("6.19", flb_node=True), "7.0.11", TAKEN, "an empty list put in by hand: taken"),
    (
        with_formats("7.1", sessions={"vm-1": [(1, "memfd-v1")]}),
        "7.1.13",
        "session vm-1, file 0x1 lost",
        "No registered handler for compatible 'memfd-v1', /dev/liveupdate: EIO",
    ),
    (with_formats("7.1", flb_node=False), "7.1.13", "LUO panics", "Unable to get FLB node [luo-flb]"),
    (with_formats("7.3", luo="luo-v1"), "7.3.4", "LUO panics", "LUO state is incompatible with 'luo-v5'"),
    (with_formats("7.1", luo="luo-v5"), "7.1.13", "LUO panics", "FDT 'LUO' is incompatible with 'luo-v1' [-4]"),
]


@pytest.mark.parametrize(("offer", "release", "wanted", "seen"), WRITTEN, ids=[row[3] for row in WRITTEN])
def test_images_are_judged_as_real_kernels_took_them(offer: Offer, release: str, wanted: str, seen: str) -> None:
    assert missing(offer, release) == wanted, seen


def test_kho_off_on_the_command_line_loses_luo_and_avoids_the_panic() -> None:
    """6.19.11 -> 7.0 with kho=off, run: it boots and revives reserve_mem; memfds and kho_test are lost."""
    target = Target(Release.parse("7.0"), None, "kho=off liveupdate=on reserve_mem=1M:4K:trace0")
    verdicts = {row.object: row.verdict for row in judge(Offer.typical(KERNELS["6.19"]), target)}
    assert verdicts["LUO"] == verdicts["kho_test"] == "lost"
    assert verdicts["reserve_mem trace0"] == "taken"
    assert "panics" not in verdicts.values()
    # liveupdate=off alone does not help (run).
    target = Target(Release.parse("7.0"), None, "kho=on liveupdate=off")
    assert worst(judge(Offer.typical(KERNELS["6.19"]), target)) == "panics"
