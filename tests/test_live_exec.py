"""kho.live: an image stays with its process across exec."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kho
import kho.live
from kho.live.transports import environ

pytestmark = pytest.mark.usefixtures("sockets")


STAGES = """
import os, sys, kho.live
n = int(sys.argv[1])
h = kho.live.open("x", "4M")
fds = len(os.listdir("/proc/self/fd"))
print(n, h.transport, h.inherited, h.generation, h.served, fds, "KHO_LIVE_FDS" in os.environ, flush=True)
h.put("n", str(n).encode())
if n == 0:
    try: kho.live.exec([sys.executable])
    except kho.FinalizedError as error: print("refused", flush=True)
h.commit()
if n == 0:
    try: kho.live.exec(["/nonexistent"])
    except FileNotFoundError: print(os.get_inheritable(h.fileno()), flush=True)
if n < 4:
    kho.live.exec([sys.executable, *sys.argv[:0], "-c", os.environ["PROGRAM"], str(n + 1)])
h.release()
"""


def test_an_image_goes_across_exec_again_and_again(sockets: Path) -> None:
    run = [sys.executable, "-c", STAGES, "0"]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PROGRAM": STAGES})
    assert done.stderr == ""
    first, *others = [line.split() for line in done.stdout.splitlines()]
    assert first[:5] == ["0", "new", "False", "0", "True"]
    assert others[:2] == [["refused"], ["False"]]
    assert [line[:5] for line in others[2:]] == [[str(n), "exec", "True", str(n), "True"] for n in range(1, 5)]
    assert {(line[5], line[6]) for line in others[2:]} == {(first[5], "False")}, "and no descriptor is lost on the way"
    assert list(sockets.iterdir()) == []


def test_no_other_process_gets_the_name_during_exec() -> None:
    program = (
        "import sys, time, kho.live\n"
        "if len(sys.argv) == 1:\n"
        "    h = kho.live.open('x', '4M'); h.put('a', b'1'); h.commit(); print('go', flush=True)\n"
        "    kho.live.exec([sys.executable, '-c', 'import time; time.sleep(0.5)\\n' + sys.orig_argv[2], 'again'])\n"
        "h = kho.live.open('x'); print(h.transport, flush=True); h.handed_over.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "go\n"
        time.sleep(0.2)
        with kho.live.open("x", timeout=20) as h:
            assert (h.transport, h.generation) == ("socket", 1)
            assert old.stdout.read() == "exec\n"


@pytest.mark.parametrize("value", ["x", "x:3", "x:a:-:-", "x:3:-:-:-", ":3:-:-", "x:99999999:-:-", "x:3:-:-;y"])
def test_a_malformed_variable_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environ.VARIABLE, value)
    with pytest.raises(kho.SourceError, match="is no NAME:FD:LOCK:LISTENER"):
        kho.live.open("x", "4M")


def test_a_closed_descriptor_in_the_variable_does_not_lead_to_a_new_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for fds in ("900:-:-", "900:901:-", "0:-:-", "1:-:902"):
        monkeypatch.setenv(environ.VARIABLE, f"y:5:-:-,x:{fds}")
        with pytest.raises(kho.SourceError, match="must leave its descriptors open"):
            kho.live.open("x", "4M")
    file = os.open("/dev/null", os.O_RDWR)
    monkeypatch.setenv(environ.VARIABLE, f"x:{file}:-:-")
    with pytest.raises(kho.SourceError, match=f"descriptor {file} is another file"):
        kho.live.open("x", "4M")
    os.close(file)
    with kho.live.open("x", "4M") as h:
        assert h.transport == "new", "it was reported once"
