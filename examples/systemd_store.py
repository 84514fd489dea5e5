"""Writes the memory of a machine whose systemd preserved its descriptor store, as systemd 262.1 does.

    python examples/systemd_store.py store.elf

`kho inspect store.elf` shows it. A real dump is taken between the shutdown and the start of systemd in the next kernel.
"""

from __future__ import annotations

import json
import sys

import kho


def main(path: str) -> None:
    """Write a handover with the session of systemd, and one that a service keeps in its store."""
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    store = {
        "version": 1,
        "state": {"KExecCount": 2},
        "units": {
            "search.service": {"fdstore": [{"type": "fd", "name": "img", "token": 1}]},
            "vmm.service": {
                "fdstore": [
                    {"type": "luo_session", "name": "guests", "sessionName": "vm-1"},
                    {"type": "fd", "name": "state", "token": 2},
                ]
            },
        },
    }
    out.add_memfd("systemd", 0, json.dumps(store, separators=(",", ":")).encode(), seals=0x3F)
    out.add_memfd("systemd", 1, b"index".ljust(64 << 10, b"."), seals=0x6)
    out.add_memfd("systemd", 2, b"state of the guests")
    out.add_memfd("vm-1", 0x10, b"guest memory")
    out.finalize()
    out.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
