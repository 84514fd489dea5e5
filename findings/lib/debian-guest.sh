# Sourced by the scripts that need a dump of a real kernel; they set $tmp and remove it.
#   with_needs PACKAGE=VERSION...   downloads Debian packages and all that they depend on, unpacks them in $tmp/tree
#   alone PACKAGE=VERSION...        the same without their dependencies
#   program PATH ARGUMENT...        runs a program of $tmp/tree with the libraries of $tmp/tree
#   dump_guest FORMAT=FILE...       boots Debian's cloud kernel in QEMU (TCG, 512 MiB, KASLR on), waits until it
#                                   has handed its VMCOREINFO to QEMU, and writes dump-guest-memory files
#   headers_to_64 FROM TO           copies an ELF dump of QEMU's with its program headers moved to byte 64
# Nothing is installed. Exits 77 where apt does not offer a version, or on other machines than x86_64.
[ "$(uname -m)" = x86_64 ] || exit 77

unpack() {
    for package in "$1"/*.deb; do dpkg -x "$package" "$tmp/tree"; done
}

with_needs() {
    mkdir -p "$tmp/needs/partial"
    : >"$tmp/status" # apt takes this for an empty machine, so it fetches every dependency
    apt-get install -q -y --download-only --no-install-recommends -o Dir::State::status="$tmp/status" \
        -o Dir::Cache::archives="$tmp/needs" "$@" >"$tmp/apt.log" 2>&1 || { cat "$tmp/apt.log"; exit 77; }
    unpack "$tmp/needs"
}

alone() {
    mkdir -p "$tmp/alone"
    (cd "$tmp/alone" && apt-get download -q "$@") >"$tmp/apt.log" 2>&1 || { cat "$tmp/apt.log"; exit 77; }
    unpack "$tmp/alone"
}

program() {
    local name=$1
    shift
    "$tmp/tree/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path \
        "$(find "$tmp/tree" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')" "$tmp/tree/$name" "$@"
}

dump_guest() {
    with_needs qemu-system-x86=1:7.2+dfsg-7+deb12u18+b2
    alone linux-image-6.1.0-48-cloud-amd64=6.1.172-1 busybox-static=1:1.35.0-4+deb12u1+b1
    python3 - "$tmp/tree" "$tmp/initrd" <<'EOF'
import glob, sys

root, out = sys.argv[1:]
count = 0


def entry(name, mode, data=b"", major=0, minor=0):
    """One file of a newc cpio archive."""
    global count
    count += 1
    name = name.encode() + b"\0"
    fields = (count, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def content(pattern):
    (path,) = glob.glob(root + pattern)
    with open(path, "rb") as file:
        return file.read()


INIT = b"""#!/busybox sh
/busybox insmod /fw.ko && /busybox echo READY >/dev/ttyS0
/busybox sleep 300
"""
with open(out, "wb") as file:
    file.write(entry("dev", 0o40755) + entry("dev/console", 0o20600, major=5, minor=1))
    file.write(entry("dev/ttyS0", 0o20600, major=4, minor=64))
    file.write(entry("busybox", 0o100755, content("/bin/busybox")))
    file.write(entry("fw.ko", 0o100644, content("/lib/modules/*/kernel/drivers/firmware/qemu_fw_cfg.ko")))
    file.write(entry("init", 0o100755, INIT) + entry("TRAILER!!!", 0))
EOF
    mkfifo "$tmp/to-qemu" "$tmp/from-qemu"
    local share=$tmp/tree/usr/share
    # The guest ends by itself after 300 s: panic=-1 and -no-reboot make QEMU exit once init has ended.
    QEMU_MODULE_DIR=$tmp/tree/usr/lib/x86_64-linux-gnu/qemu \
        program usr/bin/qemu-system-x86_64 -L "$share/qemu" -L "$share/seabios" -no-reboot \
        -machine q35 -accel tcg -cpu max -m 512M -display none -vga none -nic none -device vmcoreinfo \
        -kernel "$tmp"/tree/boot/vmlinuz-* -initrd "$tmp/initrd" -append "console=ttyS0 panic=-1" \
        -serial "file:$tmp/serial" -qmp stdio <"$tmp/to-qemu" >"$tmp/from-qemu" &
    python3 - "$tmp" "$@" <<'EOF'
import json, sys, time

tmp, *dumps = sys.argv[1:]
commands = open(tmp + "/to-qemu", "w")
replies = open(tmp + "/from-qemu")


def qmp(command, **arguments):
    print(json.dumps({"execute": command, "arguments": arguments}), file=commands, flush=True)
    for line in replies:
        reply = json.loads(line)
        if "return" in reply:
            return
        if "error" in reply:
            sys.exit(f"QEMU: {reply['error']}")
    sys.exit("QEMU has ended")


try:
    qmp("qmp_capabilities")
    for _ in range(600):
        qmp("query-status")
        with open(tmp + "/serial", "rb") as serial:
            if b"READY" in serial.read():
                break
        time.sleep(0.2)
    else:
        sys.exit("the guest has not booted within two minutes")
    for dump in dumps:
        form, path = dump.split("=")
        qmp("dump-guest-memory", paging=False, protocol="file:" + path, format=form)
finally:
    try:
        print(json.dumps({"execute": "quit"}), file=commands, flush=True)
    except BrokenPipeError:
        pass
EOF
    wait
}

headers_to_64() {
    python3 - "$@" <<'EOF'
import shutil, struct, sys

source, target = sys.argv[1:]
shutil.copyfile(source, target)
with open(target, "r+b") as file:
    head = bytearray(file.read(64))
    (offset,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    file.seek(offset)
    table = file.read(size * count)
    assert 64 + len(table) <= min(
        struct.unpack_from("<Q", table, size * i + 8)[0] for i in range(count)
    ), "no room at byte 64"
    struct.pack_into("<QQ", head, 32, 64, 0)  # e_phoff, e_shoff
    struct.pack_into("<HHH", head, 58, 0, 0, 0)  # no sections
    file.seek(0)
    file.write(head + table)
EOF
}
