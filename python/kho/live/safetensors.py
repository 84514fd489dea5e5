"""Weights that are read once: the first start reads a safetensors file, every later one attaches.

    >>> weights = kho.live.safetensors.load("model.safetensors")
    >>> weights["embed.weight"]  # a read-only numpy array, where the first process put it
    >>> torch.from_numpy(weights["embed.weight"]).view(torch.bfloat16)  # zero-copy; see weights.dtypes

Tensors are read straight into image memory, one after the other: no second copy of them is ever there. An image has no
owner once it is filled, so any number of processes attach at the same time; of those that start while it is being
filled, all but one wait. A file that was changed is another file (`Identity`): its image takes the place of the old
one, which stays whole for whoever is reading it.

`load` keeps the image as a file on tmpfs. `load_into` fills an image that a service owns already, however that gets
from one process to the next.

The header is read by the `safetensors` library (`pip install kho[live]`), which refuses one that is cut short, too
large, no JSON, or whose tensors overlap, leave holes or do not fit the file. numpy has no dtype for some of the
format's: `RAW` says what they are handed out as, `Tensors.dtypes` what they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import FormatError, KhoError, ParameterError, SourceError, StaleError
from ..payload.live import MOST_DIMENSIONS, MOST_NAME, PAGE
from . import attach
from . import open as open_image
from .handle import ALIGN, Handle
from .reader import Reader

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DTYPES", "RAW", "Identity", "Tensors", "load", "load_into", "place_of", "release"]

DTYPES = {
    "BOOL": "|b1",
    "I8": "|i1",
    "U8": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
}
"""The format's dtypes that are numpy's."""
RAW = {
    "BF16": "<u2",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "F8_E8M0": "|u1",
    "F8_E4M3FNUZ": "|u1",
    "F8_E5M2FNUZ": "|u1",
}
"""Those that numpy has not, and what stands for them: `.view(ml_dtypes.bfloat16)`, or torch's, makes them that."""
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Elements of less than a byte: handed out as `|u1` of one dimension, the bytes of the file."""

PLACE = "/dev/shm/kho-live-{uid}"
INDEX = "__metadata__"
"""The object that says what the others came from; the format reserves the name, so no tensor has it."""
VERSION = "safetensors-1"
MOST_HEADER = 64 << 20
MOST_TENSORS = 1 << 18
CHUNK = 64 << 20
"""Bytes that are read at a time."""
WAIT = 3600.0
"""Seconds to wait for a process that is filling the image."""
ROOM = 64 << 20


@dataclass(frozen=True)
class Identity:
    """What makes a file the same file: size, time and inode, or size and contents."""

    size: int
    mtime_ns: int | None
    inode: int | None
    sha256: str | None


class Spec(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: str
    """The format's."""
    shape: tuple[int, ...]
    at: int
    """Where its bytes begin."""
    nbytes: int


class Tensors(dict[str, "np.ndarray[Any, Any]"]):
    """Tensors by name, in the order of the file: read-only numpy arrays, which keep the memory they lie in."""

    dtypes: dict[str, str]
    """The format's name of each one's dtype; for those of `RAW` and `BITS` the arrays' own say only their size."""
    shapes: dict[str, tuple[int, ...]]
    """The format's shapes, in elements."""
    metadata: dict[str, str]
    """The file's."""
    inherited: bool
    """Whether they were there, and the file's tensors were not read."""


def load(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    backing: str | os.PathLike[str] | None = None,
    digest: bool = False,
    verify: bool = False,
    timeout: float = WAIT,
) -> Tensors:
    """Give a file's tensors: attached, if an earlier call left them; read, if not, or if the file has changed.

    Args:
        name: the image's; by default one that is made of the file's path.
        backing: the image's path on tmpfs or pmem; by default a file in this user's directory in /dev/shm
            (`place_of`), where it stays until `release`.
        digest: know the file by its contents (SHA-256), which are read each time, rather than by size, time and inode.
        verify: compare every tensor with its checksum.
        timeout: seconds to wait while another process fills the image.

    Raises: SourceError; FormatError for a file that is no safetensors, or an image that was tampered with;
        OutOfMemoryError; BusyError; StaleError if the file changes while it is read; ImportError without `safetensors`.

    """
    source = Path(path)
    name = _name_of(source) if name is None else name
    where = place_of(name) if backing is None else Path(backing)
    fd = _open(source)
    try:
        identity = _identity(fd, source, digest)
        while True:
            try:
                with attach(where) as candidate:
                    if (found := _tensors(candidate, identity)) is not None:
                        if verify:
                            candidate.verify()
                        return found
            except StaleError:
                continue
            except SourceError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
            try:
                filled = _fill_file(where, name, fd, source, identity, timeout)
            except SourceError:
                if backing is not None or where.parent.exists():
                    raise
                place_of(name)  # a `release` has removed the directory, which it found empty
                continue
            if filled is not None:
                return filled
    finally:
        os.close(fd)


def load_into(h: Handle, path: str | os.PathLike[str], *, prefix: str = "", digest: bool = False) -> Tensors:
    """Give a file's tensors from an image that is this process's: read into it and committed, unless they are there.

    Tensors of a file that has changed replace the ones before; there must be room for both.

    Args: prefix: of the objects' names, so that one image holds several files.
    Raises: as `load`; NotOwnerError. Nothing has changed then.
    """
    source = Path(path)
    fd = _open(source)
    try:
        identity = _identity(fd, source, digest)
        if (found := _tensors(h, identity, prefix)) is not None:
            return found
        specs, metadata = _header(fd, source)
        if h.uncommitted:
            raise ParameterError(f"{source}: commit or roll back {', '.join(h.uncommitted[:3])} first")
        try:
            _fill(h, prefix, fd, source, identity, specs, metadata)
        except BaseException:
            h.rollback()
            raise
        return _made(h, identity, prefix)
    finally:
        os.close(fd)


def release(
    path: str | os.PathLike[str], *, name: str | None = None, backing: str | os.PathLike[str] | None = None
) -> bool:
    """Remove the image of a file, which need not be there any more; whether there was one.

    Its memory is given back when the last process that has attached it ends.
    """
    where = place_of(_name_of(Path(path)) if name is None else name) if backing is None else Path(backing)
    there = True
    try:
        where.unlink()
    except FileNotFoundError:
        there = False
    except OSError as error:
        raise SourceError(f"{where}: {error.strerror}") from error
    if backing is None:
        with contextlib.suppress(OSError):  # others' images are in it
            where.parent.rmdir()
    return there


def place_of(name: str) -> Path:
    """Say where images are by default: /dev/shm/kho-live-UID, which is this user's alone; it is made.

    Raises: ParameterError for a name that cannot be a file's; SourceError if the directory is somebody else's.
    """
    if "/" in name or name in (".", "..") or not 1 <= len(name.encode()) <= MOST_NAME - 5:
        raise ParameterError(f"name {name!r}: a file's name of at most {MOST_NAME - 5} bytes is needed, or backing=")
    place = Path(PLACE.format(uid=os.geteuid()))
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
    except OSError as error:
        raise SourceError(f"{place}: {error.strerror}; give backing=, a path on tmpfs") from error
    # /dev/shm is everybody's, and whoever may write the directory may replace what is in it.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise SourceError(f"{place}: not a directory that is this user's alone; remove it, or give backing=")
    return place / f"{name}.live"


def _name_of(source: Path) -> str:
    full = os.fsencode(source.resolve())
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", source.stem)[:100]
    return f"{stem}-{hashlib.sha256(full).hexdigest()[:16]}"


# The file


def _open(source: Path) -> int:
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"{source}: {error.strerror}") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise SourceError(f"{source}: not a file")


def _identity(fd: int, source: Path, digest: bool) -> Identity:
    status = os.fstat(fd)
    if not digest:
        return Identity(status.st_size, status.st_mtime_ns, status.st_ino, None)
    try:
        with open(os.dup(fd), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(0)
            return Identity(status.st_size, None, None, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise SourceError(f"{source}: {error.strerror}") from error


def _header(fd: int, source: Path) -> tuple[list[Spec], dict[str, str]]:
    """Have the library read and check the header, and say where each tensor is.

    It gives no places, but it has seen to it that tensors lie one behind the other, without holes, to the file's end.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("safetensors files need the safetensors package: pip install 'kho[live]'") from error
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(MOST_HEADER, size - 8):
        raise FormatError(f"{source}: a header of {length:#x} bytes, in a file of {size:#x}")
    try:
        with safe_open(f"/proc/self/fd/{fd}", framework="numpy") as file:
            names: list[str] = file.offset_keys()
            if len(names) > MOST_TENSORS:
                raise FormatError(f"{source}: {len(names)} tensors, at most {MOST_TENSORS} are read")
            metadata = {str(key): str(value) for key, value in (file.metadata() or {}).items()}
            specs, at = [], 8 + length
            for name in names:
                part = file.get_slice(name)
                spec = _spec(source, name, part.get_dtype(), tuple(part.get_shape()), at)
                specs.append(spec)
                at += spec.nbytes
    except (SafetensorError, OSError, OverflowError) as error:
        if isinstance(error, KhoError):
            raise
        raise FormatError(f"{source}: {error}") from error
    if at != size:
        raise FormatError(f"{source}: tensors end at {at:#x}, the file at {size:#x}")
    return specs, metadata


def _spec(source: Path, name: str, dtype: str, shape: tuple[int, ...], at: int) -> Spec:
    if name == INDEX or "\0" in name or not 1 <= len(name.encode()) <= MOST_NAME or len(shape) > MOST_DIMENSIONS:
        raise FormatError(f"{source}: tensor {name!r} of {len(shape)} dimensions: images have no such object")
    count = math.prod(shape)
    if dtype in DTYPES or dtype in RAW:
        code = DTYPES.get(dtype) or RAW[dtype]
        return Spec(name, dtype, shape, at, count * int(code[2:]))
    if dtype in BITS and count * BITS[dtype] % 8 == 0:
        return Spec(name, dtype, shape, at, count * BITS[dtype] // 8)
    raise FormatError(f"{source}: tensor {name!r} of dtype {dtype} and shape {shape} is not known to kho")


# The image


def _fill_file(where: Path, name: str, fd: int, source: Path, identity: Identity, timeout: float) -> Tensors | None:
    """Make the image of a file, or let who is at it finish; None if there is one now to be looked at."""
    specs, metadata = _header(fd, source)
    # Holes take no memory, so there is room for what alignment wastes.
    room = ROOM + sum(-(-spec.nbytes // PAGE) * PAGE + min(spec.nbytes, ALIGN * PAGE) + PAGE for spec in specs)
    with open_image(name, room, version=VERSION, backing=where, timeout=timeout) as h:
        if (found := _tensors(h, identity)) is not None:
            return found
        if h.generation or h.stats()["size"] < room:
            # Of a file that was changed since: who has attached it keeps it. Only its owner removes it, so it is this.
            where.unlink()
            return None
        _fill(h, "", fd, source, identity, specs, metadata)
        return _made(h, identity, "")


def _fill(
    h: Handle, prefix: str, fd: int, source: Path, identity: Identity, specs: list[Spec], metadata: dict[str, str]
) -> None:
    begun = os.fstat(fd)
    if (before := _index(h, prefix)) is not None:
        for name in before["tensors"]:
            if prefix + name in h:
                del h[prefix + name]
    for spec in specs:
        code = DTYPES.get(spec.dtype) or RAW.get(spec.dtype)
        array = h.empty(prefix + spec.name, spec.shape if code else spec.nbytes, code or "|u1")
        if spec.nbytes:
            _read(fd, source, memoryview(array.reshape(-1).view("u1")), spec)
    now = os.fstat(fd)
    if (begun.st_size, begun.st_mtime_ns) != (now.st_size, now.st_mtime_ns) or identity.size != now.st_size:
        raise StaleError(f"{source}: it was changed while it was being read")
    index = {
        **asdict(identity),
        "metadata": metadata,
        "tensors": {spec.name: [spec.dtype, list(spec.shape)] for spec in specs},
    }
    h.put(prefix + INDEX, json.dumps(index).encode())
    h.commit()


def _read(fd: int, source: Path, place: memoryview, spec: Spec) -> None:
    done = 0
    while done < spec.nbytes:
        try:
            got = os.preadv(fd, [place[done : done + CHUNK]], spec.at + done)
        except OSError as error:
            raise SourceError(f"{source}: {error.strerror}") from error
        if not got:
            raise StaleError(f"{source}: it was cut short while it was being read")
        done += got


def _index(reader: Reader, prefix: str) -> dict[str, Any] | None:
    """Read what an image says of its tensors; None if it is not this module's."""
    if prefix + INDEX not in reader:
        return None
    try:
        index = json.loads(bytes(reader[prefix + INDEX]))
        return index if isinstance(index["tensors"], dict) and isinstance(index["metadata"], dict) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _tensors(reader: Reader, identity: Identity, prefix: str = "") -> Tensors | None:
    """Give the tensors of an image, if it has those of this file."""
    index = _index(reader, prefix)
    if index is None or any(index.get(key, "") != value for key, value in asdict(identity).items()):
        return None
    found = Tensors()
    found.inherited = True
    found.metadata = index["metadata"]
    found.dtypes, found.shapes = {}, {}
    try:
        for name, (dtype, shape) in index["tensors"].items():
            found[name] = reader[prefix + name]
            found.dtypes[name] = dtype
            found.shapes[name] = tuple(shape)
    except (KhoError, ValueError, TypeError):
        return None
    return found


def _made(h: Handle, identity: Identity, prefix: str) -> Tensors:
    made = _tensors(h, identity, prefix)
    if made is None:
        raise FormatError("what was just committed is not there: the image was changed by somebody else")
    made.inherited = False
    return made
