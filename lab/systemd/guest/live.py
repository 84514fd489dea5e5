"""A service that keeps data with kho.live.

live.py NAME [size=SIZE] [images=A,B:kexec,C:kexec:session] [arrays]

By default it opens one image of its own name. `images` names several, NAME-A and so on; `kexec` is the argument of
kho.live.open, `session` stores `Handle.preserve()` in systemd's store. `arrays` uses numpy, whose import
takes seconds under TCG.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import traceback
import warnings
from typing import Any

from record import charged, notify, record

import kho
import kho.live

NBYTES = 1 << 20


def contents(name: str) -> bytes:
    """Return what an image of this name holds."""
    return (hashlib.sha256(name.encode()).digest() * (NBYTES // 32))[:NBYTES]


def use(name: str, size: str, how: list[str]) -> tuple[dict[str, object], object]:
    """Open an image, check its objects or make them, count this start."""
    arguments: dict[str, object] = {"kexec": True} if "kexec" in how else {}
    h = kho.live.open(name, size=size, version="1", timeout=120, **arguments)  # type: ignore[arg-type]
    made: dict[str, object] = {
        "transport": h.transport,
        "inherited": h.inherited,
        "generation": h.generation,
        "stored": h.stored,
        "dropped": list(h.dropped),
    }
    wanted, starts = contents(name), 0
    if "table" in h.names():
        table: Any = h["table"]
        made["equal"] = bytes(table) == wanted
        made["starts"] = starts = int.from_bytes(bytes(h["starts"]), "little")
        made["verified"] = h.verify()
        if "arrays" in how:
            made["equal"] = made["equal"] and table.dtype == "i8" and table.shape == (len(wanted) // 8,)
    elif "arrays" in how:
        import numpy as np

        h.put("table", np.frombuffer(wanted, "i8"))
    else:
        h.put("table", wanted)
    h.put("starts", (starts + 1).to_bytes(8, "little"))
    h.commit()
    h.put("uncommitted", b"x")
    if "session" in how:
        notify("FDSTORE=1\nFDNAME=session", h.preserve().fileno())
    return made, h


def main() -> None:
    """Run."""
    name = sys.argv[1]
    options = dict(each.partition("=")[::2] for each in sys.argv[2:])
    names = os.environ.get("LISTEN_FDNAMES", "") if "LISTEN_FDS" in os.environ else ""
    values: dict[str, object] = {"listen": names, "charged": charged()}
    socket_name = os.environ.get("NOTIFY_SOCKET", "")
    images: dict[str, object] = {}
    kept = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for each in options.get("images", "").split(","):
            suffix, *how = each.split(":")
            image = f"{name}-{suffix}" if suffix else name
            if "arrays" in options:
                how.append("arrays")
            try:
                images[image], handle = use(image, options.get("size", "4M"), how)
                kept.append(handle)
            except kho.KhoError as error:
                images[image] = {"error": type(error).__name__, "message": str(error)}
            except Exception:  # noqa: BLE001 - the guest records whatever happens
                images[image] = {"error": "traceback", "message": traceback.format_exc()[-2000:]}
    values["images"] = images
    values["warnings"] = [str(each.message) for each in warned]
    values["charged_after"] = charged()
    record(name, **values)
    os.environ["NOTIFY_SOCKET"] = socket_name
    notify("READY=1")
    while True:
        signal.pause()


main()
