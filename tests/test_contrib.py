"""The pieces of contrib/ for other tools, held against these tools where they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import kho as package
from kho.doctor import examine
from kho.doctor.export import METRICS, prometheus, write_metrics
from kho.doctor.rules import RULES

from captures import DATA
from command import kho

ROOT = Path(__file__).parent.parent
CONTRIB = ROOT / "contrib"
HOSTS = DATA / "hosts"
DEFAULT = HOSTS / "default-scratch"


def run(
    *command: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **(env or {})}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=cwd, env=given)


def tool(name: str) -> str:
    """The path of a tool; the test is skipped without it."""
    installed = Path(sys.executable).with_name(name)
    found = shutil.which(name) or (str(installed) if installed.exists() else None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# The file of metrics


def test_metrics_are_written_to_a_file_that_is_replaced_at_once(tmp_path: Path) -> None:
    target = tmp_path / "kho.prom"
    done = kho("doctor", "--prometheus", target, DEFAULT)
    assert (done.code, done.out) == (1, "")
    assert target.read_text() == prometheus([examine(DEFAULT)])
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    first = target.stat().st_ino
    os.umask(os.umask(0o077) | 0)
    write_metrics("kho_active 0\n", target)
    assert target.stat().st_ino != first
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["kho.prom"]


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    done = kho("doctor", "--prometheus", tmp_path / "none/kho.prom", DEFAULT)
    assert (done.code, done.out) == (2, "")
    assert f"{tmp_path}/none/kho.prom: No such file or directory" in done.err
    taken = tmp_path / "kho.prom"
    (taken / "x").mkdir(parents=True)
    with pytest.raises(package.SourceError):
        write_metrics("", taken)
    assert [path.name for path in tmp_path.iterdir()] == ["kho.prom"]


def test_the_option_alone_prints_and_takes_no_directory_as_its_file() -> None:
    expected = prometheus([examine(DEFAULT)])
    assert kho("doctor", "--prometheus", DEFAULT).out == expected
    assert kho("doctor", DEFAULT, "--prometheus").out == expected
    assert kho("doctor", "--prometheus=-", DEFAULT).out == expected


def names(text: str) -> list[str]:
    """The series of a text of metrics, without values."""
    return [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]


def test_every_machine_has_every_metric() -> None:
    hosts = [path for path in sorted(HOSTS.iterdir()) if path.is_dir()]
    assert len(hosts) > 5
    for host in hosts:
        text = prometheus([examine(host)])
        found = {re.match(r"\w+", name)[0] for name in names(text)}  # type: ignore[index]
        assert found >= {name for name, _ in METRICS} - {"kho_scratch_node_bytes"}, host
        assert len([name for name in names(text) if name.startswith("kho_finding{")]) == len(RULES)
    off = prometheus([examine(HOSTS / "kho-off")])
    assert 'kho_finding{rule="DOC001",severity="warning"} 0' in off
    assert "kho_leftover_bytes 0" in off
    unknown = prometheus([examine(ROOT / "docs")])
    assert "kho_scratch_ratio NaN" in unknown


# Prometheus and Grafana


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\bkho_[a-z_]+\b", text))


def test_alerts_pass_promtool() -> None:
    promtool = tool("promtool")
    done = run(promtool, "check", "rules", CONTRIB / "prometheus/kho-alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 rules found" in done.stdout
    done = run(promtool, "test", "rules", "kho-alerts-test.yml", cwd=CONTRIB / "prometheus")
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_and_dashboard_name_metrics_that_there_are() -> None:
    known = {name for name, _ in METRICS}
    alerts = (CONTRIB / "prometheus/kho-alerts.yml").read_text()
    dashboard = json.loads((CONTRIB / "prometheus/kho-grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {name for line in re.findall(r"expr: (.*)", alerts) for name in metrics_in(line)} <= known
    assert {name for query in queries for name in metrics_in(query)} <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    verdicts = re.search(r'verdict=~"([^"]*)"', alerts)
    assert verdicts is not None
    source = (ROOT / "python/kho/doctor/report.py").read_text()
    assert all(verdict in source for verdict in verdicts[1].split("|"))
    page = (ROOT / "docs/monitoring.md").read_text()
    assert re.findall(r"alert: (\w+)", alerts) == re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)


# systemd, Kubernetes, Ansible


def test_units_pass_systemd_analyze(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    for name in ("kho-doctor.service", "kho-doctor.timer"):
        text = (CONTRIB / "systemd" / name).read_text()
        # Neither kho nor its manual is in /usr here.
        text = text.replace("/usr/bin/kho", sys.executable)
        (tmp_path / name).write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    done = run(analyze, "verify", *tmp_path.iterdir())
    ours = [line for line in done.stderr.splitlines() if "kho-doctor" in line]
    assert (done.returncode, ours) == (0, [])


def test_the_daemonset_is_as_the_schemas_of_kubernetes_say() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((CONTRIB / "kubernetes/kho-doctor.yml").read_text())
    validate.validate(found, "1.31", strict=True)
    found["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(Exception, match="comand"):
        validate.validate(found, "1.31", strict=True)


def test_the_fact_of_ansible_is_the_report(tmp_path: Path) -> None:
    fact = CONTRIB / "ansible/kho.fact"
    without = run("/bin/sh", fact, env={"PATH": str(tmp_path)})
    assert json.loads(without.stdout) == {"installed": False}
    command = tmp_path / "kho"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m kho "$@" {DEFAULT}\n')
    command.chmod(0o755)
    found = json.loads(run(fact, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}).stdout)
    assert found == {"installed": True, "report": kho("doctor", "--json", DEFAULT).json}
    command.write_text("#!/bin/sh\necho broken\nexit 2\n")
    broken = json.loads(run(fact, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}).stdout)
    assert broken == {"installed": True, "report": None}


def test_the_playbook_passes_ansible_lint() -> None:
    lint = tool("ansible-lint")
    folder = str(Path(lint).parent)
    done = run(
        lint, "--offline", "--profile", "production", "kho.yml", cwd=CONTRIB / "ansible",
        env={"PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# sos

SOS = """
from sos import SoS
import sys
args = ["report", "--batch", "--build", "-o", "kho", "--config-file", "/dev/null"]
SoS([*args, "--tmp-dir", sys.argv[1], "--sysroot", sys.argv[2]]).execute()
"""


def test_a_report_of_sos_says_what_its_machine_says(tmp_path: Path) -> None:
    if importlib.util.find_spec("sos") is None or importlib.util.find_spec("sos.report") is None:
        pytest.skip("sos is not installed")
    if os.geteuid() != 0:
        pytest.skip("sos needs root")
    import sos  # type: ignore[import-not-found,unused-ignore]

    installed = Path(str(sos.__file__)).parent
    shutil.copytree(installed, tmp_path / "lib/sos")
    shutil.copy(CONTRIB / "sos/kho.py", tmp_path / "lib/sos/report/plugins/kho.py")
    machine = tmp_path / "machine"
    shutil.copytree(DEFAULT, machine)
    (machine / "etc").mkdir(exist_ok=True)
    for name in ("debian_version", "os-release"):
        if Path("/etc", name).exists():
            shutil.copy(f"/etc/{name}", machine / "etc" / name)
    (tmp_path / "out").mkdir()
    done = run(
        sys.executable, "-W", "ignore", "-c", SOS, tmp_path / "out", machine, env={"PYTHONPATH": str(tmp_path / "lib")}
    )
    (report,) = (tmp_path / "out").glob("sosreport-*/") if done.returncode == 0 else [None]
    assert report is not None, done.stdout + done.stderr
    assert (report / "sys/kernel/debug/kho/out/fdt").read_bytes() == (
        DEFAULT / "sys/kernel/debug/kho/out/fdt"
    ).read_bytes()
    ours, theirs = examine(report), examine(DEFAULT)
    for name in ("state", "scratch", "scratch_how", "release", "ram", "by_node", "cmdline", "leftover"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [finding.id for finding in ours.findings] == [finding.id for finding in theirs.findings]
