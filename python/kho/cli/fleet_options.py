"""The option `--fleet`: run a command over many sources on a cluster. Dask is imported only when it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import click

Command = TypeVar("Command", bound=Callable[..., Any])

WORDS = ("fine", "with findings", "not readable")
"""Exit code of a source -> its description."""
MOST_ROWS = 50
"""Maximum lines of the text table."""


@dataclass(frozen=True)
class Fleet:
    """The fleet options of a command."""

    patterns: tuple[str, ...]
    parquet: str | None
    scheduler: str | None
    workers: int | None

    def run(
        self,
        examine: Callable[[str], Mapping[str, Any]],
        columns: Mapping[str, Any],
        *,
        more: tuple[str, ...] = (),
        as_json: bool = False,
        as_csv: bool = False,
    ) -> int:
        """Examine every source, print one row each or a summary, and return the highest exit code of any source.

        Args:
            examine: as in `kho.fleet.run`.
            columns: as in `kho.fleet.write_parquet`; CSV keeps their order.
            more: further file names, present if a shell expanded the pattern.
            as_json: print each row as a line of JSON.
            as_csv: print rows as CSV, with lists as ids separated by spaces.

        """
        from collections import Counter
        from contextlib import closing

        from .. import fleet
        from . import output

        if self.parquet:
            fleet.check_parquet(self.parquet)  # before a cluster is started
        sources = fleet.expand([*self.patterns, *more])
        codes: Counter[int] = Counter()
        crashes: Counter[tuple[str, str]] = Counter()
        notable: list[dict[str, Any]] = []
        names = [name for name, spec in columns.items() if isinstance(spec, str)] + ["ids"]
        csv_row = output.csv_rows(names) if as_csv else None

        def told(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for row in rows:
                codes[row["exit_code"]] += 1
                if row.get("crash_dumps"):
                    crashes[row["crash_dumps"], row.get("crash_dumps_needs") or ""] += 1
                if as_json:
                    output.print_json({name: row.get(name) for name in columns}, indent=None)
                elif csv_row is not None:
                    csv_row([*(row.get(name) for name in names[:-1]), " ".join(row.get("ids") or ())])
                elif row["exit_code"] and len(notable) < MOST_ROWS:
                    notable.append(row)
                yield row

        with (
            output.bar("examining", len(sources)) as progress,
            closing(
                fleet.run(examine, sources, scheduler=self.scheduler, workers=self.workers, progress=progress)
            ) as rows,
        ):
            if self.parquet:
                fleet.write_parquet(told(rows), self.parquet, columns)
            else:
                for _ in told(rows):
                    pass
        if not as_json and not as_csv:
            show(notable, codes, crash_line(crashes) if crashes else "")
            if self.parquet:
                output.line(f"written: {self.parquet}")
        return max(codes, default=0)


def crash_line(crashes: Mapping[tuple[str, str], int]) -> str:
    """Return what crashes of the machines would leave, and the share that needs each remedy."""
    total = sum(crashes.values())
    by_verdict: dict[str, int] = {}
    by_need: dict[str, int] = {}
    for (verdict, need), count in sorted(crashes.items()):
        by_verdict[verdict] = by_verdict.get(verdict, 0) + count
        if need:
            by_need[need] = by_need.get(need, 0) + count
    text = ", ".join(f"{count} {verdict}" for verdict, count in by_verdict.items())
    needs = ", ".join(f"{count / total * 100:.1f} % {need}" for need, count in by_need.items())
    return f"crash dumps: {text}" + (f"; needed: {needs}" if needs else "")


def show(notable: list[dict[str, Any]], codes: Mapping[int, int], more: str = "") -> None:
    """Print the first sources that are not fine, a line if there is one, and the number of sources by exit code."""
    from . import output

    if notable:
        table = output.table(">exit", "source", "what", limit=output.LINE)
        for row in notable:
            what = row.get("error") or row.get("headline") or " ".join(row.get("ids") or ())
            table.add(str(row["exit_code"]), str(row["source"]), str(what))
        table.show()
    left = sum(count for code, count in codes.items() if code) - len(notable)
    if left > 0:
        output.line(f"and {left} more; --json or --parquet FILE lists all")
    if notable:
        output.line()
    if more:
        output.line(more)
    total = sum(codes.values())
    words = ", ".join(f"{codes.get(code, 0)} {word}" for code, word in enumerate(WORDS))
    output.line(f"{total} source{'' if total == 1 else 's'}: {words}")


def fleet_options(function: Command) -> Command:
    """Add `--fleet`, `--parquet`, `--scheduler` and `--workers`; the command gets `fleet`, None without `--fleet`."""

    @functools.wraps(function)
    def wrapped(
        *args: Any,
        fleet: tuple[str, ...],
        parquet: str | None,
        scheduler: str | None,
        workers: int | None,
        **others: Any,
    ) -> Any:
        if not fleet:
            for name, given in (("--parquet", parquet), ("--scheduler", scheduler), ("--workers", workers)):
                if given is not None:
                    raise click.UsageError(f"{name} requires --fleet PATTERN")
            return function(*args, fleet=None, **others)
        if scheduler is not None and workers is not None:
            raise click.UsageError("--workers applies to a cluster on this machine; --scheduler uses a running one")
        return function(*args, fleet=Fleet(fleet, parquet, scheduler, workers), **others)

    options = (
        click.option(
            "--fleet",
            multiple=True,
            metavar="PATTERN",
            help="Process each matching source ('dumps/*') separately on a cluster; needs pip install 'kho[fleet]'.",
        ),
        click.option("--parquet", metavar="FILE", help="With --fleet: write one row per source to this file."),
        click.option(
            "--scheduler", metavar="ADDR", help="With --fleet: a running Dask scheduler (tcp://...); else this machine."
        ),
        click.option(
            "--workers", type=click.IntRange(1, 1024), metavar="N", help="With --fleet: processes here; else all cores."
        ),
    )
    made: Any = wrapped
    for option in reversed(options):
        made = option(made)
    return cast(Command, made)
