"""Which faults of `kho.kernels.FIXES` the release of a machine has, and how sure that is."""

from __future__ import annotations

from ..errors import ParameterError
from ..kernels import FIXES, Release
from .facts import Facts
from .kernellog import Evidence
from .report import Certainty


def release_of(facts: Facts) -> Release | None:
    """Return the release with its stable level, if the files show it; None if it is unknown or not a release."""
    if facts.release is None:
        return None
    signature = facts.crash.signature
    try:
        return Release.parse(facts.release.text, signature.text if signature is not None else None)
    except ParameterError:
        return None


def affected(facts: Facts, fix: str) -> bool | None:
    """Return whether the release has a fault; None if a vendor may have mended it; False if the release is unknown."""
    release = release_of(facts)
    return False if release is None else FIXES[fix].affects(release)


def sure(has: bool | None) -> Certainty:
    """Return the certainty that a release gives: never certain for a vendor's, whose stable level is unknown."""
    return "certain" if has else "likely"


def shown(facts: Facts) -> list[Evidence | None]:
    """Return the evidence for the release."""
    return [facts.release, facts.crash.signature]


def unsure_text(facts: Facts, fix: str) -> str:
    """Say how to find out whether a vendor's release has a fault; empty if the release tells."""
    release = release_of(facts)
    if release is None or affected(facts, fix) is not None:
        return ""
    fixed = FIXES[fix].points.get(release.name)
    level = f"{release.name}.0 before {release.name}.{fixed} has it" if fixed is not None else "upstream has it"
    return (
        f"; {release} does not tell its stable level (Ubuntu: the last word of /proc/version_signature): {level}, "
        f"ask the vendor for {FIXES[fix].upstream}"
    )
