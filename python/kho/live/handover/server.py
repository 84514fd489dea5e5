"""The thread that answers to an image's name: of its owner, or of a holder.

One thread serves all connections and never waits for one: a request is one packet, and a connection whose queue is full
is closed. Idle connections are closed after `IDLE` seconds, the longest idle one also when there are too many. A
successor that reads the image delays changes for `LOOK` seconds at most; when its connection ends, for any reason, the
owner goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol

from ...errors import BusyError, KhoError, NotOwnerError, SchemaError, SourceError, StaleError
from ...owned import Uncopied
from ..deadline import Deadline
from ..oserrors import error_of
from . import sockets, wire

if TYPE_CHECKING:
    from ..ownership import TransferSource

__all__ = ["Owner", "Server", "Service"]

LOOK = 120.0
"""Seconds that a successor may read an image before it adopts it."""
ADOPT = 10.0
"""Seconds that it may take to adopt it."""
IDLE = 10.0
"""Seconds after which a connection without a request is closed."""
AGAIN = 0.05
"""Seconds between two attempts to take the image back."""
MOST_CLIENTS = 32
MOST_PINNED = 2000
"""Runs of replaced pages that an owner's arrays may still show when it hands over."""


class Service(Protocol):
    """What a server asks for its answers; an exception is sent as the answer."""

    name: str

    def who(self) -> wire.Message:
        """Return what `kho ps` shows."""

    def readable(self) -> int:
        """Open the image for reading; the descriptor belongs to the caller."""

    def prepare(self, version: object) -> tuple[wire.Message, int]:
        """Let a successor read; returns the answer, with `store` if there is no owner, and the caller's descriptor."""

    def transfer(self) -> tuple[wire.Message, list[int]]:
        """Unlock the image for the successor; returns the answer, and descriptors to pass, which stay open here."""

    def end_transfer(self, *, adopted: bool = False) -> bool:
        """End a transfer; returns whether this process owns the image. Raises: BusyError while another has the lock."""

    def release(self, *, force: bool) -> wire.Message:
        """Free the image's memory; returns the answer."""


def reading(fd: int) -> int:
    """Open a file again, for reading only. Raises: SourceError."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise error_of(error, f"descriptor {fd}", "open it again") from error


class Owner:
    """The service of a handle, which it references weakly."""

    def __init__(self, handle: TransferSource) -> None:
        self.name = handle.name
        self._handle = weakref.ref(handle)
        self._since = time.time()

    def _owner(self) -> TransferSource:
        handle = self._handle()
        if handle is None or handle.fileno() < 0:
            raise StaleError(f"{self.name!r}: its handle was closed")
        return handle

    def who(self) -> wire.Message:
        """Return what `kho ps` shows, without the handle's lock, which a call that fills an image holds for long."""
        handle = self._owner()
        state, facts = handle._committed_facts()
        return {
            "name": self.name,
            "version": state.catalog.version,
            "generation": state.root.generation,
            "objects": len(state.catalog.items),
            "transport": handle.transport,
            "since": self._since,
            "draining": handle.draining(),
            **facts,
        }

    def readable(self) -> int:
        """Open the image for reading."""
        return reading(self._owner().fileno())

    def prepare(self, version: object) -> tuple[wire.Message, int]:
        """Begin a transfer: changes wait. Raises: SchemaError for another version; BusyError; NotOwnerError."""
        handle = self._owner()
        if version is not None and version != handle.version:
            raise SchemaError(
                f"process {os.getpid()} has {self.name!r} of version {handle.version!r}, not {version!r}; it keeps it. "
                "Convert it with kho.live.attach, or release it and start again"
            )
        fd = reading(handle.fileno())
        try:
            handle._begin_transfer()
        except BaseException:
            os.close(fd)
            raise
        return {"generation": handle.generation}, fd

    def transfer(self) -> tuple[wire.Message, list[int]]:
        """Unlock the image. Raises: BusyError."""
        handle = self._owner()
        pinned, conns = handle._transfer(MOST_PINNED)
        return {"pinned": pinned}, [handle.fileno(), *conns]

    def end_transfer(self, *, adopted: bool = False) -> bool:
        """Take the image back, or drain."""
        handle = self._handle()
        if handle is None:
            return False
        try:
            handle._end_transfer(adopted=adopted)
        except (StaleError, NotOwnerError):
            # Another process has owned the image, and released it.
            handle._end_transfer(adopted=True)
            return False
        return not adopted

    def release(self, *, force: bool) -> wire.Message:
        """Release the image of a running service, if forced. Raises: BusyError if not."""
        if not force:
            raise BusyError(
                f"process {os.getpid()} uses it; stop that, or say --force: it keeps no more than its arrays then"
            )
        return {"freed": self._owner().release()}


class Client:
    """A connection, and its stage in a handover."""

    def __init__(self, conn: socket.socket, pid: int) -> None:
        self.conn = conn
        self.pid = pid
        self.until = time.monotonic() + IDLE
        self.stage = ""
        """"" (no handover), reads, or adopts."""


class Server(Uncopied):
    """A thread that answers to a name until `stop`, or until another process has the image."""

    def __init__(self, service: Service, *, replace: bool = False, deadline: Deadline | None = None) -> None:
        """Listen, and start the thread.

        Args: replace: take the name from a process that answers to it. deadline: until when to wait for the directory's
            lock.
        Raises: BusyError if another process listens; SourceError; DescriptorLimitError.
        """
        self._service = service
        self._selector, self._wake = _waiting(service.name)
        try:
            self._published = sockets.publish(service.name, replace=replace, deadline=deadline)
        except BaseException:
            self._selector.close()
            os.close(self._wake)
            raise
        self._selector.register(self._published.listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._clients: dict[int, Client] = {}
        self._retry_until: float | None = None
        """When to stop trying to take the image back from a successor whose connection has ended."""
        self._successor: socket.socket | None = None
        """The connection of the successor that owns the image."""
        self._pid = os.getpid()
        self._paused = self._stopped = self._ended = False
        self._thread: threading.Thread | None = None
        self._closing = threading.Lock()
        _servers.add(self)
        self._start()

    def _start(self) -> None:
        self._paused = False
        self._thread = threading.Thread(target=self._run, name=f"kho.live {self._service.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop answering; successors that read see the connection close."""
        if os.getpid() == self._pid:
            self._stopped = True
            self._halt(None)
            if self._thread is not threading.current_thread():
                self._end()
        if self._successor is not None:
            self._successor.close()
            self._successor = None

    def fileno(self) -> int:
        """Return the descriptor of the listening socket."""
        return self._published.listener.fileno()

    def _halt(self, timeout: float | None) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            with self._closing:
                if not self._ended:
                    os.eventfd_write(self._wake, 1)
            thread.join(timeout)

    def pause(self) -> None:
        """Stop the thread while this process forks."""
        self._paused = True
        self._halt(1.0)

    def resume(self) -> None:
        """Start the thread again after a fork."""
        thread = self._thread
        if not self._ended and not self._stopped and thread is not None:
            if thread.is_alive():
                # It did not stop within the time that `pause` waits.
                self._paused = False
                thread.join(0.01)
            if not thread.is_alive():
                self._start()

    def abandon(self) -> None:
        """In a forked child: close what is the parent's, but for the connection that tells a successor of readers."""
        if not self._ended:
            self._ended = True
            self._shut()
            self._published.listener.close()

    def _shut(self) -> None:
        for client in self._clients.values():
            client.conn.close()
        self._clients.clear()
        self._selector.close()
        os.close(self._wake)

    def _end(self) -> None:
        with self._closing:
            if self._ended:
                return
            self._ended = True
            transferring = any(client.stage for client in self._clients.values()) or self._retry_until is not None
            sockets.retract(self._published)
            self._shut()
        if transferring:
            with contextlib.suppress(KhoError):
                self._service.end_transfer(adopted=self._successor is not None)

    def _run(self) -> None:
        while not (self._stopped or self._paused or self._successor):
            now = time.monotonic()
            untils = [client.until for client in self._clients.values()]
            if self._retry_until is not None:
                untils.append(now + AGAIN)
            for key, _ in self._selector.select(max(min(untils) - now, 0.0) if untils else None):
                if self._successor is not None or self._stopped:
                    break
                if key.fileobj == self._wake:
                    os.eventfd_read(self._wake)
                elif key.fileobj is self._published.listener:
                    self._accept()
                elif (client := self._clients.get(key.fd)) is not None:
                    self._hear(client)
            if self._successor is None and not self._stopped:
                self._tick()
        if self._successor is not None or self._stopped:
            self._end()

    def _accept(self) -> None:
        try:
            conn, _ = self._published.listener.accept()
        except OSError:
            # The client is gone, or no descriptor is free: go on serving the others.
            time.sleep(0.01)
            return
        conn.setblocking(False)
        try:
            pid, _ = wire.peer(conn)
        except (SourceError, OSError):
            conn.close()
            return
        idle = [client for client in self._clients.values() if not client.stage]
        if len(self._clients) >= MOST_CLIENTS and idle:
            self._drop(min(idle, key=lambda client: client.until))
        self._clients[conn.fileno()] = Client(conn, pid)
        self._selector.register(conn, selectors.EVENT_READ)

    def _hear(self, client: Client) -> None:
        try:
            message, _ = wire.receive(client.conn)
        except BlockingIOError:
            return
        except wire.WireError:
            self._drop(client)
            return
        fds: list[int] = []
        opened: list[int] = []
        try:
            answer, fds, opened = self._answer(client, message)
        except Exception as error:  # noqa: BLE001 - no request may end this thread
            answer = wire.refuse(error)
        try:
            wire.send(client.conn, answer, *fds)
        except wire.WireError:
            if self._successor is None:
                self._drop(client)
        finally:
            for fd in opened:
                os.close(fd)

    def _answer(self, client: Client, message: wire.Message) -> tuple[wire.Message, list[int], list[int]]:
        """Do what a request asks; returns the answer, descriptors to pass, and those of them to close after it."""
        done = {"ok": True, "pid": self._pid}
        do = message.get("do")
        if not client.stage:
            client.until = time.monotonic() + IDLE
        if do == "who":
            taking = [other.pid for other in self._clients.values() if other.stage]
            state = {"uid": os.geteuid(), "successor": taking[0] if taking else None}
            return done | state | self._service.who(), [], []
        if do == "read":
            fd = self._service.readable()
            return done | {"name": self._service.name}, [fd], [fd]
        if do == "release":
            return done | self._service.release(force=message.get("force") is True), [], []
        if do == "prepare":
            if message.get("name") != self._service.name:
                raise wire.WireError(f"here is {self._service.name!r}, not {message.get('name')!r}")
            for other in self._clients.values():
                if other.stage:
                    raise BusyError(f"process {other.pid} is taking {self._service.name!r} over from {self._pid}")
            if self._retry_until is not None:
                raise BusyError(f"process {self._pid} waits for {self._service.name!r} to come back")
            answer, fd = self._service.prepare(message.get("version"))
            if "store" not in answer:
                client.stage = "reads"
                client.until = time.monotonic() + LOOK
            return done | answer, [fd], [fd]
        if do == "adopt" and client.stage == "reads":
            answer, fds = self._service.transfer()
            client.stage = "adopts"
            client.until = time.monotonic() + ADOPT
            return done | answer, fds, []
        if do == "adopted" and client.stage == "adopts":
            self._confirm(client)
            return done, [], []
        raise wire.WireError(f"not a request: {str(do)[:40]!r}")

    def _confirm(self, client: Client) -> None:
        """Check that a successor has the image, by its lock. Raises: WireError if the lock is free."""
        try:
            goes_on = self._service.end_transfer()
        except BusyError:
            self._drain(client)
            return
        client.stage = ""
        client.until = time.monotonic() + IDLE
        self._go_on(goes_on)
        raise wire.WireError(f"the lock of {self._service.name!r} was free: no process has adopted it")

    def _drain(self, client: Client) -> None:
        """End the service, and keep the connection: its end tells the successor that this process reads no longer."""
        self._selector.unregister(client.conn)
        del self._clients[client.conn.fileno()]
        self._successor = client.conn
        self._service.end_transfer(adopted=True)

    def _drop(self, client: Client) -> None:
        self._selector.unregister(client.conn)
        del self._clients[client.conn.fileno()]
        client.conn.close()
        if client.stage:
            self._retry_until = time.monotonic() + ADOPT

    def _tick(self) -> None:
        """Close idle connections, and take the image back from successors that do not answer."""
        now = time.monotonic()
        for client in [client for client in self._clients.values() if client.until <= now]:
            if client.stage != "adopts":
                self._drop(client)
                continue
            try:
                goes_on = self._service.end_transfer()
            except BusyError:
                # The successor has the lock, so it is the owner, although it has not confirmed it.
                self._drain(client)
                return
            else:
                client.stage = ""
                self._drop(client)
                self._go_on(goes_on)
        if (retry_until := self._retry_until) is not None:
            try:
                goes_on = self._service.end_transfer()
                self._retry_until = None
                self._go_on(goes_on)
            except BusyError:
                # A dead process's lock is released immediately; a process that still has it is the owner.
                if now > retry_until:
                    self._retry_until = None
                    self._service.end_transfer(adopted=True)
                    self._stopped = True

    def _go_on(self, goes_on: bool) -> None:
        """Keep the name, if this process owns the image; stop otherwise."""
        if goes_on:
            self._keep_name()
        else:
            self._stopped = True

    def _keep_name(self) -> None:
        """Take the name back from a successor that had it and died."""
        if sockets.holds(self._published):
            return
        with contextlib.suppress(KhoError):
            again = sockets.publish(self._service.name, replace=True)
            self._selector.unregister(self._published.listener)
            self._published.listener.close()
            self._published = again
            self._selector.register(again.listener, selectors.EVENT_READ)


def _waiting(name: str) -> tuple[selectors.BaseSelector, int]:
    """Make the selector and eventfd of a thread. Raises: DescriptorLimitError, SourceError."""
    selector = None
    try:
        selector = selectors.DefaultSelector()
        return selector, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        if selector is not None:
            selector.close()
        raise error_of(error, repr(name), "serve") from error


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _each(name: str) -> None:
    for server in list(_servers):
        getattr(server, name)()


@atexit.register
def _leave() -> None:
    _each("stop")


os.register_at_fork(
    before=lambda: _each("pause"), after_in_parent=lambda: _each("resume"), after_in_child=lambda: _each("abandon")
)
