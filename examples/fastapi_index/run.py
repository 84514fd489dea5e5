"""Keep a listening socket and memory while the service that uses them is replaced: `python run.py -- python app.py`.

SIGHUP replaces the service: the next one starts, and when it is ready, the old one gets SIGTERM. If the next one does
not become ready, the old one continues. A service that dies is started again. Until then, connections wait in the
socket.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time

PORT = int(os.environ.get("PORT", "8000"))
PATIENCE = 600.0
SIGNALS = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}


def start(command: list[str], listener: int, memory: int) -> subprocess.Popen[bytes] | None:
    """Start a service and wait until it is ready; None if it is not."""
    begun = time.perf_counter()
    heard, ready = os.pipe()
    fds = {"LISTEN_FD": listener, "MEMORY_FD": memory, "READY_FD": ready}
    service = subprocess.Popen(
        command,
        pass_fds=list(fds.values()),
        env=os.environ | {name: str(fd) for name, fd in fds.items()},
    )
    os.close(ready)
    says = os.read(heard, 200).decode().strip() if select.select([heard], [], [], PATIENCE)[0] else ""
    os.close(heard)
    if not says:
        service.kill()
        print(f"service {service.pid} did not come up: exit code {service.wait()}", flush=True)
        return None
    print(f"service {service.pid} is ready after {time.perf_counter() - begun:.3f} s: {says}", flush=True)
    return service


def main() -> int:
    """Serve until SIGTERM."""
    command = sys.argv[sys.argv.index("--") + 1 :]
    received, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    with socket.create_server(("127.0.0.1", PORT), backlog=4096) as listener:
        print(f"listening on {listener.getsockname()[1]}", flush=True)
        memory = os.memfd_create("embedding-index", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        service = start(command, listener.fileno(), memory)
        ending: list[subprocess.Popen[bytes]] = []
        while service is not None:
            number = os.read(received, 1)[0]
            ending = [old for old in ending if old.poll() is None]
            if number == signal.SIGHUP:
                successor = start(command, listener.fileno(), memory)
                if successor is not None:
                    service.terminate()
                    ending.append(service)
                    service = successor
            elif number != signal.SIGCHLD:
                break
            elif service.poll() is not None:
                print(f"service {service.pid} ended with {service.returncode}", flush=True)
                service = start(command, listener.fileno(), memory)
        if service is None:
            return 1
        service.terminate()  # the services in `ending` have already got SIGTERM
        return int(sum(abs(old.wait()) for old in (*ending, service)) > 0)


if __name__ == "__main__":
    sys.exit(main())
