"""A kernel's memory for `kho.handover.symbols`: image, page tables, kallsyms, BTF, the variables of KHO and LUO.

Written from the kernel's sources, apart from the reader: offsets of members come from the layout that is encoded here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from filtered import Load, core, note

ENDS = 1 << 64
START_KERNEL_MAP = 0xFFFFFFFF80000000

LIST = {"list_head": [("next", "ptr:list_head"), ("prev", "ptr:list_head")]}
LUO = {
    "luo_file_set": [("files_list", "list_head"), ("block_set", "char[40]"), ("count", "u64")],
    "luo_session": [
        ("name", "char[64]"),
        ("list", "list_head"),
        ("retrieved", "bool"),
        ("file_set", "luo_file_set"),
        ("mutex", "char[32]"),
    ],
    "liveupdate_file_handler": [("ops", "ptr:void"), ("compatible", "char[48]"), ("list", "list_head")],
    "luo_file": [
        ("fh", "ptr:liveupdate_file_handler"),
        ("file", "ptr:file"),
        ("serialized_data", "u64"),
        ("private_data", "ptr:void"),
        ("retrieve_status", "int"),
        ("mutex", "char[32]"),
        ("list", "list_head"),
        ("token", "u64"),
    ],
    "luo_session_header": [("count", "long"), ("list", "list_head"), ("rwsem", "char[40]"), ("active", "bool")],
    "luo_session_global": [("incoming", "luo_session_header"), ("outgoing", "luo_session_header")],
}
FILES = {
    "qstr": [("hash_len", "u64"), ("name", "ptr:char")],
    "dentry": [("d_flags", "int"), ("d_parent", "ptr:dentry"), ("", "union:d_names"), ("d_inode", "ptr:inode")],
    "path": [("mnt", "ptr:void"), ("dentry", "ptr:dentry")],
    "inode": [("i_mode", "int"), ("i_size", "loff_t")],
    "file": [("f_lock", "int"), ("f_flags", "bits:3"), ("f_inode", "ptr:inode"), ("f_path", "const:path")],
}
UNIONS = {"d_names": [("__d_name", "qstr"), ("d_name", "const:qstr")]}
KHO = {
    "7.3": {
        "kho_out": [("fdt", "ptr:void"), ("lock", "char[32]")],
        "kho_in": [
            ("fdt_phys", "u64"),
            ("scratch_phys", "u64"),
            ("previous_release", "char[65]"),
            ("kexec_count", "u32"),
        ],
    },
    "6.19": {
        "kho_out": [("fdt", "ptr:void"), ("finalized", "bool"), ("lock", "char[32]")],
        "kho_in": [("fdt_phys", "u64"), ("scratch_phys", "u64"), ("mem_map_phys", "u64")],
    },
    "6.17": {
        "kho_serialization": [("fdt", "ptr:page"), ("fdt_list", "list_head")],
        "kho_out": [("chain_head", "char[48]"), ("ser", "kho_serialization"), ("finalized", "bool")],
        "kho_in": [("dir", "ptr:void"), ("fdt_phys", "u64"), ("scratch_phys", "u64")],
    },
}
BASE = {"u64": 8, "u32": 4, "int": 4, "long": 8, "bool": 1, "char": 1, "loff_t": 8}
SIGNED = {"int", "long", "loff_t"}


class Layout:
    """Structures, their offsets, and their BTF."""

    def __init__(self, structs: dict[str, list[tuple[str, str]]], unions: dict[str, list[tuple[str, str]]]) -> None:
        self.structs, self.unions = structs, unions
        self.sizes: dict[str, int] = {}
        self.offsets: dict[str, dict[str, int]] = {}
        for name in [*structs, *unions]:
            self.lay(name)

    def lay(self, name: str) -> None:
        if name in self.sizes:
            return
        at = size = 0
        align = 1
        self.offsets[name] = {}
        for number, (member, kind) in enumerate(self.structs.get(name) or self.unions[name]):
            nbytes, need = self.measure(kind)
            at = -(-at // need) * need
            self.offsets[name][member or f"#{number}"] = at
            size, align = max(size, at + nbytes), max(align, need)
            at = 0 if name in self.unions else at + nbytes
        self.sizes[name] = -(-size // align) * align

    def measure(self, kind: str) -> tuple[int, int]:
        """Bytes and alignment of a member's type."""
        prefix, _, rest = kind.partition(":")
        if prefix == "ptr":
            return 8, 8
        if prefix == "bits":
            return 4, 4
        if kind.endswith("]"):
            element, _, count = kind[:-1].partition("[")
            return BASE[element] * int(count), BASE[element]
        name = rest or kind
        if name in BASE:
            return BASE[name], BASE[name]
        self.lay(name)
        return self.sizes[name], 8

    def offset(self, name: str, path: str) -> int:
        """Bytes of a member from the start of a structure."""
        at = 0
        for part in path.split("."):
            members = dict(self.structs.get(name) or self.unions[name])
            if part not in members:
                number, (_, union) = next((n, m) for n, m in enumerate(self.structs[name]) if m[1].startswith("union:"))
                at += self.offsets[name][f"#{number}"]
                name = union.partition(":")[2]
                members = dict(self.unions[name])
            at += self.offsets[name][part]
            name = members[part].rpartition(":")[2]
        return at

    def btf(self, *, header: int = 24, extra: bytes = b"") -> bytes:
        """The types in BTF; `extra` is appended to the type section."""
        strings = bytearray(b"\0")
        records: list[bytes] = []
        numbers: dict[str, int] = {}

        def text(name: str) -> int:
            if not name:
                return 0
            at = len(strings)
            strings.extend(name.encode() + b"\0")
            return at

        def add(key: str, record: bytes) -> int:
            records.append(record)
            numbers[key] = len(records)
            return len(records)

        def kind_of(kind: str) -> int:
            if kind in numbers:
                return numbers[kind]
            prefix, _, rest = kind.partition(":")
            if prefix == "ptr":
                number = add(kind, b"")
                target = 0 if rest == "void" or rest not in {*self.structs, *BASE} else kind_of(rest)
                records[number - 1] = struct.pack("<III", 0, 2 << 24, target)
                return number
            if prefix == "const":
                inner = kind_of(rest)
                return add(kind, struct.pack("<III", 0, 10 << 24, inner))
            if prefix == "union":
                return kind_of(rest)
            if prefix == "bits":
                return kind_of("int")
            if kind == "loff_t":
                inner = kind_of("long")
                return add(kind, struct.pack("<III", text(kind), 8 << 24, inner))
            if kind.endswith("]"):
                element, _, count = kind[:-1].partition("[")
                return add(kind, struct.pack("<IIIIII", 0, 3 << 24, 0, kind_of(element), kind_of("int"), int(count)))
            if kind in BASE:
                bits = BASE[kind] * 8 | (1 << 24 if kind in SIGNED else 0)
                return add(kind, struct.pack("<IIII", text(kind), 1 << 24, BASE[kind], bits))
            number = add(kind, b"")
            members = self.structs.get(kind) or self.unions[kind]
            flag = any(m.startswith("bits:") for _, m in members)
            rows = b""
            for at, (member, of) in enumerate(members):
                offset = self.offsets[kind][member or f"#{at}"] * 8
                if of.startswith("bits:"):
                    offset |= int(of[5:]) << 24
                rows += struct.pack("<III", text(member), kind_of(of), offset)
            info = (5 if kind in self.unions else 4) << 24 | len(members) | flag << 31
            name = text(kind) if kind in self.structs else 0
            records[number - 1] = struct.pack("<III", name, info, self.sizes[kind]) + rows
            return number

        # Kinds without use here, and a function with the name of a structure.
        add("#enum", struct.pack("<IIIII", text("colors"), 6 << 24 | 1, 4, text("red"), 0))
        add("#proto", struct.pack("<IIIII", 0, 13 << 24 | 1, 0, text("x"), 0))
        add("#func", struct.pack("<III", text("luo_session"), 12 << 24, 2))
        add("#enum64", struct.pack("<IIIIII", text("wide"), 19 << 24 | 1, 8, text("blue"), 0, 0))
        for name in self.structs:
            kind_of(name)
        types = b"".join(records) + extra
        head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, header, 0, len(types), len(types), len(strings))
        if header >= 32:
            # The layout of kinds 0 to 20: as they are, and one that is new.
            sizes = [0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 4, 0, 0, 8]
            each = [0, 0, 0, 0, 12, 12, 8, 0, 0, 0, 0, 0, 0, 8, 0, 12, 0, 0, 0, 12, 4]
            table = b"".join(struct.pack("<BBH", a, b, 0) for a, b in zip(sizes, each, strict=True))
            head += struct.pack("<II", len(types) + len(strings), len(table))
            return head.ljust(header, b"\0") + types + bytes(strings) + table
        return head + types + bytes(strings)


def kallsyms(symbols: dict[str, int], *, order: int = 8) -> dict[str, bytes]:
    """The tables of kernel/kallsyms.c for symbols, without the offsets; their order is that of addresses.

    Tokens 1 to 31 are of several characters, the others of one.
    """
    tokens = [b"Tk", b"ho", b"_s", b"cratch", b"Dluo_", b"session", b"D__st", b"D"]
    table, index = b"", []
    for byte in range(256):
        index.append(len(table))
        table += (tokens[byte - 1] if 1 <= byte <= len(tokens) else bytes([byte]) if byte else b"") + b"\0"

    def pack(name: str) -> bytes:
        left, out = b"D" + name.encode(), b""
        while left:
            best = max((t for t in tokens if left.startswith(t)), key=len, default=b"")
            out += bytes([tokens.index(best) + 1]) if best else left[:1]
            left = left[len(best) or 1 :]
        return (bytes([len(out)]) if len(out) < 0x80 else bytes([len(out) & 0x7F | 0x80, len(out) >> 7])) + out

    names = sorted(symbols, key=symbols.__getitem__)
    packed, markers = b"", []
    for number, name in enumerate(names):
        if number % 256 == 0:
            markers.append(len(packed))
        packed += pack(name)
    by_name = sorted(range(len(names)), key=lambda n: names[n].encode())
    pad = order
    return {
        "kallsyms_num_syms": struct.pack("<I", len(names)),
        "kallsyms_names": packed,
        "kallsyms_markers": struct.pack(f"<{len(markers)}I", *markers).ljust(-(-4 * len(markers) // pad) * pad, b"\0"),
        "kallsyms_token_table": table,
        "kallsyms_token_index": struct.pack("<256H", *index),
        "seqs": b"".join(n.to_bytes(3, "big") for n in by_name),
    }


@dataclass
class File:
    """A file to put into a session."""

    token: int
    data: int = 0
    compatible: str = "memfd-v2"
    name: str | None = "ram"
    size: int = 0
    status: int = 0


@dataclass
class Session:
    """A session to put into a list."""

    name: str
    files: list[File] = field(default_factory=list)
    retrieved: bool = False
    count: int | None = None


class Kernel:
    """A kernel's memory; pages by address."""

    def __init__(
        self,
        release: str = "7.3.4",
        *,
        like: str = "7.3",
        machine: str = "x86_64",
        page: int = 4096,
        bits: int = 48,
        relative_base: bool = False,
        start: int = 0x2000000,
        symbols: int = 700,
        large: bool = True,
    ) -> None:
        self.release, self.like, self.machine, self.page, self.bits = release, like, machine, page, bits
        self.relative_base, self.start, self.filler, self.large = relative_base, start, symbols, large
        self.pages: dict[int, bytearray] = {}
        self.mapped: list[int] = []
        """More memory that the direct map has."""
        structs = {**LIST, **FILES, **KHO[like], **({} if like == "6.17" else LUO)}
        self.layout = Layout(structs, UNIONS)
        if machine == "x86_64":
            self.image = START_KERNEL_MAP + 0x11000000
            self.direct = (ENDS - (1 << (bits - 1))) + 0x123 * (1 << 30)
            self.ram = 0
        else:
            self.image = 0xFFFF800081230000
            self.ram = 0x40000000
            self.direct = ENDS - (1 << bits)
            self.start += self.ram
        self._next_image = self.image
        self._next_heap = self.start + 0x1000000
        self._next_table = self.start + 0x2000000
        self.vmemmap = 0xFFFFEA0000000000
        self.symbols: dict[str, int] = {"_text": self.image, "_end": self.image + 0x1000000}
        self.root = 0
        self.info: dict[str, str] = {}
        self.strings: dict[str, int] = {}
        self.handlers: dict[str, int] = {}
        self.variables()

    # Memory

    def write(self, phys: int, data: bytes) -> None:
        while data:
            page, offset = phys // 4096 * 4096, phys % 4096
            n = min(len(data), 4096 - offset)
            self.pages.setdefault(page, bytearray(4096))[offset : offset + n] = data[:n]
            phys, data = phys + n, data[n:]

    def image_phys(self, address: int) -> int:
        return address - self.image + self.start

    def direct_phys(self, address: int) -> int:
        return address - self.direct + self.ram

    def phys(self, address: int) -> int:
        return self.image_phys(address) if self.image <= address < self.image + 0x1000000 else self.direct_phys(address)

    def put(self, address: int, data: bytes) -> None:
        self.write(self.phys(address), data)

    def static(self, data: bytes, name: str | None = None, align: int = 8) -> int:
        """Put bytes into the image."""
        at = -(-self._next_image // align) * align
        self._next_image = at + len(data)
        self.write(self.image_phys(at), data)
        if name is not None:
            self.symbols[name] = at
        return at

    def heap(self, nbytes: int, align: int = 64) -> int:
        """Allocate memory of the direct map; return its address there."""
        at = -(-self._next_heap // align) * align
        self._next_heap = at + nbytes
        self.write(at, bytes(nbytes))
        return at - self.ram + self.direct

    def set(self, address: int, name: str, path: str, value: int | bytes) -> None:
        """Write a member of a structure."""
        at = address + self.layout.offset(name, path)
        if isinstance(value, bytes):
            self.put(at, value)
        else:
            kind = dict(self.layout.structs[name]).get(path, "u64")
            size = BASE.get(kind, 8)
            self.put(at, (value % ENDS).to_bytes(8, "little")[:size])

    def link(self, head: int, members: list[int]) -> None:
        """Make a list_head of addresses of list_heads."""
        ring = [head, *members]
        for at, this in enumerate(ring):
            self.put(this, struct.pack("<QQ", ring[(at + 1) % len(ring)], ring[at - 1]))

    # Variables

    def variables(self) -> None:
        self.static(bytes(64), "_stext")
        utsname = b"".join(text.encode().ljust(65, b"\0") for text in ("Linux", "guest", self.release))
        self.static(bytes(16) + utsname, "init_uts_ns", 64)
        for name in ("kho_out", "kho_in", "luo_session_global"):
            if name in self.layout.sizes:
                self.static(bytes(self.layout.sizes[name]), name, 64)
        self.static(bytes(8), "kho_scratch")
        self.static(bytes(8), "kho_scratch_cnt")
        if "luo_session_global" in self.symbols:
            for side in ("incoming", "outgoing"):
                self.sessions(side, [])

    def scratch(self, areas: list[tuple[int, int]]) -> int:
        """Set `kho_scratch`; return the physical address of the array."""
        array = self.heap(4096, 4096)
        self.put(array, b"".join(struct.pack("<QQ", *area) for area in areas))
        self.put(self.symbols["kho_scratch"], struct.pack("<Q", array))
        self.put(self.symbols["kho_scratch_cnt"], struct.pack("<I", len(areas)))
        return self.phys(array)

    def out(self, fdt_phys: int, *, finalized: bool = False) -> None:
        out = self.symbols["kho_out"]
        if self.like == "6.17":
            self.set(out, "kho_out", "ser.fdt", self.vmemmap + fdt_phys // self.page * 64)
        else:
            self.set(out, "kho_out", "fdt", fdt_phys - self.ram + self.direct)
        if self.like != "7.3":
            self.set(out, "kho_out", "finalized", int(finalized))

    def got(self, fdt_phys: int, *, release: str = "", count: int = 0) -> None:
        got = self.symbols["kho_in"]
        self.set(got, "kho_in", "fdt_phys", fdt_phys)
        if self.like == "7.3":
            self.set(got, "kho_in", "previous_release", release.encode().ljust(65, b"\0"))
            self.set(got, "kho_in", "kexec_count", count)

    def handler(self, compatible: str) -> int:
        if compatible not in self.handlers:
            at = self.static(bytes(self.layout.sizes["liveupdate_file_handler"]), align=64)
            self.set(at, "liveupdate_file_handler", "compatible", compatible.encode().ljust(48, b"\0"))
            self.handlers[compatible] = at
        return self.handlers[compatible]

    def open_file(self, name: str, size: int) -> int:
        opened, inode = self.heap(self.layout.sizes["file"]), self.heap(self.layout.sizes["inode"])
        entry, text = self.heap(self.layout.sizes["dentry"]), self.heap(len(name.encode()) + 8)
        self.put(text, b"memfd:" + name.encode() + b"\0")
        self.set(inode, "inode", "i_size", size)
        self.put(entry + self.layout.offset("dentry", "d_name.name"), struct.pack("<Q", text))
        self.set(opened, "file", "f_inode", inode)
        self.put(opened + self.layout.offset("file", "f_path.dentry"), struct.pack("<Q", entry))
        return opened

    def sessions(self, side: str, sessions: list[Session]) -> list[int]:
        """Set the list of one side; return the addresses of its sessions."""
        lists = self.symbols["luo_session_global"]
        head = lists + self.layout.offset("luo_session_global", f"{side}.list")
        places, at = [], self.layout.offset
        for session in sessions:
            place = self.heap(self.layout.sizes["luo_session"])
            places.append(place)
            self.set(place, "luo_session", "name", session.name.encode().ljust(64, b"\0")[:64])
            self.set(place, "luo_session", "retrieved", int(session.retrieved))
            files = []
            for file in session.files:
                record = self.heap(self.layout.sizes["luo_file"])
                files.append(record + at("luo_file", "list"))
                self.set(record, "luo_file", "fh", self.handler(file.compatible))
                if file.name is not None:
                    self.set(record, "luo_file", "file", self.open_file(file.name, file.size))
                self.set(record, "luo_file", "serialized_data", file.data)
                self.set(record, "luo_file", "retrieve_status", file.status)
                self.set(record, "luo_file", "token", file.token)
            self.link(place + at("luo_session", "file_set.files_list"), files)
            count = len(files) if session.count is None else session.count
            self.put(place + at("luo_session", "file_set.count"), struct.pack("<Q", count))
        self.link(head, [place + at("luo_session", "list") for place in places])
        self.put(lists + at("luo_session_global", f"{side}.count"), struct.pack("<q", len(places)))
        return places

    # Tables

    def tables(self) -> None:
        """Write the page tables: the direct map, in large pages if `large`."""
        shift = self.page.bit_length() - 1
        width = shift - 3
        levels = -(-(self.bits - shift) // width)
        self.root = self.static(bytes(self.page), "swapper_pg_dir", self.page)
        size = 1 << shift + (width if self.large and shift < 16 else 0)
        unit = 1 << shift + width
        first, end = self.start // unit * unit, (self._next_table + 0x100000) // unit * unit + unit
        for phys in [*range(first, end, size), *(at // size * size for at in self.mapped)]:
            address = phys - self.ram + self.direct
            table = self.image_phys(self.root)
            for level in reversed(range(1 if size > self.page else 0, levels)):
                place = shift + level * width
                index = address >> place & (1 << min(width, self.bits - place)) - 1
                at = table + 8 * index
                raw = self.pages.setdefault(at // 4096 * 4096, bytearray(4096))
                entry = int.from_bytes(raw[at % 4096 : at % 4096 + 8], "little")
                if level == 0 or (level == 1 and size > self.page):
                    leaf = (0x1E3 if level else 0x163) if self.machine == "x86_64" else (0x701 if level else 0x703)
                    self.write(at, struct.pack("<Q", phys | leaf | (1 << 63 if self.machine == "x86_64" else 0)))
                    break
                if not entry:
                    table = -(-self._next_table // self.page) * self.page
                    self._next_table = table + self.page
                    self.write(table, bytes(self.page))
                    self.write(at, struct.pack("<Q", table | (0x63 if self.machine == "x86_64" else 3)))
                else:
                    table = entry & ((1 << 48) - 1) >> shift << shift

    def finish(self, *, btf: bytes | None = None, without: tuple[str, ...] = ()) -> Kernel:
        """Write tables, BTF, kallsyms and VMCOREINFO."""
        self.tables()
        blob = self.layout.btf() if btf is None else btf
        start = self.static(blob, "__start_BTF", 4096)
        self.symbols["__stop_BTF"] = start + len(blob)
        for number in range(self.filler):
            self.symbols[f"kho_filler_{number:04}_{'x' * (number % 190)}"] = self.image + 0x800000 + number * 16
        kept = {name: at for name, at in self.symbols.items() if name not in without}
        parts = kallsyms(kept, order=8 if self.relative_base else 4)
        align = 8 if self.relative_base else 4
        for name in ("kallsyms_num_syms", "kallsyms_names", "kallsyms_markers"):
            self.static(parts[name], None if name == "kallsyms_markers" else name, align)
        for name in ("kallsyms_token_table", "kallsyms_token_index"):
            self.static(parts[name], name, align)
        offsets = self.static(bytes(4 * len(kept)), "kallsyms_offsets", align)
        for number, at in enumerate(sorted(kept.values())):
            value = at - self.image if self.relative_base else at - (offsets + 4 * number)
            self.put(offsets + 4 * number, struct.pack("<I" if self.relative_base else "<i", value))
        if self.relative_base:
            self.static(struct.pack("<Q", self.image), "kallsyms_relative_base", 8)
        self.static(parts["seqs"], None, align)
        self.vmcoreinfo()
        return self

    def vmcoreinfo(self) -> None:
        info = {"OSRELEASE": self.release, "PAGESIZE": str(self.page), "OFFSET(uts_namespace.name)": "16"}
        info["SIZE(page)"] = "64"
        for name in (
            "init_uts_ns",
            "_stext",
            "swapper_pg_dir",
            *(name for name in self.symbols if name.startswith("kallsyms_")),
        ):
            info[f"SYMBOL({name})"] = f"{self.symbols[name]:x}"
        info["SYMBOL(vmemmap)"] = f"{self.vmemmap:x}"
        if self.machine == "x86_64":
            info["NUMBER(phys_base)"] = str(self.start - (self.image - START_KERNEL_MAP))
            info["NUMBER(pgtable_l5_enabled)"] = str(int(self.bits == 57))
            info["NUMBER(KERNEL_IMAGE_SIZE)"] = str(1 << 30)
        else:
            info["NUMBER(VA_BITS)"] = str(self.bits)
            info["NUMBER(TCR_EL1_T1SZ)"] = f"{64 - self.bits:#x}"
            info["NUMBER(kimage_voffset)"] = f"{self.image - self.start:#x}"
        self.info = info

    @property
    def text(self) -> bytes:
        """VMCOREINFO, as the kernel writes it."""
        return "".join(f"{name}={value}\n" for name, value in self.info.items()).encode()

    @property
    def note(self) -> bytes:
        return note(b"VMCOREINFO", 0, self.text)

    def runs(self) -> list[tuple[int, bytes]]:
        """Adjacent pages together."""
        found: list[tuple[int, bytearray]] = []
        for phys in sorted(self.pages):
            if found and found[-1][0] + len(found[-1][1]) == phys:
                found[-1][1].extend(self.pages[phys])
            else:
                found.append((phys, bytearray(self.pages[phys])))
        return [(phys, bytes(data)) for phys, data in found]

    def core(self) -> bytes:
        """An ELF core with VMCOREINFO as its note."""
        machine = 62 if self.machine == "x86_64" else 183
        return core([Load(phys, data, len(data)) for phys, data in self.runs()], self.note, machine)

    def leave_text(self) -> int:
        """Put VMCOREINFO into a page of its own, as in memory; return its address."""
        at = self.phys(self.heap(4096, 4096))
        self.write(at, self.text)
        return at
