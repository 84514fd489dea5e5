"""Virtual machines: QEMU with KVM where that boots a kernel, else with TCG; consoles; a stop at an address."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .claims import LabError

SYSTEMS = {"x86_64": ["qemu-system-x86_64"], "aarch64": ["qemu-system-aarch64", "-M", "virt"]}
CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}
ALWAYS = {"x86_64": "panic=-1 nokaslr no_timer_check", "aarch64": "panic=-1 nokaslr"}
"""On every command line: end QEMU on a panic; addresses of System.map; no test of timers on a busy host."""
RAM = {"x86_64": 0, "aarch64": 0x40000000}
"""Where the RAM of each machine begins."""


@dataclass(frozen=True)
class Console:
    """What a guest wrote on its serial console."""

    text: str
    path: Path | None = None
    timed_out: bool = False

    def lines(self, prefix: str) -> list[str]:
        """The rest of each line that begins with `prefix`, without the blank after it.

        printk may write into the middle of a line of a program; boot with loglevel=3 where that matters.
        """
        found = []
        for line in self.text.splitlines():
            at = line.find(prefix)
            if at == 0 or (at > 0 and line[at - 1] in "\r]"):
                found.append(line[at + len(prefix) :].strip())
        return found

    def find(self, *words: str) -> list[str]:
        """The lines that contain one of `words`."""
        return [line.strip() for line in self.text.splitlines() if any(word in line for word in words)]

    def tail(self, count: int = 12) -> str:
        """The last lines, as evidence."""
        return "\n".join(line.rstrip() for line in self.text.splitlines()[-count:])


def arch_of(kernel: Path) -> str:
    """The architecture of a kernel's image, from its header."""
    with kernel.open("rb") as file:
        head = file.read(0x210)
    if head[0x38:0x3C] == b"ARM\x64":
        return "aarch64"
    if head[0x202:0x206] == b"HdrS":
        return "x86_64"
    raise LabError(f"{kernel}: neither a bzImage nor an arm64 Image")


def accelerator(arch: str, kernel: Path, cache: Path) -> list[str]:
    """`-accel` and `-cpu`: KVM if a kernel writes its banner with it, else TCG. KHO_LAB_ACCEL decides without a
    trial.

    /dev/kvm alone proves nothing: some clouds have one that runs no 32-bit code, and a bzImage never starts there.
    """
    tcg = ["-accel", "tcg", "-cpu", "max"]
    if os.environ.get("KHO_LAB_ACCEL"):
        return ["-accel", os.environ["KHO_LAB_ACCEL"], "-cpu", "max"]
    if arch != os.uname().machine or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return tcg
    kvm, known = ["-accel", "kvm", "-cpu", "max"], cache / f"kvm-{os.uname().release}.json"
    if not known.exists():
        command = [
            *SYSTEMS[arch],
            *kvm,
            "-m",
            "512M",
            "-display",
            "none",
            "-nodefaults",
            "-no-reboot",
            "-kernel",
            str(kernel),
        ]
        command += ["-serial", "stdio", "-monitor", "none", "-append", f"console={CONSOLES[arch]} panic=-1"]
        try:
            said = subprocess.run(command, capture_output=True, timeout=15, check=False).stdout
        except subprocess.TimeoutExpired as late:
            said = late.stdout or b""
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps({"works": b"Linux version" in said}))
    return kvm if json.loads(known.read_text())["works"] else tcg


@dataclass
class Machine:
    """A running QEMU."""

    process: subprocess.Popen[bytes]
    console_path: Path
    folder: Path
    arch: str

    def console(self, timed_out: bool = False) -> Console:
        """What is on the console by now."""
        text = self.console_path.read_text(errors="replace") if self.console_path.exists() else ""
        return Console(text, self.console_path, timed_out)

    def wait(self, timeout: float) -> Console:
        """Wait until the guest ends, at most `timeout` seconds; then it is ended."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return self.console(timed_out=True)
        if self.process.returncode:
            error = self.process.stderr.read().decode(errors="replace") if self.process.stderr else ""
            raise LabError(f"{self.process.args!r:.200} ended with {self.process.returncode}: {error[-1000:]}")
        return self.console()

    def wait_for(self, word: str, timeout: float) -> bool:
        """Wait until `word` is on the console; False if the guest ends or the time is over before."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if word in self.console().text:
                return True
            if self.process.poll() is not None:
                return word in self.console().text
            time.sleep(0.05)
        return False

    def type(self, text: str) -> None:
        """Type on the guest's console."""
        with socket.socket(socket.AF_UNIX) as typed:
            typed.connect(str(self.folder / "console.sock"))
            typed.sendall(text.encode())
            typed.settimeout(1)
            try:
                while typed.recv(65536):  # QEMU drops what it has not read when this end closes
                    pass
            except TimeoutError:
                pass

    def debugger(self) -> Debugger:
        """The guest's processor, stopped."""
        return Debugger(self.folder / "gdb.sock")

    def dump(self, path: Path) -> None:
        """Write the guest's memory as an ELF core (`dump-guest-memory`)."""
        self.monitor("dump-guest-memory", paging=False, protocol=f"file:{path}")

    def physical(self, phys: int, nbytes: int) -> bytes:
        """Read physical memory of a stopped guest."""
        path = self.folder / "memory"
        self.monitor("pmemsave", val=phys, size=nbytes, filename=str(path))
        return path.read_bytes()

    def monitor(self, command: str, **arguments: object) -> None:
        """Run a command of QMP."""
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.connect(str(self.folder / "qmp.sock"))
            stream = qmp.makefile("rw")
            stream.readline()
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                while "return" not in (answer := json.loads(stream.readline())):
                    if "error" in answer:
                        raise LabError(f"QEMU: {answer['error']['desc']}")


class Debugger:
    """A client of QEMU's gdb stub: run to an address, and read registers."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.buffer = b""
        self.call("?")

    def close(self) -> None:
        """Detach: the guest runs on."""
        self.call("D")
        self.socket.close()

    def call(self, text: str, timeout: float = 60) -> str:
        """Send a packet, and return the answer."""
        raw = text.encode()
        self.socket.sendall(b"$" + raw + f"#{sum(raw) & 0xFF:02x}".encode())
        answer = self._packet(timeout)
        while answer.startswith("T") and text not in ("?", "c"):  # that the guest stopped for this client comes unasked
            answer = self._packet(timeout)
        return answer

    def _packet(self, timeout: float) -> str:
        self.socket.settimeout(timeout)
        while True:
            start = self.buffer.find(b"$")
            end = self.buffer.find(b"#", start)
            if start >= 0 and end >= 0 and len(self.buffer) >= end + 3:
                text, self.buffer = self.buffer[start + 1 : end], self.buffer[end + 3 :]
                self.socket.sendall(b"+")
                return text.decode()
            more = self.socket.recv(65536)
            if not more:
                raise LabError("the guest ended while the debugger waited")
            self.buffer += more

    def run_to(self, address: int, timeout: float) -> bool:
        """Continue until the processor is about to execute `address`; False if the time is over or the guest ends."""
        if (said := self.call(f"Z1,{address:x},1")) != "OK":
            raise LabError(f"QEMU's gdb stub sets no hardware breakpoint at {address:#x}: {said!r}")
        try:
            return self.call("c", timeout).startswith(("T", "S"))
        except (TimeoutError, LabError):
            return False
        finally:
            self.socket.settimeout(60)

    def forget(self, address: int) -> None:
        """Remove the breakpoint."""
        self.call(f"z1,{address:x},1")

    def arguments(self, arch: str, count: int) -> list[int]:
        """The first `count` arguments of the function that is about to run, at most four."""
        raw = bytes.fromhex(self.call("g").replace("x", "0"))
        words = struct.unpack(f"<{len(raw) // 8}Q", raw[: len(raw) // 8 * 8])
        order = (5, 4, 3, 2) if arch == "x86_64" else (0, 1, 2, 3)  # rdi rsi rdx rcx, of rax rbx rcx rdx rsi rdi
        return [words[i] for i in order[:count]]


@contextmanager
def started(
    kernel: Path,
    console: Path,
    *,
    accel: Sequence[str],
    initrd: Path | None = None,
    append: str = "",
    memory: str = "1280M",
    drives: Sequence[Path] = (),
    more: Sequence[str] = (),
    direct: bool = True,
) -> Iterator[Machine]:
    """Start a guest whose console goes to the file `console`; it is ended with the block.

    Without `direct`, QEMU does not load `kernel`: everything is in `more`. gdb.sock and qmp.sock are in the machine's
    `folder`.
    """
    arch = arch_of(kernel)
    with tempfile.TemporaryDirectory(prefix="kho-lab-") as name:
        folder = Path(name)
        console.parent.mkdir(parents=True, exist_ok=True)
        console.unlink(missing_ok=True)
        command = [*SYSTEMS[arch], *accel, "-m", memory, "-smp", "1", "-display", "none", "-nodefaults", "-no-reboot"]
        command += ["-chardev", f"socket,id=console,path={folder}/console.sock,server=on,wait=off,logfile={console}"]
        command += ["-serial", "chardev:console", "-monitor", "none"]
        command += [
            "-gdb",
            f"unix:{folder}/gdb.sock,server=on,wait=off",
            "-qmp",
            f"unix:{folder}/qmp.sock,server=on,wait=off",
        ]
        if direct:
            command += ["-kernel", str(kernel), "-append", f"console={CONSOLES[arch]} {ALWAYS[arch]} {append}"]
            command += ["-initrd", str(initrd)] if initrd else []
        for drive in drives:
            kind = "qcow2" if drive.suffix == ".qcow2" else "raw"
            command += ["-drive", f"file={drive},if=virtio,format={kind}"]
        command += more
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            yield Machine(process, console, folder, arch)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()
