"""Initial file systems: cpio archives, small ones with a program as PID 1, and one with Python, numpy and kho."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution
from pathlib import Path

from .claims import LabError

GUEST = Path(__file__).parent / "guest"
COMPILERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}
SITE = "/opt/kho"
"""Where kho, numpy and what they need are in the guest; in PYTHONPATH there."""
PACKAGES = ("kho", "numpy", "click", "rich", "markdown_it", "mdurl", "pygments")
APPLETS = (
    "sh",
    "ls",
    "cat",
    "dmesg",
    "grep",
    "egrep",
    "mount",
    "umount",
    "sleep",
    "head",
    "tail",
    "ps",
    "free",
    "id",
    "timeout",
    "find",
    "wc",
    "sed",
    "od",
    "stat",
)
UNUSED_STDLIB = re.compile(
    r"/(test|tests|idlelib|tkinter|turtledemo|ensurepip|lib2to3|config-3[^/]*|site-packages|dist-packages|pydoc_data"
    r"|distutils|__pycache__)(/|$)|_tkinter|/turtle|_sqlite3|\.(pyc|a|h|pyi)$"
)
UNUSED_SITE = re.compile(
    r"/__pycache__/|/numpy/(.*/)?(tests|f2py|doc|typing|_pyinstaller|include|distutils)/"
    r"|/pygments/(lexers|styles|formatters)/(?!__init__|_mapping|default)|\.(pyc|a|pyi|lib|h)$"
)


class Cpio:
    """A newc archive, as the kernel unpacks it; archives may follow each other."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.names: set[str] = set()
        self.inode = 0

    def _add(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        if name in self.names:
            return
        self.names.add(name)
        self.inode += 1
        raw = name.encode() + b"\0"
        head = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        block = b"070701" + b"".join(b"%08x" % word for word in head) + raw
        self.parts += [block, bytes(-len(block) % 4), data, bytes(-len(data) % 4)]

    def folder(self, name: str, mode: int = 0o755) -> None:
        """A folder and the folders above it."""
        name = name.strip("/")
        if "/" in name:
            self.folder(name.rpartition("/")[0])
        self._add(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A file, and the folders above it."""
        if "/" in name.strip("/"):
            self.folder(name.strip("/").rpartition("/")[0])
        self._add(name.strip("/"), stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        if "/" in name.strip("/"):
            self.folder(name.strip("/").rpartition("/")[0])
        self._add(name.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """What PID 1 needs before it mounts anything."""
        for name, mode in (
            ("dev", 0o755),
            ("proc", 0o755),
            ("sys", 0o755),
            ("tmp", 0o1777),
            ("run", 0o755),
            ("mnt", 0o1777),
        ):
            self.folder(name, mode)
        self._add("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))

    def bytes(self) -> bytes:
        """The archive, with its trailer, padded to 512 bytes."""
        self._add("TRAILER!!!", 0, b"")
        raw = b"".join(self.parts)
        return raw + bytes(-len(raw) % 512)


def compiled(source: Path, arch: str, cache: Path) -> Path:
    """A static program for the guest, compiled once for each content of its source."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    out = cache / "programs" / f"{source.stem}-{arch}-{digest}"
    if not out.exists():
        native = os.uname().machine == arch
        compiler = shutil.which(COMPILERS[arch]) or (shutil.which("gcc") if native else None)
        if compiler is None:
            raise LabError(f"{COMPILERS[arch]} is missing: apt-get install gcc-{arch.replace('_', '-')}-linux-gnu")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(f".{threading.get_ident()}")
        words = [compiler, "-static", "-O2", "-Wall", "-Wextra", "-o", str(part), str(source)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"`{' '.join(words)}`:\n{done.stderr[-2000:]}")
        part.rename(out)
    return out


def small(program: Path, files: Mapping[str, bytes]) -> bytes:
    """An archive with `program` as /init, and other files."""
    archive = Cpio()
    archive.console()
    archive.file("init", program.read_bytes(), 0o755)
    for name, data in files.items():
        archive.file(name, data, 0o644)
    return archive.bytes()


def _stripped(data: bytes) -> bytes:
    """A program or library without its symbols for debuggers: the guest's memory is small."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        done = subprocess.run(["strip", "--strip-unneeded", file.name], stderr=subprocess.DEVNULL, check=False)
        return data if done.returncode else Path(file.name).read_bytes()


def _bytecode(source: str, at: str) -> bytes | None:
    """The code of a module that tracebacks say is `at`, not compared with its source; None if it does not compile."""
    with tempfile.NamedTemporaryFile(suffix=".pyc") as file:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        try:
            py_compile.compile(source, file.name, at, doraise=True, invalidation_mode=mode)
        except py_compile.PyCompileError:
            return None
        return Path(file.name).read_bytes()


class Root:
    """Files of this machine that a guest needs, with the shared libraries of each."""

    def __init__(self) -> None:
        self.archive = Cpio()
        self.libraries: set[str] = set()

    def put(self, source: str, name: str | None = None) -> None:
        """Copy a file or link, to its own path or to `name`."""
        name = name or source
        if name.strip("/") in self.archive.names:
            return
        if os.path.islink(source) and name == source:
            target = os.readlink(source)
            self.archive.link(name, target)
            self.put(os.path.join(os.path.dirname(source), target))
            return
        data = Path(source).read_bytes()
        elf = data[:4] == b"\x7fELF"
        if elf and ".libs/" not in source:  # what auditwheel has patched does not load once it is stripped
            data = _stripped(data)
        self.archive.file(name, data, 0o755 if elf or os.access(source, os.X_OK) else 0o644)
        if elf:
            said = subprocess.run(["ldd", source], capture_output=True, text=True, check=False).stdout
            self.libraries.update(re.findall(r"(/\S+) \(0x", said))

    def tree(self, top: str, unused: re.Pattern[str], name: str | None = None) -> None:
        """Copy a folder without what `unused` finds, to its own path or to `name`; modules as bytecode, without source.

        An interpreter under TCG takes ten times as long to compile modules as to load them.
        """
        for folder, _, files in os.walk(top):
            for file in files:
                path = os.path.join(folder, file)
                if unused.search(path):
                    continue
                to = path if name is None else name + path[len(top) :]
                code = _bytecode(path, f"/{to.lstrip('/')}") if path.endswith(".py") else None
                if code is None:
                    self.put(path, to)
                else:
                    self.archive.file(f"{to}c", code)

    def finish(self) -> bytes:
        """Add the libraries, and return the archive."""
        for library in sorted(self.libraries):
            if not Path(library).resolve().parent.name.endswith(".libs"):  # a wheel's own, next to its package
                self.put(os.path.realpath(library), library)
        return self.archive.bytes()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LabError(f"the Python of the lab has no {name}; run it by `make lab`")
    return Path(spec.origin).parent


def _base() -> bytes:
    """Python with the packages, busybox, users; PID 1 comes with the scripts."""
    root = Root()
    root.archive.console()
    python = os.path.realpath(sys.executable)
    stdlib = sysconfig.get_paths()["stdlib"]
    root.put(python)
    root.tree(stdlib, UNUSED_STDLIB)
    for link in ("python", "python3"):
        root.archive.link(f"usr/bin/{link}", python)
    for name in PACKAGES:
        place = _package(name)
        root.tree(str(place), UNUSED_SITE, f"{SITE}/{name}")
        libs = place.with_name(f"{name}.libs")
        if libs.is_dir():
            root.tree(str(libs), UNUSED_SITE, f"{SITE}/{name}.libs")
    info = distribution("kho")
    for part in ("METADATA", "entry_points.txt"):
        text = info.read_text(part)
        if text:
            root.archive.file(f"{SITE}/kho-{info.version}.dist-info/{part}", text.encode())
    start = f"#!{python}\nimport sys\nfrom kho.cli import main\nsys.exit(main())\n"
    root.archive.file("usr/bin/kho", start.encode(), 0o755)
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabError("busybox is missing: apt-get install busybox-static")
    root.put(busybox, "/usr/bin/busybox")
    for applet in APPLETS:
        root.archive.link(f"usr/bin/{applet}", "/usr/bin/busybox")
    root.archive.link("usr/bin/env", "/usr/bin/busybox")
    root.archive.link("bin", "/usr/bin")
    root.archive.file("etc/passwd", b"root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    root.archive.file("etc/group", b"root:x:0:\nuser:x:1000:\n")
    return root.finish()


def _fingerprint() -> str:
    """Changes with the Python, and with each file of the packages."""
    digest = hashlib.sha256(f"{sys.version} {os.path.realpath(sys.executable)}".encode())
    digest.update(Path(__file__).read_bytes())
    for name in PACKAGES:
        for path in sorted(_package(name).rglob("*")):
            if path.suffix in (".py", ".so") and path.is_file():
                seen = path.stat()
                digest.update(f"{path} {seen.st_size} {seen.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def python(scripts: Iterable[Path], cache: Path, arch: str, kernels: Mapping[str, Path]) -> Path:
    """An archive with Python, `scripts` in /lab/guest, `kernels` in /lab/kernels; its /init is guest/init.c."""
    if arch != os.uname().machine:
        raise LabError(
            f"the guest's Python is this machine's, {os.uname().machine}; scenarios with Python need that architecture"
        )
    folder = cache / "initramfs"
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"base-{_fingerprint()}.cpio"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not base.exists():
            for old in folder.glob("*.cpio"):
                old.unlink()
            part = base.with_suffix(".part")
            part.write_bytes(_base())
            part.rename(base)
    archive = Cpio()
    archive.file("init", compiled(GUEST / "init.c", arch, cache).read_bytes(), 0o755)
    for script in scripts:
        archive.file(f"lab/guest/{script.name}", script.read_bytes(), 0o755)
    for name, kernel in kernels.items():
        archive.file(f"lab/kernels/{name}", kernel.read_bytes())
    more = archive.bytes()
    out = folder / f"python-{hashlib.sha256(base.name.encode() + more).hexdigest()[:16]}.cpio"
    if not out.exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file, base.open("rb") as opened:
            shutil.copyfileobj(opened, file)
            file.write(more)
        Path(file.name).rename(out)
    return out
