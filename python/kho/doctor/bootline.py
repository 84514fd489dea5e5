"""How to change the boot line: steps that are printed, never taken."""

from __future__ import annotations

PLATFORMS = {
    "grub": "GRUB (Debian, Ubuntu, Fedora, SUSE)",
    "systemd-boot": "systemd-boot",
    "rpi": "Raspberry Pi",
    "cloud": "cloud images (Ubuntu, Debian)",
}


def edits(parameters: str, platforms: list[str] | None = None) -> dict[str, list[str]]:
    """Give the steps that put parameters on the boot line, by platform.

    Args: parameters: as `kho=off`, separated by spaces. platforms: those that were seen; every one if none was.
    """
    names = [word.split("=")[0] for word in parameters.split()]
    drop = ", ".join(f"{name}=..." for name in names)
    append = f"append {parameters} behind a space"
    line = f'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {parameters}"'
    steps = {
        "grub": [
            f"/etc/default/grub: in GRUB_CMDLINE_LINUX take away any {drop}, {append}",
            "update-grub        (Fedora, SUSE: grub2-mkconfig -o /boot/grub2/grub.cfg)",
            f'or, with grubby:   grubby --update-kernel=ALL --remove-args="{" ".join(names)}" --args="{parameters}"',
        ],
        "systemd-boot": [
            f"/etc/kernel/cmdline: take away any {drop}, {append}",
            "kernel-install add-all    (or the options line of each /boot/loader/entries/*.conf)",
        ],
        "rpi": [
            f"/boot/firmware/cmdline.txt: take away any {drop}, {append}; it stays one line",
        ],
        "cloud": [
            f"echo '{line}' > /etc/default/grub.d/99-kho.cfg",
            "update-grub        (settings in grub.d come after /etc/default/grub; the last one on the line counts)",
        ],
    }
    wanted = [name for name in PLATFORMS if name in (platforms or PLATFORMS)]
    if "cloud" in wanted and platforms:
        wanted = [name for name in wanted if name != "grub"]
    return {name: steps[name] for name in wanted}


def text(parameters: str, platforms: list[str] | None = None) -> list[str]:
    """Write the steps as lines."""
    found = [f"To boot with {parameters} (nothing was changed):"]
    for name, steps in edits(parameters, platforms).items():
        found.append(f"  {PLATFORMS[name]}")
        found += [f"    {step}" for step in steps]
    return [*found, "  then reboot; /proc/cmdline shows what came of it."]
