"""A service is replaced, and killed, under load: are requests lost, how long does it take, what do clients notice?

    python benches/live_load.py [--json]     INDEX_BYTES=1G for the index; 256M by default
                                             LOAD_SECONDS=4 before and after the restart

The service is examples/fastapi_index: uvicorn on a socket that stays open, with an index that either stays in
memory (kho.live) or is read from a file by each process (np.load, of a file in the page cache). The client is another
process, with CONNECTIONS that are kept alive, over loopback; it checks each answer, and tries nothing twice. After
some seconds the service is replaced (SIGHUP) or killed (SIGKILL). "restart" is from then until the next service
is ready, "index" how much of that it took to have the index, "memory" what all services together take just then
(Pss). Latencies are of all requests of the row.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

EXAMPLE = Path(__file__).parent.parent / "examples" / "fastapi_index"
INDEX = os.environ.get("INDEX_BYTES", "256M")
SECONDS = float(os.environ.get("LOAD_SECONDS", "4"))
CONNECTIONS = 4
LONGEST = 300.0
"""Seconds that a client asks at most."""
RELOAD = """
import os
import numpy as np
import app

def load():
    vectors, centroids = (os.path.join({folder!r}, name + ".npy") for name in ("vectors", "centroids"))
    there = os.path.exists(centroids)
    if not there:
        lists = app.wanted()
        made = np.empty((lists, app.LIST, app.DIM), "f4"), np.empty((lists, app.DIM), "f4")
        app.build(*made)
        np.save(vectors, made[0])
        np.save(centroids, made[1])
    return np.load(vectors), np.load(centroids), there

app.load = load
app.main()
"""


class Service:
    """A supervisor with a service."""

    def __init__(self, program: Path) -> None:
        env = os.environ | {"INDEX_BYTES": INDEX, "PORT": "0", "PYTHONPATH": os.pathsep.join([str(EXAMPLE), *sys.path])}
        command = [sys.executable, str(EXAMPLE / "run.py"), "--", sys.executable, str(program)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        self.port = int(self.line().split()[-1])
        self.pid, _ = self.ready()

    def line(self) -> str:
        """Read what it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() or sys.exit("the service did not come up")

    def ready(self) -> tuple[int, float]:
        """Wait until a service is ready: its pid, and milliseconds to have the index."""
        while "ready" not in (line := self.line()):
            pass
        words = line.split()
        return int(words[1]), float(words[-2])

    def end(self) -> None:
        """Have it end, and see that it did so in peace."""
        self.process.terminate()
        if self.process.wait(60):
            sys.exit(f"the supervisor ended with {self.process.returncode}")


async def client(port: int) -> dict[str, Any]:
    """Ask until stdin ends, over connections that are kept: latencies in milliseconds, and what failed.

    A line says when a service has answered for the first time.
    """
    latencies: list[float] = []
    failures: list[str] = []
    pids: set[int] = set()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)

    async def ask(http: httpx.AsyncClient, seed: int) -> None:
        numbers, until = random.Random(seed), time.monotonic() + LONGEST
        while not ended.is_set() and time.monotonic() < until:
            number, begun = numbers.randrange(1 << 30), time.perf_counter()
            try:
                answer = (await http.get(f"/search/{number}")).raise_for_status().json()
                if answer["hits"][0] != answer["query"]:
                    failures.append(f"wrong answer: {answer}")
                if answer["pid"] not in pids:
                    print("answered by", answer["pid"], flush=True)
                pids.add(answer["pid"])
            except httpx.HTTPError as error:
                failures.append(repr(error))
            latencies.append((time.perf_counter() - begun) * 1e3)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as http:
        await asyncio.gather(*(ask(http, seed) for seed in range(CONNECTIONS)))
    latencies.sort()
    return {
        "requests": len(latencies),
        "failures": len(failures),
        "first_failures": failures[:3],
        "services": len(pids),
        "p50_ms": latencies[len(latencies) // 2],
        "p99_ms": latencies[len(latencies) * 99 // 100],
        "max_ms": latencies[-1],
    }


def memory(*pids: int) -> int:
    """Bytes that processes take, of what they share their part."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def measure(way: str, program: Path, how: str) -> dict[str, Any]:
    """Load a service, and replace or kill it during the load."""
    service = Service(program)
    args = [sys.executable, __file__, "--client", str(service.port)]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        asking.stdout.readline()
        time.sleep(SECONDS)
        begun, before = time.perf_counter(), service.pid
        if how == "replaced":
            service.process.send_signal(signal.SIGHUP)
        else:
            os.kill(before, signal.SIGKILL)
        service.pid, index_ms = service.ready()
        restart = time.perf_counter() - begun
        taken = memory(before, service.pid)
        asking.stdout.readline()
        time.sleep(SECONDS)
        said, _ = asking.communicate(timeout=120)
    service.end()
    return {
        "way": f"{way}, {how}",
        **json.loads(said),
        "restart_s": restart,
        "index_ms": index_ms,
        "memory_bytes": taken,
    }


def main() -> None:
    """Measure every way, print a table or JSON."""
    if sys.argv[1:2] == ["--client"]:
        print(json.dumps(asyncio.run(client(int(sys.argv[2])))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reload = Path(folder) / "reload.py"
        reload.write_text(RELOAD.format(folder=folder))
        for how in ("replaced", "killed"):
            for way, program in (("kho.live", EXAMPLE / "app.py"), ("np.load", reload)):
                rows.append(measure(way, program, how))
    for row in rows:
        if row["services"] != 2:
            sys.exit(f"{row['way']}: {row['services']} services answered, not the one before and the one after")
    if "--json" in sys.argv:
        print(json.dumps({"index": INDEX, "connections": CONNECTIONS, "seconds": SECONDS, "rows": rows}, indent=1))
        return
    print(f"{INDEX + ' index':20}requests  failures    restart        index    memory       p50       p99       max")
    for row in rows:
        print(
            f"{row['way']:20}{row['requests']:8} {row['failures']:9} {row['restart_s']:8.2f} s "
            f"{row['index_ms']:9.1f} ms {row['memory_bytes'] >> 20:5} MiB {row['p50_ms']:6.1f} ms "
            f"{row['p99_ms']:6.1f} ms {row['max_ms']:6.0f} ms"
        )


if __name__ == "__main__":
    main()
