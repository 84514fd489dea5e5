"""What an examination came to: plain data, to be pickled, printed, compared, put into tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .kernellog import Evidence
from .rules import RULES, SEVERITIES
from .scratch import Area
from .tree import Unread

HIDDEN = ("findings", "unread", "areas", "there")
Certainty = Literal["certain", "likely", "guess"]
State = Literal["active", "failed", "off", "absent", "unknown"]


@dataclass(frozen=True)
class Finding:
    """A rule that applies here, and what shows it."""

    id: str
    value: str
    """What was found, with its numbers."""
    certainty: Certainty
    evidence: tuple[Evidence, ...] = ()
    remedy: str = ""
    """What to do; the rule's advice unless there is something better."""

    @property
    def severity(self) -> str:
        """Give the rule's severity: error, warning or note."""
        return RULES[self.id].severity

    @property
    def title(self) -> str:
        """Give the rule's title."""
        return RULES[self.id].title

    def to_dict(self) -> dict[str, Any]:
        """Give the finding as data."""
        return {
            "id": self.id,
            "severity": self.severity,
            "title": self.title,
            "value": self.value,
            "certainty": self.certainty,
            "evidence": [seen._asdict() for seen in self.evidence],
            "remedy": self.remedy or RULES[self.id].advice,
        }


@dataclass
class Report:
    """A machine's KHO and the memory it takes; bytes throughout."""

    root: str
    headline: str = ""
    state: State = "unknown"
    """active; failed: it disabled itself; off; absent: not built in; unknown."""
    release: str | None = None
    built_in: bool | None = None
    boot: Literal["cold", "kho"] | None = None
    previous_release: str | None = None
    kexec_count: int | None = None
    ram: int | None = None
    """MemTotal: what the kernel has left to use of the memory that is built in; shares are shares of it."""
    scratch: int | None = None
    """Held by scratch; 0 if KHO is not active, None if it is not known."""
    scratch_low: int | None = None
    scratch_high: int | None = None
    """Bounds; equal to `scratch` if it is exact."""
    scratch_how: str = "unknown"
    """exact; inferred: within a pageblock; boot line: what kho_scratch= asks for; at least; none; unknown."""
    leftover: int | None = None
    """In CMA pageblocks that a failed reservation left."""
    areas: list[Area] = field(default_factory=list)
    by_node: dict[int, int] = field(default_factory=dict)
    """Bytes of scratch (or of what it left) by NUMA node, if known."""
    nodes: dict[int, int] = field(default_factory=dict)
    """RAM by NUMA node."""
    cma_total: int | None = None
    """CMA areas of others."""
    hugetlb: int | None = None
    page_size: int = 4096
    pageblock: int = 2 << 20
    alignment: int = 2 << 20
    """What this kernel rounds the sizes of scratch up to."""
    reserved_at_boot: int | None = None
    """Reserved while booting, without scratch."""
    cmdline: str | None = None
    enabled_by_default: bool | None = None
    scale: int | None = None
    """Per cent, if scratch was sized by one."""
    preserved: list[dict[str, Any]] = field(default_factory=list)
    platforms: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    container: bool = False
    """Whether the figures are those of a container's host."""
    layout: str | None = None
    """What the tree is, if a collector made it."""
    folder: str | None = None
    """Where in `root` the report was found; files of evidence are relative to it."""
    looked: list[str] = field(default_factory=list)
    """Where a kernel log was looked for, if none was found."""
    elsewhere: list[str] = field(default_factory=list)
    """Folders of `root` that look like reports, where it cannot be said which is meant."""
    there: list[str] = field(default_factory=list)
    """What the root has, at most 1024 names."""

    @property
    def exit_code(self) -> int:
        """Give 2 if nothing can be told, 1 if there are errors or warnings, else 0."""
        if any(finding.severity != "note" for finding in self.findings):
            return 1
        return 2 if self.state == "unknown" or (self.state == "active" and self.scratch is None) else 0

    @property
    def share(self) -> float | None:
        """Give scratch, or what it left, as a share of RAM, 0 to 1."""
        held = self.scratch or self.leftover
        return held / self.ram if held is not None and self.ram else None

    def to_dict(self) -> dict[str, Any]:
        """Give everything as data for JSON; node numbers become strings there."""
        made = {name: value for name, value in vars(self).items() if name not in HIDDEN}
        made["share"] = self.share
        made["exit_code"] = self.exit_code
        made["areas"] = [asdict(area) for area in self.areas]
        made["by_node"] = {str(node): held for node, held in self.by_node.items()}
        made["nodes"] = {str(node): nbytes for node, nbytes in self.nodes.items()}
        made["findings"] = [finding.to_dict() for finding in self.findings]
        made["unread"] = [entry._asdict() for entry in self.unread]
        return made

    def add(self, rule_id: str, value: str, certainty: Certainty, *evidence: Evidence | None, remedy: str = "") -> None:
        """Add a finding."""
        seen = tuple(dict.fromkeys(item for item in evidence if item is not None))[:20]
        self.findings.append(Finding(rule_id, value[:600], certainty, seen, remedy))

    def sort(self) -> None:
        """Put the worst findings first."""
        rank = {severity: i for i, severity in enumerate(SEVERITIES)}
        self.findings.sort(key=lambda finding: (rank[RULES[finding.id].severity], finding.id))
