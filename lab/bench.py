"""What a scenario is given: kernels, guests, initial file systems, and a cache."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from . import initramfs, inject, qemu
from .kernels import Kernels, Pin
from .qemu import Console, Machine

GUESTS = 2
"""Guests that run at a time; each has one processor."""
T = TypeVar("T")
R = TypeVar("R")


def default_cache() -> Path:
    """KHO_LAB, or kho-lab in the user's cache folder."""
    return Path(
        os.environ.get("KHO_LAB") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kho-lab"
    )


class Lab:
    """Kernels, guests and archives. Everything that is made is in `cache`, and is made once."""

    def __init__(
        self,
        cache: Path | None = None,
        kernel: Path | None = None,
        versions: Sequence[str] = (),
        arches: Sequence[str] = ("x86_64", "aarch64"),
    ) -> None:
        self.cache = (cache or default_cache()).resolve()
        self.began = time.monotonic()
        self.kernels = Kernels(self.cache, self.say, kernel)
        self.arches = tuple(arches)
        self.scenario = "lab"
        self.record = False
        """Whether scenarios write what they recorded to tests/data instead of comparing it."""
        if kernel is not None and self.kernels.own_version is not None:
            versions = [self.kernels.own_version]
            if kernel.is_file():
                self.arches = (qemu.arch_of(kernel),)
        self.versions: tuple[str, ...] = tuple(versions) or tuple(
            pin.version for pin in self.kernels.pinned if pin.default
        )
        """The versions to boot, newest first: those of lab/versions.toml, or those that KERNEL or KERNELS names."""
        self.long_versions = self.versions
        """Those for scenarios that take minutes a version: the newest alone, unless --all or KERNELS names more."""
        self.boots = 0
        self.lock = threading.Lock()
        self.slots = threading.Semaphore(GUESTS)

    def of(self, scenario: str) -> Lab:
        """The same lab for one scenario: with its name, and its own count of boots."""
        made = copy.copy(self)
        made.scenario, made.boots = scenario, 0
        return made

    @property
    def newest(self) -> str:
        """The first of `versions`."""
        return self.versions[0]

    @property
    def pins(self) -> list[Pin]:
        """Every kernel of lab/versions.toml."""
        return self.kernels.pinned

    def say(self, text: str) -> None:
        """Show progress on stderr."""
        print(f"[{time.monotonic() - self.began:6.0f} s] {text}", file=sys.stderr, flush=True)

    def kernel(self, version: str, arch: str = "x86_64", fragments: Sequence[str] = ("lean",)) -> Path:
        """The image of a kernel, fetched and built if it is not there.

        `fragments` are names in lab/config, applied in order. For KERNEL=PATH with a kernel's file, that file.
        """
        return self.kernels.image(version, arch, fragments)

    def python_initramfs(
        self, scripts: Iterable[Path], kernels: Mapping[str, Path] | None = None, arch: str = "x86_64"
    ) -> Path:
        """An archive with Python, numpy, kho, busybox, and guest scripts in /lab/guest.

        The kernel's command line selects the script: `lab=NAME.py`. `kernels` are images to be loaded by kexec, in
        /lab/kernels.
        """
        return initramfs.python(scripts, self.cache, arch, kernels or {})

    def small_initramfs(self, program: Path, arch: str = "x86_64", files: Mapping[str, bytes] | None = None) -> Path:
        """An archive with a program of lab/guest, compiled, as PID 1."""
        data = initramfs.small(initramfs.compiled(program, arch, self.cache), files or {})
        path = self.work(f"{program.stem}-{hashlib.sha256(data).hexdigest()[:16]}.cpio")
        if not path.exists():
            part = path.with_suffix(f".{threading.get_ident()}")
            part.write_bytes(data)
            part.rename(path)
        return path

    def side_by_side(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Call `function` with each item, as many at a time as guests; the results are in order."""
        with ThreadPoolExecutor(GUESTS) as pool:
            yield from pool.map(function, items)

    def work(self, name: str) -> Path:
        """A file of this scenario that need not be kept."""
        folder = self.cache / "work" / self.scenario
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def cmdline(self, arch: str, words: str) -> str:
        """The whole command line of a kernel that kexec starts."""
        return f"console={qemu.CONSOLES[arch]} {qemu.ALWAYS[arch]} {words}"

    def console_path(self, kernel: Path) -> Path:
        """The file for the next console of this scenario: a number, and the folder of the kernel's build."""
        with self.lock:
            self.boots += 1
            return self.cache / "consoles" / self.scenario / f"{self.boots:03}-{kernel.parent.name}.txt"

    @contextmanager
    def start(
        self,
        kernel: Path,
        *,
        initrd: Path | None = None,
        append: str = "",
        memory: str = "1280M",
        drives: Sequence[Path] = (),
        more: Sequence[str] = (),
    ) -> Iterator[Machine]:
        """Start a guest and leave it to the block; it is ended with it. Waits while GUESTS others run."""
        accel = qemu.accelerator(qemu.arch_of(kernel), kernel, self.cache)
        with (
            self.slots,
            qemu.started(
                kernel,
                self.console_path(kernel),
                accel=accel,
                initrd=initrd,
                append=append,
                memory=memory,
                drives=drives,
                more=more,
            ) as machine,
        ):
            yield machine

    def boot(
        self,
        kernel: Path,
        initrd: Path | None = None,
        append: str = "",
        memory: str = "1280M",
        drives: Sequence[Path] = (),
        timeout: float = 600,
        more: Sequence[str] = (),
    ) -> Console:
        """Boot a guest, wait until it resets the machine, and return its console.

        `console=`, `panic=-1` and `nokaslr` are on the command line; a scenario adds kho=on and the like. After
        `timeout` seconds the guest is ended, and the console has `timed_out`.
        """
        with self.start(kernel, initrd=initrd, append=append, memory=memory, drives=drives, more=more) as machine:
            return machine.wait(timeout)

    def boot_image(
        self, kernel: Path, image: Path, initrd: Path, append: str = "", memory: int | None = None, timeout: float = 300
    ) -> Console:
        """Boot a kernel into the handover that `image` holds, as if a kernel had just handed it over (`lab.inject`).

        `memory` is the guest's RAM in MiB, by default what the image needs.
        """
        arch = qemu.arch_of(kernel)
        folder = Path(tempfile.mkdtemp(prefix="parts-", dir=self.work("")))
        accel = qemu.accelerator(arch, kernel, self.cache)
        path = self.console_path(kernel)
        with (
            self.slots,
            inject.loaded(kernel, image, initrd, append, memory, folder) as (size, more),
            qemu.started(kernel, path, accel=accel, memory=f"{size}M", more=more, direct=False) as machine,
        ):
            return machine.wait(timeout)
