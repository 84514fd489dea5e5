"""Runs the `kho` command, in this process or in a separate one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple
from unittest import mock

from kho import cli


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
    return Done(done.returncode, done.stdout, done.stderr)
