"""Runs commands of kho, each in a forked child, and reports their cost.

Reads a line of JSON, `{"args": [...]}`, and answers with a line: exit code, processor time in seconds, peak memory in
bytes, and the end of stderr. Starting an interpreter per command would take ten times as long; the peak memory of a
child of the test process would include the memory of pytest.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from importlib import import_module

MODULES = ("convert", "diff", "extract", "fdt", "inspect", "memmap", "owners", "verify")
ROOM = 3 << 30
"""Limit of a command's address space in bytes, to protect the machine."""
SECONDS = 120


def child(args: list[str], err: int) -> None:
    """Run one command as the entry point does; its output is discarded."""
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(err, 2)
    sys.argv = ["kho", *args]
    from kho import cli

    cli.main()


def run(args: list[str]) -> dict[str, object]:
    """Run one command and measure it."""
    with tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                child(args, err.fileno())
                code = 0
            except SystemExit as done:
                code = done.code if isinstance(done.code, int) else int(done.code is not None)
            except BaseException:  # noqa: BLE001 - prints the traceback as the interpreter would
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, used = os.wait4(pid, 0)
        err.seek(max(err.seek(0, os.SEEK_END) - 4000, 0))
        return {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": used.ru_utime + used.ru_stime,
            "bytes": used.ru_maxrss * 1024,
            "err": err.read().decode(errors="replace"),
        }


def main() -> None:
    """Answer requests until stdin ends."""
    for name in MODULES:
        import_module(f"kho.cli.{name}")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["args"])), flush=True)


if __name__ == "__main__":
    main()
