"""Findings by release and by kernel message, and the machines that had a verdict before these rules: it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from kho.doctor import RULES, Report, examine
from kho.doctor.messages import MESSAGES, meaning_of, page, search
from kho.kernels import FIXES
from test_doctor_rules import live_update_on, memoryless, panicked, refused

from command import kho as run
from doctor_crash_hosts import LAYOUT, layout70, loads, say
from doctor_hosts import HOSTS, MIB, copied, edit, log, machine, write

DOCS = HOSTS.parents[2] / "docs"
VERDICTS = {
    "hosts/default-scratch": ("active", 1, {"DOC001"}, "KHO holds 192.0 MiB (9.6 % of RAM)"),
    "hosts/hugepages": ("active", 1, {"DOC001"}, "KHO holds 192.0 MiB (9.6 % of RAM)"),
    "hosts/kho-off": ("off", 0, set(), "KHO is off (kho=off on the command line) and holds nothing."),
    "hosts/scratch-too-big": ("failed", 1, {"DOC003", "DOC004"}, "KHO could not reserve"),
    "hosts/systemd-kexec": ("active", 1, {"DOC001", "DOC002", "DOC043"}, "KHO holds 384.0 MiB (25.9 % of RAM)"),
    "linux-7.0-layout-x86_64/host/stage1": ("active", 1, {"DOC001", "DOC002", "DOC019"}, "KHO holds 104.0 MiB"),
    "linux-7.0-layout-x86_64/host/stage2": ("active", 1, {"DOC001", "DOC002"}, "KHO holds 104.0 MiB"),
    "linux-7.1.13-x86_64/host/stage1": ("active", 1, {"DOC001", "DOC002"}, "KHO holds"),
    "linux-7.1.13-x86_64/host/stage2": ("active", 1, {"DOC001", "DOC002"}, "KHO holds"),
}
"""State, exit code, errors and warnings of the captured machines, as they were before DOC026."""


def ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings}


@pytest.mark.parametrize("name", VERDICTS)
def test_captured_machines_keep_their_verdict(name: str) -> None:
    state, code, loud, headline = VERDICTS[name]
    report = examine(HOSTS.parent / name)
    assert (report.state, report.exit_code) == (state, code)
    assert {i for i in ids(report) if RULES[i].severity != "note"} == loud
    assert report.headline.startswith(headline)


@pytest.mark.parametrize(
    ("release", "certainty"),
    [("6.19.0", "certain"), ("6.19.8", "certain"), ("6.19.0-5-generic", "likely"), ("6.19.9", None), ("7.0.0", None)],
)
def test_memfds_that_lose_pages_are_a_matter_of_the_release(
    release: str, certainty: str | None, tmp_path: Path
) -> None:
    report = examine(live_update_on(release)(tmp_path))
    found = [finding for finding in report.findings if finding.id == "DOC033"]
    assert [finding.certainty for finding in found] == ([certainty] if certainty else [])
    assert all("6.19.9" in finding.value for finding in found)
    assert "DOC033" not in ids(examine(machine(tmp_path / "b", scratch=(64 * MIB,), release=release, cmdline="kho=on")))


@pytest.mark.parametrize(
    ("release", "short"), [("7.0.10", True), ("6.19.11", True), ("7.0.11", False), ("7.3.4", False)]
)
def test_a_folio_that_was_not_restored_makes_a_short_file_or_an_error(
    release: str, short: bool, tmp_path: Path
) -> None:
    tree = say(layout70(tmp_path, release=release), "memfd_luo: Unable to restore folio at physical address: 15f0000")
    [found] = [finding for finding in examine(tree).findings if finding.id == "DOC034"]
    assert ("with a short file" in found.value) == short
    assert ("7.0.11" in found.value) == short


@pytest.mark.parametrize(
    ("release", "there"), [("6.16.1", True), ("6.18.15", True), ("6.19.6", False), ("7.0.0", False)]
)
def test_a_memoryless_node_explains_the_failure_to_6_19_5(release: str, there: bool, tmp_path: Path) -> None:
    report = examine(memoryless(tmp_path, release))
    assert ("DOC036" in ids(report)) == there
    assert "DOC003" in ids(report)


@pytest.mark.parametrize(
    ("release", "harmless"),
    [
        ("6.16.3", True),
        ("6.17.3", True),
        ("6.17.0-14-generic", True),
        ("6.17.4", False),
        ("6.18.1", False),
        ("7.0.3", False),
    ],
)
def test_an_empty_handover_is_harmless_where_it_was_never_finalized(
    release: str, harmless: bool, tmp_path: Path
) -> None:
    report = examine(refused(tmp_path, release))
    assert ("DOC037" in ids(report), "DOC018" in ids(report)) == (harmless, not harmless)


def test_an_upgrade_by_kexec_that_panics_is_named_with_what_avoids_it(tmp_path: Path) -> None:
    [found] = [f for f in examine(live_update_on("6.19.11")(tmp_path)).findings if f.id == "DOC038"]
    assert found.certainty == "certain"
    assert "kho=off on the 7.0 kernel's line" in found.value
    assert "reserve_mem is kept" in found.value
    for release in ("7.0.9", "6.18.15"):
        assert "DOC038" not in ids(examine(live_update_on(release)(tmp_path / release)))
    assert "DOC038" not in ids(
        examine(machine(tmp_path / "off", scratch=(64 * MIB,), release="6.19.11", cmdline="kho=on"))
    )


def test_luo_data_with_the_node_is_no_trap() -> None:
    """The captured machine calls itself 6.19.11-kho70, but has 7.0's LUO code: its LUO FDT has luo-flb."""
    assert "DOC038" not in ids(examine(LAYOUT / "stage1"))


def test_the_log_of_a_panic_names_the_remedy(tmp_path: Path) -> None:
    [found] = [f for f in examine(panicked(tmp_path)).findings if f.id == "DOC039"]
    assert "kho=off" in found.value
    assert any("luo-flb" in seen.text for seen in found.evidence)


def test_inherited_scratch_comes_back_at_the_next_kexec_or_cold_boot(tmp_path: Path) -> None:
    report = examine(layout70(tmp_path, stage=2, cmdline="kho=off"))
    [found] = [f for f in report.findings if f.id == "DOC001"]
    assert "kho=off frees it at the next kexec or cold boot" in found.value


@pytest.mark.parametrize(
    ("mounts", "said"),
    [
        ("tmpfs /dev/shm tmpfs rw,nosuid,nodev,size=700000k,inode64 0 0\n", "/dev/shm has 683.6 MiB"),
        ("tmpfs /run tmpfs rw,size=300000k,mode=755 0 0\n", "/run has 293.0 MiB"),
        ("tmpfs /dev/shm tmpfs rw,nosuid,nodev,inode64 0 0\n", None),
        ("tmpfs /dev/shm tmpfs rw,size=1020000k 0 0\n", None),
        ("tmpfs /dev/shm tmpfs rw,size=65536k 0 0\n", None),
        ("tmpfs /srv/cache tmpfs rw,size=700000k 0 0\n", None),
    ],
)
def test_a_tmpfs_that_stayed_small_after_a_handover_is_named(mounts: str, said: str | None, tmp_path: Path) -> None:
    tree = copied("no-crash-kernel", tmp_path)
    [amount] = [line for line in (tree / "proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")]
    edit(tree, "proc/meminfo", (amount, "MemTotal:        2048000 kB"))
    write(tree, "proc/mounts", "proc /proc proc rw 0 0\n" + mounts)
    [found] = [f for f in examine(tree).findings if f.id == "DOC017"]
    assert ("waited to be retrieved" in found.value) == (said is not None)
    assert said is None or said in found.value
    assert any("tmpfs" in seen.text for seen in found.evidence) == (said is not None)


# What makes a finding certain

SEEN = {
    "DOC026": {"6.19.6", "6.19.8", "6.19.11", "7.0.9"},
    "DOC027": {"6.19.6", "6.19.8", "6.19.11", "7.0.9"},
    "DOC032": {"6.16.1", "6.17.8", "6.18.15", "6.19.11", "7.0.9", "7.1.3"},
    "DOC033": {"6.19.6", "6.19.8"},
    "DOC035": {"6.19.6", "6.19.8", "6.19.11", "7.0.9", "7.0.11", "7.1.3"},
    "DOC037": {"6.16.1", "6.17.3"},
    "DOC038": {"6.17.3", "6.17.8", "6.19.6", "6.19.8", "6.19.11"},
}
"""Releases in which a run showed the fault, or a source that was read has it, by rule; docs/doctor has the evidence.

6.16 and the point releases before a fix are those of the sources that the pages name.
"""
RELEASES: tuple[str, ...] = (
    "6.16.1",
    "6.17.3",
    "6.17.8",
    "6.18.15",
    "6.18.42",
    "6.19.6",
    "6.19.8",
    "6.19.11",
    "7.0.9",
    "7.0.11",
)
RELEASES += ("7.1.3", "7.1.13", "7.2.13", "7.3.4")


def everything(at: Path, release: str) -> Report:
    """A machine that gives each rule by release its occasion."""
    tree = layout70(at, release=release, finalize="1", cmdline="crashkernel=16M liveupdate=on kho_scratch=17M,64M,16M")
    write(tree, "proc/misc", "125 liveupdate\n")
    for name in ("scratch_len", "scratch_phys", "sub_fdts/LUO"):
        (tree / "sys/kernel/debug/kho/out" / name).unlink(missing_ok=True)
    loads(tree, kho=True)
    return examine(say(tree, "KHO: setup: handover FDT (0x10116b000) is invalid: -9"))


@pytest.mark.parametrize("release", RELEASES)
def test_certain_is_only_what_a_run_or_a_source_shows_for_that_release(release: str, tmp_path: Path) -> None:
    report = everything(tmp_path / "a", release)
    certain = {f.id for f in report.findings if f.id in SEEN and f.certainty == "certain"}
    assert certain <= {rule_id for rule_id, releases in SEEN.items() if release in releases}
    if release in ("7.0.9", "6.19.11"):
        assert {"DOC026", "DOC027", "DOC035"} <= certain, "the machine gives them their occasion"
    vendor = everything(tmp_path / "b", f"{release}-7-generic")
    assert not {f.id for f in vendor.findings if f.id in SEEN and f.certainty == "certain"}, "its level is unknown"


@pytest.mark.parametrize("release", RELEASES)
def test_no_claim_without_its_line(release: str, tmp_path: Path) -> None:
    for finding in everything(tmp_path, release).findings:
        assert finding.evidence, finding.id
        assert all(seen.file and seen.text for seen in finding.evidence), finding.id


def test_freed_memory_of_the_incoming_luo_is_not_decoded() -> None:
    report = examine(HOSTS / "no-crash-kernel")
    [found] = [f for f in report.findings if f.id == "DOC022"]
    assert "incoming: not decoded" in found.value


@pytest.mark.parametrize("meaning", MESSAGES, ids=[meaning.wording[:50] for meaning in MESSAGES])
def test_every_message_is_found_under_its_wording(meaning: object, tmp_path: Path) -> None:
    wording = meaning.wording  # type: ignore[attr-defined]
    said = wording.replace("%%", "200%").replace("%", "7")
    assert meaning_of(said) == meaning
    assert search(f"[    0.000000] {said}") == [meaning]
    assert f"## `{wording}`" in (DOCS / "messages.md").read_text()
    done = run("doctor", "--explain", said)
    assert done.code == 0
    assert wording in done.out


def test_the_page_of_messages_is_up_to_date_and_names_rules_that_exist() -> None:
    assert (DOCS / "messages.md").read_text() == page(), "run make docs"
    assert {meaning.rule for meaning in MESSAGES if meaning.rule} <= set(RULES)
    assert not [meaning.wording for meaning in MESSAGES if meaning.rule and meaning.bad]


@pytest.mark.parametrize("said", [meaning.wording for meaning in MESSAGES if meaning.bad])
def test_a_message_of_a_fault_is_a_finding(said: str, tmp_path: Path) -> None:
    text = said.replace("%", "7")
    report = examine(log(machine(tmp_path, scratch=(64 * MIB,)), text))
    [found] = [f for f in report.findings if f.id == "DOC040"]
    assert found.evidence[0].text.startswith(text[:20])


def test_messages_of_a_boot_without_faults_are_no_finding() -> None:
    for host in (HOSTS / "default-scratch", HOSTS / "no-crash-kernel", LAYOUT / "stage2"):
        assert "DOC040" not in ids(examine(host))


def test_an_unknown_message_is_an_error() -> None:
    done = run("doctor", "--explain", "no such \x1b[31m message")
    assert done.code == 2
    assert "\x1b" not in done.err


def test_each_finding_by_release_names_the_release_that_mends_it(tmp_path: Path) -> None:
    report = examine(live_update_on("7.0.3")(tmp_path))
    [found] = [f for f in report.findings if f.id == "DOC035"]
    assert FIXES["retrieve-partial"].remedied() in found.value
    edit(tmp_path, "proc/sys/kernel/osrelease", ("7.0.3", "7.3.4"))
    assert "DOC035" not in ids(examine(tmp_path))
    write(tmp_path, "proc/sys/kernel/osrelease", "not a release\n")
    assert "DOC035" not in ids(examine(tmp_path))
