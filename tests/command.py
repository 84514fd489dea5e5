"""Runs the `kho` command, in this process or in a separate one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import pytest

from kho import cli
from kho.cli import schemas

MOST_CHECKED = 1 << 20
"""Characters of JSON that are held against the schema of their command; longer ones take seconds."""


@cache
def validator(command: str) -> Any:
    """The validator of a command's JSON; None without jsonschema."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return None
    return Draft202012Validator(schemas.schema(command))


def check(args: tuple[object, ...], out: str) -> None:
    """Hold what a run printed with --json against the schema of its command: every run of the tests is checked."""
    command = str(args[0]) if args else ""
    if "--json" not in map(str, args) or command not in schemas.COMMANDS or not out.startswith("{"):
        return
    valid = validator(command) if len(out) <= MOST_CHECKED else None
    if valid is None:
        return
    fleet = any(str(arg).startswith("--fleet") for arg in args)
    for document in out.splitlines() if fleet else [out]:
        error = next(valid.iter_errors(json.loads(document)), None)
        if error is not None:
            pytest.fail(f"kho {command} --json is not as its schema says: {reason(error)}")


def reason(error: Any) -> str:
    """The part of a document that fits no variant of a schema, of the variant that fits best."""
    while error.context:
        variants: dict[Any, list[Any]] = {}
        for each in error.context:
            variants.setdefault(each.schema_path[0], []).append(each)
        best = min(variants, key=lambda name: len(variants[name]))
        error = max(variants[best], key=lambda each: len(each.absolute_path))
    return f"{error.json_path}: {error.message[:300]}"


class Done(NamedTuple):
    """Exit code and output of a run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The output, parsed as JSON."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def kho(*args: object) -> Done:
    """Run `kho ARGS` in this process, as the entry point does."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["kho", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
    check(args, out.getvalue())
    return Done(code, out.getvalue(), err.getvalue())


def process(*args: object, env: dict[str, str] | None = None) -> Done:
    """Run `python -m kho ARGS` as a process without a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "kho", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )
    check(args, done.stdout)
    return Done(done.returncode, done.stdout, done.stderr)
