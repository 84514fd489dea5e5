"""Debian sid's files for the guest, made by mmdebstrap once and kept as a tar archive."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..claims import LabError
from ..packages import debian_uri

__all__ = ["INCLUDED", "RECORDED", "Root", "make", "missing"]

SUITE = "sid"
INCLUDED = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "kexec-tools",
    "kmod",
    "procps",
    "util-linux",
    "python3-minimal",
    "libpython3-stdlib",
    "python3-numpy",
    "python3-click",
    "python3-rich",
)
RECORDED = {"systemd": "262.1-1", "kexec-tools": "1:2.0.32-3", "dbus": "1.16.2-8", "python3-numpy": "1:2.4.6+ds-5+b1"}
"""The versions with which the recorded results were made. sid keeps no older ones: the guest gets what sid has, and the
table names it."""
LEAST = 261
"""The first systemd that carries its descriptor store across a kexec."""
WITHOUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
TOOLS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}
SECONDS = 1800


class Root(NamedTuple):
    """The guest's files."""

    tar: Path
    versions: dict[str, str]
    """Version of each of INCLUDED."""


def missing() -> str | None:
    """Return why the guest cannot be made here, as a sentence with the remedy; None if it can."""
    absent = {package for tool, package in TOOLS.items() if _tool(tool) is None}
    if absent:
        return f"apt-get install {' '.join(sorted(absent))}: the guest's disk is made with them"
    if os.geteuid() != 0:
        return "run it as root: the files of the guest's disk belong to root"
    return None


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def make(cache: Path, say: Callable[[str], None]) -> Root:
    """Return the files, made if they are not in `cache` yet.

    Raises: LabError if mmdebstrap fails, or sid's systemd is too old.
    """
    key = hashlib.sha256(json.dumps([SUITE, INCLUDED, WITHOUT]).encode()).hexdigest()[:12]
    tar, listed = cache / f"root-{key}.tar", cache / f"root-{key}.json"
    if not (tar.exists() and listed.exists()):
        cache.mkdir(parents=True, exist_ok=True)
        say(f"mmdebstrap {SUITE}: two minutes, 250 MB")
        part = tar.with_suffix(".part.tar")
        status = cache / f"status-{os.getpid()}"
        words = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(INCLUDED)}"]
        words += [
            '--aptopt=Acquire::Check-Valid-Until "false"',
            *(f"--dpkgopt=path-exclude={each}" for each in WITHOUT),
        ]
        words += [f"--customize-hook=download /var/lib/dpkg/status {status}"]
        words += [SUITE, str(part), f"deb {_option()} {debian_uri()} {SUITE} main"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"mmdebstrap did not end in {SECONDS} seconds; is {debian_uri()} reachable?") from error
        if done.returncode:
            part.unlink(missing_ok=True)
            raise LabError(f"mmdebstrap failed ({done.returncode}):\n{done.stderr[-3000:]}")
        listed.write_text(json.dumps(_versions(status.read_text()), indent=1) + "\n")
        status.unlink()
        part.replace(tar)
    versions: dict[str, str] = json.loads(listed.read_text())
    major = re.match(r"\d+", versions.get("systemd", "0"))
    if major is None or int(major[0]) < LEAST:
        raise LabError(f"{SUITE} has systemd {versions.get('systemd')}; its store crosses a kexec from {LEAST} on")
    for package, version in RECORDED.items():
        if versions.get(package) != version:
            say(f"{package} is {versions.get(package)} in {SUITE} now; the recorded results are those of {version}")
    return Root(tar, versions)


def _option() -> str:
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    return f"[signed-by={keys}]" if keys.exists() else "[trusted=yes]"


def _versions(status: str) -> dict[str, str]:
    """Return the versions of INCLUDED in dpkg's status file."""
    found = {}
    for block in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version): (.*)$", block, re.MULTILINE))
        if fields.get("Package") in INCLUDED:
            found[fields["Package"]] = fields.get("Version", "")
    return found
