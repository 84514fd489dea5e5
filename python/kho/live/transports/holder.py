"""A holder: it keeps a service's memory while the service's command comes and goes.

The command is a child that finds the image by its name, in `inherited.VARIABLE` or, where descriptors were closed on
the way, by the name's socket. Its lock dies with it, so that the next one adopts what was last committed. Whatever
processes the command leaves behind come to the holder, which ends them before it starts the next one: they could still
be reading.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from ...errors import BusyError, KhoError, ParameterError, SourceError
from ...formats.live import PAGE, check_name
from ...owned import Uncopied
from ..file.header import HEAD
from ..file.image import Image, blank, reopen
from ..handover import wire
from ..handover.server import Server, reading
from ..oserrors import error_of
from . import inherited

__all__ = ["Holder", "Restart"]

Restart = Literal["on-failure", "always", "never"]
FORWARDED = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT}
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
ASKED = signal.SIGRTMIN
HEARD = FORWARDED | ENDING | {signal.SIGHUP, signal.SIGCHLD, ASKED}
SI_KERNEL = 0x80
"""Of a signal that a terminal sent, which the command has got as well."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds before the first restart after a failure, which double up to the last."""


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Store:
    """A holder's memory, as a service that has no owner of its own."""

    def __init__(self, name: str, fd: int, holder: Holder) -> None:
        self.name = name
        self._fd = fd
        self._holder = holder
        self._since = time.time()

    def who(self) -> wire.Message:
        """Tell what `kho ps` shows."""
        status = os.fstat(self._fd)
        row: wire.Message = {"version": None, "generation": None, "objects": 0}
        with contextlib.suppress(KhoError):
            if not blank(self._fd):
                image = Image(reopen(self._fd, f"{self.name!r}"), f"{self.name!r}")
                try:
                    catalog = image.committed().catalog
                finally:
                    image.close()
                row = {"version": catalog.version, "generation": catalog.generation, "objects": len(catalog.items)}
        return row | {
            "name": self.name,
            "size": max(status.st_size - HEAD, 0),
            "used": status.st_blocks * 512,
            "transport": "hold",
            "since": self._since,
            "draining": False,
            "child": self._holder.child,
        }

    def readable(self) -> int:
        """Open the image for reading."""
        return reading(self._fd)

    def prepare(self, version: object) -> tuple[wire.Message, int]:
        """Pass it on, for writing too: the process that locks it is the owner. Raises: SourceError."""
        return {"store": True}, reopen(self._fd, f"{self.name!r}")

    def give(self) -> tuple[wire.Message, list[int]]:
        """Refuse: there is nothing to let go of."""
        raise BusyError(f"{self.name!r}: its holder does not own it")

    def look_away(self, *, adopted: bool = False) -> bool:
        """Do nothing: it is the command that owns it."""
        return True

    def release(self, *, force: bool) -> wire.Message:
        """End the command, the memory and the holder. Raises: BusyError while the command runs, unless forced."""
        if self._holder.child is not None and not force:
            raise BusyError(f"process {self._holder.child} uses it; stop it, or say --force: it is ended then")
        used = os.fstat(self._fd).st_blocks * 512
        self._holder.give_up()
        return {"freed": used}


class Holder(Uncopied):
    """Keeps an image and a command running; all signals and children of the process are the holder's."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        size: int | None = None,
        restart: Restart = "on-failure",
        grace: float = 10.0,
        settled: float = 10.0,
        failures: int = 10,
        log: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        """Take the name.

        Args: size: bytes of memory there may be; what the command asks for by default. restart: when to start the
            command again: unless it exits with 0, whatever it does, never. grace: seconds it has to end before it is
            killed. settled: seconds after which a run is no failure to start. failures: so many in a row, and the
            holder gives up.
        Raises: BusyError if somebody has it; ParameterError; SourceError.
        """
        check_name(name)
        if not argv:
            raise ParameterError("hold: no command to run")
        self.name = name
        self.child: int | None = None
        self._argv = list(argv)
        self._restart = restart
        self._grace, self._settled, self._failures = grace, settled, failures
        self._log = log
        self._ended = threading.Event()
        self._giving_up = self._ending = False
        try:
            label = f"kho-live:{name.encode()[:200].decode(errors='ignore')}"
            self._fd = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            if size is not None:
                os.ftruncate(self._fd, HEAD + -(-size // PAGE) * PAGE)
            os.fchmod(self._fd, 0o600)
        except OSError as error:
            raise error_of(error, repr(name), "make its memory") from error
        # Before there is a thread: it must not be who is interrupted.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            self._server = Server(Store(name, self._fd, self))
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        os.close(self._fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def give_up(self) -> None:
        """From the thread that serves: end it all, and return when the command has ended and the memory is free."""
        self._giving_up = True
        os.kill(os.getpid(), ASKED)
        if not self._ended.wait(3 * self._grace + 5):
            raise BusyError(f"{self.name!r}: its command does not end")

    def run(self) -> int:
        """Run the command until it is done, or the holder is asked to end: its exit code, 128 + N for signal N.

        SIGTERM, SIGINT and SIGQUIT end it, SIGHUP restarts it, other signals it gets. Raises: SourceError if it cannot
        be run.
        """
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            return self._supervise()
        finally:
            if self.child is not None:
                self._end_child(signal.SIGTERM)
            self._end_orphans()
            # Its memory goes with the last descriptor and mapping: a reader that is left sees what it saw.
            self._ended.set()
            self._server.stop()
            self._close()

    def _supervise(self) -> int:
        failed = 0
        while True:
            began = time.monotonic()
            self._start()
            status, why = self._watch()
            self._end_orphans()
            code = status if status >= 0 else 128 - status
            if why == "end" or self._restart == "never" or (self._restart == "on-failure" and code == 0 and not why):
                return code
            pause = 0.0
            if not why:
                failed = 1 if time.monotonic() - began >= self._settled else failed + 1
                if failed >= self._failures:
                    self._log(f"kho hold: {self.name}: {failed} times in a row it ended with {code} at once; giving up")
                    return code
                pause = min(FIRST_PAUSE * 2 ** (failed - 1), LONGEST_PAUSE)
                self._log(f"kho hold: {self.name}: it ended with {code}; once more in {pause:g} s, memory is kept")
            if self._pause(pause):
                return code

    def _start(self) -> None:
        """Run the command. Raises: SourceError."""
        parent = os.getpid()
        try:
            told, tell = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            raise error_of(error, self._argv[0], "run") from error
        try:
            self.child = os.fork()
        except OSError as error:
            os.close(told)
            os.close(tell)
            raise error_of(error, self._argv[0], "run", "raise `ulimit -u`, pids.max or TasksMax=") from error
        if not self.child:
            self._become(parent, tell)
        os.close(tell)
        with os.fdopen(told, "rb") as answer:
            failed = answer.read(1000)
        if failed:
            os.waitpid(self.child, 0)
            self.child = None
            raise SourceError(f"{self._argv[0]}: {failed.decode(errors='replace')}")

    def _become(self, parent: int, tell: int) -> NoReturn:
        """In the child: be the command. It ends when the holder is killed."""
        try:
            _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(143)
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            others = os.environ.get(inherited.VARIABLE)
            mine = inherited.described(self.name, self._fd, None, None)
            os.set_inheritable(self._fd, True)
            environment = {**os.environ, inherited.VARIABLE: f"{others},{mine}" if others else mine}
            os.execvpe(self._argv[0], self._argv, environment)
        except OSError as error:
            os.write(tell, str(error.strerror).encode())
        finally:
            os._exit(127)

    def _watch(self) -> tuple[int, str]:
        """Wait for the command: what it exited with, or a signal as -N; and whether it was to `end`, or `restart`."""
        while True:
            heard = self._heard(None)
            if (status := self._reap()) is not None:
                return status, "end" if self._giving_up or self._ending else ""
            if heard is None or self.child is None:
                continue
            number, by_terminal = heard
            if number == ASKED or number in ENDING:
                send = None if by_terminal else signal.SIGTERM if number == ASKED else number
                return self._end_child(send), "end"
            if number == signal.SIGHUP:
                return self._end_child(signal.SIGTERM), "restart"
            if number in FORWARDED and not by_terminal:
                os.kill(self.child, number)

    def _heard(self, timeout: float | None) -> tuple[int, bool] | None:
        """Wait for a signal: which, and whether a terminal sent it to all."""
        info: Any = signal.sigwaitinfo(HEARD) if timeout is None else signal.sigtimedwait(HEARD, timeout)
        if info is None:
            return None
        self._ending |= info.si_signo in ENDING
        return info.si_signo, info.si_code == SI_KERNEL

    def _reap(self) -> int | None:
        """Reap whoever has ended: what the command exited with, if it did."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if pid == self.child:
                    self.child = None
                    found = os.waitstatus_to_exitcode(status)
        return found

    def _end_child(self, number: int | None) -> int:
        """Have the command end, killed if it takes too long: what it exited with."""
        assert self.child is not None
        if number is not None:
            os.kill(self.child, number)
        until = time.monotonic() + self._grace
        while (status := self._reap()) is None:
            left = until - time.monotonic()
            if left <= 0:
                self._log(f"kho hold: {self.name}: process {self.child} has not ended for {self._grace:g} s; killed")
                os.kill(self.child, signal.SIGKILL)
                until = float("inf")
            self._heard(min(max(left, 0.01), 1.0))
        return status

    def _end_orphans(self) -> None:
        """End what the command left behind."""
        until = time.monotonic() + self._grace
        asked: set[int] = set()
        while orphans := _children():
            late = time.monotonic() > until
            for pid in orphans:
                if late or pid not in asked:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                    asked.add(pid)
            self._heard(0.05)
            self._reap()

    def _pause(self, seconds: float) -> bool:
        """Wait before the next start: whether to end instead."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not (self._giving_up or self._ending):
            heard = self._heard(left)
            if heard is not None and heard[0] == signal.SIGHUP:
                break
        return self._giving_up or self._ending


def _children() -> list[int]:
    """List this process's children, zombies too."""
    own, found = str(os.getpid()), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                if (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1] == own:
                    found.append(int(entry.name))
    return found
