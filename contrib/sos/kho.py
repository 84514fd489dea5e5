"""sos plugin: what `kho doctor` needs of a machine, and its own answer if it is installed.

Install it as kho.py in the directory sos/report/plugins of the sos package; docs/collect.md shows how.
"""

from sos.report.plugins import DebianPlugin, Plugin, RedHatPlugin, SuSEPlugin, UbuntuPlugin

DEBUGFS = "/sys/kernel/debug/kho"
"""FDTs of both handovers; subtrees are small structures, but a producer decides their size."""
MOST_MIB = 8
"""Maximum MiB of debugfs that is copied."""


class Kho(Plugin, RedHatPlugin, DebianPlugin, UbuntuPlugin, SuSEPlugin):
    """Files and commands."""

    short_desc = "Linux Kexec HandOver (KHO) and live update"
    plugin_name = "kho"
    profiles = ("system", "boot", "memory", "debug")

    def setup(self):
        """Register the files and commands."""
        self.add_copy_spec(DEBUGFS, sizelimit=MOST_MIB)
        self.add_copy_spec(
            [
                "/proc/cmdline",
                "/proc/iomem",
                "/proc/config.gz",
                "/proc/meminfo",
                "/proc/misc",
                "/proc/modules",
                "/proc/pagetypeinfo",
                "/proc/sys/kernel/random/boot_id",
                "/proc/version",
                "/proc/version_signature",
                "/proc/vmstat",
                "/proc/zoneinfo",
                "/sys/devices/system/node/node*/meminfo",
                "/sys/kernel/kexec_crash_loaded",
                "/sys/kernel/kexec_crash_size",
                "/sys/kernel/kexec_loaded",
                "/sys/kernel/mm/hugepages",
                "/etc/default/grub",
                "/etc/default/grub.d",
                "/boot/config-*",
            ]
        )
        self.add_cmd_output("ls -l /dev/liveupdate")
        self.add_cmd_output("kho doctor --json", suggest_filename="kho_doctor.json")
        self.add_cmd_output("kho doctor", suggest_filename="kho_doctor")
