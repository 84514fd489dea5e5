#!/usr/bin/env python3
"""Steps of a release: see docs/releasing.md.

    scripts/release.py check TAG        exit 1 unless Cargo.toml, CHANGELOG.md and the manual pages are of version TAG
    scripts/release.py urls URL [REF]   write the addresses of the repository at URL into README.md and pyproject.toml

`urls` is for the checkout from which a release is built: PyPI shows README.md without the files that it links to.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?P<head>!?\[[^\]]*\]\()(?P<target>[^)\s:#]+)(?P<rest>(?:#[^)\s]*)?\))")
HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)


def problems(root: Path, tag: str) -> list[str]:
    """List what is not of the version of a tag."""
    version = tag.removeprefix("v")
    found = []
    if (workspace := tomllib.loads((root / "Cargo.toml").read_text())["workspace"]["package"]["version"]) != version:
        found.append(f"Cargo.toml: version {workspace}, not {version}")
    headings = {match["version"]: match["date"] for match in HEADING.finditer((root / "CHANGELOG.md").read_text())}
    if not headings.get(version):
        found.append(f"CHANGELOG.md: no heading `## [{version}] - DATE`")
    for page in sorted((root / "wheel-data/data/share/man/man1").glob("*.1")):
        head = page.read_text().partition("\n")[0]
        if f'"kho {version}"' not in head or (headings.get(version) or "") not in head:
            found.append(f"{page.name}: not of {version} and its date: see DATE in scripts/man.py, and run make docs")
    return found


def absolute(text: str, url: str, ref: str) -> str:
    """Make the relative links of a page absolute."""

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match["head"].startswith("!") else "blob"
        return f"{match['head']}{url}/{kind}/{ref}/{match['target']}{match['rest']}"

    return LINK.sub(link, text)


def with_urls(text: str, url: str, ref: str) -> str:
    """Add the table of addresses to pyproject.toml."""
    if "[project.urls]" in text:
        raise SystemExit("pyproject.toml has addresses already")
    rows = {
        "Homepage": url,
        "Documentation": f"{url}/tree/{ref}/docs",
        "Changelog": f"{url}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{url}/issues",
        "Source": url,
    }
    table = "".join(f'{name} = "{address}"\n' for name, address in rows.items())
    return text.replace("[project.scripts]\n", f"[project.urls]\n{table}\n[project.scripts]\n", 1)


def main() -> int:
    """Do a step."""
    match sys.argv[1:]:
        case ["check", tag]:
            found = problems(ROOT, tag)
            for line in found:
                print(line, file=sys.stderr)
            return 1 if found else 0
        case ["urls", url, *rest] if len(rest) <= 1:
            url, ref = url.rstrip("/"), (rest or ["main"])[0]
            for name, change in {"README.md": absolute, "pyproject.toml": with_urls}.items():
                (ROOT / name).write_text(change((ROOT / name).read_text(), url, ref))
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
