#!/usr/bin/env python3
"""Make manual pages from the commands: `pages()` maps file names to troff; run as a script it prints one page."""

from __future__ import annotations

import re
import sys

import click

from kho import __version__
from kho.cli import TASKS, cli

DATE = "2026-11-30"
"""The date of the pages: that of the release (docs/releasing.md)."""

EXIT = re.compile(r"\s*\x08\n\s*Exit codes: (.*?)\s*\Z", re.DOTALL)
CODE = re.compile(r"(?:^|[,;] )(?=(?:128 \+ N|[0-9]+) )")

SOURCES = ["compat", "convert", "diff", "extract", "fdt", "inspect", "map", "owners", "verify"]
LIVE = ["hold", "ps", "release"]

ENVIRONMENT = [
    ("COLUMNS", "The width at which lines are folded if the output is not a terminal.", ["doctor", "owners"]),
    ("KHO_UNPACK_LIMIT", "How much a packed source may become when it is unpacked, as in 64G.", SOURCES),
    ("KHO_LIVE_FDS", "Set for the command: the descriptors of its image.", ["hold"]),
    ("KHO_LIVE_DIR", "The directory in which images are left, on tmpfs, instead of those below FILES.", LIVE),
    ("XDG_RUNTIME_DIR", "The directory of the user's sockets and images.", LIVE),
    ("NO_COLOR, FORCE_COLOR", "If not empty: print without colors, or with colors also if it is no terminal.", None),
]
"""Variable, its meaning, and the commands that read it, or None for all."""

FILES = [
    (
        "/sys/kernel/debug/kho",
        "The FDTs of the running machine: those it got, and those it hands over.",
        ["doctor", "fdt", "inspect"],
    ),
    ("/proc/kcore", 'The memory of the running machine, the source "live".', SOURCES),
    ("/dev/liveupdate", "Sessions that a kexec hands over.", ["hold"]),
    (
        "/proc, /sys, /var/log, /var/crash, /boot",
        "What `kho doctor` reads of a machine, or of a copy of these.",
        ["doctor"],
    ),
    ("$XDG_RUNTIME_DIR/kho/NAME.sock", "The socket at which the process with an image answers.", LIVE),
    ("$XDG_RUNTIME_DIR/kho/NAME.live, /dev/shm/kho-UID/NAME.live", "An image that a process has, or has left.", LIVE),
]
"""The same for files."""

ALSO = {
    "compat": ["convert", "verify"],
    "convert": ["compat", "diff"],
    "diff": ["inspect", "convert"],
    "doctor": ["inspect", "plan"],
    "extract": ["inspect", "owners"],
    "fdt": ["inspect"],
    "hold": ["ps", "release"],
    "inspect": ["owners", "verify", "map"],
    "map": ["owners", "inspect"],
    "owners": ["map", "verify"],
    "plan": ["simulate"],
    "ps": ["hold", "release"],
    "release": ["ps", "hold"],
    "simulate": ["plan"],
    "verify": ["inspect", "compat"],
}
OTHERS = {
    "doctor": ["dmesg(1)", "kexec(8)"],
    "extract": ["makedumpfile(8)"],
    "fdt": ["dtc(1)"],
    "hold": ["systemd.service(5)"],
}


def quoted(text: str) -> str:
    """Escape text for troff."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def paragraphs(text: str) -> list[str]:
    """Turn click's help into paragraphs: those after a \\b keep their lines."""
    lines: list[str] = []
    for paragraph in (text or "").strip().split("\n\n"):
        body = paragraph.split("\n")
        if lines:
            lines.append(".PP")
        if body[0].strip() == "\b":
            lines += [".nf", *(quoted(line.strip()) for line in body[1:]), ".fi"]
        else:
            lines += [quoted(line.strip()) for line in body]
    return lines


def options(command: click.Command, ctx: click.Context) -> list[str]:
    """List the options, each with its help."""
    lines = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None:
            lines += [".TP", f"\\fB{quoted(record[0])}\\fR", quoted(record[1])]
    return lines


def exit_status(text: str) -> list[str]:
    """Turn the codes at the end of a help text into a list: those of its first sentence; the others stay prose."""
    first, _, rest = " ".join(text.split()).partition(". ")
    lines = []
    for part in CODE.split(first.removesuffix(".")):
        found = re.match(r"(128 \+ N|[0-9]+) (.*)", part)
        if found is not None:
            lines += [".TP", f"\\fB{found[1]}\\fR", quoted(found[2])]
    return [*lines, ".PP", quoted(rest)] if rest else lines


def listed(title: str, rows: list[tuple[str, str, list[str] | None]], name: str) -> list[str]:
    """Write a section with the rows of a command; of `kho` itself, all of them."""
    lines = []
    for head, text, commands in rows:
        if commands is None or name in commands or not name:
            lines += [".TP", f"\\fB{quoted(head)}\\fR", quoted(text)]
    return [f".SH {title}", *lines] if lines else []


def page(name: str, command: click.Command, about: str, example: str | None) -> str:
    """Write the page of a command."""
    ctx = click.Context(command, info_name=name.replace("-", " ", 1), help_option_names=["-h", "--help"])
    usage = " ".join(command.collect_usage_pieces(ctx))
    sub = name.partition("-")[2]
    text = command.help or ""
    codes = EXIT.search(text)
    lines = [f'.TH {name.upper()} 1 "{DATE}" "kho {__version__}" "User Commands"', ".SH NAME"]
    lines += [f"{quoted(name)} \\- {quoted(about)}"]
    lines += [".SH SYNOPSIS", f"\\fB{quoted(ctx.info_name or '')}\\fR {quoted(usage)}"]
    lines += [".SH DESCRIPTION", *paragraphs(text[: codes.start()] if codes else text)]
    lines += [".SH OPTIONS", *options(command, ctx)]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for each in command.list_commands(ctx):
            about = command.commands[each].get_short_help_str(200)
            lines += [".TP", f"\\fBkho\\-{quoted(each)}\\fR(1)", quoted(about)]
    if example:
        lines += [".SH EXAMPLES", ".nf", quoted(example), ".fi"]
    status = codes[1] if codes else "0 fine, 1 findings, 2 not readable or bad input; each command lists its own."
    lines += [".SH EXIT STATUS", *exit_status(status)]
    lines += listed("ENVIRONMENT", ENVIRONMENT, sub) + listed("FILES", FILES, sub)
    also = ["kho(1)"] if sub else []
    also += [f"kho-{each}(1)" for each in (ALSO.get(sub, []) if sub else cli.commands)] + OTHERS.get(sub, [])
    lines += [".SH SEE ALSO"]
    for at, each in enumerate(also):
        head, _, section = each.partition("(")
        lines.append(f".BR {quoted(head)} ({section}{',' if at + 1 < len(also) else ''}")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Write the pages of `kho` and of each of its commands."""
    found = {"kho.1": page("kho", cli, "Linux Kexec HandOver in userspace", None)}
    for name, command in cli.commands.items():
        about, example = TASKS.get(name, (command.get_short_help_str(200), None))
        found[f"kho-{name}.1"] = page(f"kho-{name}", command, about.rstrip("?"), example)
    return found


if __name__ == "__main__":
    sys.stdout.write(pages()[f"{sys.argv[1]}.1"])
