"""Kernel sources and other packages, by the ordinary Debian client with a configuration of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from .claims import LabError

SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))


def debian_uri() -> str:
    """The address from which this machine has its own Debian packages; deb.debian.org if it names none."""
    for place in SOURCES:
        files = sorted(place.iterdir()) if place.is_dir() else [place] if place.exists() else []
        for file in files:
            for line in file.read_text(errors="replace").splitlines():
                found = re.match(r"(?:deb(?:\s+\[[^]]*\])?|URIs:)\s+(https?://\S+)", line)
                if found and "security" not in found[1] and "ubuntu" not in found[1]:
                    return found[1].rstrip("/")
    return "http://deb.debian.org/debian"


class Apt:
    """An apt whose lists and packages lie in `home`, so that the machine's own are not touched."""

    def __init__(self, home: Path, suites: Iterable[str]) -> None:
        self.home, self.suites = home, list(suites)

    def _configure(self) -> Path:
        conf = self.home / "apt.conf"
        for folder in ("lists/partial", "cache/archives/partial", "etc"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        uri = debian_uri()
        signed = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
        option = f"[signed-by={signed}]" if signed.exists() else "[trusted=yes]"
        lines = [f"{kind} {option} {uri} {suite} main" for suite in self.suites for kind in ("deb", "deb-src")]
        (self.home / "sources.list").write_text("\n".join(lines) + "\n")
        options = {
            "Dir::State::Lists": self.home / "lists",
            "Dir::Cache": self.home / "cache",
            "Dir::Etc::sourcelist": self.home / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "APT::Sandbox::User": "root",
            "APT::Architecture": "amd64",
        }
        conf.write_text("".join(f'{key} "{value}";\n' for key, value in options.items()))
        return conf

    def _run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["apt-get", "-q", *words], cwd=cwd, env={"APT_CONFIG": str(self._configure()), "PATH":
            "/usr/bin:/bin:/usr/sbin"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def _updated(self) -> None:
        stamp = self.home / "updated"
        if stamp.exists() and stamp.read_text() == " ".join(self.suites):
            return
        done = self._run("update", cwd=self.home)
        if done.returncode:
            raise LabError(f"apt-get update failed; {self.home}/sources.list names the archive:\n{done.stderr[-2000:]}")
        stamp.write_text(" ".join(self.suites))

    def fetch(self, words: list[str], file: str, into: Path) -> Path:
        """Run apt-get with `words` in `into` until `file` is there, and return its path.

        The other parts of a source package may be missing in the archive while the tarball comes: only `file` counts.
        Raises: LabError with apt's output.
        """
        path = into / file
        if path.exists():
            return path
        into.mkdir(parents=True, exist_ok=True)
        self._updated()
        done = self._run(*words, cwd=into)
        if not path.exists():
            (self.home / "updated").unlink(missing_ok=True)  # lists that are too old name files that are gone
            self._updated()
            done = self._run(*words, cwd=into)
        if not path.exists():
            raise LabError(
                f"{file} did not come with `apt-get {' '.join(words)}`:\n{done.stderr[-2000:]}\n"
                f"If the archive has a newer one, name that in lab/versions.toml, or put the file into {into}."
            )
        return path

    def package(self, name: str, file: str, into: Path) -> Path:
        """Download a binary package, `NAME=VERSION`."""
        return self.fetch(["download", name], file, into)

    def tarball(self, version: str, file: str, into: Path) -> Path:
        """Download the upstream tarball of the source package `linux` of a version."""
        return self.fetch(["source", "--download-only", f"linux={version}"], file, into)
