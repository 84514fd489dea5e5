"""The result of an examination as plain data that can be pickled, printed, compared and tabulated."""

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
    """A rule that applies to a machine, with its evidence."""

    id: str
    value: str
    """The condition that was found, with its numbers."""
    certainty: Certainty
    evidence: tuple[Evidence, ...] = ()
    remedy: str = ""
    """The remedy; if empty, the rule's advice applies."""

    @property
    def severity(self) -> str:
        """The rule's severity: error, warning or note."""
        return RULES[self.id].severity

    @property
    def title(self) -> str:
        """The rule's title."""
        return RULES[self.id].title

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as data for JSON."""
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
    """The state of KHO on a machine and the memory that it holds. All sizes are bytes."""

    root: str
    headline: str = ""
    state: State = "unknown"
    """active; failed: KHO disabled itself; off; absent: not built in; unknown."""
    release: str | None = None
    built_in: bool | None = None
    boot: Literal["cold", "kho"] | None = None
    previous_release: str | None = None
    kexec_count: int | None = None
    ram: int | None = None
    """MemTotal: the installed memory less what the kernel reserved during boot. Shares are relative to it."""
    scratch: int | None = None
    """Size of scratch; 0 if KHO is not active, None if unknown."""
    scratch_low: int | None = None
    scratch_high: int | None = None
    """Bounds of `scratch`; equal to it if it is exact."""
    scratch_how: str = "unknown"
    """exact; inferred: within a pageblock; boot line: as kho_scratch= requests; at least; none; unknown."""
    leftover: int | None = None
    """Memory that a failed reservation left in CMA pageblocks."""
    areas: list[Area] = field(default_factory=list)
    by_node: dict[int, int] = field(default_factory=dict)
    """Bytes of scratch, or of the leftover, by NUMA node, if known."""
    nodes: dict[int, int] = field(default_factory=dict)
    """RAM by NUMA node."""
    cma_total: int | None = None
    """Size of the CMA areas that are not scratch."""
    hugetlb: int | None = None
    page_size: int = 4096
    pageblock: int = 2 << 20
    alignment: int = 2 << 20
    """This kernel rounds the sizes of scratch areas up to a multiple of it."""
    reserved_at_boot: int | None = None
    """Memory reserved during boot, without scratch."""
    crash_kernel: int | None = None
    """Memory reserved for a crash kernel; None if unknown."""
    crash_wanted: int = 0
    """What `crashkernel=` asks for in one piece; 0 if nothing."""
    crash_dumps: str = "cannot tell"
    """What a crash would leave: ok, damaged, none, none after the next live update, not set up, cannot tell."""
    crash_dumps_why: str = ""
    crash_dumps_needs: str = ""
    """The least that mends it: "one line in a file", "a new kernel", "a reboot"; empty if nothing is needed."""
    rounds_sizes: bool | None = None
    """True if this kernel rounds low and global sizes of kho_scratch= to pageblocks; None if the release is unknown."""
    numa: bool | None = None
    """Whether the kernel was built with CONFIG_NUMA; without it a byte reserved at boot costs twice as much scratch."""
    cmdline: str | None = None
    enabled_by_default: bool | None = None
    scale: int | None = None
    """The percentage that determined the size of scratch; None if sizes did."""
    preserved: list[dict[str, Any]] = field(default_factory=list)
    platforms: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    container: bool = False
    """True if the figures are those of a container's host."""
    layout: str | None = None
    """The kind of collection ("an sosreport"), if a collector made the tree."""
    folder: str | None = None
    """The directory below `root` that was examined; file names in evidence are relative to it."""
    looked: list[str] = field(default_factory=list)
    """Files that were searched for a kernel log, if none was found."""
    elsewhere: list[str] = field(default_factory=list)
    """Directories below `root` that look like reports, if more than one does: one of them must be named."""
    there: list[str] = field(default_factory=list)
    """Names in the root directory, at most 1024."""

    @property
    def exit_code(self) -> int:
        """1 if there are errors or warnings; otherwise 2 if the state or the amount is unknown, else 0."""
        if any(finding.severity != "note" for finding in self.findings):
            return 1
        return 2 if self.state == "unknown" or (self.state == "active" and self.scratch is None) else 0

    @property
    def needed_at_boot(self) -> int | None:
        """What the kernel reserves during boot for itself, without scratch and crash kernel; None if unknown.

        On x86_64 it includes the initramfs, until it is unpacked.
        """
        if self.reserved_at_boot is None:
            return None
        return max(self.reserved_at_boot - (self.crash_kernel or 0), 0)

    @property
    def share(self) -> float | None:
        """Scratch, or the leftover, as a share of RAM, 0 to 1; None if unknown."""
        held = self.scratch or self.leftover
        return held / self.ram if held is not None and self.ram else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON; node numbers become strings."""
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
        """Add a finding. None among the evidence is skipped; at most 20 pieces of it are kept."""
        seen = tuple(dict.fromkeys(item for item in evidence if item is not None))[:20]
        self.findings.append(Finding(rule_id, value[:600], certainty, seen, remedy))

    def sort(self) -> None:
        """Sort the findings by severity, errors first, then by id."""
        rank = {severity: i for i, severity in enumerate(SEVERITIES)}
        self.findings.sort(key=lambda finding: (rank[RULES[finding.id].severity], finding.id))
