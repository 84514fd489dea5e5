"""Search an embedding index that stays in memory while this service is replaced: `python run.py -- python app.py`.

INDEX_BYTES=1G sets its size. The first process builds it; later processes find it in place. run.py keeps the memory and
the socket; `kho hold embedding-index -- python app.py` keeps the memory.
"""

import asyncio
import os
import re
import socket
import time
from contextlib import asynccontextmanager

import numpy as np
import uvicorn
from fastapi import FastAPI

import kho.live

DIM, LIST = 256, 1024  # floats of a vector, vectors of a list
DRAIN = float(os.environ.get("DRAIN_SECONDS", "3"))


def wanted() -> int:
    """Return the number of lists."""
    number, unit = re.fullmatch(r"(\d+)([MG])", os.environ.get("INDEX_BYTES", "1G")).groups()
    return max((int(number) << (20 if unit == "M" else 30)) // (LIST * DIM * 4), 4)


def build(vectors: np.ndarray, centroids: np.ndarray) -> None:
    """Draw random vectors around centroids; a real service would compute them for hours."""
    random = np.random.default_rng(1)
    centroids[:] = random.standard_normal(centroids.shape, "f4") * 4
    for vecs, centroid in zip(vectors, centroids, strict=True):
        random.standard_normal(out=vecs, dtype="f4")
        vecs += centroid


def load() -> tuple[np.ndarray, np.ndarray, bool]:
    """Return vectors, centroids, and whether they were inherited."""
    lists = wanted()
    backing = int(os.environ["MEMORY_FD"]) if "MEMORY_FD" in os.environ else "memfd"
    room = lists * (LIST + 1) * DIM * 4 + (64 << 20)
    h = kho.live.open("embedding-index", room, version=f"{lists} x {LIST} x {DIM}", backing=backing, timeout=60)
    there = "vectors" in h
    if not there:
        build(h.empty("vectors", (lists, LIST, DIM), "f4"), h.empty("centroids", (lists, DIM), "f4"))
        h.commit()
    if "MEMORY_FD" in os.environ:
        h.hand_over()  # this process only reads from here on, so a successor may adopt the image at any time
    app.state.handle = h
    return h["vectors"], h["centroids"], there


@asynccontextmanager
async def lifespan(app: FastAPI):
    """Load the index, and report it to the process that started this one."""
    begun = time.perf_counter()
    app.state.vectors, app.state.centroids, there = load()
    took = time.perf_counter() - begun
    if "READY_FD" in os.environ:
        with os.fdopen(int(os.environ["READY_FD"]), "w") as ready:
            print(f"{'found' if there else 'made'} the index in {took * 1e3:.1f} ms", file=ready)
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/search/{number}")
async def search(number: int) -> dict[str, object]:
    """Find the vectors nearest to the one with this number, in the lists of the nearest centroids."""
    vectors, centroids = app.state.vectors, app.state.centroids
    number %= vectors.shape[0] * LIST
    query = vectors[number // LIST, number % LIST]
    near = np.argpartition(((centroids - query) ** 2).sum(1), 2)[:2]
    distances = ((vectors[near] - query) ** 2).sum(2).ravel()
    best = np.argsort(distances)[:5]
    return {"query": number, "hits": (near[best // LIST] * LIST + best % LIST).tolist(), "pid": os.getpid()}


class Server(uvicorn.Server):
    """A server that closes its connections before it ends, so that no client finds its connection closed."""

    told = draining = False

    def handle_exit(self, sig: int, frame: object) -> None:
        """Start to drain; on the second signal, exit."""
        if self.told:
            self.should_exit = True
            return
        self.told = True
        self.loop.call_soon_threadsafe(lambda: setattr(self, "ending", self.loop.create_task(self.drain())))

    async def drain(self) -> None:
        """Stop accepting (the successor accepts), and answer the last request of each connection."""
        for listener in getattr(self, "servers", []):  # absent if the signal comes during the start
            for listening in listener.sockets:
                self.loop.remove_reader(listening.fileno())
        # Connections that are already accepted are served before clients are asked to connect again.
        await asyncio.sleep(0.1)
        self.draining = True
        until = time.monotonic() + DRAIN
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve."""
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def last_call(self, scope, receive, send) -> None:
        """Call the application; while draining, add `Connection: close` to each response."""

        async def say(message):
            if self.draining and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await app(scope, receive, say)


def main() -> None:
    """Serve on the socket in LISTEN_FD, or on a new one."""
    if "LISTEN_FD" in os.environ:
        listener = socket.socket(fileno=int(os.environ["LISTEN_FD"]))
    else:
        listener = socket.create_server(("127.0.0.1", 8000))
    server = Server(uvicorn.Config(app, log_level="warning", interface="asgi3", loop="asyncio"))
    server.config.app = server.last_call
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
