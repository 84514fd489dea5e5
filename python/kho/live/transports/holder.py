"""A holder (`kho hold`): keeps the memory of a service while the service's command is restarted.

The command is a child that finds the image by its name: in `KHO_LIVE_FDS` or, if its descriptors were closed, by the
name's socket. Its lock is released when it ends, so the next command adopts what was last committed. The holder is a
child subreaper: it ends the descendants that a command leaves before it starts the next one, as they could still be
reading.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from ... import luo
from ...errors import BusyError, KhoError, LuoBusyError, ParameterError, SourceError
from ...formats.live import PAGE, check_service
from ...owned import Uncopied
from ..file.header import HEAD
from ..file.image import ImageFile, blank, reopen
from ..handover import wire
from ..handover.server import Server, reading
from ..oserrors import error_of
from . import kexec
from .descriptors import create_memfd, has_superblock
from .environ import VARIABLE, described

__all__ = ["Holder", "Restart"]

Restart = Literal["on-failure", "always", "never"]
FORWARDED = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT}
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
ASKED = signal.SIGRTMIN
HEARD = FORWARDED | ENDING | {signal.SIGHUP, signal.SIGCHLD, ASKED}
SI_KERNEL = 0x80
"""si_code of a signal that a terminal sent to the whole process group, so that the command has received it too."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds before the first restart after a failure; doubled with each failure up to the second number."""


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Store:
    """The service of a holder's memory, whose owner is the command."""

    def __init__(self, name: str, fd: int, holder: Holder) -> None:
        self.name = name
        self._fd = fd
        self._holder = holder
        self._since = time.time()

    def who(self) -> wire.Message:
        """Return what `kho ps` shows."""
        status = os.fstat(self._fd)
        row: wire.Message = {"version": None, "generation": None, "objects": 0}
        with contextlib.suppress(KhoError):
            if not blank(self._fd):
                image = ImageFile(reopen(self._fd, f"{self.name!r}"), f"{self.name!r}")
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
        """Open the image for writing, to pass it: the process that locks it is the owner. Raises: SourceError."""
        return {"store": True}, reopen(self._fd, f"{self.name!r}")

    def transfer(self) -> tuple[wire.Message, list[int]]:
        """Refuse: a holder does not own the image."""
        raise BusyError(f"{self.name!r}: its holder does not own it")

    def end_transfer(self, *, adopted: bool = False) -> bool:
        """Do nothing: the command owns the image."""
        return True

    def release(self, *, force: bool) -> wire.Message:
        """End the command, the memory and the holder. Raises: BusyError while the command runs, unless forced."""
        if self._holder.child is not None and not force:
            raise BusyError(f"process {self._holder.child} uses it; stop it, or say --force: it is ended then")
        used = os.fstat(self._fd).st_blocks * 512
        self._holder.give_up()
        return {"freed": used}


class Holder(Uncopied):
    """Keeps an image, and runs a command; it handles all signals and children of the process."""

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
        """Make the memory, or take that of the last kernel, and answer to the name.

        Args: size: bytes of memory; by default what the command asks for. restart: "on-failure": start the command
            again unless it exits with 0; "always"; "never". grace: seconds it has to end before it is killed. settled:
            seconds after which a run does not count as a failure to start. failures: the number of failures to start in
            a row after which the holder ends.
        Raises: BusyError if another process has the name; ParameterError; SourceError; LuoError.
        """
        check_service(name)
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
            self._fd = self._from_last_kernel()
            if self._fd < 0:
                self._fd = create_memfd(name, repr(name))
                if size is not None:
                    os.ftruncate(self._fd, HEAD + -(-size // PAGE) * PAGE)
            os.fchmod(self._fd, 0o600)
        except OSError as error:
            raise error_of(error, repr(name), "make its memory") from error
        # Blocked before the server's thread starts, so that no signal interrupts it.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            self._server = Server(Store(name, self._fd, self))
        except BaseException:
            self._close()
            raise

    def _from_last_kernel(self) -> int:
        """Retrieve the memory that a command of this name has preserved for this kernel; -1 if there is none.

        Raises: BusyError if another process is taking it over; LuoError for errors that may be temporary.
        """
        if reason := luo.available(kexec.machine.path):
            if os.path.lexists(kexec.machine.path):
                self._log(f"kho hold: {self.name}: the kernel was not asked for memory of the last one: {reason}")
            return -1
        found = kexec.find(self.name)
        if found is None:
            return -1
        fd = fcntl.fcntl(found, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            kexec.finish(self.name)
        except LuoBusyError as error:
            self._log(f"kho hold: {self.name}: {error}")
        except BaseException:
            os.close(fd)
            raise
        kexec.forget(self.name)
        if has_superblock(fd):
            self._log(f"kho hold: {self.name}: memory of the last kernel")
            return fd
        self._log(
            f"kho hold: {self.name}: the memory that the last kernel has handed over is not an image; it is freed"
        )
        os.close(fd)
        return -1

    def _close(self) -> None:
        os.close(self._fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def give_up(self) -> None:
        """End the holder, from the server's thread; returns when the command has ended. Raises: BusyError."""
        self._giving_up = True
        os.kill(os.getpid(), ASKED)
        if not self._ended.wait(3 * self._grace + 5):
            raise BusyError(f"{self.name!r}: its command does not end")

    def run(self) -> int:
        """Run the command until it is done or the holder is asked to end.

        Returns its exit code, 128 + N for signal N.

        SIGTERM, SIGINT and SIGQUIT end it, SIGHUP restarts it, other signals are forwarded to it. Raises: SourceError
        if it cannot be run.
        """
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            return self._supervise()
        finally:
            if self.child is not None:
                self._end_child(signal.SIGTERM)
            self._end_orphans()
            # The memory is freed with the last descriptor and mapping, so remaining readers are not affected.
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
        """In the child: execute the command, with a signal that ends it when the holder is killed."""
        try:
            _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(143)
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            others = os.environ.get(VARIABLE)
            mine = described(self.name, self._fd, None, None)
            os.set_inheritable(self._fd, True)
            environment = {**os.environ, VARIABLE: f"{others},{mine}" if others else mine}
            os.execvpe(self._argv[0], self._argv, environment)
        except OSError as error:
            os.write(tell, str(error.strerror).encode())
        finally:
            os._exit(127)

    def _watch(self) -> tuple[int, str]:
        """Wait for the command; returns its exit code, or -N for signal N, and "end", "restart" or "" (by itself)."""
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
        """Wait for a signal; returns its number, and whether a terminal sent it to the whole process group."""
        info: Any = signal.sigwaitinfo(HEARD) if timeout is None else signal.sigtimedwait(HEARD, timeout)
        if info is None:
            return None
        self._ending |= info.si_signo in ENDING
        return info.si_signo, info.si_code == SI_KERNEL

    def _reap(self) -> int | None:
        """Reap children that have ended; returns the command's exit code if it is one of them."""
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
        """End the command, by SIGKILL if it takes longer than `grace`; returns its exit code."""
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
        """End the descendants of the command that remain after its end."""
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
        """Wait before the next start; returns whether to end instead. SIGHUP ends the wait."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not (self._giving_up or self._ending):
            heard = self._heard(left)
            if heard is not None and heard[0] == signal.SIGHUP:
                break
        return self._giving_up or self._ending


def _children() -> list[int]:
    """List this process's children, including zombies."""
    own, found = str(os.getpid()), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                if (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1] == own:
                    found.append(int(entry.name))
    return found
