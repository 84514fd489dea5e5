"""The unit files of the guest: what is tried is a table, one row a service."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GUESTS", "MASKED", "SERVICES", "Service", "by_boot", "driver", "text"]

MIB = 1 << 20
GUESTS = ("plain", "live")
"""Each has a machine of its own, with the services of its script."""


class Service(NamedTuple):
    """One service of the guest."""

    name: str
    script: str
    """`plain` or `live`: guest/SCRIPT.py."""
    arguments: str
    preserve: str | None
    """FileDescriptorStorePreserve=; None leaves the line out."""
    service: str = ""
    """More lines of [Service]."""
    store: int = 16
    """FileDescriptorStoreMax=."""
    boots: tuple[int, ...] = (1, 2, 3)
    """The boots in which the driver starts it."""


SERVICES = (
    Service("plain-no", "plain", "", "no"),
    Service("plain-default", "plain", "", None),
    Service("plain-restart", "plain", "", "restart"),
    Service("plain-success", "plain", "", "on-success", boots=(1, 2, 3, 4)),
    Service("plain-failure", "plain", "exit=3", "on-success"),
    Service("plain-yes", "plain", "", "yes", boots=(1, 2, 3, 4, 5)),
    Service("plain-yes-failure", "plain", "exit=3", "yes", boots=(1, 2, 3, 4)),
    Service("plain-kinds", "plain", "kinds", "yes", boots=(1, 2, 3, 4)),
    Service("plain-limit", "plain", f"size={48 * MIB}", "yes", "MemoryMax=80M", boots=(1, 2, 3, 4)),
    Service("plain-idle", "plain", "", "yes", boots=(1, 3)),
    Service("plain-removed", "plain", f"size={48 * MIB}", "yes", boots=(1,)),
    Service("live-no", "live", "", "no", boots=(1, 2)),
    Service("live-restart", "live", "images=plain,kexec:kexec", "restart", boots=(1, 2)),
    Service("live-success", "live", "", "on-success"),
    Service("live-yes", "live", "arrays images=a,b,kexec:kexec,session:kexec:session", "yes", boots=(1, 2, 3, 4)),
    Service("live-limit", "live", "size=48M", "yes", "MemoryMax=80M"),
    Service("live-too-large", "live", "size=96M images=:kexec", None, "MemoryMax=80M", store=0, boots=(1,)),
    Service("live-noexec", "live", "", "yes", boots=(2, 3)),
    Service("live-idle", "live", "", "yes", boots=(1, 3)),
    Service("live-removed", "live", "size=8M", "yes", boots=(1,)),
)
"""The driver also starts live-noexec in boot 1, with vm.memfd_noexec=1, and the removed units in boot 3."""

MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "getty.target",
    "getty-static.service",
    "serial-getty@ttyS0.service",
    "ldconfig.service",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hibernate-clear.service",
    "systemd-hostnamed.socket",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-networkd.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-sysext.socket",
    "systemd-sysusers.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-tmpfiles-setup.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-update-done.service",
    "systemd-user-sessions.service",
    "kmod-static-nodes.service",
    "kexec.service",
    "kexec-load.service",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-tracing.mount",
    "tmp.mount",
    "proc-sys-fs-binfmt_misc.automount",
    "remote-fs.target",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
)
"""Units of the system that are not needed and cost time."""


def text(service: Service) -> str:
    """Return a service's unit file."""
    preserve = "" if service.preserve is None else f"FileDescriptorStorePreserve={service.preserve}\n"
    more = f"{service.service}\n" if service.service else ""
    return (
        f"[Unit]\nDescription=Lab {service.name}\n\n[Service]\nType=notify\nNotifyAccess=main\n"
        f"ExecStart=/usr/bin/python3 /lab/{service.script}.py {service.name} {service.arguments}\n"
        f"FileDescriptorStoreMax={service.store}\n{preserve}TimeoutStartSec=600\n{more}"
    )


def driver() -> str:
    """Return the unit file of the driver."""
    return (
        "[Unit]\nDescription=Lab\nAfter=multi-user.target\n\n[Service]\nType=simple\n"
        "ExecStart=/usr/bin/python3 /lab/driver.py\n"
    )


def by_boot(guest: str) -> str:
    """Return, for each boot of a guest, a line with its number and the units that are started in it."""
    own = [service for service in SERVICES if service.script == guest]
    boots = sorted({boot for service in own for boot in service.boots})
    return "".join(
        f"{boot} {' '.join(f'{each.name}.service' for each in own if boot in each.boots)}\n" for boot in boots
    )
