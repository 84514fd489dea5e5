"""Many sources on a cluster: each source gets a row, even if workers, files or the run fail."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import kho
from kho import fleet
from kho.cli import output

import captures
import hostile
from command import kho as run

distributed = pytest.importorskip("distributed")
pq = pytest.importorskip("pyarrow.parquet")
psutil = pytest.importorskip("psutil")

SNAPSHOTS = 2000
PAGE = 4096


# Substitutes for the work of a command on a source; workers import them.


def examined(root: str) -> dict[str, Any]:
    """The row of `kho doctor`, and the process that computed it."""
    return {**fleet.doctor_row(root), "pid": os.getpid()}


def moody(source: str) -> dict[str, Any]:
    """The behavior is selected by the name of the source."""
    name = Path(source).name
    if name == "deadly" or (name == "deadly once" and not Path(source, "been").exists()):
        Path(source, "been").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "broken":
        raise ZeroDivisionError("a bug")
    if name == "gone":
        raise FileNotFoundError(2, "no such file", source)
    if name == "refused":
        raise kho.NoHandoverError("no handover")
    return {"headline": name, "scratch": 1 << 70 if name == "huge" else 1, "ids": listening()}


def listening() -> list[str]:
    """The addresses on which this process and its parent listen."""
    here = psutil.Process()
    found = [c.laddr.ip for p in (here, here.parent()) for c in p.net_connections() if c.status == "LISTEN"]
    return sorted(set(found))


def slow(source: str) -> dict[str, Any]:
    time.sleep(0.05)
    return {}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Directories of many machines, with the number of scratch bytes of each."""
    folder = tmp_path_factory.mktemp("snapshots")
    held = {}
    for i in range(SNAPSHOTS):
        root = folder / f"host-{i:04}"
        (root / "proc").mkdir(parents=True)
        mib = 0 if i % 10 == 3 else 2 + i % 200 * 2
        cma = f"CmaTotal: 65536 kB\nCmaFree: {65536 + (mib << 10)} kB\n"
        (root / "proc/meminfo").write_text(f"MemTotal: {2 << 20} kB\nMemFree: {1 << 20} kB\n{cma}")
        (root / "proc/cmdline").write_text("quiet kho=on\n" if mib else "quiet kho=off\n")
        held[str(root)] = mib << 20
    return held


@pytest.fixture(scope="module")
def there() -> Iterator[str]:
    """The address of a scheduler with two workers."""
    with cluster(2) as made:
        yield made.scheduler_address


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[Any]:
    """A Dask cluster that was started independently."""
    with distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        dashboard_address=None,
        scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        silence_logs=51,
    ) as made:
        yield made


def after(rows: int, act: Callable[[], object]) -> Callable[[int], None]:
    """A progress callback that calls `act` once, when `rows` rows are done."""
    left = [act]

    def told(done: int) -> None:
        if done >= rows and left:
            left.pop()()

    return told


def test_the_death_of_one_of_two_workers_loses_none_of_2000_snapshots(snapshots: Mapping[str, int]) -> None:
    with cluster(2) as made:
        nannies = list(made.workers.values())

        def kill() -> None:
            nannies[0].close_gracefully()  # its worker is not restarted
            os.kill(nannies[0].pid, signal.SIGKILL)

        pids = [nanny.pid for nanny in nannies]
        told = after(SNAPSHOTS // 4, kill)
        names = sorted(snapshots, key=lambda name: name[::-1])
        rows = list(fleet.run(examined, names, scheduler=made.scheduler_address, progress=told))
        deadline = time.monotonic() + 60
        while len(made.scheduler_info["workers"]) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(made.scheduler_info["workers"]) == 1, "the worker is not restarted"
    assert [row["source"] for row in rows] == sorted(snapshots), "one row per source, in order"
    assert {row["source"]: row["scratch"] for row in rows} == snapshots
    assert {row["source"] for row in rows if not row["exit_code"]} == {
        root for root, held in snapshots.items() if not held
    }
    assert [row["error"] for row in rows] == [None] * SNAPSHOTS
    by = [sum(row["pid"] == pid for row in rows) for pid in pids]
    assert sum(by) == SNAPSHOTS, "only these two workers computed rows"
    assert min(by) > 0
    assert by[1] > SNAPSHOTS // 2, "the remaining worker did the rest"


def test_a_source_that_kills_its_workers_is_an_error_row_and_others_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    names = [f"well {i:02}" for i in range(60)]
    names[20:20] = ["broken", "deadly", "deadly once", "gone", "huge", "refused"]
    roots = [tmp_path / name for name in names]
    for root in roots:
        root.mkdir()
    counts: list[int] = []
    before = set(psutil.Process().children(recursive=True))
    made = fleet.run(moody, map(str, roots), workers=2, progress=counts.append)
    fleet.write_parquet((row for row in made), tmp_path / "rows.parquet", fleet.DOCTOR)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["source"] for row in rows] == sorted(map(str, roots))
    bad = {Path(row["source"]).name: row["error"] for row in rows if row["error"] is not None}
    assert sorted(bad) == ["broken", "deadly", "gone", "huge", "refused"]
    assert bad["broken"] == "ZeroDivisionError: a bug"
    assert bad["deadly"] == "each worker that read it died"
    assert bad["gone"].endswith(f"no such file: {str(tmp_path / 'gone')!r}")
    assert bad["huge"].startswith("does not fit the table: ")
    assert bad["refused"] == "no handover"
    assert {row["exit_code"] for row in rows if row["error"] is not None} == {2}
    assert all(row["headline"] == Path(row["source"]).name for row in rows if row["error"] is None)
    assert all(row["ids"] == ["127.0.0.1"] for row in rows if row["error"] is None), "only local processes can connect"
    assert counts == sorted(counts)
    assert counts[-1] == len(roots)
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if "spawn_main" in " ".join(process.cmdline())], "the cluster has ended"
    assert list((tmp_path / "tmp").iterdir()) == []


def dumps(folder: Path) -> dict[str, int]:
    """Sources of every kind, with the exit code of `kho verify` for each."""
    folder.mkdir()
    kinds: dict[str, int] = {}
    for i, name in enumerate(captures.NAMES):
        (folder / f"capture-{i}").symlink_to(captures.elf(name))
        kinds[f"capture-{i}"] = 0
    for i, (name, image) in enumerate({**hostile.refused(), **hostile.files()}.items()):
        (folder / f"hostile-{i:03}").write_bytes(image)
        kinds[f"hostile-{i:03}"] = run("verify", folder / f"hostile-{i:03}").code
        assert kinds[f"hostile-{i:03}"] in (0, 1, 2), name
    (folder / "missing").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    (folder / "directory").mkdir()
    (folder / os.fsdecode(b"no utf-8 \xff")).write_bytes(b"")
    (folder / "terminal \x1b[31m").write_bytes(b"")
    return kinds | dict.fromkeys(("missing", "fifo", "directory", "no utf-8 \\udcff", "terminal \x1b[31m"), 2)


def without_strings(data: Any) -> Any:
    """Data without the name of the schema, and the hex strings next to numbers above 2^53."""
    if isinstance(data, dict):
        kept = {name: value for name, value in data.items() if name != "schema" and not name.endswith("_hex")}
        return {name: without_strings(value) for name, value in kept.items()}
    return [without_strings(each) for each in data] if isinstance(data, list) else data


def test_verify_of_a_fleet_gives_the_same_result_as_of_one_source(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = dumps(tmp_path / "dumps")
    monkeypatch.chdir(tmp_path)
    on = ("--scheduler", there)
    listed = run("verify", "--fleet", "dumps/*", "--parquet", "out.parquet", "--json", *on)
    shown = run("verify", "--fleet", "dumps/capture*", *on, "dumps/fifo", "dumps/nothing", "dumps/terminal*")
    fine = run("verify", "--fleet", "dumps/capture*", *on)
    again = run("verify", "--fleet", "dumps/*", "--parquet", "again.parquet", "--json", *on)
    assert (listed.code, listed.err) == (2, "")
    rows = [json.loads(line) for line in listed.out.splitlines()]
    assert {row["source"].removeprefix("dumps/"): row["exit_code"] for row in rows} == kinds
    assert [row["source"] for row in rows] == sorted(row["source"] for row in rows)
    table = pq.read_table("out.parquet")
    assert table.schema.equals(fleet.schema(fleet.VERIFY))
    assert table.to_pylist() == [without_strings(row) for row in rows]
    for row in rows:
        if row["error"] is None:
            alone = run("verify", "--json", row["source"]).json
            assert alone["counts"] == {name: row[f"{name}s"] for name in ("error", "warning", "note")}
            assert row["ids"] == sorted({f["id"] for f in alone["findings"]})
            seen = [tuple(f[name] for name in ("id", "severity", "place", "value", "phys")) for f in alone["findings"]]
            # Workers get absolute paths; the place of a finding may be the file.
            here = [{**f, "place": f["place"].removeprefix(f"{tmp_path}/")} for f in row["findings"]]
            assert [tuple(without_strings(f).values()) for f in here] == seen[: fleet.MOST_FINDINGS]
            assert row["findings_left_out"] == len(seen[fleet.MOST_FINDINGS :])
    assert (again.out, Path("again.parquet").read_bytes()) == (listed.out, Path("out.parquet").read_bytes())
    assert (fine.code, fine.out) == (
        0,
        f"{len(captures.NAMES)} sources: {len(captures.NAMES)} fine, 0 with findings, 0 not readable\n",
    )
    assert shown.code == 2
    assert "dumps/fifo" in shown.out
    assert "dumps/nothing" in shown.out
    assert "\x1b" not in shown.out
    assert shown.out.endswith("3 not readable\n")


def test_doctor_of_a_fleet_gives_the_same_result_as_of_one_snapshot(
    there: str, snapshots: Mapping[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(next(iter(snapshots))).parent)
    (tmp_path / "dmesg").write_text("no directory")
    fleet_of = ("doctor", "--scheduler", there, "--fleet", "host-000?", "--fleet", tmp_path / "d*")
    out = tmp_path / "out.parquet"
    listed = run(*fleet_of, "--json", "--parquet", out)
    rows = [json.loads(line) for line in listed.out.splitlines()]
    assert listed.code == 2
    assert [(row["source"], row["exit_code"]) for row in rows] == [
        (str(tmp_path / "dmesg"), 2),
        *((f"host-000{i}", int(i != 3)) for i in range(10)),
    ]
    assert rows[0]["error"] == f"{tmp_path / 'dmesg'}: not a directory"
    table = pq.read_table(out)
    assert table.schema.equals(fleet.schema(fleet.DOCTOR))
    assert table.to_pylist() == [without_strings(row) for row in rows]
    for row in rows[1:]:
        alone = run("doctor", "--json", row["source"]).json
        for name in set(fleet.DOCTOR) - {"source", "error", "ids", "findings_left_out"}:
            assert row[name] == alone[name], name
        assert row["ids"] == sorted({finding["id"] for finding in alone["findings"]})
    shown = run(*fleet_of)
    assert "host-0009" in shown.out
    assert "KHO holds at least 20.0 MiB" in shown.out
    assert shown.out.endswith("11 sources: 1 fine, 9 with findings, 1 not readable\n")
    listed_rows = list(csv.DictReader(io.StringIO(run(*fleet_of, "--csv").out)))
    assert [(row["source"], row["exit_code"], row["scratch"]) for row in listed_rows[1:3]] == [
        ("host-0000", "1", str(2 << 20)),
        ("host-0001", "1", str(4 << 20)),
    ]
    assert listed_rows[1]["ids"].split() == rows[1]["ids"]


def test_ctrl_c_ends_every_process_and_leaves_no_file(tmp_path: Path) -> None:
    args = ["--json", "--parquet", str(tmp_path / "out.parquet"), *(f"--fleet=host-{i}" for i in range(1000))]
    code = (
        "import sys, test_fleet\n"
        "from kho import cli, fleet\n"
        "if __name__ == '__main__':\n"
        "    fleet.verify_row = test_fleet.patient\n"
        f"    sys.argv = {['kho', 'verify', '--workers', '2', *args]}\n"
        "    cli.main()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["exit_code"] == 0, "it runs"
    kids = psutil.Process(process.pid).children(recursive=True)
    assert len(kids) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as the terminal sends it
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.strip()) == (130, "")
    gone, alive = psutil.wait_procs(kids, timeout=60)
    assert (len(gone), alive) == (len(kids), [])
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def releasing(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `act` when this thread first drops a future: Python ignores what a finalizer raises."""
    release, left = distributed.Future.release, [act]

    def acting(self: object) -> None:
        if left and threading.current_thread() is threading.main_thread():
            left.pop()()
        release(self)

    monkeypatch.setattr(distributed.Future, "release", acting)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_not_lost_in_a_finalizer(
    there: str, snapshots: Mapping[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    releasing(ctrl_c, monkeypatch)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        list(fleet.run(slow, snapshots, scheduler=there, progress=seen.append))
    assert max(seen) < SNAPSHOTS
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_handler_that_does_not_raise_does_not_end_the_run(
    there: str, snapshots: Mapping[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        releasing(ctrl_c, monkeypatch)
        waiting = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        waiting.start()
        assert len(list(fleet.run(slow, sorted(snapshots)[:64], scheduler=there))) == 64
        waiting.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT] * 2


def test_the_second_ctrl_c_does_not_wait_for_dask(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []

    def hanging(*_: object) -> None:
        ctrl_c()
        reached.append("after one")
        ctrl_c()
        reached.append("after two")

    monkeypatch.setattr(fleet, "_gathered", hanging)
    with pytest.raises(KeyboardInterrupt):
        list(fleet.run(slow, ["a"], scheduler=there))
    assert reached == ["after one"]


def patient(source: str, **options: object) -> dict[str, Any]:
    return slow(source)


def test_a_scheduler_that_goes_away_ends_the_run(snapshots: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "CONNECT_SECONDS", 10)
    with cluster(1) as made:
        told = after(1, made.close)
        with pytest.raises(fleet.FleetError, match="the connection to the scheduler is lost"):
            list(fleet.run(slow, snapshots, scheduler=made.scheduler_address, progress=told))


def test_an_unusable_cluster_is_a_fleet_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "CONNECT_SECONDS", 0.5)  # no scheduler listens there, so a short timeout suffices
    for address in ("tcp://127.0.0.1:9", "nonsense://x", "tcp://127.0.0.1:port"):
        with pytest.raises(fleet.FleetError, match=f"{address}: no Dask scheduler answers"):
            list(fleet.run(slow, ["a"], scheduler=address))
    monkeypatch.setattr(fleet, "CONNECT_SECONDS", 4)  # a scheduler listens there and may answer slowly
    with cluster(0) as made, pytest.raises(fleet.FleetError, match="this scheduler has no workers"):
        list(fleet.run(slow, ["a"], scheduler=made.scheduler_address))


def test_workers_with_another_kho_are_refused(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "__version__", "0.0.0")
    with pytest.raises(
        fleet.FleetError, match=r"worker .*: has kho .*, this process has kho 0\.0\.0; install the same version"
    ):
        list(fleet.run(slow, ["a"], scheduler=there))


@pytest.mark.parametrize("name", ["distributed", "dask", "cryptography", "pyarrow"])
def test_a_missing_extra_is_named_with_the_package_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    done = run("verify", "--fleet", captures.elf(captures.NAMES[0]), "--parquet", tmp_path / "out.parquet")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(' --fleet needs it: pip install "kho[fleet]"\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["verify", captures.elf(captures.NAMES[0])], ["doctor", "--list"]])
def test_dask_and_arrow_are_imported_only_when_used(args: list[object]) -> None:
    code = (
        "import sys\n"
        "from kho import cli\n"
        f"sys.argv = {['kho', *map(str, args)]}\n"
        "cli.main()\n"
        "print(sorted({'dask', 'distributed', 'pyarrow', 'kho.fleet', 'asyncio'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Parquet


def rows(count: int) -> Iterator[dict[str, Any]]:
    for i in range(count):
        yield {"source": f"host-{i:05}", "exit_code": 0, "error": None, "scratch": i, "ids": ["DOC001"]}


def test_rows_are_written_in_groups_as_they_arrive(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    drawn: list[str] = []
    sizes: list[int] = []

    def counted() -> Iterator[dict[str, Any]]:
        for row in rows(10_000):
            if not len(drawn) % fleet.GROUP_ROWS:
                sizes.append(next(tmp_path.glob(".out.parquet.*")).stat().st_size)
            drawn.append(row["source"])
            yield row

    assert fleet.write_parquet(counted(), path, fleet.DOCTOR) == 10_000
    found = pq.ParquetFile(path)
    groups = [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)]
    assert groups == [1024] * 9 + [784]
    assert found.read().column("source").to_pylist() == drawn
    assert sizes == sorted(set(sizes)), "each group is in the file before the next is asked for"
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("columns", [fleet.DOCTOR, fleet.VERIFY])
def test_the_schema_does_not_depend_on_the_rows(columns: Mapping[str, Any], tmp_path: Path) -> None:
    for n, given in enumerate(([], [{"source": "a", "exit_code": 2, "error": "no"}], rows(2))):
        fleet.write_parquet(given, tmp_path / f"{n}", columns)
        found = pq.read_schema(tmp_path / f"{n}")
        assert found.equals(fleet.schema(columns))
        assert found.metadata == {b"kho": kho.__version__.encode()}
    assert pq.read_schema(tmp_path / "0").names == list(columns)


def test_a_failed_run_keeps_the_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    path.write_text("old")

    def failing() -> Iterator[dict[str, Any]]:
        yield from rows(3000)
        raise fleet.FleetError("no worker is left")

    with pytest.raises(fleet.FleetError, match="no worker"):
        fleet.write_parquet(failing(), path, fleet.DOCTOR)
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("old", 1)
    with pytest.raises(kho.SourceError, match="not a file"):
        fleet.write_parquet(rows(1), tmp_path, fleet.DOCTOR)
    with pytest.raises(kho.SourceError, match="is not a directory"):
        fleet.write_parquet(rows(1), tmp_path / "nowhere" / "x", fleet.DOCTOR)


def test_a_row_that_does_not_fit_becomes_an_error_row(tmp_path: Path) -> None:
    given = [*rows(3), {"source": "odd", "exit_code": 0, "error": None, "scratch": "many"}]
    fleet.write_parquet(given, tmp_path / "x", fleet.DOCTOR)
    found = pq.read_table(tmp_path / "x").to_pylist()
    assert [row["scratch"] for row in found] == [0, 1, 2, None]
    assert found[3]["exit_code"] == 2
    assert found[3]["error"].startswith("does not fit the table: ")


# Names, options


def test_patterns_expand_to_their_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.bin", "a.bin", "x@0x10.bin", "deep/er/c.bin"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert fleet.expand(["*.bin"]) == ["a.bin", "b.bin", "x@0x10.bin"]
    assert fleet.expand(["*.bin", "a.bin", "./a.bin"]) == ["./a.bin", "a.bin", "b.bin", "x@0x10.bin"]
    assert fleet.expand(["[ab].bin@0x4000,size=2G"]) == ["a.bin@0x4000,size=2G", "b.bin@0x4000,size=2G"]
    assert fleet.expand(["?.bin,machine=q35"]) == ["a.bin,machine=q35", "b.bin,machine=q35"]
    assert fleet.expand(["x*@0x10.bin"]) == ["x@0x10.bin"]
    assert fleet.expand(["**/c.bin"]) == ["deep/er/c.bin"]
    assert fleet.expand(["missing.bin@0x10"]) == ["missing.bin@0x10"]
    with pytest.raises(kho.ParameterError, match=r"nope\*: nothing matches"):
        fleet.expand(["a.bin", "nope*"])
    assert list(fleet.run(slow, [])) == []


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 2000, 5000])
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_tasks_contain_each_source_once_and_large_ones_alone(count: int, threads: int, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(fleet.BATCH_BYTES + 1)
    paths = [str(large) if i % 50 == 7 else str(tmp_path) for i in range(count)]
    batches = list(fleet._batches(paths, threads))
    assert [i for batch in batches for i in batch] == list(range(count))
    assert max(map(len, batches)) <= fleet.BATCH_SOURCES
    assert all(len(batch) == 1 for batch in batches if any(i % 50 == 7 for i in batch))
    assert len(batches) >= min(count, 4 * threads)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--parquet", "x", "core.elf"], "--parquet requires --fleet PATTERN"),
        (["--scheduler", "tcp://x:1", "core.elf"], "--scheduler requires --fleet"),
        (["--workers", "2", "core.elf"], "--workers requires --fleet"),
        (["--fleet", "*", "--sarif"], "--sarif takes one source"),
        (["--fleet", "*", "--workers", "0"], "0 is not in the range"),
        (
            ["--fleet", "*", "--workers", "2", "--scheduler", "tcp://x:1"],
            "--workers applies to a cluster on this machine",
        ),
        (["--fleet", "*", "--parquet", "no/where.parquet"], "no is not a directory"),
        (["--fleet", "nothing-*"], "nothing-*: nothing matches"),
    ],
)
def test_contradictory_options_are_refused_before_a_cluster_starts(args: list[str], why: str) -> None:
    done = run("verify", *args)
    assert done.code == 2
    assert why in done.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_is_shown_only_on_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for made in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", made)
        with output.bar("examining", 7) as told:
            if told is not None:
                told(3)
        shown[type(made)] = made.getvalue()
    assert shown[io.StringIO] == ""
    assert "3/7" in shown[Terminal]
