"""The protocol between an image's owner and its clients: one JSON object per packet, with descriptors for some.

    request                                          answer
    {"do": "who"}                                    what `kho ps` shows
    {"do": "read"}                                   a descriptor for reading
    {"do": "release", "force": false}                `freed`: bytes
    {"do": "prepare", "name": N, "version": V}       a descriptor for reading; changes wait. `store`: there is no owner,
                                                     and the descriptor is for writing too
    {"do": "adopt"}                                  the owner has unlocked the image; a descriptor for writing, and the
                                                     connections of earlier owners that drain; `pinned`: pages that are
                                                     still read
    {"do": "adopted"}                                the owner drains, and closes the connection when it has; refused
                                                     while the image's lock is free

Answers have `ok`, or `error` (busy, schema, stale, bad) and `text`. SOCK_SEQPACKET preserves packet boundaries, so
there are no partial reads or writes, and the kernel drops descriptors for which the receiver has no room.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
import time
from typing import Any

from ...errors import BusyError, KhoError, SchemaError, SourceError, StaleError
from ..file.trust import trusted
from ..oserrors import no_descriptor

__all__ = ["ANSWER", "Message", "WireError", "ask", "peer", "receive", "refuse", "refused", "send"]

Message = dict[str, Any]
MOST = 64 << 10
"""Bytes of a message, at most."""
ANSWER = 10.0
"""Seconds that an answer may take."""
_INT = array.array("i").itemsize


class WireError(SourceError):
    """The peer sent a malformed message, or closed the connection."""


def send(conn: socket.socket, message: Message, *fds: int) -> None:
    """Send without waiting. Raises: WireError, also if the peer's queue is full."""
    raw = json.dumps(message).encode()
    if len(raw) > MOST:
        raise WireError(f"a message of {len(raw)} bytes, at most {MOST}")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        conn.sendmsg([raw], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        raise WireError(f"the other side does not listen: {error.strerror}") from error


def receive(conn: socket.socket, fds: int = 0) -> tuple[Message, list[int]]:
    """Receive a message, with up to `fds` descriptors, without waiting. Raises: WireError; BlockingIOError."""
    room = socket.CMSG_LEN(fds * _INT) if fds else 0
    try:
        raw, rights, flags, _ = conn.recvmsg(MOST, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        raise
    except OSError as error:
        raise WireError(f"the connection broke: {error.strerror}") from error
    got = array.array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            got.frombytes(data[: len(data) // _INT * _INT])
    try:
        if not raw:
            raise WireError("the other side closed the connection")
        if flags & socket.MSG_TRUNC:
            raise WireError(f"a message of more than {MOST} bytes")
        if fds and flags & socket.MSG_CTRUNC and (refusal := no_descriptor("a descriptor was passed", "receive")):
            raise refusal
        try:
            message = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise WireError("a message that is not JSON") from error
        if not isinstance(message, dict):
            raise WireError("a message that is not a JSON object")
    except KhoError:
        for fd in got:
            os.close(fd)
        raise
    return message, list(got)


def peer(conn: socket.socket) -> tuple[int, int]:
    """Return the peer's pid and uid (SO_PEERCRED). Raises: SourceError if the user is not trusted."""
    pid, uid, _ = struct.unpack("3i", conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if not trusted(uid):
        raise SourceError(f"process {pid} is of user {uid}, this is {os.geteuid()}: nothing is passed between users")
    return pid, uid


def ask(conn: socket.socket, message: Message, *, fds: int = 0, within: float = ANSWER) -> tuple[Message, list[int]]:
    """Send a request and wait for the answer; returns it and its descriptors, which belong to the caller.

    Raises: WireError; BusyError if there is no answer in time; the error of the answer: BusyError, SchemaError,
        StaleError.
    """
    send(conn, message)
    until = time.monotonic() + within
    poller = select.poll()
    poller.register(conn, select.POLLIN)
    while True:
        if not poller.poll(max(until - time.monotonic(), 0) * 1000):
            raise BusyError(f"process {peer(conn)[0]} has not answered {message['do']!r} for {within:.3g} s")
        try:
            answer, got = receive(conn, fds)
            break
        except BlockingIOError:
            continue
    try:
        refused(answer)
    except BaseException:
        for fd in got:
            os.close(fd)
        raise
    return answer, got


ERRORS = {"busy": BusyError, "schema": SchemaError, "stale": StaleError, "bad": WireError}


def refuse(error: Exception) -> Message:
    """Return the answer for an error."""
    kinds = [kind for kind, made in ERRORS.items() if isinstance(error, made)]
    return {"ok": False, "error": kinds[0] if kinds else "bad", "text": str(error)[:4000]}


def refused(answer: Message) -> None:
    """Raise the error of an answer, if it has one. Raises: BusyError, SchemaError, StaleError, WireError."""
    if answer.get("ok") is not True:
        kind = ERRORS.get(str(answer.get("error")), WireError)
        raise kind(str(answer.get("text", "refused without a reason")))
