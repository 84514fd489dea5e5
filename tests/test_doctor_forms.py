"""Kernel logs in every format in which they are stored and pasted parse to the same facts, with one boot and two."""

from __future__ import annotations

import base64
import bz2
import dataclasses
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kho.doctor import examine
from kho.doctor.kernellog import KernelLog, parse
from kho.doctor.tree import Piece

from doctor_hosts import HOSTS, MIB, copied, log, machine, write

Wrapper = Callable[[list[str]], bytes]
FAILED = "scratch-too-big"
FINE = "default-scratch"
HANDED = ("KHO: found kexec handover data.", "KHO: exec from: 7.3.4 (count 1)")
STAMP = re.compile(r"\[ *(\d+\.\d{6})\] ")
BOOT = "8d35cc1a3b0f4c0e9ad2f4d4f0d0a1b2"
OTHER = "0f0e0d0c0b0a49998887776665554443"
ISO = "2026-11-23T09:15:57"


def log_lines(tree: Path) -> list[str]:
    """Return the lines of a captured log with time stamps, which the capture lacks, instead of log levels."""
    texts = [re.sub(r"^<\d>", "", line) for line in (tree / "var/log/dmesg").read_text().splitlines()]
    return [f"[{n / 1000:12.6f}] {text}" for n, text in enumerate(texts)]


def without_stamp(line: str) -> str:
    """Return a line without its time stamp."""
    return STAMP.sub("", line, count=1)


def stamp(line: str) -> str:
    match = STAMP.match(line)
    return match[1] if match else "0.000000"


def each(form: Callable[[str], str], end: str = "\n") -> Wrapper:
    """Return a wrapper that writes each line in another form."""
    return lambda lines: "".join(form(line) + end for line in lines).encode()


def with_colors(line: str) -> str:
    """Format a line as util-linux `dmesg --color=always` does: time in green, subsystem in brown."""
    text = re.sub(r"^(\w[\w .-]{0,30}: )", "\x1b[33m\\1\x1b[0m", without_stamp(line))
    return f"\x1b[32m[{stamp(line):>12}] \x1b[0m{text}"


def split_boots(lines: list[str]) -> list[list[str]]:
    """Split a log into its boots."""
    found: list[list[str]] = []
    for line in lines:
        if "Linux version" in line or not found:
            found.append([])
        found[-1].append(line)
    return found


def entries(lines: list[str]) -> list[dict[str, str]]:
    """Return the journal entries of the lines, boot by boot."""
    ids = [OTHER, BOOT][-len(split_boots(lines)) :]
    return [
        {
            "__CURSOR": f"s=1;i={n:x};b={boot};m=1;t=2;x=3",
            "_BOOT_ID": boot,
            "_TRANSPORT": "kernel",
            "SYSLOG_IDENTIFIER": "kernel",
            "PRIORITY": "6",
            "MESSAGE": without_stamp(line),
        }
        for boot, part in zip(ids, split_boots(lines), strict=True)
        for n, line in enumerate(part)
    ]


def export(lines: list[str], binary: bool = False) -> bytes:
    """Format lines as `journalctl -o export` does."""
    out = b""
    for entry in entries(lines):
        for key, value in entry.items():
            data = value.encode()
            plain = f"{key}={value}\n".encode()
            out += (
                key.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
                if binary and key == "MESSAGE"
                else plain
            )
        out += b"\n"
    return out


def verbose(lines: list[str]) -> bytes:
    """Format lines as `journalctl -o verbose` does."""
    out = ""
    for entry in entries(lines):
        out += f"Mon 2026-11-23 09:15:57.123456 UTC [{entry['__CURSOR']}]\n"
        out += "".join(f"    {key}={value}\n" for key, value in entry.items() if key != "__CURSOR")
    return out.encode()


def json_entries(lines: list[str], form: Callable[[dict[str, object]], str], key: str = "") -> bytes:
    """Format the journal entries of lines as JSON values."""
    return "".join(form({**entry, key: 1} if key else dict(entry)) for entry in entries(lines)).encode()


def byte_arrays(lines: list[str]) -> bytes:
    """Format lines as `journalctl -o json` does for messages with bytes that are not text."""
    made = [{**entry, "MESSAGE": list(b"\x1b[0m" + entry["MESSAGE"].encode())} for entry in entries(lines)]
    return "".join(json.dumps(entry) + "\n" for entry in made).encode()


def json_dmesg(lines: list[str]) -> bytes:
    """Format lines as `dmesg --json` of util-linux 2.39 does, one boot after the other."""
    out = ""
    for part in split_boots(lines):
        rows = [
            f'      {{\n         "pri": 5,\n         "time": {stamp(line):>12},\n'
            f'         "msg": {json.dumps(without_stamp(line))}\n      }}'
            for line in part
        ]
        out += '{\n   "dmesg": [\n' + ",".join(rows) + "\n   ]\n}\n"
    return out.encode()


def kmsg(line: str, extra: str = "") -> str:
    """Format a line as a record of /dev/kmsg."""
    text = "".join(c if c.isprintable() and c != "\\" else f"\\x{ord(c):02x}" for c in without_stamp(line))
    return f"6,87,{int(float(stamp(line)) * 1e6)},-{extra};{text}"


def fragments(lines: list[str]) -> bytes:
    """Format lines as extended netconsole does, with fragments of long messages."""
    out = ""
    for line in lines:
        text = without_stamp(line)
        cut = [text[at : at + 90] for at in range(0, len(text), 90)] or [""]
        for n, part in enumerate(cut):
            extra = f",ncfrag={n * 90}/{len(text)}" if len(cut) > 1 else ""
            out += kmsg(f"[    {stamp(line)}] {part}", extra) + "\n"
    return out.encode()


def with_systemd(lines: list[str]) -> bytes:
    """Format lines as a console to which systemd also writes, in color and within lines of the kernel."""
    out = ""
    for n, line in enumerate(lines):
        out += line + ("" if n % 7 == 3 else "\r\n")
        out += "[  \x1b[0;32mOK  \x1b[0m] Started \x1b[0;1;39mJournal Service\x1b[0m.\r\n" if n % 7 == 3 else ""
    return out.encode()


def wrapped_at_80(lines: list[str]) -> bytes:
    """Wrap lines as text copied from a terminal of 80 wrapped_at_80 is wrapped."""
    return "".join(line[at : at + 80] + "\n" for line in lines for at in range(0, max(len(line), 1), 80)).encode()


def rsyslog_debug(line: str) -> str:
    """Format a line with the template RSYSLOG_DebugFormat, which has each message three times."""
    text = without_stamp(line)
    return (
        "Debug line with all properties:\nFROMHOST: 'vm', fromhost-ip: '127.0.0.1', HOSTNAME: 'vm', PRI: 6,\n"
        "syslogtag 'kernel:', programname: 'kernel', APP-NAME: 'kernel', PROCID: '-', MSGID: '-',\n"
        f"msg: ' {text}'\nescaped msg: ' {text}'\ninputname: imkmsg rawmsg: '{text}'\n"
    )


def ec2(lines: list[str]) -> bytes:
    """Format lines as the response of EC2's GetConsoleOutput."""
    text = base64.encodebytes("\r\n".join(lines).encode()).decode()
    return f"<GetConsoleOutputResponse><output>{text}</output></GetConsoleOutputResponse>".encode()


def with_separators(mark: str) -> Wrapper:
    """Return a wrapper that writes a separator before each boot, as journalctl does."""
    form = each(lambda line: f"Nov 23 09:15:57 vm kernel: {without_stamp(line)}")
    return lambda lines: b"".join(mark.encode() + b"\n" + form(part) for part in split_boots(lines))


def cri(line: str) -> str:
    return f"{ISO}.123456789Z stdout F {line}"


def docker(line: str) -> str:
    return json.dumps({"log": line + "\r\n", "stream": "stdout", "time": f"{ISO}.123456789Z"})


FORMS: dict[str, Wrapper] = {
    "dmesg": each(str),
    "dmesg -t": each(without_stamp),
    "dmesg -x": each(lambda line: f"kern  :warn  : {line}"),
    "dmesg -d": each(lambda line: f"[{stamp(line):>12} <    0.000000>] {without_stamp(line)}"),
    "dmesg -T": each(lambda line: f"[Mon Nov 23 09:15:57 2026] {without_stamp(line)}"),
    "dmesg -Tx": each(lambda line: f"kern  :info  : [Mon Nov 23 09:15:57 2026] {without_stamp(line)}"),
    "dmesg -e": each(lambda line: f"[Nov23 09:15] {without_stamp(line)}"),
    "dmesg -H": each(lambda line: f"[  +0.000012] {without_stamp(line)}"),
    "dmesg -r": each(lambda line: f"<5>{line}"),
    "dmesg -rt": each(lambda line: f"<5>{without_stamp(line)}"),
    "dmesg -rt, no line ends": each(lambda line: f"<5>{without_stamp(line)}", ""),
    "dmesg --color=always": each(with_colors),
    "dmesg -T --color=always": each(
        lambda line: f"\x1b[32m[Mon Nov 23 09:15:57 2026] \x1b[0m\x1b[33m{without_stamp(line)}\x1b[0m"
    ),
    "dmesg --time-format=iso": each(lambda line: f"{ISO},000000+00:00 {without_stamp(line)}"),
    "dmesg --json": json_dmesg,
    "printk.caller": each(lambda line: f"[{stamp(line):>12}][    T0] {without_stamp(line)}"),
    "/dev/kmsg": each(kmsg),
    "ts": each(lambda line: f"Nov 23 09:15:57 {line}"),
    "ts %.s": each(lambda line: f"1795425357.123456 {line}"),
    "ts -i": each(lambda line: f"00:00:00 {line}"),
    "RFC 3164": each(lambda line: f"Nov 23 09:15:57 vm kernel: {line}"),
    "RFC 3164 with a priority": each(lambda line: f"<6>Nov 23 09:15:57 vm kernel: {line}"),
    "RFC 3339 syslog": each(lambda line: f"{ISO}.123456+00:00 vm kernel: {line}"),
    "RFC 5424": each(lambda line: f"<6>1 {ISO}.123456Z vm kernel - - - {line}"),
    "RFC 5424 with data": each(lambda line: f'<6>1 {ISO}Z vm kernel - - [meta sequenceId="29"] {line}'),
    "syslog with escapes": each(lambda line: f"Nov 23 09:15:57 vm kernel: #033[32m{line}#033[0m"),
    "journalctl -o short": each(lambda line: f"Nov 23 09:15:57 vm kernel: {without_stamp(line)}"),
    "journalctl -o short-iso": each(lambda line: f"{ISO}+0000 vm kernel: {without_stamp(line)}"),
    "journalctl -o short-monotonic": each(lambda line: f"[{stamp(line):>12}] vm kernel: {without_stamp(line)}"),
    "journalctl -o short-full": each(lambda line: f"Mon 2026-11-23 09:15:57 UTC vm kernel: {without_stamp(line)}"),
    "journalctl -o cat": each(without_stamp),
    "journalctl -r": lambda lines: each(lambda line: f"Nov 23 09:15:57 vm kernel: {without_stamp(line)}")(lines[::-1]),
    "journalctl -r -o json": lambda lines: b"\n".join(
        reversed(json_entries(lines, lambda entry: json.dumps(entry) + "\n").splitlines())
    ),
    "journalctl -o verbose": verbose,
    "journalctl -o export": export,
    "journalctl -o export, binary": lambda lines: export(lines, binary=True),
    "journalctl -o json": lambda lines: json_entries(lines, lambda entry: json.dumps(entry) + "\n"),
    "journalctl -o json, bytes": byte_arrays,
    "journalctl -o json-pretty": lambda lines: json_entries(lines, lambda entry: json.dumps(entry, indent="\t") + "\n"),
    "journalctl -o json-seq": lambda lines: json_entries(lines, lambda entry: "\x1e" + json.dumps(entry) + "\n"),
    "journalctl -o json-sse": lambda lines: json_entries(lines, lambda entry: f"data: {json.dumps(entry)}\n\n"),
    "GitHub Actions": each(lambda line: f"{ISO}.1234567Z {line}"),
    "GitHub Actions, a step": each(lambda line: f"boot\tRun the guest\t{ISO}.1234567Z {line}"),
    "GitLab": each(lambda line: f"{ISO}.123456Z 01O {line}"),
    "GitLab, a section": lambda lines: b"section_start:1795425357:boot\r\x1b[0K" + each(str)(lines),
    "Buildkite": each(lambda line: f"\x1b_bk;t=1795425357123\x07{line}"),
    "Jenkins": each(lambda line: f"[{ISO}.123Z] {line}"),
    "Jenkins, elapsed": each(lambda line: f"00:00:12.345  {line}"),
    "docker": each(docker),
    "docker compose": each(lambda line: f"guest-1  | {line}"),
    "kubernetes CRI": each(cri),
    "stern": each(lambda line: f"guest-0 boot {line}"),
    "logfmt": each(lambda line: f"time={ISO}Z level=info msg={json.dumps(line)} source=console"),
    "fluent bit": each(lambda line: json.dumps({"date": 1795425357.1, "log": line, "kubernetes": {"pod": "guest"}})),
    "JSON after a prefix": each(lambda line: f"guest-0 {docker(line)}"),
    "docker in docker": each(lambda line: json.dumps({"log": docker(line) + "\n", "stream": "stdout"})),
    "cloud logging": lambda lines: json.dumps(
        [{"insertId": "1", "textPayload": line} for line in lines], indent=2
    ).encode(),
    "cloud console": lambda lines: json.dumps({"InstanceId": "i-1", "Output": "\r\n".join(lines) + "\r\n"}).encode(),
    "serial, CR LF": each(str, "\r\n"),
    "serial, CR CR LF": each(str, "\r\r\n"),
    "serial, CR alone": each(str, "\r"),
    "serial, LF CR": each(str, "\n\r"),
    "serial, no line ends": each(str, ""),
    "serial, with systemd": with_systemd,
    "conserver": each(lambda line: f"[Mon Nov 23 09:15:57 2026]{line}", "\r\n"),
    "screen, a prompt before": lambda lines: (
        b"\x1b[H\x1b[2J\x1b[3J\x1b]0;root@vm\x07root@vm:~# dmesg\r\n" + each(str, "\r\n")(lines)
    ),
    "mail": each(lambda line: f"> {line}"),
    "patchew": each(lambda line: f"    | {line}"),
    "netconsole": each(lambda line: line),
    "netconsole, extended": each(lambda line: f"7.3.4,{kmsg(line)}"),
    "netconsole, in pieces": fragments,
    "netconsole, received": each(lambda line: f"192.0.2.7 6665 {kmsg(line)}"),
    "pstore": lambda lines: b"Panic#1 Part1\n" + each(lambda line: f"<6>{line}")(lines),
    "ramoops": lambda lines: b"====1795425357.123456-D\n" + each(lambda line: f"<6>{line}")(lines),
    "BOM": lambda lines: b"\xef\xbb\xbf" + each(str)(lines),
    "UTF-16": lambda lines: each(str, "\r\n")(lines).decode().encode("utf-16"),
    "UTF-16 without BOM": lambda lines: each(str, "\r\n")(lines).decode().encode("utf-16-le"),
    "UTF-16, big-endian": lambda lines: b"\xfe\xff" + each(str, "\r\n")(lines).decode().encode("utf-16-be"),
    "zeros": lambda lines: b"\0" * 64 + each(str)(lines).replace(b"\n", b"\0\n"),
    "80 wrapped_at_80": wrapped_at_80,
    "rsyslog, debug": each(rsyslog_debug),
    "syslog, no space": each(lambda line: f"Nov 23 09:15:57 vm kernel:{line}"),
    "busybox logread": each(lambda line: f"Mon Nov 23 09:15:57 2026 kern.info kernel: {line}"),
    "logcat": each(lambda line: f"11-23 09:15:57.123     0     0 I KERNEL  : {line}"),
    "minicom": each(lambda line: f"[2026-11-23 09:15:57.123] {line}", "\r\n"),
    "a screen": each(lambda line: f"\x1b[0;37m{line}\x1b[K\x1b[m", "\r\n"),
    "systemd-cat": each(lambda line: f"Nov 23 09:15:57 vm systemd-cat[812]: {line}"),
    "journalctl, boots": with_separators(f"-- Boot {BOOT} --"),
    "journalctl, reboots": with_separators("-- Reboot --"),
    "kubectl --prefix": each(lambda line: f"[pod/guest-0/boot] {ISO}.123456789Z {line}"),
    "GitLab, sections": lambda lines: (
        b"\x1b[0Ksection_start:1:boot\r\x1b[0Kboot\n" + each(str)(lines) + b"\x1b[0Ksection_end:2:boot\r"
    ),
    "az boot diagnostics": lambda lines: json.dumps("\r\n".join(lines) + "\r\n").encode(),
    "EC2's answer": ec2,
    "CSV": each(lambda line: f'"{ISO}","{line}"'),
    "one string of Python": lambda lines: repr("\n".join(lines)).encode(),
    "Ansible": lambda lines: ('ok: [vm] => {\n    "dmesg.stdout": ' + json.dumps("\n".join(lines)) + "\n}\n").encode(),
    "Ansible, a list": lambda lines: (
        'ok: [vm] => {\n    "msg": [\n' + ",\n".join("        " + json.dumps(line) for line in lines) + "\n    ]\n}\n"
    ).encode(),
    "LAVA": each(lambda line: f"- {{dt: '{ISO}.1', lvl: target, msg: '{line}'}}"),
    "gzip": lambda lines: gzip.compress(each(str)(lines)),
    "bzip2": lambda lines: bz2.compress(each(str)(lines)),
    "xz": lambda lines: lzma.compress(each(str)(lines)),
}  # fmt: skip


def facts(log: KernelLog | None) -> dict[str, object]:
    """Return the facts of a log without file names and line numbers."""
    assert log is not None
    known = dataclasses.asdict(log)
    known["sizes"] = [(phys, nbytes) for phys, nbytes, _ in log.cma]
    for name in ("file", "boots", "boot_id", "stamped", "cma"):
        del known[name]

    def without_place(value: object) -> object:
        if isinstance(value, (list, tuple)) and len(value) == 3 and value[0] == "dmesg":
            return value[2]  # the text of an Evidence (file, line, text)
        return [without_place(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {name: without_place(value) for name, value in known.items()}


def decompressed(data: bytes) -> bytes:
    for magic, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ", lzma)):
        if data.startswith(magic):
            return bytes(module.decompress(data))
    return data


ONE = {"fine": log_lines(HOSTS / FINE), "failed": log_lines(HOSTS / FAILED)}
ONE["handed over"] = [*ONE["fine"][:20], *(f"[    0.000000] {line}" for line in HANDED), *ONE["fine"][20:]]
TWO = {
    "failed, then fine": ONE["failed"] + ONE["fine"],
    "fine, then failed": ONE["fine"] + ONE["failed"],
    "fine, then handed over": ONE["fine"] + ONE["handed over"],
    "handed over, then failed": ONE["handed over"] + ONE["failed"],
}
EXPECTED = {name: facts(parse(Piece("dmesg", each(str)(lines)))) for name, lines in ONE.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_every_format_parses_like_the_plain_log(name: str, form: str) -> None:
    lines = ONE[name] if name in ONE else TWO[name]
    found = facts(parse(Piece("dmesg", decompressed(FORMS[form](lines)))))
    assert found == EXPECTED[name.rpartition("then ")[2]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_log_raises_nothing_and_invents_nothing(data: st.DataObject) -> None:
    """Damage neither raises nor adds a failure or a handover that the log does not have."""
    name = data.draw(st.sampled_from([*ONE, *TWO]))
    lines = ONE[name] if name in ONE else TWO[name]
    raw = decompressed(FORMS[data.draw(st.sampled_from(list(FORMS)))](lines))
    for _ in range(data.draw(st.integers(1, 6))):
        at, cut = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 3000))
        raw = raw[:at] + data.draw(st.binary(max_size=20)) + raw[at + cut :]
    found = parse(Piece("dmesg", raw[: len(raw) // 2], raw[len(raw) // 2 :]))
    if found is not None and not any("Failed to reserve" in line for line in lines):
        assert (found.disabled, found.failures) == (None, [])
    if found is not None and not any("found kexec handover" in line for line in lines):
        assert (found.found, found.exec_from) == (None, None)


def test_at_least_46_formats_are_covered() -> None:
    assert len(FORMS) >= 46


@pytest.mark.parametrize("form", FORMS)
def test_a_failure_of_an_earlier_boot_is_ignored(form: str, tmp_path: Path) -> None:
    tree = copied(FINE, tmp_path, "var/log/dmesg", "sys/kernel/debug")
    report = examine(write(tree, "dmesg", FORMS[form](TWO["failed, then fine"])))
    ids = {finding.id for finding in report.findings}
    assert (report.state, report.boot, report.scratch) == ("active", "cold", 192 * MIB)
    assert not ids & {"DOC003", "DOC004"}
    assert report.unread == []


@pytest.mark.parametrize("form", FORMS)
def test_a_failure_of_the_last_boot_is_certain(form: str, tmp_path: Path) -> None:
    tree = copied(FAILED, tmp_path, "var/log/dmesg")
    report = examine(write(tree, "dmesg", FORMS[form](TWO["fine, then failed"])))
    assert (report.state, report.boot, report.leftover) == ("failed", "cold", 64 * MIB)
    assert [f.certainty for f in report.findings if f.id == "DOC003"] == ["certain"]


@pytest.mark.parametrize("form", ["dmesg", "dmesg -t", "journalctl -o json", "serial, no line ends"])
def test_a_log_of_an_earlier_boot_is_ignored(form: str, tmp_path: Path) -> None:
    tree = copied(FINE, tmp_path, "var/log/dmesg", "sys/kernel/debug")
    report = examine(write(tree, "dmesg", FORMS[form](ONE["failed"])))
    assert (report.state, report.scratch) == ("active", 192 * MIB)
    assert [(file, "another boot" in why) for file, why in report.unread] == [("dmesg", True)]


def test_another_build_of_the_same_release_is_another_boot(tmp_path: Path) -> None:
    tree = copied(FINE, tmp_path, "var/log/dmesg", "sys/kernel/debug", "proc/cmdline")
    other = [line.replace("Nov 23 09:15:57 UTC 2026", "Oct 12 08:00:00 UTC 2026") for line in ONE["failed"]]
    report = examine(write(tree, "dmesg", each(str)(other)))
    assert (report.state, len(report.unread)) == ("active", 1)
    assert "another build" in report.unread[0].why


@pytest.mark.parametrize("form", ["journalctl -o export", "journalctl -o verbose", "journalctl -o json"])
def test_the_boot_id_of_the_journal_separates_boots(form: str, tmp_path: Path) -> None:
    tree = copied(FAILED, tmp_path, "var/log/dmesg")
    write(tree, "dmesg", FORMS[form](ONE["failed"]))
    write(tree, "proc/sys/kernel/random/boot_id", "8d35cc1a-3b0f-4c0e-9ad2-f4d4f0d0a1b2\n")
    assert [f.certainty for f in examine(tree).findings if f.id == "DOC003"] == ["certain"]
    write(tree, "proc/sys/kernel/random/boot_id", "00000000-3b0f-4c0e-9ad2-f4d4f0d0a1b2\n")
    report = examine(tree)
    assert [f.certainty for f in report.findings if f.id == "DOC003"] == ["likely"]
    assert f"the log's last boot is {BOOT}" in report.unread[0].why


def test_a_boot_separator_of_the_journal_starts_a_boot_without_a_banner(tmp_path: Path) -> None:
    text = FORMS["journalctl -o short"](ONE["failed"]) + f"-- Boot {BOOT} --\n".encode()
    text += b"Nov 23 10:00:00 vm systemd[1]: Started Journal Service.\n"
    assert examine(write(machine(tmp_path / "a", cmdline="quiet"), "journal.txt", text)).state == "off"
    short = FORMS["journalctl -o short"](ONE["failed"]) + b"-- Reboot --\n"
    assert examine(write(machine(tmp_path / "b", cmdline="quiet"), "journal.txt", short)).state == "off"


def test_a_time_stamp_that_goes_back_starts_another_boot(tmp_path: Path) -> None:
    late = "[   99.000000] KHO: Failed to reserve scratch area, disabling kexec handover\n"
    text = "[    0.000000] Linux version 7.3.4 (x)\n" + late + "[    0.100000] cma: Reserved 16 MiB at 0x1000000\n"
    assert examine(write(machine(tmp_path), "dmesg", text)).state == "off"


def test_a_different_command_line_starts_another_boot(tmp_path: Path) -> None:
    """In a log without time stamps and with a missing banner. A repeated command line is the output of a program."""
    failed = [without_stamp(line) for line in ONE["failed"]]
    text = "".join(f"{line}\n" for line in [*failed, "Command line: quiet", "Kernel command line: quiet"])
    log = parse(Piece("dmesg", text.encode()))
    assert log is not None
    assert (log.boots, log.failures, log.disabled) == (2, [], None)
    again = [line for line in failed if "ommand line: " in line]
    log = parse(
        Piece("dmesg", "".join(f"{line}\n" for line in [*failed, "+ dmesg | grep -i command", *again]).encode())
    )
    assert facts(log) == EXPECTED["failed"]


def test_a_log_without_its_beginning_is_used_if_nothing_contradicts_it(tmp_path: Path) -> None:
    tree = copied(FAILED, tmp_path, "var/log/dmesg")
    lines = ONE["failed"]
    at = next(n for n, line in enumerate(lines) if "Kernel command line" in line)
    report = examine(write(tree, "dmesg", each(str)(lines[at + 1 :])))
    assert report.release == "7.3.4"
    assert [f.certainty for f in report.findings if f.id == "DOC003"] == ["certain"]


def test_backslashes_in_initrd_are_not_line_ends() -> None:
    line = r"Command line: initrd=\EFI\nixos\initrd.efi kho=on"
    log = parse(Piece("dmesg", f"[    0.000000] Linux version 7.3.4 (x)\n[    0.000000] {line}\n".encode()))
    assert log is not None
    assert log.cmdline is not None
    assert log.cmdline.text == line.removeprefix("Command line: ")


@pytest.mark.parametrize("tag", ["logger", "root", "ticket[812]", "dockerd[1]", "systemd"])
def test_syslog_messages_of_programs_are_ignored_with_or_without_a_process_id(tag: str, tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(64 * MIB,))
    lines = ["kernel: Linux version 7.3.4 (x)", f"{tag}: KHO: Failed to reserve scratch area, disabling kexec handover"]
    for when in (
        "Nov 23 09:15:57",
        f"{ISO}+0000",
        f"{ISO}.123456+00:00",
        "Mon 2026-11-23 09:15:57 UTC",
        "1795425357.123",
    ):
        write(tree, "var/log/messages", "".join(f"{when} vm.example.org {line}\n" for line in lines))
        assert examine(tree).state == "active", when


def test_proc_version_printed_in_a_log_starts_no_boot(tmp_path: Path) -> None:
    lines = [*ONE["failed"], "+ cat /proc/version", without_stamp(ONE["failed"][0])]
    log = parse(Piece("dmesg", "".join(f"{line}\n" for line in lines).encode()))
    assert facts(log) == EXPECTED["failed"]


def test_kernel_messages_quoted_by_programs_are_ignored(tmp_path: Path) -> None:
    quoted = "KHO: Failed to reserve scratch area, disabling kexec handover"
    tree = machine(tmp_path, scratch=(64 * MIB,))
    lines = ["vm kernel: Linux version 7.3.4 (x)", f"vm ticket[812]: {quoted}", f"vm sudo[9]: COMMAND=grep '{quoted}'"]
    write(tree, "var/log/messages", "".join(f"Nov 23 09:15:57 {line}\n" for line in lines))
    assert examine(tree).state == "active"


def test_the_console_of_a_guest_in_the_journal_of_its_host_is_ignored(tmp_path: Path) -> None:
    host = entries(ONE["fine"])
    guest = [{**entry, "_TRANSPORT": "stdout", "SYSLOG_IDENTIFIER": "qemu"} for entry in entries(ONE["failed"])]
    text = "".join(json.dumps(entry) + "\n" for entry in host + guest)
    assert facts(parse(Piece("dmesg", text.encode()))) == EXPECTED["fine"]
    exported = "".join("".join(f"{key}={value}\n" for key, value in entry.items()) + "\n" for entry in host + guest)
    assert facts(parse(Piece("dmesg", exported.encode()))) == EXPECTED["fine"]


def test_a_wrapped_command_line_is_joined() -> None:
    text = "Linux version 7.3.4 (x)\nKernel command line: kho=on \\\nKernel command line: kho_scratch=1M,1M,1M quiet\n"
    log = parse(Piece("dmesg", text.encode()))
    assert log is not None
    assert log.cmdline is not None
    assert log.cmdline.text == "kho=on kho_scratch=1M,1M,1M quiet"


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        ("ro quiet", "ro quiet", True),
        ("ro  quiet", "ro quiet ", True),
        ("ro quiet", 'ro quiet"', True),
        ("ro quiet", "ro quietx86/fpu: Supporting XSAVE", True),
        ("kho=on", "kho=on kho_scratch=64M,3G,64M", False),
        ("kho=on kho_scratch=64M,3G,64M", "kho=on", False),
        ("console=ttyS0", "console=ttyS0,115200", False),
        ("ro " + "x" * 1200, "ro " + "x" * 900, True),
    ],
)
def test_command_lines_are_compared_up_to_where_one_is_truncated(
    shown: str, said: str, same: bool, tmp_path: Path
) -> None:
    tree = log(machine(tmp_path, cmdline=shown), f"Command line: {said}", "KHO: luo")
    assert ("another boot" in str(examine(tree).unread)) is not same


def test_a_log_of_1501_boots_is_read_to_the_last_one(tmp_path: Path) -> None:
    boot = b"[    0.000000] Linux version 7.3.4 (x)\n" + b"[    0.100000] KHO: exec from: 7.3.4 (count 1)\n" * 40
    text = boot * 1500 + b"[    0.000000] Linux version 7.3.4 (x)\n[    0.100000] KHO: nothing\n"
    tree = write(machine(tmp_path, scratch=(64 * MIB,)), "var/log/kern.log", text)
    assert examine(tree).boot == "cold"


@pytest.mark.parametrize("line", [b'{"a":"', b'{"log":"KHO: \\', b"{" * 1000, b"[" * 1000, b"\x1e", b'"msg" : "KHO: '])
def test_malformed_json_takes_bounded_time(line: bytes, tmp_path: Path) -> None:
    from bounded import bounded

    tree = write(machine(tmp_path), "dmesg", (line + b"\n") * ((2 << 20) // (len(line) + 1)))
    write(tree, "console.log", line * ((2 << 20) // len(line)))
    with bounded(20):
        assert examine(tree).state == "off"


FLOODS = [
    b"Linux version 7.3.4 (",
    b"KHO: Fail",
    b"KHO: ",
    b" kernel: 12:00:00 host t[1]: KHO: ",
    b"a" * 399 + b".",
    b"word and word ",
    b"KHO: x\\n",
    b"'KHO: ",
    b"[    0.000001] KHO: " + b"x" * 60 + b"\ncontinued\n",
    b"S0hPOiBGYWls",
]


@pytest.mark.parametrize("unit", FLOODS, ids=range(len(FLOODS)))
def test_repeated_input_of_2_mib_takes_bounded_time(unit: bytes) -> None:
    from bounded import bounded

    with bounded(5):
        parse(Piece("dmesg", (unit * ((2 << 20) // len(unit) + 1))[: 2 << 20]))


def test_a_log_with_unsupported_compression_is_listed_as_unread(tmp_path: Path) -> None:
    zstd = base64.b64decode("KLUv/QQAAQAAAA==")
    report = examine(write(machine(tmp_path), "dmesg.zst", zstd))
    assert ("dmesg.zst", "compressed (zstd): unpack it first") in report.unread
