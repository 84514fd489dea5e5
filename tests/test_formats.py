"""Compressed files and pipes are read; unsupported formats are named with the remedy."""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import io
import lzma
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import kho
from kho import errors
from kho._kho import Memory
from test_sources import core

import captures
import dumpfiles
from command import kho as run
from command import process
from livefiles import descriptors

PACKED = captures.DATA / "packed"
CAPTURE = captures.elf("linux-7.3.4-x86_64")
PLAIN = gzip.decompress((PACKED / "small.elf.gz").read_bytes())
HINT = "A raw image needs its address"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put temporary files into a directory that must be empty after each test."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    assert list(folder.iterdir()) == []


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC of snappy frames."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


CRC = [functools.reduce(lambda c, _: c >> 1 ^ (0x82F63B78 if c & 1 else 0), range(8), n) for n in range(256)]


def snappy_frames(data: bytes) -> bytes:
    """Snappy's framing format, chunks stored (google/snappy, framing_format.txt)."""
    out = b"\xff\x06\0\0sNaPpY"
    for at in range(0, len(data), 65536):
        chunk = data[at : at + 65536]
        crc = crc32c(chunk)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        out += b"\x01" + struct.pack("<I", len(chunk) + 4)[:3] + struct.pack("<I", masked) + chunk
    return out


def avml(runs: list[tuple[int, bytes]]) -> bytes:
    """AVML's version 2 (microsoft/avml, src/image.rs): header, frames, their length."""
    out = b""
    for phys, data in runs:
        frames = snappy_frames(data)
        out += (
            b"AVML" + struct.pack("<IQQQ", 2, phys, phys + len(data) - 1, 0) + frames + struct.pack("<Q", len(frames))
        )
    return out


def same(memory: Memory) -> None:
    """Compare memory with that of the uncompressed file."""
    path = Path(os.environ["TMPDIR"]).parent / "plain.elf"
    path.write_bytes(PLAIN)
    plain = Memory.open(path)
    assert memory.ranges == plain.ranges
    for phys, size in plain.ranges:
        assert memory.read(phys, min(size, 1 << 20)) == plain.read(phys, min(size, 1 << 20))


@pytest.mark.parametrize("name", sorted(p.name for p in PACKED.glob("*.elf.*")))
def test_files_compressed_by_other_programs_are_read(name: str) -> None:
    assert hashlib.sha256(PLAIN).hexdigest() in (PACKED / "README.md").read_text()
    same(Memory.open(PACKED / name))
    inc = kho.open(str(PACKED / name))
    assert inc.luo.sessions["vm-1"].files[0xFFFFFFFFFFFFFFFE].read() == b"guest state " * 100
    for command in ("inspect", "owners", "map", "fdt"):
        assert run(command, PACKED / name).code == 0
    assert run("verify", PACKED / name).code == 0


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": dumpfiles.zstd,
    "sz": snappy_frames,
}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("what", ["elf", "kdump", "lime", "flat"])
def test_every_format_is_read_from_every_compression(kind: str, what: str, tmp_path: Path) -> None:
    pages = {phys: Random(phys).randbytes(4096) for phys in (0x1000, 0x2000, 0x7000)}
    runs = list(pages.items())
    made = {
        "elf": lambda: core(*((phys, len(page), page) for phys, page in runs)),
        "kdump": lambda: dumpfiles.kdump(pages),
        "lime": lambda: dumpfiles.lime(runs),
        "flat": lambda: dumpfiles.flatten(dumpfiles.kdump(pages)),
    }[what]()
    path = tmp_path / "packed"  # the format is detected from the content, not the name
    path.write_bytes(PACKERS[kind](made))
    memory = Memory.open(path)
    assert memory.ranges == [(0x1000, 0x2000), (0x7000, 0x1000)]
    for phys, page in runs:
        assert memory.read(phys, 4096) == page


def test_concatenated_members_and_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    for pack in PACKERS.values():
        if pack is snappy_frames:
            continue
        path.write_bytes(pack(PLAIN[:5000]) + pack(PLAIN[5000:]))
        same(Memory.open(path))


def test_a_raw_image_is_decompressed_only_if_its_name_has_the_suffix(tmp_path: Path) -> None:
    """Raw memory may begin with the magic of a compression format."""
    content = b"\1" * 8192
    packed, raw = tmp_path / "ram.bin.gz", tmp_path / "ram.bin"
    for path in (packed, raw):
        path.write_bytes(gzip.compress(content))
    assert Memory.open(f"{packed}@0x40000000").ranges == [(0x40000000, 8192)]
    assert Memory.open(f"{packed}@0x40000000,offset=4096").ranges == [(0x40000000, 4096)]
    assert Memory.open(f"{raw}@0x40000000").read(0x40000000, 3) == b"\x1f\x8b\x08"


def test_avml_gives_the_original_memory(tmp_path: Path) -> None:
    inc = Memory.open(CAPTURE)
    runs = [(phys, inc.read(phys, size)) for phys, size in inc.ranges]
    path = tmp_path / "host.avml"
    path.write_bytes(avml(runs))
    assert [(phys, data) for phys, data in runs] == [
        (p, Memory.open(path).read(p, n)) for p, n in Memory.open(path).ranges
    ]
    assert run("inspect", "--json", path).json["nr_folios"] == kho.open(CAPTURE).nr_folios
    for cut in (33, 100, len(path.read_bytes()) - 3):
        path.write_bytes(avml(runs)[:cut])
        done = run("inspect", path)
        assert done.code == 2
        assert "AVML" in done.err


@pytest.mark.parametrize("kind", [*PACKERS, "lz4", "avml"])
def test_a_damaged_compressed_file_gives_an_error_or_the_same_memory(kind: str, tmp_path: Path) -> None:
    if kind in ("lz4", "zst"):
        whole = (PACKED / f"small.elf.{kind}").read_bytes()
    else:
        whole = avml([(0x1000, b"abcd" * 1024)]) if kind == "avml" else PACKERS[kind](PLAIN)
    random = Random(kind)
    path = tmp_path / "packed"
    for _ in range(60):
        broken = bytearray(whole)
        if random.random() < 0.5:
            del broken[random.randrange(8, len(broken)) :]
        else:
            broken[random.randrange(4, len(broken))] ^= 1 << random.randrange(8)
        path.write_bytes(broken)
        try:
            memory = Memory.open(path)
        except errors.SourceError as error:
            assert str(path) in str(error)
        else:
            for phys, size in memory.ranges[:4]:
                memory.read(phys, min(size, 4096))


# Bounds


def test_a_file_that_decompresses_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zeros.gz"
    path.write_bytes(gzip.compress(bytes(3 << 20)))
    with pytest.raises(errors.SourceError, match="more than 1048576 bytes come out of it") as caught:
        kho.open(path, unpack_limit=1 << 20)
    assert "KHO_UNPACK_LIMIT" in str(caught.value)
    assert "gzip -d" in str(caught.value)
    monkeypatch.setenv("KHO_UNPACK_LIMIT", "2M")
    assert "more than 2097152 bytes" in run("inspect", path).err
    monkeypatch.setenv("KHO_UNPACK_LIMIT", "4M")
    assert "no handover" in run("inspect", path).err
    monkeypatch.setenv("KHO_UNPACK_LIMIT", "much")
    assert run("inspect", path).code == 2
    assert "KHO_UNPACK_LIMIT" in run("inspect", path).err


def bomb(size: int) -> bytes:
    """A zstd frame of zeros: 4 bytes for each 128 KiB."""
    block = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd\0\x60" + block * (size >> 17) + b"\x01\0\0"


def test_a_decompression_bomb_ends_at_the_default_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zst"
    path.write_bytes(bomb(9 << 30))
    done = process("inspect", path)
    assert done.code == 2
    assert "more than 2147483648 bytes" in done.err


def test_decompression_needs_at_most_64_mib_and_leaves_holes(tmp_path: Path) -> None:
    """Xz -9 needs a window of 64 MiB; larger windows are refused."""
    path = tmp_path / "zeros.xz"
    zeros = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 64 << 20}])
    path.write_bytes(b"".join([*(zeros.compress(bytes(1 << 20)) for _ in range(200)), zeros.flush()]))
    script = (
        "import resource, sys; from kho import Memory\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "memory = Memory.open(sys.argv[1])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert memory.ranges == [(0, 200 << 20)], memory.ranges\n"
        "assert memory.next_data(0) is None, 'zeros take room'\n"
        "print((after - before) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 64 + 16, done.stdout
    large = [{"id": lzma.FILTER_LZMA2, "dict_size": 128 << 20}]
    path.write_bytes(lzma.compress(b"x" * 5000, format=lzma.FORMAT_XZ, filters=large))
    with pytest.raises(errors.SourceError, match="more than 64.0 MiB") as caught:
        Memory.open(path)
    assert "xz -d" in str(caught.value)


def test_a_failed_temporary_file_is_reported_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "noise.gz"
    path.write_bytes(gzip.compress(Random(1).randbytes(3 << 20)))
    script = (
        "import resource, signal, sys; from kho import Memory, errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: Memory.open(sys.argv[1])\n"
        "except errors.SourceError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert "TMPDIR" in done.stdout


def test_a_progress_callback_can_stop_decompression(tmp_path: Path) -> None:
    path = tmp_path / "zeros.gz"
    path.write_bytes(gzip.compress(bytes(20 << 20)))
    seen: list[int] = []
    Memory.open(path, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 20 << 20

    def enough(nbytes: int) -> None:
        raise InterruptedError(nbytes)

    with pytest.raises(InterruptedError):
        kho.open(path, progress=enough)


def test_a_killed_process_leaves_no_temporary_file(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = subprocess.Popen([sys.executable, "-m", "kho", "inspect", "-"], stdin=read)
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        pipe.write(Random(2).randbytes(4 << 20))
        time.sleep(0.3)
        child.send_signal(signal.SIGKILL)
        child.wait()


@pytest.mark.parametrize("tail", [bytes(1000), b"junk", b"\0"])
def test_trailing_bytes_are_ignored_as_by_gzip_and_bzip2(tail: bytes, tmp_path: Path) -> None:
    whole, half = CAPTURE.read_bytes(), len(CAPTURE.read_bytes()) // 2
    expected = run("inspect", "--json", CAPTURE).out
    for pack in (gzip.compress, bz2.compress):
        path = tmp_path / "padded"
        path.write_bytes(pack(whole[:half]) + pack(whole[half:]) + tail)
        assert run("inspect", "--json", path).out == expected


def test_a_damaged_stream_after_a_complete_one_is_an_error(tmp_path: Path) -> None:
    whole, half = CAPTURE.read_bytes(), len(CAPTURE.read_bytes()) // 2
    path = tmp_path / "cut"
    for pack in (gzip.compress, bz2.compress):
        second = pack(whole[half:])
        for rest in (second[:20], second[: len(second) // 2], second[:10] + bytes(50)):
            path.write_bytes(pack(whole[:half]) + rest)
            with pytest.raises(kho.SourceError, match="cut short|damaged"):
                kho.open(path)


# Pipes


def piped(data: bytes, *args: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "kho", *map(str, args)]
    return subprocess.run(command, input=data, capture_output=True, timeout=60)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_reads_like_the_file(name: str) -> None:
    for data in (CAPTURE.read_bytes(), gzip.compress(CAPTURE.read_bytes())):
        done = piped(data, "inspect", "--json", name)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode() == run("inspect", "--json", CAPTURE).out
    for command in ("verify", "owners", "map", "fdt"):
        assert piped(CAPTURE.read_bytes(), command, name).returncode == 0
    with CAPTURE.open("rb") as file:
        done = subprocess.run([sys.executable, "-m", "kho", "inspect", "--json", name], stdin=file, capture_output=True)
    assert done.stdout.decode() == run("inspect", "--json", CAPTURE).out


def test_standard_input_without_a_memory_image_is_an_error() -> None:
    assert b"the file is empty" in piped(b"", "inspect", "-").stderr
    assert b"no handover" in piped(b"\1" * 100, "inspect", "/dev/stdin@0x1000").stderr
    assert b"a qcow2 disk image" in piped(b"QFI\xfb\0\0\0\3" + bytes(500), "inspect", "-").stderr
    fdt = (captures.DATA / "fdt/linux-7.3.4-in-fdt.dtb").read_bytes()
    assert b"kho fdt" in piped(fdt, "inspect", "-").stderr
    assert b"preserved-memory-map" in piped(fdt, "fdt", "-").stdout


def test_process_substitution_of_a_shell_is_a_source() -> None:
    script = f'"{sys.executable}" -m kho inspect --json <(cat "{CAPTURE}")'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (run("inspect", "--json", CAPTURE).out, "")


def test_a_fifo_is_read_or_times_out_without_a_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(errors.SourceError, match="no process writes to"):
        Memory.open(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(PLAIN))
    writer.start()
    same(Memory.open(fifo))
    writer.join()


def test_a_wait_for_a_pipe_ends_with_a_signal() -> None:
    read, write = os.pipe()
    child = subprocess.Popen([sys.executable, "-m", "kho", "inspect", "-"], stdin=read, stderr=subprocess.PIPE)
    os.close(read)
    time.sleep(1.5)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=10)
    os.close(write)
    assert child.returncode != 0


def test_an_endless_pipe_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHO_UNPACK_LIMIT", "64M")
    with Path("/dev/zero").open("rb") as zeros:
        cat = subprocess.Popen(["cat"], stdin=zeros, stdout=subprocess.PIPE)
        command = [sys.executable, "-m", "kho", "inspect", "-"]
        done = subprocess.run(command, stdin=cat.stdout, capture_output=True, timeout=60)
        assert cat.stdout is not None
        cat.stdout.close()
        cat.wait()
    assert b"more than 67108864 bytes" in done.stderr


# Unsupported formats


def elf(e_type: int = 4, machine: int = 62, *, notes: bytes = b"", loads: int = 1, sections: bytes = b"") -> bytes:
    """An ELF file with notes, loads of a page and section names."""
    headers = loads + bool(notes)
    start = 64 + 56 * headers
    names = start + len(notes)
    table = names + len(sections)
    made = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(e_type, machine, 1, 0, 64, table if sections else 0, 0, 64, 56, headers, 64, 2 * bool(sections)),
        1 if sections else 0,
    )
    if notes:
        made += struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(notes), len(notes), 4)
    for i in range(loads):
        made += struct.pack("<IIQQQQQQ", 1, 7, 0, 0, i << 12, 0, 4096, 0)
    made += notes + sections
    if sections:
        made += bytes(64) + struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, names, len(sections), 0, 0, 1, 0)
    return made


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    """An ELF note."""
    name += b"\0"
    return struct.pack("<III", len(name), len(desc), kind) + name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)


def tar(name: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return out.getvalue()


def old_tar() -> bytes:
    """A tar header from before POSIX."""
    header = bytearray(512)
    header[:4] = b"file"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("vmcore", "x")
    return out.getvalue()


PROCESS = (
    note(b"CORE", 1, bytes(336)) + note(b"CORE", 3, bytes(40) + b"nginx" + bytes(91)) + note(b"CORE", 6, bytes(32))
)
FOREIGN: dict[str, tuple[bytes, str, str]] = {
    "tar": (tar("sosreport/proc/meminfo"), "tar archive", "kho doctor"),
    "tar of before POSIX": (old_tar(), "tar archive", "kho doctor"),
    "tar.gz": (gzip.compress(tar("x")), "packed with gzip: a tar archive", "extract it first"),
    "tar.xz": (lzma.compress(tar("x")), "packed with xz: a tar archive", "extract it first"),
    "zip": (zipped(), "zip archive", "unzip"),
    "qcow2": (b"QFI\xfb\0\0\0\2" + bytes(100), "qcow2 disk image (version 2)", "qemu-img convert"),
    "qcow2.zst": (dumpfiles.zstd(b"QFI\xfb\0\0\0\3" + bytes(100)), "packed with zstd: a qcow2", "qemu-img convert"),
    "gz in gz": (gzip.compress(gzip.compress(b"x")), "packed again, with gzip", "gzip -d"),
    "virsh save": (b"LibvirtQemudSave\2\0\0\0" + bytes(4076), "virsh save", "virsh dump --memory-only"),
    "QEMU": (b"QEVM\0\0\0\3" + bytes(4076), "QEMU migration stream", "virsh dump --memory-only"),
    "vmss": (b"\xd2\xbe\xd2\xbe\x08\0\0\0\x60\0\0\0" + bytes(200), "VMware saved state", "vmss2core"),
    "vmsn": (b"\xd3\xbe\xd3\xbe\x08\0\0\0\x60\0\0\0" + bytes(200), "VMware saved state", "vmss2core"),
    "win-dmp": (b"PAGEDU64" + bytes(8184), "Windows crash dump", "dump-guest-memory"),
    "win-dmp 32": (b"PAGEDUMP" + bytes(8184), "Windows crash dump", "dump-guest-memory"),
    "lkcd": (struct.pack("<Q", 0xA8190173618F23ED) + bytes(4096), "LKCD", "crash"),
    "lkcd big": (struct.pack(">Q", 0xA8190173618F23ED) + bytes(4096), "LKCD", "crash"),
    "s390": (struct.pack(">Q", 0xA8190173618F23FD) + bytes(4096), "s390 dump", "zgetdump"),
    "diskdump": (b"DISKDUMP" + bytes(4096), "diskdump", "crash"),
    "avml 3": (b"AVML\3\0\0\0" + bytes(100), "AVML dump of an unknown version", "avml-convert"),
    "hibernation": (bytes(4086) + b"S1SUSPEND\0" + bytes(4096), "hibernation image", "resume"),
    "vmdk": (b"KDMV\1\0\0\0" + bytes(508), "vmdk", "qemu-img convert"),
    "vdi": (
        b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe" + bytes(400),
        "vdi",
        "qemu-img",
    ),
    "vhdx": (b"vhdxfile" + bytes(500), "vhdx", "qemu-img convert"),
    "bzImage": (b"MZ" + bytes(0x200) + b"HdrS" + bytes(512), "kernel (bzImage)", "virsh dump"),
    "arm64 Image": (bytes(0x38) + b"ARM\x64" + bytes(512), "kernel (arm64 Image)", "virsh dump"),
    "text": (b"[    0.000000] Linux version 7.3.4 (builder)\n" * 40, "text", "kho doctor"),
    "firecracker": (struct.pack("<Q", 0x0710198486640000) + bytes(500), "Firecracker", "MEMORY@0x0"),
    "elf32": (b"\x7fELF\1\1\1" + bytes(9) + struct.pack("<HH", 4, 3) + bytes(64), "class 1", "elf64"),
    "big-endian": (b"\x7fELF\2\2\1" + bytes(9) + struct.pack(">HH", 4, 22) + bytes(64), "s390x", "KHO exists on"),
    "process": (elf(notes=PROCESS), 'core of a process ("nginx")', "virsh dump --memory-only"),
    "xen": (
        elf(loads=0, notes=note(b"Xen", 0x2000001, bytes(32)), sections=b"\0.note.Xen\0.xen_pages\0"),
        "Xen",
        "kdump",
    ),
    "program": (elf(2), "program or library", "virsh dump --memory-only"),
    "vmlinux": (elf(2, sections=b"\0.text\0.init.text\0"), "kernel (vmlinux)", "virsh dump --memory-only"),
    "module": (elf(1, sections=b"\0.text\0.gnu.linkonce.this_module\0"), "kernel module", "virsh dump"),
    "lzop": (b"\x89LZO\0\r\n\x1a\n" + bytes(100), "lzop", "lzop -d"),
    "lzma": (lzma.compress(b"x" * 1000, format=lzma.FORMAT_ALONE), "lzma", "--format=lzma"),
    "compress": (b"\x1f\x9d\x90" + bytes(100), "compress", "gzip -d"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(100), "7z", "7z x"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_unsupported_format_is_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    content, what, remedy = FOREIGN[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(errors.SourceError) as caught:
        kho.open(path)
    assert what in str(caught.value)
    assert remedy in str(caught.value)
    for command in ("inspect", "verify", "owners", "map", "fdt"):
        done = run(command, path)
        assert (done.code, done.out) == (2, "")
        assert what in done.err
        assert remedy in done.err
        assert HINT not in done.err
        assert len(done.err.splitlines()) == 1
    assert run("diff", path, CAPTURE).code == 2
    piped_in = piped(content, "inspect", "-")
    assert (piped_in.returncode, HINT.encode() in piped_in.stderr, what.encode() in piped_in.stderr) == (2, False, True)


def test_a_core_of_a_kernel_is_not_taken_for_one_of_a_process() -> None:
    """/proc/kcore and QEMU's dumps have notes with the same name as a core of a process."""
    kcore = note(b"CORE", 1, bytes(336)) + note(b"CORE", 3, bytes(136)) + note(b"CORE", 4, bytes(64))
    dumped = note(b"CORE", 1, bytes(336)) + note(b"VMCOREINFO", 0, b"OSRELEASE=7.3.4\n") + note(b"CORE", 6, bytes(32))
    for notes in (kcore, dumped):
        path = Path(os.environ["TMPDIR"]).parent / "core"
        path.write_bytes(elf(notes=notes))
        assert Memory.open(path).ranges == [(0, 4096)]


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", "parallels"])
def test_disk_images_of_qemu_img_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, "1M"], check=True)
    done = run("inspect", path)
    assert done.code == 2
    assert "disk image" in done.err
    assert "qemu-img convert -O raw" in done.err


@pytest.mark.skipif(shutil.which("gcore") is None, reason="gdb is not installed")
def test_a_core_of_gcore_is_recognized_as_one_of_a_process(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        done = subprocess.run(["gcore", "-o", tmp_path / "core", str(child.pid)], capture_output=True)
        made = tmp_path / f"core.{child.pid}"
        if done.returncode or not made.exists():
            pytest.skip("gcore may not attach here")
        assert 'core of a process ("sleep")' in run("inspect", made).err
    finally:
        child.kill()
        child.wait()


def test_executables_of_this_machine_are_recognized() -> None:
    for path in (os.path.realpath(sys.executable), kho._kho.__file__):
        assert "program or library" in run("inspect", path).err


def test_a_devicetree_is_refused_with_a_hint_to_kho_fdt(tmp_path: Path) -> None:
    writer = kho.fdt.Writer()
    with writer.node():
        writer.property("compatible", b"linux,dummy-virt\0")
    path = tmp_path / "boot.dtb"
    path.write_bytes(writer.finish())
    packed = tmp_path / "boot.dtb.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, packed):
        for command in ("inspect", "verify", "owners", "map", "extract"):
            done = run(command, source, *(("--folio", "0", "-o", "-") if command == "extract" else ()))
            assert done.code == 2
            assert "kho fdt prints" in done.err, (command, done.err)
            assert HINT not in done.err
        assert 'compatible = "linux,dummy-virt";' in run("fdt", source).out


def test_raw_memory_is_not_taken_for_another_format(tmp_path: Path) -> None:
    """Bytes without a known magic are memory at 0; with an address, any file is raw memory."""
    path = tmp_path / "ram"
    path.write_bytes(Random(3).randbytes(100000))
    assert Memory.open(path).ranges == [(0, 100000)]
    for content, _, _ in FOREIGN.values():
        path.write_bytes(content)
        assert Memory.open(f"{path}@0x40000000").read(0x40000000, len(content)) == content


def test_opening_leaks_no_descriptor() -> None:
    before = descriptors()
    for name in ("small.elf.zst", "small.elf.gz"):
        memory = Memory.open(PACKED / name)
        del memory
    assert descriptors() <= before
