#!/usr/bin/env python3
"""Make manual pages from the commands: `pages()` maps file names to troff; run as a script it prints one page."""

from __future__ import annotations

import sys

import click

from kho.cli import TASKS, cli


def quoted(text: str) -> str:
    """Escape text for troff."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def paragraphs(text: str) -> list[str]:
    """Turn click's help into paragraphs: those after a \\b keep their lines."""
    lines: list[str] = []
    for paragraph in (text or "").strip().split("\n\n"):
        body = paragraph.split("\n")
        if body[0].strip() == "\b":
            lines += [".PP", ".nf", *(quoted(line.strip()) for line in body[1:]), ".fi"]
        else:
            lines += [".PP", *(quoted(line.strip()) for line in body)]
    return lines


def options(command: click.Command, ctx: click.Context) -> list[str]:
    """List the options, each with its help."""
    lines = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None:
            lines += [".TP", f"\\fB{quoted(record[0])}\\fR", quoted(record[1])]
    return lines


def page(name: str, command: click.Command, about: str, example: str | None) -> str:
    """Write the page of a command."""
    ctx = click.Context(command, info_name=name.replace("-", " ", 1), help_option_names=["-h", "--help"])
    usage = " ".join(command.collect_usage_pieces(ctx))
    lines = [f'.TH {name.upper()} 1 "" "kho" "User Commands"', ".SH NAME", f"{quoted(name)} \\- {quoted(about)}"]
    lines += [".SH SYNOPSIS", f"\\fB{quoted(ctx.info_name or '')}\\fR {quoted(usage)}"]
    lines += [".SH DESCRIPTION", *paragraphs(command.help or "")]
    lines += [".SH OPTIONS", *options(command, ctx)]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for sub in command.list_commands(ctx):
            about = command.commands[sub].get_short_help_str(200)
            lines += [".TP", f"\\fBkho\\-{quoted(sub)}\\fR(1)", quoted(about)]
    if example:
        lines += [".SH EXAMPLE", ".nf", quoted(example), ".fi"]
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
