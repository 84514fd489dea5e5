"""`python -m lab`: run scenarios, print the table; exit 0 if every claim held. `make lab` calls it."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from . import scenarios
from .bench import GUESTS, Lab
from .claims import Claim, LabError, SkipError, Table, save

RESULTS = Path(__file__).parent / "results"


def names() -> list[str]:
    """The names of the scenarios."""
    return sorted(module.name for module in pkgutil.iter_modules(scenarios.__path__))


def run(lab: Lab, name: str) -> list[Claim]:
    """Run a scenario; an error in it is a failed claim. Raises: SkipError."""
    module = importlib.import_module(f"lab.scenarios.{name}")
    began, claims = time.monotonic(), []
    try:
        for claim in module.run(lab.of(name)):
            lab.say(f"{name}: {'held' if claim.held else 'FAILED'}: {claim.text} ({claim.kernel}, {claim.arch})")
            claims.append(claim)
    except SkipError:
        raise
    except LabError as error:
        claims.append(Claim("the scenario runs to its end", lab.newest, "", False, str(error)))
    except Exception:  # noqa: BLE001
        claims.append(Claim("the scenario runs to its end", lab.newest, "", False, traceback.format_exc()))
    lab.say(f"{name}: {len(claims)} claims in {time.monotonic() - began:.0f} s")
    return claims


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run this scenario alone; may be repeated"
    )
    parser.add_argument(
        "--kernel", type=Path, metavar="PATH", help="a source tree, or a kernel's file, instead of the pinned ones"
    )
    parser.add_argument(
        "--kernels", default="", metavar="VERSIONS", help='versions of lab/versions.toml, as "6.18.15 7.3.4"'
    )
    parser.add_argument(
        "--all", action="store_true", help="long scenarios, too, run on every version, not on the newest"
    )
    parser.add_argument("--arch", action="append", default=[], help="x86_64 or aarch64; may be repeated; default: both")
    parser.add_argument("--cache", type=Path, help="where everything is kept; default: $KHO_LAB, or ~/.cache/kho-lab")
    parser.add_argument("--list", action="store_true", help="list the scenarios and stop")
    parser.add_argument(
        "--save", action="store_true", help="also write lab/results, which docs/real-kernels.md is made from"
    )
    parser.add_argument(
        "--record", action="store_true", help="also write what devices answered to tests/data, to be checked in"
    )
    parser.add_argument("--build", action="store_true", help="build the kernels and stop")
    options = parser.parse_args(argv)
    known = names()
    if options.list:
        for name in known:
            doc = importlib.import_module(f"lab.scenarios.{name}").__doc__ or ""
            print(f"{name:12} {doc.splitlines()[0]}")
        return 0
    wanted = [name for word in options.only for name in word.replace(",", " ").split()] or known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        versions = options.kernels.replace(",", " ").split()
        lab = Lab(options.cache, options.kernel, versions, options.arch or ("x86_64", "aarch64"))
        if options.build:
            for version in lab.versions:
                lab.kernel(version)
            if "aarch64" in lab.arches:
                lab.kernel(lab.newest, "aarch64")
                lab.kernel(lab.newest, "aarch64", ("lean", "64k"))
            return 0
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    lab.record = options.record
    if not (options.all or versions):
        lab.long_versions = lab.versions[:1]
    lab.say(f"kernels {', '.join(lab.versions)}; everything is kept in {lab.cache}")
    whole = options.all and not (versions or options.kernel or options.arch)
    table, today = Table([]), datetime.now(UTC).date().isoformat()
    with ThreadPoolExecutor(GUESTS) as pool:
        jobs = {name: pool.submit(run, lab, name) for name in reversed(wanted)}  # the longest first
        for name in wanted:
            try:
                claims = jobs[name].result()
            except KeyboardInterrupt:
                os._exit(130)  # the guests have had the signal, too; the other threads would start more
            except SkipError as skip:
                lab.say(f"{name}: skipped: {skip}")
                table.skipped.append((name, str(skip)))
                continue
            table.rows += [(name, claim) for claim in claims]
            if options.save:
                save(RESULTS / f"{name}.json", name, claims, today, whole=whole)
    print(table.text(), end="")
    print(f"{time.monotonic() - lab.began:.0f} s, {sum(os.times()[:4]):.0f} s of CPU")
    return table.exit_code


if __name__ == "__main__":
    sys.exit(main())
