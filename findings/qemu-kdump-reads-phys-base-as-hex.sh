#!/usr/bin/env bash
# Guess: QEMU's dump-guest-memory in a kdump format of a Linux guest with -device vmcoreinfo is as good as
#   its ELF dump: the kernel's VMCOREINFO says where the kernel is, QEMU copies it into the headers.
# What happens: the kernel writes NUMBER(phys_base) in decimal; QEMU parses it as hexadecimal into the
#   sub-header. With KASLR -241172480 becomes -0x241172480, so a reader that believes the header looks for
#   page tables in the wrong place, while the VMCOREINFO in the same file is right. Only a kernel at its
#   default address (phys_base 0: nokaslr) has a right header.
#   The header's utsname lacks system name and release, too: drgn, which opens the ELF dump of the same
#   guest, refuses the kdump: "kdump_get_string_attr(KDUMP_ATTR_ARCH_NAME): Key has no value".
# Versions: QEMU 7.2.22 (1:7.2+dfsg-7+deb12u18+b2), Linux 6.1.0-48-cloud-amd64 (6.1.172-1), drgn 0.3.0.
#   Exits 77 where apt does not offer them.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. "$(dirname "$0")/lib/debian-guest.sh"
dump_guest elf="$tmp/elf" kdump-zlib="$tmp/flat"
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check drgn==0.3.0
cd "$tmp"
venv/bin/python - <<'EOF'
import re, struct, sys

import drgn


def reassembled(flat):
    """The file that makedumpfile's flattened format describes: pieces with their offsets."""
    out, at = bytearray(), 4096
    while True:
        offset, size = struct.unpack_from(">qq", flat, at)
        at += 16
        if offset < 0:
            return bytes(out)
        out.extend(bytes(max(0, offset + size - len(out))))
        out[offset : offset + size] = flat[at : at + size]
        at += size


with open("flat", "rb") as file:
    dump = reassembled(file.read())
with open("kdump", "wb") as file:
    file.write(dump)
utsname = [dump[12 + 65 * i :][:65].rstrip(b"\0").decode() for i in range(6)]
(block,) = struct.unpack_from("<i", dump, 428)
(phys_base,) = struct.unpack_from("<q", dump, block)
offset, size = struct.unpack_from("<QQ", dump, block + 32)
vmcoreinfo = dump[offset : offset + size].decode()
said = re.search(r"^NUMBER\(phys_base\)=(.*)$", vmcoreinfo, re.M)[1]
print(f"VMCOREINFO: NUMBER(phys_base)={said}, that is {int(said):#x}; sub-header: {phys_base:#x}")
print(f"utsname: {utsname}")


def opened(path):
    try:
        prog = drgn.Program()
        prog.set_core_dump(path)
        return prog["VMCOREINFO"].string_().decode().splitlines()[0]
    except Exception as e:
        return str(e)


elf, kdump = opened("elf"), opened("kdump")
print(f"drgn, ELF: {elf}\ndrgn, kdump: {kdump}")
same = (
    phys_base == int(said, 16)
    and (phys_base != int(said) or int(said) == 0)
    and utsname[0] == utsname[2] == ""
    and elf.startswith("OSRELEASE=6.1.")
    and "ARCH_NAME" in kdump
)
sys.exit(0 if same else "the behavior has changed")
EOF
