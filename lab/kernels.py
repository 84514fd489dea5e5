"""Kernels: pinned versions, fetched, unpacked, configured and built once for each set of configuration fragments."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .claims import LabError
from .packages import Apt
from .qemu import arch_of

HERE = Path(__file__).parent
CONFIG = HERE / "config"
ARCHES = {
    "x86_64": ("x86", "x86_64-linux-gnu-", "bzImage", "arch/x86/boot/bzImage"),
    "aarch64": ("arm64", "aarch64-linux-gnu-", "Image", "arch/arm64/boot/Image"),
}
"""For each architecture: its name in the kernel, the prefix of its compiler, the target of make, and the file it makes.
"""


@dataclass(frozen=True)
class Pin:
    """A kernel of lab/versions.toml."""

    version: str
    file: str
    sha256: str
    package: str | None = None
    source: str | None = None
    default: bool = False

    @property
    def series(self) -> str:
        """The first two numbers of the version."""
        return ".".join(self.version.split(".")[:2])


def pins(path: Path = HERE / "versions.toml") -> tuple[list[Pin], list[str]]:
    """Return the kernels of lab/versions.toml, newest first, and the suites they come from."""
    data = tomllib.loads(path.read_text())
    return [Pin(**entry) for entry in data["kernel"]], data["apt"]["suites"]


def fragment(name: str, arch: str) -> Path:
    """The file of a configuration fragment: NAME.ARCH.frag, or NAME.frag for every architecture."""
    for path in (CONFIG / f"{name}.{arch}.frag", CONFIG / f"{name}.frag"):
        if path.exists():
            return path
    known = sorted({file.name.split(".")[0] for file in CONFIG.glob("*.frag")})
    raise LabError(f"no configuration fragment {name!r} for {arch} in {CONFIG}; there are {', '.join(known)}")


def build_name(version: str, arch: str, fragments: Sequence[str]) -> str:
    """The folder of a build: 7.3.4-x86_64, 7.3.4-aarch64-64k."""
    return "-".join([version, arch, *(name for name in fragments if name != "lean")])


def tree_version(tree: Path) -> str:
    """The release that the Makefile of a source tree names."""
    head = (tree / "Makefile").read_text(errors="replace")[:2000]
    parts = dict(re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) = ?(.*)$", head, re.MULTILINE))
    if "VERSION" not in parts:
        raise LabError(f"{tree}/Makefile does not name a version: this is not a kernel source tree")
    return f"{parts['VERSION']}.{parts['PATCHLEVEL']}.{parts['SUBLEVEL']}{parts.get('EXTRAVERSION', '')}"


def image_version(image: Path) -> str:
    """The release that the banner of a kernel's file names."""
    from kho.kernelimage import read_kernel

    return str(read_kernel(image).release)


class Kernels:
    """Builds in `cache`; those in the folders of KHO_LAB_PREBUILT are used as they are."""

    def __init__(self, cache: Path, say: Callable[[str], None], own: Path | None = None) -> None:
        self.cache, self.say = cache, say
        self.pinned, suites = pins()
        self.apt = Apt(cache / "apt", suites)
        self.images: dict[str, Path] = {}
        self.trees: dict[str, Path] = {}
        self.made: set[Path] = set()
        self.own_version: str | None = None
        if own is not None:
            if own.is_dir():
                self.own_version = tree_version(own)
                self.trees[self.own_version] = own.resolve()
            elif own.is_file():
                self.own_version = image_version(own)
                self.images[self.own_version] = own.resolve()
            else:
                raise LabError(f"{own}: neither a source tree nor the file of a kernel")

    def image(self, version: str, arch: str, fragments: Sequence[str]) -> Path:
        """The image of a kernel, built if it is not there yet.

        Raises: LabError if the version is not pinned, or the build fails; it names the log.
        """
        if arch not in ARCHES:
            raise LabError(f"no architecture {arch!r}; there are {', '.join(ARCHES)}")
        if version in self.images:
            if arch_of(self.images[version]) != arch or tuple(fragments) != ("lean",):
                raise LabError(
                    f"{self.images[version]} is not for {arch} with {', '.join(fragments)}: name a source tree"
                )
            return self.images[version]
        name, target = build_name(version, arch, fragments), ARCHES[arch][2]
        for folder in filter(None, os.environ.get("KHO_LAB_PREBUILT", "").split(":")):
            if (found := Path(folder) / name / target).exists():
                return found
        build = self.cache / "kernels" / name
        if build in self.made:
            return build / target
        own = version == self.own_version  # a tree that may have changed since
        key = "" if own else self._key(version, arch, fragments)
        stamp = build / "built.json"

        def done() -> bool:
            return not own and stamp.exists() and json.loads(stamp.read_text())["key"] == key

        if not done():
            self.cache.mkdir(parents=True, exist_ok=True)
            with (self.cache / "build.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once take longer than one after the other
                if not done() and build not in self.made:
                    self._build(version, arch, fragments, build, keep=own)
                    stamp.write_text(json.dumps({"key": key, "version": version, "arch": arch}) + "\n")
        self.made.add(build)
        return build / target

    def symbols(self, image: Path) -> dict[str, int]:
        """The addresses of a build's symbols, from the System.map next to its image."""
        path = image.parent / "System.map"
        if not path.exists():
            raise LabError(f"{path} is missing; the scenario needs the addresses of {image.name}'s functions")
        words = (line.split() for line in path.read_text().splitlines())
        return {name: int(at, 16) for at, _, name in (line for line in words if len(line) == 3)}

    def _pin(self, version: str) -> Pin:
        for pin in self.pinned:
            if pin.version == version:
                return pin
        known = ", ".join(pin.version for pin in self.pinned)
        raise LabError(
            f"Linux {version} is not in lab/versions.toml ({known}); KERNEL=PATH names a source tree of your own"
        )

    def _key(self, version: str, arch: str, fragments: Sequence[str]) -> str:
        digest = hashlib.sha256(self._pin(version).sha256.encode())
        for name in fragments:
            digest.update(fragment(name, arch).read_bytes())
        return digest.hexdigest()

    def tree(self, version: str) -> Path:
        """The unpacked source of a version, fetched if it is not there."""
        if version in self.trees:
            return self.trees[version]
        pin, into = self._pin(version), self.cache / "sources"
        tree = self.cache / "trees" / version
        if not tree.exists():
            if not (into / pin.file).exists():
                self.say(f"fetching {pin.file}")
            if pin.package:
                file = self.apt.package(pin.package, pin.file, into)
            else:
                file = self.apt.tarball(pin.source or "", pin.file, into)
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != pin.sha256:
                raise LabError(f"{file}: sha256 {digest}, and lab/versions.toml has {pin.sha256}; remove the file")
            self.say(f"unpacking {pin.file}")
            part = tree.with_name(f"{version}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            if file.suffix == ".deb":
                subprocess.run(["dpkg", "-x", file, part / "deb"], check=True)
                file = part / "deb/usr/src" / f"linux-source-{pin.series}.tar.xz"
            (part / "linux").mkdir()
            subprocess.run(["tar", "xf", file, "-C", part / "linux", "--strip-components=1"], check=True)
            (part / "linux").rename(tree)
            shutil.rmtree(part)
        self.trees[version] = tree
        return tree

    def _build(self, version: str, arch: str, fragments: Sequence[str], build: Path, *, keep: bool) -> None:
        names = [fragment(name, arch) for name in fragments]
        tree, (karch, prefix, target, made) = self.tree(version), ARCHES[arch]
        objects, log = self.cache / "objects" / build.name, self.cache / "logs" / f"build-{build.name}.log"
        objects.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        make = ["make", "-C", str(tree), f"O={objects}", f"ARCH={karch}", f"-j{os.cpu_count() or 1}"]
        if os.uname().machine != arch:
            make.append(f"CROSS_COMPILE={prefix}")
        merge = [str(tree / "scripts/kconfig/merge_config.sh"), "-m", "-O", str(objects), str(objects / ".config")]
        began = time.monotonic()
        with log.open("w") as out:
            if not (objects / ".config").exists() or not (objects / "configured").exists():
                for words in ([*make, "-s", "tinyconfig"], [*merge, *map(str, names)], [*make, "-s", "olddefconfig"]):
                    self._step(words, tree, out, log)
                self._has_kho(objects / ".config")
                (objects / "configured").touch()  # an interrupted build goes on where it was
            self._compile([*make, target], tree, out, log, build.name)
        build.mkdir(parents=True, exist_ok=True)
        for file, name in ((made, target), ("System.map", "System.map"), (".config", "config"), ("vmlinux", "vmlinux")):
            shutil.copyfile(objects / file, build / name)
        if not keep:
            shutil.rmtree(objects)
        self.say(f"built {build.name} in {time.monotonic() - began:.0f} s")

    def _has_kho(self, config: Path) -> None:
        """Refuse a configuration without KHO: its Kconfig has other conditions than the fragments meet."""
        if "CONFIG_KEXEC_HANDOVER=y" not in config.read_text().splitlines():
            raise LabError(f"{config} has no CONFIG_KEXEC_HANDOVER: lab/config does not meet what it depends on here")

    def _step(self, words: list[str], cwd: Path, out: object, log: Path) -> None:
        done = subprocess.run(words, cwd=cwd, stdout=out, stderr=subprocess.STDOUT, check=False)  # type: ignore[call-overload]
        if done.returncode:
            raise LabError(f"`{' '.join(words[:6])} ...` failed; {log} ends with:\n" + "\n".join(tail(log)))

    def _compile(self, words: list[str], cwd: Path, out: object, log: Path, name: str) -> None:
        """Run make, and show how far it is once in 15 seconds."""
        made, shown = 0, time.monotonic()
        with subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                out.write(line)  # type: ignore[attr-defined]
                made += line.lstrip().startswith(("CC ", "AS "))
                if time.monotonic() - shown > 15:
                    shown = time.monotonic()
                    self.say(f"building {name}: {made} compilations")
        out.flush()  # type: ignore[attr-defined]
        if process.returncode:
            raise LabError(f"the build of {name} failed; {log} ends with:\n" + "\n".join(tail(log)))


def tail(path: Path, lines: int = 20) -> list[str]:
    """The last lines of a file."""
    return path.read_text(errors="replace").splitlines()[-lines:]
