#!/usr/bin/env bash
# Guess: makedumpfile finds the program headers of an ELF dump by e_phoff, and so filters what QEMU's
#   dump-guest-memory writes.
# What happens: QEMU puts its section headers first (e_phoff is 192). makedumpfile looks for program headers
#   at byte 64 and ends: "get_elf_info: Can't get the number of PT_LOAD." With the same headers
#   moved to byte 64 and nothing else changed, it filters the same dump. drgn opens it as it is.
# Versions: makedumpfile 1.7.2 (Debian 12), on a guest of QEMU 7.2.22 with Linux 6.1.0-48-cloud-amd64
#   (6.1.172-1). Exits 77 where apt does not offer them.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. "$(dirname "$0")/lib/debian-guest.sh"
dump_guest elf="$tmp/qemu"
with_needs makedumpfile=1:1.7.2-1
cd "$tmp"
headers_to_64 qemu moved
for file in qemu moved; do
    echo "$file: e_phoff $(od -An -t u8 -j 32 -N 8 $file)"
    TMPDIR=$tmp program usr/bin/makedumpfile --message-level 6 -c -d 31 $file $file.filtered >$file.log 2>&1 || true
    cat $file.log
done
if grep -q "Can't get the number of PT_LOAD" qemu.log && grep -q "makedumpfile Failed" qemu.log &&
    [ ! -s qemu.filtered ] && [ -s moved.filtered ]; then
    exit 0
fi
echo "the behavior has changed" >&2
exit 1
