"""systemd as process 1 over `systemctl kexec`: its descriptor store, kho.live in it, and what the commands show.

Two guests, one with plain services, one with kho.live: a cold boot, two kexecs, a third one through an initrd, and
for the plain services a kernel that kexec_load(2) loaded. Each service of lab/systemd/units.py writes what it found
to the guest's disk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..claims import Claim, LabError, SkipError
from ..systemd import disk, rootfs
from ..systemd.units import GUESTS, SERVICES

if TYPE_CHECKING:
    from ..bench import Lab

ARCH = "x86_64"
APPEND = (
    "root=/dev/vda rw kho=on liveupdate=on kho_scratch=32M,320M,32M loglevel=5 printk.devkmsg=on log_buf_len=4M "
    "systemd.show_status=0 systemd.log_ratelimit_kmsg=0"
)
MEMORY = "1536M"
SECONDS = 3600
POLL = 1.0
STEPS = 5
"""Records of the guest from one line of progress to the next."""
MIB = 1 << 20
SHOWN = 400
"""Characters of evidence of a claim that held."""
Record = dict[str, Any]


class Run:
    """What the guest has recorded, and the claims about it."""

    def __init__(self, records: list[Record], console: str, kernel: str, versions: dict[str, str]) -> None:
        self.records = records
        self.console = console
        self.kernel = kernel
        self.versions = versions

    def all(self, who: str, boot: int | None = None) -> list[Record]:
        """Return the records of a service or of the driver, in order."""
        return [each for each in self.records if each["who"] == who and boot in (None, each["boot"])]

    def one(self, who: str, boot: int) -> Record:
        """Return the first record of a boot. Raises: LookupError."""
        for each in self.all(who, boot):
            return each
        raise LookupError(f"boot {boot}: {who} has recorded nothing")

    def state(self, guest: str, boot: int, when: str = "start") -> Record:
        """Return a record of the driver about the units. Raises: LookupError."""
        for each in self.all("state", boot):
            if (each["guest"], each["when"]) == (guest, when):
                return each
        raise LookupError(f"guest {guest}, boot {boot}: no state ({when})")

    def claim(self, text: str, check: Callable[[], tuple[bool, object]]) -> Claim:
        """Make a claim of what `check` finds: whether it holds, and the evidence. A missing record is a failure."""
        try:
            held, evidence = check()
        except (LookupError, TypeError, AttributeError) as error:
            held, evidence = False, f"{type(error).__name__}: {error}"
        shown = evidence if isinstance(evidence, str) else json.dumps(evidence, ensure_ascii=False)
        return Claim(text, self.kernel, ARCH, held, shown[: SHOWN if held else 10 * SHOWN])


def run(lab: Lab) -> Iterator[Claim]:
    """Boot the guest once and yield the claims."""
    if (reason := missing()) is not None:
        raise SkipError(reason)
    version = lab.newest
    kernel = lab.kernel(version, ARCH, ("lean", "sd"))
    folder = lab.cache / "systemd"
    root = rootfs.make(folder, lab.say)
    spec = importlib.util.find_spec("kho")
    if spec is None or spec.origin is None:
        raise LabError("the Python of the lab has no kho; run it by `make lab`")
    lab.say("making the disk of the guest")
    image = disk.make(root, kernel, Path(spec.origin).parent, folder)
    images = {guest: folder / f"disk-{guest}.ext4" for guest in GUESTS}
    try:
        for each in images.values():
            disk.copy(image, each)
        consoles = watched(lab, kernel, images)
        records = [record for each in images.values() for record in disk.records(each)]
        (folder / "host.tar.gz").write_bytes(disk.file(images["plain"], "host.tar.gz"))
    finally:
        for each in (image, *images.values()):
            each.unlink(missing_ok=True)
    (folder / "records.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "console.txt").write_text("".join(consoles.values()))
    yield from claims(Run(records, consoles["plain"], version, root.versions))


def missing() -> str | None:
    """Return why this machine cannot run the scenario, as a sentence with the remedy; None if it can."""
    if os.uname().machine != ARCH:
        return f"the guest has this machine's extension module of kho, which must be {ARCH}"
    if shutil.which("qemu-system-x86_64") is None:
        return "apt-get install qemu-system-x86: the guest runs in it"
    return rootfs.missing()


def watched(lab: Lab, kernel: Path, images: dict[str, Path]) -> dict[str, str]:
    """Run the guests side by side to their ends, show how far they are, and return their consoles."""
    lab.say("booting systemd in two guests, four and five kernels in a row: five to ten minutes under TCG")
    with ExitStack() as stack:
        machines = {
            guest: stack.enter_context(
                lab.start(kernel, append=f"{APPEND} lab.guest={guest}", memory=MEMORY, drives=[image])
            )
            for guest, image in images.items()
        }
        end, shown = time.monotonic() + SECONDS, dict.fromkeys(machines, 0)
        while any(each.process.poll() is None for each in machines.values()) and time.monotonic() < end:
            time.sleep(POLL)
            for guest, machine in machines.items():
                steps = re.findall(r"^lab: (boot \d+): (.*)", machine.console().text, re.MULTILINE)
                if len(steps) >= shown[guest] + STEPS:
                    shown[guest] = len(steps)
                    lab.say(f"{guest}, {steps[-1][0]}: {steps[-1][1].strip()}")
        return {guest: machine.wait(1).text for guest, machine in machines.items()}


def claims(run: Run) -> Iterator[Claim]:
    """Yield all claims about a run."""
    yield run.claim("systemd: the guests ran through all of their kernels, five and four in a row", lambda: ended(run))
    for part in (jumps, plain_services, live_services, commands):
        yield from part(run)


def ended(run: Run) -> tuple[bool, object]:
    """Find the last record."""
    failed = run.all("failed") + run.all("unsettled")
    ends = {each["guest"]: each["boot"] for each in run.all("end")}
    return ends == {"plain": 5, "live": 4} and not failed, failed or [run.versions, ends]


# The machine


def jumps(run: Run) -> Iterator[Claim]:
    """`systemctl kexec`, again and again."""

    def counted() -> tuple[bool, object]:
        found = [run.state("plain", boot)["units"][""]["KExecCount"] for boot in (1, 2, 3, 4)]
        return found == ["0", "1", "2", "3"], {"KExecCount": found}

    def initrd() -> tuple[bool, object]:
        found = [run.state("plain", boot)["units"][""]["InitRDTimestampMonotonic"] for boot in (3, 4)]
        return found[0] == "0" and int(found[1]) > 0, {"InitRDTimestampMonotonic": found}

    def by_kexec_load() -> tuple[bool, object]:
        count = run.state("plain", 5)["units"][""]["KExecCount"]
        came = {each["who"]: each["names"] for each in run.all("plain-yes", 5)}
        return count == "0" and came == {"plain-yes": []}, {"KExecCount": count, "descriptors": came}

    yield run.claim("systemd: `kexec -s -l` and `systemctl kexec` hand the store over, three times in a row", counted)
    yield run.claim("systemd: the third kexec went through an initrd in which systemd is process 1", initrd)
    yield run.claim(
        "systemd: a kernel loaded by kexec_load (kexec -c) is handed nothing, KExecCount is 0", by_kexec_load
    )


# A plain service


def plain_services(run: Run) -> Iterator[Claim]:
    """What arrives of a memfd in the store."""
    for name, setting in (
        ("plain-no", "no"),
        ("plain-default", "not set"),
        ("plain-restart", "restart"),
    ):
        yield run.claim(f"systemd store, Preserve={setting}: the memfd does not arrive", partial(absent, run, name))
    for name, setting in (
        ("plain-success", "on-success"),
        ("plain-yes", "yes"),
        ("plain-yes-failure", "yes, the service fails at its end"),
    ):
        yield run.claim(
            f"systemd store, Preserve={setting}: the memfd arrives, two kexecs", partial(arrived, run, name)
        )
    yield run.claim(
        "systemd store, Preserve=on-success, the service fails at its end: the memfd does not arrive",
        lambda: absent(run, "plain-failure"),
    )
    yield run.claim(
        "systemd store: a memfd that arrives has no name, seals and offset as before", lambda: nameless(run)
    )
    yield run.claim(
        "systemd store: of all kinds of descriptors only memfds arrive, with a warning", lambda: only_memfds(run)
    )
    yield run.claim("systemd store, MemoryMax=: 48 MiB arrive and are charged to no unit", lambda: uncharged(run))
    yield run.claim(
        "systemd store, unit not started for two kernels: the memfd is complete", lambda: late(run, "plain-idle")
    )
    yield run.claim(
        "systemd store, unit file removed: PID 1 keeps the memfd, and a unit file of that name has it again",
        lambda: late(run, "plain-removed"),
    )
    yield run.claim("systemd store, through an initrd: every memfd arrives", lambda: through_initrd(run))


def absent(run: Run, name: str) -> tuple[bool, object]:
    """Check that a service found nothing after a kexec."""
    found = [run.one(name, boot)["names"] for boot in (2, 3)]
    return found == [[], []], {"descriptors": found}


def arrived(run: Run, name: str, boots: tuple[int, ...] = (2, 3)) -> tuple[bool, object]:
    """Check that a service found its memfd after each kexec, with every start counted in it."""
    images = [run.one(name, boot)["image"] for boot in boots]
    earlier = [len([each for each in run.all(name) if each["boot"] < boot]) for boot in boots]
    held = all(image["equal"] and image["count"] == count for image, count in zip(images, earlier, strict=True))
    return held, images


def nameless(run: Run) -> tuple[bool, object]:
    """Compare link, mode, seals and offset."""
    image = run.one("plain-yes", 2)["image"]
    wanted = {"link": "/ (deleted)", "mode": "0o777", "seals": "0x6", "offset": 100}
    return {key: image[key] for key in wanted} == wanted, image


def only_memfds(run: Run) -> tuple[bool, object]:
    """Compare the store of a service with each kind of descriptor before and after."""
    before = run.state("plain", 1, "before")["units"]["plain-kinds.service"]["NFileDescriptorStore"]
    after = run.one("plain-kinds", 2)["names"]
    warned = [line for line in run.console.splitlines() if "Failed to preserve LUO fd" in line]
    names = {"pipe", "eventfd", "socket", "tmpfs-file", "ext4-file", "directory"}
    said = {name for name in names if any(f"'{name}'" in line for line in warned)}
    held = int(before) == len(names) + 2 and after == ["empty-memfd", "img"] and said == names
    return held, {"stored": before, "arrived": after, "warnings": warned[:8]}


def uncharged(run: Run) -> tuple[bool, object]:
    """Compare the memory of a unit with MemoryMax= before and after."""
    before, after = run.one("plain-limit", 1), run.one("plain-limit", 2)
    held, _ = arrived(run, "plain-limit")
    small = max(after["charged"]["shmem"], after["charged_after"]["shmem"]) < MIB
    return held and small, {"before": before["charged"], "after": after["charged_after"], "image": after["image"]}


def late(run: Run, name: str) -> tuple[bool, object]:
    """Check the store of a unit that did not run in boot 2, and its start in boot 3."""
    first = run.state(name.split("-", maxsplit=1)[0], 2)["units"][f"{name}.service"]
    load = "not-found" if "removed" in name else "loaded"
    state = (first["LoadState"], first["SubState"], first["NFileDescriptorStore"])
    if name.startswith("plain"):
        held, image = arrived(run, name, (3,))
    else:
        held, image = inherited(run, name, boots=(3,))
    return held and state == (load, "dead-resources-pinned", "1") and not run.all(name, 2), [state, image]


def through_initrd(run: Run) -> tuple[bool, object]:
    """Check all services whose memfd is to arrive in boot 4."""
    names = [s.name for s in SERVICES if s.script == "plain" and 4 in s.boots]
    found = {name: arrived(run, name, (4,)) for name in names}
    return all(held for held, _ in found.values()), {name: image for name, (_, image) in found.items()}


# kho.live


def live_services(run: Run) -> Iterator[Claim]:
    """What arrives of a kho.live image, and what `open` says."""
    yield run.claim("kho.live: systemctl restart keeps the images, also after a daemon-reload", lambda: restarted(run))
    for name, setting in (("live-no", "no"), ("live-restart", "restart")):
        yield run.claim(f"kho.live, Preserve={setting}: a new image after a kexec", partial(begun, run, name))
    yield run.claim(
        "kho.live, kexec=True with Preserve=restart: a new image after a kexec",
        lambda: begun(run, "live-restart", "-kexec"),
    )
    for name, image, setting in (
        ("live-success", "", "Preserve=on-success"),
        ("live-yes", "-a", "Preserve=yes"),
        ("live-yes", "-b", "Preserve=yes, a second image of the service"),
        ("live-yes", "-kexec", "Preserve=yes and kexec=True"),
        ("live-yes", "-session", "Preserve=yes, kexec=True, and its session in the store"),
        ("live-limit", "", "Preserve=yes under MemoryMax=80M, 48 MiB"),
        ("live-noexec", "", "Preserve=yes, made under vm.memfd_noexec=1"),
    ):
        text = f"kho.live, {setting}: every object and commit arrives, two kexecs"
        yield run.claim(text, partial(inherited, run, name, image))
    yield run.claim(
        "kho.live, kexec=True without a store, above MemoryMax=: OutOfMemoryError, the service lives",
        lambda: refused(run),
    )
    yield run.claim("kho.live, unit not started for two kernels: the image is complete", lambda: late(run, "live-idle"))
    yield run.claim(
        "kho.live, unit file removed and put back: the image is complete", lambda: late(run, "live-removed")
    )
    yield run.claim("kho.live, through an initrd: the image arrives", lambda: inherited(run, "live-yes", "-a", (4,)))


def inherited(run: Run, name: str, image: str = "", boots: tuple[int, ...] = (2, 3)) -> tuple[bool, object]:
    """Check an image of a service after each kexec: it is inherited, equal, and has counted every start."""
    held, shown = True, []
    for boot in boots:
        found = run.one(name, boot)
        earlier = len([each for each in run.all(name) if each["boot"] < boot])
        one = found["images"][name + image]
        warned = [text for text in found["warnings"] if name + image in text]
        shown.append({**one, "LISTEN_FDNAMES": found["listen"], "warnings": warned})
        held &= one.get("inherited") is True and one.get("equal") is True and one.get("starts") == earlier
        held &= one.get("dropped") == ["uncommitted"] and not warned
    return held, shown


def begun(run: Run, name: str, image: str | None = None) -> tuple[bool, object]:
    """Check that a service, or one of its images, began with a new image after the kexec."""
    found = run.one(name, 2)["images"]
    return all(
        one.get("transport") == "new" for key, one in found.items() if image is None or key == name + image
    ), found


def restarted(run: Run) -> tuple[bool, object]:
    """Check two restarts within a kernel; the second one after a daemon-reload, which reverses the descriptors."""
    found = run.all("live-yes", 1)
    orders = [each["listen"] for each in found]
    held = len(found) == 3 and orders[1] != orders[2]
    for starts, each in enumerate(found):
        for image in each["images"].values():
            came = image.get("inherited") and image.get("equal") and image.get("starts") == starts
            held &= bool(came) if starts else image.get("transport") == "new"
    return held, [orders, found[-1]["images"]]


def refused(run: Run) -> tuple[bool, object]:
    """Check the service whose image does not fit its cgroup."""
    found = run.one("live-too-large", 1)["images"]["live-too-large"]
    state = run.state("live", 1, "before")["units"]["live-too-large.service"]
    return found.get("error") == "OutOfMemoryError" and state["ActiveState"] == "active", [found, state]


# The commands


def commands(run: Run) -> Iterator[Claim]:
    """`kho doctor`, `kho inspect live` and `kho ps` in the guest."""
    yield run.claim(
        "kho doctor: DOC042 names the units whose store will not cross, and no others", lambda: will_not_cross(run)
    )
    yield run.claim(
        "kho doctor: DOC043 names the units without a unit file, after the kexec only", lambda: for_no_unit(run)
    )
    yield run.claim("kho doctor: DOC044 after kexec_load only", lambda: handed_nothing(run))
    yield run.claim("kho doctor: DOC046 counts the shared memory of no cgroup", lambda: of_no_cgroup(run))
    yield run.claim("kho doctor: cold boot and handover are told apart in all five kernels", lambda: boots(run))
    yield run.claim("kho inspect live: both directions, exit code 0, in all five kernels", lambda: inspected(run))
    yield run.claim("kho ps: lists the image of each running service", lambda: listed(run))


def doctor(run: Run, boot: int) -> dict[str, Any]:
    """Return the findings of `kho doctor` by their ids."""
    answer = run.one("kho doctor", boot)["answer"]
    return {each["id"]: each for each in answer["findings"]}


def will_not_cross(run: Run) -> tuple[bool, object]:
    """Compare DOC042 with the unit files."""
    finding = doctor(run, 1)["DOC042"]
    text = json.dumps(finding)
    ours = {s.name for s in SERVICES if s.script == "plain" and s.preserve in (None, "no", "restart")}
    others = {s.name for s in SERVICES} - ours
    return all(f"{name}.service" in text for name in ours) and not any(f"{n}.service" in text for n in others), finding


def for_no_unit(run: Run) -> tuple[bool, object]:
    """Compare DOC043 before and after."""
    before, after, end = (doctor(run, boot).get("DOC043") for boot in (1, 2, 4))
    text = json.dumps(after)
    held = before is None and end is None and "plain-removed.service" in text
    return held, {"boot 1": before, "boot 2": after, "boot 4": end}


def handed_nothing(run: Run) -> tuple[bool, object]:
    """Find DOC044 in boot 5 only."""
    found = [("DOC044" in doctor(run, boot)) for boot in (1, 2, 3, 4, 5)]
    return found == [False, False, False, False, True], {"DOC044 in boots 1 to 5": found}


def of_no_cgroup(run: Run) -> tuple[bool, object]:
    """Find DOC046 in boots after a handover, where at least two images of 48 MiB are."""
    found = [doctor(run, boot).get("DOC046") for boot in (1, 2, 3)]
    return found[0] is None and found[1] is not None and found[2] is not None, found


def boots(run: Run) -> tuple[bool, object]:
    """Compare how each kernel was started."""
    found = [run.one("kho doctor", boot)["answer"]["boot"] for boot in (1, 2, 3, 4, 5)]
    return found == ["cold", "kho", "kho", "kho", "cold"], found


def inspected(run: Run) -> tuple[bool, object]:
    """Look at the exit codes and at what was shown."""
    found = {}
    for boot in (1, 2, 3, 4, 5):
        each = run.one("kho inspect live", boot)
        found[boot] = [each["code"], sorted(each["answer"] or {}), each["err"][-200:]]
    return all(code == 0 for code, _, _ in found.values()), found


def listed(run: Run) -> tuple[bool, object]:
    """Compare with the services."""
    text = json.dumps(run.one("kho ps", 2)["answer"])
    names = ["live-yes-a", "live-yes-b", "live-yes-kexec", "live-no"]
    return all(f'"{name}"' in text for name in names), text
