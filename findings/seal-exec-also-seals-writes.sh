#!/usr/bin/env bash
# Guess: F_ADD_SEALS sets the seals that it is given. F_SEAL_EXEC forbids changes of the execute bits, no more.
# What happens: on a memfd with an execute bit, which is how memfd_create() makes them (mode 0777),
#   F_SEAL_EXEC (0x20) also sets SHRINK, GROW, WRITE and FUTURE_WRITE: F_GET_SEALS is 0x3e and
#   write() is EPERM. On one of mode 0666 it sets 0x20 and nothing else.
#   So seals cannot be copied from memfd to memfd by F_GET_SEALS and F_ADD_SEALS alone: what restores a
#   writable MFD_NOEXEC_SEAL memfd (seals 0x20, mode 0666) into a plain one, seals first, gets a read-only
#   one, without an error. The mode must be restored before the seals.
# Versions: Linux 6.18.44 (the seal is of 6.3); Python 3.11 (only as a way to the system calls).
set -euo pipefail
uname -sr
python3 - <<'EOF'
import errno, fcntl, os, sys

F_ADD_SEALS, F_GET_SEALS, F_SEAL_EXEC = 1033, 1034, 0x20
MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL, MFD_EXEC = 2, 8, 16


def state(fd):
    """(mode, seals, whether write() works)."""
    try:
        os.write(fd, b"x")
        written = True
    except OSError as e:
        assert e.errno == errno.EPERM
        written = False
    return oct(os.fstat(fd).st_mode & 0o777), hex(fcntl.fcntl(fd, F_GET_SEALS)), written


def sealed(mode):
    fd = os.memfd_create("plain", MFD_ALLOW_SEALING | MFD_EXEC)
    os.fchmod(fd, mode)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_EXEC)
    return state(fd)


source = os.memfd_create("source", MFD_NOEXEC_SEAL)
mode, seals = os.fstat(source).st_mode & 0o777, fcntl.fcntl(source, F_GET_SEALS)
seals_first = os.memfd_create("copy", MFD_ALLOW_SEALING | MFD_EXEC)
fcntl.fcntl(seals_first, F_ADD_SEALS, seals)
mode_first = os.memfd_create("copy", MFD_ALLOW_SEALING | MFD_EXEC)
os.fchmod(mode_first, mode)
fcntl.fcntl(mode_first, F_ADD_SEALS, seals)
seen = {
    "F_SEAL_EXEC on mode 0777": sealed(0o777),
    "F_SEAL_EXEC on mode 0666": sealed(0o666),
    "MFD_NOEXEC_SEAL": state(source),
    "its copy, seals first": state(seals_first),
    "its copy, mode first": state(mode_first),
}
for name, (mode, seals, written) in seen.items():
    print(f"{name}: mode {mode}, seals {seals}, write() {'works' if written else 'is EPERM'}")
read_only, writable = ("0o777", "0x3e", False), ("0o666", "0x20", True)
expected = [read_only, writable, writable, read_only, writable]
sys.exit(0 if list(seen.values()) == expected else f"the behavior has changed: expected {expected}")
EOF
