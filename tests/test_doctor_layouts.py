"""`kho doctor` on the layouts of collectors and on single files, and the steps for the detected boot loader."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kho.doctor import bootline, examine

from command import kho
from doctor_hosts import HOSTS, MIB, copied, machine, write

FAILED = HOSTS / "scratch-too-big"
LOG = (FAILED / "var/log/dmesg").read_text()
LINE = (FAILED / "proc/cmdline").read_text()
UNAME = "Linux db1 7.3.4 #1 SMP PREEMPT_DYNAMIC Mon Nov 23 09:15:57 UTC 2026 x86_64 x86_64 x86_64 GNU/Linux\n"
FILES = {name: (FAILED / "proc" / name).read_text() for name in ("meminfo", "zoneinfo", "pagetypeinfo", "vmstat")}


def section(kind: str, title: str, body: str) -> str:
    return f"#==[ {kind} ]{'=' * 35}#\n# {title}\n{body}\n"


def supportconfig(tree: Path, *, dmesg: str = "/bin/dmesg", where: str = "boot.txt") -> Path:
    write(tree, "supportconfig.txt", "=" * 20 + "\n                     Support Utilities - Supportconfig\n")
    write(
        tree,
        "basic-environment.txt",
        section("Command", "/bin/date", "Mon") + section("Command", "/bin/uname -a", UNAME),
    )
    boot = section("Configuration File", "/proc/cmdline", LINE) + section("Command", "/sbin/lsmod", "Module Size\n")
    write(tree, "boot.txt", boot)
    text = (tree / where).read_text() if (tree / where).exists() else ""
    write(tree, where, text + section("Command", dmesg, LOG))
    write(
        tree,
        "memory.txt",
        section("Command", "/usr/bin/free -k", "") + section("Configuration File", "/proc/meminfo", FILES["meminfo"]),
    )
    rest = "".join(
        section("Configuration File", f"/proc/{name}", FILES[name]) for name in ("zoneinfo", "pagetypeinfo", "vmstat")
    )
    return write(tree, "proc.txt", rest)  # fmt: skip


def proc(tree: Path) -> Path:
    for name in ("meminfo", "zoneinfo", "cmdline"):
        write(tree, f"proc/{name}", (FAILED / "proc" / name).read_text())
    return tree


def sos(tree: Path) -> Path:
    write(proc(tree), "sos_commands/kernel/uname_-a", UNAME)
    return write(tree, "sos_commands/kernel/dmesg", LOG)


def sos_journal(tree: Path) -> Path:
    write(proc(tree), "sos_commands/kernel/uname_-a", UNAME)
    earlier = LOG.replace("kho_scratch=64M,3G,64M", "quiet")
    write(tree, "sos_commands/logs/journalctl_--no-pager_--catalog_--boot_-1", earlier)
    journal = "".join(f"Nov 23 09:15:57 db1 kernel: {re.sub('^<.>', '', line)}\n" for line in LOG.splitlines())
    return write(tree, "sos_commands/logs/journalctl_--no-pager_--catalog_--boot_--this-boot", journal)


def insights(tree: Path) -> Path:
    write(tree, "meta_data/insights.spec.json", "{}")
    write(proc(tree / "data"), "insights_commands/dmesg", LOG)
    return write(tree / "data", "insights_commands/uname_-a", UNAME).parent


def must_gather(tree: Path) -> Path:
    node = tree / "quay-io-openshift-release-dev-ocp-v4-0-art-dev-sha256-0123/nodes/worker-0"
    write(node, "dmesg", LOG)
    write(node, "proc/cmdline", LINE)
    write(tree, "must-gather.log", "done")
    return write(tree, "version", "openshift/must-gather\n4.20\n")


def apport(tree: Path) -> Path:
    write(tree, "CurrentDmesg.txt", LOG)
    write(tree, "ProcKernelCmdLine.txt", LINE)
    return write(tree, "ProcCpuinfoMinimal.txt", "processor : 0\n")


def apport_report(tree: Path, *, packed: bool = True) -> Path:
    text = f"ProblemType: Bug\nArchitecture: amd64\nProcKernelCmdLine: {LINE.strip()}\n"
    text += "Uname: Linux 7.3.4 x86_64\nCurrentDmesg:"
    body = "\n" + "".join(f" {line}\n" for line in LOG.splitlines())
    if packed:
        data = gzip.compress(LOG.encode())
        parts = [base64.b64encode(data[at : at + 999]).decode() for at in range(0, len(data), 999)]
        body = " base64\n" + "".join(f" {part}\n" for part in parts)
    return write(tree, "_usr_bin_foo.0.crash", f"{text}{body}Tags: resolute\n")


def loose(tree: Path) -> Path:
    for name, text in FILES.items():
        write(tree, name, text)
    write(tree, "cmdline", LINE)
    write(tree, "version", (FAILED / "proc/version").read_text())
    return write(tree, "dmesg.log", LOG)


def loose_text(tree: Path) -> Path:
    for name in ("meminfo", "zoneinfo"):
        write(tree, f"proc_{name}.txt", FILES[name])
    write(tree, "uname-a.txt", UNAME)
    return write(tree, "kern.log", LOG)


def report_of_commands(tree: Path) -> Path:
    """Write a file in the format of pvereport: titles, commands and their output."""
    parts = ["==== general system info ====\n", "# hostname\n\npve1\n", f"# cat /proc/cmdline\n\n{LINE}"]
    parts += [
        f"# cat /proc/meminfo\n\n{FILES['meminfo']}",
        "==== info about guests ====\n",
        f"# dmesg\n\n{LOG}",
        "# uptime\n\n",
    ]
    return write(tree, "pve1-pve-report-Mon-23-November-2026-9-15.txt", "\n".join(parts))


def terminal(tree: Path, prompt: str = "root@db1:~# ") -> Path:
    text = "".join(f"{prompt}cat /proc/{name}\n{FILES[name]}" for name in ("meminfo", "zoneinfo"))
    text += f"{prompt}sudo dmesg\n{LOG}{prompt}cat /proc/cmdline\n{LINE}{prompt}exit\n"
    return write(tree, "session.log", text.replace("\n", "\r\n"))


def tailed(tree: Path) -> Path:
    """Write a file in the format of `tail -n +1` with several files."""
    text = "".join(f"==> /proc/{name} <==\n{FILES[name]}\n" for name in ("meminfo", "zoneinfo"))
    return write(tree, "out.txt", f"{text}==> /proc/cmdline <==\n{LINE}\n==> /var/log/dmesg <==\n{LOG}")


def abrt(tree: Path) -> Path:
    for name, text in {
        "dmesg": LOG,
        "cmdline": LINE,
        "kernel": "7.3.4",
        "architecture": "x86_64",
        "type": "Kerneloops",
    }.items():
        write(tree, name, text)
    return write(tree, "os_info", "ID=fedora\n")


def kdump_of_rhel(tree: Path) -> Path:
    """Write the files of kdump on RHEL: the log of the crashed kernel, and that of the kdump kernel."""
    saving = LOG.replace("kho=on", "elfcorehdr=0x37000000").replace("KHO: ", "kdump: ")
    write(tree, "kexec-dmesg.log", saving)
    return write(tree, "vmcore-dmesg.txt", LOG)


def apport_of_a_process(tree: Path) -> Path:
    """Write a report of a crashed program; ProcCmdline is the program's command line, not the kernel's."""
    report = apport_report(tree)
    place = next(report.glob("*.crash"))
    return write(report, place.name, f"{place.read_text()}ProcCmdline: /usr/bin/foo --bar\n")


def apport_of_a_kernel(tree: Path) -> Path:
    body = "".join(f" {line}\n" for line in LOG.splitlines())
    return write(tree, "linux-image-7.3.4.0.crash", f"ProblemType: KernelCrash\nVmCoreDmesg:\n{body}Tags: x\n")


def ec2(tree: Path) -> Path:
    data = base64.b64encode(LOG.replace("\n", "\r\n").encode()).decode()
    return write(tree, "i-0123.json", json.dumps({"InstanceId": "i-0123", "Output": data}))


CRASH = "the log of a kernel that crashed"
LAYOUTS: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "supportconfig": (supportconfig, "a supportconfig"),
    "supportconfig, -T": (lambda tree: supportconfig(tree, dmesg="/usr/bin/dmesg -T"), "a supportconfig"),
    "supportconfig, journal": (
        lambda tree: supportconfig(tree, dmesg="/usr/bin/journalctl -b 0 --no-pager", where="messages.txt"),
        "a supportconfig",
    ),
    "supportconfig, messages": (
        lambda tree: supportconfig(tree, dmesg="/var/log/messages - Last 500 Lines", where="messages.txt"),
        "a supportconfig",
    ),
    "supportconfig, deeper": (lambda tree: supportconfig(tree / "scc_db1_261123_0915").parent, "a supportconfig"),
    "sosreport": (sos, "an sosreport"),
    "sosreport, journal": (sos_journal, "an sosreport"),
    "sosreport, deeper": (lambda tree: sos(tree / "case/sosreport-db1-2026-11-23-abcdefg").parents[1], "an sosreport"),
    "insights": (insights, "a Red Hat Insights archive"),
    "insights, deeper": (lambda tree: insights(tree / "insights-db1-20261123").parent, "a Red Hat Insights archive"),
    "insights, data alone": (lambda tree: insights(tree) / "data", "a Red Hat Insights archive"),
    "must-gather": (must_gather, None),
    "must-gather, deeper": (lambda tree: must_gather(tree / "must-gather.local.1").parent, None),
    "apport": (apport, None),
    "apport, a report": (apport_report, "a report of apport"),
    "apport, a report of text": (lambda tree: apport_report(tree, packed=False), "a report of apport"),
    "kdump": (lambda tree: write(tree, "vmcore-dmesg.txt", LOG), CRASH),
    "kdump, Debian": (lambda tree: write(tree, "dmesg.202611230915", LOG), CRASH),
    "kdump, deeper": (lambda tree: write(tree / "127.0.0.1-2026-11-23-09:15", "vmcore-dmesg.txt", LOG).parent, CRASH),
    "var/crash": (lambda tree: write(tree, "var/crash/202611230915/dmesg.202611230915", LOG), CRASH),
    "pstore": (lambda tree: write(tree, "var/lib/systemd/pstore/1795425357/dmesg.txt", LOG), CRASH),
    "loose files": (loose, None),
    "loose files with other names": (loose_text, None),
    "a console's log": (lambda tree: write(write(tree, "cmdline", LINE), "serial-console.log", LOG), None),
    "pvereport": (report_of_commands, None),
    "a terminal": (terminal, None),
    "a terminal of sh": (lambda tree: terminal(tree, "# "), None),
    "a trace of sh": (lambda tree: terminal(tree, "+ "), None),
    "tail of files": (tailed, None),
    "abrt": (abrt, None),
    "abrt, deeper": (lambda tree: abrt(tree / "oops-2026-11-23-09:15:57-812-0").parent, None),
    "kdump, RHEL": (kdump_of_rhel, CRASH),
    "kdump, SUSE": (lambda tree: write(write(tree, "README.txt", "Kernel crashdump\n"), "dmesg.txt", LOG), None),
    "apport, a process": (apport_of_a_process, "a report of apport"),
    "apport, loose, a process": (lambda tree: write(apport(tree), "ProcCmdline.txt", "/usr/bin/foo --bar\n"), None),
    "apport, a kernel": (apport_of_a_kernel, "a report of apport"),
    "crash": (lambda tree: write(tree, "session.txt", f"crash> sys\n  x\ncrash> log\n{LOG}crash> quit\n"), CRASH),
    "crash, log alone": (lambda tree: write(tree, "log.txt", LOG), None),
    "az boot diagnostics": (lambda tree: write(tree, "boot-log.txt", json.dumps(LOG.replace("\n", "\r\n"))), None),
    "gcloud": (lambda tree: write(tree, "serial-port-1-output.txt", LOG.replace("\n", "\r\n")), None),
    "aws": (lambda tree: write(tree, "get-console-output.json", json.dumps({"Output": LOG})), None),
    "aws, base64": (ec2, None),
    "any name": (lambda tree: write(proc(tree), "ticket-4711", LOG), None),
    "packed": (lambda tree: write(proc(tree), "var/log/dmesg.gz", gzip.compress(LOG.encode())), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_failure_is_found_in_every_layout(name: str, tmp_path: Path) -> None:
    build, layout = LAYOUTS[name]
    report = examine(build(tmp_path))
    assert (report.state, report.layout) == ("failed", layout)
    assert [f.certainty for f in report.findings if f.id == "DOC003"] == ["certain"]
    assert "64M,3G,64M" in report.headline
    assert (report.looked, report.elsewhere) == ([], [])
    shown = [seen for finding in report.findings if finding.id == "DOC003" for seen in finding.evidence]
    for seen in shown:
        place = tmp_path / (report.folder or "") / seen.file
        if name.startswith(("supportconfig", "loose", "kdump", "sos")) and place.is_file() and seen.line is not None:
            line = place.read_text().split("\n")[seen.line - 1]
            assert seen.text in line or all(word in line for word in seen.text.split()), "the evidence is on its line"
    text = kho("doctor", build(tmp_path)).out
    if report.folder is not None:
        assert f"in {report.folder}/" in text


def test_evidence_from_sections_has_the_line_of_the_file(tmp_path: Path) -> None:
    report = examine(supportconfig(tmp_path))
    whole = examine(FAILED)
    assert (report.leftover, report.ram, report.nodes) == (whole.leftover, whole.ram, whole.nodes)
    left = next(finding for finding in report.findings if finding.id == "DOC004")
    for seen in left.evidence:
        lines = (tmp_path / seen.file).read_text().split("\n")
        assert seen.line is not None
        numbers = re.findall(r"\d+", seen.text)
        assert any(number in lines[seen.line - 1] for number in numbers), seen


def test_the_log_of_a_crashed_kernel_is_ignored_on_a_running_machine(tmp_path: Path) -> None:
    tree = copied("default-scratch", tmp_path, "var/log/dmesg")
    write(tree, "vmcore-dmesg.txt", LOG)
    write(tree, "var/crash/202611230915/dmesg.202611230915", LOG)
    report = examine(tree)
    assert report.state == "active"
    assert {why for _, why in report.unread} == {"the log of a kernel that crashed, which is an earlier boot"}
    assert "no kernel log of this boot; searched var/log/dmesg," in kho("doctor", tree).out


QUOTE = "KHO: Failed to reserve scratch area, disabling kexec handover\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", f"In a bug we saw:\n\n    {QUOTE}"),
        ("notes.txt", f"# dmesg | grep KHO\n{QUOTE}# cat /proc/cmdline\nkho=on\n# uname -r\n"),
        ("old.txt", f"# cat /proc/meminfo\nMemTotal: 1000 kB\nMemFree: 1 kB\n# dmesg\n{QUOTE}"),
        ("old.log", f"==> /proc/meminfo <==\nMemTotal: 1000 kB\n==> /var/log/dmesg <==\n{QUOTE}"),
        ("kexec-dmesg.log", LOG.replace("kho=on", "elfcorehdr=0x37000000 kho=on")),
    ],
)
def test_notes_that_quote_messages_are_ignored_next_to_the_files_of_a_machine(
    name: str, text: str, tmp_path: Path
) -> None:
    tree = copied("default-scratch", tmp_path, "var/log/dmesg", "sys/kernel/debug")
    report = examine(write(tree, name, text))
    assert (report.state, report.scratch) == ("active", 192 * MIB)


def test_with_several_machines_the_headline_asks_for_one(tmp_path: Path) -> None:
    for node in ("worker-0", "worker-1"):
        write(tmp_path, f"quay-io-x-sha256-1/nodes/{node}/dmesg", LOG)
    report = examine(tmp_path)
    assert (report.state, report.exit_code) == ("unknown", 2)
    assert report.elsewhere == [f"quay-io-x-sha256-1/nodes/worker-{n}" for n in (0, 1)]
    assert "look like reports: pass one of them as DIRECTORY" in report.headline


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "the directory is empty"),
        ({"notes.txt": "x", "a.pdf": "x"}, "found a.pdf, notes.txt"),
        ({"sosreport-db1.tar.xz": "x"}, "sosreport-db1.tar.xz is an archive: unpack it"),
        ({"web-17/proc/meminfo": "MemTotal: 1 kB\n"}, "web-17/ looks like a report: pass it as DIRECTORY"),
    ],
)
def test_without_any_file_the_headline_lists_what_the_directory_has(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    done = kho("doctor", tmp_path)
    assert done.code == 2
    assert said in done.out.split("\n")[0]
    assert "no kernel log of this boot; searched" in done.out


def test_a_file_with_a_known_name_and_other_content_is_ignored(tmp_path: Path) -> None:
    for name in ("meminfo", "zoneinfo", "cmdline.txt", "version", "vmstat"):
        write(tmp_path, name, b"\0\1\2 no such thing\n" * 10)
    report = examine(tmp_path)
    assert (report.state, report.ram, report.release, report.cmdline) == ("unknown", None, None, None)


def test_linked_directories_are_not_entered(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    sos(tmp_path / "sosreport-outside")
    (tmp_path / "tree/sosreport-x").symlink_to("../sosreport-outside")
    (tmp_path / "tree/loop").symlink_to(".")
    report = examine(tmp_path / "tree")
    assert (report.state, report.folder) == ("unknown", None)


# The boot loader of the machine


def os_release(text: str) -> Callable[[Path], Path]:
    return lambda tree: write(tree, "etc/os-release", text)


def line(text: str) -> Callable[[Path], Path]:
    return lambda tree: write(tree, "proc/cmdline", text + "\n")


def all_of(*builds: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def build(tree: Path) -> Path:
        for each in builds:
            each(tree)
        return tree

    return build


def file(name: str, text: str = "x\n") -> Callable[[Path], Path]:
    return lambda tree: write(tree, name, text)


GRUB = file("etc/default/grub", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
UUIDS = file("etc/kernel/proxmox-boot-uuids", "AAAA-BBBB\n")
KERNEL_LINE = file("etc/kernel/cmdline", "root=ZFS=rpool\n")
DETECTED: list[tuple[str, Callable[[Path], Path], str]] = [
    ("proxmox", all_of(GRUB, UUIDS, KERNEL_LINE), "proxmox-boot-tool refresh"),
    (
        "proxmox",
        all_of(GRUB, line("initrd=\\EFI\\proxmox\\7.0.2-1-pve\\initrd.img root=ZFS=rpool")),
        "/etc/kernel/cmdline",
    ),
    ("proxmox-grub", all_of(GRUB, UUIDS, line("BOOT_IMAGE=/vmlinuz-7.0.2-1-pve ro")), "proxmox-boot-tool refresh"),
    ("nixos", os_release("ID=nixos\n"), 'boot.kernelParams = [ "kho=off" ];'),
    ("nixos", all_of(GRUB, line("init=/nix/store/abc-nixos-system/init")), "nixos-rebuild boot"),
    ("guix", line("gnu.system=/gnu/store/abc-system"), '(cons* "kho=off" %default-kernel-arguments)'),
    (
        "rpm-ostree",
        line("BOOT_IMAGE=(hd0,gpt3)/boot/ostree/x ostree=/ostree/boot.1/x"),
        "rpm-ostree kargs --append=kho=off",
    ),
    ("rpm-ostree", all_of(GRUB, os_release("ID=fedora\nVARIANT_ID=coreos\n")), "rpm-ostree kargs --append=kho=off"),
    ("rpm-ostree", os_release('ID="fedora"\nOSTREE_VERSION=43.2026\n'), "/usr/lib/bootc/kargs.d/50-kho.toml"),
    ("openshift", os_release('ID="rhcos"\nOPENSHIFT_VERSION="4.20"\n'), "MachineConfig"),
    ("talos", line("talos.platform=metal console=tty0"), "customization.extraKernelArgs"),
    ("talos", os_release("ID=talos\n"), 'machine.install.extraKernelArgs: ["kho=off"]'),
    ("bottlerocket", os_release("ID=bottlerocket\n"), "apiclient apply"),
    ("ubuntu-core", line("snapd_recovery_mode=run console=tty1"), "snap set system system.kernel.cmdline-append"),
    ("flatcar", os_release("ID=flatcar\n"), 'set linux_append="$linux_append kho=off"'),
    ("chromeos", line("cros_secure console="), "signed with the kernel"),
    ("wsl", file("proc/sys/kernel/osrelease", "6.18.1-microsoft-standard-WSL2\n"), "kernelCommandLine = kho=off"),
    ("firecracker", line("reboot=k panic=1 pci=off virtio_mmio.device=4K@0xd0000000:5"), "boot_args"),
    (
        "grubby",
        all_of(GRUB, os_release('ID="rhel"\n')),
        'grubby --update-kernel=ALL --remove-args="kho" --args="kho=off"',
    ),
    ("transactional", all_of(GRUB, os_release("ID=sl-micro\n")), "transactional-update grub.cfg"),
    ("sdbootutil", all_of(KERNEL_LINE, file("usr/bin/sdbootutil")), "sdbootutil update-all-entries"),
    ("uki", all_of(KERNEL_LINE, file("boot/efi/EFI/Linux/arch.efi")), "mkinitcpio -P"),
    ("uki", file("etc/kernel/uki.conf"), "kernel-install add-all (ukify)"),
    ("alpine", file("etc/update-extlinux.conf"), "update-extlinux"),
    ("u-boot-menu", all_of(file("etc/default/u-boot"), file("boot/extlinux/extlinux.conf")), "u-boot-update"),
    ("extlinux", file("boot/extlinux/extlinux.conf"), "APPEND"),
    ("armbian", file("boot/armbianEnv.txt"), "extraargs=kho=off"),
    ("refind", file("boot/refind_linux.conf"), "/boot/refind_linux.conf"),
    ("rpi", file("boot/firmware/cmdline.txt"), "keep it on one line"),
    ("systemd-boot", file("boot/loader/loader.conf"), "kernel-install add-all"),
    ("cloud", all_of(GRUB, file("etc/default/grub.d/50-cloudimg-settings.cfg")), "99-kho.cfg"),
    ("grub", GRUB, "update-grub"),
    ("grub", line("BOOT_IMAGE=/boot/vmlinuz-7.0.0-31-generic root=/dev/vda1 ro quiet"), "update-grub"),
    ("grub", all_of(GRUB, os_release('ID="azurelinux"\n')), "grub2-mkconfig -o /boot/grub2/grub.cfg"),
    ("cloud", all_of(GRUB, file("etc/default/grub.d/10_cloud.cfg")), "99-kho.cfg"),
    (
        "cos",
        line("BOOT_IMAGE=/syslinux/vmlinuz.A init=/usr/lib/systemd/systemd boot=local cros_efi ro"),
        "efi/boot/grub.cfg",
    ),
    ("limine", file("etc/default/limine"), "limine-update"),
    ("limine", all_of(KERNEL_LINE, file("boot/limine.conf")), "cmdline: of the entry that boots"),
    (
        "kernelstub",
        all_of(file("etc/kernelstub/configuration"), file("boot/efi/loader/loader.conf")),
        "kernelstub --add-options",
    ),
    ("rpi", file("boot/firmware/current/cmdline.txt"), "/boot/firmware/current/cmdline.txt"),
    (
        "openshift",
        all_of(os_release('ID="rhel"\nVARIANT_ID=coreos\n'), file("etc/machine-config-daemon/currentconfig")),
        "MachineConfig",
    ),
    (
        "sdbootutil",
        all_of(os_release("ID=opensuse-microos\n"), file("usr/bin/sdbootutil")),
        "sdbootutil update-all-entries",
    ),
    (
        "grubby",
        all_of(GRUB, line("BOOT_IMAGE=(hd0,gpt2)/vmlinuz ro"), os_release("ID=fedora\n"), file("efi/EFI/Linux/x.efi")),
        "grubby",
    ),
    (
        "rpm-ostree",
        all_of(os_release('ID="rhel"\n'), line("BOOT_IMAGE=(hd0,gpt3)/boot/ostree/x ostree=/ostree/boot.1/x")),
        "kargs",
    ),
]
GRUB_BOOTED = "BOOT_IMAGE=(hd0,gpt2)/vmlinuz-7.3.4 root=/dev/vda2 ro"
STUB_BOOTED = "initrd=\\initramfs-linux.img root=/dev/vda2 rw"
UNUSED_LOADER_FILES: dict[str, Callable[[Path], Path]] = {
    "rEFInd": file("boot/refind_linux.conf"),
    "systemd-boot": all_of(file("boot/loader/loader.conf"), file("etc/kernel/cmdline")),
    "a UKI": file("boot/EFI/Linux/arch.efi"),
    "Limine": file("boot/limine.conf"),
    "Raspberry Pi": file("boot/firmware/cmdline.txt"),
    "extlinux": file("boot/extlinux/extlinux.conf"),
}


@pytest.mark.parametrize("name", UNUSED_LOADER_FILES)
def test_the_command_line_rules_out_loaders_that_did_not_boot(name: str, tmp_path: Path) -> None:
    """GRUB adds BOOT_IMAGE= to the command line; a boot by the EFI stub has initrd= with backslashes."""
    tree = all_of(GRUB, UNUSED_LOADER_FILES[name], line(GRUB_BOOTED))(machine(tmp_path / "grub", scratch=(192 * MIB,)))
    assert examine(tree).platforms == ["grub"]
    if name == "systemd-boot":
        tree = all_of(GRUB, UNUSED_LOADER_FILES[name], line(STUB_BOOTED))(
            machine(tmp_path / "stub", scratch=(192 * MIB,))
        )
        assert examine(tree).platforms == ["systemd-boot"]


def test_without_a_command_line_both_loaders_of_proxmox_are_detected(tmp_path: Path) -> None:
    tree = all_of(GRUB, UUIDS, KERNEL_LINE)(machine(tmp_path, scratch=(192 * MIB,)))
    (tree / "proc/cmdline").unlink()
    assert examine(tree).platforms == ["proxmox", "proxmox-grub"]


@pytest.mark.parametrize(
    ("name", "build", "said"), DETECTED, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(DETECTED)]
)
def test_the_steps_are_those_of_the_detected_loader(
    name: str, build: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    tree = build(machine(tmp_path, scratch=(192 * MIB,), cmdline="quiet"))
    report = examine(tree)
    assert report.platforms[:1] == [name]
    out = kho("doctor", tree).out
    assert bootline.PLATFORMS[name] in out
    assert said in out
    if bootline.LOADERS[name].alone:
        assert len(report.platforms) == 1, "unused loaders are not reported"
        assert [title for title in bootline.PLATFORMS.values() if f"  {title}\n" in out] == [bootline.PLATFORMS[name]]
    assert "do not show which boot loader" not in out


def test_every_loader_is_detected_by_a_test() -> None:
    assert {name for name, _, _ in DETECTED} | {"managed"} == set(bootline.LOADERS)
    for loader in bootline.LOADERS.values():
        assert loader.source
        assert loader.steps
        assert loader.files or loader.system or loader.line or loader.release


@pytest.mark.parametrize("parameters", ["kho=off", "kho=on kho_scratch=64M,256M,64M"])
def test_every_placeholder_of_every_step_is_filled(parameters: str) -> None:
    for name, steps in bootline.edits(parameters, list(bootline.LOADERS)).items():
        text = "\n".join(steps)
        assert not re.search(r"\{[a-z]+\}", text), name
        if name not in ("chromeos", "managed"):
            assert all(word in text or word.partition("=")[2] in text for word in parameters.split()), name
    applied = bootline.edits(parameters, ["bottlerocket"])["bottlerocket"][0]
    words = shlex.split(applied)
    made = json.loads(words[1])["settings"]["boot"]["kernel-parameters"]
    assert [f"{key}={value}" for key, values in made.items() for value in values] == parameters.split()
    shown = bootline.edits(parameters, ["rpm-ostree"])["rpm-ostree"][0].split("    ")[0]
    done = subprocess.run(["sh", "-c", shown.replace("rpm-ostree", "echo")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["kargs", *(f"--append={word}" for word in parameters.split())]


def test_without_a_detected_loader_the_output_says_how_to_find_it(tmp_path: Path) -> None:
    out = kho("doctor", machine(tmp_path, scratch=(192 * MIB,), cmdline="quiet")).out
    assert "these files do not show which boot loader the machine has; to find out, run on the machine:" in out


@pytest.mark.parametrize("build", [file("etc/kubernetes/azure.json"), file("etc/eks/x"), os_release("ID=cos\n")])
def test_a_node_of_a_provider_gets_a_note(build: Callable[[Path], Path], tmp_path: Path) -> None:
    tree = build(GRUB(machine(tmp_path, scratch=(192 * MIB,), cmdline="quiet")))
    out = kho("doctor", tree).out
    assert "the provider replaces the machine" in out
    assert "launch template" in out
    assert ("/etc/default/grub" in out) is not (tree / "etc/os-release").exists(), "COS has its own grub.cfg"
