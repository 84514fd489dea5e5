"""`kho.live.exec`: become another program that keeps this process's images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import NoReturn

from ...errors import ParameterError
from ..handle import open_handles
from .descriptors import set_inheritable
from .environ import VARIABLE, described

__all__ = ["execute"]


def execute(argv: Sequence[str], env: Mapping[str, str] | None = None) -> NoReturn:
    """Become another program, whose `kho.live.open` finds each memfd image that this process owns.

    Other threads end, as always with exec. Forked children that read go on; they must have ended before the new program
    commits. An image with a path needs none of this.
    Args: argv: the program, looked up in PATH, and its arguments. env: instead of this process's environment.
    Raises: FinalizedError with uncommitted changes; BusyError while the previous owner drains, or a successor reads;
        ParameterError; OSError if the program cannot be run. Nothing has changed then.
    """
    if not argv:
        raise ParameterError("exec: no command")
    images = [image for handle in open_handles() if (image := handle._across_exec())]
    environment = dict(os.environ if env is None else env)
    environment[VARIABLE] = ",".join(described(*image) for image in images)
    fds = [fd for _, *several in images for fd in several if fd is not None]
    try:
        for fd in fds:
            set_inheritable(fd, True)
        os.execvpe(argv[0], list(argv), environment)
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                set_inheritable(fd, False)
