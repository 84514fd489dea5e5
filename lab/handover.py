"""A real handover: one kernel preserves and jumps, and the next is stopped as it is told of it, with all memory to look
at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .bench import Lab
from .claims import LabError
from .initramfs import GUEST
from .qemu import RAM, Console, Machine, arch_of

FDT_MAGIC = b"\xd0\x0d\xfe\xed"


@dataclass(frozen=True)
class File:
    """A memfd that the first kernel preserves; without `token` the session is empty."""

    session: str
    token: int | None = None
    size: int = 0
    pos: int = 0
    seals: int = 0
    seed: int = 1

    @property
    def line(self) -> str:
        """Its line in the guest's plan."""
        if self.token is None:
            return f"{self.session}\n"
        return f"{self.session} {self.token:#x} {self.size} {self.pos} {self.seals:#x} {self.seed}\n"

    @property
    def sha256(self) -> str:
        """The digest of its contents."""
        return hashlib.sha256(xorshift(self.size, self.seed)).hexdigest()


PLAN = (
    File("vm-1", 0x10, 393216, 196608, 0, 0x1111),
    File("vm-1", 0x11, 312, 156, 6, 0x2222),
    File("cache", 7, 18750, 9375, 0, 0x3333),
    File("cache", 8, 0, 0, 0, 0x4444),
    File("nothing-yet"),
)
"""What the bundled captures hold, and a session without files."""


def xorshift(nbytes: int, seed: int) -> bytes:
    """The contents that guest/hand.c writes: xorshift64 from `seed` on, little-endian."""
    state, mask, words = seed, (1 << 64) - 1, []
    for _ in range(-(-nbytes // 8)):
        state ^= state << 13 & mask
        state ^= state >> 7
        state ^= state << 17 & mask
        words.append(state.to_bytes(8, "little"))
    return b"".join(words)[:nbytes]


@dataclass
class Handed:
    """What the next kernel was told, what the first one showed, and how it went on."""

    console: Console
    fdt: int | None = None
    scratch: int | None = None
    scratch_len: int = 0
    dump: Path | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def shown(console: Console) -> dict[str, bytes]:
    """The files that the first kernel showed."""
    files: dict[str, bytes] = {}
    path, data = None, bytearray()
    for line in console.lines("HAND:"):
        word, _, rest = line.partition(" ")
        if word == "file":
            path, data = rest, bytearray()
        elif word == "hex" and path:
            data += bytes.fromhex(rest)
        elif word == "eof" and path:
            files[path], path = bytes(data), None
    return files


def _stopped(machine: Machine, address: int, result: Handed, dump: Path, memory: int) -> None:
    """Stop at kho_populate(fdt_phys, fdt_len, scratch_phys, scratch_len) of the next kernel, and dump the memory.

    The address belongs to other code in the first kernel, so the arguments are checked: the FDT is where it ought to
    be.
    """
    debugger = machine.debugger()
    machine.type("\n")
    first = RAM[machine.arch]
    for _ in range(8):
        if not debugger.run_to(address, 240):
            return
        fdt, _, scratch, length = debugger.arguments(machine.arch, 4)
        if first <= fdt < first + memory and not fdt % 4096 and machine.physical(fdt, 4) == FDT_MAGIC:
            result.fdt, result.scratch, result.scratch_len, result.dump = fdt, scratch, length, dump
            dump.unlink(missing_ok=True)
            machine.dump(dump)
            break
    debugger.forget(address)
    debugger.close()


def hand_over(
    lab: Lab,
    first: Path,
    then: Path,
    *,
    plan: Sequence[File] = PLAN,
    append: str = "",
    scratch: str = "24M,64M,32M",
    memory: int = 320,
    dump: Path | None = None,
    timeout: float = 240,
) -> Handed:
    """Boot `first`, preserve `plan`, jump into `then`, which takes everything and says so (guest/take.c).

    With `dump`, the next kernel is stopped at kho_populate, and the memory of that moment is written there. Its
    System.map must be next to `then`. Raises: LabError if the first kernel does not come to the jump.
    """
    arch = arch_of(first)
    names = "".join(f"{file.session} {file.token:#x}\n" for file in plan if file.token is not None)
    line = f"kho=on liveupdate=on kho_scratch={scratch} {append}"
    taking = lab.small_initramfs(GUEST / "take.c", arch, {"list": names.encode()})
    # `first` makes the archive this handover's own: it is removed below.
    files = {
        "first": str(first).encode(),
        "plan": "".join(file.line for file in plan).encode(),
        "kernel": then.read_bytes(),
    }
    files |= {"next.cpio": taking.read_bytes(), "line": lab.cmdline(arch, line).encode()}
    giving = lab.small_initramfs(GUEST / "hand.c", arch, files)
    with lab.start(first, initrd=giving, append=line, memory=f"{memory}M") as machine:
        if not machine.wait_for("HAND: ready", timeout):
            raise LabError(f"{first}: no handover:\n{machine.console().tail(30)}")
        before = machine.console()
        result = Handed(before, files=shown(before))
        if "HAND: kexec_file_load errno 0" not in before.text:
            raise LabError(f"{first}: {'; '.join(before.find('kexec_file_load'))}")
        if dump is not None:
            _stopped(machine, lab.kernels.symbols(then)["kho_populate"], result, dump, memory << 20)
        else:
            machine.type("\n")
        result.console = machine.wait(timeout)
    giving.unlink(missing_ok=True)
    return result
