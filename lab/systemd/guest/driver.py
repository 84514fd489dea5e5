"""Runs in the guest, one stage a boot: records the state, prepares the next kexec and asks for it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from record import LAB, boot, guest, record

KERNEL = "/lab/bzImage"
INITRD = "/lab/initrd.cpio.gz"
UNIT_LIST = LAB / f"units-{guest()}"
UNITS = Path("/etc/systemd/system")
PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,Result,NFileDescriptorStore,FileDescriptorStorePreserve,"
    "FileDescriptorStoreMax,MemoryMax,KExecCount,InitRDTimestampMonotonic,Version"
)
COMMANDS = {
    "plain": {"doctor": ("doctor", "--json"), "inspect live": ("inspect", "--json", "live")},
    "live": {"ps": ("ps", "--json")},
}
"""What is run of kho, by guest."""
FILES = (
    "meminfo",
    "zoneinfo",
    "pagetypeinfo",
    "buddyinfo",
    "cmdline",
    "version",
    "vmstat",
    "iomem",
    "misc",
    "sys/kernel/bootloader_type",
)
QUIET = 1.0
"""Seconds between two looks at the list of jobs."""


def run(*argv: str, seconds: float = 300) -> tuple[int, str, str]:
    """Run a command; a time out is exit code 124."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, "", "timed out"
    return done.returncode, done.stdout, done.stderr


def note(*argv: str, seconds: float = 300) -> int:
    """Run a command and record its answer."""
    code, out, err = run(*argv, seconds=seconds)
    record("$ " + " ".join(argv), code=code, out=out[-4000:], err=err[-4000:])
    return code


def settle() -> None:
    """Wait until systemd has no job but this one."""
    out = ""
    for _ in range(300):
        _, out, _ = run("systemctl", "list-jobs", "--no-legend", "--plain")
        if not [line for line in out.splitlines() if line.strip() and "lab.service" not in line]:
            return
        time.sleep(QUIET)
    record("unsettled", jobs=out)


def properties() -> dict[str, dict[str, str]]:
    """Return what systemd shows of each unit of the lab, and of itself under the name ""."""
    lines = UNIT_LIST.read_text().splitlines()
    made = {}
    for unit in (sorted({name for line in lines for name in line.split()[1:]}), []):
        _, out, _ = run("systemctl", "show", f"--property={PROPERTIES}", *unit)
        for block in out.split("\n\n"):
            values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            if values:
                made[values.get("Id", "")] = values
    return made


def kho() -> None:
    """Record what kho's commands answer here; in this process, since each import of kho takes seconds under TCG."""
    from kho.cli import main as command

    for name, argv in COMMANDS[guest()].items():
        out, err, code = io.StringIO(), io.StringIO(), 0
        sys.argv = ["kho", *argv]
        with redirect_stdout(out), redirect_stderr(err):
            try:
                command()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except Exception:  # noqa: BLE001 - the guest records whatever happens
                code = 99
                traceback.print_exc()
        try:
            answer = json.loads(out.getvalue())
        except ValueError:
            answer = None
        record("kho " + name, code=code, answer=answer, err=err.getvalue()[-4000:])


def state(when: str) -> None:
    """Record the state of the units and of the machine, at the start of a boot or before its end."""
    shmem = re.search(r"^Shmem: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    held = []
    for fd in Path("/proc/1/fd").iterdir():
        try:
            held.append(str(fd.readlink()))
        except OSError:
            continue
    record(
        "state",
        when=when,
        units=properties(),
        shmem=int(shmem[1]) << 10 if shmem else -1,
        release=os.uname().release,
        command_line=Path("/proc/cmdline").read_text().strip(),
        held=sorted(link for link in held if "deleted" in link or "luo" in link),
    )


def host() -> None:
    """Keep what `kho doctor` reads of this machine, as an archive; the service units of the system stay out."""
    added = {
        "var/log/dmesg": run("dmesg")[1],
        "sos_commands/systemd/systemctl_show": run("systemctl", "show", "--property=Version,KExecCount")[1],
        "sos_commands/systemd/systemctl_show_service_--all": run(
            "systemctl", "show", "--all", "--type=service", f"--property={PROPERTIES}", "*"
        )[1],
    }
    files = [Path("/proc", name) for name in FILES] + sorted(Path("/sys/kernel/debug/kho").rglob("*"))
    files += [Path("/sys/fs/cgroup/memory.stat"), *sorted(Path("/sys/fs/cgroup").glob("*/memory.stat"))]
    with tarfile.open(LAB / "host.tar.gz", "w:gz") as archive:
        for path in files:
            if path.is_file():
                added[str(path)[1:]] = path.read_bytes().decode("latin-1")
        for name, text in added.items():
            data = text.encode("latin-1", "replace")
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for fd in Path("/proc/1/fd").iterdir():
            link = str(fd.readlink()) if fd.is_symlink() else ""
            if "luo" in link:
                entry = tarfile.TarInfo(f"proc/1/fd/{fd.name}")
                entry.type, entry.linkname = tarfile.SYMTYPE, link
                archive.addfile(entry)


def logged() -> None:
    """Record what the kernel and systemd have logged of live updates."""
    _, out, _ = run("dmesg")
    wanted = [line for line in out.splitlines() if re.search(r"kho|luo|live.?update|fd store|oom", line, re.IGNORECASE)]
    record("log", lines=wanted[-80:])


def jump(*load: str) -> None:
    """Load the next kernel and ask systemd to start it."""
    if note("kexec", *load):
        raise SystemExit("the next kernel was not loaded")
    (LAB / "boot.next").write_text(f"{boot() + 1}\n")
    os.sync()
    note("systemctl", "kexec")
    time.sleep(900)


def again(*units: str) -> None:
    """Restart services and wait for them."""
    note("systemctl", "restart", *units)
    settle()


def started() -> list[list[str]]:
    """Return the units that this boot starts: those of its line in the guest's list, four at a time."""
    for line in UNIT_LIST.read_text().splitlines():
        number, *names = line.split()
        if int(number) == boot():
            return [names[at : at + 4] for at in range(0, len(names), 4)]
    return []


def main() -> None:
    """Run the stage of this boot."""
    upcoming = LAB / "boot.next"
    if upcoming.exists():
        upcoming.replace(LAB / "boot")
    settle()
    logged()
    for start in started():
        note("systemctl", "start", *start, seconds=1200)
        settle()
    state("start")
    STAGES[boot()]()


def cold() -> None:
    """Boot 1: everything is new. Then one unit file is removed."""
    own = guest()
    if own == "live":
        note("sysctl", "-w", "vm.memfd_noexec=1")
        note("systemctl", "start", "live-noexec")
        note("sysctl", "-w", "vm.memfd_noexec=0")
    again(f"{own}-yes")
    note("systemctl", "daemon-reload")
    again(f"{own}-yes")
    (UNITS / f"{own}-removed.service").rename(LAB / f"{own}-removed.service")
    state("before")
    kho()
    jump("-s", "-l", KERNEL, "--reuse-cmdline")


def second() -> None:
    """Boot 2: after the first kexec."""
    kho()
    if guest() == "plain":
        host()
    jump("-s", "-l", KERNEL, "--reuse-cmdline")


def third() -> None:
    """Boot 3: after the second one; what was left alone until now is started."""
    kho()
    removed = f"{guest()}-removed.service"
    (LAB / removed).rename(UNITS / removed)
    note("systemctl", "daemon-reload")
    note("systemctl", "start", removed, seconds=1200)
    settle()
    # without root=: the initrd mounts the disk itself
    line = " ".join(each for each in Path("/proc/cmdline").read_text().split() if not each.startswith("root="))
    jump("-s", "-l", KERNEL, f"--initrd={INITRD}", f"--command-line={line}")


def fourth() -> None:
    """Boot 4: through an initrd in which systemd is process 1, too. Then a kernel loaded by kexec_load."""
    kho()
    if guest() == "live":
        end()
    line = f"root=/dev/vda {Path('/proc/cmdline').read_text().strip()}"
    jump("-c", "-l", KERNEL, f"--command-line={line}")


def end() -> None:
    """Boot 5, in which nothing was handed over; or the last one of this guest."""
    if boot() == 5:
        kho()
    record("end")
    os.sync()
    note("systemctl", "poweroff", "--no-wall")
    time.sleep(900)


STAGES = {1: cold, 2: second, 3: third, 4: fourth, 5: end}

try:
    main()
except BaseException:  # noqa: BLE001 - the run ends here whatever happened, and says so
    record("failed", traceback=traceback.format_exc())
    os.sync()
    run("systemctl", "poweroff", "--force", "--force")
