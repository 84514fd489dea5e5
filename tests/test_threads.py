"""Threads are optional: limits of a container or a user may leave none."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, os, resource
import numpy as np
import kho
from kho.verify import verify

def everything():
    # Long lists, listing, counting what is taken over, checking: whatever has a second thread.
    tracker = kho.Tracker()
    pfns = np.random.default_rng(1).permutation(3 << 20).astype("u8")
    changed = tracker.preserve_many(pfns), tracker.unpreserve_many(pfns[: 5 << 19]), sum(tracker.contains_many(pfns))
    tracker.preserve_run(5, 0, (1 << 20) + 7)
    arena = kho.Arena([(1 << 32, 260 << 30)], max_page_order=18)
    for at in range(1 << 32, 260 << 30, 1 << 30):
        arena.alloc_at(at, 18)
    out = kho.Outgoing(arena, "kho-v1")
    out.preserve_run(1 << 32, 0, 1 << 26)
    out.finalize()
    inc = kho.Incoming(arena)
    return changed, len(tracker.pfns(0)), inc.nr_folios, [finding.id for finding in verify(inc)]


with_threads = everything()
if os.geteuid() == 0:
    os.setuid(65534)  # root is not limited
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
print(json.dumps([with_threads, everything()]))
"""


def test_without_a_thread_to_be_had_one_does_it_all() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with_threads, alone = json.loads(done.stdout)
    assert with_threads == alone
