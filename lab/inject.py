"""Boot a kernel into a handover image: the state in which the last kernel would have left the machine.

The image's pages are loaded to their addresses, kernel and archive into scratch. On x86_64 a multiboot stub enters
the bzImage's 32-bit entry with a `struct boot_params` whose setup_data has one SETUP_KEXEC_KHO node; on arm64 a
trampoline enters the Image with a devicetree whose /chosen has linux,kho-fdt and linux,kho-scratch. Sources:
Documentation/arch/x86/boot.rst, arch/x86/include/uapi/asm/setup_data.h, drivers/of/fdt.c.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kho

from .claims import LabError
from .qemu import ALWAYS, CONSOLES, RAM, arch_of

MIB = 1 << 20
FDT_BYTES = 4096
SETUP_KEXEC_KHO = 10
MULTIBOOT = 0x1BADB002
MULTIBOOT_ADDRESSES = 1 << 16


@dataclass(frozen=True)
class Handover:
    """The addresses that a kernel is told of a handover."""

    fdt: int
    fdt_len: int
    scratch: int
    scratch_len: int
    areas: list[tuple[int, int]]
    parts: list[tuple[int, bytes]]


def read(image: Path) -> Handover:
    """Read an image as the next kernel is told of it.

    Raises: LabError if its scratch array is not known.
    """
    inc = kho.open(image)
    if inc.scratch is None or inc.scratch_phys is None:
        raise LabError(f"{image}: the array of scratch areas was not found")
    memory = kho.Memory.open(image)
    parts = [(phys, memory.read(phys, nbytes)) for phys, nbytes in memory.ranges]
    fdt_len = max(inc.page_size, FDT_BYTES)
    return Handover(inc.fdt_phys, fdt_len, inc.scratch_phys, 16 * len(inc.scratch), inc.scratch, parts)


def setup_data(handover: Handover) -> bytes:
    """The one node of the list: struct setup_data, then struct kho_data."""
    node = struct.pack("<QII", 0, SETUP_KEXEC_KHO, 32)
    return node + struct.pack("<QQQQ", handover.fdt, handover.fdt_len, handover.scratch, handover.scratch_len)


def e820(top: int) -> list[tuple[int, int, int]]:
    """The memory map that SeaBIOS gives a machine of `top` bytes below the PCI hole: (start, bytes, type)."""
    return [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xF0000, 0x10000, 2),
        (MIB, top - 0x20000 - MIB, 1),
        (top - 0x20000, 0x20000, 2),
        (0xFFFC0000, 0x40000, 2),
    ]


def boot_params(
    bz: bytes, *, top: int, code32: int, cmdline: int, data: int, initrd: tuple[int, int], cmdline_size: int
) -> bytes:
    """The zero page: the bzImage's setup header with the loader's fields, and the memory map."""
    page = bytearray(4096)
    end = 0x202 + bz[0x201]
    page[0x1F1:end] = bz[0x1F1:end]
    page[0x210] = 0xFF  # type_of_loader: undefined
    struct.pack_into("<I", page, 0x214, code32)
    struct.pack_into("<II", page, 0x218, *initrd)
    struct.pack_into("<I", page, 0x228, cmdline)
    struct.pack_into("<I", page, 0x238, cmdline_size)
    struct.pack_into("<Q", page, 0x250, data)
    areas = e820(top)
    page[0x1E8] = len(areas)
    for i, area in enumerate(areas):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * i, *area)
    return bytes(page)


def multiboot(at: int, params: int, entry: int) -> bytes:
    """A flat multiboot image, loaded at `at`, that jumps to `entry` with esi = `params`.

    cli; cld; mov esi, params; mov eax, entry; xor ebp, edi, ebx; jmp eax
    """
    code = b"\xfa\xfc\xbe" + struct.pack("<I", params) + b"\xb8" + struct.pack("<I", entry)
    code += b"\x31\xed\x31\xff\x31\xdb\xff\xe0"
    end = at + 32 + len(code)
    head = (MULTIBOOT, MULTIBOOT_ADDRESSES, -(MULTIBOOT + MULTIBOOT_ADDRESSES) & 0xFFFFFFFF, at, at, end, end, at + 32)
    return struct.pack("<8I", *head) + code


def arm64_jump(tree: int, entry: int) -> bytes:
    """Code that jumps to `entry` with x0 = `tree`: ldr x0; x1 = x2 = x3 = 0; ldr x4; br x4; the two literals."""
    words = (0x580000C0, 0xAA1F03E1, 0xAA1F03E2, 0xAA1F03E3, 0x58000084, 0xD61F0080)
    return struct.pack("<6IQQ", *words, tree, entry)


def place(handover: Handover, need: int, align: int) -> int:
    """The address in scratch for `need` bytes: in the largest area that has them."""
    for start, nbytes in sorted(handover.areas, key=lambda area: -area[1]):
        at = -(-start // align) * align
        if at + need <= start + nbytes:
            return at
    sizes = ", ".join(f"{nbytes / MIB:.0f} MiB at {start:#x}" for start, nbytes in handover.areas)
    raise LabError(f"no scratch area has room for kernel and archive, {need / MIB:.1f} MiB: {sizes}")


def memory_for(handover: Handover, arch: str) -> int:
    """MiB of RAM that hold all the image names, in steps of 256: captures are of machines of that size."""
    end = max(
        [phys + len(data) for phys, data in handover.parts] + [start + nbytes for start, nbytes in handover.areas]
    )
    step = 256 * MIB
    return -(-(end - RAM[arch]) // step) * step // MIB


def x86_layout(
    bz: bytes, archive: bytes, handover: Handover, append: str, memory: int
) -> tuple[bytes, list[tuple[int, bytes]]]:
    """The multiboot stub, and what is loaded where."""
    setup = ((bz[0x1F1] or 4) + 1) * 512
    align, (init_size,) = struct.unpack_from("<I", bz, 0x230)[0], struct.unpack_from("<I", bz, 0x260)
    code = bz[setup:]
    room = -(-max(init_size, len(code)) // MIB) * MIB
    start = place(handover, room + MIB + len(archive), align)
    params, line, data, stub, initrd = (start + room + offset for offset in (0, 0x1000, 0x3000, 0x10000, MIB))
    words = (
        f"console={CONSOLES['x86_64']} earlyprintk=serial kho=on liveupdate=on {ALWAYS['x86_64']} {append}".encode()
        + b"\0"
    )
    page = boot_params(
        bz,
        top=memory * MIB,
        code32=start,
        cmdline=line,
        data=data,
        initrd=(initrd, len(archive)),
        cmdline_size=len(words),
    )
    parts = [(start, code), (params, page), (line, words), (data, setup_data(handover)), (initrd, archive)]
    return multiboot(stub, params, start), parts


def cells(*values: int) -> bytes:
    """Numbers of 64 bits, as a devicetree has them."""
    return struct.pack(f">{len(values)}Q", *values)


def with_chosen(tree: bytes, chosen: dict[str, bytes]) -> bytes:
    """A devicetree with properties of /chosen added or replaced."""
    fdt, writer = kho.fdt.parse(tree), kho.fdt.Writer(len(tree) + 65536)

    def copy(node: kho.fdt.Node) -> None:
        with writer.node(node.name):
            own = {name: node[name] for name in node.properties}
            if node.path == "/chosen":
                own |= chosen
            for name, value in own.items():
                writer.property(name, value)
            for child in node.children:
                copy(child)

    for at, nbytes in fdt.reservations:
        writer.add_reservemap_entry(at, nbytes)
    copy(fdt.root)
    return writer.finish()


def arm64_layout(
    kernel: bytes, tree: bytes, archive: bytes, handover: Handover, append: str
) -> tuple[int, list[tuple[int, bytes]]]:
    """The address of the trampoline, and what is loaded where."""
    (size,) = struct.unpack_from("<Q", kernel, 16)  # with its BSS
    room = -(-max(size, len(kernel)) // (2 * MIB)) * 2 * MIB
    start = place(handover, room + 3 * MIB + len(archive), 2 * MIB)
    jump, at, initrd = start + room, start + room + MIB, start + room + 3 * MIB
    line = f"console={CONSOLES['aarch64']} earlycon=pl011,0x9000000 kho=on liveupdate=on {ALWAYS['aarch64']} {append}"
    chosen = {
        "bootargs": line.encode() + b"\0",
        "linux,kho-fdt": cells(handover.fdt, handover.fdt_len),
        "linux,kho-scratch": cells(handover.scratch, handover.scratch_len),
        "linux,initrd-start": cells(initrd),
        "linux,initrd-end": cells(initrd + len(archive)),
    }
    parts = [(start, kernel), (at, with_chosen(tree, chosen)), (initrd, archive), (jump, arm64_jump(at, start))]
    return jump, parts


@contextmanager
def loaded(
    kernel: Path, image: Path, initrd: Path, append: str, memory: int | None, folder: Path
) -> Iterator[tuple[int, list[str]]]:
    """Prepare a boot: MiB of RAM, and arguments for QEMU. `folder` is removed with the block."""
    handover, arch = read(image), arch_of(kernel)
    size = memory or memory_for(handover, arch)
    try:
        if arch == "x86_64":
            stub, parts = x86_layout(kernel.read_bytes(), initrd.read_bytes(), handover, append, size)
            (folder / "stub").write_bytes(stub)
            more = ["-kernel", str(folder / "stub")]
        else:
            machine = ["qemu-system-aarch64", "-M", f"virt,dumpdtb={folder}/machine.dtb", "-cpu", "max", "-smp", "1"]
            subprocess.run([*machine, "-m", f"{size}M", "-display", "none"], check=True, capture_output=True)
            tree = (folder / "machine.dtb").read_bytes()
            jump, parts = arm64_layout(kernel.read_bytes(), tree, initrd.read_bytes(), handover, append)
            more = ["-device", f"loader,addr={jump:#x},cpu-num=0"]
        for i, (phys, data) in enumerate([*parts, *handover.parts]):
            if data:
                (folder / f"{i}").write_bytes(data)
                more += ["-device", f"loader,file={folder}/{i},addr={phys:#x},force-raw=on"]
        yield size, more
    finally:
        shutil.rmtree(folder, ignore_errors=True)
