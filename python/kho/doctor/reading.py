"""Reads the facts from a tree: one function for each kind of file."""

from __future__ import annotations

import io
import itertools
import os
import re
import stat
import zlib
from collections.abc import Iterator

from ..sizes import PAGE_SIZES, PAGEBLOCK_ORDERS
from . import crashfiles, layout, logs, surroundings
from .facts import MEMORY_LIMIT, Amount, Blocks, Debugfs, Facts, Zone, number
from .kernellog import Evidence, KernelLog, parse
from .tree import FILE_LIMIT, Piece, Tree, clean

LIVE_LOGS = ("var/log/dmesg", "var/log/kern.log")
UNAMES = (
    "proc/version",
    "sos_commands/kernel/uname_-a",
    "sos_commands/host/uname_-a",
    "insights_commands/uname_-a",
    "uname",
    "uname.txt",
    "uname_-a",
    "uname-a.txt",
)
DEBUGFS = "sys/kernel/debug/kho"
LUO_STRUCT = b"luo-v5\0\0"
"""What a LUO subtree begins with that is a structure (abi.md section 6); its numbers are shown."""
FDT_MAGIC = b"\xd0\x0d\xfe\xed"
LIVEUPDATE_WORDS = ("[luo_session]", "luo_session", "/dev/liveupdate")
LINES = 200_000
LINE = 512


def gather(tree: Tree) -> Facts:
    """Read all facts from a tree."""
    facts = Facts(clean(tree.root), tree.live)
    layout.detect_layout(tree)
    meminfo(tree, facts)
    cmdline(tree, facts)
    zoneinfo(tree, facts)
    nodes(tree, facts)
    free = pagetypeinfo(tree, facts)
    surroundings.container(tree, facts)
    page_size(tree, facts, free)
    release(tree, facts)
    surroundings.architecture(tree, facts)
    hugepages(tree, facts)
    debugfs(tree, facts)
    handed_over(tree, facts)
    pins(tree, facts)
    liveupdate(tree, facts)
    if facts.release is not None:
        config(tree, facts)
    crashfiles.crash_kernel(tree, facts)
    log(tree, facts)  # late, because logs may use up the tree's limit
    if facts.cmdline is None and facts.log is not None and facts.log.cmdline is not None:
        _cmdline(facts, facts.log.cmdline)
    if facts.config_file is None:
        config(tree, facts)
    crashfiles.inside_crash_kernel(tree, facts)
    surroundings.boot_loaders(tree, facts)
    surroundings.small_tmpfs(tree, facts)
    return facts


def lines(piece: Piece) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1, each truncated to `LINE` bytes."""
    for count, line in enumerate(io.BytesIO(piece.head), 1):
        if count > LINES:
            return
        yield count + (piece.before or 0), line[:LINE].decode("utf-8", "replace").rstrip("\n")


def first_line(tree: Tree, file: str) -> Evidence | None:
    """Read the first line of a file; None if it is absent or empty."""
    piece = layout.read(tree, file, 1 << 16)
    if piece is None:
        return None
    text = clean(piece.head.removeprefix(b"\xef\xbb\xbf").replace(b"\0", b" ").split(b"\n")[0])
    return Evidence(piece.file, piece.line(0), text) if text else None


def meminfo(tree: Tree, facts: Facts) -> None:
    """Read /proc/meminfo."""
    piece = layout.read(tree, "proc/meminfo", 1 << 20)
    if piece is None:
        return
    names = {"MemTotal": "mem_total", "MemFree": "mem_free", "CmaTotal": "cma_total", "CmaFree": "cma_free"}
    names["Hugetlb"] = "hugetlb"
    for match in re.finditer(rb"^(MemTotal|MemFree|CmaTotal|CmaFree|Hugetlb):[ \t]*(\S+) kB", piece.head, re.MULTILINE):
        value = number(match[2], 1024)
        text = clean(match[0])
        if value is None:
            tree.note_unread(piece.file, f"not a size: {text}")
            continue
        facts.meminfo = True
        line = piece.line(match.start())
        setattr(facts, names[match[1].decode()], Amount(value, Evidence(piece.file, line, text)))
    around = re.findall(
        rb"^(?:(Percpu|VmallocTotal|HardwareCorrupted)|(HugePages_Total|DirectMap4k|Unaccepted|Balloon)):",
        piece.head,
        re.MULTILINE,
    )
    facts.meminfo_whole = any(before for before, _ in around) and any(after for _, after in around)
    if not facts.meminfo:
        tree.note_unread(piece.file, "no line of meminfo")


ZONE = re.compile(r"^Node (\d{1,5}), zone +(\S+)$")
FIELD = re.compile(r"^ +(pages free|spanned|present|managed|cma|start_pfn:|nr_free_cma) +(\S+)$")


def zoneinfo(tree: Tree, facts: Facts) -> None:
    """Read /proc/zoneinfo, which every user can read."""
    piece = layout.read(tree, "proc/zoneinfo", 2 * FILE_LIMIT)
    if piece is None:
        return
    current: tuple[int, str, int] | None = None
    values: dict[str, int] = {}

    def close(line: int) -> None:
        if current is not None and "present" in values and len(facts.zones) < 4096:
            cma = values.get("cma")
            seen = Evidence(piece.file, values.get("line", line), f"node {current[0]} zone {current[1]}: cma {cma}")
            facts.zones.append(
                Zone(
                    *current[:2],
                    values.get("start_pfn:", 0),
                    values.get("spanned", 0),
                    values["present"],
                    values.get("managed", 0),
                    cma,
                    values.get("nr_free_cma", 0),
                    seen,
                )
            )

    for line, text in lines(piece):
        if match := ZONE.match(text):
            close(line)
            current, values = (int(match[1]), clean(match[2])[:32], line), {}
        elif current is not None and (match := FIELD.match(text)):
            value = number(match[2], 1 << 16)
            if value is None:
                tree.note_unread(piece.file, f"not a number of pages: {clean(text)}")
            else:
                values[match[1]] = value >> 16
                if match[1] == "cma":
                    values["line"] = line
    close(0)


def nodes(tree: Tree, facts: Facts) -> None:
    """Read the memory of the NUMA nodes from sysfs if there is no zoneinfo."""
    folder = "sys/devices/system/node"
    for name in tree.names(folder) if not facts.zones else []:
        piece = tree.read(f"{folder}/{name}/meminfo", 1 << 16) if re.fullmatch(r"node\d{1,5}", name) else None
        found = re.search(rb"^Node \d+ MemTotal: +(\d+) kB$", piece.head, re.MULTILINE) if piece is not None else None
        value = number(found[1], 1024) if found is not None else None
        if value:
            facts.node_memory[int(name[4:])] = value


def pagetypeinfo(tree: Tree, facts: Facts) -> int | None:
    """Read /proc/pagetypeinfo, which only root can read; return the number of free pages, None if inexact."""
    piece = layout.read(tree, "proc/pagetypeinfo", FILE_LIMIT)
    if piece is None:
        return None
    column: int | None = None
    free = 0
    exact = False
    for line, text in lines(piece):
        if match := re.match(r"Page block order: (\d{1,2})$", text):
            facts.block_order = int(match[1]) if int(match[1]) <= 20 else None
        elif text.startswith("Number of blocks type"):
            types = text.removeprefix("Number of blocks type").split()
            column = types.index("CMA") if "CMA" in types else None
            if column is None:
                facts.blocks = [Blocks(0, 0, Evidence(piece.file, line, "no type CMA"))]
            continue
        elif text.startswith("Number of mixed blocks"):  # with page_owner=on: rows of the same format follow
            break
        row = text.split()
        if row[:1] != ["Node"] or len(row) < 5 or row[2] != "zone":
            continue
        node = number(row[1].rstrip(","))
        if row[4] == "type":
            counts = row[6:26]
            exact = ">" not in text and (exact or not free)
            free += sum((number(count.lstrip(">")) or 0) << order for order, count in enumerate(counts))
        elif column is not None and node is not None:
            counts = row[4:]
            value = number(counts[column], 1 << 20) if column < len(counts) else None
            if value is None:
                tree.note_unread(piece.file, f"not a number of pageblocks: {clean(text)}")
            elif len(facts.blocks) < 4096:
                shown = f"node {node}, zone {clean(row[3])}: {value >> 20} pageblocks of type CMA"
                facts.blocks.append(Blocks(node, value >> 20, Evidence(piece.file, line, shown)))
    return free if exact and free < 1 << 40 else None


def page_size(tree: Tree, facts: Facts, free: int | None) -> None:
    """Determine the page size: from two files with the same memory in pages and kB, the system, or the pageblocks."""
    managed = sum(zone.managed for zone in facts.zones)
    for amount, pages, why in (
        (facts.mem_total, managed, "MemTotal and zoneinfo's managed"),
        (facts.mem_free, free, "MemFree and pagetypeinfo's free pages"),
    ):
        if amount is None or not pages or not amount.bytes:
            continue
        for size in PAGE_SIZES:
            if 0.9 < amount.bytes / (pages * size) < 1.1:
                facts.page_size, facts.page_size_from = size, why
                return
    if facts.live and hasattr(os, "sysconf"):
        size = os.sysconf("SC_PAGE_SIZE")
        if size in PAGE_SIZES:
            facts.page_size, facts.page_size_from = size, "the system"
            return
    for size, order in PAGEBLOCK_ORDERS.items():
        if facts.block_order == order:
            facts.page_size, facts.page_size_from = size, "the pageblock's order"
            return


def release(tree: Tree, facts: Facts) -> None:
    """Read the release of the kernel."""
    facts.release = first_line(tree, "proc/sys/kernel/osrelease")
    for file in UNAMES:
        seen = first_line(tree, file)
        if seen is None:
            continue
        if file == "proc/version":
            facts.banner = seen.text
        match = re.match(r"Linux (?:version |\S+ )?(\d+\.\d\S*)", seen.text)
        if facts.release is None and match is not None:
            facts.release = seen._replace(text=match[1])
    for file in RELEASE_FILES if facts.release is None and not tree.live else ():
        seen = first_line(tree, file) if tree.exists(file) else None
        if seen is not None and re.fullmatch(r"\d{1,4}\.\d{1,4}[\w.+~-]{0,100}", seen.text):
            facts.release = seen
            return


RELEASE_FILES = ("kernel", "osrelease", "uname_-r", "uname-r", "uname_-r.txt")
"""Files that contain only a release: those of abrt, and usual names of saved output."""


def log(tree: Tree, facts: Facts) -> None:
    """Read the kernel log: /dev/kmsg of the running kernel, otherwise the first log that is of this boot."""
    if facts.live:
        piece = running_log(tree)
        found = parse(piece) if piece is not None else None
        facts.looked.append("dev/kmsg")
        if found is not None and found.version is not None:
            facts.log = found
            return
    for file in LIVE_LOGS if facts.live else itertools.chain(logs.candidates(tree), _more_candidates(tree, facts)):
        facts.looked.append(file)
        piece = logs.read(tree, file)
        found = parse(piece) if piece is not None else None
        if piece is None or found is None or (found.version is None and (facts.live or not logs.is_log_name(file))):
            continue
        why = logs.why_another_boot(tree, facts, found)
        if why is not None:
            tree.note_unread(piece.file, why)
            continue
        if facts.log is None or (found.version is not None and facts.log.version is None):
            facts.log = _with_file_lines(found, piece)  # prefer a log with the beginning of the boot
        if facts.log.version is not None:
            break
    if facts.log is None and not facts.live:
        _use_crash_log(tree, facts)
    if not facts.meminfo and facts.log is not None and facts.log.memory is not None:
        total = number(str(facts.log.cma_reserved or 0))
        facts.cma_total = Amount(total, facts.log.memory) if total is not None else None
    if facts.release is None and facts.log is not None and facts.log.version is not None:
        facts.release = Evidence(facts.log.file, None, clean(facts.log.version))


def _more_candidates(tree: Tree, facts: Facts) -> Iterator[str]:
    """Yield further candidates if no file with the name of a log was a log."""
    if facts.log is None:
        yield from logs.logs_by_content(tree)


def _use_crash_log(tree: Tree, facts: Facts) -> None:
    """Use the logs of a crashed kernel and of its crash kernel, if there are no files of a running machine."""
    for file in logs.crash_logs(tree):
        capturing = logs.CAPTURING.fullmatch(file.rpartition("/")[2]) is not None
        saved = "that saved a crash dump" if capturing else "that crashed"
        if facts.meminfo or facts.zones or facts.blocks or facts.cmdline is not None:
            tree.note_unread(file, f"the log of a kernel {saved}, which is an earlier boot")
            continue
        if capturing and facts.crash.saved_by is not None:
            continue
        piece = logs.read(tree, file)
        found = parse(piece) if piece is not None else None
        facts.looked.append(file)
        if piece is None or found is None:
            continue
        found = _with_file_lines(found, piece)
        if capturing:
            facts.crash.saved_by = found
        if facts.log is None or (facts.log.version is None and found.version is not None and not capturing):
            facts.log, facts.crash.crashed = found, not capturing
            tree.layout = tree.layout or f"the log of a kernel {saved}"


def _with_file_lines(found: KernelLog, piece: Piece) -> KernelLog:
    """Convert line numbers within a section to those of the file that contains it."""
    shift = piece.before
    if shift == 0:
        return found

    def moved(value: object) -> object:
        if isinstance(value, Evidence):
            line = None if shift is None or value.line is None else value.line + shift
            return value._replace(line=line)
        if isinstance(value, list):
            return [moved(item) for item in value]
        return tuple(map(moved, value)) if type(value) is tuple else value

    for name, value in list(vars(found).items()):
        setattr(found, name, moved(value))
    return found


def running_log(tree: Tree) -> Piece | None:
    """Read /dev/kmsg, one record at a time, without waiting for new records."""
    parts = []
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        tree.note_unread("dev/kmsg", "permission denied" if isinstance(error, PermissionError) else str(error.strerror))
        return None
    try:
        for _ in range(20000):
            try:
                parts.append(os.read(fd, 8192))
            except BrokenPipeError:  # the record was overwritten; the next read continues after it
                continue
            except OSError:
                break
    finally:
        os.close(fd)
    return Piece("dev/kmsg", b"".join(parts)[:FILE_LIMIT])


def cmdline(tree: Tree, facts: Facts) -> None:
    """Read the command line."""
    piece = layout.read(tree, "proc/cmdline", 1 << 16)
    if piece is not None:
        _cmdline(facts, Evidence(piece.file, piece.line(0), logs.first_line(piece.head)))


def _cmdline(facts: Facts, seen: Evidence) -> None:
    """Record a command line with unprintable characters replaced."""
    text = "".join(c if c.isprintable() else " " for c in seen.text)
    facts.cmdline = seen._replace(text=text)


OPTION = re.compile(
    rb"^(?:(CONFIG_(?:KEXEC_HANDOVER(?:_ENABLE_DEFAULT)?|RANDOMIZE_BASE|NUMA|LIVEUPDATE))=\S{1,100}|"
    rb"# (CONFIG_(?:KEXEC_HANDOVER(?:_ENABLE_DEFAULT)?|RANDOMIZE_BASE|NUMA|LIVEUPDATE)) is not set)$",
    re.MULTILINE,
)


def config(tree: Tree, facts: Facts) -> None:
    """Read the kernel configuration: the config file next to the kernel, otherwise /proc/config.gz."""
    release = facts.release.text if facts.release is not None else ""
    piece = None
    if re.fullmatch(r"[\w.+~-]{1,100}", release):
        for file in (
            f"boot/config-{release}",
            f"config-{release}",
            f"lib/modules/{release}/config",
            f"usr/lib/modules/{release}/config",
        ):
            piece = piece or tree.kept.get(file) or tree.read(file)
    if piece is None:
        piece = tree.kept.get("config")
    for file in ("proc/config.gz", "config.gz") if piece is None else ():
        piece = tree.read(file) if piece is None and (file == "proc/config.gz" or tree.exists(file)) else piece
        if piece is not None and piece.file == file:
            try:
                text = zlib.decompressobj(31).decompress(piece.head, FILE_LIMIT)
            except zlib.error:
                tree.note_unread(piece.file, "not gzip")
                return
            piece = Piece(piece.file, text)
            break
    if piece is None and not facts.live:
        found = [name for name in tree.names("boot") if name.startswith("config-")]
        piece = tree.read(f"boot/{found[0]}") if len(found) == 1 and not release else None
    if piece is None:
        return
    if not re.search(rb"^(?:CONFIG_\w+=|# CONFIG_\w+ is not set)", piece.head, re.MULTILINE):
        tree.note_unread(piece.file, "not a kernel configuration")
        return
    facts.config_file = piece.file
    for match in OPTION.finditer(piece.head):
        name = (match[1] or match[2]).decode()
        seen = Evidence(piece.file, piece.line(match.start()), clean(match[0]))
        facts.config.setdefault(name, seen)


def hugepages(tree: Tree, facts: Facts) -> None:
    """Read the memory of gigantic pages, the crash kernel and struct pages; RAM from iomem if meminfo is missing."""
    for name in tree.names("sys/kernel/mm/hugepages"):
        match = re.fullmatch(r"hugepages-(\d{1,12})kB", name)
        seen = first_line(tree, f"sys/kernel/mm/hugepages/{name}/nr_hugepages") if match else None
        count = number(seen.text) if seen is not None else None
        if match is None or seen is None or not count:
            continue
        size = int(match[1]) << 10
        total = number(str(count), size)
        if total is not None and size > facts.page_size << 10 and size > facts.block_bytes:
            before = facts.gigantic.bytes if facts.gigantic is not None else 0
            facts.gigantic = Amount(before + total, seen._replace(text=f"{count} pages of {size >> 10} kB"))
    piece = layout.read(tree, "proc/iomem", FILE_LIMIT)
    if piece is not None:
        total = 0
        seen = None
        for line, text in lines(piece):
            if match := re.match(r" *([0-9a-f]{1,16})-([0-9a-f]{1,16}) : Crash kernel$", text):
                total += max(int(match[2], 16) + 1 - int(match[1], 16), 0)
                seen = Evidence(piece.file, line, clean(text))
        if seen is not None and 1 < total < MEMORY_LIMIT:
            facts.crash_kernel = Amount(total, seen)
        if facts.mem_total is None:
            ram = re.findall(rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) : System RAM$", piece.head, re.MULTILINE)
            total = sum(max(int(end, 16) + 1 - int(start, 16), 0) for start, end in ram)
            if len(ram) < total < MEMORY_LIMIT:
                facts.mem_total = Amount(total, Evidence(piece.file, None, "System RAM"))
    piece = layout.read(tree, "proc/vmstat", FILE_LIMIT)
    if piece is not None:
        match_b = re.search(rb"^nr_memmap_boot_pages (\S+)$", piece.head, re.MULTILINE)
        pages = number(match_b[1], facts.page_size) if match_b else None
        if match_b is not None and pages:
            facts.memmap = Amount(pages, Evidence(piece.file, piece.line(match_b.start()), clean(match_b[0])))
        if b"\nnr_free_pages " in b"\n" + piece.head and len(piece.head) < FILE_LIMIT:
            facts.numa = re.search(rb"^numa_hit ", piece.head, re.MULTILINE) is not None


def debugfs(tree: Tree, facts: Facts) -> None:
    """Read the debugfs files of KHO; `out` exists if KHO is active, `in` after a handover."""
    out, came = tree.names(f"{DEBUGFS}/out"), tree.names(f"{DEBUGFS}/in")
    if not out and not came:
        return
    shown = facts.debugfs = Debugfs()
    if came:
        shown.incoming = Evidence(f"{DEBUGFS}/in", None, ", ".join(map(clean, came))[:200])
    for file, base in (("scratch_len", 0), ("scratch_phys", 0)):
        piece = tree.read(f"{DEBUGFS}/out/{file}", 1 << 16)
        for line, text in lines(piece) if piece is not None else []:
            if not text.strip():
                continue
            value = number(text.strip(), base=base)
            if piece is None or value is None:
                tree.note_unread(f"{DEBUGFS}/out/{file}", f"not a size or address: {clean(text)}")
                shown.lens.clear()
                break
            if file == "scratch_len":
                shown.lens.append(Amount(value, Evidence(piece.file, line, clean(text))))
            else:
                shown.phys.append(value)
    if sum(amount.bytes for amount in shown.lens) >= MEMORY_LIMIT:
        tree.note_unread(f"{DEBUGFS}/out/scratch_len", f"the sum is not below {MEMORY_LIMIT} bytes")
        shown.lens.clear()
    seen = first_line(tree, f"{DEBUGFS}/out/finalize")
    if seen is not None and seen.text == "1":
        shown.finalized = seen
    for side in ("out", "in"):
        piece = tree.read(f"{DEBUGFS}/{side}/fdt", 1 << 20)
        if piece is not None and shown.compatible is None and (match := re.search(rb"kho-v\d{1,3}", piece.head)):
            shown.compatible = (match[0].decode(), Evidence(piece.file, None, match[0].decode()))
        for name in tree.names(f"{DEBUGFS}/{side}/sub_fdts"):
            file = f"{DEBUGFS}/{side}/sub_fdts/{name}"
            blob = tree.read(file, 1 << 20)
            if blob is None:
                continue
            shown.subtrees.append((side, clean(name), len(blob.head)))
            if (name, side) == ("kexec-metadata", "in") and len(blob.head) >= 73:
                previous = clean(blob.head[4:69].split(b"\0")[0])
                count = int.from_bytes(blob.head[69:73], "little")
                shown.previous = (previous, count, Evidence(file, None, f"{previous}, count {count}"))
            if name == "LUO":
                text = "LUO"
                if side == "in" and not blob.head.startswith(FDT_MAGIC):
                    text = "not decoded: Linux 7.2 and later free this memory once it is read"
                elif side == "out" and blob.head.startswith(FDT_MAGIC):
                    shown.luo_flb = b"luo-flb\0" in blob.head
                elif blob.head.startswith(LUO_STRUCT) and len(blob.head) >= 32:
                    times, sessions = (int.from_bytes(blob.head[at : at + 8], "little") for at in (8, 16))
                    written = "none written yet"
                    text = f"live update {times}, sessions: {f'at {sessions:#x}' if sessions else written}"
                shown.liveupdate.append(Evidence(file, None, text))


def handed_over(tree: Tree, facts: Facts) -> None:
    """Find the handover entry in boot_params' setup_data or the devicetree's /chosen (abi.md section 2)."""
    for name in tree.names("sys/kernel/boot_params/setup_data"):
        seen = first_line(tree, f"sys/kernel/boot_params/setup_data/{name}/type")
        if seen is not None and seen.text in ("10", "0xa"):
            facts.handed_over = seen._replace(text=f"{seen.text} (SETUP_KEXEC_KHO)")
    for folder in ("sys/firmware/devicetree/base/chosen", "proc/device-tree/chosen"):
        if facts.handed_over is None and tree.stat(f"{folder}/linux,kho-fdt") is not None:
            facts.handed_over = Evidence(f"{folder}/linux,kho-fdt", None, "is there")
    if facts.handed_over is None and tree.stat("sys/kernel/boot_params/version") is not None:
        facts.boot_data = Evidence("sys/kernel/boot_params/setup_data", None, "no entry of type SETUP_KEXEC_KHO")


def pins(tree: Tree, facts: Facts) -> None:
    """Find devices and drivers that use long-term pins."""
    for folder, what in (
        ("sys/class/infiniband", "RDMA device"),
        ("sys/class/vfio-dev", "VFIO device"),
        ("dev/vfio", "VFIO group"),
        ("sys/module/nvidia/drivers", "NVIDIA driver"),
        ("proc/driver/nvidia/gpus", "NVIDIA GPU"),
        ("sys/class/kfd", "AMD compute device"),
        ("sys/class/accel", "accelerator"),
    ):
        found = [name for name in tree.names(folder) if name != "vfio"]
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            facts.pins.append(Evidence(folder, None, f"{what} {', '.join(map(clean, found[:4]))}{more}"))
    wanted = r"(vfio_pci|mlx5_ib|ib_uverbs|nvidia|nvidia_peermem|amdgpu|irdma|bnxt_re|efa|habanalabs) \d+ (\d+) "
    for file in ("proc/modules", "sos_commands/kernel/lsmod", "insights_commands/lsmod", "lsmod", "lsmod.txt"):
        piece = layout.read(tree, file, 1 << 20)
        for line, text in lines(piece) if piece is not None else []:
            match = re.match(wanted, re.sub(r" +", " ", text) + " ")
            if match and not any(match[1] in seen.text for seen in facts.pins) and len(facts.pins) < 20:
                facts.pins.append(Evidence(piece.file if piece is not None else file, line, f"module {match[1]}"))


def liveupdate(tree: Tree, facts: Facts) -> None:
    """Find /dev/liveupdate, and the descriptors of it and of its sessions."""
    found = tree.stat("dev/liveupdate")
    if found is not None:
        facts.device = Evidence("dev/liveupdate", None, "is there")
        if tree.live:
            usable = stat.S_ISCHR(found.st_mode) and os.access("/dev/liveupdate", os.R_OK | os.W_OK)
            facts.device_usable = usable
    else:
        piece = layout.read(tree, "proc/misc", 1 << 16)
        for line, text in lines(piece) if piece is not None else []:
            if text.split()[1:] == ["liveupdate"]:
                facts.device = Evidence("proc/misc", line, clean(text))
    if facts.device is None:
        return
    searched = 0
    for pid in tree.names("proc"):
        if not pid.isdigit() or (tree.live and not os.access(f"/proc/{pid}/fd", os.R_OK)):
            continue
        for fd, target in tree.links(f"proc/{pid}/fd"):
            searched += 1
            if any(word in target for word in LIVEUPDATE_WORDS) and len(facts.sessions) < 100:
                facts.sessions.append(Evidence(f"proc/{pid}/fd/{fd}", None, target))
        if searched > 4096:
            tree.note_unread("proc", "the descriptors of the remaining processes")
            break
