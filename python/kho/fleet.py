"""Runs verify or doctor over many dumps or snapshots, on Dask distributed (`pip install "kho[fleet]"`).

>>> rows = run(verify_row, ["a.elf", "b.elf"])  # a local cluster, a process for each core
>>> write_parquet(rows, "out.parquet", VERIFY)

Dask starts workers, schedules tasks and retries them. This module adds what Dask does not know: the number of sources
per task, which source killed a worker, and the order of rows. Dask and Arrow are imported only when used.
"""

from __future__ import annotations

import gc
import glob
import logging
import os
import re
import signal
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

from . import __version__
from .errors import KhoError, ParameterError, SourceError
from .sizes import PATTERN

if TYPE_CHECKING:
    import pyarrow as pa
    from distributed import Client

__all__ = ["DOCTOR", "VERIFY", "FleetError", "doctor_row", "expand", "run", "schema", "verify_row", "write_parquet"]

Row: TypeAlias = dict[str, Any]
"""The result for one source: strings, numbers, and lists and dictionaries of these."""
Columns: TypeAlias = Mapping[str, Any]
"""Column name -> Arrow type; a list contains the type of its items, a dictionary is a struct."""

HEAD: Columns = {"source": "string", "exit_code": "int8", "error": "string"}
"""Columns of every row: `exit_code` of the command for this source, `error` if there is no other result."""
VERIFY: Columns = {
    **HEAD,
    "errors": "int32",
    "warnings": "int32",
    "notes": "int32",
    "ids": ["string"],
    "findings": [{"id": "string", "severity": "string", "place": "string", "value": "string", "phys": "uint64"}],
    "findings_left_out": "int32",
}
"""Columns of `kho verify`: counts and ids of all findings, and the most severe findings in full."""
DOCTOR: Columns = {
    **HEAD,
    "headline": "string",
    "release": "string",
    "state": "string",
    "boot": "string",
    "ram": "int64",
    "scratch": "int64",
    "scratch_how": "string",
    "leftover": "int64",
    "share": "double",
    "cma_total": "int64",
    "hugetlb": "int64",
    "crash_dumps": "string",
    "crash_dumps_needs": "string",
    "crash_dumps_why": "string",
    "ids": ["string"],
    "findings": [
        {
            "id": "string",
            "severity": "string",
            "title": "string",
            "value": "string",
            "certainty": "string",
            "evidence": [{"file": "string", "line": "int32", "text": "string"}],
            "remedy": "string",
        }
    ],
    "findings_left_out": "int32",
    "unread": [{"file": "string", "why": "string"}],
}
"""Columns of `kho doctor`, named as in its report; sizes in bytes, shares as fractions of 1."""

MOST_FINDINGS = 64
"""Maximum findings in a row, the most severe first; counts and ids are complete."""
MOST_CHARS = 4096
"""Maximum characters of a string in a row."""
BATCH_SOURCES = 32
BATCH_BYTES = 32 << 20
"""Number of small sources per task (a large one is a task alone): a task costs about 1 ms of the scheduler."""
WINDOW = 2048
"""Maximum rows that wait for an earlier row."""
GROUP_ROWS = 1024
"""Rows of a Parquet row group, and the number of rows in memory."""
ADDRESS = re.compile(rf"(@{PATTERN})?(,\w+=({PATTERN}(:{PATTERN})?|[\w:-]+))*$")
"""What may follow the name of an image (`ram.bin@0x40000000,size=2G`)."""
LOCAL = {
    # Dask blames a worker's death on all its tasks, so two failures may be coincidence; then sources run alone.
    "distributed.scheduler.allowed-failures": 1,
    "distributed.scheduler.no-workers-timeout": "60s",
    # No dashboard: other users of this machine could open it.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}
"""Settings of a local cluster that differ from Dask's defaults."""
CONNECT_SECONDS = 20


class FleetError(KhoError):
    """The cluster cannot be started or reached, or was lost, so there is no run."""


def verify_row(source: str, **options: Any) -> Row:
    """Verify one source and return its row; `options` as in `kho.verify`. Raises: as `kho.verify`."""
    from .handover.rules import SEVERITIES
    from .handover.verify import verify

    found = verify(source, **options)
    counts = {severity: sum(f.severity == severity for f in found) for severity in SEVERITIES}
    made = {f"{severity}s": count for severity, count in counts.items()}
    return _select_columns(
        {**made, "exit_code": int(counts["error"] > 0), "findings": [f.as_dict() for f in found]}, VERIFY
    )


def doctor_row(root: str) -> Row:
    """Examine one snapshot and return its row. Raises: as `kho.doctor.examine`."""
    from .doctor import examine

    return _select_columns(examine(root).to_dict(), DOCTOR)


def _select_columns(report: Mapping[str, Any], columns: Columns) -> Row:
    """Return the parts of a report that have a column."""
    found = report["findings"]
    made = {**report, "ids": sorted({f["id"] for f in found}), "findings": found[:MOST_FINDINGS]}
    made["findings_left_out"] = max(0, len(found) - MOST_FINDINGS)
    return {name: _fit(made[name], spec) for name, spec in columns.items() if name in made}


def _fit(value: Any, spec: Any) -> Any:
    match spec, value:
        case [item], list():
            return [_fit(each, item) for each in value]
        case dict(), dict():
            return {name: _fit(value.get(name), item) for name, item in spec.items()}
        case _:
            return value


def expand(patterns: Iterable[str]) -> list[str]:
    """Return the names that patterns match, in order and without duplicates.

    `**` matches directories recursively; an address after a pattern applies to each match. A name that is not a pattern
    is returned unchanged, so that a missing file becomes a row with an error.

    Raises: ParameterError for a pattern without a match.
    """
    found: set[str] = set()
    for pattern in patterns:
        cut = ADDRESS.search(pattern)
        stem, tail = (pattern[: cut.start()], cut[0]) if cut else (pattern, "")
        if not glob.has_magic(stem):
            found.add(pattern)
            continue
        # A file name may contain an @.
        matches = _glob(pattern) or [match + tail for match in _glob(stem)]
        if not matches:
            raise ParameterError(f"{pattern}: nothing matches; quote the pattern so that the shell does not expand it")
        found.update(matches)
    return sorted(found)


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 - pathlib would normalize the names


def run(
    examine: Callable[[str], Mapping[str, Any]],
    sources: Iterable[str],
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Generator[Row, None, None]:
    """Examine every source once on a cluster and yield one row per source, in the order of `sources`.

    A source that cannot be read, or that kills its workers, gets a row with `exit_code` 2 and `error`. Workers may join
    and leave. At most `WINDOW` rows are kept in memory.

    Args:
        examine: called with each source; a function of a module that workers can import, or a `functools.partial` of
            one. Its result follows `source`, `exit_code` and `error` in the row.
        sources: paths that every worker can open; made absolute for a local cluster.
        scheduler: address of a running Dask scheduler (`tcp://host:8786`). None starts a cluster on this machine; it
            listens on loopback, with TLS and a new key, and ends with this iterator.
        workers: number of processes of the local cluster; default: one per core.
        progress: called with the number of finished rows.

    Raises:
        FleetError: no Dask (`pip install "kho[fleet]"`), no scheduler, no worker, or workers without this kho.

    """
    names = sorted(set(sources))
    if not names:
        return
    with _cluster(scheduler, workers and min(workers, len(names))) as client:
        paths = names if scheduler is None else [os.path.abspath(name) for name in names]  # noqa: PTH100 - a@0x0 is not a path
        threads = max(1, sum(client.nthreads().values()))
        done: SimpleQueue[Any] = SimpleQueue()
        results = _results(client, examine, names, paths, threads, done)
        rows: dict[int, Row] = {}
        at = 0
        while True:
            with _delay_interrupt(lambda: done.put(None)):
                result = next(results, None)
            if result is None:
                return
            rows.update(zip(*result, strict=True))
            if progress is not None:
                progress(at + len(rows))
            while at in rows:
                yield rows.pop(at)
                at += 1


def _results(
    client: Client,
    examine: Callable[[str], Mapping[str, Any]],
    names: Sequence[str],
    paths: Sequence[str],
    threads: int,
    done: SimpleQueue[Any],
) -> Iterator[tuple[Sequence[int], list[Row]]]:
    """Yield each index once with its row, as tasks end. None in `done` ends a wait without a result.

    A task that fails is repeated with one source at a time. Dask blames the death of a worker on all its tasks, so each
    of these is then run with no other task: a source that fails then killed the worker.
    """
    from distributed.scheduler import KilledWorker, NoWorkerError

    todo: deque[Sequence[int]] = deque(_batches(paths, threads))
    suspects: deque[Sequence[int]] = deque()
    running: dict[Any, Sequence[int]] = {}

    def submit(batch: Sequence[int]) -> None:
        pairs = [(names[i], paths[i]) for i in batch]
        future = client.submit(_examine, examine, pairs, pure=False, retries=1)
        running[future] = batch
        future.add_done_callback(done.put)

    while todo or suspects or running:
        oldest = min((batch[0] for batch in (*running.values(), *suspects)), default=0)
        while todo and not suspects and (not running or todo[0][0] < oldest + WINDOW):
            submit(todo.popleft())
        alone = not running
        if alone and suspects:
            submit(suspects.popleft())
        future = done.get()
        if future is None:
            yield (), []
            continue
        batch = running.pop(future)
        found = _gathered(client, future)
        if isinstance(found, list):
            yield batch, found
        elif isinstance(found, NoWorkerError):
            raise FleetError("no worker is left")
        elif isinstance(found, KilledWorker) and not alone:
            suspects.extend((i,) for i in batch)
        elif len(batch) > 1:
            todo.extendleft((i,) for i in reversed(batch))
        else:
            killed = isinstance(found, KilledWorker)
            why = "each worker that read it died" if killed else f"{type(found).__name__}: {found}"
            yield batch, [_failed(names[batch[0]], why)]


def _gathered(client: Client, future: Any) -> list[Row] | BaseException:
    """Return the rows of a task, or its error; if the worker dies during the fetch, the task is repeated."""
    from distributed import CancelledError

    try:
        found: list[list[Row]] = client.gather([future], errors="skip")
        return found[0] if found else future.exception()
    except (CancelledError, OSError) as error:
        raise FleetError("the connection to the scheduler is lost") from error


def _batches(paths: Sequence[str], threads: int) -> Iterator[range]:
    """Group consecutive sources into tasks: small sources together, but enough tasks for every thread."""
    most = max(1, min(BATCH_SOURCES, len(paths) // (8 * threads)))
    start = nbytes = 0
    for i, path in enumerate(paths):
        size = _size(path)
        if i > start and (i - start == most or nbytes + size > BATCH_BYTES):
            yield range(start, i)
            start, nbytes = i, 0
        nbytes += size
    yield range(start, len(paths))


def _size(path: str) -> int:
    """Return the size of a file in bytes; a large value if the path cannot be opened, a small one for a directory."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a source is not always a path
    except (OSError, ValueError):
        return BATCH_BYTES


def _examine(examine: Callable[[str], Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Examine the sources of a task; runs on a worker."""
    return [_row(examine, name, path) for name, path in pairs]


def _row(examine: Callable[[str], Mapping[str, Any]], name: str, path: str) -> Row:
    try:
        return {"source": _clean(name), "exit_code": 0, "error": None, **_clean(dict(examine(path)))}
    except (KhoError, OSError) as error:
        return _failed(name, str(error))


def _failed(name: str, why: str) -> Row:
    return {"source": _clean(name), "exit_code": 2, "error": _clean(why)}


def _clean(value: Any) -> Any:
    """Escape strings that are not valid UTF-8 and cut long ones, recursively."""
    match value:
        case str():
            short = value if len(value) <= MOST_CHARS else value[: MOST_CHARS - 3] + "..."
            return short.encode("utf-8", "backslashreplace").decode()
        case Mapping():
            return {_clean(key): _clean(item) for key, item in value.items()}
        case list() | tuple():
            return [_clean(item) for item in value]
        case _:
            return value


# Clusters


@contextmanager
def _cluster(scheduler: str | None, workers: int | None) -> Iterator[Client]:
    """Context manager: connect to a scheduler, or start a local cluster that ends with the block."""
    try:
        import dask
        from distributed import Client, LocalCluster
        from distributed.security import Security

        security = Security.temporary() if scheduler is None else None
    except ImportError as error:
        raise missing(error) from error
    stack = ExitStack()
    try:
        if scheduler is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kho-fleet-", ignore_cleanup_errors=True))
            stack.enter_context(dask.config.set({**LOCAL, "temporary-directory": folder}))
            try:
                with _delay_interrupt(), _ignore_interrupt():
                    cluster = LocalCluster(
                        n_workers=workers or os.cpu_count(),
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address=None,
                        scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                        security=security,
                        silence_logs=logging.CRITICAL + 1,  # a normal shutdown is logged as critical
                    )
                    stack.enter_context(closing(cluster))
                    client = stack.enter_context(Client(cluster, set_as_default=False))
            except (OSError, RuntimeError) as error:
                raise FleetError(f"no cluster can be started here: {error}; try fewer --workers") from error
            yield client
            return
        try:
            client = stack.enter_context(Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False))
        except (OSError, ValueError, TypeError) as error:
            # The garbage collector would finalize the client, which can then wait forever for a lock.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            raise FleetError(f"{scheduler}: no Dask scheduler answers: {error}") from error
        _check(client, scheduler)
        yield client
    finally:
        with _delay_interrupt():
            stack.close()


@contextmanager
def _delay_interrupt(tell: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Context manager: delay the first Ctrl-C until the block ends, and call `tell`; a second one acts immediately.

    A KeyboardInterrupt inside Dask would leave parts of a cluster running, or be lost in a finalizer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers run only in the main thread
        return
    came: list[int] = []

    def note(number: int, _frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            restore()
            signal.raise_signal(number)
        tell()

    def restore() -> None:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        restore()
        if len(came) == 1:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _ignore_interrupt() -> Iterator[None]:
    """Context manager: processes started in the block ignore Ctrl-C, as this process ends them."""
    resource_tracker.ensure_running()  # otherwise the thread that starts a worker starts it, and it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _check(client: Client, scheduler: str) -> None:
    """Check that there are workers and that they have the same version of kho. Raises: FleetError."""
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise FleetError(f"{scheduler}: this scheduler has no workers") from error
    for address, there in client.run(_version, on_error="return").items():
        if there != __version__:
            raise FleetError(
                f"worker {address}: has kho {there}, this process has kho {__version__}; install the same version"
            )


def _version() -> str:
    return __version__


def missing(error: ImportError) -> FleetError:
    """Return the error that names the package to install."""
    return FleetError(f'{error.name or error} is not installed; --fleet needs it: pip install "kho[fleet]"')


# Parquet


def schema(columns: Columns) -> pa.Schema:
    """Return the Arrow schema of rows; it does not depend on their contents."""
    import pyarrow as pa

    def arrow(spec: Any) -> pa.DataType:
        match spec:
            case str():
                return pa.type_for_alias(spec)
            case [item]:
                return pa.list_(arrow(item))
            case _:
                return pa.struct([(name, arrow(item)) for name, item in spec.items()])

    always = ("source", "exit_code")
    fields = [pa.field(name, arrow(spec), nullable=name not in always) for name, spec in columns.items()]
    return pa.schema(fields, metadata={"kho": __version__})


def check_parquet(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written at `path`. Raises: FleetError without pyarrow; SourceError if it cannot."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise missing(error) from error
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise SourceError(f"{path}: {path.parent} is not a directory")
    if path.exists() and not path.is_file():
        raise SourceError(f"{path}: not a file")


def write_parquet(rows: Iterable[Row], path: str | os.PathLike[str], columns: Columns) -> int:
    """Write rows as they arrive, in groups of `GROUP_ROWS`, and return their number; missing values are null.

    The file is renamed to its path when complete. A row that does not fit the columns becomes an error row.

    Raises: FleetError without pyarrow; SourceError if it cannot be written.
    """
    check_parquet(path)
    import pyarrow.parquet as pq

    made, path = schema(columns), Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    left = iter(rows)
    try:
        try:
            with unfinished.open("wb") as file, pq.ParquetWriter(file, made, compression="zstd") as writer:
                while group := list(islice(left, GROUP_ROWS)):
                    writer.write_batch(_fitting_batch(group, made))
                    count += len(group)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, KhoError):
            raise
        raise SourceError(f"{path}: {error.strerror or error}") from error
    return count


def _fitting_batch(rows: Sequence[Row], made: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    misfit = (pa.ArrowException, OverflowError, ValueError, TypeError)
    try:
        return pa.RecordBatch.from_pylist(rows, schema=made)
    except misfit:
        fitting = list(rows)
        for i, row in enumerate(rows):
            try:
                pa.RecordBatch.from_pylist([row], schema=made)
            except misfit as error:
                fitting[i] = _failed(str(row["source"]), f"does not fit the table: {error}")
        return pa.RecordBatch.from_pylist(fitting, schema=made)
