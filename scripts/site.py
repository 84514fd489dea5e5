"""What the site has besides the pages of docs/: a hook of mkdocs (`hooks:` in mkdocs.yml).

index.md is README.md, messages/*.md are the kernel messages of messages.md by themselves, so that a search for the
exact message finds its page, and api/*.md are made of the docstrings of the public modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benches/README.md": "benches.md",
    "lab/README.md": "lab.md",
    "tests/data/README.md": "captures.md",
}
"""Pages that lie outside docs/, and what they are called in the site."""
MODULES = {
    "kho": "Memory, handovers, arenas and trackers",
    "kho.errors": "Errors",
    "kho.live": "Memory that outlives its process",
    "kho.live.safetensors": "Weights",
    "kho.luo": "Live update sessions",
    "kho.fdt": "Devicetrees",
    "kho.formats": "Decoders",
    "kho.handover.extract": "Contents",
    "kho.handover.owners": "Owners",
    "kho.handover.verify": "Findings",
    "kho.handover.diff": "Differences",
    "kho.handover.memmap": "The map, by address",
    "kho.handover.mapdraw": "The map, drawn",
    "kho.sizing": "Plan and simulate",
    "kho.doctor": "Doctor",
}
"""Public modules, in the order of the reference."""
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[\])*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
MESSAGE = re.compile(r"^## `(.+)`$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Add the rules of `kho doctor` and the modules to the contents."""
    rules = sorted((ROOT / "docs/doctor").glob("*.md"))
    config.nav.append({"Rules of kho doctor": [f"doctor/{path.name}" for path in rules]})
    config.nav.append({"API": ["api/index.md", *[{name: f"api/{name}.md"} for name in MODULES]]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for at, text in pages():
        files.append(File.generated(config, at, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Lead links of docs/ to pages that lie elsewhere to where the site has them."""
    return relinked(markdown, ROOT / "docs" / page.file.src_uri, page.file.src_uri)


def pages() -> Iterator[tuple[str, str]]:
    """Iterate over the generated pages: path in the site, text."""
    for source, at in ELSEWHERE.items():
        yield at, relinked((ROOT / source).read_text(), ROOT / source, at)
    parts = MESSAGE.split((ROOT / "docs/messages.md").read_text())[1:]
    messages: dict[str, str] = {}
    for message, text in zip(parts[::2], parts[1::2], strict=True):
        at = f"messages/{slug(message)}.md"
        messages[at] = messages.get(at, "") + f"# `{message}`\n{text.replace('](doctor/', '](../doctor/')}"
    yield from messages.items()
    rows = "\n".join(f"| [`{name}`]({name}.md) | {what} |" for name, what in MODULES.items())
    uses = "[kho in Python](../python.md) shows how they are used."
    yield "api/index.md", f"# API\n\n| module | |\n|---|---|\n{rows}\n\n{uses}\n"
    for name, what in MODULES.items():
        yield f"api/{name}.md", f"# {what}: `{name}`\n\n" + "\n".join(directives(name))


def directives(module: str) -> Iterator[str]:
    """Iterate over mkdocstrings' directives for a module; for `kho`, those for the names that it imports."""
    found = import_module(module)
    if module != "kho":
        yield f"::: {module}\n"
        return
    for name in dir(found):
        value = getattr(found, name)
        home = getattr(value, "__module__", "")
        if not name.startswith("_") and home.startswith("kho") and home != "kho.errors" and callable(value):
            yield f"::: {home}.{value.__name__}\n"


def slug(message: str) -> str:
    """Return a file name for a message."""
    return re.sub(r"[^a-z0-9]+", "-", message.lower()).strip("-")[:80]


def relinked(text: str, source: Path, at: str) -> str:
    """Return a page at `at` with its links, which are relative to `source`, led to the pages of the site.

    Of a link to a file that the site does not have, the text stays.
    """
    up = "../" * at.count("/")

    def lead(match: re.Match[str]) -> str:
        shown, target, anchor = match[1], (source.parent / match[2]).resolve(), match[3] or ""
        inside = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if inside in ELSEWHERE:
            return f"[{shown}]({up}{ELSEWHERE[inside]}{anchor})"
        if inside.startswith("docs/") and target.exists():
            return f"[{shown}]({up}{inside.removeprefix('docs/')}{anchor})"
        return shown if target.exists() else match[0]

    return LINK.sub(lead, text)
