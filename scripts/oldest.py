#!/usr/bin/env python3
"""Print each requirement of pyproject.toml pinned to its lower bound, for `pip install`.

    scripts/oldest.py                    the dependencies and every extra
    scripts/oldest.py pytest hypothesis  these of the group `dev`, too

`make test-oldest` installs what this prints: a bound that PyPI does not have, or that does not work, fails there.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOWER = re.compile(r"^(?P<name>[\w.\[\]-]+)>=(?P<version>[\w.]+)")


def pinned(requirement: str) -> str:
    """`click>=8.1,<9` as `click==8.1`; ValueError if there is no lower bound."""
    found = LOWER.match(requirement.replace(" ", ""))
    if found is None:
        raise ValueError(f"{requirement}: no lower bound; write NAME>=VERSION")
    return f"{found['name']}=={found['version']}"


def oldest(project: dict[str, object], tools: set[str]) -> Iterator[str]:
    """Every requirement of a parsed pyproject.toml, pinned, and the `tools` among those of the group `dev`."""
    table = project["project"]
    groups = project["dependency-groups"]
    assert isinstance(table, dict)
    assert isinstance(groups, dict)
    listed = [*table["dependencies"], *(one for extra in table["optional-dependencies"].values() for one in extra)]
    for requirement in [*listed, *(one for one in groups["dev"] if re.split(r"[\[>=<]", one)[0] in tools)]:
        yield pinned(requirement)


if __name__ == "__main__":
    print(*dict.fromkeys(oldest(tomllib.loads((ROOT / "pyproject.toml").read_text()), set(sys.argv[1:]))))
