#!/usr/bin/env bash
# Guess: makedumpfile -d 31 leaves the same pages out of an ELF dump (-E) and of a kdump file: user data,
#   page cache and free pages are in neither.
# What happens: an ELF dump can leave out only the end of a segment (p_filesz < p_memsz), and makedumpfile
#   ends a segment only at a long run of excluded pages (256). Pages of shorter runs are written with their
#   contents, not as zeros: hundreds of pages with data that the kdump file of the same guest, just booted,
#   does not have. So "-E -d 31" does not keep user data out of a dump.
# Versions: makedumpfile 1.7.2 (Debian 12), on a guest of QEMU 7.2.22 with Linux 6.1.0-48-cloud-amd64
#   (6.1.172-1). Exits 77 where apt does not offer them.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. "$(dirname "$0")/lib/debian-guest.sh"
dump_guest elf="$tmp/qemu"
with_needs makedumpfile=1:1.7.2-1
cd "$tmp"
headers_to_64 qemu source # see makedumpfile-reads-headers-at-64.sh
for format in -c -E; do
    TMPDIR=$tmp program usr/bin/makedumpfile --message-level 0 "$format" -d 31 source "filtered$format"
done
python3 - <<'EOF'
import struct, sys

PAGE = 4096


class Core:
    def __init__(self, path):
        self.file = open(path, "rb")
        head = self.file.read(1 << 16)
        (offset,) = struct.unpack_from("<Q", head, 32)
        (count,) = struct.unpack_from("<H", head, 56)
        headers = [struct.unpack_from("<IIQQQQQQ", head, offset + 56 * i) for i in range(count)]
        self.loads = [(h[4], h[2], h[5], h[6]) for h in headers if h[0] == 1]

    def page(self, phys):
        """The page's bytes; None if the file does not have it."""
        for start, offset, filesz, _ in self.loads:
            if start <= phys and phys + PAGE <= start + filesz:
                self.file.seek(offset + phys - start)
                return self.file.read(PAGE)


with open("filtered-c", "rb") as file:
    kdump = file.read()
block, sub_blocks, bitmap_blocks, max_mapnr = struct.unpack_from("<iiiI", kdump, 428)
half = bitmap_blocks * block // 2
saved = kdump[(1 + sub_blocks) * block + half :][:half]
source, elf = Core("source"), Core("filtered-E")
kept = excluded = with_data = longest = run = 0
for pfn in range(max_mapnr):
    page = elf.page(pfn * PAGE)
    if saved[pfn >> 3] >> (pfn & 7) & 1 or page is None:
        run = 0
        continue
    excluded += 1
    run += 1
    longest = max(longest, run)
    assert page == source.page(pfn * PAGE)
    with_data += any(page)
print(f"pages that the kdump file excludes and the ELF file has: {excluded}, {with_data} of them not zero")
print(f"longest run of them: {longest}; segments of the ELF file: {len(elf.loads)}")
sys.exit(0 if with_data > 0 and longest < 256 else "the behavior has changed")
EOF
