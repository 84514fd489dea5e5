#!/usr/bin/env python3
"""Write THIRD-PARTY-LICENSES: the crates that are linked into the extension, and the licenses that their authors ship.

    scripts/licenses.py            rewrite the file
    scripts/licenses.py --check    exit 1 if it is not what Cargo.lock leads to

The crates are those that the extension needs on Linux: no build scripts' and macros' own dependencies, no tests'.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "THIRD-PARTY-LICENSES"
TARGETS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"]
NAMES = re.compile(r"(?i)(licen[cs]e|copying|unlicense|notice)([-._].*)?")
WIDTH = 100


def metadata(target: str) -> dict[str, Any]:
    """Ask cargo for the packages of a target."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    # Cargo otherwise asks the registry again for what it has.
    env = {**os.environ, "CARGO_NET_OFFLINE": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def linked(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """List the packages of other authors that are linked, by name and version."""
    packages = {package["id"]: package for package in data["packages"]}
    nodes = {node["id"]: node for node in data["resolve"]["nodes"]}
    ahead = [package["id"] for package in packages.values() if package["name"] == "kho-python"]
    seen: set[str] = set()
    while ahead:
        at = ahead.pop()
        if at in seen or any(kind == "proc-macro" for target in packages[at]["targets"] for kind in target["kind"]):
            continue
        seen.add(at)
        ahead += [dep["pkg"] for dep in nodes[at]["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])]
    found = (packages[each] for each in seen)
    return {(package["name"], package["version"]): package for package in found if package["source"] is not None}


def texts(package: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the license files of a package: names and texts."""
    here = Path(package["manifest_path"]).parent
    files = {path for path in here.iterdir() if path.is_file() and NAMES.fullmatch(path.name)}
    if package["license_file"]:
        files.add(here / package["license_file"])
    return [(path.name, path.read_text(errors="replace").strip()) for path in sorted(files)]


def text() -> str:
    """Write the file."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for target in TARGETS:
        found |= linked(metadata(target))
    lines = ["The extension module of kho contains these crates. kho itself is under the license in LICENSE.", ""]
    bodies: dict[str, list[str]] = {}
    for (name, version), package in sorted(found.items()):
        lines.append(f"{name} {version}: {package['license']}")
        for file, body in texts(package):
            bodies.setdefault(body, []).append(f"{name} {version}, {file}")
    for body, owners in sorted(bodies.items(), key=lambda item: item[1]):
        lines += ["", "=" * WIDTH, *owners, "-" * WIDTH, body]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite or check the file."""
    made = text()
    if sys.argv[1:] == ["--check"]:
        return 0 if FILE.is_file() and FILE.read_text() == made else 1
    FILE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
