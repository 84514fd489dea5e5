"""The command `kho doctor`: text, JSON, CSV, Prometheus, --what-if, machines without KHO, and the cost of starting."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kho import errors
from kho.doctor import RULES, Report, WhatIf, bootline, examine, what_if
from kho.doctor.export import COLUMNS, METRICS, prometheus, row

from command import kho, process
from doctor_hosts import HOSTS, MIB, copied, log, machine, write

TREES = [HOSTS / name for name in ("default-scratch", "hugepages", "kho-off", "scratch-too-big")]
DEFAULT = HOSTS / "default-scratch"


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
def test_the_headline_comes_first_then_the_findings_with_evidence(tree: Path) -> None:
    report = examine(tree)
    done = kho("doctor", tree)
    assert (done.code, done.err) == (report.exit_code, "")
    assert done.out.startswith(report.headline + "\n")
    for finding in report.findings:
        assert f"{finding.severity} {finding.id}: {finding.title}" in done.out
        assert finding.value in done.out
        assert "\x1b" not in done.out
    assert ("/etc/default/grub" in done.out) == (report.exit_code == 1)


def test_json_equals_the_report_of_examine() -> None:
    done = kho("doctor", "--json", DEFAULT)
    assert done.code == 1
    assert done.json == {"schema": "kho-doctor-1"} | json.loads(json.dumps(examine(DEFAULT).to_dict()))
    several = kho("doctor", "--json", *TREES)
    assert [report["exit_code"] for report in several.json["reports"]] == [1, 1, 0, 1]


def test_every_field_of_json_and_column_of_csv_is_documented() -> None:
    page = (HOSTS.parents[2] / "docs/doctor.md").read_text()
    table = page.split("| field | what |")[1].split("\n\n")[0]
    data = kho("doctor", "--json", "--what-if", "kho=off", DEFAULT).json
    assert set(data) == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    inner = {*data["findings"][0], *data["findings"][0]["evidence"][0], *data["areas"][0], *data["preserved"][0]}
    assert inner | set(data["what_if"]) - {"parameters", "headline"} <= set(re.findall(r"`(\w+)`", table))
    columns = page.split("`--csv` has a row for each directory: ")[1].split(".")[0]
    assert tuple(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", columns))) == COLUMNS


def test_several_trees_are_printed_as_a_table() -> None:
    done = kho("doctor", *TREES)
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0].split() == ["tree", "kernel", "state", "held", "of", "RAM", "leftover", "findings"]
    assert re.fullmatch(r"\S+/default-scratch +7\.3\.4 +active +192.0 MiB +9\.6 % +DOC001", lines[1])
    assert re.fullmatch(r"\S+/kho-off +7\.3\.4 +off +0 B +-", lines[3])
    assert lines[4].endswith("64.0 MiB  DOC003 DOC004")


def test_csv_has_a_row_for_each_tree(tmp_path: Path) -> None:
    done = kho("doctor", "--csv", *TREES, tmp_path)
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.code == 2, "the state of one of them is unknown"
    assert [r["state"] for r in rows] == ["active", "active", "off", "failed", "unknown"]
    assert tuple(rows[0]) == COLUMNS
    assert int(rows[0]["scratch"]) == 0x6400000 + 0x5C00000
    assert int(rows[3]["leftover"]) == 64 * MIB
    assert rows[0] == {k: "" if v is None else str(v) for k, v in row(examine(TREES[0])).items()}


NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? (NaN|[+-]?Inf|[+-]?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)")


def samples(text: str) -> dict[str, list[tuple[str, str]]]:
    """Parse the text format as strictly as `promtool check metrics` does.

    HELP and TYPE appear once, in this order, directly before the samples of their metric. No series appears twice.
    Names and escapes of labels are valid. Metric names follow the conventions that promtool checks.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    current, typed, series = "", "", set()
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, current, about = line.split(" ", 3)
            assert re.fullmatch(NAME, current)
            assert not current.endswith(("_total", "_count", "_sum", "_bucket", "_info")), (
                "these suffixes are not for gauges"
            )
            assert re.fullmatch(r"(?:[^\\]|\\\\|\\n)+", about)
            assert current not in found
            found[current] = []
        elif line.startswith("# TYPE "):
            assert line == f"# TYPE {current} gauge"
            assert typed != current
            typed = current
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match[1] == current == typed
            labels = LABEL.findall(match[2] or "")
            assert "".join(m[0] for m in LABEL.finditer(match[2] or "")) == (match[2] or ""), line
            names = [name for name, _ in labels]
            assert len(set(names)) == len(names)
            assert not any(name.startswith("__") for name in names)
            assert (current, frozenset(labels)) not in series, "a series appears once"
            series.add((current, frozenset(labels)))
            found[current].append((match[2] or "", match[3]))
    return found


def test_the_metrics_are_valid_prometheus_text() -> None:
    done = kho("doctor", "--prometheus", DEFAULT)
    found = samples(done.out)
    assert set(found) == {name for name, _ in METRICS}
    assert found["kho_scratch_bytes"] == [('how="exact"', str(0x6400000 + 0x5C00000))]
    assert found["kho_scratch_node_bytes"] == [('node="0"', str(0x6400000 + 0x5C00000))]
    assert ('rule="DOC001",severity="warning"', "1") in found["kho_finding"]
    assert found["kho_active"] == [("", "1")]


def test_labels_are_escaped(tmp_path: Path) -> None:
    odd = tmp_path / 'a "b" \\c'
    odd.mkdir()
    found = samples(prometheus([examine(odd), examine(DEFAULT)]))
    assert f'root="{tmp_path}/a \\"b\\" \\\\c"' in [labels for labels, _ in found["kho_active"]]
    assert ("NaN" in dict(found["kho_active"]).values()) is True


def test_a_tree_that_is_named_twice_gives_each_series_once() -> None:
    assert samples(kho("doctor", "--prometheus", DEFAULT, DEFAULT).out) == samples(
        kho("doctor", "--prometheus", DEFAULT).out
    )
    assert len(samples(kho("doctor", "--prometheus", *TREES).out)["kho_active"]) == len(TREES)


@pytest.mark.parametrize(
    "broken",
    ['x{a="1",a="2"} 1', 'x{a="\\t"} 1', "x{a=1} 1", 'x{__a="1"} 1', "x 1\nx 2", "x 1,5", "y 1", 'x{a="1"}1', "x  1"],
)
def test_the_metrics_parser_of_this_test_rejects_malformed_text(broken: str) -> None:
    with pytest.raises(AssertionError):
        samples(f"# HELP x about\n# TYPE x gauge\n{broken}\n")


@pytest.mark.parametrize("rule_id", list(RULES))
def test_explain_prints_every_rule(rule_id: str) -> None:
    done = kho("doctor", "--explain", rule_id)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{rule_id} ({RULES[rule_id].severity}): {RULES[rule_id].title}\n\n")
    assert RULES[rule_id].case in done.out


def test_explain_ignores_case_and_list_has_every_rule() -> None:
    done = kho("doctor", "--explain", "doc003")
    assert done.out.startswith("DOC003 (error): reservation failed, KHO disabled itself\n\n")
    for part in ("Why it matters", "What to do", "Real case", "Source"):
        assert f"\n\n{part}: " in done.out
    assert kho("doctor", "--explain", "DOC999").code == 2
    assert [line.split()[0] for line in kho("doctor", "--list").out.splitlines()] == list(RULES)
    assert [rule["id"] for rule in kho("doctor", "--list", "--json").json["rules"]] == list(RULES)


@pytest.mark.parametrize(
    "args",
    [
        ("--json", "--csv", DEFAULT),
        ("--what-if", "kho=off", "--csv", DEFAULT),
        ("--what-if", "quiet", DEFAULT),
        ("--what-if", "", DEFAULT),
        ("nowhere",),
    ],
)
def test_bad_input_exits_with_2(args: tuple[object, ...]) -> None:
    done = kho("doctor", *args)
    assert (done.code, done.out) == (2, "")
    assert done.err


def ask(parameters: str, tree: Path = DEFAULT) -> WhatIf:
    return what_if(examine(tree), parameters)


def test_what_if_kho_is_off() -> None:
    found = ask("kho=off")
    assert (found.then, found.gain, found.exact, found.fits) == (0, 0x6400000 + 0x5C00000, True, True)
    assert found.headline == "kho=off: scratch of 0 B, gains 192.0 MiB compared with now."
    assert ask("kho=off", HOSTS / "scratch-too-big").gain == 64 * MIB
    assert ask("kho=off", HOSTS / "kho-off").gain == 0


def test_what_if_sizes_are_given() -> None:
    found = ask("kho_scratch=64M,256M,64M")
    assert (found.sizes, found.then, found.exact) == ([64 * MIB, 256 * MIB, 64 * MIB], 384 * MIB, True)
    assert found.gain == 192 * MIB - 384 * MIB, "a negative gain is a cost"
    assert "costs 192.0 MiB" in found.headline
    assert ask("kho_scratch=1,1,1").sizes == [4 * MIB] * 3, "rounded up to the buddy allocator's largest block"
    small = ask("kho_scratch=16M,16M,8M")
    assert (small.gain, small.accepted) == (152 * MIB, True)
    assert any("too small for a handover" in note for note in small.notes)


def test_what_if_counts_pernode_for_each_node(tmp_path: Path) -> None:
    nodes = (4096 * MIB, 4096 * MIB, 1024 * MIB)
    tree = machine(tmp_path, nodes=nodes, page=4096, scratch=(64 * MIB, 64 * MIB, 64 * MIB))
    assert ask("kho_scratch=16M,16M,64M", tree).then == (32 + 3 * 64) * MIB
    over = ask("kho_scratch=16M,16M,2G", tree)
    assert (over.fits, over.notes) == (False, ["PERNODE exceeds the memory of node 2"])


@pytest.mark.parametrize("percent", [100, 200, 400])
def test_what_if_the_percentage_is_different(percent: int) -> None:
    found = ask(f"kho_scratch={percent}%")
    assert found.then == 192 * MIB * percent // 200
    assert found.exact is (percent == 200)


def test_what_if_keeps_the_parameter_that_is_not_given(tmp_path: Path) -> None:
    found = ask("kho=on", HOSTS / "scratch-too-big")
    assert (found.then, found.fits) == (0x4000000 + 0xC0000000 + 0x4000000, False)
    assert any("kho_scratch=64M,3G,64M stays on the boot line" in note for note in found.notes)
    assert ask("kho=on kho_scratch=64M,64M,64M", HOSTS / "scratch-too-big").fits
    rejected = ask("kho=on", machine(tmp_path, scratch=(64 * MIB,), cmdline="kho=on kho_scratch=512M"))
    assert rejected.then == 64 * MIB, "a rejected value has no effect"


def test_what_if_kho_is_on_is_an_estimate() -> None:
    found = ask("kho=on", HOSTS / "kho-off")
    assert found.then is not None
    assert abs(found.then - 192 * MIB) < 8 * MIB, "the scratch of the same machine with KHO on"
    assert not found.exact


@pytest.mark.parametrize(
    "parameters", ["kho_scratch=512M", "kho_scratch=1.5G,1G,1G", "kho=auto", "kho", "kho_scratch="]
)
def test_what_if_reports_rejected_parameters(parameters: str) -> None:
    found = ask(parameters)
    assert not found.accepted
    assert "would not accept it" in found.headline
    assert kho("doctor", "--what-if", parameters, DEFAULT).code == 1


def test_what_if_reports_sizes_that_do_not_fit() -> None:
    found = ask("kho_scratch=64M,3G,64M")
    assert (found.accepted, found.fits) == (True, False)
    assert "disable itself" in found.headline
    assert ask("kho_scratch=5G,0,0").fits is False


def test_what_if_notes_octal_sizes() -> None:
    assert "064M is octal: 52.0 MiB" in ask("kho_scratch=064M,64M,64M").notes


def test_what_if_lists_what_is_unknown(tmp_path: Path) -> None:
    nothing = ask("kho=on", tmp_path)
    assert nothing.then is None
    assert {"how much scratch there is now", "the size of RAM, and how much the kernel reserves at boot"} <= set(
        nothing.unknown
    )
    assert nothing.headline == "kho=on: the size of scratch cannot be predicted."
    ram = ask("kho=on", machine(tmp_path / "m", nodes=(6400 * MIB,), cmdline="quiet"))
    assert ram.then == 400 * MIB
    assert ram.unknown
    done = kho("doctor", "--what-if", "kho=on", tmp_path)
    assert "unknown: how much scratch there is now" in done.out


def test_what_if_notes_that_inherited_areas_need_a_cold_boot(tmp_path: Path) -> None:
    tree = log(machine(tmp_path, scratch=(64 * MIB,), counted=False), "KHO: found kexec handover data.")
    assert any("cold boot" in note for note in ask("kho_scratch=1M,1M,1M", tree).notes)


def test_what_if_accepts_both_parameters() -> None:
    off = ask("kho=off kho_scratch=64M,64M,64M")
    assert off.then == 0
    assert ask("kho=on kho_scratch=64M,64M,64M", HOSTS / "kho-off").then == 192 * MIB
    data = kho("doctor", "--json", "--what-if", "kho=off", DEFAULT).json["what_if"]
    assert (data["gain"], data["accepted"]) == (192 * MIB, True)


def test_the_edit_of_the_boot_line_is_printed_for_the_detected_loader(tmp_path: Path) -> None:
    assert set(bootline.edits("kho=off")) == {"grub", "systemd-boot", "rpi", "cloud"}
    places = {
        "boot/firmware/cmdline.txt": "rpi",
        "etc/default/grub": "grub",
        "boot/loader/loader.conf": "systemd-boot",
        "etc/default/grub.d/50-cloudimg-settings.cfg": "cloud",
    }
    for i, (place, name) in enumerate(places.items()):
        tree = copied("default-scratch", tmp_path / str(i))
        report = examine(write(tree, place, "root=/dev/sda1\n"))
        assert report.platforms == [name]
        assert list(bootline.edits("kho=off", report.platforms)) == [name]
        before = (tree / place).read_bytes()
        out = kho("doctor", tree).out
        assert bootline.PLATFORMS[name] in out
        assert out.count("update-grub") == (name in ("grub", "cloud"))
        assert (tree / place).read_bytes() == before, "printed, never applied"


def test_the_printed_line_for_cloud_images_is_valid_shell(tmp_path: Path) -> None:
    step = bootline.edits("kho=on kho_scratch=64M,256M,64M", ["cloud"])["cloud"][0]
    target = tmp_path / "99-kho.cfg"
    subprocess.run(["sh", "-c", step.replace("/etc/default/grub.d/99-kho.cfg", str(target))], check=True)
    script = f'GRUB_CMDLINE_LINUX_DEFAULT="quiet"; . {target}; echo "$GRUB_CMDLINE_LINUX_DEFAULT"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "quiet kho=on kho_scratch=64M,256M,64M\n"


def test_the_machine_of_the_test_gets_a_headline() -> None:
    done = process("doctor")
    assert done.code in (0, 1, 2)
    assert done.err == ""
    assert done.out.split("\n")[0].startswith(("KHO ", "Cannot determine ", "This system is not Linux"))


def test_a_system_other_than_linux_gets_a_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    done = kho("doctor")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("This system is not Linux (darwin)")
    assert kho("doctor", "--json").json["state"] == "absent"
    assert kho("doctor", DEFAULT).code == 1, "snapshots can be examined anywhere"


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({}, 2, "there is no proc/meminfo, no kernel log and no command line"),
        ({"proc/cmdline": "quiet\n"}, 2, "there is no proc/meminfo with CmaTotal and CmaFree"),
        ({"proc/cmdline": "kho=off\n"}, 0, "KHO is off"),
        (
            {"proc/meminfo": "MemTotal: 9 kB\nPercpu: 0 kB\nHugePages_Total: 0\n"},
            0,
            "it has no CMA, which KHO requires",
        ),
        ({"proc/version": "Linux version 6.1.0-42 (x)\n"}, 0, "Linux 6.1.0-42 is older than 6.16"),
        ({"proc/meminfo": "MemTotal: 9 kB\nCmaTotal: 0 kB\nCmaFree: 0 kB\n"}, 0, "KHO is off"),
        ({"proc/meminfo": "MemTotal: 9 kB\nCmaTotal: 0 kB\nCmaFree: 0 kB\n", "proc/cmdline": "kho=on\n"}, 2, "in use"),
    ],
)
def test_headline_and_exit_code_with_few_files(files: dict[str, str], code: int, said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    done = kho("doctor", tmp_path)
    assert (done.code, done.err) == (code, "")
    assert said in done.out.split("\n")[0]


def test_an_unreadable_kmsg_is_listed_as_unread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kho.doctor.tree.os.path.realpath", lambda path: "/")
    for refusal in (PermissionError(1, "Operation not permitted"), FileNotFoundError(2, "No such file or directory")):
        opened = __import__("os").open

        def refused(path: object, *args: int, error: OSError = refusal, real: object = opened) -> int:
            if path == "/dev/kmsg":
                raise error
            return real(path, *args)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr("kho.doctor.reading.os.open", refused)
        report = examine(copied("kho-off", tmp_path / type(refusal).__name__))
        assert "dev/kmsg" in {entry.file for entry in report.unread}
        assert report.state == "off"
        monkeypatch.undo()
        monkeypatch.setattr("kho.doctor.tree.os.path.realpath", lambda path: "/")


HEAVY = ("numpy", "rich", "dask", "matplotlib", *(f"kho.handover.{name}" for name in ("verify", "memmap", "diff")))


def test_the_command_imports_no_heavy_module() -> None:
    assert all(find_spec(name) for name in HEAVY if name.startswith("kho.")), "these modules exist"
    script = (
        "import sys; sys.argv = ['kho', 'doctor']\n"
        "from kho import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "others = {name for name in sys.modules if name.startswith('kho.cli.')}\n"
        "others -= {'kho.cli.doctor', 'kho.cli.fleet_options', 'kho.cli.output'}\n"
        f"print(sorted(({set(HEAVY)} & set(sys.modules)) | others), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "[]\n"


COUNTED = """
import sys
counts = {"calls": 0, "files": 0}

def audit(event, args):
    counts["files"] += event == "open"

def profile(frame, event, arg):
    counts["calls"] += event in ("call", "c_call")

sys.argv = sys.argv[1:]
sys.addaudithook(audit)
sys.setprofile(profile)
from kho import cli
try:
    cli.main()
except SystemExit:
    pass
sys.setprofile(None)
print(counts["calls"], counts["files"], len(sys.modules), file=sys.stderr)
"""


def test_starting_takes_few_calls_and_modules(tmp_path: Path) -> None:
    """Counts instead of seconds, which depend on the load of the machine.

    On Python 3.11, with compiled modules as in an installed package: 168,000 calls (0.1 s), 111 opened files, 159
    modules. Importing numpy would add 145,000 calls.
    """
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", COUNTED, "kho", "doctor", str(DEFAULT)]
    subprocess.run(command, capture_output=True, timeout=60, env=env, check=True)  # compiles the modules
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=True)
    assert done.stdout.startswith("KHO holds")
    calls, files, modules = map(int, done.stderr.split())
    assert calls < 250_000
    assert files < 180
    assert modules < 220


def test_help_lists_every_command_although_they_load_lazily() -> None:
    done = process("--help")
    for name in ("doctor", "inspect", "map", "verify", "convert"):
        assert re.search(rf"^  {name} +\w", done.out, re.MULTILINE), name
    assert process("no-such-command").code == 2


def test_the_command_writes_no_file(tmp_path: Path) -> None:
    tree = copied("scratch-too-big", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    kho("doctor", tree)
    kho("doctor", "--what-if", "kho=off", tree)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before
    shutil.rmtree(tree)


def test_an_empty_report_can_be_printed() -> None:
    report = Report("x")
    assert report.exit_code == 2
    assert row(report)["share"] is None
    assert samples(prometheus([report]))["kho_active"] == [("", "NaN")]
    with pytest.raises(errors.ParameterError, match="no parameters are given"):
        what_if(report, " ")
