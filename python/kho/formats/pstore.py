"""Subtree `pstore-kho`: the last kernel messages of the previous kernel, in a public draft (abi.md section 9).

`struct pstore_ser { u32 version; struct pstore_kho_record record; }`. The backend of the draft keeps one record; more
are read if they follow, aligned to 8 bytes. A record is a part of a dump as pstore makes it, with a first line such as
`Panic#1 Part1`, and it may be compressed (raw deflate; fs/pstore/platform.c). Part 1 is the end of a dump.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

from ..errors import FormatError
from .declare import Declared, Int, Place, Record, s32, s64, u32
from .registry import Blob, decoder

__all__ = ["PstoreKho", "PstoreRecord"]

MOST_TEXT = 32 << 20
"""Maximum bytes of text of all records: CONFIG_LOG_BUF_SHIFT, the size of a kernel's log, is at most 25."""
REASONS = {0: "Undef", 1: "Panic", 2: "Oops", 3: "Emergency", 4: "Shutdown"}
"""enum kmsg_dump_reason (include/linux/kmsg_dump.h)."""
HEAD = re.compile(rb"\A[A-Za-z ]{1,32}#\d{1,10} Part\d{1,10}\n")
NANOSECONDS = 1_000_000_000


class PstoreRecord(Record):
    """The head of a record; `size` bytes follow it."""

    size: Int = s64(unit="bytes")
    time_sec = s64(unit="s")
    time_nsec = u32(unit="ns")
    count = s32()
    reason = u32(enum=REASONS)
    part = u32()
    compressed = u32()

    buf: bytes = b""
    """The bytes as they were stored."""

    @property
    def plausible(self) -> bool:
        """Whether the numbers can be those of a record."""
        return self.size > 0 and self.time_nsec < NANOSECONDS and self.reason in REASONS and self.compressed in (0, 1)

    def text(self, most: int = MOST_TEXT) -> bytes:
        """Return the text. Raises: FormatError if it cannot be decompressed, or has more than `most` bytes."""
        if not self.compressed:
            return self.buf
        where = f"record {self.count}, part {self.part}"
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            made = unpack.decompress(self.buf, most + 1)
        except zlib.error as error:
            raise FormatError(f"{where}: its {self.size} bytes cannot be decompressed: {error}") from error
        if len(made) > most:
            raise FormatError(f"{where}: more than {most} bytes of text come out of it")
        if not unpack.eof:
            raise FormatError(f"{where}: its {self.size} bytes are cut short")
        return made


HEADER = PstoreRecord.layout.size


@decoder("pstore-kho")
class PstoreKho(Declared):
    """The records of the previous kernel's pstore."""

    draft = True
    source = "include/linux/kho/abi/pstore.h of the series for a KHO backend of pstore"

    version = u32(equals=1)

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        self.records: list[PstoreRecord] = []
        self.start = 0
        """Where the first record begins: 8 as C lays it out, 4 without padding."""
        end = blob.size
        if end is None:
            end = blob.inc.page_size << (blob.inc.order_at(blob.phys) or 0)
        for self.start in (8, 4):
            if end < self.start + HEADER or not self._record(self.start, end).size:
                continue
            self.records = list(self._read(self.start, end))
            if self.records:
                break
        else:
            self.start = 8
            if end >= 8 + HEADER and (first := self._record(8, end)).size:
                raise self.malformed(
                    f"size {first.size}, time_nsec {first.time_nsec}, reason {first.reason}, compressed "
                    f"{first.compressed}: not a record that fits {end} bytes"
                )
        where = "laid out by C" if self.start == 8 else "packed"
        self.unsure = f"padding: the first record is read as {where}"

    def _record(self, at: int, end: int) -> PstoreRecord:
        phys = self.blob.phys + at
        return PstoreRecord.load(self.blob.read(HEADER, at), Place(self.blob, phys))

    def _read(self, at: int, end: int) -> Iterator[PstoreRecord]:
        """Read records from `at` on, up to the first that cannot be one."""
        while at + HEADER <= end:
            record = self._record(at, end)
            if not record.plausible or record.size > end - at - HEADER:
                return
            self.blob.budget.take_objects(1, f"{self.blob.owner}: record")
            record.buf = self.blob.read(record.size, at + HEADER)
            yield record
            at += HEADER + record.size
            at += -at % (8 if self.start == 8 else 1)

    def dmesg(self) -> bytes:
        """Return the kernel messages of all records, in the order in which they were logged.

        Records of one dump, which have one count, are joined from the last part to the first. A record that cannot be
        decompressed is a line that says so.

        Raises: FormatError if no record can be read.
        """
        left, made, refused = MOST_TEXT, [], []
        for record in sorted(self.records, key=lambda record: (record.count, -record.part)):
            try:
                text = record.text(left)
            except FormatError as error:
                refused.append(str(error))
                made.append(f"[kho: {error}]\n".encode())
                continue
            left -= len(text)
            made.append(HEAD.sub(b"", text, count=1))
        if len(refused) == len(self.records):
            raise self.malformed(refused[0] if refused else "no record: the previous kernel wrote no messages")
        return b"".join(made)

    def describe(self) -> dict[str, Any]:
        """Return the version and the heads of the records."""
        said = super().describe()
        units = {f"records.{name}": unit for name, unit in PstoreRecord.units().items()}
        return said | {"records": [record.describe() for record in self.records], "units": units}

    @classmethod
    def encode_records(cls, *records: dict[str, Any], version: int = 1) -> bytes:
        """Return the bytes of a subtree with these records: fields of `PstoreRecord`, and `buf` with the contents.

        Raises: ParameterError.
        """
        made = cls.encode(version=version).ljust(8, b"\0")
        for fields in records:
            given = dict(fields)
            buf = bytes(given.pop("buf"))
            given.setdefault("size", len(buf))
            made += bytes(-len(made) % 8) + PstoreRecord.layout.pack(given, None) + buf
        return made
