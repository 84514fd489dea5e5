"""The head of an image: superblock, two slots for roots, and a journal of uncommitted changes.

    0         the arena's ELF header and note; in it, 8-byte aligned, the word `fdt_phys`: the committed root FDT
    4096      SUPER: address of the word, range of the memory, checksums. Written once
    4608      slot 0: the root of an even generation
    5120      slot 1: the root of an odd one
    6144      the owner's pid, for messages only
    6160      LEFT: pages of uncommitted objects that arrays of earlier owners may still show
    8192      JOURNAL: the names of objects with uncommitted changes
    2 MiB     the memory

The word selects the generation. It is the address of a root FDT; the slot with that address has the generation, the
range of its metadata, and the metadata's checksum. A commit writes only to memory that the word does not lead to, so
storing the word, 8 aligned bytes, is the commit. The slot of the previous generation is emptied at once: no later
damage to the word can lead back to it.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from ...errors import FormatError, UnsupportedAbiError
from .pins import GENERATIONS

HEAD = 2 << 20
SUPER_AT = 4096
SLOT_AT = (4608, 5120)
OWNER_AT = 6144
LEFT_AT = 6160
JOURNAL_AT = 8192
JOURNAL_END = 64 << 10
MAGIC = b"kho-live"
SLOT_MAGIC = b"kho-root"
FORMAT = 2
"""2: readers lock the generation that they read (`pins`), and owners keep its memory."""
_SUPER = struct.Struct("<8sIIQQQQI")
_SLOT = struct.Struct("<8sQQQQII")
_CRC = struct.Struct("<I")
SUPER_BYTES, SLOT_BYTES = _SUPER.size + _CRC.size, _SLOT.size + _CRC.size
NAMES_AT = JOURNAL_AT + 16
EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
PT_LOAD, PT_NOTE = 1, 4
FDT_PHYS_IN_NOTE = 16 + 24
"""Offset of `struct Note.fdt_phys` (arena/header.rs) in the note: 16 bytes of header and name, then 24 of fields."""


class Super(NamedTuple):
    """The superblock, which never changes."""

    word_at: int
    """Offset of the word in the file."""
    base: int
    """Physical address of the first byte of memory."""
    size: int
    """Bytes of memory."""
    offset: int
    """Offset of the memory in the file."""
    elf_bytes: int
    """Bytes of the ELF header and note."""
    elf_crc: int
    """CRC-32 of these bytes, with zeros in place of the word."""


class Root(NamedTuple):
    """A slot: one generation."""

    generation: int
    fdt_phys: int
    meta_phys: int
    """Address of the metadata: root FDT, subtree, map."""
    meta_bytes: int
    meta_crc: int


def _sealed(body: bytes) -> bytes:
    return body + _CRC.pack(zlib.crc32(body))


def _unsealed(head: memoryview, at: int, layout: struct.Struct) -> tuple[int, ...] | None:
    """Unpack a structure that ends with its checksum; None if that is wrong."""
    body = bytes(head[at : at + layout.size])
    if _sealed(body) != bytes(head[at : at + layout.size + _CRC.size]):
        return None
    return layout.unpack(body)


def elf_crc(head: memoryview, elf_bytes: int, word_at: int) -> int:
    """Compute the CRC-32 of the ELF header and note, with zeros in place of the word."""
    elf = bytearray(head[:elf_bytes])
    elf[word_at : word_at + 8] = bytes(8)
    return zlib.crc32(elf)


def describe_elf(elf: bytes) -> tuple[int, int, int]:
    """Return offsets in the head of a new arena's file: of the word, of the memory, and of the note's end."""
    _, _, _, _, _, phoff, _, _, _, phentsize, phnum, *_ = EHDR.unpack_from(elf)
    headers = [PHDR.unpack_from(elf, phoff + i * phentsize) for i in range(phnum)]
    (note,) = [header for header in headers if header[0] == PT_NOTE]
    (load,) = [header for header in headers if header[0] == PT_LOAD]
    return note[2] + FDT_PHYS_IN_NOTE, load[2], note[2] + note[5]


def write_super(head: memoryview, sup: Super) -> None:
    """Write the superblock."""
    packed = _SUPER.pack(MAGIC, FORMAT, sup.elf_bytes, sup.word_at, sup.base, sup.size, sup.offset, sup.elf_crc)
    head[SUPER_AT : SUPER_AT + len(packed) + _CRC.size] = _sealed(packed)


def read_super(head: memoryview, file_size: int) -> Super:
    """Read and check the superblock. Raises: FormatError; UnsupportedAbiError for another format."""
    if bytes(head[SUPER_AT : SUPER_AT + len(MAGIC)]) != MAGIC:
        raise FormatError(f"no kho.live image: {MAGIC.decode()!r} is not at {SUPER_AT:#x} of the file")
    fields = _unsealed(head, SUPER_AT, _SUPER)
    if fields is None:
        raise FormatError(f"superblock at {SUPER_AT:#x}: wrong checksum")
    _, version, elf_bytes, word_at, base, size, offset, crc = fields
    if version > FORMAT:
        raise UnsupportedAbiError(f"image of format {version}, not {FORMAT}: a newer kho wrote it")
    if version < FORMAT:
        raise UnsupportedAbiError(
            f"image of format {version}, not {FORMAT}: an older kho wrote it, whose owners do not keep what others "
            "read; release it with that version, and let the service fill a new one"
        )
    sup = Super(word_at, base, size, offset, elf_bytes, crc)
    fits = offset == HEAD and 0 < size <= file_size - offset and size % 4096 == 0
    if not fits or base % 4096 or base == 0 or base + size > 1 << 63:
        raise FormatError(f"superblock: {size:#x} bytes of memory do not fit a file of {file_size:#x}")
    if elf_bytes > SUPER_AT or word_at % 8 or word_at + 8 > elf_bytes:
        raise FormatError(f"superblock: a word at {word_at:#x} is not in a header of {elf_bytes:#x} bytes")
    if elf_crc(head, elf_bytes, word_at) != crc:
        raise FormatError("ELF header and note: wrong checksum")
    return sup


def write_root(head: memoryview, sup: Super, root: Root) -> None:
    """Fill the slot of a generation, before the word refers to it."""
    at = SLOT_AT[root.generation % 2]
    packed = _SLOT.pack(SLOT_MAGIC, *root, sup.elf_crc)
    head[at : at + len(packed) + _CRC.size] = _sealed(packed)


def retire(head: memoryview, generation: int) -> None:
    """Empty the slot of the previous generation."""
    at = SLOT_AT[(generation - 1) % 2]
    head[at : at + SLOT_BYTES] = bytes(SLOT_BYTES)


def read_root(head: memoryview, slot: int, sup: Super) -> Root | None:
    """Read a slot; None if it is empty, cut short, or out of range."""
    fields = _unsealed(head, SLOT_AT[slot], _SLOT)
    if fields is None or head[SLOT_AT[slot] : SLOT_AT[slot] + len(SLOT_MAGIC)] != SLOT_MAGIC:
        return None
    root = Root(*fields[1:6])
    inside = root.meta_phys >= sup.base and root.meta_phys + root.meta_bytes <= sup.base + sup.size
    aligned = root.meta_phys % 4096 == 0 and root.meta_bytes % 4096 == 0 and root.fdt_phys % 4096 == 0
    there = root.meta_phys <= root.fdt_phys < root.meta_phys + root.meta_bytes
    numbered = root.generation % 2 == slot and root.generation < GENERATIONS
    good = inside and aligned and there and numbered and fields[6] == sup.elf_crc
    return root if good else None


class Left:
    """Runs of pages that no commit refers to, but that arrays of an earlier owner or of its children may still show.

    Two words: the committed generation plus one, and the number of runs. Then the runs: first page, number of pages.
    The next owner reads this if one of `pins.WRITERS` is locked; the lock is taken after this is written.
    """

    MOST = (JOURNAL_AT - LEFT_AT - 16) // 16
    MANY = (1 << 64) - 1
    """The number of runs when there are more than `MOST`."""

    def __init__(self, head: memoryview) -> None:
        self._words = head[LEFT_AT:JOURNAL_AT].cast("Q")

    def add(self, generation: int, runs: list[tuple[int, int]]) -> None:
        """Add runs to those of this generation."""
        words = self._words
        if words[0] != generation + 1:
            words[0] = 0
            words[1] = 0
        count = words[1]
        for start, n in runs:
            if count >= self.MOST:
                count = self.MANY
                break
            words[2 + 2 * count], words[3 + 2 * count] = start, n
            count += 1
        words[1] = count
        words[0] = generation + 1

    def runs(self, generation: int) -> list[tuple[int, int]] | None:
        """Return the runs of a generation; None if they are not recorded, or were too many."""
        words = self._words
        if words[0] != generation + 1 or words[1] > self.MOST:
            return None
        return [(words[2 + 2 * at], words[3 + 2 * at]) for at in range(words[1])]


class Journal:
    """Names of objects that were changed since the commit of a generation, as far as they fit.

    Two words: the generation plus one, and the number of bytes of names. Each is stored by one aligned store (`struct`
    would store zeros first), so a process that is killed leaves the old list, or the list with one more name.
    """

    def __init__(self, head: memoryview) -> None:
        self._head = head
        self._words = head[JOURNAL_AT:NAMES_AT].cast("Q")

    def clear(self) -> None:
        """Empty the journal."""
        self._words[0] = 0

    def begin(self, generation: int) -> None:
        """Start an empty list of changes after a generation."""
        self.clear()
        self._words[1] = 0
        self._words[0] = generation + 1

    def add(self, name: str) -> None:
        """Add a name, before its memory changes."""
        used = self._words[1]
        raw = name.encode()
        at = NAMES_AT + used
        if at + 1 + len(raw) > JOURNAL_END:
            return
        self._head[at : at + 1 + len(raw)] = bytes([len(raw)]) + raw
        self._words[1] = used + 1 + len(raw)

    def names(self, generation: int) -> tuple[str, ...]:
        """Return the names added since a generation, each once."""
        tag, used = self._words
        if tag != generation + 1 or used > JOURNAL_END - NAMES_AT:
            return ()
        raw = bytes(self._head[NAMES_AT : NAMES_AT + used])
        names: dict[str, None] = {}
        at = 0
        while at < len(raw):
            names[raw[at + 1 : at + 1 + raw[at]].decode("utf-8", "backslashreplace")] = None
            at += 1 + raw[at]
        return tuple(names)
