#!/usr/bin/env python3
"""Run the commands that the pages in docs/ show, and put their output there.

    scripts/docs.py            rewrite docs/*.md, docs/doctor/*.md, docs/map.svg, and wheel-data/
    scripts/docs.py --check    exit 1 and list those that are not up to date

A page is prose with blocks that begin with ```console. In these, each line `$ COMMAND` is run by sh in a directory that
has tests/data and examples. The lines after it, up to the next such line or the end of the block, are
replaced by its output. A line `...` is kept: it stands for omitted output, and the numbers of lines before and after it
do not change.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SHARE = ROOT / "wheel-data" / "data" / "share"
MAN = SHARE / "man" / "man1"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CAPTURE = "linux-7.3.4-x86_64"


def main() -> int:
    """Rewrite, or check, every page and manual page."""
    check = sys.argv[1:] == ["--check"]
    import completions
    import man

    sys.path.insert(0, str(ROOT))
    from lab import page

    import kho
    from kho.doctor import messages, rules
    from kho.handover import mapdraw, memmap

    source = ROOT / "tests" / "data" / CAPTURE / "handover.elf"
    drawn = memmap.build(kho.open(source), kho.Memory.open(source).ranges)
    wanted = {path: rendered(path.read_text()) for path in sorted(DOCS.glob("*.md"))}
    wanted |= {MAN / name: text for name, text in man.pages().items()}
    wanted |= {SHARE / name: text for name, text in completions.files().items()}
    wanted |= {DOCS / "doctor" / f"{rule_id}.md": rules.page(rule_id) for rule_id in rules.RULES}
    wanted[DOCS / "messages.md"] = messages.page()
    wanted[DOCS / "real-kernels.md"] = page.page()
    wanted[DOCS / "map.svg"] = mapdraw.to_svg(drawn, f"kho-v4 handover in {CAPTURE}")
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not up to date (make docs)' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
    return 1 if check and stale else 0


def rendered(page: str) -> str:
    """Return a page with the current output of its commands."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "tests").mkdir()
        (here / "tests" / "data").symlink_to(ROOT / "tests" / "data")
        (here / "examples").symlink_to(ROOT / "examples")
        return BLOCK.sub(lambda block: f"```console\n{session(block[1], here)}```", page)


def session(text: str, here: Path) -> str:
    """Run the commands of a block, one after the other."""
    parts = re.split(r"^(\$ .*\n)", text, flags=re.MULTILINE)
    return parts[0] + "".join(
        command + shown(output(command[2:].rstrip(), here), before)
        for command, before in zip(parts[1::2], parts[2::2], strict=True)
    )


def output(command: str, here: Path) -> str:
    """Run a command as its reader would, both streams merged; an exit code other than 0 is added."""
    with tempfile.TemporaryDirectory() as folder:
        kho = Path(folder) / "kho"
        kho.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kho "$@"\n')
        kho.chmod(0o755)
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
        env["XDG_RUNTIME_DIR"], env["KHO_LIVE_DIR"] = f"{folder}/run", f"{folder}/run/kho"
        Path(folder, "run").mkdir(0o700)
        env.pop("FORCE_COLOR", None)
        env.pop("COLUMNS", None)
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=here,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    code = f"(exit {done.returncode})\n" if done.returncode else ""
    lines = [line.rstrip() + "\n" for line in done.stdout.splitlines()]
    return "".join(lines) + code


def shown(now: str, before: str) -> str:
    """Shorten output as the page does: keep the numbers of lines before and after its `...`."""
    lines = before.splitlines(keepends=True)
    if "...\n" not in lines:
        return now
    head = lines.index("...\n")
    tail = len(lines) - head - 1
    fresh = now.splitlines(keepends=True)
    if len(fresh) <= head + tail:
        return now
    return "".join([*fresh[:head], "...\n", *fresh[len(fresh) - tail :]])


if __name__ == "__main__":
    sys.exit(main())
