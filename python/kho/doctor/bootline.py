"""Instructions to change the boot line, for the boot loader of the machine. They are printed, never executed.

`LOADERS` has for each boot loader or system the signs that identify it, the line to edit and the command that applies
the edit. The steps come from the documentation of each system, named in `source`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Loader:
    """Instructions to change the boot line with one boot loader or system."""

    title: str
    steps: tuple[str, ...]
    """Lines of text with placeholders in braces, which `_fill` replaces."""
    source: str
    files: tuple[str, ...] = ()
    """Files that identify it; a `*` at the beginning of the last component matches anything."""
    system: str = ""
    """Pattern that identifies it in /etc/os-release."""
    line: str = ""
    """Pattern that identifies it in the command line."""
    release: str = ""
    """Pattern that identifies it in the kernel release."""
    unless: str = ""
    """Pattern in the command line that rules it out."""
    alone: bool = False
    """True if it excludes other loaders whose files exist: /etc/default/grub may exist without being used."""
    note: bool = False
    """True if its steps are printed in addition to those of a loader."""


GRUB_LINES = (
    "/etc/default/grub: remove any {drop} from GRUB_CMDLINE_LINUX and",
    "GRUB_CMDLINE_LINUX_DEFAULT; in GRUB_CMDLINE_LINUX {append}",
)
CMDLINE = "/etc/kernel/cmdline: remove any {drop}, {append}"
CLOUD_LINE = (
    "echo 'GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT {parameters}\"' > /etc/default/grub.d/99-kho.cfg"
)
APPENDED = "(the last one on the line counts)"
LOADERS: dict[str, Loader] = {
    "firecracker": Loader(
        "a microVM (Firecracker): the host sets the boot line",
        (
            "boot_args of boot-source in the configuration of the microVM: {append}",
            "the boot line cannot be changed from inside the microVM",
        ),
        "firecracker docs/getting-started.md: boot-source",
        line=r"(?:^| )virtio_mmio\.device=|(?:^| )reboot=k .*panic=1(?: |$)",
        alone=True,
    ),
    "wsl": Loader(
        "WSL",
        (
            "%UserProfile%\\.wslconfig, under [wsl2]: kernelCommandLine = {parameters}",
            "wsl --shutdown",
        ),
        "learn.microsoft.com/windows/wsl/wsl-config",
        release=r"(?i)microsoft.*wsl",
        alone=True,
    ),
    "talos": Loader(
        "Talos Linux",
        (
            "talosctl get securitystate -o yaml    (bootedWithUKI: false for GRUB, true for systemd-boot)",
            "GRUB: machine.install.extraKernelArgs: [{quoted}] in the machine configuration, then talosctl upgrade",
            "systemd-boot (UKI) ignores it: customization.extraKernelArgs: [{quoted}] in an Image Factory schematic,",
            "then talosctl upgrade --image factory.talos.dev/installer/SCHEMATIC:VERSION",
        ),
        "docs.siderolabs.com/talos: bare-metal-platforms/bootloader",
        system=r"^ID=\"?talos\b",
        line=r"(?:^| )talos\.platform=",
        release=r"-talos$",
        alone=True,
    ),
    "bottlerocket": Loader(
        "Bottlerocket",
        (
            'echo \'{"settings": {"boot": {"kernel-parameters": {json}}}}\' | apiclient apply',
            "apiclient reboot    (new nodes: the same in user data, with settings.boot.reboot-to-reconcile = true)",
        ),
        "bottlerocket.dev: api/settings/boot",
        system=r"^ID=\"?bottlerocket\b",
        alone=True,
    ),
    "ubuntu-core": Loader(
        "Ubuntu Core",
        (
            'snap set system system.kernel.cmdline-append="{parameters}"    (if the gadget allows it)',
            'snap set system system.kernel.dangerous-cmdline-append="{parameters}"    (models of grade dangerous)',
        ),
        "ubuntu.com/core/docs/modify-kernel-options",
        system=r"^ID=\"?ubuntu-core\b",
        line=r"(?:^| )snapd_recovery_mode=",
        alone=True,
    ),
    "cos": Loader(
        "Container-Optimized OS",
        (
            "a node of GKE: node pools have no setting for it, and a new node loses any edit",
            "a self-managed machine: on partition 12 (EFI-SYSTEM), efi/boot/grub.cfg:",
            "in each linux line remove any {drop}, {append}",
        ),
        "cloud.google.com: customizing node system configuration; cos.googlesource.com/cos/tools",
        system=r"^ID=\"?cos\b",
        line=r"(?:^| )BOOT_IMAGE=/syslinux/vmlinuz\.[AB] .*cros_efi(?: |$)",
        alone=True,
    ),
    "chromeos": Loader(
        "ChromeOS",
        (
            "the boot line is signed with the kernel; without developer mode it cannot be changed",
            "developer mode: /usr/share/vboot/bin/make_dev_ssd.sh --edit_config",
        ),
        "chromium.org: developer mode, make_dev_ssd.sh",
        system=r"^ID=\"?chrome?ium-?os\b|^ID=\"?chromeos\b|^CHROMEOS_",
        line=r"(?:^| )cros_(?:efi|secure|legacy)(?: |$)",
        alone=True,
    ),
    "flatcar": Loader(
        "Flatcar Container Linux",
        (
            '/oem/grub.cfg (before: /usr/share/oem/grub.cfg): set linux_append="$linux_append {parameters}"',
            "new machines: kernel_arguments: should_exist: [{quoted}] in the Butane configuration",
        ),
        "flatcar.org: setup/customization/other-settings",
        system=r"^ID=\"?flatcar\b",
        line=r"(?:^| )flatcar\.",
        release=r"-flatcar$",
        alone=True,
    ),
    "openshift": Loader(
        "OpenShift (RHEL CoreOS)",
        (
            "a MachineConfig for the pool of nodes, with spec.kernelArguments: [{quoted}]; oc apply -f it",
            "its operator drains and reboots the nodes one after the other, and reverts rpm-ostree edits on a node",
        ),
        "docs.redhat.com: OpenShift, adding kernel arguments to nodes",
        files=("etc/machine-config-daemon/currentconfig",),
        system=r"^ID=\"?rhcos\b|^OPENSHIFT_VERSION=",
        alone=True,
    ),
    "rpm-ostree": Loader(
        "rpm-ostree (Fedora CoreOS, Silverblue, IoT; bootc)",
        (
            "rpm-ostree kargs {appended}    " + APPENDED,
            "images that bootc builds: kargs = [{quoted}] in /usr/lib/bootc/kargs.d/50-kho.toml",
        ),
        "docs.fedoraproject.org: fedora-coreos/kernel-args; bootc: building/kernel-arguments",
        files=("run/ostree-booted", "sysroot/ostree", "ostree/repo", "usr/lib/bootc/kargs.d"),
        system=r"^VARIANT_ID=\"?(?:coreos|silverblue|kinoite|iot|sericea|onyx|atomic|cosmic-atomic)\b|^OSTREE_VERSION=",
        line=r"(?:^| )ostree=|\)/ostree/|(?:^| )ignition\.platform\.id=",
        alone=True,
    ),
    "nixos": Loader(
        "NixOS",
        (
            "/etc/nixos/configuration.nix (or the flake): boot.kernelParams = [ {spaced} ];",
            "nixos-rebuild boot",
        ),
        "nixos.org: manual, boot.kernelParams",
        files=("etc/NIXOS",),
        system=r"^ID=\"?nixos\b",
        line=r"/nix/store/",
        alone=True,
    ),
    "limine": Loader(
        "Limine",
        (
            'if /etc/default/limine exists: add KERNEL_CMDLINE[default]+=" {parameters}" to it; limine-update',
            "otherwise limine.conf (/boot, /boot/limine or the ESP): in cmdline: of the entry that boots",
            "remove any {drop}, {append}",
        ),
        "limine: CONFIG.md; limine-entry-tool: README",
        files=("etc/default/limine", "boot/limine.conf", "boot/limine/limine.conf", "boot/EFI/limine/limine.conf"),
        unless=r"(?:^| )BOOT_IMAGE=",
        alone=True,
    ),
    "kernelstub": Loader(
        "Pop!_OS (kernelstub)",
        (
            'kernelstub --print-config; for any {drop} in its output: kernelstub --delete-options "..."',
            'kernelstub --add-options "{parameters}"',
        ),
        "support.system76.com: kernel boot options; kernelstub --help",
        files=("etc/kernelstub/configuration",),
        system=r"^ID=\"?pop\b",
        unless=r"(?:^| )BOOT_IMAGE=",
        alone=True,
    ),
    "guix": Loader(
        "Guix System",
        (
            "the operating-system: (kernel-arguments (cons* {spaced} %default-kernel-arguments))",
            "guix system reconfigure",
        ),
        "guix.gnu.org: manual, operating-system reference",
        system=r"^ID=\"?guix\b",
        line=r"(?:^| )gnu\.system=",
        alone=True,
    ),
    "proxmox": Loader(
        "Proxmox (proxmox-boot-tool, systemd-boot)",
        (CMDLINE + "; keep it on one line", "proxmox-boot-tool refresh"),
        "pve.proxmox.com: Host Bootloader, editing the kernel commandline",
        files=("etc/kernel/proxmox-boot-uuids",),
        line=r"(?:^| )initrd=\\EFI\\proxmox\\",
        unless=r"(?:^| )BOOT_IMAGE=",
        alone=True,
    ),
    "proxmox-grub": Loader(
        "Proxmox (GRUB)",
        (
            "/etc/default/grub: in GRUB_CMDLINE_LINUX_DEFAULT remove any {drop}, {append}",
            "proxmox-boot-tool refresh    (without /etc/kernel/proxmox-boot-uuids: update-grub)",
        ),
        "pve.proxmox.com: Host Bootloader, editing the kernel commandline",
        files=("etc/kernel/proxmox-boot-uuids", "etc/pve"),
        release=r"-pve$",
        alone=True,
    ),
    "sdbootutil": Loader(
        "openSUSE with sdbootutil",
        (CMDLINE, "sdbootutil update-all-entries"),
        "en.opensuse.org: Systemd-boot",
        files=("usr/bin/sdbootutil", "etc/sysconfig/sdbootutil"),
        alone=True,
    ),
    "transactional": Loader(
        "SUSE with transactional-update (SLE Micro, MicroOS)",
        (
            "/etc/default/grub: in GRUB_CMDLINE_LINUX_DEFAULT remove any {drop}, {append}",
            "transactional-update grub.cfg",
        ),
        "documentation.suse.com: SLE Micro, transactional-update",
        system=r"^ID=\"?(?:sle-micro|sl-micro|opensuse-microos|opensuse-leap-micro|opensuse-aeon)\b",
        alone=True,
    ),
    "uki": Loader(
        "a unified kernel image (UKI)",
        (
            CMDLINE + " (dracut: kernel_cmdline= in /etc/dracut.conf.d/*.conf)",
            "then rebuild the image: kernel-install add-all (ukify), mkinitcpio -P,",
            "or dracut --uefi --regenerate-all --force; Secure Boot ignores any other boot line",
        ),
        "ukify(1), kernel-install(8), mkinitcpio(8), dracut(8)",
        files=(
            "etc/kernel/uki.conf",
            "boot/efi/EFI/Linux/*.efi",
            "efi/EFI/Linux/*.efi",
            "boot/EFI/Linux/*.efi",
        ),
        unless=r"(?:^| )BOOT_IMAGE=",
        alone=True,
    ),
    "grubby": Loader(
        "Fedora, RHEL and derivatives (boot loader entries)",
        ('grubby --update-kernel=ALL --remove-args="{names}" --args="{parameters}"',),
        "grubby(8); docs.redhat.com: configuring kernel command-line parameters",
        system=r"^ID=\"?(?:fedora|rhel|centos|rocky|almalinux|ol|amzn)\b",
        release=r"\.(?:el|fc|amzn)\d",
        alone=True,
    ),
    "alpine": Loader(
        "Alpine (update-extlinux)",
        ("/etc/update-extlinux.conf: in default_kernel_opts remove any {drop}, {append}", "update-extlinux"),
        "wiki.alpinelinux.org: Bootloaders",
        files=("etc/update-extlinux.conf",),
        unless=r"(?:^| )BOOT_IMAGE=\(hd\d",
        alone=True,
    ),
    "u-boot-menu": Loader(
        "U-Boot (u-boot-menu)",
        (
            "/etc/default/u-boot: in U_BOOT_PARAMETERS remove any {drop}, {append}",
            "u-boot-update",
        ),
        "u-boot-update(8)",
        files=("etc/default/u-boot",),
        unless=r"(?:^| )BOOT_IMAGE=\(hd\d",
        alone=True,
    ),
    "armbian": Loader(
        "Armbian (U-Boot)",
        ("/boot/armbianEnv.txt: extraargs={parameters}    (after the existing arguments, separated by a space)",),
        "docs.armbian.com: User-Guide_Advanced-Configuration",
        files=("boot/armbianEnv.txt",),
        unless=r"(?:^| )BOOT_IMAGE=\(hd\d",
        alone=True,
    ),
    "extlinux": Loader(
        "U-Boot or SYSLINUX (extlinux.conf)",
        ("/boot/extlinux/extlinux.conf: in APPEND of the entry that boots remove any {drop}, {append}",),
        "docs.u-boot.org: develop/distro; uapi-group.org: Boot Loader Specification",
        files=("boot/extlinux/extlinux.conf", "extlinux/extlinux.conf"),
        release=r"-tegra$",
        unless=r"(?:^| )BOOT_IMAGE=\(hd\d",
        alone=True,
    ),
    "refind": Loader(
        "rEFInd",
        ("/boot/refind_linux.conf: in the second string of the line that boots remove any {drop}, {append}",),
        "rodsbooks.com/refind/linux.html",
        files=("boot/refind_linux.conf",),
        unless=r"(?:^| )BOOT_IMAGE=",
        alone=True,
    ),
    "grub": Loader(
        "GRUB (Debian, Ubuntu, Fedora, SUSE)",
        (
            *GRUB_LINES,
            "update-grub        (SUSE, Azure Linux: grub2-mkconfig -o /boot/grub2/grub.cfg;",
            "                   Arch, Alpine, Gentoo: grub-mkconfig -o /boot/grub/grub.cfg)",
            'Fedora, RHEL:      grubby --update-kernel=ALL --remove-args="{names}" --args="{parameters}"',
        ),
        "gnu.org: GRUB manual, simple configuration; docs.redhat.com: changing boot entries",
        files=("etc/default/grub", "boot/grub/grub.cfg", "boot/grub2/grub.cfg"),
        line=r"(?:^| )BOOT_IMAGE=(?:\(hd\d|\S{0,200}/vmlinuz-\d)",
        unless=r"(?:^| )initrd=\\",
    ),
    "systemd-boot": Loader(
        "systemd-boot",
        (
            "entries that kernel-install made (MACHINE-ID-VERSION.conf):",
            "  " + CMDLINE,
            "  kernel-install add-all    (before systemd 256: kernel-install add VERSION IMAGE)",
            "manually written entries (/boot/loader/entries/arch.conf):",
            "  in options remove any {drop}, {append}",
        ),
        "kernel-install(8), loader.conf(5)",
        files=(
            "boot/loader/loader.conf",
            "efi/loader/loader.conf",
            "boot/efi/loader/loader.conf",
            "etc/kernel/cmdline",
        ),
        line=r"(?:^| )initrd=\\",
        unless=r"(?:^| )BOOT_IMAGE=",
    ),
    "rpi": Loader(
        "Raspberry Pi",
        (
            "/boot/firmware/cmdline.txt: remove any {drop}, {append}; keep it on one line",
            "(Ubuntu from 25.10 on: /boot/firmware/current/cmdline.txt;",
            "Raspberry Pi OS before bookworm: /boot/cmdline.txt)",
        ),
        "raspberrypi.com: documentation, configuration, cmdline.txt; canonical-ubuntu-boards: A/B boot",
        files=("boot/firmware/cmdline.txt", "boot/firmware/current/cmdline.txt", "boot/cmdline.txt"),
        release=r"-raspi$|\+rpt-rpi-",
        unless=r"(?:^| )BOOT_IMAGE=",
    ),
    "cloud": Loader(
        "GRUB with /etc/default/grub.d (Ubuntu, Debian; cloud images)",
        (
            CLOUD_LINE,
            "update-grub        (settings in grub.d come after /etc/default/grub; the last one on the line counts)",
        ),
        "ubuntu.com: cloud images; /etc/default/grub.d",
        files=("etc/default/grub.d/*.cfg",),
        unless=r"(?:^| )initrd=\\",
    ),
    "managed": Loader(
        "a node that a provider manages (EKS, GKE, AKS): the provider replaces the machine",
        (
            "a new node loses any edit: put the parameters into the node group's launch template, user data or image",
            "if the provider has no setting for it (GKE Autopilot, Fargate), only the provider can change it",
        ),
        "docs.aws.amazon.com/eks: launch templates; learn.microsoft.com/azure/aks: node configuration",
        files=("etc/eks", "etc/kubernetes/azure.json", "home/kubernetes/bin"),
        system=r"^ID=\"?cos\b",
        note=True,
    ),
}
PLATFORMS = {name: loader.title for name, loader in LOADERS.items()}
USUAL = ("grub", "systemd-boot", "rpi", "cloud")
"""Loaders whose steps are printed if none was detected."""
UNSEEN = (
    "  these files do not show which boot loader the machine has; to find out, run on the machine:",
    "    bootctl status; ls /boot /boot/firmware /boot/extlinux /etc/default/grub /etc/kernel; cat /etc/os-release",
)
NOT_OURS = (
    "This is a container: the boot line is that of the host, and no file in the container changes it.",
    "  Run kho doctor on the host. On Fargate, Cloud Run and Autopilot only the provider can change the boot line.",
)


def detect(there: Callable[[str], bool], system: str, line: str, release: str) -> list[str]:
    """Detect the boot loaders of a machine, best first.

    Args: there: returns whether a file exists, relative to the root. system: /etc/os-release. line: the command line.
    release: as `uname -r` prints it.
    Returns: keys of `LOADERS`.
    """
    found = []
    for name, loader in LOADERS.items():
        if loader.unless and re.search(loader.unless, line):
            continue
        if (
            any(there(file) for file in loader.files)
            or (loader.system and re.search(loader.system, system, re.MULTILINE))
            or (loader.line and re.search(loader.line, line))
            or (loader.release and re.search(loader.release, release))
        ):
            found.append(name)
    alone = [name for name in found if LOADERS[name].alone]
    notes = [name for name in found if LOADERS[name].note]
    if alone:
        # Without a command line, two loaders of the same system cannot be distinguished: both are returned.
        twins = [name for name in alone[1:] if not line and LOADERS[name].source == LOADERS[alone[0]].source]
        return [alone[0], *twins, *notes]
    # /etc/default/grub may exist on a machine that boots with systemd-boot. The files do not show which one boots: all
    # are returned.
    order = ("rpi", "cloud", "systemd-boot", "grub")
    return [*(name for name in order if name in found), *notes]


def _fill(step: str, parameters: str) -> str:
    """Replace the placeholders of a step."""
    words = parameters.split()
    names = [word.split("=")[0] for word in words]
    filled = {
        "parameters": parameters,
        "names": " ".join(names),
        "drop": ", ".join(f"{name}=..." for name in names),
        "append": f"append {parameters} after a space",
        "quoted": ", ".join(f'"{word}"' for word in words),
        "spaced": " ".join(f'"{word}"' for word in words),
        "appended": " ".join(f"--append={word}" for word in words),
        "json": "{" + ", ".join(f'"{word.partition("=")[0]}": ["{word.partition("=")[2]}"]' for word in words) + "}",
    }
    return re.sub(r"\{(\w+)\}", lambda match: filled.get(match[1], match[0]), step)


def edits(parameters: str, platforms: list[str] | None = None) -> dict[str, list[str]]:
    """Return the steps that put parameters on the boot line, by loader.

    Args: parameters: such as `kho=off`, separated by spaces. platforms: the detected loaders, or None for `USUAL`.
    """
    wanted = [name for name in LOADERS if name in (platforms or USUAL)]
    if "cloud" in wanted and platforms:
        wanted = [name for name in wanted if name != "grub"]
    return {name: [_fill(step, parameters) for step in LOADERS[name].steps] for name in wanted}


def instructions(parameters: str, platforms: list[str] | None = None, container: bool = False) -> list[str]:
    """Return the instructions as lines of text."""
    if container:
        return list(NOT_OURS)
    found = [f"To boot with {parameters} (nothing was changed):"]
    if not set(platforms or ()) - {name for name, loader in LOADERS.items() if loader.note}:
        found += UNSEEN
        platforms = [*USUAL, *platforms] if platforms else None
    for name, steps in edits(parameters, platforms).items():
        found.append(f"  {PLATFORMS[name]}")
        found += [f"    {step}" for step in steps]
    return [*found, "  then reboot; /proc/cmdline shows the new boot line."]
