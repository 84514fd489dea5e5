"""Memory that drgn, volatility3 and libkdumpfile have open is read as kho reads the same file itself."""

from __future__ import annotations

import lzma
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kho
from kho._kho import unpack_bytes
from kho.handover.describe import describe
from kho.readers import memory_of

from captures import DATA, NAMES, elf

SMALL = "linux-6.18.15-x86_64"
LUO = "linux-7.3.4-x86_64"


def run(program: str, *args: object, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_objects_are_no_memory_of_a_tool() -> None:
    assert memory_of("core.elf") is None
    assert memory_of(object()) is None
    with pytest.raises(TypeError):
        kho.open(object())


# drgn


def platform() -> Any:
    drgn = pytest.importorskip("drgn")
    flags = drgn.PlatformFlags.IS_64_BIT | drgn.PlatformFlags.IS_LITTLE_ENDIAN
    return drgn.Platform(drgn.Architecture.X86_64, flags)


def program(path: Path) -> Any:
    """A drgn program whose physical memory is that of a file, in segments."""
    drgn = pytest.importorskip("drgn")
    file = kho.Memory.open(path)
    prog = drgn.Program(platform())
    for start, size in file.ranges:
        prog.add_memory_segment(start, size, lambda address, n, offset, physical: file.read(address, n), physical=True)
    return prog


@pytest.mark.parametrize("name", NAMES)
def test_a_program_of_drgn_is_a_source(name: str) -> None:
    drgn = pytest.importorskip("drgn")
    from kho.readers.drgn import memory

    prog = program(elf(name))
    file = kho.Memory.open(elf(name))
    found = kho.open(memory(prog, file.ranges))
    assert describe(found)["folios"] == describe(kho.open(file))["folios"]
    with pytest.raises(kho.ParameterError, match=r"ranges of its memory are not known .*prog, ranges"):
        kho.open(prog)
    # Memory that drgn lacks is missing, and its error is the cause.
    hole = next(end for end in (start + size for start, size in file.ranges) if not holds(file, end))
    with pytest.raises(kho.LeftOutError, match="could not find physical memory segment") as raised:
        memory(prog, [(0, 1 << 40)]).read(hole, 8)
    assert isinstance(raised.value.__cause__, drgn.FaultError)
    assert isinstance(prog, drgn.Program)


def holds(memory: kho.Memory, phys: int) -> bool:
    return any(start <= phys < start + size for start, size in memory.ranges)


def test_ranges_of_a_program_are_those_of_its_core_dump(tmp_path: Path) -> None:
    pytest.importorskip("drgn")
    core = vmcore(tmp_path)
    output = run(
        """
import sys, drgn, kho
prog = drgn.Program()
prog.set_core_dump(sys.argv[1])
inc = kho.open(prog)
print(inc.compatible, inc.nr_folios, inc.vmcoreinfo("OSRELEASE"))
""",
        core,
    )
    assert output.split() == ["kho-v4", "4", "7.3.4"]


def vmcore(folder: Path) -> Path:
    """A dump of Linux 7.3.4 after a live update, unpacked: drgn reads no zstd."""
    packed = DATA / "symbols/linux-7.3.4-after-update.elf.zst"
    path = folder / "vmcore"
    path.write_bytes(unpack_bytes(packed, packed.read_bytes(), 64 << 20))
    return path


def test_ranges_of_a_program_without_a_file_are_the_kernels_own() -> None:
    drgn = pytest.importorskip("drgn")
    file = kho.Memory.open(elf(SMALL))
    prog = drgn.Program(platform())
    word = prog.int_type("unsigned long", 8, False)
    text = prog.pointer_type(prog.int_type("char", 1, True))
    links = ("parent", "sibling", "child")

    def link(name: str) -> Any:
        return drgn.TypeMember(
            lambda: prog.pointer_type(prog.type("struct resource")), name, 64 * (3 + links.index(name))
        )

    members = (
        drgn.TypeMember(word, "start", 0),
        drgn.TypeMember(word, "end", 64),
        drgn.TypeMember(text, "name", 128),
        *map(link, links),
    )
    resource = prog.struct_type("resource", 48, members)
    prog.register_type_finder(
        "test", lambda prog, kinds, name, filename: resource if name == "resource" else None, enable_index=0
    )
    base, size, names = 0xFFFF888000000000, 48, b"System RAM\0PCI Bus\0"
    rows = [(*run, 0) for run in file.ranges] + [(1 << 40, 4096, 11)]
    memory = bytearray(struct.pack("<6Q", 0, 2**64 - 1, base + 11, 0, 0, base + 64 + size))
    for n, (start, nbytes, name) in enumerate(rows, 1):
        sibling = 0 if n == len(rows) else base + 64 + size * (n + 1)
        memory += struct.pack("<6Q", start, start + nbytes - 1, base + name, base + 64, sibling, 0)
    memory[:0] = names.ljust(64, b"\0")
    prog.add_memory_segment(base, len(memory), lambda address, n, offset, physical: memory[offset : offset + n])
    prog.register_object_finder(
        "test",
        lambda prog, name, flags, filename: (
            drgn.Object(prog, resource, address=base + 64) if name == "iomem_resource" else None
        ),
        enable_index=0,
    )
    for start, nbytes in file.ranges:
        prog.add_memory_segment(
            start, nbytes, lambda address, n, offset, physical: file.read(address, n), physical=True
        )
    found = memory_of(prog)
    assert found is not None
    assert found.ranges == file.ranges
    assert kho.open(prog).nr_folios == 16


DRGN = """
import sys
from drgn.cli import run_interactive
import drgn, kho
from drgn.commands import DEFAULT_COMMAND_NAMESPACE as commands
prog = drgn.Program()
prog.set_core_dump(sys.argv[1])
found = commands.run(prog, sys.argv[2])
print(type(found).__name__)
"""


@pytest.mark.parametrize(
    ("command", "text", "returned"),
    [
        ("kho", "kho-v4 handover", "Incoming"),
        ("kho --fdt-phys {fdt}", "Preserved: 4 folios", "Incoming"),
        ("kho owners", "subtree", "Owners"),
        ("kho verify", "errors", "Findings"),
    ],
)
def test_drgn_has_the_command_kho(tmp_path: Path, command: str, text: str, returned: str) -> None:
    drgn = pytest.importorskip("drgn")
    if not hasattr(drgn, "commands"):
        pytest.importorskip("drgn.commands")
    core = vmcore(tmp_path)
    fdt = hex(kho.open(core).fdt_phys)
    env = {"DRGN_PLUGINS": "kho=kho.plugins.drgn", "DRGN_DISABLE_PLUGINS": "*"}
    output = run(DRGN, core, command.format(fdt=fdt), env=env)
    assert text in output
    assert output.splitlines()[-1] == returned


def test_an_error_of_the_command_is_one_of_drgn(tmp_path: Path) -> None:
    pytest.importorskip("drgn.commands")
    env = {"DRGN_PLUGINS": "kho=kho.plugins.drgn", "DRGN_DISABLE_PLUGINS": "*"}
    program = DRGN.replace("found = ", "import contextlib\nfrom drgn.commands import CommandError\ntry:\n    found = ")
    program += "\nexcept CommandError as error:\n    print('CommandError', error)\n"
    program = program.replace("print(type", "    print(type")
    output = run(program, vmcore(tmp_path), "kho --fdt-phys 1000", env=env)
    assert output.startswith("CommandError ")


def test_the_package_names_the_plugin_of_drgn() -> None:
    import tomllib

    project = tomllib.loads((DATA.parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["drgn.plugins"] == {"kho": "kho.plugins.drgn"}


# volatility3

VOLATILITY = """
import sys
from volatility3.cli import main
sys.argv = ["vol", *sys.argv[1:]]
main()
"""


def volatility(*args: object) -> list[list[str]]:
    pytest.importorskip("volatility3")
    plugins = Path(kho.__file__).parent / "plugins/volatility3"
    output = run(VOLATILITY, "-q", "--offline", "-r", "csv", "--plugin-dirs", plugins, *args)
    return [line.split(",") for line in output.splitlines() if "," in line]


@pytest.mark.parametrize("name", [SMALL, LUO])
def test_volatility3_lists_what_is_preserved(name: str) -> None:
    rows = volatility("-f", elf(name), "khohandover.Folios")
    assert rows[0][1:] == ["Address", "Bytes", "Owner", "Part"]
    expected = kho.owners.owners(kho.open(elf(name))).rows
    assert [(int(row[1], 0), int(row[2], 0)) for row in rows[1:]] == [(row.phys, row.nbytes) for row in expected]


def test_volatility3_lists_files_and_findings() -> None:
    rows = volatility("-f", elf(LUO), "khohandover.Files")
    sessions: Any = kho.open(elf(LUO)).luo.sessions
    expected = [[name, hex(token), str(f.size)] for name, s in sessions.items() for token, f in s.files.items()]
    assert [[row[1], row[2], row[4]] for row in rows[1:]] == expected
    assert volatility("-f", elf(SMALL), "khohandover.Findings")[0][1:] == ["Severity", "Id", "Place", "Value"]


def test_names_of_an_image_reach_the_terminal_of_volatility3_escaped(tmp_path: Path) -> None:
    out = kho.Outgoing(kho.Arena("64M", scratch="1M,1M,1M"), "kho-v4")
    out.add_memfd("vm\x1b[2J", 1, b"x")
    out.finalize()
    out.save(tmp_path / "core.elf")
    shown = [volatility("-f", tmp_path / "core.elf", f"khohandover.{plugin}") for plugin in ("Files", "Folios")]
    for rows in shown:
        cells = [cell for row in rows for cell in row]
        assert not any("\x1b" in cell for cell in cells)
        assert any("\\x1b[2J" in cell for cell in cells), cells


def test_layers_of_volatility3_are_sources() -> None:
    pytest.importorskip("volatility3")
    output = run(
        """
import sys, kho
from volatility3.framework import contexts
from volatility3.framework.layers import elf, physical
context = contexts.Context()
context.config["base.location"] = "file://" + sys.argv[1]
context.add_layer(physical.FileLayer(context, "base", "base"))
context.config["core.base_layer"] = "base"
layer = elf.Elf64Layer(context, "core", "core")
context.add_layer(layer)
memory = kho.readers.memory_of(layer)
missing = set(kho.Memory.open(sys.argv[1]).ranges) - set(memory.ranges)
print(sorted(missing), kho.open(layer).nr_folios)
try:
    kho.Memory.from_reader(lambda phys, n: memory.read(phys, n), [(0, 1 << 40)]).read(0, 8)
except kho.OutsideMemoryError as error:
    print(type(error).__name__)
try:
    kho.open(context)
except kho.ParameterError as error:
    print(error)
""",
        elf(LUO),
    )
    lines = output.splitlines()
    # volatility3 leaves out segments without bytes in the file, here the zeros at the end.
    assert lines[:2] == ["[(263278592, 65536)] 134", "OutsideMemoryError"]
    assert lines[2] == "a Context of volatility3 is no memory: a layer is"


# libkdumpfile


def kdump(path: Path) -> Any:
    """The dump, opened with the bindings that are installed."""
    kdumpfile = pytest.importorskip("kdumpfile", reason="the Python bindings of libkdumpfile are not installed")
    if not hasattr(kdumpfile, "Context"):
        return kdumpfile.kdumpfile(str(path))
    dump = kdumpfile.Context()
    dump.open(str(path))
    return dump


@pytest.mark.parametrize("name", ["qemu-q35.elf", "qemu-q35-raw.kdump", "vmcore"])
def test_a_dump_of_libkdumpfile_has_the_memory_that_kho_reads(name: str, tmp_path: Path) -> None:
    pytest.importorskip("kdumpfile", reason="the Python bindings of libkdumpfile are not installed")
    if name == "vmcore":
        path = vmcore(tmp_path)
    else:
        path = tmp_path / name
        path.write_bytes(lzma.decompress((DATA / f"dumps/{name}.xz").read_bytes()))
    memory, own = memory_of(kdump(path)), kho.Memory.open(path)
    assert memory is not None
    at = memory.next_data(0)
    pages = 0
    while at is not None and pages < 512:
        for phys in range(at[0], at[0] + min(at[1], 1 << 20), 4096):
            assert memory.read(phys, 4096) == own.read(phys, 4096)
            pages += 1
        at = memory.next_data(at[0] + at[1])
    assert pages > 0
    assert memory.vmcoreinfo("OSRELEASE") == own.vmcoreinfo("OSRELEASE")


def test_a_handover_is_found_through_libkdumpfile(tmp_path: Path) -> None:
    path = vmcore(tmp_path)
    assert describe(kho.open(kdump(path)))["folios"] == describe(kho.open(path))["folios"]


def test_a_dump_whose_pages_libkdumpfile_does_not_know_needs_ranges(tmp_path: Path) -> None:
    path = tmp_path / "virt.elf"
    path.write_bytes(lzma.decompress((DATA / "dumps/qemu-virt.elf.xz").read_bytes()))
    dump = kdump(path)
    from kho.readers.kdumpfile import memory

    ranges = kho.Memory.open(path).ranges
    try:
        assert memory(dump).ranges == ranges
    except kho.ParameterError as error:
        assert "memory(dump, ranges)" in str(error)
    assert memory(dump, ranges).ranges == ranges
