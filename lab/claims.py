"""Claims and the table of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class LabError(Exception):
    """A run that cannot go on: a package, a build or a guest failed. The message names the remedy."""


class SkipError(LabError):
    """A scenario that cannot run on this machine: a tool is missing, or it is not root. It names the remedy."""


@dataclass(frozen=True)
class Claim:
    """One row: what is claimed, on which kernel and architecture, whether it held, and what shows it."""

    text: str
    kernel: str
    arch: str
    held: bool
    evidence: str = ""


@dataclass
class Table:
    """The rows of a run, with the scenario of each, and the scenarios that were skipped, with the reason."""

    rows: list[tuple[str, Claim]]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def failed(self) -> list[tuple[str, Claim]]:
        """The rows that did not hold."""
        return [row for row in self.rows if not row[1].held]

    @property
    def exit_code(self) -> int:
        """0 if every row held, or all was skipped; 1 if a row failed or there is nothing."""
        return 0 if (self.rows or self.skipped) and not self.failed else 1

    def text(self) -> str:
        """The table for a terminal; the evidence of rows that failed is below each."""
        head = ("scenario", "claim", "kernel", "arch", "")
        lines = [(name, c.text, c.kernel, c.arch, "held" if c.held else "FAILED") for name, c in self.rows]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(head, widths, strict=True)).rstrip()]
        for line, (_, claim) in zip(lines, self.rows, strict=True):
            shown.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
            if not claim.held:
                shown += [f"    {part}" for part in claim.evidence.splitlines()[:40]]
        shown += [f"{name}: skipped: {reason}" for name, reason in self.skipped]
        held = len(self.rows) - len(self.failed)
        shown.append(f"{held} of {len(self.rows)} claims held" if self.rows else "no claims: nothing was run")
        return "\n".join(shown) + "\n"


def save(path: Path, scenario: str, claims: Iterable[Claim], date: str, *, whole: bool) -> None:
    """Write the rows of one scenario to `path`.

    A run that was not of the `whole` scenario (some kernels, one architecture) replaces rows with the same text, kernel
    and architecture, and leaves the others. That a scenario broke off is no result: it is in the table alone, without
    an architecture. `date` is that of the run, as YYYY-MM-DD.
    """
    claims = [claim for claim in claims if claim.arch]
    ran = {(claim.text, claim.kernel, claim.arch) for claim in claims}
    old = json.loads(path.read_text())["claims"] if path.exists() and not whole else []
    rows = [row for row in old if row["arch"] and (row["text"], row["kernel"], row["arch"]) not in ran]
    rows += [{**asdict(claim), "date": date} for claim in claims]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"scenario": scenario, "claims": rows}, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the scenario and the rows that `save` wrote."""
    data = json.loads(path.read_text())
    return data["scenario"], data["claims"]
