"""Memory that a holder keeps: `kho hold search-index -- python live_hold.py`. It crashes twice."""

import os
import signal

import kho

with kho.live.open("search-index") as h:
    print("finds" if h.inherited else "begins with", h.names(), flush=True)
    h.put(f"part {h.generation}", bytes(1000))
    h.commit()
    if h.generation < 3:
        os.kill(os.getpid(), signal.SIGKILL)
