"""The machine of scenario `systemd`: Debian sid with systemd as process 1, its services, its disk and its initrd."""
