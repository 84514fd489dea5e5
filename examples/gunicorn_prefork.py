"""Pre-forked workers share one table, read-only and in place: `gunicorn --preload -w 4 gunicorn_prefork:app`.

The master owns the image, so there is one for all workers, and it stays when workers are replaced. A second gunicorn
(SIGUSR2) takes it over from the first. With IMAGE=/dev/shm/table, or under `kho hold table -- ...`, it also stays when
gunicorn is stopped and started.
"""

import json
import os

import kho

h = kho.live.open("table", "512M", version="1", backing=os.environ.get("IMAGE", "memfd"), timeout=30)
if "table" not in h:
    table = h.empty("table", (1 << 20, 16), "f4")
    for column in range(16):
        table[:, column] = column
    h.commit()
if "IMAGE" in os.environ:
    h.hand_over()  # this gunicorn only reads from here on, and the next one may adopt the image


def app(environ, start_response):
    """Answer with a row's sum, and with the worker that computed it."""
    row = int(environ["PATH_INFO"].strip("/") or 0)
    answer = {
        "sum": float(h["table"][row].sum()),
        "worker": os.getpid(),
        "inherited": h.inherited,
        "generation": h.generation,
        "at": h["table"].ctypes.data,
    }
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps(answer).encode()]
